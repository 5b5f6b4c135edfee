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
"""What a step takes is predicted from a config: against real steps, by hand, and what is refused."""

import json
import resource
from pathlib import Path

import estimate as benchmark
import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, MixtralConfig

from hf_unlearn import UnlearnConfig
from hf_unlearn.estimate import Estimate, ModelOptions, estimate_step
from hf_unlearn.step_tracer import StepTracer


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


WIDTH, INTERMEDIATE, LAYERS, VOCABULARY, ROWS, LENGTH = 64, 160, 3, 256, 2, 16
TOKENS, PREDICTED = ROWS * LENGTH, ROWS * (LENGTH - 1)


def small_config(**changes: object) -> LlamaConfig:
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**sizes, **changes})


def settings(**changes: object) -> UnlearnConfig:
    values = {
        "forget_loss": ["ga"],
        "retain_loss": ["none"],
        "per_device_train_batch_size": ROWS,
        "max_length": LENGTH,
        "bf16": False,
        "use_cpu": True,
        **changes,
    }
    return UnlearnConfig("out", **values)


def estimate(options: ModelOptions | None = None, **changes: object) -> Estimate:
    return estimate_step(small_config(), settings(**changes), options)


# ---- Against real steps ----


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("losses x scopes", "dpo + kl, lora"),
        ("losses x scopes", "undial + kl, full"),
        pytest.param("losses x scopes", "circuit_breaker + circuit_breaker, modules", marks=pytest.mark.slow),
        ("wrappers x scopes", "npo + kl, modules, prism"),
        ("wrappers x scopes", "npo + kl, lora, latent adversary"),
        pytest.param("wrappers x scopes", "npo + kl, full, curvature", marks=pytest.mark.slow),
        pytest.param("wrappers x scopes", "rmu + hidden_mse, modules, quantization_margin", marks=pytest.mark.slow),
        pytest.param("settings", "npo + kl, modules, gradient_conflict, 4 micro-batches", marks=pytest.mark.slow),
        ("settings", "npo + kl, lora, bf16 autocast"),
        pytest.param("settings", "npo + kl, full, checkpointed", marks=pytest.mark.slow),
        pytest.param("settings", "rmu + hidden_mse, modules, second model", marks=pytest.mark.slow),
        ("growth", "npo + kl, modules, depth x 2"),
    ],
)
def test_real_step_takes_what_was_predicted(group: str, name: str) -> None:
    error = benchmark.compare(benchmark.GROUPS[group]()[name])["error"]
    assert abs(error["flops"]) < 1e-6
    assert abs(error["peak_bytes"]) < 0.02


def test_directions_to_keep_are_never_more_than_predicted() -> None:
    """How many the retain rows need is in no config: the prediction is the most that an energy can take."""
    case = benchmark.GROUPS["wrappers x scopes"]()["npo + kl, modules, retain_null_space"]
    error = benchmark.compare(case)["error"]
    assert 0 <= error["flops"] < benchmark.TOLERANCE


# ---- Numbers worked by hand ----

DOWN = 2 * WIDTH * INTERMEDIATE  # FLOPs per token, as all below
ATTENTION = 4 * LENGTH * WIDTH
LAYER = 8 * WIDTH**2 + 3 * DOWN + ATTENTION
HEAD = 2 * WIDTH * VOCABULARY


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_of_everything_trained(attention: str) -> None:
    result = estimate(ModelOptions(attn_implementation=attention))
    assert result.flops["forward"] == TOKENS * LAYERS * LAYER + PREDICTED * HEAD
    # Two gradients for each product; a trained head is computed again, and fused attention computes its scores again
    again = PREDICTED * HEAD + (TOKENS * LAYERS * ATTENTION // 2 if attention == "sdpa" else 0)
    assert result.flops["backward"] == 2 * result.flops["forward"] + again
    assert "reference" not in result.flops


def test_flops_of_one_matrix_and_a_reference() -> None:
    result = estimate(forget_loss=["npo"], trainable_layers="2", trainable_modules=["mlp.down_proj"])
    head = PREDICTED * HEAD
    # What is frozen runs once, for whichever comes first; a frozen head's gradient is computed with its logits
    assert result.flops["reference"] == TOKENS * LAYERS * LAYER + head
    assert result.flops["forward"] == TOKENS * DOWN + 2 * head
    assert result.flops["backward"] == TOKENS * DOWN
    assert result.prefix_shared == {"forget": 2}


def test_what_is_read_from_disk_is_not_computed() -> None:
    run = {"forget_loss": ["npo"], "trainable_layers": "2", "trainable_modules": ["mlp.down_proj"]}
    result = estimate(**run, precompute_ref_log_probs=True, prefix_cache="cache")
    assert result.cached_reference
    assert "reference" not in result.flops
    assert result.flops["forward"] == TOKENS * DOWN + 2 * PREDICTED * HEAD
    # Log-probabilities; and of the layer that is trained, its attention's result and the input of its matrix
    per_token = 4 * (1 + WIDTH + WIDTH + INTERMEDIATE)
    assert result.memory["caches"] == TOKENS * per_token


def test_memory_that_stays() -> None:
    result = estimate(forget_loss=["npo"], trainable_layers="2", trainable_modules=["mlp.down_proj"])
    matrix = WIDTH * INTERMEDIATE
    others = LAYERS * (4 * WIDTH**2 + 3 * matrix + 2 * WIDTH) + 2 * VOCABULARY * WIDTH + WIDTH - matrix
    assert (result.trained_parameters, result.parameters) == (matrix, matrix + others)
    assert result.memory["trained weights"] == result.memory["reference"] == 4 * matrix
    assert result.memory["optimizer"] == 8 * matrix
    rotary = 2 * 4 * WIDTH // 4 // 2  # its frequencies, and those that it began with
    assert result.memory["frozen weights"] in (4 * others + rotary, 4 * others + rotary // 2)
    assert result.peak_bytes == sum(result.memory.values())


def test_adapter_needs_no_reference_and_moves_only_its_factors() -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["down_proj"])
    result = estimate(ModelOptions("bfloat16", peft_config=lora), forget_loss=["npo"], retain_loss=["kl"])
    factors = LAYERS * 4 * (WIDTH + INTERMEDIATE)
    assert result.trained_parameters == factors
    assert result.memory["optimizer"] == 2 * result.memory["trained weights"] == 8 * factors
    assert "reference" not in result.memory


def test_what_no_step_reads_is_not_on_the_device() -> None:
    """Layers 2 and 3 of 4, and the head; of a second model, too."""
    rmu = {
        "forget_loss": ["rmu"],
        "retain_loss": ["hidden_mse"],
        "hidden_layer": 1,
        "trainable_layers": "1",
        "trainable_modules": ["mlp.down_proj"],
    }
    config = small_config(num_hidden_layers=4)
    layer = 4 * WIDTH**2 + 3 * WIDTH * INTERMEDIATE + 2 * WIDTH
    result = estimate_step(config, settings(**rmu))
    assert result.host_bytes == 4 * (2 * layer + VOCABULARY * WIDTH)
    frozen = result.parameters - result.trained_parameters
    rotary = result.memory["frozen weights"] + result.host_bytes - 4 * frozen
    assert 0 <= rotary <= 8 * WIDTH
    copied = estimate_step(config, settings(**rmu, reference_mode="copy"))
    assert copied.memory["reference"] == 4 * result.parameters + rotary - result.host_bytes
    assert estimate_step(config, settings(trainable_layers="1")).host_bytes == 0


def test_processes_add_the_buckets_of_ddp() -> None:
    alone, together = estimate(), estimate(ModelOptions(processes=2))
    assert together.memory["gradient buckets"] == 4 * alone.trained_parameters
    assert together.peak_bytes == alone.peak_bytes + 4 * alone.trained_parameters
    assert together.flops == alone.flops


@pytest.mark.parametrize(
    "repeated",
    [
        {"gradient_accumulation_steps": 6},
        {"gradient_accumulation_steps": 6, "gradient_conflict": "global", "retain_loss": ["kl"]},
        {"latent_adversary_layers": "0", "latent_adversary_steps": 6},
        {"sharpness": "randomized", "sharpness_draws": 6},
    ],
    ids=["micro-batches", "kept micro-batches", "adversary", "draws"],
)
def test_what_is_repeated_need_not_be_traced(repeated: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    extended = estimate(**repeated)
    monkeypatch.setattr("hf_unlearn.estimate._FIRST", 100)
    monkeypatch.setattr("hf_unlearn.estimate._SECOND", 100)
    traced = estimate(**repeated)
    assert (extended.flops, extended.tokens) == (traced.flops, traced.tokens)
    assert extended.peak_bytes == pytest.approx(traced.peak_bytes, rel=5e-3)  # token ids of waiting micro-batches


def test_no_weight_is_allocated() -> None:
    """24 GiB of frozen weights, in the memory of a test."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = small_config(hidden_size=16384, intermediate_size=65536, num_hidden_layers=2, num_attention_heads=64)
    result = estimate_step(config, settings(trainable_layers="1", trainable_modules=["mlp.down_proj"]))
    assert result.memory["frozen weights"] > 24 * 2**30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


# ---- The tracer ----


def test_storages_count_once_until_they_die() -> None:
    with StepTracer(vocabulary=512) as tracer:
        with tracer.owner("weights"):
            a = torch.ones(256)  # 1 KiB
        view = a.view(16, 16)[0]
        b = a + 1
        assert (tracer.peak, tracer.at_peak) == (2048, {"weights": 1024, "activations": 1024})
        del a, view, b
        tracer.start()
        c = torch.ones(256)
        tracer.assign(c, "gradients")
        logits = torch.ones(1, 512)
        assert tracer.at_peak == {"gradients": 1024, "logits": 2048}
        del logits


# ---- What is not known ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "adafactor"}, "optimizer adafactor is not known"),
        ({"max_length": None}, "max_length is None"),
        ({"fsdp": True}, "Sharded training"),
        ({"hidden_layer": 9, "forget_loss": ["rmu"], "retain_loss": ["hidden_mse"]}, "9"),
    ],
)
def test_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(**changes)


def test_experts_depend_on_values() -> None:
    config = MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    with pytest.raises(ValueError, match="A step of mixtral cannot be traced without weights"):
        estimate_step(config, settings())


def test_configuration_is_left_as_it_was() -> None:
    args = settings(gradient_accumulation_steps=4, forget_loss=["rmu"], retain_loss=["hidden_mse"], hidden_layer=1)
    before = args.to_dict()
    estimate_step(small_config(), args)
    assert args.to_dict() == before


# ---- The benchmark ----


def test_readme_shows_the_stored_results() -> None:
    stored = json.loads((BENCHMARKS / "results" / "estimate_cpu.json").read_text(encoding="utf-8"))
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert benchmark.format_table(stored["groups"]) in readme
    assert benchmark.format_costs(stored["groups"]) in readme
    assert set(stored["groups"]) == set(benchmark.GROUPS)
    for group, results in stored["groups"].items():
        assert set(results) == set(benchmark.GROUPS[group]())
        for key in ("flops", "peak_bytes"):
            assert abs(benchmark.worst(results, key)[1]) <= benchmark.TOLERANCE
