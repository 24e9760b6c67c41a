"""What a run leaves in its folder: the log, and checkpoints that are whole and can be found."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.loggers import TensorBoardLogger

from partial_embedding.errors import InputError
from partial_embedding.files import claim_version, shown, write_atomically

# The key by which Lightning knows its own checkpoints.
_WRITTEN_BY = "pytorch-lightning_version"


class RunLogger(TensorBoardLogger):
    """Logs into a folder of its own, and opens its file with the first numbers.

    Lightning's own looks for the highest `version_N` and takes the next, so that runs which start
    together take the same one; and it opens its file before the data are accepted. A run that goes
    on has its folder already.
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


def read_checkpoint(path: Path, to_go_on: bool) -> dict[str, Any]:
    """Read what Lightning wrote, and refuse what it would meet with a traceback.

    Raises:
        InputError: It is damaged, of something else, or of weights alone, from which training
            cannot go on.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except PermissionError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        # Of other files torch says what its own formats lack.
        reason = str(error).partition("\n")[0] if is_zipfile(path) else "it is no archive of torch"
        others = sorted(p for p in path.parent.glob("*.ckpt") if p != path and p.stat().st_size)
        advice = f"Try {shown(others[0])}." if others else "Name another one, or train again."
        raise InputError(
            f"a checkpoint is a file that `fit` wrote. Received: {path}: {reason}. {advice}"
        ) from error
    if not isinstance(checkpoint, dict) or _WRITTEN_BY not in checkpoint:
        raise InputError(
            f"a checkpoint is a file that `fit` wrote. Received: {path}. "
            "Pass last, best, or the path of one."
        )
    if to_go_on and "optimizer_states" not in checkpoint:
        raise InputError(
            "training goes on from a checkpoint with the state of its optimizer. Received: "
            f"{path}, which holds weights alone. Use one that was saved without save_weights_only; "
            "test and predict take this one."
        )
    return checkpoint


def settings_in(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The settings of model and data, as a configuration."""
    settings = {}
    for key, name in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters")):
        given = {k: v for k, v in checkpoint.get(name, {}).items() if k != "_instantiator"}
        class_path = given.pop("_class_path", None)
        settings[key] = {"class_path": class_path} if class_path else {}
        settings[key]["init_args"] = given
    return settings


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint in full or not at all.

    Lightning's own writes into the folder for temporary files and moves the file from there, which
    is a copy where that folder is on another file system: a kill or a full disk leaves half of it,
    in the place of the checkpoint before.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint beside the one before, then put it into its place."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            with write_atomically(path) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:
            # torch closes its archive after a failed write, and then complains of that.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
