"""The environment: what each variable means, every complaint word for word, and what is refused for safety."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway.errors import CatalogError
from gateway.keys import add_key
from gateway.settings import Settings, check_exposure, load_settings, unknown_variables

SECRET = "hf_do-not-show-me"
EXPOSED = (
    "lets other machines in, and nothing asks them for a key: listen on 127.0.0.1, or name a keys file with "
    "GATEWAY_API_KEYS_FILE (`gateway keys add` makes one), or set GATEWAY_ALLOW_INSECURE=true if something else "
    "protects this address"
)
LOOKS_PROTECTED = (
    "it would look like protection, but it is what clients send; the gateway's own keys are in "
    "GATEWAY_API_KEYS_FILE: unset it for `gateway serve`"
)


def complaints(environ: Mapping[str, str]) -> list[str]:
    with pytest.raises(CatalogError) as caught:
        load_settings(environ)
    return list(caught.value.complaints)


def exposure(environ: Mapping[str, str]) -> list[str]:
    with pytest.raises(CatalogError) as caught:
        check_exposure(load_settings(environ), environ)
    return list(caught.value.complaints)


def test_defaults() -> None:
    assert load_settings({}).model_dump() == {
        "catalog": Path("models.yaml"),
        "host": "127.0.0.1",
        "port": 8000,
        "name": "default",
        "on_exit": None,
        "api_keys_file": None,
        "allow_insecure": False,
        "max_body_bytes": 2_000_000,
        "max_waiting": 10_000,
        "gpus": None,
        "state_dir": None,
        "cors_origins": (),
        "log_format": "text",
        "root_path": "",
        "device": "auto",
        "hf_token": None,
    }


@pytest.mark.parametrize(
    ("name", "written", "attribute", "value"),
    [
        ("GATEWAY_CATALOG", "/etc/models.yaml", "catalog", Path("/etc/models.yaml")),
        ("GATEWAY_HOST", "::1", "host", "::1"),
        ("GATEWAY_PORT", "0", "port", 0),
        ("GATEWAY_NAME", "team-a", "name", "team-a"),
        ("GATEWAY_ON_EXIT", "stop", "on_exit", "stop"),
        ("GATEWAY_API_KEYS_FILE", "keys.jsonl", "api_keys_file", Path("keys.jsonl")),
        ("GATEWAY_ALLOW_INSECURE", "true", "allow_insecure", True),
        ("GATEWAY_MAX_BODY", "2MB", "max_body_bytes", 2_000_000),
        ("GATEWAY_MAX_BODY", "1024", "max_body_bytes", 1024),
        ("GATEWAY_MAX_WAITING", "7", "max_waiting", 7),
        ("GATEWAY_GPUS", "0=24GiB, GPU-4a=1GB", "gpus", {"0": 24 * 2**30, "GPU-4a": 10**9}),
        ("GATEWAY_STATE_DIR", "/var/lib/gateway", "state_dir", Path("/var/lib/gateway")),
        ("GATEWAY_CORS_ORIGINS", "https://a.org, http://b:3000,", "cors_origins", ("https://a.org", "http://b:3000")),
        ("GATEWAY_CORS_ORIGINS", "*", "cors_origins", ("*",)),
        ("GATEWAY_LOG_FORMAT", "json", "log_format", "json"),
        ("GATEWAY_ROOT_PATH", "/llm/", "root_path", "/llm"),
        ("GATEWAY_DEVICE", "cuda", "device", "cuda"),
        ("GATEWAY_PORT", "", "port", 8000),
    ],
)
def test_variable(name: str, written: str, attribute: str, value: object) -> None:
    assert getattr(load_settings({name: written}), attribute) == value


def test_hub_token_is_hidden() -> None:
    settings = load_settings({"HF_TOKEN": SECRET})

    assert settings.hf_token is not None
    assert settings.hf_token.get_secret_value() == SECRET
    assert SECRET not in f"{settings!r} {settings}"


def test_only_the_given_environment_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GATEWAY_PORT", "1")
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text("GATEWAY_PORT=2\n")

    assert load_settings({}).port == 8000
    assert Settings().port == 8000


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        load_settings({}).port = 1


NO_GPUS = (
    "must be different GPUs (0, 0:1, GPU-... or MIG-..., as `nvidia-smi -L` tells them) with their memory, "
    "such as 0=24GiB,1=24GiB"
)


@pytest.mark.parametrize("gpu", ["all", "none", "void", "", "-1", "00", "cuda:0", "nvidia.com/gpu=0"])
def test_a_word_is_no_gpu(gpu: str) -> None:
    assert complaints({"GATEWAY_GPUS": f"{gpu}=24GiB"}) == [f"GATEWAY_GPUS: {NO_GPUS}"]


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        ("0=24", "must say each GPU's memory with its unit, such as 0=24GiB: a bare number is bytes"),
        ("0=24576", "must say each GPU's memory with its unit, such as 0=24GiB: a bare number is bytes"),
        ("0=24GiB,0=24GiB", NO_GPUS),
        ("-1", NO_GPUS),
        ("0", NO_GPUS),
        ("a=b", NO_GPUS),
        ("=", NO_GPUS),
        (",", NO_GPUS),
        (" ", NO_GPUS),
        ("0=24GiB,,1=24GiB", NO_GPUS),
        ("0=24GiB,", NO_GPUS),
        ("0=", "must be a size such as 14GiB, 512MiB or 2GB (a bare number is bytes)"),
        ("0=b", "must be a size such as 14GiB, 512MiB or 2GB (a bare number is bytes)"),
        ("0=24GiB=1", "must be a size such as 14GiB, 512MiB or 2GB (a bare number is bytes)"),
        ("0=-24GiB", "must be at least 1 byte and at most 1024TiB"),
    ],
)
def test_gpus_that_are_none_are_told_in_words(written: str, rule: str) -> None:
    assert complaints({"GATEWAY_GPUS": written}) == [f"GATEWAY_GPUS: {rule}"]


def test_all_complaints_at_once() -> None:
    environ = {
        "GATEWAY_HOST": "a b",
        "GATEWAY_PORT": "65536",
        "GATEWAY_NAME": "-",
        "GATEWAY_ON_EXIT": "leave",
        "GATEWAY_ALLOW_INSECURE": "perhaps",
        "GATEWAY_MAX_BODY": "big",
        "GATEWAY_MAX_WAITING": "0",
        "GATEWAY_GPUS": "0=24GiB,0=1GiB",
        "GATEWAY_CORS_ORIGINS": "example.org",
        "GATEWAY_LOG_FORMAT": "xml",
        "GATEWAY_ROOT_PATH": "llm",
        "GATEWAY_DEVICE": "tpu",
    }
    assert complaints(environ) == [
        "GATEWAY_HOST: must be a host name or an address such as 127.0.0.1 or ::1",
        "GATEWAY_PORT: must be at most 65535",
        "GATEWAY_NAME: must be 1 to 63 letters, digits, `.`, `_` and `-`, and begin with a letter or digit",
        "GATEWAY_ON_EXIT: must be 'keep' or 'stop'",
        "GATEWAY_ALLOW_INSECURE: must be true or false",
        "GATEWAY_MAX_BODY: must be a size such as 14GiB, 512MiB or 2GB (a bare number is bytes)",
        "GATEWAY_MAX_WAITING: must be at least 1",
        f"GATEWAY_GPUS: {NO_GPUS}",
        "GATEWAY_CORS_ORIGINS: must be origins such as https://chat.example.org, separated by commas, or *",
        "GATEWAY_LOG_FORMAT: must be 'text' or 'json'",
        "GATEWAY_ROOT_PATH: must be a path such as /llm",
        "GATEWAY_DEVICE: must be 'auto', 'cpu' or 'cuda'",
    ]


@pytest.mark.parametrize(
    ("written", "rule"),
    [("-1", "must be at least 0"), ("80.5", "must be a whole number"), ("http", "must be a whole number")],
)
def test_port(written: str, rule: str) -> None:
    assert complaints({"GATEWAY_PORT": written}) == [f"GATEWAY_PORT: {rule}"]


def test_unknown_variables() -> None:
    environ = {
        "GATEWAY_PROT": "1",
        "GATEWAY_ZZZ": "1",
        "GATEWAY_PORT": "1",
        "GATEWAY_URL": "1",
        "GATEWAY_API_KEY": "1",
        "HF_TOKEN": "1",
        "OTHER": "1",
    }
    assert unknown_variables(environ) == [
        "GATEWAY_PROT: nothing reads this variable; did you mean GATEWAY_PORT?",
        "GATEWAY_ZZZ: nothing reads this variable",
    ]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_exposure(load_settings({"GATEWAY_HOST": host}), {})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gateway.example.org", "localhost.example.org"])
def test_other_machines_are_refused_without_keys(host: str) -> None:
    assert exposure({"GATEWAY_HOST": host}) == [f"GATEWAY_HOST: {host} {EXPOSED}"]


def test_other_machines_are_served_where_that_is_wanted() -> None:
    check_exposure(load_settings({"GATEWAY_HOST": "0.0.0.0", "GATEWAY_ALLOW_INSECURE": "true"}), {})


def test_a_clients_key_protects_nothing() -> None:
    environ = {"GATEWAY_API_KEY": SECRET, "GATEWAY_ALLOW_INSECURE": "true"}

    assert exposure(environ) == [f"GATEWAY_API_KEY: {LOOKS_PROTECTED}"]


def test_both_at_once() -> None:
    lines = exposure({"GATEWAY_API_KEY": SECRET, "GATEWAY_HOST": "0.0.0.0"})

    assert [line.partition(":")[0] for line in lines] == ["GATEWAY_API_KEY", "GATEWAY_HOST"]


def test_with_keys_other_machines_are_served(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    add_key(file, "alice", ["generate"])
    environ = {"GATEWAY_API_KEYS_FILE": str(file), "GATEWAY_HOST": "0.0.0.0", "GATEWAY_API_KEY": SECRET}

    check_exposure(load_settings(environ), environ)


def test_a_keys_file_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    assert "there is no such file" in exposure({"GATEWAY_API_KEYS_FILE": str(file)})[0]

    file.write_text("key\n[]\n")
    assert exposure({"GATEWAY_API_KEYS_FILE": str(file)}) == [
        f"GATEWAY_API_KEYS_FILE: {file}:1: must be one JSON object, in UTF-8",
        f"GATEWAY_API_KEYS_FILE: {file}:2: must be one JSON object",
    ]


NAMES = st.sampled_from([f"GATEWAY_{name.upper()}" for name in Settings.model_fields] + ["GATEWAY_MAX_BODY"])


@given(environ=st.dictionaries(NAMES, st.text(max_size=8) | st.sampled_from(["1e999", "9" * 5000, "0=1,1", "nan"])))
def test_any_environment_loads_or_is_complained_of(environ: dict[str, str]) -> None:
    try:
        load_settings(environ)
    except CatalogError as error:
        complaints = error.complaints
    else:
        return
    assert all(line.startswith("GATEWAY_") for line in complaints)
