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
"""The robustness report in Markdown: verdict, what was measured, what comes back. Rendered from the report alone."""

from itertools import groupby
from typing import Any

from hf_unlearn.cards.card import template_environment
from hf_unlearn.cards.markdown import md_cell, md_code, md_escape, number, share
from hf_unlearn.cards.metric_table import SETS, metric_columns, metric_label, metric_rows, metric_words
from hf_unlearn.cards.report import REPORT_NAME, AttackResult, Rule, UnlearningReport
from hf_unlearn.cards.verdict import OUTCOMES, THRESHOLDS_NAME


# From mild to strong
BUDGETS = ("small", "standard", "large")

# How many rows an attack asked: where it left some out, the number of these is shown
_NOT_SHOWN = ("budget", "rows", "retain_rows")

_RULES = {
    "left": "{} of the forget set: share left, beyond the control",
    "kept": "{} of the retain set: share kept",
    "recovered": "recovered by {}",
}
_FLUENT = {
    "repetition": "repetition in answers to the forget set, beyond the control's",
    "generation_perplexity": "surprise of the original at answers to the forget set, over that at the control's",
}


def render_robustness_report(report: UnlearningReport, figures: dict[str, str | None]) -> str:
    """
    Renders the robustness report. Every number in it comes from the report, and nothing in it is a row or a path.

    Args:
        report ([`UnlearningReport`]): with attacks, and a verdict where thresholds were declared.
        figures (`dict[str, str | None]`): `heat_map` and `curves`, the files of the pictures relative to the document,
            or `None`.

    Returns:
        `str`: Markdown.
    """
    report = UnlearningReport.from_dict(report.to_dict())
    worst = worst_results(report.attacks)
    template = template_environment().get_template("robustness_report.md.jinja")
    return template.render(
        report=report,
        report_name=REPORT_NAME,
        thresholds_name=THRESHOLDS_NAME,
        environment=report.environment,
        outcome=OUTCOMES[report.verdict.outcome] if report.verdict else None,
        rules=[rule_cells(rule) for rule in report.verdict.rules] if report.verdict else [],
        metric_columns=metric_columns(report.metrics),
        metric_rows=metric_rows(report.metrics),
        metric_words=metric_words(report.metrics),
        set_names=SETS,
        figures=figures,
        attack_rows=[_attack_cells(results, chosen) for results, chosen in worst],
        notes=[f"{md_code(chosen.name)}: {md_escape(chosen.reason)}" for _, chosen in worst if chosen.reason],
        curves=[cells for _, chosen in worst for cells in curve_cells(chosen)],
        rows={name: values["rows"] for name, values in report.metrics.after.items() if "rows" in values},
        seeds=sorted({attack.seed for attack in report.attacks}),
        controls=sorted({attack.control for attack in report.attacks} - {"none"}),
    )


def worst_results(attacks: list[AttackResult]) -> list[tuple[list[AttackResult], AttackResult]]:
    """
    The results of each attack and budget over all seeds, and the one of them that brought back most.

    Args:
        attacks (`list[AttackResult]`): in any order.

    Returns:
        `list[tuple[list[AttackResult], AttackResult]]`: by attack, in the order of its first result, and by budget.
    """
    order = {name: place for place, name in enumerate(dict.fromkeys(attack.name for attack in attacks))}

    def place(attack: AttackResult) -> tuple[int, int]:
        return order[attack.name], _strength(attack)

    groups = [list(group) for _, group in groupby(sorted(attacks, key=place), key=place)]
    return [
        (group, max(group, key=lambda attack: float("-inf") if attack.recovered is None else attack.recovered))
        for group in groups
    ]


def budget_name(attack: AttackResult) -> str:
    """`small`, `standard` or `large`; of a report from elsewhere, what it says."""
    return str(attack.budget.get("budget", "–"))


def _strength(attack: AttackResult) -> int:
    name = budget_name(attack)
    return BUDGETS.index(name) if name in BUDGETS else len(BUDGETS)


def _attack_cells(results: list[AttackResult], chosen: AttackResult) -> list[str]:
    own = [attack.recovered for attack in results if attack.recovered is not None]
    recovered = share(chosen.recovered)
    if len(own) > 1:
        recovered += f" (lowest {share(min(own))})"
    settings = ", ".join(
        md_cell(md_code(f"{name} = {_plain(value)}"))
        for name, value in chosen.budget.items()
        if name not in _NOT_SHOWN and not (name.endswith("left_out") and value == 0)
    )
    return [
        md_code(chosen.name),
        md_cell(md_code(budget_name(chosen))),
        recovered,
        number(chosen.score_before),
        number(chosen.score_after),
        number(chosen.score_original_attacked),
        number(chosen.score_control_attacked),
        number(chosen.utility_after),
        settings or "–",
        str(chosen.trials),
        number(chosen.seconds),
    ]


def curve_cells(attack: AttackResult) -> list[list[str]]:
    """The points of a recovery curve, one row of a table each."""
    return [
        [
            md_code(attack.name),
            md_cell(md_code(budget_name(attack))),
            md_cell(md_code(f"{attack.axis} = {_plain(point.at)}")),
            number(point.unlearned),
            number(point.original),
            number(point.control),
        ]
        for point in attack.curve
    ]


def _plain(value: float | int | str) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def rule_cells(rule: Rule) -> dict[str, Any]:
    """A rule of the verdict for a table: words, sign, bound, what was measured, and whether it holds."""
    kind, _, name = rule.name.partition(".")
    if kind == "fluent":
        words = _FLUENT[name]
    else:
        label = md_code(name) if kind == "recovered" else metric_label(name) or md_code(name)
        words = _RULES[kind].format(label)
    return {
        "words": words,
        "sign": "≥" if kind == "kept" else "≤",
        "bound": number(rule.bound),
        "measured": number(rule.measured),
        "holds": "not measured" if rule.holds is None else "yes" if rule.holds else "**no**",
    }
