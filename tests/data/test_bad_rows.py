"""A file with everything wrong that can be wrong: told once, line by line, and trained without where that is wanted."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora import cli
from qlora.config import DataConfig, DatasetConfig
from qlora.data import files
from qlora.data.files import read_rows
from qlora.data.formats import conversation
from qlora.data.prepare import prepare
from qlora.data.problems import Problems
from qlora.data.source import read_splits
from qlora.errors import DataError
from tests.data.conftest import CHATML, IM, build_tokenizer
from tests.tiny import chat_model, recipe_text

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
# Refuses turns at rendering, as templates of models without tools do.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{% endfor %}"
    + CHATML
)


def turns(*messages: Any, **fields: Any) -> bytes:
    return json.dumps({"messages": list(messages), **fields}).encode()


GOOD = turns(USER, ASSISTANT)
DEFECTS: dict[str, bytes] = {
    "not JSON": b"Hello there",
    "truncated": GOOD[:-9],
    "truncated in a string": GOOD[:30],
    "two objects": GOOD + GOOD,
    "single quotes": b"{'messages': []}",
    "a mark inside the file": b"\xef\xbb\xbf" + GOOD,
    "Latin-1": GOOD.replace(b"Hello", b"Hell\xf6"),
    "a control character": GOOD.replace(b"Hello", b"Hel\x01lo"),
    "a bare NUL": GOOD.replace(b"Hello", b"Hel\x00lo"),
    "a NUL escape": GOOD.replace(b"Hello", b"Hel\\u0000lo"),
    "half a surrogate pair": GOOD.replace(b"Hello", b"Hel\\ud83d"),
    "other half of one": GOOD.replace(b'"Hi"', b'"\\udc00"'),
    "a key twice": b'{"messages": [], ' + GOOD[1:],
    "a key twice in a turn": GOOD.replace(b'"role": "user"', b'"role": "user", "role": "user"'),
    "NaN": turns(USER, ASSISTANT, score=float("nan")),
    "Infinity": turns(USER, ASSISTANT, score=float("-inf")),
    "nested too deep": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number too long": GOOD[:-1] + b', "n": ' + b"9" * 5000 + b"}",
    "too large": GOOD.replace(b"Hello", b"x" * (10 << 20)),
    "a list": b"[1, 2]",
    "a number": b"42",
    "text": b'"Hi"',
    "null": b"null",
    "true": b"true",
    "an empty object": b"{}",
    "another layout": b'{"prompt": "Hi", "completion": "Hello."}',
    "no turns": turns(),
    "turns are null": b'{"messages": null}',
    "turns are text": b'{"messages": "Hi"}',
    "turns are an object": b'{"messages": {"0": "Hi"}}',
    "a turn is text": turns("Hi", ASSISTANT),
    "a turn is null": turns(None, ASSISTANT),
    "an unknown role": turns({**USER, "role": "robot"}, ASSISTANT),
    "a role that is a number": turns({**USER, "role": 1}, ASSISTANT),
    "a role that is an object": turns({**USER, "role": {}}, ASSISTANT),
    "no role": turns({"content": "Hi"}, ASSISTANT),
    "no content": turns(USER, {"role": "assistant"}),
    "content is a number": turns(USER, {**ASSISTANT, "content": 42}),
    "content is true": turns(USER, {**ASSISTANT, "content": True}),
    "content is an object": turns(USER, {**ASSISTANT, "content": {"text": "Hello."}}),
    "empty": turns({**USER, "content": ""}, ASSISTANT),
    "white space": turns(USER, {**ASSISTANT, "content": " \n\t"}),
    "the user only": turns(USER),
    "the user last": turns(USER, ASSISTANT, USER),
    "a picture": turns({**USER, "content": [{"type": "image_url", "image_url": "x"}]}, ASSISTANT),
    "a call": turns(USER, {**ASSISTANT, "tool_calls": [{"id": "1", "function": {"name": "f"}}]}),
    "tools": turns(USER, ASSISTANT, tools=[{"name": "f"}]),
    "a weight": turns(USER, {**ASSISTANT, "weight": 0}),
    "a name that is a number": turns({**USER, "name": 5}, ASSISTANT),
    "the template refuses": turns(USER, {"role": "tool", "content": "4"}, ASSISTANT),
}
LINES = {kind: 7 + 19 * number for number, kind in enumerate(DEFECTS)}


@pytest.fixture
def bad_file(tmp_path) -> Path:
    """1,000 rows, 50 of them wrong, each in its own way."""
    rows = [turns({**USER, "content": f"Question {number}?"}, ASSISTANT) for number in range(1, 1001)]
    for kind, line in LINES.items():
        rows[line - 1] = DEFECTS[kind]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(rows) + b"\n")
    return path


@pytest.mark.parametrize("command", ["data", "train"])
def test_fifty_defects_in_a_thousand_rows_are_each_named_by_line_in_one_error(
    command, bad_file, checkpoint, tmp_path, capsys
):
    recipe = tmp_path / "recipe.yaml"
    data = {"datasets": [{"path": str(bad_file)}], "chat_template": TEMPLATE}
    recipe.write_text(recipe_text(chat_model(checkpoint), tmp_path, data=data))
    assert cli.main([command, str(recipe)]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    title, *lines = said.splitlines()
    assert title == "DataError: 50 problems in the data"
    named = [re.match(rf"  {re.escape(str(bad_file))}:(\d+): \S", line) for line in lines]
    assert sorted(int(match[1]) for match in named if match) == sorted(LINES.values())
    assert len(DEFECTS) == 50
    assert lines[-1] == "  --skip-bad-rows trains without them"


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD_TURNS: dict[str, list[Any]] = {
    "a turn is a number": [7, ASSISTANT],
    "a turn is true": [USER, True],
    "a turn is a list": [USER, [ASSISTANT]],
    "turns in a turn": [{"messages": [USER, ASSISTANT]}],
    "turns in turns": [[USER, ASSISTANT]],
    "an empty turn": [{}, ASSISTANT],
    "all null": [USER, {"role": None, "content": None}],
    "no role": [{"content": "Hi"}, ASSISTANT],
    "a role that is a list": [USER, {**ASSISTANT, "role": ["assistant"]}],
    "a role that is true": [{**USER, "role": True}, ASSISTANT],
    "an empty role": [{**USER, "role": ""}, ASSISTANT],
    "a role in capitals": [{**USER, "role": "USER"}, ASSISTANT],
    "from and value": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
    "from and value after role and content": [USER, {"from": "gpt", "value": "Hello."}],
    "a role and a value": [USER, {"role": "assistant", "value": "Hello."}],
    "a null content": [USER, {**ASSISTANT, "content": None}],
    "an empty list of parts": [USER, {**ASSISTANT, "content": []}],
    "parts of text": [USER, {**ASSISTANT, "content": ["Hello."]}],
    "parts that are null": [USER, {**ASSISTANT, "content": [None]}],
    "parts that are lists": [USER, {**ASSISTANT, "content": [[{"type": "text", "text": "Hello."}]]}],
    "a part of no type": [USER, {**ASSISTANT, "content": [{"text": "Hello."}]}],
    "a part whose type is a list": [USER, {**ASSISTANT, "content": [{"type": ["text"], "text": "Hello."}]}],
    "a part of no text": [USER, {**ASSISTANT, "content": [{"type": "text"}]}],
    "a part of an object": [USER, {**ASSISTANT, "content": [{"type": "text", "text": {"value": "Hello."}}]}],
    "a part with a NUL": [USER, {**ASSISTANT, "content": [{"type": "text", "text": "a\0"}]}],
    "a picture after text": [{**USER, "content": [{"type": "text", "text": "Hi"}, {"type": "image"}]}, ASSISTANT],
    "the system only": [{"role": "system", "content": "Be kind."}],
    "the system and the user": [{"role": "system", "content": "Be kind."}, USER],
    "a tool last": [USER, ASSISTANT, {"role": "tool", "content": "4"}],
    "calls and no content": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
    "calls that are text": [USER, {**ASSISTANT, "tool_calls": "f()"}],
    "a call of old": [USER, {**ASSISTANT, "function_call": {"name": "f", "arguments": "{}"}}],
    "a weight of half": [USER, {**ASSISTANT, "weight": 0.5}],
    "a weight that is text": [USER, {**ASSISTANT, "weight": "x"}],
    "a weight that is a list": [USER, {**ASSISTANT, "weight": [1]}],
    "a name that is a list": [{**USER, "name": ["Ada"]}, ASSISTANT],
    "a name with half a surrogate pair": [{**USER, "name": "\ud83d"}, ASSISTANT],
    "thoughts that are a list": [USER, {**ASSISTANT, "reasoning_content": ["Hm"]}],
    "a tool_call_id that is a number": [USER, {"role": "tool", "content": "4", "tool_call_id": 1}, ASSISTANT],
    "two halves in the wrong order": [USER, {**ASSISTANT, "content": "\ude42\ud83d"}],
}


def test_each_kind_of_bad_turn_is_named_by_line_where_a_good_row_stands_before_them(checkpoint, tmp_path, capsys):
    path, recipe = tmp_path / "turns.jsonl", tmp_path / "recipe.yaml"
    path.write_bytes(b"\n".join([GOOD, *(turns(*row) for row in BAD_TURNS.values())]))
    recipe.write_text(recipe_text(chat_model(checkpoint), tmp_path, data={"datasets": [{"path": str(path)}]}))
    assert cli.main(["data", str(recipe)]) == 1
    said = capsys.readouterr().err
    named = {int(line) for line in re.findall(rf"^  {re.escape(str(path))}:(\d+): `messages", said, re.MULTILINE)}
    assert [kind for line, kind in enumerate(BAD_TURNS, 2) if line not in named] == []
    assert 1 not in named


def as_config(recipe, path: Path, **data: Any):
    return recipe("unused", data={"datasets": [{"path": str(path)}], "chat_template": TEMPLATE} | data)


def tokenizer():
    return build_tokenizer(CHATML, IM, eos="<|im_end|>")


def test_the_other_rows_are_trained_and_those_left_out_are_counted(bad_file, recipe):
    data = prepare(as_config(recipe, bad_file, skip_bad_rows=True), tokenizer())
    trained = {example.where for example in data.train.tokenized.examples}
    wrong = {f"{bad_file}:{line}" for line in LINES.values()}
    assert trained == {f"{bad_file}:{line}" for line in range(1, 1001)} - wrong
    assert (data.skipped, data.problems.rows, len(data.problems.lines)) == (50, wrong, 50)
    assert len(data.train.rows.conversations) == data.train.rows.datasets[0].used == 950


def test_a_row_that_can_not_be_rendered_is_in_no_question_either(write, recipe):
    held_out = write("held.jsonl", [json.loads(DEFECTS["the template refuses"]), json.loads(GOOD)])
    good = write("good.jsonl", [json.loads(GOOD)])
    specs = {"datasets": [good.model_dump()], "eval_datasets": [held_out.model_dump()]}
    with pytest.raises(DataError, match=rf"{re.escape(held_out.path)}:1: the chat template refuses .* no tools here"):
        prepare(recipe("unused", data=specs | {"chat_template": TEMPLATE}), tokenizer())
    config = recipe("unused", data=specs | {"chat_template": TEMPLATE, "skip_bad_rows": True})
    data = prepare(config, tokenizer())
    assert (data.skipped, len(data.questions())) == (1, 1)


def test_where_no_row_is_left_there_is_nothing_to_skip_to(write, recipe):
    spec = write("a.jsonl", [{"messages": [USER]}] * 3)
    for skip in (True, False):
        with pytest.raises(DataError, match="3 problems in the data") as caught:
            prepare(as_config(recipe, Path(spec.path), skip_bad_rows=skip), tokenizer())
        assert "--skip-bad-rows" not in str(caught.value)


@pytest.mark.parametrize("sort", ["held out in a file", "held out by a fraction"])
def test_held_out_rows_that_are_all_wrong_are_missed(sort, write, recipe):
    good, bad = json.loads(GOOD), json.loads(DEFECTS["the template refuses"])
    data: dict[str, Any] = {"chat_template": TEMPLATE, "skip_bad_rows": True}
    seed = 0
    if sort == "held out in a file":
        train, held = write("good.jsonl", [good]), write("held.jsonl", [bad, {"messages": [USER]}])
        data |= {"datasets": [train.model_dump()], "eval_datasets": [held.model_dump()]}
        name, line = "eval_datasets", f"{held.path}:2: `messages`: expected a turn by the assistant"
    else:
        train = write("a.jsonl", [good, bad])
        data |= {"datasets": [train.model_dump()], "eval_fraction": 0.5}
        config = DataConfig.model_validate(data)
        drawn = (read_splits(config, seed=seed)[1].conversations[0].where for seed in range(100))
        seed = next(seed for seed, where in enumerate(drawn) if where.endswith(":2"))
        name, line = "eval_fraction", f"{train.path}:2: the chat template refuses"
    with pytest.raises(DataError, match=rf"data\.{name}: without the rows that are wrong, no row is left") as caught:
        prepare(recipe("unused", data=data, training={"seed": seed}), tokenizer())
    assert line in str(caught.value)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "1: expected UTF-8; got UTF-16"),
        ("a.json", '[{"text": "a"}]'.encode("utf-16-be"), "1: expected UTF-8; got UTF-16"),
        ("a.csv", "text\na\n".encode("utf-32"), "1: expected UTF-8; got UTF-32"),
        ("a.jsonl", LFS, "1: expected rows; got a Git LFS pointer\n  a Git LFS pointer: `git lfs pull` fetches"),
        ("a.parquet", LFS, "1: expected rows; got a Git LFS pointer"),
        ("a.txt", LFS, "1: expected rows; got a Git LFS pointer"),
        (
            "a.jsonl",
            gzip.compress(b'{"text": "a"}'),
            "1: expected rows; got what gzip compressed\n  compressed with gzip",
        ),
        ("a.csv", 'text\na\n"b\nc\nd\n', "3: not CSV: unexpected end of data"),
        ("a.csv", b"text\na\n\xff\n", "3: not UTF-8"),
        ("a.json", '[{"text": "a"},\n{"text": "b"', "2: not JSON"),
        ("a.json", '[{"text": "a"}]\n{"text": "b"}', "2: not JSON: expected nothing after the list"),
        ("a.jsonl", '[1]\n{"text": "b"}', "2: not JSON: expected nothing after the list"),
    ],
)
def test_a_file_of_which_rows_may_be_lost_is_not_skipped(write, name, content, expected):
    good, bad = write("good.jsonl", [{"text": "Hi"}]), write(name, content, format="text")
    with pytest.raises(DataError) as caught:
        read_splits(DataConfig(datasets=[good, bad], skip_bad_rows=True))
    assert f"{bad.path}:{expected}" in str(caught.value)
    assert "--skip-bad-rows" not in str(caught.value)


def test_reading_goes_on_after_a_bad_row_of_a_list_or_a_table(write):
    deep, digits = "[" * 50_000 + "]" * 50_000, "9" * 5000
    content = f'[\n{{"text": tru}},\n{{"text": "}}", "x": {deep}}},\n{{"x": {digits}}},\n{{"text": "good"}}\n]'
    for name, text, lines in (
        ("a.json", content, [2, 3, 4]),
        ("a.csv", 'text,n\na,b\n"c"d,e\nf,g,h\ni,\n', [3, 4]),
    ):
        spec, problems = write(name, text, format="text"), Problems(skip=True)
        train, _ = read_splits(DataConfig(datasets=[spec], skip_bad_rows=True), problems=problems)
        assert problems.rows == {f"{spec.path}:{line}" for line in lines}
        assert train.conversations
        assert not problems.refused


def test_a_row_has_a_limit_in_every_table_and_a_document_has_none(write, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MOST_BYTES", 1000)
    rows = [{"text": "a"}, {"text": "b" * 2000}, {"text": "c"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for spec, line in (
        (write("a.jsonl", rows), 2),
        (write("a.json", json.dumps(rows, indent=0)), 5),
        (write("a.csv", "text\n" + "\n".join(row["text"] for row in rows) + "\n"), 3),
        (DatasetConfig(path=str(tmp_path / "a.parquet")), 2),
    ):
        problems = Problems(skip=True)
        train, _ = read_splits(DataConfig(datasets=[spec]), problems=problems)
        assert [row.text for row in train.conversations] == ["a", "c"]
        [line_said] = problems.lines
        assert line_said.startswith(f"{spec.path}:{line}: expected a row of at most 8 MiB; got 0.0 MiB")
    assert len(read_splits(DataConfig(datasets=[write("a.txt", "b" * 2000)]))[0].conversations) == 1


def test_what_is_no_file_is_an_error_and_nobody_waits_for_it(tmp_path, monkeypatch, write):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "gone")
    (tmp_path / "directory.jsonl").mkdir()
    for name, expected in (
        ("pipe.jsonl", "expected a file; got a pipe"),
        ("dangling.jsonl", "a symbolic link to what is not there"),
        ("directory.jsonl", "a directory without .jsonl"),
        ("x" * 5000 + ".jsonl", "cannot be read: "),
    ):
        with pytest.raises(DataError, match=expected):
            read_splits(DataConfig(datasets=[DatasetConfig(path=str(tmp_path / name))]))
    with pytest.raises(DataError, match="cannot be read: Could not determine home"):
        read_splits(DataConfig(datasets=[DatasetConfig(path="~nobody-of-that-name/a.jsonl")]))
    spec = write("a.jsonl", GOOD)

    def gone(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", gone)
    with pytest.raises(DataError, match=rf"{re.escape(spec.path)}:1: cannot be read: Permission denied"):
        read_splits(DataConfig(datasets=[spec]))


def test_a_weight_beyond_memory_is_an_error(write):
    with pytest.raises(DataError, match="makes more than 100,000,000 rows"):
        read_splits(DataConfig(datasets=[write("a.jsonl", [json.loads(GOOD)], weight=1e18)]))


# --- what a resume compares -----------------------------------------------------------------------------------------


def test_fingerprints_tell_rows_tokens_and_order_apart(write, recipe):
    rows = [{"messages": [{**USER, "content": f"Question {n}?"}, ASSISTANT]} for n in range(9)]
    path = Path(write("a.jsonl", rows).path)
    dated = "{{ strftime_now('%d') }}" + CHATML

    def of(packing: bool = True, day: int = 1, **sections: Any) -> dict[str, str]:
        data = {"datasets": [{"path": str(path)}], "max_seq_length": 80, "chat_template": dated}
        config = recipe("unused", data=data | sections.pop("data", {}), **sections)
        return prepare(config, tokenizer(), datetime.date(2026, 7, day)).fingerprints(packing)

    def changed(**options: Any) -> set[str]:
        return {name for name, digest in of(**options).items() if digest != of()[name]}

    assert changed() == set()
    assert changed(packing=False) == {"order"}
    assert changed(training={"seed": 5}) == {"order"}
    assert changed(day=2) == {"tokens"}
    assert "tokens" in changed(data={"chat_template": dated.replace("helpful", "kind")})
    assert "tokens" in changed(data={"assistant_only_loss": False})
    path.write_text(path.read_text().replace("Question 3?", "Question 7?"))
    before = of()
    path.write_text(path.read_text().replace("Question 7?", "Question 3?"))
    assert {name for name, digest in of().items() if digest != before[name]} == {"rows", "tokens"}


def test_the_day_is_kept_only_where_the_template_writes_it(write, recipe):
    path, day = Path(write("a.jsonl", GOOD).path), datetime.date(2026, 7, 31)
    assert prepare(as_config(recipe, path), tokenizer(), day).today is None
    template = "{{ strftime_now('%d') }}" + CHATML
    assert prepare(as_config(recipe, path, chat_template=template), tokenizer(), day).today == "2026-07-31"


# --- fuzzing --------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "messages", "type", "text", "weight", "name", "tools"])
            | st.text(max_size=3),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)
FIELDS = ("messages", "conversations", "instruction", "input", "output", "prompt", "completion", "text", "tools")


@pytest.mark.torture
@settings(deadline=None)
@given(row=st.dictionaries(st.sampled_from(FIELDS), JSON) | JSON)
def test_any_json_is_a_conversation_or_a_problem_in_each_layout(row):
    for layout in ("messages", "sharegpt", "alpaca", "prompt-completion", "text"):
        problems = Problems()
        found = conversation("a:1", row, layout, problems, {})
        assert (found is None) == bool(problems.count)
        if found is not None:
            assert found.text or found.messages[-1]["role"] == "assistant"
            for turn in found.messages:
                assert all(isinstance(value, str) for value in turn.values())
                turn["content"].encode()


def test_what_pyarrow_can_not_turn_into_python_is_a_problem(tmp_path):
    path = tmp_path / "a.parquet"
    column = pyarrow.array([2**62], pyarrow.timestamp("ms"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "when": column}), path)
    problems = Problems()
    assert list(read_rows(DatasetConfig(path=str(path)), problems)) == []
    assert problems.lines[0].startswith(f"{path}:1: not readable as Parquet")
