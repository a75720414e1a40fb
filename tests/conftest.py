"""Shared by all tests: one Hypothesis profile, a tokenizer and models made on the spot, and rows to train on."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it: no test may wait for a network

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo.config import DPOConfig
from dpo.loop import train

settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True, max_examples=100)
settings.load_profile("fixed")
torch.set_num_threads(1)  # tiny models gain nothing from a second

ROOT = Path(__file__).parent.parent
FAULTS: list[tuple[str, int, int]] = []  # (kind, tries, survived), of tests/test_faults.py


def pytest_addoption(parser):
    parser.addoption("--tries", type=int, default=20, help="how often `pytest -m faults` tries each fault")


@pytest.fixture
def tries(request) -> int:
    return request.config.getoption("--tries")


def pytest_terminal_summary(terminalreporter):
    if FAULTS:
        terminalreporter.write_line("\n| fault | tries | survived |\n|---|---|---|")
        for kind, tried, survived in FAULTS:
            terminalreporter.write_line(f"| {kind} | {tried} | {survived} |")


WORDS = "the sky sea is was looks very quite blue green red grey warm cold dark bright today now here there".split()
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHATML, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that knows a few words whole; <|im_end|> ends a sequence."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<s>"]
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, **options)
    core.train_from_iterator([" " + " ".join(WORDS)] * 5 + WORDS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>", bos_token="<s>" if bos else None
    )
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(seed: int = 0, **config) -> LlamaForCausalLM:
    """A random language model of about 60,000 parameters."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 400, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "initializer_range": 0.2, **config})).eval()


def make_rows(count: int, *, seed: int = 0, conversational: bool = False) -> list[dict]:
    """Pairs of different lengths in which the chosen completion says "blue" where the rejected one says "green"."""
    generator = torch.Generator().manual_seed(seed)

    def words(least: int, most: int) -> str:
        length = int(torch.randint(least, most + 1, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())

    rows = []
    for _ in range(count):
        prompt, chosen, rejected = words(2, 9), " blue " + words(1, 7), " green " + words(1, 7)
        if conversational:
            prompt = [{"role": "user", "content": prompt}]
            chosen, rejected = ([{"role": "assistant", "content": text.strip()}] for text in (chosen, rejected))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def make_rankings(count: int, *, seed: int = 0, scores: bool = False) -> list[dict]:
    """Rankings of two to four completions, the earlier colour the better; with scores, in another order."""
    colours, rows = (" blue ", " red ", " grey ", " green "), []
    for i, row in enumerate(make_rows(count, seed=seed)):
        texts = [colour + row["chosen"].removeprefix(" blue ") for colour in colours[: 2 + i % 3]]
        row = {"prompt": row["prompt"], "chosen": texts[0], "rejected": texts[1:]}
        if scores:
            row = {"prompt": row["prompt"], "completions": texts[::-1], "scores": [0.5 * j for j in range(len(texts))]}
        rows.append(row)
    return rows


def start(output_dir: Path, model=None, rows=None, eval_rows=None, **options):
    """A short run on the tiny model, every step logged; options are those of DPOConfig or arguments of `train`."""
    names = "callbacks compute_metrics data_collator optimizers peft_config ref_model processing_class".split()
    arguments = {"processing_class": make_tokenizer()}
    arguments |= {name: options.pop(name) for name in names if name in options}
    rate = {} if "optimizers" in arguments else {"learning_rate": 1e-3}
    defaults = {**rate, "num_train_epochs": 1, "logging_steps": 1, "save_strategy": "no"}
    return train(
        make_model() if model is None else model,
        args=DPOConfig(output_dir=str(output_dir), **{**defaults, "disable_tqdm": True, **options}),
        train_dataset=make_rows(24) if rows is None else rows,
        eval_dataset=eval_rows,
        **arguments,
    )


def read(output_dir: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_or_rows, key: str = "loss") -> list[float]:
    """One metric over a run's rows, those without it left out."""
    return [row[key] for row in getattr(run_or_rows, "rows", run_or_rows) if key in row]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    """Whether two models' `weights` are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    """Drawing rewards.png takes longer than all the rest of a short run: only the tests of pictures draw."""
    if request.module.__name__ not in ("test_report", "test_tutorials"):
        monkeypatch.setattr("dpo.report.plot_rewards", lambda rows, path: path.write_bytes(b"\x89PNG"))


@pytest.fixture
def unlooked(monkeypatch):
    """No look at the model before the training, for tests that count its forward passes or its batches."""
    monkeypatch.setattr("dpo.trial.check_reading", lambda run: None)
    monkeypatch.setattr("dpo.checks.layout_error", lambda *_, **__: 0.0)
    monkeypatch.setattr("dpo.trial.choose_head", lambda run: None)
    monkeypatch.setattr("dpo.trial.foresee", lambda *_: None)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A tiny model with its tokenizer, saved as users have it."""
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def run(*command: str, processes: int = 0, cwd: Path | None = None, check: bool = True, env: dict | None = None):
    """Runs a module as a user would: `python -m ...`, or `torchrun -m ...` on some processes."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"] if processes else []
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run([sys.executable, "-m", *torchrun, *command], cwd=cwd, capture_output=True, text=True, env=env)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done
