"""Tests that run in several processes at once, which `run_forked.py` starts once for each file."""

import functools
import inspect
import pickle
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from once import failure_of, once
from oracle import same_bits
from torch import Tensor
from torch import distributed as dist

PROGRAM = Path(__file__).with_name("run_forked.py")
Test = Callable[..., None]
T = TypeVar("T")


def in_processes(*numbers: int) -> Callable[[Test], Test]:
    """Run a test in so many processes, one number after the other; it passes if it does in each.

    All such tests of a file that were selected run in the order of the file, and those of the
    number that comes first there before those of others. What they are given is plain data.
    """

    def decorate(case: Test) -> Test:
        def test(request: pytest.FixtureRequest, **given: Any) -> None:
            if not dist.is_available():
                pytest.skip("this torch was built without torch.distributed")
            tests = [
                item
                for item in request.session.items
                if item.path == request.path and hasattr(item.function, "numbers")
            ]
            factory = request.getfixturevalue("tmp_path_factory")
            folder = once(factory, request.path.stem, lambda made: run(made, request.path, tests))
            for number in numbers:
                for rank in range(number):
                    said = folder / f"{number}-{rank}-{tests.index(request.node)}"
                    assert said.exists(), f"it was not run: {(folder / 'said').read_text()}"
                    assert not said.read_text(), f"{rank} of {number}: {said.read_text()}"

        arguments = [
            inspect.signature(test).parameters["request"],
            *inspect.signature(case).parameters.values(),
        ]
        functools.update_wrapper(test, case)
        test.__signature__ = inspect.Signature(arguments)  # type: ignore[attr-defined]
        test.numbers = numbers  # type: ignore[attr-defined]
        return test

    return decorate


def run(folder: Path, file: Path, tests: list[Any]) -> str:
    callspecs = [getattr(item, "callspec", None) for item in tests]
    given = [
        (item.originalname, callspec.params if callspec else {})
        for item, callspec in zip(tests, callspecs, strict=True)
    ]
    (folder / "tests").write_bytes(pickle.dumps(given))
    (folder / "said").write_text(failure_of(PROGRAM, file, folder))
    return ""


# Within a test


def of_all(value: T) -> list[T]:
    """What each process has, in their order."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def processes() -> Any:
    """The mesh of all processes, side by side."""
    return dist.init_device_mesh("cpu", (dist.get_world_size(),))


def shared_folder() -> Path:
    """A folder that all processes of a file share."""
    return Path(sys.argv[2])


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def all_same(a: Iterable[dict[str, Tensor]], b: Iterable[dict[str, Tensor]]) -> bool:
    return all(same(one, other) for one, other in zip(a, b, strict=True))
