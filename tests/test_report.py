"""What a run tells: its configuration, the picture, trackers, the model card, the lines in the terminal."""

import dataclasses
import json
import re
import sys
import types

import pytest
import yaml
from conftest import make_rows, start
from matplotlib.figure import Figure

from dpo.config import DPOConfig, parse_args
from dpo.loop import create_model_card, train
from dpo.report import METRICS, plot_rewards

ROWS = make_rows(19)
EVALUATED = {"rows": ROWS, "eval_rows": ROWS[:7], "eval_strategy": "epoch", "learning_rate": 1e-2}


def test_a_written_configuration_runs_again_from_anywhere(model_dir, tmp_path, monkeypatch):
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:8]))
    (tmp_path / "model").symlink_to(model_dir)
    monkeypatch.chdir(tmp_path)
    names = {"model": "model", "train_dataset": "train.jsonl"}  # as in args, they are written absolute
    options = {"ref_model_name_or_path": "./model"}
    options |= {"eval_dataset_name": {"held_out": "held_out.jsonl"}, "eval_strategy": "epoch", "beta": 0.3}
    options |= {"max_steps": 2, "num_train_epochs": 1.0, "save_steps": 1, "disable_tqdm": True, "use_peft": False}
    args = DPOConfig(output_dir="out", lr_scheduler_type="cosine", report_to=["tensorboard"], **options)
    first = train(**names, args=args)
    train(**names, args=dataclasses.replace(args, resume_from_checkpoint="out/checkpoint-1"))
    written = parse_args(["--config", "out/config.yaml"])
    paths = {"model_name_or_path": str(model_dir), "ref_model_name_or_path": str(model_dir)}
    paths["dataset_name"] = f"{tmp_path}/train.jsonl"
    paths["eval_dataset_name"] = {"held_out": f"{tmp_path}/held_out.jsonl"}
    assert dataclasses.asdict(written) == dataclasses.asdict(args) | paths  # resume_from_checkpoint is None

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = train(args=written)
    assert [row.get("loss") for row in again.rows] == [row.get("loss") for row in first.rows]


def test_the_picture_shows_rewards_and_accuracies_of_training_and_evaluation(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    rows = start(tmp_path, **EVALUATED).rows
    loss, rewards, accuracy = figures[0].axes
    for axes, key, name in (
        (loss, "loss", ""),
        (rewards, "rewards/margins", "margin, "),
        (rewards, "rewards/chosen", "chosen, "),
        (rewards, "rewards/rejected", "rejected, "),
        (accuracy, "rewards/accuracies", ""),
    ):
        drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        for prefix, where in (("", "train"), ("eval_", "held-out")):
            key_of = prefix + key
            assert drawn[name + where] == [[row["step"], row[key_of]] for row in rows if key_of in row]
    looks = [(line.get_linestyle(), line.get_marker()) for line in rewards.lines]
    assert len(set(looks)) == len(looks)  # told apart without colour
    with_aux = [row | {prefix + "aux_loss": 9.0 for prefix in ("", "eval_") if prefix + "loss" in row} for row in rows]
    plot_rewards(with_aux, tmp_path / "aux.png")
    assert [line.get_label() for line in figures[1].axes[0].lines] == ["train", "held-out"]
    assert {key.removeprefix("eval_") for row in rows for key in row} <= METRICS.keys()


def test_trackers_get_every_row(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sent = []
    for name in ("wandb", "trackio"):
        fake = types.SimpleNamespace(
            init=lambda project, name, config: sent.append((project, name, config["beta"])),
            log=lambda row, step: sent.append((step, row["loss"])),
        )
        monkeypatch.setitem(sys.modules, name, fake)
    rows = start(tmp_path, report_to=["tensorboard", "wandb", "trackio"], run_name="trial", rows=ROWS).rows
    assert sent[:2] == [("dpo", "trial", 0.1)] * 2
    assert sent[2:] == [(row["step"], row["loss"]) for row in rows for _ in range(2)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, pytest.approx(event.value)) for event in events] == sent[2::2]
    start(tmp_path / "unnamed", report_to=["wandb"], max_steps=1)
    assert sent[-2][1] == "unnamed"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        start(tmp_path / "b", report_to=["wandb"])
    with pytest.raises(ValueError, match="report_to 'sheet' is unknown"):
        start(tmp_path / "c", report_to=["sheet"])


def test_the_model_card_tells_the_last_metrics_and_keeps_the_users_tags(tmp_path, monkeypatch):
    rows = start(tmp_path, **EVALUATED).rows
    card, first, last = (tmp_path / "README.md").read_text(), rows[0], rows[-2] | rows[-1]
    for key, value in last.items():
        assert f"| {key} | {value:.6g} |" in card
    assert f"{first['loss']:.6g}" not in card
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["dpo"]
    (tmp_path / "org").mkdir()
    card = create_model_card(tmp_path, model_name=str(tmp_path / "org"), dataset_name="org/pairs").read_text()
    assert "base_model" not in card and "Model: `org`" in card and "- org/pairs" in card
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in create_model_card(tmp_path, model_name="org").read_text()  # a folder, not the Hub's
    for given, tags in (("mine", ["dpo", "mine"]), (["one", "two"], ["dpo", "one", "two"])):
        head = create_model_card(tmp_path, tags=given).read_text().split("---")[1]
        assert yaml.safe_load(head)["tags"] == tags


def test_the_terminal_shows_loss_accuracy_and_margin(tmp_path, capsys):
    rows = start(tmp_path, disable_tqdm=False, **EVALUATED).rows
    shown, trained, evaluated = capsys.readouterr(), rows[-2], rows[-1]
    loss, accuracy, margin = (trained[key] for key in ("loss", "rewards/accuracies", "rewards/margins"))
    assert re.search(rf"3/3 .*loss={loss:.3f}, accuracy={accuracy:.3f}, margin={margin:.3f}", shown.err)
    loss, accuracy, margin = (evaluated[f"eval_{key}"] for key in ("loss", "rewards/accuracies", "rewards/margins"))
    line = f"step 3, held-out pairs: loss {loss:.3f}, reward accuracy {accuracy:.3f}, margin {margin:.3f}"
    assert line in shown.out + shown.err
    start(tmp_path / "quiet", max_steps=1, disable_tqdm=True)
    assert "margin=" not in capsys.readouterr().err
