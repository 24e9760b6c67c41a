"""Runs the cases of a script in several processes; a script itself, started by `launch.py`.

Usage: run_forked.py SCRIPT FOLDER PROCESSES...

The processes are forked from one that has imported the script, since importing torch takes longer
than the cases. A script has `cases(processes, folder)`, which yields the name of each case and a
function; what that returns is written to `{folder}/{processes}/{case}-{rank}.pt`.
"""

import importlib
import multiprocessing
import os
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch
import torch._dynamo  # which DDP and FSDP load when they first wrap a model
from torch import distributed as dist


def run_cases(script: ModuleType, folder: Path, rank: int, number: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{number}"), number)
    minute = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=number, timeout=minute)
    for name, case in script.cases(number, folder):
        torch.save(case(), folder / str(number) / f"{name}-{rank}.pt")
    os._exit(0)  # threads of the process group may abort an interpreter that ends with them


def main(name: str, folder: Path, *numbers: int) -> None:
    script, fork = importlib.import_module(name), multiprocessing.get_context("fork")
    for number in numbers:
        (folder / str(number)).mkdir()
        processes = [
            fork.Process(target=run_cases, args=(script, folder, rank, number))
            for rank in range(number)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
