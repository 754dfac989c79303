"""How one family's `config.json` says what a ModelConfig says. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmctl.nn.config import TRAITS, ModelConfig

Values = Mapping[str, Any]


def _nothing(config: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family's `config.json` says what a ModelConfig says."""

    model_type: str
    classes: dict[str, str]
    """Head to transformers class."""
    fields: dict[str, str]
    """Their key to our field, where the values are equal."""
    written: dict[str, Any] = field(default_factory=dict)
    """Keys without a field of ours, with the one value that this transformer computes."""
    dropout: tuple[str, ...] = ()
    """Keys that say how much is dropped in training; written from ours, never read."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """What transformers takes when a key is left out, where that differs from ours."""
    refused: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Features of transformers that would change the logits: key to the values that mean "off"."""
    options: frozenset[str] = frozenset()
    """Fields of ours that the family can express beside `fields`."""
    letters: str = "L"
    """Kinds of layer it can have."""
    layer_types: bool = False
    """Whether it lists the kind of each layer; without, all are alike."""
    context: int = 1024
    """Of families whose files say nothing of it."""
    pattern: Callable[[Values, int], str] = lambda config, layers: "S"
    """The kinds of layer where a file does not list them."""
    read: Callable[[Values], dict[str, Any]] = _nothing
    write: Callable[[ModelConfig], dict[str, Any]] = _nothing
    refuses: Callable[[ModelConfig], bool] = lambda config: False
    """What else of ours it cannot express."""
    matches: Callable[[Values], bool] = lambda config: True
    """Tells families of one class apart."""

    @property
    def windows(self) -> bool:
        """Whether layers may have a sliding window."""
        return "S" in self.letters

    def lacks(self, config: ModelConfig) -> bool:
        """Whether transformers cannot express this configuration of the family."""
        neutral = {
            "kv_heads": config.heads,
            "head_dim": config.dim // config.heads,
            "rope_scaling": None,
            "rotary_share": 1.0,
            "local_rope_theta": 0.0,
            "attention_scale": 0.0,
            "attention_softcap": 0.0,
            "qk_gain": 1.0,
            "value_pattern": "",
            "logit_softcap": 0.0,
            "token_types": 0,
            "ff_dim": 4 * config.dim,
        }
        known = {*self.fields.values(), *self.options}
        odd = any(getattr(config, name) != value for name, value in neutral.items() if name not in known)
        pattern = set(config.pattern) <= set(self.letters) and (self.layer_types or len(config.pattern) == 1)
        changed = config.traits != TRAITS[config.arch] or config.head not in self.classes
        scaling = (
            config.rope_scaling is not None
            and config.rope_scaling.kind == "dynamic"
            and (config.context != int(config.rope_scaling.original_context * config.rope_scaling.factor))
        )
        return odd or changed or not pattern or scaling or self.refuses(config)


OFF = (None, False)
"""How a file says that it does not use a feature."""


def decoder_classes(name: str, lm: str = "ForCausalLM", tokens: bool = True, model: str = "") -> dict[str, str]:
    """The transformers classes of a decoder, by head."""
    more = {"token-classification": f"{name}ForTokenClassification"} if tokens else {}
    return {
        "lm": name + lm,
        "classification": f"{name}ForSequenceClassification",
        "features": f"{model or name}Model",
        **more,
    }


def encoder_classes(name: str) -> dict[str, str]:
    """The transformers classes of an encoder, by head."""
    return {
        "mlm": f"{name}ForMaskedLM",
        "features": f"{name}Model",
        "classification": f"{name}ForSequenceClassification",
        "token-classification": f"{name}ForTokenClassification",
        "question-answering": f"{name}ForQuestionAnswering",
    }
