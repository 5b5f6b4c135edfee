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
Whether a row was trained on: membership scores, and how well they tell members from others.

All scores are higher for rows that look trained on. A row without tokens has none: `None`, never NaN.
"""

import zlib
from collections.abc import Callable, Sequence

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from scipy.stats import rankdata
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import UnlearnConfig
from ..forward import evaluation_mode
from ..reference import inner_model
from .gradient_norm import gradient_norm_scores
from .inference import TokenScores, checked_model, score_answers
from .rows import EvaluationRow, prepare_rows


# In the order of tables. The last two are measured where they are asked for.
SCORES = ("loss", "zlib", "min_k", "min_k_plus_plus", "gradient_norm", "reference")

# Levels counted at one time (128 MiB of int64).
_DRAWS_BUDGET = 2**24

# Standard deviations below this are rounding of a distribution that is all on one token.
_SMALLEST_STD = 1e-6


def loss_score(log_probs: Tensor) -> float | None:
    """
    Minus the loss: the mean log-probability of the tokens, in nats.

    As in [Yeom et al.](https://arxiv.org/abs/1709.01604).

    Args:
        log_probs (`torch.Tensor` of shape `(n,)`): log-probabilities of the tokens.

    Returns:
        `float` or `None`: `None` where there is no token.

    Example:

    ```python
    >>> import torch
    >>> from hf_unlearn.metrics.membership import loss_score
    >>> loss_score(torch.tensor([-1.0, -2.0]))
    -1.5

    ```
    """
    return None if log_probs.numel() == 0 else log_probs.double().mean().item()


def zlib_score(log_probs: Tensor, text: str) -> float | None:
    """
    Minus the loss per byte of the compressed text: what is easy to compress is likely without having been trained on.

    As in [Carlini et al.](https://huggingface.co/papers/2012.07805).

    Args:
        log_probs (`torch.Tensor` of shape `(n,)`): log-probabilities of the tokens, in nats.
        text (`str`): what the tokens say; compressed by zlib as UTF-8.

    Returns:
        `float` or `None`: `None` where there is no token.

    Example:

    ```python
    >>> import torch
    >>> from hf_unlearn.metrics.membership import zlib_score
    >>> zlib_score(torch.tensor([-1.0, -2.0]), "a" * 1000) < zlib_score(torch.tensor([-1.0, -2.0]), "Hsiao Yun-Hwa")
    True

    ```
    """
    if log_probs.numel() == 0:
        return None
    return log_probs.double().mean().item() / len(zlib.compress(text.encode("utf-8")))


def min_k_score(log_probs: Tensor, k: float = 0.4) -> float | None:
    """
    Min-K %: the mean log-probability of the least likely tokens.

    As in [Shi et al.](https://huggingface.co/papers/2310.16789).

    Args:
        log_probs (`torch.Tensor` of shape `(n,)`): log-probabilities of the tokens, in nats.
        k (`float`, *optional*, defaults to 0.4): share of the tokens, rounded down, at least one.

    Returns:
        `float` or `None`: `None` where there is no token.

    Example:

    ```python
    >>> import torch
    >>> from hf_unlearn.metrics.membership import min_k_score
    >>> min_k_score(torch.tensor([-1.0, -4.0, -0.5, -2.0, -0.25]))  # two of five
    -3.0

    ```
    """
    if log_probs.numel() == 0:
        return None
    # 0.3 * 10 is 2.999...: the share is rounded before it is cut
    count = max(1, int(round(log_probs.numel() * k, 9)))
    return log_probs.double().topk(count, largest=False).values.mean().item()


def min_k_plus_plus_score(log_probs: Tensor, means: Tensor, stds: Tensor, k: float = 0.4) -> float | None:
    """
    Min-K++ %: Min-K % of `(log p - μ) / σ`, μ and σ taken under the model's own distribution of the next token.

    As in [Zhang et al.](https://huggingface.co/papers/2404.02936).

    Args:
        log_probs (`torch.Tensor` of shape `(n,)`): log-probabilities of the tokens, in nats.
        means (`torch.Tensor` of shape `(n,)`): `Σ_v p_v log p_v` at each position.
        stds (`torch.Tensor` of shape `(n,)`): the square root of `Σ_v p_v (log p_v - μ)²`; taken as 1e-6 where it is
            smaller, since a distribution on one token has none.
        k (`float`, *optional*, defaults to 0.4): share of the tokens, rounded down, at least one.

    Returns:
        `float` or `None`: `None` where there is no token.

    Example:

    ```python
    >>> import torch
    >>> from hf_unlearn.metrics.membership import min_k_plus_plus_score
    >>> min_k_plus_plus_score(torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0]), torch.tensor([1.0, 0.5]))
    -2.0

    ```
    """
    return min_k_score((log_probs.double() - means.double()) / stds.double().clamp(min=_SMALLEST_STD), k)


def reference_score(log_probs: Tensor, reference_mean: float | None) -> float | None:
    """
    How much likelier the tokens are than under a reference: the mean log-probability minus that of the reference.

    The calibration by difficulty of [Watson et al.](https://huggingface.co/papers/2111.08440), and the comparison with
    another model of [Carlini et al.](https://huggingface.co/papers/2012.07805): what any model finds easy says little.

    Args:
        log_probs (`torch.Tensor` of shape `(n,)`): log-probabilities of the tokens, in nats.
        reference_mean (`float` or `None`): their mean log-probability under the reference, in nats.

    Returns:
        `float` or `None`: `None` where there is no token, or the reference has none.

    Example:

    ```python
    >>> import torch
    >>> from hf_unlearn.metrics.membership import reference_score
    >>> reference_score(torch.tensor([-1.0, -2.0]), -4.0)
    2.5

    ```
    """
    if log_probs.numel() == 0 or reference_mean is None:
        return None
    return log_probs.double().mean().item() - reference_mean


def membership_scores(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    args: UnlearnConfig,
    *,
    name: str,
    batch_size: int = 16,
    k: float = 0.4,
    gradient_norm: bool = False,
    last_layers: int | None = None,
    reference: PreTrainedModel | PeftModel | Sequence[float | None] | None = None,
) -> dict[str, list[float | None]]:
    """
    Membership scores of the answers (of plain text: of the whole row), after their prompts.

    Each row's scores are its own: they depend on no other row of its batch. Rows are dealt over the processes, and
    each ends with all scores.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        dataset ([`~datasets.Dataset`]): rows in any format that training takes.
        args ([`UnlearnConfig`]): `max_length`, `dataset_text_field` and the other data settings.
        name (`str`): name of the set, for messages; `forget...` takes `rejected` answers of preference data.
        batch_size (`int`, *optional*, defaults to 16): sequences in one forward. Gradients are taken row by row.
        k (`float`, *optional*, defaults to 0.4): share of the tokens that Min-K and Min-K++ read.
        gradient_norm (`bool`, *optional*, defaults to `False`): whether to measure [`gradient_norm_scores`], a forward
            and a backward for each row.
        last_layers (`int`, *optional*): take the gradient for that many last decoder layers only; by default for all
            weights, a copy of which it is.
        reference ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or `Sequence[float | None]`, *optional*): a
            model that reads the same tokens, or what `loss` was under it: one mean log-probability per row in order.

    Returns:
        `dict[str, list[float | None]]`: `loss`, `zlib`, `min_k` and `min_k_plus_plus`, and where they are asked for
        `gradient_norm` and `reference`, each with one value per row in order; `None` for rows with an empty answer.

    Raises:
        `ValueError`: rows that cannot be read, a reference of another length, or a model whose logits are unknown or
            not finite.
    """
    rows = prepare_rows(dataset, tokenizer, args, name, metrics=()).rows
    return score_rows(
        model, rows, batch_size, k=k, gradient_norm=gradient_norm, last_layers=last_layers, reference=reference
    )


def score_rows(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[EvaluationRow],
    batch_size: int,
    *,
    k: float,
    gradient_norm: bool,
    last_layers: int | None,
    reference: PreTrainedModel | PeftModel | Sequence[float | None] | None,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, list[float | None]]:
    """
    [`membership_scores`] of rows that are tokenized. `progress` is told how many of this process's rows are done, once
    for each of the model, its gradients and a reference model.
    """
    if not isinstance(reference, PreTrainedModel | PeftModel | None) and len(reference) != len(rows):
        raise ValueError(
            f"The reference has {len(reference)} values for {len(rows)} rows: pass one mean log-probability per row, "
            "None for rows with an empty answer."
        )
    state = PartialState()
    own = list(range(state.process_index, len(rows), state.num_processes))
    answers = [rows[index].answer for index in own]

    def token_scores(scored: PreTrainedModel | PeftModel, moments: bool) -> list[TokenScores]:
        with evaluation_mode(scored):
            return score_answers(checked_model(scored), answers, batch_size, moments=moments, progress=progress)

    scores = token_scores(model, moments=True)
    values = [
        {
            "row": index,
            "loss": loss_score(score.log_probs),
            "zlib": zlib_score(score.log_probs, rows[index].text),
            "min_k": min_k_score(score.log_probs, k),
            "min_k_plus_plus": min_k_plus_plus_score(score.log_probs, score.means, score.stds, k),
        }
        for index, score in zip(own, scores, strict=True)
    ]
    if gradient_norm:
        with evaluation_mode(model):
            norms = gradient_norm_scores(inner_model(model), answers, last_layers=last_layers, progress=progress)
        for value, norm in zip(values, norms, strict=True):
            value["gradient_norm"] = norm
    if reference is not None:
        if isinstance(reference, PreTrainedModel | PeftModel):
            means = [loss_score(score.log_probs) for score in token_scores(reference, moments=False)]
        else:
            means = [reference[index] for index in own]
        for value, score, mean in zip(values, scores, means, strict=True):
            value["reference"] = reference_score(score.log_probs, mean)
    gathered = sorted(gather_object(values), key=lambda value: value["row"])
    measured = [
        key for key in SCORES if gradient_norm or key != "gradient_norm" if reference is not None or key != "reference"
    ]
    return {key: [value[key] for value in gathered] for key in measured}


def auc(members: Sequence[float | None], non_members: Sequence[float | None]) -> float:
    """
    Area under the ROC curve: the chance that a member scores above a non-member, ties counting half.

    From ranks (Mann-Whitney), in float64 and O(n log n).

    Args:
        members (`Sequence[float | None]`): scores of rows that were trained on; `None` is left out.
        non_members (`Sequence[float | None]`): scores of rows that were not.

    Returns:
        `float`: in [0, 1]; 0.5 where the score tells nothing.

    Raises:
        `ValueError`: one side has no score.

    Example:

    ```python
    >>> from hf_unlearn.metrics.membership import auc
    >>> auc([3.0, 2.0, None], [1.0, 2.0])  # three pairs won, one tied
    0.875

    ```
    """
    members, non_members = _sorted_scores(members), _sorted_scores(non_members)
    ranks = rankdata(np.concatenate([members, non_members]))
    wins = ranks[: members.size].sum() - members.size * (members.size + 1) / 2
    return float(wins / (members.size * non_members.size))


def _sorted_scores(scores: Sequence[float | None]) -> np.ndarray:
    present = [score for score in scores if score is not None]
    if not present:
        raise ValueError("The AUC compares members with non-members, and one side has no score: add rows to it.")
    return np.sort(np.asarray(present, dtype=np.float64))


def auc_interval(
    members: Sequence[float | None],
    non_members: Sequence[float | None],
    seed: int = 0,
    samples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """
    Percentile bootstrap interval of [`auc`]: members and non-members are drawn with replacement, each among their own.

    As in [Efron](https://doi.org/10.1214/aos/1176344552), in float64. The same scores and seed give the same interval,
    in whatever order the rows are. Where the AUC is 0 or 1 it has no width, however few the rows.

    Args:
        members (`Sequence[float | None]`): scores of rows that were trained on; `None` is left out.
        non_members (`Sequence[float | None]`): scores of rows that were not.
        seed (`int`, *optional*, defaults to 0): seed of the draws.
        samples (`int`, *optional*, defaults to 1000): number of AUCs.
        level (`float`, *optional*, defaults to 0.95): share of the AUCs inside the interval.

    Returns:
        `tuple[float, float]`: its lower and upper end.

    Raises:
        `ValueError`: one side has no score.

    Example:

    ```python
    >>> from hf_unlearn.metrics.membership import auc_interval
    >>> auc_interval([3.0, 2.0], [1.0, 0.0])
    (1.0, 1.0)

    ```
    """
    members, non_members = _sorted_scores(members), _sorted_scores(non_members)
    levels, level_of = np.unique(np.concatenate([members, non_members]), return_inverse=True)
    # One generator each, so that the pieces they are drawn in do not matter
    generators = [np.random.default_rng([seed, side]) for side in range(2)]
    sides = list(zip(np.split(level_of, [members.size]), generators, strict=True))
    aucs = []
    at_a_time = max(1, _DRAWS_BUDGET // level_of.size)
    for start in range(0, samples, at_a_time):
        draws = min(at_a_time, samples - start)
        offsets = np.arange(draws)[:, None] * levels.size
        counts = []
        for side, generator in sides:
            drawn = side[generator.integers(side.size, size=(draws, side.size))] + offsets
            counts.append(np.bincount(drawn.ravel(), minlength=draws * levels.size).reshape(draws, levels.size))
        of_members, of_others = counts
        # Twice the wins: integers, hence exact
        wins = (of_members * (2 * of_others.cumsum(1) - of_others)).sum(1)
        aucs.append(wins / (2 * members.size * non_members.size))
    low, high = np.quantile(np.concatenate(aucs), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def privleak(auc_unlearned: float, auc_retrained: float = 0.5) -> float:
    """
    PrivLeak, `(AUC(unlearned) - AUC(retrained)) / AUC(retrained)`.

    As in [MUSE](https://huggingface.co/papers/2407.06460), with Min-K % scores of the forget set against a holdout.
    With scores that are higher for members, it is above 0 where the forget set still looks trained on, and below 0
    where it looks less trained on than rows that the model never saw (which gives it away, too).

    Args:
        auc_unlearned (`float`): AUC of the unlearned model.
        auc_retrained (`float`, *optional*, defaults to 0.5): AUC of a model trained without the forget set. Without
            one, 0.5 stands for a model to which both sets are alike; say so where the number is reported.

    Returns:
        `float`: 0 where both models leak alike.

    Raises:
        `ValueError`: the retrained model's AUC is 0, which leaves no ratio.

    Example:

    ```python
    >>> from hf_unlearn.metrics.membership import privleak
    >>> privleak(0.75)
    0.5

    ```
    """
    if auc_retrained == 0:
        raise ValueError(
            "PrivLeak divides by the AUC of the retrained model, which is 0: report the two AUCs instead."
        )
    return (auc_unlearned - auc_retrained) / auc_retrained
