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
"""The latent adversary against closed forms, and in the trainer; the mistakes of public adversaries by name."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from hf_unlearn import UnlearnConfig, UnlearnTrainer
from hf_unlearn.robustness.latent_adversary import find_perturbations
from hf_unlearn.scope import decoder_layers


def test_linear_loss_is_maximal_on_the_sphere_along_its_gradient():
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(3, 4, 8, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    changes, before = find_perturbations(
        lambda changes: (changes["x"] * slope).sum() + 5.0, {"x": mask}, 8, {"x": torch.tensor(0.3)}, num_steps=5
    )
    expected = 0.3 * slope / slope.norm(dim=-1, keepdim=True) * mask.unsqueeze(-1)
    torch.testing.assert_close(changes["x"], expected, rtol=1e-5, atol=1e-6)
    assert before.item() == 5.0 and not changes["x"].requires_grad


def test_concave_loss_is_maximal_inside_the_ball():
    """The best change is shorter than the radius: ascent finds it, and does not stay on the sphere."""
    target = torch.tensor([[[0.3, 0.4]]])
    changes, _ = find_perturbations(
        lambda changes: -(changes["x"] - target).square().sum(),
        {"x": torch.ones(1, 1)},
        2,
        {"x": torch.tensor(2.0)},
        num_steps=200,
    )
    assert (changes["x"] - target).norm() < 0.05


def test_every_adversary_is_clipped_and_not_the_last_alone():
    slopes = {layer: torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(layer)) for layer in (0, 1, 2)}
    radii = {0: torch.tensor(0.5), 1: torch.tensor(2.0), 2: torch.tensor(0.1)}
    changes, _ = find_perturbations(
        lambda changes: sum((changes[layer] * slopes[layer]).sum() for layer in slopes),
        dict.fromkeys(slopes, torch.ones(2, 3)),
        4,
        radii,
        num_steps=7,
    )
    for layer, radius in radii.items():
        norms = changes[layer].norm(dim=-1)
        torch.testing.assert_close(norms, radius.expand_as(norms), rtol=1e-5, atol=0)


def test_a_saturated_loss_still_has_a_direction():
    """Gradients of 1e-30 underflow when they are squared: the adversary would not move at all."""
    slope = torch.tensor([[[3.0, 4.0]]])
    changes, _ = find_perturbations(
        lambda changes: 1e-30 * (changes["x"] * slope).sum(), {"x": torch.ones(1, 1)}, 2, {"x": torch.tensor(1.0)}, 4
    )
    torch.testing.assert_close(changes["x"], slope / 5, rtol=1e-5, atol=0)


@pytest.fixture
def make(tmp_path, tofu_rows):
    def build(path, **options) -> UnlearnTrainer:
        settings = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "max_steps": 1,
            "per_device_train_batch_size": 3,
            "save_strategy": "no",
            "logging_steps": 1,
            "max_length": 48,
            "disable_tqdm": True,
            "forget_loss": ["npo"],
            "retain_loss": ["kl"],
            "trainable_layers": "0-2",
            "latent_adversary_layers": "1,2",
            "latent_adversary_radius": 0.2,
            "latent_adversary_steps": 4,
            **options,
        }
        return UnlearnTrainer(
            path,
            args=UnlearnConfig(**settings),
            train_dataset=Dataset.from_list(tofu_rows("forget01")[:6]),
            retain_dataset=Dataset.from_list(tofu_rows("retain90")[:6]),
        )

    return build


def watch_outputs(model, layers):
    """What each layer gives to the next, recorded after every other hook."""
    seen = {layer: [] for layer in layers}
    for layer in layers:
        stack = decoder_layers(model)[1]
        stack[layer + 1].register_forward_pre_hook(
            lambda module, args, layer=layer: seen[layer].append(args[0].detach())
        )
    return seen


@pytest.mark.parametrize("name", ["tinystories-260k", "tinystories-1m"])
def test_the_outer_loss_is_taken_at_the_worst_change_within_the_radius(make, data_dir, name):
    """Hidden sizes of 64 and 128 (public code has 4096 built in), and the forget rows, not others, are attacked."""
    path = str(data_dir / name)
    trainer = make(path)
    batches, counts = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    batch = batches[0]
    mask = batch["forget"]["attention_mask"].bool()
    with torch.no_grad():
        inputs = {key: batch["forget"][key] for key in ("input_ids", "attention_mask")}
        hidden = original(**inputs, output_hidden_states=True).hidden_states
    for layer, radius in trainer.objective.adversary_radii.items():
        mean_norm = hidden[layer + 1][mask].norm(dim=-1).mean()
        assert radius.item() == pytest.approx(0.2 * mean_norm.item(), rel=1e-5)

    seen = watch_outputs(trainer.model, (1, 2))
    _, metrics = trainer.objective.compute(trainer.model, batch, counts)
    # The reference twice (forget, retain), four steps of ascent, and the forget and retain rows of the loss
    assert len(seen[1]) == 2 + 4 + 2
    clean, first, worst, retain = seen[1][0], seen[1][2], seen[1][-2], seen[1][-1]
    torch.testing.assert_close(first, clean)  # ascent begins at the rows as they are
    moved = (worst - clean).norm(dim=-1)
    radius = trainer.objective.adversary_radii[1]
    assert (moved <= radius * (1 + 1e-4)).all() and (moved[mask] > 0.5 * radius).float().mean() > 0.9
    assert moved[~mask].max() < 1e-4 if (~mask).any() else True
    torch.testing.assert_close(retain, seen[1][1])  # the retain rows are left alone
    assert metrics["forget/adversary_gain"] > 1.0
    assert all(parameter.grad is None for parameter in trainer.model.parameters())  # ascent leaves none behind


def test_every_step_of_the_adversary_sees_the_forget_rows(make, tiny_model_path):
    """Public loops never pass the forget batch to the adversary: its change is then worth no more than noise."""
    trainer = make(tiny_model_path, latent_adversary_steps=8)
    batches, counts = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    _, attacked = trainer.objective.compute(trainer.model, batches[0], counts)
    radii = trainer.objective.adversary_radii
    generator = torch.Generator().manual_seed(0)

    def random_change(layer):
        def change(hidden):
            noise = torch.randn(hidden.shape, generator=generator)
            return hidden + radii[layer] * noise / noise.norm(dim=-1, keepdim=True)

        return change

    decoder = trainer.objective.policy(trainer.model)
    run = decoder.run
    decoder.run = lambda batch, layers, last_hidden_state, changes=None, activations=None: run(
        batch, layers, last_hidden_state, {layer: random_change(layer) for layer in radii}
    )
    trainer.objective.adversary_radii = {}
    _, noisy = trainer.objective.compute(trainer.model, batches[0], counts)
    plain = 2 / 0.1 * torch.tensor(2.0).log().item()  # NPO at the reference
    assert attacked["forget/npo"] - plain > 5 * abs(noisy["forget/npo"] - plain)
