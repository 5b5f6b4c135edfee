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
"""Running a causal LM no further than the losses read: truncated forwards, and a language-model head in chunks."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from .packing import Packing
from .scope import decoder_layers


if TYPE_CHECKING:
    from .prefix import Activations  # which runs a decoder itself


# Elements of fp32 logits that exist at one time (128 MiB).
LOGITS_BUDGET = 2**25


def redirect_forward(wrapped_model: nn.Module, model: nn.Module, method: Callable, *args: Any) -> Any:
    """
    Calls `method(*args)` as if it were the forward of `wrapped_model`.

    DDP and FSDP do their work around the wrapped model's forward. Forget, retain and reference passes, truncated ones
    among them, go through *one* such call per micro-batch; calling parts of the model directly skips gradient
    synchronisation without an error. The idea is PyTorch Lightning's, as in TRL's distillation trainer.

    Args:
        wrapped_model (`nn.Module`): the model as the Trainer prepared it.
        model (`nn.Module`): the model inside, without the wrapper.
        method (`Callable`): what to run in place of `model.forward`.
    """
    had_own_forward = "forward" in model.__dict__  # accelerate's mixed precision sets one on the instance
    original_forward = model.forward

    def restore() -> None:
        if had_own_forward:
            model.forward = original_forward
        else:
            model.__dict__.pop("forward", None)

    def redirected(*inner_args: Any) -> Any:
        restore()  # `method` may itself call the real forward
        return method(*inner_args)

    model.forward = redirected
    try:
        return wrapped_model(*args)
    finally:
        restore()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; afterwards, every module is back in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class _StopForward(Exception):
    """Ends a forward at the last layer that is read. Never leaves [`Decoder.run`]."""


@dataclass
class BackboneOutput:
    """
    What one pass gave; what was not asked for is `None`.

    Attributes:
        last_hidden_state (`torch.Tensor` of shape `(B, T, D)`, *optional*): after the final norm.
        hidden_states (`dict[int, torch.Tensor]`): by layer, the `(B, T, D)` residual stream after it, before any final
            norm.
    """

    last_hidden_state: Tensor | None
    hidden_states: dict[int, Tensor]


@dataclass
class Pass:
    """
    One set of rows to run; see [`Decoder.run`].

    Attributes:
        batch (`dict[str, torch.Tensor]`): a batch.
        hidden_layers (`Collection[int]`): layers that are captured.
        last_hidden_state (`bool`): whether all layers run.
        changes (`dict[int, Callable]`): by layer, what replaces the residual stream after it.
        activations ([`~hf_unlearn.prefix.Activations`], *optional*): what frozen layers made of this batch.
    """

    batch: dict[str, Tensor]
    hidden_layers: Collection[int]
    last_hidden_state: bool
    changes: dict[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    activations: "Activations | None" = None


class Decoder:
    """
    A causal language model, run no further than needed.

    Args:
        model ([`~transformers.PreTrainedModel`]): causal language model; with PEFT, the model inside.
        hidden_layer (`int`, *optional*): the 0-based layer that a caller reads who reads but one; only kept here.
    """

    def __init__(self, model: PreTrainedModel, hidden_layer: int | None = None):
        self.model = model
        self.hidden_layer = hidden_layer
        self.head = OutputHead(model)
        self.layers = decoder_layers(model)[1]

    def run(
        self,
        batch: dict[str, Tensor],
        hidden_layers: Collection[int],
        last_hidden_state: bool,
        changes: dict[int, Callable[[Tensor], Tensor]] | None = None,
        activations: "Activations | None" = None,
    ) -> BackboneOutput:
        """
        Runs all layers when `last_hidden_state` is asked for, else exactly those up to the last of `hidden_layers`.

        Args:
            batch (`dict[str, torch.Tensor]`): `input_ids` and `attention_mask`, `(B, T)`, right-padded. With
                `packed_index` and `position_ids`, it is run without its padding ([`~hf_unlearn.packing.Packing`]).
            hidden_layers (`Collection[int]`): 0-based layers after which the residual stream is captured.
            last_hidden_state (`bool`): return the final hidden states.
            changes (`dict[int, Callable]`, *optional*): by layer, what replaces the residual stream after it,
                `(B, T, D) -> (B, T, D)`. The layers above read the result, and so does the capture.
            activations ([`~hf_unlearn.prefix.Activations`], *optional*): what frozen layers made of this batch, which
                is not computed again; filled where it is empty.
        """
        one = Pass(batch, hidden_layers, last_hidden_state, changes or {}, activations)
        if "packed_index" in batch:
            return self._run_packed([one])[0]
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        return self._run(inputs, hidden_layers, last_hidden_state, one.changes, activations)

    def run_all(self, passes: dict[str, "Pass"]) -> dict[str, BackboneOutput]:
        """
        Several sets of rows. Packed sets that run equally deep go through one forward, unless something is changed or
        shared in it: weights are read once, which is what a forward over few tokens waits for.

        Args:
            passes (`dict[str, Pass]`): by set.
        """
        outputs, together = {}, defaultdict(list)
        for name, one in passes.items():
            if "packed_index" in one.batch and not one.changes and one.activations is None:
                together[None if one.last_hidden_state else max(one.hidden_layers)].append(name)
            else:
                outputs[name] = self.run(
                    one.batch, one.hidden_layers, one.last_hidden_state, one.changes, one.activations
                )
        for names in together.values():
            outputs.update(zip(names, self._run_packed([passes[name] for name in names]), strict=True))
        return {name: outputs[name] for name in passes}

    def _run_packed(self, passes: list["Pass"]) -> list[BackboneOutput]:
        """Passes to the same depth; if there are several, they change and share nothing."""
        packing = Packing([one.batch for one in passes])

        def around(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda packed: packing.join([change(padded) for padded in packing.split(packed)])

        output = self._run(
            packing.inputs(),
            {layer for one in passes for layer in one.hidden_layers},
            passes[0].last_hidden_state,
            {layer: around(change) for layer, change in passes[0].changes.items()},
            passes[0].activations,
        )
        last = [None] * len(passes) if output.last_hidden_state is None else packing.split(output.last_hidden_state)
        hidden = {layer: packing.split(states) for layer, states in output.hidden_states.items()}
        return [
            BackboneOutput(last[index], {layer: hidden[layer][index] for layer in one.hidden_layers})
            for index, one in enumerate(passes)
        ]

    def _run(
        self,
        inputs: dict[str, Tensor],
        hidden_layers: Collection[int],
        last_hidden_state: bool,
        changes: dict[int, Callable[[Tensor], Tensor]],
        activations: "Activations | None",
    ) -> BackboneOutput:
        captured: dict[int, Tensor] = {}
        last_layer = None if last_hidden_state else max(hidden_layers)

        def hook(layer: int) -> Callable:
            def change_and_capture(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
                if layer in changes:
                    output = changes[layer](output)
                if layer in hidden_layers:
                    captured[layer] = output
                if layer == last_layer:
                    raise _StopForward
                return output

            return change_and_capture

        # Registered per call and always removed. The hook runs after FSDP2's own (which reshards the layer), because
        # it came later, and outside activation checkpoints, so once: transformers >= 5.23 checkpoints `forward`.
        output = None
        with nullcontext() if activations is None else activations.shared(self.layers):
            handles = [
                self.layers[layer].register_forward_hook(hook(layer)) for layer in sorted({*hidden_layers, *changes})
            ]
            try:
                # `base_model` is the decoder without the language-model head
                output = self.model.base_model(**inputs, use_cache=False)
            except _StopForward:
                pass
            finally:
                for handle in handles:
                    handle.remove()
        return BackboneOutput(
            last_hidden_state=output.last_hidden_state if last_hidden_state else None, hidden_states=captured
        )


class OutputHead:
    """
    The language-model head with whatever the architecture does to its logits, in fp32.

    Matrix products run in the dtype of the head's weight, outside autocast: under bf16 autocast an fp32 head would
    otherwise round logits to 8 bits (a unit in the last place is 0.06 to 0.125 at the usual magnitudes), which drowns
    a small KL. For a model loaded in bf16 the product itself is bf16; only what follows is fp32.

    Args:
        model ([`~transformers.PreTrainedModel`]): causal language model; with PEFT, the model inside.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.module = model.get_output_embeddings()
        config = model.config.get_text_config().to_dict()
        # Scale before the softcap. Cohere multiplies, Granite divides, Falcon-H1 multiplies; `check_output_head`
        # refuses whatever is not one of these.
        self.scale = config.get("logit_scale") or config.get("lm_head_multiplier") or 1.0
        if config.get("logits_scaling"):
            self.scale = 1.0 / config["logits_scaling"]
        self.softcap = config.get("final_logit_softcapping")

    @property
    def is_trained(self) -> bool:
        """Whether a parameter of the head moves: its own, a tied embedding's, or an adapter's on it."""
        return any(parameter.requires_grad for parameter in self.module.parameters())

    @property
    def is_sharded(self) -> bool:
        # FSDP2 turns what it shards into an `FSDPModule`; the parameters are whole tensors while it is gathered
        sharded = isinstance(self.module, FSDPModule) or isinstance(self.model, FSDPModule)
        return sharded or is_deepspeed_zero3_enabled()

    def __call__(self, hidden: Tensor) -> Tensor:
        """`(N, D)` final hidden states to `(N, vocabulary)` fp32 logits."""
        weight = self.module.weight
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.module(hidden.to(weight.dtype) if weight.is_floating_point() else hidden).float()
        logits = logits * self.scale if self.scale != 1.0 else logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@torch.no_grad()
def check_output_head(model: PreTrainedModel) -> None:
    """
    Refuses an architecture whose logits are not what [`OutputHead`] computes, by comparing them on two tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]): causal language model; with PEFT, the model inside.

    Raises:
        `ValueError`: the model's own forward gives other logits.
    """
    was_training = model.training
    model.eval()
    input_ids = torch.tensor([[0, 1]], device=model.get_input_embeddings().weight.device)
    expected = model(input_ids=input_ids, use_cache=False).logits.float()
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    logits = OutputHead(model)(hidden.flatten(0, 1)).view_as(expected)
    model.train(was_training)
    # bf16 weights: both paths round once, but scale and softcap act on other roundings
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 2e-2
    if not torch.allclose(logits, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()):
        raise ValueError(
            f"{type(model).__name__} changes its logits after the language-model head in a way that hf-unlearn does "
            "not know: use hidden-state losses (rmu with hidden_mse), or report the architecture."
        )


@torch.no_grad()
def check_packing(model: PreTrainedModel, last_layer: int | None) -> None:
    """
    Refuses an architecture that lets packed rows see each other, by trying it on two rows.

    Args:
        model ([`~transformers.PreTrainedModel`]): causal language model in evaluation mode; with PEFT, the model
            inside.
        last_layer (`int`, *optional*): the last layer that is run; all where unset.

    Raises:
        `ValueError`: the states of a row depend on the row before it, or are not those of the row alone.
    """
    decoder, device = Decoder(model), model.get_input_embeddings().weight.device

    def run(*rows: list[int]) -> Tensor:
        input_ids = torch.tensor([[token for row in rows for token in row]], device=device)
        batch = {
            "input_ids": input_ids,
            "packed_index": torch.arange(input_ids.numel(), device=device),
            "position_ids": torch.cat([torch.arange(len(row), device=device) for row in rows]),
        }
        output = decoder.run(batch, [] if last_layer is None else [last_layer], last_layer is None)
        states = output.last_hidden_state if last_layer is None else output.hidden_states[last_layer]
        return states[0, -len(rows[-1]) :]

    alone, packed, after_another = run([1, 2, 3]), run([3, 2, 1], [1, 2, 3]), run([2, 1, 1], [1, 2, 3])
    # Products of another shape round otherwise, in bfloat16 by some 1e-2; a row that sees another is off by far more
    tolerance = 1e-4 if alone.dtype == torch.float32 else 5e-2
    is_same = torch.allclose(alone, packed, rtol=0.0, atol=tolerance * alone.abs().max().item())
    if not (is_same and torch.equal(packed, after_another)):
        raise ValueError(
            f"padding_free=True: {type(model).__name__} does not keep rows of one sequence apart, or does not count "
            "their positions anew. Remove it."
        )


class _PrecomputedGradient(torch.autograd.Function):
    """Per-position values whose gradient with respect to their own hidden state is already known."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (grad_values.unsqueeze(-1) * gradient).to(gradient.dtype), None, None


def per_position(head: OutputHead, hidden: Tensor, function: Callable[..., Tensor], *extras: Tensor) -> Tensor:
    """
    One number per position from its logits, without holding all logits at a time.

    With a frozen head, the gradient of each value with respect to its hidden state is computed in the forward, chunk
    by chunk, and kept as `(N, D)`: logits are never stored and never recomputed, at the FLOPs of one forward and one
    backward. A trained head is checkpointed instead (its logits are computed twice). A sharded head runs in one piece,
    because FSDP's hooks expect one call per forward; then the memory is that of all logits.

    Args:
        head ([`OutputHead`]): the head.
        hidden (`torch.Tensor` of shape `(N, D)`): final hidden states.
        function (`Callable`): `(logits (n, V) fp32, *extras) -> (n,)`; row i may depend on row i only.
        extras (`torch.Tensor` of shape `(N, ...)`): further arguments, chunked alike, without gradient.

    Returns:
        `torch.Tensor` of shape `(N,)`, fp32.
    """
    if head.is_sharded:
        return function(head(hidden), *extras)
    chunk = max(1, LOGITS_BUDGET // head.module.weight.shape[0])
    pieces = [tensor.split(chunk) for tensor in (hidden, *extras)]

    if not torch.is_grad_enabled():
        return torch.cat([function(head(h), *e) for h, *e in zip(*pieces, strict=True)])

    if head.is_trained:

        def run(h: Tensor, *e: Tensor) -> Tensor:
            return function(head(h), *e)

        return torch.cat([checkpoint(run, h, *e, use_reentrant=False) for h, *e in zip(*pieces, strict=True)])

    values, gradients = [], []
    for h, *e in zip(*pieces, strict=True):
        h = h.detach().requires_grad_()
        value = function(head(h.view_as(h)), *e)  # a view: module hooks (FlopCounterMode's) refuse leaves
        gradients.append(torch.autograd.grad(value.sum(), h)[0])
        values.append(value.detach())
    return _PrecomputedGradient.apply(hidden, torch.cat(values), torch.cat(gradients))


def label_log_prob(logits: Tensor, labels: Tensor) -> Tensor:
    """`log softmax(logits)[label]`, `(N, V), (N,) -> (N,)`."""
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def gather_predicting(last_hidden_state: Tensor, label_index: Tensor) -> Tensor:
    """The `(N, D)` hidden states that predict the labelled tokens: those one position before them."""
    return last_hidden_state.flatten(0, 1).index_select(0, label_index - 1)


def scatter_to_tokens(values: Tensor, label_index: Tensor, shape: torch.Size) -> Tensor:
    """`(N,)` values of the labelled tokens to `(B, T)`, zero elsewhere."""
    return values.new_zeros(shape.numel()).index_copy(0, label_index, values).view(shape)


def token_log_probs(head: OutputHead, hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Log-probability of each labelled token, `(B, T)` fp32, from the `(N, D)` states that predict them."""
    labels = batch["labels"].flatten().index_select(0, batch["label_index"])
    values = per_position(head, hidden, label_log_prob, labels)
    return scatter_to_tokens(values, batch["label_index"], batch["labels"].shape)


def token_values(
    head: OutputHead,
    hidden: Tensor,
    batch: dict[str, Tensor],
    function: Callable[..., Tensor],
    reference_head: Callable[[Tensor], Tensor] | None = None,
    reference: Tensor | None = None,
) -> Tensor:
    """
    One number for each labelled token from the logits that predict it, `(B, T)` fp32.

    Args:
        head ([`OutputHead`]): head of the trained model.
        hidden (`torch.Tensor` of shape `(N, D)`): its states that predict the labelled tokens.
        batch (`dict[str, torch.Tensor]`): `labels` and `label_index`.
        function (`Callable`): `(logits (n, V), labels (n,), reference_logits (n, V) or None) -> (n,)`.
        reference_head (`Callable`, *optional*): `(n, ...)` rows of `reference` to `(n, V)` logits of the reference.
        reference (`torch.Tensor` of shape `(N, ...)`, *optional*): hidden states of the reference, or its logits.
    """

    def chunk(logits: Tensor, labels: Tensor, *reference_rows: Tensor) -> Tensor:
        reference_logits = None
        if reference_rows:
            with torch.no_grad():
                reference_logits = reference_head(*reference_rows)
        return function(logits, labels, reference_logits)

    labels = batch["labels"].flatten().index_select(0, batch["label_index"])
    extras = (labels,) if reference is None else (labels, reference)
    values = per_position(head, hidden, chunk, *extras)
    return scatter_to_tokens(values, batch["label_index"], batch["labels"].shape)
