"""Models that see: rows with pictures in all their forms, through five families built small, with their processors."""

import base64
import copy
import io
import json
import math
from functools import partial

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import curve, make_model, make_tokenizer, read, run, start
from datasets import Dataset, List
from PIL import Image

from dpo import chat
from dpo.checks import rows_to_try
from dpo.collate import DataCollatorForPreference, concatenated_inputs, go_on
from dpo.config import UserError
from dpo.data import prepare_dataset, process_row, read_images, tokenize_row
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
        own = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
        given = {"tokenizer_object": tokenizer.backend_tokenizer, "extra_special_tokens": own}
        tokenizer = type(tokenizer)(**given, pad_token=tokenizer.pad_token, eos_token=tokenizer.eos_token)
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
        projector = model.model.multi_modal_projector.mm_input_projection_weight  # zeros: all pictures would look alike
        projector.data = 0.2 * torch.randn_like(projector)
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
    shown = {"images": [row["images"]]} if row["images"] else {}
    inputs = processor(text=[whole], **shown, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0].double().log_softmax(-1)
    count = len(tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"])
    ids = inputs["input_ids"][0]
    return sum(float(logits[t - 1, ids[t]]) for t in range(len(ids) - count, len(ids)))


def prepared(rows: list[dict], processor, **options):
    return prepare_dataset(load_preferences(rows), processor, **options)


def scores(model, processor, rows, layout: str = "padded") -> torch.Tensor:
    """log π of the chosen and the rejected completions of prepared rows in one batch, (B, 2)."""
    collator = DataCollatorForPreference(0, layout, partial(read_images, processing_class=processor))
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


READ_FLAT = ("llava", "llava_next", "idefics3")  # Qwen's positions are of three kinds, Gemma's pictures see their end


@pytest.mark.parametrize("family", PLACES)
@pytest.mark.parametrize("layout", ["prefix_shared", "padding_free"])
def test_pictures_in_a_flat_row_are_as_by_hand_or_refused(layout, family, seeing, tmp_path):
    (model, processor), raw = seeing[family], rows_with_pictures()
    texts = [
        {**row, "images": [], "prompt": [{"role": "user", "content": row["prompt"][0]["content"][-1:]}]} for row in raw
    ]
    options = {"processing_class": processor, "max_steps": 1, "layout": layout}
    own = copy.deepcopy(model)
    if family not in READ_FLAT:
        with pytest.raises(UserError, match=f"^{layout} differs from padded by .*: leave out layout {layout}"):
            start(tmp_path / "a", own, texts + raw[:1], **options)
        with pytest.raises(UserError, match=f"^{layout} differs from padded by"):  # pictures in the evaluation alone
            start(tmp_path / "b", own, texts, raw[:2], eval_strategy="steps", **options)
        raw = texts
    run_ = start(tmp_path / "c", own, raw[:3] + texts[:3], **options, learning_rate=0.0)
    assert run_.layout.startswith(layout) and curve(run_)[0] == pytest.approx(math.log(2), abs=1e-6)
    rows = prepared(raw[::-1], processor)
    hand = [[by_hand(model, processor, row, which) for which in ("chosen", "rejected")] for row in raw[::-1]]
    assert torch.allclose(scores(own, processor, rows, layout), torch.tensor(hand), atol=1e-4)
    assert torch.allclose(scores(own, processor, rows.select([0]), layout), torch.tensor(hand[:1]), atol=1e-4)


def test_a_picture_that_all_look_alike_at_first_is_not_taken_for_none(seeing, tmp_path):
    """A fresh projector of Gemma 3 is zero: what its layout would do to pictures shows once it has learnt something."""
    model, processor = seeing["gemma3"]
    own = copy.deepcopy(model)
    torch.nn.init.zeros_(own.model.multi_modal_projector.mm_input_projection_weight)
    run_ = start(tmp_path, own, rows_with_pictures(), processing_class=processor, max_steps=1, learning_rate=0.0)
    assert run_.layout.startswith("padded (prefix_shared differs")
    assert not run_.model.model.multi_modal_projector.mm_input_projection_weight.any()


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
    for each in runs.values():
        assert curve(each)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert curve(runs["cached"]) == pytest.approx(curve(runs["full"]), abs=1e-5)
    moved = curve(runs["full"])[1]
    assert abs(moved - math.log(2)) > 1e-4 and abs(moved - curve(runs["other"])[1]) > 1e-4
    assert curve(runs["adapter"])[1] != pytest.approx(math.log(2), abs=1e-6)
    assert len((tmp_path / "full" / "samples.jsonl").read_text().splitlines()) == 2 * 2


def test_a_picture_is_the_same_in_every_form(seeing, tmp_path):
    """PIL, path, bytes, base64 and URL parts, datasets.Image; in columns and in messages; as RLAIF-V has its rows."""
    _, processor = seeing["llava"]
    image = picture(1)
    image.save(tmp_path / "a.png")
    encoded = (tmp_path / "a.png").read_bytes()
    url = "data:image/png;base64," + base64.b64encode(encoded).decode()
    text = {"type": "text", "text": "what is it"}
    answers = {"chosen": answer("the red sky"), "rejected": answer("blue")}

    def shown(**part) -> dict:
        return {"prompt": [{"role": "user", "content": [{"type": "image", **part}, text]}], **answers}

    places, user = said("what is it"), [{"role": "user", "content": "what is it"}]
    forms = [
        {"images": [image], "prompt": places, **answers},
        {"images": [str(tmp_path / "a.png")], "prompt": places, **answers},
        {"images": [encoded], "prompt": places, **answers},
        {"images": [{"bytes": encoded, "path": None}], "prompt": places, **answers},
        {"images": [np.asarray(image)], "prompt": places, **answers},
        {"image": image, "prompt": places, **answers},
        {"image": image, "prompt": user, **answers},
        {"image": image, "prompt": "what is it", "chosen": "the red sky", "rejected": "blue"},
        {"image": image, "question": "what is it", "chosen": "the red sky", "rejected": "blue"},
        shown(image=image),
        shown(path=str(tmp_path / "a.png")),
        shown(base64=base64.b64encode(encoded).decode()),
        {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, text]}], **answers},
        {"images": [image], **{key: places + value for key, value in answers.items()}},  # an implicit prompt
        {key: shown(image=image)["prompt"] + value for key, value in answers.items()},
    ]
    table = Dataset.from_dict(
        {"images": [[image]], "prompt": ["what is it"], "chosen": ["the red sky"], "rejected": ["blue"]}
    )
    tables = [load_preferences([form]) for form in forms] + [{"dataset": table}]
    tables.append({"dataset": table.cast_column("images", List(datasets.Image(decode=False)))})
    rows = [prepare_dataset(each, processor)[0] for each in tables]
    for row in rows:
        assert (
            row["prompt_input_ids"] == rows[0]["prompt_input_ids"]
            and row["chosen_input_ids"] == rows[0]["chosen_input_ids"]
        )
        (seen,) = row["images"]
        assert np.array_equal(np.asarray(open_image(seen)), np.asarray(image))


def test_pictures_of_all_modes_are_opened_upright_and_in_colour():
    colours = Image.new("RGB", (4, 2), (200, 10, 10))
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    colours.save(turned, "PNG", exif=exif)
    assert open_image({"bytes": turned.getvalue(), "path": None}).size == (2, 4)
    for mode in ("L", "P", "RGBA", "CMYK", "1", "LA"):
        assert open_image(lift_images({"image": colours.convert(mode)})["images"][0]).mode == "RGB"


BAD = {  # rows with pictures, and the words that refuse them
    "no picture for a place": ({"prompt": said("a", 2)}, "the row has 1 pictures for 2 places in its messages"),
    "no place": ({"images": [picture(1), picture(2)]}, "the row has 2 pictures for 1 places in its messages"),
    "a file that is not there": ({"images": ["nowhere.png"]}, "there is no picture 'nowhere.png': check the path"),
    "a broken one": ({"images": [b"no picture"]}, "a picture cannot be read"),
    "no picture at all": ({"images": [3]}, "a picture is int: give a PIL image, a path, or encoded bytes"),
    "in an answer": (
        {"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]},
        "column 'chosen', message 1 is the assistant's and has a picture: only prompts may",
    ),
    "an answer's own": (
        {
            "prompt": None,
            "chosen": [{"role": "user", "content": [{"type": "image", "image": picture(1)}]}, *answer("a")],
            "rejected": [{"role": "user", "content": [{"type": "image", "image": picture(2)}]}, *answer("b")],
        },
        "column 'rejected' shows other pictures than the prompt",
    ),
    "a video": ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "a part of type 'video'"),
    "its sign in the text": (
        {"prompt": "what <image><image> is it", "chosen": "a", "rejected": "b"},
        "2 places <image>",
    ),
    "an index": (
        {"prompt": [{"role": "user", "content": [{"type": "image", "index": 1}, {"type": "text", "text": "a"}]}]},
        "a picture's index is 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_rows_with_pictures_that_are_wrong_are_refused_by_number(name, seeing):
    changed, words = BAD[name]
    good = {"images": [picture(1)], "prompt": said("a"), "chosen": answer("red"), "rejected": answer("blue")}
    rows = [good, {**good, **changed}] if changed.get("prompt", "") is not None else [changed, changed]
    _, processor = seeing["llava"]
    with pytest.raises(ValueError, match=rf"dataset, row {rows.index(rows[-1]) + 1}: .*({words})"):
        prepared(rows, processor)


def test_pictures_are_never_cut(seeing, caplog):
    """A row whose prompt does not fit is left out and counted; completions are cut as ever."""
    _, processor = seeing["llava"]
    rows = rows_with_pictures(6)
    whole = prepared(rows, processor)
    longest = sorted(len(ids) for ids in whole["prompt_input_ids"])
    kept = prepared(rows, processor, max_prompt_length=longest[3])
    assert len(kept) == 4 and max(map(len, kept["prompt_input_ids"])) == longest[3]
    assert "2 of 6 rows of dataset left out: truncation would cut their pictures" in caplog.text
    kept = prepared(rows, processor, max_length=longest[-1] + 1)
    assert len(kept) < 6 and all(ids in whole["prompt_input_ids"][:] for ids in kept["prompt_input_ids"])
    row = {"prompt": "a <image> b", "chosen": " red", "rejected": " blue", "images": [picture(1)]}
    assert len(process_row(row, processor, 7)["prompt_input_ids"]) == 7
    one = process_row({**row, "images": row["images"][0]}, processor)
    assert torch.equal(one["pixel_values"], process_row(row, processor)["pixel_values"])
    with pytest.raises(ValueError, match="the prompt with its pictures has 7 tokens, max_prompt_length 6"):
        process_row(row, processor, 6)


@pytest.mark.parametrize("family", PLACES)
def test_process_row_and_concatenated_inputs_are_as_the_document_has_them(family, seeing):
    model, processor = seeing[family]
    place = PLACES[family]
    texts = [f"a {place} b", f"{place} is {place} very warm today"]
    rows = [
        process_row(
            {"prompt": text, "chosen": " red", "rejected": " dark blue", "images": [picture(1), picture(2)][:count]},
            processor, None, 2, False,
        )
        for count, text in enumerate(texts, start=1)
    ]  # fmt: skip
    assert {"prompt_input_ids", "chosen_input_ids", "rejected_input_ids", "pixel_values"} <= rows[0].keys()
    batch = DataCollatorForPreference(pad_token_id=0)(rows)
    joined = concatenated_inputs(batch, 0)
    assert torch.equal(joined["pixel_values"], torch.cat([batch["prompt_pixel_values"]] * 2))
    assert {key.removeprefix("prompt_") for key in batch if key.startswith("prompt_")} <= {
        *joined, "input_ids", "attention_mask"
    }  # fmt: skip
    with torch.no_grad():
        together = concatenated_forward(model.eval(), batch)["chosen_logps"]
        alone = [concatenated_forward(model, DataCollatorForPreference(0)([row]))["chosen_logps"][0] for row in rows]
    assert torch.allclose(together, torch.stack(alone), atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_model_that_sees_is_trained_and_talked_to_by_its_name(family, seeing, tmp_path, capsys, caplog):
    model, processor = seeing[family]
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = rows_with_pictures(4)
    options = {"max_steps": 1, "use_peft": True, "lora_r": 4, "processing_class": None, "learning_rate": 1e-2}
    caplog.set_level("INFO")
    run = start(tmp_path / "run", str(tmp_path / "model"), rows, **options, merge_adapter=True)
    assert "image-text-to-text" in (tmp_path / "run" / "README.md").read_text() and "×4" in caplog.text
    assert type(run.processing_class) is type(processor) and type(load_processor(str(tmp_path / "run"))) is type(
        processor
    )
    again = load_model(str(tmp_path / "run"))
    assert torch.allclose(
        scores(again, processor, run.train_rows), scores(run.model, processor, run.train_rows), atol=1e-5
    )
    merged, own = load_model(str(tmp_path / "run" / "merged")), load_processor(str(tmp_path / "run" / "merged"))
    assert torch.allclose(scores(merged, own, run.train_rows), scores(again, processor, run.train_rows), atol=1e-4)
    rows[0]["images"][0].save(tmp_path / "a.png")
    ask = ["--prompt", "what is it", "--image", str(tmp_path / "a.png"), "--temperature", "0", "--max_new_tokens", "4"]
    chat.main(["--model_name_or_path", str(tmp_path / "run"), *ask, "--compare", str(tmp_path / "model")])
    shown = capsys.readouterr().out
    assert " │ " in shown and "model" in shown.splitlines()[0] and "run" in shown.splitlines()[0]
    with pytest.raises(SystemExit, match="there is no picture"):
        chat.main(["--model_name_or_path", str(tmp_path / "run"), "--prompt", "a", "--image", "nowhere.png"])
    with pytest.raises(UserError, match="column 'images': the model reads text alone"):
        start(tmp_path / "blind", rows=rows)


def test_a_prompt_of_segments_goes_on_with_the_second_one():
    """Where types tell pictures, a completion is text; where they tell segments (PaliGemma), it is the second one."""
    tells = {"prompt_input_ids": [5, 6, 7], "chosen_input_ids": [8, 2], "rejected_input_ids": [9, 2]}
    for types, ending in (([1, 0, 0], [0, 0]), ([0, 0, 0], [1, 1])):
        row = tells | {"token_type_ids": torch.tensor([types])}
        batch = DataCollatorForPreference(0, "padded")([row])
        assert batch["inputs"]["token_type_ids"].tolist() == [types + ending] * 2


@pytest.mark.slow
def test_two_processes_equal_one_on_pictures_from_files(seeing, tmp_path):
    """Rows of a text and a picture, one without, by the command line."""
    model, processor = seeing["llava"]
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"what is it {'now ' * i}", "chosen": "the red sky", "rejected": "blue"} for i in range(7)]
    for i, row in enumerate(rows[:6]):
        picture(i).save(tmp_path / f"{i}.png")
        row["image"] = str(tmp_path / f"{i}.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    curves = {}
    for processes in (0, 2):
        files = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "rows.jsonl")]
        options = "--max_steps 3 --per_device_train_batch_size 2 --logging_steps 1 --save_strategy no --use_cpu"
        options += f" --gradient_accumulation_steps {1 if processes else 2} --learning_rate 1e-3 --dataset_num_proc 2"
        out = tmp_path / str(processes)
        run("dpo.loop", *files, *options.split(), "--output_dir", str(out), processes=processes)
        curves[processes] = curve(read(out))
    assert curves[0] == pytest.approx(curves[2], abs=1e-5) and curves[0][2] != pytest.approx(math.log(2), abs=1e-4)


def test_a_model_that_begins_with_bos_gets_it_once_as_its_processor_would_put_it(seeing, tmp_path):
    """Where a chat template writes none: with pictures and without, as apply_chat_template tokenises."""
    model, _ = seeing["llava"]
    own = make_tokenizer(None, bos=True)
    own.add_special_tokens({"additional_special_tokens": ["<image>"]})
    how = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    eyes = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = transformers.LlavaProcessor(eyes, own, **how, chat_template=TEMPLATE.replace("PLACE", "<image>"))
    for row in (
        {"images": [picture(1)], "prompt": said("a"), "chosen": answer("red"), "rejected": answer("blue")},
        {"images": None, "prompt": said("a", 0), "chosen": answer("red"), "rejected": answer("blue")},
    ):
        (ids,) = prepared([row], processor)["prompt_input_ids"]
        messages = copy.deepcopy(row["prompt"])
        if row["images"]:
            messages[0]["content"][0]["image"] = row["images"][0]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        assert ids == processor.apply_chat_template(messages, **options)["input_ids"][0]
        assert ids.count(own.bos_token_id) == 1 and ids[0] == own.bos_token_id


def test_pictures_of_a_hub_s_column_are_read_as_they_are_stored(seeing, tmp_path):
    """Not opened and packed again: a JPEG would be another; and a broken one is a bad row, not the end."""
    _, processor = seeing["llava"]
    file = io.BytesIO()
    picture(1).save(file, "JPEG", quality=30)
    stored = [{"bytes": file.getvalue(), "path": None}, {"bytes": b"no picture", "path": None}]
    texts = {"question": ["a", "b"], "chosen": ["red"] * 2, "rejected": ["blue"] * 2}
    table = Dataset.from_dict({"image": stored, **texts}).cast_column("image", datasets.Image())
    rows = prepare_dataset({"dataset": table}, processor, skip_bad_rows=True)
    assert len(rows) == 1 and rows[0]["images"] == [stored[0]]
    with pytest.raises(ValueError, match="dataset, row 2: .*picture cannot be read"):
        prepare_dataset({"dataset": table}, processor)


def test_a_picture_that_changed_since_its_row_was_prepared_is_noticed(seeing, tmp_path):
    _, processor = seeing["llava"]
    picture(1).save(tmp_path / "a.png")
    row = {"images": [str(tmp_path / "a.png")], "prompt": said("a"), "chosen": answer("red"), "rejected": answer("b")}
    (row,) = prepared([row], processor)
    assert read_images(row, processor)["pixel_values"].shape == (1, 3, 28, 28)
    picture(2).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="dataset, row 1: a picture is not what it was"):
        read_images(row, processor)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="dataset, row 1: a picture cannot be read"):
        read_images(row, processor)


def test_conversations_of_a_ranking_may_each_show_the_prompt_s_picture(seeing):
    _, processor = seeing["llava"]
    whole = [said("a") + answer(text) for text in ("red", "dark", "blue")]
    row = {"images": [picture(1)], "completions": whole, "scores": [3.0, 2.0, 1.0]}
    ranked = prepared([row], processor, ranked=True)[0]
    plain = {"images": [picture(1)], "prompt": said("a"), "chosen": answer("red"), "rejected": answer("blue")}
    assert ranked["prompt_input_ids"] == prepared([plain], processor)[0]["prompt_input_ids"]
    assert len(ranked["rejected_input_ids"]) == 2 and len(ranked["images"]) == 1


def test_a_mask_of_what_a_token_sees_goes_on_as_it_was_at_the_end():
    """As Mllama's cross_attention_mask (1, P, pictures, tiles)."""
    mask = torch.tensor([[[1, 0], [1, 1], [0, 1]]])
    assert go_on(mask, 2).tolist() == [[[1, 0], [1, 1], [0, 1], [0, 1], [0, 1]]]
    rows = [
        {
            "prompt_input_ids": ids,
            "chosen_input_ids": [8, 2],
            "rejected_input_ids": [9, 2],
            "cross_attention_mask": seen,
        }
        for ids, seen in (([5, 6], torch.tensor([[[0], [1]]])), ([5, 6, 7], torch.tensor([[[0], [1], [1]]])))
    ]
    seen = DataCollatorForPreference(0, "padded")(rows)["inputs"]["cross_attention_mask"]
    assert seen[..., 0].tolist() == [[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]] * 2


@pytest.mark.parametrize("family", PLACES)
def test_rankings_with_pictures_of_differing_length_are_scored_as_alone(family, seeing):
    model, processor = seeing[family]
    raw = rows_with_pictures()
    for i, row in enumerate(raw):
        row["rejected"] = [answer("blue" + " very" * k) for k in range(1 + i % 3)]
    rows = prepared(raw, processor, ranked=True)
    collator = DataCollatorForPreference(0, "padded", partial(read_images, processing_class=processor))
    with torch.no_grad():
        together = concatenated_forward(model.eval(), collator([rows[i] for i in range(len(rows))]))["rejected_logps"]
        for i in range(len(rows)):
            own = concatenated_forward(model, collator([rows[i]]))["rejected_logps"].reshape(-1)
            assert torch.allclose(together[i, : len(own)], own, atol=1e-4) and not together[i, len(own) :].any()


def test_what_was_worked_out_for_one_picture_is_not_taken_for_another(seeing, tmp_path):
    model, processor = seeing["llava"]
    rows = rows_with_pictures()
    other = [{**row, "images": [picture(99 + i, *p.size) for i, p in enumerate(row["images"])]} for row in rows]
    options = {"processing_class": processor, "max_steps": 1, "precompute_ref_log_probs": True}
    brighter = copy.deepcopy(processor)
    brighter.image_processor.image_mean = [0.1, 0.2, 0.3]  # the same pictures become other numbers
    for number, (each, eyes) in enumerate([(rows, processor), (other, processor), (rows, brighter)]):
        options |= {"processing_class": eyes, "ref_cache_dir": str(tmp_path / "cache")}
        run_ = start(tmp_path / str(number), copy.deepcopy(model), each, **options)
        assert curve(run_)[0] == pytest.approx(math.log(2), abs=1e-4)


def test_a_processor_that_was_changed_after_the_rows_were_made_is_noticed(seeing):
    _, processor = seeing["llava"]
    row = {**prepared(rows_with_pictures(1), processor)[0]}
    with pytest.raises(ValueError, match="dataset, row 1: the processor gives other tokens than before"):
        read_images({**row, "prompt_input_ids": row["prompt_input_ids"][1:]}, processor)


def test_answers_in_the_evaluation_see_the_pictures(seeing, tmp_path):
    (original, processor), asked = seeing["llava"], []
    model, other = copy.deepcopy(original), copy.deepcopy(original)
    model.generate = lambda **inputs: asked.append(inputs) or original.generate(**inputs)
    options = {"eval_strategy": "steps", "generate_during_eval": True, "max_new_tokens": 2, "num_samples": 2}
    rows = rows_with_pictures(4)
    start(tmp_path, model, rows, rows[:2], processing_class=processor, max_steps=1, **options, ref_model=other)
    assert asked and all("pixel_values" in inputs for inputs in asked)


def test_other_pictures_are_another_run(seeing, tmp_path):
    model, processor = seeing["llava"]
    rows = rows_with_pictures()
    other = [{**row, "images": [picture(99 + i, *p.size) for i, p in enumerate(row["images"])]} for row in rows]
    options = {"processing_class": processor, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    start(tmp_path / "a", copy.deepcopy(model), rows, **options)
    resumed = {"resume_from_checkpoint": str(tmp_path / "a" / "checkpoint-1")}
    with pytest.raises(UserError, match="it is of another run, with rows"):
        start(tmp_path / "b", copy.deepcopy(model), other, **options, **resumed)


def test_rows_to_try_are_short_and_beside_those_with_other_numbers_of_pictures():
    assert rows_to_try([5, 3, 9, 4], [0, 0, 0, 0]) == [(1, {3})]
    assert rows_to_try([5, 3, 9, 4], [0, 1, 2, 0]) == [(3, {3, 1, 2}), (1, {3, 1, 2})]
    assert rows_to_try([5, 3, 9, 4], [1, 1, 2, 2]) == [(1, {3, 1})]


def test_pictures_that_would_be_dropped_are_refused(seeing, tmp_path):
    """By a collator of the caller's, or by a model that has no use for them."""
    (model, processor), rows = seeing["llava"], rows_with_pictures(4)
    words = "dataset, row 1 has pictures, which the "
    with pytest.raises(UserError, match=f"{words}data_collator does not hand on"):
        options = {"processing_class": processor, "data_collator": DataCollatorForPreference(0)}
        start(tmp_path / "a", copy.deepcopy(model), rows, **options)
    with pytest.raises(UserError, match=f"{words}model has no use for"):
        start(tmp_path / "b", make_model(vocab_size=500), rows, processing_class=processor)


@pytest.mark.parametrize("family", ["gemma3", "qwen2_vl"])
def test_a_processed_row_without_pictures_is_the_tokenizer_s(family, seeing):
    """And scored alike beside one with a picture: its completion is no picture."""
    model, processor = seeing[family]
    text = {"prompt": "what is it", "chosen": " red", "rejected": " blue"}
    plain = process_row({**text, "images": []}, processor)
    assert plain == tokenize_row(text, processor)
    seen = process_row({**text, "prompt": f"a {PLACES[family]}", "images": [picture(1)]}, processor)
    with torch.no_grad():
        alone, beside = (
            concatenated_forward(model.eval(), DataCollatorForPreference(0)(rows))["chosen_logps"][0]
            for rows in ([plain], [plain, seen])
        )
    assert float(alone) == pytest.approx(float(beside), abs=1e-4)


def test_as_many_patches_as_tokens_are_still_a_picture_s():
    """pixel_attention_mask is (pictures, patches) in LFM2-VL: its second dimension may be the prompt's length."""
    mask = torch.tensor([[1, 1, 0]])
    row = {"prompt_input_ids": [5, 6, 7], "chosen_input_ids": [8], "rejected_input_ids": [9, 2]}
    row |= {"pixel_attention_mask": mask, "pixel_values": torch.zeros(1, 3, 4)}
    batch = DataCollatorForPreference(0, "padded")([row])
    assert batch["inputs"]["pixel_attention_mask"].tolist() == [[1, 1, 0]] * 2
