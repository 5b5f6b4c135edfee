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
"""The model card, rendered from the report. jinja2 and yaml are imported where they are used: importing stays fast."""

import functools
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_unlearn.cards.disclosure import TOPICS, visible_settings
from hf_unlearn.cards.interventions import CITATION, INTERVENTIONS, PAPER, SETTINGS
from hf_unlearn.cards.losses import CITATIONS, describe_losses
from hf_unlearn.cards.markdown import integer, md_cell, md_code, md_escape, number, share
from hf_unlearn.cards.metric_table import (
    KEPT,
    SETS,
    metric_columns,
    metric_label,
    metric_rows,
    metric_words,
    words_for,
)
from hf_unlearn.cards.report import (
    REPORT_NAME,
    AttackResult,
    Rule,
    UnlearningReport,
    is_count,
    write_bytes,
    write_text,
)
from hf_unlearn.cards.verdict import OUTCOMES
from hf_unlearn.cards.wrappers import PRISM, describe_wrappers, used_wrappers


if TYPE_CHECKING:
    import jinja2


CARD_NAME = "README.md"
# By this sentence a card is known as one of ours.
_ORIGIN = f"Every number here is rendered from `{REPORT_NAME}`"
_MAX_MODULES = 20
_LICENCE_KEYS = ("license", "license_name", "license_link")


class CardFigure(NamedTuple):
    """A picture of the card: its file, relative to the card, and what it shows, with the numbers."""

    path: str
    text: str


def render_model_card(
    report: UnlearningReport,
    *,
    model_name: str | None = None,
    license: str | Mapping[str, Any] | None = None,
    notices: Sequence[str] = (),
    figures: Mapping[str, CardFigure] | None = None,
) -> str:
    """
    Render the model card of an unlearned model. Every number in it comes from the report.

    Args:
        report ([`UnlearningReport`]):
            The report that is released beside the card. The card names its hash, so save the same report.
        model_name (`str`, *optional*):
            Name of the released model, with which its own numbers stand in the metadata (`model-index`).
        license (`str` or `Mapping`, *optional*):
            Identifier of the base model's licence, which the release inherits, or its metadata `license`,
            `license_name` and `license_link`; none is made up.
        notices (`Sequence[str]`, *optional*):
            Files of the base model's licence beside the card.
        figures (`Mapping[str, CardFigure]`, *optional*):
            `footprint`, `before_after`, `attacks` and `recovery`, those of them that there are.

    Returns:
        `str`: The content of `README.md`, YAML front matter included.

    Example:

    ```python
    >>> from hf_unlearn.cards import BaseModel, Data, DataSummary, Environment, LossTerm, Method, Scope
    >>> from hf_unlearn.cards import UnlearningReport, render_model_card

    >>> report = UnlearningReport(
    ...     tool_version="0.1.0",
    ...     base=BaseModel("org/name", None, "LlamaForCausalLM", "llama", 936448, "float32"),
    ...     method=Method(
    ...         name="npo",
    ...         forget_losses=[LossTerm("npo", 1.0)],
    ...         retain_losses=[],
    ...         scope=Scope("full", [], None, 936448, None),
    ...         reference="initial_weights",
    ...         settings={"beta": 0.1},
    ...         seed=0,
    ...         steps=60,
    ...     ),
    ...     data=Data(DataSummary(rows=40, tokens=1203)),
    ...     environment=Environment("3.11.9", "Linux", {"torch": "2.13.0"}, "cpu", 1, 12.5),
    ... )
    >>> render_model_card(report).splitlines()[1:4]
    ['library_name: transformers', 'pipeline_tag: text-generation', 'base_model: org/name']

    ```
    """
    # A checked copy: whatever scalar types the run left behind, the template sees plain numbers.
    report = UnlearningReport.from_dict(report.to_dict())
    intervention = INTERVENTIONS[report.method.name] if _is_intervention(report) else None
    losses, wrappers = [], []
    if report.method and not intervention:
        losses, wrappers = describe_losses(report.method), describe_wrappers(report.method.settings)
    cited = [loss.citation for loss in losses if loss.citation]
    cited += [key for wrapper in wrappers for key in wrapper.citations]
    modules = report.footprint.modules if report.footprint else []
    return (
        template_environment()
        .get_template("model_card.md.jinja")
        .render(
            report=report,
            report_name=REPORT_NAME,
            origin=_ORIGIN,
            report_sha256=hashlib.sha256(report.to_json().encode()).hexdigest(),
            metadata=_metadata(report, model_name, license),
            settings=visible_settings(report) if report.method else {},
            topic_words=TOPICS,
            license=_licence_words(license),
            notices=notices,
            figures={} if figures is None else figures,
            outcome=OUTCOMES[report.verdict.outcome] if report.verdict else None,
            rules=[rule_cells(rule) for rule in report.verdict.rules] if report.verdict else [],
            broken=[rule for rule in report.verdict.rules if rule.holds is False] if report.verdict else [],
            curves=_curve_rows(report.attacks),
            adapter=_is_adapter(report),
            model_folder=_model_folder(report),
            verdict=_verdict(report),
            losses=losses,
            wrappers=wrappers,
            intervention=intervention,
            intervention_settings=_intervention_settings(report),
            paper=PAPER,
            reveals_tokens=_reveals_tokens(report),
            modules=sorted(modules, key=lambda module: module.relative_norm, reverse=True)[:_MAX_MODULES],
            metric_columns=metric_columns(report.metrics),
            metric_rows=metric_rows(report.metrics),
            metric_words=metric_words(report.metrics),
            set_names=SETS,
            kept_sets=words_for(name for name in KEPT if report.metrics.after.get(name)),
            citations=[
                *([CITATION] if intervention else []),
                *(CITATIONS[key] for key in dict.fromkeys(cited) if key),
            ],
        )
    )


def write_model_card(report: UnlearningReport, folder: str | os.PathLike) -> Path:
    """
    Write the model card of an unlearned model in one step, in the place of the one that is there.

    Args:
        report ([`UnlearningReport`]):
            The report that is released beside the card.
        folder (`str` or `os.PathLike`):
            The folder that is released. It has to exist.

    Returns:
        `Path`: The card, `folder/README.md`.
    """
    path = Path(folder, CARD_NAME)
    write_text(path, render_model_card(report))
    return path


def update_model_card(report: UnlearningReport, folder: str | os.PathLike) -> bool:
    """
    Render the card in `folder` anew, so that it agrees with a report that changed.

    Args:
        report ([`UnlearningReport`]):
            The report that was saved in `folder`.
        folder (`str` or `os.PathLike`):
            The folder that is released.

    Returns:
        `bool`: Whether there was a card of ours. A `README.md` that someone else wrote is left as it is.
    """
    from hf_unlearn.cards.builder import FIGURES, build_card
    from hf_unlearn.cards.merge import merge_card

    path = Path(folder, CARD_NAME)
    if not path.is_file():
        return False
    text = path.read_bytes().decode("utf-8", errors="replace")
    if not is_own_card(text):
        return False
    chosen = _chosen_metadata(text)
    if any(Path(folder, name).is_file() for name in FIGURES.values()):
        build_card(folder, **chosen)  # the pictures show the old numbers
    else:
        # What a person wrote around it stays
        write_bytes(path, merge_card(text, render_model_card(report, **chosen)).encode("utf-8"))
    return True


def is_own_card(text: str) -> bool:
    """Whether a card is one of ours, by the sentence that says where its numbers are from."""
    return _ORIGIN in text


def _chosen_metadata(text: str) -> dict[str, Any]:
    """What a card of ours has that was given when it was made, and is not in the report."""
    import yaml

    chosen: dict[str, Any] = {"model_name": None, "license": None}
    front = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    try:
        metadata = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return chosen
    if isinstance(metadata, dict):
        licence = {key: metadata[key] for key in _LICENCE_KEYS if key in metadata}
        chosen["license"] = licence if "license" in licence else None
        index = metadata.get("model-index")
        if isinstance(index, list) and index and isinstance(index[0], dict) and isinstance(index[0].get("name"), str):
            chosen["model_name"] = index[0]["name"]
    return chosen


def _is_intervention(report: UnlearningReport) -> bool:
    return report.method is not None and report.method.name in INTERVENTIONS


def _intervention_settings(report: UnlearningReport) -> list[str]:
    """What the settings of an intervention add to its problem."""
    settings = report.method.settings if report.method else {}
    return [words for name, words in SETTINGS.items() if settings.get(name) not in (None, False, "none")]


def _reveals_tokens(report: UnlearningReport) -> bool:
    """Whether the rows of the LM head that changed are those of the forbidden tokens, and no others."""
    return report.method is not None and report.method.name in ("vocabulary", "vocabulary_universal")


def _is_adapter(report: UnlearningReport) -> bool:
    """Whether the release is an adapter. One that was trained may have been merged: then its file is not there."""
    has_file = any(os.path.basename(file.path).startswith("adapter_model") for file in report.files)
    # The weights that an intervention chose say nothing of how the edit is stored
    if report.method is None or (_is_intervention(report) and report.files):
        return has_file
    return report.method.scope.kind in ("lora", "peft") and (has_file or not report.files)


def _model_folder(report: UnlearningReport) -> str:
    """Where the model lies, seen from the card: `"/model"` where all files are in one folder, else nothing."""
    folders = {os.path.dirname(file.path) for file in report.files if not file.path.startswith("figures/")}
    return f"/{folders.pop()}" if len(folders) == 1 and "" not in folders else ""


def _licence_words(license: str | Mapping[str, Any] | None) -> str | None:
    """What a licence is called for a person."""
    if isinstance(license, Mapping):
        license = license.get("license_name", license.get("license"))
    return ", ".join(license) if isinstance(license, list) else license


def _metadata(
    report: UnlearningReport, model_name: str | None, license: str | Mapping[str, Any] | None
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"license": license} if isinstance(license, str) else dict(license or {})
    metadata |= {
        "library_name": "peft" if _is_adapter(report) else "transformers",
        "pipeline_tag": "text-generation",
    }
    if report.method is None:
        # The model itself is the base, and nothing says that it is an unlearned one.
        metadata["tags"] = ["hf-unlearn"]
        return metadata | _model_index(report, model_name)
    if report.base.model_id:
        metadata["base_model"] = report.base.model_id
        metadata["base_model_relation"] = "adapter" if _is_adapter(report) else "finetune"
    # The probe is a part of PRISM, and no method by itself
    names = [loss.name for loss in report.method.forget_losses if loss.name != "probe"]
    if _is_intervention(report):
        names = [report.method.name]
    elif set(used_wrappers(report.method.settings)) >= PRISM:
        names.append("prism")
    methods = dict.fromkeys(f"unlearning-method:{name}" for name in names or [report.method.name])
    metadata["tags"] = ["unlearning", "machine-unlearning", "llm-unlearning", "hf-unlearn", *methods]
    summaries = filter(None, (report.data.forget, report.data.retain))
    datasets = dict.fromkeys(summary.benchmark.dataset_id for summary in summaries if summary.benchmark)
    if datasets:
        metadata["datasets"] = list(datasets)
    return metadata | _model_index(report, model_name)


def _model_index(report: UnlearningReport, model_name: str | None) -> dict[str, Any]:
    """
    The released model's numbers. What there was before, and a control, are other models: they are in the body alone.
    """
    results = [
        {
            "task": {"type": "text-generation", "name": "Text generation"},
            # Never the data set by its name: evaluation may have been on other rows of it
            "dataset": {"type": name, "name": SETS[name].capitalize()},
            "metrics": [
                {"type": metric, "value": value, "name": metric_label(metric) or metric}
                for metric, value in report.metrics.after[name].items()
                if not is_count(metric) and not re.search(r"_ci_(low|high)$", metric)
            ],
        }
        for name in SETS
        if report.metrics.after.get(name)
    ]
    results = [result for result in results if result["metrics"]]
    if model_name is None or not results:
        return {}
    return {"model-index": [{"name": model_name, "results": results}]}


def rule_cells(rule: Rule) -> dict[str, Any]:
    from hf_unlearn.cards import robustness

    kind, _, name = rule.name.partition(".")
    known = kind in ("left", "kept", "recovered") or name in ("repetition", "generation_perplexity")
    if kind in ("left", "kept", "recovered", "fluent") and known:
        return robustness.rule_cells(rule)
    # Of a report from elsewhere: which way the bound goes is not known
    holds = "not measured" if rule.holds is None else "yes" if rule.holds else "**no**"
    return {
        "words": md_code(rule.name),
        "sign": "",
        "bound": number(rule.bound),
        "measured": number(rule.measured),
        "holds": holds,
    }


def _curve_rows(attacks: list[AttackResult]) -> list[list[str]]:
    from hf_unlearn.cards import robustness

    return [cells for _, worst in robustness.worst_results(attacks) for cells in robustness.curve_cells(worst)]


def _verdict(report: UnlearningReport) -> str:
    """One sentence by rule. It is judged by the numbers as displayed, so that it cannot contradict them."""
    before, after = (values.get("forget", {}) for values in (report.metrics.before, report.metrics.after))
    if "probability" in before and "probability" in after:
        fell = float(f"{after['probability']:.3g}") < float(f"{before['probability']:.3g}")
        removal = ", not proven removal," if report.attacks else ""
        measured = f"{f'Suppression{removal}' if fell else 'No suppression'} measured under the metrics below"
    elif before and after:
        measured = "Suppression not judged: the metrics below do not hold the probability of the forget set"
    elif after:
        measured = "The forget set was not measured before, so nothing is known about what was suppressed"
    else:
        measured = "The forget set was not measured both before and after, so nothing is known about what is left"
    return f"{measured}; {_attack_verdict(report.attacks)}."


def _attack_verdict(attacks: list[AttackResult]) -> str:
    if not attacks:
        return "no attack was run, so nothing is known about what comes back"
    count = f"of {len(attacks)} attacks that were run" if len(attacks) > 1 else "of the one attack that was run"
    figures = [attack for attack in attacks if attack.recovered is not None]
    if not figures:
        return f"{count}, none gave a recovery figure, so nothing is known about what comes back"
    worst = max(figures, key=lambda attack: attack.recovered)
    return f"{count}, {md_code(worst.name)} brought back most, {share(worst.recovered)}"


def _value(value: float | int | str) -> str:
    """A value of a certificate: counts in full, measures to three digits."""
    if isinstance(value, str):
        return md_cell(md_code(value))
    return integer(value) if isinstance(value, int) else number(value)


def _percent(part: float, whole: float) -> str:
    return f"{number(100 * part / whole)}%"


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    # No line folding: within a fenced block, every line has to start with its key.
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=float("inf"))


@functools.cache  # a template is compiled once, and a run writes a card at every checkpoint
def template_environment() -> "jinja2.Environment":
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_unlearn.cards", "templates"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "md_escape": md_escape,
        "md_code": md_code,
        "md_cell": md_cell,
        "number": number,
        "integer": integer,
        "count": lambda value: "–" if value is None else integer(value),
        "value": _value,
        "percent_of": _percent,
        "share": share,
        "yaml": _yaml,
        "without_none": lambda values: {name: value for name, value in values.items() if value is not None},
    }
    return environment
