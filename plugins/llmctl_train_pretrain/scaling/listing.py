"""Fits and plans as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from llmctl.console import table
from llmctl_train_pretrain.scaling.fitting import TITLES, Fitted, Report
from llmctl_train_pretrain.scaling.intervals import Estimate
from llmctl_train_pretrain.scaling.isoflop import ProfileFit
from llmctl_train_pretrain.scaling.laws import optimum
from llmctl_train_pretrain.scaling.planning import Plan, size
from llmctl_train_pretrain.scaling.published import COUNTS, PUBLISHED
from llmctl_train_pretrain.scaling.shapes import Shape

FEW = 4
"""Budgets without a minimum that are named one by one."""


def report_text(report: Report) -> str:
    """Runs, one table per approach, the frontier by all of them, and what could not be fitted."""
    return "\n\n".join(_report_sections(report))


def _report_sections(report: Report) -> Iterator[str]:
    runs, settings = report.runs, report.settings
    ranges = [
        f"{size(values.min())} to {size(values.max())} {name}"
        for name, values in (("parameters", runs.parameters), ("tokens", runs.tokens))
    ]
    yield (
        f"{len(runs)} runs: {', '.join(ranges)}, losses {runs.loss.min():.4g} to {runs.loss.max():.4g}\n"
        f"N counts {COUNTS.get(runs.counts, runs.counts)}; operations: {runs.flops}"
    )
    if runs.notes:
        yield "\n".join(f"note: {note}" for note in runs.notes)
    for found in report.fits:
        yield f"{_title(found.approach)}\n{_coefficients(found)}" + "".join(f"\n{line}" for line in _facts(found))
    if report.fits:
        yield _frontiers(report)
        yield (
            f"intervals: {settings.level:.0%} of {settings.resamples} bootstrap resamples of the runs "
            f"(approach 2: of each budget's), seed {settings.seed}"
        )
    if report.refused:
        yield "\n".join(f"{_title(approach)}: not fitted. {why}" for approach, why in report.refused.items())


def _title(approach: str) -> str:
    name = "Kaplan" if approach == "kaplan" else f"Approach {approach}"
    return f"{name}, {TITLES[approach]}"


def _coefficients(found: Fitted) -> str:
    own = {name: value for name, value in found.estimates.items() if name != "parameters"}
    rows = [(name if name != "exponent" else "a in N ~ C^a", *_cells(value)) for name, value in own.items()]
    return table(("", "VALUE", "LOW", "HIGH"), rows)


def _cells(value: Estimate) -> tuple[str, str, str]:
    numbers = (value.value, value.low, value.high)
    low, mid, high = ("-" if number is None else f"{number:.4g}" for number in numbers)
    return low, mid, high


def _facts(found: Fitted) -> Iterator[str]:
    facts = found.facts
    if "starts_agreeing" in facts:
        agreeing = f"{facts['starts_agreeing']:.0f} of the last 64 starts"
        yield f"objective {facts['objective']:.6g} (sum), reached from {agreeing}"
    if "alpha_C" in facts:
        law = f"({facts['C_c_pf_days']:.3g} PF-days / C)^{facts['alpha_C']:.4g}"
        yield f"along the best run of each budget: loss = {law}"
    if isinstance(found.detail, ProfileFit):
        rows = [(f"{p.flops:.3g}", len(p.rows), size(p.parameters), f"{p.loss:.4g}") for p in found.detail.profiles]
        yield table(("BUDGET", "RUNS", "BEST N", "LOSS"), rows)
        yield from (f"left out: {reason}" for reason in found.detail.left_out[:FEW])
        if more := len(found.detail.left_out[FEW:]):
            yield f"left out: {more} more (all with --format json)"


def _frontiers(report: Report) -> str:
    top = report.largest
    rows = []
    for found in report.fits:
        best, bounds = optimum(found.law, top), found.estimates["parameters"]
        between = "-" if bounds.low is None or bounds.high is None else f"{size(bounds.low)} to {size(bounds.high)}"
        loss = "-" if best.loss is None else f"{best.loss:.4g}"
        name = found.approach
        rows.append(
            (name, size(best.parameters), between, size(best.tokens), f"{best.tokens / best.parameters:.3g}", loss)
        )
    heads = ("APPROACH", "PARAMETERS", "INTERVAL", "TOKENS", "TOKENS/PARAMETER", "LOSS")
    return f"Best split of the largest budget, {top:.3g} operations\n{table(heads, rows)}"


def coefficients_text(flops: float) -> str:
    """The published laws and what each makes of a budget."""
    rows, sources = [], []
    for name, found in PUBLISHED.items():
        best = optimum(found.law, flops)
        loss = "-" if best.loss is None else f"{best.loss:.4g}"
        ratio = f"{best.tokens / best.parameters:.3g}"
        rows.append(
            (name, found.counts, f"{found.law.exponent:.4g}", size(best.parameters), size(best.tokens), ratio, loss)
        )
        sources.append(
            f"{name}: {found.source}" + "".join(f"\n  {text}" for text in (found.note, found.warning) if text)
        )
    heads = ("NAME", "N COUNTS", "A", "PARAMETERS", "TOKENS", "TOKENS/PARAMETER", "LOSS")
    return f"At {flops:.3g} operations, with N ~ C^A:\n\n{table(heads, rows)}\n\n" + "\n".join(sources)


def plan_text(plan: Plan) -> str:
    """Which law, the optimum, what another choice costs, a shape, warnings."""
    found = plan.coefficients
    parts = [
        f"{found.name}: {found.source}\nN counts {COUNTS.get(found.counts, found.counts)}; C = 6 N D\n"
        f"budget: {plan.budget}",
        _choices(plan),
    ]
    if cost := "\n".join(_cost(plan)):
        parts.append(cost)
    if shape := "\n".join(_shapes(plan)):
        parts.append(shape)
    if found.note:
        parts.append(f"note: {found.note}")
    if plan.warnings:
        parts.append("\n".join(f"warning: {text}" for text in plan.warnings))
    return "\n\n".join(parts)


def _choices(plan: Plan) -> str:
    rows = []
    for name, choice in (("optimal", plan.optimal), ("chosen", plan.chosen), ("same loss", plan.same_loss)):
        if choice is None or (name == "same loss" and not plan.reaches):
            continue
        loss = "-" if choice.loss is None else f"{choice.loss:.4f}"
        ratio = f"{choice.tokens / choice.parameters:.3g}"
        rows.append((name, size(choice.parameters), size(choice.tokens), ratio, f"{choice.flops:.3g}", loss))
    return table(("", "PARAMETERS", "TOKENS", "TOKENS/PARAMETER", "OPERATIONS", "LOSS"), rows)


def _cost(plan: Plan) -> Iterator[str]:
    chosen, optimal = plan.chosen, plan.optimal
    if chosen is None:
        return
    factor = optimal.parameters / chosen.parameters
    word = f"{factor:.3g} times smaller" if factor > 1 else f"{1 / factor:.3g} times larger"
    if chosen.loss is None or optimal.loss is None:
        yield f"The chosen size is {word} than the optimal one; these coefficients do not say what that costs."
        return
    yield f"The chosen size is {word} than the optimal one and ends {chosen.loss - optimal.loss:.4f} nats higher."
    if plan.same_loss is not None and plan.reaches:
        yield f"For the optimal loss it needs {plan.same_loss.flops / optimal.flops:.3g} times the budget."
    else:
        yield "It never reaches the optimal loss, whatever it is trained on."


def _shapes(plan: Plan) -> Iterator[str]:
    if plan.shape is not None:
        yield f"shape: {_shape(plan.shape)}"
        tokens = plan.trained.tokens
        counted, rule = plan.shape.flops(tokens), 6 * plan.shape.counted * tokens
        yield (
            f"  its training on {size(tokens)} tokens: 6 N D {rule:.3g} operations, "
            f"counted with attention {counted:.3g} ({counted / rule - 1:+.1%})"
        )
        off = plan.shape.counted / plan.trained.parameters - 1
        yield f"  its N is {plan.shape.counted:,}, {off:+.1%} of the plan's" + (
            f"; all parameters: {plan.shape.total:,}" if plan.shape.total != plan.shape.counted else ""
        )
    if plan.preset is not None:
        name, shape = plan.preset
        off = shape.counted / plan.trained.parameters - 1
        yield f"nearest by name: {name}, {_shape(shape)}\n  its N is {shape.counted:,}, {off:+.1%}"


def _shape(shape: Shape) -> str:
    config = shape.config
    return (
        f"{config.arch}, {config.layers} layers × {config.dim}, {config.heads} heads, feed-forward {config.ff_dim}, "
        f"vocabulary {config.vocab_size}, context {config.context}"
    )
