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
Every loss and what makes forgetting hold, with every engine: the result of one process, or a refusal by name.

DeepSpeed is no dependency: its tests run where it is installed, on CPU too. accelerate shards with FSDP2 on
accelerators only; here it is told that each process has one, and the tensors stay on the CPU.
"""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import load_dataset
from packaging.version import Version
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from hf_unlearn import UnlearnConfig, UnlearnTrainer
from hf_unlearn.engines import ENGINES, REFUSALS, Refusal, check_options, is_quantized, markdown_table
from hf_unlearn.losses import FORGET_LOSSES, RETAIN_LOSSES


ROOT = Path(__file__).parents[1]
WORKER = ROOT / "tests" / "distributed" / "engines_worker.py"

SELECTED = {"trainable_layers": "1-2", "trainable_modules": ["mlp.down_proj"]}
LORA = {"layers_to_transform": [0, 1, 2], "target_modules": ["q_proj", "down_proj"], "lora_alpha": 4}
ADAM = {"max_steps": 2, "optim": "adamw_torch", "learning_rate": 5e-3, "adam_epsilon": 1e-6}
PLAIN = {**ADAM, **SELECTED, "forget_loss": ["simnpo"], "retain_loss": ["nll"]}  # reads no reference

HIDDEN = {"rmu": "hidden_mse", "adaptive_rmu": "hidden_mse", "rsv": "hidden_mse", "circuit_breaker": "circuit_breaker"}
OTHER_RETAIN = ("kl", "nll", "logprob_mse")


def runs_of_losses() -> dict[str, dict]:
    """Every forget loss, with a retain loss that differs from one to the next; adapters, so that ZeRO-3 takes part."""
    runs = {}
    for index, loss in enumerate(FORGET_LOSSES):
        retain = HIDDEN.get(loss) or ("nll" if loss == "pdu" else OTHER_RETAIN[index % 3])
        settings = {**ADAM, "forget_loss": [loss], "retain_loss": [retain], "beta": 0.1}
        if loss in HIDDEN:
            settings.update(hidden_layer=2, circuit_breaker_layers="1,2")
        runs[f"{loss} and {retain}"] = {"settings": settings, "lora": LORA}
    return runs


RUNS = {
    **runs_of_losses(),
    "sharpness": {"settings": {**PLAIN, "sharpness": "sam"}},
    "sharpness, gradient_penalty": {"settings": {**PLAIN, "sharpness": "gradient_penalty"}},
    "sharpness, curvature": {"settings": {**PLAIN, "sharpness": "curvature"}},
    "gradient_conflict": {"settings": {**PLAIN, "gradient_conflict": "global"}},
    "gradient_conflict, tensor": {"settings": {**PLAIN, "gradient_conflict": "tensor"}},
    "gradient_conflict, conflict": {"settings": {**PLAIN, "gradient_conflict": "conflict"}},
    "probe_weight_ratio": {"settings": {**PLAIN, "probe_weight_ratio": 0.5}, "probe": True},
    "probe_weight": {"settings": {**PLAIN, "probe_weight": 0.5}, "probe": True},
    "quantization_margin": {"settings": {**PLAIN, "quantization_margin": "int8"}},
    "retain_null_space": {"settings": {**PLAIN, "retain_null_space": 0.8}},
    "weight_averaging_start": {
        "settings": {**PLAIN, "weight_averaging_start": 1, "weight_averaging_every": 1},
    },
    "latent_adversary_layers": {
        "settings": {**PLAIN, "latent_adversary_layers": "1", "latent_adversary_steps": 2},
    },
    "A probe that is trained at the start": {
        "settings": {**PLAIN, "probe_weight": 0.5, "probe_layers": "3"},
        "far_retain": True,
    },
    "A reference swapped in": {"settings": {**PLAIN, "forget_loss": ["npo"], "retain_loss": ["kl"]}},
    "A reference swapped in, with weights outside the decoder layers trained": {
        "settings": {**ADAM, "forget_loss": ["npo"], "retain_loss": ["kl"], "trainable_modules": ["model.norm"]},
    },
    "reference_mode='copy'": {
        "settings": {**PLAIN, "forget_loss": ["npo"], "retain_loss": ["kl"], "reference_mode": "copy"},
    },
    "a second model": {
        "settings": {**PLAIN, "forget_loss": ["npo", "undial"], "retain_loss": ["kl"]},
        "separate_reference": True,
    },
    "padding_free": {"settings": {**PLAIN, "padding_free": True}},
    "all weights": {"settings": {**ADAM, "learning_rate": 1e-3, "forget_loss": ["simnpo"], "retain_loss": ["nll"]}},
    "accumulation": {"settings": {**PLAIN, "gradient_accumulation_steps": 2}},
    "activation checkpointing": {
        "settings": {**ADAM, "forget_loss": ["npo"], "retain_loss": ["kl"], "activation_checkpointing": True},
        "lora": LORA,
    },
    "clipped": {"settings": {**PLAIN, "max_grad_norm": 0.1}},
    "saved adapter": {
        "settings": {**ADAM, "forget_loss": ["npo"], "retain_loss": ["kl"], "eval_on_start": True},
        "lora": LORA,
        "saves": True,
    },
    "saved model": {"settings": {**PLAIN, "eval_on_start": True}, "saves": True},
}
OPTIONS = ("separate_reference", "lora", "mixed_precision", "probe", "far_retain", "quantized", "saves")
DEFAULTS = dict.fromkeys(OPTIONS, False)
if importlib.util.find_spec("bitsandbytes") is not None:
    RUNS["A quantized model"] = {
        "settings": {**ADAM, "forget_loss": ["npo"], "retain_loss": ["kl"]},
        "lora": LORA,
        "quantized": True,
    }


def refusal_of(name: str, engine: str) -> Refusal | None:
    return next((entry for entry in REFUSALS if name.startswith(entry.option) and engine in entry.engines), None)


def launch(engine: str | None, folder: Path, data_dir: Path) -> Path:
    folder.mkdir(exist_ok=True)
    spec = folder / "spec.json"
    runs = [{"name": name, **DEFAULTS, **options} for name, options in RUNS.items()]
    spec.write_text(json.dumps({"runs": runs, "data": str(data_dir), "output": str(folder), "engine": engine}))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if engine else []
    result = subprocess.run(
        [sys.executable, *torchrun, str(WORKER), str(spec)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def folders(data_dir, tmp_path_factory) -> dict[str | None, Path]:
    """Launched when a test first asks for it."""
    root = tmp_path_factory.mktemp("engines")
    cache: dict[str | None, Path] = {}

    def of(engine: str | None) -> Path:
        if engine not in cache:
            cache[engine] = launch(engine, root / str(engine).replace(" ", "-"), data_dir)
        return cache[engine]

    return SimpleNamespace(of=of)


def is_available(engine: str) -> bool:
    if engine.startswith("FSDP2"):
        return Version(torch.__version__) >= Version("2.8")
    return importlib.util.find_spec("deepspeed") is not None if engine.startswith("ZeRO") else True


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(path, framework="pt") as file:
        # A tied tensor goes by the name of its first module, which sharding at loading changes
        names = {key: key.replace("lm_head.weight", "model.embed_tokens.weight") for key in file.keys()}
        tensors = {name: file.get_tensor(key) for key, name in names.items()}
        return tensors, {key: json.loads(value) for key, value in file.metadata().items()}


def names_of(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [key.removeprefix("end/") for key in tensors if key.startswith("end/")]


ENGINE_PARAMETERS = [
    pytest.param(
        engine,
        marks=[
            pytest.mark.skipif(not is_available(engine), reason=f"{engine} is not installed"),
            # The whole table takes minutes. In every run, test_invariance.py has two processes with DDP, and
            # test_fsdp.py what is sharded at loading.
            pytest.mark.slow,
        ],
    )
    for engine in ENGINES
]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("engine", ENGINE_PARAMETERS)
def test_one_process_or_a_refusal(folders, engine, name):
    folder = folders.of(engine)
    refusal = refusal_of(name, engine)
    error = folder / f"{name}.error"
    if refusal is not None:
        assert error.read_text() == refusal.message(engine)
        return
    assert not error.exists(), error.read_text()
    expected, expected_record = load(folders.of(None) / name)
    actual, actual_record = load(folder / name)
    assert sorted(names_of(expected)) == sorted(names_of(actual))
    for key in names_of(expected):
        start, end = expected[f"start/{key}"], expected[f"end/{key}"]
        assert torch.equal(actual[f"start/{key}"], start), key
        moved = (end - start).norm()
        assert moved > 1e-5 * start.norm(), key
        assert (actual[f"end/{key}"] - end).norm() <= 5e-4 * moved + 1e-7 * start.norm(), key
    for mine, theirs in zip(actual_record["log"], expected_record["log"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-6)
    assert actual_record["evaluations"] == pytest.approx(expected_record["evaluations"], rel=1e-4)
    assert len(actual_record["evaluations"]) == (2 if "saved" in name else 0)
    if actual_record["footprint"] is None:
        assert engine == "ZeRO-3" or name == "all weights"
    else:
        assert actual_record["footprint"][:2] == pytest.approx(expected_record["footprint"][:2], rel=1e-3)


@pytest.mark.parametrize("engine", ENGINE_PARAMETERS)
def test_what_is_saved_is_what_was_trained(folders, engine, data_dir):
    folder = folders.of(engine)
    trained, _ = load(folder / "saved model")
    saved = load_file(folder / "saved model.run" / "model.safetensors")
    before = AutoModelForCausalLM.from_pretrained(data_dir / "tinystories-260k", dtype=torch.float32).state_dict()
    for name, value in saved.items():
        assert torch.equal(value, trained.get(f"end/{name}", before[name])), name
    assert {"model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"} <= saved.keys()

    trained, _ = load(folder / "saved adapter")
    base = AutoModelForCausalLM.from_pretrained(data_dir / "tinystories-260k", dtype=torch.float32)
    num_base = sum(parameter.numel() for parameter in base.parameters())
    loaded = dict(PeftModel.from_pretrained(base, folder / "saved adapter.run").named_parameters())
    for name in names_of(trained):
        assert torch.equal(loaded[name], trained[f"end/{name}"]), name
    report = json.loads((folder / "saved adapter.run" / "unlearning_report.json").read_text())
    num_trained = sum(trained[f"end/{name}"].numel() for name in names_of(trained))
    assert report["method"]["scope"]["trainable_parameters"] == num_trained
    assert report["base"]["parameters"] == num_base


def test_every_loss_and_option_is_run():
    settings = [run["settings"] for run in RUNS.values()]
    assert {loss for each in settings for loss in each["forget_loss"]} == set(FORGET_LOSSES)
    assert {loss for each in settings for loss in each["retain_loss"]} == set(RETAIN_LOSSES)
    assert {refusal.option for refusal in REFUSALS} - {"A quantized model"} <= RUNS.keys()


def test_one_process_has_no_refusals():
    options = [refusal.option for refusal in REFUSALS]
    assert check_options(None, options) is None
    with pytest.raises(ValueError, match="is not supported with ZeRO-3"):
        check_options("ZeRO-3", options)


def test_documentation_has_the_table():
    assert markdown_table() in (ROOT / "docs" / "engines.md").read_text()


def test_quantized_models_are_recognised():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
    assert not is_quantized(model)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert is_quantized(model)
    with pytest.raises(ValueError, match="A quantized model is not supported with ZeRO-3"):
        check_options("ZeRO-3", ["A quantized model"])


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3", "cpu_2"])
def test_accelerate_reads_the_shipped_configurations(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = files("hf_unlearn") / "accelerate_configs" / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    raw = yaml.safe_load(path.read_text())
    assert config.num_processes == raw["num_processes"] > 1
    if name == "fsdp2":
        assert config.distributed_type == "FSDP"
        assert (raw["fsdp_config"]["fsdp_version"], raw["fsdp_config"]["fsdp_cpu_ram_efficient_loading"]) == (2, False)
    elif name.startswith("zero"):
        assert config.distributed_type == "DEEPSPEED"
        assert raw["deepspeed_config"]["zero_stage"] == int(name[-1])
    assert (ROOT / "examples" / "accelerate_configs" / f"{name}.yaml").read_text() == path.read_text()


def test_fsdp_that_accelerate_would_leave_out_is_refused(data_dir, tmp_path):
    """On CPU accelerate runs DDP, or one process, without a word."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(WORKER.parent)!r})\n"
        "from pathlib import Path\n"
        "import engines_worker\n"
        f"options = { {name: False for name in OPTIONS if name != 'saves'} }\n"
        f"engines_worker.make_trainer({{}}, Path({str(data_dir)!r}), 'out', None, **options)\n"
    )
    result = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    )
    assert "ValueError: FSDP was asked for, but accelerate would run without it" in result.stderr.splitlines()[-1]


@pytest.fixture
def make(data_dir, tmp_path):
    def build(model: str | None = None, **options) -> UnlearnTrainer:
        folder = data_dir / "tinystories-260k"
        trainer_options = {key: options.pop(key) for key in ("peft_config", "quantization_config") if key in options}
        settings = {**ADAM, "per_device_train_batch_size": 4, "max_length": 64, "logging_steps": 1, **options}
        return UnlearnTrainer(
            model or str(folder),
            args=UnlearnConfig(str(tmp_path / "out"), use_cpu=True, save_strategy="no", disable_tqdm=True, **settings),
            train_dataset=load_dataset("json", data_files=str(data_dir / "tofu/forget10.json"), split="train[:8]"),
            retain_dataset=load_dataset("json", data_files=str(data_dir / "tofu/retain90.json"), split="train[:8]"),
            processing_class=AutoTokenizer.from_pretrained(folder),
            **trainer_options,
        )

    return build


def losses_of(trainer: UnlearnTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("losses", [("npo", "kl"), ("rmu", "hidden_mse")])
def test_activations_in_main_memory_change_no_number(make, losses):
    settings = {**SELECTED, "forget_loss": [losses[0]], "retain_loss": [losses[1]], "hidden_layer": 2}
    expected, actual = make(**settings), make(**settings)
    expected.train()
    packed = []

    class Counting(torch.autograd.graph.save_on_cpu):
        def __init__(self):
            super().__init__()
            pack = self.pack_hook
            self.pack_hook = lambda tensor: packed.append(tensor.numel()) or pack(tensor)

    with Counting():
        actual.train()
    assert sum(packed) > 0
    assert losses_of(actual) == losses_of(expected)
    for name, parameter in expected.model.named_parameters():
        assert torch.equal(actual.model.get_parameter(name), parameter), name


def test_options_that_cannot_work_on_a_cpu_or_here_are_refused(tmp_path):
    with pytest.raises(ValueError, match="moves activations to main memory"):
        UnlearnConfig(str(tmp_path), use_cpu=True, activation_checkpointing_kwargs={"offload": True})
    with pytest.raises(ValueError, match="torch_compile is not supported"):
        UnlearnConfig(str(tmp_path), use_cpu=True, torch_compile=True)


@pytest.mark.parametrize("losses", [("npo", "kl"), ("rmu", "hidden_mse")])
def test_adapters_on_a_4_bit_model(make, losses, data_dir, tmp_path):
    """Starts at the reference, as it does on whole weights, and follows their run."""
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).save_pretrained(tmp_path / "base")
    adapter = {"task_type": "CAUSAL_LM", "target_modules": ["down_proj"], "layers_to_transform": [0, 1, 2]}
    settings = {"forget_loss": [losses[0]], "retain_loss": [losses[1]], "hidden_layer": 2}
    runs = []
    for quantization in (None, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")):
        trainer = make(
            str(tmp_path / "base"),
            peft_config=LoraConfig(**adapter),
            quantization_config=quantization,
            **settings,
        )
        trainer.train()
        runs.append(losses_of(trainer))
    whole, quantized = runs
    assert quantized[0] == pytest.approx(whole[0], rel=1e-6 if losses[0] == "npo" else 2e-2)
    moved = [parameter for name, parameter in trainer.model.named_parameters() if "lora_B" in name]
    assert moved and all(parameter.abs().max() > 1e-3 for parameter in moved)  # they start at zero
