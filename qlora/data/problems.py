"""What is wrong with the rows of a dataset, collected until all of it is known."""

from __future__ import annotations

from qlora.errors import DataError


class Problems:
    """What is wrong with some rows, collected so that a person is told once and not once a run.

    skip   whether a run may go on without the rows that are wrong (`data.skip_bad_rows`)
    count  problems found; a row may have several
    rows   "file:line" of every row that has one
    lines  "file:line: what is wrong", the first `kept` of them
    """

    shown = 50  # a file of the wrong shape is wrong in every row; fifty lines are enough to see that
    kept = 10_000

    def __init__(self, skip: bool = False) -> None:
        self.skip, self.count = skip, 0
        self.rows: set[str] = set()
        self.lines: list[str] = []
        self.advice: dict[str, None] = {}  # what to do about some of them, each once
        self._lost = False

    @property
    def refused(self) -> bool:
        """Whether nothing can be trained on as things stand, so that only the search for problems goes on."""
        return self._lost or bool(self.count and not self.skip)

    def add(self, where: str, what: str, *, rest_unread: bool = False, advice: str | None = None) -> None:
        """Note a problem. rest_unread: what comes after it in the file is unknown, so leaving the row out won't do."""
        self.count += 1
        self.rows.add(where)
        self._lost |= rest_unread
        if len(self.lines) < self.kept:
            self.lines.append(f"{where}: {what}")
        if advice:
            self.advice[advice] = None

    def check(self, *, left: bool) -> None:
        """Raise DataError with all that was collected, unless it may be skipped.

        left  whether a row remains to be trained on
        """
        if not self.refused and (left or not self.count):
            return
        shown = [f"  {line}" for line in self.lines[: self.shown]]
        more = [f"  ... and {self.count - len(shown):,} more"] if self.count > len(shown) else []
        way_out = ["  --skip-bad-rows trains without them"] if left and not (self._lost or self.skip) else []
        title = f"{self.count:,} problem{'s' if self.count > 1 else ''} in the data"
        title += "; without the rows that are wrong none is left" if self.skip and not left else ""
        raise DataError("\n".join([title, *shown, *more, *(f"  {line}" for line in self.advice), *way_out]))
