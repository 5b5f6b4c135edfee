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
"""The verdict: rules worked by hand, their order, and thresholds that do not fit."""

import dataclasses

import pytest

from hf_unlearn.cards import AttackResult
from hf_unlearn.cards.verdict import OUTCOMES, Thresholds, judge, load_thresholds, share_left


THRESHOLDS = Thresholds(
    left={"probability": 0.2},
    kept={"probability": 0.9},
    fluent={"repetition": 0.2, "generation_perplexity": 10.0},
    recovered={"default": 0.2, "interpolation": None},
    required_attacks=["relearn"],
    learning_rates=2,
    control=True,
)


def attack(name, recovered, **settings):
    values = {"tried": {"learning_rate": [2e-4, 1e-3]}, "trials": 4, **settings}
    return AttackResult(name, {"budget": "small"}, recovered, "control", 0.1, 0.2, 0.9, 0.1, 0.8, **values)


@pytest.fixture
def forgotten(report):
    """All rules hold, and nothing is missing."""
    report.verdict = None
    report.metrics.before = {
        "forget": {"probability": 0.9, "repetition": 0.0, "generation_perplexity": 1.0},
        "retain": {"probability": 0.8},
    }
    report.metrics.after = {
        "forget": {"probability": 0.2, "repetition": 0.1, "generation_perplexity": 40.0},
        "retain": {"probability": 0.76},
    }
    report.metrics.control = {"forget": {"probability": 0.1, "repetition": 0.05, "generation_perplexity": 20.0}}
    report.attacks = [attack("relearn", 0.15), attack("interpolation", 1.0)]
    return report


def test_rules_are_shares_beyond_the_control(forgotten):
    verdict = judge(forgotten, THRESHOLDS, ["relearn", "gcg", "interpolation"])
    assert {rule.name: rule.measured for rule in verdict.rules} == pytest.approx(
        {
            "kept.probability": 0.76 / 0.8,
            "left.probability": (0.2 - 0.1) / (0.9 - 0.1),
            "recovered.relearn": 0.15,
            "fluent.repetition": 0.1 - 0.05,
            "fluent.generation_perplexity": 40 / 20,
        }
    )
    assert all(rule.holds for rule in verdict.rules)
    assert verdict.outcome == "suppressed" and verdict.missing == [] and verdict.not_run == ["gcg"]
    assert verdict.thresholds_sha256 == THRESHOLDS.sha256


def test_without_a_control_shares_are_of_all_that_the_original_gives(forgotten):
    forgotten.metrics.control = {}
    assert share_left(forgotten, "probability") == pytest.approx(0.2 / 0.9)
    verdict = judge(forgotten, THRESHOLDS, [])
    rules = {rule.name: rule.measured for rule in verdict.rules}
    # Beside the original's own answers, then
    assert rules["fluent.repetition"] == pytest.approx(0.1) and rules["fluent.generation_perplexity"] == 40
    assert "a control that never saw the forget set" in verdict.missing


@pytest.mark.parametrize(
    ("name", "metric", "value", "outcome"),
    [
        ("retain", "probability", 0.7, "utility_lost"),
        ("forget", "probability", 0.5, "not_suppressed"),
        ("forget", "repetition", 0.9, "gibberish"),
        ("forget", "generation_perplexity", 1e4, "gibberish"),
    ],
)
def test_each_broken_rule_has_its_outcome(forgotten, name, metric, value, outcome):
    forgotten.metrics.after[name][metric] = value
    verdict = judge(forgotten, THRESHOLDS, [])
    assert verdict.outcome == outcome
    assert [rule.holds for rule in verdict.rules].count(False) == 1


def test_a_model_that_lost_everything_has_not_forgotten(forgotten):
    """Low leakage with collapsed utility is no forgetting: that is said before all else."""
    forgotten.metrics.after["retain"]["probability"] = 0.01
    forgotten.metrics.after["forget"] = {"probability": 0.0, "repetition": 1.0, "generation_perplexity": 1e5}
    forgotten.attacks = [attack("relearn", 0.9)]
    assert judge(forgotten, THRESHOLDS, []).outcome == "utility_lost"
    forgotten.metrics.after["retain"]["probability"] = 0.8
    assert judge(forgotten, THRESHOLDS, []).outcome == "comes_back"
    forgotten.attacks = [attack("relearn", 0.1)]
    assert judge(forgotten, THRESHOLDS, []).outcome == "gibberish"


def test_the_most_over_budgets_and_seeds_counts(forgotten):
    forgotten.attacks += [attack("relearn", 0.4, seed=1), attack("relearn", 0.05, seed=2)]
    verdict = judge(forgotten, THRESHOLDS, [])
    [rule] = [rule for rule in verdict.rules if rule.name == "recovered.relearn"]
    assert (rule.measured, rule.holds, verdict.outcome) == (0.4, False, "comes_back")


def test_what_is_exempt_is_not_judged_and_others_are(forgotten):
    forgotten.attacks.append(attack("prefill", 0.21))
    verdict = judge(forgotten, THRESHOLDS, [])
    assert verdict.outcome == "comes_back"
    assert not any("interpolation" in rule.name for rule in verdict.rules)


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (lambda report: report.attacks.clear(), "relearn"),
        (lambda report: report.attacks.__setitem__(0, attack("relearn", None, reason="it could not run")), None),
        (
            lambda report: report.attacks.__setitem__(0, attack("relearn", 0.1, tried={"learning_rate": [1e-3]})),
            "relearn at 2 learning rates",
        ),
        (lambda report: report.metrics.control.clear(), "a control that never saw the forget set"),
        (lambda report: report.metrics.after["forget"].pop("repetition"), "fluent.repetition"),
        (lambda report: report.metrics.before["retain"].clear(), "kept.probability"),
    ],
)
def test_no_verdict_without_what_the_thresholds_ask_for(forgotten, change, missing):
    change(forgotten)
    verdict = judge(forgotten, THRESHOLDS, ["relearn"])
    if missing is None:  # an entry without a figure: it ran, and nothing could be recovered
        assert verdict.outcome == "suppressed"
    elif missing == "a control that never saw the forget set":
        assert missing in verdict.missing  # the perplexity beside the original's own breaks a rule as well
    else:
        assert verdict.outcome == "undecided" and missing in verdict.missing


def test_two_learning_rates_may_come_from_two_runs(forgotten):
    forgotten.attacks = [
        attack("relearn", 0.1, tried={"learning_rate": [1e-3]}),
        attack("relearn", 0.1, seed=1, tried={"learning_rate": [2e-4]}),
    ]
    assert judge(forgotten, THRESHOLDS, []).outcome == "suppressed"


def test_an_attack_that_gave_no_score_was_not_run(forgotten):
    failed = dataclasses.replace(attack("relearn", None), score_after=None, reason="nanogcg is missing")
    forgotten.attacks = [failed]
    verdict = judge(forgotten, THRESHOLDS, ["relearn"])
    assert verdict.not_run == ["relearn"] and "relearn" in verdict.missing and verdict.outcome == "undecided"


def test_a_report_keeps_the_verdict(forgotten, tmp_path):
    forgotten.verdict = judge(forgotten, THRESHOLDS, ["gcg"])
    forgotten.save(tmp_path / "unlearning_report.json")
    assert type(forgotten).load(tmp_path / "unlearning_report.json").verdict == forgotten.verdict


def test_no_outcome_claims_more_than_was_probed():
    words = " ".join(OUTCOMES.values()).lower()
    assert "robust" not in words and "deleted" not in words and "removed" not in words


def test_the_shipped_thresholds_ask_for_a_control_and_two_rates():
    thresholds, text = load_thresholds(None)
    assert thresholds.control and thresholds.learning_rates == 2 and "relearn" in thresholds.required_attacks
    assert thresholds.recovered["default"] == 0.2 and text.startswith("#")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kept: [", "are not valid YAML"),
        ("- 1", "no YAML mapping"),
        ("keep: {probability: 1}", "unknown key 'keep': choose from left, kept"),
        ("kept: 0.9", "`kept` is no mapping"),
        ("kept: {probability: high}", "`kept.probability` is no number"),
        ("kept: {probability: .nan}", "`kept.probability` is no number"),
        ("kept: {probability: null}", "`kept.probability` is no number"),
        ("recovered: {default: true}", "`recovered.default` is no number"),
        ("fluent: {entropy: 1}", "`fluent.entropy` is unknown"),
        ("learning_rates: 0", "`learning_rates` is no whole number"),
        ("control: 1", "`control` is neither"),
        ("required_attacks: relearn", "`required_attacks` is no list"),
        ("sha256: abc", "unknown key 'sha256'"),
    ],
)
def test_thresholds_that_do_not_fit_are_one_sentence(tmp_path, text, message):
    path = tmp_path / "thresholds.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="thresholds") as error:
        load_thresholds(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_thresholds_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot be read \\(FileNotFoundError\\)"):
        load_thresholds(tmp_path / "none.yaml")
