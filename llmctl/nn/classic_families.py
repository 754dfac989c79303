"""GPT, BLOOM, BERT and T5, as transformers' `config.json` has them. Free of torch."""

from __future__ import annotations

from typing import Any

from llmctl.nn.config import ModelConfig
from llmctl.nn.family import OFF, Family, Values, decoder_classes, encoder_classes

_GPT_FIELDS = {
    "layer_norm_epsilon": "norm_eps",
    "n_embd": "dim",
    "n_head": "heads",
    "n_layer": "layers",
    "n_positions": "context",
}
_BERT_FIELDS = {
    "hidden_size": "dim",
    "intermediate_size": "ff_dim",
    "layer_norm_eps": "norm_eps",
    "max_position_embeddings": "context",
    "num_attention_heads": "heads",
    "num_hidden_layers": "layers",
    "type_vocab_size": "token_types",
}
_GPT_DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
_BERT_DROPOUT = ("attention_probs_dropout_prob", "hidden_dropout_prob")


def _read_t5(config: Values) -> dict[str, Any]:
    return {"decoder_start_id": config.get("decoder_start_token_id")}


def _write_t5(config: ModelConfig) -> dict[str, Any]:
    act = "gated-gelu" if config.traits.gated else "relu"
    return {
        "decoder_start_token_id": config.decoder_start_id,
        "dense_act_fn": "gelu_new" if config.traits.gated else "relu",
        "feed_forward_proj": act,
        "is_encoder_decoder": True,
        "is_gated_act": config.traits.gated,
    }


def _t5(gated: bool) -> Family:
    return Family(
        model_type="t5",
        classes={"lm": "T5ForConditionalGeneration"},
        fields={
            "d_ff": "ff_dim",
            "d_kv": "head_dim",
            "d_model": "dim",
            "layer_norm_epsilon": "norm_eps",
            "n_positions": "context",
            "num_decoder_layers": "layers",
            "num_heads": "heads",
            "num_layers": "encoder_layers",
            "relative_attention_max_distance": "relative_distance",
            "relative_attention_num_buckets": "relative_buckets",
        },
        dropout=("dropout_rate",),
        defaults={
            "d_ff": 2048,
            "d_kv": 64,
            "d_model": 512,
            "eos_token_id": 1,
            "layer_norm_epsilon": 1e-6,
            "n_positions": 512,
            "num_heads": 8,
            "num_layers": 6,
            "pad_token_id": 0,
            "relative_attention_max_distance": 128,
            "relative_attention_num_buckets": 32,
            "vocab_size": 32128,
        },
        read=lambda config: {
            **_read_t5(config),
            "layers": config.get("num_decoder_layers") or config.get("num_layers", 6),
        },
        write=_write_t5,
        matches=lambda config: (
            (config.get("feed_forward_proj", "relu") == "gated-gelu") == gated
            and config.get("feed_forward_proj", "relu") in ("relu", "gated-gelu")
        ),
    )


CLASSIC: dict[str, Family] = {
    "gpt1": Family(
        model_type="openai-gpt",
        classes=decoder_classes("OpenAIGPT", "LMHeadModel", tokens=False),
        fields=_GPT_FIELDS,
        written={"afn": "gelu"},
        dropout=_GPT_DROPOUT,
        defaults={
            "layer_norm_epsilon": 1e-5,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 512,
            "vocab_size": 40478,
        },
        refused={"afn": ("gelu",)},
    ),
    "gpt2": Family(
        model_type="gpt2",
        classes=decoder_classes("GPT2", "LMHeadModel"),
        fields={**_GPT_FIELDS, "n_inner": "ff_dim"},
        written={"activation_function": "gelu_new"},
        dropout=_GPT_DROPOUT,
        defaults={
            "bos_token_id": 50256,
            "eos_token_id": 50256,
            "layer_norm_epsilon": 1e-5,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "tie_word_embeddings": True,
            "vocab_size": 50257,
        },
        refused={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "add_cross_attention": OFF,
            "scale_attn_by_inverse_layer_idx": OFF,
            "scale_attn_weights": (True,),
        },
    ),
    "bloom": Family(
        model_type="bloom",
        classes=decoder_classes("Bloom"),
        fields={
            "hidden_size": "dim",
            "layer_norm_epsilon": "norm_eps",
            "n_head": "heads",
            "n_layer": "layers",
            "seq_length": "context",
        },
        written={"apply_residual_connection_post_layernorm": False},
        dropout=("attention_dropout", "hidden_dropout"),
        defaults={
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": 64,
            "layer_norm_epsilon": 1e-5,
            "n_head": 8,
            "n_layer": 2,
            "seq_length": 2048,
            "vocab_size": 250880,
        },
        refused={"apply_residual_connection_post_layernorm": OFF},
    ),
    "bert": Family(
        model_type="bert",
        classes={"pretraining": "BertForPreTraining", **encoder_classes("Bert")},
        fields=_BERT_FIELDS,
        written={"hidden_act": "gelu", "position_embedding_type": "absolute"},
        dropout=_BERT_DROPOUT,
        defaults={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": 512,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "pad_token_id": 0,
            "type_vocab_size": 2,
            "vocab_size": 30522,
        },
        refused={
            "add_cross_attention": OFF,
            "hidden_act": ("gelu",),
            "is_decoder": OFF,
            "position_embedding_type": (None, "absolute"),
        },
    ),
    "roberta": Family(
        model_type="roberta",
        classes=encoder_classes("Roberta"),
        fields=_BERT_FIELDS,
        written={"hidden_act": "gelu", "position_embedding_type": "absolute"},
        dropout=_BERT_DROPOUT,
        defaults={
            "bos_token_id": 0,
            "eos_token_id": 2,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": 512,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "pad_token_id": 1,
            "type_vocab_size": 2,
            "vocab_size": 50265,
        },
        write=lambda config: {"pad_token_id": 1},
        refuses=lambda config: config.pad_id not in (None, 1),
        refused={
            "add_cross_attention": OFF,
            "hidden_act": ("gelu",),
            "is_decoder": OFF,
            "pad_token_id": (1,),
            "position_embedding_type": (None, "absolute"),
        },
    ),
    "distilbert": Family(
        model_type="distilbert",
        classes=encoder_classes("DistilBert"),
        fields={
            "dim": "dim",
            "hidden_dim": "ff_dim",
            "max_position_embeddings": "context",
            "n_heads": "heads",
            "n_layers": "layers",
        },
        written={"activation": "gelu", "sinusoidal_pos_embds": False},
        dropout=("attention_dropout", "dropout", "qa_dropout", "seq_classif_dropout"),
        defaults={
            "dim": 768,
            "hidden_dim": 3072,
            "max_position_embeddings": 512,
            "n_heads": 12,
            "n_layers": 6,
            "pad_token_id": 0,
            "vocab_size": 30522,
        },
        refused={"activation": ("gelu",)},
        read=lambda config: {"norm_eps": 1e-12},
        refuses=lambda config: config.norm_eps != 1e-12,
    ),
    "t5": _t5(gated=False),
    "t5v1_1": _t5(gated=True),
}
