"""Says goodbye at SIGTERM and leaves with status 7."""
# ruff: noqa: T201

import signal
import sys
from types import FrameType


def leave(_: int, __: FrameType | None) -> None:
    print("goodbye", flush=True)
    sys.exit(7)


signal.signal(signal.SIGTERM, leave)
print("up", flush=True)
while True:
    signal.pause()
