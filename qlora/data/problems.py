"""What is wrong with the rows of a dataset, collected until all of it is known."""

from __future__ import annotations

from qlora.errors import DataError


class Problems:
    """What is wrong with some rows, collected so that a person is told once and not once a run."""

    shown = 20  # a file of the wrong shape is wrong in every row; twenty lines are enough to see that

    def __init__(self) -> None:
        self.count = 0
        self.lines: list[str] = []

    def add(self, where: str, what: str) -> None:
        self.count += 1
        if len(self.lines) < self.shown:
            self.lines.append(f"  {where}: {what}")

    def check(self, where: str) -> None:
        """Raise DataError with all that was collected, if anything was. `where` ends its title: "3 problems in ..."."""
        if self.count:
            more = self.count - len(self.lines)
            rest = [f"  ... and {more} more"] if more else []
            title = f"{self.count} problem{'s' if self.count > 1 else ''} {where}"
            raise DataError("\n".join([title, *self.lines, *rest]))
