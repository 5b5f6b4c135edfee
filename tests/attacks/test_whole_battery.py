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
"""Every attack of the table on every checkpoint, as the command line runs it, with settings that take a moment."""

import dataclasses
import json
import random
import re

import numpy
import pytest
import torch
from hidden_attacks import CHECKPOINTS
from peft import LoraConfig, get_peft_model
from prompt_attacks import SHORT_FORGET, SHORT_RETAIN, short_data
from transformers import AutoTokenizer
from weight_attacks import load, same_state, state, unsettle

from hf_unlearn.attacks.base import Attacked
from hf_unlearn.attacks.run import run_attack
from hf_unlearn.attacks.table import ATTACKS


# What is less than in the small budget
LESS = {
    "relearn": {"samples": [2], "steps": 2, "score_every": 1},
    "benign_finetune": {"samples": [2], "steps": 2, "score_every": 1},
    "prefill": {},
    "paraphrase": {"templates": ["question_answer", "filler_before"]},
    "few_shot": {},
    "sampling_leak": {"samples": 2},
    "quantize": {},
    "weight_noise": {"draws": 1},
    "activation_noise": {"depths": [0.5], "draws": 1},
    "latent_pgd": {"depths": [0.5], "num_steps": 2},
    "soft_prompt": {"num_embeddings": 4, "steps": [1, 2]},
    "gcg": {"num_steps": 1, "search_width": 8},
    "direction_ablation": {"num_prompts": 8},
    "logit_lens": {},
    "linear_probe": {"controls": 1},
    "adapter_removal": {},
    "interpolation": {"shares": [0.5]},
}


@pytest.fixture(scope="module")
def models(data_dir):
    """Each checkpoint, and one a little away from it that takes the place of an unlearned model."""
    made = {}
    for name in CHECKPOINTS:
        original, unlearned = load(str(data_dir / name)), load(str(data_dir / name))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in unlearned.parameters():
                parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)
        for model in (original, unlearned):
            unsettle(model)
        made[name] = Attacked(unlearned, AutoTokenizer.from_pretrained(data_dir / name), original)
    return made


def with_adapter(path) -> torch.nn.Module:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=2)
    model = get_peft_model(load(str(path)), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def surroundings(tokenizer) -> tuple:
    """All that a run could change beside the models."""
    return (
        tokenizer.chat_template,
        tokenizer.padding_side,
        tokenizer.pad_token,
        len(tokenizer),
        random.getstate(),
        numpy.random.get_state()[1].tolist(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
    )


def test_none_is_left_out():
    assert list(LESS) == list(ATTACKS)


@pytest.mark.parametrize("name", LESS)
@pytest.mark.parametrize(
    "checkpoint", [CHECKPOINTS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in CHECKPOINTS[1:])]
)
def test_every_attack_gives_scores_and_the_models_back(data_dir, models, tmp_path, checkpoint, name):
    attacked, data = models[checkpoint], short_data(tmp_path)
    if name == "adapter_removal":
        attacked = dataclasses.replace(attacked, model=with_adapter(data_dir / checkpoint))
        unsettle(attacked.model)
    small = ATTACKS[name].budgets["small"]
    assert LESS[name].keys() <= small.keys()
    specification = dataclasses.replace(ATTACKS[name], budgets={"tiny": {**small, **LESS[name]}})
    before = [state(model) for model in (attacked.model, attacked.original)]
    around = surroundings(attacked.tokenizer)

    result, trials = run_attack(name, specification, "tiny", attacked, None, data, seed=3)

    assert same_state(attacked.model, before[0]) and same_state(attacked.original, before[1])
    assert surroundings(attacked.tokenizer) == around
    assert trials.keys() == {"unlearned", "original", "control"}, result.reason
    every = [trial for role in trials.values() for trial in role]
    scores = [value for trial in every for value in (trial.score, trial.utility, *trial.rows)]
    scores += [result.score_before, result.score_after, result.score_original_attacked, result.utility_after]
    assert all(0 <= score <= 1 for score in scores)  # NaN is not
    assert any(trial.score == result.score_after for trial in trials["unlearned"])
    assert result.score_control_attacked == result.score_before and "unattacked" in result.control
    assert_no_text(json.dumps([result.budget, *(trial.settings for trial in every)]))

    again, trials_again = run_attack(name, specification, "tiny", attacked, None, data, seed=3)
    assert trials_again == trials
    assert without_time(again) == without_time(result)


def without_time(result) -> dict:
    return {key: value for key, value in dataclasses.asdict(result).items() if key != "seconds"}


def assert_no_text(settings: str) -> None:
    """Not even a word of a question or an answer."""
    text = " ".join(value for row in (*SHORT_FORGET, *SHORT_RETAIN) for value in row.values())
    words = set(re.findall(r"[a-z]{3,}", text.lower())) - {"the"}
    assert len(words) > 20 and not words & set(re.findall(r"[a-z]+", settings.lower()))
