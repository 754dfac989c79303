"""`compare`: planted marks, a model against itself, a slower one, and what is refused."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from scipy import stats

from llmctl import Artifact, InputError, StageError, TempFail, UsageError
from llmctl.testing import run_stage
from llmctl.testing.artifacts import make
from llmctl_eval import COMPARE, EVAL
from llmctl_eval.comparing import cells, table
from llmctl_eval.scatter import scatter
from llmctl_eval.tradeoffs import best, median_ratio, pareto, quartiles
from llmctl_eval.variants import Variant

QUICK = {"prompt_tokens": 16, "steps": 4, "batch": 2, "rounds": 6, "threads": 1, "device": "cpu"}

# Marks


def variant(bits=None, step=1.0, size=1.0):
    return {"step_ms": step, "bytes": size, **({} if bits is None else {"bits_per_byte": bits})}


def test_the_best_of_a_column_and_ties():
    found = {"a": {"bytes": 3, "tokens_per_s": 5}, "b": {"bytes": 2, "tokens_per_s": 9}, "c": {"bytes": 2}}
    assert best(found, "bytes") == ["b", "c"]
    assert best(found, "tokens_per_s") == ["b"]
    assert best(found, "bits_per_byte") == []


@pytest.mark.parametrize(
    ("found", "front"),
    [
        # the second is larger, slower and worse; the third is worse, but smaller
        ({"a": variant(1, 2, 3), "b": variant(2, 3, 4), "c": variant(2, 3, 2)}, ["a", "c"]),
        # equal ones stay together, equal but for one number they do not
        ({"a": variant(1, 2, 3), "b": variant(1, 2, 3)}, ["a", "b"]),
        ({"a": variant(1, 2, 3), "b": variant(1, 2, 3.5)}, ["a"]),
        # no quality at all: speed and size decide; of one alone: the worst
        ({"a": variant(None, 2, 3), "b": variant(None, 3, 2), "c": variant(None, 3, 3)}, ["a", "b"]),
        ({"a": variant(1, 2, 3), "b": variant(None, 2, 3), "c": variant(None, 1, 3)}, ["a", "c"]),
    ],
)
def test_the_pareto_front(found, front):
    assert pareto(found) == front


def test_the_front_is_that_of_brute_force():
    random = np.random.default_rng(0)
    points = random.integers(0, 4, (40, 3))
    found = {str(i): variant(*map(float, point)) for i, point in enumerate(points)}
    kept = [i for i, own in enumerate(points) if not ((points <= own).all(1) & (points < own).any(1)).any()]
    assert pareto(found) == [str(i) for i in kept]
    assert 0 < len(kept) < len(points)


@pytest.mark.parametrize("count", [6, 7, 9, 15, 40])
def test_the_interval_of_a_median_is_scipys(count):
    random = np.random.default_rng(count)
    own, firsts = random.lognormal(size=count), random.lognormal(size=count)
    found = median_ratio(own.tolist(), firsts.tolist())
    ratios = own / firsts
    expected = stats.quantile_test(ratios, p=0.5).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found.value == pytest.approx(np.median(ratios))


def test_five_ratios_have_no_such_interval():
    with pytest.raises(ValueError, match="no 95% interval"):
        median_ratio([1.0] * 5, [1.0] * 5)


def test_quartiles_are_numpys():
    values = np.random.default_rng(1).random(9).tolist()
    found = quartiles(values)
    assert (found.low, found.value, found.high) == pytest.approx(tuple(np.quantile(values, [0.25, 0.5, 0.75])))


def planted(**more):
    times = {f"{name}{end}": 1.0 for name in ("first_token", "step", "tokens_per_s") for end in ("_ratio",)}
    times |= {f"{name}_{end}": 1.0 for name in times for end in ("low", "high")}
    return {**times, "first_token_ms": 1.0, "step_ms": 2.0, "tokens_per_s": 3.0, "bytes": 4.0, **more}


def test_the_table_marks_the_best_and_the_front():
    found = {"big": planted(bits_per_byte=1.0), "small": planted(bytes=2.0, bits_per_byte=1.5)}
    head, *rows = cells(found)
    assert head == ["variant", "size", "first token", "step", "tokens/s", "bits/byte", "Pareto"]
    marked = [[name for name, text in zip(head, row, strict=True) if text.endswith("*")] for row in rows]
    assert marked == [["first token", "step", "tokens/s", "bits/byte"], ["size", "first token", "step", "tokens/s"]]
    assert [row[-1] for row in rows] == ["yes", "yes"]
    found["worse"] = planted(bytes=5.0)  # its quality is missing
    assert list(cells(found))[-1][-2:] == ["-  ", "no"]
    assert len({len(line) for line in list(table(found))[:-1]}) == 1


def test_the_dots_of_the_front_are_full():
    drawn = scatter({"a<b": (1.0, 2.0), "c": (2.0, 2.0)}, ["a<b"])
    assert "a&lt;b" in drawn
    assert drawn.count("<circle") == 2
    assert drawn.count("fill:none") == 1


# Bundles


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Bundles of random weights, of one shape but for what is given."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnx")
    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer
    from llmctl_export_onnx import EXPORT_ONNX

    def made(tokenizer, **shape):
        torch.manual_seed(0)
        given = {"dim": 32, "layers": 1, "heads": 2, "kv_heads": 1, "vocab_size": 262, "context": 128, **shape}
        net = Transformer(ModelConfig(arch="llama", bos_id=0, eos_id=1, pad_id=2, **given))
        source = tmp_path_factory.mktemp("hf")
        save_model(net.eval(), source, tokenizer)
        params = {"parity_prompts": 2, "threads": 1}
        model = Artifact(source, "model.hf")
        return run_stage(EXPORT_ONNX, tmp_path_factory.mktemp("onnx"), params, model=model).outputs["model"]

    return made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make("tokenizer", tmp_path_factory.mktemp("tokenizer")).path


@pytest.fixture(scope="module")
def small(export, tokenizer):
    return export(tokenizer)


@pytest.fixture(scope="module")
def large(export, tokenizer):
    return export(tokenizer, layers=8, dim=128, tie_embeddings=False)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return make("dataset.tokens", tmp_path_factory.mktemp("tokens"))


def files_size(path):
    return sum(len(one.read_bytes()) for one in path.rglob("*") if one.is_file())


@pytest.fixture(scope="module")
def compared(small, large, tokens, tmp_path_factory):
    """A bundle, the same again, and a larger one."""
    names = ["one", "again", "large"]
    given = {"model": [small, small, large], "data": tokens}
    return run_stage(COMPARE, tmp_path_factory.mktemp("compared"), {**QUICK, "rounds": 15, "names": names}, **given)


def test_sizes_are_those_of_the_files(compared, small, large):
    assert compared.metrics["one.bytes"] == compared.metrics["again.bytes"] == files_size(small.path)
    assert compared.metrics["large.bytes"] == files_size(large.path)
    assert compared.metrics["best.bytes"] == "one, again"


def test_a_model_against_itself_is_1_within_the_noise(compared):
    found = compared.metrics
    for name in ("first_token_ratio", "step_ratio", "tokens_per_s_ratio"):
        low, high = found[f"again.{name}_low"], found[f"again.{name}_high"]
        assert low <= 1 <= high or abs(found[f"again.{name}"] - 1) < 0.25, (name, low, high)
        assert found[f"one.{name}"] == found[f"one.{name}_low"] == found[f"one.{name}_high"] == 1
    assert found["again.bits_per_byte"] == found["one.bits_per_byte"]
    assert found["again.top1_agreement"] == 1
    assert found["again.peak_memory_bytes"] == pytest.approx(found["one.peak_memory_bytes"], rel=0.1)


def test_a_larger_model_is_found_larger_and_slower(compared):
    found = compared.metrics
    assert found["large.bytes"] > found["one.bytes"]
    assert found["large.step_ratio_low"] > 1
    assert found["large.first_token_ratio_low"] > 1
    assert found["large.tokens_per_s_ratio_high"] < 1
    assert found["large.peak_memory_bytes"] > found["one.peak_memory_bytes"]
    assert "large" not in found["best.step_ms"]


def test_memory_is_the_variants_own(compared):
    """The process that asks holds torch: a variant's would be as large if it began with that."""
    import resource

    assert compared.metrics["one.peak_memory_bytes"] < 0.8 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_times_lie_between_their_quartiles_and_throughput_is_of_the_batch(compared):
    found = compared.metrics
    for name in ("one", "again", "large"):
        for column in ("first_token_ms", "step_ms", "tokens_per_s"):
            assert 0 < found[f"{name}.{column}_low"] <= found[f"{name}.{column}"] <= found[f"{name}.{column}_high"]
    # Two rows at once are never as slow as ten one by one, and never faster than two steps in the time of a tenth.
    assert 0.2 < found["large.tokens_per_s"] * found["large.step_ms"] / 1000 < 20


def test_quality_is_that_of_eval(compared, small, tokens, tmp_path):
    params = {"threads": 1, "resamples": 100, "device": "cpu"}
    found = run_stage(EVAL, tmp_path, params, model=small, data=[tokens]).metrics
    assert compared.metrics["one.bits_per_byte"] == pytest.approx(found["perplexity.bits_per_byte"], rel=1e-6)


def test_agreement_is_that_of_the_likeliest_tokens(compared, small, large, tokens):
    from llmctl.ort import open_bundle
    from llmctl.text.shards import TokenShards
    from llmctl.text.tokenizer import Tokenizer

    sizes = np.array(Tokenizer.load(small.path).token_bytes())
    part = TokenShards.open(tokens).split("validation")
    sides = [open_bundle(model.path, "cpu", 1) for model in (small, large)]
    same = []
    for number in range(len(part)):
        ids = part.document(number).tolist()
        one, other = (side.logits(ids)[:-1].argmax(axis=1) for side in sides)
        same += (one == other)[sizes[ids[1:]] > 0].tolist()
    assert compared.metrics["large.top1_agreement"] == pytest.approx(np.mean(same))
    assert np.mean(same) < 0.9
    assert compared.metrics["best.top1_agreement"] == "again"


def test_a_page_with_the_table_and_dots(compared):
    page = (compared.outputs["report"].path / "compare.html").read_text()
    assert page.count("<circle") == 6
    assert "again" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_chat_counts_the_answers_alone(small, large, tmp_path):
    chat = make("dataset.chat", tmp_path / "chat")
    given = {"model": [small, large], "data": chat}
    whole = run_stage(COMPARE, tmp_path / "a", QUICK, **given).metrics
    few = run_stage(COMPARE, tmp_path / "b", {**QUICK, "max_tokens": 80}, **given).metrics
    train = run_stage(COMPARE, tmp_path / "c", {**QUICK, "split": "train"}, **given).metrics
    found = [metrics["model-1.bits_per_byte"] for metrics in (whole, few, train)]
    assert len(set(found)) == 3
    # The same by hand: what the model says of each token of the answers, over their bytes.
    from llmctl.ort import open_bundle
    from llmctl.text.datasets import read_rows
    from llmctl.text.tokenizer import Tokenizer

    generator, tokenizer = open_bundle(small.path, "cpu", 1), Tokenizer.load(small.path)
    nats = size = 0.0
    for row in read_rows(chat, "validation"):
        *_, answer = row["messages"]
        ids = tokenizer.encode_chat(row["messages"]).ids
        count = len(answer["content"].encode())  # a token is a byte, and one closes the answer
        start = len(tokenizer.encode_chat(row["messages"][:-1], add_generation_prompt=True).ids)
        nats -= generator.logprobs(ids)[start - 1 : start - 1 + count].astype(float).sum()
        size += count
    assert found[0] == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_without_data_there_is_no_quality(small, large, tmp_path):
    done = run_stage(COMPARE, tmp_path, QUICK, model=[small, large])
    assert not [name for name in done.metrics if "bits_per_byte" in name or "top1" in name]
    assert done.metrics["pareto"] == "model-1"
    assert done.metrics["model-1.pareto"] is True
    assert done.metrics["model-2.pareto"] is False
    assert json.loads((done.outputs["metrics"].path / "metrics.json").read_text())["models"] == 2


def test_a_longer_prompt_takes_longer(large, tmp_path):
    ways = [{**QUICK, "prompt_tokens": count} for count in (4, 120)]
    short, long = (run_stage(COMPARE, tmp_path / str(i), way, model=[large, large]) for i, way in enumerate(ways))
    assert long.metrics["model-1.first_token_ms"] > short.metrics["model-1.first_token_ms"]


# What is refused


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"names": ["a", "a"]}, "a name twice"),
        ({"names": ["a b", "c"]}, "no name of a variant"),
        ({"names": ["best", "c"]}, "no name of a variant"),
        ({"rounds": 5}, "greater than or equal to 6"),
    ],
)
def test_parameters_that_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        COMPARE.load_params().model_validate(params)


def test_one_model_alone_and_too_few_names_are_refused(small, tmp_path):
    with pytest.raises(UsageError, match="one model alone"):
        run_stage(COMPARE, tmp_path / "a", QUICK, model=[small])
    with pytest.raises(UsageError, match="3 names are given for 2 models"):
        run_stage(COMPARE, tmp_path / "b", {**QUICK, "names": ["a", "b", "c"]}, model=[small, small])


def test_other_tokenizers_are_refused_where_there_is_data(small, tokens, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(small.path, other)
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace("<|user|>", "<|human|>"))
    models = [small, Artifact(other, "model.onnx")]
    with pytest.raises(UsageError, match="another tokenizer than"):
        run_stage(COMPARE, tmp_path / "a", QUICK, model=models, data=tokens)
    with pytest.raises(InputError, match="the tokens in .* are of another tokenizer"):
        run_stage(COMPARE, tmp_path / "b", QUICK, model=[models[1], models[1]], data=tokens)
    assert run_stage(COMPARE, tmp_path / "c", QUICK, model=models).metrics["models"] == 2


def test_a_damaged_or_missing_bundle_is_named_in_a_line(small, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(small.path, damaged)
    (damaged / "model.onnx").write_bytes(b"no graph")
    for path in (damaged, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="variant model-2: ") as caught:
            run_stage(COMPARE, tmp_path / f"{path.name}-out", QUICK, model=[small, Artifact(path, "model.onnx")])
        assert str(path) in caught.value.message
        assert "\n" not in caught.value.message


def test_a_prompt_beyond_the_context_is_refused(small, tmp_path):
    with pytest.raises(InputError, match="125 tokens and 4 steps exceed its context of 128"):
        run_stage(COMPARE, tmp_path, {**QUICK, "prompt_tokens": 125}, model=[small, small])


def test_an_empty_split_is_refused(small, tmp_path):
    from llmctl.text.datasets import DatasetWriter

    with DatasetWriter(tmp_path / "chat", "dataset.chat", ("validation",)) as writer:
        writer.add("validation", {"id": "a", "messages": [{"role": "user", "content": "only a question"}]})
    data = Artifact(tmp_path / "chat", "dataset.chat")
    with pytest.raises(InputError, match="holds no text to measure on"):
        run_stage(COMPARE, tmp_path / "out", QUICK, model=[small, small], data=data)


def test_a_variant_whose_process_ends_is_named(small):
    found = Variant.start("one", small, "cpu", 1)
    try:
        found.process.kill()
        with pytest.raises(StageError, match="the process of variant one .* ended with -9"):
            found.ask("turn", prompt=[3, 4], steps=1, batch=1)
    finally:
        found.close()


def test_it_stops_between_rounds_and_leaves_no_process(small, tmp_path, monkeypatch):
    from llmctl import Context

    started = []
    begin = Variant.start.__func__
    monkeypatch.setattr(Variant, "start", classmethod(lambda cls, *a: started.append(begin(cls, *a)) or started[-1]))
    asked = iter([False, True])
    outputs = {"report": tmp_path / "r", "metrics": tmp_path / "m"}
    ctx = Context("compare", outputs, tmp_path / "resume", lambda kind, fields: None, lambda: next(asked))
    with pytest.raises(TempFail, match="stopped at step 1"):
        COMPARE.load_run()(ctx, COMPARE.load_params().model_validate(QUICK), model=[small, small])
    assert [one.process.poll() is not None for one in started] == [True, True]
