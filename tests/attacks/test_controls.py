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
What the numbers of attacks claim, on models of which it is known what they know: one that was taught the facts, two
that never saw them, one that hides them behind an adapter, and one whose weights are destroyed.
"""

import copy
import dataclasses

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_whole_battery import LESS
from transformers import AutoTokenizer
from weight_attacks import load

from hf_unlearn import UnlearnConfig, UnlearnTrainer
from hf_unlearn.attacks.base import AttackData, Attacked, tokenized, trial_as_it_stands
from hf_unlearn.attacks.finetuning import FineTuning, fine_tune, sequences
from hf_unlearn.attacks.run import SMALLEST_DENOMINATOR, run_attack
from hf_unlearn.attacks.table import ATTACKS


@pytest.fixture(scope="session")
def data(tofu_rows, tmp_path_factory):
    """T and V: the facts about one author that the known model was taught; and rows to keep, which it knows too."""
    forget, retain = tofu_rows("forget10")[:20], tofu_rows("retain90")[:8]
    args = UnlearnConfig(str(tmp_path_factory.mktemp("args")), use_cpu=True, max_length=256)
    return AttackData(*map(Dataset.from_list, (forget[:10], forget[10:], retain)), args, batch_size=32)


@pytest.fixture(scope="session")
def original(known_model):
    model = load(known_model)
    return Attacked(model, AutoTokenizer.from_pretrained(known_model), model)


@pytest.fixture(scope="session")
def control(original, tiny_model_path):
    """It was never taught anything but stories."""
    return dataclasses.replace(original, model=load(tiny_model_path))


@pytest.fixture(scope="session")
def never_saw(original, tiny_model_path, tofu_rows, data):
    """Another one: it was taught facts about other authors, so that it knows the form of the answers."""
    never = dataclasses.replace(original, model=load(tiny_model_path))
    rows = dataclasses.replace(data, retain=Dataset.from_list(tofu_rows("retain90")[:40]))
    examples = sequences(tokenized(rows.retain, never, rows))
    fine_tune(never.model, list(never.model.parameters()), examples, FineTuning(1e-3, steps=30), seed=0)
    return never


@pytest.fixture(scope="session")
def hiding(original, known_model, tofu_rows, tmp_path_factory):
    """NPO trained a LoRA until the facts are no longer said; all that was known is still in the weights below."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the LoRA
        trainer = UnlearnTrainer(
            load(known_model),
            args=UnlearnConfig(
                str(tmp_path_factory.mktemp("hiding")),
                use_cpu=True,
                max_steps=25,
                learning_rate=1e-2,
                lr_scheduler_type="constant",
                max_length=256,
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                forget_loss=["npo"],
                retain_loss=["nll"],
                beta=0.03,
            ),
            train_dataset=Dataset.from_list(tofu_rows("forget10")[:20]),
            retain_dataset=Dataset.from_list(tofu_rows("retain90")[:40]),
            processing_class=original.tokenizer,
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]
            ),
        )
        trainer.train()
    return dataclasses.replace(original, model=trainer.model.eval())


@pytest.fixture(scope="session")
def merged(hiding):
    """As every other attack gets it."""
    return dataclasses.replace(hiding, model=copy.deepcopy(hiding.model).merge_and_unload())


def attack(name, attacked, control, data, **settings):
    """With settings of the small budget, or others in their place."""
    specification = dataclasses.replace(
        ATTACKS[name], budgets={"tiny": {**ATTACKS[name].budgets["small"], **settings}}
    )
    return run_attack(name, specification, "tiny", attacked, control, data, seed=0)


def relearned(attacked, control, data):
    """The entry, and what came back at every step by learning rate, whatever the utility: the second is ours."""
    result, trials = attack("relearn", attacked, control, data)
    shares = {}
    for unlearned, original, other in zip(*trials.values(), strict=True):
        assert unlearned.settings == original.settings == other.settings
        share = (unlearned.score - other.score) / (original.score - other.score)
        shares.setdefault(unlearned.settings["learning_rate"], []).append((share, unlearned))
    assert len(shares) == 2
    return result, shares


def test_relearning_recovers_nothing_from_a_model_that_never_saw_the_facts(never_saw, control, data):
    """Fine-tuning on T teaches both models the form of the answers: that is not recovery, and the control takes it."""
    result, shares = relearned(never_saw, control, data)
    assert abs(result.recovered) < 0.1 and result.score_original_attacked > 0.95
    for at_rate in shares.values():
        assert all(abs(share) < 0.1 for share, _ in at_rate)
        assert max(trial.score for _, trial in at_rate) > 2 * result.score_before


@pytest.mark.parametrize("name", LESS)
def test_the_original_scores_one_under_every_attack(known_model, original, control, data, name):
    """A model that forgot nothing, loaded once more: what an attack gets out of it is what it gets out of it."""
    forgot_nothing = dataclasses.replace(original, model=load(known_model))
    result, _ = attack(name, forgot_nothing, control, data, **LESS[name])
    if name == "adapter_removal":
        assert result.recovered is None and "no adapters" in result.reason
    elif ATTACKS[name].incomparable:  # they give the same to a model that never knew, or more
        assert result.recovered is None and result.reason == ATTACKS[name].incomparable
        assert result.score_after == pytest.approx(result.score_original_attacked, abs=1e-6)
    else:
        assert result.recovered == pytest.approx(1.0, abs=1e-6)
        assert result.score_original_attacked - result.score_control_attacked > SMALLEST_DENOMINATOR


def test_an_adapter_that_hides_the_answers_is_seen_through_by_its_removal(hiding, control, data):
    result, _ = attack("adapter_removal", hiding, control, data)
    assert result.score_before < 0.1
    assert result.recovered == pytest.approx(1.0, abs=1e-6)


def test_an_adapter_that_hides_the_answers_is_seen_through_by_relearning(merged, control, data):
    result, shares = relearned(merged, control, data)
    assert result.score_before < 0.1 and result.recovered > 0.4
    assert result.utility_after > 0.75
    for at_rate in shares.values():
        assert max(share for share, _ in at_rate) > 0.15


def test_an_adapter_that_hides_the_answers_is_seen_through_by_a_latent_attack(merged, never_saw, control, data):
    """Which writes answers into any model: into one that never saw them, little of them."""
    settings = {"depths": [0.75], "radii": [0.5]}
    hidden, _ = attack("latent_pgd", merged, control, data, **settings)
    unknown, _ = attack("latent_pgd", never_saw, control, data, **settings)
    assert hidden.score_before < 0.1 and hidden.recovered > 0.2
    assert abs(unknown.recovered) < 0.1 and hidden.recovered > 4 * unknown.recovered
    assert unknown.score_after > 2 * unknown.score_before


def test_mixing_in_the_original_brings_the_facts_to_a_model_that_never_saw_them(never_saw, data):
    """So that a high score at a large share says nothing of the unlearned model."""
    trials = ATTACKS["interpolation"].function(never_saw, data, {"shares": [0.0, 0.75]}, 0)
    assert trials[0].score < 0.05 and trials[1].score > 0.9
    assert {name for name, entry in ATTACKS.items() if entry.incomparable} == {"interpolation", "linear_probe"}


def test_without_a_control_the_result_says_what_stands_in_for_it(merged, control, data):
    """The unlearned model before the attack, from which nothing is taken off that the attack teaches any model."""
    with_control, _ = attack("relearn", merged, control, data, **LESS["relearn"])
    without, trials = attack("relearn", merged, None, data, **LESS["relearn"])
    assert with_control.control == "model that never saw the forget set"
    assert without.control == "unlearned model, unattacked"
    before = trial_as_it_stands(merged, data, {})
    assert trials["control"] == [before] and without.score_control_attacked == before.score
    expected = (without.score_after - before.score) / (without.score_original_attacked - before.score)
    assert without.recovered == pytest.approx(expected)


@pytest.fixture(scope="session")
def destroyed(original, known_model):
    model = load(known_model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return dataclasses.replace(original, model=model)


# Every entry: some in every run, the others in the slow one
_QUICK = ("relearn", "quantize", "prefill", "latent_pgd")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in _QUICK else [pytest.mark.slow])
        for name in LESS
        if name != "adapter_removal"
    ],
)
def test_low_leakage_of_a_destroyed_model_is_seen_by_its_utility(destroyed, data, name):
    """It leaks nothing because it says nothing: every entry shows that."""
    result, _ = attack(name, destroyed, None, data, **LESS[name])
    assert result.score_before < 0.01
    assert result.utility_after < 0.05
