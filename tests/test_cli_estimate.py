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
"""`hf-unlearn estimate`, run as a user runs it."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig

from hf_unlearn.cli import run
from hf_unlearn.cli.estimate import GIB, GPUS, RESERVED_GIB, main


@pytest.fixture
def cli(monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """Runs `hf-unlearn estimate ...` in this process; returns exit code, stdout and stderr."""
    monkeypatch.delenv("HF_DEBUG", raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run(main, [str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a config and nothing else: 1.4 GiB of weights that are nowhere."""
    LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=16000,
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


STEP = ("--max_length", 64, "--per_device_train_batch_size", 4, "--retain_loss", "kl")


def sentence(err: str) -> str:
    """The one line of an error; progress bars may stand before it."""
    lines = [line for line in re.split(r"[\n\r]", err) if line.startswith("Error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0].removeprefix("Error: ")


def test_json_and_table_say_the_same(cli, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("--model_name_or_path", model, *STEP, "--trainable_layers", "4-5")
    code, out, _ = cli(*arguments, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["bf16"] is True, "devices have it, whatever this machine has"
    assert report["tokens_per_process"] == 2 * 4 * 64
    assert report["prefix_shared"] == {"forget": 4, "retain": 4}
    memory = report["memory_bytes"]
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    assert report["fits_on"] == [name for name, size in GPUS.items() if memory["total"] <= (size - RESERVED_GIB) * GIB]
    code, out, _ = cli(*arguments)
    assert code == 0
    assert f"{memory['total'] / GIB:.2f}" in out
    assert f"{report['flops']['total'] / 1e12:.2f}" in out
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is written"


def test_what_does_not_fit_is_refused_with_numbers_and_with_what_helps(cli, model):
    """Each change is a command line: with it, the same command fits and takes what was said."""
    arguments = ("--model_name_or_path", model, *STEP, "--memory_gb", 7.5, "--json")
    code, out, err = cli(*arguments)
    report = json.loads(out)
    assert code == 1
    assert not report["fits"]
    assert report["device"]["usable_bytes"] == 6.5 * GIB < report["memory_bytes"]["total"]
    assert f"A step takes {report['memory_bytes']['total'] / GIB:.1f} GiB" in sentence(err)
    assert str(model) not in err
    assert report["changes"]
    for change in report["changes"]:
        assert change["flags"] in sentence(err)
        code, out, _ = cli(*arguments, *change["flags"].split())
        assert code == 0
        again = json.loads(out)
        assert again["memory_bytes"]["total"] == change["memory_bytes"]
        assert again["flops"]["total"] == change["flops"]


@pytest.mark.slow
def test_what_cannot_fit_says_so(cli, model):
    code, _, err = cli("--model_name_or_path", model, *STEP, "--memory_gb", 1.1)
    assert code == 1
    assert "Nothing that is known here makes it fit" in sentence(err)


def test_recipe_and_gpu(cli, model):
    arguments = ("--config", "rmu_zephyr-7b_wmdp", "--model_name_or_path", model, "--hidden_layer", 4, "--json")
    scope = ("--trainable_layers", "3-4", "--max_length", 32)
    code, out, _ = cli(*arguments, *scope, "--gpu", "a10g")
    report = json.loads(out)
    assert code == 0
    assert report["trained_parameters"] == 2 * 2048 * 5632
    assert "stay in host memory" in cli(*arguments[:-1], *scope, "--gpu", "a10g")[1]
    assert report["device"] == {"name": "a10g", "bytes": GPUS["a10g"] * GIB, "usable_bytes": (GPUS["a10g"] - 1) * GIB}
    assert json.loads(cli(*arguments, *scope, "--gpu", "t4")[1])["bf16"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "abacus"), "invalid choice: 'abacus'"),
        (("--gpu", "h100", "--memory_gb", "80"), "give one of them"),
        (("--memory_gb", "0.5"), "give more"),
        (("--processes", "0"), "at least 1"),
        (("--load_in_4bit", "--use_peft"), "load_in_4bit"),
        (("--optim", "adafactor"), "optimizer adafactor"),
        (("--dtype", "float16"), "--dtype float16"),
        (("--trainable_layers", "6"), "6 layers: 0 to 5"),
        (("--forget_los", "ga"), "Unknown argument"),
    ],
)
def test_bad_input_is_one_sentence(cli, model, arguments, message):
    code, out, err = cli("--model_name_or_path", model, *STEP, *arguments)
    assert (code, out) == (2, "")
    assert message in sentence(err)


def test_model_without_config(cli, tmp_path):
    code, _, err = cli("--model_name_or_path", tmp_path, *STEP)
    assert code == 2
    assert "has no config that can be read" in sentence(err)
    code, _, err = cli(*STEP)
    assert code == 2
    assert "--model_name_or_path is required" in sentence(err)
