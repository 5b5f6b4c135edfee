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
"""The robustness report in Markdown and its pictures: every number from the report, nothing else."""

import dataclasses

import pytest
from markdown_it import MarkdownIt

from hf_unlearn.cards import CurvePoint
from hf_unlearn.cards.figures import draw_heat_map, draw_recovery_curves
from hf_unlearn.cards.robustness import render_robustness_report, worst_results


FIGURES = {"heat_map": "figures/attacks.png", "curves": "figures/recovery_curves.png"}


@pytest.fixture
def attacked(report):
    """Two attacks, two budgets, two seeds."""
    [first] = report.attacks
    first = dataclasses.replace(first, budget={"budget": "small", "learning_rate": 2e-4}, seed=0)
    report.attacks = [
        first,
        dataclasses.replace(first, seed=1, recovered=0.6, score_after=0.55),
        dataclasses.replace(first, budget={"budget": "large", "learning_rate": 1e-3}, recovered=0.9),
        dataclasses.replace(first, name="quantize", recovered=-0.04, axis=None, curve=[], reason=None),
        dataclasses.replace(first, name="gcg", recovered=None, score_after=None, curve=[], reason="needs *nanogcg*"),
    ]
    return report


def test_the_worst_seed_of_each_attack_and_budget(attacked):
    chosen = [(result.name, result.budget["budget"], result.seed) for _, result in worst_results(attacked.attacks)]
    assert chosen == [("relearn", "small", 1), ("relearn", "large", 0), ("quantize", "small", 0), ("gcg", "small", 0)]


def test_every_row_stands_in_the_table(attacked):
    text = render_robustness_report(attacked, FIGURES)
    rows = [line for line in text.splitlines() if line.startswith("| `") and "learning_rate = " in line]
    assert rows[0].startswith(
        "| `relearn` | `small` | 60.0% (lowest 43.1%) | 0.0123 | 0.550 | 0.910 | 0.0100 | 0.850 |"
    )
    assert rows[1].startswith("| `relearn` | `large` | 90.0% |")
    # Clipped for display; the report keeps what was measured
    assert rows[2].startswith("| `quantize` | `small` | 0.0% |") and attacked.attacks[3].recovered == -0.04
    assert rows[3].startswith("| `gcg` | `small` | – |")
    assert "- `gcg`: needs \\*nanogcg\\*" in text
    assert "seeds 0, 1" in text


def test_the_verdict_stands_first_with_its_rules(attacked):
    text = render_robustness_report(attacked, FIGURES)
    assert text.index("**Hidden, not forgotten: an attack brings it back.**") < text.index("## Verdict")
    assert "| recovered by `relearn` | ≤ 0.200 | 0.431 | **no** |" in text
    assert "| Probability of the retain set: share kept | ≥ 0.900 | 0.990 | yes |" in text
    assert "Missing for a verdict of *suppressed*: relearn at two learning rates." in text
    assert "Attacks that gave no score: `gcg`." in text
    attacked.verdict = None
    assert "Verdict" not in render_robustness_report(attacked, FIGURES)


def test_pictures_are_shown_where_there_are_any(attacked):
    text = render_robustness_report(attacked, FIGURES)
    assert "](figures/attacks.png)" in text and "](figures/recovery_curves.png)" in text
    text = render_robustness_report(attacked, dict.fromkeys(FIGURES))
    assert "![" not in text and "| `relearn` | `small` | `step = 50` | 0.200 | 0.910 | 0.0100 |" in text


def test_it_is_well_formed_markdown(attacked):
    html = MarkdownIt("commonmark").enable("table").render(render_robustness_report(attacked, FIGURES))
    assert html.count("<table>") == 4 and "|---" not in html and "{{" not in html
    assert html.count("<h2>") == 5


def test_an_empty_report_says_nothing_it_does_not_know(report):
    report.attacks, report.verdict = [], None
    report.metrics = type(report.metrics)()
    text = render_robustness_report(report, dict.fromkeys(FIGURES))
    assert "Before any attack" not in text and "Recovery curves" not in text


def test_settings_cannot_break_the_table(attacked):
    attacked.attacks[0].budget["te|xt"[:2]] = "a | b"
    attacked.attacks[1].recovered = 0.1
    text = render_robustness_report(attacked, FIGURES)
    [row] = [line for line in text.splitlines() if line.startswith("| `relearn` | `small` | 43.1%")]
    assert "`te = a \\| b`" in row


def test_pictures_show_what_the_report_holds(attacked, tmp_path):
    pytest.importorskip("matplotlib")
    import matplotlib.image

    paths = tmp_path / "attacks.png", tmp_path / "curves.png"
    assert draw_heat_map(attacked, paths[0]) and draw_recovery_curves(attacked, paths[1])
    pixels = [matplotlib.image.imread(path) for path in paths]
    assert all(image.shape[0] > 100 and image.std() > 0.01 for image in pixels)
    # Another number is another picture
    attacked.attacks[0].recovered = attacked.attacks[1].recovered = 0.05
    attacked.attacks[2].curve = [CurvePoint(1, 0.9, 0.9, 0.1), CurvePoint(2, 0.9, 0.9, 0.1)]
    draw_heat_map(attacked, paths[0])
    draw_recovery_curves(attacked, paths[1])
    assert all((image != matplotlib.image.imread(path)).any() for image, path in zip(pixels, paths, strict=True))


def test_there_is_no_picture_of_nothing(report, tmp_path):
    report.attacks = []
    assert not draw_heat_map(report, tmp_path / "a.png") and not draw_recovery_curves(report, tmp_path / "b.png")
    assert list(tmp_path.iterdir()) == []
