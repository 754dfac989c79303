"""Train a student to give its teacher's answers."""

from __future__ import annotations

from llmctl.errors import InputError
from llmctl.nn.transformer import Transformer
from llmctl.stage import Artifact, Context
from llmctl.text.datasets import splits
from llmctl.text.shards import TokenShards
from llmctl.text.tokenizer import Tokenizer
from llmctl.train.conversations import Encoder, read_conversations, show_examples
from llmctl.train.data import ExampleSource, Source, TokenSource
from llmctl.train.device import Compute
from llmctl.train.loop import fit
from llmctl.train.models import check_decoder, open_model, write_model
from llmctl.train.validation import Validate, mean_loss
from llmctl_distill.losses import LogitDistillation
from llmctl_distill.params import DistillParams


def run(ctx: Context, params: DistillParams, teacher: Artifact, student: Artifact, data: Artifact) -> None:
    """Train `student` on the split `train`; KL to the teacher on `validation` where there is one, before and after."""
    master, tokenizer = open_model(teacher, ctx)
    net, own = open_model(student, ctx)
    for one in (master, net):
        check_decoder(one, "teacher and student")
    check_vocabulary(master, net, tokenizer, own)
    length = min(master.config.context, net.config.context)
    source, held_out = open_data(ctx, data, tokenizer, net, length, params)
    compute = Compute.of(params)
    master.to(compute.device).eval().requires_grad_(False)
    objective = LogitDistillation(master, params.temperature, params.alpha)
    validate = validator(held_out, objective, params)
    before = {}
    if validate is not None:
        with compute.limit_threads():
            before = {"kl.before": validate(net.to(compute.device).eval(), compute)["kl.validation"]}
    values = fit(ctx, net, objective, source, params, validate)
    write_model(ctx, net, student.path, {**values, **before, "teacher.parameters": master.config.parameters()})


def check_vocabulary(teacher: Transformer, student: Transformer, tokenizer: Tokenizer, own: Tokenizer) -> None:
    """InputError unless the same id means the same token to both."""
    sizes = teacher.config.vocab_size, student.config.vocab_size
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the teacher has a vocabulary of {sizes[0]}, the student one of {sizes[1]}",
            hint="distilling logits needs a student with the teacher's tokenizer",
        )
    if tokenizer.digest != own.digest:
        raise InputError(
            f"the teacher's tokenizer is {tokenizer.digest[:19]}…, the student's {own.digest[:19]}…",
            hint="distilling logits needs a student with the teacher's tokenizer",
        )


def open_data(
    ctx: Context, data: Artifact, tokenizer: Tokenizer, model: Transformer, length: int, params: DistillParams
) -> tuple[Source, Source | None]:
    """The sources of `train` and, where there is one, `validation`, of conversations or token shards."""
    if data.type == "dataset.tokens":
        shards = TokenShards.open(data)
        if shards.tokenizer != tokenizer.digest:
            raise InputError(
                f"{shards.directory} was made with another tokenizer than the teacher's",
                hint="take the tokens from the `tokenize` stage that the teacher was trained with",
            )
        found = [name for name in ("train", "validation") if name in shards.splits]
        sources: dict[str, Source] = {name: TokenSource(shards.split(name), length, params) for name in found}
    else:
        encoder = Encoder(tokenizer, length, model.config.eos_ids, params)
        examples = {
            name: read_conversations(ctx, data, name, encoder)
            for name in ("train", "validation")
            if name == "train" or name in splits(data)
        }
        show_examples(ctx, tokenizer, examples["train"])
        sources = {name: ExampleSource(rows, length, params) for name, rows in examples.items()}
    if "train" not in sources:
        raise InputError(f"{data.path} has no split `train`")
    return sources["train"], sources.get("validation")


def validator(source: Source | None, objective: LogitDistillation, params: DistillParams) -> Validate | None:
    """The objective, KL and cross-entropy on held-out data; None without any."""
    if source is None:
        return None

    def validate(model: Transformer, compute: Compute) -> dict[str, float]:
        return mean_loss(model, objective, source.sweep(params.eval_batches), compute)

    return validate
