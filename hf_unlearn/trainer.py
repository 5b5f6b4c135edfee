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
"""`UnlearnTrainer`: paired batch → one redirected forward → losses → gradient → step."""

import copy
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction, TrainOutput
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import disable_dropout_in_model

from .base_trainer import check_pushing, prepare_eval_dataset
from .checkpoint import load_state, save_state
from .config import UnlearnConfig
from .data import count_overlap, prepare_dataset, rows_of_topics, split_sets, topics_of
from .engines import SHARDED, check_options, engine_of, is_partitioned, is_quantized, options_of
from .forward import Decoder, check_output_head, check_packing, evaluation_mode
from .hardening import Generators, check_trained_weights, make_probe, measure_null_space, trained_parameters
from .loading import (
    check_model,
    complete_args,
    hold_in_float32,
    load_model,
    prepare_tokenizer,
    set_scope,
    warn_of_bf16_weights,
)
from .objective import UNITS, Objective, count_items
from .pairing import DataCollatorForUnlearning, PairedDataset, PairingSampler
from .prefix import drop_activations
from .recording import RunRecord
from .reference import DisabledAdapter, InitialWeights, SeparateModel, adapter_can_be_disabled, inner_model
from .reference_cache import StepCaches
from .refusals import load_refusals
from .robustness.averaging import WeightAverage
from .robustness.null_space import RetainNullSpace
from .robustness.quantization import RoundedWeights
from .split_gradients import SplitGradientTrainer
from .unread_layers import find_unread_layers, place


logger = get_logger(__name__)


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the run stopped before it could save such weights."""


class _NoInputGradients(TrainerCallback):
    """
    Keeps frozen layers out of the backward pass under activation checkpointing.

    transformers makes the embedding's output require a gradient when it enables checkpointing, which only reentrant
    checkpoints need (they are refused): all frozen layers below the trained ones would be run and differentiated
    again.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        inner_model(model).disable_input_require_grads()


class _AfterStep(TrainerCallback):
    """What follows the optimizer: back into the retain rows' null space, and into the mean of the weights."""

    def __init__(self, null_space: RetainNullSpace | None, average: WeightAverage | None):
        self.null_space = null_space
        self.average = average

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.null_space is not None:
            self.null_space.project_weights()

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if self.average is not None:
            self.average.update(trained_parameters(model), state.global_step)


class UnlearnTrainer(SplitGradientTrainer):
    """
    Trainer that makes a causal language model forget one data set and keep another.

    It has the constructor of TRL's trainers plus `retain_dataset`: an SFT or DPO script becomes an unlearning script
    by changing the two class names and adding that argument.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A Hub id or folder, loaded with `args.model_init_kwargs`; a loaded model; or a model with an adapter, which
            is trained further and whose start is the reference.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            A second, frozen model to compare with. Usually left out: the reference needs none
            (`args.reference_mode`).
        args ([`UnlearnConfig`], *optional*):
            Configuration. A plain [`~transformers.TrainingArguments`] is completed with the defaults.
        data_collator (`Callable`, *optional*):
            Defaults to [`~hf_unlearn.pairing.DataCollatorForUnlearning`].
        train_dataset ([`~datasets.Dataset`]):
            The forget set, in any format that [`~hf_unlearn.data.prepare_dataset`] lists. With a `label` column and no
            `retain_dataset`, rows labelled `False` are forgotten and the others kept.
        retain_dataset ([`~datasets.Dataset`], *optional*):
            The retain set. Required unless `args.retain_loss` is `"none"`.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            For example `{"forget": ..., "retain": ...}`; logged as `eval_forget_probability` and so on.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. Defaults to the model's own.
        compute_metrics (`Callable`, *optional*):
            As in [`~transformers.Trainer`]: gets logits and labels, which costs `(rows, length, vocabulary)` memory.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler, as in [`~transformers.Trainer`].
        optimizer_cls_and_kwargs (`tuple`, *optional*):
            Optimizer class and its arguments, as in [`~transformers.Trainer`].
        preprocess_logits_for_metrics (`Callable`, *optional*):
            As in [`~transformers.Trainer`], for `compute_metrics`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of a model given as `str`; needs a `peft_config`.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train. Without it and without `args.trainable_layers` or `args.trainable_modules`, all
            parameters are trained.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from hf_unlearn import UnlearnConfig, UnlearnTrainer

    trainer = UnlearnTrainer(
        model="open-unlearning/tofu_Llama-3.2-1B-Instruct_full",
        args=UnlearnConfig("out", forget_loss=["npo"], retain_loss=["kl"], learning_rate=2e-4),
        train_dataset=load_dataset("locuslab/TOFU", "forget10", split="train"),
        retain_dataset=load_dataset("locuslab/TOFU", "retain90", split="train"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    ```
    """

    # Losses are normalised by the counts of the whole optimizer step (`get_batch_samples`), so the Trainer must not
    # divide again by the number of accumulation steps.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: UnlearnConfig | TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | None = None,
        retain_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: Any | None = None,
        peft_config: PeftConfig | None = None,
    ):
        args = complete_args(args, model)
        if args.push_to_hub:
            check_pushing(args)
        if args.padding_free and data_collator is not None:
            raise ValueError("padding_free=True needs the collator of this trainer: leave data_collator out.")
        objective = Objective(args)
        train_dataset, retain_dataset = split_sets(train_dataset, retain_dataset, args)

        # Model. Adapters are initialised at random: the seed comes first.
        set_seed(args.seed)
        if isinstance(model, str):
            if quantization_config is not None and peft_config is None:
                raise ValueError("quantization_config needs a peft_config: quantized weights cannot be trained.")
            model = load_model(model, args, quantization_config)
        elif args.model_init_kwargs is not None or quantization_config is not None:
            raise ValueError(
                "model_init_kwargs and quantization_config apply to a model given as `str`, but the model is already "
                "loaded: pass them to `from_pretrained`."
            )
        check_model(model, ref_model, peft_config, args)
        tokenizer = prepare_tokenizer(processing_class, model, args)
        is_sharded = inner_model(model).is_distributed_loading_by_transformers or is_partitioned()
        if (objective.reads_logits or eval_dataset is not None) and not is_sharded:
            check_output_head(inner_model(model))

        # Scope
        copied_model = None
        if objective.reads_reference and args.reference_mode == "copy" and ref_model is None:
            if not is_sharded:  # refused with the other options below
                copied_model = copy.deepcopy(model)
        model = set_scope(model, peft_config, objective, args)
        if args.disable_dropout:
            disable_dropout_in_model(model)

        # Data
        topics = topics_of(train_dataset, args)
        retain_topics = None
        if topics is not None and retain_dataset is not None and args.topic_column in retain_dataset.column_names:
            retain_dataset, retain_topics = rows_of_topics(retain_dataset, topics, args), topics
        refusals = load_refusals(args.refusals) if objective.reads_alternative else None
        forget = prepare_dataset(train_dataset, tokenizer, args, "forget", topics, refusals)
        retain = None
        if retain_dataset is not None:
            retain = prepare_dataset(retain_dataset, tokenizer, args, "retain", retain_topics)
            if overlap := count_overlap(forget, retain):
                logger.warning(
                    f"{overlap} of {len(forget)} forget rows also stand in the retain set: they are pushed both ways. "
                    "Remove them from one of the two."
                )
        if eval_dataset is not None:
            eval_dataset = prepare_eval_dataset(eval_dataset, tokenizer, args)

        self.unread_layers = None
        if not is_sharded and not is_quantized(inner_model(model)):
            self.unread_layers = find_unread_layers(model, objective, args.device)

        with self._hiding_unread_layers():
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator
                or DataCollatorForUnlearning(pad_token_id=tokenizer.pad_token_id, padding_free=args.padding_free),
                train_dataset=PairedDataset(forget, retain),
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                compute_metrics=compute_metrics,
                callbacks=[_NoInputGradients(), *(callbacks or [])],
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            )

        self.forget_rows = train_dataset

        engine = engine_of(self)
        if self.unread_layers is not None and engine not in (None, "DDP"):
            self.unread_layers.remove()  # these place weights themselves
            self.unread_layers = None
        reference_kind = self._reference_kind(ref_model, peft_config) if objective.reads_reference else None
        check_options(engine, options_of(self, reference_kind))
        is_sharded = engine in SHARDED
        if engine in (None, "DDP"):  # the others keep such weights themselves
            hold_in_float32(self.model, args)
        warn_of_bf16_weights(self.model, args)

        # What makes it hold
        check_trained_weights(self.model, args)
        self.generators = Generators(args, is_sharded)
        self.weight_generator = self.generators.weights
        objective.noise_generator = self.generators.rows
        self.rounded_weights = None
        if args.quantization_margin != "none":
            self.rounded_weights = RoundedWeights(self.model, args.quantization_margin)
        self.null_space = None
        if args.retain_null_space is not None:
            self.null_space = RetainNullSpace(self.model, args.retain_null_space)
        self.weight_average = None
        if args.weight_averaging_start is not None:
            self.weight_average = WeightAverage(args.weight_averaging_start, args.weight_averaging_every)
        if self.null_space is not None or self.weight_average is not None:
            self.add_callback(_AfterStep(self.null_space, self.weight_average))
        if args.uses_probe:
            objective.probe = make_probe(self, forget, retain)
        self._micro_batches: list[dict] = []  # of the step that is being collected, where gradients are split

        # Reference and control vectors
        if objective.reads_reference:
            objective.reference = self._make_reference(reference_kind, ref_model or copied_model, objective)
        elif ref_model is not None:
            logger.warning(f"ref_model is not used: no loss among {args.forget_loss + args.retain_loss} reads it.")
        if not is_sharded and not self._is_partitioned:  # else it cannot run on its own before the first step
            with self.accelerator.autocast():
                objective.find_prefixes(self.model)
        if args.padding_free:
            with self.accelerator.autocast(), evaluation_mode(self.model):
                check_packing(inner_model(self.model), objective.last_layer)
            if "flash" not in inner_model(self.model).config.get_text_config()._attn_implementation:
                logger.warning(
                    "padding_free=True without FlashAttention computes the attention of all pairs of tokens in a "
                    "batch, which takes longer than padding but for very short rows: load the model with "
                    "attn_implementation='flash_attention_2', or remove padding_free."
                )
        self._topics = topics or ["all"]
        if "control_vector" in objective.all_reads:
            coefficient = math.nan if args.steering_coefficient is None else args.steering_coefficient
            objective.draw_control_vectors(
                num_topics=len(self._topics),
                hidden_size=inner_model(self.model).config.get_text_config().hidden_size,
                coefficients=self._per_topic(args.topic_steering_coefficients or {}, coefficient),
            )
        if "pdu" in args.forget_loss:
            objective.retain_multiplier = torch.tensor(args.pdu_initial_multiplier, device=args.device)
        if args.topic_retain_weights is not None:
            objective.topic_retain_weights = self._per_topic(args.topic_retain_weights, 1.0)
        self.objective = objective
        self.caches = self._make_caches(is_sharded)

        # Sums on the device since the last log, and whether every loss was finite; read when logging only
        self._metrics: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=args.device))
        self._constraint = torch.zeros((), device=args.device)  # the step's retain losses so far, for pdu
        self._metrics_steps = 0
        self._is_finite = torch.ones((), dtype=torch.bool, device=args.device)
        self._last_batch: tuple | None = None
        revision = (args.model_init_kwargs or {}).get("revision")
        self.record = RunRecord(self.model, objective.reference, forget, retain, revision)

    # ---- Construction ----

    def _hiding_unread_layers(self) -> AbstractContextManager:
        """While the whole model is moved to the device."""
        return nullcontext() if self.unread_layers is None else self.unread_layers.hidden()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with self._hiding_unread_layers():
            return super()._prepare_for_training(*args, **kwargs)

    def _reference_kind(self, ref_model: PreTrainedModel | None, peft_config: PeftConfig | None) -> str:
        if ref_model is not None:
            return SeparateModel.kind
        if self.args.reference_mode == "copy":
            return "copy"
        if self.args.reference_mode == "auto" and peft_config is not None and adapter_can_be_disabled(peft_config):
            return DisabledAdapter.kind
        return InitialWeights.kind

    def _make_reference(
        self, kind: str, separate_model: PreTrainedModel | None, objective: Objective
    ) -> DisabledAdapter | InitialWeights | SeparateModel:
        if separate_model is not None:
            if is_partitioned():
                separate_model = prepare_deepspeed(separate_model, self.accelerator).module
            reference = SeparateModel(separate_model)
            if not (is_partitioned() or inner_model(separate_model).is_distributed_loading_by_transformers):
                place(reference.model, objective, self.args.device)
            return reference
        if kind == DisabledAdapter.kind:
            return DisabledAdapter()
        reference = InitialWeights(self.model)
        reference.bind(self.model)  # refuses what it cannot swap before the first step
        return reference

    def _make_caches(self, is_sharded: bool) -> StepCaches | None:
        args = self.args
        if not args.precompute_ref_log_probs and args.prefix_cache is None:
            return None
        if is_sharded or self._is_partitioned or self.is_fsdp_enabled:
            raise ValueError(
                "precompute_ref_log_probs and prefix_cache are not supported for sharded models: one process would "
                "wait for another that reads from disk what it computes. Remove them, or use DDP."
            )
        if args.precompute_ref_log_probs:
            self.objective.check_targets(self.objective.policy(self.model))
        return StepCaches(self)

    @property
    def _is_partitioned(self) -> bool:
        """Whether DeepSpeed ZeRO-3 keeps a part of each weight on each process."""
        return self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3

    def _per_topic(self, values: dict[str, Any], default: float) -> Tensor:
        if unknown := set(values) - set(self._topics):
            raise ValueError(
                f"{len(unknown)} of the topics given weights are not among the {len(self._topics)} topics of the "
                f"forget set (column {self.args.topic_column!r}): check their spelling."
            )
        return torch.tensor([float(values.get(topic, default)) for topic in self._topics], device=self.args.device)

    # ---- Data ----

    def _get_train_sampler(self, train_dataset: PairedDataset | None = None) -> PairingSampler:
        dataset = train_dataset or self.train_dataset
        args = self.args
        has_topics = "topic" in dataset.forget.column_names
        retain_has_topics = dataset.retain is not None and "topic" in dataset.retain.column_names
        return PairingSampler(
            num_forget=len(dataset.forget),
            num_retain=0 if dataset.retain is None else len(dataset.retain),
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.train_sampling_strategy == "random",
            forget_topics=list(dataset.forget["topic"]) if has_topics else None,
            retain_topics=list(dataset.retain["topic"]) if retain_has_topics else None,
            step_size=self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict], dict[str, dict[str, Tensor]]]:
        """
        Collects the micro-batches of one optimizer step and counts, over all of them and all processes, what the
        losses are means over. The Trainer's own count reads flat `labels` only, and would be `None` here.
        """
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        self._metrics_steps += 1
        names = list(self.objective.reads)
        counts = torch.stack([sum(count_items(batch[name]) for batch in batches) for name in names]).to(device)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, "sum")
        counts = counts.clamp(min=1)  # a step of one-token answers has no later tokens
        self.objective.share_done = self.state.global_step / max(1, self.state.max_steps)
        if self.objective.unmeasured_topics:
            self._measure_topic(batches)
        if None in self.objective.adversary_radii.values():
            self._measure_radii(batches)
        return batches, {name: dict(zip(UNITS, row, strict=True)) for name, row in zip(names, counts, strict=True)}

    def _measure_topic(self, batches: list[dict]) -> None:
        """Adaptive RMU: what the first step of a topic measures, over all its micro-batches on all processes."""
        batches = [self._prepare_inputs(batch["forget"]) for batch in batches]
        # Waits for the device, but only until each topic has been seen
        topic = batches[0]["topic"].item() if "topic" in batches[0] else 0
        if topic in self.objective.unmeasured_topics:
            norms = self._mean_hidden_norms(batches, [self.args.hidden_layer], "position")
            self.objective.scale_control_vector(topic, norms[0])

    def _measure_radii(self, batches: list[dict]) -> None:
        """Latent adversary: its radii are relative to the norms of the first step's forget rows, and stay."""
        radii = self.objective.adversary_radii
        batches = [self._prepare_inputs(batch["forget"]) for batch in batches]
        norms = self._mean_hidden_norms(batches, sorted(radii), "attended")
        radii.update(zip(sorted(radii), self.args.latent_adversary_radius * norms, strict=True))

    @torch.no_grad()
    def _mean_hidden_norms(self, batches: list[dict], layers: list[int], unit: str) -> Tensor:
        """Mean norm of the hidden states after each layer, `(layers,)`, over the micro-batches of all processes."""
        unwrapped_model = self.accelerator.unwrap_model(self.model_wrapped)
        sums = [
            self._redirect(self.model_wrapped, self.objective.sum_hidden_norms, unwrapped_model, batch, layers, unit)
            for batch in batches
        ]
        norms, counts = self.accelerator.reduce(torch.stack(sums).sum(0), "sum").unbind(-1)
        return norms / counts

    # ---- Loss ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, dict[str, Tensor]], num_items_in_batch: Any = None
    ) -> Tensor:
        if self.unread_layers is not None and self.unread_layers.is_on_device:
            self.unread_layers.leave()  # an evaluation, or a callback, has run them
        if self.caches is not None:
            self.caches.load_targets(inputs)
        self.objective.share_activations(inputs)
        if self.caches is not None:
            self.caches.load_activations(inputs)
        if self.args.splits_gradients:
            loss = self._split_training_step(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.null_space is not None and self.accelerator.sync_gradients:
            self.null_space.project_gradients()
        return loss

    def _split_training_step(
        self, model: nn.Module, inputs: dict[str, dict[str, Tensor]], num_items: dict[str, dict[str, Tensor]]
    ) -> Tensor:
        model.train()
        self.optimizer.train()
        self._micro_batches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)  # the last micro-batch has the loss of all
        batches, self._micro_batches = self._micro_batches, []
        loss, metrics = self._set_split_gradients(model, batches, num_items)
        for batch in batches:
            self._store(batch)
        self._keep(loss, metrics, batches[-1], num_items)
        return loss * self.accelerator.num_processes

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, dict[str, Tensor]],
        return_outputs: bool = False,
        num_items_in_batch: dict[str, dict[str, Tensor]] | None = None,
    ) -> Tensor:
        loss, metrics = self._compute_objective(model, inputs, num_items_in_batch)
        self._store(inputs)  # the graph holds what the backward needs
        self._keep(loss.detach(), metrics, inputs, num_items_in_batch)
        # Each process normalised by the counts of all, and DDP averages gradients over processes.
        return loss * self.accelerator.num_processes

    def _store(self, inputs: dict[str, dict[str, Tensor]]) -> None:
        """Writes what is new to the caches, and frees what passes have left behind for each other."""
        if self.caches is not None:
            self.caches.store(inputs)
        drop_activations(inputs)

    def _keep(
        self,
        loss: Tensor,
        metrics: dict[str, Tensor],
        inputs: dict[str, dict[str, Tensor]],
        num_items: dict[str, dict[str, Tensor]],
    ) -> None:
        """Adds what was computed to what is logged and checked."""
        for name, value in metrics.items():
            self._metrics[name] += value
        self._is_finite &= loss.isfinite()
        self._last_batch = (inputs, num_items)
        if self.objective.retain_multiplier is not None:
            self._constraint += metrics["retain/constraint"]
            if self.accelerator.sync_gradients:  # the last micro-batch of the step: the next step has the new one
                self._update_retain_multiplier()

    def _update_retain_multiplier(self) -> None:
        value = self.accelerator.reduce(self._constraint, "sum")  # each process holds its part of the mean
        if self.state.epoch >= self.args.pdu_warmup_epochs:
            self.objective.update_retain_multiplier(value)
        self._constraint = torch.zeros_like(value)

    def _decoder(self, model: PreTrainedModel | PeftModel) -> Decoder:
        return self.objective.policy(model)

    # ---- Logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log, not an evaluation or the closing summary
            logs.update(self._read_metrics())
            self._require_finite()
        super().log(logs, start_time)

    def _read_metrics(self) -> dict[str, float]:
        """Means per optimizer step since the last log. The one place where the training loop waits for the device."""
        if not self._metrics:
            return {}
        values = torch.stack(list(self._metrics.values())).float()
        values = self.accelerator.reduce(values, "sum")  # each process holds its part of the sums
        metrics = dict(zip(self._metrics, (values / self._metrics_steps).tolist(), strict=True))
        self._metrics.clear()
        self._metrics_steps = 0
        if self.objective.retain_multiplier is not None:
            metrics["retain/multiplier"] = self.objective.retain_multiplier.item()
        return metrics

    def _require_finite(self) -> None:
        """Stops when a loss since the start was NaN or infinite, on all processes alike."""
        if bool(self.accelerator.gather(self._is_finite.unsqueeze(0)).all()):
            return
        checkpoint = self.record.last_checkpoint
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been saved yet"
        raise NonFiniteLossError(
            f"The loss became NaN or infinite by step {self.state.global_step}; {kept}. Lower the learning rate, "
            "raise a retain weight, or clip gradients (max_grad_norm)."
        )

    @torch.no_grad()
    def _require_finite_after_update(self) -> None:
        """Computes the last micro-batch's loss again: the update after it may be the one that broke the weights."""
        if self._last_batch is not None:
            self.model_wrapped.eval()  # dropout would draw random numbers
            # Without the noise of training: a checkpoint must not change what is drawn after it
            if self.caches is not None:
                self.caches.load_targets(self._last_batch[0])
            loss, _ = self._compute_objective(self.model_wrapped, *self._last_batch, is_augmented=False)
            drop_activations(self._last_batch[0])
            self.model_wrapped.train()
            self._is_finite &= loss.isfinite()
        self._require_finite()

    # ---- Checkpoints ----

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self.null_space is not None:
            measure_null_space(self, self.null_space)
        if self.caches is not None:
            self.caches.require_room(self)
        result = super().train(*args, **kwargs)
        if self.weight_average is not None:
            self.weight_average.apply(trained_parameters(self.model))
        self._require_finite_after_update()
        self._last_batch = None
        return result

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._require_finite_after_update()
        super()._save_checkpoint(model, trial)
        folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        # Gathered from all processes
        random_state = self.generators.state(self.accelerator)
        averaged = {} if self.weight_average is None else self.weight_average.state()
        if self.args.should_save:
            save_state(folder, self.objective, self.record, self.state.global_step, random_state, averaged)
        self.record.last_checkpoint = folder

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_state(
            resume_from_checkpoint, self.objective, self.record, self.generators, self.weight_average, self.args
        )
        self.record.last_checkpoint = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)
