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
"""What benchmarks/dual_solver.py measures, asserted: the same problems, small; the promised one in a slow test."""

import dual_solver
import pytest
import torch


@pytest.mark.parametrize("kind", dual_solver.KINDS)
def test_large_layers_are_solved_to_the_tolerance(kind):
    result = dual_solver.measure(kind, 150, seed=1, device="cpu", repeats=1)
    assert max(result["residual"], result["unscaled_residual"]) <= 1e-9
    assert result["largest_violation_after"] <= 1e-9
    assert abs(result["relative_duality_gap"]) <= 1e-9
    assert 75 <= result["active"] < 150


def test_margins_over_the_columns_that_occur():
    """The same K as with the whole vocabulary, whose other columns are zero."""
    _, directions, inputs = dual_solver.make_problem("margin", 20, seed=0)
    assert directions.shape[1] <= 40
    assert inputs.shape == (20, dual_solver.WIDTH)
    assert torch.equal(directions.sum(1), torch.zeros(20))
    assert torch.equal(directions.abs().sum(1), torch.full((20,), 2.0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", dual_solver.KINDS)
def test_promised_time(kind):
    result = dual_solver.measure(kind, dual_solver.TARGET_CONSTRAINTS, seed=0, device="cpu", repeats=1)
    assert result["seconds"] <= dual_solver.TARGET_SECONDS
    assert max(result["residual"], result["unscaled_residual"]) <= 1e-9
