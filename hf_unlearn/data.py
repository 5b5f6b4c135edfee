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
Any TRL dataset format to tokens.

Prepared rows hold `input_ids` and `labels` (-100 where no loss is taken) and, where topics are used, `topic`. No row
is left without a label to learn from, and no message printed here repeats a row's text: forget sets hold what must not
be seen.
"""

import json
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import extract_prompt, maybe_convert_to_chatml
from trl.data_utils import common_prefix_length

from .config import UnlearnConfig


logger = get_logger(__name__)

IGNORE_INDEX = -100

_ACCEPTED = (
    "`text`, `messages`, `prompt` and `completion`, `question` and `answer`, `input` and `output`, or the columns of "
    "a preference data set (`prompt`, `chosen`, `rejected`; or `prompt`, `completion`, `label`)"
)


def require_map_style(dataset: Any, name: str) -> Dataset:
    """
    Refuses what the pairing of forget and retain rows cannot index.

    Raises:
        `ValueError`: the data set is missing, a dict of splits, streamed, or empty.
    """
    if dataset is None:
        raise ValueError(f"{name} is required.")
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{name} is streamed, but pairing forget and retain rows needs their number: load it without streaming, "
            "or take a part with `Dataset.from_list(list(dataset.take(n)))`."
        )
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{name} must be a `datasets.Dataset`, not {type(dataset).__name__}: choose one split.")
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: it needs at least one row.")
    return dataset


def split_by_label(dataset: Dataset) -> tuple[Dataset, Dataset | None]:
    """
    Splits an unpaired-preference data set (`prompt`, `completion`, `label`) into forget and retain rows.

    Args:
        dataset ([`~datasets.Dataset`]): rows whose label is `False` are forgotten, the others are kept.

    Returns:
        `tuple[Dataset, Dataset | None]`: forget rows and retain rows (`None` when there are none).

    Raises:
        `ValueError`: no row is labelled `False`, or a label is neither.
    """
    labels = list(dataset["label"])
    if not all(label in (True, False) for label in labels):
        # Read as a truth value, a missing label would be forgotten and "false" kept
        raise ValueError(
            "The column `label` of train_dataset must hold nothing but True (keep) and False (forget): fill in or "
            "convert the others."
        )
    forget = [index for index, label in enumerate(labels) if not label]
    retain = [index for index, label in enumerate(labels) if label]
    if not forget:
        raise ValueError(
            "No row of train_dataset has label False: label the rows to forget False, those to keep True."
        )
    dataset = dataset.remove_columns("label")
    return dataset.select(forget), dataset.select(retain) if retain else None


def split_sets(
    train_dataset: Dataset | None, retain_dataset: Dataset | None, args: UnlearnConfig
) -> tuple[Dataset, Dataset | None]:
    """The forget rows, and the retain rows where something is kept."""
    train_dataset = require_map_style(train_dataset, "train_dataset (the forget set)")
    if {"completion", "label"} <= set(train_dataset.column_names):
        if retain_dataset is not None:
            raise ValueError(
                "train_dataset has a `label` column, which splits it into forget and retain rows, and retain_dataset "
                "is given too: remove one of them."
            )
        train_dataset, retain_dataset = split_by_label(train_dataset)
    if args.retain_loss == ["none"]:
        return train_dataset, None
    if retain_dataset is None:
        raise ValueError(
            f"retain_loss={args.retain_loss} needs a retain_dataset; to keep nothing on purpose, set "
            'retain_loss="none".'
        )
    return train_dataset, require_map_style(retain_dataset, "retain_dataset")


def topics_of(forget: Dataset, args: UnlearnConfig) -> list[str] | None:
    if args.topic_column is None:
        return None
    if args.topic_column not in forget.column_names:
        raise ValueError(f"The forget set has no column {args.topic_column!r}: set topic_column to one that it has.")
    return sorted({str(topic) for topic in forget[args.topic_column]})


def rows_of_topics(retain: Dataset, topics: list[str], args: UnlearnConfig) -> Dataset:
    """The retain rows whose topic is forgotten; each topic must have some."""
    if missing := set(topics) - {str(topic) for topic in retain[args.topic_column]}:
        raise ValueError(
            f"The retain set has a column {args.topic_column!r} but no rows for {len(missing)} of the forget topics: "
            "add some, or remove the column so that all topics share the retain rows."
        )
    rows = [row for row, topic in enumerate(retain[args.topic_column]) if str(topic) in topics]
    return retain.select(rows)


def prepare_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: UnlearnConfig,
    name: str,
    topics: list[str] | None = None,
    refusals: list[str] | None = None,
) -> Dataset:
    """
    Tokenizes one data set of any TRL format.

    | columns | what counts in the loss |
    |---|---|
    | `text` (or `args.dataset_text_field`) | every token |
    | `messages` | every token; assistant turns with `args.assistant_only_loss` |
    | `prompt`, `completion` | the completion, unless `args.completion_only_loss=False` |
    | `prompt`, `chosen`, `rejected` | as prompt and completion: `rejected` in a forget set, `chosen` elsewhere |
    | `question`, `answer` or `input`, `output` | the answer |
    | `input_ids` | as given; `labels` where given |

    A question and its answer become a chat where the tokenizer has a chat template, else they are joined by a space.

    Text that does not end with the EOS token gets one, as in TRL; chats do not.

    Args:
        dataset ([`~datasets.Dataset`]): the rows.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's tokenizer.
        args ([`UnlearnConfig`]): `max_length`, `dataset_text_field` and the other data settings.
        name (`str`): for messages; a name that starts with `forget` takes `rejected` answers.
        topics (`list[str]`, *optional*): names of the topics; their index is kept as `topic`.
        refusals (`list[str]`, *optional*): each row gets another answer to its prompt: its own `chosen` in preference
            data, else one of these, drawn from `args.seed` and the number of the row.

    Returns:
        [`~datasets.Dataset`]: `input_ids`, `labels`; with topics, `topic`; with refusals, `alternative_input_ids` and
        `alternative_labels`. Rows without a token to learn from (an empty completion) are left out, with a warning.

    Raises:
        `ValueError`: no known columns, a value of another type, no chat template, no usable row, or no prompts that
            another answer could be given to.
    """
    # Without a format: rows of plain values, not of tensors
    dataset = require_map_style(dataset, f"The {name} data set").with_format(None)
    columns = set(dataset.column_names)
    options: dict[str, Any] = {"num_proc": args.dataset_num_proc}

    with PartialState().main_process_first():
        if not {"input_ids", "messages", args.dataset_text_field} & columns:
            if "conversations" in columns:
                dataset = dataset.map(
                    maybe_convert_to_chatml, remove_columns="conversations", desc=f"Converting {name}", **options
                )
            elif {"chosen", "rejected"} <= columns and "prompt" not in columns:
                dataset = dataset.map(
                    _extract_prompt,
                    with_indices=True,
                    fn_kwargs={"name": name},
                    desc=f"Extracting the prompts of {name}",
                    **options,
                )
        answer = _answer_column(set(dataset.column_names), args.dataset_text_field, name)
        if refusals is not None and answer not in _QUESTION_OF:
            raise ValueError(
                f"The {name} data set has `{answer}`, but dpo and idk need prompts to give another answer to: use "
                "`prompt` and `completion`, `question` and `answer`, or preference data; or another forget_loss."
            )

        rows = dataset.map(
            _tokenize_batch,
            batched=True,
            with_indices=True,
            remove_columns=dataset.column_names,
            fn_kwargs={
                "tokenizer": tokenizer,
                "answer_column": answer,
                "name": name,
                "topics": topics,
                "topic_column": args.topic_column if topics is not None else None,
                "text_column": args.dataset_text_field,
                "completion_only": args.completion_only_loss is not False,
                "assistant_only": args.assistant_only_loss,
                "max_length": args.max_length,
                "split_long_texts": args.split_long_texts,
                "refusals": refusals,
                "seed": args.seed,
            },
            desc=f"Tokenizing {name}",
            **options,
        )
    cuts = list(rows["cut"])
    if all(cut == "everything" for cut in cuts):
        raise ValueError(
            f"No row of the {name} data set has a token to learn from: every row is empty or masked. "
            "Give rows whose answers have text, or raise max_length where they are cut off."
        )
    _report_cuts(cuts, len(dataset), name, args.max_length)
    if "everything" in cuts:
        rows = rows.select([index for index, cut in enumerate(cuts) if cut != "everything"])
    return rows.remove_columns("cut")


def _answer_column(columns: set[str], text_column: str, name: str) -> str:
    """The column that holds what is forgotten or kept."""
    for column in ("input_ids", "messages", text_column):
        if column in columns:
            return column
    if "prompt" in columns and {"chosen", "rejected"} <= columns:
        return "rejected" if name.startswith("forget") else "chosen"
    for question, answer in (("prompt", "completion"), ("question", "answer"), ("input", "output")):
        if {question, answer} <= columns:
            if answer == "output" and "instruction" in columns:  # alpaca's rows: without it, another question
                raise ValueError(
                    f"The {name} data set has an `instruction` beside `input` and `output`, which would be left out: "
                    "join the question's parts into `prompt` and `completion`, or into `messages`."
                )
            return answer
        if question in columns or answer in columns:
            present, missing = (question, answer) if question in columns else (answer, question)
            raise ValueError(f"The {name} data set has a column `{present}` but no `{missing}`: add it or rename it.")
    raise ValueError(
        f"The {name} data set has none of the columns that hf-unlearn reads: it has "
        f"{', '.join(f'`{column}`' for column in sorted(columns))}; expected {_ACCEPTED}. Rename the columns, or set "
        "dataset_text_field."
    )


_QUESTION_OF = {
    "completion": "prompt",
    "chosen": "prompt",
    "rejected": "prompt",
    "answer": "question",
    "output": "input",
}


def _extract_prompt(example: dict[str, Any], index: int, name: str) -> dict[str, Any]:
    """TRL's own, on rows that have both answers."""
    for column in ("chosen", "rejected"):
        if not example[column]:
            raise ValueError(f"Row {index} of the {name} data set: `{column}` is empty.")
    return extract_prompt(example)


def _tokenize_batch(
    batch: dict[str, list],
    indices: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    answer_column: str,
    name: str,
    topics: list[str] | None,
    topic_column: str | None,
    text_column: str,
    completion_only: bool,
    assistant_only: bool,
    max_length: int | None,
    split_long_texts: bool,
    refusals: list[str] | None,
    seed: int,
) -> dict[str, list]:
    output: dict[str, list] = {"input_ids": [], "labels": [], "cut": []}
    if refusals is not None:
        output.update(alternative_input_ids=[], alternative_labels=[])
    if topics is not None:
        output["topic"] = []
    for position, index in enumerate(indices):
        example = {column: values[position] for column, values in batch.items()}
        try:
            input_ids, labels = _tokenize_example(
                example, tokenizer, answer_column, text_column, completion_only, assistant_only
            )
            if refusals is not None:
                refusal = refusals[np.random.default_rng([seed, index]).integers(len(refusals))]
                other = {**example, answer_column: _alternative(example, answer_column, refusal)}
                alternative = _tokenize_example(
                    other, tokenizer, answer_column, text_column, completion_only, assistant_only
                )
                if all(label == IGNORE_INDEX for label in alternative[1][1:]):
                    raise _RowError("`chosen` is empty, but it is the answer to give instead.")
                [(alternative_ids, alternative_labels)], _ = _fit(
                    *alternative, max_length, False, tokenizer.bos_token_id
                )
        except _RowError as error:
            raise ValueError(f"Row {index} of the {name} data set: {error}") from None
        splits = split_long_texts and IGNORE_INDEX not in labels
        pieces, cut = _fit(input_ids, labels, max_length, splits, tokenizer.bos_token_id)
        for input_ids, labels in pieces:
            is_empty = all(label == IGNORE_INDEX for label in labels[1:])
            output["input_ids"].append(input_ids)
            output["labels"].append(labels)
            output["cut"].append("everything" if is_empty else cut)  # counted later, and such rows left out
            if topics is not None:
                output["topic"].append(topics.index(str(example[topic_column])))
            if refusals is not None:
                output["alternative_input_ids"].append(alternative_ids)
                output["alternative_labels"].append(alternative_labels)
    return output


def _alternative(example: dict[str, Any], answer_column: str, refusal: str) -> str | list[dict[str, Any]]:
    """Another answer to the row's prompt, in the form of its own answer."""
    if answer_column == "rejected":
        return example["chosen"]
    answer = example[answer_column]
    if isinstance(answer, list):
        return [{"role": "assistant", "content": refusal}]
    if answer_column != "completion":
        return refusal
    # A completion is joined to its prompt as it is
    return answer[: len(answer) - len(answer.lstrip())] + refusal


class _RowError(Exception):
    """What is wrong with one row, without its text; becomes a ValueError that names the row."""


def _tokenize_example(
    example: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    answer_column: str,
    text_column: str,
    completion_only: bool,
    assistant_only: bool,
) -> tuple[list[int], list[int]]:
    answer = example[answer_column]
    if answer_column == "input_ids":
        return _given_tokens(example)

    if answer_column == "messages":
        answer = _messages(answer, answer_column)
        input_ids, assistant_mask = _apply_chat_template(tokenizer, example, answer, assistant_only)
        return input_ids, _mask(input_ids, assistant_mask)

    if answer_column == text_column:
        input_ids = _encode(_text(answer, answer_column), tokenizer)
        return input_ids, list(input_ids)

    question_column = _QUESTION_OF[answer_column]
    question = example[question_column]
    if answer_column in ("answer", "output"):
        question, answer = _text(question, question_column), _text(answer, answer_column)
        if tokenizer.chat_template is not None:
            question = [{"role": "user", "content": question}]
            answer = [{"role": "assistant", "content": answer}]
        else:
            answer = f" {answer}"

    if isinstance(answer, list):
        if not isinstance(question, list):
            raise _RowError(f"`{answer_column}` is a list of messages but `{question_column}` is not.")
        question, answer = _messages(question, question_column), _messages(answer, answer_column)
        prompt_ids, _ = _apply_chat_template(tokenizer, example, question, add_generation_prompt=True)
        input_ids, assistant_mask = _apply_chat_template(tokenizer, example, question + answer, assistant_only)
    else:
        prompt, completion = _text(question, question_column), _text(answer, answer_column)
        prompt_ids = tokenizer(prompt)["input_ids"]
        # Together, so that tokens may merge across the border as they do when the model reads both
        input_ids = _encode(prompt + completion, tokenizer)
        assistant_mask = None
        if assistant_only:
            raise _RowError("`assistant_only_loss=True` needs conversations (lists of messages), not text.")
    labels = _mask(input_ids, assistant_mask)
    if _is_empty(example[answer_column]):
        return input_ids, [IGNORE_INDEX] * len(input_ids)  # an EOS token alone is nothing to forget or to keep
    if completion_only:
        start = common_prefix_length(prompt_ids, input_ids)
        labels = [IGNORE_INDEX] * start + labels[start:]
    return input_ids, labels


def _is_empty(answer: str | list[dict[str, Any]]) -> bool:
    if isinstance(answer, str):
        return not answer.strip()
    return not any(message.get("tool_calls") or str(message["content"]).strip() for message in answer)


def _apply_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    example: dict[str, Any],
    messages: list[dict[str, Any]],
    assistant_only: bool = False,
    add_generation_prompt: bool = False,
) -> tuple[list[int], list[int] | None]:
    if tokenizer.chat_template is None:
        raise _RowError(
            "it is a conversation, but the tokenizer has no chat template: set chat_template_path to a tokenizer that "
            "has one, or to a .jinja file."
        )
    tools = example.get("tools")
    try:
        encoded = tokenizer.apply_chat_template(
            messages,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=assistant_only,
            **(example.get("chat_template_kwargs") or {}),
        )
    except (TemplateError, TypeError) as error:
        # A template's own message may repeat what it was given
        raise _RowError(
            f"the chat template refuses it ({type(error).__name__}): check the roles, their order and the fields of "
            "the messages."
        ) from None
    if not assistant_only:
        return encoded["input_ids"], None
    if 1 not in encoded["assistant_masks"]:
        raise _RowError(
            "`assistant_only_loss=True`, but the chat template marks no assistant tokens: use one with "
            "`{% generation %}` (chat_template_path)."
        )
    return encoded["input_ids"], encoded["assistant_masks"]


def _mask(input_ids: list[int], mask: list[int] | None) -> list[int]:
    if mask is None:
        return list(input_ids)
    return [token if keep else IGNORE_INDEX for token, keep in zip(input_ids, mask, strict=True)]


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise _RowError(f"`{column}` is {type(value).__name__}, expected text.")
    return value


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise _RowError(f"`{column}` is {found}, expected a list of messages.")
    for message in value:
        if not isinstance(message, dict) or message.get("role") is None:
            raise _RowError(f"`{column}` has a message without a `role`.")
        if message.get("content") is None and not message.get("tool_calls"):
            # Templates print nothing, or "None", for it: a row with an empty turn, without an error
            raise _RowError(f"`{column}` has a message without `content`.")
    return value


def _given_tokens(example: dict[str, Any]) -> tuple[list[int], list[int]]:
    input_ids, labels = example["input_ids"], example.get("labels")
    labels = input_ids if labels is None else labels
    for column, values in (("input_ids", input_ids), ("labels", labels)):
        if not isinstance(values, list) or not all(isinstance(token, int) for token in values):
            raise _RowError(f"`{column}` is not a list of token ids.")
    if len(labels) != len(input_ids):
        raise _RowError("`input_ids` and `labels` differ in length.")
    if 0 in (example.get("attention_mask") or []):
        raise _RowError("`input_ids` is padded (`attention_mask` has zeros): leave padding to the collator.")
    return list(input_ids), list(labels)


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text, the last of them EOS, as in TRL; some tokenizers add it themselves."""
    input_ids, eos = tokenizer(text)["input_ids"], tokenizer.eos_token_id
    return input_ids if eos is None or input_ids[-1:] == [eos] else [*input_ids, eos]


def _fit(
    input_ids: list[int], labels: list[int], max_length: int | None, split: bool, bos_token_id: int | None
) -> tuple[list[tuple[list[int], list[int]]], str]:
    """
    Cuts a row to `max_length` and never leaves it without a label.

    Returns the pieces (one, unless `split`) and what was cut: `""`, `"end"` or `"prompt"`.
    """
    if max_length is None or len(input_ids) <= max_length:
        return [(input_ids, labels)], ""
    if split:
        # The first token of a window has nothing before it to be predicted from: a last window of one is left out.
        starts = list(range(0, len(input_ids) - 1, max_length))
        return [(input_ids[s : s + max_length], labels[s : s + max_length]) for s in starts], ""
    first = next((t for t in range(1, len(labels)) if labels[t] != IGNORE_INDEX), 0)
    if first < max_length:
        return [(input_ids[:max_length], labels[:max_length])], "end"
    # The prompt alone fills the row. A forget row without its answer would forget nothing: the prompt gives up its
    # beginning instead, and up to half of the row is left to the answer.
    kept = min(len(input_ids) - first, max(1, max_length // 2))
    stop = first + kept
    if input_ids[0] == bos_token_id and max_length > kept + 1:
        start = stop - max_length + 1
        return [([input_ids[0], *input_ids[start:stop]], [IGNORE_INDEX, *labels[start:stop]])], "prompt"
    return [(input_ids[stop - max_length : stop], labels[stop - max_length : stop])], "prompt"


def _report_cuts(cuts: list[str], num_rows: int, name: str, max_length: int | None) -> None:
    ends, prompts, empty = cuts.count("end"), cuts.count("prompt"), cuts.count("everything")
    if empty:
        logger.warning(f"{empty} of {num_rows} {name} rows have no token to learn from and are left out.")
    if ends:
        logger.warning(
            f"{ends} of {num_rows} {name} rows are longer than max_length={max_length} and lose their end: raise "
            "max_length, or set split_long_texts=True for plain text."
        )
    if prompts:
        logger.warning(
            f"{prompts} of {num_rows} {name} rows have a prompt that fills max_length={max_length}: the prompt loses "
            "its beginning so that the answer stays. Raise max_length to avoid it."
        )


def count_overlap(forget: Dataset, retain: Dataset) -> int:
    """Number of forget rows whose tokens also stand in the retain set: the two losses then pull against each other."""
    kept = {hash(tuple(row)) for batch in retain.iter(1000) for row in batch["input_ids"]}
    return sum(hash(tuple(row)) in kept for batch in forget.iter(1000) for row in batch["input_ids"])
