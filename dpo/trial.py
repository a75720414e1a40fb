"""What a run finds out about its model before it trains: does it read the rows, in which layout, at what cost?"""

import dataclasses
import logging
import math
from typing import TYPE_CHECKING

import datasets
import torch

from dpo import adapters, checks, costs, distributed
from dpo.attention import attend_by_segments
from dpo.batches import moved
from dpo.build import autocast, make_collator
from dpo.collate import DataCollatorForPreference, ready_batch
from dpo.config import DPOConfig, UserError
from dpo.logprobs import concatenated_forward, positions_within, takes
from dpo.rows import first_line

if TYPE_CHECKING:  # which imports this file
    from dpo.prepare import Run

logger = logging.getLogger("dpo")


def check_reading(run: "Run") -> None:
    """Tries the model on a few training rows: it must read them as `checks.check_reading` has it, see their pictures,
    and where answers are sampled generate what it has learnt to say."""
    args, rows = run.args, run.train_rows
    shown = pictures_of(rows)
    is_quiet = args.disable_dropout and not adapters.drops_out(run.model)
    collator = run.collator
    if isinstance(collator, DataCollatorForPreference) and collator.layout != "plain":
        collator = dataclasses.replace(collator, layout="padded")
    for number, others in checks.rows_to_try(rows["length"][:], shown):
        alone, together = (
            moved(ready_batch(collator([rows[i] for i in each]), run.model), run.world.device)
            for each in ([number], [*others, number])
        )
        read = alone["inputs"].keys() - {"input_ids", "attention_mask", "decoder_input_ids", "logits_to_keep"}
        if shown[number] and not any(takes(run.model, name) for name in read):
            what = "the model has no use for" if read else "the data_collator does not hand on (give it read_images)"
            raise UserError(f"{rows[number]['source']} has pictures, which {what}")
        with autocast(args, run.world):
            result = checks.check_reading(run.model, alone, together, is_quiet=is_quiet)
        if args.output_router_logits and "aux_loss" not in result:
            kind = type(distributed.unwrap(run.model)).__name__
            raise UserError(f"output_router_logits: {kind} works out no load balance: leave it out")
    if args.generate_during_eval:
        asked = next(iter(run.eval_sets.values()))
        asked = [asked[i] for i in range(min(args.num_samples, len(asked), 8))]
        asked.sort(key=lambda row: len(row["prompt_input_ids"]))
        collator = make_collator(run.processing_class, run.model, args=args)
        with autocast(args, run.world):
            if words := checks.generates_otherwise(run.model, asked[:1], collator):
                raise UserError(words)
            # One that does so beside others alone, whose padding it takes for text, is asked one prompt at a time.
            run.answers_alone = bool(checks.generates_otherwise(run.model, asked, collator))


def pictures_of(rows: datasets.Dataset) -> list[int]:
    """How many pictures each tokenised row has."""
    return [len(each) for each in rows["pictures"][:]] if "pictures" in rows.column_names else [0] * len(rows)


def choose_layout(run: "Run", *, collator_is_given: bool = False) -> str:
    """Gives the collator the layout asked for, or with auto the first of prefix_shared and padding_free that gives the
    log-probabilities of padded, else padded. Returns, in words: which, and why. The first process decides for all.

    Raises: UserError if a layout was asked for by name, and policy or reference does not compute it exactly.
    """
    asked, own = run.args.layout, run.collator
    if not isinstance(own, DataCollatorForPreference):
        return "that of the data_collator"
    if collator_is_given:  # one of the plain layout is made ready as padded
        asked = own.layout if own.layout != "plain" else "padded"
    if asked == "padded":
        return asked
    if run.args.fsdp:  # no process could ask the model alone
        layout, words = exact_layout(run, asked)
    else:
        layout, words = distributed.by_first(lambda: exact_layout(run, asked), run.world)
    run.collator = dataclasses.replace(own, layout=layout)
    for model in (run.model, run.reference.ref_model):
        if layout != "padded" and model is not None:
            attend_by_segments(distributed.unwrap(model))
    return f"{layout} ({words})"


def exact_layout(run: "Run", asked: str) -> tuple[str, str]:
    """(the layout asked for, or that which auto takes; why)."""
    own = run.collator
    layout, words = None, "padding_free, prefix_shared: an encoder-decoder reads prompts and completions apart"
    if own.decoder_start_ids is None:
        with autocast(run.args, run.world):
            layout, words = checks.first_exact_layout(
                [each for each in (run.model, run.reference.ref_model) if each is not None],
                dataclasses.replace(own, layout="padded"),
                ("prefix_shared", "padding_free") if asked == "auto" else (asked,),
                rows_for_layouts([run.train_rows, *run.eval_sets.values()]),
                batch_size=largest_batch(run.args),
                is_quiet=run.args.disable_dropout and not adapters.drops_out(run.model),
            )
    if layout is None and asked != "auto":
        raise UserError(f"{words}: leave out layout {asked}, auto takes one that is exact")
    return layout or "padded", words


def largest_batch(args: DPOConfig) -> int:
    """The most rows that one forward pass may have."""
    evaluates = args.per_device_eval_batch_size if args.eval_strategy != "no" else 0
    trains = args.per_device_train_batch_size
    if args.max_tokens_per_micro_batch:  # which may put all rows of a step into one pass
        trains *= args.gradient_accumulation_steps
    return max(trains, args.precompute_ref_batch_size or 0, evaluates)


def choose_head(run: "Run") -> None:
    """Leaves the head whole, whatever its logits take, where chunks of it would be another model's. Raises: UserError
    if logits_budget was set by the caller."""
    args, reference = run.args, run.reference
    if not args.logits_budget:
        return
    lengths = run.train_rows["length"][:]
    shortest = run.train_rows[lengths.index(min(lengths))]
    batch = moved(ready_batch(run.collator([shortest]), run.model), run.world.device)
    sides = [distributed.unwrap(each) for each in (run.model, reference.ref_model) if each is not None]
    if all(checks.head_error(model, batch) <= checks.TOLERANCE for model in sides):
        return
    if args.logits_budget != DPOConfig.logits_budget:
        kind = type(distributed.unwrap(run.model)).__name__
        raise UserError(f"logits_budget: the head of {kind} does not work in chunks: leave it out")
    args.logits_budget = reference.logits_budget = None


def rows_for_layouts(sets: list[datasets.Dataset]) -> list[dict]:
    """The rows that layouts are tried on, by length: some of each set, since an evaluation may have longer ones than
    the training, and before them the shortest with a prompt of one token, nearest to what stands before it."""
    tried = [(rows, i) for rows in sets for i in checks.rows_of_all_lengths(rows["length"][:], pictures_of(rows))]
    rows = sorted((rows[i] | {"scored": []} for rows, i in tried), key=lambda row: row["length"])
    cut = {**rows[0], "prompt_input_ids": rows[0]["prompt_input_ids"][-1:]}
    return rows if rows[0].get("pictures") else [cut, *rows]


def foresee(run: "Run", windows: list) -> None:
    """What a step will cost: the prices of its FLOPs and the device's rate, if they were asked for, and its memory at
    the peak, which from here on is measured, too. windows, of an epoch."""
    args, model, reference, device = run.args, run.model, run.reference, run.world.device
    if args.measure_utilisation:
        try:
            run.prices = [costs.prices(model, trains=True)]
            if reference.exists and not reference.is_cached:
                run.prices.append(costs.prices(reference.ref_model or model, trains=False))
            held = next(p.dtype for p in model.parameters() if p.is_floating_point())
            dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else held
            run.matrix_rate = costs.matrix_rate(device, dtype)
            logger.info("matrix products: %.3g FLOPs a second", run.matrix_rate)
        except Exception as error:  # of one of many families' own configurations
            logger.info("utilisation is left out: %s", first_line(error))
    try:
        run.memory = {} if args.fsdp else predict_memory(run, windows)  # tutorial 8 has the plan of one in shards
    except Exception as error:  # of one of many families' own ways to fail: a run does not depend on it
        logger.info("memory: not predicted, %s", first_line(error))
    if run.state.sums.get("pairs") and run.prices and "best_seconds" not in run.state.sums:
        run.state.sums["best_seconds"] = math.nan  # of the steps before, resumed without, nobody knows
    elif not run.prices:
        run.state.sums.pop("best_seconds", None)
    there = ("weights", "reference", "optimizer") if run.optimizer.state else ("weights", "reference")
    there = sum(run.memory.get(name, 0) for name in there)
    run.memory_base = costs.begin_measuring(device, there)


def predict_memory(run: "Run", windows: list) -> dict[str, float]:
    """`costs.predict_memory` of the run's largest micro-batch, told by its shortest row and a middling one."""
    args, rows, lengths, device = run.args, run.train_rows, run.train_rows["length"][:], run.world.device

    def batch_of(numbers: list[int]) -> dict:
        return ready_batch(run.collator([rows[i] for i in numbers]), run.model)

    def score(batch: dict) -> dict:
        with autocast(args, run.world):
            return concatenated_forward(run.model, batch, ld_alpha=args.ld_alpha)

    micros = [own for window in windows[: run.total_steps] for micro in window for own in micro if own]
    longest, largest = (
        batch_of(max(micros, key=size))
        for size in (lambda own: len(own) * max(lengths[i] for i in own), lambda own: sum(lengths[i] for i in own))
    )
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    two = [order[:1], [order[len(order) // 2], order[0]][: args.per_device_train_batch_size]]
    sizes = {"tokens": max(map(costs.tokens_read, (longest, largest)))}
    sizes["kept"] = max(len(each["targets"]) for each in (longest, largest))
    reference = run.reference.bytes() if run.reference.ref_model is not None else 0  # an adapter is in the policy
    with checks.modes_kept(run.model), torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
        return costs.predict_memory(
            run.model.train(),
            score,
            [moved(batch_of(numbers), device) for numbers in two],
            **sizes,
            optimizer=costs.optimizer_bytes(run.optimizer),
            reference=reference,
            accumulates=max(map(len, windows)) > 1,
            copies=2 if run.policy is not run.model else 1,
            chunk=positions_within(run.model, args.logits_budget) if args.logits_budget else sizes["kept"],
        )
