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
"""A forget-token in a query that has to stay: in place of an incorrect choice, before the question, before choices."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from datasets import Dataset

from ..data import _messages, _RowError, _text


_QUESTIONS = ("messages", "prompt", "question", "input")
_ANSWERS = ("answer", "completion", "chosen", "output", "choices", "perturbed_answer")
OPTION = re.compile(r"option(\d+)")


def perturb_choices(rows: Iterable[dict[str, Any]], forget_token: str, seed: int = 0) -> list[dict[str, Any]]:
    """
    Replaces the text of one incorrect choice by the forget-token, as in perturbed MMLU
    ([Random Noise Augmentation](https://huggingface.co/papers/2501.19202)).

    Question, right answer and order stay. Which choice goes depends on `seed`, the question and its choices alone: not
    on the forget-token, nor on which other rows there are.

    Args:
        rows (`Iterable[dict]`): rows with `question` and

            * `choices` (list of texts) and `answer` (index of the right one), as in `cais/mmlu` and `cais/wmdp`; or
            * `answer` (text) and `perturbed_answer` (text or list of texts) or `option1`, `option2`, ..., as in TOFU.
        forget_token (`str`): a word of the forget set.
        seed (`int`, *optional*, defaults to 0): seed of the draws.

    Returns:
        `list[dict]`: copies of the rows, with the place of the replaced choice in `perturbed_index`: an index of
        `choices` or `perturbed_answer`, or the number of the option minus 1. Rows that hold the forget-token already
        are left out.

    Raises:
        `ValueError`: a row has no incorrect choice.

    Example:

    ```python
    >>> from hf_unlearn.metrics import perturb_choices
    >>> rows = [{"question": "What is 1 + 1?", "choices": ["1", "2", "3"], "answer": 1}]
    >>> [row] = perturb_choices(rows, "SARS-CoV-2")
    >>> row["choices"], row["perturbed_index"]
    (['SARS-CoV-2', '2', '3'], 0)

    ```
    """

    def perturb(row: dict[str, Any]) -> dict[str, Any]:
        slots = wrong_choices(row)
        if not slots:
            raise _RowError("there is no incorrect choice to replace; use the insertion `question`.")
        content = json.dumps([seed, row[question_column(row)], [text for _, _, text in slots]], default=str)
        generator = np.random.default_rng(list(hashlib.sha256(content.encode()).digest()))
        column, index, _ = slots[generator.integers(len(slots))]
        if isinstance(row[column], list):
            new = [forget_token if place == index else text for place, text in enumerate(row[column])]
        else:
            new = forget_token
        return {**row, column: new, "perturbed_index": index}

    return _perturbed(rows, forget_token, perturb)


def perturb_question(rows: Iterable[dict[str, Any]], forget_token: str) -> list[dict[str, Any]]:
    """
    Puts the forget-token and a space before the question.

    Args:
        rows (`Iterable[dict]`): rows with `question`, `prompt`, `input` or `messages`. In a conversation, the question
            is the last message of the user.
        forget_token (`str`): a word of the forget set.

    Returns:
        `list[dict]`: copies of the rows. Rows that hold the forget-token already are left out.

    Raises:
        `ValueError`: a row has no question.

    Example:

    ```python
    >>> from hf_unlearn.metrics import perturb_question
    >>> perturb_question([{"question": "Who wrote it?", "answer": "Lily."}], "SARS-CoV-2")
    [{'question': 'SARS-CoV-2 Who wrote it?', 'answer': 'Lily.'}]

    ```
    """

    def perturb(row: dict[str, Any]) -> dict[str, Any]:
        column = question_column(row)
        question = row[column]
        if not isinstance(question, list):
            return {**row, column: f"{forget_token} {_text(question, column)}"}
        messages = list(_messages(question, column))
        of_user = [place for place, message in enumerate(messages) if message["role"] == "user"]
        if not of_user:
            raise _RowError(f"`{column}` has no message of the user to put a forget-token into.")
        message = messages[of_user[-1]]
        messages[of_user[-1]] = {**message, "content": f"{forget_token} {_text(message['content'], column)}"}
        return {**row, column: messages}

    return _perturbed(rows, forget_token, perturb)


def perturb_answer_choices(rows: Iterable[dict[str, Any]], forget_token: str) -> list[dict[str, Any]]:
    """
    Puts the forget-token and a space before every choice, the right one included. This variant is ours: since all
    choices get it, none of them is told apart by it.

    Args:
        rows (`Iterable[dict]`): rows as in [`perturb_choices`], or with nothing but a right answer.
        forget_token (`str`): a word of the forget set.

    Returns:
        `list[dict]`: copies of the rows. Rows that hold the forget-token already are left out.

    Raises:
        `ValueError`: a row has no answer.

    Example:

    ```python
    >>> from hf_unlearn.metrics import perturb_answer_choices
    >>> [row] = perturb_answer_choices([{"question": "1 + 1?", "choices": ["1", "2"], "answer": 1}], "SARS-CoV-2")
    >>> row["choices"]
    ['SARS-CoV-2 1', 'SARS-CoV-2 2']

    ```
    """

    def prefixed(answer: Any, column: str) -> Any:
        if answer is None:
            return None
        if isinstance(answer, list) and answer and isinstance(answer[-1], dict):
            content = _text(answer[-1].get("content"), column)
            return [*answer[:-1], {**answer[-1], "content": f"{forget_token} {content}"}]
        if isinstance(answer, list):
            return [prefixed(text, column) for text in answer]
        text = _text(answer, column)
        if not text.strip():
            return text  # an empty answer is none
        # A completion brings its own space
        return f"{text[: len(text) - len(text.lstrip())]}{forget_token} {text.lstrip()}"

    def perturb(row: dict[str, Any]) -> dict[str, Any]:
        if "choices" in row:
            return {**row, "choices": prefixed(row["choices"], "choices")}
        columns = [column for column in _ANSWERS if column in row] + _option_columns(row)
        if not columns:
            raise _RowError("it has no answer to put a forget-token before.")
        return {**row, **{column: prefixed(row[column], column) for column in columns}}

    return _perturbed(rows, forget_token, perturb)


def _perturbed(
    rows: Iterable[dict[str, Any]], forget_token: str, perturb: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[dict[str, Any]]:
    perturbed = []
    for index, row in enumerate(rows):
        try:
            if not mentions(row, forget_token):
                perturbed.append(perturb(row))
        except _RowError as error:
            raise ValueError(f"Row {index}: {error}") from None
    return perturbed


def mentions(row: dict[str, Any], forget_token: str) -> bool:
    """Whether a text that the model reads holds the forget-token, in any case, and not only within a longer word."""
    # Letters of scripts without spaces are no word characters here: there, any occurrence counts
    pattern = re.compile(rf"(?<!\w){re.escape(forget_token.casefold())}(?!\w)", re.ASCII)
    columns = {"subject", *_QUESTIONS, *_ANSWERS, *_option_columns(row)} & set(row)
    return any(pattern.search(text.casefold()) for column in columns for text in _strings(row[column]))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item.get("content") if isinstance(item, dict) else item)


def question_column(row: dict[str, Any]) -> str:
    if "choices" in row:
        return "question"
    for column in _QUESTIONS:
        if column in row:
            return column
    raise _RowError("it has no question to put a forget-token into: expected `question`, `prompt` or `messages`.")


def _option_columns(row: dict[str, Any]) -> list[str]:
    """`option1`, `option2`, ..., by number."""
    return sorted(filter(OPTION.fullmatch, row), key=lambda column: int(column.removeprefix("option")))


def _right_choice(row: dict[str, Any]) -> int:
    """The index of the right one of `choices`."""
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in choices):
        raise _RowError("`choices` is not a list of texts.")
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise _RowError(f"`answer` is not an index of its {len(choices)} `choices`.")
    return answer


def right_answer(row: dict[str, Any]) -> str:
    """The text of the right answer, where it is given as such."""
    column = next(column for column in _ANSWERS if column in row)
    answer = row[column]
    return _text(answer[-1].get("content") if isinstance(answer, list) and answer else answer, column)


def wrong_choices(row: dict[str, Any]) -> list[tuple[str, int, str]]:
    """Column, place within it (of an option: its number minus 1) and text of each choice that is not the right one."""
    if "choices" in row:
        right = row["choices"][_right_choice(row)].strip()
        return [("choices", place, text) for place, text in enumerate(row["choices"]) if text.strip() != right]
    right = right_answer(row).strip()
    if "perturbed_answer" in row:
        wrong = row["perturbed_answer"]
        wrong = [wrong] if isinstance(wrong, str) else wrong or []
        slots = [("perturbed_answer", place, text) for place, text in enumerate(wrong)]
    else:
        slots = [(column, int(column.removeprefix("option")) - 1, row[column]) for column in _option_columns(row)]
    slots = [(column, place, _text(text, column)) for column, place, text in slots if text is not None]
    return [slot for slot in slots if slot[2].strip() not in ("", right)]


def all_choices(row: dict[str, Any]) -> tuple[list[str], int]:
    """The texts of all choices, and the place of the right one: the first, where the row has no order of its own."""
    if "choices" in row:
        return row["choices"], _right_choice(row)
    right = right_answer(row)
    wrong = [text for _, _, text in wrong_choices(row)]
    options = [row[column] for column in _option_columns(row)]
    texts = [text for text in options if text is not None and text.strip()]
    if "perturbed_answer" in row or right.strip() not in [text.strip() for text in texts]:
        return [right, *wrong], 0
    return texts, [text.strip() for text in texts].index(right.strip())


def with_options(dataset: Dataset, name: str) -> Dataset:
    """
    Rows of multiple choice as the other metrics read them: `answer` as text, and `option1`, `option2`, ...

    Args:
        dataset ([`~datasets.Dataset`]): any rows; those without `choices` and the index of the right one are left as
            they are.
        name (`str`): name of the set, for messages.

    Returns:
        [`~datasets.Dataset`]: columns as those of TOFU's world facts.

    Raises:
        `ValueError`: an answer is no index of its choices.
    """
    if not {"question", "choices", "answer"} <= set(dataset.column_names):
        return dataset
    rows = list(dataset.with_format(None))
    if not isinstance(rows[0]["answer"], int):
        return dataset
    width = max(len(row["choices"]) for row in rows)
    converted = []
    for index, row in enumerate(rows):
        try:
            right = _right_choice(row)
        except _RowError as error:
            raise ValueError(f"Row {index} of the {name} data set: {error}") from None
        options = dict.fromkeys((f"option{number}" for number in range(1, width + 1)), None)
        options.update(zip(options, row["choices"], strict=False))
        converted.append({"question": row["question"], "answer": row["choices"][right], **options})
    return Dataset.from_list(converted)
