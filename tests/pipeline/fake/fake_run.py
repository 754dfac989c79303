from __future__ import annotations

import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

from llmctl import InputError, MachineError, StageError
from llmctl.errors import GateError, UsageError


def _write(directory, rows):
    name = "train-00000-of-00001.jsonl.gz"
    text = "".join(json.dumps({"id": str(i), "source": "x", "text": row}) + "\n" for i, row in enumerate(rows))
    (directory / name).write_bytes(gzip.compress(text.encode(), mtime=0))
    info = {"format": "dataset.text", "splits": {"train": {"rows": len(rows), "files": [name]}}}
    (directory / "dataset_info.json").write_text(json.dumps(info))


def _read(artifact):
    text = gzip.decompress((artifact / "train-00000-of-00001.jsonl.gz").read_bytes()).decode()
    return [json.loads(line)["text"] for line in text.splitlines()]


def make(ctx, params, files):
    rows = [file.path.read_text() for file in files or []]
    rows += [params.word.strip()] * params.rows
    _write(ctx.output("text"), rows)
    ctx.describe("text", documents=len(rows))
    ctx.report({"rows": len(rows)})


def upper(ctx, params, text):
    print("a stray print")
    ends = time.monotonic() + params.sleep
    while time.monotonic() < ends:
        ctx.progress(1, 10)
        time.sleep(0.02)
    _write(ctx.output("text"), [row.upper() + params.mark for row in _read(text)])
    ctx.report({"rows": len(_read(text))})


def score(ctx, params, text):
    ctx.report({params.name: params.score, "fine": True})


def count(ctx, params, text):
    state = ctx.resume_dir / "state.json"
    step, value = json.loads(state.read_text()) if state.exists() else (0, params.start)
    if step > params.max_steps:  # of a run that went further
        step, value = 0, params.start
    if step:
        ctx.log(f"continuing from step {step}")
    begun = step
    while step < params.max_steps:
        value, step = value * 31 % 1_000_003 + step, step + 1
        ctx.progress(step, params.max_steps, loss=1 / step)
        ctx.metric("loss", 1 / step, step)
        time.sleep(params.pause)
        ctx.resume_dir.mkdir(exist_ok=True)
        temporary = state.with_suffix(".tmp")
        temporary.write_text(json.dumps([step, value]))
        temporary.replace(state)
        if ctx.should_save():
            ctx.checkpointed(step)
        if ctx.should_stop():
            ctx.checkpointed(step)
            raise ctx.stopped(step)
    (ctx.output("result") / "value.json").write_text(json.dumps(value))
    ctx.report({"begun": begun, "steps": step})


def learn(ctx, params, text):
    file, step, value, seen = ctx.resume_dir / "state.safetensors", 0, 1.0, 0.0
    ctx.resume_dir.mkdir(exist_ok=True)
    if file.exists() and params.fault != "anew":
        data = file.read_bytes()
        step, value = int.from_bytes(data[-16:-8], "little"), struct.unpack("<d", data[-8:])[0]
    while step < params.max_steps:
        seen += params.fault == "memory"
        value, step = value * 1.1 + seen, step + 1
        ctx.progress(step, params.max_steps)
        shapes = {"step": ("I64", [0, 8]), "weight": ("F64", [8, 16])}
        header = json.dumps(
            {n: {"dtype": t, "shape": [], "data_offsets": at} for n, (t, at) in shapes.items()}
        ).encode()
        tensors = step.to_bytes(8, "little") + struct.pack("<d", value)
        file.write_bytes(len(header).to_bytes(8, "little") + header + tensors)
        if ctx.should_stop() and params.fault != "deaf":
            raise ctx.stopped(step)
    if params.fault == "blind":
        file.unlink()
        value = 0
    (ctx.output("result") / "value.json").write_text(json.dumps({"value": value, "tokens_per_s": time.monotonic()}))


def wrong(ctx, params):
    out = ctx.output("result")
    match params.how:
        case "raise":
            raise ValueError("what\n happened")
        case "stage":
            raise StageError("parity missed", hint="look at it")
        case "input":
            raise InputError("nothing in it")
        case "machine":
            raise MachineError("no GPU", hint="buy one")
        case "memory":
            raise MemoryError
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            sys.exit(0)
        case "nothing":
            return
        case "nan":
            (out / "value.json").write_text("NaN")
        case "symlink":
            (out / "link").symlink_to("/etc/passwd")
        case "fill":
            with (out / "big").open("wb") as file:
                for _ in range(params.size):
                    file.write(b"x" * (1 << 20))
        case "noise":
            os.write(1, b'{"type": "result"}\n' * 10)
            print("x" * 100_000)
            ctx.metric("odd", float("nan"), 1)
            (out / "fine").write_text("x")
        case "workers":
            worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            params.path.write_text(f"{os.getpid()} {worker.pid}")
            time.sleep(params.size)
            (out / "fine").write_text("x")
        case "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            params.path.write_text(str(os.getpid()))
            time.sleep(600)
        case "env":
            (out / "env.json").write_text(json.dumps(dict(os.environ)))
        case "where":
            (out / "path").write_text(str(Path.cwd()))


def flaky(ctx, params):
    with params.path.open("a") as file:
        file.write("x")
    attempt = len(params.path.read_text())
    (ctx.resume_dir).mkdir(exist_ok=True)
    state = ctx.resume_dir / "state"
    ctx.log(f"attempt {attempt} finds {state.read_text() if state.exists() else 'nothing'}")
    state.write_text(f"what {attempt} left")
    if attempt < params.good:
        match params.how:
            case "raise":
                raise ValueError("not yet")
            case "stage":
                raise StageError("not yet", hint="wait")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "input":
                raise InputError("not yet")
            case "machine":
                raise MachineError("not yet")
            case "usage":
                raise UsageError("not yet")
            case "gate":
                raise GateError("not yet")
            case "stopped":
                raise ctx.stopped(1)
    (ctx.output("result") / "attempt").write_text(str(attempt))


def leak(ctx, params):
    """Put the secret where `where` says; `everywhere` is all that a log or an event can hold."""
    secret = os.environ[params.variable]
    match params.where:
        case "everywhere":
            print("printed", secret, flush=True)
            os.write(2, b"in " + secret[:4].encode())
            time.sleep(0.05)
            os.write(2, secret[4:].encode() + b" pieces\n")
            print(json.dumps({"token": secret}), file=sys.stderr)
            ctx.log(f"logged {secret}")
            ctx.warn(f"warned {secret}")
            ctx.progress(1, 2, note=secret)
            ctx.metric(secret, 1.0)
            ctx.report({"told": secret})
            ctx.describe("result", about=secret)
            (ctx.output("result") / "fine").write_text("x")
        case "raise":
            raise ValueError(f"bad token {secret}")
        case "stage":
            raise StageError(f"refused {secret}", hint=f"not {secret}")
        case "file":
            (ctx.output("result") / "config.json").write_text(json.dumps({"token": secret}))
        case "compressed":
            (ctx.output("result") / "rows.jsonl.gz").write_bytes(gzip.compress(b"x" * 100 + secret.encode()))
        case "name":
            (ctx.output("result") / f"{secret}.txt").write_text("x")
        case "nothing":
            (ctx.output("result") / "fine").write_text(str(len(secret)))


def push(ctx, params, text):
    with Path(params.path).open("a") as file:
        file.write("pushed\n")
    (ctx.output("receipt") / "receipt.json").write_text(json.dumps({"n": len(_read(text))}))


def gang(ctx, params):
    rank, restart = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    ctx.log(f"rank {rank}")
    if rank == 1:
        match params.how:
            case "stage":
                raise StageError("what happened", hint="do better")
            case "bug":
                raise ValueError("what\n happened")
            case "die" if restart == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            case "die always":
                os.kill(os.getpid(), signal.SIGKILL)
        return
    if params.how in ("stage", "bug", "die always") or (params.how == "die" and restart == 0):
        time.sleep(60)
    while params.how == "wait":
        ctx.progress(1)
        ctx.resume_dir.mkdir(exist_ok=True)
        (ctx.resume_dir / "state.json").write_text(str(os.getpid()))
        if ctx.should_stop():
            raise ctx.stopped(1)
        time.sleep(0.02)
    seen = {name: value for name, value in os.environ.items() if name in ("WORLD_SIZE", "OMP_NUM_THREADS")}
    (ctx.output("result") / "env.json").write_text(json.dumps({**seen, "restart": restart}))
