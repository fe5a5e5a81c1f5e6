"""The callers' keys: what each may do, and the file that they are in, one JSON object a line.

A key is 256 random bits, so its plain SHA-256 tells nobody what it is; the file has no key, only those. The
gateway reads it at its start. `add_key` and `remove_key` change it for the next one.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from gateway.catalog_values import shown, unknown_key
from gateway.errors import CatalogError

Right = Literal["generate", "manage"]
RIGHTS: tuple[Right, ...] = get_args(Right)

MOST_BYTES = 1_000_000
MOST = 1_000_000
"""The largest limit that makes sense; each request within the last minute is remembered."""
PREFIX = "gw_"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of one key: not the key itself. Limits of None are none."""

    name: str
    sha256: str
    rights: frozenset[str]
    requests_per_minute: int | None = None
    max_concurrency: int | None = None


FIELDS = tuple(Key.__dataclass_fields__)


class NoChange(Exception):
    """The file of keys was left as it was; the words say why."""


def by_hash(keys: Iterable[Key]) -> Mapping[str, Key]:
    """Return the keys as `holder_of` looks for them."""
    return {key.sha256: key for key in keys}


def holder_of(token: bytes, keys: Mapping[str, Key]) -> Key | None:
    """Return the key that was shown, or None.

    How long it takes tells nothing of any key: what is looked up is a hash of what was shown, by yet another hash that
    is this process's secret; and what is found is compared in constant time.
    """
    shown_sha256 = hashlib.sha256(token).hexdigest()
    key = keys.get(shown_sha256)
    return key if key is not None and hmac.compare_digest(shown_sha256, key.sha256) else None


# ---- the file -------------------------------------------------------------------------------------------------------


def load_keys(path: Path) -> tuple[Key, ...]:
    """Return the keys of the file. It may hold none: then nobody has one.

    Raises:
        CatalogError: with a complaint for everything that is wrong with it, each with its line.
    """
    try:
        with path.open("rb") as file:
            return parse_keys(file.read(MOST_BYTES + 1), path)
    except FileNotFoundError:
        rule = "there is no such file; `gateway keys add NAME --rights generate` makes it"
    except OSError as error:
        rule = f"cannot be read: {error.strerror}"
    raise CatalogError([f"{shown(str(path), 4096)}: {rule}"])


def parse_keys(content: bytes, path: Path) -> tuple[Key, ...]:
    """Return the keys that `content`, read from `path`, holds.

    Raises:
        CatalogError: as `load_keys`. No complaint quotes a value: somebody may have written a key there.
    """
    file = shown(str(path), 4096)
    if len(content) > MOST_BYTES:
        raise CatalogError([f"{file}: is larger than {MOST_BYTES:,} bytes"])
    complaints: list[str] = []
    keys: dict[int, Key] = {}
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            said, rules = _object(line)
            rules = rules or list(_faults(said))
            complaints += [f"{file}:{number}: {rule}" for rule in rules]
            if not rules:
                keys[number] = _key(said)
    complaints += [f"{file}:{number}: {rule}" for number, rule in _clashes(keys)]
    if complaints:
        raise CatalogError(complaints)
    return tuple(keys.values())


def _object(line: bytes) -> tuple[dict[str, Any], list[str]]:
    """Return what the line says, or what is wrong with it as a whole."""
    repeated: list[str] = []

    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated.extend(f"{name}: is written twice" for name in FIELDS if names.count(name) > 1)
        return dict(pairs)

    try:
        said = json.loads(line.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError):
        return {}, ["must be one JSON object, in UTF-8"]
    if not isinstance(said, dict):
        return {}, ["must be one JSON object"]
    return said, repeated


def _faults(said: dict[str, Any]) -> Iterator[str]:
    yield from (f"{field}: is missing" for field in ("name", "sha256", "rights") if field not in said)
    for field, value in said.items():
        if rule := _rule(field, value):
            yield f"{shown(field)}: {rule}"


def _rule(field: str, value: object) -> str | None:
    """Return the rule that the value of a field breaks, or None."""
    match field:
        case "name":
            fine = isinstance(value, str) and _NAME.fullmatch(value)
            return (
                None
                if fine
                else "must be 1 to 63 letters, digits, `.`, `_`, `@` and `-`, and begin with one of the first"
            )
        case "sha256":
            fine = isinstance(value, str) and _SHA256.fullmatch(value)
            return None if fine else "must be a SHA-256 in 64 hexadecimal digits, lower case"
        case "rights":
            known = isinstance(value, list) and value and all(right in RIGHTS for right in value)
            return None if known else f"must be a list of some of {', '.join(RIGHTS)}"
        case "requests_per_minute" | "max_concurrency":
            within = type(value) is int and 1 <= value <= MOST  # and no bool
            return None if within else f"must be a whole number from 1 to {MOST:,}; leave it out for no limit"
    return unknown_key(field, FIELDS)


def _key(said: dict[str, Any]) -> Key:
    return Key(**{**said, "rights": frozenset(said["rights"])})


def _clashes(keys: dict[int, Key]) -> Iterator[tuple[int, str]]:
    """Yield (line, rule) for keys that cannot be told apart: two of one name, or two that are the same."""
    for field in ("name", "sha256"):
        seen: dict[str, int] = {}
        for number, key in keys.items():
            first = seen.setdefault(getattr(key, field), number)
            if first != number:
                yield number, f"{field}: is that of line {first} already"


# ---- changing it ----------------------------------------------------------------------------------------------------


def add_key(
    path: Path,
    name: str,
    rights: Collection[str],
    *,
    requests_per_minute: int | None = None,
    max_concurrency: int | None = None,
) -> str:
    """Append a new key to the file and return it; it is nowhere else. The file is made if need be, for its owner only.

    One line is appended at once, while no other such command writes.

    Raises:
        NoChange: there is one of that name, or the file cannot be written.
        CatalogError: the file is wrong as it is, or the new line would be.
    """
    token = PREFIX + secrets.token_urlsafe(32)
    said: dict[str, Any] = {"name": name, "sha256": hashlib.sha256(token.encode()).hexdigest()}
    said["rights"] = [right for right in RIGHTS if right in rights]
    limits = {"requests_per_minute": requests_per_minute, "max_concurrency": max_concurrency}
    said |= {limit: value for limit, value in limits.items() if value is not None}
    if rules := list(_faults(said)):
        raise CatalogError(rules)
    with _locked(path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as (descriptor, content):
        if any(key.name == name for key in parse_keys(content, path)):
            raise NoChange(f"{path} has a key {name} already: choose another name, or remove that one first.")
        line = (json.dumps(said) + "\n").encode()
        _write(descriptor, line if content.endswith(b"\n") or not content else b"\n" + line)
    return token


def remove_key(path: Path, name: str) -> None:
    """Take a key out of the file; the rest stays as it is. Whoever reads it sees the old one or the new one.

    Raises:
        NoChange: there is no such key, or the file cannot be written.
        CatalogError: the file is wrong as it is.
    """
    with _locked(path, os.O_RDWR) as (descriptor, content):
        keys = parse_keys(content, path)
        if all(key.name != name for key in keys):
            names = ", ".join(key.name for key in keys) or "none"
            raise NoChange(f"{path} has no key {shown(name)}; it has {names}.")
        lines = content.splitlines(keepends=True)
        _replace(path, descriptor, b"".join(line for line in lines if _name_in(line) != name))


def _name_in(line: bytes) -> str | None:
    return str(json.loads(line)["name"]) if line.strip() else None


@contextmanager
def _locked(path: Path, flags: int) -> Iterator[tuple[int, bytes]]:
    """Give the open file and its content, while no other such command has it."""
    try:
        descriptor = _open_locked(path, flags)
        try:
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read(MOST_BYTES + 1)
            yield descriptor, content
        finally:
            os.close(descriptor)
    except OSError as error:
        raise NoChange(f"{path} cannot be changed: {error.strerror}.") from None


def _open_locked(path: Path, flags: int) -> int:
    while True:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # while we waited for it, another one has taken its place


def _write(descriptor: int, content: bytes) -> None:
    """Write all of it, and not less: a file is not left with half a line."""
    before = os.fstat(descriptor).st_size
    if os.write(descriptor, content) != len(content):
        os.ftruncate(descriptor, before)
        raise OSError(0, "the disk is full")
    os.fsync(descriptor)


def _replace(path: Path, descriptor: int, content: bytes) -> None:
    """Put a new file in place of the one that is open, with its owner and mode."""
    path = path.resolve()
    was, new = os.fstat(descriptor), path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    made = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with suppress(PermissionError):
            os.fchown(made, was.st_uid, was.st_gid)
        os.fchmod(made, was.st_mode & 0o777)
        _write(made, content)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    finally:
        os.close(made)
