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
"""How the loopback Hub finds the function that answers a request, and who may ask for what."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlencode

from hub_store import HubError, Repository, User


if TYPE_CHECKING:
    from loopback_hub import LoopbackHub


JSON = {"Content-Type": "application/json"}
NAME = r"(?P<name>[^/]+/[^/]+)"
KIND = r"(?P<kind>models|datasets|spaces)"
REVISION = r"(?P<revision>[^/]+)"
REPOSITORY = rf"/api/{KIND}/{NAME}"
# As in the addresses for people: nothing before the name of a model
PAGE = rf"/((?P<kind>datasets|spaces)/)?{NAME}"


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def as_json(content: Any, **headers: str) -> Response:
    return Response(200, {**JSON, **headers}, json.dumps(content).encode())


def as_error(error: HubError) -> Response:
    headers = {"X-Error-Message": error.message, **JSON}
    if error.code is not None:
        headers["X-Error-Code"] = error.code
    headers |= error.more.pop("headers", {})
    return Response(error.status, headers, json.dumps({"error": error.message, **error.more}).encode())


@dataclass(frozen=True)
class Call:
    """
    One request.

    Args:
        hub (`LoopbackHub`): that it came to.
        method (`str`): such as `"GET"`, also for a HEAD.
        path (`str`): still quoted.
        query (`str`): still quoted.
        headers (`Mapping[str, str]`): by name, in any case.
        body (`bytes`): all of it.
    """

    hub: "LoopbackHub"
    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes

    def option(self, name: str, default: str = "") -> str:
        """A value in the query."""
        return parse_qs(self.query).get(name, [default])[0]

    def flag(self, name: str) -> bool:
        return self.option(name).lower() in ("true", "1")

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def user(self) -> User | None:
        """Who asks; `None` is anybody."""
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        user = self.hub.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        return user

    def signed_in(self) -> User:
        user = self.user
        if user is None:
            raise HubError(401, None, "Invalid username or password.")
        return user

    def writer(self, namespace: str) -> User:
        """Who asks, if they may write there."""
        user = self.signed_in()
        if user.can_write(namespace):
            return user
        if user.role == "read":
            raise HubError(403, None, "You have read access but not the required permissions for this operation")
        raise HubError(403, None, f'You don\'t have the rights to write under the namespace "{namespace}"')

    def repository(self, kind: str, name: str) -> Repository:
        """The repository, if whoever asks may know of it. One that is not theirs looks as one that does not exist."""
        user = self.user
        repository = self.hub.repositories.get((kind, name))
        hidden = repository is not None and repository.private and not (user and user.is_in(repository.namespace))
        if repository is not None and not hidden:
            return repository
        if user is None:
            raise HubError(401, "RepoNotFound", "Invalid username or password.")
        raise HubError(404, "RepoNotFound", "Repository not found")

    def check_gate(self, repository: Repository) -> None:
        """Anybody reads about a gated repository; its files are for those with access."""
        user = self.user
        if not repository.gated or (user and (user.is_in(repository.namespace) or user.name in repository.granted)):
            return
        restricted = f"Access to {repository.kind.removesuffix('s')} {repository.name} is restricted"
        if user is None:
            raise HubError(401, "GatedRepo", f"{restricted}. You must be authenticated to access it. Please log in.")
        raise HubError(403, "GatedRepo", f"{restricted} and you are not in the authorized list.")

    def page(self, items: list[Any]) -> Response:
        """A page of `items`, with a link to the next one."""
        size = int(self.option("limit", str(self.hub.page_size)))
        start = int(self.option("cursor", "0"))
        headers = {}
        if start + size < len(items):
            query = urlencode({**parse_qs(self.query), "cursor": str(start + size)}, doseq=True)
            headers["Link"] = f'<{self.hub.endpoint}{self.path}?{query}>; rel="next"'
        return as_json(items[start : start + size], **headers)


class Route(NamedTuple):
    method: str
    pattern: re.Pattern[str]
    view: Callable[..., Response]
    writes: bool


ROUTES: list[Route] = []


def route(method: str, pattern: str, *, writes: bool = False) -> Callable:
    """
    Registers the function for an address.

    Args:
        method (`str`): such as `"GET"`, which answers HEAD as well.
        pattern (`str`): of the quoted path; the groups `kind` and `name` are looked up, and the function gets the
            repository and the other groups, unquoted. Without `name` it gets the groups only.
        writes (`bool`): whether it is for those only who may write to the repository.
    """

    def register(view: Callable[..., Response]) -> Callable[..., Response]:
        ROUTES.append(Route(method, re.compile(pattern), view, writes))
        return view

    return register


def dispatch(call: Call) -> Response:
    for method, pattern, view, writes in ROUTES:
        match = pattern.fullmatch(call.path)
        if match is None or call.method != method:
            continue
        # A revision such as refs%2Fpr%2F1 is one part of the path: it is split first and unquoted then
        parts = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
        if "name" not in parts:
            return view(call, **parts)
        repository = call.repository(parts.pop("kind", "models"), parts.pop("name"))
        if writes:
            call.writer(repository.namespace)
        return view(repository, call, **parts)
    raise HubError(404, None, f"This Hub does not know {call.method} {call.path}")
