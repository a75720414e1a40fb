"""Answers sampled from policy and reference side by side, shown, scored and kept: what the rewards mean in words."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from pkgutil import resolve_name

import torch
from tqdm.auto import tqdm

from dpo import report
from dpo.collate import DataCollatorForPreference, tokens_first
from dpo.conversations import tokenizer_of
from dpo.distributed import World, gather_lists
from dpo.reference import Reference, without_aux_loss
from dpo.rows import first_line
from dpo.sharding import device_of, is_sharded


@torch.no_grad()
def generate_from_model_and_ref(
    model,
    batch: dict,
    processing_class,
    *,
    reference: Reference | None = None,
    max_new_tokens: int = 128,
    seed: int = 0,
) -> tuple[list[str], list[str] | None]:
    """Samples an answer to each of B prompts from policy and reference, at temperature 1, from the whole vocabulary:
    what the model is, not what its generation_config would make of it.

    Args: batch, of the plain layout: prompt_input_ids left-padded, their mask, and whatever else it has of the prompts.
    Returns: (B policy answers, B reference answers or None without a reference). Random numbers come from seed alone.
    """
    prompt, tokenizer = prompts_of(batch, model), tokenizer_of(processing_class)
    asked = prompt["input_ids"]
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0}
    sampling |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1}
    sampling |= {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    sampling["synced_gpus"] = is_sharded(model)  # no process ends before the last has, which gathers its share, too

    def sample(from_model) -> list[str]:
        with torch.random.fork_rng():  # the same noise for both, and none taken from the training's
            torch.manual_seed(seed)
            # A mixture of experts' balance is worked out over whole sequences, which generation does not have.
            try:
                with without_aux_loss(from_model):
                    ids = from_model.generate(**prompt, **sampling)
            except Exception as error:  # of one of many families' own ways to generate, or it has none
                raise ValueError(f"a {type(from_model).__name__} cannot generate: {first_line(error)}") from error
        is_repeated = torch.equal(ids[:, : asked.shape[1]], asked)  # not so by an encoder-decoder
        return tokenizer.batch_decode(ids[:, asked.shape[1] :] if is_repeated else ids, skip_special_tokens=True)

    model.eval()
    answers = sample(model)
    with reference.model() if reference is not None else nullcontext() as ref_model:
        return answers, sample(ref_model) if ref_model is not None else None


def prompts_of(batch: dict, model) -> dict[str, torch.Tensor]:
    """What generate takes of a batch's prompts, by its names. A decoder goes on from the right end of a prompt, padding
    is on the left; an encoder counts positions from the left, padding goes to the right."""
    prompt = {key.removeprefix("prompt_"): value for key, value in batch.items() if key.startswith("prompt_")}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        order = tokens_first(prompt["attention_mask"])
        prompt |= {key: prompt[key].gather(1, order) for key in ("input_ids", "attention_mask")}
    return prompt


def answers_to(
    model, rows: list[dict], processing_class, *, read_images: Callable | None = None, **options
) -> list[dict[str, str]]:
    """Answers to the prompts of a few tokenised rows: {"prompt", "policy", and "reference" where there is one} of each.

    Args: read_images, the collator's; options of `generate_from_model_and_ref`.
    """
    tokenizer = tokenizer_of(processing_class)
    collator = DataCollatorForPreference(tokenizer.pad_token_id or 0, read_images=read_images)
    batch = {key: value.to(device_of(model)) for key, value in collator(rows).items()}
    answers, references = generate_from_model_and_ref(model, batch, processing_class, **options)
    samples = []
    for i, row in enumerate(rows):
        prompt = tokenizer.decode(row["prompt_input_ids"], skip_special_tokens=True)
        of_reference = {"reference": references[i]} if references else {}
        samples.append({"prompt": prompt, **of_reference, "policy": answers[i]})
    return samples


def sample_answers(
    model,
    rows,
    processing_class,
    world: World,
    *,
    reward: Callable | None = None,
    batch_size: int = 8,
    file=None,
    **options,
) -> tuple[list[dict], dict[str, float]]:
    """Answers to the prompts of tokenised rows, the same on any number of processes, which share them: the first one
    prints the first few and appends all to file.

    Args: reward rates an answer to a prompt; options of `answers_to`.
    Returns: in the first process, (all answers, the mean rewards under metric names, empty without reward).
    """
    batches = [range(start, min(start + batch_size, len(rows))) for start in range(0, len(rows), batch_size)]
    own = []
    for turn in range(0, len(batches), world.size):
        numbers = batches[turn + world.rank] if turn + world.rank < len(batches) else range(0)
        if numbers or is_sharded(model):  # whose processes generate together: one without a prompt takes the first
            answers = answers_to(model, [rows[i] for i in numbers or [0]], processing_class, **options)
            own += zip(numbers, answers, strict=False)
    samples = [sample for _, sample in sorted(gather_lists(own, world), key=lambda each: each[0])]
    if world.rank > 0:
        return [], {}
    for sample in samples if reward else ():
        for who in {"reference", "policy"} & sample.keys():
            sample[f"{who}_reward"] = float(reward(sample["prompt"], sample[who]))
    rated = [f"{who}_reward" for who in ("reference", "policy") if f"{who}_reward" in samples[0]]
    means = {key: sum(sample[key] for sample in samples) / len(samples) for key in rated}
    for sample in samples if file else ():
        report.append_row(file, sample)
    tqdm.write(describe_samples(samples, means))
    return samples, {f"eval_samples/{key}": value for key, value in means.items()}


def load_reward(name: str | None) -> Callable[[str, str], float] | None:
    """sample_reward's value, "module:function", as the function (prompt, answer) -> float."""
    try:
        reward = resolve_name(name) if name else None
        if reward is not None:
            inspect.signature(reward).bind("prompt", "answer")
        return reward
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"sample_reward {name!r}: {error}; write it module:function") from error


def describe_samples(samples: list[dict], means: dict[str, float], *, shown: int = 3) -> str:
    """The first samples as text, the reference's answer above the policy's, and the mean rewards of all."""
    lines = []
    for sample in samples[:shown]:
        lines += ["", f"  prompt     {sample['prompt'].strip()}"]
        for who in ("reference", "policy"):
            if who in sample:
                rating = f"   [reward {sample[f'{who}_reward']:.2f}]" if means else ""
                lines.append(f"  {who:9s}  {sample[who].strip()}{rating}")
    if means:
        by_model = ", ".join(f"{who.removesuffix('_reward')} {mean:.3f}" for who, mean in means.items())
        lines += ["", f"  mean reward of {len(samples)} sampled answers: {by_model}"]
    return "\n".join(lines) + "\n"
