"""Every option of a run, in one dataclass: `DPOConfig(...)` in Python, `--name value` or `--config FILE` in a shell.

Names are those of TRL's DPOConfig. LEFT_OUT lists what that has and this does not, each with the reason.
"""

import argparse
import dataclasses
import difflib
import json
import math
import types
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser, SchedulerType
from transformers.hf_argparser import string_to_bool

from dpo.losses import F_DIVERGENCES, OF_RANKINGS, OVER_THE_BATCH, WITH_REFERENCE, check_loss, takers

EXAMPLE = Path(__file__).parent / "example" / "config.yaml"
SCHEDULES = " ".join(kind.value for kind in SchedulerType)
ADAMW = "adamw_torch adamw_torch_fused adamw_8bit adamw_bnb_8bit paged_adamw_8bit paged_adamw_32bit"
Json, Words = dict | str | None, list[str] | None  # types of options
EVALUATES, SAVES = "eval_strategy steps epoch", "save_strategy steps epoch"  # what options need
SEED = {"least": 0, "most": 2**32 - 1}


KWARGS = (
    "model_init_kwargs ref_model_init_kwargs gradient_checkpointing_kwargs lr_scheduler_kwargs chat_template_kwargs"
)
KWARGS = KWARGS.split()


class UserError(ValueError):
    """What the user gave cannot be done, for a reason that one line tells: the command line shows that line alone."""


def option(default, text: str, *, choices: str = "", needs: str = "", **bounds: float):
    """A field with its help text; choices, the words that it may be; needs, another option without which it does
    nothing, and the values that this must have (if none: it must be set); bounds: least, most, above and below."""
    text = f"{text[:-1]}: {', '.join(choices.split())}." if choices else text
    return field(default=default, metadata={"help": text, "choices": choices.split(), "needs": needs, "bounds": bounds})


@dataclass
class DPOConfig:
    """All options of a run. Lengths are in tokens; batch sizes in preference pairs; steps are optimizer steps."""

    # ---- model
    model_name_or_path: str | None = option(None, "Policy to train: Hub name or directory, a LoRA adapter's too.")
    ref_model_name_or_path: str | None = option(None, "Reference model; by default the policy as it is at the start.")
    model_revision: str = option("main", "Branch, tag or commit of the model on the Hub.")
    dtype: str = option("float32", "Of the weights, auto as saved.", choices="float32 bfloat16 float16 auto")
    attn_implementation: str | None = option(None, "sdpa, eager, flash_attention_2, ...; by default the model's own.")
    trust_remote_code: bool = option(False, "Run Python code that comes with the model. Only for authors you trust.")
    model_init_kwargs: Json = option(None, "More arguments of the policy's from_pretrained, as JSON.")
    ref_model_init_kwargs: Json = option(None, "The same for a reference model that is loaded by name.")
    disable_dropout: bool = option(True, "Switch off dropout in policy and reference, so that rewards start at 0.")
    gradient_checkpointing: bool = option(False, "Recompute activations in backward: less memory, more time.")
    gradient_checkpointing_kwargs: Json = option(None, "More arguments of it, as JSON.", needs="gradient_checkpointing")
    load_in_4bit: bool = option(False, "Keep the model's weights in 4 bits (QLoRA); an adapter trains.")
    load_in_8bit: bool = option(False, "The same in 8 bits.")
    bnb_4bit_quant_type: str = option("nf4", "The 4 bits.", choices="nf4 fp4", needs="load_in_4bit")
    use_bnb_nested_quant: bool = option(False, "Quantise their constants, too.", needs="load_in_4bit")
    use_peft: bool = option(False, "Train a LoRA adapter; the reference is the model without it.")
    lora_r: int = option(16, "Rank of the adapter.", least=1, needs="use_peft")
    lora_alpha: int = option(32, "The adapter's output is scaled by lora_alpha / lora_r.", least=1, needs="use_peft")
    lora_dropout: float = option(0.0, "Dropout of the adapter alone.", least=0, below=1, needs="use_peft")
    lora_target_modules: Words = option(
        None, "Modules to adapt; by default PEFT's choice, or all-linear.", needs="use_peft"
    )
    lora_modules_to_save: Words = option(None, "Modules to train whole, beside the adapter.", needs="use_peft")
    use_dora: bool = option(False, "Train the lengths of the weights' columns, too (DoRA).", needs="use_peft")
    use_rslora: bool = option(False, "Scale by lora_alpha / √lora_r.", needs="use_peft")
    init_lora_weights: str = option("true", "How it starts: true, gaussian, pissa, olora, ...", needs="use_peft")
    merge_adapter: bool = option(False, "Leave in output_dir/merged the model with its adapter merged into it, too.")

    is_encoder_decoder: bool | None = option(
        None, "Prompt to the encoder, completion to the decoder; by default as the model's configuration says."
    )
    output_router_logits: bool = option(False, "Mixture of experts: add their load balance to the loss.")
    router_aux_loss_coef: float | None = option(None, "Its factor; by default that of the model.", least=0)

    # ---- reference
    force_use_ref_model: bool = option(False, "Take the given reference model, though an adapter has its own.")
    model_adapter_name: str | None = option(None, "Name, in the model, of the adapter that trains.")
    ref_adapter_name: str | None = option(None, "Name of another one, frozen: the reference. A path is loaded twice.")
    precompute_ref_log_probs: bool = option(False, "Score all rows under the reference first; keep the results.")
    precompute_ref_batch_size: int | None = option(
        None, "Pairs in one pass of that; by default those of training.", least=1, needs="precompute_ref_log_probs"
    )
    ref_cache_dir: str | None = option(
        None, "Where they are kept; by default under the Hugging Face cache.", needs="precompute_ref_log_probs"
    )

    # ---- data
    dataset_name: str | None = option(None, "Preference pairs: Hub name, local file or directory.")
    dataset_config: str | None = option(None, "Configuration (subset) of a dataset that has several.")
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str = option("test", "Split to evaluate on.", needs=EVALUATES)
    eval_dataset_name: Json = option(None, "Another dataset to evaluate on, or a JSON object of several.")
    dataset_streaming: bool = option(
        False, "Read the training set while training, for one larger than the disk; max_steps says where it ends."
    )
    shuffle_buffer: int = option(
        10_000, "Rows of a stream that are held, and shuffled, at a time.", least=2, needs="dataset_streaming"
    )
    skip_bad_rows: bool = option(False, "Leave out rows that are not preference pairs instead of stopping.")
    chat_template_kwargs: Json = option(None, "More arguments of the chat template, as JSON; a row may have its own.")
    show_rows: int = option(0, "Print so many rows as they will be trained, scored tokens marked.", least=0)
    max_prompt_length: int | None = option(None, "Longer prompts are cut.", least=1)
    max_completion_length: int | None = option(None, "Longer completions lose their end.", least=1)
    max_length: int | None = option(None, "The same for prompt and completion together.", least=2)
    truncation_mode: str = option("keep_end", "What stays of a cut prompt.", choices="keep_end keep_start")
    padding_value: int | None = option(None, "Token id to pad with; by default the tokenizer's.", least=0)
    label_pad_token_id: int = option(
        -100, "What is padding in an encoder-decoder's batch['labels'], which are for you.", most=-1
    )
    layout: str = option(
        "auto",
        "How batches look: padded; padding_free, one row of all sequences; prefix_shared, that with each prompt once. "
        "auto takes the last of these that the model computes exactly.",
        choices="auto padded padding_free prefix_shared",
    )
    logits_budget: float | None = option(
        4.0,
        "GiB that a batch's logits may take in float32; larger ones are worked out in chunks, and again in backward.",
        above=0,
    )
    padding_free: bool = option(False, "TRL's name for the layout padding_free.")
    dataset_num_proc: int | None = option(None, "Processes that tokenise the dataset.", least=1)
    dataloader_num_workers: int = option(0, "Processes that make batches ready.", least=0)
    dataloader_prefetch_factor: int | None = option(
        None, "Batches that each keeps ready.", least=1, needs="dataloader_num_workers"
    )
    dataloader_drop_last: bool = option(False, "Leave out the last, smaller batch of an epoch.")
    shuffle: bool = option(True, "Train in another random order each epoch; false keeps the dataset's order.")
    group_by_length: bool = option(False, "Train on pairs of similar length together: less padding, less random.")

    # ---- loss
    loss_type: list[str] | str = option("sigmoid", "A loss of tutorials/losses.md, or several, which are added up.")
    loss_weights: list[float] | None = option(None, "A factor for each of several losses; by default 1.")
    beta: float = option(0.1, "How strongly the policy is held to the reference.", above=0)
    label_smoothing: float = option(0.0, "Share of labels taken to be flipped.", least=0, below=0.5)
    f_divergence_type: str = option("reverse_kl", "What holds the policy.", choices=" ".join(F_DIVERGENCES))
    f_alpha_divergence_coef: float = option(1.0, "Its α; 1 is forward_kl.", needs="f_divergence_type alpha_divergence")
    reference_free: bool = option(False, "Take the reference to like all completions alike; none is loaded or run.")
    rpo_alpha: float | None = option(None, "So much of the chosen completion's mean NLL is added (RPO).", least=0)
    use_weighting: bool = option(False, "Weigh pairs by how likely they are under the policy (WPO).")
    ld_alpha: float | None = option(None, "Weight of the tokens by which one is longer (LD-DPO).", least=0, most=1)
    discopop_tau: float = option(0.05, "Temperature of discopop.", above=0)
    simpo_gamma: float = option(0.5, "Target margin of simpo.")
    orpo_lambda: float = option(0.1, "Weight of the odds ratio in orpo.")
    cpo_alpha: float = option(1.0, "Weight of the likelihood in cpo.")
    dpop_lambda: float = option(50.0, "Weight of the chosen completion's lost likelihood in dpop.")
    r_dpo_alpha: float = option(0.01, "Price of a token in r_dpo.")
    chipo_clip: float = option(10.0, "Largest margin of chipo.", above=0)
    exo_beta_r: float = option(1.0, "Temperature of the dataset's scores in exo.", above=0)
    sync_ref_model: bool = option(False, "Move the reference towards the policy while training (TR-DPO).")
    ref_model_mixup_alpha: float = option(0.9, "The policy's share then.", least=0, most=1, needs="sync_ref_model")
    ref_model_sync_steps: int = option(64, "Move it every so many steps.", least=1, needs="sync_ref_model")

    # ---- optimization
    per_device_train_batch_size: int = option(8, "Pairs (or rankings) in one forward pass of one process.", least=1)
    gradient_accumulation_steps: int = option(1, "Forward and backward passes per optimizer step.", least=1)
    max_tokens_per_micro_batch: int | None = option(
        None,
        "Tokens in one forward pass of one process, padding counted: an optimizer step's rows are then cut by it, and "
        "not by their number. A row that has more is alone.",
        least=1,
    )
    num_train_epochs: float = option(3.0, "Passes over the training set; a fraction will do.", above=0)
    max_steps: int = option(
        -1, "Stop after so many optimizer steps, whatever num_train_epochs says; -1 for no limit.", least=-1
    )
    learning_rate: float = option(1e-6, "Peak learning rate.", least=0)
    lr_scheduler_type: str = option("linear", "A scheduler of transformers.", choices=SCHEDULES)
    lr_scheduler_kwargs: Json = option(None, "Its further arguments, as JSON.")
    warmup_ratio: float = option(0.0, "Share of all steps in which the learning rate rises from 0.", least=0, below=1)
    warmup_steps: int = option(0, "The same as a number of steps; it wins over warmup_ratio.", least=0)
    optim: str = option("adamw_torch", "The optimizer.", choices=f"{ADAMW} rmsprop adafactor sgd")
    weight_decay: float = option(0.0, "Weight decay, decoupled in AdamW; not on biases and norms.", least=0)
    adam_beta1: float = option(0.9, "Decay of Adam's mean of gradients.", least=0, below=1, needs=f"optim {ADAMW}")
    adam_beta2: float = option(0.999, "The same of squared gradients.", least=0, below=1, needs=f"optim {ADAMW}")
    adam_epsilon: float = option(1e-8, "Added to the root of that mean.", least=0, needs=f"optim {ADAMW}")
    max_grad_norm: float = option(1.0, "Longer gradients are scaled down to this norm; 0 for no limit.", least=0)
    bf16: bool = option(False, "Compute in bfloat16 (autocast); weights keep their dtype.")
    fp16: bool = option(False, "Compute in float16 (autocast) with a loss scaler.")
    tf32: bool | None = option(None, "Let float32 matrix products on the GPU round to TensorFloat-32.")
    torch_compile: bool = option(False, "Compile policy and reference with torch.compile.")
    torch_compile_backend: str | None = option(None, "Backend of torch.compile.", needs="torch_compile")
    torch_compile_mode: str | None = option(None, "Mode of torch.compile.", needs="torch_compile")

    # ---- evaluation, logging, saving
    output_dir: str = option("dpo-output", "Where everything that the run leaves goes.")
    overwrite_output_dir: bool = option(False, "Replace an earlier run's files in output_dir.")
    eval_strategy: str = option("no", "When to evaluate.", choices="no steps epoch")
    eval_steps: float | None = option(None, "By default logging_steps.", above=0, needs="eval_strategy steps")
    eval_on_start: bool = option(False, "Evaluate before the first step, too.")
    per_device_eval_batch_size: int = option(8, "Pairs in one of its passes.", least=1, needs=EVALUATES)
    generate_during_eval: bool = option(False, "At each evaluation sample answers of policy and reference, show both.")
    num_samples: int = option(8, "Prompts to answer, the first ones.", least=1, needs="generate_during_eval")
    max_new_tokens: int = option(128, "Longest sampled answer.", least=1, needs="generate_during_eval")
    sample_reward: str | None = option(None, "module:function(prompt, answer) -> float.", needs="generate_during_eval")
    logging_steps: float = option(10, "Steps between metrics rows; below 1 a share of all.", above=0)
    measure_utilisation: bool = option(
        False, "Measure the device's matrix rate at the start, for a second: each metrics row tells its useful share."
    )
    profile: bool = option(False, "Leave a torch.profiler trace of steps 3 to 5 of this start in output_dir/profile.")
    report_to: Words = option(None, "Where metrics go besides metrics.jsonl: tensorboard, wandb, trackio.")
    run_name: str | None = option(None, "Name of the run in trackers; by default output_dir's.", needs="report_to")
    disable_tqdm: bool = option(False, "No progress bar.")
    save_strategy: str = option("steps", "When to write checkpoints.", choices="no steps epoch")
    save_steps: float = option(
        500, "Every so many steps; below 1 a share of all.", above=0, needs="save_strategy steps"
    )
    save_total_limit: int | None = option(None, "Checkpoints to keep: the newest, and the best.", least=1, needs=SAVES)
    save_only_model: bool = option(False, "Checkpoints without optimizer state: not to be resumed from.", needs=SAVES)
    resume_from_checkpoint: str | None = option(
        None, "Go on from this checkpoint-N; true is the newest in output_dir, or the beginning where there is none."
    )
    load_best_model_at_end: bool = option(False, "Leave the best evaluated checkpoint's model, not the last.")
    metric_for_best_model: str | None = option(
        "eval_loss", "Metric that tells the best; with or without eval_.", needs="load_best_model_at_end"
    )
    greater_is_better: bool | None = option(
        None, "By default true unless the metric's name ends with loss.", needs="load_best_model_at_end"
    )

    # ---- machine
    seed: int = option(42, "Of new weights, dropout and, unless data_seed is set, the order of the data.", **SEED)
    data_seed: int | None = option(None, "Of the order of the data.", needs="shuffle", **SEED)
    full_determinism: bool = option(False, "Only deterministic kernels: runs repeat bit by bit on a GPU, slower.")
    use_cpu: bool = option(False, "Stay on the CPU, even where there is a GPU.")
    ddp_backend: str | None = option(None, "nccl or gloo; by default nccl on GPUs, gloo on CPUs.")
    ddp_timeout: int = option(1800, "Seconds after which a process that waits for another gives up.", least=1)
    ddp_find_unused_parameters: bool = option(False, "For models that leave some trained parameters out of a step.")
    fsdp: str | None = option(
        None,
        "Share parameters, gradients and optimizer state in shards among processes, in place of a copy in each.",
        choices="full_shard",
    )
    fsdp_offload: bool = option(False, "Keep the shards of GPUs in the host's memory.", needs="fsdp")
    fsdp_transformer_layer_cls_to_wrap: Words = option(
        None, "Classes of the blocks gathered at a time; by default as the model says.", needs="fsdp"
    )

    def __new__(cls, *args, **options):
        known = {each.name for each in dataclasses.fields(cls)}
        for name in options:
            if name not in known:
                raise UserError(_explain_unknown(name))
        return super().__new__(cls)

    def __post_init__(self):
        for each in dataclasses.fields(self):
            setattr(self, each.name, _typed(each.name, getattr(self, each.name), each.type))
        for name in ("eval_strategy", "save_strategy"):
            if getattr(self, name).lower() == "false":  # YAML reads a bare no as false
                setattr(self, name, "no")
        if isinstance(self.loss_type, list) and len(self.loss_type) == 1:
            self.loss_type = self.loss_type[0]
        if self.report_to == ["none"]:
            self.report_to = None
        if self.lora_target_modules == ["all-linear"]:
            self.lora_target_modules = "all-linear"
        for name in ("output_dir", "model_name_or_path", "ref_model_name_or_path", "ref_cache_dir"):
            if str(getattr(self, name)).startswith("~"):
                setattr(self, name, str(Path(getattr(self, name)).expanduser()))
        for name in KWARGS:
            setattr(self, name, getattr(self, name) or {})
        if str(self.resume_from_checkpoint).lower() == "false":
            self.resume_from_checkpoint = None
        words = (self.fsdp or "").replace(",", " ").split()  # as transformers has it
        self.fsdp = " ".join(word for word in words if word not in ("auto_wrap", "offload")) or None
        self.fsdp_offload = self.fsdp_offload or "offload" in words
        if self.padding_free and self.layout == "auto":
            self.layout = "padding_free"
        self.metric_for_best_model = f"eval_{(self.metric_for_best_model or 'loss').removeprefix('eval_')}"
        if self.greater_is_better is None and self.load_best_model_at_end:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")
        try:
            self._check()
        except ValueError as error:  # from check_loss, which does not know the command line
            raise UserError(str(error)) from error

    def _check(self) -> None:
        """Refuses values that have no meaning, alone and together, before anything is loaded."""
        loss = (self.loss_type, self.loss_weights, self.label_smoothing, self.f_divergence_type, self.reference_free)
        names = check_loss(*loss)
        for each in dataclasses.fields(self):
            name, value = each.name, getattr(self, each.name)
            belongs_to = takers(name) if name != "beta" else ()  # it scales the rewards of every loss
            choices, needs = each.metadata["choices"], each.metadata["needs"].split()
            if choices and value not in (*choices, each.default):
                raise ValueError(f"{name} is {value!r}: choose one of {', '.join(choices)}")
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float):
                    _check_bounds(name, number, **each.metadata["bounds"])
            if value == "":
                raise ValueError(f"{name} is empty: give it a value, or leave it out")
            if value in (each.default, {}):
                continue
            if needs and not (getattr(self, needs[0]) in needs[1:] if needs[1:] else getattr(self, needs[0])):
                needed = " ".join([needs[0], " or ".join(needs[1:])]).strip()
                raise ValueError(f"{name} does nothing without {needed}: add that, or leave it out")
            if belongs_to and not set(names) & set(belongs_to):
                listed = ", ".join(belongs_to)
                raise ValueError(f"{name} has no meaning for loss_type {', '.join(names)}: it belongs to {listed}")
        for conflict, words in self._conflicts(set(names)):
            if conflict:
                raise ValueError(words)

    def _conflicts(self, losses: set[str]) -> list[tuple[bool, str]]:
        """(whether it is so, what to do about it), of options that exclude or need each other."""
        listed, by_rank, sorts = ", ".join(losses), losses & set(OF_RANKINGS), losses & set(OVER_THE_BATCH)
        refers, other = losses & set(WITH_REFERENCE), self.ref_model_name_or_path is not None
        cached, streams = self.precompute_ref_log_probs, self.dataset_streaming
        named, needed = self.ref_adapter_name is not None, bool(refers) and not self.reference_free
        sync, no_eval, schedule = self.sync_ref_model, self.eval_strategy == "no", self.lr_scheduler_type
        evaluation = self.eval_on_start or self.generate_during_eval or self.eval_dataset_name
        unlike = self.eval_strategy != self.save_strategy
        ld, best = self.ld_alpha is not None, self.load_best_model_at_end
        warms_up, limits = self.warmup_steps or self.warmup_ratio, (self.max_length, self.max_prompt_length)
        eval_steps = self.eval_steps or self.logging_steps
        apart = self.eval_strategy == "steps" and min(eval_steps, self.save_steps) >= 1 and self.save_steps % eval_steps
        return [
            (self.bf16 and self.fp16, "bf16 and fp16 exclude each other: keep one"),
            (
                self.fsdp and self.ddp_find_unused_parameters,
                "ddp_find_unused_parameters is of DDP, fsdp finds them anyhow: leave it out",
            ),
            (self.fp16 and self.fsdp, "fp16 scales the gradients of whole models, not of fsdp's shards: take bf16"),
            (self.fp16 and self.dtype in ("float16", "bfloat16"), "fp16 needs float32 weights: leave out dtype"),
            (
                self.fsdp and self.optim not in ("adamw_torch", "adamw_torch_fused", "rmsprop", "sgd"),
                f"optim {self.optim} needs whole matrices, fsdp has shards: take adamw_torch, or leave out fsdp",
            ),
            (self.max_steps == 0, "max_steps is 0: it must be at least 1, or -1 for no limit"),
            (
                schedule == "constant" and warms_up,
                "lr_scheduler_type constant has no warm-up: constant_with_warmup has",
            ),
            (
                self.truncation_mode != "keep_end" and limits == (None, None),
                "truncation_mode does nothing without max_length or max_prompt_length: add one, or leave it out",
            ),
            (
                "torch_dtype" in self.model_init_kwargs | self.ref_model_init_kwargs,
                "torch_dtype in model_init_kwargs or ref_model_init_kwargs: write dtype",
            ),
            (
                self.save_only_model and self.resume_from_checkpoint,
                "save_only_model saves nothing to resume from: leave out one of it and resume_from_checkpoint",
            ),
            (streams and self.max_steps < 1, "dataset_streaming: nobody knows how many rows will come: set max_steps"),
            (
                streams and "epoch" in (self.eval_strategy, self.save_strategy),
                "dataset_streaming: nobody knows how long an epoch is: set eval_strategy and save_strategy to steps",
            ),
            (streams and cached, "dataset_streaming reads no row in advance: leave out precompute_ref_log_probs"),
            (streams and self.group_by_length, "dataset_streaming sorts no rows by length: leave out group_by_length"),
            (
                streams and self.dataloader_drop_last,
                "dataset_streaming takes rows as they come: leave out dataloader_drop_last",
            ),
            (
                streams and "[" in self.dataset_train_split,
                f"dataset_streaming reads no slice, as dataset_train_split {self.dataset_train_split} is: leave it out",
            ),
            (
                streams and not self.shuffle and self.shuffle_buffer != DPOConfig.shuffle_buffer,
                "shuffle_buffer does nothing without shuffle: leave it out",
            ),
            (best and apart, "load_best_model_at_end needs save_steps that are a multiple of eval_steps"),
            (
                self.padding_free and self.layout != "padding_free",
                f"padding_free and layout {self.layout} exclude each other: keep one",
            ),
            (self.load_in_4bit and self.load_in_8bit, "load_in_4bit and load_in_8bit exclude each other: keep one"),
            (
                self.load_in_8bit and self.use_dora,
                "use_dora needs the weights, load_in_8bit hides them: load_in_4bit will do",
            ),
            (
                self.init_lora_weights.startswith("pissa_niter"),
                "init_lora_weights pissa_niter_N draws random numbers whenever it is loaded: take pissa",
            ),
            (not refers and cached, f"loss_type {listed} has no reference: leave out precompute_ref_log_probs"),
            (self.reference_free and cached, "reference_free has nothing to score: leave out precompute_ref_log_probs"),
            (sync and cached, "sync_ref_model moves the reference: leave out precompute_ref_log_probs"),
            (named and other, "ref_adapter_name and ref_model_name_or_path are two references: keep one"),
            (named and not needed, "ref_adapter_name is a reference, and none is asked: leave it out"),
            (named and self.use_peft, "ref_adapter_name is of an adapter trained before: leave out use_peft"),
            (not refers and sync, f"loss_type {listed} has no reference: leave out sync_ref_model"),
            (not refers and other, f"loss_type {listed} has no reference: leave out ref_model_name_or_path"),
            (self.reference_free and other, "reference_free runs no reference: leave out ref_model_name_or_path"),
            (sync and self.reference_free, "sync_ref_model moves the reference: leave out reference_free"),
            (sync and other, "sync_ref_model moves the policy's own start: leave out ref_model_name_or_path"),
            (
                self.use_weighting and (by_rank or sorts),
                f"use_weighting weighs pairs, {listed} does not: leave one out",
            ),
            (ld and by_rank, f"ld_alpha compares the two of a pair, {listed} ranks more: leave one out"),
            (no_eval and evaluation, "eval_on_start, generate_during_eval and eval_dataset_name need an eval_strategy"),
            (best and (no_eval or unlike), "load_best_model_at_end needs eval_strategy and save_strategy set alike"),
            (schedule in ("reduce_lr_on_plateau", "greedy"), f"lr_scheduler_type {schedule} needs a metric: no use"),
        ]


def _check_bounds(name: str, value: float, *, least=-math.inf, most=math.inf, above=-math.inf, below=math.inf) -> None:
    for inside, words in (
        (math.isfinite(value), "a finite number"),
        (value >= least, f"at least {least}"),
        (value <= most, f"at most {most}"),
        (value > above, f"above {above}"),
        (below == math.inf or value < below, f"below {below}"),
    ):
        if not inside:
            raise ValueError(f"{name} is {value}: it must be {words}")


def _typed(name: str, value, hint):
    """A value as one of its option's types: in Python and in a file, too, the text "1e-5" is a number."""
    kinds = hint.__args__ if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    try:
        if dict in kinds and (isinstance(value, dict) or name.endswith("_kwargs") or str(value).startswith("{")):
            return value if isinstance(value, dict) else _parse_json(name, value)
        for kind in kinds:
            if isinstance(kind, types.GenericAlias) and (isinstance(value, list | tuple) or str not in kinds):
                items = value if isinstance(value, list | tuple) else [value]
                if not all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in items):
                    raise TypeError
                items = [word.strip() for item in items for word in str(item).split(",")]
                return [kind.__args__[0](item) for item in items if item]
        if str in kinds and isinstance(value, str | Path | int | float):
            return str(value).lower() if isinstance(value, bool) else str(value)
        if bool in kinds:
            return string_to_bool(value)
        if not isinstance(value, bool) and (float in kinds or float(value).is_integer()):
            return float(value) if float in kinds else int(float(value))
    except UserError:
        raise
    except (TypeError, ValueError, OverflowError, AttributeError, argparse.ArgumentTypeError):
        pass  # said below
    wanted = {bool: "true or false", int: "a whole number", float: "a number", dict: "an object", str: "text"}
    words = " or ".join(wanted.get(kind, "a list") for kind in kinds if kind is not type(None))
    raise UserError(f"{name} is {value!r}: it must be {words}")


def _parse_json(name: str, value) -> dict:
    try:
        parsed = json.loads(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON: {error}; write it like '{{\"key\": 1}}'") from error
    if not isinstance(parsed, dict):
        raise UserError(f"{name} must be a JSON object, like '{{\"key\": 1}}'")
    return parsed


# What TRL's configurations, 0.13 to 1.16, have and this one has not: the names, and what to do instead or why not.
LEFT_OUT = """
do_train do_eval do_predict prediction_loss_only past_index jit_mode_eval use_ipex mp_parameters ray_scope debug \
tpu_num_cores tpu_metrics_debug label_names use_legacy_prediction_loop torchdynamo include_inputs_for_metrics \
include_for_metrics eval_use_gather_object batch_eval_metrics logging_strategy eval_accumulation_steps eval_delay \
restore_callback_states_from_checkpoint skip_memory_metrics log_level half_precision_backend fp16_backend \
enable_jit_checkpoint ignore_bias_buffers \
fp16_opt_level accelerator_config dispatch_batches split_batches eval_do_concat_batches log_level_replica \
log_on_each_node torch_empty_cache_steps: it steers machinery of the Trainer class that a plain loop does not have
per_gpu_train_batch_size: use per_device_train_batch_size
per_gpu_eval_batch_size: use per_device_eval_batch_size
evaluation_strategy: use eval_strategy
torch_dtype: use dtype
label_smoothing_factor: use label_smoothing
adafactor: use optim adafactor
optim_args: choose one of the optimizers of optim, or pass optimizers=... to dpo.loop.train
optim_target_modules: use use_peft and lora_target_modules
lora_target_parameters lora_task_type: pass peft_config=peft.LoraConfig(...) to dpo.loop.train
bnb_4bit_quant_storage: bitsandbytes' own serves
activation_checkpointing activation_checkpointing_kwargs activation_offloading: use gradient_checkpointing
train_sampling_strategy: use shuffle and group_by_length
pad_token: use padding_value
pad_to_multiple_of use_cache: it changes no result
project trackio_space_id trackio_bucket_id trackio_static_space_id: trackers read their own environment variables
logging_dir: TensorBoard files go to output_dir/tensorboard
logging_first_step: the first step is always logged: its loss of ln 2 tells that all is well
logging_nan_inf_filter: a loss that is not finite stops the run
save_safetensors: models are always saved as safetensors
save_on_each_node: the first process writes; put output_dir on a shared disk
no_cuda use_mps_device: a GPU is taken where there is one; use_cpu stays on the CPU
bf16_full_eval fp16_full_eval: evaluation computes as training does, or the rewards would not compare
local_rank: torchrun says which process this is
remove_unused_columns length_column_name: extra columns are always ignored, and lengths are counted
dataloader_pin_memory: batches are pinned wherever there is a GPU
dataloader_persistent_workers: workers live for one epoch
ignore_data_skip: resuming takes up the order of the data at no cost
include_tokens_per_second include_num_input_tokens_seen: every metrics row has both
average_tokens_across_devices: the loss is always the mean over all pairs of all processes
auto_find_batch_size: lower per_device_train_batch_size and raise gradient_accumulation_steps: the same result
neftune_noise_alpha: noise in the embeddings would break the comparison with the reference
use_liger_kernel liger_kernel_config: only completion positions reach the head here, which that kernel would save
push_to_hub push_to_hub_model_id push_to_hub_organization push_to_hub_token hub_model_id hub_strategy hub_token \
hub_revision hub_private_repo hub_always_push: after the run: hf upload NAME OUTPUT_DIR
use_num_logits_to_keep: only completion positions ever reach the head
ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph dataloader_multiprocessing_context dataloader_in_order: \
PyTorch's defaults serve
fsdp_config: use fsdp, fsdp_offload and fsdp_transformer_layer_cls_to_wrap
fsdp_min_num_params: blocks are what is gathered at a time: fsdp_transformer_layer_cls_to_wrap names them
parallelism_config deepspeed: processes share a model by DDP, or in shards by fsdp
"""
LEFT_OUT = [line.split(": ", 1) for line in LEFT_OUT.strip().splitlines()]


def parse_args(argv: list[str]) -> DPOConfig:
    """The command line as a DPOConfig: `--config FILE.yaml` first, then what the options say.

    Without a model and a dataset it is the embedded example's configuration. In a file, paths of models and datasets
    that begin with ./ are relative to the file. Raises: UserError in one line, for a typo with a suggestion.
    """
    fields = dataclasses.fields(DPOConfig)
    plain = [(f.name, f.type, field(default=f.default, metadata={"help": f.metadata["help"]})) for f in fields]
    parser = HfArgumentParser(dataclasses.make_dataclass("Options", plain), allow_abbrev=False, exit_on_error=False)
    parser.prog = "dpo.loop"
    parser.add_argument("--config", help="YAML file with any of these options; the command line wins over it.")
    # A namespace that has every option already keeps argparse from filling in defaults: what was given remains.
    unset = object()
    namespace = argparse.Namespace(config=None, **{f.name: unset for f in fields})
    try:
        namespace, unknown = parser.parse_known_args(argv, namespace)
    except argparse.ArgumentError as error:
        raise UserError(str(error).replace("argument --", "--")) from error
    if unknown and not unknown[0].startswith("--"):
        raise UserError(f"cannot make sense of {unknown[0]!r}: options are written --name value")
    if unknown:
        raise UserError(_explain_unknown(unknown[0].split("=")[0]))
    given = {name: value for name, value in vars(namespace).items() if value is not unset}
    file = given.pop("config")
    if file is None and "model_name_or_path" not in given and "dataset_name" not in given:
        file = EXAMPLE
    return DPOConfig(**{**(read_config(Path(file)) if file else {}), **given})


def _explain_unknown(option: str) -> str:
    """Why there is no such option, as a line; option is a name, on the command line with its dashes."""
    name = option.lstrip("-").replace("-", "_")
    for left_out, reason in LEFT_OUT:
        if name in left_out.split():
            return f"there is no option {option} here: {reason}"
    close = difflib.get_close_matches(name, [f.name for f in dataclasses.fields(DPOConfig)], n=1)
    suggestion = f": did you mean {option[: len(option) - len(option.lstrip('-'))]}{close[0]}?" if close else ""
    return f"there is no option {option}{suggestion or '; --help lists them all'}"


def read_config(path: Path) -> dict:
    """The options of a YAML file. An option without a value has its default."""
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise UserError(f"--config {path} has an alias (*name): write the value out")  # they can nest without end
        node = yaml.compose(text)
        names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        if len(set(map(str, names))) < len(names):
            raise UserError(f"--config {path} has {max(names, key=names.count)} twice: keep one")
        values = yaml.safe_load(text) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path} is not UTF-8 (byte {error.start + 1}): save it as UTF-8") from error
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"--config {path} is nested too deeply: write lines of the form name: value") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # no YAML, or a date that there is not
        mark, problem = getattr(error, "problem_mark", None), str(getattr(error, "problem", error))
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"--config {path}{where}: not YAML: {' '.join(problem.split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold lines of the form name: value")
    known = {f.name for f in dataclasses.fields(DPOConfig)}
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"--config {path}: {_explain_unknown(name)}")
        if name.endswith(("_name_or_path", "dataset_name")):
            values[name] = _beside(path, value)
    return {name: value for name, value in values.items() if value is not None}


def _beside(file: Path, value):
    """A path of a file's that begins with ./ is relative to the file."""
    if isinstance(value, dict):
        return {key: _beside(file, each) for key, each in value.items()}
    return str(file.parent / value) if isinstance(value, str) and value.startswith("./") else value
