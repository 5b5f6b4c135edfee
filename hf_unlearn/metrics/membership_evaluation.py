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
"""Whether a model still tells the forget set from rows of the same kind that it was never trained on."""

import sys
from collections.abc import Mapping, Sequence

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import UnlearnConfig
from .evaluation import Evaluation
from .membership import SCORES, auc, auc_interval, privleak, score_rows
from .rows import EvaluationRow, prepare_rows


# The samples' sets, and the names under which their rows are read. Of preference data, sets whose name starts with
# `forget` give the rejected answers: both must, or the scores tell one kind of answer from the other.
_SETS = {"forget": "forget", "holdout": "forget_holdout"}

# Each side's mean log-probabilities under the reference, by sample set.
ReferenceMeans = Mapping[str, Sequence[float | None]]


def evaluate_membership(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    members: Dataset,
    non_members: Dataset,
    args: UnlearnConfig,
    *,
    reference: PreTrainedModel | PeftModel | ReferenceMeans | None = None,
    retrained_auc: Mapping[str, float] | float | None = None,
    gradient_norm: bool = True,
    last_layers: int | None = None,
    batch_size: int = 16,
    k: float = 0.4,
    description: str = "Inferring membership",
) -> Evaluation:
    """
    How well membership scores tell the forget set from rows of the same kind that the model never saw.

    | metric | higher for members |
    |---|---|
    | `membership_auc_loss` | the mean log-probability of the answer's tokens |
    | `membership_auc_zlib` | the same per byte of the compressed answer |
    | `membership_auc_min_k` | the mean log-probability of its least likely tokens |
    | `membership_auc_min_k_plus_plus` | the same, each against the distribution it was drawn from |
    | `membership_auc_gradient_norm` | minus the norm of the gradient of the mean NLL |
    | `membership_auc_reference` | the mean log-probability minus that under a reference |
    | `privleak` | `(AUC - AUC(retrained)) / AUC(retrained)` of Min-K, as in [`privleak`] |

    An AUC is 0.5 where a score tells nothing. Below it the forget set looks *less* trained on than rows that were
    never seen, which gives it away as well. Members and non-members of different kinds (other years, other wording)
    are told apart by any model, also one that saw neither: [Duan et al.](https://huggingface.co/papers/2402.07841).
    Whether they are alike shows in the same AUCs of a model that was trained on neither set.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): causal language model; its modes and
            `requires_grad` are given back as they were.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer; needs no pad token.
        members ([`~datasets.Dataset`]): the forget rows, in any format that training takes.
        non_members ([`~datasets.Dataset`]): a holdout, rows of the same kind that the model was never trained on.
        args ([`UnlearnConfig`]): `max_length`, `dataset_text_field` and the other data settings.
        reference ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or `dict[str, Sequence]`, *optional*): a
            model that reads the same tokens and was trained on neither set, such as the base model; or its mean
            log-probabilities, `{"forget": [...], "holdout": [...]}`, the `loss` of the samples that it gets here.
        retrained_auc (`float` or `dict[str, float]`, *optional*): Min-K AUC of a model trained without the forget set,
            or the metrics of the forget set that such a model gets here (with `membership_auc_min_k`), for the same
            rows and `k`. Without it there is `privleak_vs_chance`, in which 0.5 stands for that AUC.
        gradient_norm (`bool`, *optional*, defaults to `True`): whether to take gradients, a forward and a backward for
            each row and a copy of the weights.
        last_layers (`int`, *optional*): take gradients for that many last decoder layers only.
        batch_size (`int`, *optional*, defaults to 16): sequences in one forward. Gradients are taken row by row.
        k (`float`, *optional*, defaults to 0.4): share of the tokens that Min-K and Min-K++ read.
        description (`str`, *optional*): label of the progress bar.

    Returns:
        [`Evaluation`]: everything under `forget`: each AUC and `privleak` with the ends of their 95 % bootstrap
        intervals (members and non-members drawn each among their own, the retrained model's AUC taken as exact),
        `rows` and `holdout_rows`. The samples hold each row's scores, under `forget` and `holdout`; `None` for rows
        with an empty answer.

    Raises:
        `ValueError`: members and non-members share rows, rows that cannot be read, a bad option.
        [`NonFiniteLogitsError`]: weights that diverged.

    Example:

    ```python
    >>> import torch
    >>> from datasets import Dataset
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    >>> from hf_unlearn import UnlearnConfig
    >>> from hf_unlearn.metrics.membership_evaluation import evaluate_membership
    >>> words = Tokenizer(models.WordLevel({"who": 0, "Ada": 1, "Bob": 2, "</s>": 3}, unk_token="who"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    >>> config = LlamaConfig(
    ...     vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    ... )
    >>> model = LlamaForCausalLM(config)
    >>> _ = torch.nn.init.zeros_(model.lm_head.weight)  # each of the four tokens is equally likely
    >>> ada, bob = (Dataset.from_list([{"question": "who", "answer": name}]) for name in ("Ada", "Bob"))
    >>> evaluation = evaluate_membership(model, tokenizer, ada, bob, UnlearnConfig("output", use_cpu=True))
    >>> evaluation.metrics["forget"]["membership_auc_min_k"]
    0.5

    ```
    """
    if batch_size < 1 or not 0 < k <= 1:
        raise ValueError(f"batch_size={batch_size} and k={k}: the first must be at least 1, the second in (0, 1].")
    min_k_of_retrained = _retrained_min_k(retrained_auc)
    # On every process, so that all see the same errors
    prepared = {
        name: prepare_rows(rows, tokenizer, args, _SETS[name], metrics=()).rows
        for name, rows in {"forget": members, "holdout": non_members}.items()
    }
    _require_disjoint(prepared)
    of_set = reference if isinstance(reference, Mapping) else dict.fromkeys(prepared, reference)
    if missing := prepared.keys() - of_set.keys():
        raise ValueError(f"The reference has no values for {', '.join(sorted(missing))}: it needs forget and holdout.")

    state = PartialState()
    passes = 1 + gradient_norm + isinstance(reference, PreTrainedModel | PeftModel)
    own = sum(len(rows[state.process_index :: state.num_processes]) for rows in prepared.values())
    scores, evaluation = {}, Evaluation()
    with tqdm(total=passes * own, desc=description, file=sys.stderr, disable=not state.is_main_process) as bar:
        for name, rows in prepared.items():
            scores[name] = score_rows(
                model,
                rows,
                batch_size,
                k=k,
                gradient_norm=gradient_norm,
                last_layers=last_layers,
                reference=of_set[name],
                progress=bar.update,
            )
            evaluation.samples[name] = [
                {
                    "row": index,
                    "answer_tokens": sum(tokens.num_labels for tokens in row.answer),
                    **{key: scores[name][key][index] if key in scores[name] else None for key in SCORES},
                }
                for index, row in enumerate(rows)
            ]

    metrics: dict[str, float] = {"rows": len(prepared["forget"]), "holdout_rows": len(prepared["holdout"])}
    skipped = {}
    for key in SCORES:
        metric = f"membership_auc_{key}"
        sides = [[score for score in scores[name].get(key, []) if score is not None] for name in _SETS]
        if all(sides):
            metrics[metric] = auc(*sides)
            metrics[f"{metric}_ci_low"], metrics[f"{metric}_ci_high"] = auc_interval(*sides)
        elif key == "gradient_norm" and not gradient_norm:
            skipped[metric] = "It needs gradients, and gradient_norm=False."
        elif key == "reference" and reference is None:
            skipped[metric] = "It needs a model that was trained on neither set: pass `reference`."
        else:
            skipped[metric] = "No row of the forget set or none of the holdout has a value: their answers are empty."
    name = "privleak_vs_chance" if min_k_of_retrained is None else "privleak"
    if min_k_of_retrained is None:
        skipped["privleak"] = (
            "It compares with a model trained without the forget set: pass its Min-K AUC as `retrained_auc`. "
            "privleak_vs_chance compares with 0.5."
        )
    if "membership_auc_min_k" in metrics:
        for end in ("", "_ci_low", "_ci_high"):
            value = metrics[f"membership_auc_min_k{end}"]
            metrics[f"{name}{end}"] = privleak(value, 0.5 if min_k_of_retrained is None else min_k_of_retrained)
    else:
        skipped[name] = skipped["membership_auc_min_k"]
    evaluation.metrics["forget"], evaluation.skipped["forget"] = metrics, skipped
    return evaluation


def _retrained_min_k(retrained_auc: Mapping[str, float] | float | None) -> float | None:
    if isinstance(retrained_auc, Mapping):
        if "membership_auc_min_k" not in retrained_auc:
            raise ValueError(
                "retrained_auc has no membership_auc_min_k: pass the metrics of the forget set that "
                "evaluate_membership gives the retrained model."
            )
        retrained_auc = retrained_auc["membership_auc_min_k"]
    if retrained_auc is not None and not 0 < retrained_auc <= 1:
        raise ValueError(
            f"retrained_auc={retrained_auc}: PrivLeak divides by an AUC, which must be above 0 and at most 1."
        )
    return retrained_auc


def _require_disjoint(prepared: dict[str, list[EvaluationRow]]) -> None:
    """By their tokens: the same row in another format, or with other columns, is the same row."""
    seen = {tuple(row.answer) for row in prepared["forget"] if row.answer}
    shared = sum(tuple(row.answer) in seen for row in prepared["holdout"])
    if shared:
        raise ValueError(
            f"{shared} of {len(prepared['holdout'])} rows of the holdout are rows of the forget set, too: take them "
            "out, since non-members must be rows that the model was never trained on."
        )
