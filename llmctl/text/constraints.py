"""Answers of a given form: constraints from JSON Schema, a regular expression, a grammar or choices, by llguidance.

llguidance follows the answer's bytes with an Earley parser over lexer automata and says which tokens may come next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from llmctl.errors import UsageError
from llmctl.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

COMPILED = 64
"""Grammars that stay compiled for one model."""
SEARCHED = 64
"""Parts of a refused schema that are tried, to say where it is wrong."""
WHITE_SPACE = r"[ \n\r\t]{1,32}"
"""Between the parts of JSON. Bounded: a model may otherwise write blanks until it is cut off."""
_SUBSCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_SUBSCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SUBSCHEMA = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")


class GrammarConstraint:
    """Implements `llmctl.engine.Constraint` with a matcher of llguidance."""

    def __init__(self, matcher: llguidance.LLMatcher, usable: np.ndarray, eos_ids: frozenset[int]) -> None:
        self._matcher, self._usable, self._eos_ids = matcher, usable, eos_ids

    def mask(self) -> np.ndarray:
        """Which tokens may come next, `(V,)` bool; EOS ids are among them where the answer may end here."""
        if self._matcher.is_stopped() and not self._matcher.is_error():
            ends = np.zeros(len(self._usable), np.bool_)
            ends[list(self._eos_ids)] = True
            return ends
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        bits: np.ndarray = np.unpackbits(packed, count=len(self._usable), bitorder="little").view(np.bool_)
        bits &= self._usable
        return bits

    def accept(self, token: int) -> None:
        """The answer goes on with this token, which the mask allowed."""
        if self._matcher.is_stopped() and token in self._eos_ids:
            return
        if not self._matcher.consume_token(token):
            self._check()

    def copy(self) -> GrammarConstraint:
        """A second one in the same state."""
        return GrammarConstraint(self._matcher.deep_copy(), self._usable, self._eos_ids)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError(
                f"the answer can no longer be constrained: {_one_line(self._matcher.get_error())}",
                hint="use a simpler schema, regex or grammar",
            )


class Constraints:
    """Constraints for the answers of one model. Thread-safe; each grammar is compiled once.

    `vocab_size` is the model's, which may be larger than the tokenizer's: padding ids are never allowed, special tokens
    only as an end. Raises UsageError for a tokenizer that is not of bytes (WordPiece, Unigram), and for one without an
    EOS id.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Collection[int]) -> None:
        self.vocab_size, self.eos_ids = vocab_size, frozenset(id for id in eos_ids if id < vocab_size)
        if not self.eos_ids:
            raise UsageError(
                "the model has no EOS id, so an answer of a given form could not end",
                hint="set `eos_token_id` in its generation_config.json",
            )
        self.tokenizer = tokenizer
        self._matched = _open(tokenizer, vocab_size, sorted(self.eos_ids))
        usable = np.zeros(vocab_size, np.bool_)
        usable[: tokenizer.vocab_size] = True
        usable[[id for id in tokenizer.special_ids if id < vocab_size]] = False
        usable[list(self.eos_ids)] = True
        usable.flags.writeable = False
        self._usable = usable
        self._compiled: Callable[[str], GrammarConstraint] = lru_cache(COMPILED)(self._compile)

    def json_schema(self, schema: Mapping[str, Any] | bool, white_space: str = WHITE_SPACE) -> GrammarConstraint:
        """JSON that `schema` accepts (draft 2020-12 as far as llguidance knows it). UsageError names what it lacks.

        Between its parts may stand what `white_space` matches, or nothing.
        """
        if schema is True:
            schema = {}
        if not isinstance(schema, Mapping):
            raise UsageError(f"a JSON schema is an object, not {json.dumps(schema, default=str)}")
        if problem := _schema_problem(schema):
            path = _path_to(problem, schema, schema)
            raise UsageError(f"the JSON schema is refused at {path}: {problem}", hint="correct or leave out that part")
        return self._compiled(_json_grammar(schema, white_space)).copy()

    def json_object(self) -> GrammarConstraint:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> GrammarConstraint:
        """Text that the whole pattern matches. The syntax is Rust's: no look-around, no back-references.

        `\\d`, `\\w` and `\\s` are ASCII, so that JSON Schema's patterns and Python's with `re.ASCII` mean the same.
        """
        return self._built("regex", f"start: /{_library().regex_to_lark(pattern, use_ascii='dws')}/")

    def grammar(self, lark: str) -> GrammarConstraint:
        """Text of a context-free grammar in llguidance's dialect of Lark, from its rule `start`."""
        if not lark.strip():
            raise UsageError("the grammar is empty", hint="give at least a rule `start: …`")
        return self._built("grammar", _library().LLMatcher.grammar_from_lark(lark))

    def embedded(self, schema: Mapping[str, Any], white_space: str = WHITE_SPACE) -> str:
        """JSON that `schema` accepts, as a part of a rule of a `grammar`."""
        options = {"x-guidance": {"whitespace_pattern": white_space}}
        return f"%json {json.dumps({**options, **schema})}"

    def choices(self, texts: Sequence[str]) -> GrammarConstraint:
        """One of these texts."""
        if not texts or not all(texts):
            raise UsageError("the choices are empty", hint="give at least one text, each of at least one character")
        return self.regex("|".join(map(literal, texts)))

    def _built(self, kind: str, grammar: str) -> GrammarConstraint:
        failed, messages = _library().LLMatcher.validate_grammar_with_warnings(grammar)
        if failed:
            problem = _one_line(messages[0])
            if kind == "regex":  # its place is that in the grammar around it
                problem = re.sub(r"^line \d+, column \d+: ", "", problem)
            raise UsageError(f"the {kind} is refused: {problem}", hint="correct it")
        return self._compiled(grammar).copy()

    def _compile(self, grammar: str) -> GrammarConstraint:
        matcher = _library().LLMatcher(self._matched, grammar, log_level=0)
        if matcher.is_error():
            raise UsageError(f"the constraint is refused: {_one_line(matcher.get_error())}", hint="make it simpler")
        return GrammarConstraint(matcher, self._usable, self.eos_ids)


def literal(text: str) -> str:
    """A regular expression (Rust's) that matches exactly `text`."""
    return "".join(f"\\x{{{ord(char):x}}}" if char in "\n\r\t" else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return "\\" + char if char in r"\.+*?()|[]{}^$#&-~" else char


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UsageError(
            "answers of a given form need llguidance, which is not installed", hint='pip install "llmctl[serve]"'
        ) from error
    return llguidance


def _open(tokenizer: Tokenizer, vocab_size: int, eos_ids: list[int]) -> llguidance.LLTokenizer:
    source = (tokenizer.directory / "tokenizer.json").read_text(encoding="utf-8")
    try:
        opened: llguidance.LLTokenizer = _library().LLTokenizer(
            source, n_vocab=max(vocab_size, tokenizer.vocab_size), eos_token=eos_ids
        )
    except ValueError as error:
        raise UsageError(
            f"answers of a given form need a tokenizer of bytes, that of {tokenizer.directory} is none: "
            f"{_one_line(str(error))}",
            hint="use a model with a byte-level BPE, or one with byte fallback",
        ) from error
    return opened


def _json_grammar(schema: Any, white_space: str = WHITE_SPACE) -> str:
    grammar: str = _library().LLMatcher.grammar_from_json_schema(
        json.dumps(schema, sort_keys=False), overrides={"whitespace_pattern": white_space}
    )
    return grammar


def _schema_problem(schema: Any) -> str:
    """What is wrong with a schema, in one line; empty if nothing is."""
    try:
        failed, messages = _library().LLMatcher.validate_grammar_with_warnings(_json_grammar(schema))
    except ValueError as error:  # no JSON, or a value that JSON lacks
        return _one_line(str(error))
    return _one_line(messages[0]) if failed else ""


def _path_to(problem: str, schema: Any, root: Any) -> str:
    """A JSON pointer, with # before it, to the innermost part of `schema` that has the problem.

    At most `SEARCHED` parts are tried, as each is compiled with all shared definitions: of a large schema the pointer
    may name a part around the one that is meant.
    """
    path, going, tried = "#", True, 0
    while going:
        going = False
        for step, part in _parts(schema):
            if tried == SEARCHED:
                return path
            tried += 1
            shared = {key: root[key] for key in ("$defs", "definitions") if isinstance(root, dict) and key in root}
            whole = {**shared, **part} if isinstance(part, dict) and not step.startswith(("$defs", "def")) else part
            if _schema_problem(whole) == problem:
                path, schema, going = f"{path}/{step}", part, True
                break
    return path


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(schema, dict):
        return
    for key in _SUBSCHEMAS:
        if isinstance(schema.get(key), dict):
            yield from ((f"{key}/{name}", part) for name, part in schema[key].items())
    for key in _SUBSCHEMA_LISTS:
        if isinstance(schema.get(key), list):
            yield from ((f"{key}/{place}", part) for place, part in enumerate(schema[key]))
    yield from ((key, schema[key]) for key in _SUBSCHEMA if isinstance(schema.get(key), dict))


def _one_line(message: str) -> str:
    """llguidance's message without the drawing of the place: `2(4): …` becomes `line 2, column 4: …`."""
    lines = [line.strip() for line in message.strip().splitlines()]
    kept = [line for line in lines if line and not re.match(r"\^|\d+ \||\(\?|[─═]", line)]
    errors = [line.removeprefix("error: ") for line in kept if line.startswith("error: ")]
    text = ": ".join([kept[0].removesuffix(":"), *errors]) if kept else "unknown error"
    text = re.sub(r"^at (?=\d)", "", text)
    return re.sub(r"^(\d+)\((\d+)\)", r"line \1, column \2", text)
