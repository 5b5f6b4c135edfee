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
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import what_holds
import what_holds_attacks as attacks
import what_holds_floor
import what_holds_report as report


ROOT = Path(__file__).parents[1]


EXAMPLES = [
    {"input_ids": [1, 5, 9, 20, 30, 2], "labels": [-100, -100, -100, 20, 30, 2]},
    {"input_ids": [1, 7, 40, 2], "labels": [-100, -100, 40, 2]},
    {"input_ids": [1, 6, 8, 11, 12, 13, 50, 2], "labels": [-100, -100, -100, -100, -100, -100, 50, 2]},
]


def test_probability_is_that_of_each_row_alone(random_model) -> None:
    model = random_model().train()
    values = attacks.answer_probabilities(model, EXAMPLES)
    assert model.training, "it runs in the middle of a training"
    for example, value in zip(EXAMPLES, values, strict=True):
        logits = model.eval()(torch.tensor([example["input_ids"]])).logits[0].double()
        answer = [place for place, label in enumerate(example["labels"]) if label != -100]
        product = math.prod(logits[place - 1].softmax(-1)[example["input_ids"][place]].item() for place in answer)
        assert value == pytest.approx(product ** (1 / len(answer)), rel=1e-5)


def test_relearning_teaches_its_rows_and_leaves_the_model_alone(random_model) -> None:
    model = random_model()
    before = attacks.answer_probabilities(model, EXAMPLES)
    taught = attacks.relearn(model, EXAMPLES[:2], learning_rate=1e-2, steps=20, batch_size=2, seed=0)
    assert attacks.answer_probabilities(model, EXAMPLES) == before
    after = attacks.answer_probabilities(taught, EXAMPLES)
    assert min(after[:2]) > 0.9 > max(before)
    again = attacks.relearn(model, EXAMPLES[:2], learning_rate=1e-2, steps=20, batch_size=2, seed=0)
    assert attacks.answer_probabilities(again, EXAMPLES) == after


def test_latent_attack_stays_at_the_question_and_within_its_budget(random_model, monkeypatch) -> None:
    model, layer, radius = random_model(), 1, 0.5
    plain = attacks.answer_probabilities(model, EXAMPLES)
    found = []
    find = attacks.find_perturbations
    monkeypatch.setattr(
        attacks, "find_perturbations", lambda *args, **kwargs: found.append(find(*args, **kwargs)) or found[-1]
    )
    attacked = attacks.latent_attack(model, EXAMPLES, layer, radius, steps=8)
    assert all(after > before for after, before in zip(attacked, plain, strict=True))
    lengths = found[0][0][layer].norm(dim=-1)
    for row, example in enumerate(EXAMPLES):
        for place in range(lengths.shape[1]):
            is_question = place < len(example["labels"]) and example["labels"][place] == -100
            assert 0 < lengths[row, place] <= radius * 1.0001 if is_question else lengths[row, place] == 0
    # Nothing depends on the other rows of the batch
    alone = [attacks.latent_attack(model, [example], layer, radius, steps=8)[0] for example in EXAMPLES]
    assert alone == pytest.approx(attacked, rel=1e-3)
    assert attacks.latent_attack(model, EXAMPLES, layer, 0.0, steps=2) == pytest.approx(plain, rel=1e-4)


def test_residual_stream_is_measured_without_padding(random_model) -> None:
    model = random_model()
    states = [
        model(torch.tensor([example["input_ids"]]), output_hidden_states=True).hidden_states[2][0]
        for example in EXAMPLES
    ]
    states = torch.cat(states).double()
    mean_norm, root_mean_square = attacks.residual_norms(model, 1, EXAMPLES)
    assert mean_norm == pytest.approx(states.norm(dim=-1).mean().item(), rel=1e-5)
    assert root_mean_square == pytest.approx(states.square().mean().sqrt().item(), rel=1e-5)


def test_recovered_is_relative_to_the_control_under_the_same_attack() -> None:
    share, reason = attacks.recovered(attacked=0.3, control=0.1, original=0.9)
    assert share == pytest.approx(0.25) and reason is None
    share, reason = attacks.recovered(attacked=0.93, control=0.9, original=0.94)
    assert share is None and "0.040" in reason
    assert attacks.recovered(0.05, 0.1, 0.9)[0] < 0, "it is not clipped"


@pytest.mark.parametrize("is_rise", [True, False])
def test_a_run_ends_where_the_floor_is_crossed(random_model, is_rise: bool) -> None:
    untaught = random_model()
    taught = attacks.relearn(untaught, EXAMPLES, learning_rate=1e-3, steps=5, batch_size=3, seed=0)
    ends = [untaught, taught] if is_rise else [taught, untaught]
    low, high = (statistics.fmean(attacks.answer_probabilities(model, EXAMPLES)) for model in (untaught, taught))
    floor = (low + high) / 2

    model = random_model()
    stop = what_holds_floor.StopAtFloor(EXAMPLES, floor, is_rise)
    control = SimpleNamespace(should_training_stop=False)
    for step, weights in ((5, ends[0]), (10, ends[1])):
        model.load_state_dict(weights.state_dict())
        stop.on_step_end(None, SimpleNamespace(global_step=step), control, model=model)
        assert control.should_training_stop == (step == 10)
    assert stop.reached and stop.path == [
        [5, pytest.approx(low if is_rise else high)],
        [10, pytest.approx(high if is_rise else low)],
    ]
    reached = statistics.fmean(attacks.answer_probabilities(model, EXAMPLES))
    assert floor <= reached < floor + 0.05 * (high - low)


def test_a_run_that_stays_on_one_side_of_the_floor_goes_on(random_model) -> None:
    model, control = random_model(), SimpleNamespace(should_training_stop=False)
    for is_rise, floor in ((True, 0.0), (True, 1.0), (False, 0.0)):
        stop = what_holds_floor.StopAtFloor(EXAMPLES, floor, is_rise)
        stop.on_train_begin(None, None, None, model=model)
        for step in (5, 10):
            stop.on_step_end(None, SimpleNamespace(global_step=step), control, model=model)
        assert not stop.reached and not control.should_training_stop


def test_relearned_rows_are_never_those_that_are_scored(tmp_path: Path) -> None:
    case = what_holds.Case("people", 3, what_holds.Folders(tmp_path, tmp_path))
    relearned, others = case.split()
    assert sorted(relearned + others) == list(range(40)) and len(relearned) == 20
    assert case.split() == (relearned, others)
    assert not {row["name"] for row in case.forget} & {row["name"] for row in case.retain}
    assert set(case.names["forget"]) <= {row["name"] for row in case.forget}
    assert set(case.names["retain"]) <= {row["name"] for row in case.retain}


def test_names_of_authors_stand_on_the_right_side(data_dir: Path, tmp_path: Path) -> None:
    case = what_holds.Case("tofu", 0, what_holds.Folders(data_dir, tmp_path))
    texts = {
        side: " ".join(row["question"] + row["answer"] for row in rows)
        for side, rows in (("forget", case.forget), ("retain", case.retain))
    }
    for side, other in (("forget", "retain"), ("retain", "forget")):
        for name in case.names[side]:
            assert texts[side].count(name) >= 10 and name not in texts[other]


def test_methods_differ_by_what_their_name_says_alone() -> None:
    for task in what_holds.TASKS:
        settings = {name: method.for_task(task, 2.0, 1) for name, method in what_holds.METHODS.items()}

        def extra(name: str, base: str, settings: dict = settings) -> dict:
            assert settings[base].items() <= settings[name].items()
            return {key: value for key, value in settings[name].items() if key not in settings[base]}

        assert set(extra("npo + sam", "npo")) == {"sharpness", "sharpness_radius"}
        assert set(extra("prism", "npo + sam")) == {"gradient_conflict", "probe_weight_ratio", "probe_learning_rate"}
        for base in ("npo", "rmu"):
            assert extra(f"{base} + rna 0.3", base) == {"reference_noise_std": 0.6, "reference_noise_layer": 2}


def test_interval_and_verdict_by_hand() -> None:
    value = report.interval([1.0, 2.0, 3.0])
    # Student's t with 2 degrees of freedom: 4.30265 * 1 / sqrt(3)
    assert (value["mean"], value["seeds"]) == (2.0, 3)
    assert value["high"] - 2.0 == pytest.approx(2.48414, abs=1e-4) == 2.0 - value["low"]
    assert report.verdict(value) == "not distinguishable"
    assert report.verdict(report.interval([-1.0, -1.1, -0.9])) == "lower"
    assert report.verdict(report.interval([1.0, 1.1, 0.9])) == "higher"
    assert report.verdict(report.interval([1.0])) == "not distinguishable", "one seed tells nothing"


def test_differences_are_paired_by_seed() -> None:
    runs = [
        {"task": "people", "method": method, "seed": seed, "forget": 10.0 * seed + shift}
        # In another order, and with a seed that the other one lacks
        for method, shift, seeds in (("a", 1.0, (0, 1, 2)), ("b", 0.0, (2, 1, 0, 3)))
        for seed in seeds
    ]
    difference = report.Table(runs).difference("people", "a", "b", lambda run: run["forget"])
    assert (difference["mean"], difference["low"], difference["high"], difference["seeds"]) == (1.0, 1.0, 1.0, 3)
    assert difference["verdict"] == "higher"


def rounded(values: dict) -> dict:
    return json.loads(json.dumps(values), parse_float=lambda text: round(float(text), 9))


def test_docs_show_what_follows_from_the_stored_runs() -> None:
    stored = json.loads((ROOT / "benchmarks" / "results" / "what_holds_cpu.json").read_text(encoding="utf-8"))
    summary = report.summarize(stored["runs"])
    assert rounded(summary) == rounded(stored["summary"])  # SciPy's quantiles differ in the last digits
    page = (ROOT / "docs" / "what_holds.md").read_text(encoding="utf-8")
    for name, table in report.format_tables(summary).items():
        assert table in page, name
    assert stored["command"] in page
    keys = {(run["task"], run["method"], run["seed"]) for run in stored["runs"]}
    assert len(keys) == len(stored["runs"])
    for run in stored["runs"]:
        if run.get("reached_floor"):
            before = next(
                other["retain"]
                for other in stored["runs"]
                if (other["task"], other["method"], other["seed"]) == (run["task"], "before", run["seed"])
            )
            share = run["retain"] / before
            assert what_holds.RETAIN_FLOOR <= share < what_holds.RETAIN_FLOOR + 0.01, "what is compared keeps the same"
