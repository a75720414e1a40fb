"""Talking to a model in the terminal: history, /reset, /quit, one shot, adapters, models without template."""

import io

import pytest
import torch
from conftest import make_model, make_rows, make_tokenizer

from dpo import chat
from dpo.config import DPOConfig
from dpo.loop import train


@pytest.fixture
def answers(monkeypatch):
    """Replaces the model's answer by "answer N" and keeps the conversations that it was asked."""
    asked = []

    def answer(model, tokenizer, messages, sampling):
        asked.append(([f"{m['role']}: {m['content']}" for m in messages], sampling))
        return f"answer {len(asked)}"

    monkeypatch.setattr(chat, "answer", answer)
    return asked


def talk(monkeypatch, model_dir, said: str, *arguments: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    chat.main(["--model_name_or_path", str(model_dir), *arguments])


def test_the_conversation_is_remembered_until_reset(model_dir, answers, monkeypatch, capsys):
    talk(monkeypatch, model_dir, "one\ntwo\n\n/reset\nthree\n/help\n/quit\nfour\n", "--system_prompt", "Be brief.")
    assert [messages for messages, _ in answers] == [
        ["system: Be brief.", "user: one"],
        ["system: Be brief.", "user: one", "assistant: answer 1", "user: two"],
        ["system: Be brief.", "user: three"],
    ]
    assert capsys.readouterr().out.count("/reset forgets") == 2  # at the start, and for a command that is none


def test_the_end_of_input_ends_it(model_dir, answers, monkeypatch):
    talk(monkeypatch, model_dir, "one")
    assert len(answers) == 1


def test_sampling_options_reach_the_model(model_dir, answers, monkeypatch):
    talk(monkeypatch, model_dir, "", "--prompt", "hi", "--temperature", "0", "--max_new_tokens", "5")
    talk(monkeypatch, model_dir, "", "--prompt", "hi", "--temperature", "0.5", "--top_p", "0.8")
    assert answers[0][1] == {"do_sample": False, "max_new_tokens": 5}
    assert answers[1][1] == {"do_sample": True, "max_new_tokens": 256, "temperature": 0.5, "top_p": 0.8, "top_k": 0}


def test_one_shot_prints_what_the_model_says_and_greedy_equals_generate(model_dir, capsys):
    chat.main(
        ["--model_name_or_path", str(model_dir), "--prompt", "the sky", "--temperature", "0", "--max_new_tokens", "6"]
    )
    tokenizer, model = make_tokenizer(), make_model()
    text = "<|im_start|>user\nthe sky<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt")
    out = model.generate(**ids, do_sample=False, max_new_tokens=6, pad_token_id=0, eos_token_id=tokenizer.eos_token_id)
    expected = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == expected.strip()


def test_an_answer_cut_short_is_forgotten(model_dir, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "answer", interrupted)
    talk(monkeypatch, model_dir, "one\n/quit\n")
    assert "(stopped)" in capsys.readouterr().out


def test_it_talks_through_a_trained_adapter(model_dir, tmp_path, capsys):
    options = {"learning_rate": 0.05, "max_steps": 2, "save_strategy": "no", "disable_tqdm": True, "use_peft": True}
    args = DPOConfig(model_name_or_path=str(model_dir), output_dir=str(tmp_path), **options)
    train(args=args, train_dataset=make_rows(16, conversational=True))
    said = []
    for model in (tmp_path, model_dir):
        capsys.readouterr()
        chat.main(
            ["--model_name_or_path", str(model), "--prompt", "sky", "--temperature", "0", "--max_new_tokens", "12"]
        )
        said.append(capsys.readouterr().out)
    assert said[0] != said[1]


def test_a_model_without_template_goes_on_from_the_text(tmp_path, capsys):
    make_model().save_pretrained(tmp_path)
    make_tokenizer(chat_template=None).save_pretrained(tmp_path)
    chat.main(
        ["--model_name_or_path", str(tmp_path), "--prompt", "the sky", "--temperature", "0", "--max_new_tokens", "4"]
    )
    with torch.no_grad():
        first = make_model()(**make_tokenizer()("the sky", return_tensors="pt")).logits[0, -1].argmax()
    assert capsys.readouterr().out.strip().startswith(make_tokenizer().decode(first).strip())


def test_an_unknown_model_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="^error: cannot load the model .*nowhere"):
        chat.main(["--model_name_or_path", str(tmp_path / "nowhere"), "--prompt", "hi"])
