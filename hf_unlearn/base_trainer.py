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
"""`ReportingTrainer`: what all runs share, however they change the weights: measuring, saving, reporting."""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, HubStrategy

from hf_unlearn.cards.receipt import MESSAGE, Receipt
from hf_unlearn.cards.remote import check_repo_id, connect

from .config import UnlearnConfig
from .data import prepare_dataset
from .forward import Decoder, redirect_forward
from .objective import score_rows
from .pushing import Base, as_texts, find_base, on_main_process, release_model
from .recording import Record, save_report
from .reference import inner_model


logger = get_logger(__name__)


class ReportingTrainer(Trainer):
    """
    Base of the trainers here: measures rows exactly, saves without pickle, and writes the report and the card.

    A subclass says how the weights change, and sets `record` before the first evaluation, and `forget_rows`.

    With `push_to_hub=True` nothing is sent while it trains, checkpoints included. `save_model()` and `push_to_hub()`
    put a release together beside `output_dir`, merge an adapter, check everything that would leave, and send it in one
    commit; see [`~hf_unlearn.pushing.release_model`].

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): the model, its scope already set.
        args ([`~transformers.TrainingArguments`]): with the data settings that
            [`~hf_unlearn.data.prepare_dataset`] reads, and `model_init_kwargs`.
        kwargs: all else that [`~transformers.Trainer`] takes, `eval_dataset` as [`prepare_eval_dataset`] returns it.

    Attributes:
        record ([`~hf_unlearn.recording.Record`]): what the report is made from.
        forget_rows (`Iterable[Mapping[str, Any]]`): what must not leave, as it was given.
        forget_entities (`list[str]`): names that must not leave either.
        receipt ([`~hf_unlearn.cards.receipt.Receipt`], *optional*): of the last push of this process.
    """

    record: Record
    forget_rows: Iterable[Mapping[str, Any]]

    def __init__(self, model: PreTrainedModel | PeftModel, args: TrainingArguments, **kwargs: Any):
        self.forget_entities: list[str] = []
        self.receipt: Receipt | None = None
        self._base: Base | None = None
        if args.push_to_hub:  # before anything is trained in vain
            check_pushing(args)
            self._base = self._find_base(model, args)
        self._use_cache = inner_model(model).config.use_cache
        self._evaluation_rows: list[Tensor] = []
        super().__init__(model=model, args=args, **kwargs)
        if args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__} does not support `nn.DataParallel`, which is used when one process sees "
                "several GPUs: launch with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )

    def _set_signature_columns_if_needed(self) -> None:
        # Columns that `remove_unused_columns` leaves in place: the two sets of a pair, and those of an evaluation row.
        if self._signature_columns is None:
            self._signature_columns = ["forget", "retain", "input_ids", "labels", "topic"]

    def _redirect(self, model: nn.Module, method: Callable, *args: Any) -> Any:
        """Runs `method` as the forward of the wrapped model."""
        unwrapped_model = self.accelerator.unwrap_model(model)
        inner = inner_model(unwrapped_model)
        if isinstance(inner, FSDPModule):
            # Sharded when it was loaded, and the adapter put around it: the root of FSDP2 is the model inside
            model = unwrapped_model = inner
        # Autocast is entered here: the accelerator puts it around the model's own forward, which is replaced.
        with self.accelerator.autocast():
            return redirect_forward(model, unwrapped_model, method, *args)

    # ---- Evaluation ----

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Measures each set: `loss` (token-mean negative log-likelihood, nats), `probability` (mean over rows of
        `P(answer | prompt)^(1 / tokens)`) and `rows`. Takes the formats that the constructor takes.

        The first evaluation before any step is the report's "before", the last one after it is "after".
        """
        if isinstance(eval_dataset, Dataset):
            eval_dataset = prepare_eval_dataset(eval_dataset, self.processing_class, self.args)
        elif isinstance(eval_dataset, dict):
            metrics = {}
            for name, rows in eval_dataset.items():
                rows = prepare_dataset(rows, self.processing_class, self.args, name)
                metrics.update(super().evaluate(rows, ignore_keys, f"{metric_key_prefix}_{name}"))
            return metrics
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        # The Trainer averages batch means; rows are collected here instead, so that neither the batch size nor the
        # number of processes changes a metric.
        is_prepared = self.deepspeed is not None or isinstance(self.model, FSDPModule)
        if (self.is_deepspeed_enabled or self.is_fsdp_enabled) and not is_prepared:
            raise ValueError(
                "evaluate() before train() is not supported with FSDP2 and DeepSpeed, which prepare the model when "
                "training starts: set eval_on_start=True, which measures the same."
            )
        self._evaluation_rows = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        nll, tokens = torch.cat(self._evaluation_rows).double().unbind(-1)
        metrics = {
            "loss": (nll.sum() / tokens.sum()).item(),
            "probability": torch.exp(-nll / tokens).mean().item(),
            "rows": len(nll),
        }
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self.record.add_evaluation(metric_key_prefix, metrics, step=self.state.global_step)
        return output

    def _decoder(self, model: PreTrainedModel | PeftModel) -> Decoder:
        """The decoder that evaluation runs, of the model without DDP's wrapper."""
        return Decoder(inner_model(model))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        decoder = self._decoder(self.accelerator.unwrap_model(model))
        with torch.no_grad():
            rows, logits = self._redirect(model, score_rows, decoder, inputs, not prediction_loss_only)
        self._evaluation_rows.append(self.accelerator.gather_for_metrics(rows).cpu())
        loss = rows[:, 0].sum() / rows[:, 1].sum()
        return loss, logits, None if logits is None else inputs["labels"]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # The Trainer's estimate assumes one full forward and a gradient for every parameter: neither holds here.
        return 0

    # ---- The saved model ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # The Trainer pickles its arguments beside the weights, tokens included. They are taken out before, and the
        # pickle, which nothing reads, after. It also turned `use_cache` off for training: the saved model generates
        # as the original did.
        config = inner_model(self.accelerator.unwrap_model(self.model)).config
        kept = self.args.hub_token, self.args.model_init_kwargs, config.use_cache
        self.args.hub_token, self.args.model_init_kwargs, config.use_cache = None, None, self._use_cache
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token, self.args.model_init_kwargs, config.use_cache = kept
        pickle = os.path.join(output_dir or self.args.output_dir, "training_args.bin")
        if self.args.should_save and os.path.isfile(pickle):
            os.remove(pickle)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the model, `unlearning_report.json` and the model card, loadable with `from_pretrained`. With
        `push_to_hub=True` the release is pushed then.

        Args:
            output_dir (`str`, *optional*): folder. Defaults to `args.output_dir`.

        Raises:
            [`~hf_unlearn.pushing.ReleaseError`]: the model is saved, and was not pushed.
        """
        # The Trainer's own push would come before the report is written
        super().save_model(output_dir, _internal_call=True)
        if not _internal_call:
            folder = output_dir or self.args.output_dir
            self._save_report(folder)
            if self.args.push_to_hub:
                self._release(folder)

    def _save_report(self, folder: str) -> None:
        try:
            report = self.record.report(self)  # all processes: shards are summed over them
            if self.args.should_save:
                save_report(report, folder)
        except Exception:  # a bug in the card must not cost a trained model, which is on disk by now
            logger.exception(f"The model is saved in {folder}, but its report and card could not be written.")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the report and the card into `args.output_dir`, in place of the Trainer's own card."""
        self._save_report(self.args.output_dir)

    # ---- The Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Sends nothing: the repository is created by the push, after all checks."""
        self.hub_model_id = self.args.hub_model_id

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        pass  # what has not been unlearned to the end does not leave

    def push_to_hub(
        self,
        commit_message: str = MESSAGE,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        tag: str | None = None,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Receipt | None:
        """
        Saves the model and pushes a release of it: checked files only, in one commit, with a tag.

        To be called on all processes. The main one pushes, the others wait.

        Args:
            commit_message (`str`, *optional*):
                Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                A push in the background is refused: whether it was sent has to be known.
            token (`str`, *optional*):
                Token with write access. Defaults to `args.hub_token`, `HF_TOKEN` or that of `hf auth login`.
            revision (`str`, *optional*):
                Refused: a release goes to main.
            private (`bool`, *optional*):
                `False` lets the repository be public. Defaults to `args.hub_private_repo`, and that to private.
            tag (`str`, *optional*):
                Of the release; named by its content where unset.
            options (`Mapping`, *optional*):
                Further arguments of [`~hf_unlearn.pushing.release_model`], such as `license` or `allowances`.
            kwargs (*optional*):
                What the Trainer would put into a card of its own, such as `dataset_name`: left out.

        Returns:
            [`~hf_unlearn.cards.receipt.Receipt`]: on the main process.

        Raises:
            `ValueError`: an argument does not fit.
            [`~hf_unlearn.pushing.ReleaseError`]: the model is saved, and was not pushed.
        """
        check_pushing(self.args, token)
        if not blocking or revision is not None:
            raise ValueError("A release is pushed to main, and waited for: leave out `blocking` and `revision`.")
        self.save_model(_internal_call=True)
        self._save_report(self.args.output_dir)
        return self._release(
            self.args.output_dir, message=commit_message, token=token, private=private, tag=tag, **(options or {})
        )

    def _release(
        self,
        folder: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        entities: Iterable[str] = (),
        **options: Any,
    ) -> Receipt | None:
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        trained = self.accelerator.unwrap_model(self.model)
        base = self._base or self._find_base(trained, self.args)
        is_private = self.args.hub_private_repo if private is None else private

        def release() -> Receipt:
            return release_model(
                folder,
                self.args.hub_model_id,
                base=base,
                rows=as_texts(self.forget_rows, self.processing_class),
                token_decoder=self.processing_class.decode,
                token=token or self.args.hub_token,
                public=is_private is False,
                trained=trained,
                quiet=self.args.disable_tqdm,
                entities=[*self.forget_entities, *entities],
                **options,
            )

        self.receipt = on_main_process(release, self.args)
        return self.receipt

    def _find_base(self, model: nn.Module, args: TrainingArguments) -> Base:
        return find_base(model, (args.model_init_kwargs or {}).get("revision"))


def check_pushing(args: TrainingArguments, token: str | None = None) -> None:
    """
    Refuses what a release cannot be pushed with; a constructor calls it first, so that nothing is loaded in vain.
    Nothing is sent.

    Args:
        args ([`~transformers.TrainingArguments`]): with `hub_model_id` and the other `hub_` arguments.
        token (`str`, *optional*): defaults to `args.hub_token`, `HF_TOKEN` or that of `hf auth login`.

    Raises:
        `ValueError`: naming what to change.
    """
    if args.hub_model_id is None:
        raise ValueError("push_to_hub needs hub_model_id: name the repository, as OWNER/NAME.")
    check_repo_id(args.hub_model_id)
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"hub_strategy={args.hub_strategy.value!r} would send what is half unlearned: leave it out, a release is "
            "pushed once, at the end."
        )
    if args.hub_revision is not None or args.hub_always_push:
        raise ValueError("hub_revision and hub_always_push are not supported: a release goes to main, at the end.")
    connect(token or args.hub_token)


def prepare_eval_dataset(
    eval_dataset: Dataset | dict[str, Dataset], tokenizer: PreTrainedTokenizerBase, args: UnlearnConfig
) -> Dataset | dict[str, Dataset]:
    """Tokenizes one evaluation set, or each by its name."""
    if isinstance(eval_dataset, dict):
        return {name: prepare_dataset(rows, tokenizer, args, name) for name, rows in eval_dataset.items()}
    return prepare_dataset(eval_dataset, tokenizer, args, "evaluation")
