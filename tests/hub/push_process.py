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
Commands against the loopback Hub, each in a process of its own that was forked from one with everything imported.

The client freezes its endpoint when it is imported, and importing takes longer than a push of a small release: a test
that breaks off a hundred pushes would wait for little else.
"""

import multiprocessing
import os
import resource
import signal
import tempfile
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from loopback_hub import LoopbackHub


TIMEOUT = 120  # seconds


class Outcome(NamedTuple):
    """Exit code (negative where a signal ended it), and what the command wrote."""

    code: int
    out: str
    err: str


def serve(pipe: Connection, environment: dict[str, str]) -> None:
    """Forks a command for each request, until the other end is closed."""
    os.environ.update(environment)
    import time

    import datasets
    import scipy.io.matlab  # noqa: F401 (what the commands import, once)
    import tokenizers  # noqa: F401

    from hf_unlearn.cli import audit, main, push, verify  # noqa: F401

    datasets.disable_progress_bars()
    # Waits before another attempt are seconds: the order of what is done is the same without them
    time.sleep = lambda seconds: None
    while True:
        try:
            argv, token, changed, file_size = pipe.recv()
        except EOFError:
            return
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                os.environ.update({"HF_TOKEN": token, **changed})
                if file_size is not None:
                    # As on a full disk, a file gets no byte
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
                code = 70
                try:
                    code = main(argv)
                except SystemExit as error:
                    code = error.code
                finally:
                    import sys

                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            pipe.send(child)
            _, status = os.waitpid(child, 0)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode())
            pipe.send(Outcome(os.waitstatus_to_exitcode(status), *texts))


class PushProcess:
    """
    Runs `hf-unlearn` commands, as a context manager.

    Example:

    ```python
    with PushProcess(hub, tmp_path) as run:
        assert run("push", folder, "org/name", token=token).code == 0
    ```
    """

    def __init__(self, hub: LoopbackHub, home: Path):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        environment = {
            **hub.environment(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = context.Process(target=serve, args=(theirs, environment), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "PushProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.close()
        self._process.join()

    def start(
        self,
        *argv: object,
        token: str = "",
        environment: dict[str, str] | None = None,
        file_size: int | None = None,
    ) -> int:
        """Starts a command, which can write files of `file_size` bytes at most, and gives its process id."""
        self._pipe.send(([str(word) for word in argv], token, environment or {}, file_size))
        return self._pipe.recv()

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """What came of it; `None` where it still runs after `timeout` seconds."""
        return self._pipe.recv() if self._pipe.poll(timeout) else None

    def kill(self, child: int) -> None:
        """Ends a command at once, in the middle of what it does; one that has just ended is left."""
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)

    def __call__(self, *argv: object, **options: object) -> Outcome:
        child = self.start(*argv, **options)
        outcome = self.wait(TIMEOUT)
        if outcome is None:
            self.kill(child)
            self.wait()
            raise TimeoutError(f"hf-unlearn {argv[0]} did not end in {TIMEOUT} s.")
        return outcome
