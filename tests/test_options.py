"""Each option changes an output that a user looks at, by more than rounding; one that would change none is refused."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import ROOT, make_model, make_rows, make_tokenizer, read, start
from peft import PeftModel

from dpo.config import DPOConfig, UserError, read_config
from dpo.loop import train

EVAL = {"eval_strategy": "steps", "eval_steps": 1}
LORA = {"use_peft": True, "learning_rate": 0.1}
SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 1}
SAVE = {"save_strategy": "steps", "save_steps": 1}
LONG = [{"prompt": "the sky is very " * 3, "chosen": " blue now today here", "rejected": " green"}, *make_rows(15)]
CHATS = make_rows(16, conversational=True)
SCORED = [{"prompt": "the", "completions": [" blue", " red", " grey"], "scores": [2.0, 1.0, 0.5]}] * 16


def losses(run) -> list[float]:
    return [row["loss"] for row in run.rows if "loss" in row]


def rates(run) -> list[float]:
    return [row["learning_rate"] * 100 for row in run.rows if "learning_rate" in row]


def steps(run) -> list[int]:
    return [row["step"] for row in run.rows]


def names(run) -> list[str]:
    """The files that it left; checkpoints, too."""
    return sorted(path.name for path in run.output_dir.rglob("*"))


def columns(run) -> list[str]:
    return sorted({key for row in read(run.output_dir) for key in row})


def trained(run) -> list[str]:
    return [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]


def rows_left(run) -> list[int]:
    return [len(run.train_rows), sum(run.train_rows["length"])]


def printed(run) -> str:
    return run.printed


def config(name: str):
    """An option that only the model or the process sees: what it is set to there."""
    return {
        "attn": lambda run: run.model.config._attn_implementation,
        "dtype": lambda run: str(run.model.dtype),
        "checkpointing": lambda run: run.model.is_gradient_checkpointing,
        "deterministic": lambda run: torch.are_deterministic_algorithms_enabled(),
        "precision": lambda run: torch.get_float32_matmul_precision(),
        "optimizer": lambda run: type(run.optimizer).__name__,
        "padding": lambda run: run.collator.pad_token_id,
        "workers": lambda run: (run.args.dataloader_num_workers, run.args.dataloader_prefetch_factor),
        "state": lambda run: sorted(path.name for path in run.output_dir.rglob("state.pt")),
        "samples": lambda run: (run.output_dir / "samples.jsonl").read_text(),
        "config": lambda run: (run.output_dir / "config.yaml").read_text().count("\n"),
        "best": lambda run: run.state.best,
        "double": lambda run: run.model.config.quantization_config.bnb_4bit_use_double_quant,
    }[name]


DROPS = {"model_init_kwargs": {"attention_dropout": 0.5}}
# option: (the options and rows that it is tried beside, another value, the output that it changes)
CHANGES = {
    "dtype": ({}, "bfloat16", config("dtype")),
    "attn_implementation": ({}, "eager", config("attn")),
    "model_init_kwargs": ({"disable_dropout": False}, {"attention_dropout": 0.5}, losses),
    "ref_model_init_kwargs": ({"ref_model_name_or_path": "other"}, {"rms_norm_eps": 1.0}, losses),
    "ref_model_name_or_path": ({}, "other", losses),
    "disable_dropout": (DROPS, False, losses),
    "gradient_checkpointing": ({}, True, config("checkpointing")),
    "use_peft": ({}, True, trained),
    "lora_r": (LORA, 2, losses),
    "lora_alpha": (LORA, 256, losses),
    "lora_dropout": (LORA, 0.9, losses),
    "lora_target_modules": (LORA, ["o_proj"], trained),
    "lora_modules_to_save": (LORA, ["lm_head"], trained),
    "load_in_4bit": (LORA, True, losses),
    "load_in_8bit": (LORA, True, losses),
    "bnb_4bit_quant_type": ({**LORA, "load_in_4bit": True}, "fp4", losses),
    "use_bnb_nested_quant": ({**LORA, "load_in_4bit": True}, True, config("double")),
    "use_dora": (LORA, True, trained),
    "use_rslora": (LORA, True, losses),
    "init_lora_weights": (LORA, "gaussian", losses),
    "merge_adapter": (LORA, True, names),
    "precompute_ref_log_probs": ({}, True, lambda run: run.reference.is_cached),
    "max_prompt_length": ({"rows": LONG}, 2, rows_left),
    "max_completion_length": ({"rows": LONG}, 2, rows_left),
    "max_length": ({"rows": LONG}, 6, rows_left),
    "truncation_mode": ({"rows": LONG, "max_prompt_length": 3}, "keep_start", losses),
    "padding_value": ({}, 7, config("padding")),
    "chat_template_kwargs": ({"rows": CHATS}, {"system": "be brief"}, rows_left),
    "show_rows": ({}, 3, printed),
    "dataloader_num_workers": ({}, 1, config("workers")),
    "dataloader_prefetch_factor": ({"dataloader_num_workers": 1}, 3, config("workers")),
    "dataloader_drop_last": ({"per_device_train_batch_size": 7}, True, steps),
    "dataset_streaming": ({"max_steps": 4}, True, losses),
    "shuffle_buffer": ({"dataset_streaming": True, "max_steps": 4}, 4, losses),
    "shuffle": ({}, False, losses),
    "group_by_length": ({}, True, losses),
    "loss_type": ({}, "ipo", losses),
    "loss_weights": ({"loss_type": ["sigmoid", "sft"]}, [1.0, 3.0], losses),
    "beta": ({}, 0.5, losses),
    "label_smoothing": ({}, 0.3, losses),
    "f_divergence_type": ({}, "js_divergence", losses),
    "f_alpha_divergence_coef": ({"f_divergence_type": "alpha_divergence"}, 0.5, losses),
    "reference_free": ({}, True, losses),
    "rpo_alpha": ({}, 1.0, losses),
    "use_weighting": ({}, True, losses),
    "ld_alpha": ({}, 0.1, losses),
    "discopop_tau": ({"loss_type": "discopop"}, 0.5, losses),
    "simpo_gamma": ({"loss_type": "simpo"}, 2.0, losses),
    "orpo_lambda": ({"loss_type": "orpo"}, 2.0, losses),
    "cpo_alpha": ({"loss_type": "cpo"}, 3.0, losses),
    "dpop_lambda": ({"loss_type": "dpop"}, 5.0, losses),
    "r_dpo_alpha": ({"loss_type": "r_dpo"}, 0.5, losses),
    "chipo_clip": ({"loss_type": "chipo", "beta": 1.0, "learning_rate": 0.01}, 0.1, losses),
    "exo_beta_r": ({"loss_type": "exo", "rows": SCORED}, 0.2, losses),
    "sync_ref_model": (
        {"rows": make_rows(8), "num_train_epochs": 35},
        True,
        losses,
    ),  # of 70 steps it moves at the 64th
    "ref_model_mixup_alpha": (SYNC, 0.2, losses),
    "ref_model_sync_steps": (SYNC, 3, losses),
    "per_device_train_batch_size": ({}, 8, steps),
    "gradient_accumulation_steps": ({}, 2, steps),
    "num_train_epochs": ({}, 2, steps),
    "max_steps": ({}, 2, steps),
    "learning_rate": ({}, 0.01, losses),
    "lr_scheduler_type": ({}, "cosine", rates),
    "lr_scheduler_kwargs": ({"lr_scheduler_type": "cosine"}, {"num_cycles": 2}, rates),
    "warmup_ratio": ({}, 0.5, rates),
    "warmup_steps": ({}, 2, rates),
    "optim": ({}, "sgd", config("optimizer")),
    "weight_decay": ({"learning_rate": 0.01}, 10.0, losses),
    "adam_beta1": ({}, 0.1, losses),
    "adam_beta2": ({"learning_rate": 0.01}, 0.5, losses),
    "adam_epsilon": ({}, 1.0, losses),
    "max_grad_norm": ({"optim": "sgd", "learning_rate": 1.0}, 1e-3, losses),
    "bf16": ({}, True, losses),
    "fp16": ({"beta": 1.0}, True, losses),
    "tf32": ({}, True, config("precision")),
    "eval_strategy": ({}, "epoch", columns),
    "eval_steps": ({"eval_strategy": "steps"}, 3, steps),
    "eval_on_start": (EVAL, True, steps),
    "generate_during_eval": (EVAL, True, names),
    "num_samples": ({**EVAL, "generate_during_eval": True, "max_new_tokens": 2}, 1, config("samples")),
    "max_new_tokens": ({**EVAL, "generate_during_eval": True}, 2, config("samples")),
    "sample_reward": (
        {**EVAL, "generate_during_eval": True, "max_new_tokens": 2},
        "dpo.example.reviews:reward",
        columns,
    ),
    "dataset_test_split": (EVAL, "test[:2]", lambda run: [row["eval_loss"] for row in run.rows if "eval_loss" in row]),
    "dataset_train_split": ({}, "train[:4]", rows_left),
    "logging_steps": ({}, 4, steps),
    "measure_utilisation": ({}, True, columns),
    "profile": ({}, True, names),
    "report_to": ({}, ["tensorboard"], names),
    "save_strategy": ({}, "epoch", names),
    "save_steps": ({"save_strategy": "steps"}, 2, names),
    "save_total_limit": (SAVE, 1, names),
    "save_only_model": (SAVE, True, config("state")),
    "load_best_model_at_end": ({**EVAL, **SAVE}, True, config("best")),
    "metric_for_best_model": ({**EVAL, **SAVE, "load_best_model_at_end": True}, "rewards/margins", config("best")),
    "greater_is_better": ({**EVAL, **SAVE, "load_best_model_at_end": True}, True, config("best")),
    "seed": ({}, 1, losses),
    "data_seed": ({}, 1, losses),
    "full_determinism": ({}, True, config("deterministic")),
}
# Tried elsewhere, by the test named: they need a Hub, a GPU, other processes, a second run, or leave all numbers alone.
ELSEWHERE = {
    "model_name_or_path eval_dataset_name dataset_name dataset_config": "test_dataset_options_choose_what_is",
    "model_revision trust_remote_code": "test_model_options_reach_from_pretrained",
    "gradient_checkpointing_kwargs torch_compile_backend torch_compile_mode torch_compile": "test_what_cannot_be_is",
    "force_use_ref_model model_adapter_name ref_adapter_name": "test_all_references_of_a_trained_adapter_are_its_start",
    "ref_cache_dir precompute_ref_batch_size": "test_a_cache_serves_every_run_with_the_same_reference_and_no_other",
    "dataset_num_proc": "test_worker_processes_give_the_same_rows",
    "overwrite_output_dir": "test_an_earlier_run_is_not_overwritten_unless_asked_for",
    "resume_from_checkpoint": "test_a_resumed_run_equals_one_that_never_stopped",
    "ddp_backend ddp_timeout ddp_find_unused_parameters": "test_what_cannot_be_is",
    "skip_bad_rows": "test_bad_rows_stop_the_run_or_are_left_out",
    "logits_budget": "test_logits_beyond_the_budget_are_worked_out_in_chunks",
    "max_tokens_per_micro_batch": "test_a_budget_counts_the_tokens_that_the_model_reads",
    "layout padding_free": "test_layout_is_that_of_the_batches",
    "per_device_eval_batch_size": "test_batch_sizes_and_workers_of_training_and_evaluation",
    "output_dir disable_tqdm use_cpu": "test_where_a_run_goes_and_what_it_is_called_there",
    "is_encoder_decoder label_pad_token_id": "test_an_encoder_decoder_trains_as_its_configuration_says",
    "output_router_logits router_aux_loss_coef": "test_the_load_balance_of_a_mixture_of_experts_is_added_to_the_loss",
    "fsdp fsdp_offload fsdp_transformer_layer_cls_to_wrap": "test_what_cannot_be_in_shards_is_refused",
    "run_name": "test_a_tracker_is_told_the_name_of_the_run",
}


def test_every_option_is_tried():
    fields = {f.name for f in dataclasses.fields(DPOConfig)}
    assert set(CHANGES) | set(" ".join(ELSEWHERE).split()) == fields
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert all(f"def {test}" in tests for test in ELSEWHERE.values() if test)


def go(folder, options: dict, caplog):
    """A run of 16 rows, on models in folders beside it."""
    options = {name: value for name, value in options.items() if value is not None}
    rows = options.pop("rows", make_rows(16))
    for name, seed in (("model", 0), ("other", 1)):
        if not (folder.parent / name).exists():
            make_model(seed).save_pretrained(folder.parent / name)
            template = "{% if system %}{{ system }}{% endif %}" + make_tokenizer().chat_template
            make_tokenizer(template).save_pretrained(folder.parent / name)
    if "ref_model_name_or_path" in options:
        options["ref_model_name_or_path"] = str(folder.parent / options["ref_model_name_or_path"])
    defaults = {"learning_rate": 1e-3, "num_train_epochs": 1, "per_device_train_batch_size": 4, "logging_steps": 1}
    defaults |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "output_dir": str(folder)}
    args = DPOConfig(model_name_or_path=str(folder.parent / "model"), **{**defaults, **options})
    caplog.set_level("INFO")
    caplog.clear()
    run = train(args=args, train_dataset=rows, eval_dataset=make_rows(5) if args.eval_strategy != "no" else None)
    run.printed = [record.getMessage() for record in caplog.records if "as it will be trained" in record.getMessage()]
    return run


@pytest.mark.slow
@pytest.mark.parametrize("option", CHANGES)
def test_an_option_changes_what_it_says(option, tmp_path, caplog):
    beside, value, look = CHANGES[option]
    precision = torch.get_float32_matmul_precision()
    try:
        before = look(go(tmp_path / "before", beside, caplog))
        after = look(go(tmp_path / "after", {**beside, option: value}, caplog))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision(precision)
    if look in (losses, rates):
        assert len(before) == len(after)
        assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 1e-4, (before, after)
        assert all(map(math.isfinite, after))
    else:
        assert before != after


def test_what_an_option_needs_is_asked_for(tmp_path):
    needy = [f for f in dataclasses.fields(DPOConfig) if f.metadata["needs"]]
    assert len(needy) > 20
    others = {bool: True, int: 3, float: 0.5, str: "x"}
    for f in needy:
        value = CHANGES.get(f.name, ({}, others.get(f.type, "x"), None))[1]
        value = json.dumps(value) if isinstance(value, dict) else value
        with pytest.raises(UserError, match=rf"\A{f.name} (does nothing without|is|must)"):
            unmet = {"shuffle": False, "save_strategy": "no", "optim": "sgd"}
            need = f.metadata["needs"].split()[0]
            DPOConfig(**{f.name: value, **({need: unmet[need]} if need in unmet else {})})


def test_quantized_models_train_an_adapter_exactly_and_nothing_else(tmp_path):
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("bitsandbytes")
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def load():
        load = transformers.AutoModelForCausalLM.from_pretrained
        return load(tmp_path / "model", quantization_config=four_bits, dtype=torch.float32)

    with pytest.raises(UserError, match="in 4 or 8 bits can only train an adapter"):
        start(tmp_path / "a", model=load())
    run = start(tmp_path / "b", model=load(), peft_config={"r": 4})
    assert isinstance(run.model, PeftModel) and run.rows[0]["rewards/chosen"] == 0 != run.rows[-1]["rewards/chosen"]


UNLOADED = {  # options of a second run, and the words that refuse them before its model is loaded
    "use_peft lora_target_modules": ({"use_peft": True, "lora_target_modules": ["q_prj"]}, "'q_prj' is no module"),
    "lora_modules_to_save": ({"use_peft": True, "lora_modules_to_save": ["head"]}, "'head' is no module of the mode"),
    "beta": ({"beta": 0.5, "resume_from_checkpoint": "true"}, r"is of another run, with beta 0.1 \(now 0.5\)"),
    "rows": ({"rows": make_rows(9), "resume_from_checkpoint": "true"}, "is of another run, with rows 16 of"),
}


@pytest.mark.parametrize("name", UNLOADED)
def test_what_can_be_refused_is_refused_before_the_model_is_loaded(name, tmp_path, caplog, monkeypatch):
    options, words = UNLOADED[name]
    go(tmp_path / "run", {**SAVE, "max_steps": 1}, caplog)
    monkeypatch.setattr("dpo.models.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    folder = tmp_path / ("run" if "resume_from_checkpoint" in options else "other")
    with pytest.raises(UserError, match=words):
        go(folder, {**SAVE, "max_steps": 1, **options}, caplog)


def test_options_do_nothing_beside_what_train_is_given(tmp_path):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    for options in (
        {"model_init_kwargs": {"a": 1}},
        {"peft_config": {"r": 2}, "use_peft": True},
        {"dataset_name": "there"},
        {"ref_model": make_model(), "ref_model_name_or_path": "there"},
        {"optimizers": (optimizer, None), "learning_rate": 0.1},
        {"optimizers": (optimizer, None), "adam_beta1": 0.1},
        {"optimizers": (optimizer, schedule), "warmup_steps": 1},
        {"optimizers": (optimizer, schedule), "lr_scheduler_type": "cosine"},
    ):
        with pytest.raises(UserError, match=rf"\A{list(options)[-1]} does nothing beside "):
            start(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_where_a_run_goes_and_what_it_is_called_there(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for quiet in (True, False):
        run = start(tmp_path / str(quiet), max_steps=1, report_to=["tensorboard"], disable_tqdm=quiet, use_cpu=True)
        assert run.world.device.type == "cpu" and run.output_dir == tmp_path / str(quiet) and names(run)
        assert ("DPO:" in capsys.readouterr().err) != quiet
    events = EventAccumulator(str(run.output_dir / "tensorboard"))
    events.Reload()
    assert "loss" in events.Tags()["scalars"]


def test_a_tracker_is_told_the_name_of_the_run(tmp_path, monkeypatch):
    told = []

    class Tracker:
        init = staticmethod(lambda **options: told.append(options["name"]))
        log = staticmethod(lambda row, step: None)

    monkeypatch.setattr("dpo.report.import_trackers", lambda names: {"wandb": Tracker} if names else {})
    for number, options in enumerate(({}, {"run_name": "mine"})):
        start(tmp_path / str(number), max_steps=1, report_to=["wandb"], **options)
    assert told == ["0", "mine"]


NO_OPTIMIZER = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
STEPS = {"max_steps": 4, "num_train_epochs": 1}
USELESS = {  # arguments of a run in which nothing, or not what was meant, would be learnt or saved
    "another model's optimizer": ({"optimizers": (NO_OPTIMIZER, None)}, "the optimizer has not model.embed"),
    "a list for an optimizer": ({"optimizers": ([1], None)}, "optimizers has a list: it must be one of one gradient"),
    "one optimizer": ({"optimizers": (NO_OPTIMIZER,)}, "optimizers has 1 parts"),
    "decay": ({"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 1000}, **STEPS},
              "warm-up and decay are longer than the 4 steps of the run"),
    "power": ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": -1}, **STEPS},
              "at one of the steps"),
    "weights": ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [0, 0]}, "nothing would be learnt"),
    "column": ({"rows": [{**row, "weight": 0} for row in make_rows(4)]}, "all numbers of the column weight are 0"),
    "an adapter of nothing": ({"peft_config": {"r": 2, "lora_alpha": 0}}, "lora_alpha of the model's adapter is 0"),
    "number": ({"model": 5}, "model is int: it must be a name, a path or a model"),
    "text": ({"peft_config": "lora"}, "peft_config is str"),
    "printer": ({"callbacks": print}, "callbacks is builtin_function_or_method: it must be a list of functions"),
    "metrics": ({"compute_metrics": print}, "compute_metrics does nothing without an eval_strategy"),
    "nothing": ({"eval_strategy": "epoch", "eval_rows": {}}, "eval_dataset is empty"),
    "taken": ({"eval_strategy": "epoch", "eval_rows": make_rows(3), "compute_metrics": lambda _: {"loss": 7}},
              "compute_metrics returned 'loss', which is worked out already"),
}  # fmt: skip


@pytest.mark.parametrize("name", USELESS)
def test_a_run_that_would_learn_nothing_or_lose_it_is_refused(name, tmp_path):
    options, words = USELESS[name]
    with pytest.raises(UserError, match=words) as refused:
        start(tmp_path / "run", **options)
    assert "\n" not in str(refused.value)


def test_options_set_after_they_were_checked_are_checked_once_more(tmp_path):
    args = DPOConfig(output_dir=str(tmp_path))
    args.beta = -1.0
    with pytest.raises(UserError, match="beta is -1.0"):
        train(make_model(), args=args, train_dataset=make_rows(3), processing_class=make_tokenizer())
    with pytest.raises(UserError, match="args is a dict: pass a dpo.config.DPOConfig"):
        train(make_model(), args={"beta": 1.0}, train_dataset=make_rows(3), processing_class=make_tokenizer())


def test_paths_begin_at_home_or_beside_the_file_that_names_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert DPOConfig(output_dir="~/run").output_dir == str(tmp_path / "run")
    (tmp_path / "c.yaml").write_text("dataset_name: ./a\neval_strategy: epoch\neval_dataset_name: {x: ./b, y: hub/c}\n")
    read = read_config(tmp_path / "c.yaml")
    assert read["dataset_name"] == str(tmp_path / "a")
    assert read["eval_dataset_name"] == {"x": str(tmp_path / "b"), "y": "hub/c"}
