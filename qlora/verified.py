"""Whether an export answers as the adapter did: loaded anew as others load it, asked the held-out questions, greedily.

    live       the base as the recipe has it in memory, the adapter on it: what was trained
    peft       transformers' base and PEFT's adapter; under `method: qlora` the base in bitsandbytes' four bits
    merged     transformers alone
    gguf       llama.cpp
    gguf-lora  llama.cpp, on a .gguf of the base
    ollama     not run: what its Modelfile says, beside the template and the end tokens that were learned

Two implementations round differently. Where two tokens are nearly as likely the other one comes out, and the answer
goes on from there: a difference is explained where the live model itself had its own token at most `NEAR` logits
above the other, that is, less than 1.65 times as likely; a logit in bf16 is exact to 0.06 or 0.125 at the sizes that
they have. An export fails where

  - it answers more than `POINTS` of the questions less or more than the live adapter does (one question, where that
    is more),
  - it has the live weights in 16 bits, and fewer than `EQUAL` of its answers are the same or explained,
  - of a conversation it makes another prompt than training did, or
  - fewer than `EQUAL` of the answers that the live adapter ends are ended by it.

A base .gguf of other bits than the live one's is another base: its answers differ without being worse, so that the
second of these is not asked of it, but shown.
"""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig
from transformers.utils import logging

from qlora.config import Config
from qlora.data import chat
from qlora.data.formats import Conversation
from qlora.errors import DataError
from qlora.evaluate.generation import answer_ids, exact
from qlora.export.llama_cpp import Agreement, Answer, Run, compare
from qlora.export.ollama import GoTemplate
from qlora.machine import give_back_memory
from qlora.model.source import Source

FILE = "verified.json"
MOST = 200  # questions: a CPU takes minutes for them
NEAR = 0.5
POINTS = 0.02
EQUAL = 0.9

_SHOWN = 3  # differences of an export that are printed
_WIDTH = 100
_MORE = 32  # tokens in which an answer that went another way may come to its end


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """messages: turns up to the one that is answered; prompt: their token ids; expected: the answer in the data."""

    messages: Sequence[dict[str, str]]
    prompt: Sequence[int]
    expected: str


@dataclasses.dataclass(frozen=True, slots=True)
class Verified:
    """How one export did beside the live adapter.

    kind       of export
    loaded_by  what read it
    exact      answers that are the data's to the letter; None where it was not run
    same       whether its weights are the live ones in 16 bits, so that its answers must be the same
    agreement  with the live adapter's answers
    wrong      what else is wrong with it
    """

    kind: str
    loaded_by: str
    exact: int | None
    same: bool
    agreement: Agreement
    wrong: tuple[str, ...] = ()

    @property
    def explained(self) -> int:
        """Answers that differ where the live model was as good as undecided."""
        return sum(each.gap is not None and each.gap <= NEAR for each in self.agreement.differences)

    def problems(self, live_exact: int) -> list[str]:
        """Why it is not the adapter that was trained; empty where it is. live_exact: the live adapter's `exact`."""
        found, n, of = list(self.wrong), self.agreement.prompts, self.agreement
        if of.rendered < n:
            found.append(f"{n - of.rendered} of {n} conversations become another prompt than in training")
        if self.exact is None:
            return found
        if abs(self.exact - live_exact) > max(POINTS * n, 1):
            found.append(f"{self.exact} of {n} answers are right, {live_exact} of the live adapter's")
        if self.same and of.equal + self.explained < EQUAL * n:
            found.append(f"{n - of.equal - self.explained} of {n} answers differ where the live adapter was decided")
        if of.stopped < EQUAL * of.ended:
            found.append(f"{of.ended - of.stopped} of {of.ended} answers do not end by themselves")
        return found


class Asked:
    """The held-out questions with the live adapter's answers, for exports to be compared with.

    questions  with prompts as the adapter was trained on
    live       the model with the adapter, evaluating
    ends       tokens that end an answer
    most       tokens of an answer
    rows       questions that are answered side by side
    """

    def __init__(
        self, questions: Sequence[Question], live: Any, tokenizer: Any, ends: Sequence[int], most: int, rows: int
    ) -> None:
        self.questions, self.ends = questions, ends
        self._live, self._tokenizer, self._most, self._rows = live, tokenizer, most, rows
        self.answers = [
            Answer(question.messages, question.prompt, ids)
            for question, ids in zip(questions, self._greedy(live, most), strict=True)
        ]
        self.exact = self.right([answer.ids for answer in self.answers])
        self.ended = sum(bool(answer.ids) and answer.ids[-1] in ends for answer in self.answers)

    def by_transformers(self, model: Any, directory: Path) -> list[Run]:
        """What a model says that transformers loaded, and its tokenizer makes of the messages."""
        tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        runs = []
        for question, ids in zip(self.questions, self._greedy(model, self._most + _MORE), strict=True):
            rendered = list(question.prompt)
            if tokenizer.chat_template:
                rendered = tokenizer.apply_chat_template(question.messages, add_generation_prompt=True)["input_ids"]
            stopped = bool(ids) and ids[-1] in self.ends
            runs.append(Run(rendered, ids[:-1] if stopped else ids, stopped))
        return runs

    def compared(self, kind: str, loaded_by: str, runs: Sequence[Run], same: bool) -> Verified:
        """An export's answers beside the live adapter's."""
        most = [len(a.ids) + (_MORE if a.ids and a.ids[-1] in self.ends else 0) for a in self.answers]
        cut = [r if len(r.ids) < n else Run(r.rendered, r.ids[:n], False) for r, n in zip(runs, most, strict=True)]
        agreement = compare(self.answers, cut, self.ends, self._logits)
        return Verified(kind, loaded_by, self.right([run.ids[: self._most] for run in runs]), same, agreement)

    def modelfile(self, path: Path, template: GoTemplate | None, stops: Sequence[str], bos: str) -> Verified:
        """What a Modelfile gives Ollama. template, stops: what it should say; bos: what Ollama puts before it."""
        text = path.read_text(encoding="utf-8")
        files = re.findall(r"(?m)^(?:FROM|ADAPTER) (.*)$", text)
        wrong = [f"{name} is not there" for name in files if not (path.parent / name).is_file()]
        said = [json.loads(each) for each in re.findall(r"(?m)^PARAMETER stop (.*)$", text)]
        if said != list(dict.fromkeys(stops)):
            wrong.append(f"stops at {said}, not at {list(stops)}")
        rendered = len(self.questions)
        if template is not None:
            if f'TEMPLATE """{template.text()}"""' not in text:
                wrong.append("has another template")
            prompts = [
                self._tokenizer(bos + template.render(q.messages), add_special_tokens=False) for q in self.questions
            ]
            rendered = sum(ids["input_ids"] == list(q.prompt) for ids, q in zip(prompts, self.questions, strict=True))
        agreement = Agreement(len(self.questions), 0, rendered, 0, 0, ())
        by = "not run" if template is not None else "not run; it has no template"
        return Verified("ollama", by, None, False, agreement, tuple(wrong))

    def right(self, answers: Sequence[Sequence[int]]) -> int:
        """How many of the answers are the data's to the letter."""
        texts = (self._tokenizer.decode(ids, skip_special_tokens=True) for ids in answers)
        return sum(exact(q.expected, text) for q, text in zip(self.questions, texts, strict=True))

    def token(self, number: int | None) -> str:
        """A token for people; None: the end."""
        return "the end" if number is None or number in self.ends else repr(self._tokenizer.decode([number]))

    @torch.no_grad()
    def _logits(self, ids: list[int]) -> torch.Tensor:
        return self._live(input_ids=torch.tensor([ids], device=self._live.device)).logits[0, -1].float()

    def _greedy(self, model: Any, most: int) -> list[list[int]]:
        """Token ids of the answers, each with the token that ended it where one did."""
        prompts = [question.prompt for question in self.questions]
        pad = self._tokenizer.pad_token_id
        return answer_ids(model, model.device, pad, prompts, self.ends, most, self._rows)


def questions(rows: Sequence[Conversation], tokenizer: Any, where: Path) -> list[Question]:
    """The first MOST held-out conversations that have an answer. Raises DataError where there are none."""
    found = [
        Question(row.messages[:-1], chat.render_prompt(tokenizer, row.messages[:-1], format=row.format), said)
        for row in rows
        if len(row.messages) > 1 and (said := row.messages[-1]["content"])
    ]
    if not found:
        raise DataError(
            f"{where}: its recipe holds out no rows with an answer, and --verify asks those\n"
            "  give it `data.eval_datasets`, or export without --verify"
        )
    return found[:MOST]


@contextmanager
def plain_peft(adapter: Path, config: Config, source: Source, device: torch.device) -> Iterator[Any]:
    """An adapter as anyone loads it: transformers, bitsandbytes and PEFT.

    transformers does not quantize a .gguf base while it reads it, so that such a one is written as safetensors first.
    """
    how: dict[str, Any] = {"dtype": getattr(torch, config.model.dtype), "device_map": {"": device}}
    how["trust_remote_code"] = config.model.trust_remote_code
    with TemporaryDirectory() as scratch, _quiet():
        directory = source.directory
        if source.gguf is not None:
            unpacked = {"gguf_file": source.gguf.name, "quantization_config": GgufConfig(dequantize=True)}
            directory = Path(scratch)
            AutoModelForCausalLM.from_pretrained(source.directory, dtype=how["dtype"], **unpacked).save_pretrained(
                scratch
            )
        if config.method == "qlora":
            four_bit = config.quantization.model_dump(mode="json", exclude={"bnb_4bit_compute_dtype"})
            dtype = getattr(torch, config.quantization.bnb_4bit_compute_dtype)
            how["quantization_config"] = BitsAndBytesConfig(**four_bit, bnb_4bit_compute_dtype=dtype)
        base: Any = AutoModelForCausalLM.from_pretrained(directory, **how)
        if config.method == "qlora" and device.type == "cpu":  # where each token would expand every weight anew
            base = base.dequantize()
        model = PeftModel.from_pretrained(base, str(adapter)).eval()
    yield model
    del base, model
    give_back_memory(device)


@contextmanager
def plain(merged: Path, device: torch.device) -> Iterator[Any]:
    """A merged model as anyone loads it: transformers."""
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(merged, device_map={"": device})
    yield model.eval()
    del model
    give_back_memory(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers and PEFT tell programmers, and without bars between the lines of a table."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # A .gguf file's bar is tqdm's own, which writes there whatever it is told.
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def report(asked: Asked, found: Sequence[Verified], say: Callable[[str], None]) -> dict[str, list[str]]:
    """Print what was found as a table of at most 100 columns. Returns what is wrong, by export."""
    n = len(asked.questions)
    by = max(len(each.loaded_by) for each in found)
    row = f"{{:<10}}{{:<{max(by, 18) + 2}}}{{:>13}}{{:>13}}{{:>13}}{{:>10}}".format
    say(row("export", "loaded by", "exact match", "same answer", "same prompt", "ended").rstrip())
    say(row("live", "what was trained", f"{asked.exact}/{n}", "", "", f"{asked.ended}/{n}"))
    for each in found:
        of, ran = each.agreement, each.exact is not None
        figures = (f"{each.exact}/{n}", f"{of.equal}/{n}") if ran else ("", "")
        say(row(each.kind, each.loaded_by, *figures, f"{of.rendered}/{n}", f"{of.stopped}/{of.ended}" if ran else ""))
    problems = {each.kind: wrong for each in found if (wrong := each.problems(asked.exact))}
    for each in found:
        differences = sorted(each.agreement.differences, key=lambda d: -1e9 if d.gap is None else -d.gap)
        if differences:
            other = "" if each.same else "; its base is in other bits than the live one"
            say(f"\n{each.kind}: {len(differences)} differ, {each.explained} of them by at most {NEAR} logits{other}")
        for d in differences[:_SHOWN]:
            gap = "" if d.gap is None else f", {d.gap:.3g} logits below"
            line = (
                f"question {d.prompt + 1}, token {d.at + 1}: {asked.token(d.found)} for {asked.token(d.expected)}{gap}"
            )
            say("  " + textwrap.shorten(line, _WIDTH - 2, placeholder=" ..."))
        if len(differences) > _SHOWN:
            say(f"  and {len(differences) - _SHOWN} more, in {FILE}")
    return problems


def figures(asked: Asked, found: Sequence[Verified], problems: dict[str, list[str]]) -> str:
    """All of it as JSON."""
    live = {"questions": len(asked.questions), "exact": asked.exact, "ended": asked.ended}
    limits = {"near_logits": NEAR, "points": POINTS, "equal": EQUAL}
    exports = {
        each.kind: dataclasses.asdict(each) | {"explained": each.explained, "problems": problems.get(each.kind, [])}
        for each in found
    }
    return json.dumps({"live": live, "limits": limits, "exports": exports}, indent=1) + "\n"
