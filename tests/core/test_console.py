"""What a person sees: numbers, tables, plain lines, bars, colours."""

import io
import json

import pytest

from llmctl import console
from llmctl.sparkline import Course


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("NO_COLOR", "CLICOLOR_FORCE", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (10 * 1024**2, "10 MiB"), (3e12, "2.7 TiB")],
)
def test_human_bytes(count, text):
    assert console.human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1:00 min"),
        (185, "3:05 min"),
        (7300, "2:01:40 h"),
    ],
)
def test_human_seconds(seconds, text):
    assert console.human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.23456, "1.235"),
        (0.00001, "1e-05"),
        (12, "12"),
        (9999, "9999"),
        (12345, "12.3k"),
        (2.5e6, "2.5M"),
        (True, "True"),
        ("x", "x"),
    ],
)
def test_human_number(value, text):
    assert console.human_number(value) == text


def test_table_aligns_numbers_right_and_texts_left():
    assert console.table(("NAME", "N"), [("a", 1), ("long", 100)]) == "NAME    N\na       1\nlong  100"
    assert console.table(("NAME", "STATE"), []) == "NAME  STATE"
    assert console.table(("A", "B"), [("x", "")]) == "A  B\nx"


@pytest.mark.parametrize(
    ("env", "terminal", "colour", "bars"),
    [
        ({}, True, True, True),
        ({}, False, False, False),
        ({"NO_COLOR": "1"}, True, False, True),
        ({"CLICOLOR_FORCE": "1"}, False, True, False),
        ({"NO_COLOR": "1", "CLICOLOR_FORCE": "1"}, True, False, True),
        ({"CLICOLOR_FORCE": "0"}, False, False, False),
        ({"TERM": "dumb"}, True, False, False),
        ({"CI": "true"}, True, True, False),
    ],
)
def test_environment_is_honoured(env, terminal, colour, bars, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    stream = Terminal() if terminal else io.StringIO()
    assert console.wants_colour(stream) is colour
    assert console.wants_bars(stream) is bars
    with console.open_reporter(stream=stream) as reporter:
        assert isinstance(reporter, console.LiveReporter) is bars


def drive(reporter, clock):
    """One run: a cached stage, a trained one, a gate, a warning twice, a failed one."""
    events = [
        (0, {"type": "run.start"}),
        (0, {"type": "plan", "stages": ["data", "train", "eval"]}),
        (0, {"type": "stage.cached", "stage": "data"}),
        (0, {"type": "run.progress", "done": 1, "total": 3, "eta_s": 75.0}),
        (1, {"type": "stage.start", "stage": "train"}),
        (2, {"type": "stage.progress", "stage": "train", "step": 1, "total": 100, "loss": 5.0}),
        (
            13,
            {
                "type": "stage.progress",
                "stage": "train",
                "step": 10,
                "total": 100,
                "tokens_per_s": 12345.0,
                "loss": 4.5,
            },
        ),
        (14, {"type": "stage.progress", "stage": "train", "step": 11, "total": 100, "loss": 4.4}),
        (15, {"type": "warning", "stage": "train", "text": "few documents"}),
        (15, {"type": "warning", "stage": "train", "text": "few documents"}),
        (15, {"type": "stage.checkpoint", "stage": "train", "step": 0}),
        (15, {"type": "stage.checkpoint", "stage": "train", "step": 50}),
        (16, {"type": "metric", "stage": "train", "name": "loss.train", "value": 1.25}),
        (16, {"type": "artifact", "stage": "train", "port": "model", "id": "sha256:0"}),
        (21, {"type": "stage.end", "stage": "train", "code": 0, "metrics": {"loss.train": 1.25}}),
        (21, {"type": "gate", "stage": "train", "metric": "loss.train", "value": 1.25, "limit": 1.0, "ok": False}),
        (21, {"type": "stage.start", "stage": "eval"}),
        (22, {"type": "stage.end", "stage": "eval", "code": 3}),
        (22, {"type": "something.new"}),
    ]
    for now, event in events:
        clock.now = now
        reporter.event(event)
    reporter.close()
    reporter.close()
    reporter.event({"type": "log", "text": "after the end"})


def test_plain_lines_are_few_and_say_what_matters():
    stream, clock = io.StringIO(), Clock()
    drive(console.Reporter(stream, clock), clock)
    assert stream.getvalue().splitlines() == [
        "[1/3] data: cached",
        "[2/3] train: start, about 1:15 min left in all",
        "train: step 10 of 100  loss 4.5  tokens/s 12.3k  1:48 min left",
        "warning: train: few documents",
        "train: checkpoint at step 50",
        "train: done in 20 s  loss.train 1.25",
        "train: gate loss.train FAILED: 1.25 (limit 1)",
        "[3/3] eval: start, about 1:15 min left in all",
        "eval: failed with exit 3 after 1.0 s",
        "1 warning:",
        "  train: few documents",
    ]


def test_heartbeat_is_per_stage_and_at_most_every_ten_seconds():
    stream, clock = io.StringIO(), Clock()
    reporter = console.Reporter(stream, clock)
    for stage in ("a", "b"):
        reporter.event({"type": "stage.start", "stage": stage})
    for step in range(100):
        clock.now = step * 0.5
        for stage in ("a", "b"):
            reporter.event({"type": "stage.progress", "stage": stage, "step": step, "total": None})
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if line.startswith("a: step")] == [
        "a: step 20",
        "a: step 40",
        "a: step 60",
        "a: step 80",
    ]
    assert len(lines) == 2 + 2 * 4


def test_live_display_shows_the_bars_and_leaves_a_clean_terminal():
    stream, clock = Terminal(), Clock()
    reporter = console.LiveReporter(stream, clock)
    drive(reporter, clock)
    text = stream.getvalue()
    assert "train: done in 20 s  loss.train 1.25" in text
    assert "data: cached" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor hidden once, and shown again
    assert "after the end" not in text
    assert text.rstrip().endswith("train: few documents")


def test_live_display_shows_progress_and_the_time_left():
    stream, clock = Terminal(), Clock()
    reporter = console.LiveReporter(stream, clock)
    reporter.event({"type": "plan", "stages": [{"stage": "train"}, {"stage": "eval"}]})
    reporter.event({"type": "stage.start", "stage": "train"})
    clock.now = 10
    reporter.event({"type": "stage.progress", "stage": "train", "step": 50, "total": 100, "loss": 2.5})
    reporter.event({"type": "run.progress", "done": 0, "total": 2, "eta_s": 30})
    reporter._bars.refresh()
    text = stream.getvalue()
    assert "[1/2] train" in text
    assert "step 50 of 100  loss 2.5  10 s left" in text
    assert "0 of 2 stages, about 30 s left" in text
    reporter.close()


def test_no_colour_means_no_colour_codes(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    stream, clock = Terminal(), Clock()
    drive(console.LiveReporter(stream, clock), clock)
    assert "\x1b[3" not in stream.getvalue()


def test_logs_with_square_brackets_survive_the_live_display():
    stream, clock = Terminal(), Clock()
    reporter = console.LiveReporter(stream, clock)
    reporter.event({"type": "log", "stage": "sft[lr=3e-5]", "text": "[bold]as typed[/bold] :smile:"})
    reporter.close()
    assert "sft[lr=3e-5]: [bold]as typed[/bold] :smile:" in stream.getvalue()


def test_a_stage_that_was_stopped_did_not_fail():
    stream = io.StringIO()
    reporter = console.Reporter(stream, Clock())
    reporter.event({"type": "stage.end", "stage": "train", "code": 75, "seconds": 2.0, "stopped": True})
    assert stream.getvalue() == "train: stopped after 2.0 s\n"


def several(reporter):
    """Two stages that run at once, the second at its second attempt, and a choice."""
    for event in (
        {"type": "plan", "stages": ["a", "b", "best", "c"]},
        {"type": "stage.start", "stage": "a", "attempt": 1},
        {"type": "stage.start", "stage": "b", "attempt": 1},
        {"type": "stage.start", "stage": "b", "attempt": 2},
        {"type": "stage.progress", "stage": "a", "step": 5, "total": 10},
        {"type": "stage.progress", "stage": "b", "step": 2, "total": 10},
    ):
        reporter.event(event)


CHOICE = {"stage": "sft[lr=1e-5]", "rows": 4, "values": {"lr": 1e-5}, "metric": "acc", "value": 0.5}


def test_stages_that_run_at_once_are_counted():
    stream = io.StringIO()
    with console.Reporter(stream) as reporter:
        several(reporter)
        for stage in "ab":
            reporter.event({"type": "stage.end", "stage": stage, "code": 0, "seconds": 1.0})
        reporter.event({"type": "stage.end", "stage": "best", "code": 0, "seconds": 0.0, "choice": CHOICE})
        reporter.event({"type": "stage.start", "stage": "c"})
    assert stream.getvalue().splitlines() == [
        "[1/4] a: start",
        "[2/4] b: start",
        "[2/4] b: start attempt 2",
        "a: done in 1.0 s",
        "b: done in 1.0 s",
        "best: chose sft[lr=1e-5] of 4, lr 1e-05: acc 0.5",
        "[4/4] c: start",
    ]


def test_every_running_stage_has_one_bar():
    stream = Terminal()
    with console.LiveReporter(stream) as reporter:
        several(reporter)
        shown = [task.description for task in reporter._bars.tasks]
        assert shown == ["run", "[1/4] a", "[2/4] b"]
        assert reporter._bars.tasks[0].completed == pytest.approx(0.7)


def test_the_log_of_a_machine_is_the_events():
    stream = Terminal()
    with console.open_reporter(stream=stream, log_format="json") as reporter:
        several(reporter)
        reporter.event({"type": "warning", "text": "ä"})
    rows = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [row["type"] for row in rows][-2:] == ["stage.progress", "warning"]
    assert "ä" in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_a_training_shows_its_numbers_with_units_and_the_course_of_its_loss():
    event = {
        "stage": "train", "step": 30, "total": 90, "loss": 2.5, "lr": 0.01, "grad_norm": 0.75, "tokens_per_s": 12345.0,
        "utilisation": 0.413, "memory_bytes": 3 << 29,
    }  # fmt: skip
    shown = console.shown_fields(event)
    assert list(shown.items()) == [
        ("loss", "2.5"), ("lr", "0.01"), ("norm", "0.75"), ("tokens/s", "12.3k"), ("MFU", "41%"), ("memory", "1.5 GiB")
    ]  # fmt: skip
    stream = Terminal()
    with console.LiveReporter(stream, clock=lambda: 0.0) as reporter:
        reporter.event({"type": "plan", "stages": ["train"]})
        reporter.event({"type": "stage.start", "stage": "train"})
        for loss in (4.0, 3.0, float("nan"), 2.5):
            reporter.event({**event, "type": "stage.progress", "loss": loss})
        first, second = reporter._bars.tasks[0].fields["note"].split("\n")
    assert first == "step 30 of 90"
    assert second.startswith("█▃▁  loss 2.5") and second.endswith("memory 1.5 GiB")


def test_the_course_of_a_long_run_stays_short_and_keeps_its_shape():
    course = Course()
    assert course.line() == ""
    for step in range(10_000):
        course.add(1 / (1 + step))
    assert Course.WIDTH <= len(course.line()) <= 2 * Course.WIDTH
    assert course.line()[0] == "█" and course.line()[-1] == "▁"
