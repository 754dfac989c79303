"""How an exported model answers: ONNX Runtime sessions, KV cache, sampling. Never imports torch."""

from __future__ import annotations

from llmctl.ort.engine import OrtGenerator, open_bundle

__all__ = ["OrtGenerator", "open_bundle"]
