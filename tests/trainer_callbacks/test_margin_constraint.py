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
"""MarginConstraintCallback: what another objective breaks is put right, by as little as it takes, before a save."""

import json
import logging
import math
import subprocess
import sys

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from distributed import margin_constraint_worker
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_unlearn.constraints.points import RESERVE, ConstraintPoints, Demand
from hf_unlearn.constraints.solve import ConstraintsNotMetError
from hf_unlearn.metrics.inference import NonFiniteLogitsError
from hf_unlearn.trainer_callbacks import MarginConstraintCallback, ScopeGuardCallback


MODULE = "model.layers.3.mlp.down_proj"
PROMPTS = ["Once upon a time, there was a little girl named", "One day, a girl called", "The name of the girl was"]
WORD = "Lily"
LIMIT = 0.01


@pytest.fixture
def model(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)


@pytest.fixture
def ids(tokenizer):
    """Contexts, and the token that the model is taught to say after all of them: the first one of the word."""
    contexts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    return contexts, tokenizer(f"{PROMPTS[0]} {WORD}")["input_ids"][len(contexts[0])]


@pytest.fixture
def rows(ids):
    """Texts of one length that end in a context and the token."""
    contexts, token = ids
    length = max(len(context) for context in contexts) + 1
    return [[1] * (length - len(context) - 1) + [*context, token] for context in contexts] * 4


@pytest.fixture
def plain(model, rows, tmp_path):
    """Factory of a plain Trainer that teaches the forbidden token."""

    def make(*callbacks, model=model, **options):
        settings = {
            "use_cpu": True,
            "max_steps": 6,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 4,
            "save_strategy": "no",
            "disable_tqdm": True,
            "report_to": "none",
            **options,
        }
        return Trainer(
            model,
            args=TrainingArguments(str(tmp_path), **settings),
            train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
            callbacks=list(callbacks),
        )

    return make


def next_probabilities(model, contexts, token) -> list[float]:
    """Of one token after each context, one by one in float64."""
    with torch.no_grad():
        return [
            model.eval()(torch.tensor([context])).logits[0, -1].double().softmax(-1)[token].item()
            for context in contexts
        ]


def word_probability(model, tokenizer, prompt) -> float:
    start, whole = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {WORD}")["input_ids"]
    with torch.no_grad():
        log_probs = model.eval()(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return math.exp(sum(log_probs[place - 1, whole[place]].item() for place in range(len(start), len(whole))))


def checks(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "margin_violated" in entry]


# ---- What it is for ----


def test_sft_teaches_the_word_again_and_with_the_callback_it_does_not(tiny_model_path, tokenizer, tmp_path):
    rows = Dataset.from_list([{"text": f"{prompt} {WORD}. She liked to play in the park."} for prompt in PROMPTS] * 4)

    def run(name, *callbacks):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
        trainer = SFTTrainer(
            model,
            args=SFTConfig(
                str(tmp_path / name),
                use_cpu=True,
                bf16=False,
                max_steps=20,
                learning_rate=1e-3,
                per_device_train_batch_size=4,
                logging_steps=5,
                save_strategy="steps",
                save_steps=8,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return trainer, model, losses

    _, model, free_losses = run("free")
    assert min(word_probability(model, tokenizer, prompt) for prompt in PROMPTS) > 0.9
    margin = MarginConstraintCallback(
        [MODULE], Demand(probability=LIMIT), contexts=PROMPTS, forbidden=[WORD], every_steps=5
    )
    trainer, model, losses = run("held", margin)
    assert max(word_probability(model, tokenizer, prompt) for prompt in PROMPTS) < LIMIT
    assert losses[-1] < 0.6 * losses[0]  # the rest of the texts is learnt
    assert losses[-1] > free_losses[-1]
    entries = checks(trainer)
    # When it begins, every 5 steps, before the checkpoints at 8 and 16, and at the end
    assert [entry["step"] for entry in entries] == [0, 5, 8, 10, 15, 16, 20, 20]
    assert all(entry["margin_violated"] == 0 and entry["margin_excess"] <= 0 for entry in entries)
    # Training broke them again each time: every correction was needed
    assert all(entry["margin_violated_before"] > 0 and entry["margin_excess_before"] > 1 for entry in entries[:-1])
    assert all(entry["margin_correction_norm"] > 0.01 for entry in entries[:-1])
    assert entries[-1]["margin_correction_norm"] == 0
    for step in (8, 16):
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "held" / f"checkpoint-{step}", dtype=torch.float32)
        assert max(word_probability(saved, tokenizer, prompt) for prompt in PROMPTS) < LIMIT
    # Nothing of the contexts or the word is on record, and it is plain JSON
    history = (tmp_path / "held" / "checkpoint-16" / "trainer_state.json").read_text()
    assert WORD not in history and "girl" not in history and json.loads(history)["log_history"][0] == entries[0]


# ---- The correction ----


def test_one_constraint_on_the_head_by_hand(random_model, plain):
    """
    The largest allowed logit b and the forbidden one v change by ±c after a move of `±c h / |h|²` of their two rows:
    to close a gap of g the smallest has the norm `g / (sqrt(2) |h|)`.
    """
    model = random_model(tie_word_embeddings=False)
    contexts = [[1, 5, 9, 30]]
    with torch.no_grad():
        state = model.model(torch.tensor(contexts)).last_hidden_state[0, -1].double()
    logits = model.lm_head.weight.detach().double() @ state
    (first, second), (token, runner_up) = (part.tolist() for part in logits.topk(2))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    margin = MarginConstraintCallback(["lm_head"], Demand(epsilon=0.5), contexts=contexts, forbidden=[token])
    guard = ScopeGuardCallback(allowed=[r"lm_head\.weight"])
    trainer = plain(margin, guard, model=model, max_steps=1, learning_rate=0.0)
    trainer.train()
    entry = checks(trainer)[0]
    assert entry["margin_excess_before"] == pytest.approx(first - second + 0.5, abs=1e-4)
    # The solver adds a reserve of its own to that of the callback
    smallest, largest = ((first - second + 0.5 + reserve) / (2**0.5 * state.norm()) for reserve in (0, 2.1 * RESERVE))
    assert smallest * (1 - 1e-5) <= entry["margin_correction_norm"] <= largest
    change = model.lm_head.weight.detach() - before["lm_head.weight"]
    assert change.norm().item() == pytest.approx(entry["margin_correction_norm"], rel=1e-4)
    assert change.any(dim=1).nonzero()[:, 0].tolist() == sorted([token, runner_up])
    after = model.lm_head.weight.detach().double() @ state
    assert after[token] + 0.5 <= after[runner_up] == after.max()


def test_constraints_that_hold_cost_no_bit(plain, model, ids):
    contexts, token = ids
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plain().train()
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    random_state = torch.get_rng_state()
    never = int(torch.tensor(next_probabilities_of_all(model, contexts)).argmin())
    model.load_state_dict(start, strict=False)
    margins = [
        MarginConstraintCallback([MODULE], Demand(epsilon=0.0), contexts=contexts, forbidden=[never], every_steps=1)
        for _ in range(2)
    ]
    trainer = plain(*margins)
    trainer.train()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert len(checks(trainer)) == 2 * 8
    assert all(entry["margin_correction_norm"] == 0 == entry["margin_violated_before"] for entry in checks(trainer))


def next_probabilities_of_all(model, contexts) -> list[float]:
    """The highest probability of each token over the contexts."""
    with torch.no_grad():
        rows = [model.eval()(torch.tensor([context])).logits[0, -1].softmax(-1) for context in contexts]
    return torch.stack(rows).amax(0).tolist()


def test_the_answers_of_a_forget_set(known_model, tofu_rows, tokenizer, plain):
    """The first token of each answer, under a probability of 1 %, in a model that knew it."""
    rows = tofu_rows("forget10")[:6]
    model = AutoModelForCausalLM.from_pretrained(known_model, dtype=torch.float32)
    margin = MarginConstraintCallback(
        [MODULE], Demand(probability=LIMIT), forget=Dataset.from_list(rows), positions="first", every_steps=3
    )
    trainer = plain(margin, model=model)
    trainer.processing_class = trainer.callback_handler.processing_class = tokenizer
    before = []
    for place in (0, 1):
        values = []
        for row in rows:
            prompt = tokenizer(row["question"])["input_ids"]
            whole = tokenizer(f"{row['question']} {row['answer']}")["input_ids"]
            values += next_probabilities(model, [prompt], whole[len(prompt)])
        if place == 0:
            before = values
            trainer.train()
    assert max(values) < LIMIT and max(before) > 0.9
    assert checks(trainer)[0]["margin_constraints"] == 6


def test_stored_in_bfloat16(tiny_model_path, plain, ids):
    """The change is checked as it is stored, and goes further where rounding took a part of it."""
    contexts, token = ids
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.bfloat16)
    margin = MarginConstraintCallback(
        [MODULE], Demand(probability=LIMIT), contexts=contexts, forbidden=[token], every_steps=2
    )
    trainer = plain(margin, model=model)
    trainer.train()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert max(entry["margin_violated_before"] for entry in checks(trainer)) > 0
    assert all(entry["margin_excess"] <= 0 for entry in checks(trainer))
    constraint = next_probabilities(model, contexts, token)
    assert max(constraint) < LIMIT


# ---- When ----


def test_resuming_gives_the_same_run(plain, model, ids, tmp_path):
    contexts, token = ids
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def margin():
        return MarginConstraintCallback(
            [MODULE], Demand(probability=LIMIT), contexts=contexts, forbidden=[token], every_steps=2
        )

    options = {"save_strategy": "steps", "save_steps": 3}
    plain(margin(), **options).train()
    whole = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.load_state_dict(start, strict=False)
    trainer = plain(**options)
    trainer.add_callback(margin())  # late
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(parameter, whole[name]) for name, parameter in model.named_parameters())
    assert not any(value is trainer for value in vars(trainer.callback_handler.callbacks[-1]).values())


def test_what_is_saved_when_an_epoch_ends_holds(plain, ids, tmp_path):
    contexts, token = ids
    margin = MarginConstraintCallback(
        [MODULE], Demand(probability=LIMIT), contexts=contexts, forbidden=[token], every_steps=1000
    )
    trainer = plain(margin, save_strategy="epoch", max_steps=6)
    trainer.train()
    assert [entry["step"] for entry in checks(trainer)] == [0, 3, 6, 6]
    for step in (3, 6):
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}", dtype=torch.float32)
        assert max(next_probabilities(saved, contexts, token)) < LIMIT


@pytest.mark.slow
def test_two_processes_make_one_correction(tiny_model_path, ids, rows, tofu_rows, tmp_path):
    contexts, token = ids
    spec = {"model": tiny_model_path, "rows": rows, "module": MODULE, "contexts": contexts, "forbidden": [token]}
    spec["forget"] = tofu_rows("forget10")[:8]
    margin_constraint_worker.execute({**spec, "output": str(tmp_path / "one"), "world_size": 1})
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({**spec, "output": str(tmp_path / "ddp"), "world_size": 2}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*torchrun, margin_constraint_worker.__file__, str(path)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    one = load_file(tmp_path / "one" / "weights0.safetensors")
    first, second = (load_file(tmp_path / "ddp" / f"weights{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    histories = [json.loads((tmp_path / name).read_text()) for name in ("ddp/history0.json", "ddp/history1.json")]
    assert histories[0] == histories[1]
    entries = [entry for entry in histories[0] if "margin_violated" in entry]
    assert len(entries) == 4 and all(entry["margin_correction_norm"] > 0 for entry in entries[:-1])
    # The callbacks that measure see the same on both, and what they see in one process
    alone = json.loads((tmp_path / "one" / "history0.json").read_text())
    for key in ("eval_unlearning_forget_probability", "eval_relearning_after"):
        found, expected = ([entry[key] for entry in history if key in entry] for history in (histories[0], alone))
        assert found == pytest.approx(expected, rel=1e-2) and len(found) == (3 if "unlearning" in key else 1)
    start = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).get_parameter(
        f"{MODULE}.weight"
    )
    moved = (one[f"{MODULE}.weight"] - start).norm()
    assert (one[f"{MODULE}.weight"] - first[f"{MODULE}.weight"]).norm() < 1e-2 * moved
    for rank in (0, 1):
        assert "sharded weights (FSDP2) do not allow" in (tmp_path / "ddp" / f"refusal{rank}.txt").read_text()


# ---- What cannot be ----


def test_constraints_that_contradict_each_other(plain, ids, caplog):
    contexts, token = ids
    both = ConstraintPoints(contexts[:1] * 2, [[token], [7]], [[7], [token]], ["context 0", "context 0 again"])
    trainer = plain(MarginConstraintCallback([MODULE], Demand(epsilon=1.0), points=both, every_steps=3))
    with caplog.at_level(logging.WARNING), pytest.raises(ConstraintsNotMetError, match="of 2 margin .* contradict"):
        trainer.train()
    assert trainer.state.global_step == 6  # only the end of training is an error
    assert [entry["step"] for entry in checks(trainer)] == [0, 3, 6, 6] and checks(trainer)[-1]["margin_violated"] > 0
    warnings = [record.message for record in caplog.records if "Training goes on until the next" in record.message]
    assert len(warnings) == 3 and "Step 3: " in warnings[1]


class Diverge(TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs):
        with torch.no_grad():
            model.get_parameter(f"{MODULE}.weight").fill_(math.nan)


def test_a_model_that_has_diverged_ends_the_run(plain, ids):
    contexts, token = ids
    margin = MarginConstraintCallback(
        [MODULE], Demand(epsilon=0.0), contexts=contexts, forbidden=[token], every_steps=1
    )
    with pytest.raises(NonFiniteLogitsError, match="has diverged. Use a lower learning rate"):
        plain(Diverge(), margin).train()


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["lm_head"], "tied to the input embeddings"),
        (["model.layers.3.mlp.dwn_proj"], "no layer"),
        (["model.norm"], "not an nn.Linear"),
    ],
)
def test_layers_that_cannot_be_corrected(plain, ids, modules, message):
    contexts, token = ids
    margin = MarginConstraintCallback(modules, Demand(epsilon=0.0), contexts=contexts, forbidden=[token])
    with pytest.raises(ValueError, match=message):
        plain(margin).train()


def test_adapters_sharded_optimizers_and_words_without_a_tokenizer(plain, model, ids, monkeypatch):
    contexts, token = ids
    margin = MarginConstraintCallback([MODULE], Demand(epsilon=0.0), contexts=contexts, forbidden=[token])
    with pytest.raises(ValueError, match="reads texts with the trainer's tokenizer"):
        plain(MarginConstraintCallback([MODULE], Demand(epsilon=0.0), contexts=contexts, forbidden=[WORD])).train()
    trainer = plain(margin)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="DEEPSPEED shards weights or optimizer: train with DDP"):
        margin.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    monkeypatch.undo()
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match="merge them first"):
        plain(margin, model=adapted).train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "in one way"),
        ({"contexts": [[1]]}, "belong together"),
        ({"contexts": [[1]], "forbidden": []}, "at least one entry"),
        ({"contexts": [""], "forbidden": [WORD]}, "none may be empty"),
        ({"points": ConstraintPoints(), "forget": Dataset.from_list([])}, "in one way"),
        ({"points": ConstraintPoints(), "every_steps": 0}, "every_steps"),
        ({"points": ConstraintPoints(), "positions": "key"}, "answer_points"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        MarginConstraintCallback([MODULE], Demand(epsilon=0.0), **arguments)
    with pytest.raises(ValueError, match="a list of layers"):
        MarginConstraintCallback(MODULE, Demand(epsilon=0.0), points=ConstraintPoints())
