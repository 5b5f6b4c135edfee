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
"""What all trainers share, on a trainer that changes one weight by hand and takes no gradient step."""

import json
import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import TrainOutput

from hf_unlearn import UnlearnConfig, UnlearningReport
from hf_unlearn.base_trainer import ReportingTrainer, prepare_eval_dataset
from hf_unlearn.cards import Certificate, Data, Method
from hf_unlearn.data import prepare_dataset
from hf_unlearn.footprint import changes_of, count_base_parameters, footprint_of
from hf_unlearn.pairing import DataCollatorForUnlearning
from hf_unlearn.recording import Record, describe_rows, describe_scope
from hf_unlearn.reference import InitialWeights


EDITED = "model.layers.2.mlp.down_proj"


class HandEditRecord(Record):
    """The record of a run of [`HandEditTrainer`]."""

    def __init__(self, model, data):
        super().__init__(model, data)
        self.initial = InitialWeights(model, device="cpu")

    def method(self, trainer):
        return Method(
            name="pointwise",
            forget_losses=[],
            retain_losses=[],
            scope=describe_scope(trainer.model, "2", ["mlp.down_proj"]),
            reference=None,
            settings={"epsilon": 1.0},
            seed=trainer.args.seed,
            steps=trainer.state.global_step,
        )

    def footprint(self, trainer):
        return footprint_of(changes_of(trainer.model, self.initial), count_base_parameters(trainer.model))


class HandEditTrainer(ReportingTrainer):
    """Adds a change of rank one to one weight."""

    def __init__(self, model, args, change, forget, **kwargs):
        super().__init__(model=model, args=args, **kwargs)
        self.change = change
        self.record = HandEditRecord(model, Data(describe_rows(forget)))

    def train(self):
        with torch.no_grad():
            self.model.get_submodule(EDITED).weight += self.change
        self.record.certificates.append(Certificate("optimality", {"residual": 1e-12}, "Up to rounding."))
        self.state.global_step = 3
        self.state.log_history.append({"train_runtime": 0.5})
        return TrainOutput(3, 0.0, {})


@pytest.fixture
def setting(tmp_path, tiny_model_path, tofu_rows):
    """A trainer, and the raw forget rows that it measures."""
    rows = Dataset.from_list(tofu_rows("forget01")[:5])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype="float32")
    model.requires_grad_(False).get_submodule(EDITED).weight.requires_grad_(True)
    args = UnlearnConfig(
        str(tmp_path / "out"), use_cpu=True, max_length=64, per_device_eval_batch_size=2, disable_tqdm=True
    )
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, 1, generator=generator) for size in model.get_submodule(EDITED).weight.shape)
    trainer = HandEditTrainer(
        model,
        args,
        0.1 * left @ right.T,
        prepare_dataset(rows, tokenizer, args, "forget"),
        eval_dataset=prepare_eval_dataset({"forget": rows}, tokenizer, args),
        processing_class=tokenizer,
        data_collator=DataCollatorForUnlearning(pad_token_id=tokenizer.pad_token_id),
    )
    return trainer, rows


def naive_probability(model, rows):
    """Mean over rows of the answer's probability per token, one row at a time, with transformers' own forward."""
    values = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            values.append(math.exp(-model(input_ids=ids, labels=labels).loss.item()))
    return sum(values) / len(values)


def test_an_edit_without_steps_is_measured_saved_and_reported(setting, tiny_model_path, tmp_path):
    trainer, raw_rows = setting
    rows = trainer.eval_dataset["forget"]
    before = trainer.evaluate()
    assert before["eval_forget_probability"] == pytest.approx(naive_probability(trainer.model, rows), rel=1e-5)
    trainer.train()
    after = trainer.evaluate({"forget": raw_rows})
    assert after["eval_forget_probability"] == pytest.approx(naive_probability(trainer.model, rows), rel=1e-5)
    assert after["eval_forget_probability"] < 0.9 * before["eval_forget_probability"]
    trainer.save_model()

    folder = tmp_path / "out"
    assert not list(folder.rglob("*.bin"))
    report = UnlearningReport.load(folder / "unlearning_report.json")
    assert report.metrics.before["forget"]["probability"] == before["eval_forget_probability"]
    assert report.metrics.after["forget"] == {
        name: after[f"eval_forget_{name}"] for name in ("loss", "probability", "rows")
    }
    assert report.base.parameters == 260_032
    assert (report.method.name, report.method.steps, report.method.forget_losses) == ("pointwise", 3, [])
    weight = trainer.model.get_submodule(EDITED).weight
    assert report.method.scope.trainable_parameters == weight.numel()
    assert report.certificates == [Certificate("optimality", {"residual": 1e-12}, "Up to rounding.")]
    assert report.environment.train_seconds == 0.5
    assert report.data.forget.rows == 5

    # The footprint and the saved weights are those of the edit
    original = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype="float32").get_submodule(EDITED).weight
    [module] = report.footprint.modules
    assert module.name == f"{EDITED}.weight"
    change = weight.double() - original.double()
    assert module.relative_norm == pytest.approx((change.norm() / original.double().norm()).item(), rel=1e-9)
    assert module.relative_norm == report.footprint.relative_norm
    assert module.max_abs == change.abs().max().item()
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(saved.get_submodule(EDITED).weight, weight)
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    card = (folder / "README.md").read_text()
    assert "- unlearning-method:pointwise\n" in card
    assert "- **Run:** 3 rounds, seed 42.\n" in card
    assert "| `residual` | 1.00e-12 |\n\nLimits: Up to rounding.\n" in card


def test_no_repository_is_created_by_a_trainer(setting, monkeypatch):
    """The Trainer creates one when it is made, public by default, and sends each checkpoint."""
    trainer, _ = setting
    for name in ("create_repo", "upload_folder", "create_commit", "whoami"):
        monkeypatch.setattr(f"huggingface_hub.HfApi.{name}", lambda *_, **__: pytest.fail("something was sent"))
    with pytest.raises(ValueError, match="push_to_hub needs hub_model_id"):
        trainer.push_to_hub()
    trainer.args.push_to_hub, trainer.args.hub_model_id, trainer.args.hub_token = True, "org/name", "hf_alice"
    other = ReportingTrainer(model=trainer.model, args=trainer.args)
    assert other.hub_model_id == "org/name"
    other._push_from_checkpoint(trainer.args.output_dir)


def test_footprint_by_hand():
    before = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    changes = [
        ("moved", before, before + torch.tensor([[0.0, 0.0], [-0.3, 0.4]])),
        ("still", before, before.clone()),
        ("from_zero", torch.zeros(3), torch.tensor([0.0, 2.0, 0.0])),
    ]
    footprint = footprint_of(changes, total_parameters=100)
    moved, from_zero = footprint.modules  # what stayed is not listed
    assert (moved.name, moved.changed_parameters, moved.parameters) == ("moved", 2, 4)
    assert (moved.relative_norm, moved.max_abs) == pytest.approx((0.1, 0.4), rel=1e-6)
    assert (from_zero.relative_norm, from_zero.max_abs, from_zero.changed_parameters) == (1.0, 2.0, 1)
    # Squares add up: sqrt(0.25 + 4) over sqrt(25 + 0)
    assert footprint.relative_norm == pytest.approx(math.sqrt(4.25) / 5, rel=1e-6)
    assert (footprint.changed_parameters, footprint.total_parameters, footprint.max_abs) == (3, 100, 2.0)
    assert footprint_of(changes[1:2], 100) == type(footprint)(0, 100, 0.0, 0.0, [])
