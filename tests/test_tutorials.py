"""The tutorials run as scripts and as notebooks, their rendered copies are in step, the example is as they made it."""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT, make_model, make_tokenizer, run

from dpo.example.reviews import reward

sys.path.insert(0, str(ROOT / "tutorials"))
import render  # noqa: E402

RENDERED = ROOT / "tutorials" / "rendered"
ALONE = [
    "01_one_pair_by_hand",
    "02_the_loss_derived",
    "03_the_loop_in_forty_lines",
    "07_losses",
    "08_the_plan_on_paper",
]


def script(name: str, *arguments: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    command = [sys.executable, ROOT / "tutorials" / f"{name}.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def notebook(name: str, cwd: Path, **defaults: int) -> list[str]:
    """What each code cell of a tutorial prints in a notebook's kernel, with other defaults of its options."""
    cells = render.read(name)
    for option, value in defaults.items():
        pattern, changed = rf'("--{option}", type=int, default=)\d+', 0
        for cell in cells.cells:
            cell.source, number = re.subn(pattern, rf"\g<1>{value}", cell.source)
            changed += number
        assert changed == 1, option
    render.execute(cells, cwd)
    code = [cell for cell in cells.cells if cell.cell_type == "code"]
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in code]


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


@pytest.mark.parametrize("name", render.NAMES)
def test_a_rendered_copy_has_the_cells_of_its_source_in_order(name):
    copy = (RENDERED / f"{name}.md").read_text()
    for cell in render.read(name).cells:
        source = "\n".join(line.rstrip() for line in cell.source.splitlines())
        block = f"```python\n{source}\n```" if cell.cell_type == "code" else source
        assert block in copy, f"python tutorials/render.py {name}"
        copy = copy[copy.index(block) + len(block) :]
    pictures = re.findall(r"!\[png\]\((.*)\)", (RENDERED / f"{name}.md").read_text())
    assert {f"{name}_files/{path.name}" for path in RENDERED.glob(f"{name}_files/*")} == set(pictures)


def test_the_loop_in_forty_lines_has_not_more():
    cells = [cell.source for cell in render.read(ALONE[2]).cells if "loss.backward()" in cell.source]
    lines = [line for line in cells[0].splitlines() if line.strip()]
    assert lines.index("policy.train()") < len(lines) and len(lines) <= 40


@pytest.mark.slow
def test_drawing_every_loss(tmp_path):
    printed = script("07_losses", cwd=tmp_path)
    assert printed.count("at h = 0") >= 22 and "nan" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_a_tutorial_prints_as_a_script_and_as_a_notebook_what_its_rendered_copy_shows(name, tmp_path):
    printed = "".join(notebook(name, tmp_path))
    assert script(name, cwd=tmp_path).split() == printed.split()
    copy = (RENDERED / f"{name}.md").read_text()
    for cell in render.read(name).cells:
        copy = copy.replace("\n".join(line.rstrip() for line in cell.source.splitlines()), "", 1)
    shown = [line[4:].rstrip() for line in copy.splitlines() if line.startswith("    ")]
    lines = [line.rstrip() for line in printed.splitlines() if line.strip()]
    number = re.compile(r"[-+−]?\d+(?:\.\d+)?(?:e-?\d+)?")
    for line, wanted in zip(lines, [line for line in shown if line], strict=True):
        assert number.sub("#", line).split() == number.sub("#", wanted).split()
        ours, theirs = ([float(n.replace("−", "-")) for n in number.findall(each)] for each in (line, wanted))
        assert ours == pytest.approx(theirs, rel=0.02, abs=0.02)  # another machine rounds otherwise


@pytest.mark.slow
def test_the_bare_command_trains_the_example(tmp_path):
    done = run("dpo.loop", processes=1, cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "dpo-example" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "eval_loss" in row][-1]
    assert last["eval_rewards/accuracies"] > 0.9
    assert last["eval_samples/policy_reward"] > last["eval_samples/reference_reward"] + 1
    assert "step 100, held-out pairs: loss" in done.stdout and "mean reward of 64 sampled answers" in done.stdout
    assert "python -m dpo.chat --model_name_or_path dpo-example" in done.stderr
    prompt = ["--prompt", "Review the western The Glass Fox."]
    answer = run("dpo.chat", "--model_name_or_path", "dpo-example", *prompt, cwd=tmp_path)
    assert len(answer.stdout.split()) > 3


@pytest.mark.slow
@pytest.mark.parametrize("as_notebook", [False, True], ids=["script", "notebook"])
def test_a_model_and_its_pairs_are_made(as_notebook, tmp_path):
    if as_notebook:
        assert "conversations" in notebook("04_sft_model", tmp_path, steps=6)[1]
        assert "reward" in notebook("05_preference_pairs", tmp_path, prompts=10)[-1]
    else:
        assert "conversations" in script("04_sft_model", "--steps", "6", cwd=tmp_path)
        script("05_preference_pairs", "--model", "my-example/model", "--prompts", "10", cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "my-example" / "train.jsonl").read_text().splitlines()]
    assert rows and all(row["score_chosen"] > row["score_rejected"] for row in rows)
    assert (tmp_path / "my-example" / "model" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("as_notebook", [False, True], ids=["script", "notebook"])
def test_the_shorter_of_two_finished_answers_is_paired_with_the_longer(as_notebook, tmp_path):
    model = make_model()
    model.generation_config.eos_token_id = list(range(2, 400, 12))  # a random model seldom ends by itself
    model.save_pretrained(tmp_path / "smollm2")
    make_tokenizer().save_pretrained(tmp_path / "smollm2")
    if as_notebook:
        printed = notebook("06_shorter_answers", tmp_path, prompts=12, max_new_tokens=60)[-1]
    else:
        printed = script("06_shorter_answers", "--prompts", "12", "--max_new_tokens", "60", cwd=tmp_path)
    assert "after the training:" in printed
    rows = [json.loads(line) for line in (tmp_path / "smollm2-pairs" / "train.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["chosen"][0] == row["rejected"][0]
        shorter, longer = (len(make_tokenizer()(row[side][1]["content"])["input_ids"]) for side in row)
        assert longer > shorter
    assert rows and (tmp_path / "smollm2-dpo" / "model.safetensors").exists()


def test_the_snippets_of_the_readme_print_what_it_shows(tmp_path, monkeypatch, capsys):
    (tmp_path / "dpo").symlink_to(ROOT / "dpo")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    snippets = [
        (code, shown) for (kind, code), (after, shown) in pairwise(blocks) if (kind, after) == ("python", "text")
    ]
    assert len(snippets) == 2
    for code, shown in snippets:
        capsys.readouterr()
        exec(compile(code, "README.md", "exec"), {})
        words, wanted = (re.findall(r"[^\s()\[\],]+", text) for text in (capsys.readouterr().out, shown))
        for word, other in zip(words, wanted, strict=True):
            assert word == other or float(word) == pytest.approx(float(other), abs=2e-3)
