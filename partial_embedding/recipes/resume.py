"""What makes a run a function of its position, so that a resumed one goes on exactly.

Lightning's checkpoints hold no random state and no place within a shuffled epoch. Here neither is
needed: the order of the data follows from the epoch, and the random numbers of a step from the
epoch and the batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning import Callback, LightningModule, Trainer

Batch = TypeVar("Batch")


class ReplayableLoader(Generic[Batch]):
    """Batches whose order is a function of seed and epoch, and which can start inside an epoch.

    Lightning saves and loads its state with every checkpoint. It fetches no batch ahead and draws
    no random numbers of the process, as torch's `DataLoader` does for each epoch.

    Args:
        make_batch: Makes a batch of the examples with the given indices, shape (B,), int64.
        size: The number of examples.
        batch_size: The number of examples in each batch but the last.
        seed: Another seed shuffles differently; None keeps the order of the examples.
        rank: The number of this process among those that share the examples.
        world_size: The number of these processes; each gets as many examples as the others, for
            which a few of them occur twice.

    Example:
        >>> loader = ReplayableLoader(np.ndarray.tolist, size=5, batch_size=2)
        >>> list(loader)
        [[0, 1], [2, 3], [4]]
        >>> loader.load_state_dict({"epoch": 0, "batch": 2})
        >>> list(loader), list(loader)
        ([[4]], [[0, 1], [2, 3], [4]])
    """

    # Lightning asks every loader that has a sampler for this one too.
    batch_sampler = None

    def __init__(
        self,
        make_batch: Callable[[NDArray[np.int64]], Batch],
        size: int,
        batch_size: int,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.make_batch, self.size, self.batch_size = make_batch, size, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._epoch = self._batch = 0
        self._resume: dict[str, int] | None = None

    @property
    def sampler(self) -> ReplayableLoader[Batch]:
        """Itself: Lightning tells the `sampler` of a loader which epoch begins."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; the first epoch is 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        own = -(-self.size // self.world_size)
        return -(-own // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # A generator reads the epoch when the first batch is asked for. Lightning calls `iter`
        # before it calls `set_epoch` when it resumes.
        resume, self._resume = self._resume, None
        first = resume["batch"] if resume and resume["epoch"] == self._epoch else 0
        order = self._order()
        for batch in range(first, len(self)):
            self._batch = batch + 1
            yield self.make_batch(order[batch * self.batch_size : (batch + 1) * self.batch_size])

    def _order(self) -> NDArray[np.int64]:
        order = np.arange(self.size)
        if self.seed is not None:
            np.random.default_rng([self.seed, self._epoch]).shuffle(order)
        even = -(-self.size // self.world_size) * self.world_size
        return np.resize(order, even)[self.rank :: self.world_size]

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of its batches that were handed out."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin the next iteration after the batches that were handed out, in the same epoch."""
        self._resume = dict(state_dict)

    def take_back(self) -> None:
        """Forget that the last batch was handed out: a resumed run begins with it."""
        self._batch -= 1


class RandomState(Callback):
    """Makes the random numbers of each training step a function of its position.

    Before each batch the generators of torch (all devices), numpy and Python are seeded from the
    seed, the epoch, the batch and the process. Dropout in a resumed run thus draws what it would
    have drawn, whatever else used random numbers in between. It costs some 30 µs per batch.

    A batch that an exception cuts short is handed out again by a `ReplayableLoader`, in a run that
    is resumed from a checkpoint made then.

    Args:
        seed: Where all seeds come from; by default the one of `seed_everything`. A resumed run
            takes it from the checkpoint.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self._is_within_batch = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the seed of the process when none was given."""
        if self.seed is None:
            self.seed = torch.initial_seed()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed all generators for this batch."""
        place = [self.seed or 0, trainer.current_epoch, batch_idx, trainer.global_rank]
        high, low = (int(word) for word in np.random.SeedSequence(place).generate_state(2))
        torch.manual_seed(high << 32 | low)
        np.random.seed(low)
        random.seed(low)
        self._is_within_batch = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note that the batch was used."""
        self._is_within_batch = False

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Take the batch back that was cut short; checkpoints are made after this."""
        loader = trainer.train_dataloader
        if self._is_within_batch and isinstance(loader, ReplayableLoader):
            loader.take_back()
        self._is_within_batch = False

    def state_dict(self) -> dict[str, Any]:
        """The seed."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the seed of the run that is resumed."""
        self.seed = state_dict["seed"]
