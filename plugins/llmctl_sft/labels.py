"""Fine-tune a model on labelled rows: a head for the task, or source and target of an encoder-decoder."""

from __future__ import annotations

from collections.abc import Sequence

from llmctl.errors import InputError, UsageError
from llmctl.nn.opening import why_foreign
from llmctl.nn.transformer import Transformer
from llmctl.stage import Artifact, Context
from llmctl.text.datasets import splits
from llmctl.text.labelled import Task
from llmctl.text.pooling import write_pooling
from llmctl.text.tokenizer import Tokenizer
from llmctl.train.device import Compute
from llmctl.train.heads import AnswerSpans, Classify, SentencePairs, with_head
from llmctl.train.labelled import HEADS, Item, ItemSource, Labeller, check_kind, find_labels, read_items
from llmctl.train.loop import fit
from llmctl.train.models import open_model, write_model
from llmctl.train.objectives import CausalLM, Objective
from llmctl.train.validation import Validate, mean_loss
from llmctl_sft.params import SftParams


def learn_labels(ctx: Context, params: SftParams, task: Task, model: Artifact, data: Artifact) -> None:
    """Train on the split `train`; loss and accuracy on `validation` where there is one."""
    if why := why_foreign(model.path):
        raise InputError(
            f"labelled rows train heads of llmctl's own transformer, and it does not compute this model: {why}",
            hint="give conversations, or a model of one of llmctl's own families",
        )
    net, tokenizer = open_model(model, ctx)
    check_kind(task, net.config)
    if task == "embedding" and (params.micro_batch or params.parallel.data > 1):
        raise UsageError(
            f"{'micro_batch' if params.micro_batch else 'data parallelism'} cannot be set with task embedding: the "
            "wrong texts are the others of the whole batch",
            hint="lower batch_size instead" if params.micro_batch else "set parallel.dp_replicate and dp_shard to 1",
        )
    labels = find_labels(data, task)
    if HEADS[task] != net.config.head or labels != net.config.labels:
        net = with_head(net, HEADS[task], labels, params.seed)
    labeller = Labeller(task, tokenizer, net.config, params)
    train = read_items(ctx, data, "train", labeller)
    held_out = read_items(ctx, data, "validation", labeller) if "validation" in splits(data) else []
    show_rows(ctx, tokenizer, task, train)
    if labels:
        ctx.log(f"labels: {', '.join(labels)}")
    objective = make_objective(task, params)
    source = ItemSource(train, net.config, params)
    values = fit(ctx, net, objective, source, params, validator(held_out, net, objective, params))
    write_model(ctx, net, model.path, {"task": task, **values})
    if task == "embedding":
        write_pooling(ctx.output("model"), params.pooling, net.config.dim, net.config.context)


def make_objective(task: Task, params: SftParams) -> Objective:
    """What is minimised."""
    if task == "seq2seq":
        return CausalLM(accuracy=True)
    if task == "embedding":
        return SentencePairs(params.pooling, params.temperature)
    return AnswerSpans() if task == "question-answering" else Classify()


def validator(items: Sequence[Item], model: Transformer, objective: Objective, params: SftParams) -> Validate | None:
    """The objective on held-out rows; None without any."""
    if not items:
        return None
    source = ItemSource(items, model.config, params)

    def validate(model: Transformer, compute: Compute) -> dict[str, float]:
        return mean_loss(model, objective, source.sweep(params.eval_batches), compute)

    return validate


def show_rows(ctx: Context, tokenizer: Tokenizer, task: Task, items: Sequence[Item]) -> None:
    """Log the first row as the model will see it, and how many there are."""
    texts = [tokenizer.decode(piece.ids.tolist(), skip_special=False) for piece in items[0]]
    source = items[0][0].source
    if source is not None:
        texts = [tokenizer.decode(source.tolist(), skip_special=False), *texts]
    shown = " | ".join(texts).replace("\n", "\\n")
    ctx.log(f"{len(items)} rows of task {task}; the first: {shown}")
