"""Draws: the distribution, its noise, and what top_p leaves of it."""

import pytest
import torch

from longnet.serve.sampling import gumbel, sample


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    count = 40000
    steps = torch.arange(count)
    ids = sample(
        logits.expand(count, 4),
        torch.full((count,), temperature),
        torch.ones(count),
        torch.full((count,), 11),
        steps,
    )
    frequency = torch.bincount(ids, minlength=4) / count
    assert (frequency - (logits / temperature).softmax(-1)).abs().max() < 4 * 0.5 / count**0.5


def test_noise_is_gumbel_and_uncorrelated():
    noise = gumbel(torch.arange(200), torch.zeros(200, dtype=torch.int64), 500)
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.57722) < 0.02  # Euler's constant
    assert abs(noise.var() - torch.pi**2 / 6) < 0.05
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.25
    assert torch.corrcoef(noise[:, :100].T).fill_diagonal_(0).abs().max() < 0.4
    assert torch.equal(
        gumbel(torch.tensor([5]), torch.tensor([3]), 9),
        gumbel(torch.tensor([4, 5]), torch.tensor([3, 3]), 9)[1:],
    )


def test_top_p_keeps_the_fewest_that_hold_the_mass():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(2000, 4)
    ones, seeds = torch.ones(2000), torch.arange(2000)
    for top_p, kept in ((0.4, {0}), (0.6, {0, 1}), (0.85, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        assert set(sample(logits, ones, top_p * ones, seeds, seeds).tolist()) == kept
    assert torch.equal(sample(logits, ones, ones, seeds, seeds), sample(logits, ones, None, seeds, seeds))
