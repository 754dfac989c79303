"""The sides of `benchmarks/decode.py` that run in our own environment.

Each takes a directory, a number of threads and a device, and gives a function from prompts and the length of the
answers to the answers' tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def llmctl_answers(bundle: Path, threads: int, device: str) -> Any:
    """Our engine."""
    from llmctl.generator import Sampling
    from llmctl.ort import open_bundle

    generator = open_bundle(bundle, device, threads)
    generator.eos_ids = frozenset()

    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        sampling = Sampling(max_new_tokens=new)
        if len(prompts) == 1:
            return [list(generator.stream(prompts[0], sampling))]
        return generator.generate(prompts, sampling)

    return answer


def transformers_answers(directory: Path, threads: int, device: str) -> Any:
    """`generate` of transformers in torch, in float16."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float16)
    model = loaded.to(device).eval()

    @torch.inference_mode()
    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=device)
        made = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return made[:, len(prompts[0]) :].tolist()  # type: ignore[no-any-return]

    return answer


def products_answers(bundle: Path, threads: int, device: str) -> Any:
    """The matrix products of a step alone; tokens are zeros."""
    import onnx

    from llmctl.ort.sessions import open_session

    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    widths = _keep_products(model)
    file = bundle / "products.onnx"  # beside the weights that it refers to
    onnx.save(model, file)
    session = open_session(file, device, threads)
    file.unlink()

    def bind(rows: int) -> tuple[Any, dict[str, np.ndarray]]:
        """Values of one width share memory, as activations do in a whole model; zeros, as denormal numbers are slow."""
        shared = {width: np.zeros((rows, 1, width), np.float32) for width in set(widths.values())}
        return _bind(session, {name: shared[width] for name, width in widths.items()})

    return _repeat(session, bind)


def two_tokens_answers(bundle: Path, threads: int, device: str) -> Any:
    """A whole step, bound once, over a cache of two tokens: all that a step does but read the cache; tokens are zeros.

    A step of the same graph is no faster however fast its cache is read. What attention does besides, to turn queries
    and keys to their positions and to store, is in it, so that another operator for attention might take less.
    """
    from llmctl.ort.sessions import open_session

    session = open_session(bundle / "model.onnx", device, threads)

    def bind(rows: int) -> tuple[Any, dict[str, np.ndarray]]:
        known = {
            "input_ids": np.ones((rows, 1), np.int64),
            "attention_mask": np.ones((rows, 2), np.int64),
            "num_logits_to_keep": np.ones(1, np.int64),
        }
        arrays: dict[str, np.ndarray] = {}
        for value in session.get_inputs():
            if value.name in known:
                arrays[value.name] = known[value.name]
            else:
                kind = np.int8 if "int8" in value.type else np.float32
                arrays[value.name] = np.zeros((rows, value.shape[1], 2, value.shape[3]), kind)
        for value in session.get_outputs():
            past = value.name.replace("present.", "past_key_values.")
            arrays[value.name] = arrays[past] if past in arrays else np.zeros((rows, 1, value.shape[2]), np.float32)
        return _bind(session, arrays)

    return _repeat(session, bind)


def _bind(session: Any, arrays: dict[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
    """A binding of the session's inputs and outputs, and the arrays, which it does not keep alive."""
    binding = session.io_binding()
    for values, bind in ((session.get_inputs(), binding.bind_input), (session.get_outputs(), binding.bind_output)):
        for value in values:
            array = arrays[value.name]
            bind(value.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    return binding, arrays


def _repeat(session: Any, bind: Any) -> Any:
    """Answers of zeros: one call of `session` for each step, with a binding for each batch.

    A prompt is some steps, too, as the others' prompts wake threads and fill caches before time counts.
    """
    bound: dict[int, Any] = {}

    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        rows = len(prompts)
        if rows not in bound:
            bound[rows] = bind(rows)
        binding, _ = bound[rows]
        for _ in range(len(prompts[0]) // 4 + new - 1):
            session.run_with_iobinding(binding)
        return [[0] * new for _ in prompts]

    return answer


def _keep_products(model: Any) -> dict[str, int]:
    """Leave nothing in a bundle's graph but its products.

    Each reads what the one before it gives, where the width fits, else an input of the graph; what nobody reads is an
    output. Gives the widths of inputs and outputs.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[Any] = []
    widths: dict[str, int] = {}
    last, reach = "", 0
    for node in graph.node:
        sizes = {item.name: item.i for item in node.attribute}
        if node.op_type == "MatMulNBits":
            inner, outer = sizes["K"], sizes["N"]
        elif node.op_type in ("MatMul", "FusedMatMul") and node.input[1] in stored:
            inner, outer = stored[node.input[1]].dims[:: -1 if sizes.get("transB") else 1]
        else:
            continue
        fits = bool(nodes) and reach == inner
        if fits:
            del widths[last]
        node.input[0], node.output[0] = last if fits else f"of {inner}", f"given {len(nodes)}"
        last, reach = node.output[0], outer
        widths[last] = outer
        if not fits:
            widths[node.input[0]] = inner
        nodes.append(node)
    floats: dict[str, Any] = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 1, width])
        for name, width in widths.items()
    }
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.input.extend([value for name, value in floats.items() if name.startswith("of ")])
    graph.output.extend([value for name, value in floats.items() if not name.startswith("of ")])
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return widths


def optimum_answers(directory: Path, threads: int, device: str) -> Any:
    """`ORTModelForCausalLM.generate` with its KV cache and I/O binding, as it is by default."""
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    torch.set_num_threads(threads)
    model = ORTModelForCausalLM.from_pretrained(directory, session_options=options, provider="CPUExecutionProvider")

    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        made: Any = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return made[:, len(prompts[0]) :].tolist()  # type: ignore[no-any-return]

    return answer


SIDES = {
    "llmctl": llmctl_answers,
    "products": products_answers,
    "two tokens": two_tokens_answers,
    "optimum": optimum_answers,
    "transformers": transformers_answers,
}
