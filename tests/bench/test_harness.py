"""Suites are run to their end: methods take turns, each in its process, and what fails is a row like the others."""

import json
import math

import pytest
import torch

from qlora.bench import harness
from qlora.bench.harness import Side, agreements, run_suite
from qlora.bench.results import Loaded, Peaks, StepTaken, read
from qlora.bench.suites import known, load_suite
from qlora.bench.work import Setup, Suite, Work
from qlora.bench.worker import Failure, _failure
from qlora.errors import MachineError, RecipeError
from qlora.plan.types import Rates
from tests.bench.factory import row
from tests.conftest import SMALL

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    path = tmp_path_factory.mktemp("shapes") / "tiny.json"
    path.write_text(json.dumps(SMALL | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return path


@pytest.fixture(scope="module")
def ran(shape, tmp_path_factory):
    """A suite as it is run, with a method that fails: its results, the file, and what was said."""
    home = tmp_path_factory.mktemp("bench")
    suite = Suite.model_validate(
        {
            "title": "tiny",
            "shape": [str(shape)],
            "methods": [
                {"method": "qlora", "memory": {"layers_on_device": 0, "layers_on_host": 0}},
                {"method": "lora", "name": "misspelt", "memory": {"layer_on_device": 0}},
                "full",
                "hf-qlora",
                "unsloth",
            ],
            "work": ["2x16", "1x24"],  # the smaller one will come first
            "r": [4],
            "steps": 2,
        }
    )
    said = []
    results = run_suite("tiny", suite, CPU, lambda _: home / "out.json", home, said.append)
    return results, home / "out.json", said


def rows_of(results, name):
    return [row for row in results.rows if row.name == name]


def test_every_method_has_a_row_at_every_work_and_the_file_has_them_all(ran):
    results, file, _ = ran
    assert read(file) == results
    assert results.complete
    works = [(row.name, row.k, row.tokens) for row in results.rows]
    assert sorted(works) == sorted((name, k, t) for name in NAMES for k, t in ((2, 16), (1, 24)))


NAMES = ("qlora", "misspelt", "full", "hf-qlora", "unsloth")


def test_a_method_that_fails_is_a_row_with_its_error_and_the_others_report(ran):
    results, _, _ = ran
    for failed in rows_of(results, "misspelt"):
        assert failed.status == "failed"
        assert "layer_on_device" in failed.error or "layer_on_device" in failed.traceback
        assert not failed.steps
    assert {row.status for row in rows_of(results, "unsloth")} == {"not installed"}
    assert {row.status for name in ("qlora", "full", "hf-qlora") for row in rows_of(results, name)} == {"ok"}


def test_every_figure_of_a_row_is_there(ran):
    results, _, _ = ran
    for name in ("qlora", "full", "hf-qlora"):
        for done in rows_of(results, name):
            assert len(done.warm_up) == 2 and len(done.steps) == 2  # one to warm up, one that is counted
            for step in done.steps:
                parts = step.compute + step.weights + step.data + step.optimizer
                assert parts == pytest.approx(step.seconds, rel=1e-6)
                assert min(step.compute, step.optimizer) > 0
            assert done.tokens_per_second.median == pytest.approx(
                done.tokens_per_step * sum(1 / step.seconds for step in done.steps) / 2
            )
            assert done.peaks.tensors > 0 and done.peaks.host > done.peaks.tensors
            assert done.flops > 0
            assert done.loaded.seconds > 0 and done.loaded.trained > 0
            assert all(math.isfinite(loss) for loss in done.losses)
            assert done.losses[-1] < done.losses[0]
    assert results.ceiling > 1e9


def test_only_a_method_whose_layers_come_from_elsewhere_waits_for_them(ran):
    results, _, _ = ran
    assert all(step.weights > 0 for done in rows_of(results, "qlora") for step in done.steps)
    assert all(step.weights == 0 for done in rows_of(results, "hf-qlora") for step in done.steps)


def test_categories_are_those_of_our_own_step_and_sum_to_the_peak(ran):
    results, _, _ = ran
    for done in rows_of(results, "qlora"):
        assert sum(done.peaks.by_category.values()) == pytest.approx(done.peaks.tensors)
        assert done.peaks.by_category["optimizer state"] > 0
    assert all(not done.peaks.by_category for done in rows_of(results, "hf-qlora"))
    assert all(done.peaks.by_category["trained weights"] > 0 for done in rows_of(results, "full"))


def test_what_must_be_computed_is_the_same_for_ours_and_the_stock_stack(ran):
    results, _, _ = ran
    ours, stock = rows_of(results, "qlora"), rows_of(results, "hf-qlora")
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine.model_flops == theirs.model_flops < mine.flops < theirs.flops  # the last layer runs once here


def test_a_smaller_work_comes_first(ran):
    results, _, _ = ran
    assert [done.tokens_per_step for done in rows_of(results, "qlora")] == [24, 32]


def test_each_work_starts_from_the_first_weights_and_the_losses_agree(ran):
    results, _, _ = ran
    assert [agreement.methods for agreement in results.agreements] == [["qlora", "hf-qlora"]] * 2
    assert all(agreement.agree for agreement in results.agreements)
    for name in ("qlora", "full", "hf-qlora"):
        first, second = rows_of(results, name)
        assert second.losses[0] > first.losses[-1]


def test_methods_take_steps_in_turn(ran):
    _, _, said = ran
    steps = [line.split()[0] for line in said if "2 x 16" in line and line.endswith(" s")]
    assert steps == ["qlora", "full", "hf-qlora"] * 3


def test_an_interrupted_run_keeps_what_was_measured(shape, tmp_path):
    suite = Suite(title="tiny", shape=[str(shape)], methods=["lora"], work=["1x8", "1x12"], r=[4], steps=1)

    def interrupted(text: str) -> None:
        if "1 x 12" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite("tiny", suite, CPU, lambda _: tmp_path / "out.json", tmp_path, interrupted)
    kept = read(tmp_path / "out.json")
    assert [(done.tokens, done.status) for done in kept.rows] == [(8, "ok")]
    assert not kept.complete


def test_a_process_that_is_late_or_dies_says_so(shape, tmp_path):
    one = Setup("lora", "lora", str(shape), True, 4, "adamw_torch", "cpu")
    late = Side(one, tmp_path, limit_s=0.1)
    assert late.failure.status == "late" and late.is_hopeless and not late._process.is_alive()
    side = Side(one, tmp_path, limit_s=60)
    side._process.kill()
    assert side.ask(Work(1, 1, 8), "step") is None
    assert (side.failure.status, side.failure.error) == ("out of memory", "its process ended with status -9")


def test_running_out_of_memory_is_told_from_failing():
    full = MachineError("no room")
    full.__cause__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert _failure(full).status == _failure(full.__cause__).status == "out of memory"
    assert _failure(ValueError("shapes differ\nmore")).status == "failed"
    assert _failure(ValueError("shapes differ\nmore")).error == "ValueError: shapes differ"


class FakeSide:
    """Trains up to so many tokens, or models of one name."""

    started = 0

    def __init__(self, setup, directory, limit_s):
        type(self).started += 1
        self.setup, self.failure = setup, None
        self.loaded = Loaded(seconds=1, parameters=1, trained=1, host_peak_gib=1)

    def ask(self, work, kind):
        if self.failure is None and (work.tokens > 40_000 or "large" in self.setup.model):
            self.failure = Failure("out of memory", "OutOfMemoryError: no")
        if self.failure is not None:
            return None
        if kind == "peaks":
            return Peaks(host=1)
        return StepTaken(seconds=1, compute=1, weights=0, data=0, optimizer=0, loss=2)

    def close(self):
        pass


def searched(tmp_path, monkeypatch, **suite):
    monkeypatch.setattr(harness, "Side", FakeSide)
    found = harness.Found("a card", 1 << 34, Rates(flops=1e12, memory=1e11), {})
    monkeypatch.setattr(harness, "_in_a_process", lambda *_: found)
    chosen = Suite.model_validate({"title": "x", "methods": ["qlora"]} | suite)
    return run_suite("x", chosen, CPU, lambda _: tmp_path / "out.json", tmp_path, lambda text: None).rows


def test_the_longest_context_is_found_to_an_eighth_and_every_trial_is_kept(tmp_path, monkeypatch):
    (found,) = searched(tmp_path, monkeypatch, shape=["small"], work=["1x1024", "1x262144"], search="context")
    assert 40_000 * 7 / 8 <= found.tokens <= 40_000 and found.tokens % 1024 == 0
    assert (found.status, found.k) == ("ok", 1)
    tried = {trial.tokens: trial.status for trial in found.trials}
    assert all((status == "ok") == (tokens <= 40_000) for tokens, status in tried.items())
    assert min(tokens for tokens, status in tried.items() if status != "ok") - found.tokens <= found.tokens / 8
    assert len(tried) < 12


def test_a_context_that_never_fits_is_a_row_without_one(tmp_path, monkeypatch):
    (found,) = searched(tmp_path, monkeypatch, shape=["small"], work=["1x65536", "1x262144"], search="context")
    assert found.status == "out of memory" and not found.steps


def test_what_is_larger_than_a_model_that_was_too_large_is_not_tried(tmp_path, monkeypatch):
    shapes = ["small", "large", "larger"]
    rows = searched(tmp_path, monkeypatch, shape=shapes, work=["1x128"], search="model")
    assert [(row.model, row.status) for row in rows] == [
        ("small", "ok"),
        ("large", "out of memory"),
        ("larger", "not tried"),
    ]


def losses(name, values, method=None):
    steps = [StepTaken(seconds=1, compute=1, weights=0, data=0, optimizer=0, loss=loss) for loss in values]
    return row(method or name, name=name).model_copy(update={"warm_up": steps[:1], "steps": steps[1:]})


@pytest.mark.parametrize(
    ("rows", "agree"),
    [
        ([losses("qlora", [2, 1]), losses("hf-qlora", [2.0001, 1.01])], True),
        ([losses("qlora", [2, 1]), losses("hf-qlora", [2.01, 1])], False),  # a token more in the denominator
        ([losses("qlora", [2, 1]), losses("hf-qlora", [2, 1.1])], False),  # another optimizer
        ([losses("qlora", [2, 1]), losses("hf-qlora", [2, math.nan])], False),
        ([losses("lora", [2, 1]), losses("full", [2, 0.5])], True),  # starts alike and goes its own way
        ([losses("lora", [2, 1]), losses("full", [2.1, 0.5])], False),
    ],
)
def test_losses_that_part_are_found(rows, agree):
    (found,) = agreements(rows)
    assert found.agree == agree


def test_a_base_of_another_precision_is_not_compared():
    assert agreements([losses("qlora", [2, 1]), losses("lora", [3, 2])]) == []


@pytest.mark.parametrize("name", known())
def test_our_suites_can_be_read(name):
    loaded, suite = load_suite(name, {})
    assert loaded == name
    assert next(suite.groups("cpu"))


def test_a_suite_with_mistakes_is_refused_with_all_of_them_by_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("title: x\nshape: [small]\nmethods: [qlora, axolotl]\nwork: [8by128]\nstep: 3\n")
    with pytest.raises(RecipeError) as error:
        load_suite(str(path), {})
    said = str(error.value)
    assert f"{path}:3" in said and f"{path}:5" in said
    path.write_text("title: x\nshape: [small]\nmethods: [qlora, qlora]\nwork: [8by128]\n")
    with pytest.raises(RecipeError) as error:
        load_suite(str(path), {})
    said = str(error.value)
    assert f"{path}:3: two methods are named `qlora`" in said and f"{path}:4: `8by128` is not" in said


def test_a_suite_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(RecipeError, match=r"no such suite[\s\S]*cpu"):
        load_suite("cuda", {})


def test_an_interrupted_search_keeps_what_it_found(tmp_path, monkeypatch):
    def interrupted(self, work, kind):
        if work.tokens > 5000:
            raise KeyboardInterrupt
        return FakeSide.ask(self, work, kind)

    monkeypatch.setattr(harness, "Side", type("Interrupted", (FakeSide,), {"ask": interrupted}))
    found = harness.Found("a card", 1 << 34, Rates(flops=1e12, memory=1e11), {})
    monkeypatch.setattr(harness, "_in_a_process", lambda *_: found)
    suite = Suite(title="x", methods=["qlora"], shape=["small"], work=["1x1024", "1x262144"], search="context")
    with pytest.raises(KeyboardInterrupt):
        run_suite("x", suite, CPU, lambda _: tmp_path / "out.json", tmp_path, lambda text: None)
    (kept,) = read(tmp_path / "out.json").rows
    assert (kept.tokens, [trial.tokens for trial in kept.trials]) == (4096, [1024, 2048, 4096])


def test_a_cap_of_a_gpu_that_is_not_there_is_refused(tmp_path):
    suite = Suite(title="x", methods=["qlora"], shape=["small"], work=["1x8"], vram=[8])
    with pytest.raises(MachineError, match="`vram` caps what a process takes of a GPU"):
        run_suite("x", suite, CPU, lambda _: tmp_path / "out.json", tmp_path, lambda text: None)


def test_a_suite_for_gpus_says_so_where_there_is_none(tmp_path):
    said = []

    def never(_):
        raise AssertionError("nothing is to be written")

    results = run_suite("memory", load_suite("memory", {})[1], CPU, never, tmp_path, said.append)
    assert said == ["memory: needs a GPU, and there is none here: nothing was measured"]
    assert results.rows == [] and results.complete
