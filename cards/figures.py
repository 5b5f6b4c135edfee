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
from typing import TYPE_CHECKING

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
    figure.savefig(path, dpi=150)
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
    figure.savefig(path, dpi=150)
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
