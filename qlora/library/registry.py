"""The library: adapters by name and version, in one directory of the user's.

    objects/<sha256>/         an adapter as its run left it, sealed by a manifest; never changed. The hash is that of
                              its files' names and hashes: the same content is one object, whatever names it has
        entry.json            beside what is sealed: its versions, which is all that the index knows of it
    index.json                the versions of all names
    trash/                    what `remove` took out: a list of versions (name@N.json), and objects that no name has
    .lock                     held by the process that writes

A write is done when index.json is replaced, in one moment. Before that a new object is there in full; after it the
entries are brought in line and objects that no name has go to the trash; if a process dies before that, the next write
does it. Should the index be lost or damaged, it is made again from the entries, and nothing is missing.
Readers take no lock: they find the index before a write or after it.

An adapter is copied, not linked: whoever trains into the directory it came from could else change what is sealed.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from qlora import durable
from qlora.errors import AdapterError, QLoRAError
from qlora.library.facts import CONFIG, WEIGHTS, Facts, read_facts
from qlora.library.files import check, damage_of, files_of, identity, pieces, record_of
from qlora.lock import Lock, Locked
from qlora.model.untrusted import read_json

__all__ = ["Finding", "Registry", "Version", "base_when_added", "default_home"]

INDEX = "index.json"
ENTRY = "entry.json"
NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
_REFERENCE = re.compile(rf"({NAME})(?:@([0-9a-f]{{4,64}})|:({NAME}))?")
_PATIENCE = 10.0  # seconds to wait for another process that writes; an adapter is copied in one or two
_ADVICE = "the library is whole; make room there, or set XDG_DATA_HOME to another place"

Name = Annotated[str, StringConstraints(pattern=rf"^{NAME}$")]
Time = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Version(BaseModel):
    """One adapter under one name.

    number     counts a name's versions from 1; the newest that is not withdrawn is what the name means
    sha256     its object
    added      when, in unix seconds
    tags       names for this version; within a name each is on one version only
    source     the directory that it came from
    base       where its base lay then, if that was a path: what the adapter says may count from a directory of then
    withdrawn  when a rollback took it back; None while it counts
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Name
    number: Annotated[int, Field(ge=1)]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    added: Time
    tags: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    source: str = ""
    base: str = ""
    withdrawn: Time | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.sha256[:12]}"


class _Versions(BaseModel):
    """index.json, an entry.json, or a list in the trash."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Annotated[int, Field(ge=1, le=1)] = 1
    versions: list[Version]


@dataclass(frozen=True, slots=True)
class Finding:
    """What `verify` saw. where: a version or a file; bad: whether something is to be done about it."""

    where: str
    said: str
    bad: bool = True


class Registry:
    """The adapters in one directory.

    home  where; by default the user's (`default_home`). It is made by the first `add`
    say   told in a sentence what was mended

    What takes a `reference` takes NAME, NAME@HASH (4 or more of its digits) or NAME:TAG. Every method raises
    AdapterError for what is not there or cannot be done, and MachineError where the disk does not take it.
    """

    def __init__(self, home: Path | None = None, say: Callable[[str], object] = lambda text: None) -> None:
        self.home = default_home() if home is None else home
        self._to, self._said = say, set[str]()

    # Reading

    def names(self) -> list[str]:
        """All names, by the alphabet."""
        return sorted({version.name for version in self._read()})

    def versions(self, name: str) -> list[Version]:
        """A name's versions, the oldest first."""
        return _of(self._read(), name)

    def find(self, reference: str) -> Version:
        """The version that a reference means; of a bare name the newest that was not rolled back."""
        return self._find(self._read(), reference)

    def path(self, version: Version) -> Path:
        """The directory of its adapter. What lies there is sealed: read it only."""
        return self._object(version.sha256)

    def resolve(self, reference: str) -> Path:
        """The adapter's directory for what a person typed: a reference, or a path.

        What has a `/` in it is a path. A word that is both a name here and an adapter's directory beside the person is
        refused: either could be meant.
        """
        here, match = _directory(reference), _REFERENCE.fullmatch(reference)
        if match is None:
            if here is None:
                raise AdapterError(f"{reference[:300]!r}: no such directory, and not a name in the library either")
            return here
        versions = self._read()
        known = any(version.name == match[1] for version in versions)
        if known and here is not None and (here / CONFIG).is_file():
            raise AdapterError(
                f"{reference}: a name in the library, and a directory here\n"
                f"  say ./{reference} for the directory, or {self._find(versions, reference)} for the library's"
            )
        if not known and here is not None:
            return here
        return self._there(self._find(versions, reference))

    def facts(self, version: Version) -> Facts:
        """What its adapter says of itself."""
        return read_facts(self._there(version))

    def parent(self, facts: Facts) -> Version | None:
        """The version here that an adapter was continued from."""
        return self.holder(facts.parent_weights) if facts.parent_weights else None

    def holder(self, sha256: str) -> Version | None:
        """The version here whose weights have this SHA-256, under its oldest name."""
        for version in sorted(self._read(), key=lambda version: version.added):
            try:
                sealed = read_json(self.path(version) / durable.MANIFEST, AdapterError)
                if sealed["files"][WEIGHTS]["sha256"] == sha256:
                    return version
            except (AdapterError, KeyError, TypeError):
                continue  # `verify` tells of it
        return None

    # Writing

    def add(self, directory: Path, name: str | None = None, tag: str | None = None) -> Version:
        """Take a copy of a PEFT LoRA directory as the newest version of a name (by default the directory's own).

        It is looked through as anyone's would be; where its run.json has its files' hashes, they must be right. What
        the name means already is not added again. Raises AdapterError, and leaves nothing, for what is no adapter,
        is not whole, or changes while it is read.
        """
        name = _checked(directory.resolve().name.lower() if name is None else name, "--name")
        tag = None if tag is None else _checked(tag, "--tag")
        files, base = files_of(directory), _base_here(directory)
        records = {file: record_of(path) for file, path in files.items()}
        sha256, nbytes = identity(records), sum(record.size for record in records.values())
        with self._writing(nbytes) as versions:
            theirs = [version for version in versions if version.name == name]
            new = Version(
                name=name,
                number=max((version.number for version in theirs), default=0) + 1,
                sha256=sha256,
                added=time.time(),
                source=_sayable(directory.resolve()),
                base=base,
            )
            if damage_of(self._object(sha256), sha256):
                self._copy(directory, files, [v for v in versions if v.sha256 == sha256] or [new])
            current = _newest(theirs)
            if current is None or current.sha256 != sha256:
                versions.append(new)
                current = new
            elif base and base != current.base:  # the same from where its base can be seen
                at = versions.index(current)
                current = versions[at] = current.model_copy(update={"base": base})
            return current if tag is None else _tag(versions, current, tag)

    def tag(self, reference: str, tag: str) -> Version:
        """Put a tag on a version; another version of that name loses it."""
        tag = _checked(tag, "TAG")
        with self._writing() as versions:
            return _tag(versions, self._find(versions, reference), tag)

    def rollback(self, name: str) -> Version:
        """Let a name mean the version before; returns that. What is taken back stays there, as NAME@HASH."""
        with self._writing() as versions:
            current = _newest(_of(versions, name))
            before = [v for v in _of(versions, name) if v.withdrawn is None and v != current]
            if current is None or not before:
                raise AdapterError(f"{name}: no version before {current or 'it'} to go back to")
            versions[versions.index(current)] = current.model_copy(update={"withdrawn": time.time()})
            return before[-1]

    def remove(self, name: str) -> Path:
        """Take a name with all its versions out of the library; returns the list of them in the trash."""
        with self._writing() as versions:
            theirs = _of(versions, name)
            note = self.home / "trash" / f"{name}@{max(self._notes(name), default=0) + 1}.json"
            note.parent.mkdir(exist_ok=True)
            durable.replace_file(note, _json(theirs))
            versions[:] = [version for version in versions if version.name != name]
            return note

    def restore(self, name: str) -> Version:
        """Bring back from the trash what was removed last under a name."""
        with self._writing() as versions:
            if any(version.name == name for version in versions):
                raise AdapterError(f"{name}: is in the library; what is in the trash cannot have that name too")
            notes = self._notes(name)
            if not notes:
                raise AdapterError(f"{name}: not in the trash ({self.home / 'trash'})")
            note = notes[max(notes)]
            theirs = _listed(note)
            if theirs is None:
                raise AdapterError(f"{note}: damaged\n  `qlora adapters add` takes an object in the trash, too")
            back = []
            for version in theirs:
                trashed = self.home / "trash" / version.sha256
                if trashed.is_dir() and not self.path(version).exists():
                    os.rename(trashed, self.path(version))
                if self.path(version).is_dir():
                    back.append(version)
                else:
                    self._say(f"{version}: its files are gone from the trash")
            if not back:
                raise AdapterError(f"{name}: its files are gone from the trash ({self.home / 'trash'})")
            versions += back
            durable.sync(self.home / "objects")
        with suppress(OSError):  # it is done; a list that is left is older than the next one
            note.unlink()
        return self.find(name)

    def verify(self, name: str | None = None) -> list[Finding]:
        """Read every byte back, of one name or of all: objects against their manifests and their names, entries against
        the index, and the base against its fingerprint, where it is recorded and the base is a path here. A lost or
        damaged index is made again."""
        if name is None and _listed(self.home / INDEX) is None and self.home.is_dir():
            with self._writing():
                pass
        versions = self._read() if name is None else self.versions(name)
        found = []
        for version in versions:
            place = self.path(version)
            said = damage_of(place, version.sha256)
            if said:
                found.append(Finding(str(version), f"{said}; add it again from where it came: {version.source}"))
                continue
            entry = _listed(place / ENTRY)
            if entry is None or version not in entry:
                found.append(Finding(str(version), f"{ENTRY} is not as {INDEX} has it; the next change mends it"))
            found.append(self._base(version))
        if name is None:
            known = {version.sha256 for version in versions}
            stray = [each for each in self._objects() if each.name not in known]
            found += [Finding(str(each), "no name has it; the next change takes it to the trash") for each in stray]
        return found

    # Inside

    def _base(self, version: Version) -> Finding:
        """Whether the base that is here is the one it was trained on."""
        try:
            facts = read_facts(self.path(version))
            base, recorded = facts.base or "", facts.base_fingerprint
            if not _is_here(base):
                base = version.base or base
            if not _is_here(base):
                return Finding(str(version), f"whole; the base is not here to compare: {base}", bad=False)
            from qlora.config import ModelConfig  # these import torch, for nothing where there is no base
            from qlora.model.adapters import refuse_misfit
            from qlora.model.source import open_source

            source = open_source(ModelConfig(model_name_or_path=base))
            if recorded is None:  # an adapter from elsewhere
                refuse_misfit(self.path(version), source)
                said = "whole; fits the base by names and shapes, of whose weights nothing is recorded"
                return Finding(str(version), said, bad=False)
            if source.fingerprint() == recorded:
                return Finding(str(version), "whole; the base is the one it was trained on", bad=False)
            return Finding(str(version), f"the base here is not the one it was trained on: {base}")
        except QLoRAError as error:
            return Finding(str(version), str(error))

    def _find(self, versions: list[Version], reference: str) -> Version:
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            raise AdapterError(f"{reference!r}: not a name in the library: say NAME, NAME@HASH or NAME:TAG")
        name, prefix, tag = match.groups()
        theirs = _of(versions, name)
        if prefix is None and tag is None:
            newest = _newest(theirs)
            if newest is None:  # an index that was edited
                raise AdapterError(f"{name}: all its versions were rolled back; say {theirs[-1]}")
            return newest
        fitting = [v for v in theirs if (tag in v.tags if tag else v.sha256.startswith(prefix or ""))]
        if len({version.sha256 for version in fitting}) != 1:
            known = [str(v) for v in theirs] if tag is None else sorted(f"{name}:{t}" for v in theirs for t in v.tags)
            word = "means more than one version" if fitting else "no such version"
            raise AdapterError(f"{reference}: {word}\n  there is {', '.join(known) or 'no tag'}")
        return fitting[-1]

    def _say(self, text: str) -> None:
        """Once, however often it is read."""
        if text not in self._said:
            self._said.add(text)
            self._to(text)

    def _there(self, version: Version) -> Path:
        if not self.path(version).is_dir():
            raise AdapterError(f"{version}: its files are gone: {self.path(version)}\n  add it again")
        return self.path(version)

    def _notes(self, name: str) -> dict[int, Path]:
        """The lists of what was removed under a name, by number."""
        pattern = re.compile(rf"{re.escape(name)}@(\d{{1,9}})\.json")
        found = ((pattern.fullmatch(path.name), path) for path in (self.home / "trash").glob("*.json"))
        return {int(match[1]): path for match, path in found if match}

    def _object(self, sha256: str) -> Path:
        return self.home / "objects" / sha256

    def _objects(self) -> list[Path]:
        places = self.home / "objects"
        return sorted(p for p in places.iterdir() if re.fullmatch("[0-9a-f]{64}", p.name)) if places.is_dir() else []

    def _read(self) -> list[Version]:
        """The versions of all names, by name and number."""
        path = self.home / INDEX
        versions = _listed(path)
        if versions is None:
            versions = list(self._from_entries())
            if versions or path.exists():
                self._say(f"{path} {'is damaged' if path.exists() else 'is missing'}: read from the adapters' entries")
        return sorted(versions, key=_order)

    def _from_entries(self) -> Iterator[Version]:
        for place in self._objects():
            entry = _listed(place / ENTRY)
            if entry is None:
                name = f"recovered-{place.name[:12]}"
                self._say(f"{place}: has no {ENTRY} that can be read; it is called {name} now")
                entry = [Version(name=name, number=1, sha256=place.name, added=place.stat().st_mtime)]
            yield from (version for version in entry if version.sha256 == place.name)

    @contextmanager
    def _writing(self, nbytes: int = 1 << 20) -> Iterator[list[Version]]:
        """All versions, to be changed in place; they are written when the context ends. nbytes: about what it takes."""
        try:
            (self.home / "objects").mkdir(parents=True, exist_ok=True)
            with self._locked():
                for folder in (self.home, self.home / "objects", self.home / "trash"):
                    for leftover in folder.glob(durable.UNFINISHED):
                        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
                versions = self._read()
                yield versions
                content = _json(sorted(versions, key=_order))
                if not (self.home / INDEX).is_file() or (self.home / INDEX).read_bytes() != content:
                    durable.replace_file(self.home / INDEX, content)
                self._settle(versions)
        except OSError as error:
            raise durable.disk_error(self.home, error, nbytes, _ADVICE) from error

    def _locked(self) -> Lock:
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                return Lock(self.home)
            except Locked as locked:
                if time.monotonic() > until:
                    raise AdapterError(f"{self.home}: {locked.holder} is writing to it; try again later") from None

    def _settle(self, versions: Iterable[Version]) -> None:
        """Bring the objects in line with the versions: their entries, and those without a name into the trash."""
        wanted: dict[str, list[Version]] = {}
        for version in sorted(versions, key=_order):
            wanted.setdefault(version.sha256, []).append(version)
        for place in self._objects():
            theirs = wanted.get(place.name)
            if theirs is None:
                trashed = self.home / "trash" / place.name
                trashed.parent.mkdir(exist_ok=True)
                if trashed.exists():  # from another time; it has the same content
                    shutil.rmtree(trashed)
                os.rename(place, trashed)
            elif _listed(place / ENTRY) != theirs:
                durable.replace_file(place / ENTRY, _json(theirs))

    def _copy(self, directory: Path, files: Mapping[str, Path], versions: list[Version]) -> None:
        """Make the object of these versions, after a look at what was copied. There is none after an AdapterError."""
        sha256 = versions[0].sha256
        with durable.new_directory(self._object(sha256)) as draft:
            for name, path in files.items():
                with draft.writer(name) as writer:
                    for piece in pieces(path):
                        writer.write(piece)
            try:
                if identity(draft.adopt()) != sha256:
                    raise AdapterError(f"{directory}: changed while it was read; is a run writing there?")
                check(draft.path)
            except AdapterError as error:
                raise AdapterError(str(error).replace(str(draft.path), str(directory))) from error
            durable.replace_file(draft.path / ENTRY, _json(versions))


def default_home() -> Path:
    """`qlora/adapters` in the user's data directory ($XDG_DATA_HOME, ~/.local/share)."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "qlora" / "adapters"


def _directory(text: str) -> Path | None:
    """The directory that a person named; None where there is none, or where it can be no path at all."""
    try:
        path = Path(text).expanduser()
        return path if text and path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, the home of nobody, a NUL
        return None


def base_when_added(directory: Path) -> str | None:
    """Where the base of an adapter in a library lay when it was added; None where that was no path, and for others."""
    versions = _listed(directory / ENTRY) or []
    return next((version.base for version in reversed(versions) if version.base), None)


def _base_here(directory: Path) -> str:
    """The absolute path of the base that an adapter names; "" where there is no such path."""
    base = read_facts(directory).base or ""
    return _sayable(Path(base).expanduser().resolve()) if _is_here(base) else ""


def _is_here(base: str) -> bool:
    try:
        return bool(base) and Path(base).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # as in `_directory`
        return False


def _sayable(path: Path) -> str:
    """A path as an index can hold it, whatever bytes are in it."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _listed(path: Path) -> list[Version] | None:
    """The versions in a file; None where there is no such file, or it is damaged."""
    try:
        return _Versions.model_validate_json(path.read_bytes()).versions
    except FileNotFoundError:
        return None
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValidationError, RecursionError):
        return None


def _json(versions: list[Version]) -> bytes:
    return (_Versions(versions=versions).model_dump_json(indent=1) + "\n").encode()


def _order(version: Version) -> tuple[str, int]:
    return version.name, version.number


def _of(versions: Iterable[Version], name: str) -> list[Version]:
    """A name's versions, the oldest first. Raises AdapterError where there is no such name."""
    versions = sorted(versions, key=_order)
    if found := [version for version in versions if version.name == name]:
        return found
    names = sorted({version.name for version in versions})
    close = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {close[0]}?" if close else "`qlora adapters list` shows what there is"
    raise AdapterError(f"{name}: no adapter of that name in the library\n  {hint}")


def _newest(versions: Iterable[Version]) -> Version | None:
    return max((v for v in versions if v.withdrawn is None), key=lambda v: v.number, default=None)


def _tag(versions: list[Version], version: Version, tag: str) -> Version:
    """Move a tag to a version, in the list."""
    for at, each in enumerate(versions):
        if each.name == version.name:
            kept = {*each.tags} - {tag} | ({tag} if each == version else set())
            versions[at] = each.model_copy(update={"tags": tuple(sorted(kept))})
    return next(v for v in versions if _order(v) == _order(version))


def _checked(name: str, what: str) -> str:
    """A name or a tag, or AdapterError: it becomes part of file names and of what people type."""
    if not re.fullmatch(NAME, name):
        raise AdapterError(
            f"{what} {name[:80]!r}: a name has a-z, 0-9, `.`, `_` and `-`\n"
            "  it starts with a letter or digit, and has at most 64 characters"
        )
    return name
