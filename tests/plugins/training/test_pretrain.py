from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llmctl.errors import InputError, UsageError
from llmctl.nn.hf import load_model
from llmctl.stage import Artifact
from llmctl.text.shards import TokenShards
from llmctl.text.tokenizer import Tokenizer
from llmctl.train.data import TokenSource
from llmctl.train.objectives import CausalLM
from llmctl_train_pretrain.params import PretrainParams
from llmctl_train_pretrain.run import validator


def test_the_shape_is_what_was_asked_for(train) -> None:
    result = train("train-pretrain", params={"max_steps": 1, "tie_embeddings": False, "rope_theta": 5000.0})
    config = load_model(result.outputs["model"].path).config
    assert (config.dim, config.layers, config.heads, config.kv_heads, config.ff_dim, config.context) == (
        32, 2, 4, 2, 64, 48,
    )  # fmt: skip
    assert config.vocab_size == 300 and not config.tie_embeddings and config.rope_theta == 5000
    assert (config.bos_id, config.eos_id, config.pad_id) == (0, 1, 2)
    assert result.metrics["parameters"] == config.parameters()


def test_what_scaling_laws_count_is_reported(train) -> None:
    result = train("train-pretrain", params={"max_steps": 3, "tie_embeddings": False})
    tensors = load_model(result.outputs["model"].path).state_dict()
    blocks = sum(tensor.numel() for name, tensor in tensors.items() if tensor.shape[0] != 300)
    assert result.metrics["parameters.without_embedding"] == blocks
    assert result.metrics["parameters.with_head"] == blocks + 300 * 32
    assert result.metrics["parameters"] == blocks + 2 * 300 * 32
    more = train("train-pretrain", "more", {"max_steps": 6, "tie_embeddings": False})
    assert more.metrics["epochs"] == pytest.approx(2 * result.metrics["epochs"])


@pytest.mark.parametrize("preset", ["llama", "qwen3", "gpt2"])
def test_presets(train, preset: str) -> None:
    heads = {"heads": 4, "kv_heads": 4}
    result = train("train-pretrain", params={"max_steps": 2, "preset": preset, **heads})
    assert load_model(result.outputs["model"].path).config.arch == preset
    assert result.metrics["objective"] == "causal"


def test_it_learns_and_measures_in_bits_per_byte(train, world) -> None:
    result = train("train-pretrain", params={"max_steps": 150, "embedding_lr": 0.01})
    losses = [value for _, value in result.curve("loss")]
    assert losses[0] > 4 and losses[-1] < 1
    # Independently: every byte of the split's text, every nat of its ordinary tokens, one document at a time.
    shards, tokenizer = TokenShards.open(world.tokens), Tokenizer.load(world.tokenizer.path)
    model = load_model(result.outputs["model"].path).eval()
    split = shards.split("validation")
    source = TokenSource(split, 48, PretrainParams())
    nats = 0.0
    for batch in source.sweep():
        with torch.no_grad():
            logs = model(batch.tokens, batch.positions, batch.documents).log_softmax(-1)
        losses = -logs.flatten(0, 1)[batch.picks].gather(1, batch.targets[:, None])[:, 0]
        nats += float(losses[batch.targets > 5].sum())
    assert split.bytes == sum(np.array(tokenizer.token_bytes())[np.asarray(split.tokens)])
    assert result.metrics["bpb.validation"] == pytest.approx(nats / split.bytes / np.log(2), rel=1e-5)


def test_the_loss_is_the_mean_of_minus_log_p_by_transformers_in_float64(train, world) -> None:
    """The command's own number from its model and tokens alone: every document by itself, no mask, no packing."""
    from transformers import AutoModelForCausalLM

    result = train("train-pretrain", params={"max_steps": 20})
    model = AutoModelForCausalLM.from_pretrained(result.outputs["model"].path, dtype=torch.float64).eval()
    losses, sums = [], []
    for batch in TokenSource(TokenShards.open(world.tokens).split("validation"), 48, PretrainParams()).sweep():
        logs = torch.zeros(*batch.tokens.shape, 300, dtype=torch.float64)
        for row, (tokens, documents) in enumerate(zip(batch.tokens, batch.documents, strict=True)):
            for document in documents.unique():
                place = documents == document
                with torch.no_grad():
                    logs[row, place] = model(tokens[place][None]).logits[0].log_softmax(-1)
        chosen = logs.flatten(0, 1)[batch.picks]
        losses.append(-chosen.gather(1, batch.targets[:, None])[:, 0])
        sums.append(torch.logsumexp(chosen, -1).abs().max())
    assert max(sums) < 1e-12  # they are logarithms of probabilities
    expected = float(torch.cat(losses).mean())
    assert result.metrics["loss.validation"] == pytest.approx(expected, rel=2e-6)
    assert expected < np.log(300) - 0.5


def test_it_continues_from_a_model(train, world, weights) -> None:
    more = train("train-pretrain", "more", {"lr": 1e-4}, model=world.model)
    fresh = train("train-pretrain", "fresh", {"lr": 1e-4})
    assert more.curve("loss")[0][1] < fresh.curve("loss")[0][1] - 0.5
    short = train("train-pretrain", "short", {"context": 16}, model=world.model)
    assert load_model(short.outputs["model"].path).config.context == 48
    with pytest.raises(UsageError, match="dim is 64, the model to continue has 32"):
        train("train-pretrain", "other", {"dim": 64}, model=world.model)


def test_tokens_of_another_tokenizer_are_refused(train, world, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(world.tokenizer.path, other)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    with pytest.raises(InputError, match="was made with the tokenizer") as error:
        train("train-pretrain", tokenizer=Artifact(other, "tokenizer"))
    assert "same `tokenize` stage" in (error.value.hint or "")


def test_a_model_of_another_vocabulary_is_refused(train, world, tmp_path: Path) -> None:
    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer

    config = ModelConfig(arch="llama", vocab_size=310, dim=16, layers=1, heads=2, context=48)
    save_model(Transformer(config), tmp_path / "wide", tokenizer_from=world.tokenizer.path)
    with pytest.raises(InputError, match="has a vocabulary of 310, the tokens one of 300"):
        train("train-pretrain", model=Artifact(tmp_path / "wide", "model.hf"))


def test_without_a_validation_split_there_is_no_validation(world) -> None:
    shards = TokenShards.open(world.tokens)
    del shards.meta["splits"]["validation"]
    config, tokenizer = load_model(world.model.path).config, Tokenizer.load(world.tokenizer.path)
    assert validator("causal", [shards], tokenizer, config, PretrainParams()) is None


def test_packing_none_trains_too(train) -> None:
    packed, alone = train("train-pretrain", "a"), train("train-pretrain", "b", {"packing": "none"})
    assert alone.curve("loss") != packed.curve("loss")
    assert alone.metrics["loss.train"] < alone.curve("loss")[0][1]


@pytest.mark.slow
def test_targets_from_another_document_stay_at_unigram_entropy(tmp_path: Path) -> None:
    """D1's control: what is learned is the text, and not something the targets leak."""
    from llmctl.nn.config import ModelConfig
    from llmctl.nn.transformer import Transformer
    from llmctl.stage import Context
    from llmctl.text.shards import ShardWriter
    from llmctl.train.loop import fit
    from llmctl.train.params import TrainParams

    rng = np.random.default_rng(0)
    step = rng.permutation(16)
    documents = []
    for _ in range(400):
        ids = [int(rng.integers(16))]
        for _ in range(31):
            ids.append(int(step[ids[-1]]) if rng.random() < 0.9 else int(rng.integers(16)))
        documents.append(ids)
    with ShardWriter(tmp_path / "tokens", vocab_size=16, tokenizer="") as writer:
        for ids in documents:
            writer.add("train", ids, 32)
    split = TokenShards.open(tmp_path / "tokens").split("train")

    class Strangers(CausalLM):
        """Every row is asked for the next row's tokens."""

        def loss(self, model, batch):
            import dataclasses

            rows = batch.targets.view(len(batch.tokens), -1).roll(1, 0)
            return super().loss(model, dataclasses.replace(batch, targets=rows.flatten()))

    found = {}
    for objective in (CausalLM(), Strangers()):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(arch="llama", vocab_size=16, dim=32, layers=2, heads=4, context=32, ff_dim=64))
        values = TrainParams(max_steps=150, batch_size=16, packing="none", embedding_lr=0.01)
        ctx = Context("test", {}, tmp_path / type(objective).__name__, lambda kind, fields: None)
        found[type(objective)] = fit(ctx, model, objective, TokenSource(split, 32, values), values)["loss.train"]
    counts = np.bincount(np.concatenate(documents), minlength=16) / (400 * 32)
    entropy = float(-(counts * np.log(counts)).sum())
    assert found[CausalLM] < 0.4 * entropy
    assert found[Strangers] > 0.97 * entropy


def test_datasets_are_mixed_and_reported(train, world, tmp_path: Path) -> None:
    other = Artifact(shutil.copytree(world.tokens.path, tmp_path / "other"), "dataset.tokens")
    mixed = {"weights": [3, 1], "names": ["own", "copied"]}
    result = train("train-pretrain", params={"mixture": mixed, "max_steps": 40}, tokens=[world.tokens, other])
    assert result.metrics["tokens.share.own"] == pytest.approx(0.75, abs=0.01)
    assert result.metrics["epochs.own"] == pytest.approx(3 * result.metrics["epochs.copied"], rel=0.05)
    assert result.metrics["loss.validation.own"] == pytest.approx(result.metrics["loss.validation.copied"])
    with pytest.raises(UsageError, match="mixture.weights has 2 entries for 1 inputs `tokens`"):
        train("train-pretrain", "one", {"mixture": mixed})
    with pytest.raises(UsageError, match="mixture has no effect with one input"):
        train("train-pretrain", "few", {"mixture": {"alpha": 0.5}})


def test_of_several_datasets_the_odd_one_out_is_named(train, world, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(world.tokens.path, odd)
    (odd / "meta.json").write_text((odd / "meta.json").read_text().replace('"sha256:', '"sha256:0'))
    with pytest.raises(InputError, match=f"{odd} was made with the tokenizer"):
        train("train-pretrain", tokens=[world.tokens, Artifact(odd, "dataset.tokens")])


@pytest.mark.parametrize("packing", ["best-fit", "crop"])
def test_packing_reports_what_it_costs(train, packing: str) -> None:
    result = train("train-pretrain", params={"packing": packing, "document_mask": False})
    plain = train("train-pretrain", "plain")
    assert plain.metrics["targets.dropped"] == 0 and plain.metrics["documents.cut"] > 0.5
    assert (result.metrics["targets.dropped"] > 0) == (packing == "crop")
    assert result.metrics["rows.filled"] > 0.8


def test_packing_that_has_no_effect_is_refused(train) -> None:
    for params, message in (
        ({"preset": "bert", "packing": "crop"}, "packing crop is of objective causal"),
        ({"objective": "prefix", "document_mask": False}, "document_mask has no effect"),
    ):
        with pytest.raises(UsageError, match=message):
            train("train-pretrain", params=params)
    with pytest.raises(ValueError, match="no effect with packing: none"):
        PretrainParams(packing="none", document_mask=False)
