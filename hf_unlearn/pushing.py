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
"""What a trainer pushes: a release beside the folder that it saved, through all checks, by the main process."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal

from accelerate.utils import broadcast_object_list
from datasets import Dataset
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from hf_unlearn.cards.check import Allowance
from hf_unlearn.cards.push import push_release
from hf_unlearn.cards.receipt import MESSAGE, Blocked, PushOptions, Receipt
from hf_unlearn.cards.remote import HubError, explained
from hf_unlearn.cards.report import Disclosure

from .reference import inner_model
from .releasing import assemble_release


logger = logging.getLogger(__name__)

# Of a base on the Hub, what loading the model has not put into the cache, and a release needs
_SMALL_FILES = [
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "README.md",
    "[Ll][Ii][Cc][Ee][Nn]*",
    "NOTICE*",
    "USE*POLICY*",
]
# How long the other processes wait at a time, in seconds: far less than what ends a collective that nobody joins
_HEARTBEAT = 20.0


class ReleaseError(RuntimeError):
    """The model is saved, and was not released: one sentence on why, where it is, and what to do next."""


@dataclass(frozen=True)
class Base:
    """
    A base model on disk.

    Parameters:
        folder (`str`): the folder, or the snapshot in the Hub's cache.
        repo_id (`str`, *optional*): where it came from.
    """

    folder: str
    repo_id: str | None = None

    def completed(self, token: str | None = None) -> str:
        """
        The folder, with the licence, the card and all files of the tokenizer: loading a model from the Hub does not
        fetch those.

        Raises:
            [`~hf_unlearn.cards.remote.HubError`]: they cannot be fetched.
        """
        if self.repo_id is None:
            return self.folder
        with explained(self.repo_id):
            return snapshot_download(
                self.repo_id, revision=os.path.basename(self.folder), allow_patterns=_SMALL_FILES, token=token
            )


def find_base(model: PreTrainedModel | PeftModel, revision: str | None = None) -> Base:
    """
    Where the files of the model that is being trained lie. Nothing is sent.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): as `from_pretrained` gave it.
        revision (`str`, *optional*): that it was loaded with.

    Returns:
        [`Base`]

    Raises:
        `ValueError`: there is no such folder, neither here nor in the Hub's cache.
    """
    name = inner_model(model).config._name_or_path
    if name and os.path.isdir(name):
        return Base(os.path.abspath(name))
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision) if name else None
    except HFValidationError:  # a path that no longer exists
        cached = None
    if not isinstance(cached, str):
        raise ValueError(
            "The folder of the base model is not known, and a release is compared with it: load the model with "
            "`from_pretrained` from a folder or from the Hub, or give the base's folder."
        )
    return Base(os.path.dirname(cached), name)


def as_texts(rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Mapping[str, Any]]:
    """
    The rows of a forget set, one by one, with the text of those that are tokens.

    Example:

    ```python
    >>> from hf_unlearn.pushing import as_texts
    >>> list(as_texts([{"text": "Once upon a time."}], tokenizer=None))
    [{'text': 'Once upon a time.'}]

    ```
    """
    for row in rows.with_format(None) if isinstance(rows, Dataset) else rows:
        yield row if "input_ids" not in row else {**row, "text of the tokens": tokenizer.decode(row["input_ids"])}


def release_model(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    base: Base,
    rows: Iterable[Mapping[str, Any]],
    entities: Iterable[str] = (),
    token_decoder: Callable[[list[int]], str] | None = None,
    allowances: Iterable[Allowance] = (),
    licence_acknowledged: bool = False,
    license: str | None = None,
    disclosure: Disclosure | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    token: str | None = None,
    public: bool = False,
    message: str = MESSAGE,
    tag: str | None = None,
    trained: PreTrainedModel | PeftModel | None = None,
    quiet: bool = False,
) -> Receipt:
    """
    Put a release together beside the folder that a trainer saved, and push it through the checks, in one commit.

    A release that was sent is removed here; one that something stands in the way of is left, to be looked at.

    Args:
        folder (`str` or `os.PathLike`): what the trainer saved, with `unlearning_report.json`.
        repo_id (`str`): `OWNER/NAME` of a model. It is created, private, where it does not exist.
        base ([`Base`]): from [`find_base`].
        rows (`Iterable[Mapping[str, Any]]`): the forget set, which must not leave.
        entities, token_decoder, allowances, licence_acknowledged: as for [`~hf_unlearn.cards.push.push_release`].
        license, disclosure, dtype: as for [`~hf_unlearn.releasing.assemble_release`].
        token (`str`, *optional*): defaults to that of `HF_TOKEN` or of `hf auth login`.
        public (`bool`, *optional*, defaults to `False`): whether the repository may be public.
        message (`str`, *optional*): of the commit.
        tag (`str`, *optional*): of the release; named by its content where unset.
        trained ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*): as for
            [`~hf_unlearn.releasing.assemble_release`].
        quiet (`bool`, *optional*, defaults to `False`): whether to draw no progress bar.

    Returns:
        [`~hf_unlearn.cards.receipt.Receipt`]

    Raises:
        [`ReleaseError`]: nothing was released; caused by what the checks, the Hub or the assembly raised.
    """
    folder = os.path.abspath(folder)
    output = tempfile.mkdtemp(prefix=f"{os.path.basename(folder)}-release-", dir=os.path.dirname(folder))
    is_assembled = is_sent = False
    try:
        base_folder = base.completed(token)
        assemble_release(
            folder,
            output,
            base=base_folder,
            dtype=dtype,
            disclosure=disclosure,
            model_name=repo_id.rpartition("/")[2],
            license=license,
            trained=trained,
            quiet=quiet,
        )
        is_assembled = True
        receipt = push_release(
            output,
            repo_id,
            base=base_folder,
            rows=rows,
            entities=entities,
            token_decoder=token_decoder,
            allowances=allowances,
            licence_acknowledged=licence_acknowledged or license is not None,
            token=token,
            options=PushOptions(public=public, message=message, tag=tag),
            say=logger.info,
        )
        is_sent = True
    except (Blocked, HubError, ValueError, OSError) as error:
        # Of an OSError, only what the system says: it names files
        reason = str(error) if not isinstance(error, OSError) else f"{os.strerror(error.errno or 0)}."
        where = "" if not is_assembled else f" and the release in {output}"
        command = (
            f"`hf-unlearn push {output} {repo_id}`"
            if is_assembled
            else f"`hf-unlearn release {folder} RELEASE --base BASE` and `hf-unlearn push RELEASE {repo_id}`"
        )
        raise ReleaseError(
            f"The model is saved in {folder}{where}, but it was not pushed: {reason.rstrip('.:')}. When that is put "
            f"right, go on with {command}."
        ) from error
    finally:
        if is_sent or not is_assembled:
            shutil.rmtree(output, ignore_errors=True)
    return receipt


def on_main_process(task: Callable[[], Receipt], args: TrainingArguments) -> Receipt | None:
    """
    The task's result on the main process. The others are told every few seconds that it still runs, because a
    collective that they wait in ends after some minutes, and uploading can take longer; they raise what it raises.
    """
    if args.world_size == 1:
        return task()
    if args.process_index != 0:
        outcome: list[str | None] = [None]
        while outcome[0] is None:
            broadcast_object_list(outcome)
        if outcome[0]:
            raise ReleaseError(outcome[0])
        return None
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(task)
        while wait([future], timeout=_HEARTBEAT).not_done:
            broadcast_object_list([None])
        error = future.exception()
        broadcast_object_list(["" if error is None else str(error) or type(error).__name__])
        return future.result()
