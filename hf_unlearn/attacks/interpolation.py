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
"""Interpolation towards the original: how far back one has to go before what was forgotten is there again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from .base import AttackData, Attacked, Trial, trial_as_it_stands
from .matrices import changed, require_merged


# 1 is the original itself: it would be the best trial of any unlearned model, and say nothing of it
BUDGETS = {
    "small": {"shares": [0.25, 0.5, 0.75]},
    "standard": {"shares": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]},
    "large": {"shares": [index / 40 for index in range(1, 40)]},
}


def interpolation(attacked: Attacked, data: AttackData, settings: dict[str, Any], seed: int) -> list[Trial]:
    r"""
    Moves all weights towards those of the original and asks as always.

    `W_u + a (W_0 - W_u)`, computed in fp32, for every parameter, embeddings and norms too: `a = 0` is the model as it
    stands and `a = 1` the original, bit for bit. Who has the original needs no attack: read the curve over `a`, which
    says how far apart in weights the two are in behaviour. The budgets end before 1.

    The curve does **not** say that the facts are still in the model: the original brings them along. Of two models of
    260 000 parameters, one that never saw the facts gave them a probability of 0.57 at `a = 0.5` and of 0.97 at
    `a = 0.75`; one that hid them behind an adapter, merged, of 0.29 and 0.86. The best trial is therefore that of the
    largest `a`, where a control scores as the original does and `recovered` is null; where the unlearned model
    unattacked stands in for a control, `recovered` comes near 1 for any model at all.

    Where the model *is* the original (or its own), all points of the way are one, and it is asked once.

    Args:
        attacked ([`~hf_unlearn.attacks.base.Attacked`]): the model, adapters merged, and the original.
        data ([`~hf_unlearn.attacks.base.AttackData`]): the rows.
        settings (`dict[str, Any]`): `shares`, the values of `a`, 0 to 1.
        seed (`int`): not used, nothing is drawn.

    Returns:
        `list[Trial]`: one for each `a`.

    Raises:
        `ValueError`: a share outside 0 to 1, a model with adapters, or models whose parameters differ in name or
            shape.
    """
    shares = settings["shares"]
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"Shares of the way to the original are {shares}: use values from 0 to 1.")
    require_merged(attacked.model)
    if attacked.model is attacked.original:
        trial = trial_as_it_stands(attacked, data, {})
        return [Trial({"a": share}, trial.score, trial.utility, list(trial.rows)) for share in shares]
    require_merged(attacked.original)
    pairs = matched_parameters(attacked.model, attacked.original)
    trials = []
    for share in tqdm(shares, desc="Interpolation"):
        with changed([(parameter, towards(target, share)) for parameter, target in pairs]):
            trials.append(trial_as_it_stands(attacked, data, {"a": share}))
    return trials


def towards(target: Tensor, share: float) -> Callable[[Tensor], Tensor]:
    """
    The function that moves values by a share of the way to `target`; at 0 and 1 it is exact.

    Example:

    ```python
    >>> import torch
    >>> from hf_unlearn.attacks.interpolation import towards
    >>> towards(torch.tensor([4.0]), 0.25)(torch.tensor([0.0]))
    tensor([1.])

    ```
    """
    return lambda values: torch.lerp(values, target.detach().to(values), share)


def matched_parameters(model: PreTrainedModel, original: PreTrainedModel) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """
    The parameters of a model, each once, and those of the same name in the original.

    An LM head that is tied in the original alone is compared with the embeddings it is tied to.

    Raises:
        `ValueError`: other names or shapes, or weights that only the model ties.
    """
    originals = dict(original.named_parameters(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    differing = sorted(
        name
        for name in originals.keys() | parameters.keys()
        if name not in originals or name not in parameters or originals[name].shape != parameters[name].shape
    )
    if differing:
        raise ValueError(
            f"{differing[0]}, one of {len(differing)} parameters, is not of the same shape in the model and in the "
            "original: pass the checkpoint from which this model was unlearned, with the same vocabulary size and "
            "without adapters."
        )
    pairs: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in parameters.items():
        if pairs.setdefault(parameter, originals[name]) is not originals[name]:
            raise ValueError(
                f"{name} is tied to another weight in the model but not in the original: load both with the same "
                "tie_word_embeddings."
            )
    return list(pairs.items())
