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
The rounds of [`~hf_unlearn.constraints.solve.solve_intervention`]: the constraints to first order around the current
edit, the smallest edit for those, and how far to go towards it. Our formulation after
[the paper](https://huggingface.co/papers/2510.03567).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers import PreTrainedModel

from hf_unlearn.constraints.dual import (
    DualSolution,
    InfeasibleConstraintsError,
    edit_from_multipliers,
    gram_of_sums,
    solve_dual,
)
from hf_unlearn.constraints.editable import editable_linear
from hf_unlearn.constraints.linearize import Factors, Linearization, constraint_values, linearize
from hf_unlearn.constraints.points import RESERVE, ConstraintPoints, Constraints
from hf_unlearn.constraints.preconditioning import precondition
from hf_unlearn.constraints.relaxations import Relaxation, attack_prompts, layer_ball_displacements
from hf_unlearn.constraints.weight_edit import compress


# A feasible edit is sought again while that makes it shorter by more than this share
_SHORTER = 0.01
_SHORTENINGS = 4
_HALVINGS = 6
# With slack, a step must lower the objective by this share
_BETTER = 1e-4
# Rounds of cuts in one linearised problem with a ball at the input of the edited module
_BALL_ROUNDS = 30
# With violations down to this share of the first ones, an edit is corrected and no longer sought anew
_NEAR = 0.05
_NAMED = 6


class ConstraintsNotMetError(RuntimeError):
    """The rounds ended, or the weights were stored, and a constraint does not hold."""


@dataclass
class SolveReport:
    """
    How an edit was found.

    Attributes:
        constraints (`int`): inequalities, cuts included.
        cuts (`int`): those added at relaxed prompts.
        rounds (`int`): linearisations solved.
        cut_rounds (`int`): attacks on relaxed prompts.
        largest_violation (`float`): nats; at most 0 where all hold. With `layer_ball`, at the worst of each ball.
        violated (`int`): inequalities that do not hold; above 0 only with slack.
        resisted (`float`, *optional*): share of the points' inequalities at which the last attack, run on the edit
            as it is returned, found no prompt that undoes them (a value above 0).
        norm (`float`): `||D||`.
        active (`int`): inequalities that bind.
        multipliers (`torch.Tensor` of shape `(constraints,)`, float64): of the last solution.
        dual_residual (`float`): natural residual of the last dual.
        duality_gap (`float`): of the last dual, over its objective.
        stationarity (`float`): `||D + Σ_k x_k Φ_k R²|| / ||D||` with features, and their multipliers, at the edited
            weights: 0 at a local minimum of the constrained problem.
        norm_excess (`float`): by how much, relatively, the edit is longer than the smallest one for those features;
            this and `stationarity` in the retain metric where there is one.
        history (`list[dict[str, float]]`): norm and violations of each round.
    """

    constraints: int = 0
    cuts: int = 0
    rounds: int = 0
    cut_rounds: int = 0
    largest_violation: float = 0.0
    violated: int = 0
    resisted: float | None = None
    norm: float = 0.0
    active: int = 0
    multipliers: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.double))
    dual_residual: float = 0.0
    duality_gap: float = 0.0
    stationarity: float = 0.0
    norm_excess: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


class Solver:
    """
    One problem: the current edit, and how it was found.

    Edits are kept as `left` and `right` with `D = left @ right @ R`, `R` the retain factor: `||left @ right||` is then
    the norm that is minimised.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        points: ConstraintPoints,
        names: list[str],
        retain_factors: dict[str, Tensor],
        slack: str | None,
        slack_cost: float | None,
        batch_size: int,
        accelerator: Accelerator | PartialState | None,
        rounds: int,
        relaxation: Relaxation | None,
    ):
        self.model, self.points, self.names = model, points, names
        self.retain_factors = retain_factors
        self.slack, self.slack_cost = slack, slack_cost
        self.batch_size, self.accelerator, self.rounds = batch_size, accelerator, rounds
        self.layer_radius = relaxation.radius if relaxation is not None and relaxation.kind == "layer_ball" else None
        self.factors: Factors = {}
        self.report = SolveReport()

    def minimize(self, constraints: Constraints) -> None:
        """The smallest edit for all constraints, from where the last ones left it."""
        target = constraints.demand.aim + RESERVE
        values = self._values(constraints, self.factors)
        first_violation = (values + target).max().item()
        is_warm = bool(self.factors)
        for round_index in range(self.rounds + 1):
            worst = (values + target).max().item()
            holds = worst <= RESERVE
            self._note(constraints, values + constraints.demand.aim)
            if round_index == self.rounds or (holds and not self.factors):
                break
            lines = self._linearize(constraints, self.factors)
            self.report.rounds += 1
            if self.slack is not None:
                changed = self._weigh(constraints, lines, values, target)
            elif holds:
                changed = self._shorten(constraints, lines, values, target)
            else:
                near = is_warm or worst <= _NEAR * first_violation
                changed = self._approach(constraints, lines, values, target, near)
                if changed is None:
                    changed = self._approach(constraints, lines, values, target, not near)
            if changed is None:
                break
            values = changed
        if not holds and self.slack is None:
            violated = (values > -constraints.demand.aim).nonzero()[:, 0].tolist()
            raise ConstraintsNotMetError(
                f"{len(violated)} of {len(constraints)} constraints are violated by up to "
                f"{(values + constraints.demand.aim).max().item():.3g} nats after {self.report.rounds} rounds "
                f"({self._name(constraints, violated)}): raise `rounds`, edit another or one more layer, or allow "
                "slack='l2'."
            )

    def _approach(
        self, constraints: Constraints, lines: Linearization, values: Tensor, target: float, near: bool
    ) -> Tensor | None:
        """
        Towards the smallest edit of this linearisation, and near the end by the smallest change of the current one
        (the smallest edits of two linearisations may lie far apart); halved until the violations fall, or `None`.
        """

        def penalty(values: Tensor, factors: Factors) -> float:
            return (values + target).clamp(min=0).square().sum().item()

        factors = self._solve_round(constraints, lines, values + target, from_here=near)
        return self._halve(constraints, values, factors, penalty, 0.0)

    def _weigh(self, constraints: Constraints, lines: Linearization, values: Tensor, target: float) -> Tensor | None:
        """With slack: towards the best of this linearisation, halved until norm and violations together cost less."""

        def objective(values: Tensor, factors: Factors) -> float:
            violations = (values + target).clamp(min=0)
            cost = violations.sum() if self.slack == "l1" else violations.square().sum() / 2
            return _norms(factors) ** 2 / 2 + self.slack_cost * cost.item()

        factors = self._solve_round(constraints, lines, values + target, from_here=False)
        return self._halve(constraints, values, factors, objective, _BETTER)

    def _halve(
        self,
        constraints: Constraints,
        values: Tensor,
        factors: Factors,
        merit: Callable[[Tensor, Factors], float],
        share: float,
    ) -> Tensor | None:
        """Goes towards an edit as far as that lowers the merit by more than a share of it, or does not go."""
        before, length = merit(values, self.factors), 1.0
        for _ in range(_HALVINGS):
            trial = factors if length == 1.0 else _sum(_scaled(self.factors, 1 - length), _scaled(factors, length))
            trial_values = self._values(constraints, trial)
            if merit(trial_values, trial) < (1 - share) * before:
                self.factors = trial
                return trial_values
            length /= 2
        return None

    def _shorten(self, constraints: Constraints, lines: Linearization, values: Tensor, target: float) -> Tensor | None:
        """A shorter edit under which all still holds: part of the way to the smallest one, corrected; or `None`."""
        # The current edit satisfies this one, whatever of the reserve it has used up
        smallest = self._solve_round(constraints, lines, (values + target).clamp(max=0), from_here=False)
        current, length = self.factors, 1.0
        try:
            for _ in range(_SHORTENINGS):
                trial = _sum(_scaled(current, 1 - length), _scaled(smallest, length))
                for _ in range(2):
                    if _norms(trial) > (1 - _SHORTER) * _norms(current):
                        break
                    trial_values = self._values(constraints, trial)
                    if bool((trial_values + target <= RESERVE).all()):
                        current = trial
                        return trial_values
                    # The curvature along the way, with the features at its start (a second-order correction)
                    self.factors = trial
                    trial = self._solve_round(constraints, lines, trial_values + target, from_here=True)
                length /= 2
        except InfeasibleConstraintsError:
            pass  # of a correction: what holds already is kept
        finally:
            self.factors = current
        return None

    def _solve_round(
        self, constraints: Constraints, lines: Linearization, violations: Tensor, from_here: bool
    ) -> Factors:
        """
        The smallest edit for the constraints as they look to first order around the current one, where they are
        violated by so much; `from_here`: the current edit plus the smallest change of it.
        """
        inputs = {name: self._precondition(name, lines.inputs[name]) for name in self.names}
        result: list = [None, None, None]
        if not self._is_shared or self.accelerator.is_main_process:
            try:
                factors, solution = self._solve_dual(lines, violations, inputs, from_here)
                # On the CPU, because a broadcast puts tensors on the device that they come from
                solution = replace(solution, multipliers=solution.multipliers.cpu(), active=solution.active.cpu())
                result = [{name: (left.cpu(), right.cpu()) for name, (left, right) in factors.items()}, solution, None]
            except InfeasibleConstraintsError as error:
                result = [None, None, self._infeasible(constraints, error)]
            except ValueError as error:  # else the other processes would wait for ever
                result = [None, None, error]
        if self._is_shared:
            broadcast_object_list(result)
        factors, solution, error = result
        if error is not None:
            raise error
        device = violations.device
        factors = {name: (left.to(device), right.to(device)) for name, (left, right) in factors.items()}
        if from_here:
            return _sum(self.factors, factors)
        self.solution: DualSolution = solution
        self.report.multipliers = solution.multipliers
        return factors

    def _solve_dual(
        self, lines: Linearization, violations: Tensor, inputs: dict[str, Tensor], from_here: bool
    ) -> tuple[Factors, DualSolution]:
        directions, owners, count = lines.output_directions, lines.constraints, len(violations)
        if self.layer_radius is not None:
            # Of the point itself: its ball is made of cuts
            violations = violations - self._rises(lines, self.factors)
        if not from_here:
            violations = violations - lines.changes(self.edit(self.factors))
        if self.layer_radius is not None:
            return self._solve_layer_ball(lines, violations, inputs, from_here)
        previous = self.report.multipliers.to(violations.device)
        warm_start = torch.zeros_like(violations)
        warm_start[: len(previous)] = previous[: len(violations)]
        gram = sum(gram_of_sums(directions[name], inputs[name], owners, count) for name in self.names)
        solution = solve_dual(
            violations, gram=gram, slack=self.slack, slack_cost=self.slack_cost, warm_start=warm_start
        )
        weights = solution.multipliers[owners]
        factors = {
            name: compress(*edit_from_multipliers(directions[name], inputs[name], weights)) for name in self.names
        }
        return factors, solution

    def edit(self, factors: Factors) -> Factors:
        """`D = left @ right @ R`: within the solver `R` is left out, so that norms are those of the retain metric."""
        return {
            name: (left, right if name not in self.retain_factors else self._precondition(name, right))
            for name, (left, right) in factors.items()
        }

    def _solve_layer_ball(
        self, lines: Linearization, violations: Tensor, inputs: dict[str, Tensor], from_here: bool
    ) -> tuple[Factors, DualSolution]:
        """
        With a ball at the last input of the one edited module: its worst point given the edit becomes a cut, and the
        edit is sought anew, until no ball holds a worse one.
        """
        (name,) = self.names
        count, weight = len(violations), editable_linear(self.model, name).weight.double()
        rows, columns, owners = lines.output_directions[name].double(), inputs[name], lines.constraints
        tail = rows[lines.last_positions()]
        start = self.edit(self.factors) if from_here else {}
        outside = tail @ weight
        if start:
            outside = outside + (tail @ start[name][0].double()) @ start[name][1].double()
        # A cut at δ asks of the unknown X that <Φ_k + a_k δ', X> <= -violation_k - a_k' (W + start) δ: the feature of
        # its point, and one of its own
        points, wanted = torch.arange(count, device=owners.device), violations
        change: Factors = {}
        for _ in range(_BALL_ROUNDS):
            added = self.edit(change)
            total = _sum(start, added) if change else start
            displacements, rises = layer_ball_displacements(tail, weight, total.get(name), self.layer_radius)
            broken = (violations + lines.changes(added) + rises > RESERVE / 2).nonzero()[:, 0]
            if change and len(broken) == 0:
                break
            owners = torch.cat([owners, len(points) + torch.arange(len(broken), device=owners.device)])
            rows = torch.cat([rows, tail[broken]])
            columns = torch.cat([columns, self._precondition(name, displacements[broken])])
            points = torch.cat([points, broken])
            wanted = torch.cat([wanted, violations[broken] + (outside[broken] * displacements[broken]).sum(1)])
            sums = torch.eye(len(points), dtype=torch.double, device=points.device)
            sums[torch.arange(count, len(points)), points[count:]] = 1.0
            gram = sums @ gram_of_sums(rows, columns, owners, len(points)) @ sums.T
            try:
                solution = solve_dual(wanted, gram=gram, slack=self.slack, slack_cost=self.slack_cost)
            except InfeasibleConstraintsError as error:
                error.conflicting = sorted(set(points[error.conflicting].tolist()))
                raise
            weights = (sums.T @ solution.multipliers)[owners]
            change = {name: compress(*edit_from_multipliers(rows, columns, weights))}
        multipliers = torch.zeros_like(violations).index_add(0, points, solution.multipliers)
        return change, replace(solution, multipliers=multipliers, active=multipliers.nonzero()[:, 0])

    def _rises(self, lines: Linearization, factors: Factors) -> Tensor:
        """By how much each value rises at the worst point of its ball, under an edit."""
        (name,) = self.names
        directions, weight = lines.output_directions[name][lines.last_positions()], editable_linear(self.model, name)
        return layer_ball_displacements(directions, weight.weight, self.edit(factors).get(name), self.layer_radius)[1]

    def certify(self, constraints: Constraints) -> None:
        """How close the edit is to a local minimum: compared with the smallest one for its own features."""
        if not self.factors:
            return
        lines, values = self._linearize(constraints, self.factors), self._values(constraints, self.factors)
        smallest = self._solve_round(constraints, lines, values + constraints.demand.aim + RESERVE, from_here=False)
        report, solution = self.report, self.solution
        report.active = len(solution.active)
        report.dual_residual = max(solution.residual, solution.unscaled_residual)
        report.duality_gap = abs(solution.duality_gap) / max(abs(solution.objective), torch.finfo(torch.double).tiny)
        length = _norms(self.factors)
        report.stationarity = _norms(_sum(self.factors, _scaled(smallest, -1.0))) / length
        report.norm_excess = length / max(_norms(smallest), 1e-300) - 1

    # ---- Over processes ----

    @property
    def _is_shared(self) -> bool:
        return self.accelerator is not None and self.accelerator.num_processes > 1

    def _mine(self, constraints: Constraints) -> list[int]:
        return list(range(self.accelerator.process_index, len(constraints), self.accelerator.num_processes))

    def _linearize(self, constraints: Constraints, factors: Factors) -> Linearization:
        arguments = self.names, self.edit(factors), self.batch_size
        if not self._is_shared:
            return linearize(self.model, constraints, *arguments)
        mine = self._mine(constraints)
        # With fewer constraints than processes some of them repeat the first: its copy is dropped
        part = linearize(self.model, constraints.select(mine or [0]), *arguments)
        owners = torch.tensor(mine or [-1])[part.constraints.cpu()]
        packed = (part.values.cpu(), _to_cpu(part.output_directions), _to_cpu(part.inputs), owners, mine)
        parts = [piece for piece in gather_object([packed]) if piece[4]]
        values = torch.zeros(len(constraints), dtype=torch.double)
        for piece in parts:
            values[piece[4]] = piece[0]
        device = self.model.device
        return Linearization(
            values=values.to(device),
            output_directions={name: torch.cat([p[1][name] for p in parts]).to(device) for name in self.names},
            inputs={name: torch.cat([p[2][name] for p in parts]).to(device) for name in self.names},
            constraints=torch.cat([p[3] for p in parts]).to(device),
        )

    def _values(self, constraints: Constraints, factors: Factors) -> Tensor:
        """Of all constraints under an edit; with a ball at the module's input, at its worst point to first order."""
        if self.layer_radius is not None:
            lines = self._linearize(constraints, factors)
            return lines.values + self._rises(lines, factors)
        edit = self.edit(factors)
        if not self._is_shared:
            return constraint_values(self.model, constraints, edit, self.batch_size)
        mine = self._mine(constraints)
        part = constraint_values(self.model, constraints.select(mine), edit, self.batch_size)
        values = torch.zeros(len(constraints), dtype=torch.double)
        for indices, piece in gather_object([(mine, part.cpu())]):
            values[indices] = piece
        return values.to(self.model.device)

    def attack(self, constraints: Constraints, relaxation: Relaxation, seed: int) -> tuple[Tensor, list[Tensor]]:
        """The worst relaxed prompts under the current edit."""
        arguments = self.edit(self.factors), relaxation, self.batch_size, seed
        if not self._is_shared:
            return attack_prompts(self.model, constraints, *arguments)
        mine = self._mine(constraints)
        part, found = attack_prompts(self.model, constraints.select(mine), *arguments)
        values = torch.zeros(len(constraints), dtype=torch.double)
        prompts: list[Tensor] = [torch.empty(0)] * len(constraints)
        for indices, piece, piece_prompts in gather_object([(mine, part.cpu(), [prompt.cpu() for prompt in found])]):
            values[indices] = piece
            for index, prompt in zip(indices, piece_prompts, strict=True):
                prompts[index] = prompt
        return values.to(self.model.device), prompts

    # ---- Words ----

    def _precondition(self, name: str, inputs: Tensor) -> Tensor:
        if name not in self.retain_factors:
            return inputs.double()
        return precondition(inputs, self.retain_factors[name].to(inputs.device))

    def note(self, constraints: Constraints) -> None:
        """Puts the current edit on record."""
        self._note(constraints, self._values(constraints, self.factors) + constraints.demand.aim)

    def _note(self, constraints: Constraints, violations: Tensor) -> None:
        report = self.report
        report.largest_violation = violations.max().item()
        report.violated = int((violations > 0).sum())
        report.norm = _norms(self.edit(self.factors))
        report.history.append(
            {
                "round": report.rounds,
                "constraints": len(constraints),
                "violated": report.violated,
                "largest_violation": report.largest_violation,
                "norm": report.norm,
            }
        )

    def _name(self, constraints: Constraints, indices: list[int]) -> str:
        names = list(dict.fromkeys(self.points.names[constraints.points[index]] for index in indices))
        return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")

    def _infeasible(self, constraints: Constraints, error: InfeasibleConstraintsError) -> InfeasibleConstraintsError:
        remedy = f"Remove one of them, lower the margin by {error.slack:.4g} nats (the smallest number that helps), or"
        demand = constraints.demand
        if demand.epsilon is not None and error.slack > demand.aim:
            remedy = "No margin is small enough for them: remove one of them, or"
        return InfeasibleConstraintsError(
            f"No edit of {', '.join(self.names)} satisfies the constraints: "
            f"{self._name(constraints, error.conflicting)} contradict each other. {remedy} allow slack (slack='l2' or "
            "'l1').",
            [constraints.points[index] for index in error.conflicting],
            error.certificate,
            error.slack,
        )


def _sum(first: Factors, second: Factors) -> Factors:
    if not first:
        return second
    return {
        name: compress(
            torch.cat([first[name][0].double(), left.double()], 1),
            torch.cat([first[name][1].double(), right.double()]),
        )
        for name, (left, right) in second.items()
    }


def _scaled(factors: Factors, length: float) -> Factors:
    return {name: (length * left, right) for name, (left, right) in factors.items()}


def _norms(factors: Factors) -> float:
    """`||D||_F` over all modules, of an edit as the solver holds it: in the retain metric."""
    squares = (
        ((left.double().T @ left.double()) * (right.double() @ right.double().T)).sum()
        for left, right in factors.values()
    )
    return float(sum(squares)) ** 0.5


def _to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}
