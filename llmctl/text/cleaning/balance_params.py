"""What can be set about the steps that look at groups of documents: balance, select, augment, associations."""

from __future__ import annotations

import re
import string
from typing import Any, Literal

from pydantic import model_validator

from llmctl.spec.params import Field, Params

BY = (
    "what the groups are: `source` (the `name` of an entry of `sources`, else folder or file), `language`, `class` "
    "(meta.label), or the name of any other field of `meta`"
)
Method = Literal["noise", "paraphrase", "synthetic", "back-translation"]
GUARD = ("fields", "ngram", "min_words")
"""Parameters of `augment` that are those of `decontaminate` where they are not set."""
Noise = Literal["swap", "keyboard", "ocr", "delete", "dropout"]


class BalanceParams(Params):
    """Give groups of documents the shares that are wanted, by repeating documents and leaving some out."""

    name: Literal["balance"] = Field(description="the step")
    by: str = Field("source", min_length=1, description=BY)
    unit: Literal["bytes", "documents"] = Field("bytes", description="what the shares are of")
    weights: dict[str, float] = Field(
        {}, description="share of each group, in any unit; a group with 0 goes. Empty: natural sizes to `alpha`"
    )
    others: float | None = Field(
        None, ge=0, description="weight of each group that `weights` does not name; null: such a group is an error"
    )
    alpha: float = Field(
        1.0, ge=0, le=1, description="without weights: natural shares to this power, 1 natural, 0 all alike"
    )
    size: Literal["same", "down", "up"] = Field(
        "same",
        description="how large the result is: `same` as before, `down` no document is repeated, `up` none is left out "
        "(an error if max_epochs is too few)",
    )
    max_epochs: float = Field(
        4.0, gt=0, description="most passes over a group; the whole becomes smaller rather than the mix another"
    )

    @model_validator(mode="after")
    def _sensible(self) -> BalanceParams:
        if any(not 0 <= weight < float("inf") for weight in self.weights.values()):
            raise ValueError("weights must be numbers of at least 0")
        if self.weights and not any(self.weights.values()) and not self.others:
            raise ValueError("one of the weights must be above 0")
        if self.weights and self.alpha != 1:
            raise ValueError("alpha belongs to natural sizes: drop alpha or weights")
        if not self.weights and self.others is not None:
            raise ValueError("others belongs to weights")
        if self.size == "up" and self.max_epochs < 1:
            raise ValueError("size: up keeps every document, max_epochs below 1 does not: drop one of them")
        return self


class SelectParams(Params):
    """Keep documents of some groups only: one dataset for each group, to be weighted in training."""

    name: Literal["select"] = Field(description="the step")
    by: str = Field("source", min_length=1, description=BY)
    keep: list[str] = Field([], description="groups that stay; empty for all that `drop` does not name")
    drop: list[str] = Field([], description="groups that go")

    @model_validator(mode="after")
    def _says_something(self) -> SelectParams:
        if not self.keep and not self.drop:
            raise ValueError("name groups in keep or drop")
        if both := set(self.keep) & set(self.drop):
            raise ValueError(f"`{min(both)}` is in keep and in drop")
        return self


class RuleParams(Params):
    """What may stand for what a pattern finds."""

    pattern: str = Field(min_length=1, description="regular expression")
    replace: list[str] = Field(min_length=1, description="alternatives, with \\1 for groups; one is drawn each time")

    @model_validator(mode="after")
    def _compiles(self) -> RuleParams:
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"`{self.pattern}` is no regular expression: {error}") from error
        for text in self.replace:
            try:
                re.compile("".join("()" for _ in range(groups)) + "x").sub(text, "x")
            except (re.error, IndexError) as error:
                raise ValueError(f"`{text}` does not fit `{self.pattern}`: {error}") from error
        return self


def slots_of(template: str) -> set[str]:
    """The names of a template's `{slot}`s. ValueError for braces that hold anything but a name."""
    try:
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise ValueError(f"templates: `{template}`: {error}; a brace of the text is doubled") from error
    for _, name, form, conversion in fields:
        if form or conversion or not str(name).isidentifier():
            raise ValueError(
                f"templates: `{template}` has braces that name no slot; write {{name}}, and double those of the text"
            )
    return {str(name) for _, name, _, _ in fields}


class AugmentParams(Params):
    """Derive further documents from those of a small group until it has its share. Only what is trained on is used."""

    name: Literal["augment"] = Field(description="the step")
    by: str = Field("class", min_length=1, description=BY)
    group: str = Field(min_length=1, description="the group that is too small")
    share: float = Field(gt=0, lt=1, description="share of the documents that it is to have")
    method: Method = Field(
        description="`noise` (typing and scanning errors), `paraphrase` (`rules`), `synthetic` (`templates`), or "
        "`back-translation` (the inputs `there` and `back`)"
    )
    most: int = Field(20, ge=1, description="most texts derived from one document; with fewer documents it is an error")
    noise: list[Noise] = Field(
        ["swap", "keyboard", "ocr", "delete", "dropout"],
        min_length=1,
        description="kinds of noise: neighbours swapped, a neighbouring key, a look-alike, a letter or a word left out",
    )
    rate: float = Field(0.1, gt=0, le=1, description="noise: share of the words that are touched")
    rules: list[RuleParams] = Field([], description="paraphrase: what may stand for what")
    templates: list[str] = Field([], description="synthetic: texts with {slot}s")
    slots: dict[str, list[str]] = Field({}, description="synthetic: what may stand in each slot")
    fields: list[str] | None = Field(
        None,
        min_length=1,
        description="columns of the input `evaluation` whose texts have no twins; null: as the step decontaminate says",
    )
    ngram: int | None = Field(
        None, ge=2, le=64, description="words that a twin shares with such a text at least; null: as decontaminate says"
    )
    min_words: int | None = Field(
        None, ge=2, description="shorter texts are not looked for, and are counted; null: as decontaminate says"
    )

    def guard(self) -> dict[str, Any]:
        """What is set of how evaluation items are found."""
        named = {name: getattr(self, name) for name in GUARD}
        return {name: value for name, value in named.items() if value is not None}

    @model_validator(mode="after")
    def _complete(self) -> AugmentParams:
        if (self.method == "paraphrase") != bool(self.rules):
            raise ValueError("rules belongs to method: paraphrase, which needs it")
        if (self.method == "synthetic") != bool(self.templates):
            raise ValueError("templates belongs to method: synthetic, which needs it")
        fields = type(self).model_fields
        if self.method != "noise" and any(getattr(self, name) != fields[name].default for name in ("noise", "rate")):
            raise ValueError("noise and rate belong to method: noise")
        if set().union(*map(slots_of, self.templates)) != set(self.slots) or not all(self.slots.values()):
            raise ValueError("slots must name values for just the slots of templates")
        return self


class AssociationsParams(Params):
    """Report which group words go with which attribute words. No document changes."""

    name: Literal["associations"] = Field(description="the step")
    groups: dict[str, list[str]] = Field(
        {
            "female": ["she", "her", "hers", "herself", "woman", "women", "girl", "girls", "mother", "daughter"],
            "male": ["he", "him", "his", "himself", "man", "men", "boy", "boys", "father", "son"],
        },
        min_length=2,
        description="words of each group; they are compared with each other",
    )
    attributes: dict[str, list[str]] = Field(
        {
            name: [name, name + "s"]
            for name in (
                "accountant",
                "artist",
                "carpenter",
                "chef",
                "cleaner",
                "doctor",
                "driver",
                "engineer",
                "farmer",
                "lawyer",
                "librarian",
                "manager",
                "mechanic",
                "nurse",
                "pilot",
                "programmer",
                "scientist",
                "secretary",
                "soldier",
                "teacher",
            )
        },  # fmt: skip
        min_length=1,
        description="words of each attribute; by default occupations",
    )
    within: Literal["sentence", "document"] = Field("sentence", description="where both must stand")
    confidence: float = Field(0.95, gt=0, lt=1, description="of all intervals together (Bonferroni)")
    min_log_odds: float = Field(
        0.5, ge=0, description="a smaller log-odds ratio, in nats, is not flagged however sure it is"
    )
    min_count: int = Field(5, ge=1, description="attributes that stand with the groups less often are not judged")

    @model_validator(mode="after")
    def _apart(self) -> AssociationsParams:
        for what, named in (("groups", self.groups), ("attributes", self.attributes)):
            if empty := [name for name, words in named.items() if not words or not all(w.strip() for w in words)]:
                raise ValueError(f"{what}: `{empty[0]}` has no words")
        owner: dict[str, str] = {}
        for name, words in self.groups.items():
            for word in words:
                if owner.setdefault(word.casefold(), name) != name:
                    raise ValueError(f"`{word}` is a word of {owner[word.casefold()]} and of {name}")
        return self
