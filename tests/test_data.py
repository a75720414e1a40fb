"""Rows of text become the right token ids, and bad input is refused in one line that names it."""

import csv
import gzip
import json
import logging
import math
import os
from decimal import Decimal
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from conftest import CHATML, make_rows, make_tokenizer
from datasets import Dataset, DatasetDict, Image
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from dpo import data, sources
from dpo.conversations import split_prompt
from dpo.data import prepare_dataset, tokenize_row, truncate_row
from dpo.sources import load_preferences

PAIR = {"prompt": "the sky is", "chosen": " blue", "rejected": " green"}
USER = {"role": "user", "content": "sky?"}
BLUE, GREEN = {"role": "assistant", "content": "blue"}, {"role": "assistant", "content": "green"}
CHAT = {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}
LINE = json.dumps(PAIR)
CHAT_TOKENIZER, BOS_TOKENIZER = make_tokenizer(), make_tokenizer(bos=True)


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
    """The tokenised rows, without where they came from."""
    return prepare_dataset(load_preferences(source), tokenizer, **options).remove_columns("source")


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


# -------------------------------------------------------------------------------------------------------------- sources


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
    if kind != "csv":
        rows = make_rows(3, conversational=True)
        (tmp_path / "talks").mkdir()
        assert rows_of(write_as(kind, rows, tmp_path / "talks")) == rows


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte-order mark"])
def test_csv_texts_stay_as_they_are_written(mark, tmp_path):
    rows = [
        {"prompt": "NA", "chosen": "12", "rejected": "0013"},
        {"prompt": "", "chosen": "7", "rejected": "1e5"},
        {"prompt": "nan", "chosen": "0.50", "rejected": "2024-01-02"},
    ]
    path = Path(write_as("csv", rows, tmp_path))
    path.write_text(mark + path.read_text())
    assert rows_of(path) == rows
    path.write_text(f"{mark}prompt,chosen,rejected\np,a,b\np,,b\n")
    assert len(prepared(path, make_tokenizer())) == 1  # the empty one is no missing value, and teaches nothing


def test_a_byte_order_mark_is_no_part_of_json(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\ufeff" + LINE + "\n")
    assert rows_of(path) == [PAIR]
    path.write_text("\ufeff" + LINE + "\n" + LINE[:-4])
    assert refusal(path).startswith(f"{path}, line 2: not valid JSON")


def test_a_path_may_begin_with_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "pairs.jsonl", [PAIR])
    assert rows_of("~/pairs.jsonl") == [PAIR]


def test_objects_are_taken_as_they_are(tokenizer):
    rows = make_rows(4)
    table = Dataset.from_list(rows)
    assert rows_of(table) == rows_of(rows) == rows
    both = DatasetDict(train=table.select(range(3)), test=table.select([3]))
    assert (rows_of(both), rows_of(both, split="test")) == (rows[:3], rows[3:])
    assert "no split 'valid': take one of train, test" in refusal(both, split="valid")
    assert [*prepared(table.with_format("torch"), tokenizer)] == [*prepared(table, tokenizer)]
    assert rows_of([{"chosen": "a", "rejected": "b"}, PAIR])[1] == PAIR  # a column that only later rows have


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
    table = Dataset.from_list([PAIR])
    monkeypatch.setattr(sources, "load_dataset", lambda *args, **options: asked.append((args, options)) or table)
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


HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        (PAIR, "the sky is", " blue", " green"),
        ({"chosen": "the sky is blue now", "rejected": "the sky is bleak"}, "the sky is", " blue now", " bleak"),
        ({"chosen": "a b", "rejected": "a b c"}, "a", " b", " b c"),
        ({"chosen": "say:\nblue", "rejected": "say:\ngreen"}, "say:", "\nblue", "\ngreen"),
        ({"chosen": HH + " It is blue", "rejected": HH + " It is green"}, HH, " It is blue", " It is green"),
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


TURNS = "<|im_start|>user\nsky?<|im_end|>\n<|im_start|>assistant\n"
WITH_BOS = make_tokenizer("{{ bos_token }}" + CHATML, bos=True)
COUNTED = "{% for m in messages %}[{{ loop.index }}/{{ messages | length }}] {{ m['content'] }}\n{% endfor %}"
COUNTED = make_tokenizer(COUNTED)
HINTED = make_tokenizer(CHATML.replace("assistant\n{% endif %}", "assistant\n<hint>{% endif %}"))
METASPACE = sentencepiece_like("first")  # it has a BOS token but does not put it before a text
LONG = {"prompt": "the sky is very blue", "chosen": " now today", "rejected": " here"}


@pytest.mark.parametrize(
    ("row", "tokenizer", "limits", "expected"),
    [
        # ---- conversations, as the chat template renders them
        (CHAT, CHAT_TOKENIZER, {}, (TURNS, "blue", "green")),
        ({**CHAT, "prompt": [SYSTEM, USER], "source": "x", "score": 3}, CHAT_TOKENIZER, {},
         ("<|im_start|>system\nbe brief<|im_end|>\n" + TURNS, "blue", "green")),
        ({**CHAT, "prompt": [{**SYSTEM, "content": ""}, USER]}, CHAT_TOKENIZER, {},
         ("<|im_start|>system\n<|im_end|>\n" + TURNS, "blue", "green")),
        (CHAT, HINTED, {}, (TURNS, "blue", "green")),  # not prefix-stable
        # ---- BOS: where the tokenizer puts one before a text, not before a conversation
        (PAIR, BOS_TOKENIZER, {}, ("<s>the sky is", " blue", " green")),
        ({**PAIR, "prompt": "<s>the sky is"}, BOS_TOKENIZER, {}, ("<s>the sky is", " blue", " green")),
        ({**PAIR, "prompt": ""}, BOS_TOKENIZER, {}, ("<s>", " blue", " green")),
        (PAIR, CHAT_TOKENIZER, {}, ("the sky is", " blue", " green")),
        ({**PAIR, "prompt": "the sky"}, METASPACE, {}, ("the sky", "blue", "green")),
        ({**PAIR, "prompt": ""}, METASPACE, {}, ("<s>", "blue", "green")),
        (CHAT, BOS_TOKENIZER, {}, (TURNS, "blue", "green")),
        (CHAT, WITH_BOS, {}, ("<s>" + TURNS, "blue", "green")),
        # ---- EOS: exactly one
        *(({**PAIR, "chosen": " blue" + end, "rejected": " green" + end}, CHAT_TOKENIZER, {},
           ("the sky is", " blue", " green")) for end in ("<|im_end|>", "<|im_end|>\n", "<|im_end|>\n\n ")),
        ({**PAIR, "chosen": " blue \n"}, CHAT_TOKENIZER, {}, ("the sky is", " blue \n", " green")),
        # ---- limits; a completion that is cut has no EOS
        ({**LONG}, CHAT_TOKENIZER, {}, ("the sky is very blue", " now today", " here")),
        (LONG, CHAT_TOKENIZER, {"max_prompt_length": 2}, (" very blue", " now today", " here")),
        (LONG, CHAT_TOKENIZER, {"max_prompt_length": 1, "truncation_mode": "keep_start"},
         ("the", " now today", " here")),
        (LONG, CHAT_TOKENIZER, {"max_completion_length": 1}, ("the sky is very blue", " now✂", " here✂")),
        (LONG, CHAT_TOKENIZER, {"max_length": 5}, (" very blue", " now today", " here")),
        (LONG, CHAT_TOKENIZER, {"max_length": 3}, (" blue", " now today✂", " here")),
        (LONG, CHAT_TOKENIZER, {"max_length": 6, "truncation_mode": "keep_start"},
         ("the sky is very blue", " now✂", " here✂")),
        (LONG, CHAT_TOKENIZER, {"max_length": 4, "max_completion_length": 1}, (" is very blue", " now✂", " here✂")),
    ],
)  # fmt: skip
def test_rows_become_these_tokens(row, tokenizer, limits, expected):
    """Without BOS and EOS told: completions end with EOS unless they are ✂ cut."""
    prompt, *completions = expected
    ends = [text.removesuffix("✂") if text.endswith("✂") else text + tokenizer.eos_token for text in completions]
    done = prepared([row], tokenizer, **limits)[0]
    assert texts(tokenizer, done) == (prompt, *ends)
    longest = max(len(done["chosen_input_ids"]), len(done["rejected_input_ids"]))
    assert done["length"] == len(done["prompt_input_ids"]) + longest


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
PIECES = st.sampled_from(["blue", " blue", "the", " ", "\n", "\n\n", ".", "é", "😀"])
TEXT = st.lists(PIECES | ANY, max_size=12).map("".join)


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
    sizes=st.lists(st.integers(1, 10), min_size=3, max_size=5),
    several=st.booleans(),
    bos=st.booleans(),
    limits=st.tuples(LIMIT, LIMIT, LIMIT),
    mode=st.sampled_from(["keep_end", "keep_start"]),
)
@example(sizes=[4, 1, 1], several=False, bos=True, limits=(2, None, None), mode="keep_start")
def test_truncation_keeps_the_most_that_fits(sizes, several, bos, limits, mode):
    """Of a prompt and a chosen completion, and one that is rejected or a list of several."""
    prompt, chosen, *rejected = (list(range(100 * i, 100 * i + size)) for i, size in enumerate(sizes, start=1))
    rejected = rejected if several else rejected[:1]
    names = ("max_prompt_length", "max_completion_length", "max_length")
    row = {"prompt_input_ids": prompt, "chosen_input_ids": chosen}
    cut = truncate_row(
        row | {"rejected_input_ids": rejected if several else rejected[0]},
        bos_token_id=100 if bos else None,  # the prompt's first id
        truncation_mode=mode,
        **dict(zip(names, limits, strict=True)),
    )
    most = [math.inf if limit is None else limit for limit in limits]

    longest = min(most[1], max(map(len, [chosen, *rejected])))
    fitting = [n for n in range(1, len(prompt) + 1) if n <= most[0]]
    if mode == "keep_end":
        fitting = [n for n in fitting if n + longest <= most[2]] or [1]
    left = cut["prompt_input_ids"]
    assert len(left) == max(fitting)
    front = 1 if bos and len(left) > 1 else 0
    end = len(prompt) - len(left) + front if mode == "keep_end" else front
    assert left == prompt[:front] + prompt[end:][: len(left) - front]

    parts = [cut["chosen_input_ids"], *(cut["rejected_input_ids"] if several else [cut["rejected_input_ids"]])]
    for whole, part in zip([chosen, *rejected], parts, strict=True):
        room = [n for n in range(1, len(whole) + 1) if n <= most[1] and len(left) + n <= most[2]]
        assert part == whole[: max(room, default=0)]


LONG_PROMPT = {**PAIR, "prompt": "the sky is very very blue now"}


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        ([PAIR, *make_rows(20)], {}, None),
        ([PAIR, {**PAIR, "prompt": "<s>the sky is"}], {"tokenizer": BOS_TOKENIZER}, None),
        ([PAIR], {"tokenizer": METASPACE}, None),
        # " sky" is one token; what follows a completion's first token does not matter.
        ([PAIR, {"prompt": "the sk", "chosen": "y", "rejected": "i"},
          {"prompt": "the sk", "chosen": "y", "rejected": "y now"},
          {"prompt": "the sky", "chosen": " is blue\n\n", "rejected": " is <|im_end|>\n"}], {},
         "2 of 4 rows of dataset have other tokens at the prompt's end when tokenised in one piece: kept apart"),
        ([CHAT, CHAT], {"tokenizer": HINTED},
         "2 of 2 rows of dataset rendered by a chat template that is not prefix-stable: split at the common start"),
        ([LONG_PROMPT, PAIR], {"max_prompt_length": 5}, "1 of 2 rows of dataset truncated to max_prompt_length"),
        ([LONG, PAIR, LONG], {"max_completion_length": 2}, "2 of 3 rows of dataset truncated to max_prompt_length"),
        ([LONG_PROMPT, PAIR, LONG_PROMPT], {"max_length": 5, "truncation_mode": "keep_start"},
         "2 of 3 rows of dataset left out: truncation would leave nothing of a completion (raise max_length)"),
        ([{"prompt": "the", "chosen": " sky is blue", "rejected": " sky is green"}, PAIR], {"max_completion_length": 2},
         "1 of 2 rows of dataset teach nothing: truncation leaves the same of chosen and rejected"),
        ([{"prompt": "the", "chosen": " sky is", "rejected": [" sky now", " red"]},  # a ranking of which some is left
          {"prompt": "the", "chosen": " sky is", "rejected": [" sky now", " sky"]}],
         {"max_completion_length": 1, "ranked": True}, "1 of 2 rows of dataset teach nothing"),
        ([PAIR, {**PAIR, "chosen": None}], {"skip_bad_rows": True}, "1 of 2 rows of dataset left out as bad rows"),
    ],
)  # fmt: skip
def test_what_is_worth_knowing_about_rows_is_counted_and_said(rows, options, expected, caplog):
    caplog.set_level(logging.WARNING)
    done = prepared(rows, **{"tokenizer": CHAT_TOKENIZER, **options})
    messages = [record.getMessage() for record in caplog.records]
    if expected is None:
        assert not messages
    else:
        assert any(message.startswith(expected) for message in messages)
        left_out = int(expected.split()[0]) if "left out" in expected else 0
        assert len(done) == len(rows) - left_out


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
    done = prepared(rows, tokenizer, ranked=True, read_scores=True)
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


def test_completions_and_scores_may_stand_twice_where_ties_are_allowed_unless_all_are_equal(tokenizer):
    options, row = {"ranked": True, "read_scores": True, "allow_ties": True}, {"prompt": "the", "scores": [1, 2, 1]}
    done = prepared([{**row, "completions": [" sky", " blue", " red"]}], tokenizer, **options)[0]
    assert ranking_texts(tokenizer, done)[1:] == [f"{text}<|im_end|>" for text in (" blue", " sky", " red")]
    assert done["scores"] == [2, 1, 1]
    for completions in ([" a", " b", " b"], [" a", " a", " b"]):
        assert len(prepared([{**row, "completions": completions}], tokenizer, **options)) == 1
    equal = {"prompt": "p", "completions": [" a", " a"], "scores": [2, 1]}
    assert "are equal: there is no preference to learn" in refusal([equal], tokenizer, **options)


USELESS_RANKINGS = {
    "empty": ({**RANKING, "rejected": [" grey", " "]}, "column 'rejected' number 2 is empty"),
    "equal": ({**RANKING, "rejected": [" grey", " blue"]}, "columns 'chosen' and 'rejected' number 2 are equal"),
    "equal rest": ({**RANKING, "rejected": [" a", " a"]}, "columns 'rejected' number 1 and 'rejected' number 2 are eq"),
    "all equal": ({**RANKING, "rejected": [" blue"]}, "columns 'chosen' and 'rejected' number 1 are equal: there is"),
    "empty one": ({**SCORED, "completions": [" a", "", " b", " c"]}, "column 'completions' number 2 is empty"),
    "equal ones": ({**SCORED, "completions": [" a", " b", " c", " b"]}, "columns 'completions' number 2 and 'complet"),
}
BAD_RANKINGS = {
    "missing": ({**RANKING, "rejected": [" grey", None]}, "column 'rejected' number 2 is missing"),
    "missing first": ({**RANKING, "rejected": [None, " grey"]}, "column 'rejected' number 1 is missing"),
    "kinds": ({**RANKING, "rejected": [" grey", [BLUE]]}, "columns 'chosen' and 'rejected' number 2 differ in kind"),
    "message": ({**CHAT, "rejected": [[BLUE], [{"role": "user"}]]}, "column 'rejected' number 2, message 1 has no 'c"),
    "one": ({**SCORED, "completions": [" red"], "scores": [1]}, "column 'completions' must be a list of two or more"),
    "text": ({**SCORED, "completions": " red"}, "column 'completions' must be a list of two or more texts, or li"),
    "messages": ({**SCORED, "completions": [BLUE, GREEN]}, "column 'completions' must be a list of two or more texts"),
    "fewer": ({**SCORED, "scores": [1, 2, 3]}, "column 'scores' is [1.0, 2.0, 3.0]: give 4 numbers, one for each"),
    "none": ({**SCORED, "scores": None}, "column 'scores' is None: give 4 numbers, one for each completion"),
    "words": ({**SCORED, "scores": [1, 2, 3, "4"]}, "column 'scores' is [1, 2, 3, '4']: give 4 numbers"),
    "nan": ({**SCORED, "scores": [1, 2, 3, float("nan")]}, "column 'scores' is [1.0, 2.0, 3.0, nan]: give 4 n"),
    "ties": ({**SCORED, "scores": [1, 2, 3, 3]}, "column 'scores' is [1.0, 2.0, 3.0, 3.0]: equal ones are no"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RANKINGS)
def test_a_bad_ranking_is_named_by_row_and_column_or_left_out(name, tokenizer):
    bad, expected = BAD_RANKINGS[name]
    good = SCORED if "scores" in bad else RANKING if isinstance(bad["chosen"], str) else CHAT
    assert refusal([good, good, bad], tokenizer, ranked=True).startswith(f"dataset, row 3: {expected}")
    assert refusal([bad, good, good], tokenizer, ranked=True).startswith(f"dataset, row 1: {expected}")
    assert len(prepared([bad, good, good], tokenizer, ranked=True, skip_bad_rows=True)) == 2


def test_scores_may_stand_beside_chosen_and_rejected_where_they_are_read(tokenizer):
    options = {"ranked": True, "read_scores": True, "allow_ties": True}
    done = prepared([{**RANKING, "scores": [5, 2, 2, 1]}], tokenizer, **options)[0]
    assert done == prepared([RANKING], tokenizer, **options)[0] | {"scores": [5, 2, 2, 1]}
    for scores in ([1, 2, 3, 4], [3, 2, 1], "many", 7, [3, 2, 1, None]):
        message = refusal([{**RANKING, "scores": scores}], tokenizer, **options | {"allow_ties": False})
        what = "they must fall" if scores == [1, 2, 3, 4] else "give 4 numbers, one for each completion"
        assert message.startswith(f"dataset, row 1: column 'scores' is {scores}: {what}")
        assert len(prepared([{**RANKING, "scores": scores}], tokenizer, ranked=True)) == 1  # nobody reads them


def test_scores_in_some_rows_only_are_refused_where_they_are_read(tokenizer, tmp_path):
    alike = {"completions": [[BLUE], [{**BLUE, "id": 7}]], "scores": [2, 1]}  # and once rendered even equal
    message = refusal([alike], CHAT_TOKENIZER, ranked=True, read_scores=True, allow_ties=True)
    assert "columns 'completions' number 1 and 'completions' number 2 are equal as" in message
    path = write_jsonl(tmp_path / "some.jsonl", [SCORED, SCORED, RANKING])
    message = refusal(path, tokenizer, ranked=True, read_scores=True, allow_ties=True)
    assert message.startswith(f"{path}, row 3: it has no scores, 2 other rows have: loss_type exo takes them in all")
    done = prepared(path, tokenizer, ranked=True)
    assert len(done) == 3 and "scores" not in done.column_names


def test_numbers_of_a_row_are_kept_where_all_parts_have_them(tokenizer):
    parts = {name: Dataset.from_list([{**PAIR, **more}]) for name, more in (("a", {"weight": 2}), ("b", {}))}
    assert prepare_dataset({"a": parts["a"]}, tokenizer)["weight"][:] == [2.0]
    both = prepare_dataset(parts, tokenizer)
    assert len(both) == 2 and "weight" not in both.column_names


def test_other_columns_of_these_names_do_no_harm(tokenizer):
    """UltraFeedback keeps its completions, with ratings, beside chosen and rejected."""
    row = {**PAIR, "completions": [{"model": "a", "response": "b"}], "scores": "high"}
    assert prepared([row], tokenizer)[0] == prepared([PAIR], tokenizer)[0]
    assert "column 'chosen' is missing" in refusal([row, {**row, "chosen": None}], tokenizer)
    empty = [{**SCORED, "chosen": None}] * 2
    assert len(prepared(empty, tokenizer, ranked=True)) == 2


# ------------------------------------------------------------------------------------------------------------ bad input


def without(row: dict, *keys: str) -> dict:
    return {key: value for key, value in row.items() if key not in keys}


USELESS = {
    "empty": ({**PAIR, "chosen": ""}, "column 'chosen' is empty"),
    "blank": ({**PAIR, "rejected": " \n"}, "column 'rejected' is empty"),
    "equal": ({**PAIR, "rejected": " blue"}, "columns 'chosen' and 'rejected' are equal"),
    "no-rest": ({**CHAT, "chosen": CHAT["prompt"], "rejected": [USER, GREEN]}, "column 'chosen' is empty after the"),
    "no-messages": ({**CHAT, "rejected": []}, "column 'rejected' is empty"),
    "empty-message": ({**CHAT, "chosen": [{**BLUE, "content": " "}]}, "column 'chosen' is empty"),
    "equal-messages": ({**CHAT, "chosen": [GREEN]}, "columns 'chosen' and 'rejected' are equal"),
    "equal-when-rendered": ({**CHAT, "chosen": [{**GREEN, "id": 7}]}, "columns 'chosen' and 'rejected' are equal as"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*USELESS, *(f"ranking: {name}" for name in USELESS_RANKINGS)])
def test_a_row_that_teaches_nothing_is_left_out_counted_and_the_first_one_named(name, tmp_path, caplog):
    is_ranking = name.startswith("ranking: ")
    useless, expected = USELESS_RANKINGS[name.removeprefix("ranking: ")] if is_ranking else USELESS[name]
    good = SCORED if "scores" in useless else PAIR if isinstance(useless["chosen"], str) else CHAT
    path = write_jsonl(tmp_path / "pairs.jsonl", [good, useless, useless, good])
    kept = prepared(path, make_tokenizer(), ranked=is_ranking)
    assert kept.to_list() == prepared([good, good], make_tokenizer(), ranked=is_ranking).to_list()
    assert f"2 of 4 rows of {path} left out: they teach nothing, such as {path}, row 2: {expected}" in caplog.text
    assert "no row is left; 0 are bad, 1 teach nothing (" + expected in refusal([useless], ranked=is_ranking)


BAD = {
    "prefill": ({**CHAT, "prompt": [USER, GREEN]}, "column 'prompt' ends with an assistant message: a completion must"),
    "repeated-once": ({**CHAT, "chosen": [USER, BLUE]}, "column 'chosen', message 1 is of role 'user': a completion"),
    "user-at-the-end": ({**CHAT, "rejected": [GREEN, USER]}, "column 'rejected', message 2 is of role 'user': a compl"),
    "user-answers": ({**CHAT, "rejected": [{**GREEN, "role": "user"}]}, "column 'rejected', message 1 is of role 'u"),
    "other-role": ({**CHAT, "chosen": [{**BLUE, "role": "gpt"}]}, "column 'chosen', message 1 has the role 'gpt': wr"),
    "no-prompt-here": ({**PAIR, "prompt": None}, "column 'prompt' is missing, and other rows have it"),
    "number": ({**PAIR, "chosen": 3}, "column 'chosen' is int: it must be text or a list of messages"),
    "prompt-number": ({**PAIR, "prompt": 3}, "column 'prompt' is int: it must be text or a list of messages"),
    "null": ({**PAIR, "rejected": None}, "column 'rejected' is missing; the row has 'prompt', 'chosen'"),
    "missing": (without(PAIR, "chosen"), "column 'chosen' is missing; the row has 'prompt', 'rejected'"),
    "no-prompt": ({**PAIR, "prompt": ""}, "column 'prompt' is empty and the tokenizer has no BOS"),
    "two-kinds": ({**PAIR, "rejected": [BLUE]}, "columns 'chosen' and 'rejected' differ in kind: both must be"),
    "prompt-kind": ({**PAIR, "prompt": [USER]}, "column 'prompt' is a list of messages but 'chosen' is text: make"),
    "no-role": ({**CHAT, "chosen": [without(BLUE, "role")]}, "column 'chosen', message 1 has no 'role'"),
    "no-content": ({**CHAT, "prompt": [SYSTEM, without(USER, "content")]}, "column 'prompt', message 2 has no 'con"),
    "content-number": ({**CHAT, "rejected": [{**GREEN, "content": 3}]}, "column 'rejected', message 1 has a 'content'"),
    "not-a-message": ({**CHAT, "rejected": [3]}, "column 'rejected', message 1 is int: it must be an object"),
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
    kept = prepared(path, make_tokenizer(), skip_bad_rows=True)
    assert kept.to_list() == prepared([good, good], make_tokenizer()).to_list()
    assert f"1 of 3 rows of {path} left out as bad rows" in caplog.text


NUMBERS = [{"prompt": "p", "chosen": 1, "rejected": 2}] * 3
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system\nrole') }}{% endif %}" + CHATML
TALKS = [CHAT, {**CHAT, "prompt": [SYSTEM, USER]}]


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        (3, {}, "a dataset is a name, a path, a datasets.Dataset or a list of dicts, not int"),
        ([PAIR, "blue"], {}, "dataset, row 2: is str: it must be a dict"),
        ([], {}, "dataset has no rows: it must hold at least one"),
        (Dataset.from_list([PAIR]).select([]), {}, "dataset has no rows: it must hold at least one"),
        ([{"prompt": "p", "better": "a", "rejected": "b"}], {},
         "dataset: column 'chosen' is missing; it has 'prompt', 'better', 'rejected': add"),
        ([{"prompt": "a", "completions": ["b", "c"]}], {"ranked": True},
         "dataset: column 'scores' is missing; it has 'prompt', 'completions'"),
        *(([{"prompt": "p", "completions": wrong, "scores": [1, 2]}] * 2, {"ranked": True}, "dataset, row 1: column ")
          for wrong in (5, {"a": "x"}, None, [], "text")),
        ([RANKING], {}, "dataset, row 1: it ranks more than two completions, the loss is one of pairs"),
        ([SCORED], {}, "dataset, row 1: it ranks more than two completions, the loss is one of pairs"),
        ([*make_rows(5), {**PAIR, "chosen": None}], {"num_proc": 2}, "dataset, row 6: column 'chosen' is missing"),
        ([{"chosen": "the sky", "rejected": "the "}], {},
         "dataset: no row is left; 0 are bad, 1 teach nothing (column 'rejected' is empty after the shared prompt)"),
        ([PAIR, {**PAIR, "chosen": " blue \ud800"}], {}, "dataset, row 2: 'utf-8' codec can't encode character"),
        (NUMBERS, {}, "dataset, row 1: column 'chosen' is int"),
        (NUMBERS, {"skip_bad_rows": True}, "dataset: no row is left; 3 are bad"),
        ([LONG_PROMPT] * 2, {"max_length": 5, "truncation_mode": "keep_start"},
         "dataset: no row is left; 0 are bad, 0 teach nothing and of 2 truncation would leave nothing of a completion"),
        ([CHAT], {"tokenizer": make_tokenizer(None)}, "dataset, row 1: it is a conversation and the tok"),
        ([PAIR, CHAT], {"tokenizer": make_tokenizer(None)}, "dataset, row 2: it is a conversation and the tok"),
        *((TALKS, {"tokenizer": make_tokenizer(NO_SYSTEM), "num_proc": number},
           "dataset, row 2: column 'prompt' does not fit the chat template: no system") for number in (None, 2)),
        *(([{"chosen": [USER, BLUE], "rejected": [USER, GREEN]}], {"tokenizer": make_tokenizer(template)},
           "dataset, row 1: column 'chosen' does not fit the chat template: ")
          for template in ("{% for", "{{ messages[0]['content'] + 1 }}", "{{ messages[0].nothing.more }}")),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_refused_with_the_place(source, options, expected):
    assert refusal(source, **options).startswith(expected)


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
        ("wide.csv", "chosen,rejected\na,b\na,b,c\n", "wide.csv, line 3: 3 cells under 2 columns: mend it"),
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
    answers = [row["chosen"][0]["content"] for row in rows[:3]]
    assert [texts(tokenizer, row)[1] for row in alone.select(range(3))] == [f"{text}<|im_end|>" for text in answers]


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

    tokenizer.chat_template = CHATML
    monkeypatch.setattr(data, "ROWS_VERSION", data.ROWS_VERSION + 1)
    monkeypatch.setattr(data, "_prompt_ids", lambda *_, **__: [7])
    assert prepared(path, tokenizer)[0]["prompt_input_ids"] == [7]


# ---------------------------------------------------------------------------------- as a chat user meets it, or refused

GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
WITH_TOOLS = "{% if tools %}TOOLS {{ tools | tojson }}{% endif %}" + CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}",
)


def with_tokens(template: str, *tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(template)
    tokenizer.add_tokens(list(tokens))
    return tokenizer


TURN_ENDS = {
    "eos": (make_tokenizer(), "<|im_end|>"),
    "another token": (with_tokens(GEMMA, "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "another, and then eos": (with_tokens(PHI, "<|end|>", "<|user|>", "<|assistant|>"), "<|end|>"),
    "no token": (
        make_tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"),
        "<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", TURN_ENDS)
def test_a_completion_ends_with_the_token_that_ends_its_turn_and_nothing_behind_it(name):
    tokenizer, end = TURN_ENDS[name]
    _, chosen, rejected = texts(tokenizer, prepared([CHAT], tokenizer)[0])
    assert chosen.endswith("blue" + end) or (name == "no token" and chosen.endswith("blue\n" + end))
    assert rejected.count(end) == 1 and rejected.endswith(end)


@pytest.mark.parametrize("name", ["eos", "another token", "another, and then eos"])
def test_of_several_turns_the_assistants_words_are_scored_and_no_others(name):
    tokenizer, end = TURN_ENDS[name]
    more = [BLUE, {"role": "user", "content": "why?"}, {"role": "assistant", "content": "it looks warm"}]
    row = prepared([{**CHAT, "chosen": more}, CHAT], tokenizer)[0]
    ids, scored = row["chosen_input_ids"], row["scored"]
    assert [len(mask) for mask in scored] == [len(ids), len(row["rejected_input_ids"])] and all(scored[1])
    seen = words(tokenizer, [token for token, is_scored in zip(ids, scored[0], strict=True) if is_scored])
    assert seen == f"blue{end}it looks warm{end}" and "why?" in words(tokenizer, ids)
    assert "scored" not in prepared([CHAT], tokenizer).column_names  # where all is, nothing has to be said


CALL = {"role": "assistant", "content": ""}


def call(arguments) -> list[dict]:
    return [{**CALL, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}]}]


@pytest.mark.parametrize("source", ["list", "file"])
@pytest.mark.parametrize("arguments", [{"a": 1, "b": None}, {"a": [None, {"c": None}]}, {}, {"x": "é"}])
def test_tool_calls_are_rendered_as_objects_with_all_that_they_hold(source, arguments, tmp_path):
    tokenizer = make_tokenizer(WITH_TOOLS)
    rows = [{**CHAT, "chosen": call(given)} for given in (arguments, json.dumps(arguments))]
    for row in rows:
        done = prepared([row, {**CHAT, "chosen": call({"other": 1})}] if source == "list" else
                        write_jsonl(tmp_path / f"{id(row)}.jsonl", [row]), tokenizer)  # fmt: skip
        said = texts(tokenizer, done[0])[1].removeprefix("f").removesuffix("<|im_end|>")
        assert json.loads(said) == arguments


# As DeepSeek-V3's: the arguments are joined to other text, and an object cannot be.
JOINED = WITH_TOOLS.replace("c.function.arguments | tojson", "':' + c.function.arguments")
# As Qwen3's: a message that ends the conversation gets an empty reasoning, one that others follow gets none.
EMPTY_REASONING = WITH_TOOLS.replace(
    "{{ m['content'] }}", "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}"
)


def test_a_template_that_takes_arguments_as_text_gets_json():
    done = prepared([{**CHAT, "chosen": call({"a": 1, "b": "é"})}], make_tokenizer(JOINED))
    said = texts(make_tokenizer(JOINED), done[0])[1].removeprefix("f:").removesuffix("<|im_end|>")
    assert json.loads(said) == {"a": 1, "b": "é"}


def test_a_turn_may_be_written_otherwise_when_another_follows():
    tokenizer = make_tokenizer(EMPTY_REASONING)
    answer = {"role": "assistant", "content": "it is 7"}
    done = prepared([{**CHAT, "chosen": [*call({"a": 1}), {"role": "tool", "content": "7"}, answer]}], tokenizer)[0]
    ids, scored = done["chosen_input_ids"], done["scored"][0]
    seen = words(tokenizer, [token for token, is_scored in zip(ids, scored, strict=True) if is_scored])
    assert seen == 'f{"a": 1}<|im_end|><think></think>it is 7<|im_end|>'


TURNS = {  # name: template, tokens beside the vocabulary, what is scored of two turns
    "the last one ends otherwise, as gpt-oss's": (
        GEMMA.replace("<end_of_turn>", "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}"),
        ["<|return|>", "<|end|>"],
        "blue<|end|>it looks warm<|return|>",
    ),
    "the prompt opens a reasoning, as DeepSeek's": (
        GEMMA.replace("model\n{% endif", "model\n<think>{% endif"),
        ["<end_of_turn>"],
        "blue<end_of_turn>it looks warm<end_of_turn>",
    ),
}


@pytest.mark.parametrize("name", TURNS)
def test_turns_part_where_the_template_s_own_text_parts(name):
    template, tokens, expected = TURNS[name]
    tokenizer = with_tokens(template, *tokens)
    more = [BLUE, {"role": "user", "content": "why?"}, {"role": "assistant", "content": "it looks warm"}]
    row = prepared([{**CHAT, "chosen": more}], tokenizer)[0]
    said = [token for token, seen in zip(row["chosen_input_ids"], row["scored"][0], strict=True) if seen]
    assert words(tokenizer, said) == expected


def test_of_several_turns_of_text_the_human_s_are_not_scored(tokenizer):
    start = "\n\nHuman: sky?\n\nAssistant:"
    rows = [{"chosen": f"{start} blue\n\nHuman: why?\n\nAssistant: it looks warm", "rejected": f"{start} green"}]
    row = prepared(rows, tokenizer)[0]
    said = [token for token, seen in zip(row["chosen_input_ids"], row["scored"][0], strict=True) if seen]
    assert words(tokenizer, said) == " blue it looks warm<|im_end|>" and all(row["scored"][1])
    assert "Human: why?" in words(tokenizer, row["chosen_input_ids"])
    rows[0]["chosen"] += "\n\nHuman: I see"
    assert "column 'chosen' ends with what the human says" in refusal(rows)


def test_an_answer_that_ends_with_an_added_word_gets_its_end():
    tokenizer = with_tokens("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}", "</table>")
    _, chosen, _ = texts(tokenizer, prepared([{**CHAT, "chosen": [{**BLUE, "content": "a</table>"}]}], tokenizer)[0])
    assert chosen.endswith("a</table><|im_end|>")


def test_variables_of_the_chat_template_come_from_the_option_and_from_the_row():
    tokenizer = make_tokenizer("{{ mood | default('calm') }} " + CHATML)
    rows = [CHAT, {**CHAT, "chat_template_kwargs": {"mood": "loud"}}]
    for options, expected in (({}, ["calm", "loud"]), ({"chat_template_kwargs": {"mood": "dark"}}, ["dark", "loud"])):
        assert [texts(tokenizer, row)[0].split()[0] for row in prepared(rows, tokenizer, **options)] == [
            f"{mood}" for mood in expected
        ]


def test_messages_stored_as_text_are_messages():
    as_text = [{key: write(value) for key, value in CHAT.items()} for write in (json.dumps, str)]
    expected = prepared([CHAT], CHAT_TOKENIZER)[0]
    assert all(row == expected for row in prepared(as_text, CHAT_TOKENIZER))
    code = {"prompt": "the sky", "chosen": ' [{"blue": 1}]', "rejected": " green"}  # JSON that is an answer stays text
    assert texts(CHAT_TOKENIZER, prepared([code], CHAT_TOKENIZER)[0])[1] == ' [{"blue": 1}]<|im_end|>'


BARE = {"chosen": " blue", "rejected": " green"}
PANDAS = "[{'content': 'sky?', 'role': 'user'}\n {'content': 'well?', 'role': 'user'}]"
NO_SYSTEM_SAID = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
NO_TOOLS_SAID = WITH_TOOLS.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
STRIPPED = "m['content'].split('</think>')[-1]"
UNSAID = {
    **{column: ({**BARE, column: "sky?"}, {}, f"column {column!r} has what seems to be the prompt")
       for column in ("question", "Prompt", "instruction", "Question", "query")},
    "system": ({**PAIR, "system": "be brief"}, {}, "column 'system' stands beside 'prompt'"),
    "tool calls": ({**CHAT, "chosen": call({"a": 1})}, {}, "column 'chosen', message 1: the chat template leaves o"),
    "reasoning": ({**CHAT, "rejected": [{**GREEN, "reasoning_content": "hm"}]}, {},
                  "column 'rejected', message 1: the chat template leaves out its reasoning_content"),
    "reasoning in the text": ({**CHAT, "chosen": [{**BLUE, "content": "<think>\nhm\n</think>\nblue"}]},
                              {"tokenizer": make_tokenizer(CHATML.replace("m['content']", STRIPPED))},
                              "column 'chosen', message 1: the chat template leaves out part of its content"),
    "words that stand elsewhere": ({**CHAT, "chosen": [*call({"a": 1}), {"role": "tool", "content": "blue"}, BLUE]},
                                   {"tokenizer": make_tokenizer(NO_TOOLS_SAID)},
                                   "column 'chosen', message 2: the chat template leaves out its content"),
    "short words": ({**CHAT, "prompt": [{**SYSTEM, "content": "use"}, USER]},
                    {"tokenizer": make_tokenizer(NO_SYSTEM_SAID)},
                    "column 'prompt', message 1: the chat template leaves out its content"),
    "tools": ({**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]}, {},
              "column 'tools': the chat template leaves tools out"),
    "system message": ({**CHAT, "prompt": [SYSTEM, USER]}, {"tokenizer": make_tokenizer(NO_SYSTEM_SAID)},
                       "column 'prompt', message 1: the chat template leaves out its content"),
    "input": ({**PAIR, "input": "of Mars"}, {}, "column 'input' stands beside 'prompt'"),
    "messages": ({**BARE, "messages": [USER]}, {}, "column 'messages' has what seems to be the prompt"),
    "other prompt": ({"prompt": "sea?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, {},
                     "column 'prompt' is not what the conversations begin with"),
    "rewritten": (CHAT, {"tokenizer": COUNTED}, "column 'prompt': the chat template writes it otherwise"),
    "kwargs": ({**CHAT, "chat_template_kwargs": {"enable_thinkng": True}}, {}, "chat_template_kwargs has"),
    "kwargs of apply": ({**CHAT, "chat_template_kwargs": {"add_generation_prompt": True}}, {}, "chat_template_kwa"),
    "kwargs kind": ({**CHAT, "chat_template_kwargs": 3}, {}, "column 'chat_template_kwargs' is int: it must be an obj"),
    "from and value": ({**CHAT, "prompt": '[{"from": "human", "value": "sky?"}]'}, {}, "column 'prompt' has messages"),
    "two calls, one of them said": (
        {**CHAT, "chosen": [{**CALL, "tool_calls": [call({name: 1})[0]["tool_calls"][0] for name in "ab"]}]},
        {"tokenizer": make_tokenizer(WITH_TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"))},
        "column 'chosen', message 1: the chat template leaves out part of its tool_calls"),
    "a thought": ({**CHAT, "rejected": [{**GREEN, "thought": "hm"}]}, {},
                  "column 'rejected', message 1: the chat template leaves out its thought"),
    "empty in the middle": ({**CHAT, "chosen": [{**BLUE, "content": ""}, USER, BLUE]}, {},
                            "column 'chosen', message 1 is empty: the model would learn to say nothing"),
    "deep arguments": ({**CHAT, "chosen": call("[" * 3000 + "]" * 3000)}, {}, "a tool call's arguments are not JSON"),
    "half a character": ({**CHAT, "chosen": call('{"a": "\\ud800"}')}, {"tokenizer": make_tokenizer(WITH_TOOLS)},
                         "column 'chosen' does not fit the chat template"),
    "part of a name": ({**CHAT, "chat_template_kwargs": {"thinking": False}},
                       {"tokenizer": make_tokenizer("{{ enable_thinking }}" + CHATML)}, "chat_template_kwargs has 'th"),
    "a loop's name": ({**CHAT, "chat_template_kwargs": {"m": 1}}, {}, "chat_template_kwargs has 'm'"),
    "an attribute": ({**CHAT, "chat_template_kwargs": {"role": "x"}}, {}, "chat_template_kwargs has 'role'"),
    "tools of text": ({**PAIR, "tools": [{"type": "function"}]}, {}, "column 'tools': it is for a chat template"),
    "kwargs of text": ({**PAIR, "chat_template_kwargs": {"a": 1}}, {}, "chat_template_kwargs: it is for a chat templ"),
    "a turn within": ({**PAIR, "chosen": " blue<|im_end|>\n<|im_start|>user\nand?<|im_end|>"}, {},
                      "column 'chosen' has the token <|im_"),
    "user_prompt": ({**BARE, "user_prompt": "why?"}, {}, "column 'user_prompt' has what seems to be the prompt"),
    "a question in a box": ({**BARE, "question": {"text": "why?"}}, {}, "column 'question' has what seems to be the p"),
    "said by an answer": ({**BARE, "question": "blue"}, {}, "column 'question' has what seems to be the prompt"),
    "history": ({**PAIR, "history": [["sea?", "grey"]]}, {}, "column 'history' stands beside 'prompt'"),
    "an array in text": ({**CHAT, "prompt": "array([{'role': 'user', 'content': 'a'}], dtype=object)"}, {},
                         "column 'prompt' looks like messages stored as text"),
    "broken arguments": ({**CHAT, "chosen": call("{")}, {}, "a tool call's arguments are not JSON"),
    "messages of pandas": ({**CHAT, "prompt": PANDAS}, {}, "column 'prompt' looks like messages stored as text"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSAID)
def test_a_row_of_which_something_would_not_be_trained_is_refused(name):
    row, options, expected = UNSAID[name]
    assert refusal([row, row], **options).startswith(f"dataset, row 1: {expected}")


def test_what_is_written_in_another_way_is_understood(tokenizer):
    question = "What is the colour of the sky?"
    twice = {"prompt": question, "chosen": f"{question} blue", "rejected": f"{question} green"}
    once = {"prompt": question, "chosen": " blue", "rejected": " green"}
    assert prepared([twice], tokenizer)[0] == prepared([once], tokenizer)[0]
    one = {"prompt": json.dumps(USER), "chosen": json.dumps(BLUE), "rejected": str(GREEN)}
    assert prepared([one], tokenizer)[0] == prepared([CHAT], tokenizer)[0]
    older = [{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}]
    with_tools = make_tokenizer(WITH_TOOLS)
    as_ever = prepared([{**CHAT, "chosen": call({"a": 1})}], with_tools)[0]
    assert prepared([{**CHAT, "chosen": older}], with_tools)[0] == as_ever
    late = [{**PAIR, "weight": None}] * 120 + [{**PAIR, "weight": Decimal("2.5")}]
    assert "row 1: column 'weight' is None" in refusal(late)
    tensors = Dataset.from_list([{**PAIR, "weight": 2.5}]).with_format("torch")
    assert prepared(tensors, tokenizer)[0]["weight"] == 2.5


def test_a_column_that_repeats_what_is_trained_does_no_harm(tokenizer):
    said = {**CHAT, "messages": [USER, BLUE], "prompt_id": "f0e3", "source": "hub"}  # as UltraFeedback has it
    assert prepared([said], tokenizer)[0] == prepared([CHAT], tokenizer)[0]
    talk = {"chosen": [USER, BLUE], "rejected": [USER, GREEN], "question": "sky?", "system": ""}
    assert prepared([talk], tokenizer)[0] == prepared([CHAT], tokenizer)[0]
    assert len(prepared([{**PAIR, "question": "another", "input": "the sky"}], tokenizer)) == 1
    assert "reads text alone" in refusal([{**PAIR, "images": ["a.png"]}])


@pytest.mark.parametrize("name", ["pairs[1].jsonl", "a*b.jsonl", "what?.jsonl", "a b.jsonl"])
def test_a_file_is_read_by_its_name_and_not_by_a_pattern(name, tmp_path):
    for other in ("pairs1.jsonl", "aXb.jsonl", "whatX.jsonl"):
        write_jsonl(tmp_path / other, [{**PAIR, "prompt": "another"}])
    assert rows_of(write_jsonl(tmp_path / name, [PAIR])) == [PAIR]


def test_a_slice_cuts_a_local_source_and_a_split_that_is_not_there_is_refused(tmp_path):
    rows = make_rows(5)
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    for split, expected in (("train[:2]", rows[:2]), ("train[3:]", rows[3:]), ("train[-1:]", rows[-1:])):
        assert rows_of(path, split=split) == rows_of(tmp_path, split=split) == rows_of(rows, split=split) == expected
    assert "has no split 'validation'" in refusal(path, split="validation")
    assert "split 'train[:x]'" in refusal(path, split="train[:x]")


UNREADABLE = {
    "cp1252.csv": ("prompt,chosen,rejected\ncaf\xe9, a, b\n".encode("cp1252"), "is not UTF-8 (byte 27) but another"),
    "utf16.jsonl": (LINE.encode("utf-16"), "is not UTF-8 (byte 1) but UTF-16: save it as UTF-8"),
    "null.json": (b"null", "line 1: is not a JSON object"),
    "null.jsonl": (b"null\nnull\n", "line 1: is not a JSON object"),
    "deep.json": (b"[" * 100_000, "line 1: nested too deeply"),
    "deep.jsonl": (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}\n", "line 1: nested too deeply"),
    "cut.jsonl.gz": (gzip.compress(LINE.encode() * 999)[:60], "cannot be read: Compressed file ended"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_in_another_encoding_nested_without_end_or_cut_is_named(name, tmp_path):
    content, expected = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    assert f"{name}" in (message := refusal(tmp_path / name)) and expected in message


def test_what_a_source_holds_beside_its_rows_is_not_passed_over(tmp_path):
    pictured = Dataset.from_list([PAIR]).add_column("picture", [None]).cast_column("picture", Image())
    assert "column 'picture': the model reads text alone" in refusal(pictured)
    assert "row 1: the key 1 is no text" in refusal([{**PAIR, 1: "a"}])
    (tmp_path / "two.csv").write_text("prompt,chosen,chosen,rejected\nsky?,a,b,c\n")
    assert "two.csv, line 1: two columns are called 'chosen'" in refusal(tmp_path / "two.csv")
    folder = tmp_path / "folder"
    (folder / ".cache").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", [PAIR])
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".cache" / "b.csv").write_text("a")
    assert rows_of(folder) == [PAIR]
    (folder / "b.csv").write_text("prompt,chosen,rejected\nsky?,a,b\n")
    assert "holds .csv files, too: name the one file to read" in refusal(folder)


def test_the_index_that_pandas_writes_is_no_part_of_a_row(tmp_path):
    (tmp_path / "pairs.csv").write_text(",prompt,chosen,rejected\n0,the sky is, blue, green\n")
    assert prepared(tmp_path / "pairs.csv", CHAT_TOKENIZER)[0] == prepared([PAIR], CHAT_TOKENIZER)[0]


CHARACTERS = st.text(st.characters(exclude_categories=[]), max_size=8)
VALUES = st.one_of(CHARACTERS, st.none(), st.integers(), st.booleans(), st.floats(), st.just(" blue"))
MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"role": st.sampled_from(["user", "assistant", "system", "gpt", 3]),
                                        "content": VALUES, "tool_calls": st.sampled_from([None, [], [3], call("{}")])}),
    max_size=3,
)  # fmt: skip
COLUMNS = st.one_of(VALUES, MESSAGES, st.lists(st.one_of(VALUES, MESSAGES), max_size=3))
NAMES = ["prompt", "chosen", "rejected", "tools", "completions", "scores", "weight", "question", "chat_template_kwargs"]


@given(rows=st.lists(st.dictionaries(st.sampled_from(NAMES), COLUMNS, min_size=2), min_size=1, max_size=3))
def test_any_rows_become_whole_token_ids_or_one_line(rows):
    try:
        done = prepared(rows, CHAT_TOKENIZER, ranked=True)
    except ValueError as error:
        assert str(error).strip() and "\n" not in str(error)
        return
    for row in done:
        assert row["prompt_input_ids"] and row["chosen_input_ids"] and all(row["rejected_input_ids"])
