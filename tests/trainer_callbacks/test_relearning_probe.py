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
"""RelearningProbeCallback: a run with it equals a run without it, and its trials see what relearning would."""

import copy
import random

import numpy
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_unlearn import UnlearnConfig, UnlearnTrainer
from hf_unlearn.attacks.base import AttackData, Attacked
from hf_unlearn.attacks.relearn import relearn
from hf_unlearn.trainer_callbacks import RelearningProbeCallback, ScopeGuardCallback


BEFORE, AFTER = "eval_relearning_before", "eval_relearning_after"


@pytest.fixture
def rows(tofu_rows):
    return tofu_rows("forget10")[:20]


@pytest.fixture
def probe(rows):
    def make(**options):
        settings = {"every_steps": 2, "learning_rate": 1e-3, "steps": 3, "max_length": 256}
        return RelearningProbeCallback(
            Dataset.from_list(rows[:14]), Dataset.from_list(rows[14:]), **{**settings, **options}
        )

    return make


class StateOfTraining(TrainerCallback):
    """Everything a step may depend on, after each step; the last callback, and so after any probe."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, model, optimizer=None, **kwargs):
        self.states.append(
            {
                "weights": {name: weight.detach().clone() for name, weight in model.state_dict().items()},
                "storage": [parameter.data_ptr() for parameter in model.parameters()],
                "gradients": [parameter.grad for parameter in model.parameters()],
                "flags": [parameter.requires_grad for parameter in model.parameters()],
                "modes": [module.training for module in model.modules()],
                "hooks": [len(module._forward_hooks) for module in model.modules()],
                "optimizer": copy.deepcopy(optimizer.state_dict()["state"]),
                "random": [torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate()],
                "storages_seen": len({parameter.data_ptr() for parameter in model.parameters()}),
            }
        )


def assert_equal_runs(plain, probed):
    assert len(plain.states) == len(probed.states) > 0
    for expected, actual in zip(plain.states, probed.states, strict=True):
        for name, weight in expected["weights"].items():
            assert torch.equal(actual["weights"][name], weight), name
        for key in ("gradients", "flags", "modes", "hooks", "random", "storages_seen"):
            assert actual[key] == expected[key], key
        assert actual["optimizer"].keys() == expected["optimizer"].keys()
        for index, moments in expected["optimizer"].items():
            assert all(torch.equal(actual["optimizer"][index][key], value) for key, value in moments.items())
    # The very same memory, which wrappers may hold views of
    assert all(state["storage"] == probed.states[0]["storage"] for state in probed.states)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def entries(trainer):
    return [entry for entry in trainer.state.log_history if AFTER in entry]


@pytest.mark.parametrize(
    "scope", ["all weights", pytest.param("some weights", marks=pytest.mark.slow), "lora with dropout"]
)
def test_an_unlearning_run_is_the_same_bit_for_bit(known_model, tofu_rows, rows, probe, tmp_path, scope):
    def run(*callbacks):
        watcher = StateOfTraining()
        trainer = UnlearnTrainer(
            known_model,
            args=UnlearnConfig(
                str(tmp_path),
                use_cpu=True,
                max_steps=4,
                learning_rate=1e-3,
                max_length=256,
                logging_steps=1,
                save_strategy="no",
                disable_tqdm=True,
                disable_dropout=False,
                trainable_layers="1-2" if scope == "some weights" else None,
            ),
            train_dataset=Dataset.from_list(rows),
            retain_dataset=Dataset.from_list(tofu_rows("retain90")[:20]),
            peft_config=LoraConfig(target_modules="all-linear", lora_dropout=0.2) if "lora" in scope else None,
            callbacks=[ScopeGuardCallback(), *callbacks, watcher],
        )
        trainer.train()
        return trainer, watcher

    plain, plain_watcher = run()
    probed, probed_watcher = run(probe())
    assert_equal_runs(plain_watcher, probed_watcher)
    assert losses(plain) == losses(probed) and len(losses(plain)) == 4
    assert [entry["step"] for entry in entries(probed)] == [2, 4]


@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_other_trainers_are_the_same_bit_for_bit(known_model, rows, probe, tmp_path, kind):
    """With dropout, an optimizer with momentum and gradient accumulation: any draw or stray gradient would show."""
    tokenizer = AutoTokenizer.from_pretrained(known_model)
    common = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }

    def run(*callbacks):
        watcher = StateOfTraining()
        torch.manual_seed(0)
        if kind == "trl":
            trainer = SFTTrainer(
                known_model,
                args=SFTConfig(str(tmp_path), max_length=64, report_to="none", **common),
                train_dataset=Dataset.from_list([{"text": row["answer"]} for row in rows]),
                processing_class=tokenizer,
                peft_config=LoraConfig(target_modules="all-linear", lora_dropout=0.2),
                callbacks=[*callbacks, watcher],
            )
        else:
            model = AutoModelForCausalLM.from_pretrained(known_model, dtype=torch.float32, attention_dropout=0.2)
            ids = [tokenizer(row["answer"])["input_ids"][:24] for row in rows]
            trainer = Trainer(
                model,
                args=TrainingArguments(str(tmp_path), **common),
                train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in ids if len(row) == 24]),
                processing_class=tokenizer,
                callbacks=[*callbacks, watcher],
            )
        trainer.train()
        return trainer, watcher

    plain, plain_watcher = run()
    probed, probed_watcher = run(probe())
    assert_equal_runs(plain_watcher, probed_watcher)
    assert losses(plain) == losses(probed)
    first, last = plain_watcher.states[0]["random"][0], plain_watcher.states[-1]["random"][0]
    assert first != last  # dropout drew
    assert len(entries(probed)) == 2


def plain_training(model, tokenizer, callback, tmp_path, learning_rate=0.0):
    rows = Dataset.from_list([{"input_ids": [1, 5, 9, 30], "labels": [1, 5, 9, 30]}] * 4)
    trainer = Trainer(
        model,
        args=TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            max_steps=1,
            learning_rate=learning_rate,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    return trainer


@pytest.fixture
def forgetful(known_model):
    """The model that knows, moved by noise until it knows less."""
    model = AutoModelForCausalLM.from_pretrained(known_model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight += 0.12 * weight.std() * torch.randn(weight.shape, generator=generator)
    return model


def test_a_trial_is_relearning_of_the_model_as_it_stands(forgetful, known_model, rows, probe, tmp_path):
    """Training at rate 0 leaves the weights: the trial is then one point of the attack's curve."""
    tokenizer = AutoTokenizer.from_pretrained(known_model)
    seed = 4
    held_out = Dataset.from_list(rows[14:])
    args = UnlearnConfig(str(tmp_path / "args"), use_cpu=True, max_length=256)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(seed)).tolist()
    data = AttackData(Dataset.from_list(rows[:14]), held_out, held_out, args)
    # The attack shuffles T before it takes rows of it: hand it over so that its first rows are T in order
    inverse = sorted(range(14), key=order.__getitem__)
    data = AttackData(data.train.select(inverse), held_out, held_out, args)
    settings = {"learning_rates": {"full": [1e-3, 1e-4]}, "samples": [14], "steps": 5, "batch_size": 8}
    curve = relearn(Attacked(forgetful, tokenizer, forgetful), data, {**settings, "score_every": 5}, seed)
    (entry,) = entries(plain_training(forgetful, tokenizer, probe(every_steps=1, steps=5, seed=seed), tmp_path))
    assert entry[BEFORE] == pytest.approx(curve[0].score, abs=1e-7)
    assert entry[AFTER] == pytest.approx(curve[1].score, abs=1e-5)
    assert entry[AFTER] > entry[BEFORE] + 0.05  # it came back


def test_a_model_that_never_knew_relearns_little(tiny_model_path, probe, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    (entry,) = entries(plain_training(model, tokenizer, probe(every_steps=1), tmp_path))
    assert entry[AFTER] < 0.15


def test_only_trained_tensors_are_copied_and_moved(forgetful, known_model, probe, tmp_path, monkeypatch):
    """The others stay where they are while the trial runs, whatever the optimizer does."""
    name = "model.layers.2.mlp.down_proj.weight"
    forgetful.requires_grad_(False)
    forgetful.get_parameter(name).requires_grad_()
    before = {key: weight.clone() for key, weight in forgetful.state_dict().items()}
    seen = []

    def record(model, parameters, *args, **kwargs):
        from hf_unlearn.attacks.finetuning import fine_tune

        fine_tune(model, parameters, *args, **kwargs)
        seen.append({key for key, weight in model.state_dict().items() if not torch.equal(weight, before[key])})

    monkeypatch.setattr("hf_unlearn.trainer_callbacks.relearning_probe.fine_tune", record)
    plain_training(forgetful, AutoTokenizer.from_pretrained(known_model), probe(every_steps=1), tmp_path)
    assert seen == [{name}]
    assert all(torch.equal(weight, before[key]) for key, weight in forgetful.state_dict().items())


def test_the_model_is_put_back_when_a_trial_fails(forgetful, known_model, probe, tmp_path, monkeypatch):
    before = {key: weight.clone() for key, weight in forgetful.state_dict().items()}
    storage = [parameter.data_ptr() for parameter in forgetful.parameters()]

    def fail(model, parameters, *args, **kwargs):
        with torch.no_grad():
            for parameter in parameters:
                parameter.zero_()
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_unlearn.trainer_callbacks.relearning_probe.fine_tune", fail)
    with pytest.raises(KeyboardInterrupt):
        plain_training(forgetful, AutoTokenizer.from_pretrained(known_model), probe(every_steps=1), tmp_path)
    assert all(torch.equal(weight, before[key]) for key, weight in forgetful.state_dict().items())
    assert [parameter.data_ptr() for parameter in forgetful.parameters()] == storage


def test_a_trial_that_diverges_ends_no_run(forgetful, known_model, probe, tmp_path, caplog):
    before = {key: weight.clone() for key, weight in forgetful.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(known_model)
    trainer = plain_training(forgetful, tokenizer, probe(every_steps=1, learning_rate=1e30), tmp_path)
    assert trainer.state.global_step == 1 and not entries(trainer)
    assert any("at step 1 diverged" in record.getMessage() for record in caplog.records)
    assert all(torch.equal(weight, before[key]) for key, weight in forgetful.state_dict().items())


def test_shared_rows_are_refused_when_training_begins(known_model, rows, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(known_model, dtype=torch.float32)
    callback = RelearningProbeCallback(Dataset.from_list(rows[:14]), Dataset.from_list(rows[11:]))
    with pytest.raises(ValueError, match="^3 of the 9 held-out rows also stand among") as error:
        plain_training(model, AutoTokenizer.from_pretrained(known_model), callback, tmp_path)
    assert not any(row["answer"] in str(error.value) for row in rows)


@pytest.mark.parametrize("options", [{"every_steps": 0}, {"steps": 0}])
def test_settings_out_of_range_are_refused(probe, options):
    with pytest.raises(ValueError, match="every_steps and steps must be at least 1"):
        probe(**options)
