"""Many processes: a run is the same in one, in two and four, with copies of the model in each or in shards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_runs
import torch
from conftest import ROOT
from safetensors.torch import load_file
from sharded_runs import CASES, KEPT
from transformers import AutoModelForCausalLM

COMMON = [name for name in CASES if not name.startswith("saved")]


def runs_of(folder: Path, processes: int, how: str, names: list[str]) -> None:
    """Makes runs of `sharded_runs`, by torchrun, one after the other."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *torchrun, ROOT / "tests" / "sharded_runs.py", folder, str(processes), how, *names]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def left(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text())


def assert_alike(rows: list[dict], expected: list[dict], *, tolerance: float = 1e-5) -> None:
    assert [row.keys() for row in rows] == [row.keys() for row in expected] and rows
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=tolerance, abs=tolerance)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The models, and what each case says that one process runs alone."""
    folder = tmp_path_factory.mktemp("shards")
    torch.manual_seed(0)
    sharded_runs.make_models(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> Path:
    for name in CASES:
        sharded_runs.main(folder, 1, "alone", [name])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_run_in_shards_is_that_of_one_process(alone, processes):
    names = COMMON if processes == 2 else [name for name in COMMON if "accumulated" not in name and name != "sorted"]
    runs_of(alone, processes, "fsdp", names)
    for name in names:
        assert_alike(left(alone, f"fsdp-{processes}-{name}"), left(alone, f"alone-1-{name}"))
    for name in ("evaluated", "evaluated lora"):  # the same answers, in the same order
        answers = [(alone / f"{how}-{name}" / "samples.jsonl").read_text() for how in ("alone-1", f"fsdp-{processes}")]
        assert answers[0] == answers[1] and answers[0].count("\n") == 10


@pytest.mark.slow
def test_what_a_run_in_shards_leaves_is_an_ordinary_model(alone):
    runs_of(alone, 2, "fsdp", ["full", "tied", "rearranged", "lora and head", "encoder-decoder"])
    for name in ("full", "tied", "rearranged", "lora and head", "encoder-decoder"):
        one, two = alone / f"alone-1-{name}", alone / f"fsdp-2-{name}"
        assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
        file = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
        a, b = load_file(one / file), load_file(two / file)
        assert a.keys() == b.keys()
        for key in sorted(a):
            if not key.endswith("k_proj.bias"):  # the softmax leaves it no gradient but rounding, which Adam blows up
                assert torch.allclose(a[key], b[key], atol=2e-5), (name, key)
        if "lora" not in name:
            assert (one / "config.json").read_text() == (two / "config.json").read_text()
    AutoModelForCausalLM.from_pretrained(alone / "fsdp-2-full")


@pytest.mark.slow
def test_a_checkpoint_serves_any_number_of_processes_and_both_layouts(alone):
    """Saved in shards by two, by two with copies, and by one; each goes on in all the other ways."""
    ways = {"fsdp-2": ["alone-1", "fsdp-2", "ddp-2", "fsdp-4"], "ddp-2": ["fsdp-2", "ddp-2"], "alone-1": ["fsdp-2"]}
    for how in ("fsdp", "ddp"):
        runs_of(alone, 2, how, [f"saved {name}" for name in KEPT])
    going_on = {}
    for source, targets in ways.items():
        for target in targets:
            going_on.setdefault(target, []).extend(f"saved {name}@{source}-saved {name}" for name in KEPT)
    for target, names in going_on.items():
        how, processes = target.split("-")
        if how == "alone":
            sharded_runs.main(alone, 1, "alone", names)
        else:
            runs_of(alone, int(processes), how, names)
        for name in names:
            source, rows = name.partition("@")[2], left(alone, f"{target}-{name}")
            expected = left(alone, source)
            file = next((alone / source).glob("*model.safetensors")).name
            weights, own = load_file(alone / source / file), load_file(alone / f"{target}-{name}" / file)
            if source.startswith(target):
                assert rows == expected and all(torch.equal(own[key], weights[key]) for key in weights), name
            else:
                assert_alike(rows, expected)
                assert all(torch.allclose(own[key], weights[key], atol=2e-5) for key in weights), name
