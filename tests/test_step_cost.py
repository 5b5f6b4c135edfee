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
"""A step costs no more than promised, and does the same work as a naive one: benchmarks/step_cost.py, asserted."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import step_cost
import torch
from measuring import count_flops


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SEED = 0
CHECKPOINTED = "ours, checkpointed"


@pytest.mark.parametrize("name", step_cost.CASES)
def test_same_work_within_the_bounds(name: str) -> None:
    case = step_cost.CASES[name]
    results = step_cost.measure_case(case, SEED, "cpu", repeats=0, variants=["naive", "ours"])
    for result in results.values():
        assert result["flops"] == pytest.approx(result["flops_expected"], rel=1e-4)
    ours = results["ours"]
    assert ours["relative_difference"]["loss"] <= step_cost.TOLERANCE
    assert ours["relative_difference"]["gradient"] <= step_cost.TOLERANCE
    for quantity, ratio in ours["ratio"].items():
        assert ratio <= case.bounds.get(quantity, 1.0), f"{quantity}: {ratio:.3f} of the naive step"


@pytest.mark.parametrize("name", step_cost.DEEP_CASES)
def test_what_is_shared_and_cached_in_32_layers(name: str) -> None:
    """The shares of Zephyr-7B: what layers below the first trained one cost, and the reference."""
    case = replace(step_cost.DEEP_CASES[name], shape=step_cost.zephyr_shape(32))
    variants = ["naive", "ours", *case.cache_bounds]
    results = step_cost.measure_case(case, SEED, "cpu", repeats=0, variants=variants)
    for variant, result in results.items():
        assert result["flops"] == pytest.approx(result["flops_expected"], rel=1e-4)
        assert result["relative_difference"]["gradient"] <= step_cost.TOLERANCE
        for quantity, bound in case.bounds_of(variant).items():
            assert result["ratio"][quantity] <= bound, f"{variant}, {quantity}: {result['ratio'][quantity]:.3f}"


@pytest.mark.parametrize("name", step_cost.CASES)
def test_caches_leave_the_trained_part(name: str) -> None:
    case = step_cost.CASES[name]
    for variant in ("ours, prefix cached", "ours, all cached"):
        flops = count_flops(partial(step_cost.run_step, step_cost.VARIANTS[variant](case, SEED, "cpu")))
        assert sum(flops.values()) == pytest.approx(step_cost.expected_flops(case, variant), rel=1e-4)


@pytest.mark.parametrize("name", step_cost.CASES)
def test_comparison_has_something_to_compare(name: str) -> None:
    """At the reference itself the retain term of RMU has no gradient, and equality would say little."""
    case = step_cost.CASES[name]
    naive, moved = step_cost.NaiveStep(case, SEED, "cpu"), step_cost.NaiveStep(case, SEED, "cpu")
    reference = step_cost.trained_matrices(moved.reference, case)
    for parameter, original in zip(moved.matrices.values(), reference.values(), strict=True):
        parameter.data.copy_(original)
    differences = step_cost.relative_differences(moved, naive)
    assert differences["gradient"] > 1e-2


@pytest.mark.parametrize("name", step_cost.CASES)
def test_checkpointing_runs_only_trained_layers_again(name: str) -> None:
    """transformers makes the embeddings require a gradient, so that frozen layers would be run again too."""
    case = step_cost.CASES[name]
    flops = count_flops(partial(step_cost.run_step, step_cost.VARIANTS[CHECKPOINTED](case, SEED, "cpu")))
    assert sum(flops.values()) == pytest.approx(step_cost.expected_flops(case, CHECKPOINTED), rel=1e-4)


def test_unequal_work_is_refused() -> None:
    step_cost.require_equal({"loss": 0.0, "gradient": step_cost.TOLERANCE})
    for difference in (2 * step_cost.TOLERANCE, float("nan")):
        with pytest.raises(RuntimeError, match="The gradient differs"):
            step_cost.require_equal({"loss": 0.0, "gradient": difference})


def test_peak_memory_counts_storages_once_until_they_die() -> None:
    with step_cost.PeakMemory() as memory:
        a = torch.ones(256)  # 1 KiB
        view = a.view(16, 16)[0]
        b = a + 1
        assert (memory.alive, memory.peak) == (2048, 2048)
        del a
        assert memory.alive == 2048, "a view keeps its storage"
        del view, b
        assert (memory.alive, memory.peak) == (0, 2048)
        x = torch.ones(256, requires_grad=True)
        (x * x).sum().backward()
        assert memory.alive == 2048, "the parameter and its gradient"


def test_readme_shows_the_stored_results() -> None:
    stored = json.loads((BENCHMARKS / "results" / "step_cost_cpu.json").read_text(encoding="utf-8"))
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert step_cost.format_table(stored["cases"]) in readme
    assert stored["command"] in readme
    assert stored["machine"]["cpu"] in readme
    for name, case in step_cost.ALL_CASES.items():
        for variant, result in stored["cases"][name].items():
            with case.shaped():
                assert result["flops_expected"] == step_cost.expected_flops(case, variant)
            assert stored["bounds"][name].get(variant, {}) == case.bounds_of(variant)
            for quantity, bound in case.bounds_of(variant).items():
                assert result["ratio"][quantity] <= bound
            if name in step_cost.DEEP_CASES and variant != CHECKPOINTED:
                assert result["ratio"]["seconds"] <= step_cost.TIME_OVER_FLOPS * result["ratio"]["flops"]


@pytest.mark.slow
def test_rmu_takes_at_most_half_the_time() -> None:
    case = step_cost.CASES["rmu"]
    steps = {name: step_cost.VARIANTS[name](case, SEED, "cpu") for name in ("naive", "ours")}
    seconds = step_cost.measure_seconds(steps, repeats=11, device="cpu")
    assert step_cost.ratio_of_pairs(seconds["ours"], seconds["naive"]) <= case.bounds["seconds"]


@pytest.mark.slow
@pytest.mark.parametrize("name", step_cost.DEEP_CASES)
def test_time_follows_the_work(name: str) -> None:
    """On an idle machine: what is not computed is not waited for either."""
    case = step_cost.DEEP_CASES[name]
    variants = ["naive", "ours", *case.cache_bounds]
    results = step_cost.measure_case(case, SEED, "cpu", repeats=11, variants=variants)
    for variant in variants:
        ratio = results[variant]["ratio"]
        assert ratio["seconds"] <= step_cost.TIME_OVER_FLOPS * ratio["flops"], variant


@pytest.mark.slow
def test_command_writes_table_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    path = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["step_cost.py", "--repeats", "1", "--json", str(path)])
    step_cost.main()
    results = json.loads(path.read_text(encoding="utf-8"))
    assert step_cost.format_table(results["cases"]) in capsys.readouterr().out
    assert str(tmp_path) not in path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_large_benchmark_runs_on_a_tiny_shape(tmp_path: Path) -> None:
    """In a process of its own: it gives `step_cost` other sizes. The 7B shape itself needs a GPU."""
    path = tmp_path / "results.json"
    command = [sys.executable, str(BENCHMARKS / "large_model.py"), "--shape", "tiny", "--device", "cpu"]
    subprocess.run([*command, "--repeats", "1", "--json", str(path)], check=True, capture_output=True)
    report = json.loads(path.read_text(encoding="utf-8"))
    steps = report["steps"]
    assert steps["rmu, layer 7"]["flops"] < 0.5 * steps["naive rmu"]["flops"]
    assert steps["npo + kl"]["flops"] < 0.75 * steps["naive npo"]["flops"]
    assert steps["npo + kl, lora, sam"]["flops"] > steps["npo + kl, lora"]["flops"]
    assert all(0 < step["roofline"] < 1 for step in steps.values())
    assert report["dual"]["constraints"] == 64
