"""What happened, for readers at any pace."""

from __future__ import annotations

import asyncio

from gateway.fleet.journal import KEPT, Journal


async def read(journal: Journal, after_id: int) -> list[int]:
    return [entry.id async for entry in journal.follow(after_id)]


def test_a_reader_gets_what_is_remembered_and_then_what_comes() -> None:
    async def scene() -> list[int]:
        journal = Journal(lambda: 0.0)
        for _ in range(3):
            journal.write("state", model="m")
        reading = asyncio.create_task(read(journal, 1))
        await asyncio.sleep(0)
        journal.write("progress", model="m")
        await asyncio.sleep(0)
        journal.write("state", model="m")
        journal.close()
        return await reading

    assert asyncio.run(scene()) == [2, 3, 4, 5]


def test_only_so_much_is_remembered_and_a_slow_reader_misses_the_rest() -> None:
    async def scene() -> list[int]:
        journal = Journal(lambda: 0.0)
        for _ in range(KEPT + 5):
            journal.write("state")
        journal.close()
        return await read(journal, 0)

    assert asyncio.run(scene()) == list(range(6, KEPT + 6))


def test_a_reader_who_leaves_is_forgotten() -> None:
    async def scene() -> int:
        journal = Journal(lambda: 0.0)
        reading = asyncio.create_task(read(journal, 0))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        journal.write("state")
        return len(journal._news)

    assert asyncio.run(scene()) == 0
