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
"""What a step reads from disk instead of computing it: the reference's targets, and activations of frozen layers."""

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .forward import Decoder, evaluation_mode
from .losses import REFERENCE_READS
from .pairing import DataCollatorForUnlearning, PairedDataset
from .prefix import Activations, prefix_tensors
from .reference import DisabledAdapter, SeparateModel, Targets, inner_model
from .row_cache import RowCache, RowKey, describe_computation


if TYPE_CHECKING:
    from .objective import Objective
    from .passes import Tensors
    from .trainer import UnlearnTrainer


REFERENCE_FOLDER = "reference_cache"

# What is kept of the reference for each of its reads
_TARGETS = {
    "reference_log_probs": "reference_log_probs",
    "reference_hidden_states": "reference_hidden_states",
    "reference_layer_states": "reference_layer_states",
    "reference_logits": "distribution",
}


class StepCaches:
    """
    The caches of a run, by rows (`"forget"`, `"alternative"`, `"retain"`).

    A row is computed when it first comes, and read from then on: in later epochs, after resuming, in other runs on the
    same model and scope. A batch with a row that is not there yet is computed as a whole.

    Args:
        trainer ([`~hf_unlearn.UnlearnTrainer`]): before its first step.

    Raises:
        `ValueError`: what is asked for cannot be kept, or would not be used; naming the fix.
    """

    def __init__(self, trainer: "UnlearnTrainer"):
        args, self.objective = trainer.args, trainer.objective
        if not isinstance(trainer.data_collator, DataCollatorForUnlearning):
            raise ValueError("Caches need the rows' keys, which another data_collator does not give: leave it out.")
        trainer.data_collator.has_row_keys = True
        self.device = args.device
        self.limit_gb = args.cache_size_gb
        self.references: dict[str, RowCache] = {}
        self.prefixes: dict[str, RowCache] = {}
        model = inner_model(trainer.model)
        autocast = args.bf16
        if args.precompute_ref_log_probs:
            folder = args.reference_cache or os.path.join(args.output_dir, REFERENCE_FOLDER)
            computation = _describe_reference(trainer.model, self.objective, autocast)
            for rows, names in self.objective.reads.items():
                if names & REFERENCE_READS:
                    description = {
                        "computation": computation,
                        "reads": sorted(names & REFERENCE_READS),
                        "layers": self.objective.layers_of(names & REFERENCE_READS),
                    }
                    self.references[rows] = RowCache("precompute_ref_log_probs", folder, description)
        if args.prefix_cache is not None:
            if not self.objective.prefixes:
                raise ValueError(
                    "prefix_cache keeps what frozen layers give, and there are none below the first trained module: "
                    "choose trainable_layers (or layers_to_transform on the LoraConfig), or remove it."
                )
            for rows, prefix in self.objective.prefixes.items():
                description = {
                    "computation": describe_computation(model, prefix_tensors(model, prefix), autocast),
                    "prefix": [prefix.depth, list(prefix.outputs), prefix.entry],
                }
                self.prefixes[rows] = RowCache("prefix_cache", args.prefix_cache, description)

    # ---- A micro-batch ----

    def load_targets(self, inputs: "dict[str, Tensors]") -> None:
        """Gives a micro-batch what is on disk for all of its rows; in place."""
        for rows, cache in self.references.items():
            batch = inputs[rows]
            names = self._target_names(rows)
            found = [cache.read(key.labels, names) for key in batch["row_keys"]]
            missing = [index for index, tensors in enumerate(found) if tensors is None]
            tensors = {} if missing else {n: self._collate(n, [row[n] for row in found], batch) for n in names}
            batch["targets"] = Targets(tensors, missing)

    def load_activations(self, inputs: "dict[str, Tensors]") -> None:
        """The same for activations of frozen layers."""
        for rows, cache in self.prefixes.items():
            batch, prefix = inputs[rows], self.objective.prefixes[rows]
            found = [cache.read(key.tokens, prefix.keys) for key in batch["row_keys"]]
            missing = [index for index, tensors in enumerate(found) if tensors is None]
            tensors = {} if missing else {n: self._collate(n, [row[n] for row in found], batch) for n in prefix.keys}
            batch["activations"] = Activations(prefix, tensors, missing)

    def store(self, inputs: "dict[str, Tensors]") -> None:
        """Stores what a micro-batch's passes computed of rows that are not on disk."""
        for rows, cache in self.references.items():
            batch = inputs[rows]
            targets, keys = batch["targets"], batch["row_keys"]
            if sorted(targets.tensors) != self._target_names(rows):
                continue  # the groups of losses that ran do not read all of it
            for index in targets.missing:
                row = {name: _row_of(name, tensor, index, keys) for name, tensor in targets.tensors.items()}
                cache.write(keys[index].labels, row)
        for rows, cache in self.prefixes.items():
            activations, keys = inputs[rows]["activations"], inputs[rows]["row_keys"]
            if activations.is_complete:
                for index in activations.missing:
                    row = {name: _row_of(name, tensor, index, keys) for name, tensor in activations.tensors.items()}
                    cache.write(keys[index].tokens, row)

    def _target_names(self, rows: str) -> list[str]:
        return sorted(_TARGETS[name] for name in self.objective.reads[rows] & REFERENCE_READS)

    def _collate(self, name: str, found: list[Tensor], batch: "Tensors") -> Tensor:
        """The rows' tensors as the pass over the batch would have given them; zeros where there is padding."""
        if name == "distribution":
            return torch.cat(found).to(self.device)
        if name == "reference_layer_states":
            found = [row.transpose(0, 1) for row in found]
        length = batch["input_ids"].shape[1]
        padded = pad_sequence(found, batch_first=True)
        padded = torch.nn.functional.pad(padded, [0, 0] * (padded.dim() - 2) + [0, length - padded.shape[1]])
        if name == "reference_layer_states":
            padded = padded.permute(2, 0, 1, 3)
        return padded.to(self.device)

    # ---- Room ----

    def require_room(self, trainer: "UnlearnTrainer") -> None:
        """
        Refuses caches that would not fit, from the rows that the run will read.

        Raises:
            `ValueError`: with the numbers.
        """
        sizes = _rows_of_run(trainer)
        needs: dict[str, tuple[RowCache, int, int]] = {}
        for caches, bytes_of in ((self.references, self._target_bytes), (self.prefixes, self._activation_bytes)):
            for rows, cache in caches.items():
                num_rows, num_tokens = sizes[rows]
                per_token = bytes_of(trainer, rows)
                _, more_rows, more_bytes = needs.get(cache.folder, (cache, 0, 0))
                needs[cache.folder] = (cache, more_rows + num_rows, more_bytes + num_tokens * per_token)
        for cache, num_rows, num_bytes in needs.values():
            cache.require_room(num_rows, num_bytes, self.limit_gb)

    def _target_bytes(self, trainer: "UnlearnTrainer", rows: str) -> int:
        names, model = self.objective.reads[rows], inner_model(trainer.model)
        state = model.config.get_text_config().hidden_size * model.get_input_embeddings().weight.element_size()
        states = len(self.objective.layers_of(names & REFERENCE_READS)) + ("reference_logits" in names)
        return 4 * ("reference_log_probs" in names) + state * states

    def _activation_bytes(self, trainer: "UnlearnTrainer", rows: str) -> int:
        """Measured on two tokens."""
        model, activations = inner_model(trainer.model), Activations(self.objective.prefixes[rows])
        tokens = torch.tensor([[0, 1]], device=model.get_input_embeddings().weight.device)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        with evaluation_mode(model), trainer.accelerator.autocast():
            Decoder(model).run(batch, [], last_hidden_state=True, activations=activations)
        return sum(tensor[0, 0].numel() * tensor.element_size() for tensor in activations.tensors.values())


def _row_of(name: str, tensor: Tensor, index: int, keys: list[RowKey]) -> Tensor:
    """One row of a batch's tensor, without padding."""
    if name == "distribution":
        start = sum(key.num_labels for key in keys[:index])
        return tensor[start : start + keys[index].num_labels]
    length = keys[index].length
    return tensor[:, index, :length] if name == "reference_layer_states" else tensor[index, :length]


def _describe_reference(model: torch.nn.Module, objective: "Objective", autocast: bool) -> dict[str, Any]:
    """What the reference's values depend on; called before training, when the policy still is the reference."""
    if isinstance(objective.reference, SeparateModel):
        return describe_computation(
            inner_model(objective.reference.model), _weights(objective.reference.model), autocast
        )
    original, tensors = inner_model(model), _weights(inner_model(model))
    if isinstance(objective.reference, DisabledAdapter):
        # The fresh adapter's weights depend on the seed and are not there in the reference
        adapters = {f".{name}." for name in model.peft_config}
        tensors = {n: value for n, value in tensors.items() if not any(adapter in n for adapter in adapters)}
    return describe_computation(original, tensors, autocast)


def _weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {**dict(inner_model(model).named_parameters()), **dict(inner_model(model).named_buffers())}


def _rows_of_run(trainer: "UnlearnTrainer") -> dict[str, tuple[int, int]]:
    """By rows, how many a run reads, and their tokens. Rows that stand in a set twice count twice."""
    args, dataset = trainer.args, trainer.train_dataset
    sampler = trainer._get_train_sampler()
    step_size = trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size
    epochs = args.max_steps * step_size / len(sampler) if args.max_steps > 0 else args.num_train_epochs
    pairs: set[tuple[int, int | None]] = set()
    for epoch in range(int(epochs) + 1):
        sampler.set_epoch(epoch)
        pairs.update(sampler)
    sizes = {}
    for name, rows, column in _columns(dataset):
        position = 1 if name == "retain" else 0
        indices = {pair[position] for pair in pairs}
        lengths = [len(ids) for ids in rows.select(sorted(indices))[column]]
        sizes[name] = (len(lengths), sum(lengths))
    return sizes


def _columns(dataset: PairedDataset) -> list[tuple[str, Any, str]]:
    columns = [("forget", dataset.forget, "input_ids")]
    if "alternative_input_ids" in dataset.forget.column_names:
        columns.append(("alternative", dataset.forget, "alternative_input_ids"))
    if dataset.retain is not None:
        columns.append(("retain", dataset.retain, "input_ids"))
    return columns
