"""llmctl: one plugin-based command line from raw text to a served ONNX language model.

This module is the plugin API; everything else may change between minor versions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmctl.deprecation import Deprecated
    from llmctl.errors import InputError, LlmctlError, MachineError, StageError, TempFail, UsageError
    from llmctl.hookspecs import Command, hookimpl
    from llmctl.spec.params import Field, Params
    from llmctl.stage import Artifact, Context, In, Out, Stage

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

_PLACES = {
    "llmctl.errors": ("InputError", "LlmctlError", "MachineError", "StageError", "TempFail", "UsageError"),
    "llmctl.hookspecs": ("Command", "hookimpl"),
    "llmctl.spec.params": ("Field", "Params"),
    "llmctl.stage": ("Artifact", "Context", "In", "Out", "Stage"),
}

_DEPRECATED: dict[str, Deprecated] = {}
"""Names that still work and warn; a test fails when one outlives its version."""


def __getattr__(name: str) -> Any:
    # On first use: pydantic costs 0.1 s CPU, and the sooner `__main__` begins, the sooner it can catch a Ctrl-C.
    for module, names in _PLACES.items():
        if name in names:
            from importlib import import_module

            value = globals()[name] = getattr(import_module(module), name)
            return value
    from llmctl.deprecation import deprecated_attribute

    return deprecated_attribute(__name__, name, _DEPRECATED)
