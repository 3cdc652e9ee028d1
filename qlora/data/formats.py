"""Layouts of rows, how each is recognised, and how a row of it becomes a conversation or a line that says why not.

    messages            {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    sharegpt            {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
    alpaca              {"instruction": "...", "input": "...", "output": "..."}
    prompt-completion   {"prompt": "...", "completion": "..."}
    text                {"text": "..."}

Whatever else a row carries is left alone, and named, so that nobody believes it was learned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from reprlib import Repr
from typing import Any

from qlora.data.files import Row
from qlora.data.problems import Problems

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}
# Strings beside the content that chat templates read; whatever else a turn carries is reported as unused.
TURN_FIELDS = ("name", "tool_call_id", "reasoning_content")
TURN_LISTS = ("messages", "conversations")

_BRIEF = Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 3, 60, 60


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a dataset.

    messages  turns with "role" and "content", the last one the assistant's; empty where the format is "text"
    text      the document where the format is "text"
    where     "file:line"; the row's number in place of the line for Parquet and the Hub
    format    the layout it came in: "prompt-completion" and "alpaca" can be trained without a chat template
    """

    messages: list[dict[str, str]] = field(default_factory=list)
    text: str = ""
    where: str = ""
    format: str = "messages"


def detect(row: Any) -> str | None:
    """The format that has a row's fields, or None. Turns come first: many sets carry `prompt` or `text` beside them."""
    if not isinstance(row, dict):
        return None
    present = {key for key, value in row.items() if value is not None}
    for key in TURN_LISTS:
        if key in present:
            turns = [turn for turn in row[key] if isinstance(turn, dict)] if isinstance(row[key], list) else []
            keys = {name for turn in turns for name, value in turn.items() if value is not None}
            if keys & {"from", "value"}:
                return "sharegpt"
            return "messages" if key == "messages" or keys & {"role", "content"} else "sharegpt"
    for layout, fields in (("alpaca", {"instruction", "output"}), ("prompt-completion", {"prompt", "completion"})):
        if fields <= present:
            return layout
    return "text" if "text" in present else None


def recognise(rows: Sequence[Row], problems: Problems) -> str:
    """The format of the first row that has a known one; "" after telling `problems` where no row has one."""
    layout = next(filter(None, (detect(row) for _, row in rows)), "")
    if rows and not layout:
        where, row = rows[0]
        has = f"the fields {_names(row)}" if isinstance(row, dict) and row else _got(row)
        problems.add(
            where,
            f"no known format: the row has {has}",
            rest_unread=True,
            advice="a row has `messages`, `conversations`, `instruction` and `output`, `prompt` and `completion`, or "
            "`text`",
        )
    return layout


class _Check:
    """Reads the fields of one row; what is not as expected goes to `problems`."""

    def __init__(self, where: str, problems: Problems) -> None:
        self.where, self.problems, self.good = where, problems, True

    def fail(self, field: str, expected: str, got: str) -> None:
        self.good = False
        self.problems.add(self.where, f"`{field}`: expected {expected}; got {got}")

    def text(self, value: Any, field: str, *, empty: bool = False) -> str:
        if not isinstance(value, str):
            self.fail(field, "text", _got(value))
            return ""
        if not empty and not value.strip():
            self.fail(field, "text", "only white space" if value else "empty text")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # "\ud83d" alone is legal JSON, and tokenizers panic on it
            self.fail(field, "Unicode text", f"half a surrogate pair at character {error.start}")
        if "\0" in value:  # what is left of a binary file or a fixed-width field; no model has seen it as text
            self.fail(field, "text", f"NUL (U+0000) at character {value.index(chr(0))}")
        return value

    def content(self, value: Any, field: str) -> str:
        """A turn's text: a string, or OpenAI's list of parts."""
        if not isinstance(value, list):
            return self.text(value, field)
        parts: list[str] = []
        for number, part in enumerate(value):
            if isinstance(part, dict) and part.get("type") == "text":
                parts.append(self.text(part.get("text"), f"{field}[{number}].text", empty=True))
            else:
                kind = part.get("type") if isinstance(part, dict) else part
                self.fail(f"{field}[{number}]", 'a part of type "text"', _got(kind))
        return self.text("".join(parts), field) if self.good else ""


def conversation(where: str, row: Any, layout: str, problems: Problems, unused: dict[str, None]) -> Conversation | None:
    """The row as a conversation, or None after telling `problems` why not. `unused` gains the fields not read."""
    check = _Check(where, problems)
    if not isinstance(row, dict):
        problems.add(where, f"expected an object; got {_got(row)}")
        return None
    messages: list[dict[str, str]] = []
    text = ""
    if layout in ("messages", "sharegpt"):
        key = next((key for key in TURN_LISTS if row.get(key) is not None), TURN_LISTS[layout == "sharegpt"])
        used = {key}
        if row.get("tools"):  # left out in silence, the model would learn calls of tools that it was never shown
            check.fail("tools", "no tools, which can't be rendered yet", _got(row["tools"]))
        messages = _turns(row.get(key), key, layout, check, unused)
    elif layout == "alpaca":
        used = {"instruction", "input", "output"}
        asked = check.text(row.get("instruction"), "instruction")
        given = check.text(row.get("input") or "", "input", empty=True)
        messages = _pair(f"{asked}\n\n{given}" if given.strip() else asked, check.text(row.get("output"), "output"))
    elif layout == "prompt-completion":
        used = {"prompt", "completion"}
        messages = _pair(check.text(row.get("prompt"), "prompt"), check.text(row.get("completion"), "completion"))
    else:
        used = {"text"}
        text = check.text(row.get("text"), "text")
    unused.update(dict.fromkeys(str(key) for key, value in row.items() if key not in used and value is not None))
    return Conversation(messages=messages, text=text, where=where, format=layout) if check.good else None


def _names(row: dict[Any, Any]) -> str:
    """A row's fields for an error line."""
    more = f" and {len(row) - 10} more" if len(row) > 10 else ""
    return ", ".join(_got(str(name)) for name in list(row)[:10]) + more


def _pair(prompt: str, completion: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _turns(turns: Any, key: str, layout: str, check: _Check, unused: dict[str, None]) -> list[dict[str, str]]:
    if not isinstance(turns, list):
        check.fail(key, "a list of turns", _got(turns))
        return []
    role_key, content_key = ("from", "value") if layout == "sharegpt" else ("role", "content")
    roles = SHAREGPT_ROLES if layout == "sharegpt" else {role: role for role in ROLES}
    messages: list[dict[str, str]] = []
    for number, turn in enumerate(turns):
        at = f"{key}[{number}]"
        if not isinstance(turn, dict):
            check.fail(at, "a turn", _got(turn))
            continue
        present = {name: value for name, value in turn.items() if value is not None}
        role = present.get(role_key)
        known = roles.get(role) if isinstance(role, str) else None
        if known is None:
            check.fail(f"{at}.{role_key}", f"one of {', '.join(roles)}", _got(role))
        refused = [name for name in ("tool_calls", "function_call") if present.get(name)]
        for name in refused:
            check.fail(f"{at}.{name}", f"the call written out in `{content_key}`", _got(present[name]))
        if present.get("weight", 1) != 1:
            check.fail(f"{at}.weight", "1, as every assistant turn is learned", _got(present["weight"]))
        message = {"role": known or ""}
        message["content"] = "" if refused else check.content(present.get(content_key), f"{at}.{content_key}")
        for name in TURN_FIELDS:
            if name in present:
                message[name] = check.text(present[name], f"{at}.{name}")
        messages.append(message)
        read = {role_key, content_key, "weight", *refused, *TURN_FIELDS}
        unused.update(dict.fromkeys(f"{key}[].{name}" for name in present if name not in read))
    if check.good:
        said = [message["role"] for message in messages]
        if "assistant" not in said:
            check.fail(key, "a turn by the assistant", " and ".join(dict.fromkeys(said)) + " only" if said else "none")
        elif said[-1] != "assistant":
            check.fail(key, "the last turn by the assistant", f"{said[-1]}'s")
    return messages


def _got(value: Any) -> str:
    """A value for an error line: its kind, and what it is if that is short."""
    kinds: Iterable[tuple[type | tuple[type, ...], str]] = (
        (bool, "a boolean"),
        ((int, float), "a number"),
        (list, "a list"),
        (dict, "an object"),
    )
    if value is None:
        return "nothing"
    # A bounded repr: that of a row may be as long as the row, too deep for Python's stack, or an integer that it won't
    # write out.
    shown = repr(value[:60]) if isinstance(value, str) else _BRIEF.repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    if isinstance(value, str):
        return shown
    return next((f"{name}, {shown}" for kind, name in kinds if isinstance(value, kind)), shown)
