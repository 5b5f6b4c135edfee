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
Multiple choice: ties and empty choices by hand, a trained checkpoint against a loop over one sequence at a time, and
every format of the columns.
"""

import logging
import math
from dataclasses import asdict

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn import UnlearnConfig
from hf_unlearn.metrics import Evaluation, evaluate_insertion
from hf_unlearn.metrics.choices import choice_accuracy, evaluate_choices
from hf_unlearn.metrics.perturbation import all_choices, with_options
from hf_unlearn.metrics.statistics import bootstrap_interval


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

# Of stories, which the 260k model knows something of, and of what it cannot know; of several lengths
QUESTIONS = [
    ("Lily saw a big", ["dog in the park.", "of.", "tax law and the harbour.", "went it he the"], 0),
    ("Once upon a time, there was a little", ["is", "girl named Lily.", "girl named Entropy."], 1),
    ("Tom was very happy. He said,", ["the of and", "mitochondria", '"Thank you, mom!"', "zz"], 2),
    ("The capital of France is", ["Rome", "Oslo", "Paris", "Lima"], 2),
    ("They played with the ball all", ["day.", "osmosis", "day long and had fun.", "xyz"], 0),
    ("The sun was", ["q", "bright."], 1),
    ("How many legs has a spider?", ["two", "four", "eight", "six"], 2),
]


@pytest.fixture(scope="module")
def args(tmp_path_factory) -> UnlearnConfig:
    return UnlearnConfig(str(tmp_path_factory.mktemp("choices")), use_cpu=True, max_length=256)


@pytest.fixture(scope="module")
def model(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [{"question": question, "choices": texts, "answer": right} for question, texts, right in QUESTIONS]


def run(model, tokenizer, rows, args, **options) -> Evaluation:
    rows = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return evaluate_choices(model, tokenizer, {"retain": rows}, args, **options)


@pytest.fixture(scope="module")
def expected(model, tiny_model_path, rows, args) -> Evaluation:
    return run(model, AutoTokenizer.from_pretrained(tiny_model_path), rows, args, batch_size=5)


def assert_same_samples(samples: list[dict], expected: list[dict]) -> None:
    assert len(samples) == len(expected)
    for sample, other in zip(samples, expected, strict=True):
        assert sample["nlls"] == pytest.approx(other["nlls"], abs=1e-5)
        assert {**sample, "nlls": None} == {**other, "nlls": None}


# ---- One question ----


def test_by_hand():
    assert choice_accuracy([1.0, 2.0, 3.0], 0) == 1.0
    assert choice_accuracy([1.0, 2.0, 3.0], 1) == 0.0
    assert choice_accuracy([1.0, 1.0, 3.0], 1) == 0.5
    assert choice_accuracy([1.0, 1.0, 1.0], 2) == pytest.approx(1 / 3)
    assert choice_accuracy([1.0, 1.0, 0.5], 0) == 0.0  # a tie below the best is none
    assert choice_accuracy([0.1 + 0.2, 0.3], 1) == 0.5  # the same number, summed in another order
    assert choice_accuracy([None, 2.0, 3.0], 1) == 1.0  # empty choices are left out
    assert choice_accuracy([None, 2.0, 3.0], 0) is None
    assert choice_accuracy([1.0, None], 0) is None
    assert choice_accuracy([1.0], 0) is None


# ---- A trained model against a loop ----


@torch.no_grad()
def slow_nll(model, tokenizer, question: str, text: str) -> float:
    """Nats per token of the text and its EOS token after the question, one token at a time."""
    prompt = tokenizer(question)["input_ids"]
    tokens = [*tokenizer(f"{question} {text}")["input_ids"], tokenizer.eos_token_id]
    start = next((p for p, (a, b) in enumerate(zip(prompt, tokens, strict=False)) if a != b), len(prompt))
    total = 0.0
    for position in range(start, len(tokens)):
        logits = model(torch.tensor([tokens[:position]]), use_cache=False).logits[0, -1].double()
        total -= logits[tokens[position]].item() - logits.logsumexp(0).item()
    return total / (len(tokens) - start)


def test_slow_implementation(model, tokenizer, rows, expected):
    values = []
    for sample, row in zip(expected.samples["retain"], rows, strict=True):
        nlls = [slow_nll(model, tokenizer, row["question"], text) for text in row["choices"]]
        assert sample["nlls"] == pytest.approx(nlls, abs=1e-5)
        values.append(float(nlls.index(min(nlls)) == row["answer"]))
    samples = [(sample["row"], sample["choice_accuracy"], sample["right"]) for sample in expected.samples["retain"]]
    assert samples == [
        (index, value, row["answer"]) for index, (value, row) in enumerate(zip(values, rows, strict=True))
    ]
    assert 0 < sum(values) < len(values)  # it knows some
    low, high = bootstrap_interval(values)
    assert expected.metrics == {
        "retain": {
            "rows": 7,
            "choice_accuracy": sum(values) / 7,
            "choice_accuracy_ci_low": low,
            "choice_accuracy_ci_high": high,
        }
    }
    assert expected.skipped == {"retain": {}}


def test_the_length_of_a_choice_is_divided_by(tokenizer, expected):
    """By the sum over tokens, a long right answer would lose to a short wrong one."""

    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    lost = 0
    for sample, (question, texts, right) in zip(expected.samples["retain"], QUESTIONS, strict=True):
        tokens = [count(f"{question} {text}") - count(question) + 1 for text in texts]  # EOS is one
        nats = [nll * number for nll, number in zip(sample["nlls"], tokens, strict=True)]
        lost += sample["choice_accuracy"] == 1.0 and nats.index(min(nats)) != right
    assert lost > 0


def test_every_format_is_the_same_question(model, tokenizer, rows, args, expected):
    plain = [{"answer": row["answer"], "question": row["question"], "choices": row["choices"]} for row in rows]
    four = [{**row, "subject": "stories"} for row in rows]
    options = with_options(Dataset.from_list(plain, features=WMDP), "retain")
    assert "option4" in options.column_names
    for some in (Dataset.from_list(four, features=MMLU), Dataset.from_list(plain, features=WMDP), options):
        assert_same_samples(run(model, tokenizer, some, args).samples["retain"], expected.samples["retain"])

    def others(row: dict) -> list[str]:
        return [text for place, text in enumerate(row["choices"]) if place != row["answer"]]

    formats = [
        [
            {"question": r["question"], "answer": r["choices"][r["answer"]], "perturbed_answer": others(r)}
            for r in rows
        ],
        [
            {"prompt": r["question"], "completion": f" {r['choices'][r['answer']]}", "perturbed_answer": others(r)}
            for r in rows
        ],
    ]
    for some in formats:  # the right one is the first
        for sample, other in zip(
            run(model, tokenizer, some, args).samples["retain"], expected.samples["retain"], strict=True
        ):
            right = other["right"]
            nlls = [other["nlls"][right], *(nll for place, nll in enumerate(other["nlls"]) if place != right)]
            assert sample["nlls"] == pytest.approx(nlls, abs=1e-5)
            assert (sample["right"], sample["choice_accuracy"]) == (0, other["choice_accuracy"])


def test_as_the_insertion_scores_texts(model, tokenizer, rows, args, expected):
    """One rule for both: the clean accuracy of the perturbed benchmark is this one."""
    result = evaluate_insertion(
        model,
        tokenizer,
        Dataset.from_list(rows),
        args,
        forget_tokens=["Hsiao"],
        insertion="question",
        scoring="text",
    )
    clean = [sample["text_accuracy_clean"] for sample in result.samples]
    assert clean == [sample["choice_accuracy"] for sample in expected.samples["retain"]]


def test_conversations(model, chat_tokenizer, args):
    turns = [{"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "It is Tom."}]
    tokenizer = chat_tokenizer()
    [sample] = run(
        model, tokenizer, [{"messages": turns, "perturbed_answer": ["It is Lily.", "Entropy"]}], args
    ).samples["retain"]
    before = "<s><|user|> Who is it?\n<|assistant|> "
    for nll, text in zip(sample["nlls"], ["It is Tom.", "It is Lily.", "Entropy"], strict=True):
        prompt, tokens = (
            tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, f"{before}{text}</s>")
        )
        start = next(p for p, token in enumerate(tokens) if p >= len(prompt) or token != prompt[p])
        with torch.no_grad():
            log_probs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        values = [log_probs[p - 1, tokens[p]].item() for p in range(start, len(tokens))]
        assert nll == pytest.approx(-sum(values) / len(values), abs=1e-4)


def test_what_a_model_was_taught_is_chosen(known_model, tokenizer, tofu_rows, args):
    taught = AutoModelForCausalLM.from_pretrained(known_model, dtype=torch.float32)
    sets = {
        "forget": Dataset.from_list(tofu_rows("forget10_perturbed")[:6]),
        "unseen": Dataset.from_list(tofu_rows("forget10_perturbed")[100:112]),
    }
    metrics = evaluate_choices(taught, tokenizer, sets, args).metrics
    assert metrics["forget"]["choice_accuracy"] == 1.0
    assert metrics["unseen"]["choice_accuracy"] < 0.8


def test_a_model_that_knows_nothing_is_right_by_chance(model, tokenizer, rows, args):
    """Choices of every length tie, and the first must not win."""
    blank = AutoModelForCausalLM.from_config(model.config)
    torch.nn.init.zeros_(blank.lm_head.weight)
    samples = run(blank, tokenizer, rows, args).samples["retain"]
    assert [sample["choice_accuracy"] for sample in samples] == [1 / len(row["choices"]) for row in rows]


# ---- What must not matter ----


@pytest.mark.parametrize("batch_size", [1, 64])
def test_batch_size(model, tokenizer, rows, args, expected, batch_size):
    result = run(model, tokenizer, rows, args, batch_size=batch_size)
    assert_same_samples(result.samples["retain"], expected.samples["retain"])
    assert result.metrics == expected.metrics


def test_row_order_and_padding(model, tokenizer, rows, args, expected):
    tokenizer.padding_side, tokenizer.pad_token = "left", "</s>"
    samples = run(model, tokenizer, rows[::-1], args).samples["retain"][::-1]
    assert_same_samples([{**sample, "row": row} for row, sample in enumerate(samples)], expected.samples["retain"])


def test_repeated_evaluation_is_identical(model, tokenizer, rows, args, expected):
    model.train()
    try:
        assert asdict(run(model, tokenizer, rows, args, batch_size=5)) == asdict(expected)
        assert model.training
    finally:
        model.eval()


# ---- Rows that have nothing to choose ----


def test_rows_without_a_value(model, tokenizer, args, caplog):
    def row(answer: str, wrong: list[str | None], question: str = "Who is it?") -> dict:
        return {"question": question, "answer": answer, "perturbed_answer": wrong}

    rows = [
        row("Tom.", ["Ben.", None, " "]),
        row(" ", ["Ben."]),
        row("Tom.", ["", None]),
        row("Tom.", [" Tom. "]),
        row("Tom.", ["Ben."], "Who is it? " * 100),
        row("Tom.", ["Ben. " * 200]),
    ]
    with caplog.at_level(logging.WARNING):
        result = run(model, tokenizer, rows, args)
    assert [sample["choice_accuracy"] is None for sample in result.samples["retain"]] == [False] + [True] * 5
    assert len(result.samples["retain"][0]["nlls"]) == 2
    assert result.samples["retain"][1] == {"row": 1, "choice_accuracy": None, "right": None, "nlls": []}
    long, missing = [record.getMessage() for record in caplog.records if record.name.startswith("hf_unlearn")]
    assert "2 of 6 retain rows are longer than max_length=256" in long
    assert "5 of 6 retain rows have no choice_accuracy" in missing
    assert result.metrics["retain"]["rows"] == 6
    assert result.metrics["retain"]["choice_accuracy"] == result.samples["retain"][0]["choice_accuracy"]

    nothing = run(model, tokenizer, rows[1:], args)
    assert nothing.metrics == {"retain": {"rows": 5}}
    assert nothing.skipped["retain"]["choice_accuracy"].startswith("Every row has an empty right answer")
    assert not any(math.isnan(value) for value in nothing.metrics["retain"].values())


def test_empty_choices_are_no_choices(model, tokenizer, args):
    """In the columns of MMLU too; and an empty right answer among empty options is no right answer."""
    row = {"question": "Who is it?", "choices": ["", "Tom.", "Ben."], "answer": 1}
    [sample] = run(model, tokenizer, [row], args).samples["retain"]
    assert sample["nlls"][0] is None and sample["choice_accuracy"] in (0.0, 1.0)
    options = {"question": "Who?", "answer": " ", "option1": "Tom", "option2": "", "option3": None}
    assert all_choices(options) == ([" ", "Tom"], 0)
    [sample] = run(model, tokenizer, [options], args).samples["retain"]
    assert sample["choice_accuracy"] is None


def test_sets_without_choices(model, tokenizer, rows, args, expected):
    sets = {
        "forget": Dataset.from_list([{"question": "Who?", "answer": "Tom"}]),
        "text": Dataset.from_list([{"text": "Tom"}]),
        "retain": Dataset.from_list(rows),
    }
    result = evaluate_choices(model, tokenizer, sets, args)
    for name in ("forget", "text"):
        assert result.metrics[name] == {"rows": 1}
        assert "add a column `perturbed_answer`" in result.skipped[name]["choice_accuracy"]
    assert result.metrics["retain"] == expected.metrics["retain"]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [{"question": "Secret?", "choices": ["Lily", "Tom"], "answer": 2}],
            "Row 0 of the retain data set: `answer` is not an index of its 2 `choices`",
        ),
        (
            [{"text": "Secret", "perturbed_answer": ["Tom"]}],
            "The retain data set has `text`, but choices are answers to a question",
        ),
        (
            [{"question": "Secret?", "answer": None, "perturbed_answer": ["Tom"]}],
            "Row 0 of the retain data set: `answer`",
        ),
    ],
)
def test_refused(model, tokenizer, args, rows, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        run(model, tokenizer, rows, args)
    assert "Secret" not in str(error.value)


def test_nothing_to_evaluate(model, tokenizer, rows, args):
    with pytest.raises(ValueError, match="no set to evaluate on"):
        evaluate_choices(model, tokenizer, {}, args)
    with pytest.raises(ValueError, match="batch_size=0"):
        run(model, tokenizer, rows, args, batch_size=0)
