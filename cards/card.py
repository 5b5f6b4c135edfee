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
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_unlearn.cards.report import REPORT_NAME, AttackResult, Metrics, UnlearningReport, write_text


if TYPE_CHECKING:
    import jinja2


CARD_NAME = "README.md"
_MAX_MODULES = 20


class _Loss(NamedTuple):
    words: str
    formula: str
    citation: str | None = None


# Unlike the losses themselves, this needs no torch. A loss that is not here is listed by name and weight alone.
# No formula holds `}_`: a viewer without LaTeX would take it for the start of emphasis.
_LOSSES = {
    "ga": _Loss(
        "Gradient ascent: raises the mean cross-entropy of the forget tokens.",
        r"-\frac{1}{N} \sum_{t=1}^{N} -\log p_\theta(y_t \mid y_{\lt t})",
    ),
    "npo": _Loss(
        "Negative Preference Optimization: pushes the likelihood of each forget row below the reference model's, with "
        "a gradient that fades as the likelihood falls. β is `beta` in the settings.",
        r"-\frac{2}{\beta} \mathbb E_{x, y} \log \sigma \left( -\beta \log "
        r"\frac{p_\theta(y \mid x)}{p_{\mathrm{ref}}(y \mid x)} \right)",
        "npo",
    ),
    "rmu": _Loss(
        "Representation misdirection: steers the hidden states of the forget tokens, at one layer, towards one fixed "
        "random unit vector u, scaled by c.",
        r"\frac{1}{N D} \sum_{t=1}^{N} \lVert h_\theta(y_{\leq t}) - c u \rVert^2",
        "rmu",
    ),
    "nll": _Loss(
        "Cross-entropy: keeps the retain tokens likely.",
        r"\frac{1}{N} \sum_{t=1}^{N} -\log p_\theta(y_t \mid y_{\lt t})",
    ),
    "kl": _Loss(
        "Kullback-Leibler divergence: keeps every next-token distribution on the retain rows close to the reference "
        "model's.",
        r"\frac{1}{N} \sum_{t=1}^{N} \mathrm{KL} \left( p_{\mathrm{ref}}(\cdot \mid y_{\lt t}) \parallel "
        r"p_\theta(\cdot \mid y_{\lt t}) \right)",
    ),
    "hidden_mse": _Loss(
        "Hidden-state distance: keeps the hidden states of the retain tokens, at one layer, close to the reference "
        "model's.",
        r"\frac{1}{N D} \sum_{t=1}^{N} \lVert h_\theta(y_{\leq t}) - h_{\mathrm{ref}}(y_{\leq t}) \rVert^2",
    ),
}

_CITATIONS = {
    "npo": """\
@article{zhang2024npo,
  title   = {Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning},
  author  = {Zhang, Ruiqi and Lin, Licong and Bai, Yu and Mei, Song},
  journal = {arXiv preprint arXiv:2404.05868},
  year    = {2024}
}""",
    "rmu": """\
@article{li2024wmdp,
  title   = {The {WMDP} Benchmark: Measuring and Reducing Malicious Use With Unlearning},
  author  = {Li, Nathaniel and Pan, Alexander and Gopal, Anjali and others},
  journal = {arXiv preprint arXiv:2403.03218},
  year    = {2024}
}""",
}


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
    losses = [*report.method.forget_losses, *report.method.retain_losses]
    cited = dict.fromkeys(_LOSSES[loss.name].citation for loss in losses if loss.name in _LOSSES)
    modules = report.footprint.modules if report.footprint else []
    return (
        _environment()
        .get_template("model_card.md.jinja")
        .render(
            report=report,
            report_name=REPORT_NAME,
            report_sha256=hashlib.sha256(report.to_json().encode()).hexdigest(),
            metadata=_metadata(report),
            adapter=_is_adapter(report),
            model_folder=_model_folder(report),
            verdict=_verdict(report),
            loss_texts=_LOSSES,
            modules=sorted(modules, key=lambda module: module.relative_norm, reverse=True)[:_MAX_MODULES],
            metric_rows=_metric_rows(report.metrics),
            citations=[_CITATIONS[key] for key in cited if key],
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


def _is_adapter(report: UnlearningReport) -> bool:
    """Whether the release is an adapter. One that was trained may have been merged: then its file is not there."""
    if report.method.scope.kind not in ("lora", "peft"):
        return False
    return not report.files or any(os.path.basename(file.path).startswith("adapter_model") for file in report.files)


def _model_folder(report: UnlearningReport) -> str:
    """Where the model lies, seen from the card: `"/model"` where all files are in one folder, else nothing."""
    folders = {os.path.dirname(file.path) for file in report.files}
    return f"/{folders.pop()}" if len(folders) == 1 and "" not in folders else ""


def _metadata(report: UnlearningReport) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "library_name": "peft" if _is_adapter(report) else "transformers",
        "pipeline_tag": "text-generation",
    }
    if report.base.model_id:
        metadata["base_model"] = report.base.model_id
        metadata["base_model_relation"] = "adapter" if _is_adapter(report) else "finetune"
    methods = dict.fromkeys(f"unlearning-method:{loss.name}" for loss in report.method.forget_losses)
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
    return f"{count}, {md_code(worst.name)} brought back most, {_share(worst.recovered)}"


def _metric_rows(metrics: Metrics) -> list[dict[str, Any]]:
    rows = []
    for name in ("forget", "retain"):
        before, after = metrics.before.get(name, {}), metrics.after.get(name, {})
        counts = dict.fromkeys(_integer(values["rows"]) for values in (before, after) if "rows" in values)
        for metric in dict.fromkeys([*after, *before]):
            if metric != "rows":
                values = before.get(metric), after.get(metric)
                rows.append(
                    {
                        "set": name,
                        "metric": metric,
                        "values": values,
                        "change": _change(*values),
                        "rows": " → ".join(counts),
                    }
                )
    return rows


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None or before == 0:
        return "–"
    return f"{100 * (after - before) / abs(before):+z,.1f}%"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def _integer(value: float) -> str:
    return f"{round(value):,}"


def _percent(part: float, whole: float) -> str:
    return f"{_number(100 * part / whole)}%"


def _share(recovered: float | None) -> str:
    # Clipped for display only: the report keeps what was measured.
    return "–" if recovered is None else f"{100 * min(max(recovered, 0.0), 1.0):.1f}%"


def md_escape(text: str) -> str:
    """Make text literal in Markdown prose."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_~$#\[\]])", r"\\\1", text)


def md_code(text: str) -> str:
    """Make text a code span, within a longer run of backticks than it holds."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    padding = " " if "`" in text else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def md_cell(markdown: str) -> str:
    """Keep Markdown that is already escaped within its table cell. In tables, this holds for code spans too."""
    return markdown.replace("|", r"\|")


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
        "number": _number,
        "integer": _integer,
        "percent_of": _percent,
        "share": _share,
        "yaml": _yaml,
    }
    return environment
