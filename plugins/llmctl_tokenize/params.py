"""What can be set about training a tokenizer and writing token shards."""

from __future__ import annotations

from typing import Literal

from llmctl.spec.params import Field, Params

SMALLEST = 262
"""Six special tokens and the 256 bytes."""


class TokenizeParams(Params):
    """Parameters of the stage `tokenize`."""

    vocab_size: int = Field(
        8192, ge=SMALLEST, description="tokens of the trained tokenizer, the 256 bytes and 6 special ones included"
    )
    min_frequency: int = Field(2, ge=1, description="how often a pair must occur to be merged")
    pattern: Literal["gpt2", "llama3", "qwen2"] = Field(
        "gpt2",
        description="how text is cut before merging: gpt2 (numbers whole), llama3 (up to 3 digits) or qwen2 (single "
        "digits); onnxruntime-genai reads all three",
    )
    emit: Literal["both", "tokenizer", "tokens"] = Field(
        "both", description="what to produce: the tokenizer, the token shards, or both"
    )

    def outputs(self) -> set[str]:
        """What `emit` names, and the metrics."""
        products = {"tokenizer", "tokens"} if self.emit == "both" else {self.emit}
        return {*products, "metrics"}
