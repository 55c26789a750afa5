"""What is done to bytes and to JSON, whatever they mean. Every function draws from a seeded generator."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

HUGE = "1" + "0" * 4400  # more digits than Python turns into a number
DEEP = 20_000

# JSON texts that stand where another value was expected.
ODD = (
    "null", "true", "false", "0", "1", "-1", "2", "3", "0.5", "-0.0", "1e3", "1e400", "-1e400", "NaN", "Infinity",
    "-Infinity",
    "2147483648", "4294967296", "9223372036854775807", "9223372036854775808", "-9223372036854775808", "1e18", HUGE,
    f"-{HUGE}", '""', '"a"', '"7"', '"null"', '"\\u0000"', '"\\ud800"', '"\\u202etxt"', '"\\u001b[31m"', '"[/x]"',
    '"{{x}}"',
    '"../../etc/passwd"', '"/dev/zero"', f'"{"n" * 300}"', '"ﬁ\u0301\U0001f600"', "[]", "[[]]", "[0]", "[1, 2, 3, 4]",
    '["a"]', "[null]", "[true, false]", "{}", '{"a": 1}', '{"": null}', '{"type": "linear"}',
    '{"rope_type": "nonsense"}',
    '{"0": {"1": [2, {"3": 4}]}}', f"[{'0, ' * 500}0]",
)  # fmt: skip
KEYS = ("", "a", "\0", "\ud800", "n" * 300, "__class__", "model_type", "auto_map", "quantization_config", "torch_dtype")


def raw(draw: Random, content: bytes) -> tuple[bytes, str]:
    """Damage that knows no format: (the new bytes, what was done)."""
    return draw.choice(RAW)(draw, content)


def _flip(draw: Random, content: bytes) -> tuple[bytes, str]:
    made, count = bytearray(content), draw.choice((1, 1, 2, 8, 64))
    if not made:
        return content, "nothing to flip"
    for _ in range(count):
        at = draw.randrange(len(made))
        made[at] ^= 1 << draw.randrange(8)
    return bytes(made), f"{count} bits flipped"


def _set(draw: Random, content: bytes) -> tuple[bytes, str]:
    if not content:
        return content, "nothing to set"
    at, size = draw.randrange(len(content)), draw.choice((1, 2, 4, 8, 100))
    fill = draw.choice((b"\0", b"\xff", b"\x7f", b"9"))
    return content[:at] + fill * size + content[at + size :], f"{size} bytes at {at} set to {fill!r}"


def _cut(draw: Random, content: bytes) -> tuple[bytes, str]:
    at = draw.choice((0, 1, 7, 8, 9, len(content) // 2, max(0, len(content) - 1), draw.randrange(len(content) + 1)))
    return content[:at], f"cut to {at} bytes"


def _insert(draw: Random, content: bytes) -> tuple[bytes, str]:
    at = draw.choice((0, len(content), draw.randrange(len(content) + 1)))
    odd = (
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\0",
        b"\xff",
        b"\xc3\x28",
        b"\xed\xa0\x80",
        b"\n\n",
        b"{",
        b"]",
        b"\x1b[0m",
        b"9" * 5000,
    )
    what = draw.choice(odd)
    return content[:at] + what + content[at:], f"{what[:8]!r} put in at {at}"


def _repeat(draw: Random, content: bytes) -> tuple[bytes, str]:
    start = draw.randrange(len(content) + 1)
    end = min(len(content), start + draw.choice((1, 10, 100, 1000)))
    return content[:end] + content[start:], f"bytes {start} to {end} twice"


def _remove(draw: Random, content: bytes) -> tuple[bytes, str]:
    start = draw.randrange(len(content) + 1)
    end = min(len(content), start + draw.choice((1, 10, 100, 1000)))
    return content[:start] + content[end:], f"bytes {start} to {end} gone"


def _other(draw: Random, content: bytes) -> tuple[bytes, str]:
    made = {
        "empty": b"",
        "a null": b"null",
        "a list": b"[]",
        "an object": b"{}",
        "deep lists": b"[" * DEEP + b"]" * DEEP,
        "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        "a string": b'"x"',
        "UTF-16": content.decode("utf-8", "replace").encode("utf-16"),
        "zeros": bytes(len(content)),
        "noise": draw.randbytes(200),
    }
    name = draw.choice(list(made))
    return made[name], f"all of it replaced: {name}"


RAW: tuple[Callable[[Random, bytes], tuple[bytes, str]], ...] = (
    _flip,
    _flip,
    _set,
    _cut,
    _insert,
    _repeat,
    _remove,
    _other,
)


class Odd(str):
    """A JSON text that is written as it stands."""


def mutated_json(draw: Random, content: bytes, keys: tuple[str, ...] = KEYS, deep: bool = True) -> tuple[bytes, str]:
    """A JSON file with one to three things changed: (the new bytes, what was done).

    keys: names that may be added; deep: nodes at every depth are as likely, else those at the top.
    """
    if draw.random() < 0.15:
        return raw(draw, content)
    data = json.loads(content)
    done = [_change(draw, data, keys, deep) for _ in range(draw.choice((1, 1, 1, 2, 3)))]
    return _dump(data).encode("utf-8", "surrogatepass"), "; ".join(done)


def _change(draw: Random, data: Any, keys: tuple[str, ...], deep: bool) -> str:
    places = list(_places(data)) if deep else [(data, key) for key in _keys(data)]
    if not places:
        return "nothing to change"
    holder, key = draw.choice(places)
    name = repr(key)[:60]
    match draw.choice(("value", "value", "value", "value", "near", "gone", "twice", "renamed", "added")):
        case "value":
            holder[key] = Odd(draw.choice(ODD))
            return f"{name} is {holder[key][:40]}"
        case "near":
            holder[key] = _near(draw, holder[key])
            return f"{name} is {str(holder[key])[:40]}"
        case "gone":
            del holder[key]
            return f"{name} gone"
        case "twice" if isinstance(holder, dict):
            holder[Twice(key)] = Odd(draw.choice(ODD)) if draw.random() < 0.5 else holder[key]
            return f"{name} twice"
        case "renamed" if isinstance(holder, dict):
            new = draw.choice(keys)
            holder[new] = holder.pop(key)
            return f"{name} renamed {new[:20]!r}"
        case _:
            new = draw.choice(keys)
            odd = Odd(draw.choice(ODD))
            if isinstance(holder, dict):
                holder[new] = odd
            else:
                holder.insert(draw.randrange(len(holder) + 1), odd)
            return f"{new[:20]!r} added: {odd[:40]}"


class Twice(str):
    """A key that is another one beside an equal one in the same dict."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def _near(draw: Random, value: Any) -> Any:
    """A value of the same type, beside this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice((value + 1, value - 1, value * 2, -value, value // 2, value * 1000, value + 2**32, 0))
    if isinstance(value, float):
        return draw.choice((-value, value * 1e30, value / 2, 0.0, value + 1))
    if isinstance(value, str):
        return draw.choice((value + "x", value[:-1], value.upper(), " " + value, value * 2, value[::-1]))
    if isinstance(value, list):
        return draw.choice((value[:-1], value * 2, value[::-1], [value], [*value, None]))
    if isinstance(value, dict):
        return draw.choice(({}, [value], {"a": value}))
    return draw.choice((0, "", [], {}))


def _keys(node: Any) -> list[Any]:
    return list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []


def _places(node: Any, depth: int = 0) -> Any:
    """(holder, key) of every value; of a long list or dict a few, so that it does not hide the others."""
    keys = _keys(node)
    step = max(1, len(keys) // 40)
    for key in keys[::step]:
        yield node, key
        if depth < 6:
            yield from _places(node[key], depth + 1)


def _dump(node: Any) -> str:
    if isinstance(node, Odd):
        return str(node)
    if isinstance(node, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_dump(value)}" for key, value in node.items()) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(_dump, node)) + "]"
    return json.dumps(node)
