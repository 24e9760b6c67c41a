"""Plain formulas in float64 that both frameworks are held to, and the runs that they describe.

The frameworks differ in options, so these are chosen such that both mean the same formula:

- Adam and AdamW: torch adds epsilon to the corrected root √(v / (1 - β₂ᵗ)), Keras to √v, before
  the correction. Adamax: torch adds it to |g| inside the maximum, Keras to the maximum. Adagrad:
  torch adds it to the root, Keras under it. With an epsilon of 1e-12 none of this reaches float32,
  as long as gradients are 0 or of ordinary size.
- Adagrad: the accumulator begins at 0.1, which is Keras's default; torch's is 0.
- Momentum: torch takes the whole velocity times the rate of now, Keras each gradient times the rate
  of its time. They agree while the rate of a row stands still, so momentum comes without warm-up.
- RMSprop: torch adds epsilon to the root, Keras under it; Adadelta: both under it. Lion is torch's
  by pytorch_optimizer. torch has no Ftrl, and no ScheduleFreeAdamW that steps the same formula.
- Optimizers that look across rows (Adafactor, Lamb, Muon), or whose state is of the whole table
  (Nadam's in Keras), have no formula of a row, and the halves serve others of them: each half's own
  tests have those.
- Weight decay is AdamW's: torch's other optimizers add it to the gradient, Keras's never do.

Each framework keeps within `TOLERANCE` of these numbers, and so within twice that of the other.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from partial_embedding import Schedule
from partial_embedding.schedule import Evaluation, Position, RateScale

Array = NDArray[Any]
Batch = tuple[Array, Array]

# Absolute, for values of about 1 after 12 steps of about 0.01 in float32; both came within 4e-7.
TOLERANCE = 1e-6
EPSILON = 1e-12
# Adadelta's first step is as large as the root of this.
DELTA = 1e-4
ACCUMULATOR = 0.1

NUM_ROWS, WIDTH, EPOCHS = 10, 3, 4


@dataclass(frozen=True)
class Optimizer:
    """An optimizer, under its name in the frameworks that have it."""

    name: str
    learning_rate: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    lazy: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What it is made with beside its rate, in Keras's words."""
        options: dict[str, dict[str, Any]] = {
            "SGD": {"momentum": self.momentum, "nesterov": self.nesterov},
            "Adagrad": {"initial_accumulator_value": ACCUMULATOR, "epsilon": EPSILON},
            "RMSprop": {"rho": 0.9, "epsilon": EPSILON},
            "Adadelta": {"rho": 0.9, "epsilon": DELTA},
            "Lion": {},
            "Ftrl": {"initial_accumulator_value": ACCUMULATOR},
            "ScheduleFreeAdamW": {"warmup_steps": 0, "epsilon": EPSILON},
            "Adamax": {"epsilon": EPSILON},
            "Adam": {"epsilon": EPSILON},
            "AdamW": {"epsilon": EPSILON, "weight_decay": self.weight_decay},
        }
        return options[self.name]


OPTIMIZERS = {
    "SGD": Optimizer("SGD", 0.05),
    "SGD-momentum": Optimizer("SGD", 0.02, momentum=0.9),
    "SGD-nesterov": Optimizer("SGD", 0.02, momentum=0.9, nesterov=True),
    "Adagrad": Optimizer("Adagrad", 0.02),
    "RMSprop": Optimizer("RMSprop", 0.01),
    "Adadelta": Optimizer("Adadelta", 1.0),
    "Lion": Optimizer("Lion", 0.01),
    "Ftrl": Optimizer("Ftrl", 0.05),
    "ScheduleFreeAdamW": Optimizer("ScheduleFreeAdamW", 0.005),
    "Adamax": Optimizer("Adamax", 0.01),
    "Adam": Optimizer("Adam", 0.005),
    "AdamW-weight_decay": Optimizer("AdamW", 0.005, weight_decay=0.5),
    "Adam-lazy": Optimizer("Adam", 0.005, lazy=True),
}

# One of each kind of state: a velocity, squares that begin at a number, two moments with a count of
# steps and a decay, and rows that a step leaves out. A model is fitted with these alone.
KINDS = {n: OPTIMIZERS[n] for n in ("SGD-momentum", "Adagrad", "AdamW-weight_decay", "Adam-lazy")}

# Rows 0, 3, 8 and 9 are frozen in each of them.
HISTORIES = {
    "frozen_from_the_start": Schedule([{"epoch": 0, "rows": [2, 5, 7]}]),
    "trained_then_frozen": Schedule(
        [{"epoch": 0, "rows": [1, 2, 5, 7]}, {"epoch": 2, "rows": [2, 7]}]
    ),
    "unfrozen_late": Schedule([{"epoch": 0, "rows": [2, 7]}, {"epoch": 2, "rows": [2, 4, 5, 7]}]),
    "leaving_and_returning": Schedule(
        [
            {"epoch": 0, "rows": [1, 2, 7]},
            {"epoch": 1, "rows": "none"},
            {"epoch": 2, "rows": [1, 4]},
            {"epoch": 3, "rows": [1, 2, 4, 6]},
        ]
    ),
}

# Schedules for the callbacks, with what their validations measure; the same rows are frozen.
MEASURED = (3.0, 2.0, 2.0, 1.0)
SCHEDULES = {
    "steps": Schedule(
        [
            {"step": 0, "rows": [1, 2, 7], "lr_scale": 0.5, "warmup_steps": 4},
            {"step": 4, "rows": [2, 4, 5], "warmup_steps": 3},
            {"step": 9, "rows": [1, 2, 6], "lr_scale": 2},
        ]
    ),
    "growing_shares": Schedule(
        [
            {"share": 0, "rows": [2]},
            {
                "share": 0.75,
                "rows": [1, 2, 4, 5, 6, 7],
                "grow": {"order": [7, 1, 4, 6, 5], "increments": 3},
                "lr_scale": 0.25,
                "warmup_steps": 2,
            },
        ]
    ),
    "plateau": Schedule(
        [
            {"epoch": 0, "rows": [1, 2, 6], "warmup_steps": 5},
            {"plateau": {"monitor": "val_measured"}, "rows": [2, 4, 5, 7], "lr_scale": 0.5},
            {"step": 10, "rows": [1, 2, 4]},
        ]
    ),
    "cycles": Schedule(
        [{"step": 0, "rows": [1, 2]}, {"step": 2, "rows": [4, 5, 6, 7], "lr_scale": 0.25}], cycle=5
    ),
}


def for_optimizer(schedule: Schedule, optimizer: "Optimizer") -> Schedule:
    """The schedule without warm-up, where the optimizer has momentum."""
    config = schedule.to_config()
    if optimizer.momentum:
        for stage in config["stages"]:
            stage.pop("warmup_steps", None)
    return Schedule.parse(config)


def positions(batches: int) -> Iterator[Position]:
    """Where training stands before each step, with what was measured on the way."""
    for epoch in range(EPOCHS):
        seen = tuple(
            Evaluation(e, (e + 1) * batches, {"val_measured": value})
            for e, value in enumerate(MEASURED[:epoch])
        )
        for step in range(epoch * batches, (epoch + 1) * batches):
            yield Position(epoch, step, EPOCHS * batches, seen)


MATRIX: Array = np.random.default_rng(0).uniform(-1, 1, (NUM_ROWS, WIDTH)).astype(np.float32)
# Bits that careless arithmetic would change.
MATRIX[9] = -0.0, 1e-40, np.nan


def batches_of(epoch: int) -> list[Batch]:
    """Ids, shape (1, N), and upstream gradients, shape (1, N, D), of the steps of one epoch.

    Ids occur several times, frozen ones too; the last batch holds none that ever trains. Gradients
    are eighths, so that sums over duplicates are exact in any order.
    """
    draw = np.random.default_rng([7, epoch])
    batches = []
    for choice in (np.arange(NUM_ROWS), np.array([0, 1, 2, 2, 4, 4, 5, 9]), np.array([0, 3, 8, 9])):
        ids = np.concatenate([draw.permutation(choice), draw.choice(choice, 4)])[np.newaxis]
        upstream = draw.choice([-1, 1], (*ids.shape, WIDTH)) * draw.integers(
            1, 9, (*ids.shape, WIDTH)
        )
        batches.append((ids, (upstream / 8).astype(np.float32)))
    return batches


def walk(schedule: Schedule) -> Iterator[tuple[Array, Batch]]:
    """The rows that train and the batch, step after step."""
    for epoch in range(EPOCHS):
        rows = schedule.trainable_rows(epoch).resolve(NUM_ROWS)
        for batch in batches_of(epoch):
            yield rows, batch


def ever_trained(schedule: Schedule) -> Array:
    """The rows that train at any time."""
    return np.unique(np.concatenate([rows for rows, _ in walk(schedule)]))


class TrainsRows:
    """The verbs that are the same words in every framework, of an adapter's `Training`."""

    layer: Any  # the table

    @property
    def trainable_rows(self) -> list[int]:
        """The rows that train, rising."""
        return [int(row) for row in self.layer.trainable_rows]

    def train(self, rows: object, rate_scale: RateScale | None = None) -> None:
        """Train these rows and no others."""
        self.layer.set_trainable_rows(rows, **_written(rate_scale))

    def unfreeze(self, rows: object, rate_scale: RateScale | None = None) -> None:
        """Train these rows too."""
        self.layer.unfreeze_rows(rows, **_written(rate_scale))

    def freeze(self, rows: object) -> None:
        """Train these rows no longer."""
        self.layer.freeze_rows(rows)


def _written(rate_scale: RateScale | None) -> dict[str, Any]:
    return {} if rate_scale is None else asdict(rate_scale)


@dataclass(frozen=True)
class Run:
    """What a framework did along a schedule."""

    tables: list[Array]
    changed: list[Array]
    trained: list[list[int]]


class Reference:
    """A table in float64 of which each row has state and a count of steps of its own."""

    def __init__(self, matrix: Array, optimizer: Optimizer) -> None:
        self.table = matrix.astype(np.float64)
        self.optimizer = optimizer
        self.trains = np.zeros(len(matrix), np.bool_)
        self.steps = np.zeros((len(matrix), 1))
        self.state = np.zeros((2, *matrix.shape))
        self.rate_scales = [RateScale()] * len(matrix)

    def train(self, rows: Array, rate_scale: RateScale | None = None) -> None:
        """Train these rows and no others; rows that join begin afresh."""
        trains = np.isin(np.arange(len(self.table)), rows)
        joins = trains & ~self.trains
        self.steps[joins] = 0
        self.state[:, joins] = 0
        if self.optimizer.name in ("Adagrad", "Ftrl"):
            self.state[0, joins] = ACCUMULATOR
        if self.optimizer.name == "ScheduleFreeAdamW":
            self.state[0, joins] = self.table[joins]
        self.rate_scales = [
            (rate_scale or RateScale()) if j else p
            for j, p in zip(joins, self.rate_scales, strict=True)
        ]
        self.trains = trains

    def step(self, ids: Array, upstream: Array) -> None:
        """Step once."""
        gradient = np.zeros_like(self.table)
        np.add.at(gradient, ids, upstream.astype(np.float64))
        factors = [
            p.factor(int(n)) for p, n in zip(self.rate_scales, self.steps[:, 0], strict=True)
        ]
        rate = self.optimizer.learning_rate * np.array(factors)[:, np.newaxis]
        self.steps[self.trains] += 1  # rows that a lazy step leaves out count it too
        moves = self.trains.copy()
        if self.optimizer.lazy:
            moves &= np.isin(np.arange(len(self.table)), ids)
        self.table[moves], *state = _RULES[self.optimizer.name](
            self.optimizer,
            rate[moves],
            self.table[moves],
            gradient[moves],
            self.state[:, moves],
            self.steps[moves],
        )
        for held, new in zip(self.state, state, strict=True):
            held[moves] = new


# Rules: each takes the learning rates, the rows, their gradients, two pieces of state and the count
# of this step, of shapes (K, 1), (K, D), (K, D), (2, K, D) and (K, 1), and returns the rows and the
# state after the step.

Moved = tuple[Array, Array, Array]
_Rule = Callable[[Optimizer, Array, Array, Array, Array, Array], Moved]


def _sgd(o: Optimizer, lr: Array, rows: Array, g: Array, state: Array, t: Array) -> Moved:
    velocity = o.momentum * state[0] + g
    direction = g + o.momentum * velocity if o.nesterov else velocity
    return rows - lr * direction, velocity, state[1]


def _adagrad(o: Optimizer, lr: Array, rows: Array, g: Array, state: Array, t: Array) -> Moved:
    squares = state[0] + g**2
    return rows - lr * g / (np.sqrt(squares) + EPSILON), squares, state[1]


def _adam(o: Optimizer, lr: Array, rows: Array, g: Array, state: Array, t: Array) -> Moved:
    mean = 0.9 * state[0] + 0.1 * g
    square = 0.999 * state[1] + 0.001 * g**2
    corrected = mean / (1 - 0.9**t), np.sqrt(square / (1 - 0.999**t)) + EPSILON
    decayed = rows * (1 - lr * o.weight_decay)
    return decayed - lr * corrected[0] / corrected[1], mean, square


def _adamax(o: Optimizer, lr: Array, rows: Array, g: Array, state: Array, t: Array) -> Moved:
    mean = 0.9 * state[0] + 0.1 * g
    largest = np.maximum(0.999 * state[1], np.abs(g))
    step = lr * mean / (1 - 0.9**t) / (largest + EPSILON)
    return rows - step, mean, largest


def _rmsprop(o: Optimizer, lr: Array, rows: Array, g: Array, state: Array, t: Array) -> Moved:
    squares = 0.9 * state[0] + 0.1 * g**2
    return rows - lr * g / (np.sqrt(squares) + EPSILON), squares, state[1]


def _adadelta(o: Optimizer, lr: Array, rows: Array, g: Array, state: Array, t: Array) -> Moved:
    squares = 0.9 * state[0] + 0.1 * g**2
    delta = np.sqrt(state[1] + DELTA) / np.sqrt(squares + DELTA) * g
    return rows - lr * delta, squares, 0.9 * state[1] + 0.1 * delta**2


def _lion(o: Optimizer, lr: Array, rows: Array, g: Array, state: Array, t: Array) -> Moved:
    direction = np.sign(0.9 * state[0] + 0.1 * g)
    return rows - lr * direction, 0.99 * state[0] + 0.01 * g, state[1]


def _ftrl(o: Optimizer, lr: Array, rows: Array, g: Array, state: Array, t: Array) -> Moved:
    squares = state[0] + g**2
    linear = state[1] + g - (np.sqrt(squares) - np.sqrt(state[0])) / lr * rows
    return -linear * lr / np.sqrt(squares), squares, linear


def _schedule_free(o: Optimizer, lr: Array, rows: Array, g: Array, state: Array, t: Array) -> Moved:
    square = 0.999 * state[1] + 0.001 * g**2
    stepped = state[0] - lr * g / (np.sqrt(square / (1 - 0.999**t)) + EPSILON)
    # Of the paper's formula this would be state[0]; Keras reads its variable after the step.
    average = (rows - 0.1 * stepped) / 0.9
    average = (1 - 1 / t) * average + stepped / t
    return 0.1 * stepped + 0.9 * average, stepped, square


_RULES: dict[str, _Rule] = {
    "SGD": _sgd,
    "Adagrad": _adagrad,
    "RMSprop": _rmsprop,
    "Adadelta": _adadelta,
    "Lion": _lion,
    "Ftrl": _ftrl,
    "ScheduleFreeAdamW": _schedule_free,
    "Adam": _adam,
    "AdamW": _adam,
    "Adamax": _adamax,
}


def written(folder: Path, schedule: Schedule | dict[str, Any]) -> Path:
    """A file of a schedule."""
    config = schedule.to_config() if isinstance(schedule, Schedule) else schedule
    path = folder / "schedule.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def told(said: str) -> list[str]:
    """The lines that a schedule and its audit print."""
    return [line for line in said.splitlines() if line.startswith(("words:", "audit:"))]


def rows_that_differ(before: Array, after: Array) -> list[int]:
    """The rows of two tables that are not the same byte for byte."""
    assert before.shape == after.shape
    assert before.dtype == after.dtype
    return [i for i, row in enumerate(before) if row.tobytes() != after[i].tobytes()]


def same_bits(before: Array, after: Array, rows: Sequence[int]) -> bool:
    """Whether these rows of two tables are the same byte for byte."""
    assert len(rows) > 0
    return not set(rows_that_differ(before, after)) & set(rows)
