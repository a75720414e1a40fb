"""Rows of text become the right token ids, and bad input is refused in one line that names it."""

import csv
import gzip
import json
import logging
import os
import random
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from conftest import CHATML, make_rows, make_tokenizer
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from dpo import data, sources
from dpo.data import prepare_dataset, render_row, split_prompt, tokenize_row, truncate_row
from dpo.sources import load_preferences

PAIR = {"prompt": "the sky is", "chosen": " blue", "rejected": " green"}
USER = {"role": "user", "content": "sky?"}
BLUE, GREEN = {"role": "assistant", "content": "blue"}, {"role": "assistant", "content": "green"}
CHAT = {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}
BOS_TOKENIZER = make_tokenizer(bos=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_jsonl(path: Path, rows: list, opener=open) -> str:
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def rows_of(source, **options) -> list[dict]:
    return [row for part in load_preferences(source, **options).values() for row in part]


def prepared(source, tokenizer, **options) -> Dataset:
    return prepare_dataset(load_preferences(source), tokenizer, **options)


def words(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def texts(tokenizer, row: dict) -> tuple[str, ...]:
    return tuple(words(tokenizer, row[f"{part}_input_ids"]) for part in ("prompt", "chosen", "rejected"))


def refusal(source, tokenizer=None, *, split="train", **options) -> str:
    """The words of the ValueError that a source meets on its way to token ids; they are one line."""
    with pytest.raises(ValueError) as raised:
        prepare_dataset(load_preferences(source, split=split), tokenizer or make_tokenizer(), **options)
    message = str(raised.value)
    assert message.strip() and "\n" not in message
    return message


def sentencepiece_like(kind: str) -> PreTrainedTokenizerFast:
    """Metaspace BPE with byte fallback, as Llama's and Mistral's: "legacy" puts the space in by a normalizer."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"])}
    merges = []
    for letter in "abcdefghijklmnopqrstuvwxyz.P":
        vocab.setdefault(letter, len(vocab))
    for word in ("▁blue", "▁green", "▁the", "blue", "green"):
        for end in range(2, len(word) + 1):
            vocab.setdefault(word[:end], len(vocab))
            if (merge := (word[: end - 1], word[end - 1])) not in merges:
                merges.append(merge)
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    if kind == "legacy":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level_with_prefix_space() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


# ------------------------------------------------------------------------------------------------------------- sources


def write_as(kind: str, rows: list[dict], folder: Path) -> str:
    if kind in ("json", "jsonl", "jsonl.gz"):
        path = folder / f"some.pairs.{kind}"
        if kind == "json":
            path.write_text(json.dumps(rows, indent=1))
            return str(path)
        return write_jsonl(path, rows, gzip.open if kind.endswith("gz") else open)
    path, table = folder / f"pairs.{kind}", Dataset.from_list(rows)
    if kind == "parquet":
        table.to_parquet(path)
    elif kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([list(rows[0]), *(row.values() for row in rows)])
    else:  # the file that save_to_disk keeps its rows in
        table.save_to_disk(folder / "saved")
        os.rename(next((folder / "saved").glob("*.arrow")), path)
    return str(path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "jsonl.gz", "parquet", "csv", "arrow"])
def test_every_file_format_gives_the_rows_it_holds(kind, tmp_path):
    rows = [*make_rows(3), {"prompt": 'a "quoted",\n line', "chosen": " é 😀", "rejected": " \\ ü"}]
    assert rows_of(write_as(kind, rows, tmp_path)) == rows


@pytest.mark.parametrize("kind", ["json", "jsonl", "jsonl.gz", "parquet", "arrow"])
def test_every_nested_file_format_keeps_conversations(kind, tmp_path):
    rows = make_rows(3, conversational=True)
    assert rows_of(write_as(kind, rows, tmp_path)) == rows


def test_csv_texts_stay_as_they_are_written(tmp_path):
    rows = [
        {"prompt": "NA", "chosen": "12", "rejected": "0013"},
        {"prompt": "", "chosen": "null", "rejected": "1e5"},
        {"prompt": "nan", "chosen": "True", "rejected": "2024-01-02"},
    ]
    assert rows_of(write_as("csv", rows, tmp_path)) == rows


def test_an_empty_csv_field_is_reported_as_empty(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\np,a,b\np,,b\n")
    assert f"{path}, row 2: column 'chosen' is empty" in refusal(path)


def test_objects_are_taken_as_they_are():
    rows = make_rows(4)
    assert rows_of(Dataset.from_list(rows)) == rows_of(rows) == rows
    both = DatasetDict(train=Dataset.from_list(rows[:3]), test=Dataset.from_list(rows[3:]))
    assert (rows_of(both), rows_of(both, split="test")) == (rows[:3], rows[3:])
    assert "no split 'valid': take one of train, test" in refusal(both, split="valid")


def test_a_format_that_the_caller_set_changes_nothing(tokenizer):
    rows = Dataset.from_list(make_rows(3))
    assert [*prepared(rows.with_format("torch"), tokenizer)] == [*prepared(rows, tokenizer)]


def test_a_list_keeps_a_column_that_only_later_rows_have():
    assert rows_of([{"chosen": "a", "rejected": "b"}, PAIR])[1] == PAIR


def test_a_directory_of_files_is_split_by_their_names(tmp_path):
    rows = make_rows(5)
    write_jsonl(tmp_path / "train-00000.jsonl", rows[:2])
    write_jsonl(tmp_path / "train-00001.jsonl", rows[2:4])
    write_jsonl(tmp_path / "test.jsonl", rows[4:])
    assert rows_of(str(tmp_path)) == rows[:4]
    assert rows_of(tmp_path, split="test") == rows[4:]
    assert list(load_preferences(tmp_path)) == [str(tmp_path / f"train-0000{i}.jsonl") for i in (0, 1)]
    assert "no split 'valid': take one of train, test" in refusal(tmp_path, split="valid")


def test_saved_datasets_are_opened(tmp_path):
    rows = Dataset.from_list(make_rows(3))
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows.select([0]), test=rows.select([1, 2])).save_to_disk(tmp_path / "two")
    assert rows_of(tmp_path / "one") == rows.to_list()
    assert rows_of(str(tmp_path / "two"), split="test") == rows.to_list()[1:]
    assert "no split 'valid': take one of train, test" in refusal(tmp_path / "two", split="valid")


def test_the_hub_is_asked_for_name_subset_and_split(monkeypatch):
    asked = []
    monkeypatch.setattr(
        sources, "load_dataset", lambda *args, **options: asked.append((args, options)) or Dataset.from_list([PAIR])
    )
    parts = load_preferences("org/pairs", split="test", subset="small")
    assert asked == [(("org/pairs", "small"), {"split": "test"})]
    assert {name: part.to_list() for name, part in parts.items()} == {"org/pairs (test)": [PAIR]}


def test_an_unreachable_hub_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal("nobody/such-pairs")
    assert "'nobody/such-pairs'" in message and "Hub" in message and "file or directory" in message


def test_a_subset_is_refused_where_there_can_be_none(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [PAIR])
    for source in (path, [PAIR], Dataset.from_list([PAIR])):
        with pytest.raises(ValueError, match="subset 'small'"):
            load_preferences(source, subset="small")
    with pytest.raises(ValueError, match="'small' not found"):
        load_preferences(tmp_path, subset="small")


# -------------------------------------------------------------------------------- what is the prompt, and what the text


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        (PAIR, "the sky is", " blue", " green"),
        ({"chosen": "the sky is blue now", "rejected": "the sky is bleak"}, "the sky is", " blue now", " bleak"),
        ({"chosen": "a b", "rejected": "a b c"}, "a", " b", " b c"),
        ({"chosen": "say:\nblue", "rejected": "say:\ngreen"}, "say:", "\nblue", "\ngreen"),
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: It is blue",
                "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: It is green",
            },
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
            " It is blue",
            " It is green",
        ),
    ],
)
def test_the_prompt_of_texts_is_found(row, prompt, chosen, rejected):
    assert split_prompt(row.get("prompt"), [row["chosen"], row["rejected"]]) == (prompt, [chosen, rejected])


SYSTEM = {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (CHAT, [USER]),
        ({"chosen": [USER, BLUE], "rejected": [USER, GREEN], "score_chosen": 9.0, "score_rejected": 1.0}, [USER]),
        ({"prompt": "sky?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, [USER]),
        ({"prompt": "sky?", "chosen": [BLUE], "rejected": [GREEN]}, [USER]),
        ({"prompt": [USER], "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, [USER]),
        ({"prompt": [], "chosen": [SYSTEM, USER, BLUE], "rejected": [SYSTEM, USER, GREEN]}, [SYSTEM, USER]),
        ({"prompt": [SYSTEM, USER, GREEN, USER], "chosen": [BLUE], "rejected": [GREEN]}, [SYSTEM, USER, GREEN, USER]),
        # What the completions share is not the prompt that the column has: both stay.
        ({"prompt": "sky?", "chosen": [GREEN, USER, BLUE], "rejected": [GREEN, USER, GREEN]}, [GREEN, USER]),
        ({"prompt": "sky?", "chosen": [GREEN, BLUE], "rejected": [GREEN, GREEN]}, [USER, GREEN]),
    ],
)
def test_the_prompt_of_conversations_is_found(row, prompt):
    assert split_prompt(row.get("prompt"), [row["chosen"], row["rejected"]]) == (prompt, [[BLUE], [GREEN]])


def test_conversations_become_prompt_and_completions_of_the_chat_template(tokenizer):
    row = {"prompt": [SYSTEM, USER], "chosen": [BLUE], "rejected": [GREEN], "source": "x", "score": 3}
    assert texts(tokenizer, prepared([row], tokenizer)[0]) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nsky?<|im_end|>\n<|im_start|>assistant\n",
        "blue<|im_end|>",
        "green<|im_end|>",
    )


@pytest.mark.parametrize("as_text", [True, False])
def test_tools_reach_the_chat_template_without_the_nulls_of_the_table(as_text):
    tokenizer = make_tokenizer("{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}" + CHATML)
    tools = [
        [{"type": "function", "function": {"name": name, "parameters": {"properties": {name: {"type": "string"}}}}}]
        for name in ("weather", "clock")
    ]
    rows = [{**CHAT, "tools": json.dumps(tool) if as_text else tool} for tool in tools]
    for row, tool in zip(prepared(rows, tokenizer), tools, strict=True):
        line = texts(tokenizer, row)[0].splitlines()[0]
        assert json.loads(line.removeprefix("TOOLS ")) == tool


def test_a_template_that_is_not_prefix_stable_is_split_at_the_common_start_and_counted(caplog):
    tokenizer = make_tokenizer(
        "{% for m in messages %}[{{ loop.index }} of {{ messages | length }}] {{ m['content'] }}\n{% endfor %}"
    )
    row = prepared([CHAT, CHAT], tokenizer)[1]
    assert texts(tokenizer, row) == (
        "[1 of ",
        "2] sky?\n[2 of 2] blue\n<|im_end|>",
        "2] sky?\n[2 of 2] green\n<|im_end|>",
    )
    assert "2 of 2 rows" in caplog.text and "not prefix-stable" in caplog.text


# ---------------------------------------------------------------------------------------------------------- BOS and EOS


def test_plain_text_begins_with_exactly_one_bos_where_the_tokenizer_adds_one():
    bos = BOS_TOKENIZER.bos_token_id
    rows = prepared([PAIR, {**PAIR, "prompt": "<s>the sky is"}], BOS_TOKENIZER)
    for row in rows:
        assert row["prompt_input_ids"][0] == bos
        assert [bos] not in [row["prompt_input_ids"][i : i + 1] for i in range(1, 9)]
        assert bos not in row["chosen_input_ids"] + row["rejected_input_ids"]
    assert rows[0] == rows[1]


def test_no_bos_where_the_tokenizer_adds_none(tokenizer):
    assert texts(tokenizer, prepared([PAIR], tokenizer)[0])[0] == "the sky is"
    defined = sentencepiece_like("first")  # it has a BOS token but does not put it before a text
    assert defined.bos_token_id not in prepared([PAIR], defined)[0]["prompt_input_ids"]


def test_chat_template_text_gets_no_bos():
    assert BOS_TOKENIZER.bos_token_id not in prepared([CHAT], BOS_TOKENIZER)[0]["prompt_input_ids"]
    itself = make_tokenizer("{{ bos_token }}" + CHATML, bos=True)
    assert prepared([CHAT], itself)[0]["prompt_input_ids"].count(itself.bos_token_id) == 1


def test_a_row_without_a_prompt_starts_from_bos():
    row = prepared([{"prompt": "", "chosen": "blue", "rejected": "green"}], BOS_TOKENIZER)[0]
    assert texts(BOS_TOKENIZER, row) == ("<s>", "blue<|im_end|>", "green<|im_end|>")


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n", "<|im_end|>\n\n "])
def test_completion_ends_with_exactly_one_eos(end, tokenizer):
    row = prepared([{"prompt": "the sky is", "chosen": " blue" + end, "rejected": " green" + end}], tokenizer)[0]
    assert texts(tokenizer, row) == ("the sky is", " blue<|im_end|>", " green<|im_end|>")


def test_text_after_the_completion_keeps_its_spaces_where_no_eos_stands(tokenizer):
    assert texts(tokenizer, tokenize_row({**PAIR, "chosen": " blue \n"}, tokenizer))[1] == " blue \n<|im_end|>"


def test_a_truncated_completion_has_no_eos(tokenizer):
    row = prepared(
        [{"prompt": "the", "chosen": " blue sky now", "rejected": " red"}], tokenizer, max_completion_length=3
    )
    assert texts(tokenizer, row[0]) == ("the", " blue sky now", " red<|im_end|>")


def test_add_special_tokens_puts_bos_and_eos_around_the_prompt():
    row = tokenize_row(PAIR, BOS_TOKENIZER, add_special_tokens=True)
    assert texts(BOS_TOKENIZER, row) == ("<s>the sky is<|im_end|>", " blue<|im_end|>", " green<|im_end|>")


# ---------------------------------------------------------------------------------------------------- ids mean the text

TOKENIZERS = {
    "byte-level": make_tokenizer(),
    "byte-level-prefix-space": byte_level_with_prefix_space(),
    **{f"metaspace-{kind}": sentencepiece_like(kind) for kind in ("always", "first")},
    "metaspace-legacy": sentencepiece_like("legacy"),
}
ANY = st.characters(exclude_categories=["Cs"], exclude_characters="▁")  # "▁" is how these tokenizers write a space
TEXT = st.lists(st.sampled_from(["blue", " blue", "the", " ", "\n", "\n\n", ".", "é", "😀"]) | ANY, max_size=12).map(
    "".join
)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=TEXT, chosen=TEXT, rejected=TEXT)
def test_ids_decode_to_prompt_and_completion(name, prompt, chosen, rejected):
    # A tokenizer that puts a space in front takes one off the front when it decodes; so no text begins with a space.
    features = {"prompt": "P" + prompt, "chosen": chosen, "rejected": rejected}
    tokenizer = TOKENIZERS[name]
    ids = tokenize_row(features, tokenizer)
    for part in ("chosen", "rejected"):
        *body, last = ids[f"{part}_input_ids"]
        assert last == tokenizer.eos_token_id
        decoded = words(tokenizer, ids["prompt_input_ids"] + body)
        assert decoded.removeprefix(" ") == features["prompt"] + features[part]


@pytest.mark.parametrize("kind", ["always", "first", "legacy"])
def test_no_space_comes_between_prompt_and_completion(kind):
    tokenizer = sentencepiece_like(kind)
    row = tokenize_row({"prompt": "the", "chosen": "blue", "rejected": " green"}, tokenizer)
    pieces = [tokenizer.convert_ids_to_tokens(ids) for ids in row.values()]
    assert pieces == [["▁the"], ["blue", "</s>"], ["▁green", "</s>"]]


def test_rows_that_tokenise_otherwise_in_one_piece_are_counted(tokenizer, caplog):
    caplog.set_level(logging.WARNING)
    split_word = {"prompt": "the sk", "chosen": "y", "rejected": "i"}  # " sky" is one token
    split_word_of_rejected = {"prompt": "the sk", "chosen": " i", "rejected": "y"}
    spaces_at_the_end = {"prompt": "the sky", "chosen": " is blue\n\n", "rejected": " is <|im_end|>\n"}
    prepared([split_word, PAIR, spaces_at_the_end, split_word_of_rejected], tokenizer)
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 rows of dataset have other tokens at the prompt's end when tokenised in one piece: kept apart"
    ]


@pytest.mark.parametrize("tokenizer", [BOS_TOKENIZER, sentencepiece_like("first")], ids=["byte-level", "metaspace"])
def test_good_rows_are_not_talked_about(tokenizer, caplog):
    prepared([PAIR, {**PAIR, "prompt": "<s>the sky is"}, *make_rows(20)], tokenizer)
    assert caplog.text == ""


def test_the_example_of_the_document():
    folder = os.environ.get("GPT2_VOCAB_DIR")
    if not folder:
        pytest.skip("GPT2_VOCAB_DIR names no folder with GPT-2's encoder.json and vocab.bpe")
    vocab = json.loads((Path(folder) / "encoder.json").read_text(encoding="utf-8"))
    lines = (Path(folder) / "vocab.bpe").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    row = tokenize_row(
        {"prompt": "The sky is", "chosen": " blue", "rejected": " green"},
        GPT2Tokenizer(vocab=vocab, merges=merges),
        max_prompt_length=3,
        max_completion_length=3,
        add_special_tokens=False,
    )
    assert row == {
        "prompt_input_ids": [464, 6766, 318],
        "chosen_input_ids": [4171, 50256],
        "rejected_input_ids": [4077, 50256],
    }


# ----------------------------------------------------------------------------------------------------------- truncation

LIMIT = st.none() | st.integers(1, 12)


@given(
    sizes=st.tuples(st.integers(1, 10), st.integers(1, 10), st.integers(1, 10)),
    bos=st.booleans(),
    max_prompt_length=LIMIT,
    max_completion_length=LIMIT,
    max_length=LIMIT,
    mode=st.sampled_from(["keep_end", "keep_start"]),
)
def test_truncation_keeps_the_most_that_fits(sizes, bos, max_prompt_length, max_completion_length, max_length, mode):
    prompt, chosen, rejected = (list(range(100 * i, 100 * i + size)) for i, size in enumerate(sizes, start=1))
    cut = truncate_row(
        {"prompt_input_ids": prompt, "chosen_input_ids": chosen, "rejected_input_ids": rejected},
        bos_token_id=100 if bos else None,  # the prompt's first id
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        max_length=max_length,
        truncation_mode=mode,
    )
    most = [
        float("inf") if limit is None else limit for limit in (max_prompt_length, max_completion_length, max_length)
    ]

    longest = max(n for n in range(11) if n <= most[1] and n <= max(len(chosen), len(rejected)))
    fitting = [n for n in range(1, len(prompt) + 1) if n <= most[0]]
    if mode == "keep_end":
        fitting = [n for n in fitting if n + longest <= most[2]] or [1]
    left = cut["prompt_input_ids"]
    assert len(left) == max(fitting)
    front = 1 if bos and len(left) > 1 else 0
    assert left[:front] == prompt[:front]
    if mode == "keep_end":
        assert left[front:] == prompt[len(prompt) - len(left) + front :]
    else:
        assert left == prompt[: len(left)]

    for whole, part in ((chosen, cut["chosen_input_ids"]), (rejected, cut["rejected_input_ids"])):
        room = [n for n in range(1, len(whole) + 1) if n <= most[1] and len(left) + n <= most[2]]
        assert part == whole[: max(room, default=0)]
    if len(prompt) <= most[0] and longest == max(sizes[1:]) and len(prompt) + longest <= most[2]:
        assert list(cut.values()) == [prompt, chosen, rejected]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, ("the sky is very blue", " now today<|im_end|>", " here<|im_end|>")),
        ({"max_prompt_length": 2}, (" very blue", " now today<|im_end|>", " here<|im_end|>")),
        ({"max_prompt_length": 1, "truncation_mode": "keep_start"}, ("the", " now today<|im_end|>", " here<|im_end|>")),
        ({"max_completion_length": 1}, ("the sky is very blue", " now", " here")),
        ({"max_length": 5}, (" very blue", " now today<|im_end|>", " here<|im_end|>")),
        ({"max_length": 3}, (" blue", " now today", " here<|im_end|>")),
        ({"max_length": 6, "truncation_mode": "keep_start"}, ("the sky is very blue", " now", " here")),
        ({"max_length": 4, "max_completion_length": 1}, (" is very blue", " now", " here")),
    ],
)  # fmt: skip
def test_limits_reach_the_rows_of_a_dataset(limits, expected, tokenizer):
    row = {"prompt": "the sky is very blue", "chosen": " now today", "rejected": " here"}
    done = prepared([row], tokenizer, **limits)[0]
    assert texts(tokenizer, done) == expected
    assert done["length"] == len(tokenizer(expected[0] + max(expected[1:], key=len))["input_ids"])


def test_rows_that_lose_a_whole_completion_are_dropped_counted_and_said(tokenizer, caplog):
    long = {**PAIR, "prompt": "the sky is very very blue now"}
    rows = prepared([long, PAIR, long], tokenizer, max_length=5, truncation_mode="keep_start")
    assert [texts(tokenizer, row)[0] for row in rows] == ["the sky is"]
    assert "2 of 3 rows of dataset left out: truncation would leave nothing of a completion" in caplog.text
    message = refusal([long, long], tokenizer, max_length=5, truncation_mode="keep_start")
    assert "no row is left" in message and "of 2 truncation" in message and "raise max_length" in message


def test_rows_cut_to_equal_completions_are_counted(tokenizer, caplog):
    alike = {"prompt": "the", "chosen": " sky is blue", "rejected": " sky is green"}
    prepared([alike, PAIR], tokenizer, max_completion_length=2)
    assert "1 of 2 rows of dataset teach nothing" in caplog.text


# ------------------------------------------------------------------------------------------------------------- rankings

RANKING = {"prompt": "the sky is", "chosen": " blue", "rejected": [" grey", " red now", " green"]}
SCORED = {"prompt": "the sky is", "completions": [" red now", " blue", " green", " grey"], "scores": [1, 9.5, -2, 3]}


def said(texts: list[str]) -> list[list[dict]]:
    return [[{"role": "assistant", "content": text.strip()}] for text in texts]


def ranking_texts(tokenizer, row: dict) -> list[str]:
    return [words(tokenizer, ids) for ids in (row["prompt_input_ids"], row["chosen_input_ids"])] + [
        words(tokenizer, ids) for ids in row["rejected_input_ids"]
    ]


@pytest.mark.parametrize("source", ["a list", "jsonl", "parquet"])
@pytest.mark.parametrize("row", [RANKING, SCORED], ids=["rejected is a list", "completions with scores"])
def test_rankings_become_token_ids_best_first(row, source, tmp_path, tokenizer):
    rows = [row] if source == "a list" else write_as(source, [row], tmp_path)
    done = prepared(rows, tokenizer, ranked=True, scored=True)
    ends = [f"{text}<|im_end|>" for text in (" blue", " grey", " red now", " green")]
    assert ranking_texts(tokenizer, done[0]) == ["the sky is", *ends]
    longest = max(len(ids) for ids in (done[0]["chosen_input_ids"], *done[0]["rejected_input_ids"]))
    assert done[0]["length"] == len(done[0]["prompt_input_ids"]) + longest
    assert done[0].get("scores") == ([9.5, 3, 1, -2] if row is SCORED else None)


def test_rankings_of_conversations_are_rendered_each_like_a_pair(tokenizer):
    asked = {"prompt": [USER], "chosen": said([RANKING["chosen"]])[0], "rejected": said(RANKING["rejected"])}
    scored = {"prompt": [USER], "completions": said(SCORED["completions"]), "scores": SCORED["scores"]}
    implicit = {"chosen": [USER] + asked["chosen"], "rejected": [[USER] + each for each in asked["rejected"]]}
    rows = prepared([asked], tokenizer, ranked=True), prepared([scored], tokenizer, ranked=True)
    rows += (prepared([implicit], tokenizer, ranked=True),)
    for done in rows:
        for i, text in enumerate(asked["rejected"]):
            pair = prepared([{**asked, "rejected": text}], tokenizer)[0]
            assert done[0]["rejected_input_ids"][i] == pair["rejected_input_ids"]
            assert done[0]["prompt_input_ids"] == pair["prompt_input_ids"]
            assert done[0]["chosen_input_ids"] == pair["chosen_input_ids"]


def test_the_implicit_prompt_of_a_ranking_is_what_all_its_completions_share():
    start = "\n\nHuman: sky?\n\nAssistant:"
    texts_ = [start + " It is blue", start + " It is grey", start + " Green"]
    assert split_prompt(None, texts_) == (start, [" It is blue", " It is grey", " Green"])
    talks = [[USER, BLUE, USER, BLUE], [USER, BLUE, USER, GREEN], [USER, GREEN]]
    assert split_prompt(None, talks) == ([USER], [[BLUE, USER, BLUE], [BLUE, USER, GREEN], [GREEN]])


def test_rows_of_a_ranking_may_have_different_numbers_of_completions_pairs_included(tokenizer, tmp_path):
    rows = [RANKING, {**RANKING, "rejected": RANKING["rejected"][:2]}, {**RANKING, "rejected": " green"}]
    for source in (rows, write_jsonl(tmp_path / "rankings.jsonl", rows[:2])):
        done = prepared(source, tokenizer, ranked=True)
        assert [len(row["rejected_input_ids"]) for row in done] == [3, 2, 1][: len(done)]


def test_scores_of_two_completions_make_a_pair(tokenizer):
    scored = {"prompt": PAIR["prompt"], "completions": [PAIR["rejected"], PAIR["chosen"]], "scores": [0.1, 0.7]}
    assert prepared([scored], tokenizer)[0] == prepared([PAIR], tokenizer)[0]
    assert prepared([{**PAIR, "rejected": [PAIR["rejected"]]}], tokenizer)[0] == prepared([PAIR], tokenizer)[0]


def test_equal_scores_are_taken_where_ties_are_allowed_in_the_order_they_have(tokenizer):
    row = {"prompt": "the", "completions": [" sky", " blue", " red"], "scores": [1, 2, 1]}
    assert "equal ones are no ranking (loss_type exo takes them)" in refusal([row], tokenizer, ranked=True)
    done = prepared([row], tokenizer, ranked=True, scored=True, allow_ties=True)[0]
    assert ranking_texts(tokenizer, done)[1:] == [f"{text}<|im_end|>" for text in (" blue", " sky", " red")]
    assert done["scores"] == [2, 1, 1]


@given(
    rejected=st.lists(st.lists(st.integers(5, 90), min_size=1, max_size=8), min_size=1, max_size=4),
    prompt=st.lists(st.integers(5, 90), min_size=1, max_size=8),
    limits=st.fixed_dictionaries(
        {
            "max_prompt_length": st.none() | st.integers(1, 9),
            "max_completion_length": st.none() | st.integers(1, 9),
            "max_length": st.none() | st.integers(2, 12),
            "truncation_mode": st.sampled_from(["keep_end", "keep_start"]),
        }
    ),
)
def test_a_ranking_is_cut_as_the_pair_with_its_longest_completion_is(rejected, prompt, limits):
    row = {"prompt_input_ids": prompt, "chosen_input_ids": [1, 2, 3], "rejected_input_ids": rejected}
    cut = truncate_row(row, **limits)
    longest = max(range(len(rejected)), key=lambda i: len(rejected[i]))
    pair = truncate_row({**row, "rejected_input_ids": rejected[longest]}, **limits)
    assert cut["prompt_input_ids"] == pair["prompt_input_ids"] and cut["chosen_input_ids"] == pair["chosen_input_ids"]
    assert cut["rejected_input_ids"][longest] == pair["rejected_input_ids"]
    limit = max(map(len, (pair["chosen_input_ids"], pair["rejected_input_ids"])))
    for whole, part in zip(rejected, cut["rejected_input_ids"], strict=True):
        assert part == whole[: len(part)] and len(part) <= limit
        assert len(part) == len(whole) or len(part) == limit or limits["max_length"] is not None


BAD_RANKINGS = {
    "missing": ({**RANKING, "rejected": [" grey", None]}, "column 'rejected' number 2 is missing"),
    "missing first": ({**RANKING, "rejected": [None, " grey"]}, "column 'rejected' number 1 is missing"),
    "empty": ({**RANKING, "rejected": [" grey", " "]}, "column 'rejected' number 2 is empty"),
    "equal": ({**RANKING, "rejected": [" grey", " blue"]}, "columns 'chosen' and 'rejected' number 2 are equal"),
    "equal rest": ({**RANKING, "rejected": [" a", " a"]}, "columns 'rejected' number 1 and 'rejected' number 2 are eq"),
    "all equal": ({**RANKING, "rejected": [" blue"]}, "columns 'chosen' and 'rejected' number 1 are equal: there is"),
    "kinds": ({**RANKING, "rejected": [" grey", [BLUE]]}, "columns 'chosen' and 'rejected' number 2 differ in kind"),
    "message": ({**CHAT, "rejected": [[BLUE], [{"role": "user"}]]}, "column 'rejected' number 2, message 1 has no 'c"),
    "one": ({**SCORED, "completions": [" red"], "scores": [1]}, "column 'completions' must be a list of two or more"),
    "text": ({**SCORED, "completions": " red"}, "column 'completions' must be a list of two or more texts, or conver"),
    "messages": ({**SCORED, "completions": [BLUE, GREEN]}, "column 'completions' must be a list of two or more texts"),
    "fewer": ({**SCORED, "scores": [1, 2, 3]}, "column 'scores' must be a list of 4 numbers, one for each of 'comple"),
    "none": ({**SCORED, "scores": None}, "column 'scores' must be a list of 4 numbers"),
    "words": ({**SCORED, "scores": [1, 2, 3, "4"]}, "column 'scores' is [1, 2, 3, '4']: each must be a number"),
    "nan": ({**SCORED, "scores": [1, 2, 3, float("nan")]}, "column 'scores' is [1.0, 2.0, 3.0, nan]: each must be a n"),
    "ties": ({**SCORED, "scores": [1, 2, 3, 3]}, "column 'scores' is [1.0, 2.0, 3.0, 3.0]: equal ones are no"),
    "empty one": ({**SCORED, "completions": [" a", "", " b", " c"]}, "column 'completions' number 2 is empty"),
    "equal ones": ({**SCORED, "completions": [" a", " b", " c", " b"]}, "columns 'completions' number 2 and 'complet"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RANKINGS)
def test_a_bad_ranking_is_named_by_row_and_column_or_left_out(name, tokenizer):
    bad, expected = BAD_RANKINGS[name]
    good = SCORED if "scores" in bad else RANKING if isinstance(bad["chosen"], str) else CHAT
    assert refusal([good, good, bad], tokenizer, ranked=True).startswith(f"dataset, row 3: {expected}")
    assert refusal([bad, good, good], tokenizer, ranked=True).startswith(f"dataset, row 1: {expected}")
    assert len(prepared([bad, good, good], tokenizer, ranked=True, skip_bad_rows=True)) == 2


def test_a_completion_may_stand_twice_where_ties_are_allowed_unless_all_are_equal(tokenizer):
    options = {"ranked": True, "scored": True, "allow_ties": True}
    for completions, scores in (([" a", " a", " b"], [2, 2, 1]), ([" a", " b", " b"], [2, 1, 1])):
        assert len(prepared([{"prompt": "p", "completions": completions, "scores": scores}], tokenizer, **options)) == 1
    equal = {"prompt": "p", "completions": [" a", " a"], "scores": [2, 1]}
    assert "are equal: there is no preference to learn" in refusal([equal], tokenizer, **options)


def test_scores_may_stand_beside_chosen_and_rejected_where_they_are_read(tokenizer):
    options = {"ranked": True, "scored": True, "allow_ties": True}
    done = prepared([{**RANKING, "scores": [5, 2, 2, 1]}], tokenizer, **options)[0]
    assert done == prepared([RANKING], tokenizer, **options)[0] | {"scores": [5, 2, 2, 1]}
    for scores in ([1, 2, 3, 4], [3, 2, 1], "many", 7, [3, 2, 1, None]):
        message = refusal([{**RANKING, "scores": scores}], tokenizer, **options | {"allow_ties": False})
        what = "they must fall" if scores == [1, 2, 3, 4] else "give 4 numbers, that of 'chosen' first"
        assert message.startswith(f"dataset, row 1: column 'scores' is {scores}: {what}")
        assert len(prepared([{**RANKING, "scores": scores}], tokenizer, ranked=True)) == 1  # nobody reads them


def test_scores_in_some_rows_only_are_refused_where_they_are_read(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "some.jsonl", [SCORED, SCORED, RANKING])
    message = refusal(path, tokenizer, ranked=True, scored=True, allow_ties=True)
    assert message.startswith(f"{path}, row 3: it has no scores, 2 other rows have: loss_type exo takes them in all")
    done = prepared(path, tokenizer, ranked=True)
    assert len(done) == 3 and "scores" not in done.column_names


def test_other_columns_of_these_names_do_no_harm(tokenizer):
    """UltraFeedback keeps its completions, with ratings, beside chosen and rejected."""
    row = {**PAIR, "completions": [{"model": "a", "response": "b"}], "scores": "high"}
    assert prepared([row], tokenizer)[0] == prepared([PAIR], tokenizer)[0]
    assert "column 'chosen' is missing" in refusal([row, {**row, "chosen": None}], tokenizer)
    empty = [{**SCORED, "chosen": None}] * 2
    assert len(prepared(empty, tokenizer, ranked=True)) == 2


@pytest.mark.parametrize("value", [5, {"a": "x"}, None, [], "text"], ids=str)
def test_a_first_row_that_is_wrong_is_named_like_any_other(value, tokenizer):
    rows = [{"prompt": "p", "completions": value, "scores": [1, 2]}] * 2
    assert refusal(rows, tokenizer, ranked=True).startswith("dataset, row 1: column ")


def test_rankings_are_refused_where_pairs_are_wanted(tokenizer):
    for row in (RANKING, SCORED):
        message = refusal([row], tokenizer)
        assert message.startswith("dataset, row 1: it ranks more than two completions, the loss is one of pairs")
    message = refusal([{"prompt": "a", "completions": ["b", "c"]}], tokenizer, ranked=True)
    assert message.startswith("dataset: column 'scores' is missing; it has 'prompt', 'completions'")


# ------------------------------------------------------------------------------------------------------------ bad input


def without(row: dict, *keys: str) -> dict:
    return {key: value for key, value in row.items() if key not in keys}


BAD = {
    "number": ({**PAIR, "chosen": 3}, "column 'chosen' is int: it must be text or a list of messages"),
    "prompt-number": ({**PAIR, "prompt": 3}, "column 'prompt' is int: it must be text or a list of messages"),
    "null": ({**PAIR, "rejected": None}, "column 'rejected' is missing; the row has 'prompt', 'chosen'"),
    "missing": (without(PAIR, "chosen"), "column 'chosen' is missing; the row has 'prompt', 'rejected'"),
    "empty": ({**PAIR, "chosen": ""}, "column 'chosen' is empty"),
    "blank": ({**PAIR, "rejected": " \n"}, "column 'rejected' is empty"),
    "equal": ({**PAIR, "rejected": " blue"}, "columns 'chosen' and 'rejected' are equal"),
    "no-prompt": ({**PAIR, "prompt": ""}, "column 'prompt' is empty and the tokenizer has no BOS"),
    "no-rest": ({"chosen": [USER, BLUE], "rejected": [USER, BLUE, USER, GREEN]}, "column 'chosen' is empty after the"),
    "two-kinds": ({**PAIR, "rejected": [BLUE]}, "columns 'chosen' and 'rejected' differ in kind: both must be"),
    "prompt-kind": ({**PAIR, "prompt": [USER]}, "column 'prompt' is a list of messages but 'chosen' is text: make"),
    "no-role": ({**CHAT, "chosen": [without(BLUE, "role")]}, "column 'chosen', message 1 has no 'role'"),
    "no-content": ({**CHAT, "prompt": [SYSTEM, without(USER, "content")]}, "column 'prompt', message 2 has no 'con"),
    "content-number": ({**CHAT, "rejected": [{**GREEN, "content": 3}]}, "column 'rejected', message 1 has a 'content'"),
    "not-a-message": ({**CHAT, "rejected": [3]}, "column 'rejected', message 1 is int: it must be an object"),
    "no-messages": ({**CHAT, "rejected": []}, "column 'rejected' is an empty list of messages"),
    "empty-message": ({**CHAT, "chosen": [{**BLUE, "content": " "}]}, "column 'chosen', message 1 is empty"),
    "equal-messages": ({**CHAT, "chosen": [GREEN]}, "columns 'chosen' and 'rejected' are equal"),
    "equal-when-rendered": ({**CHAT, "chosen": [{**GREEN, "id": 7}]}, "columns 'chosen' and 'rejected' are equal as"),
    "broken-tools": ({**CHAT, "tools": "[{"}, "column 'tools' is not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_file_row_and_column_or_left_out(name, tmp_path, caplog):
    bad, expected = BAD[name]
    good = PAIR if isinstance(bad.get("chosen", ""), str | int) else CHAT
    rows = [good, bad, good]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert refusal(path).startswith(f"{path}, row 2: {expected}")
    assert "skip_bad_rows" in refusal(path)
    assert refusal(rows).startswith(f"dataset, row 2: {expected}")
    assert len(prepared(path, make_tokenizer(), skip_bad_rows=True)) == 2
    assert f"1 of 3 rows of {path} left out as bad rows" in caplog.text


def test_a_bad_row_is_named_by_worker_processes_too(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "pairs.jsonl", [*make_rows(5), {**PAIR, "chosen": ""}])
    assert refusal(path, num_proc=2).startswith(f"{path}, row 6: column 'chosen' is empty")


def test_a_dataset_of_nothing_but_numbers_or_bad_rows_is_refused(tmp_path):
    numbers = write_jsonl(tmp_path / "numbers.jsonl", [{"prompt": "p", "chosen": 1, "rejected": 2}] * 3)
    assert f"{numbers}, row 1: column 'chosen' is int" in refusal(numbers)
    message = refusal(numbers, skip_bad_rows=True)
    assert f"{numbers}: no row is left; 3 are bad" in message and "mend the rows" in message


def test_a_column_that_no_row_has_is_named_with_those_there_are(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "p", "better": "a", "rejected": "b"}])
    assert f"{path}: column 'chosen' is missing; it has 'prompt', 'better', 'rejected': add" in refusal(path)


def test_an_empty_dataset_is_refused():
    for empty in ([], Dataset.from_list([]), Dataset.from_list([PAIR]).select([])):
        assert "dataset has no rows: it must hold at least one" in refusal(empty)


def test_what_is_no_dataset_is_refused():
    assert "not int" in refusal(3)
    assert "dataset, row 2: is str: it must be a dict" in refusal([PAIR, "blue"])


def test_conversations_need_a_chat_template(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", [CHAT])
    message = refusal(path, make_tokenizer(chat_template=None))
    assert (
        str(path) in message and "no chat template" in message and "save its tokenizer with a chat_template" in message
    )
    message = refusal([PAIR, CHAT], make_tokenizer(chat_template=None))
    assert "dataset, row 2: column 'prompt' does not fit the chat template" in message


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system\nrole') }}{% endif %}" + CHATML


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_chat_template_that_raises_is_reported_with_its_words(num_proc):
    rows = [CHAT, {**CHAT, "prompt": [SYSTEM, USER]}]
    message = refusal(rows, make_tokenizer(NO_SYSTEM), num_proc=num_proc)
    assert message.startswith("dataset, row 2: column 'prompt' does not fit the chat template: no system")
    assert len(prepared(rows, make_tokenizer(NO_SYSTEM), skip_bad_rows=True)) == 1


def test_a_chat_template_that_is_broken_is_reported():
    for template in ("{% for", "{{ messages[0]['content'] + 1 }}", "{{ messages[0].nothing.more }}"):
        assert "dataset, row 1: column 'chosen' does not fit the chat template: " in refusal(
            [{"chosen": [USER, BLUE], "rejected": [USER, GREEN]}], make_tokenizer(template)
        )


LINE = json.dumps(PAIR)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("broken.jsonl", f"{LINE}\n{LINE[:-4]}\n{LINE}\n", "broken.jsonl, line 2: not valid JSON"),
        ("last.jsonl", f"{LINE}\n\n{LINE[:-9]}", "last.jsonl, line 3: not valid JSON"),
        ("broken.jsonl.gz", f"{LINE}\n{LINE}\n{LINE[:-4]}\n", "broken.jsonl.gz, line 3: not valid JSON"),
        ("list.jsonl", f"{LINE}\n[1, 2]\n", "list.jsonl, line 2: is not a JSON object"),
        ("first.jsonl", f"[1, 2]\n{LINE}\n", "first.jsonl, line 1: is not a JSON object"),
        ("text.jsonl", f'{LINE}\n"blue"\n', "text.jsonl, line 2: is not a JSON object"),
        ("array.json", f"[\n{LINE},\n{LINE[:-4]}\n]", "array.json, line 3: not valid JSON"),
        ("numbers.json", "[1, 2]", "numbers.json: column 'chosen' is missing"),
        ("array.json", "[]", "array.json is empty: it must hold at least one"),
        ("none.jsonl", "", "none.jsonl is empty: it must hold at least one"),
        ("none.csv", "", "none.csv is empty: it must hold at least one"),
        ("header.csv", "prompt,chosen,rejected\n", "header.csv is empty: it must hold at least one"),
        ("none.parquet", "", "none.parquet is empty: it must hold at least one"),
        ("blank.jsonl", "\n\n", "blank.jsonl is empty: it must hold at least one"),
        ("wide.csv", "chosen,rejected\na,b\na,b,c\n", "wide.csv cannot be read as csv: Error tokenizing data"),
        ("text.parquet", "blue", "text.parquet cannot be read as parquet: "),
        ("text.arrow", "blue", "text.arrow cannot be read as arrow: "),
        ("notes.txt", "blue", "notes.txt is not one of .json, .jsonl, .parquet, .csv, .arrow: convert it"),
        ("notes", "blue", "notes is not one of .json, .jsonl, .parquet, .csv, .arrow: convert it"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named_with_its_line(name, content, expected, tmp_path):
    path = tmp_path / name
    with (gzip.open if name.endswith(".gz") else open)(path, "wt") as file:
        file.write(content)
    assert f"{tmp_path}{os.sep}{expected}" in refusal(path)


def test_a_missing_file_is_named(tmp_path):
    for name in ("pairs.jsonl", "data/pairs.jsonl.gz", "./pairs", "a/b/c", str(tmp_path / "pairs")):
        assert f"there is no file or directory {name!r}: check the path" in refusal(name)


def test_a_directory_without_one_kind_of_data_is_refused(tmp_path):
    assert f"{tmp_path} holds no .json, .jsonl" in refusal(tmp_path)
    (tmp_path / "notes.md").write_text("blue")
    assert "notes.md is not one of .json, .jsonl" in refusal(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", [PAIR])
    assert rows_of(tmp_path) == [PAIR]
    (tmp_path / "test.csv").write_text("prompt,chosen,rejected\np,a,b\n")
    assert f"{tmp_path} cannot be opened as a directory of data files" in refusal(tmp_path)


# ------------------------------------------------------------------------------------------------------- whole datasets


def test_worker_processes_give_the_same_rows(tokenizer):
    rows = make_rows(30, conversational=True)
    alone, shared = (prepared(rows, tokenizer, max_length=24, num_proc=number) for number in (None, 2))
    assert alone.to_list() == shared.to_list()
    assert [texts(tokenizer, row)[1] for row in alone.select(range(3))] == [
        render_row(row, tokenizer)["completions"][0].rstrip("\n") for row in rows[:3]
    ]


def test_parts_become_one_dataset_in_order(tmp_path, tokenizer):
    rows = make_rows(6)
    for name, some in (("train-0.jsonl", rows[:2]), ("train-1.jsonl", rows[2:])):
        write_jsonl(tmp_path / name, [{**row, "id": i} for i, row in enumerate(some)])
    done = prepared(tmp_path, tokenizer)
    assert done.column_names == ["prompt_input_ids", "chosen_input_ids", "rejected_input_ids", "length"]
    assert [texts(tokenizer, row)[0] for row in done] == [row["prompt"] for row in rows]


def test_cached_rows_are_not_taken_after_a_change_of_template_or_code(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "pairs.jsonl", [CHAT])
    tokenizer = make_tokenizer()
    assert texts(tokenizer, prepared(path, tokenizer)[0])[0].startswith("<|im_start|>user")
    tokenizer.chat_template = "Hello. " + CHATML
    assert texts(tokenizer, prepared(path, tokenizer)[0])[0].startswith("Hello. <|im_start|>user")

    edited = tmp_path / "data.py"
    edited.write_text(Path(data.__file__).read_text() + "# edited\n")
    tokenizer.chat_template = CHATML
    monkeypatch.setattr(data, "__file__", str(edited))
    ids = {"prompt_input_ids": [7], "chosen_input_ids": [8], "rejected_input_ids": [[9]]}
    monkeypatch.setattr(data, "tokenize_row", lambda *_, **__: ids)
    assert prepared(path, tokenizer)[0]["prompt_input_ids"] == [7]


def test_any_order_of_bad_and_good_rows_keeps_the_good_ones(tokenizer):
    draw = random.Random(0)
    rows = make_rows(20) + [{**PAIR, "chosen": ""}] * 7
    draw.shuffle(rows)
    kept = prepared(rows, tokenizer, skip_bad_rows=True)
    assert [texts(tokenizer, row)[0] for row in kept] == [row["prompt"] for row in rows if row["chosen"]]
