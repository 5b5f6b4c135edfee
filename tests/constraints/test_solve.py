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
"""The smallest edit: against closed forms, against scipy, on the model that holds it, and where there is none."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from distributed import intervention_worker
from scipy.optimize import linprog, minimize
from test_invariance import launch

from hf_unlearn.constraints.closed_forms import single_constraint_edit
from hf_unlearn.constraints.dual import DualNotConvergedError, InfeasibleConstraintsError
from hf_unlearn.constraints.linearize import constraint_values, linearize, second_moments
from hf_unlearn.constraints.points import (
    RESERVE,
    ConstraintPoints,
    Demand,
    expand_points,
    refusal_points,
    word_points,
)
from hf_unlearn.constraints.preconditioning import null_space_projector, retain_factor
from hf_unlearn.constraints.solve import ConstraintsNotMetError, solve_intervention


CONTEXTS = [[1, 5, 7], [1, 300, 12, 40], [1, 8], [1, 99, 98, 97, 96, 95], [1, 200, 201]]
DOWN = "model.layers.1.mlp.down_proj"


def said_next(model, context: list[int]) -> list[int]:
    """Tokens in the order of their logits, by the model's own forward."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([context])).logits[0, -1].argsort(descending=True).tolist()


def forget_points(model, contexts=CONTEXTS) -> ConstraintPoints:
    """What the model says next must not come."""
    return ConstraintPoints(
        contexts,
        [[said_next(model, context)[0]] for context in contexts],
        [[] for _ in contexts],
        [f"forget row {number}" for number in range(len(contexts))],
    )


def own_logits(model, contexts) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=torch.tensor([context])).logits[0, -1].double() for context in contexts]


def margin_points(lower: int, upper: int, context=CONTEXTS[0]) -> ConstraintPoints:
    return ConstraintPoints([context], [[lower]], [[upper]], ["context 0"])


def last_state(model, context) -> torch.Tensor:
    with torch.no_grad():
        return model.model(input_ids=torch.tensor([context])).last_hidden_state[0, -1].double()


def metric(model, names, contexts=CONTEXTS) -> dict[str, torch.Tensor]:
    moments = second_moments(model, names, [[1, *range(number, number + 12)] for number in range(20, 90, 3)])
    return {name: retain_factor(moment.mean(), 0.1) for name, moment in moments.items()}


# ---- Known answers


def test_one_margin_at_the_head(random_model):
    """The head is linear: one round, and the closed form with the reserve."""
    model = random_model()
    first, second = said_next(model, CONTEXTS[0])[:2]
    edit = solve_intervention(model, margin_points(first, second), ["lm_head"], Demand(epsilon=0.7))
    direction = torch.zeros(512)
    direction[first], direction[second] = 1.0, -1.0
    logits = own_logits(model, CONTEXTS[:1])[0]
    violation = logits[first] - logits[second] + 0.7 + RESERVE
    expected = single_constraint_edit(direction, last_state(model, CONTEXTS[0]), violation)
    assert (edit.dense("lm_head") - expected).norm() < 1e-5 * expected.norm()
    assert edit.touched_rows("lm_head").tolist() == sorted([first, second])
    assert edit.report.norm == pytest.approx(expected.norm().item(), rel=1e-5)
    assert edit.report.stationarity < 1e-4
    assert edit.report.active == 1


def test_one_margin_at_the_head_with_a_retain_metric(random_model):
    """`D = solve(H R) R`, by hand."""
    model = random_model()
    first, second = said_next(model, CONTEXTS[0])[:2]
    factors = metric(model, ["lm_head"])
    points, demand = margin_points(first, second), Demand(epsilon=0.7)
    edit = solve_intervention(model, points, ["lm_head"], demand, retain_factors=factors)
    direction = torch.zeros(512)
    direction[first], direction[second] = 1.0, -1.0
    logits = own_logits(model, CONTEXTS[:1])[0]
    factor = factors["lm_head"]
    violation = logits[first] - logits[second] + 0.7 + RESERVE
    expected = single_constraint_edit(direction, last_state(model, CONTEXTS[0]) @ factor, violation) @ factor
    assert (edit.dense("lm_head") - expected).norm() < 1e-5 * expected.norm()
    assert edit.report.norm == pytest.approx(expected.norm().item(), rel=1e-5)
    plain = solve_intervention(model, points, ["lm_head"], demand)
    assert (edit.dense("lm_head") - plain.dense("lm_head")).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("slack", ["l1", "l2"])
@pytest.mark.parametrize("cost", [0.003, 0.02, 10.0])
def test_slack_leaves_what_it_costs_less_to_leave(random_model, slack, cost):
    """
    One constraint `K x >= s`: L2 slack gives `x = s / (K + 1 / c)`, L1 `x = min(s / K, c)`, also where little is left.
    """
    model = random_model()
    first, second = said_next(model, CONTEXTS[0])[:2]
    points, demand = margin_points(first, second), Demand(epsilon=2.0)
    edit = solve_intervention(model, points, ["lm_head"], demand, slack=slack, slack_cost=cost)
    logits = own_logits(model, CONTEXTS[:1])[0]
    violation = (logits[first] - logits[second] + 2.0 + RESERVE).item()
    gram = 2 * last_state(model, CONTEXTS[0]).square().sum().item()
    multiplier = violation / (gram + 1 / cost) if slack == "l2" else min(violation / gram, cost)
    assert edit.norm() == pytest.approx(multiplier * gram**0.5, rel=1e-4)
    left = violation - RESERVE - multiplier * gram
    assert edit.report.largest_violation == pytest.approx(left, abs=1e-4)
    assert edit.report.violated == int(left > 1e-6)
    with edit.applied(model):
        after = own_logits(model, CONTEXTS[:1])[0]
    assert (after[first] - after[second] + 2.0).item() == pytest.approx(left, abs=1e-4)


# ---- All constraints hold on the model with the edit in it


DEMANDS = {
    "greedy": Demand(epsilon=1.0),
    "ties": Demand(epsilon=0.0),
    "top-k": Demand(epsilon=0.5, top_k=4),
    "probability": Demand(probability=1e-3),
    "sampled": Demand(probability=0.05, sequence_length=10, temperature=1.5),
}


def check(model, points: ConstraintPoints, demand: Demand) -> None:
    """The levels in their own words, from the model's own logits."""
    for logits, lower in zip(own_logits(model, points.contexts), points.lower, strict=True):
        allowed = torch.tensor([token not in lower for token in range(len(logits))])
        if demand.epsilon is not None:
            best = logits[allowed].sort(descending=True).values[demand.top_k - 1]
            assert (logits[lower] <= best - demand.epsilon + 1e-4).all()
        else:
            probability = (logits / demand.temperature).softmax(-1)[lower].sum()
            assert probability <= demand.probability / demand.sequence_length * (1 + 1e-4)


@pytest.mark.parametrize("level", DEMANDS)
@pytest.mark.parametrize("scope", [["lm_head"], [DOWN], ["model.layers.0.self_attn.o_proj", DOWN]])
def test_constraints_hold_on_the_edited_model(random_model, level, scope):
    model, demand = random_model(), DEMANDS[level]
    points = forget_points(model)
    points.lower[1] = said_next(model, points.contexts[1])[:3]  # several at one place
    edit = solve_intervention(model, points, scope, demand, rounds=20)
    assert set(edit.factors) == set(scope)
    assert edit.report.violated == 0
    assert edit.report.largest_violation <= 0
    with edit.applied(model):
        check(model, points, demand)
    assert edit.report.norm == pytest.approx(edit.norm(), rel=1e-4)
    assert edit.report.constraints == (7 * demand.top_k if demand.epsilon is not None else 5)


@pytest.mark.parametrize("retain", ["none", "metric", "null space"])
def test_constraints_hold_in_every_family(random_model, architecture, retain):
    if architecture == "gpt2":
        pytest.skip("its layers are Conv1D")
    model, demand = random_model(architecture), Demand(epsilon=0.5)
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h" if architecture == "gpt_neox" else DOWN
    points = forget_points(model)
    factors = None
    if retain == "metric":
        factors = metric(model, [name])
    elif retain == "null space":
        moment = second_moments(model, [name], [[1, 20, 21, 22]])[name]
        factors = {name: null_space_projector(moment.mean(), rank=3)}
    edit = solve_intervention(model, points, [name], demand, retain_factors=factors)
    kept = own_logits(model, [[1, 20, 21]])[0]
    with edit.applied(model):
        check(model, points, demand)
        if retain == "null space":  # 4 positions span 4 directions, of which the last is left: nearly the same
            assert (edit.dense(name) @ (torch.eye(48).double() - factors[name])).norm() < 1e-5 * edit.norm()
    assert len(kept) == 512


@pytest.mark.parametrize("scope", [["lm_head"], [DOWN]])
def test_refusals(random_model, scope):
    """All other tokens must fall: the runners-up are held too, or each round brings up another one."""
    model = random_model()
    harmless = [[1, 60, 61], [1, 62]]
    tokens = [said_next(model, harmless[0])[0], 7, 9]  # one is over-refused already
    points = refusal_points(CONTEXTS, harmless, tokens)
    edit = solve_intervention(model, points, scope, Demand(epsilon=0.5))
    with edit.applied(model):
        for logits in own_logits(model, CONTEXTS):
            others = torch.tensor([token not in tokens for token in range(512)])
            assert logits[others].max() <= logits[tokens].max() - 0.5 + 1e-4
        for logits in own_logits(model, harmless):
            others = torch.tensor([token not in tokens for token in range(512)])
            assert logits[tokens].max() <= logits[others].max() - 0.5 + 1e-4
    assert edit.report.rounds <= (3 if scope == ["lm_head"] else 8)


def test_two_answers_to_one_question(random_model):
    """Each is the best token after the other: held against each other, they would contradict."""
    model = random_model()
    first, second = said_next(model, CONTEXTS[0])[:2]
    points = ConstraintPoints([CONTEXTS[0]] * 2, [[first], [second]], [[], []], ["forget row 0", "forget row 1"])
    for scope in (["lm_head"], [DOWN]):
        edit = solve_intervention(model, points, scope, Demand(epsilon=1.0))
        with edit.applied(model):
            logits = own_logits(model, CONTEXTS[:1])[0]
        assert logits[[first, second]].max() <= logits.max() - 1.0 + 1e-4


def test_a_tied_head_is_solved_for_as_if_untied(random_model):
    model = random_model("gemma2", tie_word_embeddings=True)
    points = forget_points(model)
    edit = solve_intervention(model, points, ["lm_head"], Demand(epsilon=0.1))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with edit.applied(model):
        check(model, points, Demand(epsilon=0.1))


# ---- Smallest


def tiny_model(random_model, seed: int, **overrides):
    sizes = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2}
    return random_model(seed=seed, **{**sizes, "num_key_value_heads": 2, "vocab_size": 24, **overrides})


def by_scipy(model, name, points, demand, factor=None, slack_cost=None, start=None) -> float:
    """The norm that is minimised, or with L2 slack its objective, of scipy's solution from one start."""
    model = copy.deepcopy(model).double()
    weight = model.get_submodule(name).weight.detach().clone()
    factor = torch.eye(weight.shape[1]).double() if factor is None else factor
    constraints = expand_points(points, demand)

    def values(flat, gradient: bool):
        edit = torch.tensor(flat, dtype=torch.double).view(len(weight), -1).requires_grad_()
        parameters = {f"{name}.weight": weight + edit @ factor}
        rows = []
        for index, context in enumerate(constraints.sequences):
            logits = torch.func.functional_call(model, parameters, kwargs={"input_ids": context[None]}).logits
            rows.append(constraints.values(logits[:, -1].double(), [index])[0] + demand.margin + RESERVE)
        found = torch.stack(rows)
        if not gradient:
            return found.detach().numpy()
        return torch.stack([torch.autograd.grad(row, edit, retain_graph=True)[0].flatten() for row in found]).numpy()

    start = torch.zeros_like(weight).numpy().ravel() if start is None else start
    if slack_cost is not None:

        def objective(flat):
            violations = values(flat, False).clip(min=0)
            gradient = flat + slack_cost * violations @ values(flat, True)
            return 0.5 * flat @ flat + 0.5 * slack_cost * violations @ violations, gradient

        return minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).fun
    result = minimize(
        lambda flat: (0.5 * flat @ flat, flat),
        start,
        jac=True,
        method="SLSQP",
        constraints={
            "type": "ineq",
            "fun": lambda flat: -values(flat, False),
            "jac": lambda flat: -values(flat, True),
        },
        options={"maxiter": 60, "ftol": 1e-8},
    )
    feasible = values(result.x, False).max() < 1e-4
    return float((result.x @ result.x) ** 0.5) if feasible else float("inf")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("has_metric", [False, True])
def test_as_short_as_scipys(random_model, seed, has_metric):
    """The problem is not convex: scipy starts at nothing, and at what was found, and the better counts."""
    model = tiny_model(random_model, seed)
    name = "model.layers.0.mlp.down_proj"
    contexts = [[1, 5, 7], [1, 3, 12], [1, 8]]
    points, demand = forget_points(model, contexts), Demand(epsilon=0.5)
    factors = None
    if has_metric:
        moments = second_moments(model, [name], [[1, 4, 6, 9, 10], [1, 11, 13, 14, 15], [1, 20, 21]])
        factors = {name: retain_factor(moments[name].mean(), 0.1)}
    edit = solve_intervention(model, points, [name], demand, retain_factors=factors)
    factor = None if factors is None else factors[name]
    dense = edit.dense(name) if factor is None else edit.dense(name) @ torch.linalg.inv(factor)
    mine = dense.norm().item()
    starts = [None, dense.numpy().ravel()]
    best = min(by_scipy(model, name, points, demand, factor, start=start) for start in starts)
    assert mine <= 1.05 * best
    with edit.applied(model):
        check(model, points, demand)


@pytest.mark.parametrize("seed", range(3))
def test_slack_in_a_hidden_layer_is_weighed_as_by_scipy(random_model, seed):
    model, name = tiny_model(random_model, seed), "model.layers.0.mlp.down_proj"
    points, demand = forget_points(model, [[1, 5, 7], [1, 3, 12], [1, 8]]), Demand(epsilon=0.5)
    feasible = solve_intervention(model, points, [name], demand)
    cost = feasible.norm() ** 2
    edit = solve_intervention(model, points, [name], demand, slack="l2", slack_cost=cost, rounds=30)
    with edit.applied(model):
        violations = (constraint_values(model, expand_points(points, demand), {}) + 0.5 + RESERVE).clamp(min=0)
    mine = 0.5 * edit.norm() ** 2 + 0.5 * cost * violations.square().sum().item()
    starts = [None, edit.dense(name).numpy().ravel()]
    best = min(by_scipy(model, name, points, demand, slack_cost=cost, start=start) for start in starts)
    assert mine <= 1.05 * best
    assert violations.max() > 1e-3
    assert edit.norm() < feasible.norm()


def test_two_modules_share_the_edit(random_model):
    model, demand = random_model(), Demand(epsilon=1.0)
    points, names = forget_points(model), ["model.layers.1.self_attn.o_proj", DOWN]
    both = solve_intervention(model, points, names, demand)
    alone = [solve_intervention(model, points, [name], demand).norm() for name in names]
    assert both.norm() < 1.02 * min(alone)
    assert all(both.dense(name).norm() > 0.05 * both.norm() for name in names)


# ---- None, or not found


def test_contradictions_are_named(random_model):
    """A margin and its opposite: with no margin left both would hold, so no smaller one helps."""
    model = random_model()
    points = ConstraintPoints(
        [*CONTEXTS, CONTEXTS[1]],
        [[8], [9], [9], [9], [9], [10]],
        [[11], [10], [10], [10], [10], [9]],
        [f"forget row {number}, token 2" for number in range(6)],
    )
    with pytest.raises(InfeasibleConstraintsError) as caught:
        solve_intervention(model, points, ["lm_head"], Demand(epsilon=1.0))
    message = str(caught.value)
    assert "forget row 1, token 2, forget row 5, token 2 contradict" in message
    assert "forget row 0" not in message
    assert caught.value.conflicting == [1, 5]
    assert caught.value.slack == pytest.approx(1.0 + RESERVE, rel=1e-2)
    assert "lower the margin" not in message
    assert "slack='l2'" in message
    slack = solve_intervention(model, points, ["lm_head"], Demand(epsilon=1.0), slack="l2", slack_cost=1e4)
    assert slack.report.violated == 2
    assert slack.report.largest_violation == pytest.approx(1.0, abs=0.01)


def is_feasible(features, violations) -> bool:
    """Whether some `x` has `features x <= -violations`."""
    size = features.shape[1]
    return linprog(np.zeros(size), A_ub=features, b_ub=-violations, bounds=[(None, None)] * size).status == 0


def test_a_lower_margin_helps_where_that_is_said(random_model):
    """
    A layer with two inputs and many constraints: more than it can satisfy at a wide margin, not at a narrower one.
    """
    found = 0
    for seed in range(40):
        model = tiny_model(random_model, seed, intermediate_size=1, num_hidden_layers=1)
        name = "model.layers.0.mlp.down_proj"
        contexts = [[1, token] for token in range(2, 14)]
        orders = [said_next(model, context) for context in contexts]
        # They hold by some margin already, which is asked to be wider
        points = ConstraintPoints(
            contexts,
            [[order[1]] for order in orders],
            [[order[0]] for order in orders],
            [f"row {k}" for k in range(12)],
        )
        demand = Demand(epsilon=3.0)
        try:
            solve_intervention(model, points, [name], demand, rounds=1)  # around the weights as they are
            continue
        except InfeasibleConstraintsError as error:
            slack, message = error.slack, str(error)
        except (ConstraintsNotMetError, DualNotConvergedError):
            continue
        number = re.search(r"lower the margin by ([0-9.]+) nats", message)
        if number is None:
            continue
        assert float(number[1]) == pytest.approx(slack, rel=1e-3)
        found += 1
        lines = linearize(model, expand_points(points, demand), [name], {})
        features = torch.stack(
            [
                torch.einsum("pm,pn->mn", lines.output_directions[name][rows], lines.inputs[name][rows]).flatten()
                for rows in (lines.constraints == k for k in range(12))
            ]
        ).double()
        for share, feasible in ((1.001, True), (0.97, False)):
            wanted = lines.values + 3.0 + RESERVE - share * slack
            assert is_feasible(features.numpy(), wanted.numpy()) == feasible
    assert found >= 2


def test_rounds_that_run_out(random_model):
    model = random_model()
    points = forget_points(model)
    with pytest.raises(
        ConstraintsNotMetError, match=r"of 5 constraints are violated by up to .*forget row \d.*rounds"
    ):
        solve_intervention(model, points, ["model.layers.0.mlp.down_proj"], Demand(epsilon=8.0), rounds=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": ConstraintPoints()}, "no constraint point"),
        ({"scope": []}, "names no module"),
        ({"scope": ["model.layers.0.mlp"]}, "not an nn.Linear"),
        ({"demand": Demand(epsilon=1.0), "slack": "l2"}, "go together"),
    ],
)
def test_what_does_not_fit_is_refused(random_model, change, message):
    model = random_model()
    arguments = {"points": forget_points(model), "scope": [DOWN], "demand": Demand(epsilon=1.0), **change}
    with pytest.raises(ValueError, match=message):
        solve_intervention(model, **arguments)


# ---- What stays


def test_nothing_to_do(random_model):
    model = random_model()
    last = said_next(model, CONTEXTS[0])[-1]
    points = word_points(CONTEXTS[:1], [last])
    edit = solve_intervention(model, points, [DOWN, "lm_head"], Demand(epsilon=0.5))
    assert edit.norm() == 0
    assert edit.ranks() == {DOWN: 0, "lm_head": 0}
    assert edit.report.rounds == 0
    assert edit.report.largest_violation < 0
    before = own_logits(model, CONTEXTS)
    with edit.applied(model):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(own_logits(model, CONTEXTS), before, strict=True))


def test_the_model_stays_as_it_is(random_model):
    model = random_model(attention_dropout=0.3)
    points = forget_points(model)
    expected = solve_intervention(model, points, [DOWN], Demand(epsilon=0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    edit = solve_intervention(model, points, [DOWN], Demand(epsilon=0.5))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # Solved without dropout, and twice the same
    for side in range(2):
        assert torch.equal(edit.factors[DOWN][side], expected.factors[DOWN][side])
    with pytest.raises(InfeasibleConstraintsError):
        clash = ConstraintPoints([CONTEXTS[0]] * 2, [[8], [9]], [[9], [8]], ["a", "b"])
        solve_intervention(model, clash, [DOWN], Demand(epsilon=0.5))
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batches_do_not_matter(random_model, batch_size):
    model = random_model()
    points = forget_points(model)
    expected = solve_intervention(model, points, [DOWN], Demand(epsilon=0.5)).dense(DOWN)
    edit = solve_intervention(model, points, [DOWN], Demand(epsilon=0.5), batch_size=batch_size).dense(DOWN)
    assert (edit - expected).norm() < 1e-4 * expected.norm()


def test_history(random_model):
    model = random_model()
    report = solve_intervention(model, forget_points(model), [DOWN], Demand(epsilon=1.0)).report
    assert report.history[0]["norm"] == 0
    assert report.history[0]["violated"] == 5
    assert report.history[-1]["violated"] == 0
    assert report.history[-1]["norm"] == report.norm
    assert report.history[-1]["largest_violation"] == report.largest_violation
    assert report.dual_residual < 1e-9
    assert abs(report.duality_gap) < 1e-9
    assert (report.multipliers >= 0).all()
    assert (report.multipliers > 0).sum() == report.active


# ---- Two processes


@pytest.mark.slow
def test_two_processes_solve_what_one_solves(random_model, tmp_path):
    """And both end with the same edit, to the bit, or with the same error."""
    random_model().save_pretrained(tmp_path / "model")
    spec = {"model": str(tmp_path / "model"), "output": str(tmp_path), "world_size": 2}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    launch(intervention_worker.__file__, tmp_path / "spec.json")
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    expected = intervention_worker.execute(spec["model"], None)
    assert expected.keys() == ranks[0].keys()
    for problem, result in expected.items():
        found = ranks[0][problem]
        if "error" in result:
            assert found["error"] == result["error"], problem
            assert found["message"].split("nats")[0][:60] == result["message"].split("nats")[0][:60]
            assert found.get("conflicting") == result.get("conflicting")
            continue
        for module, dense in result["edit"].items():
            dense, other = torch.tensor(dense).double(), torch.tensor(found["edit"][module]).double()
            assert dense.norm() > 0.01
            assert (dense - other).norm() <= 1e-6 * max(1.0, dense.norm()), problem
        assert found["report"] == result["report"], problem
        assert found["numbers"] == pytest.approx(result["numbers"], abs=1e-5), problem
    assert [expected[name]["error"] for name in ("infeasible", "rounds run out", "refused")] == [
        "InfeasibleConstraintsError",
        "ConstraintsNotMetError",
        "ValueError",
    ]
    assert expected["infeasible"]["conflicting"] == [2, 4]
