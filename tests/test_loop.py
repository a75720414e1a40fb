"""The loop as a whole: what it starts from, what cutting, stopping and resuming may not change, what it leaves."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_model, make_rankings, make_rows, make_tokenizer, run, start
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.collate import DataCollatorForPreference
from dpo.config import DPOConfig
from dpo.data import prepare_dataset
from dpo.distributed import setup
from dpo.logprobs import concatenated_forward
from dpo.loop import evaluate, get_batch_loss_metrics, main
from dpo.models import load_model, load_tokenizer

ROWS, EVAL_ROWS = make_rows(24), make_rows(7, seed=1)


def curve(run_or_rows, key: str = "loss") -> list[float]:
    return [row[key] for row in getattr(run_or_rows, "rows", run_or_rows) if key in row]


def weights(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------------------------------- step 0


@pytest.mark.parametrize(
    "options", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=["float32", "bf16", "ckpt"]
)
@pytest.mark.parametrize("peft_config", [None, {"r": 4, "lora_dropout": 0.3}], ids=["full", "lora"])
def test_training_starts_at_ln_2_with_rewards_of_exactly_zero(tmp_path, options, peft_config):
    first = start(
        tmp_path, model=make_model(attention_dropout=0.5), max_steps=1, peft_config=peft_config, **options
    ).rows[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0


def test_something_random_between_policy_and_reference_is_noticed_at_once(tmp_path):
    class Noisy(torch.nn.Module):
        def forward(self, hidden):
            return hidden + torch.randn_like(hidden)

    model = make_model()
    model.model.norm = torch.nn.Sequential(model.model.norm, Noisy())
    with pytest.raises(ValueError, match="policy and reference differ by"):
        start(tmp_path, model=model, max_steps=1)


def test_dropout_trains_where_it_is_wanted(tmp_path):
    run_ = start(tmp_path, model=make_model(attention_dropout=0.5), max_steps=1, disable_dropout=False)
    assert run_.rows[0]["rewards/chosen"] != 0


# ----------------------------------------------------------------------------------- what may not depend on the machine


def test_eight_pairs_at_once_equal_one_pair_eight_times(tmp_path):
    at_once = start(tmp_path / "a", per_device_train_batch_size=8)
    in_turn = start(tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert len(curve(at_once)) == 3
    for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
        assert curve(in_turn, key) == pytest.approx(curve(at_once, key), abs=1e-5, rel=1e-5)


def test_a_last_smaller_window_counts_each_of_its_pairs_once(tmp_path):
    at_once = start(tmp_path / "a", rows=ROWS[:11], per_device_train_batch_size=8)
    in_turn = start(tmp_path / "b", rows=ROWS[:11], per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert curve(in_turn, "grad_norm") == pytest.approx(curve(at_once, "grad_norm"), rel=1e-5)


def save_inputs(folder: Path, rows=ROWS[:19], eval_rows=EVAL_ROWS) -> list[str]:
    """The tiny model and the rows as files, and the options that train on them."""
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    for name, some in (("train", rows), ("test", eval_rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    options = ["--model_name_or_path", "model", "--dataset_name", "train.jsonl", "--eval_dataset_name", "test.jsonl"]
    options += [
        "--eval_strategy",
        "epoch",
        "--logging_steps",
        "1",
        "--learning_rate",
        "1e-3",
        "--num_train_epochs",
        "2",
    ]
    return [*options, "--save_strategy", "no", "--use_cpu"]


def read(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_process_without_any_row_runs_along_and_all_agree_on_the_best(tmp_path):
    options = save_inputs(tmp_path)[:-3]
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    options += ["--generate_during_eval", "--num_samples", "2", "--max_new_tokens", "4", "--save_strategy", "epoch"]
    options += ["--sample_reward", "scored:length", "--load_best_model_at_end", "--use_cpu"]
    (tmp_path / "scored.py").write_text("def length(prompt, answer):\n    return len(answer)\n")
    best = ["--metric_for_best_model", "samples/policy_reward", "--output_dir", "two"]
    run("dpo.loop", *options, *best, processes=2, cwd=tmp_path)
    assert len(read(tmp_path / "two")) == 2 + 2 and (tmp_path / "two" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "more", ["", "--use_peft", "--loss_type aot", "--loss_type bco_pair sft", "--loss_type plackett_luce"]
)
@pytest.mark.slow
def test_two_processes_equal_one_in_training_and_evaluation(tmp_path, more):
    rows = (make_rankings(19), make_rankings(7, seed=1)) if "plackett" in more else ()
    options = [*save_inputs(tmp_path, *rows), *more.split()]  # the last window has 3 rows, one process gets 1 of them
    run("dpo.loop", *options, "--output_dir", "one", cwd=tmp_path)
    run("dpo.loop", *options, "--output_dir", "two", "--per_device_train_batch_size", "4", processes=2, cwd=tmp_path)
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert len(one) == len(two) == 6 + 2
    for key in ("loss", "grad_norm", "rewards/chosen", "eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert curve(two, key) == pytest.approx(curve(one, key), abs=1e-5)


# -------------------------------------------------------------------------------------------------- stopping, going on


@pytest.mark.parametrize(
    ("peft_config", "more"),
    [
        (None, {}),
        ({"r": 4, "lora_dropout": 0.2}, {}),
        (None, {"loss_type": "bco_pair"}),
        (None, {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}),
        ({"r": 4}, {"sync_ref_model": True, "ref_model_sync_steps": 2}),
    ],
    ids=["full", "lora", "bco", "synced", "synced lora"],
)
def test_resuming_ends_in_bit_identical_weights_and_the_same_metrics(tmp_path, peft_config, more):
    options = more | {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 5,
    }
    options |= {"peft_config": peft_config, "gradient_accumulation_steps": 2, "logging_steps": 3, "warmup_ratio": 0.3}
    whole = start(tmp_path / "whole", **options)

    class Stop(Exception):
        pass

    def stop(row):
        if row["step"] == 6:
            raise Stop

    with pytest.raises(Stop):
        start(tmp_path / "cut", callbacks=[stop], **options)
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-5"]
    resumed = start(tmp_path / "cut", resume_from_checkpoint="true", **options)
    assert same(weights(whole.model), weights(resumed.model))
    assert curve(resumed) == curve(whole)
    assert curve(resumed, "step") == [1, 3, 6]
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 3, 6]  # the row of step 6 that the stopped run left is not there twice


def test_a_reference_is_never_rebuilt_from_the_policys_checkpoint(tmp_path):
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    whole = start(tmp_path, **options)
    again = start(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"), **options)
    assert curve(again, "rewards/margins")[3:] == curve(whole, "rewards/margins")[3:]
    assert curve(again, "rewards/margins")[3] != 0


def test_resuming_another_run_is_refused(tmp_path):
    start(tmp_path, save_strategy="steps")
    with pytest.raises(ValueError, match="it is of another run, with rows 24 .now 20."):
        start(tmp_path, rows=ROWS[:20], resume_from_checkpoint="true")
    with pytest.raises(ValueError, match="there is no checkpoint"):
        start(tmp_path / "none", resume_from_checkpoint="true")
    with pytest.raises(ValueError, match="there is no directory"):
        start(tmp_path / "none", resume_from_checkpoint="nowhere")


def test_an_earlier_run_is_not_overwritten_unless_asked_for(tmp_path):
    start(tmp_path, max_steps=1, save_strategy="steps")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match="holds a run"):
        start(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="column 'chosen'"):  # bad input comes before anything is deleted
        start(tmp_path, rows=[{"prompt": "a", "rejected": "b"}], overwrite_output_dir=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    with pytest.raises(ValueError, match="report_to 'wandbb' is unknown"):
        start(tmp_path, max_steps=1, report_to=["wandbb"], overwrite_output_dir=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    start(tmp_path, max_steps=2, overwrite_output_dir=True)
    assert not list(tmp_path.glob("checkpoint-*")) and len(read(tmp_path)) == 2


def test_a_full_model_is_not_hidden_by_an_earlier_runs_adapter(tmp_path, model_dir):
    start(tmp_path, model=str(model_dir), use_peft=True, max_steps=1, save_strategy="steps")
    full = start(tmp_path, model=str(model_dir), max_steps=1, overwrite_output_dir=True).model
    assert same(weights(full), weights(load_model(str(tmp_path))))


def test_going_on_from_an_older_checkpoint_drops_the_abandoned_ones(tmp_path):
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    start(tmp_path, **options)

    class Stop(Exception):
        pass

    def stop(row):
        if row["step"] == 4:
            raise Stop

    with pytest.raises(Stop):
        older = str(tmp_path / "checkpoint-2")
        start(tmp_path, resume_from_checkpoint=older, callbacks=[stop], save_total_limit=1, **options)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    with pytest.raises(ValueError, match="holds a run"):  # another directory's run is not gone on with over this one
        start(tmp_path / "other", **options)
        start(tmp_path, resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-2"), **options)


def test_a_metrics_row_that_was_cut_short_does_not_keep_a_run_from_going_on(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    start(tmp_path, **options)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert curve(start(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **options), "step") == [1, 2, 3]


# ------------------------------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_all_that_design_promises(tmp_path, model_dir):
    rows = start(tmp_path / "out", model=str(model_dir), eval_rows=EVAL_ROWS, eval_strategy="epoch").rows
    out = tmp_path / "out"
    assert rows == read(out)
    keys = "step epoch loss learning_rate grad_norm rewards/chosen rewards/rejected rewards/accuracies rewards/margins"
    assert set(rows[0]) == {*keys.split(), "logps/chosen", "logps/rejected", "tokens_per_second", "tokens_seen"}
    metrics = "loss rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected"
    assert set(rows[-1]) == {"step", "epoch", *(f"eval_{key}" for key in metrics.split())}
    assert (out / "rewards.png").read_bytes()[:4] == b"\x89PNG"
    assert yaml.safe_load((out / "config.yaml").read_text())["model_name_or_path"] == str(model_dir)
    assert "tags:\n- dpo" in (out / "README.md").read_text() and "Rafailov" in (out / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(out) and AutoTokenizer.from_pretrained(out).chat_template


def test_the_saved_model_is_the_trained_one(tmp_path):
    trained = start(tmp_path).model
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert same(weights(trained), weights(saved))
    assert not same(weights(trained), weights(make_model()))


def test_an_adapter_is_saved_alone_and_trains_on_from_there(tmp_path, model_dir):
    run_ = start(tmp_path / "first", model=str(model_dir), use_peft=True, lora_r=4, learning_rate=1e-2)
    assert (tmp_path / "first" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "first" / "model.safetensors").exists()
    loaded = load_model(str(tmp_path / "first"))
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    assert torch.equal(loaded.eval()(**prompt).logits, run_.model(**prompt).logits)
    # Its second training starts from its first's end: that is the reference, not the bare base model.
    second = start(tmp_path / "second", model=str(tmp_path / "first"), max_steps=1)
    assert second.rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert second.rows[0]["logps/chosen"] != run_.rows[0]["logps/chosen"]


def test_the_run_learns_the_preference(tmp_path):
    rows = start(
        tmp_path, rows=make_rows(96), num_train_epochs=3, learning_rate=5e-3, eval_rows=EVAL_ROWS, eval_strategy="epoch"
    ).rows
    assert rows[-1]["eval_rewards/accuracies"] == 1.0
    assert rows[-1]["eval_rewards/margins"] > 1 and rows[-1]["eval_loss"] < 0.4


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_counts_each_pair_once_whatever_the_batch_size(tmp_path):
    results = []
    for size in (1, 3, 7):
        options = {"eval_strategy": "epoch", "per_device_eval_batch_size": size, "eval_rows": EVAL_ROWS}
        results.append(start(tmp_path / str(size), **options).rows[-1])
    for key in results[0]:
        assert results[1][key] == pytest.approx(results[0][key], abs=1e-5)
        assert results[2][key] == pytest.approx(results[0][key], abs=1e-5)


def test_evaluation_leaves_training_untouched(tmp_path):
    plain = start(tmp_path / "a", rows=ROWS)
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "generate_during_eval": True}
    watched = start(tmp_path / "b", eval_rows=EVAL_ROWS, num_samples=2, max_new_tokens=4, **options)
    assert same(weights(plain.model), weights(watched.model))
    assert [row["step"] for row in watched.rows if "eval_loss" in row] == [0, 1, 2, 3]


def test_several_evaluation_sets_are_reported_under_their_names(tmp_path, capsys):
    sets = {"near": EVAL_ROWS, "far": make_rows(3, seed=2)}
    row = start(tmp_path, eval_rows=sets, eval_strategy="epoch").rows[-1]
    assert {"eval_near_loss", "eval_far_loss", "eval_far_rewards/margins"} <= set(row)
    assert row["eval_near_loss"] != row["eval_far_loss"]
    shown = capsys.readouterr().out
    for name in sets:
        assert f"step 3, held-out pairs ({name}): loss {row[f'eval_{name}_loss']:.3f}, reward accuracy" in shown


def test_compute_metrics_gets_every_pairs_rewards_in_the_datasets_order(tmp_path):
    seen = []

    def metrics(prediction):
        chosen, rejected = prediction.predictions
        seen.append((chosen, rejected, prediction.label_ids))
        return {"wins": float((chosen > rejected).sum())}

    row = start(tmp_path, eval_rows=EVAL_ROWS, eval_strategy="epoch", compute_metrics=metrics).rows[-1]
    chosen, rejected, labels = seen[-1]
    assert chosen.shape == rejected.shape == labels.shape == (7,)
    assert row["eval_wins"] == pytest.approx(row["eval_rewards/accuracies"] * 7)
    assert chosen.mean() == pytest.approx(row["eval_rewards/chosen"], abs=1e-6)
    alone = start(tmp_path / "b", eval_rows=EVAL_ROWS[:1], eval_strategy="epoch", compute_metrics=metrics).rows[-1]
    assert seen[-1][0][0] == pytest.approx(chosen[0], abs=1e-5) == pytest.approx(alone["eval_rewards/chosen"], abs=1e-5)


def test_the_best_evaluated_model_is_left_and_its_checkpoint_kept(tmp_path):
    options = {"num_train_epochs": 4, "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "rewards/chosen", "greater_is_better": False}
    run_ = start(tmp_path, eval_rows=EVAL_ROWS, learning_rate=1e-2, **options)
    values = {row["step"]: row["eval_rewards/chosen"] for row in run_.rows if "eval_loss" in row}
    best = min(values, key=values.get)
    left = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert len(left) == 2 and {f"checkpoint-{best}", "checkpoint-12"} <= left | {f"checkpoint-{best}"}
    assert same(weights(run_.model), weights(AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}")))
    sparse = {**options, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 5}
    left = start(tmp_path / "sparse", eval_rows=EVAL_ROWS, learning_rate=1e-2, **sparse).model
    saved = [weights(AutoModelForCausalLM.from_pretrained(path)) for path in (tmp_path / "sparse").glob("checkpoint-*")]
    assert any(same(weights(left), each) for each in saved)  # the best of those evaluations that have a checkpoint
    with pytest.raises(
        ValueError, match="metric_for_best_model 'eval_nonsense' is not evaluated: choose among eval_loss"
    ):
        start(tmp_path / "b", eval_rows=EVAL_ROWS, **{**options, "metric_for_best_model": "nonsense"})


def test_scores_of_samples_are_reported_and_kept(tmp_path):
    row = start(
        tmp_path,
        eval_rows=EVAL_ROWS,
        eval_strategy="epoch",
        generate_during_eval=True,
        num_samples=5,
        max_new_tokens=6,
        sample_reward="test_loop:count_spaces",
    ).rows[-1]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 5 and {"prompt", "reference", "policy", "policy_reward"} <= set(samples[0])
    for who in ("policy", "reference"):
        expected = sum(count_spaces("", sample[who]) for sample in samples) / 5
        assert row[f"eval_samples/{who}_reward"] == pytest.approx(expected)


def count_spaces(prompt: str, answer: str) -> float:
    return answer.count(" ")


def test_metrics_of_the_callers_may_be_numpy_numbers(tmp_path):
    def margin(prediction):
        return {"margin": (prediction.predictions[0] - prediction.predictions[1]).mean()}

    row = start(tmp_path, eval_rows=EVAL_ROWS, eval_strategy="epoch", compute_metrics=margin).rows[-1]
    assert read(tmp_path)[-1]["eval_margin"] == pytest.approx(row["eval_rewards/margins"], abs=1e-6)


# ---------------------------------------------------------------------------------------------- the caller's own things


def test_a_compiled_model_trains_saves_and_resumes(tmp_path):
    options = {"model": torch.compile(make_model(), backend="eager"), "save_strategy": "epoch", "max_steps": 2}
    run_ = start(tmp_path / "a", **options)
    start(tmp_path / "b", max_steps=2)
    for name in ("a", "b"):
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
    assert curve(run_) == pytest.approx(curve(read(tmp_path / "b")), abs=1e-5)


def test_paths_may_be_path_objects(tmp_path, model_dir):
    assert start(tmp_path, model=Path(model_dir), max_steps=1).output_dir == tmp_path
    assert DPOConfig(output_dir=tmp_path).output_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ({"optimizers": (None, "schedule")}, {}, "a scheduler without its optimizer"),
        ({"ref_model": "m"}, {"reference_free": True}, "no use for a ref_model"),
        ({"ref_model": "m"}, {"loss_type": "simpo"}, "no use for a ref_model"),
        ({}, {"dtype": "bfloat16"}, "dtype does nothing for a model that is loaded already"),
        ({"peft_config": {"r": 2}}, {}, "has an adapter already"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_arguments_that_contradict_each_other_are_refused(tmp_path, arguments, options, words):
    model = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=words):
        start(tmp_path, model=model, **arguments, **options)
    with pytest.raises(ValueError, match="which will train"):
        start(tmp_path, model=model, ref_model=model)


def test_an_adapter_on_the_hub_is_recognised_with_its_base(tmp_path, model_dir, monkeypatch):
    """A cache as the Hub's client keeps it, of a repository that holds an adapter alone."""
    adapter = get_peft_model(load_model(str(model_dir)), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    repository = tmp_path / "models--someone--adapter"
    adapter.save_pretrained(repository / "snapshots" / "1a2b")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1a2b")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = load_model("someone/adapter")
    assert same(weights(loaded), weights(adapter)) and loaded.active_adapter == "default"
    assert any(parameter.requires_grad for parameter in loaded.parameters())
    assert load_tokenizer("someone/adapter").eos_token == "<|im_end|>"


def test_rows_longer_than_learned_positions_are_refused_in_a_line(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2, n_positions=12))
    with pytest.raises(ValueError, match="tokens, the model has 12 positions: set max_length 12"):
        start(tmp_path, model=model)
    start(tmp_path, model=model, max_length=12, max_steps=1)


def test_an_adapter_without_tokenizer_files_takes_its_bases(tmp_path, model_dir):
    adapter = get_peft_model(load_model(str(model_dir)), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    assert load_tokenizer(str(tmp_path / "adapter")).eos_token == "<|im_end|>"


def test_a_given_reference_is_scored(tmp_path):
    other = make_model(seed=5)
    first = start(tmp_path, ref_model=other, max_steps=1).rows[0]
    assert first["rewards/chosen"] != 0 and not any(parameter.requires_grad for parameter in other.parameters())


def test_reference_free_runs_no_reference(tmp_path):
    rows = start(tmp_path, reference_free=True, beta=0.5, max_steps=1).rows
    assert rows[0]["rewards/chosen"] == pytest.approx(0.5 * rows[0]["logps/chosen"], rel=1e-6)


def test_a_peft_model_of_the_callers_trains_its_adapter_alone(tmp_path):
    model = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    run_ = start(tmp_path, model=model)
    base = make_model().state_dict()
    assert torch.equal(run_.model.get_base_model().lm_head.weight, base["lm_head.weight"])
    assert (tmp_path / "adapter_config.json").exists()


def test_optimizers_of_the_callers_are_used(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    run_ = start(tmp_path, model=model, optimizers=(optimizer, schedule))
    assert same(weights(run_.model), weights(make_model())) and curve(run_, "learning_rate") == [0.0] * 3


def test_evaluate_and_batch_metrics_can_be_called_alone(tmp_path):
    rows = prepare_dataset({"rows": Dataset.from_list(EVAL_ROWS)}, make_tokenizer())
    collator, args, model = DataCollatorForPreference(pad_token_id=0), DPOConfig(beta=0.3), make_model()
    result = evaluate(model, rows, collator, args=args, ref_model=make_model(seed=3), world=setup(use_cpu=True))
    _, metrics = get_batch_loss_metrics(
        model, collator(list(rows)), args=args, ref_model=make_model(seed=3), train_eval="eval"
    )
    assert result["eval_loss"] == pytest.approx(metrics["eval_loss"].mean().item(), abs=1e-5)
    assert metrics["eval_rewards/chosen"].shape == (7,)


def test_a_loss_that_is_not_finite_stops_the_run_in_words(tmp_path):
    with pytest.raises(ValueError, match="the loss is nan at step"):
        start(tmp_path, learning_rate=1e30, max_grad_norm=0, optim="sgd")


def test_errors_on_the_command_line_are_one_line(tmp_path):
    with pytest.raises(SystemExit, match="^error: .* did you mean --learning_rate[?]$"):
        main(["--learning_rte", "1"])
    arguments = ["--model_name_or_path", str(tmp_path), "--dataset_name", "none.jsonl"]
    done = run("dpo.loop", *arguments, cwd=tmp_path, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")


# ------------------------------------------------------------------------------------------- beyond the plain pair


def test_parts_of_a_mixture_are_reported_by_name_and_add_up(tmp_path):
    options = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [1.0, 0.5, 2.0], "max_steps": 3}
    for row in start(tmp_path, **options).rows:
        parts = row["loss/sigmoid"] + 0.5 * row["loss/bco_pair"] + 2.0 * row["loss/sft"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize(
    "more", [{"label_smoothing": 0.1}, {"reference_free": True}, {"f_divergence_type": "forward_kl"}]
)
def test_options_of_a_mixture_need_not_suit_each_part_alone(tmp_path, more):
    row = start(tmp_path, loss_type=["sigmoid", "sft"], max_steps=1, **more).rows[0]
    assert row["loss"] == pytest.approx(row["loss/sigmoid"] + row["loss/sft"], rel=1e-5)


def test_weights_of_pairs_scale_their_losses_and_margins_are_odpos_offsets(tmp_path):
    plain = start(tmp_path / "a", rows=ROWS[:8], max_steps=1).rows[0]
    doubled = start(tmp_path / "b", rows=[{**row, "weight": 2.0} for row in ROWS[:8]], max_steps=1).rows[0]
    assert doubled["loss"] == pytest.approx(2 * math.log(2), rel=1e-6)
    assert doubled["rewards/margins"] == plain["rewards/margins"] == 0
    offset = [{**row, "margin": 1.5} for row in ROWS[:8]]
    first = start(tmp_path / "c", rows=offset, loss_type="odpo", max_steps=1).rows[0]
    assert first["loss"] == pytest.approx(math.log1p(math.exp(1.5)), rel=1e-6)
    with pytest.raises(ValueError, match="add a column margin"):
        start(tmp_path / "d", loss_type="odpo")
    with pytest.raises(ValueError, match="row 1: column 'weight' is 'much': it must be a number"):
        start(tmp_path / "e", rows=[{**row, "weight": "much"} for row in ROWS])


def test_bco_centres_rewards_on_their_running_mean(tmp_path):
    """Replays δ from the logged rewards: each step's loss must be the one with the mean of all rewards so far."""
    rows = start(tmp_path, loss_type="bco_pair", per_device_train_batch_size=1, rows=ROWS[:6], learning_rate=1e-2).rows
    rewards = []

    def softplus(z: float) -> float:
        return max(z, 0.0) + math.log1p(math.exp(-abs(z)))

    for row in rows:
        rewards += [row["rewards/chosen"], row["rewards/rejected"]]
        delta = sum(rewards) / len(rewards)
        expected = softplus(-(row["rewards/chosen"] - delta)) + softplus(row["rewards/rejected"] - delta)
        assert row["loss"] == pytest.approx(expected, abs=1e-6)
    assert abs(delta) > 1e-4


def test_a_synced_reference_catches_up_with_the_policy(tmp_path):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0, "num_train_epochs": 2}
    margins = curve(start(tmp_path, learning_rate=1e-2, **options), "rewards/chosen")
    # Scored before the step: after steps 2 and 4 the reference is the policy, so rewards of steps 1, 3, 5 are 0.
    assert [abs(margin) < 1e-6 for margin in margins] == [True, False] * 3


@pytest.mark.parametrize("loss_type", ["simpo", "orpo", "cpo", "sft"])
def test_losses_without_reference_load_none(tmp_path, loss_type, monkeypatch):
    import dpo.loop

    monkeypatch.setattr(dpo.loop, "frozen_copy", lambda policy: pytest.fail("a reference was made"))
    row = start(tmp_path, loss_type=loss_type, max_steps=1).rows[0]
    assert row["rewards/chosen"] == pytest.approx(0.1 * row["logps/chosen"], rel=1e-6)


def test_router_loss_of_a_mixture_of_experts_is_added(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_local_experts": 4,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3}

    def first(**config):
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, **config))
        return start(tmp_path / str(len(config)), model=model, max_steps=1).rows[0]

    row = first(output_router_logits=True)
    assert row["aux_loss"] > 0.5
    assert row["loss"] == pytest.approx(math.log(2) + 0.3 * row["aux_loss"], rel=1e-5)
    assert "aux_loss" not in first()


# ---------------------------------------------------------------------------------------------------------- rankings


@pytest.mark.parametrize(("ranking", "pair"), [("plackett_luce", "sigmoid"), ("exo", "exo_pair")])
def test_a_loss_of_rankings_trains_on_pairs_as_its_pair_loss_does(tmp_path, ranking, pair):
    a, b = (
        start(tmp_path / name, loss_type=name, eval_rows=EVAL_ROWS, eval_strategy="epoch") for name in (ranking, pair)
    )
    for key in (*a.rows[0], *a.rows[-1]):
        if "tokens_per" not in key:
            assert curve(a, key) == pytest.approx(curve(b, key), abs=1e-6, rel=1e-5), key


def test_a_rankings_loss_and_metrics_equal_those_added_up_by_hand():
    """Each completion scored as one of a pair, alone; Plackett and Luce's choices multiplied out in float64."""
    rows = prepare_dataset({"rows": Dataset.from_list(make_rankings(6))}, make_tokenizer(), ranked=True)
    collator, args = DataCollatorForPreference(pad_token_id=0), DPOConfig(beta=0.3, loss_type="plackett_luce")
    model, ref_model = make_model(), make_model(seed=3)
    losses, metrics = get_batch_loss_metrics(model, collator(list(rows)), args=args, ref_model=ref_model)

    def log_probability(scored, row, completion) -> float:
        pair = {**row, "chosen_input_ids": completion, "rejected_input_ids": completion}
        return concatenated_forward(scored, collator([pair]))["chosen_logps"].item()

    for i, row in enumerate(rows):
        completions = [row["chosen_input_ids"], *row["rejected_input_ids"]]
        logps = [log_probability(model, row, completion) for completion in completions]
        references = [log_probability(ref_model, row, completion) for completion in completions]
        rewards = [0.3 * (p - q) for p, q in zip(logps, references, strict=True)]
        chance = math.prod(math.exp(r) / sum(map(math.exp, rewards[k:])) for k, r in enumerate(rewards))
        assert losses[i].item() == pytest.approx(-math.log(chance), abs=1e-4)
        others = len(completions) - 1
        assert metrics["rewards/chosen"][i].item() == pytest.approx(rewards[0], abs=1e-4)
        assert metrics["rewards/rejected"][i].item() == pytest.approx(sum(rewards[1:]) / others, abs=1e-4)
        assert metrics["rewards/margins"][i].item() == pytest.approx(rewards[0] - sum(rewards[1:]) / others, abs=1e-4)
        assert metrics["rewards/accuracies"][i].item() == (rewards[0] > max(rewards[1:]))
        assert metrics["logps/rejected"][i].item() == pytest.approx(sum(logps[1:]) / others, abs=1e-3)


@pytest.mark.parametrize("loss_type", ["plackett_luce", "exo", ["plackett_luce", "exo", "sft"]], ids=str)
@pytest.mark.parametrize("scores", [False, True], ids=["ranked", "scored"])
def test_rankings_of_different_lengths_train_the_same_however_they_are_cut(tmp_path, loss_type, scores):
    rows, options = make_rankings(11, scores=scores), {"loss_type": loss_type, "eval_strategy": "epoch"}
    more = {"rows": rows, "eval_rows": make_rankings(5, seed=1, scores=scores)}
    at_once = start(tmp_path / "a", **options, **more)
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 1}
    in_turn = start(tmp_path / "b", **options, **more, **cut)
    keys = ("loss", "grad_norm", "rewards/margins", "tokens_seen", "eval_loss", "eval_rewards/rejected")
    for key in (*keys, "eval_logps/rejected"):
        assert curve(in_turn, key) == pytest.approx(curve(at_once, key), abs=1e-5, rel=1e-4), key


def test_training_on_rankings_puts_them_in_order(tmp_path):
    rows, held_out = make_rankings(48), make_rankings(8, seed=5)
    options = {"loss_type": "plackett_luce", "num_train_epochs": 8, "learning_rate": 5e-3, "eval_strategy": "epoch"}
    run_ = start(tmp_path, rows=rows, eval_rows=held_out, **options)
    first, last = run_.rows[0], run_.rows[-1]
    expected = sum(math.log(math.factorial(2 + i % 3)) for i in range(48)) / 48  # of rankings by chance
    assert first["loss"] == pytest.approx(expected, rel=0.2) and last["eval_rewards/accuracies"] == 1
    assert last["eval_loss"] < 0.8 * expected


def test_scores_and_their_temperature_change_what_exo_trains(tmp_path):
    scored = make_rankings(8, scores=True)
    runs = [
        start(tmp_path / "a", loss_type="exo", rows=make_rankings(8)),
        start(tmp_path / "b", loss_type="exo", rows=make_rankings(8), label_smoothing=0.2),
        start(tmp_path / "c", loss_type="exo", rows=scored),
        start(tmp_path / "d", loss_type="exo", rows=scored, exo_beta_r=0.5),
        start(tmp_path / "e", loss_type="exo", rows=[{**row, "weight": 2.0} for row in scored]),
    ]
    losses = [run_.rows[0]["loss"] for run_ in runs]
    assert len(set(losses)) == 5 and losses[4] == pytest.approx(2 * losses[2], rel=1e-5)


def test_what_rankings_cannot_do_is_refused_before_training(tmp_path):
    ranked, scored = make_rankings(8), make_rankings(8, scores=True)
    for rows, options, words in (
        (
            ranked,
            {},
            "row 2: it ranks more than two completions, the loss is one of pairs: choose plackett_luce or exo",
        ),
        (ranked, {"loss_type": "exo", "exo_beta_r": 2.0}, "dataset: exo_beta_r does nothing without scores"),
        (
            scored,
            {"loss_type": "exo", "label_smoothing": 0.1},
            "dataset: label_smoothing does nothing where rows have scores",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            start(tmp_path, rows=rows, **options)
    with pytest.raises(ValueError, match="of the training and the evaluation set one has scores"):
        start(tmp_path, rows=scored, eval_rows=ranked, loss_type="exo", eval_strategy="epoch")
