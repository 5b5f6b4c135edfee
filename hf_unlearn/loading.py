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
"""From what a user passes to a checked model, tokenizer and configuration."""

import os
from dataclasses import fields
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from .config import UnlearnConfig
from .objective import Objective
from .reference import inner_model
from .scope import decoder_layers, freeze_all_but, layers_of, select_parameters


logger = get_logger(__name__)


def complete_args(args: UnlearnConfig | TrainingArguments | None, model: Any) -> UnlearnConfig:
    """
    The configuration, from one, from plain [`~transformers.TrainingArguments`], or from nothing.

    Raises:
        `ValueError`: the arguments are those of another trainer.
    """
    if isinstance(args, UnlearnConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else inner_model(model).config._name_or_path
        return UnlearnConfig(f"{os.path.basename(name.rstrip('/')) or 'model'}-unlearned")
    if type(args) is not TrainingArguments:
        raise ValueError(f"args is a {type(args).__name__}: use UnlearnConfig, which has the fields they share.")
    return UnlearnConfig(**{option.name: getattr(args, option.name) for option in fields(args) if option.init})


def load_model(name: str, args: UnlearnConfig, quantization_config: Any | None) -> PreTrainedModel:
    """
    Loads a causal language model, in float32 and from safetensors unless `args.model_init_kwargs` say otherwise.

    Raises:
        `ValueError`: there is no such model.
    """
    options = dict(args.model_init_kwargs or {})
    options.setdefault("dtype", "float32")
    options.setdefault("use_safetensors", True)  # pickled weights run code when they are loaded
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    hub_options = {key: options[key] for key in ("revision", "token", "subfolder") if key in options}
    try:
        AutoConfig.from_pretrained(name, **hub_options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The model {name!r} cannot be loaded: it is neither a folder with a config.json that transformers knows "
            "nor a model on the Hub that can be reached. Check the path or id (`hf auth login` for a private one)."
        ) from error
    return AutoModelForCausalLM.from_pretrained(name, **options)


def check_model(
    model: PreTrainedModel | PeftModel,
    ref_model: PreTrainedModel | None,
    peft_config: PeftConfig | None,
    args: UnlearnConfig,
) -> None:
    """
    Refuses models and adapters that a run cannot use.

    Raises:
        `ValueError`: naming what to change.
    """
    if not isinstance(model, (PreTrainedModel, PeftModel)):
        raise ValueError(f"model is a {type(model).__name__}: pass a Hub id, a PreTrainedModel or a PeftModel.")
    if ref_model is model:
        raise ValueError("model and ref_model are the same object: leave ref_model out, the reference needs no model.")
    if ref_model is not None:
        sizes = [inner_model(each).config.get_text_config().vocab_size for each in (model, ref_model)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"model has a vocabulary of {sizes[0]} tokens and ref_model one of {sizes[1]}: the two must share a "
                "tokenizer. Leave ref_model out, or pass a model with the same one."
            )
    adapter = peft_config
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError(
                "The model already has an adapter and peft_config asks for another: merge the first "
                "(`model.merge_and_unload()`), or leave peft_config out to train it further."
            )
        adapter = model.active_peft_config
    if adapter is not None and (adapter.is_prompt_learning or adapter.is_adaption_prompt):
        raise ValueError(f"{adapter.peft_type.value} adds tokens and not weights, which is not supported: use LoRA.")
    if args.fp16 or any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise ValueError(
            "float16 is not supported, its gradients overflow: load the model with dtype='float32' (and bf16=True for "
            "speed) or dtype='bfloat16', and leave fp16 unset."
        )


def prepare_tokenizer(
    processing_class: Any | None, model: PreTrainedModel | PeftModel, args: UnlearnConfig
) -> PreTrainedTokenizerBase:
    """
    The tokenizer, with a pad token and the wanted chat template, and without what says that it came from a folder of
    this machine: `save_pretrained` would write that into the files of a release.

    Raises:
        `ValueError`: there is none, or it has neither a pad nor an EOS token.
    """
    if processing_class is None:
        name = inner_model(model).config._name_or_path
        options = args.model_init_kwargs or {}
        try:
            processing_class = AutoTokenizer.from_pretrained(
                name, **{key: options[key] for key in ("revision", "token", "subfolder") if key in options}
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"{name!r} has no tokenizer that can be loaded: pass processing_class.") from error
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ValueError(
            f"processing_class is a {type(processing_class).__name__}: pass a tokenizer (images are not supported)."
        )
    if processing_class.pad_token is None:
        if processing_class.eos_token is None:
            raise ValueError(
                "The tokenizer has neither a pad nor an EOS token: set one, e.g. "
                "`tokenizer.pad_token = tokenizer.unk_token`, and pass it as processing_class."
            )
        logger.warning(
            "The tokenizer has no pad token: the EOS token pads. Masks come from lengths, so real EOS tokens count; "
            "set `tokenizer.pad_token` to choose another."
        )
        processing_class.pad_token = processing_class.eos_token
    if args.chat_template_path is not None:
        if args.chat_template_path.endswith((".jinja", ".j2")):
            with open(args.chat_template_path, encoding="utf-8") as file:
                processing_class.chat_template = file.read()
        else:
            processing_class.chat_template = AutoTokenizer.from_pretrained(args.chat_template_path).chat_template
    for key in ("is_local", "local_files_only"):
        processing_class.init_kwargs.pop(key, None)
    return processing_class


@torch.no_grad()
def hold_in_float32(model: nn.Module, args: UnlearnConfig) -> None:
    """
    Master weights: what is trained of a model in bfloat16 becomes float32, in place, and what is frozen stays.
    Autocast rounds them back for each product, so that the first forward is what it was, and small steps add up.

    Without autocast (`bf16=False`) the two types would not multiply, and nothing is done.

    Args:
        model (`nn.Module`): its scope already set.
        args ([`UnlearnConfig`]): `bf16` and `fp32_master_weights`.
    """
    if args.bf16 and args.fp32_master_weights:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()


def warn_of_bf16_weights(model: nn.Module, args: UnlearnConfig) -> None:
    """Warns where most optimizer steps would be rounded away."""
    in_bf16 = any(parameter.requires_grad and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    if in_bf16 and args.learning_rate < 1e-4:
        logger.warning(
            f"Trained weights are in bfloat16: at learning_rate={args.learning_rate:g} most steps are smaller than "
            "half a unit in the last place and vanish. Set bf16=True and fp32_master_weights=True, load the model in "
            "float32, or train a LoRA, whose weights are float32."
        )


def _add_adapter(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """Adds the adapter; where PEFT finds no module of the names that it was given, those that there are get named."""
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        raise ValueError(
            f"target_modules of the adapter match nothing in the model: choose from {', '.join(sorted(names))}, or "
            "`all-linear`."
        ) from error


def set_scope(
    model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, objective: Objective, args: UnlearnConfig
) -> PreTrainedModel | PeftModel:
    """Freezes what may not move and adds the adapter."""
    stack_name, stack = decoder_layers(inner_model(model))
    objective.bind_layers(len(stack))
    selects = args.trainable_layers is not None or args.trainable_modules is not None
    if peft_config is not None or isinstance(model, PeftModel):
        if selects:
            raise ValueError(
                "trainable_layers and trainable_modules choose base weights, but an adapter is trained: set "
                "layers_to_transform and target_modules on the LoraConfig instead."
            )
        if peft_config is not None:
            model = _add_adapter(model, peft_config)
    elif selects:
        freeze_all_but(model, select_parameters(model, args.trainable_layers, args.trainable_modules))

    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("No parameter is trainable: pass a peft_config or trainable_layers, or unfreeze some.")
    if args.uses_probe or (args.splits_gradients and objective.reads_hidden):
        # Some passes end below the top, and where is not known before the probe is: DDP would wait for gradients of
        # the layers above
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True
    elif not objective.reads_logits:
        last = max(objective.layers_of(objective.all_reads))
        idle = sorted(layer for layer in layers_of(trained, stack_name) - {None} if layer > last)
        if idle:
            fix = "trainable_layers" if selects else "layers_to_transform on the LoraConfig, or trainable_layers"
            reads_one = objective.circuit_breaker_layers == []
            source = f"hidden_layer={last}" if reads_one else f"layer {last}"
            message = (
                f"Layers {idle[0]} to {idle[-1]} are trainable but lie above {source}, and no "
                f"loss reads further: they cannot move. Set {fix}."
            )
            if selects:
                raise ValueError(message)
            logger.warning(message)
            if args.ddp_find_unused_parameters is None:
                args.ddp_find_unused_parameters = True  # DDP would wait for their gradients
    return model
