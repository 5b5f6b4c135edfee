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
"""The objective of one micro-batch: what the losses read is computed, nothing else, and summed with weights."""

from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from .config import UnlearnConfig
from .forward import Decoder, gather_predicting, redirect_forward, token_kl, token_log_probs
from .losses import FORGET_LOSSES, HIDDEN_READS, REFERENCE_READS, RETAIN_LOSSES, Loss
from .reference import Reference, SeparateModel, inner_model


# A padded batch of one set (`DataCollatorForUnlearning`), or the tensors computed from it, by name
Tensors = dict[str, Tensor]


class Term(NamedTuple):
    """One summand of the objective."""

    name: str
    loss: Loss
    weight: float


class Objective:
    """
    The weighted sum of the forget and retain losses of a run.

    Args:
        args ([`UnlearnConfig`]): names, weights and settings of the losses.

    Attributes:
        terms (`dict[str, list[Term]]`): the summands of `"forget"` and, unless nothing is kept, `"retain"`.
        reference ([`~hf_unlearn.reference.Reference`], *optional*): the frozen model, where a loss reads it.
        control_vectors (`torch.Tensor` of shape `(topics, D)`, *optional*): targets of `rmu`, one per topic.
        topic_retain_weights (`torch.Tensor` of shape `(topics,)`, *optional*): factor on the retain losses per topic.
    """

    def __init__(self, args: UnlearnConfig):
        self.args = args
        self.terms = {"forget": _terms(args.forget_loss, FORGET_LOSSES, args.forget_loss_weights)}
        if args.retain_loss != ["none"]:
            self.terms["retain"] = _terms(args.retain_loss, RETAIN_LOSSES, args.retain_loss_weights)
        self.reads = {name: {read for term in terms for read in term.loss.reads} for name, terms in self.terms.items()}
        self.reference: Reference | None = None
        self.control_vectors: Tensor | None = None
        self.topic_retain_weights: Tensor | None = None
        self._policy: Decoder | None = None
        self._original: Decoder | None = None

    @property
    def all_reads(self) -> set[str]:
        return set().union(*self.reads.values())

    @property
    def reads_hidden(self) -> bool:
        return bool(self.all_reads & HIDDEN_READS)

    @property
    def reads_logits(self) -> bool:
        return not self.all_reads <= HIDDEN_READS

    @property
    def reads_reference(self) -> bool:
        return bool(self.all_reads & REFERENCE_READS)

    def compute(
        self, model: PreTrainedModel | PeftModel, inputs: dict[str, Tensors], num_items: dict[str, Tensors]
    ) -> tuple[Tensor, Tensors]:
        """
        The objective of one micro-batch. Runs as the forward of the wrapped model, see `redirect_forward`.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): the model, without DDP's wrapper.
            inputs (`dict[str, dict[str, torch.Tensor]]`): one batch per set.
            num_items (`dict[str, dict[str, torch.Tensor]]`): per set, the number of sequences, tokens and positions
                in the whole optimizer step.

        Returns:
            `tuple[torch.Tensor, dict[str, torch.Tensor]]`: this micro-batch's part of the objective and of the
            metrics.
        """
        # The reference first: its swap must not fall between a policy forward and the backward.
        original = self._run_reference(model, inputs)
        total, metrics = torch.zeros((), device=inputs["forget"]["input_ids"].device), {}
        for set_name, terms in self.terms.items():
            batch = inputs[set_name]
            tensors = self._run_policy(model, batch, self.reads[set_name], original.get(set_name, {}))
            labelled = batch["labels"] != -100
            predicted = labelled.clone()
            predicted[:, 0] = False  # nothing predicts the first token
            for name, loss, weight in terms:
                value, loss_metrics = loss.function(
                    *(tensors[read] for read in loss.reads),
                    mask=labelled if loss.unit == "position" else predicted,
                    num_items=num_items[set_name][loss.unit],
                    **{setting: getattr(self.args, setting) for setting in loss.settings},
                )
                if set_name == "retain" and self.topic_retain_weights is not None:
                    weight = weight * _of_topic(self.topic_retain_weights, inputs["forget"])
                total = total + weight * value
                metrics[f"{set_name}/{name}"] = value.detach()
                metrics.update({f"{set_name}/{key}": entry for key, entry in loss_metrics.items()})
        return total, metrics

    def policy(self, model: PreTrainedModel | PeftModel) -> Decoder:
        """The decoder of the trained model, made anew only when the model object changes (accelerate replaces it)."""
        model = inner_model(model)
        if self._policy is None or self._policy.model is not model:
            self._policy = self._decoder(model)
        return self._policy

    def _decoder(self, model: PreTrainedModel) -> Decoder:
        return Decoder(model, self.args.hidden_layer if self.reads_hidden else None)

    @torch.no_grad()
    def _run_reference(self, model: nn.Module, inputs: dict[str, Tensors]) -> dict[str, Tensors]:
        """What the losses read of the frozen model, for both sets in one go."""
        if self.reference is None:
            return {}
        if isinstance(self.reference, SeparateModel):
            original = self.reference.model  # never in training mode
            return redirect_forward(original, original, self._read_reference, inner_model(original), inputs)
        with self.reference.active(model) as original, self._without_dropout(original):
            return self._read_reference(original, inputs)

    def _read_reference(self, original: PreTrainedModel, inputs: dict[str, Tensors]) -> dict[str, Tensors]:
        if self._original is None or self._original.model is not original:
            self._original = self._decoder(original)
        decoder, outputs = self._original, {}
        for set_name, reads in self.reads.items():
            if not reads & REFERENCE_READS:
                continue
            batch, tensors = inputs[set_name], {}
            output = decoder.run(
                batch,
                hidden_states="reference_hidden_states" in reads,
                last_hidden_state=bool(reads & {"reference_log_probs", "token_kl"}),
            )
            if "reference_hidden_states" in reads:
                tensors["reference_hidden_states"] = output.hidden_states
            if output.last_hidden_state is not None:
                hidden = gather_predicting(output.last_hidden_state, batch["label_index"])
                if "reference_log_probs" in reads:
                    tensors["reference_log_probs"] = token_log_probs(decoder.head, hidden, batch)
                if "token_kl" in reads:
                    tensors["distribution"] = decoder.head(hidden) if self._keeps_logits(decoder) else hidden
            outputs[set_name] = tensors
        return outputs

    def _run_policy(self, model: nn.Module, batch: Tensors, reads: set[str], original: Tensors) -> Tensors:
        """The tensors that one set's losses read, those of the reference included."""
        decoder = self.policy(model)
        output = decoder.run(
            batch, hidden_states="hidden_states" in reads, last_hidden_state=bool(reads & {"log_probs", "token_kl"})
        )
        tensors = dict(original)
        if "hidden_states" in reads:
            tensors["hidden_states"] = output.hidden_states
        if "control_vector" in reads:
            tensors["control_vector"] = _of_topic(self.control_vectors, batch)
        if output.last_hidden_state is not None:
            hidden = gather_predicting(output.last_hidden_state, batch["label_index"])
            if "log_probs" in reads:
                tensors["log_probs"] = token_log_probs(decoder.head, hidden, batch)
            if "token_kl" in reads:
                reference_head = _identity if self._keeps_logits(self._original) else self._original.head
                tensors["token_kl"] = token_kl(decoder.head, hidden, reference_head, original["distribution"], batch)
        return tensors

    def _keeps_logits(self, decoder: Decoder) -> bool:
        """
        Whether the reference's distribution is kept as `(N, V)` logits. Its hidden states say as much, and the head
        turns them into logits chunk by chunk later, unless that head will be another by then (it is trained, and
        swapped out again) or out of reach (sharded, outside its own model's forward).
        """
        if isinstance(self.reference, SeparateModel):
            return decoder.head.is_sharded
        return decoder.head.is_trained

    def _without_dropout(self, model: nn.Module) -> Any:
        return nullcontext() if self.args.disable_dropout else _evaluation_mode(model)


def score_rows(decoder: Decoder, batch: Tensors, with_logits: bool) -> tuple[Tensor, Tensor | None]:
    """
    Each row's summed negative log-likelihood (nats) and number of predicted tokens, `(B, 2)` fp32.

    Args:
        decoder ([`~hf_unlearn.forward.Decoder`]): the model.
        batch (`dict[str, torch.Tensor]`): one padded batch.
        with_logits (`bool`): also return all logits, `(B, T, vocabulary)` fp32.
    """
    last_hidden_state = decoder.run(batch, hidden_states=False, last_hidden_state=True).last_hidden_state
    hidden = gather_predicting(last_hidden_state, batch["label_index"])
    nll = -token_log_probs(decoder.head, hidden, batch).sum(-1)
    rows = torch.stack([nll, (batch["labels"][:, 1:] != -100).sum(-1)], dim=-1)
    return rows, decoder.head(last_hidden_state) if with_logits else None


def count_items(batch: Tensors) -> Tensor:
    """Sequences, predicted tokens and labelled positions of one batch: what `Loss.unit` is a mean over, `(3,)`."""
    labels = batch["labels"]
    positions = (labels != -100).sum()
    sequences = torch.full_like(positions, labels.shape[0])  # filled on the device: no copy to wait for
    return torch.stack([sequences, (labels[:, 1:] != -100).sum(), positions]).float()


def _terms(names: list[str], table: dict[str, Loss], weights: list[float] | None) -> list[Term]:
    weights = weights or [1.0] * len(names)
    return [Term(name, table[name], weight) for name, weight in zip(names, weights, strict=True)]


def _of_topic(values: Tensor, batch: Tensors) -> Tensor:
    """Row of `values` for the batch's topic. `values[topic]` would read the topic back to the host."""
    return values.index_select(0, batch["topic"].view(1)).squeeze(0) if "topic" in batch else values[0]


def _identity(logits: Tensor) -> Tensor:
    return logits


@contextmanager
def _evaluation_mode(model: nn.Module) -> Any:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
