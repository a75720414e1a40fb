"""The benchmark of layouts on the smallest case, and its counting of operations against two other ways to count."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_model
from torch.utils.flop_counter import FlopCounterMode

from dpo.attention import attend_by_segments
from dpo.collate import DataCollatorForPreference
from dpo.logprobs import concatenated_forward

SCRIPT = ROOT / "tests" / "benchmarks" / "layouts.py"
LAYOUTS = ("padded", "padding_free", "prefix_shared")
LENGTHS = [(5, [3, 1, 4]), (2, [6, 2, 2])]  # of each row the prompt's tokens and the completions'


@pytest.fixture(scope="module")
def common():
    """tests/benchmarks/common.py, without its directory on the path: `import trl` would find the file there."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("benchmarks_common", SCRIPT.with_name("common.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def batch_of(layout: str) -> dict:
    rows = []
    for prompt, (chosen, *rejected) in LENGTHS:
        row = {"prompt_input_ids": [7] * prompt, "chosen_input_ids": [8] * chosen}
        rows.append(row | {"rejected_input_ids": [[9] * length for length in rejected]})
    return DataCollatorForPreference(pad_token_id=0, layout=layout)(rows)


def seen_pairs(layout: str) -> int:
    """Pairs of query and key, position by position: each position says which row, which part and which place it is."""
    width = max(prompt + length for prompt, completions in LENGTHS for length in completions)
    positions = []
    for row, (prompt, completions) in enumerate(LENGTHS):
        if layout == "prefix_shared":
            positions += [(row, "prompt", place) for place in range(prompt)]
            parts = [range(prompt, prompt + length) for length in completions]
        else:
            parts = [range(width if layout == "padded" else prompt + length) for length in completions]
        positions += [(row, part, place) for part, places in enumerate(parts) for place in places]
    return sum(
        query[0] == key[0] and key[1] in ("prompt", query[1]) and key[2] <= query[2]
        for query in positions
        for key in positions
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_are_those_of_the_batch_and_of_each_position(common, layout):
    batch, counts = batch_of(layout), common.layout_counts(layout, LENGTHS)
    assert counts["tokens"] == batch["inputs"]["input_ids"].numel()
    assert counts["kept"] == len(batch["targets"])
    assert counts["pairs"] == seen_pairs(layout)


@pytest.mark.parametrize("live", [False, True], ids=["cached", "live"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operations_are_those_that_torch_counts_as_they_are_done(common, layout, live):
    """Of the weights, that is; of attention torch counts what a mask hides, too: there the formula is written out."""
    model, batch = make_model(), batch_of(layout)
    attend_by_segments(model)
    with FlopCounterMode(display=False) as counter:
        concatenated_forward(model, batch)["chosen_logps"].sum().backward()
        if live:
            with torch.no_grad():
                concatenated_forward(model, batch)
    by_operation = counter.get_flop_counts()["Global"]
    multiplied = sum(flops for operation, flops in by_operation.items() if str(operation) in ("aten.mm", "aten.addmm"))
    counts = common.layout_counts(layout, LENGTHS)
    weights = {"trunk": sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)}
    weights |= {"head": model.lm_head.weight.numel(), "width": 48, "layers": 2}
    assert common.step_flops(**counts | {"pairs": 0}, **weights, live=live) == multiplied
    attention = (16 if live else 12) * 48 * 2 * counts["pairs"]
    assert common.step_flops(**counts, **weights, live=live) == multiplied + attention


def test_frozen_weights_have_no_gradient_to_compute(common):
    numbers = {"tokens": 10, "kept": 3, "pairs": 0, "trunk": 100, "head": 50, "width": 4, "layers": 1}
    assert common.step_flops(**numbers) == 6 * (100 * 10 + 50 * 3)
    assert common.step_flops(**numbers, adapter=7) == 4 * (100 * 10 + 50 * 3) + 6 * 7 * 10


def test_the_benchmark_of_layouts_runs_and_all_competitors_have_the_same_losses(tmp_path):
    case = ["--shape", "tiny", "--vocab", "64", "--tokens", "12", "--rows", "2", "--rounds", "3", "--device", "cpu"]
    case += ["--ratio", "1:1", "--train", "full", "lora", "--reference", "live", "cached", "--completions", "2", "3"]
    files = ["--markdown", str(tmp_path / "grid.md"), "--picture", str(tmp_path / "grid.png")]
    done = subprocess.run([sys.executable, SCRIPT, *case, *files], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "grid.md").read_text()
    assert table in done.stdout and (tmp_path / "grid.png").stat().st_size > 1000
    for layout in ("plain", *LAYOUTS):
        for name in ("full, live, K=2", "full, cached, K=3", "lora, live, K=3", "lora, cached, K=2"):
            assert f"| 1:1, 64, {name} | {layout} | 0." in table
    assert float(table.split("Losses agree to ")[1].split()[0]) < 1e-4
