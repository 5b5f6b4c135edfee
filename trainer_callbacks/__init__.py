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
"""Callbacks for any transformers or TRL trainer. They keep no trainer: what they need is in the callback's kwargs."""

from hf_unlearn.trainer_callbacks.margin_constraint import MarginConstraintCallback
from hf_unlearn.trainer_callbacks.norm_ball import NormBallCallback
from hf_unlearn.trainer_callbacks.relearning_probe import RelearningProbeCallback
from hf_unlearn.trainer_callbacks.release import ReleaseCallback
from hf_unlearn.trainer_callbacks.run_record import RunRecordCallback
from hf_unlearn.trainer_callbacks.scope_guard import ScopeGuardCallback, ScopeViolationError
from hf_unlearn.trainer_callbacks.unlearning_evaluation import UnlearningEvaluationCallback


__all__ = [
    "MarginConstraintCallback",
    "NormBallCallback",
    "RelearningProbeCallback",
    "ReleaseCallback",
    "RunRecordCallback",
    "ScopeGuardCallback",
    "ScopeViolationError",
    "UnlearningEvaluationCallback",
]
