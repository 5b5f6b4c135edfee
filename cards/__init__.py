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
"""The report of an unlearning run and the model card made from it. Nothing here needs torch."""

from hf_unlearn.cards.card import render_model_card, write_model_card
from hf_unlearn.cards.report import (
    AttackResult,
    BaseModel,
    Benchmark,
    Certificate,
    CurvePoint,
    Data,
    DataSummary,
    Environment,
    FileEntry,
    Footprint,
    LossTerm,
    Method,
    Metrics,
    ModuleFootprint,
    Rule,
    Scope,
    Topic,
    UnlearningReport,
    Verdict,
    hash_files,
)


__all__ = [
    "AttackResult",
    "BaseModel",
    "Benchmark",
    "Certificate",
    "CurvePoint",
    "Data",
    "DataSummary",
    "Environment",
    "FileEntry",
    "Footprint",
    "LossTerm",
    "Method",
    "Metrics",
    "ModuleFootprint",
    "Rule",
    "Scope",
    "Topic",
    "UnlearningReport",
    "Verdict",
    "hash_files",
    "render_model_card",
    "write_model_card",
]
