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
"""Invented people: what a data set must hold for the numbers of a quickstart to mean anything."""

import json

import pytest

from hf_unlearn.people import MAX_PEOPLE, NUM_PERTURBED, make_people, split_people


FACTS = 5


@pytest.fixture(scope="module")
def rows():
    return make_people(num_people=40, seed=0)


def test_same_seed_same_people(rows):
    assert make_people(num_people=40, seed=0) == rows
    others = make_people(num_people=40, seed=1)
    assert {row["name"] for row in others} != {row["name"] for row in rows}
    assert [row["answer"] for row in others] != [row["answer"] for row in rows]


def test_columns_are_those_of_tofu_and_a_name(rows):
    assert len(rows) == 40 * FACTS
    for row in rows:
        texts = ("name", "question", "answer", "paraphrased_question", "paraphrased_answer")
        assert set(row) == {*texts, "perturbed_answer"}
        assert all(row[key] and row[key] == row[key].strip() and row[key].isascii() for key in texts)
        assert len(row["perturbed_answer"]) == len(set(row["perturbed_answer"])) == NUM_PERTURBED
    assert json.loads(json.dumps(rows)) == rows


def test_questions_name_their_person_and_nobody_else(rows):
    names = {row["name"] for row in rows}
    assert len(names) == 40
    assert all(len(name.split()) == 2 for name in names)
    for part in (0, 1):  # neither a first name nor a surname is shared
        assert len({name.split()[part] for name in names}) == 40
    for row in rows:
        for column in ("question", "paraphrased_question"):
            assert {name for name in names if name in row[column]} == {row["name"]}
        assert row["question"] != row["paraphrased_question"]
    for column in ("question", "paraphrased_question"):
        assert len({row[column] for row in rows}) == len(rows)


def test_no_two_people_share_an_answer(rows):
    answers = [row["answer"] for row in rows]
    assert len(set(answers)) == len(answers)
    # An answer is the fact and next to nothing else: no answer's words are in every answer of its kind
    for fact in range(FACTS):
        kind = [set(answer.split()) - {"the"} for answer in answers[fact::FACTS]]
        assert not set.intersection(*kind)


def test_wrong_answers_are_wrong_and_of_the_same_form(rows):
    true_answers = {row["paraphrased_answer"] for row in rows} | {row["answer"] for row in rows}
    for fact in range(FACTS):
        kind = rows[fact::FACTS]
        words = {len(row["paraphrased_answer"].split()) for row in kind}
        assert len(words) == 1
        for row in kind:
            assert not true_answers & set(row["perturbed_answer"])
            assert {len(wrong.split()) for wrong in row["perturbed_answer"]} == words


def test_the_two_wordings_of_an_answer_hold_the_same_fact(rows):
    for row in rows:
        fact = set(row["answer"].split())
        assert fact <= set(row["paraphrased_answer"].replace(",", "").split())


@pytest.mark.parametrize("num_forget", [1, 4, 39])
def test_split_parts_people_and_loses_no_row(rows, num_forget):
    forget, retain = split_people(rows, num_forget)
    forgotten, kept = {row["name"] for row in forget}, {row["name"] for row in retain}
    assert len(forgotten) == num_forget
    assert not forgotten & kept
    assert len(forget) == num_forget * FACTS
    assert sorted(map(json.dumps, forget + retain)) == sorted(map(json.dumps, rows))
    # Nothing of a forgotten person is in what is kept, wrong answers included
    kept_text = json.dumps(retain)
    for row in forget:
        assert row["name"] not in kept_text and f'"{row["answer"]}"' not in kept_text


def test_numbers_that_cannot_be_drawn_are_refused():
    assert len(make_people(MAX_PEOPLE, seed=3)) == MAX_PEOPLE * FACTS
    assert len(make_people(1, seed=3)) == FACTS
    for number in (0, MAX_PEOPLE + 1):
        with pytest.raises(ValueError, match="must be 1 to"):
            make_people(number, seed=0)
