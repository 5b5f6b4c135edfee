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
What `hf-unlearn evaluate` compares a model with: the retain-only and the reference model, whose scores are kept, so
that many checkpoints need them once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .evaluate_data import EvaluationData, say
from .evaluate_output import Result
from .reports import check_same_tokens


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_unlearn import UnlearnConfig
    from hf_unlearn.metrics.cache import ScoreCache

    from .evaluate_arguments import EvaluateArguments


# Role -> what needs its tokens to be those of MODEL
_PURPOSES = {
    "retain-only model": "forget quality compares the probabilities of",
    "reference model": "membership compares the probabilities of",
    "judge model": "a judge reads",
}
_FORGET_QUALITY = ("forget_quality", "forget_quality_statistic")


@dataclass
class Inputs:
    """What all measurements of a run share. The tokens of all models are the same, and so are then the prompts."""

    data: EvaluationData
    tokenizer: "PreTrainedTokenizerBase"
    config: "UnlearnConfig"
    args: "EvaluateArguments"
    cache: "ScoreCache"


def check_tokenizers(tokenizer: "PreTrainedTokenizerBase", args: "EvaluateArguments") -> None:
    """
    Reads the tokenizers of the second models, before any of them is loaded.

    Raises:
        `UsageError`: one is missing, or has other tokens than MODEL.
    """
    from .inputs import read_tokenizer

    for role, purpose in _PURPOSES.items():
        name = getattr(args, role.replace("-", "_").replace(" ", "_"))
        if name is not None:
            check_same_tokens(tokenizer, read_tokenizer(name, None, role), role, purpose)


def reference_means(inputs: Inputs) -> dict[str, list[float | None]] | None:
    """The mean log-probability of each row of the forget set and the holdout under the reference model."""
    from hf_unlearn.metrics import membership_scores

    from .inputs import read_model

    if inputs.args.reference_model is None:
        return None
    model = read_model(inputs.args.reference_model, None, inputs.config)
    rows = {"forget": inputs.data.members, "holdout": inputs.data.holdout}

    def compute() -> dict[str, list[float | None]]:
        # Under the names that MODEL's scores have: of preference data, a name says which answers are read
        names = {"forget": "forget", "holdout": "forget_holdout"}
        return {
            name: membership_scores(
                model,
                inputs.tokenizer,
                some,
                inputs.config,
                name=names[name],
                batch_size=inputs.args.batch_size,
            )["loss"]
            for name, some in rows.items()
        }

    return _kept("mean log-probabilities", model, rows, inputs, compute, "reference model")


def add_retain_only(result: Result, inputs: Inputs) -> None:
    """Compares with the retain-only model: truth ratios by forget quality, Min-K by PrivLeak."""
    from .inputs import read_model

    ratios, holdout = "truth_ratio" in result.metrics["forget"], inputs.data.holdout
    if not ratios:
        result.skipped["forget"]["forget_quality"] = (
            "It compares the truth ratios of the forget set, which are missing"
            f"{'; the retain-only model was not run' if holdout is None else ''}."
        )
    if not ratios and holdout is None:
        return
    model = read_model(inputs.args.retain_only_model, None, inputs.config)
    if ratios:
        _add_forget_quality(result, model, inputs)
    if holdout is not None:
        _add_privleak(result, model, inputs)


def _add_forget_quality(result: Result, model: "PreTrainedModel", inputs: Inputs) -> None:
    from hf_unlearn.metrics import evaluate_model, forget_quality

    rows = {"forget": inputs.data.sets["forget"]}

    def compute() -> list[dict[str, Any]]:
        evaluation = evaluate_model(
            model,
            inputs.tokenizer,
            rows,
            inputs.config,
            batch_size=inputs.args.batch_size,
            metrics=["truth_ratio"],
            generate=False,
            description="Evaluating the retain-only model",
        )
        return [
            {key: sample[key] for key in ("row", "answer_tokens", "truth_ratio")}
            for sample in evaluation.samples["forget"]
        ]

    other = _kept("truth ratios", model, rows, inputs, compute, "retain-only model")
    result.samples["retain_only"] = other
    values = forget_quality(
        *([row["truth_ratio"] for row in samples] for samples in (result.samples["forget"], other))
    )
    result.metrics["forget"] |= dict(zip(_FORGET_QUALITY, values, strict=True))


def _add_privleak(result: Result, model: "PreTrainedModel", inputs: Inputs) -> None:
    """In the place of PrivLeak against chance."""
    from hf_unlearn.metrics import evaluate_membership, privleak

    forget = result.metrics["forget"]
    if "membership_auc_min_k" not in forget:
        result.skipped["forget"]["privleak"] = result.skipped["forget"]["membership_auc_min_k"]
        return
    rows = {"forget": inputs.data.members, "holdout": inputs.data.holdout}

    def compute() -> float:
        evaluation = evaluate_membership(
            model,
            inputs.tokenizer,
            rows["forget"],
            rows["holdout"],
            inputs.config,
            gradient_norm=False,
            batch_size=inputs.args.batch_size,
            description="Inferring membership from the retain-only model",
        )
        return evaluation.metrics["forget"]["membership_auc_min_k"]

    retrained = _kept("Min-K AUC", model, rows, inputs, compute, "retain-only model")
    try:
        values = {f"privleak{end}": privleak(forget[f"membership_auc_min_k{end}"], retrained) for end in _ENDS}
    except ValueError as error:  # an AUC of 0, by which nothing can be divided
        result.skipped["forget"]["privleak"] = str(error)
        return
    for end in _ENDS:
        del forget[f"privleak_vs_chance{end}"]
    result.metrics["forget"] |= values
    del result.skipped["forget"]["privleak"]


_ENDS = ("", "_ci_low", "_ci_high")


def _kept(
    measure: str,
    model: "PreTrainedModel",
    rows: "dict[str, Dataset]",
    inputs: Inputs,
    compute: Callable[[], Any],
    role: str,
) -> Any:
    """What `compute` gives, from the cache where it is there."""
    from accelerate import PartialState

    from hf_unlearn.metrics.cache import fingerprint_model, fingerprint_rows, fingerprint_tokenizer

    computed = False

    def compute_and_tell() -> Any:
        nonlocal computed
        computed = True
        return compute()

    key = {
        "measure": f"evaluate: {measure}",
        # Not by the cache's own method, which would keep the model
        "model": fingerprint_model(model),
        "rows": {name: fingerprint_rows(some) for name, some in rows.items()},
        "tokens": fingerprint_tokenizer(inputs.tokenizer, inputs.config),
        # They change last digits alone, but what is found is to be what would be computed
        "batch_size": inputs.args.batch_size,
        "device": model.device.type,
        "processes": PartialState().num_processes,
    }
    value = inputs.cache.get(key, compute_and_tell)
    if not computed:
        say(f"The {role} was not run ({measure}: kept from an earlier run).")
    return value
