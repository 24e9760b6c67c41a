"""Which Keras optimizers `rowwise` serves, and how they are made anew."""

from __future__ import annotations

from inspect import signature
from typing import Any

import keras

from partial_embedding.errors import InputError, check_flags

# They move each element by itself, with no state but one value per element and a count of steps.
SERVED = (
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Ftrl",
    "Lion",
    "RMSprop",
    "SGD",
    "ScheduleFreeAdamW",
)
# What a Keras optimizer does around the maths of a step.
PIPELINE = (
    "name",
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
)


def settings_of(optimizer: Any) -> dict[str, Any]:
    """The constructor's arguments of a Keras optimizer, without its learning rate.

    Keras writes them in `get_config`, which fails for rates that are functions or unknown to it.
    """
    known = set(signature(type(optimizer).__init__).parameters) & set(vars(optimizer))
    return {name: getattr(optimizer, name) for name in known | set(PIPELINE)}


def check_served(optimizer: Any, lazy: bool) -> None:
    """Refuse an optimizer that cannot begin afresh for some rows, or step touched ones only."""
    check_flags(lazy=lazy)
    name = type(optimizer).__name__
    if type(optimizer) is not getattr(keras.optimizers, name, None) or name not in SERVED:
        raise InputError(
            f"rowwise serves {', '.join(SERVED)}, which move each row by itself. Received: {name}."
            " Compile with it as it is: frozen rows keep their bits all the same."
        )
    if optimizer.built:
        raise InputError(
            "rowwise wraps an optimizer before its first step. Received one that is built. Make a "
            "new one."
        )
    if optimizer.use_ema and optimizer.gradient_accumulation_steps:
        raise InputError(
            "an average of rows that join between two steps has no beginning. Received use_ema "
            "with gradient_accumulation_steps. Use one of the two."
        )
    if lazy and name == "ScheduleFreeAdamW":
        raise InputError(
            "lazy=True lets a row stand still. Received ScheduleFreeAdamW, which averages each row "
            "over every step. Leave lazy=False."
        )
    needs_all = ("use_ema", "gradient_accumulation_steps", "loss_scale_factor")
    if lazy and (given := [key for key in needs_all if getattr(optimizer, key)]):
        raise InputError(
            f"lazy=True steps touched rows only. Received {given[0]}, which needs every row. Leave "
            "it out; for half precision, put a LossScaleOptimizer around."
        )
