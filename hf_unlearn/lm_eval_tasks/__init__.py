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
Task files for lm-evaluation-harness: MMLU with a forget-token in each question.

`hf-unlearn evaluate MODEL --lm-eval perturbed_mmlu` finds them; the harness's own command does with
`--include_path` and the folder that [`tasks_folder`] gives.
"""

import os


def tasks_folder() -> str:
    """
    The folder of the task files, for the harness's `--include_path`.

    Example:

    ```python
    >>> import os
    >>> from hf_unlearn.lm_eval_tasks import tasks_folder
    >>> sorted(name for name in os.listdir(tasks_folder()) if name.endswith(".yaml"))
    ['perturbed_mmlu.yaml', 'perturbed_mmlu_question.yaml']

    ```
    """
    return os.path.dirname(__file__)
