"""The files of a run: one run in an output_dir, folders that are whole or absent, nothing touched that no run wrote.

run.json in output_dir says how far its run has come and which files there are a run's; manifest.json in a checkpoint
has the size and the SHA-256 of each of its files.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from dpo.distributed import World, barrier
from dpo.rows import first_line

logger = logging.getLogger("dpo")
PATIENCE = 15.0  # seconds that a run waits for an earlier one to leave its output_dir
RUN, LOCK, MANIFEST, FINAL = "run.json", "run.lock", "manifest.json", "model.finished"
WRITTEN = ["metrics.jsonl", "samples.jsonl", "config.yaml", "rewards.png", "README.md"]  # beside the model's files
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what odd JSON may raise
# What a model and its tokenizer may consist of.
OF_MODELS = """*.safetensors *.safetensors.index.json *.bin *.pt *.pth *.gguf config.json generation_config.json
adapter_* tokenizer* special_tokens_map.json added_tokens.json chat_template* vocab* merges.txt manifest.json"""


# ----------------------------------------------------------------------------------------------- whose output_dir it is


def run_in(output_dir: Path) -> dict | None:
    """What run.json says: {"status": "training" or "finished", "step", "steps", "files": names}; None without a run."""
    try:
        run = json.loads((output_dir / RUN).read_text(encoding="utf-8"))
        is_whole = {"status", "step", "steps"} <= run.keys() and all(map(is_name, run["files"]))
        return run if is_whole else None
    except UNREADABLE:
        return None


def is_name(name) -> bool:
    """Whether this names something in a folder, and nothing above it or deeper."""
    return isinstance(name, str) and Path(name).name == name and name not in ("", "..")


def files_of_run(output_dir: Path) -> list[str]:
    """The names in output_dir that are a run's, by its run.json."""
    return (run_in(output_dir) or {"files": []})["files"]


def check_output(output_dir: Path, sources: dict[str, str]) -> None:
    """Refuses an output_dir that cannot be written to, that is a source itself (a local path by its option's name) or
    holds it as a checkpoint, or that holds files which a run would replace and no run wrote. Touches nothing."""
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists() or path.is_symlink())
    if not existing.is_dir():
        raise ValueError(f"output_dir {output_dir}: {existing} is not a directory: name another output_dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir {output_dir}: {existing} cannot be written to: name another output_dir")
    for option, source in sources.items():
        path, own = Path(os.path.expanduser(source)).resolve(), output_dir.resolve()
        is_checkpoint = own in path.parents and path.relative_to(own).parts[0].startswith("checkpoint-")
        if path.exists() and (path == own or is_checkpoint):
            raise ValueError(f"{option} {source} lies in output_dir {output_dir}, which a run replaces: name another")
    ours = [*files_of_run(output_dir), RUN] if run_in(output_dir) else []
    patterns = [RUN, *WRITTEN, *OF_MODELS.split()]
    foreign = {path.name for pattern in patterns for path in output_dir.glob(pattern)} - set(ours)
    if foreign:
        listed = ", ".join(sorted(foreign)[:3])
        raise ValueError(f"output_dir {output_dir} holds what no run of dpo.loop wrote ({listed}): name another")


def lock(output_dir: Path):
    """Keeps other processes' runs out of output_dir while this one lives. Returns the open file that does it.

    The lock is the process's: it ends with it however it ends, and child processes do not inherit it. A run that was
    told to stop, or whose torchrun was killed, may take a few seconds to leave: it is waited for.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = (output_dir / LOCK).open("a")
    except OSError as error:
        raise ValueError(f"output_dir {output_dir} cannot be written to: {error.strerror}: name another") from error
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError as error:
            if time.monotonic() >= end:
                file.close()
                what = f"output_dir {output_dir} is in use by another run"
                raise ValueError(f"{what}: wait for it, or name another") from error
            time.sleep(0.1)


def write_run(output_dir: Path, *, status: str, step: int, steps: int, files: list[str]) -> None:
    content = {"status": status, "step": step, "steps": steps, "files": sorted(set(files))}
    write_whole(output_dir / RUN, json.dumps(content, indent=1) + "\n")


def clear_run(output_dir: Path) -> None:
    """Removes what run.json says a run wrote, apart from its checkpoints; and what that left unfinished."""
    if run_in(output_dir) is None:
        return
    for name in files_of_run(output_dir):
        path = output_dir / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for path in (*output_dir.glob("checkpoint-*.unfinished"), output_dir / f"{FINAL}.unfinished"):
        shutil.rmtree(path, ignore_errors=True)
    (output_dir / RUN).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ all of it, or nothing


def write_whole(path: Path, text: str) -> None:
    """Writes a file aside and renames it: whoever reads it finds the old text or the new."""
    aside = path.with_name(path.name + ".unfinished")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    sync(path.parent)


@contextmanager
def written_aside(directory: Path, world: World):
    """A folder to write into, in every process. When the block is done it takes the name directory, as `end_aside` has
    it; if anything fails it is removed. Raises: ValueError then, in one line."""
    try:
        unfinished = begin_aside(directory) if world.rank == 0 else aside(directory)
        barrier(world)
        yield unfinished
        barrier(world)
        if world.rank == 0:
            end_aside(unfinished, directory)
        barrier(world)
    except Exception as error:  # a full disk is an OSError, torch's RuntimeError, or safetensors' own
        if world.rank == 0:
            remove_aside(directory)
        raise ValueError(f"{directory} could not be written: {first_line(error)}") from error


def aside(directory: Path) -> Path:
    """Where a folder is written before it has its name."""
    return directory.with_name(directory.name + ".unfinished")


def begin_aside(directory: Path) -> Path:
    """An empty folder to write into. Raises: ValueError in one line."""
    remove_aside(directory)
    try:
        aside(directory).mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{directory} could not be written: {first_line(error)}") from error
    return aside(directory)


def end_aside(unfinished: Path, directory: Path) -> None:
    """Gives a folder that was written aside its name, once all of it is on the disk, sealed."""
    seal(unfinished)
    if is_sealed(directory) and not directory.is_symlink():
        remove_sealed(directory)
    if directory.exists() or directory.is_symlink():  # no run's: it is kept, under another name
        directory.rename(free_name(directory))
    unfinished.rename(directory)
    sync(directory.parent)


def remove_aside(directory: Path) -> None:
    shutil.rmtree(aside(directory), ignore_errors=True)


def free_name(path: Path) -> Path:
    number = next(number for number in range(1, 10**6) if not path.with_name(f"{path.name}.other-{number}").exists())
    return path.with_name(f"{path.name}.other-{number}")


def move_into(source: Path, output_dir: Path, *, announce: Callable[[list[str]], None]) -> list[str]:
    """Moves a model's sealed files from a folder into output_dir, config files last: without them nothing loads what
    would be half a model. announce is told the names before the first one moves. Returns: the names."""
    names = [path.name for path in source.iterdir()]
    known = files_of_run(output_dir)
    taken = [name for name in names if name not in known and (output_dir / name).exists()]
    if taken:
        raise ValueError(f"{output_dir / taken[0]} is in the way, and no run wrote it: the model is in {source}")
    announce(names)
    for name in (MANIFEST, "config.json", "adapter_config.json"):  # an older model's: half old, half new loads nowhere
        (output_dir / name).unlink(missing_ok=True)
    for name in names:
        if (output_dir / name).is_dir():
            shutil.rmtree(output_dir / name)
    for name in sorted(names, key=lambda name: (name == MANIFEST, name.endswith("config.json"), name)):
        (source / name).replace(output_dir / name)
    source.rmdir()
    sync(output_dir)
    return names


def seal(directory: Path) -> None:
    """Puts every file of a folder on the disk, and their sizes and checksums into its manifest.json."""
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        files[str(path.relative_to(directory))] = [path.stat().st_size, checksum(path)]
        sync(path)
    write_whole(directory / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")
    for path in (*(path for path in directory.rglob("*") if path.is_dir()), directory):
        sync(path)


def sealed_files(directory: Path) -> dict[str, list]:
    """What a folder's manifest.json says: {name: [bytes, SHA-256]}. Raises: one of UNREADABLE."""
    return dict(json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"].items())


def is_sealed(directory: Path) -> bool:
    """Whether a folder is a run's: its manifest names weights."""
    try:
        return any(name.endswith((".safetensors", ".pt")) for name in sealed_files(directory))
    except UNREADABLE:
        return False


def remove_sealed(directory: Path) -> None:
    """Removes a folder that a run sealed. What somebody else put into it stays, and with it the folder."""
    for name in (*sealed_files(directory), MANIFEST):
        path = directory / name
        if path.resolve().is_relative_to(directory.resolve()) and not path.is_dir():
            path.unlink(missing_ok=True)
    for path in (*sorted((p for p in directory.rglob("*") if p.is_dir()), reverse=True), directory):
        if not any(path.iterdir()):
            path.rmdir()
    if directory.exists():
        logger.warning("%s stays: it holds what no run wrote", directory)


def problem_of(directory: Path) -> str | None:
    """What is wrong with a sealed folder, in a few words; None if each file is as it was written."""
    try:
        for name, (size, digest) in sealed_files(directory).items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size or checksum(path) != digest:
                return f"{name} is not as it was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except UNREADABLE as error:
        return f"its {MANIFEST} cannot be read: {first_line(error)}"
    return None


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk: a rename may else come there before the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
