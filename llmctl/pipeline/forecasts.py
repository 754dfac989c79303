"""What the trainings of a run will take, compared with this machine, before anything is spent."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmctl.console import human_bytes, human_number, human_seconds
from llmctl.errors import LlmctlError, MachineError, StageError
from llmctl.forecast import Forecast, Given, Unknown
from llmctl.pipeline import machine
from llmctl.pipeline.inputs import Inputs
from llmctl.pipeline.plan import Decision, Planner
from llmctl.spec.resolved import Pipeline, StageRef, StageSpec
from llmctl.stage import load_string

PROCESS = {"cpu": 330 << 20, "cuda": 600 << 20}
"""What Python, torch and its libraries take before any model is there; on CUDA the context."""
DOUBT = 1.2
"""Only what exceeds the memory by more than the error of the forecast is refused."""
SHOWN = 100 << 10
"""Smaller parts are not listed."""
STEPS = 6
"""Of a rehearsal."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Operations per second of one training, all processes together, and where that is known from."""

    operations: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """The forecast of one stage, or why there is none; what its processes may have of memory, and how fast they are."""

    stage: str
    forecast: Forecast | None = None
    unknown: str = ""
    limit: int | None = None
    """Bytes that one process may take; None if nobody knows."""
    speed: Speed | None = None

    @property
    def needed(self) -> int:
        """Bytes of one process with all that it loads."""
        assert self.forecast is not None
        return self.forecast.bytes + PROCESS["cuda" if self.forecast.cuda else "cpu"]

    @property
    def seconds(self) -> float | None:
        """How long it will train."""
        if self.forecast is None or self.speed is None or self.forecast.operations is None:
            return None
        return self.forecast.operations / self.speed.operations

    def cost(self, price: float) -> float | None:
        """At `price` per hour and process."""
        if self.seconds is None or self.forecast is None:
            return None
        return self.seconds / 3600 * price * self.forecast.processes

    @property
    def fits(self) -> bool:
        """Whether it can fit, doubts counted in its favour."""
        if self.forecast is None or self.limit is None:
            return True
        return self.needed - self.forecast.bytes + self.forecast.least <= self.limit * DOUBT


def outlooks(
    pipeline: Pipeline,
    specs: Sequence[StageSpec],
    decisions: Sequence[Decision],
    planner: Planner,
    inputs: Inputs,
    limit: int | None = None,
) -> list[Outlook]:
    """Of every stage that would train, in order. `limit`: bytes per process, where not this machine is meant."""
    found: list[Outlook] = []
    forecasts: dict[str, Forecast] = {}
    outputs = {decision.id: decision.outputs for decision in decisions if not decision.works}
    works = {decision.id for decision in decisions if decision.works}
    for spec in specs:
        if not spec.stage.forecast or spec.id not in works:
            continue
        given = {}
        for port, refs in spec.inputs.items():
            there = inputs.port(spec, port, outputs)
            made_by = next((ref.stage for ref in refs if isinstance(ref, StageRef)), "")
            params = pipeline.stages[made_by].params if made_by in pipeline.stages else None
            given[port] = Given(artifacts=there or (), params=params, forecast=forecasts.get(made_by))
        forecast = _asked(spec, spec.params, given)
        if isinstance(forecast, str):
            found.append(Outlook(stage=spec.id, unknown=forecast))
            continue
        forecasts[spec.id] = forecast
        most = _limit(spec, forecast) if limit is None else limit
        found.append(
            Outlook(stage=spec.id, forecast=forecast, limit=most, speed=_recorded(spec, planner, given, forecast))
        )
    return found


def _asked(spec: StageSpec, params: Any, given: Mapping[str, Given]) -> Forecast | str:
    """What the stage's plugin foretells with `params`, or why it cannot: no reason not to run."""
    try:
        return load_string(spec.stage.forecast)(params, given)  # type: ignore[no-any-return]  # a plugin's
    except (Unknown, LlmctlError) as error:
        return str(error)
    except Exception as error:  # plugin code
        return f"its plugin failed to make one: {type(error).__name__}: {error}"


def _limit(spec: StageSpec, forecast: Forecast) -> int | None:
    """What one process may have here: its share of the memory, or of a GPU as its name tells."""
    if forecast.cuda:
        sizes = [int(size) << 30 for model in machine.gpu_models() if (size := _size(model))]
        return min(sizes, default=None)
    most = spec.resources.memory or machine.memory()
    return most // (forecast.processes // (spec.resources.nodes or 1) or 1)


def _size(model: str) -> str:
    """`80` of `NVIDIA H100 80GB HBM3`."""
    found = re.search(r"(\d+) ?GB", model)
    return found[1] if found else ""


def _recorded(spec: StageSpec, planner: Planner, given: Mapping[str, Given], now: Forecast) -> Speed | None:
    """Of the latest result of this stage in this pipeline, if it was made on the same kind of device."""
    key = planner.latest(spec).get("key")
    pointer = planner.store.pointer(str(key)) if key else None
    rate = pointer.metrics.get("tokens_per_s") if pointer else None
    if pointer is None or not isinstance(rate, int | float) or not rate:
        return None
    try:
        params = type(spec.params).model_validate_json(json.dumps(pointer.preimage.get("with", {})))
    except ValueError:  # of an older version
        return None
    before = _asked(spec, params, given)
    if isinstance(before, str):
        return None
    if ("peak_memory_bytes" in pointer.metrics) != now.cuda:
        return None
    share = now.processes / before.processes
    text = f"{human_number(float(rate))} tokens/s" + (f" × {share:g} processes" if share != 1 else "")
    return Speed(operations=rate * before.operations_per_token * share, source=f"{text} in run {pointer.run}")


def measured(found: Sequence[Outlook]) -> list[Outlook]:
    """The outlooks with the speed of a rehearsal where there is no other, in a process of its own."""
    return [
        replace(one, speed=_rehearsed(one.forecast))
        if one.forecast is not None and one.speed is None and one.forecast.rehearsal and one.fits
        else one
        for one in found
    ]


def _rehearsed(forecast: Forecast) -> Speed:
    """A few steps of one process; with several, what all of them would do if nothing were lost."""
    asked = json.dumps({**forecast.rehearsal, "steps": STEPS})
    command = [sys.executable, "-P", "-m", "llmctl.train.rehearsal"]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        said = re.sub(r"\A[\w.]+(?:Error|Exception): ", "", said)
        raise StageError(
            f"the rehearsal failed: {said}",
            hint="--measure needs the device of the spec, and memory for one micro-batch",
        )
    rate = float(json.loads(done.stdout)["tokens_per_s"])
    several = f" × {forecast.processes} processes, if nothing is lost" if forecast.processes > 1 else ""
    text = f"{human_number(rate)} tokens/s in {STEPS} steps just measured{several}"
    return Speed(operations=rate * forecast.operations_per_token * forecast.processes, source=text)


def refuse(found: Sequence[Outlook]) -> None:
    """MachineError for the first training that cannot fit: its largest part, and what to change."""
    for outlook in found:
        forecast = outlook.forecast
        if forecast is None or outlook.fits:
            continue
        where = "a GPU" if forecast.cuda else "a process"
        raise MachineError(
            f"`{outlook.stage}` needs {human_bytes(outlook.needed)} of memory, {where} has "
            f"{human_bytes(outlook.limit or 0)}; most of it are {forecast.largest}, "
            f"{human_bytes(forecast.memory[forecast.largest])}",
            hint=forecast.advice.get(forecast.largest, "train a smaller model"),
        )


def lines(found: Sequence[Outlook], price: float | None) -> Iterator[str]:
    """The outlooks in words."""
    for outlook in found:
        if outlook.forecast is None:
            yield f"{outlook.stage}: no forecast, {outlook.unknown}"
            continue
        yield from _lines(outlook, outlook.forecast, price)


def _lines(outlook: Outlook, forecast: Forecast, price: float | None) -> Iterator[str]:
    yield f"{outlook.stage}: {forecast.model}"
    yield f"  parameters  {forecast.parameters:,}"
    if forecast.tokens is None:
        yield f"  tokens      {forecast.tokens_per_step:,} per step; how many steps depends on data yet to be made"
    else:
        yield f"  tokens      {forecast.tokens:,} in {forecast.steps:,} steps"
        yield f"  operations  {forecast.operations:.3g}, {forecast.operations_per_token:.3g} per token"
    processes = f" in each of {forecast.processes} processes" if forecast.processes > 1 else ""
    limit = f" of {human_bytes(outlook.limit)}" if outlook.limit else ""
    tight = "" if outlook.limit is None or outlook.needed <= outlook.limit else ", more than there is"
    yield f"  memory      {human_bytes(outlook.needed)}{limit}{processes}{tight}, at the {forecast.moment}"
    parts = {**forecast.memory, "process": PROCESS["cuda" if forecast.cuda else "cpu"]}
    largest = sorted(parts.items(), key=lambda item: -item[1])
    yield "              " + ", ".join(f"{name} {human_bytes(size)}" for name, size in largest if size >= SHOWN)
    if forecast.note:
        yield f"              {forecast.note}"
    if outlook.seconds is not None and outlook.speed is not None:
        yield f"  time        {human_seconds(outlook.seconds)} by {outlook.speed.source}"
    elif forecast.operations is not None:
        yield "  time        not known: nothing like it ran here; `--measure` tries a few steps"
    cost = outlook.cost(price) if price is not None else None
    if cost is not None:
        yield f"  cost        {cost:.2f} at {price:g} per hour and process"
    elif price is not None:
        yield "  cost        not known without the time"


def to_json(outlook: Outlook, price: float | None) -> dict[str, Any]:
    """One outlook as plain JSON."""
    forecast = outlook.forecast
    if forecast is None:
        return {"stage": outlook.stage, "unknown": outlook.unknown}
    return {
        "stage": outlook.stage,
        "model": forecast.model,
        "parameters": forecast.parameters,
        "steps": forecast.steps,
        "tokens": forecast.tokens,
        "operations": forecast.operations,
        "processes": forecast.processes,
        "memory": {**forecast.memory, "process": PROCESS["cuda" if forecast.cuda else "cpu"]},
        "needed": outlook.needed,
        "limit": outlook.limit,
        "fits": outlook.fits,
        "moment": forecast.moment,
        "seconds": outlook.seconds,
        "speed": outlook.speed.source if outlook.speed else None,
        "cost": None if price is None else outlook.cost(price),
    }
