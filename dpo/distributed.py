"""One process or many: torchrun's variables become a World, and the loop's few collectives work on both."""

import ctypes
import datetime
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from dpo import sharding


class World(NamedTuple):
    """Which process this is (rank of size), the device that it computes on, and how long it waits for another."""

    rank: int
    size: int
    device: torch.device
    timeout: datetime.timedelta | None = None


def setup(*, use_cpu: bool = False, backend: str | None = None, timeout: int = 1800, shards: bool = False) -> World:
    """Joins the other processes that torchrun started, if any. Without torchrun: a world of one, which shards, too."""
    size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    gpu = torch.cuda.is_available() and not use_cpu
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        PR_SET_PDEATHSIG = 1  # prctl's; when torchrun is gone, nobody would stop this process
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if gpu:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if (size > 1 or shards) and not dist.is_initialized():
        of_devices = "cpu:gloo,cuda:nccl" if shards else "nccl"  # shards may be kept in the host's memory
        backend = backend or (of_devices if gpu else "gloo")
        alone = {} if size > 1 else {"store": dist.TCPStore("localhost", 0, 1, True), "rank": 0, "world_size": 1}
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout), **alone)
    return World(int(os.environ.get("RANK", 0)), size, device, datetime.timedelta(seconds=timeout))


@cache
def group_of_threads(_processes: dist.ProcessGroup, timeout: datetime.timedelta | None) -> dist.ProcessGroup:
    """A second group of all processes, of their hosts, for what goes on in the background: no collective of the
    training's may come in between. It is as patient: the end of a process waits for its threads."""
    return dist.new_group(backend="gloo", timeout=timeout)


def keep_freed_memory() -> None:
    """On a CPU a step's large buffers come and go, and the C library gives each back to the system, which then has to
    make its pages anew: a seventh of a step's time. From here on it keeps what is freed, unless the environment has
    settings of its own (MALLOC_..., GLIBC_TUNABLES)."""
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc's
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def lay_out(
    model: torch.nn.Module,
    world: World,
    *,
    trains: bool,
    find_unused_parameters: bool = False,
    shards: dict | None = None,
) -> torch.nn.Module:
    """A model, on its device, as the processes share it: the one rule for policy and reference, decided here and
    nowhere else. Each process holds all of both, and DDP averages the gradients of the one that trains; or each holds
    a share, laid out by `sharding.shard` with the options that shards has."""
    if shards is not None:
        return sharding.shard(model, world.device, **shards)
    model.to(world.device)
    if world.size == 1 or not trains:
        return model
    # Without device_ids: batches are on the device already, and what of them is to stay off it does.
    return DistributedDataParallel(model, find_unused_parameters=find_unused_parameters)


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """A model of the caller's without what shares it among devices: `lay_out` does that."""
    return model.module if isinstance(model, DistributedDataParallel | torch.nn.DataParallel) else model


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside what `lay_out` and torch.compile wrapped around it."""
    while isinstance(model, DistributedDataParallel | OptimizedModule):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    return model


def let_go(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """After the last step: a model in shards may be too large to be gathered beside its moments, no longer needed."""
    if sharding.is_sharded(model):
        optimizer.state.clear()


def synchronize_gradients(model: torch.nn.Module, now: bool):
    """Context of a backward pass: copies of a model average gradients over the processes in a window's last one only
    (shards, to keep none whole, in each)."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not now else nullcontext()


def clip_gradients(parameters: list[torch.nn.Parameter], most: float) -> torch.Tensor:
    """Scales gradients down to a norm of at most so much, over all of a model that is in shards, too. Returns: the norm
    before that."""
    norm = sharding.whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


def sum_over_ranks(values: dict[str, float | torch.Tensor], world: World) -> dict[str, float]:
    """Adds up each value over all processes, in float64; every process must pass the same keys in the same order."""
    as_numbers = {"dtype": torch.float64, "device": world.device}
    totals = torch.stack([torch.as_tensor(value, **as_numbers) for value in values.values()])
    if world.size > 1:
        dist.all_reduce(totals)
    return dict(zip(values, totals.tolist(), strict=True))


def mean_over_ranks(sums: dict, world: World) -> dict[str, float]:
    """Sums over pairs, with their number as "pairs", to means over all pairs of all processes. "tokens" stays a sum and
    comes per second as well where there are "seconds"; so do "unique_tokens", and "best_seconds" as a share of them."""
    totals = sum_over_ranks(sums, world)
    pairs, seconds, tokens = totals.pop("pairs"), totals.pop("seconds", 0.0) / world.size, totals.pop("tokens")
    rates = {"tokens_per_second": tokens, "unique_tokens_per_second": totals.pop("unique_tokens", None)}
    rates["utilisation"] = best / world.size if (best := totals.pop("best_seconds", None)) is not None else None
    rates = {key: total / seconds for key, total in rates.items() if seconds and total is not None}
    return {key: total / pairs for key, total in totals.items()} | rates | {"tokens": tokens}


def by_first(action: Callable, world: World):
    """What action returns in the first process, given to all; a ValueError that it raises there is raised in all, which
    would else wait for an answer that never comes."""
    result = None
    if world.rank == 0:
        try:
            result = action()
        except ValueError as error:
            result = error
    result = from_first(result, world)
    if isinstance(result, ValueError):
        raise result
    return result


def gather_rows(values: dict[str, torch.Tensor], world: World) -> tuple[dict[str, torch.Tensor], int]:
    """The (n, ...) tensors of all processes, each with its own n, concatenated in the order of ranks, without gradient;
    and where this process's own begin."""
    values = {name: value.detach() for name, value in values.items()}
    if world.size == 1:
        return values, 0
    parts = gather_lists([{name: value.cpu() for name, value in values.items()}], world)
    start = sum(len(next(iter(part.values()))) for part in parts[: world.rank])
    return {name: torch.cat([part[name] for part in parts]).to(world.device) for name in values}, start


def gather_lists(values: list, world: World) -> list:
    """The lists of all processes as one, in the order of their ranks."""
    if world.size == 1:
        return values
    gathered = [None] * world.size
    dist.all_gather_object(gathered, values)
    return [value for part in gathered for value in part]


def gather_numbers(values: list[int], world: World) -> list[list[int]]:
    """The whole numbers of all processes, equally many each, in the order of their ranks."""
    if world.size == 1:
        return [values]
    own = torch.tensor(values, device=world.device)
    gathered = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(gathered, own)
    return torch.stack(gathered).tolist()


def from_first(value, world: World):
    """The first process's value, in all of them."""
    return gather_lists([value], world)[0]


@contextmanager
def noted_signals(noted: list[int]):
    """Inside, SIGTERM, SIGHUP and Ctrl-C are noted instead of obeyed: the list gets their numbers.
    A second one, later than torchrun's passing on of the first, ends the process at once."""
    noted_at = time.monotonic()  # of one noted in the epoch before, to which a second one may still belong

    def note(number, _frame):
        nonlocal noted_at
        if noted and time.monotonic() - noted_at > 1.0:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        noted_at = noted_at if noted else time.monotonic()
        noted.append(number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agree(noted: list[int], world: World) -> int:
    """The signal that any process has noted, in all of them; 0 for none."""
    own = noted[0] if noted else 0
    if world.size == 1:  # nothing to wait for: this is asked before each step
        return own
    number = torch.tensor(own, device=world.device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)


def ignore_signals(_worker: int = 0) -> None:
    """For the loader's workers, which get a terminal's Ctrl-C, too: they end when the process that they serve does."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()


@contextmanager
def first_process_first(world: World):
    """The first process goes through the block before the others, which then find its files in the cache."""
    if world.rank > 0:
        barrier(world)
    try:
        yield
    finally:
        if world.rank == 0:
            barrier(world)


def is_of_another(error: RuntimeError) -> bool:
    """Whether this is how gloo or NCCL tell that another process has ended, which tells itself why."""
    return re.search(r"(closed|reset) by peer|Broken pipe|remote process exited", str(error)) is not None


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def shutdown() -> None:
    if dist.is_initialized():
        # A thread of gloo's may be about to let go of its last work, for which it needs Python's lock; the end of the
        # process holds that lock and waits for the thread. Seen once: neither ever went on.
        time.sleep(0.2)
        dist.destroy_process_group()
