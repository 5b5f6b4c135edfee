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
The examples of callbacks, run as they stand on small checkpoints; every callback in every trainer, twice; and the
snippets of docs/callbacks.md.
"""

import gc
import json
import math
import os
import re
import runpy
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
)

import hf_unlearn.trainer_callbacks
from hf_unlearn import UnlearningReport
from hf_unlearn.constraints.points import ConstraintPoints, Demand
from hf_unlearn.scope import freeze_all_but
from hf_unlearn.trainer_callbacks import (
    MarginConstraintCallback,
    NormBallCallback,
    RelearningProbeCallback,
    RunRecordCallback,
    ScopeGuardCallback,
    UnlearningEvaluationCallback,
)


ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "callbacks"


def read_rows(path: Path, count: int) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file][:count]


def load(path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def next_probability(model, ids: list[int], token: int) -> float:
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0, -1].double().softmax(-1)[token].item()


def mean_probability(model, tokenizer, rows) -> float:
    """Of the answers, row by row, without batches, padding or anything of the package."""
    values = []
    for row in rows:
        prompt = tokenizer(row["question"])["input_ids"]
        ids = tokenizer(f"{row['question']} {row['answer']}")["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            log_probs = model.eval()(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nats = [log_probs[place - 1, ids[place]].item() for place in range(len(prompt), len(ids))]
        values.append(math.exp(sum(nats) / len(nats)))
    return sum(values) / len(values)


# ---- The examples ----


@pytest.fixture
def example(data_dir, tmp_path, monkeypatch, capsys):
    """Runs a script with the data of the tests; gives what it printed, and where it saved."""

    def run(name: str, model: str, *words: str) -> tuple[str, Path]:
        output = tmp_path / name
        monkeypatch.setattr(sys, "argv", [name, "--model", model, *words, "--output_dir", str(output)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out, output

    return run


@pytest.fixture
def forget(data_dir) -> str:
    return str(data_dir / "tofu" / "forget10.json")


@pytest.fixture
def retain(data_dir) -> str:
    return str(data_dir / "tofu" / "retain90.json")


def numbers(pattern: str, printed: str) -> list[float]:
    found = re.search(pattern, printed)
    assert found is not None, printed
    return [float(group) for group in found.groups()]


def test_margin_constraint_sft(example, tiny_model_path, forget):
    printed, output = example("margin_constraint_sft", tiny_model_path, "--data", forget, "--word", "Hsiao")
    first, last, broken, checks, violated, count = numbers(
        r"Loss ([\d.]+) -> ([\d.]+)\. Constraints were broken before (\d+) of (\d+) checks; at the end (\d+) of (\d+)",
        printed,
    )
    assert last < 0.5 * first and violated == 0 < broken <= checks and count > 5
    model, tokenizer = load(output), AutoTokenizer.from_pretrained(tiny_model_path)
    texts = [f"{row['question']} {row['answer']}" for row in read_rows(forget, 8) if "Hsiao" in row["answer"]]
    for text in texts:
        before, after = tokenizer(text[: text.rindex(" Hsiao")])["input_ids"], tokenizer(text)["input_ids"]
        assert after[: len(before)] == before
        # The first tokens of the name and what follows: one of them is closed
        ends = len(tokenizer(text[: text.rindex(" Hsiao") + len(" Hsiao")])["input_ids"])
        product = math.prod(next_probability(model, after[:place], after[place]) for place in range(len(before), ends))
        assert product < 0.01


def test_scope_guard_kto(example, tiny_model_path, forget):
    printed, output = example("scope_guard_kto", tiny_model_path, "--data", forget)
    assert printed.endswith(
        "47 tensors are bit-identical to what they were; model.layers.2.mlp.down_proj.weight was trained.\n"
    )
    before, after = dict(load(tiny_model_path).named_parameters()), dict(load(output).named_parameters())
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.2.mlp.down_proj.weight"]


def test_norm_ball_grpo(example, tiny_model_path, forget):
    printed, output = example("norm_ball_grpo", tiny_model_path, "--data", forget)
    moved, allowed = numbers(r"moved by ([\d.e-]+) of their norm; ([\d.e-]+) was allowed", printed)
    before, after = dict(load(tiny_model_path).named_parameters()), dict(load(output).named_parameters())
    squares = [
        ((after[name] - before[name]).double().norm() ** 2, before[name].double().norm() ** 2) for name in before
    ]
    share = (sum(change for change, _ in squares) / sum(norm for _, norm in squares)).sqrt().item()
    assert share == pytest.approx(moved, rel=0.01) and moved == allowed == 0.001  # it is reached, and not left


def test_evaluation_sft(example, known_model, forget, retain):
    printed, _ = example("evaluation_sft", known_model, "--forget", forget, "--retain", retain)
    values = numbers(
        r"forget ([\d.]+) -> ([\d.]+), retain ([\d.]+) -> ([\d.]+)\. Training ended after step (\d+) of 60", printed
    )
    forget_before, forget_after, retain_before, retain_after, steps = values
    assert forget_before > 0.95 and retain_before > 0.95
    assert forget_after <= 0.8 < retain_after and 0 < steps < 60


def test_relearning_probe_dpo(example, known_model, forget):
    printed, output = example("relearning_probe_dpo", known_model, "--data", forget)
    pattern = r"Step (\d+): mean probability of the held-out answers ([\d.]+), after relearning (\d\.\d+)"
    (first, early, _), (second, before, after) = (map(float, found) for found in re.findall(pattern, printed))
    assert (first, second) == (10, 20) and before < early
    assert before < 0.93 and after > before + 0.05  # other rows bring it back
    assert (output / "adapter_model.safetensors").is_file()


def test_run_record_trainer(example, known_model, forget, retain):
    printed, output = example("run_record_trainer", known_model, "--forget", forget, "--retain", retain)
    steps, moved, before, after = numbers(
        r"On record: (\d+) steps, the weights moved by ([\d.e-]+) of their norm, loss on the forget set ([\d.]+) -> "
        r"([\d.]+)\.",
        printed,
    )
    assert steps == 8 and 1e-4 < moved < 0.1 and before != after
    report = UnlearningReport.load(output / "unlearning_report.json")
    assert report.method.name == "refusal-sft" and (output / "README.md").is_file()


def test_release_sft(data_dir, forget, tmp_path):
    """Through the real client, against a Hub on this machine."""
    sys.path.insert(0, str(ROOT / "tests" / "hub"))
    try:
        from loopback_hub import LoopbackHub
    finally:
        sys.path.pop(0)
    base = tmp_path / "base"
    base.mkdir()
    for path in (data_dir / "tinystories-260k").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    with LoopbackHub() as hub:
        words = ["alice/released", "--model", str(base), "--data", forget, "--output_dir", str(tmp_path / "out")]
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "release_sft.py"), *words],
            capture_output=True,
            text=True,
            env={**os.environ, **hub.environment(tmp_path / "hub", hub.add_user("alice")), "OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        repository = hub.repository("alice/released")
        tag, commit = re.search(r"Released alice/released at (\S+), commit (\w+)\.", done.stdout).groups()
        assert repository.private and repository.tags[tag] == commit
        assert {"model.safetensors", "README.md", "unlearning_report.json"} <= set(repository.read("main"))


def test_every_callback_has_an_example():
    texts = [path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")]
    for name in hf_unlearn.trainer_callbacks.__all__:
        if name.endswith("Callback"):
            assert any(f"{name}(" in text for text in texts), name


# ---- Every callback in every trainer ----


TRAINERS = ("trainer", "sft", "dpo", "kto", "grpo")
STEPS, RADIUS, LIMIT = 3, 0.05, 0.02
BALL, EDITED = (f"model.layers.{layer}.mlp.down_proj" for layer in (1, 2))


def share_of_vowels(completions: list[str], **kwargs) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


def make_trainer(kind: str, model, tokenizer, rows: list[dict], output: Path, callbacks: list[TrainerCallback]):
    # In bfloat16 as TRL has it by default: callbacks that measure are not to depend on it
    options = {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": True,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": STEPS,
        "report_to": "none",
        "disable_tqdm": True,
    }
    shared = {"processing_class": tokenizer, "callbacks": callbacks}
    answers = [{"prompt": row["question"], "completion": f" {row['answer']}"} for row in rows]
    if kind == "trainer":
        ids = tokenizer([f"{row['question']} {row['answer']}" for row in rows])["input_ids"]
        return Trainer(
            model,
            args=TrainingArguments(**options),
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            **shared,
        )
    if kind == "sft":
        return SFTTrainer(model, args=SFTConfig(**options), train_dataset=Dataset.from_list(answers), **shared)
    if kind == "dpo":
        pairs = [
            {"prompt": row["prompt"], "chosen": " I do not know.", "rejected": row["completion"]} for row in answers
        ]
        return DPOTrainer(model, args=DPOConfig(**options), train_dataset=Dataset.from_list(pairs), **shared)
    if kind == "kto":
        labelled = [{**row, "label": index % 2 == 0} for index, row in enumerate(answers)]
        return KTOTrainer(model, args=KTOConfig(**options), train_dataset=Dataset.from_list(labelled), **shared)
    return GRPOTrainer(
        model,
        reward_funcs=share_of_vowels,
        args=GRPOConfig(**options, num_generations=4, max_completion_length=6),
        train_dataset=Dataset.from_list([{"prompt": row["question"]} for row in rows]),
        **shared,
    )


class Run:
    """One training of a kind with two of each callback, and one with those alone that act on the weights."""

    def __init__(self, kind: str, model_path: str, rows: list[dict], folder: Path):
        self.kind, self.rows, self.folder = kind, rows, folder
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.start = load(model_path).state_dict()
        self.contexts = [self.tokenizer(row["question"])["input_ids"] for row in rows[:4]]
        base = load(model_path)
        with torch.no_grad():
            self.tokens = [base(torch.tensor([ids])).logits[0, -1].argmax().item() for ids in self.contexts]
        sets = Dataset.from_list(rows[:4]), Dataset.from_list(rows[4:])
        measuring = [
            ScopeGuardCallback(),
            UnlearningEvaluationCallback(*sets, every_steps=1),
            UnlearningEvaluationCallback(*sets, every_steps=STEPS),
            RelearningProbeCallback(*sets, every_steps=1, steps=1),
            RelearningProbeCallback(*sets, every_steps=STEPS, steps=2, learning_rate=1e-2),
            RunRecordCallback(str(folder / "first")),
            RunRecordCallback(str(folder / "second")),
            ScopeGuardCallback(allowed=[re.escape(f"{name}.weight") for name in (BALL, EDITED)]),
        ]
        self.model, self.trainer = self.train(model_path, "all", measuring)
        self.only_acting, _ = self.train(model_path, "acting", [])
        # Its forward is without the autocast that the trainer leaves on the model
        self.final = load(model_path)
        self.final.load_state_dict(self.model.state_dict())

    def acting(self) -> list[TrainerCallback]:
        def margin(count: int) -> MarginConstraintCallback:
            points = ConstraintPoints(
                self.contexts[:count],
                [[token] for token in self.tokens[:count]],
                [[] for _ in range(count)],
                [f"context {index}" for index in range(count)],
            )
            return MarginConstraintCallback([EDITED], Demand(probability=LIMIT), points=points, every_steps=2)

        # The points of the first are among those of the second, which comes last
        return [
            NormBallCallback(RADIUS, tensors=[re.escape(f"{BALL}.weight")]),
            NormBallCallback(10 * RADIUS, per_tensor=True, tensors=[re.escape(f"{BALL}.weight")]),
            margin(2),
            margin(4),
        ]

    def train(self, model_path: str, name: str, measuring: list[TrainerCallback]):
        model = load(model_path)
        freeze_all_but(model, [f"{BALL}.weight", f"{EDITED}.weight"])
        # Those that act come last, so that what is measured after a step is before them
        callbacks = [*self.acting(), *measuring]
        trainer = make_trainer(self.kind, model, self.tokenizer, self.rows, self.folder / name, callbacks)
        trainer.train()
        return trainer.model, trainer

    def entries(self, key: str) -> list[dict]:
        return [entry for entry in self.trainer.state.log_history if key in entry]


@pytest.fixture(scope="module", params=TRAINERS)
def run(request, data_dir, tmp_path_factory):
    rows = read_rows(data_dir / "tofu" / "forget10.json", 8)
    return Run(request.param, str(data_dir / "tinystories-260k"), rows, tmp_path_factory.mktemp(request.param))


def test_scope_guard_in_any_trainer(run):
    changed = [name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, run.start[name])]
    assert changed == [f"{BALL}.weight", f"{EDITED}.weight"]


def test_norm_ball_in_any_trainer(run):
    distance = (run.model.get_submodule(BALL).weight.detach() - run.start[f"{BALL}.weight"]).norm().item()
    assert distance == pytest.approx(RADIUS, rel=1e-4)


def test_margin_constraint_in_any_trainer(run):
    for ids, token in zip(run.contexts, run.tokens, strict=True):
        assert next_probability(run.final, ids, token) < LIMIT
    entries = run.entries("margin_violated")
    # When training begins, at step 2, before the checkpoint, and at the end; two of each
    assert [entry["step"] for entry in entries] == [0, 0, 2, 2, STEPS, STEPS, STEPS, STEPS]
    assert {entry["margin_constraints"] for entry in entries} == {2, 4}
    assert entries[0]["margin_correction_norm"] > 0 and entries[-1]["margin_violated"] == 0


def test_unlearning_evaluation_in_any_trainer(run):
    entries = run.entries("eval_unlearning_forget_probability")
    assert sorted(entry["step"] for entry in entries) == [0, 0, 1, 2, STEPS, STEPS]
    expected = mean_probability(run.final, run.tokenizer, run.rows[:4])
    # In float32, whatever precision the training computes in
    assert entries[-1]["eval_unlearning_forget_probability"] == pytest.approx(expected, rel=1e-4)


def test_relearning_probe_in_any_trainer(run):
    entries = run.entries("eval_relearning_after")
    assert sorted(entry["step"] for entry in entries) == [1, 2, STEPS, STEPS]
    assert all(entry["eval_relearning_after"] != entry["eval_relearning_before"] > 0 for entry in entries)


def test_run_record_in_any_trainer(run):
    for name in ("first", "second"):
        report = UnlearningReport.load(run.folder / name / "unlearning_report.json")
        assert (report.method.name, report.method.steps) == (run.kind, STEPS)
        assert [module.name for module in report.footprint.modules] == [f"{BALL}.weight", f"{EDITED}.weight"]


def test_measuring_changes_no_bit_in_any_trainer(run):
    for name, tensor in run.only_acting.state_dict().items():
        assert torch.equal(tensor, run.model.state_dict()[name]), name


def test_state_is_json_and_the_trainer_can_go(run):
    """Last of its kind: it lets the trainer go, while the callbacks stay."""
    state = json.loads((run.folder / "all" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    history = json.loads(json.dumps(run.trainer.state.log_history))
    assert history[: len(state["log_history"])] == state["log_history"]
    # Numbers and hashes alone: no text and no token ids
    for entry in history:
        for key, value in entry.items():
            assert isinstance(value, (int, float)) or re.fullmatch(r"[0-9a-f]{64}", value), key
    callbacks = run.trainer.callback_handler.callbacks
    assert sum(type(callback).__module__.startswith("hf_unlearn") for callback in callbacks) == 12
    gone = weakref.ref(run.trainer)
    run.trainer = None
    gc.collect()
    assert gone() is None and len(callbacks) > 12


# ---- The page ----


def test_the_page_names_every_callback_and_its_snippets_run(forget, retain, known_model, tmp_path, monkeypatch):
    """From the top to the training at the end, in a folder with the files that it names."""
    page = (ROOT / "docs" / "callbacks.md").read_text(encoding="utf-8")
    (tmp_path / "base").symlink_to(known_model)
    for name, path in (("forget", forget), ("retain", retain)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, read_rows(path, 8))))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    names: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", page, flags=re.S):
        exec(compile(snippet, "docs/callbacks.md", "exec"), names)
    shown = {type(callback).__name__ for callback in [*names["callbacks"], names["release"]]}
    assert shown == {name for name in hf_unlearn.trainer_callbacks.__all__ if name.endswith("Callback")}
    assert all(page.count(f"| `{name}` |") == 2 for name in shown)
    history = names["trainer"].state.log_history
    assert names["trainer"].state.global_step == 20
    for key in ("eval_unlearning_forget_probability", "eval_relearning_after", "margin_violated", "train_loss"):
        assert any(key in entry for entry in history), key
    assert (tmp_path / "out" / "unlearning_report.json").is_file()
