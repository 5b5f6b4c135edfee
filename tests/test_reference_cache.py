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
"""What is read from disk is what would have been computed, and never what another row, model or scope gave."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from distributed.invariance_worker import Run
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from hf_unlearn import UnlearnConfig, UnlearnTrainer
from hf_unlearn.row_cache import RowCache, row_key


SELECTED = {"trainable_layers": "2-3", "trainable_modules": ["mlp.down_proj"]}
RMU = {"forget_loss": ["rmu"], "retain_loss": ["hidden_mse"], "hidden_layer": 3, **SELECTED}
NPO = {"forget_loss": ["npo"], "retain_loss": ["kl"], **SELECTED}
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["down_proj"], layers_to_transform=[3, 4])

# Settings, adapter, and whether the reference has a cache
CASES = {
    "rmu": (RMU, None),
    "rmu, noise": ({**RMU, "reference_noise_std": 0.1}, None),
    "rsv": ({**RMU, "forget_loss": ["rsv"]}, None),
    "npo": (NPO, None),
    "npo, adapter": ({"forget_loss": ["npo"], "retain_loss": ["kl"]}, LORA),
    "npo, copied reference": ({**NPO, "reference_mode": "copy"}, None),
    "dpo": ({**NPO, "forget_loss": ["dpo"], "retain_loss": ["logprob_mse"]}, None),
    "undial": ({**NPO, "forget_loss": ["undial"], "retain_loss": ["kl"]}, None),
    "circuit_breaker": (
        {
            **RMU,
            "forget_loss": ["circuit_breaker"],
            "retain_loss": ["circuit_breaker"],
            "circuit_breaker_layers": "2,3",
        },
        None,
    ),
    "sam": ({**NPO, "sharpness": "sam", "gradient_conflict": "global"}, None),
    "adversary": ({**RMU, "latent_adversary_layers": "2", "latent_adversary_steps": 2}, None),
    "accumulation": ({**NPO, "gradient_accumulation_steps": 2}, None),
    "bf16 autocast": ({**NPO, "bf16": True}, None),
}


def read_rows(data_dir: Path, name: str, count: int) -> list[dict]:
    lines = (data_dir / "tofu" / f"{name}.json").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


@pytest.fixture
def make_trainer(data_dir, tiny_model_path, tokenizer, tmp_path):
    """Six forget and four retain rows, of unequal length: two epochs read every row again, in other company."""

    def make(settings: dict, peft_config: LoraConfig | None = None, model=None, forget=None) -> UnlearnTrainer:
        model = model or AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
        args = UnlearnConfig(
            **{
                "output_dir": str(tmp_path / "out"),
                "use_cpu": True,
                "bf16": False,
                "seed": 1,
                "num_train_epochs": 2,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-2,
                "adam_epsilon": 1e-4,
                "lr_scheduler_type": "constant",
                "max_length": 128,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                **settings,
            }
        )
        return UnlearnTrainer(
            model,
            args=args,
            train_dataset=Dataset.from_list(forget or read_rows(data_dir, "forget10", 6)),
            retain_dataset=Dataset.from_list(read_rows(data_dir, "retain90", 4)),
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


def train(trainer: UnlearnTrainer, **options) -> tuple[dict[str, torch.Tensor], list[float], int]:
    """Trained tensors, losses and FLOPs."""
    with FlopCounterMode(display=False) as counter:
        trainer.train(**options)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return weights, losses, counter.get_total_flops()


def require_close(actual: tuple, expected: tuple, tolerance: float = 1e-6) -> None:
    for name, value in expected[0].items():
        assert (actual[0][name] - value).norm() <= tolerance * value.norm(), name
    assert actual[1] == pytest.approx(expected[1], rel=tolerance, abs=tolerance)


def require_equal(actual: tuple, expected: tuple) -> None:
    for name, value in expected[0].items():
        assert torch.equal(actual[0][name], value), name
    assert actual[1] == expected[1]


def caches(tmp_path: Path, kind: str) -> dict:
    reference = {"precompute_ref_log_probs": True, "reference_cache": str(tmp_path / "reference")}
    prefix = {"prefix_cache": str(tmp_path / "prefix")}
    return {"reference": reference, "prefix": prefix, "both": {**reference, **prefix}}[kind]


def rows_in(folder: Path) -> set[Path]:
    return set(folder.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("rsv", "dpo", "undial", "accumulation") else [])
        for name in CASES
    ],
)
def test_both_caches_give_what_none_gives(make_trainer, tmp_path, monkeypatch, name):
    settings, peft_config = CASES[name]
    tolerance = 1e-2 if name == "bf16 autocast" else 1e-6
    expected = train(make_trainer(settings, peft_config))
    cached = {**settings, **caches(tmp_path, "both")}
    filling = train(make_trainer(cached, peft_config))
    require_close(filling, expected, tolerance)
    filled = make_trainer(cached, peft_config)

    def refuse(*args):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(filled.objective, "_run_reference", refuse)
    before = rows_in(tmp_path)
    read = train(filled)
    require_close(read, expected, tolerance)
    assert rows_in(tmp_path) == before
    assert read[2] < filling[2] < expected[2]


@pytest.mark.parametrize(
    "kind", [pytest.param("reference", marks=pytest.mark.slow), pytest.param("prefix", marks=pytest.mark.slow), "both"]
)
@pytest.mark.parametrize("settings", [RMU, NPO], ids=["rmu", "npo"])
def test_rows_alone_are_the_same_to_the_last_bit(make_trainer, tmp_path, settings, kind):
    """Without company a row has no padding, and its products have one shape."""
    settings = {**settings, "per_device_train_batch_size": 1, "max_steps": 12}
    expected = train(make_trainer(settings))
    cached = {**settings, **caches(tmp_path, kind)}
    for _ in range(2):
        require_equal(train(make_trainer(cached)), expected)
        assert rows_in(tmp_path)  # or nothing was cached


def test_resumed_run_reads_what_the_first_one_left(make_trainer, tmp_path):
    results = []
    for name, cached in (("plain", {}), ("cached", caches(tmp_path, "both"))):
        folder = tmp_path / name
        settings = {
            **NPO,
            **cached,
            "output_dir": str(folder),
            "save_strategy": "steps",
            "save_steps": 3,
            "max_steps": 6,
            "per_device_train_batch_size": 1,
        }
        make_trainer({**settings, "max_steps": 3}).train()
        before = rows_in(tmp_path / "reference")
        assert len(before) == (6 if cached else 0)
        results.append(train(make_trainer(settings), resume_from_checkpoint=str(folder / "checkpoint-3")))
    require_equal(results[1], results[0])
    assert rows_in(tmp_path / "reference") > before


# ---- Never stale ----


def change_row(rows: list[dict]) -> list[dict]:
    return [{**rows[0], "answer": rows[0]["answer"].replace(" ", "  ", 1)}, *rows[1:]]


def test_changed_row_is_computed_anew_and_the_others_are_not(make_trainer, tmp_path, data_dir):
    settings = {**NPO, **caches(tmp_path, "both")}
    train(make_trainer(settings))
    before = rows_in(tmp_path / "reference")
    changed = change_row(read_rows(data_dir, "forget10", 6))
    actual = train(make_trainer(settings, forget=changed))
    assert len(rows_in(tmp_path / "reference") - before) == 1
    require_close(actual, train(make_trainer({**NPO}, forget=changed)))


def test_other_labels_are_other_targets_of_the_same_activations(make_trainer, tmp_path):
    settings = {**NPO, **caches(tmp_path, "both")}
    train(make_trainer(settings))
    before = {kind: rows_in(tmp_path / kind) for kind in ("reference", "prefix")}
    whole = {**settings, "completion_only_loss": False}
    actual = train(make_trainer(whole))
    assert len(rows_in(tmp_path / "reference")) == 2 * len(before["reference"])
    assert rows_in(tmp_path / "prefix") == before["prefix"]
    require_close(actual, train(make_trainer({**NPO, "completion_only_loss": False})))


@pytest.mark.parametrize("what", ["frozen weight", "trained weight", "attention", "scope", "tokenizer"])
def test_other_model_scope_or_tokenizer(make_trainer, tiny_model_path, tmp_path, tokenizer, what):
    """Each is another sub-folder, or another key: nothing that was there is read, or only what is the same."""
    settings, options = dict(NPO), {}
    train(make_trainer({**settings, **caches(tmp_path, "both")}))
    before = {kind: rows_in(tmp_path / kind) for kind in ("reference", "prefix")}

    def load():
        implementation = "eager" if what == "attention" else "sdpa"
        model = AutoModelForCausalLM.from_pretrained(
            tiny_model_path, dtype=torch.float32, attn_implementation=implementation
        )
        with torch.no_grad():
            if what == "frozen weight":
                model.model.layers[0].mlp.up_proj.weight[3, 5] += 0.25
            if what == "trained weight":
                model.model.layers[3].mlp.down_proj.weight[3, 5] += 0.25
        return model

    if what == "scope":
        settings["trainable_layers"] = "3"
    if what == "tokenizer":
        tokenizer.add_bos_token = False
        tokenizer.backend_tokenizer.post_processor = None
    expected = train(make_trainer(settings, model=load(), **options))
    actual = train(make_trainer({**settings, **caches(tmp_path, "both")}, model=load(), **options))
    require_close(actual, expected)
    new = {kind: rows_in(tmp_path / kind) - before[kind] for kind in before}
    # What lies below the scope does not depend on a trained weight; the reference does not depend on the scope
    assert bool(new["prefix"]) == (what != "trained weight")
    assert bool(new["reference"]) == (what != "scope")


def test_other_hidden_layer_is_another_target(make_trainer, tmp_path):
    settings = {**RMU, **caches(tmp_path, "reference")}
    train(make_trainer(settings))
    before = rows_in(tmp_path)
    other = {**settings, "hidden_layer": 4, "trainable_layers": "2-3"}
    actual = train(make_trainer(other))
    assert before and len(rows_in(tmp_path)) == 2 * len(before)
    require_close(actual, train(make_trainer({**RMU, "hidden_layer": 4})))


def test_damaged_row_is_computed_again(make_trainer, tmp_path):
    settings = {**NPO, **caches(tmp_path, "both")}
    expected = train(make_trainer(settings))
    for path in rows_in(tmp_path):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    require_close(train(make_trainer(settings)), expected)
    for path in rows_in(tmp_path):
        assert load_file(path)


def test_what_is_on_disk_is_what_is_read(make_trainer, tmp_path):
    """A cache that was filled and ignored would pass most of the above."""
    settings = {**RMU, **caches(tmp_path, "reference")}
    _, losses, _ = train(make_trainer(settings))
    for path in rows_in(tmp_path / "reference"):
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    _, changed, _ = train(make_trainer(settings))
    assert changed[0] > losses[0] + 0.1


# ---- Kill, room, processes ----

FILL = """
import sys, torch
from hf_unlearn.row_cache import RowCache
cache = RowCache("a cache", sys.argv[1], {"weights": "same"})
print("ready", flush=True)
for index in range(10**6):
    cache.write(f"{index % 50:064x}", {"value": torch.full((200_000,), float(index % 50))})
"""


def test_killed_while_filling(tmp_path):
    """Whatever moment it is killed at, what is there is whole."""
    cache = RowCache("a cache", str(tmp_path), {"weights": "same"})
    for delay in (0.05, 0.11, 0.23):
        process = subprocess.Popen([sys.executable, "-c", FILL, str(tmp_path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        seen = 0
        for index in range(50):
            row = cache.read(f"{index:064x}", ["value"])
            if row is not None:
                seen += 1
                assert torch.equal(row["value"], torch.full((200_000,), float(index)))
        assert seen > 0


def test_remains_of_a_killed_process_are_removed(tmp_path):
    cache = RowCache("a cache", str(tmp_path), {})
    old, new = (Path(cache.folder) / name for name in ("old.tmp", "new.tmp"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache.require_room(1, 1, 1.0)
    assert not old.exists() and new.exists()  # another process may be writing the new one


@pytest.mark.parametrize("kind", ["reference", "prefix"])
def test_more_than_the_folder_may_hold_is_refused_before_the_first_step(make_trainer, tmp_path, kind):
    trainer = make_trainer({**RMU, **caches(tmp_path, kind), "cache_size_gb": 1e-5})
    with pytest.raises(ValueError, match=r"needs \S+ GB for \d+ rows.*cache_size_gb is 1e-05"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not rows_in(tmp_path)


def test_full_disk_is_refused_with_the_numbers(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer({**RMU, **caches(tmp_path, "prefix")})
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("hf_unlearn.row_cache.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match=r"prefix_cache needs \S+ GB more for 10 rows.*has 1e-06 GB free"):
        trainer.train()


def test_what_other_runs_left_counts(make_trainer, tmp_path):
    settings = {**RMU, **caches(tmp_path, "prefix")}
    train(make_trainer(settings))
    size = sum(path.stat().st_size for path in (tmp_path / "prefix").rglob("*") if path.is_file())
    again = make_trainer({**settings, "cache_size_gb": 1.5 * size / 1e9})
    again.train()  # its own rows are there already
    other = make_trainer({**settings, "trainable_layers": "3", "cache_size_gb": 1.5 * size / 1e9})
    with pytest.raises(ValueError, match="of other runs in its folder"):
        other.train()


@pytest.mark.parametrize(("settings", "at_least"), [(RMU, 0.9), (NPO, 0.5)], ids=["rmu", "npo"])
def test_predicted_size_is_that_on_disk(make_trainer, tmp_path, settings, at_least):
    """Distributions are kept of labels alone, and predicted for all tokens."""
    trainer = make_trainer({**settings, **caches(tmp_path, "both")})
    needs = {}
    for cache in (*trainer.caches.references.values(), *trainer.caches.prefixes.values()):
        cache.require_room = lambda rows, size, limit, name=cache.name: needs.update({name: needs.get(name, 0) + size})
    trainer.train()
    for kind, name in (("reference", "precompute_ref_log_probs"), ("prefix", "prefix_cache")):
        stored = sum(tensor.nbytes for path in rows_in(tmp_path / kind) for tensor in load_file(path).values())
        assert at_least * needs[name] <= stored <= needs[name]


def test_disk_that_fills_up_later_does_not_end_the_training(make_trainer, tmp_path, monkeypatch):
    expected = train(make_trainer(NPO))
    trainer = make_trainer({**NPO, **caches(tmp_path, "both")})
    written = []

    def write(self, name, content):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(name)

    monkeypatch.setattr(RowCache, "_write", write)
    require_close(train(trainer), expected)
    assert len(written) == 3


def test_two_processes_fill_one_folder(data_dir, tmp_path):
    """Each for its own rows, and the second run reads what both have left."""
    from test_invariance import WORKER, launch

    def run(name: str, world_size: int, **overrides) -> Run:
        return Run(
            "npo_layers",
            "adamw_torch",
            1e-2,
            2 // world_size,
            2,
            output=str(tmp_path / name),
            world_size=world_size,
            max_steps=5,
            overrides=overrides,
        )

    cached = caches(tmp_path, "both")
    runs = [run("plain", 2), run("filling", 2, **cached), run("filled", 2, **cached)]
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"data": str(data_dir), "runs": [asdict(entry) for entry in runs]}))
    launch(WORKER, spec)
    tensors = [load_file(entry.output) for entry in runs]
    assert len(rows_in(tmp_path / "reference")) == len(rows_in(tmp_path / "prefix")) > 12
    for other in tensors[1:]:
        for name, value in tensors[0].items():
            assert (other[name] - value).norm() <= 1e-5 * value.norm(), name
    with safe_open(runs[2].output, framework="pt") as file:
        assert len(json.loads(file.metadata()["log"])) == 5


# ---- What is refused ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**SELECTED, "forget_loss": ["ga"], "retain_loss": ["nll"], "precompute_ref_log_probs": True}, "remove it"),
        ({**NPO, "trainable_layers": None, "trainable_modules": None, "precompute_ref_log_probs": True}, "head"),
        ({**NPO, "reference_noise_std": 0.1, "hidden_layer": 1, "precompute_ref_log_probs": True}, "noise"),
        ({**RMU, "reference_noise_std": 0.1, "reference_noise_layer": 2, "precompute_ref_log_probs": True}, "noise"),
        ({**NPO, "trainable_layers": None, "trainable_modules": None, "prefix_cache": "FOLDER"}, "trainable_layers"),
        ({**NPO, "reference_cache": "FOLDER"}, "precompute_ref_log_probs=True"),
        ({**NPO, "prefix_cache": "FOLDER", "cache_size_gb": 0}, "positive"),
    ],
)
def test_refused_by_name(make_trainer, tmp_path, settings, message):
    settings = {name: str(tmp_path / "cache") if value == "FOLDER" else value for name, value in settings.items()}
    with pytest.raises(ValueError, match=message):
        make_trainer(settings)


def test_folder_that_cannot_be_written_is_refused(make_trainer, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match="prefix_cache cannot be written"):
        make_trainer({**NPO, "prefix_cache": str(tmp_path / "file")})


def test_key_is_content():
    assert row_key([1, 2, 3], [1, 2, 3]) == row_key([1, 2, 3], [1, 2, 3])
    assert row_key([1, 2, 3], [1, 2, 3]).tokens != row_key([1, 3, 2], [1, 3, 2]).tokens
    assert row_key([1, 2], [-100, 2]).labels != row_key([1, 2], [1, 2]).labels
