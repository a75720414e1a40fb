"""checkpoint-N/: the model after N steps and all that a run needs to go on as if it had never stopped."""

import random
import shutil
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

from dpo.distributed import World, barrier, unwrap


@dataclass
class TrainingState:
    """How far a run has come, in this process: what a checkpoint keeps beside models, optimizer and random numbers.

    Args: step, optimizer steps taken; tokens_seen, by the policy, up to the last metrics row; best, {"step", "value"}
    of the best evaluation; sums, of metrics over this process's pairs since the last metrics row; bco_sum and
    bco_count, of all rewards so far, chosen and rejected, in all processes.
    """

    step: int = 0
    tokens_seen: float = 0.0
    best: dict | None = None
    sums: dict[str, float | torch.Tensor] = field(default_factory=lambda: defaultdict(float))
    bco_sum: float = 0.0
    bco_count: float = 0.0

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
    process takes part; the first one writes."""
    if world.rank == 0:
        model.save_pretrained(directory)
        processing_class.save_pretrained(directory)
    barrier(world)


def save_checkpoint(
    directory: Path, world: World, *, model, processing_class, state, stateful: dict, same_run: dict, only_model: bool
) -> None:
    """Writes checkpoint-N under another name and renames it when all of it is there: what has this name is whole.

    Args: state, this process's; stateful, the optimizer and whatever else has a state_dict, by name; same_run, what a
    run must have in common with this one to go on from here; only_model, save nothing of these.
    """
    unfinished = directory.with_name(directory.name + ".unfinished")
    if world.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    save_model(unfinished, world, model, processing_class)
    if not only_model:
        if world.rank == 0:
            states = {key: each.state_dict() for key, each in stateful.items()}
            torch.save({"same_run": same_run, **states}, unfinished / "state.pt")
        rank_state = {"state": state.state_dict(), "random": _random_states()}
        torch.save(rank_state, unfinished / f"rank-{world.rank}.pt")
    barrier(world)
    if world.rank == 0:
        shutil.rmtree(directory, ignore_errors=True)
        unfinished.rename(directory)
    barrier(world)


def load_checkpoint(
    directory: Path, world: World, *, model, state: TrainingState, stateful: dict, same_run: dict
) -> None:
    """Puts what the checkpoint saved into model, state and stateful, and its random states in force.

    Raises: ValueError if its run differs from this one in what same_run says: it could not go on exactly.
    """
    if not (directory / "state.pt").exists():
        raise ValueError(f"resume_from_checkpoint {directory}: it has no state.pt (saved with save_only_model?)")
    saved = torch.load(directory / "state.pt", map_location="cpu", weights_only=True)
    if not saved.keys() >= stateful.keys():
        raise ValueError(f"resume_from_checkpoint {directory}: another version saved it")
    before = saved["same_run"]
    if before != same_run:
        differing = [f"{key} {before.get(key)} (now {now})" for key, now in same_run.items() if now != before.get(key)]
        raise ValueError(f"resume_from_checkpoint {directory}: it is of another run, with {', '.join(differing)}")
    load_weights(directory, model)
    for key, each in stateful.items():
        each.load_state_dict(saved[key])
    rank_state = torch.load(directory / f"rank-{world.rank}.pt", map_location="cpu", weights_only=True)
    state.load_state_dict(rank_state["state"])
    _set_random_states(rank_state["random"])


def load_weights(directory: Path, model: torch.nn.Module) -> None:
    """Overwrites the weights of model (of its adapter, for PEFT) with those saved in directory."""
    model = unwrap(model)
    if isinstance(model, PeftModel):
        if (directory / model.active_adapter).is_dir():  # PEFT saves an adapter that has a name in a folder of its own
            directory = directory / model.active_adapter
        set_peft_model_state_dict(model, load_peft_weights(str(directory), device="cpu"), model.active_adapter)
    else:
        saved = type(model).from_pretrained(directory, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())


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


# ------------------------------------------------------------------------------------------------- files of output_dir


def checkpoints(output_dir: Path) -> dict[int, Path]:
    """The whole checkpoints of a run by their steps, oldest first."""
    names = {path.name.removeprefix("checkpoint-"): path for path in output_dir.glob("checkpoint-*")}
    return {step: names[str(step)] for step in sorted(int(name) for name in names if name.isdigit())}


def find_checkpoint(wanted: str | None, output_dir: Path, *, overwrite: bool) -> Path | None:
    """resume_from_checkpoint's value as a directory: true is the newest one in output_dir.

    Raises: ValueError if there is none, or if output_dir holds another run and must not be overwritten.
    """
    found = checkpoints(output_dir)
    resume = None if wanted is None else Path(wanted)
    if str(wanted).lower() == "true":
        if not found:
            raise ValueError(f"resume_from_checkpoint: there is no checkpoint in {output_dir}")
        resume = found[max(found)]
    if resume is not None and not resume.is_dir():
        raise ValueError(f"resume_from_checkpoint: there is no directory {wanted}")
    goes_on_here = resume is not None and resume.parent.resolve() == output_dir.resolve()
    if not (goes_on_here or overwrite) and (found or (output_dir / "metrics.jsonl").exists()):
        ways = "go on with it (--resume_from_checkpoint true) or replace it (--overwrite_output_dir)"
        raise ValueError(f"output_dir {output_dir} holds a run: name another, {ways}")
    return resume


def prune_checkpoints(output_dir: Path, limit: int | None, best: int | None) -> None:
    """Deletes the oldest checkpoints beyond limit; the newest and the best one (its step) count and stay."""
    found = checkpoints(output_dir)
    surplus = max(0, len(found) - limit) if limit else 0
    for step in [step for step in found if step not in (best, max(found))][:surplus]:
        shutil.rmtree(found[step])


def better_of(best: dict | None, row: dict, *, metric: str, greater: bool) -> dict:
    """The better of the best evaluation so far and a new metrics row, as {"step", "value"}."""
    if metric not in row:
        known = ", ".join(key for key in row if key.startswith("eval_"))
        raise ValueError(f"metric_for_best_model {metric!r} is not evaluated: choose among {known}")
    value = row[metric]
    is_better = best is None or (value > best["value"] if greater else value < best["value"])
    return {"step": row["step"], "value": value} if is_better else best


def clear_output(output_dir: Path, *, step: int) -> None:
    """Makes output_dir, and removes what an earlier run left there that could be taken for this one's: the checkpoints
    beyond the step that it goes on from; all of them, metrics, samples and weights where it starts anew, at step 0."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for number, path in checkpoints(output_dir).items():
        if number > step:
            shutil.rmtree(path)
    patterns = ("metrics.jsonl", "samples.jsonl", "adapter_*", "model*.safetensors*") if step == 0 else ()
    for path in [path for pattern in patterns for path in output_dir.glob(pattern)]:
        path.unlink()
    for path in output_dir.glob("checkpoint-*.unfinished") if step == 0 else ():
        shutil.rmtree(path)
