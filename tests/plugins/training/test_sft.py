from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llmctl.errors import InputError, StageError
from llmctl.nn.hf import load_model
from llmctl.stage import Artifact
from llmctl.text.datasets import read_rows
from llmctl.text.tokenizer import Tokenizer
from llmctl.train.conversations import Encoder, render
from llmctl.train.generate import TorchGenerator
from llmctl_sft.params import SftParams


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def encoder(world, **params: object) -> Encoder:
    return Encoder(Tokenizer.load(world.tokenizer.path), 48, frozenset({1}), SftParams(**params))


def test_every_answer_and_its_end_are_supervised_and_nothing_else(world) -> None:
    messages = [user("A?"), assistant("Bé"), user("<|end|>"), assistant("D\n")]
    example = encoder(world).conversation({"messages": messages})
    tokenizer = Tokenizer.load(world.tokenizer.path)
    assert render(tokenizer, example) == (
        "<|bos|><|user|>A?<|end|><|assistant|>⟦Bé<|end|>⟧<|user|><|end|><|end|><|assistant|>⟦D\\n<|end|>⟧"
    )
    said = example.ids[example.mask].tolist()
    assert said == [*tokenizer.encode("Bé"), 1, *tokenizer.encode("D\n"), 1]
    assert example.supervised == len(said)


def test_three_updates_equal_transformers(train, world, make_dataset) -> None:
    """The same three AdamW steps with transformers' model, its own masked loss and torch's optimizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = list(read_rows(world.chat, "train"))[:4]
    tokenizer = AutoTokenizer.from_pretrained(world.model.path)
    model = AutoModelForCausalLM.from_pretrained(world.model.path)
    mark = tokenizer.convert_tokens_to_ids("<|assistant|>")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    theirs = []
    for _ in range(3):
        total, count = torch.zeros(()), 0
        for row in rows:
            ids = torch.tensor([tokenizer.apply_chat_template(row["messages"])])
            labels = ids.clone()
            labels[:, : ids[0].tolist().index(mark) + 1] = -100
            n = int((labels[:, 1:] != -100).sum())
            total, count = total + model(ids, labels=labels).loss * n, count + n
        loss = total / count
        theirs.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    # Four rows in a batch of four: every step sees all of them, whatever the order.
    params = {"max_steps": 3, "batch_size": 4, "optimizer": "adamw", "lr": 1e-3, "log_every": 1}
    few = {"train": [{"messages": row["messages"]} for row in rows]}
    ours = train(
        "sft", params={**params, "schedule": "constant", "warmup_steps": 0}, data=make_dataset("dataset.chat", few)
    )
    assert [value for _, value in ours.curve("loss")] == pytest.approx(theirs, abs=1e-4)
    trained = AutoModelForCausalLM.from_pretrained(ours.outputs["model"].path)
    for (name, a), (_, b) in zip(trained.named_parameters(), model.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-4), name


def test_it_learns_the_answers_and_to_stop(train, world) -> None:
    params = {"max_steps": 150, "batch_size": 24, "lr": 0.02, "embedding_lr": 0.01}
    result = train("sft", params=params)
    assert result.metrics["loss.train"] < 0.05 and result.metrics["stop_rate"] == 1.0
    tokenizer = Tokenizer.load(result.outputs["model"].path)
    model = load_model(result.outputs["model"].path)
    rows = list(read_rows(world.chat, "train"))
    prompts = [tokenizer.encode_chat(row["messages"][:1], add_generation_prompt=True).ids for row in rows]
    answers = [tokenizer.decode(ids) for ids in TorchGenerator(model, {1}).generate(prompts)]
    right = np.mean([answer == row["messages"][1]["content"] for answer, row in zip(answers, rows, strict=True)])
    assert right >= 0.9
    # Control: the model it started from does not answer, and is found not to stop.
    untrained = train("sft", "control", {"max_steps": 1, "lr": 1e-9, "probe_tokens": 20})
    assert untrained.metrics["stop_rate"] < 0.5
    assert any(
        "answers end within 20 tokens" in fields["text"] for kind, fields in untrained.events if kind == "warning"
    )


def test_what_is_supervised_is_shown_before_training(train) -> None:
    events = train("sft").events
    logs = [fields["text"] for kind, fields in events if kind == "log"]
    assert logs[0] == "llama: computed by llmctl's transformer"
    assert logs[1] == ("example 1: <|bos|><|user|>Which colour has the apple?<|end|><|assistant|>⟦It is red.<|end|>⟧")
    assert len([text for text in logs if text.startswith("example ")]) == 3
    assert logs[4].startswith("24 examples, ") and logs[4].endswith(" of them supervised")
    first = next(n for n, (kind, fields) in enumerate(events) if kind == "progress" and fields["total"] == 12)
    assert first > [n for n, (kind, fields) in enumerate(events) if kind == "log" and "example 3" in fields["text"]][0]


def test_conversations_without_an_answer_are_dropped_and_too_many_refused(train, make_dataset) -> None:
    good = {"messages": [user("Hi"), assistant("Ho")]}
    mute = {"messages": [user("Hi")]}
    data = make_dataset("dataset.chat", {"train": [good] * 19 + [mute]}, "few")
    result = train("sft", params={"max_steps": 1}, data=data)
    said = [fields["text"] for kind, fields in result.events if kind == "warning"]
    assert said == ["1 of 20 examples of the split `train` dropped (1 without an answer)"]
    data = make_dataset("dataset.chat", {"train": [good] * 5 + [mute]}, "many")
    with pytest.raises(StageError, match=r"1 of 6 .* more than max_dropped 0.1 allows"):
        train("sft", "b", data=data)
    assert train("sft", "c", {"max_dropped": 0.2, "max_steps": 1}, data=data).metrics["steps"] == 1
    data = make_dataset("dataset.chat", {"train": [mute] * 6}, "all")
    with pytest.raises(StageError, match=r"6 of 6 examples of the split `train` dropped"):
        train("sft", "d", {"max_dropped": 1.0}, data=data)


def test_conversations_longer_than_the_context(train, make_dataset) -> None:
    good, long = {"messages": [user("Hi"), assistant("Ho")]}, {"messages": [user("z" * 60), assistant("Ho")]}
    data = make_dataset("dataset.chat", {"train": [good] * 19 + [long]})
    result = train("sft", params={"max_steps": 1}, data=data)
    assert any("(1 too long)" in fields["text"] for kind, fields in result.events if kind == "warning")
    with pytest.raises(InputError, match=r"row 'train-19' has \d+ tokens, the model's context is 48"):
        train("sft", "b", {"too_long": "error"}, data=data)


def test_a_template_that_never_ends_an_answer_is_refused(train, world, tmp_path: Path) -> None:
    model = tmp_path / "endless"
    shutil.copytree(world.model.path, model)
    template = model / "chat_template.jinja"
    template.chmod(0o644)
    template.write_text(template.read_text().replace("<|end|>", "").replace("eos_token", "''"))
    with pytest.raises(InputError, match="would never learn to stop") as error:
        train("sft", model=Artifact(model, "model.hf"))
    assert "close the assistant's turn" in (error.value.hint or "")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the split `train` of .* is empty"),
        ([{"text": "no messages"}], "has no list of messages `messages`"),
        ([{"messages": ["hello"]}], "has no list of messages `messages`"),
    ],
)
def test_unusable_rows_are_input_errors(train, tmp_path: Path, rows: list, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=message):
        train("sft", data=Artifact(path, "dataset.chat"))


def test_packing_changes_speed_and_not_the_result(train) -> None:
    packed, alone = train("sft", "a", {"log_every": 1}), train("sft", "b", {"log_every": 1, "packing": "none"})
    for (_, a), (_, b) in zip(packed.curve("loss"), alone.curve("loss"), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_a_model_with_a_smaller_vocabulary_than_its_tokenizer_is_refused(train, world, tmp_path: Path) -> None:
    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer

    config = ModelConfig(arch="llama", vocab_size=290, dim=16, layers=1, heads=2, context=48)
    save_model(Transformer(config), tmp_path / "narrow", tokenizer_from=world.tokenizer.path)
    with pytest.raises(InputError, match="the tokenizer has 300 tokens, the model 290"):
        train("sft", model=Artifact(tmp_path / "narrow", "model.hf"))
