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
"""`hf-unlearn doctor` asks the Hub whose token it is, and prints no token."""

import json

import pytest


def login(outcome) -> dict:
    assert outcome.code == 0, outcome.err
    checks = json.loads(outcome.out)["checks"]
    return next(check for check in checks if check["group"] == "Hub")


def test_whose_token(hub, run_process, token):
    reader = hub.add_user("carol", role="read")
    for one, status, words in (
        (token, "ok", "alice, a token that may write"),
        (reader, "ok", "carol, a token that may read"),
        ("hf_nobody", "note", "the Hub refuses the token (401)"),
    ):
        outcome = run_process("doctor", "--json", token=one)
        check = login(outcome)
        assert check["status"] == status and words in check["message"]
        assert one not in outcome.out + outcome.err
    assert hub.writes() == []


@pytest.mark.parametrize("status", [500, None])
def test_a_hub_that_fails_is_a_note(hub, run_process, token, status):
    if status is None:
        hub.drop("GET", "/api/whoami-v2", "before", times=100)
    else:
        hub.fail("GET", "/api/whoami-v2", "before", status, times=100)
    assert login(run_process("doctor", "--json", token=token))["status"] == "note"


def test_nobody_is_asked(hub, run_process, token):
    assert "nobody was asked" in login(run_process("doctor", "--json", "--offline", token=token))["message"]
    assert hub.requests == []
