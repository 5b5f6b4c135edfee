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
"""What wrappers add to a step: benchmarks/wrapper_cost.py, its FLOPs against formulas, and the table in the docs."""

import json
from pathlib import Path

import pytest
import step_cost
import wrapper_cost


ROOT = Path(__file__).parents[1]
SEED = 0
# A tiny model for `step_cost`, whose formulas hold for any size
TINY = {"HIDDEN": 32, "INTERMEDIATE": 48, "HEADS": 4, "VOCABULARY": 64, "LENGTH": 16}
NPO, RMU = "npo + kl, all 8 layers", "rmu + hidden_mse, 3 of 8 layers"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, value in TINY.items():
        monkeypatch.setattr(step_cost, name, value)


# ---- By hand: FLOPs per token, as in benchmarks/README.md ----

TOKENS, PREDICTED = 4 * 16, 4 * 15
DOWN = 2 * 32 * 48
ATTENTION = 4 * 16 * 32
LAYER = 8 * 32**2 + 3 * DOWN + ATTENTION
HEAD = 2 * 32 * 64
PROBE = 4 * 2 * (32 * 64 + 64 * 32 + 32 * 2)  # of pooled rows

# In the three trained layers: each matrix's own gradient, and below the higher two that of activations
BACKWARD = TOKENS * (3 * DOWN + 2 * (LAYER + ATTENTION))
FORGET_PASS = {
    NPO: TOKENS * 8 * LAYER + BACKWARD + 2 * PREDICTED * HEAD,
    RMU: TOKENS * 3 * LAYER + BACKWARD,
}
# What is run once for all passes over the same rows, the reference's among them: up to the input of the lowest matrix
SHARED = {NPO: TOKENS * (6 * LAYER - DOWN), RMU: TOKENS * (LAYER - DOWN)}
# Forward, and the gradient of what is added after layer 4 or 1. Only what lies below layer 5 is the same in all passes
# of NPO then, with and without what is added.
ADVERSARY_STEP = {
    NPO: TOKENS * (3 * LAYER + 3 * (LAYER + ATTENTION)) + 2 * PREDICTED * HEAD,
    RMU: TOKENS * (3 * LAYER + 1 * (LAYER + ATTENTION)) - SHARED[RMU],
}
ADVERSARY_SHARES_LESS = {NPO: TOKENS * (LAYER - DOWN), RMU: 0}
PASSES = {
    "sam": 1,
    "randomized, 3 draws": 2,
    "gradient_penalty": 1,
    "curvature": 3,
    "gradient_conflict": 0,
    "quantization_margin int4": 0,
    "weight averaging": 0,
    "noise on the reference": 0,
}


_flops: dict[tuple[str, str | None], int] = {}


def flops_of(case: str, name: str | None) -> int:
    """Measured once: the size is the same in all tests."""
    if (case, name) not in _flops:
        wrapper = None if name is None else wrapper_cost.wrappers_of(case)[name]
        _flops[case, name] = wrapper_cost.measure_flops(case, wrapper, SEED)
    return _flops[case, name]


@pytest.mark.parametrize("case", [NPO, RMU])
def test_passes_over_the_forget_rows_and_nothing_else(case: str) -> None:
    """Noise costs no product at all; a sharpness rule its passes over the forget rows, and neither a reference again
    nor the retain rows."""
    plain = flops_of(case, None)
    reference = 2 * (TOKENS * 8 * LAYER + PREDICTED * HEAD - SHARED[NPO])
    if case == RMU:
        reference = TOKENS * 3 * LAYER - SHARED[RMU]
    assert plain == 2 * FORGET_PASS[case] + reference
    for name, passes in PASSES.items():
        assert flops_of(case, name) == plain + passes * (FORGET_PASS[case] - SHARED[case]), name


@pytest.mark.parametrize("case", [NPO, RMU])
def test_bounds(case: str) -> None:
    for name, wrapper in wrapper_cost.wrappers_of(case).items():
        if "flops" in wrapper.bounds:
            assert flops_of(case, name) / flops_of(case, None) <= wrapper.bounds["flops"], name
    bounds = {name: wrapper.bounds for name, wrapper in wrapper_cost.wrappers_of(case).items() if wrapper.bounds}
    assert bounds == {
        "noise on the reference": {"flops": 1.0, "seconds": 1.03},
        "sam": {"flops": 1.6, "seconds": 1.6},
    }


@pytest.mark.parametrize("case", [NPO, RMU])
def test_adversary_stops_at_its_layer(case: str) -> None:
    for steps, name in ((1, "latent adversary, 1 step"), (4, "latent adversary, 4 steps")):
        expected = flops_of(case, None) + ADVERSARY_SHARES_LESS[case] + steps * ADVERSARY_STEP[case]
        assert flops_of(case, name) == expected, name


@pytest.mark.parametrize("case", [NPO, RMU])
def test_probe_costs_no_pass_of_its_own_unless_it_is_weighed_by_its_gradient(case: str) -> None:
    assert flops_of(case, "probe_weight") <= flops_of(case, None) + 4 * PROBE
    # That pass ends at the probe's layer, 6 or 2
    up_to_layer_6 = TOKENS * (7 * LAYER + 2 * DOWN + LAYER + ATTENTION)
    extra = flops_of(case, "probe_weight_ratio") - flops_of(case, None)
    expected = (up_to_layer_6 if case == NPO else FORGET_PASS[case]) - SHARED[case]
    assert 0 <= extra - expected <= 4 * PROBE
    together = flops_of(case, "sam + gradient_conflict + probe_weight")
    assert together <= flops_of(case, "sam") + 6 * PROBE


def test_null_space_projects_gradients_and_weights_once() -> None:
    wrapper = wrapper_cost.wrappers_of(NPO)["retain_null_space"]
    ranks = wrapper_cost.make_step(NPO, wrapper, SEED).trainer.null_space.kept_ranks
    assert len(ranks) == 3
    products = sum(2 * (2 * 2 * 32 * size * rank) for rank, size in ranks.values())
    assert flops_of(NPO, "retain_null_space") == flops_of(NPO, None) + products


@pytest.mark.slow
def test_memory_in_copies_of_the_trained_tensors(monkeypatch) -> None:
    """With hardly any activations: what `docs/robustness.md` says. A third of a copy is one of the three matrices."""
    for name, value in {"LENGTH": 4, "ROWS": 1, "HIDDEN": 64, "INTERMEDIATE": 172}.items():
        monkeypatch.setattr(step_cost, name, value)
    copy = 3 * 64 * 172 * 4
    plain = wrapper_cost.measure_peak_bytes(RMU, None, SEED)
    wrappers = wrapper_cost.wrappers_of(RMU)
    for name, copies in {
        "noise on the reference": 0,
        "probe_weight": 0.3,  # a probe is not small beside this model
        "sam": 1,
        "gradient_conflict": 1,
        "sam + gradient_conflict + probe_weight": 1.3,
        "randomized, 3 draws": 2,
        "gradient_penalty": 2,
        "curvature": 5,
        "retain_null_space": 1,
        "quantization_margin int4": 1,
        "weight averaging": 1,
    }.items():
        extra = (wrapper_cost.measure_peak_bytes(RMU, wrappers[name], SEED) - plain) / copy
        assert extra <= copies + 0.4, f"{name}: {extra:.2f} copies"


def test_step_does_what_follows_the_optimizer() -> None:
    """`OurStep.update` alone would leave out what callbacks do, and make it free."""
    wrappers = wrapper_cost.wrappers_of(RMU)
    step = wrapper_cost.make_step(RMU, wrappers["weight averaging"], SEED)
    count = step.trainer.weight_average.count
    step_cost.run_step(step)
    assert step.trainer.weight_average.count == count + 1
    step = wrapper_cost.make_step(RMU, wrappers["retain_null_space"], SEED)
    step_cost.run_step(step)
    (linear, *_) = step.trainer.null_space.linears
    basis = step.trainer.null_space.state()[linear.name]
    moved = linear.layer.weight - step.trainer.null_space._starts[linear.name]
    assert moved.norm() > 0 and (moved @ basis).norm() < 1e-5 * moved.norm()


def test_pairs_take_turns() -> None:
    order = []

    class Step:
        def __init__(self, name: str):
            self.name = name

        def backward(self) -> None:
            order.append(self.name)

        def update(self) -> None:
            pass

    pairs = wrapper_cost.measure_pairs(Step("plain"), Step("wrapped"), repeats=3)
    assert len(pairs) == 3 and len(order) == 2 * (3 + step_cost.WARMUP_STEPS)
    firsts = order[::2]
    assert set(firsts) == {"plain", "wrapped"} and all(a != b for a, b in zip(firsts, firsts[1:], strict=False))


def test_docs_show_the_stored_results() -> None:
    stored = json.loads((ROOT / "benchmarks" / "results" / "wrapper_cost_cpu.json").read_text(encoding="utf-8"))
    docs = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8")
    assert wrapper_cost.format_table(stored["cases"]) in docs
    assert stored["command"] in docs
    for name, results in stored["cases"].items():
        assert set(results) == {"plain", *wrapper_cost.wrappers_of(name)}
        for wrapper_name, wrapper in wrapper_cost.wrappers_of(name).items():
            for quantity, bound in wrapper.bounds.items():
                assert results[wrapper_name]["ratio"][quantity] <= bound, (name, wrapper_name, quantity)
