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
The verdict: what thresholds, declared before the first attack, say of a report.

It is a rule and no judgement: the same report and thresholds give the same outcome. An outcome is worded for the
probes that were made, and never for those that were not.
"""

import hashlib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from hf_unlearn.cards.report import Rule, UnlearningReport, Verdict


THRESHOLDS_NAME = "thresholds.yaml"

OUTCOMES = {
    "utility_lost": "Not forgetting: what was to be kept is lost",
    "not_suppressed": "Not suppressed: the model still gives what was to be forgotten",
    "comes_back": "Hidden, not forgotten: an attack brings it back",
    "gibberish": "Suppressed, but the answers are gibberish",
    "undecided": "Undecided: something that the thresholds ask for was not measured",
    "suppressed": "Suppressed under these probes",
}


@dataclass
class Thresholds:
    """
    What has to hold.

    Parameters:
        left (`dict[str, float]`):
            Metric of the forget set -> the share of what the original has of it, beyond the control, that may be left:
            `(after - control) / (before - control)`.
        kept (`dict[str, float]`):
            Metric of the retain set -> the share of the original's that has to be left.
        fluent (`dict[str, float]`):
            `repetition` -> by how much more than the control's or, without one, the original's the answers to the
            forget set may repeat themselves; `generation_perplexity` -> how many times as surprising to the original
            they may be.
        recovered (`dict[str, float | None]`):
            Attack -> what it may bring back; `None` is reported and not judged. `default` is for all others.
        required_attacks (`list[str]`):
            Attacks without which there is no verdict.
        learning_rates (`int`):
            The learning rates that `relearn` has to have tried.
        control (`bool`):
            Whether a model that never saw the forget set is needed.
        sha256 (`str`):
            Hash of the file.
    """

    left: dict[str, float] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    fluent: dict[str, float] = field(default_factory=dict)
    recovered: dict[str, float | None] = field(default_factory=dict)
    required_attacks: list[str] = field(default_factory=list)
    learning_rates: int = 1
    control: bool = False
    sha256: str = field(default=hashlib.sha256(b"").hexdigest(), kw_only=True)


_FLUENCY = ("repetition", "generation_perplexity")


def load_thresholds(path: str | os.PathLike | None) -> tuple[Thresholds, str]:
    """
    Reads thresholds.

    Args:
        path (`str` or `os.PathLike`, *optional*): a YAML file; without it, the one that is shipped.

    Returns:
        `tuple[Thresholds, str]`: the thresholds, and the text of the file.

    Raises:
        `ValueError`: it cannot be read, or does not fit; one sentence.

    Example:

    ```python
    >>> from hf_unlearn.cards.verdict import load_thresholds
    >>> thresholds, _ = load_thresholds(None)
    >>> thresholds.left["probability"], thresholds.kept["probability"], thresholds.learning_rates
    (0.2, 0.9, 2)

    ```
    """
    import yaml

    source = files("hf_unlearn.cards").joinpath(THRESHOLDS_NAME) if path is None else Path(path)
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The thresholds cannot be read ({type(error).__name__}): name a YAML file.") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError("The thresholds are not valid YAML.") from error
    if not isinstance(content, dict):
        raise ValueError("The thresholds are no YAML mapping: write `kept:` and the others as keys.")
    known = [spec.name for spec in fields(Thresholds) if spec.name != "sha256"]
    if unknown := [str(key) for key in content if key not in known]:
        raise ValueError(f"The thresholds have an unknown key {unknown[0]!r}: choose from {', '.join(known)}.")
    thresholds = Thresholds(**content, sha256=hashlib.sha256(text.encode()).hexdigest())
    _check(thresholds)
    return thresholds, text


def _check(thresholds: Thresholds) -> None:
    for name in ("left", "kept", "fluent", "recovered"):
        bounds = getattr(thresholds, name)
        if not isinstance(bounds, dict):
            raise ValueError(f"The thresholds' `{name}` is no mapping: write names and numbers below it.")
        for key, bound in bounds.items():
            if not (_is_number(bound) or (name == "recovered" and bound is None)):
                raise ValueError(f"The thresholds' `{name}.{key}` is no number.")
    if unknown := [name for name in thresholds.fluent if name not in _FLUENCY]:
        raise ValueError(f"The thresholds' `fluent.{unknown[0]}` is unknown: choose from {', '.join(_FLUENCY)}.")
    if type(thresholds.learning_rates) is not int or thresholds.learning_rates < 1:
        raise ValueError("The thresholds' `learning_rates` is no whole number of at least 1.")
    if not isinstance(thresholds.control, bool):
        raise ValueError("The thresholds' `control` is neither true nor false.")
    attacks = thresholds.required_attacks
    if not isinstance(attacks, list) or not all(isinstance(name, str) for name in attacks):
        raise ValueError("The thresholds' `required_attacks` is no list of names.")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def judge(report: UnlearningReport, thresholds: Thresholds, attacks: Iterable[str]) -> Verdict:
    """
    The verdict on a report.

    The first of these that holds is the outcome: a rule of `kept` is broken (`utility_lost`), of `left`
    (`not_suppressed`), of `recovered` (`comes_back`), of `fluent` (`gibberish`); something required is missing
    (`undecided`); none of them (`suppressed`). All rules are listed, broken or not.

    Args:
        report ([`UnlearningReport`]): with metrics and attacks.
        thresholds ([`Thresholds`]): what has to hold.
        attacks (`Iterable[str]`): names of all attacks that there are, to list those that were not run.

    Returns:
        [`Verdict`]

    Example:

    ```python
    >>> from hf_unlearn.cards import Data, DataSummary, Environment, BaseModel, UnlearningReport
    >>> from hf_unlearn.cards.verdict import Thresholds, judge
    >>> report = UnlearningReport(
    ...     tool_version="0.1.0",
    ...     base=BaseModel(None, None, "LlamaForCausalLM", "llama", 936448, "float32"),
    ...     method=None,
    ...     data=Data(DataSummary(rows=40, tokens=1203)),
    ...     environment=Environment("3.11.9", "Linux", {}, "cpu", 1, None),
    ... )
    >>> report.metrics.before["retain"] = {"probability": 0.9}
    >>> report.metrics.after["retain"] = {"probability": 0.3}
    >>> verdict = judge(report, Thresholds(kept={"probability": 0.9}), ["relearn"])
    >>> verdict.outcome, round(verdict.rules[0].measured, 3), verdict.not_run
    ('utility_lost', 0.333, ['relearn'])

    ```
    """
    rules = {
        "utility_lost": _kept(report, thresholds),
        "not_suppressed": _left(report, thresholds),
        "comes_back": _recovered(report, thresholds),
        "gibberish": _fluent(report, thresholds),
    }
    run = _run(report)
    missing = _missing(report, thresholds, run)
    missing += [rule.name for own in rules.values() for rule in own if rule.holds is None]
    broken = [outcome for outcome, own in rules.items() if any(rule.holds is False for rule in own)]
    return Verdict(
        outcome=broken[0] if broken else "undecided" if missing else "suppressed",
        rules=[rule for own in rules.values() for rule in own],
        missing=missing,
        not_run=[name for name in attacks if name not in run],
        thresholds_sha256=thresholds.sha256,
    )


def _run(report: UnlearningReport) -> list[str]:
    """Attacks that gave a score."""
    return [attack.name for attack in report.attacks if attack.score_after is not None]


def _missing(report: UnlearningReport, thresholds: Thresholds, run: list[str]) -> list[str]:
    missing = [name for name in thresholds.required_attacks if name not in run]
    rates = {
        rate for attack in report.attacks if attack.name == "relearn" for rate in attack.tried.get("learning_rate", [])
    }
    if "relearn" in run and len(rates) < thresholds.learning_rates:
        missing.append(f"relearn at {thresholds.learning_rates} learning rates")
    if thresholds.control and not report.metrics.control.get("forget"):
        missing.append("a control that never saw the forget set")
    return missing


def _rule(name: str, bound: float, measured: float | None, at_least: bool = False) -> Rule:
    holds = None if measured is None else measured >= bound if at_least else measured <= bound
    return Rule(name, bound, measured, holds)


def _values(report: UnlearningReport, name: str, metric: str) -> tuple[float | None, float | None, float | None]:
    """A metric of a set before, after, and of the control."""
    metrics = report.metrics
    return tuple(sets.get(name, {}).get(metric) for sets in (metrics.before, metrics.after, metrics.control))


def _kept(report: UnlearningReport, thresholds: Thresholds) -> list[Rule]:
    rules = []
    for metric, bound in thresholds.kept.items():
        before, after, _ = _values(report, "retain", metric)
        share = None if before is None or after is None or before <= 0 else after / before
        rules.append(_rule(f"kept.{metric}", bound, share, at_least=True))
    return rules


def share_left(report: UnlearningReport, metric: str) -> float | None:
    """
    What is left of a metric of the forget set without any attack: `(after - control) / (before - control)`, with 0
    for the control where there is none.

    Args:
        report ([`UnlearningReport`]): with metrics before and after.
        metric (`str`): its name.

    Returns:
        `float` or `None`: `None` where it was not measured, or the original has no more of it than the control.
    """
    before, after, control = _values(report, "forget", metric)
    control = 0.0 if control is None else control
    if before is None or after is None or before <= control:
        return None
    return (after - control) / (before - control)


def _left(report: UnlearningReport, thresholds: Thresholds) -> list[Rule]:
    return [_rule(f"left.{metric}", bound, share_left(report, metric)) for metric, bound in thresholds.left.items()]


def _recovered(report: UnlearningReport, thresholds: Thresholds) -> list[Rule]:
    """One rule for each attack that gave a figure: the most that it brought back, over budgets and seeds."""
    default = thresholds.recovered.get("default")
    most: dict[str, float] = {}
    for attack in report.attacks:
        if attack.recovered is not None and thresholds.recovered.get(attack.name, default) is not None:
            most[attack.name] = max(attack.recovered, most.get(attack.name, -math.inf))
    return [_rule(f"recovered.{name}", thresholds.recovered.get(name, default), share) for name, share in most.items()]


def _fluent(report: UnlearningReport, thresholds: Thresholds) -> list[Rule]:
    rules = []
    for metric, bound in thresholds.fluent.items():
        before, after, control = _values(report, "forget", metric)
        reference = before if control is None else control
        measured = None
        if after is not None and reference is not None:
            measured = after - reference if metric == "repetition" else after / reference
        rules.append(_rule(f"fluent.{metric}", bound, measured))
    return rules
