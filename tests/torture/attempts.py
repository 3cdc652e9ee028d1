"""Runs in processes that can be killed. Each is forked from one that has imported all that is slow to import."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

from qlora.recipe import load_recipe
from qlora.report.events import read_events, timeline

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.torture.preload"])


class Attempt:
    """A run in a process of its own.

    slow_disk  seconds that each flush to the disk takes
    """

    def __init__(self, recipe: Path, *, resume: bool = False, slow_disk: float = 0.0, sink=None) -> None:
        self.process = _CONTEXT.Process(target=_train, args=(str(recipe), resume, slow_disk, sink))
        self.process.start()

    def kill(self) -> bool:
        """SIGKILL; returns whether it hit a living process."""
        living = self.process.is_alive()
        if living:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        return living and self.process.exitcode == -signal.SIGKILL

    def wait(self) -> int:
        """Its exit status."""
        self.process.join()
        return self.process.exitcode


def _train(recipe: str, resume: bool, slow_disk: float, sink) -> None:
    import torch

    from qlora import run

    torch.set_num_threads(1)
    if slow_disk:
        flush = os.fsync

        def slow(descriptor: int) -> None:
            time.sleep(slow_disk)
            flush(descriptor)

        os.fsync = slow
    run.train(load_recipe(recipe), resume=resume, sinks=[sink] if sink else [])


def told(output: Path, *keys: str) -> list[tuple]:
    """What the steps of a run that still hold were, from its log."""
    return [
        tuple(event[key] for key in ("step", *keys))
        for event in timeline(read_events(output / "events.jsonl"))
        if event["event"] == "step"
    ]
