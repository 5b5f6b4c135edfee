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
"""The answers that `evaluate_model` generated serve `evaluate_fluency`: they are generated once."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from hf_unlearn import UnlearnConfig
from hf_unlearn.metrics import evaluate_model
from hf_unlearn.metrics.fluency import evaluate_fluency


LENGTHS = {"batch_size": 3, "max_new_tokens": 20}


@pytest.fixture
def args(tmp_path) -> UnlearnConfig:
    return UnlearnConfig(str(tmp_path), use_cpu=True, max_length=256)


@pytest.fixture
def sets(tofu_rows) -> dict[str, Dataset]:
    """One row has no answer: nothing is generated for it."""
    retain = [{**row, "answer": ""} if index == 1 else row for index, row in enumerate(tofu_rows("retain90")[40:44])]
    return {"forget": Dataset.from_list(tofu_rows("forget10")[:4]), "retain": Dataset.from_list(retain)}


@pytest.fixture
def model(known_model):
    return AutoModelForCausalLM.from_pretrained(known_model, dtype=torch.float32)


@pytest.fixture
def judge(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)


def test_nothing_is_generated_twice(model, judge, tokenizer, sets, args, monkeypatch):
    expected = evaluate_fluency(model, tokenizer, sets, args, judge=judge, **LENGTHS)
    evaluation = evaluate_model(model, tokenizer, sets, args, **LENGTHS)
    assert [sorted(evaluation.generated[name]) for name in ("forget", "retain")] == [[0, 1, 2, 3], [0, 2, 3]]
    texts = [sample["generation"] for sample in evaluation.samples["forget"]]
    decoded = [tokenizer.decode(evaluation.generated["forget"][row].token_ids) for row in range(4)]
    assert texts == decoded and all(texts)

    def fail(*args, **kwargs):
        raise AssertionError("an answer is generated again")

    monkeypatch.setattr(type(model), "generate", fail)
    # What it would have generated itself is not asked for: its own max_new_tokens does not count
    shared = evaluate_fluency(
        model, tokenizer, sets, args, judge=judge, generated=evaluation.generated, batch_size=3, max_new_tokens=1
    )
    assert shared == expected
    assert [sample["generation"] for sample in shared.samples["forget"]] == texts


def test_answers_to_other_rows_are_refused(model, tokenizer, sets, args):
    generated = evaluate_model(model, tokenizer, {"forget": sets["forget"]}, args, **LENGTHS).generated
    with pytest.raises(ValueError, match="not those to the rows of retain: pass what evaluate_model generated"):
        evaluate_fluency(model, tokenizer, sets, args, generated=generated)
    fewer = {"forget": sets["forget"].select(range(3))}
    with pytest.raises(ValueError, match="not those to the rows of forget"):
        evaluate_fluency(model, tokenizer, fewer, args, generated=generated)


def test_without_generation_there_is_nothing_to_share(model, tokenizer, sets, args):
    assert evaluate_model(model, tokenizer, sets, args, generate=False, **LENGTHS).generated == {}
