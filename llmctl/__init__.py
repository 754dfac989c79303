"""llmctl: one plugin-based command line from raw text to a served ONNX language model.

This module is the plugin API; everything else may change between minor versions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmctl.errors import InputError, LlmctlError, MachineError, StageError, TempFail, UsageError
from llmctl.hookspecs import Command, hookimpl
from llmctl.stage import Artifact, Context, In, Out, Stage

if TYPE_CHECKING:
    from llmctl.deprecation import Deprecated
    from llmctl.spec.params import Field, Params

__version__ = "0.1.0"

PLUGIN_API = "1.0"
"""Version of what is exported here: the first number rises when something is removed, the second when something is
added. `tests/core/golden/api.txt` holds what it promises.
"""

__all__ = [
    "Artifact",
    "Command",
    "Context",
    "Field",
    "In",
    "InputError",
    "LlmctlError",
    "MachineError",
    "Out",
    "PLUGIN_API",
    "Params",
    "Stage",
    "StageError",
    "TempFail",
    "UsageError",
    "__version__",
    "hookimpl",
]

_DEPRECATED: dict[str, Deprecated] = {}
"""Names that still work and warn; a test fails when one outlives its version."""


def __getattr__(name: str) -> Any:
    # Params and Field import pydantic (0.1 s CPU), so they are resolved on first use only.
    if name in ("Field", "Params"):
        from llmctl.spec import params

        return getattr(params, name)
    from llmctl.deprecation import deprecated_attribute

    return deprecated_attribute(__name__, name, _DEPRECATED)
