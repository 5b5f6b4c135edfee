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
"""The objective of one micro-batch: the losses, of what they read, summed with weights."""

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from .config import UnlearnConfig
from .forward import Decoder, gather_predicting, token_log_probs
from .losses import PROBE_LOSS, STEERING_COEFFICIENTS
from .passes import Passes, Tensors, Term, counted_mask, of_topic, rows_of
from .reference import inner_model
from .robustness.latent_adversary import find_perturbations


UNITS = ("sequence", "token", "later_token", "position")


class Objective(Passes):
    """
    The weighted sum of the forget and retain losses of a run.

    Args:
        args ([`UnlearnConfig`]): names, weights and settings of the losses.

    Attributes, beside those of [`~hf_unlearn.passes.Passes`]:
        unmeasured_topics (`set[int]`): topics whose control vector of `adaptive_rmu` still has length 1.
        retain_multiplier (`torch.Tensor`, *optional*): scalar factor on the retain losses, for `pdu`.
        topic_retain_weights (`torch.Tensor` of shape `(topics,)`, *optional*): factor on the retain losses per topic.
        share_done (`float`): optimizer steps done over all steps, which some weights follow.
        probe_factor (`torch.Tensor`, *optional*): weight of the probe, where it is relative to the gradients.
    """

    def __init__(self, args: UnlearnConfig):
        super().__init__(args)
        self.unmeasured_topics: set[int] = set()
        self.retain_multiplier: Tensor | None = None
        self.topic_retain_weights: Tensor | None = None
        self.share_done = 0.0
        self.probe_factor: Tensor | None = None

    def draw_control_vectors(self, num_topics: int, hidden_size: int, coefficients: Tensor | None) -> None:
        """
        Draws a unit vector per loss and topic, from the run's seed, and gives it its length.

        Args:
            num_topics (`int`): number of topics.
            hidden_size (`int`): size of the hidden states.
            coefficients (`torch.Tensor` of shape `(topics,)`): lengths, NaN for the published one of each loss.
        """
        for term in self.terms["forget"]:
            if term.loss.control_vector is None:
                continue
            generator = torch.Generator().manual_seed(self.args.seed)
            draw = {"uniform": torch.rand, "gaussian": torch.randn}[term.loss.control_vector]
            directions = draw(num_topics, hidden_size, generator=generator)
            directions = (directions / directions.norm(dim=-1, keepdim=True)).to(coefficients.device)
            if term.name == "adaptive_rmu":
                self.unmeasured_topics = set(range(num_topics))
            else:
                published = STEERING_COEFFICIENTS[term.name]
                directions = directions * coefficients.nan_to_num(published).unsqueeze(-1)
            self.control_vectors[term.name] = directions

    def scale_control_vector(self, topic: int, mean_norm: Tensor) -> None:
        """Gives the control vector of `adaptive_rmu` its length, from the mean norm of the topic's hidden states."""
        scales = torch.ones_like(self.control_vectors["adaptive_rmu"][:, :1])
        scales[topic] = self.args.adaptive_scale * mean_norm
        self.control_vectors["adaptive_rmu"] = self.control_vectors["adaptive_rmu"] * scales
        self.unmeasured_topics.remove(topic)

    def update_retain_multiplier(self, retain_value: Tensor) -> None:
        """`lambda <- max(0, lambda + eta (L_retain - epsilon))`; see [`~hf_unlearn.losses.distribution.pdu`]."""
        change = self.args.pdu_dual_step_size * (retain_value - self.args.pdu_retain_threshold)
        # A new tensor: the graph of the step's loss holds the old one
        self.retain_multiplier = (self.retain_multiplier + change).clamp(min=0.0)

    def compute(
        self,
        model: PreTrainedModel | PeftModel,
        inputs: dict[str, Tensors],
        num_items: dict[str, Tensors],
        groups: tuple[str, ...] | None = None,
        reference: dict[str, Tensors] | None = None,
        is_augmented: bool = True,
    ) -> tuple[Tensor, Tensors]:
        """
        The objective of one micro-batch, or the part of some groups of losses. Runs as the forward of the wrapped
        model, see `redirect_forward`.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): the model, without DDP's wrapper.
            inputs (`dict[str, dict[str, torch.Tensor]]`): one batch per set.
            num_items (`dict[str, dict[str, torch.Tensor]]`): per set, the number of sequences, tokens and positions
                in the whole optimizer step.
            groups (`tuple[str, ...]`, *optional*): keys of `terms`. All where unset.
            reference (`dict[str, dict[str, torch.Tensor]]`, *optional*): what [`Objective.read_reference`] gave for
                these groups; read anew where unset.
            is_augmented (`bool`, *optional*, defaults to `True`): with the noise and the latent adversary of training.

        Returns:
            `tuple[torch.Tensor, dict[str, torch.Tensor]]`: this micro-batch's part of the objective and of the
            metrics.
        """
        groups = groups or tuple(self.terms)
        # The reference first: its swap must not fall between a policy forward and the backward.
        if reference is None:
            reference = self.read_reference(model, inputs, groups, is_augmented)
        changes, unchanged = {}, None
        forget_side = tuple(group for group in groups if group != "retain")
        if is_augmented and forget_side and self.adversary_radii:
            changes, unchanged = self._find_adversary(model, inputs, num_items, forget_side, reference)
        tensors = self._run_policy(model, inputs, groups, reference, changes)
        values, metrics = self._sum(groups, tensors, inputs, num_items)
        if unchanged is not None:
            value = sum(values[group].detach() for group in forget_side)
            metrics["forget/adversary_gain"] = value - unchanged
        total = sum(values.values())
        if (floor := self._noise_floor(groups, inputs, num_items)) is not None:
            metrics["loss_above_noise_floor"] = total.detach() - floor
        return total, metrics

    def _sum(
        self,
        groups: tuple[str, ...],
        tensors: dict[str, Tensors],
        inputs: dict[str, Tensors],
        num_items: dict[str, Tensors],
    ) -> tuple[dict[str, Tensor], Tensors]:
        """The weighted sum of each group's losses, and all metrics."""
        values, metrics = {}, {}
        for group in groups:
            value = torch.zeros((), device=inputs["forget"]["input_ids"].device)
            for term in self.terms[group]:
                term_value, term_metrics = self._evaluate(term, group, tensors, inputs, num_items)
                value = value + self._weight(term) * term_value
                set_name = "retain" if group == "retain" else "forget"
                metrics[f"{set_name}/{term.name}"] = term_value.detach()
                metrics.update({f"{set_name}/{key}": entry for key, entry in term_metrics.items()})
            if group == "retain":
                value, constraint = self._weigh_retain(value, inputs)
                if constraint is not None:
                    metrics["retain/constraint"] = constraint
            values[group] = value
        for rows in ("forget", "retain"):
            if "probe_log_probs" in tensors.get(rows, {}):
                harmless = tensors[rows]["probe_log_probs"].detach().exp().sum()
                metrics[f"{rows}/probe_harmless"] = harmless / num_items[rows]["sequence"]
        return values, metrics

    def _weight(self, term: Term) -> Tensor | float:
        if term.loss is PROBE_LOSS and self.probe_factor is not None:
            return self.probe_factor
        return term.weight if term.loss.schedule is None else term.weight * term.loss.schedule(self.share_done)

    def _weigh_retain(self, value: Tensor, inputs: dict[str, Tensors]) -> tuple[Tensor, Tensor | None]:
        """The retain losses with the factors of their topic and of the multiplier; and what the multiplier bounds."""
        if self.topic_retain_weights is not None:
            value = value * of_topic(self.topic_retain_weights, inputs["forget"])
        if self.retain_multiplier is None:
            return value, None
        return self.retain_multiplier * value, value.detach()

    @torch.no_grad()
    def _noise_floor(
        self, groups: tuple[str, ...], inputs: dict[str, Tensors], num_items: dict[str, Tensors]
    ) -> Tensor | None:
        """
        What the noise on the reference adds to the objective on average, `weight * std^2`: nothing that training could
        take away. Known where a squared error is taken where the noise is added.
        """
        if self.args.reference_noise_std == 0 or self.noise_layer != self.args.hidden_layer:
            return None
        weights = [term.weight for term in self.terms["retain"] if term.name == "hidden_mse"]
        if not weights:
            return None
        if "retain" not in groups:
            return torch.zeros((), device=inputs["forget"]["input_ids"].device)
        share = counted_mask(inputs["retain"], "position").sum() / num_items["retain"]["position"]
        return self._weigh_retain(weights[0] * self.args.reference_noise_std**2 * share, inputs)[0]

    def _find_adversary(
        self,
        model: PreTrainedModel | PeftModel,
        inputs: dict[str, Tensors],
        num_items: dict[str, Tensors],
        groups: tuple[str, ...],
        reference: dict[str, Tensors],
    ) -> tuple[dict[tuple[str, int], Tensor], Tensor]:
        """What raises the losses of the groups most, by rows and layer, and their value without it."""

        def loss_at(changes: dict[tuple[str, int], Tensor]) -> Tensor:
            tensors = self._run_policy(model, inputs, groups, reference, changes)
            return sum(self._sum(groups, tensors, inputs, num_items)[0].values())

        keys = [(rows, layer) for rows in self.reads_of(groups) for layer in self.adversary_radii]
        return find_perturbations(
            loss_at,
            masks={(rows, layer): inputs[rows]["attention_mask"] for rows, layer in keys},
            hidden_size=inner_model(model).config.get_text_config().hidden_size,
            radii={(rows, layer): self.adversary_radii[layer] for rows, layer in keys},
            num_steps=self.args.latent_adversary_steps,
        )

    def _evaluate(
        self,
        term: Term,
        group: str,
        tensors: dict[str, Tensors],
        inputs: dict[str, Tensors],
        num_items: dict[str, Tensors],
    ) -> tuple[Tensor, Tensors]:
        loss = term.loss
        rows = rows_of(term, group)
        own = {"token_values": f"token_values/{term.name}", "control_vector": f"control_vector/{term.name}"}
        of_token_function = loss.token_function.settings if loss.token_function is not None else ()
        return loss.function(
            *(tensors[rows][own.get(read, read)] for read in loss.reads),
            mask=counted_mask(inputs[rows], loss.unit),
            num_items=num_items[rows][loss.unit],
            **{name: value for name, value in self.settings_of(term).items() if name not in of_token_function},
        )


def score_rows(decoder: Decoder, batch: Tensors, with_logits: bool) -> tuple[Tensor, Tensor | None]:
    """
    Each row's summed negative log-likelihood (nats) and number of predicted tokens, `(B, 2)` fp32.

    Args:
        decoder ([`~hf_unlearn.forward.Decoder`]): the model.
        batch (`dict[str, torch.Tensor]`): one padded batch.
        with_logits (`bool`): also return all logits, `(B, T, vocabulary)` fp32.
    """
    last_hidden_state = decoder.run(batch, [], last_hidden_state=True).last_hidden_state
    hidden = gather_predicting(last_hidden_state, batch["label_index"])
    nll = -token_log_probs(decoder.head, hidden, batch).sum(-1)
    rows = torch.stack([nll, (batch["labels"][:, 1:] != -100).sum(-1)], dim=-1)
    return rows, decoder.head(last_hidden_state) if with_logits else None


def count_items(batch: Tensors) -> Tensor:
    """What `Loss.unit` is a mean over, in the order of `UNITS`, `(4,)` fp32."""
    labels = batch["labels"]
    positions = (labels != -100).sum()
    sequences = torch.full_like(positions, labels.shape[0])  # filled on the device: no copy to wait for
    tokens = [counted_mask(batch, unit).sum() for unit in ("token", "later_token")]
    return torch.stack([sequences, *tokens, positions]).float()
