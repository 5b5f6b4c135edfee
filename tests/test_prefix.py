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
"""What frozen layers give is computed once for policy, reference and all passes of a step, to the last bit."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from hf_unlearn import UnlearnConfig, UnlearnTrainer
from hf_unlearn.forward import Decoder
from hf_unlearn.prefix import Activations, Prefix, find_prefix, same_prefix
from hf_unlearn.reference import inner_model
from hf_unlearn.robustness.noise import add_noise
from hf_unlearn.scope import decoder_layers, freeze_all_but, select_parameters


DOWN_PROJ = ("mlp", "mlp.down_proj")
WHOLE = Prefix(2, {"self_attn": 2}, DOWN_PROJ)
SELECTED = {"trainable_layers": "2-3", "trainable_modules": ["mlp.down_proj"]}
RMU = {"forget_loss": ["rmu"], "retain_loss": ["hidden_mse"], "hidden_layer": 3}
NPO = {"forget_loss": ["npo"], "retain_loss": ["kl"]}


def lora(**options) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **options)


# Name -> settings, adapter, and the prefix that is found
CASES = {
    "rmu": ({**RMU, **SELECTED}, None, WHOLE),
    "npo": ({**NPO, **SELECTED}, None, WHOLE),
    "npo, copied reference": (
        {**NPO, **SELECTED, "reference_mode": "copy"},
        None,
        WHOLE,
    ),
    "layer 0": ({**RMU, **SELECTED, "trainable_layers": "0-1"}, None, Prefix(0, {"self_attn": 2}, DOWN_PROJ)),
    "whole layers": ({**NPO, "trainable_layers": "2-4"}, None, Prefix(2)),
    "one value matrix": (
        {**NPO, "trainable_layers": "2", "trainable_modules": ["v_proj"]},
        None,
        Prefix(2, {"self_attn.q_proj": 0, "self_attn.k_proj": 0}),
    ),
    "adapter": (
        {**NPO},
        lora(target_modules=["down_proj"], layers_to_transform=[3, 4]),
        Prefix(3, {"self_attn": 2}, DOWN_PROJ),
    ),
    "adapter on all of a layer": (
        {**NPO},
        lora(target_modules=["q_proj", "down_proj"], layers_to_transform=[3]),
        Prefix(3),
    ),
    "adapter, swapped": (
        {**NPO, "reference_mode": "swap"},
        lora(target_modules=["down_proj"], layers_to_transform=[3, 4]),
        Prefix(3, {"self_attn": 2}, DOWN_PROJ),
    ),
    "dpo": (
        {"forget_loss": ["dpo"], "retain_loss": ["logprob_mse"], **SELECTED},
        None,
        WHOLE,
    ),
    "undial": (
        {"forget_loss": ["undial"], "retain_loss": ["nll"], **SELECTED},
        None,
        WHOLE,
    ),
    "circuit breaker reads below": (
        {
            "forget_loss": ["circuit_breaker"],
            "retain_loss": ["circuit_breaker"],
            "circuit_breaker_layers": "0,3",
            **SELECTED,
        },
        None,
        Prefix(1),
    ),
    "noise below": ({**NPO, **SELECTED, "reference_noise_std": 0.1, "reference_noise_layer": 0}, None, Prefix(1)),
    "noise at the border": (
        {**NPO, **SELECTED, "reference_noise_std": 0.1, "reference_noise_layer": 1},
        None,
        Prefix(2),
    ),
    "noise above": (
        {**RMU, **SELECTED, "reference_noise_std": 0.1},
        None,
        WHOLE,
    ),
    "adversary below": (
        {**NPO, **SELECTED, "latent_adversary_layers": "0,3", "latent_adversary_steps": 2},
        None,
        Prefix(1),
    ),
    "adversary above": (
        {**RMU, **SELECTED, "latent_adversary_layers": "2", "latent_adversary_steps": 3},
        None,
        WHOLE,
    ),
    "sam": (
        {**NPO, **SELECTED, "sharpness": "sam", "gradient_conflict": "global"},
        None,
        WHOLE,
    ),
    "rounded": ({**NPO, **SELECTED, "quantization_margin": "int8"}, None, WHOLE),
    "bf16 autocast": ({**NPO, **SELECTED, "bf16": True}, None, WHOLE),
    "checkpointing": (
        {**NPO, **SELECTED, "activation_checkpointing": True},
        None,
        WHOLE,
    ),
    "embeddings": ({**NPO, "trainable_modules": ["embed_tokens"]}, None, None),
    "everything": ({**NPO}, None, None),
    "dropout": ({**NPO, "disable_dropout": False}, lora(target_modules=["v_proj"], lora_dropout=0.1), None),
}


@pytest.fixture(scope="module")
def rows(data_dir):
    def read(name: str, count: int) -> Dataset:
        lines = (data_dir / "tofu" / f"{name}.json").read_text(encoding="utf-8").splitlines()
        return Dataset.from_list([json.loads(line) for line in lines[:count]])

    return {"train_dataset": read("forget10", 6), "retain_dataset": read("retain90", 5)}


@pytest.fixture
def make_trainer(tiny_model_path, tokenizer, rows, tmp_path):
    def make(settings: dict, peft_config: LoraConfig | None = None, model=None, **options) -> UnlearnTrainer:
        model = model or AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
        args = UnlearnConfig(
            str(tmp_path / "out"),
            **{
                "use_cpu": True,
                "bf16": False,
                "seed": 1,
                "max_steps": 3,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-2,
                "adam_epsilon": 1e-4,
                "lr_scheduler_type": "constant",
                "max_length": 32,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                **settings,
            },
        )
        return UnlearnTrainer(
            model, args=args, processing_class=tokenizer, peft_config=peft_config, **{**rows, **options}
        )

    return make


def train(trainer: UnlearnTrainer) -> tuple[dict[str, torch.Tensor], list[dict], int]:
    """Trained tensors, all logs but times, and the FLOPs of it all."""
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    with FlopCounterMode(display=False) as counter:
        trainer.train()
    moved = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if name in start}
    assert any(not torch.equal(moved[name], value) for name, value in start.items())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return moved, logs, counter.get_total_flops()


def expected_prefixes(settings: dict, prefix: Prefix | None) -> dict[str, Prefix]:
    """What is changed on one set of rows takes nothing from the others."""
    prefixes = {"forget": prefix, "retain": prefix}
    if "reference_noise_layer" in settings:
        prefixes["forget"] = WHOLE
    if "latent_adversary_layers" in settings:
        prefixes["retain"] = WHOLE
    if "dpo" in settings["forget_loss"]:
        prefixes["alternative"] = prefix
    return {} if prefix is None else prefixes


@pytest.mark.parametrize("name", CASES)
def test_shared_is_the_same_to_the_last_bit(make_trainer, name):
    settings, peft_config, expected_prefix = CASES[name]
    sharing = make_trainer(settings, peft_config)
    assert sharing.objective.prefixes == expected_prefixes(settings, expected_prefix)
    weights, logs, flops = train(sharing)
    plain = make_trainer(settings, peft_config)
    plain.objective.prefixes = {}
    expected_weights, expected_logs, expected_flops = train(plain)
    assert weights.keys() == expected_weights.keys()
    for key, value in expected_weights.items():
        assert torch.equal(weights[key], value), key
    assert len(logs) == 3
    for mine, theirs in zip(logs, expected_logs, strict=True):
        assert mine == theirs
    assert flops < expected_flops if expected_prefix is not None else flops == expected_flops


@pytest.mark.parametrize("what", ["same", "other frozen weight", "other trained weight", "other config"])
def test_separate_reference_shares_only_equal_weights(make_trainer, tiny_model_path, what):
    """A second model that merely looks like the first must not be run on its activations."""

    def trained(share: bool) -> tuple[dict[str, torch.Tensor], list[dict], int]:
        reference = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
        with torch.no_grad():
            if what == "other frozen weight":
                reference.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
            elif what == "other trained weight":
                reference.model.layers[3].mlp.down_proj.weight[0, 0] += 1e-3
            elif what == "other config":
                reference.config.rms_norm_eps = 1e-4
        trainer = make_trainer({**NPO, **SELECTED}, ref_model=reference)
        assert trainer.objective.is_prefix_of_reference == (what in ("same", "other trained weight"))
        if not share:
            trainer.objective.prefixes = {}
        return train(trainer)

    weights, logs, flops = trained(share=True)
    expected_weights, expected_logs, expected_flops = trained(share=False)
    for key, value in expected_weights.items():
        assert torch.equal(weights[key], value), key
    assert logs == expected_logs
    assert (flops < expected_flops) == (what in ("same", "other trained weight"))


def test_architectures(random_model, architecture):
    """A shared pass equals one of its own in every family, or nothing is shared."""
    model = random_model(architecture)
    stack_name, layers = decoder_layers(model)
    module = {"gpt_neox": "dense_4h_to_h", "gpt2": "mlp.c_proj"}.get(architecture, "down_proj")
    freeze_all_but(model, select_parameters(model, "1-2", [module]))
    prefix = find_prefix(model)
    assert prefix is not None and prefix.depth == 1
    assert "attn" in next(iter(prefix.outputs)) or "attention" in next(iter(prefix.outputs))
    batch = {
        "input_ids": torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(0)),
        "attention_mask": torch.tensor([[1] * 9, [1] * 5 + [0] * 4]),
    }
    activations = Activations(prefix)
    expected = Decoder(model).run(batch, [0, 1, 2], last_hidden_state=True)
    for _ in range(3):
        output = Decoder(model).run(batch, [0, 1, 2], last_hidden_state=True, activations=activations)
        assert activations.is_complete
        assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
        for layer in range(3):
            assert torch.equal(output.hidden_states[layer], expected.hidden_states[layer])
    # Gradients come from the same graph
    gradients = []
    for given in (activations, None):
        model.zero_grad()
        Decoder(model).run(
            batch, [], last_hidden_state=True, activations=given
        ).last_hidden_state.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_what_is_left_behind_is_what_is_read(random_model):
    """Without a change in what was kept, a pass that ignored it would look right too."""
    model = random_model()
    freeze_all_but(model, select_parameters(model, "1-2", ["down_proj"]))
    activations = Activations(find_prefix(model))
    batch = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    decoder = Decoder(model)
    expected = decoder.run(batch, [1], last_hidden_state=False, activations=activations).hidden_states[1]
    assert list(activations.tensors) == ["hidden_states", "self_attn", "mlp.down_proj"]
    for key in activations.tensors:
        changed = {**activations.tensors, key: activations.tensors[key] + 1}
        other = Activations(activations.prefix, changed)
        output = decoder.run(batch, [1], last_hidden_state=False, activations=other).hidden_states[1]
        assert not torch.allclose(output, expected, atol=1e-2), key


def test_change_at_the_border_is_not_kept(random_model):
    """Noise on the reference after the last shared layer must not reach the policy."""
    model = random_model()
    freeze_all_but(model, select_parameters(model, "1-2", ["down_proj"]))
    prefix = find_prefix(model, lowest_changed=0)
    assert prefix == Prefix(1)
    batch = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    generator = torch.Generator().manual_seed(0)
    changes = {0: lambda hidden: add_noise(hidden, 1.0, generator)}
    decoder, activations = Decoder(model), Activations(prefix)
    noisy = decoder.run(batch, [2], last_hidden_state=False, changes=changes, activations=activations)
    clean = decoder.run(batch, [2], last_hidden_state=False, activations=activations)
    assert torch.equal(clean.hidden_states[2], decoder.run(batch, [2], last_hidden_state=False).hidden_states[2])
    generator.manual_seed(0)
    again = decoder.run(batch, [2], last_hidden_state=False, changes=changes, activations=activations)
    assert torch.equal(again.hidden_states[2], noisy.hidden_states[2])
    assert not torch.allclose(again.hidden_states[2], clean.hidden_states[2], atol=1e-2)


def test_layers_that_hand_on_more_than_the_residual_stream_share_nothing(random_model):
    """Keys and values of a skipped layer, say, would be missing above."""
    model = random_model()
    freeze_all_but(model, select_parameters(model, "2", ["down_proj"]))
    assert find_prefix(model).depth == 2
    told = {}
    layers = model.model.layers
    layers[0].self_attn.register_forward_hook(lambda module, args, output: told.update(first=output[0]))
    layers[2].register_forward_hook(lambda module, args, output: output + told.pop("first", 0.0))
    assert find_prefix(model) is None


def test_hand_frozen_adapters_count_as_moving(random_model):
    """They belong to the policy alone where the reference is the disabled adapter."""
    model = get_peft_model(random_model(), lora(target_modules=["down_proj"], init_lora_weights=False)).eval()
    for name, parameter in model.named_parameters():
        if "layers.2." not in name:
            parameter.requires_grad_(False)
    assert find_prefix(inner_model(model)) == Prefix(0, {"self_attn": 2}, DOWN_PROJ)


def test_functional_dropout_shares_nothing(random_model):
    """`disable_dropout` reaches modules only: policy and reference draw apart."""
    model = random_model(attention_dropout=0.1)
    freeze_all_but(model, select_parameters(model, "1-2", ["down_proj"]))
    assert find_prefix(model) is None


def test_untied_head_shares_and_tied_one_does_not(random_model):
    for tied in (False, True):
        model = random_model(tie_word_embeddings=tied)
        freeze_all_but(model, select_parameters(model, None, ["lm_head"]))
        assert find_prefix(model) == (None if tied else Prefix(3))


def test_same_prefix_ignores_what_lies_above(random_model):
    model = random_model()
    freeze_all_but(model, select_parameters(model, "1-2", ["down_proj"]))
    prefix = find_prefix(model)
    for name, _ in model.named_parameters():
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter(name).view(-1)[0] += 1e-4
        is_above = "layers.2." in name or name.endswith("layers.1.mlp.down_proj.weight") or name == "lm_head.weight"
        assert same_prefix(model, other, prefix) == is_above, name
    assert not same_prefix(model, copy.deepcopy(model).double(), prefix)


def test_nothing_stays_after_a_step(make_trainer):
    """The data loader's batch and the one kept for the last check must not hold gigabytes."""
    trainer = make_trainer({**NPO, **SELECTED})
    seen = []
    share = trainer.objective.share_activations

    def record(inputs):
        share(inputs)
        seen.extend(batch["activations"] for batch in inputs.values())

    trainer.objective.share_activations = record
    trainer.train()
    assert len(seen) == 3 * 2
    assert not any(activations.tensors for activations in seen)


def test_two_sets_are_padded_alone(make_trainer):
    """Each set leaves its own behind: forget and retain rows have other lengths."""
    trainer = make_trainer({**NPO, **SELECTED})
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.objective.share_activations(batch)
    trainer.objective.read_reference(trainer.model, batch)
    for rows in ("forget", "retain"):
        kept = batch[rows]["activations"].tensors["hidden_states"]
        assert kept.shape[:2] == batch[rows]["input_ids"].shape
