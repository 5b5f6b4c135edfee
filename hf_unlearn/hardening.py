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
"""What a run sets up, before its first step, for what makes forgetting hold."""

import os
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor, nn

from .forward import Decoder
from .pairing import DataCollatorForUnlearning
from .reference import inner_model
from .robustness.null_space import RetainNullSpace
from .robustness.probe import ProbeConfig, RobustProbe
from .robustness.probe_training import train_probe
from .scope import decoder_layers, layers_of, parse_layers


if TYPE_CHECKING:
    from .config import UnlearnConfig
    from .trainer import UnlearnTrainer


logger = get_logger(__name__)

PROBE_FOLDER = "probe"


class Generators:
    """
    The run's own random numbers, so that no draw depends on what else draws. Their states go into checkpoints.

    Attributes:
        rows (`torch.Generator`): what differs from row to row (noise on the reference); another one on each process.
        weights (`torch.Generator`): what is drawn for weights; the same on all processes, unless they hold shards.

    Args:
        args ([`UnlearnConfig`]): seed, device and process.
        is_sharded (`bool`): whether processes hold different weights.
    """

    def __init__(self, args: "UnlearnConfig", is_sharded: bool):
        self.rows = torch.Generator(args.device)
        self.weights = torch.Generator(args.device)
        self.is_sharded = is_sharded
        self._seed(args.seed, args.process_index)

    def _seed(self, seed: int, process_index: int, step: int = 0) -> None:
        # Far apart, so that one run's processes have nothing in common with the next seed's
        self.rows.manual_seed((seed * 1_000_003 + process_index) * 1_000_003 + step)
        self.weights.manual_seed((seed * 1_000_003 + process_index * self.is_sharded) * 1_000_003 + step + 500_000)

    def state(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """What a checkpoint needs: by generator, the states of all processes, `(processes, bytes)` uint8 in memory."""
        states = {"rows": self.rows.get_state(), "weights": self.weights.get_state()}
        return {
            name: accelerator.gather(state.unsqueeze(0).to(accelerator.device)).cpu() for name, state in states.items()
        }

    def load_state(self, state: dict[str, Tensor], args: "UnlearnConfig", step: int) -> None:
        """Goes on from [`Generators.state`]; anew, with a warning, on other processes or another kind of device."""
        expected = (args.world_size, len(self.rows.get_state()))
        if state["rows"].shape != expected:
            logger.warning(
                "The checkpoint was written by another number of processes or kind of device: random noise is drawn "
                "anew from here on, so the run does not continue exactly as it would have."
            )
            self._seed(args.seed, args.process_index, step)
            return
        # Copies: a generator refuses a state that is part of a larger tensor
        self.rows.set_state(state["rows"][args.process_index].clone())
        self.weights.set_state(state["weights"][args.process_index].clone())


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that move, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_trained_weights(model: nn.Module, args: "UnlearnConfig") -> None:
    """
    Refuses weights in which what was asked for would be lost or wrong.

    Raises:
        `ValueError`: naming the fix.
    """
    trained = trained_parameters(model).values()
    if args.splits_gradients and any(parameter.dtype != torch.float32 for parameter in trained):
        raise ValueError(
            "sharpness, gradient_conflict, quantization_margin and probe_weight_ratio need the trained weights in "
            "float32: in bfloat16 a small move of the weights is rounded away. Set bf16=True and "
            "fp32_master_weights=True, load the model with dtype='float32', or train a LoRA."
        )
    if args.sharpness == "curvature" and args.bf16:
        raise ValueError(
            "sharpness='curvature' divides differences of gradients by its radius, which magnifies the rounding of "
            "bfloat16 beyond the gradient itself: set bf16=False, or choose another rule."
        )
    if args.weight_averaging_start is not None and 0 < args.max_steps < args.weight_averaging_start:
        raise ValueError(
            f"weight_averaging_start={args.weight_averaging_start} lies after the last step ({args.max_steps}): "
            "start earlier."
        )


def make_probe(trainer: "UnlearnTrainer", forget: Dataset, retain: Dataset | None) -> RobustProbe:
    """
    The run's frozen probe: the one at `probe_path`, or one trained on the forget and the retain set.

    Args:
        trainer ([`~hf_unlearn.UnlearnTrainer`]): its model before the first step.
        forget ([`~datasets.Dataset`]): prepared forget rows.
        retain ([`~datasets.Dataset`], *optional*): prepared retain rows.

    Raises:
        `ValueError`: the probe belongs to another model, tells the two sets apart no better than chance, or reads
            layers below all that is trained.
    """
    args, model = trainer.args, trainer.model
    num_layers, first = len(decoder_layers(inner_model(model))[1]), first_trained_layer(model)
    if args.probe_path is not None:
        probe = RobustProbe.load(args.probe_path)
        probe.check_base(model)
        _require_trained_below("probe_path", [probe.layer], first)
        return probe.to(args.device)
    layers = list(range(first, num_layers))
    if args.probe_layers is not None:
        layers = parse_layers(args.probe_layers, num_layers, name="probe_layers")
    _require_trained_below("probe_layers", layers, first)
    config = ProbeConfig(
        layers=layers,
        pooling=args.probe_pooling,
        learning_rate=args.probe_learning_rate,
        epochs=args.probe_epochs,
        seed=args.seed,
    )
    probe = train_probe(
        model,
        forget,
        retain,
        config,
        pad_token_id=trainer.processing_class.pad_token_id,
        batch_size=args.per_device_eval_batch_size,
    )
    if args.world_size > 1:
        probe = broadcast_object_list([probe.cpu()])[0]  # sums may round otherwise on another device
    if args.should_save:
        probe.save(os.path.join(args.output_dir, PROBE_FOLDER))
    return probe.to(args.device)


def first_trained_layer(model: nn.Module) -> int:
    """
    The lowest layer whose output training can move: 0 with trained embeddings, the number of layers where only what
    comes after them is trained.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): its scope already set.
    """
    inner = inner_model(model)
    stack_name, layers = decoder_layers(inner)
    if any(parameter.requires_grad for parameter in inner.get_input_embeddings().parameters()):
        return 0
    trained = layers_of([name for name, p in inner.named_parameters() if p.requires_grad], stack_name)
    return min((layer for layer in trained if layer is not None), default=len(layers))


def _require_trained_below(name: str, layers: list[int], first: int) -> None:
    if not layers or min(layers) < first:
        read = f"layer {min(layers)}" if layers else "a decoder layer"
        raise ValueError(
            f"{name}: the probe would read {read}, and nothing that is trained moves what comes before layer {first}: "
            "train a layer up to the one that is read (trainable_layers), or read one from there on (probe_layers)."
        )


def measure_null_space(trainer: "UnlearnTrainer", null_space: RetainNullSpace) -> None:
    """Reads the retain rows once, each process its part, and finds the directions in which nothing may move."""
    args, rows = trainer.args, trainer.train_dataset.retain
    collate = DataCollatorForUnlearning(pad_token_id=trainer.processing_class.pad_token_id)
    own = range(args.process_index, len(rows), args.world_size)
    size = args.per_device_eval_batch_size
    decoder = Decoder(inner_model(trainer.model))
    batches = [
        {name: value.to(args.device) for name, value in collate([rows[i] for i in own[start : start + size]]).items()}
        for start in range(0, len(own), size)
    ]
    with trainer.accelerator.autocast():
        null_space.collect(
            lambda batch: decoder.run(batch, [], last_hidden_state=True),
            batches,
            reduce=lambda tensor: trainer.accelerator.reduce(tensor, "sum"),
        )
