"""What an output was made with: a field added later does not change the fingerprint of what was made before it."""

import json
from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta

from shards import ConfigError
from shards.fingerprint import differences, fingerprint, identity, neutral


class Released(msgspec.Struct, frozen=True, kw_only=True):
    lr: float = 0.1
    ramp: tuple[int, ...] = (1, 2)
    workers: Annotated[int, Meta(extra={"identity": False})] = 0


class Later(Released, frozen=True, kw_only=True):
    """The same table in a later version, where each field has another default than what was done before."""

    residual: Annotated[Literal["fp32", "bf16"], Meta(extra={"neutral": "fp32"})] = "bf16"
    cap: Annotated[Annotated[float, Meta(ge=0)] | None, Meta(extra={"neutral": None})] = 15.0
    stages: Annotated[tuple[int, ...], Meta(extra={"neutral": ()})] = (3,)
    rates: Annotated[dict[str, float], Meta(extra={"neutral": {}})] = {}
    device: Annotated[str, Meta(extra={"identity": False})] = "auto"


NEUTRAL: dict[str, Any] = {"residual": "fp32", "cap": None, "stages": (), "rates": {}}


def test_a_field_at_its_neutral_value_is_left_out() -> None:
    assert neutral(Later) == NEUTRAL and neutral(Released) == {}
    assert identity(Later(**NEUTRAL, device="cpu")) == identity(Released()) == {"lr": 0.1, "ramp": (1, 2)}


@pytest.mark.parametrize("change", [{"residual": "bf16"}, {"cap": 0.0}, {"stages": (0,)}, {"rates": {"a": 1.0}}])
def test_another_value_is_part_of_it(change: dict[str, Any]) -> None:
    assert identity(Later(**NEUTRAL | change)) == identity(Released()) | change


def test_differences_name_their_fields() -> None:
    before = {"model": {"n_layer": 12, "d_model": 8}, "token_folder": "a"}
    now = {"model": {"n_layer": 3, "d_model": 8}, "token_folder": "b"}
    found = differences(before, now)
    assert [tuple(each) for each in found] == [("model.n_layer", 12, 3), ("token_folder", "a", "b")]
    assert [str(each) for each in found] == ["  model.n_layer: 12 -> 3", "  token_folder: a -> b"]


def test_a_field_that_is_left_out_has_its_neutral_value() -> None:
    before, now = {"train": identity(Released())}, {"train": identity(Later(**NEUTRAL | {"residual": "bf16"}))}
    absent = {"train": neutral(Later)}
    assert [tuple(each) for each in differences(before, now, absent)] == [("train.residual", "fp32", "bf16")]
    assert [tuple(each) for each in differences(now, before, absent)] == [("train.residual", "bf16", "fp32")]


def test_what_was_written_and_read_again_does_not_differ() -> None:
    before = json.loads(json.dumps({"train": identity(Later())}))
    assert differences(before, {"train": identity(Later())}) == []
    assert differences(before, {"train": identity(Later(ramp=(2, 1)))}) == [("train.ramp", [1, 2], (2, 1))]


def test_fingerprints() -> None:
    assert fingerprint({"a": 1, "b": [1.5, "x"]}) == fingerprint({"b": [1.5, "x"], "a": 1})
    assert fingerprint({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    for bad in ([float("nan")], (1.0, float("inf"))):
        with pytest.raises(ConfigError, match="a number of the recipe is non-finite: "):
            fingerprint({"a": bad})
