"""The promises of `Runtime`, asked of containers on a real engine."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.errors import StartFailed
from gateway.runtimes.base import Exit, Mount
from gateway.runtimes.docker.containers import read
from gateway.runtimes.docker.launch import READ_ONLY, Plan
from gateway.runtimes.docker.place import Place, host_name
from tests.runtimes.containers import (
    HTTP,
    LOOPS,
    POLITE,
    SLEEP,
    STUBBORN,
    Bench,
    bench_of,
    fetch,
    import_image,
    opened,
    play,
    start_and_hear,
)
from tests.runtimes.processes import Ear, until

pytestmark = pytest.mark.docker

OUTSIDE_BOUND_S = 2.0
"""Within how long what happens behind the gateway's back is to be known."""


@pytest.fixture(scope="module")
def module_bench() -> Iterator[Bench]:
    with bench_of() as bench:
        yield bench


@pytest.fixture
def bench(module_bench: Bench) -> Iterator[Bench]:
    yield module_bench
    module_bench.clear()  # what a failed test left


# ---- running and ending ----


@pytest.mark.parametrize("loop", LOOPS)
def test_a_server_is_reachable_then_gone_after_stop(bench: Bench, loop: str) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            handle, _ = await start_and_hear(runtime, bench.launch(HTTP, port=80))
            assert handle.base_url == f"http://127.0.0.1:{handle.port}"
            assert handle.port is not None
            assert handle.port >= 8080
            assert bench.container().short_id == handle.ref
            await until_answers(handle.port)
            assert b"hello" in await fetch(handle)
            await runtime.stop(handle.name, grace_s=1)
            assert {each for each in bench.leftovers() if each.startswith("container")} == set()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", handle.port)

    play(scenario(), loop)


@pytest.mark.parametrize(
    ("script", "code", "reason"),
    [
        ("echo last words; exit 0", 0, "exit status 0"),
        ("echo last words; exit 3", 3, "exit status 3"),
        ("echo last words; kill -9 $$", 137, "killed by SIGKILL"),
        ("printf 'last words'; exit 2", 2, "exit status 2"),
    ],
)
def test_an_exit_says_how_and_leaves_its_last_words(bench: Bench, script: str, code: int, reason: str) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            handle = await runtime.start(bench.launch(script), Ear())
            assert await runtime.ended(handle) == Exit(code, reason, ("last words",))
            await runtime.stop(handle.name, grace_s=5)
            assert [line async for line in runtime.logs(handle.name, lines=10, follow=True)] == ["last words"]
            assert await runtime.ended(handle) == Exit(code, reason, ("last words",))

    play(scenario())


def test_a_server_that_ends_at_once_is_a_server_that_ended(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            handle = await runtime.start(bench.launch("exit 5", port=80), Ear())
            assert (await runtime.ended(handle)).code == 5

    play(scenario())


def test_a_polite_server_has_its_grace(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            handle, ear = await start_and_hear(runtime, bench.launch(POLITE))
            await runtime.stop(handle.name, grace_s=20)
            assert await runtime.ended(handle) == Exit(7, "exit status 7", ("up", "goodbye"))
            assert ear.lines == ["up", "goodbye"]

    play(scenario())


def test_a_stubborn_server_is_killed_after_its_grace(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            handle, _ = await start_and_hear(runtime, bench.launch(STUBBORN))
            before_s = asyncio.get_running_loop().time()
            await runtime.stop(handle.name, grace_s=0.3)
            assert asyncio.get_running_loop().time() - before_s >= 0.3
            assert await runtime.ended(handle) == Exit(137, "killed by SIGKILL (by the gateway)", ("up",))

    play(scenario())


def test_a_paused_server_hears_that_it_must_leave(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            handle, ear = await start_and_hear(runtime, bench.launch(POLITE))
            bench.container().pause()
            await until(lambda: ear.pauses)
            await runtime.stop(handle.name, grace_s=20)
            assert (await runtime.ended(handle)).code == 7

    play(scenario())


def test_stop_is_idempotent_and_may_overlap_itself(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            await runtime.stop("never heard of", grace_s=1)
            handle, _ = await start_and_hear(runtime, bench.launch(POLITE))
            await asyncio.gather(*(runtime.stop(handle.name, grace_s=10) for _ in range(5)))
            assert await runtime.find() == []

    play(scenario())


def test_a_new_start_removes_the_older_server_and_ends_its_handle(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            older, _ = await start_and_hear(runtime, bench.launch(POLITE))
            newer, _ = await start_and_hear(runtime, bench.launch(POLITE))
            assert [each.name for each in await runtime.find()] == [older.name]
            assert bench.container().short_id == newer.ref
            assert (await runtime.ended(older)).reason == "removed before a newer server took its name"

    play(scenario())


def test_both_channels_are_heard_as_lines_and_logs_follow_until_the_end(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            handle, _ = await start_and_hear(
                runtime, bench.launch(f"echo one; echo two >&2; trap 'exit 0' TERM; {SLEEP}")
            )
            followed = asyncio.create_task(collect(runtime.logs(handle.name, lines=10, follow=True)))
            await runtime.stop(handle.name, grace_s=20)
            assert sorted(await followed) == ["one", "two"]
            assert [line async for line in runtime.logs("never heard of", lines=10, follow=True)] == []

    play(scenario())


def test_of_a_flood_the_last_lines_are_kept(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            flood = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done"
            handle = await runtime.start(bench.launch(flood), Ear())
            end = await runtime.ended(handle)
            assert end.last_lines == tuple(f"line {number}" for number in range(2800, 3000))

    play(scenario())


# ---- what happens behind its back ----


@pytest.mark.parametrize(
    ("deed", "reasons"),
    [
        ("kill", {"killed by SIGKILL"}),
        ("stop", {"exit status 7"}),
        ("remove", {"killed by SIGKILL", "removed by somebody else"}),
        ("restart", {"exit status 7", "restarted by somebody else"}),
    ],
)
def test_what_somebody_else_does_is_known_by_event(bench: Bench, deed: str, reasons: set[str]) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            handle, _ = await start_and_hear(runtime, bench.launch(POLITE))
            container = bench.container()
            deeds = {
                "kill": container.kill,
                "stop": container.stop,
                "remove": lambda: container.remove(force=True),
                "restart": container.restart,
            }
            await asyncio.to_thread(deeds[deed])
            async with asyncio.timeout(OUTSIDE_BOUND_S):
                assert (await runtime.ended(handle)).reason in reasons

    play(scenario())


def test_a_pause_is_told_once_and_ends_nothing(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            handle, ear = await start_and_hear(runtime, bench.launch(POLITE))
            end = asyncio.create_task(runtime.ended(handle))
            bench.container().pause()
            async with asyncio.timeout(OUTSIDE_BOUND_S):
                await until(lambda: ear.pauses)
            bench.container().unpause()
            assert not end.done()
            await runtime.stop(handle.name, grace_s=10)
            assert (await end).code == 7
            assert len(ear.pauses) == 1

    play(scenario())


def test_out_of_memory_is_told_as_such(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            eat = "sleep 0.5; exec dd if=/dev/zero of=/dev/null bs=512M count=1"  # the engine watches from its start on
            hungry = bench.launch(eat, memory_bytes=16 << 20)
            handle = await runtime.start(hungry, Ear())
            assert "out of memory (the container's memory limit" in (await runtime.ended(handle)).reason

    play(scenario())


# ---- renamed by somebody else ----


def test_a_renamed_server_is_stopped_by_the_name_it_was_started_with(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            handle, _ = await start_and_hear(runtime, bench.launch(POLITE))
            bench.container().rename(bench.name("renamed"))
            await runtime.stop(handle.name, grace_s=20)
            assert (await runtime.ended(handle)).code == 7
            assert containers(bench) == []

    play(scenario())


def test_a_new_start_removes_a_renamed_server(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            await start_and_hear(runtime, bench.launch(POLITE))
            bench.container().rename(bench.name("renamed"))
            newer, _ = await start_and_hear(runtime, bench.launch(POLITE))
            assert containers(bench) == [bench.name()]
            assert bench.container().short_id == newer.ref

    play(scenario())


def test_the_next_gateway_finds_and_adopts_a_renamed_server_by_its_own_name(bench: Bench) -> None:
    async def scenario() -> None:
        first = bench.runtime()
        handle, _ = await start_and_hear(first, bench.launch(POLITE, port=80))
        await first.aclose()
        bench.container().rename(bench.name("renamed"))
        async with opened(bench) as second:
            (found,) = await second.find()
            assert (found.name, found.runs) == (handle.name, True)
            assert await second.adopt(found, Ear()) == handle
            await second.stop(handle.name, grace_s=20)
            assert (await second.ended(handle)).code == 7

    play(scenario())


def test_of_two_containers_of_one_server_the_one_that_runs_is_adopted_and_the_other_removed(bench: Bench) -> None:
    async def scenario() -> None:
        first = bench.runtime()
        handle, _ = await start_and_hear(first, bench.launch(POLITE))
        await first.aclose()
        running = bench.container()
        bench.client.containers.create(bench.image, ["sh"], name=bench.name("twin"), labels=running.labels)
        async with opened(bench) as second:
            (found,) = await second.find()
            assert found.runs
            assert await second.adopt(found, Ear()) == handle
            assert containers(bench) == [handle.name]

    play(scenario())


def test_stop_removes_every_container_of_the_server(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            handle, _ = await start_and_hear(runtime, bench.launch(POLITE))
            bench.client.containers.create(
                bench.image, ["sh"], name=bench.name("twin"), labels=bench.container().labels
            )
            await runtime.stop(handle.name, grace_s=20)
            assert containers(bench) == []

    play(scenario())


def test_a_server_that_was_given_anothers_name_is_not_taken_for_it(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            await start_and_hear(runtime, bench.launch(POLITE))
            bench.container().rename(bench.name("other"))
            with pytest.raises(StartFailed, match="is taken"):
                await runtime.start(bench.launch(POLITE, "other"), Ear())
            await runtime.stop(bench.name("other"), grace_s=0)
            assert [found.name for found in await runtime.find()] == [bench.name()]

    play(scenario())


# ---- what it may and what it may not ----


def test_a_container_is_hardened_published_on_loopback_only_and_kept_by_nobody(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            launch = bench.launch(
                HTTP, port=80, shm_bytes=32 << 20, memory_bytes=64 << 20, model="m", fingerprint="f", env={"A": "b"}
            )
            handle, _ = await start_and_hear(runtime, launch)
            made = bench.container().attrs
            host, config = made["HostConfig"], made["Config"]
            assert host["PortBindings"] == {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(handle.port)}]}
            assert host["SecurityOpt"] == ["no-new-privileges"]
            assert (host["CapDrop"], host["CapAdd"]) == (["ALL"], None)
            assert (host["PidsLimit"], host["Init"], host["Privileged"]) == (4096, True, False)
            assert (host["Memory"], host["MemorySwap"], host["ShmSize"]) == (64 << 20, 64 << 20, 32 << 20)
            assert host["RestartPolicy"]["Name"] in ("", "no")
            assert host["AutoRemove"] is False
            assert host["LogConfig"] == {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "2"}}
            assert {"A=b", "NVIDIA_VISIBLE_DEVICES=void"} <= set(config["Env"])
            labels = {key: value for key, value in config["Labels"].items() if not key.endswith("generation")}
            assert labels == {
                "tgi-gateway.owner": bench.owner,
                "tgi-gateway.name": handle.name,
                "tgi-gateway.model": "m",
                "tgi-gateway.fingerprint": "f",
                "tgi-gateway.gpus": "",
                "tgi-gateway.gpu-memory": "",
                "tgi-gateway.port": "80",
            }

    play(scenario())


def test_an_image_that_allows_it_has_a_read_only_root_and_still_gets_its_secrets(bench: Bench) -> None:
    image = import_image(bench.client, f"{bench.owner}:read-only", labels={READ_ONLY: "true"})

    async def scenario() -> None:
        async with opened(bench) as runtime:
            script = "touch /tmp/ours && ! touch /etc/theirs && cat $TOKEN_PATH"
            handle = await runtime.start(bench.launch(script, image=image, secrets={"TOKEN_PATH": "s3cret\n"}), Ear())
            end = await runtime.ended(handle)
            assert end.code == 0
            assert "s3cret" in end.last_lines

    play(scenario())


def test_a_secret_is_a_file_for_root_alone_and_nowhere_else(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            script = f"stat -c '%a %u' $TOKEN_PATH; cat $TOKEN_PATH; echo; {SLEEP}"
            handle, ear = await start_and_hear(runtime, bench.launch(script, secrets={"TOKEN_PATH": "s3cret"}))
            await until(lambda: len(ear.lines) == 2)
            assert ear.lines == ["400 0", "s3cret"]
            made = bench.container().attrs
            assert "s3cret" not in str(made)
            (volume,) = (mount["Name"] for mount in made["Mounts"])
            await runtime.stop(handle.name, grace_s=0)
            assert volume not in {each.name for each in bench.client.volumes.list()}

    play(scenario())


def test_root_in_a_container_writes_to_a_users_directory_only_where_it_may(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path):
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.chown(path, 12345, 12345)

    async def code(mount: Mount) -> int | None:
        async with opened(bench) as runtime:
            handle = await runtime.start(bench.launch("cat /data/file && touch /data/new", mounts=(mount,)), Ear())
            return (await runtime.ended(handle)).code

    async def scenario() -> None:
        assert await code(Mount(str(tmp_path), "/data", read_only=True)) == 1
        assert await code(Mount(str(tmp_path), "/data")) == 0

    if os.geteuid() != 0:
        pytest.skip("only root can give a file to somebody else")
    play(scenario())


def test_a_named_volume_outlives_its_container(bench: Bench) -> None:
    cache = Mount(bench.name("cache"), "/data")

    async def scenario() -> None:
        async with opened(bench) as runtime:
            for script in ("touch /data/kept", "cat /data/kept"):
                handle = await runtime.start(bench.launch(script, mounts=(cache,)), Ear())
                assert (await runtime.ended(handle)).code == 0
                await runtime.stop(handle.name, grace_s=0)
            bench.client.volumes.get(cache.source).remove()

    play(scenario())


# ---- starts that fail ----


def test_a_directory_that_is_not_there_is_not_made(bench: Bench, tmp_path: Path) -> None:
    missing = tmp_path / "missing"

    async def scenario() -> None:
        async with opened(bench) as runtime:
            with pytest.raises(StartFailed, match="does not exist") as failed:
                await runtime.start(bench.launch(SLEEP, mounts=(Mount(str(missing), "/data"),)), Ear())
            assert str(missing) in failed.value.extra["evidence"][0]
            await runtime.stop(bench.name(), grace_s=0)
            assert not missing.exists()

    play(scenario())


@pytest.mark.parametrize("targets", [("/data", "/data"), ("/proc",), ("/proc/x",), ("/",), ("/dev",)])
def test_a_target_that_cannot_be_is_told_as_such(bench: Bench, tmp_path: Path, targets: tuple[str, ...]) -> None:
    mounts = tuple(Mount(str(tmp_path), target) for target in targets)

    async def scenario() -> None:
        async with opened(bench) as runtime:
            with pytest.raises(StartFailed) as failed:
                await runtime.start(bench.launch(SLEEP, mounts=mounts), Ear())
            assert "`volumes` in models.yaml" in failed.value.extra["fix"]
            assert "target" in failed.value.extra["fix"]

    play(scenario())


def test_a_program_that_the_image_lacks_is_named(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            handle = await runtime.start(bench.launch("", entrypoint=("text-generation-launcher",)), Ear())
            end = await runtime.ended(handle)
            assert end.reason == "exit status 127: the image has no such program as it was to run"
            assert "text-generation-launcher" in end.last_lines[-1]

    play(scenario())


def test_without_the_toolkit_a_gpu_model_says_what_to_install(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            with pytest.raises(StartFailed) as failed:
                await runtime.start(bench.launch(SLEEP, gpus=("0",)), Ear())
            assert "nvidia-container-toolkit" in failed.value.extra["fix"]

    if "nvidia" in bench.client.info()["Runtimes"]:
        pytest.skip("this engine has a GPU runtime")
    play(scenario())


def test_a_foreign_container_of_our_name_is_told_and_never_touched(bench: Bench) -> None:
    foreign = bench.client.containers.create(bench.image, ["sh"], name=bench.name())

    async def scenario() -> None:
        async with opened(bench) as runtime:
            with pytest.raises(StartFailed, match=f"docker rename {bench.name()}") as failed:
                await runtime.start(bench.launch(SLEEP), Ear())
            assert foreign.short_id in failed.value.detail
            await runtime.stop(bench.name(), grace_s=0)
            assert await runtime.find() == []
            foreign.reload()
            foreign.remove()

    play(scenario())


def test_a_start_cancelled_at_any_moment_leaves_nothing_after_stop(bench: Bench) -> None:
    rng = random.Random(20)

    async def scenario() -> None:
        first = free_port()
        async with opened(bench, first_port=first) as runtime:
            for _ in range(12):
                start = asyncio.create_task(runtime.start(bench.launch(POLITE, port=80, secrets={"A": "b"}), Ear()))
                await asyncio.wait([start], timeout=rng.uniform(0, 0.6))
                start.cancel()
                await asyncio.wait([start])
                await runtime.stop(bench.name(), grace_s=5)
                assert {each for each in bench.leftovers() if each.startswith("container")} == set()
            assert (await runtime.start(bench.launch(POLITE, port=80), Ear())).port == first

    play(scenario())


def test_a_stop_calls_off_a_start_that_nobody_cancelled(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            start = asyncio.create_task(runtime.start(bench.launch(POLITE), Ear()))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await runtime.stop(bench.name(), grace_s=5)
            with pytest.raises(StartFailed, match="stopped while it started"):
                await start
            assert await runtime.find() == []

    play(scenario())


# ---- ports ----


def test_ten_at_once_get_ten_containers_and_ten_ports(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            launches = [bench.launch(POLITE, f"n{number}", port=80) for number in range(10)]
            handles = await asyncio.gather(*(runtime.start(launch, Ear()) for launch in launches))
            assert len({handle.port for handle in handles}) == 10
            assert len({handle.ref for handle in handles}) == 10
            await asyncio.gather(*(runtime.stop(handle.name, grace_s=5) for handle in handles))

    play(scenario())


def test_two_gateways_that_start_at_once_never_share_a_port(bench: Bench) -> None:
    async def scenario() -> None:
        one = bench.runtime(first_port=18480)
        other = type(one)(f"{bench.owner}-other", first_port=18480)
        starts = [
            runtime.start(bench.launch(POLITE, f"{number}{side}", port=80), Ear())
            for number in range(4)
            for side, runtime in (("a", one), ("b", other))
        ]
        handles = await asyncio.gather(*starts)
        assert len({handle.port for handle in handles}) == 8
        for runtime in (one, other):
            for found in await runtime.find():
                await runtime.stop(found.name, grace_s=5)
            await runtime.aclose()

    play(scenario())


def test_a_port_that_somebody_else_listens_on_is_passed_over(bench: Bench) -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            taken = listener.getsockname()[1]
            async with opened(bench, first_port=taken) as runtime:
                handle = await runtime.start(bench.launch(POLITE, port=80), Ear())
                assert handle.port is not None
                assert handle.port > taken

    play(scenario())


def test_a_server_for_nobody_has_no_port(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            handle = await runtime.start(bench.launch(POLITE), Ear())
            assert (handle.base_url, handle.port) == ("", None)
            assert bench.container().attrs["HostConfig"]["PortBindings"] in ({}, None)

    play(scenario())


# ---- the next life ----


def test_the_next_gateway_finds_and_adopts_what_runs(bench: Bench) -> None:
    async def scenario() -> None:
        first = bench.runtime()
        launch = bench.launch(HTTP, port=80, fingerprint="abc")
        handle, _ = await start_and_hear(first, launch)
        pending = asyncio.create_task(first.ended(handle))
        await first.aclose()
        assert not pending.done()
        pending.cancel()
        await asyncio.wait([pending])

        async with opened(bench) as second:
            (found,) = await second.find()
            assert (found.name, found.fingerprint, found.gpus, found.runs) == (handle.name, "abc", (), True)
            ear = Ear()
            assert await second.adopt(found, ear) == handle
            await until(lambda: ear.lines == ["up"])
            await until_answers(handle.port)
            assert b"hello" in await fetch(handle)
            other = await second.start(bench.launch(POLITE, "other", port=80), Ear())
            assert other.port != handle.port
            bench.container().kill()
            assert await second.ended(handle) == Exit(137, "killed by SIGKILL", ("up",))

    play(scenario())


def test_what_does_not_run_is_found_too_and_cannot_be_adopted(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            handle = await runtime.start(bench.launch("exit 1"), Ear())
            await runtime.ended(handle)
            (found,) = await runtime.find()
            assert not found.runs
            with pytest.raises(StartFailed, match="gone"):
                await runtime.adopt(found, Ear())

    play(scenario())


def test_nobody_elses_containers_are_found(bench: Bench) -> None:
    labels = {"tgi-gateway.owner": f"{bench.owner}-and-more"}
    foreign = bench.client.containers.create(bench.image, ["sh"], name=bench.name("foreign"), labels=labels)

    async def scenario() -> None:
        async with opened(bench) as runtime:
            assert await runtime.find() == []
            await runtime.stop(foreign.name or "", grace_s=0)
            foreign.reload()
            foreign.remove()

    play(scenario())


def test_a_server_of_an_earlier_life_is_stopped_by_name_alone(bench: Bench) -> None:
    async def scenario() -> None:
        first = bench.runtime()
        handle, _ = await start_and_hear(first, bench.launch(POLITE))
        await first.aclose()
        async with opened(bench) as second:
            await second.stop(handle.name, grace_s=20)
            assert await second.find() == []

    play(scenario())


# ---- in a network of containers ----


def test_in_a_network_nothing_is_published_and_long_names_get_an_alias(bench: Bench) -> None:
    network = bench.client.networks.create(bench.name("network"))
    launch = bench.launch(SLEEP, "x" * 80, port=80)
    assert launch.container is not None
    image = bench.client.images.get(bench.image).attrs
    plan = Plan(launch, launch.container, image, bench.owner, "generation", Place(network.name))
    try:
        made = bench.client.containers.get(plan.create(bench.client.api, None))
        made.start()
        made.reload()
        assert made.attrs["HostConfig"]["PortBindings"] in ({}, None)
        networks = made.attrs["NetworkSettings"]["Networks"]
        assert list(networks) == [network.name]
        assert host_name(launch.name) in networks[network.name]["Aliases"]
        made.rename(bench.name("renamed"))
        made.reload()
        seen = read(made.attrs)
        address = made.attrs["NetworkSettings"]["Networks"][network.name]["IPAddress"]
        assert plan.place.base_url(seen, 80, None) == (f"http://{address}:80", 80)
        made.remove(force=True)
    finally:
        network.remove()


def containers(bench: Bench) -> list[str]:
    """Return the names of all containers that carry the owner's name."""
    return sorted(each.split()[1] for each in bench.leftovers() if each.startswith("container"))


async def until_answers(port: int | None) -> None:
    """Return when the server takes a connection and answers: docker's proxy takes it before the server does."""
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        try:
            answer = await reader.read()
        except ConnectionError:
            answer = b""
        writer.close()
        if answer:
            return
        await asyncio.sleep(0.05)


async def collect(lines: object) -> list[str]:
    return [line async for line in lines]  # type: ignore[attr-defined]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
