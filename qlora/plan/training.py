"""The plan of a run that is about to start, and afterwards what came of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from qlora.config import Config, MemoryConfig
from qlora.data.prepare import Data
from qlora.machine import GIB, peak_memory_gib
from qlora.model.source import Source
from qlora.plan.cards import this_machine
from qlora.plan.measure import calibrate, key_of
from qlora.plan.plan import Plan
from qlora.plan.planner import Planner
from qlora.plan.simulate import CannotSimulate
from qlora.report.events import readable_events
from qlora.train.loop import Loop, Schedule

SUMS = ("micro_batch_tokens", "layer_tile_tokens", "loss_chunk_tokens", "embeddings", "vocabulary_chunk")  # of memory
CALIBRATES = 5  # steps of a run from which plans learn


def planned_for(
    config: Config, source: Source, data: Data, output: Path, resume: bool, say: Callable[[str], None]
) -> Plan | None:
    """The plan of the run, with what is free now; None where the recipe wants none, or its model cannot be simulated.

    A run that is resumed keeps what decides the order of its sums, so that it goes on to the same bits, unless the
    recipe says otherwise.

    Raises PlanError where the run will not fit.
    """
    if not config.memory.plan:
        return None
    batches = data.epochs(config.data.packing)
    first, training = batches(0), config.training
    widest = max((batch.input_ids.shape[1] for batch in first), default=config.data.max_seq_length)
    rows = training.per_device_train_batch_size if config.data.packing else 1
    earlier = _memory_before(output / "events.jsonl", say) if resume else {}
    open_still = [key for key in SUMS if key in earlier and key not in config.memory.model_fields_set]
    kept = config.memory.model_copy(update={key: earlier[key] for key in open_still})
    try:
        found = Planner(
            config.model_copy(update={"memory": kept}),
            this_machine(output, say),
            model_config=source.config(config.model.trust_remote_code),
            steps=Schedule.of(training, batches).steps,
            tokens=-(-widest // rows),
        ).plan()
    except CannotSimulate as reason:
        say(f"not planned, memory is taken as the recipe says: {reason}")
        return None
    now = found.config.memory.model_dump(mode="json")
    if changed := [f"{key}: {now[key]} (was {earlier[key]})" for key in now if earlier.get(key, now[key]) != now[key]]:
        say(f"planned anew for what is free now: {', '.join(changed)}")
    return found


def as_event(plan: Plan) -> dict[str, Any]:
    """A plan as an event."""
    return {
        "lines": plan.lines(),
        "device_bytes": plan.device_bytes,
        "host_bytes": plan.usage.host_bytes,
        "file_bytes": plan.usage.file_bytes,
        "seconds": plan.time.seconds,
        "tokens_per_second": plan.tokens_per_second,
        "memory": plan.config.memory.model_dump(mode="json"),
        "calibrated": plan.calibrated,
    }


def compared(plan: Plan, loop: Loop, device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """What was planned, for the end of the run; how far that was off is kept for later plans on this machine."""
    on_cpu, progress = plan.machine.is_cpu, loop.progress
    nbytes = None if on_cpu else plan.usage.peak_bytes + plan.usage.slack
    if progress.step >= CALIBRATES and progress.tokens:
        uncalibrated = plan.time.seconds / (plan.machine.seconds_ratio or 1.0)
        seconds = progress.seconds / progress.tokens * plan.usage.tokens / uncalibrated
        calibrate(key_of(device), seconds, None if nbytes is None else peak_memory_gib(device) * GIB / nbytes, say)
    return {"device_bytes": nbytes, "seconds": plan.time.seconds}


def _memory_before(log: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The `memory` section that an earlier attempt at a run was planned with; {} where the log does not tell."""
    plans = [event for event in readable_events(log)[0] if event["event"] == "plan"] if log.exists() else []
    if not plans:
        return {}
    try:
        known = {key: value for key, value in plans[-1]["memory"].items() if key in MemoryConfig.model_fields}
        return MemoryConfig.model_validate(known).model_dump(mode="json", exclude_unset=True)
    except (KeyError, AttributeError, ValidationError):
        say(f"{log}: does not tell how the run was planned: it is planned as if it were new")
        return {}
