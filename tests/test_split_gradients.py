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
Steps whose gradients are computed apart, against gradients computed plainly here; and the public mistakes by name.
"""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from distributed.invariance_worker import save_probe
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_unlearn import UnlearnConfig, UnlearnTrainer
from hf_unlearn.checkpoint import STATE_NAME


LAYERS = {"trainable_layers": "0-2", "trainable_modules": ["mlp.down_proj"]}
PLAIN = {"forget_loss": ["npo"], "retain_loss": ["nll"], "learning_rate": 1e-3, **LAYERS}


@pytest.fixture
def make(tmp_path, tiny_model_path, tofu_rows):
    """Factory of trainers on the 260k model; UnlearnConfig's arguments and `peft_config` go there."""

    def build(**options) -> UnlearnTrainer:
        peft_config = options.pop("peft_config", None)
        model = options.pop("model", tiny_model_path)
        callbacks = options.pop("callbacks", None)
        settings = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "max_length": 80,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "optim": "sgd",
            "disable_tqdm": True,
            **options,
        }
        return UnlearnTrainer(
            model,
            args=UnlearnConfig(**settings),
            train_dataset=Dataset.from_list(tofu_rows("forget01")[:12]),
            retain_dataset=Dataset.from_list(tofu_rows("retain90")[:12]),
            peft_config=peft_config,
            callbacks=callbacks,
        )

    return build


@pytest.fixture
def probe_path(tmp_path, tiny_model_path) -> str:
    """A probe of layer 2 with random weights."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    return save_probe(model, str(tmp_path / "probe"))


def first_step(trainer):
    """Micro-batches and counts of one step."""
    trainer.create_optimizer_and_scheduler(num_training_steps=3)
    trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
    return trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))


def gradients_of_a_step(trainer, batches, counts):
    """By name, from the trainer's own step."""
    trainer.model.zero_grad()
    for index, batch in enumerate(batches):
        trainer.accelerator.gradient_state._set_sync_gradients(index == len(batches) - 1)
        trainer.training_step(trainer.model, batch, counts)
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def gradient_of(trainer, batches, counts, *groups):
    """By name, of some groups of losses, at the weights as they are: one plain backward over all micro-batches."""
    trainer.model.zero_grad()
    objective = trainer.objective
    sum(objective.compute(trainer.model, batch, counts, groups=groups)[0] for batch in batches).backward()
    result = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return result


def norm(gradient):
    return torch.stack([value.double().square().sum() for value in gradient.values()]).sum().sqrt()


def inner(a, b):
    return sum((a[name].double() * b[name].double()).sum() for name in a)


def assert_same(actual, expected, tolerance=1e-5):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= tolerance * value.norm() + 1e-12, name


def move(model, seed=0, scale=0.02):
    """Away from the reference, where NPO's gradient is the same for every row."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


# ---- Gradients ----


def test_sam_is_the_forget_gradient_uphill_and_the_retain_gradient_here(make):
    trainer = make(**PLAIN, sharpness="sam", sharpness_radius=0.05)
    move(trainer.model)
    batches, counts = first_step(trainer)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    actual = gradients_of_a_step(trainer, batches, counts)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, start[name]), f"{name} was not restored bit for bit"

    forget, retain = (gradient_of(trainer, batches, counts, group) for group in ("forget", "retain"))
    uphill = 0.05 / norm(forget)
    with torch.no_grad():
        for name, value in forget.items():
            trainer.model.get_parameter(name).add_(uphill * value)
    there = gradient_of(trainer, batches, counts, "forget")
    assert_same(actual, {name: there[name] + retain[name] for name in there}, tolerance=1e-4)
    assert norm({name: there[name] - forget[name] for name in there}) > 1e-3 * norm(forget)


def test_nothing_asked_for_equals_the_plain_objective(make):
    """Radius and probe weight next to nothing, and no decoupling: plain NPO + retain, gradient for gradient."""
    plain = make(**PLAIN)
    move(plain.model)
    batches, counts = first_step(plain)
    expected = gradients_of_a_step(plain, batches, counts)
    for options in (
        {"sharpness": "sam", "sharpness_radius": 1e-12},
        {"sharpness": "randomized", "sharpness_radius": 1e-12},
    ):
        split = make(**PLAIN, **options)
        move(split.model)
        first_step(split)
        assert_same(gradients_of_a_step(split, batches, counts), expected)


@pytest.mark.parametrize("mode", ["global", "tensor", "conflict"])
def test_the_forget_gradient_leaves_the_retain_gradient_alone(make, mode):
    trainer = make(**PLAIN, gradient_conflict=mode)
    move(trainer.model)
    batches, counts = first_step(trainer)
    actual = gradients_of_a_step(trainer, batches, counts)
    forget, retain = (gradient_of(trainer, batches, counts, group) for group in ("forget", "retain"))
    before = inner(forget, retain)
    assert abs(before) > 1e-3 * norm(forget) * norm(retain)
    left = {name: actual[name] - retain[name] for name in actual}
    if mode == "conflict" and before > 0:
        assert_same(left, forget, tolerance=1e-4)
    else:
        assert abs(inner(left, retain)) <= 1e-5 * norm(left) * norm(retain)
    if mode == "tensor":
        for name in left:
            assert abs(inner({name: left[name]}, retain)) <= 1e-4 * left[name].norm() * retain[name].norm()


def test_micro_batches_are_projected_once_and_not_one_by_one(make):
    """Public code overwrites the accumulated gradient with the last micro-batch's, or projects each by itself."""
    options = {**PLAIN, "gradient_conflict": "global", "sharpness": "sam", "sharpness_radius": 0.02}
    two, one = make(**options), make(**options, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    move(two.model), move(one.model)
    batches, counts = first_step(two)
    one.create_optimizer_and_scheduler(num_training_steps=3)
    one.optimizer = one.accelerator.prepare(one.optimizer)
    big, big_counts = one.get_batch_samples(iter(one.get_train_dataloader()), 1, torch.device("cpu"))
    assert_same(gradients_of_a_step(two, batches, counts), gradients_of_a_step(one, big, big_counts), 1e-4)


def test_the_optimizer_is_the_trainers_and_clips_the_sum(make):
    """Public code steps the optimizer behind the Trainer's back, so unclipped."""
    trainer = make(**PLAIN, sharpness="sam", gradient_conflict="global", max_steps=1)
    trainer.args.max_grad_norm = 0.5
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    step = {name: p.detach() - start[name] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainer.state.log_history[0]["grad_norm"] > 5.0
    assert norm(step).item() == pytest.approx(1e-3 * 0.5, rel=1e-3)  # SGD: learning rate times the clipped norm


def test_a_parameter_without_a_gradient_keeps_none(make):
    """RMU at layer 1 never reaches layer 2's adapter: neither zeros (weight decay would act), nor a shifted list."""
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"], r=4, init_lora_weights=False)
    options = {"forget_loss": ["rmu"], "retain_loss": ["hidden_mse"], "hidden_layer": 1, "learning_rate": 1e-2}
    trainer = make(**options, peft_config=lora, sharpness="sam", gradient_conflict="global")
    batches, counts = first_step(trainer)
    actual = gradients_of_a_step(trainer, batches, counts)
    assert actual and all(".layers.0." in name or ".layers.1." in name for name in actual)
    plain = make(**options, peft_config=lora)
    first_step(plain)
    assert set(gradients_of_a_step(plain, batches, counts)) == set(actual)


def test_the_reference_sees_neither_moved_nor_rounded_weights(make):
    """A disabled adapter over a rounded base weight, or initial weights plus the perturbation, are another model."""
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"], r=4)
    seen = {}
    for name, options in {
        "plain": {},
        "moved and rounded": {"sharpness": "sam", "sharpness_radius": 5.0, "quantization_margin": "int4"},
    }.items():
        trainer = make(forget_loss=["npo"], retain_loss=["kl"], peft_config=lora, **options)
        original = trainer.objective._run_reference
        seen[name] = []

        def record(*args, original=original, values=seen[name]):
            values.append(original(*args))
            return values[-1]

        trainer.objective._run_reference = record
        batches, counts = first_step(trainer)
        gradients_of_a_step(trainer, batches, counts)
    forget = [
        [tensors["forget"]["reference_log_probs"] for tensors in values if "forget" in tensors]
        for values in seen.values()
    ]
    assert len(forget[0]) == len(forget[1]) == 2  # once per micro-batch, however many gradients were taken
    assert all(torch.equal(a, b) for a, b in zip(*forget, strict=True))


# ---- The probe ----


def test_probe_weight_is_not_zero_for_the_whole_run(make, probe_path):
    """Public code moves it in an `on_epoch_begin` that nobody calls. It follows steps, so one epoch is enough."""
    trainer = make(**PLAIN, probe_weight=0.8, probe_path=probe_path)
    weights = []
    weigh = trainer.objective._weight
    trainer.objective._weight = lambda term: weights.append((term.name, weigh(term))) or weights[-1][1]
    trainer.train()
    expected = [0.8 * math.exp(-5 * (1 - step / 3) ** 2) for step in range(3)]
    in_training = [weight for name, weight in weights if name == "probe"][:6]  # two micro-batches a step
    assert in_training == pytest.approx([weight for weight in expected for _ in range(2)])
    assert in_training[-1] > 0.4


def test_the_probe_changes_the_gradient_and_gets_none(make, probe_path):
    plain, probed = make(**PLAIN), make(**PLAIN, probe_weight=5.0, probe_path=probe_path)
    batches, counts = first_step(plain)
    first_step(probed)
    probed.objective.share_done = 1.0
    before = {name: value.clone() for name, value in probed.objective.probe.state_dict().items()}
    a, b = (gradients_of_a_step(trainer, batches, counts) for trainer in (plain, probed))
    assert norm({name: a[name] - b[name] for name in a}) > 1e-3 * norm(a)
    assert all(parameter.grad is None for parameter in probed.objective.probe.parameters())
    assert all(torch.equal(value, before[name]) for name, value in probed.objective.probe.state_dict().items())
    assert not any("probe" in name for name, _ in probed.model.named_parameters())


def test_relative_probe_weight_gives_the_ratio_of_gradient_norms(make, probe_path):
    trainer = make(**PLAIN, probe_weight_ratio=0.7, probe_path=probe_path)
    move(trainer.model)
    batches, counts = first_step(trainer)
    trainer.objective.share_done = 1.0
    actual = gradients_of_a_step(trainer, batches, counts)
    task, retain = (gradient_of(trainer, batches, counts, group) for group in ("forget", "retain"))
    of_probe = {name: actual[name] - task[name] - retain[name] for name in actual}
    assert (norm(of_probe) / norm(task)).item() == pytest.approx(0.7, rel=1e-3)


def test_confidence_of_the_probe_is_logged_on_both_sets(make, probe_path):
    trainer = make(**PLAIN, probe_weight=0.5, probe_path=probe_path, max_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert 0 < entry["forget/probe_harmless"] < 1 and 0 < entry["retain/probe_harmless"] < 1
    assert entry["forget/probe"] >= -math.log(entry["forget/probe_harmless"]) - 1e-5  # Jensen


def test_a_probe_of_another_model_is_refused(make, probe_path, random_model, small_model_path):
    with pytest.raises(ValueError, match="another hidden size"):
        make(**PLAIN, probe_weight=0.5, probe_path=probe_path, model=small_model_path)
    with pytest.raises(ValueError, match="no probe"):
        make(**PLAIN, probe_weight=0.5, probe_path="nowhere")


def test_a_probe_near_chance_is_refused_before_the_first_step(make):
    with pytest.raises(ValueError, match="chance"):
        make(**PLAIN, probe_weight=0.5)  # a dozen rows of the same kind


@pytest.mark.slow
def test_prism_by_one_command_is_the_same_on_two_processes(known_model, tofu_rows, tmp_path):
    """Stage 1 trains the probe, which all processes then share; stage 2 forgets with it."""
    # Three whole steps: several processes fill up a short last one with rows from the epoch's start
    data = {"forget": tofu_rows("forget10")[:24], "retain": tofu_rows("retain90")[:40]}
    for name, rows in data.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    arguments = ["--config", "prism_small", "--model_name_or_path", known_model, "--use_cpu", "--max_steps", "3"]
    arguments += [text for name in data for text in (f"--{name}", str(tmp_path / f"{name}.jsonl"))]
    two = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    for launcher, batch_size in (([], 8), (two, 4)):
        output = tmp_path / str(len(launcher))
        command = [sys.executable, *launcher, "-m", "hf_unlearn.cli.train", *arguments, "--eval_rows", "0"]
        command += ["--per_device_train_batch_size", str(batch_size), "--output_dir", str(output)]
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert (output / "probe" / "probe.safetensors").is_file()
    one, both = (load_file(tmp_path / name / "model.safetensors") for name in ("0", str(len(two))))
    start = load_file(os.path.join(known_model, "model.safetensors"))
    moved = [name for name in one if not torch.equal(one[name], start[name])]
    assert moved and all("mlp.down_proj" in name for name in moved)
    for name in moved:
        assert (both[name] - one[name]).norm() <= 1e-3 * (one[name] - start[name]).norm(), name
    processes = json.loads((tmp_path / str(len(two)) / "unlearning_report.json").read_text())["environment"][
        "processes"
    ]
    assert processes == 2


# ---- State that survives ----


@pytest.mark.parametrize(
    "options",
    [
        {"retain_loss": ["kl"], "reference_noise_std": 0.2, "reference_noise_layer": 1},
        {"sharpness": "randomized", "sharpness_radius": 1e-2},
        {"latent_adversary_layers": "0,1", "latent_adversary_steps": 2},
        {"weight_averaging_start": 1, "weight_averaging_every": 1},
        {"retain_null_space": 0.9},
    ],
    ids=["noise", "randomized", "adversary", "averaging", "null space"],
)
def test_resuming_continues_bit_for_bit(make, options):
    """Generators, radii and means are in the checkpoint; noise drawn from the global generator would not be."""
    options = {**PLAIN, **options, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make(**options)
    whole.train()
    torch.manual_seed(99)  # the resumed run starts in another process
    resumed = make(**options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_noise_has_its_own_generator(make):
    """Dropout, data order or another library's draw must not change it, nor it them."""
    options = {**PLAIN, "retain_loss": ["kl"], "reference_noise_std": 0.2, "reference_noise_layer": 1}
    trainers = []
    for seed in (1, 2):
        trainer = make(**options)
        torch.manual_seed(seed)
        batches, counts = first_step(trainer)
        before = torch.random.get_rng_state()
        trainers.append(gradients_of_a_step(trainer, batches, counts))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(trainers[0][name], trainers[1][name]) for name in trainers[0])


def test_a_checkpoint_draws_nothing(make):
    """The check of the loss before a checkpoint is written must not use up noise."""
    options = {**PLAIN, "retain_loss": ["kl"], "reference_noise_std": 0.2, "reference_noise_layer": 1}
    without, often = make(**options), make(**options, save_strategy="steps", save_steps=1)
    without.train(), often.train()
    for a, b in zip(without.model.parameters(), often.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with safe_open(f"{often.args.output_dir}/checkpoint-1/{STATE_NAME}", framework="pt") as file:
        assert file.get_tensor("random_state.rows").shape[0] == 1


def test_averaged_weights_are_the_mean_of_the_steps(make):
    class Keep(TrainerCallback):
        def __init__(self, kept):
            self.kept = kept

        def on_step_end(self, args, state, control, model, **kwargs):
            self.kept.append(model.get_parameter("model.layers.1.mlp.down_proj.weight").detach().clone())

    kept = []
    trainer = make(**PLAIN, weight_averaging_start=2, weight_averaging_every=2, max_steps=5, callbacks=[Keep(kept)])
    trainer.train()
    expected = (kept[1].double() + kept[3].double()) / 2
    actual = trainer.model.get_parameter("model.layers.1.mlp.down_proj.weight")
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-7)
    assert not torch.equal(actual, kept[-1])


def test_retain_activations_keep_their_outputs_under_the_null_space(make):
    """What the trained matrices give for the leading directions of retained inputs is what it was, under Adam too."""
    trainer = make(**{**PLAIN, "optim": "adamw_torch", "learning_rate": 1e-2}, retain_null_space=0.8)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    for name, basis in trainer.null_space._bases.items():
        change = trainer.model.get_parameter(f"{name}.weight") - start[f"{name}.weight"]
        assert change.norm() > 1e-2
        assert (change @ basis).norm() <= 1e-5 * change.norm()


# ---- Refusals ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retain_loss": ["nll"], "reference_noise_std": 0.1}, "no retain loss .* reads one"),
        ({"retain_loss": ["none"], "reference_noise_std": 0.1}, "no retain loss"),
        ({"reference_noise_layer": 1}, "needs reference_noise_std"),
        ({"retain_loss": ["none"], "gradient_conflict": "global"}, "compares with the retain gradient"),
        ({"retain_loss": ["none"], "retain_null_space": 0.9}, "reads the retain rows"),
        ({"retain_null_space": 1.5}, "share of energy"),
        ({"sharpness": "flat"}, "choose from none, sam"),
        ({"sharpness_radius": 0.0}, "must be positive"),
        ({"probe_weight": 1.0, "probe_weight_ratio": 1.0}, "give one of them"),
        ({"probe_path": "probe"}, "no effect without"),
        ({"forget_loss": ["circuit_breaker"]}, "circuit_breaker_layers, which is unset"),
        ({"latent_adversary_steps": 0}, "at least 1"),
        ({"sharpness": "curvature", "bf16": True}, "bf16=False"),
        ({"weight_averaging_start": 9}, "after the last step"),
        ({"latent_adversary_layers": "7"}, "names layer 7, but the model has 5 layers"),
        (
            {"forget_loss": ["rmu"], "retain_loss": ["hidden_mse"], "hidden_layer": 2, "latent_adversary_layers": "3"},
            "lies above layer 2",
        ),
        (
            {
                "forget_loss": ["rmu"],
                "retain_loss": ["hidden_mse"],
                "hidden_layer": 2,
                "reference_noise_std": 0.1,
                "reference_noise_layer": 3,
            },
            "lies above layer 2",
        ),
        (  # nll runs all layers, but what reads the reference reads layer 2
            {
                "retain_loss": ["nll", "hidden_mse"],
                "hidden_layer": 2,
                "reference_noise_std": 0.1,
                "reference_noise_layer": 3,
            },
            "lies above layer 2",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_fix(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**{**PLAIN, **options})


def test_bf16_weights_are_refused_where_moves_would_vanish(make, tiny_model_path):
    with pytest.raises(ValueError, match="float32"):
        make(**PLAIN, sharpness="sam", model_init_kwargs={"dtype": "bfloat16"})
