"""Numbers of the labelled tasks beyond the share of right answers: F1 of classes, chunks and answers, BLEU, ROUGE-L,
ranks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmctl import MachineError
from llmctl_eval.intervals import Bootstrap
from llmctl_eval.matching import squad
from llmctl_eval.params import LabelledTask
from llmctl_eval.samples import Sample

Chunk = tuple[str, int, int]
WORD = re.compile(r"[^\W_]+")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def further_scores(task: LabelledTask, samples: Sequence[Sample], boot: Bootstrap) -> dict[str, Any]:
    """What a task reports beside `value`; every name begins with the task's."""
    if task == "classification":
        expected, answers = ([sample[name] for sample in samples] for name in ("expected", "answer"))
        return {"classification.f1": macro_f1(expected, answers)}
    if task == "token-classification":
        words = boot.ratio([sample["right"] for sample in samples], [sample["words"] for sample in samples])
        there, found, hits = (sum(sample[name] for sample in samples) for name in ("there", "found", "hits"))
        f1 = 2 * hits / (there + found) if there + found else 0.0
        return {**words.named("token_classification.words", "_"), "token_classification.f1": f1}
    if task == "question-answering":
        return boot.mean([sample["f1"] for sample in samples]).named("question_answering.f1", "_")
    if task == "seq2seq":
        answers, expected = ([sample[name] for sample in samples] for name in ("answer", "expected"))
        overlaps = [rouge_l(answer, one) for answer, one in zip(answers, expected, strict=True)]
        return {**bleu(answers, expected), **boot.mean(overlaps).named("seq2seq.rouge_l", "_")}
    ranks = [sample["rank"] for sample in samples if sample.get("rank")]
    return {"embedding.mrr": sum(1 / rank for rank in ranks) / len(samples)}


def macro_f1(expected: Sequence[str], answers: Sequence[str]) -> float:
    """The mean F1 over all classes that were expected or given; an answer left out ("") is no class."""
    classes = (set(expected) | set(answers)) - {""}
    scores = []
    for name in sorted(classes):
        hits = sum(a == b == name for a, b in zip(expected, answers, strict=True))
        scores.append(2 * hits / (expected.count(name) + answers.count(name)))
    return sum(scores) / len(scores)


def chunks(labels: Sequence[str]) -> set[Chunk]:
    """(kind, first word, one after the last) of every stretch that is not O.

    B-X begins one, I-X goes on with one of the same kind or, after another, begins it (as conlleval has it); a label
    without such a prefix is a chunk by itself.
    """
    found: set[Chunk] = set()
    kind, start = "", 0
    for place, label in enumerate([*labels, "O"]):
        prefix, dash, name = label.partition("-")
        inside = dash and prefix == "I" and name == kind
        if kind and not inside:
            found.add((kind, start, place))
            kind = ""
        if label == "O" or inside:
            continue
        if dash and prefix in ("B", "I"):
            kind, start = name, place
        else:
            found.add((label, place, place + 1))
    return found


def answer_f1(answer: str, expected: str) -> float:
    """SQuAD's F1 of the words of two answers, normalised (Rajpurkar et al. 2016, `evaluate-v1.1.py`)."""
    found, wanted = squad(answer).split(), squad(expected).split()
    same = sum((Counter(found) & Counter(wanted)).values())
    if not found or not wanted:
        return float(found == wanted)
    return 2 * same / (len(found) + len(wanted))


def bleu(answers: Sequence[str], expected: Sequence[str]) -> dict[str, Any]:
    """Corpus BLEU by sacrebleu (1804.08771), from 0 to 100, with the signature that says how it was counted."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ModuleNotFoundError as error:
        raise MachineError("BLEU needs sacrebleu", hint="pip install 'llmctl[eval]'") from error
    metric = BLEU()
    score = metric.corpus_score(list(answers), [list(expected)])
    return {"seq2seq.bleu": score.score, "seq2seq.bleu_signature": str(metric.get_signature())}


def rouge_l(answer: str, expected: str) -> float:
    """ROUGE-L of two texts (Lin 2004, W04-1013, section 3.1): F1 of their longest common subsequence of words.

    Words are runs of letters and digits, their case ignored; two texts without words score 0.
    """
    found, wanted = (WORD.findall(text.casefold()) for text in (answer, expected))
    best = [0] * (len(wanted) + 1)  # of the words of `found` so far and the first ones of `wanted`
    for word in found:
        before = best.copy()
        for place, other in enumerate(wanted, start=1):
            best[place] = before[place - 1] + 1 if word == other else max(before[place], best[place - 1])
    return 2 * best[-1] / (len(found) + len(wanted)) if found and wanted else 0.0


def lead_score(samples: Sequence[Sample], boot: Bootstrap) -> dict[str, Any]:
    """What the first sentence of each source scores as its summary, which news are hard to beat by."""
    leads = [rouge_l(SENTENCE_END.split(sample["question"].strip(), 1)[0], sample["expected"]) for sample in samples]
    return boot.mean(leads).named("seq2seq.rouge_l_lead", "_")


def rank_vectors(samples: Sequence[Sample]) -> list[Sample]:
    """Samples with vectors, now with the second text that is nearest to each first one, and the rank of its own.

    A second text that is as near as its own counts as nearer: equal vectors of all texts find nothing.
    """
    scored = [sample for sample in samples if "vectors" in sample]
    done = {}
    if scored:
        first, second = (np.array([sample["vectors"][part] for sample in scored]) for part in (0, 1))
        scores = first @ second.T
        own = scores.diagonal()[:, None]
        ranks = (scores >= own - 1e-9).sum(axis=1)
        for sample, rank, row in zip(scored, ranks.tolist(), scores, strict=True):
            nearest = scored[int(row.argmax())]["expected"]
            done[id(sample)] = {**sample, "answer": nearest, "ok": rank == 1, "rank": rank}
    return [{k: v for k, v in done.get(id(sample), sample).items() if k != "vectors"} for sample in samples]
