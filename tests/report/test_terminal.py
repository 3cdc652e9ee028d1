"""What is printed, on a terminal and in a pipe."""

import io
import math
import re
import subprocess
import sys
import textwrap
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from qlora.report.events import EventLog, read_events
from qlora.report.terminal import Terminal, loss_curve

SAMPLE = {"prompt": "Two red mugs, please.", "expected": '{"item": "mug"}'}


def start(steps=6, first_step=0, **changes):
    return {
        "event": "start", "steps": steps, "first_step": first_step, "method": "qlora", "order": "layer-major",
        "model": "tiny.gguf", "parameters": 134_515_008, "trainable": 4_884_480, "four_bit_share": 0.789,
        "base_gib": 0.11, "load_seconds": 4.2, "from_cache": False, "layers": {"device": 30, "host": 0, "file": 0},
        "device": "cpu", "optimizer": "adamw_torch", "rows": 320,
        "tokens_per_epoch": 41_200, "supervised_per_epoch": 9_120, "epochs": 3.0,
    } | changes  # fmt: skip


def step(number, loss=1.0, **changes):
    return {
        "event": "step", "step": number, "epoch": 0.5, "loss": loss, "learning_rate": 1e-4, "grad_norm": 0.5,
        "tokens": 100 * number, "supervised": 20, "step_seconds": 2.0, "tokens_per_second": 1234.5,
        "memory_gib": 1.25,
    } | changes  # fmt: skip


def generation(number, correct, got):
    return {
        "event": "generation", "step": number, "exact_match": correct / 60, "rows": 60, "correct": correct,
        "seconds": 9.8, "samples": [SAMPLE | {"got": got}],
    }  # fmt: skip


def end(number=6, stopped=None, **changes):
    return {
        "event": "end", "step": number, "seconds": 212.44, "tokens": 41_200, "tokens_per_second": 812.3,
        "peak_memory_gib": 1.34, "memory_kind": "host RSS", "output_dir": "outputs/quickstart", "stopped": stopped,
    } | changes  # fmt: skip


def plan(**changes):
    return {
        "event": "plan",
        "lines": ["4.54 of 7.42 GiB of VRAM", "316 s a step", "activations: host", "the disk", "guessed"],
        "device_bytes": 5 * 2**30, "host_bytes": 0, "file_bytes": 0, "seconds": 316.0, "tokens_per_second": 52.0,
        "memory": {"activations": "host"}, "calibrated": False,
    } | changes  # fmt: skip


def printed(*events, width=100, **options):
    """What a pipe receives."""
    out = io.StringIO()
    terminal = Terminal(Console(file=out, width=width), **options)
    for event in events:
        terminal(event)
    return out.getvalue()


def test_the_start_says_where_layers_live_if_not_all_are_on_the_device_and_that_the_base_was_cached():
    assert "layers" not in printed(start()) and "cache" not in printed(start())
    out = printed(start(from_cache=True, layers={"device": 10, "host": 0, "file": 20}))
    assert re.search(r"layers +10 on device, 20 on file", out) and "from the NF4 cache" in out


def test_a_plan_is_five_named_lines_before_the_run():
    out = printed(plan(), start())
    block, run = out.split("tiny.gguf")[0], out[out.index("tiny.gguf") :]
    assert [line.split(maxsplit=1) for line in block.strip().splitlines()] == [
        ["Plan"], ["memory", "4.54 of 7.42 GiB of VRAM"], ["time", "316 s a step"], ["choices", "activations: host"],
        ["limit", "the disk"], ["figures", "guessed"],
    ]  # fmt: skip
    assert "Plan" not in run


# A run, as a pipe or a CI log sees it


def test_a_pipe_gets_one_plain_line_every_logging_steps_and_for_the_last_step():
    out = printed(start(steps=7), *(step(number, loss=number / 4) for number in range(1, 8)), logging_steps=3)
    assert re.findall(r"step (\d)/7  loss (\S+)", out) == [("3", "0.7500"), ("6", "1.5000"), ("7", "1.7500")]
    assert "\x1b" not in out and "\r" not in out
    assert not [line for line in out.splitlines() if line != line.rstrip()]


def test_a_line_stays_one_line_however_narrow_the_pipe_is_thought_to_be():
    out = printed(start(), step(1), {"event": "notice", "text": "word " * 40}, width=30)
    assert len([line for line in out.splitlines() if "tokens/s" in line and "GiB" in line]) == 1
    assert "note: " + "word " * 39 in out


def test_the_time_left_is_what_the_last_steps_took():
    slow = [step(number, step_seconds=100.0) for number in range(1, 11)]
    fast = [step(number, step_seconds=2.0) for number in range(11, 31)]
    out = printed(start(steps=60), *slow, *fast)
    assert re.search(r"step 10/60 .* 1:23:20 left", out)
    assert re.search(r"step 30/60 .* 1:00 left", out)


def test_the_start_says_what_is_trained_on_what_and_how():
    out = printed(start(steps=60, first_step=20))
    for words in ("tiny.gguf", "134.5M", "78.9%", "0.11 GiB", "4.88M parameters (3.63%)", "qlora", "adamw_torch"):
        assert words in out
    for words in ("320 rows", "41,200 tokens", "9,120", "60 steps in 3 epochs, from step 20 on", "layer-major", "cpu"):
        assert words in out


def test_where_the_steps_decide_no_epochs_are_said():
    assert re.search(r"run +6 steps, layer-major", printed(start(epochs=None)))


def test_evaluations_checkpoints_and_notices_have_a_line_each():
    out = printed(
        start(steps=100),
        {"event": "evaluation", "step": 40, "eval_loss": 0.4312, "eval_tokens": 1724, "seconds": 3.2},
        {"event": "checkpoint", "step": 40, "path": "out/checkpoint-40", "seconds": 0.2},
        {"event": "notice", "text": "adamw_torch is used"},
        generation(100, 52, "{}"),
    ).splitlines()
    assert "step  40  held-out loss 0.4312  (1,724 tokens, 3.2 s)" in out
    assert "step  40  checkpoint out/checkpoint-40  (0.2 s)" in out
    assert "note: adamw_torch is used" in out
    assert "step 100  held-out exact match 86.7%  (52 of 60, 9.8 s)" in out


# The summary


def test_the_summary_holds_accuracy_samples_curve_time_speed_memory_and_place():
    out = printed(
        start(), generation(0, 1, "Sure!"), *map(step, range(1, 7)), generation(6, 52, SAMPLE["expected"]), end()
    )
    summary = out[out.index("\nLoss\n") :]
    assert "1.7% → 86.7%  (1 → 52 of 60)" in summary
    assert "expected   " + SAMPLE["expected"] in summary and "prompt     " + SAMPLE["prompt"] in summary
    assert "before   ✗ Sure!" in summary and "after    ✓ " + SAMPLE["expected"] in summary
    for words in ("212.4 s", "812 tokens/s", "1.34 GiB (host RSS)", "adapter      outputs/quickstart"):
        assert words in summary


def test_the_end_says_what_had_been_planned_beside_what_was_measured():
    # 41,200 tokens in 6 steps of 16.2 s each are 424 a second.
    planned = {"device_bytes": int(1.25 * 2**30), "seconds": 16.2}
    out = printed(start(), end(tokens_per_second=430.0, planned=planned))
    assert "speed        430 tokens/s, 424 planned (41,200 tokens)\n" in out
    assert "peak memory  1.34 GiB (host RSS), 1.25 planned\n" in out
    out = printed(start(), end(planned=planned | {"device_bytes": None}))
    assert "424 planned" in out and "1.34 GiB (host RSS)\n" in out


def test_an_end_without_a_plan_compares_nothing():
    assert "planned" not in printed(start(), end()) + printed(start(), end(planned=None))


def test_a_run_that_ended_before_its_first_step_has_no_planned_speed():
    out = printed(start(), end(0, tokens=0, planned={"device_bytes": 2**30, "seconds": 2.0}))
    assert "tokens/s (0 tokens)" in out and "1.00 planned" in out


def test_at_most_three_samples_are_shown_and_each_before_is_of_the_same_prompt():
    def samples(number, names):
        event = generation(number, 0, "")
        event["samples"] = [{"prompt": f"prompt {x}", "expected": "", "got": f"{number} {x}"} for x in names]
        return event

    out = printed(start(), samples(0, "dcba"), samples(6, "abcd"), end())
    assert re.findall(r"prompt     (.*)", out) == ["prompt a", "prompt b", "prompt c"]
    assert re.findall(r"before   ✗ (.*)", out) == ["0 a", "0 b", "0 c"]
    assert re.findall(r"after    ✗ (.*)", out) == ["6 a", "6 b", "6 c"]


def test_a_run_without_held_out_rows_or_steps_still_ends():
    out = printed(start(), end(0))
    assert "Held out" not in out and "Loss" not in out and "outputs/quickstart" in out
    assert "\nLoss" not in printed(start(), step(1, math.nan), end(1, "step 1: the loss is nan"))


def test_a_run_that_was_interrupted_or_failed_says_so_and_where():
    assert "Interrupted after step 3 of 6" in printed(start(), step(3), end(3, "interrupted"))
    out = printed(start(), step(3), end(3, "NonFiniteLossError: step 3: rows a.jsonl:7"))
    assert "Stopped after step 3 of 6" in out and "NonFiniteLossError: step 3: rows a.jsonl:7" in out
    assert "Done" not in out and "adapter" not in out


def test_a_resumed_run_knows_its_first_answers_and_its_whole_curve(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    lost = float("nan")  # what the killed attempt did after its checkpoint at step 2
    attempt = [start(), generation(0, 0, "Sure!"), step(1, 3.0), step(2, 2.0), step(3, lost), step(4, 900.0)]
    for event in attempt:
        log(event)
    out = printed(
        start(first_step=2), *(step(number, 1.0) for number in range(3, 7)), generation(6, 60, "{}"), end(),
        history=read_events(log.path),
    )  # fmt: skip
    assert "0.0% → 100.0%" in out and "before   ✗ Sure!" in out
    curve = out[out.index("\nLoss\n") :]
    assert re.search(r"^ 3\.2 ┤", curve, re.MULTILINE) and "900" not in curve
    assert re.search(r"^step +1 .* 6$", curve, re.MULTILINE)


@pytest.mark.parametrize(
    "lacking",
    [
        *(
            {"event": "step", "step": 1},
            {"event": "step", "step": 1, "loss": []},
            step(1) | {"loss": "x"},
            step(1, 10**400),
        ),
        *(step(1, 2.0, step_seconds="x"), {"event": "evaluation", "step": 1}),
        {"event": "evaluation", "step": 1, "eval_loss": None},
        *({"event": "generation"}, generation(0, 0, None), generation(0, 0, "") | {"samples": [1]}),
        *(generation(0, 0, "") | {"exact_match": "x"}, generation(0, 0, "") | {"exact_match": 10**400}),
        *({"event": "start", "first_step": 0}, {"event": "plan"}, {"event": "end"}),
    ],
)
def test_an_event_of_an_earlier_attempt_that_lacks_something_ends_no_run(lacking):
    events = start(first_step=2), step(3, 1.0), generation(6, 60, "{}"), end(3)
    out = printed(*events, history=[start(), lacking])
    assert "100.0%" in out and "Done" in out


def test_the_pace_of_an_earlier_attempt_does_not_count():
    earlier = [start(), *(step(number, step_seconds=1000.0) for number in range(1, 3))]
    assert re.search(r"step 3/6 .* 0:06 left", printed(start(first_step=2), step(3), history=earlier))


def test_the_held_out_loss_is_that_of_the_first_and_the_last_evaluation():
    evaluations = [
        {"event": "evaluation", "step": number, "eval_loss": 1 / number, "eval_tokens": 9, "seconds": 1.0}
        for number in (1, 2, 4)
    ]
    assert "loss         1.0000 at step 1 → 0.2500 at step 4" in printed(start(), *evaluations, end())


# Text from outside


@pytest.mark.parametrize("text", ["[bold]mug[/bold]", "[/nothing open]", "[link=x]", ":smile:", "\\[escaped]"])
def test_markup_in_texts_prints_literally(text):
    out = printed(start(model=text), generation(0, 0, text), {"event": "notice", "text": text}, end(stopped=text))
    assert out.count(text) == 4


def test_control_characters_in_an_answer_do_not_reach_the_terminal():
    out = printed(start(), generation(0, 0, "a\x1b[2Jb\x07c\rd\x9b31me"), end())
    assert r"a\x1b[2Jb\x07c\rd\x9b31me" in out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out)


def test_a_long_answer_loses_its_middle_and_every_line_fits_the_console():
    answer = "begin " + "words that go on and on " * 60 + "finish"
    out = printed(start(model="m"), generation(0, 0, answer), end(), width=60)
    sample = out[out.index("Sample 1") : out.index("Done")]
    assert max(map(len, sample.splitlines())) <= 60 and len(sample.splitlines()) <= 10
    assert "begin words" in sample and "finish" in sample and "more lines" in sample


def test_an_answer_keeps_its_lines_and_an_empty_one_is_said():
    out = printed(start(), generation(0, 0, "one  \n\ntwo"), generation(6, 0, " \n"), end())
    indent = " " * len("  before   ✗ ")
    assert f"  before   ✗ one\n\n{indent}two\n  after    ✗ (nothing)\n" in out


def test_a_console_that_knows_only_ascii_gets_only_ascii():
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii", write_through=True) as file:
        terminal = Terminal(Console(file=file, width=80))
        for event in (
            start(model="größe"),
            generation(0, 0, "東"),
            step(1, 2.0),
            step(2),
            generation(2, 1, "é"),
            end(),
        ):
            terminal(event)
        out = raw.getvalue().decode("ascii")
    assert r"gr\xf6\xdfe" in out and r"\u6771" in out and "0.0% -> 1.7%" in out and "no " in out and "***" in out


# The progress bar


def on_a_terminal(*events, width=100):
    out = io.StringIO()
    terminal = Terminal(Console(file=out, width=width, force_terminal=True, force_interactive=True, color_system=None))
    for event in events:
        terminal(event)
    return terminal, out


def test_a_terminal_gets_a_bar_with_step_loss_speed_memory_and_time_left():
    terminal, out = on_a_terminal(start(), step(1), step(2, loss=0.5))
    bar = out.getvalue().splitlines()[-1]
    terminal.close()
    assert re.search(r"2/6  loss 0\.5000  1,23[45] tokens/s  1\.25 GiB  0:0[78] left", bar)
    assert "step 2/6" not in out.getvalue()


def test_before_the_first_step_the_bar_says_how_long_it_has_been_there():
    terminal, out = on_a_terminal(start())
    terminal.close()
    assert "0/6  0:00" in out.getvalue()


@pytest.mark.parametrize("last", [[], [end()]])
def test_the_cursor_is_given_back_however_the_run_ends(last):
    terminal, out = on_a_terminal(start(), step(1), *last)
    terminal.close()
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")


def test_when_the_reader_of_a_pipe_goes_away_the_run_goes_on_and_says_so(tmp_path):
    program = """
        import sys
        from qlora.report.events import EventLog, Events
        from qlora.report.terminal import Terminal
        sys.stdin.read()
        with Events([EventLog(sys.argv[1]), Terminal()]) as events:
            events.emit("notice", text="hello")
            events.emit("notice", text="goodbye")
    """
    log = tmp_path / "events.jsonl"
    command = [sys.executable, "-c", textwrap.dedent(program), str(log)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        process.stdout.close()
        process.stdin.close()
    assert process.returncode == 0
    hello, gone, goodbye = (event["text"] for event in read_events(log))
    assert (hello, goodbye) == ("hello", "goodbye") and "nobody reads" in gone


# The curve


def stars(curve):
    """The rows of an ASCII curve: (label or None, columns with a star)."""
    rows = [re.split(r" ?[+|]", line) for line in curve.splitlines()[:-2]]
    return [
        (float(label) if label.strip() else None, {x for x, c in enumerate(drawn) if c == "*"}) for label, drawn in rows
    ]


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.floats(0, 20), min_size=1, max_size=58), st.integers(4, 20))
def test_each_loss_stands_at_its_step_and_height(losses, height):
    curve = loss_curve(losses, 64, height, ascii_only=True)
    rows = stars(curve)
    columns = len(curve.splitlines()[-2]) - curve.splitlines()[-2].index("+") - 1
    (top, high), (bottom, low) = ((i, label) for i, (label, _) in enumerate(rows) if i in (0, height - 1))
    assert high is not None and low is not None and low - 1e-9 <= min(losses) and max(losses) <= high + 1e-9
    for i, loss in enumerate(losses):
        column = round(i / max(1, len(losses) - 1) * (columns - 1))
        row = (high - loss) / (high - low) * (bottom - top)
        # Half a row is the grid's own error; labels are rounded to what tells them apart.
        assert any(column in rows[near][1] for near in range(height) if abs(near - row) <= 0.51)


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1e300) | st.floats(0, 10) | st.just(math.nan), min_size=1, max_size=300),
    st.integers(30, 200),
    st.integers(3, 30),
    st.booleans(),
)
def test_any_losses_fit_the_asked_size(losses, width, height, ascii_only):
    curve = loss_curve(losses, width, height, ascii_only=ascii_only)
    if all(map(math.isnan, losses)):
        assert curve == ""
    else:
        assert len(curve.splitlines()) == height + 2
        assert max(map(len, curve.splitlines())) <= width


def test_the_braille_curve_is_the_ascii_curve_in_finer_dots():
    losses = [3 * math.exp(-i / 20) for i in range(100)]
    fine, coarse = loss_curve(losses).splitlines()[:-2], loss_curve(losses, ascii_only=True).splitlines()[:-2]

    def heights(curve):
        """The highest row that is drawn on, of each column."""
        return [next(y for y, line in enumerate(curve) if line[x : x + 1].strip()) for x in range(6, 64)]

    assert all(abs(a - b) <= 1 for a, b in zip(heights(fine), heights(coarse), strict=True))
    assert 0x2800 < ord(fine[0][6]) < 0x2900


def test_a_constant_loss_is_one_level_line_between_labels_that_hold_it():
    rows = stars(loss_curve([1.7] * 40, ascii_only=True))
    (drawn,) = [columns for _, columns in rows if columns]
    assert len(drawn) == max(drawn) + 1 and rows[0][0] > 1.7 > rows[-1][0]  # type: ignore[operator]


def test_a_curve_has_no_gaps_however_steep():
    rows = [columns for _, columns in stars(loss_curve([20.0, 0.0, 15.0, 1.0] * 12, ascii_only=True))]
    heights = [{y for y, columns in enumerate(rows) if x in columns} for x in range(max(set.union(*rows)) + 1)]
    for here, there in pairwise(heights):
        assert max(here) - min(here) + 1 == len(here)
        assert min(there) <= max(here) + 1 and min(here) <= max(there) + 1


def test_a_step_whose_number_does_not_fit_is_left_out():
    *_, axis, steps = loss_curve([2.0, 1.0], 14, first=10**12).splitlines()
    assert steps == "step" and len(axis) == 14


def test_one_loss_is_one_dot():
    assert sum(len(columns) for _, columns in stars(loss_curve([2.5], ascii_only=True))) == 1


def test_a_column_of_several_steps_shows_their_mean():
    rows = stars(loss_curve([0.0, 2.0] * 2900, ascii_only=True))
    levels = [i for i, (_, columns) in enumerate(rows) if columns]
    assert levels in ([4], [5], [4, 5])  # half way down ten rows


def test_a_curve_starts_at_its_first_step():
    assert re.search(r"^step +1001 .* 1120$", loss_curve([1.0] * 120, first=1001).splitlines()[-1])
