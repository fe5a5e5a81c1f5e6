"""The gateway's own knobs, from environment variables; the catalog has everything about models."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from gateway.catalog_values import GPU_IDS, LEAST_GPU_BYTES, Bytes, did_you_mean, faults, is_gpu_id, parse_bytes
from gateway.errors import CatalogError
from gateway.keys import load_keys

_PREFIX = "GATEWAY_"
_CLIENTS = ("GATEWAY_URL", "GATEWAY_API_KEY")  # read by the commands that talk to a running gateway


def _owner(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", text):
        raise ValueError("must be 1 to 63 letters, digits, `.`, `_` and `-`, and begin with a letter or digit")
    return text


def _host(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._:%-]{1,255}", text):
        raise ValueError("must be a host name or an address such as 127.0.0.1 or ::1")
    return text


def _root_path(text: str) -> str:
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)*/?", text):
        raise ValueError("must be a path such as /llm")
    return text.rstrip("/")


def _origins(value: object) -> object:
    origins = tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
    for origin in origins if isinstance(origins, tuple) else ():
        if origin != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.:\[\]-]+", str(origin)):
            raise ValueError("must be origins such as https://chat.example.org, separated by commas, or *")
    return origins


def _gpu_memory(value: object) -> object:
    if not isinstance(value, str):
        return value
    gpus = {}
    for part in value.split(","):
        gpu, equals, memory = part.strip().partition("=")
        if not equals or not is_gpu_id(gpu) or gpu in gpus:
            raise ValueError(f"must be different GPUs ({GPU_IDS}) with their memory, such as 0=24GiB,1=24GiB")
        gpus[gpu] = parse_bytes(memory)
        if gpus[gpu] < LEAST_GPU_BYTES:
            raise ValueError("must say each GPU's memory with its unit, such as 0=24GiB: a bare number is bytes")
    return gpus


class Settings(BaseSettings):
    """What the environment says, with defaults applied. Each variable is `GATEWAY_` and the attribute's name."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        case_sensitive=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
        validate_by_alias=True,
        validate_by_name=True,
    )

    catalog: Path = Path("models.yaml")
    """The file of models."""
    host: Annotated[str, AfterValidator(_host)] = "127.0.0.1"
    """Where the gateway listens; anything but loopback needs keys, or GATEWAY_ALLOW_INSECURE."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Its port; 0 takes a free one."""
    name: Annotated[str, AfterValidator(_owner)] = "default"
    """Owner of the containers it makes: two gateways on one machine need two names."""
    on_exit: Literal["keep", "stop"] | None = None
    """What becomes of running models when the gateway ends. None: containers are kept, processes are stopped."""
    api_keys_file: Path | None = None
    """The callers' keys, read once. None: anybody who reaches the gateway may use it."""
    allow_insecure: bool = False
    """Serve other machines without keys all the same."""
    max_body_bytes: Bytes = Field(default=2_000_000, validation_alias="GATEWAY_MAX_BODY")
    """The largest request body."""
    max_waiting: int = Field(default=10_000, ge=1)
    """How many requests may wait for models, whichever; each model's `max_queue` bounds its own."""
    gpus: Annotated[Mapping[str, int] | None, BeforeValidator(_gpu_memory)] = None
    """Memory in bytes of each GPU by its id, where it cannot be asked for."""
    state_dir: Path | None = None
    """A directory in which to keep what starts cost, for estimates. None: that is forgotten when the gateway ends."""
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_origins)] = ()
    """Web pages that may call the gateway from a browser."""
    log_format: Literal["text", "json"] = "text"
    """One line of text or one JSON object for each event."""
    root_path: Annotated[str, AfterValidator(_root_path)] = ""
    """The path under which a proxy serves the gateway."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where llama.cpp computes."""
    hf_token: SecretStr | None = Field(default=None, validation_alias="HF_TOKEN")
    """Key for the Hugging Face hub, handed to engines that download from it."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the arguments as the only source: the environment is what `load_settings` is given."""
        return (init_settings,)


_VARIABLES = {
    str(about.validation_alias or f"{_PREFIX}{attribute.upper()}"): attribute
    for attribute, about in Settings.model_fields.items()
}


def load_settings(environ: Mapping[str, str]) -> Settings:
    """Return the settings that `environ` says and nothing else does. An empty variable counts as absent.

    Raises:
        CatalogError: with a complaint for every variable that is wrong.
    """
    said = {attribute: environ[name] for name, attribute in _VARIABLES.items() if environ.get(name)}
    try:
        return Settings.model_validate(said)
    except ValidationError as error:
        raise CatalogError(list(_complaints(error))) from None


def _complaints(error: ValidationError) -> Iterator[str]:
    names = {attribute: name for name, attribute in _VARIABLES.items()}
    for place, rule in faults(error):
        yield f"{names.get(place, place)}: {rule}"


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Return a line for each GATEWAY_* variable that nothing reads, with the near name."""
    known = {*_VARIABLES, *_CLIENTS}
    unknown = sorted(name for name in environ if name.startswith(_PREFIX) and name not in known)
    return [f"{name}: nothing reads this variable{did_you_mean(name, known, likeness=0.8)}" for name in unknown]


def check_exposure(settings: Settings, environ: Mapping[str, str]) -> None:
    """Return if these settings protect as much as they seem to.

    Raises:
        CatalogError: the gateway would be open to other machines, a key would only look like protection, or the file
            of keys cannot be used.
    """
    complaints = list(_exposures(settings, environ))
    if complaints:
        raise CatalogError(complaints)


def _exposures(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    if settings.api_keys_file is not None:
        yield from _wrong_keys(settings.api_keys_file)
        return
    if environ.get("GATEWAY_API_KEY"):
        yield (
            "GATEWAY_API_KEY: it would look like protection, but it is what clients send; the gateway's own keys "
            "are in GATEWAY_API_KEYS_FILE: unset it for `gateway serve`"
        )
    if not _is_loopback(settings.host) and not settings.allow_insecure:
        yield (
            f"GATEWAY_HOST: {settings.host} lets other machines in, and nothing asks them for a key: listen on "
            "127.0.0.1, or name a keys file with GATEWAY_API_KEYS_FILE (`gateway keys add` makes one), or set "
            "GATEWAY_ALLOW_INSECURE=true if something else protects this address"
        )


def _wrong_keys(path: Path) -> Iterator[str]:
    try:
        load_keys(path)
    except CatalogError as error:
        yield from (f"GATEWAY_API_KEYS_FILE: {complaint}" for complaint in error.complaints)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may mean any address
        return False
