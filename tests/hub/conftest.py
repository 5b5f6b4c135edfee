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
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_client import HubClient
from loopback_hub import LoopbackHub
from push_process import Outcome, PushProcess
from small_release import make_small_base, make_small_release, write_rows


@pytest.fixture(scope="session")
def hub_and_client(tmp_path_factory) -> Iterator[tuple[LoopbackHub, HubClient]]:
    with LoopbackHub() as hub, HubClient(hub, tmp_path_factory.mktemp("hub")) as client:
        yield hub, client


@pytest.fixture
def hub(hub_and_client) -> LoopbackHub:
    """An empty Hub."""
    hub, _ = hub_and_client
    hub.reset()
    return hub


@pytest.fixture
def client(hub, hub_and_client) -> HubClient:
    """The real client of `hub`, with the token of alice, who may write to the namespaces alice and org."""
    _, client = hub_and_client
    client.forget()
    client.token = hub.add_user("alice", organizations={"org": "write"})
    return client


@pytest.fixture(scope="session")
def run_process(hub_and_client, tmp_path_factory) -> Iterator[PushProcess]:
    with PushProcess(hub_and_client[0], tmp_path_factory.mktemp("push")) as run:
        yield run


@pytest.fixture
def token(hub) -> str:
    """Of alice, who may write to the namespaces alice and org."""
    return hub.add_user("alice", organizations={"org": "write"})


@pytest.fixture
def base(tmp_path) -> Path:
    return make_small_base(tmp_path / "base")


@pytest.fixture
def release(base, tmp_path) -> Path:
    return make_small_release(base, tmp_path / "release")


@pytest.fixture
def push(hub, run_process, base, token, tmp_path) -> Callable[..., Outcome]:
    """`hf-unlearn push` with base, forget set and token."""
    rows = write_rows(tmp_path / "forget.jsonl")

    def run(folder, repo_id="org/name", *argv, base=base, **options) -> Outcome:
        words = ("push", folder, repo_id, "--base", base, "--forget", rows, *argv)
        return run_process(*words, **{"token": token, **options})

    return run
