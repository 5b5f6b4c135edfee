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
"""How far a row would still move the weights: the norm of the gradient of its loss."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..forward import Decoder, gather_predicting, token_log_probs
from ..pairing import DataCollatorForUnlearning
from ..scope import decoder_layers
from .rows import Answer


def gradient_norm(gradients: Iterable[Tensor]) -> float:
    """
    L2 norm of several tensors taken as one vector, `sqrt(Σ_i ‖g_i‖²)`.

    Each tensor's norm is accumulated in fp32, whatever its dtype, and their squares in float64.

    Args:
        gradients (`Iterable[torch.Tensor]`): of any shape, dtype and device.

    Returns:
        `float`: 0 where there is no tensor.

    Example:

    ```python
    >>> import torch
    >>> from hf_unlearn.metrics.gradient_norm import gradient_norm
    >>> gradient_norm([torch.tensor([[3.0]]), torch.tensor([0.0, 4.0])])
    5.0

    ```
    """
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32).cpu() for gradient in gradients]
    return torch.stack(norms).double().square().sum().sqrt().item() if norms else 0.0


def gradient_norm_scores(
    model: PreTrainedModel,
    answers: Sequence[Answer],
    *,
    last_layers: int | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> list[float | None]:
    """
    Minus the L2 norm of the gradient of each answer's loss, the mean NLL of its tokens, with respect to the weights.

    As in [Wang et al.](https://huggingface.co/papers/2402.17012): training drives the gradients of what it saw towards
    zero. Here it is the norm of the whole gradient, where public code averages the norms of single tensors, so that a
    bias counts as much as a matrix and a fused projection less than its parts.

    The weights are all that text reaches: parts of the model that it does not (a vision tower, experts that no token
    is sent to) have no gradient and add nothing. Integer and 8-bit float weights are the storage of quantised ones and
    have none either. Under an adapter they are the adapted model's own weights, and not the adapter's, so that the
    norm is that of the merged model.

    Rows run one at a time, hence no row's score depends on another's. Call it in [`evaluation_mode`]; nothing stays
    behind: `.grad` is neither read nor written, and `requires_grad` is given back as it was.

    Args:
        model ([`~transformers.PreTrainedModel`]): causal language model; with PEFT, the model inside. In float16,
            whose smallest gradients are zero, the norm comes out low: use bfloat16 or float32.
        answers (`Sequence[list[Tokens]]`): answers after their prompts, each of one or more sequences.
        last_layers (`int`, *optional*): take the weights of that many last decoder layers only, all by default. One
            gradient is a copy of the weights that it is taken for; below them, no activation is kept.
        progress (`Callable[[int], None]`, *optional*): told how many answers are done.

    Returns:
        `list[float | None]`: one for each answer, in order; `None` where there is no token.

    Raises:
        `ValueError`: more layers than the model has, no weight that can have a gradient, or a gradient that is NaN or
            infinite.
    """
    # The longest first: what does not fit into memory fails at once
    order = sorted(range(len(answers)), key=lambda row: _longest(answers[row]), reverse=True)
    decoder = Decoder(model)
    scores: list[float | None] = [None] * len(answers)
    with _asking_for_gradients(model, last_layers) as weights:
        for row in order:
            if answers[row]:
                scores[row] = -gradient_norm(_gradients(decoder, weights, answers[row]))
            progress(1)
    if not all(score is None or math.isfinite(score) for score in scores):
        raise ValueError(
            f"The gradient of a row is not finite in {str(model.dtype).removeprefix('torch.')}: load the model in "
            "float32, or pass gradient_norm=False."
        )
    return scores


def _longest(answer: Answer) -> int:
    return max((len(tokens.input_ids) for tokens in answer), default=0)


def _gradients(decoder: Decoder, weights: list[nn.Parameter], answer: Answer) -> Iterable[Tensor]:
    """The gradient of the mean NLL over all tokens of the answer, for the weights that it reaches."""
    device = decoder.model.get_input_embeddings().weight.device
    collate = DataCollatorForUnlearning(pad_token_id=0)
    num_labels = sum(tokens.num_labels for tokens in answer)
    sums: dict[int, Tensor] = {}
    for tokens in answer:  # windows of a long text: one forward each, as in `score_answers`
        batch = collate([{"input_ids": tokens.input_ids, "labels": tokens.labels}])
        batch = {key: value.to(device) for key, value in batch.items()}
        # Not `backward()`: it would add to `.grad`, and run the hooks of whoever waits for gradients
        with torch.enable_grad():
            last = decoder.run(batch, [], last_hidden_state=True).last_hidden_state
            hidden = gather_predicting(last, batch["label_index"])
            loss = -token_log_probs(decoder.head, hidden, batch).sum() / num_labels
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                sums[index] = sums[index].float() + gradient if index in sums else gradient
    return sums.values()


@contextmanager
def _asking_for_gradients(model: PreTrainedModel, last_layers: int | None) -> Iterator[list[nn.Parameter]]:
    """The weights whose gradient is taken; they alone have `requires_grad`, afterwards all have it as before."""
    layers = decoder_layers(model)[1]
    if last_layers is not None and not 1 <= last_layers <= len(layers):
        raise ValueError(
            f"last_layers={last_layers}: the model has {len(layers)} decoder layers, take 1 to all of them."
        )
    source = model if last_layers is None else layers[-last_layers:]
    of_adapters = {id(parameter) for parameter in _adapter_parameters(model)}
    weights = [
        parameter
        for parameter in source.parameters()
        if parameter.is_floating_point() and parameter.element_size() > 1 and id(parameter) not in of_adapters
    ]
    if not weights:
        raise ValueError(
            "No weight can have a gradient, all are quantised: load the model in bfloat16, or pass "
            "gradient_norm=False."
        )
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, flag in flags:
            if flag:
                parameter.requires_grad_(False)
        for parameter in weights:
            parameter.requires_grad_(True)
        yield weights
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            of_layer = {id(parameter) for parameter in module.get_base_layer().parameters()}
            yield from (parameter for parameter in module.parameters() if id(parameter) not in of_layer)
