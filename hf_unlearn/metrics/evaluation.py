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
"""One model on several sets: what it answers, how likely the true answers are, and how likely wrong ones."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import UnlearnConfig
from ..forward import evaluation_mode
from . import answers
from .inference import GeneratedTokens, TokenScores, checked_model, generate_tokens, score_answers
from .rows import Answer, EvaluationRow, EvaluationRows, prepare_rows
from .statistics import bootstrap_interval


logger = get_logger(__name__)

METRICS = ("probability", "rougeL_recall", "exact_memorization", "extraction_strength", "truth_ratio")


@dataclass
class Evaluation:
    """
    What one model got on several sets.

    Attributes:
        metrics (`dict[str, dict[str, float]]`): set -> metric -> mean over its rows, with the ends of the 95 %
            bootstrap interval (`<metric>_ci_low`, `<metric>_ci_high`), and `rows`, the number of rows.
        samples (`dict[str, list[dict[str, Any]]]`): set -> one dict per row, in order: `row`, `answer_tokens`, each
            metric's value (of the truth ratio the raw one) and `generation`; `None` where there is none. They hold
            what was to be forgotten.
        skipped (`dict[str, dict[str, str]]`): set -> metric -> why it is missing.
        generated (`dict[str, dict[int, GeneratedTokens]]`): set -> row -> the answer in tokens, where
            [`evaluate_model`] generated one; of this process's rows alone. [`evaluate_fluency`] takes it, so that no
            answer is generated twice.
    """

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    skipped: dict[str, dict[str, str]] = field(default_factory=dict)
    generated: dict[str, dict[int, GeneratedTokens]] = field(default_factory=dict, repr=False, compare=False)


def evaluate_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: dict[str, Dataset],
    args: UnlearnConfig,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 200,
    metrics: Sequence[str] | None = None,
    generate: bool = True,
    description: str = "Evaluating",
) -> Evaluation:
    """
    Measures a model on several sets, with the definitions of [TOFU](https://huggingface.co/papers/2401.06121).

    | metric | value of a row |
    |---|---|
    | `probability` | `p = P(answer given prompt)^(1/n)`, n tokens; with wrong options `p / (p + Σ p_k)` |
    | `rougeL_recall` | ROUGE-L recall (stemmed) of the greedy answer against the true one |
    | `exact_memorization` | share of tokens that are the first choice after the true ones before them |
    | `extraction_strength` | 1 - the smallest share of the answer after which greedy decoding gives the rest |
    | `truth_ratio` | `r = exp(-mean NLL of the wrong answers) / exp(-NLL of the paraphrase)`, NLLs per token |

    A metric is the mean over rows; of the truth ratio, the mean of `min(r, 1/r)` in a set whose name starts with
    `forget`, and of `max(0, 1 - r)` in the others.

    Answers are tokenized as in training, and end with the EOS token that is learned with them. Empty answers enter no
    mean. The order of rows, the batch size, the padding side and the number of processes change nothing but the last
    digits. Rows are dealt over the processes, and each ends with the complete result.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): causal language model; its modes are given
            back as they were.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer; needs no pad token.
        sets (`dict[str, Dataset]`): name -> rows in any format that training takes. Columns `paraphrased_answer` and
            `perturbed_answer`, or `option1`, `option2`, ..., hold other answers, as in TOFU.
        args ([`UnlearnConfig`]): `max_length`, `dataset_text_field` and the other data settings.
        batch_size (`int`, *optional*, defaults to 16): sequences in one forward.
        max_new_tokens (`int`, *optional*, defaults to 200): the longest answer generated.
        metrics (`Sequence[str]`, *optional*): names from `METRICS`; all of them by default.
        generate (`bool`, *optional*, defaults to `True`): whether to generate answers, the slowest part.
        description (`str`, *optional*): label of the progress bar.

    Returns:
        [`Evaluation`]

    Raises:
        `ValueError`: an unknown metric, no set, rows that cannot be read, an architecture whose logits are unknown.
        [`NonFiniteLogitsError`]: weights that diverged.

    Example:

    ```python
    >>> import torch
    >>> from datasets import Dataset
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    >>> from hf_unlearn import UnlearnConfig
    >>> from hf_unlearn.metrics import evaluate_model
    >>> words = Tokenizer(models.WordLevel({"who": 0, "Ada": 1, "Bob": 2, "</s>": 3}, unk_token="who"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    >>> config = LlamaConfig(
    ...     vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    ... )
    >>> model = LlamaForCausalLM(config)
    >>> _ = torch.nn.init.zeros_(model.lm_head.weight)  # each of the four tokens is equally likely
    >>> forget = Dataset.from_list([{"question": "who", "answer": "Ada"}])
    >>> args = UnlearnConfig("output", use_cpu=True)
    >>> evaluation = evaluate_model(model, tokenizer, {"forget": forget}, args, metrics=["probability"])
    >>> round(evaluation.metrics["forget"]["probability"], 6)
    0.25

    ```
    """
    wanted = METRICS if metrics is None else tuple(metrics)
    if unknown := [metric for metric in wanted if metric not in METRICS]:
        raise ValueError(f"There is no metric {', '.join(map(repr, unknown))}: choose from {', '.join(METRICS)}.")
    if not sets:
        raise ValueError("There is no set to evaluate on: pass at least one, such as {'forget': dataset}.")
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(f"batch_size={batch_size} and max_new_tokens={max_new_tokens}: both must be at least 1.")

    # On every process, so that all see the same errors
    prepared = {name: prepare_rows(rows, tokenizer, args, name, wanted) for name, rows in sets.items()}
    state = PartialState()
    evaluation = Evaluation()
    own = {name: _deal(rows, state) for name, rows in prepared.items()}
    with_text = generate and "rougeL_recall" in wanted
    total = sum(len(answer) for rows in own.values() for row in rows.values() for answer in _answers(row))
    if with_text:
        total += sum(bool(row.prompt_ids) for rows in own.values() for row in rows.values())
    with (
        evaluation_mode(model),
        tqdm(total=total, desc=description, file=sys.stderr, disable=not state.is_main_process) as bar,
    ):
        inner = checked_model(model)
        for name, rows in own.items():
            answers_of_rows = [answer for row in rows.values() for answer in _answers(row)]
            scores = iter(score_answers(inner, answers_of_rows, batch_size, progress=bar.update))
            samples = {
                index: _score_row(row, [next(scores) for _ in _answers(row)], prepared[name].is_multiple_choice)
                for index, row in rows.items()
            }
            if with_text:
                prompted = {index: row.prompt_ids for index, row in rows.items() if row.prompt_ids}
                written = generate_tokens(
                    inner, tokenizer, list(prompted.values()), batch_size, max_new_tokens, progress=bar.update
                )
                evaluation.generated[name] = dict(zip(prompted, written, strict=True))
                for index, answer in evaluation.generated[name].items():
                    text = tokenizer.decode(answer.token_ids, skip_special_tokens=True)
                    samples[index]["generation"] = text
                    samples[index]["rougeL_recall"] = _rouge_recall(rows[index].text, text)
            gathered = gather_object([{"row": index, **sample} for index, sample in samples.items()])
            gathered.sort(key=lambda sample: sample["row"])
            for sample in gathered:
                sample.update({metric: None for metric in METRICS if metric not in wanted})
            evaluation.samples[name] = gathered
            evaluation.metrics[name] = _means(name, gathered)
            evaluation.skipped[name] = _skipped(name, prepared[name], gathered, wanted, generate)
    return evaluation


def _deal(rows: EvaluationRows, state: PartialState) -> dict[int, EvaluationRow]:
    """This process's rows, by number."""
    own = range(state.process_index, len(rows.rows), state.num_processes)
    return {index: rows.rows[index] for index in own}


def _answers(row: EvaluationRow) -> list[Answer]:
    return [row.answer, row.paraphrase, *row.wrong]


def _score_row(row: EvaluationRow, scores: list[TokenScores], is_multiple_choice: bool) -> dict[str, Any]:
    truth, paraphrase, *wrong = scores
    wrong_nlls = [answers.mean_nll(score.log_probs) for score in wrong]
    if is_multiple_choice:
        probability = answers.choice_probability(answers.mean_nll(truth.log_probs), wrong_nlls)
    else:
        probability = answers.probability(truth.log_probs)
    return {
        "answer_tokens": truth.log_probs.numel(),
        "probability": probability,
        "rougeL_recall": None,
        "exact_memorization": answers.exact_memorization(truth.is_argmax),
        "extraction_strength": answers.extraction_strength(truth.is_argmax),
        "truth_ratio": answers.truth_ratio(answers.mean_nll(paraphrase.log_probs), wrong_nlls),
        "generation": None,
    }


def _rouge_recall(truth: str, generation: str) -> float | None:
    if not DefaultTokenizer(use_stemmer=True).tokenize(truth):
        return None  # recall of nothing: rouge_score knows words of a-z and 0-9 only
    return RougeScorer(["rougeL"], use_stemmer=True).score(truth, generation)["rougeL"].recall


def _means(name: str, samples: list[dict[str, Any]]) -> dict[str, float]:
    means: dict[str, float] = {"rows": len(samples)}
    for metric in METRICS:
        values = [sample[metric] for sample in samples if sample[metric] is not None]
        if not values:
            continue
        if metric == "truth_ratio":
            # Forgotten: right and wrong answers are equally likely (1). Elsewhere: wrong ones are unlikely (1, too)
            values = [min(r, 1 / r) if name.startswith("forget") else max(0.0, 1 - r) for r in values]
        means[metric] = math.fsum(values) / len(values)
        means[f"{metric}_ci_low"], means[f"{metric}_ci_high"] = bootstrap_interval(values)
    return means


def _skipped(
    name: str, rows: EvaluationRows, samples: list[dict[str, Any]], wanted: Sequence[str], generate: bool
) -> dict[str, str]:
    """Why a metric is missing; where it is missing in some rows only, a warning says in how many."""
    full = [sample for sample in samples if sample["answer_tokens"]]
    skipped = {}
    for metric in wanted:
        missing = sum(sample[metric] is None for sample in full)
        if not full:
            skipped[metric] = "Every row has an empty answer."
        elif missing == len(full):
            skipped[metric] = _reason(metric, rows, generate)
        elif missing:
            logger.warning(f"{missing} of {len(samples)} {name} rows have no {metric}: {_IN_SOME_ROWS[metric]}.")
    return skipped


_IN_SOME_ROWS = {
    "probability": "they have no wrong answer to choose from",
    "rougeL_recall": "they have no prompt, or a true answer without a word of a-z or 0-9",
    "truth_ratio": "their paraphrased answer or all of their wrong answers are empty",
}


def _reason(metric: str, rows: EvaluationRows, generate: bool) -> str:
    if metric == "truth_ratio":
        return rows.without_truth_ratio or "No row has a paraphrased and a wrong answer that are not empty."
    if metric == "probability":
        return "No row has a wrong answer to choose from."
    if not generate:
        return "ROUGE compares generated answers, and generate=False."
    if not any(row.prompt_ids for row in rows.rows):
        return "ROUGE needs a prompt to answer, and every row is text without one."
    return "ROUGE reads words of a-z and 0-9, and no true answer has one."
