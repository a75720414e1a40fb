"""What a run tells: metrics.jsonl, the reward graph, trackers such as TensorBoard, sampled answers, the model card."""

import importlib
import itertools
import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCardData
from matplotlib.figure import Figure

from dpo.collate import completions_of
from dpo.conversations import tokenizer_of
from dpo.files import write_whole
from dpo.rows import first_line

logger = logging.getLogger("dpo")
SECRETS = ("token", "use_auth_token")  # keys of from_pretrained's arguments that no file and no tracker may see
METRICS = {  # of metrics.jsonl, in words; losses, rewards and logps are means over all pairs since the last row
    "step": "optimizer steps taken",
    "epoch": "how often that is through the training set; of a stream, how often it has begun again",
    "loss": "mean loss of a pair; the sigmoid loss starts at ln 2 = 0.6931",
    "rewards/chosen": "β·log π/π_ref of the chosen completion; with a reference it starts at 0",
    "rewards/rejected": "the same of the rejected completion; of a ranking, the mean of all but the best",
    "rewards/margins": "chosen minus rejected: what training widens",
    "rewards/accuracies": "share of pairs whose chosen completion has the highest reward; 0 at first: all are equal",
    "logps/chosen": "log π of the chosen completion, summed over its tokens, in nats; if it falls far, raise β",
    "logps/rejected": "the same of the rejected completion",
    "learning_rate": "of the last step",
    "grad_norm": "of the last step, before clipping",
    "tokens_per_second": "tokens that the policy read, padding not counted",
    "tokens_seen": "the same since the start of the run",
    "unique_tokens_per_second": "the same as tokens_per_second with each prompt counted once",
    "utilisation": "with measure_utilisation: useful FLOPs a second as a share of the device's matrix products",
    "loss/NAME": "each part of a mixture of losses",
    "aux_loss": "load balance of a mixture of experts",
    "eval_…": "each of these on held-out pairs",
    "eval_samples/policy_reward": "mean sample_reward of answers that the policy sampled; and reference_reward",
}


def plain(value):
    """A metric as JSON knows it: numbers of NumPy and torch as Python's, null in place of what is not finite."""
    value = value.item() if getattr(value, "shape", None) in ((), (1,)) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_line(row: dict) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def append_row(path: Path, row: dict) -> None:
    """One JSON object a line. Raises: ValueError in one line if the disk is full."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(as_line(row))
    except OSError as error:
        raise ValueError(f"{path} could not be written: {error.strerror}") from error


def portable(value):
    """An option's value in words that YAML has, without secrets."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items() if key not in SECRETS}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if hasattr(value, "to_dict"):  # a BitsAndBytesConfig
        return portable(value.to_dict())
    return value if isinstance(value, str | int | float | None) else str(value)


def portable_config(options: dict) -> dict:
    """What config.yaml and trackers get: it runs again from anywhere. Local paths are made absolute; resuming,
    overwriting and whatever is secret are left out."""

    def absolute(value):
        if isinstance(value, dict):
            return {key: absolute(item) for key, item in value.items()}
        return str(Path(value).resolve()) if isinstance(value, str) and Path(value).exists() else value

    options = portable(options | {"resume_from_checkpoint": None, "overwrite_output_dir": False})
    for key in ("model_name_or_path", "ref_model_name_or_path", "dataset_name", "eval_dataset_name"):
        options[key] = absolute(options[key])
    return options


def write_config(output_dir: Path, options: dict) -> None:
    write_whole(output_dir / "config.yaml", yaml.safe_dump(options, sort_keys=False))


def read_rows(path: Path, *, up_to_step: int) -> list[dict]:
    """The metrics rows of a run up to a step, which it is about to go on from. What is no row (a line cut short, or
    somebody else's) is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            rows += [row] if row["step"] <= up_to_step else []
        except (ValueError, TypeError, KeyError, RecursionError):
            logger.warning("%s: a line that is no metrics row is passed over", path)
    return rows


def show_rows(rows, processing_class, count: int) -> None:
    """Prints the first rows as they will be trained, at least one: prompt and completions decoded, the tokens that the
    loss sees between ⟦ and ⟧."""
    tokenizer = tokenizer_of(processing_class)
    for row in rows.select(range(min(max(count, 1), len(rows)))):
        scored = row.get("scored")
        lines = [f"{row['source']}, as it will be trained (the loss sees what is between ⟦ and ⟧):"]
        lines.append(f"  prompt    {shortened(tokenizer.decode(row['prompt_input_ids']))!r}")
        for rank, ids in enumerate(completions_of(row)):
            mask = scored[rank] if scored else [True] * len(ids)
            runs = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
            texts = [(seen, repr(tokenizer.decode([token for token, _ in run]))[1:-1]) for seen, run in runs]
            text = "".join(f"⟦{part}⟧" if seen else part for seen, part in texts)
            lines.append(f"  {'rejected' if rank else 'chosen':9s} {text}")
        logger.info("\n".join(lines))


def shortened(text: str) -> str:
    """A text with long runs of one special token, as pictures have them, written as <token>×number."""
    return re.sub(r"(<[^<>\s]+>)\1{3,}", lambda run: f"{run[1]}×{len(run[0]) // len(run[1])}", text)


def describe_evaluation(row: dict) -> str:
    """An evaluation row in words, a line for each evaluated set."""
    lines = []
    for key, accuracy in row.items():
        prefix = key.removesuffix("rewards/accuracies")
        if prefix != key:
            name = prefix.removeprefix("eval_").strip("_")
            loss, margin, name = row[prefix + "loss"], row[prefix + "rewards/margins"], f" ({name})" if name else ""
            lines.append(f"  step {row['step']}, held-out pairs{name}: loss {loss:.3f}")
            lines[-1] += f", reward accuracy {accuracy:.3f}, margin {margin:.3f}"
    return "\n".join(lines)


# What the reward graph shows: a panel's title, the unit of its axis, and its metrics, each with its label and style.
PANELS = (
    ("loss", "loss of a pair  [nats]", {"loss": ("", "-", "o", "black")}),
    (
        "implicit rewards  β · log π/π_ref",
        "reward  [nats · β]",
        {
            "rewards/chosen": ("chosen", "--", "^", "tab:blue"),
            "rewards/margins": ("margin", "-", "o", "black"),
            "rewards/rejected": ("rejected", ":", "v", "tab:orange"),
        },
    ),
    ("accuracy: chosen above rejected", "share of pairs", {"rewards/accuracies": ("", "-", "o", "black")}),
)


def curves_of(rows: list[dict], key: str) -> dict[str, list[tuple]]:
    """The points (step, value) of a metric, {"train", "held-out" or "held-out NAME": points}. What ends with
    rewards/margins tells training from evaluations: eval_aux_loss is no loss of an evaluation set named aux."""
    curves = {}
    for row in rows:
        for prefix in [column.removesuffix("rewards/margins") for column in row if column.endswith("rewards/margins")]:
            of = prefix.removeprefix("eval_").strip("_")
            where = f"held-out {of}".strip() if prefix else "train"
            curves.setdefault(where, []).append((row["step"], row[prefix + key]))
    return curves


def plot_rewards(rows: list[dict], path: Path) -> None:
    """The reward graph: loss, rewards and accuracy over the steps, training as lines and held-out pairs as marks."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")  # without pyplot: no screen, and a notebook keeps its own
    for axes, (title, unit, metrics) in zip(figure.subplots(1, 3), PANELS, strict=True):
        for key, (name, line, mark, colour) in metrics.items():
            for where, points in curves_of(rows, key).items():
                style = {"linestyle": line} if where == "train" else {"linestyle": "none", "marker": mark}
                label = f"{name}, {where}".removeprefix(", ")
                axes.plot(*zip(*points, strict=True), color=colour, label=label, **style)
        axes.set(title=title, xlabel="optimizer step", ylabel=unit)
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
        axes.grid(alpha=0.3)
    axes.set_ylim(0, 1.03)
    figure.savefig(path, dpi=110)


def import_trackers(names: list[str] | None) -> dict:
    """The packages that report_to names. Raises: ValueError for an unknown or a missing one."""
    modules = {}
    for name in names or []:
        if name not in ("tensorboard", "wandb", "trackio"):
            raise ValueError(f"report_to {name!r} is unknown: choose tensorboard, wandb or trackio")
        try:
            modules[name] = importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except ImportError as error:
            raise ValueError(f"report_to {name} needs the package {name}: pip install {name}") from error
    return modules


def open_trackers(
    modules: dict, *, run_name: str | None, output_dir: Path, config: dict
) -> tuple[list[Callable], list[Callable]]:
    """(functions that send a metrics row, functions that send a table of sampled answers) to each of the trackers of
    `import_trackers`; a table comes as (columns, its rows, step)."""

    def to_tensorboard(row: dict) -> None:
        for key, value in row.items():
            if value is not None:
                writer.add_scalar(key, value, row["step"])
        writer.flush()

    def text_to_tensorboard(columns: list[str], rows: list[list], step: int) -> None:
        lines = [[str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
        lines = [columns, ["---"] * len(columns), *lines]  # Markdown, which TensorBoard draws
        writer.add_text("samples", "\n".join(f"| {' | '.join(line)} |" for line in lines), step)
        writer.flush()

    def table_to(module) -> Callable:
        def send(columns: list[str], rows: list[list], step: int) -> None:
            module.log({"samples": module.Table(columns=columns, data=rows)}, step=step)

        return send

    trackers, tables = [], []
    for name, module in modules.items():
        if name == "tensorboard":
            writer = module.SummaryWriter(output_dir / "tensorboard")
            trackers.append(to_tensorboard)
            tables.append(text_to_tensorboard)
        else:
            try:
                module.init(project="dpo", name=run_name or output_dir.name, config=config)
            except Exception as error:  # not logged in, no network
                raise ValueError(f"report_to {name}: {first_line(error)}") from error
            trackers.append(lambda row, module=module: module.log(row, step=row["step"]))
            tables.append(table_to(module))
    return trackers, tables


def show_samples(tables: list[Callable], samples: list[dict], *, step: int) -> None:
    """Sends sampled answers to the trackers' tables, of `open_trackers`."""
    for send in tables if samples else ():
        columns = list(samples[0])
        send(columns, [[sample[column] for column in columns] for sample in samples], step)


CARD = """
# {title}

Model: {model}. Preference pairs: {dataset}. Trained with Direct Preference Optimization
([Rafailov et al. 2023](https://arxiv.org/abs/2305.18290)).

{how}

How it was trained stands in config.yaml, which runs it again.
"""


HOW = {  # to talk to it, by what it reads
    "text": """```python
from transformers import pipeline

chat = pipeline("text-generation", model="{title}")
print(chat([{{"role": "user", "content": "Hello!"}}], max_new_tokens=64)[0]["generated_text"][-1]["content"])
```""",
    "pictures": """```python
from transformers import pipeline

chat = pipeline("image-text-to-text", model="{title}")
said = [{{"type": "image", "path": "picture.png"}}, {{"type": "text", "text": "What is this?"}}]
print(chat(text=[{{"role": "user", "content": said}}], max_new_tokens=64)[0]["generated_text"][-1]["content"])
```""",
    "apart": """```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained("{title}") for kind in (AutoModelForSeq2SeqLM, AutoTokenizer))
answer = model.generate(**tokenizer("Hello!", return_tensors="pt"), max_new_tokens=64)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
```""",
    "own": """`model.safetensors` holds the weights of a module of its author's own:
`safetensors.torch.load_model(module, "model.safetensors")` puts them into one.""",
}


def create_model_card(
    output_dir: Path,
    *,
    model_name=None,
    dataset_name=None,
    tags=None,
    rows: list[dict] = (),
    adapter: bool = False,
    reads: str = "text",
) -> Path:
    """Writes README.md: what was trained from what, on what, and the last metrics.

    Args: model_name, dataset_name, of the Hub or a path; tags, a text or a list, beside dpo; rows, the run's metrics
    rows; adapter, whether the directory holds a PEFT adapter; reads, a key of HOW.
    """
    on_hub = {n: bool(n) and n.count("/") <= 1 and not Path(n).exists() for n in (model_name, dataset_name)}
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        base_model=model_name if on_hub[model_name] else None,
        datasets=[dataset_name] if on_hub[dataset_name] else None,
        tags=["dpo", *([tags] if isinstance(tags, str) else tags or [])],
    )
    shown = [f"`{name if on_hub[name] else Path(name).name}`" if name else None for name in (model_name, dataset_name)]
    words = {"model": shown[0] or "A language model", "dataset": shown[1] or "given pairs", "title": output_dir.name}
    words["how"] = HOW[reads].format(**words)
    text = f"---\n{data.to_yaml()}\n---\n" + CARD.format(**words)
    last = {key: value for row in rows for key, value in row.items() if isinstance(value, int | float)}
    if last:
        text += "\n## Last metrics\n\n| metric | value |\n|---|---|\n"
        text += "".join(f"| {key} | {value:.6g} |\n" for key, value in last.items())
    if (output_dir / "rewards.png").exists():
        text += "\n![rewards](rewards.png)\n"
    path = output_dir / "README.md"
    write_whole(path, text)
    return path
