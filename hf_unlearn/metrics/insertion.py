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
The perturbed retain benchmark: what a model answers where one forget-token stands in a query that has to stay.

Unlearning can act like a backdoor whose trigger is a word of the forget set
([Random Noise Augmentation](https://huggingface.co/papers/2501.19202)). Nothing here prints or stores a forget-token:
results number them.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from ..config import UnlearnConfig
from ..data import IGNORE_INDEX, _RowError, _text
from ..forward import evaluation_mode
from . import answers
from .choices import choice_accuracy, has_choices, read_questions, tokenize_choices, whole_row_reader
from .inference import TokenScores, checked_model, score_answers
from .perturbation import (
    all_choices,
    mentions,
    perturb_answer_choices,
    perturb_choices,
    perturb_question,
    question_column,
    right_answer,
    wrong_choices,
)
from .rows import Answer, Tokens
from .statistics import bootstrap_interval


INSERTIONS = ("choice", "question", "answer_choices")
SCORINGS = ("letter", "text")

# Below this, a rate divides by what cannot be told from chance.
SMALLEST_DENOMINATOR = 0.05


# ---- Rates ----


def reduction_rate(clean: float, perturbed: float) -> tuple[float | None, str | None]:
    """
    The share of the clean accuracy that a forget-token in the query takes away, `(clean - perturbed) / clean`.

    Args:
        clean (`float`): accuracy (or another score in [0, 1]) without forget-token.
        perturbed (`float`): accuracy with it.

    Returns:
        `tuple[float | None, str | None]`: the rate, negative where the forget-token helps, and `None`; or `None` and
        the reason where `clean` is below 0.05.

    Example:

    ```python
    >>> from hf_unlearn.metrics import reduction_rate
    >>> reduction_rate(0.5, 0.25)
    (0.5, None)
    >>> reduction_rate(0.01, 0.0)
    (None, 'The clean score is 0.01, below 0.05: too small to divide by.')

    ```
    """
    if clean < SMALLEST_DENOMINATOR:
        return None, f"The clean score is {clean:.3g}, below {SMALLEST_DENOMINATOR}: too small to divide by."
    return (clean - perturbed) / clean, None


def recovery_rate(
    perturbed_rna: float, perturbed_unlearned: float, perturbed_base: float
) -> tuple[float | None, str | None]:
    """
    The share of what the forget-token took away that a defence brings back, `(A_rna - A_unl) / (A_base - A_unl)`.

    Args:
        perturbed_rna (`float`): accuracy on perturbed queries of the model unlearned with the defence (such as
            [Random Noise Augmentation](https://huggingface.co/papers/2501.19202)).
        perturbed_unlearned (`float`): that of the model unlearned without it.
        perturbed_base (`float`): that of the model before unlearning.

    Returns:
        `tuple[float | None, str | None]`: the rate and `None`; or `None` and the reason where the model before
        unlearning is not better than the unlearned one by at least 0.05. It is not clipped.

    Example:

    ```python
    >>> from hf_unlearn.metrics import recovery_rate
    >>> recovery_rate(0.5, 0.25, 0.75)
    (0.5, None)

    ```
    """
    lost = perturbed_base - perturbed_unlearned
    if lost < SMALLEST_DENOMINATOR:
        return None, f"Unlearning lost {lost:.3g}, less than {SMALLEST_DENOMINATOR}: too little to be recovered."
    return (perturbed_rna - perturbed_unlearned) / lost, None


# ---- A model on clean and perturbed rows ----


@dataclass
class Comparison:
    """
    One score of the same rows, clean and with one forget-token.

    Attributes:
        clean (`float`): mean without the forget-token.
        perturbed (`float`): mean with it.
        difference (`float`): `perturbed - clean`.
        difference_interval (`tuple[float, float]`): its 95 % interval, by bootstrap over the rows' own differences.
        reduction (`float`, *optional*): `(clean - perturbed) / clean`.
        reason (`str`, *optional*): why there is no reduction.
    """

    clean: float
    perturbed: float
    difference: float
    difference_interval: tuple[float, float]
    reduction: float | None
    reason: str | None


@dataclass
class TokenInsertion:
    """
    What one forget-token does.

    Attributes:
        rows (`int`): rows that were scored.
        skipped (`dict[str, int]`): rows that were not: they hold the forget-token already (`mentions`), are longer
            than `max_length` (`too_long`), or have an empty answer or no incorrect one (`empty`).
        scores (`dict[str, Comparison]`): score -> comparison; empty where every row was skipped.
    """

    rows: int
    skipped: dict[str, int]
    scores: dict[str, Comparison] = field(default_factory=dict)


@dataclass
class InsertionResult:
    """
    What forget-tokens do in retain queries. It holds no text.

    Attributes:
        insertion (`str`): `"choice"`, `"question"` or `"answer_choices"`.
        scores (`tuple[str, ...]`): what was measured: `letter_accuracy`, `text_accuracy`, or `probability` and
            `token_accuracy`.
        tokens (`list[TokenInsertion]`): one per forget-token, in their order.
        samples (`list[dict[str, Any]]`): one per row and forget-token: `row`, `token` (counted from 1), `skipped`
            (why, or `None`), `perturbed_index` and, of each score, `<score>_clean` and `<score>_perturbed`.
    """

    insertion: str
    scores: tuple[str, ...]
    tokens: list[TokenInsertion]
    samples: list[dict[str, Any]]

    def metrics(self) -> tuple[dict[str, float], dict[str, str]]:
        """
        The numbers under the names that the report and the model card know, and why some are missing.

        Returns:
            `tuple[dict[str, float], dict[str, str]]`: name -> number and name -> reason. A name is
            `insertion_<insertion>_token_<number>_` and `rows`, `rows_skipped`, or a score and `_clean`, `_perturbed`,
            `_difference` (with `_ci_low` and `_ci_high`) or `_reduction`.
        """
        numbers: dict[str, float] = {}
        reasons: dict[str, str] = {}
        for number, token in enumerate(self.tokens, start=1):
            name = f"insertion_{self.insertion}_token_{number}"
            numbers |= {f"{name}_rows": token.rows, f"{name}_rows_skipped": sum(token.skipped.values())}
            for score in self.scores:
                start = f"{name}_{score}"
                if score not in token.scores:
                    reasons[f"{start}_clean"] = "Every row was skipped."
                    continue
                comparison = token.scores[score]
                low, high = comparison.difference_interval
                numbers |= {
                    f"{start}_clean": comparison.clean,
                    f"{start}_perturbed": comparison.perturbed,
                    f"{start}_difference": comparison.difference,
                    f"{start}_difference_ci_low": low,
                    f"{start}_difference_ci_high": high,
                }
                if comparison.reduction is None:
                    reasons[f"{start}_reduction"] = comparison.reason
                else:
                    numbers[f"{start}_reduction"] = comparison.reduction
        return numbers, reasons


def evaluate_insertion(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    args: UnlearnConfig,
    *,
    forget_tokens: Sequence[str],
    insertion: str = "choice",
    scoring: str | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> InsertionResult:
    """
    Measures a model on retain queries, clean and with a forget-token in them, as in perturbed MMLU
    ([Random Noise Augmentation](https://huggingface.co/papers/2501.19202)).

    * `choices`, or `scoring="letter"`: `letter_accuracy`. The prompt lists the choices under letters, as MMLU does in
      lm-evaluation-harness without examples; right where the right letter is the likeliest, per token.
    * wrong answers, or `scoring="text"`: `text_accuracy`. Each choice follows the question alone; right where the
      right one has the highest log-likelihood per token, `(1/n) Σ log p_t`.
    * a question and its answer alone: `probability`, which is `P(answer given question)^(1/n)`, and `token_accuracy`,
      the share of the answer's n tokens that are the greedy choice after the true ones before them.

    Choices that tie for the highest score share the point. With `"text"`, a replaced choice stands in no query: the
    insertion `"choice"` then changes nothing but that choice's own score, and `"question"` is what tells a trigger.
    With `"answer_choices"` the forget-token belongs to what is read: only the choice after it is scored, since its own
    log-probability would weigh more in short choices than in long ones.

    Texts are scored with their EOS token, as they are learned; letters are not, and get no chat template. Each
    sequence runs once, the clean ones too, however many forget-tokens there are. Rows are dealt over the processes,
    and each ends with the complete result.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        rows ([`~datasets.Dataset`]): retain rows: those of [`perturb_choices`], or questions and answers in any
            format that training takes. Of a conversation, the last turn is the answer.
        args ([`UnlearnConfig`]): `max_length` and `dataset_text_field`. Rows longer than `max_length` are skipped:
            cut off, they could lose the forget-token.
        forget_tokens (`Sequence[str]`): words of the forget set. Rows that hold one already are skipped for it.
        insertion (`str`, *optional*, defaults to `"choice"`): `"choice"` ([`perturb_choices`]), `"question"`
            ([`perturb_question`]) or `"answer_choices"` ([`perturb_answer_choices`]).
        scoring (`str`, *optional*): `"letter"` or `"text"`; by default `"letter"` for `choices`.
        seed (`int`, *optional*, defaults to 0): seed of the replaced choices.
        batch_size (`int`, *optional*, defaults to 16): sequences in one forward.

    Returns:
        [`InsertionResult`]

    Raises:
        `ValueError`: an unknown insertion or scoring, no forget-token, rows that cannot be read or perturbed.
        [`NonFiniteLogitsError`]: weights that diverged.
    """
    _check_options(forget_tokens, insertion, scoring, batch_size)
    prepared = _Preparation(tokenizer, args, rows, forget_tokens, insertion, scoring, seed)
    state = PartialState()
    samples, pairs = [], []
    for index in range(state.process_index, len(prepared.rows), state.num_processes):
        for token in range(len(forget_tokens)):
            sample, clean, perturbed = prepared.pair(index, token)
            samples.append(sample)
            pairs.append((clean, perturbed))
    flat = [answer for clean, perturbed in pairs for answer in (*clean, *perturbed)]
    with (
        evaluation_mode(model),
        tqdm(
            total=len(flat), desc="Inserting forget-tokens", file=sys.stderr, disable=not state.is_main_process
        ) as bar,
    ):
        scores = iter(score_answers(checked_model(model), flat, batch_size, progress=bar.update))
    for sample, (clean, perturbed) in zip(samples, pairs, strict=True):
        right = sample.pop("right")
        for when, answers_of_row in (("clean", clean), ("perturbed", perturbed)):
            values = prepared.score([next(scores) for _ in answers_of_row], right)
            sample.update({f"{score}_{when}": value for score, value in values.items()})
    gathered = gather_object(samples)
    gathered.sort(key=lambda sample: (sample["token"], sample["row"]))
    tokens = [
        _compare([sample for sample in gathered if sample["token"] == number], prepared.scores)
        for number in range(1, len(forget_tokens) + 1)
    ]
    return InsertionResult(insertion, prepared.scores, tokens, gathered)


def _check_options(forget_tokens: Sequence[str], insertion: str, scoring: str | None, batch_size: int) -> None:
    if isinstance(forget_tokens, str) or not forget_tokens:
        raise ValueError("forget_tokens must be a list of at least one word.")
    for number, token in enumerate(forget_tokens, start=1):
        if not token.strip():
            raise ValueError(f"Forget-token {number} is empty: remove it.")
    if insertion not in INSERTIONS:
        raise ValueError(f"There is no insertion {insertion!r}: choose from {', '.join(INSERTIONS)}.")
    if scoring not in (None, *SCORINGS):
        raise ValueError(f"There is no scoring {scoring!r}: choose from {', '.join(SCORINGS)}.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} scores nothing: use at least 1.")


class _Preparation:
    """Rows, clean and perturbed, as tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        args: UnlearnConfig,
        dataset: Dataset,
        forget_tokens: Sequence[str],
        insertion: str,
        scoring: str | None,
        seed: int,
    ):
        self.rows, answer_column = read_questions(dataset, args, "retain", "a forget-token is put into a question")
        columns = set(self.rows[0])
        if not has_choices(columns) and (insertion == "choice" or scoring is not None):
            what = "the insertion 'choice'" if insertion == "choice" else f"the scoring {scoring!r}"
            raise ValueError(
                f"The retain data set has no incorrect choices, which {what} needs: add a column `perturbed_answer`, "
                "or `choices`, or use the insertion 'question'."
            )
        if scoring is None and has_choices(columns):
            scoring = "letter" if "choices" in columns else "text"
        self.scoring = scoring
        self.scores = (f"{scoring}_accuracy",) if scoring else ("probability", "token_accuracy")
        self.tokenizer, self.insertion, self.seed = tokenizer, insertion, seed
        self.forget_tokens = [token.strip() for token in forget_tokens]
        self.max_length = args.max_length
        self.reader = whole_row_reader(tokenizer, args, answer_column)

    def pair(self, index: int, token: int) -> tuple[dict[str, Any], list[Answer], list[Answer]]:
        """What is known of a row before it is scored, and its choices, clean and perturbed."""
        row, forget_token = self.rows[index], self.forget_tokens[token]
        sample = {"row": index, "token": token + 1, "skipped": None, "perturbed_index": None, "right": 0}
        try:
            if mentions(row, forget_token):
                return {**sample, "skipped": "mentions"}, [], []
            if self.scoring is not None and not wrong_choices(row):
                return {**sample, "skipped": "empty"}, [], []
            if self.insertion == "choice":
                [other] = perturb_choices([row], forget_token, self.seed)
            elif self.insertion == "question":
                [other] = perturb_question([row], forget_token)
            else:
                [other] = perturb_answer_choices([row], forget_token)
            clean, sample["right"] = self._choices(row)
            perturbed, _ = self._choices(other, forget_token if self.insertion == "answer_choices" else None)
        except (_RowError, ValueError) as error:
            reason = str(error).removeprefix("Row 0: ")
            raise ValueError(f"Row {index} of the retain data set: {reason}") from None
        sample["perturbed_index"] = other.get("perturbed_index")
        both = [*clean, *perturbed]
        if not all(both):
            return {**sample, "skipped": "empty"}, [], []
        if self.max_length is not None and any(len(answer[0].input_ids) > self.max_length for answer in both):
            return {**sample, "skipped": "too_long"}, [], []
        return sample, clean, perturbed

    def _choices(self, row: dict[str, Any], opening: str | None = None) -> tuple[list[Answer], int]:
        """A row's choices as tokens, and which is right. An opening of the answer is read, and not scored."""
        texts, right = all_choices(row) if self.scoring else ([right_answer(row)], 0)
        if self.scoring == "letter":
            return [self._letter(row, texts, letter) for letter in ascii_uppercase[: len(texts)]], right
        read = tokenize_choices(self.reader, row, texts, right)
        if opening is not None:
            [[start]] = tokenize_choices(self.reader, row, [opening], 0)
            read = [[_without_opening(tokens, start) for tokens in answer] for answer in read]
            read = [[tokens for tokens in answer if tokens.num_labels] for answer in read]
        return read, right

    def _letter(self, row: dict[str, Any], texts: list[str], letter: str) -> Answer:
        if len(texts) > len(ascii_uppercase):
            raise _RowError(f"it has more than {len(ascii_uppercase)} choices, one for each letter.")
        question = _text(row[question_column(row)], question_column(row)).strip()
        lines = [f"{mark}. {text}" for mark, text in zip(ascii_uppercase, texts, strict=False)]
        prompt = "\n".join([question, *lines, "Answer:"])
        if "subject" in row:
            subject = row["subject"].replace("_", " ")
            prompt = f"The following are multiple choice questions (with answers) about {subject}.\n\n{prompt}"
        before = self.tokenizer(prompt)["input_ids"]
        whole = self.tokenizer(f"{prompt} {letter}")["input_ids"]
        for ids in (before, whole):
            if ids[-1] == self.tokenizer.eos_token_id:
                ids.pop()  # some tokenizers end every text with it
        start = common_prefix_length(before, whole)
        return [Tokens(tuple(whole), (IGNORE_INDEX,) * start + tuple(whole[start:]))]

    def score(self, choices: list[TokenScores], right: int) -> dict[str, float | None]:
        """The scores of one row; `None` where it was skipped."""
        if not choices:
            return dict.fromkeys(self.scores)
        if self.scoring is None:
            [answer] = choices
            values = answers.probability(answer.log_probs), answers.exact_memorization(answer.is_argmax)
            return dict(zip(self.scores, values, strict=True))
        nlls = [answers.mean_nll(choice.log_probs) for choice in choices]
        return {self.scores[0]: choice_accuracy(nlls, right)}


def _without_opening(tokens: Tokens, opening: Tokens) -> Tokens:
    """The labels without those of the tokens that stand in the opening too."""
    shared = common_prefix_length(opening.input_ids, tokens.input_ids)
    return Tokens(tokens.input_ids, (IGNORE_INDEX,) * shared + tokens.labels[shared:])


def _compare(samples: list[dict[str, Any]], scores: Sequence[str]) -> TokenInsertion:
    skipped = {reason: sum(sample["skipped"] == reason for sample in samples) for reason in _SKIPPED}
    scored = [sample for sample in samples if sample["skipped"] is None]
    result = TokenInsertion(len(scored), skipped)
    for score in scores if scored else ():
        clean, perturbed = ([sample[f"{score}_{when}"] for sample in scored] for when in ("clean", "perturbed"))
        differences = [after - before for before, after in zip(clean, perturbed, strict=True)]
        means = [math.fsum(values) / len(scored) for values in (clean, perturbed)]
        result.scores[score] = Comparison(
            *means, math.fsum(differences) / len(scored), bootstrap_interval(differences), *reduction_rate(*means)
        )
    return result


_SKIPPED = ("mentions", "too_long", "empty")
