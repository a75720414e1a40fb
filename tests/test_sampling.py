"""Sampled answers: of policy and reference, from the whole vocabulary, by their own random numbers."""

import json
import math
import string
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_rows, make_tokenizer, start

from dpo.sampling import generate_from_model_and_ref

ROWS = make_rows(8)
SAMPLED = {"eval_rows": ROWS, "eval_strategy": "epoch", "eval_on_start": True, "generate_during_eval": True}


def speaker(*words: str, fall: float = 1e-3) -> torch.nn.Module:
    """A model that says nothing but these words, each e^fall times as often as the next."""
    model = make_model()
    bias = torch.full((model.config.vocab_size,), -1e4)
    for i, word in enumerate(words):  # a single letter or digit is a token without a space before it
        token = word if len(word) == 1 or word.startswith("<") else "Ġ" + word
        bias[make_tokenizer().convert_tokens_to_ids(token)] = -fall * i
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model


def samples(folder: Path, model=None, **options) -> list[dict]:
    """What a run that trains nothing has sampled before its first step, and the same again after it."""
    options = {"learning_rate": 0.0, "max_steps": 1, "num_samples": 8, **options}
    start(folder, model or make_model(), ROWS, **SAMPLED, **options)
    found = list(map(json.loads, (folder / "samples.jsonl").read_text().splitlines()))
    assert len(found) == 2 * options["num_samples"] and found[: len(found) // 2] == found[len(found) // 2 :]
    return found[: options["num_samples"]]


def test_samples_are_the_prompts_with_the_answers_of_policy_and_reference(tmp_path, capsys):
    options = {"num_samples": 5, "max_new_tokens": 3, "per_device_eval_batch_size": 2}
    policy = speaker("blue")  # whose author would have it say each word once
    policy.generation_config.update(do_sample=True, repetition_penalty=9.0, no_repeat_ngram_size=1, num_beams=2)
    found = samples(tmp_path, policy, ref_model=speaker("green"), **options)
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("  prompt     ") == 2 * 3  # the first three, each time
    expected = {"policy": " blue blue blue", "reference": " green green green"}
    assert found == [{"prompt": row["prompt"], **expected} for row in ROWS[:5]]
    alone = samples(tmp_path / "alone", speaker("blue"), reference_free=True, **options)
    assert alone == [{"prompt": row["prompt"], "policy": " blue blue blue"} for row in ROWS[:5]]


def test_answers_come_from_the_whole_vocabulary(tmp_path):
    letters = string.ascii_letters + string.digits  # more than the 50 likeliest that transformers would take
    found = samples(tmp_path, speaker("<|im_start|>", *letters), max_new_tokens=100)  # special tokens are no text
    assert {letter for sample in found for letter in sample["policy"]} == set(letters)


@pytest.mark.slow
def test_answers_are_drawn_as_often_as_the_model_has_them(tmp_path):
    found = samples(tmp_path, speaker("blue", "green", fall=1.0), max_new_tokens=200)
    said = "".join(sample["policy"] for sample in found).split()
    assert abs(said.count("blue") / len(said) - 1 / (1 + math.exp(-1))) < 0.04  # 1,600 words: 3.5 standard deviations


def test_seed_decides_the_samples(tmp_path):
    first, again, other = (
        samples(tmp_path / str(i), seed=seed, data_seed=0, max_new_tokens=4) for i, seed in enumerate((1, 1, 2))
    )
    assert first == again != other
    batch = {"prompt_input_ids": torch.tensor([[5, 6]]), "prompt_attention_mask": torch.ones(1, 2, dtype=torch.long)}
    model, alone = make_model(), []
    for before in (1, 2):
        torch.manual_seed(before)  # whatever random numbers were drawn before
        alone.append(generate_from_model_and_ref(model, batch, make_tokenizer(), max_new_tokens=9)[0])
    assert alone[0] == alone[1]
    assert all(sample["policy"] == sample["reference"] for sample in first)  # the same noise, and as yet one model


def test_sampling_takes_no_random_numbers_from_the_training(tmp_path):
    plain, watched = (
        start(tmp_path / name, make_model(attention_dropout=0.3), disable_dropout=False, **options).model.state_dict()
        for name, options in (("a", {}), ("b", {**SAMPLED, "num_samples": 2, "max_new_tokens": 3}))
    )
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())
