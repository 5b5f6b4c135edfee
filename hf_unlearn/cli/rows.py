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
"""Reading data sets for the commands; torch is not imported."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset, load_dataset, load_from_disk

from . import UsageError


_FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
# What a file that cannot be read should have been
_EXPECTED = {
    ".json": "write a list of objects, or one JSON object per line, in UTF-8",
    ".jsonl": "write one JSON object per line, in UTF-8, all with the same keys",
    ".csv": "write a line of column names first, and rows with as many values",
    ".parquet": "write the file again with `Dataset.to_parquet`",
    ".txt": "save it in UTF-8",
}


def load_rows(source: str, config: str | None, split: str, name: str) -> Dataset:
    """
    Reads one data set.

    Args:
        source (`str`): Hub id, folder saved by `datasets`, or file.
        config (`str`, *optional*): configuration of a Hub data set.
        split (`str`): split.
        name (`str`): for messages.

    Raises:
        `UsageError`: there is no such data set, format or split.
    """
    extension = os.path.splitext(source)[1].lower()
    subject = f"The {name} data set {source!r}"
    if os.path.isfile(source):
        if extension not in _FILE_FORMATS:
            raise UsageError(f"{subject} is not a {', '.join(_FILE_FORMATS)} file: save it as one of them.")
        if os.path.getsize(source) == 0:
            raise UsageError(f"{subject} is empty: it needs at least one row.")
        options: dict[str, Any] = {"sample_by": "paragraph"} if extension == ".txt" else {}
        with _explained(subject, f"cannot be read as {extension}", _EXPECTED[extension]):
            return load_dataset(_FILE_FORMATS[extension], data_files=source, split="train", **options)
    if os.path.isdir(source):
        with _explained(subject, "is no folder saved by `Dataset.save_to_disk`", "save it so, or give a file"):
            dataset = load_from_disk(source)
        if isinstance(dataset, Dataset):
            return dataset
        if split not in dataset:
            raise UsageError(f"The {name} data set has no split {split!r}: choose from {', '.join(dataset)}.")
        return dataset[split]
    if extension in _FILE_FORMATS or source.startswith((".", "/", "~")):
        raise UsageError(f"{subject} does not exist: check the path.")
    advice = "check the id, the config, the split and the network, or give a file"
    with _explained(f"{subject} (config {config!r}, split {split!r})", "cannot be loaded", advice):
        return load_dataset(source, config, split=split)


@contextmanager
def _explained(subject: str, problem: str, advice: str) -> Iterator[None]:
    """Says what failed, and of why only the kind: the readers' own messages may quote a row."""
    try:
        yield
    except Exception as error:
        # What `datasets` makes of a saved folder and of a file without rows
        if isinstance(error, IndexError) or "corresponds to no data" in str(error):
            raise UsageError(f"{subject} is empty: it needs at least one row.") from error
        raise UsageError(f"{subject} {problem} ({type(error).__name__}): {advice}.") from error
