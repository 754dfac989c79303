"""`llmctl scaling fit`, `plan`, `coefficients` as a user types them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner

from llmctl.errors import InputError, LlmctlError, UsageError
from llmctl.nn.counts import count
from llmctl.train.throughput import PEAKS
from llmctl_train_pretrain.scaling import parametric
from llmctl_train_pretrain.scaling.commands import scaling
from llmctl_train_pretrain.scaling.planning import size
from llmctl_train_pretrain.scaling.shapes import nearest_preset, nearest_shape


def call(*args):
    result = CliRunner().invoke(scaling, [str(arg) for arg in args], catch_exceptions=True)
    if isinstance(result.exception, LlmctlError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def as_json(*args):
    return json.loads(call(*args, "--format", "json"))


# -- fit --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory, profiles, curves):
    """Profiles and curves of the same surface in one CSV."""
    path = tmp_path_factory.mktemp("scaling") / "runs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "params", "tokens", "loss"])
        for row in profiles(seed=1).rows:
            writer.writerow([row.name, row.parameters, row.tokens, row.loss])
        for row in curves(seed=1).rows:
            writer.writerows([f"curve {row.name}", row.parameters, tokens, loss] for tokens, loss in row.curve)
    return path


@pytest.fixture(scope="module")
def fit_json(table, tmp_path_factory):
    """The fit of the table, as JSON in a file, and its page."""
    folder = tmp_path_factory.mktemp("fit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parametric, "GRID", tuple((a, 5, 0.5, 0.5, 0.5) for a in (5, 10)))
        text = call("fit", table, "--resamples", 60, "--html", folder / "fit.html", "--format", "json")
    (folder / "fit.json").write_text(text)
    return folder / "fit.json"


def test_a_fit_says_what_it_fitted_and_how_sure_it_is(fit_json, truth):
    value = json.loads(fit_json.read_text())
    assert value["runs"] == 7 * 15 + 15
    assert list(value["approaches"]) == ["1", "2", "3", "kaplan"] and value["refused"] == {}
    assert value["bootstrap"] == {"resamples": 60, "seed": 0, "level": 0.95}
    for approach in "123":
        found = value["approaches"][approach]["estimates"]["exponent"]
        assert found["low"] < found["value"] < found["high"]
        # The ends of the curves are a lopsided profile of their own, which moves approach 2 by as much as its interval.
        assert approach == "2" or found["low"] < truth.exponent < found["high"]
        assert found["value"] == pytest.approx(truth.exponent, abs=0.03)


class Page(HTMLParser):
    """Checks that tags are closed in order; keeps what is drawn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.words = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_shows_profiles_surface_and_frontiers(fit_json):
    text = fit_json.with_suffix(".html").read_text()
    page = Page(text)
    assert "http" not in text and "<script" not in text and "nan" not in text.lower().replace("financ", "")
    charts = [attrs["aria-label"] for tag, attrs in page.found if tag == "svg"]
    assert charts == ["isoFLOP profiles", "fitted surface", "residuals", "frontiers"]
    dots = [attrs for tag, attrs in page.found if tag == "circle"]
    # Profiles of 105 runs (those of curves end in budgets of their own), surface and residuals of all 120.
    assert len(dots) >= 105 + 2 * 120
    assert all(0 <= float(dot["cx"]) <= 520 and 0 <= float(dot["cy"]) <= 240 for dot in dots)
    assert "Approach 3: loss = E + A / N^alpha + B / D^beta" in page.words


def test_a_fit_as_text(table):
    text = call("fit", table, "--approach", "2", "--resamples", 30, "--drop-highest", 3)
    lines = text.splitlines()
    assert lines[0].startswith("117 runs: ")
    assert "note: 3 of 120 runs dropped by their loss: at or above the 3 highest" in lines
    assert "Approach 2, isoFLOP profiles" in lines
    assert any(line.startswith("a in N ~ C^a  0.5") for line in lines)
    assert "intervals: 95% of 30 bootstrap resamples of the runs (approach 2: of each budget's), seed 0" in lines


def test_without_resamples_there_are_no_intervals(table, monkeypatch):
    monkeypatch.setattr(parametric, "GRID", parametric.GRID[::450])
    found = as_json("fit", table, "--resamples", 0)
    assert list(found["approaches"]) == ["1", "2", "3", "kaplan"]
    for approach in found["approaches"].values():
        assert {(row["low"], row["high"]) for row in approach["estimates"].values()} == {(None, None)}
    assert len(found["approaches"]["2"]["budgets"]) == 8
    assert "-" in call("fit", table, "--resamples", 0, "--approach", "2").split("a in N ~ C^a")[1].splitlines()[0]


def test_nothing_heavy_is_needed(table):
    """The base installation has no torch, scipy, pandas or pyarrow."""
    code = (
        "import sys\nfrom llmctl.cli import main\n"
        f"for args in (['plan', '--flops', '1e20'], ['fit', {str(table)!r}, '--approach', '2']):\n"
        "    try: main(['scaling', *args])\n    except SystemExit as leave: assert not leave.code\n"
        "print([name for name in ('torch', 'scipy', 'pandas', 'pyarrow', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (("--count", "with-head"), UsageError, "--count is about trainings"),
        (("other.csv",), UsageError, "one table"),
        (("--drop-highest", 500), UsageError, "all would be dropped"),
        (("--max-loss", 0.1), UsageError, "no run is left"),
        (("--max-loss", 2.22, "--resamples", 0), InputError, "no law can be fitted"),
    ],
)
def test_mistakes_in_a_fit(table, args, error, message):
    with pytest.raises(error, match=message):
        call("fit", table, *args)


def test_columns_are_about_tables(tmp_path):
    with pytest.raises(UsageError, match="--column is about a table"):
        call("fit", "sweep/train", "--column", "loss=x", "--store", tmp_path / "store")


# -- plan -------------------------------------------------------------------------------------------------------------


def test_a_plan_names_its_coefficients_and_what_they_count():
    text = call("plan", "--flops", "5.76e23")
    assert text.startswith("besiroglu: Besiroglu et al. 2024, 2404.10102")
    assert "N counts all parameters; C = 6 N D\n" in text
    assert "optimal  72.2 B      1.33 T  18.4              5.76e+23    1.9741" in text
    assert "44.3 times the largest that was fitted" in text


def test_the_rounded_table_warns_and_says_what_else_there_is():
    text = call("plan", "--flops", "5.76e23", "--coefficients", "hoffmann")
    assert "warning: hoffmann: rounded to two figures" in text
    assert "the unrounded figures give 40.4 B and 2.38 T tokens, besiroglu 72.2 B and 1.33 T tokens" in text
    assert "rounded" not in call("plan", "--flops", "5.76e23")


@pytest.mark.parametrize(
    ("option", "value"), [("--parameters", "72248702500.38242"), ("--tokens", "1328743585388.151")]
)
def test_a_size_or_tokens_alone_are_completed_to_an_optimum(option, value):
    found = as_json("plan", option, value)
    assert found["optimal"]["flops"] == pytest.approx(5.76e23, rel=1e-9)
    assert found["chosen"] is None


def test_overtraining_and_what_it_costs(truth):
    found = as_json("plan", "--flops", "1e23", "--parameters", "8B")
    chosen, same = found["chosen"], found["same_loss"]
    assert (chosen["parameters"], chosen["flops"]) == (8e9, pytest.approx(1e23))
    assert chosen["loss"] == pytest.approx(truth.loss(8e9, 1e23 / 48e9))
    assert chosen["loss"] > found["optimal"]["loss"]
    assert same["loss"] == found["optimal"]["loss"]
    assert truth.loss(8e9, same["tokens"]) == pytest.approx(found["optimal"]["loss"], rel=1e-9)
    assert same["flops"] > 1e23
    text = call("plan", "--flops", "1e23", "--parameters", "8B")
    assert "3.68 times smaller than the optimal one and ends 0.0234 nats higher" in text


def test_a_size_that_never_gets_there():
    found = as_json("plan", "--flops", "1e24", "--parameters", "100M")
    assert found["same_loss"] is None
    assert "never reaches the optimal loss" in call("plan", "--flops", "1e24", "--parameters", "100M")


def test_size_and_tokens_together_fix_the_budget(truth):
    found = as_json("plan", "--parameters", "1B", "--tokens", "1T")
    assert found["optimal"]["flops"] == pytest.approx(6e21)
    assert found["chosen"]["loss"] == pytest.approx(truth.loss(1e9, 1e12))


def test_frontiers_alone_predict_no_penalty():
    text = call("plan", "--flops", "1e22", "--parameters", "1B", "--coefficients", "chinchilla-1")
    assert "these coefficients do not say what that costs" in text


@pytest.mark.parametrize("approach", ["", ":2", ":kaplan"])
def test_a_fit_of_ones_own_is_planned_with(fit_json, approach):
    found = as_json("plan", "--flops", "1e20", "--coefficients", f"{fit_json}{approach}")
    assert found["source"].startswith("fitted to 120 runs")
    assert found["coefficients"].endswith(approach or ":3")
    value = json.loads(fit_json.read_text())["approaches"][approach[1:] or "3"]
    assert f"{value['estimates']['exponent']['value']:.3g}" in found["note"]


def test_damaged_and_unknown_coefficients(tmp_path, fit_json):
    with pytest.raises(UsageError, match="no coefficients 'chinchila'"):
        call("plan", "--flops", 1e20, "--coefficients", "chinchila")
    with pytest.raises(UsageError, match="has no approach '7'"):
        call("plan", "--flops", 1e20, "--coefficients", f"{fit_json}:7")
    value = json.loads(fit_json.read_text())
    value["approaches"]["2"]["law"]["exponent"] = -0.1
    (tmp_path / "shrinks.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"N grows as C\^-0.1"):
        call("plan", "--flops", 1e20, "--coefficients", f"{tmp_path / 'shrinks.json'}:2")
    (tmp_path / "x.json").write_text('{"approaches": {}}')
    with pytest.raises(InputError, match="is no result of"):
        call("plan", "--flops", 1e20, "--coefficients", tmp_path / "x.json")


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("speed", "rate"),
    [
        (("--flops-per-second", "2e14"), 2e14),
        (("--gpu", "H100"), 0.4 * PEAKS["H100"]),
        (("--gpu", "A100", "--mfu", 0.5), 0.5 * PEAKS["A100"]),
        (("--tokens-per-second", "20k", "--of-parameters", "1B"), 6 * 1e9 * 20e3),
    ],
)
def test_hours_of_devices(speed, rate):
    found = as_json("plan", "--hours", 10, "--devices", 8, *speed)
    assert found["optimal"]["flops"] == pytest.approx(rate * 8 * 36000)


def test_the_speed_of_a_training_that_was_measured(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.json").write_text(json.dumps({"parameters": 1000, "tokens_per_s": 500.0}))
    found = as_json("plan", "--hours", 1, "--measured", run)
    assert found["optimal"]["flops"] == pytest.approx(6 * 1000 * 500 * 3600)
    (run / "metrics.json").write_text('{"parameters": 1000}')
    with pytest.raises(InputError, match="no `parameters` and `tokens_per_s`"):
        call("plan", "--hours", 1, "--measured", run)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give a budget"),
        (("--flops", 1e20, "--parameters", 1e9, "--tokens", 1e9), "give a budget"),
        (("--flops", 1e20, "--hours", 1), "both a budget"),
        (("--hours", 1), "how fast"),
        (("--hours", 1, "--gpu", "H100", "--flops-per-second", 1), "how fast"),
        (("--hours", 1, "--gpu", "RTX"), "peak of 'RTX' is not known"),
        (("--hours", 1, "--tokens-per-second", 5), "go together"),
        (("--hours", 1, "--flops-per-second", 5, "--mfu", 0.5), "share of a card's peak"),
        (("--flops", 1e20, "--gpu", "H100"), "--gpu has no effect without --hours"),
        (("--flops", 1e20, "--devices", 2), "--devices has no effect without --hours"),
        (("--flops", 1e20, "--family", "bert"), "no family of decoders"),
    ],
)
def test_mistakes_in_a_plan(args, message):
    with pytest.raises(UsageError, match=message):
        call("plan", *args)


@pytest.mark.parametrize("text", ["0", "-1", "7X", "many", "inf"])
def test_numbers_that_are_none(text):
    assert "Invalid value" in CliRunner().invoke(scaling, ["plan", "--flops", text]).output


# -- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", ["total", "without-embedding", "with-head"])
@pytest.mark.parametrize("parameters", [1e6, 1.24e8, 7e9, 7e10, 1e12])
def test_a_shape_has_about_the_parameters_that_were_asked_for(parameters, counts):
    shape = nearest_shape(parameters, family="llama", vocab_size=4096, context=512, counts=counts)
    assert shape.counted == pytest.approx(parameters, rel=0.1)
    found = count(shape.config)
    expected = {
        "total": found.total,
        "without-embedding": found.blocks,
        "with-head": found.blocks + 4096 * shape.config.dim,
    }
    assert shape.counted == expected[counts]
    assert 20 < shape.config.dim / shape.config.layers < 300


def test_the_aspect_decides_between_equal_counts():
    deep, wide = (
        nearest_shape(1e9, family="gpt2", vocab_size=4096, context=512, counts="total", aspect=aspect)
        for aspect in (30, 200)
    )
    assert deep.config.layers > 1.5 * wide.config.layers
    assert deep.counted == pytest.approx(wide.counted, rel=0.05)


def test_the_nearest_preset_is_named_only_if_it_is_near():
    name, shape = nearest_preset(1.24e8, vocab_size=2048, counts="total")
    assert (name, shape.total) == ("gpt2-small", 124439808)
    assert nearest_preset(1e15, vocab_size=2048, counts="total") is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(7.22487e10, "72.2 B"), (1.33e12, "1.33 T"), (216.2e15, "216200 T"), (935040, "935 k"), (42, "42")],
)
def test_counts_are_written_as_the_field_writes_them(value, text):
    assert size(value) == text


# -- coefficients -----------------------------------------------------------------------------------------------------


def test_the_published_laws_are_listed_with_their_sources():
    text = call("coefficients")
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert "72.2 B      1.33 T  18.4" in rows["besiroglu"]
    assert "32.2 B      2.98 T  92.6" in rows["hoffmann"]
    assert all(f"{name}: " in text for name in ("kaplan", "chinchilla-1", "nanochat"))
    found = {row["name"]: row for row in as_json("coefficients", "--flops", "1e20")}
    assert found["kaplan"]["counts"] == "without-embedding"
    assert found["besiroglu"]["law"]["kind"] == "surface"
