"""Functions that a model may call: shown to it, forced on it, and found again in what it says.

Four ways of writing a call are understood: `<tool_call>{…}</tool_call>` (Hermes, Qwen), a JSON object with `name` and
`parameters` (Llama 3), `[TOOL_CALLS] [{…}]` (Mistral), and plain JSON with `name` and `arguments`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmctl.errors import InputError, UsageError

if TYPE_CHECKING:
    from llmctl.text.constraints import Constraints, GrammarConstraint

Tool = Mapping[str, Any]
"""{"type": "function", "function": {"name": …, "description": …, "parameters": a JSON schema}}, as in OpenAI's API."""
ToolFormat = Literal["hermes", "llama3", "mistral"]
"""How a model's chat template writes calls."""
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
OPEN, CLOSE = "<tool_call>", "</tool_call>"
BLANK = " "
"""White space in a forced call: as `json.dumps` writes it, for calls are short."""
HEADS = (OPEN, "[TOOL_CALLS]", "<|python_tag|>")
NESTING = 128
"""Deepest nesting of the JSON that a client sends: what reads it later goes down by recursion."""
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class ToolCall:
    """One call that a model asks for."""

    name: str
    arguments: str
    """A JSON object as text."""


def json_problem(value: Any) -> str:
    """Why parsed JSON cannot be shown to a model, in one line; empty if it can.

    `\\ud800` alone is an escape that JSON allows, and no character. Too deep a value ends in a RecursionError.
    """
    level, depth = [value], 0
    while level:
        if depth > NESTING:
            return f"it is nested deeper than {NESTING} levels"
        names = (name for part in level if isinstance(part, Mapping) for name in part)
        if any(_half(text) for text in (*names, *level) if isinstance(text, str)):
            return "it holds half of a surrogate pair, which is no character"
        inner = [part.values() if isinstance(part, Mapping) else part for part in level if not isinstance(part, str)]
        level = [one for part in inner if isinstance(part, Iterable) for one in part]
        depth += 1
    return ""


def _half(text: str) -> bool:
    """Whether a text holds half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def check_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools with nothing left out; UsageError for what is no function with a name of its own."""
    checked: list[dict[str, Any]] = []
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
            raise UsageError(f"tool {place} is no function", hint='give {"type": "function", "function": {"name": …}}')
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not NAME.match(name):
            raise UsageError(
                f"tool {place} has the name {name!r}", hint="use 1 to 64 letters, digits, underscores and dashes"
            )
        if name in (one["function"]["name"] for one in checked):
            raise UsageError(f"two tools are called {name}", hint="give each a name of its own")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise UsageError(f"the parameters of the tool {name} are no JSON schema", hint="give an object")
        if problem := json_problem(function):
            raise UsageError(f"the tool {name} cannot be shown to a model: {problem}", hint="correct its schema")
        described = {"name": name, "description": function.get("description") or ""}
        checked.append(
            {"type": "function", "function": {**described, "parameters": dict(parameters or _NO_PARAMETERS)}}
        )
    return checked


def tool_format(template: str) -> ToolFormat:
    """How a chat template with this source writes calls; `hermes` for one that knows none (see `tools_prompt`)."""
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if OPEN not in template and re.search(r"python_tag|\"parameters\": ", template):
        return "llama3"
    return "hermes"


def tools_prompt(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The conversation for a chat template that knows no tools: they are described in the system message.

    Calls become text of the assistant, and what tools gave becomes text of the user.
    """
    plain = [_without_roles(message) for message in messages]
    if not tools:
        return plain
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in check_tools(tools))
    block = (
        f"You have these functions, each described by one line of JSON:\n<tools>\n{lines}\n</tools>\n"
        f'To call one, write {OPEN}\n{{"name": its name, "arguments": an object that fits its parameters}}\n{CLOSE} '
        "and nothing after it. What it gives comes back between <tool_response> and </tool_response>."
    )
    if plain and plain[0].get("role") == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{block}"}, *plain[1:]]
    return [{"role": "system", "content": block}, *plain]


def _without_roles(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content") or ""
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = plain_calls(message.get("tool_calls"))
    if not calls:
        return dict(message)
    written = "\n".join(f"{OPEN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSE}" for call in calls)
    return {"role": message.get("role"), "content": f"{content}\n{written}".lstrip("\n")}


def plain_calls(calls: Any) -> list[dict[str, Any]]:
    """A message's `tool_calls` with arguments as objects, as chat templates want them; OpenAI's API has text there."""
    result: list[dict[str, Any]] = []
    if not isinstance(calls or [], list):
        raise InputError("a message's tool_calls are no list", hint="give a list of calls")
    for call in calls or []:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError("a tool call of a message has no function with a name", hint="give function.name")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except RecursionError as error:
                raise InputError(f"the arguments of a call of {function['name']} are nested too deeply") from error
            except ValueError as error:
                raise InputError(f"the arguments of a call of {function['name']} are no JSON: {error}") from error
        if not isinstance(arguments, Mapping):
            raise InputError(f"the arguments of a call of {function['name']} are no JSON object")
        if problem := json_problem(arguments):
            raise InputError(f"the arguments of a call of {function['name']} are of no use: {problem}")
        ids = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        result.append({**ids, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}})
    return result


def tool_constraint(
    constraints: Constraints,
    tools: Sequence[Tool],
    name: str | None = None,
    form: ToolFormat = "hermes",
    parallel: bool = True,
) -> GrammarConstraint:
    """What forces a valid call: of the tool that is called so, or of any.

    `parallel` lets several follow each other. UsageError for an unknown name and for parameters that are no schema.
    """
    functions = [tool["function"] for tool in check_tools(tools)]
    if name is not None:
        functions = [function for function in functions if function["name"] == name]
    if not functions:
        raise UsageError(f"no tool is called {name!r}" if tools else "a call is required, but there are no tools")
    for function in functions:
        try:
            constraints.json_schema(function["parameters"])
        except UsageError as error:
            raise UsageError(f"parameters of the tool {function['name']}: {error}", hint=error.hint) from error
    key = "parameters" if form == "llama3" else "arguments"
    several = parallel and form != "llama3"
    if form == "mistral":
        most = {} if several else {"maxItems": 1}
        calls = {"type": "array", "items": _calls(functions, key, "#/items"), "minItems": 1, **most}
        return constraints.json_schema(calls, BLANK)
    schema = _calls(functions, key, "#")
    if form == "llama3":
        return constraints.json_schema(schema, BLANK)
    more = '\n    | call "\\n" start' if several else ""
    body = constraints.embedded(schema, BLANK)
    return constraints.grammar(f'start: call{more}\ncall: "{OPEN}\\n" body "\\n{CLOSE}"\nbody: {body}\n')


def _calls(functions: Sequence[Mapping[str, Any]], key: str, at: str) -> dict[str, Any]:
    """The schema of one call of any of the functions; `at` is where it stands in the whole schema."""
    options = []
    for place, function in enumerate(functions):
        parameters = _moved(function["parameters"], f"{at}/anyOf/{place}/properties/{key}")
        options.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, key: parameters},
                "required": ["name", key],
                "additionalProperties": False,
            }
        )
    return {"anyOf": options}


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references to its own parts hold where `root` is its place in a larger one."""
    if isinstance(schema, Mapping):
        return {
            name: root + part[1:]
            if name == "$ref" and isinstance(part, str) and part.startswith("#")
            else _moved(part, root)
            for name, part in schema.items()
        }
    return [_moved(part, root) for part in schema] if isinstance(schema, list) else schema


def _finite(number: str) -> float:
    """A number as a model writes it: `1e999` is JSON, but as an infinite float it could not be written again."""
    return max(-sys.float_info.max, min(float(number), sys.float_info.max))


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


_SAID = json.JSONDecoder(parse_float=_finite, parse_constant=_no_number)


class ToolCallParser:
    """Finds calls in an answer that comes piece by piece: `feed` gives the text before them, `calls` collects them.

    `names` are the functions there are; JSON without a frame that calls no such function stays text, and so does a
    frame whose content is no call.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.calls: list[ToolCall] = []
        self._names = frozenset(names)
        self._held, self._started = "", False
        """What may belong to a call; and whether text was given out, so that plain JSON is no call any more."""

    def feed(self, text: str) -> str:
        """The next piece of the answer; what of it, and of what was held back, is text."""
        self._held += text
        given = self._text()
        self._started = self._started or bool(given.strip())
        return given

    def finish(self) -> str:
        """The answer has ended: whatever is held back is a call, or text after all."""
        held, self._held = self._held, ""
        bare = held.strip()
        for head in HEADS:
            bare = bare.removeprefix(head).removesuffix(CLOSE).strip()
        found = [] if self._started and not held.lstrip().startswith(HEADS) else self._bare(bare)
        self.calls += found
        return "" if found else held

    def _text(self) -> str:
        """Take what is certain out of `_held`."""
        given = ""
        while self._held:
            body = self._held.lstrip()
            if body.startswith(OPEN):
                end = self._held.find(CLOSE)
                if end < 0:
                    return given
                framed, self._held = self._held[: end + len(CLOSE)], self._held[end + len(CLOSE) :]
                found = self._bare(framed.lstrip()[len(OPEN) : -len(CLOSE)].strip())
                self.calls += found
                given += "" if found else framed
                self._started = True
                continue
            if body.startswith(HEADS[1:]) or (not self._started and not given.strip() and body[:1] in ("{", "[")):
                return given
            if not body and (self.calls or not self._started):
                return given  # white space before or between calls; it is given out with the text that follows
            place = _frame_in(self._held)
            given, self._held = given + self._held[:place], self._held[place:]
            if not body.startswith(HEADS) and self._held and not self._held.startswith(HEADS):
                return given  # the beginning of a frame, perhaps
        return given

    def _bare(self, text: str) -> list[ToolCall]:
        """Calls written as JSON: one object, a list of them, or several one after the other."""
        values, at = [], 0
        if named := re.fullmatch(r"([A-Za-z0-9_-]{1,64})\s*(?:\[ARGS\]\s*)?(\{.*\})", text, re.DOTALL):
            text = f'{{"name": "{named.group(1)}", "arguments": {named.group(2)}}}'  # Mistral's second way
        try:
            while at < len(text):
                value, at = _SAID.raw_decode(text, at)
                values += value if isinstance(value, list) else [value]
                at = re.compile(r"[\s;]*").match(text, at).end()  # type: ignore[union-attr]
        except (ValueError, RecursionError):
            return []
        calls = [self._call(value) for value in values]
        return [call for call in calls if call] if all(calls) else []

    def _call(self, value: Any) -> ToolCall | None:
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = _SAID.decode(arguments)
            except (ValueError, RecursionError):
                return None
        if not isinstance(arguments, dict):
            return None
        written = _written(arguments)
        return None if written is None else ToolCall(name, written)


def _written(arguments: dict[str, Any]) -> str | None:
    """Arguments as JSON that can be sent; None where they are too deep."""
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        return None
    # Half of a surrogate pair is no character, but its escape is good JSON.
    return json.dumps(arguments) if _half(text) else text


def _frame_in(text: str) -> int:
    """Where a frame begins in `text`, or may begin at its end; its length if nowhere."""
    found = [place for head in HEADS if (place := text.find(head)) >= 0]
    if found:
        return min(found)
    longest = max(map(len, HEADS)) - 1
    for place in range(max(0, len(text) - longest), len(text)):
        if any(head.startswith(text[place:]) for head in HEADS):
            return place
    return len(text)
