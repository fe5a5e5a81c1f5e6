"""What to run for a model, and how to talk to it. Pure: values in, values out, no I/O.

An engine and a runtime meet in one value, `Launch`; an engine and a dialect meet in the values of
`gateway.generation`. Neither pair knows more of one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

from gateway.catalog import ModelSpec
from gateway.devices import Share
from gateway.errors import GatewayError
from gateway.generation import Finished, GenerationRequest, PromptToken, TokenEvent
from gateway.runtimes.base import Exit, Launch, Progress

Api = Literal["openai", "tgi"]


@dataclass(slots=True)
class Call:
    """One HTTP request to a model's server. `path` is relative to the handle's base URL."""

    path: str
    body: bytes = field(default=b"", repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    method: Literal["POST", "GET"] = "POST"
    fresh: bool = False
    """Goes over a connection of its own, closed after it: the server closes those that are kept when it likes."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why a server could not be started or ended: the cause, what to do, and the lines that show it."""

    cause: str
    fix: str
    evidence: tuple[str, ...] = ()


class Decoder(Protocol):
    """Turns the bytes of one answer into events, however they are cut into chunks."""

    def feed(self, chunk: bytes) -> list[TokenEvent | Finished]:
        """Return the events that `chunk` completes. `Finished` is the last one, ever.

        Raises:
            GatewayError: the server reported an error in mid-stream, or does not speak its own protocol.
        """


class Engine(Protocol):
    """One kind of model server."""

    name: ClassVar[str]
    health_path: ClassVar[str]
    default_slots: ClassVar[int]
    """How many requests such a server works on at once, unless the catalog says `max_concurrency`."""
    speaks: ClassVar[Api | None]
    """The API that such a server speaks so well that callers of it may be put through as they are (`forward`)."""

    def launch(self, spec: ModelSpec, name: str, secret: str) -> Launch:
        """Return what to run for `spec`. `secret` is this launch's own random key: the server answers nobody else.

        Raises:
            StartFailed: something that the catalog names (a weights file, say) cannot be used.
        """

    def placed(self, launch: Launch, shares: Sequence[Share]) -> Launch:
        """Return `launch` for a server that shares GPUs: told to take no more than these, one for each of its GPUs.

        What changes with every start is said here and not in `launch`: it makes no other server of it.

        Raises:
            NoCapacity: a share is not there, whatever was reserved; says what is.
        """

    def download(self, spec: ModelSpec, name: str) -> Launch | None:
        """Return what fetches the weights of `spec` ahead of its first start and then ends with 0, if anything does."""

    def is_ready(self, status: int, body: bytes) -> bool:
        """Say whether this answer to a health check means that the server takes requests.

        Raises:
            StartFailed: it never will, and waiting is of no use: it does not accept our key, say.
        """

    def is_alive(self, status: int, body: bytes) -> bool:
        """Say whether this answer means that the server works; a busy one does."""

    def progress(self, line: str) -> Progress | None:
        """Return the progress that a line of the server's output tells of, if it does."""

    def diagnose(self, end: Exit) -> Diagnosis:
        """Return why the server ended, from its exit and its last lines."""

    def check(self, spec: ModelSpec, request: GenerationRequest) -> None:
        """Return if this engine can do what is asked. Asked first, so that no model is started in vain.

        Raises:
            Unsupported: it cannot; names the parameters.
        """

    def call(self, spec: ModelSpec, request: GenerationRequest, secret: str) -> Call:
        """Return the HTTP call for a `request` that `check` let pass; its answer is always a stream."""

    def decoder(self, request: GenerationRequest) -> Decoder:
        """Return a fresh decoder for the answer to `call(..., request, ...)`."""

    def refusal(self, status: int, body: bytes) -> GatewayError:
        """Return the error that an answer other than 200 stands for."""

    def tokenize(self, spec: ModelSpec, request: GenerationRequest, secret: str) -> Call:
        """Return the call that has the server cut the prompt (or chat) of `request` into tokens.

        Raises:
            Unsupported: it cannot do that.
        """

    def tokens(self, request: GenerationRequest, body: bytes) -> tuple[PromptToken, ...]:
        """Return the tokens that the answer to `tokenize(..., request, ...)` tells of.

        Raises:
            UpstreamFailed: it is not the server's own protocol.
        """

    def forward(self, spec: ModelSpec, call: Call, secret: str) -> Call:
        """Return a caller's own `call` as the server takes it: its path in that server, the model by its name there.

        The caller's headers are not in it, but what tells the kind of the body. Only for engines that speak an API.
        """
