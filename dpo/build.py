"""Models, reference, optimizer and schedule, as the options want them; and what options mean together."""

import dataclasses
import inspect
import logging
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import get_scheduler

from dpo import adapters, checks, distributed, models
from dpo.batches import load_windows
from dpo.checkpoint import TrainingState
from dpo.collate import DataCollatorForPreference, decoder_start_ids
from dpo.config import DPOConfig, UserError
from dpo.conversations import sees, tokenizer_of
from dpo.data import read_images
from dpo.distributed import World
from dpo.losses import PARAMETERS, WITH_REFERENCE, dpo_loss
from dpo.reference import (
    CACHED,
    Reference,
    adapter_starts_at_zero,
    frozen_adapter,
    frozen_copy,
    precompute_ref_log_probs,
    read_cache,
    row_key,
    without_dropout,
)
from dpo.rows import first_line
from dpo.sharding import as_if_in_memory

logger = logging.getLogger("dpo")


def adapter_config(model, peft_config, *, args: DPOConfig):
    """The adapter to train: the caller's, that of the options, or None; checked against a model that is only named."""
    if args.use_peft:
        peft_config = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
        peft_config |= {"target_modules": args.lora_target_modules, "modules_to_save": args.lora_modules_to_save}
        peft_config |= {"use_dora": args.use_dora, "use_rslora": args.use_rslora}
        start = args.init_lora_weights
        peft_config["init_lora_weights"] = {"true": True, "false": False}.get(start.lower(), start)
    if peft_config is None or not isinstance(model, str):
        return peft_config
    hub = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    named = models.skeleton(model, **hub)
    return peft_config if named is None else adapters.check_adapter(named, peft_config)


def build_policy(model, peft_config, *, args: DPOConfig) -> torch.nn.Module:
    """The model that trains: the caller's, or loaded by its name; with its adapter, if it has one."""
    name, ref_name = adapters.adapter_key(args.model_adapter_name), adapters.adapter_key(args.ref_adapter_name)
    if isinstance(model, str):
        kwargs = {**how_to_load(args), "revision": args.model_revision, **args.model_init_kwargs}
        model = load(model, peft_config, adapter_name=name, args=args, **kwargs)
        if ref_name is not None:
            with as_if_in_memory(model):
                frozen_adapter(model, ref_name)
    else:
        model = models.keep_differentiable(distributed.bare(model))
        if broken := models.not_finite(model):
            raise UserError(f"the model is broken: the weights of {broken} are not all finite")
    if args.output_router_logits or args.router_aux_loss_coef is not None:
        router = {"output_router_logits": args.output_router_logits, "router_aux_loss_coef": args.router_aux_loss_coef}
        models.set_router(model, **router)
    models.freeze_what_is_not_saved(model)
    if args.disable_dropout:
        models.disable_dropout(model)
    if peft_config is not None:
        with as_if_in_memory(model):
            model = adapters.add_adapter(model, peft_config, name, args.model_revision)
    if name or ref_name:
        adapters.pick_adapter(model, name or getattr(model, "active_adapter", None), ref_name)
    checks.check_trainable(model, fp16=args.fp16)
    if args.gradient_checkpointing and not hasattr(model, "gradient_checkpointing_enable"):
        raise UserError(f"gradient_checkpointing: a {type(model).__name__} has none: leave it out")
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, **args.gradient_checkpointing_kwargs})
    return model


def load(name: str, peft_config=None, *, args: DPOConfig, **kwargs) -> torch.nn.Module:
    """A model by its name, which may get an adapter: whole; or, to be laid out in shards, without memory, where that
    can be."""
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    known = set(inspect.signature(models.load_empty).parameters)
    model = None
    if args.fsdp and kwargs.keys() <= known and not adapters.starts_from_base(peft_config):
        model = models.load_empty(name, **kwargs)
    if args.fsdp and model is None:
        logger.info("%s: each process loads all of it, in the host's memory, and keeps its share", name)
    return model or models.load_model(name, **kwargs)


def how_to_load(args: DPOConfig) -> dict:
    """from_pretrained's arguments, of policy and reference alike."""
    bits = {"load_in_4bit": args.load_in_4bit, "load_in_8bit": args.load_in_8bit, "dtype": args.dtype}
    bits = models.quantization(**bits, quant_type=args.bnb_4bit_quant_type, nested=args.use_bnb_nested_quant)
    own = {"dtype": args.dtype, "attn_implementation": args.attn_implementation}
    return {**own, "trust_remote_code": args.trust_remote_code, **bits}


def reads_apart(model, *, args: DPOConfig) -> bool:
    """Whether a model, or the one of a name, is an encoder-decoder: prompt and completion go into its two halves."""
    config = getattr(model, "config", None)
    if isinstance(model, str):
        hub = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
        config = models.read_config(model, **hub)
    own = getattr(config, "is_encoder_decoder", None)
    if own is not None and args.is_encoder_decoder not in (None, own):
        raise UserError(f"is_encoder_decoder is {args.is_encoder_decoder}, the model's configuration says {own}")
    return bool(own or args.is_encoder_decoder)


def reads(model, processing_class) -> str:
    """What a model reads, as the model card has it."""
    config = getattr(model, "config", None)
    if config is None:
        return "own"
    return "apart" if getattr(config, "is_encoder_decoder", False) else "pictures" if sees(processing_class) else "text"


def make_collator(processing_class, model, *, args: DPOConfig) -> DataCollatorForPreference:
    """The collator of the padded layout, which is exact for every model (see `trial.choose_layout`)."""
    tokenizer, start = tokenizer_of(processing_class), None
    padding_value = args.padding_value if args.padding_value is not None else tokenizer.pad_token_id or 0
    if reads_apart(model, args=args):
        start = decoder_start_ids(model)
    elif args.label_pad_token_id != DPOConfig.label_pad_token_id:
        raise UserError("label_pad_token_id does nothing without an encoder-decoder: leave it out")
    read = partial(read_images, processing_class=processing_class) if sees(processing_class) else None
    return DataCollatorForPreference(padding_value, "padded", read, start, args.label_pad_token_id)


def in_shards(args: DPOConfig) -> dict | None:
    """How `sharding.shard` lays out policy and reference; None where each process holds all of them."""
    if args.fsdp is None:
        return None
    return {"block_names": args.fsdp_transformer_layer_cls_to_wrap, "offload": args.fsdp_offload}


def compile_models(model, ref_model, *, args: DPOConfig) -> None:
    options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
    options = {key: value for key, value in options.items() if value is not None}
    for each in {model, ref_model} - {None} if args.torch_compile else ():  # which may be one and the same
        each.compile(**options)


def build_reference(policy, ref_model, columns: list[str], *, args: DPOConfig) -> tuple[Reference, bool]:
    """What the policy is compared with, and whether the two must agree before the first step. columns, of the rows:
    they may bring the reference's log-probabilities."""
    common, own = {"policy": policy, "ld_alpha": args.ld_alpha}, isinstance(policy, PeftModel)
    common["logits_budget"] = args.logits_budget
    if args.sync_ref_model:
        common |= {"sync_steps": args.ref_model_sync_steps, "mixup_alpha": args.ref_model_mixup_alpha}
    ref_model = args.ref_model_name_or_path if ref_model is None else ref_model
    if not needs_reference(args):
        return Reference(**common, kind="none", exists=False), False
    if CACHED[0] in columns:
        if ref_model is not None:
            raise UserError(f"the column {CACHED[0]} is the reference: leave out ref_model, or the columns")
        return Reference(**common, kind=f"the columns {CACHED[0]} and {CACHED[1]}", is_cached=True), False
    if args.force_use_ref_model and (not own or ref_model is None):
        raise UserError("force_use_ref_model is for a model with an adapter that has a ref_model, too: leave it out")
    if own and ref_model is not None and not args.force_use_ref_model:
        raise UserError("a model with an adapter is its own reference: leave out ref_model, or add force_use_ref_model")
    if ref_model is not None:
        if isinstance(ref_model, str):
            ref_model = load(ref_model, args=args, **{**how_to_load(args), **args.ref_model_init_kwargs})
        if reads_apart(ref_model, args=args) != reads_apart(policy, args=args):
            raise UserError("of policy and reference one is an encoder-decoder, the other is not: take two of a kind")
        ref_model = without_dropout(models.keep_differentiable(ref_model)).requires_grad_(False)
        return Reference(**common, ref_model=ref_model, kind="another model"), False
    # An adapter keeps its own dropout, which shows wherever its B is not 0: as it is not in a reference.
    is_noisy = adapters.drops_out(policy)
    if args.ref_adapter_name is not None:
        name = adapters.adapter_key(args.ref_adapter_name)
        reference = Reference(**common, ref_adapter_name=name, kind=f"the adapter {args.ref_adapter_name}")
        are_equal = all(torch.equal(trained, own) for trained, own in reference.pairs().values())
        return reference, args.disable_dropout and are_equal and not is_noisy
    if own and adapter_starts_at_zero(policy) and not args.sync_ref_model:
        return Reference(**common, kind="the policy with its adapter off"), args.disable_dropout
    must_agree = args.disable_dropout and not is_noisy
    if args.precompute_ref_log_probs:
        return Reference(**common, ref_model=policy, kind="the policy before it trains"), must_agree
    if own and getattr(policy.peft_config[policy.active_adapter], "bias", "none") == "none":
        with as_if_in_memory(policy):
            return Reference(**common, ref_adapter_name=frozen_adapter(policy), kind="a frozen adapter"), must_agree
    return Reference(**common, ref_model=frozen_copy(policy), kind="a frozen copy of the policy"), must_agree


def with_reference(
    rows: datasets.Dataset,
    windows: list,
    directory: Path,
    reference: Reference,
    collator,
    world: World,
    *,
    args: DPOConfig,
) -> datasets.Dataset:
    """Rows with the columns ref_chosen_logps and ref_rejected_logps, of the cache in directory and what it lacked,
    worked out in the batches of windows."""
    told = [name for name in rows.column_names if name.endswith("_input_ids") or name in ("scored", "pictures")]
    keys = [row_key(row) for row in rows.select_columns(told)]  # no picture is opened
    known = distributed.by_first(lambda: read_cache(directory, keys), world)
    missing = {key: number for number, key in enumerate(keys) if key not in known}.values()
    missing, found = set(missing), sum(key in known for key in keys)
    logger.info("%s: log π_ref of %d rows found, %d to be worked out", directory, found, len(rows) - found)
    if missing:
        micros = [[[i for i in own if i in missing] for own in micro] for window in windows for micro in window]
        windows = [[micro] for micro in micros if any(micro)]
        loader = load_windows(rows, windows, world, collator, num_workers=args.dataloader_num_workers)
        disable = args.disable_tqdm or world.rank > 0
        bar = tqdm(loader, "Reference", total=len(windows), disable=disable)
        batches = (batch for _, (batch,) in bar)
        with autocast(args, world):
            own = precompute_ref_log_probs(reference, keys, batches, directory)
        known |= dict(distributed.gather_lists(list(own.items()), world))
    logps = [known[key] for key in keys]
    several = isinstance(rows[0]["rejected_input_ids"][0], list)
    rejected = [each[1:] if several else each[1] for each in logps]
    kinds = pa.float32(), pa.list_(pa.float32()) if several else pa.float32()
    for name, values, kind in zip(CACHED, ([each[0] for each in logps], rejected), kinds, strict=True):
        rows = rows.add_column(name, pa.array(values, kind))
    return rows


def make_optimizers(model: torch.nn.Module, optimizers: tuple, total_steps: int, *, args: DPOConfig) -> tuple:
    """(optimizer, learning-rate scheduler): the caller's, or those of the options."""
    optimizer, scheduler = optimizers
    if optimizer is None:
        adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        rates = {"learning_rate": args.learning_rate, "weight_decay": args.weight_decay}
        optimizer = models.make_optimizer(model, name=args.optim, **rates, **adam)
    taken = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if left := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in taken]:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise UserError(f"the optimizer has not {left[0]}{more}, which train: make it of the model's own parameters")
    if scheduler is None:
        warmup = args.warmup_steps or math.ceil(args.warmup_ratio * total_steps)
        kwargs = dict(args.lr_scheduler_kwargs)
        scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, total_steps, kwargs)
        check_rates(scheduler, warmup, total_steps, args=args)
    return optimizer, scheduler


def check_schedule(args: DPOConfig) -> None:
    """Tries the learning-rate schedule on a parameter of its own: its arguments may be missing, unknown or wrong."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, dict(args.lr_scheduler_kwargs)).get_last_lr()
    except Exception as error:
        raise UserError(f"{schedule_in_words(args)}: {first_line(error)}") from error


def schedule_in_words(args: DPOConfig) -> str:
    return f"lr_scheduler_type {args.lr_scheduler_type} with lr_scheduler_kwargs {args.lr_scheduler_kwargs}"


def check_rates(scheduler, warmup: int, total_steps: int, *, args: DPOConfig) -> None:
    """Refuses a schedule that fails, or comes to no learning rate worth the name, in one of its steps."""
    what = schedule_in_words(args)
    steps = {*range(min(total_steps, 1000)), total_steps - 1, total_steps}  # it moves on after the last one, too
    try:
        shares = [f(step) for f in scheduler.lr_lambdas for step in steps]
    except Exception as error:
        raise UserError(f"{what}: {first_line(error)} at one of the steps") from error
    if not (all(isinstance(share, int | float) and math.isfinite(share) for share in shares) and max(shares) > 0):
        raise UserError(f"{what}: no learning rate in {total_steps} steps: change the schedule, or train longer")
    if warmup + args.lr_scheduler_kwargs.get("num_decay_steps", 0) > total_steps:
        raise UserError(f"{what}: warm-up and decay are longer than the {total_steps} steps of the run")


def autocast(args: DPOConfig, world: World):
    """Mixed precision for policy and reference alike, in training, evaluation and sampling."""
    if not (args.bf16 or args.fp16):
        return nullcontext()
    return torch.autocast(world.device.type, dtype=torch.bfloat16 if args.bf16 else torch.float16)


def loss_names(args: DPOConfig) -> list[str]:
    return [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type


def needs_reference(args: DPOConfig) -> bool:
    return not args.reference_free and bool(set(loss_names(args)) & set(WITH_REFERENCE))


def forward_options(args: DPOConfig) -> dict:
    """The options that the policy's `concatenated_forward` has."""
    return {name: getattr(args, name) for name in ("ld_alpha", "use_weighting", "logits_budget")}


def loss_options(args: DPOConfig, state: TrainingState) -> dict:
    """The options that dpo_loss, or one of the chosen losses, has as parameters."""
    wanted = set(inspect.signature(dpo_loss).parameters).union(*(PARAMETERS[name] for name in loss_names(args)))
    options = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name in wanted}
    return options | ({"bco_delta": state.bco_delta} if "bco_delta" in wanted else {})
