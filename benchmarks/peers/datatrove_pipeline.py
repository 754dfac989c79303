"""The pipeline of datatrove for benchmarks/data.py: `python datatrove_pipeline.py CORPUS regex|spacy`.

Prints {seconds, cpu, kept, dropped}. LocalPipelineExecutor does everything with one worker, as datatrove's own example
for MinHash (examples/minhash_deduplication.py) has it: signatures, buckets, clusters, filter.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ftfy
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LambdaFilter,
)
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.logging import logger
from datatrove_decisions import tokenizer
from py3langid.langid import MODEL_FILE, LanguageIdentifier

IDENTIFIER = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
SAMPLE = 2000


def repaired(document: Document) -> bool:
    """Unicode repair, as a filter that keeps everything."""
    if not document.text.isascii():
        document.text = ftfy.fix_encoding(document.text)
    return True


def identified(document: Document) -> bool:
    """The language of the middle of the text (its own identifier's model cannot be had without a network)."""
    text = document.text
    if len(text) > SAMPLE:
        start = (len(text) - SAMPLE) // 2
        text = text[start : start + SAMPLE]
    language, confidence = IDENTIFIER.classify(text)
    document.metadata |= {"language": language, "language_score": float(confidence)}
    return True


def run(corpus: Path, words: Any, work: Path) -> dict[str, Any]:
    """All four stages."""
    kept: Any = {} if words is None else {"language": words}
    config = MinhashConfig(n_grams=5, num_buckets=16, hashes_per_bucket=8, hash_config=HashConfig(precision=64))

    def execute(pipeline: list[Any], tasks: int, name: str) -> Any:
        logs = str(work / "logs" / name)
        return LocalPipelineExecutor(pipeline=pipeline, tasks=tasks, workers=1, logging_dir=logs).run()

    cleaned = str(work / "cleaned")
    stats = execute(
        [
            JsonlReader(str(corpus.parent), glob_pattern=corpus.name),
            LambdaFilter(repaired),
            LambdaFilter(identified),
            GopherRepetitionFilter(**kept),
            GopherQualityFilter(**kept),
            C4QualityFilter(**kept),
            FineWebQualityFilter(**kept),
            PIIFormatter(),
            JsonlWriter(cleaned),
        ],
        1,
        "clean",
    )
    signatures, buckets, removed = (str(work / name) for name in ("signatures", "buckets", "removed"))
    execute([JsonlReader(cleaned), MinhashDedupSignature(signatures, config=config, **kept)], 1, "signatures")
    execute([MinhashDedupBuckets(signatures, buckets, config=config)], 16, "buckets")
    execute([MinhashDedupCluster(buckets, removed, config=config)], 1, "clusters")
    execute([JsonlReader(cleaned), MinhashDedupFilter(removed), JsonlWriter(str(work / "out"))], 1, "filter")
    found = stats.to_dict() if hasattr(stats, "to_dict") else json.loads(stats.to_json())
    dropped = {}
    for block in found:
        told = block.get("stats", {})
        for key, value in told.items():
            if key.startswith("dropped"):
                dropped[f"{block['name'].split()[-1]}: {key}"] = value["total"] if isinstance(value, dict) else value
    return dropped


def main(corpus: Path, which: str) -> None:
    """Time it."""
    logger.remove()
    words = tokenizer() if which == "regex" else None
    for rules in (GopherQualityFilter(), GopherRepetitionFilter()) if words is None else ():
        rules.filter(Document(text="Warm the tokenizer up.", id="0"))
    work = Path(tempfile.mkdtemp(dir=corpus.parent))
    start, begun = time.perf_counter(), time.process_time()
    dropped = run(corpus, words, work)
    seconds, cpu = time.perf_counter() - start, time.process_time() - begun
    kept = 0
    for path in (work / "out").glob("*.gz"):
        with gzip.open(path) as rows:
            kept += sum(1 for _ in rows)
    shutil.rmtree(work)
    print(json.dumps({"seconds": seconds, "cpu": cpu, "kept": kept, "dropped": dropped}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
