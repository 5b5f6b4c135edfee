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
"""Rows without padding: the same losses and the same training, with less to compute."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from hf_unlearn import UnlearnConfig, UnlearnTrainer
from hf_unlearn.forward import Decoder, Pass, check_packing
from hf_unlearn.pairing import DataCollatorForUnlearning
from hf_unlearn.scope import decoder_layers


SELECTED = {"trainable_layers": "2-3", "trainable_modules": ["mlp.down_proj"]}
RMU = {"forget_loss": ["rmu"], "retain_loss": ["hidden_mse"], "hidden_layer": 3}
NPO = {"forget_loss": ["npo"], "retain_loss": ["kl"]}
CASES = {
    "npo": NPO,
    "npo, selected": {**NPO, **SELECTED},
    "simnpo": {"forget_loss": ["simnpo"], "retain_loss": ["nll"]},
    "dpo": {"forget_loss": ["dpo"], "retain_loss": ["logprob_mse"]},
    "undial": {"forget_loss": ["undial"], "retain_loss": ["hidden_mse"], "hidden_layer": 2},
    "rmu": {**RMU, **SELECTED},
    "rmu, noise": {**RMU, **SELECTED, "reference_noise_std": 0.1},
    "adversary": {**NPO, "latent_adversary_layers": "1,3", "latent_adversary_steps": 2},
    "sam, decoupled": {**NPO, **SELECTED, "sharpness": "sam", "gradient_conflict": "global"},
    "null space": {**NPO, **SELECTED, "retain_null_space": 0.9},
    "checkpointing": {**NPO, "activation_checkpointing": True},
    "cached reference": {**NPO, **SELECTED, "precompute_ref_log_probs": True},
    "adapter": {**NPO, "peft": True},
}


@pytest.fixture
def make_trainer(tiny_model_path, tokenizer, tofu_rows, tmp_path):
    """Six rows of unequal length each, in micro-batches of three."""
    rows = [[{**row} for row in tofu_rows(name)[:6]] for name in ("forget10", "retain90")]

    def make(settings: dict, padding_free: bool, **options) -> UnlearnTrainer:
        settings = dict(settings)
        peft_config = None
        if settings.pop("peft", False):
            peft_config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=4)
        args = UnlearnConfig(
            str(tmp_path / f"out-{padding_free}"),
            use_cpu=True,
            bf16=False,
            padding_free=padding_free,
            per_device_train_batch_size=3,
            learning_rate=1e-3,
            adam_epsilon=1e-4,
            max_length=256,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **{"max_steps": 3, **settings},
        )
        return UnlearnTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32),
            args=args,
            train_dataset=Dataset.from_list(rows[0]),
            retain_dataset=Dataset.from_list(rows[1]),
            processing_class=tokenizer,
            peft_config=peft_config,
            **options,
        )

    return make


def train(trainer: UnlearnTrainer) -> tuple[torch.Tensor, torch.Tensor, list[float], int]:
    """Start and end of the trained values, the losses, and the FLOPs."""
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    start = torch.cat([parameter.detach().flatten().clone() for parameter in trained.values()])
    with FlopCounterMode(display=False) as counter:
        trainer.train()
    end = torch.cat([parameter.detach().flatten() for parameter in trained.values()])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return start, end, losses, counter.get_total_flops()


@pytest.mark.parametrize("name", CASES)
def test_trains_what_padded_rows_train(make_trainer, name):
    padded, packed = make_trainer(CASES[name], False), make_trainer(CASES[name], True)
    start, expected, expected_losses, padded_flops = train(padded)
    _, values, losses, packed_flops = train(packed)
    assert (expected - start).norm() > 0
    # Sums over other shapes round otherwise; Adam divides small gradients by themselves
    assert (values - expected).norm() <= 1e-4 * (expected - start).norm()
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert packed_flops < 0.95 * padded_flops


def run_lengths(model, calls: list[tuple[int, int]]):
    return model.model.embed_tokens.register_forward_hook(lambda module, args, output: calls.append(args[0].shape))


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"forget_loss": ["simnpo"], "retain_loss": ["nll"]}, 1),
        (NPO, 2),  # policy and reference
        ({"forget_loss": ["dpo"], "retain_loss": ["kl"]}, 2),  # three sets in each
        ({"forget_loss": ["simnpo"], "retain_loss": ["hidden_mse"], "hidden_layer": 1}, 3),  # not equally deep
        ({**NPO, **SELECTED}, 4),  # what frozen layers give is shared instead
    ],
)
def test_sets_that_run_equally_deep_run_together(make_trainer, settings, passes):
    trainer = make_trainer({**settings, "max_steps": 1}, True)
    calls = []
    handle = run_lengths(trainer.model, calls)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer._require_finite_after_update = lambda: None  # it computes the last loss again
    trainer.train()
    handle.remove()
    assert len(calls) == passes
    assert all(shape[0] == 1 for shape in calls), "one sequence"
    if passes == 1:
        assert calls[0][1] == sum(int(rows["attention_mask"].sum()) for rows in batch.values())


def test_rows_do_not_see_each_other(random_model):
    """Of two sets in one forward: a token of one changes nothing in the other, to the last bit."""
    model = random_model(num_hidden_layers=2)
    collator = DataCollatorForUnlearning(pad_token_id=0, padding_free=True)

    def states(first: list[int]) -> torch.Tensor:
        forget = collator([{"input_ids": first, "labels": first}, {"input_ids": [4, 5], "labels": [4, 5]}])
        retain = collator([{"input_ids": [6, 7, 8], "labels": [6, 7, 8]}])
        outputs = Decoder(model).run_all({"forget": Pass(forget, [0], True), "retain": Pass(retain, [1], True)})
        assert outputs["forget"].hidden_states.keys() == {0}
        assert outputs["retain"].hidden_states.keys() == {1}
        return outputs["retain"].last_hidden_state

    assert torch.equal(states([1, 2, 3]), states([9, 8, 7]))
    assert not torch.equal(states([1, 2, 3]), states([1, 2, 3])[:, [1, 0, 2]])


def test_architectures_keep_rows_apart_or_are_refused(random_model, architecture):
    """What `check_packing` lets pass gives what padded rows give, layer by layer, as other rows stand before them."""
    model = random_model(architecture)
    check_packing(model, None)
    collator = DataCollatorForUnlearning(pad_token_id=0, padding_free=True)
    rows = [[5, 9, 2, 7, 3, 11], [4, 1], [8, 8, 3, 2]]
    batch = collator([{"input_ids": row, "labels": row} for row in rows])
    padded = {name: value for name, value in batch.items() if name not in ("packed_index", "position_ids")}
    layers = range(len(decoder_layers(model)[1]))
    with torch.no_grad():
        outputs = [Decoder(model).run(each, layers, last_hidden_state=True) for each in (batch, padded)]
    attended = batch["attention_mask"].bool()
    for packed, expected in zip(
        [*outputs[0].hidden_states.values(), outputs[0].last_hidden_state],
        [*outputs[1].hidden_states.values(), outputs[1].last_hidden_state],
        strict=True,
    ):
        torch.testing.assert_close(packed[attended], expected[attended], rtol=1e-4, atol=1e-5)
        assert not packed[~attended].any()


def test_a_model_whose_rows_see_each_other_is_refused(random_model, monkeypatch):
    model = random_model()
    forward = type(model.base_model).forward

    def ignoring_positions(self, *args, position_ids=None, **kwargs):
        return forward(self, *args, **kwargs)  # one long row: every token sees all before it

    monkeypatch.setattr(type(model.base_model), "forward", ignoring_positions)
    with pytest.raises(ValueError, match="padding_free=True: LlamaForCausalLM does not keep rows"):
        check_packing(model, None)


def test_refusals(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="prefix_cache keeps what padded rows give: remove one of the two"):
        make_trainer({**NPO, **SELECTED, "prefix_cache": str(tmp_path / "cache")}, True)
    with pytest.raises(ValueError, match="leave data_collator out"):
        make_trainer(NPO, True, data_collator=DataCollatorForUnlearning(pad_token_id=0))


def test_kernels_that_compute_all_pairs_are_named(make_trainer, caplog):
    make_trainer(NPO, True)
    assert "without FlashAttention computes the attention of all pairs of tokens" in caplog.text


def test_evaluation_is_the_same(make_trainer, tofu_rows):
    rows = Dataset.from_list(tofu_rows("retain90")[:5])
    metrics = [make_trainer(NPO, padding_free).evaluate(rows) for padding_free in (False, True)]
    assert metrics[1]["eval_loss"] == pytest.approx(metrics[0]["eval_loss"], rel=1e-5)
    assert metrics[1]["eval_probability"] == pytest.approx(metrics[0]["eval_probability"], rel=1e-5)
