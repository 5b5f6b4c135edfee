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
"""The report of an unlearning run that another trainer makes."""

import dataclasses
import functools
import logging
import os
import re
import weakref
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, get_args

import pyarrow.compute
from accelerate.utils import gather
from datasets import Dataset, LargeList, List
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_unlearn.cards.card import write_model_card
from hf_unlearn.cards.disclosure import is_shown, seal
from hf_unlearn.cards.report import (
    REPORT_NAME,
    Data,
    DataSummary,
    Footprint,
    LossTerm,
    Method,
    MethodName,
    ReferenceKind,
    SetName,
)
from hf_unlearn.cards.validation import validated
from hf_unlearn.config import UnlearnConfig
from hf_unlearn.footprint import changes_of, count_base_parameters, footprint_of
from hf_unlearn.intervention_config import InterventionConfig
from hf_unlearn.recording import Record, describe_scope
from hf_unlearn.reference import InitialWeights


logger = logging.getLogger(__name__)

# What a trainer adds to an evaluation and is none
_NO_METRICS = re.compile(r".*(runtime|_per_second|num_tokens|preparation_time|epoch)")
_SETS = get_args(SetName)
# `eval_forget_loss` of a set by that name, and what UnlearningEvaluationCallback leaves in the history
_OF_A_SET = re.compile(rf"eval_(?:unlearning_)?({'|'.join(_SETS)})_(.+)")


@dataclasses.dataclass
class _Run:
    """What a record reads of a trainer: the callback gets no trainer, and keeps none."""

    args: TrainingArguments
    state: TrainerState
    model: nn.Module
    released_step: int


class CallbackRecord(Record):
    """
    The record of a run of any trainer.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): the model before training.
        data ([`~hf_unlearn.cards.report.Data`]): what is said of the data.
        method (`str`, *optional*): its name.
        losses (`dict[str, list[LossTerm]]`): of `forget` and `retain`.
        reference (`str`, *optional*): what the losses compare with.
        has_footprint (`bool`): whether to keep a copy of the trained tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        method: str | None,
        losses: dict[str, list[LossTerm]],
        reference: str | None,
        has_footprint: bool,
    ):
        super().__init__(model, data)
        self.name = method
        self.losses = losses
        self.reference = reference
        self.initial = InitialWeights(model, device="cpu") if has_footprint else None
        self.made_for = weakref.ref(model)

    def method(self, trainer: _Run) -> Method:
        args, state = trainer.args, trainer.state
        return Method(
            name=self.name or _name_of(args),
            forget_losses=self.losses["forget"],
            retain_losses=self.losses["retain"],
            scope=self._scope(trainer.model),
            reference=self.reference,
            settings=describe_settings(args),
            seed=args.seed,
            steps=state.global_step,
            checkpoint="last step"
            if trainer.released_step == state.global_step
            else f"step {trainer.released_step}, the best by evaluation",
        )

    def _scope(self, model: nn.Module) -> Any:
        scope = describe_scope(model, None, None)
        if scope.kind == "full" and not all(parameter.requires_grad for parameter in model.parameters()):
            scope.kind = "selected"
        return scope

    def footprint(self, trainer: _Run) -> Footprint | None:
        model = trainer.model
        if self.initial is None or not _is_as_it_was(model, self.initial):
            return None
        return footprint_of(changes_of(model, self.initial), count_base_parameters(model), gather=gather)


def _is_as_it_was(model: nn.Module, initial: InitialWeights) -> bool:
    """Whether every tensor that was kept is still there in its shape: wrappers may flatten or partition them."""
    parameters = dict(model.named_parameters())
    for name, value in initial.values.items():
        parameter = parameters.get(name)
        if parameter is None:
            return False
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if local.shape != value.shape:
            return False
    return True


def describe_settings(args: TrainingArguments) -> dict[str, float | int | str | bool | None]:
    """
    The hyperparameters that a report may show: those of [`~hf_unlearn.cards.disclosure.SETTINGS`], never a token, a
    path, a text or a name of data.

    Args:
        args ([`~transformers.TrainingArguments`]): of any trainer.

    Returns:
        `dict`: in the order of the fields; what is not set is left out.

    Example:

    ```python
    >>> from transformers import TrainingArguments
    >>> from hf_unlearn.trainer_callbacks.run_record import describe_settings
    >>> settings = describe_settings(TrainingArguments("out", hub_token="hf_secret", run_name="mine", use_cpu=True))
    >>> settings["learning_rate"], "hub_token" in settings, "run_name" in settings
    (5e-05, False, False)

    ```
    """
    settings = {}
    for spec in dataclasses.fields(args):
        value = getattr(args, spec.name)
        if isinstance(value, Enum):
            value = value.value
        if isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value):
            value = ",".join(map(str, value))
        if value is not None and is_shown(spec.name, value):
            settings[spec.name] = value
    if args.max_steps > 0:  # the epochs are not read then
        settings.pop("num_train_epochs", None)
    else:
        settings.pop("max_steps", None)
    return settings


def _name_of(args: TrainingArguments) -> str:
    """`sft` of an `SFTConfig`, `trainer` of plain arguments."""
    name = type(args).__name__
    return "trainer" if name == "TrainingArguments" else name.removesuffix("Config").lower()


def _guarded(event: Callable) -> Callable:
    """A bug in the report only warns: it must not end a run."""

    @functools.wraps(event)
    def guarded(self: "RunRecordCallback", *args: Any, **kwargs: Any) -> None:
        try:
            event(self, *args, **kwargs)
        except Exception as error:
            # Its type alone: a message may repeat a row
            logger.warning(
                f"The record of this run is incomplete: {type(error).__name__} in {event.__name__}. Training goes on. "
                "For the traceback, set the logging level to debug."
            )
            logger.debug("The record of this run is incomplete.", exc_info=True)

    return guarded


class RunRecordCallback(TrainerCallback):
    """
    Writes `unlearning_report.json` and the model card in any trainer of transformers or TRL.

    Each checkpoint gets a report, and when training ends `args.output_dir` does: what was trained and how far it
    moved, the allowed hyperparameters, how much data there was, and the evaluations of sets by name. Pass
    `eval_dataset={"forget": ..., "retain": ...}` and `eval_on_start=True` for numbers before and after. What
    [`UnlearningEvaluationCallback`] measures is taken over as well. An evaluation after training writes the report of
    the end anew. Nothing of a row is kept.

    A run with this callback computes what it computes without, bit for bit, and a bug in it only warns. It keeps a
    copy of the trained tensors in main memory. Give it to the trainer's constructor, after callbacks that measure:
    added later, it knows a resumed run's start no more, and the report has no footprint. It has none either where
    weights are flattened or partitioned (FSDP1, DeepSpeed ZeRO-3).

    [`~hf_unlearn.UnlearnTrainer`] and [`~hf_unlearn.InterventionTrainer`] write their own report and need no callback.

    Args:
        output_dir (`str`, *optional*):
            One folder for the report, instead of those of the checkpoints and of the run.
        method (`str`, *optional*):
            Name of the method; defaults to that of the configuration, such as `sft`.
        forget_losses (`Mapping[str, float]`, *optional*):
            Loss -> weight, of what made the model forget. Left out, the card says that it is not on record.
        retain_losses (`Mapping[str, float]`, *optional*):
            The same of what was to keep the rest.
        data ([`~hf_unlearn.cards.report.Data`], *optional*):
            What is said of the data, at any disclosure level. Defaults to the rows and tokens of the training set,
            as those of the forget set.
        eval_set (`str`, *optional*):
            Which set an `eval_dataset` without names is, such as `"retain"`. Without it, its evaluations are left out.
        reference (`str`, *optional*):
            The frozen model that the losses compare with: `"adapter_disabled"`, `"initial_weights"` or
            `"separate_model"`.
        footprint (`bool`, *optional*, defaults to `True`):
            Whether to measure how far the weights moved.

    Raises:
        `ValueError`: an argument does not fit.

    Example:

    ```python
    >>> from hf_unlearn.trainer_callbacks import RunRecordCallback
    >>> callback = RunRecordCallback(method="refusal-sft", forget_losses={"idk": 1.0}, eval_set="retain")
    >>> # SFTTrainer(..., callbacks=[callback])

    ```
    """

    def __init__(
        self,
        output_dir: str | None = None,
        *,
        method: str | None = None,
        forget_losses: Mapping[str, float] | None = None,
        retain_losses: Mapping[str, float] | None = None,
        data: Data | None = None,
        eval_set: str | None = None,
        reference: str | None = None,
        footprint: bool = True,
    ):
        self.output_dir = output_dir
        self.method = None if method is None else validated(method, MethodName, "method")
        self.losses = {
            name: [validated(LossTerm(*term), LossTerm, f"{name}_losses") for term in (terms or {}).items()]
            for name, terms in (("forget", forget_losses), ("retain", retain_losses))
        }
        self.data = None if data is None else validated(data, Data, "data")
        self.eval_set = None if eval_set is None else validated(eval_set, SetName, "eval_set")
        self.reference = None if reference is None else validated(reference, ReferenceKind, "reference")
        self.footprint = footprint
        self._record: CallbackRecord | None = None
        self._evaluations: dict[tuple[int, str], dict[str, float]] = {}
        self._is_over = False
        self._has_warned = False

    @_guarded
    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        # Before a checkpoint is loaded: the start of a resumed run too
        if model is not None and not self._writes_its_own(args):
            self._start(model)

    @_guarded
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._writes_its_own(args):
            return
        self._is_over = False
        if self._record is None or self._record.made_for() is not model:
            self._start(model)
            if state.global_step > 0:  # these are the weights of a checkpoint
                self._record.initial = None
        if state.global_step == 0:
            self._evaluations = {key: values for key, values in self._evaluations.items() if key[0] == 0}
        if self.data is None and train_dataloader is not None:
            self._record.data = Data(count_rows(train_dataloader.dataset))

    @_guarded
    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        metrics: dict[str, float] | None = None,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._record is None:
            return
        found = self._split(metrics or {})
        for name, values in found.items():
            rows = _length(eval_dataloader.dataset) if eval_dataloader is not None else None
            if rows is not None:
                values["rows"] = rows
            self._evaluations[self._released_step(args, state), name] = values
        if self._is_over:
            self._write(args, state, model, args.output_dir)

    @_guarded
    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if self._record is not None:
            folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            self._write(args, state, model, folder)

    @_guarded
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if self._record is not None:
            self._is_over = True
            self._write(args, state, model, args.output_dir)

    def _writes_its_own(self, args: TrainingArguments) -> bool:
        if not isinstance(args, (UnlearnConfig, InterventionConfig)):
            return False
        if not self._has_warned:
            logger.warning("This trainer writes its own report: RunRecordCallback does nothing here, leave it out.")
            self._has_warned = True
        return True

    def _start(self, model: nn.Module) -> None:
        data = Data(DataSummary(None, None)) if self.data is None else self.data
        self._record = CallbackRecord(model, data, self.method, self.losses, self.reference, self.footprint)

    def _split(self, metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """The metrics of each set that the report knows, from one evaluation or one entry of the history."""
        values = {
            name: float(value)
            for name, value in metrics.items()
            if name.startswith("eval_")
            and isinstance(value, (int, float))
            and not name.startswith("eval_relearning_")
            and not _NO_METRICS.fullmatch(name)
        }
        named = {name: match.groups() for name in values if (match := _OF_A_SET.fullmatch(name))}
        sets = {of for of, _ in named.values()}
        # TRL leaves the set's name out of some: the others of the same entry have it
        rest = next(iter(sets)) if len(sets) == 1 else self.eval_set
        found: dict[str, dict[str, float]] = {}
        for name, value in values.items():
            of, metric = named.get(name, (rest, name.removeprefix("eval_")))
            if of is not None:
                found.setdefault(of, {})[metric.replace("/", ".")] = value
        return found

    def _write(self, args: TrainingArguments, state: TrainerState, model: nn.Module, folder: str) -> None:
        is_sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        if not (state.is_world_process_zero or is_sharded):  # of shards, all processes have a part
            return
        self._record.evaluations = self._before_and_after(args, state)
        report = self._record.report(_Run(args, state, model, self._released_step(args, state)))
        if report.data.disclosure == "sealed":
            seal(report)
        folder = self.output_dir or folder
        if not state.is_world_process_zero or not (self.output_dir or os.path.isdir(folder)):
            return
        os.makedirs(folder, exist_ok=True)
        report.save(os.path.join(folder, REPORT_NAME))
        write_model_card(report, folder)

    def _released_step(self, args: TrainingArguments, state: TrainerState) -> int:
        """The step whose weights are in the model: when it is over, the trainer may have gone back to the best."""
        if self._is_over and args.load_best_model_at_end and state.best_model_checkpoint is not None:
            return state.best_global_step
        return state.global_step

    def _before_and_after(
        self, args: TrainingArguments, state: TrainerState
    ) -> dict[str, dict[str, dict[str, float]]]:
        """Those before any step, and those of the weights that the model has now. The history survives a resume."""
        merged: dict[tuple[int, str], dict[str, float]] = {}
        for entry in state.log_history:
            for name, values in self._split(entry).items():
                merged.setdefault((entry["step"], name), {}).update(values)
        for key, values in self._evaluations.items():
            merged.setdefault(key, {}).update(values)
        released = self._released_step(args, state)
        evaluations: dict[str, dict[str, dict[str, float]]] = {"before": {}, "after": {}}
        for step, name in sorted(merged):
            if step == 0:
                evaluations["before"][name] = merged[step, name]
            elif step == released:
                evaluations["after"][name] = merged[step, name]
        return evaluations


def count_rows(dataset: Any) -> DataSummary:
    """
    How much data a training set holds, and nothing else of it.

    Args:
        dataset ([`~datasets.Dataset`] or any other): prepared by a trainer. Tokens are those of its columns that hold
            token ids (`input_ids`, `prompt_ids`, `chosen_ids`, ...).

    Returns:
        [`~hf_unlearn.cards.report.DataSummary`]: `None` for what cannot be counted without reading a stream.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from hf_unlearn.trainer_callbacks.run_record import count_rows
    >>> count_rows(Dataset.from_list([{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2]}]))
    DataSummary(rows=2, tokens=5, topics=[], benchmark=None)

    ```
    """
    if not isinstance(dataset, Dataset):
        return DataSummary(rows=_length(dataset), tokens=None)
    columns = [
        name
        for name, feature in dataset.features.items()
        if name.endswith("_ids") and name != "position_ids" and isinstance(feature, (List, LargeList))
    ]
    tokens = None
    if columns:
        tables = dataset.select_columns(columns).with_format("arrow").iter(batch_size=10_000)
        tokens = sum(
            pyarrow.compute.sum(pyarrow.compute.list_value_length(table[name])).as_py() or 0
            for table in tables
            for name in columns
        )
    return DataSummary(rows=len(dataset), tokens=tokens)


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:  # a stream
        return None
