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
"""Members against others on a model that knows them and on one that never saw them, and the intervals of the AUCs."""

import json
import math
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from datasets import Dataset
from distributed import membership_worker
from test_invariance import launch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn import UnlearnConfig
from hf_unlearn.metrics import Evaluation, auc, membership, membership_scores, privleak
from hf_unlearn.metrics.membership import SCORES, auc_interval, reference_score
from hf_unlearn.metrics.membership_evaluation import evaluate_membership


@pytest.fixture(scope="module")
def args(tmp_path_factory) -> UnlearnConfig:
    return UnlearnConfig(str(tmp_path_factory.mktemp("membership")), use_cpu=True, max_length=256)


@pytest.fixture(scope="module")
def model(known_model):
    return AutoModelForCausalLM.from_pretrained(known_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def base(tiny_model_path):
    """The same before it was taught: it saw neither the members nor the others."""
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)


@pytest.fixture
def tokenizer(known_model):
    return AutoTokenizer.from_pretrained(known_model)


@pytest.fixture(scope="module")
def members(tofu_rows) -> Dataset:
    return Dataset.from_list(tofu_rows("forget10")[:20])


@pytest.fixture(scope="module")
def others(tofu_rows) -> Dataset:
    """Two rows of each of the next twenty authors of TOFU, none of whom the model was taught."""
    rows = tofu_rows("forget10")[20:] + tofu_rows("retain90")[40:]
    return Dataset.from_list([rows[20 * author + i] for author in range(20) for i in (3, 11)])


@pytest.fixture(scope="module")
def expected(model, base, known_model, members, others, args) -> Evaluation:
    tokenizer = AutoTokenizer.from_pretrained(known_model)
    return evaluate_membership(model, tokenizer, members, others, args, reference=base)


def assert_same(evaluation: Evaluation, expected: Evaluation) -> None:
    assert evaluation.skipped == expected.skipped
    assert evaluation.metrics["forget"] == pytest.approx(expected.metrics["forget"], rel=1e-5, abs=1e-5)
    assert evaluation.samples.keys() == {"forget", "holdout"}
    for name, samples in expected.samples.items():
        for sample, other in zip(evaluation.samples[name], samples, strict=True):
            assert sample.keys() == other.keys()
            for key, value in other.items():
                assert sample[key] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)), key


# --- What the model knows shows, and nothing else does


def test_members_of_a_model_that_knows_them(expected):
    metrics = expected.metrics["forget"]
    for key in SCORES:
        assert metrics[f"membership_auc_{key}"] > 0.97, key
        assert metrics[f"membership_auc_{key}_ci_low"] > 0.9, key
    assert metrics["rows"] == 20 and metrics["holdout_rows"] == 40
    assert metrics["privleak_vs_chance"] > 0.9


def test_members_of_a_model_that_saw_neither(base, tokenizer, members, others, args):
    metrics = evaluate_membership(base, tokenizer, members, others, args).metrics["forget"]
    for key in SCORES[:-1]:
        name = f"membership_auc_{key}"
        assert 0.3 < metrics[name] < 0.7, key
        assert metrics[f"{name}_ci_low"] < metrics[name] < metrics[f"{name}_ci_high"]


def test_a_model_is_its_own_reference(base, tokenizer, members, others, args):
    result = evaluate_membership(
        base, tokenizer, members.select(range(3)), others.select(range(4)), args, reference=base, gradient_norm=False
    )
    assert result.metrics["forget"]["membership_auc_reference"] == 0.5
    assert {sample["reference"] for samples in result.samples.values() for sample in samples} == {0.0}


# --- What stands in the result


def test_samples_and_metrics_fit_together(expected, model, tokenizer, members, others, args):
    metrics, samples = expected.metrics["forget"], expected.samples
    assert expected.metrics.keys() == {"forget"} and samples.keys() == {"forget", "holdout"}
    for name, dataset in (("forget", members), ("holdout", others)):
        scores = membership_scores(model, tokenizer, dataset, args, name=name, batch_size=5, gradient_norm=True)
        assert [sample["row"] for sample in samples[name]] == list(range(len(dataset)))
        assert min(sample["answer_tokens"] for sample in samples[name]) > 5
        assert list(scores) == list(SCORES[:-1])
        for key, values in scores.items():
            assert [sample[key] for sample in samples[name]] == pytest.approx(values, rel=1e-4, abs=1e-5)
    for key in SCORES:
        sides = [[sample[key] for sample in samples[name]] for name in ("forget", "holdout")]
        assert metrics[f"membership_auc_{key}"] == auc(*sides)
        ends = metrics[f"membership_auc_{key}_ci_low"], metrics[f"membership_auc_{key}_ci_high"]
        assert ends == auc_interval(*sides)
    named = {f"membership_auc_{key}{end}" for key in SCORES for end in ("", "_ci_low", "_ci_high")}
    privleaks = {f"privleak_vs_chance{end}" for end in ("", "_ci_low", "_ci_high")}
    assert metrics.keys() == {"rows", "holdout_rows"} | named | privleaks
    assert list(expected.skipped["forget"]) == ["privleak"]
    assert "pass its Min-K AUC as `retrained_auc`" in expected.skipped["forget"]["privleak"]


def test_reference_by_hand():
    assert reference_score(torch.tensor([-1.0, -3.0]), -5.0) == 3.0
    assert reference_score(torch.empty(0), -5.0) is None
    assert reference_score(torch.tensor([-1.0]), None) is None


def test_the_reference_may_be_its_numbers(expected, model, base, tokenizer, members, others, args):
    of_base = evaluate_membership(base, tokenizer, members, others, args, gradient_norm=False)
    means = {name: [sample["loss"] for sample in samples] for name, samples in of_base.samples.items()}
    for sample, mean in zip(expected.samples["forget"], means["forget"], strict=True):
        assert sample["reference"] == pytest.approx(sample["loss"] - mean, abs=1e-9)
    assert_same(evaluate_membership(model, tokenizer, members, others, args, reference=means), expected)
    with pytest.raises(ValueError, match="The reference has 19 values for 20 rows: pass one"):
        evaluate_membership(
            model, tokenizer, members, others, args, reference={**means, "forget": means["forget"][:-1]}
        )
    with pytest.raises(ValueError, match="no values for holdout"):
        evaluate_membership(model, tokenizer, members, others, args, reference={"forget": means["forget"]})


@pytest.mark.parametrize("retrained", [0.6, {"membership_auc_min_k": 0.6, "membership_auc_loss": 0.1}])
def test_privleak_against_a_retrained_model(model, tokenizer, members, others, args, retrained):
    result = evaluate_membership(
        model, tokenizer, members, others, args, retrained_auc=retrained, gradient_norm=False, k=0.2
    )
    metrics = result.metrics["forget"]
    for end in ("", "_ci_low", "_ci_high"):
        assert metrics[f"privleak{end}"] == privleak(metrics[f"membership_auc_min_k{end}"], 0.6)
    assert not [key for key in metrics if "vs_chance" in key]
    # Two fifths of the tokens would give other numbers
    least = membership_scores(model, tokenizer, members, args, name="forget", k=0.2)["min_k"]
    assert [sample["min_k"] for sample in result.samples["forget"]] == pytest.approx(least, abs=1e-5)
    assert least != pytest.approx(membership_scores(model, tokenizer, members, args, name="forget")["min_k"], abs=1e-5)
    assert result.skipped["forget"].keys() == {"membership_auc_gradient_norm", "membership_auc_reference"}


# --- What must not matter


def test_batch_size_and_repetition(expected, model, base, tokenizer, members, others, args):
    tokenizer.padding_side = "left"
    first = evaluate_membership(model, tokenizer, members, others, args, reference=base, batch_size=7)
    assert_same(first, expected)
    torch.manual_seed(123)
    again = evaluate_membership(model, tokenizer, members, others, args, reference=base, batch_size=7)
    assert asdict(again) == asdict(first)


def test_row_order(expected, model, base, tokenizer, members, others, args):
    """The intervals too: they are drawn from sorted scores."""
    backwards = [Dataset.from_list(list(dataset)[::-1]) for dataset in (members, others)]
    result = evaluate_membership(model, tokenizer, *backwards, args, reference=base)
    for samples in result.samples.values():
        samples.reverse()
        for row, sample in enumerate(samples):
            sample["row"] = row
    assert_same(result, expected)


@pytest.mark.slow
def test_two_processes(known_model, tiny_model_path, model, base, tokenizer, members, others, args, tmp_path):
    """An odd number of rows, one of them without an answer."""
    forget = [*members.select(range(4)), {"question": "Who?", "answer": ""}]
    holdout = list(others.select(range(3)))
    spec = {"model": known_model, "reference": tiny_model_path, "output": str(tmp_path), "world_size": 2}
    (tmp_path / "spec.json").write_text(json.dumps({**spec, "forget": forget, "holdout": holdout}))
    launch(membership_worker.__file__, tmp_path / "spec.json")
    sets = [Dataset.from_list(rows) for rows in (forget, holdout)]
    single = evaluate_membership(model, tokenizer, *sets, args, reference=base)
    for rank in range(2):
        assert_same(Evaluation(**json.loads((tmp_path / f"rank{rank}.json").read_text())), single)


def test_nothing_is_left_behind(model, base, tokenizer, members, others, args, capfd):
    model.train()
    base.train().requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    few = members.select(range(2)), others.select(range(3))
    evaluate_membership(model, tokenizer, *few, args, reference=base, description="Telling apart")
    assert model.training and base.training
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for each in (model, base) for parameter in each.parameters())
    captured = capfd.readouterr()
    assert captured.out == ""
    assert re.search(r"Telling apart: 100%.* 15/15 ", captured.err)  # 5 rows, three passes
    model.eval().requires_grad_(True)
    base.eval().requires_grad_(True)


# --- Rows


def test_shared_rows_are_refused(model, tokenizer, members, others, args):
    """By what is read of them: other columns and another format do not make another row."""
    row = members[3]
    same = [{"prompt": row["question"], "completion": row["answer"]}, {"prompt": "Who?", "completion": "Nobody."}]
    written = [{"prompt": row["question"], "completion": row["answer"], "note": "as in training"}]
    with pytest.raises(ValueError, match="1 of 2 rows of the holdout are rows of the forget set, too: take them out"):
        evaluate_membership(model, tokenizer, Dataset.from_list(written), Dataset.from_list(same), args)
    with pytest.raises(ValueError, match="2 of 42 rows"):
        both = Dataset.from_list([*others, *members.select([0, 7])])
        evaluate_membership(model, tokenizer, members, both, args)


def test_the_same_answer_to_another_question_is_another_row(model, tokenizer, args):
    sets = [Dataset.from_list([{"question": question, "answer": "Paris."}]) for question in ("Where?", "Who?")]
    assert evaluate_membership(model, tokenizer, *sets, args).metrics["forget"]["rows"] == 1


def test_both_sides_take_the_rejected_answers_of_preference_data(model, tokenizer, tofu_rows, args):
    rows = tofu_rows("forget10")[20:24]
    pairs = [{"prompt": row["question"], "chosen": "I do not know.", "rejected": row["answer"]} for row in rows]
    result = evaluate_membership(
        model, tokenizer, Dataset.from_list(pairs[:2]), Dataset.from_list(pairs[2:]), args, gradient_norm=False
    )
    texts = [sample["answer_tokens"] for name in ("forget", "holdout") for sample in result.samples[name]]
    assert min(texts) > len(tokenizer("I do not know.")["input_ids"]) + 2


def test_empty_answers(model, tokenizer, members, others, args):
    empty = Dataset.from_list([{"question": "Who?", "answer": ""}])
    some = Dataset.from_list([*members.select(range(2)), *empty])
    result = evaluate_membership(model, tokenizer, some, others.select(range(2)), args)
    assert {result.samples["forget"][2][key] for key in SCORES} == {None}
    assert result.metrics["forget"]["rows"] == 3 and result.metrics["forget"]["membership_auc_loss"] == 1.0
    result = evaluate_membership(model, tokenizer, empty, others.select(range(2)), args)
    assert result.metrics["forget"] == {"rows": 1, "holdout_rows": 2}
    assert result.skipped["forget"].keys() == {
        *(f"membership_auc_{key}" for key in SCORES),
        "privleak",
        "privleak_vs_chance",
    }
    assert not any(math.isnan(value) for value in result.metrics["forget"].values())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k": 0.0}, r"the second in \(0, 1\]"),
        ({"batch_size": 0}, "the first must be at least 1"),
        ({"retrained_auc": 0.0}, "must be above 0"),
        ({"retrained_auc": {"min_k": 0.5}}, "has no membership_auc_min_k: pass the metrics"),
        ({"last_layers": 9}, "the model has 5 decoder layers"),
    ],
)
def test_bad_options(model, tokenizer, members, others, args, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluate_membership(model, tokenizer, members.select([0]), others.select([0]), args, **options)


# --- Intervals


def test_interval_by_hand():
    """
    One member of 2 against {1, 3}, drawn twice: the AUC is 0, 1/2 or 1 with chances 1/4, 1/2, 1/4. The middle 95 %
    reach both ends, the middle 40 % are 1/2.
    """
    assert auc_interval([2.0], [1.0, 3.0]) == (0.0, 1.0)
    assert auc_interval([2.0], [1.0, 3.0], level=0.4) == (0.5, 0.5)
    assert auc_interval([2.0, 3.0], [1.0, 0.0]) == (1.0, 1.0)
    assert auc_interval([1.0], [1.0, None]) == (0.5, 0.5)  # tied


def test_interval_against_a_naive_bootstrap():
    """Another generator and one AUC at a time: the ends agree within the noise of the draws."""
    generator = np.random.default_rng(7)
    members, others = generator.integers(0, 12, 40) + 2.0, generator.integers(0, 12, 60) * 1.0
    draws = [auc(generator.choice(members, 40), generator.choice(others, 60)) for _ in range(10_000)]
    low, high = auc_interval(members, others, samples=40_000)
    assert low == pytest.approx(np.quantile(draws, 0.025), abs=0.006)
    assert high == pytest.approx(np.quantile(draws, 0.975), abs=0.006)


def test_interval_has_the_width_of_hanley_and_mcneil():
    """The textbook variance of an AUC, with both sides drawn; with one side fixed the interval would be narrower."""
    generator = np.random.default_rng(3)
    members, others = generator.normal(0.7, 1, 300), generator.normal(0, 1, 300)
    area = auc(members, others)
    placed_members = np.array([(member > others).mean() for member in members])
    placed_others = np.array([(members > other).mean() for other in others])
    half_width = 1.96 * math.sqrt(placed_members.var() / 300 + placed_others.var() / 300)
    low, high = auc_interval(members, others, samples=4000)
    assert (low, high) == pytest.approx((area - half_width, area + half_width), abs=0.1 * half_width)


def test_interval_is_seeded_and_knows_no_order(monkeypatch):
    generator = np.random.default_rng(0)
    members, others = generator.normal(0.5, 1, 30), generator.normal(0, 1, 50)
    whole = auc_interval(members, others)
    assert auc_interval(members[::-1], others[::-1]) == whole
    assert auc_interval(members, others, seed=1) != whole
    monkeypatch.setattr(membership, "_DRAWS_BUDGET", 80 * 7)
    assert auc_interval(members, others) == whole


def test_interval_needs_both_sides():
    with pytest.raises(ValueError, match="one side has no score"):
        auc_interval([1.0], [None])
