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
"""What `hf-unlearn evaluate` found, and how it is printed: for a program, and for a person."""

import json
import os
import textwrap
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hf_unlearn.cards.metric_table import (
    COUNTS,
    FAMILIES,
    INSERTIONS,
    METRICS,
    SCORES,
    SETS,
    metric_label,
)


if TYPE_CHECKING:
    from hf_unlearn.lm_eval import HarnessScore
    from hf_unlearn.metrics import InsertionResult


# The folder beside the report that holds values and answers row by row
PRIVATE = "private"
# Sets side by side in a table
_PAIRS = (("forget", "retain"), ("real_authors", "world_facts"), ("harmful", "harmless"))
_PROMPTS = _PAIRS[-1]  # nothing but what is refused is measured on them


@dataclass
class Result:
    """
    What was measured. Only `samples` hold text, and they go nowhere but to `private/`, each in a file of its own.
    """

    stage: str
    metrics: dict[str, dict[str, float]]
    skipped: dict[str, dict[str, str]]
    samples: dict[str, list[dict[str, Any]]]
    utility_parts: list[str] = field(default_factory=list)
    report: str | None = None
    insertion: "InsertionResult | None" = None
    harness: "list[HarnessScore]" = field(default_factory=list)
    harness_limit: int | None = None

    def add(self, name: str, metrics: dict[str, float], skipped: dict[str, str]) -> None:
        """
        Adds the numbers of another family of metrics to a set. `rows` stays the number of answers that were scored:
        other families count their rows under names of their own.
        """
        own = self.metrics.setdefault(name, {})
        own |= {metric: value for metric, value in metrics.items() if metric != "rows" or "rows" not in own}
        self.skipped.setdefault(name, {}).update(skipped)

    def empty_answers(self) -> dict[str, int]:
        """How many rows of each set had no answer to measure."""
        counts = {
            name: sum(not sample["answer_tokens"] for sample in self.samples[name])
            for name in self.metrics
            if name not in _PROMPTS
        }
        return {name: count for name, count in counts.items() if count}


def write_private(folder: str, name: str, rows: list[dict[str, Any]]) -> None:
    """
    Writes one JSON line per row where only the owner can read it and git ignores it.

    Args:
        folder (`str`): a folder for nothing else.
        name (`str`): name of the file.
        rows (`list[dict[str, Any]]`): the rows.
    """
    os.makedirs(folder, mode=0o700, exist_ok=True)
    os.chmod(folder, 0o700)  # it may have been there before
    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    for file_name, text in ((".gitignore", "*\n"), (name, lines)):
        path = os.path.join(folder, file_name)
        with open(path, "w", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(text)


def as_json(result: Result) -> str:
    return json.dumps(
        {
            "report": result.report,
            "metrics": {result.stage: result.metrics},
            "model_utility_over": result.utility_parts,
            "skipped": result.skipped,
            "empty_answers": result.empty_answers(),
            "lm_eval": [asdict(score) for score in result.harness],
        },
        indent=2,
    )


def as_table(result: Result) -> str:
    """
    One table per family of metrics and pair of sets, one row per metric, and below them what the numbers are and which
    are missing.
    """
    lines = []
    for family in FAMILIES:
        for pair in _PAIRS:
            lines += _table(result.metrics, [name for name in pair if name in result.metrics], family)
    if result.insertion is not None:
        lines += [*_insertion_table(result.insertion), ""]
    if result.harness:
        lines += [*_harness_table(result.harness), ""]
    notes = ["[ ]: 95 % interval of the mean over the rows, by bootstrap."] if result.metrics else []
    if "forget_quality" in result.metrics.get("forget", {}):
        statistic = result.metrics["forget"]["forget_quality_statistic"]
        notes.append(
            f"Forget quality: p-value of a KS test (distance {statistic:.3f}) between the truth ratios of this model "
            "and of the retain-only one; below 0.05 they differ."
        )
    if result.utility_parts:
        notes.append(f"Model utility: harmonic mean of {_utility_words(result.utility_parts)}.")
        if not {"real_authors", "world_facts"} & set(result.metrics):
            notes[-1] += " It is over the retain set alone: --real_authors and --world_facts add to it."
    shown = {metric for values in result.metrics.values() for metric in values}
    notes += [
        f"{metric.label}: {metric.words}"
        for name, metric in METRICS.items()
        if name in shown and metric.family != FAMILIES[0] and metric.words
    ]
    if result.insertion is not None:
        notes += _insertion_notes(result.insertion)
    if result.harness:
        notes += _harness_notes(result)
    for name, count in result.empty_answers().items():
        notes.append(f"{count} of {len(result.samples[name])} rows of the {SETS[name]} have no answer: left out.")
    notes += _skipped_notes(result.skipped)
    lines += [line for note in notes for line in textwrap.wrap(note, 100, subsequent_indent="  ")]
    if result.report is not None:
        folder = os.path.join(os.path.dirname(result.report), PRIVATE)
        lines += ["", f"Saved in {result.report}"]
        if result.samples:
            lines.append(f"Values and answers per row, not to be released: {folder}{os.sep}")
    return "\n".join(lines)


def _utility_words(parts: list[str]) -> str:
    """`["retain.probability", ...]` for a person."""
    sets: dict[str, list[str]] = {}
    for part in parts:
        name, _, metric = part.partition(".")
        sets.setdefault(name, []).append(_label(metric))
    by_metrics: dict[tuple[str, ...], list[str]] = {}
    for name, metrics in sets.items():
        by_metrics.setdefault(tuple(metrics), []).append(f"the {SETS[name]}")
    return "; ".join(f"{', '.join(metrics)} over {', '.join(names)}" for metrics, names in by_metrics.items())


def _skipped_notes(skipped: dict[str, dict[str, str]]) -> list[str]:
    """Each reason once, for all metrics and sets that it holds for alike."""
    metrics: dict[tuple[str, str], list[str]] = {}
    for name, reasons in skipped.items():
        for metric, reason in reasons.items():
            metrics.setdefault((name, reason), []).append(_label(metric))
    sets: dict[tuple[str, str], list[str]] = {}
    for (name, reason), labels in metrics.items():
        sets.setdefault((_listed(labels), reason), []).append(f"the {SETS[name]}")
    return [f"{labels} of {_listed(names)}: skipped. {reason}" for (labels, reason), names in sets.items()]


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _table(metrics: dict[str, dict[str, float]], names: list[str], family: str) -> list[str]:
    """One family of the sets that have any of it, and an empty line."""
    own = [
        metric
        for metric, about in METRICS.items()
        if about.family == family and metric != "forget_quality_statistic"  # below the table
    ]
    names = [name for name in names if any(metric in metrics[name] for metric in own if metric not in COUNTS)]
    if not names:
        return []
    if family == "Refusals":
        own = ["rows", *own]
    rows = [["" if family == FAMILIES[0] else family, *(SETS[name] for name in names)]]
    rows += [
        [_label(metric), *(_cell(metrics[name], metric) for name in names)]
        for metric in own
        if any(metric in metrics[name] for name in names)
    ]
    return [*_aligned(rows), ""]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _insertion_table(insertion: "InsertionResult") -> list[str]:
    """One row per forget-token and score. The tokens are numbered: their text is shown nowhere."""
    where = INSERTIONS[insertion.insertion].capitalize()
    rows = [[where, "Rows", "Clean", "Perturbed", "Difference", "Reduction"]]
    for number, token in enumerate(insertion.tokens, start=1):
        for score, comparison in token.scores.items():
            low, high = comparison.difference_interval
            rows.append(
                [
                    f"Token {number}: {SCORES[score].label.lower()}",
                    f"{token.rows}",
                    _number(comparison.clean),
                    _number(comparison.perturbed),
                    f"{comparison.difference:+.3f} [{low:+.3f}, {high:+.3f}]",
                    "" if comparison.reduction is None else f"{comparison.reduction:.1%}",
                ]
            )
    return _aligned(rows)


_WHY_SKIPPED = {
    "mentions": "hold the forget-token already",
    "too_long": "are longer than max_length",
    "empty": "have an empty answer or no incorrect one",
}


def _insertion_notes(insertion: "InsertionResult") -> list[str]:
    notes = ["Perturbed: the retain set with the token in its queries. Reduction: (clean - perturbed) / clean."]
    notes += [f"{SCORES[score].label}: {SCORES[score].words}" for score in insertion.scores]
    if insertion.insertion == "choice" and "text_accuracy" in insertion.scores:
        notes.append(
            "The replaced choice stands in no query here: only its own score changes. --insertion question puts the "
            "forget-token into the query, --insertion_scoring letter lists the choices in it."
        )
    for number, token in enumerate(insertion.tokens, start=1):
        reasons = [f"{count} {_WHY_SKIPPED[reason]}" for reason, count in token.skipped.items() if count]
        if reasons:
            notes.append(f"Token {number}: rows skipped. {'; '.join(reasons)}.")
    return notes


def _harness_table(scores: "list[HarnessScore]") -> list[str]:
    rows = [["lm-evaluation-harness", "Metric", "Value", "Rows", "Examples", "Task version"]]
    for score in scores:
        low, high = score.interval or (None, None)
        rows.append(
            [
                score.task,
                score.metric if score.filter == "none" else f"{score.metric} ({score.filter})",
                _number(score.value) + ("" if low is None else f" [{_end(low)}, {_end(high)}]"),
                f"{score.rows}",
                f"{score.shots}",
                score.version,
            ]
        )
    return _aligned(rows)


def _harness_notes(result: Result) -> list[str]:
    notes = [
        "lm-evaluation-harness: [ ] is the 95 % interval by the harness's standard error. Examples: answered ones "
        "before each question."
    ]
    if result.harness_limit is not None:
        notes.append(
            f"At most {result.harness_limit} questions of each task were asked (--lm_eval_limit): not the score that "
            "others report."
        )
    return notes


def _label(metric: str) -> str:
    return metric_label(metric) or metric


def _cell(values: dict[str, float], metric: str) -> str:
    if metric not in values:
        return ""
    if metric in COUNTS:
        return f"{values[metric]:.0f}"
    low, high = values.get(f"{metric}_ci_low"), values.get(f"{metric}_ci_high")
    interval = "" if low is None or high is None else f" [{_end(low)}, {_end(high)}]"
    return _number(values[metric]) + interval


def _number(value: float) -> str:
    return _end(value) if value == 0 or abs(value) >= 0.0005 else f"{value:.1e}"


def _end(value: float) -> str:
    """Perplexities may have hundreds of digits."""
    if abs(value) < 1000:
        return f"{value:.3f}"
    return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.1e}"
