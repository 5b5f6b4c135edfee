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
What to forget: pure functions of tensors that return `(loss, metrics)`.

Conventions, shared with `retain.py`. `B` rows, `T` positions, `D` hidden size; position `t` of a tensor of
log-probabilities belongs to the *token* at `t`, so position 0, which nothing predicts, is always masked. `mask` is
`True` where a value counts; masked values are ignored, whatever they hold. `num_items` is the number of sequences,
tokens or positions (see `Loss.unit`) over which the loss is a mean. The trainer passes the number in the *whole*
optimizer step, all micro-batches and processes together, so that accumulation and data parallelism change nothing; on
a single batch it is the number in that batch. Metrics are scalars normalised in the same way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ga(log_probs: Tensor, *, mask: Tensor, num_items: Tensor | float) -> tuple[Tensor, dict[str, Tensor]]:
    r"""
    Gradient ascent: lowers the mean log-probability of the forget tokens without bound.

    $$L = \frac{1}{n} \sum_{b,t} \log p_\theta(y_{b,t})$$

    Args:
        log_probs (`torch.Tensor` of shape `(B, T)`, fp32): log-probability of each token under the trained model.
        mask (`torch.Tensor` of shape `(B, T)`, bool): tokens that are forgotten.
        num_items (`torch.Tensor` or `float`): number of forgotten tokens.

    Returns:
        The loss, minus the token-mean negative log-likelihood, and no metrics.

    Source: the baseline of TOFU ([2401.06121](https://huggingface.co/papers/2401.06121), section 4); with the retain
    loss `nll` it is GradDiff. Published there: weight 1, learning rate 1e-5. It diverges by design: stop early.

    Example:

    ```python
    >>> import torch
    >>> from hf_unlearn.losses.forget import ga
    >>> log_probs, mask = torch.tensor([[0.0, -1.0, -3.0]]), torch.tensor([[False, True, True]])
    >>> ga(log_probs, mask=mask, num_items=2)
    (tensor(-2.), {})

    ```
    """
    return log_probs.masked_fill(~mask, 0.0).sum() / num_items, {}


def npo(
    log_probs: Tensor, reference_log_probs: Tensor, *, mask: Tensor, num_items: Tensor | float, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""
    Negative preference optimization: DPO with only the rejected answer, so that a sequence stops pushing once it is
    far less likely than under the reference.

    $$L = -\frac{2}{\beta B} \sum_b \log \sigma\big(-\beta\, (\log p_\theta(y_b|x_b) - \log p_{ref}(y_b|x_b))\big)$$

    The sequence log-probability is the *sum* over the masked tokens.

    Args:
        log_probs (`torch.Tensor` of shape `(B, T)`, fp32): log-probability of each token under the trained model.
        reference_log_probs (`torch.Tensor` of shape `(B, T)`, fp32): the same under the reference, without gradient.
        mask (`torch.Tensor` of shape `(B, T)`, bool): tokens that are forgotten.
        num_items (`torch.Tensor` or `float`): number of sequences.
        beta (`float`): inverse temperature. `beta -> 0` gives gradient ascent on the sum.

    Returns:
        The loss and `log_ratio`, the mean of `log p_theta - log p_ref` over sequences, in nats.

    Source: [2404.05868](https://huggingface.co/papers/2404.05868), equation 3. Published: beta 0.1, weight 1, learning
    rate 1e-5 (TOFU).

    Example:

    ```python
    >>> import torch
    >>> from hf_unlearn.losses.forget import npo
    >>> log_probs, mask = torch.tensor([[0.0, -1.0, -3.0]]), torch.tensor([[False, True, True]])
    >>> loss, metrics = npo(log_probs, log_probs, mask=mask, num_items=1, beta=0.1)
    >>> round(loss.item(), 4), metrics["log_ratio"].item()  # at the reference: (2 / beta) log 2
    (13.8629, 0.0)

    ```
    """
    log_ratio = (log_probs - reference_log_probs).masked_fill(~mask, 0.0).sum(-1)
    loss = -(2 / beta) * F.logsigmoid(-beta * log_ratio).sum() / num_items
    return loss, {"log_ratio": log_ratio.detach().sum() / num_items}


def rmu(
    hidden_states: Tensor, control_vector: Tensor, *, mask: Tensor, num_items: Tensor | float
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""
    Representation misdirection: pushes the residual stream after the hidden layer towards a fixed random direction.

    $$L = \frac{1}{n D} \sum_{b,t} \lVert h_\theta(x_{b,t}) - c\, u \rVert_2^2$$

    Each position weighs the same, whatever the length of its row (dividing a row's error by every row's length is a
    known defect of public code).

    Args:
        hidden_states (`torch.Tensor` of shape `(B, T, D)`): residual stream after the hidden layer.
        control_vector (`torch.Tensor` of shape `(D,)`): `c * u`, u a unit vector drawn from U[0, 1)^D, one per topic.
        mask (`torch.Tensor` of shape `(B, T)`, bool): positions that are misdirected (labels other than -100).
        num_items (`torch.Tensor` or `float`): number of such positions.

    Returns:
        The loss and `hidden_norm`, the mean L2 norm of the misdirected states.

    Source: [2403.03218](https://huggingface.co/papers/2403.03218), section 4. Published (Zephyr-7B): layer 7,
    `mlp.down_proj` of layers 5 to 7, c 6.5, learning rate 5e-5, retain loss `hidden_mse` with weight 1200.

    Example:

    ```python
    >>> import torch
    >>> from hf_unlearn.losses.forget import rmu
    >>> hidden_states, mask = torch.tensor([[[3.0, 4.0], [9.0, 9.0]]]), torch.tensor([[True, False]])
    >>> loss, metrics = rmu(hidden_states, torch.tensor([0.0, 0.0]), mask=mask, num_items=1)
    >>> loss, metrics["hidden_norm"]
    (tensor(12.5000), tensor(5.))

    ```
    """
    hidden_states = hidden_states.float()
    # Masked before the square, whose gradient at NaN or infinity is NaN even where nothing flows back
    error = (hidden_states - control_vector).masked_fill(~mask.unsqueeze(-1), 0.0).square().mean(-1)
    with torch.no_grad():
        norm = hidden_states.norm(dim=-1).masked_fill(~mask, 0.0)
    return error.sum() / num_items, {"hidden_norm": norm.sum() / num_items}
