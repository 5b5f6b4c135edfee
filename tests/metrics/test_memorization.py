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
Verbatim and knowledge memorization: ROUGE-L by hand, and a trained checkpoint against a slow loop that tokenizes,
generates and scores on its own.
"""

import json
import logging
import re
from dataclasses import asdict

import pytest
import torch
from datasets import Dataset
from distributed import memorization_worker
from test_invariance import launch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn import UnlearnConfig
from hf_unlearn.metrics import Evaluation
from hf_unlearn.metrics.choices import evaluate_choices
from hf_unlearn.metrics.memorization import (
    KNOWLEDGE,
    VERBATIM,
    evaluate_memorization,
    first_answer,
    knowledge_prompt,
    rouge_l_f1,
)
from hf_unlearn.metrics.statistics import bootstrap_interval


PASSAGE_TOKENS, ANSWER_TOKENS = 24, 16
STORIES = ["Once upon a time, there was a little girl named", "Tom and Lily went to the park", "The big dog"]


@pytest.fixture(scope="module")
def args(tmp_path_factory) -> UnlearnConfig:
    return UnlearnConfig(str(tmp_path_factory.mktemp("memorization")), use_cpu=True, max_length=256)


@pytest.fixture(scope="module")
def model(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).eval()


# ---- A slow implementation: one text at a time, no cache, no padding, no function of the package ----


@torch.no_grad()
def slow_text(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    tokens = tokenizer(prompt)["input_ids"]
    length = len(tokens)
    for _ in range(max_new_tokens):
        token = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[length:], skip_special_tokens=True)


def slow_f1(truth: str, text: str) -> float:
    a, b = (re.findall("[a-z0-9]+", words.lower()) for words in (truth, text))
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return 2 * table[-1][-1] / (len(a) + len(b))  # 2PR / (P + R), since PR share a numerator


def slow_passage(model, tokenizer, row: dict) -> tuple[float, str]:
    text = slow_text(model, tokenizer, row["prompt"], PASSAGE_TOKENS)
    truth = tokenizer.decode(tokenizer(row["gt"])["input_ids"][1 : PASSAGE_TOKENS + 1])  # after its BOS token
    return slow_f1(truth, text), text


def slow_question(model, tokenizer, row: dict, answered: list[dict]) -> tuple[float, str]:
    prompt = ""
    for other in answered:
        prompt += "Question: " + other["question"] + "\nAnswer: " + other["answer"] + "\n\n"
    text = slow_text(model, tokenizer, prompt + "Question: " + row["question"] + "\nAnswer: ", ANSWER_TOKENS)
    stops = [text.find(stop) for stop in ("\n\n", "\nQuestion", "Question:") if stop in text]
    text = text[: min(stops, default=len(text))]
    return slow_f1(row["answer"], text), text


# ---- Rows: stories that the model writes itself and others, questions with and without answered ones before ----


@pytest.fixture(scope="module")
def passages(model, tiny_model_path) -> list[dict]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    known = [{"prompt": prompt, "gt": slow_text(model, tokenizer, prompt, 48)} for prompt in STORIES]
    changed = {"prompt": STORIES[0], "gt": known[0]["gt"].replace("park", "garden").replace("One day", "Then")}
    return [*known, changed, {"prompt": "The big dog", "gt": "spoke of nothing but tax law until the harbour froze."}]


@pytest.fixture(scope="module")
def questions(model, tiny_model_path) -> dict[str, list[dict]]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    names = ["Who went to the park?", "What did the dog see?", "Where is the ball of the little girl named Lily?"]
    rows = [{"question": question, "answer": "Tom and Lily"} for question in names]
    # One whose answer the model gives, though it goes on; one that nothing answers
    said = slow_question(model, tokenizer, rows[0], DEMONSTRATIONS["forget"])[1]
    return {"forget": [{**rows[0], "answer": said}, *rows[1:]], "retain": rows[1:]}


DEMONSTRATIONS = {
    "forget": [{"question": "Who is it?", "answer": "Tom"}, {"question": "Who ran?", "answer": "The dog"}],
    "retain": [{"question": "Who sat?", "answer": "Lily and the cat"}],
}


def run(model, tokenizer, args, passages, questions, demonstrations=DEMONSTRATIONS, **options) -> Evaluation:
    return evaluate_memorization(
        model,
        tokenizer,
        None if passages is None else Dataset.from_list(passages),
        {name: Dataset.from_list(rows) for name, rows in questions.items()},
        {name: Dataset.from_list(rows) for name, rows in demonstrations.items() if name in questions},
        args,
        **{
            "batch_size": 3,
            "max_passage_tokens": PASSAGE_TOKENS,
            "max_answer_tokens": ANSWER_TOKENS,
            **options,
        },
    )


@pytest.fixture(scope="module")
def expected(model, tiny_model_path, args, passages, questions) -> Evaluation:
    return run(model, AutoTokenizer.from_pretrained(tiny_model_path), args, passages, questions)


# ---- One text ----


def test_rouge_by_hand():
    # "the cat sat" is common: P = 3/4, R = 3/6
    assert rouge_l_f1("the black cat sat down today", "The cat sat there") == pytest.approx(0.6)
    assert rouge_l_f1("The cat sat", "sat cat the") == pytest.approx(1 / 3)  # in order
    assert rouge_l_f1("running", "run") == 0.0  # not stemmed
    assert rouge_l_f1("Tom!", "tom") == 1.0
    assert rouge_l_f1("Tom", "") == 0.0
    # Recall would be 1: a text that holds everything is no recital
    assert rouge_l_f1("Tom", "Tom Lily Ben Max") == pytest.approx(0.4)
    for truth in ("", " ", "...", "北京"):
        assert rouge_l_f1(truth, truth) is None


def test_an_answer_ends_where_the_next_question_begins():
    for text in ("Tom\n\nLily", "Tom\nQuestion: Who?", "TomQuestion: Who?", "Tom\n\nA\nQuestion", "Tom"):
        assert first_answer(text) == "Tom"
    assert first_answer("Tom\nLily question") == "Tom\nLily question"
    assert first_answer("Question: Who?") == first_answer("") == ""


def test_the_format_of_questions():
    assert knowledge_prompt("Why?", []) == "Question: Why?\nAnswer: "
    answered = [{"question": "A?", "answer": "b"}, {"question": "C?", "answer": "d"}]
    assert knowledge_prompt("Why?", answered) == (
        "Question: A?\nAnswer: b\n\nQuestion: C?\nAnswer: d\n\nQuestion: Why?\nAnswer: "
    )


# ---- A trained model ----


def test_slow_implementation(model, tokenizer, passages, questions, expected):
    slow = {"forget": [], "retain": []}
    for row, passage in enumerate(passages):
        value, text = slow_passage(model, tokenizer, passage)
        slow["forget"].append({"row": row, "kind": "passage", VERBATIM: value, KNOWLEDGE: None, "generation": text})
    for name, rows in questions.items():
        for row, question in enumerate(rows):
            value, text = slow_question(model, tokenizer, question, DEMONSTRATIONS[name])
            slow[name].append({"row": row, "kind": "question", VERBATIM: None, KNOWLEDGE: value, "generation": text})
    assert set(expected.samples) == {"forget", "retain"}
    for name, samples in slow.items():
        assert len(expected.samples[name]) == len(samples)
        for sample, other in zip(expected.samples[name], samples, strict=True):
            assert sample == pytest.approx(other, abs=1e-12)
    assert expected.skipped == {"forget": {}, "retain": {}}
    for name, metric, count in (("forget", VERBATIM, 5), ("forget", KNOWLEDGE, 3), ("retain", KNOWLEDGE, 2)):
        values = [sample[metric] for sample in slow[name] if sample[metric] is not None]
        assert len(values) == count
        metrics = expected.metrics[name]
        assert metrics[metric] == pytest.approx(sum(values) / count)
        assert (metrics[f"{metric}_ci_low"], metrics[f"{metric}_ci_high"]) == pytest.approx(bootstrap_interval(values))
    assert expected.metrics["forget"]["rows"] == 8
    ends = {f"{KNOWLEDGE}{end}" for end in ("", "_ci_low", "_ci_high")}
    assert set(expected.metrics["retain"]) == {"rows", *ends} and expected.metrics["retain"]["rows"] == 2


def test_what_a_model_recites_shows(expected):
    """Its own continuations are 1, also where the true one goes on after the tokens that count; another's is low."""
    values = [sample[VERBATIM] for sample in expected.samples["forget"][:5]]
    assert (values[0], values[2]) == (1.0, 1.0)
    assert values[1] > 0.95  # it begins with a full stop, which is two tokens where nothing is before it
    assert 0.5 < values[3] < 1.0 and values[4] < 0.2
    assert expected.samples["forget"][5][KNOWLEDGE] == 1.0


def test_demonstrations_are_read(model, tokenizer, args, questions, expected):
    without = run(model, tokenizer, args, None, questions, {})
    with_them = [sample["generation"] for sample in expected.samples["retain"]]
    assert [sample["generation"] for sample in without.samples["retain"]] != with_them
    for sample, row in zip(without.samples["retain"], questions["retain"], strict=True):
        assert (sample[KNOWLEDGE], sample["generation"]) == slow_question(model, tokenizer, row, [])
    assert VERBATIM not in without.metrics["forget"] and without.metrics["forget"]["rows"] == 3


# ---- What must not matter ----


@pytest.mark.parametrize("batch_size", [1, 16])
def test_batch_size(model, tokenizer, args, passages, questions, expected, batch_size):
    assert asdict(run(model, tokenizer, args, passages, questions, batch_size=batch_size)) == asdict(expected)


@pytest.mark.parametrize(("side", "pad_token"), [("left", None), ("right", "</s>")])
def test_padding(model, tokenizer, args, passages, questions, expected, side, pad_token):
    tokenizer.padding_side, tokenizer.pad_token = side, pad_token
    assert asdict(run(model, tokenizer, args, passages, questions)) == asdict(expected)


def test_row_order(model, tokenizer, args, passages, questions, expected):
    backwards = run(model, tokenizer, args, passages[::-1], {name: rows[::-1] for name, rows in questions.items()})
    for name, samples in expected.samples.items():
        for kind in ("passage", "question"):
            values = [
                [{**sample, "row": None} for sample in some if sample["kind"] == kind]
                for some in (samples, backwards.samples[name])
            ]
            assert values[0] == values[1][::-1]


def test_a_chat_template_and_a_tokenizer_that_ends_texts(
    model, tokenizer, chat_tokenizer, args, passages, questions, expected
):
    """Prompts are plain text, and no EOS token stands between a prompt and its continuation."""
    assert asdict(run(model, chat_tokenizer(), args, passages, questions)) == asdict(expected)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    assert tokenizer("Who?")["input_ids"][-1] == tokenizer.eos_token_id
    assert asdict(run(model, tokenizer, args, passages, questions)) == asdict(expected)


def test_modes_are_given_back(model, tokenizer, args, questions):
    model.train()
    try:
        run(model, tokenizer, args, None, {"retain": questions["retain"]})
        assert model.training
    finally:
        model.eval()


@pytest.mark.slow
def test_two_processes(model, tokenizer, tiny_model_path, args, passages, questions, expected, tofu_rows, tmp_path):
    """Also of multiple choice; the second process has nothing of a set of one row."""
    choices = {"world_facts": tofu_rows("world_facts")[:5], "retain": tofu_rows("retain_perturbed")[:1]}
    spec = {
        "model": tiny_model_path,
        "output": str(tmp_path),
        "world_size": 2,
        "passages": passages,
        "questions": questions,
        "demonstrations": DEMONSTRATIONS,
        "choices": choices,
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    launch(memorization_worker.__file__, tmp_path / "spec.json")
    single = evaluate_choices(
        model, tokenizer, {name: Dataset.from_list(rows) for name, rows in choices.items()}, args
    )
    for rank in range(2):
        result = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert result["memorization"] == asdict(expected)
        assert result["choices"]["metrics"] == single.metrics and result["choices"]["skipped"] == single.skipped
        for name, samples in single.samples.items():
            assert len(result["choices"]["samples"][name]) == len(samples)
            for sample, other in zip(result["choices"]["samples"][name], samples, strict=True):
                assert sample.pop("nlls") == pytest.approx(other["nlls"], abs=1e-5)
                assert sample == {key: value for key, value in other.items() if key != "nlls"}


# ---- Rows with nothing to say, and rows that are too long ----


def test_rows_without_words(model, tokenizer, args, passages, questions, expected, caplog):
    nothing = [
        {"prompt": " ", "gt": "a dark night"},
        {"prompt": "It was", "gt": "... 北京"},
        {"prompt": "It", "gt": ""},
    ]
    with caplog.at_level(logging.WARNING):
        result = run(model, tokenizer, args, [nothing[0], *passages, *nothing[1:]], questions)
    [message] = [record.getMessage() for record in caplog.records]
    assert "3 of 8 forget passages have no verbatim_memorization" in message
    samples = result.samples["forget"][:8]
    assert [sample[VERBATIM] for sample in (samples[0], *samples[6:])] == [None] * 3
    assert samples[0]["generation"] is None and samples[6]["generation"]
    assert [{**sample, "row": sample["row"] - 1} for sample in samples[1:6]] == expected.samples["forget"][:5]
    assert result.metrics["forget"] == {**expected.metrics["forget"], "rows": 11}

    empty = [{"question": "", "answer": "Tom"}, {"question": "Who?", "answer": "?"}]
    result = run(model, tokenizer, args, nothing, {"retain": empty})
    assert result.metrics == {"forget": {"rows": 3}, "retain": {"rows": 2}}
    assert result.skipped["forget"] == {VERBATIM: "No passage has a prompt and a true text with a word of a-z or 0-9."}
    assert list(result.skipped["retain"]) == [KNOWLEDGE]


def test_a_long_prompt_loses_its_beginning(model, tokenizer, passages, questions, tmp_path, caplog):
    """And keeps its BOS token: the last words are what is continued."""
    short = UnlearnConfig(str(tmp_path), use_cpu=True, max_length=40)
    prompt = f"{'They were at home all day. ' * 20}{STORIES[1]}"
    ids = tokenizer(prompt)["input_ids"]
    with caplog.at_level(logging.WARNING):
        result = run(model, tokenizer, short, [{**passages[1], "prompt": prompt}, *passages], {})
    [message] = [record.getMessage() for record in caplog.records if record.name.startswith("hf_unlearn")]
    assert "1 of 6 passages have a prompt longer than max_length=40 and lose its beginning" in message
    kept = [tokenizer.bos_token_id, *ids[-39:]]
    with torch.no_grad():
        output = model.generate(torch.tensor([kept]), do_sample=False, max_new_tokens=PASSAGE_TOKENS)
    text = tokenizer.decode(output[0, 40:], skip_special_tokens=True)
    assert result.samples["forget"][0]["generation"] == text != result.samples["forget"][2]["generation"]


@pytest.mark.parametrize(
    ("passages", "questions", "demonstrations", "sentence"),
    [
        (None, {}, {}, "nothing to measure: pass passages"),
        ([{"prompt": "Secret", "completion": "b"}], {}, {}, "data set of passages has no column `gt`"),
        (None, {"retain": [{"text": "Secret"}]}, {}, "retain questions has no column `question`, `answer`"),
        (
            None,
            {"retain": [{"question": "a", "answer": "b"}, {"question": "Secret", "answer": None}]},
            {},
            "Row 1 of the data set of retain questions: `answer` holds NoneType, expected text",
        ),
        (
            None,
            {"retain": [{"question": "a", "answer": "b"}]},
            {"retain": [{"text": "Secret"}]},
            "data set of retain demonstrations has no column",
        ),
    ],
)
def test_refused(model, tokenizer, args, passages, questions, demonstrations, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        run(model, tokenizer, args, passages, questions, demonstrations)
    assert "Secret" not in str(error.value)


def test_demonstrations_of_no_set_and_sizes_of_nothing(model, tokenizer, args, passages):
    rows = Dataset.from_list(DEMONSTRATIONS["forget"])
    with pytest.raises(ValueError, match="demonstrations for 'forgot', but no questions"):
        evaluate_memorization(model, tokenizer, None, {"forget": rows}, {"forgot": rows}, args)
    with pytest.raises(ValueError, match="must be at least 1"):
        run(model, tokenizer, args, passages, {}, max_passage_tokens=0)
