"""The folder of a run, which no other run has."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.loggers import TensorBoardLogger

from partial_embedding.files import claim_version


class RunLogger(TensorBoardLogger):
    """Logs into a folder of its own, and opens its file with the first numbers.

    Lightning's own looks for the highest `version_N` and takes the next, so that runs which start
    together take the same one; and it opens its file before the data are accepted.

    Args:
        root: The folder that holds the runs.
        folder: The folder of a run that goes on; None begins a new one.
    """

    def __init__(self, root: str, folder: Path | None = None) -> None:
        version = None if folder is None else folder.name
        super().__init__(folder.parent if folder else root, name="", version=version)
        self._begun = False

    @property
    def version(self) -> int | str:
        """The name of the run's folder, made when it is first asked for."""
        if self._version is None:
            # Other processes are told the folder by the first.
            own = rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning sets it
            self._version = claim_version(self.root_dir) if own else super().version
        return self._version

    @property
    def experiment(self) -> Any:
        """The writer, or nothing before there is something to write; Lightning asks early."""
        return super().experiment if self._begun else None

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write numbers."""
        self._begun = True
        super().log_metrics(metrics, step)

    def save(self) -> None:
        """Flush what was written."""
        if self._begun:
            super().save()

    def leave_nothing_empty(self) -> None:
        """Remove the folder when nothing was written into it: the run was refused."""
        if self._version is not None:
            folder = Path(self.log_dir)
            with contextlib.suppress(OSError):  # it holds something, or was never made
                folder.rmdir()
                folder.parent.rmdir()
