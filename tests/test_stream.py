"""A streamed training set: which rows make up which step, the same after a stop, and what does not fit is named."""

import copy
import gzip
import json
import os
import signal
from collections import Counter

import datasets
import pytest
import torch
from conftest import curve, make_model, make_rankings, make_rows, make_tokenizer, read, run, same, start, weights
from hypothesis import given
from hypothesis import strategies as st
from test_images import rows_with_pictures, see
from test_resume import run_until
from transformers import GPT2Config, GPT2LMHeadModel

from dpo import loop, sources, stream
from dpo.config import UserError
from dpo.distributed import World
from dpo.sources import load_preferences

ROWS = make_rows(29)
STREAMED = {"dataset_streaming": True, "per_device_train_batch_size": 4, "max_steps": 9}


def as_stream(rows: list[dict]) -> datasets.IterableDataset:
    return datasets.Dataset.from_list(rows).to_iterable_dataset()


def jsonl(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def steps(monkeypatch) -> list[tuple[int, list[str]]]:
    """Of each training step the number of its pairs, and the names of the rows that this process trained on."""
    seen, step = [], loop.train_step

    def spy(run_, micro_batches, pairs):
        names = [stream.source_of(run_.stream, i) for b in micro_batches for i in b["index"].tolist() if i >= 0]
        seen.append((pairs, sorted(names)))
        return step(run_, micro_batches, pairs)

    monkeypatch.setattr(loop, "train_step", spy)
    return seen


@pytest.fixture
def few(monkeypatch) -> None:
    """Four rows are read in advance, of steps of one row."""
    monkeypatch.setattr("dpo.prepare.SAMPLE", 4)


# ------------------------------------------------------------------------------------------------------ in what order


def bare(parts: dict, window: int, block: int, seed: int | None) -> stream.Stream:
    how = {"options": {}, "columns": [], "prompts": {}, "numbers": []}
    return stream.Stream(parts, window=window, block=block, seed=seed, **how)


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=3).filter(any),
    window=st.integers(1, 6),
    block=st.integers(1, 8),
    seed=st.none() | st.integers(0, 3),
    stop=st.integers(0, 12),
)
def test_windows_are_those_of_a_plain_loop_and_go_on_from_any_place(sizes, window, block, seed, stop):
    parts = {str(i): as_stream([{"a": f"{i} {j}"} for j in range(size)]) for i, size in enumerate(sizes) if size}
    block = window if seed is None else block
    whole = stream.read_windows(bare(parts, window, block, seed), stream.START)
    taken = [next(whole) for _ in range(24)]
    names = [[row["a"] for *_, row in rows] for _, rows in taken]

    one_pass = [f"{i} {j}" for i, size in enumerate(sizes) for j in range(size)]
    each = -(-len(one_pass) // window)  # windows of a pass
    for count, number in enumerate(range(0, 24 - each, each)):
        order = [name for rows in names[number : number + each] for name in rows]
        blocks = [order[i : i + block] for i in range(0, len(order), block)]
        expected = [one_pass[i : i + block] for i in range(0, len(order), block)]
        assert (blocks if seed is None else list(map(sorted, blocks))) == list(map(sorted, expected))
        assert [len(rows) for rows in names[number : number + each]][:-1] == [window] * (each - 1)
        assert {place["pass"] for place, _ in taken[number : number + each]} == {count}

    place = json.loads(json.dumps(taken[stop][0]))
    again = stream.read_windows(bare(parts, window, block, seed), place)
    assert [next(again) for _ in range(len(taken) - stop - 1)] == taken[stop + 1 :]
    numbered = [(list(parts)[part], number) for _, rows in taken for part, number, *_ in rows]
    assert [f"{part} {number - 1}" for part, number in numbered] == [name for rows in names for name in rows]


@given(world=st.integers(1, 4), size=st.integers(1, 9))
def test_processes_share_a_window_among_them(world, size):
    parts = {"a": as_stream([{"a": i} for i in range(20)])}
    device = torch.device("cpu")
    shares = [stream.shares(bare(parts, size, 20, 7), World(rank, world, device), []) for rank in range(world)]
    own = [[row["a"] for *_, row in next(each)[0]] for each in shares]
    ((_, rows), *_) = [next(stream.read_windows(bare(parts, size, 20, 7), stream.START))]
    assert sorted(sum(own, [])) == sorted(row["a"] for *_, row in rows)
    assert max(map(len, own)) - min(map(len, own)) <= 1


def test_each_block_of_each_pass_has_its_own_order_and_each_seed_its_own():
    rows = [{"a": i} for i in range(40)]
    orders = {}
    for seed in (1, 2):
        windows = stream.read_windows(bare({"a": as_stream(rows)}, 20, 20, seed), stream.START)
        for number in range(4):
            orders[seed, number] = tuple(row["a"] % 20 for *_, row in next(windows)[1])
    assert len(set(orders.values())) == 8 and all(sorted(order) == list(range(20)) for order in orders.values())


def test_only_a_block_is_held(monkeypatch):
    """Of a set without end no more is read than a block, and what the window needs of it."""
    drawn = []

    def endless():
        for i in range(10**9):
            drawn.append(i)
            yield {"a": i}

    windows = stream.read_windows(bare({"a": datasets.IterableDataset.from_generator(endless)}, 3, 10, 0), stream.START)
    for _ in range(3):
        next(windows)
    assert len(drawn) == 10
    next(windows)
    assert len(drawn) == 20


# -------------------------------------------------------------------------------------------- as a set that is there


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 2, "max_tokens_per_micro_batch": 60},
        {"dataloader_num_workers": 2},
        {"loss_type": "plackett_luce", "rows": make_rankings(29)},
        {"loss_type": "aot"},
        {"rows": make_rows(29, conversational=True)},
    ],
    ids="plain accumulated by_tokens workers rankings aot chats".split(),
)
def test_in_order_it_trains_as_the_whole_set_does(more, tmp_path):
    options = {"rows": ROWS, "shuffle": False, **STREAMED, "max_steps": 17, **more}
    streamed = start(tmp_path / "streamed", **options)
    whole = start(tmp_path / "whole", **{**options, "dataset_streaming": False})
    assert same(weights(streamed.model), weights(whole.model))
    assert curve(streamed) == curve(whole) and curve(streamed, "grad_norm") == curve(whole, "grad_norm")
    assert curve(streamed, "tokens_seen") == curve(whole, "tokens_seen")
    per_pass = -(-29 // (4 * options.get("gradient_accumulation_steps", 1)))
    assert curve(streamed, "epoch") == [step // per_pass for step in range(17)]


def test_files_of_other_kinds_follow_one_another(few, tmp_path):
    """Behind the rows that are looked at before, a file without prompts, and one with: each row is as its file is."""
    joined = [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in ROWS[6:12]]
    (tmp_path / "files").mkdir()
    for name, rows in (("train-1", ROWS[:6]), ("train-2", joined), ("train-3", ROWS[12:])):
        jsonl(tmp_path / "files" / f"{name}.jsonl", rows)
    options = {"rows": str(tmp_path / "files"), "per_device_train_batch_size": 1, "shuffle": False, "max_steps": 35}
    options["layout"] = "padded"
    whole = start(tmp_path / "whole", **options)
    streamed = start(tmp_path / "streamed", dataset_streaming=True, **options)
    assert curve(streamed) == curve(whole) and same(weights(streamed.model), weights(whole.model))
    jsonl(tmp_path / "files" / "train-2.jsonl", [*joined, ROWS[0]])
    with pytest.raises(UserError, match="train-2.jsonl, row 7: it has 'prompt', and none of the first rows has"):
        start(tmp_path / "mixed", dataset_streaming=True, **options)


def test_pictures_of_a_stream_are_seen(tmp_path):
    model, processor = see("llava")
    options = {"processing_class": processor, "shuffle": False, "per_device_train_batch_size": 2, "max_steps": 5}
    losses = [
        curve(start(tmp_path / str(streams), copy.deepcopy(model), rows, dataset_streaming=streams, **options))
        for rows in [rows_with_pictures(6)]
        for streams in (False, True)
    ]
    assert losses[0] == losses[1]


def test_what_is_left_out_makes_a_step_smaller_or_takes_it_away(steps, tmp_path, caplog):
    """Steps of three rows, of which the second has two that teach nothing, the third a bad one and one that is too
    long, and of the fourth nothing is left."""
    rows = [dict(row) for row in make_rows(18)]
    bad, useless, long = {"chosen": None}, {"chosen": " x", "rejected": " x"}, {"chosen": " red" * 200}
    for i, change in {3: useless, 5: useless, 6: bad, 8: long, 9: bad, 10: useless, 11: long}.items():
        rows[i] |= change
    kept = [[0, 1, 2], [4], [7], [12, 13, 14], [15, 16, 17]]
    options = {"per_device_train_batch_size": 3, "skip_bad_rows": True, "max_prompt_length": 30, "shuffle": False}
    options |= {"max_length": 60, "truncation_mode": "keep_start", "dataset_streaming": True, "max_steps": 7}
    rows[8]["prompt"] = rows[11]["prompt"] = "the " * 30
    rows[8]["rejected"] = rows[11]["rejected"] = " green"
    options["max_length"] = 30  # nothing is left of their completions
    caplog.set_level("WARNING")
    run_ = start(tmp_path, rows=rows, **options)
    names = [[f"dataset, row {i + 1}" for i in window] for window in kept]
    assert steps == [(len(own), sorted(own)) for own in [*names, *names[:2]]]
    assert run_.stream.counts == Counter(rows=24, bad=2, useless=5, lost=2, truncated=2)
    told = [record.getMessage() for record in caplog.records if "read so far" in record.getMessage()]
    first = "left out: they teach nothing, such as dataset, row 4: columns 'chosen' and 'rejected' are equal"
    assert told[0].startswith(f"6 rows of dataset read so far: 2 {first}") and len(told) == 3  # each time it doubled
    assert told[-1].startswith("24 rows of dataset read so far: 2 left out as bad rows (skip_bad_rows); 5 left out: ")


def test_a_stream_that_the_caller_gives_needs_no_option(tmp_path, steps):
    given_, named = (
        start(tmp_path / name, rows=rows, max_steps=4, **more)
        for name, rows, more in (("a", as_stream(ROWS), {}), ("b", ROWS, {"dataset_streaming": True}))
    )
    assert curve(given_) == curve(named) and "dataset_streaming: true" in (tmp_path / "a" / "config.yaml").read_text()
    with pytest.raises(UserError, match="nobody knows how many rows will come: set max_steps"):
        start(tmp_path / "c", rows=as_stream(ROWS))
    with pytest.raises(UserError, match="a list of dicts .only the training set may be a stream., not IterableDataset"):
        start(tmp_path / "c", max_steps=1, eval_strategy="steps", eval_rows=as_stream(ROWS))


def test_a_stream_that_cannot_be_the_same_everywhere_and_again_is_refused(tmp_path, monkeypatch):
    shuffled = as_stream(ROWS).shuffle(seed=1, buffer_size=5)
    mixed = datasets.interleave_datasets([as_stream(ROWS), shuffled.map(lambda row: row)])
    for rows in (shuffled, mixed):
        with pytest.raises(UserError, match="has a shuffle buffer of its own, which no checkpoint can keep: leave out"):
            start(tmp_path, rows=rows, max_steps=1)
    start(tmp_path, rows=datasets.interleave_datasets([as_stream(ROWS), as_stream(ROWS)]), max_steps=1)
    monkeypatch.setattr("dpo.distributed.gather_lists", lambda values, world: [*values, "of another process"])
    with pytest.raises(UserError, match="the processes read different rows: give each of them the whole stream"):
        start(tmp_path, rows=as_stream(ROWS), max_steps=1, overwrite_output_dir=True)


def test_rows_are_shuffled_in_blocks_of_the_size_that_is_asked_for(tmp_path, steps):
    start(tmp_path, rows=ROWS, **STREAMED, shuffle_buffer=8)
    seen = [[int(name.split()[-1]) for name in names] for _, names in steps]
    assert sorted(seen[0] + seen[1]) == list(range(1, 9)) != seen[0] + seen[1] and len(seen[7]) == 1
    assert sorted(sum(seen[:8], [])) == list(range(1, 30))
    assert seen[8] != seen[0] and set(seen[8]) < set(range(1, 9))  # another pass, another order


# ------------------------------------------------------------------------------------------------------ stop and go on


def numbers(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if "per_second" not in key} for row in rows]


QUICK, SLOW = [(0, 4), (2, 7)], [(0, 1), (0, 7), (1, 1), (1, 4), (1, 7), (2, 1), (2, 4)]


@pytest.mark.parametrize(("workers", "cut"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)])
def test_a_resumed_run_sees_the_same_rows(workers, cut, tmp_path):
    """Blocks of 10 rows and steps of 4: steps lie over two blocks, the eighth ends a pass."""
    jsonl(tmp_path / "a.jsonl", ROWS[:17]), jsonl(tmp_path / "b.jsonl", ROWS[17:])
    (tmp_path / "files").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").rename(tmp_path / "files" / f"train-{name}.jsonl")
    options = {"rows": str(tmp_path / "files"), **STREAMED, "max_steps": 11, "shuffle_buffer": 10}
    options |= {"save_strategy": "steps", "save_steps": cut, "dataloader_num_workers": workers}
    whole = start(tmp_path / "whole", **options)
    run_until(cut + 1, tmp_path / "cut", **options)
    state = torch.load(tmp_path / "cut" / f"checkpoint-{cut}" / "state.pt", weights_only=True)["ranks"][0]["state"]
    assert state["stream"]["pass"] == (cut > 8)
    resumed = start(tmp_path / "cut", resume_from_checkpoint="true", **options)
    assert numbers(resumed.rows) == numbers(whole.rows) and same(weights(resumed.model), weights(whole.model))


def test_a_run_that_is_told_to_stop_goes_on_behind_its_last_step(tmp_path):
    options = {"rows": ROWS, **STREAMED, "dataloader_num_workers": 1}
    whole = start(tmp_path / "whole", **options)
    stop = {"callbacks": [lambda row: row["step"] == 5 and os.kill(os.getpid(), signal.SIGTERM)]}
    with pytest.raises(SystemExit):
        start(tmp_path / "cut", **options, **stop)
    resumed = start(tmp_path / "cut", resume_from_checkpoint="true", **options)
    assert numbers(resumed.rows) == numbers(whole.rows) and same(weights(resumed.model), weights(whole.model))


def test_another_stream_is_not_gone_on_with(few, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", make_rows(40))
    options = {"per_device_train_batch_size": 1, "max_steps": 32, "shuffle_buffer": 12, "dataset_streaming": True}
    options |= {"save_strategy": "steps", "save_steps": 30}
    start(tmp_path / "out", rows=str(path), **options)
    resume = {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-30"), "overwrite_output_dir": True}
    with pytest.raises(UserError, match="of another run, with .*max_length None .now 40"):
        start(tmp_path / "out", rows=str(path), **options, **resume, max_length=40)
    jsonl(path, [*make_rows(40)[:20], *make_rows(20, seed=3)])  # other rows behind those that are looked at before
    with pytest.raises(UserError, match="rows.jsonl gives other rows than before: it cannot be resumed exactly"):
        start(tmp_path / "out", rows=str(path), **options, **resume)


@pytest.mark.slow
def test_two_processes_stream_as_one(tmp_path):
    """Among the rows some teach nothing; of one step only one process has a row, of another neither."""
    rows = [dict(row) for row in make_rows(29)]
    for i in (2, 5, 7, *range(8, 12), 13, 15, 20):
        rows[i]["rejected"] = rows[i]["chosen"]
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    jsonl(tmp_path / "rows.jsonl", rows)
    files = "--model_name_or_path model --dataset_name rows.jsonl --dataset_streaming --max_steps 13 --logging_steps 1"
    files += " --learning_rate 1e-3 --use_cpu --save_steps 5 --dataloader_num_workers 1"
    for more in ("--no_shuffle", "--shuffle_buffer 10"):
        sizes = {1: 4, 2: 2}
        for processes, size in sizes.items():
            batch = f"--per_device_train_batch_size {size} --output_dir {more.split()[0][2:]}-{processes}"
            run("dpo.loop", *files.split(), *more.split(), *batch.split(), processes=processes, cwd=tmp_path)
        one, two = (read(tmp_path / f"{more.split()[0][2:]}-{processes}") for processes in sizes)
        assert len(one) == len(two) == 13
        for key in ("loss", "grad_norm", "rewards/chosen", "tokens_seen", "epoch"):
            assert curve(two, key) == pytest.approx(curve(one, key), abs=1e-5)
    resume = "--resume_from_checkpoint shuffle_buffer-2/checkpoint-5 --per_device_train_batch_size 2 --output_dir again"
    run("dpo.loop", *files.split(), *more.split(), *resume.split(), processes=2, cwd=tmp_path)
    assert numbers(read(tmp_path / "again")) == numbers(two)
    resume = resume.replace("size 2", "size 4").replace("again", "alone")
    run("dpo.loop", *files.split(), *more.split(), *resume.split(), cwd=tmp_path)  # one process goes on for the two
    alone = read(tmp_path / "alone")
    for key in ("loss", "grad_norm", "tokens_seen", "epoch"):
        assert curve(alone, key) == pytest.approx(curve(two, key), abs=1e-5)


@pytest.mark.slow
def test_what_one_process_cannot_train_stops_both_with_its_name(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = make_rows(1100)
    rows[1050]["chosen"] = None  # behind what is looked at before
    jsonl(tmp_path / "rows.jsonl", rows)
    files = "--model_name_or_path model --dataset_name rows.jsonl --dataset_streaming --max_steps 300 --use_cpu"
    done = run("dpo.loop", *files.split(), "--no_shuffle", "--layout", "padded", processes=2, cwd=tmp_path, check=False)
    assert done.returncode
    assert done.stderr.count("error: rows.jsonl, row 1051: column 'chosen' is missing") == 2
    assert "Traceback" not in done.stderr.replace('Traceback (most recent call last):\n  File "<frozen', "")


# -------------------------------------------------------------------------------------- what does not fit, and errors

PAIR = {"prompt": "the sky is", "chosen": " blue", "rejected": " green"}
LATER = {  # rows behind the first four of PAIR, beside options of the run, and the words that refuse the sixth
    "broken": ({"chosen": 3}, {}, "column 'chosen' is int"),
    "no margin": (
        {"margin": None},
        {"loss_type": "odpo", "first": {"margin": 1.0}},
        "column 'margin' is None: it must be a number",
    ),
    "weight": ({"weight": 2.5}, {}, "it has 'weight', and none of the first rows has: give it to all rows, or none"),
    "reference": ({"ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0}, {}, "it has 'ref_chosen_logps'"),
    "scores": (
        {"scores": [2.0, 1.0]},
        {"loss_type": "exo"},
        "it has 'scores', and none of the first rows has: give it to all rows, or none",
    ),
    "no scores": (
        {"scores": None},
        {"loss_type": "exo", "first": {"scores": [2.0, 1.0]}},
        "it has no scores, and the first rows have",
    ),
    "prompt": ({}, {"first": {"prompt": None, "chosen": "a b", "rejected": "a c"}}, "it has 'prompt', and none of"),
    "no prompt": ({"prompt": None, "chosen": "a b"}, {}, "column 'prompt' is missing, and other rows have it"),
    "long": ({"chosen": " red" * 300}, {"model": "gpt2"}, "rows have up to 304 tokens, the model has 128 positions"),
    "id": ({"chosen": "<|new|>"}, {"model": "small"}, "the tokenizer gives the id 3"),
}


@pytest.mark.parametrize("name", LATER)
def test_a_row_that_does_not_fit_the_first_ones_is_named(name, few, tmp_path):
    later, options, words = LATER[name]
    options = dict(options)
    first = PAIR | options.pop("first", {})
    kind, tokenizer = options.pop("model", None), make_tokenizer()
    if kind == "gpt2":
        config = GPT2Config(vocab_size=400, n_positions=128, n_embd=32, n_layer=1, n_head=2)
        options["model"] = GPT2LMHeadModel(config).eval()
    if kind == "small":
        options["model"] = make_model(vocab_size=len(tokenizer))
        tokenizer.add_tokens("<|new|>")
    sixth = {**{key: None for key in first}, **PAIR, **later}
    rows = [dict(first) for _ in range(5)] + [sixth] + [dict(first)] * 3
    rows = [{key: row.get(key) for key in {**first, **sixth}} for row in rows]
    options |= {"per_device_train_batch_size": 1, "shuffle": False, "max_steps": 8, "processing_class": tokenizer}
    seen = []
    with pytest.raises(UserError) as refused:
        start(tmp_path, rows=as_json(rows, tmp_path), dataset_streaming=True, callbacks=[seen.append], **options)
    assert f"rows.jsonl, row 6: {words}" in str(refused.value) and "\n" not in str(refused.value)
    assert str(refused.value).endswith("there is no checkpoint") and len(seen) == 5  # those before it are trained


def as_json(rows: list[dict], folder) -> str:
    """A file of rows, in which a None is a column that the row has not."""
    return str(jsonl(folder / "rows.jsonl", [{k: v for k, v in row.items() if v is not None} for row in rows]))


def test_a_row_longer_than_those_that_a_layout_was_tried_on_is_padded(few, tmp_path, monkeypatch):
    rows = [dict(PAIR) for _ in range(5)] + [{**PAIR, "chosen": " red" * 60}, dict(PAIR)]
    options = {"rows": rows, "per_device_train_batch_size": 1, "shuffle": False, "max_steps": 7}
    layouts, step = [], loop.train_step

    def spy(run_, micro_batches, pairs):
        layouts.extend(len(batch["inputs"]["input_ids"]) for batch in micro_batches)
        return step(run_, micro_batches, pairs)

    monkeypatch.setattr(loop, "train_step", spy)
    streamed = start(tmp_path / "streamed", dataset_streaming=True, **options)
    assert streamed.layout.startswith("prefix_shared") and layouts == [1, 1, 1, 1, 1, 2, 1]
    assert curve(streamed) == pytest.approx(curve(start(tmp_path / "whole", **options)), abs=1e-5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "rows.jsonl is empty: it must hold at least one preference pair"),
        ("\n \n", "rows.jsonl has no rows: it must hold at least one preference pair"),
        (json.dumps(PAIR) + '\n{"prompt": 1,\n', "rows.jsonl, line 2: not valid JSON"),
        (json.dumps({**PAIR, "rejected": None}), "rows.jsonl, row 1: column 'rejected' is missing"),
        (json.dumps({**PAIR, "rejected": " blue"}), "rows.jsonl: no row is left"),
    ],
    ids=["empty", "blank", "no JSON", "bad", "useless"],
)
def test_a_stream_that_cannot_be_read_is_refused_in_a_line(content, words, tmp_path):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(UserError, match=words) as refused:
        start(tmp_path / "out", rows=str(tmp_path / "rows.jsonl"), **STREAMED)
    assert "\n" not in str(refused.value)


def test_a_line_that_breaks_while_training_comes_in_its_turn(few, tmp_path):
    lines = [json.dumps(row) for row in make_rows(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[:9], "{", *lines[9:]]))
    seen = []
    options = {"per_device_train_batch_size": 1, "shuffle": False, "max_steps": 20, "callbacks": [seen.append]}
    for workers in (0, 2):
        with pytest.raises(UserError, match="rows.jsonl, line 10: not valid JSON: .*; there is no checkpoint"):
            rows = str(tmp_path / "rows.jsonl")
            start(
                tmp_path / str(workers), None, rows, dataset_streaming=True, dataloader_num_workers=workers, **options
            )
        assert len(seen) == 9
        seen.clear()


def test_a_stream_of_which_no_row_is_left_ends(few, tmp_path, monkeypatch):
    """The rows that are looked at before are good, and gone when they are read again: what follows has no end."""
    useless, calls = {**PAIR, "rejected": PAIR["chosen"]}, []

    def rows():
        calls.append(1)
        yield from [PAIR] * 4 if len(calls) == 1 else [useless] * 6

    given_ = datasets.IterableDataset.from_generator(rows)
    with pytest.raises(UserError, match="dataset: no row is left of a whole pass: 7 left out: they teach nothing"):
        start(tmp_path / "a", rows=given_, per_device_train_batch_size=1, max_steps=3, shuffle_buffer=6,
              dataset_streaming=True)  # fmt: skip
    used = iter([PAIR] * 9)
    once = datasets.IterableDataset.from_generator(lambda: used)
    with pytest.raises(UserError, match="dataset gives no row when it is read again"):
        start(tmp_path / "b", rows=once, per_device_train_batch_size=1, max_steps=9)


# --------------------------------------------------------------------------------------------------------------- files

FILES = {  # what is in a file, by its name
    "a.jsonl": b'{"prompt": "a", "chosen": "b", "rejected": "\xc3\xa4"}\n\n'
    b'{"prompt": "c", "chosen": "d", "rejected": "e"}',
    "bom.jsonl": b'\xef\xbb\xbf{"prompt": "a", "chosen": "b", "rejected": "c"}\r\n',
    "a.json": b'[{"prompt": "a", "chosen": "b", "rejected": "c"},\n {"prompt": "d", "chosen": "e", "rejected": "f"}]',
    "tools.jsonl": b'{"chosen": "b", "rejected": "c", "prompt": "x", "tools": [{"parameters": {"a": 1}}]}\n'
    b'{"chosen": "b", "rejected": "c", "prompt": "x", "tools": [{"parameters": {"b": 1}}]}\n',
    "a.csv": b'prompt,chosen,rejected\nx,NA,12\n"q\nr","b ""c""",\n\na,b\n',
    "wide.csv": b"prompt,chosen,rejected\nx,a,b,c\n",
    "twice.csv": b"a,a\n1,2\n",
    "broken.jsonl": b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a" "chosen"}\n',
    "list.jsonl": b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n[1]\n',
    "latin.jsonl": '{"prompt": "ä", "chosen": "b", "rejected": "c"}\n'.encode("latin1"),
    "utf16.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'.encode("utf-16"),
    "latin.csv": "prompt,chosen,rejected\nä,b,c\n".encode("latin1"),
    "a.txt": b"a",
    "deep.jsonl": b'{"a":' * 5000 + b"1" + b"}" * 5000,
}


@pytest.mark.parametrize("name", [*FILES, *(f"{name}.gz" for name in FILES if "txt" not in name)])
def test_a_file_streams_the_rows_and_the_refusals_that_it_has_when_read_whole(name, tmp_path):
    content, path = FILES[name.removesuffix(".gz")], tmp_path / name
    (gzip.open if name.endswith(".gz") else open)(path, "wb").write(content)
    results = []
    for streams in (False, True):
        try:
            (rows,) = load_preferences(str(path), streams=streams).values()
            results.append(list(rows))
        except ValueError as error:
            results.append(str(error))
    assert results[0] == results[1]


def test_columnar_files_saved_sets_and_objects_stream_their_rows(tmp_path):
    whole = datasets.Dataset.from_list(ROWS)
    whole.to_parquet(tmp_path / "rows.parquet")
    whole.save_to_disk(tmp_path / "saved")
    (tmp_path / "rows.arrow").write_bytes(next((tmp_path / "saved").glob("*.arrow")).read_bytes())
    both = datasets.DatasetDict({"train": whole})
    streamed = datasets.IterableDatasetDict({"train": whole.to_iterable_dataset()})
    paths = [str(tmp_path / name) for name in ("rows.parquet", "saved", "rows.arrow")]
    for source in (*paths, whole, both, streamed, ROWS):
        (rows,) = load_preferences(source, streams=True).values()
        assert isinstance(rows, datasets.IterableDataset) and list(rows) == ROWS


@pytest.mark.parametrize("piece", [1, 50, 333, 10**6])
def test_a_file_in_pieces_is_the_file_and_goes_on_from_every_row(piece, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", piece)
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    (rows,) = load_preferences(str(path), streams=True).values()
    assert list(rows) == ROWS
    states = []
    for _ in rows:
        states.append(rows.state_dict())
    for number in (0, 7, 28):
        rows.load_state_dict(states[number])
        assert list(rows) == ROWS[number + 1 :]
    path.write_text(path.read_text() + "{\n")
    (rows,) = load_preferences(str(path), streams=True).values()
    with pytest.raises(ValueError, match="rows.jsonl, line 30: not valid JSON"):
        list(rows)


def test_of_a_hub_name_nothing_is_read_whole(monkeypatch, tmp_path, model_dir):
    """Not the test split either: to have it datasets would fetch all splits."""
    asked = []

    def load(name, subset, *, split, streaming=False):
        asked.append((name, subset, split, streaming))
        return as_stream(ROWS) if streaming else pytest.fail("the whole set is loaded")

    monkeypatch.setattr(sources, "load_dataset", load)
    options = {"dataset_name": "org/pairs", "dataset_config": "big", "eval_strategy": "steps", **STREAMED}
    loop.train(args=loop.DPOConfig(model_name_or_path=str(model_dir), output_dir=str(tmp_path), **options))
    assert asked == [("org/pairs", "big", split, True) for split in ("train", "test")]
    assert "eval_loss" in read(tmp_path)[-1]
