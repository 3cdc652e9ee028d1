"""`--push user/repo`: what an export wrote goes to a hub of models in one commit, and nothing else does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from qlora import durable
from qlora.errors import AdapterError
from qlora.model.untrusted import foreign
from qlora.redact import redact

__all__ = ["check", "files_of", "push"]

_CARD = "README.md"


def check(repo_id: str) -> str:
    """The token to push with: that of $HF_TOKEN, or of `hf auth login`. Nothing is asked of the hub.

    Raises AdapterError where there is none, where `repo_id` is not `user/repo`, or where the hub is not to be asked.
    """
    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HFValidationError("Repo id must be in the form 'namespace/repo_name'.")
    except HFValidationError as error:
        raise AdapterError(
            f"--push {redact(repo_id[:200])!r}: not `user/repo`\n"
            "  a repository's name has letters, digits, `-`, `_` and `.`, at most 96, a letter or digit at its ends"
        ) from error
    if is_offline_mode():
        raise AdapterError(f"--push {repo_id}: HF_HUB_OFFLINE is set, which says that the hub is not to be asked")
    with foreign(f"--push {repo_id}: no token can be had", AdapterError):
        token = get_token()
    if not token:
        raise AdapterError(f"--push {repo_id}: needs a token that may write there: `hf auth login`, or set HF_TOKEN")
    return token


def files_of(made: Sequence[Path], card: Path) -> dict[str, Path]:
    """What to push, by its name in the repository.

    made  directories and files that exports wrote. The first directory's files are at the root, as a hub's users expect
          them; those of the others in folders
    card  the adapter's card, which goes with files that have none

    Only what a directory's manifest names is taken of it. Raises AdapterError where that is not what was written.
    """
    found: dict[str, Path] = {}
    directories = [place for place in made if place.is_dir()]
    for place in directories:
        try:
            names = [*durable.verify(place), durable.MANIFEST]
        except durable.Damaged as damage:
            raise AdapterError(f"{place}: {damage}; export it again") from damage
        folder = "" if place is directories[0] else f"{place.name}/"
        found |= {f"{folder}{name}": place / name for name in names}
    found |= {place.name: place for place in made if place not in directories}
    return found if _CARD in found or not card.is_file() else {**found, _CARD: card}


def push(files: Mapping[str, Path], repo_id: str) -> str:
    """Upload files, by their names there, in one commit: all of it is there, or nothing. Returns the commit's address.

    A repository that is not there is made, and is private.

    Raises AdapterError as `check` does, and where the hub refuses or cannot be reached; no error has the token in it.
    """
    api = HfApi(token=check(repo_id), library_name="qlora")
    operations = [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
    try:
        with foreign(f"{repo_id}: cannot be pushed", AdapterError):
            api.create_repo(repo_id, private=True, exist_ok=True)
            return str(api.create_commit(repo_id, operations, commit_message="qlora export").commit_url)
    except AdapterError as error:
        raise AdapterError(f"{redact(str(error))}\n  {_advice(error.__cause__, repo_id)}") from error.__cause__


def _advice(cause: BaseException | None, repo_id: str) -> str:
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    owner = repo_id.partition("/")[0]
    advice = {
        401: "the token is not valid, or no longer: `hf auth login` gets another, or set HF_TOKEN",
        403: f"the token may not write to {owner}: make one with write access to it",
        404: f"there is no {owner}, or the token does not see it",
    }
    return advice.get(status or 0, "what was exported is whole here; the same command tries again")
