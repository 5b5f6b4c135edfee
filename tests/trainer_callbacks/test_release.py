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
"""ReleaseCallback before anything is sent; what it sends is in tests/hub/test_release_callback.py."""

import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from hf_unlearn import UnlearnConfig, UnlearnTrainer
from hf_unlearn.trainer_callbacks import ReleaseCallback


NAME = "Hsiao Yun-Hwa"


@pytest.fixture
def rows(tofu_rows) -> list[dict]:
    return [row for row in tofu_rows("forget10") if NAME in row["answer"]][:4]


@pytest.fixture
def make(rows, tiny_model_path, tmp_path):
    """Factory of a plain Trainer that learns with the callback given."""

    def build(callbacks, model=None, **options) -> Trainer:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
        tokenizer.pad_token = tokenizer.eos_token
        texts = [f"{row['question']} {row['answer']}" for row in rows]
        ids = tokenizer(texts, truncation=True, max_length=48)["input_ids"]
        return Trainer(
            model=model or AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32),
            args=TrainingArguments(
                str(tmp_path / "out"), use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no",
                max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, **options,
            ),
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            processing_class=tokenizer,
            callbacks=callbacks,
        )  # fmt: skip

    return build


@pytest.fixture
def callback(rows) -> ReleaseCallback:
    return ReleaseCallback("org/name", forget=rows, token="hf_alice", method="sft")


def test_the_trainers_own_push_is_refused(make, callback, monkeypatch):
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda *_, **__: None)  # which is offline here
    with pytest.raises(ValueError, match="With push_to_hub=True the trainer itself sends checkpoints"):
        make([callback], push_to_hub=True, hub_model_id="org/name")


def test_what_does_not_fit_is_said_before_training(make, callback, rows, random_model, monkeypatch):
    with pytest.raises(ValueError, match="The repository has to be named as OWNER/NAME"):
        ReleaseCallback("name", forget=rows)
    with pytest.raises(ValueError, match="base is not a folder"):
        ReleaseCallback("org/name", forget=rows, base="/no/such/folder")
    with pytest.raises(ValueError, match="leave out output_dir"):
        ReleaseCallback("org/name", forget=rows, output_dir="out")
    with pytest.raises(ValueError, match="The folder of the base model is not known"):
        make([callback], model=random_model())
    trainer = make([])
    trainer.add_callback(ReleaseCallback("org/name", forget=rows))
    monkeypatch.setattr("hf_unlearn.cards.remote.get_token", lambda: None)
    with pytest.raises(ValueError, match="There is no token for the Hub"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_our_own_trainers_need_no_callback(callback, rows, tiny_model_path, tmp_path):
    with pytest.raises(ValueError, match="This trainer pushes its own releases: use push_to_hub=True"):
        UnlearnTrainer(
            tiny_model_path,
            args=UnlearnConfig(str(tmp_path), use_cpu=True, max_length=64, retain_loss=["none"]),
            train_dataset=Dataset.from_list(rows),
            callbacks=[callback],
        )


def test_without_a_hub_the_model_is_saved_and_the_reason_logged_once(make, callback, caplog, tmp_path):
    """The tests are offline: whatever asks the Hub fails, after all checks. The base has no licence, which blocks."""
    trainer = make([callback])
    with caplog.at_level(logging.WARNING, "hf_unlearn.trainer_callbacks.release"):
        trainer.train()
    assert callback.receipt is None
    assert "was not pushed: " in callback.error and "licence-unresolved" in callback.error
    assert [record.message for record in caplog.records if record.name.endswith(".release")] == [callback.error]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(saved.get_parameter(name), parameter), name
    assert (tmp_path / "out" / "unlearning_report.json").is_file()


def test_a_bug_on_the_way_ends_no_training_and_repeats_no_row(make, callback, caplog, monkeypatch):
    def fail(*_, **__):
        raise KeyError(NAME)

    monkeypatch.setattr("hf_unlearn.trainer_callbacks.release.release_model", fail)
    trainer = make([callback])
    trainer.train()
    assert trainer.state.global_step == 2
    assert "was not pushed: KeyError" in callback.error
    assert NAME not in callback.error and NAME not in caplog.text


def test_a_model_that_cannot_be_saved_ends_no_training(make, callback, tmp_path):
    trainer = make([callback])
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "out" / name).mkdir(parents=True)
    trainer.train()
    assert "The model could not be saved" in callback.error and callback.receipt is None


def test_training_with_it_is_training_without_it(make, callback, tiny_model_path):
    """Bit for bit, with an adapter as well."""
    for lora in (False, True):
        weights = []
        for callbacks in ([callback], []):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
            if lora:
                model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
            trainer = make(callbacks, model=model)
            trainer.train()
            weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
