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
"""`InterventionTrainer`: points → smallest edit → write → check again; or regions → augmented Lagrangian."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import EvalPrediction, TrainOutput
from trl.trainer.utils import disable_dropout_in_model

from hf_unlearn.cards.report import Certificate, Data, DataSummary, Footprint, Method, Scope

from .base_trainer import check_pushing, prepare_eval_dataset
from .constraints.certify import (
    certify_points,
    certify_relaxation,
    certify_solution,
    certify_storage,
    check_points,
)
from .constraints.editable import editable_linear, has_tied_head, in_float32, untie_head
from .constraints.linearize import second_moments
from .constraints.points import ConstraintPoints
from .constraints.preconditioning import null_space_projector, retain_factor
from .constraints.relaxations import Relaxation
from .constraints.solve import solve_intervention
from .constraints.spellings import find_spellings, single_tokens
from .constraints.vocabulary import certify_rows, certify_universal, solve_rows, solve_universal
from .constraints.weight_edit import WeightEdit
from .data import require_map_style, split_by_label
from .footprint import count_base_parameters, footprint_of
from .intervention_config import SOLVED_KINDS, InterventionConfig
from .intervention_data import count_tokens, make_points, prompt_ids, retain_sequences, text_ids
from .loading import check_model, load_model, prepare_tokenizer
from .recording import Record
from .reference import inner_model
from .region_training import PromptCollator, RegionTrainer, check_regions, prompt_dataset
from .scope import decoder_layers, freeze_all_but, layers_of, select_parameters


logger = get_logger(__name__)

# Settings that the report shows
_SETTINGS_TRAINED = (
    "hidden_layer",
    "safe_region",
    "epsilon",
    "multiplier_step_size",
    "multiplier_interval",
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "retain_metric",
    "retain_damping",
    "relaxation",
    "radius",
    "relaxed_tokens",
    "attack_steps",
    "attack_restarts",
    "store",
)
_SETTINGS_SOLVED = (
    "aim",
    "epsilon",
    "probability",
    "top_k",
    "sequence_length",
    "temperature",
    "reserve",
    "positions",
    "num_fillers",
    "retain_metric",
    "retain_damping",
    "null_space_share",
    "relaxation",
    "radius",
    "relaxed_tokens",
    "attack_steps",
    "attack_restarts",
    "rounds",
    "cut_rounds",
    "slack",
    "slack_cost",
    "store",
)


class InterventionRecord(Record):
    """
    The record of a run of [`InterventionTrainer`].

    Args:
        model ([`~transformers.PreTrainedModel`]): the model before.
        data ([`~hf_unlearn.cards.report.Data`]): how much data there was.
        revision (`str`, *optional*): of the Hub that the model was loaded at; main where unset.
    """

    def __init__(self, model: PreTrainedModel, data: Data, revision: str | None = None):
        super().__init__(model, data, revision)
        self.originals: dict[str, Tensor] = {}  # edited weights as they were, on the CPU
        self.edit: WeightEdit | None = None
        self.modules: list[str] = []

    def method(self, trainer: "InterventionTrainer") -> Method:
        args = trainer.args
        edited = sum(weight.numel() for weight in self.originals.values())
        return Method(
            name=args.kind,
            forget_losses=[],
            retain_losses=[],
            scope=Scope(
                kind="selected",
                modules=self.modules,
                layers=args.trainable_layers,
                trainable_parameters=edited,
                rank=None if self.edit is None else max(self.edit.ranks().values(), default=0),
            ),
            reference=None,
            settings={
                name: getattr(args, name)
                for name in (_SETTINGS_SOLVED if args.kind in SOLVED_KINDS else _SETTINGS_TRAINED)
            },
            seed=args.seed,
            steps=trainer.state.global_step,
            checkpoint="last round" if args.kind in SOLVED_KINDS else "last step",
        )

    def footprint(self, trainer: "InterventionTrainer") -> Footprint | None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if isinstance(model, PeftModel):
            # What merging the adapter would make of the base weights
            changes = [
                (f"{name}.weight", before, (before.double() + self.edit.dense(name)).to(before.dtype))
                for name, before in self.originals.items()
            ]
        else:
            changes = [
                (f"{name}.weight", before, model.get_submodule(name).weight.detach().cpu())
                for name, before in self.originals.items()
            ]
        return footprint_of(changes, count_base_parameters(model))


class InterventionTrainer(RegionTrainer):
    """
    Trainer that changes a causal language model as little as stated constraints allow.

    `train()` collects constraint points, solves for the smallest edit of the chosen layers, writes it into the model,
    and checks every constraint again on the weights as they are stored. It takes no gradient steps; callbacks, logs,
    evaluation, `save_model`, the report and the card work as in training. The kinds `"towards_safe"` and
    `"away_from_risky"` train the chosen weights by an augmented Lagrangian. Our formulation after
    [the paper](https://huggingface.co/papers/2510.03567).

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            A Hub id or folder, loaded with `args.model_init_kwargs`, or a loaded model. Merge an adapter first.
        args ([`InterventionConfig`]):
            Configuration.
        train_dataset ([`~datasets.Dataset`], *optional*):
            What must not be said, in any format that [`~hf_unlearn.data.prepare_dataset`] lists; with `aim="refuse"`
            prompts to refuse. Not needed with `forbidden_words`.
        retain_dataset ([`~datasets.Dataset`], *optional*):
            What to keep: rows for the retain metric; with `aim="refuse"` prompts that must not be refused.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            For example `{"forget": ..., "retain": ...}`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. Defaults to the model's own.
        compute_metrics (`Callable`, *optional*):
            As in [`~transformers.Trainer`].
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Callbacks.

    Attributes:
        points ([`~hf_unlearn.constraints.points.ConstraintPoints`]): what was demanded; set by `train()`.
        edit ([`~hf_unlearn.constraints.weight_edit.WeightEdit`]): what was changed; set by `train()`.

    Example:

    ```python
    from datasets import load_dataset
    from hf_unlearn import InterventionConfig, InterventionTrainer

    trainer = InterventionTrainer(
        model="open-unlearning/tofu_Llama-3.2-1B-Instruct_full",
        args=InterventionConfig("out", kind="pointwise", trainable_layers="7", positions="key"),
        train_dataset=load_dataset("locuslab/TOFU", "forget01_perturbed", split="train"),
        retain_dataset=load_dataset("locuslab/TOFU", "retain90", split="train"),
    )
    trainer.train()
    trainer.save_model()
    ```
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: InterventionConfig | None = None,
        train_dataset: Dataset | None = None,
        retain_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        args = InterventionConfig("intervention") if args is None else args
        if not isinstance(args, InterventionConfig):
            raise ValueError(f"args is a {type(args).__name__}: use InterventionConfig.")
        if args.push_to_hub:
            check_pushing(args)
        for name, dataset in (("train_dataset", train_dataset), ("retain_dataset", retain_dataset)):
            if dataset is not None:
                require_map_style(dataset, name)
        if train_dataset is not None and {"completion", "label"} <= set(train_dataset.column_names):
            if retain_dataset is not None:
                raise ValueError(
                    "train_dataset has a `label` column, which splits it into what to forget and what to keep, and "
                    "retain_dataset is given too: remove one of them."
                )
            train_dataset, retain_dataset = split_by_label(train_dataset)

        if args.retain_metric is None:
            args.retain_metric = "none" if retain_dataset is None else "second_moment"
        elif args.retain_metric != "none" and retain_dataset is None:
            raise ValueError(
                f"retain_metric={args.retain_metric!r} reads a retain_dataset: give one, or set it to 'none'."
            )

        # Model
        set_seed(args.seed)
        if isinstance(model, str):
            model = load_model(model, args, None)
        check_model(model, None, None, args)
        if isinstance(model, PeftModel):
            raise ValueError("The model has an adapter: merge it first (`model.merge_and_unload()`).")
        tokenizer = prepare_tokenizer(processing_class, model, args)
        revision = (args.model_init_kwargs or {}).get("revision")
        record = InterventionRecord(model, Data(DataSummary(0, 0)), revision)
        if args.store == "stochastic" and model.dtype != torch.bfloat16:
            raise ValueError(
                "store='stochastic' is for a model in bfloat16: load it with dtype='bfloat16', or use store='fp32'."
            )
        if args.disable_dropout:
            disable_dropout_in_model(model)

        # Scope
        self.module_names = select_modules(model, args)
        weights = {id(editable_linear(model, name).weight) for name in self.module_names}
        if args.store == "fp32":
            model = model.float()  # of quantised layers it says less than `editable_linear`
        # By identity: a tied head goes by the name of the input embeddings
        freeze_all_but(model, [name for name, parameter in model.named_parameters() if id(parameter) in weights])
        record.modules = self.module_names

        words = args.forbidden_words or []
        forget_rows = [{"answer": word} for word in words] if train_dataset is None else train_dataset
        is_trained = args.kind not in SOLVED_KINDS
        if is_trained:
            stack_name, stack = decoder_layers(model)
            check_regions(args, len(stack), layers_of([f"{name}." for name in self.module_names], stack_name))
            if train_dataset is None or retain_dataset is None:
                raise ValueError(
                    f"kind={args.kind!r} needs a train_dataset of prompts to constrain and a retain_dataset of "
                    "prompts to keep."
                )
            self._prompts, safe = prompt_ids(train_dataset, tokenizer), prompt_ids(retain_dataset, tokenizer)
            record.data = Data(
                DataSummary(len(self._prompts), count_tokens(self._prompts)),
                DataSummary(len(safe), count_tokens(safe)),
            )
            train_dataset = prompt_dataset(self._prompts)
        if eval_dataset is not None:
            eval_dataset = prepare_eval_dataset(eval_dataset, tokenizer, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=PromptCollator(pad_token_id=tokenizer.pad_token_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
        )
        self.forget_rows, self.forget_entities = forget_rows, words
        self.retain_dataset = retain_dataset
        self.points: ConstraintPoints | None = None
        self.edit: WeightEdit | None = None
        self.record = record
        if is_trained:
            record.originals = self._copies(self.model)
            moments = self._retain_factors(self.model, retain_sequences(retain_dataset, tokenizer, args))
            self.make_lagrangian(self._prompts, safe, self._relaxation(self.model), moments)

    # ---- Kinds that solve ----

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        Solves, writes and checks; trains where the kind does.

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: rounds, and what [`Trainer.log`] got last.

        Args:
            args, kwargs: of [`~transformers.Trainer.train`], for the kinds that train.

        Raises:
            [`~hf_unlearn.constraints.dual.InfeasibleConstraintsError`]: no edit satisfies the constraints.
            [`~hf_unlearn.constraints.solve.ConstraintsNotMetError`]: the rounds did not suffice, or a constraint does
                not hold on the stored weights; the model is then as it was before.
        """
        if self.args.kind not in SOLVED_KINDS:
            output = super().train(*args, **kwargs)
            self.record.certificates = [self.certify_region(self.accelerator.unwrap_model(self.model), self._prompts)]
            return output
        if self.edit is not None:
            raise ValueError("This trainer has put its edit into the model: make a new trainer for a further one.")
        start = time.monotonic()
        model = self.accelerator.unwrap_model(self.model).eval()
        handler, state, control = self.callback_handler, self.state, self.control
        state.is_world_process_zero, state.is_local_process_zero = (
            self.is_world_process_zero(),
            self.is_local_process_zero(),
        )
        self.control = handler.on_train_begin(self.args, state, control)
        with self._tied_on_failure(model):
            # Solved for in float32: the rounding of a bfloat16 forward pass is larger than what a margin leaves
            with in_float32(model):
                edit = self._solve(model)
                certificates = self._certify_edit(model, edit)
            self._store(model, edit, certificates)
        self._log_rounds(edit)
        metrics = {
            "train_runtime": round(time.monotonic() - start, 4),
            "edit_norm": edit.norm(),
            "constraints": 0 if edit.report is None else edit.report.constraints,
        }
        self.log(dict(metrics))
        self.control = handler.on_train_end(self.args, state, self.control)
        return TrainOutput(state.global_step, 0.0, metrics)

    @contextmanager
    def _tied_on_failure(self, model: PreTrainedModel) -> Iterator[None]:
        """Unties a head that is to be edited from the input embeddings, and ties it again if nothing comes of it."""
        if not has_tied_head(model) or _head_name(model) not in self.module_names:
            yield
            return
        tie_again = untie_head(model)
        try:
            yield
        except BaseException:
            tie_again()
            raise
        self.edit.untie = True

    def _log_rounds(self, edit: WeightEdit) -> None:
        state = self.state
        for entry in [] if edit.report is None else edit.report.history:
            self.control = self.callback_handler.on_step_begin(self.args, state, self.control)
            state.global_step = max(state.global_step, entry["round"])
            self.control = self.callback_handler.on_step_end(self.args, state, self.control)
            self.log(dict(entry))
        state.global_step = max(state.global_step, 1)  # what is measured from now on is "after"

    def _solve(self, model: PreTrainedModel) -> WeightEdit:
        args, tokenizer = self.args, self.processing_class
        progress = not args.disable_tqdm and self.is_world_process_zero()
        if args.kind == "vocabulary_universal":
            spellings = find_spellings(tokenizer, args.forbidden_words, leading_space=(True,))
            tokens = single_tokens(spellings)
            if not tokens:
                raise ValueError(
                    "No forbidden word is a token of its own, so that no row of the LM head stands for one: use "
                    "kind='vocabulary' or 'pointwise' with contexts, which block a word at its cheapest token."
                )
            open_spellings = len(spellings.spellings) + spellings.left_out - len(tokens)
            if open_spellings:
                logger.warning(
                    f"{len(tokens)} tokens are made unreachable; {open_spellings} other spellings of the words stay "
                    "open (as several tokens, in other cases): kind='pointwise' with contexts blocks those there."
                )
            self.record.data = Data(DataSummary(len(args.forbidden_words), 0))
            return solve_universal(model, tokens, args.probability, reserve=args.reserve)

        self.points = make_points(model, tokenizer, args, self.train_dataset, self.retain_dataset)
        retain = None
        if self.retain_dataset is not None:
            sequences = retain_sequences(self.retain_dataset, tokenizer, args)
            retain = DataSummary(len(sequences), count_tokens(sequences))
        # Constraints are counted in the certificates; words after listed contexts have no rows but these
        listed = args.forbidden_words or self.train_dataset is None
        forget = self.points.contexts if listed else text_ids(self.train_dataset, tokenizer, args, "forget")
        self.record.data = Data(DataSummary(len(forget), count_tokens(forget)), retain)
        retain_factors = None if retain is None else self._retain_factors(model, sequences)
        if args.kind == "vocabulary":
            factor = None if retain_factors is None else retain_factors[self.module_names[0]]
            return solve_rows(
                model,
                self.points,
                args.demand,
                retain_factor=factor,
                slack=args.slack,
                slack_cost=args.slack_cost,
                batch_size=args.solve_batch_size,
            )
        return solve_intervention(
            model,
            self.points,
            self.module_names,
            args.demand,
            retain_factors=retain_factors,
            relaxation=self._relaxation(model),
            rounds=args.rounds,
            cut_rounds=args.cut_rounds,
            slack=args.slack,
            slack_cost=args.slack_cost,
            batch_size=args.solve_batch_size,
            seed=args.seed,
            accelerator=self.accelerator,
            progress=progress,
        )

    def _retain_factors(self, model: PreTrainedModel, sequences: list[list[int]]) -> dict[str, Tensor] | None:
        """Of each edited module, from its inputs over the texts to keep."""
        args = self.args
        if args.retain_metric == "none":
            return None
        progress = not args.disable_tqdm and self.is_world_process_zero()
        moments = second_moments(model, self.module_names, sequences, args.solve_batch_size, progress)
        return {name: self._retain_factor(moment.mean()) for name, moment in moments.items()}

    def _retain_factor(self, moment: Tensor) -> Tensor:
        factor = retain_factor(moment, self.args.retain_damping)
        if self.args.retain_metric == "second_moment":
            return factor
        # The leading directions are left alone, the others cost what they do to retained inputs
        projector = null_space_projector(moment, share=self.args.null_space_share)
        return projector @ factor

    def _relaxation(self, model: PreTrainedModel) -> Relaxation | None:
        args = self.args
        if args.relaxation is None:
            return None
        radius = args.radius
        if radius is None:
            radius = 0.5 * model.get_input_embeddings().weight.detach().float().norm(dim=1).mean().item()
        return Relaxation(args.relaxation, radius, args.relaxed_tokens, args.attack_steps, args.attack_restarts)

    def _certify_edit(self, model: PreTrainedModel, edit: WeightEdit) -> list[Certificate]:
        """What is certain of an edit, whatever it is stored in. The model is that before it, in float32."""
        args = self.args
        certificates = []
        if self.points is not None and edit.norm() > 0:
            generator = torch.Generator().manual_seed(args.seed)
            certificates.append(certify_solution(edit, model, edit.report))
            certificates.append(
                certify_storage(edit, model, self.points, args.demand, generator, args.solve_batch_size)
            )
        if args.store == "adapter" and args.kind == "pointwise":
            with edit.applied(model):  # in float32, where it is what base and adapter amount to
                certificates += certify_points(
                    model, self.module_names, self.points, args.demand, args.solve_batch_size
                )
        return certificates

    def _store(self, model: PreTrainedModel, edit: WeightEdit, certificates: list[Certificate]) -> None:
        """Writes the edit as it will be saved, and checks it there; where it does not hold, takes it out again."""
        args = self.args
        self.record.originals = self._copies(model)
        if args.store == "adapter":
            stored = edit.to_adapter(model)
        else:
            stored = model
            generator = torch.Generator(device=model.device).manual_seed(args.seed)
            edit.apply(model, "stochastic" if args.store == "stochastic" else "nearest", generator)
        try:
            certificates = certificates + self._check(stored, edit)
        except Exception:
            if args.store == "adapter":
                stored.unload()
            else:
                edit.revert(model)
            raise
        if args.store == "adapter":
            self.model = self.model_wrapped = stored
        else:
            edit.merge(model)
        edit.certificates = certificates
        self.record.certificates = certificates
        self.record.edit = self.edit = edit

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel) and self.args.should_save:
            # In place of PEFT's files, which hold the path of the base and all rows of an edited head
            self.edit.save_adapter(model, output_dir or self.args.output_dir)

    def _copies(self, model: PreTrainedModel) -> dict[str, Tensor]:
        return {name: editable_linear(model, name).weight.detach().cpu().clone() for name in self.module_names}

    def _check(self, model: PreTrainedModel | PeftModel, edit: WeightEdit) -> list[Certificate]:
        """Every constraint on what is stored; and what is certain of it."""
        args = self.args
        if args.kind == "vocabulary_universal":
            return certify_universal(model, edit)
        if args.kind == "vocabulary":
            return certify_rows(model, edit, self.points, args.demand, batch_size=args.solve_batch_size)
        inner = inner_model(model)
        certificates = []
        if args.slack is None:
            check_points(inner, self.points, args.demand, args.store, args.solve_batch_size)
        if args.store != "adapter":
            certificates += certify_points(inner, self.module_names, self.points, args.demand, args.solve_batch_size)
        relaxation = self._relaxation(inner)
        if relaxation is not None:
            certificates.append(certify_relaxation(edit.report, relaxation))
        return certificates


def select_modules(model: PreTrainedModel, args: InterventionConfig) -> list[str]:
    """
    The linear layers that may be edited.

    Args:
        model ([`~transformers.PreTrainedModel`]): causal language model.
        args ([`InterventionConfig`]): `kind`, `trainable_layers` and `trainable_modules`.

    Raises:
        `ValueError`: no linear layer is selected.
    """
    head = _head_name(model)
    if args.kind in ("vocabulary", "vocabulary_universal"):
        return [head]
    layers, modules = args.trainable_layers, args.trainable_modules
    if modules == [head]:
        return [head]
    if layers is None:
        layers = str(len(decoder_layers(model)[1]) // 2)
    selected = select_parameters(model, layers, modules or ["mlp.down_proj"])
    names = [name.removesuffix(".weight") for name in selected if name.endswith(".weight")]
    # What stands beside linear layers in a module chosen as a whole (norms) is not edited
    names = [name for name in names if model.get_submodule(name).weight.dim() == 2]
    if not names:
        raise ValueError(f"trainable_modules={modules} selects no linear layer: choose one such as mlp.down_proj.")
    return names


def _head_name(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)
