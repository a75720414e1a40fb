"""The tutorials run from top to bottom, and the embedded example, which they make, does what the README says."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, run

from dpo.example.reviews import reward

TUTORIALS = ROOT / "tutorials"


def tutorial(name: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, TUTORIALS / name, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_is_small_and_consistent():
    files = [
        path for path in (ROOT / "dpo" / "example").rglob("*") if path.is_file() and "__pycache__" not in str(path)
    ]
    assert sum(path.stat().st_size for path in files) < 5_000_000
    train, test = (
        [json.loads(line) for line in (ROOT / "dpo" / "example" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    )
    assert not {row["prompt"][0]["content"] for row in train} & {row["prompt"][0]["content"] for row in test}
    for row in train + test:  # every label is the ground-truth reward's
        chosen, rejected = (reward("", row[key][0]["content"]) for key in ("chosen", "rejected"))
        assert chosen > rejected and (chosen, rejected) == (row["score_chosen"], row["score_rejected"])


@pytest.mark.slow
def test_the_bare_command_trains_the_example(tmp_path):
    done = run("dpo.loop", processes=1, cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "dpo-example" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "eval_loss" in row][-1]
    assert last["eval_rewards/accuracies"] > 0.9
    assert last["eval_samples/policy_reward"] > last["eval_samples/reference_reward"] + 1
    assert "mean reward of 64 sampled answers" in done.stdout + done.stderr
    assert "python -m dpo.chat --model_name_or_path dpo-example" in done.stderr
    answer = run(
        "dpo.chat", "--model_name_or_path", "dpo-example", "--prompt", "Review the western The Glass Fox.", cwd=tmp_path
    )
    assert len(answer.stdout.split()) > 3
