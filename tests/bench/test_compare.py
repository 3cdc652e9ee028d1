"""A later run is worse where it is slower or larger beyond the threshold and beyond the noise, and nowhere else."""

import pytest
from rich.console import Console

from qlora.bench.compare import compare, compare_files, lines, share
from qlora.bench.results import Peaks, Results, Row, StepTaken, Trial
from qlora.errors import DataError


def row(seconds=(1.0, 1.0, 1.0), memory=4.0, host=2.0, **changes) -> Row:
    steps = [StepTaken(seconds=s, compute=s, weights=0, data=0, optimizer=0, loss=1.0) for s in seconds]
    values = {"name": "qlora", "method": "qlora", "model": "tiny", "is_shape": True, "r": 16, "optim": "adamw_torch"}
    values |= {"vram": None, "k": 8, "rows": 1, "tokens": 128, "status": "ok", "steps": steps}
    values |= {"peaks": Peaks(allocated=memory, reserved=memory * 1.1, host=host)}
    return Row(**(values | changes))


def run(*rows: Row, **changes) -> Results:
    values = {
        "suite": "s",
        "title": "t",
        "date": "2030-01-01",
        "device": "cuda",
        "device_name": "card",
        "ceiling": None,
    }
    values |= {"environment": {"versions": {"torch": "2.13.0"}, "cpu": "a", "load_average": [0.1]}}
    return Results(**(values | {"settings": {}, "rows": list(rows), "complete": True} | changes))


def only_pair(old: Row, new: Row, threshold=0.05):
    (pair,) = compare(run(old), run(new), threshold).pairs
    return pair


def test_a_run_is_no_worse_than_itself():
    pair = only_pair(row(seconds=(1.0, 1.1, 0.9)), row(seconds=(1.0, 1.1, 0.9)))
    assert (pair.worse, pair.better, pair.memory, pair.verdict) == ((), (), 1, "noise")


def test_slower_beyond_threshold_and_spread_is_a_regression():
    pair = only_pair(row(seconds=(1.0, 1.01, 0.99)), row(seconds=(1.25, 1.24, 1.26)))
    assert pair.worse == ("slower (0.8x)",)
    assert pair.speed is not None
    assert pair.speed.p20 < 0.8 < pair.speed.p80 < 1


def test_slower_beyond_the_threshold_but_within_the_spread_is_noise():
    pair = only_pair(row(seconds=(1.0, 0.7, 1.6)), row(seconds=(1.25, 0.9, 1.9)))
    assert pair.speed is not None
    assert pair.speed.median == pytest.approx(0.8)
    assert (pair.worse, pair.verdict) == ((), "noise")


def test_slower_beyond_the_spread_but_within_the_threshold_is_none():
    pair = only_pair(row(seconds=(1.0, 1.0)), row(seconds=(1.04, 1.04)))
    assert (pair.worse, pair.verdict) == ((), "as before")
    assert only_pair(row(seconds=(1.0, 1.0)), row(seconds=(1.04, 1.04)), threshold=0.02).worse


def test_faster_and_smaller_are_said_and_are_no_regression():
    pair = only_pair(row(), row(seconds=(0.5, 0.5), memory=2.0))
    assert pair.worse == ()
    assert pair.verdict == "faster (2x), less memory (0.5x), less reserved (0.5x)"


@pytest.mark.parametrize(("changes", "said"), [({"memory": 4.4}, "more memory (1.1x)"), ({"host": 3.0}, "more on the")])
def test_more_memory_is_a_regression(changes, said):
    assert only_pair(row(), row(**changes)).worse[0].startswith(said)


def test_on_the_cpu_live_tensors_are_what_is_compared():
    old, new = (row(peaks=Peaks(tensors=gib, host=2.0)) for gib in (1.0, 1.2))
    assert only_pair(old, new).worse == ("more memory (1.2x)",)


@pytest.mark.parametrize("status", ["out of memory", "failed", "late"])
def test_a_row_that_was_ok_and_is_broken_is_a_regression(status):
    broken = row(status=status, steps=[], peaks=None, error="what it said")
    assert only_pair(row(), broken).worse == (f"was ok, is {status}",)
    assert only_pair(broken, broken).worse == ()
    assert only_pair(broken, row()).better == (f"was {status}, is ok",)
    assert any("what it said" in line for line in lines(compare(run(row()), run(broken), 0.05)))


def test_a_peer_that_is_not_installed_here_did_not_get_worse():
    pair = only_pair(row(), row(status="not installed", steps=[], peaks=None))
    assert (pair.worse, pair.verdict) == ((), "not installed")


def test_searches_match_whatever_they_found_and_a_shorter_context_is_a_regression():
    old, new = (row(tokens=n, trials=[Trial(tokens=n, status="ok")]) for n in (8192, 4096))
    pair = only_pair(old, new)
    assert (pair.longest, pair.speed, pair.worse) == (0.5, None, ("shorter context (0.5x)",))


def test_rows_of_one_file_only_are_listed():
    comparison = compare(run(row(), row(tokens=512)), run(row(), row(name="lora")), 0.05)
    assert [old.tokens for old in comparison.only_old] == [512]
    assert [new.name for new in comparison.only_new] == ["lora"]
    said = list(lines(comparison))
    assert "only in the old file: qlora, tiny r=16, 8 x 512" in said
    assert "only in the new file: lora, tiny r=16, 8 x 128" in said


def test_runs_on_unlike_machines_say_so():
    other = {"versions": {"torch": "2.14.0"}, "cpu": "a", "load_average": [7.0]}
    said = compare(run(row()), run(row(), device_name="other card", environment=other), 0.05).apart
    assert said == ["card then, other card now: their ratios compare machines", "torch 2.13.0 then, 2.14.0 now"]


def test_rows_of_one_name_that_did_unlike_work_say_so():
    said = compare(run(row()), run(row(optim="adamw_8bit"), complete=False), 0.05).apart
    assert said == ["the new run was interrupted", "qlora, tiny r=16, 8 x 128: optim adamw_torch then, adamw_8bit now"]


def test_the_exit_status_tells_a_regression(tmp_path):
    console = Console(width=160, record=True)
    for name, results in (("old", run(row())), ("new", run(row(seconds=(2.0, 2.0))))):
        results.write(tmp_path / f"{name}.json")
    assert compare_files(tmp_path / "old.json", tmp_path / "old.json", 0.05, console) == 0
    assert compare_files(tmp_path / "old.json", tmp_path / "new.json", 0.05, console) == 1
    assert "REGRESSION  qlora, tiny r=16, 8 x 128: slower (0.5x)" in console.export_text()
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json"):
        compare_files(tmp_path / "old.json", tmp_path / "bad.json", 0.05, console)


def test_a_threshold_is_a_share():
    assert [share(text) for text in ("5%", "0.05", "12.5%", "0")] == [0.05, 0.05, 0.125, 0.0]
    for text in ("five", "-5%", "5", "100%", ""):
        with pytest.raises(ValueError, match="is not a share"):
            share(text)
