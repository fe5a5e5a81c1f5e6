"""One healthy double for all tests that only ask it things."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.tgi_double.process import Double


@pytest.fixture(scope="package")
def double() -> Iterator[Double]:
    with Double("--model-id", "org/toy", "--max-top-n-tokens", "50", "--max-total-tokens", "4096") as running:
        yield running


@pytest.fixture
def client(double: Double) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=double.url, timeout=20) as asking:
        yield asking
