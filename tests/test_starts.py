"""What stages wait for, places and plateaus, and the rate_scale of the rows that then join."""

import copy
import math
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_embedding import Position
from partial_embedding.schedule import Evaluation, Plateau, RateScale, Start
from partial_embedding.schedule.starts import Wait

VALUES = st.lists(
    st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.25, 2.0, 3.0, math.nan, math.inf, -math.inf]),
    max_size=14,
)
PLATEAUS = st.builds(
    Plateau,
    st.just("loss"),
    st.sampled_from(["min", "max"]),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.25, 1.0]),
    st.none() | st.integers(1, 9),
)


def seen(values: list[Any], name: str = "loss") -> list[Evaluation]:
    return [Evaluation(i, 10 * i + 10, {name: value}) for i, value in enumerate(values)]


def is_reached(plateau: Plateau, evaluations: list[Evaluation]) -> bool:
    wait = Wait(plateau)
    return any([wait.is_over(one) for one in evaluations][-1:])


def has_ended(plateau: Plateau, values: list[float]) -> bool:
    """The docstring in other words: how long ago was the last improvement?"""
    sign = 1 if plateau.mode == "min" else -1
    improvements = [-1]
    for i, value in enumerate(values):
        best = values[improvements[-1]] if len(improvements) > 1 else None
        better = best is None or sign * value < sign * best - plateau.min_delta
        if not math.isnan(value) and better:
            improvements.append(i)
    waited = len(values) - 1 - improvements[-1]
    return waited >= plateau.patience or len(values) >= (plateau.max_wait or math.inf)


@settings(max_examples=150, deadline=None)
@given(PLATEAUS, VALUES)
def test_a_plateau_is_so_many_values_without_improvement(
    plateau: Plateau, values: list[float]
) -> None:
    for number in range(len(values) + 1):
        expected = has_ended(plateau, values[:number])
        assert is_reached(plateau, seen(values[:number])) == expected


# What that oracle says in cases which can be read.
REACHED: dict[str, tuple[dict[str, Any], list[float], int | None]] = {
    "improving": ({}, [5, 4, 3, 2], None),
    "patience": ({"patience": 3}, [5, 5, 6, 4, 4, 5, 4], 7),
    "higher_is_better": ({"mode": "max"}, [5, 6, 7, 6], 4),
    "small_changes_that_add_up": ({"min_delta": 1.0, "patience": 2}, [5, 4.5, 3.9, 3.5], None),
    "waited_long_enough": ({"max_wait": 3}, [5, 4, 3, 2], 3),
    "not_a_number_at_first": ({"patience": 2}, [math.nan, 5, 4, 4, 4], 5),
}


@pytest.mark.parametrize(("arguments", "values", "number"), REACHED.values(), ids=REACHED)
def test_a_plateau_is_reached_with_a_certain_value(
    arguments: dict[str, Any], values: list[float], number: int | None
) -> None:
    plateau = Plateau("loss", **arguments)
    reached = [n for n in range(len(values) + 1) if is_reached(plateau, seen(values[:n]))]
    assert reached[:1] == ([] if number is None else [number])


def test_validations_without_the_metric_do_not_count() -> None:
    mixed = [*seen([5]), *seen([1, 1, 1], "accuracy"), *seen([4, 4])]
    plateau = Plateau("loss", max_wait=9)
    assert [is_reached(plateau, mixed[:n]) for n in range(7)] == [False] * 6 + [True]


# Values


@settings(max_examples=30, deadline=None)
@given(PLATEAUS)
def test_plateaus_are_values_and_round_trip_through_yaml(plateau: Plateau) -> None:
    config = yaml.safe_load(yaml.safe_dump(plateau.to_config()))
    again = Plateau.parse(config["plateau"])
    assert again == plateau
    assert len({plateau, again, copy.deepcopy(plateau), pickle.loads(pickle.dumps(plateau))}) == 1
    assert Plateau.parse(plateau) is plateau
    with pytest.raises(AttributeError):
        plateau.patience = 7  # type: ignore[misc]


def test_a_plateau_may_be_named_by_its_metric_alone() -> None:
    assert Plateau.parse("loss") == Plateau.parse({"monitor": "loss"}) == Plateau("loss")


NUMPY_VALUES: dict[str, dict[str, Any]] = {
    "share": Start("share", np.float64(0.25)).to_config(),
    "lr_scale": RateScale(np.float64(0.25)).to_config(),
    "min_delta": Plateau("loss", min_delta=np.float64(0.5)).to_config(),
}


@pytest.mark.parametrize("config", NUMPY_VALUES.values(), ids=NUMPY_VALUES)
def test_numbers_of_numpy_are_written_as_plain_ones(config: dict[str, Any]) -> None:
    assert yaml.safe_load(yaml.safe_dump(config)) == config


MALFORMED: dict[str, tuple[Any, str]] = {
    "unit": (lambda: Start("batch", 3), "'batch'"),
    "negative_epoch": (lambda: Start("epoch", -1), "-1"),
    "fractional_step": (lambda: Start("step", 10.0), "10.0"),
    "step_true": (lambda: Start("step", True), "True"),
    "negative_share": (lambda: Start("share", -0.1), "-0.1"),
    "share_of_the_whole_run": (lambda: Start("share", 1.0), "1.0"),
    "share_that_is_no_number": (lambda: Start("share", math.nan), "nan"),
    "plateau_of_nothing": (lambda: Plateau.parse(None), "None"),
    "plateau_without_metric": (lambda: Plateau.parse({"patience": 2}), "{'patience': 2}"),
    "plateau_unknown_key": (lambda: Plateau.parse({"monitor": "a", "delta": 2}), "'delta': 2"),
    "metric_empty": (lambda: Plateau.parse(""), "''"),
    "mode": (lambda: Plateau("loss", mode="auto"), "'auto'"),
    "no_patience": (lambda: Plateau("loss", patience=0), "0"),
    "patience_null": (lambda: Plateau("loss", patience=None), "None"),  # type: ignore[arg-type]
    "no_wait": (lambda: Plateau("loss", max_wait=0), "0"),
    "negative_change": (lambda: Plateau("loss", min_delta=-0.1), "-0.1"),
    "endless_change": (lambda: Plateau("loss", min_delta=math.inf), "inf"),
    "no_rate": (lambda: RateScale(lr_scale=0), "0"),
    "negative_rate": (lambda: RateScale(lr_scale=-1.0), "-1.0"),
    "rate_that_is_no_number": (lambda: RateScale(lr_scale=math.nan), "nan"),
    "rate_true": (lambda: RateScale(lr_scale=True), "True"),
    "negative_warmup": (lambda: RateScale(warmup_steps=-1), "-1"),
    "fractional_warmup": (lambda: RateScale(warmup_steps=0.1), "0.1"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("make", "received"), MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_start_or_rate_is_refused_with_what_was_received(
    make: Any, received: str, refused: Any
) -> None:
    refused(make, parts=[received])


# RateScale


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-6, 1e3), st.integers(0, 50))
def test_warmup_rises_in_equal_parts_to_the_full_rate(lr: float, warmup: int) -> None:
    rate_scale = RateScale(lr, warmup)
    factors = [rate_scale.factor(step) for step in range(warmup + 20)]
    assert factors[max(warmup - 1, 0) :] == [lr] * (len(factors) - max(warmup - 1, 0))
    for step, factor in enumerate(factors[:warmup]):
        assert factor == pytest.approx(float(Fraction(lr) * Fraction(step + 1, warmup)))
    assert factors == sorted(factors)


def test_only_the_rate_that_changes_nothing_is_plain() -> None:
    assert RateScale().is_plain
    assert RateScale(lr_scale=1, warmup_steps=0).is_plain
    assert RateScale(lr_scale=1).to_config() == {}
    for rate_scale in (RateScale(lr_scale=0.5), RateScale(warmup_steps=1), RateScale(2.0, 3)):
        assert not rate_scale.is_plain
        assert RateScale(**rate_scale.to_config()) == rate_scale
    assert {RateScale(lr_scale=2), RateScale(lr_scale=2.0)} == {RateScale(lr_scale=2)}


# Positions


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(0, 10**9),
    st.none() | st.integers(1, 10**9),
    st.lists(
        st.tuples(
            st.integers(0, 9),
            st.integers(0, 99),
            st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False)),
        ),
        max_size=5,
    ),
)
def test_positions_survive_a_checkpoint(epoch: int, step: int, total: Any, values: Any) -> None:
    position = Position(epoch, step, total, tuple(Evaluation(*one) for one in values))
    state = position.to_state()
    plain = yaml.safe_load(yaml.safe_dump(state))  # nothing but what every format can hold
    assert Position.from_state(plain) == position
    assert Position.from_state({"epoch": epoch, "step": step}) == Position(epoch, step)
    assert position.share == (None if total is None else step / total)
    for _, _, metrics in values:
        metrics["later"] = 1.0
    assert all("later" not in metrics for _, _, metrics in state["evaluations"])
