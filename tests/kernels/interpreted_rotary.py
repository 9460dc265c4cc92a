"""Run by test_rotary_kernels.py in a process of its own: Triton decides at import whether it interprets."""

import torch
import torch.nn.functional as F

from longnet.attention.rotary import turn_by_torch
from longnet.kernels.rotary import norm_rotary_, turned

torch.manual_seed(0)
# batch, tokens, heads, width, angles of every sequence
for batch, tokens, heads, width, own in (
    (1, 1, 1, 16, False),
    (2, 37, 3, 24, True),
    (3, 5, 12, 40, False),
    (1, 9, 70, 2, False),
):
    angles = torch.randn(batch if own else 1, tokens, 1, width // 2)
    rotary = angles.cos(), angles.sin()
    # The first heads of wider rows, as a projection leaves them.
    x = torch.randn(batch, tokens, heads + 2, width)[:, :, :heads]
    for dtype in (torch.float32, torch.float16):
        given = x.to(dtype)
        torch.testing.assert_close(
            turned(given, *rotary, torch.float32), turn_by_torch(given, rotary, torch.float32)
        )
        assert turned(given, *rotary, dtype).dtype == dtype
    back = turned(turned(x, *rotary, torch.float32), *rotary, torch.float32, back=True)
    torch.testing.assert_close(back, x)
    mixed = rotary[0][:1], rotary[1].expand(batch, -1, -1, -1)
    torch.testing.assert_close(turned(x, *mixed, torch.float32), turn_by_torch(x, mixed, torch.float32))
    onto = torch.randn(x.shape)
    wanted = onto + turn_by_torch(x, rotary, torch.float32)
    assert turned(x, *rotary, torch.float32, onto=onto) is onto
    torch.testing.assert_close(onto, wanted)
    qkv, keys = torch.randn(batch, tokens, heads + 2, width), 1
    weights = torch.randn(2, width)
    normed = [
        F.rms_norm(part, (width,), w, 1e-6)
        for part, w in zip(qkv.split((heads, 1, 1), 2), weights, strict=False)
    ]
    wanted = torch.cat([turn_by_torch(part, rotary, torch.float32) for part in normed] + [qkv[:, :, -1:]], 2)
    norm_rotary_(qkv, heads, keys, *weights, 1e-6, *rotary)
    torch.testing.assert_close(qkv, wanted)
