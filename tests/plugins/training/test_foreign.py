"""Every training stage with architectures that go through transformers, then what comes after."""

from __future__ import annotations

import json

import pytest
import torch

from llmctl.errors import InputError, TempFail, UsageError
from llmctl.nn.foreign import load_foreign
from llmctl.registry import get_registry
from llmctl.stage import Artifact
from llmctl.testing import run_stage
from llmctl.text.tokenizer import Tokenizer, copy_tokenizer
from llmctl.train.memory import kept_bytes
from llmctl.train.recompute import recomputed

transformers = pytest.importorskip("transformers")
TRAINERS = ["train-pretrain", "sft", "rlhf", "distill"]
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
}
CONFIGS = {
    "gpt_neox": lambda ids: transformers.GPTNeoXConfig(**SHAPE, **ids),
    "opt": lambda ids: transformers.OPTConfig(**SHAPE, **ids, ffn_dim=64, word_embed_proj_dim=32, dropout=0.1),
    "gptj": lambda ids: transformers.GPTJConfig(
        **ids, n_embd=32, n_layer=2, n_head=4, n_positions=48, rotary_dim=4, tie_word_embeddings=False
    ),
    "phi3-longrope": lambda ids: transformers.Phi3Config(
        **SHAPE,
        **ids,
        num_key_value_heads=2,
        original_max_position_embeddings=32,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    ),
    "falcon-alibi": lambda ids: transformers.FalconConfig(**SHAPE, **ids, alibi=True),
}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, world):
    """`foreign("opt")`: a random model of transformers with the tokenizer of the tiny world."""
    tokenizer = Tokenizer.load(world.tokenizer.path)
    ids = {
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    made = {}

    def make(name: str) -> Artifact:
        if name not in made:
            torch.manual_seed(0)
            directory = tmp_path_factory.mktemp(name)
            transformers.AutoModelForCausalLM.from_config(CONFIGS[name](ids)).save_pretrained(directory)
            copy_tokenizer(world.tokenizer.path, directory)
            made[name] = Artifact(directory, "model.hf")
        return made[name]

    return make


def given(stage: str, model: Artifact) -> dict[str, Artifact]:
    return {"teacher": model, "student": model} if stage == "distill" else {"model": model}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_sft_learns_and_leaves_a_model_for_transformers(train, foreign, weights, name: str) -> None:
    source = foreign(name)
    result = train(
        "sft", params={"max_steps": 30, "lr": 3e-3, "optimizer": "adamw", "schedule": "constant"}, model=source
    )
    first, last = (result.curve("loss")[at][1] for at in (0, -1))
    assert last < 0.8 * first and "stop_rate" in result.metrics
    path = result.outputs["model"].path
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert type(model).__name__ == json.loads((path / "config.json").read_text())["architectures"][0]
    assert result.outputs["model"].metadata["parameters"] == model.num_parameters()
    assert {p.name for p in path.iterdir()} - {"llmctl.json"} == {p.name for p in source.path.iterdir()}
    said = [fields["text"] for kind, fields in result.events if kind == "log"]
    assert any("computed by transformers, because" in text for text in said)
    assert any("in a row each" in text for text in said) == (name == "falcon-alibi")


@pytest.mark.parametrize("stage", TRAINERS)
def test_resume_is_bit_identical(train, foreign, weights, stage: str) -> None:
    """With dropout, so that the random state of a checkpoint counts."""
    models, params = given(stage, foreign("opt")), {"dropout": 0.1}
    straight = train(stage, "straight", params, **models)
    for stop in (1, 7):
        with pytest.raises(TempFail):
            train(stage, "stopped", params, stop_after=stop, **models)
    assert weights(train(stage, "stopped", params, **models)) == weights(straight)
    assert weights(train(stage, "other", {**params, "seed": 1}, **models)) != weights(straight)


def test_mixed_precision(train, foreign) -> None:
    exact, mixed = (
        train("sft", name, {"precision": name, "max_steps": 4}, model=foreign("gpt_neox"))
        for name in ("float32", "bf16")
    )
    assert mixed.metrics["loss.train"] == pytest.approx(exact.metrics["loss.train"], rel=0.02)
    assert mixed.metrics["loss.train"] != exact.metrics["loss.train"]


def test_packing_changes_no_loss(train, foreign) -> None:
    """The same first steps with conversations packed into rows, and with one to a row."""
    losses = {
        packing: [
            value
            for _, value in train(
                "sft", packing, {"packing": packing, "max_steps": 4, "log_every": 1}, model=foreign("gpt_neox")
            ).curve("loss")
        ]
        for packing in ("documents", "none")
    }
    assert losses["documents"] == pytest.approx(losses["none"], rel=1e-4)


def test_the_loss_is_that_of_transformers(train, foreign, world) -> None:
    model = foreign("gpt_neox")
    result = train("sft", params={"max_steps": 1, "lr": 1e-9, "optimizer": "adamw"}, model=model)
    net = transformers.AutoModelForCausalLM.from_pretrained(model.path).eval()
    tokenizer = Tokenizer.load(model.path)
    nats = tokens = 0.0
    from llmctl.text.datasets import read_rows

    for row in read_rows(world.chat, "validation"):
        encoded = tokenizer.encode_chat(row["messages"])
        labels = torch.tensor([[i if on else -100 for i, on in zip(encoded.ids, encoded.mask, strict=True)]])
        count = int((labels[:, 1:] >= 0).sum())
        with torch.no_grad():
            nats += float(net(torch.tensor([encoded.ids]), labels=labels).loss) * count
        tokens += count
    assert result.metrics["loss.validation"] == pytest.approx(nats / tokens, rel=1e-5)


def test_a_teacher_of_transformers_teaches_a_model_of_ours(train, foreign, world) -> None:
    result = train("distill", params={"max_steps": 30, "lr": 0.01}, teacher=foreign("gpt_neox"), student=world.model)
    assert result.metrics["kl.validation"] < result.metrics["kl.before"]
    assert result.outputs["model"].metadata["architecture"] == "llama"


def test_a_model_of_ours_teaches_one_of_transformers(train, foreign, world) -> None:
    result = train("distill", params={"max_steps": 30, "lr": 0.01}, teacher=world.model, student=foreign("gptj"))
    assert result.metrics["kl.validation"] < result.metrics["kl.before"]
    assert result.outputs["model"].metadata["architecture"] == "gptj"


def test_pretraining_goes_on_and_keeps_the_shape(train, foreign) -> None:
    from llmctl.errors import UsageError

    result = train("train-pretrain", model=foreign("gpt_neox"))
    assert result.outputs["model"].metadata["architecture"] == "gpt_neox"
    with pytest.raises(UsageError, match="dim is 64, the model to continue has 32"):
        train("train-pretrain", "other", {"dim": 64}, model=foreign("gpt_neox"))
    with pytest.raises(UsageError, match="objective prefix is of llmctl's own transformer; gpt_neox is computed by"):
        train("train-pretrain", "prefix", {"objective": "prefix"}, model=foreign("gpt_neox"))


def test_labelled_rows_are_refused(train, foreign, make_dataset) -> None:
    rows = [{"text": "The apple is red.", "label": "red"}, {"text": "The boat is blue.", "label": "blue"}]
    data = make_dataset("dataset.labelled", {"train": rows, "validation": rows})
    with pytest.raises(InputError, match="labelled rows train heads of llmctl's own transformer"):
        train("sft", model=foreign("opt"), data=data)


def test_eval_and_export_take_it(foreign, world, tmp_path) -> None:
    stages = get_registry().stages
    model = foreign("gpt_neox")
    data = {"model": model, "data": [world.tokens, world.chat, world.preference]}
    ours = run_stage(stages["eval"], tmp_path / "eval", {"limit": 4, "resamples": 100, "threads": 1}, **data)
    assert ours.metrics["backend"] == "transformers gpt_neox cpu float32"
    exported = run_stage(stages["export-onnx"], tmp_path / "onnx", {"parity_prompts": 3, "threads": 1}, model=model)
    assert exported.metrics["parity.max_abs_diff"] < 1e-4
    data["model"] = exported.outputs["model"]
    again = run_stage(stages["eval"], tmp_path / "again", {"limit": 4, "resamples": 100, "threads": 1}, **data)
    assert again.metrics["perplexity.nats"] == pytest.approx(ours.metrics["perplexity.nats"], abs=1e-4)
    assert again.metrics["exact_match.value"] == ours.metrics["exact_match.value"]


def test_prune_refuses_it(foreign, world, tmp_path) -> None:
    with pytest.raises(InputError, match="prune cuts llmctl's own transformer, and it does not compute this model"):
        run_stage(
            get_registry().stages["prune"], tmp_path, {"threads": 1}, model=foreign("opt"), calibration=world.tokens
        )


def test_what_saves_memory_reaches_foreign_models(train, weights, foreign) -> None:
    plain = train("sft", "plain", {"dropout": 0.1}, model=foreign("opt"))
    again = train("sft", "again", {"dropout": 0.1, "recompute": "full"}, model=foreign("opt"))
    assert weights(plain) == weights(again)
    chunked = train("sft", "chunked", {"dropout": 0.1, "loss_chunk": 3}, model=foreign("opt"))
    assert chunked.metrics["loss.train"] == pytest.approx(plain.metrics["loss.train"], rel=1e-4)
    assert weights(chunked) != weights(plain)  # sums in another order
    model = load_foreign(foreign("opt").path)
    kept = {}
    for mode in ("none", "full"):
        with recomputed(model, mode, 0.0):
            kept[mode] = kept_bytes(lambda: model.hidden(torch.arange(16).repeat(8, 1)).sum(), model)
    assert kept["none"] > 4 * kept["full"]
    with pytest.raises(UsageError, match="recompute selective is not possible for opt,"):
        train("sft", "selective", {"recompute": "selective"}, model=foreign("opt"))


@pytest.mark.parametrize("method", ["sequences", "on-policy"])
def test_foreign_teachers_and_students_write(train, foreign, method: str) -> None:
    model = foreign("gpt_neox")
    params = {"method": method, "max_new_tokens": 6, "max_steps": 3, "log_every": 1}
    result = train("distill", params=params, teacher=model, student=model)
    if method == "on-policy":
        # A student that is its own teacher has nothing to learn, whatever it writes.
        assert result.curve("loss")[0][1] == pytest.approx(0, abs=1e-6)
    else:
        assert result.metrics["answers"] == 24


def test_a_foreign_models_layers_cannot_be_looked_into(train, foreign) -> None:
    with pytest.raises(UsageError, match="cannot be looked into") as error:
        train("distill", params={"method": "hidden"}, teacher=foreign("opt"))
    assert "logits" in (error.value.hint or "")
