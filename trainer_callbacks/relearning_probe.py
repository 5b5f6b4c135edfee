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
"""How much of what is being forgotten a short relearning brings back, while a run goes on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
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

from hf_unlearn.attacks.finetuning import FineTuning, fine_tune, probabilities, require_disjoint, sequences
from hf_unlearn.metrics.inference import NonFiniteLogitsError
from hf_unlearn.metrics.rows import EvaluationRow
from hf_unlearn.trainer_callbacks.during_training import (
    add_to_history,
    read_rows,
    require_whole_weights,
    without_autocast,
)


logger = get_logger(__name__)

BEFORE, AFTER = "eval_relearning_before", "eval_relearning_after"


class RelearningProbeCallback(TrainerCallback):
    """
    Every so many steps, fine-tunes a copy of the trained tensors on some forget rows and scores other ones.

    Each trial is an entry of `state.log_history`: `eval_relearning_before` and `eval_relearning_after`, the mean of
    `P(answer | prompt)^(1/n)`, n tokens, over the held-out rows. It is a cheap sign of what comes back and no verdict,
    for which one learning rate and no control are too little: see [`~hf_unlearn.attacks.relearn.relearn`].

    A run with this callback computes what it computes without, bit for bit: the copies take the tensors' place and the
    tensors themselves are put back; gradients, optimizer, modes and random state are not touched.

    Memory during a trial: four times the trained tensors in fp32 (copy, gradient, two moments). With several processes
    each does the same. Sharded weights (FSDP2, DeepSpeed ZeRO-3) are refused.

    Args:
        train_rows ([`~datasets.Dataset`]): T, the rows to fine-tune on, in any format that unlearning takes.
        held_out_rows ([`~datasets.Dataset`]): V, the rows to score; none may stand in T.
        every_steps (`int`, *optional*, defaults to 50): optimizer steps from one trial to the next.
        learning_rate (`float`, *optional*, defaults to 2e-4): of AdamW, constant.
        steps (`int`, *optional*, defaults to 10): steps of a trial.
        batch_size (`int`, *optional*, defaults to 8): rows in one of its steps.
        seed (`int`, *optional*, defaults to 0): seed of the order of T, the same in every trial.
        max_length (`int`, *optional*): longest sequence in tokens; should be that of the training.

    Raises:
        `ValueError`: settings out of range; when training begins, T and V share rows, the trainer has no tokenizer, or
            weights are sharded.
        [`~hf_unlearn.metrics.inference.NonFiniteLogitsError`]: the trained model itself has diverged. Where only a
            trial does, training goes on with a warning.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from hf_unlearn.trainer_callbacks import RelearningProbeCallback
    >>> rows = [{"question": f"Who lives at {number} Elm Row?", "answer": f"Ada Quill {number}."} for number in "123"]
    >>> probe = RelearningProbeCallback(Dataset.from_list(rows[:2]), Dataset.from_list(rows[2:]), every_steps=20)
    >>> # UnlearnTrainer(..., callbacks=[probe])

    ```
    """

    def __init__(
        self,
        train_rows: Dataset,
        held_out_rows: Dataset,
        every_steps: int = 50,
        learning_rate: float = 2e-4,
        steps: int = 10,
        batch_size: int = 8,
        seed: int = 0,
        max_length: int | None = None,
    ):
        if every_steps < 1 or steps < 1:
            raise ValueError(f"every_steps and steps must be at least 1, got {every_steps} and {steps}.")
        self.train_rows = train_rows
        self.held_out_rows = held_out_rows
        self.every_steps = every_steps
        self.tuning = FineTuning(learning_rate, steps, batch_size)
        self.seed = seed
        self.max_length = max_length
        self._train: list[EvaluationRow] = []
        self._held_out: list[EvaluationRow] = []

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
        # Their names begin with "forget": of preference data, what is relearnt is what was rejected
        self._train = read_rows(self.train_rows, processing_class, "forget (relearning)", self.max_length)
        self._held_out = read_rows(self.held_out_rows, processing_class, "forget (held out)", self.max_length)
        require_disjoint(self._train, self._held_out, processing_class)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if state.global_step % self.every_steps:
            return
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with without_autocast(model):
            before = probabilities(model, self._held_out)
        try:
            with without_autocast(model), _copied(trained):
                fine_tune(model, trained, sequences(self._train), self.tuning, self.seed)
                after = probabilities(model, self._held_out)
        except NonFiniteLogitsError:
            logger.warning(
                f"The relearning trial at step {state.global_step} diverged and has no score; training goes on. Give "
                f"the callback a learning_rate below {self.tuning.learning_rate:g}."
            )
            return
        add_to_history(state, {BEFORE: sum(before) / len(before), AFTER: sum(after) / len(after)})


@contextmanager
def _copied(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Puts copies in the place of the parameters' storage; afterwards, the storage itself is back."""
    originals = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.clone()
    try:
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original
        torch.clear_autocast_cache()  # it is keyed by the parameter and not by its content
