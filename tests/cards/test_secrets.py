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
"""Secrets and absolute paths: each kind found in several wrappings, and what only looks like one passes."""

import base64
import copy
import json
import os
import time
from pathlib import Path

import pytest

from hf_unlearn.cards.secrets import scan_paths, scan_secrets


REPOSITORY = Path(__file__).parents[2]
LETTERS = "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1eF3hJ5kL7nP9"
# Put together here, so that no scanner takes this file for a leak
SECRETS = {
    "secret-hugging-face": ["hf_" + LETTERS[:34], "api_" + "org_" + LETTERS[:34]],
    "secret-aws": ["AKIA" + "Q3EGRK7NPLX2VYTB", f"aws_secret_access_key = {(LETTERS + LETTERS)[:40]}"],
    "secret-github": ["ghp_" + LETTERS[:36], "github_" + "pat_" + LETTERS[:22]],
    "secret-openai": ["sk-" + LETTERS, "sk-proj-" + LETTERS, "sk-ant-" + LETTERS],
    "secret-slack": [
        "xoxb-" + "123456789012-" + LETTERS[:24],
        "https://hooks.slack.com/services/T0AB/B0CD/" + LETTERS,
    ],
    "secret-google": ["AIza" + LETTERS[:35], "GOCSPX-" + LETTERS[:28]],
    "secret-private-key": ["-----BEGIN " + "RSA PRIVATE KEY-----", "-----BEGIN OPENSSH " + "PRIVATE KEY-----"],
    "secret-jwt": [".".join(["eyJ" + LETTERS[:20], "eyJ" + LETTERS[:30], LETTERS])],
    "secret-authorization": ["Authorization: Bearer " + LETTERS[:24], '"authorization": "Basic ' + LETTERS[:24] + '"'],
    "secret-url": ["https://me:" + "s3cretpass@host.org/x", "postgres://user:" + "pa55word@db/x"],
}
CASES = [(rule, secret) for rule, secrets in SECRETS.items() for secret in secrets]


@pytest.fixture
def environment(tmp_path):
    """Of a user who is not logged in."""
    return {"HOME": str(tmp_path)}


@pytest.mark.parametrize(("rule", "secret"), CASES)
def test_secret_is_found(rule, secret, environment):
    wrapped = [
        f"token: {secret}\n",
        json.dumps({"hub_token": secret}),
        "".join(f"\\u{ord(c):04x}" for c in secret),
        base64.b64encode(secret.encode()).decode(),
        secret.encode().hex(),
        "".join(f"%{ord(c):02x}" for c in secret),
        "\u200b".join(secret),
        f"see {secret} there".encode("utf-16"),
        b"\x80\x04\x95\0" + secret.encode() + b"\x94\0",
    ]
    for content in wrapped:
        findings = scan_secrets("runs/args.json", content, environment)
        assert rule in {finding.rule for finding in findings}, content
        for finding in findings:
            assert finding.message.startswith("runs/args.json: ") and finding.rule in finding.message
            assert secret not in repr(finding) and LETTERS[:12] not in repr(finding)
    assert len(scan_secrets("x", f"{secret} {secret}", environment)) == len(scan_secrets("x", secret, environment))


@pytest.mark.parametrize(
    "text",
    [
        'curl -H "Authorization: Bearer $HF_TOKEN" https://huggingface.co/api',
        "Authorization: Bearer YOUR_TOKEN_HERE",
        "export HF_TOKEN=hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "hf_unlearn_model_card_of_a_long_name and hf_hub_download",
        "class sk-estimator-doc-link-label-icon-of-a-pipeline",
        "https://user@host.org/a:b https://x.org:8080/a@b ssh://git@host:22/x",
        "https://{user}:{password}@host.org and https://user:$PASSWORD@host",
        "sha256 " + "ab12" * 16 + " and AKIAlow",
        "eyJhbGciOiJIUzI1NiJ9 alone",
        "PRIVATE KEY and -----BEGIN CERTIFICATE-----",
    ],
)
def test_what_only_looks_like_a_secret_passes(text, environment):
    assert scan_secrets("README.md", text, environment) == []


def test_values_of_the_environment(environment):
    names = ["HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "db_password", "KEYS_OF_X", "APIKEY"]
    for name in names:
        values = {**environment, name: "plain-old-words"}
        for content in ("a plain-old-words b", base64.b64encode(b"plain-old-words").decode(), "plain-\nold-words"):
            [finding] = scan_secrets("x", content, values)
            assert finding.rule == "secret-environment" and finding.match_sha256 is None
            assert "plain-old" not in repr(finding) and name not in repr(finding)
    for name in ("PATH", "PWD", "TOKENIZERS_PARALLELISM", "KEYBOARD", "AUTHOR"):
        assert scan_secrets("x", "a plain-old-words b", {**environment, name: "plain-old-words"}) == []
    assert scan_secrets("x", "a short b", {**environment, "TOKEN": "short"}) == []


def test_stored_tokens(tmp_path):
    token, other = "opaque-" + LETTERS[:20].lower(), "another-" + LETTERS[5:25].lower()
    (tmp_path / "token").write_text(f"{token}\n")
    (tmp_path / "stored_tokens").write_text(f"[work]\nhf_token = {other}\n")
    by_path = {"HF_TOKEN_PATH": str(tmp_path / "token"), "HOME": "/nonexistent"}
    default = tmp_path / ".cache" / "huggingface"
    for environment in ({"HF_HOME": str(tmp_path)}, {"HF_TOKEN_PATH": str(tmp_path / "token")}):
        for secret in (token, other):
            rules = [finding.rule for finding in scan_secrets("x", f"see {secret}", environment)]
            assert "secret-token-file" in rules
    assert by_path["HOME"] not in str(scan_secrets("x", token, by_path))
    default.mkdir(parents=True)
    (default / "token").write_text(token)
    [finding] = scan_secrets("x", token, {"HOME": str(tmp_path)})
    assert finding.rule == "secret-token-file" and finding.match_sha256 is None
    assert scan_secrets("x", token, {"HOME": str(tmp_path / "elsewhere")}) == []


PATHS = [
    "/home/me/model",
    "/root/.cache/x",
    "/Users/me/x",
    "/tmp/run1",
    "/mnt/disk/x",
    "/scratch/me",
    "/data/tofu/forget",
    "/disk7/runs/3/model.safetensors",
    "C:\\Users\\me",
    "c:/users/me",
    "D:\\\\Temp\\\\x",
    "file:///x/y",
    "~/models",
    "~me/models",
    "~/.cache/huggingface",
]


@pytest.mark.parametrize("path", PATHS)
def test_path_is_found(path):
    wrapped = [
        path,
        f"loaded from {path}, then",
        f"`{path}`",
        f"[x]({path})",
        f"path={path}",
        json.dumps({"_name_or_path": path}),
        json.dumps({"_name_or_path": path}).replace("/", "\\/"),
        base64.b64encode(f"in {path} ".encode()).decode(),
        f"in {path} ".encode("utf-16"),
    ]
    for content in wrapped:
        findings = scan_paths("config.json", content)
        assert findings and {finding.rule for finding in findings} == {"absolute-path"}, content
        for finding in findings:
            assert finding.message.startswith("config.json") and path not in repr(finding)


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/home/me/x and http://x.org/tmp/y",
        "GET /models and /v1/chat/completions, /api/models/org/name/revision/main",
        "1/2 of 3 / 4, and/or, w/o, km/h, n/a, 24/7, 2026/11/21",
        "models/home/x ./tmp/x ../root/x examples/recipes/npo.yaml",
        "a </tmp> tag, <br/>, </home>, `/`, / and //",
        "#!/usr/bin/env python",
        "{{ path }}/home/x ${HOME}/tmp/y",
        "Q:\nA: c:x, at 10:/, ratio a:b",
        json.dumps("Q:\nUsers\nsay"),
        "~10 tokens/s, ~5/6, ~~struck/through~~",
        "home/me, tmp, /tmp alone, /home.",
        "org/name@main org/tiny_model model.layers.5/mlp",
        "![a figure](figures/x.png) [doc](docs/losses.md)",
    ],
)
def test_what_only_looks_like_a_path_passes(text):
    assert scan_paths("README.md", text) == []


def test_one_finding_for_each_path_with_its_line():
    findings = scan_paths("x.md", "a\n/tmp/one\n/tmp/two\n/tmp/one\n")
    assert [finding.message.split(":")[0] for finding in findings] == ["x.md, line 2", "x.md, line 3"]
    assert len({finding.match_sha256 for finding in findings}) == 2


def test_ordinary_texts_pass(environment, data_dir):
    texts = [path.read_text(encoding="utf-8") for path in [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md")]]
    texts += [path.read_text(encoding="utf-8") for path in (data_dir / "text").glob("*.txt")]
    texts += [(data_dir / "tinystories-260k" / name).read_text() for name in ("config.json", "tokenizer_config.json")]
    for text in texts:
        assert scan_secrets("x", text, environment) == []
    assert [scan_paths("x", text) for text in texts[-5:]] == [[]] * 5


@pytest.mark.parametrize(
    "text",
    [
        "sk-" * 300_000,
        "_sk-" * 200_000,
        "/a" * 400_000,
        "a" * 900_000,
        "a://b:" * 150_000,
        "~" * 900_000,
        "eyJ" * 300_000,
        "authorization: " * 60_000,
        "-----BEGIN " * 80_000,
        "/home/" * 150_000,
    ],
)
def test_no_text_takes_long(text, environment):
    start = time.perf_counter()
    scan_secrets("x", text, environment)
    scan_paths("x", text)
    assert time.perf_counter() - start < 15


def test_the_environment_is_that_of_the_call(monkeypatch):
    """`Dataset.map` with several processes puts a copy in the place of `os.environ`, which is what counts then."""
    monkeypatch.setattr(os, "environ", copy.deepcopy(os.environ))
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    assert [finding.rule for finding in scan_secrets("README.md", "correct-horse-battery")] == ["secret-environment"]
