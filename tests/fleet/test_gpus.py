"""Which model gets which GPU: tables."""

from __future__ import annotations

import pytest

from gateway.catalog import ModelSpec
from gateway.errors import NoCapacity, StartFailed
from gateway.fleet.gpus import Gpus


def model(name: str, gpus: int | list[str]) -> ModelSpec:
    return ModelSpec.model_validate({"id": name, "hf_name": name, "gpus": gpus})


def test_a_count_gets_the_first_free_ones_and_names_get_what_they_name() -> None:
    gpus = Gpus(["0", "1", "2", "3"])

    assert gpus.take(model("b", ["1"])) == ("1",)
    assert gpus.take(model("a", 2)) == ("0", "2")
    assert gpus.take(model("none", 0)) == ()


def test_what_a_model_has_it_keeps_until_it_is_given_back() -> None:
    gpus = Gpus(["0", "1"])

    assert gpus.take(model("a", 1)) == gpus.take(model("a", 1)) == ("0",)
    gpus.give_back("a")
    assert gpus.take(model("b", 1)) == ("0",)


@pytest.mark.parametrize("wanted", [2, ["0"], ["1", "0"]])
def test_no_gpu_is_given_twice_and_the_refusal_names_the_holder(wanted: int | list[str]) -> None:
    gpus = Gpus(["0", "1"])
    gpus.take(model("a", ["0"]))

    with pytest.raises(NoCapacity, match="GPU 0 is used by a") as refusal:
        gpus.take(model("b", wanted))

    assert refusal.value.retry_after_s
    assert gpus.take(model("c", 1)) == ("1",), "a refused model holds nothing"


def test_without_an_inventory_ids_are_counted_up() -> None:
    gpus = Gpus(None)

    assert gpus.take(model("a", 2)) == ("0", "1")
    assert gpus.take(model("b", 1)) == ("2",)


def test_the_gpus_of_a_server_that_was_found_are_its_own() -> None:
    gpus = Gpus(["0", "1"])
    gpus.claim("a", ("0",))

    assert gpus.take(model("a", 1)) == ("0",)
    assert gpus.take(model("b", 1)) == ("1",)


def test_a_model_may_name_a_gpu_that_the_inventory_lacks() -> None:
    assert Gpus(["0"]).take(model("a", ["GPU-3f2a"])) == ("GPU-3f2a",)


def test_a_gpu_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(StartFailed, match="GPU 7, which is not there: there are 0, 1"):
        Gpus(["0", "1"]).take(model("a", ["0", "7"]))

    assert Gpus(None).take(model("a", ["7"])) == ("7",)
