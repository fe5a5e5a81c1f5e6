"""Ignores SIGTERM."""
# ruff: noqa: T201

import signal
import time

signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(3600)
