"""checkpoint-N/: the model after N steps and all that a run needs to go on as if it had never stopped."""

import logging
import math
import random
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

from dpo import files
from dpo.distributed import World, barrier, unwrap
from dpo.models import not_finite

logger = logging.getLogger("dpo")


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
    if broken := not_finite(model):
        raise ValueError(f"the weights of {broken} are not finite: lower learning_rate")
    if world.rank == 0:
        adapter = getattr(model, "active_adapter", None)
        own = {"selected_adapters": [adapter]} if isinstance(model, PeftModel) else {}  # not that of the reference
        if hasattr(type(unwrap(model)), "save_pretrained"):
            model.save_pretrained(directory, **own)
        else:  # a module of the caller's own: its weights by their names
            directory.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_model(unwrap(model), directory / "model.safetensors")
        if own and (directory / adapter).is_dir():
            # PEFT puts an adapter that has a name into a folder of its own, where nothing looks for it.
            for path in (directory / adapter).iterdir():
                path.rename(directory / path.name)
            (directory / adapter).rmdir()
        processing_class.save_pretrained(directory)
    barrier(world)


def save_checkpoint(
    directory: Path, world: World, *, model, processing_class, state, stateful: dict, same_run: dict, only_model: bool
) -> None:
    """Writes checkpoint-N, whole or not at all (see `files.written_aside`).

    Args: state, this process's; stateful, the optimizer and whatever else has a state_dict, by name; same_run, what a
    run must have in common with this one to go on from here; only_model, save nothing of these.
    """
    with files.written_aside(directory, world) as unfinished:
        save_model(unfinished, world, model, processing_class)
        if not only_model:
            if world.rank == 0:
                states = {key: each.state_dict() for key, each in stateful.items()}
                torch.save({"same_run": same_run, **states}, unfinished / "state.pt")
            rank_state = {"state": state.state_dict(), "random": _random_states()}
            torch.save(rank_state, unfinished / f"rank-{world.rank}.pt")


def load_checkpoint(
    directory: Path, world: World, *, model, state: TrainingState, stateful: dict, same_run: dict
) -> None:
    """Puts what the checkpoint saved into model, state and stateful, and its random states in force.

    Raises: ValueError if its run differs from this one in what same_run says: it could not go on exactly.
    """
    saved = check_same_run(directory, same_run)
    if not saved.keys() >= stateful.keys():
        raise ValueError(f"resume_from_checkpoint {directory}: another version saved it")
    load_weights(directory, model)
    for key, each in stateful.items():
        each.load_state_dict(saved[key])
    rank_state = torch.load(directory / f"rank-{world.rank}.pt", map_location="cpu", weights_only=True)
    state.load_state_dict(rank_state["state"])
    _set_random_states(rank_state["random"])


def check_same_run(directory: Path, same_run: dict) -> dict:
    """What state.pt of a checkpoint holds. Raises: ValueError if its run differs from this one in what same_run says,
    which may be a part of all that was saved: the options, before a model is loaded."""
    saved = read_state(directory)
    before = saved["same_run"]
    if not same_run.keys() <= before.keys():
        raise ValueError(f"resume_from_checkpoint {directory}: another version of this code saved it")
    differing = [f"{key} {before.get(key)} (now {now})" for key, now in same_run.items() if now != before.get(key)]
    if differing:
        raise ValueError(f"resume_from_checkpoint {directory}: it is of another run, with {', '.join(differing)}")
    return saved


def read_state(directory: Path) -> dict:
    """What state.pt of a checkpoint holds, read where it is needed."""
    if not (directory / "state.pt").exists():
        raise ValueError(f"resume_from_checkpoint {directory}: it has no state.pt (saved with save_only_model?)")
    return torch.load(directory / "state.pt", map_location="cpu", weights_only=True, mmap=True)


def load_weights(directory: Path, model: torch.nn.Module) -> None:
    """Overwrites the weights of model (of its adapter, for PEFT) with those saved in directory."""
    model = unwrap(model)
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_peft_weights(str(directory), device="cpu"), model.active_adapter)
    elif hasattr(type(model), "from_pretrained"):
        saved = type(model).from_pretrained(directory, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
    else:
        safetensors.torch.load_model(model, directory / "model.safetensors")


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
