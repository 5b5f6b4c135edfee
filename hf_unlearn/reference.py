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
The frozen model that losses compare with, without a second model in memory.

| kind | what it costs | when |
|---|---|---|
| [`DisabledAdapter`] | nothing | a fresh adapter whose initialisation leaves the base weights alone |
| [`InitialWeights`] | one copy of the *trained* tensors | selected layers, a received `PeftModel`, full fine-tuning |
| [`SeparateModel`] | a second model | on request, or a `ref_model` |

The first two have `active(model)`, a context in which the yielded model computes what the original did; the third has
the `model`. Run the reference before the policy: its swap must not fall between a policy forward and the backward that
needs the same weights.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel


# `init_lora_weights` that leave the base weights as they are. The others (pissa, olora, corda, loftq, lora_ga) move
# part of them into the adapter: without the adapter the model is not the original (4.6e-2 logit error for olora).
_LORA_INITS_WITH_UNCHANGED_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")


def inner_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal language model itself, without PEFT's wrapper (injected adapter layers stay)."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapter_can_be_disabled(config: PeftConfig) -> bool:
    """Whether disabling a *fresh* adapter of this configuration gives back the original model exactly."""
    return (
        isinstance(config, LoraConfig)
        and config.init_lora_weights in _LORA_INITS_WITH_UNCHANGED_BASE
        and config.bias == "none"  # trained biases stay when the adapter is disabled
    )


class DisabledAdapter:
    """
    The base model under a fresh adapter.

    PEFT re-enables `requires_grad` on *every* adapter parameter when it enables the adapter again, hand-frozen ones
    included; the flags are put back as they were.
    """

    kind = "adapter_disabled"

    @contextmanager
    def active(self, model: PeftModel) -> Iterator[PreTrainedModel]:
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        # The tuner's own switch: `model.disable_adapter()` walks over all modules to collect a status first.
        model.base_model.disable_adapter_layers()
        try:
            yield inner_model(model)
        finally:
            model.base_model.enable_adapter_layers()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


class InitialWeights:
    """
    The trained tensors as they were, swapped in for the duration of a reference pass.

    Memory: one copy of the trained tensors. The swap exchanges storage pointers and moves no data, except under FSDP2,
    where pointers must stay and the local shards are copied in and out.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model before training, its scope already set: tensors with `requires_grad` are kept.
        device (`str`, *optional*):
            Where the copy lives. Defaults to the tensors' own device.
    """

    kind = "initial_weights"

    def __init__(self, model: nn.Module, device: str | None = None):
        self.values: dict[str, Tensor] = {
            name: _local(parameter).detach().clone().to(device or parameter.device)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self._parameters: list[nn.Parameter] = []

    def fingerprint(self) -> str:
        """A hash of up to 4096 evenly spaced elements of each tensor: tells another starting model, cheaply."""
        digest = hashlib.sha256()
        for name, value in sorted(self.values.items()):
            flat = value.flatten()
            sample = flat[:: max(1, flat.numel() // 4096)][:4096]
            digest.update(f"{name} {tuple(value.shape)} ".encode())
            digest.update(sample.to("cpu", torch.float64).numpy().tobytes())
        return digest.hexdigest()

    def bind(self, model: nn.Module) -> None:
        """
        Finds the parameters by name, once per set of parameters: accelerate replaces them when it shards for FSDP2.

        Raises:
            `ValueError`: under FSDP2, a tensor is sharded where a swap would not reach the forward.
        """
        first = next(iter(self.values))
        if self._parameters and self._parameters[0] is model.get_parameter(first):
            return
        parameters = dict(model.named_parameters())
        self._parameters = [parameters[name] for name in self.values]
        for (name, value), parameter in zip(self.values.items(), self._parameters, strict=True):
            self.values[name] = sharded_like(parameter, value)
        self._sharded_groups = _fsdp_groups(model, list(self.values))

    @contextmanager
    def active(self, model: PreTrainedModel | PeftModel) -> Iterator[PreTrainedModel]:
        self.bind(model)
        self._exchange()
        try:
            yield inner_model(model)
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Puts `values` into the parameters and what the parameters held into `values`."""
        for (name, value), parameter in zip(self.values.items(), self._parameters, strict=True):
            if isinstance(parameter, DTensor):
                shard = parameter.to_local()
                self.values[name] = shard.clone()
                shard.copy_(value)
            else:
                self.values[name] = parameter.data
                # DeepSpeed moves and casts the parameters when training starts
                parameter.data = value.to(parameter.device, parameter.dtype)
        # FSDP2 gathers a layer from its shards when it is next unsharded: drop what was gathered from the old ones.
        for group in self._sharded_groups:
            group.reshard()
        # Autocast caches the bf16 copy of every trained weight for the length of one autocast context, keyed by the
        # parameter and not by its content: without this the reference silently equals the policy.
        torch.clear_autocast_cache()


class SeparateModel:
    """A second, frozen model: the user's `ref_model`, or a copy of the model before training."""

    kind = "separate_model"

    def __init__(self, model: PreTrainedModel | PeftModel):
        self.model = model.eval().requires_grad_(False)


class Targets:
    """
    What the reference gives for one batch, without noise. Travels with the batch as `batch["targets"]`: an object,
    which DDP hands on as it is, where it copies dicts.

    Attributes:
        tensors (`dict[str, torch.Tensor]`): empty until the reference has run, unless they were read from disk.
        missing (`list[int]`): rows of the batch that are not on disk.
    """

    def __init__(self, tensors: dict[str, Tensor], missing: list[int]):
        self.tensors = tensors
        self.missing = missing

    @property
    def is_loaded(self) -> bool:
        return not self.missing


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(parameter: Tensor, value: Tensor) -> Tensor:
    """This process's shard of a value that was taken before its parameter was sharded; any other as it is."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape != parameter.to_local().shape:
        # Without a source: every process has the value, and one whose shard is all of it does not come here
        value = distribute_tensor(
            value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return _local(value).to(parameter.device)


def _fsdp_groups(model: nn.Module, names: list[str]) -> list[nn.Module]:
    """
    The FSDP2 groups that hold the named parameters.

    Raises:
        `ValueError`: a parameter belongs to the root's group or to one that stays gathered after the forward (the tail
            of norm and head): writing into its shards would not reach the forward.
    """
    from torch.distributed.fsdp import FSDPModule

    groups = {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    if not groups:
        return []
    layers = {name for name in groups if name.rpartition(".")[2].isdigit()}
    owners = {}
    for name in names:
        owner = max((group for group in groups if name.startswith(f"{group}.") or group == ""), key=len)
        if owner not in layers:
            raise ValueError(
                f"The reference of {name!r} cannot be swapped in under FSDP2: it is sharded outside the decoder "
                "layers. Train decoder layers only (trainable_layers), use a fresh peft_config, or pass ref_model."
            )
        owners[owner] = groups[owner]
    return list(owners.values())


Reference = DisabledAdapter | InitialWeights | SeparateModel
