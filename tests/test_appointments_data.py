"""The appointments data, the second task for the quickstart's model, is what `recipes/data/README.md` says.

Two adapters on one base are told apart by a count of exact matches, so each count has to be honest. Every answer is
therefore worked out a second time from its text alone, by rules that know nothing of how the rows were made, and the
held-out rows must not be recallable from the training rows or from the orders task.
"""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter

import pytest

from tests.rows import Row, ngrams, read, sentences, words

SYSTEM = "Write the appointment as one line."
ANSWER = re.compile(r"(?P<date>\d\d-\d\d) (?P<time>\d\d:\d\d) \| (?P<who>[^|]+) \| (?P<place>[^|]+)")

MONTHS = ["Jan(?:uary)?", "Feb(?:ruary)?", "Mar(?:ch)?", "Apr(?:il)?", "May", "June?", "July?", "Aug(?:ust)?",
          "Sep(?:tember)?", "Oct(?:ober)?", "Nov(?:ember)?", "Dec(?:ember)?"]  # fmt: skip
HOURS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
MINUTES = {"": 0, "quarter past ": 15, "half past ": 30}

DAY = r"(?P<day>\d{1,2})(?P<ordinal>st|nd|rd|th)?"
MONTH = rf"(?P<month>{'|'.join(MONTHS)})"
DATES = (re.compile(rf"\b(?:[Tt]he )?{DAY} (?:of )?{MONTH}\b"), re.compile(rf"\b{MONTH} {DAY}\b(?![:.]\d)"))
CLOCK = re.compile(r"\b(?P<hour>\d{1,2})(?:[:.](?P<minute>\d\d))?(?: ?(?P<half>am|pm))?\b")
SPOKEN = re.compile(
    rf"\b(?P<past>quarter past |half past |)(?P<hour>{'|'.join(HOURS)})(?: o'clock)? "
    r"in the (?P<part>morning|afternoon|evening)\b|\b(?P<noon>noon)\b",
    re.IGNORECASE,
)
WHO = re.compile(r"\b(?:Dr|Mr|Mrs|Ms|Prof)\. [A-Z][a-z]+\b")
PLACE = re.compile(
    r"\b(?:room|office|suite|clinic|hall|booth|cabin|wing|studio|lab|bay|ward) (?:\d+|[A-H])\b(?![:.]\d)", re.IGNORECASE
)


class Appointment(Row):
    def part(self, name: str) -> str:
        """One of the answer's parts: date, time, who or place."""
        found = ANSWER.fullmatch(self.written)
        assert found is not None, f"{self.where}: {self.written}"
        return found[name]


TRAIN = read("appointments_train.jsonl", Appointment)
HELD_OUT = read("appointments_heldout.jsonl", Appointment)
ALL = [*TRAIN, *HELD_OUT]


def dates(text: str) -> list[str]:
    """Every date that `text` names, as MM-DD: "3 May", "the 3rd of May", "May 3", "May 3rd", "3 Sep", "Sep 3"."""
    found = [match for rule in DATES for match in rule.finditer(text)]
    numbers = [next(n for n, name in enumerate(MONTHS, 1) if re.fullmatch(name, match["month"])) for match in found]
    return [f"{number:02}-{int(match['day']):02}" for number, match in zip(numbers, found, strict=True)]


def times(text: str) -> list[str]:
    """Every time of day that `text` names, as HH:MM: "14:30", "2:30 pm", "2.30pm", "2 pm", and the same in words.

    A number alone is no time of day. Twelve in the afternoon is noon, as on a clock.
    """
    found = []
    for match in CLOCK.finditer(text):
        hour, minute, half = int(match["hour"]), match["minute"], match["half"]
        if half:
            hour = hour % 12 + 12 * (half == "pm")
        if half or minute:
            found.append(f"{hour:02}:{minute or '00'}")
    for match in SPOKEN.finditer(text):
        if match["noon"]:
            found.append("12:00")
        else:
            hour = HOURS.index(match["hour"].lower()) + 1
            hour = hour % 12 + 12 * (match["part"].lower() != "morning")
            found.append(f"{hour:02}:{MINUTES[match['past'].lower()]:02}")
    return found


def masked(appointment: Appointment) -> str:
    """The frame: the text with its date, time, person and place blotted out."""
    text = PLACE.sub("PLACE", WHO.sub("WHO", appointment.text))
    for rule in DATES:
        text = rule.sub("DATE", text)
    text = SPOKEN.sub("TIME", text)
    return CLOCK.sub(lambda match: "TIME" if match["minute"] or match["half"] else match[0], text)


def test_there_are_enough_rows_to_learn_from_and_to_count_on():
    assert len(TRAIN) >= 500
    assert len(HELD_OUT) >= 50


def test_a_row_is_a_conversation_of_system_user_assistant():
    for row in ALL:
        assert [set(message) for message in row.messages] == [{"role", "content"}] * 3, row.where
        assert [message["role"] for message in row.messages] == ["system", "user", "assistant"], row.where
        assert row.messages[0]["content"] == SYSTEM, row.where
        assert row.text == row.text.strip() and "\n" not in row.text, row.where


def test_the_rules_read_every_way_a_date_or_a_time_is_written():
    """The rules decide what a right answer is, so they are held against cases worked out by hand."""
    for text in ("3 May", "the 3rd of May", "The 3rd of May", "May 3", "May 3rd"):
        assert dates(f"on {text}, 14:30, room 12.") == ["05-03"], text
    assert dates("12 Sep or Sep 13, not 31") == ["09-12", "09-13"]
    for text in ("14:30", "2:30 pm", "2.30pm", "half past two in the afternoon", "Half past two in the afternoon"):
        assert times(f"at {text} on 3 May, room 12.") == ["14:30"], text
    assert times("9 am, nine o'clock in the morning, 12 pm, noon, half past twelve in the afternoon, 12:05 am") == [
        "09:00", "12:00", "00:05", "09:00", "12:00", "12:30"]  # fmt: skip


def test_the_answer_is_the_only_date_time_person_and_place_of_the_text():
    for row in ALL:
        (date,), (time,), (who,), (place,) = (
            dates(row.text),
            times(row.text),
            WHO.findall(row.text),
            PLACE.findall(row.text),
        )
        assert row.written == f"{date} {time} | {who} | {place[0].lower()}{place[1:]}", row.where


def test_dates_exist_with_their_right_ordinals_and_times_are_office_hours():
    """A 31 June or a "3th" would teach nonsense; a time at night has no words in these texts."""
    endings = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd", 31: "st"}
    for row in ALL:
        datetime.date.fromisoformat(f"2024-{row.part('date')}")  # a leap year: the texts name no year
        (found,) = (match for rule in DATES for match in rule.finditer(row.text))
        assert found["ordinal"] in (None, endings.get(int(found["day"]), "th")), row.where
        assert "08:00" <= row.part("time") < "19:00", row.where


def test_no_row_stands_twice():
    counts = Counter(" ".join(words(row.text)) for row in ALL)
    assert [text for text, count in counts.items() if count > 1] == []


def test_held_out_wording_is_new():
    """No six words in a row are shared, and no sentence of three words or more: a frame cannot be recalled.

    Dates, times, people and places are masked first. Otherwise a shared frame would hide behind what filled it.
    """
    train_ngrams = {ngram for row in TRAIN for ngram in ngrams(masked(row), 6)}
    train_sentences = {sentence for row in TRAIN for sentence in sentences(masked(row))}
    shared = {
        row.where: (train_ngrams.intersection(ngrams(masked(row), 6)), train_sentences & sentences(masked(row)))
        for row in HELD_OUT
    }
    assert {where: found for where, found in shared.items() if any(found)} == {}


def test_every_held_out_frame_is_used_once_and_the_training_frames_are_many():
    """Ten rows with one frame would count as ten when they are one; a short frame has no six words to share."""
    train, held_out = ({" ".join(words(masked(row))) for row in rows} for rows in (TRAIN, HELD_OUT))
    assert len(train) >= 60
    assert len(held_out) == len(HELD_OUT)
    assert not train & held_out


def test_held_out_people_are_strangers_and_many_places_are_new():
    """An answer cannot be looked up: no surname comes back, and a good part of the places was never trained on."""
    train, held_out = ({row.part("who").split()[-1] for row in rows} for rows in (TRAIN, HELD_OUT))
    assert not train & held_out
    assert len(held_out) == len(HELD_OUT)
    known = {row.part("place") for row in TRAIN}
    assert sum(row.part("place") not in known for row in HELD_OUT) >= len(HELD_OUT) // 4


@pytest.mark.parametrize("rows", [TRAIN, HELD_OUT], ids=["train", "held-out"])
def test_appointments_vary(rows: list[Appointment]):
    """Every month and every hour occur, digits and words do, and guessing any one value does not get far."""
    assert len({row.part("date")[:2] for row in rows}) == 12
    assert len({row.part("time")[:2] for row in rows}) == 11
    spoken = sum(bool(SPOKEN.search(row.text)) for row in rows)
    copied = sum(row.part("time") in row.text for row in rows)
    assert min(spoken, copied, len(rows) - spoken - copied) >= len(rows) // 6
    for name, share in (("date", 20), ("time", 10), ("who", 50), ("place", 10)):
        assert max(Counter(row.part(name) for row in rows).values()) <= max(2, len(rows) // share), name


def test_an_answer_is_never_the_other_tasks():
    """Answering with the wrong adapter shows at once: another system message, and a line that is not JSON."""
    for name in ("orders_train.jsonl", "orders_heldout.jsonl"):
        for row in read(name, Row):
            assert row.messages[0]["content"] != SYSTEM, row.where
            assert not ANSWER.search(row.written), row.where
    for row in ALL:
        with pytest.raises(json.JSONDecodeError):
            json.loads(row.written)


def test_one_pass_over_the_training_file_is_no_longer_than_the_orders():
    """Both tasks have to train on two cores, and every row has to fit the recipe's 128 tokens.

    Counted in characters, for want of a tokenizer here: the quickstart model's own makes one token of 2.5 characters in
    these files (it spells numbers digit by digit), and its chat template adds 13 tokens a row (measured when the files
    were written: 88 tokens at most, 44,700 in a pass, 26 in an answer).
    """
    characters = [sum(len(message["content"]) for message in row.messages) for row in ALL]
    assert max(characters) <= 220
    assert sum(count / 2.5 + 13 for count in characters[: len(TRAIN)]) <= 50_000
