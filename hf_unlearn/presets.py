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
Public benchmarks as sets of rows: TOFU and MUSE, from the Hub or from a folder with the same layout.

Nothing here runs code of a repository, and no message repeats a row.
"""

import logging
import os
from collections.abc import Callable, Sequence

from datasets import Dataset, load_dataset

from .data import require_map_style


# Not accelerate's, which wants the processes' group: data may be loaded before there is one
logger = logging.getLogger(__name__)

TOFU = "locuslab/TOFU"
TOFU_SHARES = ("forget01", "forget05", "forget10")
MUSE = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}

_QUESTION = ("question", "answer")
_CHOICES = (*_QUESTION, "perturbed_answer")
_PERTURBED = (*_CHOICES, "paraphrased_answer")
_TEXT = ("text",)

# Set -> configuration, split and columns of both MUSE repositories.
_MUSE_SETS = {
    "forget_passages": ("verbmem", "forget", ("prompt", "gt")),
    "forget_questions": ("knowmem", "forget_qa", _QUESTION),
    "retain_questions": ("knowmem", "retain_qa", _QUESTION),
    "forget_demonstrations": ("knowmem", "forget_qa_icl", _QUESTION),
    "retain_demonstrations": ("knowmem", "retain_qa_icl", _QUESTION),
    "forget_texts": ("privleak", "forget", _TEXT),
    "retain_texts": ("privleak", "retain", _TEXT),
    "holdout_texts": ("privleak", "holdout", _TEXT),
    "forget_train": ("raw", "forget", _TEXT),
    "retain_train": ("raw", "retain1", _TEXT),
}


def load_tofu(forget: str = "forget10", source: str = TOFU, revision: str | None = None) -> dict[str, Dataset]:
    """
    The sets that [TOFU](https://huggingface.co/papers/2401.06121) measures on.

    `locuslab/TOFU` has one configuration per set, each with the split `train`:

    | set | configuration | columns beside `question` and `answer` |
    |---|---|---|
    | `forget` | `forget01_perturbed`, `forget05_perturbed`, ... | `paraphrased_answer`, `perturbed_answer` (list) |
    | `retain` | `retain_perturbed`: 400 rows, in every retain share | `paraphrased_answer`, `perturbed_answer` |
    | `real_authors` | `real_authors_perturbed` | `perturbed_answer` |
    | `world_facts` | `world_facts_perturbed` | `perturbed_answer` |
    | `holdout` | `holdout01`, `holdout05`, `holdout10`: authors that nothing was trained on | |

    Only the perturbed configurations have the other answers that the truth ratio needs. To train, load `forget10` and
    the share that stays, `retain90` (of `forget05`: `retain95`, of `forget01`: `retain99`). Older copies have no
    holdout: the set is then left out, with a warning.

    Args:
        forget (`str`, *optional*, defaults to `"forget10"`): `"forget01"`, `"forget05"` or `"forget10"`.
        source (`str`, *optional*, defaults to `"locuslab/TOFU"`): Hub id, or a folder whose `README.md` names the same
            configurations.
        revision (`str`, *optional*): branch, tag or commit on the Hub.

    Returns:
        `dict[str, Dataset]`: `forget`, `retain`, `real_authors`, `world_facts` and, where the source has it,
        `holdout`.

    Raises:
        `ValueError`: an unknown share, or a source that cannot be reached or lacks a configuration or column.

    Example:

    ```python
    from hf_unlearn.metrics import evaluate_model
    from hf_unlearn.presets import load_tofu

    evaluation = evaluate_model(model, tokenizer, load_tofu("forget05"), args)
    ```
    """
    if forget not in TOFU_SHARES:
        raise ValueError(f"TOFU has no forget set {forget!r}: choose from {', '.join(TOFU_SHARES)}.")
    configurations = {
        "forget": (f"{forget}_perturbed", _PERTURBED),
        "retain": ("retain_perturbed", _PERTURBED),
        "real_authors": ("real_authors_perturbed", _CHOICES),
        "world_facts": ("world_facts_perturbed", _CHOICES),
    }
    sets = {
        name: _load(source, configuration, "train", columns, revision, TOFU)
        for name, (configuration, columns) in configurations.items()
    }
    holdout = forget.replace("forget", "holdout")
    try:
        sets["holdout"] = _load(source, holdout, "train", _QUESTION, revision, TOFU)
    except _MissingError:
        logger.warning(f"{source!r} has no configuration {holdout!r}: the set `holdout` is left out.")
    return sets


def load_muse(corpus: str = "news", source: str | None = None, revision: str | None = None) -> dict[str, Dataset]:
    """
    The sets that [MUSE](https://huggingface.co/papers/2407.06460) trains and measures on.

    `muse-bench/MUSE-News` (BBC articles) and `muse-bench/MUSE-Books` (the Harry Potter books) have the same layout:

    | sets | configuration and splits | columns | rows |
    |---|---|---|---|
    | `forget_passages` | `verbmem`: `forget` | `prompt`, `gt` (its true continuation) | 100 |
    | `forget_questions`, `retain_questions` | `knowmem`: `forget_qa`, `retain_qa` | `question`, `answer` | 100 |
    | `forget_demonstrations`, `retain_demonstrations` | `knowmem`: `*_qa_icl` | `question`, `answer` | 10 |
    | `forget_texts`, `retain_texts`, `holdout_texts` | `privleak`: `forget`, `retain`, `holdout` | `text` | 100 |
    | `forget_train` | `raw`: `forget` | `text` | 889 (News), 4 (Books) |
    | `retain_train` | `raw`: `retain1` | `text` | 1,777 (News), 12 (Books) |

    The first four rows are for `evaluate_memorization` and for `privleak`, the last two for training. What stays has
    two parts: `retain1` may be trained on while unlearning, and `retain2` (not loaded here) is what questions and
    texts of `retain` come from. The configuration `train` is what the model to be unlearned was made with, and `scal`
    and `sust` (News alone) are larger and successive forget sets.

    Args:
        corpus (`str`, *optional*, defaults to `"news"`): `"news"` or `"books"`.
        source (`str`, *optional*): Hub id, or a folder whose `README.md` names the same configurations and splits; by
            default the corpus' own repository.
        revision (`str`, *optional*): branch, tag or commit on the Hub.

    Returns:
        `dict[str, Dataset]`: the ten sets.

    Raises:
        `ValueError`: an unknown corpus, or a source that cannot be reached or lacks a configuration, split or column.

    Example:

    ```python
    from hf_unlearn.metrics.memorization import evaluate_memorization
    from hf_unlearn.presets import load_muse

    sets = load_muse("news")
    evaluation = evaluate_memorization(
        model,
        tokenizer,
        sets["forget_passages"],
        {name: sets[f"{name}_questions"] for name in ("forget", "retain")},
        {name: sets[f"{name}_demonstrations"] for name in ("forget", "retain")},
        args,
    )
    ```
    """
    if corpus not in MUSE:
        raise ValueError(f"MUSE has no corpus {corpus!r}: choose from {', '.join(MUSE)}.")
    return {
        name: _load(source or MUSE[corpus], configuration, split, columns, revision, MUSE[corpus])
        for name, (configuration, split, columns) in _MUSE_SETS.items()
    }


# Name -> function of a source (`None`: the benchmark's own repository on the Hub) that gives the sets.
PRESETS: dict[str, Callable[[str | None], dict[str, Dataset]]] = {
    "tofu": lambda source=None: load_tofu(source=source or TOFU),
    "muse-news": lambda source=None: load_muse("news", source),
    "muse-books": lambda source=None: load_muse("books", source),
}


class _MissingError(ValueError):
    """The source can be read, but has no such configuration or split."""


def _load(
    source: str, configuration: str, split: str, columns: Sequence[str], revision: str | None, original: str
) -> Dataset:
    if revision is not None and os.path.isdir(source):
        raise ValueError("A folder has no revisions: leave `revision` out, or pass a Hub id as `source`.")
    wanted = f"configuration {configuration!r}, split {split!r}"
    try:
        dataset = load_dataset(source, configuration, split=split, revision=revision)
    except ValueError as error:  # what `datasets` raises for an unknown configuration and for an unknown split
        raise _MissingError(
            f"{source!r} does not have the {wanted}: pass a source with the layout of {original}, or another "
            "`revision` of it."
        ) from error
    except Exception as error:  # of the network, the Hub, the file system or a file's reader, which may quote a row
        raise ValueError(
            f"{source!r} ({wanted}) cannot be loaded ({type(error).__name__}): check the id or folder and the "
            f"connection, or pass a downloaded copy of {original} as `source`."
        ) from error
    dataset = require_map_style(dataset, f"{source!r} ({wanted})")
    if missing := [column for column in columns if column not in dataset.column_names]:
        raise ValueError(
            f"{source!r} ({wanted}) has no column {_listed(missing)}: rename its columns to those of {original}, "
            f"which are {_listed(columns)}."
        )
    return dataset


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(f"`{column}`" for column in columns)
