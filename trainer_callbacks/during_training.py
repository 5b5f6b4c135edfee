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
"""What callbacks that measure during training share: the rows, and where results go."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_unlearn.metrics.rows import EvaluationRow, prepare_rows


@dataclass
class DataSettings:
    """
    How rows become tokens, with the names and defaults of [`~hf_unlearn.UnlearnConfig`], which cannot stand in: making
    one inside a run would set up the devices anew.
    """

    max_length: int | None = None
    dataset_text_field: str = "text"
    split_long_texts: bool = False
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False


def read_rows(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, name: str, max_length: int | None
) -> list[EvaluationRow]:
    """
    The rows with an answer, tokenized.

    Raises:
        `ValueError`: the trainer has no tokenizer, or no row has an answer.
    """
    if tokenizer is None:
        raise ValueError("The callback reads rows with the trainer's tokenizer: give it one as processing_class.")
    rows = prepare_rows(dataset, tokenizer, DataSettings(max_length), name, metrics=("probability",)).rows
    if not any(row.answer for row in rows):
        raise ValueError(f"No row of the {name} data set has an answer: there is nothing to measure.")
    return [row for row in rows if row.answer]


def require_tensors(callback: str) -> None:
    """
    Refuses DeepSpeed ZeRO-3, under which every parameter is an empty tensor outside of a forward: what looks at the
    weights would find nothing, and pass.

    Raises:
        `ValueError`: the run uses ZeRO-3.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"{callback} needs the weights, which DeepSpeed ZeRO-3 partitions away: leave the callback out, or train "
            "with FSDP2, DDP or ZeRO stage 2."
        )


def require_whole_weights(model: nn.Module) -> None:
    """
    Refuses sharded weights.

    Raises:
        `ValueError`: the weights are sharded, by FSDP2 or by DeepSpeed ZeRO-3.
    """
    require_tensors("The callback")
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "The callback runs the model on its own, which sharded weights (FSDP2) do not allow: leave it out, or "
            "train with DDP."
        )


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard under FSDP2, else all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """
    The model's own forward, inside a `with` block: under mixed precision accelerate has put an autocast around it.

    What is measured is then the weights as they are stored, in their own dtype, by every path through the model alike.
    """
    attributes = vars(model)
    if "_original_forward" not in attributes:
        yield
        return
    wrapped = attributes["forward"]
    model.forward = attributes["_original_forward"]
    try:
        yield
    finally:
        model.forward = wrapped


def add_to_history(state: TrainerState, metrics: dict[str, float]) -> None:
    """An entry of `log_history`, as that of an evaluation."""
    state.log_history.append({**metrics, "epoch": state.epoch, "step": state.global_step})
