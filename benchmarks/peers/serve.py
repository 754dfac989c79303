"""Be onnxruntime-genai's engine in `benchmarks/serve.py`, or write what llama.cpp's server needs.

Run by the interpreter of the peers' environment: `pip install gguf safetensors onnxruntime-genai==0.18.0
'llama-cpp-python[server]==0.3.36'`. `serve.py convert HF TARGET` writes `fp32.gguf` with a vocabulary in which every
token is one character; `serve.py genai BUNDLE THREADS` answers, many prompts side by side.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

DECODE = runpy.run_path(str(Path(__file__).parent / "decode.py"))
FIRST = 0x4E00
"""The character of token 0; all from here on are letters."""
SIDE_BY_SIDE = 16


def convert(source: Path, target: Path) -> None:
    """The float32 file of `decode.py convert`, with a vocabulary."""
    import gguf

    config = json.loads((source / "config.json").read_text())
    good = gguf.GGUFWriter.add_tokenizer_model

    def with_vocabulary(writer: Any, _: str) -> None:
        size = config["vocab_size"]
        good(writer, "llama")
        writer.add_token_list([chr(FIRST + token).encode() for token in range(size)])
        writer.add_token_scores([0.0] * size)
        writer.add_token_types([1] * size)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(1)
        writer.add_add_bos_token(False)
        writer.add_add_space_prefix(False)

    gguf.GGUFWriter.add_tokenizer_model = with_vocabulary  # type: ignore[method-assign]
    DECODE["convert"](source, target)
    (target / "int4.gguf").unlink()


def genai(bundle: Path, threads: int) -> Any:
    """Its engine, over one of our bundles; its paged cache needs another graph, so a batch is of one kind."""
    import onnxruntime_genai as og

    config = og.Config(str(bundle))
    options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    config.overlay(json.dumps({**options, "engine": {"static_batching": {"max_batch_size": SIDE_BY_SIDE}}}))
    engine = og.Engine(og.Model(config))
    buffer = engine.create_event_buffer(4 * SIDE_BY_SIDE)

    def begin(prompt: list[int], new: int) -> Any:
        request = engine.create_request()
        turn = og.TurnOptions(request)
        turn.set_max_generated_tokens(new)
        turn.set_min_generated_tokens(new)
        turn.set_do_sample(False)
        request.begin_turn(np.asarray(prompt, np.int32), turn)
        return request

    def answer(prompts: list[list[int]], new: int, due: list[float]) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens, and the seconds after the begin at which they came; no prompt is looked at before it is due."""
        start = time.perf_counter()
        said: list[list[int]] = [[] for _ in prompts]
        times: list[list[float]] = [[] for _ in prompts]
        waiting, running = list(enumerate(prompts)), {}
        while waiting or running:
            while waiting and len(running) < SIDE_BY_SIDE and due[waiting[0][0]] <= time.perf_counter() - start:
                number, prompt = waiting.pop(0)
                request = begin(prompt, new)
                running[id(request)] = (number, request)
            if not running:
                time.sleep(max(0.0, due[waiting[0][0]] - (time.perf_counter() - start)))
                continue
            for event in engine.run(buffer) or ():
                number, request = running[id(event.request)]
                if int(event.flags) & int(og.EngineEventFlags.FAILED.value):
                    raise SystemExit(f"genai's engine failed: {event.error_code}")
                if int(event.flags) & int(og.EngineEventFlags.TOKEN.value):
                    said[number].append(int(event.token))
                    times[number].append(time.perf_counter() - start)
                if int(event.flags) & int(og.EngineEventFlags.TURN_FINISHED.value):
                    del running[id(request)]
                    request.close()
        return said, times

    return answer


def serve(answer: Any) -> None:
    """As `decode.py` does, with `due` in and `times` out, seconds after the begin; without `due` all are due then."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        tokens, times = answer(asked["prompts"], asked["new"], asked.get("due") or [0.0] * len(asked["prompts"]))
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens, "times": times}), file=answers)


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        serve(genai(Path(sys.argv[2]), int(sys.argv[3])))
