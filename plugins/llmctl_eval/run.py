"""Run the tasks on a model, and on a reference beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, get_args

from llmctl import Artifact, Context, InputError, UsageError
from llmctl.text.datasets import read_rows
from llmctl.text.labelled import checked, find_task
from llmctl_eval.conversations import choose_answers, generate_answers, read_question, summarise, with_candidates
from llmctl_eval.decoding import compare_strategies
from llmctl_eval.intervals import Bootstrap
from llmctl_eval.labelled import scorer
from llmctl_eval.lengths import lengths
from llmctl_eval.params import EvalParams, LabelledTask, Task
from llmctl_eval.perplexity import perplexity
from llmctl_eval.ranking import check_pair, margins, rank_pairs
from llmctl_eval.samples import Sample, SampleLog, collect, write_samples
from llmctl_eval.scores import further_scores, lead_score, rank_vectors
from llmctl_eval.subject import Subject

NEEDS: dict[Task, tuple[str, ...]] = {
    "perplexity": ("dataset.tokens", "dataset.text"),
    "exact-match": ("dataset.chat",),
    "accuracy": ("dataset.chat",),
    "ranking": ("dataset.preference",),
    **dict.fromkeys(get_args(LabelledTask), ("dataset.labelled",)),
    "decoding": ("dataset.tokens",),
    "lengths": ("dataset.tokens",),
}
"""The types of data that each task measures on, one of them."""
LABELLED: dict[Task, LabelledTask] = {task: task for task in get_args(LabelledTask)}
DEFAULT: dict[str, Task] = {
    "dataset.tokens": "perplexity",
    "dataset.text": "perplexity",
    "dataset.chat": "exact-match",
    "dataset.preference": "ranking",
}


@dataclass(frozen=True)
class Evaluation:
    """What all tasks share."""

    ctx: Context
    params: EvalParams
    boot: Bootstrap

    def split(self, task: Task) -> str:
        """The split that `task` measures on."""
        return self.params.splits.get(task, self.params.split)

    def log(self, subject: Subject, task: Task) -> SampleLog:
        """Finished samples of an earlier attempt."""
        return SampleLog(self.ctx.resume_dir / f"{subject.role}-{task}.jsonl")

    def rows(self, data: Artifact, task: Task, read: Callable[[Any, int], Any]) -> list[Any]:
        """The rows to measure on; InputError if there are none."""
        split = self.split(task)
        found = [read(row, i) for i, row in enumerate(islice(read_rows(data, split), self.params.limit))]
        if not found:
            raise InputError(f"split `{split}` of {data.path} is empty", hint="choose another with `split`")
        return found


def run(
    ctx: Context, params: EvalParams, model: Artifact, data: Sequence[Artifact], reference: Artifact | None = None
) -> None:
    """Measure, report, and leave every sample."""
    chosen = choose_tasks(ctx, params, data, reference is not None)
    evaluation = Evaluation(ctx, params, Bootstrap(params.confidence, params.resamples, params.seed))
    subjects = [Subject.of(model, "model", params.device, params.threads)]
    if reference is not None:
        subjects.append(Subject.of(reference, "reference", params.device, params.threads))
    samples = ctx.output("metrics") / "samples.jsonl"
    samples.unlink(missing_ok=True)
    for task, artifact in chosen.items():
        if task == "perplexity":
            ctx.report(_perplexity(evaluation, subjects, artifact))
            continue
        if task == "lengths":
            ctx.report(lengths(ctx, params, model, artifact, evaluation.split(task)))
            continue
        if task == "decoding":
            written, values = _decoding(evaluation, subjects[0], artifact)
            write_samples(samples, written)
            ctx.report(values)
            continue
        found = [_samples(evaluation, subject, task, artifact) for subject in subjects]
        write_samples(samples, found[0])
        ctx.report(_metrics(evaluation, task, found))
    ctx.report({"backend": subjects[0].backend, "tokenizer": subjects[0].tokenizer.digest})


def choose_tasks(
    ctx: Context, params: EvalParams, data: Sequence[Artifact], reference: bool = False
) -> dict[Task, Artifact]:
    """The tasks with the data of each. UsageError if they do not fit together."""
    by_type: dict[str, Artifact] = {}
    for artifact in data:
        if artifact.type in by_type:
            raise UsageError(
                f"`data` holds two of {artifact.type}", hint="evaluate them in two stages, so that numbers stay apart"
            )
        by_type[artifact.type] = artifact
    tasks: list[Task] = params.tasks or list(dict.fromkeys(DEFAULT[kind] for kind in DEFAULT if kind in by_type))
    if labelled := by_type.get("dataset.labelled"):
        own = find_task(labelled)
        if not params.tasks:
            tasks.append(own)
        for task in tasks:
            if task in LABELLED and task != own:
                raise UsageError(f"task {task} was asked for, {labelled.path} holds rows of task {own}")
    found = {task: _data_of(task, by_type) for task in tasks}
    of_text = "perplexity" in found and found["perplexity"].type == "dataset.text"
    if of_text and "kneser-ney-bigram" in params.baselines:
        raise UsageError(
            "baseline kneser-ney-bigram counts the training tokens of a dataset.tokens",
            hint="give token shards instead of text, or leave the baseline out",
        )
    if params.by and not of_text:
        raise UsageError(
            f"by: {params.by} tells the rows of a dataset.text apart, for task perplexity",
            hint="give the text itself instead of token shards, or leave `by` out",
        )
    for name in params.baselines:
        task = "seq2seq" if name == "lead-sentence" else "perplexity"
        if task not in tasks:
            raise UsageError(f"baseline {name} belongs to task {task}", hint="add it to tasks, or leave baselines out")
    if (params.scalings or params.max_length is not None) and "lengths" not in tasks:
        raise UsageError("max_length and scalings belong to task lengths", hint="add it to tasks, or leave them out")
    if idle := [task for task in params.splits if task not in tasks]:
        raise UsageError(f"splits names {idle[0]}, which is not among the tasks", hint="add it, or leave the split out")
    for alone in ("decoding", "lengths"):
        if reference and alone in tasks:
            ctx.warn(f"task {alone} measures the model alone, not the reference")
    for kind in by_type:
        if kind not in {artifact.type for artifact in found.values()}:
            ctx.warn(f"no task uses the {kind} in {by_type[kind].path}")
    return found


def _data_of(task: Task, by_type: dict[str, Artifact]) -> Artifact:
    """What `task` measures on. UsageError if there is nothing, or two things."""
    fitting = [kind for kind in NEEDS[task] if kind in by_type]
    if not fitting:
        raise UsageError(f"task {task} needs {' or '.join(NEEDS[task])}", hint="bind it to the input `data`")
    if len(fitting) > 1:
        raise UsageError(
            f"task {task} has {' and '.join(fitting)} to measure on", hint="give one, or evaluate in two stages"
        )
    return by_type[fitting[0]]


def _perplexity(evaluation: Evaluation, subjects: Sequence[Subject], data: Artifact) -> dict[str, float]:
    ctx, params = evaluation.ctx, evaluation.params
    split = evaluation.split("perplexity")
    if data.type == "dataset.text" and len({subject.tokenizer.digest for subject in subjects}) > 1:
        raise UsageError(
            "the model and the reference have different tokenizers: their nats per token do not compare",
            hint="leave the reference out and compare perplexity.bits_per_byte of an evaluation of each",
        )
    found = [
        perplexity(ctx, params, subject, data, split, evaluation.log(subject, "perplexity"), evaluation.boot)
        for subject in subjects
    ]
    values = dict(found[0])
    for name, value in found[1].items() if len(found) > 1 else ():
        if name.endswith(".nats"):
            values[f"{name.removesuffix('nats')}reference_nats"] = value
    return values


def _decoding(evaluation: Evaluation, subject: Subject, data: Artifact) -> tuple[list[Sample], dict[str, float]]:
    split, log = evaluation.split("decoding"), evaluation.log(subject, "decoding")
    return compare_strategies(evaluation.ctx, evaluation.params, subject, data, split, log, evaluation.boot)


def _samples(evaluation: Evaluation, subject: Subject, task: Task, data: Artifact) -> list[Sample]:
    """All samples of a task that answers row by row."""
    params = evaluation.params
    score: Callable[[Sequence[Any]], Any]
    if task == "ranking":
        rows, score, batch = evaluation.rows(data, task, check_pair), partial(rank_pairs, subject), 1
    elif task in LABELLED:
        own = LABELLED[task]
        read = lambda row, number: checked(own, row, f"{data.path}: row {number + 1}")  # noqa: E731
        rows, score, batch = evaluation.rows(data, task, read), scorer(subject, own, params), params.batch_size
    elif task == "accuracy":
        rows = with_candidates(evaluation.rows(data, task, read_question), params)
        score, batch = partial(choose_answers, subject), 1
    else:
        rows = evaluation.rows(data, task, read_question)
        score, batch = partial(generate_answers, subject, params), params.batch_size
    samples = collect(evaluation.ctx, evaluation.log(subject, task), rows, score, batch, task)
    if task == "embedding":
        samples = rank_vectors(samples)
    if long := sum("too_long" in sample for sample in samples):
        evaluation.ctx.warn(f"{task}: {long} of {len(samples)} rows exceed the context of the {subject.role}")
    return samples


def _metrics(evaluation: Evaluation, task: Task, found: Sequence[list[Sample]]) -> dict[str, Any]:
    """Numbers of a task, and how they differ from the reference's, row by row."""
    name = task.replace("-", "_")
    boot = evaluation.boot
    values: dict[str, Any] = summarise(name, found[0], boot)
    if task == "accuracy":
        values["accuracy.chance"] = sum(sample["chance"] for sample in found[0]) / len(found[0])
    if task in LABELLED:
        values |= further_scores(LABELLED[task], found[0], boot)
    if task == "seq2seq" and "lead-sentence" in evaluation.params.baselines:
        values |= lead_score(found[0], boot)
    scored = [i for i in range(len(found[0])) if all(samples[i].get("margin") is not None for samples in found)]
    if task == "ranking" and scored:
        values |= margins([found[0][i] for i in scored], boot)
    if len(found) > 1:
        ours, theirs = ([float(sample["ok"]) for sample in samples] for samples in found)
        values[f"{name}.reference"] = sum(theirs) / len(theirs)
        values |= boot.difference(ours, theirs).named(f"{name}.rise", "_")
        if task == "ranking" and scored:
            margin = [[samples[i]["margin"] for i in scored] for samples in found]
            values |= boot.difference(margin[0], margin[1]).named("ranking.margin_rise", "_")
    return values
