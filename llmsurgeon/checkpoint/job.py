"""What a staged job depends on, in named parts: they tell one job from another, and say in what two differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256

# Longer values are hashes or lists: that they changed says as much as what they were.
SHOWN = 40


def fingerprint_of(job: Mapping[str, str]) -> str:
    """One hash of all parts of a job (name -> short text or hash), in hexadecimal."""
    return sha256(json.dumps(dict(job), sort_keys=True).encode()).hexdigest()


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between two jobs, a phrase for each part: "distill.seed is 1 and was 0", "text a.txt changed"."""
    found = []
    for name in dict.fromkeys((*now, *before)):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if old is None or new is None:
            found.append(f"{name} is {'new' if old is None else 'gone'}")
        elif max(len(old), len(new)) > SHOWN:
            found.append(f"{name} changed")
        else:
            found.append(f"{name} is {new} and was {old}")
    return found
