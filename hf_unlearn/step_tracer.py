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
A training step without weights: the trainer's own passes on tensors that have shapes, dtypes and no values.

Everything runs under `torch`'s fake tensors, so that a model of any size needs no memory. What the passes multiply and
what they hold at one time is counted as they run; so is whatever a later version of the passes leaves out.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .config import UnlearnConfig
from .losses import REFERENCE_READS
from .objective import Objective
from .prefix import Activations, drop_activations
from .reference import Targets
from .robustness.null_space import RetainNullSpace
from .robustness.quantization import RoundedWeights
from .robustness.trained_matrices import trained_linears
from .split_gradients import SplitGradientTrainer


Batch = dict[str, dict[str, Tensor]]

# The part of a step that happens once, whatever the number of micro-batches
NULL_SPACE = "null space"


def _attention_forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


# torch's own table knows the CUDA kernels only
_ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class StepTracer(TorchDispatchMode):
    """
    Counts the FLOPs of matrix products and the bytes of tensor storages that are alive, by what they belong to.

    Each storage counts once, from the first operation on it until it is freed. What a kernel allocates and frees
    within itself is not seen.

    Args:
        vocabulary (`int`): tensors whose last dimension this is are logits, or as large.

    Attributes:
        flops (`Counter[str]`): FLOPs by part of the step.
        peak (`int`): most bytes alive at one time.
        at_peak (`dict[str, int]`): those bytes by owner.

    Example:

    ```python
    >>> import torch
    >>> from hf_unlearn.step_tracer import StepTracer
    >>> with StepTracer(vocabulary=100) as tracer:
    ...     with tracer.owner("weights"):
    ...         weights = torch.zeros(4, 8)
    ...     with tracer.part("forward"):
    ...         product = torch.zeros(2, 4) @ weights
    >>> tracer.flops["forward"], tracer.at_peak  # 2 * 2 * 4 * 8; 4 bytes for each of 32, and of 8 + 16
    (128, {'weights': 128, 'activations': 96})

    ```
    """

    def __init__(self, vocabulary: int):
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self._vocabulary = vocabulary
        self._part = "forward"
        self._owner = "activations"
        self._alive: Counter[str] = Counter()
        self._total = 0
        self._storages: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.equal.default:
            return True  # there are no values: what the trainer makes sure of before the first step is taken to hold
        output = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in _ATTENTION_ON_CPU:
            self.flops[self._part] += _ATTENTION_ON_CPU[packet](*args, **kwargs)
        elif packet in flop_registry:
            self.flops[self._part] += flop_registry[packet](*args, **kwargs, out_val=output)
        for leaf in tree_leaves((args, kwargs, output)):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return output

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        owner = self._owner
        if owner == "activations" and tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary:
            owner = "logits"
        self._storages[key] = (owner, num_bytes)
        self._alive[owner] += num_bytes
        self._total += num_bytes
        finalize(storage, self._remove, key)
        if self._total > self.peak:
            self.peak, self.at_peak = self._total, {name: count for name, count in self._alive.items() if count}

    def _remove(self, key: int) -> None:
        owner, num_bytes = self._storages.pop(key)
        self._alive[owner] -= num_bytes
        self._total -= num_bytes

    def start(self) -> None:
        """Forgets what was counted so far, but not what is alive."""
        self.flops.clear()
        self.peak = 0

    def assign(self, tensor: Tensor, owner: str) -> None:
        """Says what the storage of a tensor belongs to from here on."""
        key = tensor.untyped_storage()._cdata
        before, num_bytes = self._storages[key]
        self._storages[key] = (owner, num_bytes)
        self._alive[before] -= num_bytes
        self._alive[owner] += num_bytes

    @contextmanager
    def owner(self, name: str) -> Iterator[None]:
        """What is allocated inside belongs to `name`."""
        before, self._owner = self._owner, name
        try:
            yield
        finally:
            self._owner = before

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """FLOPs inside count as those of `name`."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before


class TracedObjective(Objective):
    """The objective, which tells the tracer what it is about to do."""

    tracer: StepTracer

    def read_reference(self, *args: Any, **kwargs: Any) -> Batch:
        with self.tracer.part("reference"):
            return super().read_reference(*args, **kwargs)

    def compute(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with self.tracer.owner("activations"):
            return super().compute(*args, **kwargs)

    def _find_adversary(self, *args: Any, **kwargs: Any) -> Any:
        with self.tracer.part("latent adversary"):
            return super()._find_adversary(*args, **kwargs)


class _Rounded(RoundedWeights):
    """Holds what `RoundedWeights` holds; its checks and its rounding read values."""

    def __init__(self, model: nn.Module, tracer: StepTracer):
        self.linears, _ = trained_linears(model)
        self.tracer = tracer

    @contextmanager
    def active(self) -> Iterator[None]:
        weights = [linear.layer.get_base_layer() if linear.adapters else linear.layer for linear in self.linears]
        with self.tracer.owner("wrappers"):
            copies = [torch.empty_like(layer.weight) for layer in weights]
        yield
        del copies


class _NullSpace(RetainNullSpace):
    """
    Directions of a flat spectrum, the most that an energy can take: `k = ceil(energy * n)`. The constructor of
    [`RetainNullSpace`] reads values.
    """

    def __init__(self, model: nn.Module, energy: float):
        self.linears, _ = trained_linears(model)
        layers = {linear.name: linear.layer for linear in self.linears if not linear.adapters}
        self._starts = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        self._bases = {}
        for linear in self.linears:
            inputs = linear.layer.in_features
            rank = min(inputs, -int(-energy * inputs // 1))
            self._bases[linear.name] = torch.empty(inputs, rank, device=next(linear.layer.parameters()).device)


class _OneProcess:
    """What [`SplitGradientTrainer`] asks of an accelerator, on one process and without values."""

    num_processes = 1

    def __init__(self, tracer: StepTracer, args: UnlearnConfig):
        self._tracer = tracer
        self._device = args.device.type
        self._bf16 = args.bf16

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self._device, torch.bfloat16, enabled=self._bf16)

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model

    def no_sync(self, model: nn.Module) -> AbstractContextManager:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        with self._tracer.part("backward"), self._tracer.owner("activations"):
            loss.backward()


class DryRun(SplitGradientTrainer):
    """
    The passes of one optimizer step, as [`~hf_unlearn.UnlearnTrainer`] runs them, on fake tensors.

    The Trainer's own constructor is not run: it moves models, reads data and asks for values.

    Args:
        model (`nn.Module`): its scope set.
        objective (`TracedObjective`): with its reference.
        args ([`UnlearnConfig`]): settings.
        tracer (`StepTracer`): counts.
    """

    def __init__(self, model: nn.Module, objective: TracedObjective, args: UnlearnConfig, tracer: StepTracer):
        self.objective = objective
        self.args = args
        self.accelerator = _OneProcess(tracer, args)
        self.weight_generator = None  # the default one: nothing is drawn
        self.tracer = tracer
        self.traced_model = model
        self.rounded_weights = None if args.quantization_margin == "none" else _Rounded(model, tracer)
        self.null_space = None
        if args.retain_null_space is not None:
            with tracer.owner("wrappers"):
                self.null_space = _NullSpace(model, args.retain_null_space)

    @torch.no_grad()
    def load_caches(self, batches: list[Batch]) -> None:
        """
        Gives the micro-batches what a step reads from disk, where the run has caches: as from the second epoch on.

        Args:
            batches (`list[dict]`): micro-batches; in place.

        Raises:
            `ValueError`: what is asked for cannot be kept.
        """
        objective, model = self.objective, self.traced_model
        if self.args.precompute_ref_log_probs:
            objective.check_targets(objective.policy(model))
        with self.tracer.owner("caches"):
            for inputs in batches:
                if self.args.precompute_ref_log_probs:
                    self._load_targets(inputs)
                if self.args.prefix_cache is not None:
                    for rows, prefix in objective.prefixes.items():
                        activations = Activations(prefix)
                        with self.accelerator.autocast():
                            objective.policy(model).run(inputs[rows], [], True, activations=activations)
                        inputs[rows]["activations"] = activations

    def _load_targets(self, inputs: Batch) -> None:
        read = [rows for rows, names in self.objective.reads.items() if names & REFERENCE_READS]
        for rows in read:
            inputs[rows]["targets"] = Targets({}, missing=[0])  # computed, and left there
        self._read_reference(self.traced_model, inputs, tuple(self.objective.terms))
        for rows in read:
            inputs[rows]["targets"] = Targets(inputs[rows]["targets"].tensors, missing=[])

    def run_step(self, batches: list[Batch], num_items: Batch, update: Callable[[], None]) -> None:
        """
        Everything from the first forward to the optimizer's update.

        Args:
            batches (`list[dict]`): the micro-batches of the step.
            num_items (`dict`): see [`~hf_unlearn.objective.Objective.compute`].
            update (`Callable`): allocates what the optimizer needs while it updates.
        """
        model = self.traced_model
        model.train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda each: self.tracer.assign(each.grad, "gradients"))
        for inputs in batches:
            if self.args.prefix_cache is None:
                self.objective.share_activations(inputs)
        if self.args.splits_gradients:
            with self.tracer.owner("gradients"):
                self._set_split_gradients(model, batches, num_items)
            for inputs in batches:
                drop_activations(inputs)
        else:
            for inputs in batches:
                loss, _ = self._compute_objective(model, inputs, num_items)
                drop_activations(inputs)
                self.accelerator.backward(loss)
        with self.tracer.part(NULL_SPACE), self.tracer.owner("wrappers"):
            if self.null_space is not None:
                self.null_space.project_gradients()
            update()
            if self.null_space is not None:
                self.null_space.project_weights()
