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
import hashlib
import json
import math

import model_diff
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file
from transformers import AutoModelForCausalLM

from hf_unlearn.cards.change import Change
from hf_unlearn.cards.diff import diff_models
from hf_unlearn.cards.report import Footprint
from hf_unlearn.cards.tensor_files import ModelFileError, open_model
from hf_unlearn.footprint import changes_of, count_base_parameters, footprint_of


def save(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    write = save_torch_file if isinstance(next(iter(tensors.values())), torch.Tensor) else save_file
    write(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def compare(base, new):
    with open_model(base) as first, open_model(new) as second:
        return diff_models(first, second)


def by_name(difference):
    return {tensor.name: tensor for tensor in difference.tensors}


def assert_same_footprint(found: Footprint, expected: Footprint):
    assert (found.changed_parameters, found.total_parameters, found.max_abs) == (
        expected.changed_parameters,
        expected.total_parameters,
        expected.max_abs,
    )
    assert found.relative_norm == pytest.approx(expected.relative_norm, rel=1e-12)
    modules = {module.name: module for module in expected.modules}
    assert modules and {module.name for module in found.modules} == set(modules)
    for module in found.modules:
        other = modules[module.name]
        assert (module.max_abs, module.changed_parameters, module.parameters) == (
            other.max_abs,
            other.changed_parameters,
            other.parameters,
        )
        assert module.relative_norm == pytest.approx(other.relative_norm, rel=1e-12)


def test_numbers_by_hand(tmp_path):
    weight = np.array([[3, 0], [0, 4]], np.float32)
    base = {"kept": weight, "moved": weight, "gone": np.ones(2, np.int8), "reshaped": np.ones(4, np.float32)}
    new = {
        "kept": weight,
        "moved": weight + np.float32([[0, 0.5], [0, 0]]),
        "added": np.ones(3, np.float16),
        "reshaped": np.ones((2, 2), np.float32),
    }
    difference = compare(save(tmp_path / "base", base), save(tmp_path / "new", new))
    found = by_name(difference)
    assert {name: tensor.status for name, tensor in found.items()} == {
        "kept": "identical",
        "moved": "changed",
        "gone": "only_in_base",
        "added": "only_in_new",
        "reshaped": "other_shape",
    }
    moved = found["moved"]
    assert (moved.changed_parameters, moved.parameters, moved.relative_norm, moved.max_abs) == (1, 4, 0.1, 0.5)
    assert moved.change.row_ranges == [[0, 1]] and not difference.is_same
    for side, tensors in (("base", base), ("new", new)):
        for name, values in tensors.items():
            assert getattr(found[name], side).sha256 == hashlib.sha256(values.tobytes()).hexdigest()
        [file] = getattr(difference, f"{side}_files")
        content = (tmp_path / side / "model.safetensors").read_bytes()
        assert (file.sha256, file.size) == (hashlib.sha256(content).hexdigest(), len(content))
    assert difference.total_parameters == 15 and difference.footprint().changed_parameters == 1
    json.dumps(difference.to_dict(), allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_numbers_as_a_training_run_records(dtype, small_model_path, tmp_path):
    """The footprint of the files is the one that `UnlearnTrainer` computes of the model, however it is sharded."""
    model = AutoModelForCausalLM.from_pretrained(small_model_path, dtype=dtype)
    model.save_pretrained(tmp_path / "base")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.2" in name or "embed" in name:
                parameter += (0.01 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    model.save_pretrained(tmp_path / "new", max_shard_size="1MB" if dtype == torch.float32 else "10MB")
    changes = [(name, before[name], parameter) for name, parameter in model.named_parameters()]
    expected = footprint_of(changes, count_base_parameters(model))
    difference = compare(tmp_path / "base", tmp_path / "new")
    assert len(difference.with_status("identical")) == len(before) - len(expected.modules) > 30
    assert_same_footprint(difference.footprint(), expected)


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_is_what_merging_it_would_leave(dtype, rank_stabilised, small_model_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(small_model_path, dtype=dtype)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        use_rslora=rank_stabilised,
        init_lora_weights=False,
        alpha_pattern={"down_proj": 9},
        rank_pattern={"q_proj": 2},
    )
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    expected = footprint_of(changes_of(model, None), count_base_parameters(model))
    difference = compare(tmp_path / "base", tmp_path / "adapter")
    assert difference.kind == "adapter" and len(difference.adapter_tensors) == 22
    assert_same_footprint(difference.footprint(), expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_adapters_of_transposed_weights_and_whole_modules(kind, random_model, tmp_path):
    """GPT-2 keeps its matrices the other way round; a module to save replaces a weight as a whole."""
    model = random_model(kind, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj"]
    config = LoraConfig(
        r=2,
        target_modules=targets,
        modules_to_save=["lm_head"],
        init_lora_weights=False,
        fan_in_fan_out=kind == "gpt2",
    )
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight[3] += 0.5
    model.save_pretrained(tmp_path / "adapter")
    expected = footprint_of(changes_of(model, None), count_base_parameters(model))
    difference = compare(tmp_path / "base", tmp_path / "adapter")
    assert_same_footprint(difference.footprint(), expected)
    assert by_name(difference)["lm_head.weight"].changed_parameters == 32


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "no LoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": ["x"]}, "init_lora_weights"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
    ],
)
def test_adapters_that_are_not_supported_say_so(change, sentence, random_model, tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=sentence):
        compare(tmp_path / "base", tmp_path / "adapter")


def test_adapter_alone_and_adapter_of_another_model(random_model, tmp_path):
    get_peft_model(random_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with open_model(tmp_path / "adapter") as adapter:
        alone = diff_models(None, adapter)
    assert len(alone.tensors) == 6 and {tensor.status for tensor in alone.tensors} == {"only_in_new"}
    random_model(hidden_size=64).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another shape"):
        compare(tmp_path / "other", tmp_path / "adapter")
    random_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="does not have"):
        compare(tmp_path / "gpt2", tmp_path / "adapter")
    with pytest.raises(ValueError, match="swap"):
        compare(tmp_path / "adapter", tmp_path / "other")
    random_model().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="two architectures"):
        compare(tmp_path / "base", tmp_path / "gpt2")


def test_head_untied_from_the_embeddings(random_model, tmp_path):
    """A base that stores no head: the head of NEW is compared with what the base used for it."""
    model = random_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.lm_head.weight[7] += 1
    model.save_pretrained(tmp_path / "new")
    difference = compare(tmp_path / "base", tmp_path / "new")
    head = by_name(difference)["lm_head.weight"]
    assert (head.status, head.start, head.change.row_ranges) == ("changed", "model.embed_tokens.weight", [[7, 8]])
    assert difference.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    [file] = difference.base_files
    content = (tmp_path / "base" / "model.safetensors").read_bytes()
    assert file.sha256 == hashlib.sha256(content).hexdigest()


def test_values_that_are_not_finite(tmp_path):
    values = np.array([1, 2, 3, 4], np.float32)
    nan, inf = values.copy(), values.copy()
    nan[1], inf[2] = np.nan, -np.inf
    base = save(tmp_path / "base", {"nan": values, "inf": values, "kept": nan, "fine": values})
    new = save(tmp_path / "new", {"nan": nan, "inf": inf, "kept": nan, "fine": values})
    difference = compare(base, new)
    found = by_name(difference)
    assert sorted(difference.not_finite) == ["inf", "kept", "nan"]
    assert [(found[name].has_nan, found[name].has_inf) for name in ("nan", "inf")] == [(True, False), (False, True)]
    assert found["kept"].status == "identical" and found["nan"].changed_parameters == 1
    assert found["nan"].relative_norm is None and found["inf"].max_abs is None
    with pytest.raises(ValueError, match="no footprint"):
        difference.footprint()
    json.dumps(difference.to_dict(), allow_nan=False)


def test_bits_and_values(tmp_path):
    """Minus zero is another bit pattern of the same value; a wider type keeps the value; 8 bits are numbers too."""
    base = {"zero": torch.tensor([0.0, 1.0]), "wide": torch.ones(3, dtype=torch.bfloat16)}
    new = {"zero": torch.tensor([-0.0, 1.0]), "wide": torch.tensor([1.0, 1.5, 1.0])}
    base["small"] = torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)
    new["small"] = torch.tensor([1.0, 2.25]).to(torch.float8_e4m3fn)
    found = by_name(compare(save(tmp_path / "base", base), save(tmp_path / "new", new)))
    assert (found["zero"].status, found["zero"].changed_parameters) == ("changed", 0)
    assert (found["wide"].status, found["wide"].changed_parameters, found["wide"].max_abs) == ("other_dtype", 1, 0.5)
    assert (found["small"].status, found["small"].max_abs) == ("changed", 0.25)
    assert found["small"].relative_norm == pytest.approx(0.25 / math.sqrt(5))


def test_tensors_larger_than_what_is_held(tmp_path):
    """Change and row ranges across the borders of chunks and blocks, against NumPy on the whole tensor."""
    generator = np.random.default_rng(0)
    before = generator.standard_normal((3001, 1000)).astype(np.float32)
    after = before.copy()
    rows = [0, 1, 65, 66, 1048, 1049, 2000, 3000]  # 1048: where the first chunk ends
    for row in rows:
        after[row, row % 7 :: 13] += generator.standard_normal(after[row, row % 7 :: 13].shape).astype(np.float32)
    found = by_name(compare(save(tmp_path / "base", {"w": before}), save(tmp_path / "new", {"w": after})))["w"]
    delta = after.astype(np.float64) - before
    assert found.change.row_ranges == [[0, 2], [65, 67], [1048, 1050], [2000, 2001], [3000, 3001]]
    assert (found.changed_parameters, found.max_abs) == (np.count_nonzero(delta), np.abs(delta).max())
    expected = np.linalg.norm(delta) / np.linalg.norm(before.astype(np.float64))
    assert found.relative_norm == pytest.approx(expected, rel=1e-12)


def test_changes_at_the_borders_of_what_is_held(tmp_path):
    """Runs of rows that end where a block ends, a first chunk that is the same, a NaN that stays, a tensor less."""
    before = np.random.default_rng(0).standard_normal((3000, 1024)).astype(np.float32)
    before[2000, 5] = np.nan
    after = before.copy()
    after[[2047, 2048, 2049, 2999]] += 1
    base = save(tmp_path / "base", {"a": before, "b": np.ones(9, np.float32), "c": before})
    new = save(tmp_path / "new", {"a": after, "c": before})
    with open_model(base) as first, open_model(new) as second:
        difference = diff_models(first, second)
        assert first.bytes_read + second.bytes_read == first.size + second.size
    found = by_name(difference)
    assert found["a"].change.row_ranges == [[2047, 2050], [2999, 3000]] and found["a"].changed_parameters == 4 * 1024
    assert found["a"].base.sha256 == found["c"].new.sha256 == hashlib.sha256(before.tobytes()).hexdigest()
    assert found["a"].new.sha256 == hashlib.sha256(after.tobytes()).hexdigest()
    change = Change("F32", "F32", (2,))
    change.add(np.float32([np.nan, 1]).tobytes(), np.float32([np.nan, 2]).tobytes())
    assert change.changed == 1 and change.has_nan


def test_other_order_of_files_gives_the_same_hashes(tmp_path):
    """Tensors in one file and in shards lie in another order: hashes of files hold all the same."""
    tensors = {f"layer.{number}": np.full((10, 10), number, np.float32) for number in range(12)}
    base = save(tmp_path / "base", tensors)
    new = tmp_path / "new"
    new.mkdir()
    names = list(tensors)
    weight_map = {name: f"{'a' if number >= 6 else 'b'}.safetensors" for number, name in enumerate(names)}
    for shard in ("a.safetensors", "b.safetensors"):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, new / shard)
    (new / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    difference = compare(base, new)
    assert difference.is_same
    for folder, entries in ((base, difference.base_files), (new, difference.new_files)):
        for entry in entries:
            assert entry.sha256 == hashlib.sha256((folder / entry.path).read_bytes()).hexdigest()


def test_file_that_is_cut(tmp_path):
    base = save(tmp_path / "base", {"w": np.ones(100, np.float32)})
    content = (base / "model.safetensors").read_bytes()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(ModelFileError, match="shorter than its header says"):
        compare(base, tmp_path / "new")


def test_memory_and_reads(tmp_path):
    """The benchmark on a pair of 96 MiB: each byte is read once, and memory does not grow with the model."""
    diff, manifest, apply = model_diff.measure(96 * 2**20, matrices=16, seed=0, work_dir=str(tmp_path))
    assert diff["bytes_read"] == diff["bytes_of_both_models"] > 2 * 96 * 2**20
    if diff["bytes_read_by_process"]:
        assert diff["bytes_read_by_process"] < diff["bytes_read"] + 2**16
    assert diff["changed_parameters"] == (1 + 96 * 2**20 // (2 * 4096 * 16)) * 4096
    for step in (diff, manifest, apply):
        assert step["peak_bytes"] < 100 * 2**20 and not step["torch_imported"], step
    assert manifest["edit_bytes"] < 96 * 2**20 / 16 + 10_000
