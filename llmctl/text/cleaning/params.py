"""What can be set about each cleaning step. `AnyStep` is one entry of the list `steps` of the stage `data`."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Literal, get_args

import pydantic
from pydantic import model_validator

from llmctl.spec.params import Field, Params
from llmctl.text.cleaning.balance_params import AssociationsParams, AugmentParams, BalanceParams, SelectParams
from llmctl.text.cleaning.kind_params import KINDS, Kind, StepParams
from llmctl.text.cleaning.quality_params import QualityParams

Form = Literal["NFC", "NFKC", "none"]
PiiKind = Literal["email", "phone", "credit_card", "iban", "ip_address", "ssn", "key", "url_credentials"]
PiiAction = Literal["redact", "drop", "tag", "keep"]
LANGUAGES = frozenset((
    "ace", "af", "am", "an", "ar", "ary", "arz", "as", "az", "ba", "bcl", "be", "bg", "bn", "br", "bs", "ca", "crh",
    "cs", "cy", "da", "de", "dz", "el", "en", "eo", "es", "et", "eu", "ext", "fa", "fi", "fo", "fr", "fuv", "fy",
    "ga", "gcf", "gcr", "gd", "gl", "gom", "grc", "gu", "gug", "guw", "ha", "hbo", "he", "hi", "hr", "ht", "hu",
    "hy", "id", "ig", "is", "it", "ja", "jv", "ka", "kab", "kik", "kk", "km", "kn", "ko", "ku", "ky", "la", "lb",
    "lg", "lij", "ln", "lo", "lt", "ltg", "lv", "mg", "mk", "ml", "mn", "mr", "ms", "mt", "my", "ne", "nl", "nn",
    "no", "nso", "oc", "om", "or", "pa", "pcm", "pl", "ps", "pt", "qu", "ro", "ru", "rw", "sa", "sdh", "se", "si",
    "sk", "sl", "sn", "so", "sq", "sr", "st", "sv", "sw", "ta", "te", "tg", "th", "tk", "tl", "tr", "tt", "ug",
    "uk", "ur", "uz", "uzs", "vec", "vi", "vo", "wa", "wuu", "xh", "yo", "yue", "zh", "zu", "none",
))  # fmt: skip
"""What the classifier tells apart, and `none`."""


class LengthParams(Params):
    """Drop documents that are too short or too long."""

    name: Literal["length"] = Field(description="the step")
    min_chars: int = Field(1, ge=0, description="shortest text that stays, in characters without surrounding space")
    max_chars: int | None = Field(None, ge=1, description="longest text that stays, in characters; null for any")

    @model_validator(mode="after")
    def _ordered(self) -> LengthParams:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError("max_chars is below min_chars")
        return self


class ExactDuplicatesParams(Params):
    """Keep the first of every set of documents with equal text."""

    name: Literal["exact-duplicates"] = Field(description="the step")
    normalise: bool = Field(
        False, description="texts that differ in case, space and Unicode form (NFKC) only are equal, too"
    )


class UnicodeParams(StepParams):
    """Repair what wrong decoding and copying broke: encodings, control characters, Unicode forms, white space."""

    name: Literal["unicode"] = Field(description="the step")
    repair: bool = Field(True, description="undo wrong decodings (`schÃ¶n` becomes `schön`), with ftfy")
    form: Form = Field("NFC", description="Unicode normal form; NFKC also unifies ligatures, widths and superscripts")
    controls: bool = Field(True, description="remove control characters other than tab and newline")
    zero_width: bool = Field(
        True, description="remove invisible characters where their script has no use for them (joiners in Latin words)"
    )
    line_ends: bool = Field(True, description="every line end becomes one newline")
    white_space: Literal["keep", "trim", "collapse"] = Field(
        "trim",
        description="`trim`: no blanks at line ends, at most two empty lines; `collapse`: runs of blanks within a line "
        "become one as well",
    )


class LanguageParams(StepParams):
    """Tell languages and keep or drop some; source code, random letters and numbers have none."""

    name: Literal["language"] = Field(description="the step")
    kinds: list[Kind] = Field(["prose", "conversation"], min_length=1, description=KINDS)
    keep: list[str] = Field(
        [], description="codes to keep (ISO 639-1: en, de, …); empty for all. `none` stands for no language"
    )
    drop: list[str] = Field([], description="codes to drop, `none` for no language")
    min_confidence: float = Field(
        0.15, ge=0, le=1, description="documents whose language is less certain count as no language"
    )
    sample_chars: int = Field(2000, ge=100, description="characters from the middle of a long text that are looked at")

    @model_validator(mode="after")
    def _known(self) -> LanguageParams:
        for code in (*self.keep, *self.drop):
            if code not in LANGUAGES:
                near = difflib.get_close_matches(code, LANGUAGES, 1)
                raise ValueError(f"`{code}` is no known language" + (f"; did you mean `{near[0]}`?" if near else ""))
        if both := set(self.keep) & set(self.drop):
            raise ValueError(f"`{min(both)}` is in keep and in drop")
        return self


class BoilerplateParams(StepParams):
    """Remove lines that belong to the page, not to its text: navigation, cookie bars, copyright lines, buttons."""

    name: Literal["boilerplate"] = Field(description="the step")
    kinds: list[Kind] = Field(["prose"], min_length=1, description=KINDS)
    patterns: list[str] = Field([], description="further regular expressions; a line one of them matches goes")
    menus: int = Field(4, ge=2, description="runs of at least so many short lines without an end mark are menus")

    @model_validator(mode="after")
    def _compile(self) -> BoilerplateParams:
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"`{pattern}` is no regular expression: {error}") from error
        return self


class RepeatedLinesParams(StepParams):
    """Remove lines (or paragraphs) that many documents of a source share: headers, footers, licences, menus."""

    name: Literal["repeated-lines"] = Field(description="the step")
    kinds: list[Kind] = Field(["prose"], min_length=1, description=KINDS)
    unit: Literal["line", "paragraph"] = Field("line", description="what is compared")
    within: Literal["source", "corpus"] = Field(
        "source", description="compared among the documents of one source (its folder or site), or among all"
    )
    min_documents: int = Field(3, ge=2, description="a line in at least so many documents may go …")
    min_share: float = Field(0.3, ge=0, le=1, description="… if they are at least this share of those compared")
    min_chars: int = Field(8, ge=1, description="shorter lines stay")
    keep_first: bool = Field(False, description="the first document that has the line keeps it")


class ToxicityParams(StepParams):
    """Find offensive text by a linear classifier (alt-profanity-check), sentence by sentence."""

    name: Literal["toxicity"] = Field(description="the step")
    action: Literal["drop", "cut", "tag"] = Field(
        "drop", description="drop the document, cut the offensive sentences, or tag it (meta.toxicity)"
    )
    threshold: float = Field(0.8, gt=0, le=1, description="probability from which a sentence is offensive")
    share: float = Field(
        0.0, ge=0, le=1, description="drop: at least this share of the sentences must be offensive; 0: one of them"
    )
    quotations: bool = Field(False, description="judge what stands in quotation marks, too")
    innocent: list[str] = Field(
        [], description="further words that are judged as harmless (names, terms of a field), in lower case"
    )


class PiiParams(StepParams):
    """Find personal data and secrets. Names of persons are not found."""

    name: Literal["pii"] = Field(description="the step")
    kinds: list[Kind] = Field(["prose", "code", "table", "conversation"], min_length=1, description=KINDS)
    action: PiiAction = Field("redact", description="what is done with kinds that are not named below")
    email: PiiAction | None = Field(None, description="e-mail addresses; null: as `action` says")
    phone: PiiAction | None = Field(None, description="telephone numbers that are valid in their country")
    credit_card: PiiAction | None = Field(None, description="card numbers with an issuer and Luhn's check digit")
    iban: PiiAction | None = Field(None, description="bank accounts with a valid check (ISO 13616)")
    ip_address: PiiAction | None = Field(None, description="IPv4 and IPv6 addresses of hosts")
    ssn: PiiAction | None = Field(None, description="US social security numbers that can have been issued")
    key: PiiAction | None = Field(None, description="keys, tokens and passwords: AWS, GitHub, JWT, private keys, …")
    url_credentials: PiiAction | None = Field(None, description="user:password in URLs")
    region: str = Field(
        "US", pattern="^([A-Z]{2})?$", description="country of telephone numbers without +country; empty for none"
    )
    replacement: str = Field("<{kind}>", description="what stands for a redacted value; {kind} is its kind")
    hashes: bool = Field(True, description="tell kinds, places and hashes of the values in meta.pii; never the values")

    def actions(self) -> dict[PiiKind, PiiAction]:
        """The action of every kind that is looked for."""
        named: dict[PiiKind, PiiAction] = {kind: getattr(self, kind) or self.action for kind in get_args(PiiKind)}
        return {kind: action for kind, action in named.items() if action != "keep"}


class NearDuplicatesParams(StepParams):
    """Keep the first of every cluster of documents that share most of their word n-grams (MinHash)."""

    name: Literal["near-duplicates"] = Field(description="the step")
    kinds: list[Kind] = Field(["prose", "code", "conversation"], min_length=1, description=KINDS)
    ngram: int = Field(5, ge=1, le=32, description="words per shingle")
    num_perm: int = Field(128, ge=16, le=1024, description="hash functions of a signature")
    bands: int = Field(
        16, ge=1, description="bands of the signature; documents equal in one are compared. Divides num_perm"
    )
    threshold: float = Field(0.8, gt=0, le=1, description="estimated Jaccard similarity from which two are duplicates")
    action: Literal["drop", "tag"] = Field(
        "drop",
        description="drop all but the first of a cluster, or tag all of it: meta.duplicate_of is the id of the first",
    )

    @model_validator(mode="after")
    def _divides(self) -> NearDuplicatesParams:
        if self.num_perm % self.bands:
            raise ValueError(f"bands must divide num_perm; {self.num_perm} / {self.bands} leaves a rest")
        return self


class DecontaminateParams(StepParams):
    """Find documents that hold items of the input `evaluation` by word n-grams; case and signs make no difference."""

    name: Literal["decontaminate"] = Field(description="the step")
    kinds: list[Kind] = Field(["prose", "code", "table", "conversation"], min_length=1, description=KINDS)
    fields: list[str] = Field(
        ["question", "answer", "context", "prompt", "text", "messages", "source", "target"],
        min_length=1,
        description="columns of their rows that hold text",
    )
    ngram: int = Field(13, ge=2, le=64, description="words per n-gram (GPT-3 13, PaLM 8)")
    min_words: int = Field(8, ge=2, description="items with fewer words than `ngram` count whole, from this many on")
    share: float = Field(
        0.0, ge=0, le=1, description="an item is found when at least this share of its n-grams is; 0: one of them"
    )
    action: Literal["drop", "tag"] = Field("drop", description="drop the document or tag it (meta.contaminated)")


class CodeParams(StepParams):
    """Source code on its own path: tells it from prose, keeps its bytes, drops what is generated or minified."""

    name: Literal["code"] = Field(description="the step")
    kinds: list[Kind] = Field(["prose", "code"], min_length=1, description=KINDS)
    detect: bool = Field(True, description="tell source code by its path, shebang or content and set meta.code")
    generated: bool = Field(True, description="drop files that say that they were generated; they are counted anyhow")
    vendored: bool = Field(True, description="drop files in folders of other people's code (node_modules, vendor, …)")
    max_line: int = Field(1000, ge=1, description="drop files with a longer line")
    max_mean_line: int = Field(100, ge=1, description="drop files whose lines are longer on average")
    min_alphanumeric: float = Field(0.25, ge=0, le=1, description="smallest share of letters and digits")
    max_encoded: float = Field(0.5, ge=0, le=1, description="largest share of characters in hex or base64 data")
    parses: bool = Field(False, description="drop Python and JSON that does not parse")
    count_parsed: bool = Field(False, description="count in the audit how many files of Python and JSON parse")
    licenses: list[str] = Field(
        [],
        description="SPDX ids to keep; empty for all. `none` stands for files that name no licence; of `A OR B` one is "
        "enough, `A AND B` needs both",
    )
    unlicensed: bool = Field(False, description="drop files that name no licence, whatever `licenses` says of others")

    @pydantic.model_validator(mode="after")
    def _agree(self) -> CodeParams:
        if self.unlicensed and "none" in self.licenses:
            raise ValueError("unlicensed drops the files that `none` in licenses keeps; drop one of them")
        return self


AnyStep = Annotated[
    LengthParams
    | UnicodeParams
    | LanguageParams
    | QualityParams
    | BoilerplateParams
    | RepeatedLinesParams
    | ToxicityParams
    | PiiParams
    | ExactDuplicatesParams
    | NearDuplicatesParams
    | DecontaminateParams
    | CodeParams
    | SelectParams
    | BalanceParams
    | AugmentParams
    | AssociationsParams,
    pydantic.Field(discriminator="name"),
]
