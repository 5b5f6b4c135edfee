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
"""What is still known and what is kept, while a run goes on, and when to end it."""

from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_unlearn.attacks.finetuning import probabilities
from hf_unlearn.metrics.rows import EvaluationRow
from hf_unlearn.trainer_callbacks.during_training import (
    add_to_history,
    read_rows,
    require_whole_weights,
    without_autocast,
)


logger = get_logger(__name__)

FORGET, RETAIN = "eval_unlearning_forget_probability", "eval_unlearning_retain_probability"


class UnlearningEvaluationCallback(TrainerCallback):
    """
    Measures during training how probable the answers of the forget and of the retain rows are, and ends the run when
    enough is forgotten or too much is lost.

    The measure is the mean of `P(answer | prompt)^(1/n)`, n tokens, over the rows of each set. It is taken before the
    first step, every `every_steps` optimizer steps, and at the end; each is an entry of `state.log_history` with
    `eval_unlearning_forget_probability` and `eval_unlearning_retain_probability`. The run itself is not touched: not
    its random state, gradients or modes.

    With several processes each measures all rows, so that all end at the same step. Sharded weights (FSDP2,
    DeepSpeed ZeRO-3) are refused.

    Args:
        forget ([`~datasets.Dataset`]): forget rows, in any format that unlearning takes.
        retain ([`~datasets.Dataset`]): retain rows.
        every_steps (`int`, *optional*, defaults to 10): optimizer steps from one measurement to the next.
        forget_target (`float`, *optional*): the run ends when the forget rows' mean is at most this.
        retain_floor (`float`, *optional*): the run ends when the retain rows' mean is below this.
        batch_size (`int`, *optional*, defaults to 16): sequences in one forward.
        max_length (`int`, *optional*): longest sequence in tokens; should be that of the training.

    Raises:
        `ValueError`: settings out of range; when training begins, a target that is met or a floor that is broken
            already, a trainer without tokenizer, or sharded weights.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from hf_unlearn.trainer_callbacks import UnlearningEvaluationCallback
    >>> forget = Dataset.from_list([{"question": "Who lives at 7 Elm Row?", "answer": "Ada Quill."}])
    >>> retain = Dataset.from_list([{"question": "What is the capital of France?", "answer": "Paris."}])
    >>> callback = UnlearningEvaluationCallback(forget, retain, every_steps=5, forget_target=0.1, retain_floor=0.8)
    >>> # UnlearnTrainer(..., callbacks=[callback])

    ```
    """

    def __init__(
        self,
        forget: Dataset,
        retain: Dataset,
        every_steps: int = 10,
        forget_target: float | None = None,
        retain_floor: float | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
    ):
        if every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, got {every_steps}.")
        for name, value in (("forget_target", forget_target), ("retain_floor", retain_floor)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is a probability, between 0 and 1, got {value}.")
        self.forget = forget
        self.retain = retain
        self.every_steps = every_steps
        self.forget_target = forget_target
        self.retain_floor = retain_floor
        self.batch_size = batch_size
        self.max_length = max_length
        self._rows: dict[str, list[EvaluationRow]] = {}
        self._measured_step = -1

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        require_whole_weights(model)
        self._rows = {
            FORGET: read_rows(self.forget, processing_class, "forget", self.max_length),
            RETAIN: read_rows(self.retain, processing_class, "retain", self.max_length),
        }
        means = self._measure(state, model)
        if state.global_step > 0:  # resumed
            return
        if self.forget_target is not None and means[FORGET] <= self.forget_target:
            raise ValueError(
                f"Before training the forget rows' answers have a mean probability of {means[FORGET]:.3f}, and "
                f"forget_target={self.forget_target} is met already: choose a lower one."
            )
        if self.retain_floor is not None and means[RETAIN] < self.retain_floor:
            raise ValueError(
                f"Before training the retain rows' answers have a mean probability of {means[RETAIN]:.3f}, which is "
                f"below retain_floor={self.retain_floor}: choose a lower one."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if state.global_step % self.every_steps:
            return
        means = self._measure(state, model)
        if self.retain_floor is not None and means[RETAIN] < self.retain_floor:
            control.should_training_stop = True
            logger.warning(
                f"Training ends at step {state.global_step}: the retain rows' mean probability is "
                f"{means[RETAIN]:.3f}, below retain_floor={self.retain_floor}. Use an earlier checkpoint, a lower "
                "learning rate or a higher retain weight."
            )
        elif self.forget_target is not None and means[FORGET] <= self.forget_target:
            control.should_training_stop = True
            logger.info(
                f"Training ends at step {state.global_step}: the forget rows' mean probability is "
                f"{means[FORGET]:.3f}, forget_target={self.forget_target} is met."
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if self._measured_step != state.global_step:
            self._measure(state, model)

    def _measure(self, state: TrainerState, model: nn.Module) -> dict[str, float]:
        means = {}
        for name, rows in self._rows.items():
            with without_autocast(model):
                values = probabilities(model, rows, self.batch_size)
            means[name] = sum(values) / len(values)
        add_to_history(state, means)
        self._measured_step = state.global_step
        return means
