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
"""Every format of data sets to exact tokens, with a real tokenizer; and what is refused, without repeating a row."""

import logging
import random
import traceback

import pytest
from datasets import Dataset, DatasetDict
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from hf_unlearn import UnlearnConfig
from hf_unlearn.data import (
    count_overlap,
    prepare_dataset,
    require_map_style,
    rows_of_topics,
    split_by_label,
    split_sets,
    topics_of,
)
from hf_unlearn.pairing import DataCollatorForUnlearning


IGNORED = -100
BOS, EOS = 1, 2

# Tokens of the tokenizer of tinystories-260k, where a leading space is part of a word: "Tim ran." is _Tim _r an .
TIM_RAN = [326, 352, 303, 426]
HE_RAN = [346, 352, 303, 426]
HE_SAT = [346, 262, 294, 426]
THE_CAT = [291, 280, 294]
SAT = [262, 294, 426]
RAN = [352, 303, 426]
WHO_IS_TIM = [410, 448, 415, 414, 410, 293, 326, 450]
# The chat template of the fixture: "<s><|user|> Hi\n", then "<|assistant|> Tim ran.</s>". The generation prompt ends
# with a space, which is a token of its own (410) until an answer follows, whose first word takes it in.
USER_HI = [BOS, 410, 504, 506, 425, 419, 285, 506, 505, 320, 417, 13]
ASSISTANT = [504, 506, 412, 419, 419, 293, 413, 303, 413, 506, 505]
USER_YES = [410, 504, 506, 425, 419, 285, 506, 505, 410, 452, 406, 13]


def user(content="Hi"):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def masked(*parts):
    """Labels from parts: a number masks as many tokens, a list counts."""
    return [label for part in parts for label in ([IGNORED] * part if isinstance(part, int) else part)]


@pytest.fixture
def config(tmp_path):
    def make(**options):
        return UnlearnConfig(output_dir=str(tmp_path), use_cpu=True, **options)

    return make


@pytest.fixture
def prepare(config, tokenizer):
    def run(rows, name="forget", tokenizer=tokenizer, topics=None, **options):
        dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
        return prepare_dataset(dataset, tokenizer, config(**options), name, topics)

    return run


def first_row(dataset):
    assert set(dataset.column_names) == {"input_ids", "labels"}
    assert len(dataset) == 1
    return dataset[0]["input_ids"], dataset[0]["labels"]


# ---- Formats ----


@pytest.mark.parametrize(
    "row, options, input_ids, labels",
    [
        ({"text": "Tim ran."}, {}, [BOS, *TIM_RAN, EOS], [BOS, *TIM_RAN, EOS]),
        ({"story": "He sat."}, {"dataset_text_field": "story"}, [BOS, *HE_SAT, EOS], [BOS, *HE_SAT, EOS]),
        # EOS stands at the end once, also where the text has it
        ({"text": "Tim ran.</s>"}, {}, [BOS, *TIM_RAN, EOS], [BOS, *TIM_RAN, EOS]),
        (
            {"prompt": "The cat", "completion": " sat."},
            {},
            [BOS, *THE_CAT, *SAT, EOS],
            masked(4, [*SAT, EOS]),
        ),
        (
            {"prompt": "The cat", "completion": " sat.</s>"},
            {"completion_only_loss": True},
            [BOS, *THE_CAT, *SAT, EOS],
            masked(4, [*SAT, EOS]),
        ),
        (
            {"prompt": "The cat", "completion": " sat."},
            {"completion_only_loss": False},
            [BOS, *THE_CAT, *SAT, EOS],
            [BOS, *THE_CAT, *SAT, EOS],
        ),
        # "Ti" alone is two tokens, but "Tim" is one: tokens merge across the border as when the model reads both
        ({"prompt": "Ti", "completion": "m ran."}, {}, [BOS, *TIM_RAN, EOS], masked(1, [*TIM_RAN, EOS])),
        # Without a chat template, a space joins question and answer
        (
            {"question": "Who is Tim?", "answer": "He ran."},
            {},
            [BOS, *WHO_IS_TIM, *HE_RAN, EOS],
            masked(9, [*HE_RAN, EOS]),
        ),
        (
            {"input": "Who is Tim?", "output": "He sat.", "id": "7"},
            {},
            [BOS, *WHO_IS_TIM, *HE_SAT, EOS],
            masked(9, [*HE_SAT, EOS]),
        ),
        # Given as tokens: nothing is added
        ({"input_ids": [5, 6, 7]}, {}, [5, 6, 7], [5, 6, 7]),
        ({"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {}, [5, 6, 7], [IGNORED, 6, 7]),
        ({"input_ids": [5, 6, 7], "labels": None, "attention_mask": [1, 1, 1]}, {}, [5, 6, 7], [5, 6, 7]),
    ],
)
def test_standard_formats(prepare, row, options, input_ids, labels):
    assert first_row(prepare([row], **options)) == (input_ids, labels)


PREFERENCES = [
    {"prompt": "The cat", "chosen": " sat.", "rejected": " ran."},
    {"chosen": "The cat sat.", "rejected": "The cat ran."},  # the prompt is what both begin with
]


@pytest.mark.parametrize("row", PREFERENCES)
@pytest.mark.parametrize("name, answer", [("forget", RAN), ("forget_eval", RAN), ("retain", SAT), ("eval", SAT)])
def test_preference_forgets_the_rejected_answer_and_keeps_the_chosen_one(prepare, row, name, answer):
    expected = [BOS, *THE_CAT, *answer, EOS], masked(4, [*answer, EOS])
    assert first_row(prepare([row], name=name)) == expected


CHAT_IDS = [*USER_HI, *ASSISTANT, *TIM_RAN, EOS]
CHAT_LABELS = masked(23, [*TIM_RAN, EOS])


@pytest.mark.parametrize(
    "row, labels",
    [
        ({"messages": [user(), assistant("Tim ran.")]}, CHAT_IDS),
        ({"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Tim ran."}]}, CHAT_IDS),
        ({"prompt": [user()], "completion": [assistant("Tim ran.")]}, CHAT_LABELS),
        ({"prompt": [user()], "chosen": [assistant("He ran.")], "rejected": [assistant("Tim ran.")]}, CHAT_LABELS),
        ({"chosen": [user(), assistant("He ran.")], "rejected": [user(), assistant("Tim ran.")]}, CHAT_LABELS),
        # With a chat template, a question and its answer are a chat
        ({"question": "Hi", "answer": "Tim ran."}, CHAT_LABELS),
        ({"input": "Hi", "output": "Tim ran."}, CHAT_LABELS),
    ],
)
def test_conversational_formats(prepare, chat_tokenizer, row, labels):
    assert first_row(prepare([row], tokenizer=chat_tokenizer())) == (CHAT_IDS, labels)


def test_chat_template_leaves_text_alone(prepare, chat_tokenizer):
    # Prompt and completion as text are taken as written, as in TRL
    row = {"prompt": "The cat", "completion": " sat."}
    assert first_row(prepare([row], tokenizer=chat_tokenizer()))[0] == [BOS, *THE_CAT, *SAT, EOS]


def test_assistant_only_loss_counts_every_turn_of_the_assistant(prepare, chat_tokenizer):
    row = {"messages": [user(), assistant("He ran."), user("Yes"), assistant("He sat.")]}
    input_ids = [*USER_HI, *ASSISTANT, *HE_RAN, EOS, *USER_YES, *ASSISTANT, *HE_SAT, EOS]
    tokenizer = chat_tokenizer(generation=True)
    assert first_row(prepare([row], tokenizer=tokenizer)) == (input_ids, input_ids)
    labels = masked(23, [*HE_RAN, EOS], 23, [*HE_SAT, EOS])
    assert first_row(prepare([row], tokenizer=tokenizer, assistant_only_loss=True)) == (input_ids, labels)


def test_assistant_only_loss_of_prompt_and_completion_is_on_the_completion(prepare, chat_tokenizer):
    row = {"prompt": [user(), assistant("He ran."), user("Yes")], "completion": [assistant("He sat.")]}
    input_ids, labels = first_row(prepare([row], tokenizer=chat_tokenizer(generation=True), assistant_only_loss=True))
    assert labels == masked(len(input_ids) - 5, [*HE_SAT, EOS])


def test_eos_that_the_tokenizer_adds_itself_stands_once(prepare, tokenizer):
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert tokenizer("Tim ran.")["input_ids"] == [BOS, *TIM_RAN, EOS]
    assert first_row(prepare([{"text": "Tim ran."}])) == ([BOS, *TIM_RAN, EOS], [BOS, *TIM_RAN, EOS])
    row = {"prompt": "The cat", "completion": " sat."}
    assert first_row(prepare([row])) == ([BOS, *THE_CAT, *SAT, EOS], masked(4, [*SAT, EOS]))


def test_tokenizer_without_eos(prepare, tokenizer):
    tokenizer.eos_token = None
    assert first_row(prepare([{"text": "Tim ran."}]))[0] == [BOS, *TIM_RAN]


def test_formatted_data_set_is_read_as_plain_values(prepare):
    dataset = Dataset.from_list([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]).with_format("torch")
    assert prepare(dataset)["input_ids"][:] == [[5, 6, 7], [8, 9]]


def test_rows_of_lume(prepare, lume_rows, tokenizer):
    rows = lume_rows("forget")[:40]
    prepared = prepare(rows, max_length=None)
    assert len(prepared) == 40
    for row, tokens in zip(rows, prepared, strict=True):
        assert tokens["input_ids"] == [*tokenizer(f"{row['input']} {row['output']}")["input_ids"], EOS]
        start = tokens["labels"].count(IGNORED)
        assert tokens["labels"] == masked(start, tokens["input_ids"][start:])
        answer = tokenizer.decode(tokens["input_ids"][start:-1]).strip()
        # The border may take a piece of the question in where tokens merge across it
        assert answer.endswith(row["output"].strip()) and len(answer) <= len(row["output"]) + 3


def test_rows_of_tofu_with_and_without_a_chat_template(prepare, tofu_rows, tokenizer, chat_tokenizer):
    rows = tofu_rows("forget01")
    plain, chat = prepare(rows), prepare(rows, tokenizer=chat_tokenizer())
    for row, *both in zip(rows, plain, chat, strict=True):
        for tokens in both:
            counted = [label for label in tokens["labels"] if label != IGNORED]
            assert tokenizer.decode(counted).strip() == f"{row['answer']}</s>"


def test_processes_give_the_same_rows(prepare, tofu_rows):
    rows = tofu_rows("forget01")
    assert prepare(rows, dataset_num_proc=2).to_list() == prepare(rows).to_list()


# ---- Labels, topics, overlap ----


def test_unpaired_preference_is_split_by_label(config, prepare):
    rows = [
        {"prompt": "The cat", "completion": " sat.", "label": True},
        {"prompt": "The cat", "completion": " ran.", "label": False},
        {"prompt": "Tim", "completion": " ran.", "label": True},
    ]
    forget, retain = split_by_label(Dataset.from_list(rows))
    assert forget.to_list() == [{"prompt": "The cat", "completion": " ran."}]
    assert retain.to_list() == [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows[::2]]
    assert first_row(prepare(forget)) == ([BOS, *THE_CAT, *RAN, EOS], masked(4, [*RAN, EOS]))
    # The trainer's arguments
    assert [len(part) for part in split_sets(Dataset.from_list(rows), None, config())] == [1, 2]
    assert split_sets(Dataset.from_list(rows), None, config(retain_loss="none"))[1] is None


def test_all_rows_may_be_forgotten():
    forget, retain = split_by_label(Dataset.from_list([{"prompt": "a", "completion": "b", "label": False}] * 2))
    assert len(forget) == 2 and retain is None


@pytest.mark.parametrize(
    "labels, complaint",
    [
        ([True, True], "No row of train_dataset has label False"),
        # A missing label would be forgotten if it was read as a truth value, and "false" would be kept
        ([True, None], "nothing but True"),
        (["true", "false"], "nothing but True"),
        ([0, 2], "nothing but True"),
    ],
)
def test_labels_that_do_not_say_what_to_forget(labels, complaint):
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in labels]
    with pytest.raises(ValueError, match=complaint):
        split_by_label(Dataset.from_list(rows))


def test_labels_of_zero_and_one():
    rows = [{"prompt": "a", "completion": str(label), "label": label} for label in (1, 0)]
    forget, retain = split_by_label(Dataset.from_list(rows))
    assert (forget["completion"][:], retain["completion"][:]) == (["0"], ["1"])


def test_sets_that_contradict_the_configuration(config):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b", "label": False}])
    text = Dataset.from_list([{"text": "a"}])
    with pytest.raises(ValueError, match="retain_dataset is given too: remove one of them"):
        split_sets(rows, text, config())
    with pytest.raises(ValueError, match='needs a retain_dataset; to keep nothing on purpose, set retain_loss="none"'):
        split_sets(text, None, config())
    with pytest.raises(ValueError, match=r"train_dataset \(the forget set\) is required"):
        split_sets(None, text, config())
    assert split_sets(text, text, config(retain_loss="none")) == (text, None)
    assert split_sets(text, rows.remove_columns("label"), config())[1].num_rows == 1


def test_topics(config, prepare):
    forget = Dataset.from_list([{"text": "Tim ran.", "about": topic} for topic in ("cyber", "bio", "cyber")])
    retain = Dataset.from_list([{"text": text, "about": topic} for text, topic in (("a", "bio"), ("b", "law"))])
    args = config(topic_column="about")
    topics = topics_of(forget, args)
    assert topics == ["bio", "cyber"]
    prepared = prepare(forget, topics=topics, topic_column="about")
    assert set(prepared.column_names) == {"input_ids", "labels", "topic"}
    assert prepared["topic"][:] == [1, 0, 1]
    assert topics_of(forget, config()) is None

    # Retain rows of a topic that is not forgotten go; a topic without retain rows is an error
    assert rows_of_topics(retain, ["bio"], args)["text"][:] == ["a"]
    with pytest.raises(ValueError, match="no rows for 1 of the forget topics") as error:
        rows_of_topics(retain, topics, args)
    assert "cyber" not in str(error.value)
    with pytest.raises(ValueError, match="has no column 'subject': set topic_column"):
        topics_of(forget, config(topic_column="subject"))


def test_topics_that_are_numbers(config, prepare):
    forget = Dataset.from_list([{"text": "Tim ran.", "about": topic} for topic in (7, 3, 7)])
    topics = topics_of(forget, config(topic_column="about"))
    assert topics == ["3", "7"]
    assert prepare(forget, topics=topics, topic_column="about")["topic"][:] == [1, 0, 1]
    assert rows_of_topics(forget, ["7"], config(topic_column="about"))["about"][:] == [7, 7]


def test_every_piece_of_a_split_text_has_its_topic(prepare):
    rows = [{"input_ids": list(range(10, 20)), "about": "b"}, {"input_ids": [5, 6], "about": "a"}]
    prepared = prepare(rows, topics=["a", "b"], topic_column="about", max_length=4, split_long_texts=True)
    assert prepared["topic"][:] == [1, 1, 1, 0]


def test_overlap_counts_forget_rows_that_are_also_kept(prepare):
    forget = prepare([{"text": text} for text in ("Tim ran.", "He sat.", "Tim ran.", "The cat sat.")])
    retain = prepare([{"text": text} for text in ("He ran.", "Tim ran.", "The cat sat. Yes")], name="retain")
    assert count_overlap(forget, retain) == 2
    assert count_overlap(retain, forget) == 1
    assert count_overlap(forget, forget) == 4


# ---- Truncation ----


def random_rows(generator, number=60, longest=30):
    """Rows as a tokenizer gives them: BOS (mostly), a prompt, an answer. No token comes twice in a row."""
    rows = []
    for _ in range(number):
        length = generator.randint(2, longest)
        prompt = generator.randint(0, length - 1)
        input_ids = generator.sample(range(10, 500), length)
        if generator.random() < 0.8:
            input_ids[0] = BOS
        labels = masked(prompt, input_ids[prompt:])
        if generator.random() < 0.2:
            labels[0] = input_ids[0]  # given as tokens: counted, but nothing predicts it
        rows.append({"input_ids": input_ids, "labels": labels})
    return rows


@pytest.mark.parametrize("max_length", range(2, 21))
def test_no_row_is_left_without_its_answer_and_none_is_too_long(prepare, max_length):
    """The public defects: `max_length` is ignored, and a row whose prompt fills it gives NaN."""
    rows = random_rows(random.Random(max_length))
    prepared = prepare(rows, max_length=max_length)
    assert len(prepared) == len(rows)
    for row, cut in zip(rows, prepared, strict=True):
        input_ids, labels = cut["input_ids"], cut["labels"]
        assert len(input_ids) == len(labels) == min(max_length, len(row["input_ids"]))
        assert any(label != IGNORED for label in labels[1:])
        assert all(label in (IGNORED, token) for token, label in zip(input_ids, labels, strict=True))
        # What the model is to say first is what it was to say first in the whole row
        first, first_before = (
            next(label for label in values[1:] if label != IGNORED) for values in (labels, row["labels"])
        )
        assert first == first_before
        # Past a kept BOS, what is left is one piece of the row
        start = row["input_ids"].index(input_ids[1])
        assert input_ids[1:] == row["input_ids"][start : start + len(input_ids) - 1]
        assert labels[1:] == row["labels"][start : start + len(input_ids) - 1]
        if row["input_ids"][0] == BOS and max_length >= 3:
            assert input_ids[0] == BOS


@pytest.mark.parametrize(
    "prompt, answer, max_length, kept_prompt, kept_answer",
    [
        (4, 4, 8, [0, 1, 2, 3], 4),  # fits
        (4, 4, 6, [0, 1, 2, 3], 2),  # the end goes
        (4, 4, 5, [0, 1, 2, 3], 1),
        # The prompt fills the row: half of it is left to the answer, the other half to BOS and the prompt's end
        (8, 4, 8, [0, 5, 6, 7], 4),
        (8, 9, 8, [0, 5, 6, 7], 4),
        (8, 1, 8, [0, 2, 3, 4, 5, 6, 7], 1),
        (8, 4, 3, [0, 7], 1),
        (8, 4, 2, [7], 1),  # no room for BOS: something must predict the answer
    ],
)
def test_prompt_that_fills_the_row_loses_its_beginning_but_not_bos(
    prepare, prompt, answer, max_length, kept_prompt, kept_answer
):
    input_ids = [BOS, *range(100, 99 + prompt), *range(200, 200 + answer)]
    prepared = prepare([{"input_ids": input_ids, "labels": masked(prompt, input_ids[prompt:])}], max_length=max_length)
    expected = [input_ids[index] for index in kept_prompt], list(range(200, 200 + kept_answer))
    assert first_row(prepared) == (expected[0] + expected[1], masked(len(kept_prompt), expected[1]))


def test_nothing_is_cut_without_max_length(prepare):
    rows = [{"input_ids": list(range(3000))}]
    assert len(first_row(prepare(rows, max_length=None))[0]) == 3000
    assert len(first_row(prepare(rows))[0]) == 1024


@pytest.mark.parametrize("length", range(2, 14))
@pytest.mark.parametrize("max_length", [2, 4, 5])
def test_split_texts_lose_nothing(prepare, caplog, length, max_length):
    tokens = list(range(10, 10 + length))
    prepared = prepare([{"input_ids": tokens}], max_length=max_length, split_long_texts=True)
    joined = [token for row in prepared for token in row["input_ids"]]
    assert all(2 <= len(row["input_ids"]) <= max_length for row in prepared)
    assert prepared["labels"][:] == prepared["input_ids"][:]
    # A last piece of one token would have nothing to predict it from
    assert joined == tokens[: length - (length % max_length == 1 and length > max_length)]
    assert not caplog.records


def test_only_plain_text_is_split(prepare):
    rows = [{"prompt": "The cat", "completion": " sat. He ran. He sat."}]
    assert len(prepare(rows, max_length=6, split_long_texts=True)) == 1


def test_cuts_are_reported_in_numbers(prepare, caplog):
    rows = [
        {"input_ids": [5, 6], "labels": None},
        {"input_ids": list(range(10, 30)), "labels": None},
        {"input_ids": list(range(40, 60)), "labels": None},
        {"input_ids": list(range(70, 90)), "labels": masked(19, [89])},
        {"input_ids": [5, 6, 7], "labels": [5, IGNORED, IGNORED]},  # nothing predicts the first token
    ]
    prepared = prepare(rows, name="retain", max_length=8)
    assert len(prepared) == 4
    assert prepared[0]["input_ids"] == [5, 6]
    assert "2 of 5 retain rows are longer than max_length=8 and lose their end" in caplog.text
    assert "1 of 5 retain rows have a prompt that fills max_length=8" in caplog.text
    assert "1 of 5 retain rows have no token to learn from and are left out" in caplog.text


def test_silence_where_nothing_is_cut(prepare, caplog):
    prepare([{"text": "Tim ran."}])
    assert not caplog.records


@pytest.mark.parametrize("num_proc", [None, 2])
def test_rows_without_a_label_are_left_out(prepare, num_proc):
    kept, empty = {"input_ids": [5, 6], "labels": [IGNORED, 6]}, {"input_ids": [5, 6], "labels": [5, IGNORED]}
    for rows in ([empty, empty, kept, kept], [kept, kept, empty, empty], [kept, empty, kept, empty]):
        assert prepare(rows, dataset_num_proc=num_proc).to_list() == [kept, kept]


# ---- Batches ----


def test_real_eos_tokens_stay_visible_where_the_pad_token_is_eos(prepare, chat_tokenizer):
    """The public defect: pad = EOS masks real EOS tokens out of attention (Llama-3 chats)."""
    tokenizer = chat_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    rows = [
        {"messages": [user(), assistant("He ran."), user("Yes"), assistant("He sat.")]},
        {"messages": [user(), assistant("Tim ran.")]},
    ]
    prepared = prepare(rows, tokenizer=tokenizer)
    batch = DataCollatorForUnlearning(pad_token_id=tokenizer.pad_token_id)(list(prepared))
    lengths = [len(tokens) for tokens in prepared["input_ids"]]
    assert batch["attention_mask"].sum(-1).tolist() == lengths
    for row, length in enumerate(lengths):
        assert prepared["input_ids"][row].count(EOS) == 2 - row
        assert batch["attention_mask"][row, :length].all()
        assert batch["labels"][row, :length].tolist() == prepared["labels"][row]


# ---- Bad input ----

# Stands for what must not be seen: no message may repeat it
CANARY = "Zyxquarb"


def refuse(call, *words):
    """The message of the error, which is one line and repeats nothing of a row, and neither does its traceback."""
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    for word in words:
        assert word in message
    assert message.endswith(".") and "\n" not in message
    assert CANARY not in "".join(traceback.format_exception(error.value))
    return message


@pytest.fixture
def quiet(caplog, capfd):
    """Checks that neither the log nor the output repeats a row."""
    caplog.set_level(logging.DEBUG)
    yield
    output = capfd.readouterr()
    assert CANARY not in caplog.text + output.out + output.err


def test_unknown_columns_list_those_that_are_there_and_those_that_are_read(prepare, quiet):
    refuse(
        lambda: prepare([{"title": CANARY, "body": CANARY}]),
        *("forget data set", "`body`, `title`", "`text`", "`messages`", "`prompt` and `completion`", "`chosen`"),
        *("`question` and `answer`", "`input` and `output`", "dataset_text_field"),
    )


def test_an_instruction_beside_the_input_is_not_left_out(prepare, quiet):
    rows = [{"instruction": "Name the capital.", "input": "France", "output": "Paris"}]
    with pytest.raises(ValueError, match="`instruction` beside `input` and `output`.*join the question's parts"):
        prepare(rows)


@pytest.mark.parametrize(
    "present, missing",
    [
        ("question", "answer"),
        ("answer", "question"),
        ("prompt", "completion"),
        ("completion", "prompt"),
        ("input", "output"),
        ("output", "input"),
    ],
)
def test_half_of_a_pair_of_columns(prepare, quiet, present, missing):
    refuse(
        lambda: prepare([{present: CANARY, "other": CANARY}], name="retain"),
        f"The retain data set has a column `{present}` but no `{missing}`: add it or rename it.",
    )


@pytest.mark.parametrize("num_proc", [None, 2])
@pytest.mark.parametrize(
    "good, bad, words",
    [
        ({"text": CANARY}, {"text": None}, ["`text` is NoneType, expected text"]),
        (
            {"prompt": CANARY, "completion": CANARY},
            {"prompt": CANARY, "completion": None},
            ["`completion` is NoneType, expected text"],
        ),
        (
            {"prompt": CANARY, "completion": CANARY},
            {"prompt": None, "completion": CANARY},
            ["`prompt` is NoneType, expected text"],
        ),
        ({"question": CANARY, "answer": CANARY}, {"question": CANARY, "answer": None}, ["`answer` is NoneType"]),
        ({"question": CANARY, "answer": CANARY}, {"question": None, "answer": CANARY}, ["`question` is NoneType"]),
        ({"chosen": CANARY, "rejected": CANARY}, {"chosen": CANARY, "rejected": None}, ["`rejected` is empty"]),
        ({"chosen": CANARY, "rejected": CANARY}, {"chosen": "", "rejected": CANARY}, ["`chosen` is empty"]),
        ({"input_ids": [5, 6]}, {"input_ids": None}, ["`input_ids` is not a list of token ids"]),
        ({"input_ids": [5, 6]}, {"input_ids": [5, None]}, ["`input_ids` is not a list of token ids"]),
        ({"input_ids": [5], "labels": [5]}, {"input_ids": [5, 6], "labels": [5]}, ["differ in length"]),
        (
            {"input_ids": [5, 6], "attention_mask": [1, 1]},
            {"input_ids": [5, 0], "attention_mask": [1, 0]},
            ["is padded", "leave padding to the collator"],
        ),
        ({"messages": [user(CANARY)]}, {"messages": None}, ["`messages` is NoneType, expected a list of messages"]),
        ({"messages": [user(CANARY)]}, {"messages": []}, ["`messages` is an empty list"]),
        # A template would print nothing, or "None", for what is missing
        ({"messages": [user(CANARY)]}, {"messages": [user(None)]}, ["a message without `content`"]),
        ({"messages": [user(CANARY)]}, {"messages": [{"role": None, "content": CANARY}]}, ["without a `role`"]),
        (
            {"prompt": [user(CANARY)], "completion": [assistant(CANARY)]},
            {"prompt": [user(CANARY)], "completion": []},
            ["`completion` is an empty list"],
        ),
        (
            {"chosen": [user("a"), assistant(CANARY)], "rejected": [user("a"), assistant("b")]},
            {"chosen": [assistant(CANARY)], "rejected": [assistant("b")]},
            ["`prompt` is an empty list"],
        ),
    ],
)
def test_missing_values_name_the_row(prepare, chat_tokenizer, quiet, good, bad, words, num_proc):
    """The public defect: filters of missing values that do nothing."""
    tokenizer = chat_tokenizer() if isinstance(next(iter(good.values())), list) else None
    options = {"tokenizer": tokenizer} if tokenizer else {}
    refuse(
        lambda: prepare([good, good, good, bad], dataset_num_proc=num_proc, **options),
        "Row 3 of the forget data set: ",
        *words,
    )


@pytest.mark.parametrize(
    "row, words",
    [
        ({"text": 3}, ["`text` is int, expected text"]),
        ({"text": [CANARY]}, ["`text` is list, expected text"]),
        ({"question": [CANARY], "answer": CANARY}, ["`question` is list, expected text"]),
        ({"prompt": CANARY, "completion": [assistant(CANARY)]}, ["`completion` is a list of messages but `prompt`"]),
        ({"prompt": [user(CANARY)], "completion": CANARY}, ["`prompt` is list, expected text"]),
        ({"messages": CANARY}, ["`messages` is str, expected a list of messages"]),
        ({"messages": [CANARY]}, ["a message without a `role`"]),
        ({"messages": [{"role": "user", "text": CANARY}]}, ["a message without `content`"]),
        ({"input_ids": [CANARY]}, ["`input_ids` is not a list of token ids"]),
        ({"input_ids": [0.5]}, ["`input_ids` is not a list of token ids"]),
    ],
)
def test_values_of_another_type(prepare, chat_tokenizer, quiet, row, words):
    refuse(lambda: prepare([row], tokenizer=chat_tokenizer()), "Row 0 of the forget data set", *words)


def test_conversation_without_a_chat_template(prepare, quiet):
    refuse(
        lambda: prepare([{"messages": [user(CANARY), assistant(CANARY)]}]),
        "no chat template",
        "set chat_template_path",
    )


def test_template_that_refuses_a_row(prepare, chat_tokenizer, quiet):
    # Templates raise errors of their own, such as for a role that they do not know, and may repeat what they got
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('unexpected: ' + messages[0]['content']) }}"
    refuse(
        lambda: prepare([{"messages": [user(CANARY)]}], tokenizer=tokenizer), "Row 0", "the chat template refuses it"
    )


def test_turn_of_the_assistant_may_be_a_call_of_a_tool(prepare, chat_tokenizer):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] or 'Tim ran.' }}{% endfor %}"
    call = {"type": "function", "function": {"name": "run", "arguments": "{}"}}
    rows = [{"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}]
    assert first_row(prepare(rows, tokenizer=tokenizer))[0] == TIM_RAN


def test_assistant_only_loss_needs_a_template_that_marks_the_assistant(prepare, chat_tokenizer, quiet):
    rows = [{"messages": [user(CANARY), assistant(CANARY)]}]
    refuse(
        lambda: prepare(rows, tokenizer=chat_tokenizer(), assistant_only_loss=True),
        *("marks no assistant tokens", "{% generation %}", "chat_template_path"),
    )


def test_assistant_only_loss_needs_conversations(prepare, quiet):
    rows = [{"prompt": CANARY, "completion": CANARY}]
    refuse(lambda: prepare(rows, assistant_only_loss=True), "needs conversations (lists of messages), not text")


@pytest.mark.parametrize("num_proc", [None, 2])
def test_no_row_with_anything_to_learn(prepare, quiet, num_proc):
    rows = [{"input_ids": [5, 6], "labels": [5, IGNORED]}] * 4
    refuse(lambda: prepare(rows, dataset_num_proc=num_proc), "No row of the forget data set has a token to learn from")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: None, ["is required"]),
        (lambda: Dataset.from_dict({"text": []}), ["is empty: it needs at least one row"]),
        (lambda: Dataset.from_list([{"text": CANARY}]).to_iterable_dataset(), ["is streamed", "without streaming"]),
        (lambda: DatasetDict(train=Dataset.from_list([{"text": CANARY}])), ["not DatasetDict: choose one split"]),
        (lambda: [{"text": CANARY}], ["must be a `datasets.Dataset`, not list"]),
        (lambda: {"text": [CANARY]}, ["must be a `datasets.Dataset`, not dict"]),
    ],
)
def test_what_is_no_data_set(make, words, quiet):
    refuse(lambda: require_map_style(make(), "retain_dataset"), "retain_dataset", *words)


def test_tokenizers_of_both_checkpoints_are_what_these_tests_assume(tokenizer, small_model_path):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, EOS, 0)
    assert tokenizer.chat_template is None
    assert AutoTokenizer.from_pretrained(small_model_path).eos_token_id == EOS
