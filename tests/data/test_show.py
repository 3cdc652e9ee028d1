"""What a person reads about their data before a run."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qlora.config import DataConfig
from qlora.data.chat import tokenize
from qlora.data.formats import Conversation
from qlora.data.show import Split, duplicates, histogram, show, stretches
from qlora.data.source import Rows, read_splits
from tests.data.conftest import FAMILIES, family_tokenizer


def pair(number: int, answer: str = "Yes.") -> dict[str, str]:
    return {"prompt": f"Is {number} a number?", "completion": answer}


@pytest.fixture
def shown(write):
    """Shows training rows and held-out rows as text; options are those of `show` and of the console."""

    def shown(
        train: list[Any],
        held_out: list[Any],
        *,
        family: str = "chatml",
        max_seq_length: int = 80,
        encoding: str = "utf-8",
        weight: float = 1.0,
        packing: bool = True,
        **console: Any,
    ) -> str:
        tokenizer = family_tokenizer(family)
        specs = write("train.jsonl", train, weight=weight), write("eval.jsonl", held_out)
        data = DataConfig(datasets=[specs[0]], eval_datasets=[specs[1]] if held_out else [])
        train_side, held_out_side = (
            Split(rows, tokenize(tokenizer, rows.conversations, max_seq_length=max_seq_length))
            for rows in read_splits(data)
        )
        raw = io.BytesIO()
        out = io.TextIOWrapper(raw, encoding=encoding)
        show(
            train_side,
            held_out_side,
            tokenizer,
            max_seq_length=max_seq_length,
            per_device_train_batch_size=2,
            packing=packing,
            console=Console(file=out, width=400, **console),
        )
        out.flush()
        return raw.getvalue().decode(encoding)

    return shown


def test_formats_rows_and_tokens_are_counted(shown):
    train = [{**pair(n), "id": n} for n in range(10)]
    tokenizer = family_tokenizer("chatml")
    answer = len(tokenizer("Yes.<|im_end|>")["input_ids"])
    text = shown(train, [pair(77)], weight=2)
    [line] = [line for line in text.splitlines() if "train.jsonl [train]" in line]
    assert line.split()[-6:] == ["prompt-completion", "(detected)", "10", "20", "(x2)", "id"]
    assert "train: 20 examples" in text
    assert f"{20 * answer:,} supervised" in text
    assert "held out: 1 examples" in text


def test_truncated_rows_and_rows_with_nothing_to_learn_are_counted_and_named(shown):
    rows = [pair(1), pair(2, "Yes, " * 30), {"prompt": "a " * 90, "completion": "b"}]
    text = shown(rows, [])
    assert "truncated at max_seq_length 80: 1 of 2 (50.0%)" in text
    assert "1 train: rows with nothing to learn, left out\n" in text
    assert "train.jsonl:3\n" in text


def test_held_out_rows_that_are_trained_on_are_named_in_part(shown):
    train = [pair(n) for n in range(8)]
    text = shown(train, [pair(99), *({**row, "prompt": row["prompt"].upper()} for row in train)])
    assert "8 held-out rows that are trained on" in text
    assert "eval.jsonl:2 = " in text
    assert text.count("train.jsonl:1\n") == 2  # in the list, and as a sample
    assert "... and 3 more" in text
    assert "no held-out row is trained on" in shown(train, [pair(99)])


def test_rows_whose_thoughts_are_taken_away_are_named(shown):
    turns = [{"role": role, "content": "Hm."} for role in ("user", "assistant") * 2]
    text = shown([{"messages": turns}], [], family="qwen3")
    assert "1 train: rows in which the chat template renders earlier turns" in text


@pytest.mark.parametrize("packing", [True, False])
def test_packing_is_compared_with_padding(shown, packing):
    lines = shown([pair(n) for n in range(9)], [], packing=packing).splitlines()
    used, other = [line for line in lines if "micro-batches" in line]
    assert used.startswith("packed: " if packing else "padded: ")
    assert other.startswith("  (the other way, " + ("padded: 5 micro-batches of 2" if packing else "packed: "))


def test_what_is_learned_is_green_on_a_terminal_and_in_brackets_elsewhere(shown):
    rows = [pair(1)]
    terminal = shown(rows, [], force_terminal=True, color_system="standard")
    assert "\x1b[32mYes.<|im_end|>\x1b[0m" in terminal
    assert "⟦" not in terminal
    assert "⟦Yes.<|im_end|>⟧" in shown(rows, [])
    assert "⟦Yes.<|im_end|>⟧" in shown(rows, [], force_terminal=True, no_color=True)


def test_a_console_without_unicode_can_show_everything(shown):
    text = shown([pair(1, "Blåbær 🙂")], [], encoding="ascii")
    assert r"[[Bl\xe5b\xe6r \U0001f642<|im_end|>]]" in text
    assert "#" * 40 in text


def test_data_does_not_steer_the_terminal(shown):
    text = shown([pair(1, "a\x1b[2Jb [bold]c[/bold]")], [])
    assert r"⟦a\x1b[2Jb [bold]c[/bold]<|im_end|>⟧" in text


def test_secrets_in_paths_fields_and_rows_are_not_printed(write, tmp_path):
    token = "hf_" + "aB3dE5gH7j" * 3
    tokenizer = family_tokenizer("chatml")
    rows = [pair(1, f"It is {token} " + "x" * 1790 + f" {token}"), pair(2, "a" * 3000)]
    spec = write(f"{token}/a.jsonl", [{**row, f"a {token}": 1} for row in rows])
    read, _ = read_splits(DataConfig(datasets=[spec]))
    cut = tokenize(tokenizer, read.conversations[1:], max_seq_length=8)  # a row with nothing to learn: in a list
    whole = tokenize(tokenizer, read.conversations[:1], max_seq_length=4000)
    out = io.StringIO()
    for width in (400, 40):  # a narrow table breaks a path over lines
        for found in (whole, cut):
            show(
                Split(read, found),
                Split(read, found),
                tokenizer,
                max_seq_length=4000,
                per_device_train_batch_size=2,
                packing=True,
                console=Console(file=out, width=width),
            )
    said = "".join(out.getvalue().split())
    assert "***" in said
    assert token[:8] not in said
    assert token[-8:] not in said


def test_long_stretches_are_shown_by_their_ends(shown):
    text = shown([{"prompt": "begin " + "x" * 5000 + " end", "completion": "Yes."}], [], max_seq_length=9999)
    assert "begin xxx" in text
    assert "xxx end" in text
    assert "characters) ..." in text
    assert len(text) < 3000


def test_nothing_to_show_is_shown(shown):
    text = shown([{"prompt": "a " * 90, "completion": "b"}], [])
    assert "train: 0 examples, 0 tokens, 0 supervised" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_stretches_are_the_whole_text_cut_where_learning_begins_and_ends(family):
    tokenizer = family_tokenizer(family)
    row = Conversation([{"role": "user", "content": "Hvor? 🙂"}, {"role": "assistant", "content": "Å, i Oslo 🤗"}])
    [example] = tokenize(tokenizer, [row], max_seq_length=500).examples
    parts = list(stretches(example, tokenizer))
    assert "".join(text for _, text in parts) == tokenizer.apply_chat_template(row.messages, tokenize=False)
    assert [text for learned, text in parts if learned] == FAMILIES[family].learned(["Å, i Oslo 🤗"])


def test_a_duplicate_is_named_once_with_the_first_row_that_it_repeats():
    train = Rows([Conversation(text=text, where=f"t:{line}") for line, text in enumerate(["a", "b", "A", "a"], 1)])
    held_out = Rows([Conversation(text=text, where=f"h:{line}") for line, text in enumerate([" a", "c", "b"], 1)])
    assert duplicates(train, held_out) == [("h:1", "t:1"), ("h:3", "t:2")]
    assert duplicates(train, Rows()) == []


@given(st.lists(st.integers(1, 5000)))
def test_a_histogram_counts_every_length_in_its_bin(lengths):
    bars = histogram(lengths)
    assert len(bars) <= 10
    assert len({longest - shortest for shortest, longest, _ in bars}) <= 1
    for shortest, longest, count in bars:
        assert count == sum(shortest <= length <= longest for length in lengths)
    assert sum(count for _, _, count in bars) == len(lengths)
