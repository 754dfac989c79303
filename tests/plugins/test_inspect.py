"""`llmctl inspect`: distributions equal transformers', maps and lengths of every kind of model, the page, the curve."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner

from llmctl import InputError, UsageError
from llmctl_train_pretrain.inspecting import inspect

torch = pytest.importorskip("torch")

SHAPE = {"vocab_size": 262, "dim": 32, "layers": 2, "heads": 4, "context": 64, "bos_id": 0, "eos_id": 1, "pad_id": 2}


@pytest.fixture
def made(tmp_path, model_dir, monkeypatch):
    """Write a random model with the byte tokenizer, whose `<|system|>` is its mask; returns its directory."""
    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer

    monkeypatch.chdir(tmp_path)
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    (model_dir / "tokenizer_config.json").write_text(json.dumps({**config, "mask_token": "<|system|>"}))

    def make(arch="llama", **changes):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(arch=arch, **{**SHAPE, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter) * 0.1
        save_model(model, tmp_path / arch, model_dir)
        return tmp_path / arch

    return make


def invoke(*args, **options):
    result = CliRunner().invoke(inspect, [str(arg) for arg in args], **options)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def as_json(*args, **options):
    return json.loads(invoke(*args, "--format", "json", **options).stdout)


def test_distributions_are_those_of_transformers(made):
    import transformers

    directory = made()
    found = as_json(directory, "--text", "Hello", "--top", 262)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = [token["id"] for token in found["tokens"]]
    assert ids[0] == 0 and len(ids) == 6
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()
    for at, prediction in enumerate(found["predictions"]):
        logprobs = {choice["id"]: choice["logprob"] for choice in prediction["choices"]}
        np.testing.assert_allclose([logprobs[i] for i in range(262)], expected[at], atol=1e-5)
        assert sum(choice["probability"] for choice in prediction["choices"]) == pytest.approx(1)
        if at + 1 < len(ids):
            assert prediction["actual"]["logprob"] == pytest.approx(expected[at][ids[at + 1]], abs=1e-5)
            assert prediction["rank"] == 1 + int((expected[at] > expected[at][ids[at + 1]]).sum())


def test_what_is_drawn_from_is_labelled_apart_and_differs(made):
    from llmctl.ort.sampling import candidates

    plain = as_json(made(), "--text", "Hello")
    assert plain["sampling"] is None and plain["predictions"][-1]["sampled"] is None
    options = ("--temperature", 0.5, "--top-k", 5, "--top-p", 0.9)
    found = as_json(made(), "--text", "Hello", "--top", 262, *options)
    last = found["predictions"][-1]
    assert last["choices"][:10] == plain["predictions"][-1]["choices"]  # the model's own stay as they are
    logits = np.zeros(262)
    for choice in last["choices"]:
        logits[choice["id"]] = choice["logprob"]
    from llmctl.generator import Sampling

    ids, probabilities = candidates(logits, Sampling(temperature=0.5, top_k=5, top_p=0.9))
    assert [choice["id"] for choice in last["sampled"]] == ids.tolist()
    assert [choice["probability"] for choice in last["sampled"]] == pytest.approx(probabilities.tolist())
    assert last["sampled"][0]["probability"] > 1.5 * last["choices"][0]["probability"]
    text = invoke(made(), "--text", "Hello", *options).stdout
    assert "the same after temperature 0.5, top-k 5, top-p 0.9:" in text
    greedy = as_json(made(), "--text", "Hello", "--temperature", 0)["predictions"][-1]
    assert [(c["id"], c["probability"]) for c in greedy["sampled"]] == [(greedy["choices"][0]["id"], 1.0)]


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {"kv_heads": 2}), ("gpt3", {"pattern": "LS", "window": 3}), ("gopher", {}), ("bloom", {}),
        ("gemma2", {"pattern": "SL", "window": 4, "attention_softcap": 5.0}), ("gpt1", {}), ("lamda", {}),
    ],
)  # fmt: skip
def test_decoders(made, arch, changes):
    found = as_json(made(arch, **changes), "--text", "Hello world", "--maps")
    (stack,) = found["stacks"]
    maps = np.array(stack["maps"])
    assert maps.shape == (2, 4, 12, 12)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-4)
    assert [len(stack[key]) for key in ("residual", "attention", "feed_forward", "cross_added")] == [3, 2, 2, 0]
    assert stack["heads"][1][3]["first"] == pytest.approx(maps[1, 3, :, 0].mean(), abs=1e-5)
    assert "maps" not in as_json(made(arch, **changes), "--text", "Hi")["stacks"][0]


def test_an_encoder_at_its_masks(made):
    import transformers

    directory = made("bert", token_types=2)
    found = as_json(directory, "--text", "a<|system|>c<|system|>")
    assert [p["at"] for p in found["predictions"]] == [2, 4]
    assert all(p["what"] == "masked" and p["actual"] is None for p in found["predictions"])
    ids = [token["id"] for token in found["tokens"]]
    assert (ids[0], ids[2], ids[-1]) == (0, 3, 1)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(directory).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0, 4].double().log_softmax(-1)
    best = found["predictions"][1]["choices"][0]
    assert best["id"] == int(expected.argmax())
    assert best["logprob"] == pytest.approx(float(expected.max()), abs=1e-5)
    text = invoke(directory, "--text", "a<|system|>c").stdout
    assert 'at token 2, "<|system|>"' in text and "encoder, means over tokens and heads" in text
    assert "nothing is masked" in invoke(directory, "--text", "abc").stdout


@pytest.mark.parametrize(
    ("head", "places"),
    [
        ("classification", [None]), ("token-classification", [0, 1, 2, 3]), ("question-answering", [None, None]),
        ("features", []),
    ],
)  # fmt: skip
def test_other_heads(made, head, places):
    labels = ("bad", "good") if "classification" in head else ()
    directory = made("bert", head=head, labels=labels)
    found = as_json(directory, "--text", "ab")
    assert [p["at"] for p in found["predictions"]] == places
    if labels:
        assert {c["text"] for c in found["predictions"][0]["choices"]} == {"bad", "good"}
    assert len(found["stacks"][0]["heads"]) == 2
    invoke(directory, "--text", "ab")


def test_an_encoder_decoder(made):
    import transformers

    directory = made("t5")
    found = as_json(directory, "--text", "Hello", "--target", "Hi", "--maps")
    assert len(found["source"]) == 7 and len(found["tokens"]) == 3
    encoder, decoder = found["stacks"]
    assert (encoder["name"], decoder["name"]) == ("encoder", "decoder")
    assert np.array(decoder["cross"]).shape == (2, 4, 3, 7)
    np.testing.assert_allclose(np.array(decoder["cross"]).sum(-1), 1, atol=1e-4)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(directory).eval()
    source, target = (torch.tensor([[t["id"] for t in found[key]]]) for key in ("source", "tokens"))
    with torch.no_grad():
        expected = theirs(input_ids=source, decoder_input_ids=target).logits[0].double().log_softmax(-1)
    for at, prediction in enumerate(found["predictions"]):
        assert prediction["choices"][0]["logprob"] == pytest.approx(float(expected[at].max()), abs=1e-5)
    assert len(as_json(directory, "--text", "Hello")["tokens"]) == 1
    with pytest.raises(UsageError, match="a target has no meaning for llama"):
        invoke(made(), "--text", "a", "--target", "b")


def agree(ours, theirs):
    """Whether all maps of two inspections are the same, to what float32 leaves; each row must sum to 1."""
    largest = 0.0
    for a, b in zip(ours["stacks"], theirs["stacks"], strict=True):
        assert a["name"] == b["name"] and not b["residual"]
        for key in ("maps", "cross"):
            mine, other = np.array(a[key]), np.array(b[key])
            assert mine.shape == other.shape
            if mine.size:
                np.testing.assert_allclose(other.sum(-1), 1, atol=1e-4)
                largest = max(largest, float(np.abs(mine - other).max()))
    return largest < 1e-5


def test_an_exported_model_shows_its_distributions_and_its_attention(real_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch_model, bundle = real_models
    ours, theirs = (as_json(model.path, "--text", "Hello", "--maps") for model in (torch_model, bundle))
    assert theirs["backend"].startswith("onnxruntime") and theirs["closed"] == ""
    for a, b in zip(ours["predictions"], theirs["predictions"], strict=True):
        assert [c["id"] for c in a["choices"][:3]] == [c["id"] for c in b["choices"][:3]]
        assert a["choices"][0]["logprob"] == pytest.approx(b["choices"][0]["logprob"], abs=1e-4)
    assert agree(ours, theirs)
    assert not agree(ours, as_json(bundle.path, "--text", "Hallo", "--maps"))  # the control: another text as long
    text = invoke(bundle.path, "--text", "Hello").stdout
    assert "ENTROPY" in text and "FEED-FORWARD" not in text
    page = Page((tmp_path / "inspection.html").read_text())
    assert len(page.images) == sum(len(layer) for layer in theirs["stacks"][0]["maps"])


def test_a_graph_whose_attention_is_not_seen_says_why(real_models, tmp_path, monkeypatch):
    import sys

    from llmctl_train_pretrain import exported_attention

    monkeypatch.chdir(tmp_path)
    bundle = real_models[1].path
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnx", None)
        found = as_json(bundle, "--text", "Hello")
    assert found["stacks"] == [] and len(found["predictions"]) == 6 and "llmctl[optimum]" in found["closed"]
    with monkeypatch.context() as patch:
        patch.setattr(exported_attention, "TYPES", {})
        assert "has an input" in as_json(bundle, "--text", "Hello")["closed"]
    monkeypatch.setattr(exported_attention, "ASKED", {})
    assert "do not give out attention" in as_json(bundle, "--text", "Hello")["closed"]
    assert "do not give out attention" in invoke(bundle, "--text", "Hello").stdout


def test_a_model_that_goes_through_transformers_shows_its_distributions_alone(model_dir, tmp_path, monkeypatch):
    import transformers

    from llmctl.text.tokenizer import copy_tokenizer

    monkeypatch.chdir(tmp_path)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    theirs = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=262, **shape)).eval()
    theirs.save_pretrained(tmp_path / "neox")
    copy_tokenizer(model_dir, tmp_path / "neox")
    found = as_json("neox", "--text", "Hello")
    assert found["stacks"] == [] and "goes through transformers" in found["closed"]
    with torch.no_grad():
        expected = theirs(torch.tensor([[token["id"] for token in found["tokens"]]])).logits[0, -1].log_softmax(-1)
    best = found["predictions"][-1]["choices"][0]
    assert (best["id"], best["logprob"]) == (int(expected.argmax()), pytest.approx(float(expected.max()), abs=1e-5))
    with pytest.raises(UsageError, match="a target has no meaning for a decoder"):
        invoke("neox", "--text", "a", "--target", "b")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "changes", "options", "exporter"),
    [
        ("bert", {}, ("--text", "a<|system|>c"), "native"),
        ("t5", {}, ("--text", "Hello", "--target", "Hi"), "native"),
        ("t5", {}, ("--text", "Hello", "--target", "Hi"), "optimum"),
        ("bert", {"head": "classification", "labels": ("bad", "good")}, ("--text", "ab"), "native"),
        ("bert", {"head": "question-answering"}, ("--text", "ab"), "native"),
        ("llama", {"head": "classification", "labels": ("bad", "good")}, ("--text", "ab"), "native"),
    ],
)
def test_exported_models_of_every_kind_say_what_the_torch_model_says(made, tmp_path, arch, changes, options, exporter):
    from llmctl import Artifact
    from llmctl.testing import run_stage
    from llmctl_export_onnx import EXPORT_ONNX

    params = {"parity_prompts": 2, "threads": 1, "exporter": exporter}
    directory = made(arch, **changes)
    result = run_stage(EXPORT_ONNX, tmp_path / "export", params, model=Artifact(directory, "model.hf"))
    ours, theirs = (as_json(path, *options, "--top", 3, "--maps") for path in (directory, result.outputs["model"].path))
    for key in ("kind", "head", "tokens", "source"):
        assert theirs[key] == ours[key]
    assert agree(ours, theirs) and len(ours["predictions"]) == len(theirs["predictions"]) > 0
    for a, b in zip(ours["predictions"], theirs["predictions"], strict=True):
        assert (a["at"], a["what"]) == (b["at"], b["what"])
        assert [c["text"] for c in a["choices"]] == [c["text"] for c in b["choices"]]
        assert [c["logprob"] for c in a["choices"]] == pytest.approx([c["logprob"] for c in b["choices"]], abs=1e-4)


# -- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Balanced tags, and what they refer to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.references, self.tags = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append((tag, values))
        self.references += [v for k, v in values.items() if k in ("src", "href") and not v.startswith("data:")]
        if tag == "img":
            self.images.append(values)
        if tag not in ("meta", "img", "line", "polyline", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def pixels(uri):
    """The opacities of a one-colour PNG, `(H, W)`, decoded by hand."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    parts, at = {}, 8
    while at < len(data):
        (size,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        parts[kind], at = body, at + 12 + size
    width, height = struct.unpack(">II", parts[b"IHDR"][:8])
    assert parts[b"tRNS"] == bytes(range(256))
    return np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, width + 1)[:, 1:]


@pytest.mark.parametrize("arch", ["llama", "bert", "t5"])
def test_the_page_is_whole_and_needs_no_network(made, arch, tmp_path):
    directory = made(arch)
    evil = "</script><b>&\"'"
    target = ("--target", "</b>") if arch == "t5" else ()
    result = invoke(directory, "--text", evil, *target, "-o", "page.html")
    assert "page: page.html" in result.stderr
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.references == [] and not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text
    assert evil not in text
    assert len(page.images) == {"llama": 8, "bert": 8, "t5": 24}[arch]
    found = as_json(directory, "--text", evil, *target, "--maps")
    shown = pixels(page.images[5]["src"])
    np.testing.assert_allclose(shown / 255, np.array(found["stacks"][0]["maps"])[1, 1], atol=0.003)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert len(data["texts"]["tokens"]) == len(found["tokens"])
    assert [len(p["parts"][0]["rows"]) for p in data["predictions"]] == [10] * len(found["predictions"])


def test_200_tokens_make_a_small_page(made, tmp_path):
    invoke(made(context=256, layers=4), "--text", "abcdefghij" * 20)
    assert (tmp_path / "inspection.html").stat().st_size < 1_500_000


def test_a_page_of_a_large_model_shows_some_layers():
    from llmctl_train_pretrain.inspection_page import MOST_CELLS, chosen_layers

    assert chosen_layers(12, 1000) == list(range(12))
    chosen = chosen_layers(80, MOST_CELLS // 5)
    assert len(chosen) == 5 and (chosen[0], chosen[-1]) == (0, 79)
    assert chosen_layers(80, 10 * MOST_CELLS) == [0, 79]


def test_json_writes_a_page_only_where_it_is_told(made, tmp_path):
    as_json(made(), "--text", "a")
    assert not list(tmp_path.glob("*.html"))
    as_json(made(), "--text", "a", "-o", "there.html")
    assert (tmp_path / "there.html").is_file()


# -- the curve --------------------------------------------------------------------------------------------------------


def test_the_curve_equals_the_plain_loss(made, tmp_path):
    from dataclasses import replace

    from llmctl.nn.config import RopeScaling
    from llmctl.nn.hf import load_model
    from llmctl.nn.transformer import Transformer

    directory = made()
    (tmp_path / "text.txt").write_text("The quick brown fox jumps. " * 30)
    found = as_json(directory, "--data", "text.txt", "--max-length", 100, "--rows", 3, "--scaling", "linear")
    curve, scaled = found["curves"]
    assert (curve["name"], scaled["name"], curve["context"]) == ("as trained", "linear x1.5625", 64)
    assert (curve["stretches"][0]["first"], curve["stretches"][-1]["last"]) == (1, 99)
    assert sum(part["tokens"] for part in curve["stretches"]) == 3 * 99
    model = load_model(directory)
    from llmctl.text.tokenizer import Tokenizer

    ids = Tokenizer.load(directory).encode_document((tmp_path / "text.txt").read_text())
    rows = torch.tensor([ids[start : start + 100] for start in (0, 100, 200)])
    for values, scaling in ((curve, None), (scaled, RopeScaling(kind="linear", factor=1.5625, original_context=64))):
        longer = Transformer(replace(model.config, context=100, rope_scaling=scaling))
        longer.load_state_dict(model.state_dict())
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(
                longer(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
            ).view(3, 99)
        for part in values["stretches"]:
            expected = float(losses[:, part["first"] - 1 : part["last"]].mean())
            assert part["nats"] == pytest.approx(expected, abs=1e-5)
            assert part["perplexity"] == pytest.approx(np.exp(expected), rel=1e-4)
    assert abs(curve["nats_beyond"] - scaled["nats_beyond"]) > 1e-3


def test_the_curve_in_text_and_as_a_page(made, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps. " * 30)
    text = invoke(made(), "--data", "text.txt", "--scaling", "yarn").stdout
    assert "AS TRAINED" in text and "YARN X2" in text and "beyond" in text
    page = Page((tmp_path / "lengths.html").read_text())
    assert sum(tag == "polyline" for tag, _ in page.tags) == 2
    assert page.references == []


@pytest.mark.parametrize(
    ("arch", "options", "error", "message"),
    [
        ("gpt2", ("--data", "text.txt"), UsageError, "the model's learned positions end at 64"),
        ("bert", ("--data", "text.txt"), UsageError, "bert is no decoder"),
        ("bloom", ("--data", "text.txt", "--scaling", "yarn"), UsageError, "rope_scaling has no effect on alibi"),
        ("llama", ("--data", "text.txt", "--max-length", "9999"), InputError, "no document has 9999 tokens"),
        ("llama", ("--data", "text.txt", "--text", "a"), UsageError, "--text has no effect with --data"),
        ("llama", ("--text", "a", "--rows", "3"), UsageError, "--rows has no effect with a text"),
        ("llama", ("--text", ""), None, ""),
    ],
)
def test_what_cannot_be_measured(made, tmp_path, arch, options, error, message):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps. " * 30)
    if error is None:
        invoke(made(arch), *options)  # BOS alone is a text
        return
    with pytest.raises(error, match=message):
        invoke(made(arch), *options)


def test_data_of_every_form(made, tmp_path):
    from llmctl.text.shards import ShardWriter
    from llmctl.text.tokenizer import Tokenizer

    directory = made()
    tokenizer = Tokenizer.load(directory)
    text = "The quick brown fox jumps over the lazy dog. " * 6
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}) + "\n")
    with ShardWriter(tmp_path / "tokens", vocab_size=262, tokenizer=tokenizer.digest) as writer:
        writer.add("validation", tokenizer.encode_document(text), len(text))
    found = [as_json(directory, "--data", name)["curves"] for name in ("text.txt", "rows.jsonl", "tokens")]
    assert found[0] == found[1] == found[2]
    with ShardWriter(tmp_path / "other", vocab_size=262, tokenizer="sha256:other") as writer:
        writer.add("validation", [1, 2, 3], 3)
    with pytest.raises(InputError, match="another tokenizer"):
        invoke(directory, "--data", "other")
