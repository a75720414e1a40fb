"""Models that see: rows with pictures in all their forms, through five families built small, with their processors."""

import base64
import copy
import io
import math
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from conftest import curve, make_tokenizer, start
from PIL import Image

from dpo.collate import DataCollatorForPreference
from dpo.data import prepare_dataset, process_row, read_images
from dpo.images import lift_images, open_image
from dpo.logprobs import concatenated_forward
from dpo.models import load_model, load_processor
from dpo.sources import load_preferences

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}PLACE{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLACES = {
    "llava": "<image>",
    "llava_next": "<image>",
    "idefics3": "<image>",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>",
}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
EYES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def see(family: str):
    """(a random model of a family, the processor of its own class)."""
    tokenizer = make_tokenizer(None)
    words = "<image> <start_of_image> <end_of_image> <image_soft_token> <|vision_start|> <|vision_end|> <|image_pad|>"
    words = f"{words} <|video_pad|> <fake_token_around_image> <global-img> <end_of_utterance>".split()
    words += [f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)]
    tokenizer.add_special_tokens({"additional_special_tokens": words})
    text = TEXT | {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in words}
    square = {"height": 28, "width": 28}
    if family in ("llava", "llava_next"):
        eyes = transformers.CLIPVisionConfig(**EYES, image_size=28, patch_size=14, initializer_range=0.2)
        config = {
            "vision_config": eyes,
            "text_config": transformers.LlamaConfig(**text),
            "image_token_id": ids["<image>"],
        }
        how = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        size = {"size": {"shortest_edge": 28}, "crop_size": square}
        if family == "llava":
            pictures = transformers.CLIPImageProcessor(**size)
            processor = transformers.LlavaProcessor(pictures, tokenizer, **how)
            model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**config))
        else:
            grid = [[28, 56], [56, 28], [56, 56]]
            pictures = transformers.LlavaNextImageProcessor(**size, image_grid_pinpoints=grid)
            processor = transformers.LlavaNextProcessor(pictures, tokenizer, **how)
            config = transformers.LlavaNextConfig(**config, image_grid_pinpoints=grid)
            model = transformers.LlavaNextForConditionalGeneration(config)
    elif family == "idefics3":
        eyes = transformers.models.idefics3.Idefics3VisionConfig(**EYES, image_size=28, patch_size=14)
        config = {"vision_config": eyes, "text_config": transformers.LlamaConfig(**text), "scale_factor": 2}
        config = transformers.Idefics3Config(**config, image_token_id=ids["<image>"])
        pictures = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
        pictures = transformers.Idefics3ImageProcessor(**pictures)
        processor = transformers.Idefics3Processor(pictures, tokenizer, image_seq_len=1)
        model = transformers.Idefics3ForConditionalGeneration(config)
    elif family == "qwen2_vl":
        tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
        eyes = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
        text |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"}}
        tokens = {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"]}
        tokens |= {"vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"]}
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=eyes, **tokens)
        pictures = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=4 * 28 * 28)
        with pytest.MonkeyPatch.context() as patch:  # without torchvision there is no video processor to check
            patch.setattr(transformers.Qwen2VLProcessor, "check_argument_for_proper_class", lambda *_: None)
            processor = transformers.Qwen2VLProcessor(pictures, tokenizer, video_processor=pictures)
        model = transformers.Qwen2VLForConditionalGeneration(config)
    else:
        tokenizer.boi_token, tokenizer.eoi_token = "<start_of_image>", "<end_of_image>"
        tokenizer.image_token, tokenizer.image_token_id = "<image_soft_token>", ids["<image_soft_token>"]
        tokenizer.boi_token_id, tokenizer.eoi_token_id = ids["<start_of_image>"], ids["<end_of_image>"]
        eyes = transformers.SiglipVisionConfig(**EYES, image_size=28, patch_size=7, vision_use_head=False)
        text = transformers.Gemma3TextConfig(
            **text, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
        )
        tokens = {"image_token_id": ids["<image_soft_token>"], "boi_token_index": ids["<start_of_image>"]}
        tokens |= {"eoi_token_index": ids["<end_of_image>"], "mm_tokens_per_image": 4}
        config = transformers.Gemma3Config(text_config=text, vision_config=eyes, **tokens)
        pictures = transformers.Gemma3ImageProcessor(size=square)
        processor = transformers.Gemma3Processor(pictures, tokenizer, image_seq_length=4)
        model = transformers.Gemma3ForConditionalGeneration(config)
    processor.chat_template = TEMPLATE.replace("PLACE", PLACES[family])
    return model, processor


@pytest.fixture(scope="session")
def seeing() -> dict:
    """{family: (model, processor)}, built once."""
    torch.manual_seed(0)
    return {family: see(family) for family in PLACES}


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    """Noise, the same for a seed."""
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8))


def said(text: str, pictures: int = 1) -> list[dict]:
    return [{"role": "user", "content": [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]}]


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def rows_with_pictures(count: int = 6) -> list[dict]:
    """Rows of one and of two pictures of several shapes."""
    sizes = [(60, 40), (30, 60), (56, 56)]
    return [
        {
            "images": [picture(10 * i + k, *sizes[(i + k) % 3]) for k in range(1 + i % 2)],
            "prompt": said("what is it" + " now" * i, 1 + i % 2),
            "chosen": answer("the red sky"),
            "rejected": answer("blue" + " very" * (i % 3 + 1)),
        }
        for i in range(count)
    ]


def by_hand(model, processor, row: dict, which: str) -> float:
    """log π of a completion, in one forward pass of the model on what its processor gives of the row's whole text."""
    tokenizer = processor.tokenizer
    messages = row["prompt"] + row[which]
    prompt = processor.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    whole = processor.apply_chat_template(messages, tokenize=False).rstrip("\n")  # the newline is never generated
    inputs = processor(text=[whole], images=[row["images"]], add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0].double().log_softmax(-1)
    count = len(tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"])
    ids = inputs["input_ids"][0]
    return sum(float(logits[t - 1, ids[t]]) for t in range(len(ids) - count, len(ids)))


def prepared(rows: list[dict], processor, **options):
    return prepare_dataset(load_preferences(rows), processor, **options)


def scores(model, processor, rows) -> torch.Tensor:
    """log π of the chosen and the rejected completions of prepared rows in one batch, (B, 2)."""
    collator = DataCollatorForPreference(0, "padded", partial(read_images, processing_class=processor))
    with torch.no_grad():
        result = concatenated_forward(model.eval(), collator([rows[i] for i in range(len(rows))]))
    return torch.stack([result["chosen_logps"], result["rejected_logps"]], dim=1)


@pytest.mark.parametrize("family", PLACES)
def test_a_row_in_a_batch_is_the_row_alone_and_a_forward_by_hand(family, seeing):
    (model, processor), raw = seeing[family], rows_with_pictures()
    rows = prepared(raw, processor)
    together = scores(model, processor, rows)
    alone = torch.cat([scores(model, processor, rows.select([i])) for i in range(len(rows))])
    hand = [[by_hand(model, processor, row, which) for which in ("chosen", "rejected")] for row in raw]
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(together, torch.tensor(hand), atol=1e-4)
    assert len({round(value, 3) for value in together[:, 0].tolist()}) == len(rows)  # and the pictures are seen


@pytest.mark.parametrize("family", PLACES)
def test_training_sees_the_pictures(family, seeing, tmp_path):
    model, processor = seeing[family]
    options = {"processing_class": processor, "per_device_train_batch_size": 3, "learning_rate": 1e-3, "max_steps": 2}
    evaluated = {"eval_strategy": "steps", "generate_during_eval": True, "max_new_tokens": 3, "num_samples": 2}
    rows, other = rows_with_pictures(), [{**row, "images": row["images"][::-1]} for row in rows_with_pictures()]
    other = [{**row, "images": [picture(99 + i, *p.size) for i, p in enumerate(row["images"])]} for row in other]
    runs = {
        "full": start(tmp_path / "full", copy.deepcopy(model), rows, rows[:3], **options, **evaluated),
        "other": start(tmp_path / "other", copy.deepcopy(model), other, **options),
        "cached": start(
            tmp_path / "cached", copy.deepcopy(model), rows, **options, precompute_ref_log_probs=True,
            ref_cache_dir=str(tmp_path / "cache"),
        ),
        "adapter": start(tmp_path / "adapter", copy.deepcopy(model), rows, **options, peft_config={"r": 4}),
    }  # fmt: skip
    for run in runs.values():
        assert curve(run)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert curve(runs["cached"]) == pytest.approx(curve(runs["full"]), abs=1e-5)
    moved = curve(runs["full"])[1]
    assert abs(moved - math.log(2)) > 1e-4 and abs(moved - curve(runs["other"])[1]) > 1e-4
    assert curve(runs["adapter"])[1] != pytest.approx(math.log(2), abs=1e-6)
    assert len((tmp_path / "full" / "samples.jsonl").read_text().splitlines()) == 2 * 2
