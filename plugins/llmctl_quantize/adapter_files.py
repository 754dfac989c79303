"""The adapters beside a graph that became float16: their matrices too, since a graph takes its own dtype."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from llmctl.errors import InputError, StageError
from llmctl.ort.adapters import DIRECTORY, ENDING
from llmctl_quantize import halves


def halve(bundle: Path) -> None:
    """Rewrite every adapter of `bundle`; InputError for a matrix that float16 cannot hold."""
    for path in sorted((bundle / DIRECTORY).glob(f"*{ENDING}")):
        given = _read(path)
        rounded = {name: halves.rounded(f"{name}` of `{path.name}", array) for name, array in given[0].items()}
        file = ort.AdapterFormat()
        file.set_adapter_version(given[1])
        file.set_model_version(given[2])
        file.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in rounded.items()})
        try:
            file.export_adapter(str(path.resolve()))
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise StageError(f"cannot write {path}: {error}", hint="is the disk full?") from error


def _read(path: Path) -> tuple[dict[str, np.ndarray], int, int]:
    """Copies of the matrices, the version of the adapter and that of its model."""
    try:
        file = ort.AdapterFormat.read_adapter(str(path))
        found = {name: value.numpy().copy() for name, value in sorted(file.get_parameters().items())}
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}", hint="export it again") from error
    return found, file.get_adapter_version(), file.get_model_version()
