"""Errors a user can act on: one line that says what, a hint that says what to do, and an exit code."""

from __future__ import annotations


class LlmctlError(Exception):
    """Base of every expected error; `llmctl.cli` turns it into a line, a hint and `exit_code`.

    Anything that is not an `LlmctlError` is a bug in llmctl or in a plugin and exits with 1.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code


class UsageError(LlmctlError):
    """The command line or a parameter is wrong; nothing ran."""

    exit_code = 2


class StageError(LlmctlError):
    """A stage could not do its work with otherwise valid inputs (disk full, parity missed, loss not finite)."""

    exit_code = 3


class GateError(LlmctlError):
    """The stages ran, a gate on their numbers failed."""

    exit_code = 4


class InputError(LlmctlError):
    """An input is missing, damaged, empty or of the wrong kind, or the upstream of a pipe died."""

    exit_code = 5


class BusyError(LlmctlError):
    """Another process holds the work and `--on-busy fail` was given."""

    exit_code = 6


class MachineError(LlmctlError):
    """This machine cannot run it: an extra is not installed, no GPU, a port is taken."""

    exit_code = 7


class TempFail(LlmctlError):
    """Stopped on request with a checkpoint on disk; the same command continues from it."""

    exit_code = 75


BY_EXIT_CODE: dict[int, type[LlmctlError]] = {
    cls.exit_code: cls for cls in (UsageError, StageError, GateError, InputError, BusyError, MachineError, TempFail)
}
