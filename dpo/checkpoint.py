"""checkpoint-N/: the model after N steps and all that a run needs to go on as if it had never stopped."""

import random
import shutil
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

from dpo.distributed import World, barrier


def save_model(directory: Path, model: torch.nn.Module, processing_class) -> None:
    """The model (safetensors; an adapter alone for PEFT) and its tokenizer, loadable with from_pretrained."""
    model.save_pretrained(directory)
    processing_class.save_pretrained(directory)


def save_checkpoint(
    directory: Path,
    world: World,
    *,
    model: torch.nn.Module,
    processing_class,
    stateful: dict | None,
    state: dict,
    rank_state: dict,
) -> None:
    """Writes checkpoint-N under another name and renames it when all of it is there: what has this name is whole.

    Args: stateful, the optimizer and whatever else has a state_dict, by name, None to save the model alone; state, what
    all processes share besides; rank_state, what is this process's own, besides its random numbers.
    """
    unfinished = directory.with_name(directory.name + ".unfinished")
    if world.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save_model(unfinished, model, processing_class)
        if stateful is not None:
            state = state | {key: thing.state_dict() for key, thing in stateful.items()}
            torch.save(state, unfinished / "state.pt")
    barrier(world)
    if stateful is not None:
        torch.save({**rank_state, "random": _random_states()}, unfinished / f"rank-{world.rank}.pt")
    barrier(world)
    if world.rank == 0:
        shutil.rmtree(directory, ignore_errors=True)
        unfinished.rename(directory)
    barrier(world)


def load_checkpoint(
    directory: Path, world: World, model: torch.nn.Module, *, stateful: dict, same_run: dict
) -> tuple[dict, dict]:
    """Puts the checkpoint's weights into model, the states of stateful into its objects and its random states in force;
    returns (state, rank_state).

    Raises: ValueError if its run differs from this one in what same_run says: it could not go on exactly.
    """
    if not (directory / "state.pt").exists():
        raise ValueError(f"resume_from_checkpoint {directory}: it has no state.pt (saved with save_only_model?)")
    state = torch.load(directory / "state.pt", map_location="cpu", weights_only=True)
    if state["same_run"] != same_run:
        differing = [key for key in same_run if same_run[key] != state["same_run"].get(key)]
        told = ", ".join(f"{key} {state['same_run'].get(key)} (now {same_run[key]})" for key in differing)
        raise ValueError(f"resume_from_checkpoint {directory}: it is of another run, with {told}")
    load_weights(directory, model)
    for key, thing in stateful.items():
        thing.load_state_dict(state[key])
    rank_state = torch.load(directory / f"rank-{world.rank}.pt", map_location="cpu", weights_only=True)
    _set_random_states(rank_state.pop("random"))
    return state, rank_state


def load_weights(directory: Path, model: torch.nn.Module) -> None:
    """Overwrites the weights of model (of its adapter, for PEFT) with those saved in directory."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    if isinstance(model, PeftModel):
        if (directory / model.active_adapter).is_dir():  # PEFT saves an adapter that has a name in a folder of its own
            directory = directory / model.active_adapter
        set_peft_model_state_dict(model, load_peft_weights(str(directory), device="cpu"), model.active_adapter)
    else:
        saved = type(model).from_pretrained(directory, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())


def _random_states() -> dict:
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_states(states: dict) -> None:
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def checkpoints(output_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_checkpoint(wanted: str | None, output_dir: Path) -> Path | None:
    """resume_from_checkpoint's value as a directory: true is the newest one in output_dir."""
    if wanted is None:
        return None
    if str(wanted).lower() == "true":
        if not checkpoints(output_dir):
            raise ValueError(f"resume_from_checkpoint: there is no checkpoint in {output_dir}")
        return checkpoints(output_dir)[-1]
    if not Path(wanted).is_dir():
        raise ValueError(f"resume_from_checkpoint: there is no directory {wanted}")
    return Path(wanted)


def prune_checkpoints(output_dir: Path, limit: int | None, best: int | None) -> None:
    """Deletes the oldest checkpoints beyond limit; the best one (its step) counts and stays."""
    found = checkpoints(output_dir)
    surplus = len(found) - limit if limit else 0
    for path in [path for path in found[:-1] if step_of(path) != best][: max(0, surplus)]:
        shutil.rmtree(path)


def better_of(best: dict | None, row: dict, *, metric: str, greater: bool) -> dict:
    """The better of the best evaluation so far and a new metrics row, as {"step", "value"}."""
    if metric not in row:
        known = ", ".join(key for key in row if key.startswith("eval_"))
        raise ValueError(f"metric_for_best_model {metric!r} is not evaluated: choose among {known}")
    value = row[metric]
    is_better = best is None or (value > best["value"] if greater else value < best["value"])
    return {"step": row["step"], "value": value} if is_better else best


def refuse_to_overwrite(output_dir: Path) -> None:
    """Raises ValueError if output_dir holds a run."""
    if (output_dir / "metrics.jsonl").exists() or checkpoints(output_dir):
        raise ValueError(
            f"output_dir {output_dir} holds a run: name another, go on with it (--resume_from_checkpoint true) "
            "or replace it (--overwrite_output_dir)"
        )


def clear_output(output_dir: Path) -> None:
    """Makes output_dir, and removes what an earlier run left there that could be taken for the new one's."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for pattern in ("metrics.jsonl", "samples.jsonl", "adapter_*", "model*.safetensors*"):
        for path in output_dir.glob(pattern):
            path.unlink()
    for path in (*checkpoints(output_dir), *output_dir.glob("checkpoint-*.unfinished")):
        shutil.rmtree(path)


def drop_later(output_dir: Path, step: int) -> None:
    """Removes the checkpoints of output_dir beyond a step: a run that goes on from there makes its own."""
    for path in checkpoints(output_dir):
        if step_of(path) > step:
            shutil.rmtree(path)
