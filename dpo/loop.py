"""The training loop of Direct Preference Optimization, start to end, in plain PyTorch.

Shell: `torchrun -m dpo.loop --model_name_or_path NAME --dataset_name NAME`; nothing at all runs the embedded example.
Python: `dpo.loop.train(model, args=DPOConfig(...), train_dataset=...)`. The step is the fenced block in `train`.
"""

import dataclasses
import logging
import math
import sys
import time
import traceback
from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import EvalPrediction, get_scheduler, set_seed

from dpo import checkpoint, distributed, models, report, sampling
from dpo.collate import DataCollatorForPreference, epoch_windows, load_batches
from dpo.config import DPOConfig, parse_args
from dpo.data import prepare_dataset
from dpo.distributed import World
from dpo.logprobs import concatenated_forward
from dpo.losses import OF_RANKINGS, OVER_THE_BATCH, WITHOUT_REFERENCE, dpo_loss
from dpo.reference import adapter_starts_at_zero, compute_ref_log_probs, frozen_copy, sync_reference
from dpo.report import create_model_card
from dpo.sampling import generate_from_model_and_ref
from dpo.sources import load_preferences

# What dpo_loss and the configuration call by the same names.
LOSS_OPTIONS = (
    "loss_type loss_weights beta label_smoothing f_divergence_type f_alpha_divergence_coef reference_free discopop_tau "
    "rpo_alpha simpo_gamma orpo_lambda cpo_alpha dpop_lambda r_dpo_alpha chipo_clip exo_beta_r"
).split()
# Another value of these would be another run: it cannot go on from a checkpoint.
EXACT_OPTIONS = (
    "per_device_train_batch_size gradient_accumulation_steps learning_rate beta loss_type seed data_seed".split()
)
__all__ = ["Run", "create_model_card", "evaluate", "generate_from_model_and_ref", "get_batch_loss_metrics", "train"]
logger = logging.getLogger("dpo")


class Run(NamedTuple):
    """What `train` returns: the trained model, its tokenizer, every metrics row, and where all of it was saved."""

    model: torch.nn.Module
    processing_class: object
    rows: list[dict]
    output_dir: Path


def train(
    model=None,
    ref_model=None,
    args: DPOConfig | None = None,
    train_dataset=None,
    eval_dataset=None,
    processing_class=None,
    data_collator=None,
    peft_config=None,
    callbacks=None,
    optimizers=(None, None),
    compute_metrics=None,
    model_init=None,
) -> Run:
    """Trains a policy on preference pairs and leaves in args.output_dir what the README lists.

    Args:
        model: a causal language model, or its name or directory; by default args.model_name_or_path.
        ref_model: likewise; by default the policy as it is now (a PEFT policy serves as its own reference).
        args: the options.
        train_dataset, eval_dataset: a datasets.Dataset, a list of dicts, a name or a path; eval_dataset may be a dict
            of those, evaluated each under its own name. By default args.dataset_name and its test split.
        processing_class: the tokenizer; by default the model's.
        data_collator: rows of token ids to a batch; by default DataCollatorForPreference.
        peft_config: a peft.PeftConfig or a dict of LoraConfig's arguments: trains an adapter.
        callbacks: functions that get each metrics row, in the first process.
        optimizers: (optimizer, scheduler) over the model's parameters, in place of args'.
        compute_metrics: gets an EvalPrediction whose predictions are all pairs' (chosen rewards, rejected rewards; of
            a ranking the mean of all but the best) and whose label_ids are 0, the chosen one's place; returns a dict
            of more evaluation metrics.
        model_init: makes the model, in place of model.
    """
    args = args or DPOConfig()
    world = distributed.setup(use_cpu=args.use_cpu, backend=args.ddp_backend, timeout=args.ddp_timeout)
    logger.setLevel(logging.INFO if world.rank == 0 else logging.ERROR)
    output_dir = Path(args.output_dir)
    resume = checkpoint.find_checkpoint(args.resume_from_checkpoint, output_dir)
    if resume is None and not args.overwrite_output_dir:
        checkpoint.refuse_to_overwrite(output_dir)
    if resume is not None and resume.parent.resolve() != output_dir.resolve() and not args.overwrite_output_dir:
        checkpoint.refuse_to_overwrite(output_dir)
    reward, trackers = sampling.load_reward(args.sample_reward), report.import_trackers(args.report_to)
    set_seed(args.seed, deterministic=args.full_determinism)
    if args.tf32 is not None:
        torch.set_float32_matmul_precision("high" if args.tf32 else "highest")

    # ---- rows of token ids
    if model is None:
        model = model_init() if model_init else args.model_name_or_path
    model = str(model) if isinstance(model, Path) else model
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", None) or None
    check_arguments(model, ref_model, optimizers, processing_class or name, args=args)
    if processing_class is None:
        hub = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
        processing_class = models.load_tokenizer(name, **hub)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    train_rows, eval_sets = prepare_data(train_dataset, eval_dataset, processing_class, args=args, world=world)
    padding_value = args.padding_value if args.padding_value is not None else tokenizer.pad_token_id or 0
    collator = data_collator or DataCollatorForPreference(pad_token_id=padding_value)

    # ---- policy and reference, equal before the first step unless the caller wants it otherwise
    has_own_reference = ref_model is not None or args.ref_model_name_or_path is not None
    starts_equal = args.disable_dropout and not has_own_reference and needs_reference(args)
    policy, ref_model = prepare_models(model, ref_model, peft_config, args=args, world=world)
    limit = models.learned_positions(policy)
    if limit is not None:
        longest = max(max(some["length"][:]) for some in (train_rows, *eval_sets.values()))
        if longest > limit:
            raise ValueError(
                f"rows have up to {longest} tokens, the model has {limit} positions: set max_length {limit}"
            )
    set_seed(args.seed + world.rank, deterministic=args.full_determinism)  # each process its own dropout
    wrapped = distributed.parallelize(policy, world, find_unused_parameters=args.ddp_find_unused_parameters)
    bco = {"sum": 0.0, "count": 0.0}  # of rewards: their mean is the δ of the BCO loss
    score = {"ref_model": ref_model, "args": args, "padding_value": padding_value, "world": world, "bco": bco}

    # ---- steps, optimizer, learning rate
    plan = partial(
        epoch_windows,
        train_rows["length"][:],
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        world_size=world.size,
        shuffle=args.shuffle,
        group_by_length=args.group_by_length,
        drop_last=args.dataloader_drop_last,
    )
    steps_per_epoch = len(plan())
    if steps_per_epoch == 0:
        raise ValueError("dataloader_drop_last leaves no batch: the training set is smaller than one")
    total_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    decay = {"weight_decay": args.weight_decay, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    optimizer, scheduler = optimizers
    if optimizer is None:
        optimizer = models.make_optimizer(policy, name=args.optim, learning_rate=args.learning_rate, **decay)
    if scheduler is None:
        warmup = args.warmup_steps or math.ceil(args.warmup_ratio * total_steps)
        scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, total_steps, args.lr_scheduler_kwargs)
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.fp16)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]

    # ---- where it goes on from, and where it writes
    stateful = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    same_run = {"rows": len(train_rows), "steps": total_steps, "processes": world.size}
    same_run |= {option: getattr(args, option) for option in EXACT_OPTIONS}
    step, tokens_seen, best, sums = 0, 0, None, defaultdict(float)
    if resume:
        state, rank_state = checkpoint.load_checkpoint(resume, world, policy, stateful=stateful, same_run=same_run)
        step, tokens_seen, best = state["step"], state["tokens_seen"], state["best"]
        bco.update(state["bco"])
        sums.update(rank_state["sums"])
        if args.sync_ref_model:
            ref_model.load_state_dict(state["reference"], strict=False)
    rows, receivers = [], []
    if world.rank == 0:
        if resume:
            checkpoint.drop_later(output_dir, step)
        else:
            checkpoint.clear_output(output_dir)
        given = {"model_name_or_path": name, "dataset_name": train_dataset, "eval_dataset_name": eval_dataset}
        given = {key: value for key, value in given.items() if isinstance(value, str)}
        options = report.write_config(output_dir, {**dataclasses.asdict(args), **given})
        rows = report.read_rows(output_dir / "metrics.jsonl", up_to_step=step)
        trackers = report.open_trackers(trackers, run_name=args.run_name, output_dir=output_dir, config=options)
        receivers = [partial(report.append_row, output_dir / "metrics.jsonl"), *trackers, *(callbacks or [])]
        logger.info("%d rows, %d steps of %d rows", len(train_rows), total_steps, pairs_per_step(args, world))
    bar = tqdm(total=total_steps, initial=step, desc="DPO", disable=args.disable_tqdm or world.rank > 0)

    def record(row: dict) -> None:
        rows.append(row)
        for receive in receivers:
            receive(row)

    def evaluate_now() -> dict:
        row = {"step": step, "epoch": step / steps_per_epoch}
        for label, eval_rows in eval_sets.items():
            prefix = f"eval_{label}" if label else "eval"
            row |= evaluate(policy, eval_rows, collator, **score, prefix=prefix, compute_metrics=compute_metrics)
        if world.rank == 0:
            tqdm.write(report.describe_evaluation(row))
        if args.generate_during_eval and world.rank == 0:
            first = next(iter(eval_sets.values()))
            with precision(args, world):
                row |= sampling.sample_answers(
                    policy,
                    first.select(range(min(args.num_samples, len(first)))),
                    collator,
                    tokenizer,
                    ref_model=ref_model,
                    reference_free=not needs_reference(args),
                    reward=reward,
                    max_new_tokens=args.max_new_tokens,
                    batch_size=args.per_device_eval_batch_size,
                    seed=args.seed,
                    file=output_dir / "samples.jsonl",
                )
        row = distributed.from_first(row, world)  # sampled answers are known there only
        record(row)
        return row

    if args.eval_on_start and step == 0:
        evaluate_now()

    loading = {
        "num_workers": args.dataloader_num_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "pin_memory": world.device.type == "cuda",
    }
    data_seed = args.seed if args.data_seed is None else args.data_seed
    policy.train()
    while step < total_steps:
        epoch, done = divmod(step, steps_per_epoch)
        windows = plan(seed=data_seed + epoch)[done : done + total_steps - step]
        batches = iter(load_batches(train_rows, windows, world.rank, collator, **loading))
        for window in windows:
            started, learning_rate = time.perf_counter(), scheduler.get_last_lr()[0]
            pairs = sum(len(indices) for micro in window for indices in micro)  # of all processes
            # ------------------------------------------------------------------------------------ the training step
            for number, micro in enumerate(window):
                real = len(micro[world.rank])  # 0 where the last window leaves this process nothing: it runs along
                batch = to_device(next(batches), world.device)
                last = number == len(window) - 1
                with distributed.synchronize_gradients(wrapped, now=last), precision(args, world):
                    losses, metrics = get_batch_loss_metrics(wrapped, batch, **score, real=real)
                    # DDP averages gradients over processes: × size makes it their sum, / pairs the mean over all pairs.
                    loss = losses.sum() * world.size / pairs
                    scaler.scale(loss).backward()
                for key, values in metrics.items():
                    sums[key] += values.double().sum()
                sums["pairs"] += real
                if step == 0 and number == 0 and starts_equal and real:
                    check_rewards_are_zero(metrics, args=args)
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm or math.inf)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()
            if args.sync_ref_model and (step + 1) % args.ref_model_sync_steps == 0:
                sync_reference(policy, ref_model, mixup_alpha=args.ref_model_mixup_alpha)
            # -------------------------------------------------------------------------------------------------------
            step += 1
            logs, evaluates, saves = due(step, total_steps=total_steps, steps_per_epoch=steps_per_epoch, args=args)
            if logs and world.device.type == "cuda":
                torch.cuda.synchronize()  # or the seconds would be those of queueing the work
            sums["seconds"] += time.perf_counter() - started
            bar.update()
            if logs:
                means = distributed.mean_over_ranks(sums, world)
                sums.clear()
                tokens_seen += means.pop("tokens")
                row = {"step": step, "epoch": step / steps_per_epoch, "loss": means.pop("loss")}
                row |= {
                    "learning_rate": learning_rate,
                    "grad_norm": float(grad_norm),
                    **means,
                    "tokens_seen": tokens_seen,
                }
                if not math.isfinite(row["loss"]):
                    raise ValueError(
                        f"the loss is {row['loss']} at step {step}: lower learning_rate, or take bf16 for fp16"
                    )
                record(row)
                shown = {"loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
                bar.set_postfix({label: f"{row[key]:.3f}" for label, key in shown.items()})
            if evaluates:
                row = evaluate_now()
                policy.train()
                if args.load_best_model_at_end and saves:
                    better = {"metric": args.metric_for_best_model, "greater": args.greater_is_better}
                    best = checkpoint.better_of(best, row, **better)
            if saves:
                state = {"step": step, "tokens_seen": tokens_seen, "best": best, "same_run": same_run, "bco": bco}
                if args.sync_ref_model:  # what it shares with the policy is not written twice
                    moved = {key for key, parameter in policy.named_parameters() if parameter.requires_grad}
                    state["reference"] = {key: v for key, v in ref_model.state_dict().items() if key in moved}
                checkpoint.save_checkpoint(
                    output_dir / f"checkpoint-{step}",
                    world,
                    model=policy,
                    processing_class=processing_class,
                    stateful=None if args.save_only_model else stateful,
                    state=state,
                    rank_state={"sums": {key: float(value) for key, value in sums.items()}},
                )
                if world.rank == 0:
                    checkpoint.prune_checkpoints(output_dir, args.save_total_limit, best and best["step"])
    bar.close()

    # ---- what stays
    if args.load_best_model_at_end:
        checkpoint.load_weights(output_dir / f"checkpoint-{best['step']}", policy)
    if world.rank == 0:
        checkpoint.save_model(output_dir, policy, processing_class)
        report.plot_rewards(rows, output_dir / "rewards.png")
        told = {key: getattr(args, key) for key in "loss_type beta learning_rate num_train_epochs max_steps".split()}
        source = {"model_name": name, "dataset_name": args.dataset_name, "adapter": isinstance(policy, PeftModel)}
        create_model_card(output_dir, **source, rows=rows, options=told)
        logger.info("Saved in %s: the model, metrics.jsonl, rewards.png, config.yaml, README.md", output_dir)
    distributed.barrier(world)
    return Run(policy.eval(), processing_class, rows, output_dir)


def check_arguments(model, ref_model, optimizers, tokenizer_source, *, args: DPOConfig) -> None:
    """Refuses arguments of `train` that contradict each other, before anything is loaded."""
    if model is None:
        raise ValueError("there is no model: set model_name_or_path")
    if tokenizer_source is None:
        raise ValueError("a model that was not loaded from a name or path needs a processing_class, its tokenizer")
    if not isinstance(model, str):
        for option in ("dtype", "attn_implementation", "model_revision", "model_init_kwargs"):
            if getattr(args, option) != getattr(DPOConfig(), option):
                raise ValueError(f"{option} does nothing for a model that is loaded already: leave it out")
    if ref_model is model and not isinstance(model, str):
        raise ValueError("ref_model is the model itself, which will train: leave it out, or pass a copy")
    if ref_model is not None and not needs_reference(args):
        raise ValueError(f"loss_type {args.loss_type} and reference_free have no use for a ref_model: leave it out")
    if optimizers[1] is not None and optimizers[0] is None:
        raise ValueError("optimizers has a scheduler without its optimizer: pass both, or the optimizer alone")


# ------------------------------------------------------------------------------------------------- scoring and sampling


def get_batch_loss_metrics(
    model,
    batch: dict,
    *,
    args: DPOConfig,
    ref_model=None,
    padding_value: int = 0,
    train_eval: str = "train",
    world: World | None = None,
    real: int | None = None,
    bco: dict[str, float] | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One batch through policy, reference and loss.

    Args: train_eval, "eval" puts eval_ before the metrics' names and leaves bco as it is; world, real and bco matter to
    losses that look beyond the pair: the processes to gather aot's batch from, how many of its pairs count, and the
    running sum and count of the rewards whose mean is BCO's δ.

    Returns: the loss of each pair, (B,), with gradient; and the metrics, each (B,) without, one value a pair, so that
    sums over batches and processes are exact.
    """
    common = {"padding_value": padding_value, "ld_alpha": args.ld_alpha}
    scored = concatenated_forward(model, batch, **common, use_weighting=args.use_weighting)
    aux_loss = scored.pop("aux_loss", None)
    reference = torch.zeros_like(scored["chosen_logps"]), torch.zeros_like(scored["rejected_logps"])
    if needs_reference(args):
        reference = compute_ref_log_probs(batch, policy=model, ref_model=ref_model, **common)
    scored["ref_chosen_logps"], scored["ref_rejected_logps"] = reference
    columns = {"margin": "margins", "scores": "scores", "weight": "weights"}
    scored |= {name: batch[column] for column, name in columns.items() if column in batch}
    scored = {key: value[:real] for key, value in scored.items()}
    tokens, weights = scored.pop("tokens"), scored.pop("weights", 1.0)

    beyond = {"world": world, "bco": bco, "update": train_eval == "train"}
    losses, chosen_rewards, rejected_rewards, parts = loss_of_batch(scored, args=args, **beyond)
    losses = losses * weights
    metrics = {"loss": losses, "tokens": tokens, **parts}
    if aux_loss is not None:
        losses = losses + distributed.unwrap(model).config.router_aux_loss_coef * aux_loss
        metrics |= {"loss": losses, "aux_loss": aux_loss.expand_as(losses)}
    rejected_rewards, best_rejected = mean_and_best(rejected_rewards, scored["rejected_lengths"])
    metrics |= {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > best_rejected).float(),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": scored["chosen_logps"],
        "logps/rejected": mean_and_best(scored["rejected_logps"], scored["rejected_lengths"])[0],
    }
    prefix = "eval_" if train_eval == "eval" else ""
    return losses, {prefix + key: value.detach() for key, value in metrics.items()}


def loss_of_batch(
    scored: dict[str, torch.Tensor], *, args: DPOConfig, world: World | None, bco: dict | None, update: bool
):
    """`dpo_loss` with what some losses need from beyond the pair: BCO's δ, and for AOT the pairs of all processes.

    Returns: losses, chosen rewards and rejected rewards as `dpo_loss`, of this process's pairs; and the losses of each
    part of a mixture, {"loss/NAME": (B,)}.
    """
    names, options, own = loss_names(args), {name: getattr(args, name) for name in LOSS_OPTIONS}, slice(None)
    if "bco_pair" in names and bco is not None:
        if update:
            update_bco(bco, scored, beta=args.beta, world=world)
        options["bco_delta"] = bco["sum"] / max(bco["count"], 1.0)
    if set(names) & set(OVER_THE_BATCH):
        scored, own = distributed.gather_pairs(scored, world)
    losses, chosen_rewards, rejected_rewards = dpo_loss(**scored, **options)
    if set(names) & set(OVER_THE_BATCH):
        losses = losses.mean().expand_as(losses)  # a quantile belongs to no pair
    parts = {}
    for name in names if len(names) > 1 else ():
        # The mixture with one weight of 1, not the loss by itself: its options may have no meaning for a part alone.
        alone = {**options, "rpo_alpha": None, "loss_weights": [float(name == other) for other in names]}
        parts[f"loss/{name}"] = dpo_loss(**scored, **alone)[0][own]
    return losses[own], chosen_rewards[own], rejected_rewards[own], parts


def mean_and_best(rejected: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and the largest over each row's rejected completions, (B, K−1) to (B,), those of no tokens left out."""
    if rejected.ndim == 1:  # pairs: there is one
        return rejected, rejected
    there = lengths > 0
    mean = rejected.masked_fill(~there, 0).sum(dim=1) / there.sum(dim=1)
    return mean, rejected.masked_fill(~there, -math.inf).amax(dim=1)


@torch.no_grad()
def evaluate(
    model,
    dataset: datasets.Dataset,
    collator,
    *,
    args: DPOConfig,
    world: World,
    ref_model=None,
    padding_value: int = 0,
    bco: dict[str, float] | None = None,
    prefix: str = "eval",
    compute_metrics=None,
) -> dict[str, float]:
    """The metrics of `get_batch_loss_metrics` over a whole tokenised dataset, each pair counted once whatever the batch
    size and the number of processes; and those of compute_metrics. Keys begin with prefix."""
    model.eval()
    windows = epoch_windows(
        dataset["length"][:],
        batch_size=args.per_device_eval_batch_size,
        world_size=world.size,
        shuffle=False,
        group_by_length=True,
    )
    batches = load_batches(dataset, windows, world.rank, collator, num_workers=args.dataloader_num_workers)
    score = {"ref_model": ref_model, "args": args, "padding_value": padding_value, "world": world, "bco": bco}
    sums, rewards = defaultdict(float), []
    for window, batch in zip(windows, batches, strict=True):
        rows = window[0][world.rank]
        with precision(args, world):
            _, metrics = get_batch_loss_metrics(
                model, to_device(batch, world.device), **score, train_eval="eval", real=len(rows)
            )
        for key, values in metrics.items():
            sums[key.removeprefix("eval_")] += values.double().sum()
        sums["pairs"] += len(rows)
        if compute_metrics:
            pairs = torch.stack([metrics["eval_rewards/chosen"], metrics["eval_rewards/rejected"]], dim=1)
            rewards += zip(rows, pairs.tolist(), strict=False)
    result = distributed.mean_over_ranks(sums, world)
    result.pop("tokens")
    if compute_metrics:
        ordered = torch.tensor([pair for _, pair in sorted(distributed.gather_lists(rewards, world))]).numpy()
        labels = torch.zeros(len(ordered), dtype=torch.long).numpy()
        result |= compute_metrics(EvalPrediction(predictions=(ordered[:, 0], ordered[:, 1]), label_ids=labels))
    return {f"{prefix}_{key}": value for key, value in result.items()}


# ----------------------------------------------------------------------------------------------------------- preparing


def prepare_data(train_dataset, eval_dataset, processing_class, *, args: DPOConfig, world: World):
    """Tokenised training rows, and {label: tokenised rows} to evaluate on; the label of a single set is empty."""
    names = loss_names(args)

    def prepare(source, split: str, subset: str | None = None) -> datasets.Dataset:
        parts = load_preferences(source, split=split, subset=subset)
        with distributed.first_process_first(world):
            rows = prepare_dataset(
                parts,
                processing_class,
                max_prompt_length=args.max_prompt_length,
                max_completion_length=args.max_completion_length,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                ranked=bool(set(names) & set(OF_RANKINGS)),
                scored="exo" in names,
                allow_ties="plackett_luce" not in names and "exo" in names,
                skip_bad_rows=args.skip_bad_rows,
                num_proc=args.dataset_num_proc,
            )
        told = ", ".join(parts)
        if "odpo" in names and "margin" not in rows.column_names:
            raise ValueError(f"{told}: loss_type odpo needs a number for each pair: add a column margin")
        if args.exo_beta_r != DPOConfig().exo_beta_r and "scores" not in rows.column_names:
            raise ValueError(f"{told}: exo_beta_r does nothing without scores: leave it out, or add a column scores")
        if "exo" in names and args.label_smoothing and "scores" in rows.column_names:
            raise ValueError(
                f"{told}: label_smoothing does nothing where rows have scores, with loss_type exo: leave it out"
            )
        return rows

    if train_dataset is None and args.dataset_name is None:
        raise ValueError("there is no training set: set dataset_name")
    train_source = args.dataset_name if train_dataset is None else train_dataset
    train_rows = prepare(train_source, args.dataset_train_split, args.dataset_config)
    if args.eval_strategy == "no":
        return train_rows, {}
    eval_dataset = args.eval_dataset_name if eval_dataset is None else eval_dataset
    if eval_dataset is not None:
        eval_sets = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        best = args.metric_for_best_model
        if args.load_best_model_at_end and not any(best.startswith(f"eval_{label}") for label in eval_sets):
            raise ValueError(
                f"metric_for_best_model {best} is of none of {', '.join(eval_sets)}: name it eval_NAME_loss"
            )
        eval_sets = {label: prepare(source, args.dataset_test_split) for label, source in eval_sets.items()}
    elif not isinstance(train_source, str) or Path(train_source).is_file():
        raise ValueError("eval_strategy needs something to evaluate on: set eval_dataset_name, or eval_strategy to no")
    else:
        eval_sets = {"": prepare(train_source, args.dataset_test_split, args.dataset_config)}
    if any(("scores" in rows.column_names) != ("scores" in train_rows.column_names) for rows in eval_sets.values()):
        raise ValueError(
            "of the training and the evaluation set one has scores: loss_type exo takes them in both or none"
        )
    return train_rows, eval_sets


def prepare_models(model, ref_model, peft_config, *, args: DPOConfig, world: World):
    """The policy on its device, and the reference: a model, or None where there is none to load (a PEFT policy with its
    adapter off, or reference_free)."""
    common = {
        "dtype": args.dtype,
        "attn_implementation": args.attn_implementation,
        "trust_remote_code": args.trust_remote_code,
    }
    if isinstance(model, str):
        model = models.load_model(model, **{**common, "revision": args.model_revision, **args.model_init_kwargs})
    if args.disable_dropout:
        models.disable_dropout(model)
    if args.use_peft and peft_config is None:
        peft_config = {
            "r": args.lora_r,
            "lora_alpha": args.lora_alpha,
            "lora_dropout": args.lora_dropout,
            "target_modules": args.lora_target_modules,
            "modules_to_save": args.lora_modules_to_save,
        }
    if peft_config is not None:
        model = models.add_adapter(model, peft_config)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, **args.gradient_checkpointing_kwargs})
    model.to(world.device)

    ref_model = args.ref_model_name_or_path if ref_model is None else ref_model
    if not needs_reference(args):
        ref_model = None
    elif isinstance(ref_model, str):
        ref_model = models.load_model(ref_model, **{**common, **args.ref_model_init_kwargs})
    elif ref_model is None and not (
        isinstance(model, PeftModel) and adapter_starts_at_zero(model) and not args.sync_ref_model
    ):
        ref_model = frozen_copy(model)
    if ref_model is not None:
        ref_model.to(world.device).eval().requires_grad_(False)
    if args.torch_compile:
        for each in (model, ref_model) if ref_model is not None else (model,):
            options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
            each.compile(**{key: value for key, value in options.items() if value is not None})
    return model, ref_model


# --------------------------------------------------------------------------------------------------------- small things


def pairs_per_step(args: DPOConfig, world: World) -> int:
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * world.size


def loss_names(args: DPOConfig) -> list[str]:
    return [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type


def needs_reference(args: DPOConfig) -> bool:
    return not args.reference_free and not set(loss_names(args)) <= set(WITHOUT_REFERENCE)


def update_bco(bco: dict[str, float], scored: dict, *, beta: float, world: World | None) -> None:
    """Adds the rewards of this batch's pairs, chosen and rejected, of all processes, to BCO's running sum and count."""
    with torch.no_grad():
        ratios = [scored[f"{which}_logps"] - scored[f"ref_{which}_logps"] for which in ("chosen", "rejected")]
        rewards = beta * torch.cat(ratios)
    added = {"sum": float(rewards.double().sum()), "count": float(len(rewards))}
    added = distributed.sum_over_ranks(added, world) if world else added
    for key in bco:
        bco[key] += added[key]


def due(step: int, *, total_steps: int, steps_per_epoch: int, args: DPOConfig) -> tuple[bool, bool, bool]:
    """Whether to log, to evaluate and to save after this step. Intervals below 1 are shares of all steps."""
    is_last = step == total_steps

    def every(interval: float) -> bool:
        steps = max(1, math.ceil(interval * total_steps)) if interval < 1 else int(interval)
        return is_last or step % steps == 0

    def by(strategy: str, interval: float) -> bool:
        return {"no": False, "epoch": every(steps_per_epoch), "steps": every(interval)}[strategy]

    evaluates = by(args.eval_strategy, args.eval_steps or args.logging_steps)
    return step == 1 or every(args.logging_steps), evaluates, by(args.save_strategy, args.save_steps)


def to_device(batch: dict, device: torch.device) -> dict:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def precision(args: DPOConfig, world: World):
    """Autocast for policy and reference alike, in training and evaluation."""
    if not (args.bf16 or args.fp16):
        return nullcontext()
    return torch.autocast(world.device.type, dtype=torch.bfloat16 if args.bf16 else torch.float16)


def check_rewards_are_zero(metrics: dict[str, torch.Tensor], *, args: DPOConfig) -> None:
    """Before the first update policy and reference are one model and every reward is 0; if not, no result is right."""
    tolerance = 1.0 if args.bf16 or args.fp16 or args.dtype not in ("float32", "auto") else 1e-2
    nats = float(torch.stack([metrics["rewards/chosen"], metrics["rewards/rejected"]]).abs().max()) / args.beta
    if not nats <= tolerance:
        raise ValueError(
            f"policy and reference differ by {nats:.3g} nats before the first step: something random (dropout, noise), "
            "another dtype or another kernel is at work in one of them"
        )


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s")
    try:
        run = train(args=parse_args(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        # What this package refuses is told in a line. Any other ValueError is a bug and shows where.
        if Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent != Path(__file__).parent:
            raise
        sys.exit(f"error: {error}")
    if distributed.is_first():
        logger.info("Talk to it:  python -m dpo.chat --model_name_or_path %s", run.output_dir)
    distributed.shutdown()


if __name__ == "__main__":
    main()
