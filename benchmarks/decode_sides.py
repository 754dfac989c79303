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
    import onnx
    from onnx import helper

    from llmctl.ort.sessions import open_session

    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[Any] = []
    widths: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type not in ("MatMulNBits", "MatMul", "FusedMatMul") or node.input[1] not in stored:
            continue
        sizes = {item.name: item.i for item in node.attribute}
        shape = stored[node.input[1]].dims[:: -1 if sizes.get("transB") else 1]
        inner, outer = (sizes["K"], sizes["N"]) if node.op_type == "MatMulNBits" else shape
        node.input[0], node.output[0] = f"of {inner}", f"product {len(nodes)}"
        widths[node.input[0]], widths[node.output[0]] = inner, outer
        nodes.append(node)
    values = {
        name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", width])
        for name, width in widths.items()
    }
    del model.graph.node[:], model.graph.input[:], model.graph.output[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    model.graph.input.extend(value for name, value in values.items() if name.startswith("of"))
    model.graph.output.extend(value for name, value in values.items() if name.startswith("product"))
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    file = bundle / "products.onnx"  # beside the weights that it refers to
    onnx.save(model, file)
    session = open_session(file, device, threads)
    file.unlink()
    bound: dict[int, Any] = {}

    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        if len(prompts) not in bound:
            binding = session.io_binding()
            arrays = {name: np.ones((len(prompts), width), np.float32) for name, width in widths.items()}
            for name, array in arrays.items():
                bind = binding.bind_input if name.startswith("of") else binding.bind_output
                bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
            bound[len(prompts)] = binding, arrays
        for _ in range(new - 1):
            session.run_with_iobinding(bound[len(prompts)][0])
        return [[0] * new for _ in prompts]

    return answer


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
    "optimum": optimum_answers,
    "transformers": transformers_answers,
}
