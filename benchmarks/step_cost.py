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
What one optimizer step costs, against the same step in the way of the published scripts.

    python benchmarks/step_cost.py --json benchmarks/results/step_cost_cpu.json

FLOPs, seconds and peak memory of an `UnlearnTrainer` step and of a naive one, which is written out below: a second
full model as the reference, nothing frozen, every layer and every logit computed. Both give the same loss and the same
gradients, which is checked first. What is counted stands in `benchmarks/README.md`.
"""

import argparse
import copy
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import datasets
import torch
import torch.nn.functional as F
from datasets import Dataset
from machine import describe_versions
from measuring import PeakMemory, count_flops, describe_machine, measure_product_rate, synchronize
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback

from hf_unlearn import UnlearnConfig, UnlearnTrainer, unread_layers


LAYERS, HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 8, 256, 688, 8, 4096
GROUP = 1  # query heads that share keys and values
ROWS, LENGTH = 4, 128  # of each set; every token is labelled
LEARNING_RATE, ADAM_EPSILON = 5e-5, 1e-6
HIDDEN_LAYER, STEERING_COEFFICIENT, RETAIN_WEIGHT = 2, 6.5, 1200.0
BETA = 0.1

# Largest relative difference of the loss and of each gradient between two variants, in fp32
TOLERANCE = 1e-5
# Time ratios over FLOP ratios in the models of 32 layers, at most, on an idle machine
TIME_OVER_FLOPS = 1.25
WARMUP_STEPS = 2


@dataclass(frozen=True)
class Case:
    """A method, and the `mlp.down_proj` that it trains."""

    layers: str
    settings: dict[str, Any]
    bounds: dict[str, float]  # ours / naive, at most
    shape: dict[str, int] = field(default_factory=dict)  # of the model and the rows, where it is another one
    cache_bounds: dict[str, float] = field(default_factory=dict)  # FLOPs with what is read from disk / naive

    @contextmanager
    def shaped(self) -> Iterator[None]:
        """In this context models and rows have the case's shape."""
        original = {name: globals()[name] for name in self.shape}
        globals().update(self.shape)
        try:
            yield
        finally:
            globals().update(original)

    def bounds_of(self, variant: str) -> dict[str, float]:
        if variant == "ours":
            return self.bounds
        return {"flops": self.cache_bounds[variant]} if variant in self.cache_bounds else {}

    @property
    def reference_sets(self) -> int:
        """How many of the two sets are read by the reference."""
        return 1 + (self.settings["forget_loss"] == ["npo"] and self.settings["retain_loss"] == ["kl"])

    @property
    def trained_layers(self) -> list[int]:
        first, last = self.layers.split("-")
        return list(range(int(first), int(last) + 1))


CASES = {
    "rmu": Case(
        layers="0-2",
        settings={
            "forget_loss": ["rmu"],
            "retain_loss": ["hidden_mse"],
            "retain_loss_weights": [RETAIN_WEIGHT],
            "hidden_layer": HIDDEN_LAYER,
            "steering_coefficient": STEERING_COEFFICIENT,
        },
        bounds={"flops": 0.38, "seconds": 0.50, "peak_bytes": 0.6},
    ),
    "npo": Case(
        layers="5-7",
        settings={"forget_loss": ["npo"], "retain_loss": ["nll"], "beta": BETA},
        bounds={"flops": 0.58},
    ),
}


def zephyr_shape(divisor: int) -> dict[str, int]:
    """
    Zephyr-7B (hidden size 4096, intermediate size 14336, 4 query heads for each of keys and values, vocabulary 32000,
    rows of 512 tokens) with every size divided: each product's share of the FLOPs is what it is there.
    """
    return {
        "LAYERS": 32,
        "HIDDEN": 4096 // divisor,
        "INTERMEDIATE": 14336 // divisor,
        "HEADS": 4,
        "GROUP": 4,
        "VOCABULARY": 32000 // divisor,
        "LENGTH": 512 // divisor,
        "HIDDEN_LAYER": 7,
    }


DEEP_SHAPE = zephyr_shape(16)
DEEP_CASES = {
    "rmu, layer 7 of 32": Case(
        layers="5-7",
        settings={**CASES["rmu"].settings, "hidden_layer": 7},
        bounds={"flops": 0.19, "peak_bytes": 0.2},
        shape=DEEP_SHAPE,
        cache_bounds={"ours, prefix cached": 0.10, "ours, all cached": 0.08},
    ),
    "npo + kl, 32 layers": Case(
        layers="5-7",
        settings={"forget_loss": ["npo"], "retain_loss": ["kl"], "beta": BETA},
        bounds={"flops": 0.75},
        shape=DEEP_SHAPE,
        cache_bounds={"ours, reference cached": 0.55, "ours, all cached": 0.55},
    ),
}
ALL_CASES = {**CASES, **DEEP_CASES}


# ---- The two steps ----


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // GROUP,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        attn_implementation="eager",  # plain matrix products: every FLOP of the attention is counted
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_rows(seed: int) -> dict[str, Tensor]:
    """Random tokens, `(ROWS, LENGTH)` for each set."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=generator) for name in ("forget", "retain")}


def trained_matrices(model: nn.Module, case: Case) -> dict[str, nn.Parameter]:
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in case.trained_layers]
    return {name: model.get_parameter(name) for name in names}


@torch.no_grad()
def move_from_reference(matrices: dict[str, nn.Parameter], seed: int) -> None:
    """Adds noise of the size of the weights: at the reference itself, half of the losses have no gradient."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in matrices.values():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device)


class OurStep:
    """A step of `UnlearnTrainer`: what `Trainer.train` does with one batch."""

    def __init__(
        self,
        case: Case,
        seed: int,
        device: str,
        activation_checkpointing: bool = False,
        caches: Sequence[str] = (),
    ):
        self._caches = tempfile.TemporaryDirectory()
        settings: dict[str, Any] = {}
        if "prefix" in caches:
            settings["prefix_cache"] = os.path.join(self._caches.name, "prefix")
        if "reference" in caches:
            settings["reference_cache"] = os.path.join(self._caches.name, "reference")
            settings["precompute_ref_log_probs"] = True
        case = replace(case, settings={**case.settings, **settings})
        with tempfile.TemporaryDirectory() as folder:
            self.trainer = _make_trainer(case, seed, device, activation_checkpointing, folder)
            self.matrices = trained_matrices(self.trainer.model, case)
            initial = [parameter.detach().clone() for parameter in self.matrices.values()]
            # One step of the real loop, which prepares model, optimizer and checkpointing; its update is taken back
            self.trainer.train()
        for parameter, value in zip(self.matrices.values(), initial, strict=True):
            parameter.data.copy_(value)
        move_from_reference(self.matrices, seed)
        self.model = self.trainer.model_wrapped
        self.batch = next(iter(self.trainer.get_train_dataloader()))

    @property
    def on_host(self) -> list[Tensor]:
        """What is not on the device."""
        unread_layers = self.trainer.unread_layers
        return [] if unread_layers is None else [value for _, value in unread_layers.on_host]

    def backward(self) -> Tensor:
        device = self.trainer.args.device
        batches, num_items_in_batch = self.trainer.get_batch_samples(iter([self.batch]), 1, device)
        return self.trainer.training_step(self.model, batches[0], num_items_in_batch)

    def update(self) -> None:
        self.trainer.optimizer.step()
        self.model.zero_grad()


def _make_trainer(
    case: Case, seed: int, device: str, activation_checkpointing: bool, output_dir: str
) -> UnlearnTrainer:
    datasets.disable_progress_bars()
    tokenizer = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    sets = {name: Dataset.from_dict({"input_ids": rows.tolist()}) for name, rows in make_rows(seed).items()}
    trainer = UnlearnTrainer(
        model=make_model(seed),
        args=UnlearnConfig(
            output_dir,
            use_cpu=device == "cpu",
            bf16=False,
            seed=seed,
            max_steps=1,
            save_strategy="no",
            trainable_layers=case.layers,
            trainable_modules=["mlp.down_proj"],
            activation_checkpointing=activation_checkpointing,
            per_device_train_batch_size=ROWS,
            train_sampling_strategy="sequential",
            max_length=LENGTH,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            adam_epsilon=ADAM_EPSILON,
            optim="adamw_torch",
            max_grad_norm=0.0,
            report_to="none",
            disable_tqdm=True,
            **case.settings,
        ),
        train_dataset=sets["forget"],
        retain_dataset=sets["retain"],
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>"),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class NaiveStep:
    """
    The same step as the published scripts write it.

    The optimizer holds the selected matrices only, as theirs does; gradients of all other parameters are computed all
    the same, and stay, because `optimizer.zero_grad` does not know them.
    """

    def __init__(self, case: Case, seed: int, device: str):
        self.model = make_model(seed).to(device)
        self.reference = copy.deepcopy(self.model)
        self.compute_loss = _naive_rmu if "rmu" in case.settings["forget_loss"] else _naive_npo
        self.has_kl = case.settings["retain_loss"] == ["kl"]
        self.batches = {
            name: {"input_ids": rows.to(device), "attention_mask": torch.ones_like(rows).to(device)}
            for name, rows in make_rows(seed).items()
        }
        # Drawn as `UnlearnTrainer` draws it for one topic
        vector = torch.rand(1, HIDDEN, generator=torch.Generator().manual_seed(seed))[0].to(device)
        self.control_vector = STEERING_COEFFICIENT * vector / vector.norm()
        self.matrices = trained_matrices(self.model, case)
        move_from_reference(self.matrices, seed)
        self.on_host: list[Tensor] = []
        self.optimizer = torch.optim.AdamW(
            self.matrices.values(), lr=LEARNING_RATE, eps=ADAM_EPSILON, weight_decay=0.0
        )

    def backward(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.compute_loss(self)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        self.optimizer.step()


def _naive_rmu(step: NaiveStep) -> Tensor:
    def hidden_states(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        # [0] is the embedding. Nothing else of the output outlives this line, logits and upper layers included.
        return model(**batch, output_hidden_states=True, use_cache=False).hidden_states[HIDDEN_LAYER + 1]

    forget = hidden_states(step.model, step.batches["forget"])
    forget_loss = F.mse_loss(forget, step.control_vector.expand_as(forget))
    retain = hidden_states(step.model, step.batches["retain"])
    with torch.no_grad():
        target = hidden_states(step.reference, step.batches["retain"])
    return forget_loss + RETAIN_WEIGHT * F.mse_loss(retain, target)


def _naive_npo(step: NaiveStep) -> Tensor:
    def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(**batch, use_cache=False).logits[:, :-1].transpose(1, 2)
        return F.cross_entropy(logits, batch["input_ids"][:, 1:], reduction="none")

    forget, retain = step.batches["forget"], step.batches["retain"]
    losses = token_losses(step.model, forget)
    with torch.no_grad():
        reference_losses = token_losses(step.reference, forget)
    # The scripts sum over tokens first, and lose digits: 1e-4 of the 1000 nats of a row, 5e-6 of the gradient.
    log_ratio = (reference_losses - losses).sum(-1)
    forget_loss = -F.logsigmoid(-BETA * log_ratio).mean() * 2 / BETA
    if not step.has_kl:
        return forget_loss + step.model(**retain, labels=retain["input_ids"], use_cache=False).loss
    with torch.no_grad():
        target = step.reference(**retain, use_cache=False).logits[:, :-1].log_softmax(-1)
    log_probs = step.model(**retain, use_cache=False).logits[:, :-1].log_softmax(-1)
    return forget_loss + (target.exp() * (target - log_probs)).sum(-1).mean()


Step = OurStep | NaiveStep

VARIANTS: dict[str, Callable[[Case, int, str], Step]] = {
    "naive": NaiveStep,
    "ours": OurStep,
    # The naive scripts keep all activations; so does "ours" above.
    "ours, checkpointed": lambda *args: OurStep(*args, activation_checkpointing=True),
    # From the second time on that a row comes
    "ours, prefix cached": lambda *args: OurStep(*args, caches=["prefix"]),
    "ours, reference cached": lambda *args: OurStep(*args, caches=["reference"]),
    "ours, all cached": lambda *args: OurStep(*args, caches=["prefix", "reference"]),
}


def run_step(step: Step) -> None:
    step.backward()
    step.update()


# ---- FLOPs ----


def expected_flops(case: Case, variant: str) -> int:
    """The same by formula. A product of `(m, k)` and `(k, n)` is `2 m k n`; forward and gradients alike."""
    tokens, predicted = ROWS * LENGTH, ROWS * (LENGTH - 1)
    down = 2 * HIDDEN * INTERMEDIATE  # per token, as all below
    attention = 4 * LENGTH * HIDDEN  # scores and their product with the values, masked positions too
    layer = (4 + 4 // GROUP) * HIDDEN**2 + 3 * down + attention  # q and o, k and v; gate, up, down
    head = 2 * HIDDEN * VOCABULARY
    is_rmu = "rmu" in case.settings["forget_loss"]
    references = case.reference_sets

    if variant == "naive":
        # Both sets, and one or both through the reference. Two gradients for each product.
        forward = (2 + references) * tokens * (LAYERS * layer + head)
        below_loss = (HIDDEN_LAYER + 1) * layer if is_rmu else LAYERS * layer + head
        return forward + 2 * tokens * 2 * below_loss

    depth = HIDDEN_LAYER + 1 if is_rmu else LAYERS
    head_flops = 0 if is_rmu else predicted * head
    # Up to the input of the first trained matrix, the reference is what the policy is: run once for both
    shared = case.trained_layers[0] * layer + layer - down
    reads_targets = variant in ("ours, reference cached", "ours, all cached")
    reads_prefix = variant in ("ours, prefix cached", "ours, all cached")
    passes = 2 if reads_targets else 2 + references
    forward = tokens * (passes * (depth * layer - shared) + (0 if reads_prefix else 2) * shared)
    forward += passes * head_flops
    if reads_targets and references == 2:
        forward += head_flops  # of KL, states are kept and not whole distributions
    # In the lowest trained layer the gradient of its matrix alone, above it those of activations too. Products with a
    # frozen weight have one of these, the two of the attention have two each.
    above_lowest = depth - 1 - case.trained_layers[0]
    trained = len(case.trained_layers)
    backward = 2 * (tokens * (trained * down + above_lowest * (layer + attention)) + head_flops)
    if variant != "ours, checkpointed":
        return forward + backward
    # Layers with something to differentiate are run again up to the input of `down_proj`, their last saved tensor.
    return forward + backward + 2 * tokens * (depth - case.trained_layers[0]) * (layer - down)


# ---- Memory ----


def measure_peak_bytes(variant: str, case: Case, seed: int, device: str) -> int:
    """
    Peak of all tensors in a step: weights, reference, gradients, optimizer state, activations.

    The variant is built inside the measurement, so that whatever it holds counts.
    """
    gc.collect()
    if device == "cpu":
        # Host memory is this memory: what would wait there, out of a device's way, is left out
        with PeakMemory() as memory, patch.object(unread_layers, "host_is_elsewhere", lambda device: True):
            step = VARIANTS[variant](case, seed, device)
            memory.leave_out(step.on_host)
            for _ in range(WARMUP_STEPS):  # the optimizer's state exists from the first step on
                run_step(step)
            gc.collect()
            memory.peak = memory.alive
            run_step(step)
        return memory.peak
    x = torch.ones(8, 8, device=device, requires_grad=True)
    (x @ x).sum().backward()  # cuBLAS takes its workspace before the baseline is read
    baseline = torch.cuda.memory_allocated()
    step = VARIANTS[variant](case, seed, device)
    for _ in range(WARMUP_STEPS):
        run_step(step)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    run_step(step)
    return torch.cuda.max_memory_allocated() - baseline


# ---- Time ----


def measure_seconds(steps: dict[str, Step], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each step, the variants by turns, so that whatever else the machine does falls on all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(-WARMUP_STEPS, repeats):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            run_step(step)
            synchronize(device)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio_of_pairs(seconds: list[float], naive_seconds: list[float]) -> float:
    """Median of the ratios of neighbouring steps."""
    return statistics.median(a / b for a, b in zip(seconds, naive_seconds, strict=True))


# ---- Equality ----


def relative_differences(step: Step, naive: Step) -> dict[str, float]:
    """Of the loss, and the largest among the trained matrices' gradients: `|a - b| / |b|`."""
    losses, gradients = [], []
    for variant in (step, naive):
        losses.append(variant.backward())
        gradients.append({name: parameter.grad.clone() for name, parameter in variant.matrices.items()})
        variant.model.zero_grad()
    differences = [(gradients[0][name] - gradient).norm() / gradient.norm() for name, gradient in gradients[1].items()]
    return {
        "loss": ((losses[0] - losses[1]).abs() / losses[1].abs()).item(),
        "gradient": torch.stack(differences).max().item(),
    }


def require_equal(differences: dict[str, float]) -> None:
    for name, difference in differences.items():
        if not difference <= TOLERANCE:
            raise RuntimeError(f"The {name} differs from the naive step's by {difference:.1e}: not the same work.")


# ---- The benchmark ----


def measure_case(
    case: Case, seed: int, device: str, repeats: int, variants: Sequence[str] = tuple(VARIANTS)
) -> dict[str, dict[str, Any]]:
    """Everything about one case, by variant, the naive one among them. With `repeats=0` no times."""
    with case.shaped():
        return _measure_case(case, seed, device, repeats, variants)


def _measure_case(
    case: Case, seed: int, device: str, repeats: int, variants: Sequence[str]
) -> dict[str, dict[str, Any]]:
    peaks = {name: measure_peak_bytes(name, case, seed, device) for name in variants}
    steps = {name: VARIANTS[name](case, seed, device) for name in variants}
    differences = {name: relative_differences(step, steps["naive"]) for name, step in steps.items()}
    for difference in differences.values():
        require_equal(difference)  # before anything moves the weights
    operations = {name: count_flops(partial(run_step, step)) for name, step in steps.items()}
    seconds = measure_seconds(steps, repeats, device) if repeats else {}
    product_rate = measure_product_rate(device) if repeats else 0.0
    results = {}
    for name in variants:
        results[name] = {
            "relative_difference": differences[name],
            "flops": sum(operations[name].values()),
            "flops_expected": expected_flops(case, name),
            "flops_by_operation": operations[name],
            "peak_bytes": peaks[name],
        }
        results[name]["ratio"] = {key: results[name][key] / results["naive"][key] for key in ("flops", "peak_bytes")}
        if seconds:
            results[name]["seconds"] = statistics.median(seconds[name])
            results[name]["seconds_all"] = [round(value, 4) for value in seconds[name]]
            results[name]["ratio"]["seconds"] = ratio_of_pairs(seconds[name], seconds["naive"])
            results[name]["roofline"] = results[name]["flops"] / results[name]["seconds"] / product_rate
    return results


def format_table(cases: dict[str, dict[str, dict[str, Any]]]) -> str:
    rows = [
        "| case | variant | GFLOP | by formula | ratio | s/step | ratio | roofline | peak MiB | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case_name, results in cases.items():
        for name, result in results.items():
            bounds = ALL_CASES[case_name].bounds_of(name)
            ratios = {
                key: f"{ratio:.3f}" + (f" (≤ {bounds[key]})" if key in bounds else "")
                for key, ratio in result["ratio"].items()
            }
            rows.append(
                f"| {case_name} | {name} | {result['flops'] / 1e9:.2f} | {result['flops_expected'] / 1e9:.2f} | "
                f"{ratios['flops']} | {result['seconds']:.3f} | {ratios['seconds']} | {result['roofline']:.2f} | "
                f"{result['peak_bytes'] / 2**20:.1f} | {ratios['peak_bytes']} |"
            )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="What one optimizer step costs, against the published scripts' way.")
    parser.add_argument("--json", metavar="PATH", help="write the results here")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each variant, by turns (default: 15)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and control vector (default: 0)")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")

    cases = {
        name: measure_case(case, options.seed, options.device, options.repeats) for name, case in ALL_CASES.items()
    }
    print(format_table(cases))
    if options.json:
        report = {
            "command": f"python benchmarks/step_cost.py --repeats {options.repeats} --device {options.device} "
            f"--seed {options.seed}",
            "machine": describe_machine(options.device),
            "versions": describe_versions("torch", "transformers", "accelerate", "hf-unlearn"),
            "bounds": {
                name: {variant: case.bounds_of(variant) for variant in VARIANTS if case.bounds_of(variant)}
                for name, case in ALL_CASES.items()
            },
            "cases": cases,
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
