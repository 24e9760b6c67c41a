"""Forks the ranks of a run from one process that has imported all that they need."""

import os
import socket
import sys
import traceback
from collections.abc import Callable

from pytorch_lightning.utilities import rank_zero_only


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def in_processes(processes: int, run: Callable[[int], None]) -> list[int]:
    """Fork, run, and wait; the exit codes, negative for a signal."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), NODE_RANK="0")
    children = []
    for rank in range(processes):
        if (child := os.fork()) == 0:
            if processes > 1:
                os.environ["LOCAL_RANK"] = str(rank)
                rank_zero_only.rank = rank  # which Lightning reads when it is imported
            try:
                run(rank)
            except BaseException:  # a forked child must end here, and not go on as its parent
                traceback.print_exc()
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
