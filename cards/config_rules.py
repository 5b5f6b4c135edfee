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
"""The rules of configuration files: what may differ from the base's, and what no release may say."""

import json
import re
from typing import Any

from hf_unlearn.cards.findings import Finding


# Keys that may differ from the base's, and what they may hold. A free text could carry anything.
_DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_VERSION = re.compile(r"[0-9]{1,4}(\.[0-9]{1,4}){1,3}(\.?(dev|rc|a|b|post)[0-9]{0,4})?")
_SUPPRESSION = (
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "forced_decoder_ids",
    "force_words_ids",
    "sequence_bias",
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)
_PATH = re.compile(r"[/~]|\.{1,2}/|[A-Za-z]:[\\/]|\\\\|file:")
_MAX_DEPTH = 64


def is_hub_id(text: str) -> bool:
    """
    Whether a text can be the id of a repository on the Hub, and so no path.

    Args:
        text (`str`):
            `org/name`, or `name` alone for the oldest models.

    Example:

    ```python
    >>> from hf_unlearn.cards.config_rules import is_hub_id
    >>> is_hub_id("org/name"), is_hub_id("./name"), is_hub_id("/data/name")
    (True, False, False)

    ```
    """
    if not _HUB_ID.fullmatch(text) or text.endswith(".git") or "--" in text or ".." in text:
        return False
    return all(part[-1] not in "-." for part in text.split("/"))


def check_config(
    file: str, config: dict[str, Any], base: dict[str, Any], tensor_names: set[str] | None = None
) -> list[Finding]:
    """
    Whether `config.json` is the base's but for the keys that a release may set anew.

    Those are `dtype` or `torch_dtype`, `transformers_version`, `use_cache`, and `tie_word_embeddings` to false
    where the release has an `lm_head.weight` of its own; `_name_or_path` may be gone.

    Args:
        file (`str`):
            What the findings call it.
        config (`dict`):
            The released configuration.
        base (`dict`):
            The base's.
        tensor_names (`set[str]`, *optional*):
            Names of the released tensors.

    Returns:
        `list[Finding]`: Rules `architecture-differs`, `config-differs`, `config-suppression`, `custom-code`. Keys are
        named where the base has them too.
    """
    untied = any(name.endswith("lm_head.weight") for name in tensor_names or ())
    allowed = {
        "dtype": _is_dtype,
        "torch_dtype": _is_dtype,
        "transformers_version": _is_version,
        "use_cache": lambda value: isinstance(value, bool),
        "tie_word_embeddings": lambda value: value is False and untied and base.get("tie_word_embeddings", True),
    }
    findings = []
    for key in ("architectures", "model_type"):
        if not _same(config.get(key), base.get(key)):
            message = f"`{key}` is not the base's: this model is no change of that base; give the right base."
            findings.append(Finding("architecture-differs", file, message))
    return findings + _differences(
        file, config, base, allowed, ("_name_or_path", "dtype", "torch_dtype"), ("architectures", "model_type")
    )


def check_generation_config(
    file: str, config: dict[str, Any], base: dict[str, Any] | None, base_config: dict[str, Any]
) -> list[Finding]:
    """
    Whether `generation_config.json` is the base's but for `transformers_version` and `use_cache`. Where the base has
    none, it may hold what `save_pretrained` makes of the base's `config.json`: the special token ids.

    Args:
        file (`str`):
            What the findings call it.
        config (`dict`):
            The released one.
        base (`dict`, *optional*):
            The base's, or `None` where it has none.
        base_config (`dict`):
            The base's `config.json`.

    Returns:
        `list[Finding]`: Rules `config-differs` and `config-suppression`.
    """
    allowed = {
        "transformers_version": _is_version,
        "use_cache": lambda value: isinstance(value, bool),
        "_from_model_config": lambda value: isinstance(value, bool),
    }
    ids = () if base is not None else tuple(key for key in _TOKEN_IDS if key not in config)
    if base is None:
        base = {key: base_config[key] for key in _TOKEN_IDS if key in base_config}
    return _differences(file, config, base, allowed, ("_from_model_config", *ids))


def check_alone(file: str, config: dict[str, Any]) -> list[Finding]:
    """
    What can be said of a configuration without the base's: no path, no code of its own, no token that is suppressed.

    Args:
        file (`str`):
            What the findings call it.
        config (`dict`):
            The content of a JSON file.

    Returns:
        `list[Finding]`: Rules `config-path`, `config-suppression`, `custom-code` and `json`.
    """
    findings = check_paths(file, config)
    return findings or _differences(
        file, {key: config[key] for key in (*_SUPPRESSION, "auto_map") if key in config}, {}
    )


def check_adapter_config(file: str, config: dict[str, Any], base_models: list[str]) -> list[Finding]:
    """
    Whether `adapter_config.json` names its base by an id of the Hub, the same as the card, and nothing by a path.

    Args:
        file (`str`):
            What the findings call it.
        config (`dict`):
            The content of the file.
        base_models (`list[str]`):
            What the card names as `base_model`; empty where it names none.

    Returns:
        `list[Finding]`: Rules `adapter-base` and `config-path`.
    """
    findings = check_paths(file, config)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not is_hub_id(base):
        message = "`base_model_name_or_path` is no id of the Hub: write the id of the base, as org/name."
        findings.append(Finding("adapter-base", file, message))
    elif base_models and base not in base_models:
        message = "`base_model_name_or_path` is not the `base_model` of the card: make them agree."
        findings.append(Finding("adapter-base", file, message))
    return findings


def check_paths(file: str, content: Any) -> list[Finding]:
    """
    Whether a text in parsed JSON, a key included, looks like a path of the local machine.

    Args:
        file (`str`):
            What the findings call it.
        content:
            Parsed JSON.

    Returns:
        `list[Finding]`: Rule `config-path`; rule `json` where the nesting is too deep to look at.
    """
    # A stack, no recursion: the nesting is the file's choice
    stack = [(content, 0)]
    while stack:
        value, depth = stack.pop()
        if depth > _MAX_DEPTH:
            return [Finding("json", file, f"it is nested more than {_MAX_DEPTH} deep: write the file again.")]
        if isinstance(value, dict):
            stack += [(key, depth + 1) for key in value] + [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            stack += [(item, depth + 1) for item in value]
        elif isinstance(value, str) and _is_path(value):
            return [Finding("config-path", file, "it holds a path: remove the key, or write an id of the Hub.")]
    return []


def _is_path(text: str) -> bool:
    if text.startswith("https://"):
        return False
    return bool(_PATH.match(text)) or (text.count("/") > 1 and not re.search(r"\s", text))


def _differences(
    file: str,
    config: dict[str, Any],
    base: dict[str, Any],
    allowed: dict[str, Any] | None = None,
    may_miss: tuple[str, ...] = (),
    apart: tuple[str, ...] = (),
) -> list[Finding]:
    findings = []
    for key in dict.fromkeys([*base, *config]):
        if key in apart or (key in base and key in config and _same(base[key], config[key])):
            continue
        if key not in config:
            if key not in may_miss and base[key] is not None:
                findings.append(Finding("config-differs", file, f"`{key}` of the base is gone: copy the base's file."))
        elif key in _SUPPRESSION:
            if config[key] is not None:
                message = f"`{key}` hides tokens instead of unlearning them, and lists them: remove it."
                findings.append(Finding("config-suppression", file, message))
        elif key == "auto_map":
            message = "`auto_map` runs code that the base does not run: remove it."
            findings.append(Finding("custom-code", file, message))
        elif not (allowed and key in allowed and allowed[key](config[key])):
            named = f"`{key}` is not the base's" if key in base or key in (allowed or ()) else "it has a new key"
            findings.append(Finding("config-differs", file, f"{named}: copy the base's file."))
    return list(dict.fromkeys(findings))


def _same(one: Any, other: Any) -> bool:
    # By their text: to Python, true is 1 and 1 is 1.0
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _is_dtype(value: Any) -> bool:
    return value in _DTYPES if isinstance(value, str) else False


def _is_version(value: Any) -> bool:
    return isinstance(value, str) and bool(_VERSION.fullmatch(value))
