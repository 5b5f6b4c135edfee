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
"""Running attacks: the attacker's best trial, the same on the original and on a control, and what came back."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_unlearn.cards.report import AttackResult, CurvePoint

from ..metrics.cache import ScoreCache, fingerprint_rows, fingerprint_tokenizer
from ..metrics.inference import NonFiniteLogitsError
from .base import Attack, AttackData, Attacked, Trial, trial_as_it_stands
from .not_applicable import NotApplicable


# Below it, what the attack gets out of the original is no more than out of the control: nothing could be recovered
SMALLEST_DENOMINATOR = 0.05

# A trial counts where the attacked model keeps this share of its utility before the attack
UTILITY_FLOOR = 0.8


@dataclass(frozen=True)
class AttackSpecification:
    """
    One line of the table of attacks.

    Attributes:
        function ([`~hf_unlearn.attacks.base.Attack`]): the attack.
        budgets (`dict[str, dict[str, Any]]`): its settings by budget: `small`, `standard`, `large`.
        summary (`str`): what it does, in one line.
        varies (`tuple[str, ...]`): the settings in which its trials differ.
        axis (`str`, *optional*): the one of them, a number, along which its curve runs.
        incomparable (`str`, *optional*): why no share can be computed from its scores, which are reported alone.
        needs_control (`bool`): whether it elicits arbitrary text from any model, so that without a control it says
            nothing.
    """

    function: Attack
    budgets: dict[str, dict[str, Any]]
    summary: str
    varies: tuple[str, ...] = ()
    axis: str | None = None
    incomparable: str | None = None
    needs_control: bool = False


class TrialCache:
    """
    The trials of attacks, kept by all that they depend on: an original that several unlearned models are compared with
    is attacked once, and a killed command goes on where it was.

    Args:
        data ([`~hf_unlearn.attacks.base.AttackData`]): the rows of all attacks.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the models' tokenizer.
        scores ([`~hf_unlearn.metrics.cache.ScoreCache`], *optional*): where they are kept; in memory where unset.
    """

    def __init__(self, data: AttackData, tokenizer: PreTrainedTokenizerBase, scores: ScoreCache | None = None):
        self.data = data
        self.scores = ScoreCache() if scores is None else scores
        self._key = {
            "train": fingerprint_rows(data.train),
            "held_out": fingerprint_rows(data.held_out),
            "retain": fingerprint_rows(data.retain),
            "tokens": fingerprint_tokenizer(tokenizer, data.args),
            "batch_size": data.batch_size,
        }

    def standing(self, attacked: Attacked) -> Trial:
        """The scores of a model as it stands."""
        [trial], _ = self._trials(attacked, {}, lambda: [trial_as_it_stands(attacked, self.data, {})])
        return trial

    def attack(
        self, name: str, function: Attack, settings: dict[str, Any], attacked: Attacked, seed: int
    ) -> tuple[list[Trial], float]:
        """
        The trials of an attack, and the seconds that they took when they were made.

        Raises:
            `ValueError`: what the attack raises; nothing is kept of it.
        """
        key = {"attack": name, "settings": settings, "seed": seed}
        return self._trials(attacked, key, lambda: function(attacked, self.data, settings, seed))

    def _trials(
        self, attacked: Attacked, key: dict[str, Any], compute: Callable[[], list[Trial]]
    ) -> tuple[list[Trial], float]:
        key = {
            **self._key,
            **key,
            "model": self.scores.fingerprint(attacked.model),
            "original": self.scores.fingerprint(attacked.original),
            "device": attacked.model.device.type,
        }

        def value() -> dict[str, Any]:
            start = time.perf_counter()
            trials = [asdict(trial) for trial in compute()]
            return {"trials": trials, "seconds": round(time.perf_counter() - start, 2)}

        kept = self.scores.get(key, value)
        return [Trial(**trial) for trial in kept["trials"]], kept["seconds"]


def best_trial(trials: list[Trial], utility_before: float, floor: float = UTILITY_FLOOR) -> Trial:
    """
    The trial with the highest score among those that keep enough utility; where none does, the one that keeps most.

    An attacker picks the best of what they tried, but a model that is broken on the way is no model.

    Example:

    ```python
    >>> from hf_unlearn.attacks.base import Trial
    >>> from hf_unlearn.attacks.run import best_trial
    >>> trials = [Trial({"rate": 1}, 0.3, 0.9), Trial({"rate": 2}, 0.9, 0.1), Trial({"rate": 3}, 0.5, 0.85)]
    >>> best_trial(trials, utility_before=1.0).settings
    {'rate': 3}

    ```
    """
    kept = [trial for trial in trials if trial.utility >= floor * utility_before]
    if not kept:
        return max(trials, key=lambda trial: trial.utility)
    return max(kept, key=lambda trial: trial.score)


def recovered(attacked: float, original: float, control: float) -> tuple[float | None, str | None]:
    r"""
    What an attack brought back beyond what it gets out of a control, as a share of what it gets out of the original.

    `(s_attacked - c_attacked) / (s_original_attacked - c_attacked)`: 0 for a model that never saw the facts, 1 for the
    original. It is not clipped.

    Args:
        attacked (`float`): the forget score of the unlearned model under the attack.
        original (`float`): that of the model before unlearning.
        control (`float`): that of the control.

    Returns:
        `tuple[float | None, str | None]`: the share, or `None` and the reason.

    Example:

    ```python
    >>> from hf_unlearn.attacks.run import recovered
    >>> recovered(0.5, 0.9, 0.1)
    (0.5, None)
    >>> recovered(0.5, 0.12, 0.1)
    (None, 'the attack gets 0.12 out of the original and 0.10 out of the control: nothing that could be recovered')

    ```
    """
    if original - control < SMALLEST_DENOMINATOR:
        return None, (
            f"the attack gets {original:.2f} out of the original and {control:.2f} out of the control: nothing that "
            "could be recovered"
        )
    return (attacked - control) / (original - control), None


def run_attack(
    name: str,
    specification: AttackSpecification,
    budget: str,
    unlearned: Attacked,
    control: Attacked | None,
    data: AttackData,
    seed: int,
    cache: TrialCache | None = None,
) -> tuple[AttackResult, dict[str, list[Trial]]]:
    """
    Runs an attack on the unlearned model, the original and the control.

    Without a control, the control is the unlearned model as it stands, unattacked, and the result says so. An attack
    that cannot run on the unlearned model gives an entry with the reason.

    Args:
        name (`str`): name of the attack.
        specification ([`AttackSpecification`]): its line of the table.
        budget (`str`): `small`, `standard` or `large`.
        unlearned ([`~hf_unlearn.attacks.base.Attacked`]): the unlearned model, and the original.
        control ([`~hf_unlearn.attacks.base.Attacked`], *optional*): a model that never saw the facts.
        data ([`~hf_unlearn.attacks.base.AttackData`]): the rows.
        seed (`int`): seed.
        cache ([`TrialCache`], *optional*): of the same rows; what it holds is not run again.

    Returns:
        `tuple[AttackResult, dict[str, list[Trial]]]`: the entry of the report, and all trials of `unlearned`,
        `original` and `control`, with values per row, which are private.
    """
    cache = TrialCache(data, unlearned.tokenizer) if cache is None else cache
    settings = specification.budgets[budget]
    before = cache.standing(unlearned)
    roles = {"unlearned": unlearned, "original": Attacked(unlearned.original, unlearned.tokenizer, unlearned.original)}
    if control is not None:
        roles["control"] = control
    trials, utilities, seconds = {}, {}, {}
    try:
        for role, attacked in roles.items():
            standing = cache.standing(attacked)
            utilities[role] = standing.utility
            try:
                trials[role], seconds[role] = cache.attack(name, specification.function, settings, attacked, seed)
            except NotApplicable:  # an adapter to remove, say, which only the unlearned model has
                if role == "unlearned":
                    raise
                trials[role] = [standing]
    # Not applicable, a missing package, rows of another kind, a model that diverged: the others go on
    except (ValueError, NonFiniteLogitsError) as reason:
        return _not_run(name, budget, seed, before, str(reason)), {}
    if control is None:
        trials["control"], utilities["control"] = [before], before.utility
    best = {role: best_trial(trials[role], utilities[role]) for role in trials}
    share, reason = recovered(best["unlearned"].score, best["original"].score, best["control"].score)
    if specification.incomparable is not None:
        share, reason = None, specification.incomparable
    return AttackResult(
        name=name,
        budget={"budget": budget, **_plain(best["unlearned"].settings)},
        recovered=share,
        control="unlearned model, unattacked" if control is None else "model that never saw the forget set",
        score_before=before.score,
        score_after=best["unlearned"].score,
        score_original_attacked=best["original"].score,
        score_control_attacked=best["control"].score,
        utility_after=best["unlearned"].utility,
        reason=reason,
        seed=seed,
        trials=len(trials["unlearned"]),
        tried=_tried(specification.varies, trials["unlearned"]),
        axis=specification.axis,
        curve=recovery_curve(specification.axis, trials, utilities) if specification.axis else [],
        seconds=seconds["unlearned"],
    ), trials


def recovery_curve(axis: str, trials: dict[str, list[Trial]], utilities: dict[str, float]) -> list[CurvePoint]:
    """
    The forget score of each model along one setting: at each of its values the best trial, chosen as
    [`best_trial`] does.

    Args:
        axis (`str`): name of the setting, a number; trials without it are not on the curve.
        trials (`dict[str, list[Trial]]`): of `unlearned`, `original` and `control`.
        utilities (`dict[str, float]`): utility of each before the attack.

    Returns:
        `list[CurvePoint]`: by increasing value; `None` where the original or the control has no such trial.

    Example:

    ```python
    >>> from hf_unlearn.attacks.base import Trial
    >>> from hf_unlearn.attacks.run import recovery_curve
    >>> trials = [Trial({"step": 5, "rate": rate}, score, 0.9) for rate, score in ((1, 0.3), (2, 0.4))]
    >>> recovery_curve("step", {"unlearned": trials, "original": trials, "control": [Trial({}, 0.1, 0.9)]},
    ...                {"unlearned": 1.0, "original": 1.0, "control": 1.0})
    [CurvePoint(at=5, unlearned=0.4, original=0.4, control=None)]

    ```
    """

    def score(role: str, at: float) -> float | None:
        there = [trial for trial in trials[role] if trial.settings.get(axis) == at]
        return best_trial(there, utilities[role]).score if there else None

    values = {trial.settings.get(axis) for trial in trials["unlearned"]}
    values = {value for value in values if isinstance(value, (int, float))}  # a layer may be "best"
    return [
        CurvePoint(at, *(score(role, at) for role in ("unlearned", "original", "control"))) for at in sorted(values)
    ]


def _tried(varies: tuple[str, ...], trials: list[Trial]) -> dict[str, list[float | int | str]]:
    """The values of each setting that was varied, in the order in which they were tried."""
    values = {name: [trial.settings.get(name) for trial in trials] for name in varies}
    return {
        name: list(dict.fromkeys(value for value in own if value is not None))
        for name, own in values.items()
        if any(value is not None for value in own)
    }


def _not_run(name: str, budget: str, seed: int, before: Trial, reason: str) -> AttackResult:
    return AttackResult(
        name=name,
        budget={"budget": budget},
        recovered=None,
        control="none",
        score_before=before.score,
        score_after=None,
        score_original_attacked=None,
        score_control_attacked=None,
        utility_after=None,
        reason=reason,
        seed=seed,
    )


def _plain(settings: dict[str, Any]) -> dict[str, float | int | str]:
    """Settings as a report takes them: lists as text."""
    return {
        name: value if isinstance(value, (int, float, str)) else str(value)
        for name, value in settings.items()
        if value is not None
    }
