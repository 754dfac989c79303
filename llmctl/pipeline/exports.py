"""`output:` of a stage: where its result is copied to, and the copy."""

from __future__ import annotations

import os
from pathlib import Path

from llmctl.spec.resolved import StageSpec
from llmctl.stage import Artifact
from llmctl.store.commit import intact
from llmctl.store.copying import materialise


def export_targets(spec: StageSpec) -> dict[str, Path]:
    """Port → directory. One result lies in `output:` itself, several in a subdirectory each; metrics only if alone."""
    output = export_directory(spec)
    if output is None:
        return {}
    ports = [port for port, type in spec.outputs.items() if type != "metrics"] or list(spec.outputs)
    if len(ports) == 1:
        return {ports[0]: output}
    return {port: output / port for port in ports}


def export_directory(spec: StageSpec) -> Path | None:
    """`output:` without `..`: `./specs/../exports` must not make `./specs`, where shipped specs only seem to lie."""
    return None if spec.output is None else Path(os.path.normpath(spec.output))


def export(artifact: Artifact, target: Path) -> bool:
    """Copy unless the same artifact is there already with all its files; whether it was copied.

    OSError if it cannot lie there, InputError if what is there was changed since: the result itself is not lost.
    """
    there = intact(target)
    if there is not None and there.id == artifact.id:
        return False
    materialise(artifact, target)
    return True
