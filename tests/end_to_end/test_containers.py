"""Models as containers on a real Docker Engine, seen from outside: TGI is played by its double."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.containers import Site, serving, site
from tests.end_to_end.gateway import Gateway
from tests.runtimes.processes import wait_until

pytestmark = pytest.mark.docker


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as one:
        yield one


def ask(gateway: Gateway, model: str, **more: Any) -> httpx.Response:
    return gateway.post(
        "/generate", {"model_id": model, "prompt": "go round and", "max_new_tokens": 5, "temperature": 0, **more}
    )


def frames_of(gateway: Gateway, model: str, tokens: int) -> list[dict[str, Any]]:
    body = {"model_id": model, "prompt": "go round and", "max_new_tokens": tokens, "temperature": 0}
    with httpx.stream("POST", gateway.url + "/generate_stream", json=body, timeout=60) as answer:
        return [json.loads(line[5:]) for line in answer.iter_lines() if line.startswith("data:")]


def state(gateway: Gateway, model: str) -> str:
    return str(gateway.model(model)["state"])


def test_start_generate_stream_stop_and_start_again(place: Site) -> None:
    m = place.named("m")
    with serving(place, m=place.model()) as gateway:
        started = gateway.post(f"/models/{m}/start").json()
        assert started["container_name"] == f"tgi-{m}"
        assert started["port"] >= 8080
        first = place.container("m").id

        whole = ask(gateway, m)
        assert whole.status_code == 200
        assert whole.json()["tokens_generated"] == 5
        frames = frames_of(gateway, m, 5)
        assert [frame["index"] for frame in frames] == [1, 2, 3, 4, 5]
        assert "go round and" + "".join(frame["token"]["text"] for frame in frames) == whole.json()["generated_text"]

        again = gateway.post(f"/models/{m}/restart").json()
        assert again["container_name"] == f"tgi-{m}"
        assert place.container("m").id != first
        assert gateway.post(f"/models/{m}/stop").status_code == 200
        assert place.containers() == {}
        assert "Connected" in gateway.get(f"/models/{m}/logs").text

        assert ask(gateway, m).status_code == 200


def test_the_researchers_probabilities_come_from_containers_too(place: Site) -> None:
    m = place.named("m")
    with serving(place, m=place.model()) as gateway:
        answer = ask(gateway, m, max_new_tokens=1, temperature=0, top_tokens=5).json()

    candidates = answer["tokens"][0]
    assert [candidate["rank"] for candidate in candidates] == [1, 2, 3, 4, 5]
    assert 0 < sum(candidate["probability"] for candidate in candidates) <= 1


def test_an_idle_container_is_removed(place: Site) -> None:
    m = place.named("m")
    with serving(place, m=place.model(idle_timeout="1s")) as gateway:
        assert ask(gateway, m).status_code == 200
        wait_until(lambda: state(gateway, m) == "stopped" and not place.containers())


def test_ten_models_at_once_get_ten_containers_and_ten_ports(place: Site) -> None:
    models = {f"m{number}": place.model(hf_name=f"org/m{number}") for number in range(10)}
    with serving(place, all_of=models) as gateway:
        ids = [place.named(name) for name in models]
        with ThreadPoolExecutor(10) as pool:
            started = list(pool.map(lambda model: gateway.post(f"/models/{model}/start").json(), ids))

        assert len({each["port"] for each in started}) == 10
        assert place.containers().keys() == {f"tgi-{model}" for model in ids}


def test_fifty_cold_callers_of_one_model_get_one_container(place: Site) -> None:
    m = place.named("m")
    with serving(place, m=place.model(env={"DOUBLE_SHARD_S": 1})) as gateway:
        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(lambda _: ask(gateway, m), range(50)))

        assert {answer.status_code for answer in answers} == {200}
        assert sum("starting ->" in line for line in gateway.log) == 1
        assert len(place.containers()) == 1


@pytest.mark.parametrize(
    ("verb", "words"), [("kill", "SIGKILL"), ("stop", "exit status 0|SIGKILL"), ("remove", "removed|SIGKILL")]
)
def test_what_happens_behind_its_back_is_noticed_and_the_next_request_heals_it(
    place: Site, verb: str, words: str
) -> None:
    m = place.named("m")
    with serving(place, m=place.model(env={"DOUBLE_TOKEN_S": 0.05}, health_interval="1h")) as gateway:
        gateway.post(f"/models/{m}/start")
        first = place.container("m")
        answers: list[httpx.Response] = []
        caller = threading.Thread(target=lambda: answers.append(ask(gateway, m, max_new_tokens=1000)))
        caller.start()
        wait_until(lambda: gateway.model(m)["in_flight"] == 1)

        if verb == "remove":
            first.remove(force=True)
        elif verb == "stop":
            threading.Thread(target=lambda: first.stop(timeout=1)).start()
        else:
            first.kill()
        caller.join(30)

        assert [answer.status_code for answer in answers] in ([500], [502])
        assert answers[0].json()["error_code"] in ("GENERATION_FAILED", "UPSTREAM_FAILED")
        wait_until(lambda: gateway.model(m)["last_error"])
        told = gateway.model(m)["last_error"]["detail"]
        assert any(word in told for word in words.split("|")), told
        assert ask(gateway, m).status_code == 200
        assert place.container("m").id != first.id


def test_a_paused_container_is_unhealthy_at_once_and_replaced_in_time(place: Site) -> None:
    m = place.named("m")
    with serving(place, m=place.model(health_interval="1h", unhealthy_timeout="2s")) as gateway:
        gateway.post(f"/models/{m}/start")
        first = place.container("m")

        first.pause()

        wait_until(lambda: state(gateway, m) == "unhealthy")
        refused = ask(gateway, m)
        assert (refused.status_code, refused.json()["error_code"]) == (503, "MODEL_UNHEALTHY")
        assert "paused" in refused.json()["detail"]
        wait_until(lambda: state(gateway, m) in ("stopped", "failed"))
        assert ask(gateway, m).status_code == 200
        assert place.container("m").id != first.id


def test_a_container_that_is_thawed_in_time_serves_on(place: Site) -> None:
    m = place.named("m")
    with serving(place, m=place.model(health_interval="1s", unhealthy_timeout="60s")) as gateway:
        gateway.post(f"/models/{m}/start")
        first = place.container("m")

        first.pause()
        wait_until(lambda: state(gateway, m) == "unhealthy")
        first.unpause()
        wait_until(lambda: state(gateway, m) == "ready")

        assert ask(gateway, m).status_code == 200
        assert place.container("m").id == first.id


def test_a_health_check_that_hangs_is_noticed_within_its_bounds(place: Site) -> None:
    m = place.named("m")
    keys = {"health_interval": "200ms", "health_failures": 1, "unhealthy_timeout": "1s", "stop_grace": "1s"}
    with serving(place, m=place.model(env={"DOUBLE_HEALTH_HANGS_AFTER_S": 2}, **keys)) as gateway:
        gateway.post(f"/models/{m}/start")
        wait_until(lambda: "unhealthy" in gateway.moves(), 30)
        wait_until(lambda: gateway.model(m)["last_error"], 30)

        assert "missed" in gateway.model(m)["last_error"]["detail"]


@pytest.mark.parametrize(
    ("fails", "cause"),
    [("gated", "gated"), ("disk-full", "disk"), ("oom-load", "memory"), ("oom-warmup", "memory"), ("limits", "limit")],
)
def test_a_failed_start_is_told_with_cause_evidence_and_fix(place: Site, fails: str, cause: str) -> None:
    m = place.named("m")
    with serving(place, m=place.model(env={"DOUBLE_FAILS": fails})) as gateway:
        answer = ask(gateway, m)

    body = answer.json()
    assert (answer.status_code, body["error_code"]) == (503, "START_FAILED")
    assert cause in body["detail"].lower()
    assert body["fix"]
    assert body["evidence"]
    assert place.containers() == {}


def test_memory_that_ends_while_it_serves_is_told_to_the_caller_and_healed(place: Site) -> None:
    m = place.named("m")
    with serving(place, m=place.model(env={"DOUBLE_OOM_AFTER_TOKENS": 20})) as gateway:
        failed = ask(gateway, m, max_new_tokens=100)

        assert failed.status_code in (500, 502)
        wait_until(lambda: gateway.model(m)["last_error"])
        assert "memory" in gateway.model(m)["last_error"]["detail"]
        assert ask(gateway, m).status_code == 200


def test_a_caller_who_leaves_frees_its_place_in_the_container(place: Site) -> None:
    m = place.named("m")
    with serving(place, m=place.model(env={"DOUBLE_TOKEN_S": 0.02})) as gateway:
        port = gateway.post(f"/models/{m}/start").json()["port"]

        def busy() -> bool:
            metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
            sizes = [line for line in metrics.splitlines() if line.startswith("tgi_batch_current_size ")]
            return bool(sizes) and float(sizes[0].split()[1]) > 0

        body = {"model_id": m, "prompt": "go round and", "max_new_tokens": 2000, "temperature": 0}
        with httpx.stream("POST", gateway.url + "/generate_stream", json=body, timeout=60) as answer:
            lines = answer.iter_lines()  # dropped, it would close the stream
            next(lines)
            wait_until(busy)
        wait_until(lambda: not busy())


def test_a_foreign_container_of_our_name_is_left_alone_and_told_of(place: Site) -> None:
    m = place.named("m")
    foreign = place.client.containers.create(place.image, name=f"tgi-{m}")
    try:
        with serving(place, m=place.model()) as gateway:
            refused = ask(gateway, m)
        assert (refused.status_code, refused.json()["error_code"]) == (503, "START_FAILED")
        assert f"tgi-{m}" in refused.json()["detail"]
        assert place.client.containers.get(str(foreign.id)).id == foreign.id
    finally:
        foreign.remove(force=True, v=True)


def test_a_second_live_gateway_of_the_same_name_refuses_to_start(place: Site) -> None:
    with serving(place, m=place.model()), pytest.raises(AssertionError) as refused:
        place.gateway(m=place.model())

    assert "GATEWAY_NAME" in str(refused.value)
    assert "Traceback" not in str(refused.value)


def test_a_pull_fetches_the_weights_by_a_program_of_the_image(place: Site) -> None:
    m = place.named("m")
    shared = {"HF_HOME": "/data", "DOUBLE_FILES": 3, "DOUBLE_DOWNLOAD_S": 0.6}
    with serving(place, m=place.model(env=shared)) as gateway:
        lines = gateway.post(f"/models/{m}/pull").text.splitlines()

        assert lines[0].startswith("downloading, ")
        assert lines[-1] == f"done: image and weights of {m} are here"
        assert place.containers() == {}
        assert ask(gateway, m).status_code == 200
        assert "Files are already present" in gateway.get(f"/models/{m}/logs").text


def test_a_pull_that_fails_says_why(place: Site) -> None:
    m = place.named("m")
    with serving(place, m=place.model(env={"DOUBLE_FAILS": "no-repository"})) as gateway:
        answer = gateway.post(f"/models/{m}/pull")

    assert answer.status_code == 503 or answer.text.splitlines()[-1].startswith("failed: ")
    assert place.owner in answer.text


def test_a_token_reaches_the_server_as_a_file_and_is_never_shown(place: Site) -> None:
    m = place.named("m")
    with serving(place, {"HF_TOKEN": "hf_verysecret"}, m=place.model()) as gateway:
        gateway.post(f"/models/{m}/start")
        container = place.container("m")
        about = json.dumps(container.attrs) + container.logs().decode() + gateway.get(f"/models/{m}/logs").text

        assert "HF_TOKEN_PATH" in about
        assert "hf_verysecret" not in about + "".join(gateway.log)


def test_without_an_engine_the_gateway_serves_and_says_what_is_missing(place: Site, tmp_path: Path) -> None:
    m = place.named("m")
    url, place.url = place.url, f"unix://{tmp_path}/no.sock"
    gateway = place.gateway(m=place.model())
    place.url = url
    try:
        assert gateway.get("/health").status_code == 200
        refused = ask(gateway, m)
        shown = gateway.model(m)
        stop = gateway.post(f"/models/{m}/stop")
    finally:
        status = gateway.end()

    assert status == 0
    assert shown["last_error"]["error_code"] == "RUNTIME_UNAVAILABLE", "nobody knows that nothing runs"
    assert (stop.status_code, stop.json()["error_code"]) == (503, "RUNTIME_UNAVAILABLE")
    assert (refused.status_code, refused.json()["error_code"]) == (503, "RUNTIME_UNAVAILABLE")
    assert "gateway doctor" in refused.json()["detail"]
    assert refused.headers["retry-after"]
