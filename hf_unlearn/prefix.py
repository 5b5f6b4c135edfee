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
What no training moves is computed once: the frozen layers below the first trained module, for policy and reference.

Both models are the same there, so whichever runs first on a batch leaves behind what the other, and every further pass
of the step, goes on from. Nothing is computed in another way or order: the results are the same to the last bit.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .forward import Decoder
from .scope import decoder_layers


# Key of the residual stream that enters the first layer that is not skipped; all others name modules of that layer
HIDDEN = "hidden_states"

# What draws random numbers without being a module, so that `disable_dropout` does not reach it
_RANDOM_SETTINGS = ("attention_dropout", "dropout", "layerdrop", "router_jitter_noise")


@dataclass(frozen=True)
class Prefix:
    """
    The part of a decoder that no training moves.

    Decoder layers `0 ... depth - 1` as a whole, and of layer `depth` what comes before its first trained module: where
    that is `mlp.down_proj`, as for RMU, the attention and all of the MLP but that matrix.

    Attributes:
        depth (`int`): number of layers that are frozen as a whole.
        outputs (`dict[str, int]`): frozen modules with matrices that come before the first trained one, by name in
            layer `depth`, and how many values each returns in a tuple; 0 where it returns a tensor.
        entry (`tuple[str, str]`, *optional*): a module of layer `depth` and the trained module in it whose output it
            returns as it is: once the input of the latter is known, nothing else in the former is needed.
    """

    depth: int
    outputs: dict[str, int] = field(default_factory=dict)
    entry: tuple[str, str] | None = None

    @property
    def keys(self) -> list[str]:
        """What is kept of a batch."""
        hidden = [HIDDEN] if self.depth else []
        return [*hidden, *self.outputs, *([] if self.entry is None else self.entry[1:])]


@dataclass
class Activations:
    """
    What the frozen part made of one batch: left by the first pass over it, read by those that follow.

    Travels with the batch as `batch["activations"]`: an object, which DDP hands on as it is, where it copies dicts.

    Attributes:
        prefix ([`Prefix`]): the frozen part.
        tensors (`dict[str, torch.Tensor]`): by key of the prefix, `(B, T, ...)`, without gradient.
        missing (`list[int]`): with a cache, rows of the batch that are not on disk.
    """

    prefix: Prefix
    tensors: dict[str, Tensor] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return len(self.tensors) == len(self.prefix.keys)

    @contextmanager
    def shared(self, layers: nn.ModuleList) -> Iterator[None]:
        """
        In this context a pass over the batch goes on from what is here, and leaves here what is missing.

        Args:
            layers (`torch.nn.ModuleList`): decoder layers of the policy or the reference.
        """
        prefix, tensors = self.prefix, self.tensors
        with ExitStack() as stack:
            if prefix.depth and HIDDEN in tensors:
                # The last layer gives the residual stream, so that hooks on it see what they always see
                *skipped, last = layers[: prefix.depth]
                for layer in skipped:
                    stack.enter_context(_forward_is(layer, _identity))
                stack.enter_context(_forward_is(last, _constant(tensors[HIDDEN], 0)))
            elif prefix.depth:
                # Before the hooks of a pass: it sees the residual stream without their changes
                stack.enter_context(_hooked(layers[prefix.depth - 1].register_forward_hook(self._keep_output(HIDDEN))))
            for name, num_values in prefix.outputs.items():
                module = layers[prefix.depth].get_submodule(name)
                if name in tensors:
                    stack.enter_context(_forward_is(module, _constant(tensors[name], num_values)))
                else:
                    stack.enter_context(_hooked(module.register_forward_hook(self._keep_output(name))))
            if prefix.entry is not None:
                outer, inner = (layers[prefix.depth].get_submodule(name) for name in prefix.entry)
                name = prefix.entry[1]
                if name in tensors:
                    stack.enter_context(_forward_is(outer, _call(inner, tensors[name])))
                else:
                    stack.enter_context(_hooked(inner.register_forward_pre_hook(self._keep_input(name))))
            yield

    def _keep_output(self, name: str) -> Callable:
        def keep(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            self.tensors[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return keep

    def _keep_input(self, name: str) -> Callable:
        def keep(module: nn.Module, args: tuple) -> None:
            self.tensors[name] = args[0].detach()

        return keep


def drop_activations(inputs: dict[str, dict[str, Any]]) -> None:
    """Frees what was left behind with a micro-batch: `inputs` holds one batch per set."""
    for batch in inputs.values():
        for name in ("activations", "targets"):
            if name in batch:
                batch.pop(name).tensors.clear()  # the data loader's own batch holds the same object


@torch.no_grad()
def find_prefix(
    model: PreTrainedModel,
    lowest_read: int | None = None,
    lowest_changed: int | None = None,
    last_read: int | None = None,
) -> Prefix | None:
    """
    Finds what no training moves, and tries it on two tokens: an architecture whose layers pass more to each other than
    the residual stream (keys and values, say) shares nothing.

    Args:
        model ([`~transformers.PreTrainedModel`]): causal language model in evaluation mode, its scope already set;
            with PEFT, the model inside, its adapters active.
        lowest_read (`int`, *optional*): the lowest layer whose output a loss reads.
        lowest_changed (`int`, *optional*): the lowest layer after which the residual stream is changed, by noise on
            the reference or by an adversary: only what lies below is the same for both models.
        last_read (`int`, *optional*): the last layer that is run at all; those above may be elsewhere. The whole model
            is run where unset.

    Returns:
        [`Prefix`], or `None` where nothing can be shared: the embeddings move, something draws random numbers, or the
        architecture does not allow it.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_unlearn.prefix import find_prefix
    >>> from hf_unlearn.scope import freeze_all_but
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2,
    ...                                      num_hidden_layers=4, vocab_size=8)).eval()
    >>> freeze_all_but(model, ["model.layers.2.mlp.down_proj.weight"])
    >>> find_prefix(model)
    Prefix(depth=2, outputs={'self_attn': 2}, entry=('mlp', 'mlp.down_proj'))
    >>> find_prefix(model, lowest_changed=1)
    Prefix(depth=2, outputs={}, entry=None)

    ```
    """
    stack_name, layers = decoder_layers(model)
    if _draws_random_numbers(model) or _moves_below_layers(model, stack_name):
        return None
    first = next((index for index, layer in enumerate(layers) if _moves(layer)), len(layers))
    read = len(layers) if lowest_read is None else lowest_read + 1
    changed = len(layers) if lowest_changed is None else lowest_changed + 1
    prefix = Prefix(min(first, read, changed))
    input_ids = torch.tensor([[0, 1]], device=model.get_input_embeddings().weight.device)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    decoder = Decoder(model)

    def run(activations: Activations | None = None) -> Tensor:
        output = decoder.run(
            batch, [] if last_read is None else [last_read], last_read is None, activations=activations
        )
        return output.last_hidden_state if last_read is None else output.hidden_states[last_read]

    if prefix.depth == first < min(changed, len(layers)):
        trace = _Trace(layers[first])
        with trace.recording():
            run()
        if trace.first_trained is not None:
            prefix = Prefix(first, trace.outputs(), trace.entry())
    if not prefix.keys:
        return None
    activations = Activations(prefix)
    states = [run(activations), run(activations)]  # the second goes on from what the first left behind
    expected = run()
    is_exact = activations.is_complete and all(torch.equal(state, expected) for state in states)
    return prefix if is_exact else None


def same_prefix(model: PreTrainedModel, other: PreTrainedModel, prefix: Prefix) -> bool:
    """
    Whether two models compute the same in a frozen part: same architecture, and the same weights, bit for bit.

    Args:
        model ([`~transformers.PreTrainedModel`]): the trained model; with PEFT, the model inside.
        other ([`~transformers.PreTrainedModel`]): a model that never moves.
        prefix ([`Prefix`]): from [`find_prefix`] on `model`.
    """
    configs = [{**m.config.to_dict(), "_name_or_path": None, "use_cache": None} for m in (model, other)]
    implementations = [m.config.get_text_config()._attn_implementation for m in (model, other)]
    if type(model) is not type(other) or configs[0] != configs[1] or implementations[0] != implementations[1]:
        return False
    values, other_values = prefix_tensors(model, prefix), prefix_tensors(other, prefix)
    return all(
        name in other_values
        and value.dtype == other_values[name].dtype
        and value.device == other_values[name].device
        and torch.equal(value, other_values[name])
        for name, value in values.items()
    )


def prefix_tensors(model: PreTrainedModel, prefix: Prefix) -> dict[str, Tensor]:
    """The parameters and buffers, by name, on which the frozen part can depend. No head and no trained one."""
    stack_name, layers = decoder_layers(model)
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    head -= {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    above = tuple(f"{stack_name}.{index}." for index in range(prefix.depth, len(layers)))
    partly: tuple[str, ...] = ()
    if prefix.outputs or prefix.entry:
        partly = tuple(f"{stack_name}.{prefix.depth}.{name}." for name in _split(layers[prefix.depth])[1])
    return {
        name: tensor.detach()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if (not name.startswith(above) or name.startswith(partly)) and id(tensor) not in head
    }


class _Trace:
    """The order in which the modules of one layer run, in one pass."""

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.trained, self.frozen = _split(layer)
        self.calls: list[tuple[str, str]] = []  # ("begin" or "end", name)
        self.outputs_by_name: dict[str, Any] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self.layer.named_modules():
                if name:
                    stack.enter_context(_hooked(module.register_forward_pre_hook(self._begin(name))))
                    stack.enter_context(_hooked(module.register_forward_hook(self._end(name))))
            yield

    @property
    def first_trained(self) -> str | None:
        """`None` where no trained module runs, as experts to which no token is sent."""
        return next((name for kind, name in self.calls if kind == "begin" and name in self.trained), None)

    def _begin(self, name: str) -> Callable:
        return lambda module, args: self.calls.append(("begin", name))

    def _end(self, name: str) -> Callable:
        def end(module: nn.Module, args: tuple, output: Any) -> None:
            self.calls.append(("end", name))
            self.outputs_by_name[name] = output

        return end

    def entry(self) -> tuple[str, str] | None:
        inner = self.first_trained
        outer = inner.rpartition(".")[0]
        is_handed_on = outer in self.outputs_by_name and self.outputs_by_name[outer] is self.outputs_by_name[inner]
        if not is_handed_on or self._count(inner) != 1 or self._count(outer) != 1:
            return None
        before = [name for name in self._before() if name.startswith(f"{outer}.")]
        return (outer, inner) if any(_has_matrix(self.layer.get_submodule(name)) for name in before) else None

    def outputs(self) -> dict[str, int]:
        entry = self.entry()
        inside = () if entry is None else f"{entry[0]}."
        return {
            name: len(self.outputs_by_name[name]) if isinstance(self.outputs_by_name[name], tuple) else 0
            for name in self._before()
            if not name.startswith(inside) and _has_matrix(self.layer.get_submodule(name))
        }

    def _before(self) -> list[str]:
        """Frozen modules that run once, and end before the first trained one begins."""
        calls = self.calls[: self.calls.index(("begin", self.first_trained))]
        return [name for kind, name in calls if kind == "end" and name in self.frozen and self._count(name) == 1]

    def _count(self, name: str) -> int:
        return self.calls.count(("begin", name))


def _split(layer: nn.Module) -> tuple[set[str], set[str]]:
    """The smallest modules of a layer that move, and the largest that do not, by name."""
    trained, frozen = set(), set()

    def descend(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            name = f"{prefix}{name}"
            if not _moves(child):
                frozen.add(name)
            elif isinstance(child, BaseTunerLayer) or any(p.requires_grad for p in child.parameters(recurse=False)):
                trained.add(name)
            else:
                descend(child, f"{name}.")

    descend(layer, "")
    return trained, frozen


def _moves(module: nn.Module) -> bool:
    """Whether training may move it. All adapters count: the reference may do without them."""
    return any(parameter.requires_grad for parameter in module.parameters()) or any(
        isinstance(child, BaseTunerLayer) for child in module.modules()
    )


def _moves_below_layers(model: PreTrainedModel, stack_name: str) -> bool:
    """Whether anything beside the decoder layers moves, an untied head excepted."""
    head = model.get_output_embeddings()
    own = {id(parameter) for parameter in head.parameters()}
    own -= {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    parameters = any(
        parameter.requires_grad and id(parameter) not in own
        for name, parameter in model.named_parameters()
        if not name.startswith(f"{stack_name}.")
    )
    adapters = any(
        isinstance(module, BaseTunerLayer) and module is not head
        for name, module in model.named_modules()
        if not name.startswith(f"{stack_name}.")
    )
    return parameters or adapters


def _draws_random_numbers(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config().to_dict()
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()) or any(
        config.get(name) for name in _RANDOM_SETTINGS
    )


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


@contextmanager
def _forward_is(module: nn.Module, forward: Callable) -> Iterator[None]:
    own = module.__dict__.get("forward")  # accelerate's hooks set one on the instance
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def _hooked(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _identity(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _constant(value: Tensor, num_values: int) -> Callable:
    # What attention returns beside its output (its weights) is read by no layer
    output = (value, *[None] * (num_values - 1)) if num_values else value
    return lambda *args, **kwargs: output


def _call(module: nn.Module, entering: Tensor) -> Callable:
    return lambda *args, **kwargs: module(entering)
