"""What can go wrong, as the person at the keyboard sees it.

Every error that a user can cause or mend is one of these; the command line prints it and exits without a traceback.
Anything else that escapes is a bug of ours and keeps its traceback.

    QLoRAError
     ├─ RecipeError               the recipe or a --set: all its problems, each with file, line and key
     ├─ DataError                 a dataset: not found, not readable, a row that cannot be trained on
     ├─ ModelError                a base model: missing, truncated, not a decoder we can load
     │   └─ CacheError            its NF4 cache on disk: unreadable, truncated, not what was written
     ├─ AdapterError              an adapter: does not fit its base, not one of ours or PEFT's
     ├─ CheckpointError           a checkpoint: incomplete, or of another run
     ├─ MachineError              this machine: too little memory or disk for the run
     │   ├─ HostMemoryError       host memory that cannot be had, or not be page-locked
     │   └─ PlanError             a run that will not fit, known before anything is loaded
     └─ TrainingError             a run that cannot go on
         └─ NonFiniteLossError    the loss became inf or NaN; the message names the step and the rows
"""

from dataclasses import dataclass

__all__ = [
    "AdapterError",
    "CacheError",
    "CheckpointError",
    "DataError",
    "HostMemoryError",
    "MachineError",
    "ModelError",
    "NonFiniteLossError",
    "PlanError",
    "Problem",
    "QLoRAError",
    "RecipeError",
    "TrainingError",
]


class QLoRAError(Exception):
    """Base of every error that is the user's to mend: `except QLoRAError` catches all of them and no bug of ours."""

    def report(self) -> str:
        """The text for the terminal: `<Name>: <message>`."""
        return f"{type(self).__name__}: {self}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a recipe, and where.

    file     the recipe's path as it was given, or `--set key` for an override
    line     1-based line in that file; None where there is none (an override, a file that cannot be opened)
    key      dotted key, `data.datasets.0.path`; "" when no key is to blame
    message  what is wrong, one line
    hint     what to do about it, one line; "" when there is nothing to add
    """

    file: str
    line: int | None
    key: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.message}" + (f"\n  {self.hint}" if self.hint else "")


class RecipeError(QLoRAError):
    """A recipe that cannot be used. `problems` holds everything wrong with it, in the order of its lines."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)  # the problems are the args, so that the error survives pickling
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)

    def report(self) -> str:
        """The problems alone: each line already starts with file:line, which editors and terminals can jump to."""
        return str(self)


class DataError(QLoRAError):
    """A dataset that cannot be read or trained on."""


class ModelError(QLoRAError):
    """A base model that cannot be loaded."""


class CacheError(ModelError):
    """A base model's NF4 cache that cannot be read, or does not hold what was written. The message names the file."""


class AdapterError(QLoRAError):
    """An adapter that cannot be loaded or does not fit its base."""


class CheckpointError(QLoRAError):
    """A checkpoint that cannot be resumed from."""


class MachineError(QLoRAError):
    """Too little memory or disk for the run. The message has the numbers, and what to change."""


class HostMemoryError(MachineError):
    """Host memory that cannot be had, or not be page-locked."""


class PlanError(MachineError):
    """A run that will not fit on the machine. The message says what is short, and the smallest changes that fit."""


class TrainingError(QLoRAError):
    """A run that cannot go on."""


class NonFiniteLossError(TrainingError):
    """The loss became inf or NaN. The message names the step and the rows."""
