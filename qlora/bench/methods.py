"""What is measured, made ready: a base model, what is trained on it, and a step that is called like the trainer's.

Ours is the engine as `qlora train` runs it. The stock stack is what the documentation of transformers, PEFT and
bitsandbytes says, with two choices in its favour: bf16 autocast around the forward, as `TrainingArguments(bf16=True)`
sets it (without it PEFT multiplies the adapter in fp32), and norms and embeddings stay bf16, where
`prepare_model_for_kbit_training` would cast them to fp32.

All methods see the same micro-batches, start from the same adapter, and are trained by the one `Loop`: the same
optimizer, clipping and learning rate.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GgufConfig, PreTrainedModel

from qlora.bench.apart import apart
from qlora.bench.shapes import RandomSource, random_source
from qlora.bench.work import STOCK, Setup, Work
from qlora.config import Config, ModelConfig
from qlora.data.prepare import prepare as read_rows
from qlora.errors import ModelError
from qlora.model.adapters import attach, trainable
from qlora.model.batch import IGNORE_INDEX, Batch
from qlora.model.load import build_skeleton, load_base
from qlora.model.residency import Residency
from qlora.model.source import Source, open_source
from qlora.recipe import load_recipe, parse_recipe
from qlora.train.step import StepResult, choose

SEED = 0  # of drawn weights, adapters and tokens
LEARNING_RATE = 2e-4

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Ready:
    """A method that can take its first step.

    step             called as the trainer's: step(micro-batches on its device, number of the step)
    model            what is trained, adapter included
    parameters       of it those that are trained, by name, in the same order for every method that trains an adapter
    config           its `training` section is for the Loop; the recipe of ours, and what comes closest for stock
    source           the base's files, or what draws its weights
    vocab            token ids that there are
    base_parameters  of the base, however they are kept
    seconds          from nothing to here
    residency        where the base's layers are, if the method is ours
    facts            what the method says of itself
    """

    step: Any  # Step | Stock; the Loop asks of both the same
    model: nn.Module
    parameters: dict[str, nn.Parameter]
    config: Config
    source: Source
    vocab: int
    base_parameters: int
    seconds: float
    residency: Residency | None
    facts: dict[str, Any]


def prepare(setup: Setup, directory: Path, device: torch.device, say: Say) -> Ready:
    """Load a setup's base and put on it what is trained.

    setup      of ours or the stock stack; the latter reads no .gguf file, see `as_directory`
    directory  there is one, for files meanwhile: NF4 layers, activations
    say        is told in a line what is not as it was asked for

    Raises RecipeError where `memory` is none, ModelError, MachineError, and torch.OutOfMemoryError.
    """
    started = time.perf_counter()
    config = config_of(setup, directory)
    source = random_source(setup.model, directory, device, SEED) if setup.is_shape else open_source(config.model)
    if setup.method in STOCK:
        base, parameters = load_stock(config, source, device)
        model = attach_stock(base, config)
        step, residency = Stock(model, device), None
        tiers = None
    else:
        loaded = load_base(config, source, device, say)
        base, parameters = loaded.model, loaded.parameters
        model = (base if config.method == "full" else attach(base, config.lora, SEED)).train()
        step = choose(base, device, config.memory, SEED, directory, say)
        residency = step.residency
        tiers = residency.tiers
    packages = ["torch", "transformers", *(["peft"] if config.method != "full" else [])]
    packages += ["bitsandbytes"] if config.method == "qlora" else []
    return Ready(
        step=step,
        model=model,
        parameters=trainable(model),
        config=config,
        source=source,
        vocab=base.config.get_text_config().vocab_size,
        base_parameters=parameters,
        seconds=time.perf_counter() - started,
        residency=residency,
        facts={
            "order": step.order,
            "attention": base.config._attn_implementation,
            "versions": {package: importlib.metadata.version(package) for package in packages},
        }
        | ({"tiers": tiers} if tiers is not None else {}),
    )


def config_of(setup: Setup, directory: Path) -> Config:
    """The recipe that a setup stands for; of a stock one, the recipe of ours that does the same. Raises RecipeError."""
    on_file = "layers_on_host" in setup.memory  # without, what loading takes would depend on the run before
    values = {
        "method": setup.method.removeprefix("hf-"),
        "model": {"model_name_or_path": setup.model},
        "lora": {"r": setup.r, "lora_alpha": 2 * setup.r},
        "data": {"datasets": [{"path": setup.recipe or "random"}]},
        "training": {
            "optim": setup.optim,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "output_dir": str(directory),
        },
        "memory": {"nf4_cache_dir": str(directory) if on_file else None, **setup.memory},
    }
    return parse_recipe(json.dumps(values), f"the suite, {setup.name}")


# --- transformers + PEFT + bitsandbytes -------------------------------------------------------------------------------


def load_stock(config: Config, source: Source, device: torch.device) -> tuple[PreTrainedModel, int]:
    """The frozen base as transformers loads it, with bitsandbytes' NF4 under `method: qlora`; and its parameters."""
    if source.gguf is not None:
        raise ModelError(f"{source.name}: transformers does not quantize a .gguf file; give the directory made of it")
    skeleton = build_skeleton(source.config(), config, source.name)
    if isinstance(source, RandomSource):
        # Quantizing, transformers asks for a tensor when the one before is done: the 16-bit model never stands whole.
        place, given = None, {"config": skeleton.config, "state_dict": source.tensors(skeleton)}
    else:
        place, given = source.directory, {}
    if config.method == "qlora":
        given["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    stock: Any = type(skeleton)
    model = stock.from_pretrained(
        place, dtype=torch.bfloat16, attn_implementation="sdpa", device_map={"": device}, **given
    )
    return model, sum(p.numel() for p in skeleton.parameters())


def attach_stock(base: Any, config: Config) -> nn.Module:
    """PEFT's own LoRA on a base that computes its layers again in the backward."""
    base.requires_grad_(False)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    torch.manual_seed(SEED)
    r, alpha = config.lora.r, config.lora.lora_alpha
    lora = LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, lora).train()


class Stock:
    """The step as `Trainer` takes it: forward and backward of the whole model, one micro-batch after the other."""

    order = "standard"

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device

    def __call__(self, batches: Sequence[Batch], step: int = 0) -> StepResult:
        """Add the gradients of the mean loss over `batches`, as the trainer's own step does."""
        # As Trainer counts them over the whole accumulation. The labels' shift loses none: a row's first has no loss.
        supervised = torch.stack([(batch.labels != IGNORE_INDEX).sum() for batch in batches]).sum()
        losses = []
        for batch in batches:
            packed = any(len(lengths) > 1 for lengths in batch.documents)
            given = {"position_ids": batch.position_ids} if packed else {}
            if batch.attention_mask is not None:
                given["attention_mask"] = batch.attention_mask
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                loss = self.model(
                    input_ids=batch.input_ids,
                    labels=batch.labels,
                    num_items_in_batch=supervised,
                    use_cache=False,
                    **given,
                ).loss
            loss.backward()
            losses.append(loss.detach())
        shares = tuple(torch.stack(losses).tolist())
        rows = tuple(batch.rows for batch in batches)
        return StepResult(sum(shares), shares, rows, sum(batch.tokens for batch in batches), int(supervised))


# --- what is trained on -----------------------------------------------------------------------------------------------


def batches_of(setup: Setup, work: Work, vocab: int, source: Source, steps: int) -> list[list[Batch]]:
    """The k micro-batches of each of `steps` optimizer steps, on the host; the same for every method.

    Random tokens, each of which carries loss where it can, are the same in every step, so that losses fall. Rows of a
    recipe are taken in the recipe's order and, if it says so, packed, as many epochs as are needed; `work` has the last
    word on how long they may be, and how many share a micro-batch.

    vocab   token ids that there are
    source  of the model, for its tokenizer

    Raises RecipeError, DataError, and ModelError where there is no tokenizer.
    """
    if setup.recipe is None:
        return [_random(work, vocab)] * steps
    if setup.is_shape:
        raise ModelError(
            f"{setup.model}: is a shape, which has no tokenizer for the rows of {setup.recipe}\n"
            "  give a model, or leave `recipe` out for random tokens"
        )
    sizes = f"data.max_seq_length={work.tokens}", f"training.per_device_train_batch_size={work.rows}"
    config = load_recipe(setup.recipe, sizes)
    epochs = read_rows(config, source.tokenizer()).epochs(packing=True)
    stream = itertools.chain.from_iterable(map(epochs, itertools.count()))
    return [list(itertools.islice(stream, work.k)) for _ in range(steps)]


def _random(work: Work, vocab: int) -> list[Batch]:
    generator, batches = torch.Generator().manual_seed(SEED), list[Batch]()
    for _ in range(work.k):
        ids = torch.randint(vocab, (work.rows, work.tokens), generator=generator)
        labels = ids.clone()
        labels[:, 0] = IGNORE_INDEX  # nothing comes before it that could predict it
        batches.append(Batch(ids, torch.arange(work.tokens).repeat(work.rows, 1), labels))
    return batches


# --- .gguf files ------------------------------------------------------------------------------------------------------


def as_directory(model: str, say: Say) -> str:
    """A model as every method can read it: transformers does not quantize a .gguf file with bitsandbytes, so one
    becomes a directory with bf16 safetensors beside it, once, in a process of its own.

    Raises ModelError where it cannot be read.
    """
    file = Path(model).expanduser()
    if file.suffix.lower() != ".gguf":
        return model
    source = open_source(ModelConfig(model_name_or_path=model))
    directory = file.with_name(file.stem + ".bf16")
    if not directory.is_dir() or directory.stat().st_mtime < file.stat().st_mtime:
        say(f"{file} -> {directory}")
        with apart() as process:
            process.submit(convert, source, directory).result()
    return str(directory)


def convert(source: Source, directory: Path) -> None:
    """A .gguf file to bf16 safetensors with its tokenizer, by transformers. Raises ModelError."""
    assert source.gguf is not None
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source.directory,
            gguf_file=source.gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{source.name}: transformers cannot read it: {error}") from error
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was interrupted
    model.save_pretrained(partial)
    with suppress(ModelError):  # one that transformers cannot translate is missed only where a recipe's rows are read
        source.tokenizer().save_pretrained(partial)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
