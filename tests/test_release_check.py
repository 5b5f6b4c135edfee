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
"""The benchmark of the gate, on a small pair: memory, and each byte of the weights read once."""

import release_check


def test_memory_and_reads(tmp_path):
    result = release_check.measure(48 * 2**20, 16, 50, 0, str(tmp_path))
    assert result["findings"] == [] and not result["torch_imported"]
    assert result["bytes_of_both_models"] > 96 * 2**20
    # Besides: headers, and the first megabyte of each of four shards, which could be a pickle
    if result["bytes_read_by_process"]:
        assert 1 < result["bytes_read_by_process"] / result["bytes_of_both_models"] < 1.1
    assert result["peak_bytes"] < 300 * 2**20
    assert list(tmp_path.iterdir()) == []
