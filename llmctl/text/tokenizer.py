"""Text to token ids and back: a Hugging Face tokenizer directory, its chat template and its assistant-only loss mask.

What a user types never becomes a special token: plain text is encoded with special tokens switched off, and in a chat
only the template's own text may produce them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.errors import InputError

if TYPE_CHECKING:
    from llmctl.text.template import ChatTemplate

Message = Mapping[str, Any]
"""{"role": …, "content": str or [{"type": "text", "text": …}, …], …}"""

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.json",
)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ChatIds:
    """An encoded conversation: `ids`, and a `mask` of equal length that is 1 on what the assistant says."""

    ids: list[int]
    mask: list[int]


@dataclass(frozen=True)
class Framed:
    """One or two texts as a model reads them, special tokens included; all lists have one entry per token."""

    ids: list[int]
    segments: list[int]
    """BERT's token types: 1 for the second text and its closing token."""
    parts: list[int | None]
    """0 for a token of the first text, 1 for one of the second, None for a special one."""
    spans: list[tuple[int, int]]
    """The characters of its text that a token stands for, white space at both ends left out."""

    def within(self, most: int) -> Framed:
        """The same with at most so many tokens: what is too much is taken off before the closing special tokens."""
        if len(self.ids) <= most:
            return self
        closing = 0
        while closing < most and self.parts[-1 - closing] is None:
            closing += 1
        kept = [*range(most - closing), *range(len(self.ids) - closing, len(self.ids))]
        return Framed(*([row[at] for at in kept] for row in (self.ids, self.segments, self.parts, self.spans)))


class Tokenizer:
    """A tokenizer directory as transformers writes it (`tokenizer.json` is required). Thread-safe, free of torch."""

    def __init__(self, directory: Path) -> None:
        import tokenizers

        path = directory / "tokenizer.json"
        if not path.is_file():
            raise InputError(
                f"no tokenizer.json in {directory}", hint="give a directory that holds a Hugging Face fast tokenizer"
            )
        raw = path.read_bytes()
        try:
            # Two copies, because whether special tokens are recognised is a switch of the whole object.
            self._special = tokenizers.Tokenizer.from_buffer(raw)
            self._plain = tokenizers.Tokenizer.from_buffer(raw)
        except Exception as error:  # the Rust side raises bare Exception
            raise InputError(f"{path} is damaged: {error}", hint="make the tokenizer again") from error
        for tokenizer in (self._special, self._plain):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self._plain.encode_special_tokens = True
        self.directory = directory
        self.digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        added = self._special.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size: int = 1 + max(self._special.get_vocab(with_added_tokens=True).values())
        self._config = _read_config(directory)
        self._names = _token_names(self._config)
        self.bos_id = self._named("bos_token")
        self.eos_id = self._named("eos_token")
        self.pad_id = self._named("pad_token")
        self.mask_id = self._named("mask_token")
        self.cls_id = self._named("cls_token")
        self.sep_id = self._named("sep_token")
        self.unk_id = self._named("unk_token")
        self._chat: ChatTemplate | None = None

    @classmethod
    def load(cls, directory: Path | str) -> Tokenizer:
        """Open the tokenizer in `directory`; InputError if there is none or it is damaged."""
        return cls(Path(directory))

    def _named(self, name: str) -> int | None:
        text = self._names.get(name)
        if text is None:
            return None
        found: int | None = self._special.token_to_id(text)
        return found

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, without BOS. With `special=True` the text of a special token becomes that token."""
        tokenizer = self._special if special else self._plain
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        return [found.ids for found in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_document(self, text: str) -> list[int]:
        """Ids of one training document: BOS, the text, EOS (see `frame_document`)."""
        return self.frame_document(self.encode(text))

    def frame_document(self, ids: list[int]) -> list[int]:
        """`ids` between BOS and EOS; where the tokenizer has none, between [CLS] and [SEP]."""
        return [*self.opening, *ids, *self.closing]

    @property
    def opening(self) -> list[int]:
        """What stands before a document: BOS, [CLS], or nothing."""
        return [id for id in (self.bos_id, self.cls_id) if id is not None][:1]

    @property
    def closing(self) -> list[int]:
        """What stands after a document: EOS, [SEP], or nothing."""
        return [id for id in (self.eos_id, self.sep_id) if id is not None][:1]

    @property
    def sentinel_ids(self) -> list[int]:
        """Ids of `<extra_id_0>`, `<extra_id_1>`, …, up to the first that is missing."""
        found: list[int] = []
        while (id := self._special.token_to_id(f"<extra_id_{len(found)}>")) is not None:
            found.append(id)
        return found

    def frame(self, text: str, pair: str | None = None) -> Framed:
        """One or two texts between special tokens as transformers puts them: by the tokenizer's own post-processor.

        A tokenizer without one puts BOS or [CLS] before the texts and EOS or [SEP] after them.
        """
        found = self._plain.encode(text, pair, add_special_tokens=True)
        texts = (text, pair or "")
        framed = Framed(
            list(found.ids),
            list(found.type_ids),
            list(found.sequence_ids),
            [
                (0, 0) if part is None else _trimmed(texts[part], span)
                for part, span in zip(found.sequence_ids, found.offsets, strict=True)
            ],
        )
        if self._special.post_processor is not None and None in framed.parts:
            return framed
        before, after = self.opening, self.closing
        last = 0 if pair is None else 1
        return Framed(
            [*before, *framed.ids, *after],
            [0] * len(before) + framed.segments + [last] * len(after),
            [None] * len(before) + framed.parts + [None] * len(after),
            [(0, 0)] * len(before) + framed.spans + [(0, 0)] * len(after),
        )

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._special.decode(list(ids), skip_special_tokens=skip_special)
        return text

    @cached_property
    def byte_tokens(self) -> Mapping[int, int]:
        """The byte of each id that stands for a single one (byte fallback); empty for other kinds of tokenizers."""
        if "ByteFallback" not in self._kinds:
            return {}
        return {id: int(token[3:5], 16) for token, id in self._special.get_vocab().items() if _is_fallback(token)}

    def token_bytes(self) -> list[int]:
        """UTF-8 bytes of source text that each id stands for, 0 for special tokens, shape `(vocab_size,)`.

        Never by decoding single tokens: half a character would decode to the three bytes of U+FFFD.
        """
        sizes = [0] * self.vocab_size
        added = self._special.get_added_tokens_decoder()
        kinds = self._kinds
        for token, index in self._special.get_vocab(with_added_tokens=True).items():
            if index in added:
                sizes[index] = 0 if added[index].special else len(token.encode())
            elif "ByteLevel" in kinds:
                sizes[index] = len(token)  # one character of the byte alphabet per byte
            elif "ByteFallback" in kinds and _is_fallback(token):
                sizes[index] = 1
            else:
                sizes[index] = len(self._piece_text(token).encode())
        return sizes

    def vocabulary(self) -> dict[str, int]:
        """Ids by token, special ones included; tokens as `tokenizer.json` writes them."""
        found: dict[str, int] = self._special.get_vocab(with_added_tokens=True)
        return found

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat_template` gives one."""
        return (self.directory / "chat_template.jinja").is_file() or bool(self._config.get("chat_template"))

    @property
    def byte_level(self) -> bool:
        """Whether tokens are made of bytes (GPT-2's way)."""
        return "ByteLevel" in self._kinds

    @property
    def normalizes(self) -> bool:
        """Whether text is changed before it is cut, so that decoding may not give it back."""
        return self._special.normalizer is not None

    @cached_property
    def _kinds(self) -> frozenset[str]:
        """The types of the decoders, in `tokenizer.json`'s words; `▁` if one of them turns that into a space."""
        state = json.loads(self._special.to_str())["decoder"]
        return frozenset({*_types(state), *("▁" for _ in range("▁" in json.dumps(state, ensure_ascii=False)))})

    def _piece_text(self, token: str) -> str:
        """The text of a token that is not made of bytes; a piece that continues a word without its mark."""
        if "WordPiece" in self._kinds:
            return token.removeprefix("##")
        return token.replace("▁", " ") if "▁" in self._kinds or "Metaspace" in self._kinds else token

    def word_joins(self) -> tuple[list[bool], list[bool]]:
        """Which ids can continue a word, and which leave it open for that; each of length `vocab_size`.

        Two tokens are of one word if the first leaves it open and the second continues it: letters or digits meet.
        """
        continues, leaves_open = [False] * self.vocab_size, [False] * self.vocab_size
        added = self._special.get_added_tokens_decoder()
        decoder = self._special.decoder
        wordpiece = type(self._special.model).__name__ == "WordPiece"
        whole_words = decoder is None  # decoding puts a space between any two
        for token, index in self._special.get_vocab(with_added_tokens=True).items():
            if index in added:
                continue
            # Part of a character becomes U+FFFD, which counts as a letter.
            text = decoder.decode([token]) if self.byte_level else self._piece_text(token)
            if text:
                leaves_open[index] = text[-1].isalnum() or text[-1] == "\ufffd"
                continues[index] = text[0].isalnum() or text[0] == "\ufffd"
                if wordpiece or whole_words:
                    continues[index] = wordpiece and token.startswith("##")
        return continues, leaves_open

    @property
    def chat_template(self) -> ChatTemplate:
        """The chat template; InputError if the tokenizer has none."""
        if self._chat is None:
            from llmctl.text.template import ChatTemplate

            self._chat = ChatTemplate(_template_text(self.directory, self._config), self._names, self.special_tokens())
        return self._chat

    def special_tokens(self) -> dict[str, int]:
        """Text of every special token, with its id."""
        added = self._special.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> ChatIds:
        """Ids of a conversation and the mask of what the assistant says, its closing token included.

        Equal to transformers' `apply_chat_template(tokenize=True)` unless a message holds the text of a special token:
        there it stays ordinary text. With `add_generation_prompt` the ids end where the assistant's answer begins.
        `tools` are functions as OpenAI's API has them; a template that knows none gets them in its system message.
        """
        pieces = self.chat_template.pieces(messages, add_generation_prompt, tools)
        ids: list[int] = []
        mask: list[int] = []
        for piece in pieces:
            if piece.token is not None:
                ids.append(piece.token)
                mask.append(int(piece.assistant_at(0, 1)))
                continue
            found = (self._special if piece.special else self._plain).encode(piece.text, add_special_tokens=False)
            ids += found.ids
            mask += [int(piece.assistant_at(start, end)) for start, end in found.offsets]
        if self.bos_id is not None and ids[:2] == [self.bos_id] * 2:
            raise InputError(
                f"the chat template of {self.directory} writes BOS twice", hint="remove one `bos_token` from it"
            )
        return ChatIds(ids, mask)


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copy the tokenizer's files byte for byte, the chat template included."""
    found = [name for name in FILES if (source / name).is_file()]
    if "tokenizer.json" not in found:
        raise InputError(f"no tokenizer.json in {source}", hint="give a directory that holds a tokenizer")
    destination.mkdir(parents=True, exist_ok=True)
    for name in found:
        shutil.copyfile(source / name, destination / name)


def _read_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = directory / name
        if path.is_file():
            try:
                config.update(json.loads(path.read_text(encoding="utf-8")))
            except ValueError as error:
                raise InputError(f"{path} is no valid JSON: {error}") from error
    return config


def _trimmed(text: str, span: tuple[int, int]) -> tuple[int, int]:
    """`span` of `text` without the white space at its ends; of white space alone, its empty end."""
    start, end = span
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def _token_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens by role, as transformers hands them to a chat template."""

    def text(value: Any) -> Any:
        return value["content"] if isinstance(value, dict) else value

    names: dict[str, Any] = {name: text(config[name]) for name in NAMED if text(config.get(name)) is not None}
    if extra := config.get("additional_special_tokens"):
        names["additional_special_tokens"] = [text(value) for value in extra]
    return names


def _template_text(directory: Path, config: Mapping[str, Any]) -> str:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # the old form: several named templates
        named = {entry["name"]: entry["template"] for entry in found}
        found = named.get("default")
    if not isinstance(found, str):
        raise InputError(
            f"the tokenizer in {directory} has no chat template",
            hint="add a chat_template.jinja, or use a tokenizer made by `llmctl tokenize`",
        )
    return found


def _types(part: Any) -> Iterator[str]:
    """The types of a component of `tokenizer.json` and of all within."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for value in part.values():
            yield from _types(value)
    elif isinstance(part, list):
        for value in part:
            yield from _types(value)


def _is_fallback(token: str) -> bool:
    """Whether a token is written as one byte: `<0x0A>`."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
