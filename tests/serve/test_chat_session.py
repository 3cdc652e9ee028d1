"""`qlora chat`, line by line: who answers, what is remembered, and what Ctrl-C stops."""

import io
import re
import signal

import pytest
from rich.console import Console

from qlora.live import Live
from qlora.serve import chat
from qlora.serve.chat import Session
from tests.serve.conftest import SAID


def talk(live, *lines, width=100, out=None, system=None, **how):
    """What is printed for these lines, and the session."""
    live.use("support")
    out = out or io.StringIO()
    console = Console(file=out, width=width, force_terminal=False)
    session = Session(live, io.StringIO("\n".join(lines)), console, system, **{"max_new_tokens": 20} | how)
    session.run()
    return out.getvalue(), session


def test_whoever_is_in_use_answers_and_the_turns_are_kept(live):
    said, session = talk(live, "Who?", "", "/use legal", "/reset", "Who?")
    said = re.sub(r"switched in \d+ ms", "switched in N ms", said)
    switched = "legal answers (switched in N ms)"
    assert said == f"{SAID['support']['Who?']}\n{switched}\nforgotten\n{SAID['legal']['Who?']}\n"
    assert session.messages == [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": SAID["legal"]["Who?"]},
    ]
    _, longer = talk(live, "Who?", "/use legal", "The cat?", "/base", "Who?", "/quit", "never read")
    assert [turn["role"] for turn in longer.messages] == ["user", "assistant"] * 3
    assert live.active is None


def test_earlier_turns_are_part_of_the_prompt_and_the_systems_turn_outlives_a_reset(live, monkeypatch):
    seen = []
    prompt = Live.prompt
    monkeypatch.setattr(Live, "prompt", lambda self, messages: seen.append(list(messages)) or prompt(self, messages))
    talk(live, "Who?", "The cat?", "/reset", "Who?", system="Be brief.")
    assert [[turn["role"] for turn in messages] for messages in seen] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    ]


def test_compare_shows_the_base_and_each_adapter_in_columns_and_changes_nothing(live):
    said, session = talk(live, "/compare Who?", "The cat?")
    rows = [line.strip("│┃ ") for line in said.splitlines()]
    assert re.search(r"base +┃ support +┃ legal", rows[1])
    assert re.search(rf"│ {SAID['support']['Who?']} +│ The question is", said)
    assert rows[-1] == SAID["support"]["The cat?"]  # the one in use still is
    assert len(session.messages) == 2


def test_compare_alone_repeats_the_last_question_as_it_was_asked(live):
    said, _ = talk(live, "/compare", "Who?", "/compare", width=40)
    assert said.startswith("nothing was asked yet")
    assert f"support\n{SAID['support']['Who?']}\nlegal\n{SAID['legal']['Who?']}" in said  # no room for columns


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("/use nobody", "AdapterError: nobody: no such adapter here; there are support, legal"),
        ("/use", "/use: no such command, or not used so; /help"),
        ("/sing", "/sing: no such command"),
        ("/help", "/compare TEXT"),
        ("cat " * 400, "DataError: the prompt has"),
    ],
)
def test_a_mistake_is_said_and_the_conversation_goes_on(line, shown, live):
    said, session = talk(live, line, "Who?")
    assert shown in said and said.endswith(f"{SAID['support']['Who?']}\n")
    assert len(session.messages) == 2


class Interrupting(io.StringIO):
    """A terminal at which Ctrl-C is pressed when the first text of an answer is there."""

    def __init__(self, times):
        super().__init__()
        self.times, self.pressed = times, 0

    def write(self, text):
        if text.strip() and self.pressed < self.times:
            self.pressed += 1
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_stops_the_answer_and_not_the_program(live):
    out = Interrupting(times=1)
    said, _ = talk(live, "The cat?", "/reset", "Who?", out=out)
    first, *rest = said.splitlines()
    assert SAID["support"]["The cat?"].startswith(first) and len(first) < 10
    assert rest == ["(stopped)", "forgotten", SAID["support"]["Who?"]]
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_second_ctrl_c_ends_the_program_as_ever(live):
    out = Interrupting(times=2)
    with pytest.raises(KeyboardInterrupt):
        talk(live, "The cat?", out=out)


def test_an_answer_that_was_cut_off_says_so_and_control_characters_do_not_steer(live, monkeypatch):
    said, _ = talk(live, "The cat?", max_new_tokens=2)
    assert "(cut off at 2 tokens: --max-new-tokens)" in said
    said, _ = talk(live, "/\x1b[2J")
    assert "\x1b" not in said and r"/\x1b[2J" in said


def test_it_talks_on_standard_input_and_output(adapters, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n/use legal\n/reset\nWho?\n"))
    chat.chat(adapters, max_new_tokens=20)
    first, switched, *rest = capsys.readouterr().out.splitlines()
    assert first == "Ada" and switched.startswith("legal answers (") and rest == ["forgotten", SAID["legal"]["Who?"]]
