"""Tables in a README are what their files give; nobody has to look."""

import json

import pytest

from qlora.bench.readme import PAGES, RESULTS, ROOT, blocks, main, update
from qlora.errors import DataError
from tests.bench import factory

TEXT = """# Title

<!-- bench: cpu.json -->
<!-- /bench -->

Between.

<!-- bench: cpu.json gpu.json columns=method,speed "methods=qlora,hf-qlora" against=hf-qlora -->
old
<!-- /bench -->
    <!-- bench: an example.json -->
End."""

PLACES = [
    pytest.param(name, n, id=f"{name}:{block.start + 1}")
    for name in PAGES
    if (ROOT / name).is_file()
    for n, block in enumerate(blocks((ROOT / name).read_text(encoding="utf-8"), name))
]


@pytest.mark.parametrize(("name", "n"), PLACES)
def test_a_table_is_what_its_files_give(name, n):
    text = (ROOT / name).read_text(encoding="utf-8")
    made = update(text, ROOT / RESULTS, name)
    here, there = (
        each.splitlines()[block.start : block.end + 1] for each in (text, made) for block in [blocks(each, name)[n]]
    )
    assert here == there, "make readme-tables"


@pytest.fixture
def folder(tmp_path):
    factory.cpu().write(tmp_path / "cpu.json")
    factory.gpu().write(tmp_path / "gpu.json")
    return tmp_path


@pytest.fixture
def root(tmp_path):
    """A tree with a README whose tables are right, and no benchmarks/README.md."""
    for name in ("cpu", "gpu"):
        getattr(factory, name)().write(tmp_path / RESULTS / f"{name}.json")
    (tmp_path / "README.md").write_text(update(TEXT, tmp_path / RESULTS))
    return tmp_path


def test_blocks_are_filled_and_all_else_stays(folder):
    made = update(TEXT, folder).splitlines()
    first, second = blocks("\n".join(made))
    assert made[first.start + 1].startswith("| tokens a step | method | tokens/s |")
    assert made[first.end - 1].startswith("(`qlora bench cpu`, in `benchmarks/results/cpu.json`: Some CPU · 2026-11-22")
    assert "| method | tokens/s |" in made[second.start + 1] and "old" not in made
    assert sum(line.startswith("| :---") for line in made[second.start : second.end]) == 2, "one for each file"
    kept = made[: first.start + 1] + made[first.end : second.start + 1] + made[second.end :]
    assert kept == [line for line in TEXT.splitlines() if line != "old"]


def test_what_was_updated_stays_as_it_is(folder):
    made = update(TEXT, folder)
    assert update(made, folder) == made


def test_a_changed_digit_is_found_and_named(root, capsys):
    readme = root / "README.md"
    assert main(["--check"], root) == 0
    right = readme.read_text()
    readme.write_text(right.replace("931 (884 to 987)", "981 (884 to 987)", 1))
    assert main(["--check"], root) == 1
    assert "-| 8 x 128 | qlora | 981" in capsys.readouterr().out
    assert main([], root) == 0
    assert readme.read_text() == right


def test_a_file_that_was_measured_anew_is_found(root):
    faster = factory.results([factory.row("qlora", (0.5,)), factory.row("hf-qlora", (1.0,))])
    faster.write(root / RESULTS / "cpu.json")
    assert main(["--check"], root) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n<!-- bench: none.json -->\n<!-- /bench -->", r"README.md:2: .*none.json: cannot be read"),
        ("<!-- bench: ../cpu.json -->\n<!-- /bench -->", r"README.md:1: `../cpu.json` is not the name of a file"),
        ("<!-- bench: cpu.json colums=step -->\n<!-- /bench -->", r"README.md:1: `colums=step` is not one of columns="),
        ("<!-- bench: cpu.json columns=sped -->\n<!-- /bench -->", r"README.md:1: there is no column `sped`"),
        ("<!-- bench: cpu.json methods='x -->\n<!-- /bench -->", r"README.md:1: .*[Nn]o closing quotation"),
        ("<!-- bench: columns=step -->\n<!-- /bench -->", r"README.md:1: no file is named"),
        ("<!-- bench: -->\n<!-- /bench -->", r"README.md:1: .* is not `<!-- bench: FILE.json -->`"),
        ("<!-- bench cpu.json -->\n<!-- /bench -->", r"README.md:1: .* is not `<!-- bench: FILE.json -->`"),
        ("<!-- bench: cpu.json", r"README.md:1: .* is not `<!-- bench: FILE.json -->`"),
        ("<!-- bench: cpu.json -->\n| 1 |", r"README.md:1: this block has no `<!-- /bench -->`"),
        ("<!-- bench: cpu.json -->\n" * 2 + "<!-- /bench -->", r"README.md:1: .* before the next begins"),
        ("text\n<!-- /bench -->", r"README.md:2: a block ends that has not begun"),
    ],
)
def test_a_block_that_cannot_be_made_is_an_error_with_its_line(folder, text, said):
    with pytest.raises(DataError, match=said):
        update(text, folder)


def test_an_error_is_a_line_and_no_traceback(root, capsys):
    (root / "README.md").write_text("<!-- bench: none.json -->\n<!-- /bench -->\n")
    assert main([], root) == 1
    assert capsys.readouterr().err.startswith("DataError: README.md:1: ")


def test_a_scripts_own_table_is_taken_from_its_file(tmp_path):
    made = {"date": "2026-11-22T08:00:00", "command": "python benchmarks/plans.py", "table": "| a |\n|---|\n| 1 |"}
    (tmp_path / "plans.json").write_text(json.dumps(made))
    text = update("<!-- bench: plans.json -->\n| a |\n| 7 |\n<!-- /bench -->\n", tmp_path)
    assert "| 1 |" in text and "| 7 |" not in text
    assert "(`python benchmarks/plans.py`, in `benchmarks/results/plans.json`: 2026-11-22.)" in text
