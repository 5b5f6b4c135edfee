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
Whether a model still writes a language: perplexity, repetition, and how sure it is of how to begin.

A low forget score is no forgetting where the model writes gibberish. A model whose loss was ascended too far often
repeats one token, which `repetition` tells; one whose weights were damaged writes random tokens, which repeat nothing,
and `generation_perplexity` tells them. A judge alone is not enough: a model may find a phrase the likelier the more
often it was repeated ([Holtzman et al.](https://huggingface.co/papers/1904.09751)).
"""

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import UnlearnConfig
from ..data import IGNORE_INDEX
from ..forward import evaluation_mode
from . import answers
from .evaluation import Evaluation, _deal
from .inference import GeneratedTokens, checked_model, generate_tokens, score_answers
from .rows import EvaluationRow, EvaluationRows, Tokens, prepare_rows
from .statistics import bootstrap_interval


__all__ = [
    "FLUENCY_METRICS",
    "corpus_perplexity",
    "evaluate_fluency",
    "first_token_entropy",
    "perplexity",
    "repetition",
]

logger = get_logger(__name__)

FLUENCY_METRICS = ("perplexity", "repetition", "first_token_entropy", "generation_perplexity")

# The number of tokens that each of them is a mean over
_TOKENS = {"perplexity": "answer_tokens", "generation_perplexity": "generation_tokens"}

# A perplexity is kept below e^700, which is finite in float64.
_LARGEST_NLL = 700.0


def perplexity(log_probs: Tensor) -> float | None:
    """
    Perplexity of one answer, `exp(-(1/n) Σ log p_t)`.

    Args:
        log_probs (`torch.Tensor` of shape `(n,)`): log-probabilities of the answer's tokens, in nats.

    Returns:
        `float` or `None`: at least 1, cut to at most e^700; `None` where there is no token.

    Example:

    ```python
    >>> import torch
    >>> from hf_unlearn.metrics.fluency import perplexity
    >>> round(perplexity(torch.tensor([0.5, 0.125]).log()), 6)
    4.0

    ```
    """
    nll = answers.mean_nll(log_probs)
    return None if nll is None else math.exp(min(nll, _LARGEST_NLL))


def corpus_perplexity(perplexities: Sequence[float | None], lengths: Sequence[int]) -> float | None:
    """
    Perplexity of several answers together, `exp(Σ nll / Σ n)`: each token counts the same, whatever answer it is in.

    The mean of the answers' own perplexities would be that of its worst few.

    Args:
        perplexities (`Sequence[float | None]`): perplexity of each answer; `None` is left out.
        lengths (`Sequence[int]`): its number of tokens.

    Returns:
        `float` or `None`: `None` where no answer has a token.

    Example:

    ```python
    >>> from hf_unlearn.metrics.fluency import corpus_perplexity
    >>> round(corpus_perplexity([4.0, 16.0, None], [3, 1, 0]), 6)  # 2^((3 · 2 + 1 · 4) / 4)
    5.656854

    ```
    """
    nlls, tokens = _totals(perplexities, lengths)
    return math.exp(math.fsum(nlls) / tokens.sum()) if tokens.size else None


def repetition(token_ids: Sequence[int], n: int = 4) -> float | None:
    """
    Share of the n-grams of an answer that occurred in it before, `1 - distinct / total`.

    The rep-n of [Welleck et al.](https://huggingface.co/papers/1908.04319), over token ids, so that it needs no words
    of a language.

    Args:
        token_ids (`Sequence[int]`): the tokens that the model wrote, without EOS.
        n (`int`, *optional*, defaults to 4): length of an n-gram.

    Returns:
        `float` or `None`: in [0, 1), near 1 for a token that goes on and on; `None` below n tokens.

    Raises:
        `ValueError`: n is below 1.

    Example:

    ```python
    >>> from hf_unlearn.metrics.fluency import repetition
    >>> repetition([5, 6, 5, 6, 5], n=2)  # (5, 6), (6, 5), and both again
    0.5

    ```
    """
    if n < 1:
        raise ValueError(f"n={n}: an n-gram has at least 1 token.")
    total = len(token_ids) - n + 1
    if total < 1:
        return None
    return 1 - len({tuple(token_ids[start : start + n]) for start in range(total)}) / total


def first_token_entropy(means: Tensor) -> float | None:
    """
    Entropy of the distribution of the first answer token, `-Σ_v p_v log p_v`, in nats.

    0 where the model is sure how to begin, the logarithm of the vocabulary's size where it has no idea.

    Args:
        means (`torch.Tensor` of shape `(n,)`): `Σ_v p_v log p_v` at each position of the answer, given what is before
            it ([`~hf_unlearn.metrics.inference.TokenScores`]); the first is read.

    Returns:
        `float` or `None`: `None` where there is no token.

    Example:

    ```python
    >>> import torch
    >>> from hf_unlearn.metrics.fluency import first_token_entropy
    >>> log_probs = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]).log()  # of two positions
    >>> round(first_token_entropy((log_probs.exp() * log_probs).sum(-1)), 6)  # 1.5 bits
    1.039721

    ```
    """
    return None if means.numel() == 0 else max(0.0, -means[0].item())


def evaluate_fluency(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: dict[str, Dataset],
    args: UnlearnConfig,
    *,
    judge: PreTrainedModel | PeftModel | None = None,
    generated: Mapping[str, Mapping[int, GeneratedTokens]] | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    description: str = "Measuring fluency",
) -> Evaluation:
    """
    Measures how fluent a model is on several sets, and with a judge whether what it writes is gibberish.

    | metric | value of a row |
    |---|---|
    | `perplexity` | `exp(-(1/n) Σ log p_t)` of the true answer, n tokens |
    | `repetition` | share of the 4-grams (token ids) of the model's greedy answer that occurred in it before |
    | `first_token_entropy` | of the distribution of the first answer token given the prompt, in nats |
    | `generation_perplexity` | the judge's perplexity of the model's greedy answer, after the same prompt |

    A metric is the mean over rows; a perplexity is that of all tokens of the set together, `exp(Σ nll / Σ n)`, and its
    interval draws rows. Both perplexities count the EOS token that ends an answer: to end at once is what the judge
    may find unlikely, too. The repetition does not.

    What is usual depends on the model and the rows: compare with the model before unlearning. What a judge was not
    trained to say is unlikely to it, fluent or not, so that gibberish is far above answers of another style, and these
    above its own.

    Answers are tokenized as in training. Rows without a prompt (plain text) have a perplexity alone. The order of
    rows, the batch size, the padding side and the number of processes change nothing but the last digits. Rows are
    dealt over the processes, and each ends with the complete result.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): causal language model; its modes are given
            back as they were.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer; needs no pad token.
        sets (`dict[str, Dataset]`): name -> rows in any format that training takes, such as `forget` and `retain`.
        args ([`UnlearnConfig`]): `max_length`, `dataset_text_field` and the other data settings.
        judge ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*): a model that reads the same
            tokens, usually the one before unlearning. Without it there is no `generation_perplexity`.
        generated (`dict[str, dict[int, GeneratedTokens]]`, *optional*): answers that this model has given to the same
            rows, the `generated` of [`evaluate_model`]: nothing is generated then, and they are as long as they were
            allowed to be there.
        batch_size (`int`, *optional*, defaults to 16): sequences in one forward.
        max_new_tokens (`int`, *optional*, defaults to 64): the longest answer generated here.
        description (`str`, *optional*): label of the progress bar.

    Returns:
        [`Evaluation`]: its samples hold `row`, `answer_tokens`, each metric's value, `generation` (the text) and
        `generation_tokens` (with EOS); `None` where there is none.

    Raises:
        `ValueError`: no set, rows that cannot be read, an architecture whose logits are unknown, a judge with a
            smaller vocabulary, or answers to other rows.
        [`NonFiniteLogitsError`]: weights that diverged.
    """
    if not sets:
        raise ValueError("There is no set to evaluate on: pass at least one, such as {'forget': dataset}.")
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(f"batch_size={batch_size} and max_new_tokens={max_new_tokens}: both must be at least 1.")
    if judge is not None and _vocabulary(judge) < _vocabulary(model):
        raise ValueError(
            f"The judge knows {_vocabulary(judge)} tokens and the model {_vocabulary(model)}: use a judge that reads "
            "the same tokens, such as the model before unlearning."
        )

    # On every process, so that all see the same errors
    prepared = {name: prepare_rows(rows, tokenizer, args, name, metrics=()) for name, rows in sets.items()}
    state = PartialState()
    own = {name: _deal(rows, state) for name, rows in prepared.items()}
    if generated is not None:
        _require_all(own, generated)
    passes = (generated is None) + (judge is not None)
    total = sum(1 + passes * bool(row.prompt_ids) for rows in own.values() for row in rows.values())
    evaluation = Evaluation()
    with (
        evaluation_mode(model),
        nullcontext() if judge is None else evaluation_mode(judge),
        tqdm(total=total, desc=description, file=sys.stderr, disable=not state.is_main_process) as bar,
    ):
        inner = checked_model(model)
        inner_judge = None if judge is None else checked_model(judge)
        for name, rows in own.items():
            scores = score_answers(
                inner, [row.answer for row in rows.values()], batch_size, moments=True, progress=bar.update
            )
            samples = {
                index: {
                    "row": index,
                    "answer_tokens": score.log_probs.numel(),
                    "perplexity": perplexity(score.log_probs),
                    "repetition": None,
                    "first_token_entropy": first_token_entropy(score.means) if row.prompt_ids else None,
                    "generation_perplexity": None,
                    "generation": None,
                    "generation_tokens": 0,
                }
                for (index, row), score in zip(rows.items(), scores, strict=True)
            }
            prompts = {index: row.prompt_ids for index, row in rows.items() if row.prompt_ids}
            if generated is None:
                given = generate_tokens(
                    inner, tokenizer, list(prompts.values()), batch_size, max_new_tokens, progress=bar.update
                )
            else:
                given = [generated[name][index] for index in prompts]
            written = [_after_prompt(*pair) for pair in zip(prompts.values(), given, strict=True)]
            for index, answer, tokens in zip(prompts, given, written, strict=True):
                samples[index]["generation"] = tokenizer.decode(answer.token_ids, skip_special_tokens=True)
                samples[index]["generation_tokens"] = tokens.num_labels
                samples[index]["repetition"] = repetition(answer.token_ids)
            if inner_judge is not None:
                judged = score_answers(inner_judge, [[tokens] for tokens in written], batch_size, progress=bar.update)
                for index, score in zip(prompts, judged, strict=True):
                    samples[index]["generation_perplexity"] = perplexity(score.log_probs)
            gathered = sorted(gather_object(list(samples.values())), key=lambda sample: sample["row"])
            evaluation.samples[name] = gathered
            evaluation.metrics[name] = _summary(gathered)
            evaluation.skipped[name] = _skipped(name, prepared[name], gathered, judge is not None)
    return evaluation


def _require_all(
    own: Mapping[str, Mapping[int, EvaluationRow]], generated: Mapping[str, Mapping[int, GeneratedTokens]]
) -> None:
    """Refuses on every process where one of them lacks an answer, so that none waits for the others."""
    wrong = [
        name
        for name, rows in own.items()
        if {index for index, row in rows.items() if row.prompt_ids} != generated.get(name, {}).keys()
    ]
    if wrong := sorted(set(gather_object(wrong))):
        raise ValueError(
            f"The answers in `generated` are not those to the rows of {', '.join(wrong)}: pass what evaluate_model "
            "generated for the same sets, in the same processes."
        )


def _vocabulary(model: PreTrainedModel | PeftModel) -> int:
    return model.config.get_text_config().vocab_size


def _after_prompt(prompt_ids: Sequence[int], answer: GeneratedTokens) -> Tokens:
    """What the judge reads: the answer and the EOS token that ended it count, the prompt does not."""
    end = () if answer.eos_token_id is None else (answer.eos_token_id,)
    written = (*answer.token_ids, *end)
    return Tokens((*prompt_ids, *written), (*[IGNORE_INDEX] * len(prompt_ids), *written))


def _summary(samples: list[dict[str, Any]]) -> dict[str, float]:
    summary: dict[str, float] = {"rows": len(samples)}
    for metric in FLUENCY_METRICS:
        values = [sample[metric] for sample in samples if sample[metric] is not None]
        if not values:
            continue
        if metric in _TOKENS:
            lengths = [sample[_TOKENS[metric]] for sample in samples if sample[metric] is not None]
            summary[metric] = corpus_perplexity(values, lengths)
            low, high = _perplexity_interval(values, lengths)
        else:
            summary[metric] = math.fsum(values) / len(values)
            low, high = bootstrap_interval(values)
        summary[f"{metric}_ci_low"], summary[f"{metric}_ci_high"] = low, high
    return summary


def _totals(perplexities: Sequence[float | None], lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Total negative log-likelihood and number of tokens of each answer that has some."""
    pairs = [
        (math.log(value) * length, length)
        for value, length in zip(perplexities, lengths, strict=True)
        if value is not None
    ]
    nlls, tokens = np.asarray(pairs, dtype=np.float64).reshape(-1, 2).T
    return nlls, tokens


def _perplexity_interval(
    perplexities: Sequence[float], lengths: Sequence[int], seed: int = 0, samples: int = 1000
) -> tuple[float, float]:
    """As `bootstrap_interval`, of a ratio of two sums: rows are drawn with their tokens, and weigh by them."""
    nlls, tokens = _totals(perplexities, lengths)
    generator = np.random.default_rng(seed)
    draws = (generator.integers(nlls.size, size=nlls.size) for _ in range(samples))
    low, high = np.quantile([nlls[rows].sum() / tokens[rows].sum() for rows in draws], [0.025, 0.975])
    return math.exp(low), math.exp(high)


def _skipped(name: str, rows: EvaluationRows, samples: list[dict[str, Any]], has_judge: bool) -> dict[str, str]:
    """Why a metric is missing; where it is missing in some rows only, a warning says in how many."""
    full = [sample for sample in samples if sample["answer_tokens"]]
    skipped = {}
    for metric in FLUENCY_METRICS:
        missing = sum(sample[metric] is None for sample in full)
        if not full:
            skipped[metric] = "Every row has an empty answer."
        elif missing == len(full):
            skipped[metric] = _reason(metric, rows.rows, has_judge)
        elif missing:
            why = "they have no prompt" if metric != "repetition" else "no prompt, or fewer than 4 tokens generated"
            logger.warning(f"{missing} of {len(samples)} {name} rows have no {metric}: {why}.")
    return skipped


def _reason(metric: str, rows: Sequence[EvaluationRow], has_judge: bool) -> str:
    if metric == "generation_perplexity" and not has_judge:
        return "The generated answers need a judge to read them, such as the model before unlearning: none is given."
    if not any(row.prompt_ids for row in rows):
        return "It needs a prompt to answer, and every row is text without one."
    return "Every generated answer has fewer than 4 tokens."
