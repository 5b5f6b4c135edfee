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
Scores that are kept, so that a reference model is measured once and a killed command goes on where it was.

A value stands under a key that holds everything that it depends on: the weights, the rows, the settings, the code and
the versions, each by its hash. Whatever changes, the old value is not found. Values are numbers about the forget set:
only the owner can read them.
"""

import hashlib
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import UnlearnConfig
from ..data import require_map_style


# What of the settings changes how rows become tokens
_DATA_SETTINGS = (
    "max_length",
    "dataset_text_field",
    "completion_only_loss",
    "assistant_only_loss",
    "split_long_texts",
)


# Of a model's and an adapter's configuration, at any depth
_ORIGIN = (
    "_name_or_path",
    "transformers_version",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
    "inference_mode",
)


class ScoreCache:
    """
    JSON values by key, in a folder or in memory.

    Args:
        folder (`str`, *optional*): a folder for nothing else, made at the first value, that its owner alone can read;
            git ignores it. Without it values last as long as the object.

    Example:

    ```python
    >>> from hf_unlearn.metrics.cache import ScoreCache
    >>> cache = ScoreCache()
    >>> cache.get({"model": "a", "rows": "b"}, lambda: [0.5, 0.25])
    [0.5, 0.25]
    >>> cache.get({"rows": "b", "model": "a"}, lambda: 1 / 0)  # the same key: nothing is computed
    [0.5, 0.25]

    ```
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = None if folder is None else Path(folder)
        self._values: dict[str, str] = {}
        self._fingerprints: dict[int, tuple[Any, str]] = {}

    def get(self, key: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """
        The value of a key; what is not there is computed and kept.

        With several processes, all call it with the same key, and all compute or none: what the first one finds
        counts.

        Args:
            key (`dict[str, Any]`): JSON values without text of the rows; code and versions are added.
            compute (`Callable[[], Any]`): gives the value, which JSON must hold exactly.
        """
        state = PartialState()
        key = {**key, "code": code_digest(), "torch": torch.__version__, "transformers": transformers.__version__}
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        found = [self._read(name) if state.is_main_process else None]
        if state.num_processes > 1:
            broadcast_object_list(found)
        if found[0] is None:
            found[0] = json.dumps(compute(), allow_nan=False)
            if state.is_main_process:
                self._write(name, found[0])
        return json.loads(found[0])

    def fingerprint(self, model: PreTrainedModel | PeftModel) -> str:
        """
        [`fingerprint_model`], once for each model object. Its weights must not change for good as long as the cache
        lives; those of an attack come back bit for bit.
        """
        if id(model) not in self._fingerprints:
            # The model is kept as well, so that no other can get its id
            self._fingerprints[id(model)] = (model, fingerprint_model(model))
        return self._fingerprints[id(model)][1]

    def _read(self, name: str) -> str | None:
        if self.folder is None:
            return self._values.get(name)
        try:
            content = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, or not whole
            return None
        return json.dumps(content["value"])

    def _write(self, name: str, text: str) -> None:
        if self.folder is None:
            self._values[name] = text
            return
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        # In one step: who reads it sees all of it, also where two commands share the folder. A number that is cut off
        # is another number; an object that is cut off is none.
        for file_name, content in ((".gitignore", "*\n"), (f"{name}.json", f'{{"value": {text}}}')):
            temporary = self.folder / f".{file_name}.{os.getpid()}.tmp"
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
                file.write(content)
            os.replace(temporary, self.folder / file_name)


def fingerprint_model(model: PreTrainedModel | PeftModel) -> str:
    """
    SHA-256 of a model's weights and buffers, their names, types and shapes, its configuration, that of its adapters
    and which of them are active, and the EOS tokens that end what it generates.

    Memory: one tensor at a time, on the CPU.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): the model.
    """
    digest = hashlib.sha256()
    parts = {"config": _without_origin(model.config.to_dict()), "eos": model.generation_config.eos_token_id}
    if isinstance(model, PeftModel):
        # The weights of two adapters may be the same, and their scale another
        parts["adapters"] = {name: _without_origin(config.to_dict()) for name, config in model.peft_config.items()}
        parts["active"] = model.active_adapters
        if not model.active_peft_config.is_prompt_learning:
            parts["enabled"] = model.get_model_status().enabled
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _without_origin(config: Any) -> Any:
    """A configuration without where it came from and who wrote it, which say nothing of what the model computes."""
    if not isinstance(config, dict):
        return sorted(config) if isinstance(config, set) else config
    return {key: _without_origin(value) for key, value in config.items() if key not in _ORIGIN}


def fingerprint_rows(dataset: Dataset) -> str:
    """
    SHA-256 of the rows of a data set, in their order.

    Args:
        dataset ([`~datasets.Dataset`]): the rows.
    """
    digest = hashlib.sha256()
    for row in require_map_style(dataset, "The data set").with_format(None):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase, args: UnlearnConfig) -> str:
    """
    SHA-256 of what turns rows into tokens: vocabulary and rules, chat template, special tokens, and the data settings.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer.
        args ([`UnlearnConfig`]): `max_length` and the other data settings.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    if tokenizer.is_fast:
        for state in ("padding", "truncation"):  # of the last call
            rules.pop(state)
    parts = {
        "rules": rules,
        "template": tokenizer.chat_template,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "settings": {name: vars(args)[name] for name in _DATA_SETTINGS},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@cache
def code_digest() -> str:
    """SHA-256 of the code of hf-unlearn: a value of other code is not found."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
