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
`push_to_hub=True` of the trainers: nothing leaves while it trains, and then one commit of what was checked.

The Trainer's own push sends each checkpoint, half unlearned, `training_args.bin` with the token, and whatever else
lies in `output_dir`, to a repository that is public by default.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub


# Runs cases from a file, one after the other in one process. A request to /marker/NAME shows in the log of the Hub
# where a phase began.
SCRIPT = """
import json, os, sys, urllib.error, urllib.request
from pathlib import Path
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_unlearn import InterventionConfig, InterventionTrainer, UnlearnConfig, UnlearnTrainer
from hf_unlearn import pushing
from hf_unlearn.pushing import ReleaseError
from hf_unlearn.releasing import probe_rows

pushing._HEARTBEAT = 0.1  # so that the processes that wait are told so many times
plan = json.loads(Path(sys.argv[1]).read_text())
LORA = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 4}


def mark(name):
    try:
        urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/marker/{name}")
    except urllib.error.HTTPError:
        pass


def logits(model):
    with torch.no_grad():
        return torch.cat([model.eval()(input_ids=row).logits[0].float() for row in probe_rows(512)])


def make(case):
    shared = dict(
        use_cpu=True, disable_tqdm=True, max_length=64, push_to_hub=True, hub_model_id=case["repo"],
        hub_token=case.get("token"), hub_private_repo=case.get("private"),
    )
    data = dict(
        train_dataset=Dataset.from_list(plan["forget"]), retain_dataset=Dataset.from_list(plan["retain"])
    )
    base = case.get("base", plan["base"])
    if case["kind"] == "intervention":
        args = InterventionConfig(case["output"], trainable_layers="3", **shared, **case.get("args", {}))
        return InterventionTrainer(base, args=args, **data)
    args = UnlearnConfig(
        case["output"], max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, save_strategy="steps",
        save_steps=1, activation_checkpointing=False, **shared, **case.get("args", {}),
    )
    lora = LoraConfig(**LORA) if case["kind"] == "lora" else None
    return UnlearnTrainer(base, args=args, peft_config=lora, **data)


results = {}
for name, case in plan["cases"].items():
    if int(os.environ.get("RANK", 0)) == 0:
        mark(f"{name}-begins")
    trainer = make(case)
    trainer.train()
    if trainer.is_world_process_zero():
        mark(f"{name}-trained")
    result = results[name] = {"world": trainer.args.world_size}
    try:
        for call in case["calls"]:
            receipt = trainer.save_model() or trainer.receipt if call == "save" else trainer.push_to_hub(**call)
            result.setdefault("receipts", []).append(receipt and receipt.to_dict())
            mark(f"{name}-sent")
        if trainer.is_world_process_zero():
            where = {"revision": receipt.tag, "token": case.get("token")}
            released = AutoModelForCausalLM.from_pretrained(case["repo"], **where)
            AutoTokenizer.from_pretrained(case["repo"], **where)
            trained = logits(trainer.accelerator.unwrap_model(trainer.model))
            result["off"] = (logits(released) - trained).abs().max().item()
            base = AutoModelForCausalLM.from_pretrained(plan["base"], dtype=torch.float32)
            result["moved"] = (logits(base) - trained).abs().max().item()
    except ReleaseError as error:
        result["error"] = str(error)
    mark(f"{name}-ends")
Path(f"{sys.argv[1]}.{os.environ.get('RANK', 0)}").write_text(json.dumps(results))
"""

NAME = "Hsiao Yun-Hwa"


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def rows(data_dir) -> tuple[list[dict], list[dict]]:
    def read(name: str) -> list[dict]:
        with open(data_dir / "tofu" / f"{name}.json", encoding="utf-8") as file:
            return [{key: row[key] for key in ("question", "answer")} for row in map(json.loads, file)]

    return [row for row in read("forget10") if NAME in row["answer"]][:6], read("retain90")[:6]


@pytest.fixture(scope="module")
def base(data_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    for path in (data_dir / "tinystories-260k").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (folder / "LICENSE").write_text("As you like.")
    return folder


@pytest.fixture(scope="module")
def run(hub, rows, base, tmp_path_factory):
    """Runs cases in one process, or on two, and gives their results: of each process by its rank."""

    def call(cases: dict[str, dict], processes: int = 1) -> list[dict]:
        home = tmp_path_factory.mktemp("run")
        (home / "script.py").write_text(SCRIPT)
        for name, case in cases.items():
            case["output"] = str(home / name)
        plan = {"base": str(base), "forget": rows[0], "retain": rows[1], "cases": cases}
        (home / "plan.json").write_text(json.dumps(plan))
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
        return [json.loads((home / f"plan.json.{rank}").read_text()) for rank in range(processes)]

    return call


def between(hub: LoopbackHub, begin: str, end: str) -> list[tuple[str, str]]:
    """Method and path of the requests between two markers."""
    paths = [request.path for request in hub.requests]
    chosen = hub.requests[paths.index(f"/marker/{begin}") + 1 : paths.index(f"/marker/{end}")]
    return [(request.method, request.path) for request in chosen]


CASES = {
    "lora": {"kind": "lora", "calls": ["save", {}]},
    "full": {"kind": "full", "calls": ["save"], "private": False},
    "selected": {"kind": "selected", "calls": [{"tag": "v1"}], "args": {"trainable_layers": "1-2"}},
    "intervention": {
        "kind": "intervention",
        "calls": ["save"],
        "args": {"kind": "pointwise", "positions": "all", "epsilon": 0.1},
    },
    "stored": {
        "kind": "intervention",
        "calls": ["save"],
        "args": {"kind": "pointwise", "positions": "all", "epsilon": 0.1, "store": "adapter"},
    },
}


@pytest.fixture(scope="module")
def released(hub, run, rows) -> dict[str, dict]:
    hub.reset()
    hub.lfs_threshold = 100_000
    return run({name: {**case, "repo": f"alice/{name}"} for name, case in CASES.items()})[0]


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_sent_before_the_end_and_then_one_release(hub, released, name):
    assert "error" not in released[name], released[name]
    # Constructing, training and checkpointing: not even a question
    assert between(hub, f"{name}-begins", f"{name}-trained") == []
    repository = hub.repository(f"alice/{name}")
    sent = between(hub, f"{name}-trained", f"{name}-sent")
    assert len([path for method, path in sent if "/commit/" in path]) == 1
    assert repository.private == (name != "full")
    files = repository.read("main")
    assert {"model.safetensors", "README.md", "unlearning_report.json", "tokenizer.json", "LICENSE"} <= set(files)
    unwanted = ("adapter", ".bin", ".pt", "checkpoint", "trainer_state", "rng_state", "optimizer")
    assert not [path for path in files if any(word in path for word in unwanted)]
    # It computes what the trainer's model does, which is not what the base does
    assert released[name]["moved"] > 1e-3
    assert released[name]["off"] < 1e-4
    [first, *_] = released[name]["receipts"]
    assert {"gate", "tree", "parameters"} <= set(first["checks"]) and first["revision"] == "main"
    assert repository.tags[first["tag"]] == first["commit"] == repository.branches["main"]


def test_pushing_once_more_makes_no_second_commit(hub, released):
    first, second = released["lora"]["receipts"]
    assert (second["commit"], second["tag"], second["sent"]) == (first["commit"], first["tag"], [])


def test_nothing_is_left_beside_the_models_folder(released, tmp_path_factory):
    assert released["selected"]["receipts"][0]["tag"] == "v1"
    left = [path.name for path in tmp_path_factory.getbasetemp().glob("run*/*-release-*")]
    assert not [name for name in left if name.startswith(tuple(CASES))]


def test_the_base_on_the_hub_gives_its_licence_and_its_name(hub, run, base):
    """Loading a model fetches neither card nor licence: the release needs both."""
    hub.reset()
    there = hub.add("models", "org/base", {path.name: path.read_bytes() for path in base.iterdir()})
    case = {"kind": "lora", "repo": "alice/forgot", "base": "org/base", "calls": ["save"]}
    [result] = run({"hub": case})
    assert "error" not in result["hub"], result["hub"]
    assert {method for method, _ in between(hub, "hub-begins", "hub-trained")} <= {"GET", "HEAD"}
    files = hub.repository("alice/forgot").read("main")
    assert files["LICENSE"] == (base / "LICENSE").read_bytes()
    card = files["README.md"].decode()
    assert "license: mit" in card and "base_model: org/base" in card and "base_model_relation: finetune" in card
    report = json.loads(files["unlearning_report.json"])
    assert (report["base"]["model_id"], report["base"]["revision"]) == ("org/base", there.branches["main"])


def test_what_must_not_leave_does_not_and_the_model_is_kept(hub, run):
    """A name of the forget set in the repository's name, in the message, in the tag: nothing at all is sent."""
    hub.reset()
    slug = NAME.replace(" ", "-")
    cases = {
        "name": {"kind": "full", "repo": f"alice/{slug}", "calls": ["save"]},
        "message": {"kind": "full", "repo": "alice/message", "calls": [{"commit_message": f"Forget {NAME}"}]},
        "tag": {"kind": "full", "repo": "alice/tag", "calls": [{"tag": slug}]},
        "word": {
            "kind": "intervention",
            "repo": "alice/word",
            "calls": [{"commit_message": "Never say dragon again", "options": {"entities": ["Perpetua"]}}],
            "args": {"kind": "pointwise", "forbidden_words": ["dragon"], "epsilon": 0.1},
        },
    }
    [results] = run(cases)
    for name, case in cases.items():
        error = results[name]["error"]
        assert error.startswith(f"The model is saved in {case['output']} and the release in {case['output']}-release-")
        assert "was not pushed: " in error and "`hf-unlearn push " in error
        [kept] = Path(case["output"]).parent.glob(f"{name}-release-*")
        assert (kept / "model.safetensors").is_file() and (Path(case["output"]) / "model.safetensors").is_file()
    assert hub.repositories == {} and hub.writes() == []
    assert slug not in str(hub.sent()) and NAME not in str(hub.sent())
    assert NAME not in results["message"]["error"] + results["tag"]["error"]


def test_a_hub_that_fails_costs_nothing_but_another_try(hub, run):
    hub.reset()
    hub.fail("POST", "/commit/", "before", times=9)
    failing = {"kind": "full", "repo": "alice/forgot", "calls": ["save"]}
    reading = {"kind": "full", "repo": "alice/other", "calls": ["save"], "token": hub.add_user("bob", "read")}
    [results] = run({"failing": failing, "reading": reading})
    assert "was not pushed: The Hub failed (503)" in results["failing"]["error"]
    assert "was not pushed: alice/other does not exist and this token may not create it" in results["reading"]["error"]
    assert "alice/other" not in [name for _, name in hub.repositories]
    assert set(hub.repository("alice/forgot").read("main")) == {".gitattributes"}
    hub.faults.clear()
    [kept] = Path(failing["output"]).parent.glob("failing-release-*")
    assert (kept / "unlearning_report.json").is_file()


def test_two_processes_push_once_and_fail_together(hub, run):
    hub.reset()
    cases = {
        "two": {"kind": "lora", "repo": "alice/two", "calls": ["save"]},
        "blocked": {"kind": "lora", "repo": f"alice/{NAME.replace(' ', '-')}", "calls": ["save"]},
    }
    first, second = run(cases, processes=2)
    assert (first["two"]["world"], second["two"]["world"]) == (2, 2)
    assert first["two"]["receipts"][0]["commit"] == hub.repository("alice/two").branches["main"]
    assert second["two"]["receipts"] == [None]
    assert len([request for request in hub.requests if "/commit/" in request.path]) == 1
    assert first["two"]["off"] < 1e-4
    assert first["blocked"]["error"] == second["blocked"]["error"]
    assert [name for _, name in hub.repositories] == ["alice/two"]
