"""Texts with answers, made on the device: associative recall, hidden passkeys, selective copying, at any length.

The answers of a text follow from its ids alone. Ids: noise, a mark and a question sign, values, keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NOISE, MARK, ASK, VALUES, KEYS, VOCABULARY = 4, 68, 69, 70, 134, 1158
# Symbols of a passkey, passkeys of a text, items to copy, and the stretch of noise they are strewn over.
DIGITS, NEEDLES, ITEMS, STRETCH = 8, 4, 16, 32
# Key-value pairs of a text and questions about them, at most; short texts hold fewer. And how many keys there are, but for
# haystacks: the more, the longer it takes to learn that equal ones match, which is not what attentions differ in.
PAIRS, QUESTIONS, PAIR_KEYS = 32, 128, 128
SHORTEST = 128


class Batch(NamedTuple):
    """ids (B, N); the tokens after places (B, A) must be answers (B, A)."""

    ids: Tensor
    places: Tensor
    answers: Tensor


def _distinct(size: int, count: int, of: int, generator: torch.Generator) -> Tensor:
    """(size, count): different numbers below `of`, in random order."""
    return torch.rand(size, of, generator=generator, device=generator.device).argsort(1)[:, :count]


def _noise(size: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(NOISE, MARK, (size, length), generator=generator, device=generator.device)


def _values(size: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(VALUES, KEYS, (size, count), generator=generator, device=generator.device)


def _pairs(size: int, length: int, pairs: int, of: int, generator: torch.Generator) -> Batch:
    """`pairs` key-value pairs anywhere in the first half, keys out of `of`; in the second, single keys ask for their value."""
    asked = min(length // 8, QUESTIONS)
    ids = _noise(size, length, generator)
    keys = KEYS + _distinct(size, pairs, of, generator)
    values = _values(size, pairs, generator)
    at = 2 * _distinct(size, pairs, length // 4, generator)
    ids.scatter_(1, at, keys).scatter_(1, at + 1, values)
    places = length // 2 + _distinct(size, asked, length - length // 2, generator)
    which = torch.randint(pairs, (size, asked), generator=generator, device=ids.device)
    ids.scatter_(1, places, keys.gather(1, which))
    return Batch(ids, places, values.gather(1, which))


def recall(size: int, length: int, generator: torch.Generator) -> Batch:
    """Multi-query associative recall: the pairs stay as many, the noise grows."""
    return _pairs(size, length, min(PAIRS, length // 16), PAIR_KEYS, generator)


def haystack(size: int, length: int, generator: torch.Generator) -> Batch:
    """The same in a haystack made of needles: a pair for every 16 tokens."""
    return _pairs(size, length, length // 16, VOCABULARY - KEYS, generator)


def passkey(size: int, length: int, generator: torch.Generator) -> Batch:
    """Four passkeys, each a key and eight symbols, all different, anywhere in noise; at the end each is asked for and spelt."""
    unit = DIGITS + 1
    ids = _noise(size, length, generator)
    keys = KEYS + _distinct(size, NEEDLES, PAIR_KEYS, generator)
    symbols = VALUES + _distinct(size, NEEDLES * DIGITS, KEYS - VALUES, generator)
    needles = torch.cat((keys[..., None], symbols.view(size, NEEDLES, DIGITS)), 2)
    body = length - NEEDLES * unit
    at = unit * _distinct(size, NEEDLES, body // unit, generator)
    inside = torch.arange(unit, device=ids.device)
    ids.scatter_(1, (at[..., None] + inside).flatten(1), needles.flatten(1))
    order = _distinct(size, NEEDLES, NEEDLES, generator)
    asked = needles.gather(1, order[..., None].expand(-1, -1, unit))
    ids[:, body:] = asked.flatten(1)
    places = body + (unit * torch.arange(NEEDLES, device=ids.device)[:, None] + inside[:-1]).flatten()
    return Batch(ids, places.expand(size, -1), asked[:, :, 1:].flatten(1))


def copy(size: int, length: int, generator: torch.Generator) -> Batch:
    """Selective copying: a mark and 16 different items strewn over 32 tokens of noise, to be repeated in order at the end."""
    ids = _noise(size, length, generator)
    items = VALUES + _distinct(size, ITEMS, KEYS - VALUES, generator)
    body = length - ITEMS
    begin = torch.randint(0, body - STRETCH, (size, 1), generator=generator, device=ids.device)
    at = begin + 1 + _distinct(size, ITEMS, STRETCH - 1, generator).sort(1).values
    ids.scatter_(1, begin, MARK).scatter_(1, at, items)
    ids[:, body] = ASK
    ids[:, body + 1 :] = items[:, :-1]
    places = torch.arange(body, length, device=ids.device)
    return Batch(ids, places.expand(size, -1), items)


TASKS: dict[str, Callable[[int, int, torch.Generator], Batch]] = {
    "recall": recall,
    "haystack": haystack,
    "passkey": passkey,
    "copy": copy,
}
