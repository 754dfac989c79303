"""How an exported model answers: ONNX Runtime sessions, KV cache, sampling. Never imports torch."""
