"""Runs the command until it kills itself in the middle of a training step, and goes on with `last`.

Usage: killed_and_resumed.py EPOCH BATCH arguments of the command...

Each run is a process of its own, forked from one that has imported all that they need. Beside the
run's folders it writes the optimizer step of the checkpoint that was left, to `before.txt`.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from forked import in_processes

from partial_embedding.cli import main
from partial_embedding.recipes.text_classifier import TextBatch, TextClassifier

place, args = (int(sys.argv[1]), int(sys.argv[2])), ["fit", *sys.argv[3:]]
training_step = TextClassifier.training_step


def training_step_and_death(self: TextClassifier, batch: TextBatch, batch_idx: int) -> Any:
    loss = training_step(self, batch, batch_idx)
    if (self.current_epoch, batch_idx) == place:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss


def run(step: Any, *more: str) -> int:
    """The exit code of a run."""

    def command(rank: int) -> None:
        TextClassifier.training_step = step  # type: ignore[method-assign]
        os._exit(main([*args, *more]))

    (code,) = in_processes(1, command)
    return code


torch.set_num_threads(1)
assert run(training_step_and_death) == -signal.SIGKILL
(left,) = Path().glob("*/version_0/checkpoints/last.ckpt")
Path("before.txt").write_text(str(torch.load(left, weights_only=True)["global_step"]))
assert run(training_step, "--ckpt_path=last") == 0
