"""A chat template that loops, bombs or fails is named in time; what it can't do is to stop the process."""

from __future__ import annotations

import datetime
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data import limits
from qlora.data.chat import end_token_ids, render_prompt, tokenize
from qlora.data.formats import Conversation
from qlora.data.limits import LimitReached, Limits
from qlora.data.problems import Problems
from qlora.errors import DataError
from tests.data.conftest import CHATML, IM, build_tokenizer

ROW = Conversation([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}], where="rows.jsonl:7")
# A fault that shows with the row's own turns, so that it is found at the row and not when the template is looked at.
AT_THE_ROW = CHATML + "{% if messages[0].content == 'Hi' %}FAULT{% endif %}"


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.2)


def of(template: str):
    return build_tokenizer(template, IM, eos="<|im_end|>")


ENDLESS = {
    "loops in loops": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "a filter in loops": "{% for a in range(90000) %}{{ range(90000) | map('string') | join | length }}{% endfor %}",
    "macros that call each other twice": (
        "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}"
    ),
    "numbers that square": "{% set n = namespace(x=3) %}{% for a in range(90) %}{% set n.x = n.x * n.x %}{% endfor %}",
}
BOMBS = {
    "a long text": "{{ 'a' * 10000000000 }}",
    "text that doubles": "{% set n = namespace(x='a') %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a wide field": "{{ '%9999999999d' % 1 }}",
    "a list": "{{ ([1] * 10000000000) | length }}",
    "centred": "{{ 'a' | center(10000000000) }}",
}


@pytest.mark.parametrize("fault", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_does_not_end_is_stopped_at_the_first_row(soon, fault):
    began = time.monotonic()
    rows = [ROW] * 3 + [Conversation(ROW.messages, where=f"rows.jsonl:{n}") for n in range(1000)]
    with pytest.raises(DataError, match=r"rows\.jsonl:7: the chat template is at fault: it was not done after 0\.2 s"):
        tokenize(of(AT_THE_ROW.replace("FAULT", fault)), rows, max_seq_length=100)
    assert time.monotonic() - began < 5  # seconds, not the hours of the template, nor 1,000 times the limit


@pytest.mark.parametrize(("role", "turns"), [("assistant", 500), ("system", 8000)])
def test_a_row_of_very_many_turns_has_one_limit_for_all_of_them_and_can_be_skipped(soon, role, turns):
    said = [{"role": role, "content": f"Turn {number:06}"} for number in range(turns)]
    long = Conversation([*ROW.messages, *said, ROW.messages[1]], where="rows.jsonl:8")
    problems = Problems(skip=True)
    found = tokenize(of(CHATML), [long, ROW], max_seq_length=10**7, problems=problems)
    assert [example.where for example in found.examples] == ["rows.jsonl:7"]
    assert found.refused == [long]
    assert problems.lines == [
        f"rows.jsonl:8: its {turns + 3:,} turns take the chat template more than 0.2 s; split the row"
    ]


@pytest.mark.parametrize("fault", BOMBS.values(), ids=BOMBS)
def test_a_template_that_fills_the_memory_is_stopped_and_the_limit_taken_away(fault, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(limits, "MEMORY_BYTES", 1 << 28)
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(DataError, match=r"rows\.jsonl:7: the chat template is at fault: it takes more than 0\.25 GiB"):
        tokenize(of(AT_THE_ROW.replace("FAULT", fault)), [ROW], max_seq_length=100)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ range(10000000) }}", "OverflowError: Range too big"),
        ("{% macro a(n) %}{{ a(n) }}{% endmacro %}{{ a(1) }}", "RecursionError"),
        ("{{ messages[7].content.x }}", "has no element 7"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ raise_exception('not like this') }}", "turns: not like this"),
        ("{% set x = '\ud83d' %}{{ x }}", "UnicodeEncodeError"),
        ("{{ 'a' * 100000000 }}", "makes 100,000,111 characters of it"),
        ("{{ messages | tojson(indent={}) }}", "TypeError"),
    ],
)
def test_a_row_at_which_the_template_fails_is_named_with_the_reason(fault, said):
    with pytest.raises(DataError, match=r"1 problem in the data\n  rows\.jsonl:7: the chat template ") as caught:
        tokenize(of(AT_THE_ROW.replace("FAULT", fault)), [ROW], max_seq_length=100)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "template", ["{{ 9 ** 9 ** 9 }}", "{% set x = 9**9999999 %}", "{% for", "{{ x", "(" * 500 + "{{" + "(" * 500]
)
def test_a_template_that_can_never_be_rendered_is_refused_whatever_asks(template):
    for ask in (
        lambda tokenizer: tokenize(tokenizer, [ROW], max_seq_length=100),
        lambda tokenizer: render_prompt(tokenizer, ROW.messages[:1]),
        end_token_ids,
    ):
        with pytest.raises(DataError, match="chat template"):
            ask(of(CHATML + template))


def test_keywords_that_a_template_hands_on_are_no_powers():
    template = "{% set more = dict(a=1) %}{% set all = dict(**more) %}{% set b = dict(c=2, ** more) %}" + CHATML
    assert tokenize(of(template), [ROW], max_seq_length=100).examples


def test_limits_hold_in_any_thread(soon):
    said: list[str] = []

    def work() -> None:
        with pytest.raises(DataError) as caught:
            tokenize(of(AT_THE_ROW.replace("FAULT", ENDLESS["loops in loops"])), [ROW], max_seq_length=100)
        said.append(str(caught.value))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert "not done after 0.2 s" in said[0]


def test_no_exception_comes_late(monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.002)
    ended = stopped = 0
    with Limits() as guard:
        for number in range(400):
            until = time.monotonic() + 0.0015 + number % 10 * 0.0003  # before the limit, at it, behind it

            def spin(until: float = until) -> bool:
                while time.monotonic() < until:
                    pass
                return True

            try:
                ended += guard.call(spin)
            except LimitReached:
                stopped += 1
            for _ in range(100):  # where a late one would strike
                pass
    assert ended + stopped == 400
    assert ended > 20 < stopped  # else this shows nothing
    until = time.monotonic() + 0.05
    while time.monotonic() < until:
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "qlora-template-limits"]


def test_what_a_function_returns_and_raises_comes_through():
    with Limits() as outer, outer:
        assert outer.call(lambda: 5) == 5
        with pytest.raises(KeyError):
            outer.call(lambda: {}[1])


# --- the date -----------------------------------------------------------------------------------------------------

DATED = "Today is {{ strftime_now('%d %b %Y') }}, {{ strftime_now( \"%H:%M\" ) }}.\n" + CHATML


def test_a_template_with_the_date_gives_the_first_days_tokens_on_any_other_day():
    first = datetime.date(2026, 7, 31)
    tokenizer = of(DATED)
    told = [tokenize(tokenizer, [ROW], max_seq_length=200, today=first) for _ in range(2)]
    assert told[0] == told[1]
    assert told[0].dated
    assert "Today is 31 Jul 2026, 00:00.\n" in tokenizer.decode(told[0].examples[0].input_ids)
    assert tokenize(tokenizer, [ROW], max_seq_length=200).examples != told[0].examples
    prompt = render_prompt(tokenizer, ROW.messages[:1], today=first)
    assert told[0].examples[0].input_ids[: len(prompt)] == prompt
    assert tokenizer.chat_template == DATED  # what is saved with the adapter writes the date of the day
    assert not tokenize(of(CHATML), [ROW], max_seq_length=200, today=first).dated


def test_the_date_is_what_transformers_would_write():
    tokenizer = of(DATED.replace("%H:%M", "%Y"))
    rendered = str(tokenizer.apply_chat_template(ROW.messages, tokenize=False))
    [example] = tokenize(tokenizer, [ROW], max_seq_length=200).examples
    assert tokenizer.decode(example.input_ids) == rendered


# --- fuzzing --------------------------------------------------------------------------------------------------------

_PIECES = ["{%", "%}", "{{", "}}", "messages", "loop", ".", "'", " if ", "endfor", "|", "trim", "(", ")", "\0", "é"]


@st.composite
def mutated(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from([CHATML, DATED, AT_THE_ROW]))
    for _ in range(draw(st.integers(1, 4))):
        at, cut = draw(st.integers(0, len(text))), draw(st.integers(0, 6))
        text = text[:at] + draw(st.sampled_from(_PIECES) | st.text(max_size=3)) + text[at + cut :]
    return text


@pytest.mark.torture
@settings(deadline=None)
@given(mutated())
def test_a_damaged_template_gives_tokens_or_our_own_error(template):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "SECONDS", 1.0)
        tokenizer = of(CHATML)
        tokenizer.chat_template = template
        try:
            found = tokenize(tokenizer, [ROW], max_seq_length=100)
        except DataError as error:
            assert str(error)
            return
        assert all(len(example.input_ids) == len(example.labels) for example in found.examples)
