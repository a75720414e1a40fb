"""Options: how they are given, which are refused, and what each does to a run."""

import dataclasses
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, make_model, make_rows, make_tokenizer, start
from transformers import PreTrainedTokenizerFast

from dpo.collate import DataCollatorForPreference
from dpo.config import EXAMPLE, LEFT_OUT, DPOConfig, UserError, parse_args
from dpo.loop import train
from dpo.losses import LOSSES, WITH_REFERENCE, dpo_loss

ROWS = make_rows(19)
WITHOUT_REFERENCE = [name for name in LOSSES if name not in WITH_REFERENCE]

BEST = "--load_best_model_at_end --eval_strategy epoch --save_strategy epoch"
NEEDED = "--model_name_or_path m --dataset_name d "

# ------------------------------------------------------------------------------------------ how options are given

# A command line, the text of a YAML file or arguments of DPOConfig; and the options that they set.
TAKEN = [
    ("--bf16", {"bf16": True}),
    ("--bf16 false --no_shuffle", {"bf16": False, "shuffle": False}),
    ("--learning_rate 1e-5 --max_steps 3", {"learning_rate": 1e-5, "max_steps": 3}),
    ("--loss_type ipo", {"loss_type": "ipo"}),
    ("--loss_type sigmoid sft --loss_weights 1 0.3", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
    ("--lr_scheduler_kwargs '{\"a\": 1}'", {"lr_scheduler_kwargs": {"a": 1}}),
    ("--use_peft --lora_target_modules all-linear", {"lora_target_modules": "all-linear"}),
    ("--use_peft --lora_target_modules q_proj v_proj", {"lora_target_modules": ["q_proj", "v_proj"]}),
    ("--report_to none", {"report_to": None}),
    ("--report_to tensorboard wandb", {"report_to": ["tensorboard", "wandb"]}),
    ("--resume_from_checkpoint true", {"resume_from_checkpoint": "true"}),
    ("--resume_from_checkpoint false", {"resume_from_checkpoint": None}),
    (f"{BEST} --metric_for_best_model loss", {"metric_for_best_model": "eval_loss", "greater_is_better": False}),
    (f"{BEST} --metric_for_best_model rewards/margins",
     {"metric_for_best_model": "eval_rewards/margins", "greater_is_better": True}),
    (f"{BEST} --metric_for_best_model eval_my_loss",
     {"metric_for_best_model": "eval_my_loss", "greater_is_better": False}),
    ("--eval_strategy steps --eval_dataset_name '{\"a\": \"b\"}'", {"eval_dataset_name": {"a": "b"}}),
    ("eval_strategy: no\nsave_strategy: no", {"eval_strategy": "no", "save_strategy": "no"}),
    ("learning_rate: 1e-5\nbf16: yes\nmax_length: null", {"learning_rate": 1e-5, "bf16": True, "max_length": None}),
    ("report_to: none\nresume_from_checkpoint: false", {"report_to": None, "resume_from_checkpoint": None}),
    ("report_to: [tensorboard, wandb]", {"report_to": ["tensorboard", "wandb"]}),
    ("loss_type: [sigmoid, sft]\nmodel_init_kwargs: {a: 1}",
     {"loss_type": ["sigmoid", "sft"], "model_init_kwargs": {"a": 1}}),
    ({"output_dir": Path("out"), "eval_strategy": False}, {"output_dir": "out", "eval_strategy": "no"}),
    ({"loss_type": ["ipo"], "report_to": "tensorboard,wandb"},
     {"loss_type": "ipo", "report_to": ["tensorboard", "wandb"]}),
    ({"use_peft": True, "lora_target_modules": "q_proj,v_proj", "lora_modules_to_save": "lm_head"},
     {"lora_target_modules": ["q_proj", "v_proj"], "lora_modules_to_save": ["lm_head"]}),
    ({"report_to": "none", "metric_for_best_model": None, "resume_from_checkpoint": False},
     {"report_to": None, "metric_for_best_model": "eval_loss", "resume_from_checkpoint": None}),
]  # fmt: skip

# An option, values that are refused, the nearest ones that are taken, and what else has to be there.
BOUNDS = """
per_device_train_batch_size 0    | 1   |
per_device_eval_batch_size  0    | 1   | --eval_strategy steps
gradient_accumulation_steps 0    | 1   |
lora_r                      0    | 1   | --use_peft
lora_alpha                  0    | 1   | --use_peft
lora_dropout                -0.1 1 | 0 0.9 | --use_peft
max_prompt_length           0    | 1   |
max_completion_length       0    | 1   |
max_length                  1    | 2   |
padding_value               -1   | 0   |
num_samples                 0    | 1   | --generate_during_eval --eval_strategy steps
max_new_tokens              0    | 1   | --generate_during_eval --eval_strategy steps
save_total_limit            0    | 1   |
ddp_timeout                 0    | 1   |
ref_model_sync_steps        0    | 1   | --sync_ref_model
ref_model_mixup_alpha       -0.1 1.1 | 0 1 | --sync_ref_model
learning_rate               -1e-9 nan | 0 |
weight_decay                -0.1 | 0   |
warmup_ratio                -0.1 1 | 0 0.9 |
warmup_steps                -1   | 0   |
max_grad_norm               -0.1 | 0   |
dataloader_num_workers      -1   | 0   |
adam_beta1                  -0.1 1 | 0 0.99 |
adam_beta2                  -0.1 1 | 0 0.9999 |
adam_epsilon                -1e-9 | 0  |
ld_alpha                    -0.1 1.1 | 0 1 |
rpo_alpha                   -0.1 | 0   |
label_smoothing             -0.1 0.5 | 0 0.49 |
beta                        0 -1 inf nan | 1e-9 |
discopop_tau                0 inf | 1e-9 | --loss_type discopop
chipo_clip                  0 inf | 1e-9 | --loss_type chipo
exo_beta_r                  0 inf | 1e-9 | --loss_type exo
num_train_epochs            0 inf | 0.1 |
logging_steps               0 inf | 0.1 |
save_steps                  0 inf | 0.1 |
eval_steps                  0 inf | 0.1 | --eval_strategy steps
shuffle_buffer              1    | 2   | --dataset_streaming --max_steps 9
"""

# Options that do nothing by themselves, and what each needs beside it.
NEEDS = [
    ("--lora_r 4", "--use_peft"),
    ("--lora_alpha 4", "--use_peft"),
    ("--lora_dropout 0.5", "--use_peft"),
    ("--lora_target_modules q_proj", "--use_peft"),
    ("--lora_modules_to_save lm_head", "--use_peft"),
    ("--torch_compile_backend eager", "--torch_compile"),
    ("--torch_compile_mode default", "--torch_compile"),
    ("--gradient_checkpointing_kwargs '{\"a\": 1}'", "--gradient_checkpointing"),
    ("--sample_reward a:b", "--generate_during_eval --eval_strategy steps"),
    ("--num_samples 5", "--generate_during_eval --eval_strategy steps"),
    ("--max_new_tokens 5", "--generate_during_eval --eval_strategy steps"),
    ("--eval_steps 5", "--eval_strategy steps"),
    ("--dataloader_prefetch_factor 2", "--dataloader_num_workers 1"),
    ("--f_alpha_divergence_coef 0.5", "--f_divergence_type alpha_divergence"),
    ("--ref_model_mixup_alpha 0.5", "--sync_ref_model"),
    ("--ref_model_sync_steps 5", "--sync_ref_model"),
    ("--per_device_eval_batch_size 5", "--eval_strategy steps"),
    ("--metric_for_best_model rewards/margins", BEST),
    ("--greater_is_better true", BEST),
    ("--shuffle_buffer 5", "--dataset_streaming --max_steps 9"),
]

# A command line or a file that is refused, and the essential words of the refusal.
REFUSED = [
    ("--lerning_rate 1", "there is no option --lerning_rate: did you mean --learning_rate?"),
    ("--learning_rat 1", "did you mean --learning_rate?"),
    ("--qqqq", "--help lists them all"),
    ("train.jsonl", "cannot make sense of 'train.jsonl'"),
    ("--deepspeed x", "there is no option --deepspeed here"),
    ("--evaluation_strategy no", "use eval_strategy"),
    ("--config nowhere.yaml", "nowhere.yaml: No such file"),
    ("beta: [", "not YAML"),
    ("beta: 1\x7f", "not YAML: unacceptable character"),
    ("run_name: 2024-13-45", "not YAML: month must be in 1..12"),
    ("- beta", "must hold lines"),
    ("bta: 1", "did you mean beta?"),
    ({"bta": 1}, "there is no option bta: did you mean beta?"),
    ({"max_steps": True}, "max_steps is True: it must be a whole number"),
    ("--beta big", "--beta: invalid float value: 'big'"),
    ("--model_init_kwargs {a", "model_init_kwargs is not JSON"),
    ("--lr_scheduler_kwargs [1]", "lr_scheduler_kwargs must be a JSON object"),
    ("--dtype int8", "dtype is 'int8': choose one of float32, bfloat16, float16, auto"),
    ("--truncation_mode keep", "truncation_mode is 'keep': choose one of keep_end, keep_start"),
    ("--optim adam", "optim is 'adam': choose one of adamw_torch"),
    ("--eval_strategy often", "eval_strategy is 'often': choose one of no, steps, epoch"),
    ("--save_strategy often", "save_strategy is 'often': choose one of no, steps, epoch"),
    ("--lr_scheduler_type cosin", "lr_scheduler_type is 'cosin': choose one of linear"),
    ("--lr_scheduler_type greedy", "lr_scheduler_type greedy needs a metric"),
    ("--lr_scheduler_type reduce_lr_on_plateau", "lr_scheduler_type reduce_lr_on_plateau needs a metric"),
    ("--bf16 --fp16", "bf16 and fp16 exclude each other"),
    ("--fp16 --dtype float16", "fp16 needs float32 weights"),
    ("--eval_on_start", "need an eval_strategy"),
    ("--generate_during_eval", "need an eval_strategy"),
    ("--eval_dataset_name e", "need an eval_strategy"),
    ("--load_best_model_at_end", "load_best_model_at_end needs eval_strategy and save_strategy"),
    ("--load_best_model_at_end --eval_strategy steps --save_strategy no", "load_best_model_at_end needs"),
    ("--load_best_model_at_end --eval_strategy steps --save_strategy epoch", "save_strategy set alike"),
    ("--adam_beta1 0.5 --optim sgd", "adam_beta1 does nothing without optim adamw_torch"),
    ("--adam_beta2 0.5 --optim rmsprop", "adam_beta2 does nothing without optim adamw_torch"),
    ("--adam_epsilon 0.5 --optim sgd", "adam_epsilon does nothing without optim adamw_torch"),
    ("--loss_type best", "loss_type 'best' is unknown: choose one of sigmoid"),
    ("--loss_type sigmoid sft --loss_weights 1", "loss_weights has 1 numbers for 2 losses"),
    ("--loss_type hinge --label_smoothing 0.1", "label_smoothing has no meaning for loss_type hinge"),
    ("--loss_type exo sigmoid", "mixes losses of rankings with losses of pairs"),
    ("--use_weighting --loss_type aot", "use_weighting weighs pairs"),
    ("--use_weighting --loss_type plackett_luce", "use_weighting weighs pairs"),
    ("--ld_alpha 0.5 --loss_type exo", "ld_alpha compares the two of a pair"),
    ("--reference_free --ref_model_name_or_path m", "reference_free runs no reference"),
    ("--sync_ref_model --reference_free", "sync_ref_model moves the reference"),
    ("--sync_ref_model --ref_model_name_or_path m", "sync_ref_model moves the policy's own start"),
    ("--loss_type simpo --sync_ref_model", "simpo has no reference"),
    ("--loss_type orpo --ref_model_name_or_path m", "orpo has no reference"),
    ("--dataset_streaming", "dataset_streaming: nobody knows how many rows will come: set max_steps"),
    *(
        (f"--dataset_streaming --max_steps 9 {line}", words)
        for line, words in (
            ("--eval_strategy epoch", "set eval_strategy and save_strategy to steps"),
            ("--save_strategy epoch", "set eval_strategy and save_strategy to steps"),
            ("--precompute_ref_log_probs", "leave out precompute_ref_log_probs"),
            ("--group_by_length", "leave out group_by_length"),
            ("--dataloader_drop_last", "leave out dataloader_drop_last"),
            ("--dataset_train_split train[:5]", "reads no slice, as dataset_train_split train[:5] is: leave it out"),
            ("--shuffle false --shuffle_buffer 9", "shuffle_buffer does nothing without shuffle: leave it out"),
        )
    ),
]
for bound in BOUNDS.strip().splitlines():
    (name, *bad), good, beside = (part.split() for part in bound.split("|"))
    REFUSED += [(shlex.join([f"--{name}={value}", *beside]), f"{name} is ") for value in bad]
    TAKEN += [(shlex.join([f"--{name}={value}", *beside]), {name: float(value)}) for value in good]
for line, beside in NEEDS:
    name = line.split()[0].removeprefix("--")
    REFUSED += [(line, f"{name} does nothing without {beside.removeprefix('--').split()[0]}")]
    TAKEN += [(f"{line} {beside}", {})]
for name in "discopop_tau simpo_gamma orpo_lambda cpo_alpha dpop_lambda r_dpo_alpha chipo_clip exo_beta_r".split():
    loss = name.rpartition("_")[0].removesuffix("_beta")
    REFUSED += [(f"--{name} 0.7", f"{name} has no meaning for loss_type sigmoid: it belongs to {loss}")]


def configured(given: str | dict, folder: Path) -> DPOConfig:
    """A configuration from arguments of DPOConfig, a command line or the text of a YAML file."""
    if isinstance(given, dict):
        return DPOConfig(**given)
    if re.match(r"[^\s-]*: |- ", given):
        (folder / "run.yaml").write_text(given)
        given = f"--config {folder}/run.yaml"
    return parse_args(shlex.split(NEEDED + given))


@pytest.mark.parametrize(("given", "expected"), TAKEN, ids=lambda value: repr(value)[:80])
def test_what_is_given_sets_these_options(given, expected, tmp_path):
    args = configured(given, tmp_path)
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(("given", "words"), REFUSED, ids=lambda value: repr(value)[:80])
def test_nonsense_is_refused_in_one_line_that_names_the_option(given, words, tmp_path):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        configured(given, tmp_path)
    assert "\n" not in str(caught.value)


def test_the_command_line_wins_over_the_file_and_paths_in_it_are_relative_to_it(tmp_path):
    values = {"model_name_or_path": "./model", "dataset_name": "hub/name", "beta": 0.3, "seed": 7}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    args = parse_args(["--config", str(tmp_path / "run.yaml"), "--beta", "0.7"])
    assert args.model_name_or_path == str(tmp_path / "model") and args.dataset_name == "hub/name"
    assert (args.beta, args.seed) == (0.7, 7)


def test_without_model_and_dataset_it_is_the_example():
    args = parse_args(["--max_steps", "3"])
    assert args.max_steps == 3 and Path(args.model_name_or_path) == EXAMPLE.parent / "model"
    assert parse_args(shlex.split(NEEDED)).output_dir == "dpo-output"


def test_the_documents_command_line_works_unchanged():
    line = (
        "--model_name_or_path Qwen/Qwen2-0.5B-Instruct --dataset_name trl-lib/ultrafeedback_binarized "
        "--num_train_epochs 1 --logging_steps 25 --output_dir Qwen2-0.5B-DPO"
    ).split()
    args = parse_args(line)
    values = [str(getattr(args, name.removeprefix("--"))) for name in line[::2]]
    assert values == ["Qwen/Qwen2-0.5B-Instruct", "trl-lib/ultrafeedback_binarized", "1.0", "25.0", "Qwen2-0.5B-DPO"]


def test_every_option_has_help():
    for f in dataclasses.fields(DPOConfig):
        assert f.metadata["help"].endswith("."), f.name


def test_every_option_of_trl_is_here_or_left_out_with_a_reason():
    ours = {f.name for f in dataclasses.fields(DPOConfig)}
    left_out = [name for names, _ in LEFT_OUT for name in names.split()]
    trl = {*DOCUMENT.split(), *NEWER.split()}
    assert not ours & set(left_out) and len(set(left_out)) == len(left_out)
    assert not trl - ours - set(left_out)
    page = (ROOT / "tutorials" / "coming_from_trl.md").read_text()
    assert all(f"`{name}`" in page for name in trl)
    for name in left_out:
        with pytest.raises(UserError, match=f"there is no option {name} here: "):
            DPOConfig(**{name: 1})


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
# What TRL 1.16 has beside these, in its DPOConfig, ModelConfig and ScriptArguments.
NEWER = """
activation_checkpointing activation_checkpointing_kwargs activation_offloading attn_implementation
bnb_4bit_quant_storage bnb_4bit_quant_type dataloader_in_order dataloader_multiprocessing_context dataset_config
dataset_name dataset_streaming dataset_train_split dataset_test_split ddp_static_graph dtype enable_jit_checkpoint
hub_revision ignore_bias_buffers ld_alpha liger_kernel_config load_in_4bit load_in_8bit loss_weights lora_alpha
lora_dropout lora_modules_to_save lora_r lora_target_modules lora_target_parameters lora_task_type model_name_or_path
model_revision pad_to_multiple_of pad_token parallelism_config project router_aux_loss_coef trackio_bucket_id
trackio_space_id trackio_static_space_id train_sampling_strategy trust_remote_code use_bnb_nested_quant use_cache
use_dora use_peft use_rslora
"""


def test_threads_do_not_spin_for_long_unless_the_user_wants_it():
    show = [sys.executable, "-c", "import dpo, os; print(os.environ['GOMP_SPINCOUNT'])"]
    for given, expected in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
        done = subprocess.run(show, cwd=ROOT, env={**environment, **given}, capture_output=True, text=True)
        assert done.stdout.strip() == expected


# ------------------------------------------------------------------------------------------------------- loss and data

PAIR = {"prompt": "the sky is very", "chosen": " dark blue now", "rejected": " green", "margin": 1.5}


def by_hand(model, prompt: str, completion: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token of a completion log π, and WPO's log π − log Σ_v π_v²."""
    ids, start_ = make_tokenizer()([prompt + completion, prompt])["input_ids"]
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0, len(start_) - 1 : -1].log_softmax(-1)
    own = logps.gather(1, torch.tensor(ids[len(start_) :])[:, None])[:, 0]
    return own, own - (2 * logps).logsumexp(-1)


@pytest.mark.parametrize(
    "options",
    [
        *({"loss_type": name} for name in LOSSES if name != "sigmoid"),
        {"beta": 0.5},
        {"label_smoothing": 0.2},
        {"loss_type": "exo_pair", "label_smoothing": 0.2},
        {"loss_type": ["sigmoid", "sft"]},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.6},
        {"reference_free": True},
        {"rpo_alpha": 0.7},
        {"use_weighting": True},
        {"ld_alpha": 0.3},
        {"loss_type": "discopop", "discopop_tau": 0.5},
        {"loss_type": "simpo", "simpo_gamma": 1.0},
        {"loss_type": "orpo", "orpo_lambda": 0.9},
        {"loss_type": "cpo", "cpo_alpha": 0.1},
        {"loss_type": "dpop", "dpop_lambda": 1.0},
        {"loss_type": "r_dpo", "r_dpo_alpha": 0.3},
        {"loss_type": "chipo", "chipo_clip": 0.01},
        {"loss_type": "exo", "exo_beta_r": 3.0},
    ],
    ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()),
)
def test_the_loss_of_a_pair_is_the_one_that_the_options_say(options, tmp_path):
    """The first logged loss, beside another reference, against dpo_loss of log-probabilities made by hand."""
    policy, reference, row = make_model(), make_model(seed=19), dict(PAIR)
    texts = [(row["prompt"], f"{row[part]}<|im_end|>") for part in ("chosen", "rejected")]
    tokens = [by_hand(model, *text) for model in (policy, reference) for text in texts]
    if "ld_alpha" in options:  # the chosen completion is two tokens longer
        longer = torch.tensor([1, 1, options["ld_alpha"], options["ld_alpha"]])
        tokens = [(own * longer[: len(own)], scores) for own, scores in tokens]
    logps = [own.sum()[None] for own, _ in tokens]
    if "exo_beta_r" in options:
        row["scores"] = [2.0, 1.0]
    w, l = logps[0] - logps[2], logps[1] - logps[3]
    more = {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([2]), "margins": torch.tensor([1.5])}
    more |= {"bco_delta": 0.1 * (w + l) / 2, "scores": torch.tensor([row["scores"]]) if "scores" in row else None}
    more |= {key: value for key, value in options.items() if key not in ("use_weighting", "ld_alpha")}
    weight = sum(scores.mean() for _, scores in tokens[:2]).exp() if "use_weighting" in options else 1.0
    expected = float(weight * dpo_loss(*logps, **more)[0])
    assert 0.0 < weight <= 1.0

    alone = "reference_free" in options or options.get("loss_type") in WITHOUT_REFERENCE
    first = start(tmp_path, policy, [row], ref_model=None if alone else reference, max_steps=1, **options).rows[0]
    assert first["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    defaults = {key: value for key, value in more.items() if key not in options or key == "loss_type"}
    if options.keys() - {"loss_type", "ld_alpha"}:  # else this test would not see that an option is ignored
        assert expected != pytest.approx(float(dpo_loss(*logps, **defaults)[0]), rel=1e-2)


@pytest.mark.parametrize(
    ("limits", "prompt", "chosen"),
    [
        ({}, "the sky is very", " dark blue now<|im_end|>"),
        ({"max_prompt_length": 3}, " sky is very", " dark blue now<|im_end|>"),
        ({"max_prompt_length": 3, "truncation_mode": "keep_start"}, "the sky is", " dark blue now<|im_end|>"),
        ({"max_completion_length": 2}, "the sky is very", " dark blue"),
        ({"max_length": 6}, " is very", " dark blue now<|im_end|>"),
    ],
    ids=str,
)
def test_lengths_are_limited(limits, prompt, chosen, tmp_path):
    first = start(tmp_path, rows=[PAIR], max_steps=1, **limits).rows[0]
    assert first["logps/chosen"] == pytest.approx(float(by_hand(make_model(), prompt, chosen)[0].sum()), abs=1e-4)


def order(folder: Path, rows=ROWS, **options) -> list[float]:
    """The rows in the order of a run that trains nothing, one a step, each as log π of its chosen completion."""
    options = {"learning_rate": 0.0, "per_device_train_batch_size": 1, "overwrite_output_dir": True, **options}
    return [row["logps/chosen"] for row in start(folder, rows=rows, **options).rows]


def test_rows_are_shuffled_by_data_seed_or_else_by_seed_or_stay_in_order(tmp_path):
    kept, usual = order(tmp_path, shuffle=False), order(tmp_path)
    assert order(tmp_path, ROWS[::-1], shuffle=False) == pytest.approx(kept[::-1], abs=1e-4)
    assert usual != kept and sorted(usual) == sorted(kept)
    assert order(tmp_path, seed=7) == order(tmp_path, data_seed=7) != usual
    assert order(tmp_path, seed=7, data_seed=42) == usual


def test_rows_of_similar_length_are_grouped(tmp_path):
    rows = [{**PAIR, "prompt": "the " * (2 + 20 * (i % 2))} for i in range(16)]
    grouped, mixed = (
        [row["tokens_seen"] for row in start(tmp_path / str(i), rows=rows, group_by_length=wanted,
                                             per_device_train_batch_size=4).rows]
        for i, wanted in enumerate((True, False))
    )  # fmt: skip
    steps = [{after - before for before, after in zip([0, *seen], seen, strict=False)} for seen in (grouped, mixed)]
    assert len(steps[0]) == 2 < len(steps[1])  # all short or all long


def test_bad_rows_stop_the_run_or_are_left_out(tmp_path):
    rows = [*ROWS, {"prompt": "a", "chosen": " same", "rejected": None}]
    with pytest.raises(ValueError, match="row 20: column 'rejected' is missing"):
        start(tmp_path, rows=rows)
    assert len(start(tmp_path, rows=rows, skip_bad_rows=True).rows) == 3


def test_dataset_options_choose_what_is_trained_and_evaluated_on(model_dir, tmp_path):
    sets = {name: make_rows(2 + i, seed=i) for i, name in enumerate(("left", "right", "small", "more"))}
    (tmp_path / "data").mkdir()
    for name, rows in sets.items():
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = {"left": "left.jsonl", "right": "right.jsonl"}
    configs = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in some.items()]}
        for name, some in (("sub", splits), ("other", {"train": "small.jsonl", "test": "small.jsonl"}))
    ]
    (tmp_path / "data" / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    common = {"model_name_or_path": str(model_dir), "eval_strategy": "epoch", "save_strategy": "no"}
    common |= {"learning_rate": 1e-3, "num_train_epochs": 1, "logging_steps": 1, "disable_tqdm": True}

    def metrics(name: str, **options) -> list[dict]:
        args = DPOConfig(output_dir=str(tmp_path / name), dataset_name=str(tmp_path / "data"), **common, **options)
        return [{key: value for key, value in row.items() if "per_second" not in key} for row in train(args=args).rows]

    def given(train_name: str, eval_name: str) -> list[dict]:
        run = start(tmp_path / "given", str(model_dir), sets[train_name], sets[eval_name], eval_strategy="epoch",
                    overwrite_output_dir=True)  # fmt: skip
        return [{key: value for key, value in row.items() if "per_second" not in key} for row in run.rows]

    sub = {"dataset_config": "sub", "dataset_train_split": "left", "dataset_test_split": "right"}
    assert metrics("sub", **sub) == given("left", "right")
    assert metrics("other", dataset_config="other") == given("small", "small")
    more = f"{tmp_path}/data/more.jsonl"
    with pytest.raises(ValueError, match="is one file and has no split 'right'"):
        metrics("more", **sub, eval_dataset_name=more)
    del sub["dataset_test_split"]
    assert metrics("more", **sub, eval_dataset_name=more) == given("left", "more")
    assert "eval_more_loss" in metrics("named", **sub, eval_dataset_name=json.dumps({"more": more}))[-1]
    with pytest.raises(ValueError, match="has no split 'middle'"):
        metrics("bad", dataset_config="sub", dataset_train_split="middle")
    with pytest.raises(ValueError, match="eval_strategy needs something to evaluate on: set eval_dataset_name"):
        start(tmp_path / "none", rows=ROWS, eval_strategy="epoch")


# -------------------------------------------------------------------------------------------------------- optimization


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 3),
        ({"per_device_train_batch_size": 4}, 5),
        ({"gradient_accumulation_steps": 2}, 2),
        ({"num_train_epochs": 1.5}, 5),
        ({"num_train_epochs": 1.5, "max_steps": 2}, 2),
        ({"max_steps": 4}, 4),
        ({"dataloader_drop_last": True}, 2),
    ],
    ids=str,
)
def test_so_many_steps_are_taken(options, steps, tmp_path):
    assert [row["step"] for row in start(tmp_path, rows=ROWS, **options).rows] == list(range(1, steps + 1))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.0, 0.75, 0.5, 0.25]),
        ({"lr_scheduler_type": "constant"}, [1.0] * 4),
        ({"lr_scheduler_type": "cosine"}, [0.5 + 0.5 * math.cos(math.pi * i / 4) for i in range(4)]),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 5e-4}},
         [0.75 + 0.25 * math.cos(math.pi * i / 4) for i in range(4)]),
        ({"warmup_steps": 2}, [0.0, 0.5, 1.0, 0.5]),
        ({"warmup_ratio": 0.3}, [0.0, 0.5, 1.0, 0.5]),
        ({"warmup_steps": 1, "warmup_ratio": 0.5}, [0.0, 1.0, 2 / 3, 1 / 3]),
    ],
    ids=str,
)  # fmt: skip
def test_learning_rates(options, expected, tmp_path):
    run = start(tmp_path, rows=ROWS[:4], per_device_train_batch_size=1, learning_rate=1e-3, **options)
    assert [row["learning_rate"] for row in run.rows] == pytest.approx([1e-3 * share for share in expected])


def adamw(groups, betas=(0.9, 0.999), eps=1e-8, kind="AdamW8bit", lr=1e-3) -> torch.optim.Optimizer:
    """An AdamW of bitsandbytes, kept apart from torch's by its name."""
    import bitsandbytes

    return getattr(bitsandbytes.optim, kind)(groups, lr=lr, betas=betas, eps=eps)


@pytest.mark.parametrize(
    ("options", "make"),
    [
        ({}, lambda groups: torch.optim.AdamW(groups, lr=1e-3)),
        ({"learning_rate": 3e-3}, lambda groups: torch.optim.AdamW(groups, lr=3e-3)),
        ({"adam_beta1": 0.5}, lambda groups: torch.optim.AdamW(groups, lr=1e-3, betas=(0.5, 0.999))),
        ({"adam_beta2": 0.5}, lambda groups: torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.5))),
        ({"adam_epsilon": 1e-2}, lambda groups: torch.optim.AdamW(groups, lr=1e-3, eps=1e-2)),
        ({"weight_decay": 9.0}, lambda groups: torch.optim.AdamW(groups, lr=1e-3)),
        ({"optim": "sgd", "weight_decay": 9.0}, lambda groups: torch.optim.SGD(groups, lr=1e-3)),
        ({"optim": "rmsprop", "weight_decay": 9.0}, lambda groups: torch.optim.RMSprop(groups, lr=1e-3)),
        ({"optim": "adamw_8bit", "weight_decay": 9.0}, adamw),
        ({"optim": "paged_adamw_8bit"}, lambda groups: adamw(groups, kind="PagedAdamW8bit")),
        ({"optim": "adamw_8bit", "adam_beta1": 0.5}, lambda groups: adamw(groups, betas=(0.5, 0.999))),
        ({"optim": "adamw_8bit", "adam_beta2": 0.5}, lambda groups: adamw(groups, betas=(0.9, 0.5))),
        ({"optim": "adamw_8bit", "adam_epsilon": 1e-2}, lambda groups: adamw(groups, eps=1e-2)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_train_as_the_optimizer_does_that_they_describe(options, make, tmp_path):
    model = make_model()
    decay = options.get("weight_decay", 0.0)  # of matrices; norms are spared
    groups = [[p for p in model.parameters() if p.ndim >= 2], [p for p in model.parameters() if p.ndim < 2]]
    optimizer = make([{"params": groups[0], "weight_decay": decay}, {"params": groups[1], "weight_decay": 0.0}])
    expected = start(tmp_path / "a", model, ROWS, optimizers=(optimizer, None), max_steps=2).model.state_dict()
    trained = start(tmp_path / "b", rows=ROWS, max_steps=2, **options).model.state_dict()
    for name, value in expected.items():
        assert torch.allclose(trained[name], value, atol=1e-6), name


def test_longer_gradients_are_cut_to_max_grad_norm(tmp_path):
    for limit in (0.01, 0):
        run = start(tmp_path / str(limit), rows=ROWS, max_steps=1, optim="sgd", learning_rate=0.5, max_grad_norm=limit)
        moved = [(run.model.state_dict()[name] - old).norm() for name, old in make_model().state_dict().items()]
        norm = run.rows[0]["grad_norm"]  # before cutting
        assert norm > 0.1 and torch.stack(moved).norm() == pytest.approx(0.5 * (limit or norm), rel=1e-3)


def test_a_moved_reference_takes_its_share_of_the_policy(tmp_path):
    options = {"learning_rate": 1e-4, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0}
    options["max_steps"] = 2
    still = start(tmp_path / "still", rows=ROWS, **options).rows[1]["rewards/chosen"]
    for share in (0.2, 0.7):
        moving = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": share}
        row = start(tmp_path / str(share), rows=ROWS, **options, **moving).rows[1]
        assert row["rewards/chosen"] == pytest.approx((1 - share) * still, rel=0.05)
    hard = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0, "max_steps": 3}
    rewards = [row["rewards/chosen"] for row in start(tmp_path / "hard", rows=ROWS, **{**options, **hard}).rows]
    assert [reward != 0 for reward in rewards] == [False, True, False]  # after two steps the reference is the policy


@pytest.mark.parametrize(("option", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_computes_in_it_and_keeps_float32_weights(option, dtype, tmp_path, unlooked):
    model, seen = make_model(), set()
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    trained = start(tmp_path, model, max_steps=1, **{option: True}).model
    assert seen == {dtype} and trained.dtype == torch.float32


# ----------------------------------------------------------------------------------------- how, but not what is trained


@pytest.mark.parametrize(
    ("options", "grads"),
    [
        ({}, [True]),
        ({"gradient_checkpointing": True}, [True, True]),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, [False, True]),
    ],
    ids=str,
)
def test_gradient_checkpointing_runs_a_layer_again_in_the_backward_pass(options, grads, tmp_path, unlooked):
    model, seen = make_model(), []

    def note(layer, *_):
        if layer.training:  # not the reference's
            seen.append(torch.is_grad_enabled())

    model.model.layers[0].mlp.register_forward_pre_hook(note)
    first = start(tmp_path / "a", model, ROWS, max_steps=1, **options).rows[0]
    assert seen == grads  # a reentrant checkpoint does without gradients the first time
    assert first["grad_norm"] == pytest.approx(start(tmp_path / "b", rows=ROWS, max_steps=1).rows[0]["grad_norm"])


@pytest.mark.parametrize("workers", [0, 1])
def test_batch_sizes_and_workers_of_training_and_evaluation(workers, tmp_path, monkeypatch, unlooked):
    collate, make, ahead = DataCollatorForPreference(pad_token_id=0), torch.utils.data.DataLoader.__init__, []

    def note(features):
        with (tmp_path / "batches").open("a") as file:
            file.write(f"{len(features)} {os.getpid()}\n")
        return collate(features)

    def spy(self, *args, **options):
        ahead.append(options.get("prefetch_factor"))
        make(self, *args, **options)

    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", spy)
    args = DPOConfig(
        per_device_train_batch_size=2, per_device_eval_batch_size=3, dataloader_num_workers=workers,
        dataloader_prefetch_factor=5 if workers else None, eval_strategy="epoch", num_train_epochs=1,
        output_dir=str(tmp_path), save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    given = {"train_dataset": ROWS[:5], "eval_dataset": ROWS[:7], "processing_class": make_tokenizer()}
    train(make_model(), args=args, data_collator=note, **given)
    sizes, processes = zip(*(map(int, line.split()) for line in (tmp_path / "batches").open()), strict=True)
    assert sizes == (2, 2, 1, 3, 3, 1)
    assert (os.getpid() in processes) == (workers == 0)
    assert ahead[0] == (5 if workers else None)


class NotingTokenizer(PreTrainedTokenizerFast):
    """Writes down which process it is called in."""

    def __call__(self, *args, **options):
        with Path(self.notes).open("a") as file:
            file.write(f"{os.getpid()}\n")
        return super().__call__(*args, **options)


def test_as_many_processes_tokenise_as_are_wanted(tmp_path):
    tokenizer = make_tokenizer()
    noting = NotingTokenizer(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    noting.notes = str(tmp_path / "processes")
    args = DPOConfig(output_dir=str(tmp_path), max_steps=1, save_strategy="no", disable_tqdm=True, dataset_num_proc=2)
    train(make_model(), args=args, train_dataset=ROWS, processing_class=noting)
    assert len(set((tmp_path / "processes").read_text().split()) - {str(os.getpid())}) == 2


def test_padding_value_fills_the_padding(tmp_path):
    model, seen = make_model(), set()
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: seen.update(inputs[0][0].tolist()))
    start(tmp_path, model, ROWS, max_steps=1, padding_value=333)
    assert 333 in seen and make_tokenizer().pad_token_id not in seen


def test_torch_is_set_as_the_options_say(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **options: compiled.append(options))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = {"max_steps": 1, "use_cpu": True, "torch_compile": True, "torch_compile_mode": "reduce-overhead"}
    run = start(tmp_path / "a", tf32=True, full_determinism=True, torch_compile_backend="eager", **options)
    assert torch.get_float32_matmul_precision() == "high" and torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    assert run.model.device.type == "cpu"
    assert compiled == [{"backend": "eager", "mode": "reduce-overhead"}] * 2  # policy and reference
    start(tmp_path / "b", max_steps=1, use_cpu=True, tf32=False)
    assert torch.get_float32_matmul_precision() == "highest" and not torch.are_deterministic_algorithms_enabled()
    assert len(compiled) == 2


@pytest.mark.slow
def test_a_compiled_run_trains_the_same(tmp_path):
    plain, compiled = (
        start(tmp_path / name, rows=ROWS, **options).model.state_dict()
        for name, options in (("a", {}), ("b", {"torch_compile": True, "torch_compile_backend": "eager"}))
    )
    assert all(torch.allclose(compiled[name], value, atol=1e-5) for name, value in plain.items())


def test_process_options_reach_torch_distributed(tmp_path, monkeypatch):
    """A world of two whose other process is made up by PyTorch's "fake" backend; it ends where DDP would begin."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    asked, join = {}, torch.distributed.init_process_group

    def spy_join(backend, timeout):
        asked.update(backend=backend, timeout=timeout.seconds)
        join("fake", store=FakeStore(), rank=0, world_size=2)

    class Reached(Exception):
        pass

    def spy_parallel(self, module, find_unused_parameters=False, **_):
        asked.update(find_unused_parameters=find_unused_parameters)
        raise Reached

    monkeypatch.setattr(torch.distributed, "init_process_group", spy_join)
    monkeypatch.setattr(torch.nn.parallel.DistributedDataParallel, "__init__", spy_parallel)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for unused in (True, False):
        with pytest.raises(Reached):
            start(tmp_path, use_cpu=True, ddp_backend="gloo", ddp_timeout=7, ddp_find_unused_parameters=unused)
        torch.distributed.destroy_process_group()
        assert asked == {"backend": "gloo", "timeout": 7, "find_unused_parameters": unused}


# ------------------------------------------------------------------------------------------------- when things happen


def test_intervals_are_steps_or_shares_of_all_steps_rounded_up(tmp_path):
    options = {"num_train_epochs": 4, "eval_strategy": "steps", "save_strategy": "steps", "save_only_model": True}
    options |= {"logging_steps": 5, "eval_steps": 0.45, "save_steps": 0.2, "eval_on_start": True}  # of 12: 5.4, 2.4
    run = start(tmp_path, rows=ROWS, eval_rows=ROWS[:3], **options)
    assert [row["step"] for row in run.rows if "loss" in row] == [1, 5, 10, 12]
    assert [row["step"] for row in run.rows if "eval_loss" in row] == [0, 6, 12]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (3, 6, 9, 12)}
    assert not list(tmp_path.glob("checkpoint-*/*.pt"))
    with pytest.raises(ValueError, match="saved with save_only_model"):
        start(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-12"), num_train_epochs=4)
    usual = start(tmp_path / "b", rows=ROWS, eval_rows=ROWS[:3], logging_steps=2, eval_strategy="steps")
    assert [row["step"] for row in usual.rows if "eval_loss" in row] == [2, 3]  # as logging_steps


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({}, "prefix_shared"),
        ({"layout": "prefix_shared"}, "prefix_shared"),
        ({"layout": "padding_free"}, "padding_free"),
        ({"padding_free": True}, "padding_free"),
        ({"layout": "padded"}, "padded"),
    ],
    ids=str,
)
def test_layout_is_that_of_the_batches(options, layout, tmp_path, unlooked):
    """Padded has a row for each sequence, the others one for all, where a prompt stands for each of them, or once."""
    model, shapes = make_model(), []
    model.register_forward_pre_hook(lambda _, __, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True)
    run = start(tmp_path, model=model, rows=ROWS[:8], max_steps=1, **options)
    rows = [[len(row[f"{part}_input_ids"]) for part in ("prompt", "chosen", "rejected")] for row in run.train_rows]
    longest = max(prompt + max(own) for prompt, *own in rows)
    shape = {
        "padded": (16, longest),
        "padding_free": (1, sum(2 * prompt + sum(own) for prompt, *own in rows)),
        "prefix_shared": (1, sum(map(sum, rows))),
    }
    assert run.collator.layout == layout and run.layout.startswith(layout)
    assert shapes == [shape[layout]] * 2  # policy and reference


def test_a_collator_of_the_callers_makes_the_batches(tmp_path):
    run = start(tmp_path / "padded", rows=ROWS[:8], max_steps=1, layout="padded")
    collator = DataCollatorForPreference(pad_token_id=0)  # of the plain layout, which the loader makes ready
    plain = start(tmp_path / "plain", rows=ROWS[:8], max_steps=1, data_collator=collator)
    assert torch.equal(plain.model.lm_head.weight, run.model.lm_head.weight)
    collator = DataCollatorForPreference(pad_token_id=0, layout="prefix_shared")
    flat = start(tmp_path / "flat", rows=ROWS[:8], max_steps=1, data_collator=collator)
    assert flat.layout.startswith("prefix_shared (as padded") and flat.collator.layout == "prefix_shared"
    assert flat.rows[0]["loss"] == pytest.approx(plain.rows[0]["loss"], abs=1e-6)
    collator = DataCollatorForPreference(pad_token_id=0, layout="padded")
    kept = start(tmp_path / "kept", rows=ROWS[:8], max_steps=1, data_collator=collator)
    assert kept.layout == kept.collator.layout == "padded"
    for options in ({"layout": "padded"}, {"padding_value": 3}):
        with pytest.raises(ValueError, match=r"\A(layout|padding_value) does nothing beside data_collator"):
            start(tmp_path / "refused", data_collator=collator, **options)
