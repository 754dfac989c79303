"""How fast a corpus is cleaned, per core, against datatrove's pipeline over the same documents; and memory as it grows.

    python -m venv peers && peers/bin/pip install 'datatrove[processing]==0.9.0' py3langid ftfy
    python -P benchmarks/data.py --peer peers/bin/python [--megabytes 8] [--rounds 3]
    python -P benchmarks/data.py --memory 100 1000 [--workers 2]
    python -P benchmarks/data.py --steps

Documents are prose out of /usr/share/doc (text, packed or not), Python's reference and the docstrings of its library
and of numpy, scipy, torch, transformers, cut at paragraphs to 1 to 6 kB; one in ten comes twice, the second time with a
few words changed. Both sides read JSONL and do: Unicode repair (ftfy), language (py3langid, the same 2,000
characters), the rules of Gopher (repetition, quality), C4 and FineWeb, e-mail and IP addresses, near-duplicates by
MinHash over 5-grams (128 hash functions in 16 bands), and write gzipped JSONL. Each is one process on one core, and its
time is from the first byte read to the last written, imports and models left aside. datatrove runs twice: with the
regular expression that llmctl takes for words, and with its own (spaCy).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import inspect
import json
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

STEPS: list[dict[str, Any]] = [
    {"name": "unicode"},
    {"name": "language"},
    {"name": "quality", "rules": ["gopher-repetition", "gopher-quality", "c4", "fineweb"]},
    {"name": "pii", "action": "keep", "email": "redact", "ip_address": "redact", "hashes": False},
    {"name": "near-duplicates"},
]
SIGNS = re.compile(r"[^\w\s]+")
PEER = Path(__file__).parent / "peers" / "datatrove_pipeline.py"


def documents() -> Iterator[str]:
    """Real prose, 1 to 6 kB each, in a fixed order; change logs, tables and listings are most of a system otherwise."""
    return filter(is_prose, pieces())


def is_prose(text: str) -> bool:
    """Whether it is letters and blanks for the most part, in lines that end sentences."""
    plain = sum(character.isalpha() or character.isspace() for character in text)
    ends = sum(line.rstrip().endswith((".", "?", "!")) for line in text.split("\n"))
    return plain >= 0.88 * len(text) and ends >= 6 and len(SIGNS.findall(text)) < 0.2 * len(text.split())


def pieces() -> Iterator[str]:
    """All texts, cut at paragraphs."""
    for text in _texts():
        held: list[str] = []
        size = 0
        for paragraph in text.split("\n\n"):
            held.append(paragraph)
            size += len(paragraph) + 2
            if size >= 3000:
                yield "\n\n".join(held)[:6000]
                held, size = [], 0
        if size >= 1000:
            yield "\n\n".join(held)


def _texts() -> Iterator[str]:
    yield from (topics[name] for name in sorted(topics))
    library = Path(os.__file__).parent
    installed = (Path(sysconfig.get_path("purelib")) / name for name in ("numpy", "scipy", "torch", "transformers"))
    for root in (library, *installed):
        for path in sorted(root.rglob("*.py")):
            if root != library or "site-packages" not in path.parts:
                parts = path.read_text(encoding="utf-8", errors="replace").split('"""')
                yield "\n\n".join(inspect.cleandoc(part) for part in parts[1::2])
    seen = set()
    for path in sorted(Path("/usr/share/doc").rglob("*")):
        if not path.is_file() or path.suffix not in ("", ".gz", ".txt", ".md", ".rst", ".html"):
            continue
        try:
            data = path.read_bytes()[: 2 << 20]
            data = gzip.decompress(data) if path.suffix == ".gz" else data
        except (OSError, EOFError):  # an archive of more than 2 MiB
            continue
        if b"\0" in data or (digest := hashlib.sha256(data).digest()) in seen:
            continue
        seen.add(digest)
        yield data.decode("utf-8", "replace")


def write_corpus(path: Path, size: int, seed: int = 0) -> int:
    """About `size` bytes of JSONL, and how many documents; more than there is are made by mixing paragraphs."""
    rng = random.Random(seed)
    written = count = 0
    real: list[str] = []
    with path.open("w", encoding="utf-8") as file:

        def put(text: str) -> None:
            nonlocal written, count
            line = json.dumps({"text": text, "id": f"d{count}"}, ensure_ascii=False) + "\n"
            file.write(line)
            written += len(line.encode())
            count += 1

        for text in documents():
            real.append(text)
        rng.shuffle(real)
        for text in real:
            if written >= size:
                break
            put(text)
            if rng.random() < 0.1:
                put(_near(text, rng))
        pool = [part for text in real for part in text.split("\n\n") if len(part) > 80]
        while written < size:
            put("\n\n".join(rng.choice(pool) for _ in range(6)))
    return count


def _near(text: str, rng: random.Random) -> str:
    """The text with about one word in a hundred changed."""
    lines = [line.split(" ") for line in text.split("\n")]
    for line in lines:
        for place, word in enumerate(line):
            if word.isalpha() and rng.random() < 0.01:
                line[place] = word[::-1]
    return "\n".join(" ".join(line) for line in lines)


def ours(corpus: Path, workers: int, task_bytes: int) -> dict[str, Any]:
    """Run the stage here; {seconds, kept, dropped}."""
    from llmctl import Artifact
    from llmctl.testing import run_stage
    from llmctl_data import DATA, run, tasks

    assert run  # what a run imports, so that it is not timed
    for told in STEPS:
        tasks.build_step(told, 0)
    out = Path(tempfile.mkdtemp(dir=corpus.parent))
    params = {"emit": ["text"], "validation_share": 0.0, "workers": workers, "steps": STEPS, "task_bytes": task_bytes}
    start, begun = time.perf_counter(), time.process_time()
    result = run_stage(DATA, out, params, files=[Artifact(corpus, "files")])
    seconds, cpu = time.perf_counter() - start, time.process_time() - begun
    audit = json.loads((result.outputs["text"].path / "audit.json").read_text())
    shutil.rmtree(out)
    dropped = {f"{step['name']}: {why}": count for step in audit["steps"] for why, count in step["dropped"].items()}
    return {"seconds": seconds, "cpu": cpu, "kept": audit["kept"]["documents"], "dropped": dropped}


def child(*words: str) -> dict[str, Any]:
    """Run one side in a process of its own on one core; what it says."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def compare(peer: str, size: int, rounds: int, spacy: bool, kept: Path | None) -> None:
    """Interleaved rounds; medians."""
    with tempfile.TemporaryDirectory() as made:
        corpus = Path(made) / "corpus.jsonl"
        if kept is not None and kept.exists():
            shutil.copy(kept, corpus)
        else:
            write_corpus(corpus, size)
            if kept is not None:
                shutil.copy(corpus, kept)
        with corpus.open("rb") as lines:
            count = sum(1 for _ in lines)
        megabytes = corpus.stat().st_size / 1e6
        print(f"{count:,} documents, {megabytes:.1f} MB", flush=True)
        sides = {"llmctl": [sys.executable, "-P", __file__, "--side", str(corpus)]}
        sides["datatrove, same words"] = [peer, str(PEER), str(corpus), "regex"]
        if spacy:
            sides["datatrove, spaCy"] = [peer, str(PEER), str(corpus), "spacy"]
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for number in range(rounds):
            for name, words in sides.items():
                if name.endswith("spaCy") and number:
                    continue  # many times slower; once is enough
                found[name].append(child("taskset", "-c", "0", *words))
        for name, told in found.items():
            wall, cpu = (statistics.median(one[what] for one in told) for what in ("seconds", "cpu"))
            ratio = cpu / statistics.median(one["cpu"] for one in found["llmctl"])
            each = ", ".join(f"{one['cpu']:.2f}" for one in told)
            print(
                f"{name:22} {wall:7.2f} s  CPU {cpu:6.2f} s  {megabytes / cpu:5.2f} MB per CPU second  {ratio:5.2f}x",
                end="",
            )
            print(f"  kept {told[0]['kept']:,}  [{each}]\n    {told[0]['dropped']}", flush=True)


def memory(sizes: list[int], workers: int) -> None:
    """Largest resident memory of any process, per size of the corpus."""
    for size in sizes:
        with tempfile.TemporaryDirectory() as made:
            corpus = Path(made) / "corpus.jsonl"
            count = write_corpus(corpus, size * 1_000_000)
            words = [
                sys.executable,
                __file__,
                "--side",
                str(corpus),
                "--workers",
                str(workers),
                "--task",
                str(16 << 20),
            ]
            told = child(*words)
            print(
                f"{size:6} MB, {count:,} documents: {told['seconds']:.0f} s, stage {told['rss_self'] >> 10} MiB, "
                f"largest worker {told['rss_workers'] >> 10} MiB, kept {told['kept']:,}",
                flush=True,
            )


def profile(size: int) -> None:
    """MB/s of each step alone."""
    from llmctl.text.documents import Document
    from llmctl_data.tasks import build_step

    with tempfile.TemporaryDirectory() as made:
        corpus = Path(made) / "corpus.jsonl"
        write_corpus(corpus, size)
        rows = [json.loads(line) for line in corpus.read_text().splitlines()]
        items = [Document(row["id"], "x", row["text"]) for row in rows]
    megabytes = sum(len(item.text.encode()) for item in items) / 1e6
    whole = [*STEPS, {"name": "pii"}, *({"name": "quality", "rules": [one]} for one in STEPS[2]["rules"])]
    for told in whole:
        step: Any = build_step(told, 0)
        act = step if callable(step) else step.signatures
        for item in items[:20]:
            act(item)
        start = time.perf_counter()
        for item in items:
            act(item)
        print(f"{told!s:90.90} {megabytes / (time.perf_counter() - start):6.1f} MB/s")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="the Python that has datatrove")
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-spacy", action="store_true", help="leave out datatrove with its own words")
    parser.add_argument("--corpus", type=Path, help="kept there, and taken from there the next time")
    parser.add_argument("--memory", type=int, nargs="+", metavar="MB")
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--task", type=int, default=64 << 20, help=argparse.SUPPRESS)
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    size = int(told.megabytes * 1e6)
    if told.side:
        found = ours(told.side, told.workers, told.task)
        found["rss_self"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["rss_workers"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        print(json.dumps(found))
    elif told.memory:
        memory(told.memory, told.workers)
    elif told.steps:
        profile(size)
    else:
        compare(told.peer or sys.exit("--peer is missing"), size, told.rounds, not told.no_spacy, told.corpus)


if __name__ == "__main__":
    main()
