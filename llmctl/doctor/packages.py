"""Checks of what is installed: the interpreter, llmctl, packages that do not go together, extras, plugins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmctl.doctor.finding import Finding
from llmctl.doctor.world import Dist, World, normal

OLDEST = (3, 11)
RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-rocm")
"""Distributions that write the same module `onnxruntime`."""


def python(world: World) -> Iterator[Finding]:
    """Its version, and whether other programs' packages mix in."""
    version = ".".join(map(str, world.python))
    if world.python[:2] < OLDEST:
        text = f"{version} at {world.executable}; llmctl needs {'.'.join(map(str, OLDEST))} or newer"
        yield Finding("python", "problem", text, "python3.11 -m venv .venv && .venv/bin/pip install llmctl")
    elif not world.isolated:
        text = f"{version}, no virtual environment: packages of other programs mix in"
        yield Finding("python", "warning", text, "python3 -m venv .venv && . .venv/bin/activate && pip install llmctl")
    else:
        yield Finding("python", "ok", f"{version}, {world.executable}")


def llmctl(world: World) -> Iterator[Finding]:
    """Which llmctl this is and how it was installed."""
    from llmctl import __version__

    dist = world.has("llmctl")
    if dist is None:
        text = f"{__version__} runs from its files, it is not installed: there are no stages"
        yield Finding("llmctl", "problem", text, f"{world.pip} install -e .")
    elif dist.version != __version__:
        text = f"the files are {__version__}, the installation says {dist.version}: stages may be missing"
        again = f"-e {dist.editable}" if dist.editable else "--force-reinstall llmctl"
        yield Finding("llmctl", "problem", text, f"{world.pip} install {again}")
    else:
        how = f"editable, {dist.editable}" if dist.editable else "installed"
        yield Finding("llmctl", "ok", f"{__version__}, {how}")


def onnxruntime_packages(world: World) -> Iterator[Finding]:
    """Exactly one ONNX Runtime: side by side they overwrite each other's files."""
    found = [dist.name for name in RUNTIMES if (dist := world.has(name))]
    wanted = "onnxruntime-gpu" if len(found) != 1 and ("onnxruntime-gpu" in found or world.gpus) else "onnxruntime"
    if len(found) > 1:
        text = f"{' and '.join(found)} overwrite each other's files; keep one"
        fix = f"{world.pip} uninstall -y {' '.join(found)} && {world.pip} install {wanted}"
        yield Finding("onnxruntime-packages", "problem", text, fix)
    elif not found:
        yield Finding("onnxruntime-packages", "problem", "none is installed", f"{world.pip} install {wanted}")
    else:
        yield Finding("onnxruntime-packages", "ok", f"one: {found[0]} {world.distributions[normal(found[0])].version}")


def cpu_build(world: World) -> Iterator[Finding]:
    """Beside a CPU build of torch a CUDA torchvision breaks `import transformers`; triton has nothing to do there."""
    torch = world.has("torch")
    if torch is None or "+cpu" not in torch.version:
        return
    vision, triton = world.has("torchvision"), world.has("triton")
    if vision and "+cpu" not in vision.version:
        text = (
            f"torchvision {vision.version} is a CUDA build beside torch {torch.version}: transformers fails to import"
        )
        yield Finding("cpu-build", "problem", text, f"{world.pip} uninstall -y torchvision")
    if triton:
        text = f"triton {triton.version} is of no use beside torch {torch.version}"
        yield Finding("cpu-build", "warning", text, f"{world.pip} uninstall -y triton")


@dataclass(frozen=True)
class Rule:
    """Two packages that are known not to go together, for reasons that their own metadata does not give."""

    package: str
    versions: str
    other: str
    other_versions: str
    why: str
    install: str


RULES = (
    Rule("datatrove", "<=0.10", "xxhash", ">=4", "its deduplication hashes text, which xxhash 4 refuses", "xxhash<4"),
    Rule("evidently", "<=0.7.23", "pandas", ">=3", "it fails to import", "pandas<3"),
    Rule("optimum-onnx", "<=0.1.0", "transformers", ">=4.58", "exports fail", "transformers>=4.57,<4.58"),
    Rule("transformers", "<5", "huggingface-hub", ">=1", "it fails to import", "huggingface-hub>=0.34,<1.0"),
    Rule("transformers", ">=5", "huggingface-hub", "<1.5", "it fails to import", "huggingface-hub>=1.5,<2"),
)


def known_conflicts(world: World) -> Iterator[Finding]:
    """Pairs that are known to break each other."""
    broken = set()
    for rule in RULES:
        first, second = world.has(rule.package), world.has(rule.other)
        if first and second and _within(first, rule.versions) and _within(second, rule.other_versions):
            broken.add((first.name, second.name))
            text = f"{first.name} {first.version} beside {second.name} {second.version}: {rule.why}"
            yield Finding("conflicts", "problem", text, f"{world.pip} install '{rule.install}'")
    for dist, other, text, install in _unmet(world):
        if (dist.name, other.name) not in broken:
            yield Finding("conflicts", "problem", text, f"{world.pip} install '{install}'")


def _within(dist: Dist, versions: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(versions).contains(dist.version, prereleases=True)


def _unmet(world: World) -> Iterator[tuple[Dist, Dist, str, str]]:
    """Requirements of llmctl and of what it uses that the installed versions do not meet; pip lets that happen.

    Extras are the affair of `extras`: what an extra of llmctl lacks is no conflict.
    """
    from packaging.requirements import Requirement

    waiting, seen = ["llmctl"], set()
    while waiting:
        name = waiting.pop()
        dist = world.distributions.get(name)
        if dist is None or name in seen:
            continue
        seen.add(name)
        for text in dist.requires:
            need = Requirement(text)
            applies = need.marker is None or need.marker.evaluate({"extra": ""})
            other = world.has(need.name)
            if applies or name == "llmctl":
                waiting.append(normal(need.name))
            if applies and other and not need.specifier.contains(other.version, prereleases=True):
                said = f"{dist.name} {dist.version} needs {need.name}{need.specifier}, {other.version} is installed"
                yield dist, other, said, f"{need.name}{need.specifier}"


def tried(world: World) -> Iterator[Finding]:
    """How far the versions are from those that were tried together; for information."""
    if not world.tried:
        return
    differ = [
        f"{dist.name} {dist.version} (tried {version})"
        for name, version in world.tried.items()
        if (dist := world.has(name)) and dist.version.partition("+")[0] != version
    ]
    there = sum(1 for name in world.tried if world.has(name))
    shown = ", ".join(differ[:5]) + (f" and {len(differ) - 5} more" if len(differ) > 5 else "")
    yield Finding(
        "versions", "ok", f"{there - len(differ)} of {there} as tried" + (f"; other: {shown}" if differ else "")
    )


def missing(world: World, extra: str) -> list[str]:
    """Packages that an extra of llmctl names and that are not here, or in another version than it needs."""
    from packaging.requirements import Requirement

    dist = world.has("llmctl")
    found = []
    for text in dist.requires if dist else ():
        need = Requirement(text)
        if need.marker is None or need.marker.evaluate({"extra": ""}) or not need.marker.evaluate({"extra": extra}):
            continue
        other = world.has(need.name)
        if other is None:
            found.append(need.name)
        elif not need.specifier.contains(other.version, prereleases=True):
            found.append(f"{need.name}{need.specifier} (not {other.version})")
    return found


def extras(world: World) -> Iterator[Finding]:
    """Extras that stages need and that are not installed whole."""
    used: dict[str, list[str]] = {}
    for stage in world.registry.stages.values():
        if stage.extra and world.registry.origin(stage.name).dist == "llmctl":
            used.setdefault(stage.extra, []).append(stage.name)
    whole = []
    for extra, stages in sorted(used.items()):
        lacking = missing(world, extra)
        if lacking:
            text = f"[{extra}] lacks {', '.join(lacking)}: no {', '.join(sorted(stages))}"
            yield Finding("extras", "warning", text, world.extra(extra))
        else:
            whole.append(extra)
    if whole:
        yield Finding("extras", "ok", ", ".join(whole))


def plugins(world: World) -> Iterator[Finding]:
    """Plugins that are broken, or that claim the same name."""
    for name, failure in sorted(world.registry.failures.items()):
        yield Finding("plugins", "problem", f"{name}: {failure.reason}", failure.hint)
    if world.registry.unknown_disabled:
        names = ", ".join(world.registry.unknown_disabled)
        yield Finding(
            "plugins", "warning", f"LLMCTL_DISABLE names no installed plugin: {names}", "unset LLMCTL_DISABLE"
        )
    good = [plugin for plugin in world.registry.plugins if not plugin.failure and not plugin.disabled]
    yield Finding("plugins", "ok", f"{len(good)} loaded")
