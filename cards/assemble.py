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
A release, put together from the folder that a trainer wrote: only what may leave, and everything that the base has.

Nothing here needs torch. An adapter is merged by [`~hf_unlearn.releasing.assemble_release`], which does.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from hf_unlearn.cards.builder import build_card
from hf_unlearn.cards.card import CARD_NAME
from hf_unlearn.cards.diff import check_same_architecture, diff_models
from hf_unlearn.cards.file_names import kind_of
from hf_unlearn.cards.licence import InheritedLicence, inherit_licence
from hf_unlearn.cards.release import read_release
from hf_unlearn.cards.report import REPORT_NAME, Disclosure, UnlearningReport, write_bytes
from hf_unlearn.cards.tensor_files import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    ModelTensors,
    open_model,
    parse_json,
    read_small_file,
)


# Of the trainer's folder, what goes with the weights. Pictures are drawn anew, and an edit manifest would hold the
# hashes of files that are not released.
_TAKEN_OVER = (REPORT_NAME, CARD_NAME, "thresholds.yaml", "robustness_report.md")
_CHUNK = 8 * 2**20
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def assemble_files(
    folder: str | os.PathLike,
    output: str | os.PathLike,
    *,
    base: str | os.PathLike,
    adapter: Literal["merge", "keep"] = "merge",
    disclosure: Disclosure | None = None,
    commitment: str | None = None,
    model_name: str | None = None,
    license: str | None = None,
    progress: Callable[[int], None] = lambda size: None,
) -> list[str]:
    """
    Turn a folder that a trainer saved into a release: a new folder with final files only.

    The weights are copied byte for byte, and not linked: the trainer may write again. Tokenizer, chat template,
    licence files and generation settings are the base's, byte for byte; `config.json` is the base's but for the data
    type of the weights, and for an untied head. The report is written at its disclosure level, with the footprint
    where it has none, and the card is built from it. The folder is there when all of it is, or not at all.

    Args:
        folder (`str` or `os.PathLike`):
            What the trainer saved, with `unlearning_report.json`.
        output (`str` or `os.PathLike`):
            The release; a folder that is new or empty.
        base (`str` or `os.PathLike`):
            Folder of the base model, which may be a snapshot in the Hub's cache.
        adapter (`str`, *optional*, defaults to `"merge"`):
            What becomes of an adapter. `"keep"` releases it as it is, which is reversible: who leaves it out has the
            base. `"merge"` needs torch, and is refused here.
        disclosure (`str`, *optional*):
            As for [`~hf_unlearn.cards.builder.build_card`].
        commitment (`str`, *optional*):
            The same.
        model_name (`str`, *optional*):
            The same.
        license (`str`, *optional*):
            Identifier of the base's licence, where its card names none.
        progress (`Callable[[int], None]`, *optional*):
            Told how many bytes of weights were copied.

    Returns:
        `list[str]`: the files of the release.

    Raises:
        `ValueError`: a folder does not fit, with what to do.

    Example:

    ```python
    >>> import json, tempfile
    >>> import numpy as np
    >>> from pathlib import Path
    >>> from safetensors.numpy import save_file
    >>> from hf_unlearn.cards import BaseModel, Data, DataSummary, Environment, UnlearningReport
    >>> from hf_unlearn.cards.assemble import assemble_files
    >>> report = UnlearningReport(
    ...     tool_version="0.1.0",
    ...     base=BaseModel(None, None, "LlamaForCausalLM", "llama", 2, "float32"),
    ...     method=None,
    ...     data=Data(DataSummary(rows=40, tokens=1203)),
    ...     environment=Environment("3.11.9", "Linux", {}, "cpu", 1, None),
    ... )
    >>> with tempfile.TemporaryDirectory() as home:
    ...     for name, weight in (("base", [1.0, 2.0]), ("trained", [1.0, 2.5])):
    ...         Path(home, name).mkdir()
    ...         tensors = {"weight": np.array(weight, np.float32)}
    ...         save_file(tensors, f"{home}/{name}/model.safetensors", {"format": "pt"})
    ...         _ = Path(home, name, "config.json").write_text(json.dumps({"model_type": "llama"}))
    ...     _ = Path(home, "base", "LICENSE").write_text("As you like.")
    ...     _ = Path(home, "trained", "training_args.bin").write_bytes(b"a token")
    ...     report.save(f"{home}/trained/unlearning_report.json")
    ...     assemble_files(f"{home}/trained", f"{home}/release", base=f"{home}/base")
    ['LICENSE', 'README.md', 'config.json', 'model.safetensors', 'unlearning_report.json']

    ```
    """
    check_sources(folder, base)
    with new_release(output) as release:
        with open_model(folder) as model:
            if model.kind == "adapter" and adapter != "keep":
                raise ValueError(
                    "The folder holds an adapter, and merging it needs torch: install hf-unlearn with it."
                )
            copy_weights(model, release, progress)
        return complete_release(
            folder,
            release,
            base=base,
            disclosure=disclosure,
            commitment=commitment,
            model_name=model_name,
            license=license,
        )


def check_sources(folder: str | os.PathLike, base: str | os.PathLike) -> UnlearningReport:
    """
    The report of what was trained, if the two folders are there and are of one architecture.

    Raises:
        `ValueError`: they are not.
    """
    if not os.path.isdir(base):
        raise ValueError("The base is not a folder: name the folder of the base model, such as a snapshot of the Hub.")
    content = read_small_file(folder, REPORT_NAME)
    if content is None:
        raise ValueError(f"There is no {REPORT_NAME} in the folder: save the model with the trainer, which writes it.")
    with open_model(base, hub_links=True) as before, open_model(folder) as after:
        if before.kind != "model":
            raise ValueError("The base is an adapter: name the model that it belongs to.")
        if after.kind == "model":
            check_same_architecture(before, after)
    return UnlearningReport.from_dict(parse_json(content, REPORT_NAME))


@contextmanager
def new_release(output: str | os.PathLike) -> Iterator[Path]:
    """
    A folder to be filled, which takes its name when the block ends, and is gone where it fails.

    Raises:
        `ValueError`: `output` is there and not empty.
    """
    output = Path(os.path.abspath(output))
    if output.is_symlink() or (output.exists() and not (output.is_dir() and not any(output.iterdir()))):
        raise ValueError("The output is there already and not an empty folder: name a new one.")
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield unfinished
        mask = os.umask(0)
        os.umask(mask)
        unfinished.chmod(0o777 & ~mask)  # that of mkdtemp is for its owner alone
        os.replace(unfinished, output)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def copy_weights(model: ModelTensors, output: Path, progress: Callable[[int], None] = lambda size: None) -> None:
    """
    Copies the weights of an open model or adapter: the files that were checked when it was opened, no other shards.

    Raises:
        `ValueError`: a file became shorter.
    """
    for name, file in model.files.items():
        with open(output / name, "xb") as copy:
            position = 0
            while position < file.size:
                chunk = os.pread(file.descriptor, _CHUNK, position)
                if not chunk:
                    raise ValueError(
                        f"{name} became shorter while it was copied: try again when nothing writes to it."
                    )
                copy.write(chunk)
                position += len(chunk)
                progress(len(chunk))
    if model.index is not None:
        write_bytes(output / INDEX_NAME, model.index)
    if model.kind == "adapter":
        write_bytes(output / ADAPTER_CONFIG_NAME, _dump(model.config))


def copy_base_files(base: str | os.PathLike, output: Path) -> None:
    """
    Writes what a release has of its base beside the weights in `output`: `config.json`, `generation_config.json`, the
    tokenizer with its chat templates, and code where the base's configuration names it.
    """
    with open_model(output) as released:
        if released.kind == "adapter":
            return  # it is used with its base, which has these files
        with read_release(base, hub_links=True) as source:
            content = source.content(CONFIG_NAME)
            if content is None:
                raise ValueError(f"The base has no {CONFIG_NAME}: name the folder of the base model.")
            config = parse_json(content, CONFIG_NAME)
            wanted = _config(config, base, released)
            write_bytes(output / CONFIG_NAME, content if wanted == config else _dump(wanted))
            kinds = ["tokenizer", *(["code"] if "auto_map" in config else [])]
            for path, file in source.files.items():
                if kind_of(path) in kinds or path == "generation_config.json":
                    (output / path).parent.mkdir(exist_ok=True)
                    with file.open() as stream, open(output / path, "wb") as copy:
                        shutil.copyfileobj(stream, copy, _CHUNK)


def _config(config: Mapping[str, Any], base: str | os.PathLike, released: ModelTensors) -> dict[str, Any]:
    """The base's `config.json` for the weights that are released."""
    config = dict(config)
    config.pop("_name_or_path", None)  # often a path of whoever made the base
    dtype = main_dtype(released)
    for key in ("dtype", "torch_dtype"):
        if key in config and dtype is not None:
            config[key] = dtype
    with open_model(base, hub_links=True) as before:
        untied = [name for name in released.tensors if name.endswith("lm_head.weight") and name not in before.tensors]
    if untied and config.get("tie_word_embeddings", True):
        config["tie_word_embeddings"] = False
    return config


def main_dtype(model: ModelTensors) -> str | None:
    """The floating data type of most parameters, as `config.json` names it; `None` where it is none of the three."""
    counts: dict[str, int] = {}
    for tensor in model.tensors.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.parameters
    return DTYPES.get(max(counts, key=counts.__getitem__))


def complete_release(
    folder: str | os.PathLike,
    output: Path,
    *,
    base: str | os.PathLike,
    disclosure: Disclosure | None = None,
    commitment: str | None = None,
    model_name: str | None = None,
    license: str | None = None,
    is_merged: bool = False,
) -> list[str]:
    """
    Puts everything beside the weights that lie in `output`; the arguments are those of [`assemble_files`].

    Args:
        is_merged (`bool`, *optional*, defaults to `False`):
            Whether the weights are not those that were trained, but what merging an adapter made of them: then the
            footprint is measured anew, and certificates, which hold for the others, are left out.
    """
    copy_base_files(base, output)
    for name in _TAKEN_OVER:
        if (content := read_small_file(folder, name)) is not None:
            write_bytes(output / name, content)
    if is_merged:
        report = UnlearningReport.load(output / REPORT_NAME)
        report.certificates = []
        report.save(output / REPORT_NAME)
    measure_footprint(output, base, anew=is_merged)
    inherited = copy_licence(base, output, license=license)
    if (output / ADAPTER_CONFIG_NAME).is_file():
        _name_base(output)
    build_card(
        output,
        disclosure=disclosure,
        commitment=commitment,
        model_name=model_name,
        license=inherited.metadata,
    )
    return sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())


def _name_base(output: Path) -> None:
    """An adapter names its base by the id that the card has, whatever folder it was trained from."""
    model_id = UnlearningReport.load(output / REPORT_NAME).base.model_id
    if model_id is None:
        raise ValueError(
            "An adapter alone needs a base on the Hub, and the report names none: load the base by its Hub id, or "
            "merge the adapter."
        )
    config = parse_json((output / ADAPTER_CONFIG_NAME).read_bytes(), ADAPTER_CONFIG_NAME)
    write_bytes(output / ADAPTER_CONFIG_NAME, _dump(config | {"base_model_name_or_path": model_id}))


def copy_licence(
    base: str | os.PathLike, output: str | os.PathLike, *, license: str | None = None
) -> InheritedLicence:
    """
    Copies the licence files of the base, byte for byte.

    Args:
        base (`str` or `os.PathLike`): folder of the base.
        output (`str` or `os.PathLike`): the release.
        license (`str`, *optional*): identifier of the base's licence, where its card names none.

    Returns:
        [`~hf_unlearn.cards.licence.InheritedLicence`]: with what the base's card names, or else with `license`.

    Raises:
        `ValueError`: the base cannot be read, or its card names another licence.
    """
    inherited = inherit_licence(base, acknowledged=license is not None)
    if license is not None and inherited.metadata.get("license") not in (None, license):
        raise ValueError("license is not what the base's card names: leave it out, and it is inherited.")
    if license is not None and not inherited.metadata:
        inherited.metadata = {"license": license}
    for name, content in inherited.files.items():
        write_bytes(Path(output, name), content)
    return inherited


def measure_footprint(folder: str | os.PathLike, base: str | os.PathLike, *, anew: bool = False) -> None:
    """
    How far the weights in `folder` moved, for the report there: of a run that kept no copy of them, or needs none.

    Args:
        folder (`str` or `os.PathLike`): with weights and `unlearning_report.json`. Without a report nothing is done.
        base (`str` or `os.PathLike`): folder of the base.
        anew (`bool`, *optional*, defaults to `False`): whether a footprint that is there is replaced.

    Raises:
        `ValueError`: the two cannot be compared.
    """
    path = os.path.join(folder, REPORT_NAME)
    if not os.path.isfile(path):
        return  # which the builder says
    report = UnlearningReport.load(path)
    if report.method is None or (report.footprint is not None and not anew):
        return
    with open_model(base, hub_links=True) as before, open_model(folder) as after:
        report.footprint = diff_models(before, after).footprint()
    report.save(path)


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
