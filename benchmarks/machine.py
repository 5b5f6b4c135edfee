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
"""What stands beside a benchmark's numbers: the machine, and the versions of what ran."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def describe_processor() -> dict[str, Any]:
    """Its name, and the number of cores. Nothing here imports torch: some benchmarks measure memory without it."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    return {"cpu": processor, "cores": os.cpu_count()}


def describe_versions(*packages: str) -> dict[str, str]:
    """Python's, and those of installed packages."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
