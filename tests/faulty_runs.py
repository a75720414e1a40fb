"""dpo.loop with something in its way, for test_faults.py: `torchrun -m faulty_runs FAULT`, and dpo.loop's options.

FAULT is slow, or what fails, in which process and when: "error 1 3" raises in process 1 after step 3, "full 0 2" finds
process 0 no room for the second checkpoint; "error 1 3 slow" is both.
"""

import errno
import os
import sys
import time

import torch.distributed.checkpoint as dcp

import dpo.checkpoint
import dpo.loop
from dpo.config import UserError

RANK = int(os.environ.get("RANK", 0))


def write_slowly() -> None:
    """Checkpoints are written while training goes on, and not by all processes in the same time."""
    dpo.checkpoint.AT_ONCE = 0.0
    write = dcp.FileSystemWriter.write_data

    def slow(*arguments):
        time.sleep(0.1 + 0.3 * RANK)
        return write(*arguments)

    dcp.FileSystemWriter.write_data = slow


def fail(kind: str, rank: int, step: int) -> None:
    """Something fails in one process, after so many steps."""

    def check(now: int) -> None:
        if rank == RANK and now == step:
            raise {"error": ZeroDivisionError("a callback's own"), "refused": UserError("row 7 is odd")}[kind]

    before = dpo.loop.train_step

    def train_step(run, *arguments):
        check(run.state.step)
        return before(run, *arguments)

    dpo.loop.train_step = train_step


def fill_disk(rank: int, number: int) -> None:
    """From the checkpoint of this number on one process finds no room for its share."""
    write, begun = dcp.FileSystemWriter.write_data, []

    def full(*arguments):
        begun.append(1)
        if rank == RANK and len(begun) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    dcp.FileSystemWriter.write_data = full


if __name__ == "__main__":
    fault, *where = sys.argv[1].split()
    if "slow" in (fault, *where):
        write_slowly()
    if fault in ("error", "refused"):
        fail(fault, int(where[0]), int(where[1]))
    if fault == "full":
        fill_disk(int(where[0]), int(where[1]))
    dpo.loop.main(sys.argv[2:])
