"""Every optimizer of torch with every set of options that torch's own tests try, as data.

The table is read from `optim_db`, which torch keeps for its own tests, so that a new optimizer or a
new option is tested here as soon as torch tests it. What can't run on a CPU is left out for a
stated reason, and `test_what_is_left_out_cannot_run` shows that the reason holds.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import OptimizerInfo, optim_db

# These look at the whole matrix, so a row's fate depends on the rows beside it.
WHOLE_MATRIX = ("Adafactor", "Muon", "LBFGS")

# How a step is carried out: what the user gets by default, and what can be asked for.
IMPLEMENTATIONS: dict[str, dict[str, bool]] = {
    "": {},
    "foreach": {"foreach": True},
    "forloop": {"foreach": False, "fused": False},
    "fused": {"fused": True},
}


def spell(value: object) -> str:
    """An option's value without blanks, short enough for the name of a test."""
    if isinstance(value, torch.Tensor):
        return f"tensor({value.item():.4g})"
    if isinstance(value, tuple):
        return "(" + ",".join(spell(part) for part in value) + ")"
    return str(value)


@dataclass(frozen=True)
class Case:
    """One optimizer with one set of options and one way to carry out the step."""

    optimizer: type[torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    implementation: str = ""

    @property
    def name(self) -> str:
        return self.optimizer.__name__

    @property
    def id(self) -> str:
        words = [self.name]
        words += [k if v is True else f"{k}={spell(v)}" for k, v in self.options.items()]
        return "-".join([*words, *([self.implementation] if self.implementation else [])])

    @property
    def element_wise(self) -> bool:
        """Whether each element of a parameter evolves without regard to the others."""
        return self.name not in WHOLE_MATRIX

    @property
    def one_history(self) -> bool:
        """Whether all parameters share one state (and the step needs a closure)."""
        return self.name == "LBFGS"

    @property
    def sparse_only(self) -> bool:
        """Whether the stock optimizer takes sparse gradients and no others."""
        return self.name == "SparseAdam"

    @property
    def matrices_only(self) -> bool:
        """Whether the stock optimizer refuses a bias."""
        return self.name == "Muon"

    @property
    def fused(self) -> bool:
        return self.implementation == "fused"

    def make(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        """Build the optimizer. A learning rate that is a tensor is never shared between two."""
        options = copy.deepcopy(self.options) | self.implementation_options
        return self.optimizer(parameters, **options)

    @property
    def implementation_options(self) -> dict[str, Any]:
        options: dict[str, Any] = dict(IMPLEMENTATIONS[self.implementation])
        if self.one_history:
            options["max_iter"] = 5  # each is a pass and a backward pass, and 20 show no more
        if "fused" not in self.optimizer.__init__.__code__.co_varnames:
            options.pop("fused", None)
        return options


@dataclass(frozen=True)
class LeftOut:
    """A configuration that torch itself can't run on a CPU, and why."""

    case: Case
    extra: dict[str, bool]
    reason: str

    @property
    def id(self) -> str:
        return "-".join([self.case.id, *(k for k in self.extra if k not in self.case.options)])


def _implementations_of(info: OptimizerInfo, device: str) -> list[str]:
    names = [""]
    if "foreach" in info.supported_impls:
        names += ["foreach", "forloop"]
    if "fused" in info.supported_impls and device in info.supports_fused_on:
        names.append("fused")
    return names


def _cases_on(device: str) -> dict[str, Case]:
    """What `optim_db` knows of a kind of device, by name."""
    cases = [
        Case(info.optim_cls, entry.kwargs, implementation)
        for info in optim_db
        for entry in info.optim_inputs_func(device=device)
        for implementation in _implementations_of(info, device)
    ]
    return {case.id: case for case in cases}


def _read() -> tuple[list[Case], list[LeftOut]]:
    """Sort what `optim_db` knows into what runs on a CPU and what doesn't."""
    left_out: dict[str, LeftOut] = {}
    for info in optim_db:
        # Asked for "cuda", the table adds the options that only an accelerator takes.
        for entry in info.optim_inputs_func(device="cuda"):
            if entry.kwargs.get("capturable"):
                case = Case(info.optim_cls, entry.kwargs)
                left_out[case.id] = LeftOut(case, {}, "capturable needs an accelerator")
        for entry in info.optim_inputs_func(device="cpu"):
            if "differentiable" in info.supported_impls:
                one = LeftOut(
                    Case(info.optim_cls, entry.kwargs),
                    {"differentiable": True},
                    "a differentiable step can't write to a leaf, and a table is one",
                )
                left_out[one.id] = one
    return list(_cases_on("cpu").values()), list(left_out.values())


CASES, LEFT_OUT = _read()
# Each parameter has a state of its own, which LBFGS does not give it.
CASES_ON_GPU = [case for case in _cases_on("cuda").values() if not case.one_history]

# Beyond torch's table: learning rates and betas that are tensors, which it tries with `capturable`
# alone although a CPU takes them as well.
CASES += [
    Case(cls, {"lr": torch.tensor(0.01)}, implementation)
    for cls in (torch.optim.Adam, torch.optim.AdamW)
    for implementation in ("", "forloop", "fused")
]

# One case for each optimizer, with its defaults: for tests of something else than the options.
DEFAULTS = [case for case in CASES if not case.options and case.implementation == ""]
ELEMENT_WISE = [case for case in CASES if case.element_wise]


def case_of(name: str) -> Case:
    """The one case with this id."""
    (found,) = [case for case in CASES if case.id == name]
    return found


def by_id(case: Case) -> str:
    return case.id


# For tests that would take too long over every case.
MANY = [case for case in CASES if case.implementation in ("", "fused")]
FEW = [
    case_of(name)
    for name in (
        "AdamW-weight_decay=0.1-amsgrad",
        "AdamW-weight_decay=0.1-fused",
        "SGD-momentum=0.9-weight_decay=0.1",
        "Adagrad-initial_accumulator_value=0.1-weight_decay=0.1",
    )
]
GRADIENTS = {"sparse": True, "dense": False}
SPARSE_AND_DENSE = pytest.mark.parametrize("sparse", GRADIENTS.values(), ids=GRADIENTS)


def crossed(
    cases: Iterable[Case], *axes: Mapping[str, Any], each_option_with_all: bool = False
) -> list[Any]:
    """Every case with every value of every axis, of which most are run by `make test-full` alone.

    Always run are as few as hold each set of options, each way to carry out a step of each
    optimizer with each value of an axis, and each two values of two axes; where asked, also each
    set of options with each value of all of them.
    """
    # A stock SparseAdam raises on the gradient of a table with `sparse=False`.
    every = [
        (case, *keys)
        for case, *keys in product(cases, *axes)
        if not (case.sparse_only and "dense" in keys)
    ]
    facets = [set(_facets(*one, each_option_with_all=each_option_with_all)) for one in every]
    missing, always = set().union(*facets), set()
    for worth in range(max(map(len, facets)), 0, -1):
        for number, shown in enumerate(facets):
            if len(shown & missing) >= worth:
                always.add(number)
                missing -= shown
    return [
        pytest.param(
            case,
            *(axis[key] for axis, key in zip(axes, keys, strict=True)),
            id="-".join([case.id, *keys]),
            marks=[] if number in always else [pytest.mark.full],
        )
        for number, (case, *keys) in enumerate(every)
    ]


def _facets(case: Case, *keys: str, each_option_with_all: bool) -> Iterator[tuple[object, ...]]:
    """What one configuration shows."""
    options, values = Case(case.optimizer, case.options).id, list(enumerate(keys))
    way = ("way", case.name, case.implementation)
    yield ("options", options)
    yield way
    yield from combinations([way, *values], 2)
    if each_option_with_all:
        yield from (("options", options, value) for value in (way, *values))


def always_run(configurations: Iterable[Any]) -> list[Any]:
    """Those that `make test` runs."""
    return [one for one in configurations if not one.marks]


def can_run(case: Case, extra: dict[str, bool]) -> bool:
    """Whether the stock optimizer makes a step with these options on one small matrix."""
    weight = nn.Parameter(torch.ones(4, 5))
    weight.grad = torch.ones(4, 5).to_sparse(1) if case.sparse_only else torch.ones(4, 5)
    try:
        options = copy.deepcopy(case.options) | case.implementation_options | extra
        optimizer = case.optimizer([weight], **options)
        optimizer.step((lambda: weight.detach().sum()) if case.one_history else None)
    except (RuntimeError, ValueError, AssertionError):
        return False
    return True
