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
Rows without padding: one behind the other in a single sequence, in which none of them sees another.

transformers tells packed rows apart by positions that start anew, and gives FlashAttention their borders; all other
kernels get a mask that shows each row to itself alone. Everything here that reads activations goes on seeing padded
batches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Packing:
    """
    The tokens of padded batches, packed.

    Padding is not run: of the products with weights $\\sum_b T_b / (B \\max_b T_b)$ is left. Attention without a
    FlashAttention kernel computes all pairs of the $N$ packed tokens: $4 N d$ FLOPs per token and layer in the place
    of $4 T d$, which short rows do not feel.

    Args:
        batches (`Sequence[dict[str, torch.Tensor]]`): each with `input_ids` `(B, T)`, and `packed_index` and
            `position_ids` `(N_b,)` from [`~hf_unlearn.pairing.DataCollatorForUnlearning`].

    Example:

    ```python
    >>> import torch
    >>> from hf_unlearn.packing import Packing
    >>> batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]), "packed_index": torch.tensor([0, 1, 2, 3, 4]),
    ...          "position_ids": torch.tensor([0, 1, 2, 0, 1])}
    >>> packing = Packing([batch])
    >>> packing.inputs()["input_ids"].tolist()
    [[5, 6, 7, 8, 9]]
    >>> packing.split(torch.arange(1.0, 6.0).view(1, 5, 1))[0].squeeze(-1).tolist()
    [[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]]

    ```
    """

    def __init__(self, batches: Sequence[dict[str, Tensor]]):
        self.batches = batches

    def inputs(self) -> dict[str, Tensor]:
        """What a decoder takes: `input_ids` and `position_ids`, `(1, N)`."""
        tokens = [batch["input_ids"].flatten()[batch["packed_index"]] for batch in self.batches]
        positions = [batch["position_ids"] for batch in self.batches]
        return {"input_ids": torch.cat(tokens).unsqueeze(0), "position_ids": torch.cat(positions).unsqueeze(0)}

    def split(self, packed: Tensor) -> list[Tensor]:
        """`(1, N, D)` to `(B, T, D)` for each batch, zero where there is padding."""
        parts = packed.squeeze(0).split([batch["packed_index"].numel() for batch in self.batches])
        padded = []
        for part, batch in zip(parts, self.batches, strict=True):
            rows, length = batch["input_ids"].shape
            flat = part.new_zeros(rows * length, part.shape[-1]).index_copy(0, batch["packed_index"], part)
            padded.append(flat.view(rows, length, -1))
        return padded

    def join(self, padded: Sequence[Tensor]) -> Tensor:
        """The way back."""
        parts = [value.flatten(0, 1)[batch["packed_index"]] for value, batch in zip(padded, self.batches, strict=True)]
        return torch.cat(parts).unsqueeze(0)
