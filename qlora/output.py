"""A run's directory, `training.output_dir`: nobody else's, no two runs at once, and rid of what a dead one left."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from qlora import durable
from qlora.errors import CheckpointError, TrainingError
from qlora.export import adapter as export
from qlora.lock import Lock, Locked
from qlora.train import checkpoint

LOG = "events.jsonl"


@contextlib.contextmanager
def claimed(output: Path, base: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Make the directory, and keep other runs out of it while the context lasts. One that stays empty goes again.

    base  where the base model's files lie

    Raises CheckpointError where what is there is not to be mixed with a new run, and TrainingError where it cannot be
    used or another process is using it.
    """
    try:
        made = not output.is_dir()
        if output.exists() and output.resolve() == base.resolve():
            raise CheckpointError(f"{output}: is the base model's directory; set another training.output_dir")
        output.mkdir(parents=True, exist_ok=True)
        lock = Lock(output)
    except Locked as error:
        raise TrainingError(
            f"{output}: a run is going on there: {error.holder}\n"
            "  wait for it or stop it (Ctrl-C saves a checkpoint); or set another training.output_dir"
        ) from None
    except (OSError, ValueError) as error:  # the second: a NUL in the name
        raise _unusable(output, error) from error
    try:
        with lock:
            _refuse_to_mix(output, resume, overwrite)
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                output.rmdir()


def make_room(output: Path, overwrite: bool) -> None:
    """Take away what a killed run left unfinished, or, to overwrite it, all of an earlier one."""
    try:
        leftover = list(output.glob(durable.UNFINISHED))
        if overwrite:
            leftover += [*checkpoint.checkpoints(output), *output.glob(f"{LOG}.damaged")]
            export.remove(output)
            if (output / LOG).exists():  # the last to go, as it tells that the rest is a run's
                leftover.append(output / LOG)
        for path in leftover:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        raise _unusable(output, error) from error


def keep_recipe(recipe: str, output: Path) -> None:
    """The recipe lies beside the run from its start: whoever finds one that died can go on with it."""
    try:
        durable.replace_file(output / "recipe.yaml", recipe.encode())
    except OSError as error:
        advice = "set another training.output_dir"
        raise durable.disk_error(output / "recipe.yaml", error, len(recipe), advice) from error


def _refuse_to_mix(output: Path, resume: bool, overwrite: bool) -> None:
    """Two runs in one directory, or a run beside files that are no run's, are the user's to sort out."""
    earlier = checkpoint.checkpoints(output)
    try:
        of_a_run = (output / LOG).exists() or export.is_there(output)
    except OSError as error:
        raise _unusable(output, error) from error
    if resume:
        return
    if not of_a_run and (foreign := [*earlier, *export.written(output)]):
        names = ", ".join(path.name for path in foreign[:4]) + (f" and {len(foreign) - 4} more" if foreign[4:] else "")
        raise CheckpointError(
            f"{output}: holds files that are no run's and would be overwritten: {names}\n"
            "  set another training.output_dir"
        )
    if (earlier or export.is_there(output)) and not overwrite:
        newest = f" (its newest checkpoint is {earlier[-1].name})" if earlier else ""
        going_on = "--resume goes on with it, " if earlier else ""
        raise CheckpointError(
            f"{output}: holds a run already{newest}\n"
            f"  {going_on}--overwrite removes it; or set another training.output_dir"
        )


def _unusable(output: Path, error: OSError | ValueError) -> TrainingError:
    said = error.strerror if isinstance(error, OSError) else None
    shown = repr(str(output)[:300])[1:-1]
    return TrainingError(f"{shown}: training.output_dir cannot be used: {said or error}")
