"""The loop as a whole: what it starts from, what cutting and evaluating may not change, its steps, what it leaves."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import curve, make_model, make_rankings, make_rows, make_tokenizer, read, run, same, start, weights
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from dpo.collate import DataCollatorForPreference
from dpo.config import DPOConfig
from dpo.data import prepare_dataset
from dpo.distributed import setup
from dpo.loop import evaluate, get_batch_loss_metrics, main
from dpo.models import load_model
from dpo.reference import Reference

ROWS, EVAL_ROWS = make_rows(24), make_rows(7, seed=1)
NO_REFERENCE = ("simpo", "orpo", "cpo", "sft")


def call_alone(model, ref_model, rows, **options) -> tuple[dict, torch.Tensor, dict]:
    """What `evaluate` and `get_batch_loss_metrics` give outside a run, each for all of these rows."""
    tokenised = prepare_dataset({"rows": Dataset.from_list(rows)}, make_tokenizer())
    collator, args = DataCollatorForPreference(pad_token_id=0), DPOConfig(**options)
    reference = Reference(policy=model, ref_model=ref_model)
    result = evaluate(model, tokenised, collator, reference, args=args, world=setup(use_cpu=True))
    batch = collator(list(tokenised))
    return result, *get_batch_loss_metrics(model, batch, reference, args=args, train_eval="eval")


# --------------------------------------------------------------------------------------------------------------- step 0


@pytest.mark.parametrize("more", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("peft_config", [None, {"r": 4, "lora_dropout": 0.3}], ids=["full", "lora"])
def test_training_starts_at_ln_2_with_rewards_of_exactly_zero(tmp_path, more, peft_config):
    model, options = make_model(attention_dropout=0.5), {"max_steps": 1, "peft_config": peft_config, **more}
    first = start(tmp_path, model, **options).rows[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0


def test_something_random_between_policy_and_reference_is_noticed_at_once(tmp_path):
    model = make_model()
    model.model.norm.register_forward_hook(lambda module, inputs, output: output + torch.randn_like(output))
    with pytest.raises(ValueError, match="policy and reference differ by"):
        start(tmp_path, model=model, max_steps=1)


def test_dropout_where_it_is_wanted_is_drawn_from_the_seed(tmp_path):
    options = {"disable_dropout": False, "data_seed": 0, "max_steps": 1}
    rewards = []
    for i, seed in enumerate((1, 1, 2)):
        run_ = start(tmp_path / str(i), make_model(attention_dropout=0.5), seed=seed, **options)
        rewards += curve(run_, "rewards/chosen")
    assert rewards[0] == rewards[1] != rewards[2] and 0 not in rewards


# ----------------------------------------------------------------------------------- what may not depend on the machine


@pytest.mark.parametrize("rows", [ROWS, ROWS[:11]], ids=["whole windows", "a last one of 3"])
def test_eight_pairs_at_once_equal_fewer_several_times(tmp_path, rows):
    at_once = start(tmp_path / "8", rows=rows, per_device_train_batch_size=8)
    for size in (1, 2):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        in_turn = start(tmp_path / str(size), rows=rows, **cut)
        for key in ("step", "loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert curve(in_turn, key) == pytest.approx(curve(at_once, key), abs=1e-5, rel=1e-5), key


def test_a_window_that_the_rows_do_not_fill_weighs_them_as_a_batch_of_their_number_does(tmp_path):
    small, large = (start(tmp_path / str(n), rows=ROWS[:3], per_device_train_batch_size=n) for n in (3, 8))
    assert curve(large, "grad_norm") == pytest.approx(curve(small, "grad_norm"), rel=1e-5)


def save_inputs(folder: Path, rows=ROWS[:19], eval_rows=EVAL_ROWS) -> list[str]:
    """The tiny model and the rows as files, and the options that train on them."""
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    for name, some in (("train", rows), ("test", eval_rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    said = "--model_name_or_path model --dataset_name train.jsonl --eval_dataset_name test.jsonl --eval_strategy epoch"
    return f"{said} --logging_steps 1 --learning_rate 1e-3 --num_train_epochs 2 --save_strategy no --use_cpu".split()


@pytest.mark.slow
def test_a_process_without_any_row_runs_along_and_all_agree_on_the_best(tmp_path):
    options = save_inputs(tmp_path, rows=ROWS[:1])
    options += "--generate_during_eval --num_samples 2 --max_new_tokens 4 --sample_reward scored:length".split()
    options += "--save_strategy epoch --load_best_model_at_end --metric_for_best_model samples/policy_reward".split()
    (tmp_path / "scored.py").write_text("def length(prompt, answer):\n    return len(answer)\n")
    run("dpo.loop", *options, "--output_dir", "two", processes=2, cwd=tmp_path)
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


# -------------------------------------------------------------------------------------------------- steps and precision


def test_each_epoch_trains_on_all_rows_put_together_anew_unless_in_order(tmp_path):
    """At a learning rate of 0 the mean log-probability of a step tells which rows made it up."""
    epochs = []
    for shuffle in (True, False):
        run_ = start(tmp_path / str(shuffle), num_train_epochs=2, learning_rate=0.0, shuffle=shuffle)
        epochs += [curve(run_, "logps/chosen")[:3], curve(run_, "logps/chosen")[3:]]
    assert [sum(epoch) for epoch in epochs] == pytest.approx([sum(epochs[0])] * 4, abs=1e-4)
    assert all(abs(a - b) > 1e-2 for a in epochs[0] for b in epochs[1])
    assert epochs[2] == pytest.approx(epochs[3], abs=1e-4)


@pytest.mark.parametrize("warmup", [0, 2])
def test_metrics_are_those_before_the_step_and_its_learning_rate_is_the_one_that_it_moved_by(tmp_path, warmup):
    """With a warm-up, whose first step moves nothing, rewards are 0 in the second step, too."""
    run_ = start(tmp_path, num_train_epochs=2, optim="sgd", learning_rate=0.1, warmup_steps=warmup)
    assert [rate != 0 for rate in curve(run_, "learning_rate")] == [not warmup] + 5 * [True]
    assert [reward != 0 for reward in curve(run_, "rewards/chosen")] == [False, not warmup] + 4 * [True]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_keeps_the_gradient_and_is_that_of_evaluation_too(tmp_path, precision):
    """β = 1e-6 makes gradients that float16 rounds to 0, unless the loss is scaled up before and they down again."""
    options = {"rows": ROWS[:8], "eval_rows": ROWS[:8], "eval_strategy": "epoch", "eval_on_start": True}
    full = start(tmp_path / "a", beta=1e-6, max_steps=1, **options)
    lower = start(tmp_path / "b", beta=1e-6, max_steps=1, **options, **{precision: True})
    assert curve(lower, "grad_norm") == pytest.approx(curve(full, "grad_norm"), rel=0.01)
    evaluated, trained = curve(lower, "eval_logps/chosen")[0], curve(lower, "logps/chosen")[0]
    assert evaluated == pytest.approx(trained, abs=1e-4)
    assert abs(trained - curve(full, "logps/chosen")[0]) > 5e-4  # or float32 would pass for it


# ------------------------------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_what_the_readme_lists(tmp_path, model_dir):
    run_ = start(tmp_path, model=model_dir, eval_rows=EVAL_ROWS, eval_strategy="epoch")  # a Path will do
    rewards = {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
    metrics = {"loss", "logps/chosen", "logps/rejected", *rewards}
    more = {"learning_rate", "grad_norm", "tokens_per_second", "unique_tokens_per_second", "tokens_seen"}
    assert run_.rows == read(tmp_path)
    assert set(run_.rows[0]) == {"step", "epoch", *metrics, *more}
    assert set(run_.rows[-1]) == {"step", "epoch", *(f"eval_{key}" for key in metrics)}
    assert run_.output_dir == tmp_path and DPOConfig(output_dir=tmp_path).output_dir == str(tmp_path)
    assert (tmp_path / "rewards.png").read_bytes()[:4] == b"\x89PNG"
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["model_name_or_path"] == str(model_dir)
    card = (tmp_path / "README.md").read_text()
    assert "tags:\n- dpo" in card and "Rafailov" in card
    saved = weights(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32"))
    assert same(weights(run_.model), saved) and not same(saved, weights(make_model()))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template == make_tokenizer().chat_template


def test_an_adapter_is_saved_alone_and_trains_on_from_there(tmp_path, model_dir):
    lora = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.2}
    run_ = start(tmp_path / "first", model=str(model_dir), learning_rate=1e-2, **lora)
    assert (tmp_path / "first" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "first" / "model.safetensors").exists()
    loaded = load_model(str(tmp_path / "first"))
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    assert torch.equal(loaded.eval()(**prompt).logits, run_.model(**prompt).logits)
    # Its second training starts from its first's end: that is the reference, not the bare base model. The adapter's
    # dropout is its own, and noise that the reference has not: rewards are near 0 in training, exactly 0 in evaluation.
    options = {"max_steps": 1, "eval_on_start": True, "eval_strategy": "epoch", "eval_rows": EVAL_ROWS}
    before, *second = start(tmp_path / "second", model=str(tmp_path / "first"), **options).rows
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-7) != second[0]["loss"]
    assert second[0]["logps/chosen"] != run_.rows[0]["logps/chosen"]


def test_the_run_learns_the_preference(tmp_path):
    options = {"num_train_epochs": 3, "learning_rate": 5e-3, "eval_strategy": "epoch", "eval_rows": EVAL_ROWS}
    run_ = start(tmp_path, rows=make_rows(96), **options)
    last = run_.rows[-1]
    assert not any(module.training for module in run_.model.modules())  # ready to be used
    assert last["eval_rewards/accuracies"] == 1.0
    assert last["eval_rewards/margins"] > 1 and last["eval_loss"] < 0.4


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_counts_each_pair_once_whatever_the_batch_size(tmp_path):
    options = {"eval_strategy": "epoch", "eval_rows": EVAL_ROWS}
    sizes = [{"per_device_eval_batch_size": size} for size in (1, 3, 7)]
    one, *others = (start(tmp_path / str(i), **size, **options).rows[-1] for i, size in enumerate(sizes))
    for other in others:
        assert other == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("more", [{}, {"loss_type": "bco_pair"}, {"disable_dropout": False}], ids=str)
def test_evaluation_leaves_training_untouched(tmp_path, more):
    plain = start(tmp_path / "a", make_model(attention_dropout=0.5), learning_rate=1e-2, **more)
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "generate_during_eval": True} | more
    options |= {"eval_rows": EVAL_ROWS, "num_samples": 2, "max_new_tokens": 4}
    watched = start(tmp_path / "b", make_model(attention_dropout=0.5), learning_rate=1e-2, **options)
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
        return {"wins": float((chosen > rejected).sum()), "margin": (chosen - rejected).mean()}  # or a NumPy number

    options = {"eval_strategy": "epoch", "compute_metrics": metrics}
    row = start(tmp_path / "a", eval_rows=EVAL_ROWS, **options).rows[-1]
    chosen, rejected, labels = seen[-1]
    assert chosen.shape == rejected.shape == labels.shape == (7,)
    assert row["eval_wins"] == pytest.approx(row["eval_rewards/accuracies"] * 7)
    assert chosen.mean() == pytest.approx(row["eval_rewards/chosen"], abs=1e-6)
    assert read(tmp_path / "a")[-1]["eval_margin"] == pytest.approx(row["eval_rewards/margins"], abs=1e-6)
    for i in (0, 6):
        alone = start(tmp_path / str(i), eval_rows=[EVAL_ROWS[i]], **options).rows[-1]
        assert chosen[i] == pytest.approx(alone["eval_rewards/chosen"], abs=1e-5)


def test_scores_of_samples_are_reported_and_kept(tmp_path):
    options = {"generate_during_eval": True, "num_samples": 5, "max_new_tokens": 6, "eval_strategy": "epoch"}
    row = start(tmp_path, eval_rows=EVAL_ROWS, sample_reward="test_loop:count_spaces", **options).rows[-1]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 5 and {"prompt", "reference", "policy", "policy_reward"} <= set(samples[0])
    for who in ("policy", "reference"):
        expected = sum(count_spaces("", sample[who]) for sample in samples) / 5
        assert row[f"eval_samples/{who}_reward"] == pytest.approx(expected)


def count_spaces(prompt: str, answer: str) -> float:
    return answer.count(" ")


def test_a_given_reference_is_scored_alike_in_a_run_and_by_evaluate_and_batch_metrics_alone(tmp_path):
    other, options = make_model(seed=3), {"eval_strategy": "epoch", "eval_on_start": True, "max_steps": 1}
    in_a_run = start(tmp_path, eval_rows=EVAL_ROWS, ref_model=other, beta=0.3, **options).rows[0]
    assert same(weights(other), weights(make_model(seed=3)))
    assert not any(parameter.requires_grad for parameter in other.parameters())
    result, losses, metrics = call_alone(make_model(), other, EVAL_ROWS, beta=0.3)
    for key, value in result.items():
        alone = metrics[key.removeprefix("eval_")].mean().item()
        assert value == pytest.approx(in_a_run[key], abs=1e-5) == pytest.approx(alone, abs=1e-5)
    as_policy, *_ = call_alone(other, other, EVAL_ROWS)
    for which in ("chosen", "rejected"):
        log_ratio = result[f"eval_logps/{which}"] - as_policy[f"eval_logps/{which}"]
        assert result[f"eval_rewards/{which}"] == pytest.approx(0.3 * log_ratio, abs=1e-5)
    expected = [math.log1p(math.exp(-margin)) for margin in metrics["rewards/margins"].tolist()]
    assert losses.tolist() == pytest.approx(expected, abs=1e-5) and len(losses) == 7


# ---------------------------------------------------------------------------------------------- the caller's own things


PROMPT_TUNING = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


SCHEDULE = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.zeros(1)], lr=1.0))


def test_arguments_that_contradict_each_other_are_refused(tmp_path):
    model = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    for options, words in (
        ({"optimizers": (None, SCHEDULE)}, "a scheduler without its optimizer"),
        ({"ref_model": "m", "reference_free": True}, "no use for a ref_model"),
        ({"ref_model": "m", "loss_type": "simpo"}, "no use for a ref_model"),
        ({"ref_model": model}, "which will train"),
        ({"dtype": "bfloat16"}, "dtype does nothing beside model, which train was given"),
        ({"loss_type": "aot", "rows": [{**ROWS[0], "weight": 2}]}, "aot sorts the batch, weights are of pairs: lea"),
        ({"peft_config": {"r": 2}}, "has an adapter already"),
        ({"model": make_model(), "peft_config": PROMPT_TUNING}, "prompt learning puts tokens before the text"),
    ):
        with pytest.raises(ValueError, match=words):
            start(tmp_path, **{"model": model, **options})


def test_rows_longer_than_learned_positions_are_refused_in_a_line(tmp_path):
    config = transformers.GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2, n_positions=12)
    model = transformers.GPT2LMHeadModel(config)
    short, long = (
        [{"prompt": "the", "chosen": " sky", "rejected": " sea"}],
        {"eval_strategy": "epoch", "eval_rows": ROWS},
    )
    for options in ({}, {"rows": short, **long}):
        with pytest.raises(ValueError, match="tokens, the model has 12 positions: set max_length 12"):
            start(tmp_path, model=model, **options)
    start(tmp_path, model=model, max_length=12, max_steps=1)


@pytest.mark.parametrize("options", [{}, {"reference_free": True}, *({"loss_type": x} for x in NO_REFERENCE)], ids=str)
def test_a_reference_runs_only_where_the_loss_looks_at_it(tmp_path, options, unlooked):
    model, forwards = make_model(), []

    model.register_forward_hook(lambda *_: forwards.append(1))  # counts those of copies of the model, too
    if options:
        model.__deepcopy__ = lambda memo: pytest.fail("a reference was made")
    row = start(tmp_path, model=model, beta=0.5, max_steps=1, **options).rows[0]
    assert len(forwards) == (1 if options else 2)
    assert row["rewards/chosen"] == pytest.approx(0.5 * row["logps/chosen"] if options else 0, rel=1e-6)


def test_a_peft_model_of_the_callers_trains_its_adapter_alone(tmp_path):
    model = start(tmp_path, get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM"))).model
    assert torch.equal(model.get_base_model().lm_head.weight, make_model().lm_head.weight)
    assert any(value.any() for name, value in model.named_parameters() if "lora_B" in name)
    assert (tmp_path / "adapter_config.json").exists()


def test_optimizers_of_the_callers_are_used(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    run_ = start(tmp_path, model=model, optimizers=(optimizer, schedule))
    assert same(weights(run_.model), weights(make_model())) and curve(run_, "learning_rate") == [0.0] * 3


def test_a_loss_that_is_not_finite_stops_the_run_in_words(tmp_path):
    with pytest.raises(
        ValueError,
        match="the gradient's norm is nan at step 2 .dataset, row 2; .*nothing was changed.*there is no checkpoint",
    ):
        start(tmp_path, learning_rate=1e30, max_grad_norm=0, optim="sgd")


def test_errors_on_the_command_line_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["--learning_rte", "1"], ["--model_name_or_path", "no/where", "--dataset_name", "none.jsonl"]):
        with pytest.raises(SystemExit, match=r"\Aerror: .+\Z"):
            main(arguments)


# ------------------------------------------------------------------------------------------- beyond the plain pair


@pytest.mark.parametrize(
    "more",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [1.0, 0.5, 2.0]},
        {"loss_type": ["sigmoid", "sft"], "label_smoothing": 0.1},  # options need not suit each part alone
        {"loss_type": ["sigmoid", "sft"], "reference_free": True},
        {"loss_type": ["sigmoid", "sft"], "f_divergence_type": "forward_kl"},
    ],
    ids=str,
)
def test_parts_of_a_mixture_are_reported_by_name_and_add_up(tmp_path, more):
    factors = more.get("loss_weights", [1.0, 1.0])
    for row in start(tmp_path, max_steps=2, **more).rows:
        parts = [row[f"loss/{name}"] for name in more["loss_type"]]
        assert row["loss"] == pytest.approx(sum(map(math.prod, zip(factors, parts, strict=True))), rel=1e-5)


def test_weights_of_pairs_scale_their_losses_and_margins_are_odpos_offsets(tmp_path):
    doubled = start(tmp_path / "a", rows=[{**row, "weight": 2.0} for row in ROWS[:8]], max_steps=1).rows[0]
    assert doubled["loss"] == pytest.approx(2 * math.log(2), rel=1e-6) and doubled["rewards/margins"] == 0
    offset = [{**row, "margin": 1.5} for row in ROWS[:8]]
    first = start(tmp_path / "c", rows=offset, loss_type="odpo", max_steps=1).rows[0]
    assert first["loss"] == pytest.approx(math.log1p(math.exp(1.5)), rel=1e-6)
    with pytest.raises(ValueError, match="add a column margin"):
        start(tmp_path / "d", loss_type="odpo")
    for weight in ("much", "-1"):
        rows = [{**row, "weight": weight if i == 1 else "1.5"} for i, row in enumerate(ROWS)]  # as CSV files have them
        with pytest.raises(ValueError, match=f"row 2: column 'weight' is '{weight}': it must be a"):
            start(tmp_path / "e", rows=rows)
    start(tmp_path / "f", rows=[{**row, "weight": "heavy", "margin": {"a": 1}} for row in ROWS], max_steps=1)


def test_bco_centres_rewards_on_their_running_mean(tmp_path):
    """Replays δ from the logged rewards: each step's loss must be the one with the mean of all rewards so far."""
    rows = start(tmp_path, loss_type="bco_pair", per_device_train_batch_size=1, rows=ROWS[:6], learning_rate=1e-2).rows
    rewards = []
    for row in rows:
        rewards += [row["rewards/chosen"], row["rewards/rejected"]]
        delta = sum(rewards) / len(rewards)
        chosen, rejected = row["rewards/chosen"] - delta, row["rewards/rejected"] - delta
        expected = math.log1p(math.exp(-chosen)) + math.log1p(math.exp(rejected))
        assert row["loss"] == pytest.approx(expected, abs=1e-6)
    assert abs(delta) > 1e-4


def test_router_loss_of_a_mixture_of_experts_is_added(tmp_path):
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3}

    def first(**config):
        torch.manual_seed(0)
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads, **experts, **config))
        return start(tmp_path / str(len(config)), model=model, max_steps=1).rows[0]

    row = first(output_router_logits=True)
    assert row["aux_loss"] > 0.5
    assert row["loss"] == pytest.approx(math.log(2) + 0.3 * row["aux_loss"], rel=1e-5)
    assert "aux_loss" not in first()
