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
"""The rows of MMLU as the task files of this folder ask for them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset


MMLU = "cais/mmlu"
FORGET_TOKEN = "SARS-CoV-2"


def choice_perturbed(
    subject: str,
    forget_token: str = FORGET_TOKEN,
    perturbation_seed: int = 0,
    mmlu_path: str = MMLU,
    **metadata: Any,
) -> "dict[str, Dataset]":
    """
    One subject of MMLU, the text of one incorrect choice of each test question replaced by a forget-token, as in
    [Random Noise Augmentation](https://huggingface.co/papers/2501.19202).

    Question, right answer and order stay; `perturbed_index` has the place of the replaced choice. The `dev` split,
    which examples are drawn from, stays as it is.

    Args:
        subject (`str`): configuration of the data set, such as `virology`.
        forget_token (`str`, *optional*, defaults to `"SARS-CoV-2"`): a word of the forget set. Questions that hold it
            already are left out.
        perturbation_seed (`int`, *optional*, defaults to 0): seed of the choices that are replaced.
        mmlu_path (`str`, *optional*, defaults to `"cais/mmlu"`): a Hub id, or a folder of the same layout.
        metadata: what else the harness knows of the task.

    Returns:
        `dict[str, Dataset]`: `test` and `dev`.
    """
    from hf_unlearn.metrics import perturb_choices

    return _load(mmlu_path, subject, lambda rows: perturb_choices(rows, forget_token, perturbation_seed))


def question_perturbed(
    subject: str, forget_token: str = FORGET_TOKEN, mmlu_path: str = MMLU, **metadata: Any
) -> "dict[str, Dataset]":
    """
    One subject of MMLU, a forget-token and a space before each test question; otherwise as [`choice_perturbed`].

    Args:
        subject (`str`): configuration of the data set, such as `virology`.
        forget_token (`str`, *optional*, defaults to `"SARS-CoV-2"`): a word of the forget set.
        mmlu_path (`str`, *optional*, defaults to `"cais/mmlu"`): a Hub id, or a folder of the same layout.
        metadata: what else the harness knows of the task.

    Returns:
        `dict[str, Dataset]`: `test` and `dev`.
    """
    from hf_unlearn.metrics import perturb_question

    return _load(mmlu_path, subject, lambda rows: perturb_question(rows, forget_token))


def _load(
    path: str, subject: str, perturb: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
) -> "dict[str, Dataset]":
    from datasets import Dataset, load_dataset

    test, dev = load_dataset(path, subject, split=["test", "dev"])
    return {"test": Dataset.from_list(perturb(list(test))), "dev": dev}
