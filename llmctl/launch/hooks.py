"""The two hooks that a stage's process calls: `run_stage` around the work, `log_metrics` for every number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmctl.hookspecs import hookimpl
from llmctl.registry import Registry
from llmctl.stage import Context, Stage


class CallStage:
    """The last implementation of `run_stage`: it just calls. Wrappers of plugins go around it."""

    @hookimpl(trylast=True)
    def run_stage(self, stage: Stage, context: Context, call: Callable[[], None]) -> bool:
        """Run the stage."""
        call()
        return True


def call_stage(registry: Registry, stage: Stage, context: Context, call: Callable[[], None]) -> None:
    """Run one stage through the hook; its exceptions come out unchanged."""
    name = "llmctl: call the stage"
    if not registry.manager.has_plugin(name):
        registry.manager.register(CallStage(), name=name)
    registry.hook.run_stage(stage=stage, context=context, call=call)


class MetricSinks:
    """Calls every `log_metrics` alone: one that raises is reported once, and the others still get their numbers."""

    def __init__(self, registry: Registry, stage: str, warn: Callable[[str], None]) -> None:
        self._registry = registry
        self._stage = stage
        self._warn = warn
        self._reported: set[str] = set()

    def __call__(self, metric: Mapping[str, Any]) -> None:
        """Pass one metric event on, if its value is a number."""
        value: Any = metric.get("value")
        value = value.item() if hasattr(value, "item") else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        arguments = {"stage": self._stage, "values": {metric["name"]: value}, "step": metric.get("step")}
        for sink in self._registry.hook.log_metrics.get_hookimpls():
            try:
                sink.function(*(arguments[name] for name in sink.argnames))
            except Exception as error:  # plugin code: a broken tracker must not stop a training run
                if sink.plugin_name not in self._reported:
                    self._reported.add(sink.plugin_name)
                    who = sink.plugin_name.partition("=")[0]
                    self._warn(f"the plugin `{who}` failed to log metrics: {type(error).__name__}: {error}")
