"""Forks a child that ignores SIGTERM, says its number, and stays or leaves with status 5 (argument `leave`)."""
# ruff: noqa: T201

import os
import signal
import sys
import time

if child := os.fork():
    print(child, flush=True)
    if "leave" in sys.argv:
        sys.exit(5)
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(3600)
