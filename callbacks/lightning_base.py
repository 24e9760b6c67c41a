"""What a callback is, in Lightning's two packages: `pytorch_lightning` and `lightning.pytorch`."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or "lightning.pytorch" not in sys.modules:
    from pytorch_lightning import Callback
else:
    import lightning.pytorch
    import pytorch_lightning

    class Callback(pytorch_lightning.Callback, lightning.pytorch.Callback):
        """One for both: each package's LightningCLI takes a `class_path` of its own kind alone."""


__all__ = ["Callback"]
