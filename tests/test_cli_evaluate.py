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
"""`hf-unlearn evaluate`, run as a user runs it, on a model that knows some authors of TOFU and not others."""

import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from scipy.stats import ks_2samp
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn import UnlearnConfig, UnlearningReport
from hf_unlearn.cli import UsageError, main
from hf_unlearn.cli.evaluate_data import _tofu_config
from hf_unlearn.metrics import evaluate_insertion, evaluate_model, model_utility
from hf_unlearn.recording import save_report


ROOT = Path(__file__).parents[1]
LENGTHS = ("--max_length", "256", "--max_new_tokens", "24")


@pytest.fixture
def cli(monkeypatch, capfd):
    """Runs `hf-unlearn ...` in this process; returns exit code, stdout and stderr."""
    monkeypatch.delenv("HF_DEBUG", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def files(tofu_rows, tmp_path) -> dict[str, Path]:
    """Some rows of each set, in TOFU's own format. The model knows all of `forget` and `retain`."""
    rows = {
        "forget": tofu_rows("forget10_perturbed")[:8],
        "retain": tofu_rows("retain_perturbed")[:6],
        "real_authors": tofu_rows("real_authors")[:5],
        "world_facts": tofu_rows("world_facts")[:5],
        "plain": tofu_rows("forget10")[:5],
    }
    return {name: write_rows(tmp_path / f"{name}.json", some) for name, some in rows.items()}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sentence(err: str) -> str:
    """The one line of an error; progress bars may stand before it."""
    lines = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0].removeprefix("Error: ")


def table(out: str) -> dict[str, list[str]]:
    """First word or words of a line of the table -> its cells, intervals included."""
    lines = [re.split(r"\s{2,}", line.rstrip()) for line in out.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) > 1}


# ---- What is measured ----


def test_json_holds_the_numbers_of_the_engine(cli, known_model, files):
    sets = {name: Dataset.from_list(read_rows(files[name])) for name in ("forget", "retain", "world_facts")}
    expected = evaluate_model(
        AutoModelForCausalLM.from_pretrained(known_model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(known_model),
        sets,
        UnlearnConfig("unused", use_cpu=True, max_length=256),
        max_new_tokens=24,
    )
    sources = [word for name in sets for word in (f"--{name}", files[name])]
    code, out, err = cli("evaluate", known_model, *sources, *LENGTHS, "--use_cpu", "--json")
    assert code == 0, err
    result = json.loads(out)  # nothing else is on stdout
    utility = result["metrics"]["after"]["retain"].pop("model_utility")
    for name, metrics in expected.metrics.items():
        measured = result["metrics"]["after"][name]
        assert {metric: measured[metric] for metric in metrics} == pytest.approx(metrics, abs=1e-6)
    assert (utility, result["model_utility_over"]) == (
        pytest.approx(model_utility(expected.metrics)[0]),
        [f"{name}.{metric}" for name in ("retain", "world_facts") for metric in _UTILITY],
    )
    assert result["metrics"]["after"]["forget"]["probability"] > 0.99
    assert (result["report"], result["empty_answers"]) == (None, {})
    assert "Evaluating" in err  # the progress bar


_UTILITY = ("probability", "rougeL_recall", "truth_ratio")


def test_table_for_a_person(cli, known_model, files):
    sources = [
        word for name in ("forget", "retain", "real_authors", "world_facts") for word in (f"--{name}", files[name])
    ]
    code, out, err = cli("evaluate", known_model, *sources, *LENGTHS, "--retain-only-model", known_model)
    assert code == 0, err
    first, second = out.split("\n\n")[:2]
    assert re.split(r"\s{2,}", first.splitlines()[0].strip()) == ["forget set", "retain set"]
    assert re.split(r"\s{2,}", second.splitlines()[0].strip()) == ["real authors", "world facts"]
    cells = table(first)
    assert cells["Rows"] == ["8", "6"]
    assert re.fullmatch(r"0\.99\d \[0\.99\d, (0\.99\d|1\.000)\]", cells["Probability"][0])
    assert set(cells) >= {"ROUGE-L recall", "Exact memorisation", "Extraction strength", "Truth ratio"}
    # Compared with itself, no model is told apart
    assert cells["Forget quality"] == ["1.000"]
    assert (
        "Model utility: harmonic mean of Probability, ROUGE-L recall, Truth ratio over the retain set, the real "
        "authors, the world facts."
    ) in " ".join(out.split())
    assert "retain set alone" not in " ".join(out.split())
    assert max(len(line) for line in out.splitlines()) <= 100


def test_utility_says_that_it_is_over_the_retain_set_alone(cli, known_model, files):
    code, out, _ = cli("evaluate", known_model, "--forget", files["forget"], "--retain", files["retain"], *LENGTHS)
    assert code == 0
    assert "It is over the retain set alone: --real_authors and --world_facts add to it." in " ".join(out.split())


def test_forget_quality_against_a_model_that_never_saw_the_forget_set(
    cli, known_model, tiny_model_path, files, tmp_path
):
    code, out, err = cli(
        "evaluate", known_model, "--forget", files["forget"], "--retain_only_model", tiny_model_path,
        "--output", tmp_path / "report.json", "--json", "--no_generate", *LENGTHS,
    )  # fmt: skip
    assert code == 0, err
    metrics = json.loads(out)["metrics"]["after"]["forget"]
    ours, theirs = (
        [row["truth_ratio"] for row in read_rows(tmp_path / "private" / f"after_{name}.jsonl")]
        for name in ("forget", "retain_only")
    )
    assert len(ours) == len(theirs) == 8
    expected = ks_2samp(ours, theirs)
    assert (metrics["forget_quality"], metrics["forget_quality_statistic"]) == (
        pytest.approx(expected.pvalue),
        pytest.approx(expected.statistic),
    )
    # Alone, and on nothing but the forget set
    assert sorted(path.name for path in (tmp_path / "private").iterdir()) == [
        ".gitignore",
        "after_forget.jsonl",
        "after_retain_only.jsonl",
        "cache",
    ]


def test_missing_columns_are_said_and_the_rest_is_measured(cli, known_model, files, tmp_path):
    # The retain-only model is not even loaded: this one has a tokenizer and no weights
    AutoTokenizer.from_pretrained(known_model).save_pretrained(tmp_path / "retain_only")
    code, out, err = cli(
        "evaluate", known_model, "--forget", files["plain"], "--retain_only_model", tmp_path / "retain_only", "--json",
        *LENGTHS,
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert result["metrics"]["after"]["forget"]["probability"] > 0.99
    assert not {"truth_ratio", "forget_quality"} & set(result["metrics"]["after"]["forget"])
    assert "`perturbed_answer`" in result["skipped"]["forget"]["truth_ratio"]
    assert "retain-only model was not run" in result["skipped"]["forget"]["forget_quality"]
    assert "Evaluating the retain-only model" not in err
    out = " ".join(cli("evaluate", known_model, "--forget", files["plain"], *LENGTHS)[1].split())
    assert "Truth ratio of the forget set: skipped. The truth ratio needs wrong answers" in out


def test_empty_answers_are_counted_and_left_out(cli, known_model, files, tmp_path):
    rows = read_rows(files["forget"])[:4]
    holes = [rows[0], {**rows[1], "answer": ""}, rows[2], {**rows[3], "answer": "  "}]
    results = []
    for some in ([rows[0], rows[2]], holes):
        path = write_rows(tmp_path / "rows.json", some)
        code, out, err = cli("evaluate", known_model, "--forget", path, "--json", *LENGTHS)
        assert code == 0, err
        results.append(json.loads(out))
    assert [result["empty_answers"] for result in results] == [{}, {"forget": 2}]
    for metric in ("probability", "rougeL_recall", "truth_ratio"):
        full, with_holes = (result["metrics"]["after"]["forget"][metric] for result in results)
        assert math.isfinite(full) and with_holes == pytest.approx(full, abs=1e-6)
    out = cli("evaluate", known_model, "--forget", path, "--no_generate", *LENGTHS)[1]
    assert "2 of 4 rows of the forget set have no answer: left out." in out


def test_rows_batches_and_switches(cli, known_model, files):
    """A switch before MODEL does not take it for its value; the batch size changes nothing."""
    results = []
    for batch_size in ("1", "3"):
        code, out, err = cli(
            "evaluate", "--json", known_model, "--forget", files["forget"], "--max-rows", "5", "--generate", "false",
            "--batch_size", batch_size, *LENGTHS,
        )  # fmt: skip
        assert code == 0, err
        results.append(json.loads(out)["metrics"]["after"]["forget"])
    assert results[0]["rows"] == 5
    assert results[0] == pytest.approx(results[1], abs=1e-5)
    assert "rougeL_recall" not in results[0]


def test_two_processes(cli, known_model, tiny_model_path, files, tofu_rows, tmp_path):
    """Fluency of answers that each process generated for its own rows, membership, and refusals too."""
    holdout = write_rows(tmp_path / "holdout.json", tofu_rows("retain90")[200:205])
    arguments = [
        known_model, "--forget", files["forget"], "--retain", files["retain"], "--retain_only_model", known_model,
        "--use_cpu", "--json", "--batch_size", "2", *LENGTHS, "--forget_tokens", "Hsiao", "Taipei", "--insertion",
        "question", "--holdout", holdout, "--judge_model", tiny_model_path, "--harmless", files["plain"],
    ]  # fmt: skip
    code, out, err = cli("evaluate", *arguments)
    assert code == 0, err
    config = str(ROOT / "examples" / "accelerate_configs" / "cpu_2.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    result = subprocess.run(
        [*launch, "-m", "hf_unlearn.cli.evaluate", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = json.loads(out), json.loads(result.stdout)  # printed once
    assert {"generation_perplexity", "privleak"} <= set(one["metrics"]["after"]["forget"])
    assert "refusal_rate" in one["metrics"]["after"]["harmless"]
    for name, metrics in one["metrics"]["after"].items():
        assert two["metrics"]["after"][name] == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    assert {key: one[key] for key in one if key != "metrics"} == {key: two[key] for key in two if key != "metrics"}


# ---- Forget-tokens in retain queries ----


def test_forget_tokens_in_retain_queries(cli, unlearned, known_model, files, tmp_path):
    """The numbers of the engine, in the report, its card, the table and the JSON; the tokens' text is nowhere."""
    words = ["Hsiao Yun-Hwa", "Taipei"]
    path = unlearned / "unlearning_report.json"
    arguments = [
        unlearned, "--forget", files["forget"], "--retain", files["retain"], "--insertion", "question", "--output",
        path, "--no_generate", "--use_cpu", *LENGTHS, "--forget_tokens", *words,
    ]  # fmt: skip
    code, out, err = cli("evaluate", *arguments, "--json")
    assert code == 0, err
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(known_model), str(unlearned))
    expected = evaluate_insertion(
        model,
        AutoTokenizer.from_pretrained(known_model),
        Dataset.from_list(read_rows(files["retain"])),
        UnlearnConfig("unused", use_cpu=True, max_length=256),
        forget_tokens=words,
        insertion="question",
    )
    numbers, _ = expected.metrics()
    assert "insertion_question_token_2_text_accuracy_reduction" in numbers
    measured = json.loads(out)["metrics"]["after"]["retain"]
    assert {name: measured[name] for name in numbers} == pytest.approx(numbers, abs=1e-6)
    report = UnlearningReport.load(path)
    assert {name: report.metrics.after["retain"][name] for name in numbers} == pytest.approx(numbers, abs=1e-6)
    assert report.metrics.after["retain"]["probability"] == pytest.approx(measured["probability"])
    rows = read_rows(unlearned / "private" / "after_retain_insertion.jsonl")
    assert [(row["token"], row["row"]) for row in rows] == [(token, row) for token in (1, 2) for row in range(6)]

    code, shown, other_err = cli("evaluate", *arguments)
    assert code == 0, other_err
    cells = table(shown)
    assert cells["A forget-token before the question"] == ["Rows", "Clean", "Perturbed", "Difference", "Reduction"]
    scores = expected.tokens[1].scores["text_accuracy"]
    assert cells["Token 2: text accuracy"][:3] == ["6", f"{scores.clean:.3f}", f"{scores.perturbed:.3f}"]
    assert cells["Token 2: text accuracy"][4] == f"{scores.reduction:.1%}"
    assert max(len(line) for line in shown.split("Saved in")[0].splitlines()) <= 100
    card = (unlearned / "README.md").read_text()
    assert "| Text accuracy, clean (token 2: a forget-token before the question) |" in card
    assert "| Rows (token 2: a forget-token before the question) | – | – | – | 6 |" in card
    assert "**Token 1, ...:**" in card and "insertion_question" not in card
    written = [item.read_text() for item in (unlearned / "private").iterdir() if "insertion" in item.name]
    for text in (out, err, shown, other_err, card, path.read_text(), *written):
        assert not any(word in text for word in words)


def test_multiple_choice_in_the_columns_of_mmlu(cli, known_model, files, tofu_rows, tmp_path):
    """Read as TOFU's world facts by the other metrics; listed under letters for the insertion."""
    rows = tofu_rows("world_facts")[:5]
    choices = [[row[f"option{number}"] for number in range(1, 5)] for row in rows]
    mmlu = [
        {"question": row["question"], "subject": "facts", "choices": some, "answer": some.index(row["answer"])}
        for row, some in zip(rows, choices, strict=True)
    ]
    mmlu[0]["choices"] = [*mmlu[0]["choices"][:2], "Taipei", "Madrid"]
    path = write_rows(tmp_path / "mmlu.json", mmlu)
    options = ("--no_generate", "--use_cpu", *LENGTHS, "--json")
    code, out, err = cli(
        "evaluate", known_model, "--forget", path, "--retain", path, *options, "--forget_tokens", "Taipei"
    )
    assert code == 0, err
    metrics = json.loads(out)["metrics"]["after"]
    retain = metrics["retain"]
    assert retain["insertion_choice_token_1_rows"] == 4 and retain["insertion_choice_token_1_rows_skipped"] == 1
    assert 0 <= retain["insertion_choice_token_1_letter_accuracy_perturbed"] <= 1
    rows[0]["option3"] = "Taipei"
    path = write_rows(tmp_path / "facts.json", rows)
    code, out, err = cli("evaluate", known_model, "--forget", path, *options)
    assert code == 0, err
    assert metrics["forget"] == pytest.approx(json.loads(out)["metrics"]["after"]["forget"], abs=1e-6)
    code, out, _ = cli(
        "evaluate", known_model, "--forget", path, "--retain", path, *options[:-1], "--forget_tokens", "Taipei"
    )
    assert code == 0
    out = " ".join(out.split())
    assert "Token 1: rows skipped. 1 hold the forget-token already." in out
    assert "The replaced choice stands in no query here" in out


# ---- What is written ----


@pytest.fixture
def unlearned(cli, known_model, files, tmp_path) -> Path:
    """The folder of `hf-unlearn train`: an adapter, its report and its card."""
    code, _, err = cli(
        "train", "--model_name_or_path", known_model, "--forget", files["forget"], "--retain", files["retain"],
        "--output_dir", tmp_path / "out", "--use_peft", "--lora_target_modules", "all-linear", "--use_cpu", "true",
        "--learning_rate", "5e-3", "--max_steps", "16", "--per_device_train_batch_size", "4", "--max_length", "256",
        "--save_strategy", "no",
    )  # fmt: skip
    assert code == 0, err
    return tmp_path / "out"


def test_fills_in_the_report_of_a_run_and_its_card(cli, unlearned, files):
    path = unlearned / "unlearning_report.json"
    trained = UnlearningReport.load(path)
    card = (unlearned / "README.md").read_text()
    code, out, err = cli(
        "evaluate", unlearned, "--forget", files["forget"], "--retain", files["retain"], "--output", path, *LENGTHS
    )
    assert code == 0, err
    report = UnlearningReport.load(path)
    # The adapter was loaded, and measured as the trainer measures it
    for name in ("forget", "retain"):
        measured = report.metrics.after[name]["probability"]
        assert measured == pytest.approx(trained.metrics.after[name]["probability"], abs=1e-4)
    assert trained.metrics.before["forget"]["probability"] - report.metrics.after["forget"]["probability"] > 0.1
    # Nothing else changed
    report.metrics.after = trained.metrics.after
    assert report == trained
    new_card = (unlearned / "README.md").read_text()
    assert new_card != card
    assert "| Truth ratio | – |" in new_card and "| Model utility |" in new_card
    assert "The model card beside the report was rendered anew." in err
    assert f"Saved in {path}" in out
    # Only what was measured again is replaced
    code, _, err = cli("evaluate", unlearned, "--forget", files["plain"], "--output", path, "--no_generate", *LENGTHS)
    assert code == 0, err
    again = UnlearningReport.load(path).metrics
    assert again.after["forget"]["rows"] == 5 and "truth_ratio" not in again.after["forget"]
    assert again.after["retain"]["rows"] == 6 and "model_utility" in again.after["retain"]
    assert again.before == trained.metrics.before


def test_starts_from_the_report_beside_the_model(cli, unlearned, files, tmp_path):
    elsewhere = tmp_path / "new" / "report.json"
    code, _, err = cli(
        "evaluate", unlearned, "--forget", files["plain"], "--output", elsewhere, "--model_stage", "before",
        "--no_generate", *LENGTHS,
    )  # fmt: skip
    assert code == 0, err
    source, report = UnlearningReport.load(unlearned / "unlearning_report.json"), UnlearningReport.load(elsewhere)
    assert (report.method, report.metrics.after) == (source.method, source.metrics.after)
    assert report.metrics.before["forget"]["rows"] == 5
    assert (tmp_path / "new" / "private" / "before_forget.jsonl").is_file()
    assert not (tmp_path / "new" / "README.md").exists()


def test_a_new_report_names_no_method(cli, known_model, files, tmp_path):
    path = tmp_path / "results" / "unlearning_report.json"
    path.parent.mkdir()
    (path.parent / "README.md").write_text("My own notes.")
    code, _, err = cli(
        "evaluate", known_model, "--forget", files["forget"], "--output", path, "--no_generate", *LENGTHS
    )
    assert code == 0, err
    report = UnlearningReport.load(path)
    assert report.method is None and report.base.model_id is None and report.files == []
    assert (report.base.architecture, report.base.parameters) == ("LlamaForCausalLM", 260_032)
    assert (report.data.forget.rows, report.data.retain) == (8, None)
    tokenizer = AutoTokenizer.from_pretrained(known_model)
    texts = [f"{row['question']} {row['answer']}" for row in read_rows(files["forget"])]
    assert report.data.forget.tokens == sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)  # and EOS
    assert set(report.metrics.after) == {"forget"} and report.metrics.before == {}
    assert (path.parent / "README.md").read_text() == "My own notes."
    # No row, no name of a file
    for word in ("Hsiao", "forget.json", str(tmp_path)):
        assert word not in path.read_text()


def test_values_per_row_are_private(cli, known_model, unlearned, files):
    folder = unlearned / "private"
    folder.mkdir(mode=0o755)
    (folder / "after_forget.jsonl").write_text("of an earlier time")
    (folder / "after_forget.jsonl").chmod(0o644)
    mask = os.umask(0)
    try:
        code, out, err = cli(
            "evaluate",
            unlearned,
            "--forget",
            files["forget"],
            "--output",
            unlearned / "unlearning_report.json",
            *LENGTHS,
        )
    finally:
        os.umask(mask)
    assert code == 0, err
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / ".gitignore").read_text() == "*\n"
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    rows = read_rows(folder / "after_forget.jsonl")
    assert [row["row"] for row in rows] == list(range(8))
    metrics = UnlearningReport.load(unlearned / "unlearning_report.json").metrics.after["forget"]
    assert sum(row["probability"] for row in rows) / 8 == pytest.approx(metrics["probability"])
    assert all(row["generation"] for row in rows)
    # What was generated is nowhere else
    for text in (out, err, (unlearned / "unlearning_report.json").read_text(), (unlearned / "README.md").read_text()):
        assert not any(row["generation"] in text for row in rows if len(row["generation"]) > 8)
    # Nor does a report that is made again list it
    report = UnlearningReport.load(unlearned / "unlearning_report.json")
    save_report(report, str(unlearned))
    assert report.files and not any("private" in entry.path for entry in report.files)


def test_writes_nothing_without_output(cli, known_model, files, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, _, err = cli("evaluate", known_model, "--forget", files["plain"], "--no_generate", *LENGTHS)
    assert code == 0, err
    assert list((tmp_path / "here").iterdir()) == []


# ---- Bad input: one sentence that names the fix, exit code 2 ----


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "MODEL is required"),
        (["MODEL"], "--forget_dataset is required"),
        (["/no/such/model", "--forget", "FORGET"], "The model '/no/such/model' cannot be loaded"),
        (["no-such/model", "--forget", "FORGET"], "The model 'no-such/model' cannot be loaded"),
        (["MODEL", "--forget", "/no/such.json"], "The forget data set '/no/such.json' does not exist"),
        (["MODEL", "--forget", "FORGET", "--retain", "HEADER"], "is empty: it needs at least one row"),
        (["MODEL", "--forget", "FORGET", "--world_facts", "NOTHING"], "is empty: it needs at least one row"),
        (["MODEL", "--forget", "FOLDER"], "is empty: it needs at least one row"),
        (["MODEL", "--forget", "NO_ANSWER"], "has a column `question` but no `answer`"),
        (["MODEL", "--forget", "FORGET", "--retain_only_model", "OTHER"], "has another tokenizer than MODEL"),
        (
            ["MODEL", "--forget", "FORGET", "--retain_only_model", "/no"],
            "The retain-only model '/no' cannot be loaded",
        ),
        (["MODEL", "--forget", "FORGET", "--batch_sise", "2"], "Unknown argument `--batch_sise`. Near matches: batch"),
        (["MODEL", "OTHER", "--forget", "FORGET"], "Unknown argument `"),
        (["MODEL", "--forget", "FORGET", "--max_rows", "0"], "--max_rows 0 measures nothing: use at least 1"),
        (["MODEL", "--forget", "FORGET", "--max_length", "1"], "max_length=1 leaves nothing to predict"),
        (["MODEL", "--forget", "FORGET", "--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["MODEL", "--forget", "FORGET", "--output", "FOLDER"], "is a folder: name a file, such as"),
        (["MODEL", "--forget", "FORGET", "--output", "FORGET"], "not a JSON file. Move it away, or name another"),
        (["MODEL", "--forget", "FORGET", "--forget_tokens", "Hsiao"], "are inserted in retain queries: add --retain"),
        (
            ["MODEL", "--forget", "FORGET", "--retain", "PLAIN", "--forget_tokens", "Hsiao"],
            "or use the insertion 'question'",
        ),
        (
            ["MODEL", "--forget", "FORGET", "--retain", "FORGET", "--forget_tokens", "Hsiao", " "],
            "Forget-token 2 is empty",
        ),
        (["MODEL", "--forget", "FORGET", "--retain", "NO_CHOICE"], "`answer` is not an index of its 2 `choices`"),
        (["MODEL", "--forget", "FORGET", "--insertion", "prefix"], "argument --insertion: invalid choice: 'prefix'"),
        (["MODEL", "--forget", "locuslab/TOFU"], "has several forget sets: add --forget_config forget01"),
    ],
)
def test_usage_errors(cli, known_model, small_model_path, files, tmp_path, arguments, expected):
    Dataset.from_dict({"question": [], "answer": []}).save_to_disk(tmp_path / "folder")
    (tmp_path / "header.csv").write_text("question,answer\n")
    (tmp_path / "nothing.json").write_text("")
    names = {
        "MODEL": known_model,
        "OTHER": small_model_path,
        "FORGET": files["forget"],
        "HEADER": tmp_path / "header.csv",
        "NOTHING": tmp_path / "nothing.json",
        "NO_ANSWER": write_rows(tmp_path / "no_answer.json", [{"question": "Who?"}]),
        "NO_CHOICE": write_rows(
            tmp_path / "no_choice.json", [{"question": "Who?", "choices": ["Lily", "Tom"], "answer": 4}]
        ),
        "PLAIN": files["plain"],
        "FOLDER": tmp_path / "folder",
    }
    code, out, err = cli("evaluate", *(names.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "")
    assert expected in sentence(err)


def test_the_report_of_another_model_is_left_alone(cli, known_model, unlearned, files):
    path = unlearned / "unlearning_report.json"
    report = UnlearningReport.load(path)
    report.base.architecture = "GPTNeoXForCausalLM"
    report.save(path)
    before = path.read_bytes()
    code, _, err = cli("evaluate", known_model, "--forget", files["plain"], "--output", path)
    assert code == 2
    assert sentence(err).startswith(
        "unlearning_report.json is the report of a GPTNeoXForCausalLM, but MODEL is a Llama"
    )
    assert path.read_bytes() == before


def test_adapters_without_safe_weights_or_base_are_refused(cli, unlearned, files, tmp_path):
    shutil.copytree(unlearned, tmp_path / "pickled")
    weights = load_file(tmp_path / "pickled" / "adapter_model.safetensors")
    (tmp_path / "pickled" / "adapter_model.safetensors").unlink()
    torch.save(weights, tmp_path / "pickled" / "adapter_model.bin")
    code, _, err = cli("evaluate", tmp_path / "pickled", "--forget", files["plain"])
    assert code == 2 and "has no adapter_model.safetensors: save it again" in sentence(err)

    config = json.loads((unlearned / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/no/such/base"
    (unlearned / "adapter_config.json").write_text(json.dumps(config))
    code, _, err = cli("evaluate", unlearned, "--forget", files["plain"])
    assert code == 2 and "is an adapter, and its base model is missing. The model '/no/such/base'" in sentence(err)


def test_failures_exit_with_1(cli, known_model, files, tmp_path):
    """Weights that are damaged are no mistake of the command line."""
    shutil.copytree(known_model, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"no safetensors")
    code, out, err = cli("evaluate", tmp_path / "damaged", "--forget", files["plain"])
    assert (code, out) == (1, "")
    assert sentence(err)
    model = AutoModelForCausalLM.from_pretrained(known_model)
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    model.save_pretrained(tmp_path / "damaged")
    code, out, err = cli("evaluate", tmp_path / "damaged", "--forget", files["plain"])
    assert (code, out) == (1, "")
    assert "logits are not finite" in err


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("forget", "forget10", "forget10_perturbed"),
        ("forget", "forget01", "forget01_perturbed"),
        ("forget", "forget05_perturbed", "forget05_perturbed"),
        ("forget", "retain90", "retain_perturbed"),
        ("retain", "retain99", "retain_perturbed"),
        ("retain", None, "retain_perturbed"),
        ("retain", "full", "full"),
        ("world_facts", None, "world_facts_perturbed"),
        ("real_authors", "real_authors", "real_authors_perturbed"),
    ],
)
def test_configurations_of_tofu(name, config, expected):
    assert _tofu_config(name, config) == expected


def test_tofu_has_no_forget_set_by_default():
    with pytest.raises(UsageError, match="forget01, forget05 or forget10"):
        _tofu_config("forget", None)
