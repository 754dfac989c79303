"""A really installed plugin of tiny stages for tests of launcher and runner; installed as `fake_stages`."""

from __future__ import annotations

from llmctl import In, Out, Stage, hookimpl

MAKE = Stage(
    name="make",
    help="Write a text.",
    inputs={"files": In("files", optional=True, many=True)},
    outputs={"text": Out("dataset.text"), "metrics": Out("metrics")},
    params="fake_params:MakeParams",
    run="fake_run:make",
    headline=("rows",),
)
UPPER = Stage(
    name="upper",
    help="Write it in capitals, slowly if wanted.",
    inputs={"text": In("dataset.text")},
    outputs={"text": Out(same_as="text"), "metrics": Out("metrics")},
    params="fake_params:UpperParams",
    run="fake_run:upper",
    headline=("rows",),
)
SCORE = Stage(
    name="score",
    help="Report a number.",
    inputs={"text": In("dataset.text")},
    outputs={"metrics": Out("metrics")},
    params="fake_params:ScoreParams",
    run="fake_run:score",
    headline=("score",),
)
TRAIN = Stage(
    name="count",
    help="Add up, with checkpoints.",
    inputs={"text": In("dataset.text", optional=True)},
    outputs={"result": Out("report"), "metrics": Out("metrics")},
    params="fake_params:CountParams",
    run="fake_run:count",
)
LEARN = Stage(
    name="learn",
    help="Multiply, with a checkpoint after every step.",
    inputs={"text": In("dataset.text", optional=True)},
    outputs={"result": Out("report")},
    params="fake_params:LearnParams",
    run="fake_run:learn",
)
WRONG = Stage(
    name="wrong",
    help="Go wrong in many ways.",
    outputs={"result": Out("report")},
    params="fake_params:WrongParams",
    run="fake_run:wrong",
)
FLAKY = Stage(
    name="flaky",
    help="Fail at first.",
    outputs={"result": Out("report")},
    params="fake_params:FlakyParams",
    run="fake_run:flaky",
)
LEAK = Stage(
    name="leak",
    help="Show a secret.",
    outputs={"result": Out("report")},
    params="fake_params:LeakParams",
    run="fake_run:leak",
)
GANG = Stage(
    name="gang",
    help="Run in several processes.",
    outputs={"result": Out("report")},
    params="fake_params:GangParams",
    run="fake_run:gang",
)
PUSH = Stage(
    name="send",
    help="Act on the world.",
    inputs={"text": In("dataset.text")},
    outputs={"receipt": Out("deployment")},
    params="fake_params:PushParams",
    run="fake_run:push",
    effect=True,
)


@hookimpl
def register_stages() -> list[Stage]:
    return [MAKE, UPPER, SCORE, TRAIN, LEARN, WRONG, FLAKY, LEAK, GANG, PUSH]
