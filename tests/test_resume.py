"""Stopping and going on: a resumed run ends as one that never stopped, and nothing of another run is mixed in."""

import datetime
import os
import random
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CHATML, curve, make_model, make_rows, make_tokenizer, read, same, start, weights
from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from dpo import files
from dpo.checkpoint import prune_checkpoints, save_model
from dpo.data import prepare_dataset
from dpo.distributed import World, noted_signals
from dpo.models import load_model
from dpo.sources import load_preferences

ROWS, EVAL_ROWS = make_rows(24), make_rows(7, seed=1)


class Stop(Exception):
    """Ends a run in the middle, as a power cut would."""


def run_until(step: int, *arguments, callbacks=(), **options) -> None:
    """Starts a run that ends with its training row of this step: after that update, before its evaluation and save."""

    def stop(row):
        if row["step"] == step:
            raise Stop

    with pytest.raises(Stop):
        start(*arguments, callbacks=[*callbacks, stop], **options)


def checkpoints(output_dir) -> set[str]:
    return {path.name for path in output_dir.glob("checkpoint-*")}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"peft_config": {"r": 4, "lora_dropout": 0.2}},
        {"loss_type": "bco_pair"},
        {"fp16": True, "beta": 2.5},  # its first steps overflow and are left out: the loss scale is no longer the first
        {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
        {"sync_ref_model": True, "ref_model_sync_steps": 2, "peft_config": {"r": 4}},
    ],
    ids=["full", "lora", "bco", "fp16", "synced", "synced lora"],
)
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, more):
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2} | more
    options |= {"save_strategy": "steps", "save_steps": 5, "logging_steps": 3, "warmup_ratio": 0.3}
    drawn = {"whole": {}, "resumed": {}}  # by callbacks, which may use Python's and NumPy's random numbers

    def draw(name):
        return lambda row: drawn[name].update({row["step"]: (random.random(), np.random.rand())})

    whole = start(tmp_path / "whole", callbacks=[draw("whole")], **options)
    run_until(6, tmp_path / "cut", callbacks=[draw("resumed")], **options)
    assert checkpoints(tmp_path / "cut") == {"checkpoint-5"}
    del drawn["resumed"][6]  # of the run that was cut: the one that goes on shall draw it again
    resumed = start(tmp_path / "cut", resume_from_checkpoint="true", callbacks=[draw("resumed")], **options)
    assert same(weights(whole.model), weights(resumed.model))
    assert curve(resumed, "step") == [1, 3, 6] and resumed.rows == read(tmp_path / "cut")
    for row in (*whole.rows, *resumed.rows):
        del row["tokens_per_second"], row["unique_tokens_per_second"]
    assert resumed.rows == whole.rows
    assert drawn["resumed"] == drawn["whole"]


@pytest.mark.slow
def test_a_compiled_model_trains_saves_and_resumes(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    plain = start(tmp_path / "plain", **options)
    run_until(3, tmp_path / "compiled", torch.compile(make_model(), backend="eager"), **options)
    again = torch.compile(make_model(), backend="eager")
    resumed = start(tmp_path / "compiled", again, resume_from_checkpoint="true", **options)
    assert curve(resumed) == pytest.approx(curve(plain), abs=1e-5)
    saved = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "compiled"))
    assert all(torch.allclose(saved[name], value, atol=1e-5) for name, value in weights(plain.model).items())


@pytest.mark.parametrize(
    ("metric", "more", "values"),
    [
        ("score", {}, [1, 3, 2, 0]),
        ("score", {}, [1, 3, 3, 0]),  # of equals the first
        ("score", {"greater_is_better": False}, [1, 0, 2, 3]),
        ("mean_loss", {}, [1, 0, 2, 3]),
        ("mean_loss", {"greater_is_better": True}, [1, 3, 2, 0]),
        # Without a checkpoint there is nothing to go back to. Going on from step 2, step 3 is evaluated again.
        ("score", {"eval_steps": 1, "save_steps": 2}, [1, 3, 9, 9, 0]),
    ],
    ids=["greater", "tie", "smaller", "loss", "greater loss", "without checkpoint"],
)
def test_the_best_evaluated_model_is_kept_and_left_even_if_the_run_stopped_after_it(tmp_path, metric, more, values):
    """Four steps evaluated with values made up here, the second the best of those that are saved."""
    strategy, scripted = "steps" if "eval_steps" in more else "epoch", iter(values)
    options = {"num_train_epochs": 4, "eval_strategy": strategy, "save_strategy": strategy, "save_total_limit": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": metric, "rows": ROWS[:8]} | more
    options |= {"eval_rows": EVAL_ROWS, "compute_metrics": lambda prediction: {metric: float(next(scripted))}}
    run_until(4, tmp_path, **options)
    left = start(tmp_path, resume_from_checkpoint="true", **options).model
    assert checkpoints(tmp_path) == {"checkpoint-2", "checkpoint-4"}
    second, last = (weights(AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{n}")) for n in (2, 4))
    assert same(weights(left), second) and not same(second, last)
    assert same(weights(AutoModelForCausalLM.from_pretrained(tmp_path)), second)


def test_the_newest_and_the_best_checkpoint_stay_whatever_the_limit(tmp_path):
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "state.pt").write_bytes(b"")
        files.seal(tmp_path / f"checkpoint-{step}")
    prune_checkpoints(tmp_path, limit=1, best=1)
    assert checkpoints(tmp_path) == {"checkpoint-1", "checkpoint-3"}


def test_an_adapter_that_has_a_name_is_saved_where_it_is_looked_for(tmp_path):
    models = []
    for seed in (1, 2):
        model, config = make_model(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
        torch.manual_seed(seed)
        models.append(get_peft_model(model, config, adapter_name="mine"))
    save_model(tmp_path, World(0, 1, torch.device("cpu")), models[0], make_tokenizer())
    assert not same(weights(models[0]), weights(models[1]))
    set_peft_model_state_dict(models[1], load_peft_weights(str(tmp_path)), "mine")
    assert same(weights(models[0]), weights(models[1]))
    assert (tmp_path / "adapter_config.json").is_file() and not (tmp_path / "mine").exists()


def test_an_unknown_metric_for_the_best_model_is_refused_with_those_that_there_are(tmp_path):
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    with pytest.raises(ValueError, match="eval_nonsense.* is not evaluated: choose among eval_loss"):
        start(tmp_path, eval_rows=EVAL_ROWS, metric_for_best_model="nonsense", **options)


# ------------------------------------------------------------------------------------------------ this run or another


def test_resuming_another_run_is_refused_and_says_what_differs(tmp_path):
    start(tmp_path, save_strategy="steps")
    one_by_one = {"rows": ROWS[:20], "seed": 1, "data_seed": 1, "beta": 0.2, "loss_type": "ipo", "learning_rate": 2e-3}
    one_by_one |= {"shuffle": False, "label_smoothing": 0.1, "max_grad_norm": 0.5, "optim": "sgd", "ld_alpha": 0.5}
    one_by_one |= {"layout": "padded", "logits_budget": 1.0, "max_tokens_per_micro_batch": 500}
    changes = [{name: value} for name, value in one_by_one.items()]
    for options in (*changes, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}):
        with pytest.raises(ValueError, match="of another run") as refused:
            start(tmp_path, resume_from_checkpoint="true", **options)
        assert all(f"{name} " in str(refused.value) for name in options), options
    with pytest.raises(ValueError, match="another run, .*steps 3 .now 2"):
        start(tmp_path, resume_from_checkpoint="true", max_steps=2)
    with pytest.raises(ValueError, match="there is no directory"):
        start(tmp_path / "none", resume_from_checkpoint="nowhere")


def test_an_earlier_run_is_not_overwritten_unless_asked_for_and_then_leaves_nothing(tmp_path, model_dir):
    start(tmp_path, str(model_dir), use_peft=True, max_steps=1, save_strategy="steps")
    (tmp_path / "samples.jsonl").write_text('{"prompt": "of the earlier run"}\n')
    before = sorted(path.name for path in tmp_path.iterdir())
    for options, words in (
        ({}, "holds a finished run"),
        # What is wrong with the new run's input is said before anything of the old one is deleted.
        ({"overwrite_output_dir": True, "rows": [{"prompt": "a", "rejected": "b"}]}, "column 'chosen'"),
        ({"overwrite_output_dir": True, "report_to": ["wandbb"]}, "report_to 'wandbb' is unknown"),
    ):
        with pytest.raises(ValueError, match=words):
            start(tmp_path, **options)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    full = start(tmp_path, str(model_dir), max_steps=2, overwrite_output_dir=True).model
    assert not checkpoints(tmp_path) and len(read(tmp_path)) == 2 and not (tmp_path / "samples.jsonl").exists()
    assert same(weights(full), weights(load_model(str(tmp_path))))  # not hidden by the earlier run's adapter
    start(tmp_path, str(model_dir), max_steps=1, overwrite_output_dir=True, use_peft=True)
    assert not (tmp_path / "model.safetensors").exists()


def test_going_on_from_an_older_checkpoint_keeps_it_and_drops_the_abandoned_ones(tmp_path):
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    whole = start(tmp_path, **options)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # a row that was cut short does not keep a run from going on
    older = str(tmp_path / "checkpoint-2")
    run_until(3, tmp_path, resume_from_checkpoint=older, **options)
    assert checkpoints(tmp_path) == {"checkpoint-1", "checkpoint-2"}
    (tmp_path / "checkpoint-3.unfinished" / "left").mkdir(parents=True)  # what a killed run was writing
    resumed = start(tmp_path, resume_from_checkpoint=older, **options)
    assert same(weights(resumed.model), weights(whole.model)) and curve(resumed, "step") == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "checkpoint-3" / "left").exists()


def test_going_on_in_another_directory_overwrites_a_run_there_only_if_asked_to(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = start(tmp_path / "whole", **options)
    start(tmp_path / "other", max_steps=1)
    options |= {"resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-2")}
    with pytest.raises(ValueError, match="holds a finished run, step 1 of 1"):
        start(tmp_path / "other", **options)
    for name, more in (("new", {}), ("other", {"overwrite_output_dir": True})):
        resumed = start(tmp_path / name, **options, **more)
        assert same(weights(resumed.model), weights(whole.model))
        assert resumed.rows[-1]["loss"] == whole.rows[-1]["loss"]


def test_a_template_that_writes_the_date_writes_that_of_the_run(tmp_path, monkeypatch):
    """A run that goes on another day has the rows that it began with."""
    tokenizer = make_tokenizer("{{ strftime_now('%d %b %Y') }}" + CHATML)
    rows = make_rows(8, conversational=True)
    for day, written in (("2026-01-31", "31 Jan 2026"), ("2026-02-01", "01 Feb 2026")):
        ids = prepare_dataset(load_preferences(rows), tokenizer, today=day)[0]["prompt_input_ids"]
        assert tokenizer.decode(ids).startswith(written)
    options = {"rows": rows, "processing_class": tokenizer, "per_device_train_batch_size": 4, "save_strategy": "epoch"}
    options |= {"num_train_epochs": 2}
    with monkeypatch.context() as patch:
        today = SimpleNamespace(today=lambda: datetime.date(2026, 1, 31))
        patch.setattr("dpo.prepare.datetime", SimpleNamespace(date=today))
        whole = start(tmp_path / "run", **options)
    again = start(tmp_path / "again", **options, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert curve(again) == curve(whole) and same(weights(again.model), weights(whole.model))


def test_the_second_of_two_signals_that_come_together_does_not_end_a_run_between_two_epochs(monkeypatch):
    """A worker gets one for each thread of its torchrun that ends."""
    monkeypatch.setattr(signal, "raise_signal", lambda number: pytest.fail("it would have ended"))
    noted = []
    for _epoch in range(2):
        with noted_signals(noted):
            os.kill(os.getpid(), signal.SIGTERM)
    assert noted == [signal.SIGTERM] * 2
