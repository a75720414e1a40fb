"""checkpoint-N/: the model after N steps and all that a run needs to go on as if it had never stopped."""

import copy
import logging
import math
import random
import warnings
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from dpo import files
from dpo.distributed import World, barrier, by_first, gather_lists, group_of_threads, unwrap
from dpo.models import not_finite
from dpo.rows import first_line
from dpo.sharding import gather, is_sharded

logger = logging.getLogger("dpo")
# A run of one process has no group: that is no news.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
SHARDS = "state"  # the folder in a checkpoint that torch.distributed.checkpoint writes
# How a step's pairs are shared out, which changes where a run goes on with another number of processes.
OF_PROCESSES = ("processes", "per_device_train_batch_size", "gradient_accumulation_steps")
AT_ONCE = 2.0  # seconds: what is written faster is waited for, so that whatever comes next finds it


@dataclass
class TrainingState:
    """How far a run has come, in this process: what a checkpoint keeps beside models, optimizer and random numbers.

    Args: step, optimizer steps taken; tokens_seen, by the policy, up to the last metrics row; best, {"step", "value"}
    of the best evaluation; sums, of metrics over this process's pairs since the last metrics row; bco_sum and
    bco_count, of all rewards so far, chosen and rejected, in all processes; stream, the place in a streamed training
    set behind the last step's rows (see stream.py).
    """

    step: int = 0
    tokens_seen: float = 0.0
    best: dict | None = None
    sums: dict[str, float | torch.Tensor] = field(default_factory=lambda: defaultdict(float))
    bco_sum: float = 0.0
    bco_count: float = 0.0
    stream: dict | None = None

    @property
    def bco_delta(self) -> float:
        """δ of the BCO loss: the mean of all rewards so far."""
        return self.bco_sum / max(self.bco_count, 1.0)

    def state_dict(self) -> dict:
        return {**vars(self), "sums": {key: float(value) for key, value in self.sums.items()}}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state, sums=defaultdict(float, state["sums"]))


def save_model(directory: Path, world: World, model: torch.nn.Module, processing_class) -> None:
    """The model (safetensors; an adapter alone for PEFT) and its tokenizer, loadable with from_pretrained. Every
    process takes part; the first one writes. Raises: ValueError if a weight is not finite: it would be saved as if it
    were good."""
    weights = exported(model, world, copy=False)
    if world.rank == 0:
        write_model(directory, model, weights, processing_class, adapter=getattr(model, "active_adapter", None))
    barrier(world)


def exported(model: torch.nn.Module, world: World, *, copy: bool) -> dict[str, torch.Tensor]:
    """The weights that `write_model` writes, whole, in the first process; all have to ask. Of a model with an adapter
    those that train, and the embeddings, which may have grown. Raises: ValueError as `save_model` does."""
    if broken := [name for name in gather_lists([not_finite(model)], world) if name]:
        raise ValueError(f"the weights of {broken[0]} are not finite: lower learning_rate")
    own = unwrap(model)
    if not isinstance(model, PeftModel):
        named = own.state_dict(keep_vars=True)
    else:
        layers = (own.get_input_embeddings(), own.get_output_embeddings())
        tables = {id(p) for layer in layers if layer is not None for p in layer.parameters()}
        named = {
            name: value
            for name, value in own.state_dict(keep_vars=True).items()
            if isinstance(value, torch.Tensor)
            and (value.requires_grad or id(value) in tables or own.active_adapter in name.split("."))
        }
    return gather(named, keep=world.rank == 0, copy=copy)


def write_model(
    directory: Path, model: torch.nn.Module, weights: dict[str, torch.Tensor], processing_class, *, adapter: str | None
) -> None:
    """Writes a model with the weights that `exported` gave, and its tokenizer; of its adapters the one that trains."""
    own = unwrap(model)
    if isinstance(model, PeftModel):
        model.save_pretrained(directory, state_dict=weights, selected_adapters=[adapter])  # not that of the reference
    elif hasattr(type(own), "save_pretrained"):
        own.save_pretrained(directory, state_dict=weights)
    else:  # a module of the caller's own: its weights by their names
        directory.mkdir(parents=True, exist_ok=True)
        once = {id(value): (name, value) for name, value in reversed(weights.items())}  # a tied one has several names
        named = {name: value.contiguous() for name, value in reversed(once.values())}
        safetensors.torch.save_file(named, directory / "model.safetensors", {"format": "pt"})
    if isinstance(model, PeftModel) and (directory / adapter).is_dir():
        # PEFT puts an adapter that has a name into a folder of its own, where nothing looks for it.
        for path in (directory / adapter).iterdir():
            path.rename(directory / path.name)
        (directory / adapter).rmdir()
    processing_class.save_pretrained(directory)


@dataclass
class Saving:
    """A checkpoint on its way to the disk. written, this process's part of it; in the first process it ends when the
    checkpoint has its name."""

    directory: Path
    written: Future
    best: int | None  # the step of the best model as this one knows it


def begin_checkpoint(
    directory: Path,
    world: World,
    *,
    model,
    processing_class,
    state,
    optimizer,
    reference,
    plain: dict,
    same_run: dict,
    only_model: bool,
) -> Saving:
    """Copies what checkpoint-N will hold, and lets threads write it while training goes on: whole or not at all (see
    `files.begin_aside`). state/, by torch.distributed.checkpoint, has the tensors to go on from, each process's share;
    state.pt all that is no tensor of the model's or the optimizer's, of every process; beside them the model itself.

    Args: state, this process's; plain, whatever else has a state_dict, by name; same_run, what a run must have in
    common with this one to go on from here; only_model, save nothing to go on from but the weights.
    """
    weights, own = exported(model, world, copy=True), {"state": state.state_dict(), "random": _random_states()}
    tensors, small = to_go_on(model, optimizer, reference)
    if only_model:
        tensors = {"model": tensors["model"]}
    if world.rank > 0 and not is_sharded(model):  # all have the same: the first one's copy will do
        tensors = {}
    unfinished = by_first(lambda: files.begin_aside(directory), world)
    small = {"optimizer": small, "same_run": same_run, "ranks": gather_lists([own], world)}
    small |= {key: each.state_dict() for key, each in plain.items()}
    small = copy.deepcopy(small)
    adapter = getattr(model, "active_adapter", None)  # now: a reference switches to its own for a moment
    shards = dcp.async_save(tensors, **_at(unfinished, world))

    def finish() -> None:
        try:
            write_model(unfinished, model, weights, processing_class, adapter=adapter)
            if not only_model:
                torch.save(small, unfinished / "state.pt")
        finally:
            wait([shards])  # what fails is removed: by then nobody may write to it any more
        shards.result()
        files.end_aside(unfinished, directory)

    best = state.best and state.best["step"]
    saving = Saving(directory, in_background(finish) if world.rank == 0 else shards, best)
    if world.rank == 0:
        wait([saving.written], timeout=AT_ONCE)
    return saving


def end_checkpoint(saving: Saving, world: World) -> None:
    """Waits for a checkpoint, in all processes. Raises: ValueError, in all of them, if it could not be written."""
    if world.rank > 0:
        saving.written.exception()
    by_first(lambda: result_of(saving), world)


def result_of(saving: Saving) -> None:
    """In the first process: waits for a checkpoint. Raises: ValueError in one line if it could not be written."""
    try:
        saving.written.result()
    except (Exception, CheckpointException) as error:  # a full disk is an OSError, torch's own, or safetensors'
        files.remove_aside(saving.directory)
        raise ValueError(f"{saving.directory} could not be written: {what_failed(error)}") from error


def what_failed(error: BaseException) -> str:
    """The words of an error in one line; of one that torch.distributed.checkpoint has gathered (it is no Exception,
    and its first line says nothing) those of the first process that had one."""
    if not isinstance(error, CheckpointException) or not error.failures:
        return first_line(error)
    rank, (first, _) = min(error.failures.items(), key=lambda failure: failure[0])
    return f"{first_line(first)} (process {rank})" if dist.is_initialized() else first_line(first)


def in_background(work: Callable) -> Future:
    pool = ThreadPoolExecutor(max_workers=1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future


def to_go_on(model: torch.nn.Module, optimizer, reference) -> tuple[dict[str, dict], dict]:
    """(the tensors that a run goes on from, of the model those that training changes, under names that no layout of
    processes changes; what else the optimizer has)."""
    of_optimizer = get_optimizer_state_dict(unwrap(model), optimizer)
    state, small = {}, {"param_groups": of_optimizer["param_groups"], "state": {}}
    for name, values in of_optimizer["state"].items():
        state |= {f"{name}/{key}": value for key, value in values.items() if isinstance(value, torch.Tensor)}
        small["state"][name] = {key: value for key, value in values.items() if not isinstance(value, torch.Tensor)}
    small["tensors"] = list(state)
    return {"model": changing(model), "optimizer": state, "reference": reference.state_dict()}, small


def changing(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What training may change of a model, by name: the parameters that train, and the buffers that are saved."""
    own = unwrap(model)
    kept = own.state_dict().keys()
    trained = {name: p for name, p in own.named_parameters() if p.requires_grad}
    return trained | {name: buffer for name, buffer in own.named_buffers() if name in kept}


def load_checkpoint(
    directory: Path, world: World, *, model, state: TrainingState, optimizer, reference, plain: dict, same_run: dict
) -> None:
    """Puts what the checkpoint saved into model, optimizer, reference, state and plain; and its random states in force,
    if it is of as many processes as there are now.

    Raises: ValueError if its run differs from this one in what same_run says: it could not go on exactly.
    """
    saved = check_same_run(directory, same_run)
    if not saved.keys() >= {*plain, "ranks", "optimizer"}:
        raise ValueError(f"resume_from_checkpoint {directory}: another version saved it")
    tensors, _ = to_go_on(model, optimizer, reference)
    # A parameter that never had a gradient has no moments, which a new optimizer has of all.
    known = {path: tensors["optimizer"].get(path) for path in saved["optimizer"]["tensors"]}
    if unknown := [path for path, tensor in known.items() if tensor is None]:
        raise ValueError(f"resume_from_checkpoint {directory}: the optimizer has no {unknown[0]}: take the one it had")
    tensors["optimizer"] = known
    _read(directory, tensors, world)  # in place
    values = {name: dict(small) for name, small in saved["optimizer"]["state"].items()}
    for path, tensor in tensors["optimizer"].items():
        name, _, key = path.rpartition("/")
        values[name][key] = tensor
    whole = {"state": values, "param_groups": saved["optimizer"]["param_groups"]}
    set_optimizer_state_dict(unwrap(model), optimizer, whole, options=StateDictOptions(strict=False))
    for key, each in plain.items():
        each.load_state_dict(saved[key])
    ranks = saved["ranks"]
    if len(ranks) == world.size:
        state.load_state_dict(ranks[world.rank]["state"])
        _set_random_states(ranks[world.rank]["random"])
    else:
        state.load_state_dict(shared_out([each["state"] for each in ranks], world))


def shared_out(states: list[dict], world: World) -> dict:
    """The state for this process of a run that goes on with another number of them: what is the same in all, and the
    sums in the first. Seconds are those of each."""
    sums = {key: sum(each["sums"][key] for each in states) for key in states[0]["sums"]}
    own = {key: value / len(states) for key, value in sums.items() if key in ("seconds", "best_seconds")}
    sums = {key: value if world.rank == 0 else 0.0 for key, value in sums.items()} | own
    return {**states[0], "sums": sums}


def load_weights(directory: Path, world: World, model: torch.nn.Module) -> None:
    """Overwrites what training changes of a model with what a checkpoint saved."""
    _read(directory, {"model": changing(model)}, world)


def _read(directory: Path, tensors: dict, world: World) -> None:
    """Reads each process's share of a checkpoint into tensors."""
    try:
        dcp.load(tensors, **_at(directory, world))
    except (Exception, CheckpointException) as error:  # one of torch's own many
        raise ValueError(
            f"{directory / SHARDS} does not fit this run's model and optimizer: {what_failed(error)}"
        ) from error


def _at(directory: Path, world: World) -> dict:
    """Where torch.distributed.checkpoint writes and reads, and who takes part."""
    where = {"checkpoint_id": directory / SHARDS}
    if world.size == 1:
        return where | {"no_dist": True}
    return where | {"process_group": group_of_threads(dist.group.WORLD, world.timeout)}


def check_same_run(directory: Path, same_run: dict) -> dict:
    """What state.pt of a checkpoint holds. Raises: ValueError if its run differs from this one in what same_run says,
    which may be a part of all that was saved: the options, before a model is loaded."""
    saved = read_state(directory)
    before = saved["same_run"]
    if not same_run.keys() <= before.keys():
        raise ValueError(f"resume_from_checkpoint {directory}: another version of this code saved it")
    free = OF_PROCESSES if before["processes"] != same_run.get("processes") else ()
    now = {key: value for key, value in same_run.items() if key not in free}
    differing = [f"{key} {before.get(key)} (now {value})" for key, value in now.items() if value != before.get(key)]
    if differing:
        raise ValueError(f"resume_from_checkpoint {directory}: it is of another run, with {', '.join(differing)}")
    return saved


def read_state(directory: Path) -> dict:
    """What state.pt of a checkpoint holds, read where it is needed."""
    if not (directory / "state.pt").exists():
        raise ValueError(f"resume_from_checkpoint {directory}: it has no state.pt (saved with save_only_model?)")
    return torch.load(directory / "state.pt", map_location="cpu", weights_only=True, mmap=True)


def _random_states() -> dict:
    name, keys, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_states(states: dict) -> None:
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# ------------------------------------------------------------------------------------------- the checkpoints of a run


def checkpoints(output_dir: Path) -> dict[int, Path]:
    """The checkpoints that runs wrote to output_dir, by their steps, oldest first. What else has such a name is none:
    it is never deleted, and counts for nothing."""
    found = {}
    for path in output_dir.glob("checkpoint-*"):
        name = path.name.removeprefix("checkpoint-")
        is_step = name.isdecimal() and str(int(name)) == name
        if is_step and not path.is_symlink() and (path / files.MANIFEST).is_file():
            found[int(name)] = path
    return dict(sorted(found.items()))


def find_checkpoint(wanted: str | None, output_dir: Path, *, overwrite: bool) -> Path | None:
    """resume_from_checkpoint's value as a directory whose files are all as they were written; None to start anew.

    true is the newest such one in output_dir. Where there is none yet the run starts from its beginning, so that one
    command line serves a first start and every restart. A damaged or a stray one is passed over with a word.
    Raises: ValueError if there is no such checkpoint, if all are damaged, or if output_dir holds another run.
    """
    run, by_itself = files.run_in(output_dir), str(wanted).lower() == "true"
    resume = None if wanted is None or by_itself else Path(wanted)
    if by_itself:
        resume = newest_whole(output_dir)
        if resume is None and run and run["status"] == "finished":
            done = f"output_dir {output_dir} holds a finished run of {run['step']} steps without a checkpoint"
            raise ValueError(f"{done}: there is nothing to resume; replace it with overwrite_output_dir")
    elif resume is not None and not resume.is_dir():
        raise ValueError(f"resume_from_checkpoint: there is no directory {wanted}")
    elif resume is not None and (problem := files.problem_of(resume)):
        raise ValueError(f"resume_from_checkpoint {resume} is damaged ({problem}): take another, or true")
    goes_on_here = by_itself or (resume is not None and resume.parent.resolve() == output_dir.resolve())
    if not (goes_on_here or overwrite) and (run or checkpoints(output_dir)):
        status = f"a {run['status']} run, step {run['step']} of {run['steps']}" if run else "a run"
        status = status.replace("training", "stopped")
        ways = "go on with it (--resume_from_checkpoint true) or replace it (--overwrite_output_dir)"
        raise ValueError(f"output_dir {output_dir} holds {status}: name another, {ways}")
    return resume


def newest_whole(output_dir: Path) -> Path | None:
    """The newest checkpoint that a run can go on from and that is as it was written; names those passed over."""
    ours, damaged = checkpoints(output_dir), []
    for path in sorted(output_dir.glob("checkpoint-*"), key=lambda path: path.name):
        if path not in ours.values() and ".other-" not in path.name:
            logger.warning("%s is no checkpoint of a run: passed over", path)
    for path in reversed(ours.values()):
        if problem := files.problem_of(path):
            logger.warning("%s is damaged (%s): passed over", path, problem)
            damaged.append(path.name)
        elif not (path / "state.pt").exists():
            logger.warning("%s has the model only (save_only_model): passed over", path)
        else:
            return path
    if ours and not damaged:
        ways = "name one as model_name_or_path, or replace the run with overwrite_output_dir"
        raise ValueError(f"resume_from_checkpoint: the checkpoints in {output_dir} have the model only: {ways}")
    if damaged:
        ways = "remove them to start from the beginning"
        raise ValueError(f"resume_from_checkpoint: {', '.join(damaged)} in {output_dir} are damaged: {ways}")
    return None


def last_good(output_dir: Path) -> str:
    """Words that name the newest checkpoint, for the message of a run that stops."""
    found = checkpoints(output_dir)
    return f"the last good checkpoint is {found[max(found)]}" if found else "there is no checkpoint"


def prune_checkpoints(output_dir: Path, limit: int | None, best: int | None) -> None:
    """Deletes the oldest checkpoints beyond limit; the newest and the best one (its step) count and stay."""
    found = checkpoints(output_dir)
    surplus = max(0, len(found) - limit) if limit else 0
    for step in [step for step in found if step not in (best, max(found))][:surplus]:
        if files.is_sealed(found[step]):
            files.remove_sealed(found[step])


def better_of(best: dict | None, row: dict, *, metric: str, greater: bool) -> dict:
    """The better of the best evaluation so far and a new metrics row, as {"step", "value"}."""
    if metric not in row:
        known = ", ".join(key for key in row if key.startswith("eval_"))
        raise ValueError(f"metric_for_best_model {metric!r} is not evaluated: choose among {known}")
    value = row[metric]
    is_better = best is None or (value > best["value"] if greater else value < best["value"])
    is_better = is_better and math.isfinite(value)
    return {"step": row["step"], "value": value} if is_better else best


def clear_output(output_dir: Path, *, step: int) -> None:
    """Removes what an earlier run left in output_dir that could be taken for this one's: the checkpoints beyond the
    step that it goes on from; everything, where it starts anew, at step 0. What no run wrote stays."""
    for number, path in checkpoints(output_dir).items():
        if (number > step or step == 0) and files.is_sealed(path):
            files.remove_sealed(path)
    if step == 0:
        files.clear_run(output_dir)
