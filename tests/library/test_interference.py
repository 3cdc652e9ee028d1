"""What adapters do to each other, by their weights: as the dense changes have it; and the report on it."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlora.errors import AdapterError
from qlora.library import interference as module
from qlora.library.combine import Combination, Share
from qlora.library.interference import Overlap, Report, Score, grouped, interference, overlap
from qlora.library.picture import draw
from tests.library.test_combine import made  # noqa: F401 - the fixture


def factors(seed, r=4, inputs=48, outputs=64, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, inputs, generator=generator), torch.randn(outputs, r, generator=generator), scale


@pytest.mark.parametrize("piece", [1, 100, 1 << 22])
def test_the_figures_are_those_of_the_dense_changes_however_small_the_pieces(piece, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", piece)
    one, two = factors(0), factors(1, r=6, scale=2.0)
    found = overlap("w", one, two, (0.7, -0.3))
    D1, D2 = (w * s * B.double() @ A.double() for (A, B, s), w in ((one, 0.7), (two, -0.3)))
    least = torch.minimum(D1.abs(), D2.abs())
    assert found.sign_conflict == pytest.approx((least[D1.sign() != D2.sign()].sum() / least.sum()).item(), rel=1e-5)
    # What cancels is what the sum lacks.
    lost = (D1.abs() + D2.abs() - (D1 + D2).abs()).sum().item()
    assert 2 * found.conflict == pytest.approx(lost, rel=1e-4)
    assert found.cosine == pytest.approx(((D1 * D2).sum() / D1.norm() / D2.norm()).item(), abs=1e-9)
    for common, dim in ((found.writes, 0), (found.reads, 1)):
        U, V = (torch.linalg.svd(D if dim == 0 else D.T)[0][:, :r] for D, r in ((D1, 4), (D2, 6)))
        assert common == pytest.approx(((U.T @ V).square().sum() / 4).item(), abs=1e-9)


def test_agreement_opposition_and_ignorance_are_0_1_and_half():
    one = factors(0)
    alike, opposed = overlap("w", one, one), overlap("w", one, one, (1.0, -2.0))
    assert (alike.sign_conflict, opposed.sign_conflict) == (0, 1)
    assert [alike.cosine, opposed.cosine, alike.writes, alike.reads] == pytest.approx([1, -1, 1, 1])
    strange = [
        overlap("w", factors(2 * n, inputs=400, outputs=300), factors(2 * n + 1, inputs=400, outputs=300))
        for n in range(8)
    ]
    together = grouped(strange, lambda _: "all")["all"]
    assert together.chance == pytest.approx((4 / 300, 4 / 400))
    # Half and chance, within what eight pairs scatter.
    assert together.sign_conflict == pytest.approx(0.5, abs=0.02)
    assert (together.writes, together.reads) == pytest.approx(together.chance, rel=0.5)


def test_spaces_are_those_of_the_change_not_of_directions_that_it_does_not_use():
    A, B, scale = factors(0)
    idle = torch.cat([A, torch.randn(1, 48)]), torch.cat([B, torch.zeros(64, 1)], 1), scale
    assert overlap("w", (A[:2], B[:, :2], scale), idle).reads == pytest.approx(1)
    nothing = overlap("w", (A, torch.zeros_like(B), scale), idle)
    assert (nothing.sign_conflict, nothing.writes, nothing.cosine) == (None, None, None)


def test_a_group_has_the_shares_of_all_its_entries():
    parts = [Overlap(f"layers.{n}.q", 1.0 + n, 0.5 * n, 0.2 * n, None, (0.1, 0.2), 0.0) for n in (0, 1, 10)]
    found = grouped(parts, lambda each: each.name.split(".")[1])
    assert list(found) == ["0", "1", "10"] and found["10"].sign_conflict == 5 / 11
    every = grouped(parts, lambda _: "all")["all"]
    assert every.sign_conflict == 5.5 / 14 and every.writes == pytest.approx(2.2 / 3) and every.reads is None


def test_adapters_that_never_meet_are_an_error(made):  # noqa: F811
    a, b = made("a", 0, target_modules=["q_proj"]), made("b", 1, target_modules=["v_proj"])
    with pytest.raises(AdapterError, match="a and b are on no weight together"):
        interference(Share("a", a), Share("b", b))


# --- the report


@pytest.fixture
def report(made):  # noqa: F811
    """Two adapters, one with a name that XML would trip over, that were combined and measured."""
    shares = (Share("a", made("a", 0), 0.6), Share("b<&>", made("b", 1, r=8), 0.4))
    found = Report.of(shares, {"a": "1", "b<&>": "2"}, combination=Combination(shares, "ties", 0.5, 8, None), away=0.25)
    own, other = Score(0.1, 0.8), Score(2.0, 0.0)
    rows = {"base": other, "a": own, "b<&>": other, "combined": Score(0.105, 0.75)}
    return replace(found, scores={"a": rows, "b<&>": rows | {"a": other, "b<&>": own, "combined": Score(0.12, 0.7)}})


def test_a_task_that_loses_more_than_the_thresholds_is_warned_of(report):
    assert report.warnings() == [
        "b<&> loses 10.0 points of exact match, 80.0% to 70.0%",
        "b<&>: held-out loss 0.1000 to 0.1200, 1.2x",
    ]
    assert not replace(report, scores={"a": report.scores["a"]}).warnings()  # 5 points, and 5% of the loss
    counted_not = {name: Score(score.loss, None) for name, score in report.scores["b<&>"].items()}
    assert replace(report, scores={"b<&>": counted_not}).warnings() == ["b<&>: held-out loss 0.1000 to 0.1200, 1.2x"]


def test_it_fits_a_terminal_and_a_page(report):
    lines = report.lines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == "a x 0.6 + b<&> x 0.4, by ties (density 0.5, rank 8)"
    assert any(line.split() == ["q_proj", *line.split()[1:]] and len(line.split()) == 5 for line in lines)
    assert "| a | 0.0%, 2 | 80.0%, 0.1 | 0.0%, 2 | 75.0%, 0.105 |" in report.markdown("p.svg")
    assert '"sign_conflict"' in report.to_json() and str(report.shares[0].path) not in report.to_json()


def test_the_picture_is_one_of_its_own_with_a_cell_for_each_layer_and_kind(report):
    svg = draw(report)
    tree = ElementTree.fromstring(svg)  # well-formed, whatever names there are
    places = {(r.get("x"), r.get("y")) for r in tree.iter("{http://www.w3.org/2000/svg}rect") if r.get("width")}
    assert len(places) == 1 + 3 * (3 * 2 + 1) + 2 * 4  # the card, three maps with a scale each, bars
    texts = " ".join(tree.itertext())
    assert "b<&>" in texts and "70.0%" in texts and "k_proj" not in texts and "q_proj" in texts
    assert "prefers-color-scheme:dark" in svg and "href" not in svg and "script" not in svg
    assert "held-out" not in draw(replace(report, scores={}))


def test_the_picture_of_three_adapters_is_of_their_pairs_mean(made):  # noqa: F811
    found = Report.of([Share(name, made(name, n)) for n, name in enumerate("abc")], {})
    assert len(found.overlaps) == 3 and "mean of 3 pairs" in draw(found)
    assert all(Path(share.path).is_dir() for share in found.shares)
