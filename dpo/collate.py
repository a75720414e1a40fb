"""Rows of token ids become a batch: the document's plain tensors, or one that is ready for `model(**batch["inputs"])`.

B pairs give 2B sequences, the B chosen ones first; B rankings of K completions give K·B, the best ones first and then
the second best. T is the padded length of prompt + completion.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

LAYOUTS = ("plain", "padded", "padding_free", "prefix_shared")
NUMBERS = {"margin": "margins", "weight": "weights", "scores": "scores"}  # of a row, and their names in a batch
NUMBERS |= {name: name for name in ("ref_chosen_logps", "ref_rejected_logps")}  # the reference's, worked out before


@dataclass
class DataCollatorForPreference:
    """B tokenised pairs to a batch of tensors.

    Args: pad_token_id, any id (masks, not ids, tell what is padding); layout, "plain" (prompts padded on the left,
    completions on the right, as in TRL's documentation), or one that is ready for the model: "padded", "padding_free"
    or "prefix_shared" (see `padded_batch` and the functions after it); read_images, gives of a row with images what the
    model reads of them, by its names; decoder_start_ids, of an
    encoder-decoder, what its decoder begins with: the padded layout is then that of `encoder_decoder_batch`, with
    label_pad_token_id.

    >>> rows = [{"prompt_input_ids": [7, 8], "chosen_input_ids": [9], "rejected_input_ids": [11, 12]}]
    >>> DataCollatorForPreference(pad_token_id=0)(rows)["rejected_input_ids"]
    tensor([[11, 12]])
    """

    pad_token_id: int
    layout: str = "plain"
    read_images: Callable[[dict], dict] | None = None
    decoder_start_ids: list[int] | None = None
    label_pad_token_id: int = -100

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r} is unknown: choose one of {', '.join(LAYOUTS)}")

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        """Rows with prompt_input_ids, chosen_input_ids and rejected_input_ids to those keys as (B, P), (B, C), (B, R)
        int64 tensors, each with its X_attention_mask of zeros and ones. Where a row's rejected_input_ids are several
        lists, rejected is (B, K−1, R), all padding where a row has fewer. The rows' numbers come with them where there
        are any: margins and weights (B,) float32, scores (B, K), ref_chosen_logps and ref_rejected_logps; and scored,
        (K·B, width) bool, chosen first, where a row says which of its completions' tokens are. What is a tensor in a
        row belongs to its prompt (pixel_values and the like, as `data.process_row` gives it) and comes as prompt_X (see
        `joined_tensors`). Other keys of a row are ignored."""
        if self.read_images is not None:
            features = [row | self.read_images(row) if row.get("images") else row for row in features]
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
        batch |= joined_tensors(features, width=batch["prompt_input_ids"].shape[1])
        if any(row.get("scored") for row in features):  # else all of each completion is
            masks = [row["scored"] or [[True] * len(ids) for ids in completions_of(row)] for row in features]
            most = max(map(len, masks))
            ranks = [[mask[rank] if rank < len(mask) else [] for mask in masks] for rank in range(most)]
            batch["scored"] = pad([torch.tensor(mask, dtype=torch.bool) for rank in ranks for mask in rank], 0)
        for column, name in NUMBERS.items():
            if column in features[0]:
                values = [torch.tensor(row[column], dtype=torch.float32) for row in features]
                batch[name] = pad(values, 0) if values[0].ndim else torch.stack(values)
        if self.layout == "plain":
            return batch
        if self.decoder_start_ids is not None:
            return encoder_decoder_batch(batch, self.decoder_start_ids, self.pad_token_id, self.label_pad_token_id)
        ready = {"padded": padded_batch, "padding_free": padding_free_batch, "prefix_shared": prefix_shared_batch}
        return ready[self.layout](batch, self.pad_token_id)


def completions_of(row: dict) -> list[list[int]]:
    """The token ids of a row's completions, best first."""
    rejected = row["rejected_input_ids"]
    return [row["chosen_input_ids"], *(rejected if rejected and isinstance(rejected[0], list) else [rejected])]


def pad(rows: list[torch.Tensor], value: int, *, left: bool = False) -> torch.Tensor:
    """Stacks 1-D tensors of differing lengths to (len(rows), longest), filling with value at the left or right end."""
    longest = max(map(len, rows))
    sides = [(longest - len(row), 0) if left else (0, longest - len(row)) for row in rows]
    return torch.stack([F.pad(row, side, value=value) for row, side in zip(rows, sides, strict=True)])


def joined_tensors(features: list[dict], *, width: int) -> dict[str, torch.Tensor]:
    """The tensors of rows as {prompt_X: one tensor of the batch}, whatever X is.

    Of a prompt's tokens, of shape (1, P, ...), as token_type_ids: (B, width, ...), zeros on the left, and
    where a row has none. Of its pictures, (any number, ...): one after the other along the first dimension, which
    counts pictures, or patches, or rows; in the others the smaller are filled up with zeros, as processors do it.
    Needs: join, is_of_tokens, NUMBERS.
    """
    joined = {}
    known = {f"{part}_input_ids" for part in ("prompt", "chosen", "rejected")} | NUMBERS.keys()
    tensors = (key for row in features for key, value in row.items() if isinstance(value, torch.Tensor))
    for name in dict.fromkeys(key for key in tensors if key not in known):
        own = [(row.get(name), len(row["prompt_input_ids"])) for row in features]
        value, tokens = next((value, tokens) for value, tokens in own if value is not None)
        if is_of_tokens(name, value, (1, tokens)):
            none = value[:, :0]
            rows = [(none if each is None else each).flip(1) for each, _ in own]  # so that zeros come on the left
            joined[f"prompt_{name}"] = join(rows, least=width).flip(1)
        else:
            joined[f"prompt_{name}"] = join([each for each, _ in own if each is not None])
    return joined


def join(tensors: list[torch.Tensor], *, least: int = 0) -> torch.Tensor:
    """Tensors one after the other along their first dimension, in the others zeros at the end of the smaller ones; the
    second dimension has at least so many."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    shape[:1] = [max(least, *shape[:1])] if shape and least else shape[:1]

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        missing = [(0, size - own) for size, own in zip(shape, tensor.shape[1:], strict=True)]
        return F.pad(tensor, [number for sides in reversed(missing) for number in sides])

    return torch.cat([filled(tensor) for tensor in tensors])


def concatenated_inputs(batch: dict[str, torch.Tensor], padding_value: int) -> dict[str, torch.Tensor]:
    """Stacks chosen over rejected, so that one forward pass takes both (one pass is what DDP and FSDP want, too).

    Returns prompt_input_ids and prompt_attention_mask (2B, P), completion_input_ids and completion_attention_mask
    (2B, max(C, R)); completions are padded with padding_value, masks with 0. Where rejected is (B, K−1, R) they are
    (K·B, ...), chosen first, then the rejected ones by rank. What else the batch has of its prompts, prompt_X, comes as
    X, once for the chosen and once for each rejected: pixel_values of prompt_pixel_values.
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
    for key in batch:
        if key.startswith("prompt_") and key not in joined:
            joined[key.removeprefix("prompt_")] = torch.cat([batch[key]] * len(completions))
    return joined


def padded_batch(batch: dict[str, torch.Tensor], padding_value: int = 0) -> dict:
    """The padded layout of a plain batch: each sequence is [prompt, completion, padding], one a row.

    With all padding at the end, positions count from 0 and causal attention never sees it: right for every family.

    Returns, of the S = K·B sequences (K = 2 in pairs) less those without a completion (of rankings with fewer than K):
        inputs: what goes into the model: input_ids and attention_mask (S, T) int64, and logits_to_keep (S, T) bool, the
            positions whose next token belongs to a completion; M of them; and what else the batch has of its prompts.
        targets: (M,) int64, those next tokens; owner: (M,) int64, the sequence (0 … K·B−1, chosen first) of each.
        lengths: (K·B,) int64, completion tokens that are scored; tokens: (B,) int64, what the model reads of each row.
        and the numbers of the rows, as they are: weights, margins, scores.
    Needs: concatenated_inputs, scored_tokens, tokens_first, is_of_tokens, go_on, numbers_of.
    """
    joined = concatenated_inputs(batch, padding_value)
    scored, present, others = scored_tokens(batch, joined)
    ids, mask = (
        torch.cat([joined[f"prompt_{key}"], joined[f"completion_{key}"]], dim=1)[present]
        for key in ("input_ids", "attention_mask")
    )
    completion = F.pad(scored[present], (joined["prompt_input_ids"].shape[1], 0))
    order = tokens_first(mask)
    ids, mask, completion = ids.gather(1, order), mask.gather(1, order), completion.gather(1, order)
    keep = F.pad(completion[:, 1:], (0, 1)).bool()  # shift by one: position t predicts token t + 1
    inputs = {"input_ids": ids.masked_fill(mask == 0, padding_value), "attention_mask": mask, "logits_to_keep": keep}
    for name, value in others.items():
        if is_of_tokens(name, value, joined["prompt_input_ids"].shape):
            value = go_on(value, joined["completion_input_ids"].shape[1])
            value = value[present][torch.arange(len(order), device=order.device)[:, None], order]
        inputs[name] = value
    targets, owner = ids[:, 1:][keep[:, :-1]], present[keep.nonzero()[:, 0]]
    return {"inputs": inputs, "targets": targets, "owner": owner, **numbers_of(batch, joined, scored)}


def padding_free_batch(batch: dict[str, torch.Tensor], padding_value: int = 0) -> dict:
    """The flat layout of a plain batch: its sequences, [prompt, completion], one after the other in one row.

    Returns: what `padded_batch` does, with inputs of U tokens, of which none is padding:
        input_ids, position_ids: (1, U) int64; positions begin with 0 in each sequence.
        attention_mask: (1, 1, N, 3) int64, the N segments as attention.py has them; each sees itself only.
        logits_to_keep: (M,) int64, what predicts targets, in their order.
    Needs: flat_batch, concatenated_inputs, scored_tokens, is_of_tokens, go_on, numbers_of.
    """
    return flat_batch(batch, padding_value, shares=False)


def prefix_shared_batch(batch: dict[str, torch.Tensor], padding_value: int = 0) -> dict:
    """The flat layout in which each prompt is read once, and its pictures: [prompt, chosen, rejected, ...] of each row.

    A rejected completion sees the prompt, and not the chosen one that stands between them; its positions go on where
    the prompt's end. The prompt's last token predicts the first one of each completion, so it is kept for each.

        input_ids     x₁ x₂ w₁ w₂ l₁ l₂ l₃        targets   w₁ w₂  l₁ l₂ l₃
        position_ids  0  1  2  3  2  3  4         kept      x₂ w₁  x₂ l₁ l₂

    Returns: as `padding_free_batch`. Source: Wang and Hegde 2024 (arXiv 2410.20305).
    Needs: flat_batch, concatenated_inputs, scored_tokens, is_of_tokens, go_on, numbers_of.
    """
    return flat_batch(batch, padding_value, shares=True)


def flat_batch(batch: dict[str, torch.Tensor], padding_value: int, *, shares: bool) -> dict:
    """Both flat layouts; shares: a rejected completion stands without its prompt, and sees that of the chosen one.
    Needs: concatenated_inputs, scored_tokens, is_of_tokens, go_on, numbers_of."""
    joined, B = concatenated_inputs(batch, padding_value), len(batch["prompt_input_ids"])
    scored, present, others = scored_tokens(batch, joined)
    ids, mask = (
        torch.cat([joined[f"prompt_{key}"], joined[f"completion_{key}"]], dim=1)
        for key in ("input_ids", "attention_mask")
    )
    prompts, order = joined["prompt_attention_mask"].sum(dim=1).tolist(), present.tolist()
    if not all(prompts):  # what stands before is another row's
        raise ValueError("a flat row needs prompts of a token at least: give a row without one BOS, or pad the batch")
    if shares:
        order.sort(key=lambda sequence: sequence % B)  # row by row, by rank
    sources, positions, segments, start = [], [], [], 0
    chosen, kept, targets = {}, {}, {}  # of each row, where its chosen completion's segment is; of each sequence
    for sequence in order:
        columns, prompt = mask[sequence].nonzero()[:, 0], prompts[sequence]
        segment, begin = chosen.setdefault(sequence % B, (len(segments), start))
        shared = prompt if shares and sequence >= B else 0
        own = columns[shared:]
        is_scored = scored[sequence, : len(columns) - prompt].bool()
        before = start + prompt - shared - 1 + torch.arange(len(is_scored))  # what predicts each of its tokens
        if shared:
            before[:1] = begin + prompt - 1
        kept[sequence], targets[sequence] = before[is_scored], ids[sequence, columns[prompt:]][is_scored]
        if len(own):  # a row may have fewer completions
            sources.append(torch.stack([torch.full_like(own, sequence), own]))
            positions.append(torch.arange(shared, len(columns)))
            segments.append((len(own), segment if shared else 0, shared))
            start += len(own)
    row, column = torch.cat(sources, dim=1)  # where in ids each token of the flat row comes from
    kept, targets = ([values[sequence] for sequence in present.tolist()] for values in (kept, targets))
    inputs = {"input_ids": ids[row, column][None], "position_ids": torch.cat(positions)[None]}
    inputs |= {"attention_mask": torch.tensor(segments)[None, None], "logits_to_keep": torch.cat(kept)}
    for name, value in others.items():
        if is_of_tokens(name, value, joined["prompt_input_ids"].shape):
            inputs[name] = go_on(value, joined["completion_input_ids"].shape[1])[row, column][None]
        else:
            inputs[name] = batch[f"prompt_{name}"] if shares else value
    owner = present.repeat_interleave(torch.tensor([len(each) for each in targets]))
    result = {"inputs": inputs, "targets": torch.cat(targets), "owner": owner}
    return result | numbers_of(batch, joined, scored)


def encoder_decoder_batch(
    batch: dict[str, torch.Tensor], decoder_start_ids: list[int], padding_value: int = 0, label_pad_token_id: int = -100
) -> dict:
    """The padded layout for an encoder-decoder: the encoder reads [prompt, padding], the decoder decoder_start_ids and
    the completion but for its last token, of which position t predicts token t.

    Returns: what `padded_batch` does, whose inputs have decoder_input_ids, too; logits_to_keep is of the decoder's
    positions; and labels (S, C), the completions with label_pad_token_id for padding.
    Needs: concatenated_inputs, scored_tokens, tokens_first, numbers_of.
    """
    joined = concatenated_inputs(batch, padding_value)
    scored, present, others = scored_tokens(batch, joined)
    order = tokens_first(joined["prompt_attention_mask"][present])
    ids, mask = (joined[f"prompt_{key}"][present].gather(1, order) for key in ("input_ids", "attention_mask"))
    completion, scored_here = joined["completion_input_ids"][present], scored[present].bool()
    start = torch.tensor(decoder_start_ids, device=ids.device).expand(len(ids), -1)
    keep = F.pad(scored_here, (start.shape[1] - 1, 0))
    inputs = {"input_ids": ids.masked_fill(mask == 0, padding_value), "attention_mask": mask, **others}
    inputs |= {"decoder_input_ids": torch.cat([start, completion[:, :-1]], dim=1), "logits_to_keep": keep}
    labels = completion.masked_fill(joined["completion_attention_mask"][present] == 0, label_pad_token_id)
    targets, owner = completion[scored_here], present[scored_here.nonzero()[:, 0]]
    rest = {"targets": targets, "owner": owner, "labels": labels, **numbers_of(batch, joined, scored)}
    return {"inputs": inputs, **rest}


def ready_batch(batch: dict, model, padding_value: int = 0) -> dict:
    """A batch, of any layout, ready for a model: a plain one is padded, as the model's configuration wants it.
    Needs: padded_batch, encoder_decoder_batch, decoder_start_ids, and what these need."""
    config = getattr(getattr(model, "module", model), "config", None)
    if "inputs" in batch:
        return batch
    if getattr(config, "is_encoder_decoder", False):
        return encoder_decoder_batch(batch, decoder_start_ids(getattr(model, "module", model)), padding_value)
    return padded_batch(batch, padding_value)


def decoder_start_ids(model: torch.nn.Module) -> list[int]:
    """What the decoder of an encoder-decoder begins with before it says something of its own: its start token, and the
    one that generation forces upon it, where there is one (a language, or BOS)."""
    holders = [getattr(model, name, None) for name in ("generation_config", "config")]

    def first(key: str) -> int | None:
        return next((value for each in holders if (value := getattr(each, key, None)) is not None), None)

    if (start := first("decoder_start_token_id")) is None:
        raise ValueError("the model's configuration has no decoder_start_token_id, its decoder cannot begin: set it")
    forced = first("forced_bos_token_id")
    return [start] if forced is None else [start, forced]


def scored_tokens(batch: dict, joined: dict) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """((K·B, C) which tokens of the completions are scored, 0 or 1; the numbers of the S sequences that are there; what
    else the model reads of the prompts)."""
    others = {name: value for name, value in joined.items() if not name.startswith(("prompt_", "completion_"))}
    scored = joined["completion_attention_mask"]
    # A sequence that is not there may stay where it has pictures, which are not to be told apart.
    is_there = scored.any(dim=1) | bool(others)
    if "scored" in batch:  # (K·B, width): of several turns only the assistant's
        scored = scored * F.pad(batch["scored"], (0, scored.shape[1] - batch["scored"].shape[1]))
    return scored, is_there.nonzero()[:, 0], others


def tokens_first(mask: torch.Tensor) -> torch.Tensor:
    """(S, T) positions that move the tokens of each sequence to the left and keep their order: a stable sort."""
    return torch.argsort(mask, dim=1, descending=True, stable=True)[:, : int(mask.sum(dim=1).max())]


def is_of_tokens(name: str, value: torch.Tensor, shape: tuple[int, int]) -> bool:
    """Whether a tensor has something for each token of prompts of that shape, as token_type_ids, and not for their
    pictures, of which there may be as many."""
    of_pictures = name.startswith(("pixel_", "image_", "spatial_", "aspect_"))
    return name.endswith(("_ids", "_mask")) and not of_pictures and tuple(value.shape[:2]) == tuple(shape)


def go_on(value: torch.Tensor, tokens: int) -> torch.Tensor:
    """(S, P, ...) of the prompts' tokens, and of so many more of a completion. Its tokens' types are 0, text, where
    some are pictures'; where types count segments, all of the prompt are 0, the completion is the second, 1. A mask of
    what each token sees of the pictures goes on as it was at the end."""
    if value.ndim == 2:
        return F.pad(value, (0, tokens), value=0 if value.any() else 1)
    return torch.cat([value, value[:, -1:].expand(-1, tokens, *value.shape[2:])], dim=1)


def numbers_of(batch: dict, joined: dict, scored: torch.Tensor) -> dict[str, torch.Tensor]:
    """lengths and tokens, as in `padded_batch`, and the rows' own numbers."""
    read = joined["completion_attention_mask"].sum(dim=1).unflatten(0, (-1, len(batch["prompt_input_ids"])))
    prompts = batch["prompt_attention_mask"].sum(dim=1)
    tokens, unique = (read + prompts * (read > 0)).sum(dim=0), read.sum(dim=0) + prompts
    others = ("prompt_", "chosen_", "rejected_", "scored")
    own = {name: value for name, value in batch.items() if not name.startswith(others)}
    return {"lengths": scored.sum(dim=1), "tokens": tokens, "unique_tokens": unique, **own}
