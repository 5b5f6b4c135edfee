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
"""A model in bfloat16 whose trained weights are float32: small steps add up, and nothing else changes."""

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_unlearn import UnlearnConfig, UnlearnTrainer


SELECTED = {"trainable_layers": "1-2", "trainable_modules": ["mlp.down_proj"]}
RMU = {"forget_loss": ["rmu"], "retain_loss": ["hidden_mse"], "hidden_layer": 2, **SELECTED}
TRAINED = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def make_trainer(tiny_model_path, tokenizer, tofu_rows, tmp_path):
    def make(dtype: torch.dtype = torch.bfloat16, name: str = "out", **settings) -> UnlearnTrainer:
        values = {"bf16": True, "learning_rate": 2e-6, "max_steps": 4, "save_strategy": "no", **RMU, **settings}
        return UnlearnTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=dtype),
            args=UnlearnConfig(
                str(tmp_path / name),
                use_cpu=True,
                per_device_train_batch_size=2,
                max_length=48,
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                lr_scheduler_type="constant",
                **values,
            ),
            train_dataset=Dataset.from_list(tofu_rows("forget10")[:8]),
            retain_dataset=Dataset.from_list(tofu_rows("retain90")[:8]),
            processing_class=tokenizer,
        )

    return make


def dtypes(trainer: UnlearnTrainer) -> dict[bool, set[torch.dtype]]:
    """Of trained and of frozen parameters."""
    found: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for parameter in trainer.model.parameters():
        found[parameter.requires_grad].add(parameter.dtype)
    return found


def moved_entries(trainer: UnlearnTrainer) -> float:
    before = trainer.model.get_parameter(TRAINED).detach().clone()
    trainer.train()
    return (trainer.model.get_parameter(TRAINED) != before).float().mean().item()


def test_small_steps_add_up(make_trainer, caplog):
    """Adam's first steps are about the learning rate: of weights near .02 a bfloat16 holds steps of 6e-5 and more."""
    rounded = make_trainer(fp32_master_weights=False)
    assert "Set bf16=True and fp32_master_weights=True" in caplog.text
    caplog.clear()
    masters = make_trainer()
    assert "fp32_master_weights" not in caplog.text
    assert dtypes(rounded) == {True: {torch.bfloat16}, False: {torch.bfloat16}}
    assert dtypes(masters) == {True: {torch.float32}, False: {torch.bfloat16}}
    assert moved_entries(rounded) < 0.2
    assert moved_entries(masters) > 0.95
    assert dtypes(masters) == {True: {torch.float32}, False: {torch.bfloat16}}


def test_the_first_loss_is_that_of_bfloat16(make_trainer):
    """Autocast rounds the masters to what they were."""
    losses = []
    for fp32_master_weights in (False, True):
        trainer = make_trainer(fp32_master_weights=fp32_master_weights)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1]


def test_it_trains_as_float32_does(make_trainer):
    """Within what bfloat16 products round, as a model whose frozen weights are float32, too."""
    changes = []
    for dtype in (torch.bfloat16, torch.float32):
        trainer = make_trainer(dtype, learning_rate=1e-3)
        before = trainer.model.get_parameter(TRAINED).detach().clone()
        trainer.train()
        changes.append((trainer.model.get_parameter(TRAINED) - before).flatten().double())
    assert torch.cosine_similarity(*changes, dim=0) > 0.98


def test_saved_and_resumed_exactly(make_trainer, tmp_path):
    whole = make_trainer(name="whole", save_strategy="steps", save_steps=2, learning_rate=1e-4)
    whole.train()
    resumed = make_trainer(name="resumed", learning_rate=1e-4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = whole.model.get_parameter(TRAINED)
    assert torch.equal(resumed.model.get_parameter(TRAINED), expected)
    whole.save_model()
    saved = load_file(tmp_path / "whole" / "model.safetensors")
    assert torch.equal(saved[TRAINED], expected)
    frozen = "model.layers.3.mlp.down_proj.weight"
    assert saved[frozen].dtype == torch.bfloat16
    # Loaded in bfloat16, it computes what the trained model computes under autocast
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="auto")
    assert torch.equal(loaded.get_parameter(TRAINED), expected.bfloat16())


def test_sharpness_takes_a_model_in_bfloat16(make_trainer):
    trainer = make_trainer(sharpness="sam", learning_rate=1e-4)
    assert moved_entries(trainer) > 0.95
    with pytest.raises(ValueError, match="Set bf16=True and fp32_master_weights=True"):
        make_trainer(sharpness="sam", fp32_master_weights=False)


def test_without_autocast_nothing_is_cast(make_trainer):
    assert dtypes(make_trainer(bf16=False)) == {True: {torch.bfloat16}, False: {torch.bfloat16}}
