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
"""The metrics of a report: what each is called and means, and the table of them."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from hf_unlearn.cards.markdown import integer, md_code, number
from hf_unlearn.cards.report import Metrics


class Metric(NamedTuple):
    """How a metric is called for a person, what it means, and with which others it stands in a table."""

    label: str
    words: str | None = None
    family: str = "Answers"


# The tables that an evaluation prints, in order
FAMILIES = ("Answers", "Fluency", "Memorisation", "Membership", "Refusals")
_FLUENCY, _MEMORISATION, _MEMBERSHIP, _REFUSALS = FAMILIES[1:]


# In the order of a table. A metric that is not here is shown under its own name, after these.
METRICS = {
    "rows": Metric("Rows"),
    "probability": Metric(
        "Probability",
        "the model's probability of the true answer, per token (geometric mean); with answers to choose from, its "
        "share among them.",
    ),
    "rougeL_recall": Metric("ROUGE-L recall", "how much of the true answer stands in the model's own, greedy one."),
    "exact_memorization": Metric(
        "Exact memorisation",
        "the share of the answer's tokens that the model names first, given the true text before.",
    ),
    "extraction_strength": Metric(
        "Extraction strength",
        "1 minus the smallest share of the answer that has to be given for the model to complete it exactly.",
    ),
    "truth_ratio": Metric(
        "Truth ratio",
        "r is the likelihood of wrong answers over that of a paraphrase of the true one. Forget set: the mean of "
        "min(r, 1/r), 1 where the model cannot tell them apart. Other sets: the mean of max(0, 1 - r), 1 where it "
        "knows which is true.",
    ),
    "choice_accuracy": Metric(
        "Choice accuracy",
        "the share of questions after which the true answer is the likeliest of the given ones, per token; answers "
        "that tie share the point.",
    ),
    "paraphrased_question_probability": Metric(
        "Probability, question reworded",
        "the probability of the true answers, each after its question in other words.",
    ),
    "forget_quality": Metric(
        "Forget quality",
        "the p-value of a Kolmogorov-Smirnov test between the truth ratios of this model and those of a model that "
        "never saw the forget set; near 0 the two can be told apart.",
    ),
    "forget_quality_statistic": Metric(
        "KS distance", "the statistic of that test: 0 where the truth ratios are alike, 1 where they never overlap."
    ),
    "model_utility": Metric(
        "Model utility",
        "the harmonic mean of probability, ROUGE-L recall and truth ratio, as far as they are here, over ",
    ),
    "loss": Metric("Loss", "the mean cross-entropy of the answer's tokens, in nats."),
    "perplexity": Metric(
        "Perplexity",
        "exp of the mean loss over all tokens of the true answers together: among how many equally likely tokens the "
        "model would have to guess.",
        _FLUENCY,
    ),
    "repetition": Metric(
        "Repetition",
        "the share of the runs of 4 tokens in the model's own answer that stood in it before; near 1 where it goes on "
        "and on.",
        _FLUENCY,
    ),
    "first_token_entropy": Metric(
        "First-token entropy",
        "how unsure the model is of how its answer begins, in nats; 0 where it is sure.",
        _FLUENCY,
    ),
    "generation_perplexity": Metric(
        "Perplexity to the judge",
        "the perplexity of the model's own answers to another model, usually the one before unlearning; far above "
        "that model's own answers where they are gibberish.",
        _FLUENCY,
    ),
    "passage_rows": Metric("Passages", family=_MEMORISATION),
    "question_rows": Metric("Questions", family=_MEMORISATION),
    "verbatim_memorization": Metric(
        "Verbatim memorisation",
        "ROUGE-L (F1) between how the model goes on after the beginning of a passage and how the passage goes on.",
        _MEMORISATION,
    ),
    "knowledge_memorization": Metric(
        "Knowledge memorisation",
        "ROUGE-L (F1) between the model's answer to a question, after answered ones, and the true one.",
        _MEMORISATION,
    ),
    "membership_rows": Metric("Rows of the forget set", family=_MEMBERSHIP),
    "holdout_rows": Metric("Rows of the holdout", family=_MEMBERSHIP),
    "membership_auc_loss": Metric(
        "AUC of the loss",
        "how well the model's loss tells rows of the forget set from rows of the same kind that it never saw; 0.5 "
        "where it does not. The other AUCs go by other scores.",
        _MEMBERSHIP,
    ),
    "membership_auc_zlib": Metric(
        "AUC of the loss by zlib", "by the loss per byte of the compressed answer.", _MEMBERSHIP
    ),
    "membership_auc_min_k": Metric(
        "AUC of Min-K", "by the log-probability of the answer's least likely tokens.", _MEMBERSHIP
    ),
    "membership_auc_min_k_plus_plus": Metric(
        "AUC of Min-K++", "by the same, each token set against all others that could stand there.", _MEMBERSHIP
    ),
    "membership_auc_gradient_norm": Metric(
        "AUC of the gradient norm", "by how far one step on the row would move the weights.", _MEMBERSHIP
    ),
    "membership_auc_reference": Metric(
        "AUC against a reference",
        "by how much likelier the answer is than to a model that was trained on neither.",
        _MEMBERSHIP,
    ),
    "privleak": Metric(
        "PrivLeak",
        "(AUC - AUC of a model that never saw the forget set) over the latter, of Min-K; above 0 the forget set still "
        "looks trained on, below 0 it looks less trained on than rows that were never seen, which gives it away too.",
        _MEMBERSHIP,
    ),
    "privleak_vs_chance": Metric(
        "PrivLeak against chance",
        "(AUC - 0.5) / 0.5, of Min-K: 0.5 stands for a model that never saw the forget set.",
        _MEMBERSHIP,
    ),
    "refusal_rate": Metric(
        "Refusal rate",
        "the share of answers that begin by refusing, as string rules read them; of harmless prompts, over-refusal. "
        "An answer that is no refusal need not comply.",
        _REFUSALS,
    ),
}
COUNTS = {"rows", "passage_rows", "question_rows", "membership_rows", "holdout_rows"}

# Forget-tokens in retain queries: where they stand, and what is compared. The tokens have numbers and no text.
INSERTIONS = {
    "choice": "a forget-token for an incorrect choice",
    "question": "a forget-token before the question",
    "answer_choices": "a forget-token before every choice",
}
SCORES = {
    "letter_accuracy": Metric(
        "Letter accuracy",
        "the share of questions where the letter of the right choice, all of them listed in the prompt, is the "
        "likeliest one, per token.",
    ),
    "text_accuracy": Metric(
        "Text accuracy",
        "the share of questions after which the right choice has the highest log-likelihood per token.",
    ),
    "probability": Metric("Probability", "the model's probability of the true answer, per token (geometric mean)."),
    "token_accuracy": Metric(
        "Token accuracy", "the share of the answer's tokens that the model names first, given the true text before."
    ),
}
_INSERTION = re.compile(
    rf"insertion_({'|'.join(INSERTIONS)})_token_([1-9]\d*)_"
    rf"(?:({'|'.join(SCORES)})_(clean|perturbed|difference|reduction)|(rows|rows_skipped))"
)
_COMPARED = {
    "clean": "clean",
    "perturbed": "perturbed",
    "difference": "perturbed minus clean",
    "reduction": "reduction rate",
    "rows": "Rows",
    "rows_skipped": "Rows skipped",
}

SETS = {
    "forget": "forget set",
    "retain": "retain set",
    "real_authors": "real authors",
    "world_facts": "world facts",
    "harmful": "harmful prompts",
    "harmless": "harmless prompts",
    "harness": "tasks of lm-evaluation-harness",
}
KEPT = ["retain", "real_authors", "world_facts"]


def metric_label(metric: str) -> str | None:
    """
    How a metric is called for a person.

    Args:
        metric (`str`):
            Its name in the report.

    Returns:
        `str` or `None`: `None` for a metric that has nothing but its own name.

    Example:

    ```python
    >>> from hf_unlearn.cards.metric_table import metric_label
    >>> metric_label("insertion_question_token_2_letter_accuracy_perturbed")
    'Letter accuracy, perturbed (token 2: a forget-token before the question)'

    ```
    """
    if metric in METRICS:
        return METRICS[metric].label
    parts = _INSERTION.fullmatch(metric)
    if parts is None:
        return None
    insertion, number, score, when, rows = parts.groups()
    what = _COMPARED[rows] if rows else f"{SCORES[score].label}, {_COMPARED[when]}"
    return f"{what} (token {number}: {INSERTIONS[insertion]})"


def metric_columns(metrics: Metrics) -> list[tuple[str, str, dict[str, float]]]:
    """Set, `"before"`, `"after"` or `"control"`, and values, of every evaluation there is."""
    stages = {"before": metrics.before, "after": metrics.after, "control": metrics.control}
    return [(name, when, sets[name]) for name in SETS for when, sets in stages.items() if sets.get(name)]


def _metric_names(metrics: Metrics) -> list[str]:
    """The metrics measured, in the order of the table. The ends of an interval are shown with their metric."""
    measured = {metric: None for _, _, values in metric_columns(metrics) for metric in values}
    ends = {f"{metric}_ci_{end}" for metric in measured for end in ("low", "high")}
    return [
        *(metric for metric in METRICS if metric in measured),
        *(metric for metric in measured if metric not in METRICS and metric not in ends),
    ]


def metric_rows(metrics: Metrics) -> list[tuple[str, list[str]]]:
    """One row per metric: its label and a cell for each of the columns."""
    return [
        (
            metric_label(metric) or md_code(metric),
            [_metric_cell(values, metric) for _, _, values in metric_columns(metrics)],
        )
        for metric in _metric_names(metrics)
    ]


def _metric_cell(values: dict[str, float], metric: str) -> str:
    if metric not in values:
        return "–"
    if metric in COUNTS or (_INSERTION.fullmatch(metric) and metric.endswith(("_rows", "_rows_skipped"))):
        return integer(values[metric])
    ends = [values.get(f"{metric}_ci_{end}") for end in ("low", "high")]
    interval = "" if None in ends else f" [{_value(ends[0])}, {_value(ends[1])}]"
    return _value(values[metric]) + interval


def _value(value: float) -> str:
    """Of gibberish, a perplexity may have hundreds of digits."""
    return f"{value:.2e}" if abs(value) >= 1e6 else number(value)


def metric_words(metrics: Metrics) -> list[str]:
    """What the metrics of the table mean."""
    words = {metric: METRICS[metric].words for metric in _metric_names(metrics) if metric in METRICS}
    if "model_utility" in words:
        words["model_utility"] += _utility_words(metrics)
    sentences = [f"**{METRICS[metric].label}:** {text}" for metric, text in words.items() if text]
    if any(metrics.control.values()):
        sentences.append("**Control:** a model that never saw the forget set.")
    inserted = [parts for parts in map(_INSERTION.fullmatch, _metric_names(metrics)) if parts]
    if inserted:
        sentences.append(
            "**Token 1, ...:** a word of the forget set that was inserted in the queries of the retain set. A model "
            "whose unlearning acts like a backdoor loses there; the reduction rate is (clean - perturbed) / clean."
        )
    scores = dict.fromkeys(parts[3] for parts in inserted if parts[3])
    return sentences + [f"**{SCORES[score].label}, clean and perturbed:** {SCORES[score].words}" for score in scores]


def _utility_words(metrics: Metrics) -> str:
    """The sets that the model utility is over. They differ with what was given, and may between before and after."""
    over = {
        when: words_for(name for name in KEPT if sets.get(name))
        for when, sets in (("before", metrics.before), ("after", metrics.after))
        if "model_utility" in sets.get("retain", {})
    }
    if len(set(over.values())) == 1:
        return f"{[*over.values()][0]}."
    return f"{over['before']} before, and over {over['after']} after: the two do not compare."


def words_for(sets: Iterable[str]) -> str:
    """`"the retain set, real authors and world facts"`, or `"the retain set alone"`."""
    names = [f"the {SETS[name]}" if name == "retain" else SETS[name] for name in sets]
    if len(names) == 1:
        return f"{names[0]} alone"
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
