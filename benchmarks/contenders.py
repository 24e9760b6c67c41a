"""Ways to train some rows of a large table, each as one function that builds its training step."""

from __future__ import annotations

import importlib.util
import math
import mmap
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from partial_embedding import open_vectors
from partial_embedding.torch import PartialEmbedding, rowwise

BATCHES = 16
# Tensors of the size of what is trained that an optimizer remembers.
STATES = {"AdamW": 2, "Adam": 2, "Adagrad": 1, "SGD": 0}


@dataclass(frozen=True)
class Work:
    """The task of one step.

    Args:
        rows: Rows of the table, V.
        trainable: Rows that train, K.
        optimizer: Its name in `torch.optim`.
        ids: Looked up in each step.
        width: Columns of the table, D.
        share: Of the ids, those that train.
        law: How often rows occur: `uniform`, or `zipf` for a frequency of one over the rank.
        dtype: Of the table.
        together: The rows that train lie side by side at the end, as added tokens do.
        mapped: The table lies in a file, of which what is read and written enters the memory.
        fused: The optimizer makes its step in one kernel, as torch offers where it is asked.
        device: `cpu` or `cuda`.
    """

    rows: int = 1_000_000
    trainable: int = 10_000
    optimizer: str = "AdamW"
    ids: int = 4096
    width: int = 64
    share: float = 0.5
    law: str = "uniform"
    dtype: str = "float32"
    together: bool = False
    mapped: bool = False
    fused: bool = False
    device: str = "cpu"

    @property
    def table_bytes(self) -> int:
        """Bytes of the table."""
        return self.rows * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's own."""
        return getattr(torch, self.dtype)

    def table(self, rows: int | None = None) -> Tensor:
        """Values for a table; written, so that the system really hands out the memory."""
        size = (self.rows if rows is None else rows, self.width)
        if self.mapped and rows is None:
            # Of zeros that take no room on the disk; the file goes with the table.
            with tempfile.NamedTemporaryFile(suffix=".npy") as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": size}
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + self.table_bytes)
                file.flush()
                vectors = open_vectors(file.name)
                vectors.base.madvise(mmap.MADV_RANDOM)  # as the documentation says of such a table
                return torch.from_numpy(vectors)
        return torch.full(size, 0.01, dtype=self.torch_dtype, device=self.device)

    def optimizer_of(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer, with its defaults."""
        options = {"fused": True} if self.fused else {}
        return getattr(torch.optim, self.optimizer)(parameters, **options)


@dataclass(frozen=True)
class Drawn:
    """What a step works on: the rows that train, and in turn ids and gradients of what they give.

    Args:
        rows: Sorted, shape (K,).
        batches: Pairs of ids, shape (N,), and gradients, shape (N, D).
    """

    rows: Tensor
    batches: list[tuple[Tensor, Tensor]]


@lru_cache(maxsize=8)
def drawn(work: Work) -> Drawn:
    """The same for every contender of a task."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(work.rows, generator=generator)
    if work.together:
        order = torch.arange(work.rows).flip(0)
    trainable, frozen = order[: work.trainable], order[work.trainable :]
    batches = []
    for _ in range(BATCHES):
        ids = _draw(trainable, work, generator)
        if len(frozen):
            is_frozen = torch.rand(work.ids, generator=generator) >= work.share
            ids = torch.where(is_frozen, _draw(frozen, work, generator), ids)
        gradient = torch.randn(work.ids, work.width, generator=generator)
        batches.append((ids.to(work.device), gradient.to(work.device, work.torch_dtype)))
    return Drawn(trainable.sort().values.to(work.device), batches)


def _draw(pool: Tensor, work: Work, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(work.ids, generator=generator, dtype=torch.float64)
    if work.law == "zipf":  # the inverse of a distribution function that is a logarithm
        return pool[(torch.exp(uniform * math.log(len(pool))).long() - 1).clamp(0)]
    return pool[(uniform * len(pool)).long()]


@lru_cache(maxsize=8)
def batches_of(work: Work, keep: str) -> list[tuple[Tensor, Tensor]]:
    """All ids, or the trainable ones alone, as positions among the trainable rows."""
    made = drawn(work)
    if keep == "all":
        return made.batches
    alone = []
    for ids, gradient in made.batches:
        slot = torch.searchsorted(made.rows, ids).clamp(max=len(made.rows) - 1)
        mine = made.rows[slot] == ids
        alone.append((slot[mine], gradient[mine]))
    return alone


Look = Callable[[Tensor], Tensor]


class Step:
    """A training step in three parts: look up, go backward, update.

    Args:
        look_up: From ids to rows.
        optimizer: What updates them; None where the backward pass does.
        batches: What to train on, in turn.
        after: What follows an update.
    """

    def __init__(
        self,
        look_up: Look,
        optimizer: torch.optim.Optimizer | None,
        batches: list[tuple[Tensor, Tensor]],
        after: Callable[[], object] = lambda: None,
    ) -> None:
        self.look_up = look_up
        self.optimizer = optimizer
        self.batches = batches
        self.after = after
        self.turn = 0

    def __call__(self, mark: Callable[[], None] = lambda: None) -> None:
        """Do one step, and call `mark` before, between and after its parts."""
        ids, gradient = self.batches[self.turn % len(self.batches)]
        self.turn += 1
        mark()
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        out = self.look_up(ids)
        mark()
        if out.requires_grad:
            out.backward(gradient)
        del out
        mark()
        if self.optimizer is not None:
            self.optimizer.step()
        self.after()
        mark()


# The contenders


def floor(work: Work) -> Step:
    table = nn.Embedding.from_pretrained(work.table(work.trainable), freeze=False)
    return Step(table, work.optimizer_of(table.parameters()), batches_of(work, "trainable"))


def ours(work: Work, lazy: bool = False) -> Step:
    table = PartialEmbedding.from_pretrained(work.table(), trainable_rows=drawn(work).rows)
    optimizer = rowwise(work.optimizer_of(table.parameters()), table, lazy=lazy)
    return Step(table, optimizer, batches_of(work, "all"))


def ours_in_stages(work: Work) -> Step:
    """Every row trains, in two stages: one in a hundred, scattered over the table, was first."""
    step = ours(work)
    table = step.look_up
    first = torch.randperm(work.rows, generator=torch.Generator().manual_seed(1))
    table.set_trainable_rows(first[: work.rows // 100].sort().values)
    step()
    table.set_trainable_rows("all")
    return step


def dense(work: Work) -> Step:
    table = nn.Embedding.from_pretrained(work.table(), freeze=False)
    return Step(table, work.optimizer_of(table.parameters()), batches_of(work, "all"))


def masked(work: Work) -> Step:
    step = dense(work)
    mask = torch.zeros(work.rows, 1, dtype=torch.bool, device=work.device)
    mask[drawn(work).rows] = True
    step.look_up.weight.register_hook(lambda grad: torch.where(mask, grad, 0.0))
    return step


def copied_back(work: Work) -> Step:
    """As in the textual inversion scripts of `diffusers`."""
    step = dense(work)
    weight = step.look_up.weight.detach()
    original = weight.clone()
    frozen = torch.ones(work.rows, dtype=torch.bool, device=work.device)
    frozen[drawn(work).rows] = False

    def copy_back() -> None:
        weight[frozen] = original[frozen]

    step.after = copy_back
    return step


def sparse_adam(work: Work) -> Step:
    table = nn.Embedding.from_pretrained(work.table(), freeze=False, sparse=True)
    return Step(table, torch.optim.SparseAdam(table.parameters()), batches_of(work, "all"))


def peft(work: Work) -> Step:
    from peft import TrainableTokensConfig, get_peft_model

    model = nn.Sequential(nn.Embedding.from_pretrained(work.table()))
    rows = drawn(work).rows.tolist()
    model = get_peft_model(model, TrainableTokensConfig(token_indices=rows, target_modules=["0"]))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Step(model, work.optimizer_of(learning), batches_of(work, "all"))


def two_tables(work: Work) -> Step:
    """A frozen table under a small one, as one writes it by hand."""
    below = nn.Embedding.from_pretrained(work.table())
    above = nn.Embedding.from_pretrained(work.table(work.trainable), freeze=False)
    slots = torch.full((work.rows,), -1, device=work.device)
    slots[drawn(work).rows] = torch.arange(work.trainable, device=work.device)

    def look_up(ids: Tensor) -> Tensor:
        slot = slots[ids]
        mine, out = slot >= 0, below(ids)
        out[mine] = above(slot[mine])
        return out

    return Step(look_up, work.optimizer_of(above.parameters()), batches_of(work, "all"))


def fbgemm(work: Work) -> Step:
    """The backward pass of its tables updates them; rowwise Adagrad keeps one number a row."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    kinds = {"Adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "SGD": EmbOptimType.EXACT_SGD}
    on_cpu = work.device == "cpu"
    place = EmbeddingLocation.HOST if on_cpu else EmbeddingLocation.DEVICE
    device = ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(work.rows, work.width, place, device)],
        optimizer=kinds[work.optimizer],
        pooling_mode=PoolingMode.NONE,
    )
    for weights in table.split_embedding_weights():
        weights.fill_(0.01)
    bounds = torch.arange(work.ids + 1, device=work.device)
    return Step(lambda ids: table(ids, bounds), None, batches_of(work, "all"))


def copying(work: Work, lazy: bool = False) -> Step:
    """One gather and one scatter of the rows stepped, and of their state where it is lazy."""
    table, buffer = work.table(), work.table(work.trainable)
    rows = drawn(work).rows
    if not lazy:

        def copy(_: Tensor) -> Tensor:
            torch.index_select(table, 0, rows, out=buffer)
            return table.index_copy_(0, rows, buffer)

        return Step(copy, None, batches_of(work, "all"))
    kept = [torch.zeros_like(buffer) for _ in range(STATES[work.optimizer])]
    touched = [(slots.unique(), gradient) for slots, gradient in batches_of(work, "trainable")]

    def copy_touched(slots: Tensor) -> Tensor:
        for source, ids in [(table, rows[slots]), *((one, slots) for one in kept)]:
            source.index_copy_(0, ids, source.index_select(0, ids))
        return table

    return Step(copy_touched, None, touched)


def lookup(work: Work) -> Step:
    """What reading alone costs, which grows with the table as caches get too small."""
    return Step(nn.Embedding.from_pretrained(work.table()), None, batches_of(work, "all"))


@dataclass(frozen=True)
class Contender:
    """One way to train rows.

    Args:
        name: In tables and pictures.
        build: Makes the step for a task.
        needs: The module that it imports, if any but torch.
    """

    name: str
    build: Callable[[Work], Step]
    needs: str = "torch"

    @property
    def installed(self) -> bool:
        """Whether it can run here."""
        return importlib.util.find_spec(self.needs) is not None


CONTENDERS = {
    "floor": Contender("floor: the K rows alone", floor),
    "ours": Contender("ours", ours),
    "lazy": Contender("ours, lazy", partial(ours, lazy=True)),
    "stages": Contender("ours, all rows in two stages", ours_in_stages),
    "dense": Contender("dense nn.Embedding", dense),
    "masked": Contender("dense, gradient masked", masked),
    "copied_back": Contender("dense, rows copied back", copied_back),
    "sparse_adam": Contender("sparse=True, SparseAdam, all rows", sparse_adam),
    "peft": Contender("PEFT TrainableTokens", peft, "peft"),
    "two_tables": Contender("two tables by hand", two_tables),
    "fbgemm": Contender("FBGEMM, all rows", fbgemm, "fbgemm_gpu"),
    "copying": Contender("one gather and scatter", copying),
    "copying_lazy": Contender("one gather and scatter, lazy", partial(copying, lazy=True)),
    "lookup": Contender("reading alone", lookup),
}
