"""Opens a preference dataset: Hub name, local file or directory, or object. Of a broken file it names the line."""

import csv
import glob
import gzip
import json
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Json,
    ReadInstruction,
    Value,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)

from dpo.images import without_objects
from dpo.rows import canonical_row, first_line

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


def load_preferences(
    source: str | Dataset | DatasetDict | IterableDataset | IterableDatasetDict | list[dict],
    *,
    split: str = "train",
    subset: str | None = None,
    streams: bool = False,
) -> dict:
    """Opens a preference dataset and returns its parts, {name for messages: Dataset}, in order.

    Args: source, a Hub name, a local .json/.jsonl/.parquet/.csv/.arrow file (.gz too), a directory of such files or one
    that save_to_disk wrote, a datasets.Dataset or DatasetDict, or a list of dicts; split and subset (configuration),
    where the source has several; streams, read nothing now: the parts are then datasets.IterableDatasets.
    A split may be a slice, as in train[:100]; a single file is both train and test.
    Raises: ValueError if there is no such dataset or split, or a file cannot be read: names the file and the line.
    """
    name, slices, _ = split.partition("[")
    try:
        local = not isinstance(source, str | os.PathLike) or Path(os.path.expanduser(source)).exists()
    except OSError as error:
        raise ValueError(f"{str(source)[:60]!r} is no name of a dataset: {error.strerror}") from error
    parts = _open(source, split=name if local else split, subset=subset, streams=streams)
    if streams:
        return {name: _as_stream(rows) for name, rows in parts.items()}
    if not (local and slices):
        return parts
    if len(parts) > 1:
        raise ValueError(f"{source}: split {split!r} is a slice, of {len(parts)} files: name one of them, or no slice")
    ((where, rows),) = parts.items()
    try:
        (cut,) = ReadInstruction.from_spec(split).to_absolute({name: len(rows)})
    except Exception as error:
        raise ValueError(f"{where}: split {split!r}: {first_line(error)}") from error
    return {where: rows.select(range(cut.from_, cut.to))}


def _open(source, *, split: str, subset: str | None, streams: bool) -> dict:
    """The parts of a source, uncut."""
    if subset is not None and (not isinstance(source, str | os.PathLike) or Path(source).is_file()):
        raise ValueError(f"there is no subset {subset!r} in one file or object: leave out the subset (dataset_config)")
    if isinstance(source, Dataset) or streams and isinstance(source, IterableDataset):
        return {"dataset": source}
    if isinstance(source, DatasetDict) or streams and isinstance(source, IterableDatasetDict):
        return {f"dataset ({split})": _pick_split(source, split, "dataset")}
    if isinstance(source, list):
        return {"dataset": _from_list(source)}
    if not isinstance(source, str | os.PathLike):
        kinds = "a name, a path, a datasets.Dataset or a list of dicts"
        kinds += (
            " (only the training set may be a stream)"
            if isinstance(source, IterableDataset | IterableDatasetDict)
            else ""
        )
        raise ValueError(f"a dataset is {kinds}, not {type(source).__name__}")
    path, read = Path(os.path.expanduser(source)), _stream_file if streams else _read_file
    if path.is_file():
        if split not in ("train", "test"):
            raise ValueError(f"{path} is one file and has no split {split!r}: leave the split out")
        return {str(path): read(path)}
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        try:
            saved = load_from_disk(str(path))
        except Exception as error:
            raise ValueError(f"{path} cannot be opened as a saved dataset: {first_line(error)}") from error
        return {str(path): _pick_split({"train": saved} if isinstance(saved, Dataset) else saved, split, path)}
    if path.is_dir():
        try:
            splits = load_dataset_builder(str(path), subset).config.data_files
        except FileNotFoundError as error:
            raise ValueError(f"{path} holds no {', '.join(FORMATS)} file: put one in, or name another path") from error
        except Exception as error:
            raise ValueError(f"{path} cannot be opened as a directory of data files: {first_line(error)}") from error
        files = [Path(file) for file in _pick_split(splits, split, path)]
        there = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
        there = [f for f in there if not f.name.startswith("dataset_info") and not any(p[0] == "." for p in f.parts)]
        kinds = {_format(file) for file in there} & FORMATS.keys()
        if kinds := kinds - {_format(Path(file)) for each in splits.values() for file in each}:
            raise ValueError(f"{path} holds {', '.join(sorted(kinds))} files, too: name the one file to read")
        return {str(file): read(file) for file in files}
    if _format(path) in FORMATS or path.is_absolute() or str(source).startswith(".") or len(path.parts) > 2:
        raise ValueError(f"there is no file or directory {str(source)!r}: check the path")
    how = {"split": split} | ({"streaming": True} if streams else {})
    try:
        return {f"{source} ({split})": load_dataset(str(source), subset, **how)}
    except Exception as error:
        what = f"the dataset {str(source)!r}, split {split!r}, from the Hub (nor is it a file or directory here)"
        raise ValueError(f"cannot load {what}: {first_line(error)}") from error


def _pick_split(splits: dict, split: str, name: str | Path):
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}: take one of {', '.join(map(str, splits))}")
    return splits[split]


def _from_list(rows: list[dict]) -> Dataset:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"dataset, row {number}: is {type(row).__name__}: it must be a dict")
        if odd := [key for key in row if not isinstance(key, str)]:
            raise ValueError(f"dataset, row {number}: the key {odd[0]!r} is no text: name its column")
    rows = [without_objects(row) for row in rows]
    # Not Dataset.from_list: it looks for columns in the first row only.
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    try:
        table = Dataset.from_dict(columns)
        wide = {key: Json() for key, kind in table.features.items() if _has_objects(kind)}
        return Dataset.from_dict(columns, features=Features({**table.features, **wide})) if wide else table
    except Exception:  # a column of mixed kinds: keep each value as it is, and let the row that is wrong be named
        for number, row in enumerate(rows, start=1):
            try:
                json.dumps(row, ensure_ascii=False).encode("utf-8")
            except (ValueError, TypeError) as error:  # half a character (a lone surrogate), or an object of no kind
                raise ValueError(f"dataset, row {number}: {first_line(error)}: mend it") from error
        return Dataset.from_dict(columns, features=Features(dict.fromkeys(columns, Json())))


def _has_objects(kind) -> bool:
    """Whether a column holds objects whose keys differ from row to row (tools, calls of them): as a table's structs
    each would get the keys of all others, with nulls."""
    return any(word in str(kind) for word in ("tool_calls", "'parameters'", "'arguments'"))


# ------------------------------------------------------------------------------------------------------ reading a file


def _format(path: Path) -> str:
    """The suffix that says what is in a file, without .gz."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _open_text(path: Path):
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig")


def _checked_suffix(path: Path) -> str:
    if (suffix := _format(path)) not in FORMATS:
        raise ValueError(f"{path} is not one of {', '.join(FORMATS)}: convert it, or name another file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: it must hold at least one preference pair")
    return suffix


def _csv_columns(path: Path, lines) -> list[str]:
    """The names of the columns of a CSV file, of whose lines this takes the first."""
    columns = [name or f"Unnamed: {i}" for i, name in enumerate(next(lines, []))]  # pandas' index has none
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise ValueError(f"{path}, line 1: two columns are called {twice[0]!r}: rename one")
    return columns


def _check_cells(path: Path, lines, cells: list[str], columns: list[str]) -> None:
    if len(cells) > len(columns):  # pandas would take the first for an index, and shift the others
        where = f"{path}, line {lines.line_num}"
        raise ValueError(f"{where}: {len(cells)} cells under {len(columns)} columns: mend it")


def _read_file(path: Path) -> Dataset:
    suffix = _checked_suffix(path)
    options, here = {}, glob.escape(str(path))  # a name is no pattern: pairs[1].jsonl is not pairs1.jsonl
    if FORMATS[suffix] in ("json", "csv"):
        _check_text(path)
    try:
        if suffix == ".csv":
            # In a CSV file "NA" and "12" are texts that someone preferred, neither a missing value nor a number.
            with _open_text(path) as file:
                lines = csv.reader(file)
                columns = _csv_columns(path, lines)
                for cells in lines:
                    _check_cells(path, lines, cells, columns)
            options = {"keep_default_na": False, "features": Features(dict.fromkeys(columns, Value("string")))}
        rows = load_dataset(FORMATS[suffix], data_files=here, split="train", **options)
        wide = {key: Json() for key, kind in rows.features.items() if FORMATS[suffix] == "json" and _has_objects(kind)}
        if wide:
            features = Features({**rows.features, **wide})
            rows = load_dataset(FORMATS[suffix], data_files=here, split="train", features=features)
        return rows
    except Exception as error:
        if str(error).startswith(f"{path}, line "):
            raise
        if "corresponds to no data" in str(error):  # datasets' words for a file of no rows
            raise ValueError(f"{path} is empty: it must hold at least one preference pair") from error
        if FORMATS[suffix] == "json":
            _explain_json(path)
        reason = first_line(error.__cause__ or error)
        raise ValueError(f"{path} cannot be read as {suffix[1:]}: {reason}: mend or convert it") from error


def _check_text(path: Path) -> None:
    """Refuses a text file that is not UTF-8, a compressed one that is cut short, and JSON that holds no objects."""
    try:
        with _open_text(path) as file:
            start = file.read(100_000)
            while file.read(10_000_000):
                pass
    except UnicodeDecodeError as error:
        head = path.read_bytes()[:2]
        known = "UTF-16" if head in (b"\xff\xfe", b"\xfe\xff") else "another encoding, such as Windows-1252"
        raise ValueError(f"{path} is not UTF-8 (byte {error.start + 1}) but {known}: save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}: mend or replace it") from error
    if FORMATS[_format(path)] == "json" and start.strip() and start.lstrip()[0] not in "[{":
        raise ValueError(f"{path}, line 1: is not a JSON object: write one object a line, or one array of them")


def _explain_json(path: Path) -> None:
    """Finds the line that a JSON reader for whole columns stumbled over, and raises ValueError with its number."""
    with _open_text(path) as file:
        text = file.read()
    is_array = _format(path) == ".json" and text.lstrip().startswith("[")  # one array over many lines
    for number, line in enumerate([text] if is_array else text.split("\n"), start=1):
        try:
            row = json.loads(line) if line.strip() else None
            if row is None or is_array:
                continue
            if not isinstance(row, dict):
                raise ValueError("is not a JSON object")
            canonical_row(row, allow_ties=True)
        except RecursionError as error:
            raise ValueError(f"{path}, line {number}: nested too deeply: mend it") from error
        except json.JSONDecodeError as error:
            where = f"{path}, line {number + error.lineno - 1}"
            raise ValueError(f"{where}: not valid JSON: {error.msg} at column {error.colno}: mend it") from error
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}: mend it") from error


# --------------------------------------------------------------------------------------------------- a file as a stream

PIECE = 64 * 2**20  # bytes of a JSON file between places at which its reading can go on without what is before


def _as_stream(rows: Dataset | IterableDataset) -> IterableDataset:
    """Rows as a stream, pictures in them as they are stored. Raises: ValueError if its shuffle() was called."""
    if _has_buffer(getattr(rows, "_ex_iterable", None)):
        how = "leave out its shuffle(), and set shuffle and shuffle_buffer"
        raise ValueError(f"the stream has a shuffle buffer of its own, which no checkpoint can keep: {how}")
    rows = rows.to_iterable_dataset() if isinstance(rows, Dataset) else rows.with_format(None)
    return rows.decode(False) if rows.features is not None else rows


def _has_buffer(examples) -> bool:
    """Whether what a stream iterates over is shuffled in a buffer, somewhere inside."""
    inside = [getattr(examples, "ex_iterable", None), *getattr(examples, "ex_iterables", ())]
    return "BufferShuffled" in type(examples).__name__ or any(_has_buffer(each) for each in inside if each is not None)


def _stream_file(path: Path) -> IterableDataset:
    suffix, given = _checked_suffix(path), {"path": str(path)}
    if suffix in (".parquet", ".arrow"):
        try:
            return load_dataset(FORMATS[suffix], data_files=glob.escape(str(path)), split="train", streaming=True)
        except Exception as error:
            reason = first_line(error.__cause__ or error)
            raise ValueError(f"{path} cannot be read as {suffix[1:]}: {reason}: mend or convert it") from error
    if suffix == ".csv":
        return IterableDataset.from_generator(_csv_rows, gen_kwargs=given)
    if _is_array(path):
        return IterableDataset.from_generator(_json_array, gen_kwargs=given)
    starts = [0] if path.suffix == ".gz" else list(range(0, path.stat().st_size, PIECE))
    pieces = list(zip(starts, [*starts[1:], sys.maxsize], strict=True))
    return IterableDataset.from_generator(_json_rows, gen_kwargs=given | {"pieces": pieces})


def _open_bytes(path: Path):
    return (gzip.open if path.suffix == ".gz" else open)(path, "rb")


def _is_array(path: Path) -> bool:
    """Whether a JSON file is one array, and not an object a line."""
    try:
        with _open_bytes(path) as file:
            return file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    except (OSError, EOFError, zlib.error):
        return False  # its rows will tell


def _csv_rows(path: str) -> Iterator[dict]:
    """The rows of a CSV file one by one, all of text, which is empty where a line is too short."""
    path = Path(path)
    try:
        with _open_text(path) as file:
            lines = csv.reader(file)
            columns = _csv_columns(path, lines)
            for cells in lines:
                _check_cells(path, lines, cells, columns)
                if cells:
                    yield dict.fromkeys(columns, "") | dict(zip(columns, cells, strict=False))
    except (UnicodeDecodeError, OSError, EOFError, zlib.error, csv.Error) as error:
        _check_text(path)
        raise ValueError(f"{path} cannot be read: {first_line(error)}: mend or replace it") from error


def _json_rows(path: str, pieces: list[tuple[int, int]]) -> Iterator[dict]:
    """The rows of a JSON file one by one, those of the lines that begin in pieces of it, (first byte, end)."""
    path = Path(path)
    try:
        for start, end in pieces:
            with _open_bytes(path) as file:
                file.seek(max(0, start - 1))
                if start:
                    file.readline()  # the end of a line that began in the piece before
                while (at := file.tell()) < end and (line := file.readline()):
                    if line.strip():
                        yield _json_row(path, at, line)
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        _check_text(path)
        raise ValueError(f"{path} cannot be read: {first_line(error)}: mend or replace it") from error


def _json_row(path: Path, at: int, line: bytes) -> dict:
    """The row in a line that begins at this byte. Raises: ValueError with the line's number."""
    text = line.decode("utf-8-sig" if at == 0 else "utf-8")
    try:
        row = json.loads(text)
        if isinstance(row, dict):
            return row
        reason = "is not a JSON object"
    except RecursionError:
        reason = "nested too deeply"
    except json.JSONDecodeError as error:
        reason = f"not valid JSON: {error.msg} at column {error.colno}"
    number = 1
    with _open_bytes(path) as file:
        while file.tell() < at and file.readline():
            number += 1
    raise ValueError(f"{path}, line {number}: {reason}: mend it")


def _json_array(path: str) -> Iterator[dict]:
    """The rows of a JSON file that is one array, which has no lines to go by: it is read whole."""
    path = Path(path)
    _check_text(path)
    try:
        with _open_text(path) as file:
            rows = json.load(file)
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply: mend it") from error
    except json.JSONDecodeError as error:
        reason = f"not valid JSON: {error.msg} at column {error.colno}"
        raise ValueError(f"{path}, line {error.lineno}: {reason}: mend it") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: is not a JSON object: mend it")
        yield row
