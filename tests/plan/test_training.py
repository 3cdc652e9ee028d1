"""A run is planned before it starts, and compared with its plan when it ends."""

import json
from pathlib import Path

import pytest

from qlora import run
from qlora.errors import PlanError
from qlora.plan import measure, training
from qlora.plan.measure import calibration
from qlora.plan.types import Machine, Rates
from tests import tiny

GIB = 1 << 30


def machine(host=GIB):
    return Machine("CPU, 2 threads", True, host, host, 0, host, GIB, Rates(1e9, 1e9))


@pytest.fixture
def here(monkeypatch):
    """here(bytes) lets so many be free."""

    def make(host=GIB):
        monkeypatch.setattr(training, "this_machine", lambda directory, say: machine(host))

    make()
    return make


def train(config, **how):
    events = []
    run.train(config, sinks=[events.append], **how)
    return events


def of(events, kind):
    return [event for event in events if event["event"] == kind]


@pytest.fixture
def config(checkpoint, tmp_path):
    def make(**sections):
        sections["memory"] = {"plan": True} | sections.get("memory", {})
        return tiny.recipe(tiny.chat_model(checkpoint, num_hidden_layers=4), tmp_path, "qlora", **sections)

    return make


def test_a_run_is_planned_told_applied_and_compared(config, here):
    events = train(config(training={"max_steps": 6, "num_train_epochs": 9}))
    (plan,), (end,) = of(events, "plan"), of(events, "end")
    assert len(plan["lines"]) == 5
    assert plan["memory"]["layers_kept"] == 3  # all but the last, as there is room
    assert end["planned"] == {"device_bytes": None, "seconds": plan["seconds"]}
    seconds, nbytes = calibration(measure.key_of(run.pick_device()), print)
    assert seconds is not None and nbytes is None


def test_what_cannot_fit_is_refused_before_anything_is_loaded(config, here, monkeypatch):
    here(1 << 20)
    monkeypatch.setattr(run, "load_base", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(PlanError, match=r"needs [0-9.]+ GiB"):
        train(config())


def test_without_a_plan_nothing_is_chosen_or_refused(config, here):
    here(1 << 20)
    events = train(config(memory={"plan": False}, training={"max_steps": 1}))
    assert not of(events, "plan") and of(events, "end")[0].get("planned") is None


def test_a_resumed_run_keeps_the_pieces_of_its_sums(config, here):
    """What is chosen anew is where things are; how sums are cut is as before, or the bits would be others."""
    longer = {"num_train_epochs": 9, "save_steps": 1}
    first = train(config(training={"max_steps": 2} | longer, memory={"micro_batch_tokens": 32}))
    again = config(training={"max_steps": 3} | longer)
    events = train(again, resume=True)
    assert of(first, "plan")[0]["memory"]["micro_batch_tokens"] == 32
    assert of(events, "plan")[0]["memory"]["micro_batch_tokens"] == 32


def test_a_resumed_run_whose_log_holds_no_plan_that_could_be_is_planned_as_if_it_were_new(config, here):
    longer = {"num_train_epochs": 9, "save_steps": 1}
    train(config(training={"max_steps": 1} | longer))
    again = config(training={"max_steps": 2} | longer)
    log = Path(again.training.output_dir, "events.jsonl")
    log.write_text('{"event": "plan", "memory": {"loss_chunk_tokens": "x"}}\n')
    events = train(again, resume=True)
    assert [event["step"] for event in of(events, "step")] == [2] and of(events, "plan")
    assert any("does not tell how the run was planned" in event["text"] for event in of(events, "notice"))


@pytest.mark.parametrize("plan", [{}, {"memory": [1]}, {"memory": None}, {"memory": {"embeddings": 1}}])
def test_a_plan_that_is_none_is_passed_over_and_that_is_said(tmp_path, plan):
    log, said = tmp_path / "events.jsonl", []
    log.write_text(json.dumps({"event": "plan"} | plan) + "\n")
    assert training._memory_before(log, said.append) == {}
    assert len(said) == 1 and "does not tell how the run was planned" in said[0]


def test_what_an_older_plan_chose_beside_what_can_be_chosen_now_is_passed_over(tmp_path):
    log, said = tmp_path / "events.jsonl", []
    log.write_text('{"event": "plan", "memory": {"loss_chunk_tokens": 64, "gone_since": 1}}\n')
    assert training._memory_before(log, said.append) == {"loss_chunk_tokens": 64} and said == []


def test_a_machine_that_shrank_since_is_planned_for_anew_and_that_is_said(config, here):
    longer = {"num_train_epochs": 9, "save_steps": 1}
    (plan,) = of(train(config(training={"max_steps": 2} | longer)), "plan")
    here(int(0.8 * plan["device_bytes"]))
    events = train(config(training={"max_steps": 3} | longer), resume=True)
    assert of(events, "plan")[0]["device_bytes"] <= 0.8 * plan["device_bytes"]
    (said,) = [event["text"] for event in of(events, "notice") if "planned anew" in event["text"]]
    assert "layers_kept: " in said and "(was 3)" in said


def test_a_model_that_cannot_be_simulated_trains_without_a_plan(checkpoint, tmp_path, here):
    """PyTorch's grouped matrix product knows fp32 on a CPU, and not on fake tensors."""
    model = tiny.chat_model(checkpoint, "mixtral")
    config = tiny.recipe(model, tmp_path, "qlora", memory={"plan": True}, training={"max_steps": 1})
    notices = [event["text"] for event in of(train(config), "notice")]
    assert any("not planned" in text and "cannot be simulated" in text for text in notices)
