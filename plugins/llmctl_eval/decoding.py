"""Task `decoding`: what ways of choosing tokens make of the same beginnings, in one table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from llmctl import Artifact, Context, InputError
from llmctl.generator import Sampling
from llmctl.text.shards import SplitTokens, TokenShards
from llmctl_eval.diversity import distinct, repetition, self_bleu
from llmctl_eval.intervals import Bootstrap, Interval
from llmctl_eval.params import EvalParams, Strategy
from llmctl_eval.samples import Sample, SampleLog, collect
from llmctl_eval.subject import Subject

STRATEGIES: Mapping[Strategy, Callable[[EvalParams], dict[str, Any]]] = {
    "greedy": lambda params: {},
    "beam": lambda params: {"beams": max(params.beams, params.answers), "n": params.answers},
    "top-k": lambda params: {"temperature": 1.0, "top_k": params.top_k, "n": params.answers},
    "nucleus": lambda params: {"temperature": 1.0, "top_p": params.top_p, "n": params.answers},
    "plain": lambda params: {"temperature": 1.0, "n": params.answers},
    "focused": lambda params: {"temperature": 0.3, "top_p": 0.9, "n": params.answers},
    "creative": lambda params: {"temperature": 1.2, "top_p": 0.95, "n": params.answers},
}
"""What each gives `Sampling`. Greedy has one answer, which counts as `answers` equal ones."""
COLUMNS = ("nats", "repetition", "distinct_1", "distinct_2", "self_bleu", "tokens", "seconds")
Row = tuple[Strategy, int, list[int]]
"""A way, the number of the beginning, and its tokens."""


def compare_strategies(
    ctx: Context, params: EvalParams, subject: Subject, data: Artifact, split: str, log: SampleLog, boot: Bootstrap
) -> tuple[list[Sample], dict[str, float]]:
    """The answers of every strategy, and its metrics; the table goes to the log."""
    shards = TokenShards.open(data)
    if shards.tokenizer != subject.tokenizer.digest:
        raise InputError(
            f"the tokens in {data.path} are of another tokenizer than the model's",
            hint="tokenize the text with the model's tokenizer: `llmctl tokenize --tokenizer MODEL`",
        )
    starts = beginnings(shards.split(split), params)
    if not starts:
        raise InputError(
            f"no document in split `{split}` of {data.path} goes on after {params.prompt_tokens} tokens",
            hint="lower `prompt_tokens`, or choose another `split`",
        )
    rows: list[Row] = [(way, i, start) for way in params.strategies for i, start in enumerate(starts)]

    def score(batch: Sequence[Row]) -> Iterator[Sample]:
        return (answer(subject, params, *row) for row in batch)

    samples = collect(ctx, log, rows, score, 1, "decoding")
    found = {way: summary([s for s in samples if s["strategy"] == way], boot) for way in params.strategies}
    for line in table(found):
        ctx.log(line)
    named = {f"decoding.{way.replace('-', '_')}.{name}": value for way, m in found.items() for name, value in m.items()}
    return samples, named


def beginnings(part: SplitTokens, params: EvalParams) -> list[list[int]]:
    """The first `prompt_tokens` tokens of each of the first `limit` documents that go on after them."""
    long = (i for i in range(len(part)) if len(part.document(i)) > params.prompt_tokens)
    numbers = list(long) if params.limit is None else [i for i, _ in zip(long, range(params.limit), strict=False)]
    return [part.document(i)[: params.prompt_tokens].tolist() for i in numbers]


def answer(subject: Subject, params: EvalParams, way: Strategy, number: int, start: list[int]) -> Sample:
    """All answers of one strategy to one beginning, with what is measured on them."""
    # No two draws of an evaluation share a seed.
    seed = (params.seed + number * params.answers) % 2**63
    sampling = Sampling(max_new_tokens=params.max_new_tokens, seed=seed, rules=subject.rules, **STRATEGIES[way](params))
    began = time.perf_counter()
    found = subject.generator.candidates(start, sampling)
    seconds = time.perf_counter() - began
    found = found * params.answers if sampling.n == 1 else found
    texts = [one.ids for one in found]
    return {
        "task": "decoding",
        "strategy": way,
        "prompt": subject.tokenizer.decode(start),
        "answers": [subject.tokenizer.decode(ids) for ids in texts],
        "logprob": sum(one.logprob for one in found),
        "scored": sum(len(one.logprobs) for one in found),
        "repetition": sum(map(repetition, texts)) / len(texts),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "self_bleu": self_bleu(texts),
        "tokens": sum(map(len, texts)) / len(texts),
        "seconds": seconds,
    }


def summary(samples: Sequence[Sample], boot: Bootstrap) -> dict[str, float]:
    """Means over beginnings; intervals, which resample beginnings, for likelihood and diversity."""
    nats = boot.ratio([-sample["logprob"] for sample in samples], [sample["scored"] for sample in samples])
    values = nats.named("nats", "_")
    for name in COLUMNS[1:]:
        sample = [float(one[name]) for one in samples]
        if name not in ("distinct_2", "self_bleu"):
            values[name] = sum(sample) / len(sample)
            continue
        constant = len(set(sample)) == 1  # such as the self-BLEU of greedy answers, 1
        interval = Interval(sample[0], sample[0], sample[0]) if constant else boot.mean(sample)
        values |= interval.named(name, "_")
    return values


def table(found: Mapping[Strategy, Mapping[str, float]]) -> Iterator[str]:
    """A line for each strategy."""
    yield f"{'strategy':10}" + "".join(f"{name:>12}" for name in COLUMNS)
    for way, values in found.items():
        yield f"{way:10}" + "".join(f"{values[name]:12.4g}" for name in COLUMNS)
