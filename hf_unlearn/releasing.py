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
"""From the folder that a trainer saved to a release: an adapter is merged, and nothing leaves before it computes."""

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_unlearn.cards.assemble import (
    DTYPES,
    assemble_files,
    check_sources,
    complete_release,
    copy_base_files,
    new_release,
)
from hf_unlearn.cards.report import Disclosure
from hf_unlearn.cards.tensor_files import open_model

from .reference import adapter_can_be_disabled


logger = logging.getLogger(__name__)

# Lengths of the rows of random tokens on which a merged model has to compute what base and adapter do
_PROBE_LENGTHS = (1, 7, 19, 48)
# Root mean square of what the logits may be off, in units of that of the logits. Sums in another order give about 1e-7
# per matrix; 1e-5 is what some hundred of them add up to, and far below what any edit of use does
_FLOAT32_BOUND = 1e-5
# How much of the adapter's effect on the logits may be lost to rounding the merged weights to the base's data type
_MAX_LOST = 0.05
_MAX_SHARD = "5GB"


@dataclass(frozen=True)
class MergeCheck:
    """
    What merging cost, measured on the saved files. All logits are computed in float32, so that only the weights count.

    Parameters:
        dtype (`str`): data type in which the merged weights are stored.
        error (`float`): root mean square of the difference between the logits of the release and those of base and
            adapter, in units of the root mean square of the latter.
        lost (`float`): the same difference in units of what the adapter does to the logits: the share of the edit
            that rounding took.
    """

    dtype: str
    error: float
    lost: float


@dataclass(frozen=True)
class Assembled:
    """
    A release that was put together.

    Parameters:
        files (`list[str]`): its files.
        merge ([`MergeCheck`], *optional*): where an adapter was merged.
    """

    files: list[str]
    merge: MergeCheck | None = None


def assemble_release(
    folder: str | os.PathLike,
    output: str | os.PathLike,
    *,
    base: str | os.PathLike,
    adapter: Literal["merge", "keep"] = "merge",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    disclosure: Disclosure | None = None,
    commitment: str | None = None,
    model_name: str | None = None,
    license: str | None = None,
    trained: PreTrainedModel | PeftModel | None = None,
    quiet: bool = False,
) -> Assembled:
    """
    Turn a folder that a trainer saved, with full weights or an adapter, into a release that `hf-unlearn check` passes.

    Full weights are copied, as [`~hf_unlearn.cards.assemble.assemble_files`] says. An adapter is merged: base and
    adapter are loaded in float32, `W + B A · scale` is saved as safetensors, loaded again from the files, and compared
    on rows of random tokens with base and adapter before the release gets its name. In float32 the logits have to be
    the same up to 1e-5 of their size. In bfloat16, `W + Δ` is rounded to 8 bits: where `Δ` is small beside `W` a part
    of it is gone, and with it a part of what was unlearned. What is lost is
    `rms(logits of the release - logits with adapter) / rms(logits with adapter - logits of the base)`; up to 5 % is
    accepted.

    The footprint of merged weights is measured on the files. Certificates, which hold for base and adapter as they
    were, are left out of the report of merged weights.

    Args:
        folder (`str` or `os.PathLike`):
            What the trainer saved, with `unlearning_report.json`.
        output (`str` or `os.PathLike`):
            The release; a folder that is new or empty. It is there when all of it is, or not at all.
        base (`str` or `os.PathLike`):
            Folder of the base model; see [`~hf_unlearn.pushing.find_base`].
        adapter (`str`, *optional*, defaults to `"merge"`):
            `"keep"` releases an adapter as it is, which is reversible, and blocked by the checks unless allowed.
        dtype (`str`, *optional*, defaults to `"auto"`):
            In what merged weights are stored. `"auto"` is the base's data type, and float32 where rounding to that
            loses more than 5 % of the edit, which is said.
        disclosure (`str`, *optional*):
            As for [`~hf_unlearn.cards.builder.build_card`].
        commitment (`str`, *optional*):
            The same.
        model_name (`str`, *optional*):
            The same.
        license (`str`, *optional*):
            Identifier of the base's licence, where its card names none.
        trained ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The model that was trained, if it is still there. The weights below its adapter have to be the base's:
            those of a model that was changed after it was loaded are in no file.
        quiet (`bool`, *optional*, defaults to `False`):
            Whether to draw no progress bar.

    Returns:
        [`Assembled`]

    Raises:
        `ValueError`: a folder does not fit, or the merged model does not compute what base and adapter do.

    Example:

    ```python
    from hf_unlearn.releasing import assemble_release

    trainer.save_model("out")
    assemble_release("out", "release", base="base", model_name="name")
    ```
    """
    report = check_sources(folder, base)
    with open_model(folder) as model:
        has_to_merge = model.kind == "adapter" and adapter == "merge"
        size = model.size
    options = {
        "base": base,
        "disclosure": disclosure,
        "commitment": commitment,
        "model_name": model_name,
        "license": license,
    }
    if not has_to_merge:
        with tqdm(
            total=size, desc="Copying", unit="B", unit_scale=True, file=sys.stderr, disable=quiet, leave=False
        ) as bar:
            return Assembled(assemble_files(folder, output, adapter=adapter, progress=bar.update, **options))
    with new_release(output) as release:
        check = _merge(folder, base, release, dtype, trained, quiet)
        files = complete_release(folder, release, is_merged=True, **options)
        if report.certificates:
            logger.warning(
                "The certificates hold for base and adapter as they were trained, and not for what merging rounds to: "
                "they are left out of the release's report."
            )
        return Assembled(files, check)


def _merge(
    folder: str | os.PathLike,
    base: str | os.PathLike,
    release: Path,
    dtype: str,
    trained: PreTrainedModel | PeftModel | None,
    quiet: bool,
) -> MergeCheck:
    """Merges into the empty `release`, in the data type asked for or the first that keeps the edit."""
    wanted = [dtype] if dtype != "auto" else list(dict.fromkeys([_stored_dtype(base), "float32"]))
    for name in wanted:
        check = _merge_as(folder, base, release, name, trained, quiet)
        if name == "float32":
            if check.error > _FLOAT32_BOUND:
                raise ValueError(
                    f"The merged model does not compute what base and adapter do (the logits are off by "
                    f"{check.error:.1e} of their size): nothing is released. Check that the adapter belongs to this "
                    "base, and save it again."
                )
            return check
        if check.lost <= _MAX_LOST:
            return check
        if dtype != "auto":
            raise ValueError(
                f"Rounded to {name}, the merged weights lose {check.lost:.0%} of what the adapter does: store them "
                "in float32."
            )
        logger.warning(
            f"Rounded to {name}, the merged weights would lose {check.lost:.0%} of what the adapter does: they are "
            "stored in float32."
        )
        for path in release.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    raise AssertionError("float32 is the last that is tried, and it either is right or raises")


def _merge_as(
    folder: str | os.PathLike,
    base: str | os.PathLike,
    release: Path,
    dtype: str,
    trained: PreTrainedModel | PeftModel | None,
    quiet: bool,
) -> MergeCheck:
    config = PeftConfig.from_pretrained(folder)
    if isinstance(config, LoraConfig) and not adapter_can_be_disabled(replace(config, bias="none")):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} moved a part of the base's weights into the adapter, so "
            "that base and adapter alone do not give the trained model: save `model.merge_and_unload()`, with the "
            "report beside it, and release that."
        )
    bar = tqdm(total=4, desc=f"Merging in {dtype}", file=sys.stderr, disable=quiet, leave=False)
    with bar, _without_bars(quiet), torch.no_grad():
        model = _load(base)
        if isinstance(trained, PeftModel) and _is_on_another(trained, model):
            raise ValueError(
                "The adapter was trained on weights that are not those of the base's files, so that the two do not "
                "give the trained model: save the model that was changed before, train on that folder, and name it as "
                "the base; or release `model.merge_and_unload()` with full weights."
            )
        rows = probe_rows(model.config.get_text_config().vocab_size)
        before = _logits(model, rows)
        bar.update()
        adapted = PeftModel.from_pretrained(model, folder).eval()
        wanted = _logits(adapted, rows)
        bar.update()
        merged = adapted.merge_and_unload(safe_merge=True)
        merged.to(getattr(torch, dtype)).save_pretrained(release, max_shard_size=_MAX_SHARD)
        del model, adapted, merged
        bar.update()
        copy_base_files(base, release)  # with these settings it will be loaded
        given = _logits(_load(release), rows)
        bar.update()
    effect, error = _rms(wanted - before), _rms(given - wanted)
    if effect == 0.0:
        raise ValueError("The adapter changes nothing: there is nothing to release.")
    return MergeCheck(dtype, error / _rms(wanted), error / effect)


def _is_on_another(trained: PeftModel, base: PreTrainedModel) -> bool:
    """
    Whether a frozen weight below the adapter is not the base's, in the data type that it was trained in. Weights that
    are quantised or sharded are not compared.
    """
    frozen = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): parameter
        for name, parameter in trained.get_base_model().named_parameters()
        if not parameter.requires_grad and parameter.is_floating_point() and not isinstance(parameter, DTensor)
    }
    return any(
        name in frozen
        and frozen[name].shape == parameter.shape
        and not torch.equal(frozen[name].cpu(), parameter.to(frozen[name].dtype))
        for name, parameter in base.named_parameters()
    )


def probe_rows(vocabulary: int) -> list[Tensor]:
    """
    Rows of random tokens of several lengths, always the same for a vocabulary.

    Args:
        vocabulary (`int`): number of tokens.

    Returns:
        `list[torch.Tensor]`: int64, each of shape `(1, length)`.

    Example:

    ```python
    >>> from hf_unlearn.releasing import probe_rows
    >>> [row.shape[1] for row in probe_rows(vocabulary=100)]
    [1, 7, 19, 48]

    ```
    """
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (1, length), generator=generator) for length in _PROBE_LENGTHS]


def _logits(model: PreTrainedModel | PeftModel, rows: list[Tensor]) -> Tensor:
    """In float64, of all positions: `(sum of lengths, vocabulary)`."""
    # One by one: no padding, and no mask that could hide a fault
    return torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in rows]).double()


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _load(folder: str | os.PathLike) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    ).eval()


def _stored_dtype(base: str | os.PathLike) -> str:
    """The widest of the floating data types in the base's files: none of its tensors is rounded in it."""
    with open_model(base, hub_links=True) as model:
        dtypes = {DTYPES.get(tensor.dtype, "float32") for tensor in model.tensors.values()}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


@contextmanager
def _without_bars(quiet: bool) -> Iterator[None]:
    """Loading and saving draw bars of their own."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    if quiet:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if quiet and was_shown:
            transformers_logging.enable_progress_bar()
