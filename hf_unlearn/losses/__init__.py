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
"""
The losses by name. Adding one is a function in `forget.py` or `retain.py`, a line here, and a test.

Every loss is a pure function `f(*reads, mask=..., num_items=..., **settings) -> (loss, metrics)`. The trainer computes
what `reads` names and nothing else: a run whose losses read only `hidden_states` never runs the layers above.
"""

from collections.abc import Callable
from dataclasses import dataclass

from . import forget, retain


@dataclass(frozen=True)
class Loss:
    """
    One line of the table.

    Attributes:
        function (`Callable`):
            The loss.
        reads (`tuple[str, ...]`):
            Its tensors, in order: `log_probs`, `reference_log_probs`, `token_kl`, `hidden_states`,
            `reference_hidden_states`, `control_vector`.
        unit (`str`):
            What the loss is a mean over: `"sequence"`, `"token"` (predicted tokens whose label is not -100) or
            `"position"` (all positions whose label is not -100, the first one included).
        settings (`tuple[str, ...]`):
            Fields of [`UnlearnConfig`] passed by keyword.
    """

    function: Callable
    reads: tuple[str, ...]
    unit: str
    settings: tuple[str, ...] = ()


FORGET_LOSSES = {
    "ga": Loss(forget.ga, reads=("log_probs",), unit="token"),
    "npo": Loss(forget.npo, reads=("log_probs", "reference_log_probs"), unit="sequence", settings=("beta",)),
    "rmu": Loss(forget.rmu, reads=("hidden_states", "control_vector"), unit="position"),
}

RETAIN_LOSSES = {
    "nll": Loss(retain.nll, reads=("log_probs",), unit="token"),
    "kl": Loss(retain.kl, reads=("token_kl",), unit="token"),
    "hidden_mse": Loss(retain.hidden_mse, reads=("hidden_states", "reference_hidden_states"), unit="position"),
}

# What needs the frozen model. `token_kl` compares two distributions, so it does too.
REFERENCE_READS = frozenset({"reference_log_probs", "reference_hidden_states", "token_kl"})
HIDDEN_READS = frozenset({"hidden_states", "reference_hidden_states", "control_vector"})
