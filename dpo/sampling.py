"""Answers sampled from policy and reference side by side, shown, scored and kept: what the rewards mean in words."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm

from dpo.reference import null_ref_context


@torch.no_grad()
def generate_from_model_and_ref(
    model: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    processing_class,
    *,
    ref_model: torch.nn.Module | None = None,
    reference_free: bool = False,
    max_new_tokens: int = 128,
    seed: int = 0,
) -> tuple[list[str], list[str] | None]:
    """Samples an answer to each of B prompts from policy and reference, at temperature 1, from the whole vocabulary:
    what the model is, not what decoding makes of it.

    Args: model, ref_model as in `compute_ref_log_probs`; batch, with prompt_input_ids left-padded, and their mask.
    Returns: (B policy answers, B reference answers; None with reference_free). Random numbers come from seed alone.
    """
    prompt = {"input_ids": batch["prompt_input_ids"], "attention_mask": batch["prompt_attention_mask"]}

    def sample(from_model) -> list[str]:
        with torch.random.fork_rng():  # the same noise for both, and none taken from the training's
            torch.manual_seed(seed)
            ids = from_model.generate(
                **prompt,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_new_tokens,
                pad_token_id=processing_class.pad_token_id,
            )
        return processing_class.batch_decode(ids[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)

    model.eval()
    answers = sample(model)
    if reference_free:
        return answers, None
    if ref_model is not None:
        return answers, sample(ref_model)
    with null_ref_context(model) as base:
        return answers, sample(base)


def sample_answers(
    model: torch.nn.Module,
    rows,
    collator: Callable,
    processing_class,
    *,
    reward: Callable[[str, str], float] | None = None,
    batch_size: int = 8,
    file: Path | None = None,
    **options,
) -> dict[str, float]:
    """Answers to the prompts of tokenised rows: prints the first few, appends all to file as JSON lines.

    Args: reward scores (prompt, answer), the answers' words alone where it likes; options of
    `generate_from_model_and_ref`. Returns: the mean rewards, under metric names; empty without reward.
    """
    samples = []
    for start in range(0, len(rows), batch_size):
        part = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        batch = {key: value.to(model.device) for key, value in collator(part).items()}
        answers, references = generate_from_model_and_ref(model, batch, processing_class, **options)
        for i, row in enumerate(part):
            prompt = processing_class.decode(row["prompt_input_ids"], skip_special_tokens=True)
            reference = {"reference": references[i]} if references else {}
            samples.append({"prompt": prompt, **reference, "policy": answers[i]})
    means = score_samples(samples, reward) if reward else {}
    if file:
        with file.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(sample) + "\n" for sample in samples)
    tqdm.write(describe_samples(samples, means))
    return {f"eval_samples/{key}": value for key, value in means.items()}


def load_reward(name: str | None) -> Callable[[str, str], float] | None:
    """sample_reward's value, "module:function", as the function (prompt, answer) -> float."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"sample_reward {name!r}: {error}; write it module:function") from error


def score_samples(samples: list[dict], reward: Callable[[str, str], float]) -> dict[str, float]:
    """Adds policy_reward and reference_reward to each sample that has such an answer; returns the mean of each."""
    means = {}
    for who in ("reference", "policy"):
        answered = [sample for sample in samples if who in sample]
        for sample in answered:
            sample[f"{who}_reward"] = float(reward(sample["prompt"], sample[who]))
        if answered:
            means[f"{who}_reward"] = sum(sample[f"{who}_reward"] for sample in answered) / len(answered)
    return means


def describe_samples(samples: list[dict], means: dict[str, float], *, shown: int = 3) -> str:
    """The first samples as text, the reference's answer above the policy's, and the mean rewards of all."""
    lines = []
    for sample in samples[:shown]:
        lines += ["", f"  prompt     {sample['prompt'].strip()}"]
        for who in ("reference", "policy"):
            if who in sample:
                score = f"   [reward {sample[f'{who}_reward']:.2f}]" if means else ""
                lines.append(f"  {who:9s}  {sample[who].strip()}{score}")
    if means:
        told = ", ".join(f"{who.removesuffix('_reward')} {mean:.3f}" for who, mean in means.items())
        lines += ["", f"  mean reward of {len(samples)} sampled answers: {told}"]
    return "\n".join(lines) + "\n"
