"""`qlora adapters combine` and `interference`: adapters as one, and what each task loses by it, in weights and answers.

    combine(["orders:0.6", "appointments:0.4"], Path("outputs/both"), method="svd")

The combination stands under its name once it is measured and its report is written, and not before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora import durable
from qlora.data.prepare import Data, prepare
from qlora.errors import DataError
from qlora.evaluate.generation import exact
from qlora.export import adapter as export
from qlora.library import combine as library
from qlora.library.combine import Combination
from qlora.library.facts import RECIPE, RUN, read_facts
from qlora.library.interference import BASE, COMBINED, Report, Score
from qlora.library.picture import draw
from qlora.library.registry import Registry
from qlora.live import Live, Question, recipe_of, tokenizer_of
from qlora.machine import device_name, pick_device
from qlora.model.source import open_source

REPORT, PAGE, PICTURE = "interference.json", "interference.md", "interference.svg"
_ADVICE = "give --out a directory on a disk with more room"


def combine(
    words: Sequence[str],
    out: Path,
    *,
    method: str = "cat",
    density: float | None = None,
    rank: int | None = None,
    seed: int | None = None,
    evaluate: bool = True,
    trust_remote_code: bool = False,
    registry: Registry | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Write a combination of adapters to `out`, a PEFT LoRA directory with a report of their interference beside it.

    words              and the rest that is not said here: as library.combine.plan has them
    evaluate           load the base, and measure each adapter and the combination on each one's held-out rows
    trust_remote_code  run Python code that ships with the base
    registry           whose names may be given; None: the user's

    Raises AdapterError for all that is wrong with the words and options, and what Live.load raises; then, and where
    the disk does not take it (MachineError), there is nothing at `out`.
    """
    resolve = (registry or Registry()).resolve
    how = library.plan(words, resolve, out, method=method, density=density, rank=rank, seed=seed)
    sha256 = {share.name: export.weights_sha256(share.path) for share in how.shares}
    with _new(out, how) as draft:
        say(f"combining {', '.join(sha256)} by {method}")
        away = library.combine(how, draft)
        report = Report.of(how.shares, sha256, combination=how, away=away, notes=how.notes)
        if evaluate:
            places = {share.name: share.path for share in how.shares} | {COMBINED: draft.path}
            report = _measured(report, places, trust_remote_code, say)
        _tell(draft, out, how, report, sha256)
        _write(draft, report)
    return report


def interference(
    words: Sequence[str],
    out: Path | None = None,
    *,
    evaluate: bool = True,
    trust_remote_code: bool = False,
    registry: Registry | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """The report alone: how adapters meet, and how each does on the others' held-out rows. out: a directory for it."""
    how = library.plan(words, (registry or Registry()).resolve, out)
    sha256 = {share.name: export.weights_sha256(share.path) for share in how.shares}
    report = Report.of(how.shares, sha256, notes=how.notes)
    if evaluate:
        report = _measured(report, {share.name: share.path for share in how.shares}, trust_remote_code, say)
    if out is not None:
        with _new(out, how) as draft:
            _write(draft, report)
    return report


@contextmanager
def _new(out: Path, how: Combination) -> Iterator[durable.Draft]:
    nbytes = sum(path.stat().st_size for share in how.shares for path in share.path.glob("*") if path.is_file())
    try:
        with durable.new_directory(out) as draft:
            yield draft
    except OSError as error:
        raise durable.disk_error(out, error, nbytes, _ADVICE) from error


def _tell(draft: durable.Draft, out: Path, how: Combination, report: Report, sha256: Mapping[str, str]) -> None:
    """Where it comes from and how good it is: the card, and run.json."""
    first = next((share.path for share in how.shares if read_facts(share.path).base_fingerprint), how.shares[0].path)
    base, revision = export.base_of(how.shares[0].path)
    measured: dict[str, Any] = {
        task: {
            key: value
            for key, value in (("eval_loss", each.loss), ("exact_match", each.exact_match))
            if value is not None
        }
        for task, scores in report.scores.items()
        if (each := scores.get(COMBINED))
    }
    facts = export.facts(measured, "", device_name(pick_device())) | library.facts_of(how, sha256)
    del facts["data_sha256"]
    facts["base"] = {"fingerprint": read_facts(first).base_fingerprint, "revision": revision}
    recipe = (draft.path / RECIPE).read_text(encoding="utf-8") if (draft.path / RECIPE).is_file() else "# none"
    draft.write("README.md", export.card(out.resolve().name, recipe, base, revision, facts).encode())
    files = {name: record.model_dump() for name, record in draft.adopt().items()}
    run = json.dumps({**facts, "files": files}, indent=1, ensure_ascii=False) + "\n"
    draft.write(RUN, run.encode("utf-8", "backslashreplace"))


def _write(draft: durable.Draft, report: Report) -> None:
    for name, text in ((REPORT, report.to_json()), (PAGE, report.markdown(PICTURE)), (PICTURE, draw(report))):
        draft.write(name, text.encode())


# --- behaviour


def _measured(
    report: Report, places: Mapping[str, Path], trust_remote_code: bool, say: Callable[[str], None]
) -> Report:
    """The report with what everyone answers to each task's held-out rows: those of its adapter's recipe."""
    tasks, notes = {}, list(report.notes)
    for share in report.shares:
        try:
            tasks[share.name] = _rows(share.path, trust_remote_code)
        except DataError as error:
            notes.append(f"{share.name} is not measured: {error}".replace("\n", ";"))
    scores: dict[str, dict[str, Score]] = {task: {} for task in tasks}
    if tasks:
        with Live.load(places, trust_remote_code=trust_remote_code, say=say) as live:
            for who in (*([BASE] if live.has_base else []), *live.names):
                live.use(None if who == BASE else who)
                for task, data in tasks.items():
                    scores[task][who] = score(live, data)
                    say(f"{who} on {task}: {scores[task][who]}")
    return replace(report, scores=scores, notes=notes)


def _rows(adapter: Path, trust_remote_code: bool) -> Data:
    """An adapter's rows, as it was taught them. Raises DataError where there are no held-out ones to be had."""
    if not (adapter / RECIPE).is_file():
        raise DataError("it has no recipe, which would say its held-out rows")
    config = recipe_of(adapter, trust_remote_code)
    data = prepare(config, tokenizer_of(adapter, open_source(config.model), config))
    if not len(data.held_out_batches(False)):
        raise DataError("its recipe holds no rows out (`data.eval_datasets`)")
    return data


def score(live: Live, data: Data) -> Score:
    """How whoever is in use does on held-out rows; answers are counted where the recipe asks for them."""
    training = data.config.training
    asked = sorted(data.questions() if training.predict_with_generate else [], key=lambda question: len(question.ids))
    right = 0
    for first in range(0, len(asked), training.per_device_eval_batch_size):  # of one length, for least padding
        some = asked[first : first + training.per_device_eval_batch_size]
        got = live.answers([Question(each.ids, training.generation_max_length) for each in some])
        right += sum(exact(each.expected, answer.text) for each, answer in zip(some, got, strict=True))
    return Score(live.loss(data.held_out_batches(False)), right / len(asked) if asked else None)
