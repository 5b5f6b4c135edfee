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
"""Linear probe: do the hidden states still tell forget from retain questions?"""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from ..forward import evaluation_mode
from ..metrics.inference import checked_model
from ..robustness.probe_training import collect_features
from .base import AttackData, Attacked, Trial, answer_probabilities, tokenized


BUDGETS: dict[str, dict[str, Any]] = {
    "small": {"every": 2, "penalty": 0.1, "controls": 4},
    "standard": {"every": 1, "penalty": 0.1, "controls": 16},
    "large": {"every": 1, "penalty": 0.1, "controls": 64},
}


def linear_probe(attacked: Attacked, data: AttackData, settings: dict[str, Any], seed: int) -> list[Trial]:
    r"""
    Trains a linear probe on the states of each layer to tell forget from retain questions, and asks it about others; a
    trial per layer.

    A row's feature is the mean state over its question (over the whole row for plain text), scaled by the means and
    deviations of the training rows. The probe is logistic regression; it is trained on T and one half of the retain
    rows, drawn at random, and scored on V and the other half, by its *balanced* accuracy: half of it comes from each
    set, whatever their sizes. The score is what it adds to *control labels*: the same probes trained on labels that
    are shuffled. Their accuracies lie around one half, and how far they stray is luck, so `control` is the mean of
    `max(accuracy, 1 - accuracy)` over them, and the score `max(0, (accuracy - control) / (1 - control))`.

    What it says: whether the forget set is still set apart inside the model, in a direction that holds for rows that
    it was not found on. That is what a classifier, or an edit of that direction, can use. What it does **not** say:
    that the answers are still there. The words of a question alone can set it apart, in a model that never saw the
    facts as well; compare with one (`recovered` is null where it scores as the original does). With few rows the
    probe is a weak reader, and a score of zero is no proof that nothing is there.

    Labels over answers instead of questions were measured on a model of 260 000 parameters, with 10 rows in T and in
    V, and say less. Probes of the states at an answer told a question's own answer from those of other rows no better
    than by chance, whether the model knew all of them or never saw any; false answers that TOFU brings they told from
    the true ones in both (balanced accuracy 0.87 and 0.63), and the share `recovered` from another model that never
    saw them lay between -0.6 and 0.5, by the split.

    The model is read, not changed: the utility is that of the model as it is.

    Args:
        attacked ([`~hf_unlearn.attacks.base.Attacked`]): the model.
        data ([`~hf_unlearn.attacks.base.AttackData`]): T and V, and at least two retain rows.
        settings (`dict[str, Any]`): `every`, the distance of the layers that are probed, counted from the last down;
            `penalty` of the probe, as in [`fit_probe`]; `controls`, the number of probes with control labels.
        seed (`int`): seed of the halves and of the control labels.

    Returns:
        `list[Trial]`: one for each `layer`, with `accuracy` and `control` in its settings; its `rows` are the
        probabilities of being a forget row that the probe gives to V.

    Raises:
        `ValueError`: fewer than two retain rows.

    Source: control tasks, [1909.03368](https://huggingface.co/papers/1909.03368).
    """
    sets = [_questions(dataset, attacked, data) for dataset in (data.train, data.held_out, data.retain)]
    num_train, num_held_out, num_retain = (len(rows) for rows in sets)
    if num_retain < 2:
        raise ValueError(f"The linear probe halves the retain rows, but there is {num_retain}: give it more.")
    utility = answer_probabilities(attacked, data.retain, data)
    with evaluation_mode(attacked.model):
        model = checked_model(attacked.model)
        layers = list(range(model.config.get_text_config().num_hidden_layers - 1, -1, -settings["every"]))[::-1]
        features = collect_features(model, sum(sets, []), layers, "mean", 0, data.batch_size).double()
    of_train, of_held_out, of_retain = features.split([num_train, num_held_out, num_retain], dim=1)

    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randperm(num_retain, generator=generator).tensor_split(2)
    training, asked = torch.cat([of_train, of_retain[:, first]], 1), torch.cat([of_held_out, of_retain[:, second]], 1)
    labels = torch.tensor([1.0] * num_train + [0.0] * len(first), dtype=torch.float64)
    truth = torch.tensor([1.0] * num_held_out + [0.0] * len(second), dtype=torch.float64)
    shuffles = [labels[torch.randperm(len(labels), generator=generator)] for _ in range(settings["controls"])]

    trials = []
    for layer, known, unknown in tqdm(list(zip(layers, training, asked, strict=True)), desc="Linear probe"):
        mean, std = known.mean(0), known.std(0).clamp(min=torch.finfo(torch.float64).tiny)
        known, unknown = (known - mean) / std, (unknown - mean) / std
        weight, bias = fit_probe(known, labels, settings["penalty"])
        logits = unknown @ weight + bias
        accuracy = balanced_accuracy(logits, truth)
        by_luck = []
        for shuffled in shuffles:
            weight, bias = fit_probe(known, shuffled, settings["penalty"])
            by_luck.append(balanced_accuracy(unknown @ weight + bias, truth))
        control = sum(max(value, 1 - value) for value in by_luck) / len(by_luck)
        # Above a control there is room for the accuracy, so nothing is divided by zero
        score = (accuracy - control) / (1 - control) if accuracy > control else 0.0
        trial_settings = {"layer": layer, "accuracy": accuracy, "control": control}
        rows = logits[:num_held_out].sigmoid().tolist()
        trials.append(Trial(trial_settings, score, sum(utility) / len(utility), rows))
    return trials


def _questions(dataset: Dataset, attacked: Attacked, data: AttackData) -> list[tuple[int, ...]]:
    """What the probe reads of each row: its question, or all of a row that has none."""
    return [row.prompt_ids or row.answer[0].input_ids for row in tokenized(dataset, attacked, data)]


def fit_probe(features: Tensor, labels: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    r"""
    Logistic regression in which both classes weigh the same, by L-BFGS in float64:

    $$\min_{w, b} \frac{1}{2} \sum_{c \in \{0, 1\}} \frac{1}{n_c} \sum_{i:\, y_i = c}
    \log\big(1 + e^{-(2 y_i - 1)(w \cdot x_i + b)}\big) + \frac{\lambda}{2} \lVert w \rVert^2$$

    Args:
        features (`torch.Tensor` of shape `(N, D)`): float64.
        labels (`torch.Tensor` of shape `(N,)`): 0 and 1, float64, both of them.
        penalty (`float`): \\(\lambda\\), above 0: it makes the minimum unique.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the weights, `(D,)`, and the intercept, a scalar, float64.

    Example: of two rows at -1 and 1, `sigmoid(-w) = penalty * w`.

    ```python
    >>> import torch
    >>> from hf_unlearn.attacks.linear_probe import fit_probe
    >>> features = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    >>> weight, bias = fit_probe(features, torch.tensor([0.0, 1.0], dtype=torch.float64), penalty=0.25)
    >>> torch.allclose(torch.sigmoid(-weight[0]), 0.25 * weight[0]), weight[1].item()
    (True, 0.0)

    ```
    """
    share = labels.mean()
    weights = labels / share + (1 - labels) / (1 - share)
    parameters = torch.zeros(features.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = features @ parameters[:-1] + parameters[-1]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, weight=weights / 2)
        loss = loss + penalty / 2 * parameters[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return parameters[:-1].detach(), parameters[-1].detach()


def balanced_accuracy(logits: Tensor, labels: Tensor) -> float:
    """
    The mean over both classes of the share that is told right; a logit of zero counts half.

    Args:
        logits (`torch.Tensor` of shape `(N,)`): above zero for class 1.
        labels (`torch.Tensor` of shape `(N,)`): 0 and 1, both of them.

    Example:

    ```python
    >>> import torch
    >>> from hf_unlearn.attacks.linear_probe import balanced_accuracy
    >>> balanced_accuracy(torch.tensor([2.0, -1.0, -3.0]), torch.tensor([1.0, 1.0, 0.0]))
    0.75

    ```
    """
    right = (1 + torch.sign(logits) * (2 * labels - 1)) / 2
    return (right[labels == 1].mean() + right[labels == 0].mean()).item() / 2
