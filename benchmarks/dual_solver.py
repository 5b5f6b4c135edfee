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
Seconds to solve the dual of a point-wise constrained edit, by the number of constraints.

    python benchmarks/dual_solver.py --json benchmarks/results/dual_solver_cpu.json

Synthetic constraints at the size of a real layer. Inputs share a mean and a spectrum that falls off, as hidden states
do: the cosine of two of them is about 0.8. Three kinds of output directions: differences of two unit vectors
("margin", a vocabulary of 32 000, given over the columns that occur), differences of two rows of a random head
("hidden", width 4096), and one direction whose sign is random ("opposed": similar inputs must be pushed apart, as
harmful and benign prompts; the worst conditioned of the three). `solve_dual` builds K, solves, and checks; building K
is also timed alone.
"""

import argparse
import json
import time
from typing import Any

import torch
from machine import describe_versions
from measuring import describe_machine
from torch import Tensor

from hf_unlearn.constraints.dual import edit_from_multipliers, solve_dual


WIDTH, VOCABULARY, FORBIDDEN = 4096, 32_000, 200
SIZES = (250, 500, 1000, 2000, 4000)
# Every constraint asks for a margin; this share of them already has one
SATISFIED_SHARE = 0.2
SHARED_DIRECTIONS, UNSHARED = 512, 0.1
KINDS = ("margin", "hidden", "opposed")
TARGET_CONSTRAINTS, TARGET_SECONDS, TOLERANCE = 2000, 60.0, 1e-9


def make_problem(kind: str, num_constraints: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Violations `(K,)`, output directions and inputs, float32 as a model gives them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    decay = torch.arange(1.0, SHARED_DIRECTIONS + 1).rsqrt()
    shared = normal(num_constraints, SHARED_DIRECTIONS) * decay / decay.norm() @ normal(SHARED_DIRECTIONS, WIDTH)
    inputs = 2 * normal(WIDTH) + shared + UNSHARED * normal(num_constraints, WIDTH)
    forbidden = torch.randint(FORBIDDEN, (num_constraints,), generator=generator)
    allowed = torch.randint(FORBIDDEN, VOCABULARY, (num_constraints,), generator=generator)
    if kind == "margin":
        tokens = torch.cat([forbidden, allowed]).unique()
        columns = torch.zeros(VOCABULARY, dtype=torch.int64)
        columns[tokens] = torch.arange(len(tokens))
        rows = torch.arange(num_constraints)
        directions = torch.zeros(num_constraints, len(tokens))
        directions[rows, columns[forbidden]] = 1.0
        directions[rows, columns[allowed]] = -1.0
    elif kind == "opposed":
        directions = torch.randint(2, (num_constraints, 1), generator=generator) * 2.0 - 1
    else:
        head = normal(VOCABULARY, WIDTH) * 0.02
        directions = head[forbidden] - head[allowed]
    violations = 8.0 + 4.0 * normal(num_constraints)
    satisfied = torch.rand(num_constraints, generator=generator) < SATISFIED_SHARE
    return torch.where(satisfied, -violations.abs(), violations), directions, inputs


def measure(kind: str, num_constraints: int, seed: int, device: str, repeats: int) -> dict[str, Any]:
    problem = tuple(tensor.to(device) for tensor in make_problem(kind, num_constraints, seed))
    violations, directions, inputs = problem
    seconds, gram_seconds = [], []
    for _ in range(repeats):
        start = _now(device)
        solution = solve_dual(*problem, tolerance=TOLERANCE)
        seconds.append(_now(device) - start)
        start = _now(device)
        (directions.double() @ directions.double().T).mul_(inputs.double() @ inputs.double().T)
        gram_seconds.append(_now(device) - start)
    # What the edit does to the constraints themselves, without K: a' D h <= -violation
    left, right = edit_from_multipliers(directions, inputs, solution.multipliers)
    values = ((directions.double() @ left) * (inputs.double() @ right.T)).sum(1)
    return {
        "constraints": num_constraints,
        "seconds": min(seconds),
        "seconds_all": [round(value, 4) for value in seconds],
        "gram_seconds": min(gram_seconds),
        "residual": solution.residual,
        "unscaled_residual": solution.unscaled_residual,
        "relative_duality_gap": solution.duality_gap / solution.objective,
        "largest_violation_after": (values + violations).max().item(),
        "edit_norm": (2 * solution.objective) ** 0.5,
        "active": len(solution.active),
        "iterations": solution.iterations,
        "used": solution.used,
    }


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def format_table(cases: dict[str, list[dict[str, Any]]]) -> str:
    rows = [
        "| output directions | constraints | active | s | of it K | steps | residual | largest violation left |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, results in cases.items():
        for result in results:
            rows.append(
                f"| {kind} | {result['constraints']} | {result['active']} | {result['seconds']:.2f} | "
                f"{result['gram_seconds']:.2f} | {result['iterations']} | {result['residual']:.1e} | "
                f"{result['largest_violation_after']:.1e} |"
            )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds to solve the dual, by the number of constraints.")
    parser.add_argument("--json", metavar="PATH", help="write the results here")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of constraints")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts (default: 3)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the constraints (default: 0)")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")

    cases = {
        kind: [measure(kind, size, options.seed, options.device, options.repeats) for size in options.sizes]
        for kind in KINDS
    }
    print(format_table(cases))
    if options.json:
        report = {
            "command": f"python benchmarks/dual_solver.py --sizes {' '.join(map(str, options.sizes))} --repeats "
            f"{options.repeats} --device {options.device} --seed {options.seed}",
            "machine": describe_machine(options.device),
            "versions": describe_versions("torch", "scipy", "hf-unlearn"),
            "target": {"constraints": TARGET_CONSTRAINTS, "width": WIDTH, "seconds": TARGET_SECONDS},
            "cases": cases,
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
