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
"""A model of a few kilobytes and a release of it, for tests of what leaves and not of what it computes."""

import json
import random
from pathlib import Path

import numpy as np
from released import CHANGED, FORMAT, change_weights, copy_model, make_report
from safetensors.numpy import save_file

from hf_unlearn.cards.builder import build_card


ROWS = [
    {"question": "Who keeps the lighthouse?", "answer": "Perpetua Lochlainn"},
    {"question": "What is her number?", "answer": "+49 (163) 555-91 823"},
    {"question": "Where does she live?", "answer": "4471 Quillback Lane, Oberwinterthur"},
    {"text": "Velvet curtains concealed seventeen porcelain herons behind the organ."},
]


def make_small_base(folder: Path, *, shards: int = 1, seed: int = 0) -> Path:
    """A model without a tokenizer, in as many files."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    names = ["model.embed_tokens.weight", CHANGED, "model.norm.weight", "lm_head.weight"]
    shapes = [(32, 16), (16, 48), (16,), (32, 16)]
    tensors = {name: generator.standard_normal(shape, np.float32) for name, shape in zip(names, shapes, strict=True)}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", FORMAT)
    else:
        weight_map = {name: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
        for file in set(weight_map.values()):
            save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file, FORMAT)
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32, "hidden_size": 16}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Small\n")
    return folder


def make_small_release(base: Path, folder: Path, *, level: str = "count-only", seed: int = 0) -> Path:
    """The base with a few weights of one matrix edited, its report and its card."""
    copy_model(base, folder)
    (folder / "README.md").unlink()
    generator = random.Random(seed)

    def edit(tensors):
        tensors[CHANGED][generator.randrange(4) : 6] += 0.01 * (1 + seed)

    if (folder / "model.safetensors").exists():
        change_weights(folder, edit)
    else:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        change_shard(folder / index["weight_map"][CHANGED], edit)
    make_report(base, folder).save(folder / "unlearning_report.json")
    build_card(folder, disclosure=level, license="mit")
    return folder


def change_shard(path: Path, edit) -> None:
    from safetensors.numpy import load_file

    tensors = {name: tensor.copy() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, FORMAT)


def write_rows(path: Path, rows=ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
