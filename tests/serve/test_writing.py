"""Ids to text: stop texts and characters across tokens."""

import itertools

import numpy as np
import pytest

from longnet.serve.writing import Writer


@pytest.mark.parametrize("longest", [1, 5])
@pytest.mark.parametrize(
    "stops", [(), (b"END",), (b"aab", b"ab"), (b"aaEb", b"aE"), ("é".encode(),), (b"\n\n",)]
)
def test_the_writer_equals_a_search_in_the_whole_text(stops, longest):
    """Whatever the tokens: where a text ends does not depend on the borders between them."""
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(100):
        data = bytes(generator.choice(list(b"aabEND\n\xc3\xa9 "), 40).tolist())
        for stop in stops[: generator.integers(2)]:  # half of the texts have one for certain
            at = int(generator.integers(len(data)))
            data = data[:at] + stop + data[at:]
        cuts = [0, *np.cumsum(generator.integers(1, longest + 1, len(data)))]
        spelling = [piece for b, e in itertools.pairwise(cuts) if (piece := data[b:e])]
        writer, pieces = Writer(spelling, stops), []
        for token in range(len(spelling)):
            pieces.append(writer.add(token))
            if writer.stopped:
                break
        pieces.append(writer.finish())
        # The first byte at which any stop text is complete, then the earliest start of one that is.
        ends = [data.find(s) + len(s) for s in stops if s in data]
        cut = len(data)
        if ends:
            read = data[: min(ends)]
            cut = min(read.find(s) for s in stops if read.endswith(s))
        assert "".join(pieces) == data[:cut].decode("utf-8", "replace")
        assert writer.stopped == bool(ends)
        found += bool(ends)
    assert found > 20 or not stops
