"""Held-out rows: the loss is the truth however they are grouped, and answers are counted to the letter."""

import pytest
import torch

from qlora.config import MemoryConfig, TrainingConfig
from qlora.data.chat import Example, end_token_ids, render_prompt
from qlora.data.packing import batches
from qlora.errors import HostMemoryError
from qlora.evaluate import held_out
from qlora.evaluate.generation import answer, exact
from qlora.model.adapters import attach, trainable
from qlora.model.batch import Question
from qlora.model.load import load_base
from qlora.model.source import open_source
from qlora.report.events import EventLog, read_events
from qlora.train.step import choose
from tests.conftest import random_batch
from tests.tiny import PAIRS, chat_model

CPU = torch.device("cpu")


def examples(count=21):
    """Rows of many lengths, with a different share of supervised tokens each."""
    found = []
    for number in range(count):
        batch = random_batch(1, 4 + 3 * number % 17, vocab=300, seed=number, supervised=0.1 + 0.04 * number)
        found.append(Example(batch.input_ids[0].tolist(), batch.labels[0].tolist(), f"row{number}"))
    return found


@pytest.fixture
def adapted(checkpoint, recipe):
    """A model in training, with an adapter that already does something and drops half of its inputs."""
    config = recipe(chat_model(checkpoint), "lora", lora={"lora_dropout": 0.5})
    source = open_source(config.model)
    base = load_base(config, source, CPU).model
    model = attach(base, config.lora, seed=0).train()
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return base, source.tokenizer()


def held(adapted, order="layer-major", size=3, packing=False, rows=(), questions=(), **training):
    """A HeldOut over rows in micro-batches, and the events it will tell."""
    base, tokenizer = adapted
    step = choose(base, CPU, MemoryConfig(order=order), 0, ".", print)
    cut = batches(rows, max_seq_length=64, per_device_train_batch_size=size, pad_token_id=0, packing=packing, seed=None)
    events = []
    config = TrainingConfig(**training)

    def emit(kind, **fields):
        events.append({"event": kind, **fields})

    ends = end_token_ids(tokenizer)
    return held_out.HeldOut(base, tokenizer, step, cut, questions, ends, config, emit), events


@pytest.mark.parametrize("order", ["layer-major", "standard"])
@pytest.mark.parametrize(("size", "group", "packing"), [(1, 8, False), (3, 8, False), (21, 1, False), (1, 2, True)])
def test_the_loss_is_the_mean_over_all_tokens_however_rows_are_grouped(
    order, size, group, packing, adapted, monkeypatch
):
    model, _ = adapted
    monkeypatch.setattr(held_out, "GROUP", group)
    scored, events = held(adapted, order, size, packing, rows=examples())
    scored.loss(7)
    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in examples():  # one by one, through the model as transformers has it
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
            labels = torch.tensor(row.labels[1:])
            total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
            tokens += row.supervised
    [event] = events
    assert (event["event"], event["step"], event["eval_tokens"]) == ("evaluation", 7, tokens)
    # Sums of fp32 in another order, over a few hundred tokens.
    assert event["eval_loss"] == scored.figures["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_scoring_and_answering_leave_the_model_in_the_mode_in_which_it_was(training, adapted):
    model, tokenizer = adapted
    question = Question(tuple(render_prompt(tokenizer, [{"role": "user", "content": "Who?"}])), "Who?", "Ada")
    scored, _ = held(adapted, rows=examples(3), questions=[question], generation_max_length=2)
    model.train(training)
    scored.loss(1)
    scored.answers(1)
    assert {module.training for module in model.modules()} == {training}


def test_nothing_held_out_is_nothing_said(adapted):
    scored, events = held(adapted)
    scored.loss(1)
    scored.answers(1)
    assert events == [] and scored.figures == {}


# Where memory runs out


class Small:
    """A step on a device that holds so many tokens at once, and twice as many each time it is relieved."""

    def __init__(self, step, tokens, relieved=(), error=None):
        self.step, self.tokens, self.relieved = step, tokens, list(relieved)
        self.device, self.whole_model = step.device, step.whole_model
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    def evaluate(self, batches):
        if sum(batch.input_ids.numel() for batch in batches) > self.tokens:
            raise self.error
        return self.step.evaluate(batches)

    def relieve(self):
        if not self.relieved:
            return None
        self.tokens *= 2
        return self.relieved.pop(0)


def texts(events):
    return [event["text"] for event in events if event["event"] == "notice"]


def test_held_out_rows_that_do_not_fit_together_are_scored_one_after_the_other_and_that_is_said_once(adapted):
    scored, events = held(adapted, rows=examples())
    scored.loss(1)
    scored.step = Small(scored.step, 63)  # micro-batches of 3 rows have at most 63 tokens
    scored.loss(2)
    scored.loss(3)
    first, _, second, third = events
    assert texts(events) == [
        "step 2: CUDA out of memory; the held-out rows are scored with one micro-batch at a time",
    ]
    assert third["eval_tokens"] == second["eval_tokens"] == first["eval_tokens"]
    assert third["eval_loss"] == second["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-5)


def test_held_out_rows_are_scored_with_what_else_can_be_had_of_the_device(adapted):
    scored, events = held(adapted, rows=examples())
    scored.step = Small(scored.step, 16, ["memory.activations: host", "memory.layers_on_device: 0 (2 fewer)"])
    scored.loss(1)
    assert [text.rsplit(" with ")[-1] for text in texts(events)] == [
        "one micro-batch at a time",
        "memory.activations: host",
        "memory.layers_on_device: 0 (2 fewer)",
    ]
    assert events[-1]["event"] == "evaluation" and scored.figures


@pytest.mark.parametrize("error", [None, MemoryError("CUDA out of memory"), HostMemoryError("CUDA out of memory")])
@pytest.mark.parametrize("training", [True, False])
def test_a_run_goes_on_without_the_loss_of_held_out_rows_that_do_not_fit(adapted, training, error):
    scored, events = held(adapted, rows=examples())
    scored.loss(1)
    model, _ = adapted
    model.train(training)
    scored.step = Small(scored.step, 0, error=error)
    scored.loss(40)
    assert texts(events)[-1] == "step 40: the held-out rows are not scored: CUDA out of memory"
    assert scored.figures == {}  # the one of step 1 is another model's
    assert {module.training for module in model.modules()} == {training}


def test_an_error_that_is_not_of_memory_is_raised(adapted):
    scored, events = held(adapted, rows=examples())
    scored.step = Small(scored.step, 0, error=RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        scored.loss(1)
    assert events == []


@pytest.mark.parametrize(("fit", "tried"), [(1, [7, 3, 1]), (0, [7, 3, 1])])
def test_answers_that_do_not_fit_are_given_fewer_at_a_time_or_not_and_that_is_said(adapted, monkeypatch, fit, tried):
    _, tokenizer = adapted
    questions = [Question(tuple(ids), "", "") for ids in prompts(tokenizer)]
    sizes = []

    def answers(*args):
        sizes.append(args[6])
        if args[6] > fit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return answer(*args)

    monkeypatch.setattr(held_out, "answer", answers)
    scored, events = held(adapted, questions=questions, generation_max_length=2, per_device_eval_batch_size=7)
    scored.answers(0)
    assert sizes == tried
    first, *more = texts(events)
    assert first == "step 0: CUDA out of memory; the held-out rows are answered with fewer of them at a time"
    assert more == ([] if fit else ["step 0: the held-out rows are not answered: CUDA out of memory"])
    assert len(scored.figures) == fit
    scored.answers(9)
    assert sizes == [*tried, 1]


def test_a_sample_fits_a_line_of_the_log_however_long_its_texts_are(adapted, tmp_path):
    _, tokenizer = adapted
    question = Question(tuple(prompts(tokenizer)[0]), "\0" * 2_000_000, "\0" * 2_000_000)
    scored, events = held(adapted, questions=[question] * 3, generation_max_length=1)
    scored.answers(1)
    log = EventLog(tmp_path / "events.jsonl")
    log(events[0])
    assert len(read_events(log.path)[0]["samples"]) == 3


def prompts(tokenizer):
    return [render_prompt(tokenizer, [{"role": "user", "content": asked}]) for asked, _ in PAIRS]


def test_an_answer_does_not_depend_on_what_is_answered_beside_it(adapted):
    model, tokenizer = adapted
    ends = end_token_ids(tokenizer)
    alone = [answer(model, CPU, tokenizer, [prompt], ends, 8, batch_size=1)[0] for prompt in prompts(tokenizer)]
    assert len(set(alone)) > 1
    assert answer(model, CPU, tokenizer, prompts(tokenizer), ends, 8, batch_size=3) == alone


def test_an_answer_ends_before_its_end_token_or_after_max_new_tokens(adapted):
    model, tokenizer = adapted
    model.eval()
    [prompt, *_] = prompts(tokenizer)
    found = []
    with torch.no_grad():
        for _ in range(5):
            found.append(model(input_ids=torch.tensor([[*prompt, *found]])).logits[0, -1].argmax().item())
    never = next(token for token in range(300) if token not in found)
    got = answer(model, CPU, tokenizer, [prompt], [never], 5, batch_size=1)
    assert got == [tokenizer.decode(found, skip_special_tokens=True)]
    before = found[: found.index(found[2])]
    stopped = answer(model, CPU, tokenizer, [prompt], [never, found[2]], 5, batch_size=1)
    assert stopped == [tokenizer.decode(before, skip_special_tokens=True)] != got


def test_right_answers_are_counted_and_three_are_shown(adapted):
    model, tokenizer = adapted
    asked = prompts(tokenizer)
    really = answer(model, CPU, tokenizer, asked, end_token_ids(tokenizer), 8, batch_size=1)
    expected = [text if number in (0, 2, 4) else f"not {text}" for number, text in enumerate(really)]
    questions = [
        Question(tuple(ids), prompt, text) for ids, (prompt, _), text in zip(asked, PAIRS, expected, strict=True)
    ]
    scored, events = held(adapted, questions=questions, generation_max_length=8, per_device_eval_batch_size=3)
    scored.answers(0)
    scored.answers(9)
    assert [(event["step"], event["correct"], event["rows"]) for event in events] == [(0, 3, 7), (9, 3, 7)]
    assert scored.figures == {"exact_match_before": 3 / 7, "exact_match": 3 / 7}
    shown = [{"prompt": PAIRS[n][0], "expected": expected[n], "got": really[n]} for n in range(3)]
    assert events[0]["samples"] == shown


@pytest.mark.parametrize(
    ("expected", "got", "right"),
    [("a b", " a b\n", True), ("a b", "a  b", False), ("a b", "A b", False), ("a", "ab", False), ("", " ", True)],
)
def test_exact_is_to_the_letter_but_for_blanks_around(expected, got, right):
    assert exact(expected, got) is right
