"""What two mentions' strings and places say about them, in integers: features, candidate antecedents, candidate pairs of
entities."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from longnet.model.relations import BUCKETS

# Earlier mentions a mention is compared with: so many just before it, and so many with the same string or the same last word.
WINDOW, SAME = 16, 2
# Neighbours of a mention, in order of the text, whose entities make pairs with its own in documents with many entities.
NEIGHBOURS = 16
DIFFERENT, EQUAL, LAST_WORD, FIRST_WORD, ACRONYM, CONTAINED = range(6)


def normalise(text: str) -> str:
    """NFKC, case folded, runs of white space as one space: two mentions with the same result have the same string."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def buckets(values: np.ndarray) -> np.ndarray:
    """floor(log2(1 + value)), at most BUCKETS - 1."""
    return np.minimum(np.log2(1.0 + np.asarray(values, float)).astype(np.int64), BUCKETS - 1)


def frequency_and_place(names: Sequence[str], first_bytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per mention, bucketed: how many mentions have its string; at which 64th byte it begins."""
    counts = Counter(names)
    return buckets(np.asarray([counts[name] for name in names], np.int64)), buckets(first_bytes // 64)


class Strings:
    """Normalised strings and the ways in which two of them agree."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.names = [normalise(text) for text in texts]
        words = [name.split(" ") for name in self.names]
        self.last = [w[-1] for w in words]
        self.first = [w[0] for w in words]
        self.compact = ["".join(c for c in name if c.isalnum()) for name in self.names]
        self.initials = [
            "".join(w[0] for w in own if w[:1].isalnum()) if len(own) > 1 else "" for own in words
        ]

    def agreement(self, i: int, j: int) -> int:
        if self.names[i] == self.names[j]:
            return EQUAL
        if (self.initials[i] and self.initials[i] == self.compact[j]) or (
            self.initials[j] and self.initials[j] == self.compact[i]
        ):
            return ACRONYM
        if self.last[i] == self.last[j]:
            return LAST_WORD
        if self.first[i] == self.first[j]:
            return FIRST_WORD
        short, long = sorted((self.names[i], self.names[j]), key=len)
        return CONTAINED if short and short in long else DIFFERENT


def candidate_antecedents(
    strings: Strings, labels: Sequence[str], first_bytes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(pairs (P, 2) of mention and earlier mention, features (P, 3): distance, agreement, same label).

    Candidates of a mention: the WINDOW before it; the last SAME, and the first, with its string; the last SAME with its
    last word; the last one that it is an acronym of, or that is one of it. So P grows linearly with the number of mentions.
    """
    pairs, kinds = [], []
    by_name, by_last = defaultdict(list), defaultdict(list)
    by_compact: dict[str, int] = {}
    by_initials: dict[str, int] = {}
    for i, name in enumerate(strings.names):
        earlier = set(range(max(0, i - WINDOW), i))
        earlier.update(by_name[name][:1], by_name[name][-SAME:], by_last[strings.last[i]][-SAME:])
        if strings.initials[i] in by_compact:
            earlier.add(by_compact[strings.initials[i]])
        if strings.compact[i] in by_initials:
            earlier.add(by_initials[strings.compact[i]])
        for j in sorted(earlier):
            pairs.append((i, j))
            kinds.append((strings.agreement(i, j), labels[i] == labels[j]))
        by_name[name].append(i)
        by_last[strings.last[i]].append(i)
        if strings.compact[i]:
            by_compact[strings.compact[i]] = i
        if strings.initials[i]:
            by_initials[strings.initials[i]] = i
    found = np.asarray(pairs, np.int64).reshape(-1, 2)
    gaps = np.abs(first_bytes[found[:, 0]] - first_bytes[found[:, 1]])
    agreement = np.asarray(kinds, np.int64).reshape(-1, 2)
    return found, np.stack((buckets(gaps), agreement[:, 0], agreement[:, 1]), 1)


def join(count: int, links: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Mentions 0 .. count - 1 as clusters: the connected components of links, each ascending, in order of their first mention."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in links:
        a, b = sorted((root(i), root(j)))
        parent[b] = a
    clusters = defaultdict(list)
    for i in range(count):
        clusters[root(i)].append(i)
    return list(clusters.values())


def all_pairs(labels: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """(Q, 2) ordered pairs of different entities whose labels (E,) may be related: allowed (L, L) of bool."""
    possible = allowed[labels[:, None], labels[None, :]]
    np.fill_diagonal(possible, False)
    return np.argwhere(possible)


def near_pairs(member: np.ndarray, entity: np.ndarray) -> np.ndarray:
    """(Q, 2), both orders, each once: different entities with mentions at most NEIGHBOURS mentions apart.

    member (n,) are mentions in order of the text, entity (n,) whose they are. Linear in n.
    """
    owners = entity[np.argsort(member, kind="stable")]
    found = [np.stack((owners[:-gap], owners[gap:]), 1) for gap in range(1, min(NEIGHBOURS + 1, len(owners)))]
    pairs = np.concatenate(found) if found else np.zeros((0, 2), np.int64)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    count = int(owners.max(initial=0)) + 1
    # One number a pair: sorting rows is several times slower.
    keys = np.unique(np.concatenate((pairs @ [count, 1], pairs @ [1, count])))
    return np.stack((keys // count, keys % count), 1)


def pair_distances(pairs: np.ndarray, at: np.ndarray, entity: np.ndarray) -> np.ndarray:
    """(Q,) in [0, 2 BUCKETS): bucketed bytes between the nearest mentions of head and tail, + BUCKETS where the head comes first.

    at (n,): first bytes of mentions, entity (n,) whose they are. For every pair the head's mentions look for the nearest
    of the tail in one sorted table: O(sum of the heads' mentions x log n).
    """
    if not len(pairs):
        return np.zeros(0, np.int64)
    order = np.lexsort((at, entity))
    at, entity = at[order].astype(np.int64), entity[order]
    count = int(entity.max()) + 1
    sizes = np.bincount(entity, minlength=count)
    begins = np.concatenate(([0], np.cumsum(sizes)))
    span = int(at.max()) + 1
    table = entity * span + at
    heads, tails = pairs[:, 0], pairs[:, 1]
    owner = np.repeat(np.arange(len(pairs)), sizes[heads])
    within = np.arange(len(owner)) - np.repeat(np.cumsum(sizes[heads]) - sizes[heads], sizes[heads])
    own = at[begins[heads[owner]] + within]
    tail = tails[owner]
    right = np.searchsorted(table, tail * span + own)
    gaps = np.full((2, len(owner)), np.iinfo(np.int64).max)
    after = right < begins[tail + 1]
    gaps[0, after] = table[right[after]] - tail[after] * span - own[after]
    before = right > begins[tail]
    gaps[1, before] = own[before] - (table[right[before] - 1] - tail[before] * span)
    best = np.full((2, len(pairs)), np.iinfo(np.int64).max)
    for side in range(2):
        np.minimum.at(best[side], owner, gaps[side])
    return buckets(best.min(0)) + BUCKETS * (best[0] <= best[1])
