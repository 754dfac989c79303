"""The named models in full size: shapes as published, each with its source. Free of torch.

Numbers stand in the order layers, dim, heads, kv_heads, head_dim, ff_dim; what is left out is the family's usual value.
Shapes come from the papers' tables, and from `config.json` where weights were released.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmctl.nn.config import RopeScaling

COLUMNS = ("layers", "dim", "heads", "kv_heads", "head_dim", "ff_dim")


@dataclass(frozen=True, kw_only=True)
class Published:
    """One model of the world: the arguments of its ModelConfig, and where they are from."""

    source: str
    shape: Mapping[str, Any]
    note: str = ""
    """What the source leaves open, and what is taken for it."""
    elsewhere: str = ""
    """Why llmctl's own transformer does not compute it, so that it goes through transformers; empty: it does."""


Row = tuple[Any, ...]
"""Numbers as in COLUMNS, then what else differs from the group as a dict."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Models of one source; `common` holds for all of them."""

    source: str
    common: Mapping[str, Any]
    rows: Mapping[str, Row]
    note: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Of single models, beside `note`."""
    elsewhere: str = ""

    def models(self) -> dict[str, Published]:
        """Name to model."""
        return {name: self._model(name, row) for name, row in self.rows.items()}

    def _model(self, name: str, row: Row) -> Published:
        further: Mapping[str, Any] = row[-1] if isinstance(row[-1], dict) else {}
        shape = {**self.common, **dict(zip(COLUMNS, row[: len(row) - bool(further)], strict=False)), **further}
        note = "; ".join(text for text in (self.note, self.notes.get(name, "")) if text)
        return Published(source=self.source, shape=shape, note=note, elsewhere=self.elsewhere)


def _llama3(factor: float) -> RopeScaling:
    return RopeScaling(kind="llama3", factor=factor, original_context=8192, high_freq_factor=4.0)


_UNTIED = {"tie_embeddings": False}
_BERT = {"arch": "bert", "token_types": 2, "context": 512, "norm_eps": 1e-12, "head": "pretraining"}
_T5 = {"vocab_size": 32128, "context": 512, "norm_eps": 1e-6, "pad_id": 0, "eos_id": 1}
_GPT3 = {"arch": "gpt3", "vocab_size": 50257, "context": 2048, "pattern": "LS", "window": 256}
_GOPHER = {"arch": "gopher", "vocab_size": 32000, "context": 2048}
_LLAMA = {"arch": "llama", "vocab_size": 32000, "context": 2048, "norm_eps": 1e-6, **_UNTIED}
_LLAMA3 = {"arch": "llama", "vocab_size": 128256, "rope_theta": 5e5}
_LLAMA31 = {**_LLAMA3, "context": 131072, "rope_scaling": _llama3(8.0), **_UNTIED}
_QWEN2 = {"arch": "qwen2", "rope_theta": 1e6, "norm_eps": 1e-6, "vocab_size": 151936, "context": 32768}
_QWEN2_LARGE = {"vocab_size": 152064, "context": 131072, "norm_eps": 1e-5, **_UNTIED}
_GEMMA2 = {
    "arch": "gemma2", "vocab_size": 256000, "context": 8192, "norm_eps": 1e-6, "window": 4096, "pattern": "SL",
    "attention_softcap": 50.0, "logit_softcap": 30.0,
}  # fmt: skip
_GEMMA3 = {
    "arch": "gemma3", "vocab_size": 262144, "context": 32768, "norm_eps": 1e-6, "window": 512, "pattern": "SSSSSL",
    "rope_theta": 1e6, "local_rope_theta": 1e4,
}  # fmt: skip
_GEMMA3_LARGE = {
    **_GEMMA3, "vocab_size": 262208, "context": 131072, "window": 1024,
    "rope_scaling": RopeScaling(kind="linear", factor=8.0, original_context=131072),
}  # fmt: skip

_GUIDE = (
    Group(
        source="BERT, arXiv 1810.04805; google-research/bert, uncased",
        common={**_BERT, "vocab_size": 30522},
        rows={"bert-base": (12, 768, 12), "bert-large": (24, 1024, 16)},
    ),
    Group(
        source="GPT-1, Radford et al. 2018; openai-gpt",
        common={"arch": "gpt1", "vocab_size": 40478, "context": 512},
        rows={"gpt1-117m": (12, 768, 12)},
    ),
    Group(
        source="RoBERTa, arXiv 1907.11692; FacebookAI/roberta-base, roberta-large",
        common={"arch": "roberta", "vocab_size": 50265, "context": 512, "token_types": 1, "pad_id": 1},
        rows={"roberta-base": (12, 768, 12), "roberta-large": (24, 1024, 16)},
    ),
    Group(
        source="DistilBERT, arXiv 1910.01108; distilbert-base-uncased",
        common={"arch": "distilbert", "vocab_size": 30522, "context": 512, "norm_eps": 1e-12},
        rows={"distilbert-base": (6, 768, 12)},
    ),
    Group(
        source="SpanBERT, arXiv 1907.10529; facebookresearch/SpanBERT, cased",
        common={**_BERT, "vocab_size": 28996, "head": "mlm"},
        rows={"spanbert-base": (12, 768, 12), "spanbert-large": (24, 1024, 16)},
        note="trained on one segment; the checkpoints keep BERT's two token types",
    ),
    Group(
        source="GPT-2, Radford et al. 2019; openai-community/gpt2",
        common={"arch": "gpt2", "vocab_size": 50257, "context": 1024},
        rows={
            "gpt2-small": (12, 768, 12), "gpt2-medium": (24, 1024, 16),
            "gpt2-large": (36, 1280, 20), "gpt2-xl": (48, 1600, 25),
        },
    ),
    Group(
        source="T5, arXiv 1910.10683; google-t5",
        common={**_T5, "arch": "t5"},
        rows={
            "t5-small": (6, 512, 8), "t5-base": (12, 768, 12), "t5-large": (24, 1024, 16),
            "t5-3b": (24, 1024, 32, 32, 128, 16384), "t5-11b": (24, 1024, 128, 128, 128, 65536),
        },
    ),
    Group(
        source="T5 v1.1, arXiv 1910.10683 and 2002.05202; google/t5-v1_1",
        common={**_T5, "arch": "t5v1_1", **_UNTIED},
        rows={
            "t5-v1.1-small": (8, 512, 6, 6, 64, 1024), "t5-v1.1-base": (12, 768, 12, 12, 64, 2048),
            "t5-v1.1-large": (24, 1024, 16, 16, 64, 2816), "t5-v1.1-xl": (24, 2048, 32, 32, 64, 5120),
            "t5-v1.1-xxl": (24, 4096, 64, 64, 64, 10240),
        },
    ),
    Group(
        source="GPT-3, arXiv 2005.14165, table 2.1",
        common=_GPT3,
        rows={
            "gpt3-125m": (12, 768, 12), "gpt3-350m": (24, 1024, 16), "gpt3-760m": (24, 1536, 16),
            "gpt3-1.3b": (24, 2048, 16), "gpt3-2.7b": (32, 2560, 32), "gpt3-6.7b": (32, 4096, 32),
            "gpt3-13b": (40, 5120, 40), "gpt3-175b": (96, 12288, 96),
        },
        note="the width of the band is not published: 256, as in GPT-Neo",
        notes={
            "gpt3-1.3b": "the table's 24 heads of 128 would make 1.5 billion parameters; 16 make its 1.3",
            "gpt3-13b": "the table's width of 5140 is no multiple of its 40 heads of 128; 5120 is",
        },
    ),
    Group(
        source="Gopher, arXiv 2112.11446, table 1",
        common=_GOPHER,
        rows={
            "gopher-44m": (8, 512, 16), "gopher-117m": (12, 768, 12), "gopher-417m": (12, 1536, 12),
            "gopher-1.4b": (24, 2048, 16), "gopher-7.1b": (32, 4096, 32), "gopher-280b": (80, 16384, 128),
        },
    ),
    Group(
        source="Jurassic-1, Lieber et al. 2021, table 1",
        common={"arch": "gpt2", "vocab_size": 256000, "context": 2048},
        rows={"jurassic1-large": (32, 4096, 32), "jurassic1-jumbo": (76, 13824, 96)},
        note="the vocabulary is published as 256K pieces: 256 000",
    ),
    Group(
        source="Chinchilla, arXiv 2203.15556, table 4",
        common=_GOPHER,
        rows={"chinchilla-70b": (80, 8192, 64)},
    ),
    Group(
        source="LaMDA, arXiv 2201.08239, section 3 and table 27",
        common={"arch": "lamda", "vocab_size": 32000, "context": 1024, "norm_eps": 1e-6},
        rows={
            "lamda-2b": (10, 2560, 40, 40, 128, 20480), "lamda-8b": (16, 4096, 64, 64, 128, 32768),
            "lamda-137b": (64, 8192, 128, 128, 128, 65536),
        },
        note="the context is not published: 1024; sizes are published without the embeddings",
        notes={
            "lamda-2b": "head and feed-forward widths in proportion to the 137B",
            "lamda-8b": "head and feed-forward widths in proportion to the 137B",
        },
    ),
    Group(
        source="LLaMA, arXiv 2302.13971, table 2",
        common=_LLAMA,
        rows={
            "llama-7b": (32, 4096, 32, 32, 128, 11008), "llama-13b": (40, 5120, 40, 40, 128, 13824),
            "llama-30b": (60, 6656, 52, 52, 128, 17920),
            "llama-65b": (80, 8192, 64, 64, 128, 22016, {"norm_eps": 1e-5}),
        },
    ),
    Group(
        source="Llama 2, arXiv 2307.09288; meta-llama/Llama-2-7b-hf",
        common={**_LLAMA, "context": 4096, "norm_eps": 1e-5},
        rows={
            "llama-2-7b": (32, 4096, 32, 32, 128, 11008), "llama-2-13b": (40, 5120, 40, 40, 128, 13824),
            "llama-2-70b": (80, 8192, 64, 8, 128, 28672),
        },
    ),
    Group(
        source="Llama 3, arXiv 2407.21783; meta-llama/Meta-Llama-3-8B",
        common={**_LLAMA3, "context": 8192, **_UNTIED},
        rows={"llama-3-8b": (32, 4096, 32, 8, 128, 14336), "llama-3-70b": (80, 8192, 64, 8, 128, 28672)},
    ),
    Group(
        source="Llama 3.1, arXiv 2407.21783; meta-llama/Llama-3.1-8B",
        common=_LLAMA31,
        rows={
            "llama-3.1-8b": (32, 4096, 32, 8, 128, 14336), "llama-3.1-70b": (80, 8192, 64, 8, 128, 28672),
            "llama-3.1-405b": (126, 16384, 128, 8, 128, 53248),
        },
    ),
    Group(
        source="Llama 3.2, meta-llama/Llama-3.2-1B, 3B",
        common={**_LLAMA3, "context": 131072, "rope_scaling": _llama3(32.0)},
        rows={"llama-3.2-1b": (16, 2048, 32, 8, 64, 8192), "llama-3.2-3b": (28, 3072, 24, 8, 128, 8192)},
    ),
)  # fmt: skip

_TODAY = (
    Group(
        source="BLOOM, arXiv 2211.05100; bigscience/bloom",
        common={"arch": "bloom", "vocab_size": 250880, "context": 2048},
        rows={
            "bloom-560m": (24, 1024, 16), "bloom-1b1": (24, 1536, 16), "bloom-1b7": (24, 2048, 16),
            "bloom-3b": (30, 2560, 32), "bloom-7b1": (30, 4096, 32), "bloom-176b": (70, 14336, 112),
        },
    ),
    Group(
        source="Mistral 7B, arXiv 2310.06825; mistralai/Mistral-7B-v0.1, v0.3",
        common={"arch": "mistral", "context": 32768, **_UNTIED},
        rows={
            "mistral-7b-v0.1": (32, 4096, 32, 8, 128, 14336, {"vocab_size": 32000, "window": 4096}),
            "mistral-7b-v0.3": (32, 4096, 32, 8, 128, 14336, {"vocab_size": 32768, "rope_theta": 1e6}),
        },
    ),
    Group(
        source="Qwen2, arXiv 2407.10671; Qwen/Qwen2-0.5B",
        common={**_QWEN2, "context": 131072},
        rows={
            "qwen2-0.5b": (24, 896, 14, 2, 64, 4864), "qwen2-1.5b": (28, 1536, 12, 2, 128, 8960),
            "qwen2-7b": (28, 3584, 28, 4, 128, 18944, {**_QWEN2_LARGE, "norm_eps": 1e-6}),
            "qwen2-72b": (80, 8192, 64, 8, 128, 29568, _QWEN2_LARGE),
        },
    ),
    Group(
        source="Qwen2.5, arXiv 2412.15115; Qwen/Qwen2.5-0.5B",
        common=_QWEN2,
        rows={
            "qwen2.5-0.5b": (24, 896, 14, 2, 64, 4864),
            "qwen2.5-1.5b": (28, 1536, 12, 2, 128, 8960, {"context": 131072}),
            "qwen2.5-3b": (36, 2048, 16, 2, 128, 11008),
            "qwen2.5-7b": (28, 3584, 28, 4, 128, 18944, {**_QWEN2_LARGE, "norm_eps": 1e-6}),
            "qwen2.5-14b": (48, 5120, 40, 8, 128, 13824, _QWEN2_LARGE),
            "qwen2.5-32b": (64, 5120, 40, 8, 128, 27648, _QWEN2_LARGE),
            "qwen2.5-72b": (80, 8192, 64, 8, 128, 29568, _QWEN2_LARGE),
        },
    ),
    Group(
        source="Qwen3, arXiv 2505.09388; Qwen/Qwen3-0.6B",
        common={"arch": "qwen3", "rope_theta": 1e6, "norm_eps": 1e-6, "vocab_size": 151936, "context": 40960},
        rows={
            "qwen3-0.6b": (28, 1024, 16, 8, 128, 3072), "qwen3-1.7b": (28, 2048, 16, 8, 128, 6144),
            "qwen3-4b": (36, 2560, 32, 8, 128, 9728), "qwen3-8b": (36, 4096, 32, 8, 128, 12288, _UNTIED),
            "qwen3-14b": (40, 5120, 40, 8, 128, 17408, _UNTIED), "qwen3-32b": (64, 5120, 64, 8, 128, 25600, _UNTIED),
        },
    ),
    Group(
        source="Gemma 2, arXiv 2408.00118; google/gemma-2-2b",
        common=_GEMMA2,
        rows={
            "gemma-2-2b": (26, 2304, 8, 4, 256, 9216), "gemma-2-9b": (42, 3584, 16, 8, 256, 14336),
            "gemma-2-27b": (46, 4608, 32, 16, 128, 36864, {"attention_scale": 144**-0.5}),
        },
    ),
    Group(
        source="Gemma 3, arXiv 2503.19786; google/gemma-3-270m, gemma-3-1b-pt",
        common=_GEMMA3,
        rows={"gemma-3-270m": (18, 640, 4, 1, 256, 2048), "gemma-3-1b": (26, 1152, 4, 1, 256, 6912)},
    ),
    Group(
        source="Gemma 3, arXiv 2503.19786; google/gemma-3-4b-pt and larger",
        common=_GEMMA3_LARGE,
        rows={
            "gemma-3-4b": (34, 2560, 8, 4, 256, 10240), "gemma-3-12b": (48, 3840, 16, 8, 256, 15360),
            "gemma-3-27b": (62, 5376, 32, 16, 128, 21504, {"attention_scale": 168**-0.5}),
        },
        note="the text model alone; the released one reads images as well",
    ),
    Group(
        source="Phi-3, arXiv 2404.14219; microsoft/Phi-3-mini-4k-instruct",
        common={"arch": "phi3", "vocab_size": 32064, "context": 4096, "window": 2047, **_UNTIED},
        rows={"phi-3-mini-4k": (32, 3072, 32, 32, 96, 8192)},
    ),
    Group(
        source="Phi-4, arXiv 2412.08905; microsoft/phi-4",
        common={"arch": "phi3", "vocab_size": 100352, "context": 16384, "rope_theta": 250_000.0, **_UNTIED},
        rows={"phi-4": (40, 5120, 40, 10, 128, 17920)},
    ),
    Group(
        source="Phi-4-mini, arXiv 2503.01743; microsoft/Phi-4-mini-instruct",
        common={"arch": "phi3", "vocab_size": 200064, "context": 131072, "rotary_share": 0.75},
        rows={"phi-4-mini": (32, 3072, 24, 8, 128, 8192)},
        elsewhere="its rotary positions are scaled by longrope, a factor per channel",
    ),
    Group(
        source="SmolLM2, arXiv 2502.02737; HuggingFaceTB/SmolLM2-135M",
        common={"arch": "llama", "vocab_size": 49152, "context": 8192, "rope_theta": 1e5},
        rows={
            "smollm2-135m": (30, 576, 9, 3, 64, 1536), "smollm2-360m": (32, 960, 15, 5, 64, 2560),
            "smollm2-1.7b": (24, 2048, 32, 32, 64, 8192, {"rope_theta": 130_000.0}),
        },
    ),
    Group(
        source="SmolLM3, HuggingFaceTB/SmolLM3-3B",
        common={
            "arch": "smollm3", "vocab_size": 128256, "context": 65536, "rope_theta": 5e6, "norm_eps": 1e-6,
            "pattern": "LLLN",
        },
        rows={"smollm3-3b": (36, 2048, 16, 4, 128, 11008)},
    ),
)  # fmt: skip

PUBLISHED: dict[str, Published] = {
    name: model for group in (*_GUIDE, *_TODAY) for name, model in group.models().items()
}
