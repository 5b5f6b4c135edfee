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
The perturbed retain benchmark: which choice is replaced, what is scored, by a slow loop of its own, and that no
forget-token leaves it.
"""

import json
import math
from collections import Counter

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_unlearn.metrics.insertion
from hf_unlearn import UnlearnConfig
from hf_unlearn.cards.metric_table import metric_label
from hf_unlearn.metrics import (
    bootstrap_interval,
    evaluate_insertion,
    evaluate_model,
    perturb_answer_choices,
    perturb_choices,
    perturb_question,
    recovery_rate,
    reduction_rate,
)
from hf_unlearn.metrics.perturbation import mentions, with_options


TOKEN = "SARS-CoV-2"
COUNT = 15  # rows of choices

# The columns and types of the Hub's `cais/mmlu` and `cais/wmdp`
MMLU = Features(
    {
        "question": Value("string"),
        "subject": Value("string"),
        "choices": List(Value("string")),
        "answer": ClassLabel(names=["A", "B", "C", "D"]),
    }
)
WMDP = Features({"answer": Value("int64"), "question": Value("string"), "choices": List(Value("string"))})


def mmlu_rows(count: int = 40) -> list[dict]:
    return [
        {
            "question": f"What is {number} + {number}?",
            "subject": "elementary_mathematics",
            "choices": [str(2 * number + shift) for shift in (-1, 0, 1, 2)],
            "answer": 1,
        }
        for number in range(10, 10 + count)
    ]


@pytest.fixture(scope="module")
def args(tmp_path_factory) -> UnlearnConfig:
    return UnlearnConfig(str(tmp_path_factory.mktemp("insertion")), use_cpu=True, max_length=512)


@pytest.fixture(scope="module")
def model(known_model):
    return AutoModelForCausalLM.from_pretrained(known_model, dtype=torch.float32)


@pytest.fixture
def tokenizer(known_model):
    return AutoTokenizer.from_pretrained(known_model)


# ---- Forget-tokens into rows ----


def test_one_incorrect_choice_is_replaced():
    """Question, right answer and order stay, and the place is stored; over many rows each wrong place is drawn."""
    rows = [{**row, "answer": index % 4} for index, row in enumerate(mmlu_rows(200))]
    before = json.dumps(rows)
    perturbed = perturb_choices(rows, TOKEN)
    assert json.dumps(rows) == before  # copies
    for row, other in zip(rows, perturbed, strict=True):
        place = other["perturbed_index"]
        assert place != row["answer"]
        assert other["choices"] == [TOKEN if index == place else text for index, text in enumerate(row["choices"])]
        assert {key: other[key] for key in row if key != "choices"} == {
            key: row[key] for key in row if key != "choices"
        }
    # 150 draws from three places each: 50, and the standard deviation is 6
    places = Counter((row["answer"], row["perturbed_index"]) for row in perturbed)
    assert len(places) == 12
    assert all(abs(count - 200 / 12) < 14 for count in places.values())


def test_the_draw_depends_on_seed_and_row_alone():
    rows = mmlu_rows()
    places = {row["question"]: row["perturbed_index"] for row in perturb_choices(rows, TOKEN, seed=3)}
    for others in (rows[::-1], rows[5:6], rows[::7]):
        for row in perturb_choices(others, "another word", seed=3):  # nor on the forget-token
            assert row["perturbed_index"] == places[row["question"]]
    # Reading them as a data set changes nothing either
    dataset = Dataset.from_list(rows, features=MMLU)
    assert [row["perturbed_index"] for row in perturb_choices(dataset, TOKEN, seed=3)] == list(places.values())
    assert [row["perturbed_index"] for row in perturb_choices(rows, TOKEN, seed=4)] != list(places.values())


def test_choices_of_tofu(tofu_rows):
    for row, other in zip(
        tofu_rows("retain_perturbed")[:20], perturb_choices(tofu_rows("retain_perturbed")[:20], TOKEN), strict=True
    ):
        place = other.pop("perturbed_index")
        assert other["perturbed_answer"][place] == TOKEN
        other["perturbed_answer"][place] = row["perturbed_answer"][place]
        assert other == row
    for row, other in zip(tofu_rows("world_facts"), perturb_choices(tofu_rows("world_facts"), TOKEN), strict=True):
        column = f"option{other.pop('perturbed_index') + 1}"
        assert row[column] != row["answer"]
        assert other == {**row, column: TOKEN}


def test_the_right_answer_is_never_replaced_where_it_stands_twice():
    rows = [{"question": f"{n}?", "choices": ["yes", "no", " yes", ""], "answer": 0} for n in range(30)]
    assert {row["perturbed_index"] for row in perturb_choices(rows, TOKEN)} == {1, 3}
    rows = [{"question": f"{n}?", "answer": "yes", "perturbed_answer": ["yes", "no", " "]} for n in range(30)]
    assert {row["perturbed_index"] for row in perturb_choices(rows, TOKEN)} == {1}
    with pytest.raises(ValueError, match="Row 1: there is no incorrect choice"):
        perturb_choices([rows[0], {"question": "Who?", "answer": "Lily."}], TOKEN)


def test_questions_of_every_format():
    user, other = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Lily."}
    rows = [
        {"question": "Who?", "answer": "Lily."},
        {"input": "Who?", "output": "Lily."},
        {"prompt": "Who?", "completion": " Lily."},
        {"prompt": [user], "completion": [other]},
        {"messages": [user, other, user, other]},
        {"question": "Who?", "choices": ["Lily", "Tom"], "answer": 0},
    ]
    columns = ["question", "input", "prompt", "prompt", "messages", "question"]
    for row, perturbed, column in zip(rows, perturb_question(rows, TOKEN), columns, strict=True):
        changed = f"{TOKEN} Who?"
        if isinstance(row[column], list):  # the last message of the user, and no other
            changed = [{**user, "content": changed}]
            changed = [*row[column][:2], *changed, other] if column == "messages" else changed
        assert perturbed == {**row, column: changed}


def test_answer_choices_of_every_format():
    other = {"role": "assistant", "content": "Lily."}
    rows = [
        {"question": "Who?", "choices": ["Lily", "Tom"], "answer": 0},
        {"question": "Who?", "answer": "Lily", "perturbed_answer": ["Tom", ""]},
        {"question": "Who?", "answer": "Lily", "option1": "Tom", "option2": "Lily", "option3": None},
        {"prompt": "Who?", "completion": "  Lily"},
        {"prompt": [{"role": "user", "content": "Who?"}], "completion": [other]},
    ]
    assert perturb_answer_choices(rows, "X") == [
        {"question": "Who?", "choices": ["X Lily", "X Tom"], "answer": 0},
        {"question": "Who?", "answer": "X Lily", "perturbed_answer": ["X Tom", ""]},
        {"question": "Who?", "answer": "X Lily", "option1": "X Tom", "option2": "X Lily", "option3": None},
        {"prompt": "Who?", "completion": "  X Lily"},
        {"prompt": rows[4]["prompt"], "completion": [{**other, "content": "X Lily."}]},
    ]


@pytest.mark.parametrize(
    ("text", "token", "expected"),
    [
        ("the sars-cov-2 virus", TOKEN, True),
        ("SARS-CoV-20", TOKEN, False),
        ("He said it", "AI", False),
        ("What is AI?", "AI", True),
        ("关于新冠病毒的问题", "新冠病毒", True),  # no spaces between words
        ("a.b", "a+b", False),
    ],
)
def test_rows_that_hold_the_forget_token_already(text, token, expected):
    choices = {"question": "Who?", "choices": ["Lily", text], "answer": 0}
    messages = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Lily."}]}
    for row in (choices, messages, {"question": text, "answer": "Lily"}, {"question": "Who?", "answer": text}):
        assert mentions(row, token) == expected
    assert not mentions({**messages, "id": text, "messages": []}, token)
    # They are left out
    clean = {"question": "Why?", "choices": ["Lily", "Tom"], "answer": 0}
    for perturb in (perturb_choices, perturb_question, perturb_answer_choices):
        assert len(perturb([choices, clean], token)) == (1 if expected else 2)


def test_roles_are_no_text():
    assert not mentions({"messages": [{"role": "user", "content": "Who?"}]}, "user")


# ---- Rates ----


def test_rates_by_hand():
    assert reduction_rate(0.8, 0.2) == (pytest.approx(0.75), None)
    assert reduction_rate(0.5, 0.75) == (-0.5, None)  # not clipped
    assert reduction_rate(0.05, 0.0) == (1.0, None)
    rate, reason = reduction_rate(0.0499, 0.0)
    assert rate is None and "0.0499, below 0.05" in reason
    assert recovery_rate(0.45, 0.25, 0.65) == (pytest.approx(0.5), None)
    assert recovery_rate(0.75, 0.25, 0.65) == (pytest.approx(1.25), None)
    for base in (0.29, 0.1):  # too little lost, or nothing
        rate, reason = recovery_rate(0.45, 0.25, base)
        assert rate is None and "less than 0.05" in reason


# ---- Against a slow loop: one sequence at a time, all logits, no function of the package ----


@torch.no_grad()
def slow_log_probs(model, tokenizer, before: str, text: str, eos: bool) -> tuple[list[float], list[bool]]:
    """Log-probabilities of the tokens of `text` after `before`, and whether each is the greedy one."""
    prompt = tokenizer(before)["input_ids"]
    ids = tokenizer(before + text)["input_ids"]
    start = next((p for p, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
    ids = [*ids, tokenizer.eos_token_id] if eos else ids
    logits = model(torch.tensor([ids])).logits[0].double()
    values, greedy = [], []
    for position in range(start, len(ids)):
        row = logits[position - 1]
        values.append((row[ids[position]] - row.logsumexp(0)).item())
        greedy.append(row.argmax().item() == ids[position])
    return values, greedy


def mean(values) -> float:
    return math.fsum(values) / len(values)


def slow_right(model, tokenizer, contexts: list[tuple[str, str]], right: int, eos: bool) -> float:
    scores = [mean(slow_log_probs(model, tokenizer, before, text, eos)[0]) for before, text in contexts]
    return float(max(range(len(scores)), key=scores.__getitem__) == right)


def slow_letters(row: dict) -> list[tuple[str, str]]:
    prompt = f"The following are multiple choice questions (with answers) about {row['subject'].replace('_', ' ')}."
    prompt += f"\n\n{row['question']}\n"
    for letter, text in zip("ABCD", row["choices"], strict=True):
        prompt += f"{letter}. {text}\n"
    return [(f"{prompt}Answer:", f" {letter}") for letter in "ABCD"]


@pytest.fixture(scope="module")
def facts(tofu_rows) -> list[dict]:
    """World facts in the columns of MMLU, their right answers at several places."""
    return [
        {
            "question": row["question"],
            "subject": "world_facts",
            "choices": (choices := [row[f"option{number}"] for number in range(1, 5)]),
            "answer": choices.index(row["answer"]),
        }
        for row in tofu_rows("world_facts")[:COUNT]
    ]


def test_letters_as_in_mmlu(model, tokenizer, facts, args):
    """Choices are listed in the prompt, so that the forget-token stands in what every letter is scored after."""
    result = evaluate_insertion(
        model, tokenizer, Dataset.from_list(facts, features=MMLU), args, forget_tokens=["Hsiao", TOKEN], seed=5
    )
    assert (result.insertion, result.scores) == ("choice", ("letter_accuracy",))
    for number, word in enumerate(("Hsiao", TOKEN), start=1):
        samples = [sample for sample in result.samples if sample["token"] == number]
        others = perturb_choices(facts, word, seed=5)
        assert [sample["row"] for sample in samples] == list(range(COUNT))
        assert [sample["perturbed_index"] for sample in samples] == [row["perturbed_index"] for row in others]
        for sample, row, other in zip(samples, facts, others, strict=True):
            for when, this in (("clean", row), ("perturbed", other)):
                expected = slow_right(model, tokenizer, slow_letters(this), row["answer"], eos=False)
                assert sample[f"letter_accuracy_{when}"] == expected
        comparison = result.tokens[number - 1].scores["letter_accuracy"]
        clean, perturbed = (
            [sample[f"letter_accuracy_{when}"] for sample in samples] for when in ("clean", "perturbed")
        )
        differences = [after - before for before, after in zip(clean, perturbed, strict=True)]
        assert (comparison.clean, comparison.perturbed) == (mean(clean), mean(perturbed))
        assert comparison.difference == pytest.approx(comparison.perturbed - comparison.clean)
        assert comparison.difference_interval == bootstrap_interval(differences)  # paired
        assert (comparison.reduction, comparison.reason) == reduction_rate(comparison.clean, comparison.perturbed)
    assert any(sample["letter_accuracy_clean"] != sample["letter_accuracy_perturbed"] for sample in result.samples)


def test_a_tokenizer_that_ends_every_text(model, tokenizer, facts, args):
    """Its EOS token stands neither before the letter nor after it."""
    rows = Dataset.from_list(facts, features=MMLU)
    expected = evaluate_insertion(model, tokenizer, rows, args, forget_tokens=["Hsiao"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    assert tokenizer("Who?")["input_ids"][-1] == tokenizer.eos_token_id
    assert evaluate_insertion(model, tokenizer, rows, args, forget_tokens=["Hsiao"]).samples == expected.samples


@pytest.mark.parametrize("insertion", ["choice", "question", "answer_choices"])
def test_texts_of_choices(model, tokenizer, facts, args, insertion):
    rows = Dataset.from_list(facts, features=MMLU)
    result = evaluate_insertion(
        model, tokenizer, rows, args, forget_tokens=["Hsiao"], insertion=insertion, scoring="text", seed=5
    )
    for sample, row, other in zip(result.samples, facts, perturb_choices(facts, "Hsiao", seed=5), strict=True):
        question, choices = row["question"], row["choices"]
        clean = [(question, f" {text}") for text in choices]
        perturbed = {
            "choice": [(question, f" {text}") for text in other["choices"]],
            "question": [(f"Hsiao {question}", f" {text}") for text in choices],
            # What is read before the choice and not scored
            "answer_choices": [(f"{question} Hsiao", f" {text}") for text in choices],
        }[insertion]
        expected = [slow_right(model, tokenizer, these, row["answer"], eos=True) for these in (clean, perturbed)]
        assert [sample["text_accuracy_clean"], sample["text_accuracy_perturbed"]] == expected


def test_formats_of_choices_are_one(model, tokenizer, facts, args):
    """The columns of MMLU, WMDP and TOFU; and where the right answer stands changes no text accuracy."""
    plain = [{key: row[key] for key in ("question", "choices", "answer")} for row in facts]
    formats = [
        Dataset.from_list(facts, features=MMLU),
        Dataset.from_list(plain, features=WMDP),
        with_options(Dataset.from_list(plain, features=WMDP), "retain"),
        Dataset.from_list(
            [
                {
                    "question": row["question"],
                    "answer": row["choices"][row["answer"]],
                    "perturbed_answer": [text for place, text in enumerate(row["choices"]) if place != row["answer"]],
                }
                for row in facts
            ]
        ),
    ]
    results = [
        evaluate_insertion(model, tokenizer, rows, args, forget_tokens=["Hsiao"], insertion="question", scoring="text")
        for rows in formats
    ]
    assert all(result.samples == results[0].samples for result in results)


def test_known_answers_are_chosen_and_missed(model, tokenizer, tofu_rows, args):
    """The model was taught the first rows of retain90. In a question that begins with a forget-token, it errs more."""
    rows = Dataset.from_list(tofu_rows("retain_perturbed")[:20])
    result = evaluate_insertion(model, tokenizer, rows, args, forget_tokens=["Hsiao Yun-Hwa"], insertion="question")
    [token] = result.tokens
    assert (token.rows, sum(token.skipped.values())) == (20, 0)
    assert token.scores["text_accuracy"].clean == 1.0
    plain = rows.select_columns(["question", "answer"])
    result = evaluate_insertion(model, tokenizer, plain, args, forget_tokens=["Hsiao Yun-Hwa"], insertion="question")
    assert result.scores == ("probability", "token_accuracy")
    scores = result.tokens[0].scores
    assert scores["probability"].clean > 0.99 and scores["token_accuracy"].clean > 0.99
    low, high = scores["probability"].difference_interval
    assert low < scores["probability"].difference < high < 0
    # The clean score is the probability of the evaluation
    evaluation = evaluate_model(model, tokenizer, {"retain": plain}, args, metrics=["probability"])
    assert scores["probability"].clean == pytest.approx(evaluation.metrics["retain"]["probability"], abs=1e-6)


@pytest.mark.parametrize("insertion", ["question", "answer_choices"])
def test_answers_without_wrong_ones(model, tokenizer, tofu_rows, args, insertion):
    rows = tofu_rows("retain90")[50:58]
    result = evaluate_insertion(
        model, tokenizer, Dataset.from_list(rows), args, forget_tokens=["Hsiao"], insertion=insertion
    )
    for sample, row in zip(result.samples, rows, strict=True):
        changed = f"Hsiao {row['question']}" if insertion == "question" else f"{row['question']} Hsiao"
        for when, before in (("clean", row["question"]), ("perturbed", changed)):
            values, greedy = slow_log_probs(model, tokenizer, before, f" {row['answer']}", eos=True)
            assert sample[f"probability_{when}"] == pytest.approx(math.exp(mean(values)), rel=1e-4)
            assert sample[f"token_accuracy_{when}"] == pytest.approx(mean(greedy))


def test_conversations(model, chat_tokenizer, args):
    """Of a conversation the last turn is the answer, and the forget-token itself is not scored."""
    tokenizer = chat_tokenizer()
    turns = [
        {"role": "user", "content": "Who is it?"},
        {"role": "assistant", "content": "It is Tom."},
        {"role": "user", "content": "And who else?"},
        {"role": "assistant", "content": "It is Lily."},
    ]
    formats = [{"messages": turns}, {"prompt": turns[:3], "completion": turns[3:]}]
    results = [
        evaluate_insertion(
            model, tokenizer, Dataset.from_list([row]), args, forget_tokens=["Hsiao"], insertion="question"
        )
        for row in formats
    ]
    assert results[0].samples == results[1].samples
    [sample] = results[0].samples
    for when, word in (("clean", ""), ("perturbed", "Hsiao ")):
        before = f"<s><|user|> Who is it?\n<|assistant|> It is Tom.</s><|user|> {word}And who else?\n<|assistant|> "
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, f"{before}It is Lily.</s>")]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids[1]])).logits[0].log_softmax(-1)
        start = next(p for p, token in enumerate(ids[1]) if p >= len(ids[0]) or token != ids[0][p])
        values = [log_probs[p - 1, ids[1][p]].item() for p in range(start, len(ids[1]))]
        assert sample[f"probability_{when}"] == pytest.approx(math.exp(mean(values)), rel=1e-4)


def test_a_model_that_knows_nothing_is_right_by_chance(tokenizer, model, facts, args):
    """Where all choices tie, the first must not win: in TOFU's columns, it is the right one."""
    blank = AutoModelForCausalLM.from_config(model.config)
    torch.nn.init.zeros_(blank.lm_head.weight)
    for scoring in ("letter", "text"):
        result = evaluate_insertion(
            blank, tokenizer, Dataset.from_list(facts), args, forget_tokens=["Hsiao"], scoring=scoring
        )
        [comparison] = result.tokens[0].scores.values()
        assert (comparison.clean, comparison.perturbed) == (0.25, 0.25)


def test_batches_do_not_matter_and_nothing_runs_twice(model, tokenizer, facts, args):
    """However many forget-tokens there are, the clean sequences are scored once."""
    rows = Dataset.from_list(facts, features=MMLU)
    lengths = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape))
    results = []
    for tokens, batch_size in ((["Hsiao"], 1), (["Hsiao"], 7), (["Hsiao", TOKEN, "Taipei"], 16)):
        lengths.clear()
        result = evaluate_insertion(model, tokenizer, rows, args, forget_tokens=tokens, batch_size=batch_size)
        results.append(result)
        # Sequences of a few tokens are those that look at the architecture
        assert sum(size for size, length in lengths if length > 20) == 4 * COUNT * (1 + len(tokens))
    handle.remove()
    assert results[0].samples == results[1].samples
    assert [sample for sample in results[2].samples if sample["token"] == 1] == results[0].samples


# ---- Rows that are left out, and what is said of them ----


def test_skipped_rows_are_counted(model, tokenizer, args):
    rows = [
        {"question": "Who is it?", "answer": "Lily.", "perturbed_answer": ["Tom.", "Ben."]},
        {"question": "Who is Hsiao?", "answer": "Lily.", "perturbed_answer": ["Tom."]},
        {"question": "Who is it?", "answer": "Lily.", "perturbed_answer": ["hsiao"]},
        {"question": "Who is it?", "answer": " ", "perturbed_answer": ["Tom."]},
        {"question": "Who is it?", "answer": "Lily.", "perturbed_answer": ["", None]},
        {"question": "Who is it? " * 100, "answer": "Lily.", "perturbed_answer": ["Tom."]},
    ]
    for insertion in ("choice", "question", "answer_choices"):
        result = evaluate_insertion(
            model, tokenizer, Dataset.from_list(rows), args, forget_tokens=["Hsiao", "Taipei"], insertion=insertion
        )
        assert [token.rows for token in result.tokens] == [1, 3]
        assert result.tokens[0].skipped == {"mentions": 2, "too_long": 1, "empty": 2}
        assert result.tokens[1].skipped == {"mentions": 0, "too_long": 1, "empty": 2}
        numbers, _ = result.metrics()
        assert numbers[f"insertion_{insertion}_token_1_rows_skipped"] == 5
    everything = evaluate_insertion(model, tokenizer, Dataset.from_list(rows[1:2]), args, forget_tokens=["Hsiao"])
    numbers, reasons = everything.metrics()
    assert numbers == {"insertion_choice_token_1_rows": 0, "insertion_choice_token_1_rows_skipped": 1}
    assert list(reasons.values()) == ["Every row was skipped."]


def test_numbers_for_the_report_hold_no_text(model, tokenizer, facts, args):
    for insertion in ("choice", "question", "answer_choices"):
        for scoring in ("letter", "text"):
            result = evaluate_insertion(
                model,
                tokenizer,
                Dataset.from_list(facts),
                args,
                forget_tokens=["Hsiao", "Taipei"],
                insertion=insertion,
                scoring=scoring,
            )
            numbers, reasons = result.metrics()
            # Every name has a label on the card; the ends of an interval are shown with their metric
            for name in [*numbers, *reasons]:
                assert name.endswith(("_ci_low", "_ci_high")) or metric_label(name), name
            written = json.dumps([numbers, reasons, result.samples])
            assert "Hsiao" not in written and "Taipei" not in written and "Eiffel" not in written
            assert all(math.isfinite(number) for number in numbers.values())


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        ([{"question": "Who?", "answer": "Lily."}], {}, "no incorrect choices, which the insertion 'choice' needs"),
        (
            [{"question": "Who?", "answer": "Lily."}],
            {"insertion": "question", "scoring": "letter"},
            "no incorrect choices, which the scoring 'letter' needs",
        ),
        ([{"text": "Lily."}], {"insertion": "question"}, "has `text`, but a forget-token is put into a question"),
        (
            [{"question": "Who?", "choices": ["Lily", "Tom"], "answer": 2}],
            {},
            "Row 0 of the retain data set: `answer` is not an index of its 2 `choices`",
        ),
        (
            [{"messages": [{"role": "user", "content": "Secret?"}]}],
            {"insertion": "question"},
            "Row 0 of the retain data set: `messages` does not end with a turn of the assistant",
        ),
        ([{"question": "Who?", "answer": "Lily."}], {"insertion": "prefix"}, "choose from choice, question"),
        ([{"question": "Who?", "answer": "Lily."}], {"scoring": "word"}, "choose from letter, text"),
        ([{"question": "Who?", "answer": "Lily."}], {"forget_tokens": ["Hsiao", " "]}, "Forget-token 2 is empty"),
        ([{"question": "Who?", "answer": "Lily."}], {"forget_tokens": "Hsiao"}, "must be a list"),
    ],
)
def test_refused(model, tokenizer, args, rows, options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        evaluate_insertion(model, tokenizer, Dataset.from_list(rows), args, **{"forget_tokens": ["Hsiao"], **options})
    assert "Hsiao" not in str(error.value) and "Secret" not in str(error.value) and "Lily" not in str(error.value)


def test_modes_are_given_back(model, tokenizer, facts, args):
    model.train()
    try:
        evaluate_insertion(model, tokenizer, Dataset.from_list(facts[:2]), args, forget_tokens=["Hsiao"])
        assert model.training
    finally:
        model.eval()
    assert hf_unlearn.metrics.insertion.SMALLEST_DENOMINATOR == 0.05
