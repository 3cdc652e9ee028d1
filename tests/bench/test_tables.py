"""What the tables of a result file say, and what they leave out."""

import pytest
from rich.console import Console

from qlora.bench.results import Peaks, Predicted
from qlora.bench.tables import COMPACT, compact, grids, markdown, notes, terminal
from qlora.errors import DataError
from tests.bench import factory


def cells(grid):
    """The rows of a grid as {head: cell}."""
    return [dict(zip(grid.heads, row.cells, strict=True)) for row in grid.rows]


def comparison(results):
    return cells(grids(results)[0])


def shown(results, width=200):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal(results))
    return console.export_text()


def test_the_first_method_is_compared_with_each_other_at_the_same_work():
    ours, theirs = comparison(factory.cpu())[:2]
    assert ours["tokens/s, qlora / this"] == ours["memory, qlora / this"] == "1x"
    # Each of their steps takes what ours takes or more, twice over: 2.1 / 1.0, 2.2 / 1.1, 2.3 / 1.2.
    assert theirs["tokens/s, qlora / this"] == "2.00x (1.95 to 2.06)"
    assert theirs["memory, qlora / this"] == "0.50x"
    assert theirs["tokens/s"] == f"{1024 / 2.2:.0f} ({1024 / 2.26:.0f} to {1024 / 2.14:.0f})"


def test_a_difference_within_its_spread_is_called_noise():
    assert comparison(factory.cpu())[6]["tokens/s, qlora / this"] == "1.00x (0.97 to 1.03), noise"


def test_a_named_variant_is_what_the_others_are_compared_with():
    rows = [factory.row("hf-qlora"), factory.row("qlora", name="small")]
    made = factory.results(rows, {"methods": [{"method": "qlora", "name": "small", "memory": {}}, "hf-qlora"]})
    assert "memory, small / this" in grids(made)[0].heads


def test_a_row_without_figures_says_what_became_of_it():
    said = {row["method"]: row["tokens/s"] for row in comparison(factory.cpu())[:5]}
    assert said["full"] == "out of memory"
    assert said["lora"] == "failed: ValueError: no | such"
    assert said["unsloth"] == "not installed"


def test_a_row_that_was_cut_short_keeps_what_it_measured():
    late = factory.row("hf-qlora", (2.0,), status="late", error="no step within 60 s")
    assert comparison(factory.results([factory.row(), late]))[1]["tokens/s"] == "512; late: no step within 60 s"


def test_only_columns_with_something_to_say_are_there():
    cpu, gpu = (grids(results) for results in (factory.cpu(), factory.gpu()))
    assert "VRAM, GiB" not in cpu[0].heads and "live tensors, GiB" in cpu[0].heads
    assert "VRAM, GiB" in gpu[0].heads and "live tensors, GiB" not in gpu[0].heads
    assert [grid.title for grid in cpu] == ["", "Where the time goes"]
    assert not {"HFU", "J/token"} & set(cpu[1].heads)
    alone = grids(factory.results([factory.row()]))
    assert not [head for head in alone[0].heads if "/ this" in head]


def test_what_all_rows_share_is_said_once_below_the_table():
    made = factory.gpu()
    assert not {"model", "r", "optimizer", "of a GPU"} & set(grids(made)[0].heads)
    assert notes(made)[0].text == "All rows: llama-8b, r=16, adamw_torch."
    other = factory.results([*made.rows, factory.row(model="llama-1b", r=64)])
    assert {"model", "r"} <= set(grids(other)[0].heads)


def test_a_file_without_rows_is_a_heading_and_says_so():
    said = markdown([factory.results([])])
    assert "SmolLM2 on a CPU" in said and "Nothing was measured." in said and "| " not in said


def test_utilization_is_of_the_measured_ceiling():
    peaks = Peaks(allocated=1.0, reserved=2.0, host=1.0)
    row = factory.row(seconds=(2.0, 2.0), peaks=peaks, flops=6e14, model_flops=4e14, joules=1024.0)
    said = cells(grids(factory.results([row], ceiling=5e14))[1])[0]
    assert (said["HFU"], said["MFU"], said["J/token"]) == ("60%", "40%", "1.00")
    assert "HFU" not in grids(factory.results([row]))[1].heads


def test_shares_of_a_step_are_of_all_timed_steps():
    assert cells(grids(factory.cpu())[1])[0]["compute / weights / data / optimizer, %"] == "80 / 10 / 0 / 10"


def test_a_plan_stands_beside_what_was_measured():
    row = factory.row(seconds=(2.0,), predicted=Predicted(allocated=0.5, reserved=0.6, seconds=2.2))
    said = cells(grids(factory.results([row]))[-1])[0]
    assert said["memory, GiB"] == "0.50 / 0.55 (-9%)"
    assert said["s a step"] == "2.20 / 2.00 (+10%)"
    assert "reserved, GiB" not in said, "nothing was measured to compare it with"


def test_a_search_compares_contexts_and_not_speeds_at_unlike_lengths():
    rows = comparison(factory.context())
    assert rows[1] == {**dict.fromkeys(rows[1], ""), "method": "hf-qlora", "tokens/s": "out of memory"}
    assert rows[2]["of a GPU"] == "16 GiB" and rows[2]["longest context"] == "40,960"
    assert rows[3]["context, qlora / this"] == "10.00x"
    assert "tokens/s, qlora / this" not in rows[0]


def test_memory_counted_in_unlike_ways_is_not_compared():
    rows = [factory.row(), factory.row("unsloth", peaks=Peaks(allocated=1.0, reserved=1.0, host=1.0))]
    assert "memory, qlora / this" not in comparison(factory.results(rows))[1]


def test_losses_that_agree_are_one_line_and_others_an_alarm():
    made = factory.cpu()
    said = [note for note in notes(made) if "losses" in note.text.lower()]
    assert len(said) == 1 and "8 x 128, 4 x 512" in said[0].text and "3e-05" in said[0].text
    made.agreements[1].agree = False
    said = [note for note in notes(made) if "losses" in note.text.lower()]
    assert [note.alarming for note in said] == [True, False]
    assert "4 x 512" in said[0].text and "8 x 128" not in said[0].text
    assert f"- **{said[0].text}**" in markdown([made])


def test_an_interrupted_run_says_so_first():
    assert notes(factory.results([factory.row()], complete=False))[0].alarming


def test_the_largest_model_of_a_search_is_named():
    rows = [
        factory.row(model="small"),
        factory.row(model="large"),
        factory.row("hf-qlora", model="small"),
        factory.without_figures("hf-qlora", "out of memory", model="large"),
    ]
    said = [note.text for note in notes(factory.results(rows, {"search": "model"}))]
    assert "The largest that trains: qlora large, hf-qlora small." in said


def test_markdown_and_terminal_say_the_same():
    for made in (factory.cpu(), factory.gpu(), factory.context()):
        page, screen = markdown([made]), shown(made)
        for grid in grids(made):
            for row in grid.rows:
                for cell in filter(None, row.cells):
                    assert cell.replace("|", "\\|") in page
                    assert cell.replace(" to ", "-") in screen
        for note in notes(made):
            assert note.text in page


def test_no_name_breaks_a_table_or_brings_html():
    page = markdown([factory.hostile()])
    assert "<script" not in page.replace("    `<script>alert(1)</script>", "")  # an indented line is code
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in tables} == {9, 7}


def test_a_compact_table_compares_with_the_stock_stack():
    lines = compact(factory.cpu(), methods=["qlora", "hf-qlora"]).splitlines()
    assert lines[0] == (
        "| tokens a step | method | tokens/s | of hf-qlora | peak tensor memory, GiB | of hf-qlora | RSS, GiB |"
    )
    assert lines[2] == "| 8 x 128 | qlora | 931 (884 to 987) | 2.00x (1.95 to 2.06) | 0.55 | 0.50x | 0.90 |"
    assert len(lines) == 2 + 4


def test_a_compact_table_has_the_columns_asked_for_in_that_order():
    table = compact(factory.gpu(), columns=["method", "reserved", "speed"])
    assert table.startswith("| method | reserved, GiB | tokens/s |")


@pytest.mark.parametrize(
    "asked",
    [{"columns": ["sped"]}, {"methods": ["hf_qlora"]}, {"against": "hf_qlora"}],
    ids=lambda asked: next(iter(asked)),
)
def test_an_unknown_column_or_method_is_an_error_that_names_those_there_are(asked):
    with pytest.raises(
        DataError, match="there is no .*; there are .*" + ("speed" if "columns" in asked else "unsloth")
    ):
        compact(factory.cpu(), **asked)


def test_every_named_column_can_be_asked_for():
    for name in COMPACT:
        assert compact(factory.cpu(), columns=["method", name]).startswith("| ")
