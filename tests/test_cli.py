# Copyright 2026 The hf-unlearn authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The command line, run as a user runs it: streams, exit codes, one sentence per error."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM

from hf_unlearn import UnlearningReport
from hf_unlearn.cli import main


ROOT = Path(__file__).parents[1]
CANARY = "Zyxwv Quibblethorpe lives in Nowhere"


@pytest.fixture
def cli(monkeypatch, capfd):
    """Runs `hf-unlearn ...` in this process; returns exit code, stdout and stderr."""
    monkeypatch.delenv("HF_DEBUG", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def train(cli, tiny_model_path, tofu_rows, tmp_path):
    """Runs `hf-unlearn train` on a few rows of TOFU; later arguments win."""
    (tmp_path / "forget.jsonl").write_text("\n".join(json.dumps(row) for row in tofu_rows("forget01")[:6]))
    (tmp_path / "retain.jsonl").write_text("\n".join(json.dumps(row) for row in tofu_rows("retain90")[:6]))
    defaults = {
        "--model_name_or_path": tiny_model_path,
        "--forget_dataset": tmp_path / "forget.jsonl",
        "--retain_dataset": tmp_path / "retain.jsonl",
        "--output_dir": tmp_path / "out",
        "--use_cpu": "true",
        "--max_steps": "2",
        "--max_length": "64",
        "--per_device_train_batch_size": "2",
        "--save_strategy": "no",
    }

    def run(*arguments: str, without: tuple[str, ...] = ()) -> tuple[int, str, str]:
        given = [str(word) for key, value in defaults.items() if key not in without for word in (key, value)]
        return cli("train", *given, *arguments)

    return run


def sentence(err: str) -> str:
    """The one line of an error, without the hint on tracebacks; progress bars may stand before it."""
    lines = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0].removeprefix("Error: ")


# ---- Start-up ----


def fastest(*command: str) -> float:
    """Seconds of the fastest of five runs: a busy machine only ever adds."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def test_import_and_help_are_fast():
    python = fastest(sys.executable, "-c", "pass")
    assert fastest(sys.executable, "-c", "import hf_unlearn") - python < 0.1
    assert fastest(sys.executable, "-m", "hf_unlearn.cli", "--help") < 0.5


def test_import_pulls_nothing_heavy():
    code = "import sys, hf_unlearn, hf_unlearn.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_public_names_resolve():
    import hf_unlearn

    for name in hf_unlearn.__all__:
        assert getattr(hf_unlearn, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = hf_unlearn.nothing


def test_help_version_and_unknown_commands(cli):
    code, out, _ = cli("--help")
    assert code == 0 and "train" in out and "quickstart" in out
    assert cli()[1] == out
    code, out, _ = cli("--version")
    assert (code, out) == (0, f"hf-unlearn {__import__('hf_unlearn').__version__}\n")
    code, out, err = cli("trian")
    assert (code, out, err) == (2, "", "Error: `trian` is not a command. Did you mean `train`?\n")


def test_help_of_train_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for name in ("--forget_dataset", "--forget", "--retain_loss", "--trainable_layers", "--use_peft", "--lora_r"):
        assert name in out


# ---- Runs ----


def test_stdout_holds_the_result_and_nothing_else(train, tmp_path):
    code, out, err = train("--json", "true", "--trainable_layers", "1-3", "--logging_steps", "1")
    assert code == 0
    result = json.loads(out)
    assert result["steps"] == 2
    assert result["output_dir"] == str(tmp_path / "out")
    for moment in ("before", "after"):
        for name in ("forget", "retain"):
            assert 0 < result["metrics"][moment][name]["probability"] < 1
    assert "loss" in err  # the Trainer's log, which it prints to stdout
    assert UnlearningReport.load(result["report"]).metrics.after == result["metrics"]["after"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() == 260_032


def test_table_for_a_person(train):
    code, out, _ = train("--use_peft", "true", "--lora_target_modules", "all-linear")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ["probability", "of", "the", "answers", "before", "after", "rows"]
    assert lines[1].startswith("  forget set") and lines[1].endswith(" 6")
    assert lines[2].startswith("  retain set")
    assert lines[-1].startswith("Saved in ")


def test_a_lone_target_of_a_lora_is_a_name(train, tmp_path):
    """TRL takes it out of its list, and PEFT took it for an expression: "Target modules down_proj not found"."""
    code, _, err = train("--use_peft", "true", "--lora_target_modules", "down_proj", "--eval_rows", "0")
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == ["down_proj"]


def test_recipe_is_typed_and_flags_win(train, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    # As YAML reads it: 1e-3 in a list is text, off is False, 1 is a number, a lone loss a scalar
    recipe.write_text(
        "forget_loss: npo\n"
        "forget-loss-weights: [1e-3]\n"
        "retain_loss: off\n"
        "trainable_layers: 1\n"
        "learning_rate: 1e-5\n"
        "max_steps: 7\n"
        "eval_rows: 0\n"
    )
    code, _, err = train(f"--config={recipe}", "--max_steps", "1")
    assert code == 0, err
    report = UnlearningReport.load(tmp_path / "out" / "unlearning_report.json")
    assert [(term.name, term.weight) for term in report.method.forget_losses] == [("npo", 1e-3)]
    assert report.method.retain_losses == []
    assert report.method.scope.layers == "1"
    assert report.method.steps == 1
    assert report.method.settings["learning_rate"] == 1e-5
    assert report.metrics.before == {}


def test_layers_and_modules_place_a_lora(train, tmp_path):
    code, _, err = train(
        "--use_peft", "true", "--trainable_layers", "2-3", "--trainable_modules", "down_proj", "--lora_r", "4"
    )
    assert code == 0, err
    scope = UnlearningReport.load(tmp_path / "out" / "unlearning_report.json").method.scope
    assert (scope.kind, scope.modules, scope.layers, scope.rank) == ("lora", ["down_proj"], "2,3", 4)


def test_aliases_hyphens_and_data_forms(train, tofu_rows, tmp_path):
    rows = Dataset.from_list(tofu_rows("forget01")[:4])
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": rows, "other": rows.select(range(2))}).save_to_disk(tmp_path / "splits")
    rows.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "text.txt").write_text("First paragraph,\ntwo lines.\n\nSecond paragraph.\n")
    scope = ("--trainable-layers", "1", "--max-steps", "1", "--eval_rows", "2")
    for options, count in (
        (("--forget", tmp_path / "saved"), 4),
        (("--forget", tmp_path / "splits", "--forget-split", "other"), 2),
        (("--forget", tmp_path / "rows.parquet"), 4),
        (("--forget", tmp_path / "text.txt"), 2),
    ):
        code, _, err = train(*options, *scope)
        assert code == 0, err
        assert UnlearningReport.load(tmp_path / "out" / "unlearning_report.json").data.forget.rows == count


def test_forgets_chapters_of_a_book_and_keeps_another(cli, small_model_path, data_dir, tmp_path):
    """Plain text, a trained character model, RMU: Sherlock Holmes against Shakespeare."""
    holmes = (data_dir / "text" / "sherlock.txt").read_text()
    start = holmes.index("ADVENTURE I")
    (tmp_path / "holmes.txt").write_text(holmes[start : start + 30_000])
    (tmp_path / "shakespeare.txt").write_text((data_dir / "text" / "tinyshakespeare.txt").read_text()[:30_000])
    arguments = {
        "--model_name_or_path": small_model_path,
        "--forget": tmp_path / "holmes.txt",
        "--retain": tmp_path / "shakespeare.txt",
        "--output_dir": tmp_path / "out",
        "--forget_loss": "rmu",
        "--retain_loss": "hidden_mse",
        "--retain_loss_weights": "50",
        "--hidden_layer": "2",
        "--trainable_layers": "0-2",
        "--trainable_modules": "mlp.down_proj",
        "--learning_rate": "1e-3",
        "--max_steps": "200",
        "--per_device_train_batch_size": "4",
        "--max_length": "128",
        "--split_long_texts": "true",
        "--save_strategy": "no",
        "--eval_rows": "40",
        "--use_cpu": "true",
        "--json": "true",
    }
    code, out, err = cli("train", *(word for pair in arguments.items() for word in pair))
    assert code == 0, err
    before, after = (json.loads(out)["metrics"][moment] for moment in ("before", "after"))
    # Nats per character. Measured: 2.29 -> 4.0 on Holmes, 2.77 -> 3.1 on Shakespeare, which English text shares
    assert after["forget"]["loss"] - before["forget"]["loss"] > 1.2
    assert after["retain"]["loss"] - before["retain"]["loss"] < 0.5
    footprint = UnlearningReport.load(tmp_path / "out" / "unlearning_report.json").footprint
    assert [module.name for module in footprint.modules] == [
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(3)
    ]


def test_resumes_from_the_command_line(train, tmp_path):
    steps = ("--trainable_layers", "1", "--save_strategy", "steps", "--save_steps", "1", "--eval_rows", "0")
    assert train(*steps, "--max_steps", "1")[0] == 0
    code, _, err = train(*steps, "--max_steps", "3", "--resume_from_checkpoint", "true")
    assert code == 0, err
    assert UnlearningReport.load(tmp_path / "out" / "unlearning_report.json").method.steps == 3


@pytest.mark.parametrize("how", ["--accelerate_config", pytest.param("accelerate launch -m", marks=pytest.mark.slow)])
def test_two_processes(tiny_model_path, tofu_rows, tmp_path, how):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in tofu_rows("forget01")[:8]))
    arguments = {
        "--model_name_or_path": tiny_model_path,
        "--forget": tmp_path / "rows.jsonl",
        "--retain": tmp_path / "rows.jsonl",
        "--output_dir": tmp_path / "out",
        "--trainable_layers": "1",
        "--max_steps": "1",
        "--max_length": "64",
        "--per_device_train_batch_size": "2",
        "--save_strategy": "no",
        "--use_cpu": "true",
        "--json": "true",
    }
    config = str(ROOT / "examples" / "accelerate_configs" / "cpu_2.yaml")
    if how == "--accelerate_config":
        command = [sys.executable, "-m", "hf_unlearn.cli", "train", "--accelerate_config", config]
    else:
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
        command = [*launch, "-m", "hf_unlearn.cli.train"]
    result = subprocess.run(
        [*command, *(str(word) for pair in arguments.items() for word in pair)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout)["metrics"]["after"]["forget"]["rows"] == 8  # once, and gathered
    report = UnlearningReport.load(tmp_path / "out" / "unlearning_report.json")
    assert report.environment.processes == 2
    # Every forget row is a retain row: said by one process only
    assert result.stderr.count("8 of 8 forget rows also stand in the retain set") == 1


# ---- Bad input: one sentence that names the fix, exit code 2, nothing lost ----


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model_name_or_path", "/no/such/model"], "The model '/no/such/model' cannot be loaded"),
        (["--model_name_or_path", "no-such/model"], "The model 'no-such/model' cannot be loaded"),
        (["--forget", "/no/such/file.jsonl"], "The forget data set '/no/such/file.jsonl' does not exist"),
        (
            ["--retain", "no-such/data"],
            "The retain data set 'no-such/data' (config None, split 'train') cannot be loaded",
        ),
        (["--forget_loss", "npoo"], "argument --forget_loss/--forget-loss: invalid choice: 'npoo'"),
        (["--forget_loss", "npo", "ga", "--forget_loss_weights", "1"], "forget_loss_weights has 1 value but forget"),
        (["--trainable_modules", "mlp.dwn"], "'mlp.dwn' matches no module in the model of LlamaForCausalLM"),
        (["--learning_rte", "1"], "Unknown argument `--learning_rte`. Near matches: learning_rate"),
        (["--no_bf16"], "Unknown argument `--no_bf16`: write `--bf16 false`."),
        (["--learning_rate", "fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        (["--config"], "--config needs a file"),
        (["--config", "/no/such.yaml"], "The recipe '/no/such.yaml' is neither a file nor one of adaptive_rmu"),
        (["--accelerate_config", "nope"], "--accelerate_config 'nope' is neither a file nor one of cpu_2, ddp, fsdp1"),
        (["--push_to_hub", "true"], "push_to_hub needs hub_model_id: name the repository, as OWNER/NAME"),
        (["--packing", "true"], "packing=True is not supported: forget and retain rows are paired"),
        (["--loss_type", "sigmoid"], "loss_type is not supported: use forget_loss"),
        (["--max_length", "1"], "max_length=1 leaves nothing to predict"),
        (["--use_peft", "--trainable_modules", "a", "--lora_target_modules", "b"], "say the same of a LoRA"),
    ],
)
def test_usage_errors(train, tmp_path, arguments, expected):
    code, out, err = train(*arguments)
    assert (code, out) == (2, "")
    assert expected in sentence(err)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--forget_dataset"])
def test_required_arguments(train, flag):
    code, _, err = train(without=(flag,))
    assert code == 2 and sentence(err).startswith(f"{flag} is required")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("forget_los: npo", "The recipe has an unknown key `forget_los`. Near matches: forget_loss"),
        ("- a\n- b", "must contain a YAML mapping"),
        ("forget_loss: [npo\n", "is not valid YAML (line 2)"),
        ("forget_loss: rmuu", "forget_loss: 'rmuu' is unknown; choose from"),
        ("beta: soft", "argument --beta: invalid float value: 'soft'"),
        ("reference_mode: off", "reference_mode: 'none' is unknown; choose from auto, swap, copy"),
        ("trainable_layers: upper", "trainable_layers='upper' is not a list of layers"),
    ],
)
def test_bad_recipes(train, tmp_path, content, expected):
    (tmp_path / "recipe.yaml").write_text(content)
    code, out, err = train("--config", tmp_path / "recipe.yaml")
    assert (code, out) == (2, "")
    assert expected in sentence(err)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.jsonl", "", "is empty"),
        ("rows.jsonl", json.dumps({"body": CANARY}), "it has `body`; expected `text`"),
        ("rows.jsonl", json.dumps({"question": CANARY}), "has a column `question` but no `answer`"),
        ("rows.jsonl", '{"text": "' + CANARY, "cannot be read as .jsonl"),
        ("rows.jsonl", json.dumps({"prompt": CANARY, "completion": 5}), "Row 0 of the forget data set"),
        ("rows.xml", CANARY, "is not a .json, .jsonl"),
        ("folder", None, "is no folder saved by `Dataset.save_to_disk`"),
    ],
)
def test_bad_data_is_explained_without_its_text(train, tmp_path, name, content, expected):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_text(content)
    code, out, err = train("--forget", path)
    assert (code, out) == (2, "")
    assert expected in sentence(err)
    for word in CANARY.split()[:2]:
        assert word not in err


def test_failures_exit_with_1_and_keep_what_was_written(train, tmp_path):
    code, out, err = train(
        "--trainable_layers", "1", "--learning_rate", "1e38", "--max_steps", "6", "--optim", "sgd",
        "--save_strategy", "steps", "--save_steps", "1", "--max_grad_norm", "0", "--eval_rows", "0",
    )  # fmt: skip
    assert (code, out) == (1, "")
    assert sentence(err).startswith("The loss became NaN or infinite by step")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_debug_shows_the_traceback(cli, monkeypatch):
    monkeypatch.setenv("HF_DEBUG", "1")
    with pytest.raises(Exception, match="--model_name_or_path is required"):
        cli("train")
