"""Rows that are to train while nothing steps them: said at an optimizer's step, not never.

An optimizer knows its parameters, and no parameter knows its model. So this looks for a model that
has both a table and what the optimizer steps, and for another optimizer that holds the table; once
for each optimizer and set of rows.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping, Set
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch.optim import Optimizer

from partial_embedding.errors import InputError
from partial_embedding.torch.engines import is_flattened
from partial_embedding.torch.table import tables_of
from partial_embedding.torch.trainable_rows import TrainableRows, used_frozen, waiting

_warned: WeakSet[TrainableRows] = WeakSet()


def refuse_unheld(optimizer: Optimizer) -> None:
    """Refuse to step a model with a table whose rows are to train, and that no optimizer holds.

    Where the weight takes gradients, its owner may mean to train it later, or never: that is a
    warning, once for each table. Where it is refused nothing has moved.
    """
    if not waiting:
        return
    own = _held_by(optimizer)
    judged: WeakKeyDictionary[TrainableRows, object] = vars(optimizer).setdefault(
        "_judged_tables", WeakKeyDictionary()
    )
    # What FSDP1 has flattened is refused where it is used, and not by other optimizers.
    standing = [t for t in waiting if t.find_leaf_weight() is not None and not is_flattened(t)]
    for table in standing:
        if id(table.leaf_weight) in own or table.steppers:
            waiting.discard(table)  # by this optimizer, or by one that has prepared itself
    suspects = [t for t in standing if t in waiting and _is_to_train(t) and t not in _warned]
    unheld = [t for t in suspects if judged.get(t) is not t._row_set]
    if not unheld:
        return
    # To look through the whole process takes a tenth of a second, so this comes last.
    judged.update({table: table._row_set for table in unheld})
    optimizers, modules = _living()
    held = {key for other in optimizers for key in _held_by(other)}
    owners: dict[int, list[nn.Module]] = {}
    for module in modules:
        for child in vars(module).get("_modules", {}).values():
            owners.setdefault(id(child), []).append(module)
    for table in unheld:
        if id(table.leaf_weight) in held:
            waiting.discard(table)
            continue
        if (name := _name_beside(table, own, owners)) is None:
            continue
        told = (
            f"rows that are to train belong to an optimizer. Received {name!r} with "
            f"{len(table.row_set):,} such rows, which none holds, while {type(optimizer).__name__} "
            f"steps {'the rest of the model' if own else 'nothing'}. {{remedy}}; or, while they "
            'are not to train, call set_trainable_rows("none").'
        )
        if table.leaf_weight.requires_grad:
            remedy = "Make the optimizer of the model's parameters()"
            _warned.add(table)
            warnings.warn(told.format(remedy=remedy), stacklevel=2)
            continue
        del judged[table]
        remedy = "Call requires_grad_(True) on its weight, then make the optimizer"
        raise InputError(told.format(remedy=remedy))


def refuse_what_cannot_train(table: TrainableRows, name: str) -> None:
    """Refuse a table whose rows are to train while its weight gets no gradient."""
    if table.leaf_weight.requires_grad or not table.has_frozen_rows or not len(table.row_set):
        return
    if table.is_copy:
        return  # a teacher, which is not to train
    raise InputError(
        f"rows train whose weight requires gradients. Received {name!r}, of which "
        f"{len(table.row_set):,} rows are to train, with requires_grad=False: from_pretrained("
        "freeze=True), requires_grad_(False), module.freeze() and PEFT set it. Call "
        "weight.requires_grad_(True) after that; or, for a table that is never to train, "
        'set_trainable_rows("none").'
    )


def refuse_lost(
    optimizer: Optimizer, table: TrainableRows, parameter: nn.Parameter, name: str
) -> None:
    """Refuse rows that were set to train, and that a prepared optimizer moves no more."""
    if any(tables_of(parameter)):
        refuse_what_cannot_train(table, name)
        return
    own = getattr(table, "leaf_weight", None)  # none of a table that is plain again
    if id(own) in _held_by(optimizer):
        return  # tied since to another table
    raise InputError(
        "a prepared optimizer steps the weights that its tables have. Received "
        f"{type(optimizer).__name__} with one that {name!r} no longer has, since another was put "
        "in its place (an assignment, load_state_dict(assign=True)), or the table is a plain one "
        "now. Make the optimizer after that; or, for a table that is plain, call "
        "detach_rowwise(optimizer)."
    )


def _is_to_train(table: TrainableRows) -> bool:
    """Whether a table has taken part in training, and rows of it are to learn."""
    has_gradient = bool(vars(table).get("awaits_average"))  # of this pass or one before
    used = has_gradient if table.leaf_weight.requires_grad else table in used_frozen
    return used and not table.is_copy and table.has_frozen_rows and len(table.row_set) > 0


def _held_by(optimizer: Optimizer) -> set[int]:
    # One that is still being made has no groups.
    groups = vars(optimizer).get("param_groups", ())
    return {id(p) for group in groups for p in group["params"]}


def _living() -> tuple[list[Optimizer], list[nn.Module]]:
    """All optimizers and modules of the process, of some 500,000 objects."""
    found: tuple[list[Optimizer], list[nn.Module]] = [], []
    # By its type, which is asked once: an object may answer `isinstance` with loading a package.
    places: dict[type, list[Any] | None] = {}
    for one in gc.get_objects():
        kind = type(one)
        if kind not in places:
            fitting = (issubclass(kind, Optimizer), issubclass(kind, nn.Module))
            places[kind] = next((found[i] for i, fits in enumerate(fitting) if fits), None)
        if (place := places[kind]) is not None:
            place.append(one)
    return found


def _name_beside(
    table: TrainableRows, parameters: Set[int], owners: Mapping[int, list[nn.Module]]
) -> str | None:
    """The name of a table in the model that it has in common with parameters, if there is one.

    Where there are no parameters, everything in the model was frozen.

    What is in eval() within a model that is not, such as a copy for reference, is none of it.
    """
    models: list[nn.Module] = [table]
    for module in models:  # it grows as it goes, up to the whole model
        models += [o for o in owners.get(id(module), ()) if not any(o is m for m in models)]
    for model in reversed(models[1:]):
        if model.training and not table.training:
            continue
        if not parameters or any(id(parameter) in parameters for parameter in model.parameters()):
            # Of those that are tied, the first.
            named = {name: m._parameters.get("weight") for name, m in model.named_modules()}
            return next((n for n, weight in named.items() if weight is table.leaf_weight), "")
    return None
