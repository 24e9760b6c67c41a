"""Lightning's bar, short enough for one line of a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn


class OneLineBar(RichProgressBar):
    """Shows the epoch, the batch, the time that is left, what validation measured and the stage."""

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """The columns before the metrics."""
        return [
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
        ]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What was measured; of texts, such as that of a stage, the part before a colon."""
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)  # the folder is said at the end
        return {k: v.partition(":")[0] if isinstance(v, str) else v for k, v in shown.items()}
