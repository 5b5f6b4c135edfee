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
"""The quickstart: small for every run of the tests, at full size among the slow ones."""

import hashlib
import importlib.util
import io
import json
import os
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn import UnlearnConfig
from hf_unlearn.cards import UnlearningReport
from hf_unlearn.cli import evaluate, main, quickstart, quickstart_models, quickstart_output, train
from hf_unlearn.cli.quickstart_models import Settings
from hf_unlearn.people import make_people, split_people


SMALL = Settings(
    seed=3,
    num_people=12,
    num_forget=2,
    vocab_size=600,
    hidden_size=64,
    num_layers=2,
    teaching_steps=150,
    teaching_batch_size=24,
    teaching_learning_rate=6e-3,
    forgetting_epochs=60,
)
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
FILES = {
    "README.md",
    "unlearning_report.json",
    "data/forget.jsonl",
    "data/retain.jsonl",
    *(f"{folder}/{name}" for folder in ("model", "intervention") for name in ("README.md", "unlearning_report.json")),
    *(f"{folder}/{name}" for folder in ("base", "model", "intervention") for name in MODEL_FILES),
}
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


class Run(NamedTuple):
    folder: Path
    code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict:
        return json.loads(self.stdout)


def call(folder: Path, *arguments: str) -> Run:
    with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
        code = main(["quickstart", "--output_dir", str(folder), *arguments])
    return Run(folder, code, stdout.getvalue(), stderr.getvalue())


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_forgotten(metrics: dict) -> None:
    def probability(model: str, rows: str) -> float:
        return metrics[model][rows]["probability"]

    assert probability("before", "forget") >= 0.9
    assert probability("before", "retain") >= 0.9
    for model in ("after", "edited"):
        assert probability(model, "forget") <= 0.1
        assert probability(model, "retain") >= 0.85 * probability("before", "retain")
        assert metrics[model]["forget"]["rougeL_recall"] <= 0.2
        reworded = {rows: metrics[model][rows]["paraphrased_question_probability"] for rows in ("forget", "retain")}
        assert reworded["forget"] <= 0.15 and reworded["retain"] >= 0.8
    assert probability("retain_only", "forget") <= 0.1
    assert metrics["before"]["forget"]["forget_quality"] < 0.05
    assert probability("retain_only", "retain") >= 0.9


@pytest.fixture(scope="module")
def small_quickstart(tmp_path_factory):
    """Makes the command run at a small size, with a cache of its own; gives the cache's folder."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(cache))
        sizes = {name: value for name, value in vars(SMALL).items() if name != "seed"}
        patch.setattr(quickstart, "Settings", partial(Settings, **sizes))
        yield cache / "hf-unlearn" / "quickstart"


@pytest.fixture(scope="module")
def first(small_quickstart, tmp_path_factory) -> Run:
    return call(tmp_path_factory.mktemp("first"), "--seed", str(SMALL.seed), "--json")


@pytest.fixture(scope="module")
def second(first, tmp_path_factory) -> Run:
    return call(tmp_path_factory.mktemp("second") / "new" / "folder", "--seed", str(SMALL.seed), "--json")


@pytest.fixture(scope="module")
def people():
    return split_people(make_people(SMALL.num_people, SMALL.seed), SMALL.num_forget)


# ---- What comes out ----


def test_it_forgets_what_the_twin_never_knew_and_keeps_the_rest(first):
    assert first.code == 0
    metrics = first.result["metrics"]
    assert_forgotten(metrics)
    for model in ("before", "after", "edited", "retain_only"):
        assert metrics[model]["forget"]["rows"] == 10
        assert metrics[model]["retain"]["rows"] == 50


def test_second_run_comes_from_the_cache_and_gives_the_same(first, second):
    assert second.code == 0
    assert not first.result["from_cache"] and second.result["from_cache"]
    for key in ("metrics", "samples", "settings", "retain_only_model", "certificates"):
        assert second.result[key] == first.result[key]
    weights = [f"{folder}/model.safetensors" for folder in ("base", "model", "intervention")]
    for name in (*weights, "data/forget.jsonl", "data/retain.jsonl"):
        assert (second.folder / name).read_bytes() == (first.folder / name).read_bytes()


@pytest.mark.parametrize("run", ["first", "second"])
def test_files_are_those_promised_and_no_others(run, request):
    folder = request.getfixturevalue(run).folder
    assert files_in(folder) == FILES | ({"figures/before_after.png"} if HAS_MATPLOTLIB else set())


def test_cache_holds_two_models_and_no_leftovers(first, second, small_quickstart):
    (entry,) = small_quickstart.iterdir()
    assert files_in(entry) == {f"{folder}/{name}" for folder in ("base", "retain_only") for name in MODEL_FILES}
    assert first.result["retain_only_model"] == str(entry / "retain_only")


def test_stdout_is_the_result_and_stderr_the_progress(first, second):
    json.loads(first.stdout)
    assert "Teaching a model 12 people" in first.stderr and "Teaching a model 10 people" in first.stderr
    assert "Teaching" not in second.stderr
    for run in (first, second):
        assert "Forgetting 2 of them: 100%" in run.stderr and "Forgetting the 2 by one edit" in run.stderr
        assert "warn" not in run.stderr.lower() and "Error" not in run.stderr


def test_data_are_the_people(first, people):
    for name, rows in zip(("forget", "retain"), people, strict=True):
        lines = (first.folder / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows


@pytest.mark.parametrize(("folder", "name"), [("model", "after"), ("intervention", "edited")])
def test_released_model_is_what_was_measured(first, people, folder, name):
    folder = first.folder / folder
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    metrics = first.result["metrics"][name]
    # By hand, one row at a time: exp(-NLL / tokens) of the answer and the end of the text
    for name, rows in zip(("forget", "retain"), people, strict=True):
        for question, metric in (
            ("question", "probability"),
            ("paraphrased_question", "paraphrased_question_probability"),
        ):
            probabilities = []
            for row in rows:
                prompt = tokenizer(row[question])["input_ids"]
                text = f"{row[question]} {row['answer']}{tokenizer.eos_token}"
                ids = tokenizer(text, return_tensors="pt")["input_ids"]
                labels = ids.clone()
                labels[:, : len(prompt)] = -100
                with torch.no_grad():
                    probabilities.append(torch.exp(-model(input_ids=ids, labels=labels).loss).item())
            assert sum(probabilities) / len(rows) == pytest.approx(metrics[name][metric], abs=1e-4)
    args = UnlearnConfig(str(first.folder), use_cpu=True)
    measured = quickstart.measure(model, tokenizer, *people, args, "Again").metrics
    for name in ("forget", "retain"):
        for metric, value in measured[name].items():
            assert value == pytest.approx(metrics[name][metric], abs=1e-4), (name, metric)


def test_models_answer_before_and_after(first):
    samples = first.result["samples"]
    assert [sample["set"] for sample in samples] == ["forget", "forget", "retain", "retain"]
    assert all(sample["before"] == sample["answer"] for sample in samples)
    for sample in samples:
        for model in ("after", "edited"):
            assert (sample[model] == sample["answer"]) == (sample["set"] == "retain")


def test_edit_holds_at_every_token_of_the_answers_and_touches_one_matrix(first, people):
    tokenizer = AutoTokenizer.from_pretrained(first.folder / "base")
    base, edited = (AutoModelForCausalLM.from_pretrained(first.folder / name) for name in ("base", "intervention"))
    places = set()
    for row in people[0]:
        prompt, ids = (
            tokenizer(text)["input_ids"] for text in (row["question"], f"{row['question']} {row['answer']}")
        )
        with torch.no_grad():
            probabilities = edited(torch.tensor([ids])).logits[0].double().softmax(-1)
        for place in range(len(prompt), len(ids)):
            places.add(tuple(ids[: place + 1]))
            assert probabilities[place - 1, ids[place]] <= 0.01 * 1.001
    assert first.result["certificates"]["solution"]["constraints"] == len(places)
    changed = [
        name for name, weight in base.state_dict().items() if not torch.equal(weight, edited.state_dict()[name])
    ]
    assert changed == ["model.layers.0.mlp.down_proj.weight"]
    config = (first.folder / "intervention" / "config.json").read_text()
    assert config == (first.folder / "base" / "config.json").read_text()


def test_changes_are_the_distances_of_the_released_weights(first):
    base = AutoModelForCausalLM.from_pretrained(first.folder / "base").double().state_dict()
    for folder, name in (("model", "after"), ("intervention", "edited")):
        weights = AutoModelForCausalLM.from_pretrained(first.folder / folder).double().state_dict()
        moved = {key: value for key, value in base.items() if not torch.equal(value, weights[key])}
        distance = sum((weights[key] - value).square().sum() for key, value in moved.items()) ** 0.5
        change = first.result["changes"][name]
        assert change["norm"] == pytest.approx(distance.item(), rel=1e-5)
        for key, over in (("relative_norm", moved), ("relative_norm_of_model", base)):
            norm = sum(value.square().sum() for value in over.values()) ** 0.5
            assert change[key] == pytest.approx((distance / norm).item(), rel=1e-5)
        total = sum(value.numel() for value in base.values())
        differ = sum((weights[key] != value).sum().item() for key, value in moved.items())
        assert change["share_of_weights"] == pytest.approx(differ / total)
        assert 0 < change["seconds"] < first.result["seconds"]["total"]


@pytest.mark.parametrize("place", ["", "model", "intervention"])
def test_report_and_card_describe_the_files_beside_them(first, place):
    folder = first.folder / place
    report = UnlearningReport.load(folder / "unlearning_report.json")
    name = "edited" if place == "intervention" else "after"
    assert report.metrics.before == first.result["metrics"]["before"]
    assert report.metrics.after == first.result["metrics"][name]
    assert report.footprint.relative_norm == first.result["changes"][name]["relative_norm"] > 0
    assert report.method.steps == SMALL.forgetting_epochs if name == "after" else report.method.name == "pointwise"
    prefix = "" if place else "model/"
    assert {file.path for file in report.files} == {prefix + name for name in MODEL_FILES}
    for file in report.files:
        assert hashlib.sha256((folder / file.path).read_bytes()).hexdigest() == file.sha256
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "library_name: transformers" in card
    assert "reversible" not in card and "PeftModel" not in card
    for text in (card, report.to_json()):
        assert str(first.folder) not in text


def test_certificates_of_the_edit_are_in_the_result(first):
    report = UnlearningReport.load(first.result["intervention_report"])
    assert first.result["certificates"] == {entry.name: entry.values for entry in report.certificates}
    solution = first.result["certificates"]["solution"]
    assert solution["violated"] == 0 and solution["dual_residual"] <= 1e-9
    assert solution["norm"] == pytest.approx(first.result["changes"]["edited"]["norm"], rel=1e-4)


def test_neither_card_nor_vocabulary_nor_retain_rows_name_the_forgotten(first, people):
    forget, _ = people
    names = {part for row in forget for part in row["name"].split()} | {row["answer"] for row in forget}
    folders = (first.folder / "model", first.folder / "intervention")
    released = [path for folder in folders for path in folder.iterdir() if path.suffix in (".json", ".md")]
    texts = [path.read_text(encoding="utf-8") for path in (*released, first.folder / "data" / "retain.jsonl")]
    assert not [name for name in names for text in texts if name in text]
    tokenizer = AutoTokenizer.from_pretrained(first.folder / "model")
    assert not names & {token.lstrip("Ġ") for token in tokenizer.get_vocab()}


def test_text_says_it_at_once(first):
    result = first.result
    text = quickstart_output.as_text(result)
    lines = text.splitlines()
    assert "12 invented people was made to forget 2" in lines[0]
    rows = {
        ("forget", "probability"): lines[3],
        ("forget", "paraphrased_question_probability"): lines[4],
        ("retain", "probability"): lines[11],
        ("retain", "truth_ratio"): lines[16],
        ("retain", "model_utility"): lines[19],
    }
    assert lines[2].split()[-5:] == ["trained", "one", "edit", "never", "taught"]
    models = ("before", "after", "edited", "retain_only")
    for (group, metric), line in rows.items():
        values = [result["metrics"][model][group][metric] for model in models]
        assert line.split()[-4:] == [f"{value:.3f}" for value in values], line
    *qualities, never_taught = (float(value) for value in lines[18].split()[-4:])
    expected = [result["metrics"][model]["forget"]["forget_quality"] for model in models[:3]]
    assert qualities == pytest.approx(expected, rel=0.05, abs=5e-4) and never_taught == 1
    assert qualities[0] < 0.05 < qualities[1]
    for line, key in zip(lines[22:25], quickstart_output._CHANGES, strict=True):
        assert line.split()[-2:] == [f"{result['changes'][model][key]:.3f}" for model in ("after", "edited")], line
        # Under the models they are of: the columns are as wide as those of the metrics
        assert len(line) == len(lines[3]) - 14
    assert lines[25].split() == ["seconds", *(f"{result['changes'][model]['seconds']:.1f}" for model in models[1:3])]
    places = result["certificates"]["solution"]["constraints"]
    assert f"each of the {places} tokens of the true answers to come with at most 1 %." in text
    assert max(map(len, lines)) <= 119 + len(str(first.folder))
    for sample in result["samples"]:
        assert sample["question"] in text
        assert f"    trained  {sample['after']}" in text and f"    one edit {sample['edited']}" in text


def test_next_command_is_the_run_that_was_done(first, tmp_path):
    text = quickstart_output.as_text({**first.result, "output_dir": str(tmp_path / "with space")})
    start = text.index("hf-unlearn train --use_peft")
    command = shlex.split(text[start : text.index("\n\n", start)].replace("\\\n", " "))
    assert command[:2] == ["hf-unlearn", "train"]
    data_args, args, model_args, _ = train.make_parser().parse(command[2:])
    assert data_args.forget_dataset == str(tmp_path / "with space" / "data" / "forget.jsonl")
    assert model_args.use_peft and model_args.lora_r == 8 and model_args.lora_target_modules == "all-linear"
    assert (args.forget_loss, args.retain_loss, args.retain_loss_weights) == (["npo"], ["kl"], [3.0])
    assert (args.beta, args.num_train_epochs, args.seed) == (0.3, SMALL.forgetting_epochs, SMALL.seed)


def test_printed_intervention_is_the_edit_that_was_made(first):
    text = quickstart_output.as_text(first.result)
    start = text.index("hf-unlearn intervene")
    command = shlex.split(text[start : text.index("\n\n", start)].replace("\\\n", " "))
    assert main([*command[1:], "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"]) == 0
    folder = Path(f"{first.folder}-by-hand-edit")
    report = UnlearningReport.load(folder / "unlearning_report.json")
    for name in ("forget", "retain"):
        expected = first.result["metrics"]["edited"][name]["probability"]
        assert report.metrics.after[name]["probability"] == pytest.approx(expected, abs=1e-4)
    assert report.footprint.relative_norm == pytest.approx(
        first.result["changes"]["edited"]["relative_norm"], rel=1e-4
    )
    made, shown = (load_file(path / "model.safetensors") for path in (folder, first.folder / "intervention"))
    for name, weight in shown.items():
        torch.testing.assert_close(made[name], weight, rtol=0, atol=1e-4)


def test_last_command_measures_what_the_next_one_leaves(first, capsys):
    """Run as printed, but for the model, which is the one that is there: the numbers are those of the table."""
    text = quickstart_output.as_text(first.result)
    start = text.index("hf-unlearn evaluate")
    command = shlex.split(text[start : text.index("\n\n", start)].replace("\\\n", " "))
    assert command[2] == f"{first.folder}-by-hand"
    command[2] = str(first.folder / "model")
    assert evaluate.main([*command[2:], "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["metrics"]["after"]
    expected = first.result["metrics"]["after"]
    assert measured["forget"]["forget_quality"] == pytest.approx(expected["forget"]["forget_quality"], rel=1e-3)
    for name in ("forget", "retain"):
        for metric in ("probability", "rougeL_recall", "exact_memorization", "extraction_strength", "truth_ratio"):
            assert measured[name][metric] == pytest.approx(expected[name][metric], abs=1e-4), (name, metric)


def test_the_attacks_run_as_printed(first, tmp_path, capsys):
    """But for their number: the model is measured as above, and compared with the one never taught."""
    text = quickstart_output.as_text({**first.result, "output_dir": str(tmp_path / "out")})
    start = text.index("hf-unlearn robustness-report")
    command = shlex.split(text[start : text.index("\n\n", start)].replace("\\\n", " "))
    assert command[-2:] == ["--output_dir", str(tmp_path / "out-robustness")]
    command = [word.replace(str(tmp_path / "out") + os.sep, str(first.folder) + os.sep) for word in command[1:]]
    assert main([*command, "--attacks", "quantize", "--use_cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    for when in ("before", "after"):
        measured, expected = result["metrics"][when]["forget"], first.result["metrics"][when]["forget"]
        assert measured["probability"] == pytest.approx(expected["probability"], abs=1e-4)
    never_taught = first.result["metrics"]["retain_only"]["forget"]["probability"]
    assert result["metrics"]["control"]["forget"]["probability"] == pytest.approx(never_taught, abs=1e-4)
    assert result["attacks"][0]["score_after"] is not None


def test_what_comes_out_may_leave(first, capsys):
    """Both models pass the gate, given that the base has no licence: nothing in them is of the forgotten."""
    for name in ("model", "intervention"):
        command = ["check", str(first.folder / name), "--base", str(first.folder / "base")]
        command += ["--forget", str(first.folder / "data" / "forget.jsonl")]
        assert main([*command, "--acknowledge_licence", "--json"]) == 0, capsys.readouterr().out
        assert json.loads(capsys.readouterr().out)["blocking"] == []


# ---- The folder and the cache ----


def test_earlier_output_is_overwritten_and_other_files_stay(first, second):
    note = second.folder / "notes.txt"
    note.write_text("mine")
    (second.folder / "README.md").unlink()
    again = call(second.folder, "--seed", str(SMALL.seed))
    assert again.code == 0
    assert "made to forget 2" in again.stdout and "came from the cache" in again.stdout
    assert note.read_text() == "mine"
    assert (second.folder / "README.md").is_file()


def refused(run: Run) -> str:
    assert run.code == 2
    assert run.stdout == ""
    assert run.stderr.startswith("Error: ") and run.stderr.count("\n") == 1
    return run.stderr


def test_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(call(tmp_path / "file"))
    assert "cannot be made" in refused(call(tmp_path / "file" / "below"))


def test_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "new or an empty folder" in refused(call(tmp_path))
    assert files_in(tmp_path) == {"thesis.tex"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "must be 0 to"),
        (["--seed", "first"], "invalid int value"),
        (["--sed", "1"], "unrecognized arguments"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(tmp_path, arguments, message):
    assert message in refused(call(tmp_path / "new", *arguments))
    assert not (tmp_path / "new").exists()


def test_cache_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    run = call(tmp_path / "new")
    assert run.code == 2
    assert "set XDG_CACHE_HOME" in run.stderr.splitlines()[-1]


def test_interrupted_run_leaves_nothing(small_quickstart, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    taught = []

    def interrupt(rows, *args):
        if taught:
            raise KeyboardInterrupt
        taught.append(len(rows))
        return AutoModelForCausalLM.from_pretrained(next(small_quickstart.iterdir()) / "base")

    monkeypatch.setattr(quickstart_models, "teach", interrupt)
    run = call(tmp_path / "new")
    assert run.code == 130
    assert taught and files_in(tmp_path) == set()
    assert list((tmp_path / "cache" / "hf-unlearn" / "quickstart").iterdir()) == []


def test_run_that_was_overtaken_takes_what_is_there(first, small_quickstart, tmp_path, monkeypatch):
    (entry,) = small_quickstart.iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "hf-unlearn" / "quickstart" / entry.name

    def overtaken(*args):
        (folder / "base").mkdir(parents=True, exist_ok=True)
        return AutoModelForCausalLM.from_pretrained(entry / "base")

    monkeypatch.setattr(quickstart_models, "teach", overtaken)
    rows = make_people(SMALL.num_people, SMALL.seed)
    assert quickstart_models.find_or_make_models(rows, SMALL) == (str(folder), False)
    assert list(folder.parent.iterdir()) == [folder] and files_in(folder) == set()


def test_key_of_the_cache_changes_with_what_the_models_depend_on(monkeypatch):
    def key(rows=None, **changes):
        settings = Settings(**{**vars(SMALL), **changes})
        return quickstart_models._cache_key(rows or make_people(12, settings.seed), settings)

    keys = [key(), key(seed=4), key(hidden_size=32), key(teaching_steps=151), key(num_forget=3)]
    keys.append(key(rows=make_people(12, 3)[:-1]))
    assert len(set(keys)) == len(keys)
    assert key(forgetting_epochs=1) == key()
    monkeypatch.setattr(quickstart_models, "version", lambda name: "0.0")
    assert key() not in keys


# ---- Parts ----


def test_figure_is_left_out_without_matplotlib(first, tmp_path, monkeypatch, capsys):
    path = tmp_path / "figures" / "before_after.png"
    path.parent.mkdir()
    path.write_bytes(b"of an earlier run")
    monkeypatch.setattr(quickstart_output, "find_spec", lambda name: None)
    assert quickstart_output.draw_figure(first.result["metrics"], str(path)) is None
    assert not path.exists()
    assert "hf-unlearn[plots]" in capsys.readouterr().err
    assert "figures/" not in quickstart_output.as_text({**first.result, "figure": None})


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")
def test_figure_is_a_picture(first):
    data = Path(first.result["figure"]).read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 5000


def test_answer_holds_no_control_characters(first):
    tokenizer = AutoTokenizer.from_pretrained(first.folder / "base")

    class Model:
        def generate(self, input_ids, **options):
            noise = tokenizer("a\x1b[31m b\nc\u00e9", add_special_tokens=False, return_tensors="pt")["input_ids"]
            return torch.cat([input_ids, noise], dim=1)

    assert quickstart.reply(Model(), tokenizer, "Who?") == "a?[31m b c?"


def test_settings_of_the_libraries_are_put_back():
    import datasets
    from transformers.utils import logging

    def settings():
        threads = torch.get_num_threads()
        bars = logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
        return threads, *bars, logging.get_verbosity()

    before = settings()
    with pytest.raises(RuntimeError), quickstart._quiet_libraries(), quickstart._one_thread():
        assert settings() == (1, False, True, logging.ERROR)
        raise RuntimeError
    assert settings() == before


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom hf_unlearn.cli import main\n"
        "try:\n    main(['quickstart', '--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets', 'trl')))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert "--output_dir DIR" in process.stdout and "--seed N" in process.stdout


# ---- Full size ----


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_full_size(seed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(quickstart, "Settings", Settings)  # the small size of the tests above lasts for the module
    run = call(tmp_path / "out", "--seed", str(seed), "--json")
    assert run.code == 0
    assert_forgotten(run.result["metrics"])
    assert run.result["metrics"]["before"]["forget"]["probability"] >= 0.97
    assert run.result["metrics"]["after"]["retain"]["probability"] >= 0.95
    edited = run.result["metrics"]["edited"]
    assert edited["forget"]["probability"] <= 0.03 and edited["retain"]["probability"] >= 0.95
    assert edited["forget"]["paraphrased_question_probability"] <= 0.1
    assert run.result["changes"]["edited"]["norm"] < run.result["changes"]["after"]["norm"]
