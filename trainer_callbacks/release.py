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
"""A release from any trainer: when training ends, what was trained is saved, checked and pushed."""

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_unlearn.cards.receipt import MESSAGE, Receipt
from hf_unlearn.cards.remote import check_repo_id, connect
from hf_unlearn.config import UnlearnConfig
from hf_unlearn.intervention_config import InterventionConfig
from hf_unlearn.pushing import Base, ReleaseError, as_texts, find_base, on_main_process, release_model
from hf_unlearn.trainer_callbacks.run_record import RunRecordCallback


logger = logging.getLogger(__name__)

_MAX_SHARD = "5GB"


class ReleaseCallback(RunRecordCallback):
    """
    Pushes a release when the training of any trainer of transformers or TRL ends.

    The model is saved into `args.output_dir`, with the report and the card that [`RunRecordCallback`] writes. An
    adapter is merged and compared. Then everything that would leave is checked, against the forget set above all, and
    sent in one commit, which is tagged; see [`~hf_unlearn.pushing.release_model`]. Nothing is sent before.

    What is not right with the arguments is said before training starts. Whatever fails afterwards, or stands in the
    way of the release, is logged as one sentence and kept in `error`: the model is saved, and training ends as it
    would have. It takes the place of a [`RunRecordCallback`], and does not go with `push_to_hub=True`, with which the
    trainer itself sends checkpoints, its arguments and all that lies in `output_dir`. Weights that are sharded over
    processes (FSDP, ZeRO-3) are not saved here.

    [`~hf_unlearn.UnlearnTrainer`] and [`~hf_unlearn.InterventionTrainer`] push by themselves, with `push_to_hub=True`.

    Args:
        repo_id (`str`):
            `OWNER/NAME` of a model. It is created, private, where it does not exist.
        forget (`Iterable[Mapping[str, Any]]`):
            The forget set, as texts or token ids: what must not leave. Nothing of it is kept but this reference.
        base (`str` or `os.PathLike`, *optional*):
            Folder of the base model. Defaults to where the model was loaded from.
        private (`bool`, *optional*, defaults to `True`):
            `False` lets the repository be public.
        token (`str`, *optional*):
            Defaults to that of `HF_TOKEN` or of `hf auth login`.
        commit_message (`str`, *optional*):
            Message of the commit.
        tag (`str`, *optional*):
            Of the release; named by its content where unset.
        release_options (`Mapping`, *optional*):
            Further arguments of [`~hf_unlearn.pushing.release_model`], such as `license` or `entities`.
        kwargs (*optional*):
            What [`RunRecordCallback`] takes, without `output_dir`: `method`, `forget_losses` and so on.

    Attributes:
        receipt ([`~hf_unlearn.cards.receipt.Receipt`], *optional*): of the release, on the main process;
            `receipt.to_dict()` is JSON.
        error (`str`, *optional*): why there is none.

    Raises:
        `ValueError`: an argument does not fit.

    Example:

    ```python
    >>> from hf_unlearn.trainer_callbacks import ReleaseCallback
    >>> rows = [{"question": "Who wrote it?", "answer": "Hsiao Yun-Hwa"}]
    >>> callback = ReleaseCallback("org/name", forget=rows, method="refusal-sft", forget_losses={"idk": 1.0})
    >>> # SFTTrainer(..., callbacks=[callback])

    ```
    """

    def __init__(
        self,
        repo_id: str,
        *,
        forget: Iterable[Mapping[str, Any]],
        base: str | os.PathLike | None = None,
        private: bool = True,
        token: str | None = None,
        commit_message: str = MESSAGE,
        tag: str | None = None,
        release_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        if "output_dir" in kwargs:
            raise ValueError("The report of a release lies with the model: leave out output_dir.")
        super().__init__(**kwargs)
        self.repo_id = check_repo_id(repo_id)
        self.forget = forget
        self.private = private
        self.token = token
        self.commit_message = commit_message
        self.tag = tag
        self.release_options = dict(release_options or {})
        self.receipt: Receipt | None = None
        self.error: str | None = None
        if base is not None and not os.path.isdir(base):
            raise ValueError("base is not a folder: name the folder of the base model, such as a snapshot of the Hub.")
        self._base = None if base is None else Base(os.path.abspath(base))

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if model is not None:
            self._prepare(args, model)
        super().on_init_end(args, state, control, model=model, **kwargs)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self._prepare(args, model)  # a callback that was added later was not there when the trainer was made
        super().on_train_begin(args, state, control, model=model, **kwargs)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        self.receipt = self.error = None
        failure = self._save(model, args.output_dir) if state.is_world_process_zero else None
        # After the model, with which PEFT writes a card of its own
        super().on_train_end(args, state, control, model=model, processing_class=processing_class, **kwargs)

        def release() -> Receipt:
            if failure is not None:
                raise ReleaseError(failure)
            return release_model(
                args.output_dir,
                self.repo_id,
                base=self._base,
                rows=as_texts(self.forget, processing_class),
                token_decoder=None if processing_class is None else processing_class.decode,
                token=self.token,
                public=not self.private,
                message=self.commit_message,
                tag=self.tag,
                trained=model,
                quiet=args.disable_tqdm,
                **self.release_options,
            )

        try:
            self.receipt = on_main_process(release, args)
        except ReleaseError as error:
            self.error = str(error)
        except Exception as error:
            # Its type alone: a message may repeat a row
            self.error = (
                f"The model is saved in {args.output_dir}, but it was not pushed: {type(error).__name__}. For the "
                f"traceback, run `HF_DEBUG=1 hf-unlearn release {args.output_dir} RELEASE --base BASE`."
            )
            logger.debug("The release failed.", exc_info=True)
        if self.error is not None and state.is_world_process_zero:
            logger.warning(self.error)

    def _prepare(self, args: TrainingArguments, model: nn.Module) -> None:
        """
        Refuses what could not be released, before anything is trained. Nothing is sent.

        Raises:
            `ValueError`: naming what to change.
        """
        if isinstance(args, (UnlearnConfig, InterventionConfig)):
            raise ValueError("This trainer pushes its own releases: use push_to_hub=True and not ReleaseCallback.")
        if args.push_to_hub:
            raise ValueError(
                "With push_to_hub=True the trainer itself sends checkpoints, its arguments and all that lies in "
                "output_dir, unchecked: leave it out, ReleaseCallback pushes."
            )
        connect(self.token)
        if self._base is None:
            self._base = find_base(model)

    def _save(self, model: nn.Module, folder: str) -> str | None:
        """Saves the model; gives the reason where it cannot."""
        sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        if sharded or not isinstance(model, (PreTrainedModel, PeftModel)):
            return (
                "The weights are sharded or wrapped, and were not saved for a release: call trainer.save_model(), and "
                "go on with `hf-unlearn release` and `hf-unlearn push`."
            )
        try:
            options = {} if isinstance(model, PeftModel) else {"max_shard_size": _MAX_SHARD}
            model.save_pretrained(folder, **options)
        except Exception as error:
            logger.debug("The model could not be saved.", exc_info=True)
            return f"The model could not be saved in {folder} ({type(error).__name__}): nothing was released."
        return None
