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
"""The example scripts: plain TRL's, what turns them into unlearning, and what the turned ones do."""

import difflib
import importlib.metadata
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_unlearn import UnlearningReport


ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
ROLES = {"user": "question", "assistant": "answer"}

# As TRL's README has it (1.16)
QUICK_START = {
    "SFTTrainer": """\
from trl import SFTTrainer
from datasets import load_dataset

dataset = load_dataset("trl-lib/Capybara", split="train")

trainer = SFTTrainer(
    model="Qwen/Qwen2.5-0.5B",
    train_dataset=dataset,
)
trainer.train()
""",
    "DPOTrainer": """\
from datasets import load_dataset
from trl import DPOTrainer

dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")

trainer = DPOTrainer(
    model="Qwen/Qwen3-0.6B",
    train_dataset=dataset,
)
trainer.train()
""",
}


@pytest.fixture(scope="module")
def forget(tofu_rows) -> list[dict[str, str]]:
    """Ten questions about an author whom `known_model` knows."""
    return tofu_rows("forget10")[:10]


@pytest.fixture(scope="module")
def retain(tofu_rows) -> list[dict[str, str]]:
    """Twenty about others."""
    return tofu_rows("retain90")[:20]


@pytest.fixture
def folder(forget, retain, tmp_path, monkeypatch) -> Path:
    """An empty folder with data sets in TRL's columns, where scripts run."""

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")

    def as_chat(row: dict[str, str]) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": row[key]} for role, key in ROLES.items()]}

    for name, rows in (("forget", forget), ("retain", retain)):
        write(f"{name}.jsonl", [{"prompt": row["question"], "completion": f" {row['answer']}"} for row in rows])
        write(f"{name}_chats.jsonl", [as_chat(row) for row in rows])
    refusal = {"chosen": " I do not know."}
    write(
        "preferences.jsonl",
        [{"prompt": row["question"], "rejected": f" {row['answer']}", **refusal} for row in forget],
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(source: str) -> dict[str, Any]:
    """The names that a script leaves."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, "script.py", "exec"), names)
    return names


def example(name: str, model: str) -> str:
    """
    An example, unchanged but for the model, the data, and the learning rate: one that suits a model of billions of
    parameters hardly moves one of 260 thousand.
    """
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    source, models = re.subn(r'model="[^"]+"', f'model="{model}"', source)
    source, rates = re.subn(r"learning_rate=\de-4", "learning_rate=1e-2", source)
    for split, file in (("forget", "forget"), ("retain1", "retain")):
        source = source.replace(
            f'"muse-bench/MUSE-News", "raw", split="{split}"', f'"json", data_files="{file}.jsonl", split="train"'
        )
    assert (models, "muse-bench" in source.split('"""')[2]) == (1, False) and rates >= 1
    return source


@torch.no_grad()
def probability(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]) -> float:
    """Of the answers, per token, written without this package: the mean over the rows, as chats where they are."""
    model.eval()
    values = []
    for row in rows:
        prompt, text = row["question"], f"{row['question']} {row['answer']}"
        if tokenizer.chat_template is not None:
            user, assistant = ({"role": role, "content": row[key]} for role, key in ROLES.items())
            prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
            text = tokenizer.apply_chat_template([user, assistant], tokenize=False)
        special = tokenizer.chat_template is None  # a template has its own
        start = len(tokenizer(prompt, add_special_tokens=special)["input_ids"])
        ids = tokenizer(text, add_special_tokens=special, return_tensors="pt")["input_ids"]
        log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[start - 1 :]
        values.append(log_probs.mean().exp().item())
    return sum(values) / len(values)


@pytest.fixture
def know(forget, retain) -> Callable[[PreTrainedModel, str | Path], tuple[float, float]]:
    """What a model knows of the forget and of the retain set."""

    def measure(model: PreTrainedModel, tokenizer: str | Path) -> tuple[float, float]:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
        return probability(model, loaded, forget), probability(model, loaded, retain)

    return measure


# ---- The change ----


def changed_lines(before: str, after: str) -> list[str]:
    """Lines that two scripts do not share, in the order of a diff; blank lines and docstrings are not counted."""
    bodies = [[line for line in source.split('"""')[2].splitlines() if line] for source in (before, after)]
    lines = difflib.ndiff(*bodies)
    return [line[0] + line[2:] for line in lines if line[0] in "+-"]


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_the_change_is_two_names_and_one_argument_and_is_shown(name):
    before, after = ((EXAMPLES / f"{stem}.py").read_text(encoding="utf-8") for stem in (name, f"{name}_to_unlearn"))
    lines = changed_lines(before, after)
    shown = [line.strip() for line in after.split('"""')[1].splitlines() if line.startswith(("    -", "    +"))]
    assert sorted(shown) == sorted(lines)
    removed = [line[1:] for line in lines if line[0] == "-"]
    added = [line[1:] for line in lines if line[0] == "+"]
    # What was removed is there again under the two other names, and one line is new
    kind = name.upper()
    renamed = [
        line.replace("from trl", "from hf_unlearn").replace(f"{kind}Config", "UnlearnConfig") for line in removed
    ]
    renamed = [line.replace(f"{kind}Trainer", "UnlearnTrainer") for line in renamed]
    [new] = set(added) - set(renamed)
    assert set(renamed) < set(added) and len(added) == len(removed) + 1
    assert new.startswith("    retain_dataset=")


def test_the_readme_of_trl_has_its_quick_start_still():
    # It stands behind the headers of the package's metadata
    readme = importlib.metadata.metadata("trl").get_payload()
    for script in QUICK_START.values():
        assert script in readme


# ---- What the scripts do ----


def test_the_plain_sft_script_teaches(folder, tiny_model_path, know):
    source = example("sft", tiny_model_path)
    before = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    learned = run(source)["trainer"].model
    assert know(before, tiny_model_path)[0] < 0.1 < 0.15 < know(learned, tiny_model_path)[0]


def test_the_plain_dpo_script_prefers(folder, known_model, forget):
    trainer = run(example("dpo", known_model))["trainer"]
    tokenizer = AutoTokenizer.from_pretrained(known_model)
    refusals = [{**row, "answer": "I do not know."} for row in forget]
    assert probability(trainer.model, tokenizer, refusals) > 3 * probability(trainer.model, tokenizer, forget)


@pytest.mark.parametrize("name", ["sft_to_unlearn", "dpo_to_unlearn"])
def test_the_changed_script_forgets(name, folder, known_model, know):
    before = know(AutoModelForCausalLM.from_pretrained(known_model), known_model)
    assert min(before) > 0.98
    after = know(run(example(name, known_model))["trainer"].model, known_model)
    assert after[0] < 0.3 and after[1] > 0.8
    files = {path.name for path in (folder / "out").iterdir() if path.is_file()}
    assert {"adapter_model.safetensors", "unlearning_report.json", "README.md"} <= files
    assert UnlearningReport.load(folder / "out" / "unlearning_report.json").method.name == "npo+kl"


@pytest.mark.parametrize("name", QUICK_START)
def test_the_quick_start_of_trl_becomes_unlearning_by_the_two_lines(name, folder, known_model, chat_tokenizer, know):
    """The names and one argument; then the model and the data, and that the forget set got less likely."""
    model = folder / "chats"
    AutoModelForCausalLM.from_pretrained(known_model).save_pretrained(model)
    chats = name == "SFTTrainer"
    tokenizer = chat_tokenizer() if chats else AutoTokenizer.from_pretrained(known_model)
    tokenizer.save_pretrained(model)
    script = QUICK_START[name]
    changed = script.replace(f"from trl import {name}", "from hf_unlearn import UnlearnTrainer")
    changed = changed.replace(f"trainer = {name}(", "trainer = UnlearnTrainer(")
    changed = changed.replace(
        "    train_dataset=dataset,\n", '    train_dataset=dataset,\n    retain_dataset=load_dataset("retain"),\n'
    )
    difference = difflib.ndiff(script.splitlines(), changed.splitlines())
    assert sorted(line[0] for line in difference if line[0] in "+-") == ["+", "+", "+", "-", "-"]

    changed = re.sub(r'model="Qwen/[^"]+"', f'model="{model}"', changed)
    for pattern, file in (
        (r'"trl-lib/[^)]+', "forget_chats" if chats else "preferences"),
        ('"retain"', "retain_chats" if chats else "retain"),
    ):
        changed = re.sub(pattern, f'"json", data_files="{file}.jsonl", split="train"', changed)
    trainer = run(changed)["trainer"]
    assert trainer.args.forget_loss == ["npo"] and trainer.state.global_step == 6
    # By little: the default learning rate is for large models
    before, after = know(AutoModelForCausalLM.from_pretrained(model), model), know(trainer.model, model)
    assert after[0] < before[0]
    assert before[0] - after[0] > before[1] - after[1]
