"""Leaves with status 0 once its child has left the process group, and with it the runtime's reach."""
# ruff: noqa: T201

import os
import sys
import time

hears, says = os.pipe()
if os.fork():
    os.close(says)
    os.read(hears, 1)
    sys.exit(0)
os.setsid()
print(os.getpid(), flush=True)
os.close(says)
time.sleep(60)
