"""GGUF files: bytes anywhere, and fields whose type, count or value is another one."""

from __future__ import annotations

import struct
from random import Random

from tests.attack.commands import command
from tests.attack.mutations import raw
from tests.attack.scene import Scene, Verdict

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
COUNTS = (0, 1, 2, 2**16, 2**31 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**64 - 1)


def attempt(draw: Random, scene: Scene) -> Verdict:
    file = scene.copy(draw.choice(("f32.gguf", "q8.gguf")), "model.gguf")
    content = bytearray(file.read_bytes())
    marks = fields(content)
    match draw.choice(("raw", "head", "number", "number", "number", "string", "type", "count", "tensor", "tensor")):
        case "raw":
            made, what = raw(draw, bytes(content))
            content = bytearray(made)
        case "head":
            made, what = raw(draw, bytes(content[:64]))
            content = bytearray(made) + content[64:]
        case kind:
            name, what_it_is, at, size = draw.choice([mark for mark in marks if mark[1] == kind])
            if kind in ("number", "tensor"):
                value = draw.choice(
                    (0, 1, 2, 3, 255, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1, draw.getrandbits(8 * size))
                )
                content[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
            elif kind == "string":
                value = draw.choice(
                    (b"", b"\xff", b"\0", b"x", b"\x1b[31m", b"n" * 300, b"nonsense", "ﬁ".encode(), b"\xed\xa0\x80")
                )
                content[at - 8 : at + size] = struct.pack("<Q", len(value)) + value
            elif kind == "type":
                value = draw.choice((*range(15), 255, 2**31, 2**32 - 1))
                content[at : at + 4] = struct.pack("<I", value)
            else:
                value = draw.choice(COUNTS)
                content[at : at + 8] = struct.pack("<Q", value)
            what = f"{name} ({what_it_is}): {value!r}"
    file.write_bytes(content)
    return scene.check(command(draw, scene, "model.gguf", "bytelevel"), what)


def fields(content: bytearray) -> list[tuple[str, str, int, int]]:
    """(name, kind, offset, size) of what a healthy file's head is made of."""
    marks: list[tuple[str, str, int, int]] = [
        ("version", "number", 4, 4),
        ("tensors", "count", 8, 8),
        ("fields", "count", 16, 8),
    ]
    tensors, entries = struct.unpack_from("<QQ", content, 8)
    at = 24

    def string(name: str) -> str:
        nonlocal at
        (size,) = struct.unpack_from("<Q", content, at)
        marks.append((name, "count", at, 8))
        marks.append((name, "string", at + 8, size))
        text = content[at + 8 : at + 8 + size].decode()
        at += 8 + size
        return text

    def value(name: str, kind: int) -> None:
        nonlocal at
        if kind == STRING:
            string(name)
        elif kind == ARRAY:
            inner, count = struct.unpack_from("<IQ", content, at)
            marks.extend([(name, "type", at, 4), (name, "count", at + 4, 8)])
            at += 12
            kept = len(marks)
            for _ in range(count):
                value(name, inner)
            del marks[kept + 10 :]  # a few of many
        else:
            marks.append((name, "number", at, SIZES[kind]))
            at += SIZES[kind]

    for _ in range(entries):
        name = string("a field's name")
        marks.append((name, "type", at, 4))
        at += 4
        value(name, struct.unpack_from("<I", content, at - 4)[0])
    for _ in range(tensors):
        name = string("a tensor's name")
        (dims,) = struct.unpack_from("<I", content, at)
        marks.append((f"dims of {name}", "tensor", at, 4))
        marks.extend((f"dim {i} of {name}", "tensor", at + 4 + 8 * i, 8) for i in range(dims))
        at += 4 + 8 * dims
        marks.extend([(f"type of {name}", "tensor", at, 4), (f"offset of {name}", "tensor", at + 4, 8)])
        at += 12
    return marks
