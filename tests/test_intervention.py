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
"""InterventionTrainer on a trained checkpoint: what a Trainer owes its user, and what an edit does, in every store."""

import inspect
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_unlearn import InterventionConfig, InterventionTrainer, UnlearnConfig, UnlearningReport
from hf_unlearn.constraints.editable import untie_head
from hf_unlearn.constraints.linearize import constraint_values
from hf_unlearn.constraints.points import ConstraintPoints, Demand, expand_points
from hf_unlearn.constraints.solve import ConstraintsNotMetError
from hf_unlearn.trainer_callbacks import ScopeGuardCallback


EDITED = "model.layers.2.mlp.down_proj.weight"  # the middle one of five layers, which is the default
MARGIN = 1.0


FORGET = (
    "Once upon a time, there was a little girl named",
    "Tom and his sister went to the",
    "The dog saw a big",
    "Mom said that they could eat the",
    "One day, a bird wanted to",
    "They were very happy and",
)
RETAIN = (
    "Ben had a red ball that he",
    "In the garden there was a",
    "The cat was sad because",
    "Sara liked to draw with her",
    "It was a sunny day and",
    "The boy looked under the",
    "At night the moon was",
    "She put on her coat and",
)


@pytest.fixture(scope="module")
def rows(tiny_model_path):
    """What the model says: every answer to forget is its own, so that there is something to change at each of them."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    sets = []
    for prompts in (FORGET, RETAIN):
        answers = continuations(model, tokenizer, prompts, 8)
        sets.append([{"question": p, "answer": a} for p, a in zip(prompts, answers, strict=True)])
    return sets


def continuations(model, tokenizer, prompts, max_new_tokens: int = 4) -> list[str]:
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        output = model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
        texts.append(tokenizer.decode(output[0, ids.shape[1] :]).strip())
    return texts


@pytest.fixture
def make(tmp_path, tiny_model_path, rows):
    """Factory of small trainers on the 260k model; keyword arguments that InterventionConfig has go there."""

    def build(**options) -> InterventionTrainer:
        names = inspect.signature(InterventionTrainer.__init__).parameters
        arguments = {name: options.pop(name) for name in list(options) if name in names}
        settings = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
            "positions": "first",
            **options,
        }
        return InterventionTrainer(
            **{
                "model": tiny_model_path,
                "args": InterventionConfig(**settings),
                "train_dataset": Dataset.from_list(rows[0]),
                "retain_dataset": Dataset.from_list(rows[1]),
                **arguments,
            }
        )

    return build


@pytest.fixture
def load(tiny_model_path):
    def from_pretrained(path: str = tiny_model_path, dtype: str = "float32"):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)

    return from_pretrained


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, also those that are not saved, by every name that they have."""
    parameters = {name: tensor.detach().clone() for name, tensor in model.named_parameters(remove_duplicate=False)}
    return parameters | {name: tensor.clone() for name, tensor in model.named_buffers(remove_duplicate=False)}


def assert_same(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = snapshot(model)
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name


@torch.no_grad()
def margins(model: nn.Module, points: ConstraintPoints) -> list[float]:
    """How far each forbidden token lies below the best other one, one context at a time and without the solver."""
    model.eval()
    found = []
    for context, lower in zip(points.contexts, points.lower, strict=True):
        logits = model(input_ids=torch.tensor([context])).logits[0, -1].float()
        others = logits.clone()
        others[lower] = -torch.inf
        found.append((others.max() - logits[lower].max()).item())
    return found


# ---- The Trainer's side ----


class Recorder(TrainerCallback):
    """Which events came in which order, and the edited weight that the callback saw at each."""

    def __init__(self):
        self.events, self.weights, self.logs = [], [], []

    def _note(self, event, model):
        self.events.append(event)
        self.weights.append(model.get_parameter(EDITED).detach().clone())

    def on_train_begin(self, args, state, control, model, **kwargs):
        self._note("train_begin", model)

    def on_step_begin(self, args, state, control, model, **kwargs):
        self._note("step_begin", model)

    def on_step_end(self, args, state, control, model, **kwargs):
        self._note("step_end", model)

    def on_log(self, args, state, control, model, logs, **kwargs):
        self._note("log", model)
        self.logs.append(logs)

    def on_train_end(self, args, state, control, model, **kwargs):
        self._note("train_end", model)


def test_callbacks_fire_in_order_and_see_the_model(make):
    recorder = Recorder()
    trainer = make(callbacks=[recorder])
    before = trainer.model.get_parameter(EDITED).detach().clone()
    output = trainer.train()
    rounds = len(trainer.edit.report.history)
    assert rounds >= 2
    assert recorder.events == ["train_begin", *["step_begin", "step_end", "log"] * rounds, "log", "train_end"]
    assert torch.equal(recorder.weights[0], before)
    assert torch.equal(recorder.weights[-1], trainer.model.get_parameter(EDITED))
    change = recorder.weights[-1].double() - before.double()
    torch.testing.assert_close(change, trainer.edit.dense(EDITED.removesuffix(".weight")), rtol=0, atol=1e-6)
    assert [entry["round"] for entry in recorder.logs[:-1]] == [
        entry["round"] for entry in trainer.edit.report.history
    ]
    assert recorder.logs[0]["violated"] > 0 and recorder.logs[-2]["violated"] == 0
    assert recorder.logs[0]["violated"] >= 5
    assert output.global_step == trainer.state.global_step == recorder.logs[-2]["round"]
    assert output.metrics["edit_norm"] == pytest.approx(change.norm().item(), rel=1e-5)
    assert output.metrics["constraints"] == len(trainer.points) == 6
    assert trainer.state.log_history[-1]["edit_norm"] == output.metrics["edit_norm"]


@pytest.mark.parametrize(
    ("store", "dtype", "modules"),
    [
        ("fp32", "float32", None),
        ("fp32", "float32", ["lm_head"]),
        ("stochastic", "bfloat16", None),
        ("adapter", "bfloat16", None),
        ("adapter", "bfloat16", ["lm_head"]),
    ],
)
def test_nothing_outside_the_scope_moves_a_bit(make, load, store, dtype, modules):
    """Of a model in bfloat16 too, which is solved for in float32; nor embeddings that the edited head was tied to."""
    model = load(dtype=dtype)
    before = snapshot(model)
    trainer = make(
        model=model,
        processing_class=None,
        callbacks=[ScopeGuardCallback()],
        store=store,
        trainable_modules=modules,
        reserve=2.0 if dtype == "bfloat16" else 0.0,
    )
    trainer.train()
    after = {name.replace(".base_layer", ""): tensor for name, tensor in snapshot(model).items() if "lora" not in name}
    assert set(after) == set(before)
    edited = EDITED if modules is None else "lm_head.weight"
    moved = [name for name in before if not torch.equal(after[name], before[name])]
    assert moved == ([] if store == "adapter" else [edited])
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    if modules is not None:
        assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
        assert trainer.edit.untie


def test_evaluations_before_and_after_land_in_the_report(make, rows, tmp_path):
    sets = {name: Dataset.from_list(part) for name, part in zip(("forget", "retain"), rows, strict=True)}
    trainer = make(eval_dataset=sets, probability=1e-3)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    metrics = UnlearningReport.load(tmp_path / "out" / "unlearning_report.json").metrics
    for name in ("forget", "retain"):
        assert metrics.before[name]["probability"] == before[f"eval_{name}_probability"]
        assert metrics.after[name]["probability"] == after[f"eval_{name}_probability"]
    assert after["eval_forget_loss"] > before["eval_forget_loss"] + 0.01
    assert abs(after["eval_retain_loss"] - before["eval_retain_loss"]) < 0.1


def test_saved_model_is_the_trained_one_and_says_nothing_of_the_data(make, rows, load, tokenizer, tmp_path):
    trainer = make(templates=["{prompt}", "Tell me: {prompt}"], num_fillers=1)
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "out"
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "unlearning_report.json", "README.md", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pickle"))]
    assert "weight_edit.safetensors" not in names  # it holds hidden states of the prompts
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(load(str(folder))(ids).logits, trainer.model(ids).logits)

    report = UnlearningReport.load(folder / "unlearning_report.json")  # which validates it
    assert report.method.name == "pointwise" and report.method.steps == trainer.state.global_step
    assert report.method.scope.modules == [EDITED.removesuffix(".weight")]
    assert report.method.scope.trainable_parameters == 64 * 172
    assert report.method.scope.rank == max(trainer.edit.ranks().values())
    assert [module.name for module in report.footprint.modules] == [EDITED]
    assert report.footprint.relative_norm == pytest.approx(
        trainer.edit.norm() / load().get_parameter(EDITED).norm().item(), rel=1e-5
    )
    # Six rows in two templates, and after one filler
    assert (report.data.forget.rows, report.data.retain.rows, len(trainer.points)) == (6, 8, 18)
    certificates = {certificate.name: certificate for certificate in report.certificates}
    assert set(certificates) == {"solution", "storage", "layer_input_radius", "head_radius", "highest_probability"}
    assert certificates["solution"].values["violated"] == 0
    assert trainer.edit.certificates == report.certificates

    card = (folder / "README.md").read_text()
    text = (folder / "unlearning_report.json").read_text()
    for name, certificate in certificates.items():
        assert f"`{name}`" in card
        assert certificate.limits[:40] in card
    assert str(tmp_path) not in card + text and "tinystories" not in card + text
    for row in (*rows[0], *rows[1]):
        for column in ("question", "answer"):
            assert row[column] not in card and row[column] not in text
            assert row[column][:20] not in card and row[column][:20] not in text
    assert "templates" not in text and "Tell me" not in card + text
    # Forbidden tokens: neither as ids nor as pieces. Every number of a certificate is a count, a norm or a probability
    assert "token" not in json.dumps([certificate.values for certificate in report.certificates])
    assert not set(trainer.points.names) & set(text.split('"'))


# ---- How it is stored ----


def test_fp32_stores_the_exact_edit_of_a_bfloat16_model(make, load, tmp_path):
    """The configuration says so too: loaded without a dtype, it is not rounded again."""
    trainer = make(model=load(dtype="bfloat16"), store="fp32")
    trainer.train()
    trainer.save_model()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    edit = trainer.edit.dense(EDITED.removesuffix(".weight"))
    expected = (load(dtype="bfloat16").get_parameter(EDITED).double() + edit).float()
    assert torch.equal(model.get_parameter(EDITED), expected)
    assert min(margins(model, trainer.points)) >= MARGIN - 1e-4


def test_stochastic_stays_in_bfloat16_and_holds_there(make, load, tmp_path):
    trainer = make(model=load(dtype="bfloat16"), store="stochastic", reserve=2.0)
    trainer.train()
    trainer.save_model()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert min(margins(model, trainer.points)) >= MARGIN - 1e-4
    # Entries are one of the two neighbours in bfloat16 of the exact ones, and not all of them the nearest
    exact = load(dtype="bfloat16").get_parameter(EDITED).double() + trainer.edit.dense(EDITED.removesuffix(".weight"))
    stored, exact = model.get_parameter(EDITED).double(), exact.float()
    nearest = exact.bfloat16().double()
    step = torch.exp2(exact.double().abs().log2().floor() - 7)
    assert bool(((stored - exact.double()).abs() <= step).all())
    assert 0.05 < (stored != nearest).double().mean() < 0.5
    report = UnlearningReport.load(tmp_path / "out" / "unlearning_report.json")
    assert report.method.settings["store"] == "stochastic" and report.base.dtype == "bfloat16"


@pytest.mark.parametrize("modules", [None, ["lm_head"]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter_leaves_the_base_and_holds_on_it(make, load, tiny_model_path, tmp_path, dtype, modules):
    """Also of a head that the base ties to its embeddings: loaded on a fresh, tied base."""
    before = snapshot(load(dtype=dtype))
    trainer = make(
        model=load(dtype=dtype), store="adapter", trainable_modules=modules, reserve=0.0 if dtype == "float32" else 1.0
    )
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "out"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "unlearning_report.json", "README.md"} <= names
    assert "model.safetensors" not in names
    # Neither the path of the base nor more of its rows than the edit's
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    kinds = {key.rpartition(".lora_")[2] for key in load_file(folder / "adapter_model.safetensors")}
    assert kinds == {"A.weight", "B.weight"}
    assert "This release is reversible" in (folder / "README.md").read_text()
    base = load(dtype=dtype)
    model = PeftModel.from_pretrained(base, folder)
    assert min(margins(model, trainer.points)) >= MARGIN - 1e-4
    factors = {parameter.dtype for name, parameter in model.named_parameters() if "lora" in name}
    assert factors == {torch.float32}
    ids = torch.arange(3, 30)[None]
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(ids).logits, load(dtype=dtype)(ids).logits)
    report = UnlearningReport.load(folder / "unlearning_report.json")
    assert len(report.footprint.modules) == 1
    assert report.method.settings["store"] == "adapter"
    if modules is None:
        after = {name.replace(".base_layer", ""): tensor for name, tensor in snapshot(base).items()}
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_margin_that_rounding_eats_is_an_error_with_the_reserve_that_suffices(make, load):
    model = load(dtype="bfloat16")
    before = snapshot(model)
    options = {"store": "stochastic", "positions": "all", "epsilon": 0.05}
    trainer = make(model=model, **options)
    with pytest.raises(ConstraintsNotMetError, match="store='stochastic'.*use store='fp32'.*or reserve=") as caught:
        trainer.train()
    assert_same(model, before)
    assert trainer.edit is None and trainer.record.certificates == []
    with pytest.raises(ConstraintsNotMetError):  # and it may be asked again
        trainer.train()
    assert_same(model, before)
    reserve = float(str(caught.value).partition("reserve=")[2].split()[0])
    again = make(model=model, **options, reserve=reserve)
    again.train()
    assert min(margins(model, again.points)) >= 0.05 - 1e-4


def test_a_failed_adapter_or_head_leaves_the_model_as_it_was(make, load):
    """What rounding of a bfloat16 base eats is found on the adapter; and a head that was untied is tied again."""
    for options in ({"epsilon": 1e-4}, {"epsilon": 1e-4, "trainable_modules": ["lm_head"]}):
        model = load(dtype="bfloat16")
        before = snapshot(model)
        trainer = make(model=model, store="adapter", positions="all", **options)
        with pytest.raises(ConstraintsNotMetError, match="a base model loaded in float32, or reserve="):
            trainer.train()
        assert_same(model, before)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert model.config.tie_word_embeddings
        assert not [name for name, _ in model.named_modules() if "lora" in name]


def test_rounds_that_do_not_suffice_leave_the_model_as_it_was(make, load):
    model = load(dtype="bfloat16")
    before = snapshot(model)
    with pytest.raises(ConstraintsNotMetError, match="raise `rounds`"):
        make(model=model, store="adapter", positions="all", rounds=1, epsilon=5.0).train()
    assert_same(model, before)


def test_head_rows_of_a_tied_model(make, load, tmp_path):
    trainer = make(trainable_modules=["lm_head"])
    trainer.train()
    trainer.save_model()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    model = load(str(tmp_path / "out"))
    assert min(margins(model, trainer.points)) >= MARGIN - 1e-4
    assert torch.equal(model.get_input_embeddings().weight, load().get_input_embeddings().weight)
    # The storage certificate is of the head alone: with rounded embeddings below it, other counts would come out
    head = untied(load())
    edited = head.lm_head.weight.detach() + trainer.edit.dense("lm_head").float()
    head.lm_head.weight.data = edited.bfloat16().float()
    constraints = expand_points(trainer.points, Demand(MARGIN))
    violated = int((constraint_values(head, constraints, {}) + MARGIN > 1e-4).sum())
    storage = next(c for c in trainer.edit.certificates if c.name == "storage")
    assert storage.values["bfloat16_violated"] == violated


def untied(model):
    untie_head(model)
    return model


def test_several_layers_share_an_edit(make, load):
    trainer = make(trainable_layers="1-2", trainable_modules=["mlp.down_proj", "mlp.up_proj"])
    trainer.train()
    assert sorted(trainer.edit.factors) == [
        f"model.layers.{layer}.mlp.{name}" for layer in (1, 2) for name in ("down_proj", "up_proj")
    ]
    assert all(rank > 0 for rank in trainer.edit.ranks().values())
    assert min(margins(trainer.model, trainer.points)) >= MARGIN - 1e-4
    single = make()
    single.train()
    # The retain metric aside, more layers allow a shorter edit
    assert trainer.edit.norm() < single.edit.norm()


def test_an_edit_of_nothing(make, load, tmp_path):
    """What the model never says needs no edit: nothing moves, and the report says so."""
    model = load()
    before = snapshot(model)
    probe = make(positions="first")
    probe.train()
    texts = [{"question": row["question"], "answer": "zzzz"} for row in probe.train_dataset]
    trainer = make(model=model, train_dataset=Dataset.from_list(texts), epsilon=0.0)
    trainer.train()
    trainer.save_model()
    assert trainer.edit.norm() == 0.0 and trainer.edit.report.rounds == 0
    assert_same(model, before)
    report = UnlearningReport.load(tmp_path / "out" / "unlearning_report.json")
    assert report.footprint.modules == [] and report.method.scope.rank == 0
    adapter = make(model=load(), train_dataset=Dataset.from_list(texts), epsilon=0.0, store="adapter")
    with pytest.raises(ValueError, match="The edit is zero"):
        adapter.train()


# ---- Refusals ----


def test_a_second_train_is_refused(make):
    trainer = make()
    trainer.train()
    after = snapshot(trainer.model)
    with pytest.raises(ValueError, match="make a new trainer"):
        trainer.train()
    assert_same(trainer.model, after)
    # A new trainer on the edited model has nothing left to do
    again = make(model=trainer.model, processing_class=trainer.processing_class)
    again.train()
    assert again.edit.norm() == 0.0


class Linear8bit(nn.Linear):
    """As quantisers make them: a subclass, whose weight is no number to add to."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=torch.int8), requires_grad=False)


def test_models_that_cannot_be_edited_are_refused_by_name(make, random_model, load, tokenizer):
    with pytest.raises(ValueError, match="merge it first"):
        make(model=get_peft_model(load(), LoraConfig(target_modules="all-linear", r=2)), processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_proj is a Conv1D, which stores its weight"):
        make(model=random_model("gpt2"), processing_class=tokenizer, trainable_modules=["mlp.c_proj"])
    quantised = load()
    quantised.model.layers[2].mlp.down_proj = Linear8bit(172, 64)
    quantised.is_quantized = True  # as quantisers mark a model, which then refuses to be cast
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.down_proj is a Linear8bit, whose weight is packed"):
        make(model=quantised, processing_class=tokenizer)
    with pytest.raises(ValueError, match="float16 is not supported"):
        make(model=load(dtype="float16"), processing_class=tokenizer)
    with pytest.raises(ValueError, match="'mlp.dawn_proj' matches no module"):
        make(trainable_modules=["mlp.dawn_proj"])
    with pytest.raises(ValueError, match="selects no linear layer"):
        make(trainable_modules=["input_layernorm"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": "stochastic"}, "store='stochastic' is for a model in bfloat16"),
        ({"retain_dataset": None, "retain_metric": "second_moment"}, "reads a retain_dataset: give one"),
        ({"retain_dataset": None, "retain_metric": "null_space"}, "reads a retain_dataset: give one"),
        ({"args": UnlearnConfig("out", use_cpu=True)}, "args is a UnlearnConfig: use InterventionConfig"),
        ({"push_to_hub": True}, "push_to_hub needs hub_model_id"),
        ({"train_dataset": Dataset.from_list([])}, "train_dataset.* is empty"),
        ({"train_dataset": Dataset.from_list([{"text": "a"}]).to_iterable_dataset()}, "is streamed"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_solved(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "key"}, "column `perturbed_answer`"),
        ({"train_dataset": None}, "train_dataset is required"),
        ({"train_dataset": None, "forbidden_words": ["Lily"]}, "forbidden_words need contexts"),
        ({"aim": "refuse", "retain_dataset": None}, "needs a retain_dataset of harmless prompts"),
        ({"num_fillers": 1, "retain_dataset": None}, "num_fillers needs a retain set"),
    ],
)
def test_missing_data_is_named(make, load, options, message):
    model = load()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        make(model=model, **options).train()
    assert_same(model, before)


def test_without_a_retain_set_the_plain_norm_counts(make):
    trainer = make(retain_dataset=None)
    trainer.train()
    assert trainer.args.retain_metric == "none"
    with_metric = make()
    with_metric.train()
    assert trainer.edit.norm() < with_metric.edit.norm()  # the shortest of all


# ---- Data ----


def test_a_chat(make, chat_tokenizer, rows):
    """Prompts in the chat template, at the place where the reply begins."""
    tokenizer = chat_tokenizer()
    chats = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows[0]
    ]
    trainer = make(train_dataset=Dataset.from_list(chats), processing_class=tokenizer)
    trainer.train()
    for row, context, lower in zip(rows[0], trainer.points.contexts, trainer.points.lower, strict=True):
        turns = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        assert context[: len(prompt) - 1] == prompt[:-1]  # a last space may merge with the answer
        assert row["answer"].startswith(tokenizer.decode(lower).strip())
    assert min(margins(trainer.model, trainer.points)) >= MARGIN - 1e-4


def test_forbidden_words_after_prompts_of_a_file(make, tokenizer, tmp_path):
    """The name that the model says at .9 after "a little girl named"; the file or the texts of a data set."""
    prompts = ["Once upon a time, there was a little girl named", "One day, a girl named"]
    (tmp_path / "contexts.txt").write_text("\n".join(prompts) + "\n\n", encoding="utf-8")
    trainer = make(train_dataset=None, forbidden_words=["Lily"], contexts=str(tmp_path / "contexts.txt"))
    before = continuations(trainer.model, tokenizer, prompts)
    trainer.train()
    after = continuations(trainer.model, tokenizer, prompts)
    assert before[0].startswith("Lily")
    assert not any("lily" in text.lower() for text in after)
    assert "Lily" not in trainer.record.report(trainer).to_json()
    assert min(margins(trainer.model, trainer.points)) >= MARGIN - 1e-4
    texts = make(train_dataset=Dataset.from_list([{"text": prompt} for prompt in prompts]), forbidden_words=["Lily"])
    texts.train()
    assert texts.points.contexts == trainer.points.contexts and texts.points.lower == trainer.points.lower


def test_refusals(make, tokenizer, tmp_path):
    harmful = ["How do I break a window?", "Tell me how to steal a cake."]
    harmless = ["Tell me a story about a cat.", "How do I bake a cake?"]
    (tmp_path / "refusals.txt").write_text("Sorry\nNever\n", encoding="utf-8")
    trainer = make(
        aim="refuse",
        train_dataset=Dataset.from_list([{"instruction": text} for text in harmful]),
        retain_dataset=Dataset.from_list([{"instruction": text} for text in harmless]),
        refusals=str(tmp_path / "refusals.txt"),
    )
    trainer.train()
    first = {
        next(
            token
            for token in tokenizer(text, add_special_tokens=False)["input_ids"]
            if tokenizer.decode([token]).strip()
        )
        for word in ("Sorry", "Never")
        for text in (word, f" {word}")
    }
    assert {token for tokens in trainer.points.upper[:2] for token in tokens} == first
    for prompt, refuses in [*((text, True) for text in harmful), *((text, False) for text in harmless)]:
        with torch.no_grad():
            logits = trainer.model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        others = [token for token in range(len(logits)) if token not in first]
        margin = (logits[list(first)].max() - logits[others].max()).item()
        assert margin >= MARGIN - 1e-4 if refuses else -margin >= MARGIN - 1e-4


def test_relaxed_prompts_are_certified_with_their_budget(make):
    trainer = make(relaxation="ball", attack_steps=5, cut_rounds=1, radius=0.05)
    trainer.train()
    certificate = next(c for c in trainer.edit.certificates if c.name == "relaxed_prompts")
    assert certificate.values["attack_steps"] == 5 and certificate.values["radius"] == 0.05
    assert 0 <= certificate.values["resisted"] <= 1
    assert "a search, no bound" in certificate.limits


def test_labelled_rows_are_split(rows, tiny_model_path, tmp_path):
    """An unpaired preference set: what is labelled True is kept, and was forbidden with the rest before."""
    forget, retain = (
        [{"prompt": row["question"], "completion": row["answer"], "label": label} for row in part]
        for part, label in zip(rows, (False, True), strict=True)
    )
    arguments = {"train_dataset": Dataset.from_list([*retain, *forget])}
    args = InterventionConfig(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = InterventionTrainer(tiny_model_path, args=args, **arguments)
    assert (len(trainer.train_dataset), len(trainer.retain_dataset)) == (len(forget), len(retain))
    assert trainer.train_dataset["prompt"][0] == forget[0]["prompt"] and args.retain_metric == "second_moment"
    with pytest.raises(ValueError, match="remove one of them"):
        InterventionTrainer(tiny_model_path, args=args, retain_dataset=Dataset.from_list(retain), **arguments)
