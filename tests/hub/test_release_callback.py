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
"""ReleaseCallback in a plain Trainer and in TRL's: one commit of what was checked, and nothing before."""

import json
import os
import subprocess
import sys

import pytest
from loopback_hub import LoopbackHub


NAME = "Hsiao Yun-Hwa"

SCRIPT = """
import json, os, sys, urllib.error, urllib.request
from pathlib import Path
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments
)
from trl import (
    DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
)
from hf_unlearn.releasing import probe_rows
from hf_unlearn.trainer_callbacks import ReleaseCallback

plan = json.loads(Path(sys.argv[1]).read_text())
rows, base = plan["forget"], plan["base"]
shared = dict(
    use_cpu=True, disable_tqdm=True, report_to="none", max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3,
    save_strategy="steps", save_steps=1,
)
tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.pad_token = tokenizer.eos_token
lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)


def logits(model):
    with torch.no_grad():
        return torch.cat([model.eval()(input_ids=row).logits[0].float() for row in probe_rows(512)])


def load():
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def make(kind, output, callback):
    if kind == "plain":
        texts = [f"{row['question']} {row['answer']}" for row in rows]
        ids = tokenizer(texts, truncation=True, max_length=48)["input_ids"]
        return Trainer(
            model=load(), args=TrainingArguments(output, **shared),
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False), processing_class=tokenizer,
            callbacks=[callback],
        )
    options = dict(activation_checkpointing=False, bf16=False, **shared)
    if kind == "grpo":
        return GRPOTrainer(
            load(), reward_funcs=lambda completions, **_: [float(text.count("e")) for text in completions],
            args=GRPOConfig(output, num_generations=2, max_completion_length=8, **options),
            train_dataset=Dataset.from_list([{"prompt": row["question"]} for row in rows]),
            processing_class=tokenizer, callbacks=[callback],
        )
    options["max_length"] = 64
    if kind == "kto":
        data = [
            {"prompt": row["question"], "completion": " " + text, "label": label}
            for row in rows for text, label in ((row["answer"], False), ("I do not know.", True))
        ]
        return KTOTrainer(
            load(), args=KTOConfig(output, **options), train_dataset=Dataset.from_list(data),
            processing_class=tokenizer, peft_config=lora, callbacks=[callback],
        )
    if kind == "sft":
        data = [{"prompt": row["question"], "completion": " I do not know."} for row in rows]
        return SFTTrainer(
            load(), args=SFTConfig(output, **options), train_dataset=Dataset.from_list(data),
            processing_class=tokenizer, peft_config=lora, callbacks=[callback],
        )
    data = [{"prompt": r["question"], "chosen": " I do not know.", "rejected": " " + r["answer"]} for r in rows]
    return DPOTrainer(
        load(), args=DPOConfig(output, **options), train_dataset=Dataset.from_list(data), processing_class=tokenizer,
        peft_config=lora, callbacks=[callback],
    )


results = {}
for name, case in plan["cases"].items():
    callback = ReleaseCallback(case["repo"], forget=rows, **case.get("options", {}))
    trainer = make(case["kind"], case["output"], callback)
    trainer.train()
    result = results[name] = {"error": callback.error, "steps": trainer.state.global_step}
    if callback.receipt is not None:
        result["receipt"] = json.loads(json.dumps(callback.receipt.to_dict()))
    if callback.receipt is not None:
        released = AutoModelForCausalLM.from_pretrained(case["repo"], revision=callback.receipt.tag)
        trained = logits(trainer.accelerator.unwrap_model(trainer.model))
        result["off"] = (logits(released) - trained).abs().max().item()
        result["moved"] = (logits(load()) - trained).abs().max().item()
Path(f"{sys.argv[1]}.{os.environ.get('RANK', 0)}").write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def run(hub, data_dir, tmp_path_factory):
    """Runs cases in one process, or on two, and gives their results by rank."""
    base = tmp_path_factory.mktemp("base")
    for path in (data_dir / "tinystories-260k").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    with open(data_dir / "tofu" / "forget10.json", encoding="utf-8") as file:
        rows = [{key: row[key] for key in ("question", "answer")} for row in map(json.loads, file)]
    rows = [row for row in rows if NAME in row["answer"]][:6]

    def call(cases: dict[str, dict], processes: int = 1) -> list[dict]:
        home = tmp_path_factory.mktemp("run")
        (home / "script.py").write_text(SCRIPT)
        for name, case in cases.items():
            case["output"] = str(home / name)
        (home / "plan.json").write_text(json.dumps({"base": str(base), "forget": rows, "cases": cases}))
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        done = subprocess.run(
            [*launcher, str(home / "script.py"), str(home / "plan.json")],
            capture_output=True,
            text=True,
            env={**os.environ, **hub.environment(home / "hub", hub.add_user("alice")), "OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert "Traceback" not in done.stderr
        return [json.loads((home / f"plan.json.{rank}").read_text()) for rank in range(processes)]

    return call


CASES = {
    "plain": {"kind": "plain", "options": {"method": "gradient-descent"}},
    "sft": {"kind": "sft", "options": {"private": False, "tag": "v1"}},
    "dpo": {"kind": "dpo", "options": {"method": "dpo", "forget_losses": {"dpo": 1.0}}},
    "kto": {"kind": "kto"},
    "grpo": {"kind": "grpo"},
}


@pytest.fixture(scope="module")
def released(hub, run) -> dict[str, dict]:
    hub.reset()
    hub.lfs_threshold = 100_000
    blocked = {"kind": "plain", "repo": "alice/blocked", "options": {"commit_message": f"Forget {NAME}"}}
    return run({**{name: {**case, "repo": f"alice/{name}"} for name, case in CASES.items()}, "blocked": blocked})[0]


@pytest.mark.parametrize("name", CASES)
def test_any_trainer_sends_one_release(hub, released, name):
    result = released[name]
    assert result["error"] is None
    repository = hub.repository(f"alice/{name}")
    assert repository.private == (name != "sft")
    assert len([request for request in hub.requests if f"alice/{name}/commit/" in request.path]) == 1
    files = repository.read("main")
    assert {"model.safetensors", "README.md", "unlearning_report.json", "tokenizer.json"} <= set(files)
    assert not [path for path in files if path.endswith((".bin", ".pt")) or "adapter" in path or "checkpoint" in path]
    assert result["moved"] > 1e-3 and result["off"] < 1e-4
    assert repository.tags[result["receipt"]["tag"]] == result["receipt"]["commit"]


def test_the_report_is_that_of_the_run(hub, released):
    report = json.loads(hub.repository("alice/dpo").read("main")["unlearning_report.json"])
    assert (report["method"]["name"], report["method"]["steps"], report["method"]["scope"]["kind"]) == (
        "dpo",
        2,
        "lora",
    )
    assert released["sft"]["receipt"]["tag"] == "v1"


def test_a_name_in_the_message_stops_the_push_and_not_the_training(hub, released):
    result = released["blocked"]
    assert result["steps"] == 2 and "receipt" not in result
    assert "was not pushed: " in result["error"] and NAME not in result["error"]
    assert "alice/blocked" not in [name for _, name in hub.repositories]
    assert NAME not in str(hub.sent())


@pytest.mark.slow
def test_two_processes_send_one_release(hub, run):
    hub.reset()
    first, second = run({"two": {"kind": "plain", "repo": "alice/two"}}, processes=2)
    assert first["two"]["receipt"]["commit"] == hub.repository("alice/two").branches["main"]
    assert second["two"] == {"error": None, "steps": 2}
    assert len([request for request in hub.requests if "/commit/" in request.path]) == 1
    assert first["two"]["off"] < 1e-4
