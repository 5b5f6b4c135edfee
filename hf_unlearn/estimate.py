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
What an optimizer step will cost, FLOPs and peak memory, from a model's config alone.

No weight is loaded and nothing runs on a device: [`estimate_step`] builds the model without values and lets the
trainer's own passes run on it, see `step_tracer`. Memory that no pass shows (the optimizer's state, a mean of weights,
the buckets of DDP) is added by formula.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.training_args import OptimizerNames
from trl.trainer.utils import disable_dropout_in_model

from .config import UnlearnConfig
from .hardening import check_trained_weights, trained_parameters
from .loading import hold_in_float32, set_scope
from .objective import UNITS
from .reference import DisabledAdapter, InitialWeights, Reference, SeparateModel, adapter_can_be_disabled, inner_model
from .robustness.probe import HIDDEN_SIZES, BaseModel, ProbeConfig, RobustProbe
from .scope import decoder_layers, layers_of, parse_layers
from .step_tracer import NULL_SPACE, Batch, DryRun, StepTracer, TracedObjective
from .unread_layers import unread_parameters


# By optimizer: values kept for each trained one, and, while it updates, copies of all trained tensors beside them
_OPTIMIZERS = {"adamw_torch": (2, 1), "adamw_torch_fused": (2, 0), "sgd": (0, 0)}


@dataclass
class Estimate:
    """
    What one optimizer step costs on one process.

    Attributes:
        flops (`dict[str, int]`): by part: `forward` (with the gradient of a frozen head, which is computed there),
            `backward`, `reference`, and where there are any `latent adversary` and `null space`. Matrix products and
            attention; nothing else is counted.
        memory (`dict[str, int]`): bytes at the peak, by owner: `frozen weights`, `trained weights`, `reference`,
            `gradients` (and what is computed from them), `optimizer`, `activations`, `logits`, `wrappers` (averaged or
            rounded weights, null space), `gradient buckets` of DDP, `caches` (what a step reads from disk).
        trained_parameters (`int`): number of trained values.
        parameters (`int`): number of all.
        host_bytes (`int`): weights that no step reads, which a run on an accelerator keeps in host memory
            ([`~hf_unlearn.unread_layers.UnreadLayers`]); not part of `memory`.
        tokens (`int`): of all rows of a step, padding included.
        cached_reference (`bool`): whether what the reference gives is read from disk, as from the second epoch on.
        prefix_shared (`dict[str, int]`): by rows, the frozen layers that run once for all passes over them.
    """

    flops: dict[str, int]
    memory: dict[str, int]
    trained_parameters: int
    parameters: int
    host_bytes: int
    tokens: int
    cached_reference: bool
    prefix_shared: dict[str, int]

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory.values())


@dataclass
class ModelOptions:
    """
    How the model would be loaded.

    Attributes:
        dtype (`str`): `"float32"`, `"bfloat16"` or `"auto"`, the one that the config names.
        attn_implementation (`str`): `"eager"`, or `"sdpa"`, as which every kernel without an attention matrix counts.
        peft_config ([`~peft.PeftConfig`], *optional*): adapter.
        processes (`int`): data-parallel processes (DDP).
    """

    dtype: str = "float32"
    attn_implementation: str = "sdpa"
    peft_config: PeftConfig | None = field(default=None)
    processes: int = 1


def estimate_step(config: PreTrainedConfig, args: UnlearnConfig, options: ModelOptions | None = None) -> Estimate:
    r"""
    Predicts FLOPs and peak memory of one optimizer step on each process.

    Rows are as long as `args.max_length`, every token is labelled, and every row is padded to that length: the most
    that a step can cost. Memory is that of tensors: what a device's libraries and the fragmentation of its allocator
    take comes on top, and evaluation, saving and what is measured before the first step are left out.

    Args:
        config ([`~transformers.PreTrainedConfig`]): of a causal language model.
        args ([`UnlearnConfig`]): the run, as for [`UnlearnTrainer`]. `per_device_train_batch_size` rows of each set.
        options ([`ModelOptions`], *optional*): dtype, attention, adapter, processes.

    Returns:
        [`Estimate`]

    Raises:
        `ValueError`: the run would be refused, or what it asks for is not known here.

    Example:

    ```python
    >>> from transformers import LlamaConfig
    >>> from hf_unlearn import UnlearnConfig
    >>> from hf_unlearn.estimate import estimate_step
    >>> config = LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2,
    ...                      vocab_size=64)
    >>> args = UnlearnConfig("out", forget_loss=["ga"], retain_loss=["none"], max_length=8, use_cpu=True,
    ...                      per_device_train_batch_size=1, trainable_modules=["lm_head"])
    >>> estimate = estimate_step(config, args)
    >>> estimate.trained_parameters, estimate.memory["optimizer"]  # 64 x 16 values, twice 4 bytes for each
    (1024, 8192)

    ```
    """
    options = options or ModelOptions()
    _require_known(args)
    if args.max_length is None:
        raise ValueError("max_length is None, so rows have any length: give the longest that the run will see.")
    try:
        return _over_steps(config, args, options)
    except RuntimeError as error:  # mostly what depends on values, such as the tokens that go to each expert
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"A step of {config.model_type} cannot be traced without weights ({reason}): measure one of the training "
            "itself."
        ) from error


def _require_known(args: UnlearnConfig) -> None:
    if args.optim not in _OPTIMIZERS:
        name, known = OptimizerNames(args.optim).value, " or ".join(_OPTIMIZERS)
        raise ValueError(f"The memory of the optimizer {name} is not known here: estimate with {known}.")
    if args.padding_free:
        raise ValueError("padding_free is not known here, where all rows have max_length: estimate without it.")
    if args.fsdp or args.deepspeed is not None:
        raise ValueError(
            "Sharded training (fsdp, deepspeed) is not known here, only DDP, where every process holds the whole "
            "model: remove fsdp and deepspeed from the configuration to see what that takes."
        )


# ---- Repetition ----

# Turns of a repetition that are traced: each further one costs what the last of these cost
_FIRST, _SECOND = 2, 3


def _over_steps(config: PreTrainedConfig, args: UnlearnConfig, options: ModelOptions) -> Estimate:
    """Long repetitions within an optimizer step are not traced to their end."""
    steps = args.gradient_accumulation_steps
    if not args.splits_gradients and steps > _FIRST:
        # From the second micro-batch on, nothing is held that was not held before
        estimate = _over_steps(config, with_values(args, gradient_accumulation_steps=_FIRST), options)
        flops = {name: value * steps // _FIRST for name, value in estimate.flops.items() if name != NULL_SPACE}
        flops |= {name: value for name, value in estimate.flops.items() if name == NULL_SPACE}
        return replace(estimate, flops=flops, tokens=estimate.tokens * steps // _FIRST)
    repeated = {
        "gradient_accumulation_steps": True,
        "latent_adversary_steps": args.latent_adversary_layers is not None,
        "sharpness_draws": args.sharpness == "randomized",
    }
    for name, is_used in repeated.items():
        count = getattr(args, name)
        if is_used and count > _SECOND:
            first, second = (
                _over_steps(config, with_values(args, **{name: turns}), options) for turns in (_FIRST, _SECOND)
            )
            return replace(
                first,
                flops=_extended(first.flops, second.flops, count),
                memory=_extended(first.memory, second.memory, count),
                tokens=first.tokens + (second.tokens - first.tokens) * (count - _FIRST),
            )
    return _trace(config, args, options)


def _extended(first: dict[str, int], second: dict[str, int], count: int) -> dict[str, int]:
    names = dict.fromkeys([*first, *second])
    values = {name: first.get(name, 0) for name in names}
    return {name: value + (second.get(name, 0) - value) * (count - _FIRST) for name, value in values.items()}


def with_values(args: UnlearnConfig, **values: Any) -> UnlearnConfig:
    """A copy of a configuration with other values, which are not checked again."""
    changed = copy.copy(args)
    for name, value in values.items():
        setattr(changed, name, value)
    return changed


# ---- One step ----


def _trace(config: PreTrainedConfig, args: UnlearnConfig, options: ModelOptions) -> Estimate:
    args = copy.copy(args)  # setting the scope may change it
    tracer = StepTracer(config.get_text_config().vocab_size)
    objective = TracedObjective(args)
    objective.tracer = tracer
    model = _make_model(config, args, options, objective)
    separate = None
    if objective.reads_reference and args.reference_mode == "copy":
        separate = _without_adapter(config, args, options).requires_grad_(False)
    if args.uses_probe:
        objective.probe = _make_probe(config.get_text_config(), args)
    unread = _unread(model, objective)
    with FakeTensorMode(allow_non_fake_inputs=True), tracer:
        _give_storage(model, tracer, args.device, "frozen weights", unread)
        check_trained_weights(model, args)
        trained = trained_parameters(model)
        for parameter in trained.values():
            tracer.assign(parameter, "trained weights")
        if objective.reads_reference:
            with tracer.owner("reference"):
                if separate is not None:
                    _give_storage(separate, tracer, args.device, "reference", _unread(separate, objective))
                objective.reference = _make_reference(model, separate, args, options)
        if objective.probe is not None:
            _give_storage(objective.probe, tracer, args.device, "wrappers")
        batches = [_make_batch(objective, args) for _ in range(args.gradient_accumulation_steps)]
        _set_up(objective, config, args)
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            objective.find_prefixes(model)
        run = DryRun(model, objective, args, tracer)
        values, copies = _OPTIMIZERS[args.optim]
        stepped = _stepped(model, objective, trained)
        kept = _allocate(tracer, "optimizer", stepped, values)
        if args.weight_averaging_start is not None:
            kept += _allocate(tracer, "wrappers", trained, 1, torch.float32)
        if options.processes > 1:  # DDP reduces gradients in buckets of their own
            kept += _allocate(tracer, "gradient buckets", trained, 1)
        num_items = {name: {unit: torch.ones((), device=args.device) for unit in UNITS} for name in batches[0]}
        run.load_caches(batches)
        tracer.start()
        run.run_step(batches, num_items, update=lambda: _allocate(tracer, "optimizer", stepped, copies))
        del kept
    return Estimate(
        flops=dict(tracer.flops),
        memory=tracer.at_peak,
        trained_parameters=sum(parameter.numel() for parameter in trained.values()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        host_bytes=sum(parameter.nbytes for parameter in unread),
        tokens=sum(batch["input_ids"].numel() for batches_of_set in batches for batch in batches_of_set.values()),
        cached_reference=args.precompute_ref_log_probs,
        prefix_shared={rows: prefix.depth for rows, prefix in objective.prefixes.items()},
    )


def _make_model(
    config: PreTrainedConfig, args: UnlearnConfig, options: ModelOptions, objective: TracedObjective
) -> nn.Module:
    """The model on the meta device, its scope set."""
    model = _without_adapter(config, args, options)
    with torch.device("meta"):
        model = set_scope(model, options.peft_config, objective, args)
    hold_in_float32(model, args)
    if args.disable_dropout:
        disable_dropout_in_model(model)
    if args.activation_checkpointing:
        inner = inner_model(model)
        inner.activation_checkpointing_enable(activation_checkpointing_kwargs=args.activation_checkpointing_kwargs)
        inner.disable_input_require_grads()
    return model


def _without_adapter(config: PreTrainedConfig, args: UnlearnConfig, options: ModelOptions) -> nn.Module:
    dtype = (config.dtype or torch.float32) if options.dtype == "auto" else getattr(torch, options.dtype)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=options.attn_implementation
        )


def _unread(model: nn.Module, objective: TracedObjective) -> list[nn.Parameter]:
    return [] if objective.last_layer is None else unread_parameters(inner_model(model), objective.last_layer)


def _stepped(
    model: nn.Module, objective: TracedObjective, trained: dict[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Without adapters above the last layer that is read: they get no gradient, and optimizers nothing to keep."""
    if objective.last_layer is None:
        return trained
    stack_name, layers = decoder_layers(inner_model(model))
    above = set(range(objective.last_layer + 1, len(layers)))
    return {name: parameter for name, parameter in trained.items() if not layers_of([name], stack_name) & above}


@torch.no_grad()
def _give_storage(
    model: nn.Module, tracer: StepTracer, device: torch.device, owner: str, unread: Sequence[nn.Parameter] = ()
) -> None:
    """Replaces every meta tensor that is read by one that has a device and no values; what is tied stays tied."""
    replaced: dict[Tensor, Tensor] = {parameter: parameter for parameter in unread}
    with tracer.owner(owner):
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if tensor not in replaced:
                        storage = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                        if isinstance(tensor, nn.Parameter):
                            storage = nn.Parameter(storage, requires_grad=tensor.requires_grad)
                        replaced[tensor] = storage
                    tensors[name] = replaced[tensor]


def _make_reference(
    model: nn.Module, separate: nn.Module | None, args: UnlearnConfig, options: ModelOptions
) -> Reference:
    """As [`UnlearnTrainer`] chooses it."""
    if separate is not None:
        return SeparateModel(separate)
    peft_config = options.peft_config
    if args.reference_mode == "auto" and peft_config is not None and adapter_can_be_disabled(peft_config):
        return DisabledAdapter()
    return InitialWeights(model)


def _make_batch(objective: TracedObjective, args: UnlearnConfig) -> Batch:
    rows, length, device = args.per_device_train_batch_size, args.max_length, args.device
    names = dict.fromkeys(["forget", *objective.reads])
    batch = {
        name: {
            "input_ids": torch.zeros(rows, length, dtype=torch.long, device=device),
            "attention_mask": torch.ones(rows, length, dtype=torch.long, device=device),
            "labels": torch.zeros(rows, length, dtype=torch.long, device=device),
            # Nothing predicts the first token of a row
            "label_index": torch.zeros(rows * (length - 1), dtype=torch.long, device=device),
        }
        for name in names
    }
    if args.topic_column is not None:
        batch["forget"]["topic"] = torch.zeros((), dtype=torch.long, device=device)
    return batch


def _set_up(objective: TracedObjective, config: PreTrainedConfig, args: UnlearnConfig) -> None:
    """What the trainer gives its objective before the first step, without values."""
    text_config = config.get_text_config()
    if "control_vector" in objective.all_reads:
        objective.draw_control_vectors(1, text_config.hidden_size, torch.ones(1, device=args.device))
    if "pdu" in args.forget_loss:
        objective.retain_multiplier = torch.ones((), device=args.device)
    if args.topic_retain_weights is not None:
        objective.topic_retain_weights = torch.ones(1, device=args.device)
    for layer in objective.adversary_radii:
        objective.adversary_radii[layer] = torch.ones((), device=args.device)


def _make_probe(config: PreTrainedConfig, args: UnlearnConfig) -> RobustProbe:
    """The probe at its path, or where training has yet to choose its layer, one at the last of the candidates."""
    if args.probe_path is not None:
        layer = RobustProbe.load(args.probe_path).layer
    else:
        candidates = args.probe_layers or str(config.num_hidden_layers - 1)
        layer = parse_layers(candidates, config.num_hidden_layers, name="probe_layers")[-1]
    sizes = [config.hidden_size, *HIDDEN_SIZES, 2]
    weights = []
    for size_in, size_out in zip(sizes[:-1], sizes[1:], strict=True):
        weights += [torch.empty(size_out, size_in, device="meta"), torch.empty(size_out, device="meta")]
    base = BaseModel(config.model_type, config.num_hidden_layers, config.hidden_size, fingerprint="")
    mean, std = (torch.empty(config.hidden_size, device="meta") for _ in range(2))
    return RobustProbe(layer, mean, std, weights, ProbeConfig(pooling=args.probe_pooling), base, [], {})


def _allocate(
    tracer: StepTracer, owner: str, trained: dict[str, nn.Parameter], copies: int, dtype: torch.dtype | None = None
) -> list[Tensor]:
    with tracer.owner(owner):
        return [torch.empty_like(each, dtype=dtype) for each in trained.values() for _ in range(copies)]
