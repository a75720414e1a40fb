"""Options: each one changes something that is looked at here or in another test, or is refused with a reason."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch
import transformers
import yaml
from conftest import ROOT, make_model, make_rows, make_tokenizer
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM

import dpo.loop
import dpo.models
from dpo.config import EXAMPLE, LEFT_OUT, DPOConfig, parse_args
from dpo.loop import train
from dpo.losses import LOSSES
from dpo.models import disable_dropout, load_model, make_optimizer

ROWS = make_rows(19)
LIKE_SIGMOID = ("sigmoid", "hinge", "ipo", "odpo", "robust", "plackett_luce")  # there or on ROWS, or listed by itself
NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d"]


def start(output_dir: Path, model=None, rows=ROWS, **options):
    """A short run whose policy has dropout to switch off."""
    return conftest.start(output_dir, model=model or make_model(attention_dropout=0.3), rows=rows, **options)


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory):
    return start(tmp_path_factory.mktemp("plain")).model.state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 2e-3},
        {"beta": 0.5},
        {"loss_type": "hinge"},
        {"loss_type": "ipo"},
        {"label_smoothing": 0.2},
        {"loss_type": ["sigmoid", "sft"]},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
        {"rpo_alpha": 1.0},
        {"use_weighting": True},
        {"ld_alpha": 0.5},
        {"sync_ref_model": True, "ref_model_sync_steps": 1},
        *({"loss_type": name} for name in LOSSES if name not in LIKE_SIGMOID),
        {"loss_type": "robust", "label_smoothing": 0.2},
        {"reference_free": True},
        {"disable_dropout": False},
        {"per_device_train_batch_size": 4},
        {"gradient_accumulation_steps": 2},
        {"num_train_epochs": 1.5},
        {"max_steps": 2},
        {"lr_scheduler_type": "cosine"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 9e-4}},
        {"warmup_ratio": 0.5},
        {"warmup_steps": 1},
        {"optim": "sgd"},
        {"optim": "rmsprop"},
        {"optim": "adamw_8bit"},
        {"weight_decay": 0.5},
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.5},
        {"adam_epsilon": 1e-2},
        {"max_grad_norm": 0.01, "optim": "sgd"},
        {"bf16": True},
        {"fp16": True},
        {"seed": 7},
        {"data_seed": 7},
        {"shuffle": False},
        {"group_by_length": True},
        {"dataloader_drop_last": True},
        {"max_prompt_length": 3},
        {"max_completion_length": 3},
        {"max_length": 9},
        {"max_prompt_length": 3, "truncation_mode": "keep_start"},
    ],
    ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()),
)
def test_option_changes_what_is_trained(options, plain_weights, tmp_path):
    trained = start(tmp_path, **options).model.state_dict()
    assert any(not torch.equal(trained[key], plain_weights[key]) for key in plain_weights)
    assert all(torch.isfinite(value).all() for value in trained.values())


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        ("discopop", {"discopop_tau": 0.5}),
        ("simpo", {"simpo_gamma": 1.0}),
        ("orpo", {"orpo_lambda": 0.9}),
        ("cpo", {"cpo_alpha": 0.1}),
        ("dpop", {"dpop_lambda": 1.0}),
        ("r_dpo", {"r_dpo_alpha": 0.3}),
        ("chipo", {"chipo_clip": 0.01}),
        ("sigmoid", {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.2}),
        ("sigmoid", {"sync_ref_model": True, "ref_model_sync_steps": 2}),
    ],
    ids=str,
)
def test_option_of_one_loss_changes_what_it_trains_and_is_refused_elsewhere(loss_type, options, tmp_path):
    base = {key: value for key, value in options.items() if key == "sync_ref_model"}
    base |= {"ref_model_sync_steps": 1} if base else {}
    plain = start(tmp_path / "a", loss_type=loss_type, **base).model.state_dict()
    changed = start(tmp_path / "b", loss_type=loss_type, **options).model.state_dict()
    assert any(not torch.equal(plain[key], changed[key]) for key in plain)
    if not base:
        with pytest.raises(ValueError, match=f"{next(iter(options))} has no meaning for loss_type sigmoid"):
            DPOConfig(**options)


def test_truncation_modes_keep_different_ends(tmp_path):
    kept = [
        start(tmp_path / mode, max_prompt_length=3, truncation_mode=mode).model.state_dict()
        for mode in ("keep_end", "keep_start")
    ]
    assert not torch.equal(kept[0]["lm_head.weight"], kept[1]["lm_head.weight"])


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3},
        {"dataset_num_proc": 2},
        {"padding_value": 5},
        {"layout": "padded"},
        {"full_determinism": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),
    ],
    ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()),
)
def test_option_changes_how_but_not_what_is_trained(options, plain_weights, tmp_path, monkeypatch):
    used = {}
    checkpoint, loader, compiled = (
        transformers.modeling_utils.checkpoint,
        dpo.loop.load_batches,
        torch.nn.Module.compile,
    )
    collate = dpo.loop.DataCollatorForPreference.__call__

    def spy_checkpoint(*args, **kwargs):
        used["gradient_checkpointing"] = True
        used["gradient_checkpointing_kwargs"] = {"use_reentrant": kwargs.get("use_reentrant")}
        return checkpoint(*args, **kwargs)

    def spy_loader(*args, **kwargs):
        made = loader(*args, **kwargs)
        used.update(dataloader_num_workers=made.num_workers, dataloader_prefetch_factor=made.prefetch_factor)
        return made

    def spy_compile(model, **kwargs):
        used.update(torch_compile=True, torch_compile_backend=kwargs.get("backend"))
        return compiled(model, **kwargs)

    def spy_collate(collator, features):
        used.update(padding_value=collator.pad_token_id, layout=collator.layout)
        return collate(collator, features)

    original_map = Dataset.map
    monkeypatch.setattr(
        Dataset,
        "map",
        lambda self, *a, **k: used.update(dataset_num_proc=k.get("num_proc")) or original_map(self, *a, **k),
    )
    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", spy_checkpoint)
    monkeypatch.setattr(dpo.loop, "load_batches", spy_loader)
    monkeypatch.setattr(torch.nn.Module, "compile", spy_compile)
    monkeypatch.setattr(dpo.loop.DataCollatorForPreference, "__call__", spy_collate)
    trained = start(tmp_path, **options).model.state_dict()
    used["full_determinism"] = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    if "dataloader_num_workers" in options:
        used.pop("padding_value", None)
    assert {key: used.get(key) for key in options} == options
    for key, value in plain_weights.items():
        assert torch.allclose(trained[key], value, atol=1e-5), key


def test_tf32_and_torch_compile_mode_reach_torch(tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **options: modes.append(options))
    start(tmp_path, max_steps=1, tf32=True, torch_compile=True, torch_compile_mode="reduce-overhead")
    assert torch.get_float32_matmul_precision() == "high"
    assert modes == [{"mode": "reduce-overhead"}] * 2  # policy and reference
    start(tmp_path / "b", max_steps=1, tf32=False)
    assert torch.get_float32_matmul_precision() == "highest"


def test_8_bit_optimizers_come_from_bitsandbytes():
    import bitsandbytes

    for name, kind in (("adamw_8bit", "AdamW8bit"), ("paged_adamw_8bit", "PagedAdamW8bit")):
        assert isinstance(
            make_optimizer(make_model(), name=name, learning_rate=1e-3), getattr(bitsandbytes.optim, kind)
        )


def test_weight_decay_spares_norms():
    groups = make_optimizer(make_model(), learning_rate=1e-3, weight_decay=0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(parameter.ndim == 1 for parameter in groups[1]["params"]) and len(groups[1]["params"]) == 5


# --------------------------------------------------------------------------------------------------------------- models


def test_model_options_reach_from_pretrained(model_dir, tmp_path, monkeypatch):
    calls, tokenizers = [], []
    load, load_tokenizer = AutoModelForCausalLM.from_pretrained, dpo.models.AutoTokenizer.from_pretrained
    known = ("dtype", "revision", "attn_implementation", "trust_remote_code", "attention_dropout")

    def spy(name, **options):
        calls.append((name, {key: options.get(key) for key in known}))
        return load(name, **{key: value for key, value in options.items() if key != "trust_remote_code"})

    def spy_tokenizer(name, **options):
        tokenizers.append(options)
        return load_tokenizer(name)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    monkeypatch.setattr(dpo.models.AutoTokenizer, "from_pretrained", spy_tokenizer)
    reference = tmp_path / "reference"
    make_model(seed=9).save_pretrained(reference)
    run = train(
        args=DPOConfig(
            model_name_or_path=str(model_dir),
            ref_model_name_or_path=str(reference),
            model_revision="v2",
            dtype="bfloat16",
            attn_implementation="eager",
            trust_remote_code=True,
            model_init_kwargs={"attention_dropout": 0.1},
            ref_model_init_kwargs={"attention_dropout": 0.2},
            output_dir=str(tmp_path / "out"),
            max_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=ROWS,
    )
    common = {"dtype": "bfloat16", "attn_implementation": "eager", "trust_remote_code": True}
    assert calls == [
        (str(model_dir), {**common, "revision": "v2", "attention_dropout": 0.1}),
        (str(reference), {**common, "revision": "main", "attention_dropout": 0.2}),
    ]
    assert tokenizers == [{"revision": "v2", "trust_remote_code": True}]
    assert run.model.dtype == torch.bfloat16 and run.model.config._attn_implementation == "eager"
    assert run.rows[0]["rewards/chosen"] != 0  # another reference
    assert DPOConfig().trust_remote_code is False


def test_weights_are_float32_unless_asked_otherwise(tmp_path):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == torch.float32
    assert load_model(str(tmp_path), dtype="auto").dtype == torch.bfloat16


def test_lora_options_shape_the_adapter(tmp_path):
    options = {"lora_r": 3, "lora_alpha": 12, "lora_dropout": 0.25, "lora_target_modules": ["o_proj"]}
    run = start(tmp_path, use_peft=True, lora_modules_to_save=["lm_head"], max_steps=1, **options)
    saved = run.model.peft_config["default"]
    assert (saved.r, saved.lora_alpha, saved.lora_dropout, saved.target_modules) == (3, 12, 0.25, {"o_proj"})
    trained = {name.split(".")[-3] for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert trained == {"lora_A", "lora_B", "modules_to_save"}
    dropouts = [module.p for name, module in run.model.named_modules() if "lora_dropout.default" in name]
    assert set(dropouts) == {0.25}  # disable_dropout leaves the adapter's own dropout alone
    everywhere = start(tmp_path / "all", use_peft=True, lora_target_modules=["all-linear"], max_steps=1).model
    adapted = {name.split(".")[-4] for name, _ in everywhere.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_disable_dropout_reaches_layers_attention_and_configuration():
    from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.3, "attn_pdrop": 0.3}
    falcon = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_dropout": 0.4,
    }
    models = (
        GPT2LMHeadModel(GPT2Config(**sizes)),
        FalconForCausalLM(FalconConfig(**falcon)),
        make_model(attention_dropout=0.4),
    )
    for model in models:
        disable_dropout(model)
        ids = torch.arange(1, 9)[None]
        assert torch.equal(model.train()(input_ids=ids).logits, model.train()(input_ids=ids).logits)


# ----------------------------------------------------------------------------------------------------------------- data


def test_dataset_options_choose_what_is_trained_and_evaluated_on(model_dir, tmp_path, monkeypatch):
    data = DatasetDict({"left": Dataset.from_list(make_rows(4)), "right": Dataset.from_list(make_rows(3, seed=1))})
    data.save_to_disk(tmp_path / "data")
    (tmp_path / "more.json").write_text("\n".join(json.dumps(row) for row in make_rows(2, seed=2)))
    asked, load = [], dpo.loop.load_preferences
    monkeypatch.setattr(
        dpo.loop, "load_preferences", lambda source, **how: asked.append((source, how)) or load(source, **how)
    )
    common = {
        "model_name_or_path": str(model_dir),
        "dataset_name": str(tmp_path / "data"),
        "max_steps": 1,
        "save_strategy": "no",
    }
    common |= {
        "dataset_train_split": "left",
        "dataset_test_split": "right",
        "eval_strategy": "steps",
        "disable_tqdm": True,
    }
    train(args=DPOConfig(**common, dataset_config="sub", output_dir=str(tmp_path / "a")))
    whole = str(tmp_path / "data")
    assert asked == [(whole, {"split": "left", "subset": "sub"}), (whole, {"split": "right", "subset": "sub"})]
    run = train(
        args=DPOConfig(
            **common, eval_dataset_name=f'{{"more": "{tmp_path}/more.json"}}', output_dir=str(tmp_path / "b")
        )
    )
    assert "eval_more_loss" in run.rows[-1]
    file = {**common, "dataset_name": str(tmp_path / "more.json")}
    with pytest.raises(ValueError, match="eval_strategy needs something to evaluate on: set eval_dataset_name"):
        train(args=DPOConfig(**file, output_dir=str(tmp_path / "c")))
    with pytest.raises(ValueError, match="has no split 'middle'"):
        train(args=DPOConfig(**{**common, "dataset_train_split": "middle"}, output_dir=str(tmp_path / "d")))


def test_skip_bad_rows_trains_on_the_others(tmp_path):
    rows = [*ROWS, {"prompt": "a", "chosen": " same", "rejected": " same"}]
    with pytest.raises(ValueError, match="row 20: .* equal"):
        start(tmp_path, rows=rows)
    assert len(start(tmp_path, rows=rows, skip_bad_rows=True).rows) == 3


# -------------------------------------------------------------------------------------- when things happen, and machine


def test_intervals_are_steps_or_shares_of_all_steps(tmp_path):
    options = {"num_train_epochs": 4, "eval_strategy": "steps", "save_strategy": "steps", "save_only_model": True}
    run = train(
        make_model(),
        args=DPOConfig(
            output_dir=str(tmp_path), logging_steps=5, eval_steps=0.5, save_steps=0.25, disable_tqdm=True, **options
        ),
        train_dataset=ROWS,
        eval_dataset=ROWS[:3],
        processing_class=make_tokenizer(),
    )
    assert [row["step"] for row in run.rows if "loss" in row] == [1, 5, 10, 12]
    assert [row["step"] for row in run.rows if "eval_loss" in row] == [6, 12]
    checkpoints = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert [path.name for path in checkpoints] == [f"checkpoint-{step}" for step in (3, 6, 9, 12)]
    assert not list(tmp_path.glob("checkpoint-*/state.pt"))
    with pytest.raises(ValueError, match="saved with save_only_model"):
        start(tmp_path, resume_from_checkpoint="true", num_train_epochs=4)


def test_old_checkpoints_go_beyond_save_total_limit(tmp_path):
    start(tmp_path, num_train_epochs=4, save_strategy="epoch", save_total_limit=2)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-12"}


def test_trackers_get_every_row(tmp_path, monkeypatch):
    import sys
    import types

    sent = []
    for name in ("wandb", "trackio"):
        fake = types.SimpleNamespace(
            init=lambda project, name, config: sent.append((project, name, config["beta"])),
            log=lambda row, step: sent.append((step, row["loss"])),
        )
        monkeypatch.setitem(sys.modules, name, fake)
    run = start(tmp_path, report_to=["tensorboard", "wandb", "trackio"], run_name="trial", max_steps=2)
    assert sent[:2] == [("dpo", "trial", 0.1)] * 2
    assert sent[2:] == [(row["step"], row["loss"]) for row in run.rows for _ in range(2)]
    assert list((tmp_path / "tensorboard").glob("events*"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        start(tmp_path / "b", report_to=["wandb"])
    with pytest.raises(ValueError, match="report_to 'sheet' is unknown"):
        start(tmp_path / "c", report_to=["sheet"])


def test_progress_bar_shows_loss_accuracy_and_margin(tmp_path, capsys):
    start(tmp_path, max_steps=1, disable_tqdm=False)
    assert re.search(r"1/1 .*loss=0.693, accuracy=0.000, margin=0.000", capsys.readouterr().err)
    start(tmp_path / "b", max_steps=1, disable_tqdm=True)
    assert "margin=" not in capsys.readouterr().err


def test_process_options_reach_torch_distributed(tmp_path, monkeypatch):
    from dpo import distributed

    made = {}
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda model, **options: made.update(options) or model)
    monkeypatch.setattr(
        distributed.dist, "init_process_group", lambda backend, timeout: made.update(backend=backend, timeout=timeout)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # use_cpu must not look at it
    monkeypatch.setenv("WORLD_SIZE", "2")
    world = distributed.setup(use_cpu=True, backend="gloo", timeout=7)
    distributed.parallelize(make_model(), world, find_unused_parameters=True)
    assert world.device.type == "cpu" and made["backend"] == "gloo" and made["timeout"].seconds == 7
    assert made["find_unused_parameters"] is True
    args = DPOConfig(use_cpu=True, ddp_backend="gloo", ddp_timeout=7, ddp_find_unused_parameters=True)
    seen = {}

    class Reached(Exception):
        pass

    def spy(**options):
        seen.update(options)
        raise Reached

    monkeypatch.setattr(distributed, "setup", spy)
    with pytest.raises(Reached):
        train(args=args)
    assert seen == {"use_cpu": True, "backend": "gloo", "timeout": 7}


# -------------------------------------------------------------------------------------------------------- command line


def test_the_documents_command_line_works_unchanged():
    line = (
        "--model_name_or_path Qwen/Qwen2-0.5B-Instruct --dataset_name trl-lib/ultrafeedback_binarized "
        "--num_train_epochs 1 --logging_steps 25 --output_dir Qwen2-0.5B-DPO"
    )
    args = parse_args(line.split())
    assert (args.model_name_or_path, args.dataset_name) == (
        "Qwen/Qwen2-0.5B-Instruct",
        "trl-lib/ultrafeedback_binarized",
    )
    assert (args.num_train_epochs, args.logging_steps, args.output_dir) == (1.0, 25.0, "Qwen2-0.5B-DPO")


def test_defaults_are_the_documents():
    document = {
        "learning_rate": 1e-6,
        "beta": 0.1,
        "loss_type": "sigmoid",
        "num_train_epochs": 3.0,
        "max_grad_norm": 1.0,
    }
    document |= {
        "per_device_train_batch_size": 8,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "warmup_ratio": 0.0,
        "seed": 42,
    }
    document |= {"truncation_mode": "keep_end", "max_length": None, "disable_dropout": True, "label_smoothing": 0.0}
    document |= {"lr_scheduler_type": "linear", "optim": "adamw_torch", "save_steps": 500, "ddp_timeout": 1800}
    assert {key: getattr(DPOConfig(), key) for key in document} == document
    assert DPOConfig().logging_steps == 10


def test_the_command_line_wins_over_the_file_and_paths_are_relative_to_it(tmp_path):
    file = tmp_path / "run.yaml"
    values = {
        "model_name_or_path": "./model",
        "dataset_name": "hub/name",
        "beta": 0.3,
        "learning_rate": "1e-5",
        "bf16": True,
    }
    file.write_text(yaml.safe_dump({**values, "report_to": ["tensorboard"], "max_length": None}))
    args = parse_args(["--config", str(file), "--beta", "0.7", "--no_shuffle"])
    assert args.model_name_or_path == str(tmp_path / "model") and args.dataset_name == "hub/name"
    assert (args.beta, args.learning_rate, args.bf16, args.shuffle, args.report_to) == (
        0.7,
        1e-5,
        True,
        False,
        ["tensorboard"],
    )


def test_without_model_and_dataset_it_is_the_example():
    args = parse_args(["--max_steps", "3"])
    assert args.max_steps == 3 and Path(args.model_name_or_path) == EXAMPLE.parent / "model"
    assert parse_args(NEEDED).output_dir == "dpo-output"


def test_a_written_configuration_runs_again(tmp_path):
    first = start(tmp_path / "a", beta=0.3, max_steps=2, lr_scheduler_type="cosine", report_to=["tensorboard"])
    again = parse_args(["--config", str(tmp_path / "a" / "config.yaml")])
    differing = {
        f.name for f in dataclasses.fields(DPOConfig) if getattr(again, f.name) != getattr(DPOConfig(), f.name)
    }
    expected = {
        "output_dir",
        "beta",
        "max_steps",
        "lr_scheduler_type",
        "learning_rate",
        "num_train_epochs",
        "logging_steps",
    }
    assert differing == expected | {"save_strategy", "disable_tqdm", "report_to"}
    assert len(first.rows) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lerning_rate", "1"], "there is no option --lerning_rate: did you mean --learning_rate?"),
        (["--learning_rat", "1"], "did you mean --learning_rate?"),
        (["--qqqq"], "--help lists them all"),
        (["--beta", "big"], "--beta: invalid float value: 'big'"),
        (["--beta", "0"], "beta is 0.0: it must be above 0"),
        (["--label_smoothing", "0.5"], "label_smoothing is 0.5"),
        (["--loss_type", "aot", "--gradient_accumulation_steps", "2"], "sorts the whole batch"),
        (
            ["--f_alpha_divergence_coef", "0.5"],
            "f_alpha_divergence_coef does nothing without f_divergence_type alpha_divergence",
        ),
        (["--ref_model_mixup_alpha", "0.5"], "does nothing without sync_ref_model"),
        (["--sync_ref_model", "--reference_free"], "sync_ref_model moves the reference"),
        (["--loss_type", "sigmoid", "sft", "--loss_weights", "1"], "loss_weights has 1 numbers for 2 losses"),
        (["--loss_type", "hinge", "--label_smoothing", "0.1"], "label_smoothing has no meaning for loss_type hinge"),
        (["--loss_type", "best"], "loss_type 'best' is unknown: choose one of sigmoid"),
        (["--layout", "flat"], "layout is 'flat': choose one of auto, padded"),
        (["--bf16", "--fp16"], "bf16 and fp16 exclude each other"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size is 0: it must be at least 1"),
        (["--per_device_eval_batch_size", "0"], "per_device_eval_batch_size is 0"),
        (["--eval_on_start"], "need an eval_strategy"),
        (["--load_best_model_at_end"], "load_best_model_at_end needs"),
        (["--lora_target_modules", "q_proj"], "lora_target_modules does nothing without use_peft"),
        (["--lora_r", "4"], "lora_r does nothing without use_peft"),
        (["--torch_compile_backend", "eager"], "torch_compile_backend does nothing without torch_compile"),
        (["--gradient_checkpointing_kwargs", '{"a": 1}'], "does nothing without gradient_checkpointing"),
        (["--max_new_tokens", "5"], "max_new_tokens does nothing without generate_during_eval"),
        (["--eval_steps", "5"], "eval_steps does nothing without eval_strategy steps"),
        (["--adam_beta1", "0.5", "--optim", "sgd"], "adam_beta1 does nothing without an AdamW optim"),
        (["--lr_scheduler_type", "cosin"], "lr_scheduler_type is 'cosin': choose one of linear"),
        (["--fp16", "--dtype", "float16"], "fp16 needs weights of a wider dtype"),
        (["--use_weighting", "--loss_type", "aot"], "use_weighting weighs pairs"),
        (["--use_weighting", "--loss_type", "plackett_luce"], "use_weighting weighs pairs"),
        (["--ld_alpha", "0.5", "--loss_type", "exo"], "ld_alpha compares the two of a pair"),
        (["--loss_type", "exo", "sigmoid"], "mixes losses of rankings with losses of pairs"),
        (["--exo_beta_r", "2"], "exo_beta_r has no meaning for loss_type sigmoid: it belongs to exo"),
        (["--ld_alpha", "7"], "ld_alpha is 7.0: it must be at most 1"),
        (["--loss_type", "simpo", "--sync_ref_model"], "simpo has no reference"),
        (["--model_init_kwargs", "{a"], "model_init_kwargs is not JSON"),
        (["--lr_scheduler_type", "greedy"], "lr_scheduler_type greedy follows a metric"),
        (["--dataloader_prefetch_factor", "2"], "does nothing without dataloader_num_workers"),
        (["--reference_free", "--ref_model_name_or_path", "m"], "reference_free runs no reference"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["train.jsonl"], "cannot make sense of 'train.jsonl'"),
        (["--deepspeed", "x"], "there is no option --deepspeed here: this version replicates"),
        (["--evaluation_strategy", "no"], "use eval_strategy"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_nonsense_is_refused_in_one_line_that_names_the_option(arguments, words):
    with pytest.raises(ValueError) as caught:
        parse_args([*NEEDED, *arguments])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_files_with_errors_are_refused_in_one_line(tmp_path):
    for text, words in (("beta: [", "is not YAML"), ("- beta", "must hold lines"), ("bta: 1", "did you mean --beta?")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ValueError, match=re.escape(words)) as caught:
            parse_args(["--config", str(tmp_path / "c.yaml")])
        assert "\n" not in str(caught.value)


def test_every_option_of_the_document_is_here_or_left_out_with_a_reason():
    ours = {f.name for f in dataclasses.fields(DPOConfig)}
    left_out = {name for names, _ in LEFT_OUT for name in names.split()}
    assert not ours & left_out
    missing = set(DOCUMENT.split()) - ours - left_out
    assert not missing


def test_every_option_has_help_and_is_named_in_a_test():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for f in dataclasses.fields(DPOConfig):
        assert f.metadata["help"].endswith("."), f.name
        assert re.search(rf"\b{f.name}\b", tests), f"no test names {f.name}"


# The fields of TRL 0.13's DPOConfig, as its documentation lists them.
DOCUMENT = """
output_dir overwrite_output_dir do_train do_eval do_predict eval_strategy prediction_loss_only
per_device_train_batch_size per_device_eval_batch_size per_gpu_train_batch_size per_gpu_eval_batch_size
gradient_accumulation_steps eval_accumulation_steps eval_delay torch_empty_cache_steps learning_rate weight_decay
adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs max_steps lr_scheduler_type lr_scheduler_kwargs
warmup_ratio warmup_steps log_level log_level_replica log_on_each_node logging_dir logging_strategy logging_first_step
logging_steps logging_nan_inf_filter save_strategy save_steps save_total_limit save_safetensors save_on_each_node
save_only_model restore_callback_states_from_checkpoint no_cuda use_cpu use_mps_device seed data_seed jit_mode_eval
use_ipex bf16 fp16 fp16_opt_level half_precision_backend bf16_full_eval fp16_full_eval tf32 local_rank ddp_backend
tpu_num_cores tpu_metrics_debug debug dataloader_drop_last eval_steps dataloader_num_workers
dataloader_prefetch_factor past_index run_name disable_tqdm remove_unused_columns label_names load_best_model_at_end
metric_for_best_model greater_is_better ignore_data_skip fsdp fsdp_min_num_params fsdp_config
fsdp_transformer_layer_cls_to_wrap accelerator_config deepspeed label_smoothing_factor optim optim_args adafactor
group_by_length length_column_name report_to ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
dataloader_pin_memory dataloader_persistent_workers skip_memory_metrics use_legacy_prediction_loop push_to_hub
resume_from_checkpoint hub_model_id hub_strategy hub_token hub_private_repo hub_always_push gradient_checkpointing
gradient_checkpointing_kwargs include_inputs_for_metrics include_for_metrics eval_do_concat_batches fp16_backend
evaluation_strategy push_to_hub_model_id push_to_hub_organization push_to_hub_token mp_parameters auto_find_batch_size
full_determinism torchdynamo ray_scope ddp_timeout torch_compile torch_compile_backend torch_compile_mode
dispatch_batches split_batches include_tokens_per_second include_num_input_tokens_seen neftune_noise_alpha
optim_target_modules batch_eval_metrics eval_on_start use_liger_kernel eval_use_gather_object
average_tokens_across_devices model_init_kwargs ref_model_init_kwargs model_adapter_name ref_adapter_name
force_use_ref_model disable_dropout use_num_logits_to_keep dataset_num_proc padding_value label_pad_token_id
truncation_mode max_prompt_length max_completion_length max_length padding_free precompute_ref_log_probs
precompute_ref_batch_size loss_type beta f_divergence_type f_alpha_divergence_coef reference_free label_smoothing
use_weighting rpo_alpha discopop_tau sync_ref_model ref_model_mixup_alpha ref_model_sync_steps generate_during_eval
is_encoder_decoder
"""


def test_threads_do_not_spin_for_long_unless_the_user_wants_it():
    show = [sys.executable, "-c", "import dpo, os; print(os.environ['GOMP_SPINCOUNT'])"]
    for given, expected in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
        done = subprocess.run(show, cwd=ROOT, env={**environment, **given}, capture_output=True, text=True)
        assert done.stdout.strip() == expected
