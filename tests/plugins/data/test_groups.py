"""The stage `data` with steps over groups: files in, shares, derived rows, audit and card out."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llmctl import Artifact, UsageError
from llmctl.registry import get_registry
from llmctl.testing import StageResult, run_stage
from llmctl.text.datasets import read_rows, splits
from llmctl_data import DATA

SIZES = {"en": 600, "de": 150, "sw": 40}


def corpus_folder(root: Path) -> Path:
    """Three files of rows, one per language, 790 in all."""
    root.mkdir()
    rng = random.Random(1)
    for language, count in SIZES.items():
        rows = [" ".join(f"{language}{rng.randrange(99)}" for _ in range(rng.randrange(10, 30))) for _ in range(count)]
        lines = (json.dumps({"text": text, "language": language, "id": str(n)}) for n, text in enumerate(rows))
        (root / f"{language}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def run(root: Path, out: Path, steps: list[dict[str, Any]], **params: Any) -> StageResult:
    more = {name: params.pop(name) for name in ("evaluation", "there", "back") if name in params}
    values = {"emit": ["text"], "fields": {"language": "language"}, "steps": steps, **params}
    return run_stage(DATA, out, values, files=[Artifact(root, "files")], **more)


def rows(result: StageResult, split: str = "train", port: str = "text") -> list[dict[str, Any]]:
    return list(read_rows(result.outputs[port], split))


def audit(result: StageResult, port: str = "text") -> dict[str, Any]:
    told: dict[str, Any] = json.loads((result.outputs[port].path / "audit.json").read_text())
    return told


def test_training_is_balanced_and_validation_stays(tmp_path: Path) -> None:
    root = corpus_folder(tmp_path / "in")
    plain = run(root, tmp_path / "plain", [], validation_share=0.2)
    step = {"name": "balance", "by": "language", "weights": {"en": 2, "de": 1, "sw": 1}, "max_epochs": 8}
    made = run(root, tmp_path / "made", [step], validation_share=0.2)

    def shares(result: StageResult) -> dict[str, float]:
        counts: Counter[str] = Counter()
        for row in rows(result):
            counts[row["meta"]["language"]] += len(row["text"])
        return {name: count / counts.total() for name, count in counts.items()}

    assert shares(plain)["en"] > 0.7
    assert shares(made) == pytest.approx({"en": 0.5, "de": 0.25, "sw": 0.25}, abs=0.01)
    assert rows(made, "validation") == rows(plain, "validation"), "what is measured on stays"
    (told,) = audit(made)["steps"]
    epochs = {row["group"]: row["epochs"] for row in told["facts"]["groups"]}
    assert epochs["en"] < 1 < epochs["de"] < epochs["sw"]
    kept = audit(made)["kept"]
    assert (
        kept["imbalance"]["language"]["bytes"]["effective"]
        > audit(plain)["kept"]["imbalance"]["language"]["bytes"]["effective"]
    )
    assert sum(kept["by_language"][name]["documents"] for name in SIZES) == kept["documents"]
    card = (made.outputs["metrics"].path / "card.html").read_text()
    assert "<h2>Imbalance</h2>" in card and "share_wanted" in card
    small = run(root, tmp_path / "small", [step], validation_share=0.2, task_bytes=1 << 16, workers=2)
    assert rows(small) == rows(made), "neither tasks nor workers matter"


def test_named_sources_are_groups_that_later_stages_know(tmp_path: Path) -> None:
    root = corpus_folder(tmp_path / "in")
    named = [{"path": "en*", "name": "web"}, {"path": "*", "name": "books"}]
    first = run(root, tmp_path / "first", [], sources=named, validation_share=0.1)
    assert {row["meta"]["corpus"] for row in rows(first)} == {"web", "books"}
    values = {"emit": ["text"], "steps": [{"name": "select", "keep": ["books"]}], "validation_share": 0.1}
    second = run_stage(DATA, tmp_path / "second", values, text=first.outputs["text"])
    assert {row["meta"]["language"] for row in rows(second)} == {"de", "sw"}
    wanted = {row["id"] for row in rows(first) if row["meta"]["corpus"] == "books"}
    assert {row["id"] for row in rows(second)} == wanted
    assert audit(second)["steps"][0]["dropped"] == {
        "another group": first.metrics["text.documents"] - second.metrics["text.documents"]
    }


def labelled_file(path: Path) -> Path:
    lines = [
        {"text": f"{'good' if n % 8 else 'awful'} thing number {n} here", "label": "pos" if n % 8 else "neg"}
        for n in range(400)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_labelled_rows(tmp_path: Path) -> None:
    path = labelled_file(tmp_path / "rows.jsonl")
    values: dict[str, Any] = {"labelled": {"task": "classification"}, "validation_share": 0.2}

    def made(name: str, *steps: dict[str, Any]) -> StageResult:
        return run_stage(DATA, tmp_path / name, {**values, "steps": list(steps)}, files=[Artifact(path, "files")])

    def labels(result: StageResult) -> Counter[str]:
        return Counter(row["label"] for row in rows(result, port="labelled"))

    plain = made("plain")
    assert labels(plain)["pos"] > 5 * labels(plain)["neg"]
    equal = made(
        "equal",
        {"name": "balance", "by": "class", "unit": "documents", "weights": {"pos": 1, "neg": 1}, "max_epochs": 9},
    )
    assert labels(equal)["pos"] == pytest.approx(labels(equal)["neg"], abs=1)
    more = made("more", {"name": "augment", "group": "neg", "share": 0.3, "method": "noise"})
    assert labels(more)["pos"] == labels(plain)["pos"]
    assert labels(more)["neg"] / labels(more).total() == pytest.approx(0.3, abs=0.005)
    originals = {row["id"]: row for row in rows(plain, port="labelled")}
    derived = [row for row in rows(more, port="labelled") if "parent" in row]
    assert derived and all(originals[row["parent"]]["label"] == "neg" and row["method"] == "noise" for row in derived)
    for result in (equal, more):
        assert rows(result, "validation", "labelled") == rows(plain, "validation", "labelled")
        assert set(splits(result.outputs["labelled"])) == {"train", "validation"}
    told = audit(more, "labelled")
    assert told["steps"][0]["found"] == {"derived": len(derived)}
    assert told["kept"]["imbalance"]["class"]["documents"]["groups"] == 2
    with pytest.raises(ValueError, match="labelled rows take balance and augment"):
        made("wrong", {"name": "unicode"})


def test_a_rare_class_gains_f1(tmp_path: Path) -> None:
    """Complaints in eight words of which training has seen two; rules of paraphrase say that they mean the same."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.pipeline import make_pipeline

    rng = random.Random(7)
    known, other = ["broken", "refund"], ["cracked", "faulty", "damaged", "defective", "reimbursement", "repayment"]

    def row(rare: bool, words: list[str]) -> dict[str, str]:
        filler = [f"w{rng.randrange(60)}" for _ in range(11)]
        if rare:
            filler[5] = rng.choice(words)
        return {"text": " ".join(filler), "label": "ny"[rare]}

    train = [row(n % 20 == 0, known) for n in range(800)]
    test = [row(n % 4 == 0, [*known, *other]) for n in range(400)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in train))
    rules = [{"pattern": "broken", "replace": other[:4]}, {"pattern": "refund", "replace": other[4:]}]

    def f1(name: str, *steps: dict[str, Any]) -> float:
        values = {"labelled": {"task": "classification"}, "validation_share": 0.0, "steps": list(steps)}
        made = run_stage(DATA, tmp_path / name, values, files=[Artifact(path, "files")])
        learnt = rows(made, port="labelled")
        model = make_pipeline(CountVectorizer(), LogisticRegression())
        model.fit([one["text"] for one in learnt], [one["label"] for one in learnt])
        said = model.predict([one["text"] for one in test])
        return float(f1_score([one["label"] for one in test], said, pos_label="y"))

    share = {"name": "augment", "group": "y", "share": 0.3}
    without = f1("without")
    noise = f1("noise", {**share, "method": "noise", "noise": ["dropout"]})
    reworded = f1("paraphrase", {**share, "method": "paraphrase", "rules": rules})
    assert without + 0.1 < noise < reworded - 0.1, "more of the same helps, other words help more"


@pytest.mark.slow
def test_languages_of_one_dataset_are_weighted_in_training(tmp_path: Path) -> None:
    """One corpus, a dataset for each language, one tokenizer: shares of tokens, not of bytes, within 1 %."""
    stages = get_registry().stages
    whole = run(corpus_folder(tmp_path / "in"), tmp_path / "whole", [], validation_share=0.05).outputs["text"]
    tokenizer = run_stage(stages["tokenize"], tmp_path / "all", {"vocab_size": 300}, text=whole).outputs["tokenizer"]
    tokens = []
    for language in SIZES:
        values = {"emit": ["text"], "steps": [{"name": "select", "by": "language", "keep": [language]}]}
        text = run_stage(DATA, tmp_path / language, values, text=whole).outputs["text"]
        cut = run_stage(stages["tokenize"], tmp_path / f"{language}-tokens", {}, text=text, tokenizer=tokenizer)
        tokens.append(cut.outputs["tokens"])
    shape = {"dim": 32, "layers": 1, "heads": 2, "ff_dim": 64, "context": 32, "batch_size": 8, "max_steps": 60}
    mixture = {"names": list(SIZES), "weights": [2, 1, 1]}
    found = run_stage(
        stages["train-pretrain"], tmp_path / "train", {**shape, "mixture": mixture}, tokens=tokens, tokenizer=tokenizer
    ).metrics
    shares = [found[f"tokens.share.{name}"] for name in SIZES]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.01)
    assert found["epochs.sw"] > 1 > found["epochs.en"]


def test_associations_are_in_audit_and_card(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    lines = [f"{'She' if n < 90 else 'He'} is a nurse here." for n in range(100)]
    lines += [f"{'She' if n % 2 else 'He'} is a pilot there." for n in range(200)]
    (root / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    made = run(root, tmp_path / "out", [{"name": "associations"}], fields={})
    (told,) = audit(made)["steps"]
    assert {row["attribute"]: row["flagged"] for row in told["facts"]["associations"]}["nurse"]
    assert made.metrics["text.documents"] == 300
    assert "log_odds" in (made.outputs["metrics"].path / "card.html").read_text()


def test_inputs_that_no_step_uses(tmp_path: Path) -> None:
    root = corpus_folder(tmp_path / "in")
    model = Artifact(tmp_path, "model.hf")
    with pytest.raises(UsageError, match="no step uses them"):
        run(root, tmp_path / "a", [], there=model, back=model)
    with pytest.raises(UsageError, match="needs two models"):
        step = {"name": "augment", "by": "language", "group": "sw", "share": 0.2, "method": "back-translation"}
        run(root, tmp_path / "b", [step], there=model)
