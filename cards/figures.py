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
"""Pictures of a report: what comes back under which attack and budget, and along which curve."""

import os
import textwrap
from importlib.util import find_spec
from typing import TYPE_CHECKING, BinaryIO

from hf_unlearn.cards.markdown import number, share
from hf_unlearn.cards.metric_table import METRICS, SETS, metric_columns
from hf_unlearn.cards.report import AttackResult, UnlearningReport
from hf_unlearn.cards.robustness import BUDGETS, budget_name, worst_results
from hf_unlearn.cards.verdict import share_left


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Of the palette of Okabe and Ito, which people with a colour vision deficiency can tell apart
_LINES = {"unlearned": ("#d55e00", "-", "o"), "original": ("#0072b2", "--", "s"), "control": ("#009e73", ":", "^")}
_LABELS = {"unlearned": "unlearned", "original": "original", "control": "control (never saw it)"}

_LOGARITHMIC = ("sigma",)

_NO_ATTACK = "(no attack)"


def can_draw() -> bool:
    """Whether matplotlib is installed (`pip install 'hf-unlearn[plots]'`)."""
    return find_spec("matplotlib") is not None


def draw_heat_map(report: UnlearningReport, path: str | os.PathLike) -> bool:
    """
    Draws what came back: a row for each attack, a column for each budget, in a cell the highest share over seeds. The
    first row is what is there without any attack.

    Args:
        report ([`UnlearningReport`]): with attacks.
        path (`str` or `os.PathLike`): the PNG.

    Returns:
        `bool`: whether there was anything to draw.
    """
    chosen = {(result.name, budget_name(result)): result for _, result in worst_results(report.attacks)}
    if not chosen:
        return False
    names = list(dict.fromkeys(name for name, _ in chosen))
    found = {budget for _, budget in chosen}
    budgets = [*(budget for budget in BUDGETS if budget in found), *sorted(found - set(BUDGETS))]
    values = [[_recovered(chosen.get((name, budget))) for budget in budgets] for name in names]
    left = share_left(report, "probability")
    if left is not None:
        names, values = [_NO_ATTACK, *names], [[left] * len(budgets), *values]
    figure = _figure(3 + 1.3 * len(budgets), 1.2 + 0.34 * len(names))
    axes = figure.subplots()
    shown = [[float("nan") if value is None else min(max(value, 0.0), 1.0) for value in row] for row in values]
    image = axes.imshow(shown, vmin=0, vmax=1, cmap="YlOrRd", aspect="auto")
    for row, name in enumerate(names):
        for column, budget in enumerate(budgets):
            value = values[row][column]
            text = "–" if (name, budget) in chosen else "not run"
            text = text if value is None else f"{value:.2f}"
            colour = "white" if value is not None and value > 0.6 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(budgets)), budgets)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("budget of the attacker")
    axes.set_title("recovered share (–: no figure)", fontsize=9)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0: the control's", "0.5", "1: the original's"], fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return True


def draw_recovery_curves(report: UnlearningReport, path: str | os.PathLike) -> bool:
    """
    Draws the forget score along one setting of each attack, for the unlearned model, the original and the control; of
    several budgets the strongest, of several seeds the one that brought back most.

    Args:
        report ([`UnlearningReport`]): with attacks.
        path (`str` or `os.PathLike`): the PNG.

    Returns:
        `bool`: whether there was anything to draw.
    """
    # By budget in increasing strength: the last of an attack is its strongest
    curves = {result.name: result for _, result in worst_results(report.attacks) if len(result.curve) > 1}
    if not curves:
        return False
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = _figure(1 + 2.6 * columns, 0.7 + 2.0 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for place, (name, result) in enumerate(curves.items()):
        _draw_curve(panels[place // columns][place % columns], name, result)
    for place in range(len(curves), rows * columns):
        panels[place // columns][place % columns].axis("off")
    figure.supylabel("forget score", fontsize=9)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return True


def _draw_curve(axes: "Axes", name: str, result: AttackResult) -> None:
    for role, (colour, style, marker) in _LINES.items():
        points = [(point.at, getattr(point, role)) for point in result.curve]
        points = [(at, score) for at, score in points if score is not None]
        axes.plot(
            *zip(*points, strict=True) if points else ([], []),
            style,
            marker=marker,
            markersize=3,
            color=colour,
            label=_LABELS[role],
        )
    axes.axhline(result.score_before, color="grey", linewidth=0.8, label="unlearned, before the attack")
    if result.axis in _LOGARITHMIC:
        axes.set_xscale("log")
    elif all(point.at == int(point.at) for point in result.curve):
        axes.set_xticks([int(point.at) for point in result.curve][:: max(1, len(result.curve) // 6)])
    axes.set_ylim(-0.03, 1.03)
    axes.set_title("\n".join(textwrap.wrap(f"{name} ({budget_name(result)})", 28)), fontsize=8)
    axes.set_xlabel(result.axis, fontsize=8)
    axes.tick_params(labelsize=7)


def _recovered(result: AttackResult | None) -> float | None:
    return None if result is None else result.recovered


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    return Figure(figsize=(width, height), layout="constrained")


# Metrics between 0 and 1, which bars can compare
_SHARES = (
    "probability",
    "rougeL_recall",
    "exact_memorization",
    "extraction_strength",
    "truth_ratio",
    "choice_accuracy",
    "verbatim_memorization",
    "knowledge_memorization",
    "model_utility",
    "refusal_rate",
)
_BARS = {"before": "#0072b2", "after": "#d55e00", "control": "#009e73"}
_OF = {"before": "before", "after": "after", "control": "for the control"}
_OUTSIDE = "outside the layers"
_MAX_NUMBERS = 160  # cells in which a number is still legible


def footprint_grid(report: UnlearningReport) -> dict[str, dict[str, float]]:
    """
    How far each layer's modules moved.

    Args:
        report ([`UnlearningReport`]): with a footprint that lists modules.

    Returns:
        `dict[str, dict[str, float]]`: layer -> module -> `‖Δ‖/‖W‖`, the largest where there are several, as of
        experts; layers in order, then the tensors outside them.

    Example:

    ```python
    >>> from hf_unlearn.cards.figures import split_name
    >>> split_name("model.layers.5.mlp.down_proj.weight"), split_name("model.embed_tokens.weight")
    (('5', 'mlp.down_proj'), ('outside the layers', 'embed_tokens'))

    ```
    """
    grid: dict[str, dict[str, float]] = {}
    for module in report.footprint.modules if report.footprint else []:
        layer, name = split_name(module.name)
        row = grid.setdefault(layer, {})
        row[name] = max(row.get(name, 0.0), module.relative_norm)
    return dict(sorted(grid.items(), key=lambda item: (item[0] == _OUTSIDE, int(item[0]) if item[0].isdigit() else 0)))


def split_name(tensor: str) -> tuple[str, str]:
    """Layer and module of a tensor; the number of an expert becomes `*`."""
    parts = tensor.removesuffix(".weight").split(".")
    place = next((place for place, part in enumerate(parts[:-1]) if part.isascii() and part.isdigit()), None)
    if place is None:
        return _OUTSIDE, parts[-1]
    return str(int(parts[place][:9])), ".".join("*" if part.isdigit() else part for part in parts[place + 1 :])


def draw_footprint(report: UnlearningReport, path: "str | os.PathLike | BinaryIO") -> bool:
    """
    Draws how far the weights moved: a row for each layer, a column for each module, in a cell `‖Δ‖/‖W‖`.

    Args:
        report ([`UnlearningReport`]): with a footprint.
        path (`str`, `os.PathLike` or a binary file): the PNG.

    Returns:
        `bool`: whether there was anything to draw.
    """
    grid = footprint_grid(report)
    if not grid:
        return False
    names = list(dict.fromkeys(name for row in grid.values() for name in row))
    shown = [[row.get(name, float("nan")) for name in names] for row in grid.values()]
    figure = _figure(2.6 + 0.75 * len(names), 1.6 + min(0.34 * len(grid), 9))
    axes = figure.subplots()
    largest = max(value for row in grid.values() for value in row.values())
    image = axes.imshow(shown, vmin=0, vmax=largest or 1, cmap="YlOrRd", aspect="auto")
    if len(names) * len(grid) <= _MAX_NUMBERS:
        for place, row in enumerate(grid.values()):
            for column, name in enumerate(names):
                colour = "white" if row.get(name, 0) > 0.6 * largest else "black"
                text = f"{row[name]:.2g}" if name in row else "–"
                axes.text(column, place, text, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=45, ha="right", rotation_mode="anchor")
    step = -(-len(grid) // 40)
    labels = [layer if layer == _OUTSIDE else f"layer {layer}" for layer in grid]
    axes.set_yticks(range(0, len(grid), step), labels[::step], fontsize=8)
    axes.tick_params(length=0)
    axes.set_title("‖Δ‖/‖W‖ (–: unchanged)", fontsize=9)
    figure.colorbar(image, ax=axes).ax.tick_params(labelsize=8)
    _save(figure, path)
    return True


def draw_before_after(report: UnlearningReport, path: "str | os.PathLike | BinaryIO") -> bool:
    """
    Draws the metrics between 0 and 1: a panel for each, in it a group of bars for each set, with 95 % intervals where
    the report has them.

    Args:
        report ([`UnlearningReport`]): with metrics before and after.
        path (`str`, `os.PathLike` or a binary file): the PNG.

    Returns:
        `bool`: whether there was anything to draw.
    """
    panels = _panels(report)
    if not panels:
        return False
    from matplotlib.patches import Patch

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    groups = max(len(own) for own in panels.values())
    figure = _figure(1 + columns * (1.3 + 0.8 * groups), 0.7 + 2.1 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    places = [axes for row in grid for axes in row]
    used = [stage for stage in _BARS if any(stage in own for sets in panels.values() for own in sets.values())]
    for axes, (metric, own) in zip(places, panels.items(), strict=False):
        width = 0.8 / len(used)
        for place, stages in enumerate(own.values()):
            for offset, (stage, (value, low, high)) in enumerate(stages.items()):
                at = place + (offset - (len(stages) - 1) / 2) * width
                axes.bar(at, value, width, color=_BARS[stage])
                if low < high:
                    ends = [[max(0.0, value - low)], [max(0.0, high - value)]]
                    axes.errorbar(at, value, ends, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
                axes.text(at, max(value, high) + 0.02, f"{value:.2g}", ha="center", va="bottom", fontsize=7)
        axes.set_xlim(-0.6, groups - 0.4)
        axes.set_ylim(0, 1.15)
        axes.set_yticks([0, 0.5, 1])
        axes.set_xticks(range(len(own)), [SETS[name] for name in own], fontsize=8)
        axes.set_title(METRICS[metric].label, fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in places[len(panels) :]:
        axes.axis("off")
    handles = [Patch(color=_BARS[stage], label=stage) for stage in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(used), frameon=False, fontsize=8)
    _save(figure, path)
    return True


def _panels(report: UnlearningReport) -> dict[str, dict[str, dict[str, tuple[float, float, float]]]]:
    """Metric -> set -> `before`, `after` or `control` -> value and the ends of its interval."""
    panels: dict[str, dict[str, dict[str, tuple[float, float, float]]]] = {}
    if not report.metrics.before:
        return panels
    for metric in _SHARES:
        for name, stage, values in metric_columns(report.metrics):
            value = values.get(metric)
            if value is not None and 0 <= value <= 1:
                low, high = (values.get(f"{metric}_ci_{end}", value) for end in ("low", "high"))
                panels.setdefault(metric, {}).setdefault(name, {})[stage] = (value, low, high)
    return panels


def describe_footprint(report: UnlearningReport) -> str:
    """What [`draw_footprint`] shows, with its numbers."""
    rows = []
    grid = footprint_grid(report)
    for layer, modules in grid.items():
        largest = sorted(modules.items(), key=lambda item: -item[1])[: 4 if len(grid) <= 16 else 1]
        cells = ", ".join(f"{name} {number(value)}" for name, value in largest)
        more = f" and {len(modules) - len(largest)} smaller" if len(modules) > len(largest) else ""
        rows.append(f"{layer if layer == _OUTSIDE else f'layer {layer}'}: {cells}{more}")
    return f"Heat map of ‖Δ‖/‖W‖ by layer and module. {'; '.join(rows)}."


def describe_before_after(report: UnlearningReport) -> str:
    """What [`draw_before_after`] shows, with its numbers."""
    parts = [
        f"{METRICS[metric].label} of the {SETS[name]}: "
        + ", ".join(f"{number(value)} {_OF[stage]}" for stage, (value, _, _) in stages.items())
        for metric, sets in _panels(report).items()
        for name, stages in sets.items()
    ]
    return f"Bars before and after unlearning. {'; '.join(parts)}."


def describe_heat_map(report: UnlearningReport) -> str:
    """What [`draw_heat_map`] shows, with its numbers."""
    left = share_left(report, "probability")
    parts = [] if left is None else [f"without any attack {share(left)}"]
    parts += [
        f"{result.name} ({budget_name(result)}) {share(result.recovered)}"
        for _, result in worst_results(report.attacks)
    ]
    return f"Heat map of the recovered share by attack and budget. {'; '.join(parts)}."


def describe_recovery_curves(report: UnlearningReport) -> str:
    """What [`draw_recovery_curves`] shows: the ends of the unlearned model's curves; all points are in a table."""
    curves = {result.name: result for _, result in worst_results(report.attacks) if len(result.curve) > 1}
    parts = [
        f"{name} ({budget_name(result)}), {result.axis} from {result.curve[0].at:g} to {result.curve[-1].at:g}: "
        f"{number(result.curve[0].unlearned)} to {number(result.curve[-1].unlearned)}, "
        f"at most {number(max(point.unlearned for point in result.curve))}"
        for name, result in curves.items()
    ]
    return f"Recovery curves: the forget score of the unlearned model under attack. {'; '.join(parts)}."


def _save(figure: "Figure", path: "str | os.PathLike | BinaryIO") -> None:
    """Without the text chunk that names the program."""
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
