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
"""Scores are found again where nothing that they depend on has changed, and nowhere else; and only by their owner."""

import copy
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from distributed import cache_worker
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from test_invariance import launch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn import UnlearnConfig
from hf_unlearn.metrics import cache as module
from hf_unlearn.metrics.cache import (
    ScoreCache,
    code_digest,
    fingerprint_model,
    fingerprint_rows,
    fingerprint_tokenizer,
)


class Counted:
    """A computation that counts how often it is done."""

    def __init__(self, value):
        self.value, self.calls = value, 0

    def __call__(self):
        self.calls += 1
        return self.value


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


# ---- The cache ----


VALUE = {"forget": [0.1 + 0.2, None, 1e-300, -3], "auc": 1 / 3}


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_is_there_is_not_computed_again(tmp_path, in_memory):
    cache = ScoreCache(None if in_memory else tmp_path / "cache")
    compute = Counted(VALUE)
    assert cache.get({"model": "a", "rows": [1, 2]}, compute) == VALUE  # to the last digit
    assert cache.get({"rows": [1, 2], "model": "a"}, compute) == VALUE
    assert compute.calls == 1
    for key in ({"model": "b", "rows": [1, 2]}, {"model": "a", "rows": [2, 1]}, {"model": "a"}):
        cache.get(key, compute)
    assert compute.calls == 4


def test_a_value_that_is_changed_does_not_change_what_is_kept(tmp_path):
    for cache in (ScoreCache(), ScoreCache(tmp_path)):
        cache.get({}, Counted([1.0])).append(2.0)
        assert cache.get({}, Counted(None)) == [1.0]


def test_another_object_finds_it_and_another_folder_does_not(tmp_path):
    compute = Counted(0.5)
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        assert ScoreCache(folder).get({"model": "a"}, compute) == 0.5
    assert compute.calls == 2
    assert ScoreCache().get({"model": "a"}, compute) == 0.5 and compute.calls == 3


@pytest.mark.parametrize("value", [None, 0, False, [], {}])
def test_values_that_are_nothing_are_values(tmp_path, value):
    compute = Counted(value)
    assert [ScoreCache(tmp_path).get({}, compute) for _ in range(2)] == [value, value]
    assert compute.calls == 1


@pytest.mark.parametrize("what", ["code_digest", "torch", "transformers"])
def test_code_and_versions_are_part_of_the_key(tmp_path, monkeypatch, what):
    compute, cache = Counted(0.5), ScoreCache(tmp_path)
    cache.get({}, compute)
    if what == "code_digest":
        monkeypatch.setattr(module, "code_digest", lambda: "other code")
    else:
        monkeypatch.setattr(getattr(module, what), "__version__", "0.0.1")
    cache.get({}, compute)
    assert compute.calls == 2
    monkeypatch.undo()
    cache.get({}, compute)
    assert compute.calls == 2


def test_the_code_that_counts_is_all_of_the_package(tmp_path, monkeypatch):
    """A changed line anywhere, or another file, is other code; a file that is no code is not."""
    monkeypatch.setattr(module, "__file__", str(tmp_path / "hf_unlearn" / "metrics" / "cache.py"))
    digest = code_digest.__wrapped__
    (tmp_path / "hf_unlearn" / "metrics").mkdir(parents=True)
    (tmp_path / "hf_unlearn" / "data.py").write_text("a = 1\n")
    first = digest()
    (tmp_path / "hf_unlearn" / "notes.txt").write_text("no code")
    (tmp_path / "elsewhere.py").write_text("a = 1\n")
    assert digest() == first
    (tmp_path / "hf_unlearn" / "data.py").write_text("a = 2\n")
    second = digest()
    (tmp_path / "hf_unlearn" / "metrics" / "new.py").write_text("")
    assert len({first, second, digest()}) == 3


def test_only_the_owner_can_read(tmp_path):
    folder = tmp_path / "out" / "cache"
    folder.mkdir(parents=True, mode=0o755)
    mask = os.umask(0)
    try:
        ScoreCache(folder).get({"model": "a"}, Counted(0.5))
        ScoreCache(tmp_path / "new").get({"model": "a"}, Counted(0.5))
    finally:
        os.umask(mask)
    for place in (folder, tmp_path / "new"):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        assert (place / ".gitignore").read_text() == "*\n"
        assert sorted(path.suffix for path in place.iterdir()) == ["", ".json"]  # no temporary file is left
        for path in place.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_no_key_is_written(tmp_path):
    ScoreCache(tmp_path).get({"measure": "of a secret"}, Counted(0.5))
    [entry] = entries(tmp_path)
    assert "secret" not in entry.name + entry.read_text()


def test_a_number_that_is_cut_off_is_not_read_as_another(tmp_path):
    ScoreCache(tmp_path).get({}, Counted(0.5125))
    [entry] = entries(tmp_path)
    whole = entry.read_bytes()
    for length in range(len(whole)):
        entry.write_bytes(whole[:length])
        compute = Counted(0.5125)
        assert ScoreCache(tmp_path).get({}, compute) == 0.5125
        assert compute.calls == 1, whole[:length]
        assert entry.read_bytes() == whole


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x00" * 20, b"{'value': 1}"])
def test_what_is_no_json_is_computed_again(tmp_path, content):
    ScoreCache(tmp_path).get({}, Counted([1.5]))
    [entry] = entries(tmp_path)
    entry.write_bytes(content)
    assert ScoreCache(tmp_path).get({}, Counted([1.5])) == [1.5]
    assert json.loads(entry.read_text()) == {"value": [1.5]}


def test_a_failure_keeps_nothing(tmp_path):
    cache = ScoreCache(tmp_path)
    with pytest.raises(ZeroDivisionError):
        cache.get({}, lambda: 1 / 0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        cache.get({}, lambda: float("nan"))
    assert list(tmp_path.iterdir()) == []
    assert cache.get({}, Counted(0.5)) == 0.5


def test_two_processes_compute_together_or_not_at_all(tmp_path):
    """Each with a folder of its own, so that one may find what the other does not: the first process decides."""
    ScoreCache(tmp_path / "rank0").get({"known": "to the first"}, Counted([0.5, None]))
    ScoreCache(tmp_path / "rank1").get({"known": "to the second"}, Counted([0.25]))
    (tmp_path / "spec.json").write_text(json.dumps({"output": str(tmp_path), "world_size": 2}))
    launch(cache_worker.__file__, tmp_path / "spec.json")
    for rank in range(2):
        result = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert result == {"values": [[0.5, None], [7.0], [7.0], [7.0]], "calls": 2}
    # The first process alone writes
    assert [len(entries(tmp_path / f"rank{rank}")) for rank in range(2)] == [3, 1]


# ---- Fingerprints of models ----


@pytest.fixture
def model(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)


def test_the_same_model_from_another_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "copy")
    copied = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.float32)
    assert copied.config._name_or_path != model.config._name_or_path
    assert fingerprint_model(copied) == fingerprint_model(model)
    copied.train().requires_grad_(False)  # which changes nothing that is measured
    assert fingerprint_model(copied) == fingerprint_model(model)


@pytest.mark.parametrize("change", ["one weight", "dtype", "configuration", "buffer", "EOS token"])
def test_another_model(model, change):
    before = fingerprint_model(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        if change == "one weight":
            other.model.layers[-1].mlp.down_proj.weight[-1, -1] += 1e-6
        elif change == "dtype":
            other = other.to(torch.bfloat16)
        elif change == "configuration":
            other.config.rms_norm_eps *= 2
        elif change == "buffer":
            other.model.rotary_emb.inv_freq[0] *= 2
        else:
            other.generation_config.eos_token_id = 5
    assert fingerprint_model(other) != before == fingerprint_model(model)


def test_weights_that_changed_places(model):
    before = fingerprint_model(model)
    one, two = model.model.layers[0], model.model.layers[1]
    one.mlp.up_proj.weight, two.mlp.up_proj.weight = two.mlp.up_proj.weight, one.mlp.up_proj.weight
    assert fingerprint_model(model) != before


def test_adapters(model):
    """Two adapters with the same tensors differ by their scale, and a disabled one is none."""

    def adapted(alpha: int):
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        return get_peft_model(copy.deepcopy(model), config)

    one, same, other = adapted(4), adapted(4), adapted(8)
    ids = torch.tensor([[1, 5, 9]])
    tensors = [parameter for _, parameter in one.named_parameters()]
    assert all(map(torch.equal, tensors, [parameter for _, parameter in other.named_parameters()]))
    assert not torch.allclose(one(ids).logits, other(ids).logits)
    prints = [fingerprint_model(some) for some in (model, one, other)]
    assert len(set(prints)) == 3 and fingerprint_model(same) == prints[1]
    with one.disable_adapter():
        assert fingerprint_model(one) not in prints
    assert fingerprint_model(one) == prints[1]


def test_an_adapter_that_is_saved_and_loaded(model, tmp_path):
    torch.manual_seed(0)
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=2, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path)
    first, second = (PeftModel.from_pretrained(copy.deepcopy(model), tmp_path) for _ in range(2))
    assert fingerprint_model(first) == fingerprint_model(second)


def test_an_adapter_that_is_no_layer(model):
    """It is refused where it would be measured, with a reason."""
    prompts = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert fingerprint_model(prompts) == fingerprint_model(prompts)


def test_every_family(random_model, architecture):
    one, same, other = random_model(architecture), random_model(architecture), random_model(architecture, seed=1)
    assert fingerprint_model(one) == fingerprint_model(same) != fingerprint_model(other)


def test_a_cache_reads_a_model_once(model):
    cache = ScoreCache()
    assert cache.fingerprint(model) == fingerprint_model(model)
    with torch.no_grad():
        model.model.norm.weight += 1
    assert cache.fingerprint(model) != fingerprint_model(model)  # as it says


# ---- Fingerprints of rows and tokens ----


def test_rows(tmp_path):
    rows = [{"question": "Who?", "answer": "Lily", "wrong": ["Tom", "Max"]}, {"question": "Wer?", "answer": "Änne"}]
    base = fingerprint_rows(Dataset.from_list(rows))
    path = tmp_path / "rows.json"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    same = [
        Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache")),
        Dataset.from_list([dict(reversed(row.items())) for row in rows]),
        Dataset.from_list([rows[0], *rows]).select([0, 2]),
        Dataset.from_list(rows).with_format("torch"),
    ]
    assert {fingerprint_rows(some) for some in same} == {base}
    others = [
        rows[::-1],
        rows[:1],
        [*rows, rows[0]],
        [{**rows[0], "answer": "Lily "}, rows[1]],
        [{**rows[0], "wrong": ["Max", "Tom"]}, rows[1]],
        [{**row, "source": "a"} for row in rows],
    ]
    assert len({base, *(fingerprint_rows(Dataset.from_list(some)) for some in others)}) == len(others) + 1


def test_neighbouring_rows_and_values_do_not_run_together():
    pairs = [[{"text": "ab"}, {"text": "c"}], [{"text": "a"}, {"text": "bc"}], [{"text": 'ab"}\n{"text": "c'}]]
    assert len({fingerprint_rows(Dataset.from_list(rows)) for rows in pairs}) == 3


def test_tokenizer(tokenizer, tiny_model_path, chat_tokenizer, small_model_path, tmp_path):
    def args(**settings) -> UnlearnConfig:
        return UnlearnConfig(str(tmp_path), use_cpu=True, **{"max_length": 256, **settings})

    base = fingerprint_tokenizer(tokenizer, args())
    tokenizer(["a", "longer than a"], padding=True, truncation=True, max_length=3)  # leaves its marks in the rules
    assert fingerprint_tokenizer(tokenizer, args(learning_rate=0.5, seed=7)) == base
    assert fingerprint_tokenizer(AutoTokenizer.from_pretrained(tiny_model_path), args()) == base
    with_eos = AutoTokenizer.from_pretrained(tiny_model_path)
    with_eos.eos_token = "<s>"
    others = [
        fingerprint_tokenizer(tokenizer, args(max_length=128)),
        fingerprint_tokenizer(tokenizer, args(dataset_text_field="body")),
        fingerprint_tokenizer(tokenizer, args(completion_only_loss=False)),
        fingerprint_tokenizer(tokenizer, args(assistant_only_loss=True)),
        fingerprint_tokenizer(tokenizer, args(split_long_texts=True)),
        fingerprint_tokenizer(chat_tokenizer(), args()),
        fingerprint_tokenizer(AutoTokenizer.from_pretrained(small_model_path), args()),
        fingerprint_tokenizer(with_eos, args()),
    ]
    assert len({base, *others}) == len(others) + 1
