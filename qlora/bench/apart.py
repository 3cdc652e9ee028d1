"""Processes for work that must leave nothing behind here: memory, a GPU's context, threads."""

from __future__ import annotations

import logging
import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor


def hush() -> None:
    """Let the libraries of a process that measures keep their news to themselves. To be called before they are
    imported."""
    warnings.filterwarnings("ignore")
    os.environ["TQDM_DISABLE"] = "1"  # progress bars of all libraries
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional CPU kernel at each start


def apart(workers: int = 1) -> ProcessPoolExecutor:
    """Quiet processes that end with the block."""
    # A fork would have this process's memory, and no CUDA.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=hush)
