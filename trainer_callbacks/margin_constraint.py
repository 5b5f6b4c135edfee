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
"""Point-wise constraints that hold while another objective trains."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, broadcast
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_unlearn.constraints.contexts import close_words
from hf_unlearn.constraints.dual import DualNotConvergedError, InfeasibleConstraintsError
from hf_unlearn.constraints.editable import editable_linear, has_tied_head, in_float32
from hf_unlearn.constraints.linearize import constraint_values
from hf_unlearn.constraints.points import (
    RESERVE,
    ConstraintPoints,
    Constraints,
    Demand,
    answer_points,
    expand_points,
    word_points,
)
from hf_unlearn.constraints.solve import ConstraintsNotMetError, solve_intervention
from hf_unlearn.forward import evaluation_mode
from hf_unlearn.intervention_data import encode_prompt
from hf_unlearn.metrics.inference import NonFiniteLogitsError
from hf_unlearn.trainer_callbacks.during_training import (
    add_to_history,
    read_rows,
    require_whole_weights,
    without_autocast,
)


logger = get_logger(__name__)

# A small edit may be lost where it is rounded to the dtype of the weights: so often it is sought anew, further in
_ATTEMPTS = 4
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class MarginConstraintCallback(TrainerCallback):
    r"""
    Keeps tokens from coming after stated contexts while another objective trains, in any trainer of transformers or
    TRL.

    At a check every constraint is evaluated at the model as it is: $g_k = \log P(\text{forbidden}) - \log
    P(\text{allowed}) \le -m$, or the margin of the largest logits ([`~hf_unlearn.constraints.points.Demand`]). Where
    one is violated, the smallest change of the named matrices under which all hold is solved for
    ([`~hf_unlearn.constraints.solve.solve_intervention`]), added to the weights, and all are checked again on the
    weights as they are stored. Our formulation after [the paper](https://huggingface.co/papers/2510.03567). Checks
    come when training begins, after every `every_steps` optimizer steps, before each evaluation and each checkpoint,
    and at the end. Between them the objective may break a constraint: what is saved satisfies them.

    Each check is an entry of `state.log_history`:

    | key | |
    |---|---|
    | `margin_constraints` | how many there are |
    | `margin_violated_before`, `margin_excess_before` | how many the training broke, and by how many nats the worst |
    | `margin_violated`, `margin_excess` | the same after the correction; at most 0 nats where all hold |
    | `margin_correction_norm` | Frobenius norm of the change; 0 where none was needed |

    Cost: a check is a forward of all contexts, a correction some forwards and backwards of them and a dual in as many
    unknowns as there are constraints. Several processes (DDP) share them, and get the same weights. Gradients, modes,
    random state and the optimizer's moments are left as they are. Sharded weights (FSDP, DeepSpeed, Megatron) and
    adapters are refused: an adapter's base is not what is saved.

    A callback that comes later in the list acts after this one: put it last. Two of them each look at their own
    constraints, and the second's correction may break the first's: give one callback the sum of both points.

    Args:
        modules (`list[str]`):
            Linear layers that may be corrected, as in `model.named_modules()`: `"model.layers.7.mlp.down_proj"`. They
            need not be trained.
        demand ([`~hf_unlearn.constraints.points.Demand`]):
            How unreachable: `Demand(probability=0.01)` or `Demand(epsilon=1.0)`. `reserve=` goes beyond it at each
            correction, so that the next steps break it later.
        contexts (`list`, *optional*):
            Prompts: texts, conversations, or lists of token ids; with `forbidden`.
        forbidden (`list[str]` or `list[int]`, *optional*):
            Words, each in all its spellings ([`~hf_unlearn.constraints.contexts.close_words`], for the model that
            training begins or is resumed with), or token ids.
        forget ([`~datasets.Dataset`], *optional*):
            In place of both, rows whose answers must not come, in any format that unlearning takes.
        positions (`str`, *optional*, defaults to `"all"`):
            Which tokens of those answers: `"all"` or `"first"`.
        points ([`~hf_unlearn.constraints.points.ConstraintPoints`], *optional*):
            In place of all these, the constraints themselves.
        every_steps (`int`, *optional*, defaults to 10): optimizer steps from one check to the next.
        rounds (`int`, *optional*, defaults to 10): linearisations of one correction at most.
        batch_size (`int`, *optional*, defaults to 16): sequences in one pass.
        max_length (`int`, *optional*): longest row of `forget` in tokens; should be that of the training.

    Raises:
        `ValueError`: arguments that do not fit together; when training begins, a layer that cannot be corrected
            (adapters, a tied head, sharded or quantised weights), or words without a tokenizer.
        [`~hf_unlearn.constraints.solve.ConstraintsNotMetError`]: at the end, a constraint does not hold, and no
            correction was found. During training this is a warning, and the next check tries again.
        [`~hf_unlearn.metrics.inference.NonFiniteLogitsError`]: the trained model has diverged.

    Example:

    ```python
    >>> from hf_unlearn.constraints.points import Demand
    >>> from hf_unlearn.trainer_callbacks import MarginConstraintCallback
    >>> margin = MarginConstraintCallback(
    ...     ["model.layers.7.mlp.down_proj"], Demand(probability=0.01), contexts=["Once upon a time, there was"],
    ...     forbidden=["Lily"], every_steps=5,
    ... )
    >>> # SFTTrainer(..., callbacks=[margin])

    ```
    """

    def __init__(
        self,
        modules: Sequence[str],
        demand: Demand,
        *,
        contexts: Sequence[str | list[dict[str, str]] | list[int]] | None = None,
        forbidden: Sequence[str] | Sequence[int] | None = None,
        forget: Dataset | None = None,
        positions: str = "all",
        points: ConstraintPoints | None = None,
        every_steps: int = 10,
        rounds: int = 10,
        batch_size: int = 16,
        max_length: int | None = None,
    ):
        if isinstance(modules, str) or not modules:
            raise ValueError(
                "modules is a list of layers, such as ['model.layers.7.mlp.down_proj']: name at least one."
            )
        if (contexts is None) != (forbidden is None):
            raise ValueError("contexts and forbidden belong together: give both.")
        if sum(source is not None for source in (contexts, forget, points)) != 1:
            raise ValueError("Give the constraints in one way: contexts and forbidden, forget, or points.")
        if contexts is not None and not (contexts and forbidden and all(contexts)):
            raise ValueError("contexts and forbidden each need at least one entry, and none may be empty.")
        if positions not in ("all", "first"):
            raise ValueError(
                f"positions={positions!r} is not known here: use 'all' or 'first', or give points from "
                "hf_unlearn.constraints.points.answer_points."
            )
        if every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, got {every_steps}.")
        self.modules, self.demand = list(modules), demand
        self.contexts, self.forbidden = contexts, forbidden
        self.forget, self.positions = forget, positions
        self.points = points
        self.every_steps, self.rounds, self.batch_size = every_steps, rounds, batch_size
        self.max_length = max_length
        self._points = ConstraintPoints()
        self._checked_step = -1

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        engine = PartialState().distributed_type
        if engine in _SHARDED:
            raise ValueError(
                f"MarginConstraintCallback solves for whole matrices, and {engine.value} shards weights or optimizer: "
                "train with DDP, or run InterventionTrainer after training."
            )
        require_whole_weights(model)
        for name in self.modules:
            if editable_linear(model, name) is model.get_output_embeddings() and has_tied_head(model):
                raise ValueError(
                    f"{name} is tied to the input embeddings, and untying it in the middle of a training would leave "
                    "the optimizer behind: choose a hidden layer such as an mlp.down_proj."
                )
        with evaluation_mode(model), without_autocast(model):
            self._points = self._make_points(model, processing_class)
        self._checked_step = -1
        self._check(state, model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if state.global_step % self.every_steps == 0 or _is_used(control):
            self._check(state, model)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if _is_used(control) and self._checked_step != state.global_step:
            self._check(state, model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        # Once more where it was just done: the best checkpoint may have been loaded since
        self._check(state, model, is_last=True)

    def _make_points(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> ConstraintPoints:
        if self.points is not None:
            return self.points
        if self.forget is not None:
            rows = [
                {"input_ids": list(tokens.input_ids), "labels": list(tokens.labels)}
                for row in read_rows(self.forget, tokenizer, "forget", self.max_length)
                for tokens in row.answer
            ]
            return answer_points(rows, tokenizer, self.positions)
        is_text = [not isinstance(context[0], int) for context in self.contexts]
        if tokenizer is None and (any(is_text) or isinstance(self.forbidden[0], str)):
            raise ValueError("The callback reads texts with the trainer's tokenizer: give it one as processing_class.")
        contexts = [
            encode_prompt(context, tokenizer) if text else context
            for context, text in zip(self.contexts, is_text, strict=True)
        ]
        if isinstance(self.forbidden[0], str):
            return close_words(model, tokenizer, self.forbidden, contexts, self.demand, batch_size=self.batch_size)
        return word_points(contexts, self.forbidden)

    def _check(self, state: TrainerState, model: nn.Module, is_last: bool = False) -> None:
        """Evaluates, corrects where something is violated, evaluates again, and puts it on record."""
        constraints = expand_points(self._points, self.demand)
        before = after = self._excess(model, constraints)
        norm, failure = 0.0, None
        if bool((before > 0).any()):
            try:
                norm, after = self._correct(model, constraints)
            except (ConstraintsNotMetError, InfeasibleConstraintsError, DualNotConvergedError) as error:
                failure = error
        add_to_history(
            state,
            {
                "margin_constraints": len(constraints),
                "margin_violated_before": int((before > 0).sum()),
                "margin_excess_before": before.max().item(),
                "margin_violated": int((after > 0).sum()),
                "margin_excess": after.max().item(),
                "margin_correction_norm": norm,
            },
        )
        self._checked_step = state.global_step
        if failure is None:
            return
        message = (
            f"{int((after > 0).sum())} of {len(constraints)} margin constraints are violated by up to "
            f"{after.max().item():.3g} nats and could not be put right: name another or one more layer in modules, "
            "lower the demand, raise rounds, or remove points that contradict each other."
        )
        if is_last:
            raise ConstraintsNotMetError(message) from failure
        logger.warning(f"Step {state.global_step}: {message} Training goes on until the next check.")
        logger.debug("The constraints could not be put right.", exc_info=failure)

    def _correct(self, model: nn.Module, constraints: Constraints) -> tuple[float, Tensor]:
        """Adds the smallest change that holds once it is stored; gives its norm and the values of `_excess`."""
        reserve = max(self.demand.reserve, RESERVE)
        for _ in range(_ATTEMPTS):
            with in_float32(model):
                edit = solve_intervention(
                    model,
                    self._points,
                    self.modules,
                    replace(self.demand, reserve=reserve),
                    rounds=self.rounds,
                    batch_size=self.batch_size,
                    accelerator=PartialState(),
                )
            edit.apply(model)
            excess = self._excess(model, constraints)
            worst = excess.max().item()
            if worst <= 0:
                for name in self.modules:
                    # DDP compares no weights: what rounds differently on another device would stay so
                    broadcast(model.get_submodule(name).weight.data)
                return edit.norm(), excess
            edit.revert(model)
            reserve += 1.5 * worst
        raise ConstraintsNotMetError(
            f"The correction holds in float32, but stored as {model.get_submodule(self.modules[0]).weight.dtype} a "
            f"constraint is violated by {worst:.3g} nats: train with weights in float32 (dtype='float32'; bf16=True "
            "still computes in bfloat16)."
        )

    def _excess(self, model: nn.Module, constraints: Constraints) -> Tensor:
        """Nats by which each constraint is violated; at most 0 where it holds. The same on all processes."""
        with evaluation_mode(model):
            values = broadcast(constraint_values(model, constraints, {}, self.batch_size))
        if bool(values.isnan().any()):
            raise NonFiniteLogitsError(
                "The trained model gives logits that are not finite: it has diverged. Use a lower learning rate."
            )
        return values + self.demand.margin


def _is_used(control: TrainerControl) -> bool:
    """Whether the weights as they are now will be saved or evaluated."""
    return control.should_save or control.should_evaluate
