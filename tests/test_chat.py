"""Talking to a model in the terminal: history, /reset, /quit, one shot, adapters, models without template."""

import io
import shlex

import pytest
import torch
from conftest import make_model, make_rows, make_tokenizer, start
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin

from dpo import chat


def talk(monkeypatch, model_dir, arguments: str = "", said: str = "") -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    chat.main(["--model_name_or_path", str(model_dir), *shlex.split(arguments)])


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, dict]]:
    """Lets every model answer "red"; keeps the prompts that it was asked, and how."""
    tokenizer, asked = make_tokenizer(), []
    monkeypatch.setattr(chat, "check_answers", lambda *_: None)

    def generate(model, input_ids, **options):
        asked.append((tokenizer.decode(input_ids[0]), {**options, "dtype": model.dtype}))
        if "stop here" in asked[-1][0]:
            raise KeyboardInterrupt
        return torch.cat([input_ids, torch.tensor([tokenizer("red<|im_end|>")["input_ids"]])], dim=1)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    return asked


def rendered(*messages: str) -> str:
    """Messages "role: content" as the chat template renders them, with the start of an answer."""
    turns = (f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in (m.split(": ") for m in messages))
    return "".join(turns) + "<|im_start|>assistant\n"


def test_the_conversation_is_remembered_until_reset(model_dir, asked, monkeypatch, capsys):
    talk(monkeypatch, model_dir, "--system_prompt 'Be brief.'", "one\ntwo\n\n/reset\nthree\n/help\n/quit\nfour\n")
    assert [prompt for prompt, _ in asked] == [
        rendered("system: Be brief.", "user: one"),
        rendered("system: Be brief.", "user: one", "assistant: red", "user: two"),
        rendered("system: Be brief.", "user: three"),
    ]
    assert capsys.readouterr().out.count("/reset forgets") == 2  # at the start, and for a command that is none


def test_a_question_goes_with_its_answer_that_was_cut_short(model_dir, asked, monkeypatch, capsys):
    talk(monkeypatch, model_dir, "", "one\nstop here\ntwo")  # and the end of input ends it
    assert [prompt for prompt, _ in asked][1:] == [
        rendered("user: one", "assistant: red", "user: stop here"),
        rendered("user: one", "assistant: red", "user: two"),
    ]
    assert "(stopped)" in capsys.readouterr().out


def test_options_reach_the_model(model_dir, asked, monkeypatch):
    talk(monkeypatch, model_dir, "--prompt hi --temperature 0 --max_new_tokens 5")
    warm = "--temperature 0.5 --top_p 0.8 --dtype float16"
    talk(monkeypatch, model_dir, f"--prompt hi --system_prompt 'Be brief.' {warm}")
    assert [prompt for prompt, _ in asked] == [rendered("user: hi"), rendered("system: Be brief.", "user: hi")]
    cold = {"do_sample": False, "max_new_tokens": 5, "dtype": torch.float32}
    warm = {"do_sample": True, "max_new_tokens": 256, "dtype": torch.float16, "temperature": 0.5, "top_p": 0.8}
    for (_, options), wanted in zip(asked, (cold, warm | {"top_k": 0}), strict=True):
        assert {key: options[key] for key in wanted} == wanted
        assert ("temperature" in options) == options["do_sample"]


def test_code_that_comes_with_a_model_is_trusted_only_if_the_user_says_so(model_dir, asked, monkeypatch):
    trusted = []
    for loader in (AutoModelForCausalLM, AutoTokenizer):

        def spy(name, load=loader.from_pretrained, **options):
            trusted.append(options.pop("trust_remote_code"))
            return load(name, **options)

        monkeypatch.setattr(loader, "from_pretrained", spy)
    talk(monkeypatch, model_dir, "--prompt hi")
    talk(monkeypatch, model_dir, "--prompt hi --trust_remote_code")
    assert trusted == [False, False, True, True]


def test_one_shot_prints_what_the_model_says_and_greedy_equals_generate(model_dir, monkeypatch, capsys):
    talk(monkeypatch, model_dir, "--prompt 'the sky' --temperature 0 --max_new_tokens 6")
    tokenizer, model = make_tokenizer(), make_model()
    ids = tokenizer(rendered("user: the sky"), return_tensors="pt")
    out = model.generate(**ids, do_sample=False, max_new_tokens=6, pad_token_id=0, eos_token_id=tokenizer.eos_token_id)
    expected = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == expected.strip()


def test_seed_decides_what_is_sampled(model_dir, monkeypatch, capsys):
    said = []
    for seed in (1, 1, 2):
        talk(monkeypatch, model_dir, f"--prompt 'the sky' --temperature 1 --max_new_tokens 6 --seed {seed}")
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_it_talks_through_a_trained_adapter(model_dir, tmp_path, monkeypatch, capsys):
    rows = make_rows(16, conversational=True)
    start(tmp_path, str(model_dir), rows, learning_rate=0.05, max_steps=2, use_peft=True)
    said = []
    for model in (tmp_path, model_dir):
        capsys.readouterr()
        talk(monkeypatch, model, "--prompt sky --temperature 0 --max_new_tokens 12")
        said.append(capsys.readouterr().out)
    assert said[0] != said[1]


def test_a_model_without_template_goes_on_from_the_text(tmp_path, monkeypatch, asked):
    make_model().save_pretrained(tmp_path)
    make_tokenizer(chat_template=None).save_pretrained(tmp_path)
    talk(monkeypatch, tmp_path, "--prompt 'the sky'")
    assert asked[0][0] == "the sky"


def test_an_unknown_model_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="^error: cannot load the model .*nowhere"):
        talk(monkeypatch, tmp_path / "nowhere", "--prompt hi")
