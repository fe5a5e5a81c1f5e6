"""Keys: the file and every complaint of it, which address needs which right, and the limits of each key."""

from __future__ import annotations

import asyncio
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from gateway.api.authorization import Allowance, Authorization
from gateway.api.middleware import PlainPaths
from gateway.api.rights import right_for
from gateway.app import create_app
from gateway.errors import CatalogError, RateLimited
from gateway.keys import Key, NoChange, add_key, by_hash, holder_of, load_keys, remove_key

DIGEST = hashlib.sha256(b"secret").hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()


def line(**said: Any) -> str:
    return json.dumps({"name": "a", "sha256": DIGEST, "rights": ["generate"], **said})


def complaints(file: Path, *lines: str) -> list[str]:
    file.write_text("\n".join(lines))
    with pytest.raises(CatalogError) as caught:
        load_keys(file)
    return [complaint.removeprefix(f"{file}:") for complaint in caught.value.complaints]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.jsonl"


# ---- the file -------------------------------------------------------------------------------------------------------


def test_keys_are_read_as_they_are_written(file: Path) -> None:
    file.write_text(f"{line()}\n\n{line(name='b', sha256=OTHER, requests_per_minute=5, max_concurrency=2)}")

    assert load_keys(file) == (
        Key("a", DIGEST, frozenset({"generate"})),
        Key("b", OTHER, frozenset({"generate"}), 5, 2),
    )


def test_a_file_may_have_no_key(file: Path) -> None:
    file.touch()
    assert load_keys(file) == ()


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        ("{", "must be one JSON object, in UTF-8"),
        ("[" * 100_000, "must be one JSON object, in UTF-8"),
        ('"gw_key"', "must be one JSON object"),
        (line(name="a b"), "name: must be 1 to 63 letters"),
        (line(sha256="gw_key"), "sha256: must be a SHA-256"),
        (line(sha256=DIGEST.upper()), "sha256: must be a SHA-256"),
        (line(rights=[]), "rights: must be a list of some of generate, manage"),
        (line(rights=["admin"]), "rights: must be a list of some of generate, manage"),
        (line(rights=[{}]), "rights: must be a list of some of generate, manage"),
        (line(rights="generate"), "rights: must be a list of some of generate, manage"),
        (line(max_concurrency=0), "max_concurrency: must be a whole number from 1"),
        (line(max_concurrency=True), "max_concurrency: must be a whole number from 1"),
        (line(requests_per_minute=None), "requests_per_minute: must be a whole number from 1"),
        (line(right=["manage"]), "right: unknown key; did you mean rights?"),
        (line()[:-1] + ', "rights": ["manage"]}', "rights: is written twice"),
    ],
)
def test_a_wrong_line_is_complained_of(file: Path, written: str, rule: str) -> None:
    (complaint,) = complaints(file, line(name="z", sha256=OTHER), written)

    assert complaint.startswith(f"2: {rule}")
    assert "gw_key" not in complaint


def test_all_complaints_come_at_once_with_their_lines(file: Path) -> None:
    assert complaints(file, line(), line(sha256=OTHER), "{}", line(name="b")) == [
        "3: name: is missing",
        "3: sha256: is missing",
        "3: rights: is missing",
        "2: name: is that of line 1 already",
        "4: sha256: is that of line 1 already",
    ]


def test_a_new_key_is_known_by_what_was_shown_once(file: Path) -> None:
    token = add_key(file, "alice", ["manage", "generate"], max_concurrency=2)

    assert file.stat().st_mode & 0o777 == 0o600
    assert token not in file.read_text()
    (key,) = load_keys(file)
    assert (key.name, key.rights, key.max_concurrency) == ("alice", frozenset({"generate", "manage"}), 2)
    assert holder_of(token.encode(), by_hash([key])) == key
    assert holder_of(b"gw_other", by_hash([key])) is None


def test_changes_keep_the_rest_of_the_file(file: Path) -> None:
    file.write_text(line())  # without a line feed at its end
    file.chmod(0o640)
    add_key(file, "b", ["generate"])
    add_key(file, "c", ["manage"])
    remove_key(file, "b")

    assert [key.name for key in load_keys(file)] == ["a", "c"]
    assert file.read_text().startswith(line() + "\n")
    assert file.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_change_that_cannot_be_leaves_the_file_alone(file: Path) -> None:
    with pytest.raises(NoChange, match="cannot be changed"):
        remove_key(file, "a")
    file.write_text(line())
    with pytest.raises(NoChange, match="has a key a already"):
        add_key(file, "a", ["generate"])
    with pytest.raises(NoChange, match="has no key b; it has a"):
        remove_key(file, "b")
    with pytest.raises(CatalogError, match="name: must be"):
        add_key(file, "", ["generate"])
    assert file.read_text() == line()


def test_changes_at_once_are_all_made(file: Path) -> None:
    add_key(file, "gone", ["generate"])
    with ThreadPoolExecutor(8) as pool:
        made = [pool.submit(add_key, file, f"k{number}", ["generate"]) for number in range(20)]
        removed = pool.submit(remove_key, file, "gone")
    tokens = [each.result() for each in made]

    assert removed.exception() is None
    holders = [holder_of(token.encode(), by_hash(load_keys(file))) for token in tokens]
    assert [holder and holder.name for holder in holders] == [f"k{number}" for number in range(20)]


# ---- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "right"),
    [
        *((path, None) for path in ("/health", "/health/live", "/docs", "/redoc", "/openapi.json")),
        *((f"/models/m/{service}/docs", None) for service in ("llm-service", "api-server", "tgi")),
        *((f"/models/m/{what}", "manage") for what in ("start", "stop", "restart", "pull", "logs", "start\n")),
        *(
            (path, "generate")
            for path in ("/", "", "/models", "/models/m", "/generate", "/events", "/status", "/metrics", "/nowhere")
        ),
        *((path, "generate") for path in ("/healthy", "/docs\n", "/docs/x", "/models/docs", "/models/m/tgx/docs")),
        *((path, "generate") for path in ("/models/m/llm-service/health", "/models/m/n/start", "/x/health")),
    ],
)
def test_what_an_address_needs(path: str, right: str | None) -> None:
    assert right_for(path) == right


KEYS = (Key("writer", DIGEST, frozenset({"generate"})), Key("operator", OTHER, frozenset({"manage"})))


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})


async def ask(path: str, key: str | None = None, root_path: str = "", **headers: str) -> httpx.Response:
    async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainPaths(Authorization(answer, KEYS))({**scope, "state": {}}, receive, send)

    transport = httpx.ASGITransport(with_state, root_path=root_path)
    shown = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        return await client.get(path, headers={**shown, **headers})


@pytest.mark.parametrize(
    ("path", "root_path", "key", "status"),
    [
        ("/health/", "", None, 200),
        ("/llm/health", "/llm", None, 200),
        ("/models", "", None, 401),
        ("/models", "", "wrong", 401),
        ("/models/", "", "secret", 200),
        ("/models/m/start", "", "secret", 403),
        ("/models/m/start/", "", "secret", 403),
        ("/models/m/start%0A", "", "secret", 403),
        ("/models/m%2Fn/start", "", "secret", 200),  # no address of ours: the router finds nothing there
        ("/llm/models/m/start", "/llm", "secret", 403),
        ("/models/m/start", "/llm", "secret", 403),
        ("/models/m/start", "", "other", 200),
        ("/generate", "", "other", 403),
    ],
)
def test_a_request_needs_a_key_with_the_right(path: str, root_path: str, key: str | None, status: int) -> None:
    response = asyncio.run(ask(path, key, root_path))

    assert response.status_code == status
    codes = {401: "UNAUTHORIZED", 403: "FORBIDDEN"}
    if status in codes:
        assert response.json()["error_code"] == codes[status]
        assert response.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
        assert not key or key not in response.json()["detail"]


@pytest.mark.parametrize(
    ("sent", "status"),
    [("bearer  secret ", 200), ("Basic secret", 401), ("secret", 401), ("Bearer", 401), ("Bearer s e", 401)],
)
def test_only_a_bearer_token_counts(sent: str, status: int) -> None:
    assert asyncio.run(ask("/models", authorization=sent)).status_code == status


# ---- limits ---------------------------------------------------------------------------------------------------------


def test_no_more_requests_begin_within_any_minute() -> None:
    now = [0.0]
    allowance = Allowance(Key("a", DIGEST, frozenset({"generate"}), requests_per_minute=2), lambda: now[0])

    def begins_at(second: float) -> float | None:
        now[0] = second
        try:
            allowance.admit()
            return None
        except RateLimited as error:
            return error.retry_after_s

    assert [begins_at(second) for second in (0, 50, 59, 59.5, 60, 61, 110)] == [None, None, 1, 0.5, None, 49, None]


def test_a_request_under_way_is_given_back_however_it_ends() -> None:
    async def scene() -> list[int]:
        statuses: list[int] = []
        entered, may_end = asyncio.Event(), asyncio.Event()

        async def work(scope: Scope, receive: Receive, send: Send) -> None:
            entered.set()
            if scope["path"] == "/fails":
                raise ZeroDivisionError
            await may_end.wait()
            await answer(scope, receive, send)

        app = Authorization(work, [Key("a", DIGEST, frozenset({"generate"}), max_concurrency=1)])

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        async def receive() -> Any:
            return {"type": "http.request"}

        async def request(path: str) -> None:
            headers = [(b"authorization", b"Bearer secret")]
            await app({"type": "http", "path": path, "headers": headers, "state": {}}, receive, send)

        with pytest.raises(ZeroDivisionError):
            await request("/fails")
        entered.clear()
        first = asyncio.create_task(request("/slow"))
        await entered.wait()
        await request("/slow")  # one too many
        first.cancel()
        await asyncio.wait([first])
        may_end.set()
        await request("/slow")
        return statuses

    assert asyncio.run(scene()) == [429, 200]


# ---- the whole application ------------------------------------------------------------------------------------------


def whole(tmp_path: Path, **environ: str) -> httpx.AsyncClient:
    catalog = tmp_path / "models.yaml"
    catalog.write_text("models: {m: {engine: llamacpp, weights: m.gguf}}")
    app = create_app(environ={"GATEWAY_CATALOG": str(catalog), **environ})
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")


def test_a_page_of_an_allowed_origin_asks_without_a_key_whether_it_may(file: Path) -> None:
    token = add_key(file, "page", ["generate"])
    origin = "https://chat.example.org"

    async def scene() -> None:
        async with whole(file.parent, GATEWAY_API_KEYS_FILE=str(file), GATEWAY_CORS_ORIGINS=origin) as client:
            wanted = "authorization,content-type,prefer,x-request-id"
            asks = {"access-control-request-method": "POST", "access-control-request-headers": wanted}
            preflight = await client.options("/generate", headers={"origin": origin, **asks})
            assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, origin)
            stranger = await client.options("/generate", headers={"origin": "https://evil.example", **asks})
            assert (stranger.status_code, stranger.headers.get("access-control-allow-origin")) == (400, None)
            refused = await client.get("/models", headers={"origin": origin})
            assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, origin)
            served = await client.get("/models", headers={"origin": origin, "authorization": f"Bearer {token}"})
            assert served.status_code == 200
            assert served.headers["access-control-expose-headers"] == "X-Request-ID, Retry-After"

    asyncio.run(scene())


def test_without_keys_a_key_that_is_sent_is_ignored(tmp_path: Path) -> None:
    async def scene() -> int:
        async with whole(tmp_path) as client:
            return (await client.get("/models", headers={"authorization": "Bearer any"})).status_code

    assert asyncio.run(scene()) == 200
