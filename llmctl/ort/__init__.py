"""How an exported model answers: ONNX Runtime sessions, KV cache, sampling. Never imports torch."""

from __future__ import annotations

from llmctl.ort.encoder import OrtEncoder, open_encoder
from llmctl.ort.generator import OrtGenerator, open_bundle, open_generator
from llmctl.ort.seq2seq import OrtSeq2Seq

__all__ = ["OrtEncoder", "OrtGenerator", "OrtSeq2Seq", "open_bundle", "open_encoder", "open_generator"]
