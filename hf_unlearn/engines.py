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
Which engine runs a training on several processes, and what works with it.

Everything works with every engine unless [`REFUSALS`] says otherwise: what stands there is refused by name before the
first step, with the reason and what to do instead.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from .reference import inner_model
from .scope import decoder_layers, layers_of


if TYPE_CHECKING:
    from .trainer import UnlearnTrainer


# Name in tables and messages -> what it is
ENGINES = {
    "DDP": "every process holds the whole model; `ddp.yaml`",
    "FSDP2": "sharded by accelerate; `fsdp2.yaml`",
    "FSDP2 at loading": "sharded by transformers when the model is loaded (`DistributedConfig`)",
    "ZeRO-2": "DeepSpeed, gradients and optimizer sharded; `zero2.yaml`. ZeRO-1 is the same to the losses",
    "ZeRO-3": "DeepSpeed, weights sharded too; `zero3.yaml`",
}

SHARDED = ("FSDP2", "FSDP2 at loading", "ZeRO-3")
FSDP2 = ("FSDP2", "FSDP2 at loading")
DEEPSPEED = ("ZeRO-2", "ZeRO-3")


@dataclass(frozen=True)
class Refusal:
    """
    What does not work with some engines.

    Attributes:
        option (`str`): what is refused, as [`options_of`] names it.
        engines (`tuple[str, ...]`): keys of [`ENGINES`].
        reason (`str`): why.
        fix (`str`): what to do instead.
    """

    option: str
    engines: tuple[str, ...]
    reason: str
    fix: str

    def message(self, engine: str) -> str:
        return f"{self.option} is not supported with {engine}: {self.reason}. {self.fix}."


def _needs_gradients(option: str) -> Refusal:
    return Refusal(
        option,
        DEEPSPEED,
        "it needs the gradients before the optimizer does, and DeepSpeed does not give them",
        "Remove it, or use DDP or FSDP2",
    )


REFUSALS = (
    _needs_gradients("sharpness"),
    _needs_gradients("gradient_conflict"),
    _needs_gradients("probe_weight_ratio"),
    Refusal(
        "quantization_margin",
        (*FSDP2, *DEEPSPEED),
        "it rounds whole matrices, between the gradients and the optimizer",
        "Remove it, or use DDP",
    ),
    Refusal(
        "retain_null_space",
        (*FSDP2, *DEEPSPEED),
        "it projects whole matrices and their gradients around the optimizer's step",
        "Remove it, or use DDP",
    ),
    Refusal(
        "weight_averaging_start",
        DEEPSPEED,
        "the optimizer keeps weights of its own, which the mean would not reach",
        "Remove it, or use DDP or FSDP2",
    ),
    Refusal(
        "latent_adversary_layers",
        SHARDED,
        "the head of a sharded model cannot run twice in one forward",
        "Remove it, or use DDP or ZeRO-2",
    ),
    Refusal(
        "A probe that is trained at the start",
        ("FSDP2 at loading", "ZeRO-3"),
        "the layers of a sharded model cannot run outside its forward",
        "Train it before, with `hf-unlearn train-probe`, and give it as probe_path",
    ),
    Refusal(
        "A reference swapped in",
        ("ZeRO-3",),
        "the initial weights of a partitioned model are not at hand",
        "Use a fresh peft_config, pass ref_model, or use ZeRO-2",
    ),
    Refusal(
        "A reference swapped in, with weights outside the decoder layers trained",
        FSDP2,
        "norm, embedding and head are sharded in groups that stay gathered, which a swap would not reach",
        "Train decoder layers only (trainable_layers), use a fresh peft_config, or pass ref_model",
    ),
    Refusal(
        "reference_mode='copy'",
        ("FSDP2 at loading", "ZeRO-3"),
        "a sharded model cannot be copied",
        "Load a second one, sharded in the same way, as ref_model",
    ),
    Refusal(
        "padding_free",
        ("FSDP2 at loading", "ZeRO-3"),
        "whether an architecture keeps packed rows apart is tried before the first step, outside of its forward",
        "Remove it, or use DDP, FSDP2 through accelerate or ZeRO-2",
    ),
    Refusal(
        "A quantized model",
        SHARDED,
        "packed weights cannot be sharded like others",
        "Use DDP, or load the model without quantization_config",
    ),
)


def engine_of(trainer: Trainer) -> str | None:
    """
    The engine that a trainer's accelerator has been set up for.

    Args:
        trainer ([`~transformers.Trainer`]): constructed.

    Returns:
        `str`, *optional*: a key of [`ENGINES`]; `None` for one process.

    Raises:
        `ValueError`: the engine, or how it is set up, is not supported; naming the fix.
    """
    state, args = trainer.accelerator.state, trainer.args
    if trainer.is_deepspeed_enabled:
        stage = state.deepspeed_plugin.zero_stage
        if stage == 0:
            raise ValueError("DeepSpeed without ZeRO is not supported: set zero_stage to 2 or 3, or use DDP.")
        return "ZeRO-3" if stage == 3 else "ZeRO-2"
    if inner_model(trainer.model).is_distributed_loading_by_transformers:
        return "FSDP2 at loading"
    if state.distributed_type is DistributedType.FSDP:
        _check_fsdp(state.fsdp_plugin)
        return "FSDP2"
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        # accelerate says nothing here, and would go on
        raise ValueError(
            "FSDP was asked for, but accelerate would run without it: it needs accelerators and more than one "
            "process. Use ddp.yaml or cpu_2.yaml, or load the model with a DistributedConfig, which shards on CPU too."
        )
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)
    if state.distributed_type not in known:
        raise ValueError(f"{state.distributed_type.value} is not supported: use {', '.join(ENGINES)}.")
    return None if state.num_processes == 1 else "DDP"


def _check_fsdp(plugin: object) -> None:
    """
    Refuses what changes the model before it is sharded.

    Raises:
        `ValueError`: naming the fix.
    """
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP1 flattens the weights, which is not supported: set fsdp_version to 2.")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading leaves all processes but the first without weights, of which the "
            "reference would be made: set it to false."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing puts modules of its own around the decoder layers, whose outputs the "
            "losses read: set it to false and use activation_checkpointing=True of the training arguments."
        )


def options_of(trainer: "UnlearnTrainer", reference: str | None) -> list[str]:
    """
    What a run uses of the options in [`REFUSALS`].

    Args:
        trainer ([`~hf_unlearn.UnlearnTrainer`]): its scope set.
        reference (`str`, *optional*): `"adapter_disabled"`, `"initial_weights"`, `"copy"` or `"separate_model"`;
            `None` where no loss reads one.
    """
    args, model = trainer.args, trainer.model
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    is_outside = None in layers_of(trained, decoder_layers(inner_model(model))[0])
    is_swapped = reference == "initial_weights"
    uses = {
        "sharpness": args.sharpness != "none",
        "gradient_conflict": args.gradient_conflict != "none",
        "probe_weight_ratio": args.probe_weight_ratio is not None,
        "quantization_margin": args.quantization_margin != "none",
        "retain_null_space": args.retain_null_space is not None,
        "weight_averaging_start": args.weight_averaging_start is not None,
        "latent_adversary_layers": args.latent_adversary_layers is not None,
        "A probe that is trained at the start": args.uses_probe and args.probe_path is None,
        "A reference swapped in": is_swapped,
        "A reference swapped in, with weights outside the decoder layers trained": is_swapped and is_outside,
        "reference_mode='copy'": reference == "copy",
        "padding_free": args.padding_free,
        "A quantized model": is_quantized(inner_model(model)),
    }
    return [option for option, is_used in uses.items() if is_used]


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether the model was loaded with a `quantization_config`."""
    return "quantization_config" in model.config.to_dict()


def check_options(engine: str | None, options: list[str]) -> None:
    """
    Refuses what does not work with an engine.

    Args:
        engine (`str`, *optional*): a key of [`ENGINES`]; with one process everything works.
        options (`list[str]`): what is used, see [`options_of`].

    Raises:
        `ValueError`: the reason, and what to do instead.

    Example:

    ```python
    >>> from hf_unlearn.engines import check_options
    >>> check_options("FSDP2", ["sharpness"])
    >>> check_options("ZeRO-2", ["sharpness"])
    Traceback (most recent call last):
    ...
    ValueError: sharpness is not supported with ZeRO-2: it needs the gradients before the optimizer does, and \
DeepSpeed does not give them. Remove it, or use DDP or FSDP2.

    ```
    """
    for refusal in REFUSALS:
        if engine in refusal.engines and refusal.option in options:
            raise ValueError(refusal.message(engine))


def is_partitioned() -> bool:
    """Whether weights are partitioned by DeepSpeed ZeRO-3: outside a forward, their tensors are empty."""
    return is_deepspeed_zero3_enabled()


def count_elements(parameter: nn.Parameter) -> int:
    """Number of elements of a parameter, also where ZeRO-3 left its tensor empty."""
    # DeepSpeed marks what it partitions in no other way
    return parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()


def markdown_table() -> str:
    """The table of `docs/engines.md`: one row per option, one column per engine."""

    def is_refused(option: str, engine: str) -> bool:
        # An option whose name goes on after another's is a case of it
        return any(engine in refusal.engines and option.startswith(refusal.option) for refusal in REFUSALS)

    rows = ["| | " + " | ".join(ENGINES) + " |", "|---|" + "---|" * len(ENGINES)]
    for refusal in REFUSALS:
        cells = ["refused" if is_refused(refusal.option, engine) else "works" for engine in ENGINES]
        option = refusal.option if " " in refusal.option or "=" in refusal.option else f"`{refusal.option}`"
        rows.append(f"| {option} | " + " | ".join(cells) + " |")
    return "\n".join(rows)
