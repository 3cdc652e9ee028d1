"""The screen of a plan, its five lines, its JSON, and what is said where nothing fits."""

import io
import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from qlora.config import Config
from qlora.model.batch import Batch, regroup
from qlora.plan.bars import apportion, flow
from qlora.plan.plan import Plan, does_not_fit
from qlora.plan.types import Machine, Option, Phase, Rates, Time, Usage
from qlora.recipe import load_recipe

GIB = 2**30


def config(memory=None, **training):
    return Config.model_validate(
        {
            "model": {"model_name_or_path": "m"},
            "data": {"datasets": [{"path": "rows.jsonl"}], "max_seq_length": training.pop("max_seq_length", 2048)},
            "training": training,
            "memory": memory or {},
        }
    )


def of(gibs):
    return {name: int(n * GIB) for name, n in gibs.items()}


def phase(flops, **moved):
    return Phase(Counter({(flops, 1): 1}), Counter(), Counter({way.replace("_", " "): n for way, n in moved.items()}))


def streamed_70b():
    """Llama-3.3-70B on a card with 8 GB, its layers on an SSD."""
    machine = Machine(
        "NVIDIA GeForce RTX 4060 Laptop GPU", False, int(7.42 * GIB), int(7.996 * GIB), int(0.48 * GIB),
        int(27.3 * GIB), int(412.7 * GIB), Rates(30e12, 272e9, 12e9, 5e9, 40e9, 5e-6), 115.0,
    )  # fmt: skip
    memory = {"layers_on_device": 0, "layers_on_host": 0, "activations": "host", "embeddings": "host"}
    memory |= {"adapters": "host", "layer_tile_tokens": 1024}
    return Plan(
        config=config(memory, per_device_train_batch_size=1, gradient_accumulation_steps=8),
        machine=machine,
        model="meta-llama/Llama-3.3-70B-Instruct, 70.6B parameters",
        parameters=70_553_706_496,
        trainable=207_093_760,
        usage=Usage(
            device=of(
                {"layer working set": 1.173, "base": 0.883, "dense buffers": 1.594, "adapters": 0.0051}
                | {"gradients": 0.0048, "boundary activations": 0.094, "embeddings, head, norms": 0.0}
            ),
            host=of(
                {"embeddings, head, norms": 3.914, "adapters": 1.157, "gradients": 0.386, "optimizer state": 0.391}
                | {"boundary activations": 20.25, "staging": 0.25}
            ),
            file=of({"base": 36.84}),
            moment="backward of layer 79",
            slack=int(0.306 * GIB),
            phases={
                "forward": phase(10**15, from_file=4, host_to_device=5),
                "backward": phase(3 * 10**15, from_file=4, device_to_host=6),
            },
            tokens=16_384,
            layers=80,
        ),
        time=Time(
            {"prologue": 0.31, "forward": 78.2, "turn": 4.87, "backward": 231.4, "optimizer": 1.24},
            {
                "prologue": "bus",
                "forward": "compute",
                "turn": "compute",
                "backward": "compute",
                "optimizer": "host",
            },
        ),
        steps=1_624,
        fixed=frozenset({"layers_on_host"}),
        reasons={
            "loss_chunk_tokens": "0.06 GiB of logits",
            "micro_batch_tokens": "2,048 tokens fill the card",
            "layers_on_device": "computation hides the others' way",
            "activations": "20.25 GiB: the host has them free",
            "embeddings": "3.91 GiB that the card needs",
            "adapters": "1.93 GiB with their state",
            "layer_tile_tokens": "0.62 GiB less for 0.3% of the time",
        },
        runners_up=(
            Option({"layers_on_device": 1}, int(4.98 * GIB), int(26.3 * GIB), int(36.4 * GIB), 316.1),
            Option(
                {"layers_on_device": 2, "activations": "file", "layer_tile_tokens": None, "vocabulary_chunk": 4096},
                int(6.12 * GIB), int(8.1 * GIB), int(57.1 * GIB), 320.4,
            ),
            Option({"activations": "file"}, int(4.54 * GIB), int(6.1 * GIB), int(57.1 * GIB), 322.0),
        ),
        prices=(
            Option({"activations": "file"}, int(4.54 * GIB), int(6.1 * GIB), int(57.1 * GIB), 322.0),
            Option({"layer_tile_tokens": 512}, int(4.21 * GIB), int(26.35 * GIB), int(36.84 * GIB), 321.7),
            Option({"loss_chunk_tokens": 128}, int(4.54 * GIB), int(26.35 * GIB), int(36.84 * GIB), 316.2),
        ),
        would_fit={
            "longest sequence": "12,288 tokens",
            "largest rank": "256",
            "next larger model": "none that is known",
        },
    )  # fmt: skip


def dense_8b():
    """Llama-3.1-8B on a card with 24 GB, everything on it, measured and calibrated."""
    machine = Machine(
        "NVIDIA GeForce RTX 4090", False, int(23.1 * GIB), int(23.99 * GIB), int(0.52 * GIB), int(57.0 * GIB),
        None, Rates(158e12, 930e9, 25e9), 450.0, True, 1.06, 1.01,
    )  # fmt: skip
    categories = {
        "base": 3.89, "dense buffers": 0.81, "embeddings, head, norms": 1.96, "adapters": 0.235, "gradients": 0.156,
        "optimizer state": 0.157, "boundary activations": 4.125, "layer working set": 1.432, "head and loss": 0.745,
    }  # fmt: skip
    return Plan(
        config=config({"micro_batch_tokens": 4096}),
        machine=machine,
        model="meta-llama/Llama-3.1-8B, 8.03B parameters",
        parameters=8_030_261_248,
        trainable=41_943_040,
        usage=Usage(
            of(categories), {}, {}, "loss", int(0.41 * GIB), {"forward": phase(10**14)}, tokens=16_384, layers=32
        ),
        time=Time(
            {"prologue": 0.01, "forward": 1.19, "turn": 0.21, "backward": 2.86, "optimizer": 0.03},
            {"prologue": "memory", "forward": "compute", "turn": "compute", "backward": "compute"}
            | {"optimizer": "memory"},
        ),
        steps=3_251,
        fixed=frozenset(),
        reasons={
            "micro_batch_tokens": "larger products; more than 4,096 would gain nothing",
            "loss_chunk_tokens": "usual",
        },
        runners_up=(Option({"micro_batch_tokens": 2048}, int(12.9 * GIB), 0, 0, 4.41),),
        prices=(
            Option({"activations": "host"}, int(10.36 * GIB), int(4.13 * GIB), 0, 4.34),
            Option({"micro_batch_tokens": 1024}, int(12.4 * GIB), 0, 0, 4.62),
        ),
        would_fit={"longest sequence": "65,536 tokens", "largest rank": "1,024", "next larger model": "Qwen3-32B"},
    )


def smol_on_cpu():
    """SmolLM2-135M where there is no card and nothing is known but the time of a step."""
    machine = Machine(
        "CPU, 2 threads", True, int(5.9 * GIB), int(7.6 * GIB), 0, int(5.9 * GIB), None, Rates(9e10, 2e10)
    )
    return Plan(
        config=config({}, max_seq_length=128, gradient_accumulation_steps=8),
        machine=machine,
        model="SmolLM2-135M-Instruct, 135M parameters",
        parameters=134_515_008,
        trainable=4_884_480,
        usage=Usage(
            of({"base": 0.051, "embeddings, head, norms": 0.053, "layer working set": 0.093, "adapters": 0.027}),
            {}, {}, "backward of layer 29", 0, {"forward": phase(10**12)}, tokens=1024, layers=30,
        ),
        time=Time({"forward": 0.61, "backward": 2.02}, {"forward": "compute", "backward": "memory"}),
        steps=None,
        fixed=frozenset(),
        reasons={},
        runners_up=(),
        prices=(),
        would_fit={},
    )  # fmt: skip


PLANS = [streamed_70b, dense_8b, smol_on_cpu]
WIDTHS = [80, 88, 100]


def figures_of(text):
    """The numbers with two decimals that end a legend's entry."""
    return [float(n.replace(",", "")) for n in re.findall(r"(?<![\d.])-?[\d,]*\d\.\d\d(?!\d)", text)]


def block(screen, label):
    """The lines of a label, joined, without it."""
    lines = screen.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"{label} "))
    rest = []
    for line in lines[first + 1 :]:
        if not line.startswith("  "):
            break
        rest.append(line.strip())
    return [lines[first].removeprefix(label).strip(), *rest]


# The screen


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_screen_keeps_to_its_width_and_to_one_page_of_plain_text(plan, width, ascii_only):
    lines = plan().screen(width, ascii_only=ascii_only).plain.split("\n")
    assert max(map(len, lines)) <= width and len(lines) <= 42
    assert not [line for line in lines if line != line.rstrip() or re.search(r"[\x00-\x1f\x7f-\x9f]", line)]
    assert not ascii_only or "\n".join(lines).isascii()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("plan", PLANS)
def test_the_categories_add_up_to_the_totals_that_are_shown(plan, width):
    plan = plan()
    screen = plan.screen(width).plain
    head, bar, _, *legend = block(screen, "memory" if plan.machine.is_cpu else "VRAM")
    used, budget, spare = figures_of(head)
    sizes = figures_of(" ".join(legend))
    assert (used, budget) == (round(plan.device_bytes / GIB, 2), round(plan.machine.device / GIB, 2))
    assert used + spare == pytest.approx(budget, abs=1e-9)
    assert sum(sizes) == pytest.approx(round(plan.machine.device_total / GIB, 2), abs=1e-9)
    # Each part of the bar is within what one cell for the small ones moves it by.
    room = width - 11
    assert len(bar) == room
    free = bar.count("·") / room * plan.machine.device_total / GIB
    assert free == pytest.approx(spare, abs=6 / room * plan.machine.device_total / GIB)
    if plan.usage.host:
        (total, _there), parts = figures_of(block(screen, "host RAM")[0])[:2], " ".join(block(screen, "host RAM"))
        assert sum(figures_of(parts.split(":", 1)[1])) == pytest.approx(total, abs=1e-9)


def test_every_part_of_the_bar_has_its_letter_and_its_name():
    head, bar, letters, *legend = block(streamed_70b().screen(100).plain, "VRAM")
    names = re.findall(r"([a-z·░]) ([a-z, ]+?) +([\d.]+)", " ".join(legend))
    assert {("·", "free", "2.88"), ("░", "not free", "0.58"), ("a", "base", "0.88")} <= set(names)
    assert letters.replace(" ", "") == "abcdefgh" == "".join(sorted(sign for sign, *_ in names if sign.isalpha()))
    assert "most in the backward of layer 79" in head
    edges = [i for i in range(1, len(bar)) if bar[i] != bar[i - 1]]
    # A part begins where its letter stands.
    starts = [i for i, letter in enumerate(letters) if letter != " "]
    assert set(starts[1:]) <= set(edges)


def test_the_head_says_the_model_the_step_and_the_machine():
    head = streamed_70b().screen(80).plain.split("\n\n")[0]
    assert head.splitlines() == [
        "meta-llama/Llama-3.3-70B-Instruct, 70.6B parameters; qlora, r 16, 207M trained",
        "NVIDIA GeForce RTX 4060 Laptop GPU, 7.42 of 8.00 GiB free",
        "16,384 tokens a step: 8 x 2,048, in 8 micro-batches of 2,048",
    ]
    assert "8 x 2,048, in 4 micro-batches of 4,096" in str(dense_8b())
    assert "1,024 tokens a step: 8 x 128, in one micro-batch" in str(smol_on_cpu())


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("most", [0, 128, 256, 300, 1024, 4096])
@pytest.mark.parametrize("k, rows", [(8, 1), (4, 2), (1, 8), (3, 5)])
def test_the_micro_batches_are_those_that_the_step_makes(k, rows, most, packing):
    length = 128
    one = torch.zeros(1, rows * length) if packing else torch.zeros(rows, length)
    ids = one.to(torch.int64)
    documents = tuple((ids.shape[1],) for _ in ids)
    names = tuple("row" for _ in ids)
    made = regroup([Batch(ids, ids, ids, None if packing else ids, names, documents) for _ in range(k)], most)
    data = {"path": "rows.jsonl"}
    plan = replace(
        smol_on_cpu(),
        config=Config.model_validate(
            {
                "model": {"model_name_or_path": "m"},
                "data": {"datasets": [data], "max_seq_length": length, "packing": packing},
                "training": {"per_device_train_batch_size": rows, "gradient_accumulation_steps": k},
                "memory": {"micro_batch_tokens": most},
            }
        ),
        usage=replace(smol_on_cpu().usage, tokens=k * rows * length),
    )
    largest = max(batch.input_ids.numel() for batch in made)
    said = f"in {len(made)} micro-batches of {largest:,}" if len(made) > 1 else "in one micro-batch"
    assert f"{k * rows} x {length}, {said}\n" in str(plan)


def test_the_time_is_by_phase_with_what_each_waits_for():
    time = block(streamed_70b().screen(80).plain, "time")
    assert time[0] == "316 s a step, 52 tokens/s, 1,624 steps in 5.9 days, 16 kWh"
    assert re.fullmatch(r"forward +78\.2 s +compute +█+.", time[1])
    assert re.fullmatch(r"backward +231 s +compute +█+", time[2])
    forward, backward = (line.count("█") for line in time[1:3])
    assert forward / backward == pytest.approx(78.2 / 231.4, abs=1 / backward)
    assert time[3] == "prologue 0.31 s, turn 4.87 s, optimizer 1.24 s"


def test_it_says_what_the_figures_rest_on():
    assert "not measured; not calibrated" in str(streamed_70b())
    said = dense_8b().screen(100).plain
    assert "measured rates; calibrated by earlier runs: time x 1.06, memory x 1.01" in said


def test_what_is_not_known_is_left_out():
    screen = str(smol_on_cpu())
    assert not re.search(r"VRAM|host RAM|kWh|steps in|leaner|next best|memory:|None|nan|inf", screen)
    plan = replace(streamed_70b(), machine=replace(streamed_70b().machine, watts=None, disk=None))
    assert "5.9 days\n" in str(plan) and "kWh" not in str(plan) and "36.84 GiB:  base 36.84" in str(plan)


def test_the_choices_can_be_pasted_into_a_recipe(tmp_path):
    plan = streamed_70b()
    (section,) = [group for group in str(plan).split("\n\n") if group.startswith("memory:")]
    recipe = "model: {model_name_or_path: m}\ndata: {datasets: [{path: rows.jsonl}]}\n" + section
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert load_recipe(tmp_path / "recipe.yaml").memory == plan.config.memory
    assert "  layers_on_host: 0         # fixed by the recipe\n" in section
    assert "  activations: host         # 20.25 GiB: the host has them free\n" in section


def test_other_ways_are_shown_beside_the_choice():
    rows = [line.split(maxsplit=5) for line in str(dense_8b()).splitlines() if re.search(r"leaner|next best", line)]
    assert rows[0] == ["leaner", "-4.08", "+4.13", "-", "+0.9%", "activations: host"]
    assert rows[1][2:] == ["-1.54", "-", "-", "+2.6%  micro_batch_tokens: 2048"]
    crowded = str(streamed_70b()).splitlines()
    assert [line for line in crowded if line.endswith("layers_on_device: 2, …")]
    assert "longest sequence: 12,288 tokens" in str(streamed_70b())


def test_a_plan_that_does_not_fit_says_by_how_much():
    plan = replace(streamed_70b(), machine=replace(streamed_70b().machine, device=4 * GIB, host=26 * GIB))
    screen = plan.screen(80).plain
    assert "4.54 GiB of 4.00, 0.54 too much" in screen and "26.35 GiB of 26.00, 0.35 too much" in screen
    assert max(map(len, screen.splitlines())) <= 80


def test_names_from_outside_neither_steer_the_terminal_nor_leave_the_page():
    plan = replace(smol_on_cpu(), model="größe \x1b[2J " + "x" * 120, reasons={"embeddings": "\x07" * 99})
    for ascii_only in (False, True):
        screen = plan.screen(80, ascii_only=ascii_only).plain
        assert "\x1b" not in screen and "\x07" not in screen and r"\x1b[2J" in screen
        assert max(map(len, screen.splitlines())) <= 80
    assert r"gr\xf6" in screen


def test_print_is_the_screen_and_an_output_that_knows_only_ascii_gets_that(monkeypatch):
    plan = dense_8b()
    assert str(plan) == plan.screen(80).plain
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    print(plan)
    assert raw.getvalue().decode("ascii").rstrip("\n") == plan.screen(80, ascii_only=True).plain


def test_rich_prints_it_in_colors_that_change_no_text():
    out = io.StringIO()
    Console(file=out, width=90, force_terminal=True, color_system="truecolor").print(dense_8b())
    assert "\x1b[" in out.getvalue()
    assert re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()).rstrip("\n") == dense_8b().screen(90).plain


# Five lines, JSON


@pytest.mark.parametrize("plan", PLANS)
def test_a_run_begins_with_five_lines(plan):
    lines = plan().lines()
    assert len(lines) == 5 and all(line and "\n" not in line for line in lines)


def test_the_five_lines_say_what_fits_how_long_what_was_chosen_what_limits_and_what_that_rests_on():
    assert streamed_70b().lines() == [
        "4.54 of 7.42 GiB of VRAM, 26.35 of 27.30 GiB of host memory, 36.84 of 413 GiB of disk",
        "316 s a step, 52 tokens/s, 1,624 steps in 5.9 days, 16 kWh",
        "layers_on_device: 0, layers_on_host: 0, embeddings: host, activations: host, adapters: host, "
        "layer_tile_tokens: 1024",
        "limited by computation: forward 78.2 s, backward 231 s; most memory in the backward of layer 79",
        "rates of the data sheet, not measured; not calibrated by a run",
    ]
    assert smol_on_cpu().lines()[0] == "0.22 of 5.90 GiB of host memory"
    assert "forward 0.61 s (compute), backward 2.02 s" in smol_on_cpu().lines()[3]


@pytest.mark.parametrize("plan", PLANS)
def test_the_json_comes_back_as_it_was_and_holds_what_the_plan_does(plan):
    plan = plan()
    told = plan.as_json()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["device_bytes"] == plan.device_bytes and told["fits"] and told["seconds"] == plan.time.seconds
    assert told["memory"] == plan.config.memory.model_dump()
    assert told["usage"]["flops"] == plan.usage.flops and told["usage"]["moved"] == dict(plan.usage.moved)
    assert sum(told["usage"]["device"].values()) == plan.usage.peak_bytes
    assert told["kwh"] is None or told["kwh"] == pytest.approx(plan.kwh)


def test_numbers_that_are_not_finite_are_null_in_json_and_a_word_on_the_screen():
    plan = replace(smol_on_cpu(), time=Time({"forward": math.inf}, {"forward": "disk"}), steps=3)
    told = plan.as_json()
    assert told["seconds"] is told["hours"] is told["machine"]["rates"]["bus"] is None
    json.dumps(told, allow_nan=False)
    assert "forever a step" in str(plan)


def test_the_json_of_a_plan_that_lacks_one_byte_says_that_it_does_not_fit():
    plan = streamed_70b()
    exact = replace(plan, machine=replace(plan.machine, device=plan.device_bytes))
    short = replace(plan, machine=replace(plan.machine, device=plan.device_bytes - 1))
    assert exact.as_json()["fits"] and not short.as_json()["fits"]


# What does not fit


def test_all_shortages_are_told_at_once_with_what_takes_it_and_what_would_fit():
    plan = streamed_70b()
    machine = replace(plan.machine, device=4 * GIB, host=16 * GIB, disk=30 * GIB)
    suggestions = [("memory.layer_tile_tokens: 512", 3.91), ("memory.activations: file", 3.2)]
    assert does_not_fit(plan.usage, machine, suggestions).splitlines() == [
        "needs 4.5 GiB; NVIDIA GeForce RTX 4060 Laptop GPU has 4.0 of 8.0 GiB free",
        "  dense buffers 1.6 | layer working set 1.1 | base 0.9 | context 0.5 | allocator 0.3 | the rest 0.1",
        "needs 26.3 GiB of host memory; 16.0 GiB can be had",
        "  boundary activations 20.2 | embeddings, head, norms 3.9 | adapters 1.2 | optimizer state 0.4 | "
        "gradients 0.4 | staging 0.2",
        "needs 36.8 GiB of disk; 30.0 GiB are free",
        "  base 36.8",
        "  either fits:  memory.layer_tile_tokens: 512 (3.9)   memory.activations: file (3.2)",
    ]


def test_only_what_is_short_is_told_and_a_disk_of_unknown_size_is_not():
    plan = streamed_70b()
    machine = replace(plan.machine, host=16 * GIB, disk=None)
    told = does_not_fit(plan.usage, machine, [("memory.activations: file", 4.54)])
    assert told.startswith("needs 26.3 GiB of host memory") and "VRAM" not in told and "disk" not in told
    assert told.endswith("\n  this fits:  memory.activations: file (4.5)")
    assert does_not_fit(plan.usage, plan.machine) == ""


def test_a_shortage_of_one_byte_does_not_read_as_none():
    plan = streamed_70b()
    first = does_not_fit(plan.usage, replace(plan.machine, device=plan.device_bytes - 1)).splitlines()[0]
    needed, there = re.findall(r"(\d\.\d+)(?: GiB;| of)", first)
    assert float(needed) > float(there)


def test_many_suggestions_stay_in_the_page():
    plan = streamed_70b()
    many = [(f"memory.vocabulary_chunk: {2**i}", 3.5) for i in range(9)]
    told = does_not_fit(plan.usage, replace(plan.machine, device=GIB), many)
    assert "any of these fits:  " in told and max(map(len, told.splitlines())) <= 100 and told.count("(3.5)") == 9


def test_on_a_cpu_it_is_host_memory_that_is_short():
    plan = smol_on_cpu()
    told = does_not_fit(plan.usage, replace(plan.machine, device=GIB // 10))
    assert told.startswith("needs 0.2 GiB; CPU, 2 threads has 0.1 of 7.6 GiB free")


# Figures


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=12), st.integers(0, 300), st.integers(0, 1))
def test_apportioned_figures_add_up_and_are_each_rounded_to_a_neighbour(values, whole, least):
    parts = apportion(values, whole, least)
    if not sum(values):
        assert not any(parts)
        return
    assert sum(parts) == whole
    if not least:
        assert all(
            abs(part - value * whole / sum(values)) < 1 + 1e-6 for part, value in zip(parts, values, strict=True)
        )
    elif whole >= len(values):
        assert all((part > 0) == (value > 0) for part, value in zip(parts, values, strict=True))


@settings(deadline=None)
@given(st.lists(st.text("ab c", min_size=1, max_size=60).map(str.strip).filter(bool)), st.integers(20, 70))
def test_flowing_text_loses_nothing_and_keeps_to_its_width(pieces, width):
    lines = [line.plain for line in flow(pieces, width, ", ")]
    assert max(map(len, lines)) <= width
    assert re.sub(r"[ ,]", "", "".join(lines)) == re.sub(r"[ ,]", "", "".join(pieces))
