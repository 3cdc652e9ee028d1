"""From conversations to token ids, and which of the tokens are learned.

A conversation is rendered by the model's own chat template and tokenized once, as a whole: the ids are those that
inference sees. What the assistant says is found in the rendered text, not in the template, because stock templates do
not mark it:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
                                                             ^^^^^^^^^^^^^^^ learned

    begins  where the rendering of the turns before, with the generation prompt, ends: what inference is given
    ends    where a rendering with a placeholder for this turn's content is the same again, and then the token that
            closes the turn, without which a model never learns to stop

The newline after <|im_end|> is not learned: generation has stopped by then, and the next prompt brings the newline.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from qlora.data import limits
from qlora.data.formats import Conversation
from qlora.data.limits import CHARACTERS, LimitReached, Limits, refuse_powers
from qlora.data.problems import Problems
from qlora.errors import DataError
from qlora.model.batch import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]
Span = tuple[int, int]  # characters [start, end) of a rendered text

# Stands for a turn's content. Plain ASCII, so that no template trims or escapes it.
_PLACEHOLDER = "qlora-placeholder-7f3a"
# Handed to the tokenizer at once: enough for its threads, little memory for the offsets.
_CHUNK = 1000  # rows
_CHUNK_CHARACTERS = 16 << 20

# The formats that templates ask for are written out in them: "%d %b %Y".
_NOW = re.compile(r"""\bstrftime_now\(\s*(["'])([^"'\\]*)\1\s*\)""")


@dataclass(frozen=True, slots=True)
class Example:
    """One document, ready to be batched.

    input_ids  token ids
    labels     as long: the token's own id where it is learned, else IGNORE_INDEX; never shifted. The first is always
               IGNORE_INDEX, as nothing predicts it
    where      "file:line" of its row
    truncated  whether tokens were cut off at max_seq_length
    """

    input_ids: list[int]
    labels: list[int]
    where: str
    truncated: bool = False

    @property
    def supervised(self) -> int:
        """Tokens that are learned."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Examples to train on, and the rows that a person should hear of.

    nothing_to_learn  rows left out because no supervised token is left, mostly by truncation
    rewritten         rows in which an earlier assistant turn is rendered otherwise than it was when it was the last one
                      (Qwen3 takes its thoughts away); it is learned as it stands in the whole conversation. Turns
                      that are cut off are not looked at
    refused           rows that the chat template can't render
    dated             whether the template writes today's date
    """

    examples: list[Example] = field(default_factory=list)
    nothing_to_learn: list[str] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)
    refused: list[Conversation] = field(default_factory=list)
    dated: bool = False


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[Conversation],
    *,
    max_seq_length: int,
    assistant_only_loss: bool = True,
    problems: Problems | None = None,
    today: date | None = None,
) -> Tokenized:
    """Token ids and labels of every conversation, in order.

    Turns go through the chat template. Without one, "prompt-completion" and "alpaca" rows are prompt, completion and
    EOS, of which the prompt is not learned. Of plain text every token is learned, the EOS after it too.
    Each document has exactly one BOS where the template or the tokenizer puts one, and none where neither does.

    At most `max_seq_length` tokens: a longer conversation keeps its front, and a longer text becomes several examples
    of about equal length, each with the BOS, so that nothing of it is lost.

    problems  what is wrong already; gains the rows that the template can't render, for the caller to check. Where it
              refuses the data anyway, the other rows are looked through for what is wrong with them, and not kept
    today     the date for templates that write one; None is the day of the call

    Raises DataError, once for all rows that the template can't render, where no `problems` are given; or where there is
    no template, no EOS, or no fast tokenizer (the offsets of tokens in the text are known to no other); and as soon as
    the template takes more time or memory than any needs.
    """
    encoder = _Encoder(tokenizer, today)
    caller_checks = problems is not None
    problems = Problems() if problems is None else problems
    result = Tokenized(dated=encoder.dated)
    done: dict[int, list[Example]] = {}  # by identity: a row that is repeated by its weight is tokenized once
    conversations = list(conversations)
    for rendered in _rendered_chunks(encoder, {id(row): row for row in conversations}.values(), problems, result):
        encoded = encoder.encode([text.text for _, text in rendered])
        found: list[tuple[Conversation, _Rendered, list[int], list[Span]]] = []
        with encoder.limits:
            for (row, text), (ids, offsets) in zip(rendered, encoded, strict=True):
                with _noting(row, problems, result):
                    kept = encoder.kept(text.text, ids, offsets, max_seq_length)
                    found.append((row, encoder.with_spans(row, text, kept), ids, offsets))
        if problems.refused:
            continue
        for row, text, ids, offsets in found:
            labels = _labels(ids, offsets, text.spans if assistant_only_loss else [(0, len(text.text))])
            done[id(row)] = examples = encoder.examples(row, text, ids, labels, max_seq_length)
            if text.rewritten:
                result.rewritten.append(row.where)
            if not examples:
                result.nothing_to_learn.append(row.where)
    if not caller_checks:
        problems.check(left=len(result.refused) < len(conversations))
    result.examples.extend(example for row in conversations for example in done.get(id(row), ()))
    return result


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, format: str = "messages", today: date | None = None
) -> list[int]:
    """Token ids of a prompt, up to where the assistant's answer begins: the very ids that training saw there.

    messages  turns up to the one to be answered
    format    of the rows that the model was trained on; it matters where there is no chat template. Then there is one
              turn, the prompt
    today     as for `tokenize`

    Raises DataError if the template refuses the messages, or there is none and they are more than a prompt.
    """
    encoder = _Encoder(tokenizer, today)
    try:
        text = encoder.prompt(list(messages), format)
    except (_TemplateFails, LimitReached) as error:
        raise DataError(f"the chat template can't render the prompt: {error}") from error
    [(ids, _)] = encoder.encode([text])
    return [*encoder.bos_ids, *encoder.without_bos(ids)]


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids at which generation stops: the token that closes an assistant turn in the chat template, then EOS."""
    encoder = _Encoder(tokenizer)
    ends = [encoder.closing_id] if encoder.closing_id is not None else []
    return list(dict.fromkeys([*ends, *encoder.eos_ids]))


def set_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
    """Give the tokenizer another template: Jinja text, or the path of a file with it. None keeps its own."""
    if chat_template is None:
        return
    if "{" not in chat_template:
        try:
            path = Path(chat_template).expanduser()
            if path.exists() and not path.is_file():
                raise OSError(f"{chat_template} is not a file")
            chat_template = path.read_text(encoding="utf-8")
        except (OSError, ValueError, RuntimeError) as error:  # not UTF-8, a NUL in the name, a ~user that is not there
            raise DataError(f"data.chat_template: neither Jinja text nor a readable file: {error}") from error
    tokenizer.chat_template = chat_template


class _TemplateFails(Exception):
    """A row that this template can't render, and why."""


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A text to tokenize, the characters of it that are learned, and whether EOS is still to close it.

    A conversation's spans are found when it is known how much of it is kept: `_Encoder.with_spans`.
    """

    text: str
    spans: list[Span]
    add_eos: bool
    rewritten: bool = False


class _Encoder:
    """A tokenizer with what its template and its special tokens were found to do."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, today: date | None = None) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} can't tell which token comes from where in the text; the model needs a "
                "fast tokenizer (a tokenizer.json)"
            )
        self.tokenizer = tokenizer
        self.eos_ids = [] if tokenizer.eos_token_id is None else [cast(int, tokenizer.eos_token_id)]
        bos = cast("int | None", tokenizer.bos_token_id)
        bare, dressed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        # Slices, as a tokenizer may have no token for "a".
        adds_bos = bos is not None and cast("list[int]", dressed)[:1] == [bos] != cast("list[int]", bare)[:1]
        self.bos_ids = [bos] if adds_bos and bos is not None else []
        names = [str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip()]
        # Longest first; (?!) matches nothing, for a tokenizer without special tokens.
        self.special = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
        self.limits = Limits()
        self.template, self.dated = self._chosen_template(today or date.today())
        self.closing, self.closing_id = self._closing() if self.template else ("", None)

    def encode(self, texts: list[str]) -> Iterator[tuple[list[int], list[Span]]]:
        """ids and character offsets of each text, without the special tokens that the tokenizer would add."""
        if not texts:
            return iter(())
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,  # its warning about long rows: they are truncated and counted here
        )
        return zip(cast(Any, encoded["input_ids"]), cast(Any, encoded["offset_mapping"]), strict=True)

    def without_bos(self, ids: list[int]) -> list[int]:
        """ids less a BOS that the template or the text begins with, where `bos_ids` are put before all ids anyway."""
        return ids[1:] if self.bos_ids and ids[:1] == self.bos_ids else ids

    def render(self, row: Conversation) -> _Rendered:
        if (row.format == "text" or self.closing_id is None) and not self.eos_ids:
            raise DataError(f"{row.where}: the tokenizer has no EOS token, so a model can't learn where to stop")
        if row.format == "text":
            return _Rendered(row.text, [(0, len(row.text))], add_eos=True)
        if self.closing_id is None:
            prompt = self.prompt(row.messages[:-1], row.format)
            text = prompt + row.messages[-1]["content"]
            return _Rendered(text, [(len(prompt), len(text))], add_eos=True)
        return _Rendered(self._template(row.messages), [], add_eos=False)

    def kept(self, text: str, ids: list[int], offsets: list[Span], max_seq_length: int) -> int:
        """Characters of the text up to the end of the last token that `examples` keeps of a conversation."""
        cut = len(ids) - len(self.without_bos(ids)) + max_seq_length - len(self.bos_ids)
        return offsets[cut - 1][1] if 0 < cut < len(ids) else len(text)

    def prompt(self, messages: list[dict[str, str]], layout: str) -> str:
        """The text up to where the answer begins."""
        if self.closing_id is not None:
            return self._template(messages, add_generation_prompt=True)
        if [turn["role"] for turn in messages] != ["user"]:
            raise DataError(
                "the tokenizer has no chat template, as is usual for base models\n"
                "  set `data.chat_template` (Jinja or a file), or write rows as `prompt` and `completion` or as `text`"
            )
        asked = messages[0]["content"]
        return f"### Instruction:\n{asked}\n\n### Response:\n" if layout == "alpaca" else asked

    def examples(
        self, row: Conversation, rendered: _Rendered, ids: list[int], labels: list[int], max_seq_length: int
    ) -> list[Example]:
        """Add BOS and EOS and cut to length; nothing where nothing can be learned."""
        if rendered.add_eos and ids[-1:] != self.eos_ids:
            ids, labels = [*ids, *self.eos_ids], [*labels, *self.eos_ids]
        body = self.without_bos(ids)
        body_labels = labels[len(ids) - len(body) :]
        room = max_seq_length - len(self.bos_ids)
        pieces = max(1, -(-len(body) // room)) if row.format == "text" else 1
        found: list[Example] = []
        for piece in range(pieces):
            start, end = len(body) * piece // pieces, len(body) * (piece + 1) // pieces
            learned = [*[IGNORE_INDEX] * len(self.bos_ids), *body_labels[start : min(end, start + room)]]
            found.append(
                Example(
                    input_ids=[*self.bos_ids, *body[start : min(end, start + room)]],
                    labels=[IGNORE_INDEX, *learned[1:]],
                    where=row.where if pieces == 1 else f"{row.where} ({piece + 1}/{pieces})",
                    truncated=end - start > room,
                )
            )
        return [example for example in found if example.supervised]

    def _template(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        def render() -> Any:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )

        try:
            with self.limits:
                text = cast(str, self.limits.call(render))
            text.encode()
        except LimitReached:
            raise
        # A template is a program: it may divide by zero, index what is not there or write half a surrogate pair.
        except Exception as error:
            raise _TemplateFails(f"the chat template refuses the turns: {_reason(error)}") from error
        if len(text) > CHARACTERS:
            raise _TemplateFails(f"the chat template makes {len(text):,} characters of it, which no model needs")
        return text

    def _chosen_template(self, today: date) -> tuple[str | None, bool]:
        """The template, and whether it writes the date, which then is `today` in it.

        The date stands in its text, as transformers lets no function of ours in. A template that makes up the format of
        its date stays as it is.
        """
        if not self.tokenizer.chat_template:
            return None, False
        try:
            template = self.tokenizer.get_chat_template()
            refuse_powers(template)
        except ValueError as error:  # several templates and none is the default
            raise DataError(f"data.chat_template: {error}") from error
        except LimitReached as error:
            raise DataError(f"the chat template is at fault: {error}") from error
        midnight = datetime(today.year, today.month, today.day)
        template, found = _NOW.subn(lambda match: repr(midnight.strftime(match[2])), template)
        return template, bool(found)

    def _closing(self) -> tuple[str, int]:
        """What the template writes after an assistant turn, up to and with the first token that can't be content."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PLACEHOLDER}]
        try:
            _, found, tail = self._template(turns).partition(_PLACEHOLDER)
        except (_TemplateFails, LimitReached) as error:
            raise DataError(f"the chat template can't render a question and an answer: {error}") from error
        if not found:
            raise DataError("the chat template leaves out what the assistant says; set another `data.chat_template`")
        token = self.special.search(tail)
        if token is None:
            raise DataError(
                "the chat template closes an assistant turn with no special token, so a model can't learn to stop\n"
                "  set a `data.chat_template` that writes {{ eos_token }} after what the assistant says"
            )
        return tail[: token.end()], cast(int, self.tokenizer.convert_tokens_to_ids(token.group()))

    def with_spans(self, row: Conversation, rendered: _Rendered, kept: int) -> _Rendered:
        """A rendered conversation with its assistant turns, each with the token that closes it.

        kept  characters; turns that begin behind them are not looked for, as nothing of them is trained on

        Each turn takes renderings of the whole, so that a row of very many has a limit of its own.
        """
        if rendered.add_eos:
            return rendered
        messages, text = row.messages, rendered.text
        end_of_patience = time.monotonic() + limits.SECONDS

        def look_at_the_clock() -> None:
            if time.monotonic() > end_of_patience:
                raise _TemplateFails(
                    f"its {len(messages):,} turns take the chat template more than {limits.SECONDS:g} s; split the row"
                )

        for turn in messages:
            if turn["role"] == "system" and turn["content"].strip() not in text:
                raise _TemplateFails("the chat template leaves out the system turn; put it into the user's first turn")
            look_at_the_clock()
        spans: list[Span] = []
        rewritten = False
        for number, turn in enumerate(messages):
            if turn["role"] != "assistant":
                continue
            if spans and spans[-1][1] >= kept:
                break
            look_at_the_clock()
            marked = [*messages[:number], {**turn, "content": _PLACEHOLDER}, *messages[number + 1 :]]
            before, found, after = self._template(marked).partition(_PLACEHOLDER)
            if not found or _PLACEHOLDER in after or not text.endswith(after):
                raise _TemplateFails(f"the chat template changes other turns with the content of turn {number}")
            end = len(text) - len(after)
            prompt = self._generation_prompt(messages[:number])
            if prompt is not None and text.startswith(prompt) and len(prompt) <= end:
                start = len(prompt)
            elif text.startswith(before):  # DeepSeek-R1 asks for "<think>" and then leaves thoughts out: content only
                start = len(before)
            else:
                raise _TemplateFails(f"turn {number} is not found after what the chat template asks the model with")
            last = number + 1 == len(messages)
            if text.startswith(self.closing, end):
                end += len(self.closing)
            elif last:
                raise _TemplateFails(f"the chat template does not close turn {number} with {self.closing!r} as others")
            elif token := self.special.match(text, end):  # gpt-oss closes the last turn otherwise than those before
                end = token.end()
            spans.append((start, end))
            if not (last or rewritten):
                rewritten = not self._template(messages[: number + 1]).startswith(text[:end])
        return replace(rendered, spans=spans, rewritten=rewritten)

    def _generation_prompt(self, messages: list[dict[str, str]]) -> str | None:
        """What inference would give the model here; None where it can't ask (an assistant that speaks first)."""
        try:
            return self._template(messages, add_generation_prompt=True) if messages else None
        except _TemplateFails:
            return None


def _labels(ids: list[int], offsets: list[Span], spans: list[Span]) -> list[int]:
    """ids where a token ends inside a span, else IGNORE_INDEX.

    So a token across the start of a span is learned: it holds the answer's first letters. Tokenizers that trim offsets
    (byte-level with `trim_offsets`) give white space none: such a token stands at the end of its white space, so it is
    learned if that is behind the span's start and not behind its end.
    """
    labels = [IGNORE_INDEX] * len(ids)
    ends = [end for _, end in offsets]
    for start, end in spans:
        learned = slice(bisect_right(ends, start), bisect_right(ends, end))
        labels[learned] = ids[learned]
    return labels


def _rendered_chunks(
    encoder: _Encoder, rows: Iterable[Conversation], problems: Problems, result: Tokenized
) -> Iterator[list[tuple[Conversation, _Rendered]]]:
    """The rows as texts, as many at once as are to be tokenized at once; those that can't be rendered are noted."""
    waiting = iter(rows)
    more = True
    while more:
        chunk: list[tuple[Conversation, _Rendered]] = []
        characters, more = 0, False
        with encoder.limits:
            for row in waiting:
                more = True
                with _noting(row, problems, result):
                    chunk.append((row, text := encoder.render(row)))
                    characters += len(text.text)
                if len(chunk) >= _CHUNK or characters >= _CHUNK_CHARACTERS:
                    break
        yield chunk


@contextmanager
def _noting(row: Conversation, problems: Problems, result: Tokenized) -> Iterator[None]:
    """Note the row if the template can't render it."""
    try:
        yield
    except _TemplateFails as error:
        problems.add(row.where, str(error), advice="`data.chat_template` sets another chat template")
        result.refused.append(row)
    except LimitReached as error:  # every row would take as long
        raise DataError(f"{row.where}: the chat template is at fault: {error}") from error


def _reason(error: Exception) -> str:
    """What a template's error says: its own words where it was raised on purpose, else also what kind it is."""
    kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
    text = " ".join(str(error).split())
    return kind + (text if len(text) <= 300 else text[:297] + "...")
