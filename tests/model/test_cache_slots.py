"""Sequences join and leave a batch; each reads on as if it were alone, and no tenant leaves anything behind."""

import pytest
import torch
from test_cache import Config, feed, tokens

from longnet import LongNetConfig, LongNetForCausalLM
from longnet.model.cache import LongNetCache

KINDS = {
    "dilated": {"segment_lengths": [4, 32, 96], "dilation_rates": [1, 2, 6]},
    "hierarchical": {"attention": "hierarchical", "segment_lengths": [8], "dilation_rates": [1],
                     "hierarchical": {"block": 4, "radix": 2, "window_blocks": 2, "top_k": 2}},
}  # fmt: skip


def make(kind):
    torch.manual_seed(0)
    config = LongNetConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        **KINDS[kind],
    )  # fmt: skip
    return LongNetForCausalLM(config).double().eval()


def read(model, cache, ids, lengths=None):
    return model(input_ids=ids, past_key_values=cache, use_cache=True, lengths=lengths).logits


@pytest.fixture(params=["dilated", pytest.param("hierarchical")])
def model(request):
    return make(request.param)


@torch.inference_mode()
def test_members_that_join_and_leave_equal_each_alone(model):
    """The oracle is one parallel pass over each member's whole text, without any cache."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(4, 260, (1, 150), generator=generator) for _ in range(5)]
    exact = [model(input_ids=ids).logits[0] for ids in texts]
    slots = LongNetCache(model.config, 3, dtype=torch.float64)
    standing: dict[int, int] = {}  # slot -> text

    def join(slot, text, already):
        alone = LongNetCache(model.config, 1, dtype=torch.float64)
        for part in texts[text][:, :already].split(37, 1):
            read(model, alone, part)
        slots.put(slot, alone)
        standing[slot] = text

    def run(steps, width=1):
        for _ in range(steps):
            ids = torch.full((3, width), 5)
            lengths = torch.tensor([width * (slot in standing) for slot in range(3)])
            at = slots.host_positions
            for slot, text in standing.items():
                ids[slot] = texts[text][0, at[slot] : at[slot] + width]
            logits = read(model, slots, ids, lengths)
            for slot, text in standing.items():
                wanted = exact[text][at[slot] : at[slot] + width]
                torch.testing.assert_close(logits[slot], wanted, atol=1e-10, rtol=0)

    join(1, 0, 100)
    run(3)
    join(0, 1, 3)
    run(9)
    del standing[1]
    run(2)  # its place stays empty
    join(1, 2, 31)
    join(2, 3, 96)
    run(4)
    run(2, width=7)
    left = slots.take([2])  # leaves, and comes back in another place
    del standing[2]
    slots.clear(2)
    assert slots.host_positions[2] == 0
    run(5)
    del standing[0]
    slots.put(0, left)
    standing[0] = 3
    join(2, 4, 1)
    run(6)
    assert list(slots.host_positions) == slots.positions.tolist()


@torch.inference_mode()
def test_a_poisoned_tenant_leaves_nothing(model):
    ids = torch.randint(4, 260, (1, 60), generator=torch.Generator().manual_seed(2))
    slots = LongNetCache(model.config, 2, dtype=torch.float64)
    good = LongNetCache(model.config, 1, dtype=torch.float64)
    read(model, good, ids[:, :20])
    bad = good.copy()
    for x in bad._tensors().values():
        x.fill_(torch.nan)
    clean = good.copy()
    for n in (20, 50):
        slots.put(0, bad)
        slots.put(1, clean)
        step = ids[:, n : n + 1].expand(2, 1)
        assert read(model, slots, step)[0].isnan().all()  # the poison works
        slots.put(0, clean)
        slots.put(1, clean)
        logits = read(model, slots, step)
        torch.testing.assert_close(logits[0], logits[1], atol=1e-12, rtol=0)
        slots.put(0, bad)
        slots.clear(0)
        fresh = LongNetCache(model.config, 1, dtype=torch.float64)
        first = read(model, slots, ids[:, :1].expand(2, 1))[0]
        torch.testing.assert_close(first, read(model, fresh, ids[:, :1])[0], atol=1e-12, rtol=0)
        read(model, clean, ids[:, 20:50]) if n == 20 else None


def test_take_copies_only_what_is_filled():
    cache = LongNetCache(Config(), 3, dtype=torch.float64)
    q, k, v = tokens(3, 300)
    feed(cache, q, k, v, [300, 5, 40])
    one = cache.take([1])
    assert one.host_positions == (5,)
    assert one.nbytes() < cache.nbytes() / 20
    before = {name: x.clone() for name, x in cache._tensors().items()}
    for x in one._tensors().values():
        x.fill_(7)
    assert all(torch.equal(x, cache._tensors()[name]) for name, x in before.items())
    pair = cache.take([2, 0])
    assert pair.host_positions == (40, 300) == tuple(pair.positions.tolist())
    single = cache.take([0])
    cache.put(0, single)
    for x in single._tensors().values():
        x.fill_(torch.nan)
    assert all(x.isfinite().all() for x in cache._tensors().values())


def test_put_keeps_addresses_and_takes_keep_files_small(tmp_path):
    cache, alone = LongNetCache(Config(), 2), LongNetCache(Config(), 1)
    feed(cache, *tokens(2, 200, dtype=torch.float32))
    feed(alone, *tokens(1, 50, dtype=torch.float32))
    addresses = [x.data_ptr() for x in cache._tensors().values()] + [cache.positions.data_ptr()]
    version = cache.version
    cache.put(1, alone)
    assert version == cache.version
    assert addresses == [x.data_ptr() for x in cache._tensors().values()] + [cache.positions.data_ptr()]
    cache.take([1]).save(tmp_path / "one")
    again = LongNetCache.load(tmp_path / "one", Config())
    expected = feed(alone.to("cpu"), *tokens(1, 3, seed=4, dtype=torch.float32))
    assert torch.equal(feed(again, *tokens(1, 3, seed=4, dtype=torch.float32)), expected)


def test_all_room_at_once_and_never_again():
    cache = LongNetCache(Config(), 2)
    cache.reserve_all()
    entries = Config().pattern().cache_entries(4, 2)
    assert cache.nbytes() == 2 * 2 * 2 * entries * 4 * 4  # layers, k and v, sequences, width, bytes
    version, addresses = cache.version, [x.data_ptr() for x in cache._tensors().values()]
    feed(cache, *tokens(2, 700, dtype=torch.float32))
    assert version == cache.version
    assert addresses == [x.data_ptr() for x in cache._tensors().values()]


def test_moving_copies_every_state(model):
    cache = LongNetCache(model.config, 2, dtype=torch.float64)
    read(model, cache, torch.randint(4, 260, (2, 40)), torch.tensor([40, 9]))
    moved = cache.to("cpu")
    same = {name: x.clone() for name, x in cache._tensors().items()}
    assert all(torch.equal(x, moved._tensors()[name]) for name, x in same.items())
    step = torch.full((2, 1), 70)
    assert torch.equal(read(model, moved, step), read(model, cache, step))


def test_arguments():
    cache = LongNetCache(Config(), 2)
    for wrong in (
        LongNetCache(Config(), 2),
        LongNetCache(Config(), 1, dtype=torch.float64),
        LongNetCache(Config(segment_lengths=(4, 64, 324)), 1),
        LongNetCache(Config(), 1, device="meta"),
    ):
        with pytest.raises(ValueError, match="put: expected"):
            cache.put(0, wrong)
    for call in (
        lambda: cache.put(2, LongNetCache(Config(), 1)),
        lambda: cache.take([-1]),
        lambda: cache.clear(5),
    ):
        with pytest.raises(ValueError, match="index: expected"):
            call()
    with pytest.raises(ValueError, match="at least one"):
        cache.take([])
