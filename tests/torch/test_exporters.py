"""What reads a model's graph reads a table, a bag and a head as it reads the plain modules."""

import gc
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_same_bits, rows_that_differ
from small_tables import moved_rows
from torch import Tensor, nn

from partial_embedding.errors import InputError
from partial_embedding.torch import PartialEmbedding, PartialEmbeddingBag, PartialLinear

V, D = 9, 4
IDS = torch.tensor([[1, 2, 2], [8, 0, 4]])

# Each with the plain module and what is put in.
MODULES: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module], Tensor]] = {
    "table": (
        lambda rows: PartialEmbedding(V, D, padding_idx=0, trainable_rows=rows),
        lambda: nn.Embedding(V, D, padding_idx=0),
        IDS,
    ),
    "bag": (
        lambda rows: PartialEmbeddingBag(V, D, mode="sum", trainable_rows=rows),
        lambda: nn.EmbeddingBag(V, D, mode="sum"),
        IDS,
    ),
    "head": (
        lambda rows: PartialLinear(D, V, trainable_rows=rows),
        lambda: nn.Linear(D, V),
        torch.linspace(-1, 1, 2 * D).view(2, D),
    ),
    "table with max_norm": (
        lambda rows: PartialEmbedding(V, D, max_norm=9.0, padding_idx=0, trainable_rows=rows),
        lambda: nn.Embedding(V, D, max_norm=9.0, padding_idx=0),
        IDS,
    ),
}

Exported = Callable[[Tensor], Tensor]


class Around(nn.Module):
    """A model with one module in it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, given: Tensor) -> Tensor:
        out: Tensor = self.inner(given)
        return out


def traced(model: nn.Module, given: Tensor) -> Exported:
    return saved_script(torch.jit.trace(model, given))


def scripted(model: nn.Module, given: Tensor) -> Exported:
    return saved_script(torch.jit.script(model))


def saved_script(module: Any) -> Exported:
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    loaded: Exported = torch.jit.load(buffer)
    return loaded


def symbolic(model: nn.Module, given: Tensor) -> Exported:
    graph: Exported = torch.fx.symbolic_trace(model)
    return graph


def exported(strict: bool) -> Callable[[nn.Module, Tensor], Exported]:
    def export(model: nn.Module, given: Tensor) -> Exported:
        buffer = io.BytesIO()
        torch.export.save(torch.export.export(model, (given,), strict=strict), buffer)
        buffer.seek(0)
        module: Exported = torch.export.load(buffer).module()
        return module

    return export


def onnx(dynamo: bool) -> Callable[[nn.Module, Tensor], Exported]:
    def export(model: nn.Module, given: Tensor) -> Exported:
        pytest.importorskip("onnxscript")
        reference = pytest.importorskip("onnx.reference")
        buffer = io.BytesIO()
        torch.onnx.export(model, (given,), buffer, dynamo=dynamo, input_names=["given"])
        session = reference.ReferenceEvaluator(buffer.getvalue())
        return lambda given: torch.tensor(
            np.asarray(session.run(None, {"given": given.numpy()})[0])
        )

    return export


EXPORTERS: dict[str, Callable[[nn.Module, Tensor], Exported]] = {
    "jit.trace": traced,
    "jit.script": scripted,
    "fx.symbolic_trace": symbolic,
    "export": exported(strict=False),
    "strict export": exported(strict=True),
    "onnx": onnx(dynamo=True),
    "old onnx": onnx(dynamo=False),
}
# torch itself warns of what it is about to leave behind.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize(
    ("exporter", "kind", "rows"),
    [
        # Each exporter with each kind of module; with rows of both sorts in the full run.
        pytest.param(exporter, kind, rows, marks=[pytest.mark.full] * ((i + j + k) % 2))
        for i, exporter in enumerate(EXPORTERS)
        for j, kind in enumerate(MODULES)
        for k, rows in enumerate(([1, 4], "all"))
    ],
)
def test_what_is_exported_gives_the_module_s_outputs(
    exporter: str, kind: str, rows: object
) -> None:
    partial, plain, given = MODULES[kind]
    model, other = Around(partial(rows)).eval(), Around(plain()).eval()
    other.load_state_dict(model.state_dict())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    said = []
    for one in (other, model):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = EXPORTERS[exporter](one, given)(given)
        said.append({str(warning.category) for warning in caught})
        if "onnx" in exporter:
            torch.testing.assert_close(out, other(given))
        else:
            assert_same_bits(out, other(given), "the output")
    assert said[1] <= said[0]  # nothing is said of the table that is not said of a plain one
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {
        k: v.tolist() for k, v in before.items()
    }
    if kind != "head":
        model(given).sum().backward()
        assert model.inner.weight.grad is not None
        assert moved_rows(model.inner.weight.grad.to_dense()) == sorted(
            {1, 4} if rows != "all" else set(given.flatten().tolist()) - PAD[kind]
        )


PAD = {"table": {0}, "bag": set(), "table with max_norm": {0}}


@pytest.mark.parametrize("rows", [[1, 4], "all"], ids=["some", "all"])
@pytest.mark.parametrize("kind", [PartialEmbedding, PartialEmbeddingBag])
def test_rows_that_are_too_long_are_scaled_in_a_graph_but_for_frozen_ones(
    kind: Any, rows: object
) -> None:
    table = kind(V, D, max_norm=1.0, padding_idx=0, trainable_rows=rows)
    with torch.no_grad():
        table.weight.fill_(2.0)
    given = torch.arange(V).unsqueeze(1) if kind is PartialEmbeddingBag else torch.arange(V)
    out = torch.export.export(table, (given,), strict=False).module()(given)
    assert (table.weight == 2).all()  # a graph writes nothing
    torch.testing.assert_close(out, table(given))
    trained = [1, 4] if rows != "all" else list(range(1, V))
    torch.testing.assert_close(table.weight.norm(dim=1)[trained], torch.ones(len(trained)))
    assert (table.weight[[row for row in range(V) if row not in trained]] == 2).all()


@pytest.mark.parametrize("kind", MODULES)
def test_a_graph_that_is_traced_names_the_plain_module_s_functions(kind: str) -> None:
    partial, plain, given = MODULES[kind]
    graphs = []
    for model in (Around(partial([1, 4])), Around(plain())):
        graph = torch.export.export(model, (given,), strict=False).graph
        graphs.append([str(node.target) for node in graph.nodes if node.op == "call_function"])
    if kind == "table with max_norm":
        assert graphs[0][-1] == graphs[1][-1]
    else:
        assert graphs[0] == graphs[1]


GRAPHS: dict[str, Callable[[nn.Module], Any]] = {
    "fx": torch.fx.symbolic_trace,
    "trace": lambda model: torch.jit.trace(model, IDS),
    "export": lambda model: torch.export.export(model, (IDS,), strict=False).module(),
}


@pytest.mark.parametrize("how", GRAPHS)
def test_a_graph_trains_the_rows_of_its_model_and_is_refused_without_it(how: str) -> None:
    model: Any = nn.Sequential(PartialEmbedding(V, D, trainable_rows=[1, 4]), nn.Linear(D, 2))
    graph, before = GRAPHS[how](model), model[0].weight.detach().clone()
    (weight,) = (p for p in graph.parameters() if p.shape == (V, D))

    def step() -> None:
        graph.zero_grad()
        graph(IDS).square().sum().backward()
        # One of its own each time, since one that has stepped keeps the table alive.
        torch.optim.AdamW(graph.parameters(), 0.1, weight_decay=0.1).step()

    step()
    assert rows_that_differ(before, weight) == [1, 4]
    now = weight.detach().clone()
    del model
    gc.collect()
    with pytest.raises(InputError, match=r"whose table is gone.*Keep the model"):
        step()
    assert_same_bits(weight, now, "the rows")
