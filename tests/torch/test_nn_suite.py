"""torch's own tests of its embeddings, with ours standing in.

torch ships two tables of cases: the module database (`common_modules.module_db`) and the older list
of module tests, which checks them itself (`common_nn.get_new_module_tests`). Every entry for
`nn.Embedding` and `nn.EmbeddingBag` in either is run with our class in its place: every row
trainable and `sparse=False`, as in torch, unless a case asks for `sparse=True`.
"""

import copy
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from oracle import assert_same_bits
from torch import Tensor, nn
from torch.testing._internal.common_modules import (
    ErrorModuleInput,
    ModuleErrorEnum,
    ModuleInfo,
    ModuleInput,
    module_db,
)
from torch.testing._internal.common_nn import NewModuleTest, NNTestCase, get_new_module_tests
from torch.testing._internal.common_utils import freeze_rng_state, noncontiguous_like

from partial_embedding.torch import PartialEmbedding, PartialEmbeddingBag

KIND = "configuration: of torch's own tests of embeddings"
SPARSE = 6  # the position of `sparse` among the arguments of both modules


def with_torch_defaults(args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    return options if len(args) > SPARSE else {"sparse": False, **options}


class Embedding(PartialEmbedding):
    """Ours, with the one default that differs set back."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **with_torch_defaults(args, options))


class EmbeddingBag(PartialEmbeddingBag):
    """Ours, with the one default that differs set back."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **with_torch_defaults(args, options))


STAND_INS = {nn.Embedding: Embedding, nn.EmbeddingBag: EmbeddingBag}


# The module database


def infos() -> list[ModuleInfo]:
    found = []
    for info in module_db:
        if info.module_cls in STAND_INS:
            found.append(copy.copy(info))
            found[-1].module_cls = STAND_INS[info.module_cls]
    return found


def inputs_of(info: ModuleInfo, dtype: torch.dtype, training: bool) -> list[ModuleInput]:
    torch.manual_seed(0)
    made: list[ModuleInput] = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=training
    )
    return made


@dataclass(frozen=True)
class Entry:
    """One input of one module, as the checks take it."""

    info: ModuleInfo
    given: ModuleInput
    dtype: torch.dtype = torch.float32
    training: bool = True

    def build(self, **factory: Any) -> nn.Module:
        torch.manual_seed(1)
        arguments, factory = self.given.constructor_input, {"dtype": self.dtype, **factory}
        module: nn.Module = self.info.module_cls(*arguments.args, **arguments.kwargs, **factory)
        assert isinstance(module, PartialEmbedding)
        return module.train(self.training)

    def plain_twin(self) -> nn.Module:
        torch.manual_seed(1)
        parent = {ours: theirs for theirs, ours in STAND_INS.items()}[self.info.module_cls]
        arguments = self.given.constructor_input
        module: nn.Module = parent(*arguments.args, **arguments.kwargs, dtype=self.dtype)
        return module

    def run(self, module: nn.Module) -> Tensor:
        out: Tensor = module(*self.given.forward_input.args, **self.given.forward_input.kwargs)
        return out

    def backward(self, module: nn.Module, up: Tensor | None = None) -> Tensor:
        module.zero_grad()
        out = self.run(module)
        out.backward(torch.ones_like(out) if up is None else up)
        grad: Tensor = module.weight.grad
        return grad.clone()


def check_forward(entry: Entry) -> None:
    module, twin = entry.build(), entry.plain_twin()
    out = entry.run(module)
    assert_same_bits(out, entry.run(twin), "the output")
    assert_same_bits(entry.backward(module), entry.backward(twin), "the gradient")
    if entry.given.reference_fn is not None:
        given = entry.given.forward_input
        reference = entry.given.reference_fn(module, *given.args, **given.kwargs)
        torch.testing.assert_close(out, reference)


def check_pickle(entry: Entry) -> None:
    module = entry.build()
    with freeze_rng_state():
        out = entry.run(module)
    loaded = pickle.loads(pickle.dumps(module))
    assert loaded.training == entry.training
    with freeze_rng_state():
        assert_same_bits(entry.run(loaded), out, "the output")


def check_deepcopy(entry: Entry) -> None:
    module = entry.build()
    copied = copy.deepcopy(module)
    assert_same_bits(entry.backward(copied), entry.backward(module), "the gradient")
    copied.weight.data.zero_()
    assert module.weight.any()


def check_not_contiguous(entry: Entry) -> None:
    module = entry.build()
    (ids,) = entry.given.forward_input.args
    up = torch.randn(*ids.shape, module.embedding_dim, dtype=entry.dtype)
    expected = entry.backward(module, up)
    out = entry.run(module)
    spread = noncontiguous_like(ids)
    assert not spread.is_contiguous()
    for given in (ids, spread):
        for given_up in (up, noncontiguous_like(up)):
            module.zero_grad()
            again = module(given)
            again.backward(given_up)
            assert_same_bits(again, out, "the output")
            assert_same_bits(module.weight.grad, expected, "the gradient")
    # A weight that is not contiguous, as a transposed head leaves it.
    module.weight.data = noncontiguous_like(module.weight.detach())
    assert not module.weight.is_contiguous()
    assert_same_bits(entry.run(module), out, "the output")
    torch.testing.assert_close(entry.backward(module, up), expected)


def differentiate(check: Callable[..., bool], entry: Entry) -> None:
    module = entry.build()

    def out(weight: Tensor) -> Tensor:
        return entry.run(module)

    tolerance = entry.info.gradcheck_nondet_tol
    assert check(out, (module.weight,), nondet_tol=tolerance, fast_mode=True)


def check_grad(entry: Entry) -> None:
    differentiate(torch.autograd.gradcheck, entry)


def check_gradgrad(entry: Entry) -> None:
    assert entry.info.supports_gradgrad
    differentiate(torch.autograd.gradgradcheck, entry)


def check_full_backward_hooks(entry: Entry) -> None:
    module = entry.build()
    seen: list[str] = []
    handles = [
        module.register_full_backward_hook(lambda *_: seen.append("backward")),
        module.register_full_backward_pre_hook(lambda *_: seen.append("before backward")),
        module.register_forward_hook(lambda *_: seen.append("forward")),
    ]
    plain = entry.backward(entry.plain_twin())
    assert_same_bits(entry.backward(module), plain, "the gradient")
    assert seen == ["forward", "before backward", "backward"]
    for handle in handles:
        handle.remove()
    assert_same_bits(entry.backward(module), plain, "the gradient")


def check_functional(entry: Entry) -> None:
    module, given = entry.build(), entry.given.forward_input
    weight = torch.zeros_like(module.weight).requires_grad_()
    out = torch.func.functional_call(module, {"weight": weight}, given.args, given.kwargs)
    assert not out.any()
    out.sum().backward()
    assert_same_bits(weight.grad, entry.backward(module), "the gradient")


CHECKS = [
    check_forward,
    check_pickle,
    check_deepcopy,
    check_not_contiguous,
    check_grad,
    check_gradgrad,
    check_full_backward_hooks,
    check_functional,
]
# Left out: memory formats, which the database itself skips for embeddings; comparisons of two
# devices, which need a second one; and what is tested of tables with frozen rows too: dtypes,
# devices and keys in test_table_copies.py, arguments and the repr in test_table_constructor.py.
DOUBLE_ONLY = (check_grad, check_gradgrad)


def database_cases() -> list[Any]:
    made = []
    for info in infos():
        for check in CHECKS:
            for dtype in info.dtypes:
                if check in DOUBLE_ONLY and dtype != torch.float64:
                    continue  # derivatives by differences need double precision
                for training in (True, False):
                    for given in inputs_of(info, dtype, training):
                        mode = "training" if training else "eval"
                        dtype_name = str(dtype).removeprefix("torch.")
                        words = [info.module_cls.__name__, check.__name__, dtype_name, mode]
                        name = "-".join([*words, given.desc or "plain"])
                        entry = Entry(info, given, dtype, training)
                        made.append(pytest.param(check, entry, id=name))
    return made


DATABASE = database_cases()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # said of all embeddings
@pytest.mark.parametrize(("check", "entry"), DATABASE)
def test_checks_of_the_module_database_hold(
    check: Callable[[Entry], None],
    entry: Entry,
    record_property: Callable[[str, object], None],
    request: pytest.FixtureRequest,
) -> None:
    check(entry)
    record_property(KIND, request.node.callspec.id)


def error_cases() -> list[Any]:
    made = []
    for info in infos():
        for position, error in enumerate(
            info.module_error_inputs_func(
                info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
            )
        ):
            where = "constructor" if is_raised_by_constructor(error) else "forward"
            name = f"{info.module_cls.__name__}-{where}-{error.error_type.__name__}-{position}"
            made.append(pytest.param(info, error, id=name))
    return made


def is_raised_by_constructor(error: ErrorModuleInput) -> bool:
    return bool(error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR)


ERRORS = error_cases()


@pytest.mark.parametrize(("info", "error"), ERRORS)
def test_errors_of_the_module_database_are_raised(
    info: ModuleInfo,
    error: ErrorModuleInput,
    record_property: Callable[[str, object], None],
    request: pytest.FixtureRequest,
) -> None:
    entry = Entry(info, error.module_error_input)
    if is_raised_by_constructor(error):
        with pytest.raises(error.error_type, match=error.error_regex):
            entry.build()
    else:
        module = entry.build()
        with pytest.raises(error.error_type, match=error.error_regex):
            entry.run(module)
    record_property(KIND, request.node.callspec.id)


# The older list: torch checks these itself, all we give it is how to call a module


class Runner(NNTestCase):
    """What `NewModuleTest` asks of a test case: torch defines it in its own test files."""

    def runTest(self) -> None:  # noqa: N802  # unittest's name
        """Make an instance possible."""

    def _forward(self, module: nn.Module, inputs: Any) -> Tensor:
        out: Tensor = module(*inputs) if isinstance(inputs, tuple) else module(inputs)
        return out

    def _backward(
        self, module: nn.Module, inputs: Any, out: Tensor, up: Tensor, create_graph: bool = False
    ) -> None:
        out.backward(up, retain_graph=True, create_graph=create_graph)

    def _get_parameters(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor | None]]:
        parameters: list[Tensor] = list(module.parameters())
        return parameters, [parameter.grad for parameter in parameters]

    def _zero_grad_parameters(self, module: nn.Module) -> None:
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()

    def _zero_grad_input(self, inputs: Any) -> None:
        """Ids have no gradient."""


def listed_tests() -> list[Any]:
    """The entries for embeddings, as torch's own test files turn them into tests."""
    made = []
    for entry in get_new_module_tests():
        name = entry.get("module_name") or entry.get("fullname", "")
        if not name.startswith("Embedding"):
            continue
        options = {key: value for key, value in entry.items() if key != "decorator"}
        module_name = options.pop("module_name", None)
        label = "-".join(filter(None, [name, entry.get("desc")]))
        made.append(pytest.param(module_name, options, id=label))
    return made


LISTED = listed_tests()


@pytest.mark.parametrize(("module_name", "options"), LISTED)
def test_listed_module_tests_of_torch_hold(
    module_name: str | None,
    options: dict[str, Any],
    record_property: Callable[[str, object], None],
    request: pytest.FixtureRequest,
) -> None:
    made: list[nn.Module] = []

    def observed(kind: type[nn.Module]) -> Callable[..., nn.Module]:
        def make(*args: Any, **given: Any) -> nn.Module:
            made.append(kind(*args, **given))
            return made[-1]

        return make

    torch.manual_seed(0)
    with ExitStack() as stack:
        # The entries name the classes as `nn.Embedding`, some inside a lambda.
        for theirs, ours in STAND_INS.items():
            stack.enter_context(patch.object(nn, theirs.__name__, observed(ours)))
        if module_name is not None:
            options = {**options, "constructor": getattr(nn, module_name)}
            options.setdefault("fullname", module_name)
        NewModuleTest(**options)(Runner())
    assert made, "the entry made no module of ours"
    assert all(isinstance(module, PartialEmbedding | PartialEmbeddingBag) for module in made)
    record_property(KIND, request.node.callspec.id)


def test_counts_of_checks_do_not_shrink_unseen() -> None:
    # 2 inputs in training and in eval mode: 6 checks in 2 dtypes, and 2 in double precision.
    assert len(infos()) == 1
    assert len(DATABASE) >= (6 * 2 + 2) * 2 * 2
    assert len(ERRORS) >= 3
    assert len(LISTED) >= 11
    names = [param.id for param in (*DATABASE, *ERRORS, *LISTED)]
    assert len(names) == len(set(names))
