"""Rows of token ids become a batch: the document's plain tensors, or one that is ready for `model(**batch["inputs"])`.

B pairs give 2B sequences, the B chosen ones first; B rankings of K completions give K·B, the best ones first and then
the second best. T is the padded length of prompt + completion.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

LAYOUTS = ("plain", "padded")
NUMBERS = {"margin": "margins", "weight": "weights", "scores": "scores"}  # of a row, and their names in a batch
NUMBERS |= {name: name for name in ("ref_chosen_logps", "ref_rejected_logps")}  # the reference's, worked out before


@dataclass
class DataCollatorForPreference:
    """B tokenised pairs to a batch of tensors.

    Args: pad_token_id, any id (masks, not ids, tell what is padding); layout, "plain" (prompts padded on the left,
    completions on the right, as in TRL's documentation) or "padded", ready for the model (see `padded_batch`).

    >>> rows = [{"prompt_input_ids": [7, 8], "chosen_input_ids": [9], "rejected_input_ids": [11, 12]}]
    >>> DataCollatorForPreference(pad_token_id=0)(rows)["rejected_input_ids"]
    tensor([[11, 12]])
    """

    pad_token_id: int
    layout: str = "plain"

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r} is unknown: choose one of {', '.join(LAYOUTS)}")

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        """Rows with prompt_input_ids, chosen_input_ids and rejected_input_ids to those keys as (B, P), (B, C), (B, R)
        int64 tensors, each with its X_attention_mask of zeros and ones. Where a row's rejected_input_ids are several
        lists, rejected is (B, K−1, R), all padding where a row has fewer. The rows' numbers come with them where there
        are any: margins and weights (B,) float32, scores (B, K), ref_chosen_logps and ref_rejected_logps; and scored,
        (K·B, width) bool, chosen first, where a row says which of its completions' tokens are. Other keys of a row are
        ignored."""
        batch = {}
        for part in ("prompt", "chosen", "rejected"):
            rows = [row[f"{part}_input_ids"] for row in features]
            several = part == "rejected" and any(isinstance(value, list) for value in rows[0])
            if several:
                most = max(map(len, rows))
                rows = [completion for row in rows for completion in row + [[]] * (most - len(row))]
            rows = [torch.tensor(row, dtype=torch.long) for row in rows]
            padded = {"input_ids": pad(rows, self.pad_token_id, left=part == "prompt")}
            padded["attention_mask"] = pad([torch.ones_like(row) for row in rows], 0, left=part == "prompt")
            for key, value in padded.items():
                batch[f"{part}_{key}"] = value.unflatten(0, (len(features), most)) if several else value
        if any(row.get("scored") for row in features):  # else all of each completion is
            masks = [row["scored"] or [[True] * len(ids) for ids in completions_of(row)] for row in features]
            most = max(map(len, masks))
            ranks = [[mask[rank] if rank < len(mask) else [] for mask in masks] for rank in range(most)]
            batch["scored"] = pad([torch.tensor(mask, dtype=torch.bool) for rank in ranks for mask in rank], 0)
        for column, name in NUMBERS.items():
            if column in features[0]:
                values = [torch.tensor(row[column], dtype=torch.float32) for row in features]
                batch[name] = pad(values, 0) if values[0].ndim else torch.stack(values)
        return batch if self.layout == "plain" else padded_batch(batch, self.pad_token_id)


def completions_of(row: dict) -> list[list[int]]:
    """The token ids of a row's completions, best first."""
    rejected = row["rejected_input_ids"]
    return [row["chosen_input_ids"], *(rejected if rejected and isinstance(rejected[0], list) else [rejected])]


def pad(rows: list[torch.Tensor], value: int, *, left: bool = False) -> torch.Tensor:
    """Stacks 1-D tensors of differing lengths to (len(rows), longest), filling with value at the left or right end."""
    longest = max(map(len, rows))
    sides = [(longest - len(row), 0) if left else (0, longest - len(row)) for row in rows]
    return torch.stack([F.pad(row, side, value=value) for row, side in zip(rows, sides, strict=True)])


def concatenated_inputs(batch: dict[str, torch.Tensor], padding_value: int) -> dict[str, torch.Tensor]:
    """Stacks chosen over rejected, so that one forward pass takes both (one pass is what DDP and FSDP want, too).

    Returns prompt_input_ids and prompt_attention_mask (2B, P), completion_input_ids and completion_attention_mask
    (2B, max(C, R)); completions are padded with padding_value, masks with 0. Where rejected is (B, K−1, R) they are
    (K·B, ...), chosen first, then the rejected ones by rank.
    """
    width = max(batch["chosen_input_ids"].shape[-1], batch["rejected_input_ids"].shape[-1])
    joined = {}
    for key, value in (("input_ids", padding_value), ("attention_mask", 0)):
        chosen, rejected = batch[f"chosen_{key}"], batch[f"rejected_{key}"]
        completions = [chosen, *(rejected.unbind(1) if rejected.ndim == 3 else [rejected])]
        joined[f"prompt_{key}"] = batch[f"prompt_{key}"].repeat(len(completions), 1)
        joined[f"completion_{key}"] = torch.cat(
            [F.pad(completion, (0, width - completion.shape[1]), value=value) for completion in completions]
        )
    return joined


def padded_batch(batch: dict[str, torch.Tensor], padding_value: int = 0) -> dict:
    """The padded layout of a plain batch: each sequence is [prompt, completion, padding], one a row.

    With all padding at the end, positions count from 0 and causal attention never sees it: right for every family.

    Returns, of the S = K·B sequences (K = 2 in pairs) less those without a completion (of rankings with fewer than K):
        inputs: what goes into the model: input_ids and attention_mask (S, T) int64, and logits_to_keep (S, T) bool, the
            positions whose next token belongs to a completion; M of them.
        targets: (M,) int64, those next tokens; owner: (M,) int64, the sequence (0 … K·B−1, chosen first) of each.
        lengths: (K·B,) int64, completion tokens that are scored; tokens: (B,) int64, what the model reads of each row.
        and the numbers of the rows, as they are: weights, margins, scores. Needs: concatenated_inputs.
    """
    joined = concatenated_inputs(batch, padding_value)
    lengths = joined["completion_attention_mask"].sum(dim=1)
    present = lengths.nonzero()[:, 0]
    ids, mask = (
        torch.cat([joined[f"prompt_{key}"], joined[f"completion_{key}"]], dim=1)[present]
        for key in ("input_ids", "attention_mask")
    )
    scored = joined["completion_attention_mask"]
    if "scored" in batch:  # (K·B, width): of several turns only the assistant's
        scored = scored * F.pad(batch["scored"], (0, scored.shape[1] - batch["scored"].shape[1]))
        lengths = scored.sum(dim=1)
    completion = F.pad(scored[present], (joined["prompt_input_ids"].shape[1], 0))
    # A stable sort by "is padding" moves the tokens to the left and keeps their order.
    order = torch.argsort(mask, dim=1, descending=True, stable=True)[:, : int(mask.sum(dim=1).max())]
    ids, mask, completion = ids.gather(1, order), mask.gather(1, order), completion.gather(1, order)
    keep = F.pad(completion[:, 1:], (0, 1)).bool()  # shift by one: position t predicts token t + 1
    read = torch.zeros_like(lengths).index_add(0, present, mask.sum(dim=1))
    ids_to_read = ids.masked_fill(mask == 0, padding_value)
    return {
        "inputs": {"input_ids": ids_to_read, "attention_mask": mask, "logits_to_keep": keep},
        "targets": ids[:, 1:][keep[:, :-1]],
        "owner": present[keep.nonzero()[:, 0]],
        "lengths": lengths,
        "tokens": read.unflatten(0, (-1, len(batch["prompt_input_ids"]))).sum(0),
        **{name: batch[name] for name in batch if not name.startswith(("prompt_", "chosen_", "rejected_", "scored"))},
    }
