'''A Modelfile, by which Ollama imports a GGUF file with the template that was trained.

Ollama's templates are Go's. What a Jinja template does to a conversation is found by asking it with turns that can be
told apart, put together again as a Go template, and tried on other conversations: where it says the same, it is
written. No family needs to be known, and none is guessed.

    FROM ./model-f16.gguf
    ADAPTER ./adapter.gguf
    TEMPLATE """..."""
    PARAMETER stop <|im_end|>

A template that does more than put its pieces between turns (dates, tools, thoughts that it takes away) is left out.
Then Ollama compares the file's tokenizer.chat_template with a list of its own, and takes the one most like it; where
none is, it gives the prompt to the model as it stands.

Sources: Ollama's docs/modelfile.md and docs/template.md; its template/template.go for which values templates get.
'''

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from qlora import durable
from qlora.errors import AdapterError

FILE = "Modelfile"

Messages = Sequence[Mapping[str, str]]
Ask = Callable[[list[dict[str, str]]], str]

_ROLES = {"U": "user", "A": "assistant", "S": "system"}
# What is said in probes: plain ASCII that no template has in it. Two of each, as what differs between them is a turn's.
_SAID = {"U": "qlora-asked-4c1f", "A": "qlora-said-9e02", "S": "qlora-told-77b3", "V": "qlora-asked-again-5d8a"}


@dataclass(frozen=True, slots=True)
class GoTemplate:
    """The pieces that stand around what is said.

    opening     before the first turn where there is no system turn
    system      around a system turn; None where the template refuses one
    user        around a user's turn
    assistant   around an assistant's turn
    asking      after the last turn
    """

    opening: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    asking: str

    def render(self, messages: Messages) -> str:
        """What Ollama makes of a conversation by `text`."""
        turns = list(messages)
        pieces = [self.opening]
        if turns and turns[0]["role"] == "system" and self.system is not None:
            pieces = [self.system[0], turns.pop(0)["content"], self.system[1]]
        for turn in turns:
            before, after = self.user if turn["role"] == "user" else self.assistant
            pieces += [before, turn["content"], after]
        return "".join([*pieces, self.asking])

    def text(self) -> str:
        """As Go's text/template reads it."""
        head = self.opening
        if self.system is not None:
            head = "{{ if .System }}" + self.system[0] + "{{ .System }}" + self.system[1]
            head += ("{{ else }}" + self.opening if self.opening else "") + "{{ end }}"
        turns = "".join(
            '{{ %s eq .Role "%s" }}%s{{ .Content }}%s' % (word, role, *around)  # noqa: UP031 - braces enough
            for word, role, around in (("if", "user", self.user), ("else if", "assistant", self.assistant))
        )
        return head + "{{ range .Messages }}" + turns + "{{ end }}{{ end }}" + self.asking


def go_template(ask: Ask, end: str, bos: str | None = None) -> GoTemplate | None:
    """The Go template that renders as the model's own does, or None where there is none so simple.

    ask  renders a conversation up to where the answer begins, as inference is given it
    end  the token that ends an answer, as text
    bos  the BOS where Ollama puts it by itself (tokenizer.ggml.add_bos_token), so that the template must not
    """

    def asked(turns: str) -> str | None:
        try:
            text = ask(_conversation(turns))
        except Exception:  # a template's refusal, of whatever class
            return None
        return text.removeprefix(bos) if bos else text

    one, three, told = asked("U"), asked("UAV"), asked("SU")
    if one is None or three is None or any(text.count(_SAID["U"]) != 1 for text in (one, three)):
        return None
    head, _, tail = one.partition(_SAID["U"])
    first, _, rest = three.partition(_SAID["U"])
    between, said, rest = rest.partition(_SAID["A"])
    closing, again, last = rest.partition(_SAID["V"])
    if not said or not again or (first, last) != (head, tail):
        return None
    user = closing.partition(end)[2].lstrip("\n")
    if end not in closing or not head.endswith(user):  # an earlier turn may be closed otherwise than the last
        user = _shared_start(head[::-1], closing[::-1])[::-1]
    after_answer = closing.removesuffix(user)
    shared = _shared_start(between, tail)
    system = None
    if told is not None and told.count(_SAID["S"]) == 1:
        before, _, rest = told.partition(_SAID["S"])
        middle = rest.partition(_SAID["U"])[0]
        if not middle.endswith(user):
            return None
        system = (before, middle.removesuffix(user))
    found = GoTemplate(
        head.removesuffix(user),
        system,
        (user, shared),
        (between.removeprefix(shared), after_answer),
        tail.removeprefix(shared),
    )
    pieces = (found.opening, *(found.system or ()), *found.user, *found.assistant, found.asking)
    if any("{{" in piece or "}}" in piece or '"""' in piece or piece.endswith(("{", '"')) for piece in pieces):
        return None  # Go, or the Modelfile, would read them as its own
    for turns in ("U", "UAV", "UAUAV", "SU", "SUAV", "SUAUAV"):
        text = asked(turns)
        if text is None and turns.startswith("S"):
            continue
        if text != found.render(_conversation(turns)):
            return None
    return found


def write_modelfile(
    directory: Path,
    model: str,
    *,
    adapter: str | None = None,
    template: GoTemplate | None = None,
    stops: Sequence[str] = (),
    parameters: Mapping[str, str | int | float] | None = None,
) -> Path:
    """Write `Modelfile` into a directory; returns its path.

    model, adapter  .gguf files: names in that directory, or paths
    template        of the model, where one was found
    stops           the tokens that end an answer, as text
    parameters      of Ollama's, num_ctx for example

    Raises AdapterError for a name that a line cannot hold, MachineError where it cannot be written.
    """
    lines = [f"# ollama create NAME -f {FILE}", f"FROM {_place(model)}"]
    if adapter is not None:
        lines.append(f"ADAPTER {_place(adapter)}")
    if template is None:
        lines.append("# No TEMPLATE: the model's own is no simple one. Ollama looks for one like the file's")
        lines.append("# tokenizer.chat_template among those that it has, or gives prompts to the model as they stand.")
    else:
        lines.append(f'TEMPLATE """{template.text()}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in dict.fromkeys(stops)]
    lines += [f"PARAMETER {key} {value}" for key, value in (parameters or {}).items()]
    content = "".join(f"{line}\n" for line in lines).encode()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        durable.replace_file(directory / FILE, content)
    except OSError as error:
        raise durable.disk_error(directory, error, len(content), "give a directory with more room") from error
    return directory / FILE


def _shared_start(one: str, other: str) -> str:
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _place(name: str) -> str:
    """A file as FROM and ADAPTER take it: what begins with neither `.` nor `/` would be a model of Ollama's library."""
    if not name.isprintable():
        raise AdapterError(f"{name!r}: a Modelfile cannot name it")
    return name if Path(name).is_absolute() or name.startswith(("./", "../")) else f"./{name}"


def _conversation(turns: str) -> list[dict[str, str]]:
    said: list[dict[str, str]] = []
    for number, turn in enumerate(turns):
        earlier = turns[:number].count(turn)
        content = _SAID[turn] if not earlier else f"{_SAID[turn]}-{earlier}"
        said.append({"role": _ROLES.get(turn, "user"), "content": content})
    return said
