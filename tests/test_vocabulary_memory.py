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
"""With a vocabulary of 128k and rows of 2048 tokens, no tensor ever holds the logits of a whole batch."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from hf_unlearn import UnlearnConfig, UnlearnTrainer


VOCABULARY, LENGTH = 131_072, 2048


class LargestTensor(TorchDispatchMode):
    """The most elements of one storage that any operation reads or writes, weights left out."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.largest = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._known:
                self.largest = max(self.largest, leaf.untyped_storage().nbytes() // leaf.element_size())
        return output


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def largest_tensor(model, tokenizer, tmp_path, scope: str, **settings) -> int:
    """Of one training step, forward and backward."""
    rows = Dataset.from_list([{"text": "once upon a time " * LENGTH}])
    options = {"trainable_modules": ["lm_head"]} if scope == "head" else {}
    options |= {"trainable_modules": ["mlp.down_proj"]} if scope == "layers" else {}
    trainer = UnlearnTrainer(
        model,
        args=UnlearnConfig(
            str(tmp_path),
            use_cpu=True,
            max_steps=1,
            per_device_train_batch_size=1,
            max_length=LENGTH,
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            activation_checkpointing=False,
            **options,
            **settings,
        ),
        train_dataset=rows,
        retain_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2) if scope == "lora" else None,
    )
    with LargestTensor(list(trainer.model.parameters())) as seen:
        trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    return seen.largest


@pytest.mark.parametrize(
    "scope, settings",
    [
        pytest.param("layers", {"forget_loss": ["npo"], "retain_loss": ["kl"]}, id="npo"),
        pytest.param(
            "head",
            {"forget_loss": ["npo"], "retain_loss": ["nll"]},
            id="npo of a trained head",
            marks=pytest.mark.slow,
        ),
        pytest.param("lora", {"forget_loss": ["simnpo"], "retain_loss": ["nll"]}, id="simnpo", marks=pytest.mark.slow),
    ],
)
def test_logits_of_a_batch_are_never_held(model, tokenizer, tmp_path, scope, settings):
    largest = largest_tensor(model, tokenizer, tmp_path, scope, **settings)
    # Of the one row an eighth, and not much less, or it did not look
    assert LENGTH * VOCABULARY / 16 < largest <= LENGTH * VOCABULARY / 8, largest / VOCABULARY
