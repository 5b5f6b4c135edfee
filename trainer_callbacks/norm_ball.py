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
"""A bound on how far training moves the weights, kept after every step."""

import hashlib
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_unlearn.trainer_callbacks.during_training import add_to_history, local_part, require_tensors


class NormBallCallback(TrainerCallback):
    r"""
    Keeps the trained tensors within a ball around where they began, for any trainer of transformers or TRL.

    After each optimizer step $W \leftarrow W_0 + \min(1, r / \|W - W_0\|_F) (W - W_0)$, over all trained tensors
    together or for each by itself. A step that stays within changes no bit. Norms are sums of squares in fp32, over
    all shards under FSDP2; nothing waits for the device. A weight in bf16 is rounded after it was projected, so that
    the bound holds up to that rounding. The optimizer's moments are left as they are.

    It keeps one copy of what it watches, taken when the trainer is made, and where that is not the beginning (a
    callback that was added later) when training begins. A run that is resumed needs a trainer that starts from the
    same weights; their hash is compared with that in the state of the checkpoint. DeepSpeed ZeRO-3 is refused: it
    partitions tensors away.

    Args:
        radius (`float`):
            Largest Frobenius norm of the change: of all tensors together, or of each with `per_tensor`.
        relative (`bool`, *optional*, defaults to `False`):
            Whether `radius` is a share of the norm of the initial values instead.
        per_tensor (`bool`, *optional*, defaults to `False`):
            Whether each tensor has a ball of its own.
        tensors (`list[str]`, *optional*):
            Regular expressions; a parameter is watched when one matches its whole name. All that require a gradient
            where unset.

    Attributes:
        distances (`dict[str, float]`): how far the tensors are from where they began, by name, or `"all"`, after the
            last step. Reading it waits for the device.

    Raises:
        `ValueError`: a radius that is not positive, an expression that matches nothing, or a run that began elsewhere.

    Example:

    ```python
    >>> from hf_unlearn.trainer_callbacks import NormBallCallback
    >>> ball = NormBallCallback(radius=0.01, relative=True)
    >>> # SFTTrainer(..., callbacks=[ball])

    ```
    """

    def __init__(
        self, radius: float, *, relative: bool = False, per_tensor: bool = False, tensors: list[str] | None = None
    ):
        if not radius > 0:
            raise ValueError(f"radius={radius} leaves no room: give a positive number.")
        self.radius, self.relative, self.per_tensor, self.tensors = radius, relative, per_tensor, tensors
        self._start: dict[str, Tensor] = {}
        self._watched: dict[str, nn.Parameter] = {}
        self._radii: dict[str, Tensor | float] = {}
        self._distances: dict[str, Tensor] = {}

    @property
    def distances(self) -> dict[str, float]:
        return {name: distance.item() for name, distance in self._distances.items()}

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if model is not None:  # a `model_init` makes it later
            self._start = {name: _copy(parameter) for name, parameter in self._chosen(model).items()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        require_tensors("NormBallCallback")
        self._watched = self._chosen(model)
        if state.global_step == 0:
            # Anew: what was loaded or initialized after the trainer was made is where this run begins
            self._start = {name: _copy(parameter) for name, parameter in self._watched.items()}
        elif self._start.keys() != self._watched.keys():
            raise ValueError(
                "NormBallCallback does not know where the run that is resumed began: give it to the trainer's "
                "constructor, with a model that has its initial weights."
            )
        else:
            self._start = {name: _as(self._start[name], parameter) for name, parameter in self._watched.items()}
        self._compare_start(state)
        norms = self._norms(self._start)
        self._radii = {name: self.radius * norm if self.relative else self.radius for name, norm in norms.items()}
        self._distances = {}

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        changes = {name: parameter.float() - self._start[name].float() for name, parameter in self._watched.items()}
        norms = self._norms(changes)
        scales = {group: self._radii[group] / norm for group, norm in norms.items()}  # infinite where nothing moved
        self._distances = {group: norm * scales[group].clamp(max=1.0) for group, norm in norms.items()}
        for name, parameter in self._watched.items():
            here, change = local_part(parameter), local_part(changes[name])
            scale = scales[name if self.per_tensor else "all"].to(here.device)
            projected = (local_part(self._start[name]).float() + scale * change).to(here.dtype)
            # Chosen and not multiplied by 1: what lies within must not be rounded once more
            here.copy_(torch.where(scale < 1, projected, here))

    def _chosen(self, model: nn.Module) -> dict[str, nn.Parameter]:
        parameters = dict(model.named_parameters())
        if self.tensors is None:
            return {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        chosen = {}
        for pattern in self.tensors:
            matched = {name: parameter for name, parameter in parameters.items() if re.fullmatch(pattern, name)}
            if not matched:
                raise ValueError(f"tensors: {pattern!r} matches no parameter of the model.")
            chosen |= matched
        return chosen

    def _norms(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Frobenius norms, fp32: by name, or of all together."""
        squares = {name: _whole(tensor.float().pow(2).sum()) for name, tensor in tensors.items()}
        if self.per_tensor:
            return {name: square.sqrt() for name, square in squares.items()}
        # Layers may lie on several devices
        device = next(iter(squares.values())).device
        return {"all": torch.stack([square.to(device) for square in squares.values()]).sum().sqrt()}

    def _compare_start(self, state: TrainerState) -> None:
        """Where the run began, in its history, which each checkpoint holds."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._start.items()):
            # Of the whole tensor: a run may be resumed on another number of processes
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(_whole(tensor).float().cpu().numpy().tobytes())
        key = f"norm_ball_start_{'each' if self.per_tensor else 'all'}"
        began = [entry[key] for entry in state.log_history if key in entry]
        if state.global_step > 0 and began and digest.hexdigest() not in began:
            raise ValueError(
                "The run that is resumed began at other weights than this trainer's model has: load the model and the "
                "adapter that it began with."
            )
        if not began:
            add_to_history(state, {key: digest.hexdigest()})


def _copy(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().clone()


def _as(start: Tensor, parameter: nn.Parameter) -> Tensor:
    """The initial values where the parameter is now, sharded as it is."""
    if isinstance(parameter, DTensor) and not isinstance(start, DTensor):
        return distribute_tensor(start.to(parameter.device), parameter.device_mesh, parameter.placements)
    return start.to(parameter.device)


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor, or a sum over all of its shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
