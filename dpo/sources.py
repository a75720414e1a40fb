"""Opens a preference dataset: a Hub name, a local file or directory, or an object. Broken files are named and line."""

import json
import os
from pathlib import Path

from datasets import Dataset, load_dataset, load_dataset_builder, load_from_disk

from dpo.data import check_row

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


def load_preferences(source: str | Dataset | list[dict], *, split: str = "train", subset: str | None = None) -> dict:
    """Opens a preference dataset and returns its parts, {name for messages: Dataset}, in order.

    Args:
        source: a Hub name, a local .json/.jsonl/.parquet/.csv/.arrow file (.gz too), a directory of such files or one
            that Dataset.save_to_disk wrote, a datasets.Dataset, or a list of dicts.
        split, subset: which split and which configuration, where the source has several.

    Raises: ValueError if there is no such dataset or split, or a file cannot be read: names the file and the line.
    """
    if isinstance(source, Dataset):
        return {"dataset": source}
    if isinstance(source, list):
        return {"dataset": Dataset.from_list(source)}
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"a dataset is a name, a path, a datasets.Dataset or a list of dicts, not {type(source).__name__}"
        )
    path = Path(source)
    if path.is_file():
        return {str(path): _read_file(path)}
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        saved = load_from_disk(str(path))
        return {str(path): saved if isinstance(saved, Dataset) else _pick_split(saved, split, path)}
    if path.is_dir():
        try:
            files = _pick_split(load_dataset_builder(str(path)).config.data_files, split, path)
        except FileNotFoundError as error:
            raise ValueError(f"{path} holds no {', '.join(FORMATS)} file") from error
        return {str(file): _read_file(Path(file)) for file in files}
    if path.suffix in FORMATS or path.is_absolute() or str(source).startswith("."):
        raise ValueError(f"there is no file or directory {str(source)!r}: check the path")
    try:
        return {f"{source} ({split})": load_dataset(str(source), subset, split=split)}
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot load the dataset {str(source)!r}, split {split!r}, from the Hub: {reason}") from error


def _pick_split(splits: dict, split: str, path: Path):
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}: it has {', '.join(map(str, splits))}")
    return splits[split]


def _read_file(path: Path) -> Dataset:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    if not suffixes or suffixes[-1] not in FORMATS:
        raise ValueError(f"{path} is not one of {', '.join(FORMATS)}: convert it, or name another file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: it must hold at least one preference pair")
    # In a CSV file "NA" and "12" are texts that someone preferred, neither a missing value nor a number.
    options = {"keep_default_na": False, "dtype": str} if suffixes[-1] == ".csv" else {}
    try:
        return load_dataset(FORMATS[suffixes[-1]], data_files=str(path), split="train", **options)
    except Exception as error:
        if suffixes[-1] in (".json", ".jsonl") and path.suffix != ".gz":
            _explain_json(path)
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as {suffixes[-1][1:]}: {reason}") from error


def _explain_json(path: Path) -> None:
    """Finds the line that a JSON reader for whole columns stumbled over, and raises ValueError with its number."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.lstrip().startswith("[") and number == 1:
                return  # one array over many lines: its reader names the place itself
            try:
                row = json.loads(line) if line.strip() else None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not valid JSON: {error.msg} at column {error.colno}"
                ) from error
            problem = check_row(row) if isinstance(row, dict) else row is not None and "is not a JSON object"
            if problem:
                raise ValueError(f"{path}, line {number}: {problem}")
