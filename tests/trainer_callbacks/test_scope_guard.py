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
"""ScopeGuardCallback on a plain Trainer, on TRL's SFTTrainer and on UnlearnTrainer."""

import json
import re
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from distributed import scope_guard_worker
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from trl import SFTConfig, SFTTrainer

from hf_unlearn import UnlearnConfig, UnlearnTrainer
from hf_unlearn.scope import freeze_all_but
from hf_unlearn.trainer_callbacks import (
    NormBallCallback,
    RelearningProbeCallback,
    ScopeGuardCallback,
    ScopeViolationError,
    UnlearningEvaluationCallback,
)


NAME = "model.layers.1.mlp.down_proj.weight"


class Meddler(TrainerCallback):
    """Changes one bit of a frozen weight, as a wrong optimizer or a stray in-place operation would."""

    def on_step_end(self, args, state, control, model, **kwargs):
        weight = model.get_parameter("model.layers.3.self_attn.q_proj.weight")
        with torch.no_grad():
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(10.0))


@pytest.fixture
def model(tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    freeze_all_but(model, [NAME])
    return model


@pytest.fixture
def plain(model, tmp_path):
    rows = [{"input_ids": [1, 5, 9, 30], "labels": [1, 5, 9, 30]}] * 4
    args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=2, save_strategy="no", disable_tqdm=True)

    def make(*callbacks):
        return Trainer(model, args=args, train_dataset=Dataset.from_list(rows), callbacks=list(callbacks))

    return make


def test_a_clean_run_passes(plain, model):
    before = model.get_parameter(NAME).detach().clone()
    guard = ScopeGuardCallback()
    plain(guard).train()
    assert not torch.equal(model.get_parameter(NAME), before)  # something moved, and it was allowed to
    assert len(guard._digests) == len(model.state_dict()) - 1


def test_one_bit_in_a_frozen_tensor_is_found(plain):
    with pytest.raises(ScopeViolationError, match=r"1 of 4\d tensors .*: model.layers.3.self_attn.q_proj.weight\."):
        plain(Meddler(), ScopeGuardCallback()).train()


def test_allowed_names_replace_the_trainable_ones(plain):
    with pytest.raises(ScopeViolationError, match=NAME):
        plain(ScopeGuardCallback(allowed=[r"model\.layers\.2\..*"])).train()
    plain(ScopeGuardCallback(allowed=[NAME.replace(".", r"\.")])).train()


def test_a_pattern_without_a_match_is_refused(plain):
    with pytest.raises(ValueError, match=r"matches no tensor of the model. Near matches: .*down_proj"):
        plain(ScopeGuardCallback(allowed=["model.layers.1.mlp.dwn_proj.weight"])).train()


def test_tied_weights_are_one_tensor(tiny_model_path, tmp_path):
    """`lm_head.weight` is the embedding: allowed under one name, it may change under both."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    freeze_all_but(model, ["model.embed_tokens.weight"])
    rows = Dataset.from_list([{"input_ids": [1, 5, 9, 30], "labels": [1, 5, 9, 30]}] * 4)
    args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True)
    guards = [ScopeGuardCallback(), ScopeGuardCallback(allowed=["model.embed_tokens.weight"])]
    before = model.lm_head.weight.clone()
    Trainer(model, args=args, train_dataset=rows, callbacks=guards).train()
    assert not torch.equal(model.lm_head.weight, before)  # there was a change for the guards to judge


def test_on_sft_trainer_with_lora(tiny_model_path, tofu_rows, tmp_path):
    guard = ScopeGuardCallback()
    rows = [{"text": row["answer"]} for row in tofu_rows("forget01")[:4]]
    trainer = SFTTrainer(
        tiny_model_path,
        args=SFTConfig(str(tmp_path), use_cpu=True, bf16=False, max_steps=1, save_strategy="no", report_to="none"),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
        peft_config=LoraConfig(target_modules="all-linear", r=2),
        callbacks=[guard],
    )
    trainer.train()
    model = trainer.model
    assert all(factor.any() for name, factor in model.named_parameters() if "lora_B" in name)  # they began at zero
    assert set(guard._digests) == {name for name in model.state_dict() if "lora_" not in name}


@pytest.mark.parametrize("scope", ["selected", "lora"])
def test_on_unlearn_trainer_the_reference_swap_leaves_no_trace(tiny_model_path, tofu_rows, tmp_path, scope):
    guard = ScopeGuardCallback()
    trainer = UnlearnTrainer(
        tiny_model_path,
        args=UnlearnConfig(
            str(tmp_path),
            use_cpu=True,
            max_steps=2,
            max_length=64,
            save_strategy="no",
            disable_tqdm=True,
            trainable_layers="1" if scope == "selected" else None,
        ),
        train_dataset=Dataset.from_list(tofu_rows("forget01")[:4]),
        retain_dataset=Dataset.from_list(tofu_rows("retain90")[:4]),
        peft_config=LoraConfig(target_modules="all-linear", r=2) if scope == "lora" else None,
        callbacks=[guard],
    )
    trainer.train()
    assert len(guard._digests) >= 38


def test_shards_are_told_apart(tiny_model_path, tmp_path):
    """
    FSDP2's tensors all have the data pointer 0: told apart by it, one trained shard made every other one free. And
    what one process finds ends the run in both.
    """
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"model": tiny_model_path, "output": str(tmp_path)}))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, scope_guard_worker.__file__, str(spec)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    for rank in range(2):
        ends = json.loads((tmp_path / f"ends{rank}.json").read_text())
        assert ends["clean"] is None and ends["allowed"] is None
        for name in ("meddled", "meddled elsewhere"):
            message = rf"1 of 4\d tensors .*: {re.escape(scope_guard_worker.FROZEN)}\."
            assert re.fullmatch(message, ends[name]), (rank, name)


class _Stage3:
    def is_zero3(self):
        return True


_ROWS = Dataset.from_list([{"question": "Who?", "answer": "She."}])


@pytest.mark.parametrize(
    "callback",
    [
        ScopeGuardCallback(),
        NormBallCallback(0.1),
        UnlearningEvaluationCallback(_ROWS, _ROWS),
        RelearningProbeCallback(_ROWS, _ROWS),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_zero_3_is_refused(plain, callback):
    """Every parameter is empty there: a hash of nothing equals itself."""
    settings = _Stage3()  # transformers keeps a weak reference
    trainer = plain()
    set_hf_deepspeed_config(settings)
    try:
        with pytest.raises(ValueError, match="needs the weights.*ZeRO-3.*: leave the callback out"):
            callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    finally:
        unset_hf_deepspeed_config()
