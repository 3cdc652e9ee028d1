"""The quickstart's two data files are what `recipes/data/README.md` says: valid, decidable, small and free of leaks.

The quickstart's headline is a count of exact matches, so a wrong answer key or a held-out row that the training file
gives away would make the headline a lie. Every answer is therefore worked out a second time from its text alone, by
rules that know nothing of how the rows were made.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest

from tests.rows import Row, ngrams, read, sentences, words

KEYS = ["name", "item", "quantity", "city", "day"]
SYSTEM = "Turn the order into one line of JSON."

WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
# The full name, or its first three letters, in any case: "Friday", "friday", "Fri", "fri".
WEEKDAY = re.compile(rf"\b({'|'.join(f'{day[:3]}(?:{day[3:]})?' for day in WEEKDAYS)})\b", re.IGNORECASE)

NUMBER_WORDS = {
    "a dozen": 12, "a couple of": 2, "a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6,
    "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "fifteen": 15, "twenty": 20,
    "twenty-five": 25, "thirty": 30, "forty": 40, "fifty": 50,
}  # fmt: skip
NUMBER = rf"(?P<number>\d+|{'|'.join(sorted(NUMBER_WORDS, key=len, reverse=True))})"


class Order(Row):
    @property
    def answer(self) -> dict[str, Any]:
        return json.loads(self.written)


TRAIN = read("orders_train.jsonl", Order)
HELD_OUT = read("orders_heldout.jsonl", Order)
ALL = [*TRAIN, *HELD_OUT]


def stated_quantities(text: str, item: str) -> set[int]:
    """Every number that `text` ties to `item`; one that stands elsewhere (a time of day, a flat) is not.

    Before it: "two crates of oranges", "4 kettles", "Qty 4, kettles". After it: "kettles x 4", "oranges, two crates",
    "Do you still sell pens? If so, 15", "Our stock of pens is low, so make it 6", "Item: pens. Quantity: 15".
    """
    thing = re.escape(item)
    before = rf"\b(?:Qty )?{NUMBER}(?: |, | x | [a-z]+ of ){thing}\b"
    after = rf"\b{thing}(?: x |, |\? If so, | is low, so make it |\. Quantity: ){NUMBER}\b"
    found = [m["number"].lower() for rule in (before, after) for m in re.finditer(rule, text, re.I)]
    return {NUMBER_WORDS.get(number) or int(number) for number in found}


def test_there_are_enough_rows_to_learn_from_and_to_count_on():
    assert len(TRAIN) >= 500
    assert len(HELD_OUT) >= 50


def test_a_row_is_a_conversation_of_system_user_assistant():
    for order in ALL:
        assert [set(message) for message in order.messages] == [{"role", "content"}] * 3, order.where
        assert [message["role"] for message in order.messages] == ["system", "user", "assistant"], order.where
        assert order.messages[0]["content"] == SYSTEM, order.where
        assert order.text == order.text.strip() and "\n" not in order.text, order.where


def test_an_answer_is_one_line_of_strict_json_in_the_only_form_that_counts():
    """Exact match compares strings, so there must be one right string: keys in order, no spaces, no escapes."""
    for order in ALL:
        answer, written = order.answer, order.written
        assert list(answer) == KEYS, order.where
        assert written == json.dumps(answer, ensure_ascii=False, allow_nan=False, separators=(",", ":")), order.where
        assert [type(answer[key]) for key in KEYS[:4]] == [str, str, int, str], order.where


def test_name_city_and_item_stand_in_the_text_exactly_once():
    """Name and city letter for letter with their case; the item in lower case, whatever the text's case."""
    for order in ALL:
        answer = order.answer
        assert answer["item"] == answer["item"].lower(), order.where
        for value, text in ((answer["name"], order.text), (answer["city"], order.text),
                            (answer["item"], order.text.lower())):  # fmt: skip
            assert len(re.findall(rf"\b{re.escape(value)}\b", text)) == 1, (order.where, value)


def test_the_quantity_is_the_one_number_tied_to_the_item():
    for order in ALL:
        assert stated_quantities(order.text, order.answer["item"]) == {order.answer["quantity"]}, order.where


def test_the_day_is_the_only_weekday_named_or_null():
    for order in ALL:
        named = [day for found in WEEKDAY.findall(order.text) for day in WEEKDAYS if day[:3] == found[:3].title()]
        assert named == ([] if order.answer["day"] is None else [order.answer["day"]]), order.where


def test_no_row_stands_twice():
    counts = Counter(" ".join(words(order.text)) for order in ALL)
    assert [text for text, count in counts.items() if count > 1] == []


def test_no_held_out_text_lies_in_a_training_text_or_the_other_way_round():
    train = [f" {' '.join(words(order.text))} " for order in TRAIN]
    for order in HELD_OUT:
        held_out = f" {' '.join(words(order.text))} "
        assert not any(held_out in text or text in held_out for text in train), order.where


def test_held_out_wording_is_new():
    """No six words in a row are shared, and no sentence of three words or more: a frame cannot be recalled.

    Names, items and cities are masked first. Otherwise a shared frame would hide behind what it was filled with.
    """

    def masked(order: Order) -> str:
        text = order.text
        for key in ("name", "city", "item"):
            text = re.sub(rf"\b{re.escape(order.answer[key])}\b", key.upper(), text, flags=re.IGNORECASE)
        text = WEEKDAY.sub("DAY", text)
        return re.sub(rf"\b{NUMBER} (?:[a-z]+ of )?ITEM\b", "ITEM", text, flags=re.IGNORECASE)

    train_ngrams = {ngram for order in TRAIN for ngram in ngrams(masked(order), 6)}
    train_sentences = {sentence for order in TRAIN for sentence in sentences(masked(order))}
    shared = {
        order.where: (train_ngrams.intersection(ngrams(masked(order), 6)), train_sentences & sentences(masked(order)))
        for order in HELD_OUT
    }
    assert {where: found for where, found in shared.items() if any(found)} == {}


def test_held_out_people_are_strangers_and_many_things_and_places_are_new():
    """An answer cannot be looked up: no full name comes back, and a good part of the rest was never trained on."""

    def values(orders: list[Order], key: str) -> list[str]:
        return [order.answer[key] for order in orders]

    assert not set(values(TRAIN, "name")) & set(values(HELD_OUT, "name"))
    for key in ("item", "city"):
        known = set(values(TRAIN, key))
        assert sum(value not in known for value in values(HELD_OUT, key)) >= len(HELD_OUT) // 4, key


@pytest.mark.parametrize("orders", [TRAIN, HELD_OUT], ids=["train", "held-out"])
def test_orders_vary(orders: list[Order]):
    """Every weekday and null occur, small and large numbers do, and guessing any one value does not get far."""
    assert {order.answer["day"] for order in orders} == {*WEEKDAYS, None}
    quantities = Counter(order.answer["quantity"] for order in orders)
    assert 1 in quantities and max(quantities) >= 100
    assert max(quantities.values()) <= len(orders) // 6
    for key in ("name", "item", "city"):
        assert max(Counter(order.answer[key] for order in orders).values()) <= max(2, len(orders) // 50), key


def test_one_pass_over_the_training_file_is_about_30k_tokens():
    """Two cores train some 300 tokens a second, and the whole quickstart has six minutes.

    Counted in characters, for want of a tokenizer here: the quickstart model's own makes one token of 3.3 characters in
    these files, and its chat template adds 13 tokens a row (measured when the files were written).
    """
    characters = [sum(len(message["content"]) for message in order.messages) for order in TRAIN]
    assert max(characters) <= 300
    assert sum(count / 3.3 + 13 for count in characters) <= 50_000
