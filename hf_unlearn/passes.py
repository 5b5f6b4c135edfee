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
"""What the losses of a run read, and the passes over a micro-batch that compute that and nothing else."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from .config import UnlearnConfig
from .forward import (
    BackboneOutput,
    Decoder,
    Pass,
    evaluation_mode,
    gather_predicting,
    redirect_forward,
    token_log_probs,
    token_values,
)
from .losses import FORGET_LOSSES, HIDDEN_READS, PROBE_LOSS, REFERENCE_READS, RETAIN_LOSSES, Loss
from .prefix import Activations, Prefix, find_prefix, same_prefix
from .reference import Reference, SeparateModel, Targets, inner_model
from .robustness.noise import add_noise
from .robustness.probe import RobustProbe
from .scope import parse_layers


# A padded batch of one set (`DataCollatorForUnlearning`), or the tensors computed from it, by name. A batch may also
# have `activations`, what frozen layers made of it, and `targets`, what the reference gives for it.
Tensors = dict[str, Tensor]


class Term(NamedTuple):
    """One summand of the objective."""

    name: str
    loss: Loss
    weight: float


class Passes:
    """
    The terms of a run's objective, what they read, and the passes of policy and reference that compute it.

    Args:
        args ([`UnlearnConfig`]): names, weights and settings of the losses.

    Attributes:
        terms (`dict[str, list[Term]]`): the summands of each group: `"forget"`, with a probe `"probe"`, and unless
            nothing is kept `"retain"`. The rows of the first two are those to forget.
        reads (`dict[str, set[str]]`): what is computed from the rows of `"forget"`, `"alternative"` (other answers to
            the forget prompts) and `"retain"`; only sets that a loss reads.
        reference ([`~hf_unlearn.reference.Reference`], *optional*): the frozen model, where a loss reads it.
        control_vectors (`dict[str, torch.Tensor]`): per loss that reads one, `(topics, D)`.
        circuit_breaker_layers (`list[int]`): layers whose outputs `circuit_breaker` reads.
        adversary_radii (`dict[int, torch.Tensor | None]`): by layer that the latent adversary changes, how far; `None`
            until it is measured.
        probe ([`~hf_unlearn.robustness.probe.RobustProbe`], *optional*): the frozen probe.
        noise_generator (`torch.Generator`, *optional*): draws the noise on the reference; its own on every process.
        prefixes (`dict[str, Prefix]`): by rows, what of the model no training moves, and is computed once; see
            [`~hf_unlearn.prefix.Prefix`].
        is_prefix_of_reference (`bool`): whether the reference is the same there.
    """

    def __init__(self, args: UnlearnConfig):
        self.args = args
        self.terms = {"forget": _terms(args.forget_loss, FORGET_LOSSES, args.forget_loss_weights)}
        if args.uses_probe:
            self.terms["probe"] = [Term("probe", PROBE_LOSS, args.probe_weight or args.probe_weight_ratio)]
        if args.retain_loss != ["none"]:
            self.terms["retain"] = _terms(args.retain_loss, RETAIN_LOSSES, args.retain_loss_weights)
        self.reads = self.reads_of(self.terms)
        self.reference: Reference | None = None
        self.control_vectors: dict[str, Tensor] = {}
        self.circuit_breaker_layers: list[int] = []
        self.adversary_radii: dict[int, Tensor | None] = {}
        self.probe: RobustProbe | None = None
        self.noise_generator: torch.Generator | None = None
        self.prefixes: dict[str, Prefix] = {}
        self.is_prefix_of_reference = False
        self._policy: Decoder | None = None
        self._original: Decoder | None = None

    def bind_layers(self, num_layers: int) -> None:
        """
        Checks the layers that the configuration names against the model's number of layers.

        Raises:
            `ValueError`: there is no such layer, or what happens there reaches no loss.
        """
        args, forget_side = self.args, set()
        for rows, reads in self.reads.items():
            forget_side |= reads if rows != "retain" else set()
        if args.circuit_breaker_layers is not None:
            self.circuit_breaker_layers = parse_layers(
                args.circuit_breaker_layers, num_layers, name="circuit_breaker_layers"
            )
        if args.latent_adversary_layers is not None:
            layers = parse_layers(args.latent_adversary_layers, num_layers, name="latent_adversary_layers")
            self.adversary_radii = dict.fromkeys(layers)
            self._require_reach("latent_adversary_layers", max(layers), forget_side)
        if "hidden_states" in self.all_reads:
            _require_layer("hidden_layer", args.hidden_layer, num_layers)
        if args.reference_noise_std > 0:
            _require_layer("reference_noise_layer", self.noise_layer, num_layers)
            read = self.reads["retain"] & REFERENCE_READS
            self._require_reach("reference_noise_layer", self.noise_layer, read)

    def _require_reach(self, name: str, layer: int, reads: set[str]) -> None:
        """Refuses a layer above the last one that runs for what is read."""
        if not reads <= HIDDEN_READS:
            return
        last = max(self.layers_of(reads))
        if layer > last:
            raise ValueError(
                f"{name} {layer} lies above layer {last}, the last one whose output a loss reads there: choose {name} "
                f"up to {last}."
            )

    @property
    def noise_layer(self) -> int:
        layer = self.args.reference_noise_layer
        return self.args.hidden_layer if layer is None else layer

    def layers_of(self, reads: set[str]) -> list[int]:
        """The layers whose outputs are read."""
        layers = set()
        if reads & {"hidden_states", "reference_hidden_states"}:
            layers.add(self.args.hidden_layer)
        if reads & {"layer_states", "reference_layer_states"}:
            layers.update(self.circuit_breaker_layers)
        if reads & {"probe_log_probs"} and self.probe is not None:
            layers.add(self.probe.layer)
        return sorted(layers)

    def reads_of(self, groups: Iterable[str]) -> dict[str, set[str]]:
        """What the losses of some groups read, by the rows from which it is computed."""
        reads: dict[str, set[str]] = {}
        for group in groups:
            for term in self.terms[group]:
                names = term.loss.all_reads
                alternative = {name for name in names if name.startswith("alternative_")}
                reads.setdefault(rows_of(term, group), set()).update(names - alternative)
                if alternative:
                    computed = {name.removeprefix("alternative_") for name in alternative} - {"mask"}
                    reads.setdefault("alternative", set()).update(computed)
        if "retain" in reads and "probe" in self.terms:
            reads["retain"].add("probe_log_probs")  # its confidence there is logged
        return reads

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
    def last_layer(self) -> int | None:
        """The last layer that a step runs; `None` where it runs all, or a probe has yet to choose its layer."""
        return None if self.reads_logits or self.args.uses_probe else max(self.layers_of(self.all_reads))

    @property
    def reads_reference(self) -> bool:
        return bool(self.all_reads & REFERENCE_READS)

    @property
    def reads_alternative(self) -> bool:
        return "alternative" in self.reads

    def settings_of(self, term: Term) -> dict[str, float]:
        """The settings of one loss: those of the configuration, else the published ones."""
        configured = {name: getattr(self.args, name) for name in term.loss.settings}
        return {
            name: published if configured[name] is None else configured[name]
            for name, published in term.loss.settings.items()
        }

    def find_prefixes(self, model: PreTrainedModel | PeftModel) -> None:
        """
        Finds what is computed once for policy and reference, when both and the probe are there.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): the model before the first step.
        """
        with evaluation_mode(model):
            for rows, names in self.reads.items():
                # The adversary changes what is forgotten, the noise what the reference makes of what is kept
                changed = list(self.adversary_radii) if rows != "retain" else []
                if rows == "retain" and self.args.reference_noise_std > 0:
                    changed.append(self.noise_layer)
                lowest = [min(layers, default=None) for layers in (self.layers_of(names), changed)]
                prefix = find_prefix(inner_model(model), *lowest, self.last_layer)
                if prefix is not None:
                    self.prefixes[rows] = prefix
        self.is_prefix_of_reference = self.reference is not None and all(
            not isinstance(self.reference, SeparateModel)
            or same_prefix(inner_model(model), inner_model(self.reference.model), prefix)
            for prefix in self.prefixes.values()
        )

    def share_activations(self, inputs: dict[str, Tensors]) -> None:
        """
        Lets all passes over a micro-batch go on from what frozen layers gave in the first one; in place. Only sets
        that are run more than once.

        Args:
            inputs (`dict[str, dict[str, torch.Tensor]]`): one batch per set.
        """
        for rows, prefix in self.prefixes.items():
            is_read = bool(self.reads[rows] & REFERENCE_READS) and not _is_loaded(inputs[rows])
            has_reference = self.is_prefix_of_reference and is_read
            is_repeated = self.args.splits_gradients or bool(self.adversary_radii)
            if has_reference or (is_repeated and rows != "retain"):
                inputs[rows]["activations"] = Activations(prefix)

    def policy(self, model: PreTrainedModel | PeftModel) -> Decoder:
        """The decoder of the trained model, made anew only when the model object changes (accelerate replaces it)."""
        model = inner_model(model)
        if self._policy is None or self._policy.model is not model:
            self._policy = Decoder(model)
        return self._policy

    def sum_hidden_norms(
        self, model: PreTrainedModel | PeftModel, batch: Tensors, layers: list[int], unit: str
    ) -> Tensor:
        """
        Per layer the sum of the norms of the hidden states, and the number of those, `(layers, 2)` fp32.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): the model.
            batch (`dict[str, torch.Tensor]`): one padded batch.
            layers (`list[int]`): layers.
            unit (`str`): `"position"` for labelled positions, `"attended"` for all but padding.
        """
        hidden_states = self.policy(model).run(batch, layers, last_hidden_state=False).hidden_states
        mask = batch["attention_mask"].bool() if unit == "attended" else counted_mask(batch, unit)
        norms = [hidden_states[layer].float().norm(dim=-1).masked_fill(~mask, 0.0).sum() for layer in layers]
        return torch.stack([torch.stack(norms), mask.sum().float().expand(len(layers))], dim=-1)

    @torch.no_grad()
    def read_reference(
        self,
        model: nn.Module,
        inputs: dict[str, Tensors],
        groups: tuple[str, ...] | None = None,
        is_augmented: bool = True,
    ) -> dict[str, Tensors]:
        """What the losses of some groups (all where unset) read of the frozen model, for all sets in one go."""
        reads = {rows: names & REFERENCE_READS for rows, names in self.reads_of(groups or self.terms).items()}
        if self.reference is None or not any(reads.values()):
            return {}
        computed = {rows: names for rows, names in reads.items() if names and not _is_loaded(inputs[rows])}
        outputs = self._compute_reference(model, inputs, computed, is_augmented) if computed else {}
        for rows, names in reads.items():
            if names and "targets" in inputs[rows]:
                outputs[rows] = self._target_tensors(model, inputs[rows]["targets"], rows, outputs, is_augmented)
        return outputs

    def _target_tensors(
        self,
        model: nn.Module,
        targets: Targets,
        rows: str,
        outputs: dict[str, Tensors],
        is_augmented: bool,
    ) -> Tensors:
        """What is on disk, or will be, with fresh noise."""
        if targets.is_loaded:
            own = self.reference.model if isinstance(self.reference, SeparateModel) else model
            self._bind_original(inner_model(own))  # its head
        else:
            targets.tensors.update(outputs[rows])
        tensors = dict(targets.tensors)
        if rows == "retain" and is_augmented and self.args.reference_noise_std > 0:
            hidden = tensors["reference_hidden_states"]
            tensors["reference_hidden_states"] = self._noise()[self.noise_layer](hidden)
        return tensors

    def check_targets(self, decoder: Decoder) -> None:
        """
        Refuses to keep what the reference gives where that would be another thing in every step, or too large.

        Args:
            decoder ([`~hf_unlearn.forward.Decoder`]): the policy.

        Raises:
            `ValueError`: naming the fix.
        """
        if not self.reads_reference:
            raise ValueError(
                "precompute_ref_log_probs=True keeps what the reference gives, and no loss among "
                f"{', '.join(self.args.forget_loss + self.args.retain_loss)} reads one: remove it."
            )
        if "reference_logits" in self.all_reads and (
            decoder.head.is_trained and not isinstance(self.reference, SeparateModel)
        ):
            raise ValueError(
                "precompute_ref_log_probs=True would keep whole distributions of the reference, because the head is "
                "trained: freeze the head, choose logprob_mse instead of kl, or remove it."
            )
        if self.args.reference_noise_std > 0:
            read = self.reads["retain"] & REFERENCE_READS
            if read != {"reference_hidden_states"} or self.noise_layer != self.args.hidden_layer:
                raise ValueError(
                    "precompute_ref_log_probs=True cannot keep targets that come out of reference_noise_std below "
                    "them, as the noise is another one in every step: use hidden_mse alone with reference_noise_layer "
                    "equal to hidden_layer, or remove one of the two."
                )

    def _compute_reference(
        self, model: nn.Module, inputs: dict[str, Tensors], reads: dict[str, set[str]], is_augmented: bool
    ) -> dict[str, Tensors]:
        if isinstance(self.reference, SeparateModel):
            original = self.reference.model  # never in training mode
            return redirect_forward(
                original, original, self._run_reference, inner_model(original), inputs, reads, is_augmented
            )
        with self.reference.active(model) as original, self._without_dropout(original):
            return self._run_reference(original, inputs, reads, is_augmented)

    def _bind_original(self, original: PreTrainedModel) -> Decoder:
        if self._original is None or self._original.model is not original:
            self._original = Decoder(original)
        return self._original

    def _run_reference(
        self, original: PreTrainedModel, inputs: dict[str, Tensors], reads: dict[str, set[str]], is_augmented: bool
    ) -> dict[str, Tensors]:
        decoder, outputs = self._bind_original(original), {}
        passes = {
            rows: Pass(
                inputs[rows],
                self.layers_of(names),
                last_hidden_state=bool(names & {"reference_log_probs", "reference_logits"}),
                changes=self._noise() if rows == "retain" and is_augmented and "targets" not in inputs[rows] else {},
                activations=inputs[rows].get("activations") if self.is_prefix_of_reference else None,
            )
            for rows, names in reads.items()
        }
        for rows, output in decoder.run_all(passes).items():
            batch, names = inputs[rows], reads[rows]
            tensors = self._hidden_tensors(output.hidden_states, names, prefix="reference_")
            if output.last_hidden_state is not None:
                hidden = gather_predicting(output.last_hidden_state, batch["label_index"])
                if "reference_log_probs" in names:
                    tensors["reference_log_probs"] = token_log_probs(decoder.head, hidden, batch)
                if "reference_logits" in names:
                    tensors["distribution"] = decoder.head(hidden) if self._keeps_logits(decoder) else hidden
            outputs[rows] = tensors
        return outputs

    def _noise(self) -> dict[int, Callable[[Tensor], Tensor]]:
        """Random noise augmentation: what happens to the reference's residual stream on the retain rows."""
        std, generator = self.args.reference_noise_std, self.noise_generator
        return {self.noise_layer: lambda hidden: add_noise(hidden, std, generator)} if std > 0 else {}

    def _hidden_tensors(self, hidden_states: dict[int, Tensor], names: set[str], prefix: str = "") -> Tensors:
        tensors = {}
        if f"{prefix}hidden_states" in names:
            tensors[f"{prefix}hidden_states"] = hidden_states[self.args.hidden_layer]
        if f"{prefix}layer_states" in names:
            states = [hidden_states[layer] for layer in self.circuit_breaker_layers]
            tensors[f"{prefix}layer_states"] = torch.stack(states)
        return tensors

    def _run_policy(
        self,
        model: nn.Module,
        inputs: dict[str, Tensors],
        groups: tuple[str, ...],
        reference: dict[str, Tensors],
        changes: dict[tuple[str, int], Tensor],
    ) -> dict[str, Tensors]:
        """The tensors that the losses of the groups read, by rows, those of the reference included."""
        tensors, reads = {}, self.reads_of(groups)
        decoder = self.policy(model)
        passes = {
            rows: Pass(
                inputs[rows],
                self.layers_of(names),
                last_hidden_state=bool(names & {"log_probs", "token_values"}),
                changes={layer: _adder(change) for (where, layer), change in changes.items() if where == rows},
                activations=inputs[rows].get("activations"),
            )
            for rows, names in reads.items()
        }
        for rows, output in decoder.run_all(passes).items():
            terms = [term for group in groups for term in self.terms[group] if rows_of(term, group) == rows]
            tensors[rows] = self._read_rows(
                decoder, output, inputs[rows], rows, reads[rows], terms, reference.get(rows, {})
            )
        if "alternative" in tensors:
            forget = tensors.setdefault("forget", {})
            forget.update({f"alternative_{name}": value for name, value in tensors["alternative"].items()})
            forget["alternative_mask"] = counted_mask(inputs["alternative"], "token")
        return tensors

    def _read_rows(
        self,
        decoder: Decoder,
        output: BackboneOutput,
        batch: Tensors,
        rows: str,
        names: set[str],
        terms: list[Term],
        original: Tensors,
    ) -> Tensors:
        tensors = {**original, **self._hidden_tensors(output.hidden_states, names)}
        if "probe_log_probs" in names:
            with nullcontext() if rows == "forget" else torch.no_grad():  # on retain rows for the log alone
                tensors["probe_log_probs"] = self.probe.log_prob_harmless(
                    output.hidden_states[self.probe.layer], batch["attention_mask"]
                )
        if rows == "forget":
            for name, vectors in self.control_vectors.items():
                tensors[f"control_vector/{name}"] = of_topic(vectors, batch)
        if output.last_hidden_state is None:
            return tensors
        hidden = gather_predicting(output.last_hidden_state, batch["label_index"])
        if "log_probs" in names:
            tensors["log_probs"] = token_log_probs(decoder.head, hidden, batch)
        for term in terms:
            if term.loss.token_function is not None:
                tensors[f"token_values/{term.name}"] = self._token_values(term, decoder, hidden, batch, original)
        return tensors

    def _token_values(self, term: Term, decoder: Decoder, hidden: Tensor, batch: Tensors, original: Tensors) -> Tensor:
        token_function, settings = term.loss.token_function, self.settings_of(term)
        own_settings = {name: settings[name] for name in token_function.settings}

        def function(logits: Tensor, labels: Tensor, reference_logits: Tensor | None) -> Tensor:
            available = {"labels": labels, "reference_logits": reference_logits}
            inputs = (available[name] for name in token_function.inputs)
            return token_function.function(logits, *inputs, **own_settings)

        if "reference_logits" not in token_function.inputs:
            return token_values(decoder.head, hidden, batch, function)
        reference_head = _identity if self._keeps_logits(self._original) else self._original.head
        return token_values(decoder.head, hidden, batch, function, reference_head, original["distribution"])

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
        return nullcontext() if self.args.disable_dropout else evaluation_mode(model)


def counted_mask(batch: Tensors, unit: str) -> Tensor:
    """The `(B, T)` positions that count in a loss of this unit."""
    labelled = batch["labels"] != -100
    if unit == "position":
        return labelled
    predicted = labelled.clone()
    predicted[:, 0] = False  # nothing predicts the first token
    return predicted & (predicted.cumsum(-1) > 1) if unit == "later_token" else predicted


def _require_layer(name: str, layer: int, num_layers: int) -> None:
    if layer >= num_layers:
        raise ValueError(
            f"{name}={layer}, but the model has {num_layers} layers: 0 to {num_layers - 1}. Set {name} to one of "
            "these."
        )


def _terms(names: list[str], table: dict[str, Loss], weights: list[float] | None) -> list[Term]:
    weights = weights or [1.0] * len(names)
    return [Term(name, table[name], weight) for name, weight in zip(names, weights, strict=True)]


def rows_of(term: Term, group: str) -> str:
    """The set from whose rows a term of a group is computed."""
    return group if group == "retain" else term.loss.rows


def _is_loaded(batch: Tensors) -> bool:
    return "targets" in batch and batch["targets"].is_loaded


def _adder(change: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda hidden: hidden + change.to(hidden.dtype)


def of_topic(values: Tensor, batch: Tensors) -> Tensor:
    """Row of `values` for the batch's topic. `values[topic]` would read the topic back to the host."""
    return values.index_select(0, batch["topic"].view(1)).squeeze(0) if "topic" in batch else values[0]


def _identity(logits: Tensor) -> Tensor:
    return logits
