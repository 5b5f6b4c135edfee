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
"""`hf-unlearn attack`: as a user runs it, and as one gets it wrong."""

import json
import os
import stat

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn.attacks.base import AttackData
from hf_unlearn.attacks.data import split_rows
from hf_unlearn.attacks.run import AttackSpecification
from hf_unlearn.attacks.table import ATTACKS
from hf_unlearn.cli import main


@pytest.fixture
def files(tmp_path, tofu_rows):
    """Forget rows that `known_model` knows, and rows to keep."""
    paths = {}
    for name, rows in (("forget", tofu_rows("forget10")[:12]), ("retain", tofu_rows("retain90")[:6])):
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return {name: str(path) for name, path in paths.items()}


def arguments(files, model, original, *more):
    return [
        "attack", model, "--original", original, "--forget", files["forget"], "--retain", files["retain"],
        "--use_cpu", *more,
    ]  # fmt: skip


def test_every_attack_has_three_budgets_and_a_summary():
    assert set(ATTACKS) == {
        *("relearn", "benign_finetune", "prefill", "paraphrase", "few_shot", "sampling_leak", "quantize"),
        *("weight_noise", "activation_noise", "latent_pgd", "soft_prompt", "gcg", "direction_ablation"),
        *("logit_lens", "linear_probe", "adapter_removal", "interpolation"),
    }
    for name, specification in ATTACKS.items():
        assert isinstance(specification, AttackSpecification)
        assert list(specification.budgets) == ["small", "standard", "large"], name
        assert specification.summary and specification.function.__name__ == name


def test_help_lists_every_attack_on_a_line_of_its_own(capsys):
    with pytest.raises(SystemExit):
        main(["attack", "--help"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    for name, specification in ATTACKS.items():
        assert [name, *specification.summary.split()] in lines


def test_no_row_is_the_attackers_and_scored_too():
    """Relearning on what is asked teaches it: the public mistake is to score on T."""
    rows = Dataset.from_list([{"question": f"q{index % 7}", "answer": "a"} for index in range(20)])
    train, held_out = split_rows(rows, seed=1)
    assert len(train) + len(held_out) == 7 and not set(train["question"]) & set(held_out["question"])
    again, _ = split_rows(rows, seed=1)
    other, _ = split_rows(rows, seed=2)
    assert again["question"] == train["question"] != other["question"]
    with pytest.raises(ValueError, match="at least two"):
        split_rows(rows.select([0, 7, 14]), seed=0)


def test_a_model_that_forgot_nothing_gives_all_and_one_that_never_knew_gives_nothing(
    files, known_model, tiny_model_path, tmp_path, capsys
):
    report = tmp_path / "out" / "unlearning_report.json"
    chosen = ["--attacks", "quantize,prefill", "logit_lens", "--control", tiny_model_path, "--output", str(report)]
    assert main(arguments(files, known_model, known_model, *chosen)) == 0
    table = capsys.readouterr().out
    assert "quantize" in table and "1.00" in table and "model that never saw the forget set" in table
    content = json.loads(report.read_text())
    entries = {entry["name"]: entry for entry in content["attacks"]}
    assert set(entries) == {"quantize", "prefill", "logit_lens"}
    for entry in entries.values():
        assert entry["recovered"] == pytest.approx(1.0, abs=1e-6) and entry["budget"]["budget"] == "small"
        assert entry["score_original_attacked"] > 0.9 > 0.1 > entry["score_control_attacked"]

    assert main(arguments(files, tiny_model_path, known_model, *chosen, "--json")) == 0
    results = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert results["quantize"]["recovered"] == pytest.approx(0.0, abs=1e-6)
    # In place of the entries of the first run, not beside them
    assert len(json.loads(report.read_text())["attacks"]) == 3


def test_values_per_row_are_private_and_nothing_else_holds_text(files, known_model, tiny_model_path, tmp_path):
    report = tmp_path / "out" / "unlearning_report.json"
    options = ["--attacks", "paraphrase", "--control", tiny_model_path, "--output", str(report)]
    assert main(arguments(files, known_model, known_model, *options)) == 0
    private = tmp_path / "out" / "private"
    assert stat.S_IMODE(os.stat(private).st_mode) == 0o700
    rows = [json.loads(line) for line in (private / "attack_paraphrase_small_seed0.jsonl").read_text().splitlines()]
    assert {row["model"] for row in rows} == {"unlearned", "original", "control"}
    assert all(len(row["rows"]) == 6 and all(0 <= value <= 1 for value in row["rows"]) for row in rows)
    text = report.read_text() + (private / "attack_paraphrase_small_seed0.jsonl").read_text()
    for line in open(files["forget"], encoding="utf-8"):
        assert json.loads(line)["answer"] not in text and json.loads(line)["question"] not in text


def test_an_attack_that_cannot_run_says_why_and_the_others_go_on(files, known_model, tiny_model_path, capsys):
    options = ["--attacks", "adapter_removal,quantize", "--control", tiny_model_path, "--json"]
    assert main(arguments(files, tiny_model_path, known_model, *options)) == 0
    results = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert results["adapter_removal"]["recovered"] is None and "no adapters" in results["adapter_removal"]["reason"]
    assert results["quantize"]["recovered"] is not None


def test_an_adapter_that_hides_the_answers_is_exposed_by_its_removal(
    files, known_model, tiny_model_path, tmp_path, capsys
):
    """Forgetting that lives in an adapter alone: dropping it brings everything back."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(known_model, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"], r=2, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.mul_(60.0)  # a crude adapter, under which nothing is known
    adapted.peft_config["default"].base_model_name_or_path = known_model
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(known_model).save_pretrained(tmp_path / "adapter")
    options = ["--attacks", "quantize,adapter_removal", "--control", tiny_model_path, "--json"]
    assert main(arguments(files, str(tmp_path / "adapter"), known_model, *options)) == 0
    results = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert results["adapter_removal"]["score_before"] < 0.1
    assert results["adapter_removal"]["recovered"] == pytest.approx(1.0, abs=1e-5)
    assert results["quantize"]["score_after"] < 0.1  # the adapter is merged for all other attacks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--original", None), "--original is required"),
        (("--retain", None), "--retain_dataset is required"),
        (("--attacks", "relern"), "relern is unknown; choose from relearn"),
        (("--attacks", "soft_prompt"), "without --control"),
        (("--budget", "huge"), "invalid choice"),
        (("--max_rows", "0"), "at least 1"),
    ],
)
def test_bad_input_is_one_clear_sentence(files, known_model, capsys, change, message):
    command = arguments(files, known_model, known_model)
    option, value = change
    if value is None:
        index = command.index(option)
        command = command[:index] + command[index + 2 :]
    else:
        command += [option, value]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("Error:") == 1 and message in captured.err


def test_models_with_other_tokens_are_refused(files, known_model, small_model_path, capsys):
    assert main(arguments(files, known_model, small_model_path, "--attacks", "quantize")) == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_of_preference_rows_the_rejected_answer_is_the_one_to_forget(known_model, tofu_rows, tmp_path):
    from hf_unlearn import UnlearnConfig
    from hf_unlearn.attacks.base import Attacked, answer_probabilities

    rows = tofu_rows("forget10")[:4]
    pairs = Dataset.from_list(
        [{"prompt": row["question"], "chosen": " I do not know.", "rejected": f" {row['answer']}"} for row in rows]
    )
    model = AutoModelForCausalLM.from_pretrained(known_model, dtype=torch.float32)
    attacked = Attacked(model, AutoTokenizer.from_pretrained(known_model), model)
    data = AttackData(pairs, pairs, Dataset.from_list(rows), UnlearnConfig(str(tmp_path), use_cpu=True))
    assert min(answer_probabilities(attacked, data.held_out, data)) > 0.8
