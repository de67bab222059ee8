"""Ids that are unique in a split, whatever the rows call themselves."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np


def unique_ids(ids: Callable[[], Iterable[str]], digest_of: Callable[[int], str]) -> dict[int, str]:
    """Return new ids for the rows that share one, in a way that does not depend on the order of the rows.

    Rows of different content that share an id get the hash of their content beside it; repeats of the same content are
    numbered, which of them is which being all the same. Memory holds eight bytes a row, and the rows that share an id.

    Args:
        ids: Gives the id of every row; called twice.
        digest_of: Row to the hash of its content.
    """

    def short(id: str) -> int:
        return int.from_bytes(hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")

    hashes = np.fromiter((short(id) for id in ids()), dtype=np.uint64)
    known, counts = np.unique(hashes, return_counts=True)
    if not (counts > 1).any():
        return {}

    def exists(id: str) -> bool:
        at = int(np.searchsorted(known, wanted := np.uint64(short(id))))
        return at < len(known) and known[at] == wanted

    shared = np.isin(hashes, known[counts > 1])
    own = {at: id for at, id in enumerate(ids()) if shared[at]}
    contents: dict[str, set[str]] = {}
    for at, id in own.items():
        contents.setdefault(id, set()).add(digest_of(at))
    repeats: Counter[str] = Counter()
    taken: set[str] = set()
    renamed: dict[int, str] = {}
    for at, id in own.items():
        base = id if len(contents[id]) == 1 else f"{id}/{digest_of(at)}"
        repeats[base] += 1
        new = base if repeats[base] == 1 else f"{base}#{repeats[base]}"
        while new in taken or (new != id and exists(new)):
            repeats[base] += 1
            new = f"{base}#{repeats[base]}"
        taken.add(new)
        if new != id:
            renamed[at] = new
    return renamed
