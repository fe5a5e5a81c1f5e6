"""The promises of `Runtime`, asked of child processes that really run."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from gateway.errors import StartFailed
from gateway.runtimes.base import Exit, Handle, Launch, RequiredFile
from gateway.runtimes.files import THREADS, FileChecks
from gateway.runtimes.output import LINE_BYTES
from gateway.runtimes.process import ProcessRuntime
from tests.runtimes.processes import PROGRAMS, Ear, children, descriptors, runs, until, wait_until

PYTHON = (sys.executable, "-I", "-S", "-u")
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def program(name: str, *arguments: str) -> tuple[str, ...]:
    return (*PYTHON, str(PROGRAMS / f"{name}.py"), *arguments)


def script(text: str) -> tuple[str, ...]:
    return (*PYTHON, "-c", text)


def play(scenario: Coroutine[Any, Any, None], loop: str = "asyncio") -> None:
    """Run a scenario, and see that it leaves no process, task or open file behind."""

    async def watched() -> None:
        await scenario
        assert len(asyncio.all_tasks()) == 1

    LOOPS[loop]().close()  # uvloop opens files of its own with its first loop
    before = descriptors()
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(watched())
    wait_until(lambda: not children())
    assert descriptors() == before


@asynccontextmanager
async def opened() -> AsyncIterator[ProcessRuntime]:
    runtime = ProcessRuntime()
    try:
        yield runtime
    finally:
        await runtime.aclose()


async def start_and_hear(runtime: ProcessRuntime, command: tuple[str, ...], **more: Any) -> tuple[Handle, Ear]:
    """Start a server and return once it has said something."""
    ear = Ear()
    handle = await runtime.start(Launch("model", command, **more), ear)
    await until(lambda: ear.lines)
    return handle, ear


def pid_of(handle: Handle) -> int:
    return int(handle.ref.removeprefix("pid "))


# ---- running and ending ----


@pytest.mark.parametrize("loop", LOOPS)
def test_a_server_is_reachable_then_gone_after_stop(loop: str) -> None:
    async def scenario() -> None:
        async with opened() as runtime:
            handle, _ = await start_and_hear(runtime, program("doorman", "{port}"))
            assert handle.base_url == f"http://127.0.0.1:{handle.port}"
            for _ in range(20):  # every one of them reaches the child: the gateway holds the port and does not listen
                reader, writer = await asyncio.open_connection("127.0.0.1", handle.port)
                assert await reader.read() == b"hello"
                writer.close()
                await writer.wait_closed()
            await runtime.stop("model", grace_s=5)
            assert not runs(pid_of(handle))
            assert not children()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", handle.port)

    play(scenario(), loop)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("text", "code", "reason"),
    [
        ("raise SystemExit(0)", 0, "exit status 0"),
        ("raise SystemExit(3)", 3, "exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", -9, "killed by SIGKILL (often the kernel's out-of-memory killer)"),
        ("import os; os.kill(os.getpid(), 11)", -11, "killed by SIGSEGV"),
        ("import os; os.kill(os.getpid(), 40)", -40, "killed by signal 40"),
    ],
)
def test_an_exit_says_how_and_leaves_its_last_words(loop: str, text: str, code: int, reason: str) -> None:
    async def scenario() -> None:
        async with opened() as runtime:
            handle = await runtime.start(Launch("model", script(f"print('last words'); {text}")), Ear())
            assert await runtime.ended(handle) == Exit(code, reason, ("last words",))
            await runtime.stop("model", grace_s=5)  # what is gone is no error
            assert [line async for line in runtime.logs("model", lines=10, follow=True)] == ["last words"]

    play(scenario(), loop)


@pytest.mark.parametrize(("gpus", "seen"), [((), "None"), (("1",), "1"), (("0", "GPU-3f"), "0,GPU-3f")])
def test_a_server_sees_the_gpus_that_it_was_given(gpus: tuple[str, ...], seen: str) -> None:
    async def scene() -> None:
        async with opened() as runtime:
            say = "import os; print('sees', os.environ.get('CUDA_VISIBLE_DEVICES'))"
            handle = await runtime.start(Launch("model", script(say), gpus=gpus), Ear())
            end = await runtime.ended(handle)
            assert f"sees {seen}" in end.last_lines

    asyncio.run(scene())


def test_a_polite_server_has_its_grace() -> None:
    async def scenario() -> None:
        async with opened() as runtime:
            handle, ear = await start_and_hear(runtime, program("polite"))
            await runtime.stop("model", grace_s=10)
            assert await runtime.ended(handle) == Exit(7, "exit status 7", ("up", "goodbye"))
            assert ear.lines == ["up", "goodbye"]

    play(scenario())


def test_a_stubborn_server_is_killed_after_its_grace() -> None:
    async def scenario() -> None:
        async with opened() as runtime:
            handle, _ = await start_and_hear(runtime, program("stubborn"))
            before_s = asyncio.get_running_loop().time()
            await runtime.stop("model", grace_s=0.3)
            assert 0.3 <= asyncio.get_running_loop().time() - before_s < 5
            assert (await runtime.ended(handle)).reason == "killed by SIGKILL (by the gateway)"
            assert not runs(pid_of(handle))

    play(scenario())


def test_stop_is_idempotent_and_may_overlap_itself() -> None:
    async def scenario() -> None:
        async with opened() as runtime:
            await runtime.stop("never heard of", grace_s=1)
            handle, _ = await start_and_hear(runtime, program("polite"))
            await asyncio.gather(*(runtime.stop("model", grace_s=10) for _ in range(5)))
            assert not runs(pid_of(handle))

    play(scenario())


def test_a_cancelled_stop_can_be_taken_up_again() -> None:
    async def scenario() -> None:
        async with opened() as runtime:
            handle, _ = await start_and_hear(runtime, program("stubborn"))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await runtime.stop("model", grace_s=60)
            assert runs(pid_of(handle))
            await runtime.stop("model", grace_s=0)
            assert not runs(pid_of(handle))

    play(scenario())


@pytest.mark.parametrize("arguments", [(), ("leave",)])
def test_what_a_server_has_started_goes_with_it(arguments: tuple[str, ...]) -> None:
    async def scenario() -> None:
        async with opened() as runtime:
            handle, ear = await start_and_hear(runtime, program("family", *arguments))
            grandchild = int(ear.lines[0])
            if not arguments:
                assert runs(grandchild)
                await runtime.stop("model", grace_s=10)
            await runtime.ended(handle)
            assert not runs(grandchild)

    play(scenario())


def test_a_start_replaces_the_older_server_of_its_name() -> None:
    async def scenario() -> None:
        async with opened() as runtime:
            older, _ = await start_and_hear(runtime, program("polite"))
            waiting = asyncio.create_task(runtime.ended(older))
            newer, _ = await start_and_hear(runtime, program("stubborn"))
            assert not runs(pid_of(older))
            assert runs(pid_of(newer))
            assert (await waiting).code == 7
            assert (await runtime.ended(older)).code is None
            assert [line async for line in runtime.logs("model", lines=10, follow=False)] == ["up"]

    play(scenario())


def test_ended_waits_and_can_be_given_up() -> None:
    async def scenario() -> None:
        async with opened() as runtime:
            handle, _ = await start_and_hear(runtime, program("polite"))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await runtime.ended(handle)
            waiting = asyncio.create_task(runtime.ended(handle))
            os.kill(pid_of(handle), signal.SIGTERM)
            assert (await waiting).code == 7

    play(scenario())


def test_closing_the_runtime_kills_everything_and_refuses_new_starts() -> None:
    async def scenario() -> None:
        runtime = ProcessRuntime()
        ears = [Ear() for _ in range(3)]
        for number, ear in enumerate(ears):
            await runtime.start(Launch(f"model-{number}", program("stubborn")), ear)
        await until(lambda: all(ear.lines for ear in ears))
        await runtime.aclose()
        assert not children()
        with pytest.raises(StartFailed):
            await runtime.start(Launch("model", program("polite")), Ear())
        await runtime.aclose()

    play(scenario())


def test_a_kernel_without_pidfd_is_served_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")

    async def scenario() -> None:
        async with opened() as runtime:
            handle, ear = await start_and_hear(runtime, program("family"))
            await runtime.stop("model", grace_s=10)
            assert (await runtime.ended(handle)).reason == "killed by SIGTERM"
            assert not runs(int(ear.lines[0]))

    play(scenario())
    wait_until(lambda: threading.active_count() == 1)


# ---- starts that fail or are given up ----


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((), "no command"),
        (("no-such-program",), "There is no program no-such-program that the gateway may run. Install it"),
        (("/etc/passwd",), "There is no program /etc/passwd"),
        ((sys.executable, "a\0b"), "cannot be run"),
    ],
)
def test_what_cannot_start_says_why(command: tuple[str, ...], words: str) -> None:
    async def scenario() -> None:
        async with opened() as runtime:
            with pytest.raises(StartFailed, match=words):
                await runtime.start(Launch("model", command), Ear())
            await runtime.stop("model", grace_s=1)

    play(scenario())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_start_cancelled_at_any_point_leaves_nothing_after_stop(loop: str, tmp_path: Path) -> None:
    file = weights(tmp_path, b"weights")

    async def scenario() -> None:
        was_cancelled = set()
        async with opened() as runtime:
            for steps in range(60):
                launch = Launch("model", program("stubborn"), files=(file,))
                start = asyncio.create_task(runtime.start(launch, Ear()))
                for _ in range(steps):
                    await asyncio.sleep(0.0002 if steps % 2 else 0)
                start.cancel()
                await runtime.stop("model", grace_s=0)
                assert not children()
                await asyncio.gather(start, return_exceptions=True)
                assert not children()
                was_cancelled.add(start.cancelled())
        assert was_cancelled == {True, False}

    play(scenario(), loop)


def test_a_stop_calls_off_a_start_that_was_not_cancelled(tmp_path: Path) -> None:
    file = weights(tmp_path, b"weights")

    async def scenario() -> None:
        async with opened() as runtime:
            start = asyncio.create_task(runtime.start(Launch("model", program("stubborn"), files=(file,)), Ear()))
            await asyncio.sleep(0)
            await runtime.stop("model", grace_s=0)
            with pytest.raises(StartFailed, match="was stopped while it started"):
                await start
            assert not children()

    play(scenario())


def test_starts_without_number_leave_no_file_open() -> None:
    async def scenario() -> None:
        async with opened() as runtime:
            for _ in range(20):
                handle = await runtime.start(Launch("model", script("pass")), Ear())
                await runtime.ended(handle)
                with pytest.raises(StartFailed):
                    await runtime.start(Launch("model", ("no-such-program",)), Ear())

    play(scenario())


# ---- ports ----


def test_the_port_is_held_while_the_server_lives() -> None:
    async def scenario() -> None:
        async with opened() as runtime:
            handle, _ = await start_and_hear(runtime, program("polite"))
            assert handle.port is not None
            assert not bindable(handle.port)
            await runtime.stop("model", grace_s=10)
            assert bindable(handle.port)

    play(scenario())


def bindable(port: int) -> bool:
    with socket.socket() as other:
        try:
            other.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def test_servers_started_together_get_different_ports() -> None:
    async def scenario() -> None:
        async with opened() as runtime:
            launches = [Launch(f"model-{number}", program("polite")) for number in range(8)]
            handles = await asyncio.gather(*(runtime.start(launch, Ear()) for launch in launches))
            assert len({handle.port for handle in handles}) == 8

    play(scenario())


# ---- output ----


def test_output_of_any_kind_is_heard_as_lines() -> None:
    async def scenario() -> None:
        async with opened() as runtime:
            text = (
                "import os; os.write(1, b'a' * 300_000 + b'\\n'); os.write(2, b'\\xff\\x00z\\n'); os.write(1, b'end')"
            )
            ear = Ear()
            handle = await runtime.start(Launch("model", script(text)), ear)
            end = await runtime.ended(handle)
            assert ear.lines == ["a" * LINE_BYTES + " [cut]", "\ufffd\0z", "end"]
            assert end.last_lines == tuple(ear.lines)

    play(scenario())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_chatterbox_is_never_blocked_and_does_not_starve_the_gateway(loop: str) -> None:
    async def scenario() -> None:
        async with opened() as runtime:
            _, ear = await start_and_hear(runtime, program("chatterbox"))
            clock, slowest_s = asyncio.get_running_loop().time, 0.0
            for _ in range(200):
                before_s = clock()
                await asyncio.sleep(0)
                slowest_s = max(slowest_s, clock() - before_s)
            assert slowest_s < 0.5
            heard = len(ear.lines)
            await until(lambda: len(ear.lines) > heard + 1000)
            assert len([line async for line in runtime.logs("model", lines=9999, follow=False)]) <= 500
            await runtime.stop("model", grace_s=10)

    play(scenario(), loop)


def test_the_log_can_be_followed_to_the_end() -> None:
    async def scenario() -> None:
        async with opened() as runtime:
            await start_and_hear(runtime, program("polite"))

            async def follow() -> list[str]:
                return [line async for line in runtime.logs("model", lines=10, follow=True)]

            follower = asyncio.create_task(follow())
            await runtime.stop("model", grace_s=10)
            assert await follower == ["up", "goodbye"]
            assert [line async for line in runtime.logs("unknown", lines=10, follow=True)] == []

    play(scenario())


def test_an_end_does_not_wait_for_who_left_the_group_with_the_pipe() -> None:
    async def scenario() -> None:
        async with opened() as runtime:
            handle, ear = await start_and_hear(runtime, program("deserter"))
            async with asyncio.timeout(10):
                assert (await runtime.ended(handle)).code == 0
            os.kill(int(ear.lines[0]), signal.SIGKILL)  # a daemon is beyond the runtime's reach, not beyond ours

    play(scenario())


# ---- what a server is given ----


def test_a_server_gets_no_secret_of_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"HF_TOKEN": "t", "GATEWAY_API_KEY": "k", "LLAMA_API_KEY": "l", "AWS_SECRET_ACCESS_KEY": "a"}
    for name, value in {**ours, "CUDA_VISIBLE_DEVICES": "0"}.items():
        monkeypatch.setenv(name, value)

    async def scenario() -> None:
        async with opened() as runtime:
            text = "import os; print(*sorted(os.environ)); print(os.environ['MODEL_KEY'])"
            handle = await runtime.start(Launch("model", script(text), env={"MODEL_KEY": "s3cret"}), Ear())
            names, key = (await runtime.ended(handle)).last_lines
            assert not set(ours) & set(names.split())
            assert {"PATH", "HOME", "CUDA_VISIBLE_DEVICES", "MODEL_KEY"} <= set(names.split())
            assert key == "s3cret"

    play(scenario())


@pytest.fixture
def ignored_signals() -> Iterator[None]:
    """As a shell leaves them that starts the gateway with `&`, or with nohup."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGQUIT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("ignored_signals")
def test_a_server_starts_with_plain_signals_and_no_open_files() -> None:
    async def scenario() -> None:
        async with opened() as runtime:
            command = ("/bin/sh", "-c", "ls /proc/self/fd; grep -E 'SigIgn|SigBlk' /proc/self/status; cat")
            handle = await runtime.start(Launch("model", command), Ear())
            lines = (await runtime.ended(handle)).last_lines
            assert lines == (
                "0",
                "1",
                "2",
                "3",
                f"SigBlk:\t{0:016x}",
                f"SigIgn:\t{0:016x}",
            )  # 3: the folder that ls reads

    play(scenario())


# ---- files ----


def weights(folder: Path, content: bytes, sha256: str | None = None) -> RequiredFile:
    path = folder / "weights.gguf"
    path.write_bytes(content)
    return RequiredFile(path, sha256 or hashlib.sha256(content).hexdigest())


def make_missing(path: Path) -> None:
    path.unlink()


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def damage(path: Path) -> None:
    path.write_bytes(b"x")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (make_missing, r"weights.gguf does not exist. Put the file there"),
        (make_folder, r"weights.gguf cannot be read \(it is not a regular file\)"),
        (make_pipe, r"weights.gguf cannot be read \(it is not a regular file\)"),
        (damage, rf"its SHA-256 is {hashlib.sha256(b'x').hexdigest()}, not {hashlib.sha256(b'good').hexdigest()}"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_stops_the_start(
    tmp_path: Path, harm: Callable[[Path], None], words: str
) -> None:
    file = weights(tmp_path, b"good")
    harm(file.path)

    async def scenario() -> None:
        async with opened() as runtime:
            with pytest.raises(StartFailed, match=words) as failure:
                await runtime.start(Launch("model", program("polite"), files=(file,)), Ear())
            assert failure.value.extra["fix"]
            assert not children()

    play(scenario())


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (make_missing, r"weights.gguf does not exist. Put the file there"),
        (make_folder, r"weights.gguf cannot be read \(it is not a regular file\)"),
    ],
)
def test_that_a_file_is_not_there_is_seen_before_the_start(
    tmp_path: Path, harm: Callable[[Path], None], words: str
) -> None:
    file = weights(tmp_path, b"good")

    async def scenario() -> None:
        async with opened() as runtime:
            launch = Launch("model", program("polite"), files=(file,))
            damage(file.path)
            await runtime.check(launch)  # to read it takes too long
            harm(file.path)
            with pytest.raises(StartFailed, match=words):
                await runtime.check(launch)
            with pytest.raises(StartFailed, match="There is no program no-such-program"):
                await runtime.check(Launch("model", ("no-such-program",)))
            assert not children()

    play(scenario())


def test_what_a_slow_disk_does_not_say_soon_is_left_to_the_start(tmp_path: Path) -> None:
    busy = [tmp_path / str(n) for n in range(THREADS)]
    for path in busy:
        path.touch()
        os.truncate(path, 1 << 40)  # days of hashing, no disk

    async def scenario() -> None:
        checks = FileChecks(look_s=0.01)
        hashings = [asyncio.create_task(checks.check([RequiredFile(path, "0")], Ear().progress)) for path in busy]
        await until(lambda: len(checks._running) == THREADS)
        await checks.look([RequiredFile(tmp_path / "missing")])
        await checks.aclose()
        assert all(isinstance(each, StartFailed) for each in await asyncio.gather(*hashings, return_exceptions=True))

    play(scenario())
    wait_until(lambda: threading.active_count() == 1)


def test_a_file_is_hashed_once_and_two_starts_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = weights(tmp_path, bytes(200 << 20))
    hashed = []
    sha256 = hashlib.sha256

    def counted() -> Any:
        hashed.append(1)
        return sha256()

    monkeypatch.setattr(hashlib, "sha256", counted)

    async def scenario() -> None:
        checks = FileChecks()
        ears = [Ear(), Ear()]
        await asyncio.gather(*(checks.check([file], ear.progress) for ear in ears))
        await checks.check([file], Ear().progress)
        assert len(hashed) == 1
        for ear in ears:
            assert [report.phase for report in ear.reports] == ["verifying"] * len(ear.reports)
            done = [report.done for report in ear.reports if report.done]
            assert len(done) >= 3
            assert done == sorted(done)
            assert {(report.total, report.unit) for report in ear.reports} == {(float(200 << 20), "bytes")}
        os.utime(file.path, ns=(1, 1))
        await checks.check([file], Ear().progress)
        assert len(hashed) == 2
        await checks.aclose()

    play(scenario())


def test_a_hashing_that_nobody_waits_for_ends(tmp_path: Path) -> None:
    file = weights(tmp_path, b"")
    with file.path.open("r+b") as sparse:
        sparse.truncate(1 << 40)  # days of hashing, no disk

    async def scenario() -> None:
        checks = FileChecks()
        waiters = [asyncio.create_task(checks.check([file], Ear().progress)) for _ in range(2)]
        await until(lambda: checks._running)
        (hashing,) = checks._running.values()
        await until(lambda: len(hashing.reports) == len(waiters))
        waiters[0].cancel()
        await asyncio.wait(waiters[:1])
        assert not hashing.called_off.is_set()  # the other one still wants to know
        waiters[1].cancel()
        assert await hashing.result is None
        third = asyncio.create_task(checks.check([file], Ear().progress))
        await until(lambda: checks._running)
        await checks.aclose()
        with pytest.raises(StartFailed, match="shutting down"):
            await third

    play(scenario())
    wait_until(lambda: threading.active_count() == 1)


# ---- the leash ----


@pytest.fixture
def gateway_program() -> Any:
    """Starts `programs/small_gateway.py` with a command; kills what is left of it afterwards."""
    started: list[subprocess.Popen[str]] = []

    def start(*command: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        program_path = str(PROGRAMS / "small_gateway.py")
        process = subprocess.Popen(
            [sys.executable, "-P", "-u", program_path, *command], stdout=subprocess.PIPE, text=True, env=environment
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_server_dies_with_a_killed_gateway(gateway_program: Any) -> None:
    gateway = gateway_program(*program("stubborn"))
    child = int(said(gateway).removeprefix("pid "))
    assert said(gateway) == "up"
    assert runs(child)
    gateway.kill()
    wait_until(lambda: not runs(child), 5)


def test_a_server_dies_even_if_the_gateway_is_killed_before_it_is_up(gateway_program: Any) -> None:
    gateway = gateway_program(*program("stubborn"))
    child = int(said(gateway).removeprefix("pid "))
    gateway.kill()  # the child is still in its leash, or importing
    wait_until(lambda: not runs(child), 5)


def test_the_leash_runs_nothing_for_a_parent_that_has_gone() -> None:
    leash = Path(sys.modules[ProcessRuntime.__module__].__file__ or "").with_name("leash.py")
    for parent, status in ((os.getpid(), 4), (os.getppid(), 127)):
        command = [*PYTHON, str(leash), str(parent), "--", *script("raise SystemExit(4)")]
        assert subprocess.run(command, check=False).returncode == status


def test_a_server_goes_before_the_gateway_when_memory_is_short() -> None:
    async def scenario() -> None:
        async with opened() as runtime:
            _, ear = await start_and_hear(runtime, script("print(open('/proc/self/oom_score_adj').read())"))
            assert int(ear.lines[0]) >= 500

    play(scenario())
