"""Loss by position: the same numbers as one parallel pass, however the text is cut, batched or continued."""

import math

import numpy as np
import pytest
import torch

from longnet import LongNetCache, LongNetConfig, LongNetForCausalLM
from longnet.train.evaluate import by_position, stream


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    pattern = {"segment_lengths": [8, 32], "dilation_rates": [1, 4]}
    return LongNetForCausalLM(LongNetConfig(**size, **pattern, initializer_range=0.2)).eval()


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(4, 260, 700).astype(np.uint16)


def parallel(model, ids):
    with torch.no_grad():
        return model.token_losses(torch.from_numpy(ids.astype(np.int64))[None])[
            0
        ].double().numpy() / math.log(2)


@pytest.mark.parametrize("chunk", [1, 13, 4096])
def test_a_stream_reports_the_parallel_losses(model, ids, chunk):
    text = ids[:101]
    bits, read = parallel(model, text), []
    report = stream(
        model, text, chunk=chunk, first_bucket=16, on_chunk=lambda n, size: read.append((n, size))
    )
    assert report.borders == (0, 16, 32, 64, 100)
    expected = [bits[a:b].mean() for a, b in zip(report.borders, report.borders[1:], strict=False)]
    np.testing.assert_allclose(report.bits_per_byte, expected, rtol=1e-4)
    assert report.mean == pytest.approx(bits.mean(), rel=1e-4)
    assert report.perplexity == pytest.approx([2**x for x in report.bits_per_byte])
    assert read[-1] == (100, report.cache_bytes)


def test_a_stream_continues_what_a_cache_has_read(model, ids):
    bits = parallel(model, ids[:151])
    cache = LongNetCache(model.config, 1)
    stream(model, ids[:71], chunk=32, cache=cache)
    assert cache.host_positions == (70,)
    report = stream(model, ids[70:151], chunk=32, first_bucket=16, cache=cache)
    assert report.borders == (70, 128, 150)
    np.testing.assert_allclose(report.bits_per_byte, [bits[70:128].mean(), bits[128:].mean()], rtol=1e-4)
    with pytest.raises(ValueError, match="one sequence"):
        stream(model, ids, cache=LongNetCache(model.config, 2))


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_windows_average_over_equal_texts(model, ids, batch_size):
    report = by_position(model, ids, window=64, windows=5, batch_size=batch_size, chunk=20, first_bucket=16)
    begins = [i * 10 // 5 * 64 for i in range(5)]
    bits = np.stack([parallel(model, ids[b : b + 65]) for b in begins])
    assert report.windows == 5
    assert report.tokens == 320
    assert report.borders == (0, 16, 32, 64)
    by_bucket = np.stack([bits[:, a:b].mean(1) for a, b in ((0, 16), (16, 32), (32, 64))])
    np.testing.assert_allclose(report.bits_per_byte, by_bucket.mean(1), rtol=1e-4)
    np.testing.assert_allclose(report.standard_error, by_bucket.std(1, ddof=1) / math.sqrt(5), rtol=1e-3)


def test_bits_are_counted_by_the_bytes_of_their_tokens(model, ids):
    lengths = np.random.default_rng(1).integers(0, 6, 260)
    bits, sizes = parallel(model, ids[:101]), lengths[ids[1:101]]
    spans = ((0, 16), (16, 32), (32, 64), (64, 100))
    report = stream(model, ids[:101], byte_lengths=lengths, chunk=13, first_bucket=16)
    np.testing.assert_allclose(
        report.bits_per_byte, [bits[a:b].sum() / sizes[a:b].sum() for a, b in spans], rtol=1e-4
    )
    np.testing.assert_allclose(report.perplexity, [2 ** bits[a:b].mean() for a, b in spans], rtol=1e-4)
    assert report.mean == pytest.approx(bits.sum() / sizes.sum(), rel=1e-4)
    assert report.loss == pytest.approx(bits.mean() * math.log(2), rel=1e-4)
    assert report.text_bytes == sizes.sum()
    windows = by_position(
        model, ids, window=64, windows=5, byte_lengths=lengths, batch_size=2, chunk=20, first_bucket=32
    )
    begins = [i * 10 // 5 * 64 for i in range(5)]
    bits = np.stack([parallel(model, ids[b : b + 65]) for b in begins])
    sizes = np.stack([lengths[ids[b + 1 : b + 65]] for b in begins])
    for i, part in enumerate((slice(32), slice(32, 64))):
        total, size = bits[:, part].sum(1), sizes[:, part].sum(1)
        assert windows.bits_per_byte[i] == pytest.approx(total.sum() / size.sum(), rel=1e-4)
        assert windows.perplexity[i] == pytest.approx(2 ** bits[:, part].mean(), rel=1e-4)
        # The oracle leaves out one window after the other.
        left = [(total.sum() - total[k]) / (size.sum() - size[k]) for k in range(5)]
        jackknife = math.sqrt(4 * np.var(left))
        assert windows.standard_error[i] == pytest.approx(jackknife, rel=0.1)


def test_as_many_windows_as_fit(model, ids):
    report = by_position(model, ids[:201], window=100, windows=50)
    assert report.windows == 2
    assert math.isnan(by_position(model, ids[:150], window=100).standard_error[0])


@pytest.mark.parametrize(
    "change",
    [{"window": 0}, {"windows": 0}, {"window": 700}, {"chunk": 0}, {"batch_size": 0}, {"first_bucket": 0}],
)
def test_impossible_windows_are_refused(model, ids, change):
    with pytest.raises(ValueError, match="expected"):
        by_position(model, ids, **{"window": 64, **change})


@pytest.mark.parametrize("text", [[5], [], [[5, 6, 7]]])
def test_a_text_without_a_prediction_is_refused(model, text):
    with pytest.raises(ValueError, match="two tokens"):
        stream(model, np.array(text))


def test_a_stream_stopped_and_continued_counts_like_one(model, ids):
    network, ids = model, ids[:301]
    whole = stream(network, ids, chunk=40, first_bucket=64)
    cache = LongNetCache(network.config, 1)
    asked = []
    first = stream(
        network,
        ids,
        chunk=40,
        first_bucket=64,
        cache=cache,
        stop=lambda: bool(asked.append(1)) or len(asked) == 3,
    )
    assert first.tokens == 120 == cache.host_positions[0]
    rest = stream(network, ids[120:], chunk=40, first_bucket=64, cache=cache)
    assert first.tokens + rest.tokens == whole.tokens
    total = sum(
        bits * (high - low)
        for report in (first, rest)
        for bits, low, high in zip(report.bits_per_byte, report.borders, report.borders[1:], strict=False)
    )
    assert total == pytest.approx(whole.mean * whole.tokens, rel=1e-5)
