"""Is a model fit to be trained on these rows, to be saved afterwards, and to answer by what it learnt?"""

import itertools
import math
import re
from contextlib import contextmanager
from dataclasses import replace

import torch
from peft import PeftModel

from dpo.attention import attend_as_before, attend_by_segments
from dpo.batches import moved
from dpo.collate import DataCollatorForPreference, decoder_start_ids
from dpo.conversations import tokenizer_of
from dpo.distributed import unwrap
from dpo.logprobs import concatenated_forward, forward_in_chunks, forward_kept_positions, token_logps
from dpo.reference import without_aux_loss
from dpo.rows import first_line
from dpo.sampling import prompts_of
from dpo.sharding import device_of, local

# Nats a token, in float32, of another layout, or of a head in chunks. Of 189 small families the exact ones differ by
# 2e-5 at most, a window that is one key too wide by 3e-3; SmolLM2, of 30 layers, by 3e-5.
TOLERANCE = 1.5e-4
ROUGHLY = 0.1  # of a token's log-probability, the same in 16 bits: another kernel, or none
MOST_POSITIONS = 512  # whose logits are compared: all of long rows at once might not fit into memory


def rows_to_try(lengths: list[int], pictures: list[int]) -> list[tuple[int, set[int]]]:
    """(a row, others to put before it) to try a model on, short ones: the shortest row, and where some have pictures
    the shortest with some, too, behind the shortest with the most of them."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    shortest = {pictures[row]: row for row in reversed(order)}  # of each number of pictures
    counts = sorted(shortest)
    tried = [shortest[count] for count in counts[: 2 if counts[0] == 0 else 1]]
    others = {order[len(order) // 4], *(tried + [shortest[counts[-1]]] if len(counts) > 1 else [])}
    return [(row, others) for row in tried]


def rows_of_all_lengths(lengths: list[int], pictures: list[int]) -> list[int]:
    """Rows that a layout is tried on: the longest, beyond which no window matters to these rows, the shortest, a
    middling one, and of those with the most pictures the longest, too, if there are any."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    tried = [order[0], order[-1], order[len(order) // 2]]
    if max(pictures):
        tried.append(max(order, key=lambda row: (pictures[row], lengths[row])))
    return list(dict.fromkeys(tried))


@torch.no_grad()
def check_reading(model: torch.nn.Module, alone: dict, together: dict, *, is_quiet: bool) -> dict[str, torch.Tensor]:
    """Refuses a model that would be trained on something else than log π(y|x), by what it says of a row.

    Its positions must not see later ones (those of BERT, loaded as if it were a decoder, do: it would read the answer).
    And in float32 a row must have the same log-probabilities alone and beside others (not so where a batch's tokens
    compete for the room of an expert), and in training mode those of evaluation.

    Args: alone, a ready batch of one row; together, of others and that row; is_quiet, whether no dropout is left.
    Returns: what `concatenated_forward` gives of the row alone.
    """
    kind = type(unwrap(model)).__name__
    try:
        with modes_kept(model):
            earlier, later, noise = changes_by_a_last_token(model.eval(), alone["inputs"])
            result = concatenated_forward(model, alone)
            by_itself, beside = logps_of_last(result), logps_of_last(concatenated_forward(model, together))
            if is_quiet:
                with torch.random.fork_rng():
                    trained = logps_of_last(concatenated_forward(model.train(), alone))
    except Exception as error:  # of one of many families' own ways to fail
        raise ValueError(f"{kind} cannot read the rows: {first_line(error)}") from error
    share = 0.1 if getattr(model, "is_quantized", False) else 1e-3  # 8 bits are rounded by what a batch has
    if earlier > share * later + 10 * noise:
        raise ValueError(f"{kind} sees later tokens, it is no causal language model: take one that generates text")
    is_noisy = not is_exact(model, by_itself.device) or noise >= 1e-3
    if is_noisy or torch.get_float32_matmul_precision() != "highest":
        return result
    tolerance = 1e-4 * abs(by_itself) + 1e-3
    if ((by_itself - beside).abs() > tolerance).any():
        nats = f"{in_words(by_itself)} and {in_words(beside)} nats"
        raise ValueError(f"{kind} gives a completion other log-probabilities beside other rows than alone ({nats})")
    if is_quiet and ((by_itself - trained).abs() > tolerance).any():
        what = "gives other log-probabilities in training than in evaluation, without dropout"
        raise ValueError(f"{kind} {what} ({in_words(trained)} and {in_words(by_itself)} nats)")
    return result


def changes_by_a_last_token(model: torch.nn.Module, inputs: dict) -> tuple[float, float, float]:
    """How far logits move when each sequence gets another last token: (at most, at the positions before it; at its own;
    when nothing changes, which is noise, and somebody else's to refuse).

        input     x₁ x₂ y₁ y₂ y₃        decoder   ▸  y₁ y₂
        kept         ·  ·  ·            kept      ·  ·  ·
        changed               ↑         changed         ↑      a decoder's last input predicts the last target
    """
    key = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    keep, ids = inputs["logits_to_keep"], inputs[key]
    rows = torch.arange(len(ids), device=ids.device)
    last = keep.shape[1] - 1 - keep.flip(1).long().argmax(dim=1) + (key == "input_ids")
    keep = keep.index_put((rows, last), torch.tensor(True, device=keep.device))
    changed = ids.index_put((rows, last), torch.where(ids[rows, last] == 1, 2, 1))
    first, again, other = (
        forward_kept_positions(model, {**inputs, "logits_to_keep": keep, key: each})[1] for each in (ids, ids, changed)
    )
    row, position = keep.nonzero().T
    moved, is_earlier = (first - other).abs().amax(dim=1), position < last[row]
    earlier = float(moved[is_earlier].max()) if is_earlier.any() else 0.0
    return earlier, float(moved[~is_earlier].max()), float((first - again).abs().max())


def logps_of_last(result: dict[str, torch.Tensor]) -> torch.Tensor:
    """(K,) log π of the completions of a batch's last row, of what `concatenated_forward` gave."""
    return torch.cat([result["chosen_logps"][-1:], result["rejected_logps"][-1].flatten()])


def first_exact_layout(
    models: list[torch.nn.Module],
    collator: DataCollatorForPreference,
    layouts: tuple[str, ...],
    rows: list[dict],
    *,
    batch_size: int,
    is_quiet: bool,
) -> tuple[str | None, str]:
    """(the first of some flat layouts in which models give the log-probabilities of the padded one, or None; why, in
    words). The models have to be told by `attention.attend_by_segments`.

    Args: models, the policy and perhaps a reference; collator, of the padded layout; rows, tokenised, by length;
    batch_size, how many of them a forward pass may have; is_quiet, whether no dropout is left in the policy.
    """
    models = [unwrap(model) for model in models]
    policy = models[0]
    configs = [str(getattr(model, "config", None)) for model in models]
    # A copy of the policy reads as the policy does.
    asked = [policy, *(model for model, own in zip(models, configs, strict=True) if own != configs[0])]
    # The smallest first: a family that counts positions by itself has none in its table for the end of a long row, and
    # looking there ends a process that is on a GPU.
    tries, why = ((rows[:1], []), (rows, [rows[-1]] * batch_size)), []
    for layout in layouts:
        try:
            error = 0.0
            for (tried, company), model in itertools.product(tries, asked):
                how = {"company": company, "trains": model is policy, "is_quiet": is_quiet}
                error = max(error, layout_error(model, tried, collator, layout, **how))
                if error > TOLERANCE:
                    break
            if error <= TOLERANCE:
                return layout, "; ".join([f"as padded to {error:.0e} nats a token", *why])
            why.append(f"{layout} differs from padded by {error:.2g} nats a token")
        except ValueError as error:
            why.append(f"{layout}: {error}")
    for model in models:
        attend_as_before(model)
    return None, "; ".join(why)


@torch.no_grad()
def layout_error(
    model: torch.nn.Module,
    rows: list[dict],
    collator: DataCollatorForPreference,
    layout: str,
    *,
    company: list[dict],
    trains: bool,
    is_quiet: bool,
) -> float:
    """The largest difference, in nats of a token, between log-probabilities in a flat layout and in the padded one,
    computed in float32 whatever the model's dtype: what remains is what the family does with the layout. The model is
    left as `attention.attend_by_segments` has it, with which padded batches must give what they did, too.

    Args: rows, tokenised, longer than its windows; company, what stands before them in the flat row only, so much that
    no batch is longer: some families count a row's tokens (Llama 4); trains, whether to try training mode, too, and
    is_quiet, whether no dropout is left, so that it must give the same.
    Raises: ValueError if the model cannot read such rows.
    """
    device = device_of(model)
    padded, flat, long = (
        moved(replace(collator, layout=each)(of), device)
        for each, of in (("padded", rows), (layout, rows), (layout, [*company, *rows]))
    )
    own = long["owner"] % len(long["tokens"]) >= len(company)
    long["inputs"]["logits_to_keep"], long["targets"] = long["inputs"]["logits_to_keep"][own], long["targets"][own]
    for batch in (padded, flat, long):
        keep_some(batch, most=MOST_POSITIONS)

    def logps(batch: dict) -> torch.Tensor:
        output, logits = forward_kept_positions(model, batch["inputs"])
        if isinstance(getattr(output, "aux_loss", None), torch.Tensor):
            raise ValueError("its load balance is of the tokens of a padded batch")
        return token_logps(logits, batch["targets"])

    try:
        with modes_kept(model):
            with (
                in_float32(model),
                torch.autocast(device.type, enabled=False),
                torch.random.fork_rng(),
                no_zeros(model),
            ):
                attend_as_before(model.eval())
                expected = logps(padded)
                attend_by_segments(model)
                found = [logps(padded), logps(long)]
                if trains:
                    model.train()
                    trained = logps(flat)
                    found += [trained] if is_quiet else []
            if not is_exact(model, device):  # on a GPU another kernel computes attention in 16 bits
                model.eval()
                rough, other = logps(long), logps(padded)
                if not (rough - other).abs().mean() < ROUGHLY * other.abs().mean():
                    raise ValueError("in its own precision it is far from padded")
    except Exception as error:  # of one of many families' own ways to fail
        raise ValueError(f"{type(unwrap(model)).__name__} cannot read it: {first_line(error)}") from error
    error = float((torch.stack(found) - expected).abs().max())
    return error if math.isfinite(error) else math.inf


def is_exact(model: torch.nn.Module, device: torch.device) -> bool:
    """Whether a model computes in float32."""
    return all(p.dtype == torch.float32 for p in model.parameters()) and not torch.is_autocast_enabled(device.type)


def keep_some(batch: dict, *, most: int) -> None:
    """Of a ready batch's kept positions leaves at most so many, evenly, with their targets."""
    keep, count = batch["inputs"]["logits_to_keep"], len(batch["targets"])
    some = torch.arange(0, count, -(-count // most), device=batch["targets"].device)
    batch["targets"] = batch["targets"][some]
    if keep.ndim == 1:
        batch["inputs"]["logits_to_keep"] = keep[some]
    else:
        batch["inputs"]["logits_to_keep"] = torch.zeros_like(keep).index_put(
            tuple(keep.nonzero()[some].T), torch.tensor(True, device=keep.device)
        )


@torch.no_grad()
def head_error(model: torch.nn.Module, batch: dict) -> float:
    """The largest difference, in nats of a token, that it makes to work out the logits in chunks, in float32: none,
    unless a family does something to its logits that `logprobs.scale_and_cap` does not know."""
    inputs, targets = batch["inputs"], batch["targets"]
    try:
        with modes_kept(model), in_float32(model), torch.autocast(targets.device.type, enabled=False):
            whole = token_logps(forward_kept_positions(model.eval(), inputs)[1], targets)
            _, parts, _ = forward_in_chunks(model, inputs, targets, chunk=len(targets) // 3 + 1, aligned=False)
    except Exception:  # of one of many families' own ways to fail
        return math.inf
    difference = float((whole - parts).abs().max())
    return difference if math.isfinite(difference) else math.inf


@contextmanager
def modes_kept(model: torch.nn.Module):
    """Afterwards each module of a model trains, or evaluates, as it did: in a reference layers of bitsandbytes train
    beside others that do not (see `reference.without_dropout`)."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, trains in modes:
            module.training = trains


@contextmanager
def in_float32(model: torch.nn.Module):
    """Inside, weights of 16 bits are float32, 4-bit layers compute in it, and no product is rounded to TF32; afterwards
    all is as it was. (A weight that is no plain tensor stays: what holds it packed may not give back the same.)"""
    held = [each for each in (*model.parameters(), *model.buffers()) if type(each.data) is torch.Tensor]
    halves = [(each, each.dtype) for each in held if each.dtype in (torch.bfloat16, torch.float16)]
    layers = [(each, each.compute_dtype) for each in model.modules() if hasattr(each, "compute_dtype")]
    precision, rounds = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        for each, _ in halves:
            each.data = each.data.float()
        for layer, _ in layers:
            layer.compute_dtype = torch.float32
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = rounds
        for each, dtype in halves:
            each.data = each.data.to(dtype)
        for layer, dtype in layers:
            layer.compute_dtype = dtype


@contextmanager
def no_zeros(model: torch.nn.Module):
    """Inside, weights that are all zero, as new parts begin, are small random numbers: what they will do shows, too."""
    floats = (local(each) for each in model.parameters() if each.is_floating_point() and not each.is_meta)
    zeros = [each for each in floats if not each.any()]
    try:
        for each in zeros:
            each.normal_(std=0.02)
        yield
    finally:
        for each in zeros:
            each.zero_()


def in_words(values: torch.Tensor) -> str:
    return ", ".join(f"{value:.4f}" for value in values.tolist())


def check_rows_fit(model: torch.nn.Module, *, largest: int, longest: int) -> None:
    """Refuses rows whose largest token id the model has not, or that are longer than a model with an embedding for each
    position (GPT-2, OPT) can read."""
    try:
        vocabulary = model.get_input_embeddings().num_embeddings
    except (NotImplementedError, AttributeError):  # a model of another make
        vocabulary = math.inf
    if largest >= vocabulary:
        how = "take the model's own tokenizer, or resize_token_embeddings before the training"
        raise ValueError(f"the tokenizer gives the id {largest}, the model knows {vocabulary} tokens: {how}")
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text_config, "max_position_embeddings", None)
    tables = [m for name, m in model.named_modules() if re.search(r"wpe$|position", name.rpartition(".")[2])]
    if limit is None or not any(isinstance(m, torch.nn.Embedding) and m.num_embeddings >= limit for m in tables):
        return
    if longest > limit:
        raise ValueError(f"rows have up to {longest} tokens, the model has {limit} positions: set max_length {limit}")


def check_trainable(model: torch.nn.Module, *, fp16: bool) -> None:
    """Refuses a policy that cannot be trained, or not be saved afterwards."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("the model has no parameter that trains: load its adapter with is_trainable=True")
    if isinstance(model, PeftModel) and getattr(model.peft_config[model.active_adapter], "lora_alpha", 1) == 0:
        raise ValueError("lora_alpha of the model's adapter is 0: it would change nothing")
    if getattr(model, "is_quantized", False) and not isinstance(model, PeftModel):
        raise ValueError("a model in 4 or 8 bits can only train an adapter: add use_peft or peft_config")
    half = [name for name, parameter in trained.items() if parameter.dtype == torch.float16]
    if fp16 and half:
        raise ValueError(f"fp16 needs float32 weights, {half[0]} is in float16: load the model with dtype float32")
    settings = getattr(model, "generation_config", None)
    try:
        if settings is not None:
            settings.validate(strict=True)
    except ValueError as error:
        if settings.do_sample:
            raise ValueError(
                f"the model's generation_config cannot be saved: {' '.join(str(error).split())}"
            ) from error
        settings.do_sample = True  # a temperature without sampling: what its author meant, and what can be saved
        check_trainable(model, fp16=fp16)


@torch.no_grad()
def generation_error(model, rows: list[dict], collator: DataCollatorForPreference) -> float:
    """The largest difference between the logits by which `generate` would go on from rows' prompts, beside each other
    and from a cache, and those that training sees. A family's cache may forget what its training knows, or its
    positions may count padding.

    Args: rows, tokenised, whose chosen completions it is made to say; collator, of the padded layout.
    Raises: ValueError if the model cannot generate.
    """
    device = device_of(model)
    first, *forced = collator.decoder_start_ids or [None]
    said = [[*forced, *row["chosen_input_ids"]] for row in rows]
    steps = min(6, *map(len, said))
    prompt = prompts_of(moved(replace(collator, layout="plain")(rows), device), model)
    before = prompt["input_ids"].shape[1] if first is None else 1
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": steps, "pad_token_id": collator.pad_token_id}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    try:
        with modes_kept(model):
            with without_aux_loss(model.eval()):
                made = model.generate(
                    **prompt, **options, prefix_allowed_tokens_fn=lambda row, ids: [said[row][len(ids) - before]]
                )
            cut = [
                {**row, "chosen_input_ids": row["chosen_input_ids"][: steps - len(forced)], "scored": []}
                for row in rows
            ]
            _, logits = forward_kept_positions(model, moved(collator(cut), device)["inputs"])
    except Exception as error:  # one of many families' own ways to generate, or it has none
        raise ValueError(f"{type(unwrap(model)).__name__} cannot generate: {first_line(error)}") from error
    trained = logits[: len(rows) * (steps - len(forced))].unflatten(0, (len(rows), -1))
    difference = torch.stack(made.logits[len(forced) :], dim=1).float() - trained.float()
    return float(difference.nan_to_num(0.0, 0.0, 0.0).abs().max())  # what both exclude is equal


def generates_otherwise(model: torch.nn.Module, rows: list[dict], collator: DataCollatorForPreference) -> str:
    """In words, that a model generates by other logits than it trains; empty where it does not. Args and errors as of
    `generation_error`."""
    device = device_of(model)
    if (error := generation_error(model, rows, collator)) <= (0.01 if is_exact(model, device) else 1.0):
        return ""
    return f"{type(unwrap(model)).__name__} generates by other logits than it trains (by {error:.2g})"


def check_answers(model: torch.nn.Module, processor) -> None:
    """Refuses a model that would answer by other logits than it was trained to have: so some families' caches."""
    tokenizer = tokenizer_of(processor)
    ids = tokenizer("Hello, who are you?", add_special_tokens=False)["input_ids"]
    row = dict.fromkeys(("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"), ids)
    start = decoder_start_ids(model) if getattr(model.config, "is_encoder_decoder", False) else None
    collator = DataCollatorForPreference(tokenizer.pad_token_id or 0, "padded", decoder_start_ids=start)
    if words := generates_otherwise(model, [row], collator):
        raise ValueError(words)
