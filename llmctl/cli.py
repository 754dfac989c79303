"""The command line: lazily loaded commands, and the one place where an error becomes a line, a hint, an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from llmctl import __version__
from llmctl.command_table import CORE, HIDDEN, SECTIONS, stage_order
from llmctl.error_output import json_line, json_lines, wants_json
from llmctl.errors import InputError, LlmctlError, StageError, UsageError
from llmctl.hookspecs import Command
from llmctl.registry import Failure, get_registry
from llmctl.stage import load_string, missing_module

EPILOG = (
    "`llmctl COMMAND --help` shows the options of a command. Stages read and write references, so they can be piped."
)


class Root(click.Group):
    """The root group: core commands from `CORE`, stages and further commands from the registry, stubs for failures."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every name that `--help` shows."""
        registry = get_registry()
        names = [*(command.name for command in CORE), *stage_order(registry.stages), *sorted(registry.commands)]
        return names + [name for name in sorted(registry.failures) if name not in names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load one command; nothing else is imported."""
        for command in (*CORE, *HIDDEN):
            if command.name == cmd_name:
                return _load(command)
        registry = get_registry()
        if cmd_name in registry.stages:
            from llmctl.stage_command import StageCommand

            return StageCommand(registry.stages[cmd_name])
        if cmd_name in registry.commands:
            return _load(registry.commands[cmd_name])
        if cmd_name in registry.failures:
            return _stub(cmd_name, registry.failures[cmd_name])
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Sections from the declarations alone: no implementation is imported for `--help`."""
        registry = get_registry()
        sections = {
            **{title: [(name, text) for name, text, _ in rows] for title, rows in SECTIONS.items()},
            "Stages": [(name, registry.stages[name].help) for name in stage_order(registry.stages)],
            "More commands": [(name, registry.commands[name].help) for name in sorted(registry.commands)],
            "Unavailable": [(name, f"{why.reason} ({why.hint})") for name, why in sorted(registry.failures.items())],
        }
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def _load(command: Command) -> click.Command:
    try:
        loaded = load_string(command.target)
    except ModuleNotFoundError as error:
        raise missing_module(error, command, f"`llmctl {command.name}`") from error
    if not isinstance(loaded, click.Command):
        raise TypeError(f"{command.target} is no click command but {type(loaded).__name__}")
    return loaded


def _stub(name: str, failure: Failure) -> click.Command:
    """A command that takes any arguments and explains why it is not there."""

    def explain() -> NoReturn:
        raise failure.error()

    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    return click.Command(name, callback=explain, context_settings=settings, add_help_option=False, help=failure.reason)


def _show_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"llmctl {__version__}")
        ctx.exit()


@click.group(
    cls=Root,
    invoke_without_command=True,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version."
)
@click.pass_context
def root(ctx: click.Context) -> None:
    """From raw text to a served ONNX language model."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave the process with the exit code of `pipeline.md` 3.6."""
    args = list(sys.argv[1:] if args is None else args)
    _open_standard_streams()
    try:
        code = _invoke(args)
    except BaseException as error:  # the edge of the program: everything becomes a line and a code here
        code = _explain(error, args)
    sys.exit(_finish(args, code))


def _open_standard_streams() -> None:
    """Point closed ones (`>&-`) at /dev/null: else a file that is opened later takes their number, and all prints."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            os.set_inheritable(descriptor, True)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w")


def _invoke(args: list[str]) -> int:
    """Parse and run; a command may return None (0) or an exit code, or raise."""
    instruction = os.environ.get("_LLMCTL_COMPLETE")
    if instruction:
        from llmctl.completion.protocol import respond

        return respond(root, instruction)
    try:
        with root.make_context("llmctl", args) as ctx:
            result = root.invoke(ctx)
            return result if isinstance(result, int) else 0
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except SystemExit as leave:
        if leave.code is None or isinstance(leave.code, int):
            return leave.code or 0
        _say(str(leave.code))
        return 1


def _explain(error: BaseException, args: Sequence[str]) -> int:
    """Print what went wrong on stderr and return the exit code."""
    as_json = wants_json(args)
    if isinstance(error, KeyboardInterrupt | click.Abort | EOFError):
        _say(json_line("interrupted", None, 130) if as_json else "interrupted")
        return 130
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        return 141
    expected = _expected(error, args)
    if expected is None:
        return _save_traceback(error, as_json=as_json)
    if os.environ.get("LLMCTL_DEBUG"):
        import traceback

        traceback.print_exception(error)
    if as_json:
        for line in json_lines(expected):
            _say(line)
    else:
        _say_error(expected)
    return expected.exit_code


def _expected(error: BaseException, args: Sequence[str]) -> LlmctlError | None:
    """The domain error behind an exception, or None for a bug."""
    if isinstance(error, LlmctlError):
        return error
    if isinstance(error, click.exceptions.FileError):
        return InputError(f"cannot open {error.ui_filename}: {error.message}")
    if isinstance(error, click.ClickException):
        return _from_click(error, args)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return StageError(
            f"no space left on the device{where}", hint="free some space, or put the store on another disk"
        )
    return None


def _from_click(error: click.ClickException, args: Sequence[str]) -> LlmctlError:
    """click's message in our form: lower case, no full stop, the near names as the hint."""
    message = error.message
    near = list(getattr(error, "possibilities", None) or ())
    known = root.list_commands(click.Context(root))
    if isinstance(error, click.exceptions.NoSuchCommand):
        message = f"no such command `{error.command_name}`"
        group = error.ctx.command if error.ctx else None
        here = group.list_commands(error.ctx) if isinstance(group, click.Group) and error.ctx else known
        near = near_names(error.command_name, here)
    elif isinstance(error, click.NoSuchOption):
        message = f"no such option `{error.option_name}`"
    else:
        message = error.format_message()
    path = f"llmctl {args[0]}" if args and args[0] in known else "llmctl"
    hint = f"did you mean {' or '.join(f'`{name}`' for name in near[:3])}?" if near else f"see `{path} --help`"
    message = message[:1].lower() + message[1:].rstrip(".")
    return UsageError(message, hint=getattr(error, "hint", None) or hint)


def near_names(word: str, names: Sequence[str]) -> list[str]:
    """Names that `word` may have meant: similar ones, else those with a similar part (`train` in `train-pretrain`)."""
    from difflib import get_close_matches

    parts = {part: name for name in reversed(names) for part in name.split("-")}
    close = get_close_matches(word, names) or [parts[part] for part in get_close_matches(word, parts, cutoff=0.7)]
    return list(dict.fromkeys(close))


def _say(text: str) -> None:
    """One line on stderr; a closed stderr is nobody's problem."""
    try:
        click.echo(text, err=True, color=True)  # what is not wanted was not added
    except OSError:
        return


def _say_error(error: LlmctlError) -> None:
    """`error: message`, `  hint: …`; diagnostics of a spec, which have a layout of their own, as they are."""
    if hasattr(error, "diagnostics"):
        _say(error.message)
    else:
        from llmctl.console import wants_colour

        label = f"error[{error.code}]" if error.code else "error"
        _say(f"{click.style(label, fg='red', bold=True) if wants_colour(sys.stderr) else label}: {error.message}")
    if error.hint:
        _say(f"  hint: {error.hint}")


def _save_traceback(error: BaseException, *, as_json: bool = False) -> int:
    """A bug: keep the whole traceback in a file and name it on one line; `LLMCTL_DEBUG=1` prints it instead."""
    import platform
    import tempfile
    import traceback

    text = "".join(traceback.format_exception(error))
    if os.environ.get("LLMCTL_DEBUG"):
        _say(text)
        return 1
    last = " ".join(str(error).split())
    try:
        with tempfile.NamedTemporaryFile("w", prefix="llmctl-", suffix=".log", delete=False, encoding="utf-8") as file:
            file.write(f"llmctl {__version__}, Python {platform.python_version()}, {sys.argv}\n{text}")
    except OSError:
        _say(text)
        return 1
    message = f"unexpected {type(error).__name__}: {last}"
    hint = f"this is a bug in llmctl or in a plugin; the traceback is in {file.name}"
    _say(json_line(message, hint, 1) if as_json else f"error: {message}\n  hint: {hint}")
    return 1


def _finish(args: list[str], code: int) -> int:
    """Close the records of a stage, flush, and turn a lost reader into 141."""
    name = args[0] if args else ""
    try:
        if name and not name.startswith("-") and name not in {command.name for command in (*CORE, *HIDDEN)}:
            code = _end_records(name, args, code)
        sys.stdout.flush()
    except OSError as error:
        if error.errno != errno.EPIPE:
            raise
        code = code or 141
    if code == 141:
        # Python flushes stdout once more on exit; let it go nowhere instead of printing a traceback.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
    return code


def _end_records(name: str, args: list[str], code: int) -> int:
    """Every exit path of a stage writes `end`, also one that failed before `hello` (an unknown option, a typo)."""
    from llmctl import shell

    if name in get_registry().commands:
        return code
    return shell.finish(name, args, code)
