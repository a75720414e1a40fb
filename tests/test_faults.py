"""Faults as a tool: `pytest -m faults` kills runs, damages checkpoints, fills the disk, sends signals, and throws
random rows, options and folders at the code; at the end stands a table of what was tried and what was survived.

--tries N sets how often each is tried (20 without it).
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import FAULTS, ROOT, make_model, make_rows, make_tokenizer, read, run, same, start, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dpo import files, loop
from dpo.checkpoint import checkpoints
from dpo.config import DPOConfig, UserError
from dpo.models import load_model

pytestmark = pytest.mark.faults
COMMAND = (
    "--model_name_or_path model --dataset_name rows.jsonl --num_train_epochs 8 --per_device_train_batch_size 4 "
    "--learning_rate 1e-3 --use_cpu --save_steps 2 --save_total_limit 3 --logging_steps 1 --resume_from_checkpoint true"
).split()
WAYS = {"1 process": (1, []), "2 processes": (2, []), "2 in shards": (2, ["--fsdp", "full_shard"])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_data(folder)
    return folder


def make_data(folder: Path) -> None:
    """A model, and rows."""
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(12)))


def whole(folder: Path, way: str) -> Path:
    """What a run that nothing befell left; it is made when it is first asked for."""
    processes, options = WAYS[way]
    output_dir = folder / f"whole {way}"
    if not output_dir.exists():
        run("dpo.loop", *COMMAND, *options, "--output_dir", output_dir.name, processes=processes, cwd=folder)
    return output_dir


def launch(
    folder: Path,
    output_dir: str,
    way: str,
    *,
    fault: str = "",
    torchrun: str = "--standalone",
    more: str = "",
    **environment,
) -> subprocess.Popen:
    """Starts a run; in shards its checkpoints are written while it goes on. torchrun: how its agents meet."""
    processes, options = WAYS[way]
    agent = ["torch.distributed.run", "--nproc_per_node", str(processes), *torchrun.split(), "-m"]
    fault = fault or ("slow" if "--fsdp" in options else "")
    module = ["faulty_runs", fault] if fault else ["dpo.loop"]
    command = [sys.executable, "-m", *(agent if processes > 1 else []), *module]
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    log = (folder / f"{output_dir}.log").open("a")
    return subprocess.Popen(
        [*command, *COMMAND, *options, *more.split(), "--output_dir", output_dir],
        cwd=folder, stdout=log, stderr=log, env={**os.environ, **path, **environment},
    )  # fmt: skip


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)


def files_seen(output_dir: Path) -> list:
    return sorted((path.name, path.stat().st_mtime_ns) for path in output_dir.glob("[mr]*.*"))


def workers_of(agent: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started."""
    path = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def is_at_work(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(process: subprocess.Popen, dice: random.Random | None = None) -> bool:
    """Kills a process, whatever it is at; by the dice, of several one, or torchrun alone, or all. Whether it was still
    at something; the others must notice, and leave."""
    workers, is_alive = workers_of(process), process.poll() is None
    everything = [process.pid, *workers]
    some = dice.choice([[process.pid], everything, *([worker] for worker in workers)]) if dice else everything
    for pid in some if is_alive else []:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=60)
    wait_until(lambda: not any(map(is_at_work, workers)))
    return is_alive


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def survived(kind: str, tries: int, failures: list) -> None:
    FAULTS.append((kind, tries, tries - len(failures)))
    assert not failures


def ends_as_if_nothing_had_happened(folder: Path, output_dir: str, way: str) -> bool:
    """The same command line again: the weights and the metrics are those of the run that nothing befell."""
    processes, options = WAYS[way]
    run("dpo.loop", *COMMAND, *options, "--output_dir", output_dir, processes=processes, cwd=folder)
    return is_as(whole(folder, way), folder / output_dir)


def is_as(whole: Path, again: Path) -> bool:
    """Whether two finished runs have the same weights and, but for speeds, the same metrics; and nothing lies about."""
    rows, wanted = (
        [{k: v for k, v in row.items() if "per_second" not in k} for row in read(p)] for p in (again, whole)
    )
    is_same = same(load_file(whole / "model.safetensors"), load_file(again / "model.safetensors"))
    left = [path for path in again.iterdir() if path.name.endswith((".unfinished", ".finished"))]
    return is_same and rows == wanted and not left and files.run_in(again)["status"] == "finished"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("when", ["at a random moment", "while saving"])
def test_kills(when, way, folder, tries):
    dice, failures, tried = random.Random(way), [], 0
    share = {"1 process": 1, "2 processes": 4, "2 in shards": 2}[way]
    for number in range(max(1, tries // share)):
        output_dir = f"killed {when.split()[-1]} {way} {number}"
        process = launch(folder, output_dir, way)
        begun = folder / output_dir / ("metrics.jsonl" if number % 2 or when == "while saving" else "run.lock")
        wait_for(begun.exists, process)
        if when == "while saving":
            for _ in range(dice.randint(1, 6)):  # in one of the first saves, somewhere in its middle
                wait_for(lambda path=folder / output_dir: list(path.glob("*.unfinished")), process)
            time.sleep(dice.uniform(0, 0.5 if "shards" in way else 0.03))
        else:
            time.sleep(dice.uniform(0, 1.5))
        is_killed = kill(process, dice)
        if when == "at a random moment" and number % 4 == 3 and is_killed:  # and again, as it takes up its own files
            known = files_seen(folder / output_dir)
            process = launch(folder, output_dir, way)
            wait_for(lambda path=folder / output_dir, known=known: files_seen(path) != known, process)
            time.sleep(dice.uniform(0, 0.05))
            kill(process, dice)
        if not ends_as_if_nothing_had_happened(folder, output_dir, way):
            failures.append(output_dir)
        shutil.rmtree(folder / output_dir)
        tried += is_killed  # else it had ended before
    assert tried
    survived(f"killed {when}, {way}", tried, failures)


@pytest.mark.parametrize("way", WAYS)
def test_signals(way, folder, tries):
    share, alone = (2, True) if way == "1 process" else (4, False)
    failures, tried = [], [signal.SIGTERM, signal.SIGHUP, signal.SIGINT][: max(1, tries // share)]
    for number in tried:
        output_dir = f"told {number.name} {way}"
        process = launch(folder, output_dir, way)
        wait_for(lambda path=folder / output_dir / "metrics.jsonl": path.exists() and path.stat().st_size, process)
        process.send_signal(number)
        code, said = process.wait(timeout=120), (folder / f"{output_dir}.log").read_text()
        is_right = f"stopped by {number.name} after step " in said and "--resume_from_checkpoint true" in said
        is_right &= bool(checkpoints(folder / output_dir)) and (code == 128 + number or not alone)
        is_right &= not alone or "Traceback" not in said  # torchrun itself ends with one
        if not (is_right and ends_as_if_nothing_had_happened(folder, output_dir, way)):
            failures.append(output_dir)
    survived(f"told to stop by a signal, {way}", len(tried), failures)


@pytest.mark.parametrize("way", ["2 processes", "2 in shards"])
def test_one_of_several_processes_fails(way, folder, tries):
    """The others leave within seconds, in one line each; the one that failed says why."""
    full = (
        "checkpoint-4 could not be written: [Errno 28] No space left on device (process {}); the last good checkpoint"
    )
    own = "ZeroDivisionError: a callback's own"
    faults = {"refused 1 3 slow": "error: row 7 is odd", "full 1 2 slow": full.format(1), "error 1 3": own}
    faults |= {"full 0 2": full.format(0), "error 0 3 slow": own}
    failures, tried = [], list(faults)[way == "2 in shards" :][: max(1, tries // 4)]
    for fault in tried:
        output_dir = f"failed {fault} {way}"
        process = launch(folder, output_dir, way, fault=fault)
        log = folder / f"{output_dir}.log"
        wait_for(lambda log=log, fault=fault: faults[fault] in log.read_text(), process)
        failed = time.monotonic()
        code, seconds, said = process.wait(timeout=60), time.monotonic() - failed, log.read_text()
        said = said.partition("torch/distributed/elastic/")[
            0
        ]  # by the processes, before torchrun says all that it does
        is_right = code != 0 and seconds < 20 and faults[fault] in said
        is_right &= said.count("Traceback") == fault.startswith("error")
        good = checkpoints(folder / output_dir)
        is_right &= all(files.problem_of(path) is None for path in good.values())
        is_right &= "full" not in fault or (2 in good and not list((folder / output_dir).glob("*.unfinished")))
        if not is_right:
            failures.append((output_dir, code, seconds, said))
    survived(f"one process fails, {way}", len(tried), failures)


def test_damaged_checkpoints(tmp_path, tries, caplog):
    options = {"save_strategy": "steps", "save_steps": 1}
    whole, dice, failures = start(tmp_path / "whole", **options), random.Random(0), []
    for number in range(tries):
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        path = dice.choice(sorted(path for path in (tmp_path / "run" / "checkpoint-3").iterdir()))
        content = bytearray(path.read_bytes())
        how = dice.choice(["flip", "cut", "delete"])
        if how == "delete":
            path.unlink()
        else:
            place = dice.randrange(len(content))
            content[place] ^= 1 << dice.randrange(8)
            path.write_bytes(content if how == "flip" else content[:place])
        caplog.clear()
        resumed = start(tmp_path / "run", resume_from_checkpoint="true", **options)
        named = "checkpoint-3 is damaged" in caplog.text or "checkpoint-3 is no checkpoint" in caplog.text
        if not (named and same(weights(resumed.model), weights(whole.model))):
            failures.append((number, path.name, how))
        shutil.rmtree(tmp_path / "run")
    survived("a checkpoint's bit flipped, file cut or deleted", tries, failures)


def test_full_disk(tmp_path, tries, monkeypatch):
    disk, failures, tries = tmp_path / "disk", [], min(tries, 5)
    disk.mkdir()
    for number in range(tries):
        size = 2_200_000 + 300_000 * number  # room for one or two checkpoints of the tiny model, and no third
        monkeypatch.setattr("dpo.checkpoint.AT_ONCE", 0.0 if number % 2 else 2.0)  # while training goes on, or not
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True
        ).returncode:
            pytest.skip("this machine lets nobody mount a small disk")
        try:
            with pytest.raises(UserError) as stopped:
                start(disk / "run", save_strategy="steps", save_steps=1, num_train_epochs=3)
            message, good = str(stopped.value), checkpoints(disk / "run")
            is_right = "No space left" in message or "could not be written" in message
            is_right &= "\n" not in message and not list((disk / "run").glob("*.unfinished"))
            is_right &= all(files.problem_of(path) is None for path in good.values())
            if not is_right or not good or f"checkpoint-{max(good)}" not in message:
                failures.append((number, message))
        finally:
            subprocess.run(["umount", "-l", disk], check=True)
    survived("the disk full while saving", tries, failures)


# -------------------------------------------------------------------------------------------------------------- fuzzers

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), st.text(max_size=8), st.just("auto"),
    st.lists(st.integers(0, 2), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
FORBIDDEN = {"output_dir", "trust_remote_code", "report_to", "model_name_or_path", "dataset_name", "use_cpu"}
OPTIONS = [name for name in DPOConfig.__dataclass_fields__ if name not in FORBIDDEN]
FEW = settings(suppress_health_check=list(HealthCheck), deadline=None)


def one_line(action) -> str | None:
    """None if it went well, or was refused in one line; else what is wrong about how it failed."""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            action()
    except (UserError, SystemExit) as error:
        text = str(error)
        return None if text.strip() and "\n" not in text else f"not one line: {text!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return None


def fuzz(kind: str, tries: int, strategy, action) -> None:
    failures = []

    @settings(FEW, max_examples=tries, derandomize=True, database=None)
    @given(strategy)
    def go(value):
        if problem := one_line(lambda: action(value)):
            failures.append((value, problem))

    go()
    survived(kind, tries, failures)


def test_random_options(tmp_path, tries):
    def action(options):
        rows, folder = make_rows(4), tempfile.mkdtemp(dir=tmp_path)
        start(Path(folder) / "out", rows=rows, **{"max_steps": 1, "num_train_epochs": 1, **options})

    options = st.dictionaries(st.sampled_from(OPTIONS), ODD, min_size=1, max_size=3)
    fuzz("random options in Python", 10 * tries, options, action)


def test_random_yaml(tmp_path, tries):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(4)))
    fixed = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "max_steps": 1,
    }

    def action(content):
        path = tmp_path / "some.yaml"
        path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(fixed | content).encode())
        output = ["--output_dir", tempfile.mkdtemp(dir=tmp_path), "--use_cpu", "--disable_tqdm", "true"]
        loop.main(["--config", str(path), *output, "--max_steps", "1", "--model_name_or_path", str(tmp_path / "model"),
                   "--dataset_name", str(tmp_path / "rows.jsonl")])  # fmt: skip

    some = st.dictionaries(st.sampled_from(OPTIONS), ODD, min_size=1, max_size=3)
    fuzz("random YAML", 5 * tries, st.one_of(st.binary(max_size=30), some), action)


def test_random_files(tmp_path, tries):
    good = "".join(json.dumps(row) + "\n" for row in make_rows(3)).encode()
    names = ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.jsonl.gz"]
    bits = st.tuples(st.integers(0, len(good)), st.binary(max_size=5), st.integers(0, 40))

    def action(value):
        name, content = value
        if isinstance(content, tuple):
            place, inserted, cut = content
            content = good[:place] + inserted + good[place + cut :]
        (tmp_path / name).write_bytes(content)
        start(Path(tempfile.mkdtemp(dir=tmp_path)) / "out", rows=str(tmp_path / name), max_steps=1)

    fuzz("random files of rows", 5 * tries, st.tuples(st.sampled_from(names), st.one_of(bits, st.binary())), action)


def test_random_model_folders(tmp_path, tries):
    make_model().save_pretrained(tmp_path / "good")
    names = sorted(path.name for path in (tmp_path / "good").iterdir())

    def action(value):
        name, place, inserted, cut = value
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        content = (tmp_path / "bad" / name).read_bytes()
        at = int(place * len(content))
        (tmp_path / "bad" / name).write_bytes(content[:at] + inserted + content[at + cut :])
        try:
            load_model(str(tmp_path / "bad"))
        except ValueError as error:
            raise UserError(str(error)) from error

    parts = st.sampled_from(names), st.floats(0, 1), st.binary(max_size=4), st.integers(0, 200)
    fuzz("random damage to model folders", 5 * tries, st.tuples(*parts), action)
    assert torch.isfinite(load_model(str(tmp_path / "good")).lm_head.weight).all()
