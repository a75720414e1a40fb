"""The tutorials run from top to bottom, and the embedded example, which they make, does what the README says."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, make_model, make_tokenizer, run

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
    files = [path for path in (ROOT / "dpo" / "example").rglob("*") if path.is_file() and path.suffix != ".pyc"]
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
    assert "step 100, held-out pairs: loss" in done.stdout and "mean reward of 64 sampled answers" in done.stdout
    assert "python -m dpo.chat --model_name_or_path dpo-example" in done.stderr
    answer = run(
        "dpo.chat", "--model_name_or_path", "dpo-example", "--prompt", "Review the western The Glass Fox.", cwd=tmp_path
    )
    assert len(answer.stdout.split()) > 3


@pytest.mark.slow
def test_tutorials_1_and_2_make_a_model_and_its_pairs(tmp_path):
    assert "conversations" in tutorial("01_sft_model.py", "--output", str(tmp_path), "--steps", "6")
    made = tutorial(
        "02_preference_pairs.py", "--model", str(tmp_path / "model"), "--output", str(tmp_path), "--prompts", "10"
    )
    assert "reward" in made
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert rows and all(row["score_chosen"] > row["score_rejected"] for row in rows)


@pytest.mark.slow
def test_tutorial_3_pairs_the_shorter_of_two_finished_answers_with_the_longer(tmp_path):
    model = make_model()
    model.generation_config.eos_token_id = list(range(2, 400, 12))  # a random model seldom ends by itself
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    folders = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "pairs")]
    assert "torchrun" in tutorial("03_shorter_answers.py", *folders, "--prompts", "12", "--max_new_tokens", "60")
    rows = [json.loads(line) for line in (tmp_path / "pairs" / "train.jsonl").read_text().splitlines()]
    assert rows and all(row["score_chosen"] > row["score_rejected"] for row in rows)
    assert all(row["chosen"][0] == row["rejected"][0] and row["chosen"][1] != row["rejected"][1] for row in rows)
    done = run(
        "dpo.loop", "--model_name_or_path", "model", "--dataset_name", "pairs", "--eval_strategy", "epoch",
        "--max_steps", "1", "--save_strategy", "no", cwd=tmp_path,
    )  # fmt: skip
    assert "Saved in dpo-output" in done.stderr


def test_tutorial_4_draws_every_loss(tmp_path):
    said = tutorial("04_losses.py", "--output", str(tmp_path / "losses.png"))
    assert (tmp_path / "losses.png").read_bytes()[:4] == b"\x89PNG"
    assert said.count("at h = 0") >= 22 and "nan" not in said
