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
"""What only a GPU can show: no waiting for the device in a step, QLoRA, and activations kept in main memory."""

import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig

from hf_unlearn import UnlearnConfig, UnlearnTrainer


pytestmark = pytest.mark.gpu

SELECTED = {"trainable_layers": "1-2", "trainable_modules": ["mlp.down_proj"]}
OBJECTIVES = {
    "npo": {**SELECTED, "forget_loss": ["npo"], "retain_loss": ["kl"]},
    "simnpo": {**SELECTED, "forget_loss": ["simnpo"], "retain_loss": ["nll"]},
    "undial": {**SELECTED, "forget_loss": ["undial"], "retain_loss": ["logprob_mse"]},
    "rmu": {**SELECTED, "forget_loss": ["rmu"], "retain_loss": ["hidden_mse"], "hidden_layer": 2},
    "noise": {
        **SELECTED,
        "forget_loss": ["npo"],
        "retain_loss": ["kl"],
        "reference_noise_std": 0.1,
        "hidden_layer": 2,
    },
}


@pytest.fixture
def make(data_dir, tiny_model_path, tmp_path):
    def build(peft_config=None, quantization_config=None, **settings) -> UnlearnTrainer:
        def rows(path, count):
            return load_dataset("json", data_files=str(data_dir / path), split="train").select(range(count))

        settings = {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "max_length": 64,
            "save_strategy": "no",
            **settings,
        }
        return UnlearnTrainer(
            str(tiny_model_path),
            args=UnlearnConfig(str(tmp_path / "out"), logging_steps=1, disable_tqdm=True, **settings),
            train_dataset=rows("tofu/forget10.json", 8),
            retain_dataset=rows("tofu/retain90.json", 8),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
            peft_config=peft_config,
            quantization_config=quantization_config,
        )

    return build


def losses_of(trainer: UnlearnTrainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_does_not_wait_for_the_device(make, name):
    trainer = make(**OBJECTIVES[name])
    waits = []
    compute, backward = trainer.compute_loss, trainer.accelerator.backward

    def watched(function, *args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            waits.append(str(error))
            raise
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer.compute_loss = lambda *args, **kwargs: watched(compute, *args, **kwargs)
    trainer.accelerator.backward = lambda *args, **kwargs: watched(backward, *args, **kwargs)
    trainer.train()
    assert not waits
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
@pytest.mark.parametrize("name", ["npo", "rmu"])
def test_adapters_on_a_quantized_model(make, name, options):
    pytest.importorskip("bitsandbytes")
    settings = {key: value for key, value in OBJECTIVES[name].items() if key not in SELECTED}
    trainer = make(
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
        quantization_config=BitsAndBytesConfig(**options),
        learning_rate=1e-2,
        **settings,
    )
    start = {key: p.detach().clone() for key, p in trainer.model.named_parameters() if p.requires_grad}
    first, second = losses_of(trainer)
    assert second < first
    assert any(not torch.equal(trainer.model.get_parameter(key), value) for key, value in start.items())


def test_activations_in_main_memory_change_no_number(make):
    settings = {**OBJECTIVES["npo"], "activation_checkpointing": True, "learning_rate": 1e-2}
    expected = losses_of(make(**settings))
    assert losses_of(make(**settings, activation_checkpointing_kwargs={"offload": True})) == expected


def test_what_no_loss_reads_is_not_on_the_device(make):
    trainer = make(**{**OBJECTIVES["rmu"], "eval_strategy": "no"})
    places = {name: parameter.device.type for name, parameter in trainer.model.named_parameters()}
    assert places["model.layers.2.mlp.down_proj.weight"] == "cuda"
    assert places["model.layers.3.mlp.down_proj.weight"] == "cpu"
    first, second = losses_of(trainer)
    assert trainer.model.get_parameter("model.layers.3.mlp.down_proj.weight").device.type == "cpu"
    rows = trainer.train_dataset.retain
    assert trainer.evaluate(rows)["eval_rows"] == 8
    assert trainer.model.get_parameter("model.layers.3.mlp.down_proj.weight").device.type == "cuda"
    trainer.unread_layers.leave()
    before = torch.cuda.memory_allocated()
    trainer.unread_layers.fetch()
    assert torch.cuda.memory_allocated() - before >= trainer.unread_layers.num_bytes
