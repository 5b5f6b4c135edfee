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
"""Checking values against type hints: what a report may hold, and what a message about it says."""

import math
import operator
import types
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, SupportsFloat, Union, get_args, get_origin, get_type_hints


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def validated(value: Any, hint: Any, path: str) -> Any:
    """
    A copy of `value` that has the type `hint` all the way down, dataclasses in the place of dicts.

    Messages name the field at fault and the type found there, never a text: a report that is refused may hold one
    that must not be repeated.
    """
    origin = get_origin(hint)
    if is_dataclass(hint):
        return _validated_object(value, hint, path)
    if origin is list:
        if not isinstance(value, list):
            raise _unfit(path, "a list", value)
        return [validated(item, get_args(hint)[0], f"{path}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise _unfit(path, "an object", value)
        key_hint, value_hint = get_args(hint)
        keys = [validated(key, key_hint, f"a key of {path}") for key in value]
        return {
            key: validated(item, value_hint, f"{path}.{key}") for key, item in zip(keys, value.values(), strict=True)
        }
    if origin is Annotated:
        text_hint, pattern, meaning = get_args(hint)
        text = validated(value, text_hint, path)
        if not pattern.fullmatch(text):
            raise ValueError(f"{path}: expected {meaning}")
        return text
    if origin is Literal:
        if not isinstance(value, str) or value not in get_args(hint):
            raise ValueError(f"{path}: expected {' or '.join(map(repr, get_args(hint)))}")
        return value
    if origin in (Union, types.UnionType):
        return _validated_union(value, get_args(hint), path)
    return _validated_scalar(value, hint, path)


def _validated_object(value: Any, cls: type, path: str) -> Any:
    if isinstance(value, cls):
        value = vars(value)
    if not isinstance(value, dict):
        raise _unfit(path or "the report", "an object", value)
    prefix = f"{path}." if path else ""
    names = [spec.name for spec in fields(cls)]
    for key in value:
        if key not in names:
            raise ValueError(f"unknown key {prefix + str(key)!r}")
    for name in names:
        if name not in value:
            raise ValueError(f"missing key {prefix + name!r}")
    return cls(**{name: validated(value[name], _hints(cls)[name], prefix + name) for name in names})


def _validated_union(value: Any, members: tuple[Any, ...], path: str) -> Any:
    if value is None and types.NoneType in members:
        return None
    if isinstance(value, bool) and bool in members:
        return value
    # Several scalar types: the value's own. What has none of them, such as a NumPy scalar, has to pass as the first.
    members = [member for member in members if member is not types.NoneType]
    own = [kind for kind in (int, str) if kind in members and isinstance(value, kind)]
    return validated(value, (own or members)[0], path)


def _validated_scalar(value: Any, kind: type, path: str) -> Any:
    if kind is str:
        # One printable line: no line break that could open a block in the card, no invisible or unencodable character.
        if not isinstance(value, str) or not value.isprintable():
            raise _unfit(path, "one line of printable text", value)
        return value
    if isinstance(value, bool):
        raise _unfit(path, "a number", value)
    if kind is int:
        try:
            number = operator.index(value)
        except TypeError:
            raise _unfit(path, "an integer", value) from None
        if not -(2**63) <= number < 2**63:
            raise ValueError(f"{path}: expected an integer of 64 bits")
        return number
    if not isinstance(value, SupportsFloat):
        raise _unfit(path, "a number", value)
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        # A tensor with several elements, or an integer beyond the range of a float.
        raise _unfit(path, "a number", value) from None
    if not math.isfinite(number):
        raise ValueError(f"{path}: expected a finite number, got {number}")
    return number


def _unfit(path: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"{path}: expected {expected}, got {type(value).__name__}")
