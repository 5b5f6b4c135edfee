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
Predict what a step of `hf-unlearn train` takes, FLOPs and peak memory, from the model's config: no weights, no data.

```bash
hf-unlearn estimate --config rmu_zephyr-7b_wmdp --gpu a100-80gb
hf-unlearn estimate --model_name_or_path meta-llama/Llama-3.1-8B --forget_loss npo --retain_loss kl \
    --use_peft --lora_target_modules all-linear --per_device_train_batch_size 4 --max_length 512 --memory_gb 40 --json
```

Takes all arguments of `hf-unlearn train`. With a device the exit code is 1 where the step does not fit, and what to
change is printed.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from . import UsageError
from .running import RunArguments, set_model_options


if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from trl import ModelConfig

    from hf_unlearn import UnlearnConfig
    from hf_unlearn.estimate import Estimate, ModelOptions

    from .inputs import ArgumentParser


GIB = 2**30

# GiB that torch can use, rounded down
GPUS = {
    "t4": 14,
    "v100-16gb": 15,
    "a10g": 22,
    "l4": 22,
    "rtx3090": 23,
    "rtx4090": 23,
    "v100-32gb": 31,
    "a100-40gb": 39,
    "l40s": 44,
    "a100-80gb": 79,
    "h100": 79,
    "h200": 139,
    "b200": 178,
}
# The CUDA context and the workspaces of its libraries
RESERVED_GIB = 1.0
# Changes that are looked for, as each of them takes a trace or several
_ENOUGH = 2
# What no bfloat16 tensor core computes
_WITHOUT_BF16 = ("t4", "v100-16gb", "v100-32gb")


@dataclass
class EstimateArguments:
    """
    What is estimated.

    Parameters:
        gpu (`str`, *optional*):
            Device that the step has to fit: `h100`, `a100-80gb`, ...
        memory_gb (`float`, *optional*):
            The same as the device's memory in GiB.
        processes (`int`, *optional*, defaults to `1`):
            Data-parallel processes (DDP), each with a device of its own.
    """

    gpu: str | None = field(default=None, metadata={"help": "Device that the step has to fit.", "choices": list(GPUS)})
    memory_gb: float | None = field(default=None, metadata={"help": "The same as the device's memory in GiB."})
    processes: int = field(default=1, metadata={"help": "Data-parallel processes (DDP), each with its own device."})


@dataclass
class Change:
    """Other arguments, and what a step would take with them."""

    flags: list[str]
    values: dict[str, Any]
    options: "ModelOptions"
    estimate: "Estimate | None" = None


def make_parser() -> "ArgumentParser":
    from trl import ModelConfig

    from hf_unlearn import UnlearnConfig

    from .inputs import ArgumentParser, DataArguments

    @dataclass
    class Config(UnlearnConfig):
        # Where `bf16` is unset, the device that is asked about decides, and not this machine
        def __post_init__(self):
            self.leaves_bf16_open = self.bf16 is None and not self.fp16
            super().__post_init__()

    classes = (DataArguments, Config, ModelConfig, RunArguments, EstimateArguments)
    return ArgumentParser(classes, prog="hf-unlearn estimate")


def main(argv: list[str]) -> int:
    # Nothing runs on this machine's devices
    _, args, model_args, run_args, estimate_args = make_parser().parse([*argv, "--use_cpu", "true"])
    budget = _budget(estimate_args)
    if args.leaves_bf16_open:
        args.bf16 = estimate_args.gpu not in _WITHOUT_BF16
    config, options = _read_model(args, model_args, estimate_args)

    from tqdm import tqdm

    from hf_unlearn.estimate import estimate_step

    with tqdm(desc="Tracing", unit=" steps", file=sys.stderr) as progress:

        def trace(args: "UnlearnConfig", options: "ModelOptions") -> "Estimate":
            estimate = estimate_step(config, args, options)
            progress.update()
            return estimate

        try:
            estimate = trace(args, options)
        except ValueError as error:
            raise UsageError(str(error)) from error
        changes = []
        if budget is not None and estimate.peak_bytes > budget:
            changes = _find_changes(trace, config, args, options, budget)

    report = _report(config, args, options, estimate_args, estimate, budget, changes)
    print(json.dumps(report, indent=2) if run_args.json else _as_table(report))
    if budget is None or estimate.peak_bytes <= budget:
        return 0
    print(f"Error: {_refusal(estimate, budget, changes)}", file=sys.stderr)
    return 1


def _budget(estimate_args: EstimateArguments) -> int | None:
    """Bytes that a step may take; `None` where no device is named."""
    if estimate_args.processes < 1:
        raise UsageError(f"--processes {estimate_args.processes}: give at least 1.")
    if estimate_args.gpu is not None and estimate_args.memory_gb is not None:
        raise UsageError("--gpu and --memory_gb are two ways to name the memory: give one of them.")
    memory = estimate_args.memory_gb if estimate_args.gpu is None else GPUS[estimate_args.gpu]
    if memory is None:
        return None
    if not memory > RESERVED_GIB:
        raise UsageError(f"--memory_gb {memory:g}: CUDA itself is taken to need {RESERVED_GIB:g}, so give more.")
    return int((memory - RESERVED_GIB) * GIB)


def _read_model(
    args: "UnlearnConfig", model_args: "ModelConfig", estimate_args: EstimateArguments
) -> tuple["PreTrainedConfig", "ModelOptions"]:
    """The model's config, and how the run would load it."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from hf_unlearn.estimate import ModelOptions

    from .train import _peft_config

    name = model_args.model_name_or_path
    if name is None:
        raise UsageError("--model_name_or_path is required: a Hub id, or a folder with a config.json.")
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise UsageError("Quantized weights are not known to estimate: remove load_in_4bit and load_in_8bit.")
    set_model_options(args, model_args)
    init = args.model_init_kwargs
    try:
        config = AutoConfig.from_pretrained(name, revision=init["revision"])
    except (OSError, ValueError) as error:
        raise UsageError(
            f"The model {name!r} has no config that can be read: it is neither a folder with a config.json that "
            "transformers knows nor a model on the Hub that can be reached. Check the path or id."
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(f"The model is a {config.model_type}, which is no causal language model of transformers.")
    dtype = str(init["dtype"]).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "auto"):
        raise UsageError(f"--dtype {dtype} is not known to estimate: use float32, bfloat16 or auto.")
    attention = "eager" if init["attn_implementation"] == "eager" else "sdpa"
    return config, ModelOptions(dtype, attention, _peft_config(args, model_args), estimate_args.processes)


# ---- What to change ----


def _find_changes(
    trace: Callable[["UnlearnConfig", "ModelOptions"], "Estimate"],
    config: "PreTrainedConfig",
    args: "UnlearnConfig",
    options: "ModelOptions",
    budget: int,
) -> list[Change]:
    """Changes of which each makes the step fit; where none does, as many of them as it takes together."""

    from hf_unlearn.estimate import with_values

    def fits(change: Change) -> bool:
        try:
            change.estimate = trace(with_values(args, **change.values), change.options)
        except ValueError:  # not every run can be changed in every way
            return False
        return change.estimate.peak_bytes <= budget

    alone: list[Change] = []
    for change_of in _CHANGES:
        alone += islice(filter(fits, change_of(config, args, options)), 1)
        if len(alone) == _ENOUGH:
            break
    if alone:
        return alone
    together = Change([], {}, options)
    for change_of in _CHANGES:
        changes = change_of(config, with_values(args, **together.values), together.options)
        if changes:
            largest = changes[-1]
            values = {**together.values, **largest.values}
            together = Change([*together.flags, *largest.flags], values, largest.options)
            if fits(together):
                return [together]
    return []


def _reference(config: "PreTrainedConfig", args: "UnlearnConfig", options: "ModelOptions") -> list[Change]:
    if args.reference_mode != "copy":
        return []
    return [Change(["--reference_mode auto"], {"reference_mode": "auto"}, options)]


def _checkpointing(config: "PreTrainedConfig", args: "UnlearnConfig", options: "ModelOptions") -> list[Change]:
    if args.activation_checkpointing:
        return []
    return [Change(["--activation_checkpointing"], {"activation_checkpointing": True}, options)]


def _smaller_batches(config: "PreTrainedConfig", args: "UnlearnConfig", options: "ModelOptions") -> list[Change]:
    """The same rows in each optimizer step, fewer at a time."""
    changes, rows, steps = [], args.per_device_train_batch_size, args.gradient_accumulation_steps
    while rows % 2 == 0:
        rows, steps = rows // 2, steps * 2
        flags = [f"--per_device_train_batch_size {rows}", f"--gradient_accumulation_steps {steps}"]
        smaller = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        changes.append(Change(flags, smaller, options))
    return changes


def _fewer_layers(config: "PreTrainedConfig", args: "UnlearnConfig", options: "ModelOptions") -> list[Change]:
    """Deeper scopes: the last layers below the losses; fewer gradients, and a shorter way for them."""
    from hf_unlearn.objective import Objective

    if options.peft_config is not None or args.trainable_layers is not None:
        return []
    objective = Objective(args)
    num_layers = config.get_text_config().num_hidden_layers
    objective.bind_layers(num_layers)
    last = num_layers - 1 if objective.last_layer is None else objective.last_layer
    changes = []
    for share in (2, 4, 8):
        first = last + 1 - max(1, num_layers // share)
        if first > 0:
            scope = f"{first}-{last}"
            changes.append(Change([f"--trainable_layers {scope}"], {"trainable_layers": scope}, options))
    return changes


def _adapter(config: "PreTrainedConfig", args: "UnlearnConfig", options: "ModelOptions") -> list[Change]:
    """A LoRA, and then its base in bfloat16, which nothing trains."""
    from peft import LoraConfig

    changes, flags = [], []
    if options.peft_config is None:
        if args.trainable_layers is not None or args.trainable_modules is not None:
            return []
        lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
        options = replace(options, peft_config=lora)
        flags = ["--use_peft", "--lora_target_modules all-linear"]
        changes.append(Change(flags, {}, options))
    if options.dtype == "float32":
        changes.append(Change([*flags, "--dtype bfloat16"], {}, replace(options, dtype="bfloat16")))
    return changes


# In the order in which they are tried: the first ones change nothing of the result
_CHANGES = (_reference, _checkpointing, _smaller_batches, _adapter, _fewer_layers)


# ---- The result ----


def _report(
    config: "PreTrainedConfig",
    args: "UnlearnConfig",
    options: "ModelOptions",
    estimate_args: EstimateArguments,
    estimate: "Estimate",
    budget: int | None,
    changes: list[Change],
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "model_type": config.model_type,
        "parameters": estimate.parameters,
        "trained_parameters": estimate.trained_parameters,
        "dtype": options.dtype,
        "bf16": args.bf16,
        "processes": options.processes,
        "tokens_per_process": estimate.tokens,
        "length": args.max_length,
        "cached_reference": estimate.cached_reference,
        "prefix_shared": estimate.prefix_shared,
        "flops": {**estimate.flops, "total": estimate.total_flops},
        "memory_bytes": {**estimate.memory, "total": estimate.peak_bytes},
        "host_memory_bytes": estimate.host_bytes,
    }
    if budget is None:
        report["fits_on"] = [name for name, size in GPUS.items() if estimate.peak_bytes <= (size - RESERVED_GIB) * GIB]
        return report
    report["device"] = {"name": estimate_args.gpu, "bytes": int(budget + RESERVED_GIB * GIB), "usable_bytes": budget}
    report["fits"] = estimate.peak_bytes <= budget
    report["changes"] = [
        {
            "flags": " ".join(change.flags),
            "flops": change.estimate.total_flops,
            "memory_bytes": change.estimate.peak_bytes,
        }
        for change in changes
    ]
    return report


def _as_table(report: dict[str, Any]) -> str:
    precision = ", bf16 autocast" if report["bf16"] else ""
    lines = [
        f"{report['model_type']}: {report['parameters']:,} parameters in {report['dtype']}{precision}, "
        f"{report['trained_parameters']:,} of them trained",
        f"{report['tokens_per_process']:,} tokens in an optimizer step of each of {report['processes']} process"
        f"{'es' if report['processes'] > 1 else ''}, in rows of {report['length']}",
        "",
        f"{'per step and process':<28}{'TFLOP':>10}",
        *_rows(report["flops"], 1e12),
        "",
        f"{'memory at the peak':<28}{'GiB':>10}",
        *_rows(report["memory_bytes"], GIB),
        "",
    ]
    if shared := {rows: depth for rows, depth in report["prefix_shared"].items() if depth}:
        depths = ", ".join(f"{depth} ({rows} rows)" for rows, depth in shared.items())
        lines += [f"Frozen layers that run once for all passes of a step: {depths}.", ""]
    if waiting := report["host_memory_bytes"]:
        lines += [
            f"{waiting / GIB:.2f} GiB of weights that no step reads stay in host memory; an evaluation brings them to "
            "the device.",
            "",
        ]
    if "device" not in report:
        return "\n".join([*lines, f"Fits on: {', '.join(report['fits_on']) or 'none of the GPUs known here'}."])
    device, total = report["device"], report["memory_bytes"]["total"]
    name = device["name"] or "the device"
    share = total / device["usable_bytes"]
    lines.append(
        f"{'Fits' if report['fits'] else 'Does not fit'} on {name}: {share:.0%} of {device['usable_bytes'] / GIB:.1f} "
        f"GiB ({device['bytes'] / GIB:g} without {RESERVED_GIB:g} for CUDA itself)."
    )
    for change in report["changes"]:
        lines.append(
            f"  {change['flags']}: {change['memory_bytes'] / GIB:.1f} GiB, {change['flops'] / 1e12:.1f} TFLOP"
        )
    return "\n".join(lines)


def _rows(values: dict[str, int], unit: float) -> list[str]:
    return [f"  {name:<26}{value / unit:>10.2f}" for name, value in values.items()]


def _refusal(estimate: "Estimate", budget: int, changes: list[Change]) -> str:
    largest, size = max(estimate.memory.items(), key=lambda item: item[1])
    numbers = (
        f"A step takes {estimate.peak_bytes / GIB:.1f} GiB, of which {size / GIB:.1f} GiB are {largest}, and the "
        f"device has {budget / GIB:.1f} GiB for it."
    )
    if not changes:
        return f"{numbers} Nothing that is known here makes it fit: take a larger device, or a smaller model."
    return f"{numbers} It fits with {', or with '.join(' '.join(change.flags) for change in changes)}."
