"""Trackers: the run's numbers on tensorboard, wandb and the others that accelerate knows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.errors import TrainingError
from qlora.redact import is_secret_name, redact
from qlora.report.events import Degraded, Event, due

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from accelerate.utils import LoggerType

Setting = bool | int | float | str | None

PROJECT = "qlora"  # wandb's project, mlflow's experiment, tensorboard's folder
_GROUPS = {"step": "train", "evaluation": "eval", "generation": "generation"}


class Trackers:
    """The sink that logs to accelerate's trackers.

    names          trackers by accelerate's names, or GeneralTracker objects
    project_dir    where those that write files put them
    config         the recipe, as nested dicts; nothing in it that looks like a secret is passed on
    logging_steps  optimizer steps between two that are logged

    Numbers are logged as `train/loss`, `eval/loss`, `generation/exact_match` and so on. Texts, which may be anyone's
    data, stay on this machine. A tracker that fails during the run is named in a notice and left out from then on.

    Raises TrainingError, before training, naming every tracker that is not installed, or the one that does not start.
    """

    def __init__(
        self,
        names: Iterable[str | GeneralTracker],
        project_dir: str | Path,
        config: Mapping[str, Any],
        logging_steps: int = 1,
    ) -> None:
        self._logging_steps = logging_steps
        self._last_step = 0
        self._trackers: list[GeneralTracker] = []
        chosen: list[str | LoggerType | GeneralTracker] = list(dict.fromkeys(names))
        if not chosen:
            return
        for tracker in _build(chosen, project_dir):
            try:
                tracker.start()
                self._trackers.append(tracker)
                tracker.store_init_configuration(settings(config))
            except Exception as error:  # each tracker's library has its own kinds
                lost = f"training.report_to: {_name(tracker)} does not start: {_what(error)}"
                try:
                    self.close()
                except Degraded as more:
                    lost += f"\n{more}"
                raise TrainingError(lost) from error

    def __call__(self, event: Event) -> None:
        kind = event["event"]
        if kind == "start":
            self._last_step = event["steps"]
        group = _GROUPS.get(kind)
        if group is None or (kind == "step" and not due(event["step"], self._last_step, self._logging_steps)):
            return
        numbers = {
            f"{group}/{name.removeprefix('eval_')}": value
            for name, value in event.items()
            if name not in ("step", "time") and isinstance(value, int | float)
        }
        self._each(lambda tracker: tracker.log(numbers, step=event["step"]), "is not reported to any more")

    def close(self) -> None:
        """Let each tracker send what it still holds."""
        self._each(lambda tracker: tracker.finish(), "may lack the last of the run")
        self._trackers = []

    def _each(self, call: Callable[[GeneralTracker], Any], consequence: str) -> None:
        lost: dict[int, str] = {}
        for tracker in self._trackers:
            try:
                call(tracker)
            except Exception as error:  # each tracker's library has its own kinds
                lost[id(tracker)] = f"{_name(tracker)} failed and {consequence}: {_what(error)}"
        if lost:
            self._trackers = [tracker for tracker in self._trackers if id(tracker) not in lost]
            raise Degraded("\n".join(lost.values()))


def settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Setting]:
    """The recipe as flat `training.learning_rate: 0.0002`, the form that every tracker takes, without its secrets."""
    flat: dict[str, Setting] = {}
    for key, value in config.items():
        if is_secret_name(str(key)):
            continue
        if isinstance(value, list | tuple) and any(isinstance(each, Mapping) for each in value):
            value = {str(i): each for i, each in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= settings(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | None):
            flat[f"{prefix}{key}"] = value
        else:
            flat[f"{prefix}{key}"] = redact(
                ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            )
    return flat


def _build(chosen: list[str | LoggerType | GeneralTracker], project_dir: str | Path) -> list[GeneralTracker]:
    # Imported here: accelerate brings torch along, and most runs report to nobody.
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, filter_trackers, get_available_trackers
    from accelerate.utils import LoggerType

    available = {str(name) for name in get_available_trackers()}
    known = set(LoggerType.list())
    missing = [name for name in chosen if isinstance(name, str) and name in known - available]
    if missing:
        raise TrainingError(
            f"training.report_to: not installed: {', '.join(missing)}\n"
            f"  pip install {' '.join(missing)}, or take {'it' if len(missing) == 1 else 'them'} out of report_to"
        )
    try:
        accepted = filter_trackers(chosen, project_dir)
    except ValueError as error:
        raise TrainingError(f"training.report_to: {error}") from error
    built = []
    for tracker in accepted:
        if not isinstance(tracker, GeneralTracker):
            kind = LOGGER_TYPE_TO_CLASS[str(tracker)]
            place = [os.fspath(project_dir)] if kind.requires_logging_directory else []
            tracker = kind(PROJECT, *place)
        built.append(tracker)
    return built


def _name(tracker: GeneralTracker) -> str:
    return str(getattr(tracker, "name", type(tracker).__name__))


def _what(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
