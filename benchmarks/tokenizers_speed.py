"""How fast tokenizers are trained and token shards written, against the bare `tokenizers` library on the same texts.

    python benchmarks/tokenizers_speed.py [--megabytes 24] [--vocab 4096] [--rounds 3] [--workers N]

Training: `llmctl_tokenize.training` against a `BpeTrainer` fed with the same iterator. Shards: the stage as a whole
(rows read from JSON Lines, encoded, framed, counted, written) against `encode_batch` of texts that lie in memory,
ids not even looked at. Rounds are interleaved, medians are shown. Also the peak memory of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, trainers

from llmctl import Artifact
from llmctl.testing import run_stage
from llmctl.text.datasets import DatasetWriter
from llmctl_tokenize import TOKENIZE, encoding, training
from llmctl_tokenize.params import TokenizeParams
from llmctl_tokenize.special import SPECIAL

LIBRARY = Path(json.__file__).parent.parent


def corpus(megabytes: float) -> list[str]:
    """Sources of the standard library, repeated under other names up to the size that is asked for."""
    files = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(LIBRARY.glob("*.py"))]
    texts: list[str] = []
    size = number = 0
    while size < megabytes * 1e6:
        text = files[number % len(files)].replace("self", f"self{number // len(files)}")
        texts.append(text)
        size += len(text)
        number += 1
    return texts


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def compare(what: str, size: float, rounds: int, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    """Interleaved rounds of both, the medians and their ratio."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(
        f"{what:10} llmctl {size / mine:8.2f} MB/s   tokenizers {size / other:8.2f} MB/s   ratio {ratio:.3f}",
        flush=True,
    )


def main() -> None:
    """Parse the command line and print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int)
    options = parser.parse_args()
    texts = corpus(options.megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    params = TokenizeParams(vocab_size=options.vocab)

    def library() -> None:
        bare = Library(models.BPE())
        bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=options.vocab, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=list(SPECIAL["gpt"].tokens), show_progress=False,
        )  # fmt: skip
        bare.train_from_iterator(iter(texts), trainer)

    compare("train", size, options.rounds, lambda: training.train(lambda: iter(texts), params, SPECIAL["gpt"]), library)
    with tempfile.TemporaryDirectory(prefix="llmctl-tokenize-") as directory:
        root = Path(directory)
        with DatasetWriter(root / "text", "dataset.text", ("train", "validation")) as writer:
            for number, text in enumerate(texts):
                writer.add("train", {"id": str(number), "source": "s", "text": text})
        text = Artifact(root / "text", "dataset.text")
        made = run_stage(TOKENIZE, root / "made", {"vocab_size": options.vocab, "emit": "tokenizer"}, text=text)
        tokenizer = made.outputs["tokenizer"]
        bare = Library.from_file(str(tokenizer.path / "tokenizer.json"))
        batches = [[text for _, text in batch] for batch in encoding.batches(("s", text) for text in texts)]
        count = iter(range(10_000))
        settings = {"emit": "tokens", **({} if options.workers is None else {"workers": options.workers})}
        compare(
            "shards",
            size,
            options.rounds,
            lambda: run_stage(TOKENIZE, root / f"s{next(count)}", settings, text=text, tokenizer=tokenizer),
            lambda: [bare.encode_batch(batch, add_special_tokens=False) for batch in batches],
        )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB, the texts included")


if __name__ == "__main__":
    main()
