"""The file in which experience outlasts the gateway, in GATEWAY_STATE_DIR: one file for each GATEWAY_NAME.

Nothing depends on it but estimates. So whatever is wrong with it is said once, as a warning, and never is an error; and
a disk that hangs holds nobody up for long.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import stat
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from gateway.aside import aside
from gateway.fleet.estimates import KEPT, LONGEST_NAME, LONGEST_S, MOST_PHASES
from gateway.fleet.experience import KEPT_MODELS, Experience, Key, Record

log = logging.getLogger(__name__)

VERSION = 1
MOST_BYTES = 4 * 2**20
SAVE_EVERY_S = 5.0
PATIENCE_S = 5.0
"""How long the disk may take to read or write it, before the gateway goes on without."""

T = TypeVar("T")


class Unusable(Exception):
    """The file cannot be read or written; the words say why."""


# ---- what is in it --------------------------------------------------------------------------------------------------

_Word = Annotated[str, Field(max_length=LONGEST_NAME)]
_Seconds = Annotated[float, Field(ge=0, le=LONGEST_S, allow_inf_nan=False)]
_Durations = Annotated[tuple[_Seconds, ...], Field(max_length=KEPT)]
_Known = Annotated[tuple[_Seconds, ...], Field(min_length=1, max_length=KEPT)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: _Word
    made_of: _Word
    host: _Word
    phases: Annotated[dict[_Word, _Known], Field(max_length=MOST_PHASES)]
    drains: _Durations
    stops: _Durations


class _Version(BaseModel):
    version: Annotated[int, Field(ge=0, le=1_000_000)]


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: Literal[1]
    models: Annotated[list[_Entry], Field(max_length=KEPT_MODELS)]


_CONTENT, _VERSION = TypeAdapter(_Content), TypeAdapter(_Version)


def written(records: Mapping[Key, Record]) -> bytes:
    """Return records as the file has them."""
    entries = [
        _Entry.model_construct(
            model=key.model,
            made_of=key.made_of,
            host=key.host,
            phases=dict(record.phases),
            drains=record.drains,
            stops=record.stops,
        )
        for key, record in records.items()
    ]
    return _Content.model_construct(version=VERSION, models=entries).model_dump_json(indent=1).encode() + b"\n"


def read(content: bytes) -> dict[Key, Record]:
    """Return the records of a file.

    Raises:
        Unusable: it is damaged, or another version of the gateway has written it.
    """
    try:
        if (version := _VERSION.validate_json(content).version) != VERSION:
            raise Unusable(f"it is of version {version}, and this gateway writes version {VERSION}")
        entries = _CONTENT.validate_json(content).models
    except ValidationError as error:
        raise Unusable(f"it is damaged ({error.errors(include_input=False)[0]['msg']})") from None
    return {Key(each.model, each.made_of, each.host): Record(each.phases, each.drains, each.stops) for each in entries}


# ---- the file -------------------------------------------------------------------------------------------------------


class ExperienceFile:
    """Reads and writes it, in threads that nobody waits for longer than `patience_s`."""

    def __init__(
        self, folder: Path, owner: str, *, save_every_s: float = SAVE_EVERY_S, patience_s: float = PATIENCE_S
    ) -> None:
        self.path = folder / f"experience-{owner}.json"
        self._save_every_s = save_every_s
        self._patience_s = patience_s
        self._warned: set[str] = set()
        self._writing = threading.Lock()
        self._saved = 0

    @asynccontextmanager
    async def keeping(self, experience: Experience) -> AsyncIterator[None]:
        """Recall what an earlier life of the gateway has learned, and keep what is learned inside."""
        found = await self._attempt(self.load, "What was learned about models is not known")
        experience.recall(found or {})
        self._saved = experience.version
        ending = asyncio.Event()
        saving = asyncio.create_task(self._save_until(ending, experience), name="save experience")
        try:
            yield
        finally:
            ending.set()
            await saving

    async def _save_until(self, ending: asyncio.Event, experience: Experience) -> None:
        ends = False
        while not ends:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._save_every_s):
                    await ending.wait()
            ends = ending.is_set()
            if experience.version != self._saved:
                await self._save(experience)

    async def _save(self, experience: Experience) -> None:
        version, records = experience.version, experience.snapshot()
        warning = "What is learned about models is forgotten when the gateway ends"
        if await self._attempt(lambda: self.save(records), warning):
            self._saved = version

    async def _attempt(self, work: Callable[[], T], warning: str) -> T | None:
        """Return what `work` returns, or None and a warning if it does not."""
        try:
            async with asyncio.timeout(self._patience_s):
                return await aside(work, "experience")
        except Unusable as error:
            why = str(error)
        except TimeoutError:
            why = "the disk does not answer"
        except Exception as error:  # whatever it is, the gateway can do without this file
            why = f"the gateway itself failed ({type(error).__name__})"
        if why not in self._warned:
            self._warned.add(why)
            log.warning("%s: %s: %s. Check GATEWAY_STATE_DIR.", warning, self.path, why)
        return None

    def load(self) -> dict[Key, Record]:
        """Return what the file has; nothing if there is none. Blocks.

        Raises:
            Unusable: it cannot be read.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return self._nothing_yet()
        except OSError as error:
            raise _unusable(error) from None
        try:
            return read(_content(descriptor))
        except OSError as error:
            raise _unusable(error) from None
        finally:
            os.close(descriptor)

    def _nothing_yet(self) -> dict[Key, Record]:
        if not self.path.parent.is_dir():
            raise Unusable("there is no such directory; make it, for the gateway's user")
        return {}

    def save(self, records: Mapping[Key, Record]) -> bool:
        """Put a file with these records in place of the one that is there; return True. Blocks.

        Raises:
            Unusable: it cannot be written, or is being written; the old one stays.
        """
        if not self._writing.acquire(blocking=False):
            raise Unusable("the disk does not answer")
        try:
            self._replace(written(records))
        except OSError as error:
            raise _unusable(error) from None
        finally:
            self._writing.release()
        return True

    def _replace(self, content: bytes) -> None:
        new = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")  # another gateway may write at once
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            new.replace(self.path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def _content(descriptor: int) -> bytes:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise Unusable("it is no regular file")
    with open(descriptor, "rb", closefd=False) as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise Unusable(f"it is larger than {MOST_BYTES // 2**20} MiB, which this gateway never writes")
    return content


def _unusable(error: OSError) -> Unusable:
    return Unusable(error.strerror or type(error).__name__)
