"""Our parameters' names in Hugging Face's files, family by family. Free of torch.

A family is one entry: where its modules are called otherwise, how deep its prefix is, how it lays out what it fuses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from llmctl.nn.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How one family names and stores what ours calls `modules`; N stands for a block's number."""

    modules: dict[str, str]
    prefix: str = ""
    """What bare models (`LlamaModel`) leave out of every name."""
    transposed: bool = False
    """Matrices of the blocks are stored as (in, out), GPT's Conv1D; modules fused into one are joined along the last
    axis then, else along the first."""
    by_head: bool = False
    """Query, key and value are fused head by head (BLOOM) instead of one after the other."""
    heads: dict[str, dict[str, str]] = field(default_factory=dict)
    """By head: names that differ."""


_LLAMA = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "unembedding": "lm_head",
    "classifier.out": "score",
    "blocks.N.attention_norm": "model.layers.N.input_layernorm",
    "blocks.N.attention.q": "model.layers.N.self_attn.q_proj",
    "blocks.N.attention.k": "model.layers.N.self_attn.k_proj",
    "blocks.N.attention.v": "model.layers.N.self_attn.v_proj",
    "blocks.N.attention.out": "model.layers.N.self_attn.o_proj",
    "blocks.N.attention.q_norm": "model.layers.N.self_attn.q_norm",
    "blocks.N.attention.k_norm": "model.layers.N.self_attn.k_norm",
    "blocks.N.ffn_norm": "model.layers.N.post_attention_layernorm",
    "blocks.N.ffn.gate": "model.layers.N.mlp.gate_proj",
    "blocks.N.ffn.up": "model.layers.N.mlp.up_proj",
    "blocks.N.ffn.down": "model.layers.N.mlp.down_proj",
}
_PHI3 = {
    **_LLAMA,
    "blocks.N.attention.q": "model.layers.N.self_attn.qkv_proj",
    "blocks.N.attention.k": "model.layers.N.self_attn.qkv_proj",
    "blocks.N.attention.v": "model.layers.N.self_attn.qkv_proj",
    "blocks.N.ffn.gate": "model.layers.N.mlp.gate_up_proj",
    "blocks.N.ffn.up": "model.layers.N.mlp.gate_up_proj",
}
_GEMMA = {
    **_LLAMA,
    "blocks.N.attention_after": "model.layers.N.post_attention_layernorm",
    "blocks.N.ffn_norm": "model.layers.N.pre_feedforward_layernorm",
    "blocks.N.ffn_after": "model.layers.N.post_feedforward_layernorm",
}
_GPT2 = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "unembedding": "lm_head",
    "classifier.out": "score",
    "blocks.N.attention_norm": "transformer.h.N.ln_1",
    "blocks.N.attention.q": "transformer.h.N.attn.c_attn",
    "blocks.N.attention.k": "transformer.h.N.attn.c_attn",
    "blocks.N.attention.v": "transformer.h.N.attn.c_attn",
    "blocks.N.attention.out": "transformer.h.N.attn.c_proj",
    "blocks.N.ffn_norm": "transformer.h.N.ln_2",
    "blocks.N.ffn.up": "transformer.h.N.mlp.c_fc",
    "blocks.N.ffn.down": "transformer.h.N.mlp.c_proj",
}
_GPT1 = {**_GPT2, "embedding": "transformer.tokens_embed", "positions": "transformer.positions_embed"}
_BLOOM = {
    "embedding": "transformer.word_embeddings",
    "embedding_norm": "transformer.word_embeddings_layernorm",
    "norm": "transformer.ln_f",
    "unembedding": "lm_head",
    "classifier.out": "score",
    "blocks.N.attention_norm": "transformer.h.N.input_layernorm",
    "blocks.N.attention.q": "transformer.h.N.self_attention.query_key_value",
    "blocks.N.attention.k": "transformer.h.N.self_attention.query_key_value",
    "blocks.N.attention.v": "transformer.h.N.self_attention.query_key_value",
    "blocks.N.attention.out": "transformer.h.N.self_attention.dense",
    "blocks.N.ffn_norm": "transformer.h.N.post_attention_layernorm",
    "blocks.N.ffn.up": "transformer.h.N.mlp.dense_h_to_4h",
    "blocks.N.ffn.down": "transformer.h.N.mlp.dense_4h_to_h",
}


def _bert(prefix: str, masked: dict[str, str]) -> dict[str, str]:
    layer = f"{prefix}.encoder.layer.N"
    return {
        "embedding": f"{prefix}.embeddings.word_embeddings",
        "positions": f"{prefix}.embeddings.position_embeddings",
        "segments": f"{prefix}.embeddings.token_type_embeddings",
        "embedding_norm": f"{prefix}.embeddings.LayerNorm",
        "pooler": f"{prefix}.pooler.dense",
        "classifier.out": "classifier",
        "blocks.N.attention.q": f"{layer}.attention.self.query",
        "blocks.N.attention.k": f"{layer}.attention.self.key",
        "blocks.N.attention.v": f"{layer}.attention.self.value",
        "blocks.N.attention.out": f"{layer}.attention.output.dense",
        "blocks.N.attention_norm": f"{layer}.attention.output.LayerNorm",
        "blocks.N.ffn.up": f"{layer}.intermediate.dense",
        "blocks.N.ffn.down": f"{layer}.output.dense",
        "blocks.N.ffn_norm": f"{layer}.output.LayerNorm",
        **masked,
    }


_ANSWERS = {"question-answering": {"classifier.out": "qa_outputs"}}
_BERT_MASKED = {
    "masked": "cls.predictions",
    "masked.dense": "cls.predictions.transform.dense",
    "masked.norm": "cls.predictions.transform.LayerNorm",
    "unembedding": "cls.predictions.decoder",
    "next": "cls.seq_relationship",
}
_ROBERTA_MASKED = {
    "masked": "lm_head",
    "masked.dense": "lm_head.dense",
    "masked.norm": "lm_head.layer_norm",
    "unembedding": "lm_head.decoder",
}
_DISTILBERT = {
    "embedding": "distilbert.embeddings.word_embeddings",
    "positions": "distilbert.embeddings.position_embeddings",
    "embedding_norm": "distilbert.embeddings.LayerNorm",
    "masked": "vocab_projector",
    "masked.dense": "vocab_transform",
    "masked.norm": "vocab_layer_norm",
    "unembedding": "vocab_projector",
    "classifier.dense": "pre_classifier",
    "classifier.out": "classifier",
    "blocks.N.attention.q": "distilbert.transformer.layer.N.attention.q_lin",
    "blocks.N.attention.k": "distilbert.transformer.layer.N.attention.k_lin",
    "blocks.N.attention.v": "distilbert.transformer.layer.N.attention.v_lin",
    "blocks.N.attention.out": "distilbert.transformer.layer.N.attention.out_lin",
    "blocks.N.attention_norm": "distilbert.transformer.layer.N.sa_layer_norm",
    "blocks.N.ffn.up": "distilbert.transformer.layer.N.ffn.lin1",
    "blocks.N.ffn.down": "distilbert.transformer.layer.N.ffn.lin2",
    "blocks.N.ffn_norm": "distilbert.transformer.layer.N.output_layer_norm",
}


def _t5(gated: bool) -> dict[str, str]:
    names = {"embedding": "shared", "unembedding": "lm_head"}
    for ours, theirs, last in (("encoder.", "encoder", 1), ("", "decoder", 2)):
        block = f"{theirs}.block.N.layer"
        names |= {
            f"{ours}relative": f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias",
            f"{ours}norm": f"{theirs}.final_layer_norm",
            f"{ours}blocks.N.attention_norm": f"{block}.0.layer_norm",
            **_t5_attention(f"{ours}blocks.N.attention", f"{block}.0.SelfAttention"),
            f"{ours}blocks.N.ffn_norm": f"{block}.{last}.layer_norm",
            f"{ours}blocks.N.ffn.up": f"{block}.{last}.DenseReluDense.{'wi_1' if gated else 'wi'}",
            f"{ours}blocks.N.ffn.gate": f"{block}.{last}.DenseReluDense.wi_0",
            f"{ours}blocks.N.ffn.down": f"{block}.{last}.DenseReluDense.wo",
        }
    cross = {"blocks.N.cross_norm": "decoder.block.N.layer.1.layer_norm"}
    return {**names, **cross, **_t5_attention("blocks.N.cross", "decoder.block.N.layer.1.EncDecAttention")}


def _t5_attention(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{mine}": f"{theirs}.{name}" for mine, name in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))}


_TOKENS = {"token-classification": {"classifier.out": "classifier"}}
NAMINGS: dict[str, Naming] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), Naming(modules=_LLAMA, prefix="model.")),
    "phi3": Naming(modules=_PHI3, prefix="model."),
    **dict.fromkeys(("gemma2", "gemma3"), Naming(modules=_GEMMA, prefix="model.")),
    "gpt1": Naming(modules=_GPT1, prefix="transformer.", transposed=True),
    "gpt2": Naming(modules=_GPT2, prefix="transformer.", transposed=True, heads=_TOKENS),
    "bloom": Naming(modules=_BLOOM, prefix="transformer.", by_head=True, heads=_TOKENS),
    "bert": Naming(modules=_bert("bert", _BERT_MASKED), prefix="bert.", heads=_ANSWERS),
    "roberta": Naming(
        modules=_bert("roberta", _ROBERTA_MASKED),
        prefix="roberta.",
        heads={
            **_ANSWERS,
            "classification": {"classifier.dense": "classifier.dense", "classifier.out": "classifier.out_proj"},
        },
    ),
    "distilbert": Naming(modules=_DISTILBERT, prefix="distilbert.", heads=_ANSWERS),
    "t5": Naming(modules=_t5(gated=False)),
    "t5v1_1": Naming(modules=_t5(gated=True)),
}


def hf_name(config: ModelConfig, name: str) -> str:
    """The Hugging Face name of our parameter `name` (`blocks.3.ffn.up.weight`); `config.arch` is in NAMINGS."""
    naming = NAMINGS[config.arch]
    module, _, kind = name.rpartition(".")
    number = re.search(r"\d+", module)
    names = {**naming.modules, **naming.heads.get(config.head, {})}
    hf = names[re.sub(r"\d+", "N", module)]
    if config.head == "features":
        hf = hf.removeprefix(naming.prefix)
    return f"{hf.replace('.N.', f'.{number.group()}.') if number else hf}.{kind}"


def is_transposed(config: ModelConfig, name: str) -> bool:
    """Whether the matrix `name` of ours is stored as (in, out)."""
    inside = name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name
    return NAMINGS[config.arch].transposed and inside
