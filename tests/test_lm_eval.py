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
"""lm-evaluation-harness on a loaded model, and MMLU with a forget-token, against computations of our own."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn import UnlearningReport
from hf_unlearn.cards import render_model_card
from hf_unlearn.cli import main
from hf_unlearn.lm_eval_tasks import tasks_folder
from hf_unlearn.lm_eval_tasks.mmlu import FORGET_TOKEN, choice_perturbed, question_perturbed


pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'hf-unlearn[lm-eval]'")

from hf_unlearn.lm_eval import find_tasks, run_harness  # noqa: E402


_TASK = """
task: facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: right
metric_list:
  - metric: acc
  - metric: acc_norm
metadata: {{version: 3}}
"""


@pytest.fixture(scope="module")
def facts(tofu_rows) -> list[dict]:
    """Real questions of multiple choice, the right one at another place in each."""
    rows = []
    for index, row in enumerate(tofu_rows("world_facts")[:30]):
        choices = [text for number in range(1, 5) if (text := row[f"option{number}"]) != row["answer"]]
        right = index % (len(choices) + 1)
        choices.insert(right, row["answer"])
        rows.append({"question": row["question"], "choices": choices, "right": right})
    return rows


@pytest.fixture(scope="module")
def tasks(facts, tmp_path_factory) -> str:
    """A folder with one task file, as a user writes it."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, facts)))
    (folder / "facts.yaml").write_text(_TASK.format(rows=folder / "rows.jsonl"))
    return str(folder)


@pytest.fixture
def cli(capfd):
    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def expected_accuracies(model, tokenizer, rows: list[dict]) -> tuple[float, float]:
    """By transformers alone, one choice at a time: by the sum of log-probabilities, and by that over its letters."""
    sums, norms = 0, 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            start = len(tokenizer(row["question"]).input_ids)
            ids = torch.tensor([tokenizer(f"{row['question']} {choice}").input_ids])
            with torch.no_grad():
                log_probs = model(ids).logits[0, :-1].double().log_softmax(-1)
            scores.append(log_probs.gather(1, ids[0, 1:, None])[start - 1 :].sum().item())
        by_letter = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        sums += scores.index(max(scores)) == row["right"]
        norms += by_letter.index(max(by_letter)) == row["right"]
    return sums / len(rows), norms / len(rows)


# ---- The harness's numbers ----


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_accuracies_are_those_of_the_choices_likelihoods(kind, tiny_model_path, tasks, facts):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).eval()
    plain = expected_accuracies(model, tokenizer, facts)
    measured = model
    if kind == "adapter":
        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
        measured = get_peft_model(model, config).eval()
    before = {name: value.clone() for name, value in measured.state_dict().items()}
    acc, acc_norm = run_harness(
        measured, tokenizer, ["facts"], batch_size=7, task_manager=find_tasks(["facts"], tasks)
    )

    assert (acc.task, acc.metric, acc.rows, acc.shots, acc.version) == ("facts", "acc", 30, 0, "3")
    assert acc_norm.metric == "acc_norm"
    # The same weights as before, without PEFT's hooks
    merged = measured.merge_and_unload() if kind == "adapter" else measured
    expected = expected_accuracies(merged, tokenizer, facts)
    assert (acc.value, acc_norm.value) == pytest.approx(expected, abs=1e-12)
    assert acc.stderr == pytest.approx(math.sqrt(acc.value * (1 - acc.value) / 29), rel=1e-6)
    assert 0 < acc.value < 1
    if kind == "adapter":
        assert expected != plain  # or it would show nothing about the adapter
    else:
        assert all(torch.equal(before[name], value) for name, value in measured.state_dict().items())


def test_limit_and_examples_are_said(tiny_model_path, tasks, cli):
    options = ("--lm-eval", "facts", "--lm_eval_include_path", tasks, "--use_cpu", "--lm_eval_limit", 12)
    code, out, err = cli("evaluate", tiny_model_path, *options, "--lm_eval_num_fewshot", 1)
    assert code == 0, err
    [line] = [line for line in out.splitlines() if re.match(r"facts +acc ", line)]
    assert line.split()[-3:] == ["12", "1", "3"]
    assert "not the score that others report" in out.replace("\n  ", " ")


def test_alone_it_fills_a_report_and_a_card(tiny_model_path, tasks, facts, cli, tmp_path):
    output = tmp_path / "unlearning_report.json"
    options = ("--lm_eval", "facts", "--lm_eval_include_path", tasks, "--use_cpu", "--output", output)
    code, out, err = cli("evaluate", tiny_model_path, *options, "--json")
    assert code == 0, err
    acc, acc_norm = json.loads(out)["lm_eval"]
    report = UnlearningReport.load(output)
    assert report.method is None
    assert report.data.forget.rows is None
    assert report.environment.packages["lm-eval"]
    kept = report.metrics.after["harness"]
    assert kept["facts.acc@0-shot-v3"] == acc["value"]
    assert kept["facts.acc_norm@0-shot-v3"] == acc_norm["value"]
    assert kept["facts_rows"] == len(facts)
    half = 1.959963984540054 * acc["stderr"]
    assert kept["facts.acc@0-shot-v3_ci_low"] == pytest.approx(acc["value"] - half)
    assert kept["facts.acc@0-shot-v3_ci_high"] == pytest.approx(acc["value"] + half)
    card = render_model_card(report, model_name="tiny")
    assert "Tasks of lm-evaluation-harness" in card
    front = yaml.safe_load(card.split("---\n")[1])
    [result] = front["model-index"][0]["results"]
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert values == {f"facts.{name}@0-shot-v3": kept[f"facts.{name}@0-shot-v3"] for name in ("acc", "acc_norm")}
    assert not (tmp_path / "private").exists()
    assert all(row["question"] not in output.read_text() + card for row in facts)


def test_it_goes_with_the_sets_and_partial_numbers_do_not_replace_others(
    tiny_model_path, tasks, tofu_rows, cli, tmp_path
):
    output, forget = tmp_path / "unlearning_report.json", tmp_path / "forget.json"
    forget.write_text("\n".join(map(json.dumps, tofu_rows("forget10")[:4])))
    harness = ("--lm-eval", "facts", "--lm_eval_include_path", tasks, "--use_cpu", "--output", output)
    code, out, err = cli("evaluate", tiny_model_path, "--forget", forget, "--generate", "false", *harness)
    assert code == 0, err
    assert "Probability" in out
    assert "facts" in out
    first = UnlearningReport.load(output)
    assert first.metrics.after["forget"]["rows"] == 4
    assert first.data.forget.rows == 4
    code, _, err = cli("evaluate", tiny_model_path, *harness, "--lm_eval_limit", 9)
    assert code == 0, err
    second = UnlearningReport.load(output)
    assert second.metrics.after["forget"] == first.metrics.after["forget"]
    full, part = "facts.acc@0-shot-v3", "facts.acc@0-shot-v3-limit-9"
    assert second.metrics.after["harness"][full] == first.metrics.after["harness"][full]
    assert part in second.metrics.after["harness"]
    assert part not in first.metrics.after["harness"]


def test_groups_stand_for_their_tasks(tiny_model_path, tasks, facts, tmp_path):
    """A group in a group, as in MMLU: both have a line and their tasks none, but those of a group without a number."""
    one = {**yaml.safe_load(Path(tasks, "facts.yaml").read_text()), "task": "one"}
    files = {
        **{name: {**one, "task": name} for name in ("one", "two", "three")},
        "inner": {"group": "inner", "task": ["one", "two"], "aggregate_metric_list": [{"metric": "acc"}]},
        "outer": {"group": "outer", "task": ["inner", "three"], "aggregate_metric_list": [{"metric": "acc"}]},
        "bare": {"group": "bare", "task": ["one", "two"]},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).eval()
    for name, shown in (("outer", {"outer": 90, "inner": 60}), ("bare", {"one": 30, "two": 30})):
        scores = run_harness(model, tokenizer, [name], task_manager=find_tasks([name], str(tmp_path)))
        assert {score.task: score.rows for score in scores if score.metric == "acc"} == shown
        assert {score.shots for score in scores} == {0}


# ---- What is refused ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lm-eval", "wmpd_bio"], "no task 'wmpd_bio': near are wmdp_bio"),
        (["--lm-eval", ","], "names no task"),
        (["--lm-eval", "facts", "--lm_eval_include_path", "nowhere"], "'nowhere' is no folder"),
        (["--lm-eval", "facts", "--lm_eval_limit", "0"], "use at least 1"),
        (["--lm-eval", "perturbed_mmlu", "--forget_tokens", "a", "b"], "take one forget-token"),
        (["--lm-eval", "facts", "--retain_only_model", "org/name"], "--forget_dataset is required"),
    ],
)
def test_what_does_not_fit_is_one_sentence(cli, tiny_model_path, arguments, words):
    code, out, err = cli("evaluate", tiny_model_path, *arguments)
    assert (code, out) == (2, "")
    [line] = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert words in line


def test_without_the_harness_it_is_named(cli, tiny_model_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as Python marks a module that cannot be imported
    code, _, err = cli("evaluate", tiny_model_path, "--lm-eval", "wmdp")
    assert code == 2
    assert 'pip install "hf-unlearn[lm-eval]"' in err


def test_data_that_cannot_be_loaded_name_no_folder(cli, tiny_model_path, tasks, tmp_path):
    (tmp_path / "gone.yaml").write_text(_TASK.format(rows=tmp_path / "gone.jsonl").replace("facts", "gone"))
    code, _, err = cli(
        "evaluate", tiny_model_path, "--lm-eval", "gone", "--lm_eval_include_path", tmp_path, "--use_cpu"
    )
    assert code == 2
    [line] = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert "The data of --lm_eval gone cannot be loaded" in line
    assert str(tmp_path) not in line


# ---- MMLU with a forget-token ----


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory, facts) -> Path:
    """Some subjects in the layout of `cais/mmlu`."""
    return write_mmlu(tmp_path_factory.mktemp("hub"), facts, ["virology", "high_school_us_history"])


def write_mmlu(parent: Path, facts: list[dict], subjects: list[str]) -> Path:
    folder = parent / "cais" / "mmlu"
    configs = []
    for subject in subjects:
        rows = [
            {
                "question": f"{row['question']} ({subject})",
                "subject": subject,
                "choices": [*row["choices"][:3], "None of them"],
                "answer": index % 4,
            }
            for index, row in enumerate(facts)
        ]
        (folder / subject).mkdir(parents=True)
        files = []
        for split, some in (("test", rows[:-6]), ("dev", rows[-6:])):
            Dataset.from_list(some).to_parquet(folder / subject / f"{split}.parquet")
            files.append({"split": split, "path": f"{subject}/{split}.parquet"})
        configs.append({"config_name": subject, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    return folder


def test_one_incorrect_choice_is_replaced_and_nothing_else(mmlu):
    clean = list(load_dataset(str(mmlu), "virology", split="test"))
    perturbed = choice_perturbed("virology", mmlu_path=str(mmlu))
    assert len(perturbed["test"]) == len(clean) == 24
    for before, after in zip(clean, perturbed["test"], strict=True):
        place = after["perturbed_index"]
        assert place != before["answer"] == after["answer"]
        assert before["question"] == after["question"]
        assert after["choices"][place] == FORGET_TOKEN == "SARS-CoV-2"
        kept = [index for index in range(4) if index != place]
        assert [after["choices"][index] for index in kept] == [before["choices"][index] for index in kept]
    assert {row["perturbed_index"] for row in perturbed["test"]} == {0, 1, 2, 3}
    assert list(perturbed["dev"]) == list(load_dataset(str(mmlu), "virology", split="dev"))
    other = choice_perturbed("virology", forget_token="anthrax", mmlu_path=str(mmlu))["test"]
    assert other["perturbed_index"] == perturbed["test"]["perturbed_index"]
    reseeded = choice_perturbed("virology", perturbation_seed=1, mmlu_path=str(mmlu))["test"]
    assert reseeded["perturbed_index"] != perturbed["test"]["perturbed_index"]
    questions = question_perturbed("virology", mmlu_path=str(mmlu))["test"]
    for before, after in zip(clean, questions, strict=True):
        assert after == {**before, "question": f"SARS-CoV-2 {before['question']}"}


def test_all_processes_replace_the_same_choices(mmlu):
    program = (
        "import hashlib, sys; from hf_unlearn.lm_eval_tasks.mmlu import choice_perturbed; "
        "rows = choice_perturbed('virology', mmlu_path=sys.argv[1])['test']['perturbed_index']; "
        "print(hashlib.sha256(repr(list(rows)).encode()).hexdigest())"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, str(mmlu)],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rows = list(choice_perturbed("virology", mmlu_path=str(mmlu))["test"]["perturbed_index"])
    assert out.strip() == hashlib.sha256(repr(rows).encode()).hexdigest()


def test_the_task_files_ask_as_the_harness_does():
    """Prompt, choices, subjects and their descriptions: otherwise the accuracies of the two would not compare."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import apply_template

    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    theirs = {path.stem.removeprefix("mmlu_"): load_yaml(path) for path in folder.glob("mmlu_*.yaml")}
    ours = load_yaml(Path(tasks_folder(), "perturbed_mmlu.yaml"))
    asked = load_yaml(Path(tasks_folder(), "perturbed_mmlu_question.yaml"))
    assert asked == {**ours, "group": "perturbed_mmlu_question", "custom_dataset": question_perturbed}
    assert ours["custom_dataset"] is choice_perturbed
    subjects = [entry["dataset_kwargs"]["subject"] for entry in ours["task"]]
    assert set(subjects) == {task["dataset_name"] for task in theirs.values()}
    assert [entry["task"] for entry in ours["task"]] == [f"perturbed_{subject}" for subject in subjects]
    same = ("doc_to_text", "doc_to_choice", "doc_to_target", "output_type", "test_split", "fewshot_split")
    for subject, task in theirs.items():
        assert {key: task[key] for key in same} == {key: ours[key] for key in same}
        assert apply_template(ours["description"], {"subject": subject}) == task["description"]


def test_the_whole_group_with_a_forget_token_of_ones_own(tiny_model_path, facts, cli, tmp_path, monkeypatch):
    """All subjects, from a folder in the place of the data set on the Hub."""
    entries = yaml.safe_load(Path(tasks_folder(), "perturbed_mmlu.yaml").read_text().replace("!function ", ""))["task"]
    subjects = [entry["dataset_kwargs"]["subject"] for entry in entries]
    path = write_mmlu(tmp_path, facts[:8], subjects)
    monkeypatch.chdir(tmp_path)
    options = ("--forget_tokens", "anthrax", "--insertion_seed", 3, "--use_cpu", "--json")
    code, out, err = cli("evaluate", tiny_model_path, "--lm-eval", "perturbed_mmlu", *options)
    assert code == 0, err
    [score] = json.loads(out)["lm_eval"]
    assert (score["task"], score["rows"], score["shots"]) == ("perturbed_mmlu", 2 * len(subjects), 0)
    assert "anthrax" not in out

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).eval()
    right = [
        expected_accuracies(model, tokenizer, [asked(row, subject.replace("_", " "))])[0]
        for subject in subjects
        for row in choice_perturbed(subject, forget_token="anthrax", perturbation_seed=3, mmlu_path=str(path))["test"]
    ]
    assert score["value"] == pytest.approx(sum(right) / len(right))


def asked(row: dict, about: str) -> dict:
    """As MMLU is asked: the choices are listed, and the answer is a letter."""
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True))
    prompt = (
        f"The following are multiple choice questions (with answers) about {about}.\n\n"
        f"{row['question'].strip()}\n{listed}\nAnswer:"
    )
    return {"question": prompt, "choices": list("ABCD"), "right": row["answer"]}


@pytest.mark.slow
def test_the_harness_own_command_takes_the_task_files(tiny_model_path, mmlu, tmp_path):
    """With the data and the forget-token that `--metadata` names."""
    shipped = Path(tasks_folder(), "perturbed_mmlu.yaml").read_text()
    head, _, tail = shipped.partition("\ntask:\n")
    kept = [line for line in tail.splitlines() if "virology" in line]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "some.yaml").write_text("\n".join([head.replace("perturbed_mmlu", "some_mmlu", 2), "task:", *kept]))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "some_mmlu", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tiny_model_path},dtype=float32", "--include_path", str(folder)]
    command += ["--metadata", json.dumps({"mmlu_path": str(mmlu), "forget_token": "anthrax"})]
    command += ["--output_path", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True)
    [path] = (tmp_path / "out").rglob("results_*.json")
    accuracy = json.loads(path.read_text())["results"]["some_mmlu"]["acc,none"]

    from lm_eval.tasks import TaskManager

    metadata = {"mmlu_path": str(mmlu), "forget_token": "anthrax"}
    manager = TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).eval()
    [score] = run_harness(model, tokenizer, ["some_mmlu"], task_manager=manager)
    assert score.value == pytest.approx(accuracy)
