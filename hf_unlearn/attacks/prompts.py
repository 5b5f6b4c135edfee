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
"""Rows with a prompt in one form, whatever theirs, so that an attack can change it; and the trials that follow."""

import copy
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from tqdm import tqdm
from trl import maybe_convert_to_chatml

from ..config import UnlearnConfig
from ..data import _QUESTION_OF, _answer_column, _extract_prompt, _messages, _RowError, _text, require_map_style
from ..forward import evaluation_mode
from ..metrics.answers import probability
from ..metrics.inference import checked_model, max_positions, score_answers
from ..metrics.rows import Answer, EvaluationRow, _Reader
from .base import AttackData, Attacked, Trial, make_trial


logger = get_logger(__name__)


@dataclass(frozen=True)
class Asked:
    """
    The rows of a set that can be asked.

    Attributes:
        rows (`list[EvaluationRow]`): those that fit into the model's context and whose answer is not empty.
        left_out (`int`): the number of the others.
    """

    rows: list[EvaluationRow]
    left_out: int

    @property
    def answers(self) -> list[Answer]:
        return [row.answer for row in self.rows]


def has_prompts(dataset: Dataset, args: UnlearnConfig) -> bool:
    """Whether the rows are questions and answers, and not plain text or token ids."""
    columns = set(dataset.column_names)
    return "input_ids" not in columns and ("messages" in columns or args.dataset_text_field not in columns)


def question_rows(dataset: Dataset, attacked: Attacked, data: AttackData, name: str) -> list[dict[str, Any]]:
    """
    Rows of any format with a prompt, as `prompt` and `completion`: both text, or both lists of messages.

    A question and its answer become messages where the tokenizer has a chat template, as in training. Of a
    conversation, the last turn is the answer. Token for token, nothing changes by it.

    Args:
        dataset ([`~datasets.Dataset`]): the rows.
        attacked ([`~hf_unlearn.attacks.base.Attacked`]): the tokenizer.
        data ([`~hf_unlearn.attacks.base.AttackData`]): the data settings.
        name (`str`): `"forget"` takes the `rejected` answers of preference data, `"retain"` the `chosen` ones.

    Returns:
        `list[dict]`: `prompt`, `completion`, and as they are `tools`, `chat_template_kwargs` and
        `paraphrased_question`.

    Raises:
        `ValueError`: the rows are plain text or token ids, which have no prompt, or a row cannot be read.
    """
    args = data.args
    dataset = require_map_style(dataset, f"The {name} data set").with_format(None)
    rows = list(dataset)
    columns = set(dataset.column_names)
    if not {"input_ids", "messages", args.dataset_text_field} & columns:
        if "conversations" in columns:
            rows = [maybe_convert_to_chatml(row) for row in rows]
        elif {"chosen", "rejected"} <= columns and "prompt" not in columns:
            rows = [{**row, **_extract_prompt(row, index, name)} for index, row in enumerate(rows)]
    column = _answer_column({*columns, *rows[0]}, args.dataset_text_field, name)
    if column in ("input_ids", args.dataset_text_field):
        raise ValueError(
            f"The {name} data set has `{column}`, which has no prompt to change: use `question` and `answer`, "
            "`prompt` and `completion`, or `messages`, or choose another attack."
        )
    has_template = attacked.tokenizer.chat_template is not None
    converted = []
    for index, row in enumerate(rows):
        try:
            prompt, completion = _prompt_and_completion(row, column, has_template)
        except _RowError as error:
            raise ValueError(f"Row {index} of the {name} data set: {error}") from None
        others = ("tools", "chat_template_kwargs", "paraphrased_question")
        converted.append(
            {"prompt": prompt, "completion": completion, **{key: row[key] for key in others if key in row}}
        )
    return converted


def _prompt_and_completion(row: dict[str, Any], column: str, has_template: bool) -> tuple[Any, Any]:
    if column == "messages":
        messages = _messages(row[column], column)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise _RowError("`messages` does not end with a turn of the assistant, which is what is asked for.")
        return messages[:-1], messages[-1:]
    question, answer = row[_QUESTION_OF[column]], row[column]
    if column in ("answer", "output"):
        question, answer = _text(question, _QUESTION_OF[column]), _text(answer, column)
        if has_template:
            return [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]
        return question, f" {answer}" if answer.strip() else answer
    if isinstance(answer, list) != isinstance(question, list):
        raise _RowError("of its prompt and its answer, one is a list of messages and the other is not.")
    if isinstance(answer, list):
        return _messages(question, _QUESTION_OF[column]), _messages(answer, column)
    return _text(question, _QUESTION_OF[column]), _text(answer, column)


def change_questions(
    rows: list[dict[str, Any]], changes: Iterable[Callable[[str], str] | None], name: str
) -> list[dict[str, Any] | None]:
    """
    Rows with other questions: the prompt as a whole, or the user's last message of a conversation.

    An answer in plain text begins with a space then, since a new prompt brings none.

    Args:
        rows (`list[dict]`): rows of [`question_rows`].
        changes (`Iterable[Callable | None]`): for each row, its question to another one; `None` leaves the row out.
        name (`str`): name of the set, for messages.

    Returns:
        `list[dict | None]`: copies of the rows, `None` for those left out.

    Raises:
        `ValueError`: a prompt has no message of the user.
    """
    return [
        None if change is None else _with_question(row, change, index, name)
        for index, (row, change) in enumerate(zip(rows, changes, strict=True))
    ]


def _with_question(row: dict[str, Any], change: Callable[[str], str], index: int, name: str) -> dict[str, Any]:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        completion = row["completion"]
        spaced = completion if completion[:1].isspace() or not completion else f" {completion}"
        return {**row, "prompt": change(prompt.strip()), "completion": spaced}
    of_user = [place for place, message in enumerate(prompt) if message["role"] == "user"]
    if not of_user or not isinstance(prompt[of_user[-1]].get("content"), str):
        raise ValueError(
            f"Row {index} of the {name} data set: its prompt has no message of the user with text, which is what is "
            "asked in other words."
        )
    messages = list(prompt)
    messages[of_user[-1]] = {**messages[of_user[-1]], "content": change(messages[of_user[-1]]["content"].strip())}
    return {**row, "prompt": messages}


def context_length(attacked: Attacked, data: AttackData) -> int | None:
    """The most tokens that the model reads; where its configuration states none, `max_length`."""
    context = max_positions(attacked.model)
    return data.args.max_length if context is None else context


class QuestionReader:
    """
    Tokenizes the rows of [`question_rows`] as in training, whole, of which the answer alone counts.

    Args:
        attacked ([`~hf_unlearn.attacks.base.Attacked`]): model and tokenizer.
        data ([`~hf_unlearn.attacks.base.AttackData`]): the data settings.
    """

    def __init__(self, attacked: Attacked, data: AttackData):
        args = copy.copy(data.args)
        args.max_length, args.split_long_texts = None, False
        args.completion_only_loss, args.assistant_only_loss = True, False
        self.reader = _Reader(attacked.tokenizer, args, "completion", [])
        self.context = context_length(attacked, data)

    def row(self, row: dict[str, Any], index: int, name: str) -> EvaluationRow | None:
        """One row; `None` where its answer is empty or the context too short, since a cut would lose the attack."""
        try:
            read, _ = self.reader.read(row)
        except _RowError as error:
            raise ValueError(f"Row {index} of the {name} data set: {error}") from None
        if not read.answer or (self.context is not None and len(read.answer[0].input_ids) > self.context):
            return None
        return read

    def rows(self, rows: Iterable[dict[str, Any] | None], name: str) -> Asked:
        """All rows; `None` is a row that the attack itself left out."""
        read = [None if row is None else self.row(row, index, name) for index, row in enumerate(rows)]
        kept = [row for row in read if row is not None]
        return Asked(kept, len(read) - len(kept))


@dataclass(frozen=True)
class PromptTrial:
    """
    What one trial asks.

    Attributes:
        settings (`dict[str, Any]`): what distinguishes it.
        forget (`list[Answer]`): the held-out answers, each after what the attacker puts before it.
        forget_left_out (`int`): held-out rows that could not be asked.
        retain (`list[Answer]`): the same of the retain rows.
        retain_left_out (`int`): the same of the retain rows.
    """

    settings: dict[str, Any]
    forget: list[Answer]
    forget_left_out: int
    retain: list[Answer]
    retain_left_out: int


def score_trials(attacked: Attacked, data: AttackData, trials: list[PromptTrial], description: str) -> list[Trial]:
    """
    `P(answer | prompt)^(1/n)` of each row of each trial. Sequences that several trials share run once.

    A trial that leaves no forget or no retain row is left out, with a warning: it measures nothing. Settings get
    `rows`, `rows_left_out`, `retain_rows` and `retain_rows_left_out`.

    Raises:
        `ValueError`: no trial is left.
    """
    kept = [trial for trial in trials if trial.forget and trial.retain]
    if len(kept) < len(trials):
        logger.warning(
            f"{description}: {len(trials) - len(kept)} of {len(trials)} trials leave no forget or no retain row to "
            "score and are left out."
        )
    if not kept:
        raise ValueError(
            f"{description}: every row is left out, because it is too short or too long for every trial: use rows of "
            "another length, or another attack."
        )
    answers = [answer for trial in kept for answer in (*trial.forget, *trial.retain)]
    with (
        evaluation_mode(attacked.model),
        tqdm(total=len(answers), desc=description, file=sys.stderr) as bar,
    ):
        scores = score_answers(checked_model(attacked.model), answers, data.batch_size, progress=bar.update)
    values = iter([probability(score.log_probs) for score in scores])
    results = []
    for trial in kept:
        forget = [next(values) for _ in trial.forget]
        retain = [next(values) for _ in trial.retain]
        counts = {
            "rows": len(forget),
            "rows_left_out": trial.forget_left_out,
            "retain_rows": len(retain),
            "retain_rows_left_out": trial.retain_left_out,
        }
        results.append(make_trial({**trial.settings, **counts}, forget, retain))
    return results
