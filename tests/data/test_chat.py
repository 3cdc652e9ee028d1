"""What a model is shown, and what of it is learned, under the chat templates of well-known families."""

from __future__ import annotations

from itertools import groupby
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from qlora.data.chat import Example, Tokenized, _Encoder, end_token_ids, render_prompt, set_chat_template, tokenize
from qlora.data.formats import Conversation
from qlora.errors import DataError
from qlora.model.batch import IGNORE_INDEX
from tests.data.conftest import CHATML, FAMILIES, GEMMA, build_tokenizer, family_tokenizer

QUESTIONS = ("What is your name?", "Where do you\n  live?", "Thank you. 🙂")
ANSWERS = ("My name is Ada.", "In Oslo:\n\n\n    Norway  \n\tis it, é 🤗", "{}")


def chat(*turns: str, system: str | None = None, **fields: Any) -> Conversation:
    """A conversation of a question, an answer, a question, ..."""
    messages = [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(messages=messages, **{"where": "rows.jsonl:1", **fields})


THREE = chat(*(turn for pair in zip(QUESTIONS, ANSWERS, strict=True) for turn in pair))


def run(
    tokenizer: PreTrainedTokenizerFast, *rows: Conversation, max_seq_length: int = 1000, **options: Any
) -> Tokenized:
    return tokenize(tokenizer, rows, max_seq_length=max_seq_length, **options)


def one(tokenizer: PreTrainedTokenizerFast, row: Conversation, **options: Any) -> Example:
    [example] = run(tokenizer, row, **options).examples
    return example


def learned(tokenizer: PreTrainedTokenizerFast, example: Example) -> list[str]:
    """The text of each run of learned tokens, after checking that a learned token is its own label."""
    assert len(example.labels) == len(example.input_ids)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    runs = groupby(zip(example.input_ids, example.labels, strict=True), key=lambda pair: pair[1] != IGNORE_INDEX)
    return [cast(str, tokenizer.decode([token for token, _ in run])) for is_learned, run in runs if is_learned]


def hidden(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    pairs = zip(example.input_ids, example.labels, strict=True)
    return cast(str, tokenizer.decode([token for token, label in pairs if label == IGNORE_INDEX]))


# --- the mask -------------------------------------------------------------------------------------------------------


def test_every_answer_and_its_end_token_is_learned_and_nothing_else(family):
    tokenizer = family_tokenizer(family)
    example = one(tokenizer, THREE)
    assert learned(tokenizer, example) == FAMILIES[family].learned(ANSWERS)
    assert all(question in hidden(tokenizer, example) for question in QUESTIONS)


@pytest.mark.parametrize("family", [name for name in sorted(FAMILIES) if FAMILIES[name].has_system])
def test_system_turns_are_seen_and_not_learned(family):
    tokenizer = family_tokenizer(family)
    example = one(tokenizer, chat("Who?", "Me.", system="Answer in a word."))
    assert learned(tokenizer, example) == FAMILIES[family].learned(["Me."])
    assert "Answer in a word." in hidden(tokenizer, example)


def test_ids_are_those_of_the_chat_template_itself(family):
    tokenizer = family_tokenizer(family)
    inference = cast(Any, tokenizer.apply_chat_template(THREE.messages, tokenize=True))["input_ids"]
    assert one(tokenizer, THREE).input_ids == inference


def test_training_saw_the_prompt_and_learned_from_there_on(family):
    tokenizer = family_tokenizer(family)
    example = one(tokenizer, THREE)
    prompt = render_prompt(tokenizer, THREE.messages[:-1])
    if family == "deepseek":  # asks for a thought and then leaves it out: the answer comes right after the header
        begun = tokenizer("<think>\n", add_special_tokens=False)["input_ids"]
        assert prompt[-len(begun) :] == begun
        del prompt[-len(begun) :]
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[len(prompt) - 1] == IGNORE_INDEX
    assert example.labels[len(prompt)] != IGNORE_INDEX


@pytest.mark.parametrize("trim_offsets", [False, True])
@settings(max_examples=60, deadline=None)  # the first example builds a tokenizer
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    answers=st.lists(
        # Not "<" and "[": letters that would write a special token. White space at the ends is trimmed by templates.
        st.text(st.characters(exclude_characters="<[", exclude_categories=["Cs"]), min_size=1)
        .map(str.strip)
        .filter(bool),
        min_size=1,
        max_size=4,
    ),
)
def test_any_answer_is_learned_to_the_letter(trim_offsets, family, answers):
    tokenizer = family_tokenizer(family, trim_offsets=trim_offsets)
    example = one(tokenizer, chat(*(turn for answer in answers for turn in ("What?", answer))), max_seq_length=10**6)
    assert learned(tokenizer, example) == FAMILIES[family].learned(answers)


def test_white_space_is_learned_where_the_tokenizer_gives_it_no_offsets():
    tokenizer = family_tokenizer("llama3", trim_offsets=True)
    answer = "a\n\n    b \n\nc"
    offsets = tokenizer(answer, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    assert any(start == end for start, end in cast(Any, offsets))  # else this shows nothing
    assert learned(tokenizer, one(tokenizer, chat("?", answer))) == [answer + "<|eot_id|>"]


def test_a_token_across_the_start_of_an_answer_is_learned():
    # "\n" ends the header and "\n" begins the answer, and both together are one token: without it the answer's first
    # letter would never be learned.
    tokenizer = family_tokenizer("chatml")
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    assert learned(tokenizer, one(tokenizer, chat("?", "\nyes"))) == ["\n\nyes<|im_end|>"]


def test_without_assistant_only_loss_all_but_the_first_token_is_learned(family):
    tokenizer = family_tokenizer(family)
    example = one(tokenizer, THREE, assistant_only_loss=False)
    assert example.labels == [IGNORE_INDEX, *example.input_ids[1:]]


def test_an_assistant_that_speaks_first_is_learned():
    row = Conversation([{"role": "assistant", "content": "Welcome."}, *THREE.messages], where="a:1")
    tokenizer = family_tokenizer("chatml")
    assert learned(tokenizer, one(tokenizer, row))[0] == "Welcome.<|im_end|>"


def test_thoughts_are_learned_in_the_last_answer_and_rows_that_lose_some_are_named():
    tokenizer = family_tokenizer("qwen3")
    thinking = [f"<think>\nthat is {answer}\n</think>\n\n{answer}" for answer in ("A", "B")]
    result = run(tokenizer, chat("?", thinking[0], "??", thinking[1], where="x:7"), chat("?", thinking[0], where="x:8"))
    assert learned(tokenizer, result.examples[0]) == ["A<|im_end|>", thinking[1] + "<|im_end|>"]
    assert learned(tokenizer, result.examples[1]) == [thinking[0] + "<|im_end|>"]
    assert result.rewritten == ["x:7"]


def test_only_templates_that_rewrite_earlier_turns_are_said_to(family):
    assert bool(run(family_tokenizer(family), THREE).rewritten) == (family in ("qwen3", "gpt-oss"))


# --- BOS, EOS and what ends a turn ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama3", "gemma", "mistral", "deepseek"])
def test_there_is_exactly_one_bos(name):
    tokenizer = family_tokenizer(name)
    for row in (THREE, Conversation(text="Once.", format="text", where="a:1"), chat("1+1=", "2")):
        ids = one(tokenizer, row).input_ids
        assert ids.count(cast(int, tokenizer.bos_token_id)) == 1
        assert ids[0] == tokenizer.bos_token_id
    assert render_prompt(tokenizer, THREE.messages[:1]).count(cast(int, tokenizer.bos_token_id)) == 1


def test_bos_is_added_where_the_template_leaves_it_to_the_tokenizer():
    special = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
    tokenizer = build_tokenizer(CHATML, special, bos="<s>", eos="</s>", adds_bos=True)
    example = one(tokenizer, chat("?", "Yes."))
    assert example.input_ids[:2] == tokenizer.convert_tokens_to_ids(["<s>", "<|im_start|>"])
    assert learned(tokenizer, example) == ["Yes.<|im_end|>"]
    prompt = render_prompt(tokenizer, [{"role": "user", "content": "?"}])
    assert prompt == example.input_ids[: len(prompt)]


def test_no_bos_is_invented_where_neither_template_nor_tokenizer_has_one():
    tokenizer = family_tokenizer("chatml")  # SmolLM2 names <|im_start|> its BOS, and puts none before a text
    assert one(tokenizer, Conversation(text="Once.", format="text")).input_ids[0] != tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("chatml", ["<|im_end|>"]),
        ("llama3", ["<|eot_id|>", "<|end_of_text|>"]),
        ("gemma", ["<end_of_turn>", "<eos>"]),
        ("mistral", ["</s>"]),
        ("qwen3", ["<|im_end|>"]),
        ("phi3", ["<|end|>", "<|endoftext|>"]),
        ("gpt-oss", ["<|return|>"]),
    ],
)
def test_generation_stops_at_what_closes_a_turn_and_at_eos(name, ends):
    tokenizer = family_tokenizer(name)
    assert end_token_ids(tokenizer) == tokenizer.convert_tokens_to_ids(ends)


def test_a_template_that_closes_answers_with_nothing_is_refused():
    plain = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    with pytest.raises(DataError, match="can't learn to stop"):
        run(build_tokenizer(plain, ("</s>",), eos="</s>"), THREE)


# --- rows without a chat template -------------------------------------------------------------------------------------


def test_of_a_prompt_and_completion_the_completion_and_eos_are_learned(base_tokenizer):
    row = chat("Capital of Norway:", " Oslo", format="prompt-completion")
    example = one(base_tokenizer, row)
    assert base_tokenizer.decode(example.input_ids) == "<s>Capital of Norway: Oslo</s>"
    assert learned(base_tokenizer, example) == [" Oslo</s>"]
    prompt = render_prompt(base_tokenizer, row.messages[:-1], format=row.format)
    assert prompt == example.input_ids[: len(prompt)]
    assert all(label == IGNORE_INDEX for label in example.labels[: len(prompt)])
    assert example.labels[len(prompt)] != IGNORE_INDEX


def test_alpaca_rows_have_their_headings_where_there_is_no_template(base_tokenizer):
    row = chat("Name a city.", "Oslo", format="alpaca")
    example = one(base_tokenizer, row)
    text = "<s>### Instruction:\nName a city.\n\n### Response:\nOslo</s>"
    assert base_tokenizer.decode(example.input_ids) == text
    assert learned(base_tokenizer, example) == ["Oslo</s>"]


@pytest.mark.parametrize("layout", ["alpaca", "prompt-completion"])
def test_pairs_become_turns_where_there_is_a_template(layout):
    tokenizer = family_tokenizer("chatml")
    assert one(tokenizer, chat("Hi", "Yo", format=layout)) == one(tokenizer, chat("Hi", "Yo"))


def test_of_plain_text_everything_and_eos_is_learned(base_tokenizer):
    example = one(base_tokenizer, Conversation(text="The cat.", format="text", where="a.txt:1"))
    assert base_tokenizer.decode(example.input_ids) == "<s>The cat.</s>"
    assert learned(base_tokenizer, example) == ["The cat.</s>"]


def test_special_tokens_that_a_text_already_has_are_not_doubled(base_tokenizer):
    example = one(base_tokenizer, Conversation(text="<s>The cat.</s>", format="text"))
    assert base_tokenizer.decode(example.input_ids) == "<s>The cat.</s>"
    assert learned(base_tokenizer, example) == ["The cat.</s>"]


def test_turns_without_a_template_are_refused_with_a_way_out(base_tokenizer):
    with pytest.raises(DataError, match=r"no chat template.*\n.*data\.chat_template.*`prompt` and `completion`"):
        run(base_tokenizer, THREE)


def test_a_template_can_be_given_as_text_or_as_a_file(base_tokenizer, tmp_path):
    (tmp_path / "chat.jinja").write_text(MINIMAL, encoding="utf-8")
    for given_as in (MINIMAL, str(tmp_path / "chat.jinja")):
        base_tokenizer.chat_template = None
        set_chat_template(base_tokenizer, given_as)
        assert learned(base_tokenizer, one(base_tokenizer, chat("Hi", "Yo"))) == ["Yo</s>"]
    set_chat_template(base_tokenizer, None)
    assert base_tokenizer.chat_template == MINIMAL
    with pytest.raises(DataError, match=r"data\.chat_template: neither .* nor a readable file"):
        set_chat_template(base_tokenizer, str(tmp_path / "chta.jinja"))


MINIMAL = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"


# --- length -----------------------------------------------------------------------------------------------------------


def test_a_long_conversation_keeps_its_front(family):
    tokenizer = family_tokenizer(family)
    whole = one(tokenizer, THREE)
    size = len(whole.input_ids) - 1
    cut = one(tokenizer, THREE, max_seq_length=size)
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:size], whole.labels[:size])
    assert cut.truncated
    assert not whole.truncated
    assert one(tokenizer, THREE, max_seq_length=size + 1) == whole


def test_wherever_a_conversation_is_cut_its_front_is_learned_as_in_the_whole(family):
    tokenizer = family_tokenizer(family)
    whole = one(tokenizer, THREE)
    first = next(at for at, label in enumerate(whole.labels) if label != IGNORE_INDEX)
    for size in range(first + 1, len(whole.input_ids)):
        cut = one(tokenizer, THREE, max_seq_length=size)
        assert (cut.input_ids, cut.labels) == (whole.input_ids[:size], whole.labels[:size])


@pytest.mark.parametrize("pairs", [10, 1000])
def test_turns_that_are_cut_off_cost_no_renderings(pairs, monkeypatch):
    calls: list[int] = []
    render = _Encoder._template

    def counted(self: Any, messages: Any, **options: Any) -> str:
        calls.append(len(messages))
        return render(self, messages, **options)

    monkeypatch.setattr(_Encoder, "_template", counted)
    row = chat(*(f"Turn {number}" for number in range(2 * pairs)))
    assert one(family_tokenizer("chatml"), row, max_seq_length=100).truncated
    assert len(calls) < 20  # where each turn takes three


def test_a_row_with_nothing_left_to_learn_is_named_and_not_trained():
    tokenizer = family_tokenizer("llama3")
    result = run(tokenizer, chat("a " * 100, "b", where="x:1"), chat("a", "b", where="x:2"), max_seq_length=40)
    assert [example.where for example in result.examples] == ["x:2"]
    assert result.nothing_to_learn == ["x:1"]


def test_a_long_text_is_cut_into_pieces_and_none_of_it_is_lost(base_tokenizer):
    text = "The cat sat on the mat. " * 20
    whole = base_tokenizer(text, add_special_tokens=False)["input_ids"]
    examples = run(base_tokenizer, Conversation(text=text, format="text", where="b.txt:1"), max_seq_length=50).examples
    assert all(example.input_ids[0] == base_tokenizer.bos_token_id for example in examples)
    assert [token for example in examples for token in example.input_ids[1:]] == [*whole, base_tokenizer.eos_token_id]
    lengths = [len(example.input_ids) for example in examples]
    assert max(lengths) <= 50
    assert max(lengths) - min(lengths) <= 1
    assert examples[0].where == f"b.txt:1 (1/{len(examples)})"
    assert not any(example.truncated for example in examples)


def test_a_repeated_row_is_repeated_in_place_and_reported_once():
    tokenizer = family_tokenizer("chatml")
    row, empty = chat("a", "b", where="x:1"), chat("a " * 100, "b", where="x:2")
    result = run(tokenizer, row, empty, row, empty, max_seq_length=60)
    assert [example.where for example in result.examples] == ["x:1", "x:1"]
    assert result.nothing_to_learn == ["x:2"]


# --- what a template can't do -----------------------------------------------------------------------------------------


def test_all_rows_that_the_template_refuses_are_named_with_its_own_reason():
    rows = [chat("?", "!", system="s", where=f"x:{number}") for number in range(1, 61)]
    with pytest.raises(DataError) as caught:
        run(family_tokenizer("gemma"), chat("?", "!"), *rows)
    message = str(caught.value)
    assert message.startswith("60 problems in the data\n")
    assert "data.chat_template" in message
    assert "x:1: the chat template refuses the turns: System role not supported" in message
    assert "x:50:" in message
    assert "x:51:" not in message
    assert "and 10 more" in message


def test_a_template_that_drops_the_system_turn_in_silence_is_caught():
    template = GEMMA.replace("{{ raise_exception('System role not supported') }}", "").replace(
        "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
    )
    family = FAMILIES["gemma"]
    tokenizer = build_tokenizer(template, family.special, bos=family.bos, eos=family.eos)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template leaves out the system turn"):
        run(tokenizer, chat("?", "!", system="Be kind."))


def test_a_template_that_leaves_answers_out_is_caught():
    tokenizer = build_tokenizer("{{ messages[0]['content'] }}</s>", ("</s>",), eos="</s>")
    with pytest.raises(DataError, match="leaves out what the assistant says"):
        run(tokenizer, THREE)


def test_a_template_whose_answers_change_the_turns_after_them_is_caught():
    template = (
        "{% for m in messages %}{{ messages[1].content | length }} {{ m.content }}"
        "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match="changes other turns with the content of turn 1"):
        run(build_tokenizer(template, ("</s>",), eos="</s>"), THREE)


def test_a_tokenizer_without_offsets_is_refused():
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(DataError, match="fast tokenizer"):
        tokenize(cast(Any, slow), [THREE], max_seq_length=10)


def test_text_without_eos_to_close_it_is_refused():
    with pytest.raises(DataError, match=r"a\.txt:1: the tokenizer has no EOS"):
        run(build_tokenizer(None, ()), Conversation(text="Once.", format="text", where="a.txt:1"))
