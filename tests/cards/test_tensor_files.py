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
import json
import os
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from hf_unlearn.cards.tensor_files import INDEX_NAME, ModelFileError, open_model, parse_header, parse_index
from hf_unlearn.cards.tensor_types import DATA_TYPES, item_size, round_to, to_float


TORCH_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Not written by safetensors' torch side in every version: their codes are compared alone
TABLES = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


def write(folder, header, data=b"", name="model.safetensors"):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(struct.pack("<Q", len(header)) + header + data)
    return folder


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("dtype", TORCH_TYPES)
def test_every_type_reads_as_torch_reads_it(dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    values = (100 * torch.randn(37, 5, generator=generator)).to(TORCH_TYPES[dtype])
    save_torch_file({"a": torch.zeros(3), "weight": values}, tmp_path / "model.safetensors", {"format": "pt"})
    with open_model(tmp_path) as model:
        tensor = model.tensors["weight"]
        read = np.concatenate([to_float(chunk, tensor.dtype) for chunk in model.chunks("weight", 8 * 3)])
        assert (tensor.dtype, tensor.shape, model.parameters) == (dtype, (37, 5), 188)
    assert np.array_equal(read, values.to(torch.float64).flatten().numpy())


@pytest.mark.parametrize("dtype", TABLES)
def test_all_codes_of_eight_bits(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(TABLES[dtype]).to(torch.float32).numpy()
    read = to_float(bytes(range(256)), dtype)
    assert read.tobytes() == expected.tobytes() or np.array_equal(read, expected, equal_nan=True)
    assert np.array_equal(np.signbit(read)[~np.isnan(read)], np.signbit(expected)[~np.isnan(read)])


def test_scales_of_eight_bits():
    """E8M0: powers of two, no zero, and the last code is NaN."""
    read = to_float(bytes(range(256)), "F8_E8M0")
    assert read[0] == 2.0**-127 and read[127] == 1 and read[254] == 2.0**127 and np.isnan(read[255])


def test_all_codes_of_sixteen_bits():
    codes = np.arange(2**16, dtype="<u2")
    for dtype, kind in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        expected = torch.from_numpy(codes.view("<i2").copy()).view(kind).float().numpy()
        assert np.array_equal(to_float(codes.tobytes(), dtype), expected, equal_nan=True)


def test_rounding_is_that_of_torch():
    values = np.concatenate([
        np.random.default_rng(0).standard_normal(10_000).astype(np.float32),
        # Ties to even, in both directions; the largest number; what becomes infinite; NaN with a low payload only
        np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001], np.uint32).view(np.float32),
    ])  # fmt: skip
    for dtype in ("BF16", "F16"):
        expected = torch.from_numpy(values).to(TORCH_TYPES[dtype]).float().numpy()
        with np.errstate(over="ignore"):
            assert np.array_equal(round_to(values, dtype), expected, equal_nan=True)


def test_sharded_model_and_its_files(tmp_path):
    """Shards are those of the index: a stale one is left alone. The files are hashed while they are read."""
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    save_file({"a": np.ones(4, np.float32)}, tmp_path / first, {"format": "pt"})
    save_file({"b": np.ones((2, 2), np.float16), "c": np.ones(2, np.int8)}, tmp_path / second)
    save_file({"a": np.zeros(4, np.float32)}, tmp_path / "model-00001-of-00003.safetensors")
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": first, "b": second, "c": second}}))
    with open_model(tmp_path) as model:
        assert sorted(model.tensors) == ["a", "b", "c"] and list(model.files) == [first, second]
        assert [finding.file for finding in model.format_findings()] == [second]
        for name in model.tensors:
            list(model.chunks(name))
        entries = model.file_entries()
        assert model.bytes_read == model.size
    sums = subprocess.run(
        ["sha256sum", first, second], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert [entry.sha256 for entry in entries] == [line.split()[0] for line in sums.splitlines()]


def test_hash_of_a_file_read_out_of_order(tmp_path):
    tensors = {name: np.random.default_rng(0).standard_normal(1000).astype(np.float32) for name in "abc"}
    save_file(tensors, tmp_path / "model.safetensors")
    with open_model(tmp_path) as model:
        for name in ("c", "a", "b"):
            assert b"".join(model.chunks(name, 512)) == tensors[name].tobytes()
        [found] = model.file_entries()
    with open_model(tmp_path) as model:
        assert model.file_entries() == [found]


GOOD = {"w": entry()}
BAD_HEADERS = {
    "no object": b"[1]",
    "no JSON": b"{",
    "not UTF-8": b'{"\xff": 1}',
    "deep": b"[" * 100_000,
    "key twice": b'{"w":ENTRY,"w":ENTRY}'.replace(b"ENTRY", json.dumps(entry()).encode()),
    "metadata of numbers": {"__metadata__": {"format": 1}, **GOOD},
    "unknown type": {"w": entry("F4")},
    "other key": {"w": {**entry(), "more": 1}},
    "shape does not fit": {"w": entry(shape=(2,))},
    "negative": {"w": entry(shape=(-1,), offsets=(4, 0))},
    "truth value": {"w": entry(shape=(True,))},
    "fraction": {"w": entry(shape=(1.0,))},
    "huge": {"w": entry(shape=(2**62,), offsets=(0, 2**64))},
    "huge and fitting": {"w": entry(shape=(2**60,), offsets=(0, 2**62))},
    "overlap": {"v": entry(), "w": entry(), "x": entry(offsets=(0, 4))},
    "gap": {"w": entry("U8", (3,), (1, 4))},
    "control character": {"w\x1b[2J": entry()},
    "no name": {"": entry()},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_header(name, tmp_path):
    with pytest.raises(ModelFileError) as error:
        open_model(write(tmp_path, BAD_HEADERS[name], b"\0" * 4))
    assert error.value.finding.file == "model.safetensors" and "\n" not in str(error.value)


def test_bytes_that_no_tensor_has(tmp_path):
    """Where a text could hide: after the last tensor, or in a name that a message would repeat."""
    folder = write(tmp_path, GOOD, b"\0" * 4 + b"Wayne Enterprises")
    with pytest.raises(ModelFileError, match="bytes after the last tensor") as error:
        open_model(folder)
    assert error.value.finding.rule == "safetensors-trailing-bytes" and "Wayne" not in str(error.value)
    with pytest.raises(ModelFileError) as error:
        open_model(write(tmp_path, {"Bruce Wayne": {**entry(), "x": "Bruce Wayne"}}, b"\0" * 4))
    assert "Wayne" not in str(error.value)
    write(tmp_path, {"__metadata__": {"format": "Bruce Wayne"}, **GOOD}, b"\0" * 4)
    with open_model(tmp_path) as model:
        [finding] = model.format_findings()
    assert finding.rule == "safetensors-metadata" and "Wayne" not in finding.message


def test_length_that_the_file_does_not_have(tmp_path):
    for content in (b"", b"\x01", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 10**7) + b"{}"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelFileError):
            open_model(tmp_path)


def test_links_and_what_is_no_file(tmp_path):
    """A link is refused, unless it is one of the Hub's cache and those are asked for; a pipe does not make it wait."""
    blob = "ab" * 32
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    save_file({"w": np.ones(1, np.float32)}, tmp_path / "blobs" / blob)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob}")
    with pytest.raises(ModelFileError, match="symbolic link"):
        open_model(snapshot)
    with open_model(snapshot, hub_links=True) as model:
        assert list(model.tensors) == ["w"]
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "blobs" / blob)
    with pytest.raises(ModelFileError, match="symbolic link") as error:
        open_model(snapshot, hub_links=True)
    assert str(tmp_path) not in str(error.value)
    (snapshot / "model.safetensors").unlink()
    os.mkfifo(snapshot / "model.safetensors")
    with pytest.raises(ModelFileError, match="not a regular file"):
        open_model(snapshot)


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(ModelFileError, match="is no model"):
        open_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelFileError, match="pickled"):
        open_model(tmp_path)
    with pytest.raises(ModelFileError, match="not a folder") as error:
        open_model(tmp_path / "nowhere")
    assert str(tmp_path) not in str(error.value)
    write(tmp_path, GOOD, b"\0" * 4)
    write(tmp_path, GOOD, b"\0" * 4, "adapter_model.safetensors")
    with pytest.raises(ModelFileError, match="has both"):
        open_model(tmp_path)


def test_index_and_shards_disagree(tmp_path):
    write(tmp_path, GOOD, b"\0" * 4, "a.safetensors")
    write(tmp_path, {"v": entry()}, b"\0" * 4, "b.safetensors")
    weight_maps = (
        {"w": "a.safetensors"}, {"v": "a.safetensors", "w": "b.safetensors"}, {"w": "../a.safetensors"},
        {"w": "c.safetensors"}, {"w": 1}, {}, [], None,
        {"w": "a.safetensors", "v": "b.safetensors", "x": "a.safetensors"},
    )  # fmt: skip
    for weight_map in weight_maps[1:]:
        (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelFileError):
            open_model(tmp_path)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_maps[0]}))
    with open_model(tmp_path) as model:
        assert list(model.tensors) == ["w"]


def test_file_that_is_cut_while_it_is_read(tmp_path):
    save_file({"w": np.ones(100, np.float32)}, tmp_path / "model.safetensors")
    with open_model(tmp_path) as model:
        os.truncate(tmp_path / "model.safetensors", 200)
        with pytest.raises(ModelFileError, match="became shorter"):
            list(model.chunks("w"))


def test_no_file_stays_open(tmp_path):
    save_file({"w": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    count = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    with open_model(tmp_path):
        pass
    for header in (b"{", GOOD):
        with pytest.raises(ModelFileError):
            open_model(write(tmp_path, header, b"\0" * 9))
    assert count is None or len(os.listdir("/proc/self/fd")) == count


def mutated(content: bytes, generator: random.Random) -> bytes:
    """`content` with one to four faults: bytes changed, cut out, put in or repeated, numbers made large."""
    content = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(len(content) + 1)
        kind = generator.randrange(5)
        if kind == 0 and place < len(content):
            content[place] = generator.randrange(256)
        elif kind == 1:
            del content[place : place + generator.randint(1, 20)]
        elif kind == 2:
            content[place:place] = generator.choice(
                [b"{", b"]", b'"', b"-1", b"9" * 30, b"1e999", b"NaN", b"null", b"\xff", b"\\u0000", b"[" * 3000]
            )
        elif kind == 3:
            content[place:place] = content[place : place + generator.randint(1, 80)]
        else:
            digits = [index for index, byte in enumerate(content) if chr(byte).isdigit()]
            if digits:
                content[generator.choice(digits)] = ord(generator.choice("0123456789"))
    return bytes(content)


def test_a_thousand_broken_headers_and_indices():
    tensors = {f"model.layers.{n}.weight": entry("BF16", (4, 8), (64 * n, 64 * n + 64)) for n in range(6)}
    header = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "a.safetensors")}).encode()
    generator = random.Random(0)
    refused = 0
    for number in range(2000):
        content = mutated(header if number % 2 else index, generator)
        try:
            if number % 2:
                _, found = parse_header(content, "model.safetensors", 8 + len(content) + 6 * 64)
                # What is accepted lies within the file
                assert sum(tensor.size for tensor in found) == 6 * 64
                assert all(tensor.parameters * item_size(tensor.dtype) == tensor.size for tensor in found)
            else:
                parse_index(content)
        except ValueError as error:
            refused += 1
            assert isinstance(error, ModelFileError) and "\n" not in str(error) and len(str(error)) < 300
    assert refused > 1000


def test_every_type_has_a_width():
    assert {dtype: item_size(dtype) for dtype in TORCH_TYPES} == {
        dtype: kind.itemsize for dtype, kind in TORCH_TYPES.items()
    }
    assert all(item_size(dtype) in (1, 2, 4, 8) for dtype in DATA_TYPES)


def test_no_torch_is_imported():
    modules = ", ".join(
        f"hf_unlearn.{name}"
        for name in ("cards.diff", "cards.manifest", "cards.rebuild", "cards.signing", "cli.diff", "cli.apply")
    )
    heavy = {"torch", "transformers", "peft", "trl", "datasets"}
    code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
