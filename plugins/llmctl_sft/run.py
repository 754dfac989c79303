"""Fine-tune a model: on conversations, its answers supervised and nothing else, or on labelled rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from llmctl.errors import UsageError
from llmctl.generator import Sampling
from llmctl.nn.transformer import Transformer
from llmctl.stage import Artifact, Context
from llmctl.text.datasets import splits
from llmctl.text.labelled import Task, find_task
from llmctl.train.batches import Example
from llmctl.train.conversations import Encoder, read_conversations, show_examples
from llmctl.train.data import ExampleSource
from llmctl.train.device import Compute
from llmctl.train.generate import make_generator
from llmctl.train.loop import fit
from llmctl.train.models import check_decoder, open_model, write_model
from llmctl.train.objectives import CausalLM
from llmctl.train.validation import Validate, mean_loss
from llmctl_sft.labels import learn_labels
from llmctl_sft.params import OWN, SftParams


def run(ctx: Context, params: SftParams, model: Artifact, data: Artifact) -> None:
    """Train on the split `train`; measure on `validation` where there is one."""
    task = choose_task(params, data)
    if task == "chat":
        learn_to_chat(ctx, params, model, data)
    else:
        learn_labels(ctx, params, task, model, data)


def choose_task(params: SftParams, data: Artifact) -> Literal["chat"] | Task:
    """The task of the data, if it is the one asked for. UsageError if not, or for parameters of another task."""
    found: Literal["chat"] | Task = "chat" if data.type == "dataset.chat" else find_task(data)
    if params.task not in ("auto", found):
        raise UsageError(
            f"task {params.task} was asked for, {data.path} holds rows of task {found}",
            hint="leave task out, or bind other data",
        )
    for name, task in OWN.items():
        if task != found and getattr(params, name) != SftParams.model_fields[name].default:
            raise UsageError(f"{name} belongs to task {task}, this is {found}", hint=f"leave {name} out")
    return found


def learn_to_chat(ctx: Context, params: SftParams, model: Artifact, data: Artifact) -> None:
    """Conversations, the assistant's turns supervised; loss and stop rate on `validation`."""
    net, tokenizer = open_model(model, ctx)
    check_decoder(net, "conversations")
    encoder = Encoder(tokenizer, net.config.context, net.config.eos_ids, params)
    train = read_conversations(ctx, data, "train", encoder)
    held_out = read_conversations(ctx, data, "validation", encoder) if "validation" in splits(data) else []
    show_examples(ctx, tokenizer, train)
    source = ExampleSource(train, net.config.context, params)
    values = fit(ctx, net, CausalLM(), source, params, validator(held_out, net, params))
    rate = stop_rate(net, held_out, params)
    if rate is not None:
        values["stop_rate"] = rate
        if rate < 0.5:
            ctx.warn(f"only {rate:.0%} of the answers end within {params.probe_tokens} tokens")
    write_model(ctx, net, model.path, values)


def validator(examples: Sequence[Example], model: Transformer, params: SftParams) -> Validate | None:
    """Loss per supervised token on held-out conversations; None without any."""
    if not examples:
        return None
    source = ExampleSource(examples, model.config.context, params)

    def validate(model: Transformer, compute: Compute) -> dict[str, float]:
        return mean_loss(model, CausalLM(), source.sweep(params.eval_batches), compute)

    return validate


def stop_rate(model: Transformer, examples: Sequence[Example], params: SftParams) -> float | None:
    """Share of held-out prompts, spread evenly, whose greedy answer ends with EOS within the limit."""
    count = min(params.probe_prompts, len(examples))
    if not count:
        return None
    chosen = [examples[i] for i in np.linspace(0, len(examples) - 1, count).round().astype(int)]
    # The prompt is what stands before the first answer.
    prompts = [example.ids[: int(np.flatnonzero(example.mask)[0])].tolist() for example in chosen]
    prompts = [prompt for prompt in prompts if len(prompt) < model.config.context]
    generator = make_generator(model, model.config.eos_ids)
    answers = generator.generate(prompts, Sampling(max_new_tokens=params.probe_tokens))
    room = [min(params.probe_tokens, model.config.context - len(prompt)) for prompt in prompts]
    stopped = [len(answer) < most for answer, most in zip(answers, room, strict=True)]
    return sum(stopped) / len(stopped) if stopped else None
