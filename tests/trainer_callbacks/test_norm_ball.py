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
"""NormBallCallback: the trained tensors never leave the ball, and what stays within is not touched."""

import json
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from distributed import norm_ball_worker
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_unlearn.trainer_callbacks import NormBallCallback


NAME = "model.layers.1.mlp.down_proj.weight"


class Distances(TrainerCallback):
    """How far each parameter is from where it began, after every step, by its own account."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.start = {name: parameter.detach().clone().double() for name, parameter in model.named_parameters()}
        self.seen = []

    def on_step_end(self, args, state, control, model, **kwargs):
        now = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
        self.seen.append({name: (now[name] - self.start[name]).norm().item() for name in now})

    def all(self) -> list[float]:
        return [sum(value**2 for value in step.values()) ** 0.5 for step in self.seen]


@pytest.fixture
def model(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)


@pytest.fixture
def plain(model, tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 500, (24,), generator=generator).tolist() for _ in range(16)]

    def make(*callbacks, model=model, **options):
        settings = {
            "use_cpu": True,
            "max_steps": 6,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "disable_tqdm": True,
            "report_to": "none",
            **options,
        }
        return Trainer(
            model,
            args=TrainingArguments(str(tmp_path), **settings),
            train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
            callbacks=list(callbacks),
        )

    return make


def test_by_hand():
    """(3, 4) from the origin has the norm 5: a ball of 1 takes it to (.6, .8)."""
    layer = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    ball = NormBallCallback(1.0)
    state = type("State", (), {"global_step": 0, "log_history": [], "epoch": 0.0})()
    ball.on_train_begin(None, state, None, model=layer)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
    ball.on_optimizer_step(None, state, None)
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([[0.6, 0.8]]))
    assert ball.distances == {"all": pytest.approx(1.0)}
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.3, 0.4]]))
    ball.on_optimizer_step(None, state, None)
    assert layer.weight.tolist() == [[torch.tensor(0.3).item(), torch.tensor(0.4).item()]]
    assert ball.distances == {"all": pytest.approx(0.5)}


def test_no_step_leaves_the_ball(plain, model):
    radius, free, seen = 0.05, Distances(), Distances()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plain(free).train()
    assert min(free.all()) > 2 * radius  # without it, each step would
    model.load_state_dict(start, strict=False)
    ball = NormBallCallback(radius)
    plain(ball, seen).train()
    assert len(seen.all()) == 6 and max(seen.all()) <= radius * (1 + 1e-5)
    assert seen.all()[-1] == pytest.approx(radius, rel=1e-4) == ball.distances["all"]


def test_each_tensor_has_a_ball_of_its_own(plain, model):
    seen, norms = Distances(), {name: parameter.norm().item() for name, parameter in model.named_parameters()}
    ball = NormBallCallback(0.01, relative=True, per_tensor=True)
    plain(ball, seen).train()
    for step in seen.seen:
        assert all(step[name] <= 0.01 * norms[name] * (1 + 1e-4) for name in norms)
    at_the_edge = [name for name in norms if seen.seen[-1][name] >= 0.01 * norms[name] * (1 - 1e-4)]
    assert len(at_the_edge) > 10 and ball.distances.keys() == norms.keys()


def test_a_ball_that_is_wide_enough_changes_no_bit(plain, model):
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plain().train()
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.load_state_dict(start, strict=False)
    plain(NormBallCallback(1e6), NormBallCallback(0.999e6, per_tensor=True)).train()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())


def test_only_what_is_named_is_watched(plain):
    seen = Distances()
    plain(NormBallCallback(1e-3, tensors=[r".*layers\.1\.mlp\.down_proj\.weight"]), seen).train()
    last = seen.seen[-1]
    assert last[NAME] == pytest.approx(1e-3, rel=1e-3) and last["model.layers.2.mlp.down_proj.weight"] > 0.01


def test_resuming_keeps_the_centre(plain, model, tmp_path):
    """The ball is around where the first run began, not around the checkpoint."""
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    options = {"save_strategy": "steps", "save_steps": 3}
    plain(NormBallCallback(0.05), **options).train()
    whole = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.load_state_dict(start, strict=False)
    plain(NormBallCallback(0.05), **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(parameter, whole[name]) for name, parameter in model.named_parameters())
    # A trainer that was made with other weights would centre it elsewhere
    with torch.no_grad():
        model.get_parameter(NAME)[0, 0] += 1.0
    with pytest.raises(ValueError, match="began at other weights"):
        plain(NormBallCallback(0.05), **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    trainer = plain(**options)
    trainer.add_callback(NormBallCallback(0.05))
    with pytest.raises(ValueError, match="does not know where the run that is resumed began"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_its_state_is_plain_json(plain, tmp_path):
    ball = NormBallCallback(0.05)
    trainer = plain(ball, save_strategy="steps", save_steps=3)
    trainer.train()
    history = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert len(history[0]["norm_ball_start_all"]) == 64
    assert not any(value is trainer for value in vars(ball).values())


@pytest.mark.parametrize("options", [{"radius": 0.0}, {"radius": -1.0}, {"radius": float("nan")}])
def test_a_radius_without_room(options):
    with pytest.raises(ValueError, match="leaves no room"):
        NormBallCallback(**options)


def test_a_pattern_without_a_match(plain):
    with pytest.raises(ValueError, match="matches no parameter"):
        plain(NormBallCallback(1.0, tensors=["lm_hed"]))


def test_sft_with_a_lora_and_dpo(tiny_model_path, tofu_rows, tmp_path):
    """TRL's trainers, the adapter's tensors in a ball around their random start."""
    rows = tofu_rows("forget01")[:6]
    options = {
        "use_cpu": True,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [{"prompt": row["question"], "completion": row["answer"]} for row in rows]
    pairs = [{"prompt": row["question"], "chosen": "I do not know.", "rejected": row["answer"]} for row in rows]
    for cls, config, data in (
        (SFTTrainer, SFTConfig(str(tmp_path / "sft"), **options), texts),
        (DPOTrainer, DPOConfig(str(tmp_path / "dpo"), **options), pairs),
    ):
        ball, seen = NormBallCallback(0.02), Distances()
        cls(
            AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32),
            args=config,
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4),
            callbacks=[ball, seen],
        ).train()
        assert max(seen.all()) == pytest.approx(0.02, rel=1e-3) and ball.distances["all"] == pytest.approx(0.02)


@pytest.mark.slow
def test_ddp_and_fsdp2_keep_the_same_ball(tiny_model_path, tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 500, (16,), generator=generator).tolist() for _ in range(8)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    runs = {}
    for name, launcher, world_size, fsdp in (
        ("one", [sys.executable], 1, False),
        ("ddp", torchrun, 2, False),
        ("fsdp2", torchrun, 2, True),
    ):
        spec = {
            "output": str(tmp_path / name),
            "model": tiny_model_path,
            "rows": rows,
            "steps": 3,
            "world_size": world_size,
            "fsdp": fsdp,
            "ball": {"radius": 0.02},
        }
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(spec))
        run = subprocess.run(
            [*launcher, norm_ball_worker.__file__, str(path)], capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, run.stderr[-3000:]
        runs[name] = load_file(tmp_path / name / "weights.safetensors")
        distance = json.loads((tmp_path / name / "distances.json").read_text())["all"]
        assert distance == pytest.approx(0.02, rel=1e-4), name
    start = dict(AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).named_parameters())
    moved = sum((runs["one"][name] - start[name]).norm().item() ** 2 for name in start) ** 0.5
    assert moved == pytest.approx(0.02, rel=1e-4)
    for name in ("ddp", "fsdp2"):
        apart = sum((runs["one"][key] - runs[name][key]).norm().item() ** 2 for key in start) ** 0.5
        assert apart < 1e-3 * moved, name
