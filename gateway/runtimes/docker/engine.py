"""A local Docker Engine: its verbs through the SDK, its long answers as streams, its failures in our words.

The SDK blocks, so each call runs in a thread of its own: what is slow elsewhere never keeps a `stop` waiting, and a
call that hangs keeps nobody from leaving, the process neither. What goes on for long (events, a followed log, a pull)
holds no thread: it is read on the event loop, over a connection of its own, and ends at once when its reader is
cancelled.

Three kinds of failure are told apart. `Silent`: no answer came, so nothing is known, and asking again may help.
`Refused`: the engine said no, with a status and a reason. Any other `RuntimeUnavailable`: asking again is of no use.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import aiohttp
from docker import APIClient
from docker.constants import DEFAULT_DOCKER_API_VERSION
from docker.errors import APIError, DockerException
from requests.exceptions import RequestException
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from gateway.errors import RuntimeUnavailable

T = TypeVar("T")
Call = Callable[[APIClient], T]

DEFAULT_URL = "unix:///var/run/docker.sock"
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
CALLS = 16
"""How many may be under way at once."""
TIMEOUT_S = 30.0
"""How long one call may take before nothing is known about it."""
PATIENCE_S = 60.0
"""How long a call is repeated before an engine that used to answer is given up."""
LET_GO = "The gateway has let go of the Docker Engine."
SEE_DOCTOR = "`gateway doctor` looks closer."


class Silent(RuntimeUnavailable):
    """The engine gave no answer: whether it did what it was asked is not known."""


class Refused(RuntimeUnavailable):
    """The engine answered, and the answer is no: an HTTP status, and its own words."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"The Docker Engine refused: {words.strip()} (status {status}).")
        self.http_status = status
        self.words = words.strip()


class Engine:
    """One engine, reached when it is first asked and not before; it may be absent for ever."""

    def __init__(self, url: str | None = None, *, timeout_s: float = TIMEOUT_S, patience_s: float = PATIENCE_S) -> None:
        self.url = url or os.environ.get("DOCKER_HOST") or DEFAULT_URL
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._clients = _Clients(self.url, timeout_s)
        self._free = asyncio.Semaphore(CALLS)
        self._answers: set[asyncio.Future[Any]] = set()
        self._session: aiohttp.ClientSession | None = None
        self._answered = False
        self._closed = False

    async def ask(self, call: Call[T]) -> T:
        """Return what `call` returns, asking again while the engine is silent. `call` must bear to be repeated.

        An engine that has never answered is not waited for. Cancelled, it returns at once, whatever becomes of the
        call: only for what changes nothing.

        Raises:
            Refused: the engine's own no.
            RuntimeUnavailable: no answer came in time, or there is no engine that could give one.
        """
        return await self._patiently(self.ask_once, call)

    async def ask_once(self, call: Call[T]) -> T:
        """As `ask`, but Silent as soon as one answer has not come."""
        return await (await self._begin(call))

    async def do(self, call: Call[T]) -> T:
        """As `ask`, for what changes something: cancelled, it returns once it is known what became of it."""
        return await self._patiently(self._do_once, call)

    @asynccontextmanager
    async def stream(
        self, method: str, path: str, params: Mapping[str, str], headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[aiohttp.StreamReader]:
        """Open a long answer, to be read inside. Leaving closes its connection, which ends what the engine was doing.

        Raises: as `ask_once`, and Silent inside if the answer breaks off.
        """
        version = await self.ask_once(lambda client: client.api_version)
        url = f"{_http_url(self.url)}/v{version}{path}"
        try:
            async with self._streams().request(method, url, params=params, headers=headers) as response:
                if response.status >= 400:
                    raise Refused(response.status, _message(await response.text()))
                yield response.content
        except (aiohttp.ClientError, OSError) as error:
            raise Silent(_why_silent(self.url, error, self._timeout_s)) from error

    def abandon(self) -> None:
        """Wait no longer for any call that is under way: what becomes of it is left open. More can be asked."""
        for answer in self._answers:
            if not answer.done():
                answer.set_exception(RuntimeUnavailable(LET_GO))
                answer.exception()  # seen, so that the loop does not complain if nobody waits any more

    async def aclose(self) -> None:
        """Close every connection. Nothing can be asked afterwards, and what hangs is left alone."""
        self._closed = True
        self.abandon()
        if self._session:
            await self._session.close()
            await asyncio.sleep(0)  # a transport closes in the next turn of the loop
        self._clients.close()

    async def _patiently(self, verb: Callable[[Call[T]], Awaitable[T]], call: Call[T]) -> T:
        attempts = AsyncRetrying(
            retry=retry_if_exception(self._may_answer_yet),
            wait=wait_random_exponential(multiplier=0.2, max=2),
            stop=stop_after_delay(self._patience_s),
            reraise=True,
        )
        return await attempts(verb, call)

    async def _do_once(self, call: Call[T]) -> T:
        return await _known(await self._begin(call))

    async def _begin(self, call: Call[T]) -> asyncio.Future[T]:
        """Begin a call once fewer than `CALLS` are under way. Its thread may hang, so it is none that is waited for."""
        if not self._closed:
            await self._free.acquire()
        if self._closed:
            raise RuntimeUnavailable(LET_GO)
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._answers.add(answer)
        threading.Thread(target=self._work, args=(call, answer), name="docker", daemon=True).start()
        return answer

    def _work(self, call: Call[T], answer: asyncio.Future[T]) -> None:
        try:
            tell: Callable[[], None] = partial(answer.set_result, self._call(call))
        except Exception as error:  # whoever waits for the answer gets it
            tell = partial(answer.set_exception, error)
        with suppress(RuntimeError):  # the loop has ended, and nobody waits
            answer.get_loop().call_soon_threadsafe(self._over, answer, tell)

    def _over(self, answer: asyncio.Future[Any], tell: Callable[[], None]) -> None:
        self._free.release()
        self._answers.discard(answer)
        if not answer.done():
            tell()

    def _may_answer_yet(self, error: BaseException) -> bool:
        return isinstance(error, Silent) and self._answered

    def _call(self, call: Call[T]) -> T:
        """Call in a thread; no error of the SDK's gets out of here."""
        try:
            with self._clients.one() as client:
                result = call(client)
        except APIError as error:
            self._answered = True
            raise Refused(error.status_code or 500, str(error.explanation or error)) from error
        except (RequestException, DockerException, OSError) as error:
            raise self._failure(error) from error
        self._answered = True
        return result

    def _failure(self, error: Exception) -> RuntimeUnavailable:
        """Return what to say of an error that is no answer."""
        if not any(isinstance(each, RequestException | OSError) for each in _chain(error)):
            return RuntimeUnavailable(f"The Docker SDK cannot do this: {error}. {SEE_DOCTOR}")
        self._clients.renew()
        return Silent(_why_silent(self.url, error, self._timeout_s))

    def _streams(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=_connector(self.url), timeout=aiohttp.ClientTimeout(sock_connect=self._timeout_s)
            )
        return self._session


class _Clients:
    """The SDK's clients, each lent to one thread at a time: nobody promises that two may use one.

    Each asks the engine for its API version when it is made. After a failure all are made anew, because
    the engine that comes back may be another version.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._idle: list[APIClient] = []
        self._generation = 0
        self._closed = False

    @contextmanager
    def one(self) -> Iterator[APIClient]:
        """Lend a client.

        Raises:
            RuntimeUnavailable: the address is none that we support.
            DockerException: the engine did not tell its version.
        """
        if words := why_not_supported(self._url):
            raise RuntimeUnavailable(words)
        generation = self._generation
        client = self._take() or self._new()
        try:
            yield client
        finally:
            self._give_back(client, generation)

    def renew(self) -> None:
        """Close all that are idle; the others are closed when they come back."""
        with self._lock:
            self._generation += 1
            idle, self._idle = self._idle, []
        for client in idle:
            client.close()

    def close(self) -> None:
        self._closed = True
        self.renew()

    def _take(self) -> APIClient | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _give_back(self, client: APIClient, generation: int) -> None:
        with self._lock:
            if keep := generation == self._generation and not self._closed:
                self._idle.append(client)
        if not keep:
            client.close()

    def _new(self) -> APIClient:
        """Make a client that speaks the engine's own version; the one that asks for it is closed in any case."""
        with closing(self._client(DEFAULT_DOCKER_API_VERSION)) as asking:
            version = str(asking.version(api_version=False)["ApiVersion"])
        return self._client(version)

    def _client(self, version: str) -> APIClient:
        client = APIClient(base_url=self._url, version=version, timeout=self._timeout_s)  # type: ignore[arg-type]
        client.headers["Connection"] = "close"  # else it keeps one open for each of the last 25 paths asked for
        return client


def why_not_supported(url: str) -> str | None:
    """Return why an engine at this address is none for us, or None if it may be."""
    parts = urlsplit(url)
    on_loopback = parts.scheme in ("tcp", "http") and parts.hostname in LOOPBACK and parts.port is not None
    if parts.scheme in ("unix", "http+unix") or on_loopback:
        return None
    return (
        f"DOCKER_HOST is {url}: only an engine on this machine is supported (unix://PATH or tcp://127.0.0.1:PORT): "
        "models are published on loopback only. Run the gateway on that machine instead, or unset DOCKER_HOST."
    )


def _path(parts: SplitResult) -> str:
    return parts.netloc + parts.path


def _http_url(url: str) -> str:
    parts = urlsplit(url)
    return "http://docker" if "unix" in parts.scheme else f"http://{parts.netloc}"


def _connector(url: str) -> aiohttp.BaseConnector:
    parts = urlsplit(url)
    if "unix" in parts.scheme:
        return aiohttp.UnixConnector(path=_path(parts), limit=0, force_close=True)
    return aiohttp.TCPConnector(limit=0, force_close=True)


def _message(body: str) -> str:
    """Return the words of an error's body, which is `{"message": words}`."""
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body


def _why_silent(url: str, error: BaseException, timeout_s: float) -> str:
    causes = list(_chain(error))

    def is_any(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_any(FileNotFoundError):
        what = f"There is no Docker Engine at {url}: no such socket"
        return f"{what}. Install and start it (`systemctl start docker`), or set DOCKER_HOST; {SEE_DOCTOR}"
    if is_any(PermissionError):
        what = f"The gateway's user may not use the Docker Engine at {url}"
        return f"{what}. Add it to the group that owns the socket (`usermod -aG docker USER`); {SEE_DOCTOR}"
    if is_any(ConnectionRefusedError):
        return f"The Docker Engine at {url} is not running. Start it (`systemctl start docker`); {SEE_DOCTOR}"
    if is_any(TimeoutError) or any("timed out" in str(cause).lower() for cause in causes):
        return f"The Docker Engine at {url} has not answered within {timeout_s:g} s. {SEE_DOCTOR}"
    return f"The Docker Engine at {url} broke off in the middle ({type(causes[-1]).__name__}). {SEE_DOCTOR}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it came from. The SDK wraps what urllib3 wraps."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


async def _known(call: asyncio.Future[T]) -> T:
    """Return a thread's result. Cancelled, wait for it first: what the thread does goes on, and must not be unknown."""
    cancelled: asyncio.CancelledError | None = None
    while not call.done():
        try:
            await asyncio.wait([call])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled:
        call.exception()  # seen, so that the loop does not complain
        raise cancelled
    return call.result()
