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
"""Which weights may move: by name, in every family of models."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_unlearn.scope import decoder_layers, freeze_all_but, layers_of, parse_layers, select_parameters


# The stack of layers, the matrix that writes the MLP's output, and the one that writes the attention's
FAMILIES = {
    "llama": ("model.layers", "mlp.down_proj", "self_attn.o_proj"),
    "mistral": ("model.layers", "mlp.down_proj", "self_attn.o_proj"),
    "qwen2": ("model.layers", "mlp.down_proj", "self_attn.o_proj"),
    "qwen3": ("model.layers", "mlp.down_proj", "self_attn.o_proj"),
    "gemma2": ("model.layers", "mlp.down_proj", "self_attn.o_proj"),
    "gemma3": ("model.layers", "mlp.down_proj", "self_attn.o_proj"),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_4h_to_h", "attention.dense"),
    "gpt2": ("transformer.h", "mlp.c_proj", "attn.c_proj"),
    "phi3": ("model.layers", "mlp.gate_up_proj", "self_attn.qkv_proj"),
    "cohere": ("model.layers", "mlp.down_proj", "self_attn.o_proj"),
    "granite": ("model.layers", "mlp.down_proj", "self_attn.o_proj"),
}
WITH_BIAS = ("gpt_neox", "gpt2")


def names_below(model, prefix):
    return [name for name, _ in model.named_parameters() if name.startswith(f"{prefix}.")]


# ---- Layers ----


@pytest.mark.parametrize(
    "text, layers",
    [
        ("0", [0]),
        ("7", [7]),
        ("5-7", [5, 6, 7]),
        ("0,2,5-7", [0, 2, 5, 6, 7]),
        ("6,5-7,0", [0, 5, 6, 7]),
        (" 1 , 3 - 4 ", [1, 3, 4]),
        ("3-3", [3]),
    ],
)
def test_layers_are_indices_and_inclusive_ranges(text, layers):
    assert parse_layers(text, num_layers=8) == layers


@pytest.mark.parametrize("text", ["", " ", "a", "1,,2", "-1", "1-", "1-2-3", "1.0", "5:7", "all", "1 2", "²"])
def test_what_is_no_list_of_layers_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(f"trainable_layers={text!r} is not a list of layers")) as error:
        parse_layers(text, num_layers=8)
    assert '"5-7"' in str(error.value)


def test_range_that_runs_backwards_is_refused():
    with pytest.raises(ValueError, match="the range 7-5 runs backwards"):
        parse_layers("0,7-5", num_layers=8)


@pytest.mark.parametrize("text", ["8", "0,5-8", "99"])
def test_layer_beyond_the_model_is_refused(text):
    with pytest.raises(ValueError, match="the model has 8 layers: 0 to 7"):
        parse_layers(text, num_layers=8)


def test_stack_of_layers_is_found(random_model, architecture):
    model = random_model(architecture)
    name, stack = decoder_layers(model)
    assert name == FAMILIES[architecture][0]
    assert stack is model.get_submodule(name)
    assert len(stack) == 3


def test_model_without_such_a_stack_is_refused(random_model):
    model = random_model()
    model.model.layers = nn.ModuleList(nn.Identity() for _ in range(3))
    with pytest.raises(ValueError, match="expected one stack of 3 decoder layers, found none"):
        decoder_layers(model)


def test_model_with_two_stacks_is_refused(random_model):
    model = random_model()
    model.draft = nn.ModuleList(random_model().model.layers)
    with pytest.raises(ValueError, match="found model.layers, draft"):
        decoder_layers(model)


# ---- Modules ----


@pytest.mark.parametrize("which", [1, 2])
def test_module_of_a_layer_is_selected_in_every_family(random_model, architecture, which):
    """The public defect: an index into the list of a layer's parameters is another matrix in another architecture."""
    stack, pattern = FAMILIES[architecture][0], FAMILIES[architecture][which]
    expected = [f"{stack}.1.{pattern}.weight"]
    if architecture in WITH_BIAS:
        expected.append(f"{stack}.1.{pattern}.bias")
    assert select_parameters(random_model(architecture), "1", [pattern]) == expected


def test_position_six_means_another_matrix_on_qwen2():
    # What the test above guards against, spelled out: published RMU configurations say "parameter 6 of each layer",
    # which is down_proj on Llama and o_proj on Qwen2, whose projections have biases.
    from transformers import Qwen2Config, Qwen2ForCausalLM

    options = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=8, **options))
    qwen2 = Qwen2ForCausalLM(Qwen2Config(vocab_size=8, **options))
    assert [name for name, _ in llama.model.layers[0].named_parameters()][6] == "mlp.down_proj.weight"
    assert [name for name, _ in qwen2.model.layers[0].named_parameters()][6] == "self_attn.o_proj.weight"
    for model in (llama, qwen2):
        assert select_parameters(model, "0", ["mlp.down_proj"]) == ["model.layers.0.mlp.down_proj.weight"]


def test_layers_without_modules_select_everything_in_them(random_model, architecture):
    model = random_model(architecture)
    stack = FAMILIES[architecture][0]
    expected = names_below(model, f"{stack}.0") + names_below(model, f"{stack}.2")
    assert len(expected) >= 10
    assert select_parameters(model, "2,0", None) == expected


def test_modules_without_layers_select_them_in_all_layers(random_model, architecture):
    stack, pattern, _ = FAMILIES[architecture]
    model = random_model(architecture)
    expected = [name for layer in range(3) for name in names_below(model, f"{stack}.{layer}.{pattern}")]
    assert select_parameters(model, None, [pattern]) == expected


def test_patterns_match_a_module_by_the_end_of_its_dotted_name(random_model):
    model = random_model("llama")

    def selected(*patterns):
        return [name.removeprefix("model.layers.1.") for name in select_parameters(model, "1", list(patterns))]

    assert selected("mlp") == ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]
    assert selected("down_proj") == selected("mlp.down_proj") == ["mlp.down_proj.weight"]
    # In the model's order and each once, whatever the order of the patterns and however they overlap
    assert selected("mlp.down_proj", "q_proj", "mlp") == [
        "self_attn.q_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    ]


def test_part_of_a_name_is_no_match(random_model):
    # `proj` or `lp.down_proj` are not names of modules: a loose match would train what was never asked for
    for pattern in ("proj", "lp.down_proj", "mlp.down", "down_proj.weight", "layers.1.mlp"):
        with pytest.raises(ValueError, match="matches no module"):
            select_parameters(random_model(), "1", [pattern])


def test_c_proj_of_gpt2_is_two_matrices_unless_the_pattern_says_which(random_model):
    model = random_model("gpt2")
    assert len(select_parameters(model, "1", ["c_proj"])) == 4
    assert len(select_parameters(model, "1", ["mlp.c_proj"])) == 2


def test_near_matches_are_listed(random_model, architecture):
    stack, pattern, _ = FAMILIES[architecture]
    with pytest.raises(ValueError) as error:
        select_parameters(random_model(architecture), "1", [f"{pattern}s"])
    message = str(error.value)
    assert f"{pattern + 's'!r} matches no module in layers 1" in message
    assert pattern in message.partition("Near matches: ")[2].rstrip(".").split(", ")


def test_every_pattern_must_match(random_model):
    with pytest.raises(ValueError, match="'experts' matches no module"):
        select_parameters(random_model(), "1", ["mlp", "experts"])


@pytest.mark.parametrize("pattern", ["mlp.act_fn", "act_fn"])
def test_module_without_parameters_is_no_match(random_model, pattern):
    with pytest.raises(ValueError, match="matches no module"):
        select_parameters(random_model(), "1", [pattern])


def test_modules_outside_the_layers_need_no_layers(random_model):
    model = random_model("llama")
    assert select_parameters(model, None, ["lm_head"]) == ["lm_head.weight"]
    assert select_parameters(model, None, ["model.norm", "embed_tokens"]) == [
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]
    with pytest.raises(ValueError, match="'lm_head' matches no module in layers 0-2"):
        select_parameters(model, "0-2", ["lm_head"])


@pytest.mark.parametrize(
    "name, embedding",
    [("gemma2", "model.embed_tokens"), ("gpt2", "transformer.wte"), ("cohere", "model.embed_tokens")],
)
def test_tied_head_is_the_embedding(random_model, name, embedding):
    # One tensor with two names, of which `named_parameters` gives the first
    model = random_model(name)
    assert model.config.tie_word_embeddings
    assert select_parameters(model, None, ["lm_head"]) == [f"{embedding}.weight"]
    assert select_parameters(model, None, [embedding]) == [f"{embedding}.weight"]


# ---- Freezing ----


def test_nothing_frozen_gets_a_gradient(random_model, architecture):
    """The public defect: parameters are un-frozen again, and clipping uses the norm of what is not trained."""
    stack, pattern, _ = FAMILIES[architecture]
    model = random_model(architecture)
    selected = select_parameters(model, "0,2", [pattern])
    freeze_all_but(model, selected)
    input_ids = torch.tensor([[1, 5, 9, 7]])
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    with_gradient = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert with_gradient == selected
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in selected)


def test_freezing_also_thaws(random_model):
    model = random_model()
    model.requires_grad_(False)
    freeze_all_but(model, ["lm_head.weight"])
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["lm_head.weight"]


def test_tied_embedding_moves_as_a_whole(random_model):
    model = random_model("gpt2")
    freeze_all_but(model, select_parameters(model, None, ["lm_head"]))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.requires_grad
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 1


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:fan_in_fan_out")
def test_layers_of_names_with_and_without_an_adapter(random_model, architecture):
    stack = FAMILIES[architecture][0]
    model = random_model(architecture)
    names = [name for name, _ in model.named_parameters()]
    assert layers_of(names, stack) == {None, 0, 1, 2}
    assert layers_of(select_parameters(model, "1-2", None), stack) == {1, 2}
    pattern = FAMILIES[architecture][1]
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=[pattern.split(".")[-1]], layers_to_transform=[2]))
    trained = [name for name, parameter in adapter.named_parameters() if parameter.requires_grad]
    assert trained and layers_of(trained, stack) == {2}


def test_layers_of_tells_ten_from_one():
    assert layers_of(["model.layers.10.mlp.weight"], "model.layers") == {10}
    assert layers_of(["vision.model.layers_norm.1.weight", "model.embed_tokens.weight"], "model.layers") == {None}
