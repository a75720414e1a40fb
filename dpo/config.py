"""Every option of a run, in one dataclass: `DPOConfig(...)` in Python, `--name value` or `--config FILE` in a shell.

Names and defaults are those of TRL's DPOConfig. LEFT_OUT lists what that has and this does not, each with the reason.
"""

import argparse
import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser, SchedulerType

from dpo.losses import OF_RANKINGS, OVER_THE_BATCH, WITHOUT_REFERENCE, check_loss

EXAMPLE = Path(__file__).parent / "example" / "config.yaml"


def option(default, text: str):
    """A field with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class DPOConfig:
    """All options of a run. Lengths are in tokens; batch sizes in preference pairs; steps are optimizer steps."""

    # ---- model
    model_name_or_path: str | None = option(None, "Policy to train: Hub name or directory, a LoRA adapter's too.")
    ref_model_name_or_path: str | None = option(None, "Reference model; by default the policy as it is at the start.")
    model_revision: str = option("main", "Branch, tag or commit of the model on the Hub.")
    dtype: str = option("float32", "Of the weights: float32, bfloat16, float16, or auto (as saved).")
    attn_implementation: str | None = option(None, "sdpa, eager, flash_attention_2, ...; by default the model's own.")
    trust_remote_code: bool = option(False, "Run Python code that comes with the model. Only for authors you trust.")
    model_init_kwargs: dict | str | None = option(None, "More arguments of the policy's from_pretrained, as JSON.")
    ref_model_init_kwargs: dict | str | None = option(None, "The same for ref_model_name_or_path.")
    disable_dropout: bool = option(True, "Switch off dropout in policy and reference, so that rewards start at 0.")
    gradient_checkpointing: bool = option(False, "Recompute activations in backward: less memory, more time.")
    gradient_checkpointing_kwargs: dict | str | None = option(None, "Arguments of torch.utils.checkpoint, as JSON.")
    use_peft: bool = option(False, "Train a LoRA adapter; the reference is the model without it.")
    lora_r: int = option(16, "Rank of the adapter.")
    lora_alpha: int = option(32, "The adapter's output is scaled by lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Dropout in the adapter alone; disable_dropout does not touch it.")
    lora_target_modules: list[str] | None = option(None, "Modules that get an adapter; by default PEFT's choice.")
    lora_modules_to_save: list[str] | None = option(None, "Modules to train whole, beside the adapter.")

    # ---- data
    dataset_name: str | None = option(None, "Preference pairs: Hub name, local file or directory.")
    dataset_config: str | None = option(None, "Configuration (subset) of a dataset that has several.")
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str = option("test", "Split of dataset_name to evaluate on, where eval_strategy is not no.")
    eval_dataset_name: dict | str | None = option(None, "Another dataset to evaluate on, or a JSON object of several.")
    skip_bad_rows: bool = option(False, "Leave out rows that are not preference pairs instead of stopping.")
    max_prompt_length: int | None = option(None, "Longer prompts are cut.")
    max_completion_length: int | None = option(None, "Longer completions lose their end.")
    max_length: int | None = option(None, "Of prompt and completion together.")
    truncation_mode: str = option("keep_end", "What stays of a long prompt: keep_end or keep_start.")
    padding_value: int | None = option(None, "Token id to pad with; by default the tokenizer's.")
    layout: str = option("auto", "Of a batch: padded; auto takes the fastest that is exact for the model.")
    dataset_num_proc: int | None = option(None, "Processes that tokenise.")
    dataloader_num_workers: int = option(0, "Processes that collate.")
    dataloader_prefetch_factor: int | None = option(None, "Batches each of them prepares ahead.")
    dataloader_drop_last: bool = option(False, "Leave out the last, smaller batch of an epoch.")
    shuffle: bool = option(True, "Train in another random order each epoch; false keeps the dataset's order.")
    group_by_length: bool = option(False, "Train on pairs of similar length together: less padding, less random.")

    # ---- loss
    loss_type: list[str] | str = option("sigmoid", "A loss of the README's table, or several, which are added up.")
    loss_weights: list[float] | None = option(None, "A factor for each of several losses; by default 1.")
    beta: float = option(0.1, "How strongly the policy is held to the reference.")
    label_smoothing: float = option(0.0, "Share of labels taken to be flipped, from 0 to below 0.5.")
    f_divergence_type: str = option("reverse_kl", "reverse_kl, js_divergence, alpha_divergence or forward_kl.")
    f_alpha_divergence_coef: float = option(1.0, "α of alpha_divergence: 0 is reverse_kl, 1 forward_kl.")
    reference_free: bool = option(False, "Take the reference to like all completions alike; none is loaded or run.")
    rpo_alpha: float | None = option(None, "Add so much of the chosen completion's mean negative log-likelihood (RPO).")
    use_weighting: bool = option(False, "Weigh pairs by how likely they are under the policy (WPO).")
    ld_alpha: float | None = option(None, "Weight of the tokens by which one completion is longer (LD-DPO), 0 to 1.")
    discopop_tau: float = option(0.05, "Temperature of discopop.")
    simpo_gamma: float = option(0.5, "Target margin of simpo.")
    orpo_lambda: float = option(0.1, "Weight of the odds ratio in orpo.")
    cpo_alpha: float = option(1.0, "Weight of the likelihood in cpo.")
    dpop_lambda: float = option(50.0, "Weight of the chosen completion's lost likelihood in dpop.")
    r_dpo_alpha: float = option(0.01, "Price of a token in r_dpo.")
    chipo_clip: float = option(10.0, "Largest margin of chipo.")
    exo_beta_r: float = option(1.0, "Temperature of the dataset's scores in exo.")
    sync_ref_model: bool = option(False, "Move the reference towards the policy while training (TR-DPO).")
    ref_model_mixup_alpha: float = option(0.9, "Share of the policy in the moved reference; 1 copies it.")
    ref_model_sync_steps: int = option(64, "Move it every so many steps.")

    # ---- optimization
    per_device_train_batch_size: int = option(8, "Pairs (or rankings) in one forward pass of one process.")
    gradient_accumulation_steps: int = option(1, "Forward and backward passes per optimizer step.")
    num_train_epochs: float = option(3.0, "Passes over the training set; a fraction will do.")
    max_steps: int = option(-1, "Stop after so many optimizer steps, whatever num_train_epochs says; -1 for no limit.")
    learning_rate: float = option(1e-6, "Peak learning rate.")
    lr_scheduler_type: str = option("linear", "A scheduler of transformers: linear, cosine, constant_with_warmup, ...")
    lr_scheduler_kwargs: dict | str | None = option(None, "Its further arguments, as JSON.")
    warmup_ratio: float = option(0.0, "Share of all steps in which the learning rate rises from 0.")
    warmup_steps: int = option(0, "The same as a number of steps; it wins over warmup_ratio.")
    optim: str = option("adamw_torch", "adamw_torch, adamw_8bit, paged_adamw_8bit (bitsandbytes), rmsprop, sgd.")
    weight_decay: float = option(0.0, "Weight decay, decoupled in AdamW; not on biases and norms.")
    adam_beta1: float = option(0.9, "Decay of Adam's mean of gradients.")
    adam_beta2: float = option(0.999, "Decay of Adam's mean of squared gradients.")
    adam_epsilon: float = option(1e-8, "Added to the root of that mean.")
    max_grad_norm: float = option(1.0, "Longer gradients are scaled down to this norm; 0 for no limit.")
    bf16: bool = option(False, "Compute in bfloat16 (autocast); weights keep their dtype.")
    fp16: bool = option(False, "Compute in float16 (autocast) with a loss scaler.")
    tf32: bool | None = option(None, "Let float32 matrix products on the GPU round to TensorFloat-32.")
    torch_compile: bool = option(False, "Compile policy and reference with torch.compile.")
    torch_compile_backend: str | None = option(None, "Backend of torch.compile.")
    torch_compile_mode: str | None = option(None, "Mode of torch.compile.")

    # ---- evaluation, logging, saving
    output_dir: str = option("dpo-output", "Where everything that the run leaves goes.")
    overwrite_output_dir: bool = option(False, "Replace an earlier run's files in output_dir.")
    eval_strategy: str = option("no", "Evaluate: no, steps or epoch.")
    eval_steps: float | None = option(None, "Every so many steps, below 1 a share of all; by default logging_steps.")
    eval_on_start: bool = option(False, "Evaluate before the first step, too.")
    per_device_eval_batch_size: int = option(8, "Pairs in one forward pass of one process.")
    generate_during_eval: bool = option(False, "At each evaluation sample answers of policy and reference, show both.")
    num_samples: int = option(8, "Prompts to sample answers to, the first of the evaluation set.")
    max_new_tokens: int = option(128, "Longest sampled answer.")
    sample_reward: str | None = option(None, "module:function(prompt, answer) -> float, to score sampled answers with.")
    logging_steps: float = option(10, "A metrics row every so many steps, and after the first; below 1 a share of all.")
    report_to: list[str] | None = option(None, "Where metrics go besides metrics.jsonl: tensorboard, wandb, trackio.")
    run_name: str | None = option(None, "Name of the run there; by default output_dir's.")
    disable_tqdm: bool = option(False, "No progress bar.")
    save_strategy: str = option("steps", "Write checkpoints: no, steps or epoch. The final model is always saved.")
    save_steps: float = option(500, "Every so many steps; below 1 a share of all.")
    save_total_limit: int | None = option(
        None, "Keep so many checkpoints: the newest, and the best where it is wanted."
    )
    save_only_model: bool = option(False, "Checkpoints without optimizer state: smaller, cannot be resumed from.")
    resume_from_checkpoint: str | None = option(None, "Go on from this checkpoint-N; true is the newest in output_dir.")
    load_best_model_at_end: bool = option(False, "Leave the best evaluated checkpoint's model, not the last.")
    metric_for_best_model: str = option("eval_loss", "Metric that tells the best; with or without eval_.")
    greater_is_better: bool | None = option(None, "By default true unless the metric's name ends with loss.")

    # ---- machine
    seed: int = option(42, "Of new weights, dropout and, unless data_seed is set, the order of the data.")
    data_seed: int | None = option(None, "Of the order of the data.")
    full_determinism: bool = option(False, "Only deterministic kernels: runs repeat bit by bit on a GPU, slower.")
    use_cpu: bool = option(False, "Stay on the CPU, even where there is a GPU.")
    ddp_backend: str | None = option(None, "nccl or gloo; by default nccl on GPUs, gloo on CPUs.")
    ddp_timeout: int = option(1800, "Seconds after which a process that waits for another gives up.")
    ddp_find_unused_parameters: bool = option(False, "For models that leave some trained parameters out of a step.")

    def __post_init__(self):
        self.output_dir = str(self.output_dir)
        for name in ("eval_strategy", "save_strategy"):
            if getattr(self, name) in (False, "False", "false"):  # YAML reads a bare no as false
                setattr(self, name, "no")
        if isinstance(self.loss_type, list) and len(self.loss_type) == 1:
            self.loss_type = self.loss_type[0]
        for name in ("report_to", "lora_target_modules", "lora_modules_to_save"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, getattr(self, name).split(","))
        if self.report_to == ["none"]:
            self.report_to = None
        if self.lora_target_modules == ["all-linear"]:
            self.lora_target_modules = "all-linear"
        for name in (
            "model_init_kwargs",
            "ref_model_init_kwargs",
            "gradient_checkpointing_kwargs",
            "lr_scheduler_kwargs",
        ):
            setattr(self, name, _parse_json(name, getattr(self, name)) or {})
        if str(self.eval_dataset_name).startswith("{"):
            self.eval_dataset_name = _parse_json("eval_dataset_name", self.eval_dataset_name)
        if self.resume_from_checkpoint in (False, "false", "False"):
            self.resume_from_checkpoint = None
        self.metric_for_best_model = self.metric_for_best_model or "eval_loss"
        if not self.metric_for_best_model.startswith("eval_"):
            self.metric_for_best_model = f"eval_{self.metric_for_best_model}"
        if self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")
        self._check()

    def _check(self) -> None:
        """Refuses values that have no meaning, before anything is loaded."""
        choices = {
            "dtype": ("float32", "bfloat16", "float16", "auto"),
            "truncation_mode": ("keep_end", "keep_start"),
            "layout": ("auto", "padded"),
            "optim": ("adamw_torch", "adamw_8bit", "paged_adamw_8bit", "rmsprop", "sgd"),
            "eval_strategy": ("no", "steps", "epoch"),
            "save_strategy": ("no", "steps", "epoch"),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(values)}")
        at_least = {
            "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps lora_r lora_alpha": 1,
            "max_prompt_length max_completion_length num_samples max_new_tokens save_total_limit ddp_timeout "
            "ref_model_sync_steps": 1,
            "max_length": 2,
            "padding_value": 0,
            "learning_rate weight_decay warmup_ratio warmup_steps max_grad_norm dataloader_num_workers": 0,
            "adam_beta1 adam_beta2 adam_epsilon lora_dropout ld_alpha rpo_alpha ref_model_mixup_alpha": 0,
        }
        for names, least in at_least.items():
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not value >= least:
                    raise ValueError(f"{name} is {value}: it must be at least {least}")
        above_zero = "beta discopop_tau chipo_clip exo_beta_r num_train_epochs logging_steps save_steps eval_steps"
        for name in above_zero.split():
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: it must be above 0")
        for name in ("adam_beta1", "adam_beta2", "lora_dropout", "warmup_ratio"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be below 1")
        for name in ("ld_alpha", "ref_model_mixup_alpha"):
            if (getattr(self, name) or 0) > 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at most 1")
        names = check_loss(
            self.loss_type,
            loss_weights=self.loss_weights,
            label_smoothing=self.label_smoothing,
            f_divergence_type=self.f_divergence_type,
            reference_free=self.reference_free,
        )
        conflicts = (
            (self.bf16 and self.fp16, "bf16 and fp16 exclude each other: keep one"),
            (
                self.fp16 and self.dtype == "float16",
                "fp16 needs weights of a wider dtype, for small updates: leave dtype at float32",
            ),
            (
                set(names) <= set(WITHOUT_REFERENCE)
                and (self.sync_ref_model or self.ref_model_name_or_path is not None),
                f"loss_type {', '.join(names)} has no reference: leave out sync_ref_model and ref_model_name_or_path",
            ),
            (
                self.use_weighting and bool(set(names) & {*OVER_THE_BATCH, *OF_RANKINGS}),
                f"use_weighting weighs pairs, and loss_type {', '.join(names)} is not one of pairs: leave one out",
            ),
            (
                self.ld_alpha is not None and bool(set(names) & set(OF_RANKINGS)),
                f"ld_alpha compares the two of a pair, and loss_type {', '.join(names)} ranks more: leave one out",
            ),
            (
                self.gradient_accumulation_steps > 1 and bool(set(names) & set(OVER_THE_BATCH)),
                f"loss_type {self.loss_type} sorts the whole batch: raise per_device_train_batch_size instead of "
                "gradient_accumulation_steps",
            ),
            (
                self.sync_ref_model and (self.reference_free or self.ref_model_name_or_path is not None),
                "sync_ref_model moves the reference that the policy starts from: leave out reference_free and "
                "ref_model_name_or_path",
            ),
            (
                self.reference_free and self.ref_model_name_or_path,
                "reference_free runs no reference: leave out ref_model_name_or_path",
            ),
            (
                self.eval_strategy == "no"
                and (self.eval_on_start or self.generate_during_eval or self.eval_dataset_name),
                "eval_on_start, generate_during_eval and eval_dataset_name need an eval_strategy: steps or epoch",
            ),
            (
                self.load_best_model_at_end and "no" in (self.eval_strategy, self.save_strategy),
                "load_best_model_at_end needs an eval_strategy and a save_strategy",
            ),
            (
                self.load_best_model_at_end and self.eval_strategy != self.save_strategy,
                "load_best_model_at_end needs every checkpoint evaluated: set eval_strategy and save_strategy alike",
            ),
            (
                self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"),
                f"lr_scheduler_type {self.lr_scheduler_type} follows a metric at every step: choose one that does not",
            ),
        )
        belongs_to = {
            "discopop_tau": "discopop",
            "simpo_gamma": "simpo",
            "orpo_lambda": "orpo",
            "cpo_alpha": "cpo",
            "dpop_lambda": "dpop",
            "r_dpo_alpha": "r_dpo",
            "chipo_clip": "chipo",
            "exo_beta_r": "exo",
        }
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name, loss in belongs_to.items():
            if getattr(self, name) != defaults[name] and loss not in names:
                raise ValueError(f"{name} has no meaning for loss_type {', '.join(names)}: it belongs to {loss}")
        needs = {
            "lora_r lora_alpha lora_dropout lora_target_modules lora_modules_to_save": (self.use_peft, "use_peft"),
            "torch_compile_backend torch_compile_mode": (self.torch_compile, "torch_compile"),
            "gradient_checkpointing_kwargs": (self.gradient_checkpointing, "gradient_checkpointing"),
            "sample_reward num_samples max_new_tokens": (self.generate_during_eval, "generate_during_eval"),
            "eval_steps": (self.eval_strategy == "steps", "eval_strategy steps"),
            "adam_beta1 adam_beta2 adam_epsilon": (self.optim.startswith(("adam", "paged_adam")), "an AdamW optim"),
            "dataloader_prefetch_factor": (self.dataloader_num_workers > 0, "dataloader_num_workers above 0"),
            "f_alpha_divergence_coef": (
                self.f_divergence_type == "alpha_divergence",
                "f_divergence_type alpha_divergence",
            ),
            "ref_model_mixup_alpha ref_model_sync_steps": (self.sync_ref_model, "sync_ref_model"),
        }
        for options, (is_there, need) in needs.items():
            for name in options.split():
                if not is_there and getattr(self, name) not in (defaults[name], {}):
                    raise ValueError(f"{name} does nothing without {need}: add that, or leave it out")
        if self.lr_scheduler_type not in [kind.value for kind in SchedulerType]:
            known = ", ".join(kind.value for kind in SchedulerType)
            raise ValueError(f"lr_scheduler_type is {self.lr_scheduler_type!r}: choose one of {known}")
        for conflict, words in conflicts:
            if conflict:
                raise ValueError(words)


def _parse_json(name: str, value: dict | str | None) -> dict | None:
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error}; write it like '{{\"key\": 1}}'") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{name} must be a JSON object, like '{{\"key\": 1}}'")
    return parsed


# What TRL's configuration has and this one has not, and what to do instead or why not.
LEFT_OUT = (
    (
        "do_train do_eval do_predict prediction_loss_only past_index jit_mode_eval use_ipex mp_parameters ray_scope "
        "debug tpu_num_cores tpu_metrics_debug label_names use_legacy_prediction_loop torchdynamo "
        "include_inputs_for_metrics include_for_metrics eval_use_gather_object batch_eval_metrics logging_strategy "
        "eval_accumulation_steps eval_delay restore_callback_states_from_checkpoint skip_memory_metrics log_level "
        "half_precision_backend fp16_backend fp16_opt_level accelerator_config dispatch_batches split_batches "
        "eval_do_concat_batches log_level_replica log_on_each_node torch_empty_cache_steps",
        "it steers machinery of the Trainer class that a plain loop does not have",
    ),
    ("per_gpu_train_batch_size", "use per_device_train_batch_size"),
    ("per_gpu_eval_batch_size", "use per_device_eval_batch_size"),
    ("evaluation_strategy", "use eval_strategy"),
    ("torch_dtype", "use dtype"),
    ("label_smoothing_factor", "use label_smoothing"),
    ("adafactor optim_args", "choose one of the optimizers of optim, or pass optimizers=... to dpo.loop.train"),
    ("optim_target_modules", "use use_peft and lora_target_modules"),
    ("logging_dir", "TensorBoard files go to output_dir/tensorboard"),
    ("logging_first_step", "the first step is always logged: its loss of ln 2 tells that all is well"),
    ("logging_nan_inf_filter", "a loss that is not finite stops the run"),
    ("save_safetensors", "models are always saved as safetensors"),
    ("save_on_each_node", "the first process writes; put output_dir on a shared disk"),
    ("no_cuda use_mps_device", "a GPU is taken where there is one; use_cpu stays on the CPU"),
    ("bf16_full_eval fp16_full_eval", "evaluation computes as training does, or the rewards would not compare"),
    ("local_rank", "torchrun says which process this is"),
    ("remove_unused_columns length_column_name", "extra columns are always ignored, and lengths are counted"),
    ("dataloader_pin_memory", "batches are pinned wherever there is a GPU"),
    ("dataloader_persistent_workers", "workers live for one epoch"),
    ("ignore_data_skip", "resuming takes up the order of the data at no cost"),
    ("include_tokens_per_second include_num_input_tokens_seen", "every metrics row has both"),
    ("average_tokens_across_devices", "the loss is always the mean over all pairs of all processes"),
    (
        "auto_find_batch_size",
        "lower per_device_train_batch_size and raise gradient_accumulation_steps: the same result",
    ),
    ("neftune_noise_alpha", "noise in the embeddings would break the comparison with the reference"),
    ("use_liger_kernel", "only completion positions reach the head here, which is what that kernel would save"),
    (
        "push_to_hub push_to_hub_model_id push_to_hub_organization push_to_hub_token hub_model_id hub_strategy "
        "hub_token hub_private_repo hub_always_push",
        "after the run: hf upload NAME OUTPUT_DIR",
    ),
    ("use_num_logits_to_keep", "only completion positions ever reach the head"),
    ("label_pad_token_id", "there are no padded labels: a mask says which positions count"),
    ("force_use_ref_model", "a reference model that is given is always used"),
    ("ddp_bucket_cap_mb ddp_broadcast_buffers", "PyTorch's defaults serve"),
    (
        "fsdp fsdp_min_num_params fsdp_config fsdp_transformer_layer_cls_to_wrap deepspeed",
        "this version replicates the model in every process (DDP) and does not shard it",
    ),
    ("is_encoder_decoder", "this version trains decoder-only language models"),
    ("padding_free", "this version has the padded layout only"),
    (
        "model_adapter_name ref_adapter_name precompute_ref_log_probs precompute_ref_batch_size",
        "in this version the reference is the policy's start, another model (ref_model_name_or_path), or none",
    ),
)


def parse_args(argv: list[str]) -> DPOConfig:
    """The command line as a DPOConfig: `--config FILE.yaml` first, then what the options say.

    Without a model and a dataset it is the embedded example's configuration. In a file, paths of models and datasets
    that begin with ./ are relative to the file. Raises: ValueError in one line, for a typo with a suggestion.
    """
    parser = HfArgumentParser(DPOConfig, prog="dpo.loop", allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", help="YAML file with any of these options; the command line wins over it.")
    unset = object()
    names = [f.name for f in dataclasses.fields(DPOConfig)]

    def parse(arguments: list[str]) -> dict:
        # A namespace that has every option already keeps argparse from filling in defaults: what was said remains.
        said = argparse.Namespace(config=None, **dict.fromkeys(names, unset))
        try:
            said, unknown = parser.parse_known_args(arguments, said)
        except argparse.ArgumentError as error:
            raise ValueError(str(error).replace("argument --", "--")) from error
        if unknown:
            raise ValueError(_explain_unknown(unknown[0], names))
        return {name: value for name, value in vars(said).items() if value is not unset}

    said = parse(argv)
    if not said["config"] and "model_name_or_path" not in said and "dataset_name" not in said:
        said["config"] = str(EXAMPLE)
    file = said.pop("config")
    from_file = parse(_file_to_arguments(Path(file))) if file else {}
    from_file.pop("config", None)
    return DPOConfig(**{**from_file, **said})


def _explain_unknown(argument: str, names: list[str]) -> str:
    name = argument.lstrip("-").split("=")[0].replace("-", "_")
    if not argument.startswith("--"):
        return f"cannot make sense of {argument!r}: options are written --name value"
    for left_out, reason in LEFT_OUT:
        if name in left_out.split():
            return f"there is no option --{name} here: {reason}"
    close = difflib.get_close_matches(name, names, n=1)
    return f"there is no option --{name}" + (f": did you mean --{close[0]}?" if close else "; --help lists them all")


def _file_to_arguments(path: Path) -> list[str]:
    """A YAML file of options as command-line arguments, so that both are read, checked and refused in the same way."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must hold lines of the form name: value")
    arguments = []
    for name, value in values.items():
        if name.endswith(("_name_or_path", "dataset_name")) and isinstance(value, str) and value.startswith("./"):
            value = str(path.parent / value)
        if isinstance(value, dict):
            value = json.dumps(value)
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif value is not None:
            arguments.append(f"--{name}={value}")
    return arguments
