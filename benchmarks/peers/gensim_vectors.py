"""What gensim 4.4 says of vectors in word2vec's text format: recorded beside them, for tests that run without it.

Run where gensim is installed: `python benchmarks/peers/gensim_vectors.py tests/plugins/embed/gensim`; the folder holds
`vectors.txt`, `questions.txt` and `pairs.tsv`, and gets `said.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gensim.models import KeyedVectors


def main(folder: Path) -> None:
    """Write `said.json`."""
    vectors = KeyedVectors.load_word2vec_format(str(folder / "vectors.txt"))
    said: dict[str, object] = {
        "words": vectors.index_to_key,
        "first": [float(value) for value in vectors.vectors[0]],
        "sum": float(vectors.vectors.astype("float64").sum()),
        "neighbours": {word: vectors.most_similar(word, topn=5) for word in vectors.index_to_key[:20]},
        "3cosadd": vectors.most_similar(positive=["w1x1", "w2x0"], negative=["w1x0"], topn=5),
        "3cosmul": vectors.most_similar_cosmul(positive=["w1x1", "w2x0"], negative=["w1x0"], topn=5),
    }
    for name in ("most_similar", "most_similar_cosmul"):
        for most in (300_000, 60):
            _, sections = vectors.evaluate_word_analogies(
                str(folder / "questions.txt"), similarity_function=name, restrict_vocab=most
            )
            counts = {s["section"]: [len(s["correct"]), len(s["correct"]) + len(s["incorrect"])] for s in sections}
            said[f"{name} {most}"] = counts
    pearson, spearman, unknown = vectors.evaluate_word_pairs(str(folder / "pairs.tsv"))
    said["pairs"] = {"pearson": pearson[0], "spearman": spearman[0], "unknown": unknown}
    (folder / "said.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
