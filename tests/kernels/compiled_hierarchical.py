"""Run by test_hierarchical_kernels.py: compiles the gradient of a window of wide blocks for sm_90, prints its shared memory."""

import torch
import triton.runtime.jit as jit
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from longnet import HierarchicalPattern
from longnet.attention import far_work, hierarchical_gradients
from longnet.kernels import cover


class AbsentGpu:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_only(self, *args, grid, warmup, **constants):
    if self.fn.__name__ == "cover_dq":
        print(run(self, *args, grid=grid, warmup=True, **constants).metadata.shared)


driver.set_active(AbsentGpu())
run, jit.JITFunction.run = jit.JITFunction.run, compile_only
cover.row_dot = lambda a, b, minus: torch.empty(a.shape[0], a.shape[2], a.shape[1])

pattern, tokens = HierarchicalPattern(block=128, top_k=0), 4096
geometry = far_work.Geometry.of(pattern, tokens)
q = torch.zeros(1, tokens, 2, 128, dtype=torch.bfloat16)
k, nodes = q[:, :, :1].contiguous(), q[:, : sum(geometry.sizes), :1].contiguous()
entropy, bias, mix = torch.zeros(1, nodes.shape[1], 1), torch.zeros(2, geometry.levels), torch.ones(2)
lse = torch.zeros(1, 2, tokens)
tensors = (q, k, k, None, nodes, nodes, entropy, bias, mix, q, lse, None, [])
hierarchical_gradients.backward(q, None, *tensors, geometry, 0.1)
