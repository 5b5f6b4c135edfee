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
"""The large file storage of the loopback Hub: uploads in one part or several, what it lists and deletes."""

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

from hub_reading import check_no_token
from hub_routing import PAGE, REPOSITORY, Call, Response, as_json, route
from hub_store import DATE, HubError, Repository


@dataclass
class Upload:
    """A large file on its way; it belongs to the repository only when all of it is there."""

    repository: Repository
    oid: str
    size: int
    parts: dict[int, bytes] = field(default_factory=dict)

    def finish(self, content: bytes) -> None:
        if (len(content), hashlib.sha256(content).hexdigest()) != (self.size, self.oid):
            raise HubError(400, None, "The content does not match the announced size and sha256")
        self.repository.objects[self.oid] = content


def etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


@route("POST", rf"{PAGE}\.git/info/lfs/objects/batch")
def batch(repository: Repository, call: Call) -> Response:
    # Anybody may propose weights by a pull request, and the request does not say what they are for
    if call.signed_in().role != "write":
        raise HubError(403, None, "You have read access but not the required permissions for this operation")
    hub, several, answers = call.hub, False, []
    for asked in call.json()["objects"]:
        answer: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
        answers.append(answer)
        if asked["oid"] in repository.objects:
            continue  # Without actions: the storage has it
        key = hub.new_key()
        hub.uploads[key] = Upload(repository, asked["oid"], asked["size"])
        verify = {"href": f"{hub.endpoint}/{repository.address}.git/info/lfs/objects/verify", "header": {}}
        upload: dict[str, Any] = {"href": f"{hub.storage}/_lfs/{key}", "header": {}}
        if asked["size"] > hub.multipart_above:
            several = True
            count = math.ceil(asked["size"] / hub.part_size)
            parts = {str(number): f"{hub.storage}/_lfs/{key}/{number}" for number in range(1, count + 1)}
            upload = {
                "href": f"{hub.endpoint}/_lfs/{key}/complete",
                "header": {"chunk_size": str(hub.part_size), **parts},
            }
        answer["actions"] = {"upload": upload, "verify": verify}
    return as_json({"transfer": "multipart" if several else "basic", "objects": answers})


def upload_of(call: Call, key: str) -> Upload:
    if key not in call.hub.uploads:
        raise HubError(403, None, "The signature of this address is not valid")
    return call.hub.uploads[key]


@route("PUT", r"/_lfs/(?P<key>[^/]+)(/(?P<number>\d+))?")
def put(call: Call, key: str, number: str = "") -> Response:
    check_no_token(call)
    upload = upload_of(call, key)
    if number:
        upload.parts[int(number)] = call.body
    else:
        upload.finish(call.body)
    return Response(200, {"ETag": etag(call.body)}, b"")


@route("POST", r"/_lfs/(?P<key>[^/]+)/complete")
def complete(call: Call, key: str) -> Response:
    upload = upload_of(call, key)
    given = call.json()
    named = [(one["partNumber"], one["etag"]) for one in given["parts"]]
    if given["oid"] != upload.oid or named != [(number, etag(part)) for number, part in sorted(upload.parts.items())]:
        raise HubError(400, None, "The parts are not those that were uploaded")
    upload.finish(b"".join(part for _, part in sorted(upload.parts.items())))
    return as_json({})


@route("POST", rf"{PAGE}\.git/info/lfs/objects/verify")
def verify(repository: Repository, call: Call) -> Response:
    asked = call.json()
    if len(repository.objects.get(asked["oid"], b"")) != asked["size"]:
        raise HubError(404, None, "The storage holds no such file of this size")
    return as_json({})


@route("GET", rf"{REPOSITORY}/lfs-files", writes=True)
def lfs_files(repository: Repository, call: Call) -> Response:
    """All that a commit ever named, also if no ref reaches that commit."""
    return call.page(
        [
            {
                "fileOid": sha,
                "oid": sha,
                "filename": path,
                "size": len(repository.objects[sha]),
                "ref": ref,
                "pushedAt": DATE,
            }
            for sha, (path, ref) in repository.pushed.items()
        ]
    )


@route("POST", rf"{REPOSITORY}/lfs-files/batch", writes=True)
def delete_lfs_files(repository: Repository, call: Call) -> Response:
    deletions = call.json()["deletions"]
    repository.delete_objects(deletions["sha"], deletions["rewriteHistory"])
    return as_json({})
