"""Chat templates: Hugging Face's Jinja conventions, with the text of messages kept apart from the template's own.

A template is rendered twice, the second time with private-use characters around every string that comes from a
message. Where both renderings agree, it is known of every character who wrote it: special tokens are then recognised
in the template's text only, and the assistant's part is known without comparing prefixes.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from llmctl.errors import InputError
from llmctl.text.tools import check_tools, plain_calls, tools_prompt

if TYPE_CHECKING:
    import jinja2

ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*\Z")
WORD = re.compile(r"[A-Za-z0-9_-]+\Z")
_COMPARED = ("role", "type", "id", "tool_call_id")
"""What templates compare or measure: left as it is if it is one word."""
_NAMING = ("properties", "patternProperties", "$defs", "definitions", "arguments")
"""Objects whose keys are a user's own names."""
PRIVATE = range(0xF0000, 0x10FFFE)
"""Supplementary private-use planes: characters that mean nothing, so marks can be drawn from those a chat lacks."""
_PRIVATE = re.compile(f"[{chr(PRIVATE[0])}-{chr(PRIVATE[-1])}]")


@dataclass(frozen=True)
class Span:
    """`text[start:end]` comes from a message; `spoken` if it is what the assistant says."""

    start: int
    end: int
    spoken: bool


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered chat: one special token (`token`), or text to encode with special tokens on or off.

    `spoken` holds the stretches of `text` that the assistant says.
    """

    text: str
    token: int | None
    special: bool
    spoken: tuple[tuple[int, int], ...]

    def assistant_at(self, start: int, end: int) -> bool:
        """Whether the assistant says any of `text[start:end]`."""
        return _overlaps((start, end), self.spoken)


class ChatTemplate:
    """One compiled template with the special tokens of its tokenizer."""

    def __init__(self, source: str, names: Mapping[str, Any], special: Mapping[str, int]) -> None:
        self._source = source
        self._names = dict(names)
        self._special = dict(special)
        longest_first = sorted(special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) if special else r"(?!)")

    @property
    def source(self) -> str:
        """The template itself."""
        return self._source

    @property
    def takes_tools(self) -> bool:
        """Whether the template reads `tools`; else `llmctl.text.tools.tools_prompt` describes them."""
        return _reads_tools(self._source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The text of a conversation, as transformers' `apply_chat_template(tokenize=False)` gives it."""
        return self._render(*self._prepared(messages, tools), add_generation_prompt)

    def _prepared(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """What the template is given: messages of plain content, and the tools if it reads them."""
        plain = [plain_message(message) for message in messages]
        if self.takes_tools:
            return plain, check_tools(tools)
        if tools or any(message["role"] == "tool" or message.get("tool_calls") for message in plain):
            plain = tools_prompt(plain, tools)
        return plain, []

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], add_generation_prompt: bool
    ) -> str:
        import jinja2

        try:
            text: str = _compiled(self._source).render(
                **self._names,
                messages=messages,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise InputError(
                f"the chat template refuses these messages: {error}", hint="check the roles and their order"
            ) from error
        return text

    def pieces(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[Piece]:
        """The rendered chat in pieces to be encoded one after the other; one piece if nothing needs care."""
        if not messages:
            raise InputError("the conversation is empty", hint="give at least one message")
        plain, shown = self._prepared(messages, tools)
        text = self._render(plain, shown, add_generation_prompt)
        spans = self._spans(plain, shown, text, add_generation_prompt)
        if spans is None:
            return self._unmarked(plain, shown, text, add_generation_prompt)
        foreign = [(span.start, span.end) for span in spans]
        matches = list(self._pattern.finditer(text))
        spoken = self._closed([span for span in spans if span.spoken], text)
        if not any(_overlaps(match.span(), foreign) for match in matches):
            return [Piece(text, None, True, tuple(spoken))]
        return list(self._apart(text, foreign, spoken))

    def _spans(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], text: str, add_generation_prompt: bool
    ) -> list[Span] | None:
        """Which stretches of `text` come from messages and tools; None if the template looks into them."""
        marks = _free_marks(json.dumps([messages, tools], ensure_ascii=False, default=str) + self._source)
        opening: dict[str, tuple[bool, str]] = {}
        closing: set[str] = set()

        def mark(value: Any, spoken: bool, names: bool = False) -> Any:
            """`names`: all keys of an object are a user's words, and so is what stands under `type`."""
            if isinstance(value, str) and value.strip():
                body = value.strip()  # marks go inside the white space, so that `trim` still finds it
                lead, tail = value.split(body, 1)
                opened, closed = next(marks), next(marks)
                opening[opened] = (spoken, lead)
                closing.add(closed)
                return lead + opened + body + closed + tail
            if isinstance(value, Mapping):
                return {
                    mark(key, False) if names or self._pattern.search(key) else key: item
                    if key in _COMPARED and _is_word(item) and not names
                    else mark(item, False, key in _NAMING)
                    for key, item in value.items()
                }
            if isinstance(value, list):
                return [mark(item, False, names) for item in value]
            return value

        marked = []
        for message in messages:
            spoken = message["role"] == "assistant"
            kept = {key for key, value in message.items() if key in _COMPARED and _is_word(value)}
            marked.append(
                {
                    key: value if key in kept else mark(value, spoken and key == "content")
                    for key, value in message.items()
                }
            )
        try:
            rendered = self._render(marked, mark(tools, False), add_generation_prompt)
        except InputError:
            return None
        found = _unmark(rendered, opening, closing)
        return None if found is None or found[0] != text else found[1]

    def _closed(self, spans: Iterable[Span], text: str) -> list[tuple[int, int]]:
        """The assistant's stretches, each lengthened by the special token that closes it."""
        result = []
        for span in spans:
            blank = re.compile(r"\s*").match(text, span.end)
            after = self._pattern.match(text, blank.end() if blank else span.end)
            result.append((span.start, after.end() if after else span.end))
        return result

    def _apart(self, text: str, foreign: list[tuple[int, int]], spoken: list[tuple[int, int]]) -> Iterator[Piece]:
        """Pieces in which only the template's own special tokens are tokens."""
        cut = 0
        for start, end in _between(foreign, len(text)):
            for match in self._pattern.finditer(text, start, end):
                yield from _text_piece(text, cut, match.start(), spoken)
                inside = _overlaps(match.span(), spoken)
                yield Piece(match.group(), self._special[match.group()], True, ((0, 1),) if inside else ())
                cut = match.end()
        yield from _text_piece(text, cut, len(text), spoken)

    def _unmarked(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], text: str, add_generation_prompt: bool
    ) -> list[Piece]:
        """A template that changes what messages say: refuse typed special tokens, find the assistant by its words."""
        typed = self._pattern.search(json.dumps([messages, tools], ensure_ascii=False, default=str))
        if typed:
            raise InputError(
                f"a message holds the special token {typed.group()} as text, and this chat template rewrites messages",
                hint="remove that text from the message",
            )
        spoken, cursor = [], 0
        for message in messages:
            said = str(message.get("content") or "").strip()
            at = text.find(said, cursor)
            if at >= 0:
                cursor = at + len(said)
            if message["role"] != "assistant" or not said:
                continue
            if at >= 0:
                spoken.append(Span(at, cursor, True))
            elif not add_generation_prompt:
                raise InputError(
                    "the chat template rewrites what the assistant says, so there is nothing to learn from",
                    hint="train with a template that keeps the assistant's text, or remove its reasoning part",
                )
        return [Piece(text, None, True, tuple(self._closed(spoken, text)))]


def plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with string content; InputError if its role or a part of its content is none a template can take."""
    role = message.get("role")
    if not isinstance(role, str) or not ROLE.match(role):
        raise InputError(f"a message has the role {role!r}", hint="use system, user or assistant")
    plain = {**message, "role": role, "content": plain_content(message.get("content"))}
    if message.get("tool_calls"):
        plain["tool_calls"] = plain_calls(message["tool_calls"])
    return plain


def _is_word(value: Any) -> bool:
    """Whether a value cannot hold a special token, so that a template may compare it."""
    return isinstance(value, str) and WORD.match(value) is not None


def plain_content(content: Any) -> str:
    """Text of a message's `content`: a string, or a list of `{"type": "text", "text": …}` parts; None is empty."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"a message's content is of type {type(content).__name__}", hint="give text or text parts")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InputError(f"a message has a content part of type {kind!r}", hint="only text parts are supported")
    return "".join(texts)


def _free_marks(used: str) -> Iterator[str]:
    taken = set(used)
    for code in PRIVATE:
        if chr(code) not in taken:
            yield chr(code)
    raise InputError("the conversation uses up every private-use character", hint="shorten it")


def _unmark(rendered: str, opening: Mapping[str, tuple[bool, str]], closing: set[str]) -> tuple[str, list[Span]] | None:
    """Text without marks, and the stretches that were marked; None if a mark was lost or they cross.

    `opening` tells of each opening mark whether the assistant speaks, and the white space the message begins with.
    """
    parts: list[str] = []
    spans: list[Span] = []
    size, cursor, begin, spoken = 0, 0, -1, False
    for match in _PRIVATE.finditer(rendered):
        if match.group() not in opening and match.group() not in closing:
            continue  # a message holds it
        parts.append(rendered[cursor : match.start()])
        size += match.start() - cursor
        cursor = match.end()
        if match.group() in opening:
            if begin >= 0:
                return None
            spoken, lead = opening[match.group()]
            begin = size - len(lead) if "".join(parts[-1:]).endswith(lead) else size
        else:
            if begin < 0:
                return None
            spans.append(Span(begin, size, spoken))
            begin = -1
    parts.append(rendered[cursor:])
    return None if begin >= 0 else ("".join(parts), spans)


def _between(foreign: list[tuple[int, int]], length: int) -> Iterator[tuple[int, int]]:
    cursor = 0
    for start, end in foreign:
        yield cursor, start
        cursor = end
    yield cursor, length


def _touched(span: tuple[int, int], others: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Those of `others`, which stand in order and apart, that share something with `span`."""
    for at in range(bisect_right(others, span[0], key=itemgetter(1)), len(others)):
        if others[at][0] >= span[1]:
            return
        yield others[at]


def _overlaps(span: tuple[int, int], others: Sequence[tuple[int, int]]) -> bool:
    return next(_touched(span, others), None) is not None


def _text_piece(text: str, start: int, end: int, spoken: list[tuple[int, int]]) -> Iterator[Piece]:
    if start < end:
        inside = tuple((max(a, start) - start, min(b, end) - start) for a, b in _touched((start, end), spoken))
        yield Piece(text[start:end], None, False, inside)


@lru_cache(maxsize=32)
def _reads_tools(source: str) -> bool:
    import jinja2.meta

    _compiled(source)  # refuses what is no template
    return "tools" in jinja2.meta.find_undeclared_variables(_environment().parse(source))


@lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    import jinja2

    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template is no valid Jinja: line {error.lineno}: {error.message}") from error


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """Transformers' conventions (`utils/chat_template_utils.py`)."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text in some templates; here it only lets its body through."""

        tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
