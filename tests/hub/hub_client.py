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
The real `huggingface_hub` in a process of its own: it freezes its endpoint when it is imported.

A test calls it as if it were here: `client("model_info", "org/name")` is `HfApi().model_info("org/name")` there.
"""

import multiprocessing
import os
import shutil
from multiprocessing.connection import Connection
from pathlib import Path
from types import GeneratorType
from typing import Any, NamedTuple

from loopback_hub import LoopbackHub


class ClientError(Exception):
    """What the client raised: the name of its class, the status of the answer (0 without one), and all messages."""

    def __init__(self, name: str, status: int, message: str):
        super().__init__(f"{name} ({status}): {message}")
        self.name, self.status, self.message = name, status, message


class Ask(NamedTuple):
    name: str
    token: str
    arguments: tuple
    options: dict[str, Any]


def serve(pipe: Connection, environment: dict[str, str]) -> None:
    """Answers in the child's process until the other end is closed."""
    os.environ.update(environment)
    import time

    import huggingface_hub

    # Its waits before another attempt are seconds: the order of what it does is the same without them
    time.sleep = lambda seconds: None
    while True:
        try:
            ask: Ask = pipe.recv()
        except EOFError:
            return
        method = getattr(huggingface_hub.HfApi(), ask.name)
        try:
            answer = method(*ask.arguments, token=ask.token or False, **ask.options)
            answer = list(answer) if isinstance(answer, GeneratorType) else answer
            pipe.send((True, answer))
        except Exception as error:
            causes: list[BaseException] = [error]
            while (cause := causes[-1].__cause__) is not None:
                causes.append(cause)
            answered = [one for one in causes if isinstance(one, huggingface_hub.errors.HfHubHTTPError)]
            status = answered[0].response.status_code if answered else 0
            pipe.send((False, (type(error).__name__, status, "\n".join(map(str, causes)))))


class HubClient:
    """
    A client of a [`LoopbackHub`], as a context manager.

    Args:
        hub (`LoopbackHub`): that it talks to.
        home (`Path`): an empty folder for its cache.
        token (`str`): for all calls that give no other; `""` is nobody's.

    Example:

    ```python
    with HubClient(hub, tmp_path, hub.add_user("alice")) as client:
        client("create_repo", "alice/name", private=True)
        with pytest.raises(ClientError, match="RepositoryNotFoundError"):
            client("model_info", "alice/name", token="")
    ```
    """

    def __init__(self, hub: LoopbackHub, home: Path, token: str = ""):
        self.token = token
        self._cache = home / "hub"
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        environment = {**hub.environment(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self._process = context.Process(target=serve, args=(theirs, environment), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "HubClient":
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.close()
        self._process.join()

    def kill(self) -> None:
        """Ends its process at once, in the middle of what it does."""
        self._process.kill()
        self._process.join()

    def forget(self) -> None:
        """Empties the cache of what was downloaded."""
        shutil.rmtree(self._cache, ignore_errors=True)

    def start(self, name: str, *arguments: Any, token: str | None = None, **options: Any) -> None:
        """Calls without waiting for the answer."""
        self._pipe.send(Ask(name, self.token if token is None else token, arguments, options))

    def wait(self) -> Any:
        """The answer of the call that was started."""
        worked, answer = self._pipe.recv()
        if not worked:
            raise ClientError(*answer)
        return answer

    def __call__(self, name: str, *arguments: Any, token: str | None = None, **options: Any) -> Any:
        self.start(name, *arguments, token=token, **options)
        return self.wait()
