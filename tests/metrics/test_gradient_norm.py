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
"""The norm of a row's gradient: by hand, against `backward()` row by row, and what is left behind."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn import UnlearnConfig
from hf_unlearn.data import prepare_dataset
from hf_unlearn.forward import evaluation_mode
from hf_unlearn.metrics import membership_scores
from hf_unlearn.metrics.gradient_norm import gradient_norm, gradient_norm_scores
from hf_unlearn.metrics.rows import Tokens


@pytest.fixture
def args(tmp_path) -> UnlearnConfig:
    return UnlearnConfig(str(tmp_path), use_cpu=True, max_length=256)


@pytest.fixture
def model(known_model):
    return AutoModelForCausalLM.from_pretrained(known_model, dtype=torch.float32)


@pytest.fixture
def tokenizer(known_model):
    return AutoTokenizer.from_pretrained(known_model)


@pytest.fixture
def rows(tofu_rows) -> list[dict]:
    return tofu_rows("forget10")[18:22]  # two that the model knows, two that it does not


def scores_of(model, answers, **options) -> list[float | None]:
    with evaluation_mode(model):
        return gradient_norm_scores(model, answers, **options)


def slow_norms(model, tokenizer, rows: list[dict], args, parameters=None) -> list[float]:
    """One row at a time: the model's own loss, `backward()`, and all of `.grad` as one float64 vector."""
    parameters = list(model.parameters()) if parameters is None else parameters
    norms = []
    for example in prepare_dataset(Dataset.from_list(rows), tokenizer, args, "forget"):
        model.zero_grad()
        inputs = {key: torch.tensor([example[key]]) for key in ("input_ids", "labels")}
        model(**inputs).loss.backward()
        norms.append(torch.cat([parameter.grad.flatten().double() for parameter in parameters]).norm().item())
    model.zero_grad()
    return norms


def as_answers(tokenizer, rows: list[dict], args) -> list[list[Tokens]]:
    examples = prepare_dataset(Dataset.from_list(rows), tokenizer, args, "forget")
    return [[Tokens(tuple(example["input_ids"]), tuple(example["labels"]))] for example in examples]


# --- By hand


def test_norm_of_several_tensors_by_hand():
    tensors = [torch.tensor([[1.0, 2.0], [2.0, 0.0]]), torch.tensor(4.0)]
    assert gradient_norm(tensors) == 5.0
    assert gradient_norm(reversed(tensors)) == 5.0
    assert gradient_norm([]) == 0.0


def test_bf16_gradients_are_summed_in_fp32():
    """In bf16 a sum of ones stops at 256, where the next number is 258, and there is no 1001."""
    assert gradient_norm([torch.ones(1001, 1001, dtype=torch.bfloat16)]) == 1001.0
    # and across tensors in float64: fp32 loses each of the small ones
    assert gradient_norm([torch.tensor(2.0**13), *[torch.tensor(1.0)] * 1000]) == math.sqrt(2**26 + 1000)


def uniform_model(random_model, **options):
    """Equally likely tokens: only the head has a gradient, (p - e_y) hᵀ, and |h| is the root of the hidden size."""
    model = random_model("llama", **options)
    nn.init.zeros_(model.lm_head.weight)
    nn.init.ones_(model.model.norm.weight)
    return model


def test_gradient_by_hand(random_model):
    model = uniform_model(random_model)
    [score] = scores_of(model, [[Tokens((1, 5), (-100, 5))]])
    assert score == pytest.approx(-math.sqrt(32 * (1 - 1 / 512)), rel=1e-4)  # |p - e_y|² = 1 - 1/V


def test_windows_of_a_long_text_are_one_answer_by_hand(random_model):
    """
    Two windows with two and one tokens. After the same token the hidden state is the same h, so that the mean gradient
    is (p - (2 e_5 + e_7) / 3) hᵀ, of squared norm |h|² (5/9 - 1/V).
    """
    model = uniform_model(random_model)
    answer = [Tokens((1, 5, 1, 5), (-100, 5, -100, 5)), Tokens((1, 7), (-100, 7))]
    [windows] = scores_of(model, [answer])
    with torch.no_grad():
        h = [model.model(torch.tensor([list(tokens.input_ids)])).last_hidden_state[0] for tokens in answer]
    errors = torch.full((3, 512), 1 / 512)
    errors[[0, 1, 2], [5, 5, 7]] -= 1
    expected = (errors.T @ torch.stack([h[0][0], h[0][2], h[1][0]]) / 3).norm().item()
    assert windows == pytest.approx(-expected, rel=1e-4)
    # Without layers in between, h does not depend on what came before
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    [windows] = scores_of(model, [answer])
    assert windows == pytest.approx(-math.sqrt(32 * (5 / 9 - 1 / 512)), rel=1e-4)


# --- Against an explicit loop


def test_against_backward_row_by_row(model, tokenizer, rows, args):
    expected = slow_norms(model, tokenizer, rows, args)
    assert max(expected[:2]) < 0.5 * min(expected[2:])  # what is known hardly moves the weights
    dataset = Dataset.from_list(rows)
    for batch_size in (1, 3, 16):
        scores = membership_scores(
            model, tokenizer, dataset, args, name="forget", batch_size=batch_size, gradient_norm=True
        )
        assert [-score for score in scores["gradient_norm"]] == pytest.approx(expected, rel=1e-5)


def test_row_order_and_padding_side_do_not_matter(model, tokenizer, rows, args):
    first = membership_scores(model, tokenizer, Dataset.from_list(rows), args, name="forget", gradient_norm=True)
    tokenizer.padding_side = "left"
    backwards = Dataset.from_list(rows[::-1])
    again = membership_scores(model, tokenizer, backwards, args, name="forget", gradient_norm=True)
    assert again["gradient_norm"][::-1] == first["gradient_norm"]


def test_last_layers(model, tokenizer, rows, args):
    answers = as_answers(tokenizer, rows, args)
    below = []
    model.model.layers[2].register_forward_hook(lambda module, inputs, output: below.append(output.requires_grad))
    scores_of(model, answers[:1], last_layers=2)
    assert below == [False]  # whose activations are not kept, although these weights are trained
    expected = slow_norms(model, tokenizer, rows, args, list(model.model.layers[-2:].parameters()))
    assert [-score for score in scores_of(model, answers, last_layers=2)] == pytest.approx(expected, rel=1e-5)
    # Squared norms add up: all weights are the five layers and what is outside of them
    layers = slow_norms(model, tokenizer, rows, args, list(model.model.layers.parameters()))
    assert [-score for score in scores_of(model, answers, last_layers=5)] == pytest.approx(layers, rel=1e-5)
    assert all(few < many < -all_ for few, many, all_ in zip(expected, layers, scores_of(model, answers), strict=True))


@pytest.mark.parametrize("last_layers", [0, 6])
def test_layers_that_are_not_there(model, last_layers):
    with pytest.raises(ValueError, match="the model has 5 decoder layers"):
        scores_of(model, [], last_layers=last_layers)


def test_families(random_model, architecture, tokenizer, rows, args):
    """Tied and untied heads, scaled and capped logits, absolute positions: each against its own loss."""
    model = random_model(architecture)
    args.max_length = 100
    expected = slow_norms(model, tokenizer, rows[:2], args)
    assert [-score for score in scores_of(model, as_answers(tokenizer, rows[:2], args))] == pytest.approx(
        expected, rel=1e-4
    )


def test_bf16_is_close_to_fp32(model, tokenizer, rows, args):
    answers = as_answers(tokenizer, rows[2:], args)
    expected = scores_of(model, answers)
    assert scores_of(model.bfloat16(), answers) == pytest.approx(expected, rel=0.02)


# --- Nothing stays behind


def test_nothing_is_left_behind(model, tokenizer, rows, args):
    """In the middle of training: public code zeroes the gradients that the optimizer waits for."""
    answers = as_answers(tokenizer, rows[:1], args)
    expected = scores_of(model, answers)
    model.train()
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    model.model.layers[1].requires_grad_(False)
    before = [(p, p.grad, None if p.grad is None else p.grad.clone(), p.requires_grad) for p in model.parameters()]
    fired = []
    model.lm_head.weight.register_post_accumulate_grad_hook(fired.append)  # as DDP has them
    for last_layers in (None, 1):
        scores = scores_of(model, answers, last_layers=last_layers)
        for parameter, gradient, value, flag in before:
            assert parameter.grad is gradient and parameter.requires_grad == flag
            assert gradient is None or torch.equal(gradient, value)
        assert scores == expected or last_layers
    assert not fired and torch.is_grad_enabled() and all(module.training for module in model.modules())


def test_flags_are_given_back_after_an_error(model, tokenizer, rows, args):
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(ValueError, match="not finite in float32"):
        scores_of(model, as_answers(tokenizer, rows[:1], args))
    with pytest.raises(IndexError):
        scores_of(model, [[Tokens((1, 5000), (-100, 5000))]])
    # The head is tied to the embedding: one parameter
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.embed_tokens.weight"]


def test_frozen_weights_count(model, tokenizer, rows, args):
    answers = as_answers(tokenizer, rows, args)
    expected = scores_of(model, answers)
    assert scores_of(model.requires_grad_(False), answers) == expected
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_lora_gives_what_the_merged_model_gives(model, tokenizer, rows, args):
    """The adapter's own weights do not count, and the frozen ones under it do."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(model, config)
    flags = [parameter.requires_grad for parameter in adapted.parameters()]
    dataset = Dataset.from_list(rows)
    scores = membership_scores(adapted, tokenizer, dataset, args, name="forget", gradient_norm=True)["gradient_norm"]
    assert [parameter.requires_grad for parameter in adapted.parameters()] == flags
    assert all(parameter.grad is None for parameter in adapted.parameters())
    merged = adapted.merge_and_unload().requires_grad_(True)
    assert [-score for score in scores] == pytest.approx(slow_norms(merged, tokenizer, rows, args), rel=1e-3)


class Int8Linear(nn.Module):
    """A linear layer whose weight is stored as integers with a scale per row."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = nn.Buffer(linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * self.scale).T


def test_quantised_weights_have_no_gradient_and_the_others_do(model, tokenizer, rows, args):
    for layer in model.model.layers:
        layer.mlp.up_proj = Int8Linear(layer.mlp.up_proj)
    floating = [parameter for parameter in model.parameters() if parameter.dtype != torch.int8]
    expected = slow_norms(model, tokenizer, rows, args, floating)
    assert [-score for score in scores_of(model, as_answers(tokenizer, rows, args))] == pytest.approx(
        expected, rel=1e-5
    )


def test_a_model_of_integers_is_refused(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False).data = parameter.data.to(torch.int8)
    with pytest.raises(ValueError, match="all are quantised"):
        gradient_norm_scores(model, [])


def test_rows_with_empty_answers(model, tokenizer, rows, args):
    dataset = Dataset.from_list([{**rows[0], "answer": " "}, rows[0]])
    empty, full = membership_scores(model, tokenizer, dataset, args, name="forget", gradient_norm=True)[
        "gradient_norm"
    ]
    assert empty is None and full < 0
