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
"""What is set up before the first step: a probe has to read what training moves."""

import pytest
import torch
from datasets import Dataset
from distributed.invariance_worker import save_probe
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from hf_unlearn import UnlearnConfig, UnlearnTrainer
from hf_unlearn.hardening import first_trained_layer
from hf_unlearn.scope import freeze_all_but


@pytest.fixture
def make_trainer(tiny_model_path, tokenizer, tofu_rows, tmp_path):
    def make(peft_config=None, **settings) -> UnlearnTrainer:
        return UnlearnTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32),
            args=UnlearnConfig(str(tmp_path / "out"), forget_loss=["ga"], use_cpu=True, bf16=False, **settings),
            train_dataset=Dataset.from_list(tofu_rows("forget10")[:4]),
            retain_dataset=Dataset.from_list(tofu_rows("retain90")[:4]),
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


@pytest.fixture(scope="module")
def probe_path(tiny_model_path, tmp_path_factory) -> str:
    """A probe that reads layer 2."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    return save_probe(model, str(tmp_path_factory.mktemp("probe") / "probe"))


@pytest.mark.parametrize("weight", ["probe_weight", "probe_weight_ratio"])
@pytest.mark.parametrize(
    ("settings", "first"),
    [({"trainable_layers": "3-4"}, 3), ({"trainable_modules": ["model.norm"]}, 5)],
)
def test_a_probe_below_all_that_is_trained_is_refused(make_trainer, probe_path, weight, settings, first):
    with pytest.raises(ValueError, match=f"would read layer 2, and nothing .* before layer {first}: train a layer"):
        make_trainer(probe_path=probe_path, **{weight: 0.5}, **settings)


@pytest.mark.parametrize("layers", ["1", "2-4"])
def test_candidates_below_all_that_is_trained_are_refused(make_trainer, layers):
    first = layers[0]
    with pytest.raises(ValueError, match=f"probe_layers: the probe would read layer {first}, .* before layer 3"):
        make_trainer(probe_weight=0.5, probe_layers=layers, trainable_layers="3")


def test_a_probe_at_or_above_the_first_trained_layer_is_taken(make_trainer, probe_path):
    assert make_trainer(probe_path=probe_path, probe_weight=0.5, trainable_layers="2").objective.probe.layer == 2
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], layers_to_transform=[1, 4])
    trainer = make_trainer(peft_config=adapter, probe_path=probe_path, probe_weight=0.5)
    assert first_trained_layer(trainer.model) == 1


@pytest.mark.parametrize(
    ("trained", "first"),
    [
        (["model.layers.2.mlp.down_proj.weight", "model.norm.weight"], 2),
        (["model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight"], 0),
        (["lm_head.weight"], 4),
    ],
)
def test_first_trained_layer(random_model, trained, first):
    model = random_model(num_hidden_layers=4, tie_word_embeddings=False)
    freeze_all_but(model, trained)
    assert first_trained_layer(model) == first
