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
"""
The smallest edit of some linear maps under which stated constraints hold: point-wise, and by cutting planes against
relaxed prompts. Our formulation after [the paper](https://huggingface.co/papers/2510.03567).
"""

import logging
from collections.abc import Sequence

from accelerate import Accelerator, PartialState
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_unlearn.constraints.dual import InfeasibleConstraintsError
from hf_unlearn.constraints.editable import editable_linear
from hf_unlearn.constraints.points import ConstraintPoints, Constraints, Demand, expand_points
from hf_unlearn.constraints.relaxations import Relaxation
from hf_unlearn.constraints.rounds import ConstraintsNotMetError, Solver, SolveReport
from hf_unlearn.constraints.weight_edit import WeightEdit, compress
from hf_unlearn.forward import evaluation_mode


__all__ = ["ConstraintsNotMetError", "SolveReport", "solve_intervention"]

# Not accelerate's logger, which raises where there is no Accelerator
logger = logging.getLogger(__name__)


def solve_intervention(
    model: PreTrainedModel,
    points: ConstraintPoints,
    scope: Sequence[str],
    demand: Demand,
    *,
    retain_factors: dict[str, Tensor] | None = None,
    relaxation: Relaxation | None = None,
    rounds: int = 10,
    cut_rounds: int = 6,
    slack: str | None = None,
    slack_cost: float | None = None,
    batch_size: int = 16,
    seed: int = 0,
    accelerator: Accelerator | PartialState | None = None,
    progress: bool = False,
) -> WeightEdit:
    """
    The smallest edit `D` of some linear maps under which every point's constraint holds.

    Minimises `Σ_modules 1/2 ||D||_F^2` subject to `g_k(D) <= -margin` at all points; with `retain_factors` the norm is
    `1/2 tr(D C D')`, which counts what the edit does to retained inputs. Each round takes the constraints to first
    order around the current edit, solves the dual for the whole edit, and halves the step until the violations fall.
    With a relaxation, prompts around the points that break a constraint are then found and added, until none is. Our
    formulation after [the paper](https://huggingface.co/papers/2510.03567). The model is not changed: apply the
    result.

    Args:
        model ([`~transformers.PreTrainedModel`]): causal language model, not wrapped by PEFT.
        points ([`ConstraintPoints`]): what is demanded, and where.
        scope (`Sequence[str]`): modules to edit, by name, all `nn.Linear`: `"model.layers.2.mlp.down_proj"`.
        demand ([`Demand`]): how unreachable.
        retain_factors (`dict[str, torch.Tensor]`, *optional*): module -> `R` `(n, n)`, from
            [`~hf_unlearn.constraints.preconditioning.retain_factor`] or `null_space_projector`.
        relaxation ([`Relaxation`], *optional*): prompts around the points at which constraints must hold too.
        rounds (`int`, *optional*, defaults to 10): linearisations at most, in each round of cuts.
        cut_rounds (`int`, *optional*, defaults to 6): attacks on relaxed prompts at most.
        slack (`str`, *optional*): `"l1"` or `"l2"`: lets constraints be violated at a cost.
        slack_cost (`float`, *optional*): the cost, in units of the edit's squared norm per nat (per squared nat).
        batch_size (`int`, *optional*, defaults to 16): sequences in a forward and a backward pass.
        seed (`int`, *optional*, defaults to 0): of the attacks' random starts.
        accelerator (`Accelerator` or `PartialState`, *optional*): processes that share the linearisations; the first
            one solves.
        progress (`bool`, *optional*, defaults to `False`): whether to show a bar.

    Returns:
        [`~hf_unlearn.constraints.weight_edit.WeightEdit`]: float32 factors; `report` is a [`SolveReport`].

    Raises:
        [`~hf_unlearn.constraints.dual.InfeasibleConstraintsError`]: no edit satisfies the constraints to first order;
            names the points in conflict, and the slack that would satisfy them.
        [`ConstraintsNotMetError`]: the rounds did not suffice.
        [`~hf_unlearn.constraints.dual.DualNotConvergedError`]: constraints nearly contradict each other.
        `ValueError`: a module that cannot be edited, arguments that do not fit together.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_unlearn.constraints.points import ConstraintPoints, Demand
    >>> from hf_unlearn.constraints.solve import solve_intervention
    >>> _ = torch.manual_seed(0)
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2,
    ...                                      num_hidden_layers=2, vocab_size=32, initializer_range=0.5)).eval()
    >>> context = torch.tensor([[1, 5, 7]])
    >>> token = model(context).logits[0, -1].argmax().item()  # what the model says next
    >>> points = ConstraintPoints(context.tolist(), lower=[[token]], upper=[[]], names=["context 0"])
    >>> edit = solve_intervention(model, points, ["model.layers.0.mlp.down_proj"], Demand(epsilon=0.5))
    >>> edit.apply(model)
    >>> logits = model(context).logits[0, -1]
    >>> bool(logits[token] + 0.499 < logits.max())
    True

    ```
    """
    if len(points) == 0:
        raise ValueError("There is no constraint point: give at least one.")
    if not scope:
        raise ValueError("The scope names no module: choose at least one nn.Linear, such as a layer's mlp.down_proj.")
    names = list(dict.fromkeys(scope))
    for name in names:
        editable_linear(model, name)
    if relaxation is not None and relaxation.kind == "layer_ball" and len(names) != 1:
        raise ValueError(
            f"relaxation='layer_ball' is a ball at the input of one module, and {len(names)} are edited: choose one."
        )
    solver = Solver(
        model, points, names, retain_factors or {}, slack, slack_cost, batch_size, accelerator, rounds, relaxation
    )
    constraints = expand_points(points, demand)
    attacked = len(constraints)
    with evaluation_mode(model):
        solver.minimize(constraints)
        if relaxation is not None and relaxation.kind != "layer_ball":
            constraints = _close_relaxed_prompts(solver, constraints, relaxation, cut_rounds, seed, progress)
        solver.certify(constraints)
    solver.report.constraints, solver.report.cuts = len(constraints), len(constraints) - attacked
    factors = {name: compress(*factor) for name, factor in solver.edit(solver.factors).items()}
    if not factors:  # all holds as it is
        weights = {name: editable_linear(model, name).weight for name in names}
        factors = {
            name: (weight.new_zeros(len(weight), 0), weight.new_zeros(0, weight.shape[1]))
            for name, weight in weights.items()
        }
    return WeightEdit(factors, report=solver.report)


def _close_relaxed_prompts(
    solver: Solver,
    constraints: Constraints,
    relaxation: Relaxation,
    cut_rounds: int,
    seed: int,
    progress: bool,
) -> Constraints:
    """Cutting planes: prompts that break a constraint become constraints of their own, until none is found."""
    families, points, report = constraints.strictest(), constraints, solver.report
    attacked = constraints.select(list(families))
    for attack in tqdm(range(cut_rounds + 1), desc="Closing relaxed prompts", disable=not progress):
        values, prompts = solver.attack(attacked, relaxation, seed + attack)
        broken = (values > -attacked.demand.aim).nonzero()[:, 0].tolist()
        # The last one has other random starts than those that it was closed against
        report.resisted = 1 - (values > 0).double().mean().item()
        report.cut_rounds = attack
        if attack == cut_rounds or not broken:
            break
        cut = constraints
        for index, family in enumerate(families.values()):
            if index in broken:
                cut = cut + points.select(family, [prompts[index]] * len(family))
        held = solver.factors
        try:
            solver.minimize(cut)
        except (ConstraintsNotMetError, InfeasibleConstraintsError):
            # The points themselves hold without these cuts: that edit is kept, and `resisted` is of it
            solver.factors = held
            solver.note(constraints)
            logger.warning(
                f"{len(broken)} of the relaxed prompts found by attack {attack + 1} cannot be closed: the edit from "
                "before them is kept. Use a smaller radius, more rounds, or one more layer."
            )
            break
        constraints = cut
    return constraints
