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
Layers that no step runs wait in host memory, and nothing else changes.

The device of these tests is the CPU, told that host memory lies elsewhere: weights are copied as they would be to
another device, and which of the two tensors a parameter has is what the tests look at. A device's memory itself is
looked at in `test_engines_gpu.py`.
"""

import copy
import json
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset
from distributed import unread_layers_worker
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

import hf_unlearn.unread_layers
from hf_unlearn import UnlearnConfig, UnlearnTrainer
from hf_unlearn.scope import freeze_all_but
from hf_unlearn.unread_layers import UnreadLayers


RMU = {
    "forget_loss": ["rmu"],
    "retain_loss": ["hidden_mse"],
    "hidden_layer": 2,
    "trainable_layers": "1-2",
    "trainable_modules": ["mlp.down_proj"],
}
LORA = {"forget_loss": ["circuit_breaker"], "retain_loss": ["circuit_breaker"], "circuit_breaker_layers": "1,2"}
SETS = {"forget": "forget10", "retain": "retain90"}
ABOVE = ("model.layers.3.", "model.layers.4.")


def make_model(tiny_model_path: str):
    """An untied head: its weights wait, too. (That of the checkpoint is tied, and is read as the embedding.)"""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32, tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    return model


@pytest.fixture
def make_trainer(tiny_model_path, tokenizer, tofu_rows, tmp_path, monkeypatch):
    rows = tofu_rows("forget10")[:6], tofu_rows("retain90")[:6]

    def make(settings: dict, waits: bool = True, name: str = "out", peft_config=None, **options) -> UnlearnTrainer:
        monkeypatch.setattr(hf_unlearn.unread_layers, "host_is_elsewhere", lambda device: waits)
        args = UnlearnConfig(
            str(tmp_path / name),
            use_cpu=True,
            bf16=False,
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            max_length=32,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            save_steps=1,
            disable_tqdm=True,
            report_to="none",
            **settings,
        )
        forget, retain = (Dataset.from_list(each) for each in rows)
        return UnlearnTrainer(
            make_model(tiny_model_path),
            args=args,
            train_dataset=forget,
            retain_dataset=retain,
            eval_dataset={"retain": retain},
            processing_class=tokenizer,
            peft_config=peft_config,
            **options,
        )

    return make


def results(trainer: UnlearnTrainer) -> tuple[dict, list[dict]]:
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    times = ("runtime", "per_second")
    logs = [
        {key: value for key, value in entry.items() if not key.endswith(times)} for entry in trainer.state.log_history
    ]
    return trained, logs


@pytest.mark.parametrize(
    "case", ["matrices", "adapter", "copied reference", "noise and adversary", "sam", "all that may wait is read"]
)
def test_training_evaluating_and_saving_give_the_same_bits(make_trainer, case):
    peft_config = None
    settings = {
        "matrices": RMU,
        "adapter": LORA,
        "copied reference": {**RMU, "reference_mode": "copy"},
        "noise and adversary": {**RMU, "reference_noise_std": 0.1, "latent_adversary_layers": "1"},
        "sam": {**RMU, "sharpness": "sam"},
        "all that may wait is read": {**RMU, "retain_loss": ["kl"]},
    }[case]
    if case == "adapter":
        peft_config = LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"], layers_to_transform=[1, 2], r=4)
    plain = make_trainer(settings, waits=False, peft_config=peft_config)
    plain.train()
    waiting = make_trainer(settings, name="waiting", peft_config=peft_config)
    assert plain.unread_layers is None
    assert (waiting.unread_layers is None) == (case == "all that may wait is read")
    waiting.train()
    (values, logs), (expected_values, expected_logs) = results(waiting), results(plain)
    assert values.keys() == expected_values.keys()
    assert all(torch.equal(values[name], value) for name, value in expected_values.items())
    assert logs == expected_logs
    saved, expected = (trainer.model.state_dict() for trainer in (waiting, plain))
    assert all(torch.equal(saved[name], value) for name, value in expected.items())


class WhereTheyAre(TrainerCallback):
    """The places of the unread weights, by event."""

    def __init__(self):
        self.seen: dict[str, set[bool]] = {}
        self.layers: UnreadLayers | None = None

    def _look(self, event: str) -> None:
        on_host = [parameter.data_ptr() == value.data_ptr() for parameter, value in self.layers.on_host]
        self.seen.setdefault(event, set()).update(on_host)

    def on_train_begin(self, args, state, control, **kwargs):
        self._look("begin")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._look("step")

    def on_evaluate(self, args, state, control, **kwargs):
        self._look("evaluation")


def test_they_wait_in_every_step_and_come_for_an_evaluation(make_trainer):
    callback = WhereTheyAre()
    trainer = make_trainer(RMU, callbacks=[callback])
    callback.layers = trainer.unread_layers
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    waiting = {names[id(parameter)] for parameter, _ in trainer.unread_layers.on_host}
    expected = {name for name in names.values() if name.startswith((*ABOVE, "lm_head."))}
    assert waiting == expected
    trainer.train()
    assert callback.seen == {"begin": {True}, "step": {True}, "evaluation": {False}}


@pytest.mark.parametrize("reference_mode", ["auto", "copy"])
def test_nobody_moves_them(make_trainer, monkeypatch, reference_mode):
    """Not the Trainer's constructor, and not accelerate when training begins: they never lie on the device at once."""
    moved = []
    move = torch.nn.Module.to

    def counting_move(self, *args, **kwargs):
        if isinstance(self, torch.nn.Module) and hasattr(self, "lm_head"):
            moved.append(sum(parameter.nbytes for parameter in self.parameters()))
        return move(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", counting_move)
    trainer = make_trainer({**RMU, "reference_mode": reference_mode})
    in_constructor = len(moved)
    trainer.train()
    all_bytes = sum(parameter.nbytes for parameter in trainer.model.parameters())
    assert in_constructor == (1 if reference_mode == "auto" else 2) < len(moved)
    assert set(moved) == {all_bytes - trainer.unread_layers.num_bytes}
    assert trainer.unread_layers.num_bytes > 0.3 * all_bytes


def test_resumed(make_trainer, tmp_path):
    whole = make_trainer(RMU, name="whole")
    whole.train()
    resumed = make_trainer(RMU, name="resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    values, expected = results(resumed)[0], results(whole)[0]
    assert all(torch.equal(values[name], value) for name, value in expected.items())


def test_whoever_runs_them_brings_them(random_model):
    model = random_model(num_hidden_layers=4, tie_word_embeddings=False)
    freeze_all_but(model, ["model.layers.1.mlp.down_proj.weight"])
    input_ids = torch.tensor([[1, 2, 3]])
    expected = model(input_ids).logits
    generated = model.generate(input_ids, max_new_tokens=3, do_sample=False)
    layers = UnreadLayers(model, 1, torch.device("cpu"))
    with torch.inference_mode():
        assert torch.equal(model(input_ids).logits, expected)
    assert layers.is_on_device
    layers.leave()
    assert torch.equal(model.generate(input_ids, max_new_tokens=3, do_sample=False), generated)
    assert layers.is_on_device
    layers.leave()
    layers.remove()
    model(input_ids)
    assert not layers.is_on_device


def test_a_copy_brings_its_own(random_model):
    model = random_model(num_hidden_layers=4, tie_word_embeddings=False)
    freeze_all_but(model, ["model.layers.1.mlp.down_proj.weight"])
    layers = UnreadLayers(model, 1, torch.device("cpu"))
    copied = copy.deepcopy(model)
    input_ids = torch.tensor([[1, 2, 3]])
    [hook] = copied.model.layers[2]._forward_pre_hooks.values()
    assert torch.equal(copied(input_ids).logits, model(input_ids).logits)
    layers.leave()
    own = hook.__self__
    own.leave()
    copied(input_ids)
    assert own.is_on_device
    assert not layers.is_on_device
    assert {id(parameter) for parameter, _ in own.on_host} <= {id(parameter) for parameter in copied.parameters()}


def test_what_is_tied_or_trained_stays(random_model):
    tied = random_model(num_hidden_layers=4, tie_word_embeddings=True)
    freeze_all_but(tied, ["model.layers.1.mlp.down_proj.weight", "model.layers.3.mlp.down_proj.weight"])
    layers = UnreadLayers(tied, 1, torch.device("cpu"))
    names = {id(parameter): name for name, parameter in tied.named_parameters()}
    waiting = {names[id(parameter)] for parameter, _ in layers.on_host}
    assert not any(name.startswith(("lm_head", "model.embed_tokens", "model.norm")) for name in waiting)
    assert "model.layers.3.mlp.up_proj.weight" in waiting
    assert "model.layers.3.mlp.down_proj.weight" not in waiting


def test_what_is_hidden_is_empty_and_comes_back(tiny_model_path):
    model = make_model(tiny_model_path)
    freeze_all_but(model, ["model.layers.1.mlp.down_proj.weight"])
    layers = UnreadLayers(model, 2, torch.device("cpu"))
    with layers.hidden():
        assert {parameter.numel() for parameter, _ in layers.on_host} == {0}
    assert all(parameter.data_ptr() == value.data_ptr() for parameter, value in layers.on_host)


def test_what_is_kept_elsewhere_is_left_there(random_model):
    """A model that accelerate has offloaded: its weights are on the meta device, and it brings them by itself."""
    model = random_model(num_hidden_layers=4, tie_word_embeddings=False)
    freeze_all_but(model, ["model.layers.1.mlp.down_proj.weight"])
    input_ids = torch.tensor([[1, 2, 3]])
    expected = model(input_ids).logits
    cpu_offload(model.model.layers[3], torch.device("cpu"))
    layers = UnreadLayers(model, 1, torch.device("cpu"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    waiting = {names[id(parameter)] for parameter, _ in layers.on_host}
    assert "model.layers.2.mlp.up_proj.weight" in waiting
    assert not any(name.startswith("model.layers.3.") for name in waiting)
    assert torch.equal(model(input_ids).logits, expected)


@pytest.mark.slow
def test_two_processes(tiny_model_path, tofu_rows, tmp_path):
    """DDP: neither its constructor nor its broadcasts touch what waits."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps({name: tofu_rows(file)[:8] for name, file in SETS.items()}))
    results = []
    for waits in (False, True):
        output = tmp_path / f"waits-{waits}"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*launcher, unread_layers_worker.__file__, tiny_model_path, str(rows), str(waits), str(output)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        result = json.loads(output.with_suffix(".json").read_text())
        results.append((result, load_file(output / "model.safetensors")))
    (plain, weights), (waiting, waiting_weights) = results
    assert waiting == plain
    assert waiting["processes"] == 2
    assert weights.keys() == waiting_weights.keys()
    assert all(torch.equal(waiting_weights[name], value) for name, value in weights.items())
