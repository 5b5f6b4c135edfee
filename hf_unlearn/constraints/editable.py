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
"""Which layers an edit may change: plain linear ones, and an LM head that is untied from the input embeddings."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


# Not accelerate's logger, which raises where there is no Accelerator
logger = logging.getLogger(__name__)


def has_tied_head(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


@torch.no_grad()
def untie_head(model: PreTrainedModel) -> Callable[[], None]:
    """
    Gives the LM head a matrix of its own, with the same values, and says so in the configuration, and in a warning.

    `save_pretrained` then writes both matrices and `from_pretrained` reads both. Everything that
    `config.tie_word_embeddings` ties is untied, since the configuration speaks of all at once.

    Args:
        model ([`~transformers.PreTrainedModel`]): ties its LM head to its input embeddings.

    Returns:
        `Callable[[], None]`: ties the model as before; what the head's own matrix held is lost.

    Raises:
        `ValueError`: the head is not tied.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_unlearn.constraints.editable import untie_head
    >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True, **sizes))
    >>> tie_again = untie_head(model)
    >>> model.lm_head.weight is model.model.embed_tokens.weight, model.config.tie_word_embeddings
    (False, False)
    >>> tie_again()
    >>> model.lm_head.weight is model.model.embed_tokens.weight, model.config.tie_word_embeddings
    (True, True)

    ```
    """
    all_keys = model.all_tied_weights_keys
    tied = {key: source for key, source in all_keys.items() if model.get_parameter(key) is model.get_parameter(source)}
    if not has_tied_head(model) or not tied:
        raise ValueError("The LM head of this model is not tied to its input embeddings: there is nothing to untie.")
    # One and the same for a text model; a model of text and images has one inside the other
    flags = [(config, config.tie_word_embeddings) for config in (model.config, model.config.get_text_config())]

    def set_parameter(key: str, parameter: nn.Parameter) -> None:
        module, _, leaf = key.rpartition(".")
        setattr(model.get_submodule(module), leaf, parameter)

    def tie_again() -> None:
        for key, source in tied.items():
            set_parameter(key, model.get_parameter(source))
        model.all_tied_weights_keys = all_keys
        for config, flag in flags:
            config.tie_word_embeddings = flag

    for key in tied:
        parameter = model.get_parameter(key)
        set_parameter(key, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
    model.all_tied_weights_keys = {key: source for key, source in all_keys.items() if key not in tied}
    for config, _ in flags:
        config.tie_word_embeddings = False
    logger.warning(
        "The LM head is untied from the input embeddings, so that an edit of the one leaves the other alone: the "
        "model grows by one matrix, and its configuration says tie_word_embeddings=False."
    )
    return tie_again


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """
    The model in float32, inside a `with` block; then every tensor in its own dtype again. Nothing is lost on the way,
    and not all of them have the model's: rotary frequencies stay in float32.
    """
    tensors = [*model.parameters(), *model.buffers()]
    dtypes = [tensor.dtype for tensor in tensors]
    wide = [tensor for tensor in tensors if tensor.is_floating_point()]
    for tensor in wide:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)


def editable_linear(model: PreTrainedModel, name: str) -> nn.Linear:
    """
    The layer of that name, if its weight can be edited in place.

    Args:
        model ([`~transformers.PreTrainedModel`]): without adapters.
        name (`str`): as in `model.named_modules()`, such as `"model.layers.2.mlp.down_proj"`.

    Returns:
        `nn.Linear`: the layer itself.

    Raises:
        `ValueError`: the model has adapters or no such layer; the layer is no plain [`~torch.nn.Linear`] (quantised,
            GPT-2's `Conv1D`, fused experts, ...); its weight is not in memory, is sharded, packed, or shared with
            something else than the input embeddings. The message says what to do.
    """
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"{name} cannot be edited in a model with adapters: merge them first (`model = model.merge_and_unload()`)."
        )
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"The model has no layer {name}: {_what_is_there(model, name)}.") from error
    if type(module) is not nn.Linear:
        raise ValueError(f"{name} is a {type(module).__name__}, {_why_not(module)}.")
    weight = module.weight
    if weight.is_meta:
        raise ValueError(
            f"The weight of {name} is on the meta device, not in memory: load the model without offloading."
        )
    if isinstance(weight, DTensor):
        raise ValueError(f"The weight of {name} is sharded (DTensor): load the model whole, on one process.")
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(
            f"The weight of {name} is a {type(weight).__name__} of {weight.dtype}, which cannot be edited in place: "
            "load the model with dtype='bfloat16' and without quantization_config."
        )
    own = f"{name}.weight"
    others = {key for key, each in model.named_parameters(remove_duplicate=False) if each is weight} - {own}
    # A head that the configuration ties to the input embeddings is fine: it is untied before it is edited
    ties = {*model.all_tied_weights_keys.keys(), *model.all_tied_weights_keys.values()}
    if has_tied_head(model) and own in ties:
        others -= ties
    if others:
        raise ValueError(
            f"The weight of {name} is also {min(others)}, which the edit would move too: give {name} a copy of its "
            "own, or choose another layer."
        )
    return module


def _what_is_there(model: PreTrainedModel, name: str) -> str:
    """What the deepest module on the way to a name that does not exist says about it."""
    path = name
    while path not in dict(model.named_modules()):
        path = path.rpartition(".")[0]
    parent = model.get_submodule(path)
    if path and isinstance(parent, nn.Linear):
        return f"the layer is called {path}"
    if path and (_is_fused(parent) or not list(parent.children())):
        return f"{path} is a {type(parent).__name__}, {_why_not(parent)}"
    return f"{path or 'the model'} has {', '.join(child for child, _ in parent.named_children())}"


def _is_fused(module: nn.Module) -> bool:
    return any(parameter.dim() > 2 for parameter in module.parameters(recurse=False))


def _why_not(module: nn.Module) -> str:
    if isinstance(module, Conv1D):
        return "which stores its weight transposed: choose the LM head, or a model whose layers are nn.Linear"
    if isinstance(module, nn.Linear):
        return (
            "whose weight is packed or computed: load the model with dtype='bfloat16', without quantization_config "
            "and parametrizations"
        )
    if _is_fused(module):
        return "which fuses the weights of all experts in one parameter: choose a layer outside the experts"
    inside = [name for name, child in module.named_modules() if type(child) is nn.Linear]
    if inside:
        return f"not an nn.Linear: choose one inside it, such as {inside[0]}"
    return "not an nn.Linear: choose a layer that is, or load the model without quantization_config"
