"""Structured pruning: smaller in fact, equal to masking, better than chance on a model that has learned something."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace

import numpy as np
import pytest

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
torch = pytest.importorskip("torch")

import transformers  # noqa: E402
from pydantic import ValidationError  # noqa: E402

from llmctl.errors import InputError, UsageError  # noqa: E402
from llmctl.nn.hf import load_model, save_model  # noqa: E402
from llmctl.nn.transformer import Transformer  # noqa: E402
from llmctl.stage import Artifact  # noqa: E402
from llmctl.testing import run_stage  # noqa: E402
from llmctl.train.batches import Example, pack  # noqa: E402
from llmctl_prune import PRUNE  # noqa: E402
from llmctl_prune import importance as importance_module  # noqa: E402
from llmctl_prune.importance import block_influence, channel_activation, channel_magnitude, streams  # noqa: E402
from llmctl_prune.params import PruneParams  # noqa: E402
from llmctl_prune.surgery import best, keep_channels, remove_layer, width_kept  # noqa: E402

from .conftest import CONTEXT, VOCAB, sequences  # noqa: E402


@pytest.mark.parametrize("arch", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_pruned_logits_equal_masked_logits(arch, trained):
    dense = load_model(trained(arch).path)
    masked, pruned = copy.deepcopy(dense), copy.deepcopy(dense)
    kept = torch.arange(0, 160, 2)
    gone = torch.arange(1, 160, 2)
    with torch.no_grad():
        for ours, theirs in zip(pruned.blocks, masked.blocks, strict=True):
            keep_channels(ours.ffn, kept)
            theirs.ffn.down.weight[:, gone] = 0
        removed = masked.blocks[1]  # a layer that writes nothing is no layer
        for linear in (removed.attention.out, removed.ffn.down):
            torch.nn.init.zeros_(linear.weight)
            if linear.bias is not None:
                torch.nn.init.zeros_(linear.bias)
        pruned.config = replace(pruned.config, ff_dim=80)
        remove_layer(pruned, 1)
        tokens = sequences(dense)
        torch.testing.assert_close(pruned(tokens), masked(tokens), rtol=0, atol=1e-5)
        assert (pruned(tokens) - dense(tokens)).abs().max() > 0.1
    assert pruned.config.parameters() == sum(p.numel() for p in pruned.parameters())
    assert pruned.config.parameters() < 0.65 * dense.config.parameters()


@pytest.mark.parametrize("arch", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["tokens", "chat"])
def test_the_stage_writes_a_smaller_model_that_transformers_loads(arch, kind, trained, request, tmp_path):
    data = request.getfixturevalue(kind)
    model = trained(arch)
    params = {"mlp_width_removed": 0.5, "layers_removed": 1, "calibration_tokens": 4000, "evaluation_tokens": 4000}
    result = run_stage(PRUNE, tmp_path / "a", params, model=model, calibration=data)
    metrics, directory = result.metrics, result.outputs["model"].path
    pruned, dense = load_model(directory), load_model(model.path)
    assert (pruned.config.layers, pruned.config.ff_dim, pruned.config.kv_heads) == (2, 80, dense.config.kv_heads)
    count = sum(p.numel() for p in pruned.parameters())
    assert metrics["parameters"] == count == pruned.config.parameters()
    assert metrics["parameters.before"] == dense.config.parameters()
    assert metrics["parameters.removed"] == pytest.approx(1 - count / dense.config.parameters())
    assert metrics["bytes"] == (directory / "model.safetensors").stat().st_size
    assert metrics["bytes"] < (model.path / "model.safetensors").stat().st_size * 0.7
    assert 0.5 < metrics["loss.before"] < metrics["loss.after"] < np.log(VOCAB)
    assert result.outputs["model"].metadata["parameters"] == count
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(sequences(pruned)).logits, pruned(sequences(pruned)), rtol=0, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(directory).eos_token == "<|end|>"
    steps = [event for event, fields in result.events if event == "progress"]
    assert len(steps) == 3  # a layer, then two blocks
    # Equal inputs and parameters give equal bytes.
    again = run_stage(PRUNE, tmp_path / "b", params, model=model, calibration=data)
    for path in sorted(directory.iterdir()):
        assert path.read_bytes() == (again.outputs["model"].path / path.name).read_bytes()


def loss_after(trained, tokens, tmp_path, arch="llama", **params) -> float:
    settings = {"calibration_tokens": 8000, **params}
    name = "-".join(f"{value}" for value in params.values())
    return run_stage(PRUNE, tmp_path / name, settings, model=trained(arch), calibration=tokens).metrics["loss.after"]


@pytest.mark.parametrize(("arch", "margin"), [("llama", 0.2), pytest.param("gpt2", 0.05, marks=pytest.mark.slow)])
def test_importance_beats_chance_in_width(arch, margin, trained, tokens, tmp_path):
    def loss(importance, seed=0):
        return loss_after(
            trained, tokens, tmp_path, arch, importance=importance, seed=seed, mlp_width_removed=0.5, layers_removed=0
        )

    chance = min(loss("random", seed) for seed in range(3))
    assert loss("activation") < chance - margin
    assert loss("magnitude") < chance - margin


def test_importance_beats_chance_in_depth(trained, tokens, tmp_path):
    model = load_model(trained("llama").path)
    found = {}
    for layer in range(3):  # what removing each one costs
        cut = copy.deepcopy(model)
        remove_layer(cut, layer)
        save_model(cut, tmp_path / f"cut{layer}", trained("llama").path)
        settings = {"mlp_width_removed": 0.01, "calibration_tokens": 2000}  # rounds to no width at all
        source = Artifact(tmp_path / f"cut{layer}", "model.hf")
        result = run_stage(PRUNE, tmp_path / f"out{layer}", settings, model=source, calibration=tokens)
        assert result.metrics["parameters.removed"] == 0
        assert any(kind == "warning" and "removes nothing" in fields["text"] for kind, fields in result.events)
        found[layer] = result.metrics["loss.after"]
    chosen = loss_after(trained, tokens, tmp_path, importance="activation", mlp_width_removed=0.0, layers_removed=1)
    assert chosen in found.values()
    assert chosen < sum(found.values()) / 3 - 0.2


def batch_of(model: Transformer) -> list:
    rng = np.random.default_rng(1)
    examples = [Example(rng.integers(0, VOCAB, size=n).astype(np.int64), np.ones(n, bool)) for n in (40, 17, 30, 9, 25)]
    return [pack(examples, CONTEXT)]


def test_activation_score_by_hand(trained):
    model = load_model(trained("llama").path)
    batch = batch_of(model)[0]
    caught = {}
    hook = model.blocks[0].ffn.down.register_forward_pre_hook(lambda _, args: caught.update(x=args[0]))
    with torch.no_grad():
        model(batch.tokens, positions=batch.positions, documents=batch.documents)
        score = channel_activation(model.blocks[0], streams(model, [batch]))
    hook.remove()
    real = batch.documents >= 0
    assert not real.all()  # padding must not count
    inner = caught["x"][real].double()
    expected = inner.abs().mean(0) * model.blocks[0].ffn.down.weight.double().norm(dim=0)
    torch.testing.assert_close(score, expected.detach(), rtol=1e-5, atol=0)


def test_block_influence_by_hand(trained):
    model = load_model(trained("gpt2").path)
    batch = batch_of(model)[0]
    seen = []
    hooks = [block.register_forward_hook(lambda _, args, out: seen.append((args[0], out))) for block in model.blocks]
    with torch.no_grad():
        model(batch.tokens, positions=batch.positions, documents=batch.documents)
        real = batch.documents >= 0
        expected = [float(1 - torch.cosine_similarity(a[real], b[real], dim=-1).mean()) for a, b in seen]
        for hook in hooks:
            hook.remove()
        assert block_influence(model, [batch]) == pytest.approx(expected, rel=1e-4)


def test_magnitude_does_not_see_a_scale_moved_from_one_matrix_to_the_next(trained):
    model = load_model(trained("llama").path)
    ffn = model.blocks[0].ffn
    before = channel_magnitude(ffn)
    with torch.no_grad():
        ffn.up.weight[5] *= 30
        ffn.down.weight[:, 5] /= 30
    torch.testing.assert_close(channel_magnitude(ffn), before, rtol=1e-5, atol=0)


def test_each_block_is_measured_on_what_the_pruned_ones_compute(trained, tokens, tmp_path, monkeypatch):
    """The control calibrates through the dense prefix and gets other inputs."""
    entering = []
    original = importance_module.channel_activation

    def spy(block, flow):
        entering.append(flow[0].x.clone())
        return original(block, flow)

    monkeypatch.setattr("llmctl_prune.structured.channel_activation", spy)
    settings = {"calibration_tokens": 2000, "mlp_width_removed": 0.5}
    result = run_stage(PRUNE, tmp_path, settings, model=trained("llama"), calibration=tokens)
    pruned = load_model(result.outputs["model"].path)
    dense = load_model(trained("llama").path)
    from llmctl_prune.calibration import batches

    batch = batches(
        tokens, "train", trained("llama").path, context=CONTEXT, vocab_size=VOCAB, tokens=2000, seed=0, every_token=True
    )[0]
    with torch.no_grad():
        for model, equal in ((pruned, True), (dense, False)):
            flow = streams(model, [batch])[0]
            x = model.blocks[1](model.blocks[0](flow.x, flow.context), flow.context)
            assert torch.allclose(entering[2], x, atol=1e-5) is equal


@pytest.mark.parametrize(
    ("ff_dim", "removed", "kept"), [(512, 0.45, 288), (80, 0.3, 56), (160, 0.99, 8), (6, 0.5, 6), (100, 0.01, 100)]
)
def test_width_is_a_multiple_of_eight_and_never_grows(ff_dim, removed, kept):
    assert width_kept(ff_dim, removed) == kept


def test_best_keeps_the_order_and_breaks_ties_by_place():
    assert best(torch.tensor([1.0, 5.0, 1.0, 3.0]), 3).tolist() == [0, 1, 3]


def test_settings_that_cannot_be():
    with pytest.raises(ValidationError, match="nothing to remove"):
        PruneParams(mlp_width_removed=0.0)
    with pytest.raises(ValidationError):
        PruneParams(mlp_width_removed=1.0)


def test_what_a_user_gets_wrong(trained, tokens, chat, tmp_path):
    model = trained("llama")
    with pytest.raises(UsageError, match="leaves nothing of the model's 3 layers"):
        run_stage(PRUNE, tmp_path / "a", {"layers_removed": 3}, model=model, calibration=tokens)
    meta = json.loads((tokens.path / "meta.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for path in tokens.path.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "meta.json").write_text(json.dumps({**meta, "tokenizer": "sha256:0"}))
    with pytest.raises(InputError, match="made with another tokenizer"):
        run_stage(PRUNE, tmp_path / "b", {}, model=model, calibration=Artifact(other, "dataset.tokens"))
    (tmp_path / "text.jsonl").write_text('{"text": "no chat"}\n')
    with pytest.raises(InputError, match="without `messages`"):
        run_stage(PRUNE, tmp_path / "c", {}, model=model, calibration=Artifact(tmp_path / "text.jsonl", "dataset.chat"))


def test_without_a_validation_split_it_says_what_it_measured(trained, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 20}]}] * 5
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_stage(
        PRUNE, tmp_path / "out", {"threads": 1}, model=trained("llama"), calibration=Artifact(file, "dataset.chat")
    )
    warnings = [fields["text"] for kind, fields in result.events if kind == "warning"]
    assert any("no validation split" in text for text in warnings)
