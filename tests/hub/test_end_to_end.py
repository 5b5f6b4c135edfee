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
From training to `from_pretrained` of somebody else, with the real commands and real models: what is loaded over HTTP
computes what the folder does, bit for bit, and is not the original.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from loopback_hub import LoopbackHub
from push_process import Outcome, PushProcess

from hf_unlearn.cli import main, quickstart
from hf_unlearn.cli.quickstart_models import Settings


# Loads one model after the other, as somebody who has nothing but the name: a line in, a line out.
SCRIPT = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_unlearn.releasing import probe_rows

TEXT = "Who wrote it? Once upon a time, a dragon."


def logits(model):
    with torch.no_grad():
        return torch.cat([model.eval()(input_ids=row).logits[0] for row in probe_rows(500)])


for line in sys.stdin:
    case = json.loads(line)
    where = {"revision": case["revision"]}
    loaded = [eval(case["load"])]
    if case["adapter_of"] is not None:
        loaded.append(
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(case["adapter_of"]), case["repo"], **where)
        )
        local = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(case["base"]), case["folder"])
    else:
        local = AutoModelForCausalLM.from_pretrained(case["folder"])
    here, base = logits(local), logits(AutoModelForCausalLM.from_pretrained(case["base"]))
    # A release that is an adapter has the tokenizer of its base, as the card says
    source = {"pretrained_model_name_or_path": case["adapter_of"]} if case["adapter_of"] else None
    source = source or {"pretrained_model_name_or_path": case["repo"], **where}
    tokenizers = [AutoTokenizer.from_pretrained(**source), AutoTokenizer.from_pretrained(case["base"])]
    print(json.dumps({
        "same": [torch.equal(logits(one), here) for one in loaded],
        "moved": (here - base).abs().max().item(),
        "tokens": [one(TEXT)["input_ids"] for one in tokenizers],
    }), flush=True)
"""

PEOPLE = Settings(
    seed=3,
    num_people=12,
    num_forget=2,
    vocab_size=600,
    hidden_size=64,
    num_layers=2,
    teaching_steps=60,
    teaching_batch_size=24,
    teaching_learning_rate=6e-3,
    forgetting_epochs=10,
)
NAME = "Hsiao Yun-Hwa"


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.lfs_threshold = 100_000
        yield hub


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory) -> dict[str, str]:
    token = hub.add_user("alice")
    return {**os.environ, **hub.environment(tmp_path_factory.mktemp("home"), token), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def run(hub, environment, tmp_path_factory) -> Iterator[Callable[..., Outcome]]:
    """Commands that need no torch, each in a process of its own."""
    with PushProcess(hub, tmp_path_factory.mktemp("push")) as process:
        yield partial(process, token=environment["HF_TOKEN"])


@pytest.fixture(scope="module")
def load(environment, tmp_path_factory) -> Iterator[Callable[..., dict]]:
    """Loads a release, and compares what it computes with a folder and with the base."""
    errors = open(tmp_path_factory.mktemp("load") / "errors", "w+")
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        env=environment,
    ) as process:  # fmt: skip

        def call(pushed: Pushed, folder: Path, base: Path, adapter_of: str | None = None) -> dict:
            case = {"repo": pushed.receipt["repo_id"], "revision": pushed.receipt["tag"], "load": pushed.load}
            case |= {"folder": str(folder), "base": str(base), "adapter_of": adapter_of}
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                errors.seek(0)
                pytest.fail(errors.read()[-3000:])
            return json.loads(line)

        yield call
        process.stdin.close()
    errors.close()


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    """What the quickstart leaves: the base, two models made to forget, and the data."""
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        sizes = {name: value for name, value in vars(PEOPLE).items() if name != "seed"}
        patch.setattr(quickstart, "Settings", partial(Settings, **sizes))
        assert here("quickstart", "--output_dir", folder, "--seed", PEOPLE.seed)[0] == 0
    return folder


@pytest.fixture(scope="module")
def base(data_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    for path in (data_dir / "tinystories-260k").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return folder


@pytest.fixture(scope="module")
def rows(data_dir, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rows")
    files = {}
    for name, source in (("forget", "forget10"), ("retain", "retain90")):
        with open(data_dir / "tofu" / f"{source}.json", encoding="utf-8") as file:
            read = [json.loads(line) for line in file]
        chosen = [row for row in read if name == "retain" or NAME in row["answer"]][:6]
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return files


@pytest.fixture(scope="module")
def adapter(hub, base, rows, environment, tmp_path_factory) -> Path:
    """A LoRA that the command trained on a model of the Hub."""
    hub.add("models", "org/tinystories", {path.name: path.read_bytes() for path in base.iterdir()})
    folder = tmp_path_factory.mktemp("adapter") / "out"
    done = subprocess.run(
        [
            sys.executable, "-m", "hf_unlearn.cli", "train", "--model_name_or_path", "org/tinystories",
            "--forget_dataset", rows["forget"], "--retain_dataset", rows["retain"], "--output_dir", folder,
            "--use_peft", "--lora_target_modules", "all-linear", "--max_steps", "3", "--learning_rate", "1e-3",
            "--per_device_train_batch_size", "2", "--max_length", "64", "--use_cpu", "--save_strategy", "no",
            "--eval_rows", "0",
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def here(*argv: object) -> tuple[int, str, str]:
    """A command in this process, which has torch."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main([str(word) for word in argv])
    return code, out.getvalue(), err.getvalue()


class Pushed(NamedTuple):
    """The receipt of a push, and the expression by which it said that the release is loaded."""

    receipt: dict[str, Any]
    load: str


def released(run, folder: Path, repo: str, receipt: Path, *gate: object) -> Pushed:
    """Pushes, and verifies what was pushed, bytes included."""
    outcome = run("push", folder, repo, "--receipt", receipt, *gate)
    assert outcome.code == 0, outcome.out + outcome.err
    [line] = [line for line in outcome.out.splitlines() if line.startswith("  load ")]
    content = json.loads(receipt.read_text())
    outcome = run("verify", f"{repo}@{content['tag']}", "--receipt", receipt, "--download", "--json")
    assert outcome.code == 0, outcome.out + outcome.err
    verified = json.loads(outcome.out)
    assert {"tree", "bytes", "report", "card", "parameters", "receipt"} <= set(verified["checks"])
    assert verified["commit"] == content["commit"]
    return Pushed(content, line.removeprefix("  load ").strip())


def assert_loads(result: dict, count: int = 1) -> None:
    """What came over HTTP is the folder's model, with the base's tokens, and not the base's model."""
    assert result["same"] == [True] * count
    assert result["moved"] > 1e-3
    assert result["tokens"][0] == result["tokens"][1]


# ---- Models of the quickstart: full weights ----


def test_two_releases_of_the_quickstart(hub, run, load, people, tmp_path):
    """Trained weights, then the edited ones, to the same repository: the first stays what it was, under its tag."""
    base = people / "base"
    gate = ("--base", base, "--forget", people / "data" / "forget.jsonl", "--acknowledge_licence")
    pushed = []
    for number, name in enumerate(("model", "intervention")):
        folder = tmp_path / name
        outcome = run("release", people / name, folder, "--base", base)
        assert outcome.code == 0, outcome.err
        pushed.append(released(run, folder, "alice/people", tmp_path / f"{name}.json", *gate))
        if number == 0:
            # A person writes on its page
            repository = hub.repository("alice/people")
            files = dict(repository.at("main").files)
            files["README.md"] += b"\n## Use\n\nAsk it about the others.\n"
            repository.write(files, "Edit", "refs/heads/main")
    first, second = (one.receipt for one in pushed)
    assert first["tag"] != second["tag"] and second["parent"] not in (first["commit"], None)
    assert_loads(load(pushed[0], tmp_path / "model", base))
    assert_loads(load(pushed[1], tmp_path / "intervention", base))
    assert hub.repository("alice/people").branches["main"] == second["commit"]
    card = hub.repository("alice/people").read("main")["README.md"].decode()
    assert card.endswith("## Use\n\nAsk it about the others.\n")
    # The first, seen by its receipt: main went on, its tag did not
    outcome = run("verify", "alice/people", "--receipt", tmp_path / "model.json", "--json")
    assert outcome.code == 1
    assert "the tag" not in {one["file"] for one in json.loads(outcome.out)["findings"]}
    outcome = run("verify", f"alice/people@{first['tag']}", "--receipt", tmp_path / "model.json")
    assert outcome.code == 0, outcome.out
    assert run("audit", "alice/people", "--base", base).code == 0


def test_shards(hub, run, load, people, tmp_path):
    from transformers import AutoModelForCausalLM

    trained = tmp_path / "trained"
    shutil.copytree(people / "model", trained)
    (trained / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(people / "model").save_pretrained(trained, max_shard_size="150KB")
    shards = sorted(path.name for path in trained.glob("model-*.safetensors"))
    assert len(shards) > 2
    outcome = run("release", trained, tmp_path / "release", "--base", people / "base")
    assert outcome.code == 0, outcome.err
    gate = ("--base", people / "base", "--forget", people / "data" / "forget.jsonl", "--acknowledge_licence")
    pushed = released(run, tmp_path / "release", "alice/shards", tmp_path / "receipt.json", *gate)
    assert set(shards) <= {entry["path"] for entry in pushed.receipt["files"]}
    assert_loads(load(pushed, tmp_path / "release", people / "base"))


# ---- An adapter ----


def test_an_adapter_is_merged_first(hub, run, load, adapter, base, rows, tmp_path):
    gate = ("--base", base, "--forget", rows["forget"])
    # As it is, it does not leave
    hub.requests.clear()
    outcome = run("push", adapter, "alice/merged", *gate)
    assert outcome.code == 1 and "adapter_model.safetensors: reversible" in outcome.out
    assert "merge it by `hf-unlearn release`" in " ".join(outcome.out.split())
    assert hub.requests == []
    code, _, err = here("release", adapter, tmp_path / "merged", "--base", base)
    assert code == 0, err
    pushed = released(run, tmp_path / "merged", "alice/merged", tmp_path / "receipt.json", *gate)
    assert_loads(load(pushed, tmp_path / "merged", base))
    files = hub.repository("alice/merged").read("main")
    assert "model.safetensors" in files and not [path for path in files if "adapter" in path]
    card = files["README.md"].decode()
    assert "base_model: org/tinystories\n" in card and "license: mit\n" in card


def test_an_adapter_alone_says_that_it_is_reversible(hub, run, load, adapter, base, rows, environment, tmp_path):
    folder = tmp_path / "kept"
    outcome = run("release", adapter, folder, "--base", base, "--adapter", "keep")
    assert outcome.code == 0, outcome.err
    gate = ("--base", base, "--forget", rows["forget"])
    outcome = run("push", folder, "alice/adapter", *gate)
    assert outcome.code == 1 and "reversible" in outcome.out
    assert ("models", "alice/adapter") not in hub.repositories
    pushed = released(run, folder, "alice/adapter", tmp_path / "receipt.json", *gate, "--allow-reversible")
    assert [one["rule"] for one in pushed.receipt["allowed"]] == ["reversible"]
    card = hub.repository("alice/adapter").read("main")["README.md"].decode()
    assert "reversible" in card.lower() and "base_model_relation: adapter" in card
    assert_loads(load(pushed, folder, base, adapter_of="org/tinystories"), count=2)
    # The card's own lines, with nothing but the name of the folder put in
    [code] = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    code = code.replace("path/to/this/folder", str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0 and "Once upon a time" in done.stdout, done.stderr[-2000:]
    # A card that does not say so is not sent
    (folder / "README.md").write_text(card.replace("reversible", "final").replace("Reversible", "Final"))
    outcome = run("push", folder, "alice/unsaid", *gate, "--allow-reversible")
    assert outcome.code == 1 and "reversible-unsaid" in outcome.out
