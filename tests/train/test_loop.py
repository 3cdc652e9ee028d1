"""The loop: which micro-batches a step takes, how it is paced and clipped, and how it stops."""

import math
import signal
import threading
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from transformers import TrainingArguments, get_scheduler

from qlora.config import TrainingConfig
from qlora.errors import MachineError, NonFiniteLossError
from qlora.train.checkpoint import Run, checkpoints
from qlora.train.loop import Loop, Schedule, stop_requested
from qlora.train.step import StepResult
from tests.conftest import random_batch


class Bowl:
    """A step whose gradient is known: the loss is half the squared length of the weights, the gradient the weights."""

    device = torch.device("cpu")

    def __init__(self):
        self.parameters = {"matrix": nn.Parameter(torch.tensor([[3.0, 4.0]])), "vector": nn.Parameter(torch.ones(3))}
        self.seen = []

    def __call__(self, batches, step):
        self.seen.append([row for batch in batches for row in batch.rows])
        for parameter in self.parameters.values():
            parameter.grad = parameter.detach().clone()
        loss = sum(0.5 * p.detach().square().sum().item() for p in self.parameters.values())
        shares = tuple(loss / len(batches) for _ in batches)
        rows = tuple(batch.rows for batch in batches)
        return StepResult(sum(shares), shares, rows, 12 * len(batches), 7 * len(batches))


def looped(tmp_path, step=None, on=lambda event: None, batches=4, evaluate=None, **training):
    """A loop over `batches` micro-batches an epoch, and the events it will tell; `on` hears each of them first."""
    events = []

    def emit(kind, **fields):
        on({"event": kind, **fields})
        events.append({"event": kind, **fields})

    step = step or Bowl()
    knobs = {"output_dir": str(tmp_path), "optim": "adamw_torch", "gradient_accumulation_steps": 1} | training
    rows = [random_batch(seed=number) for number in range(batches)]
    return Loop(step, step.parameters, lambda epoch: rows, TrainingConfig(**knobs), Run({}, {}), emit, evaluate), events


def steps(events, key="step"):
    return [event[key] for event in events if event["event"] == "step"]


# --- which micro-batches a step takes


@given(
    sizes=st.integers(1, 200),
    k=st.integers(1, 9),
    epochs=st.decimals(min_value="0.01", max_value=6, places=2),
)
@example(sizes=10, k=1, epochs=Decimal("1.1"))  # 1.1 - 1 is a little more than 0.1
def test_epochs_are_taken_in_order_and_a_fraction_of_one_is_rounded_up_to_whole_steps(sizes, k, epochs):
    training = TrainingConfig(num_train_epochs=float(epochs), gradient_accumulation_steps=k)
    schedule = Schedule.of(training, lambda _: range(sizes))
    an_epoch = -(-sizes // k)
    assert schedule.steps == math.ceil(Fraction(epochs) * an_epoch)
    taken = list(schedule)
    assert len(taken) == schedule.steps
    groups = [(epoch, list(range(sizes))[first:behind]) for epoch, first, behind in taken]
    expected = [
        (epoch, [place for place in range(sizes) if place // k == group])
        for epoch in range(math.ceil(epochs))
        for group in range(an_epoch)
    ]
    assert groups == expected[: schedule.steps]


@given(sizes=st.integers(1, 20), k=st.integers(1, 9), most=st.integers(1, 50), epochs=st.floats(0.1, 9))
def test_max_steps_decides_whatever_the_epochs(sizes, k, most, epochs):
    training = TrainingConfig(num_train_epochs=epochs, gradient_accumulation_steps=k, max_steps=most)
    schedule = Schedule.of(training, lambda _: range(sizes))
    assert schedule.steps == most == len(list(schedule))
    assert [first for _, first, _ in schedule][: -(-sizes // k)] == [*range(0, sizes, k)][:most]


def test_the_last_step_of_an_epoch_takes_what_is_left(tmp_path):
    step = Bowl()
    loop, events = looped(tmp_path, step, batches=5, gradient_accumulation_steps=2, num_train_epochs=2.0)
    loop.run()
    assert [len(rows) for rows in step.seen] == [2, 2, 1, 2, 2, 1]
    assert steps(events, "epoch") == [0.4, 0.8, 1.0, 1.4, 1.8, 2.0]
    assert steps(events, "tokens") == [24, 48, 60, 84, 108, 120]


# --- the learning rate


@pytest.mark.parametrize("warmup", [{"warmup_ratio": 0.03}, {"warmup_ratio": 0.35}, {"warmup_steps": 3}, {}], ids=str)
@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup", "constant"])
def test_learning_rates_are_transformers_own(name, warmup, tmp_path):
    if name == "constant":
        warmup = {}
    loop, events = looped(tmp_path, batches=11, lr_scheduler_type=name, learning_rate=0.5, **warmup)
    loop.run()
    # transformers 5 takes both kinds of warmup in warmup_steps; 0.03 is the default of ours.
    asked = next(iter(warmup.values()), 0.0 if name == "constant" else 0.03)
    warmup_steps = TrainingArguments(str(tmp_path), warmup_steps=asked).get_warmup_steps(11)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
    theirs = get_scheduler(name, optimizer, warmup_steps, 11)
    expected = []
    for _ in range(11):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert steps(events, "learning_rate") == expected


# --- clipping


@pytest.mark.parametrize(("longest", "scaled"), [(1.0, True), (100.0, False), (0.0, False)])
def test_the_norm_is_over_all_weights_and_a_longer_gradient_is_scaled_to_the_limit(longest, scaled, tmp_path):
    step = Bowl()
    loop, events = looped(tmp_path, step, max_grad_norm=longest, max_steps=1)
    given = []
    loop.optimizer.register_step_pre_hook(lambda *_: given.extend(p.grad.clone() for p in step.parameters.values()))
    loop.run()
    norm = math.sqrt(3**2 + 4**2 + 3)
    assert steps(events, "grad_norm") == [pytest.approx(norm, rel=1e-6)]
    factor = longest / norm if scaled else 1.0
    torch.testing.assert_close(given[0], factor * torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(given[1], factor * torch.ones(3))


# --- a loss that is no number


@pytest.mark.parametrize("what", ["a loss that is NaN", "an infinite gradient"])
def test_what_is_not_finite_stops_the_run_before_it_reaches_a_weight(what, tmp_path):
    class Breaks(Bowl):
        def __call__(self, batches, step):
            result = super().__call__(batches, step)
            if step != 3:
                return result
            if what == "an infinite gradient":
                self.parameters["vector"].grad[1] = math.inf
                return result
            self.parameters["vector"].grad[1] = math.nan
            return StepResult(math.nan, (1.0, math.nan), result.rows, result.tokens, result.supervised)

    step, before = Breaks(), {}

    def keep(event):
        before.update({name: p.detach().clone() for name, p in step.parameters.items()})

    loop, events = looped(tmp_path, step, keep, batches=8, gradient_accumulation_steps=2, save_steps=2)
    with pytest.raises(NonFiniteLossError, match=r"^step 3: ") as raised:
        loop.run()
    to_blame = ["row5.0"] if what == "a loss that is NaN" else ["row4.0", "row5.0"]
    assert f"rows of this step: {', '.join(to_blame)}\n" in str(raised.value)
    assert steps(events) == [1, 2]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    for name, parameter in step.parameters.items():
        assert torch.equal(parameter, before[name])


# --- stopping

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def heeding_signals(loop):
    with stop_requested() as requested:
        return loop.run(requested)


@pytest.mark.parametrize("when", ["step", "checkpoint"])
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_the_run_after_the_step_it_came_in_and_the_step_is_saved(number, when, tmp_path):
    def stop(event):
        if event["event"] == when and event["step"] == 2:
            signal.raise_signal(number)

    handlers = [signal.getsignal(each) for each in SIGNALS]
    save_steps = None if when == "step" else 2
    loop, events = looped(tmp_path, on=stop, batches=5, save_steps=save_steps, eval_steps=1, evaluate=lambda step: None)
    outcome = heeding_signals(loop)
    assert outcome.stopped == "interrupted" and len(outcome.losses) == 2
    assert steps(events) == [1, 2]
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [2]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert [signal.getsignal(each) for each in SIGNALS] == handlers


def test_a_signal_during_an_evaluation_ends_the_run_after_it_and_the_step_is_saved(tmp_path):
    loop, events = looped(tmp_path, batches=5, eval_steps=2, evaluate=lambda step: signal.raise_signal(signal.SIGINT))
    assert heeding_signals(loop).stopped == "interrupted"
    assert steps(events) == [1, 2]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]


def test_a_signal_in_the_last_step_interrupts_nothing(tmp_path):
    def stop(event):
        if event["event"] == "step" and event["step"] == 4:
            signal.raise_signal(signal.SIGINT)

    loop, _ = looped(tmp_path, on=stop)
    assert heeding_signals(loop).stopped is None
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4"]


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    def stop(event):
        if event["event"] == "step":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    loop, _ = looped(tmp_path, on=stop)
    with pytest.raises(KeyboardInterrupt):
        heeding_signals(loop)
    assert checkpoints(tmp_path) == []


def test_a_loop_runs_in_a_thread_which_gets_no_signals(tmp_path):
    loop, events = looped(tmp_path)
    thread = threading.Thread(target=heeding_signals, args=(loop,))
    thread.start()
    thread.join()
    assert steps(events) == [1, 2, 3, 4]


def test_a_signal_that_the_process_was_told_to_ignore_stays_ignored(tmp_path):
    """`nohup qlora train ...` goes on when the terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        loop, _ = looped(tmp_path, on=lambda event: event["event"] == "step" and signal.raise_signal(signal.SIGHUP))
        assert heeding_signals(loop).stopped is None
    finally:
        signal.signal(signal.SIGHUP, before)


# --- saving and evaluating


def test_checkpoints_are_written_every_save_steps_and_at_the_end_and_the_newest_are_kept(tmp_path):
    loop, events = looped(tmp_path, batches=11, save_steps=3, save_total_limit=2)
    loop.run()
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [3, 6, 9, 11]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-11"]


def test_held_out_rows_are_scored_every_eval_steps_but_not_after_the_last_which_is_the_callers(tmp_path):
    scored = []
    loop, _ = looped(tmp_path, batches=9, eval_steps=3, evaluate=scored.append)
    loop.run()
    assert scored == [3, 6]


class Cramped(Bowl):
    """A step that runs out of memory, half-way, until it was relieved so many times."""

    def __init__(self, short):
        super().__init__()
        self.short, self.reliefs = short, ["memory.activations: host", "memory.layers_on_device: 3 (1 fewer)"]

    def __call__(self, batches, step):
        result = super().__call__(batches, step)
        if step == 2 and self.short:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 8 GiB.")
        return result

    def relieve(self):
        self.short -= 1
        return self.reliefs.pop(0) if self.reliefs else None


def test_a_step_that_runs_out_of_memory_is_taken_again_with_less_and_gives_the_same(tmp_path):
    expected, events = looped(tmp_path / "a")
    expected.run()
    loop, cramped = looped(tmp_path / "b", Cramped(short=2))
    loop.run()
    assert steps(cramped, "loss") == steps(events, "loss")
    assert [event["text"] for event in cramped if event["event"] == "notice"] == [
        "step 2: CUDA out of memory; it is taken again with memory.activations: host",
        "step 2: CUDA out of memory; it is taken again with memory.layers_on_device: 3 (1 fewer)",
    ]


def test_a_step_for_which_there_is_never_enough_memory_says_what_to_change_and_changes_no_weight(tmp_path):
    step = Cramped(short=9)
    loop, _ = looped(tmp_path, step, save_steps=1)
    with pytest.raises(
        MachineError, match=r"step 2: CUDA out of memory; --resume goes on from checkpoint-1\n  .*max_seq"
    ):
        loop.run()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]
    assert all(parameter.grad is None for parameter in step.parameters.values())


def test_the_saves_that_are_left_are_counted(tmp_path):
    loop, events = looped(tmp_path, batches=11, save_steps=3)
    expected = loop.saves
    loop.run()
    assert expected == 4 == len([event for event in events if event["event"] == "checkpoint"])
    assert loop.saves == 0
