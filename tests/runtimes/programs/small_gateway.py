"""Stands for a gateway: starts a server with the command given, says its number, and stays until it is killed."""
# ruff: noqa: T201

import asyncio
import sys

from gateway.runtimes.base import Launch, Progress
from gateway.runtimes.process import ProcessRuntime


class Echo:
    def line(self, text: str) -> None:
        print(text, flush=True)

    def paused(self, reason: str) -> None:
        pass

    def progress(self, progress: Progress) -> None: ...


async def main() -> None:
    handle = await ProcessRuntime().start(Launch("child", tuple(sys.argv[1:])), Echo())
    print(handle.ref, flush=True)
    await asyncio.sleep(3600)


asyncio.run(main())
