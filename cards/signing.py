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
"""Signatures of a manifest by `ssh-keygen -Y`: with keys that people have already, and no cryptography of ours."""

import os
import subprocess
import tempfile

from hf_unlearn.cards.manifest import MANIFEST_NAME, SIGNATURE_NAME
from hf_unlearn.cards.tensor_files import read_small_file


# Part of what is signed: a signature made for another purpose does not count here
NAMESPACE = "hf-unlearn"
UNSIGNED = "integrity only, no author"


def sign_manifest(folder: str | os.PathLike, key: str | os.PathLike) -> None:
    """
    Writes `edit_manifest.json.sig` beside the manifest.

    Args:
        folder (`str` or `os.PathLike`): the folder of the manifest.
        key (`str` or `os.PathLike`): an SSH key: a private key, or a public one whose private key is in the agent.

    Raises:
        `ValueError`: ssh-keygen is missing, or the key does not sign.
    """
    content = read_small_file(folder, MANIFEST_NAME)
    if not os.path.isfile(key):
        raise ValueError("The key to sign with does not exist: check the path.")
    # An absolute path never looks like an option
    result = _ssh_keygen(["sign", "-f", os.path.abspath(key), "-n", NAMESPACE], content)
    if result.returncode or not result.stdout.startswith(b"-----BEGIN SSH SIGNATURE-----"):
        raise ValueError("ssh-keygen could not sign with this key: check that it is an SSH key, and its passphrase.")
    with open(os.path.join(folder, SIGNATURE_NAME), "xb") as file:
        file.write(result.stdout)


def verify_manifest(
    folder: str | os.PathLike, content: bytes, allowed_signers: str | os.PathLike | None, identity: str | None
) -> str:
    """
    Says whose manifest it is.

    Args:
        folder (`str` or `os.PathLike`): the folder of the manifest.
        content (`bytes`): the manifest's bytes, as they were read and are used.
        allowed_signers (`str` or `os.PathLike`, *optional*): a file of the form that `ssh-keygen` describes under
            ALLOWED SIGNERS: who may sign with which key.
        identity (`str`, *optional*): who has to have signed, a name in that file.

    Returns:
        `str`: `"signed by ..."`, or `"integrity only, no author"` where no `allowed_signers` are given.

    Raises:
        `ValueError`: the signature is missing or not one of `identity`, or ssh-keygen is missing.
    """
    if allowed_signers is None and identity is None:
        return UNSIGNED
    if allowed_signers is None or identity is None:
        raise ValueError("A signature is verified against a file of allowed signers and an identity: pass both.")
    if not os.path.isfile(allowed_signers):
        raise ValueError("The file of allowed signers does not exist: check the path.")
    if not identity.isprintable() or not identity:
        raise ValueError("The identity is no name: pass one that stands in the file of allowed signers.")
    signature = read_small_file(folder, SIGNATURE_NAME)
    if signature is None:
        raise ValueError(f"The manifest is not signed: there is no {SIGNATURE_NAME} beside it.")
    # From the bytes that were read, so that no other file can take its place
    with tempfile.NamedTemporaryFile() as file:
        file.write(signature)
        file.flush()
        arguments = ["-f", os.path.abspath(allowed_signers), f"-I{identity}", "-n", NAMESPACE, "-s", file.name]
        result = _ssh_keygen(["verify", *arguments], content)
    if result.returncode:
        raise ValueError("The signature of the manifest is not a valid one of this identity: do not use it.")
    return f"signed by {identity}"


def _ssh_keygen(arguments: list[str], content: bytes) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(["ssh-keygen", "-Y", *arguments], input=content, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise ValueError("ssh-keygen is not installed: install OpenSSH, or leave the signature out.") from error
