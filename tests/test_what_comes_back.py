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
"""The table and picture of `benchmarks/what_comes_back.py`, and that its stored results are what the docs say."""

import json
import re
from pathlib import Path

import pytest
import what_comes_back


ROOT = Path(__file__).parents[1]


def run(method, seed, forget, relearned):
    """A run whose relearning curve ends at `relearned`."""
    metrics = {
        "after": {"forget": {"probability": forget, "repetition": 0.0}, "retain": {"probability": 0.94}},
    }
    curve = [
        {"at": step, "unlearned": score, "original": 0.9, "control": 0.1}
        for step, score in ((0, forget), (10, relearned))
    ]
    attacks = [
        {"name": "relearn", "recovered": (relearned - 0.1) / 0.8, "curve": curve},
        {"name": "gcg", "recovered": None, "curve": []},
    ]
    return {
        "method": method, "seed": seed, "metrics": metrics, "attacks": attacks, "verdict": {"outcome": "comes_back"},
    }  # fmt: skip


@pytest.fixture
def runs():
    return [run("npo", 0, 0.1, 0.3), run("npo", 1, 0.1, 0.5), run("ga", 0, 0.1, 0.1)]


def test_table_has_means_and_ranges(runs):
    lines = what_comes_back.format_table(runs).splitlines()
    assert lines[0] == "| | ga | npo |"
    assert "| *probability, forget* | 0.10 (0.10–0.10) | 0.10 (0.10–0.10) |" in lines
    assert "| relearn | 0.00 (0.00–0.00) | 0.38 (0.25–0.50) |" in lines
    assert "| gcg | – | – |" in lines
    assert lines[-1] == "| verdict | comes_back | comes_back, comes_back |"


def test_picture(runs, tmp_path):
    pytest.importorskip("matplotlib")
    import matplotlib.image

    what_comes_back.draw(runs, str(tmp_path / "a.png"))
    runs[0] = run("npo", 0, 0.1, 0.9)
    what_comes_back.draw(runs, str(tmp_path / "b.png"))
    first, second = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in "ab")
    assert first.std() > 0.01 and (first.shape != second.shape or (first != second).any())


def test_the_table_of_the_docs_is_that_of_the_stored_results():
    stored = json.loads((ROOT / "benchmarks" / "results" / "what_comes_back_cpu.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "what_comes_back.md").read_text(encoding="utf-8")
    table = what_comes_back.format_table(stored["runs"])
    assert table in text
    assert {run["method"] for run in stored["runs"]} == set(what_comes_back.NAMES)
    # Under three minutes a model: what the command took, the first time with the original and the control
    assert max(run["command_seconds"] for run in stored["runs"]) < 180
    # Numbers per row stay in private/
    assert not re.search(r'"rows": \[', json.dumps(stored))
