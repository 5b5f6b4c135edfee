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
"""Proof that a run changed nothing but what it was allowed to change."""

import difflib
import hashlib
import re
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_unlearn.trainer_callbacks.during_training import local_part, require_tensors


class ScopeViolationError(RuntimeError):
    """A tensor outside the allowed ones changed during training."""


class ScopeGuardCallback(TrainerCallback):
    """
    Proves at the end of training that every tensor outside the allowed ones is bit-identical to its start.

    It hashes them (SHA-256, parameters and persistent buffers) when training begins and when it ends: two passes over
    the frozen weights and no copy of them. Under FSDP2 each process proves its own shards, and a change in one ends
    the run in all. DeepSpeed ZeRO-3 is refused: it partitions tensors away.

    Args:
        allowed (`list[str]`, *optional*):
            Regular expressions; a tensor may change when one matches its whole name. Defaults to the parameters that
            require a gradient when training begins.

    Raises:
        `ScopeViolationError`: at the end of training, naming the tensors that changed.
        `ValueError`: at the beginning, when an expression matches no tensor, or under ZeRO-3.

    Example:

    ```python
    >>> from hf_unlearn.trainer_callbacks import ScopeGuardCallback
    >>> guard = ScopeGuardCallback(allowed=[r"model\\.layers\\.[5-7]\\.mlp\\.down_proj\\.weight"])
    >>> # SFTTrainer(..., callbacks=[guard])

    ```
    """

    def __init__(self, allowed: list[str] | None = None):
        self.allowed = allowed
        self._digests: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        require_tensors("ScopeGuardCallback")
        tensors = model.state_dict(keep_vars=True)
        # By storage and not by name: a tied weight has two names, and one tensor
        storages = {name: local_part(tensor).data_ptr() for name, tensor in tensors.items()}
        free = {storages[name] for name in self._names_of_free(tensors)}
        self._digests = {name: _digest(tensor) for name, tensor in tensors.items() if storages[name] not in free}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        tensors = model.state_dict(keep_vars=True)
        changed_here = [name for name, digest in self._digests.items() if _digest(tensors[name]) != digest]
        # Of all processes, so that none goes on to save and waits for one that has stopped
        changed_anywhere = set(gather_object(changed_here))
        changed = [name for name in tensors if name in changed_anywhere]
        if changed:
            shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
            raise ScopeViolationError(
                f"{len(changed)} of {len(self._digests)} tensors that had to stay changed during training: {shown}."
            )

    def _names_of_free(self, tensors: dict[str, Tensor]) -> list[str]:
        if self.allowed is None:
            return [name for name, tensor in tensors.items() if tensor.requires_grad]
        names = []
        for pattern in self.allowed:
            matched = [name for name in tensors if re.fullmatch(pattern, name)]
            if not matched:
                near = ", ".join(difflib.get_close_matches(pattern, tensors, n=3, cutoff=0.3))
                raise ValueError(f"allowed: {pattern!r} matches no tensor of the model. Near matches: {near}.")
            names += matched
        return names


@torch.no_grad()
def _digest(tensor: Tensor) -> str:
    """SHA-256 of the bytes; of the local shard, where the tensor is sharded."""
    flat = local_part(tensor).detach().contiguous().flatten().view(torch.uint8)
    digest = hashlib.sha256()
    for piece in flat.split(2**26):  # 64 MiB at a time leave the device
        digest.update(piece.cpu().numpy())
    return digest.hexdigest()
