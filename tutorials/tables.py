"""Makes the tables of the documentation from the code: `python tutorials/tables.py` (`--check` only compares).

losses.md comes from the docstrings of the losses, options.md from the fields of DPOConfig, coming_from_trl.md from its
LEFT_OUT, metrics.md from report.METRICS; in README.md the training step stands between two marks, `<!-- train_step -->`
and `<!-- end -->`.
"""

import dataclasses
import inspect
import re
import sys
from pathlib import Path

from dpo import loop
from dpo.config import LEFT_OUT, DPOConfig
from dpo.losses import LOSSES, OF_RANKINGS, OVER_THE_BATCH, WITH_F_DIVERGENCE, WITH_REFERENCE, takers
from dpo.report import METRICS

HERE = Path(__file__).resolve().parent
MADE = "*Made from the code by `python tutorials/tables.py`.*\n"


def table(header: str, rows: list[tuple]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([header, re.sub(r"[^|]+", "---", header), *lines]) + "\n"


# --------------------------------------------------------------------------------------------------------------- losses

MODIFIERS = """
What can be added to a loss:

- `--loss_type A B --loss_weights 1 0.5`: several at once, added up; each is reported by its name.
- `--f_divergence_type`: another divergence's f′(π/π_ref) in the place of w and l
  ([f-DPO](https://arxiv.org/abs/2309.16240)).
- `--rpo_alpha`: adds α NLL_w ([RPO](https://arxiv.org/abs/2404.19733)).
- `--use_weighting`: weighs pairs by how likely they are under the policy ([WPO](https://arxiv.org/abs/2406.11827)).
- `--ld_alpha`: weighs the tokens by which one completion is longer ([LD-DPO](https://arxiv.org/abs/2409.06411)).
- `--sync_ref_model`: moves the reference towards the policy ([TR-DPO](https://arxiv.org/abs/2404.09656)).
- `--reference_free`: takes log π_ref = 0.
- a column `weight` of numbers in the dataset multiplies a pair's loss.

A combination that has no meaning is refused with the reason. How each loss and its slope look over h is drawn in
[tutorial 7](rendered/07_losses.md).
"""

SYMBOLS = """

ε is `label_smoothing`; α, γ, λ, τ and R are the options in the row; π_w is π(y_w|x), π_ref,w its reference, NLL_w is
−log π_w/|y_w|; Δ is the column `margin` of the dataset, and β_r (`exo_beta_r`) the temperature of its
column `scores`; δ is the running mean of all rewards; a ranking has K completions, y₁ the best, with rewards r₁ … r_K.
"""


def losses_page() -> str:
    rows = []
    for name, loss in LOSSES.items():
        text = " ".join(inspect.getdoc(loss).split())
        title, rest = inspect.getdoc(loss).split("\n\n")[0].replace("\n", " ").split(": ", 1)
        formula, _, remark = rest.partition(". ")
        source = re.search(r"(?:Source: |RPO \()(.*?arXiv[^.]*\d{4}\.\d{5})", text).group(1)
        links = re.findall(r"(?:([A-Z][^()]*?\d{4}) \((?:[^()]*?, )?)?arXiv (\d{4}\.\d{5})", source)
        cited = ", ".join(f"[{who.strip(' ;,') or number}](https://arxiv.org/abs/{number})" for who, number in links)
        options = [p for p, value in inspect.signature(loss).parameters.items() if value.kind is value.KEYWORD_ONLY]
        options = ", ".join(f"`{p}`" for p in options if p in DPOConfig.__dataclass_fields__)
        rows.append((f"`{name}`", title, formula.rstrip("."), remark, options, cited if name != "sft" else ""))
    notation = inspect.getdoc(sys.modules["dpo.losses"]).split("\n\n")[1].split("The training loss")[0].strip()
    groups = {
        "without a reference": [name for name in LOSSES if name not in WITH_REFERENCE],
        "over rankings": OF_RANKINGS,
        "over the whole batch": OVER_THE_BATCH,
        "with `label_smoothing`": takers("label_smoothing"),
        "with `f_divergence_type`": WITH_F_DIVERGENCE,
    }
    listed = "\n".join(f"- {what}: {', '.join(f'`{name}`' for name in names)}" for what, names in groups.items())
    notation += SYMBOLS
    header = "| `loss_type` | name | formula | in a word | options | source |"
    return f"# The losses\n\n{MADE}\n{notation}\n\n{table(header, rows)}\n{listed}\n{MODIFIERS}"


# -------------------------------------------------------------------------------------------------------------- options


def options_page() -> str:
    """All fields of DPOConfig, under the headings that its source has."""
    text, sections = inspect.getsource(DPOConfig), {}
    for line in text.splitlines():
        if "# ----" in line:
            sections[line.split("# ----")[1].strip()] = []
        elif match := re.match(r"    (\w+): .* = option\(", line):
            sections[list(sections)[-1]].append(match.group(1))
    fields = {each.name: each for each in dataclasses.fields(DPOConfig)}
    page = "# The options\n\n" + MADE
    page += "\n`--name value` in a shell, `name: value` in a file for `--config`, `DPOConfig(name=value)` in Python.\n"
    for section, names in sections.items():
        rows = []
        for name in names:
            each, bounds = fields[name], fields[name].metadata["bounds"]
            limits = ", ".join(
                f"{'at ' * (kind in ('least', 'most'))}{kind} {value:g}" for kind, value in bounds.items()
            )
            first, *values = each.metadata["needs"].split() or [""]
            needs = f"`{first}`{' = ' * bool(values)}{' or '.join(values)}" if first else ""
            default = f"`{each.default}`" if each.default not in (None, "") else ""
            rows.append((f"`{name}`", default, each.metadata["help"], limits, needs))
        page += f"\n## {section}\n\n" + table("| option | default | | bounds | needs |", rows)
    return page


# ------------------------------------------------------------------------------------------------------------ from TRL

# Where TRL 1.16's default is another one: the option, that default, and why ours is not that.
OTHER_DEFAULTS = {
    "max_length": ("1024", "nothing is cut unless you say so, and what is cut is counted"),
    "truncation_mode": ("keep_start", "a chat's last turns matter more than its first ones; as TRL 0.x"),
    "bf16": ("true, unless fp16", "weights and arithmetic are float32 unless you say so"),
    "gradient_checkpointing": ("true", "it costs a third of the speed; switch it on where memory is short"),
    "f_alpha_divergence_coef": ("0.5, counted otherwise", "α as the f-DPO authors count it: TRL's is 1 − α"),
    "ref_model_mixup_alpha": ("0.6", "as TRL 0.x"),
    "ref_model_sync_steps": ("512", "as TRL 0.x"),
    "output_dir": ("trainer_output", "where all files go"),
    "report_to": ("none", "the same: metrics.jsonl is always written"),
}
OURS_ALONE = """ref_model_name_or_path eval_dataset_name skip_bad_rows layout shuffle simpo_gamma
orpo_lambda cpo_alpha dpop_lambda r_dpo_alpha chipo_clip exo_beta_r num_samples max_new_tokens sample_reward
chat_template_kwargs show_rows shuffle_buffer logits_budget max_tokens_per_micro_batch measure_utilisation profile"""
# What DPOTrainer takes, and what `dpo.loop.train` has in its place where that is not the same name.
TRAINER = {
    "callbacks": "functions of a metrics row: there is no Trainer that a TrainerCallback could look into",
    "compute_metrics": "gets an EvalPrediction of the pairs' rewards, not of logits",
    "preprocess_logits_for_metrics": "no place: logits are gone after each batch; `compute_metrics` gets rewards",
    "quantization_config": "load the model quantised and pass it",
    "data_collator": "may give the document's plain batch; the loop makes it ready",
}
SAME_ARGUMENTS = "model ref_model args train_dataset eval_dataset processing_class peft_config optimizers model_init"
MEANINGS = """
## Where the same word means something else

- The loss is divided by the pairs of the whole optimizer step, over accumulation and processes: 8×1, 1×8 and 2
  processes × 4 train the same model. Averages of averages do not. AOT sorts the pairs of a whole step, and BCO's δ
  takes all rewards of a step before it is used. (In evaluation AOT sorts a batch of all processes: its size matters.)
- Only positions that predict a completion token reach the language-model head; log-probabilities are float32.
- A completion ends with exactly one end-of-sequence token; what a chat template writes behind it is left out, for no
  model would ever generate it.
- `label_smoothing` works with the sigmoid loss; TRL 1.x ignores it there.
- Before the first step policy and reference must agree; if they do not, the run stops and says so.
- LoRA's own dropout is not switched off by `disable_dropout`; the reference of an adapter that was trained before is
  that adapter, not the bare model.
- R-DPO is log σ(βh + α|y_w| − α|y_l|): what maximising reward − α|y| gives, and the sign that lets long chosen answers
  train less. BCO keeps its δ, which TRL 1.x leaves out; WPO's weight is at most 1.
- A checkpoint goes on bit for bit (on a GPU with `--full_determinism`), or it is refused.
"""


def trl_page() -> str:
    ours = {each.name: each.default for each in dataclasses.fields(DPOConfig)}
    defaults = [(f"`{name}`", theirs, f"`{ours[name]}`", why) for name, (theirs, why) in OTHER_DEFAULTS.items()]
    gone = [(", ".join(f"`{name}`" for name in names.split()), reason) for names, reason in LEFT_OUT]
    same = [f"`{name}`" for name in ours if name not in OURS_ALONE.split()]
    arguments = [(f"`{name}`", "the same") for name in SAME_ARGUMENTS.split()]
    arguments += [(f"`{name}`", meaning) for name, meaning in TRAINER.items()]
    intro = (
        "TRL's names work here: those of the documentation of DPOTrainer in TRL 0.13, and those of TRL 1.16 "
        "(`DPOConfig`, `ModelConfig`, `ScriptArguments`). `DPOConfig(...)` and the command line refuse a name that is "
        "not here with the words of the second table.\n\n```python\n"
        "from trl import DPOConfig, DPOTrainer  # was\n\ntrainer = DPOTrainer(model=model, args=DPOConfig(beta=0.1), "
        "train_dataset=rows, processing_class=tokenizer)\ntrainer.train()\n\n"
        "from dpo.config import DPOConfig  # is\nfrom dpo.loop import train\n\n"
        "run = train(model=model, args=DPOConfig(beta=0.1), train_dataset=rows, processing_class=tokenizer)\n```\n"
    )
    return (
        f"# Coming from TRL\n\n{MADE}\n{intro}\n## Other defaults\n\n"
        + table("| option | TRL 1.16 | here | why |", defaults)
        + "\n## Options that are not here\n\n"
        + table("| TRL | instead, or why not |", gone)
        + f"\n## The same names\n\n{', '.join(same)}.\n\n"
        + f"Ours alone: {', '.join(f'`{name}`' for name in OURS_ALONE.split())}. [All options](options.md).\n"
        + "\n## The arguments of DPOTrainer\n\n"
        + table("| DPOTrainer | `dpo.loop.train` |", arguments)
        + MEANINGS
    )


# --------------------------------------------------------------------------------------------------------------- README


def metrics_page() -> str:
    intro = "Losses, rewards and log-probabilities are means over all pairs of all processes since the last row.\n"
    rows = [(f"`{name}`", meaning) for name, meaning in METRICS.items()]
    return f"# The metrics\n\n{MADE}\n{intro}\n" + table("| metric | |", rows)


def training_step() -> str:
    """`train_step` as it stands in loop.py."""
    return f"```python\n{inspect.getsource(loop.train_step)}```\n"


def readme(text: str) -> str:
    """README.md with what stands between its marks made anew."""
    marked = r"(<!-- train_step -->\n).*?(<!-- end -->)"
    return re.sub(marked, lambda m: m[1] + training_step() + m[2], text, flags=re.S)


def pages() -> dict[Path, str]:
    """All files that are made here, and what they should hold."""
    made = {HERE / "losses.md": losses_page(), HERE / "options.md": options_page(), HERE / "metrics.md": metrics_page()}
    path = HERE.parent / "README.md"
    return made | {HERE / "coming_from_trl.md": trl_page(), path: readme(path.read_text(encoding="utf-8"))}


def main() -> None:
    for path, text in pages().items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if "--check" in sys.argv:
            sys.exit(f"{path.name} is not what the code says: python tutorials/tables.py")
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
