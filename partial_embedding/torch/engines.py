"""Engines that put something else in the place of a table's weight, and are refused by name.

They are known by what they leave on modules and parameters, since none of them is imported here.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from partial_embedding.errors import InputError

_LEAVE_OUT = (
    "Take fully_shard; or leave the table out: FullyShardedDataParallel(model, "
    "ignored_states=keep_whole(model))."
)


def refuse_flat(weight: Tensor, table: nn.Module) -> None:
    """Refuse a part of a long vector in the place of a matrix, as FSDP1 puts it there."""
    if weight.dim() == 1:
        raise InputError(
            "the rows of a table are those of a matrix. Received a vector of "
            f"{weight.numel():,} numbers as the weight of a {type(table).__name__}, as FSDP1 "
            f"flattens it. {_LEAVE_OUT}"
        )


def is_flattened(table: nn.Module) -> bool:
    """Whether FSDP1 has made the weight of a table a part of a long vector."""
    weight = table._parameters.get("weight")
    is_managed = bool(vars(table).get("_is_fsdp_managed_module"))
    return is_managed and (weight is None or weight.dim() == 1)


def lost_weight(table: nn.Module) -> InputError:
    """What to say of a table without any weight."""
    if is_flattened(table):
        return InputError(
            f"the weight of a table is a parameter. Received a {type(table).__name__} whose weight "
            f"FSDP1 has made a part of a long vector. {_LEAVE_OUT}"
        )
    return InputError(
        "the weight of a table is one parameter, or computed from one with the same rows. "
        f"Received a {type(table).__name__} whose weight is split, as weight_norm does it. "
        "Leave the table out of it."
    )


def is_zero(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed's ZeRO steps a flat copy of a parameter, in which all rows decay."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def frozen_under_zero(parameter: nn.Parameter, table: nn.Module) -> InputError:
    """What to say of frozen rows there."""
    if hasattr(parameter, "ds_id"):
        return InputError(
            "ZeRO-3 parts all parameters of a model among processes, and leaves none out. Received "
            f"a {type(table).__name__} with frozen rows in it. Use ZeRO-1 or ZeRO-2 with the "
            "tables in an optimizer of their own, or fully_shard."
        )
    return InputError(
        "DeepSpeed's ZeRO steps flat copies of parameters, without hooks. Received a "
        f"{type(table).__name__} with frozen rows among them. Take its weight out of "
        "model_parameters and step it by an optimizer of its own: whole = keep_whole(model); "
        "AdamW(whole)."
    )


def refuse_zero_redundancy(optimizer: Optimizer) -> None:
    """Refuse torch's optimizer that steps other parameters in each process."""
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
        raise InputError(
            "tables are stepped alike in each process. Received ZeroRedundancyOptimizer, which "
            "steps some parameters in each and sends them whole. Give it the others, and the "
            "tables an optimizer of their own: whole = keep_whole(model); AdamW(whole)."
        )
