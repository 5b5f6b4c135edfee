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
What `hf-unlearn estimate` predicts against what a step of `UnlearnTrainer` takes, on small shapes.

    python benchmarks/estimate.py --json benchmarks/results/estimate_cpu.json

FLOPs and peak memory over losses, scopes and wrappers, and as each size grows. The measured step is real: a model with
values, the Trainer's loop, torch's FLOP counter and the storage tracer of `measuring.py`. The prediction sees the
config alone.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import datasets
import torch
from datasets import Dataset
from machine import describe_versions
from measuring import PeakMemory, count_flops, describe_machine
from peft import LoraConfig
from step_cost import run_step
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.trainer_callback import PrinterCallback

from hf_unlearn import UnlearnConfig, UnlearnTrainer, unread_layers
from hf_unlearn.estimate import Estimate, ModelOptions, estimate_step
from hf_unlearn.losses import FORGET_LOSSES, RETAIN_LOSSES
from hf_unlearn.reference import SeparateModel, inner_model
from hf_unlearn.robustness.probe import LayerScore, ProbeConfig, RobustProbe, describe_base


TOLERANCE = 0.15
WARMUP_STEPS = 2


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a step."""

    layers: int = 4
    width: int = 128
    intermediate: int = 344
    heads: int = 4
    key_value_heads: int = 4
    vocabulary: int = 2048
    rows: int = 4
    length: int = 64
    kind: str = "llama"
    tied: bool = False

    def config(self) -> PreTrainedConfig:
        sizes = {
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.length,
            "tie_word_embeddings": self.tied,
            "use_cache": False,
        }
        gated = {"intermediate_size": self.intermediate, "num_key_value_heads": self.key_value_heads}
        if self.kind == "gpt2":
            return GPT2Config(n_inner=self.intermediate, **sizes)
        if self.kind == "gemma2":
            return Gemma2Config(**sizes, **gated, head_dim=self.width // self.heads)
        return {"llama": LlamaConfig, "qwen2": Qwen2Config}[self.kind](**sizes, **gated)


@dataclass(frozen=True)
class Case:
    """
    One run.

    Attributes:
        settings (`dict[str, Any]`): of [`~hf_unlearn.UnlearnConfig`].
        shape (`Shape`): sizes.
        rank (`int`, *optional*): of a LoRA.
        attention (`str`): implementation; torch counts the FLOPs of `"eager"` alone on a CPU.
        dtype (`str`): in which the model is loaded.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    shape: Shape = Shape()
    rank: int | None = None
    attention: str = "eager"
    dtype: str = "float32"

    def with_settings(self, **settings: Any) -> "Case":
        return replace(self, settings={**self.settings, **settings})

    @property
    def probe_layer(self) -> int:
        """Where something is trained at or below it."""
        return 1 if "rmu" in self.settings["forget_loss"] else self.shape.layers - 1

    def peft_config(self) -> LoraConfig | None:
        if self.rank is None:
            return None
        return LoraConfig(task_type="CAUSAL_LM", r=self.rank, target_modules="all-linear")

    def args(self, folder: str) -> UnlearnConfig:
        settings = {"bf16": False, "optim": "adamw_torch", "hidden_layer": 1, **self.settings}
        if "circuit_breaker" in settings.get("forget_loss", []) + settings.get("retain_loss", []):
            settings["circuit_breaker_layers"] = "1,2"
        return UnlearnConfig(
            folder,
            use_cpu=True,
            max_steps=1,
            save_strategy="no",
            per_device_train_batch_size=self.shape.rows,
            max_length=self.shape.length,
            completion_only_loss=False,
            max_grad_norm=0.0,
            report_to="none",
            disable_tqdm=True,
            **settings,
        )


NPO = Case({"forget_loss": ["npo"], "retain_loss": ["kl"]})
RMU = Case({"forget_loss": ["rmu"], "retain_loss": ["hidden_mse"]})
_SELECTED = {"trainable_layers": "1", "trainable_modules": ["mlp.down_proj"]}


def scopes_of(case: Case) -> dict[str, Case]:
    """One case for each scope. Losses of hidden states cannot move what lies above them."""
    layers = "0-1" if "rmu" in case.settings["forget_loss"] else "2-3"
    return {
        "full": case if layers == "2-3" else case.with_settings(trainable_layers=layers),
        "layers": case.with_settings(trainable_layers=layers[-1]),
        "modules": case.with_settings(trainable_layers=layers, trainable_modules=["mlp.down_proj"]),
        "lora": replace(case, rank=8),
    }


def loss_cases() -> dict[str, Case]:
    cases = {}
    pairs = [(name, "kl") for name in FORGET_LOSSES] + [("npo", name) for name in [*RETAIN_LOSSES, "none"]]
    for forget, retain in dict.fromkeys(pairs):
        # Read no logits, so that the layers above do not run
        if FORGET_LOSSES[forget].all_reads & {"hidden_states", "layer_states"}:
            retain = "circuit_breaker" if forget == "circuit_breaker" else "hidden_mse"
        case = Case({"forget_loss": [forget], "retain_loss": [retain]})
        if retain in ("hidden_mse", "circuit_breaker") and forget != "npo":
            scopes = {
                "layers": case.with_settings(trainable_layers="1"),
                "modules": case.with_settings(**_SELECTED),
                "lora": replace(case, rank=8),
            }
        else:
            scopes = scopes_of(case)
        cases.update({f"{forget} + {retain}, {scope}": scoped for scope, scoped in scopes.items()})
    return cases


WRAPPERS: dict[str, dict[str, Any]] = {
    "noise on the reference": {"reference_noise_std": 0.05, "reference_noise_layer": 1},
    "sam": {"sharpness": "sam"},
    "randomized": {"sharpness": "randomized", "sharpness_draws": 5},
    "gradient_penalty": {"sharpness": "gradient_penalty"},
    "curvature": {"sharpness": "curvature"},
    "gradient_conflict": {"gradient_conflict": "global"},
    "probe_weight": {"probe_weight": 0.05},
    "probe_weight_ratio": {"probe_weight_ratio": 0.5},
    "latent adversary": {"latent_adversary_layers": "0", "latent_adversary_steps": 5},
    "retain_null_space": {"retain_null_space": 0.99},
    "quantization_margin": {"quantization_margin": "int4"},
    "weight averaging": {"weight_averaging_start": 1, "weight_averaging_every": 1},
    "prism": {"sharpness": "sam", "gradient_conflict": "tensor", "probe_weight": 0.05},
}
# These move weights of linear layers only
_LINEAR_ONLY = ("retain_null_space", "quantization_margin")


def wrapper_cases() -> dict[str, Case]:
    cases = {}
    for loss, case in (("npo + kl", NPO), ("rmu + hidden_mse", RMU)):
        for scope, scoped in scopes_of(case).items():
            for name, settings in WRAPPERS.items():
                if scope == "layers" or (name in _LINEAR_ONLY and scope == "full"):
                    continue
                # More tokens than inputs of a matrix: with fewer, the null space is larger than any data's own
                shape = replace(case.shape, rows=16) if name == "retain_null_space" else case.shape
                cases[f"{loss}, {scope}, {name}"] = replace(scoped.with_settings(**settings), shape=shape)
    return cases


def setting_cases() -> dict[str, Case]:
    cases = {}
    for loss, case in (("npo + kl", NPO), ("rmu + hidden_mse", RMU)):
        for scope in ("full", "modules", "lora"):
            scoped, name = scopes_of(case)[scope], f"{loss}, {scope}"
            cases[f"{name}, checkpointed"] = scoped.with_settings(activation_checkpointing=True)
            cases[f"{name}, 5 micro-batches"] = scoped.with_settings(gradient_accumulation_steps=5)
            cases[f"{name}, second model"] = scoped.with_settings(reference_mode="copy")
            cases[f"{name}, sdpa"] = replace(scoped, attention="sdpa")
            cases[f"{name}, bf16 autocast"] = scoped.with_settings(bf16=True)
            cases[f"{name}, sgd"] = scoped.with_settings(optim="sgd")
            cases[f"{name}, fused AdamW"] = scoped.with_settings(optim="adamw_torch_fused")
        cases[f"{loss}, lora on bf16 weights"] = replace(scopes_of(case)["lora"], dtype="bfloat16")
        split = scopes_of(case)["modules"].with_settings(gradient_conflict="global", gradient_accumulation_steps=4)
        cases[f"{loss}, modules, gradient_conflict, 4 micro-batches"] = split
    for kind in ("qwen2", "gpt2", "gemma2"):
        cases[f"npo + kl, full, {kind}"] = replace(NPO, shape=Shape(kind=kind, key_value_heads=2, tied=True))
    return cases


def growth_cases() -> dict[str, Case]:
    """One size at a time, up to four times as large."""
    base = Shape()
    shapes = {
        "depth": [replace(base, layers=n) for n in (8, 16)],
        "width": [replace(base, width=n, intermediate=n * 43 // 16) for n in (256, 512)],
        "length": [replace(base, length=n) for n in (128, 256)],
        "batch": [replace(base, rows=n) for n in (8, 16)],
        "vocabulary": [replace(base, vocabulary=n) for n in (4096, 8192)],
    }
    cases = {}
    for loss, case in (("npo + kl", NPO), ("rmu + hidden_mse", RMU)):
        for scope in ("modules", "lora"):
            scoped = scopes_of(case)[scope]
            for name, sizes in shapes.items():
                for factor, shape in zip((2, 4), sizes, strict=True):
                    cases[f"{loss}, {scope}, {name} x {factor}"] = replace(scoped, shape=shape)
        for factor in (2, 4):
            cases[f"{loss}, lora, rank x {factor}"] = replace(case, rank=8 * factor)
    return cases


GROUPS: dict[str, Callable[[], dict[str, Case]]] = {
    "losses x scopes": loss_cases,
    "wrappers x scopes": wrapper_cases,
    "settings": setting_cases,
    "growth": growth_cases,
}


# ---- The measured step ----


def make_texts(shape: Shape, rows: int, seed: int) -> list[str]:
    """Random words, one token each, one less than a row is long."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, shape.vocabulary, (rows, shape.length - 1), generator=generator)
    return [" ".join(f"w{token}" for token in row) for row in tokens.tolist()]


class MeasuredStep:
    """A step of `UnlearnTrainer`: what `Trainer.train` does with the micro-batches of one optimizer step."""

    def __init__(self, case: Case):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            case.shape.config(), attn_implementation=case.attention, dtype=getattr(torch, case.dtype)
        )
        with tempfile.TemporaryDirectory() as folder:
            args = case.args(folder)
            if args.uses_probe:
                make_probe(model, case.probe_layer).save(folder)
                args.probe_path = folder
            rows = case.shape.rows * args.gradient_accumulation_steps
            forgotten, other, kept = (make_texts(case.shape, rows, seed) for seed in range(3))
            forget = {"prompt": ["w0"] * rows, "rejected": forgotten, "chosen": other}
            words = {f"w{number}": number for number in range(case.shape.vocabulary)}
            tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
            tokenizer.pre_tokenizer = Whitespace()
            self.trainer = UnlearnTrainer(
                model=model,
                args=args,
                train_dataset=Dataset.from_dict(forget),
                retain_dataset=Dataset.from_dict({"text": [f"w0 {text}" for text in kept]}),
                processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0"),
                peft_config=case.peft_config(),
            )
            self.trainer.remove_callback(PrinterCallback)
            self.trainer.train()
        self.model = self.trainer.model_wrapped
        self.batches = list(self.trainer.get_train_dataloader())

    def backward(self) -> Tensor:
        trainer = self.trainer
        batches, num_items = trainer.get_batch_samples(iter(self.batches), len(self.batches), trainer.args.device)
        for index, batch in enumerate(batches):
            trainer.accelerator.gradient_state._set_sync_gradients(index == len(batches) - 1)
            loss = trainer.training_step(self.model, batch, num_items)
        return loss

    def update(self) -> None:
        trainer = self.trainer
        handler, state, control = trainer.callback_handler, trainer.state, trainer.control
        trainer.optimizer.step()
        handler.on_optimizer_step(trainer.args, state, control)
        self.model.zero_grad()
        state.global_step += 1
        handler.on_step_end(trainer.args, state, control)


def make_probe(model: Any, layer: int) -> RobustProbe:
    """A probe with random weights: it costs what a trained one costs."""
    width = model.config.hidden_size
    sizes, weights = [width, 64, 32, 2], []
    for size_in, size_out in zip(sizes[:-1], sizes[1:], strict=True):
        weights += [torch.randn(size_out, size_in) / size_in**0.5, torch.zeros(size_out)]
    score = LayerScore(layer, accuracy=1.0, attacked_accuracy=1.0, loss=0.0)
    mean, std = torch.zeros(width), torch.ones(width)
    counts = {"forget": 1, "retain": 1}
    return RobustProbe(layer, mean, std, weights, ProbeConfig(), describe_base(model), [score], counts)


def measure(case: Case) -> dict[str, int]:
    """FLOPs and peak bytes of one step; it is built inside the tracer, so that whatever it holds counts."""
    gc.collect()
    # Host memory is this memory: what would wait there, out of a device's way, is left out
    with PeakMemory() as memory, patch.object(unread_layers, "host_is_elsewhere", lambda device: True):
        step = MeasuredStep(case)
        objective, start = step.trainer.objective, step.trainer.record.initial
        if start is not None and start is not objective.reference:
            memory.leave_out(start.values.values())  # for the report
        if objective.last_layer is not None:
            models = [step.trainer.model]
            if isinstance(objective.reference, SeparateModel):
                models.append(objective.reference.model)
            for model in map(inner_model, models):
                memory.leave_out(unread_layers.unread_parameters(model, objective.last_layer))
        for _ in range(WARMUP_STEPS):
            run_step(step)
        gc.collect()
        memory.peak = memory.alive
        run_step(step)
    return {"flops": sum(count_flops(partial(run_step, step)).values()), "peak_bytes": memory.peak}


def predict(case: Case) -> Estimate:
    with tempfile.TemporaryDirectory() as folder:
        args = case.args(folder)
        if args.uses_probe:
            args.probe_layers = str(case.probe_layer)
        options = ModelOptions(case.dtype, case.attention, case.peft_config())
        return estimate_step(case.shape.config(), args, options)


def compare(case: Case) -> dict[str, Any]:
    """Measured and predicted, and the relative error of the prediction."""
    measured, predicted = measure(case), predict(case)
    result: dict[str, Any] = {
        "measured": measured,
        "predicted": {"flops": predicted.total_flops, "peak_bytes": predicted.peak_bytes},
        "parts": {"flops": predicted.flops, "memory": predicted.memory},
    }
    result["error"] = {key: result["predicted"][key] / measured[key] - 1 for key in measured}
    if case.attention != "eager":  # whose FLOPs torch's counter does not know on a CPU
        del result["error"]["flops"]
    return result


# ---- The benchmark ----


def worst(results: dict[str, dict[str, Any]], key: str) -> tuple[str, float]:
    """The case whose prediction of `key` is furthest off, and its error."""
    errors = {name: result["error"][key] for name, result in results.items() if key in result["error"]}
    name = max(errors, key=lambda each: abs(errors[each]))
    return name, errors[name]


def format_table(groups: dict[str, dict[str, dict[str, Any]]]) -> str:
    rows = ["| | cases | worst FLOPs | worst memory | case of the latter |", "|---|---|---|---|---|"]
    for group, results in groups.items():
        name, error = worst(results, "peak_bytes")
        rows.append(f"| {group} | {len(results)} | {worst(results, 'flops')[1]:+.2%} | {error:+.2%} | {name} |")
    return "\n".join(rows)


SCOPES = ("full", "layers", "modules", "lora")


def _cells(measured: list[dict[str, int] | None]) -> str:
    return " | ".join(
        "" if each is None else f"{each['flops'] / 1e9:.2f}, {each['peak_bytes'] / 2**20:.1f}" for each in measured
    )


def format_costs(groups: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Measured GFLOP and MiB: of the losses and of the wrappers by scope, and as each size grows."""
    measured = {name: result["measured"] for results in groups.values() for name, result in results.items()}

    def table(title: str, columns: list[str], rows: dict[str, list[str]]) -> list[str]:
        head = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines = [f"| {row} | {_cells([measured.get(name) for name in names])} |" for row, names in rows.items()]
        return [*head, *lines, ""]

    losses = dict.fromkeys(name.rpartition(", ")[0] for name in groups["losses x scopes"])
    lines = table("losses", list(SCOPES), {loss: [f"{loss}, {scope}" for scope in SCOPES] for loss in losses})
    pairs = [(loss, scope) for loss in ("npo + kl", "rmu + hidden_mse") for scope in ("full", "modules", "lora")]
    rows = {wrapper: [f"{loss}, {scope}, {wrapper}" for loss, scope in pairs] for wrapper in WRAPPERS}
    lines += table("wrapper", [f"{loss}, {scope}" for loss, scope in pairs], rows)
    pairs = [(loss, scope) for loss in ("npo + kl", "rmu + hidden_mse") for scope in ("modules", "lora")]
    sizes = dict.fromkeys(name.rpartition(", ")[2] for name in groups["growth"])
    rows = {size: [f"{loss}, {scope}, {size}" for loss, scope in pairs] for size in sizes}
    lines += table("size", [f"{loss}, {scope}" for loss, scope in pairs], rows)
    return "\n".join(lines).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description="What is predicted of a step against what it takes.")
    parser.add_argument("--json", metavar="PATH", help="write the results here")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    options = parser.parse_args()

    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for group in options.groups:
        cases = GROUPS[group]()
        groups[group] = {
            name: compare(case) for name, case in tqdm(cases.items(), desc=group, file=sys.stderr, mininterval=5)
        }
    print(format_table(groups))
    if set(groups) == set(GROUPS):
        print(format_costs(groups))
    if options.json:
        report = {
            "command": "python benchmarks/estimate.py",
            "machine": describe_machine("cpu"),
            "versions": describe_versions("torch", "transformers", "accelerate", "peft", "hf-unlearn"),
            "tolerance": TOLERANCE,
            "groups": groups,
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
            file.write("\n")
    for results in groups.values():
        for key in ("flops", "peak_bytes"):
            name, error = worst(results, key)
            if abs(error) > TOLERANCE:
                sys.exit(f"{name}: the predicted {key} are off by {error:+.1%}, more than {TOLERANCE:.0%}.")


if __name__ == "__main__":
    main()
