"""Checks of what is installed: the interpreter, llmctl, packages that do not go together, extras, plugins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmctl.doctor.finding import Finding
from llmctl.doctor.world import Dist, World, normal

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

OLDEST = (3, 11)
RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-rocm")
"""Distributions that write the same module `onnxruntime`."""
ROOTS = ("llmctl", "alt-profanity-check", "datasets", "datatrove", "sentence-transformers")
"""Whose requirements are followed: llmctl's, and those of packages often beside it that bind versions of its own."""


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
    ours = world.has("llmctl")
    needs = [need.name for need in requirements(ours) if applies(need)] if ours else []
    wanted = next((name for name in needs if name in RUNTIMES), "onnxruntime")
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

    return fits(SpecifierSet(versions), dist)


def fits(versions: SpecifierSet, dist: Dist) -> bool:
    """Whether an installed version is allowed; one that nobody can read is."""
    from packaging.version import InvalidVersion, Version

    try:
        return versions.contains(Version(dist.version), prereleases=True)
    except InvalidVersion:
        return True


def requirements(dist: Dist) -> Iterator[Requirement]:
    """What a distribution says that it needs; lines that nobody can read are left out."""
    from packaging.requirements import InvalidRequirement, Requirement

    for text in dist.requires:
        try:
            yield Requirement(text)
        except InvalidRequirement:
            continue


def applies(need: Requirement, extra: str = "") -> bool:
    """Whether a requirement is one here, with an extra or without."""
    return need.marker is None or need.marker.evaluate({"extra": extra})


def _unmet(world: World) -> Iterator[tuple[Dist, Dist, str, str]]:
    """Requirements of `ROOTS` and of what they use that the installed versions do not meet; pip lets that happen.

    Extras are the affair of `extras`: what an extra of llmctl lacks is no conflict.
    """
    waiting, seen = list(ROOTS), set()
    while waiting:
        name = waiting.pop()
        dist = world.distributions.get(name)
        if dist is None or name in seen:
            continue
        seen.add(name)
        for need in requirements(dist):
            other = world.has(need.name)
            if applies(need) or name == "llmctl":
                waiting.append(normal(need.name))
            if applies(need) and other and not fits(need.specifier, other):
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
    dist = world.has("llmctl")
    found = []
    for need in requirements(dist) if dist else ():
        if applies(need) or not applies(need, extra):
            continue
        other = world.has(need.name)
        if other is None:
            found.append(need.name)
        elif not fits(need.specifier, other):
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
