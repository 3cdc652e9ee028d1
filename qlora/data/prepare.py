"""All of a recipe's data, ready to train on: read, tokenized, and cut into the micro-batches of each epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora.config import Config
from qlora.data import chat, source
from qlora.data.packing import Batches, batches
from qlora.data.show import Split
from qlora.errors import DataError
from qlora.model.batch import Question


@dataclass(frozen=True, slots=True)
class Data:
    """Training rows and held-out rows as tokens, and how the recipe batches them."""

    train: Split
    held_out: Split
    tokenizer: PreTrainedTokenizerBase
    config: Config

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
                tuple(chat.render_prompt(self.tokenizer, row.messages[:-1], format=row.format)),
                row.messages[-2]["content"] if len(row.messages) > 1 else "",
                row.messages[-1]["content"],
            )
            for row in self.held_out.rows.conversations
            if row.messages
        ]

    @property
    def largest_id(self) -> int:
        """The largest token id there is."""
        both = (*self.train.tokenized.examples, *self.held_out.tokenized.examples)
        return max(max(example.input_ids) for example in both)

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


def prepare(config: Config, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Read and tokenize all that the recipe names. Raises DataError."""
    chat.set_chat_template(tokenizer, config.data.chat_template)
    sides = [
        Split(
            rows,
            chat.tokenize(
                tokenizer,
                rows.conversations,
                max_seq_length=config.data.max_seq_length,
                assistant_only_loss=config.data.assistant_only_loss,
            ),
        )
        for rows in source.read_splits(config.data, seed=config.training.seed)
    ]
    if not sides[0].tokenized.examples:
        rows = ", ".join(sides[0].tokenized.nothing_to_learn[:5])
        raise DataError(
            f"no row has a token to learn within data.max_seq_length {config.data.max_seq_length}: {rows}, ..."
        )
    return Data(sides[0], sides[1], tokenizer, config)
