"""What Lightning's strategies that shard a model do in another order than the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def restore_rows_first(
    strategy: Any, state_key: str, restore: Callable[[Mapping[str, Any]], None]
) -> None:
    """Let a callback go on where it stood before a strategy loads optimizers, the next time.

    A strategy that loads a checkpoint once the model is sharded loads the optimizers with it, and
    Lightning restores callbacks after that; but an optimizer's state belongs to the rows of then.

    Args:
        strategy: The strategy, whose method is replaced for one call.
        state_key: The callback's key in a checkpoint.
        restore: Called with what is kept there, if anything.
    """
    load = strategy.load_checkpoint

    def load_checkpoint(checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        vars(strategy).pop("load_checkpoint", None)
        path = Path(strategy.broadcast(checkpoint_path))
        kept = _kept_beside_weights(path, weights_only).get("callbacks", {})
        if state_key in kept:
            restore(kept[state_key])
        return load(checkpoint_path, weights_only=weights_only)

    strategy.load_checkpoint = load_checkpoint


def _kept_beside_weights(path: Path, weights_only: bool | None) -> Mapping[str, Any]:
    """A checkpoint's entries; of one that is a folder, those that are no weights."""
    file = path / "meta.pt" if path.is_dir() else path
    entries: Mapping[str, Any] = torch.load(
        file, map_location="cpu", mmap=True, weights_only=weights_only
    )
    return entries
