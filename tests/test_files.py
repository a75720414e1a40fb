"""Files of a run: nothing of somebody else's is touched, checkpoints are whole or passed over, one run at a time."""

import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, make_model, make_rows, make_tokenizer, read, same, start, weights
from transformers import AutoModelForCausalLM

from dpo import files
from dpo.checkpoint import checkpoints, find_checkpoint, save_model
from dpo.config import DPOConfig, UserError
from dpo.distributed import World
from dpo.loop import train

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
SAVES = {"save_strategy": "steps", "save_steps": 1}


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_model_dir(folder):
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


# ----------------------------------------------------------------------------------------------- whose output_dir it is


@pytest.mark.parametrize("how", ["model", "reference", "link", "checkpoint", "dataset"])
def test_output_dir_is_not_where_the_model_the_reference_or_the_data_lie(how, tmp_path):
    own = make_model_dir(tmp_path / "own")
    (own / "data").mkdir()
    (own / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(3)))
    (tmp_path / "link").symlink_to(own)
    other = make_model_dir(tmp_path / "other")
    before = contents(own)
    options = {"output_dir": str(tmp_path / "link" if how == "link" else own), "overwrite_output_dir": True}
    options |= {"model_name_or_path": str(other if how in ("reference", "dataset") else own)}
    options |= {"ref_model_name_or_path": str(own)} if how == "reference" else {}
    if how == "checkpoint":
        own = own.rename(tmp_path / "checkpoint-3")
        options |= {"output_dir": str(tmp_path), "model_name_or_path": str(own)}
    rows = make_rows(3)
    if how == "dataset":
        own = own / "data"
        options, rows, before = options | {"output_dir": str(own)}, str(own), contents(own)
    with pytest.raises(UserError, match="lies in output_dir .*: name another"):
        train(args=DPOConfig(max_steps=1, disable_tqdm=True, **options), train_dataset=rows)
    assert contents(own) == before


@pytest.mark.parametrize(
    "name", ["model.safetensors", "README.md", "config.json", "samples.jsonl", "adapter_model.bin"]
)
def test_what_no_run_wrote_is_neither_replaced_nor_deleted(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds what no run of dpo.loop wrote .{name}.: name another"):
        start(tmp_path, overwrite_output_dir=True)
    assert contents(tmp_path) == {name: b"mine"}
    (tmp_path / name).rename(tmp_path / "notes.txt")  # of a name that no run uses: it stays, and does no harm
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "mine.txt").write_text("mine")
    for _ in range(2):
        start(tmp_path, overwrite_output_dir=True, **SAVES)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "checkpoint-3.other-1" / "mine.txt").read_text() == "mine"
    assert (tmp_path / "checkpoint-3" / "state.pt").exists()


def test_a_config_that_runs_again_does_not_overwrite_unasked_and_keeps_no_secret(tmp_path):
    kwargs = {"token": "hf_secret", "dtype": torch.float32}
    args = DPOConfig(
        model_name_or_path=str(make_model_dir(tmp_path / "model")), output_dir=str(tmp_path / "out"), max_steps=1,
        overwrite_output_dir=True, model_init_kwargs=kwargs, disable_tqdm=True,
    )  # fmt: skip
    train(args=args, train_dataset=make_rows(3))
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert written["overwrite_output_dir"] is False and written["model_init_kwargs"] == {"dtype": "float32"}
    assert not any(b"hf_secret" in content for content in contents(tmp_path / "out").values())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_text("mine"), "is not a directory"),
        (lambda path: path.symlink_to(path.parent / "nowhere"), "is not a directory"),
        (lambda path: (path.parent / "file").write_text("mine"), "is not a directory"),
    ],
)
def test_an_output_dir_that_cannot_be_is_refused_before_the_model_is_loaded(make, words, tmp_path):
    make(tmp_path / "out")
    output_dir = tmp_path / "file" / "out" if (tmp_path / "file").exists() else tmp_path / "out"
    with pytest.raises(UserError, match=words):
        args = DPOConfig(model_name_or_path="no/such-model", output_dir=str(output_dir))
        train(args=args, train_dataset=make_rows(3))


def test_two_runs_do_not_share_an_output_dir_and_the_lock_ends_with_its_process(tmp_path, monkeypatch):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from dpo import files; "
    code += f"lock = files.lock(Path({str(tmp_path)!r})); print('locked', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with monkeypatch.context() as patch:
        patch.setattr(files, "PATIENCE", 0.3)
        with pytest.raises(UserError, match="is in use by another run"):
            start(tmp_path)
    threading.Timer(0.5, other.kill).start()  # a run that is leaving is waited for
    start(tmp_path)
    other.wait()


def test_a_run_says_what_it_is(tmp_path):
    assert files.run_in(tmp_path) is None
    states = []
    start(tmp_path, callbacks=[lambda _: states.append(files.run_in(tmp_path)["status"])], **SAVES)
    run = files.run_in(tmp_path)
    assert set(states) == {"training"} and (run["status"], run["step"], run["steps"]) == ("finished", 3, 3)
    assert {"model.safetensors", "tokenizer.json", "metrics.jsonl"} <= set(run["files"])
    assert files.problem_of(tmp_path) is None  # the final model is sealed, too


# ---------------------------------------------------------------------------------------------------------- checkpoints

DAMAGE = {
    "a bit": lambda path: flip(path / "model.safetensors"),
    "a bit of the state": lambda path: flip(path / "state.pt"),
    "cut": lambda path: os.truncate(path / "state" / "__0_0.distcp", 100),
    "emptied": lambda path: os.truncate(path / "model.safetensors", 0),
    "missing": lambda path: (path / "config.json").unlink(),
    "manifest cut": lambda path: os.truncate(path / files.MANIFEST, 20),
    "a folder in its place": lambda path: ((path / "state.pt").unlink(), (path / "state.pt").mkdir()),
}


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return start(folder, **SAVES)


@pytest.mark.parametrize("damage", DAMAGE)
def test_of_a_damaged_checkpoint_the_one_before_is_taken_and_the_run_ends_the_same(damage, whole, tmp_path, caplog):
    shutil.copytree(whole.output_dir, tmp_path / "run")
    DAMAGE[damage](tmp_path / "run" / "checkpoint-3")
    caplog.set_level("WARNING")
    resumed = start(tmp_path / "run", resume_from_checkpoint="true", **SAVES)
    assert "checkpoint-3 is damaged" in caplog.text and "passed over" in caplog.text
    assert same(weights(resumed.model), weights(whole.model))
    assert files.problem_of(tmp_path / "run" / "checkpoint-3") is None
    with pytest.raises(UserError, match="checkpoint-2 is damaged"):
        DAMAGE[damage](tmp_path / "run" / "checkpoint-2")
        start(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"), **SAVES)


def test_if_all_are_damaged_nothing_is_thrown_away(whole, tmp_path):
    shutil.copytree(whole.output_dir, tmp_path / "run")
    for step in (1, 2, 3):
        flip(tmp_path / "run" / f"checkpoint-{step}" / "state.pt")
    with pytest.raises(UserError, match="checkpoint-3, checkpoint-2, checkpoint-1 in .* are damaged"):
        start(tmp_path / "run", resume_from_checkpoint="true", **SAVES)
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


@pytest.mark.parametrize("stray", ["empty", "file", "link", "of another program", "unfinished"])
def test_what_only_has_a_checkpoints_name_is_passed_over(stray, whole, tmp_path, caplog):
    shutil.copytree(whole.output_dir, tmp_path / "run")
    path = tmp_path / "run" / ("checkpoint-999.unfinished" if stray == "unfinished" else "checkpoint-999")
    if stray in ("empty", "of another program", "unfinished"):
        path.mkdir()
    if stray == "of another program":
        (path / "trainer_state.json").write_text("{}")
    elif stray == "file":
        path.write_text("mine")
    elif stray == "link":
        path.symlink_to(tmp_path / "nowhere")
    assert find_checkpoint("true", tmp_path / "run", overwrite=False).name == "checkpoint-3"
    assert f"{path} is no checkpoint of a run: passed over" in caplog.text or stray == "unfinished"
    start(tmp_path / "run", resume_from_checkpoint="true", **SAVES)
    assert path.exists() or path.is_symlink()


def test_one_command_line_serves_a_first_start_and_every_restart(tmp_path, whole):
    class Killed(Exception):
        pass

    def kill(row):
        raise Killed

    options = {"resume_from_checkpoint": "true", **SAVES}
    with pytest.raises(Killed):  # before the first checkpoint
        start(tmp_path, callbacks=[kill], **options)
    with pytest.raises(Killed):
        start(tmp_path, callbacks=[lambda row: kill(row) if row["step"] == 2 else None], **options)
    run = start(tmp_path, **options)
    assert same(weights(run.model), weights(whole.model)) and [row["step"] for row in read(tmp_path)] == [1, 2, 3]
    again = start(tmp_path, **options)  # a finished one has nothing left to do
    assert same(weights(again.model), weights(whole.model)) and [row["step"] for row in read(tmp_path)] == [1, 2, 3]


def test_lines_that_are_no_rows_of_metrics_do_not_keep_a_run_from_going_on(whole, tmp_path):
    shutil.copytree(whole.output_dir, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text('hello\n[1]\n{"step": "x"}\n\n' + path.read_text() + '{"step": 7, "lo')
    run = start(tmp_path / "run", resume_from_checkpoint="true", **SAVES)
    assert [row["step"] for row in run.rows] == [row["step"] for row in read(tmp_path / "run")] == [1, 2, 3]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("1")
    full = pytest.raises(ValueError, match="could not be written: No space left")
    with full, files.written_aside(tmp_path / "a", ALONE) as aside:
        (aside / "half").write_text("x")
        raise OSError("No space left on device")
    assert contents(tmp_path) == {"a/mine": b"1"}
    with files.written_aside(tmp_path / "b", ALONE) as aside:
        (aside / "deep").mkdir()
        (aside / "deep" / "file").write_text("x")
    assert files.problem_of(tmp_path / "b") is None
    (tmp_path / "b" / "deep" / "file").write_text("y")
    assert files.problem_of(tmp_path / "b") == "deep/file is not as it was written"


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 1e38, "max_steps": 1},  # the gradient is fine, the weights are not
        {"beta": 1e30, "optim": "sgd", "learning_rate": 1.0},
        {"rows": [{**row, "weight": 3e38} for row in make_rows(24)]},
        {"learning_rate": 1e20, "optim": "sgd", "max_grad_norm": 0, "logging_steps": 10},
    ],
    ids=["rate", "beta", "weight", "between two logged steps"],
)
def test_nothing_that_is_not_finite_is_saved(options, tmp_path):
    rows = options.pop("rows", None)
    with pytest.raises(UserError, match="not finite: lower learning_rate|gradient's norm is (nan|inf) at step"):
        start(tmp_path, rows=rows, save_total_limit=1, **{**SAVES, **options})
    assert not (tmp_path / "model.safetensors").exists()
    for path in tmp_path.glob("checkpoint-*"):
        saved = AutoModelForCausalLM.from_pretrained(path)
        assert all(torch.isfinite(value).all() for value in saved.state_dict().values())
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_a_metric_that_is_not_finite_is_null_and_never_the_best(tmp_path):
    values = iter([2.0, np.float32("nan"), torch.tensor(1.0)])
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, **SAVES}
    options |= {"report_to": ["tensorboard"]}
    run = start(
        tmp_path, eval_rows=make_rows(3), compute_metrics=lambda _: {"score": next(values)},
        metric_for_best_model="score", greater_is_better=True, **options,
    )  # fmt: skip
    assert [row["eval_score"] for row in read(tmp_path) if "eval_score" in row] == [2.0, None, 1.0]
    assert run.state.best == {"step": 1, "value": 2.0}


def test_a_model_that_is_not_finite_is_not_saved(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="the weights of lm_head.weight are not finite"):
        save_model(tmp_path, ALONE, model, make_tokenizer())


def test_names_in_a_run_json_lead_nowhere_else(tmp_path):
    start(tmp_path / "box" / "run", **SAVES)
    (tmp_path / "box" / "thesis.txt").write_text("mine")
    content = json.loads((tmp_path / "box" / "run" / files.RUN).read_text())
    for name in ("..", "../thesis.txt", ".", "", str(tmp_path / "box" / "thesis.txt")):
        (tmp_path / "box" / "run" / files.RUN).write_text(json.dumps({**content, "files": [*content["files"], name]}))
        with pytest.raises(UserError, match="holds what no run of dpo.loop wrote"):
            start(tmp_path / "box" / "run", overwrite_output_dir=True)
    assert (tmp_path / "box" / "thesis.txt").read_text() == "mine"


def test_notes_in_a_checkpoint_stay_when_it_goes(tmp_path):
    start(tmp_path, **SAVES)
    first = min(checkpoints(tmp_path).values())
    (first / "notes.txt").write_text("mine")
    start(tmp_path, overwrite_output_dir=True, save_strategy="no")
    assert [path.name for path in first.iterdir()] == ["notes.txt"] and not checkpoints(tmp_path)
    (tmp_path / "checkpoint-007").mkdir()
    start(tmp_path, overwrite_output_dir=True, **SAVES)
    assert (first.with_name(f"{first.name}.other-1") / "notes.txt").read_text() == "mine" and checkpoints(tmp_path)
