"""Vectors read by number: what an ordinary gather gives, with one gradient for all readers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longnet import HierarchicalPattern, hierarchical_attention
from longnet.attention.vectors import Vectors


def gathered(x, index):
    batch, _, key_heads = x.shape[:3]
    return x[torch.arange(batch).view(-1, 1, 1, 1, 1), index, torch.arange(key_heads).view(-1, 1)]


@pytest.mark.parametrize(("batch", "key_heads"), [(1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("scalars", [False, True])
def test_reads_and_gradients_are_those_of_a_gather(batch, key_heads, scalars):
    g = torch.Generator().manual_seed(0)
    shape = (batch, 7, key_heads) if scalars else (batch, 7, key_heads, 4)
    x = torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
    indices = [torch.randint(0, 7, (batch, 2, 3, key_heads, c), generator=g) for c in (5, 2)]
    vectors = Vectors(x)
    found, wanted = [vectors[i] for i in indices], [gathered(x, i) for i in indices]
    given = [torch.randn(y.shape, generator=g, dtype=torch.float64) for y in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    want = torch.autograd.grad(wanted, x, given)[0]
    # Twice: the sums begin anew.
    for _ in "12":
        torch.testing.assert_close(torch.autograd.grad(found, x, given, retain_graph=True)[0], want)


def test_tokens_that_all_key_heads_share():
    x = torch.randn(2, 7, 3, 4, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 6, 2], [1, 1, 5]])
    found = Vectors(x).shared(index)
    assert torch.equal(found, x[:, index])
    given = torch.randn_like(found)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, given)[0] for y in (found, x[:, index])))


def test_what_nobody_reads_has_no_gradient_and_other_uses_add_theirs():
    x = torch.randn(1, 5, 1, 4, requires_grad=True)
    vectors = Vectors(x)
    assert torch.autograd.grad(x.sum(), x)[0].eq(1).all()
    read = vectors[torch.tensor([2, 2]).view(1, 1, 1, 1, 2)]
    gradient = torch.autograd.grad(read.sum() + vectors.x.sum(), x)[0]
    assert gradient[0, :, 0, 0].tolist() == [1, 1, 3, 1, 1]


def test_gradients_in_16_bits_are_summed_in_32():
    x = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    vectors, index = Vectors(x), torch.zeros(1, 1, 1, 1, 1, dtype=torch.int64)
    total = sum(vectors[index].float().sum() for _ in range(1000))
    # In bfloat16 the sum would stop at 256.
    assert torch.autograd.grad(total, x)[0].item() == 1000


def test_without_gradients_nothing_is_kept():
    assert Vectors(torch.zeros(1, 2, 1, 4)).sums is None
    with torch.no_grad():
        assert Vectors(torch.zeros(1, 2, 1, 4, requires_grad=True)).sums is None


class LongTensors(TorchDispatchMode):
    """Counts new tensors of at least `size` elements that an operation fills."""

    def __init__(self, size):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        name = operation._schema.name.split("::")[1]
        made = name in (
            "zeros",
            "new_zeros",
            "zeros_like",
            "full",
            "index_put",
            "slice_backward",
            "embedding_dense_backward",
        )
        self.count += made and out.numel() >= self.size
        return out


@pytest.mark.parametrize("causal", [True, False])
def test_the_cost_of_gradients_is_linear(causal):
    """Groups of queries make no gradients as long as the text."""
    pattern, counts = HierarchicalPattern(block=16, radix=4, window_blocks=2, top_k=1, beam=2), []
    for tokens in (1024, 4096):
        inputs = [torch.randn(1, tokens, heads, 8, requires_grad=True) for heads in (2, 1, 1)]
        with LongTensors(tokens * 8) as made:
            hierarchical_attention(*inputs, pattern, causal=causal, impl="torch").out.sum().backward()
        counts.append(made.count)
    assert counts[0] == counts[1] > 0
