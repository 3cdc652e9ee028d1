"""Secrets out of texts: what is logged, printed or written down goes through here first.

Known are the values of environment variables that by their names are secrets, and the token that `hf auth login` left
on this machine; and in any text what looks like one: tokens of the Hub and others by their prefixes, the user part and
the query of an address (where addresses are signed), and what is said to be a key or a password.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

__all__ = ["HIDDEN", "is_secret_name", "redact", "redacted"]

HIDDEN = "***"

_SHORTEST = 8  # characters; a shorter value would take words out of texts
_HEAD = 12  # characters of a longer one that give it away
_LONGEST = 16 << 10  # bytes of a token's file
# Of a recipe's key or an environment variable. Not `max_tokens`, nor `tokenizer`, nor the tokens of a vocabulary.
_NAME = re.compile(
    r"(?:^|[_.-])(?:(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)token|passwd)$"
    r"|secret|password|api_?key|access_?key|private_?key|credential",
    re.IGNORECASE,
)
_WORD = r"(?:(?:api|access|secret|private)[_-]?key|secret|password|passwd|(?:access|auth|api|hub|hf|wandb)[_-]?token)"
_VALUE = r"[^\s\"'`,;)\]}]{8,}"
_FIELD = re.compile(r"[a-z_]{1,40}")  # the name of a figure: that it is no secret is seen at once
_PATTERNS = (
    (re.compile(r"://[^/\s?#\"'`]{1,2000}@"), f"://{HIDDEN}@"),
    (re.compile(r"(://[^\s?\"'`]{1,2000}\?)[^\s\"'`<>)]+"), rf"\1{HIDDEN}"),
    (
        re.compile(
            r"(?<![A-Za-z0-9])(?:"
            r"(?:hf_|api_org_)(?:oauth_|jwt_)?[A-Za-z0-9]{16,}"  # the Hub
            r"|gh[opsru]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
            r"|sk-(?=[A-Za-z_-]{0,200}[0-9])[\w-]{16,}"
            r"|A[KS]IA[0-9A-Z]{16}"  # Amazon
            r"|eyJ[\w-]{10,2000}\.eyJ[\w-]{10,2000}\.[\w-]*"  # a JSON web token
            r")"
        ),
        HIDDEN,
    ),
    (re.compile(r"(\bBearer\s+)[^\s\"'`]{8,}", re.IGNORECASE), rf"\1{HIDDEN}"),
    # What is said to be a key; 40 hex digits, wandb's, are a commit elsewhere. After a mere space, not each word.
    (re.compile(rf"({_WORD}[\"'`]?\s{{0,4}}[=:]\s{{0,4}}[\"'`]?){_VALUE}", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(rf"({_WORD}\s{{1,4}})(?=[^\s]{{0,200}}[0-9]){_VALUE}", re.IGNORECASE), rf"\1{HIDDEN}"),
)


def redact(text: str) -> str:
    """The text with `***` in place of every secret in it."""
    return _replacer()(text)


def redacted(value: Any) -> Any:
    """The same for what JSON can hold: all texts in dicts, lists and tuples, and whole values whose key says secret."""
    return _walk(value, _replacer())


def is_secret_name(name: str) -> bool:
    """Whether what bears this name is a secret: `hf_token`, `WANDB_API_KEY`; not `eos_token`."""
    return _NAME.search(name) is not None


def _walk(value: Any, replace: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return replace(value)
    if isinstance(value, dict):
        return {_key(key, replace): _hidden(key, each) or _walk(each, replace) for key, each in value.items()}
    if isinstance(value, list | tuple):
        walked = [_walk(each, replace) for each in value]
        return walked if isinstance(value, list) else tuple(walked)
    return value


def _key(key: Any, replace: Callable[[str], str]) -> Any:
    return replace(key) if isinstance(key, str) and not _FIELD.fullmatch(key) else key


def _hidden(key: Any, value: Any) -> str | None:
    """What stands for a value whose key says that it is a secret."""
    said = isinstance(key, str) and value is not None and not isinstance(value, bool) and is_secret_name(key)
    return HIDDEN if said else None


def _replacer() -> Callable[[str], str]:
    """The function that does it, with the secrets that are known now."""
    known = _any_of(frozenset(_known()))

    def replace(text: str) -> str:
        if known is not None:
            text = known.sub(HIDDEN, text)
        for pattern, hidden in _PATTERNS:
            text = pattern.sub(hidden, text)
        return text

    return replace


@lru_cache(maxsize=8)
def _any_of(secrets: frozenset[str]) -> re.Pattern[str] | None:
    spelt = {form for secret in secrets for form in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1])}
    whole = list(map(re.escape, sorted(spelt, key=len, reverse=True)))
    # A message may repeat only the start of a long value.
    cut = [rf"{re.escape(secret[:_HEAD])}[^\s\"'`]*" for secret in sorted(secrets) if len(secret) >= 2 * _HEAD]
    return re.compile("|".join(whole + cut)) if spelt else None


def _known() -> Iterator[str]:
    for name, value in os.environ.items():
        # Names of sockets and of key files are no secrets, and a message about them needs them.
        if len(value) >= _SHORTEST and is_secret_name(name) and not os.path.exists(value):
            yield value.strip()
    path = os.environ.get("HF_TOKEN_PATH") or os.path.join(
        os.environ.get("HF_HOME")
        or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"),
        "token",
    )
    try:
        written = os.stat(path).st_mtime_ns
    except (OSError, ValueError):
        return
    token = _saved(path, written)
    if len(token) >= _SHORTEST:
        yield token


@lru_cache(maxsize=8)
def _saved(path: str, written: int) -> str:
    try:
        with Path(path).open("rb") as file:
            return file.read(_LONGEST).decode("utf-8", "replace").strip()
    except OSError:
        return ""
