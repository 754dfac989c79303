"""The standard library as text: documentation pages and source, in pieces that each name their module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmctl_data.readers import Document
from llmctl_data.stdlib import Entity, Module, first_paragraph

PAGE_CHARS = 1500
SOURCE_CHARS = 3000


@dataclass(frozen=True)
class Page:
    """A document, and the entities that it introduces."""

    document: Document
    entities: tuple[Entity, ...]


def docs(module: Module) -> Iterator[Page]:
    """What a module says about itself, then each public function and class with signature and docstring."""
    title = f"Module {module.name}. {first_paragraph(module.doc)}".strip()
    opening = [title, *_paragraphs(module.doc)[1:]]
    sections: list[tuple[str, Entity | None]] = [(part, None) for part in opening]
    sections += [(part, entity if first else None) for entity in module.entities for first, part in _section(entity)]
    number, text, entities = 0, "", list[Entity]()
    for part, entity in sections:
        if text and len(text) + len(part) > PAGE_CHARS:
            yield _page(module, number, text, entities)
            number, text, entities = number + 1, title, []
        text = f"{text}\n\n{part}" if text else part
        if entity is not None:
            entities.append(entity)
    yield _page(module, number, text, entities)


def _page(module: Module, number: int, text: str, entities: Sequence[Entity]) -> Page:
    return Page(Document(f"{module.name}#{number}", module.name, text), tuple(entities))


def _section(entity: Entity) -> Iterator[tuple[bool, str]]:
    """(whether it introduces the entity, text) of the paragraphs about it."""
    head = f"`{entity.name}` is a {entity.kind} in the module {entity.module}."
    first, *rest = _paragraphs(entity.doc) or [""]
    yield True, "\n".join(filter(None, [head, f"{entity.qualified}{entity.signature}", first]))
    yield from ((False, part) for part in rest)
    yield from ((False, "\n".join(filter(None, method))) for method in entity.methods)


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in text.split("\n\n") if part.strip()]


def source(module: Module) -> Iterator[Document]:
    """The module's source, cut before top-level definitions where possible."""
    title = f"Source of the module {module.name}."
    number, lines, size = 0, list[str](), 0
    for line in module.source.splitlines():
        fresh = bool(line) and not line[0].isspace() and line[0] not in ")]}"
        if lines and (size > SOURCE_CHARS and fresh or size > 2 * SOURCE_CHARS):
            yield _source_piece(module, number, title, lines)
            number, lines, size = number + 1, [], 0
        lines.append(line)
        size += len(line) + 1
    if any(line.strip() for line in lines):
        yield _source_piece(module, number, title, lines)


def _source_piece(module: Module, number: int, title: str, lines: Sequence[str]) -> Document:
    text = "\n".join(lines).strip("\n")
    return Document(f"{module.name}:source#{number}", module.name, f"{title}\n\n{text}")
