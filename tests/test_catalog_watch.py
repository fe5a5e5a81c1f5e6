"""What counts as a changed catalog: real files, put there in the ways in which editors and machines do it."""

# ruff: noqa: ASYNC240 - small files, and nobody else is on the loop

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest

from gateway.catalog import Catalog
from gateway.catalog_file import load_catalog
from gateway.catalog_watch import CatalogFile, CatalogWatch, Source
from gateway.errors import CatalogError

ENVIRON = {"WHERE": "http://127.0.0.1:9"}


def text(*models: str, **keys: object) -> str:
    entries = "".join(f"  {model}: {{engine: openai, url: '${{WHERE}}', max_queue: 7}}\n" for model in models)
    return "".join(f"{key}: {value}\n" for key, value in keys.items()) + "models:\n" + entries


class Looks:
    """A watch that looks when it is told to, and what came of it."""

    def __init__(self, source: Source) -> None:
        self.taken: list[Catalog] = []
        self.refused: list[tuple[str, ...]] = []
        self._allowed: asyncio.Queue[None] = asyncio.Queue()
        self._resting = asyncio.Event()
        watch = CatalogWatch(source, self.taken.append, self._refuse, rest=self._rest)
        self.task = asyncio.create_task(watch.run())

    def _refuse(self, error: CatalogError) -> None:
        self.refused.append(error.complaints)

    async def _rest(self, _: float) -> None:
        self._resting.set()
        await self._allowed.get()

    async def look(self, times: int = 1) -> None:
        """Return when it has looked so many times."""
        for _ in range(times):
            await self._resting.wait()
            self._resting.clear()
            self._allowed.put_nowait(None)
        await self._resting.wait()

    @property
    def models(self) -> list[list[str]]:
        """The models of each catalog that was taken so far."""
        return [list(catalog.models) for catalog in self.taken]


def watched(path: Path, scene: Callable[[Looks], Awaitable[None]]) -> None:
    async def play() -> None:
        looks = Looks(CatalogFile(path, partial(load_catalog, path, ENVIRON)))
        try:
            await looks.look()
            await scene(looks)
            assert not looks.task.done()
        finally:
            looks.task.cancel()
            await asyncio.wait([looks.task])

    asyncio.run(play())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text(text("one"))
    return path


def test_what_was_there_from_the_beginning_is_judged_once(file: Path) -> None:
    async def scene(looks: Looks) -> None:
        await looks.look(5)
        assert looks.models == [["one"]]

    watched(file, scene)


def test_a_saved_file_is_taken_when_two_looks_have_found_the_same(file: Path) -> None:
    async def scene(looks: Looks) -> None:
        file.write_text(text("one", "two"))
        await looks.look()
        assert looks.models == [["one"]]
        await looks.look()
        assert looks.models == [["one"], ["one", "two"]]
        assert looks.taken[-1].models["two"].url == ENVIRON["WHERE"]

    watched(file, scene)


def test_half_a_file_is_nothing_to_anybody(file: Path) -> None:
    whole = text("one", "two", "three")

    async def scene(looks: Looks) -> None:
        for part in (0, 20, len(text("one")), len(whole)):
            file.write_text(whole[:part])
            await looks.look()
        await looks.look()
        assert looks.models == [["one"], ["one", "two", "three"]]
        assert looks.refused == []

    watched(file, scene)


def test_a_file_that_is_renamed_into_its_place_is_taken(file: Path) -> None:
    async def scene(looks: Looks) -> None:
        new = file.with_name("new")
        new.write_text(text("two"))
        os.utime(new, (0, 0))  # older than the one before
        new.rename(file)
        await looks.look(2)
        assert looks.models == [["one"], ["two"]]

    watched(file, scene)


def test_links_that_lead_elsewhere_are_followed_and_the_models_stay_the_same(tmp_path: Path) -> None:
    """As Kubernetes does it: models.yaml -> ..data/models.yaml, and ..data -> the newest folder."""
    for name, models in (("..1", ("one",)), ("..2", ("one",)), ("..3", ("one", "two"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "models.yaml").write_text(
            text(*models) + "  w: {engine: llamacpp, weights: weights/w.gguf}\n"
        )
    data, file = tmp_path / "..data", tmp_path / "models.yaml"
    data.symlink_to("..1")
    file.symlink_to("..data/models.yaml")

    def swap(folder: str) -> None:
        link = tmp_path / "..tmp"
        link.symlink_to(folder)
        link.rename(data)

    async def scene(looks: Looks) -> None:
        swap("..2")
        await looks.look(3)
        assert looks.models == [["one", "w"]]
        swap("..3")
        await looks.look(2)
        assert looks.models == [["one", "w"], ["one", "two", "w"]]
        before, after = looks.taken
        assert before.models["w"] == after.models["w"]
        assert after.models["w"].weights == tmp_path / "weights" / "w.gguf"

    watched(file, scene)


def test_a_file_that_is_gone_for_a_moment_is_not_missed(file: Path) -> None:
    async def scene(looks: Looks) -> None:
        content = file.read_bytes()
        file.unlink()
        await looks.look()
        file.write_bytes(content)
        await looks.look(3)
        assert looks.models == [["one"]]
        assert looks.refused == []

    watched(file, scene)


def test_a_file_that_stays_away_is_told_of_once_and_taken_when_it_is_back(file: Path) -> None:
    async def scene(looks: Looks) -> None:
        content = file.read_bytes()
        file.unlink()
        await looks.look(5)
        assert len(looks.refused) == 1
        assert "there is no such file" in looks.refused[0][0]
        file.write_bytes(content)
        await looks.look(2)
        assert looks.models == [["one"], ["one"]]

    watched(file, scene)


def test_one_that_cannot_be_read_is_told_of(file: Path) -> None:
    async def scene(looks: Looks) -> None:
        file.unlink()
        file.mkdir()
        await looks.look(3)
        file.rmdir()
        file.write_bytes(b"\xff\xfe")
        await looks.look(3)
        file.write_bytes(b"#" * (2**20 + 1))
        await looks.look(3)
        assert ["cannot be read" in looks.refused[0][0], "not UTF-8" in looks.refused[1][0]] == [True, True]
        assert "is larger than" in looks.refused[2][0]
        assert len(looks.refused) == 3

    watched(file, scene)


def test_a_pipe_in_its_place_is_told_of_and_holds_up_nothing(file: Path) -> None:
    async def scene(looks: Looks) -> None:
        content = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        await looks.look(3)
        assert ["no regular file" in each for (each,) in looks.refused] == [True]
        file.unlink()
        file.write_bytes(content)
        await looks.look(2)
        assert looks.models == [["one"], ["one"]]

    watched(file, scene)


def test_a_disk_that_hangs_is_told_of_once_and_asked_by_one_thread(file: Path) -> None:
    answers, asked = threading.Event(), []

    def load(content: bytes) -> Catalog:
        asked.append(content)
        answers.wait()
        return Catalog(path=file, models={})

    async def play() -> None:
        looks = Looks(CatalogFile(file, load, patience_s=0.05))
        await looks.look(5)
        assert ["the disk does not answer" in each for (each,) in looks.refused] == [True, True]
        looks.task.cancel()
        await asyncio.wait([looks.task])

    try:
        asyncio.run(play())
    finally:
        answers.set()
        for thread in [thread for thread in threading.enumerate() if thread.name == "catalog"]:
            thread.join(20)
    assert len(asked) == 1


def test_a_bad_file_is_refused_with_every_complaint_and_mended_by_the_next_save(file: Path) -> None:
    async def scene(looks: Looks) -> None:
        file.write_text(text("one", "two", default_model="gone", colour="red") + "  x: {engine: openai}\n")
        await looks.look(4)
        assert looks.models == [["one"]]
        (complaints,) = looks.refused
        assert [any(word in each for each in complaints) for word in ("gone", "colour", "x: url")] == [True] * 3
        assert all(str(file) in each for each in complaints)
        file.write_text(text("one", "two"))
        await looks.look(2)
        assert looks.models == [["one"], ["one", "two"]]

    watched(file, scene)


class FallsOver:
    """A source whose second catalog finds a fault of ours."""

    def __init__(self) -> None:
        self.content = b"1"

    async def read(self) -> bytes:
        return self.content

    async def load(self, content: bytes) -> Catalog:
        if content == b"2":
            raise RuntimeError("a fault of ours")
        return Catalog(path=Path(content.decode()), models={})


def test_a_fault_of_our_own_does_not_end_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> None:
        source = FallsOver()
        looks = Looks(source)
        for content in (b"1", b"2", b"3"):
            source.content = content
            await looks.look(2)
        assert [catalog.path.name for catalog in looks.taken] == ["1", "3"]
        (complaints,) = looks.refused
        assert "failed over this file (RuntimeError" in complaints[0]
        looks.task.cancel()
        await asyncio.wait([looks.task])

    asyncio.run(play())
    assert "a fault of ours" in caplog.text
