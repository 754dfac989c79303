"""What can be set about training a tokenizer and writing token shards."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from llmctl.spec.params import Field, Params

SMALLEST = 258
"""Two special tokens and the 256 bytes."""
SPECIAL_COUNT = {"gpt": 6, "bert": 4, "roberta": 4, "t5": 2}
T5_SENTINELS = 100


class TokenizeParams(Params):
    """Parameters of the stage `tokenize`."""

    vocab_size: int = Field(
        8192, ge=SMALLEST, description="tokens of the trained tokenizer, the 256 bytes and all special ones included"
    )
    min_frequency: int = Field(2, ge=1, description="how often a pair must occur to be merged")
    pattern: Literal["gpt2", "llama3", "qwen2"] = Field(
        "gpt2",
        description="how text is cut before merging: gpt2 (numbers whole), llama3 (up to 3 digits) or qwen2 (single "
        "digits); onnxruntime-genai reads all three",
    )
    special: Literal["gpt", "bert", "roberta", "t5"] = Field(
        "gpt",
        description="special tokens: gpt (decoders; <|bos|>, <|end|>, <|pad|> and a chat template), bert ([CLS], "
        "[SEP], [MASK], [PAD]), roberta (<s>, </s>, <mask>, <pad>) or t5 (</s>, <pad> and sentinels)",
    )
    sentinels: int | None = Field(
        None,
        ge=0,
        description="`<extra_id_N>` tokens for span corruption, the last ids of the vocabulary; unset: 100 with "
        "special: t5, else none",
    )
    emit: Literal["both", "tokenizer", "tokens"] = Field(
        "both", description="what to produce: the tokenizer, the token shards, or both"
    )

    @model_validator(mode="after")
    def _bytes_fit(self) -> TokenizeParams:
        least = 256 + SPECIAL_COUNT[self.special] + self.sentinel_count
        if self.vocab_size < least:
            raise ValueError(
                f"vocab_size must be greater than or equal to {least} with special: {self.special} and "
                f"{self.sentinel_count} sentinels, it is {self.vocab_size}"
            )
        return self

    @property
    def sentinel_count(self) -> int:
        """`sentinels` with its default filled in."""
        if self.sentinels is not None:
            return self.sentinels
        return T5_SENTINELS if self.special == "t5" else 0

    def outputs(self) -> set[str]:
        """What `emit` names, and the metrics."""
        products = {"tokenizer", "tokens"} if self.emit == "both" else {self.emit}
        return {*products, "metrics"}
