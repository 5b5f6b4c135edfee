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
"""The reference without a second model equals a real second model that differs from the policy."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_unlearn.reference import DisabledAdapter, InitialWeights, adapter_can_be_disabled, inner_model
from hf_unlearn.scope import freeze_all_but, select_parameters


@pytest.fixture
def original(data_dir):
    """A trained model: on random weights a wrong reference could go unnoticed."""
    return AutoModelForCausalLM.from_pretrained(data_dir / "tinystories-260k", dtype=torch.float32).eval()


@pytest.fixture
def input_ids():
    return torch.randint(3, 500, (2, 16), generator=torch.Generator().manual_seed(0))


def perturb(model: torch.nn.Module, scale: float = 0.05) -> None:
    """Stands for training: moves every trained tensor."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=input_ids, use_cache=False).logits


def lora(model, **options):
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, **options))


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "mica"])
def test_disabled_adapter_is_the_original(original, input_ids, init):
    expected = logits(original, input_ids)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, init_lora_weights=init)
    assert adapter_can_be_disabled(config)
    model = get_peft_model(copy.deepcopy(original), config).eval()
    perturb(model)
    assert not torch.allclose(logits(model, input_ids), expected, atol=1e-2)
    with DisabledAdapter().active(model) as reference, torch.no_grad():
        assert torch.equal(logits(reference, input_ids), expected)
    assert not torch.allclose(logits(model, input_ids), expected, atol=1e-2)


def test_disabled_adapter_keeps_frozen_parameters_frozen(original):
    """PEFT re-enables `requires_grad` on every adapter parameter when it enables the adapter again."""
    model = lora(original)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with DisabledAdapter().active(model):
        pass
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert 0 < sum(before.values()) < len(before)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_that_rewrite_the_base_are_swapped(original, input_ids, init):
    """Without the adapter such a model is not the original: the public mistake is to disable it all the same."""
    expected = logits(original, input_ids)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, init_lora_weights=init)
    assert not adapter_can_be_disabled(config)
    model = get_peft_model(copy.deepcopy(original), config).eval()
    reference = InitialWeights(model)
    perturb(model)
    with torch.no_grad():
        with DisabledAdapter().active(model) as disabled:
            assert not torch.allclose(logits(disabled, input_ids), expected, atol=1e-2)
        with reference.active(model) as swapped:
            assert torch.allclose(logits(swapped, input_ids), expected, atol=1e-4)
        assert not torch.allclose(logits(model, input_ids), expected, atol=1e-2)


def test_biases_and_other_tuners_are_swapped():
    assert not adapter_can_be_disabled(LoraConfig(bias="lora_only"))
    from peft import IA3Config

    assert not adapter_can_be_disabled(IA3Config())


def scope(model, kind: str):
    """A model whose trained tensors are those of `kind`, moved away from their start."""
    if kind == "layers":
        freeze_all_but(model, select_parameters(model, "1-3", ["mlp.down_proj", "self_attn"]))
    elif kind == "received adapter":
        model = lora(model, init_lora_weights=False)  # an adapter that does something
    return model


@pytest.mark.parametrize("kind", ["layers", "full", "received adapter"])
def test_swap_equals_a_second_model(original, input_ids, kind):
    model = scope(original, kind)
    second = copy.deepcopy(model)
    reference = InitialWeights(model)
    perturb(model)
    policy = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        expected, moved = logits(inner_model(second), input_ids), logits(inner_model(model), input_ids)
        assert not torch.allclose(expected, moved, atol=1e-2)
        for _ in range(2):  # twice: what is swapped out must come back as it was
            with reference.active(model) as swapped:
                assert torch.equal(logits(swapped, input_ids), expected)
            assert torch.equal(logits(inner_model(model), input_ids), moved)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, policy[name]), name
        assert parameter.data_ptr() == pointers[name], name  # the optimizer and DDP keep their tensors


def test_swap_is_restored_after_an_error(original, input_ids):
    reference = InitialWeights(original)
    perturb(original)
    before = logits(original, input_ids)
    with pytest.raises(KeyError), reference.active(original):
        raise KeyError
    assert torch.equal(logits(original, input_ids), before)


@pytest.mark.parametrize("kind", ["layers", "full"])
def test_swap_under_autocast(original, input_ids, kind, monkeypatch):
    """
    Autocast caches the bf16 copy of a trained weight for as long as one context lasts, keyed by the parameter.

    Without clearing that cache the reference silently equals the policy; the second half shows that this test sees it.
    """
    model = scope(original, kind)
    second = copy.deepcopy(model).requires_grad_(False)
    reference = InitialWeights(model)
    perturb(model)

    def run() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            policy = logits(model, input_ids)
            with reference.active(model) as swapped, torch.no_grad():
                reference_logits = logits(swapped, input_ids)
            policy_again = logits(model, input_ids)
            with torch.no_grad():
                expected = logits(second, input_ids)
        return policy, reference_logits, policy_again, expected

    policy, reference_logits, policy_again, expected = run()
    assert torch.equal(reference_logits, expected)
    assert torch.equal(policy, policy_again)
    assert not torch.allclose(policy, expected, atol=1e-2)

    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: None)
    policy, reference_logits, _, expected = run()
    if kind == "layers":  # embeddings and norms are not matrix products, and were swapped all the same
        assert torch.equal(reference_logits, policy)
    assert not torch.allclose(reference_logits, expected, atol=1e-2)


def test_disabled_adapter_under_autocast(original, input_ids):
    second = copy.deepcopy(original)
    model = lora(original).eval()
    perturb(model)
    with torch.autocast("cpu", torch.bfloat16):
        policy = logits(model, input_ids)
        with DisabledAdapter().active(model) as reference, torch.no_grad():
            reference_logits = logits(reference, input_ids)
        assert torch.equal(logits(model, input_ids), policy)
        with torch.no_grad():
            assert torch.equal(reference_logits, logits(second, input_ids))
    assert not torch.allclose(policy, reference_logits, atol=1e-2)


def test_gradients_are_those_without_a_swap(original, input_ids):
    """The policy's backward reads its own weights, although others were in their place before its forward."""
    freeze_all_but(original, select_parameters(original, "1-3", ["mlp.down_proj"]))
    reference = InitialWeights(original)
    perturb(original)

    def gradients(swap: bool) -> list[torch.Tensor]:
        original.zero_grad()
        if swap:
            with reference.active(original) as swapped, torch.no_grad():
                logits(swapped, input_ids)
        logits(original, input_ids).square().mean().backward()
        return [p.grad.clone() for p in original.parameters() if p.requires_grad]

    for plain, swapped in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, swapped)


def test_memory_is_one_copy_of_the_trained_tensors():
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=4, vocab_size=64)
    )
    freeze_all_but(model, select_parameters(model, "1", ["mlp.down_proj"]))
    reference = InitialWeights(model)
    assert sum(value.numel() for value in reference.values.values()) == 16 * 32


def test_fingerprint_tells_other_starts(original):
    freeze_all_but(original, select_parameters(original, "1", ["mlp.down_proj"]))
    first = InitialWeights(original).fingerprint()
    assert first == InitialWeights(copy.deepcopy(original)).fingerprint()
    perturb(original, scale=1e-6)
    assert first != InitialWeights(original).fingerprint()
