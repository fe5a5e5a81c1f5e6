"""The file that experience is kept in: whatever becomes of it, the gateway goes on, and says so once."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.fleet.estimates import KEPT, LONGEST_NAME, LONGEST_S, MOST_PHASES
from gateway.fleet.experience import KEPT_MODELS, Experience, Key, Record
from gateway.fleet.experience_file import MOST_BYTES, ExperienceFile, Unusable, read, written

KEY = Key("gpt-2", "0123456789abcdef", "here")
RECORD = Record({"loading": (30.0, 31.5), "warming up": (4.0,)}, drains=(2.0,), stops=(0.2, 0.3))
OTHER = Record({"loading": (99.0,)})

DURATIONS = st.lists(st.floats(0, LONGEST_S), max_size=KEPT).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=LONGEST_NAME)
RECORDS = st.dictionaries(
    st.builds(Key, NAMES, NAMES, NAMES),
    st.builds(
        Record,
        st.dictionaries(NAMES, DURATIONS.filter(bool), max_size=3),
        drains=DURATIONS,
        stops=DURATIONS,
    ),
    max_size=3,
)


@given(RECORDS)
def test_what_is_written_is_what_is_read(records: Mapping[Key, Record]) -> None:
    found = read(written(records))

    assert found == records
    assert list(found) == list(records)  # the oldest first


def test_the_most_that_is_ever_remembered_is_a_file_that_is_read() -> None:
    longest = Record(
        {f"\x01{number:063}": (LONGEST_S - 0.001,) * KEPT for number in range(MOST_PHASES)},
        (LONGEST_S,) * KEPT,
        (LONGEST_S,) * KEPT,
    )
    records = {Key(f"{number:063}", "f" * 16, "\x01" * LONGEST_NAME): longest for number in range(KEPT_MODELS)}

    content = written(records)

    assert len(content) <= MOST_BYTES
    assert read(content) == records


def entry(**said: Any) -> dict[str, Any]:
    return {"model": "m", "made_of": "f", "host": "h", "phases": {}, "drains": [], "stops": [], **said}


def content(*entries: Any, version: Any = 1, **more: Any) -> bytes:
    return json.dumps({"version": version, "models": list(entries), **more}).encode()


DAMAGED = {
    "empty": b"",
    "not JSON": b"\x00\xff\x13",
    "half written": written({KEY: RECORD})[:-40],
    "no object": b"[1, 2]",
    "no version": b'{"models": []}',
    "a version that is none": content(version=10**40),
    "a version in words": content(version="1"),
    "no models": b'{"version": 1}',
    "further keys": content(secret="x"),
    "an entry that is none": content(7),
    "an entry with a further key": content(entry(prompt="x")),
    "a negative duration": content(entry(drains=[-1])),
    "a duration in words": content(entry(drains=["1"])),
    "no number": content(entry(phases={"loading": [float("nan")]})),
    "infinite": content(entry(stops=[float("inf")])),
    "beyond all measure": content(entry(stops=[1e300])),
    "too many digits": b'{"version": 1, "models": [{"drains": [' + b"9" * 10_000 + b"]}]}",
    "too many durations": content(entry(stops=[1] * (KEPT + 1))),
    "a phase that was never measured": content(entry(phases={"loading": []})),
    "too many phases": content(entry(phases={str(number): [1] for number in range(MOST_PHASES + 1)})),
    "a name too long": content(entry(model="m" * 65)),
    "too many models": content(*[entry(model=str(number)) for number in range(KEPT_MODELS + 1)]),
    "nested without end": b"[" * 100_000,
}


@pytest.mark.parametrize("damaged", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_not_believed(damaged: bytes) -> None:
    with pytest.raises(Unusable, match="it is damaged"):
        read(damaged)


def test_a_file_of_another_version_is_not_believed() -> None:
    with pytest.raises(Unusable, match="it is of version 2, and this gateway writes version 1"):
        read(content({"whatever": "comes"}, version=2))


@given(st.binary(max_size=200))
def test_no_bytes_whatever_make_another_error(noise: bytes) -> None:
    with pytest.raises(Unusable):
        read(noise)


# ---- on a disk ------------------------------------------------------------------------------------------------------


def kept(
    folder: Path, meanwhile: Callable[[Experience], Awaitable[None]] | None = None, *, owner: str = "default"
) -> Mapping[Key, Record]:
    """Live one gateway's life with this folder; return what it recalled."""

    async def live() -> Mapping[Key, Record]:
        experience = Experience("here")
        async with ExperienceFile(folder, owner, save_every_s=0.01).keeping(experience):
            recalled = experience.snapshot()
            if meanwhile:
                await meanwhile(experience)
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
        return recalled

    return asyncio.run(live())


async def learns(experience: Experience) -> None:
    experience.put(KEY, RECORD)


def file_of(folder: Path, owner: str = "default") -> Path:
    return folder / f"experience-{owner}.json"


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_was_learned_outlasts_the_gateway(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert kept(tmp_path, learns) == {}
    assert kept(tmp_path) == {KEY: RECORD}
    assert [path.name for path in tmp_path.iterdir()] == ["experience-default.json"]
    assert file_of(tmp_path).stat().st_mode & 0o777 == 0o600
    assert warnings(caplog) == []


def test_what_is_learned_is_written_before_the_end(tmp_path: Path) -> None:
    async def until_it_is_there(experience: Experience) -> None:
        experience.put(KEY, RECORD)
        async with asyncio.timeout(20):
            while not file_of(tmp_path).exists():
                await asyncio.sleep(0.01)

    kept(tmp_path, until_it_is_there)

    assert read(file_of(tmp_path).read_bytes()) == {KEY: RECORD}


def test_where_nothing_is_learned_nothing_is_written(tmp_path: Path) -> None:
    kept(tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_gateways_of_two_names_do_not_touch_each_others_file(tmp_path: Path) -> None:
    async def learns_other(experience: Experience) -> None:
        experience.put(KEY, OTHER)

    kept(tmp_path, learns, owner="a")
    kept(tmp_path, learns_other, owner="a.b")

    assert kept(tmp_path, owner="a") == {KEY: RECORD}
    assert kept(tmp_path, owner="a.b") == {KEY: OTHER}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (b"{", "it is damaged"),
        (content(version=2), "it is of version 2"),
        (b" " * (MOST_BYTES + 1), "it is larger than 4 MiB"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_warning_and_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, found: bytes, words: str
) -> None:
    file_of(tmp_path).write_bytes(found)

    assert kept(tmp_path, learns) == {}

    [warning] = warnings(caplog)
    assert words in warning
    assert str(file_of(tmp_path)) in warning
    assert kept(tmp_path) == {KEY: RECORD}


def test_two_who_write_at_once_write_two_whole_files(tmp_path: Path) -> None:
    alike = [{Key(str(number), str(writer), ""): RECORD for number in range(200)} for writer in range(8)]
    files = [ExperienceFile(tmp_path, "default") for _ in alike]
    seen = set()

    def write(number: int) -> None:
        for _ in range(20):
            files[number].save(alike[number])
            seen.add(alike.index(files[number].load()))  # which raises for half a file, and for a mixture

    with ThreadPoolExecutor(len(files)) as writers:
        list(writers.map(write, range(len(files))))

    assert seen <= set(range(len(files)))
    assert list(tmp_path.iterdir()) == [file_of(tmp_path)]


def test_a_file_that_cannot_take_its_place_is_removed(tmp_path: Path) -> None:
    file_of(tmp_path).mkdir()

    with pytest.raises(Unusable):
        ExperienceFile(tmp_path, "default").save({KEY: RECORD})

    assert list(tmp_path.iterdir()) == [file_of(tmp_path)]


@pytest.mark.parametrize("kind", ["no folder", "a file as its folder", "a folder in its place", "a pipe in its place"])
def test_a_place_that_cannot_be_used_is_a_warning_and_holds_nothing_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    folder = tmp_path / "state"
    match kind:
        case "a file as its folder":
            folder.write_text("")
        case "a folder in its place":
            file_of(folder).mkdir(parents=True)
        case "a pipe in its place":
            folder.mkdir()
            os.mkfifo(file_of(folder))

    assert kept(folder, learns) == {}

    found = warnings(caplog)
    assert found
    assert all("Check GATEWAY_STATE_DIR" in warning for warning in found)
    assert len(set(found)) == len(found)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.chmod(0o500)
    try:
        assert kept(tmp_path, learns) == {}
    finally:
        tmp_path.chmod(0o700)

    assert "Permission denied" in warnings(caplog)[0]


def test_the_same_trouble_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "state"

    async def learns_much(experience: Experience) -> None:
        for number in range(5):
            experience.put(Key(str(number), "", ""), RECORD)
            await asyncio.sleep(0.02)

    folder.mkdir()
    file_of(folder).mkdir()
    kept(folder, learns_much)

    assert len(warnings(caplog)) <= 2  # once that it cannot be read, once that it cannot be written


class DeadDisk(ExperienceFile):
    """A file on a disk that does not answer until it is told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "default", save_every_s=0.01, patience_s=0.05)
        self.answers = threading.Event()
        self.most_at_once = self.at_once = 0

    def load(self) -> dict[Key, Record]:
        self.answers.wait()
        return super().load()

    def _replace(self, content: bytes) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.answers.wait()
        self.at_once -= 1


def test_a_disk_that_hangs_holds_up_neither_beginning_nor_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = DeadDisk(tmp_path)

    async def live() -> None:
        experience = Experience()
        async with disk.keeping(experience):
            experience.put(KEY, RECORD)
            async with asyncio.timeout(20):
                while len(warnings(caplog)) < 1 or not disk.at_once:
                    await asyncio.sleep(0.01)

    try:
        asyncio.run(live())
    finally:
        disk.answers.set()
        for thread in [thread for thread in threading.enumerate() if thread.name == "experience"]:
            thread.join(20)

    assert disk.most_at_once == 1
    assert "the disk does not answer" in warnings(caplog)[0]
