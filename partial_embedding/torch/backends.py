"""Which gradients processes that train together can exchange."""

from __future__ import annotations

from collections.abc import Mapping

from torch import distributed as dist

from partial_embedding.errors import InputError
from partial_embedding.torch.head import PartialLinear
from partial_embedding.torch.table import PartialTable


def check_backend(tables: Mapping[str, PartialTable]) -> None:
    """Refuse a process group that cannot reduce the gradients of tables.

    Args:
        tables: Tables by name; of those that are tied, one.

    Raises:
        InputError: A table is sparse and the group is NCCL's, or it is a head that is tied to no
            embedding.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    for name, table in tables.items():
        if not getattr(table, "sparse", False):
            continue
        if dist.get_backend() == "nccl":
            raise InputError(
                "NCCL cannot reduce sparse gradients. Received the sparse table "
                f"{name!r}. Make it with sparse=False."
            )
        if isinstance(table, PartialLinear):
            raise InputError(
                "DistributedDataParallel takes sparse gradients of embeddings alone. Received "
                f"the sparse head {name!r}, which is tied to none. Make it with sparse=False."
            )
