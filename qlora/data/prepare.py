"""All of a recipe's data, ready to train on: read, tokenized, and cut into the micro-batches of each epoch."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora.config import Config
from qlora.data import chat, source
from qlora.data.packing import Batches, batches
from qlora.data.problems import Problems
from qlora.data.show import Split
from qlora.errors import DataError
from qlora.model.batch import Question


@dataclass(frozen=True, slots=True)
class Data:
    """Training rows and held-out rows as tokens, and how the recipe batches them.

    problems  what is wrong with the rows that data.skip_bad_rows left out
    today     the date, "2026-07-31", that the chat template wrote; None where it writes none
    """

    train: Split
    held_out: Split
    tokenizer: PreTrainedTokenizerBase
    config: Config
    problems: Problems = field(default_factory=Problems)
    today: str | None = None

    @property
    def skipped(self) -> int:
        """Rows that are wrong and left out."""
        return len(self.problems.rows)

    def fingerprints(self, packing: bool) -> dict[str, str]:
        """SHA-256 of what a run learns from, in the order in which it does: a run that goes on must find them equal.

        rows    what the training rows say, as they were written
        tokens  their ids and labels: another tokenizer, chat template, date or length makes others
        order   the examples of each micro-batch of the first epoch: another seed or another way of packing
        """
        tokens, order = hashlib.sha256(), hashlib.sha256()
        for example in self.train.tokenized.examples:
            tokens.update(array("q", [len(example.input_ids), *example.input_ids, *example.labels]).tobytes())
        for indices in self._first(packing).plan:
            order.update(array("q", [len(indices), *indices]).tobytes())
        return {"rows": self.train.rows.fingerprint, "tokens": tokens.hexdigest(), "order": order.hexdigest()}

    def _first(self, packing: bool) -> Batches:
        return self._batches(self.train, packing, self.config.training.per_device_train_batch_size, 0)

    def epochs(self, packing: bool) -> Callable[[int], Batches]:
        """epoch -> its micro-batches. packing: False pads, whatever the recipe says."""

        @lru_cache(maxsize=2)  # the loop asks for the running epoch at every step
        def of(epoch: int) -> Batches:
            return self._batches(self.train, packing, self.config.training.per_device_train_batch_size, epoch)

        return of

    def held_out_batches(self, packing: bool) -> Batches:
        """The held-out rows, in order; a pack holds max_seq_length tokens, as attention grows with its square."""
        size = 1 if packing and self.config.data.packing else self.config.training.per_device_eval_batch_size
        return self._batches(self.held_out, packing, size, None)

    def questions(self) -> list[Question]:
        """The held-out conversations as prompts with the answer that the data has."""
        return [
            Question(
                tuple(chat.render_prompt(self.tokenizer, row.messages[:-1], format=row.format, today=self._date)),
                row.messages[-2]["content"] if len(row.messages) > 1 else "",
                row.messages[-1]["content"],
            )
            for row in self.held_out.rows.conversations
            if row.messages
        ]

    @property
    def _date(self) -> date | None:
        return date.fromisoformat(self.today) if self.today else None

    def outside(self, vocabulary: int) -> list[str]:
        """The rows that have a token which a model of so many does not know: "file:line: token id 50000 (`<x>`)"."""
        both = (*self.train.tokenized.examples, *self.held_out.tokenized.examples)
        largest = ((example.where, max(example.input_ids)) for example in both)
        return [
            f"{where}: token id {largest_id} (`{self.tokenizer.convert_ids_to_tokens(largest_id)}`)"
            for where, largest_id in largest
            if largest_id >= vocabulary
        ]

    def _batches(self, split: Split, packing: bool, size: int, epoch: int | None) -> Batches:
        pad: Any = self.tokenizer.pad_token_id
        return batches(
            split.tokenized.examples,
            max_seq_length=self.config.data.max_seq_length,
            per_device_train_batch_size=size,
            pad_token_id=0 if pad is None else pad,  # masked, so any token will do
            packing=packing and self.config.data.packing,
            seed=None if epoch is None else self.config.training.seed,
            epoch=epoch or 0,
        )


def prepare(config: Config, tokenizer: PreTrainedTokenizerBase, today: date | None = None) -> Data:
    """Read and tokenize all that the recipe names.

    today  the date for chat templates that write one; a run that goes on gives that of its first day. None: this day

    Raises DataError, once for all rows that can't be read, understood or rendered, unless data.skip_bad_rows leaves
    them out and some remain on each side that the recipe asks for.
    """
    today = today or date.today()
    problems = Problems(config.data.skip_bad_rows)
    chat.set_chat_template(tokenizer, config.data.chat_template)
    sides: list[Split] = []
    for rows in source.read_splits(config.data, seed=config.training.seed, problems=problems):
        tokenized = chat.tokenize(
            tokenizer,
            rows.conversations,
            max_seq_length=config.data.max_seq_length,
            assistant_only_loss=config.data.assistant_only_loss,
            problems=problems,
            today=today,
        )
        sides.append(Split(source.without(rows, tokenized.refused), tokenized))
    problems.check(left=bool(sides[0].rows.conversations))
    if not sides[1].rows.conversations and (config.data.eval_datasets or config.data.eval_fraction):
        # Without them the run would go on and nobody would miss its evaluation.
        wanted = "eval_datasets" if config.data.eval_datasets else "eval_fraction"
        shown = "\n".join(f"  {line}" for line in problems.lines[: problems.shown])
        raise DataError(f"data.{wanted}: without the rows that are wrong, no row is left to hold out\n{shown}")
    if not sides[0].tokenized.examples:
        rows = ", ".join(sides[0].tokenized.nothing_to_learn[:5])
        raise DataError(
            f"no row has a token to learn within data.max_seq_length {config.data.max_seq_length}: {rows}, ..."
        )
    dated = sides[0].tokenized.dated
    return Data(sides[0], sides[1], tokenizer, config, problems, today.isoformat() if dated else None)
