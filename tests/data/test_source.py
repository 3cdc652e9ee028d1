"""Rows of every layout and file type become conversations; what is wrong is said all at once, with its line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora.config import DataConfig, DatasetConfig
from qlora.data.formats import Conversation, detect
from qlora.data.source import read, read_splits, text_fingerprint
from qlora.errors import DataError

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
LAYOUTS = {
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello."},
    "prompt-completion": {"prompt": "Hi", "completion": "Hello."},
    "text": {"text": "Hi there."},
}


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"question {number}", "completion": f"answer {number}"}


def only(spec: DatasetConfig) -> Conversation:
    [row] = read([spec]).conversations
    return row


def error(*specs: DatasetConfig) -> str:
    with pytest.raises(DataError) as caught:
        read(specs)
    return str(caught.value)


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_format_is_recognised_by_its_fields_and_said(write, layout):
    rows = read([write("a.jsonl", [LAYOUTS[layout]] * 3)])
    [info] = rows.datasets
    assert (info.format, info.detected, info.rows, info.used) == (layout, True, 3, 3)
    if layout == "text":
        assert rows.conversations[0].text == "Hi there."
    else:
        assert rows.conversations[0].messages == TURNS
    assert [row.where for row in rows.conversations] == [f"{info.path}:{line}" for line in (1, 2, 3)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_format_that_the_recipe_names_is_enforced(write, layout):
    other = LAYOUTS["text" if layout != "text" else "alpaca"]
    spec = write("a.jsonl", [LAYOUTS[layout], other], format=layout)
    message = error(spec)
    assert f"{spec.path}:2: `" in message
    assert "got nothing" in message
    assert f"{spec.path}:1:" not in message
    assert not read([write("b.jsonl", [LAYOUTS[layout]], format=layout)]).datasets[0].detected


def test_turns_come_before_other_fields_and_nulls_are_not_fields():
    assert detect({"prompt": "p", "completion": "c", "text": "t", **LAYOUTS["messages"]}) == "messages"
    assert detect({"messages": None, **LAYOUTS["alpaca"], "text": "t"}) == "alpaca"
    assert detect({"conversations": TURNS}) == "messages"
    assert detect({"messages": [{"from": "human", "value": "Hi", "role": None}]}) == "sharegpt"
    assert detect({"question": "q"}) is None
    assert detect(["Hi"]) is None


def test_alpaca_input_follows_the_instruction(write):
    row = only(write("a.jsonl", [{"instruction": "Translate.", "input": "Hei", "output": "Hi"}]))
    assert row.messages[0] == {"role": "user", "content": "Translate.\n\nHei"}


def test_openai_parts_tools_and_names_are_read(write):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "name": "ada", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]},
        {"role": "assistant", "content": "add(2, 2)", "tool_calls": None, "weight": 1},
        {"role": "tool", "tool_call_id": "c1", "content": "4"},
        {"role": "assistant", "content": "4", "tool_calls": []},
    ]
    assert only(write("a.jsonl", [{"messages": turns}])).messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?", "name": "ada"},
        {"role": "assistant", "content": "add(2, 2)"},
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
        {"role": "assistant", "content": "4"},
    ]


def test_fields_that_nothing_reads_are_named(write):
    turns = [{**TURNS[0], "mood": "good"}, TURNS[1]]
    [info] = read([write("a.jsonl", [{"id": 1, "messages": turns, "source": None}])]).datasets
    assert info.unused == ("messages[].mood", "id")


def test_an_unknown_layout_is_an_error_that_names_its_fields(write):
    spec = write("a.jsonl", [{"question": "q", "answer": "a"}])
    message = error(spec)
    assert f"{spec.path}:1: no known format: the row has the fields 'question', 'answer'" in message
    assert "`prompt` and `completion`" in message


# --- bad rows ---------------------------------------------------------------------------------------------------------


def bad_turns(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


USER, ASSISTANT = TURNS


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (bad_turns(USER), "`messages`: expected a turn by the assistant; got user only"),
        (bad_turns(), "`messages`: expected a turn by the assistant; got none"),
        (bad_turns(USER, ASSISTANT, USER), "`messages`: expected the last turn by the assistant; got user's"),
        (
            bad_turns(USER, {**ASSISTANT, "role": "robot"}),
            "`messages[1].role`: expected one of system, user, assistant, ",
        ),
        (bad_turns(USER, {**ASSISTANT, "role": ["user"]}), "got a list, ['user']"),
        (bad_turns(USER, {"role": "assistant"}), "`messages[1].content`: expected text; got nothing"),
        (bad_turns(USER, {**ASSISTANT, "content": 42}), "`messages[1].content`: expected text; got a number, 42"),
        (bad_turns({**USER, "content": ""}, ASSISTANT), "`messages[0].content`: expected text; got empty text"),
        (
            bad_turns({**USER, "content": " \n"}, ASSISTANT),
            "`messages[0].content`: expected text; got only white space",
        ),
        (
            bad_turns({**USER, "content": "\ud83d"}, ASSISTANT),
            "expected Unicode text; got half a surrogate pair at char",
        ),
        (bad_turns("Hi", ASSISTANT), "`messages[0]`: expected a turn; got 'Hi'"),
        (
            bad_turns({**USER, "content": [{"type": "image_url"}]}, ASSISTANT),
            "`messages[0].content[0]`: expected a part of type \"text\"; got 'image_url'",
        ),
        (
            bad_turns(USER, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}),
            "`messages[1].tool_calls`: expected the call written out in `content`; got a list",
        ),
        (bad_turns(USER, {**ASSISTANT, "weight": 0}), "`messages[1].weight`: expected 1, as every assistant turn is l"),
        ({"messages": "Hi"}, "`messages`: expected a list of turns; got 'Hi'"),
        ({"messages": TURNS, "tools": [{"name": "add"}]}, "`tools`: expected no tools, which can't be rendered yet"),
        ({"instruction": "a", "output": ""}, "`messages`: expected a list of turns; got nothing"),
        ([1, 2], "expected an object; got a list, [1, 2]"),
    ],
)
def test_a_bad_row_is_named_with_line_field_expected_and_got(write, row, expected):
    spec = write("a.jsonl", [LAYOUTS["messages"], row])
    message = error(spec)
    assert message.startswith("1 problem in the data\n")
    assert f"{spec.path}:2: {expected}" in message or (f"{spec.path}:2: `messages" in message and expected in message)


def test_all_bad_rows_of_all_files_are_one_error(write):
    one = write("one.jsonl", [pair(1), {"prompt": "p", "completion": 3}, {"prompt": "", "completion": ""}])
    two = write("two.jsonl", [{"text": "a"}, {"text": None}])
    lines = error(one, two).splitlines()
    assert lines == [
        "4 problems in the data",
        f"  {one.path}:2: `completion`: expected text; got a number, 3",
        f"  {one.path}:3: `prompt`: expected text; got empty text",
        f"  {one.path}:3: `completion`: expected text; got empty text",
        f"  {two.path}:2: `text`: expected text; got nothing",
        "  --skip-bad-rows trains without them",
    ]


def test_fifty_problems_are_shown_and_the_rest_counted(write):
    lines = error(write("a.jsonl", [pair(0)] + [{"prompt": "p", "completion": None}] * 1000)).splitlines()
    assert len(lines) == 53
    assert lines[0] == "1,000 problems in the data"
    assert lines[-2:] == ["  ... and 950 more", "  --skip-bad-rows trains without them"]


# --- JSON -------------------------------------------------------------------------------------------------------------

GOOD = json.dumps(LAYOUTS["text"])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a", "text": "b"}', "`text`: expected each key once; got it 2 times"),
        ('{"text": NaN}', "not JSON: expected a value; got NaN"),
        ('{"text": "a"', "not JSON: Expecting ',' delimiter at column 13"),
        ('{"text": "a"} {"text": "b"}', "not JSON: Extra data at column 15"),
        ("[" * 100_000, "not JSON: "),
    ],
)
def test_what_is_not_json_is_named_and_reading_goes_on(write, line, expected):
    spec = write("a.jsonl", f"{GOOD}\n\n{line}\n" + '{"text": 5}\n')
    message = error(spec)
    assert f"{spec.path}:3: {expected}" in message
    assert f"{spec.path}:4: `text`: expected text; got a number, 5" in message


def test_bytes_that_are_not_utf8_are_named(write):
    spec = write("a.jsonl", GOOD.encode() + b'\n{"text": "\xe9t\xe9"}\n')
    assert f"{spec.path}:2: not UTF-8: byte 0xe9" in error(spec)


def test_a_byte_order_mark_and_windows_line_ends_are_read(write):
    spec = write("a.jsonl", b"\xef\xbb\xbf" + f"{GOOD}\r\n{GOOD}\r\n".encode())
    assert [row.text for row in read([spec]).conversations] == ["Hi there."] * 2


def test_a_line_ends_at_a_newline_only(write):
    spec = write("a.jsonl", json.dumps({"text": "one\u2028two"}, ensure_ascii=False) + "\n")
    assert only(spec).text == "one\u2028two"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_json_list_has_the_line_of_each_row(write, name):
    spec = write(name, json.dumps([pair(1), pair(2), pair(3)], indent=1))
    assert [row.where for row in read([spec]).conversations] == [f"{spec.path}:{line}" for line in (2, 6, 10)]


def test_json_lines_in_a_json_file_are_read(write):
    assert len(read([write("a.json", f"{GOOD}\n{GOOD}\n")]).conversations) == 2


def test_bad_rows_of_a_json_list_are_named_and_reading_goes_on(write):
    spec = write("a.json", '[\n{"text": "a"},\n{"text": 1, "text": 2},\n{"text": 7}\n{"text": "b"}\n]')
    assert error(spec).splitlines()[1:] == [
        f"  {spec.path}:3: `text`: expected each key once; got it 2 times",
        f"  {spec.path}:5: not JSON: expected ',' or ']' after a row; got '{{\"text\": \"b\"}}\\n]'",
        f"  {spec.path}:4: `text`: expected text; got a number, 7",
    ]


@pytest.mark.parametrize("content", ["[\n{},\n", '[\n{"text": "a"}\n', "[", '[{"text": "a"},'])
def test_a_json_list_that_is_cut_off_is_an_error(write, content):
    assert "not JSON" in error(write("a.json", content, format="text"))


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")).filter(str.strip)


@given(st.lists(st.fixed_dictionaries({"text": ANY_TEXT}), min_size=1))
def test_every_row_comes_back_as_it_was_written(tmp_path_factory, rows):
    path = Path(tmp_path_factory.mktemp("rows"))
    for name, text in (("a.jsonl", "\n".join(map(json.dumps, rows))), ("b.json", json.dumps(rows, ensure_ascii=False))):
        (path / name).write_bytes(text.encode())
        found = read([DatasetConfig(path=str(path / name))]).conversations
        assert [row.text for row in found] == [row["text"] for row in rows]


# --- CSV, Parquet, text, directories, the Hub -------------------------------------------------------------------------


def test_csv_cells_stay_text_and_rows_have_their_first_line(write):
    spec = write("a.csv", 'prompt,completion,n\n42,null,1\n"two\nlines",NaN,2\n"a ""quote""",é,3\n')
    rows = read([spec]).conversations
    said = [tuple(turn["content"] for turn in row.messages) for row in rows]
    assert said == [("42", "null"), ("two\nlines", "NaN"), ('a "quote"', "é")]
    assert [row.where for row in rows] == [f"{spec.path}:{line}" for line in (2, 3, 5)]


def test_tab_separated_values_are_read(write):
    assert only(write("a.tsv", "prompt\tcompletion\nHi, you\tHello.\n")).messages[0]["content"] == "Hi, you"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("prompt,completion\na,b\nc\n", "3: expected 2 cells, as in the header; got 1"),
        ("prompt,prompt\na,b\n", "1: expected different column names; got prompt, prompt"),
        ('prompt,completion\na,"b\n', "2: not CSV: unexpected end of data"),
        (b"prompt,completion\na,\xff\n", "2: not UTF-8: byte 0xff"),
        ("prompt,completion\na,\n", "2: `completion`: expected text; got empty text"),
    ],
)
def test_bad_csv_is_named(write, content, expected):
    spec = write("a.csv", content)
    assert f"{spec.path}:{expected}" in error(spec)


def test_a_long_csv_cell_is_read(write):
    assert len(only(write("a.csv", "text\n" + "x" * 300_000 + "\n")).text) == 300_000


def test_parquet_rows_are_numbered_and_their_nulls_are_no_fields(tmp_path):
    path = tmp_path / "a[1].parquet"  # a name that readers with glob patterns don't find
    turns = [{**USER, "name": None, "tool_calls": None}, {**ASSISTANT, "name": "bot", "tool_calls": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns, "text": None}] * 2), path)
    rows = read([DatasetConfig(path=str(path))])
    assert rows.conversations[1] == Conversation(
        messages=[USER, {**ASSISTANT, "name": "bot"}], where=f"{path}:2", format="messages"
    )
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path}:1: not readable as Parquet" in error(DatasetConfig(path=str(path)))


def test_a_txt_file_is_one_document(write):
    spec = write("a.txt", "One.\n\nTwo.\n")
    assert only(spec) == Conversation(text="One.\n\nTwo.\n", where=f"{spec.path}:1", format="text")
    assert "not UTF-8" in error(write("b.txt", b"caf\xe9"))


def test_a_directory_is_read_whole_and_in_order(write, tmp_path):
    write("d/b.jsonl", [pair(2)])
    write("d/a/c.csv", "prompt,completion\nquestion 1,answer 1\n")
    write("d/README.md", "no rows")
    write("d/.cache/x.jsonl", [pair(3)])
    rows = read([DatasetConfig(path=str(tmp_path / "d"))]).conversations
    assert [row.messages[0]["content"] for row in rows] == ["question 1", "question 2"]


def test_a_directory_with_a_train_file_does_not_train_on_its_test_file(write, tmp_path):
    write("d/train-0.jsonl", [pair(1)])
    write("d/test.jsonl", [pair(2), pair(3)])
    write("d/trainers.jsonl", [pair(4)])

    def count(split: str) -> int:
        return len(read([DatasetConfig(path=str(tmp_path / "d"), split=split)]).conversations)

    assert (count("train"), count("test")) == (1, 2)
    assert "no file of split 'dev' among test.jsonl" in error(DatasetConfig(path=str(tmp_path / "d"), split="dev"))


def test_a_name_that_is_no_path_is_read_from_the_hub(monkeypatch):
    asked: list[Any] = []

    def load_dataset(path: str, name: str | None, *, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        return datasets.Dataset.from_list([pair(1), pair(2)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read([DatasetConfig(path="someone/some-set", name="main", split="train[:2]")])
    assert asked == [("someone/some-set", "main", "train[:2]")]
    assert [row.where for row in rows.conversations] == ["someone/some-set:1", "someone/some-set:2"]


def test_a_hub_that_does_not_answer_is_an_error_that_also_speaks_of_the_path(monkeypatch):
    def load_dataset(path: str, name: str | None, *, split: str) -> datasets.Dataset:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = error(DatasetConfig(path="someone/some-set"))
    assert "someone/some-set: no such file or directory" in message
    assert "as a dataset on the Hub: no route" in message


def test_a_missing_file_is_an_error_with_the_nearest_names(write, tmp_path):
    spec = write("orders_train.jsonl", [pair(1)])
    message = error(DatasetConfig(path=str(tmp_path / "order_train.jsonl")))
    assert "no such file or directory" in message
    assert f"did you mean {spec.path}?" in message
    assert f"there is no directory {tmp_path / 'dta'}" in error(DatasetConfig(path=str(tmp_path / "dta" / "a.jsonl")))


@pytest.mark.parametrize(
    ("name", "content", "fields", "expected"),
    [
        ("a.jsonl", "\n", {}, "no rows"),
        ("a.json", "[]", {}, "no rows"),
        ("a.csv", "prompt,completion\n", {}, "no rows"),
        ("a.xlsx", "x", {}, "can't read .xlsx; .jsonl, "),
        ("a.jsonl", GOOD, {"split": "test"}, "a file is all `train`"),
        ("a.jsonl", GOOD, {"name": "main"}, "`name` chooses a configuration of a Hub dataset"),
    ],
)
def test_what_has_no_rows_is_an_error(write, name, content, fields, expected):
    assert expected in error(write(name, content, **fields))


def test_a_directory_without_data_is_an_error(tmp_path):
    assert "a directory without .jsonl" in error(DatasetConfig(path=str(tmp_path)))


# --- weights and held-out rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "used"), [(1, 10), (2, 20), (0.5, 5), (2.5, 25), (0.04, 0)])
def test_weight_is_how_often_rows_come_in_an_epoch(write, weight, used):
    always, spec = write("a.jsonl", [pair(99)]), write("b.jsonl", [pair(n) for n in range(10)], weight=weight)
    rows = read([always, spec])
    assert rows.datasets[1].used == used
    times = Counter(row.where for row in rows.conversations if row.where.startswith(spec.path))
    assert sum(times.values()) == used
    assert set(times.values()) <= {int(weight), int(weight) + 1}


def test_a_sample_follows_from_the_seed(write):
    spec = write("a.jsonl", [pair(n) for n in range(100)], weight=0.5)
    assert read([spec], seed=1) == read([spec], seed=1)
    assert read([spec], seed=1) != read([spec], seed=2)
    twice = read([spec, spec], seed=1).conversations
    assert [row.where for row in twice[:50]] != [row.where for row in twice[50:]]


def test_a_weight_that_leaves_no_row_is_an_error(write):
    assert "no rows to train on" in error(write("a.jsonl", [pair(1)], weight=0.1))


def sides(spec: DatasetConfig, fraction: float, seed: int = 0) -> tuple[list[str], list[str]]:
    train, held_out = read_splits(DataConfig(datasets=[spec], eval_fraction=fraction), seed=seed)
    texts = [row.messages[0]["content"] for row in train.conversations]
    return texts, [row.messages[0]["content"] for row in held_out.conversations]


def test_a_fraction_is_held_out_and_never_trained_on(write):
    train, held_out = sides(write("a.jsonl", [pair(n) for n in range(100)]), 0.2)
    assert (len(train), len(held_out)) == (80, 20)
    assert not set(train) & set(held_out)


def test_what_is_held_out_follows_from_the_seed_and_not_from_the_order(write):
    rows = [pair(n) for n in range(100)]
    held_out = set(sides(write("a.jsonl", rows), 0.2)[1])
    assert held_out == set(sides(write("b.jsonl", rows[::-1]), 0.2)[1])
    assert held_out != set(sides(write("a.jsonl", rows), 0.2, seed=1)[1])


def test_rows_of_equal_text_are_held_out_together(write):
    rows = [{"prompt": f"Question  {n % 10}", "completion": "A" if n < 10 else "a "} for n in range(20)]
    train, held_out = sides(write("a.jsonl", rows), 0.3)
    assert len(held_out) == 6
    assert not set(train) & set(held_out)


def test_held_out_rows_are_not_repeated_by_weight(write):
    spec = write("a.jsonl", [pair(n) for n in range(10)], weight=3)
    train, held_out = sides(spec, 0.2)
    assert (len(train), len(held_out)) == (24, 2)
    assert not set(train) & set(held_out)


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_both_sides_have_a_row(write, fraction):
    train, held_out = sides(write("a.jsonl", [pair(1), pair(2), pair(3)]), fraction)
    assert train
    assert held_out


def test_one_row_can_not_be_split(write):
    with pytest.raises(DataError, match="at least two different rows"):
        sides(write("a.jsonl", [pair(1), pair(1)]), 0.5)


def test_held_out_files_are_read_apart_and_their_problems_with_the_others(write):
    train, held_out = write("a.jsonl", [pair(1)]), write("b.jsonl", [pair(2), pair(3)])
    found = read_splits(DataConfig(datasets=[train], eval_datasets=[held_out]))
    assert [len(rows.conversations) for rows in found] == [1, 2]
    bad, worse = write("a.jsonl", [pair(1), {}]), write("b.jsonl", [pair(1), {}])
    with pytest.raises(DataError, match=r"4 problems[\s\S]*a\.jsonl:2[\s\S]*b\.jsonl:2"):
        read_splits(DataConfig(datasets=[bad], eval_datasets=[worse]))


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_texts_are_the_same_but_for_case_space_and_unicode_spelling():
    def text(content: str) -> str:
        return text_fingerprint(Conversation(text=content))

    assert text("Caf\u00e9  au\nlait ") == text("cafe\u0301 AU lait")
    assert text("au lait") != text("aulait")


def test_the_fingerprint_of_data_is_that_of_its_content(write):
    rows = [pair(1), pair(2)]
    fingerprint = read([write("a.jsonl", rows)]).fingerprint
    assert fingerprint == read([write("elsewhere/b.json", json.dumps(rows, indent=2))]).fingerprint
    assert fingerprint != read([write("c.jsonl", rows[::-1])]).fingerprint
    assert fingerprint != read([write("d.jsonl", [pair(1), pair(3)])]).fingerprint
