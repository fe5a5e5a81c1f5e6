"""Runs a command that ends with the process that started it, however that one ends: `kill -9` included.

    python -I -S leash.py PARENT_PID -- COMMAND [ARGUMENT...]

The kernel kills the command when its parent goes (PR_SET_PDEATHSIG survives exec), so no one has to watch, and it
works from the first instant: a server that loads for minutes and holds the GIL meanwhile dies as well. It is asked
for here, after the fork, and not in a hook between fork and exec, which is unsafe in a program that has threads.
The kernel means the *thread* that forked: start this from a thread that lives as long as the program.

Covers the command itself, not what it starts in turn. On systems other than Linux the command just runs.
Imports nothing of the package: it is run by its path, and must be quick.
"""

import os
import signal
import sys

PR_SET_PDEATHSIG = 1
NOT_STARTED = 127
OOM_SCORE = "500"


def main(arguments: list[str]) -> int:
    """Become the command. Returns, with an exit status, only if that is impossible."""
    parent_pid, dashes, *command = arguments
    assert dashes == "--", "usage: leash.py PARENT_PID -- COMMAND..."  # one caller, ours
    if sys.platform == "linux":
        die_with_parent()
        if os.getppid() != int(parent_pid):
            return NOT_STARTED  # it went before the line above: nobody is left to run this for
        go_first_when_memory_is_short()
    for number in signal.valid_signals():  # the command would inherit what Python ignores, or a shell's `&`, or nohup
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606 - no shell wanted
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror}", file=sys.stderr)  # noqa: T201
    return NOT_STARTED


def die_with_parent() -> None:
    import ctypes  # here, so that other systems need not have it

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        print(f"cannot tie the server to the gateway: {os.strerror(ctypes.get_errno())}", file=sys.stderr)  # noqa: T201
        sys.exit(NOT_STARTED)


def go_first_when_memory_is_short() -> None:
    """Have the kernel pick this process before the gateway, which serves all the other models too."""
    try:
        with open("/proc/self/oom_score_adj", "w") as score:  # noqa: PTH123 - pathlib would double the start-up time
            score.write(OOM_SCORE)
    except OSError:
        pass  # no /proc, or already higher: it is a kindness, not a need


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
