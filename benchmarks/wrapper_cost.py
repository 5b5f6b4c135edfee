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
What each wrapper that makes forgetting hold adds to an optimizer step.

    python benchmarks/wrapper_cost.py --json benchmarks/results/wrapper_cost_cpu.json

Every wrapper against the same step without it: FLOPs, CPU seconds and peak memory, for NPO + KL through all layers and
for RMU through the lowest three. The model, the rows and the counters are those of `step_cost.py`.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import step_cost
import torch
from machine import describe_versions
from measuring import PeakMemory, count_flops, describe_machine
from step_cost import Case, OurStep, make_model, run_step

from hf_unlearn.robustness.probe import LayerScore, ProbeConfig, RobustProbe, describe_base


@dataclass(frozen=True)
class Wrapper:
    """
    Settings that are added to a case.

    Attributes:
        settings (`dict[str, Any]`): of [`~hf_unlearn.UnlearnConfig`].
        bounds (`dict[str, float]`): what it may cost, as a multiple of the step without it.
    """

    settings: dict[str, Any]
    bounds: dict[str, float] = field(default_factory=dict)

    @property
    def has_probe(self) -> bool:
        return "probe_weight" in self.settings or "probe_weight_ratio" in self.settings


CASES = {
    "npo + kl, all 8 layers": Case(
        layers="5-7", settings={"forget_loss": ["npo"], "retain_loss": ["kl"], "beta": step_cost.BETA}, bounds={}
    ),
    "rmu + hidden_mse, 3 of 8 layers": replace(step_cost.CASES["rmu"], bounds={}),
}

# By case: where the probe and the noise are, and the layer that an adversary changes
LAYERS = {"npo + kl, all 8 layers": (6, 7, "4"), "rmu + hidden_mse, 3 of 8 layers": (2, 2, "1")}

_SAM = {"sharpness": "sam", "sharpness_radius": 0.01}
_CONFLICT = {"gradient_conflict": "global"}
_PROBE = {"probe_weight": 0.05}


def wrappers_of(case_name: str) -> dict[str, Wrapper]:
    _, noise_layer, adversary_layer = LAYERS[case_name]
    adversary = {"latent_adversary_layers": adversary_layer, "latent_adversary_radius": 0.1}
    return {
        "noise on the reference": Wrapper(
            {"reference_noise_std": 0.05, "reference_noise_layer": noise_layer}, {"flops": 1.0, "seconds": 1.03}
        ),
        "sam": Wrapper(_SAM, {"flops": 1.6, "seconds": 1.6}),
        "randomized, 3 draws": Wrapper({"sharpness": "randomized", "sharpness_draws": 3}),
        "gradient_penalty": Wrapper({"sharpness": "gradient_penalty"}),
        "curvature": Wrapper({"sharpness": "curvature"}),
        "gradient_conflict": Wrapper(_CONFLICT),
        "probe_weight": Wrapper(_PROBE),
        "probe_weight_ratio": Wrapper({"probe_weight_ratio": 0.5}),
        "sam + gradient_conflict + probe_weight": Wrapper({**_SAM, **_CONFLICT, **_PROBE}),
        "latent adversary, 1 step": Wrapper({**adversary, "latent_adversary_steps": 1}),
        "latent adversary, 4 steps": Wrapper({**adversary, "latent_adversary_steps": 4}),
        "retain_null_space": Wrapper({"retain_null_space": 0.9}),
        "quantization_margin int4": Wrapper({"quantization_margin": "int4"}),
        "weight averaging": Wrapper({"weight_averaging_start": 1, "weight_averaging_every": 1}),
    }


class WrappedStep(OurStep):
    """A step with a wrapper: also what follows the optimizer in `Trainer.train`, which the callbacks do."""

    def update(self) -> None:
        trainer = self.trainer
        handler, state, control = trainer.callback_handler, trainer.state, trainer.control
        trainer.optimizer.step()
        handler.on_optimizer_step(trainer.args, state, control)
        self.model.zero_grad()
        state.global_step += 1
        handler.on_step_end(trainer.args, state, control)


def make_step(case_name: str, wrapper: Wrapper | None, seed: int) -> WrappedStep:
    """A step of a case on the CPU, without a wrapper where there is none."""
    case = CASES[case_name]
    if wrapper is None:
        return WrappedStep(case, seed, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        settings = {**case.settings, **wrapper.settings}
        if wrapper.has_probe:
            make_probe(LAYERS[case_name][0], seed).save(folder)
            settings["probe_path"] = folder
        return WrappedStep(replace(case, settings=settings), seed, "cpu")


def make_probe(layer: int, seed: int) -> RobustProbe:
    """A probe with random weights: it costs what a trained one costs."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [step_cost.HIDDEN, 64, 32, 2]
    weights = []
    for size_in, size_out in zip(sizes[:-1], sizes[1:], strict=True):
        weights += [torch.randn(size_out, size_in, generator=generator) / size_in**0.5, torch.zeros(size_out)]
    score = LayerScore(layer, accuracy=1.0, attacked_accuracy=1.0, loss=0.0)
    mean, std = torch.zeros(step_cost.HIDDEN), torch.ones(step_cost.HIDDEN)
    base = describe_base(make_model(seed))
    return RobustProbe(layer, mean, std, weights, ProbeConfig(), base, [score], {"forget": 1, "retain": 1})


# ---- What is measured ----


def measure_flops(case_name: str, wrapper: Wrapper | None, seed: int) -> int:
    """FLOPs of the matrix products of one step."""
    return sum(count_flops(partial(run_step, make_step(case_name, wrapper, seed))).values())


def measure_peak_bytes(case_name: str, wrapper: Wrapper | None, seed: int) -> int:
    """Peak of all tensors alive in a step; the step is built inside, so that whatever it holds counts."""
    gc.collect()
    with PeakMemory() as memory:
        step = make_step(case_name, wrapper, seed)
        for _ in range(step_cost.WARMUP_STEPS):
            run_step(step)
        gc.collect()
        memory.peak = memory.alive
        run_step(step)
    return memory.peak


def measure_pairs(plain: WrappedStep, wrapped: WrappedStep, repeats: int) -> list[tuple[float, float]]:
    """
    CPU seconds of neighbouring steps, without and with the wrapper. They take turns in being first, so that a drift of
    the machine's speed falls on both.
    """
    pairs = []
    for repeat in range(-step_cost.WARMUP_STEPS, repeats):
        seconds = {}
        for step in (plain, wrapped) if repeat % 2 else (wrapped, plain):
            start = time.process_time()
            run_step(step)
            seconds[step] = time.process_time() - start
        if repeat >= 0:
            pairs.append((seconds[plain], seconds[wrapped]))
    return pairs


def measure_case(case_name: str, seed: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Everything about one case, by wrapper; `"plain"` is the step without one."""
    plain, peak = make_step(case_name, None, seed), measure_peak_bytes(case_name, None, seed)
    flops = sum(count_flops(partial(run_step, plain)).values())
    results: dict[str, dict[str, Any]] = {"plain": {"flops": flops, "peak_bytes": peak}}
    plain_seconds: list[float] = []
    for name, wrapper in wrappers_of(case_name).items():
        peak_bytes, wrapped = measure_peak_bytes(case_name, wrapper, seed), make_step(case_name, wrapper, seed)
        wrapped_flops = sum(count_flops(partial(run_step, wrapped)).values())
        result: dict[str, Any] = {"flops": wrapped_flops, "peak_bytes": peak_bytes}
        result["ratio"] = {"flops": result["flops"] / flops, "peak_bytes": result["peak_bytes"] / peak}
        if repeats:
            pairs = measure_pairs(plain, wrapped, repeats)
            plain_seconds += [before for before, _ in pairs]
            ratios = sorted(after / before for before, after in pairs)
            result["seconds"] = statistics.median(after for _, after in pairs)
            result["ratio"]["seconds"] = statistics.median(ratios)
            result["seconds_ratio_quartiles"] = [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]]
        results[name] = result
        print(f"{case_name}: {name}: {result['ratio']}", file=sys.stderr, flush=True)
    if repeats:
        results["plain"]["seconds"] = statistics.median(plain_seconds)
    return results


def format_table(cases: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Ratios to the plain step, the cases side by side."""
    names = list(cases)
    rows = [
        "| | " + " | ".join(f"{name}: FLOPs | CPU time | memory" for name in names) + " |",
        "|---|" + "---|" * (3 * len(names)),
    ]
    plain = [cases[name]["plain"] for name in names]
    absolute = " | ".join(
        f"{entry['flops'] / 1e9:.1f} GFLOP | {entry['seconds']:.2f} s | {entry['peak_bytes'] / 2**20:.0f} MiB"
        for entry in plain
    )
    rows.append(f"| *without* | {absolute} |")
    for wrapper in cases[names[0]]:
        if wrapper == "plain":
            continue
        cells = []
        for name in names:
            ratio, bounds = cases[name][wrapper]["ratio"], wrappers_of(name)[wrapper].bounds
            for key in ("flops", "seconds", "peak_bytes"):
                bound = f" (≤ {bounds[key]:g})" if key in bounds else ""
                cells.append(f"{ratio[key]:.2f}{bound}")
        rows.append(f"| {wrapper} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="What each wrapper adds to an optimizer step.")
    parser.add_argument("--json", metavar="PATH", help="write the results here")
    parser.add_argument("--repeats", type=int, default=15, help="timed pairs of steps for each wrapper (default: 15)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and control vector (default: 0)")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")

    torch.set_num_threads(1)  # CPU time then counts the work and not who waits for whom
    cases = {name: measure_case(name, options.seed, options.repeats) for name in CASES}
    print(format_table(cases))
    if options.json:
        report = {
            "command": f"python benchmarks/wrapper_cost.py --repeats {options.repeats} --seed {options.seed}",
            "machine": describe_machine("cpu"),
            "versions": describe_versions("torch", "transformers", "accelerate", "hf-unlearn"),
            "cases": cases,
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
