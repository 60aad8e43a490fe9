"""Changes input in ways that its reader does not expect."""

from __future__ import annotations

import random


def mutated(rng: random.Random, content: bytes) -> bytes:
    """Flip, cut, repeat, insert: one to four times."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x30, 0x02, 0x22, 0x7B, 0x5B))
        elif kind == 2:
            del data[at : at + rng.randint(1, 16)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randint(1, 64)]
        elif kind == 4:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        else:
            data = data[: max(1, at)]
    return bytes(data) or b"0"
