"""Fine-tune a model on conversations, its answers supervised and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmctl.generator import Sampling
from llmctl.nn.transformer import Transformer
from llmctl.stage import Artifact, Context
from llmctl.text.datasets import splits
from llmctl.train.batches import Example
from llmctl.train.conversations import Encoder, read_conversations, show_examples
from llmctl.train.data import ExampleSource
from llmctl.train.device import Compute
from llmctl.train.generate import make_generator
from llmctl.train.loop import fit
from llmctl.train.models import open_model, write_model
from llmctl.train.objectives import CausalLM
from llmctl.train.validation import Validate, mean_loss
from llmctl_sft.params import SftParams


def run(ctx: Context, params: SftParams, model: Artifact, data: Artifact) -> None:
    """Train on the split `train`; loss and stop rate on `validation` where there is one."""
    net, tokenizer = open_model(model, ctx)
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
