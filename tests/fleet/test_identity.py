"""When a running server is still what the catalog asks for, and when it is not."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.catalog import ModelSpec
from gateway.engines.tgi import Tgi
from gateway.fleet.identity import fingerprint, launch_of

MODEL: dict[str, Any] = {"id": "m", "hf_name": "org/model", "gpus": 1}


def of(**keys: Any) -> str:
    return fingerprint(Tgi(None), ModelSpec.model_validate({**MODEL, **keys}))


@pytest.mark.parametrize(
    "keys",
    [
        {"idle_timeout": 7},
        {"start_timeout": 7, "health_failures": 9, "drain_timeout": 1},
        {"aliases": ["other"], "name": "Other", "metadata": {"step": 1}},
        {"parameters": {"temperature": 1.0}},
        {"pull_policy": "always", "preload": True, "pinned": True},
        {"max_queue": 1},
    ],
)
def test_the_gateways_own_affairs_do_not_change_it(keys: dict[str, Any]) -> None:
    assert of(**keys) == of()


@pytest.mark.parametrize(
    "keys",
    [
        {"hf_name": "org/other"},
        {"revision": "v2"},
        {"image": "tgi:2"},
        {"args": {"max-input-tokens": 512}},
        {"env": {"LOG_LEVEL": "debug"}},
        {"volumes": ["/models:/data"]},
        {"gpus": 2},
        {"gpus": ["1"]},
        {"gpus": ["0"]},
        {"memory": 2**30},
        {"shm_size": 2**20},
        {"context_tokens": 100},
    ],
)
def test_what_makes_another_server_changes_it(keys: dict[str, Any]) -> None:
    assert of(**keys) != of()


def test_a_new_token_or_key_does_not_change_it() -> None:
    spec = ModelSpec.model_validate(MODEL)

    assert fingerprint(Tgi("hf_one"), spec) == fingerprint(Tgi("hf_two"), spec)
    assert launch_of(Tgi("hf_one"), spec, "secret").fingerprint == fingerprint(Tgi("hf_one"), spec)
