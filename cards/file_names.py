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
"""What a release may hold, by name and by content."""

import io
import pickletools
import re
from typing import Literal


Kind = Literal[
    "card", "markdown", "text", "licence", "config", "tokenizer", "weights", "index", "picture", "code", "other"
]

_TEXTS = ("unlearning_report.json", "thresholds.yaml", "edit_manifest.json", "edit_manifest.json.sig")
_CONFIGS = ("config.json", "generation_config.json", "adapter_config.json")
_TOKENIZER = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.json|vocab\.txt|merges\.txt"
    r"|tokenizer\.model(\.v[0-9]+)?|spiece\.model|spm\.model|sentencepiece(\.bpe)?\.model|tekken\.json"
    r"|[\w-]+\.tiktoken|chat_template\.(jinja|json)|additional_chat_templates/[\w.-]+\.jinja",
    re.ASCII,
)
_LICENCE = re.compile(r"(LICEN[CS]E|NOTICE|USE[-_]POLICY)([-_.][\w.-]*)?", re.IGNORECASE | re.ASCII)
_WEIGHTS = re.compile(r"[\w][\w.-]*\.safetensors", re.ASCII)
_PICTURE = re.compile(r"figures/[\w][\w.-]*\.png", re.ASCII)
_CODE = re.compile(r"[\w][\w-]*\.py", re.ASCII)

# What trainers leave behind, and what is in it: (pattern of the file's name, words)
_LEFTOVERS = [
    (r"training_args\.bin", "a pickle of the training arguments, which may hold a token and local paths"),
    (r"(optimizer|scheduler|scaler)(\.\w+)*", "the state of an optimizer, in which the training data can show"),
    (r"rng_state.*", "the state of random generators"),
    (r"trainer_state\.json", "the log of the training run"),
    (r"(pytorch_model|adapter_model|consolidated).*\.(bin|pt|pth)", "pickled weights; save them as safetensors"),
    (r".*\.(bin|pt|pth|ckpt|pkl|pickle|joblib|npy|npz|h5|msgpack)", "in a format that can run code or hide data"),
    (r".*\.(jsonl|csv|tsv|parquet|arrow|feather)", "data"),
    (r"events\.out\..*", "the log of the training run"),
    (r".*\.(log|out|err)", "a log"),
]
_GLOBAL_NAME = re.compile(r"[A-Za-z_][\w.]*( [A-Za-z_][\w.]*)?")
_MAX_OPCODES = 200_000
_ARCHIVES = [
    (b"PK\x03\x04", "a zip archive, such as torch.save writes"),
    (b"PK\x05\x06", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x93NUMPY", "a NumPy file, which may hold a pickle"),
    (b"\x89HDF", "an HDF5 file"),
]


def kind_of(path: str) -> Kind:
    """
    What a file is by its name; `other` is what no release may hold.

    Args:
        path (`str`):
            The path relative to the folder, with forward slashes.

    Returns:
        `str`: One of `card`, `markdown`, `text`, `licence`, `config`, `tokenizer`, `weights`, `index`, `picture`,
        `code`, `other`.

    Example:

    ```python
    >>> from hf_unlearn.cards.file_names import kind_of
    >>> kind_of("model-00001-of-00002.safetensors"), kind_of("USE_POLICY.md"), kind_of("training_args.bin")
    ('weights', 'licence', 'other')

    ```
    """
    if path == "README.md":
        return "card"
    if path == "robustness_report.md":
        return "markdown"
    if path in _TEXTS:
        return "text"
    if path in _CONFIGS:
        return "config"
    if path == "model.safetensors.index.json":
        return "index"
    patterns: list[tuple[Kind, re.Pattern]] = [
        ("tokenizer", _TOKENIZER),
        ("weights", _WEIGHTS),
        ("picture", _PICTURE),
        ("code", _CODE),
        ("licence", _LICENCE),
    ]
    return next((kind for kind, pattern in patterns if pattern.fullmatch(path)), "other")


def leftover(path: str) -> str | None:
    """What is known of a file that no release may hold, in words; `None` where its name says nothing."""
    name = path.rsplit("/", 1)[-1].lower()
    return next((words for pattern, words in _LEFTOVERS if re.fullmatch(pattern, name, re.DOTALL)), None)


def unsafe_content(content: bytes) -> str | None:
    """
    Whether a file is a pickle or an archive, whatever its name. Nothing is unpickled: opcodes are only read.

    Args:
        content (`bytes`):
            The file, or its first megabyte where it is large.

    Returns:
        `str`: What it is, in words; `None` for anything else.
    """
    for start, words in _ARCHIVES:
        if content.startswith(start):
            return words
    if content[257:262] == b"ustar":
        return "a tar archive, such as old versions of torch.save wrote"
    return "a pickle, which runs code when it is loaded" if _is_pickle(content) else None


def _is_pickle(content: bytes) -> bool:
    """Whether reading the opcodes from the first byte on leads to a call, or to a STOP behind what makes an object."""
    stream, count, loads, runs, last = io.BytesIO(content), 0, False, False, ""
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            count += 1
            last = opcode.name
            if opcode.name in ("GLOBAL", "INST"):
                # Two lines of prose after a "c" or an "i" are no name
                if not _GLOBAL_NAME.fullmatch(argument):
                    return False
                loads = True
            # No letters, with which a text could begin
            loads |= opcode.name in ("PROTO", "STACK_GLOBAL")
            runs |= loads and opcode.name in ("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD")
            if count > _MAX_OPCODES:
                return True
    except Exception:  # genops raises whatever the decoding of an argument raises
        # What was called before the damage has been called by then
        return runs
    # "2.0" is a list of opcodes as well: without any that loads something, all of the file has to be one pickle
    return last == "STOP" and count > 2 and (loads or not content[stream.tell() :].strip())
