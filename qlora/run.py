"""The main path: from a recipe to an adapter, in the order in which it happens."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora.config import Config
from qlora.data import chat
from qlora.data.prepare import Data, prepare
from qlora.data.show import show
from qlora.errors import AdapterError, CheckpointError, DataError, QLoRAError, TrainingError
from qlora.evaluate.generation import answer
from qlora.evaluate.held_out import HeldOut
from qlora.export import adapter as export
from qlora.machine import device_name, free_bytes, memory_kind, peak_memory_gib, pick_device
from qlora.model.adapters import attach, load_adapter, trainable
from qlora.model.load import Base, load_base
from qlora.model.source import open_source
from qlora.plan.training import as_event, compared, planned_for
from qlora.recipe import dump_recipe, load_recipe
from qlora.report.events import EventLog, Events, read_events
from qlora.report.terminal import Terminal
from qlora.report.trackers import Trackers
from qlora.train import checkpoint
from qlora.train.loop import Loop, Outcome
from qlora.train.step import choose


def train(
    config: Config, *, resume: bool = False, overwrite: bool = False, sinks: Sequence[Any] | None = None
) -> Outcome:
    """Fine-tune as the recipe says; what comes of it lies in `training.output_dir`.

    resume     go on from the newest checkpoint there
    overwrite  remove what an earlier run left there, once the recipe's data was read without an error
    sinks      who hears of events beside `events.jsonl`; None: the terminal and the recipe's trackers

    Raises a QLoRAError for whatever a user can mend.
    """
    training, device = config.training, pick_device()
    output = Path(training.output_dir)
    _refuse_to_mix(output, resume, overwrite)
    source = open_source(config.model)
    tokenizer = source.tokenizer(config.model.trust_remote_code)
    data = prepare(config, tokenizer)  # before the model is loaded: a mistake in a row should not wait for that
    _make_room(output, overwrite and not resume)
    events = _events(config, output, resume, sinks)

    def say(text: str) -> None:
        events.emit("notice", text=text)

    with contextlib.closing(events), _warnings_as_notices(say):
        planned = planned_for(config, source, data, output, resume, say)
        if planned is not None:
            config = planned.config
            events.emit("plan", **as_event(planned))
        base = load_base(config, source, device, say)
        _check_vocabulary(data, base)
        model = base.model if config.method == "full" else attach(base.model, config.lora, training.seed)
        model.train()
        step = choose(base.model, device, config.memory, training.seed, output, say)
        packing = config.data.packing and step.isolates_documents
        if config.data.packing and not packing:
            say("rows are padded, not packed: this model would let packed documents see each other")
        held_out = HeldOut(
            base.model,
            tokenizer,
            step,
            data.held_out_batches(packing),
            data.questions() if training.predict_with_generate else [],
            chat.end_token_ids(tokenizer),
            training,
            events.emit,
        )
        parameters, identity = trainable(model), _identity(config, base, data)
        loop = Loop(step, parameters, data.epochs(packing), training, identity, events.emit, held_out.loss)
        if resume:
            loop.resume()
        events.emit("start", **_start(config, base, data, loop))
        _say_what_is_left_out(data, say)
        if not resume:
            held_out.answers(0)
        try:
            outcome = loop.run()
        except QLoRAError as error:
            events.emit("end", **_figures(loop, output, type(error).__name__))
            raise
        if not outcome.stopped:  # who asked it to stop does not want to wait for these
            held_out.loss(outcome.progress.step)
            held_out.answers(outcome.progress.step)
        figures = _figures(loop, output, outcome.stopped)
        if planned is not None:
            figures["planned"] = compared(planned, loop, device, say)
        facts = export.facts(figures | held_out.figures, data.train.rows.fingerprint, device_name(device))
        export.write(output, model, tokenizer, dump_recipe(config), source.name, source.revision, facts)
        events.emit("end", **figures)
    return outcome


def generate(adapter: str | Path, prompt: str, *, max_new_tokens: int = 256) -> str:
    """The answer of a trained adapter to one prompt, token by token the likeliest.

    adapter  a directory that `train` left, or any PEFT LoRA directory; its base is loaded as its recipe says
    """
    config = _recipe_of(Path(adapter))
    source, device = open_source(config.model), pick_device()
    base = load_base(config, source, device)
    tokenizer = _tokenizer_of(Path(adapter))  # with the template that the adapter was trained with
    if tokenizer is None:
        tokenizer = source.tokenizer(config.model.trust_remote_code)
        chat.set_chat_template(tokenizer, config.data.chat_template)
    if config.method != "full":
        load_adapter(base.model, str(adapter))
    layout = "messages" if tokenizer.chat_template else "prompt-completion"
    ids = chat.render_prompt(tokenizer, [{"role": "user", "content": prompt}], format=layout)
    ends = chat.end_token_ids(tokenizer)
    step = choose(base.model, device, config.memory, config.training.seed, ".", say=lambda text: None)
    with step.whole_model(free_bytes(device) / 2):
        return answer(base.model, device, tokenizer, [ids], ends, max_new_tokens, batch_size=1)[0]


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


def _refuse_to_mix(output: Path, resume: bool, overwrite: bool) -> None:
    """Two runs in one directory, or a run to resume where there is none, are the user's to sort out."""
    earlier = checkpoint.checkpoints(output)
    if resume and not earlier:
        raise CheckpointError(f"{output}: has no checkpoint to resume from; without --resume the run starts there")
    if (earlier or export.is_there(output)) and not resume and not overwrite:
        newest = f" (its newest checkpoint is {earlier[-1].name})" if earlier else ""
        going_on = "--resume goes on with it, " if earlier else ""
        raise CheckpointError(
            f"{output}: holds a run already{newest}\n"
            f"  {going_on}--overwrite removes it; or set another training.output_dir"
        )


def _make_room(output: Path, overwrite: bool) -> None:
    """Make the output directory, without what a killed run left unfinished, or without all of an earlier one."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        leftover = list(output.glob(checkpoint.UNFINISHED))
        if overwrite:
            leftover += checkpoint.checkpoints(output)
            (output / "events.jsonl").unlink(missing_ok=True)
            export.remove(output)
        for path in leftover:
            shutil.rmtree(path)
    except OSError as error:
        raise TrainingError(f"{output}: training.output_dir cannot be used: {error.strerror}") from error


def _events(config: Config, output: Path, resume: bool, sinks: Sequence[Any] | None) -> Events:
    log, every = output / "events.jsonl", config.training.logging_steps
    if sinks is None:
        history = read_events(log) if resume and log.exists() else ()
        sinks = [Terminal(logging_steps=every, history=history)]
        if config.training.report_to:
            # Last, as sinks close last first: what a tracker loses on closing is still logged and printed.
            sinks.append(Trackers(config.training.report_to, output, config.model_dump(), every))
    return Events([EventLog(log), *sinks])


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


def _check_vocabulary(data: Data, base: Base) -> None:
    rows: Any = base.model.get_input_embeddings().num_embeddings
    if data.largest_id >= rows:
        raise DataError(
            f"token id {data.largest_id} is outside the model's vocabulary of {rows}: "
            f"the tokenizer of {base.source.name} is not this model's"
        )


def _identity(config: Config, base: Base, data: Data) -> dict[str, Any]:
    """What must be the same for a checkpoint to be resumed: all that decides what the next step computes."""
    chosen = config.model_dump(mode="json")
    kept = ("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "optim")
    return {
        "method": config.method,
        "model": chosen["model"] | {"commit": base.source.revision},
        "quantization": chosen["quantization"] if config.method == "qlora" else None,
        "lora": chosen["lora"] if config.method != "full" else None,
        "data": {key: chosen["data"][key] for key in ("max_seq_length", "packing", "assistant_only_loss")},
        "rows": data.train.rows.fingerprint,
        "chat_template": data.tokenizer.chat_template,
        "training": {key: chosen["training"][key] for key in kept},
    }


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
        "tokens_per_epoch": sum(len(example.input_ids) for example in examples),
        "supervised_per_epoch": sum(example.supervised for example in examples),
        "epochs": config.training.num_train_epochs,
    }


def _say_what_is_left_out(data: Data, say: Callable[[str], None]) -> None:
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


def _recipe_of(adapter: Path) -> Config:
    """The recipe that lies beside an adapter; for one from elsewhere, the defaults on its base."""
    if (adapter / "recipe.yaml").is_file():
        config = load_recipe(adapter / "recipe.yaml")
        if config.method != "full":
            return config
        return config.model_copy(
            update={"model": config.model.model_copy(update={"model_name_or_path": str(adapter), "revision": None})}
        )
    base, revision = export.base_of(adapter)
    return Config.model_validate(
        {
            "model": {"model_name_or_path": base, "revision": revision},
            "data": {"datasets": [{"path": "none"}]},
        }
    )


def _tokenizer_of(adapter: Path) -> Any:
    from transformers import AutoTokenizer

    if not (adapter / "tokenizer_config.json").is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(adapter)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{adapter}: its tokenizer cannot be read: {error}") from error
