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
    """The matrix products of a step alone, as often as an answer has steps behind its prompt; the tokens are zeros."""
    return _kernels_answers(bundle, threads, device, attention=False)


def kernels_answers(bundle: Path, threads: int, device: str) -> Any:
    """The matrix products and the attention of a step, over a cache as long as an answer's; no norms, no gate."""
    return _kernels_answers(bundle, threads, device, attention=True)


def _kernels_answers(bundle: Path, threads: int, device: str, *, attention: bool) -> Any:
    import onnx

    from llmctl.ort.lazy_zeros import zeros
    from llmctl.ort.sessions import open_session

    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    widths, caches = _keep_kernels(model, attention=attention)
    file = bundle / f"kernels-{attention}.onnx"  # beside the weights that it refers to
    onnx.save(model, file)
    session = open_session(file, device, threads)
    file.unlink()
    bound: dict[int, Any] = {}

    def bind(rows: int, capacity: int) -> Any:
        """Values of one width share memory, as activations do in a whole model; zeros, as denormal numbers are slow."""
        binding = session.io_binding()
        shared = {width: np.zeros((rows, 1, width), np.float32) for width in set(widths.values())}
        arrays: dict[str, np.ndarray] = {name: shared[width] for name, width in widths.items()}
        for name, sizes in caches.items():  # written, as pages of zeros that nobody wrote are one page
            arrays[name] = zeros((rows, *sizes[0], capacity, sizes[1]), np.float32)
            arrays[name][:] = 0.01
        if caches:
            arrays["last"], arrays["total"] = np.zeros(rows, np.int32), np.array(capacity, np.int32)
        inputs, outputs = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))
        for name in inputs:
            array = arrays[name]
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name in outputs:
            array = arrays[name.replace("present.", "past_key_values.")]
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return binding, arrays

    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        rows, read = len(prompts), len(prompts[0])
        if rows not in bound or new > 1:
            bound[rows] = bind(rows, read + new)
        binding, arrays = bound[rows]
        for step in range(new - 1):
            if caches:
                arrays["last"][:] = read + step
            session.run_with_iobinding(binding)
        return [[0] * new for _ in prompts]

    return answer


def _keep_kernels(model: Any, *, attention: bool) -> tuple[dict[str, int], dict[str, tuple[tuple[int, ...], int]]]:
    """Leave nothing in a bundle's graph but its products and, if asked for, its attention.

    Each reads what the one before it gives, where the width fits, else an input of the graph; what nobody reads is an
    output. Gives the widths of inputs and outputs, and of each cache tensor the sizes before and behind its tokens.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[Any] = []
    widths: dict[str, int] = {}
    last, reach = "", 0
    for node in graph.node:
        sizes = {item.name: item.i for item in node.attribute}
        if node.op_type == "GroupQueryAttention" and attention:
            inner = reach
            outer = inner * sizes["num_heads"] // (sizes["num_heads"] + 2 * sizes["kv_num_heads"])
            node.input[5], node.input[6] = "last", "total"
        elif node.op_type == "MatMulNBits":
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
    caches = [value for value in graph.input if attention and value.name.startswith("past_key_values.")]
    presents = [value for value in graph.output if attention and value.name.startswith("present.")]
    floats: dict[str, Any] = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 1, width])
        for name, width in widths.items()
    }
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.input.extend([value for name, value in floats.items() if name.startswith("of ")] + caches)
    graph.output.extend([value for name, value in floats.items() if not name.startswith("of ")] + presents)
    if caches:
        graph.input.append(helper.make_tensor_value_info("last", TensorProto.INT32, ["rows"]))
        graph.input.append(helper.make_tensor_value_info("total", TensorProto.INT32, []))
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    dims = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in caches}
    return widths, {name: ((sizes[1],), sizes[3]) for name, sizes in dims.items()}


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
    "kernels": kernels_answers,
    "optimum": optimum_answers,
    "transformers": transformers_answers,
}
