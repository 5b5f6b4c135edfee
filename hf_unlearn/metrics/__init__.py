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
"""What a model still knows, and what else it can do: answers, membership, and the statistics over them."""

from .choices import choice_accuracy, evaluate_choices
from .evaluation import METRICS, Evaluation, evaluate_model
from .fluency import evaluate_fluency, perplexity, repetition
from .inference import NonFiniteLogitsError
from .insertion import InsertionResult, evaluate_insertion, recovery_rate, reduction_rate
from .membership import auc, auc_interval, membership_scores, privleak
from .membership_evaluation import evaluate_membership
from .memorization import evaluate_memorization
from .perturbation import perturb_answer_choices, perturb_choices, perturb_question
from .refusal import evaluate_refusals, is_refusal
from .statistics import bootstrap_interval, forget_quality, model_utility


__all__ = [
    "METRICS",
    "Evaluation",
    "InsertionResult",
    "NonFiniteLogitsError",
    "auc",
    "auc_interval",
    "bootstrap_interval",
    "choice_accuracy",
    "evaluate_choices",
    "evaluate_fluency",
    "evaluate_insertion",
    "evaluate_membership",
    "evaluate_memorization",
    "evaluate_model",
    "evaluate_refusals",
    "forget_quality",
    "is_refusal",
    "membership_scores",
    "model_utility",
    "perplexity",
    "perturb_answer_choices",
    "perturb_choices",
    "perturb_question",
    "privleak",
    "recovery_rate",
    "reduction_rate",
    "repetition",
]
