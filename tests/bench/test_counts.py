"""The step takes what benchmarks/counts.json says, and whatever it takes beyond that is named."""

import copy

import pytest

from qlora.bench import counts
from qlora.errors import DataError
from qlora.model.nf4 import FourBitWeight
from qlora.model.residency import Residency


def off(case: str) -> list[str]:
    """What is not as in the committed file."""
    return counts.differences(counts.read(counts.FILE), counts.take([case]))


@pytest.mark.parametrize("case", counts.CASES)
def test_a_step_takes_what_the_committed_file_says(case):
    assert off(case) == [], f"to accept:  {counts.ACCEPT}"


def test_the_file_holds_the_cases_that_there_are():
    assert counts.read(counts.FILE)["counts"].keys() == counts.CASES.keys()


def broken(case: str) -> list[str]:
    """Likewise, as it is said where the file is of the versions that are installed."""
    return counts.differences(counts.read(counts.FILE) | {"versions": counts.versions()}, counts.take([case]))


def test_a_layer_expanded_twice_is_named(monkeypatch):
    expand = FourBitWeight.expand

    def twice(self, out=None):
        expand(self)
        return expand(self, out)

    monkeypatch.setattr(FourBitWeight, "expand", twice)
    said = broken("qlora")
    assert "qlora: MORE expansions: 35 -> 70" in said  # 7 weights in each of 5 visits
    assert any(line.startswith("qlora: MORE operations") for line in said)


def test_a_layer_fetched_twice_is_named(monkeypatch):
    fetch = Residency._fetch

    def forgetful(self, i):
        self._arriving = None  # what is on its way is not known
        fetch(self, i)

    monkeypatch.setattr(Residency, "_fetch", forgetful)
    (said,) = (line for line in broken("qlora, on file") if "bytes from file" in line)
    assert said == "qlora, on file: MORE bytes from file: 237,568 -> 401,408"  # 40,960 a layer, 4 more


def changed(name: str, factor: float) -> list[str]:
    """What is said of the committed counts with one of them changed."""
    old = counts.read(counts.FILE)
    new = copy.deepcopy(old)
    new["counts"]["lora"][name] = round(new["counts"]["lora"][name] * factor)
    return counts.differences(old, new)


def test_more_is_named_beyond_half_a_percent_and_of_the_peak_beyond_nothing():
    assert changed("allocations", 1.01)[0].startswith("lora: MORE allocations")
    assert changed("bytes", 1.004) == []
    assert changed(counts.PEAK, 1.0001)[0].startswith(f"lora: MORE {counts.PEAK}")


def test_fewer_asks_to_be_written_down():
    assert changed("operations", 0.9)[0].startswith("lora: fewer operations")
    assert changed(counts.PEAK, 0.9999)[0].startswith(f"lora: fewer {counts.PEAK}")


def test_a_peak_says_what_it_grew_by():
    old = counts.read(counts.FILE)
    new = copy.deepcopy(old)
    for name in (counts.PEAK, f"{counts.PEAK} of adapters"):
        new["counts"]["lora"][name] += 1000
    (said,) = counts.differences(old, new)
    assert said.endswith("(adapters +1,000)")


def test_under_other_versions_only_flops_and_peak_are_compared_and_loosely():
    old = counts.read(counts.FILE)
    new = copy.deepcopy(old)
    new["versions"] = {"torch": "0"}
    new["counts"]["lora"] |= {"operations": 10**9, counts.FLOPS: round(old["counts"]["lora"][counts.FLOPS] * 1.01)}
    assert counts.differences(old, new) == []
    new["counts"]["lora"][counts.PEAK] *= 2
    (said,) = counts.differences(old, new)
    assert said.startswith(f"lora: MORE {counts.PEAK}")


def test_the_command_checks_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(counts, "FILE", tmp_path / "counts.json")
    monkeypatch.setattr(counts, "take", lambda: {"versions": {}, "counts": {"full": {"operations": 100}}})
    with pytest.raises(DataError, match="to make it"):
        counts.main(["--check"])
    assert counts.main(["--write"]) == 0
    assert counts.main(["--check"]) == 0
    monkeypatch.setattr(counts, "take", lambda: {"versions": {}, "counts": {"full": {"operations": 102}}})
    assert counts.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert "full: MORE operations: 100 -> 102" in said
    assert f"to accept:  {counts.ACCEPT}" in said
