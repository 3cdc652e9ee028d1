"""A base in memory with many adapters on it: which of them answers changes in milliseconds, nothing is loaded again.

    with Live.load({"support": Path("outputs/support"), "legal": Path("outputs/legal")}) as live:
        live.use("legal")
        print(live.answer([{"role": "user", "content": "..."}], max_new_tokens=256).text)

The base is loaded once, as the adapters' recipes say; they must agree on it. Each adapter brings its own tokenizer and
chat template. Several questions to one adapter are answered side by side in one batch, each with its own length, way of
choosing tokens and end; transformers' `generate` does it, and what is particular to a row comes in at its seams for
logits and for stopping.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft.functional import set_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.generation.stopping_criteria import StoppingCriteriaList

from qlora.config import Config
from qlora.data import chat
from qlora.errors import AdapterError, DataError, MachineError, ModelError
from qlora.evaluate.generation import evaluating
from qlora.evaluate.held_out import GROUP
from qlora.export import adapter as export
from qlora.library.files import check_recorded
from qlora.library.registry import base_when_added
from qlora.machine import first_words, free_bytes, is_out_of_memory, pick_device
from qlora.model.adapters import add_adapter, changes_base, load_adapter
from qlora.model.batch import Batch
from qlora.model.load import Base, load_base
from qlora.model.source import Source, open_source, read_tokenizer
from qlora.recipe import load_recipe
from qlora.train.step import Step, choose

BASE = "base"  # what the base alone is called where a name is needed

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and how it is to be answered.

    prompt          token ids up to where the answer begins: `Live.prompt`
    max_new_tokens  at most
    temperature     0: always the likeliest token; above, tokens are drawn, the more freely the higher it is
    top_p           drawn from the likeliest tokens that together have this share, (0, 1]
    seed            of the draw; None: another one each time
    stop            texts that end the answer, which has no part of them
    on_text         is told each piece of the answer as it is known; together they are its text
    requested       whether to stop here; asked before each token
    """

    prompt: Sequence[int]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    on_text: Callable[[str], None] = lambda text: None
    requested: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered.

    ended   "stop": by itself or at a stop text; "length": at the limit; "cut": because it was asked to
    tokens  that were made, the one that ended it included
    """

    text: str
    ended: Literal["stop", "length", "cut"]
    prompt_tokens: int
    tokens: int


@dataclass(frozen=True, slots=True)
class _Voice:
    """How one adapter, or the base, reads and writes. key: its name in PEFT; no layer has one of the base's."""

    key: str
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", tuple(chat.end_token_ids(self.tokenizer)))


class _Switches:
    """Those modules that an adapter can be on, where PEFT's `set_adapter` takes a model.

    They are one in eighteen: in a model of 30 layers with adapters on seven matrices each a swap takes 6 ms through
    them, and 19 through all modules.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._found = tuple(m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper))

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return self._found


class Live:
    """A loaded base and its adapters. Use it with `with`, and from one thread at a time.

    names    of the adapters, in the order in which they were given
    context  tokens that prompt and answer may have together; None where the model does not say
    """

    _step: Step

    def __init__(self, base: Base, device: torch.device, voices: Mapping[str, _Voice], alone: str | None) -> None:
        """voices: by name, the base's under BASE. alone: why the base cannot be had without its adapter."""
        self.names = tuple(name for name in voices if name != BASE)
        self.context = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
        self._base, self._device, self._voices, self._alone = base, device, voices, alone
        self._switches: _Switches | None = None
        self._active = self.names[0]
        self._ready, self._whole = ExitStack(), ExitStack()

    @classmethod
    def load(
        cls,
        adapters: Mapping[str, Path],
        *,
        base: str | None = None,
        trust_remote_code: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> Live:
        """Load the base that the adapters name, and each adapter under its name. The first one is in use.

        adapters           name -> a directory that `train` left, or any PEFT LoRA directory
        base               where the base lies now, instead of where the recipes say
        trust_remote_code  run Python code that ships with the base; that an adapter's own recipe says so is not enough

        Raises AdapterError where they are not for the same base, or cannot share one; and as loading does.
        """
        for name, path in adapters.items():
            check_name(name)
            check_recorded(path)
        configs = {name: recipe_of(path, trust_remote_code) for name, path in adapters.items()}
        if base is not None:
            configs = {name: _on(config, base) for name, config in configs.items()}
        config, source = _common_base(adapters, configs)
        device = pick_device()
        loaded = load_base(config, source, device, say)
        voices: dict[str, _Voice] = {}
        peft, altering = None, []
        for name, path in adapters.items():
            key = f"adapter{len(voices)}" if voices else "default"
            if peft is not None:
                add_adapter(peft, str(path), key)
            elif config.method != "full":
                peft = load_adapter(loaded.model, str(path))
            if peft is not None and changes_base(cast(Any, peft.peft_config[key])):
                altering.append(path)
            voices[name] = _Voice(key, tokenizer_of(path, source, configs[name]))
        if altering and len(voices) > 1:
            raise AdapterError(
                f"{altering[0]}: its `bias` or `init_lora_weights` changes the base, so that it cannot share one with"
                " other adapters\n  use it alone"
            )
        alone = "it was trained whole" if config.method == "full" else "its adapter changes it" if altering else None
        if alone is None:
            voices[BASE] = _Voice(BASE, source.tokenizer(config.model.trust_remote_code))
        live = cls(loaded, device, voices, alone)
        live._switches = None if peft is None else _Switches(peft)
        live._step = choose(loaded.model, device, config.memory, config.training.seed, ".", say=lambda text: None)
        live._ready.enter_context(evaluating(loaded.model))
        live._ready.callback(live._whole.close)
        live._make_whole()
        live.use(live.names[0])
        return live

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of what answering took; the weights go with the object."""
        self._ready.close()

    @property
    def active(self) -> str | None:
        """The adapter in use; None: the base alone."""
        return None if self._active == BASE else self._active

    @property
    def has_base(self) -> bool:
        """Whether the base can answer alone."""
        return self._alone is None

    def use(self, name: str | None) -> None:
        """From here on this adapter answers; None: the base alone. Raises AdapterError where there is no such."""
        wanted = BASE if name is None else name
        if wanted not in self._voices:
            if name is None:
                raise AdapterError(f"{self._base.source.name}: cannot answer alone: {self._alone}")
            raise AdapterError(f"{name}: no such adapter here; there are {', '.join(self.names)}")
        if self._switches is not None:
            set_adapter(self._switches, self._voices[wanted].key, inference_mode=True)
        self._active = wanted

    def loss(self, batches: Sequence[Batch]) -> float:
        """Mean loss of whoever is in use, over the supervised tokens of micro-batches."""
        total = tokens = 0.0
        self._whole.close()  # the step visits the layers one at a time
        try:
            for first in range(0, len(batches), GROUP):
                some = [batches[i].to(self._device) for i in range(first, min(first + GROUP, len(batches)))]
                scored = self._step.evaluate(some)
                total, tokens = total + scored.loss * scored.supervised, tokens + scored.supervised
        finally:
            self._make_whole()
        return total / max(tokens, 1)

    def _make_whole(self) -> None:
        """Let the model's own forward work, as answers take it."""
        self._whole.enter_context(self._step.whole_model(free_bytes(self._device) / 2))

    def prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the answer of whoever is in use begins.

        Raises DataError where the chat template refuses it, or it leaves no room for an answer.
        """
        tokenizer = self._voices[self._active].tokenizer
        layout = "messages" if tokenizer.chat_template else "prompt-completion"
        ids = chat.render_prompt(tokenizer, messages, format=layout)
        if self.context is not None and len(ids) >= self.context:
            raise DataError(f"the prompt has {len(ids):,} tokens; the model takes {self.context:,}, the answer's too")
        return ids

    def answer(self, messages: Sequence[dict[str, str]], max_new_tokens: int = 256, **how: Any) -> Answer:
        """The answer of whoever is in use to one conversation. how: what else a Question has."""
        return self.answers([Question(self.prompt(messages), max_new_tokens, **how)])[0]

    @torch.no_grad()
    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers of whoever is in use, in one batch.

        Side by side a question is computed in matrices of another shape than alone, which can change the last bits of
        a logit and so, where two tokens are as likely, which of them is taken.

        Raises MachineError where memory does not suffice.
        """
        voice = self._voices[self._active]
        rows = [_Row(question, voice, self.context) for question in questions]
        pad = cast(int, voice.tokenizer.pad_token_id if voice.tokenizer.pad_token_id is not None else voice.ends[0])
        longest = max(len(row.question.prompt) for row in rows)
        ids = torch.full((len(rows), longest), pad, device=self._device)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):  # answers begin where prompts end, so padding goes to the left
            ids[i, longest - len(row.question.prompt) :] = torch.tensor(row.question.prompt, device=self._device)
            mask[i, longest - len(row.question.prompt) :] = 1
        how = GenerationConfig(
            max_new_tokens=max(row.most for row in rows),
            do_sample=False,
            eos_token_id=list(voice.ends),
            pad_token_id=pad,
            use_cache=True,
        )

        def drawn(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            for i, row in enumerate(rows):
                if row.question.temperature > 0 and row.ended is None:
                    scores[i] = row.draw(scores[i : i + 1])
            return scores

        def done(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            for row, token in zip(rows, ids[:, -1].tolist(), strict=True):
                row.take(token)
            return torch.tensor([row.ended is not None for row in rows], device=ids.device)

        generate: Any = self._base.model.generate
        try:
            generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=how,
                logits_processor=LogitsProcessorList([cast(Any, drawn)]),
                stopping_criteria=StoppingCriteriaList([cast(Any, done)]),
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise MachineError(
                f"{first_words(error)}\n  shorter or fewer questions at once take less memory"
            ) from error
        return [row.answer() for row in rows]


class _Row:
    """One answer as it grows."""

    def __init__(self, question: Question, voice: _Voice, context: int | None) -> None:
        self.question, self._voice = question, voice
        room = question.max_new_tokens if context is None else context - len(question.prompt)
        self.most = min(question.max_new_tokens, room)
        self.ended: Literal["stop", "length", "cut"] | None = None
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._told, self._held = "", ""  # pieces told; what may be the beginning of a stop text
        self._generator = torch.Generator()
        if question.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(question.seed % 2**63)
        self._warpers = LogitsProcessorList()
        if question.temperature > 0:
            self._warpers.append(TemperatureLogitsWarper(float(question.temperature)))
            if question.top_p < 1:
                self._warpers.append(TopPLogitsWarper(question.top_p))

    def draw(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [1, vocabulary] -> [vocabulary] of which the drawn token alone can be chosen.

        Each row draws with a generator of its own, on the CPU: a seed gives one answer, whoever asks beside it.
        """
        shares = torch.softmax(cast(Any, self._warpers)(None, scores.float().cpu())[0], dim=-1)
        token = int(torch.multinomial(shares, 1, generator=self._generator))
        chosen = torch.full_like(scores[0], -torch.inf)
        chosen[token] = 0
        return chosen

    def take(self, token: int) -> None:
        """One more token."""
        if self.ended is not None:  # the others go on, this row is padded
            return
        self._tokens.append(token)
        if token in self._voice.ends:
            self._end("stop")
            return
        backend = cast(Any, self._voice.tokenizer).backend_tokenizer
        self._tell(self._stream.step(backend, token) or "")
        if self.ended is not None:
            return
        if self.question.requested():
            self._end("cut")
        elif len(self._tokens) >= self.most:
            self._end("length")

    def answer(self) -> Answer:
        if self.ended is None:
            self._end("length")
        assert self.ended is not None
        return Answer(self._told, self.ended, len(self.question.prompt), len(self._tokens))

    def _tell(self, piece: str) -> None:
        text = self._held + piece
        if not text:
            return
        found = [at for at in (text.find(stop) for stop in self.question.stop) if at >= 0]
        if found:
            self._held = ""
            self._say(text[: min(found)])
            self.ended = "stop"
            return
        longest = max(
            (n for stop in self.question.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
        )
        self._held = text[len(text) - longest :]
        self._say(text[: len(text) - longest])

    def _say(self, text: str) -> None:
        if text:
            self._told += text
            self.question.on_text(text)

    def _end(self, why: Literal["stop", "length", "cut"]) -> None:
        """Tell what was held back: bytes of a character that never came whole, the beginning of a stop text."""
        said = self._tokens[:-1] if why == "stop" else self._tokens
        whole = str(self._voice.tokenizer.decode(said, skip_special_tokens=True))
        known = self._told + self._held
        self._held = ""
        self._say(whole[len(self._told) :] if whole.startswith(known) else known[len(self._told) :])
        self.ended = why


def check_name(name: str) -> None:
    """Raise AdapterError where an adapter cannot be called so."""
    if not _NAME.fullmatch(name) or name == BASE:
        raise AdapterError(
            f"{name!r}: not a name for an adapter: letters, digits and . _ - , at most 64, and not `{BASE}`"
        )


def named(arguments: Sequence[str]) -> dict[str, Path]:
    """`NAME=DIR`, or `DIR` alone under the directory's own name, as name -> directory. Raises AdapterError."""
    found: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or "/" in name:
            name, path = Path(argument).expanduser().resolve().name, argument
        check_name(name)
        if name in found:
            raise AdapterError(f"{name}: two adapters of this name; call one of them otherwise: NAME={path}")
        found[name] = Path(path).expanduser()
    return found


def recipe_of(adapter: Path, trust_remote_code: bool = False) -> Config:
    """The recipe that lies beside an adapter; for one from elsewhere, the defaults on its base."""
    recipe = adapter / "recipe.yaml"
    if recipe.is_file():
        config = load_recipe(recipe, [f"model.trust_remote_code={str(trust_remote_code).lower()}"])
        if not trust_remote_code and load_recipe(recipe).model.trust_remote_code:
            raise AdapterError(
                f"{recipe}: wants to run Python code that ships with {config.model.model_name_or_path}; it can do"
                " anything\n  if you trust it: --trust-remote-code"
            )
        return _where_it_lies(config, adapter) if config.method != "full" else _on(config, str(adapter))
    base, revision = export.base_of(adapter)
    config = Config.model_validate(
        {
            "model": {"model_name_or_path": base, "revision": revision, "trust_remote_code": trust_remote_code},
            "data": {"datasets": [{"path": "none"}]},
        }
    )
    return _where_it_lies(config, adapter)


def _where_it_lies(config: Config, adapter: Path) -> Config:
    """For an adapter in a library: on the base that was there when it was added, where its own path leads nowhere."""
    if Path(config.model.model_name_or_path).expanduser().exists():
        return config
    base = base_when_added(adapter)
    return config if base is None else _on(config, base)


def _on(config: Config, base: str) -> Config:
    moved = config.model.model_copy(update={"model_name_or_path": base, "revision": None})
    return config.model_copy(update={"model": moved})


def _common_base(adapters: Mapping[str, Path], configs: Mapping[str, Config]) -> tuple[Config, Source]:
    """The recipe to load the base by, and the base. Raises AdapterError that says which adapter differs, and in what.

    An adapter from elsewhere has no recipe; it goes with whatever form of the base the others were trained on.
    """
    if not adapters:
        raise AdapterError("no adapter was given")
    first = next((name for name in adapters if (adapters[name] / "recipe.yaml").is_file()), next(iter(adapters)))
    config = configs[first]
    source = _source_of(adapters[first], config)
    if config.method == "full" and len(adapters) > 1:
        raise AdapterError(f"{adapters[first]}: a whole model, not an adapter: it has no base to share")
    weights = source.fingerprint() if len(adapters) > 1 else ""
    for name, other in configs.items():
        if name == first:
            continue
        theirs = _source_of(adapters[name], other)
        if theirs.fingerprint() != weights:
            same = "\n  the names are the same, the weights are not" if theirs.name == source.name else ""
            raise AdapterError(
                f"{adapters[name]}: for another base than {adapters[first]}:"
                f" {_called(theirs)}, not {_called(source)}{same}"
            )
        if (adapters[name] / "recipe.yaml").is_file() and (lines := _forms_differ(config, other)):
            raise AdapterError(
                f"{adapters[name]}: trained on another form of the base than {adapters[first]}:\n  "
                + "\n  ".join(lines)
            )
    return config, source


def _forms_differ(config: Config, other: Config) -> list[str]:
    """What of two recipes gives the same weights another form in memory."""

    def form(config: Config) -> dict[str, Any]:
        four_bit = config.quantization.model_dump(mode="json") if config.method == "qlora" else {}
        return {"method": config.method, "model.dtype": config.model.dtype} | {
            f"quantization.{key}": value for key, value in four_bit.items()
        }

    mine, theirs = form(config), form(other)
    keys = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
    return [f"{key}: {theirs.get(key)}, not {mine.get(key)}" for key in keys][: 1 if "method" in keys else None]


def _called(source: Source) -> str:
    return source.name + (f" at {source.revision}" if source.revision else "")


def _source_of(adapter: Path, config: Config) -> Source:
    try:
        return open_source(config.model)
    except ModelError as error:
        raise ModelError(f"{adapter}: its base cannot be opened: {error}") from error


def tokenizer_of(adapter: Path, source: Source, config: Config) -> PreTrainedTokenizerBase:
    """With the template that the adapter was trained with."""
    if (adapter / "tokenizer_config.json").is_file():
        return read_tokenizer(adapter)
    tokenizer = source.tokenizer(config.model.trust_remote_code)
    chat.set_chat_template(tokenizer, config.data.chat_template)
    return tokenizer
