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
A Hub on 127.0.0.1, so that the real clients (`huggingface_hub`, `datasets`, `transformers`) are tested over HTTP.

It holds repositories in memory and answers what reading and writing takes: repositories, trees, files, commits, large
files, branches, tags, pull requests and permissions. What it does not know, it answers with 404 and keeps in
`requests`, so that a test can see what a client wanted. Any request can be made to fail, before or after its effect.

Clients freeze their endpoint when they are imported: set [`LoopbackHub.environment`] on a subprocess.

It cannot show what only the real one does: the Xet protocol, all rules for model cards, scans, rate limits, and when
commits that no ref reaches are collected.
"""

import hashlib
import os
import re
import socket
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from threading import RLock, Thread
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import hub_discussions  # noqa: F401 (registers what it answers)
import hub_reading  # noqa: F401
import hub_writing  # noqa: F401
from hub_routing import Call, Response, as_error, dispatch
from hub_storage import Upload
from hub_store import HubError, Repository, User


class Request(NamedTuple):
    """What a client asked for, and the status that it got: 0 if the connection was dropped before."""

    method: str
    path: str
    status: int
    query: str = ""
    headers: Mapping[str, str] = {}
    body: bytes = b""

    @property
    def writes(self) -> bool:
        return self.method not in ("GET", "HEAD")


@dataclass
class Fault:
    """
    A failure of the requests that it is for, one after the other.

    Args:
        method (`str`): of the requests.
        path (`re.Pattern`): found anywhere in their unquoted path.
        when (`str`): `"before"` or `"after"` they took effect, or `"during"` their transfer.
        status (`int`, *optional*): of the answer; `None` drops the connection without one.
        code (`str`, *optional*): by which the client tells its exceptions apart, such as `"RevisionNotFound"`.
        size (`int`): with `"during"`: how many bytes of the body arrive, of the request if it has one, else of the
            answer.
        skip (`int`): how many of the requests pass first.
        times (`int`): how many of them fail then.
        meanwhile (`Callable`, *optional*): what happens just before the request is handled, in place of a failure.
    """

    method: str
    path: re.Pattern[str]
    when: str
    status: int | None = None
    code: str | None = None
    size: int = 0
    skip: int = 0
    times: int = 1
    meanwhile: Callable[[], object] | None = None

    def response(self) -> Response | None:
        if self.status is None:
            return None
        return as_error(
            HubError(self.status, self.code, f"The loopback Hub fails {self.when} the effect of a request")
        )


class LoopbackHub:
    """
    The server, as a context manager.

    Attributes:
        endpoint (`str`): such as `http://127.0.0.1:43210`, for `HF_ENDPOINT`.
        storage (`str`): the address of the large files, another origin: a token must never get there.
        requests (`list[Request]`): all that was asked for, in order.
        repositories (`dict[tuple[str, str], Repository]`): kind and name -> what it holds.
        users (`dict[str, User]`): token -> who it speaks for.
        faults (`list[Fault]`): the failures that are still to come.
        page_size, lfs_threshold, multipart_above, part_size (`int`): entries on a page; bytes above which a file is a
            large one, and above which it is sent in parts, and the bytes of a part.

    Example:

    ```python
    with LoopbackHub() as hub:
        token = hub.add_user("alice", organizations={"org": "write"})
        hub.add("datasets", "org/name", {"README.md": b"...", "rows.json": b"..."})
        hub.drop("POST", "/commit/", "after")  # the commit is made, but the client never hears of it
        subprocess.run(command, env={**os.environ, **hub.environment(tmp_path, token)})
        assert hub.repository("org/name", "datasets").read("main") == {...}
        assert ("GET", "/api/datasets/org/name", 200) in [request[:3] for request in hub.requests]
    ```
    """

    def __init__(self) -> None:
        self._lock = RLock()
        hub = self

        class Handler(_Handler):
            def answer(self) -> tuple[Response | None, int | None]:
                return hub._answer(self)

        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        self._threads = [Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in self._servers]
        # Two hosts, as the real ones are: older clients hold another port of one host for the Hub, and send the token
        hosts = ("127.0.0.1", "localhost")
        self.endpoint, self.storage = (
            f"http://{host}:{server.server_port}" for host, server in zip(hosts, self._servers, strict=True)
        )
        self.reset()

    def reset(self) -> None:
        """Back to an empty Hub, at the same address."""
        with self._lock:
            self.repositories: dict[tuple[str, str], Repository] = {}
            self.requests: list[Request] = []
            self.users: dict[str, User] = {}
            self.faults: list[Fault] = []
            self.uploads: dict[str, Upload] = {}
            self.links: dict[tuple[str, str], Repository] = {}
            self._keys = count()
            self.page_size = 1000
            self.lfs_threshold = 10_000_000
            self.multipart_above = self.part_size = 5_000_000_000

    def __enter__(self) -> "LoopbackHub":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()

    # ---- What it holds ----

    def add(
        self,
        kind: str,
        name: str,
        files: dict[str, bytes],
        *,
        private: bool = False,
        gated: bool | str = False,
        lfs: Collection[str] = (),
    ) -> Repository:
        """Adds a repository with one commit, and the files that match a pattern in `lfs` in the large file storage."""
        repository = Repository(kind, name, private, gated)
        repository.commit(files, lfs=lfs)
        self.repositories[kind, name] = repository
        return repository

    def add_user(self, name: str, role: str = "write", organizations: Mapping[str, str] | None = None) -> str:
        """Adds a user, and returns a token that may `"read"` or `"write"`."""
        token = f"hf_{name}_{role}"
        self.users[token] = User(name, role, organizations or {})
        return token

    def repository(self, name: str, kind: str = "models") -> Repository:
        return self.repositories[kind, name]

    def state(self) -> dict[str, Any]:
        """All that it holds, to compare with an earlier or later one."""
        with self._lock:
            return {f"{kind}/{name}": repository.state() for (kind, name), repository in self.repositories.items()}

    def writes(self) -> list[Request]:
        """The requests that could have changed something."""
        return [request for request in self.requests if request.writes]

    def sent(self) -> bytes:
        """All that clients sent, to search for what must not be in it: addresses, headers and bodies."""
        return b"\n".join(
            f"{request.path}?{unquote(request.query)} {dict(request.headers)}".encode() + b"\n" + request.body
            for request in self.requests
        )

    def environment(self, home: Path, token: str = "") -> dict[str, str]:
        """What a client's process needs: this endpoint, a cache of its own in `home`, and nothing else on the net."""
        no_proxy = {name: "" for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")}
        return {
            **no_proxy,
            "NO_PROXY": "127.0.0.1,localhost",
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }

    # ---- Failures ----

    def fail(
        self,
        method: str,
        path: str,
        when: str,
        status: int = 503,
        code: str | None = None,
        *,
        skip: int = 0,
        times: int = 1,
    ) -> None:
        """The next requests that match get an error, `"before"` or `"after"` they took effect."""
        self.faults.append(Fault(method, re.compile(path), when, status, code, skip=skip, times=times))

    def drop(self, method: str, path: str, when: str, *, size: int = 0, skip: int = 0, times: int = 1) -> None:
        """
        The next requests that match lose their connection, `"before"` or `"after"` they took effect, or `"during"` the
        transfer: after `size` bytes of the request's body, or of the answer's if the request has none.
        """
        self.faults.append(Fault(method, re.compile(path), when, size=size, skip=skip, times=times))

    def meanwhile(self, method: str, path: str, action: Callable[[], object]) -> None:
        """Just before the next request that matches, `action` happens, such as a commit of somebody else."""
        self.faults.append(Fault(method, re.compile(path), "before", meanwhile=action))

    def _next_fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.method == method and fault.path.search(path):
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                if fault.times == 0:
                    self.faults.remove(fault)
                return fault
        return None

    # ---- Answering ----

    def new_key(self) -> str:
        """A part of an address that nobody guesses, in the order of the requests."""
        return hashlib.sha1(f"{self.endpoint} {next(self._keys)}".encode()).hexdigest()[:16]

    def link(self, repository: Repository, sha: str) -> str:
        """The address of a large file in the storage, for whoever may read it."""
        key = self.new_key()
        self.links[key, sha] = repository
        return f"{self.storage}/_cdn/{key}/{sha}"

    def _answer(self, handler: "_Handler") -> tuple[Response | None, int | None]:
        """The answer, `None` to drop the connection; and how many bytes of its body are sent, `None` for all."""
        address = urlsplit(handler.path)
        path = unquote(address.path)
        with self._lock:
            fault = self._next_fault(handler.command, path)
        length = int(handler.headers.get("Content-Length", 0))
        interrupted = fault is not None and fault.when == "during" and length > 0
        body = handler.read(min(length, fault.size) if fault is not None and interrupted else length)
        # A client that is gone halfway: what it sent must not be taken for all of it
        interrupted = interrupted or len(body) < length
        if fault is not None and fault.meanwhile is not None:
            fault.meanwhile()
        response: Response | None = None
        size = None
        # One request after the other, so that each changes the state in one step
        with self._lock:
            if not interrupted:
                method = "GET" if handler.command == "HEAD" else handler.command
                call = Call(self, method, address.path, address.query, handler.headers, body)
                if fault is None:
                    response = self._respond(call)
                elif fault.meanwhile is not None:
                    response = self._respond(call)
                elif fault.when == "before":
                    response = fault.response()
                elif fault.when == "after":
                    self._respond(call)
                    response = fault.response()
                else:
                    response, size = self._respond(call), fault.size
            status = response.status if response is not None else 0
            self.requests.append(Request(handler.command, path, status, address.query, handler.headers, body))
        return response, size

    def _respond(self, call: Call) -> Response:
        try:
            return dispatch(call)
        except HubError as error:
            return as_error(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self) -> tuple[Response | None, int | None]:
        raise NotImplementedError

    def read(self, size: int) -> bytes:
        """`size` bytes of the body, or fewer if the client goes away before."""
        body = bytearray()
        try:
            while len(body) < size and (more := self.rfile.read1(size - len(body))):
                body += more
        except ConnectionError:
            pass  # What arrived before is what the log shows
        return bytes(body)

    def _respond(self) -> None:
        response, size = self.answer()
        if response is not None:
            try:
                self._send(response, size)
            except ConnectionError:
                self.close_connection = True  # The client does not wait for the answer any more
        if response is None or size is not None:
            self._drop(abruptly=response is None)

    def _send(self, response: Response, size: int | None) -> None:
        status, headers, body = response
        self.send_response(status)
        for name, value in {"X-Request-Id": "loopback", **headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:size])

    def _drop(self, *, abruptly: bool) -> None:
        self.close_connection = True
        if abruptly:
            # A reset, as when the machine behind is gone
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # Here, as the server would say goodbye first. The socket is open until nobody reads from it
            self.rfile.close()
            self.connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _respond

    def log_message(self, *arguments: object) -> None:
        pass  # `requests` keeps them
