"""Attention weights of an exported graph: a copy in memory, in which what its operators can tell is an output.

GroupQueryAttention (`output_qk`) and the standard Attention (`qk_matmul_output`) give out the weights after the softmax
if they are asked to; in the graphs of other exporters they are what a Softmax computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from llmctl.errors import InputError
from llmctl.ort.bundle import DECODER, ENCODER, Bundle, read_bundle
from llmctl.ort.sessions import CPU
from llmctl_train_pretrain.inspection import Inspection, Stack

Feeds = dict[str, np.ndarray]
ASKED = {"GroupQueryAttention": ("qk_output", 2), "Attention": ("qk_matmul_output_mode", 3)}
"""By operator: the attribute and the value that ask for weights after the softmax, as the fourth output."""
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
STATES = "last_hidden_state"
QUIET = 3
"""ONNX Runtime says of each new output that its shape was not foreseen."""
UNNAMED = "The graph's operators do not give out attention: inspect the torch model that it was exported from."
NO_ONNX = "To see a graph's attention, pip install 'llmctl[optimum]', or inspect the torch model that it was made from."


def add_attention(found: Inspection, directory: Path) -> None:
    """Add the maps of the bundle that `found` was seen of, or say in `closed` why there are none."""
    try:
        ids, source = ([token.id for token in tokens] for tokens in (found.tokens, found.source))
        found.stacks = exported_stacks(read_bundle(directory), found.kind, ids, source)
        found.closed = "" if found.stacks else UNNAMED
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        found.closed = NO_ONNX
    except InputError as error:
        found.closed = f"The attention of this graph is not seen: {error.message}."


def exported_stacks(bundle: Bundle, kind: str, tokens: Sequence[int], source: Sequence[int]) -> list[Stack]:
    """The maps of every layer and head, computed on the CPU; empty where the operators give none out.

    `tokens`: what an encoder or a decoder reads; `source`: what the encoder of an encoder-decoder does.
    """
    if not bundle.has_pair:
        maps, _ = _run(bundle.model, tokens, {})
        return [_stack(kind, maps)] if maps else []
    encoder, states = _run(bundle.directory / ENCODER, source, {}, STATES)
    given = {"encoder_hidden_states": states, "encoder_attention_mask": np.ones((1, len(source)))}
    both, _ = _run(bundle.directory / DECODER, tokens, given)
    # Each layer looks at its own tokens, then at the source.
    return [_stack("encoder", encoder), _stack("decoder", both[0::2], both[1::2])] if encoder and both else []


def _stack(name: str, maps: list[np.ndarray], cross: Sequence[np.ndarray] = ()) -> Stack:
    return Stack(name, maps, list(cross), [], [], [])


def _run(path: Path, ids: Sequence[int], given: Mapping[str, np.ndarray], wanted: str = "") -> tuple[list[Any], Any]:
    """The weights `(H, T, S)` in the order of the layers, and the output called `wanted`."""
    session, names = _open(path)
    feeds = {value.name: _feed(path, value, ids, given) for value in session.get_inputs()}
    *found, other = session.run([*names, wanted or session.get_outputs()[0].name], feeds)
    maps = [weights[0].astype(np.float32) for weights in found if weights.ndim == 4 and weights.shape[2] == len(ids)]
    return maps, other


def _open(path: Path) -> tuple[ort.InferenceSession, list[str]]:
    """A session of the graph at `path` with further outputs, and their names."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    names: list[str] = []
    there = {output.name for output in model.graph.output}
    for node in model.graph.node:
        if node.op_type in ASKED:
            attribute, value = ASKED[node.op_type]
            outputs = [*node.output, "", "", ""][:3]
            del node.output[:]
            node.output.extend([*outputs, f"weights.{len(names)}"])
            node.attribute.append(onnx.helper.make_attribute(attribute, value))
        elif node.op_type != "Softmax":
            continue
        names.append(node.output[-1])
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    options = ort.SessionOptions()
    options.log_severity_level = QUIET
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return ort.InferenceSession(model.SerializeToString(), options, providers=[CPU]), names


def _feed(path: Path, value: Any, ids: Sequence[int], given: Mapping[str, np.ndarray]) -> np.ndarray:
    """What goes in under a name: the text alone, without padding and without a past."""
    name, shape = value.name, value.shape
    made: Feeds = {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, len(ids))),
        "position_ids": np.arange(len(ids))[None],
        "token_type_ids": np.zeros((1, len(ids))),
        **given,
    }
    if name in made and value.type in TYPES:
        return made[name].astype(TYPES[value.type])
    if name.startswith("past_key_values.") and value.type in TYPES and len(shape) == 4:
        heads, width = shape[1], shape[3]
        if isinstance(heads, int) and isinstance(width, int):
            return np.zeros((1, heads, 0, width), TYPES[value.type])
    raise InputError(f"{path} has an input {name} {shape}, which is not known", hint="export the model again")
