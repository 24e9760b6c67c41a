"""Runs the tests of a file in several processes; a script itself, started by `launch.py`.

Usage: run_forked.py FILE FOLDER

The processes are forked from one that has imported the file, since importing torch takes longer
than the tests. What went wrong in the test of a number is written to
`FOLDER/{processes}-{rank}-{test}`: nothing where all is well.
"""

import importlib
import multiprocessing
import os
import pickle
import sys
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch._dynamo  # which DDP and FSDP load when they first wrap a model
from torch import distributed as dist

Tests = list[tuple[str, dict[str, Any]]]


def run_tests(module: ModuleType, tests: Tests, folder: Path, rank: int, number: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{number}"), number)
    minute = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=number, timeout=minute)
    for index, (name, given) in enumerate(tests):
        test = getattr(module, name)
        if number not in test.numbers:
            continue
        said, goes_on = "", False
        try:
            test.__wrapped__(**given)
            goes_on = True
        except SystemExit:
            pass  # as if the process were killed there
        except BaseException as error:  # pytest, in another process, says it of this test
            told = traceback.TracebackException.from_exception(error, capture_locals=True)
            said = "".join(told.format())
        (folder / f"{number}-{rank}-{index}").write_text(said)
        if not goes_on:  # the others end where they wait for this one
            print(said, flush=True)  # for those that are no longer run
            os._exit(bool(said))
    with suppress(RuntimeError, ValueError):  # where a test has ended it, or its group
        dist.barrier()
    os._exit(0)  # threads of the process group may abort an interpreter that ends with them


def main(file: Path, folder: Path) -> None:
    sys.path.insert(0, str(file.parent))
    module, fork = importlib.import_module(file.stem), multiprocessing.get_context("fork")
    tests = pickle.loads((folder / "tests").read_bytes())
    numbers = dict.fromkeys(n for name, _ in tests for n in getattr(module, name).numbers)
    for number in numbers:
        processes = [
            fork.Process(target=run_tests, args=(module, tests, folder, rank, number))
            for rank in range(number)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
