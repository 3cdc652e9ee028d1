"""The main path: from a recipe to an adapter, in the order in which it happens."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.config import Config, LoraSection
from qlora.data import chat
from qlora.data.prepare import Data, prepare
from qlora.data.show import show
from qlora.errors import AdapterError, DataError, MachineError
from qlora.evaluate.held_out import HeldOut
from qlora.export import adapter as export
from qlora.library.registry import Registry
from qlora.live import Live
from qlora.machine import (
    device_name,
    first_words,
    is_out_of_memory,
    memory_kind,
    peak_memory_gib,
    pick_device,
)
from qlora.model.adapters import attach, load_adapter, trainable
from qlora.model.load import Base, load_base
from qlora.model.source import Source, open_source
from qlora.output import LOG, claimed, keep_recipe, make_room
from qlora.plan.training import as_event, compared, planned_for
from qlora.recipe import dump_recipe
from qlora.redact import redacted
from qlora.report.events import EventLog, Events, readable_events
from qlora.report.terminal import Terminal
from qlora.report.trackers import Trackers
from qlora.train import checkpoint
from qlora.train.loop import Loop, Outcome, stop_requested
from qlora.train.step import choose

if TYPE_CHECKING:
    import torch


def train(
    config: Config, *, resume: bool = False, overwrite: bool = False, sinks: Sequence[Any] | None = None
) -> Outcome:
    """Fine-tune as the recipe says; what comes of it lies in `training.output_dir`.

    resume     go on from the newest checkpoint there
    overwrite  remove what an earlier run left there, once the recipe's data was read without an error
    sinks      who hears of events beside `events.jsonl`; None: the terminal and the recipe's trackers

    Raises a QLoRAError for whatever a user can mend.
    """
    config = _at_home(config)
    output, news = Path(config.training.output_dir), []
    source = open_source(config.model)
    with claimed(output, source.directory, resume=resume, overwrite=overwrite):
        found = checkpoint.newest(output, news.append) if resume else None
        # Before the model is loaded: a mistake in a row should not wait for that.
        data = prepare(config, source.tokenizer(config.model.trust_remote_code), found.today if found else None)
        _check_vocabulary(data, source, config)
        make_room(output, overwrite and not resume)
        events = _events(config, output, resume, sinks)

        def say(text: str) -> None:
            events.emit("notice", text=text)

        with contextlib.closing(events), _warnings_as_notices(say), _no_memory_as_error():
            for text in news:
                say(text)
            return _train(config, source, data, found, events, say)


def _train(
    config: Config,
    source: Source,
    data: Data,
    found: checkpoint.Checkpoint | None,
    events: Events,
    say: Callable[[str], None],
) -> Outcome:
    """The run, once its data is read and its directory is its own. found: the checkpoint to go on from."""
    device, output = pick_device(), Path(config.training.output_dir)
    before = _adapter_before(config)
    if before is not None:
        config = config.model_copy(update={"lora": before.section})
    planned = planned_for(config, source, data, output, found is not None, say)
    if planned is not None:
        config = planned.config
        events.emit("plan", **as_event(planned))
    training, recipe = config.training, dump_recipe(_without_secrets(config))
    about = _about(config, source, data, device, before)
    if found is not None:
        _say_what_changed(found, about, say)
    keep_recipe(recipe, output)
    base = load_base(config, source, device, say)
    if config.method == "full":
        model = base.model
    elif before is not None:
        model = load_adapter(base.model, str(before.path), trainable=True)
    else:
        model = attach(base.model, config.lora, training.seed)
    model.train()
    step = choose(base.model, device, config.memory, training.seed, output, say)
    packing = config.data.packing and step.isolates_documents
    if config.data.packing and not packing:
        say("rows are padded, not packed: this model would let packed documents see each other")
    with stop_requested() as requested:
        held_out = HeldOut(
            base.model,
            data.tokenizer,
            step,
            data.held_out_batches(packing),
            data.questions() if training.predict_with_generate else [],
            chat.end_token_ids(data.tokenizer),
            training,
            events.emit,
            requested,
        )
        parameters = trainable(model)
        loop = Loop(step, parameters, data.epochs(packing), training, about, events.emit, held_out.loss)
        if found is not None:
            loop.resume(found)
        checkpoint.check_room(output, training, parameters, loop.saves, export.nbytes(model, data.tokenizer))
        events.emit("start", **_start(config, base, data, loop))
        _say_what_is_left_out(data, say)
        try:
            if found is None:
                held_out.answers(0)
            outcome = loop.run(requested)
            if not outcome.stopped:
                held_out.loss(outcome.progress.step)
                held_out.answers(outcome.progress.step)
                if requested():
                    say("the last evaluation was cut short, as it was asked to stop; the adapter is whole")
            figures = _figures(loop, output, outcome.stopped) | {"rows_skipped": data.skipped}
            if planned is not None:
                figures["planned"] = compared(planned, loop, device, say)
            facts = export.facts(figures | held_out.figures, data.train.rows.fingerprint, device_name(device))
            facts |= {"base": {"fingerprint": source.fingerprint(), "revision": source.revision}}
            facts |= {"continued_from": before.sha256} if before is not None else {}
            export.write(output, model, data.tokenizer, recipe, source.name, source.revision, facts)
        except BaseException as error:
            how = "interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__
            with contextlib.suppress(Exception):  # such as a full disk, which the log would meet too
                events.emit("end", **_figures(loop, output, how))
            raise
        events.emit("end", **figures)
    return outcome


def generate(adapter: str | Path, prompt: str, *, max_new_tokens: int = 256, trust_remote_code: bool = False) -> str:
    """The answer of a trained adapter to one prompt, token by token the likeliest.

    adapter            a directory that `train` left, or any PEFT LoRA directory; its base is loaded as its recipe says
    trust_remote_code  run Python code that ships with the base; that an adapter's own recipe says so is not enough
    """
    with Live.load({"adapter": Path(adapter)}, trust_remote_code=trust_remote_code) as live:
        return live.answer([{"role": "user", "content": prompt}], max_new_tokens).text


def show_data(config: Config, samples: int = 3) -> None:
    """Print what the recipe's data is and what of it would be trained on."""
    tokenizer = open_source(config.model).tokenizer(config.model.trust_remote_code)
    data = prepare(config, tokenizer)
    show(
        data.train,
        data.held_out,
        tokenizer,
        max_seq_length=config.data.max_seq_length,
        per_device_train_batch_size=config.training.per_device_train_batch_size,
        packing=config.data.packing,
        samples=samples,
    )


def _at_home(config: Config) -> Config:
    """With the user's directory where output_dir says `~`, as other paths of a recipe may."""
    expanded = str(Path(config.training.output_dir).expanduser())
    return config.model_copy(update={"training": config.training.model_copy(update={"output_dir": expanded})})


@contextlib.contextmanager
def _no_memory_as_error() -> Iterator[None]:
    """Where it runs out outside of a step, which has ways to make do with less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = first_words(error)
        raise MachineError(
            f"{said}\n  with less on the device: memory.layers_on_device, memory.embeddings: host,"
            " memory.adapters: host; where there is a checkpoint --resume goes on from it"
        ) from error


def _events(config: Config, output: Path, resume: bool, sinks: Sequence[Any] | None) -> Events:
    log, every = output / LOG, config.training.logging_steps
    history, unread = readable_events(log) if resume and log.exists() else ([], None)
    if sinks is None:
        sinks = [Terminal(logging_steps=every, history=history)]
        if config.training.report_to:
            # Last, as sinks close last first: what a tracker loses on closing is still logged and printed.
            sinks.append(Trackers(config.training.report_to, output, config.model_dump(), every))
    written = EventLog(log)
    events = Events([written, *sinks])
    if written.set_aside is not None:
        lies = f"all of it lies in {written.set_aside.name}, what came before the damage is kept"
        events.emit("notice", text=f"{log}: is damaged; {lies}")
    elif unread is not None:
        events.emit("notice", text=unread)
    return events


@contextlib.contextmanager
def _warnings_as_notices(say: Callable[[str], None]) -> Iterator[None]:
    """What libraries warn of goes where all news goes, once each, and not across the progress bar."""
    seen: set[str] = set()

    def note(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        text = str(message)
        if text not in seen and not issubclass(category, DeprecationWarning | FutureWarning):
            seen.add(text)
            say(text)

    with warnings.catch_warnings():
        warnings.showwarning = note
        yield


def _check_vocabulary(data: Data, source: Source, config: Config) -> None:
    """Before a model is loaded: a token that it does not know would be an index out of range in its first step."""
    known = source.config(config.model.trust_remote_code).get_text_config().vocab_size
    if rows := data.outside(known):
        more = f"\n  ... and {len(rows) - 5} more" if len(rows) > 5 else ""
        listed = "\n  ".join(rows[:5])
        raise DataError(
            f"{len(rows)} rows have tokens outside the model's vocabulary of {known}: "
            f"the tokenizer of {source.name} is not this model's\n  {listed}{more}"
        )


@dataclass(frozen=True, slots=True)
class _Adapter:
    """The adapter that a run goes on from. sha256: of its weights."""

    path: Path
    section: LoraSection
    sha256: str


def _adapter_before(config: Config) -> _Adapter | None:
    """What the recipe's `adapter` names. Raises AdapterError where it is none, or `lora` asks for another."""
    if config.adapter is None:
        return None
    try:
        path = Registry().resolve(config.adapter)
    except AdapterError as error:
        raise AdapterError(f"adapter: {error}") from error
    section = export.section_of(path)
    asked = config.lora.model_dump()
    if other := [
        key for key, value in LoraSection().model_dump().items() if asked[key] not in (value, getattr(section, key))
    ]:
        keys = ", ".join(f"lora.{key}" for key in other)
        raise AdapterError(f"{keys}: the adapter {path} is made otherwise, and goes on as it is; leave `lora` out")
    return _Adapter(path, section, export.weights_sha256(path))


def _about(config: Config, source: Source, data: Data, device: torch.device, before: _Adapter | None) -> checkpoint.Run:
    """What must be the same for a checkpoint to be resumed, all that decides what the next step computes; and the rest,
    which may be another."""
    settings = config.model_dump(mode="json")
    kept = ("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "optim")
    decided = ("max_seq_length", "packing", "assistant_only_loss")
    name = settings["model"].pop("model_name_or_path")  # may have moved, as may the adapter
    settings.pop("adapter")
    rows = {key: settings["data"].pop(key) for key in decided} | data.fingerprints(config.data.packing)
    identity = {
        "method": config.method,
        "model": settings.pop("model") | {"commit": source.revision, "fingerprint": source.fingerprint()},
        "quantization": settings.pop("quantization") if config.method == "qlora" else None,
        "lora": settings.pop("lora") if config.method != "full" else None,
        "adapter": before.sha256 if before is not None else None,
        "data": rows,
        "chat_template": data.tokenizer.chat_template,
        "today": data.today,
        "training": {key: settings["training"].pop(key) for key in kept},
    }
    machine = {"device": device_name(device), "torch": version("torch"), "bitsandbytes": version("bitsandbytes")}
    return checkpoint.Run(identity, settings | {"model_name_or_path": name} | machine)


def _say_what_changed(found: checkpoint.Checkpoint, about: checkpoint.Run, say: Callable[[str], None]) -> None:
    """Before anything is loaded. Raises CheckpointError where the checkpoint is of another run."""
    if changed := checkpoint.compare(found, about):
        say(f"set otherwise than in {found.path.name}:" + "".join(f"\n  {line}" for line in changed))


def _start(config: Config, base: Base, data: Data, loop: Loop) -> dict[str, Any]:
    examples = data.train.tokenized.examples
    return {
        "steps": loop.schedule.steps,
        "first_step": loop.progress.step,
        "method": config.method,
        "order": loop.step.order,
        "model": base.source.name,
        "parameters": base.parameters,
        "trainable": sum(p.numel() for p in loop.parameters.values()),
        "four_bit_share": base.four_bit_share,
        "base_gib": base.nbytes / 2**30,
        "load_seconds": base.seconds,
        "from_cache": base.cached,
        "layers": loop.step.residency.tiers,
        "device": device_name(loop.device),
        "optimizer": type(loop.optimizer).__name__,
        "rows": len(data.train.rows.conversations),
        "rows_skipped": data.skipped,
        "tokens_per_epoch": sum(len(example.input_ids) for example in examples),
        "supervised_per_epoch": sum(example.supervised for example in examples),
        "epochs": None if config.training.max_steps > 0 else config.training.num_train_epochs,
    }


def _say_what_is_left_out(data: Data, say: Callable[[str], None]) -> None:
    if data.skipped:
        shown, more = data.problems.lines[:5], data.problems.count - 5
        listed = "".join(f"\n  {line}" for line in shown) + (f"\n  ... and {more:,} more problems" if more > 0 else "")
        say(f"{data.skipped} rows are wrong and left out (data.skip_bad_rows):{listed}")
    for side, split in (("training", data.train), ("held-out", data.held_out)):
        if rows := split.tokenized.nothing_to_learn:
            shown = ", ".join(rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
            say(f"{len(rows)} {side} rows have no token to learn and are left out: {shown}")
        if cut := sum(example.truncated for example in split.tokenized.examples):
            say(f"{cut} {side} rows are longer than data.max_seq_length and lose their end")


def _figures(loop: Loop, output: Path, stopped: str | None) -> dict[str, Any]:
    progress = loop.progress
    return {
        "step": progress.step,
        "seconds": progress.seconds,
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else 0.0,
        "peak_memory_gib": peak_memory_gib(loop.device),
        "memory_kind": memory_kind(loop.device),
        "output_dir": str(output),
        "stopped": stopped,
    }


def _without_secrets(config: Config) -> Config:
    return Config.model_validate(redacted(config.model_dump(mode="json")))
