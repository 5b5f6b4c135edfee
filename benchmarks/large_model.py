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
A step at the size of a 7B model, from random weights: seconds, peak memory, and how near it comes to the roofline.

    python benchmarks/large_model.py --json benchmarks/results/large_model_cuda.json    # a GPU of 80 GB
    python benchmarks/large_model.py --shape tiny --device cpu                          # seconds, to try it

The shape is Zephyr-7B's, in bfloat16 with SDPA; 4 + 4 rows of 512 tokens. RMU at layer 7 and NPO + KL train three
`mlp.down_proj` (float32 masters under bf16 autocast), and are compared with the step that published scripts write: a
second model, nothing frozen, in pure bfloat16 (`step_cost.py`). NPO + KL with a LoRA on all matrices, alone and with
SAM, are measured beside the latter. At last, the dual of a point-wise edit with 8192 constraints (`dual_solver.py`).

Roofline: the larger of the time that the FLOPs take at the rate of one large matrix product in bfloat16 and the time
that reading the weights of each forward and backward once takes at the rate of a copy, both measured in the same run,
over the time of the step.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
from functools import partial
from typing import Any

import datasets
import dual_solver
import step_cost
import torch
from datasets import Dataset
from machine import describe_versions
from measuring import count_flops, describe_machine, measure_product_rate, time_calls
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback

from hf_unlearn import UnlearnConfig, UnlearnTrainer


SHAPES = {
    "7b": {**step_cost.zephyr_shape(1), "HEADS": 32, "GROUP": 4},
    "tiny": {**step_cost.zephyr_shape(64), "LAYERS": 10, "HEADS": 4, "GROUP": 4},
}
LORA = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
NAIVE = {"rmu": step_cost.DEEP_CASES["rmu, layer 7 of 32"], "npo": step_cost.DEEP_CASES["npo + kl, 32 layers"]}
RMU, NPO = NAIVE["rmu"].settings, NAIVE["npo"].settings
# Name -> settings, adapter, and the naive step that it is compared with
CASES: dict[str, tuple[dict[str, Any], LoraConfig | None, str]] = {
    "rmu, layer 7": (RMU, None, "rmu"),
    "npo + kl": (NPO, None, "npo"),
    "npo + kl, lora": (NPO, LORA, "npo"),
    "npo + kl, lora, sam": ({**NPO, "sharpness": "sam"}, LORA, "npo"),
}
CONSTRAINTS = {"7b": 8192, "tiny": 64}


def make_model(seed: int, device: str) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        num_hidden_layers=step_cost.LAYERS,
        hidden_size=step_cost.HIDDEN,
        intermediate_size=step_cost.INTERMEDIATE,
        num_attention_heads=step_cost.HEADS,
        num_key_value_heads=step_cost.HEADS // step_cost.GROUP,
        vocab_size=step_cost.VOCABULARY,
        pad_token_id=0,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
        dtype=torch.bfloat16,
    )
    with torch.device(device):  # random numbers for 7B values take minutes on a CPU
        return LlamaForCausalLM(config).to(torch.bfloat16)


class OurStep:
    """A step of [`UnlearnTrainer`], as `Trainer.train` makes it."""

    def __init__(self, settings: dict[str, Any], adapter: LoraConfig | None, seed: int, device: str):
        sets = {
            name: Dataset.from_dict({"input_ids": rows.tolist()}) for name, rows in step_cost.make_rows(seed).items()
        }
        scope = {} if adapter else {"trainable_layers": "5-7", "trainable_modules": ["mlp.down_proj"]}
        tokenizer = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
        with tempfile.TemporaryDirectory() as folder:
            self.trainer = UnlearnTrainer(
                make_model(seed, device).to("cpu"),
                args=UnlearnConfig(
                    folder,
                    use_cpu=device == "cpu",
                    bf16=True,
                    seed=seed,
                    max_steps=1,
                    save_strategy="no",
                    per_device_train_batch_size=step_cost.ROWS,
                    max_length=step_cost.LENGTH,
                    max_grad_norm=0.0,
                    report_to="none",
                    disable_tqdm=True,
                    **{"hidden_layer": 7, **settings},
                    **scope,
                ),
                train_dataset=sets["forget"],
                retain_dataset=sets["retain"],
                processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>"),
                peft_config=adapter,
            )
            self.trainer.remove_callback(PrinterCallback)
            self.trainer.train()  # prepares the model and the optimizer
        self.model = self.trainer.model_wrapped
        self.batch = next(iter(self.trainer.get_train_dataloader()))

    def backward(self) -> Tensor:
        trainer = self.trainer
        batches, num_items = trainer.get_batch_samples(iter([self.batch]), 1, trainer.args.device)
        return trainer.training_step(self.model, batches[0], num_items)

    def update(self) -> None:
        self.trainer.optimizer.step()
        self.model.zero_grad()


class NaiveStep(step_cost.NaiveStep):
    """The naive step, in bfloat16 throughout."""

    def __init__(self, name: str, seed: int, device: str):
        super().__init__(NAIVE[name], seed, device)
        self.control_vector = self.control_vector.to(torch.bfloat16)


def measure(step: Any, device: str, repeats: int) -> dict[str, float]:
    """Median seconds, FLOPs, and the most bytes allocated on a device (0 on a CPU)."""
    gc.collect()  # the step before
    for _ in range(step_cost.WARMUP_STEPS):
        step_cost.run_step(step)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = time_calls(partial(step_cost.run_step, step), device, repeats)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    flops = sum(count_flops(partial(step_cost.run_step, step)).values())
    return {"seconds": statistics.median(seconds), "flops": flops, "peak_bytes": peak}


def measure_rates(device: str, size: int) -> dict[str, float]:
    """FLOPs per second of a product in bfloat16, and bytes per second that a copy reads: the best of some."""
    source = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copied = min(time_calls(lambda: target.copy_(source), device))
    return {"flops": measure_product_rate(device, size, torch.bfloat16), "bytes": 2 * source.nbytes / copied}


def roofline(result: dict[str, float], rates: dict[str, float], weight_bytes: int, passes: int) -> float:
    """The share of a step's time that its FLOPs, or its weights, have to take."""
    return max(result["flops"] / rates["flops"], passes * weight_bytes / rates["bytes"]) / result["seconds"]


def run(options: argparse.Namespace) -> dict[str, Any]:
    rates = measure_rates(options.device, 8192 if options.shape == "7b" else 512)
    results: dict[str, dict[str, Any]] = {}

    def add(name: str, step: Any, depth: int) -> None:
        result = measure(step, options.device, options.repeats)
        layers = step.model.get_submodule("base_model.model.model" if "lora" in name else "model").layers
        weight_bytes = sum(parameter.nbytes for layer in layers[:depth] for parameter in layer.parameters())
        # Two sets forward and backward at least
        results[name] = {**result, "roofline": roofline(result, rates, weight_bytes, passes=4)}
        print(f"{name}: {result['seconds']:.3f} s", file=sys.stderr, flush=True)

    for naive in NAIVE:
        add(f"naive {naive}", NaiveStep(naive, options.seed, options.device), step_cost.LAYERS)
        for name, (settings, adapter, compared) in CASES.items():
            if compared == naive:
                depth = 8 if naive == "rmu" else step_cost.LAYERS
                add(name, OurStep(settings, adapter, options.seed, options.device), depth)
                for key in ("seconds", "flops", "peak_bytes"):
                    base = results[f"naive {naive}"][key]
                    results[name][f"{key}_ratio"] = results[name][key] / base if base else None
    dual = dual_solver.measure("margin", CONSTRAINTS[options.shape], options.seed, options.device, repeats=1)
    return {"rates": rates, "steps": results, "dual": dual}


def format_table(report: dict[str, Any]) -> str:
    rows = [
        "| step | s | ratio | TFLOP | ratio | peak GiB | ratio | roofline |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in report["steps"].items():

        def ratio(key: str, result: dict[str, Any] = result) -> str:
            value = result.get(f"{key}_ratio")
            return "" if value is None else f"{value:.3f}"

        rows.append(
            f"| {name} | {result['seconds']:.3f} | {ratio('seconds')} | {result['flops'] / 1e12:.2f} | "
            f"{ratio('flops')} | {result['peak_bytes'] / 2**30:.1f} | {ratio('peak_bytes')} | "
            f"{result['roofline']:.2f} |"
        )
    dual = report["dual"]
    return "\n".join([*rows, "", f"Dual of {dual['constraints']} constraints: {dual['seconds']:.2f} s."])


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A step at the size of a 7B model, against the published scripts' way."
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps of each kind (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="PATH", help="write the results here")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    datasets.disable_progress_bars()
    step_cost.make_model = lambda seed: make_model(seed, options.device)  # of the naive step
    vars(step_cost).update(SHAPES[options.shape])
    report = run(options)
    print(format_table(report))
    if options.json:
        report = {
            "command": f"python benchmarks/large_model.py --shape {options.shape} --device {options.device} "
            f"--repeats {options.repeats} --seed {options.seed}",
            "machine": describe_machine(options.device),
            "versions": describe_versions("torch", "transformers", "accelerate", "peft", "hf-unlearn"),
            **report,
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
