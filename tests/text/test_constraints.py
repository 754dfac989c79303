"""Constrained answers of a model that says anything: all of them valid, by judges that are not ours."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, trainers

from llmctl.errors import UsageError
from llmctl.generator import Sampling
from llmctl.ort import sampling
from llmctl.text.constraints import Constraints, GrammarConstraint, literal
from llmctl.text.tokenizer import Tokenizer

from .conftest import TEXT, byte_level, sentencepiece, write

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
EOS = [0, 2]
PADDING = 13


@pytest.fixture(scope="module", params=["byte", "sentencepiece"])
def constraints(request, tmp_path_factory) -> Constraints:
    tokenizer = byte_level(SPECIAL) if request.param == "byte" else sentencepiece(["<unk>", "<s>", "</s>"])
    opened = Tokenizer.load(write(tmp_path_factory.mktemp("constraints"), tokenizer, None, None, None))
    return Constraints(opened, opened.vocab_size + PADDING, EOS)


def answers(
    constraints: Constraints, constraint: GrammarConstraint | None, count: int, limit: int = 400
) -> list[str | None]:
    """What a model of random logits answers at temperature 1.5; None where the limit cuts it off."""
    random = np.random.default_rng(0)
    found: list[str | None] = []
    vocab, tokenizer = constraints.vocab_size, constraints.tokenizer
    before = tokenizer.encode("x")
    assert tokenizer.decode(before) == "x"
    for seed in range(count):
        state = sampling.state(Sampling(temperature=1.5, seed=seed), [5], vocab, constraint)
        ids: list[int] = []
        while len(ids) < limit:
            token = int(sampling.choose(random.normal(0, 2, (1, vocab)).astype(np.float32), [state])[0])
            if token in constraints.eos_ids:
                break
            assert constraint is None or token < tokenizer.vocab_size
            assert constraint is None or token not in tokenizer.special_ids
            ids.append(token)
        # Behind another word: `decode` takes the first space of a text away.
        text = tokenizer.decode([*before, *ids]).removeprefix("x")
        found.append(text if len(ids) < limit else None)
    assert any(text is not None for text in found)
    return found


TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"type": "boolean"}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
            "required": ["v", "next"],
            "additionalProperties": False,
        }
    },
}
SCHEMAS = {
    "enum": {"enum": ["red", 3, None, {"a": [1]}]},
    "const": {"const": 'exactly "this"\n'},
    "nested": {
        "type": "object",
        "properties": {
            "a": {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]},
            "c": {"type": "string", "maxLength": 4},
        },
        "required": ["a", "c"],
        "additionalProperties": False,
    },
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"type": "null"}, {"type": "integer"}], "items": False, "minItems": 2},
    "integer": {"type": "integer", "minimum": -7, "exclusiveMaximum": 120},
    "number": {"type": "number", "minimum": 0.5, "maximum": 3},
    "pattern": {"type": "string", "pattern": r"^[A-Z]{2}-\d{3}$"},
    "lengths": {"type": "string", "minLength": 3, "maxLength": 5},
    "date": {"type": "string", "format": "date"},
    "any of": {"anyOf": [{"type": "integer", "maximum": 9, "minimum": 0}, {"type": "array", "maxItems": 1}]},
    "tree": TREE,
    "object": {"type": "object"},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_fits_its_schema(constraints: Constraints, name: str) -> None:
    judge = jsonschema.Draft202012Validator(SCHEMAS[name], format_checker=jsonschema.FormatChecker())
    for text in filter(None, answers(constraints, constraints.json_schema(SCHEMAS[name]), 12)):
        judge.validate(json.loads(text))


@pytest.mark.parametrize("name", SCHEMAS)
def test_something_may_always_come_next(constraints: Constraints, name: str) -> None:
    """No mask on the way of a random answer is empty, the one after its end included."""
    random = np.random.default_rng(1)
    for _ in range(4):
        constraint = constraints.json_schema(SCHEMAS[name])
        for _ in range(200):
            allowed = np.flatnonzero(constraint.mask())
            assert len(allowed)
            token = int(random.choice(allowed))
            constraint.accept(token)
            if token in EOS:
                break


def test_a_looser_schema_is_noticed(constraints: Constraints) -> None:
    """The control: what another schema forces does not fit this one."""
    judge = jsonschema.Draft202012Validator(SCHEMAS["integer"])
    made = answers(constraints, constraints.json_schema({"type": "integer"}), 20)
    assert not all(judge.is_valid(json.loads(text)) for text in made if text)


def test_without_a_constraint_hardly_any_answer_is_json(constraints: Constraints) -> None:
    """The control: the same model says nothing that fits by itself."""
    judge = jsonschema.Draft202012Validator(SCHEMAS["object"])
    valid = 0
    for text in filter(None, answers(constraints, None, 20, 2000)):
        try:
            valid += judge.is_valid(json.loads(text))
        except ValueError:
            continue
    assert valid == 0


def test_json_object_is_any_object(constraints: Constraints) -> None:
    made = [json.loads(text) for text in answers(constraints, constraints.json_object(), 20) if text]
    assert all(isinstance(value, dict) for value in made)
    assert any(made)


@pytest.mark.parametrize(
    "pattern", [r"[a-c]{2,5}\d+(x|yy)?", r"\w+@\w+\.(de|com)", r"a/b|a/bc", r"(?i:yes|no)", r"é[^\n]{1,3}ß", r"\s?\S"]
)
def test_every_answer_matches_its_regex(constraints: Constraints, pattern: str) -> None:
    for text in filter(None, answers(constraints, constraints.regex(pattern), 20)):
        # Classes are ASCII, but letters that differ only in case are Unicode's: s and ſ.
        assert re.fullmatch(pattern, text, re.ASCII if "(?i" not in pattern else 0), text


def test_every_answer_is_of_its_grammar(constraints: Constraints) -> None:
    lark = 'start: sum\nsum: term ("+" term)*\nterm: /[1-9][0-9]{0,2}/ | "(" sum ")"'
    made = {text for text in answers(constraints, constraints.grammar(lark), 20) if text}
    assert len(made) > 5
    for text in made:
        nodes = {type(node) for node in ast.walk(ast.parse(text, mode="eval"))}
        assert nodes <= {ast.Expression, ast.BinOp, ast.Add, ast.Constant}


def test_choices_are_taken_letter_by_letter(constraints: Constraints) -> None:
    texts = ["a/b", "a/bc", "ä\n$x", "no-way~#& {1}", "\\d+", "[a]|(b)"]
    made = set(answers(constraints, constraints.choices(texts), 60))
    assert made <= set(texts)
    assert len(made) >= 5


@settings(max_examples=40)
@given(text=st.text(min_size=1, max_size=8).filter(lambda text: not re.search(r"[\ud800-\udfff\x00]", text)))
def test_a_literal_matches_itself_alone(plain_bytes: Path, text: str) -> None:
    tokenizer = Tokenizer.load(plain_bytes)
    constraint = Constraints(tokenizer, tokenizer.vocab_size, [256]).regex(literal(text))
    for token in tokenizer.encode(text):
        assert np.flatnonzero(constraint.mask()).tolist() == [token]
        constraint.accept(token)
    assert np.flatnonzero(constraint.mask()).tolist() == [256]


def test_ends_are_all_eos_ids_and_only_where_the_answer_may_end(constraints: Constraints) -> None:
    constraint = constraints.regex("a{1,2}")
    assert not constraint.mask()[EOS].any()
    letter = constraints.tokenizer.encode("xa")[-1]
    constraint.accept(letter)
    assert constraint.mask()[EOS].all()
    assert constraint.mask()[letter]
    other = constraint.copy()
    constraint.accept(letter)
    assert np.flatnonzero(constraint.mask()).tolist() == EOS
    constraint.accept(EOS[1])
    assert other.mask()[letter], "a copy has a state of its own"
    with pytest.raises(UsageError, match="can no longer be constrained: .*doesn't satisfy the grammar"):
        other.accept(constraints.tokenizer.encode("xb")[-1])


def test_special_tokens_and_padding_are_never_allowed(constraints: Constraints) -> None:
    for constraint in (constraints.regex(r"(?s:.*)"), constraints.json_object()):
        mask = constraint.mask()
        assert mask.shape == (constraints.vocab_size,)
        assert not mask[-PADDING:].any()
        assert not mask[[id for id in constraints.tokenizer.special_ids if id not in EOS]].any()


def test_a_grammar_is_compiled_once(constraints: Constraints, monkeypatch) -> None:
    compiled = []
    compile_ = Constraints._compile
    monkeypatch.setattr(Constraints, "_compile", lambda self, text: (compiled.append(text), compile_(self, text))[1])
    fresh = Constraints(constraints.tokenizer, constraints.vocab_size, EOS)
    first, second = fresh.json_schema(SCHEMAS["array"]), fresh.json_schema(SCHEMAS["array"])
    assert len(compiled) == 1
    first.accept(fresh.tokenizer.encode("x[")[-1])
    assert (first.mask() != second.mask()).any()


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "objct"}, "refused at #: Invalid type: objct"),
        (
            {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "string", "pattern": "(?=a)"}}}},
            "refused at #/properties/a/items: .*look-around",
        ),
        ({"anyOf": [{"type": "null"}, {"type": "array", "uniqueItems": True}]}, r"at #/anyOf/1: .*\"uniqueItems\""),
        ({"$ref": "#/x"}, "Pointer '/x' does not exist"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, r"minimum \(3\) is greater than maximum \(1\)"),
        ([1], "a JSON schema is an object, not"),
    ],
)
def test_bad_schemas_say_what_is_wrong_and_where(constraints: Constraints, schema, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        constraints.json_schema(schema)
    assert "\n" not in str(caught.value)


def test_bad_regexes_grammars_and_choices_are_refused(constraints: Constraints) -> None:
    for make, given_, message in (
        (constraints.regex, "a(b", "the regex is refused: .*unclosed group"),
        (constraints.regex, r"(a)\1", "backreferences are not supported"),
        (constraints.grammar, 'start: "a" b\nc: "x"', 'line 1, column 8: unknown name: "b"'),
        (constraints.grammar, 'x: "a"', "no start rule found"),
        (constraints.grammar, " ", "the grammar is empty"),
        (constraints.choices, [], "the choices are empty"),
        (constraints.choices, [""], "the choices are empty"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            make(given_)
        assert "\n" not in str(caught.value)


def test_tokenizers_that_are_not_of_bytes_are_refused(tmp_path: Path) -> None:
    wordpiece = Fast(models.WordPiece(unk_token="[UNK]"))
    wordpiece.pre_tokenizer, wordpiece.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    wordpiece.train_from_iterator(TEXT, trainers.WordPieceTrainer(special_tokens=["[UNK]"], show_progress=False))
    unigram = Fast(models.Unigram())
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    unigram.train_from_iterator(TEXT, trainer)
    for name, tokenizer in (("wordpiece", wordpiece), ("unigram", unigram)):
        opened = Tokenizer.load(write(tmp_path / name, tokenizer, None, None, None))
        with pytest.raises(UsageError, match="need a tokenizer of bytes"):
            Constraints(opened, opened.vocab_size, [1])


def test_a_model_without_an_end_is_refused(constraints: Constraints) -> None:
    with pytest.raises(UsageError, match="no EOS id"):
        Constraints(constraints.tokenizer, constraints.vocab_size, [])


def test_the_place_of_a_mistake_in_a_large_schema_is_not_searched_for_ever(constraints, monkeypatch) -> None:
    from llmctl.text import constraints as module

    asked, problem_of = [], module._schema_problem
    monkeypatch.setattr(module, "_schema_problem", lambda schema: asked.append(1) or problem_of(schema))
    good = {f"p{number}": {"type": "string"} for number in range(1000)}
    bad = {"type": "object", "properties": {**good, "z": {"type": "string", "pattern": "(?=a)"}}}
    with pytest.raises(UsageError, match="refused at #: "):
        constraints.json_schema(bad)
    assert len(asked) <= module.SEARCHED + 1
    asked.clear()
    with pytest.raises(UsageError, match="refused at #/properties/a: "):  # found before the end of the search
        constraints.json_schema({"type": "object", "properties": {"a": bad["properties"]["z"], **good}})
    assert len(asked) <= module.SEARCHED + 1
