"""Every knob there is: its name, type, default, meaning and unit, each stated once, here.

The recipe reader, `qlora schema`, the README's table and the command line's help are all made from these fields. Names
are upstream's (transformers, PEFT, bitsandbytes, TRL), so that what people know can be pasted. A section bears the name
of the folder or library that it serves. Everything is frozen, an unknown key is an error, and no value is coerced: text
is not a number and 1 is not true.

What no single field can rule out is a `Contradiction`; each section lists its own, so that one reading of a recipe
finds the contradictions of every section that is otherwise well formed.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from qlora.section import Contradiction, Section

__all__ = [
    "Config",
    "DataConfig",
    "DatasetConfig",
    "LoraSection",
    "MemoryConfig",
    "ModelConfig",
    "QuantizationConfig",
    "TrainingConfig",
]

Dtype = Literal["bfloat16", "float16", "float32"]
# accelerate's LoggerType
Tracker = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]
Optimizer = Literal["paged_adamw_8bit", "adamw_8bit", "adamw_torch"]
Positive = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]


def _optimizer(value: Any) -> Any:
    return "adamw_torch" if value == "adamw" else value


def _trackers(value: Any) -> Any:
    if value == "none":  # as transformers spells it
        return []
    return [value] if isinstance(value, str) else value


# A shorthand is written out before validation, so that the rest of the code meets one spelling.
Optim = Annotated[Optimizer, BeforeValidator(_optimizer, json_schema_input_type=Optimizer | Literal["adamw"])]
Trackers = Annotated[
    list[Tracker], BeforeValidator(_trackers, json_schema_input_type=list[Tracker] | Tracker | Literal["none"])
]


class ModelConfig(Section):
    """The base model, which training never changes (except under `method: full`)."""

    model_name_or_path: str = Field(
        min_length=1, description="Base model: a hub id, a local directory with safetensors files, or a `.gguf` file."
    )
    revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of a hub model; null = its main branch. Saved with the adapter.",
    )
    dtype: Dtype = Field(
        default="bfloat16",
        description="Precision of activations and of every weight that is not in 4 bits (norms, embeddings, head).",
    )
    attn_implementation: str = Field(
        default="sdpa",
        min_length=1,
        description="Attention of transformers to use: `sdpa`, `eager`, `flash_attention_2`, `flex_attention`, ...",
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that ships with the model. It can do anything."
    )


class QuantizationConfig(Section):
    """How the base's linear layers are kept under `method: qlora`. Other methods ignore this section, so that trying
    one is a change of one word."""

    load_in_4bit: bool = Field(
        default=True, description="Keep the base's linear layers in 4 bits; `method: qlora` needs it."
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(
        default="nf4",
        description="The 16 values that 4 bits stand for: `nf4` (made for normal weights) or `fp4` (a float).",
    )
    bnb_4bit_use_double_quant: bool = Field(
        default=True, description="Quantize the block scales too: 4.13 instead of 4.5 bits a parameter."
    )
    bnb_4bit_compute_dtype: Dtype = Field(
        default="bfloat16", description="Precision that 4-bit weights are expanded to for each matrix product."
    )


class LoraSection(Section):
    """The adapter: PEFT's `LoraConfig` under PEFT's names, and `autocast_adapter_dtype` of its `get_peft_model`.

    Lists stay lists, because PEFT asks `isinstance(x, list)`. Ignored under `method: full`.
    """

    r: int = Field(
        default=16, ge=1, description="Rank: width of the adapter's bottleneck. Its size and memory grow with it."
    )
    lora_alpha: int = Field(
        default=32,
        ge=1,
        description="Numerator of the adapter's scale, which is lora_alpha / r (/ sqrt(r) with use_rslora).",
    )
    lora_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the adapter's inputs that is zeroed in training, 0 to 1."
    )
    target_modules: str | list[str] = Field(
        default="all-linear",
        description="Modules that get an adapter: `all-linear` (every linear layer but the head), a list of name "
        "endings, or one regular expression.",
    )
    exclude_modules: str | list[str] | None = Field(
        default=None,
        description="Modules that get none although target_modules matches: name endings or one expression.",
    )
    target_parameters: list[str] | None = Field(
        default=None,
        description="Bare parameters that get an adapter, by name ending: for experts that are not modules.",
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        default="none", description="Biases to train: none, all of the model's, or those of adapted modules."
    )
    use_rslora: bool = Field(
        default=False, description="Scale by lora_alpha / sqrt(r), which keeps high ranks learning (arXiv:2312.03732)."
    )
    use_dora: bool = Field(
        default=False, description="Train each weight's magnitude apart from its direction (arXiv:2402.09353). Slower."
    )
    init_lora_weights: (
        bool
        | Literal["gaussian", "mica", "olora", "orthogonal", "pissa"]
        | Annotated[str, Field(pattern=r"^pissa_niter_[0-9]+$", examples=["pissa_niter_16"])]
    ) = Field(
        default=True,
        description="How A and B start: true = B is zero, the adapter starts as a no-op; false = both random, for "
        "debugging; or a named scheme of PEFT's.",
    )
    modules_to_save: list[str] | None = Field(
        default=None, description="Modules trained whole and saved with the adapter, by name ending, e.g. `lm_head`."
    )
    layers_to_transform: Index | list[Index] | None = Field(
        default=None,
        description="Layers that get an adapter, counted from 0; null = all. Needs target_modules as a list.",
    )
    layers_pattern: str | list[str] | None = Field(
        default=None, description="Name of the model's list of layers where PEFT does not know it. Goes with the above."
    )
    rank_pattern: dict[str, Positive] = Field(
        default_factory=dict, description="Ranks that differ from r: name ending or expression -> rank."
    )
    alpha_pattern: dict[str, Positive] = Field(
        default_factory=dict, description="Alphas that differ from lora_alpha: name ending or expression -> alpha."
    )
    autocast_adapter_dtype: bool = Field(
        default=True,
        description="Keep the adapter's master weights in float32 and compute with 16-bit copies; false = keep them in "
        "model.dtype alone, which saves memory and loses small updates.",
    )

    def contradictions(self) -> Iterator[Contradiction]:
        if not self.target_modules and not self.target_parameters:
            yield Contradiction("target_modules", "`lora.target_modules` is empty: nothing would be trained")
        if isinstance(self.target_modules, str):
            for key in ("layers_to_transform", "layers_pattern"):
                if getattr(self, key) is not None:
                    yield Contradiction(
                        key,
                        f"`lora.{key}` needs `lora.target_modules` to be a list, not `{self.target_modules}`",
                        "list the names to adapt, e.g. `[q_proj, v_proj]`",
                    )
        elif self.layers_pattern is not None and self.layers_to_transform is None:
            yield Contradiction(
                "layers_pattern", "`lora.layers_pattern` does nothing without `lora.layers_to_transform`"
            )
        if self.target_parameters:
            if self.lora_dropout:
                yield Contradiction("lora_dropout", "PEFT has no `lora.lora_dropout` for `lora.target_parameters`")
            if self.use_dora:
                yield Contradiction("use_dora", "PEFT has no `lora.use_dora` for `lora.target_parameters`")


class DatasetConfig(Section):
    """One source of rows."""

    path: str = Field(
        min_length=1,
        description="A JSONL, JSON, CSV or Parquet file, a directory of them, or a hub name. Files are found from the "
        "current directory, not from the recipe's.",
    )
    name: str | None = Field(
        default=None, description="Configuration of a hub dataset, e.g. `main`; null = its default."
    )
    split: str = Field(
        default="train",
        min_length=1,
        description="Split of a hub dataset (also sliced: `train[:5%]`) or a directory; a file is all `train`.",
    )
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text"] = Field(
        default="auto", description="Shape of the rows; `auto` looks at the first ones and says what it found."
    )
    weight: float = Field(
        default=1.0, gt=0, description="Times each row is seen an epoch: 2 = every row twice, 0.5 = half of the rows."
    )

    def rows_overlap(self, other: "DatasetConfig") -> bool:
        """Whether both surely name common rows: the same source and split, or a slice of it and the whole."""
        if (self.path, self.name) != (other.path, other.name):
            return False
        whole = {self.split.partition("[")[0], other.split.partition("[")[0]}
        return self.split == other.split or (len(whole) == 1 and not whole.isdisjoint({self.split, other.split}))


class DataConfig(Section):
    """What is trained on, what is held out, and how rows become tokens."""

    datasets: list[DatasetConfig] = Field(min_length=1, description="Training rows: one or more sources, mixed.")
    eval_datasets: list[DatasetConfig] = Field(
        default_factory=list, description="Held-out rows, each scored once: sources of the same shape as data.datasets."
    )
    eval_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the training rows held out, 0 to 1, drawn by training.seed; 0 = none.",
    )
    skip_bad_rows: bool = Field(
        default=False,
        description="Train without the rows that are wrong, and say how many they are; false = refuse them all.",
    )
    max_seq_length: int = Field(
        default=2048,
        ge=2,
        description="Most tokens of a training sequence; a longer row is truncated, and counted as such.",
    )
    packing: bool = Field(
        default=True,
        description="Fill each sequence with several rows, which do not see each other; false = pad instead.",
    )
    assistant_only_loss: bool = Field(
        default=True,
        description="Learn only what the assistant says, its end token included; false = learn every token.",
    )
    chat_template: str | None = Field(
        default=None, description="Jinja chat template, or the path of a file with one; null = the tokenizer's own."
    )

    def contradictions(self) -> Iterator[Contradiction]:
        if self.eval_fraction and self.eval_datasets:
            yield Contradiction(
                "eval_fraction",
                "`data.eval_fraction` and `data.eval_datasets` both say what is held out",
                "keep one of them",
            )
        for index, held_out in enumerate(self.eval_datasets):
            if held_out.weight != 1:
                yield Contradiction(
                    f"eval_datasets.{index}.weight",
                    f"`data.eval_datasets.{index}.weight` has no meaning: each held-out row is scored once",
                    "leave it out",
                )
            for train_index, trained in enumerate(self.datasets):
                if held_out.rows_overlap(trained):
                    yield Contradiction(
                        f"eval_datasets.{index}",
                        f"`data.eval_datasets.{index}` holds out rows of `data.datasets.{train_index}`, which are "
                        f"trained on: `{held_out.path}`, split `{held_out.split}`",
                        "name another split, or use `data.eval_fraction` to hold some rows out",
                    )


class TrainingConfig(Section):
    """The run: transformers' `TrainingArguments`, under their names, as far as they exist here."""

    output_dir: str = Field(
        default="outputs/run",
        min_length=1,
        description="Where the adapter, checkpoints and events go, from the current directory.",
    )
    num_train_epochs: float = Field(
        default=1.0, gt=0, description="Passes over the training rows; a fraction is allowed."
    )
    max_steps: int = Field(
        default=-1,
        ge=-1,
        description="Optimizer steps to take, whatever num_train_epochs says; -1 = num_train_epochs decides.",
    )
    per_device_train_batch_size: int = Field(default=1, ge=1, description="Sequences in a micro-batch, on each device.")
    gradient_accumulation_steps: int = Field(
        default=8,
        ge=1,
        description="Micro-batches in an optimizer step. Each layer is expanded twice a step, however many.",
    )
    learning_rate: float = Field(
        default=2e-4, gt=0, description="Peak step size of the optimizer, reached after the warmup."
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        default="linear",
        description="What the learning rate does after the warmup: fall to 0 at the last step, or stay.",
    )
    warmup_ratio: float = Field(
        default=0.03,
        ge=0,
        lt=1,
        description="Share of the steps in which the learning rate rises from 0, 0 to 1. Setting warmup_steps, or a "
        "constant schedule, makes it 0.",
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="The same as a number of optimizer steps; 0 = warmup_ratio decides."
    )
    optim: Optim = Field(
        default="paged_adamw_8bit",
        description="Optimizer: AdamW with 8-bit state that can move to host memory (paged), with 8-bit state, or "
        "with float32 state. `adamw` is another name for `adamw_torch`.",
    )
    weight_decay: float = Field(
        default=0.0, ge=0, description="AdamW's pull of weights towards 0, a share of learning_rate."
    )
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of AdamW's mean of gradients, a step.")
    adam_beta2: float = Field(
        default=0.999, ge=0, lt=1, description="Decay of AdamW's mean of squared gradients, a step."
    )
    adam_epsilon: float = Field(default=1e-8, gt=0, description="Added to AdamW's denominator.")
    max_grad_norm: float = Field(
        default=1.0,
        ge=0,
        description="Longest gradient, as L2 norm over all trained weights; a longer one is scaled; 0 = off.",
    )
    seed: int = Field(
        default=42,
        ge=0,
        le=2**32 - 1,
        description="Start of every random choice: adapter weights, order of rows, dropout, splits.",
    )
    logging_steps: int = Field(
        default=1, ge=1, description="Optimizer steps between two reports to the terminal and trackers."
    )
    eval_steps: int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps between two evaluations on held-out rows; null = only at the end.",
    )
    per_device_eval_batch_size: int = Field(
        default=8, ge=1, description="Held-out rows scored at a time, on each device."
    )
    predict_with_generate: bool = Field(
        default=False,
        description="Also let the model answer the held-out prompts, greedily, before and after training, and count "
        "exact matches.",
    )
    generation_max_length: int = Field(
        default=128, ge=1, description="Most tokens of an answer under predict_with_generate, the prompt not counted."
    )
    save_steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps between two checkpoints; null = only at the end."
    )
    save_total_limit: int | None = Field(default=2, ge=1, description="Newest checkpoints to keep; null = all of them.")
    report_to: Trackers = Field(
        default_factory=list, description="Trackers to report to, each to be installed by you; one or a list."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_warmup(cls, values: Any) -> Any:
        """Let `warmup_steps` or a constant schedule stand alone: the default ratio gives way, a written one does not.
        After this at most one of the two warmups is above 0."""
        if not isinstance(values, dict) or "warmup_ratio" in values:
            return values
        other = values.get("warmup_steps") or values.get("lr_scheduler_type") == "constant"
        return {**values, "warmup_ratio": 0.0} if other else values

    def contradictions(self) -> Iterator[Contradiction]:
        if self.max_steps == 0:
            yield Contradiction("max_steps", "`training.max_steps` must be at least 1, or -1, got `0`")
        if self.warmup_steps and self.warmup_ratio:
            yield Contradiction(
                "warmup_steps",
                "`training.warmup_steps` and `training.warmup_ratio` both say how long the warmup is",
                "keep one of them",
            )
        if self.lr_scheduler_type == "constant":
            for key in ("warmup_steps", "warmup_ratio"):
                if getattr(self, key):
                    yield Contradiction(
                        key,
                        f"`training.{key}` does nothing under `training.lr_scheduler_type: constant`",
                        "did you mean `training.lr_scheduler_type: constant_with_warmup`?",
                    )


class MemoryConfig(Section):
    """What a step holds at one time, where that is a choice. What is left out here is chosen by the plan."""

    plan: bool = Field(
        default=True,
        description="Plan the run before it starts: choose what this section leaves out, and refuse what cannot fit; "
        "false = what is left out has its default.",
    )

    loss_chunk_tokens: int = Field(
        default=256,
        ge=1,
        description="Tokens whose logits stand at one time; the peak of the loss is this x vocabulary size.",
    )
    micro_batch_tokens: int = Field(
        default=1024,
        ge=0,
        description="Tokens that are computed together, where a step's rows can be cut there: a micro-batch that "
        "holds more is split by rows, and unpadded neighbours of one length are joined. The same sum in other pieces, "
        "so the effective batch stays the recipe's; 0 = each micro-batch as it comes.",
    )
    layers_on_device: int | None = Field(
        default=None,
        ge=0,
        description="Frozen layers that stay on the device; null = all. The others are brought to it, each twice a "
        "step, while another one computes.",
    )
    layers_on_host: int | None = Field(
        default=None,
        ge=0,
        description="Of the other layers, those that lie in host memory; null = all. What is left is read from the "
        "NF4 cache, which should then be on an SSD.",
    )
    nf4_cache_dir: str | None = Field(
        default="auto",
        min_length=1,
        description="Where a base is kept once it is quantized, so that the next run loads it at disk speed: `auto` = "
        "`qlora` in the user's cache directory ($XDG_CACHE_HOME, ~/.cache); null = nowhere.",
    )
    embeddings: Literal["device", "host"] = Field(
        default="device",
        description="Where the token embedding and the head live. From the host, looked-up rows move, and the head a "
        "piece of the vocabulary at a time, twice a micro-batch.",
    )
    vocabulary_chunk: int = Field(
        default=16384,
        ge=1,
        description="Entries of the vocabulary whose logits stand at one time under `embeddings: host`.",
    )
    activations: Literal["device", "host", "file"] = Field(
        default="device",
        description="Where the hidden states between layers wait for the way back: hidden size x 2 bytes a token a "
        "layer; `file` is for steps whose states the host cannot hold.",
    )
    activations_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Directory of the temporary file under `activations: file`; null = training.output_dir.",
    )
    adapters: Literal["device", "host"] = Field(
        default="device",
        description="Where the adapter's master weights, gradients and optimizer state live. From the host, a layer's "
        "weights move in and its gradients out, and the optimizer runs on the host.",
    )
    layer_tile_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens that pass through the parts of a layer beside attention at one time; null = all. For long "
        "sequences: memory then hardly grows with a layer's width, for one more projection of q, k and v.",
    )
    layers_kept: int = Field(
        default=0,
        ge=0,
        description="Layers, counted back from the last, whose inner activations are kept from the forward for the "
        "backward; those of the others are computed again. Up to a third faster, for the memory that they take.",
    )
    order: Literal["auto", "layer-major", "standard"] = Field(
        default="auto",
        description="Order of a step: all micro-batches through one layer at a time, or all layers for one micro-batch "
        "at a time. `auto` takes layer-major where the model can be cut into layers, and says so where it cannot.",
    )

    def contradictions(self) -> Iterator[Contradiction]:
        if self.layers_on_host is not None and self.layers_on_device is None:
            yield Contradiction(
                "layers_on_host",
                "`memory.layers_on_host` has no layers to place: without `memory.layers_on_device` all stay there",
                "say how many stay, e.g. `layers_on_device: 0`",
            )
        if self.activations_dir is not None and self.activations != "file":
            yield Contradiction(
                "activations_dir", "`memory.activations_dir` does nothing without `memory.activations: file`"
            )
        if self.layers_kept and self.layer_tile_tokens is not None:
            yield Contradiction(
                "layers_kept",
                "`memory.layers_kept` keeps what `memory.layer_tile_tokens` is there to never hold",
                "leave one of them out",
            )
        if self.order == "standard":
            needing = {"layers_on_device": None, "activations": "device", "layer_tile_tokens": None, "layers_kept": 0}
            for key, usual in needing.items():
                if getattr(self, key) != usual:
                    yield Contradiction(
                        key,
                        f"`memory.{key}` needs layers that run one at a time, which `memory.order: standard` rules out",
                        "leave `memory.order` out",
                    )


class Config(Section):
    """A whole recipe. See `qlora.recipe.load_recipe`."""

    method: Literal["qlora", "lora", "full"] = Field(
        default="qlora",
        description="What is trained: an adapter on a 4-bit base, an adapter on a 16-bit base, or every weight.",
    )
    model: ModelConfig = Field(description="The base model.")
    quantization: QuantizationConfig = Field(
        default=QuantizationConfig(), description="How the base is kept in 4 bits."
    )
    lora: LoraSection = Field(default=LoraSection(), description="The adapter.")
    adapter: str | None = Field(
        default=None,
        min_length=1,
        description="Go on training this adapter instead of a new one: its directory, or its name in the library. "
        "`lora` is then the adapter's own.",
    )
    data: DataConfig = Field(description="What is trained on, and what is held out.")
    training: TrainingConfig = Field(default=TrainingConfig(), description="The run.")
    memory: MemoryConfig = Field(default=MemoryConfig(), description="What is traded for memory.")

    def contradictions(self) -> Iterator[Contradiction]:
        if self.method == "qlora" and not self.quantization.load_in_4bit:
            yield Contradiction(
                "quantization.load_in_4bit",
                "`quantization.load_in_4bit: false` contradicts `method: qlora`, which trains on a 4-bit base",
                "for a 16-bit base write `method: lora`",
            )
        if self.method != "qlora" and self.memory.layers_on_device is not None:
            yield Contradiction(
                "memory.layers_on_device",
                f"`memory.layers_on_device` places 4-bit layers, which `method: {self.method}` has not",
            )
        if self.method == "full" and self.adapter is not None:
            yield Contradiction("adapter", "`adapter` is a LoRA to go on with, and `method: full` trains every weight")
        if self.method == "full":
            for key in ("embeddings", "adapters"):
                if getattr(self.memory, key) != "device":
                    yield Contradiction(
                        f"memory.{key}", f"`memory.{key}: host` needs a frozen base, which `method: full` trains"
                    )
        if not self.data.eval_datasets and not self.data.eval_fraction:
            for key in ("eval_steps", "predict_with_generate"):
                if getattr(self.training, key):
                    yield Contradiction(
                        f"training.{key}",
                        f"`training.{key}` needs held-out rows and there are none",
                        "name them in `data.eval_datasets`, or hold some out with `data.eval_fraction`",
                    )
