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
"""`hf-unlearn evaluate` beyond answers: presets, fluency, membership, memorisation, refusals, and what is kept."""

import json
import re
import stat
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from test_presets import MUSE, tofu_splits, write
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, LlamaModel

from hf_unlearn import UnlearnConfig, UnlearningReport
from hf_unlearn.cards.card import render_model_card
from hf_unlearn.cards.metric_table import FAMILIES, METRICS, metric_label
from hf_unlearn.cli import main
from hf_unlearn.metrics import (
    evaluate_choices,
    evaluate_fluency,
    evaluate_membership,
    evaluate_memorization,
    evaluate_refusals,
    privleak,
)
from hf_unlearn.presets import load_muse


LENGTHS = ("--max_length", "256", "--max_new_tokens", "24", "--use_cpu")


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    """What `datasets` builds from the folders goes with them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def cli(monkeypatch, capfd):
    """Runs `hf-unlearn evaluate ...` in this process; returns exit code, stdout and stderr."""
    monkeypatch.delenv("HF_DEBUG", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(["evaluate", *map(str, arguments)])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def measured(cli):
    """Runs it with `--json` to its end; returns what is printed, and stderr."""

    def run(model: object, *arguments: object) -> tuple[dict, str]:
        code, out, err = cli(model, *LENGTHS, "--json", *arguments)
        assert code == 0, err
        return json.loads(out), err

    return run


@pytest.fixture
def rows(tofu_rows, data_dir) -> dict[str, list[dict]]:
    """The model knows all of `forget` and `retain`, and none of `holdout`."""
    return {
        "forget": tofu_rows("forget10_perturbed")[:6],
        "plain": tofu_rows("forget10")[:6],
        "retain": tofu_rows("retain90")[:5],
        "holdout": tofu_rows("retain90")[200:207],
        "overlap": [*tofu_rows("retain90")[200:203], tofu_rows("forget10")[2]],
        **{name: json.loads((data_dir / "refusal" / f"{name}_test.json").read_text())[:5] for name in _PROMPTS},
    }


_PROMPTS = ("harmful", "harmless")


@pytest.fixture
def files(rows, tmp_path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.json" for name in rows}
    for name, path in paths.items():
        path.write_text("\n".join(json.dumps(row) for row in rows[name]), encoding="utf-8")
    return paths


@pytest.fixture
def args() -> UnlearnConfig:
    return UnlearnConfig("unused", use_cpu=True, max_length=256)


@pytest.fixture
def known(known_model):
    return AutoModelForCausalLM.from_pretrained(known_model, dtype=torch.float32)


@pytest.fixture
def other(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sentence(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0].removeprefix("Error: ")


def without_rows(values: dict) -> dict:
    return {metric: value for metric, value in values.items() if metric != "rows"}


def assert_holds(values: dict, expected: dict) -> None:
    assert {metric: values.get(metric) for metric in expected} == pytest.approx(expected, abs=1e-6)


def same(result: dict, other: dict) -> bool:
    return json.dumps(result["metrics"]) == json.dumps(other["metrics"]) and result["skipped"] == other["skipped"]


# ---- Each family, against the functions of hf_unlearn.metrics ----


def test_fluency_of_answers_that_are_generated_once(
    measured, monkeypatch, known, other, tokenizer, known_model, tiny_model_path, rows, files, args, tmp_path
):
    sets = {name: Dataset.from_list(rows[name]) for name in ("forget", "retain")}
    expected = evaluate_fluency(known, tokenizer, sets, args, judge=other, max_new_tokens=24)
    asked = []
    generate = LlamaForCausalLM.generate

    def counted(self, input_ids, **kwargs):
        asked.append(input_ids.shape[0])
        return generate(self, input_ids, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", counted)
    result, _ = measured(
        known_model, "--forget", files["forget"], "--retain", files["retain"], "--judge_model", tiny_model_path,
        "--output", tmp_path / "report.json",
    )  # fmt: skip
    assert sum(asked) == 6 + 5
    for name in sets:
        assert_holds(result["metrics"]["after"][name], expected.metrics[name])
        assert "generation_perplexity" in result["metrics"]["after"][name]
        # Values of all families stand in one line per row
        for sample, values in zip(
            read_rows(tmp_path / "private" / f"after_{name}.jsonl"), expected.samples[name], strict=True
        ):
            assert_holds(sample, {key: value for key, value in values.items() if not isinstance(value, str | None)})
            assert sample["generation"] == values["generation"] and sample["probability"] > 0.9


def test_fluency_without_a_judge_or_answers(measured, known_model, files):
    result, _ = measured(known_model, "--forget", files["plain"])
    metrics = result["metrics"]["after"]["forget"]
    assert {"perplexity", "repetition", "first_token_entropy"} <= set(
        metrics
    ) and "generation_perplexity" not in metrics
    assert set(result["skipped"]["forget"]) == {"truth_ratio"}  # nothing that was not asked for
    result, _ = measured(known_model, "--forget", files["plain"], "--generate", "false")
    assert not {"perplexity", "repetition", "first_token_entropy"} & set(result["metrics"]["after"]["forget"])


def test_choices_where_there_are_some(measured, known, tokenizer, known_model, rows, files, args):
    result, _ = measured(known_model, "--forget", files["forget"], "--retain", files["retain"], "--no_generate")
    expected = evaluate_choices(known, tokenizer, {"forget": Dataset.from_list(rows["forget"])}, args)
    assert_holds(result["metrics"]["after"]["forget"], expected.metrics["forget"])
    assert "choice_accuracy" in result["metrics"]["after"]["forget"]
    assert "choice_accuracy" not in {**result["metrics"]["after"]["retain"], **result["skipped"]["retain"]}


def test_choices_of_rows_without_a_question_are_said(measured, known_model, rows, tmp_path):
    path = tmp_path / "texts.json"
    some = [{"text": row["answer"], "perturbed_answer": row["perturbed_answer"]} for row in rows["forget"]]
    path.write_text("\n".join(map(json.dumps, some)))
    result, _ = measured(known_model, "--forget", path)
    assert "choices are answers to a question" in result["skipped"]["forget"]["choice_accuracy"]
    assert result["metrics"]["after"]["forget"]["probability"] > 0


def test_membership(
    measured, known, other, tokenizer, known_model, tiny_model_path, rows, files, args, tmp_path, random_model
):
    members, holdout = (Dataset.from_list(rows[name]) for name in ("forget", "holdout"))
    plain = evaluate_membership(known, tokenizer, members, holdout, args, reference=other)
    retrained = evaluate_membership(other, tokenizer, members, holdout, args, gradient_norm=False)
    result, _ = measured(
        known_model, "--forget", files["forget"], "--holdout", files["holdout"], "--reference_model", tiny_model_path,
        "--retain_only_model", tiny_model_path, "--no_generate", "--output", tmp_path / "report.json",
    )  # fmt: skip
    metrics = result["metrics"]["after"]["forget"]
    expected = {
        metric: value for metric, value in without_rows(plain.metrics["forget"]).items() if "chance" not in metric
    }
    assert len([metric for metric in expected if metric.startswith("membership_auc") and "_ci_" not in metric]) == 6
    assert_holds(metrics, {**expected, "membership_rows": 6, "holdout_rows": 7, "rows": 6})
    # PrivLeak with the model that never saw the forget set
    auc = retrained.metrics["forget"]["membership_auc_min_k"]
    assert auc != 0.5
    for end in ("", "_ci_low", "_ci_high"):
        assert metrics[f"privleak{end}"] == pytest.approx(
            privleak(metrics[f"membership_auc_min_k{end}"], auc), abs=1e-6
        )
    assert not [metric for metric in metrics if "chance" in metric]
    assert list(result["skipped"]["forget"]) == ["rougeL_recall"]
    for name, number in (("forget", 6), ("holdout", 7)):
        samples = read_rows(tmp_path / "private" / f"after_{name}_membership.jsonl")
        assert len(samples) == number and set(samples[0]) == set(plain.samples["forget"][0])


def test_membership_says_what_it_lacks_by_its_flag(measured, known_model, files):
    result, _ = measured(
        known_model, "--forget", files["plain"], "--holdout", files["holdout"], "--gradient_norm", "false",
        "--no_generate",
    )  # fmt: skip
    skipped = result["skipped"]["forget"]
    assert "--gradient_norm false" in skipped["membership_auc_gradient_norm"]
    assert "--reference_model" in skipped["membership_auc_reference"]
    assert "--retain_only_model" in skipped["privleak"]
    metrics = result["metrics"]["after"]["forget"]
    assert metrics["privleak_vs_chance"] == pytest.approx(2 * metrics["membership_auc_min_k"] - 1)
    assert "privleak" not in metrics


def test_a_holdout_without_answers(measured, known_model, tiny_model_path, rows, files, tmp_path):
    path = tmp_path / "empty.json"
    path.write_text("\n".join(json.dumps({**row, "answer": ""}) for row in rows["holdout"]))
    result, _ = measured(
        known_model, "--forget", files["plain"], "--holdout", path, "--retain_only_model", tiny_model_path,
        "--reference_model", tiny_model_path, "--no_generate",
    )  # fmt: skip
    skipped = result["skipped"]["forget"]
    reasons = {skipped[metric] for metric in METRICS if metric.startswith("membership_auc")} | {skipped["privleak"]}
    assert reasons == {"No row of the forget set or none of the holdout has a value: their answers are empty."}


def test_privleak_without_truth_ratios(measured, known_model, tiny_model_path, files):
    result, _ = measured(
        known_model, "--forget", files["plain"], "--holdout", files["holdout"], "--retain_only_model", tiny_model_path,
        "--gradient_norm", "false", "--no_generate",
    )  # fmt: skip
    assert "privleak" in result["metrics"]["after"]["forget"]
    assert result["skipped"]["forget"]["forget_quality"] == (
        "It compares the truth ratios of the forget set, which are missing."
    )


def test_refusals(measured, known, tokenizer, known_model, rows, files, args, tmp_path):
    expected = evaluate_refusals(known, tokenizer, {name: Dataset.from_list(rows[name]) for name in _PROMPTS}, args)
    result, _ = measured(
        known_model, "--forget", files["plain"], "--harmful", files["harmful"], "--harmless", files["harmless"],
        "--output", tmp_path / "report.json", "--max_rows", "5",
    )  # fmt: skip
    for name in _PROMPTS:
        assert result["metrics"]["after"][name] == pytest.approx(expected.metrics[name])
        assert read_rows(tmp_path / "private" / f"after_{name}.jsonl") == expected.samples[name]
    # The sets of earlier measurements stay: model utility is not over these
    result, _ = measured(known_model, "--forget", files["plain"], "--retain", files["retain"], "--no_generate",
                         "--output", tmp_path / "report.json")  # fmt: skip
    after = UnlearningReport.load(tmp_path / "report.json").metrics.after
    assert set(after) == {"forget", "retain", "harmful", "harmless"}
    result, _ = measured(known_model, "--forget", files["plain"], "--harmful", files["harmful"],
                         "--output", tmp_path / "report.json")  # fmt: skip
    assert "harmless" not in result["metrics"]["after"]
    after = UnlearningReport.load(tmp_path / "report.json").metrics.after
    assert set(after) == {"forget", "retain", "harmful", "harmless"} and "model_utility" in after["retain"]


# ---- Presets ----


@pytest.mark.parametrize(("share", "rows"), [(None, 3), ("forget01", 1)])
def test_preset_tofu(measured, known_model, tofu_rows, tmp_path, share, rows):
    source = write(tmp_path / "tofu", tofu_splits(tofu_rows))
    config = () if share is None else ("--forget_config", share)
    result, err = measured(
        known_model,
        "--preset",
        "tofu",
        "--preset_source",
        source,
        *config,
        "--gradient_norm",
        "false",
        "--no_generate",
    )
    metrics = result["metrics"]["after"]
    assert {name: values["rows"] for name, values in metrics.items()} == {
        "forget": rows, "retain": 4, "real_authors": 5, "world_facts": 6,
    }  # fmt: skip
    assert (metrics["forget"]["membership_rows"], metrics["forget"]["holdout_rows"]) == (rows, rows)
    assert {"truth_ratio", "choice_accuracy", "membership_auc_min_k"} <= set(metrics["forget"])
    assert len(result["model_utility_over"]) == 6  # all but ROUGE-L


def test_preset_tofu_in_parts(measured, known_model, tofu_rows, files, tmp_path, caplog):
    splits = tofu_splits(tofu_rows)
    source = write(tmp_path / "tofu", splits)
    result, _ = measured(
        known_model, "--preset", "tofu", "--preset_source", source, "--no_generate", "--holdout", "none",
        "--real_authors", "none", "--world_facts", files["retain"], "--max_rows", "2",
    )  # fmt: skip
    metrics = result["metrics"]["after"]
    assert {name: values["rows"] for name, values in metrics.items()} == {"forget": 2, "retain": 2, "world_facts": 2}
    assert not [metric for metric in metrics["forget"] if "membership" in metric or "privleak" in metric]
    # An older copy has no holdout
    older = write(tmp_path / "older", {key: rows for key, rows in splits.items() if "holdout" not in key[0]})
    result, _ = measured(known_model, "--preset", "tofu", "--preset_source", older, "--no_generate")
    assert "membership_rows" not in result["metrics"]["after"]["forget"]
    assert "has no configuration 'holdout10'" in caplog.text


def test_preset_muse(measured, known, tokenizer, known_model, tiny_model_path, args, tmp_path):
    splits = {
        **MUSE,
        ("knowmem", "retain_qa"): [*MUSE["knowmem", "retain_qa"], {"question": "Who sang?", "answer": "A bird"}],
        ("privleak", "forget"): [{"text": f"Once upon a time there was a {word}."} for word in ("cat", "dog", "cow")],
    }
    source = write(tmp_path / "muse", splits)
    result, _ = measured(
        known_model, "--preset", "muse-news", "--preset_source", source, "--retain_only_model", tiny_model_path,
        "--output", tmp_path / "report.json",
    )  # fmt: skip
    sets = load_muse("news", source)
    expected = evaluate_memorization(
        known,
        tokenizer,
        sets["forget_passages"],
        {name: sets[f"{name}_questions"] for name in ("forget", "retain")},
        {name: sets[f"{name}_demonstrations"] for name in ("forget", "retain")},
        args,
    )
    metrics = result["metrics"]["after"]
    for name in ("forget", "retain"):
        assert_holds(metrics[name], without_rows(expected.metrics[name]))
        samples = read_rows(tmp_path / "private" / f"after_{name}_memorization.jsonl")
        assert samples == expected.samples[name]
    counts = ("rows", "passage_rows", "question_rows", "membership_rows", "holdout_rows")
    assert [metrics["forget"].get(name) for name in counts] == [1, 2, 1, 3, 1]
    assert [metrics["retain"].get(name) for name in counts] == [2, None, 2, None, None]
    assert "verbatim_memorization" in metrics["forget"] and "verbatim_memorization" not in metrics["retain"]
    assert "privleak" in metrics["forget"] and "forget_quality" in result["skipped"]["forget"]


def test_preset_muse_without_answers(measured, known_model, tmp_path):
    source = write(tmp_path / "muse", MUSE)
    result, _ = measured(known_model, "--preset", "muse-books", "--preset_source", source, "--no_generate")
    memorization = ["knowledge_memorization", "verbatim_memorization"]
    for name, metrics in (("forget", memorization), ("retain", memorization[:1])):
        assert sorted(metric for metric in result["skipped"][name] if metric in memorization) == metrics
        assert not set(memorization) & set(result["metrics"]["after"][name])


# ---- What is kept of second models ----


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """One entry per forward of any model."""
    calls = []
    forward = LlamaModel.forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    return calls


def test_second_models_run_once(measured, forwards, known_model, tiny_model_path, files, tmp_path):
    arguments = (
        "--forget", files["forget"], "--holdout", files["holdout"], "--no_generate", "--gradient_norm", "false",
    )  # fmt: skip
    second = ("--retain_only_model", known_model, "--reference_model", known_model)

    def run(*more: object) -> tuple[dict, int, str]:
        forwards.clear()
        result, err = measured(tiny_model_path, *arguments, *more)
        return result, len(forwards), err

    _, alone, _ = run()
    first, number, err = run(*second, "--output", tmp_path / "a" / "report.json")
    assert number > alone and "was not run" not in err
    again, number, err = run(*second, "--output", tmp_path / "a" / "report.json")
    assert number == alone and same(first, again)
    assert "The retain-only model was not run (truth ratios: kept from an earlier run)." in err
    assert "The reference model was not run" in err
    assert (tmp_path / "a" / "private" / "after_retain_only.jsonl").is_file()
    # Beside another report there is another cache; the same can be shared
    other, number, _ = run(*second, "--output", tmp_path / "b" / "report.json")
    assert number > alone and same(first, other)
    shared, number, _ = run(*second, "--cache_dir", tmp_path / "a" / "private" / "cache")
    assert number == alone and same(first, shared)
    # Nothing is kept where nothing is written
    folder = tmp_path / "a" / "private" / "cache"
    before = sorted(folder.iterdir())
    _, number, _ = run(*second)
    assert number > alone and sorted(folder.iterdir()) == before
    # Numbers alone, which nobody else can read
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    words = {word for row in read_rows(files["forget"]) for word in row["answer"].split() if len(word) > 5}
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert not any(word in path.read_text() for word in words)
    # What is half written is measured again
    for path in folder.glob("*.json"):
        path.write_text(path.read_text()[:-3])
    halved, number, err = run(*second, "--output", tmp_path / "a" / "report.json")
    assert number > alone and same(first, halved) and "was not run" not in err


def test_whatever_changes_they_run_again(measured, known_model, tiny_model_path, rows, files, tmp_path):
    cache = ("--cache_dir", tmp_path / "cache", "--no_generate", "--gradient_norm", "false")
    usual = {"--forget": files["forget"], "--holdout": files["holdout"], "--retain_only_model": tiny_model_path}

    def skipped(changes: dict, *more: object) -> list[str]:
        """Which measures were found."""
        words = [word for pair in {**usual, **changes}.items() for word in pair]
        err = measured(known_model, *words, *cache, *more)[1]
        return re.findall(r"was not run \((.*): kept", err)

    everything = ["truth ratios", "Min-K AUC"]
    assert skipped({}) == []
    assert skipped({}) == everything
    moved = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    with torch.no_grad():
        moved.model.norm.weight *= 1.0001
    moved.save_pretrained(tmp_path / "moved")
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(tmp_path / "moved")
    assert skipped({"--retain_only_model": tmp_path / "moved"}) == []
    assert skipped({"--holdout": files["retain"]}) == ["truth ratios"]
    assert skipped({"--forget": files["plain"]}) == []
    assert skipped({}, "--max_rows", "5") == []
    assert skipped({}, "--batch_size", "3") == []
    assert skipped({}, "--dtype", "bfloat16") == []
    assert skipped({}, "--max_length", "64") == []
    # Another MODEL, and what concerns it alone, are no reason
    assert skipped({"--reference_model": known_model}, "--model_stage", "before") == everything


# ---- For a person ----


def test_tables(cli, known_model, tiny_model_path, files, tmp_path):
    code, out, err = cli(
        known_model, "--forget", files["plain"], "--retain", files["retain"], "--holdout", files["holdout"],
        "--judge_model", tiny_model_path, "--harmful", files["harmful"], "--harmless", files["harmless"], *LENGTHS,
        "--output", tmp_path / "unlearning_report.json",
    )  # fmt: skip
    assert code == 0, err
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 100
    tables = [re.split(r"\s{2,}", block.splitlines()[0].strip()) for block in out.split("\n\n")]
    assert tables[:4] == [
        ["forget set", "retain set"],
        ["Fluency", "forget set", "retain set"],
        ["Membership", "forget set"],
        ["Refusals", "harmful prompts", "harmless prompts"],
    ]
    text = " ".join(out.split())
    assert "Perplexity to the judge: the perplexity of the model's own answers to another model" in text
    # Whatever is missing is missing for a reason, said once
    assert "Truth ratio of the forget set and the retain set: skipped. The truth ratio needs wrong answers" in text
    assert "AUC against a reference of the forget set: skipped. It needs a model that was trained on neither" in text
    # The card names and explains all of it
    report = UnlearningReport.load(tmp_path / "unlearning_report.json")
    card = render_model_card(report)
    for values in report.metrics.after.values():
        for metric in values:
            if not metric.endswith(("_ci_low", "_ci_high")):
                assert f"| {METRICS[metric].label} |" in card
                assert METRICS[metric].words is None or f"**{METRICS[metric].label}:**" in card
                assert f"`{metric}`" not in card


def test_every_metric_has_a_name_and_words():
    from hf_unlearn.metrics.fluency import FLUENCY_METRICS
    from hf_unlearn.metrics.membership import SCORES
    from hf_unlearn.metrics.memorization import MEMORIZATION_METRICS

    names = [*FLUENCY_METRICS, *MEMORIZATION_METRICS, *(f"membership_auc_{score}" for score in SCORES)]
    names += ["privleak", "privleak_vs_chance", "choice_accuracy", "refusal_rate", "paraphrased_question_probability"]
    for name in names:
        assert METRICS[name].words.endswith(".")
        assert "_" not in metric_label(name)
    labels = [metric.label for metric in METRICS.values()]
    assert len(set(labels)) == len(labels)
    assert {metric.family for metric in METRICS.values()} == set(FAMILIES)


def test_perplexities_of_gibberish_fit_into_a_table():
    from hf_unlearn.cards.metric_table import _metric_cell
    from hf_unlearn.cli.evaluate_output import _cell

    values = {"perplexity": 1e304, "perplexity_ci_low": 12345.6, "perplexity_ci_high": 1e304}
    assert _cell(values, "perplexity") == "1.0e+304 [12,346, 1.0e+304]"
    assert _metric_cell(values, "perplexity") == "1.00e+304 [12,346, 1.00e+304]"


# ---- Bad input ----


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--preset", "tofu", "--forget", "FORGET"], "--preset tofu brings its own sets: leave out --forget_dataset."),
        (
            ["--preset", "muse-news", "--retain", "FORGET", "--holdout", "HOLDOUT"],
            "leave out --retain_dataset and --holdout_dataset.",
        ),
        (["--preset", "muse-news", "--forget_config", "forget10"], "muse-news has one forget set: leave it out."),
        (
            ["--preset", "tofu", "--forget_config", "forget07"],
            "TOFU has no forget set 'forget07': choose from forget01",
        ),
        (["--preset", "wmdp"], "invalid choice: 'wmdp'"),
        (["--preset", "tofu", "--preset_source", "/no/such"], "--preset tofu: '/no/such' (configuration"),
        (["--forget", "FORGET", "--preset_source", "/no/such"], "add --preset tofu"),
        (["--forget", "FORGET", "--holdout", "/no/such.json"], "The holdout data set '/no/such.json' does not exist"),
        (["--forget", "FORGET", "--holdout", "OVERLAP"], "1 of 4 rows of the holdout are rows of the forget set, too"),
        (["--forget", "FORGET", "--holdout", "locuslab/TOFU"], "several holdout sets: add --holdout_config holdout01"),
        (["--forget", "FORGET", "--reference_model", "MODEL"], "add --holdout, rows of the same kind"),
        (["--forget", "FORGET", "--judge_model", "MODEL", "--no_generate"], "leave out --generate false."),
        (["--forget", "FORGET", "--harmful", "HARMFUL", "--no_generate"], "--harmful needs answers"),
        (
            ["--forget", "FORGET", "--harmful", "/no/such.json"],
            "The harmful prompts data set '/no/such.json' does not",
        ),
        (["--forget", "FORGET", "--harmless", "ANSWERS"], "The harmless data set has no column of prompts: name it"),
        (["--forget", "FORGET", "--judge_model", "OTHER"], "The judge model has another tokenizer than MODEL"),
        (
            ["--forget", "FORGET", "--holdout", "HOLDOUT", "--reference_model", "OTHER"],
            "The reference model has another tokenizer than MODEL",
        ),
        (["--forget", "FORGET", "--judge_model", "/no/such"], "The judge model '/no/such' cannot be loaded"),
        (["--forget", "FORGET", "--cache_dir", "FORGET"], "is a file: name a folder."),
    ],
)
def test_usage_errors(cli, known_model, small_model_path, files, tmp_path, arguments, expected):
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps({"answer": "No."}))
    names = {
        "MODEL": known_model,
        "OTHER": small_model_path,
        "FORGET": files["plain"],
        "HOLDOUT": files["holdout"],
        "OVERLAP": files["overlap"],
        "HARMFUL": files["harmful"],
        "ANSWERS": answers,
    }
    code, out, err = cli(known_model, *(names.get(word, word) for word in arguments), *LENGTHS)
    assert (code, out) == (2, "")
    assert expected in sentence(err)


def test_recipe(cli, known_model, files, tmp_path):
    """The short name works there, too."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"forget: {files['plain']}\nholdout: {files['holdout']}\ngradient_norm: false\ngenerate: false\n"
    )
    code, out, err = cli(known_model, "--config", recipe, "--max_length", "256", "--use_cpu", "--json")
    assert code == 0, err
    assert json.loads(out)["metrics"]["after"]["forget"]["holdout_rows"] == 7
