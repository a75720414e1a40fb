"""The training loop of Direct Preference Optimization, start to end, in plain PyTorch.

Shell: `torchrun -m dpo.loop --model_name_or_path NAME --dataset_name NAME`; nothing at all runs the embedded example.
Python: `dpo.loop.train(model, args=DPOConfig(...), train_dataset=...)`. The method is the first three functions: train,
train_step, get_batch_loss_metrics; the equation is in the first lines of losses.dpo_loss. prepare.py makes the Run.
"""

import logging
import math
import signal
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from functools import partial

import datasets
import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import EvalPrediction

from dpo import checkpoint, costs, distributed, files, report, sampling
from dpo.batches import epoch_windows, load_windows
from dpo.build import autocast, forward_options, how_to_load, loss_names, loss_options, reads
from dpo.checkpoint import TrainingState
from dpo.collate import ready_batch
from dpo.config import DPOConfig, UserError, parse_args
from dpo.distributed import World, synchronize_gradients
from dpo.logprobs import concatenated_forward
from dpo.losses import BEYOND_THE_PAIR, OVER_THE_BATCH, dpo_loss
from dpo.merge import merge_adapter
from dpo.models import router_coefficient
from dpo.prepare import Run, checkpointed, note_files, plan_epoch, prepare, rest_of_stream, user_errors
from dpo.reference import Reference, without_dropout
from dpo.report import create_model_card
from dpo.rows import first_line
from dpo.sampling import generate_from_model_and_ref
from dpo.stream import source_of, tell
from dpo.windows import among_others, counted_pairs, look_ahead, mean_over_window, open_window

__all__ = ["Run", "create_model_card", "evaluate", "generate_from_model_and_ref", "get_batch_loss_metrics", "train"]
logger = logging.getLogger("dpo")


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
        model: a causal language model, or its name or directory, by default args.model_name_or_path; model_init may
            make it. ref_model: likewise; by default the policy as it is now (a copy, or a new adapter switched off).
        train_dataset, eval_dataset: a datasets.Dataset, a list of dicts, a name or a path; eval_dataset may be a dict
            of those, evaluated each under its own name. By default args.dataset_name and its test split. A
            datasets.IterableDataset to train on is read while training.
        processing_class: the tokenizer; by default the model's. data_collator: rows of token ids to a batch.
        peft_config: a peft.PeftConfig or a dict of LoraConfig's arguments: trains an adapter.
        callbacks: functions that get each metrics row, in the first process.
        optimizers: (optimizer, scheduler) over the model's parameters, in place of args'.
        compute_metrics: gets an EvalPrediction whose predictions are all pairs' (chosen rewards, rejected rewards; of
            a ranking the mean of all but the best) and whose label_ids are 0, the chosen one's place; returns a dict.
    Returns: the Run: its model, processing_class, metrics rows, output_dir, and all else that it was made of.
    """
    data = (train_dataset, eval_dataset, processing_class, data_collator)
    run = prepare(model, ref_model, args, *data, peft_config, callbacks, optimizers, compute_metrics, model_init)
    if run.args.eval_on_start and run.state.step == 0:
        evaluate_sets(run)
    run.model.train()
    while run.state.step < run.total_steps:
        started = time.perf_counter()
        for pairs_in_step, micro_batches in rest_of_epoch(run):
            progress = train_step(run, micro_batches, pairs_in_step)
            logs, evaluates, saves = due(run.state.step, run.total_steps, run.steps_per_epoch, args=run.args)
            run.bar.update()
            if logs and run.world.device.type == "cuda":
                torch.cuda.synchronize()  # or the seconds would be those of queueing the work
            run.state.sums["seconds"] += time.perf_counter() - started
            if logs:
                log(run, progress)
            if evaluates:
                evaluate_sets(run, is_saved=saves)
                run.model.train()
            if saves:
                save(run)
            started = time.perf_counter()
    finish(run)
    return run


def train_step(run: Run, micro_batches: list[dict], pairs_in_step: int) -> dict[str, float | torch.Tensor]:
    """One optimizer step, against the gradient of the mean loss over the pairs_in_step pairs of all processes, of which
    this process has micro_batches. Returns the learning rate and the norm of the gradient before clipping."""
    args, world, state, policy = run.args, run.world, run.state, run.policy
    learning_rate = run.scheduler.get_last_lr()[0]
    for number, batch in enumerate(micro_batches, start=1):
        is_last = number == len(micro_batches)
        with synchronize_gradients(policy, now=is_last):
            with autocast(args, world):
                losses, metrics = get_batch_loss_metrics(policy, batch, run.reference, state, args=args, world=world)
            # DDP averages gradients over processes: × size makes it their sum, / pairs_in_step the mean over all pairs.
            loss = losses.sum() * world.size / pairs_in_step
            run.scaler.scale(loss).backward()
        add_up(state.sums, metrics)
        if state.step == 0 and number == 1 and run.starts_equal:
            check_rewards_are_zero(metrics, args=args)

    grad_norm = clip_gradient(run, micro_batches)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.scheduler.step()
    run.optimizer.zero_grad()
    state.step += 1
    run.reference.after_step(state.step)
    return {"learning_rate": learning_rate, "grad_norm": grad_norm}


def get_batch_loss_metrics(
    model,
    batch: dict,
    reference: Reference,
    state: TrainingState | None = None,
    *,
    args: DPOConfig,
    world: World | None = None,
    train_eval: str = "train",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One batch through policy, reference and loss.

    Args: batch, of any layout; state and world matter to losses that look beyond the pair: BCO's running mean of the
    rewards, which train_eval "eval" leaves as it is, and the processes whose pairs AOT sorts beside this one's.
    Returns: the loss of each pair, (B,), with gradient; and the metrics, each (B,), so that their sums are exact.
    """
    state, world = state or TrainingState(), world or World(rank=0, size=1, device=torch.device("cpu"))
    batch, names, window = ready_batch(batch, model), set(loss_names(args)), batch.get("window")
    policy_logps = concatenated_forward(model, batch, **forward_options(args))
    aux_loss = policy_logps.pop("aux_loss", None)  # a mixture of experts' load balance
    ref_logps = window.ref_logps if window else reference(batch)
    pairs, pair_weights, tokens = counted_pairs(batch, policy_logps, ref_logps)
    if window is None and names & set(BEYOND_THE_PAIR):  # the batch, beside those of the other processes, is all of it
        (window,) = open_window([pairs], [ref_logps], world, state if train_eval == "train" else None, beta=args.beta)

    (all_pairs, own), parts = among_others(pairs, window), {}  # own: this batch's
    losses, chosen_rewards, rejected_rewards = dpo_loss(**all_pairs, **loss_options(args, state), parts=parts)
    sorts = names & set(OVER_THE_BATCH)
    losses = pair_weights * (mean_over_window(losses, len(tokens)) if sorts else losses[own])
    if aux_loss is not None:
        losses = losses + router_coefficient(model) * aux_loss
    parts = {f"loss/{name}": part[own] for name, part in parts.items()} if len(parts) > 1 else {}
    rewards = chosen_rewards[own], rejected_rewards[own]
    return losses, batch_metrics(losses, tokens, pairs, *rewards, parts, aux_loss)


# ------------------------------------------------------------------------------------------- metrics, and the gradient


def batch_metrics(losses, tokens, pairs: dict, chosen_rewards, rejected_rewards, parts: dict, aux_loss) -> dict:
    """The metrics of the README, one value a pair, (B,), without gradient."""
    rejected_rewards, best_rejected = mean_and_best(rejected_rewards, pairs["rejected_lengths"])
    metrics = {"loss": losses, "tokens": tokens, **parts}
    metrics |= {"aux_loss": aux_loss.expand_as(losses)} if aux_loss is not None else {}
    metrics |= {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > best_rejected).float(),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": pairs["chosen_logps"],
        "logps/rejected": mean_and_best(pairs["rejected_logps"], pairs["rejected_lengths"])[0],
    }
    return {key: value.detach() for key, value in metrics.items()}


def mean_and_best(rejected: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and the largest over each row's rejected completions, (B, K−1) to (B,), those of no tokens left out."""
    if rejected.ndim == 1:  # pairs: there is one
        return rejected, rejected
    present = lengths > 0
    mean = rejected.masked_fill(~present, 0).sum(dim=1) / present.sum(dim=1)
    return mean, rejected.masked_fill(~present, -math.inf).amax(dim=1)


def add_up(sums: dict, metrics: dict[str, torch.Tensor]) -> None:
    """Adds a batch's metrics, and the number of its pairs, to running sums."""
    for key, values in metrics.items():
        sums[key] += values.double().sum()
    sums["pairs"] += len(metrics["loss"])


def check_rewards_are_zero(metrics: dict[str, torch.Tensor], *, args: DPOConfig) -> None:
    """Before the first update policy and reference are one model and every reward is 0; if not, no result is right."""
    tolerance = 1.0 if args.bf16 or args.fp16 or args.dtype not in ("float32", "auto") else 1e-2
    rewards = torch.cat([metrics["rewards/chosen"], metrics["rewards/rejected"]])
    nats = float(rewards.abs().max()) / args.beta if len(rewards) else 0.0
    if not nats <= tolerance:
        why = "something random (dropout, noise), another dtype or another kernel is at work in one of them"
        raise UserError(f"policy and reference differ by {nats:.3g} nats before the first step: {why}")


def clip_gradient(run: Run, micro_batches: list[dict]) -> torch.Tensor:
    """Scales the gradient down to max_grad_norm, and returns its norm before that. One that is not finite stops the run
    while the weights are still good (float16's scaler leaves such a step out by itself)."""
    run.scaler.unscale_(run.optimizer)
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    grad_norm = distributed.clip_gradients(trained, run.args.max_grad_norm or math.inf)
    if not run.args.fp16 and not torch.isfinite(grad_norm):
        indices = distributed.gather_lists([i for batch in micro_batches for i in batch["index"].tolist()], run.world)
        rows = "; ".join(name_of_row(run, i) for i in sorted(indices)[:8] if i >= 0)
        rows += "; ..." if len(indices) > 8 else ""
        what = f"the gradient's norm is {float(grad_norm)} at step {run.state.step + 1} ({rows})"
        how = "nothing was changed: lower learning_rate or beta, or look at the rows"
        raise UserError(f"{what}: {how}; {checkpoint.last_good(run.output_dir)}")
    return grad_norm


# ----------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(
    model,
    dataset: datasets.Dataset,
    collator,
    reference: Reference,
    *,
    args: DPOConfig,
    world: World,
    state: TrainingState | None = None,
    prefix: str = "eval",
    compute_metrics=None,
) -> dict[str, float]:
    """The metrics of `get_batch_loss_metrics` over a whole tokenised dataset, each pair counted once whatever the batch
    size and the number of processes; and those of compute_metrics. Keys begin with prefix. (The loss of AOT alone goes
    by both: it sorts each batch, of all processes.)"""
    without_dropout(model)
    sizes = {"batch_size": args.per_device_eval_batch_size, "world_size": world.size}
    windows = epoch_windows(dataset["length"][:], **sizes, shuffle=False, group_by_length=True)
    loader = load_windows(dataset, windows, world, collator, num_workers=args.dataloader_num_workers)
    sums, rewards = defaultdict(float), []
    common = {"args": args, "state": state, "world": world, "train_eval": "eval"}
    for _, micro_batches in loader:
        for batch in micro_batches:
            with autocast(args, world):
                _, metrics = get_batch_loss_metrics(model, batch, reference, **common)
            add_up(sums, metrics)
            both = torch.stack([metrics["rewards/chosen"], metrics["rewards/rejected"]], dim=1)
            rewards += zip(batch["index"].tolist(), both.tolist(), strict=False) if compute_metrics else []
    result = distributed.mean_over_ranks(sums, world)
    result.pop("tokens")
    if compute_metrics:
        ordered = torch.tensor([pair for _, pair in sorted(distributed.gather_lists(rewards, world))]).numpy()
        labels = torch.zeros(len(ordered), dtype=torch.long).numpy()
        own = compute_metrics(EvalPrediction(predictions=(ordered[:, 0], ordered[:, 1]), label_ids=labels))
        if not isinstance(own, dict) or not all(isinstance(report.plain(v), int | float | None) for v in own.values()):
            raise UserError(f"compute_metrics returned {own!r}: it must return a dict of numbers")
        if taken := sorted(own.keys() & result.keys()):
            raise UserError(f"compute_metrics returned {taken[0]!r}, which is worked out already: name it otherwise")
        result |= own
    return {f"{prefix}_{key}": value for key, value in result.items()}


def evaluate_sets(run: Run, *, is_saved: bool = False) -> None:
    """Evaluates all sets and samples answers, where wanted, into one metrics row; a model that is saved now may become
    the best."""
    args, step = run.args, run.state.step
    row = {"step": step, "epoch": epoch_of(run)}
    common = {"args": args, "world": run.world, "state": run.state, "compute_metrics": run.compute_metrics}
    for label, eval_rows in run.eval_sets.items():
        prefix = f"eval_{label}" if label else "eval"
        row |= evaluate(run.model, eval_rows, run.collator, run.reference, **common, prefix=prefix)
    if run.world.rank == 0:
        tqdm.write(report.describe_evaluation(row))
    if args.generate_during_eval:
        eval_rows = next(iter(run.eval_sets.values()))
        eval_rows = eval_rows.select(range(min(args.num_samples, len(eval_rows))))
        common = (eval_rows, run.processing_class, run.world)
        options = {"reference": run.reference, "read_images": getattr(run.collator, "read_images", None)}
        options |= {"reward": run.reward, "max_new_tokens": args.max_new_tokens, "seed": args.seed}
        options |= {
            "batch_size": 1 if run.answers_alone else args.per_device_eval_batch_size,
            "file": run.output_dir / "samples.jsonl",
        }
        with autocast(args, run.world), user_errors():
            samples, means = sampling.sample_answers(run.model, *common, **options)
            report.show_samples(run.tables, samples, step=step)
        row |= means
    row = distributed.from_first(row, run.world)  # only the first process has rated the answers
    record(run, row)
    if args.load_best_model_at_end and is_saved:
        better = {"metric": args.metric_for_best_model, "greater": args.greater_is_better}
        with user_errors():
            run.state.best = checkpoint.better_of(run.state.best, row, **better)


# ----------------------------------------------------------------------------------------- around the step, and the end


def rest_of_epoch(run: Run):
    """From where the run stands to the end of its epoch, or of the run, each window's number of pairs and batches.
    Between two steps a run that was told to stop does."""
    workers = {"num_workers": run.args.dataloader_num_workers, "prefetch_factor": run.args.dataloader_prefetch_factor}
    with distributed.noted_signals(run.signals):
        epoch, done = divmod(run.state.step, run.steps_per_epoch)
        if run.stream:
            loaded = rest_of_stream(run, **workers)
        else:
            windows = plan_epoch(run, epoch)[done : done + run.total_steps - run.state.step]
            loaded = load_windows(run.train_rows, windows, run.world, run.collator, **workers)
        for pairs, batches in loaded:
            if number := distributed.agree(run.signals, run.world):
                leave(run, number)
            if run.saving and run.saving.written.done() and run.world.rank == 0:
                with naming_the_last_good(run):  # the others hear of a failure at the next save, or by torchrun
                    checkpoint.result_of(run.saving)
            run.state.stream = run.stream and run.stream.place
            batches = [ready_batch(batch, run.model) for batch in batches]
            costs.count(run.state.sums, batches, run.prices, rate=run.matrix_rate)
            costs.between_steps(run.profile, run.state.sums)
            see_window(run, batches)
            yield pairs, batches  # to the step, and whatever is due after it


def epoch_of(run: Run) -> float:
    """How often the steps so far are through the training set; of a stream, which tells nobody its length, how often
    it has begun again."""
    if run.stream:
        return run.state.stream["pass"] if run.state.stream else 0
    return run.state.step / run.steps_per_epoch


def name_of_row(run: Run, index: int) -> str:
    """Where a row of a batch comes from."""
    return source_of(run.stream, index) if run.stream else run.train_rows[index]["source"]


def see_window(run: Run, batches: list[dict]) -> None:
    """Shows each of several micro-batches the pairs of the whole window, if the loss looks beyond the pair. (A single
    one has them all in its own pass.)"""
    if len(batches) > 1 and set(loss_names(run.args)) & set(BEYOND_THE_PAIR):
        with autocast(run.args, run.world):
            seen = look_ahead(run.policy, batches, run.reference, run.world, **forward_options(run.args))
        windows = open_window(*seen, run.world, run.state, beta=run.args.beta)
        for batch, window in zip(batches, windows, strict=True):
            batch["window"] = window


def due(step: int, total_steps: int, steps_per_epoch: int, *, args: DPOConfig) -> tuple[bool, bool, bool]:
    """Whether to log, to evaluate and to save after this step. Intervals below 1 are shares of all steps."""
    is_last = step == total_steps

    def every(interval: float) -> bool:
        steps = max(1, math.ceil(interval * total_steps)) if interval < 1 else int(interval)
        return is_last or step % steps == 0

    def by(strategy: str, interval: float) -> bool:
        return {"no": False, "epoch": every(steps_per_epoch), "steps": every(interval)}[strategy]

    evaluates = by(args.eval_strategy, args.eval_steps or args.logging_steps)
    return step == 1 or every(args.logging_steps), evaluates, by(args.save_strategy, args.save_steps)


def log(run: Run, progress: dict[str, float]) -> None:
    """The metrics row of the steps since the last one: means over all pairs of all processes."""
    state = run.state
    means = distributed.mean_over_ranks(state.sums, run.world)
    state.sums.clear()
    state.tokens_seen += means.pop("tokens")
    row = {"step": state.step, "epoch": epoch_of(run), "loss": means.pop("loss")}
    row |= {"learning_rate": progress["learning_rate"], "grad_norm": float(progress["grad_norm"])}
    row |= {**means, "tokens_seen": state.tokens_seen}
    if not math.isfinite(row["loss"]):
        raise UserError(f"the loss is {row['loss']} at step {state.step}: lower learning_rate, or take bf16 for fp16")
    record(run, row)
    if run.stream:
        tell(run.stream, is_last=state.step == run.total_steps)
    shown = {"loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
    run.bar.set_postfix({label: f"{row[key]:.3f}" for label, key in shown.items()})


def record(run: Run, row: dict) -> None:
    """Keeps a metrics row, null in place of what is not finite; sends it to metrics.jsonl, trackers and callbacks."""
    row = {key: report.plain(value) for key, value in row.items()}
    run.rows.append(row)
    with user_errors():
        for receive in run.receivers:
            receive(row)


@contextmanager
def naming_the_last_good(run: Run):
    """Inside, what cannot be written stops the run in one line, which says what there is to go on from."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{error}; {checkpoint.last_good(run.output_dir)}") from error


def save(run: Run, *, whole: bool = False) -> None:
    """Begins to write checkpoint-N, whole or as the options say; once it is there the ones beyond save_total_limit
    go."""
    only_model = run.args.save_only_model and not whole
    options = {"processing_class": run.processing_class, "only_model": only_model}
    directory = run.output_dir / f"checkpoint-{run.state.step}"
    end_saving(run)
    with naming_the_last_good(run):
        run.saving = checkpoint.begin_checkpoint(directory, run.world, **options, **checkpointed(run))


def end_saving(run: Run) -> None:
    """Waits, in all processes, for the checkpoint that is being written, if any."""
    if run.saving:
        with naming_the_last_good(run):
            checkpoint.end_checkpoint(run.saving, run.world)
        tidy(run)


def tidy(run: Run) -> None:
    """What follows a checkpoint that has been written: in the first process older ones go."""
    if run.world.rank == 0:
        checkpoint.prune_checkpoints(run.output_dir, run.args.save_total_limit, run.saving.best)
        note_files(run, "training")
    run.saving = None


def leave(run: Run, number: int) -> None:
    """What a run does that was told to stop: saves a checkpoint to go on from, says how, exits with 128 + number."""
    end_saving(run)
    saved = run.output_dir / f"checkpoint-{run.state.step}" / "state.pt"
    if not distributed.by_first(saved.exists, run.world):
        save(run, whole=True)
        end_saving(run)
    run.bar.close()
    how = f"go on with --resume_from_checkpoint true --output_dir {run.output_dir}"
    logger.warning("stopped by %s after step %d: %s", signal.Signals(number).name, run.state.step, how)
    distributed.shutdown()
    sys.exit(128 + number)


def tell_costs(run: Run) -> None:
    """Ends the profile, and tells the peak of memory that was measured beside the predicted one."""
    if run.profile:
        run.profile.stop()
    measured = costs.measured_peak(run.world.device, run.memory_base)
    if run.memory and measured is not None:
        run.memory["measured"] = measured
        words = map(costs.in_words, (measured, run.memory["peak"]))
        how = "" if run.world.device.type == "cuda" else " (of the process: what it keeps, though free, counts)"
        logger.info("memory: %s at the peak measured%s, %s predicted", next(words), how, next(words))


def finish(run: Run) -> None:
    """Leaves the model, the last or the best, the reward graph and the model card in output_dir."""
    args, output_dir, world, names = run.args, run.output_dir, run.world, []
    run.bar.close()
    end_saving(run)
    tell_costs(run)
    if args.load_best_model_at_end and run.state.best:
        checkpoint.load_weights(output_dir / f"checkpoint-{run.state.best['step']}", world, run.model)
    distributed.let_go(run.optimizer, run.model)
    with naming_the_last_good(run):
        if world.rank == 0:
            note_files(run, "training", [files.FINAL])
        with files.written_aside(output_dir / files.FINAL, world) as unfinished:
            checkpoint.save_model(unfinished, world, run.model, run.processing_class)
        if world.rank == 0:
            announce = partial(note_files, run, "training")
            names = files.move_into(output_dir / files.FINAL, output_dir, announce=announce)
            if args.merge_adapter:
                note_files(run, "training", [*names, "merged"])
                kwargs = {**how_to_load(args), **args.model_init_kwargs}
                kwargs["revision"] = args.model_revision if args.use_peft else "main"
                merge_adapter(str(output_dir), output_dir / "merged", **kwargs)
                names.append("merged")
    if world.rank == 0:
        report.plot_rewards(run.rows, output_dir / "rewards.png")
        sources = {"model_name": run.sources.get("model_name_or_path"), "dataset_name": run.sources.get("dataset_name")}
        create_model_card(
            output_dir,
            **sources,
            rows=run.rows,
            adapter=isinstance(run.model, PeftModel),
            reads=reads(run.model, run.processing_class),
        )
        note_files(run, "finished", names)
        run.lock.close()
        logger.info("Saved in %s: the model, metrics.jsonl, rewards.png, config.yaml, README.md", output_dir)
    distributed.barrier(world)
    run.model.eval()


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s")
    try:
        run = train(args=parse_args(sys.argv[1:] if argv is None else argv))
    except (UserError, OSError) as error:  # a disk may be full, or gone, at any time
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if not distributed.is_of_another(error):
            raise
        sys.exit(f"error: another process has ended, whose own words say why: {first_line(error)}")
    except KeyboardInterrupt:  # before the first step; later ones are noted
        sys.exit(128 + signal.SIGINT)
    if distributed.is_first():
        logger.info("Talk to it:  python -m dpo.chat --model_name_or_path %s", run.output_dir)
    distributed.shutdown()


if __name__ == "__main__":
    main()
