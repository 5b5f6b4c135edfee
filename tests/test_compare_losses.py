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
"""What is compared in benchmarks/compare_losses.py, how the best learning rate is chosen, and what the docs show."""

import json
from pathlib import Path

import compare_losses
import pytest

from hf_unlearn import FORGET_LOSSES, UnlearnConfig


ROOT = Path(__file__).parents[1]


def _run(rate: float, quality: float, utility: float, seed: int = 0, loss: str = "npo") -> dict:
    retain = {"probability": utility, "rougeL_recall": utility, "truth_ratio": utility}
    forget = {
        "probability": 0.1,
        "rougeL_recall": 0.2,
        "exact_memorization": 0.3,
        "extraction_strength": 0.4,
        "truth_ratio": 0.5,
    }
    return {
        "loss": loss,
        "learning_rate": rate,
        "seed": seed,
        "forget_quality": quality,
        "utility": utility,
        "seconds": 2.0,
        "metrics": {"forget": forget, "retain": retain},
    }


def test_every_loss_is_compared_with_settings_that_exist(tmp_path: Path) -> None:
    assert set(compare_losses.RECIPES) == set(FORGET_LOSSES)
    for loss, recipe in compare_losses.RECIPES.items():
        assert len(set(recipe.learning_rates)) == 5
        steps = [b / a for a, b in zip(recipe.learning_rates, recipe.learning_rates[1:], strict=False)]
        assert all(2.9 < step < 3.4 for step in steps), "a logarithmic grid"
        settings = compare_losses.Task(loss, recipe.learning_rates[0], seed=1).settings()
        args = UnlearnConfig(str(tmp_path), use_cpu=True, **settings)
        assert args.forget_loss == [loss] and args.seed == 1
        reads = FORGET_LOSSES[loss].reads
        own = {"hidden_states": "hidden_mse", "layer_states": "circuit_breaker"}
        assert args.retain_loss == [own.get(reads[0], "nll")]


def test_tasks_are_all_combinations_seed_by_seed() -> None:
    tasks = compare_losses.all_tasks(["npo", "rmu"])
    assert len(tasks) == 2 * 5 * 3 and len({task.key for task in tasks}) == len(tasks)
    assert {(task.loss, task.seed) for task in tasks[:10]} == {("npo", 0), ("rmu", 0)}


def test_no_author_is_both_forgotten_and_kept(tofu_rows) -> None:
    rows = compare_losses.split_rows(tofu_rows("forget10_perturbed"), tofu_rows("retain_perturbed"))
    assert (len(rows["forget"]), len(rows["retain"])) == (80, 720)
    # The four authors, by name, in each other's questions
    names = ("Hsiao Yun-Hwa", "Carmen Montenegro", "Elvin Mammadov", "Rajeev Majumdar")
    for index, name in enumerate(names):
        own = rows["forget"][20 * index : 20 * index + 20]
        assert sum(name in row["question"] + row["answer"] for row in own) >= 15
        assert not any(name in row["question"] for row in rows["retain"])
    sets = compare_losses.evaluation_sets(rows)
    assert list(sets["forget"]["question"]) == [row["question"] for row in rows["forget"]]
    sample = list(sets["retain"]["question"])
    assert len(set(sample)) == 80 and set(sample) <= {row["question"] for row in rows["retain"]}
    assert sample == list(compare_losses.evaluation_sets(rows)["retain"]["question"])


def test_best_rate_is_the_one_that_forgets_best_among_those_that_keep_enough() -> None:
    runs = [
        _run(1e-4, quality=0.01, utility=0.50),
        _run(1e-3, quality=0.20, utility=0.50, seed=0),
        _run(1e-3, quality=0.40, utility=0.34, seed=1),  # mean 0.42 >= 0.8 * 0.5, though this seed is below
        _run(1e-2, quality=0.90, utility=0.39),  # forgets best, and keeps too little
    ]
    assert compare_losses.best_rate(runs, utility_before=0.5) == (1e-3, True)
    # Where no rate keeps enough: the one that keeps most, and it says so
    assert compare_losses.best_rate(runs, utility_before=0.7) == (1e-4, False)


def test_a_rate_at_which_a_seed_failed_is_not_chosen() -> None:
    failed = {"loss": "npo", "learning_rate": 1e-2, "seed": 2, "failure": "the loss became infinite or NaN"}
    runs = [_run(rate, quality, 0.5, seed) for rate, quality in ((1e-3, 0.1), (1e-2, 0.9)) for seed in (0, 1, 2)]
    runs[-1] = failed
    assert compare_losses.best_rate(runs, utility_before=0.5) == (1e-3, True)
    assert compare_losses.best_rate([failed], utility_before=0.5) == (None, False)
    summary = compare_losses.summarize([failed], before=_run(0.0, 0.0, 0.5))
    assert "| npo | every rate failed |" in compare_losses.format_tables(summary, {})[0]


def test_scores_against_the_twin() -> None:
    retain = {"probability": 0.5, "truth_ratio": 0.25, "rougeL_recall": 1.0}
    run = {"truth_ratios": [0.1, 0.2], "metrics": {"retain": retain, "forget": {"probability": 1.0}}}
    scored = compare_losses.add_scores(run, {"truth_ratios": [0.3, 0.4]})
    assert scored["ks_distance"] == 1.0  # every ratio lies below the twin's
    assert scored["forget_quality"] == pytest.approx(1 / 3)  # exact test: 2 of the 6 orders are as far apart
    assert scored["utility"] == pytest.approx(3 / (2 + 4 + 1))


def test_summary_has_mean_and_extremes_over_seeds_of_the_chosen_rate_alone() -> None:
    qualities = {1e-4: (0.01, 0.02, 0.03), 1e-3: (0.1, 0.2, 0.6)}
    runs = [_run(rate, q, 0.5, seed) for rate, values in qualities.items() for seed, q in enumerate(values)]
    summary = compare_losses.summarize(runs, before=_run(0.0, 0.0, 0.5))
    quality = summary["npo"]["values"]["forget quality"]
    assert {name: round(value, 9) for name, value in quality.items()} == {"mean": 0.3, "min": 0.1, "max": 0.6}
    assert summary["npo"]["rates"]["0.0001"]["forget_quality"] == [0.01, 0.02, 0.03]
    main, details = compare_losses.format_tables(summary, {"before": _run(0.0, 1e-9, 0.5)})
    assert "0.300 (0.100–0.600)" in main and "| npo | 0.001 |" in main and "1.0e-09" in main
    assert "0.400 (0.400–0.400)" in details


def test_unbounded_table_ignores_utility_and_rates_with_a_failed_seed() -> None:
    runs = [_run(1e-4, 0.2, 0.5, seed) for seed in (0, 1, 2)] + [_run(1e-3, 0.4, 0.01, seed) for seed in (0, 1, 2)]
    runs += [_run(1e-2, 0.9, 0.5, seed) for seed in (0, 1)]
    runs.append({"loss": "npo", "learning_rate": 1e-2, "seed": 2, "failure": "the loss became infinite or NaN"})
    summary = compare_losses.summarize(runs, before=_run(0.0, 0.0, 0.5))
    assert summary["npo"]["learning_rate"] == 1e-4
    assert compare_losses.format_unbounded(summary).splitlines()[2:] == ["| npo | 0.001 | 0.400 | 0.010 |"]


def test_results_survive_an_interruption_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    lines = [json.dumps({"key": key, "result": {"value": key}}) for key in ("a", "b")]
    path.write_text("\n" + lines[0] + "\n" + lines[1][:-5] + "\n" + lines[1].replace("b", "c"), encoding="utf-8")
    assert compare_losses.read_results(path) == {"a": {"value": "a"}, "c": {"value": "c"}}


def test_docs_show_the_stored_results() -> None:
    stored = json.loads((ROOT / "benchmarks" / "results" / "compare_losses_cpu.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    for table in compare_losses.format_tables(stored["summary"], stored["models"]):
        assert table in page
    assert compare_losses.format_unbounded(stored["summary"]) in page
    assert stored["command"] in page and stored["machine"]["cpu"] in page


def test_stored_summary_follows_from_the_stored_runs() -> None:
    stored = json.loads((ROOT / "benchmarks" / "results" / "compare_losses_cpu.json").read_text(encoding="utf-8"))
    tasks = compare_losses.all_tasks(compare_losses.RECIPES)
    assert set(compare_losses.RECIPES) == set(FORGET_LOSSES)
    assert [run["settings"] for run in stored["runs"]] == [task.settings() for task in tasks]
    before = stored["models"][compare_losses.BEFORE]
    assert compare_losses.summarize(stored["runs"], before) == stored["summary"]
    # Hand-made check of one number: the mean over the seeds of the runs at the rate that is shown
    for loss, row in stored["summary"].items():
        chosen = [run for run in stored["runs"] if (run["loss"], run["learning_rate"]) == (loss, row["learning_rate"])]
        mean = sum(run["metrics"]["forget"]["probability"] for run in chosen) / len(compare_losses.SEEDS)
        assert row["values"]["forget probability"]["mean"] == pytest.approx(mean)
    for model in stored["teaching"]["models"].values():
        assert model["probability"] >= compare_losses.KNOWN_PROBABILITY
