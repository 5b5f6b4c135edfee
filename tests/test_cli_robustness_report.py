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
"""`hf-unlearn robustness-report`: killed and continued, judged by thresholds declared before, and gotten wrong."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn.attacks import table
from hf_unlearn.cli import main


ATTACKS = "quantize,weight_noise,logit_lens,prefill,activation_noise"


@pytest.fixture(scope="module")
def rows(tmp_path_factory, tofu_rows):
    """Forget rows that `known_model` knows, and rows to keep."""
    folder = tmp_path_factory.mktemp("rows")
    paths = {}
    for name, own in (("forget", tofu_rows("forget10_perturbed")[:12]), ("retain", tofu_rows("retain90")[:6])):
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("\n".join(json.dumps(row) for row in own), encoding="utf-8")
    return {name: str(path) for name, path in paths.items()}


def arguments(rows, model, original, output_dir, *more):
    return [
        "robustness-report", str(model), "--original", str(original), "--forget", rows["forget"],
        "--retain", rows["retain"], "--use_cpu", "--max_new_tokens", "8", "--output_dir", str(output_dir), *more,
    ]  # fmt: skip


def content(folder):
    """The report, without what differs from run to run: times, and the machine."""
    report = json.loads((folder / "unlearning_report.json").read_text())
    for attack in report["attacks"]:
        attack.pop("seconds")
    report.pop("environment")
    return report


def test_a_killed_report_continues_and_ends_like_an_uninterrupted_one(rows, known_model, tiny_model_path, tmp_path):
    """SIGKILL after the second attack: nothing is cleaned up, nothing is lost."""
    options = ["--control", tiny_model_path, "--attacks", ATTACKS, "--seeds", "0,3"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "hf_unlearn.cli", *arguments(rows, known_model, known_model, killed, *options)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = killed / "unlearning_report.json"
    end = time.monotonic() + 240
    while not path.is_file() or len(json.loads(path.read_text())["attacks"]) < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    half = json.loads(path.read_text())
    assert 2 <= len(half["attacks"]) < 10 and half["verdict"] is None
    done = len(list((killed / "private" / "cache").glob("*.json")))

    assert main(arguments(rows, known_model, known_model, killed, *options)) == 0
    assert main(arguments(rows, known_model, known_model, whole, *options)) == 0
    assert content(killed) == content(whole)
    for name in ("figures/attacks.png", "figures/recovery_curves.png"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    # What was done before was not done again: its seconds are those of the first time
    first = {(attack["name"], attack["seed"]): attack["seconds"] for attack in half["attacks"]}
    again = json.loads(path.read_text())["attacks"]
    assert [attack["seconds"] for attack in again[: len(first)]] == [
        first[attack["name"], attack["seed"]] for attack in again[: len(first)]
    ]
    assert len(list((killed / "private" / "cache").glob("*.json"))) > done


def test_the_report_says_what_the_numbers_say(rows, known_model, tiny_model_path, tmp_path, capsys):
    """The original as its own unlearned model: nothing is suppressed, and everything comes back."""
    options = ["--control", tiny_model_path, "--attacks", "quantize,gcg", "--json"]
    assert main(arguments(rows, known_model, known_model, tmp_path / "out", *options, "--budgets", "small")) == 0
    printed = json.loads(capsys.readouterr().out)
    report = json.loads((tmp_path / "out" / "unlearning_report.json").read_text())
    assert printed["attacks"] == report["attacks"] and printed["verdict"] == report["verdict"]
    assert report["verdict"]["outcome"] == "not_suppressed"
    rules = {rule["name"]: rule for rule in report["verdict"]["rules"]}
    assert rules["left.probability"]["measured"] == pytest.approx(1, abs=1e-6)
    assert rules["kept.probability"]["measured"] == pytest.approx(1, abs=1e-6)
    assert rules["recovered.quantize"]["measured"] == pytest.approx(1, abs=1e-6)
    assert {"relearn", "latent_pgd"} <= set(report["verdict"]["not_run"])
    # As `evaluate` measures them, and the control too
    stages = report["metrics"]
    assert stages["before"]["forget"]["probability"] == stages["after"]["forget"]["probability"] > 0.9
    assert stages["control"]["forget"]["probability"] < 0.1
    assert "truth_ratio" in stages["after"]["forget"] and stages["after"]["forget"]["rows"] == 12
    assert stages["after"]["forget"]["forget_quality"] < 0.05
    text = (tmp_path / "out" / "robustness_report.md").read_text()
    assert text.startswith("# Robustness report\n") and "**Not suppressed" in text
    assert f"{stages['after']['forget']['probability']:#.3g}" in text


def test_a_model_that_never_saw_the_facts_gives_nothing_back(rows, known_model, tiny_model_path, tmp_path):
    """The twin as the unlearned model, against itself: 0 after control subtraction, under every attack."""
    thresholds = tmp_path / "thresholds.yaml"
    thresholds.write_text("left: {probability: 0.2}\nrecovered: {default: 0.2}\nrequired_attacks: [quantize]\n")
    options = ["--control", tiny_model_path, "--attacks", "quantize,prefill", "--thresholds", str(thresholds)]
    assert main(arguments(rows, tiny_model_path, known_model, tmp_path / "out", *options, "--generate", "false")) == 0
    report = json.loads((tmp_path / "out" / "unlearning_report.json").read_text())
    assert [attack["recovered"] for attack in report["attacks"]] == [0.0, 0.0]
    assert report["verdict"]["outcome"] == "suppressed"
    assert (tmp_path / "out" / "thresholds.yaml").read_text() == thresholds.read_text()


def test_gibberish_is_not_called_forgotten(rows, known_model, tiny_model_path, tmp_path):
    """Weights drowned in noise leak nothing, and that is not forgetting."""
    model = AutoModelForCausalLM.from_pretrained(known_model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight += torch.randn(weight.shape, generator=generator) * weight.std()
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(known_model).save_pretrained(tmp_path / "model")
    options = ["--control", tiny_model_path, "--attacks", "quantize"]
    assert main(arguments(rows, tmp_path / "model", known_model, tmp_path / "out", *options)) == 0
    report = json.loads((tmp_path / "out" / "unlearning_report.json").read_text())
    rules = {rule["name"]: rule for rule in report["verdict"]["rules"]}
    assert rules["left.probability"]["holds"] and rules["recovered.quantize"]["measured"] < 0.05
    assert report["verdict"]["outcome"] == "utility_lost" and rules["kept.probability"]["measured"] < 0.1
    assert rules["fluent.generation_perplexity"]["holds"] is False
    assert report["attacks"][0]["utility_after"] < 0.1


def test_nothing_but_private_holds_values_per_row_or_text(rows, known_model, tiny_model_path, tmp_path):
    output = tmp_path / "out"
    options = ["--control", tiny_model_path, "--attacks", "paraphrase,prefill"]
    assert main(arguments(rows, known_model, known_model, output, *options)) == 0
    assert stat.S_IMODE(os.stat(output / "private").st_mode) == 0o700
    files = [path for path in output.rglob("*") if path.is_file()]
    private = [path for path in files if "private" in path.parts]
    assert len(private) > 8 and all(stat.S_IMODE(os.stat(path).st_mode) == 0o600 for path in private)
    texts = [json.loads(line)[key] for line in open(rows["forget"]) for key in ("question", "answer")]
    for path in files:
        content = path.read_bytes()
        assert not any(text.encode() in content for text in texts), path.name
    public = b"".join(path.read_bytes() for path in files if path not in private)
    assert str(tmp_path).encode() not in public and known_model.encode() not in public


def test_thresholds_cannot_change_once_the_report_has_begun(rows, known_model, tiny_model_path, tmp_path, capsys):
    thresholds = tmp_path / "mine.yaml"
    thresholds.write_text("left: {probability: 0.2}\n")
    options = ["--attacks", "quantize", "--generate", "false", "--thresholds", str(thresholds)]
    command = arguments(rows, known_model, known_model, tmp_path / "out", *options)
    assert main(command) == 0
    thresholds.write_text("left: {probability: 2.0}\n")
    capsys.readouterr()
    assert main(command) == 2
    assert "begun with another thresholds: name another folder" in capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "out" / "thresholds.yaml").read_text()) == {"left": {"probability": 0.2}}
    thresholds.write_text("left: {probability: 0.2}\n")
    command[1] = tiny_model_path
    assert main(command) == 2
    assert "begun with another unlearned: name another folder" in capsys.readouterr().err


def test_attacks_that_need_a_control_are_left_out_without_one_and_listed(rows, known_model, tmp_path, capsys):
    options = ["--attacks", "quantize,latent_pgd,soft_prompt", "--generate", "false"]
    assert main(arguments(rows, known_model, known_model, tmp_path / "out", *options)) == 0
    captured = capsys.readouterr()
    assert "Left out, because without --control they say nothing: latent_pgd, soft_prompt." in captured.err
    report = json.loads((tmp_path / "out" / "unlearning_report.json").read_text())
    assert [attack["name"] for attack in report["attacks"]] == ["quantize"]
    assert report["attacks"][0]["control"] == "unlearned model, unattacked"
    assert {"latent_pgd", "soft_prompt"} <= set(report["verdict"]["not_run"])
    assert "a control that never saw the forget set" in report["verdict"]["missing"]
    assert "latent_pgd" in captured.out and "Verdict: Not suppressed" in captured.out


def test_the_original_is_attacked_once_for_several_models(rows, known_model, tiny_model_path, tmp_path, monkeypatch):
    calls = []
    specification = table.ATTACKS["quantize"]

    def counted(attacked, data, settings, seed):
        calls.append(attacked.model.num_parameters())
        return specification.function(attacked, data, settings, seed)

    monkeypatch.setitem(table.ATTACKS, "quantize", type(specification)(**{**vars(specification), "function": counted}))
    options = ["--attacks", "quantize", "--control", tiny_model_path, "--generate", "false"]
    options += ["--cache_dir", str(tmp_path / "cache")]
    other = tmp_path / "other"
    shutil.copytree(known_model, other)
    model = AutoModelForCausalLM.from_pretrained(known_model, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[7] += 0.25
    model.save_pretrained(other)
    assert main(arguments(rows, known_model, known_model, tmp_path / "first", *options)) == 0
    assert len(calls) == 2  # the unlearned model is the original, to the bit: it and the control
    assert main(arguments(rows, other, known_model, tmp_path / "second", *options)) == 0
    assert len(calls) == 3
    alone = [word for word in options if word not in ("--cache_dir", str(tmp_path / "cache"))]
    assert main(arguments(rows, other, known_model, tmp_path / "alone", *alone)) == 0
    assert content(tmp_path / "alone") == content(tmp_path / "second")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output_dir", ""], "--output_dir is required"),
        (["--budgets", "small,huge"], "--budgets: 'huge' is none of small, standard, large"),
        (["--seeds", "0,-1"], "--seeds: '-1' is no whole number"),
        (["--thresholds", "none.yaml"], "thresholds cannot be read"),
        (["--attacks", "relern"], "relern is unknown; choose from"),
        (["--max_new_tokens", "0"], "generates nothing"),
        (["--original", "nowhere/at-all"], "original 'nowhere/at-all' cannot be loaded"),
    ],
)
def test_bad_input_is_one_clear_sentence(rows, known_model, tmp_path, capsys, options, message):
    command = arguments(rows, known_model, known_model, tmp_path / "out", "--attacks", "quantize", *options)
    if options == ["--output_dir", ""]:
        command = command[: command.index("--output_dir")]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("Error:") == 1 and message in captured.err
    assert not (tmp_path / "out").exists()


def test_thresholds_may_not_name_attacks_that_there_are_none_of(rows, known_model, tmp_path, capsys):
    thresholds = tmp_path / "mine.yaml"
    thresholds.write_text("recovered: {relearnn: 0.2}\n")
    command = arguments(rows, known_model, known_model, tmp_path / "out", "--thresholds", str(thresholds))
    assert main(command) == 2
    assert "name the attack 'relearnn': choose from relearn" in capsys.readouterr().err


def test_a_folder_that_is_a_file(rows, known_model, tmp_path, capsys):
    (tmp_path / "out").touch()
    assert main(arguments(rows, known_model, known_model, tmp_path / "out")) == 2
    assert "is a file: name a folder" in capsys.readouterr().err


def test_models_with_other_tokens_are_refused(rows, known_model, small_model_path, tmp_path, capsys):
    assert main(arguments(rows, known_model, small_model_path, tmp_path / "out", "--attacks", "quantize")) == 2
    assert "another tokenizer" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["robustness_report", pytest.param("attack", marks=pytest.mark.slow)])
def test_two_processes_are_refused_and_not_run_twice(command):
    """Each would attack the same model and write the same files."""
    config = str(Path(__file__).parents[1] / "examples" / "accelerate_configs" / "cpu_2.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    result = subprocess.run(
        [*launch, "-m", f"hf_unlearn.cli.{command}", "model"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode != 0 and result.stdout == ""
    assert result.stderr.count(f"`hf-unlearn {command.replace('_', '-')}` runs in one process") == 1
