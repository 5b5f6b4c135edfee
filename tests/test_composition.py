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
Every wrapper around every loss, with LoRA and with selected layers: finite, effective, and touching nothing else.
"""

import itertools
import math

import pytest
import torch
from datasets import Dataset
from distributed.invariance_worker import save_probe
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from hf_unlearn import UnlearnConfig, UnlearnTrainer


LOSSES = {
    "npo": {"forget_loss": ["npo"], "retain_loss": ["kl"]},
    "simnpo": {"forget_loss": ["simnpo"], "retain_loss": ["kl"]},
    "rmu": {"forget_loss": ["rmu"], "retain_loss": ["hidden_mse"], "hidden_layer": 2},
    "ga": {"forget_loss": ["ga"], "retain_loss": ["kl"]},
}
SAM = {"sharpness": "sam", "sharpness_radius": 0.05}
PROBE = {"probe_weight": 1.0}  # of a dozen rows, none can be trained: `save_probe` makes one that reads layer 2
WRAPPERS = {
    "none": {},
    "rna": {"reference_noise_std": 0.1, "reference_noise_layer": 1},
    "sam": SAM,
    "latent": {"latent_adversary_layers": "0,1", "latent_adversary_steps": 2},
    "conflict": {"gradient_conflict": "conflict"},
    "sam + conflict + probe": {**SAM, **PROBE, "gradient_conflict": "conflict"},
    # Beyond the published stacks
    "randomized": {"sharpness": "randomized", "sharpness_radius": 1e-2},
    "gradient penalty": {"sharpness": "gradient_penalty", "sharpness_radius": 0.05, "sharpness_weight": 0.2},
    "curvature": {"sharpness": "curvature", "sharpness_radius": 0.05, "sharpness_weight": 0.5},
    "int4": {"quantization_margin": "int4"},
    "null space": {"retain_null_space": 0.9},
    "averaging": {"weight_averaging_start": 1, "weight_averaging_every": 1},
    "rna + latent + sam + global + probe ratio": {
        **SAM,
        "reference_noise_std": 0.1,
        "reference_noise_layer": 1,
        "latent_adversary_layers": "1",
        "latent_adversary_steps": 2,
        "gradient_conflict": "global",
        "probe_weight_ratio": 0.5,
    },
}
SCOPES = {
    "lora": {
        "peft_config": LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 1, 2], r=4
        )
    },
    "layers": {"trainable_layers": "0-2", "trainable_modules": ["mlp.down_proj"]},
}


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """Trains three steps of two micro-batches once for each combination, and returns the trainer."""
    cache = {}
    folder = tmp_path_factory.mktemp("composition")
    path = str(data_dir / "tinystories-260k")
    probe_path = save_probe(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), str(folder / "probe"))
    rows = {
        name: Dataset.from_json(str(data_dir / "tofu" / f"{file}.json"), cache_dir=str(folder)).select(range(12))
        for name, file in (("forget", "forget01"), ("retain", "retain90"))
    }

    def train(loss: str, wrapper: str, scope: str) -> UnlearnTrainer:
        if (loss, wrapper, scope) not in cache:
            options = {**LOSSES[loss], **WRAPPERS[wrapper], **SCOPES[scope]}
            peft_config = options.pop("peft_config", None)
            if "probe_weight" in options or "probe_weight_ratio" in options:
                options["probe_path"] = probe_path
            args = UnlearnConfig(
                str(folder / "out"),
                use_cpu=True,
                seed=3,
                max_steps=3,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                logging_steps=1,
                save_strategy="no",
                max_length=80,
                disable_tqdm=True,
                **options,
            )
            trainer = UnlearnTrainer(
                path, args=args, train_dataset=rows["forget"], retain_dataset=rows["retain"], peft_config=peft_config
            )
            trainer.start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
            trainer.train()
            cache[loss, wrapper, scope] = trainer
        return cache[loss, wrapper, scope]

    return train


def trained(trainer: UnlearnTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


# These two with every wrapper in each run; all of the table in the slow one
_QUICK_LOSSES = ("npo", "rmu")


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("loss", "wrapper"),
    [
        pytest.param(*pair, marks=[] if pair[0] in _QUICK_LOSSES else [pytest.mark.slow])
        for pair in itertools.product(LOSSES, WRAPPERS)
    ],
)
def test_every_wrapper_composes_with_every_loss(run, loss, wrapper, scope):
    plain, wrapped = run(loss, "none", scope), run(loss, wrapper, scope)
    log = [entry for entry in wrapped.state.log_history if "loss" in entry]
    assert len(log) == 3 and all(math.isfinite(value) for entry in log for value in entry.values())
    # Frozen weights did not move, nor did anything stay behind: hooks, gradients, flags
    moved = {
        name for name, parameter in wrapped.model.named_parameters() if not torch.equal(parameter, wrapped.start[name])
    }
    # Adam moves what a gradient reached, and the null space also changes A at once
    trainable = {name for name, parameter in wrapped.model.named_parameters() if parameter.requires_grad}
    assert moved and moved <= trainable
    assert trainable == {name for name, parameter in plain.model.named_parameters() if parameter.requires_grad}
    layers = wrapped.accelerator.unwrap_model(wrapped.model).get_submodule(
        "base_model.model.model" if scope == "lora" else "model"
    )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layers.layers.modules())
    if wrapper != "none":
        # The wrapper is no decoration: the update is another one, by more than rounding
        update = (trained(plain) - torch.cat([plain.start[name].flatten() for name in sorted_as(plain)])).norm()
        assert (trained(wrapped) - trained(plain)).norm() > 1e-3 * update


def sorted_as(trainer: UnlearnTrainer) -> list[str]:
    return [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("loss", _QUICK_LOSSES)
def test_wrappers_of_the_gradient_do_not_change_the_first_loss(run, loss, scope):
    """Sharpness, conflict and averaging read the weights as they are; noise reaches only the retain term."""
    first = next(entry for entry in run(loss, "none", scope).state.log_history if "loss" in entry)
    for wrapper in ("sam", "gradient penalty", "curvature", "conflict", "averaging"):
        entry = next(entry for entry in run(loss, wrapper, scope).state.log_history if "loss" in entry)
        for name in first:
            if name.startswith(("loss", "forget/", "retain/")):
                assert entry[name] == pytest.approx(first[name], rel=1e-5, abs=1e-6), (wrapper, name)
    noisy = next(entry for entry in run(loss, "rna", scope).state.log_history if "loss" in entry)
    for name in first:
        if name.startswith("forget/"):
            assert noisy[name] == first[name], name
    retain = LOSSES[loss]["retain_loss"][0]
    assert noisy[f"retain/{retain}"] > first[f"retain/{retain}"] + 1e-4


@pytest.mark.parametrize("scope", SCOPES)
def test_the_adversary_raises_the_forget_loss_and_leaves_the_retain_loss(run, scope):
    for loss in _QUICK_LOSSES:
        plain, attacked = (
            next(entry for entry in run(loss, wrapper, scope).state.log_history if "loss" in entry)
            for wrapper in ("none", "latent")
        )
        assert attacked["forget/adversary_gain"] > 0.01 * abs(plain[f"forget/{loss}"])
        name = f"retain/{LOSSES[loss]['retain_loss'][0]}"
        assert attacked[name] == pytest.approx(plain[name], abs=1e-7)


def test_settings_of_what_holds_reach_the_report(run):
    trainer = run("npo", "rna + latent + sam + global + probe ratio", "layers")
    settings = trainer.record.report(trainer).method.settings
    assert settings["sharpness"] == "sam" and settings["sharpness_radius"] == 0.05
    assert settings["reference_noise_std"] == 0.1 and settings["reference_noise_layer"] == 1
    assert settings["gradient_conflict"] == "global" and settings["probe_weight_ratio"] == 0.5
    assert settings["probe_layer"] == 2 and settings["latent_adversary_layers"] == "1"
    plain = run("npo", "none", "layers")
    assert "sharpness" not in plain.record.report(plain).method.settings
