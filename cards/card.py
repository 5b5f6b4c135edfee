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

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_unlearn.cards.interventions import CITATION, INTERVENTIONS, PAPER, SETTINGS
from hf_unlearn.cards.losses import CITATIONS, describe_losses
from hf_unlearn.cards.markdown import integer, md_cell, md_code, md_escape, number, share
from hf_unlearn.cards.metric_table import KEPT, SETS, metric_columns, metric_rows, metric_words, words_for
from hf_unlearn.cards.report import REPORT_NAME, AttackResult, UnlearningReport, write_text
from hf_unlearn.cards.wrappers import PRISM, describe_wrappers, used_wrappers


if TYPE_CHECKING:
    import jinja2


CARD_NAME = "README.md"
# By this sentence a card is known as one of ours.
_ORIGIN = f"Every number here is rendered from `{REPORT_NAME}`"
_MAX_MODULES = 20


def render_model_card(report: UnlearningReport) -> str:
    """
    Render the model card of an unlearned model. Every number in it comes from the report.

    Args:
        report ([`UnlearningReport`]):
            The report that is released beside the card. The card names its hash, so save the same report.

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
        _environment()
        .get_template("model_card.md.jinja")
        .render(
            report=report,
            report_name=REPORT_NAME,
            origin=_ORIGIN,
            report_sha256=hashlib.sha256(report.to_json().encode()).hexdigest(),
            metadata=_metadata(report),
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
    path = Path(folder, CARD_NAME)
    if not path.is_file() or _ORIGIN not in path.read_text(encoding="utf-8", errors="replace"):
        return False
    write_model_card(report, folder)
    return True


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
    folders = {os.path.dirname(file.path) for file in report.files}
    return f"/{folders.pop()}" if len(folders) == 1 and "" not in folders else ""


def _metadata(report: UnlearningReport) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "library_name": "peft" if _is_adapter(report) else "transformers",
        "pipeline_tag": "text-generation",
    }
    if report.method is None:
        # The model itself is the base, and nothing says that it is an unlearned one.
        metadata["tags"] = ["hf-unlearn"]
        return metadata
    if report.base.model_id:
        metadata["base_model"] = report.base.model_id
        metadata["base_model_relation"] = "adapter" if _is_adapter(report) else "finetune"
    # The probe is a part of PRISM, and no method by itself
    names = [loss.name for loss in report.method.forget_losses if loss.name != "probe"]
    if _is_intervention(report):
        names = [report.method.name]
    elif set(used_wrappers(report.method.settings)) >= PRISM:
        names.append("prism")
    methods = dict.fromkeys(f"unlearning-method:{name}" for name in names)
    metadata["tags"] = ["unlearning", "machine-unlearning", "llm-unlearning", "hf-unlearn", *methods]
    return metadata


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


def _environment() -> "jinja2.Environment":
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
        "value": _value,
        "percent_of": _percent,
        "share": share,
        "yaml": _yaml,
        "without_none": lambda values: {name: value for name, value in values.items() if value is not None},
    }
    return environment
