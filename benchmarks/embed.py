"""word2vec beside gensim on one core: words per second of CPU time, on the same made-up text of Zipf's law.

    python benchmarks/embed.py --peer PATH_TO_PYTHON_WITH_GENSIM

Runs take turns; the ratio is that of medians. Vocabulary, dimension, window, negatives and thinning out are the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEER = """
import json, sys, time
from gensim.models import Word2Vec
path, sg, size, window = sys.argv[1], *map(int, sys.argv[2:])
with open(path) as file:
    text = [line.split() for line in file]
model = Word2Vec(vector_size=size, window=window, sg=sg, workers=1, seed=1, min_count=5, sample=1e-3)
model.build_vocab(text)
began = time.process_time()
model.train(text, total_examples=len(text), epochs=1)
print(json.dumps(sum(map(len, text)) / (time.process_time() - began)))
"""


def write_text(path: Path, words: int, vocabulary: int) -> None:
    """`words` words in lines of 20, the r-th most frequent with a share of about 1 / r."""
    import numpy as np

    shares = 1 / np.arange(1, vocabulary + 1)
    drawn = np.random.default_rng(0).choice(vocabulary, words, p=shares / shares.sum())
    lines = [" ".join(f"w{word}" for word in drawn[i : i + 20]) for i in range(0, words, 20)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def ours(path: Path, architecture: str, size: int, window: int) -> float:
    """Words per second of CPU time of this process, counting left out, as with gensim."""
    import torch

    from llmctl_embed import corpus, word2vec
    from llmctl_embed.params import EmbedParams

    torch.set_num_threads(1)
    params = EmbedParams(architecture=architecture, vector_size=size, window=window, split_words="whitespace")
    lines = path.read_text(encoding="utf-8").splitlines()
    built = corpus.build(corpus.sentences(lines, params), params.min_count, None, path)
    began = time.process_time()
    word2vec.train(built, params, 1, 0.025, lambda done, total, loss: None)
    return sum(len(line.split()) for line in lines) / (time.process_time() - began)


def main() -> None:
    """Measure, print a table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", default=sys.executable, help="a Python that has gensim")
    parser.add_argument("--words", type=int, default=300_000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        write_text(path, given.words, 20_000)
        for architecture, size, window in (("skip-gram", 100, 5), ("cbow", 100, 5), ("skip-gram", 32, 2)):
            rates: dict[str, list[float]] = {"ours": [], "gensim": []}
            for _ in range(given.rounds):
                rates["ours"].append(ours(path, architecture, size, window))
                command = [given.peer, "-c", PEER, str(path), str(int(architecture == "skip-gram")), str(size)]
                done = subprocess.run([*command, str(window)], check=True, capture_output=True, text=True)
                rates["gensim"].append(json.loads(done.stdout))
            mine, theirs = (statistics.median(rates[name]) for name in ("ours", "gensim"))
            print(
                f"{architecture:10} size {size:3} window {window}: ours {mine:9,.0f}, gensim {theirs:9,.0f} words per "
                f"CPU second, ratio {mine / theirs:.2f}"
            )


if __name__ == "__main__":
    main()
