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
"""How far a model moved: every tensor before and after, one at a time."""

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_unlearn.cards.report import Footprint, ModuleFootprint

from .engines import count_elements
from .reference import InitialWeights, inner_model, sharded_like


@torch.no_grad()
def footprint_of(
    changes: Iterable[tuple[str, Tensor, Tensor]],
    total_parameters: int,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Footprint:
    """
    What changed, and by how much: `‖Δ‖ / ‖W‖` and `max |Δ|`, of each tensor that moved and of all of them together.

    Args:
        changes (`Iterable` of `tuple[str, torch.Tensor, torch.Tensor]`): name, value before and value after of every
            tensor that may have changed. Two tensors are compared in float64, and only two are held at a time.
        total_parameters (`int`): parameters of the whole model.
        gather (`Callable[[torch.Tensor], torch.Tensor]`, *optional*): puts the rows of all processes under each other,
            as `accelerator.gather` does; for tensors that are sharded over processes.

    Returns:
        [`~hf_unlearn.cards.report.Footprint`]: the tensors that changed, in the order given.

    Example:

    ```python
    >>> import torch
    >>> from hf_unlearn.footprint import footprint_of

    >>> before = torch.tensor([3.0, 4.0])
    >>> footprint = footprint_of([("weight", before, before + torch.tensor([0.0, 0.5]))], total_parameters=8)
    >>> footprint.relative_norm, footprint.max_abs, footprint.changed_parameters
    (0.1, 0.5, 1)

    ```
    """
    modules, squares = [], []
    for name, before, after in changes:
        parts = _compare(before, after).unsqueeze(0)
        if isinstance(after, DTensor):
            parts = gather(parts)
        delta, norm, changed = parts[:, :3].sum(0).tolist()
        if changed:
            modules.append(
                ModuleFootprint(
                    name=name,
                    relative_norm=(delta / norm) ** 0.5 if norm else float(delta > 0),
                    max_abs=parts[:, 3].max().item(),
                    changed_parameters=int(changed),
                    parameters=after.numel(),
                )
            )
            squares.append((delta, norm))
    delta, norm = (sum(column) for column in zip(*squares, strict=True)) if squares else (0.0, 1.0)
    return Footprint(
        changed_parameters=sum(module.changed_parameters for module in modules),
        total_parameters=total_parameters,
        relative_norm=(delta / norm) ** 0.5,
        max_abs=max((module.max_abs for module in modules), default=0.0),
        modules=modules,
    )


@torch.no_grad()
def changes_of(
    model: PreTrainedModel | PeftModel, initial: InitialWeights | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """
    Name, value before and value after of every tensor that may have changed, for [`footprint_of`].

    For an adapter it is the change of the base weights that merging would make.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): the model as it is.
        initial ([`~hf_unlearn.reference.InitialWeights`], *optional*): the tensors that may have changed, as they
            were. `None` for a fresh adapter: the base weights are what was before.
    """
    if not isinstance(model, PeftModel):
        for name, parameter in model.named_parameters():
            if name in initial.values:
                yield name, sharded_like(parameter, initial.values[name]), parameter.detach()
        return
    for name, module in inner_model(model).named_modules():
        if isinstance(module, BaseTunerLayer):
            after = _merged_weight(module)
            if initial is None:
                before = _whole(module.get_base_layer().weight)
            else:
                with initial.active(model):
                    before = _merged_weight(module)
            yield f"{name}.weight", before, after
        elif isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[module.active_adapters[0]]
            for key, parameter in trained.named_parameters():
                yield f"{name}.{key}", module.original_module.get_parameter(key), parameter


def count_base_parameters(model: nn.Module) -> int:
    """Parameters of the model without adapters."""
    adapter = set()
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            names = module.adapter_layer_names
            adapter.update(id(p) for name in names for p in getattr(module, name).parameters())
    return sum(count_elements(p) for p in model.parameters() if id(p) not in adapter)


def _compare(before: Tensor, after: Tensor) -> Tensor:
    """`(4,)` fp64: squared norm of the change, squared norm of the start, changed elements, largest change."""
    if isinstance(after, DTensor):
        after = after.to_local()
    before, after = before.double(), after.double()
    delta = after - before
    return torch.stack([delta.square().sum(), before.square().sum(), (delta != 0).sum().double(), delta.abs().max()])


def _merged_weight(layer: BaseTunerLayer) -> Tensor:
    """The weight that merging the adapter would leave, computed on a copy of this one layer."""
    weight = layer.get_base_layer().weight
    if isinstance(weight, DTensor):  # cannot be copied
        return weight.full_tensor() + _whole(layer.get_delta_weight(layer.active_adapters[0]))
    layer = copy.deepcopy(layer)
    layer.merge()
    return layer.get_base_layer().weight


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
