"""Arguments and configuration become a Run: checked, with its data, and what build.py makes; and its place on disk."""

import dataclasses
import datetime
import hashlib
import inspect
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import torch
from huggingface_hub.constants import HF_HOME
from peft import PeftConfig, PeftModel
from tqdm.auto import tqdm
from transformers import set_seed

from dpo import adapters, checkpoint, checks, costs, distributed, files, models, report, sampling, trial
from dpo.batches import epoch_windows
from dpo.build import (
    adapter_config,
    build_policy,
    build_reference,
    check_schedule,
    compile_models,
    in_shards,
    loss_names,
    make_collator,
    make_optimizers,
    needs_reference,
    reads_apart,
    with_reference,
)
from dpo.checkpoint import TrainingState
from dpo.collate import NUMBERS, decoder_start_ids
from dpo.config import DPOConfig, UserError
from dpo.conversations import sees, tokenizer_of
from dpo.data import fingerprint, has_prompts, largest_id, largest_length, part_lengths, prepare_dataset, row_options
from dpo.distributed import World
from dpo.losses import OF_RANKINGS, OVER_THE_BATCH, PARAMETERS, takers
from dpo.reference import CACHED, Reference, reference_digest, without_dropout
from dpo.rows import first_line
from dpo.sources import load_preferences
from dpo.stream import SAMPLE, START, Stream, collated, first_rows, load_stream

# Another value of any of these makes another run, which cannot go on from a checkpoint.
EXACT_OPTIONS = """dtype attn_implementation tf32 torch_compile per_device_train_batch_size max_tokens_per_micro_batch
gradient_accumulation_steps shuffle group_by_length dataloader_drop_last seed data_seed disable_dropout learning_rate
dataset_streaming shuffle_buffer
lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps optim weight_decay adam_beta1 adam_beta2 adam_epsilon
max_grad_norm bf16 fp16 loss_type loss_weights beta label_smoothing f_divergence_type f_alpha_divergence_coef
reference_free rpo_alpha use_weighting ld_alpha discopop_tau simpo_gamma orpo_lambda cpo_alpha dpop_lambda r_dpo_alpha
chipo_clip exo_beta_r sync_ref_model ref_model_mixup_alpha ref_model_sync_steps load_in_4bit load_in_8bit
bnb_4bit_quant_type use_bnb_nested_quant ref_adapter_name precompute_ref_log_probs output_router_logits
router_aux_loss_coef"""
# What a caller may give to `train`, and the options that then do nothing.
INSTEAD = {
    "model": "dtype attn_implementation model_revision model_init_kwargs load_in_4bit load_in_8bit",
    "ref_model": "ref_model_name_or_path ref_adapter_name",
    "train_dataset": "dataset_name",
    "peft_config": "use_peft",
    "data_collator": "layout padding_value",
    "an optimizer": "optim learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon",
    "a scheduler": "lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps",
}
NOT_OF_ADAPTERS = "base_model_name_or_path revision inference_mode auto_mapping peft_version"  # all else matters
logger = logging.getLogger("dpo")


@dataclass
class Run:
    """A training run, ready to step; and what `train` returns. `prepare` fills it, from the top to the bottom."""

    args: DPOConfig
    world: World
    output_dir: Path
    compute_metrics: Callable | None = None
    reward: Callable | None = None  # rates sampled answers
    sources: dict[str, str] | None = None  # names of model and datasets, for config.yaml and the model card
    processing_class: object = None
    today: str = field(default_factory=lambda: datetime.date.today().isoformat())  # for templates that write the date
    train_rows: datasets.Dataset | None = None  # of a stream the first ones
    stream: Stream | None = None
    eval_sets: dict[str, datasets.Dataset] | None = None  # by name; that of a single one is empty
    collator: Callable | None = None
    model: torch.nn.Module | None = None  # the policy, as it is saved and sampled from
    policy: torch.nn.Module | None = None  # the same, as it is laid out over the processes
    reference: Reference | None = None
    starts_equal: bool = False  # whether policy and reference must agree before the first step
    pairs_per_step: int = 0  # of all processes
    steps_per_epoch: int = 0
    total_steps: int = 0
    optimizer: torch.optim.Optimizer | None = None
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    scaler: torch.amp.GradScaler | None = None
    state: TrainingState = field(default_factory=TrainingState)
    same_run: dict | None = None  # what a run must share with this one to go on from its checkpoints
    tried: list[torch.nn.Module] = field(default_factory=list)  # in shards, what finds out about layouts
    layout: str = ""  # of the batches, in words
    answers_alone: bool = False  # whether the model must not be asked several prompts at once
    prices: list[dict] = field(default_factory=list)  # of FLOPs, of policy and reference, where they are counted
    matrix_rate: float = 0.0  # FLOPs a second of the device, if it was asked for
    memory: dict[str, float] = field(default_factory=dict)  # bytes: its parts and peak predicted, and as measured
    memory_base: float | None = None  # see `costs.begin_measuring`
    profile: torch.profiler.profile | None = None
    signals: list[int] = field(default_factory=list)  # that told the run to stop
    saving: checkpoint.Saving | None = None  # the checkpoint that is being written
    lock: object = None  # the open file that keeps other runs out of output_dir
    bar: tqdm | None = None
    rows: list[dict] = field(default_factory=list)  # all metrics rows
    receivers: list[Callable] = field(default_factory=list)  # of each new one
    tables: list[Callable] = field(default_factory=list)  # of trackers, for sampled answers


def prepare(
    model,
    ref_model,
    args: DPOConfig | None,
    train_dataset,
    eval_dataset,
    processing_class,
    data_collator,
    peft_config,
    callbacks,
    optimizers,
    compute_metrics,
    model_init,
) -> Run:
    """The Run that the arguments of `dpo.loop.train` ask for; it goes on from a checkpoint where args say so.

    Raises: UserError in one line for what cannot be done, before an earlier run's files in output_dir are touched.
    """
    if args is not None and not isinstance(args, DPOConfig):
        raise UserError(f"args is a {type(args).__name__}: pass a dpo.config.DPOConfig")
    kinds = datasets.IterableDataset | datasets.IterableDatasetDict
    streams = {"dataset_streaming": True} if isinstance(train_dataset, kinds) else {}
    args = dataclasses.replace(args or DPOConfig(), **streams)  # checked once more: an option may have been set since
    with user_errors():
        how = {"use_cpu": args.use_cpu, "backend": args.ddp_backend, "timeout": args.ddp_timeout}
        world = distributed.setup(**how, shards=args.fsdp is not None)
        logger.setLevel(logging.INFO if world.rank == 0 else logging.ERROR)
        run = Run(args, world, Path(args.output_dir), compute_metrics)
        check_machine(world, args=args)
        check_schedule(args)
        run.reward, trackers = sampling.load_reward(args.sample_reward), report.import_trackers(args.report_to)
        set_seed(args.seed, deterministic=args.full_determinism)
        if args.tf32 is not None:
            torch.set_float32_matmul_precision("high" if args.tf32 else "highest")

        if model is not None and model_init is not None:
            raise UserError("model_init does nothing beside model: leave one of them out")
        if model is None:
            model = model_init() if model_init else args.model_name_or_path
        model = str(model) if isinstance(model, Path) else model
        name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
        sources = {"model_name_or_path": name, "eval_dataset_name": eval_dataset}
        sources["dataset_name"] = args.dataset_name if train_dataset is None else train_dataset
        run.sources = {key: value for key, value in sources.items() if value and isinstance(value, str)}
        given = (train_dataset, peft_config, optimizers, processing_class or name, data_collator, callbacks)
        check_arguments(model, ref_model, *given, compute_metrics, args=args)
        peft_config = adapter_config(model, peft_config, args=args)
        resume = claim_output(run, ref_model)
        run.pairs_per_step = pairs_per_step(run, resume)
        hub = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
        run.processing_class = processing_class or models.load_processor(name, **hub)
        run.today = distributed.from_first(run.today, world)
        run.today = (checkpoint.read_state(resume)["same_run"].get("today") if resume else None) or run.today
        run.train_rows, run.eval_sets = prepare_data(run, model, train_dataset, eval_dataset)
        report.show_rows(run.train_rows, run.processing_class, args.show_rows)
        if resume:
            checkpoint.check_same_run(resume, what_options_matter(run))

        # Models are built, then laid out over the processes, then given an optimizer.
        run.model = build_policy(model, peft_config, args=args)
        run.collator = data_collator or make_collator(run.processing_class, run.model, args=args)
        run.reference, run.starts_equal = build_reference(run.model, ref_model, run.train_rows.column_names, args=args)
        compile_models(run.model, run.reference.ref_model, args=args)
        sets, apart = [run.train_rows, *run.eval_sets.values()], reads_apart(run.model, args=args)
        largest = max(getattr(run.collator, "pad_token_id", 0), *map(largest_id, sets))
        longest = max(largest_length(rows) if apart else max(rows["length"][:]) for rows in sets)
        check_fit(run, largest=largest, longest=longest)
        if run.stream:
            run.stream = dataclasses.replace(run.stream, largest=largest, longest=longest, apart=apart)
        set_seed(args.seed + world.rank, deterministic=args.full_determinism)  # each process its own dropout
        unused = args.ddp_find_unused_parameters or sees(run.processing_class)  # a batch may have no picture
        shards = in_shards(args)
        run.tried = trial.sides_in_float32(run) if shards else []
        run.policy = distributed.lay_out(run.model, world, trains=True, find_unused_parameters=unused, shards=shards)
        if run.reference.ref_model not in (None, run.model):
            ref_model = distributed.lay_out(run.reference.ref_model, world, trains=False, shards=shards)
            run.reference.ref_model = ref_model
        trial.check_reading(run)
        run.layout = trial.choose_layout(run, collator_is_given=data_collator is not None)
        trial.choose_head(run)
        run.tried = []
        if args.precompute_ref_log_probs:
            precompute_reference(run)
        windows = plan_epoch(run)
        run.steps_per_epoch, epochs = len(windows), args.num_train_epochs
        if run.stream:  # nobody knows
            run.steps_per_epoch = args.max_steps
        run.total_steps = args.max_steps if args.max_steps > 0 else math.ceil(epochs * run.steps_per_epoch)
        run.optimizer, run.scheduler = make_optimizers(run.model, optimizers, run.total_steps, args=args)
        run.scaler = torch.amp.GradScaler(world.device.type, enabled=args.fp16)
        run.same_run = what_matters(run)
        if resume:
            checkpoint.load_checkpoint(resume, world, **checkpointed(run))
            if run.state.step >= run.total_steps:
                logger.info("%s: all %d steps are done: finished already", run.output_dir, run.total_steps)
        trial.foresee(run, windows)
        distributed.by_first(lambda: open_outputs(run, trackers, callbacks or [], resume), world)
        if args.profile:
            run.profile = costs.start_profile(run.output_dir / "profile", world.rank)
        disable = args.disable_tqdm or world.rank > 0
        run.bar = tqdm(total=run.total_steps, initial=run.state.step, desc="DPO", disable=disable)
    return run


def check_fit(run: Run, *, largest: int, longest: int) -> None:
    """Refuses token ids up to largest, or so many tokens, that the policy or its reference cannot take."""
    if reads_apart(run.model, args=run.args):  # neither half reads all
        longest += len(decoder_start_ids(run.model)) - 1
    for each in (run.model, run.reference.ref_model):
        if each is not None:
            checks.check_rows_fit(each, largest=largest, longest=longest)


@contextmanager
def user_errors():
    """Inside, a ValueError is taken to be about what the user gave: it becomes the cause of a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(first_line(error)) from error


def check_machine(world: World, *, args: DPOConfig) -> None:
    """Refuses options that do nothing, or cannot be had, where the run finds itself."""
    if world.size == 1:
        for option in ("ddp_backend", "ddp_timeout", "ddp_find_unused_parameters"):
            if getattr(args, option) != getattr(DPOConfig, option):
                raise UserError(f"{option} does nothing in a single process: leave it out, or start more of them")
    if args.fsdp_offload and world.device.type == "cpu":
        raise UserError("fsdp_offload does nothing on a CPU, where shards are in the host's memory: leave it out")
    known = torch.compiler.list_backends(exclude_tags=()) if args.torch_compile_backend else []
    if args.torch_compile_backend and args.torch_compile_backend not in known:
        raise UserError(f"torch_compile_backend {args.torch_compile_backend!r}: choose one of {', '.join(known)}")
    modes = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
    if args.torch_compile_mode not in (None, *modes):
        raise UserError(f"torch_compile_mode {args.torch_compile_mode!r}: choose one of {', '.join(modes)}")
    known = inspect.signature(torch.utils.checkpoint.checkpoint).parameters
    for key in args.gradient_checkpointing_kwargs:
        if key not in known or key in ("function", "args", "kwargs"):
            raise UserError(f"gradient_checkpointing_kwargs has {key!r}, which torch.utils.checkpoint does not know")


def check_arguments(
    model,
    ref_model,
    train_dataset,
    peft_config,
    optimizers,
    tokenizer_source,
    data_collator,
    callbacks,
    compute_metrics,
    *,
    args: DPOConfig,
) -> None:
    """Refuses arguments of `train` that contradict each other, before anything is loaded."""
    if model is None:
        raise UserError("there is no model: set model_name_or_path")
    check_kinds(model, ref_model, peft_config, optimizers, data_collator, callbacks, compute_metrics)
    if compute_metrics is not None and args.eval_strategy == "no":
        raise UserError("compute_metrics does nothing without an eval_strategy: set it to steps or epoch")
    if not tokenizer_source:
        raise UserError("a model that was not loaded from a name or path needs a processing_class, its tokenizer")
    objects = {"model": not isinstance(model, str), "peft_config": peft_config is not None}
    objects |= {"train_dataset": train_dataset is not None, "data_collator": data_collator is not None}
    objects |= {"an optimizer": optimizers[0] is not None, "a scheduler": optimizers[1] is not None}
    objects["ref_model"] = ref_model is not None
    default = DPOConfig()
    for name, options in INSTEAD.items():
        for option in options.split():
            if objects[name] and getattr(args, option) != getattr(default, option):
                raise UserError(f"{option} does nothing beside {name}, which train was given: leave one of them out")
    need_it = [o for o in ("load_in_4bit", "load_in_8bit", "merge_adapter", "ref_adapter_name") if getattr(args, o)]
    is_new = peft_config is not None or args.use_peft
    if need_it and isinstance(model, str) and not is_new and adapters.adapter_base(model, args.model_revision) is None:
        raise UserError(f"{need_it[0]} needs an adapter, and {model} is none: add use_peft, or leave it out")
    if args.sync_ref_model and ref_model is not None:
        raise UserError("sync_ref_model moves the policy's own start: leave out ref_model")
    if args.merge_adapter and not isinstance(model, str):
        raise UserError("merge_adapter loads the base by its name: name the model, or call merge_and_unload on it")
    if ref_model is model and not isinstance(model, str):
        raise UserError("ref_model is the model itself, which will train: leave it out, or pass a copy")
    if ref_model is not None and not needs_reference(args):
        raise UserError(f"loss_type {args.loss_type} and reference_free have no use for a ref_model: leave it out")
    if optimizers[1] is not None and optimizers[0] is None:
        raise UserError("optimizers has a scheduler without its optimizer: pass both, or the optimizer alone")
    if args.ref_model_init_kwargs and not isinstance(ref_model or args.ref_model_name_or_path, str):
        raise UserError("ref_model_init_kwargs does nothing without a reference to load by name: leave it out")


def check_kinds(model, ref_model, peft_config, optimizers, data_collator, callbacks, compute_metrics) -> None:
    """Refuses arguments of `train` that are not what they should be."""
    for name, value, kinds, words in (
        ("model", model, str | torch.nn.Module, "a name, a path or a model"),
        ("ref_model", ref_model, str | torch.nn.Module | None, "a name, a path or a model"),
        (
            "peft_config",
            peft_config,
            PeftConfig | dict | None,
            "a peft.PeftConfig, or a dict of LoraConfig's arguments",
        ),
        ("data_collator", data_collator, Callable | None, "a function of a list of rows"),
        ("compute_metrics", compute_metrics, Callable | None, "a function of an EvalPrediction"),
        ("callbacks", callbacks, list | tuple | None, "a list of functions of a metrics row"),
        ("optimizers", optimizers, tuple | list, "a tuple (optimizer, scheduler)"),
    ):
        if not isinstance(value, kinds):
            raise UserError(f"{name} is {type(value).__name__}: it must be {words}")
    for callback in callbacks or ():
        if not callable(callback):
            what = f"callbacks are functions of a metrics row, not {type(callback).__name__}"
            raise UserError(f"{what}: pass lambda row: ...")
    if len(optimizers) != 2:
        raise UserError(f"optimizers has {len(optimizers)} parts: it must be a tuple (optimizer, scheduler)")
    optimizer, scheduler = optimizers
    if not isinstance(optimizer, torch.optim.Optimizer | None) or isinstance(optimizer, torch.optim.LBFGS):
        raise UserError(f"optimizers has a {type(optimizer).__name__}: it must be one of one gradient a step, as AdamW")
    one_value = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    if one_value or not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler | None):
        raise UserError(f"optimizers has a {type(scheduler).__name__}: it must be an LRScheduler without a metric")


# ----------------------------------------------------------------------------------------------------------------- data


def prepare_data(run: Run, model, train_dataset, eval_dataset) -> tuple[datasets.Dataset, dict[str, datasets.Dataset]]:
    """Tokenised training rows, and {name: tokenised rows} to evaluate on; the name of a single set is empty."""
    args, subset = run.args, None
    source = args.dataset_name if train_dataset is None else train_dataset
    if source is None:
        raise UserError("there is no training set: set dataset_name")
    apart = reads_apart(model, args=args)
    streams = args.dataset_streaming
    train_rows = prepare_rows(run, source, args.dataset_train_split, args.dataset_config, apart, streams=streams)
    if args.eval_strategy == "no":
        if eval_dataset is not None:
            raise UserError("eval_dataset does nothing without an eval_strategy: set it to steps or epoch")
        return train_rows, {}
    eval_dataset = args.eval_dataset_name if eval_dataset is None else eval_dataset
    if eval_dataset is None:
        if not isinstance(source, str) or Path(source).is_file():
            raise UserError("eval_strategy needs something to evaluate on: set eval_dataset_name, or it to no")
        eval_dataset, subset = source, args.dataset_config
    sets = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    if not sets:
        raise UserError("eval_dataset is empty: name a set to evaluate on")
    best = args.metric_for_best_model
    of_pairs = [name for name in report.METRICS if name.startswith(("loss", "rewards/", "logps/"))]
    known = [f"eval_{label}_{name}" if label else f"eval_{name}" for label in sets for name in of_pairs]
    unknown = best not in known and "loss/" not in best and not best.startswith("eval_samples/")
    if args.load_best_model_at_end and run.compute_metrics is None and unknown:
        raise UserError(f"metric_for_best_model {best!r} is not evaluated: choose among {', '.join(known)}")
    eval_sets = {name: prepare_rows(run, each, args.dataset_test_split, subset, apart) for name, each in sets.items()}
    for column in ("scores", *CACHED):
        if any((column in rows.column_names) != (column in train_rows.column_names) for rows in eval_sets.values()):
            raise UserError(f"of the training and the evaluation set one has {column}: give them to both, or none")
    return train_rows, eval_sets


def prepare_rows(
    run: Run, source, split: str, subset: str | None, apart: bool, *, streams: bool = False
) -> datasets.Dataset:
    """One dataset, tokenised, with its columns margin, weight and scores where there are any that the losses take;
    apart, for an encoder-decoder. If it streams, its first rows; run.stream then brings them all."""
    args, names, take_scores = run.args, set(loss_names(run.args)), set(takers("scores"))
    window = run.pairs_per_step
    # A name's test split, too, which is to be had without the whole of the others only as a stream.
    is_stream = streams or args.dataset_streaming and source == args.dataset_name and "[" not in split
    parts = streamed = load_preferences(source, split=split, subset=subset, streams=is_stream)
    if is_stream:
        parts = first_rows(streamed, max(SAMPLE, 4 * window) if streams else sys.maxsize)
    options = {
        "max_prompt_length": args.max_prompt_length,
        "max_completion_length": args.max_completion_length,
        "max_length": args.max_length,
        "truncation_mode": args.truncation_mode,
        "ranked": bool(names & set(OF_RANKINGS)),
        "read_scores": bool(names & take_scores),
        "allow_ties": bool(names & take_scores) and names & set(OF_RANKINGS) <= take_scores,
        "chat_template_kwargs": args.chat_template_kwargs or None,
        "today": run.today,
        "add_special_tokens": apart,
        "read_reference": needs_reference(args),
        "read_margin": any("margins" in PARAMETERS[name] for name in names),
    }
    with distributed.first_process_first(run.world):
        common = {"skip_bad_rows": args.skip_bad_rows, "num_proc": args.dataset_num_proc}
        rows = prepare_dataset(parts, run.processing_class, **options, **common)
    if streams:
        if len(set(distributed.gather_lists([fingerprint(rows)], run.world))) > 1:
            raise UserError("the processes read different rows: give each of them the whole stream, it is split here")
        seed = args.seed if args.data_seed is None else args.data_seed
        numbers = ["margin"] * options["read_margin"] + ["weight"] + list(CACHED) * options["read_reference"]
        run.stream = Stream(
            streamed,
            window=window,
            block=args.shuffle_buffer if args.shuffle else window,
            seed=seed if args.shuffle else None,
            options=row_options(parts, run.processing_class, **options),
            columns=rows.column_names,
            prompts={name: has_prompts(part) for name, part in parts.items()},
            numbers=numbers,
            skip_bad_rows=args.skip_bad_rows,
        )
    where, scored = ", ".join(parts), "scores" in rows.column_names
    for column, parameter in NUMBERS.items():
        wanting = {name for name in names if (p := PARAMETERS[name].get(parameter)) and p.default is p.empty}
        if wanting and column not in rows.column_names:
            raise UserError(f"{where}: loss_type {min(wanting)} needs a number for each pair: add a column {column}")
    if CACHED[0] in rows.column_names:
        for option in (
            "precompute_ref_log_probs",
            "sync_ref_model",
            "ref_model_name_or_path",
            "ref_adapter_name",
            "ld_alpha",
        ):
            if getattr(args, option) not in (None, False):
                raise UserError(f"{where}: the column {CACHED[0]} is the reference: leave out {option}, or the columns")
    if "weight" in rows.column_names and names & set(OVER_THE_BATCH):
        raise UserError(f"{where}: {args.loss_type} sorts the batch, weights are of pairs: leave out the column")
    if "weight" in rows.column_names and not any(rows["weight"][:]):
        raise UserError(f"{where}: all numbers of the column weight are 0, nothing would be learnt: leave it out")
    if args.exo_beta_r != DPOConfig.exo_beta_r and not scored:
        raise UserError(f"{where}: exo_beta_r does nothing without scores: leave it out, or add a column scores")
    if args.label_smoothing and scored:
        raise UserError(f"{where}: label_smoothing does nothing where rows have scores for exo: leave it out")
    return rows


def tokens_read(run: Run) -> Callable[[list[tuple[int, list[int]]]], int]:
    """The function that counts what the model reads of rows, as `part_lengths` tells them, in one batch of the run's
    layout."""
    layout = getattr(run.collator, "layout", "padded")
    is_apart = getattr(run.collator, "decoder_start_ids", None) is not None

    def count(rows: list[tuple[int, list[int]]]) -> int:
        if layout == "prefix_shared":
            return sum(prompt + sum(own) for prompt, own in rows)
        if layout == "padding_free":
            return sum(prompt * len(own) + sum(own) for prompt, own in rows)
        if is_apart:  # two rows of each, padded apart
            longest = max((prompt for prompt, _ in rows), default=0) + max((max(own) for _, own in rows), default=0)
        else:
            longest = max((prompt + max(own) for prompt, own in rows), default=0)
        return sum(len(own) for _, own in rows) * longest

    return count


def plan_epoch(run: Run, epoch: int = 0, *, drop_last: bool | None = None) -> list:
    """The windows of an epoch: which rows make up which optimizer step (see `epoch_windows`)."""
    args, by_tokens = run.args, {}
    if args.max_tokens_per_micro_batch:
        parts, count = part_lengths(run.train_rows), tokens_read(run)
        by_tokens = {"most_tokens": args.max_tokens_per_micro_batch}
        by_tokens["tokens_of"] = lambda numbers: count([parts[number] for number in numbers])
    windows = epoch_windows(
        run.train_rows["length"][:],
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        world_size=run.world.size,
        shuffle=args.shuffle,
        seed=(args.seed if args.data_seed is None else args.data_seed) + epoch,
        group_by_length=args.group_by_length,
        drop_last=args.dataloader_drop_last if drop_last is None else drop_last,
        window_size=run.pairs_per_step,
        **by_tokens,
    )
    if not windows:
        raise UserError("dataloader_drop_last leaves no batch: the training set is smaller than one")
    return windows


def rest_of_stream(run: Run, *, num_workers: int, prefetch_factor: int | None) -> Iterator[tuple[int, list[dict]]]:
    """From where the run stands to its end, the number of pairs and the batches of each window of its stream. What is
    wrong with a row stops the run in one line."""
    args, stream = run.args, run.stream
    stream.place = run.state.stream or START
    how = {"batch_size": args.per_device_train_batch_size, "longest": stream.longest}
    if args.max_tokens_per_micro_batch:
        how |= {"most_tokens": args.max_tokens_per_micro_batch, "tokens_of": tokens_read(run)}
    windows = load_stream(
        stream,
        run.world,
        partial(collated, collator=run.collator, **how),
        stand_in=lambda: run.collator([run.train_rows[0]]),
        fit=partial(check_fit, run),
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
    )
    try:
        yield from islice(windows, run.total_steps - run.state.step)
    except ValueError as error:
        raise UserError(f"{first_line(error)}; {checkpoint.last_good(run.output_dir)}") from error


# ------------------------------------------------------------------- the reference in advance, and what a run leaves


def precompute_reference(run: Run) -> None:
    """Finds the reference's log-probabilities on disk, or works them out and keeps them there, and puts them into the
    rows: while training no reference is asked, or kept in memory."""
    args, reference = run.args, run.reference
    common = (reference, run.collator, run.world)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "of the weights"
    precision += f", {torch.get_float32_matmul_precision()}"  # tf32
    read = f"{precision}, {getattr(run.collator, 'decoder_start_ids', None)}, {eyes_in_words(run.processing_class)}"
    directory = Path(args.ref_cache_dir or Path(HF_HOME) / "dpo") / reference_digest(reference, read=read)
    without_dropout(run.model)
    columns = dict.fromkeys(CACHED, 0.0)
    if missing := columns.keys() - run.collator([run.train_rows[0] | columns]).keys():
        raise UserError(f"the data_collator leaves out the column {min(missing)}: it must hand it on to the batch")
    size = args.precompute_ref_batch_size
    plan = {"world_size": run.world.size, "shuffle": False, "group_by_length": True}
    if size is None:  # the first epoch's batches: in one layout it comes to what training would, to the bit
        windows = plan_epoch(run, drop_last=False)
    else:
        windows = epoch_windows(run.train_rows["length"][:], batch_size=size, **plan)
    run.train_rows = with_reference(run.train_rows, windows, directory, *common, args=args)
    for name, rows in run.eval_sets.items():
        windows = epoch_windows(rows["length"][:], batch_size=size or args.per_device_eval_batch_size, **plan)
        run.eval_sets[name] = with_reference(rows, windows, directory, *common, args=args)
    if reference.ref_model not in (None, run.model) and run.world.device.type != "cpu":
        reference.ref_model.to("cpu")  # the caller may hold it
    kind, digest = f"{reference.kind}, cached", directory.name
    run.reference = Reference(run.model, kind=kind, is_cached=True, digest=digest)
    if args.generate_during_eval:
        logger.info("with precompute_ref_log_probs there is no reference to answer: the policy's answers are shown")


def pairs_per_step(run: Run, resume: Path | None) -> int:
    """The pairs of an optimizer step. A run that goes on with another number of processes keeps to those that it had:
    the same pairs make up the same steps, in other batches."""
    args, size = run.args, run.world.size
    own = args.per_device_train_batch_size * args.gradient_accumulation_steps * size
    before = checkpoint.read_state(resume)["same_run"] if resume else {}
    now = {"processes": size} | {option: getattr(args, option) for option in checkpoint.OF_PROCESSES[1:]}
    if before.get("processes", size) == size and any(before.get(key) != value for key, value in now.items()):
        return own  # which is then refused
    kept = before.get("pairs_per_step", own)
    if before.get("processes", size) != size:
        words = f"{before['processes']} processes before, {size} now"
        logger.info("%s: the same %d pairs a step, the same numbers but for rounding and dropout", words, kept)
    return kept


def eyes_in_words(processing_class) -> str:
    """What a processor makes of pictures; nothing of a tokenizer."""
    eyes = getattr(processing_class, "image_processor", None)
    return "" if eyes is None else eyes.to_json_string()


def checkpointed(run: Run) -> dict:
    """What a checkpoint keeps of a run, as `begin_checkpoint` and `load_checkpoint` name it."""
    own = {key: getattr(run, key) for key in ("model", "state", "optimizer", "reference", "same_run")}
    return own | {"plain": {"scheduler": run.scheduler, "scaler": run.scaler}}


def what_matters(run: Run) -> dict:
    """All that makes a run's numbers what they are, in plain values: what a run that goes on must share with it."""
    args, model = run.args, run.model
    same_run = what_options_matter(run) | {"model": models.fingerprint(model)}
    if run.reference.ref_model is not None:
        same_run["reference"] = models.fingerprint(run.reference.ref_model)
    if run.reference.digest:
        same_run["reference"] = run.reference.digest
    if isinstance(model, PeftModel):
        for key, value in model.peft_config[model.active_adapter].to_dict().items():
            if key not in NOT_OF_ADAPTERS.split():
                same_run[f"adapter's {key}"] = str(sorted(value) if isinstance(value, set) else value)
    options = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in run.optimizer.param_groups]
    same_run["optimizer"] = f"{type(run.optimizer).__name__} {options}"
    same_run["collator"] = getattr(run.collator, "__qualname__", type(run.collator).__qualname__)
    same_run |= {"layout": getattr(run.collator, "layout", ""), "logits_budget": args.logits_budget}
    if not args.lr_scheduler_type.startswith("constant") or args.warmup_ratio:
        same_run["steps"] = run.total_steps  # the learning rate of each step depends on their number
    return same_run


def what_options_matter(run: Run) -> dict:
    """As much of `what_matters` as is known before the models are."""
    args, rows = run.args, run.train_rows
    if args.precompute_ref_log_probs:  # what was worked out follows from the rest
        rows = rows.remove_columns([name for name in CACHED if name in rows.column_names])
    same_run = {"processes": run.world.size, "pairs_per_step": run.pairs_per_step}
    same_run |= {"today": run.today, "rows": fingerprint(rows)}
    same_run["pictures"] = hashlib.sha256(eyes_in_words(run.processing_class).encode()).hexdigest()[:16]
    if args.dataset_streaming:  # what happens to later rows than those follows from the options
        tokenizer = tokenizer_of(run.processing_class)
        template = [str(getattr(each, "chat_template", None)) for each in (run.processing_class, tokenizer)]
        same_run["chat_template"] = hashlib.sha256("".join(template).encode()).hexdigest()[:16]
        for option in "max_length max_prompt_length max_completion_length truncation_mode skip_bad_rows".split():
            same_run[option] = getattr(args, option)
        same_run["chat_template_kwargs"] = str(args.chat_template_kwargs)
    for option in ("model_init_kwargs", "ref_model_init_kwargs"):
        same_run[option] = str(report.portable(getattr(args, option)))
    return same_run | {option: getattr(args, option) for option in EXACT_OPTIONS.split()}


def claim_output(run: Run, ref_model) -> Path | None:
    """Refuses an output_dir that is not the run's to write to, and locks it; the checkpoint to go on from, or None."""
    args, sources = run.args, dict(run.sources)
    reference = args.ref_model_name_or_path if ref_model is None else ref_model
    sources |= {"ref_model_name_or_path": reference} if isinstance(reference, str) else {}
    sources |= {"eval_dataset_name": args.eval_dataset_name} if isinstance(args.eval_dataset_name, str) else {}
    name = sources.get("model_name_or_path", "")
    sources |= {"the adapter's base": base} if Path(name).is_dir() and (base := adapters.adapter_base(name)) else {}
    files.check_output(run.output_dir, sources)

    def claim() -> Path | None:
        if run.output_dir.exists():
            run.lock = files.lock(run.output_dir)
        wanted, overwrite = args.resume_from_checkpoint, args.overwrite_output_dir
        return checkpoint.find_checkpoint(wanted, run.output_dir, overwrite=overwrite)

    return distributed.by_first(claim, run.world)


def note_files(run: Run, status: str, names: list[str] = ()) -> None:
    """Notes in run.json how far the run is and which files are a run's: all so far, and these."""
    known = files.files_of_run(run.output_dir) or files.WRITTEN
    step, steps = run.state.step, run.total_steps
    files.write_run(run.output_dir, status=status, step=step, steps=steps, files=[*known, *names])


def open_outputs(run: Run, trackers: dict, callbacks: list[Callable], resume: Path | None) -> None:
    """Opens what the run writes to, in the first process: metrics.jsonl, config.yaml, trackers."""
    args, step, output_dir = run.args, run.state.step, run.output_dir
    if run.lock is None:
        run.lock = files.lock(output_dir)
        if files.run_in(output_dir):  # output_dir was not there when this run began
            raise UserError(f"output_dir {output_dir}: another run has taken it meanwhile: name another")
    if args.profile and 0 < run.total_steps - step < 3:
        raise UserError(
            f"profile begins at step 3 of a start, {run.total_steps - step} are left: train longer, or leave it out"
        )
    if args.profile and (output_dir / "profile").exists() and "profile" not in files.files_of_run(output_dir):
        raise UserError(f"{output_dir / 'profile'} is in the way of profile, and no run wrote it: move it")
    options = report.portable_config({**dataclasses.asdict(args), **run.sources})
    trackers, run.tables = report.open_trackers(trackers, run_name=args.run_name, output_dir=output_dir, config=options)
    came_from = resume.parent if resume else output_dir
    run.rows = report.read_rows(came_from / "metrics.jsonl", up_to_step=step) if step else []
    checkpoint.clear_output(output_dir, step=step if came_from.resolve() == output_dir.resolve() else 0)
    note_files(run, "training", ["profile"] if args.profile else [])
    files.write_whole(output_dir / "metrics.jsonl", "".join(map(report.as_line, run.rows)))
    report.write_config(output_dir, options)
    run.receivers = [partial(report.append_row, output_dir / "metrics.jsonl"), *trackers, *callbacks]
    rows = "a stream of rows" if run.stream else f"{len(run.train_rows)} rows"
    logger.info("%s, %d steps of %d rows", rows, run.total_steps, run.pairs_per_step)
    logger.info("layout: %s", run.layout)
    if run.memory:
        total, *own = (costs.in_words(run.memory[name]) for name in ("peak", *costs.PARTS))
        own = ", ".join(f"{name} {words}" for name, words in zip(costs.PARTS, own, strict=True))
        logger.info("memory: about %s at the peak predicted (%s; not all at once)", total, own)
    logger.info("reference: %s; it takes %.1f MB beside the policy", run.reference.kind, run.reference.bytes() / 2**20)
