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
"""What a run leaves on record: evaluations, footprint, settings, environment, files. No forget text passes here."""

import copy
import os
import platform
from collections import Counter
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer

from hf_unlearn.cards.report import (
    REPORT_NAME,
    BaseModel,
    Certificate,
    Data,
    DataSummary,
    Environment,
    Footprint,
    LossTerm,
    Method,
    Metrics,
    Scope,
    UnlearningReport,
    hash_files,
)
from hf_unlearn.cards.wrappers import method_name

from ._version import __version__
from .engines import count_elements, is_partitioned
from .footprint import changes_of, count_base_parameters, footprint_of
from .losses import STEERING_COEFFICIENTS
from .reference import DisabledAdapter, InitialWeights, Reference, inner_model
from .robustness.sharpness import SHARPNESS_RADII


if TYPE_CHECKING:
    from .config import UnlearnConfig
    from .objective import Objective
    from .trainer import UnlearnTrainer


_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors")

# Settings that a report may show: numbers and choices, nothing that could hold a path, a name or a text.
_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_length",
    "bf16",
    "disable_dropout",
    "reference_mode",
)

_PDU_SETTINGS = ("pdu_initial_multiplier", "pdu_retain_threshold", "pdu_dual_step_size", "pdu_warmup_epochs")

# Files that a saved model consists of. Anything else in the folder is the user's and stays out of the report.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class Record:
    """
    Collects what `unlearning_report.json` needs while a run goes on: the part that every way of changing weights
    shares. A subclass says what was done ([`Record.method`]) and what it changed ([`Record.footprint`]).

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): the model before anything changed.
        data ([`~hf_unlearn.cards.report.Data`]): see [`describe_rows`].
        revision (`str`, *optional*): of the Hub that the model was loaded at; main where unset.

    Attributes:
        base ([`~hf_unlearn.cards.report.BaseModel`]): the model before, without its adapters.
        data ([`~hf_unlearn.cards.report.Data`]): how many rows and tokens there were.
        evaluations (`dict`): `before|after` -> `forget|retain` -> metric -> value.
        certificates (`list[Certificate]`): bounds that hold for certain.
        last_checkpoint (`str`, *optional*): folder of the newest checkpoint.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, data: Data, revision: str | None = None):
        self.base = describe_model(model, hub_origin(model, revision))
        self.data = data
        self.evaluations: dict[str, dict[str, dict[str, float]]] = {"before": {}, "after": {}}
        self.certificates: list[Certificate] = []
        self.last_checkpoint: str | None = None

    def add_evaluation(self, prefix: str, metrics: dict[str, float], step: int) -> None:
        """Keeps an evaluation of the forget or retain set: the last one before any step, and the last one after."""
        name = prefix.rpartition("_")[2]
        if name in ("forget", "retain"):
            self.evaluations["before" if step == 0 else "after"][name] = metrics

    def method(self, trainer: Trainer) -> Method:
        """What was done to the model."""
        raise NotImplementedError

    def footprint(self, trainer: Trainer) -> Footprint | None:
        """What changed, and by how much; `None` where nothing is left to compare with."""
        raise NotImplementedError

    def report(self, trainer: Trainer) -> UnlearningReport:
        """The report of the trainer's run as it stands. To be called on all processes: shards are summed over them."""
        args = trainer.args
        runtimes = [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry]
        return UnlearningReport(
            tool_version=__version__,
            base=self.base,
            method=self.method(trainer),
            data=self.data,
            footprint=self.footprint(trainer),
            metrics=Metrics(**copy.deepcopy(self.evaluations)),
            certificates=list(self.certificates),
            environment=describe_environment(
                args.device, args.world_size, train_seconds=sum(runtimes) if runtimes else None
            ),
        )


class RunRecord(Record):
    """
    The record of a run of [`~hf_unlearn.UnlearnTrainer`].

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): the model before training.
        reference ([`~hf_unlearn.reference.Reference`], *optional*): the run's reference; its initial weights are
            shared.
        forget ([`~datasets.Dataset`]): prepared forget rows; only their numbers are kept.
        retain ([`~datasets.Dataset`], *optional*): prepared retain rows; only their numbers are kept.
        revision (`str`, *optional*): of the Hub that the model was loaded at; main where unset.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        reference: Reference | None,
        forget: Dataset,
        retain: Dataset | None,
        revision: str | None = None,
    ):
        data = Data(describe_rows(forget), None if retain is None else describe_rows(retain))
        super().__init__(model, data, revision)
        self.is_adapter_fresh = isinstance(reference, DisabledAdapter)
        self.initial: InitialWeights | None = None
        if isinstance(reference, InitialWeights):
            self.initial = reference
        elif not self.is_adapter_fresh and not is_partitioned() and _trains_a_part(model):
            # For the footprint alone: in main memory
            self.initial = InitialWeights(model, device="cpu")

    def method(self, trainer: "UnlearnTrainer") -> Method:
        args, objective = trainer.args, trainer.objective
        losses = {
            name: [LossTerm(term.name, term.weight) for term in objective.terms.get(name, [])]
            for name in ("forget", "retain")
        }
        names = [term.name for terms in losses.values() for term in terms]
        losses["forget"] += [LossTerm(term.name, term.weight) for term in objective.terms.get("probe", [])]
        settings = {name: getattr(args, name) for name in _SETTINGS}
        if args.max_steps > 0:  # the epochs are not read then
            del settings["num_train_epochs"]
            settings["max_steps"] = args.max_steps
        all_terms = [term for terms in objective.terms.values() for term in terms]
        readers = Counter(name for term in all_terms for name in term.loss.settings)
        for term in all_terms:
            # Two losses may read the same field, each with its own published value
            for name, value in objective.settings_of(term).items():
                settings[name if readers[name] == 1 else f"{term.name}_{name}"] = value
            if term.name == "pdu":
                settings.update({name: getattr(args, name) for name in _PDU_SETTINGS})
            elif term.name == "adaptive_rmu":
                settings["adaptive_scale"] = args.adaptive_scale
            elif term.name in STEERING_COEFFICIENTS:
                coefficient = args.steering_coefficient
                settings["steering_coefficient"] = (
                    STEERING_COEFFICIENTS[term.name] if coefficient is None else coefficient
                )
        if "hidden_states" in objective.all_reads:
            settings["hidden_layer"] = args.hidden_layer
        settings.update(_settings_of_what_holds(args, objective))
        average = trainer.weight_average
        # The mean takes the weights' place when training is over: checkpoints hold those of their step
        is_averaged = average is not None and average.count > 0 and not trainer.is_in_train
        return Method(
            name=method_name(names, settings),
            forget_losses=losses["forget"],
            retain_losses=losses["retain"],
            scope=describe_scope(
                trainer.accelerator.unwrap_model(trainer.model), args.trainable_layers, args.trainable_modules
            ),
            reference=None if objective.reference is None else objective.reference.kind,
            settings={name: _plain(value) for name, value in settings.items()},
            seed=args.seed,
            steps=trainer.state.global_step,
            checkpoint="mean of the weights along the run" if is_averaged else "last step",
        )

    def footprint(self, trainer: "UnlearnTrainer") -> Footprint | None:
        """
        What changed, and by how much, one tensor at a time.

        `None` for full fine-tuning without a reference, which keeps no copy of the start, for a sharded model with
        another adapter than LoRA, and under DeepSpeed ZeRO-3: `hf-unlearn card build` measures it from the files.
        """
        model = trainer.accelerator.unwrap_model(trainer.model)
        if is_partitioned() or (not self.is_adapter_fresh and self.initial is None):
            return None
        if isinstance(model, PeftModel) and not isinstance(model.active_peft_config, LoraConfig):
            if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
                return None
        return footprint_of(
            changes_of(model, self.initial), count_base_parameters(model), gather=trainer.accelerator.gather
        )


def _settings_of_what_holds(args: "UnlearnConfig", objective: "Objective") -> dict[str, Any]:
    """Settings of what was asked for beside the losses: noise, sharpness, probe, latent adversary and the like."""
    settings: dict[str, Any] = {}
    if args.reference_noise_std > 0:
        settings.update(reference_noise_std=args.reference_noise_std, reference_noise_layer=objective.noise_layer)
    if args.sharpness != "none":
        radius = SHARPNESS_RADII[args.sharpness] if args.sharpness_radius is None else args.sharpness_radius
        settings.update(sharpness=args.sharpness, sharpness_radius=radius)
        if args.sharpness in ("gradient_penalty", "curvature"):
            settings["sharpness_weight"] = args.sharpness_weight
        elif args.sharpness == "randomized":
            settings["sharpness_draws"] = args.sharpness_draws
    if args.weight_averaging_start is not None:
        settings.update(
            weight_averaging_start=args.weight_averaging_start, weight_averaging_every=args.weight_averaging_every
        )
    if args.gradient_conflict != "none":
        settings["gradient_conflict"] = args.gradient_conflict
    if args.retain_null_space is not None:
        settings["retain_null_space"] = args.retain_null_space
    if objective.probe is not None:
        settings.update(
            probe_weight=args.probe_weight,
            probe_weight_ratio=args.probe_weight_ratio,
            probe_layer=objective.probe.layer,
            probe_pooling=objective.probe.pooling,
            probe_held_out_accuracy=objective.probe.score.accuracy,
        )
    if args.latent_adversary_layers is not None:
        settings.update(
            latent_adversary_layers=args.latent_adversary_layers,
            latent_adversary_radius=args.latent_adversary_radius,
            latent_adversary_steps=args.latent_adversary_steps,
        )
    if objective.circuit_breaker_layers:
        settings["circuit_breaker_layers"] = args.circuit_breaker_layers
    if args.quantization_margin != "none":
        settings["quantization_margin"] = args.quantization_margin
    return settings


def save_report(report: UnlearningReport, folder: str) -> None:
    """Hashes the model's files in `folder` and writes the report and the card beside them."""
    from hf_unlearn.cards.card import write_model_card

    names = [name for name in sorted(os.listdir(folder)) if name in _MODEL_FILES or _is_shard(name)]
    report.files = hash_files(folder, names)
    report.save(os.path.join(folder, REPORT_NAME))
    write_model_card(report, folder)


def describe_model(model: PreTrainedModel | PeftModel, origin: tuple[str | None, str | None]) -> BaseModel:
    """The report's entry on a model, without its adapters; `origin` is what [`hub_origin`] gave when it was loaded."""
    inner = inner_model(model)
    return BaseModel(
        model_id=origin[0],
        revision=origin[1],
        architecture=type(inner).__name__.removeprefix("FSDP"),
        model_type=inner.config.model_type,
        parameters=count_base_parameters(model),
        dtype=str(inner.dtype).removeprefix("torch."),
    )


def describe_scope(
    model: PreTrainedModel | PeftModel, trainable_layers: str | None, trainable_modules: list[str] | None
) -> Scope:
    """
    The report's entry on which weights may move: those of the adapter, those selected, or all.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): all else in it is frozen.
        trainable_layers (`str`, *optional*): as configured.
        trainable_modules (`list[str]`, *optional*): as configured.
    """
    kind, modules, layers, rank = "full", [], None, None
    if isinstance(model, PeftModel):
        config = model.active_peft_config
        kind = "lora" if isinstance(config, LoraConfig) else "peft"
        targets = config.target_modules
        modules = [targets] if isinstance(targets, str) else sorted(targets)
        if isinstance(config, LoraConfig):
            rank = config.r
            if config.layers_to_transform is not None:
                chosen = config.layers_to_transform
                layers = ",".join(str(layer) for layer in ([chosen] if isinstance(chosen, int) else chosen))
    elif trainable_layers is not None or trainable_modules is not None:
        kind, modules, layers = "selected", trainable_modules or [], trainable_layers
    trained = sum(count_elements(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return Scope(kind=kind, modules=modules, layers=layers, trainable_parameters=trained, rank=rank)


def describe_rows(dataset: Dataset) -> DataSummary:
    """How much prepared data there is, and nothing else of it."""
    return DataSummary(rows=len(dataset), tokens=sum(len(row) for row in dataset["input_ids"]))


def describe_environment(device: torch.device, processes: int, train_seconds: float | None) -> Environment:
    """The report's entry on where something ran."""
    return Environment(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        packages={name: version(name) for name in _PACKAGES},
        device=torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        processes=processes,
        train_seconds=train_seconds,
    )


def hub_origin(model: PreTrainedModel | PeftModel, revision: str | None = None) -> tuple[str | None, str | None]:
    """
    Hub id and commit of a model, where the local cache proves that it came from the Hub.

    A folder's name is never taken for an id: it would publish a local path as the base model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): as `from_pretrained` gave it.
        revision (`str`, *optional*): that it was loaded with; main where unset. The model does not tell.
    """
    name = inner_model(model).config._name_or_path
    if not name or os.path.exists(name):
        return None, None
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # a path that no longer exists
        return None, None
    if not isinstance(cached, str):
        return None, None
    return name, os.path.basename(os.path.dirname(cached))


def _is_shard(name: str) -> bool:
    return name.startswith("model") and name.endswith(".safetensors")


def _trains_a_part(model: nn.Module) -> bool:
    """Whether a copy of the trained tensors is small beside the model."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained <= sum(parameter.numel() for parameter in model.parameters()) / 2


def _plain(value: Any) -> Any:
    """Enums of TrainingArguments as their text."""
    return value.value if hasattr(value, "value") else value
