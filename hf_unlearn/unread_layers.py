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
Frozen layers above the last one that a step runs: in host memory while it trains, on the device when something runs
them.

A run that reads the residual stream after layer 7 of 32 never runs 24 layers and the head. They are needed again to
evaluate and to save, not in between.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .engines import is_quantized
from .objective import Objective
from .reference import inner_model
from .scope import decoder_layers


def host_is_elsewhere(device: torch.device) -> bool:
    """Whether what lies in host memory takes nothing of the device's."""
    return device.type != "cpu"


def find_unread_layers(model: nn.Module, objective: Objective, device: torch.device) -> "UnreadLayers | None":
    """
    Finds what a run holds in host memory.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): its scope already set, not quantized.
        objective ([`~hf_unlearn.objective.Objective`]): its layers bound.
        device (`torch.device`): where steps run.

    Returns:
        [`UnreadLayers`], or `None` where a loss reads the last layer, or nothing is gained.
    """
    inner = inner_model(model)
    last_layer = objective.last_layer
    if last_layer is None or last_layer == len(decoder_layers(inner)[1]) - 1 or not host_is_elsewhere(device):
        return None
    return UnreadLayers(inner, last_layer, device)


def unread_parameters(model: PreTrainedModel, last_layer: int) -> list[nn.Parameter]:
    """
    What no step reads that runs up to `last_layer`: frozen weights of the layers above and of the head.

    Args:
        model ([`~transformers.PreTrainedModel`]): causal language model, its scope already set; with PEFT, the model
            inside.
        last_layer (`int`): the last 0-based layer that a step runs.
    """
    unread = [*decoder_layers(model)[1][last_layer + 1 :], model.get_output_embeddings()]
    inside = {id(module) for root in unread for module in root.modules()}
    # A head that is tied to the embedding is read there, and so is any weight that a lower layer shares
    read = {
        id(parameter)
        for module in model.modules()
        if id(module) not in inside
        for parameter in module.parameters(recurse=False)
    }
    parameters = {
        id(parameter): parameter
        for module in unread
        for parameter in module.parameters()
        if not parameter.requires_grad and id(parameter) not in read
    }
    return list(parameters.values())


def place(model: nn.Module, objective: Objective, device: torch.device) -> None:
    """Moves to the device what a run reads of a frozen second model; arguments as in [`find_unread_layers`]."""
    unread_layers = None if is_quantized(inner_model(model)) else find_unread_layers(model, objective, device)
    with nullcontext() if unread_layers is None else unread_layers.hidden():
        model.to(device)


class UnreadLayers:
    r"""
    The weights of the decoder layers above the last one that is read, and of an untied head.

    A forward that goes on to the first of these layers brings all of them to the device, whoever runs it: an
    evaluation, a callback, a generation. They stay until [`leave`] sends them back, which moves nothing: frozen, they
    are still in host memory as they were. Trained parameters and buffers stay on the device all the time. There,
    $P_{\text{unread}} b$ bytes less are held, $b$ the bytes of a number.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, its scope already set; with PEFT, the model inside.
        last_layer (`int`):
            The last 0-based layer that a step runs. One layer above it, or more.
        device (`torch.device`):
            Where steps run. What lies on another accelerator goes back to that.

    Attributes:
        num_bytes (`int`): size of what is not held on the device.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_unlearn.scope import freeze_all_but
    >>> from hf_unlearn.unread_layers import UnreadLayers
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2,
    ...                                      num_hidden_layers=4, vocab_size=16))
    >>> freeze_all_but(model, ["model.layers.1.mlp.down_proj.weight"])
    >>> unread_layers = UnreadLayers(model, last_layer=1, device=torch.device("cpu"))
    >>> unread_layers.num_bytes  # 2 layers of 4 + 3 matrices of 8 x 8 and 2 norms, a head of 16 x 8, 4 bytes each
    4224

    ```
    """

    def __init__(self, model: PreTrainedModel, last_layer: int, device: torch.device):
        # On the meta device is what accelerate keeps in host memory or on disk by itself
        parameters = [each for each in unread_parameters(model, last_layer) if not each.is_meta]
        # A `device_map` may have put layers on several devices
        self._devices = [device if each.device.type == "cpu" else each.device for each in parameters]
        self.on_host: list[tuple[nn.Parameter, Tensor]] = [(each, each.detach().cpu()) for each in parameters]
        self.is_on_device = False
        self._hook = decoder_layers(model)[1][last_layer + 1].register_forward_pre_hook(self._before_forward)
        self.leave()

    @property
    def num_bytes(self) -> int:
        return sum(value.nbytes for _, value in self.on_host)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.fetch()

    def fetch(self) -> None:
        """Brings the weights to the device, unless they are there."""
        if not self.is_on_device:
            for (parameter, value), device in zip(self.on_host, self._devices, strict=True):
                parameter.data = value.to(device, copy=True)
            self.is_on_device = True

    def leave(self) -> None:
        """Frees them on the device."""
        for parameter, value in self.on_host:
            parameter.data = value
        self.is_on_device = False

    def remove(self) -> None:
        """Gives the model back as it was: the weights where they are, and nothing that moves them."""
        self._hook.remove()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """In this context the parameters are empty, so that whoever moves the whole model moves them nowhere."""
        for parameter, value in self.on_host:
            parameter.data = torch.empty(0, dtype=value.dtype, device=value.device)
        try:
            yield
        finally:
            self.leave()
