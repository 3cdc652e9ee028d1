"""The page of result files: whole by itself, safe, and with the plots that its files have points for."""

import re
import sys
from html.parser import HTMLParser

import pytest

from qlora.bench.page import page
from qlora.bench.plots import looks, plots
from qlora.errors import MachineError
from tests.bench import factory

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Checked(HTMLParser):
    """Fails at an element that is not closed where it should be; keeps the elements, ids and links."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.ids, self.links, self.texts = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self._seen(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._seen(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.texts.append(data.strip())

    def _seen(self, tag, attrs):
        self.elements.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.links.append(value)
            assert not name.startswith("on")


def titles(results):
    return [plot.title for plot in plots(results, looks([results]))]


pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def whole():
    return page([factory.cpu(), factory.gpu(), factory.context(), factory.hostile()])


def test_the_page_asks_nothing_of_a_network_and_runs_nothing(whole):
    seen = Checked(whole)
    assert not {"script", "link", "iframe", "img", "image"} & set(seen.elements)
    assert all(link.startswith("#") for link in seen.links)
    assert "@import" not in whole and not re.search(r"url\((?!#)", whole)


def test_words_of_a_file_are_text_wherever_they_stand(whole):
    assert "<script" not in whole.lower()
    # Title, table, plots' labels and legends, notes, facts, settings, traceback: as text all of them are there.
    assert sum("<script>alert(1)</script>" in text for text in Checked(whole).texts) > 20


def test_a_name_with_dollars_is_no_formula(whole):
    assert ">$x_1$ &lt;script&gt;alert(1)&lt;/script&gt;</text>" in whole


def test_ids_differ_and_links_lead_to_them(whole):
    seen = Checked(whole)
    assert len(seen.ids) == len(set(seen.ids))
    assert {link[1:] for link in seen.links} | set(re.findall(r"url\(#(\w+)\)", whole)) <= set(seen.ids)


def test_a_page_of_the_same_files_is_the_same_to_the_byte():
    assert page([factory.gpu()]) == page([factory.gpu()])


def test_each_plot_is_drawn_where_there_are_points_for_it():
    assert titles(factory.gpu()) == [
        "Peak memory: llama-8b",
        "Tokens/s by length: llama-8b",
        "Loss on the same data",
        "Planned against measured",
    ]
    assert titles(factory.context()) == ["Longest context: llama-8b"]


def test_too_few_points_are_no_plot():
    one = factory.row("qlora", (1.0,), warm_up=[])
    assert titles(factory.results([one])) == []
    assert titles(factory.results([factory.without_figures("qlora", "out of memory")])) == []
    assert titles(factory.results([])) == []


def test_one_length_is_no_curve():
    made = factory.results([factory.row("qlora"), factory.row("hf-qlora")])
    assert titles(made) == ["Peak memory: SmolLM2-135M", "Loss on the same data"]


def test_lengths_are_apart_by_micro_batches_where_one_length_comes_with_several():
    works = [(1, 1, 64), (4, 1, 64), (16, 1, 64), (1, 1, 256), (4, 1, 256), (1, 1, 1024)]
    made = factory.results([factory.row(name, work=work) for work in works for name in ("qlora", "hf-qlora")])
    drawn = [plot for plot in plots(made, looks([made])) if plot.title.startswith("Tokens/s")]
    assert ["1 x 64, 1 x 256, 1 x 1024" in plot.svg for plot in drawn] == [True, False]
    assert "4 x 64, 4 x 256" in drawn[1].svg


def test_a_bar_has_a_segment_for_each_category_and_others_are_whole():
    svg = plots(factory.cpu(), looks([factory.cpu()]))[0].svg
    for name in [*factory.CATEGORIES, "not told apart"]:
        assert f">{name}</text>" in svg
    assert svg.count(">0.55</text>") == svg.count(">1.10</text>") == 2


def test_a_method_has_one_colour_in_all_files_and_no_other_has_it():
    results = [factory.cpu(), factory.gpu(), factory.hostile()]
    look = looks(results)
    assert len({each.colour for each in look.values()}) == len({each.marker for each in look.values()}) == len(look)
    assert looks([factory.gpu()])["hf-qlora"].colour == look["hf-qlora"].colour


def test_ink_is_that_of_the_page(whole):
    drawn = "".join(re.findall(r"<svg.*?</svg>", whole, re.DOTALL))
    assert "fill: currentColor" in drawn and "var(--faint)" in drawn
    assert not re.search(r"#000000|#010203|#040506|#ffffff", drawn)


def test_without_matplotlib_a_page_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MachineError, match=r"pip install 'qlora-trainer\[plots\]'"):
        page([factory.cpu()])
