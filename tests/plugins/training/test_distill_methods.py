"""Distillation of sequences, of hidden states, and on-policy."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from llmctl.errors import TempFail, UsageError
from llmctl.generator import Sampling
from llmctl.nn.config import ModelConfig
from llmctl.nn.hf import load_model, save_model
from llmctl.nn.transformer import Transformer
from llmctl.stage import Artifact, Context
from llmctl.store import Store
from llmctl.text.datasets import read_rows
from llmctl.text.tokenizer import Tokenizer
from llmctl.train.batches import Example, pack
from llmctl.train.generate import TorchGenerator
from llmctl.train.objectives import WritingObjective
from llmctl_distill.hidden import HiddenDistillation, add_projections
from llmctl_distill.layers import layer_pairs
from llmctl_distill.losses import LogitDistillation
from llmctl_distill.on_policy import OnPolicyDistillation, PromptSource
from llmctl_distill.params import DistillParams
from llmctl_distill.relations import RelationLoss, relation_heads
from llmctl_distill.sequences import Question, write_answers
from llmctl_distill.writing import sampling

FAST = {"max_steps": 8, "save_every": 5, "warmup_steps": 2, "threads": 1}
LEARN = {"max_steps": 60, "batch_size": 12, "lr": 0.01, "embedding_lr": 0.005, "log_every": 20, "max_new_tokens": 12}
SHAPE = {"arch": "llama", "vocab_size": 50, "dim": 32, "layers": 4, "heads": 4, "context": 64, "eos_id": 1}


def make(seed: int = 0, **shape) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(ModelConfig(**{**SHAPE, **shape})).double()


def conversations(count: int, seed: int = 3) -> list[tuple[list[int], Example]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ids = rng.integers(2, 50, int(rng.integers(6, 24)))
        prompt = ids[: int(rng.integers(2, 5))].tolist()
        found.append((prompt, Example(ids, np.arange(len(ids)) >= len(prompt))))
    return found


def gradient(objective, model: Transformer, parts) -> list[torch.Tensor]:
    """Of the mean over the targets of all parts, as the loop takes it."""
    weight = sum(objective.weight(batch) for batch in parts)
    model.zero_grad()
    for batch in parts:
        (objective.loss(model, batch)[0] / weight).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def apart(one, other) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


# -- parameters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"beta": 0.5}, "beta is of the divergence jsd, not of forward-kl"),
        ({"alpha": 1.0, "divergence": "jsd"}, "alpha 1 leaves the teacher's distributions out"),
        ({"layer_map": [1]}, "layer_map is of the method hidden, not of logits"),
        ({"hidden_loss": "mse"}, "hidden_loss is of the method hidden, not of logits"),
        ({"hidden_weight": 2.0}, "hidden_weight is of the method hidden, not of logits"),
        ({"relations": "values"}, "relations is of the method hidden, not of logits"),
        ({"relation_weight": 2.0}, "relation_weight is of the method hidden, not of logits"),
        ({"on_policy_share": 0.3}, "on_policy_share is of the method on-policy, not of logits"),
        ({"max_new_tokens": 9}, "max_new_tokens is of the method sequences or on-policy, not of logits"),
        ({"sampling_temperature": 0.5}, "sampling_temperature is of the method sequences or on-policy, not of"),
        ({"top_k": 4}, "top_k is of the method sequences or on-policy, not of logits"),
        ({"top_p": 0.5}, "top_p is of the method sequences or on-policy, not of logits"),
        ({"beams": 3}, "beams is of the method sequences, not of logits"),
        ({"method": "sequences", "temperature": 2.0}, "temperature is of the method logits or hidden or on-policy"),
        ({"method": "sequences", "alpha": 0.5}, "alpha is of the method logits or hidden, not of sequences"),
        ({"method": "sequences", "divergence": "jsd"}, "divergence is of the method logits or hidden or on-policy"),
        ({"method": "sequences", "top_k": 5}, "sampling_temperature 0 draws none"),
        ({"method": "sequences", "beams": 2, "sampling_temperature": 1.0}, "draws at random, beams do not"),
        ({"method": "on-policy", "alpha": 0.5}, "alpha is of the method logits or hidden, not of on-policy"),
        ({"method": "on-policy", "beams": 2}, "beams is of the method sequences, not of on-policy"),
        ({"method": "on-policy", "sampling_temperature": 0.0, "top_p": 0.5}, "sampling_temperature 0 draws none"),
        ({"method": "on-policy", "compile": True}, "compile does not go with the method on-policy"),
        ({"method": "on-policy", "precision": "fp8"}, "precision fp8 does not go with the method on-policy"),
        ({"method": "on-policy", "parallel": {"tp": 2}}, "of parallel only dp_replicate goes with it"),
        ({"method": "hidden", "parallel": {"dp_shard": 2}}, "of parallel only dp_replicate goes with it"),
        ({"method": "hidden", "relation_weight": 2.0}, "relation_weight weighs relations, of which there are none"),
        ({"method": "hidden", "hidden_weight": 0.0}, "that is the method logits"),
        (
            {"method": "hidden", "hidden_weight": 0.0, "relations": "values", "hidden_loss": "mse"},
            "drop hidden_loss",
        ),
        ({"method": "hidden", "layer_map": [0, 0]}, "names no layer"),
        ({"method": "hidden", "layer_map": [-1, 2]}, "names no layer"),
    ],
)
def test_a_parameter_without_effect_is_refused_by_its_name(given, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        DistillParams(**given)


@pytest.mark.parametrize("method", ["logits", "sequences", "hidden", "on-policy"])
def test_defaults_fit_every_method_and_leave_old_keys_alone(method: str) -> None:
    from llmctl.spec.key_params import key_params

    assert DistillParams(method=method).outputs() == {"model", "metrics"} | (
        {"answers"} if method == "sequences" else set()
    )
    assert key_params(DistillParams(method=method)) == ({} if method == "logits" else {"method": method})


# -- sequences ---------------------------------------------------------------------------------------------------------


def said(result) -> list[str]:
    return [row["messages"][-1]["content"] for row in read_rows(result.outputs["answers"], "train")]


def test_the_student_learns_what_the_teacher_wrote(train, world, teacher, student) -> None:
    params = {**LEARN, "method": "sequences"}
    result = train("distill", "kd", params, teacher=teacher, student=student)
    assert result.metrics["kl.validation"] < 0.6 * result.metrics["kl.before"]
    rows = list(read_rows(result.outputs["answers"], "train"))
    asked = list(read_rows(world.chat, "train"))
    assert [row["messages"][:-1] for row in rows] == [row["messages"][:-1] for row in asked]
    assert result.metrics["answers"] == len(rows) == result.outputs["answers"].metadata["rows"]
    assert result.metrics["answers.ended"] == sum(row["ended"] for row in rows) / len(rows)
    # Greedy: what the torch generator says to each prompt alone.
    tokenizer, generator = Tokenizer.load(teacher.path), TorchGenerator(load_model(teacher.path).eval())
    for row in rows[:4]:
        prompt = tokenizer.encode_chat(row["messages"][:-1], add_generation_prompt=True).ids
        ids = list(generator.stream(prompt, Sampling(max_new_tokens=12)))
        assert row["messages"][-1] == {"role": "assistant", "content": tokenizer.decode(ids)}


def test_the_datas_own_answers_are_not_looked_at(train, world, weights, make_dataset, teacher, student) -> None:
    rows = list(read_rows(world.chat, "train"))
    bare = make_dataset("dataset.chat", {"train": [{"messages": row["messages"][:-1]} for row in rows]}, "bare")
    full = make_dataset("dataset.chat", {"train": [{"messages": row["messages"]} for row in rows]}, "full")
    params = {**LEARN, "max_steps": 4, "method": "sequences"}
    found = [
        train("distill", name, params, teacher=teacher, student=student, data=data)
        for name, data in (("bare", bare), ("full", full))
    ]
    assert said(found[0]) == said(found[1]) and weights(found[0]) == weights(found[1])
    # Distilling logits needs answers to stand at.
    from llmctl.errors import StageError

    with pytest.raises(StageError, match="without an answer"):
        train("distill", "logits", {"max_steps": 2}, teacher=teacher, student=student, data=bare)


def test_how_answers_are_chosen_is_up_to_the_parameters_and_the_seed(train, world, student) -> None:
    """The world's model is unsure of everything, so that every way of choosing says something else."""
    fast = {"max_steps": 1, "method": "sequences", "max_new_tokens": 8}

    def run(name: str, **params) -> list[str]:
        return said(train("distill", name, {**fast, **params}, student=student))

    drawn = {"sampling_temperature": 1.0}
    found = {
        "greedy": run("a"),
        "beams": run("b", beams=3),
        "drawn": run("c", **drawn),
        "seed": run("d", **drawn, seed=1),
        "cool": run("e", sampling_temperature=0.3),
        "top_k": run("f", **drawn, top_k=3),
        "top_p": run("g", **drawn, top_p=0.5),
        "short": run("h", max_new_tokens=2),
    }
    assert len({json.dumps(answers) for answers in found.values()}) == len(found)
    assert run("c2", **drawn) == found["drawn"]
    assert run("k1", **drawn, top_k=1) == found["greedy"]
    assert len(set(found["drawn"])) > 12  # each prompt draws for itself


def test_a_stopped_run_goes_on_behind_what_was_written(train, teacher, student, weights, monkeypatch) -> None:
    from llmctl_distill import sequences

    monkeypatch.setattr(sequences, "AT_ONCE", 5)
    params = {**LEARN, "max_steps": 4, "method": "sequences", "sampling_temperature": 1.0}
    given = {"teacher": teacher, "student": student}
    straight = train("distill", "straight", params, **given)
    with pytest.raises(TempFail):
        train("distill", "stopped", params, stop_after=3, **given)
    asked: list[int] = []
    original = TorchGenerator.answers
    monkeypatch.setattr(
        TorchGenerator,
        "answers",
        lambda self, prompts, *rest: asked.append(len(prompts)) or original(self, prompts, *rest),
    )
    resumed = train("distill", "stopped", params, **given)
    assert sum(asked) == 24 - 2 * 5
    assert said(resumed) == said(straight) and weights(resumed) == weights(straight)
    # Answers of other parameters are no answers of this run.
    asked.clear()
    train("distill", "stopped", {**params, "seed": 1}, **given)
    assert sum(asked) == 24


def test_a_process_that_waits_for_answers_can_be_stopped(tmp_path) -> None:
    waiting = Context("distill", {}, tmp_path, lambda *_: None, stop=lambda: True)
    with pytest.raises(TempFail, match="stopped"):
        write_answers(waiting, [Question({}, [1, 2])], None, DistillParams(method="sequences"), "teacher")


# -- on-policy ---------------------------------------------------------------------------------------------------------


def test_the_student_comes_closer_on_what_it_writes_itself(train, teacher, student) -> None:
    params = {**LEARN, "method": "on-policy", "on_policy_share": 0.5, "divergence": "jsd"}
    result = train("distill", "own", params, teacher=teacher, student=student)
    assert result.metrics["kl.validation"] < 0.6 * result.metrics["kl.before"]
    shares = [value for _, value in result.curve("on_policy")]
    assert 0.2 < sum(shares) / len(shares) < 0.8
    assert any("the student's own: " in fields["text"] for kind, fields in result.events if kind == "log")


def test_all_or_some_of_the_steps_are_the_students_own(train, student) -> None:
    def shares(name: str, share: float) -> list[float]:
        params = {"method": "on-policy", "on_policy_share": share, "log_every": 1, "max_new_tokens": 6}
        return [value for _, value in train("distill", name, params, student=student).curve("on_policy")]

    assert shares("all", 1.0) == [1.0] * 12
    some = shares("some", 0.4)
    assert set(some) == {0.0, 1.0}  # a step is one or the other
    assert shares("again", 0.4) == some


def on_policy(teacher: Transformer, **params) -> OnPolicyDistillation:
    values = DistillParams(method="on-policy", max_new_tokens=10, on_policy_share=1.0, **params)
    return OnPolicyDistillation(teacher, values.temperature, beta=values.mixture, params=values, length=64)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_gradient_is_that_of_the_same_answers_given_as_data(beta: float) -> None:
    """The paper's L_OD: its samples are constants."""
    teacher, model = make(0).eval(), make(1)
    objective = on_policy(teacher, divergence="jsd", beta=beta)
    source = PromptSource(conversations(6), 64, objective.params)
    batch = source.batch([(0, place) for place in range(6)])
    (written,) = objective.write(model, 0, [batch])
    assert written.written and written.prompts == batch.prompts
    found = gradient(objective, model, [written])

    # By hand: draw token after token from the student's softmax, as transformers does, and compare as data.
    rows = []
    for prompt, place in zip(batch.prompts, batch.places, strict=True):
        random = torch.Generator().manual_seed(sampling(objective.params, *place).seed)
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(10):
                share = model.eval()(torch.tensor([ids]))[0, -1].float().softmax(-1)
                ids.append(int(torch.multinomial(share, 1, generator=random)))
                if ids[-1] == 1:
                    break
        rows.append(Example(np.asarray(ids), np.arange(len(ids)) >= len(prompt)))
    model.train()
    as_data = pack(rows, 64)
    assert torch.equal(as_data.targets, written.targets) and torch.equal(as_data.tokens, written.tokens)
    assert apart(found, gradient(LogitDistillation(teacher, beta=beta), model, [as_data])) <= 1e-12
    # The controls: the other direction, and the data's own answers, are other gradients.
    if beta != 0.5:
        assert apart(found, gradient(LogitDistillation(teacher, beta=1 - beta), model, [as_data])) > 1e-4
    assert apart(found, gradient(objective, model, [batch])) > 1e-4


def test_what_is_written_does_not_depend_on_how_a_step_is_split() -> None:
    teacher, model = make(0).eval(), make(1)
    objective = on_policy(teacher)
    values = objective.params.model_copy(update={"batch_size": 8})
    source = PromptSource(conversations(20), 64, values)
    whole = objective.write(model, 3, source.micro_batches(3))
    ranks = [objective.write(model, 3, source.micro_batches(3, rank, 2)) for rank in range(2)]
    source.at_once = 3
    parts = objective.write(model, 3, source.micro_batches(3))
    assert len(parts) == 3
    reference = gradient(objective, model, whole)
    assert apart(reference, gradient(objective, model, parts)) <= 1e-12
    assert apart(reference, gradient(objective, model, [batch for share in ranks for batch in share])) <= 1e-12
    # Another step has other places, and so other answers even to the same prompts.
    again = [replace(batch, places=tuple((epoch + 1, place) for epoch, place in batch.places)) for batch in whole]
    assert not torch.equal(objective.write(model, 3, again)[0].targets, whole[0].targets)


def test_the_loop_knows_an_objective_that_writes_and_trains_on_weights_as_they_are() -> None:
    teacher, model = make(0).eval(), make(1)
    objective = on_policy(teacher)
    assert isinstance(objective, WritingObjective) and not isinstance(LogitDistillation(teacher), WritingObjective)
    batch = PromptSource(conversations(4), 64, objective.params).batch([(0, place) for place in range(4)])
    model.train()
    first = objective.write(model, 0, [batch])[0]
    assert model.training
    with torch.no_grad():
        model.head_weight.add_(torch.randn_like(model.head_weight))
    assert not torch.equal(first.targets, objective.write(model, 0, [batch])[0].targets)


def test_a_longer_writer_is_cut_where_the_other_ends_and_the_heaviest_batch_is_as_long_as_it_gets() -> None:
    objective = on_policy(make(0, context=24).eval())
    objective = replace(
        objective, length=24, params=objective.params.model_copy(update={"max_new_tokens": 60, "batch_size": 4})
    )
    rows = [(prompt, made) for prompt, made in conversations(4)]
    source = PromptSource(rows, 24, objective.params)
    (written,) = objective.write(make(1), 0, [source.batch([(0, place) for place in range(4)])])
    assert written.tokens.shape[1] <= 24
    assert objective.loss(make(1), written)[0].isfinite()
    assert source.heaviest().size == 24 * 4 - 4  # ids that are only predicted are not read


@pytest.mark.parametrize("method", ["sequences", "on-policy"])
def test_token_shards_have_no_prompts(train, world, method: str) -> None:
    with pytest.raises(UsageError, match=f"the method {method} writes answers to prompts") as error:
        train("distill", params={"method": method}, data=world.tokens)
    assert "dataset.chat" in (error.value.hint or "")


# -- hidden states -----------------------------------------------------------------------------------------------------


def hidden(teacher, model, layer_map=None, kind="mse", relations="none", heads=0, seed=0) -> HiddenDistillation:
    pairs = layer_pairs(model.config.layers, teacher.config.layers, layer_map)
    add_projections(model, pairs, teacher.config.dim, seed)
    model.auxiliary.double()
    related = None
    if relations != "none":
        heads = heads or relation_heads(model.config, teacher.config)
        related = RelationLoss(model.config.layers - 1, teacher.config.layers - 1, relations, heads)
    return HiddenDistillation(LogitDistillation(teacher), pairs, kind, 1.0, related, 1.0)


def examples(count: int = 8):
    return [made for _, made in conversations(count)]


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("relations", ["none", "both"])
def test_a_student_equal_to_its_teacher_has_no_loss_and_a_wrong_map_is_noticed(kind: str, relations: str) -> None:
    teacher, model, batch = make(0).eval(), make(0).eval(), pack(examples(), 64)
    loss, parts = hidden(teacher, model, None, kind, relations).loss(model, batch)
    assert abs(loss.item()) <= 1e-9 and parts["hidden"].item() == pytest.approx(0, abs=1e-9)
    for wrong in ([2, 1, 3, 4], [1, 2, 4, 3], [2, 3, 4, 4]):
        assert hidden(teacher, model, wrong, kind).loss(model, batch)[1]["hidden"].item() > 1e-3
    assert hidden(teacher, model, [0, 2, 0, 4], kind).loss(model, batch)[1]["hidden"].item() <= 1e-9


@pytest.mark.parametrize(
    ("student", "teacher", "goals"),
    [(4, 4, [0, 1, 2, 3]), (2, 4, [1, 3]), (3, 4, [0, 2, 3]), (6, 12, [1, 3, 5, 7, 9, 11]), (4, 2, [0, 0, 1, 1])],
)
def test_layers_are_evenly_spaced_and_the_last_meets_the_last(student: int, teacher: int, goals: list[int]) -> None:
    assert layer_pairs(student, teacher) == tuple(enumerate(goals))


@pytest.mark.parametrize("given", [[1, 2], [1, 2, 5]])
def test_a_map_that_does_not_fit_the_models_is_refused(given: list[int]) -> None:
    with pytest.raises(UsageError, match="the student has 3 layers, the teacher 4"):
        layer_pairs(3, 4, given)


def by_hand(teacher, model, made: list[Example], pairs, relations=False) -> dict[str, float]:
    """The same with hooks of its own, one sequence after another, in numpy."""
    found = {"mse": 0.0, "cosine": 0.0, "attention": 0.0, "values": 0.0}
    for one in made:
        piece = one.piece()
        tokens = torch.tensor(piece.ids)[None]
        states = []
        for net in (model, teacher):
            left: dict[int, np.ndarray] = {}
            handles = [
                block.register_forward_hook(lambda m, a, out, n=n, left=left: left.update({n: out[0].numpy()}))
                for n, block in enumerate(net.blocks)
            ]
            with torch.no_grad():
                net.hidden(tokens)
            for handle in handles:
                handle.remove()
            states.append(left)
        for own, goal in pairs:
            weight = model.auxiliary["projections"][str(own)].weight.detach().numpy()
            a, b = states[0][own][piece.places] @ weight.T, states[1][goal][piece.places]
            found["mse"] += ((a - b) ** 2).mean(-1).sum() / len(pairs)
            cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
            found["cosine"] += (1 - cosine).sum() / len(pairs)
    return found


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("packed", [True, False])
def test_states_of_other_widths_meet_behind_a_matrix_as_by_hand(kind: str, packed: bool) -> None:
    teacher, model, made = make(0).eval(), make(1, dim=16, layers=2, heads=2).eval(), examples()
    objective = hidden(teacher, model, None, kind)
    loss, parts = objective.loss(model, pack(made, 64, packed))
    expected = by_hand(teacher, model, made, [(0, 1), (1, 3)])[kind]
    assert parts["hidden"].item() == pytest.approx(expected, rel=1e-9)
    assert loss.item() == pytest.approx(parts["kl"].item() + expected, rel=1e-9)


@pytest.mark.parametrize("relations", ["none", "values", "both"])
def test_splits_and_packing_give_the_gradient_of_the_whole_and_projections_learn(relations: str) -> None:
    teacher, model = make(0).eval(), make(1, dim=16, layers=2)
    objective, made = hidden(teacher, model, relations=relations), examples(9)
    whole = gradient(objective, model, [pack(made, 64)])
    assert apart(whole, gradient(objective, model, [pack(made[i : i + 2], 64) for i in range(0, 9, 2)])) <= 1e-12
    assert apart(whole, gradient(objective, model, [pack(made, 64, packed=False)])) <= 1e-12
    named = dict(zip([name for name, _ in model.named_parameters()], whole, strict=True))
    assert all(named[f"auxiliary.projections.{layer}.weight"].abs().max() > 1e-4 for layer in (0, 1))


def test_relations_are_those_of_minilm_one_sequence_at_a_time() -> None:
    """KL of attention rows, and of softmax(V V' / sqrt(d)) over the tokens before, heads by heads (2002.10957, 3.1)."""
    teacher = make(0, kv_heads=2).eval()
    model, made = make(1, dim=16, layers=2, kv_heads=2).eval(), examples(5)
    expected = {"attention": 0.0, "values": 0.0}
    for one in made:
        piece, rows = one.piece(), []
        for net in (model, teacher):
            seen = {}
            last = net.blocks[-1].attention
            handles = [
                last.q.register_forward_hook(lambda m, a, out, seen=seen: seen.update(q=out[0])),
                last.k.register_forward_hook(lambda m, a, out, seen=seen: seen.update(k=out[0])),
                last.v.register_forward_hook(lambda m, a, out, seen=seen: seen.update(v=out[0])),
            ]
            with torch.no_grad():
                net.hidden(torch.tensor(piece.ids)[None])
            for handle in handles:
                handle.remove()
            rows.append((net.config, seen))
        length = len(piece.ids)
        hidden_ones = torch.ones(length, length, dtype=torch.bool).triu(1)
        attention, values = [], []
        for config, seen in rows:
            width = config.head_dim
            q = turned(seen["q"].view(length, config.heads, width), config).transpose(0, 1)
            k = turned(seen["k"].view(length, config.kv_heads, width), config).transpose(0, 1)
            k = k.repeat_interleave(config.heads // config.kv_heads, 0)
            v = seen["v"].view(length, config.kv_heads, width).transpose(0, 1)
            attention.append((q @ k.mT / width**0.5).masked_fill(hidden_ones, -torch.inf).softmax(-1))
            values.append((v @ v.mT / width**0.5).masked_fill(hidden_ones, -torch.inf).softmax(-1))
        for name, (own, goal) in (("attention", attention), ("values", values)):
            each = torch.special.xlogy(goal, goal / own.clamp(min=1e-300)).sum(-1)  # (heads, length)
            expected[name] += each[:, piece.places].mean(0).sum().item()
    for kinds, value in (*expected.items(), ("both", sum(expected.values()))):
        _, parts = hidden(teacher, model, relations=kinds).loss(model, pack(made, 64))
        assert value > 1e-3
        rel = 1e-9 if kinds == "values" else 1e-7  # the model's rotary angles are float32
        assert parts["relations"].item() == pytest.approx(value, rel=rel)


def turned(x: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Rotary positions of `x (T, heads, d)` as transformers rotates them."""
    half = config.head_dim // 2
    angles = torch.arange(len(x))[:, None] * config.rope_theta ** (-torch.arange(half).double() / half)
    cos, sin = (f(angles)[:, None].repeat(1, 1, 2) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def test_attention_weights_need_as_many_heads_and_values_do_not(train, world, student) -> None:
    with pytest.raises(UsageError, match="the student has 2 attention heads, the teacher 4") as error:
        train("distill", params={"method": "hidden", "relations": "attention"}, student=student)
    assert "values" in (error.value.hint or "")
    result = train("distill", "values", {"method": "hidden", "relations": "values"}, student=student)
    assert result.metrics["relations.train"] > 0


def test_projections_are_trained_along_and_not_saved(train, teacher, student) -> None:
    params = {name: value for name, value in LEARN.items() if name != "max_new_tokens"} | {"method": "hidden"}
    result = train("distill", "kd", params, teacher=teacher, student=student)
    assert result.metrics["kl.validation"] < 0.6 * result.metrics["kl.before"]
    curve = [value for _, value in result.curve("hidden")]
    assert curve[-1] < 0.9 * curve[0]
    path = result.outputs["model"].path
    assert sorted(file.name for file in path.iterdir() if file.suffix == ".safetensors") == ["model.safetensors"]
    model = load_model(path)
    assert len(model.auxiliary) == 0
    assert result.metrics["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_every_parameter_of_hidden_changes_the_loss(train, world, tmp_path) -> None:
    torch.manual_seed(3)
    shape = {"vocab_size": 300, "dim": 24, "layers": 2, "heads": 4, "context": 48, "eos_id": 1}
    save_model(Transformer(ModelConfig(arch="llama", **shape)), tmp_path / "s", tokenizer_from=world.tokenizer.path)
    fast = {"method": "hidden", "max_steps": 1, "log_every": 1}
    found = {}
    for name, params in {
        "plain": {},
        "layer_map": {"layer_map": [0, 2]},
        "mse": {"hidden_loss": "mse"},
        "weight": {"hidden_weight": 0.5},
        "values": {"relations": "values"},
        "attention": {"relations": "attention"},
        "both": {"relations": "both"},
        "relation_weight": {"relations": "both", "relation_weight": 0.5},
        "alpha": {"alpha": 0.5},
        "temperature": {"temperature": 2.0},
        "divergence": {"divergence": "jsd"},
        "alone": {"hidden_weight": 0.0, "relations": "values"},
    }.items():
        result = train("distill", name, {**fast, **params}, student=Artifact(tmp_path / "s", "model.hf"))
        found[name] = result.curve("loss")[0][1]
    assert len({round(value, 5) for value in found.values()}) == len(found)


# -- every method ------------------------------------------------------------------------------------------------------

METHODS = [
    {"method": "sequences", "sampling_temperature": 1.0, "max_new_tokens": 8},
    {"method": "hidden", "relations": "values"},
    {"method": "on-policy", "max_new_tokens": 8},
    {"method": "on-policy", "max_new_tokens": 8, "on_policy_share": 1.0, "divergence": "reverse-kl", "dropout": 0.1},
]


@pytest.mark.parametrize("params", METHODS, ids=lambda params: params["method"])
def test_resume_is_bit_identical_whatever_the_stops(train, weights, student, params) -> None:
    straight = train("distill", "straight", params, student=student)
    for stop in (1, 4, 7):
        with pytest.raises(TempFail):
            train("distill", "stopped", params, stop_after=stop, student=student)
    resumed = train("distill", "stopped", params, student=student)
    assert weights(straight) == weights(resumed)
    same = set(straight.metrics) - {"tokens_per_s"}
    assert {name: straight.metrics[name] for name in same} == {name: resumed.metrics[name] for name in same}


@pytest.mark.parametrize("params", METHODS[:3], ids=lambda params: params["method"])
def test_micro_batches_prefetching_and_recomputing_change_nothing(train, student, params) -> None:
    def losses(name: str, **more) -> list[float]:
        given = {**params, "log_every": 1, "max_steps": 5, **more}
        return [value for _, value in train("distill", name, given, student=student).curve("loss")]

    plain = losses("plain")
    assert losses("micro", micro_batch=1) == pytest.approx(plain, abs=1e-4)
    assert losses("rows", packing="none") == pytest.approx(plain, abs=1e-4)
    assert losses("chunk", loss_chunk=3) == pytest.approx(plain, abs=1e-4)
    assert losses("now", prefetch=0) == plain
    assert losses("again", recompute="full") == plain


@pytest.mark.parametrize("params", METHODS, ids=lambda params: params["method"])
def test_products_in_half_precision_are_near(train, student, params) -> None:
    def losses(name: str, precision: str) -> list[float]:
        given = {**params, "log_every": 1, "max_steps": 2, "warmup_steps": 0, "precision": precision, "dropout": 0.0}
        return [value for _, value in train("distill", name, given, student=student).curve("loss")]

    assert losses("bf16", "bf16")[0] == pytest.approx(losses("float32", "float32")[0], rel=0.03)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("params", METHODS[:3], ids=lambda params: params["method"])
def test_two_processes_train_the_student_of_one(world, teacher, student, tmp_path, params) -> None:
    """Each writes answers to its share of the prompts, or waits for those of the first."""
    program = Path(sys.executable).with_name("llmctl")
    given = {"teacher": teacher, "student": student, "data": world.chat}
    values = {**FAST, **params, "log_every": 1, "batch_size": 6}
    found = {}
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        spec = {
            "llmctl": 1,
            "name": "d",
            "sources": {name: {"uri": str(artifact.path), "type": artifact.type} for name, artifact in given.items()},
            "stages": {
                "kd": {
                    "uses": "distill",
                    "inputs": {name: f"sources.{name}" for name in given},
                    "with": {**values, "parallel": {"dp_replicate": ranks}},
                }
            },
        }
        (tmp_path / str(ranks) / "d.yaml").write_text(json.dumps(spec))
        command = [str(program), "run", "d.yaml", "--store", "store"]
        run = subprocess.run(command, cwd=tmp_path / str(ranks), capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        path = Store(tmp_path / str(ranks) / "store").resolve("d/kd.metrics") / "curves.jsonl"
        found[ranks] = [json.loads(line) for line in path.read_text().splitlines()]
    one, two = ([row["loss"] for row in found[ranks] if "loss" in row] for ranks in (1, 2))
    assert two == pytest.approx(one, abs=1e-4) and len(one) == FAST["max_steps"]
    if params["method"] == "on-policy":
        assert [row.get("on_policy") for row in found[1]] == [row.get("on_policy") for row in found[2]]
