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
"""UnlearnTrainer on trained checkpoints and real data."""

import inspect
import json
import logging
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments
from trl import DPOTrainer, SFTConfig, SFTTrainer

from hf_unlearn import UnlearnConfig, UnlearningReport, UnlearnTrainer
from hf_unlearn.checkpoint import STATE_NAME
from hf_unlearn.reference import DisabledAdapter, InitialWeights, SeparateModel
from hf_unlearn.trainer import NonFiniteLossError


RMU = {
    "forget_loss": ["rmu"],
    "retain_loss": ["hidden_mse"],
    "retain_loss_weights": [2.0],
    "hidden_layer": 2,
    "trainable_layers": "0-2",
    "trainable_modules": ["mlp.down_proj"],
    "learning_rate": 1e-3,
}
LORA = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)


@pytest.fixture
def make(tmp_path, tiny_model_path, tofu_rows):
    """Factory of small trainers on the 260k model; keyword arguments that UnlearnConfig has go there."""

    def build(**options) -> UnlearnTrainer:
        names = inspect.signature(UnlearnTrainer.__init__).parameters
        arguments = {name: options.pop(name) for name in list(options) if name in names}
        settings = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "activation_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "max_length": 64,
            "disable_tqdm": True,
            **options,
        }
        return UnlearnTrainer(
            **{
                "model": tiny_model_path,
                "args": UnlearnConfig(**settings),
                "train_dataset": Dataset.from_list(tofu_rows("forget01")[:8]),
                "retain_dataset": Dataset.from_list(tofu_rows("retain90")[:8]),
                **arguments,
            }
        )

    return build


# ---- Forgetting, on real input ----


def test_forgets_an_author_of_tofu_and_keeps_the_others(known_model, tofu_rows, tmp_path):
    forget, retain = Dataset.from_list(tofu_rows("forget10")[:20]), Dataset.from_list(tofu_rows("retain90")[:40])
    trainer = UnlearnTrainer(
        known_model,
        args=UnlearnConfig(
            str(tmp_path),
            use_cpu=True,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            num_train_epochs=12,
            per_device_train_batch_size=4,
            activation_checkpointing=False,
            max_length=256,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=forget,
        retain_dataset=retain,
        eval_dataset={"forget": forget, "retain": retain},
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8),
    )
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    metrics = UnlearningReport.load(tmp_path / "unlearning_report.json").metrics
    assert metrics.before["forget"]["probability"] > 0.9
    assert metrics.before["retain"]["probability"] > 0.9
    assert metrics.after["forget"]["probability"] < 0.35
    assert metrics.after["retain"]["probability"] > 0.85 * metrics.before["retain"]["probability"]


# ---- The step, against an independent implementation ----


def naive_step(model, original, batch, hidden_layer, control, case):
    """The loss of one batch, written with nothing but transformers and full logits."""

    def token_log_probs(model, rows):
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits.float()
        labels = rows["labels"][:, 1:]
        log_probs = F.log_softmax(logits[:, :-1], -1)
        picked = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return log_probs, picked, labels != -100

    def hidden(model, rows):
        captured = []
        layer = (model.get_base_model() if isinstance(model, PeftModel) else model).model.layers[hidden_layer]
        handle = layer.register_forward_hook(lambda module, args, output: captured.append(output))
        model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
        handle.remove()
        return captured[0]

    forget, retain = batch["forget"], batch["retain"]
    if case == "rmu":
        loss = ((hidden(model, forget) - control) ** 2)[forget["labels"] != -100].mean()
        with torch.no_grad():
            target = hidden(original, retain)
        return loss + 2.0 * ((hidden(model, retain) - target) ** 2)[retain["labels"] != -100].mean()
    _, policy, mask = token_log_probs(model, forget)
    with torch.no_grad():
        _, reference, _ = token_log_probs(original, forget)
        reference_distribution, _, _ = token_log_probs(original, retain)
    ratio = ((policy - reference) * mask).sum(-1)
    distribution, picked, mask = token_log_probs(model, retain)
    kl = (reference_distribution.exp() * (reference_distribution - distribution)).sum(-1)[mask].mean()
    nll = -picked[mask].mean()
    return -(2 / 0.1) * F.logsigmoid(-0.1 * ratio).mean() + 3.0 * kl + 0.5 * nll


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("case", ["npo", "rmu"])
def test_a_step_equals_a_naive_implementation(make, tiny_model_path, case, adapter):
    options = dict(RMU) if case == "rmu" else {"retain_loss": ["kl", "nll"], "retain_loss_weights": [3.0, 0.5]}
    if adapter:
        options = {key: value for key, value in options.items() if not key.startswith("trainable")}
        options["peft_config"] = LORA
    else:
        options |= {"trainable_layers": "0-2", "trainable_modules": ["mlp.down_proj", "self_attn"]}
    trainer = make(**options)
    original = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from the reference, where NPO and KL have no gradient of their own
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)

    batches, counts = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    loss = trainer.training_step(trainer.model, batches[0], counts)
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    if case == "rmu" and adapter:  # adapters above the hidden layer cannot get one
        trained = {name for name in trained if int(re.search(r"layers\.(\d+)\.", name)[1]) <= 2}
    assert set(gradients) == trained  # nothing frozen got a gradient

    trainer.model.zero_grad()
    control = trainer.objective.control_vectors["rmu"][0] if case == "rmu" else None
    expected = naive_step(trainer.model, original, batches[0], 2, control, case)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in trainer.model.named_parameters():
        if name in trained:
            error = (gradients[name] - parameter.grad).norm()
            assert error <= 1e-4 * parameter.grad.norm(), name


@pytest.mark.parametrize("checkpointing", [True, False])
def test_rmu_runs_no_layer_above_the_hidden_one(make, checkpointing):
    """
    Two policy passes and one of the reference, three layers each, but for the frozen one, which runs once for both
    models; checkpointing runs the *trained* ones again.
    """
    calls = []
    settings = {**RMU, "trainable_layers": "1-2"}
    trainer = make(**settings, activation_checkpointing=checkpointing, max_steps=1)
    for index, layer in enumerate(trainer.model.model.layers):
        # Before the module: a recomputation stops early, as soon as it has what the backward needs
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    trainer.train()
    last_check = [0, 1, 2] * 3  # after the last update, once more
    recomputed = [1, 2] * 2 if checkpointing else []
    shared = [0, 1, 2] * 2 + [1, 2]
    assert sorted(calls) == sorted(shared + recomputed + last_check)


def test_frozen_parameters_do_not_move(make, tiny_model_path):
    trainer = make(**RMU)
    trainer.train()
    original = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).state_dict()
    changed = [name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, original[name])]
    assert changed == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(3)]


def test_loss_weights_scale_their_term(make):
    losses = {}
    for weights in ([1.0], [4.0]):
        trainer = make(peft_config=LORA, forget_loss_weights=weights, retain_loss="nll", max_steps=1)
        trainer.train()
        log = trainer.state.log_history[0]
        losses[weights[0]] = log["loss"]
        assert log["loss"] == pytest.approx(weights[0] * log["forget/npo"] + log["retain/nll"], rel=1e-6)
    assert losses[4.0] - losses[1.0] == pytest.approx(3 * (2 / 0.1) * math.log(2), rel=1e-5)


def test_logged_metrics_are_means_over_the_steps_since_the_last_log(make):
    logs = {}
    for steps in (1, 4):
        trainer = make(peft_config=LORA, max_steps=4, logging_steps=steps, learning_rate=1e-2)
        trainer.train()
        logs[steps] = [entry for entry in trainer.state.log_history if "forget/npo" in entry]
    assert len(logs[1]) == 4 and len(logs[4]) == 1
    for key in ("loss", "forget/npo", "forget/log_ratio", "retain/kl"):
        assert logs[4][0][key] == pytest.approx(sum(entry[key] for entry in logs[1]) / 4, rel=1e-5), key


def test_bf16_autocast_keeps_log_probs_in_fp32(make):
    """Log-probabilities rounded to bf16 have steps of 0.06 to 0.125 nats: a small KL drowns in them."""
    trainer = make(peft_config=LORA, bf16=True, max_steps=1)
    seen = []
    original = trainer.objective._run_policy
    trainer.objective._run_policy = lambda *args: seen.append(original(*args)) or seen[-1]
    trainer.train()
    log_probs = seen[0]["forget"]["log_probs"]
    assert log_probs.dtype == torch.float32
    values = log_probs[log_probs != 0]
    assert not torch.equal(values, values.bfloat16().float())
    assert trainer.state.log_history[0]["retain/kl"] == pytest.approx(0.0, abs=1e-6)  # policy = reference at step 1


def test_dropout_does_not_reach_the_reference(make):
    trainer = make(peft_config=LoraConfig(target_modules="all-linear", r=4, lora_dropout=0.5), disable_dropout=False)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model
    for module in model.modules():  # and dropout inside the model itself
        if isinstance(module, torch.nn.Module) and hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    first, second = (trainer.objective.read_reference(model, batch) for _ in range(2))
    assert torch.equal(first["forget"]["reference_log_probs"], second["forget"]["reference_log_probs"])
    assert model.training
    assert (
        not make(peft_config=LoraConfig(target_modules="all-linear", lora_dropout=0.5))
        .model.get_submodule("base_model.model.model.layers.0.mlp.down_proj.lora_dropout.default")
        .p
    )


# ---- Scope and reference ----


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"peft_config": LORA}, DisabledAdapter),
        ({"peft_config": LORA, "reference_mode": "swap"}, InitialWeights),
        ({"peft_config": LORA, "reference_mode": "copy"}, SeparateModel),
        ({"peft_config": LoraConfig(target_modules="all-linear", init_lora_weights="pissa")}, InitialWeights),
        ({"trainable_layers": "1"}, InitialWeights),
        ({}, InitialWeights),
        (RMU, InitialWeights),
        ({"forget_loss": "ga", "retain_loss": "nll", "trainable_layers": "1"}, type(None)),
    ],
)
def test_reference_kinds(make, options, kind):
    trainer = make(**options)
    assert isinstance(trainer.objective.reference, kind)
    trainer.train()


def test_ref_model_with_another_tokenizer_is_refused(make, small_model_path):
    other = AutoModelForCausalLM.from_pretrained(small_model_path)
    with pytest.raises(ValueError, match="a vocabulary of 512 tokens and ref_model one of 105: the two must share"):
        make(ref_model=other)


def test_ref_model_is_used(make, small_model_path, tiny_model_path):
    other = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    trainer = make(ref_model=other, peft_config=LORA, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["retain/kl"] > 0.01  # not the policy's own start
    assert not any(parameter.requires_grad for parameter in other.parameters())


def test_received_adapter_is_trained_from_where_it_stands(make, tiny_model_path):
    """Its start is the reference, not the base model under it."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
    trainer = make(model=model, processing_class=AutoTokenizer.from_pretrained(tiny_model_path), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["forget/log_ratio"] == pytest.approx(0.0, abs=1e-4)
    assert trainer.state.log_history[0]["retain/kl"] == pytest.approx(0.0, abs=1e-6)


def test_trained_head_with_kl_and_swap(make):
    """The reference's head is then another than the policy's: its logits are kept."""
    trainer = make(learning_rate=1e-2, max_steps=2)
    trainer.train()
    assert trainer.objective.policy(trainer.model).head.is_trained
    assert trainer.state.log_history[0]["retain/kl"] == pytest.approx(0.0, abs=1e-6)
    assert trainer.state.log_history[1]["retain/kl"] > 1e-3


# ---- Topics ----


def test_topics_have_their_own_control_vectors_and_weights(make, tofu_rows):
    rows = [{**row, "topic": "bio" if index < 4 else "cyber"} for index, row in enumerate(tofu_rows("forget01")[:8])]
    trainer = make(
        **RMU,
        train_dataset=Dataset.from_list(rows),
        topic_column="topic",
        topic_retain_weights={"bio": 10.0},
        topic_steering_coefficients={"cyber": 2.0},
        max_steps=4,
    )
    vectors = trainer.objective.control_vectors["rmu"]
    assert vectors.norm(dim=-1).tolist() == pytest.approx([6.5, 2.0])
    assert (vectors >= 0).all() and not torch.allclose(vectors[0] / 6.5, vectors[1] / 2.0)
    batches = list(trainer.get_train_dataloader())
    assert [batch["forget"]["topic"].item() for batch in batches] == [0, 1, 0, 1]
    trainer.train()
    for entry, weight in zip(trainer.state.log_history[:4], (10, 1, 10, 1), strict=True):
        expected = entry["forget/rmu"] + 2.0 * weight * entry["retain/hidden_mse"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)


def test_unknown_topics_are_refused(make, tofu_rows):
    rows = Dataset.from_list([{**row, "topic": "bio"} for row in tofu_rows("forget01")[:4]])
    with pytest.raises(ValueError, match="no column 'subject'"):
        make(**RMU, train_dataset=rows, topic_column="subject")
    with pytest.raises(ValueError, match="1 of the topics given weights are not among the 1 topics"):
        make(**RMU, train_dataset=rows, topic_column="topic", topic_retain_weights={"chem": 1.0})
    retain = Dataset.from_list([{**row, "topic": "chem"} for row in tofu_rows("retain90")[:4]])
    with pytest.raises(ValueError, match="no rows for 1 of the forget topics"):
        make(**RMU, train_dataset=rows, retain_dataset=retain, topic_column="topic")


# ---- The constructor ----


@pytest.mark.parametrize("other", [SFTTrainer, DPOTrainer])
def test_constructor_is_trls_plus_retain_dataset(other):
    """A script for `other` becomes an unlearning script by two names and one argument."""
    mine = set(inspect.signature(UnlearnTrainer.__init__).parameters)
    theirs = set(inspect.signature(other.__init__).parameters)
    # SFT's own extras: a custom loss function and text formatting, both replaced by forget_loss and columns
    assert theirs - mine <= {"compute_loss_func", "formatting_func"}
    assert "retain_dataset" in mine


def test_plain_training_arguments_are_completed(make, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=3e-4, max_steps=3)
    trainer = make(args=args, peft_config=LORA)
    assert isinstance(trainer.args, UnlearnConfig)
    assert (trainer.args.learning_rate, trainer.args.max_steps, trainer.args.forget_loss) == (3e-4, 3, ["npo"])
    with pytest.raises(ValueError, match="args is a SFTConfig: use UnlearnConfig"):
        make(args=SFTConfig(str(tmp_path), use_cpu=True, bf16=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_dataset": None}, r"train_dataset \(the forget set\) is required"),
        ({"retain_dataset": None}, r"retain_loss=\['kl'\] needs a retain_dataset"),
        ({"model": "does/not-exist"}, "The model 'does/not-exist' cannot be loaded"),
        ({"model": "/no/such/folder"}, "The model '/no/such/folder' cannot be loaded"),
        ({"model": 5}, "model is a int"),
        ({**RMU, "hidden_layer": 9}, "hidden_layer=9, but the model has 5 layers: 0 to 4"),
        ({**RMU, "trainable_layers": "0-3"}, "Layers 3 to 3 are trainable but lie above hidden_layer=2"),
        ({"trainable_modules": ["mlp.dwn_proj"]}, "Near matches: mlp.down_proj"),
        ({"trainable_layers": "7"}, "names layer 7, but the model has 5 layers"),
        ({"trainable_layers": "1", "peft_config": LORA}, "set layers_to_transform and target_modules"),
        ({"fp16": True}, "float16 is not supported"),
        ({"quantization_config": object()}, "quantization_config needs a peft_config"),
        ({"train_dataset": DatasetDict()}, "choose one split"),
        ({"train_dataset": Dataset.from_list([{"body": "x"}])}, "it has `body`; expected `text`"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(make, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**options)
    assert "\n" not in str(error.value)


def test_models_that_cannot_be_used_are_refused(make, tiny_model_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)

    def load(**options):
        return AutoModelForCausalLM.from_pretrained(tiny_model_path, **options)

    with pytest.raises(ValueError, match="float16 is not supported"):
        make(model=load(dtype=torch.float16), processing_class=tokenizer)
    with pytest.raises(ValueError, match="already has an adapter"):
        make(model=get_peft_model(load(), LORA), processing_class=tokenizer, peft_config=LORA)
    model = load()
    with pytest.raises(ValueError, match="the same object"):
        make(model=model, ref_model=model, processing_class=tokenizer)
    with pytest.raises(ValueError, match="the model is already loaded"):
        make(model=load(), processing_class=tokenizer, model_init_kwargs={"dtype": "float32"})
    with pytest.raises(ValueError, match="No parameter is trainable"):
        make(model=load().requires_grad_(False), processing_class=tokenizer)
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a pad nor an EOS token"):
        make(model=load(), processing_class=tokenizer)


def test_warnings_name_counts_and_fixes(make, tiny_model_path, tofu_rows, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    tokenizer.pad_token = None
    rows = tofu_rows("forget01")
    with caplog.at_level(logging.WARNING, logger="hf_unlearn"):
        make(
            **{**RMU, "trainable_layers": None, "trainable_modules": None},
            peft_config=LORA,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows[:6]),
            retain_dataset=Dataset.from_list(rows[4:10]),
            max_length=512,
        )
    messages = "\n".join(record.getMessage() for record in caplog.records)
    assert "2 of 6 forget rows also stand in the retain set" in messages
    assert "The tokenizer has no pad token: the EOS token pads" in messages
    assert "Layers 3 to 4 are trainable but lie above hidden_layer=2" in messages
    for row in rows:  # no message repeats forget text
        assert row["answer"] not in messages and row["question"] not in messages


def test_bf16_weights_warn_that_small_steps_vanish(make, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_unlearn"):
        make(model_init_kwargs={"dtype": "bfloat16"}, trainable_layers="1")
    assert "Trained weights are in bfloat16: at learning_rate=1e-05 most steps" in caplog.text


@pytest.mark.parametrize("kind", ["unpaired", "preference", "text", "messages"])
def test_other_formats_train(make, tofu_rows, chat_tokenizer, kind):
    rows = tofu_rows("forget01")[:4]
    options = {}
    if kind == "unpaired":
        labelled = [{"prompt": r["question"], "completion": r["answer"], "label": i >= 2} for i, r in enumerate(rows)]
        options = {"train_dataset": Dataset.from_list(labelled), "retain_dataset": None}
    elif kind == "preference":
        pairs = [{"prompt": r["question"], "chosen": " No idea.", "rejected": " " + r["answer"]} for r in rows]
        options = {"train_dataset": Dataset.from_list(pairs)}
    elif kind == "text":
        options = {"train_dataset": Dataset.from_list([{"text": row["answer"]} for row in rows])}
    else:
        chats = [{"messages": [{"role": "user", "content": row["question"]}]} for row in rows]
        options = {"train_dataset": Dataset.from_list(chats), "processing_class": chat_tokenizer()}
    trainer = make(peft_config=LORA, **options)
    if kind == "unpaired":
        assert (len(trainer.train_dataset.forget), len(trainer.train_dataset.retain)) == (2, 2)
    trainer.train()
    assert trainer.state.log_history[1]["forget/log_ratio"] != 0.0


def test_a_label_column_and_a_retain_set_are_refused(make, tofu_rows):
    rows = [{"prompt": "a", "completion": "b", "label": False}]
    with pytest.raises(ValueError, match="has a `label` column, which splits it"):
        make(train_dataset=Dataset.from_list(rows))


# ---- Evaluation ----


def test_evaluation_depends_on_no_batch_size(make, tofu_rows, tiny_model_path):
    rows = Dataset.from_list(tofu_rows("forget01")[:7])
    results = []
    for batch_size in (1, 3, 8):
        trainer = make(
            eval_dataset={"forget": rows}, per_device_eval_batch_size=batch_size, peft_config=LORA, max_length=512
        )
        results.append(trainer.evaluate())
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    nll, tokens = [], []
    for row in trainer.eval_dataset["forget"]:
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            log_probs = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        kept = labels != -100
        nll.append(-log_probs[kept, labels[kept]].sum().item())
        tokens.append(kept.sum().item())
    probability = sum(math.exp(-n / t) for n, t in zip(nll, tokens, strict=True)) / len(nll)
    for metrics in results:
        assert metrics["eval_forget_loss"] == pytest.approx(sum(nll) / sum(tokens), rel=1e-5)
        assert metrics["eval_forget_probability"] == pytest.approx(probability, rel=1e-5)
        assert metrics["eval_forget_rows"] == 7


def test_evaluate_takes_raw_rows(make, tofu_rows):
    trainer = make(eval_dataset={"forget": Dataset.from_list(tofu_rows("forget01")[:4])}, peft_config=LORA)
    prepared = trainer.evaluate()
    raw = trainer.evaluate({"forget": Dataset.from_list(tofu_rows("forget01")[:4])})
    assert raw["eval_forget_probability"] == prepared["eval_forget_probability"]
    single = trainer.evaluate(Dataset.from_list(tofu_rows("forget01")[:4]))
    assert single["eval_probability"] == prepared["eval_forget_probability"]


def test_compute_metrics_gets_logits_and_labels(make, tofu_rows):
    seen = {}

    def compute_metrics(prediction):
        seen["shapes"] = (prediction.predictions.shape, prediction.label_ids.shape)
        return {"accuracy": 0.5}

    rows = Dataset.from_list(tofu_rows("forget01")[:3])
    metrics = make(eval_dataset=rows, compute_metrics=compute_metrics, peft_config=LORA).evaluate()
    assert metrics["eval_accuracy"] == 0.5
    (rows, length, vocabulary), labels = seen["shapes"]
    assert (rows, vocabulary) == (3, 512) and labels == (3, length)


def test_best_checkpoint_by_forget_probability(make, tofu_rows):
    trainer = make(
        peft_config=LORA,
        eval_dataset={"forget": Dataset.from_list(tofu_rows("forget01")[:4])},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_forget_probability",
        greater_is_better=False,
        max_steps=3,
        learning_rate=1e-2,
    )
    trainer.train()
    assert trainer.state.best_global_step == 3


# ---- Checkpoints, saving, reporting ----


def test_saved_models_load_with_plain_transformers_and_peft(make, tiny_model_path, tmp_path):
    ids = torch.arange(3, 20).unsqueeze(0)
    trainer = make(**RMU, output_dir=str(tmp_path / "rmu"))
    trainer.train()
    trainer.save_model()
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "rmu")(ids).logits, expected)

    trainer = make(peft_config=LORA, learning_rate=1e-2, output_dir=str(tmp_path / "lora"))
    trainer.train()
    trainer.save_model()
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path / "lora").eval()(ids).logits, expected)


def test_saved_config_is_the_originals(make, tiny_model_path, tmp_path):
    """The Trainer turns `use_cache` off for training; a released model that says so generates slowly for everybody."""
    trainer = make(trainable_layers="1")
    trainer.train()
    trainer.save_model()
    saved, original = (
        json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", Path(tiny_model_path))
    )
    assert saved == original
    assert trainer.model.config.use_cache is False  # while training


@pytest.mark.parametrize("options", [RMU, {"peft_config": LORA}, {}], ids=["selected", "lora", "full"])
def test_report_and_card(make, tofu_rows, tiny_model_path, tmp_path, options):
    rows = tofu_rows("forget01")[:8]
    trainer = make(**options, eval_dataset={"forget": Dataset.from_list(rows), "other": Dataset.from_list(rows[:2])})
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    report = UnlearningReport.load(tmp_path / "out" / "unlearning_report.json")
    assert report.base.parameters == 260_032 and report.base.model_id is None
    assert report.method.steps == 2 and report.method.seed == 42
    assert (report.data.forget.rows, report.data.retain.rows) == (8, 8)
    assert set(report.metrics.before) == set(report.metrics.after) == {"forget"}
    assert report.metrics.before["forget"]["rows"] == 8
    names = {entry.path for entry in report.files}
    assert "tokenizer.json" in names and names & {"model.safetensors", "adapter_model.safetensors"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n") and "unlearning-method:" in card
    written = card + (tmp_path / "out" / "unlearning_report.json").read_text()
    assert str(tmp_path) not in written and "tinystories" not in written
    for row in rows:
        assert row["answer"] not in written and row["question"] not in written

    if options is RMU:  # the footprint is what really changed
        start = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).state_dict()
        deltas = {n: (t - start[n]) for n, t in trainer.model.state_dict().items() if not torch.equal(t, start[n])}
        assert {module.name for module in report.footprint.modules} == set(deltas)
        squares = sum(delta.square().sum().item() for delta in deltas.values())
        norms = sum(start[name].square().sum().item() for name in deltas)
        assert report.footprint.relative_norm == pytest.approx((squares / norms) ** 0.5, rel=1e-5)
        assert report.footprint.changed_parameters == sum((d != 0).sum().item() for d in deltas.values())


def test_footprint_of_a_lora_is_what_merging_changes(make, tiny_model_path):
    trainer = make(peft_config=LORA, learning_rate=1e-2)
    trainer.train()
    footprint = trainer.record.footprint(trainer)
    before = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).state_dict()
    after = trainer.model.merge_and_unload().state_dict()
    changed = {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}
    assert {module.name for module in footprint.modules} == set(changed)
    for module in footprint.modules:
        expected = (changed[module.name].norm() / before[module.name].norm()).item()
        assert module.relative_norm == pytest.approx(expected, rel=1e-4), module.name
    assert footprint.total_parameters == 260_032


def test_a_card_bug_costs_no_model(make, tmp_path, monkeypatch, caplog):
    trainer = make(peft_config=LORA)
    trainer.train()
    monkeypatch.setattr("hf_unlearn.base_trainer.save_report", lambda *_: 1 / 0)
    trainer.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "its report and card could not be written" in caplog.text


def test_no_token_is_ever_written(make, tmp_path, monkeypatch):
    """The Trainer pickles its arguments, `hub_token` included, beside the weights, and pushes them."""
    secret = "hf_" + "Canary" * 6
    pickled = []
    save = torch.save

    def spy(value, path, *args, **kwargs):
        save(value, path, *args, **kwargs)
        with open(path, "rb") as file:
            pickled.append(file.read())

    monkeypatch.setattr(torch, "save", spy)
    trainer = make(
        peft_config=LORA,
        hub_token=secret,
        model_init_kwargs={"token": secret},
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    trainer.save_model()
    assert trainer.args.hub_token == secret  # still the user's
    assert pickled and not any(secret.encode() in content for content in pickled)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not any(secret.encode() in path.read_bytes() for path in files)
    assert not any(path.name == "training_args.bin" for path in files)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hub_model_id": None}, "push_to_hub needs hub_model_id"),
        ({"hub_model_id": "name"}, "The repository has to be named as OWNER/NAME"),
        ({"hub_strategy": "checkpoint"}, "hub_strategy='checkpoint' would send what is half unlearned"),
        ({"hub_strategy": "all_checkpoints"}, "hub_strategy='all_checkpoints' would send what is half unlearned"),
        ({"hub_revision": "branch"}, "hub_revision and hub_always_push are not supported"),
        ({"hub_always_push": True}, "hub_revision and hub_always_push are not supported"),
        ({"hub_token": None}, "There is no token for the Hub"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_the_model_is_loaded(make, monkeypatch, options, message):
    monkeypatch.setattr("hf_unlearn.cards.remote.get_token", lambda: None)
    settings = {"hub_model_id": "org/name", "hub_token": "hf_alice", **options}
    with pytest.raises(ValueError, match=message):
        make(model="/no/such/model", push_to_hub=True, **settings)
    with pytest.raises(ValueError, match=message):
        make(peft_config=LORA, **settings).push_to_hub()


def test_a_model_of_unknown_origin_is_not_trained_for_a_push(make, random_model, tokenizer):
    with pytest.raises(ValueError, match="The folder of the base model is not known"):
        make(
            model=random_model(),
            processing_class=tokenizer,
            push_to_hub=True,
            hub_model_id="org/name",
            hub_token="hf_a",
        )


def test_a_push_in_the_background_or_to_a_branch_is_refused(make):
    trainer = make(hub_model_id="org/name", hub_token="hf_alice")
    for options in ({"blocking": False}, {"revision": "branch"}):
        with pytest.raises(ValueError, match="A release is pushed to main, and waited for"):
            trainer.push_to_hub(**options)


def test_resuming_restores_the_control_vectors_and_the_first_evaluation(make, tofu_rows):
    rows = {"forget": Dataset.from_list(tofu_rows("forget01")[:4])}
    options = {**RMU, "save_strategy": "steps", "save_steps": 1, "eval_dataset": rows}
    first = make(**options, seed=1)
    before = first.evaluate()["eval_forget_probability"]
    first.train()
    second = make(**options, seed=2, max_steps=3)
    assert not torch.equal(second.objective.control_vectors["rmu"], first.objective.control_vectors["rmu"])
    second.train(resume_from_checkpoint=True)
    assert torch.equal(second.objective.control_vectors["rmu"], first.objective.control_vectors["rmu"])
    assert second.record.evaluations["before"]["forget"]["probability"] == before


def test_resuming_from_another_model_is_refused(make, tmp_path):
    options = {**RMU, "save_strategy": "steps", "save_steps": 2}
    make(**options).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert (checkpoint / STATE_NAME).is_file()
    # A common slip: the checkpoint as the model, so that the reference would be the half-unlearned weights
    with pytest.raises(ValueError, match="The model given is not the one that .* started from"):
        make(**options, model=str(checkpoint)).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / STATE_NAME).unlink()
    with pytest.raises(ValueError, match="is not a checkpoint of an UnlearnTrainer"):
        make(**options).train(resume_from_checkpoint=str(checkpoint))


class BreakAt(TrainerCallback):
    """Sets a trained weight to infinity after an optimizer step, as an overflow would."""

    def __init__(self, step: int):
        self.step = step

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("inf"))


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(make, tmp_path, logging_steps):
    """The update that breaks the weights comes *after* a finite loss: that step must not be saved."""
    trainer = make(
        peft_config=LORA,
        callbacks=[BreakAt(3)],
        max_steps=6,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        logging_steps=logging_steps,
    )
    with pytest.raises(NonFiniteLossError, match="last good checkpoint is .*checkpoint-2.*Lower the learning rate"):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    weights = load_file(tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    resumed = make(peft_config=LORA, max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.state.global_step == 3


def test_a_last_update_that_breaks_the_model_is_noticed(make):
    trainer = make(peft_config=LORA, callbacks=[BreakAt(2)])
    with pytest.raises(NonFiniteLossError, match="no checkpoint had been saved yet"):
        trainer.train()


def test_sampler_settings_are_recorded_and_json_safe(make):
    trainer = make(peft_config=LORA)
    assert json.loads(trainer.args.to_json_string())["forget_loss"] == ["npo"]
