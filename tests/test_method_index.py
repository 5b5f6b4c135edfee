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
"""The indexes in docs/ have every name that the code has, and no other."""

import re
from pathlib import Path

import pytest

from hf_unlearn import FORGET_LOSSES, RETAIN_LOSSES, UnlearnConfig
from hf_unlearn.attacks.table import ATTACKS
from hf_unlearn.intervention_config import KINDS
from hf_unlearn.metrics.statistics import UTILITY_METRICS
from hf_unlearn.robustness.gradient_conflict import GRADIENT_CONFLICT
from hf_unlearn.robustness.quantization import QUANTIZATION
from hf_unlearn.robustness.sharpness import SHARPNESS, SHARPNESS_RADII


DOCS = Path(__file__).parents[1] / "docs"


def tables(page: str, heading: str) -> list[list[list[str]]]:
    """The tables of a section, their rows without the header, each as its cells."""
    text = (DOCS / page).read_text(encoding="utf-8")
    [section] = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in block.splitlines()]
        assert {len(row) for row in rows[2:]} <= {len(rows[0])}, f"{page}, {heading}: a row of another width"
        found.append(rows[2:])
    return found


def names(rows: list[list[str]]) -> list[str]:
    return [re.match(r"`([^`]+)`", row[0])[1] for row in rows]


@pytest.mark.parametrize("table", [0, 1], ids=["formula", "use"])
def test_every_forget_loss_stands_in_both_tables(table):
    assert sorted(names(tables("methods.md", "Forget losses")[table])) == sorted(FORGET_LOSSES)


def test_the_settings_of_losses_and_their_defaults_are_those_of_the_table():
    for row in tables("methods.md", "Forget losses")[0]:
        loss = FORGET_LOSSES[row[0].strip("`")]
        for setting, default in loss.settings.items():
            assert f"`{setting}` ({default:g})" in row[2], (row[0], setting)


def test_every_retain_loss_stands_in_the_table():
    assert sorted(names(tables("methods.md", "Retain losses")[0])) == sorted([*RETAIN_LOSSES, "none"])


def test_every_wrapper_stands_in_the_table():
    choices = {
        *(f"sharpness={name}" for name in SHARPNESS if name != "none"),
        *(f"gradient_conflict={name}" for name in GRADIENT_CONFLICT if name != "none"),
        *(f"quantization_margin={name}" for name in QUANTIZATION if name != "none"),
    }
    others = {
        *("reference_noise_std", "weight_averaging_start", "retain_null_space", "probe_weight"),
        "latent_adversary_layers",
    }
    assert set(names(tables("methods.md", "Wrappers")[0])) == choices | others
    assert others <= set(UnlearnConfig.__dataclass_fields__)


def test_the_defaults_of_wrappers_are_those_of_the_code():
    rows = {name: row[2] for name, row in zip(*both("methods.md", "Wrappers"), strict=True)}
    fields = UnlearnConfig.__dataclass_fields__
    assert rows["sharpness=sam"] == f"ρ {SHARPNESS_RADII['sam']:g}"
    assert rows["sharpness=randomized"] == "σ 1e-4, 3 draws"
    assert (SHARPNESS_RADII["randomized"], fields["sharpness_draws"].default) == (1e-4, 3)
    for name in ("gradient_penalty", "curvature"):
        assert rows[f"sharpness={name}"] == f"w {fields['sharpness_weight'].default:g}"
    assert rows["latent_adversary_layers"] == f"off, {fields['latent_adversary_steps'].default} steps"


def both(page: str, heading: str) -> tuple[list[str], list[list[str]]]:
    rows = tables(page, heading)[0]
    return names(rows), rows


def test_every_kind_of_intervention_stands_in_the_table():
    assert set(names(tables("methods.md", "Interventions")[0])) == set(KINDS)


@pytest.mark.parametrize("heading", ["The attacks", "What none of them can tell"])
def test_every_attack_stands_in_both_tables(heading):
    assert names(tables("attacks.md", heading)[0]) == list(ATTACKS)


def test_attacks_that_need_a_control_are_marked():
    marked = {row[0].split("`")[1] for row in tables("attacks.md", "The attacks")[0] if row[0].endswith("†")}
    assert marked == {name for name, entry in ATTACKS.items() if entry.needs_control}


def test_every_metric_that_utility_reads_is_explained():
    assert set(UTILITY_METRICS) <= set(names(tables("metrics.md", "All of them")[0]))


def test_the_index_names_every_page():
    text = (DOCS / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in DOCS.glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\]\((\w+\.md)\)", text)) == pages


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_between_pages_lead_somewhere(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)", text):
        assert (DOCS / target).exists(), f"{page}: {target}"
