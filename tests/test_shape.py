"""The shape of the house: who imports whom, which names are public, what has to be documented."""

import ast
import inspect
import json
import subprocess
import sys

import pytest
from conftest import ROOT, make_rows

import dpo.collate
import dpo.config
import dpo.data
import dpo.logprobs
import dpo.loop
import dpo.losses
import dpo.reference

sys.path.insert(0, str(ROOT / "tutorials"))
import tables  # noqa: E402

FILES = sorted((ROOT / "dpo").glob("*.py"))


def siblings(path) -> set[str]:
    """The modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "dpo":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpo."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("dpo.")}
    return found


IMPORTS = {path.stem: siblings(path) for path in FILES}


def test_the_data_flows_along_one_straight_line():
    assert IMPORTS["rows"] == IMPORTS["images"] == IMPORTS["collate"] == IMPORTS["losses"] == set()
    assert IMPORTS["conversations"] == {"rows"} and IMPORTS["data"] == {"rows", "conversations", "images"}
    assert IMPORTS["logprobs"] <= {"collate"}
    assert IMPORTS["reference"] <= {"logprobs", "collate"}


def test_only_loop_prepare_build_and_trial_know_the_configuration_and_nobody_imports_the_loop():
    assert [name for name, imported in IMPORTS.items() if "config" in imported] == ["build", "loop", "prepare", "trial"]
    assert not [name for name, imported in IMPORTS.items() if "loop" in imported]


def test_there_are_no_sub_packages_and_no_base_classes():
    assert {path.name for path in (ROOT / "dpo").iterdir() if path.is_dir()} - {"__pycache__"} == {"example"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base) for base in node.bases]
                assert bases in ([], ["NamedTuple"], ["ValueError"], ["torch.autograd.Function"]), (
                    f"{path.name}: {node.name}"
                )


def test_from_main_to_the_equation_it_is_four_calls(tmp_path, model_dir, monkeypatch):
    calls = []

    def sigmoid_loss(h, *, beta, label_smoothing):
        stack = [frame.function for frame in inspect.stack() if frame.filename.startswith(str(ROOT / "dpo"))]
        calls.append(stack[::-1])
        return dpo.losses.sigmoid_loss(h, beta=beta, label_smoothing=label_smoothing)

    monkeypatch.setitem(dpo.losses.LOSSES, "sigmoid", sigmoid_loss)
    (tmp_path / "rows.jsonl").write_text(json.dumps(make_rows(1)[0]))
    files = ["--model_name_or_path", str(model_dir), "--dataset_name", str(tmp_path / "rows.jsonl")]
    dpo.loop.main([*files, "--max_steps", "1", "--output_dir", str(tmp_path / "out"), "--use_cpu"])
    assert calls == [["main", "train", "train_step", "get_batch_loss_metrics", "dpo_loss"]]


def test_public_names_are_where_users_look_for_them():
    names = {
        dpo.config: "DPOConfig",
        dpo.data: "tokenize_row prepare_dataset",
        dpo.collate: "DataCollatorForPreference concatenated_inputs",
        dpo.logprobs: "concatenated_forward",
        dpo.losses: "dpo_loss LOSSES",
        dpo.reference: "compute_ref_log_probs null_ref_context",
        dpo.loop: "train evaluate get_batch_loss_metrics generate_from_model_and_ref create_model_card",
    }
    for module, wanted in names.items():
        for name in wanted.split():
            assert hasattr(module, name), f"{module.__name__}.{name}"
    arguments = "model ref_model args train_dataset eval_dataset processing_class data_collator peft_config callbacks"
    more = "optimizers compute_metrics model_init"
    assert set(inspect.signature(dpo.loop.train).parameters) >= {*arguments.split(), *more.split()}
    positional = list(inspect.signature(dpo.data.tokenize_row).parameters)[:5]
    assert positional == "features processing_class max_prompt_length max_completion_length add_special_tokens".split()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_public_functions_and_modules_say_what_they_are_for(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and len(node.body) > 4:
            assert ast.get_docstring(node) or node.name == "main", f"{path.name}: {node.name}"


def test_ruff_is_clean():
    for command in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_pages_made_from_the_code_are_what_it_says():
    """Losses, options with their defaults and bounds, TRL's names; in the README the training step and the metrics."""
    for path, text in tables.pages().items():
        assert path.read_text() == text, "python tutorials/tables.py"
