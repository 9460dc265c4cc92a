"""Prov-GigaPath's slide encoder: positions against an explicit table, and the published code where it is checked out."""

import math
import os

import pytest
import torch

from longnet.integrations.gigapath import (
    GigaPathSlideEncoder,
    gigapath_segment_lengths,
    load_gigapath,
    sine_cosine,
)
from longnet.integrations.torchscale import TorchscaleConfig

GRID = 40


def make(global_pool=False, width=32, depth=2):
    lengths = gigapath_segment_lengths(16384)
    config = TorchscaleConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=16,
        segment_lengths=lengths,
        dilation_rates=(1, 2, 4, 8, 16),
        causal=False,
    )
    torch.manual_seed(0)
    return GigaPathSlideEncoder(config, 12, GRID, 256, global_pool).eval()


def slide(n, channels=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randn(1, n, channels, generator=generator)
    places = torch.randperm(GRID * GRID, generator=generator)[:n]
    coords = torch.stack((places // GRID, places % GRID), 1) * 256 + 17
    return tiles, coords[None].float()


def test_segment_lengths_of_the_published_model():
    assert gigapath_segment_lengths() == (1024, 5792, 32768, 185363, 1048576)
    assert gigapath_segment_lengths(250000) == (1024, 4870, 23170, 110217, 524288)


def test_positions_equal_the_formula_of_the_table():
    model, (_, coords) = make(), slide(50)
    actual = model.positions(coords)[0]
    for (x, y), row in zip((coords[0] // 256).tolist(), actual, strict=True):
        # Half the width for y, half for x; in each first sines, then cosines.
        expected = []
        for place in (y, x):
            angles = [place / 10000 ** (i / 8) for i in range(8)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64).float())


def test_the_table_is_small():
    assert sine_cosine(1000, 384).nbytes < 2_000_000
    assert not any("pos" in name or "axis" in name for name in make().state_dict())


@pytest.mark.parametrize("global_pool", [False, True])
def test_a_slide_is_what_it_is_alone(global_pool):
    model, sizes = make(global_pool), [60, 1, 43]
    slides = [slide(n, seed=n) for n in sizes]
    tiles, coords = torch.full((3, 60, 12), 1e3), torch.full((3, 60, 2), -1.0)
    for b, (x, places) in enumerate(slides):
        tiles[b, : sizes[b]], coords[b, : sizes[b]] = x[0], places[0]
    batched = model(tiles, coords, torch.tensor(sizes), all_layer_embed=True)
    assert len(batched) == 3
    for b, (x, places) in enumerate(slides):
        for together, alone in zip(batched, model(x, places, all_layer_embed=True), strict=True):
            torch.testing.assert_close(together[b], alone[0], atol=1e-5, rtol=1e-5)
        together = model(tiles, coords, torch.tensor(sizes))[b]
        torch.testing.assert_close(together, model(x, places)[0], atol=1e-5, rtol=1e-5)


def test_loads_a_file_and_refuses_what_does_not_fit(tmp_path):
    model = make()
    state = {**model.state_dict(), "pos_embed": torch.zeros(1, 901, 32)}
    torch.save({"model": state}, tmp_path / "slide_encoder.pth")
    options = {"max_wsi_size": 16384, "slide_ngrids": GRID}
    loaded = load_gigapath(tmp_path / "slide_encoder.pth", **options)
    assert torch.equal(loaded(*slide(40)), model(*slide(40)))
    with pytest.warns(UserWarning, match=r"decoder\.weight"):
        load_gigapath({**state, "decoder.weight": torch.zeros(1)}, **options)
    with pytest.raises(ValueError, match="cls_token"):
        load_gigapath({k: v for k, v in state.items() if k != "cls_token"}, **options)
    with pytest.raises(ValueError, match="GigaPath's names"):
        load_gigapath({"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="grid"):
        model(*[x if x.shape[-1] == 12 else x + 256 * GRID for x in slide(5)])
    with pytest.raises(ValueError, match="lengths"):
        model(*slide(5), torch.tensor([6]))
    with pytest.raises(ValueError, match="coords"):
        model(slide(5)[0], slide(6)[1])


@pytest.mark.parametrize("global_pool", [False, True])
@pytest.mark.parametrize("n", [1, 1500])
def test_equals_the_published_code(n, global_pool):
    if "TORCHSCALE_PATH" not in os.environ:
        pytest.skip("TORCHSCALE_PATH is not set: no checkout of prov-gigapath and torchscale to compare with")
    import torchscale_peer

    # A small slide: segments of 1024, 1448, 2048, 2896 and 4096 tiles.
    theirs = torchscale_peer.gigapath(
        in_chans=12, embed_dim=384, depth=3, slide_ngrids=GRID, max_wsi_size=16384, global_pool=global_pool
    )
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
        ours = load_gigapath(
            theirs.state_dict(), max_wsi_size=16384, slide_ngrids=GRID, global_pool=global_pool
        )
        assert ours.encoder.config.segment_lengths == tuple(theirs.encoder.args.segment_length)
        tiles, coords = slide(n)
        torch.testing.assert_close(ours(tiles, coords), theirs(tiles, coords)[0], atol=2e-5, rtol=2e-5)
        pairs = zip(
            ours(tiles, coords, all_layer_embed=True),
            theirs(tiles, coords, all_layer_embed=True),
            strict=True,
        )
        for mine, other in pairs:
            torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5)
