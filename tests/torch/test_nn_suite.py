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


def build(info: ModuleInfo, case: ModuleInput, training: bool = True, **factory: Any) -> nn.Module:
    torch.manual_seed(1)
    arguments = case.constructor_input
    module: nn.Module = info.module_cls(*arguments.args, **arguments.kwargs, **factory)
    assert isinstance(module, PartialEmbedding)
    return module.train(training)


def plain_twin(info: ModuleInfo, case: ModuleInput, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    parent = {ours: theirs for theirs, ours in STAND_INS.items()}[info.module_cls]
    arguments = case.constructor_input
    module: nn.Module = parent(*arguments.args, **arguments.kwargs, dtype=dtype)
    return module


def run(module: nn.Module, case: ModuleInput) -> Tensor:
    out: Tensor = module(*case.forward_input.args, **case.forward_input.kwargs)
    return out


def backward(module: nn.Module, case: ModuleInput, up: Tensor | None = None) -> Tensor:
    module.zero_grad()
    out = run(module, case)
    out.backward(torch.ones_like(out) if up is None else up)
    grad: Tensor = module.weight.grad
    return grad.clone()


def check_forward(info: ModuleInfo, case: ModuleInput, dtype: torch.dtype, training: bool) -> None:
    module = build(info, case, training, dtype=dtype)
    twin = plain_twin(info, case, dtype)
    out = run(module, case)
    assert_same_bits(out, run(twin, case), "the output")
    assert_same_bits(backward(module, case), backward(twin, case), "the gradient")
    if case.reference_fn is not None:
        reference = case.reference_fn(module, *case.forward_input.args, **case.forward_input.kwargs)
        torch.testing.assert_close(out, reference)


def check_factory_arguments(
    info: ModuleInfo, case: ModuleInput, dtype: torch.dtype, training: bool
) -> None:
    for device in ("cpu", "meta"):
        module = build(info, case, training, device=device, dtype=dtype)
        held = [*module.parameters(), *module.buffers()]
        assert [tensor.device.type for tensor in held] == [device]
        assert [tensor.dtype for tensor in held] == [dtype]


def check_device_context(
    info: ModuleInfo, case: ModuleInput, dtype: torch.dtype, training: bool
) -> None:
    with torch.device("meta"):
        module = build(info, case, training, dtype=dtype)
    assert {p.device.type for p in module.parameters()} == {"meta"}


def check_to_empty(info: ModuleInfo, case: ModuleInput, dtype: torch.dtype, training: bool) -> None:
    module = build(info, case, training, device="meta", dtype=dtype)
    parameters = list(module.parameters())
    module.to_empty(device="meta")
    assert all(old is new for old, new in zip(parameters, module.parameters(), strict=True))
    module.to_empty(device="cpu")
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    assert run(module, case).shape == run(build(info, case), case).shape


def check_to(info: ModuleInfo, case: ModuleInput, dtype: torch.dtype, training: bool) -> None:
    module = build(info, case, training, dtype=dtype)
    weight, start = module.weight, module.weight.detach().clone()
    for target in (torch.float16, torch.bfloat16, torch.float64, dtype):
        assert module.to(target) is module
        assert module.weight is weight
        assert module.weight.dtype == target
        assert run(module, case).dtype == target
    module.weight.data.copy_(start)
    assert_same_bits(module.to("cpu").weight, start, "the weight")


def check_pickle(info: ModuleInfo, case: ModuleInput, dtype: torch.dtype, training: bool) -> None:
    module = build(info, case, training, dtype=dtype)
    with freeze_rng_state():
        out = run(module, case)
    loaded = pickle.loads(pickle.dumps(module))
    assert loaded.training == training
    with freeze_rng_state():
        assert_same_bits(run(loaded, case), out, "the output")


def check_deepcopy(info: ModuleInfo, case: ModuleInput, dtype: torch.dtype, training: bool) -> None:
    module = build(info, case, training, dtype=dtype)
    copied = copy.deepcopy(module)
    assert_same_bits(backward(copied, case), backward(module, case), "the gradient")
    copied.weight.data.zero_()
    assert module.weight.any()


def check_repr(info: ModuleInfo, case: ModuleInput, dtype: torch.dtype, training: bool) -> None:
    module = build(info, case, training, dtype=dtype)
    plain = repr(plain_twin(info, case, dtype))
    assert str(module) == repr(module) == plain.removesuffix(")") + ", trainable_rows=4)"


def check_state_dict(
    info: ModuleInfo, case: ModuleInput, dtype: torch.dtype, training: bool
) -> None:
    module = build(info, case, training, dtype=dtype)
    twin = plain_twin(info, case, dtype)
    assert list(module.state_dict()) == list(twin.state_dict())
    for source, target in ((module, twin), (twin, module)):
        with torch.no_grad():
            target.weight.zero_()
        target.load_state_dict(source.state_dict(), strict=True)
        assert_same_bits(run(target, case), run(source, case), "the output")


def check_not_contiguous(
    info: ModuleInfo, case: ModuleInput, dtype: torch.dtype, training: bool
) -> None:
    module = build(info, case, training, dtype=dtype)
    (ids,) = case.forward_input.args
    up = torch.randn(*ids.shape, module.embedding_dim, dtype=dtype)
    expected = backward(module, case, up)
    out = run(module, case)
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
    assert_same_bits(run(module, case), out, "the output")
    torch.testing.assert_close(backward(module, case, up), expected)


def differentiate(
    check: Callable[..., bool], info: ModuleInfo, case: ModuleInput, training: bool
) -> None:
    module = build(info, case, training, dtype=torch.float64)

    def out(weight: Tensor) -> Tensor:
        return run(module, case)

    assert check(out, (module.weight,), nondet_tol=info.gradcheck_nondet_tol, fast_mode=True)


def check_grad(info: ModuleInfo, case: ModuleInput, dtype: torch.dtype, training: bool) -> None:
    differentiate(torch.autograd.gradcheck, info, case, training)


def check_gradgrad(info: ModuleInfo, case: ModuleInput, dtype: torch.dtype, training: bool) -> None:
    assert info.supports_gradgrad
    differentiate(torch.autograd.gradgradcheck, info, case, training)


def check_training_and_eval(
    info: ModuleInfo, case: ModuleInput, dtype: torch.dtype, training: bool
) -> None:
    module = build(info, case, training, dtype=dtype)
    out = run(module, case)
    module.train(not training)
    assert module.training != training
    assert not info.train_and_eval_differ
    assert_same_bits(run(module, case), out, "the output")


def check_full_backward_hooks(
    info: ModuleInfo, case: ModuleInput, dtype: torch.dtype, training: bool
) -> None:
    module = build(info, case, training, dtype=dtype)
    seen: list[str] = []
    handles = [
        module.register_full_backward_hook(lambda *_: seen.append("backward")),
        module.register_full_backward_pre_hook(lambda *_: seen.append("before backward")),
        module.register_forward_hook(lambda *_: seen.append("forward")),
    ]
    plain = backward(plain_twin(info, case, dtype), case)
    assert_same_bits(backward(module, case), plain, "the gradient")
    assert seen == ["forward", "before backward", "backward"]
    for handle in handles:
        handle.remove()
    assert_same_bits(backward(module, case), plain, "the gradient")


def check_functional(
    info: ModuleInfo, case: ModuleInput, dtype: torch.dtype, training: bool
) -> None:
    module = build(info, case, training, dtype=dtype)
    weight = torch.zeros_like(module.weight).requires_grad_()
    arguments = case.forward_input
    out = torch.func.functional_call(module, {"weight": weight}, arguments.args, arguments.kwargs)
    assert not out.any()
    out.sum().backward()
    assert_same_bits(weight.grad, backward(module, case), "the gradient")


CHECKS = [
    check_forward,
    check_factory_arguments,
    check_device_context,
    check_to_empty,
    check_to,
    check_pickle,
    check_deepcopy,
    check_repr,
    check_state_dict,
    check_not_contiguous,
    check_grad,
    check_gradgrad,
    check_training_and_eval,
    check_full_backward_hooks,
    check_functional,
]
# Left out: memory formats, which the database itself skips for embeddings, and comparisons of two
# devices, which need a second one.
DOUBLE_ONLY = (check_grad, check_gradgrad)


def database_cases() -> list[Any]:
    made = []
    for info in infos():
        for check in CHECKS:
            for dtype in info.dtypes:
                if check in DOUBLE_ONLY and dtype != torch.float64:
                    continue  # derivatives by differences need double precision
                for training in (True, False):
                    for case in inputs_of(info, dtype, training):
                        mode = "training" if training else "eval"
                        dtype_name = str(dtype).removeprefix("torch.")
                        words = [info.module_cls.__name__, check.__name__, dtype_name, mode]
                        name = "-".join([*words, case.desc or "plain"])
                        made.append(pytest.param(info, check, case, dtype, training, id=name))
    return made


DATABASE = database_cases()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # said of all embeddings
@pytest.mark.parametrize(("info", "check", "case", "dtype", "training"), DATABASE)
def test_checks_of_the_module_database_hold(
    info: ModuleInfo,
    check: Callable[..., None],
    case: ModuleInput,
    dtype: torch.dtype,
    training: bool,
    record_property: Callable[[str, object], None],
    request: pytest.FixtureRequest,
) -> None:
    check(info, case, dtype, training)
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
    case = error.module_error_input
    if is_raised_by_constructor(error):
        with pytest.raises(error.error_type, match=error.error_regex):
            build(info, case)
    else:
        module = build(info, case)
        with pytest.raises(error.error_type, match=error.error_regex):
            run(module, case)
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
    # 2 inputs in training and in eval mode: 13 checks in 2 dtypes, and 2 in double precision.
    assert len(infos()) == 1
    assert len(DATABASE) >= (13 * 2 + 2) * 2 * 2
    assert len(ERRORS) >= 3
    assert len(LISTED) >= 11
    names = [param.id for param in (*DATABASE, *ERRORS, *LISTED)]
    assert len(names) == len(set(names))
