"""What the student is trained and measured on, by method."""

from __future__ import annotations

from llmctl.errors import InputError, UsageError
from llmctl.nn.transformer import Transformer
from llmctl.stage import Artifact, Context
from llmctl.text.datasets import splits
from llmctl.text.shards import TokenShards
from llmctl.text.tokenizer import Tokenizer
from llmctl.train.conversations import Encoder, read_conversations, read_examples, show_examples
from llmctl.train.data import ExampleSource, Source, TokenSource
from llmctl.train.generate import make_generator
from llmctl_distill.on_policy import PromptSource
from llmctl_distill.params import DistillParams
from llmctl_distill.sequences import leave_rows, measure, read_questions, to_examples, write_answers


def open_data(
    ctx: Context, data: Artifact, tokenizer: Tokenizer, model: Transformer, length: int, params: DistillParams
) -> tuple[Source, Source | None]:
    """The sources of `train` and, where there is one, `validation`, of conversations or token shards."""
    if data.type == "dataset.tokens":
        if params.method == "on-policy":
            raise without_prompts(data, params)
        return _open_tokens(data, tokenizer, length, params)
    encoder = Encoder(tokenizer, length, model.config.eos_ids, params)
    if params.method == "on-policy":
        rows = read_examples(ctx, data, "train", encoder.asked, params.max_dropped)
        source: Source = PromptSource(rows, length, params)
        show_examples(ctx, tokenizer, [made for _, made in rows])
    else:
        examples = read_conversations(ctx, data, "train", encoder)
        source = ExampleSource(examples, length, params)
        show_examples(ctx, tokenizer, examples)
    return source, open_held_out(ctx, data, encoder)


def open_held_out(ctx: Context, data: Artifact, encoder: Encoder) -> Source | None:
    """The conversations of `validation` as they are, None without that split."""
    if "validation" not in splits(data):
        return None
    return ExampleSource(read_conversations(ctx, data, "validation", encoder), encoder.context, encoder.params)


def without_prompts(data: Artifact, params: DistillParams) -> UsageError:
    """Why token shards are no data for a method that writes answers."""
    return UsageError(
        f"the method {params.method} writes answers to prompts, {data.path} has none: it holds tokens",
        hint="bind `data` to conversations (dataset.chat), or set method to logits",
    )


def _open_tokens(
    data: Artifact, tokenizer: Tokenizer, length: int, params: DistillParams
) -> tuple[Source, Source | None]:
    shards = TokenShards.open(data)
    if shards.tokenizer != tokenizer.digest:
        raise InputError(
            f"{shards.directory} was made with another tokenizer than the teacher's",
            hint="take the tokens from the `tokenize` stage that the teacher was trained with",
        )
    found = [name for name in ("train", "validation") if name in shards.splits]
    sources: dict[str, Source] = {name: TokenSource(shards.split(name), length, params) for name in found}
    if "train" not in sources:
        raise InputError(f"{data.path} has no split `train`")
    return sources["train"], sources.get("validation")


def written_data(
    ctx: Context,
    data: Artifact,
    tokenizer: Tokenizer,
    teacher: Transformer,
    length: int,
    params: DistillParams,
    name: str,
) -> tuple[Source, Source | None, dict[str, float]]:
    """As `open_data` of conversations, with answers to the prompts of `train` that the teacher, whose id is `name`,
    writes; they are left as the output `answers`. And what there is to say of them in numbers."""
    if data.type == "dataset.tokens":
        raise without_prompts(data, params)
    encoder = Encoder(tokenizer, length, teacher.config.eos_ids, params)
    questions = read_questions(ctx, data, encoder)
    answers = write_answers(ctx, questions, make_generator(teacher), params, name)
    if ctx.wants("answers"):
        ctx.describe("answers", **leave_rows(ctx.output("answers"), tokenizer, questions, answers))
    examples = to_examples(questions, answers, length)
    show_examples(ctx, tokenizer, examples)
    return ExampleSource(examples, length, params), open_held_out(ctx, data, encoder), measure(answers)
