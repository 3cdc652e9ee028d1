"""The emitter, and a log that survives what happens to the process that writes it."""

import json
import signal
import subprocess
import sys
import textwrap
import tracemalloc

import pytest

from qlora.errors import QLoRAError, TrainingError
from qlora.report import events as log_of
from qlora.report.events import Degraded, EventLog, Events, due, read_events, readable_events, steps, timeline


def step(number, loss=1.0):
    return {"event": "step", "step": number, "loss": loss}


def start(first_step):
    return {"event": "start", "first_step": first_step}


# The emitter


def test_every_sink_gets_each_event_in_order_with_its_kind_and_time():
    seen = []
    events = Events([lambda event: seen.append(("a", event)), lambda event: seen.append(("b", event))])
    event = events.emit("step", step=3, loss=0.5)
    assert seen == [("a", event), ("b", event)]
    assert event.pop("time") > 1.6e9
    assert event == {"event": "step", "step": 3, "loss": 0.5}


def test_a_failing_sink_keeps_no_other_from_the_event_and_its_failure_is_raised():
    def fails(_):
        raise OSError("disk full")

    def fails_too(_):
        raise ValueError("no such column")

    seen = []
    with pytest.raises(OSError, match="disk full") as raised:
        Events([fails, fails_too, seen.append]).emit("notice", text="hello")
    assert [event["text"] for event in seen] == ["hello"]
    assert raised.value.__notes__ == ["another sink failed as well: ValueError: no such column"]


def test_a_degraded_sink_is_told_of_in_a_notice_and_the_run_goes_on():
    def degraded(event):
        if event["event"] == "step":
            raise Degraded("wandb is gone")

    before, after = [], []
    events = Events([before.append, degraded, after.append])
    events.emit("step", step=1)
    assert [event["event"] for event in before] == [event["event"] for event in after] == ["step", "notice"]
    assert before[1]["text"] == "wandb is gone"


def test_every_sink_is_closed_the_last_first_even_if_one_fails():
    closed = []

    class Sink:
        def __init__(self, name):
            self.name = name

        def __call__(self, event): ...

        def close(self):
            closed.append(self.name)
            if self.name == "b":
                raise ValueError("b")

    with pytest.raises(ValueError, match="b"), Events([Sink("a"), Sink("b"), lambda _: None, Sink("c")]):
        pass
    assert closed == ["c", "b", "a"]


def test_what_a_sink_loses_while_it_closes_is_still_logged(tmp_path):
    class Tracker:
        def __call__(self, event): ...

        def close(self):
            raise Degraded("wandb may lack the last of the run")

    with Events([EventLog(tmp_path / "events.jsonl"), Tracker()]) as events:
        events.emit("notice", text="hello")
    texts = [event["text"] for event in read_events(tmp_path / "events.jsonl")]
    assert texts == ["hello", "wandb may lack the last of the run"]


# The log


def test_each_event_can_be_read_as_soon_as_it_is_emitted(tmp_path):
    log = EventLog(tmp_path / "made" / "events.jsonl")
    for number in (1, 2):
        log(step(number))
        assert read_events(log.path)[-1] == step(number)


def test_a_killed_process_has_logged_all_that_it_emitted(tmp_path):
    program = """
        import os, signal, sys
        from qlora.report.events import EventLog
        log = EventLog(sys.argv[1])
        for number in range(1, 4):
            log({"event": "step", "step": number})
        os.kill(os.getpid(), signal.SIGTERM)
    """
    path = tmp_path / "events.jsonl"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), path])
    assert done.returncode not in (0, 1), f"not killed by {signal.SIGTERM!r}"
    assert [event["step"] for event in read_events(path)] == [1, 2, 3]


def test_numbers_that_are_not_finite_are_strict_json_and_come_back_through_float(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log(step(1, float("nan")) | {"deep": [{"norm": float("-inf")}]})
    line = log.path.read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    event = json.loads(line, parse_constant=refuse)
    assert str(float(event["loss"])) == "nan" and float(event["deep"][0]["norm"]) == float("-inf")


@pytest.mark.parametrize("text", ["東京 größe", "a\nb\r\n\x1b[31m", "\u2028\x85 between lines", "half a pair: \ud83d"])
def test_any_text_a_model_can_emit_is_one_line_and_comes_back(tmp_path, text):
    log = EventLog(tmp_path / "events.jsonl")
    log({"event": "notice", "text": text})
    log(step(1))
    assert log.path.read_bytes().count(b"\n") == 2
    assert read_events(log.path) == [{"event": "notice", "text": text}, step(1)]


def test_wherever_a_line_was_torn_reading_ignores_it_and_opening_cuts_it_off(tmp_path):
    path = tmp_path / "events.jsonl"
    whole, torn = (json.dumps(step(number)).encode() + b"\n" for number in (1, 2))
    for length in range(len(torn)):
        path.write_bytes(whole + torn[:length])
        assert read_events(path) == [step(1)]
        log = EventLog(path)
        log(step(3))
        log.close()
        assert read_events(path) == [step(1), step(3)]


def test_a_log_of_one_torn_line_starts_anew(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "sta')
    log = EventLog(path)
    log(step(1))
    assert read_events(path) == [step(1)]


@pytest.mark.parametrize(
    "damage",
    [
        *("{", "[1]", "null", "", "[" * 100_000, "\0" * (2 << 20), '{"no": "kind"}', '{"event": ["step"]}'),
        *('{"event": "step", "step": "x"}', '{"event": "step", "step": -1}', '{"event": "notice", "step": 1.5}'),
        *('{"event": "step"}', '{"event": "start"}', '{"event": "start", "first_step": null}'),
    ],
)
def test_a_log_with_a_line_that_is_no_event_is_read_up_to_it_set_aside_and_continued_from_before_it(tmp_path, damage):
    path = tmp_path / "events.jsonl"
    path.write_text(f"{json.dumps(step(1))}\n{damage}\n{json.dumps(step(3))}\n")
    whole = path.read_bytes()
    with pytest.raises(QLoRAError, match=r"events\.jsonl:2: is not an event"):
        read_events(path)
    assert readable_events(path) == ([step(1)], f"{path}:2: is not an event")
    log = EventLog(path)
    log(step(2))
    log.close()
    assert read_events(path) == [step(1), step(2)]
    assert log.set_aside is not None and log.set_aside.read_bytes() == whole


def test_a_sound_log_is_not_set_aside(tmp_path):
    path = tmp_path / "events.jsonl"
    assert readable_events(path)[0] == [] and "cannot be read: No such file" in str(readable_events(path)[1])
    assert EventLog(path).set_aside is None
    path.write_text(f"{json.dumps(step(1))}\n{json.dumps(step(2))[:-3]}")
    assert readable_events(path) == ([step(1)], None)
    assert EventLog(path).set_aside is None
    assert [each.name for each in tmp_path.iterdir()] == ["events.jsonl"]


@pytest.mark.parametrize("after", [b"", b"\n"])
def test_a_log_with_a_hole_of_gigabytes_takes_no_memory(tmp_path, after):
    path = tmp_path / "events.jsonl"
    with path.open("wb") as file:
        file.write(json.dumps(step(1)).encode() + b"\n")
        file.seek(3 << 30)
        file.write(b"x" + after)
    tracemalloc.start()
    try:
        assert readable_events(path)[0] == [step(1)]
        assert EventLog(path).set_aside is not None
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert read_events(path) == [step(1)]


def test_of_a_log_too_long_to_be_held_the_beginning_is_read_and_all_of_it_continued(tmp_path, monkeypatch):
    path = tmp_path / "events.jsonl"
    path.write_text("".join(f"{json.dumps(step(number))}\n" for number in range(1, 10)))
    monkeypatch.setattr(log_of, "_MOST", 100)
    events, why = readable_events(path)
    assert events == [step(1), step(2)] and "only its beginning is read" in str(why)
    assert EventLog(path).set_aside is None and len(read_events(path)) == 9


def test_a_log_that_cannot_be_opened_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"events\.jsonl: the event log cannot be written"):
        EventLog(tmp_path / "file" / "events.jsonl")
    with pytest.raises(QLoRAError, match=r"events\.jsonl: the event log cannot be read: No such file"):
        read_events(tmp_path / "events.jsonl")


# Several attempts in one log


def test_a_resumed_run_takes_back_what_an_earlier_attempt_did_after_its_checkpoint():
    log = [start(0), step(1, 3.0), step(2, 2.0), step(3, 9.0), step(4, 9.0), start(2), step(3, 1.0)]
    assert [(event["step"], event["loss"]) for event in steps(log)] == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_a_run_from_step_0_takes_back_all_that_came_before():
    evaluated = {"event": "generation", "step": 0}
    log = [start(0), evaluated, step(1, 9.0), step(2, 9.0), start(0), evaluated, step(1, 1.0)]
    assert timeline(log) == log[4:]
    assert steps(log) == [step(1, 1.0)]


@pytest.mark.parametrize("first_step", [0, 1])
def test_an_attempts_plan_holds_and_those_of_earlier_attempts_do_not(first_step):
    old, new = {"event": "plan", "seconds": 9.0}, {"event": "plan", "seconds": 1.0}
    log = [old, start(0), step(1), new, {"event": "notice"}, start(first_step)]
    assert [event for event in timeline(log) if event["event"] == "plan"] == [new]
    assert old in timeline(log[:2])


def test_steps_are_told_at_every_nth_and_at_the_last():
    assert [number for number in range(1, 12) if due(number, 11, 5)] == [5, 10, 11]


def test_the_emitter_and_the_log_import_nothing_heavy():
    program = "import sys, qlora.report.events; print({'torch', 'rich', 'accelerate', 'pydantic'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"


def test_no_sink_hears_a_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "c4nary-in-a-mine")
    heard = []
    with Events([EventLog(tmp_path / "events.jsonl"), heard.append]) as events:
        told = events.emit("notice", text="no route to https://me:c4nary-in-a-mine@host", token="short")
        events.emit("generation", samples=[{"got": "hf_AbCdEfGhIjKlMnOp0123"}], step=1)
    assert told["text"] == "no route to https://***@host" and told["token"] == "***"
    assert heard == read_events(tmp_path / "events.jsonl")
    log = (tmp_path / "events.jsonl").read_text()
    assert "c4nary" not in log and "hf_" not in log
