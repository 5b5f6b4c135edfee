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
"""What a call costs: FLOPs, memory, time. And the machine that it ran on."""

import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from machine import describe_processor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class _NoModules(nullcontext):
    """
    Stands in for the counter's tracker of modules. Only totals are read, and its hooks refuse modules that are
    differentiated with `torch.autograd.grad` with respect to their input, as the language-model head is in our step.
    """

    parents = ("Global",)


def count_flops(function: Callable[[], Any]) -> dict[str, int]:
    """FLOPs of a call by operation: matrix products, forward and backward; nothing else is counted."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    with counter:
        function()
    return {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}


class PeakMemory(TorchDispatchMode):
    """
    Bytes of all tensor storages that are alive, and their peak.

    Sees every operation, the backward's included, and counts each storage it meets once, from then until it is freed.
    What a kernel allocates and frees within itself is not seen.
    """

    def __init__(self):
        super().__init__()
        self.alive = 0
        self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, output)):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._storages:
            self._storages.add(key)
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, num_bytes: int) -> None:
        if key in self._storages:
            self._storages.discard(key)
            self.alive -= num_bytes

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Counts these no more; nor what comes later to where they lie, so they have to live on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata in self._storages:
                self.alive -= storage.nbytes()
            self._storages.discard(storage._cdata)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_calls(function: Callable[[], Any], device: str, repeats: int = 5) -> list[float]:
    """Seconds of each call."""
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def measure_product_rate(device: str, size: int = 2048, dtype: torch.dtype = torch.float32) -> float:
    """FLOPs per second of one large matrix product, the best of some: the roof under which the steps run."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(time_calls(lambda: left @ right, device))


def describe_machine(device: str) -> dict[str, Any]:
    machine = {**describe_processor(), "torch_threads": torch.get_num_threads()}
    return machine if device == "cpu" else {"gpu": torch.cuda.get_device_name(), **machine}
