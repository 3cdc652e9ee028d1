"""What `qlora plan` says of a step, before it is taken."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qlora.bench.apart import apart
from qlora.bench.results import Predicted
from qlora.bench.work import Setup, Work
from qlora.machine import GIB
from qlora.plan.types import Rates


def predictions(
    pairs: Iterable[tuple[Setup, Work]], rates: Rates, workers: int
) -> dict[tuple[str, str, int, Work], Predicted | None]:
    """What the plan says of each, by (setup's name, model, r, work), asked side by side; None: it cannot be simulated.

    rates  of this machine
    """
    pairs = list(pairs)
    with apart(workers) as processes:
        made = processes.map(_predict, pairs, [rates] * len(pairs))
        return {(s.name, s.model, s.r, work): each for (s, work), each in zip(pairs, made, strict=True)}


def _predict(pair: tuple[Setup, Work], rates: Rates) -> Predicted | None:
    import torch
    from transformers import AutoConfig

    from qlora.bench.methods import config_of
    from qlora.bench.shapes import shape_of
    from qlora.model.source import config_of as model_config_of
    from qlora.plan.periodic import Simulator
    from qlora.plan.seconds import time_of
    from qlora.plan.simulate import ACCELERATOR, HOST, CannotSimulate

    torch.set_num_threads(1)  # there is nothing to compute
    setup, work = pair
    config = config_of(setup, Path())
    training = {"per_device_train_batch_size": work.rows, "gradient_accumulation_steps": work.k}
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"max_seq_length": work.tokens, "packing": False}),
            "training": config.training.model_copy(update=training),
        }
    )
    shape = AutoConfig.for_model(**shape_of(setup.model)) if setup.is_shape else model_config_of(config.model)
    try:
        simulator = Simulator(config, shape, work.tokens, HOST if setup.device == "cpu" else ACCELERATOR)
        usage = simulator.usage(config.memory)
    except CannotSimulate:  # what fake tensors do not know is measured all the same
        return None
    allocated, reserved = usage.peak_bytes / GIB, (usage.peak_bytes + usage.slack) / GIB
    return Predicted(allocated=allocated, reserved=reserved, seconds=time_of(usage, rates).seconds)
