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
"""Multiple choice: whether the right one of several answers is the likeliest after its question, per token."""

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import maybe_convert_to_chatml

from ..config import UnlearnConfig
from ..data import _answer_column, _extract_prompt, _RowError, require_map_style
from ..forward import evaluation_mode
from . import answers
from .evaluation import Evaluation
from .inference import checked_model, score_answers
from .perturbation import OPTION, all_choices, wrong_choices
from .rows import Answer, _Reader
from .statistics import bootstrap_interval


logger = get_logger(__name__)

_TIE = 1e-9  # nats per token; the same logits summed over other lengths differ by less


# ---- One question ----


def choice_accuracy(nlls: Sequence[float | None], right: int) -> float | None:
    """
    Whether the right choice has the highest log-likelihood per token; those that tie for it share the point.

    Args:
        nlls (`Sequence[float | None]`): nats per token of each choice; those without tokens (`None`) are left out.
        right (`int`): place of the right one.

    Returns:
        `float` or `None`: 1 where the right choice is the likeliest, 1/n where n choices are, it among them, else 0;
        `None` where it or all others are empty.

    Example:

    ```python
    >>> from hf_unlearn.metrics.choices import choice_accuracy
    >>> choice_accuracy([2.0, 0.5, 0.5, None], right=1)
    0.5

    ```
    """
    given = [nll for nll in nlls if nll is not None]
    if nlls[right] is None or len(given) < 2:
        return None
    lowest = min(given) + _TIE
    return (nlls[right] <= lowest) / sum(nll <= lowest for nll in given)


# ---- Rows, which the insertion of forget-tokens reads too ----


def has_choices(columns: set[str]) -> bool:
    """Whether rows have other answers to choose from."""
    return "choices" in columns or "perturbed_answer" in columns or any(map(OPTION.fullmatch, columns))


def read_questions(dataset: Dataset, args: UnlearnConfig, name: str, purpose: str) -> tuple[list[dict[str, Any]], str]:
    """
    The rows of a set with question and answer apart, and the column of the answer.

    Args:
        dataset ([`~datasets.Dataset`]): rows of `question`, `choices` and `answer`, or of any format that training
            takes. Of a conversation, the last turn is the answer.
        args ([`UnlearnConfig`]): `dataset_text_field`.
        name (`str`): name of the set, for messages.
        purpose (`str`): why a question is needed, for messages.

    Returns:
        `tuple[list[dict[str, Any]], str]`: rows, and column.

    Raises:
        `ValueError`: rows without question or answer.
    """
    rows = list(require_map_style(dataset, f"The {name} data set").with_format(None))
    columns = set(rows[0])
    if {"question", "choices", "answer"} <= columns:
        return rows, "answer"
    if "conversations" in columns:
        rows = [maybe_convert_to_chatml(row) for row in rows]
    elif {"chosen", "rejected"} <= columns and "prompt" not in columns:
        rows = [{**row, **_extract_prompt(row, index, name)} for index, row in enumerate(rows)]
    column = _answer_column(set(rows[0]), args.dataset_text_field, name)
    if column in ("input_ids", args.dataset_text_field):
        raise ValueError(
            f"The {name} data set has `{column}`, but {purpose}: use `question` and `answer`, `prompt` and "
            "`completion`, `messages`, or `choices`."
        )
    if column != "messages":
        return rows, column
    for index, row in enumerate(rows):
        messages = row["messages"]
        if not messages or len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError(
                f"Row {index} of the {name} data set: `messages` does not end with a turn of the assistant, whose "
                "answer is what is measured."
            )
    rows = [{**row, "prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    return [{column: value for column, value in row.items() if column != "messages"} for row in rows], "completion"


def whole_row_reader(tokenizer: PreTrainedTokenizerBase, args: UnlearnConfig, answer_column: str) -> _Reader:
    """Tokenizes as training does, but nothing is cut off and the answer alone counts."""
    args = copy.copy(args)
    args.max_length, args.split_long_texts = None, False
    args.completion_only_loss, args.assistant_only_loss = True, False
    return _Reader(tokenizer, args, answer_column, [])


def tokenize_choices(reader: _Reader, row: dict[str, Any], texts: Sequence[str], right: int) -> list[Answer]:
    """Each text as the answer to the row's question; empty texts as empty answers."""
    if "choices" in row:
        row = {"question": row["question"], "answer": texts[right]}
    return [reader._other_answer(row, reader.answer_column, text) for text in texts]


# ---- A model on several sets ----


def evaluate_choices(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: dict[str, Dataset],
    args: UnlearnConfig,
    *,
    batch_size: int = 16,
    description: str = "Choosing answers",
) -> Evaluation:
    """
    Measures how often a model finds the right one of several answers likeliest: `choice_accuracy`.

    Each choice follows the question alone, is tokenized as an answer is in training and scored with the EOS token that
    is learned with it, by its log-likelihood per token, `(1/n) Σ log p_t`: as `acc_norm` does in
    lm-evaluation-harness, but per token instead of per byte. The choices are not listed in the prompt: a model that
    was unlearned can lose the format before the fact. Choices that tie for the highest score share the point, so that
    a model that knows nothing gets chance and not the first choice.

    Choices without text are left out; a row whose right choice is empty, that has no wrong one, or of which a choice
    is longer than `max_length` with its question, has no value. Rows are dealt over the processes, and each ends with
    the complete result; order of rows, batch size and padding side change nothing.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): causal language model; its modes are given
            back as they were.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer; needs no pad token.
        sets (`dict[str, Dataset]`): name -> rows with

            * `question`, `choices` (list of texts) and `answer` (index of the right one), as in `cais/mmlu` and
              `cais/wmdp`; or
            * a question and its right answer in any format that training takes, and `perturbed_answer` (text or list
              of texts) or `option1`, `option2`, ..., as in TOFU.
        args ([`UnlearnConfig`]): `max_length` and `dataset_text_field`.
        batch_size (`int`, *optional*, defaults to 16): sequences in one forward.
        description (`str`, *optional*): label of the progress bar.

    Returns:
        [`Evaluation`]: samples are `row`, `choice_accuracy`, `right` (place of the right choice) and `nlls` (nats per
        token of each choice; of TOFU's columns, the right one is the first or stands where the options have it). A set
        without choices has no metric, and the reason in `skipped`.

    Raises:
        `ValueError`: no set, or rows that cannot be read.
        [`NonFiniteLogitsError`]: weights that diverged.
    """
    if not sets:
        raise ValueError("There is no set to evaluate on: pass at least one, such as {'retain': dataset}.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} scores nothing: use at least 1.")
    # On every process, so that all see the same errors
    prepared = {name: _prepare(rows, tokenizer, args, name) for name, rows in sets.items()}
    state = PartialState()
    own = {name: rows[state.process_index :: state.num_processes] for name, rows in prepared.items()}
    evaluation = Evaluation()
    with (
        evaluation_mode(model),
        tqdm(
            total=sum(len(row.choices) for rows in own.values() for row in rows),
            desc=description,
            file=sys.stderr,
            disable=not state.is_main_process,
        ) as bar,
    ):
        inner = checked_model(model)
        for name, rows in own.items():
            flat = [choice for row in rows for choice in row.choices]
            scores = iter(score_answers(inner, flat, batch_size, progress=bar.update))
            samples = []
            for row in rows:
                nlls = [answers.mean_nll(next(scores).log_probs) for _ in row.choices]
                value = choice_accuracy(nlls, row.right) if nlls else None
                samples.append({"row": row.index, "choice_accuracy": value, "right": row.right, "nlls": nlls})
            gathered = gather_object(samples)
            gathered.sort(key=lambda sample: sample["row"])
            evaluation.samples[name] = gathered
            evaluation.metrics[name], evaluation.skipped[name] = _summary(name, gathered, sets[name])
    return evaluation


@dataclass
class _Row:
    """A row's choices as tokens, none where it is left out, and which of them is right."""

    index: int
    choices: list[Answer]
    right: int | None


def _prepare(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: UnlearnConfig, name: str) -> list[_Row]:
    dataset = require_map_style(dataset, f"The {name} data set")
    if not has_choices(set(dataset.column_names)):
        return [_Row(index, [], None) for index in range(len(dataset))]
    examples, answer_column = read_questions(dataset, args, name, "choices are answers to a question")
    reader = whole_row_reader(tokenizer, args, answer_column)
    rows, too_long = [], 0
    for index, example in enumerate(examples):
        try:
            texts, right = all_choices(example)
            choices = tokenize_choices(reader, example, texts, right)
            is_complete = bool(choices[right]) and bool(wrong_choices(example))
        except _RowError as error:
            raise ValueError(f"Row {index} of the {name} data set: {error}") from None
        lengths = [len(tokens.input_ids) for choice in choices for tokens in choice]
        is_too_long = is_complete and args.max_length is not None and max(lengths) > args.max_length
        too_long += is_too_long
        rows.append(_Row(index, choices, right) if is_complete and not is_too_long else _Row(index, [], None))
    if too_long:
        logger.warning(
            f"{too_long} of {len(rows)} {name} rows are longer than max_length={args.max_length} and have no "
            "choice_accuracy: use a larger max_length."
        )
    return rows


def _summary(name: str, samples: list[dict[str, Any]], dataset: Dataset) -> tuple[dict[str, float], dict[str, str]]:
    """Means, and why the metric is missing; where it is missing in some rows only, a warning says in how many."""
    values = [sample["choice_accuracy"] for sample in samples if sample["choice_accuracy"] is not None]
    means: dict[str, float] = {"rows": len(samples)}
    if not has_choices(set(dataset.column_names)):
        reason = "It needs wrong answers: add a column `perturbed_answer` with a list of texts per row, or `choices`."
        return means, {"choice_accuracy": reason}
    if not values:
        reason = "Every row has an empty right answer, no wrong one, or more than max_length tokens."
        return means, {"choice_accuracy": reason}
    if len(values) < len(samples):
        logger.warning(
            f"{len(samples) - len(values)} of {len(samples)} {name} rows have no choice_accuracy: their right answer "
            "is empty, they have no wrong one, or they are too long."
        )
    means["choice_accuracy"] = math.fsum(values) / len(values)
    means["choice_accuracy_ci_low"], means["choice_accuracy_ci_high"] = bootstrap_interval(values)
    return means, {}
