"""Be llama.cpp or onnxruntime-genai in `benchmarks/decode.py`: answer prompts that the parent process sends, greedily.

Run by the interpreter of the peers' environment: `pip install gguf safetensors torch==2.13.0 transformers==5.24.0 onnx
onnx-ir onnxruntime-genai==0.18.0 llama-cpp-python==0.3.36` (build the last with `CMAKE_ARGS=-DGGML_NATIVE=OFF` and the
processor's vector extensions on). `decode.py convert HF TARGET` writes a GGUF file per format, `decode.py build HF
TARGET` what genai's own builder makes of the weights in 4 bits; `decode.py llama.cpp FILE THREADS` and `decode.py genai
BUNDLE THREADS` serve, genai with as many threads as it chooses if that is 0.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Answer = Callable[[list[list[int]], int], list[list[int]]]

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def convert(source: Path, target: Path) -> None:
    """Write `fp32.gguf` and `int4.gguf` (every matrix Q4_0) of a LLaMA below `target`; they have no vocabulary."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    for name, kind in (("fp32", gguf.GGMLQuantizationType.F32), ("int4", gguf.GGMLQuantizationType.Q4_0)):
        writer = gguf.GGUFWriter(target / f"{name}.gguf", "llama")
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base((config.get("rope_parameters") or config).get("rope_theta", 10000.0))
        writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
        writer.add_vocab_size(config["vocab_size"])
        writer.add_tokenizer_model("no_vocab")
        for key, value in weights.items():
            array, stem = value.astype(np.float32), key.removesuffix(".weight")
            if stem.startswith("model.layers."):
                _, _, layer, part = stem.split(".", 3)
                stem = f"blk.{layer}.{NAMES[part]}"
                if part in ("self_attn.q_proj", "self_attn.k_proj"):
                    heads = config["num_attention_heads" if "q_proj" in part else "num_key_value_heads"]
                    array = interleaved(array, heads)
            else:
                stem = NAMES[stem]
            if array.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
                writer.add_tensor(f"{stem}.weight", gguf.quants.quantize(array, kind), raw_dtype=kind)
            else:
                writer.add_tensor(f"{stem}.weight", array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def build(source: Path, target: Path) -> None:
    """Have genai's model builder write its int4 model, as it does by default for the CPU, into `target`."""
    import shutil
    import subprocess
    import tempfile

    from tokenizers import Tokenizer, models

    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "hf"
        shutil.copytree(source, copy)
        # The builder wants a tokenizer; nothing here uses it.
        Tokenizer(models.BPE({"a": 0}, [])).save(str(copy / "tokenizer.json"))
        (copy / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", copy, "-o", target]
        subprocess.run([*command, "-p", "int4", "-e", "cpu", "-c", Path(name) / "cache"], check=True)


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of llama.cpp, which turns neighbouring channels, not those half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def llama_cpp(file: Path, threads: int) -> Answer:
    """The library's own calls, without the Python class around them; the cache in float32 beside float32 weights."""
    import ctypes

    import llama_cpp as lib

    lib.llama_backend_init()
    log = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(log, ctypes.c_void_p(0))
    model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def context(sequences: int) -> Any:
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 256 * sequences, 512, 512
        params.n_seq_max, params.n_threads, params.n_threads_batch = sequences, threads, threads
        if "fp32" in file.name:
            params.type_k = params.type_v = 0
            params.flash_attn_type = 0  # which would round queries to half precision
        return lib.llama_init_from_model(model, params)

    contexts: dict[int, Any] = {}

    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        count = len(prompts)
        if count not in contexts:
            contexts[count] = (context(count), lib.llama_batch_init(512, 0, count))
        ctx, batch = contexts[count]
        lib.llama_memory_clear(lib.llama_get_memory(ctx), True)
        said: list[list[int]] = [[] for _ in prompts]

        def feed(entries: list[tuple[int, int, int, bool]]) -> None:
            batch.n_tokens = len(entries)
            for i, (token, position, row, wanted) in enumerate(entries):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
                batch.seq_id[i][0], batch.logits[i] = row, wanted
            if lib.llama_decode(ctx, batch):
                raise SystemExit("llama_decode failed")
            for i, (_, _, row, wanted) in enumerate(entries):
                if wanted:
                    logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(ctx, i), (vocabulary,))
                    said[row].append(int(logits.argmax()))

        for row, prompt in enumerate(prompts):
            feed([(token, at, row, at == len(prompt) - 1) for at, token in enumerate(prompt)])
        for step in range(new - 1):
            feed([(said[row][-1], len(prompt) + step, row, True) for row, prompt in enumerate(prompts)])
        return said

    answer.log = log  # type: ignore[attr-defined]  # the library holds only a pointer to it
    return answer


def genai(bundle: Path, threads: int) -> Answer:
    """Its own token loop over a bundle; 0 threads: as many as it takes when nobody says, half of the processors."""
    import onnxruntime_genai as og

    config = og.Config(str(bundle))
    if threads:
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        params, length = og.GeneratorParams(model), len(prompts[0])
        params.set_search_options(max_length=length + new, batch_size=len(prompts), do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(np.asarray(prompts, np.int32))
        for _ in range(new):
            generator.generate_next_token()
        return [generator.get_sequence(row)[length:].tolist() for row in range(len(prompts))]

    return answer


def serve(answer: Answer) -> None:
    """One line of JSON in (`prompts`, `new`), one out (`seconds`, `tokens`), until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        tokens = answer(asked["prompts"], asked["new"])
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), file=answers)


if __name__ == "__main__":
    if sys.argv[1] in ("convert", "build"):
        {"convert": convert, "build": build}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        serve({"llama.cpp": llama_cpp, "genai": genai}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3])))
