"""What the engine adds to the calls of ONNX Runtime: a step of it against a bare bound call on the same session.

The bare loop is the least that decodes at all: a binding made once, the ids and the mask's length written, the call,
an argmax. Both sides decode the same sequences greedily from the same prompt; their steps take turns, one by one, so
that what else the machine does falls on both. Printed is the ratio of the medians, and the time that the engine adds.

    python benchmarks/engine_overhead.py exports/quickstart --batch 1 16 --threads 2
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llmctl.engine import EngineOptions, Request
from llmctl.generator import Sampling
from llmctl.ort import OrtGenerator, open_bundle
from llmctl.ort.cache_memory import HostMemory

PROMPT = 64


def bare(generator: OrtGenerator, prompts: list[list[int]], room: int) -> Callable[[], np.ndarray]:
    """Prefill by bare calls; a function that makes one step of all rows and returns their tokens."""
    session, layout, batch = generator.session, generator.layout, len(prompts)
    memory = HostMemory(layout, batch, room)
    binding = session.io_binding()
    length = len(prompts[0])
    logits = np.empty((batch, length, layout.vocab_size), np.float32)
    mask = np.ones(batch * room, np.int64)

    def bind(ids: np.ndarray) -> None:
        count = ids.shape[1]
        shape = (batch, layout.kv_heads, room, layout.head_dim)
        binding.bind_input("input_ids", "cpu", 0, np.int64, ids.shape, ids.ctypes.data)
        for past, present, address in zip(layout.past, layout.present, memory.addresses(0), strict=True):
            binding.bind_input(past, "cpu", 0, layout.cache_dtype, shape, address)
            binding.bind_output(present, "cpu", 0, layout.cache_dtype, shape, address)
        binding.bind_output("logits", "cpu", 0, np.float32, (batch, count, layout.vocab_size), logits.ctypes.data)

    def run(length: int) -> None:
        binding.bind_input("attention_mask", "cpu", 0, np.int64, (batch, length), mask.ctypes.data)
        session.run_with_iobinding(binding)

    prefill = np.array(prompts, np.int64)
    bind(prefill)
    run(length)
    ids = logits[:, -1].argmax(axis=1)[:, None]
    bind(ids)
    last = logits.reshape(-1)[: batch * layout.vocab_size].reshape(batch, layout.vocab_size)

    def step(_kept: HostMemory = memory) -> np.ndarray:  # the binding knows addresses alone and keeps no array alive
        nonlocal length
        length += 1
        run(length)
        ids[:, 0] = last.argmax(axis=1)
        return ids[:, 0]

    return step


def measure(generator: OrtGenerator, batch: int, steps: int) -> dict[str, float]:
    """Median seconds of a step, bare and of the engine, and their ratio."""
    random = np.random.default_rng(0)
    prompts = random.integers(3, generator.vocab_size, (batch, PROMPT)).tolist()
    room = PROMPT + steps + batch + 8
    engine = generator.engine(EngineOptions(slots=batch, context=room, prefill_tokens=PROMPT))
    sampling = Sampling(max_new_tokens=steps + 8)
    for prompt in prompts:
        engine.submit(Request(prompt=prompt, sampling=sampling))
    while engine.stats().running < batch:
        engine.step()
    # Its requests have joined one by one, so that its rows are longer than their prompts by this much on average.
    ahead = random.integers(3, generator.vocab_size, (batch, batch // 2)).tolist()
    plain = bare(generator, [prompt + more for prompt, more in zip(prompts, ahead, strict=True)], room)
    for _ in range(3):  # what is made at the first call
        plain(), engine.step()
    times: dict[str, list[float]] = {"bare": [], "engine": []}
    for i in range(steps - batch):  # the first answers are some tokens ahead of the last
        sides = [("bare", plain), ("engine", engine.step)]
        for name, step in sides if i % 2 else sides[::-1]:
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    assert engine.stats().running == batch, "every step should have been one of all rows"
    engine.close()
    return {
        "bare_ms": 1e3 * statistics.median(times["bare"]),
        "engine_ms": 1e3 * statistics.median(times["engine"]),
        "ratio": statistics.median(b / a for a, b in zip(times["bare"], times["engine"], strict=True)),
    }


def main() -> None:
    """Print a table, then the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="an ONNX bundle of a decoder")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    generator = open_bundle(args.bundle, "cpu", args.threads)
    generator.eos_ids = frozenset()  # every answer goes on to its limit
    found = {batch: measure(generator, batch, args.steps) for batch in args.batch}
    for batch, one in found.items():
        print(
            f"batch {batch:3}: bare {one['bare_ms']:8.3f} ms, engine {one['engine_ms']:8.3f} ms, "
            f"ratio {one['ratio']:.3f}"
        )
    print(json.dumps({"benchmark": "engine_overhead", "machine": platform.machine(), "steps": found}))


if __name__ == "__main__":
    main()
