"""What a training step looks up and which gradients it makes, against a computation by hand."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
pytest.importorskip("tensorboard")

from partial_embedding.callbacks.keras import RowMonitor  # noqa: E402
from partial_embedding.tensorflow import PartialEmbedding, rowwise  # noqa: E402
from partial_embedding.tensorflow.listening import StepListener  # noqa: E402

V, D, BATCH = 9, 4, 3
LIVE = [2, 5, 8]
MATRIX = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)
# Rows that train and rows that do not, row 0 and ids that a text has twice.
IDS = np.array(
    [[2, 2, 5, 0], [8, 1, 2, 0], [0, 3, 4, 7], [5, 5, 5, 6], [1, 3, 0, 0], [7, 8, 8, 8],
     [2, 0, 0, 0], [1, 6, 0, 0], [3, 3, 4, 4], [5, 2, 5, 2], [8, 8, 2, 1], [5, 5, 5, 5]]
)  # fmt: skip
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda: keras.optimizers.SGD(0.1),
    "clipped AdamW": lambda: keras.optimizers.AdamW(0.1, weight_decay=0.1, global_clipnorm=1e-2),
    "Muon": lambda: keras.optimizers.Muon(0.1),
    "scaled": lambda: keras.optimizers.SGD(0.1, loss_scale_factor=64.0),
    "averaged": lambda: keras.optimizers.SGD(0.1, use_ema=True, clipvalue=1e-3),
    "rowwise": lambda: rowwise(keras.optimizers.Adam(0.1), rate_scales=True),
    "rowwise lazy": lambda: rowwise(keras.optimizers.Adam(0.1, clipnorm=1e-2), lazy=True),
    "scaling": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1)),
    "scaling lazy": lambda: keras.optimizers.LossScaleOptimizer(
        rowwise(keras.optimizers.SGD(0.1), lazy=True)
    ),
}


class Bent(keras.layers.Layer):  # type: ignore[misc]
    """A sum over all values of a text that are not 0, bent so that gradients depend on the rows."""

    def call(self, rows: Any) -> Any:
        return tf.reduce_sum(tf.tanh(rows), axis=tf.range(1, tf.rank(rows)))[:, None]


class Tables(keras.callbacks.Callback):  # type: ignore[misc]
    """Keeps the table with which each step begins."""

    def __init__(self, layer: PartialEmbedding) -> None:
        super().__init__()
        self.layer = layer
        self.seen: list[Any] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.seen.append(self.layer.get_weights()[0])


@dataclass
class Run:
    """A model with one table, in which the first ids of a text may be looked up again."""

    layer: PartialEmbedding
    optimizer: Any
    again: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids = keras.Input((IDS.shape[1],), dtype="int64")
        value = Bent()(self.layer(ids))
        if self.again:
            value += Bent()(self.layer(ids[:, : self.again]))
        self.model = keras.Model(ids, value)
        self.model.compile(self.optimizer, lambda _, value: tf.reduce_mean(value), **self.options)

    def fit(self, folder: Path | None, every: int = 1, **options: Any) -> Any:
        """Train one epoch, watched if there is a folder; gives what was seen of each table."""
        tables = Tables(self.layer)
        monitor = None if folder is None else RowMonitor(folder, every_n_steps=every)
        self.model.fit(
            IDS, np.zeros((len(IDS), 1)), BATCH, shuffle=False, verbose=0,
            callbacks=[tables, *([monitor] if monitor else [])], **options,
        )  # fmt: skip
        self.tables = tables.seen
        return monitor and monitor.tracks[self.layer.name]

    def norms_by_hand(self, rows: list[int]) -> list[float]:
        return [
            norm_by_hand(table, ids, rows)
            for table, ids in zip(self.tables, batches(self.again), strict=True)
        ]


def gradient_by_hand(table: Any, ids: Any) -> Any:
    """The gradient of a whole table that is a plain variable, shape (V, D)."""
    variable = tf.Variable(table)
    with tf.GradientTape() as tape:
        rows = tf.gather(variable, ids)
        loss = tf.reduce_mean(tf.reduce_sum(tf.tanh(rows), axis=(1, 2)))
    return tf.convert_to_tensor(tape.gradient(loss, variable)).numpy()


def norm_by_hand(table: Any, ids: Any, rows: list[int]) -> float:
    return float(np.linalg.norm(gradient_by_hand(table, ids)[rows]))


def batches(again: int = 0) -> list[Any]:
    looked_up = np.concatenate([IDS, IDS[:, :again]], axis=1)
    return [looked_up[begin : begin + BATCH] for begin in range(0, len(IDS), BATCH)]


def shares_by_hand(rows: list[int], padding: int | None = None, again: int = 0) -> list[float]:
    shares = []
    for ids in batches(again):
        tokens = [token for token in ids.ravel().tolist() if token != padding]
        shares.append(sum(token in rows for token in tokens) / len(tokens))
    return shares


def values(series: Any) -> list[float]:
    return [value for _, value in series]


def norms(track: Any) -> list[float]:
    return values(track.cohorts[0].numbers["gradient_norm"])


def partial(**options: Any) -> PartialEmbedding:
    options = {"trainable_rows": LIVE, "reserve_rows": range(1, V), "name": "words", **options}
    return PartialEmbedding.from_matrix(MATRIX, **options)


MODES = {"graph": {}, "XLA": {"jit_compile": True}, "eager": {"run_eagerly": True}}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_norms_and_shares_are_those_by_hand(name: str, mode: str, tmp_path: Path) -> None:
    run = Run(partial(), OPTIMIZERS[name](), options=MODES[mode])
    track = run.fit(tmp_path)
    assert values(track.token_share) == shares_by_hand(LIVE)
    assert norms(track) == pytest.approx(run.norms_by_hand(LIVE), rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["SGD", "clipped AdamW", "scaling"])
def test_a_plain_table_is_heard_too(name: str, mode: str, tmp_path: Path) -> None:
    layer = PartialEmbedding.from_matrix(MATRIX, name="words")
    run = Run(layer, OPTIMIZERS[name](), options=MODES[mode])
    assert layer._split is None
    track = run.fit(tmp_path)
    assert values(track.token_share) == [1.0] * len(batches())
    assert norms(track) == pytest.approx(run.norms_by_hand(list(range(V))), rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lazy", [False, True])
def test_lookups_of_one_step_add_up(lazy: bool, mode: str, tmp_path: Path) -> None:
    optimizer = rowwise(keras.optimizers.SGD(0.1), lazy=lazy)
    run = Run(partial(), optimizer, again=1, options=MODES[mode])
    track = run.fit(tmp_path)
    assert values(track.token_share) == shares_by_hand(LIVE, again=1)
    assert norms(track) == pytest.approx(run.norms_by_hand(LIVE), rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("steps", "wrap"), [(2, False), (3, False), (2, True)])
def test_accumulated_batches_have_the_gradient_of_their_step(
    steps: int, wrap: bool, mode: str, tmp_path: Path
) -> None:
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=steps, clipnorm=1e-3)
    run = Run(partial(), rowwise(optimizer) if wrap else optimizer, options=MODES[mode])
    track = run.fit(tmp_path)
    assert values(track.token_share) == shares_by_hand(LIVE)
    # All batches are of one size, so the average is the gradient of those that are accumulated.
    size = steps * BATCH
    expected = [
        norm_by_hand(run.tables[step * steps], IDS[step * size : (step + 1) * size], LIVE)
        for step in range(len(IDS) // size)
    ]
    assert norms(track) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("every", "measured"), [(1, [0, 1]), (3, [1]), (10, [1])])
def test_batches_of_one_execution_are_measured_together(
    every: int, measured: list[int], mode: str, tmp_path: Path
) -> None:
    options = {"steps_per_execution": 2, **MODES[mode]}
    run = Run(partial(), keras.optimizers.SGD(0.1), options=options)
    track = run.fit(tmp_path, every=every)
    shares = np.mean(np.reshape(shares_by_hand(LIVE), (2, 2)), axis=1)
    assert values(track.token_share) == pytest.approx(shares[measured])
    expected = []
    for execution, table in enumerate(run.tables):
        # The second batch of an execution begins where the first one ended.
        first, second = batches()[2 * execution : 2 * execution + 2]
        table[LIVE] -= 0.1 * gradient_by_hand(table, first)[LIVE]
        expected.append(norm_by_hand(table, second, LIVE))
    assert norms(track) == pytest.approx(np.array(expected)[measured], rel=1e-5)
    assert len(track.cohorts[0].numbers["update_ratio"]) == len(measured)


def test_only_batches_that_are_due_are_heard(tmp_path: Path) -> None:
    run = Run(partial(), keras.optimizers.SGD(0.1))
    track = run.fit(tmp_path, every=3)
    assert values(track.token_share) == [shares_by_hand(LIVE)[at] for at in (2, 3)]
    expected = [run.norms_by_hand(LIVE)[at] for at in (2, 3)]
    assert norms(track) == pytest.approx(expected, rel=1e-5)


def test_nothing_is_heard_until_it_is_due(tmp_path: Path) -> None:
    run = Run(partial(), keras.optimizers.SGD(0.1))
    run.model.make_train_function()
    listener = StepListener(run.model, [run.layer])
    listener.attach()
    (heard,) = listener.heard
    run.fit(None)
    assert heard.token_share() is None
    assert heard.row_squares() is None
    listener.is_due = True
    run.fit(None)
    assert heard.token_share() == shares_by_hand(LIVE)[-1]
    rows, squares = heard.row_squares()
    gradient = gradient_by_hand(run.tables[-1], batches()[-1])
    assert rows.tolist() == [2, 5, 8]
    assert squares == pytest.approx((gradient**2).sum(axis=1)[rows], rel=1e-5)


def test_data_that_ends_unforeseen_is_heard_in_each_epoch(tmp_path: Path) -> None:
    run = Run(partial(), keras.optimizers.SGD(0.1))
    own = run.model.make_train_function() or run.model.train_function

    def batch() -> Any:
        yield IDS[:BATCH], np.zeros((BATCH, 1))

    shapes = tf.TensorSpec((None, 4), tf.int64), tf.TensorSpec((None, 1), tf.float64)
    data = tf.data.Dataset.from_generator(batch, output_signature=shapes)
    monitor = RowMonitor(tmp_path, every_n_steps=1)
    run.model.fit(data, epochs=3, callbacks=[monitor], verbose=0)
    assert values(monitor.tracks["words"].token_share) == shares_by_hand(LIVE)[:1] * 3
    assert run.model.train_function is own


@pytest.mark.parametrize("options", [{"freeze_padding": True}, {"mask_zero": True}, {}])
def test_padding_is_no_token(options: dict[str, Any], tmp_path: Path) -> None:
    rows = [5, 8] if options.get("freeze_padding") else [0, 5, 8]
    layer = partial(trainable_rows=[0, 5, 8], reserve_rows="all", **options)
    track = Run(layer, keras.optimizers.SGD(0.1)).fit(tmp_path)
    padding = 0 if options else None
    assert values(track.token_share) == shares_by_hand(rows, padding)
    assert shares_by_hand(rows, 0) != shares_by_hand(rows, None)


def test_a_batch_of_padding_has_no_share(tmp_path: Path) -> None:
    run = Run(partial(freeze_padding=True), keras.optimizers.SGD(0.1))
    monitor = RowMonitor(tmp_path, every_n_steps=1)
    run.model.fit(np.zeros((2, 4), int), np.zeros((2, 1)), callbacks=[monitor], verbose=0)
    assert monitor.tracks["words"].token_share == []
    assert norms(monitor.tracks["words"]) == [0.0]


@pytest.mark.parametrize("kind", ["ragged", "sparse"])
def test_ragged_and_sparse_ids_are_heard(kind: str, tmp_path: Path) -> None:
    ids: Any = tf.ragged.constant([[2, 5], [8], [1, 2, 2]], dtype=tf.int64)
    tokens = [2, 5, 8, 1, 2, 2]
    if kind == "sparse":
        # Absent ids are looked up as 0, as by the plain layer.
        ids, tokens = ids.to_sparse(), [*tokens, 0, 0, 0]

    class Model(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.table = partial()

        def call(self, ids: Any) -> Any:
            rows = self.table(ids)
            return tf.reduce_sum(tf.tanh(rows.values if kind == "ragged" else rows))[None, None]

    model = Model()
    model.compile("sgd", lambda _, value: tf.reduce_mean(value), jit_compile=False)
    data = tf.data.Dataset.from_tensors((ids, tf.zeros((3, 1))))
    monitor = RowMonitor(tmp_path)
    model.fit(data, callbacks=[monitor], verbose=0)
    track = monitor.tracks["words"]
    assert values(track.token_share) == [sum(token in LIVE for token in tokens) / len(tokens)]
    assert norms(track) == pytest.approx([norm_by_hand(MATRIX, [tokens], LIVE)], rel=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_is_heard_unscaled(policy: str, tmp_path: Path) -> None:
    run = Run(partial(dtype=policy), keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)))
    track = run.fit(tmp_path)
    assert norms(track) == pytest.approx(run.norms_by_hand(LIVE), rel=1e-2)


def test_a_step_that_is_skipped_has_no_gradient(tmp_path: Path) -> None:
    inner = keras.optimizers.SGD(0.1)
    # Some gradients overflow float32; the next ones have half the scale.
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=3e38)
    run = Run(partial(), optimizer, again=4)
    track = run.fit(tmp_path)
    tables = [*run.tables, run.layer.get_weights()[0]]
    is_step = [(before != after).any() for before, after in itertools.pairwise(tables)]
    assert 0 < sum(is_step) == int(inner.iterations) < len(batches())
    expected = np.array(run.norms_by_hand(LIVE))[is_step]
    assert norms(track) == pytest.approx(expected, rel=1e-5)
    assert len(track.token_share) == len(batches())


def test_the_gradient_of_a_regularizer_counts(tmp_path: Path) -> None:
    run = Run(partial(embeddings_regularizer="l2"), keras.optimizers.SGD(0.1))
    track = run.fit(tmp_path)
    gradient = gradient_by_hand(MATRIX, batches()[0]) + 2 * 0.01 * MATRIX
    assert norms(track)[0] == pytest.approx(np.linalg.norm(gradient[LIVE]), rel=1e-5)


def test_a_table_of_which_nothing_trains_has_tokens_but_no_gradient(tmp_path: Path) -> None:
    run = Run(partial(trainable_rows="none", reserve_rows=None), keras.optimizers.SGD(0.1))
    with pytest.warns(UserWarning, match="trainable weights"):
        track = run.fit(tmp_path)
    assert values(track.token_share) == [0.0] * len(batches())
    assert track.cohorts == {}


class Stepping(keras.optimizers.SGD):  # type: ignore[misc]
    """An optimizer that does all by itself."""

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        if not self.built:
            self.build(trainable_variables)
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            variable.assign_sub(0.1 * gradient)
        self.iterations.assign_add(1)


def test_what_cannot_be_heard_is_left_out(tmp_path: Path) -> None:
    track = Run(partial(), Stepping(0.1)).fit(tmp_path)
    assert values(track.token_share) == shares_by_hand(LIVE)
    assert "gradient_norm" not in track.cohorts[0].numbers


def test_two_tables_and_variables_without_gradient_are_told_apart(tmp_path: Path) -> None:
    class Model(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.first = partial(name="unused")
            self.second = partial(name="words")
            self.third = PartialEmbedding.from_matrix(2 * MATRIX, name="plain")

        def build(self, shape: Any) -> None:
            for layer in (self.first, self.second, self.third):
                layer.build()

        def call(self, ids: Any) -> Any:
            return Bent()(self.second(ids)) + Bent()(self.third(ids[:, :2]))

    model = Model()
    model.compile("sgd", lambda _, value: tf.reduce_mean(value))
    monitor = RowMonitor(tmp_path)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        model.fit(IDS, np.zeros((len(IDS), 1)), len(IDS), callbacks=[monitor], verbose=0)
    tracks = monitor.tracks
    assert norms(tracks["words"]) == pytest.approx([norm_by_hand(MATRIX, IDS, LIVE)], rel=1e-5)
    expected = norm_by_hand(2 * MATRIX, IDS[:, :2], list(range(V)))
    assert norms(tracks["plain"]) == pytest.approx([expected], rel=1e-5)
    assert tracks["unused"].token_share == []
    assert "gradient_norm" not in tracks["unused"].cohorts[0].numbers


# What is left as it was


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["SGD", "clipped AdamW", "rowwise lazy", "scaling"])
def test_training_that_is_heard_ends_at_the_same_bits(name: str, mode: str, tmp_path: Path) -> None:
    heard, alone = (Run(partial(), OPTIMIZERS[name](), options=MODES[mode]) for _ in range(2))
    heard.fit(tmp_path, every=2)
    alone.fit(None)
    assert heard.layer.get_weights()[0].tobytes() == alone.layer.get_weights()[0].tobytes()
    assert len(heard.model.optimizer.variables) == len(alone.model.optimizer.variables)
    for one, other in zip(
        heard.model.optimizer.variables, alone.model.optimizer.variables, strict=True
    ):
        assert one.numpy().tobytes() == other.numpy().tobytes(), one.path


def test_a_fit_that_is_heard_is_traced_once_and_others_not_again(tmp_path: Path) -> None:
    traced = []

    class Traced(Bent):
        def call(self, rows: Any) -> Any:
            traced.append(rows)
            return super().call(rows)

    ids = keras.Input((IDS.shape[1],), dtype="int64")
    model = keras.Model(ids, Traced()(partial()(ids)))
    model.compile("sgd", lambda _, value: tf.reduce_mean(value))

    def fit(*callbacks: Any) -> int:
        traced.clear()
        targets = np.zeros((len(IDS), 1))
        model.fit(IDS, targets, BATCH, epochs=2, callbacks=list(callbacks), verbose=0)
        return len(traced)

    assert fit() > 0
    own = model.train_function
    assert fit() == 0
    assert fit(RowMonitor(tmp_path, every_n_steps=2)) == 1
    assert fit() == 0
    assert model.train_function is own


def test_the_last_of_two_monitors_hears(tmp_path: Path) -> None:
    run = Run(partial(), keras.optimizers.SGD(0.1))
    run.fit(None)
    own, targets = run.model.train_function, np.zeros((len(IDS), 1))
    first, last = (RowMonitor(tmp_path / name, every_n_steps=1) for name in "ab")
    run.model.fit(IDS, targets, BATCH, shuffle=False, callbacks=[first, last], verbose=0)
    assert values(last.tracks["words"].token_share) == shares_by_hand(LIVE)
    assert first.tracks["words"].token_share == []
    assert run.model.train_function is own


class Fails(keras.callbacks.Callback):  # type: ignore[misc]
    """An error of another callback, in the middle of training."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        raise RuntimeError("a callback failed")


def test_an_error_leaves_a_model_that_trains_and_can_be_heard(tmp_path: Path) -> None:
    run = Run(partial(), keras.optimizers.SGD(0.1))
    run.fit(None)
    own, targets = run.model.train_function, np.zeros((len(IDS), 1))
    callbacks = [Fails(), RowMonitor(tmp_path / "a", every_n_steps=1)]
    with pytest.raises(RuntimeError, match="a callback failed"):
        run.model.fit(IDS, targets, BATCH, callbacks=callbacks, verbose=0)
    assert isinstance(run.model.train_function, StepListener)
    assert not run.model.train_function._listens.numpy()
    assert "rows" not in vars(run.layer)
    assert not {"_clip_gradients", "_backend_apply_gradients"} & vars(run.model.optimizer).keys()
    track = run.fit(tmp_path / "b")
    assert norms(track) == pytest.approx(run.norms_by_hand(LIVE), rel=1e-5)
    assert run.model.train_function is own


def test_an_error_of_a_step_gives_the_model_its_own_function_back(tmp_path: Path) -> None:
    run = Run(partial(), keras.optimizers.SGD(0.1), options={"run_eagerly": True})
    run.fit(None)
    own = run.model.train_function
    with pytest.raises(Exception, match="indices"):
        run.model.fit(
            np.full((2, 4), V), np.zeros((2, 1)), callbacks=[RowMonitor(tmp_path)], verbose=0
        )
    assert run.model.train_function is own


def test_files_of_a_model_that_is_heard_are_those_of_another(tmp_path: Path) -> None:
    class Saves(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 1:
                assert isinstance(self.model.train_function, StepListener) == self.is_heard
                self.model.save(self.folder / "model.keras")
                self.model.save_weights(self.folder / "model.weights.h5")
                self.variables = [variable.path for variable in self.model.variables]
                self.saved = [name for name, _ in tf.train.list_variables(self.checkpoint())]

        def checkpoint(self) -> Any:
            return tf.train.Checkpoint(self.model).save(str(self.folder / "checkpoint"))

    found = []
    for folder in (tmp_path / "heard", tmp_path / "alone"):
        keras.utils.clear_session()
        folder.mkdir()
        layer = partial()
        model = keras.Sequential([keras.Input((4,), dtype="int64"), layer, keras.layers.Flatten()])
        model.compile(keras.optimizers.Adam(0.1), "mse")
        saves = Saves()
        saves.folder, saves.is_heard = folder, folder.name == "heard"
        monitor = [RowMonitor(folder / "logs", every_n_steps=1)] if saves.is_heard else []
        targets = np.zeros((len(IDS), 4 * D))
        model.fit(IDS, targets, BATCH, shuffle=False, callbacks=[*monitor, saves], verbose=0)
        loaded = keras.models.load_model(folder / "model.keras")
        other = keras.Sequential(
            [keras.Input((4,), dtype="int64"), keras.layers.Embedding(V, D), keras.layers.Flatten()]
        )
        other.load_weights(folder / "model.weights.h5")
        weights = [m.layers[0].get_weights()[0].tobytes() for m in (loaded, other)]
        assert weights[0] == weights[1]
        found.append((saves.variables, saves.saved, weights, loaded.optimizer.iterations.numpy()))
    assert found[0] == found[1]


def test_one_replica_of_a_strategy_is_heard(tmp_path: Path) -> None:
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        run = Run(partial(), keras.optimizers.SGD(0.1))
    track = run.fit(tmp_path)
    assert values(track.token_share) == shares_by_hand(LIVE)
    assert norms(track) == pytest.approx(run.norms_by_hand(LIVE), rel=1e-5)
