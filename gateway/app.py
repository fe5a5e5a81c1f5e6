"""The composition root: makes the concrete things and joins them. The only module that names them."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import machine
from gateway.api import problems
from gateway.api.api_server import api_server_router
from gateway.api.authorization import Authorization
from gateway.api.autotrain import autotrain_router
from gateway.api.body_limit import BodyLimit
from gateway.api.generate import generate_router
from gateway.api.hot_routes import HotRoutes
from gateway.api.inference import inference_router
from gateway.api.llm_service import llm_service_router
from gateway.api.metrics import counted, metrics_router
from gateway.api.middleware import LoopbackOnly, PlainPaths, RequestLog, Waiting, in_words
from gateway.api.models import models_router
from gateway.api.openai import openai_router
from gateway.api.overview import overview_router
from gateway.api.reports import Reports
from gateway.api.tgi import tgi_router
from gateway.catalog import Catalog, ModelSpec
from gateway.catalog_file import load_catalog
from gateway.catalog_watch import CatalogFile, CatalogWatch
from gateway.engines.base import Engine
from gateway.engines.llamacpp import LlamaCpp
from gateway.engines.openai import OpenAi
from gateway.engines.tgi import Tgi
from gateway.errors import CatalogError, Forbidden
from gateway.figures import Figures
from gateway.fleet.experience import Experience, host_name
from gateway.fleet.experience_file import ExperienceFile
from gateway.fleet.fleet import Fleet
from gateway.fleet.gpus import Gpus
from gateway.fleet.identity import server_name
from gateway.fleet.journal import Journal
from gateway.fleet.placement import described
from gateway.keys import load_keys
from gateway.probe import HttpProbe
from gateway.runtimes.base import Launch
from gateway.runtimes.docker.runtime import DockerRuntime
from gateway.runtimes.external import ExternalRuntime
from gateway.runtimes.inventory import DeviceFiles, JoinedInventory
from gateway.runtimes.nvml import Nvml
from gateway.runtimes.process import ProcessRuntime
from gateway.settings import Settings, check_exposure, load_settings, unknown_variables
from gateway.upstream import HttpClient
from gateway.waiting import Room

log = logging.getLogger(__name__)

VERSION = version("tgi-gateway")
CORS: dict[str, Any] = {
    "allow_methods": ["GET", "HEAD", "POST"],
    "allow_headers": ["Authorization", "Content-Type", "Prefer", "X-Request-ID"],
    "expose_headers": ["X-Request-ID", "Retry-After"],
}
"""What a page of an allowed origin may send, and read of the answer."""

NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}
"""The gateway has figures and a log of its own; FastAPI's would be looked for at every request."""


def create_app(settings: Settings | None = None, environ: Mapping[str, str] = os.environ) -> FastAPI:
    """Return the gateway as an ASGI application, from the environment and the catalog that it names.

    One process, one worker: each model has one owner.

    Raises:
        CatalogError: the environment or the catalog cannot be used; every complaint at once.
    """
    settings = settings or load_settings(environ)
    check_exposure(settings, environ)
    check_one_worker(environ, sys.argv)
    for complaint in unknown_variables(environ):
        log.warning("%s", complaint)
    load = partial(load_catalog, settings.catalog, environ)
    return compose(settings, load(), load)


def check_one_worker(environ: Mapping[str, str], arguments: Sequence[str]) -> None:
    """Return if the server was not asked for several worker processes: each of them would own every model.

    Raises:
        CatalogError: it was, by uvicorn's environment or by its `--workers`.
    """
    asked = {name: environ.get(name, "") for name in ("WEB_CONCURRENCY", "UVICORN_WORKERS")}
    for number, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag == "--workers":
            asked[flag] = value or next(iter(arguments[number + 1 :]), "")
    rule = "a gateway is one process, because each model has one owner: unset it, or set it to 1"
    if complaints := [f"{name}: {rule}" for name, value in asked.items() if value not in ("", "1")]:
        raise CatalogError(complaints)


def planned(spec: ModelSpec, settings: Settings | None = None) -> Launch | None:
    """Return what would be run for a model, or None if this version cannot run it.

    Raises:
        StartFailed: something that the catalog names cannot be used.
    """
    engine = _engines(settings or Settings()).get(spec.engine)
    return engine.launch(spec, server_name(spec), secret="") if engine else None


def inventory_of(settings: Settings) -> JoinedInventory:
    """Return what tells of the GPUs: GATEWAY_GPUS, else NVIDIA's driver, else the device files of this machine."""
    return JoinedInventory(settings.gpus, Nvml(), DeviceFiles(names=machine.gpu_names()))


def _engines(settings: Settings) -> dict[str, Engine]:
    return {"tgi": Tgi(settings.hf_token), "llamacpp": LlamaCpp(settings.device), "openai": OpenAi()}


def compose(settings: Settings, catalog: Catalog, load: Callable[[bytes], Catalog] | None = None) -> FastAPI:
    """Join the parts. Nothing runs until the application's lifespan begins.

    With `load`, which makes a catalog of what its file says, the file is watched, and its changes are followed.

    Raises:
        CatalogError: the file of keys cannot be used.
    """
    keys = load_keys(settings.api_keys_file) if settings.api_keys_file else None
    processes, containers, client = ProcessRuntime(), DockerRuntime(settings.name), HttpClient()
    others = ExternalRuntime()
    figures = Figures(VERSION)
    inventory = inventory_of(settings)
    devices = inventory.devices()
    log.info("GPUs: %s (%s)", described(devices or ()), inventory.source)
    fleet = Fleet(
        catalog,
        engines=_engines(settings),
        runtimes={"docker": containers, "process": processes, "external": others},
        probe=HttpProbe(client),
        journal=Journal(time.time, figures.heard),
        gpus=Gpus(devices, inventory),
        experience=Experience(host_name()),
        figures=figures.of,
        keep_servers=settings.on_exit != "stop",
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            async with _kept(fleet.experience, settings), figures.sampling_lag():
                try:
                    with _closing_on_signal(fleet):
                        await fleet.begin()
                        async with _watching(fleet, settings.catalog, load):
                            yield
                finally:
                    await fleet.aclose()
        finally:
            for part in (client, processes, containers, others, inventory):
                await part.aclose()

    app = Application(
        title="TGI Gateway",
        version=VERSION,
        lifespan=lifespan,
        root_path=settings.root_path,
        telemetry=NO_TELEMETRY,
    )
    app.router.redirect_slashes = False
    app.state.fleet = fleet
    problems.install(app)
    reports = Reports(fleet, VERSION, device=settings.device)
    routers = (
        generate_router(fleet, client),
        inference_router(fleet, client),
        autotrain_router(fleet, client),
        llm_service_router(fleet, client, reports),
        api_server_router(fleet, client, reports),
        openai_router(fleet, client),
        tgi_router(fleet, client, reports),
        models_router(fleet),
        overview_router(fleet, reports),
        metrics_router(fleet, figures),
    )
    for router in routers:
        app.include_router(router)
    # the last one added comes first
    app.add_middleware(HotRoutes, routes=[route for router in routers for route in router.routes])
    app.add_middleware(BodyLimit, most_bytes=settings.max_body_bytes, closing=lambda: fleet.closing)
    room = Room(settings.max_waiting)
    if keys is not None:
        app.add_middleware(Authorization, keys=keys, room=room)
    else:
        app.add_middleware(Waiting, room=room)
    app.add_middleware(PlainPaths)
    if settings.cors_origins:  # before the keys: a browser asks without one whether it may send one
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, **CORS)
    if keys is None and not settings.allow_insecure:
        app.add_middleware(LoopbackOnly, refusal=_not_for_you)
    app.add_middleware(RequestLog, ended=counted(figures))
    return app


class Application(FastAPI):
    """FastAPI without those of its layers around everything that have nothing to do here."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, in_words(send))
            return
        scope["app"] = self
        if self.root_path:
            scope["root_path"] = self.root_path
        if self.middleware_stack is None:
            self.middleware_stack = self.build_middleware_stack()
        await self.middleware_stack(scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        """Return the gateway's own layers and what is beneath them, without those that FastAPI puts around everything.

        They would find nothing to do: `RequestLog` answers what nobody has caught, `BodyLimit` bounds the body, and
        there is no telemetry.
        """
        layers: Any = super().build_middleware_stack()
        while not isinstance(layers, RequestLog):
            layers = layers.app
        return layers


def _kept(experience: Experience, settings: Settings) -> AbstractAsyncContextManager[None]:
    """Keep what is learned beyond the gateway's life, if there is a place for it."""
    if settings.state_dir is None:
        return nullcontext()
    return ExperienceFile(settings.state_dir, settings.name).keeping(experience)


@asynccontextmanager
async def _watching(fleet: Fleet, path: Path, load: Callable[[bytes], Catalog] | None) -> AsyncIterator[None]:
    """Let the fleet follow the catalog's file for as long as the context lasts."""
    if load is None:
        yield
        return
    watch = CatalogWatch(CatalogFile(path, load), fleet.change, fleet.refuse)
    watching = asyncio.create_task(watch.run(), name="watch the catalog")
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait([watching])


def _not_for_you() -> Forbidden:
    return Forbidden(
        "This gateway has no keys, so it answers on loopback only. Give it some (`gateway keys add`, and "
        "GATEWAY_API_KEYS_FILE); or set GATEWAY_ALLOW_INSECURE=true to serve other machines without any protection."
    )


class _closing_on_signal:  # noqa: N801 - reads as what it does
    """Closes the fleet as soon as a signal asks the server to end.

    The server itself waits for open connections before it ends the lifespan, and an open event stream never
    ends by itself: so our streams end, queues are refused and running requests get their drain limit first.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._before: dict[int, signal._HANDLER] = {}
        self._asked = 0

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            theirs = signal.getsignal(number)
            if callable(theirs):
                self._before[number] = theirs
                signal.signal(number, lambda number, frame: self._on_signal(loop, number, frame))

    def __exit__(self, *_: object) -> None:
        for number, theirs in self._before.items():
            signal.signal(number, theirs)

    def _on_signal(self, loop: asyncio.AbstractEventLoop, number: int, frame: FrameType | None) -> None:
        self._asked += 1
        # who asks twice does not want to wait: what runs is cut, with words
        loop.call_soon_threadsafe(lambda: self._fleet.close(force=self._asked > 1))
        theirs = self._before[number]
        assert callable(theirs)  # only such were replaced
        theirs(number, frame)
