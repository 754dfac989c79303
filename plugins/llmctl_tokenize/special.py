"""The special tokens of each kind of model: what they are called, which ids they get, how a text is framed by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tokenizers import processors

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role'] + ', use system, user or assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class SpecialTokens:
    """`tokens` get the first ids, in this order; `names` say which plays which part, in transformers' words."""

    tokens: tuple[str, ...]
    names: Mapping[str, str]
    template: str | None = None
    single: str = ""
    """How one text is framed where transformers adds special tokens; empty: not at all."""
    pair: str = ""
    further: tuple[str, ...] = field(default=())
    """Those of `tokens` that play no named part."""
    unk: str = "<unk>"
    """What the unknown token is called where there is one."""

    @property
    def unknown(self) -> str | None:
        """The unknown token, None if every text can be written without one."""
        return self.names.get("unk_token")

    def extended(self, further: Sequence[str], unknown: bool) -> SpecialTokens:
        """With the unknown token, if wanted, and with further ones, after those that are there."""
        names = {**self.names, "unk_token": self.unk} if unknown else self.names
        tokens = (*self.tokens, *([self.unk] if unknown else []), *further)
        return replace(self, tokens=tokens, names=names, further=(*self.further, *further))

    def processor(self) -> processors.PostProcessor | None:
        """What adds the frame in `tokenizer.json`; the ids of `tokens` are their places."""
        if not self.single:
            return None
        used = [(token, number) for number, token in enumerate(self.tokens) if token in self.single]
        return processors.TemplateProcessing(single=self.single, pair=self.pair, special_tokens=used)


def sentinel_names(count: int) -> list[str]:
    """In the order of their ids: T5's sentinels descend, `<extra_id_0>` is the last id of the vocabulary."""
    return [f"<extra_id_{number}>" for number in reversed(range(count))]


SPECIAL: dict[str, SpecialTokens] = {
    "gpt": SpecialTokens(
        tokens=("<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"),
        names={"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"},
        template=CHAT_TEMPLATE,
        further=("<|system|>", "<|user|>", "<|assistant|>"),
        unk="<|unk|>",
    ),
    "bert": SpecialTokens(
        tokens=("[PAD]", "[CLS]", "[SEP]", "[MASK]"),
        names={"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"},
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        unk="[UNK]",
    ),
    # fairseq's order of ids; the positions of RoBERTa begin after the id of <pad>.
    "roberta": SpecialTokens(
        tokens=("<s>", "<pad>", "</s>", "<mask>"),
        names={
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "cls_token": "<s>",
            "sep_token": "</s>",
            "mask_token": "<mask>",
        },
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
    ),
    "t5": SpecialTokens(
        tokens=("<pad>", "</s>"),
        names={"pad_token": "<pad>", "eos_token": "</s>"},
        single="$A </s>",
        pair="$A </s> $B </s>",
    ),
}
