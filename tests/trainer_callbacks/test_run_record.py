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
import json
import logging
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from datasets import Dataset
from distributed import run_record_worker
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_unlearn import UnlearnConfig, UnlearnTrainer
from hf_unlearn.cards import Data, DataSummary, UnlearningReport
from hf_unlearn.recording import Record
from hf_unlearn.trainer_callbacks import RunRecordCallback, UnlearningEvaluationCallback
from hf_unlearn.trainer_callbacks.run_record import count_rows


@pytest.fixture
def sets(tofu_rows, tiny_model_path):
    """Token ids for a plain Trainer: what is to be refused, and what is to stay."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)

    def tokens(rows):
        texts = [f"{row['question']} {row['answer']}" for row in rows]
        return Dataset.from_dict({"input_ids": tokenizer(texts, truncation=True, max_length=48)["input_ids"]})

    return {"forget": tokens(tofu_rows("forget10")[:8]), "retain": tokens(tofu_rows("retain90")[:6])}


@pytest.fixture
def make(sets, tiny_model_path, tmp_path):
    """Factory of a plain Trainer with the callbacks given."""

    def build(callbacks=(), model=None, output="out", eval_dataset=None, **options):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
        tokenizer.pad_token = tokenizer.eos_token
        options = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, **options}
        args = TrainingArguments(
            str(tmp_path / output),
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            **{"save_strategy": "no", **options},
        )
        torch.manual_seed(0)
        return Trainer(
            model=model or AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32),
            args=args,
            train_dataset=sets["forget"],
            eval_dataset=eval_dataset,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            callbacks=list(callbacks),
        )

    return build


def load(folder):
    return UnlearningReport.load(os.path.join(folder, "unlearning_report.json"))


def measured_footprint(model, start):
    """From the definition, in one go."""
    moved = {name: (parameter.detach().double(), start[name].double()) for name, parameter in model.named_parameters()}
    moved = {name: (after, before) for name, (after, before) in moved.items() if not torch.equal(after, before)}
    delta = sum((after - before).square().sum() for after, before in moved.values()).sqrt()
    norm = sum(before.square().sum() for _, before in moved.values()).sqrt()
    return moved, (delta / norm).item()


# --- plain Trainer


def test_report_of_a_plain_trainer(make, sets, tiny_model_path, tmp_path):
    trainer = make(
        [RunRecordCallback(method="ascent", forget_losses={"ga": 1.0})],
        eval_dataset=sets,
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=3,
        hub_token="hf_not_to_be_seen",
        run_name="secret-name",
        seed=5,
    )
    start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    report = load(tmp_path / "out")
    assert (report.method.name, report.method.steps, report.method.seed) == ("ascent", 4, 5)
    assert report.method.forget_losses[0].name == "ga" and report.method.retain_losses == []
    assert report.method.scope.kind == "full" and report.method.scope.trainable_parameters == 260032
    settings = report.method.settings
    assert (settings["learning_rate"], settings["max_steps"], settings["lr_scheduler_type"]) == (1e-3, 4, "linear")
    assert "num_train_epochs" not in settings
    # A folder's name is no Hub id
    assert report.base.model_id is None and report.base.parameters == 260032
    tokens = sum(len(row["input_ids"]) for row in sets["forget"])
    assert (report.data.forget.rows, report.data.forget.tokens, report.data.retain) == (8, tokens, None)
    # Before any step, and of the last one: the trainer's own numbers
    history = trainer.state.log_history
    for when, step in (("before", 0), ("after", 4)):
        for name, rows in (("forget", 8), ("retain", 6)):
            [loss] = [
                entry[key]
                for entry in history
                for key in entry
                if key == f"eval_{name}_loss" and entry["step"] == step
            ]
            assert getattr(report.metrics, when)[name] == {"loss": loss, "rows": rows}
    moved, norm = measured_footprint(trainer.model, start)
    assert {module.name for module in report.footprint.modules} == set(moved)
    assert report.footprint.relative_norm == pytest.approx(norm, rel=1e-9) and norm > 0
    text = (tmp_path / "out" / "unlearning_report.json").read_text() + (tmp_path / "out" / "README.md").read_text()
    for secret in ("hf_not_to_be_seen", "secret-name", str(tmp_path), tiny_model_path):
        assert secret not in text


def test_training_is_the_same_bit_for_bit(make, sets):
    options = {
        "eval_dataset": sets,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    plain = make(output="plain", **options)
    plain.train()
    recorded = make([RunRecordCallback()], output="recorded", **options)
    recorded.train()
    for (name, left), right in zip(plain.model.named_parameters(), recorded.model.parameters(), strict=True):
        assert torch.equal(left, right), name
    losses = [[entry.get("loss"), entry.get("eval_forget_loss")] for entry in plain.state.log_history]
    assert losses == [[entry.get("loss"), entry.get("eval_forget_loss")] for entry in recorded.state.log_history]
    states = [trainer.optimizer.state_dict()["state"] for trainer in (plain, recorded)]
    assert all(torch.equal(states[0][key]["exp_avg"], states[1][key]["exp_avg"]) for key in states[0])


def test_lora_is_the_same_bit_for_bit_and_measured_as_if_merged(make, tiny_model_path, tmp_path):
    models = []
    for callbacks in ([], [RunRecordCallback()]):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
        trainer = make(callbacks, model=get_peft_model(base, config), save_strategy="steps", save_steps=2)
        trainer.train()
        models.append(trainer.model)
    for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(left, right) and left.requires_grad == right.requires_grad
    report = load(tmp_path / "out")
    assert (report.method.scope.kind, report.method.scope.rank) == ("lora", 4)
    merged = models[1].merge_and_unload()
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    moved, norm = measured_footprint(merged, dict(base.named_parameters()))
    assert {module.name for module in report.footprint.modules} == set(moved) and len(moved) == 10
    assert report.footprint.relative_norm == pytest.approx(norm, rel=1e-6)
    assert "This release is reversible" in (tmp_path / "out" / "README.md").read_text()


def test_selected_weights(make, tiny_model_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2.mlp" in name)
    make([RunRecordCallback()], model=model).train()
    report = load(tmp_path / "out")
    assert report.method.scope.kind == "selected"
    assert {module.name.split(".mlp.")[0] for module in report.footprint.modules} == {"model.layers.2"}


def test_a_resumed_run_has_the_start_of_the_first(make, sets, tmp_path):
    options = {"eval_dataset": sets, "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 2}
    make([RunRecordCallback()], output="whole", **options).train()
    make([RunRecordCallback()], output="half", **options).train()
    whole, checkpoint = load(tmp_path / "whole"), tmp_path / "half" / "checkpoint-2"
    middle = load(checkpoint)
    assert middle.method.steps == 2 and middle.footprint.relative_norm < whole.footprint.relative_norm
    assert (checkpoint / "README.md").is_file()
    for name in ("unlearning_report.json", "README.md"):
        (tmp_path / "half" / name).unlink()
    # `eval_on_start` evaluates at the start of this process too: that is not before unlearning
    make([RunRecordCallback()], output="half", **options).train(resume_from_checkpoint=str(checkpoint))
    resumed = load(tmp_path / "half")
    assert resumed.metrics.before["forget"]["loss"] == whole.metrics.before["forget"]["loss"]
    assert resumed.metrics.after == whole.metrics.after
    assert resumed.footprint == whole.footprint and resumed.method == whole.method
    # Added to the trainer later, it never saw the start
    late = make(output="half", **options)
    late.add_callback(RunRecordCallback())
    late.train(resume_from_checkpoint=str(checkpoint))
    assert load(tmp_path / "half").footprint is None


def test_the_best_weights_have_the_numbers_of_their_step(make, sets, tmp_path):
    trainer = make(
        [RunRecordCallback()],
        eval_dataset=sets,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_retain_loss",
        greater_is_better=True,
        learning_rate=1e-2,
    )
    start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    best = trainer.state.best_global_step
    report = load(tmp_path / "out")
    losses = {
        entry["step"]: entry["eval_retain_loss"] for entry in trainer.state.log_history if "eval_retain_loss" in entry
    }
    assert best != 4 and report.method.checkpoint == f"step {best}, the best by evaluation"
    assert report.metrics.after["retain"]["loss"] == losses[best] == max(losses.values())
    assert report.footprint.relative_norm == pytest.approx(measured_footprint(trainer.model, start)[1], rel=1e-9)
    # The last checkpoint holds the last weights
    last = load(tmp_path / "out" / "checkpoint-4")
    assert last.method.checkpoint == "last step" and last.metrics.after["retain"]["loss"] == losses[4]


def test_evaluations_around_training_count(make, sets, tmp_path):
    trainer = make([RunRecordCallback(eval_set="retain")], eval_dataset=sets["retain"])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert load(tmp_path / "out").metrics.after == {}
    after = trainer.evaluate()["eval_loss"]
    report = load(tmp_path / "out")
    assert report.metrics.before == {"retain": {"loss": before, "rows": 6}}
    assert report.metrics.after == {"retain": {"loss": after, "rows": 6}}


def test_a_set_without_a_name_is_left_out(make, sets, tmp_path):
    make([RunRecordCallback()], eval_dataset=sets["retain"], eval_on_start=True).train()
    assert load(tmp_path / "out").metrics.before == {}


def test_what_another_callback_measures_is_taken_over(make, tofu_rows, tmp_path):
    rows = [
        Dataset.from_list([{key: row[key] for key in ("question", "answer")} for row in tofu_rows(name)[:3]])
        for name in ("forget10", "retain90")
    ]
    measure = UnlearningEvaluationCallback(*rows, every_steps=4)
    trainer = make([measure, RunRecordCallback()])
    trainer.callback_handler.processing_class = AutoTokenizer.from_pretrained(trainer.model.config._name_or_path)
    trainer.train()
    history = [
        entry["eval_unlearning_forget_probability"]
        for entry in trainer.state.log_history
        if "eval_unlearning_forget_probability" in entry
    ]
    report = load(tmp_path / "out")
    assert [report.metrics.before["forget"]["probability"], report.metrics.after["forget"]["probability"]] == history
    assert "The mean probability of the forget set went from" in (tmp_path / "out" / "README.md").read_text()


def test_one_folder_for_all(make, tmp_path):
    make([RunRecordCallback(str(tmp_path / "record" / "here"))], save_strategy="steps", save_steps=2).train()
    assert load(tmp_path / "record" / "here").method.steps == 4
    assert not list((tmp_path / "out").glob("**/unlearning_report.json"))


# --- a bug in the card


class Broken(str):
    """Text of a row, in the message of an error."""


@pytest.mark.parametrize("place", ["report", "footprint", "method", "__init__"])
def test_a_bug_only_warns_and_changes_nothing(make, tmp_path, monkeypatch, caplog, place):
    plain = make(output="plain", save_strategy="steps", save_steps=2)
    plain.train()

    def broken(*args, **kwargs):
        raise RuntimeError("Hsiao Yun-Hwa lives at 7 Elm Row")

    import hf_unlearn.trainer_callbacks.run_record as module

    owner = Record if place in ("report", "__init__") else module.CallbackRecord
    monkeypatch.setattr(owner, place, broken)
    trainer = make([RunRecordCallback()], save_strategy="steps", save_steps=2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 4
    for left, right in zip(plain.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(left, right)
    assert not (tmp_path / "out" / "unlearning_report.json").exists()
    assert "The record of this run is incomplete: RuntimeError in on_" in caplog.text
    assert "Hsiao" not in caplog.text and "Traceback" not in caplog.text


def test_a_model_that_is_none_of_transformers_only_warns(make, sets, caplog, tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(512, 512)

        def forward(self, input_ids, labels=None, **kwargs):
            logits = self.embedding(input_ids)
            return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    with caplog.at_level(logging.WARNING):
        trainer = make([RunRecordCallback()], model=Plain())
        trainer.train()
    assert trainer.state.global_step == 4 and "incomplete: AttributeError in on_init_end" in caplog.text


def test_interrupts_pass(make, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Record, "report", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make([RunRecordCallback()]).train()


# --- TRL


def test_sft_trainer(tofu_rows, tiny_model_path, tmp_path):
    rows = Dataset.from_list([{"text": f"{row['question']} I do not know."} for row in tofu_rows("forget10")[:6]])
    trainer = SFTTrainer(
        model=tiny_model_path,
        args=SFTConfig(
            str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_steps=2,
            max_length=64,
            eval_on_start=True,
            eval_strategy="no",
            loss_type="nll",
        ),
        train_dataset=rows,
        eval_dataset={"retain": rows},
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        callbacks=[RunRecordCallback(method="refusal-sft", forget_losses={"idk": 1.0})],
    )
    trainer.train()
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        report = load(folder)
        assert (report.method.name, report.method.scope.kind, report.data.forget.rows) == ("refusal-sft", "lora", 6)
        assert report.data.forget.tokens == sum(len(row) for row in trainer.train_dataset["input_ids"])
        assert (report.method.settings["max_length"], report.method.settings["loss_type"]) == (64, "nll")
        assert {"loss", "rows"} < set(report.metrics.before["retain"])
        assert len(report.footprint.modules) == 5
        card = (folder / "README.md").read_text()
        assert "unlearning-method:idk" in yaml.safe_load(card.split("---\n")[1])["tags"]
        assert not re.search(r"I do not know|ext_column", card)


def test_dpo_trainer(tofu_rows, tiny_model_path, tmp_path):
    rows = Dataset.from_list(
        [
            {"prompt": row["question"], "chosen": " I cannot say.", "rejected": " " + row["answer"]}
            for row in tofu_rows("forget10")[:6]
        ]
    )
    trainer = DPOTrainer(
        model=tiny_model_path,
        args=DPOConfig(
            str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            eval_on_start=True,
            eval_strategy="no",
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, 0.5],
        ),
        train_dataset=rows,
        eval_dataset={"forget": rows},
        callbacks=[RunRecordCallback()],
    )
    trainer.train()
    report = load(tmp_path / "out")
    assert (report.method.name, report.method.settings["loss_type"]) == ("dpo", "sigmoid,sft")
    assert report.method.settings["loss_weights"] == "1.0,0.5"
    assert "rewards.margins" in report.metrics.before["forget"] and report.data.forget.rows == 6
    assert report.data.forget.tokens > 0 and report.footprint.relative_norm > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Trained as `dpo`; which losses made it forget is not on record." in card


def test_trainers_with_a_record_of_their_own_keep_it(tofu_rows, tiny_model_path, tmp_path, caplog):
    rows = Dataset.from_list([{key: row[key] for key in ("question", "answer")} for row in tofu_rows("forget10")[:4]])
    trainer = UnlearnTrainer(
        model=tiny_model_path,
        args=UnlearnConfig(
            str(tmp_path / "out"),
            forget_loss=["ga"],
            retain_loss="none",
            max_steps=1,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows,
        callbacks=[RunRecordCallback()],
    )
    trainer.train()
    assert "This trainer writes its own report" in caplog.text
    assert not (tmp_path / "out" / "unlearning_report.json").exists()
    trainer.save_model()
    assert load(tmp_path / "out").method.name == "ga"


# --- arguments and data


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "two words"}, "method: expected a plain name"),
        ({"forget_losses": {"two words": 1.0}}, "forget_losses.name: expected a plain name"),
        ({"forget_losses": {"ga": float("nan")}}, "forget_losses.weight: expected a finite number"),
        ({"reference": "frozen"}, "reference: expected 'adapter_disabled' or"),
        ({"eval_set": "train"}, "eval_set: expected 'forget' or 'retain'"),
        ({"data": Data(DataSummary("many", 3))}, "data.forget.rows: expected an integer, got str"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        RunRecordCallback(**arguments)


def test_given_data_are_used_at_their_level(make, tmp_path):
    make([RunRecordCallback(data=Data(None, disclosure="sealed", commitment="ab" * 32))]).train()
    report = load(tmp_path / "out")
    assert report.data.forget is None and report.data.commitment == "ab" * 32
    assert report.footprint.modules == [] and report.footprint.changed_parameters > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Disclosure level `sealed`" in card and "| forget |" not in card


def test_counting_reads_lengths_alone():
    rows = Dataset.from_dict(
        {"prompt_ids": [[1, 2], [3]], "chosen_ids": [[4], []], "position_ids": [[0], [0]], "x_ids": [1, 2]}
    )
    assert count_rows(rows) == DataSummary(2, 4)
    assert count_rows(rows.select([1])) == DataSummary(1, 1)  # not those of the whole table
    assert count_rows(rows.to_iterable_dataset()) == DataSummary(None, None)
    assert count_rows([1, 2, 3]) == DataSummary(3, None)
    assert count_rows(Dataset.from_dict({"input_ids": [[1]] * 3}).filter(lambda row: False)) == DataSummary(0, 0)


@pytest.mark.slow
def test_two_processes_write_one_report_and_it_is_that_of_one(sets, tiny_model_path, tmp_path):
    rows = [row[:20] for row in sets["forget"]["input_ids"]]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for launcher, name, world_size in (([sys.executable], "one", 1), (torchrun, "two", 2)):
        spec = {"output": str(tmp_path / name), "model": tiny_model_path, "rows": rows, "world_size": world_size}
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        command = [*launcher, run_record_worker.__file__, str(tmp_path / "spec.json")]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-3000:]
    assert len(json.loads((tmp_path / "two" / "rank0.json").read_text())) == 2  # checkpoint and end
    assert json.loads((tmp_path / "two" / "rank1.json").read_text()) == []
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert (one.environment.processes, two.environment.processes) == (1, 2)
    assert two.data == one.data and two.data.forget.rows == 8
    assert two.footprint.relative_norm == pytest.approx(one.footprint.relative_norm, rel=1e-3)
    assert load(tmp_path / "two" / "checkpoint-2").footprint == two.footprint
