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
"""
Every command and every piece of Python in README.md and docs/ runs, on small models and data of the names that stand
there, or is listed below with the test that runs it or the reason why nothing does.
"""

import importlib.util
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import hf_unlearn
from hf_unlearn import UnlearnConfig, UnlearnTrainer
from hf_unlearn.cli import main
from hf_unlearn.data import prepare_dataset


ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]

# A command, by how it begins (in full where it has no more) -> why it is not run here, or the test that runs it
NOT_RUN_COMMANDS = {
    "make quickstart": "tests/test_quickstart.py runs it",
    "make test": "this is what is running",
    "python -m venv .venv": "installs: tools/bootstrap.py does the same for every `make` target",
    "source .venv/bin/activate": "installs",
    "pip install": "installs",
    "hf-unlearn train --config recipe.yaml --accelerate_config fsdp2": (
        "tests/test_engines.py::test_accelerate_reads_the_shipped_configurations; two processes, in tests/distributed"
    ),
    "accelerate launch --config_file": "tests/test_engines.py::test_accelerate_reads_the_shipped_configurations",
    "hf-unlearn push": "tests/hub/test_end_to_end.py::test_two_releases_of_the_quickstart, against a Hub of its own",
    "hf-unlearn verify": "tests/hub/test_verify.py::test_a_release_is_what_it_says, against a Hub of its own",
    "hf-unlearn audit": "tests/hub/test_audit.py::test_clean, against a Hub of its own",
    "hf-unlearn diff BASE release --manifest manifest --sign": "tests/test_cli_diff.py::test_signed_manifest",
    "hf-unlearn apply BASE manifest rebuilt --verify_signature": "tests/test_cli_diff.py::test_signed_manifest",
    "python benchmarks/compare_losses.py": "takes hours; tests/test_compare_losses.py checks its page",
    "python benchmarks/what_holds.py": "takes hours; tests/test_what_holds.py runs its parts",
    "lm_eval run": "tests/test_lm_eval.py::test_the_harness_own_command_takes_the_task_files",
}
# Pages whose Python is one script, from its first piece to its last: the test that runs it
RUN_AS_ONE = {"docs/callbacks.md": "tests/test_examples_callbacks.py"}
# A piece of Python, by page and its first line
NOT_RUN_PYTHON = {
    ("docs/engines.md", "args = UnlearnConfig(..., activation_checkpointing=True"): (
        "needs a GPU; tests/test_engines_gpu.py::test_activations_in_main_memory_change_no_number"
    ),
    ("docs/release.md", "from datasets import Dataset\nfrom hf_unlearn import UnlearnConfig"): (
        "tests/hub/test_push_from_training.py::test_the_documented_script_releases, against a Hub of its own"
    ),
    ("docs/release.md", "from datasets import Dataset\nfrom hf_unlearn.trainer_callbacks import ReleaseCallback"): (
        "tests/hub/test_push_from_training.py::test_the_documented_script_releases, against a Hub of its own"
    ),
    ("docs/axolotl.md", "from axolotl.integrations.base import BasePlugin"): "needs axolotl, as the page says",
    ("docs/llama_factory.md", "import yaml\nfrom forgetting import"): "needs LLaMA-Factory, as the page says",
}
# What is added to a command, so that it takes seconds
OPTIONS = {
    "train": "--use_cpu --max_steps 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 1",
    "intervene": "--use_cpu",
    "evaluate": "--use_cpu --max_rows 3 --max_new_tokens 4 --max_length 256 --gradient_norm false",
    "attack": "--use_cpu --max_rows 6 --max_length 256",
    "robustness-report": "--use_cpu --max_rows 6 --max_length 256 --attacks quantize",
    "release": "",
    "check": "",
}
TOFU = "open-unlearning/tofu_Llama-3.2-1B-Instruct"
MODELS = (
    *("BASE", "M", "RETAIN_ONLY", f"{TOFU}_full", f"{TOFU}_retain90"),
    *("outputs/lora/merged", "saves/merged", "org/model", "muse-bench/MUSE-News_target"),
)


@dataclass(frozen=True)
class Snippet:
    page: str
    language: str
    code: str

    @property
    def name(self) -> str:
        """For the list of tests."""
        return f"{self.page} {self.language}: {self.code.splitlines()[0][:50]}"


def snippets() -> list[Snippet]:
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for language, code in re.findall(r"^```(bash|python|diff)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
            found.append(Snippet(page, language, code))
    return found


def commands(code: str) -> list[str]:
    """The commands of a shell snippet, without comments, each in one line."""
    joined = re.sub(r"\\\n\s*", "", code)
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines()]
    return [part.strip() for line in lines if line for part in line.split(" && ")]


def reason(command: str) -> str | None:
    return next((why for start, why in NOT_RUN_COMMANDS.items() if command.startswith(start)), None)


def python_reason(snippet: Snippet) -> str | None:
    matches = (why for (page, start), why in NOT_RUN_PYTHON.items() if starts(snippet, page, start))
    return next(matches, None)


def starts(snippet: Snippet, page: str, start: str) -> bool:
    return snippet.page == page and snippet.code.startswith(start)


SNIPPETS = snippets()
SHELL = [s for s in SNIPPETS if s.language == "bash" and not all(map(reason, commands(s.code)))]
PYTHON = [s for s in SNIPPETS if s.language != "bash" and s.page not in RUN_AS_ONE and python_reason(s) is None]


# ---- The tables ----


def test_no_entry_of_the_tables_is_left_behind():
    written = [command for s in SNIPPETS if s.language == "bash" for command in commands(s.code)]
    assert [start for start in NOT_RUN_COMMANDS if not any(line.startswith(start) for line in written)] == []
    left = [key for key in NOT_RUN_PYTHON if not any(starts(snippet, *key) for snippet in SNIPPETS)]
    assert left == []
    for page, path in RUN_AS_ONE.items():
        assert page in PAGES
        assert f'"{Path(page).name}"' in (ROOT / path).read_text(encoding="utf-8")
    for why in [*NOT_RUN_COMMANDS.values(), *NOT_RUN_PYTHON.values()]:
        for path, name in re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", why):
            assert (ROOT / path).is_file(), why
            assert not name or f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), why


def test_snippets_are_found():
    """A fence that is written in another way would be run by nothing."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        fences = re.findall(r"^\s*(?:```|~~~)[ \t]*(\S+)", text, flags=re.MULTILINE)
        others = {"console"} if page == "docs/newcomer.md" else set()  # run by tests/test_examples_newcomer.py
        assert set(fences) <= {"bash", "python", "diff", "yaml", "json"} | others, page
        found = [s.language for s in SNIPPETS if s.page == page]
        assert [name for name in fences if name in ("bash", "python", "diff")] == found
    assert len(SHELL) >= 10
    assert len(PYTHON) >= 10


@pytest.mark.parametrize("page", PAGES)
def test_yaml_and_json_can_be_read(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for code in re.findall(r"^```(?:yaml|json)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        content = yaml.safe_load(code)  # JSON is YAML
        assert isinstance(content, dict)
        if page == "docs/efficiency.md":
            assert set(content) <= set(UnlearnConfig.__dataclass_fields__)


# ---- A folder in which the names that the pages use are real ----


def rows_of(tofu_rows) -> dict[str, list[dict]]:
    return {"forget": tofu_rows("forget10_perturbed")[:6], "retain": tofu_rows("retain_perturbed")[:6]}


@pytest.fixture(scope="module")
def world(tiny_model_path, tofu_rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for name in MODELS:
        shutil.copytree(tiny_model_path, folder / name)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    model.config._name_or_path = tiny_model_path
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    for name in ("outputs/lora", "saves/lora"):
        adapted.save_pretrained(folder / name)
    rows = rows_of(tofu_rows)
    for name, part in (("F", "forget"), ("R", "retain"), ("H", "retain"), ("A", "forget"), ("B", "retain")):
        Dataset.from_list(rows[part]).save_to_disk(folder / name)
        Dataset.from_list(rows[part]).to_json(folder / f"{part}.jsonl")
    (folder / "names.txt").write_text("Zzyzx Quillfeather\n")
    instructions = [{"instruction": row["question"], "input": "", "output": row["answer"]} for row in rows["forget"]]
    Dataset.from_list(instructions).to_json(folder / "alpaca.jsonl")
    shutil.copy(folder / "alpaca.jsonl", folder / "alpaca.json")
    parts = dict.fromkeys(("forget10", "forget10_perturbed", "forget01_perturbed"), rows["forget"])
    parts |= dict.fromkeys(("retain90", "retain_perturbed"), rows["retain"])
    parts |= dict.fromkeys(("real_authors_perturbed", "world_facts_perturbed"), rows["retain"])
    write_configs(folder / "hub" / "locuslab" / "TOFU", parts)
    write_tasks(folder / "tasks", rows["retain"])
    return folder


def write_configs(folder: Path, parts: dict[str, list[dict]]) -> None:
    """In the layout of a data set on the Hub."""
    entries = []
    for name, rows in parts.items():
        (folder / name).mkdir(parents=True)
        Dataset.from_list(rows).to_parquet(folder / name / "train.parquet")
        entries.append({"config_name": name, "data_files": [{"split": "train", "path": f"{name}/train.parquet"}]})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': entries})}---\n")


def write_tasks(folder: Path, rows: list[dict]) -> None:
    """Tasks of lm-evaluation-harness of the names on the page, which stand in the place of its own."""
    folder.mkdir()
    choices = [{**row, "choices": [row["answer"], *row["perturbed_answer"]]} for row in rows]
    Dataset.from_list(choices).to_json(folder / "rows.jsonl")
    for name in ("wmdp", "wmdp_bio", "mmlu", "perturbed_mmlu", "perturbed_mmlu_question"):
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
            **{"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}"},
            **{"doc_to_choice": "choices", "doc_to_target": 0, "metric_list": [{"metric": "acc"}]},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


@pytest.fixture(scope="module")
def unlearned(world, tmp_path_factory) -> Path:
    """`out`, as training leaves it."""
    folder = tmp_path_factory.mktemp("unlearned") / "out"
    words = ["--model_name_or_path", world / "BASE", "--forget_dataset", world / "F", "--retain_dataset", world / "R"]
    command = ["train", *words, "--output_dir", folder, *OPTIONS["train"].split()]
    assert main([str(word) for word in command]) == 0
    return folder


@pytest.fixture
def place(world, unlearned, tmp_path, monkeypatch) -> Path:
    """A copy of the folder, as the working directory."""
    monkeypatch.delenv("HF_DEBUG", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "work"
    shutil.copytree(world, folder)
    shutil.copytree(unlearned, folder / "out")
    monkeypatch.chdir(folder)
    return folder


# ---- What runs ----


@pytest.mark.parametrize("snippet", SHELL, ids=lambda snippet: snippet.name)
def test_commands_run(snippet, place, capfd):
    if "--lm-eval" in snippet.code and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-evaluation-harness is not installed: pip install 'hf-unlearn[lm-eval]'")
    # On the command line a folder is one that `datasets` saved; a preset reads the layout of the Hub
    shutil.copytree(place / "F", place / "locuslab" / "TOFU")
    for command in commands(snippet.code):
        if reason(command) is not None:
            continue
        program, name, *words = shlex.split(command)
        assert program == "hf-unlearn", command
        words += OPTIONS[name].split()
        if "--preset" in words:
            preset = words[words.index("--preset") + 1]
            assert preset == "tofu"
            words += ["--preset_source", "hub/locuslab/TOFU"]
        if "--lm-eval" in words:
            words += ["--lm_eval_include_path", "tasks"]
        if name in ("train", "intervene"):
            shutil.rmtree("out")  # what an earlier run has left is not mixed with another
        code = main([name, *words])
        # The gate may find something: that the release is of a model that was hardly trained
        assert code in ((0, 1) if name == "check" else (0,)), (command, capfd.readouterr().err[-2000:])


def plain_python(snippet: Snippet) -> list[str]:
    """The script, or the two of a diff: what a reader has, and what it becomes."""
    if snippet.language == "python":
        return [snippet.code]
    lines = snippet.code.splitlines()
    return ["\n".join(line[1:] for line in lines if not line.startswith(sign)) for sign in "+-"]


# The small model has five layers, and no task of the harness can be loaded without a Hub
REPLACED = {
    'trainable_layers="7"': 'trainable_layers="2"',
    "        reference_noise_std=0.02,": "        reference_noise_std=0.02, reference_noise_layer=2,",
    'find_tasks(["wmdp_bio"], include_path=None)': 'find_tasks(["wmdp_bio"], include_path="tasks")',
    ' args=SFTConfig("out", learning_rate=2e-4)': ' args=SFTConfig("out", use_cpu=True, bf16=False, max_steps=1)',
    '"muse-bench/MUSE-News", "raw", split="forget"': '"json", data_files="news_to_forget.jsonl", split="train"',
    '"muse-bench/MUSE-News", "raw", split="retain1"': '"json", data_files="news_to_keep.jsonl", split="train"',
}


@pytest.mark.parametrize("snippet", PYTHON, ids=lambda snippet: snippet.name)
def test_python_runs(snippet, place, tofu_rows, tiny_model_path, monkeypatch):
    if "hf_unlearn.lm_eval" in snippet.code and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-evaluation-harness is not installed: pip install 'hf-unlearn[lm-eval]'")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    shutil.copytree(place / "hub" / "locuslab", place / "locuslab")  # as `load_dataset` reads a folder
    sets = {name: Dataset.from_list(rows) for name, rows in rows_of(tofu_rows).items()}
    if "probe_weight" in snippet.code:  # it is trained before the first step, and has to tell the two apart
        files = {"forget": "forget10", "retain": "world_facts"}
        sets = {name: Dataset.from_list(tofu_rows(file)[:60]) for name, file in files.items()}
        sets["retain"] = sets["retain"].select_columns(["question", "answer"])
    args = UnlearnConfig("out", use_cpu=True, max_length=256, max_steps=1)
    names = {
        **{name: getattr(hf_unlearn, name) for name in ("UnlearnConfig", "UnlearnTrainer")},
        **{"load_dataset": load_dataset, "LoraConfig": LoraConfig, "torch": torch, "args": args},
        **{"forget": sets["forget"], "retain": sets["retain"], "holdout": sets["retain"]},
        **{name: load(tiny_model_path) for name in ("model", "original", "base", "retain_only")},
        "tokenizer": AutoTokenizer.from_pretrained(tiny_model_path),
    }
    if "trainer.train()" in snippet.code and "trainer =" not in snippet.code:
        names["trainer"] = UnlearnTrainer(
            model="BASE", args=args, train_dataset=sets["forget"], retain_dataset=sets["retain"]
        )
    for name, rows in (("news_to_forget", sets["forget"]), ("news_to_keep", sets["retain"])):
        texts = [f"{row['question']} {row['answer']}" for row in rows]
        Dataset.from_dict({"text": texts}).to_json(f"{name}.jsonl")
    for code in plain_python(snippet):
        for text, other in REPLACED.items():
            code = code.replace(text, other)
        exec(compile(code, snippet.page, "exec"), names)

    if "as_messages" in snippet.code:
        converted = list(Dataset.from_json("forget.jsonl"))
        for row, original in zip(converted, sets["forget"], strict=True):
            turns = [(turn["role"], turn["content"]) for turn in row["messages"]]
            assert turns == [("user", original["question"]), ("assistant", original["answer"])]
    if "def forgetting_callbacks" in snippet.code:
        trainer = SFTTrainer(
            model="BASE",
            args=SFTConfig("sft", max_steps=2, bf16=False, report_to="none", use_cpu=True),
            train_dataset=Dataset.from_list([{"text": "Once upon a time there was a cat."}] * 8),
            callbacks=names["forgetting_callbacks"](),
        )
        trainer.train()
        assert any("eval_unlearning_forget_probability" in entry for entry in trainer.state.log_history)


def load(path: str):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def test_replacements_are_those_of_a_page():
    assert [text for text in REPLACED if not any(text in snippet.code for snippet in PYTHON)] == []


# ---- What the pages on other tools say of their data ----


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]},
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ada."}]},
        {"text": "Who? Ada."},
    ],
    ids=["messages", "sharegpt", "text"],
)
def test_rows_of_other_tools_are_read_as_they_are(row, chat_tokenizer, tmp_path):
    tokenizer, args = chat_tokenizer(), UnlearnConfig(str(tmp_path), use_cpu=True)
    [read] = prepare_dataset(Dataset.from_list([row]), tokenizer, args, "forget")
    text = tokenizer.decode(read["input_ids"])
    assert "Who?" in text
    assert "Ada." in text
