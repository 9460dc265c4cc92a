"""torchscale and Prov-GigaPath from checkouts, imported and never retyped. Their installers and flash-attn are not needed.

Where the checkouts lie (torchscale, prov-gigapath, einops) is said by TORCHSCALE_PATH, a list like PATH.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from types import ModuleType
from typing import Any

import torch

from peers import _plain, _torch_flash


def _stub(name: str, **members: Any) -> None:
    """A module of a package that is not installed, of which only names are needed."""
    try:
        __import__(name)
    except ImportError:
        module = ModuleType(name)
        module.__dict__.update(members)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def _prepare() -> None:
    for path in reversed(os.environ["TORCHSCALE_PATH"].split(os.pathsep)):
        if path not in sys.path:
            sys.path.insert(0, path)
    # Sharding, registries and stochastic depth: none of them takes part in a forward pass in evaluation mode.
    _stub("fairscale")
    _stub("fairscale.nn", checkpoint_wrapper=lambda layer: layer, wrap=lambda layer: layer)
    _stub("timm")
    _stub("timm.models")
    _stub("timm.models.layers", drop_path=lambda x, rate, training: x)
    _stub("timm.models.registry", register_model=lambda function: function)


def _use_flash(package: str, device: str) -> None:
    module = __import__(f"{package}.component.multihead_attention", fromlist=["flash_attn_func"])
    module.flash_attn_func = _torch_flash if device == "cuda" else _plain


_SIDED = ("embed_dim", "attention_heads", "ffn_embed_dim", "layers", "normalize_before")


def longnet(causal: bool, device: str = "cpu", **options: Any) -> Any:
    """torchscale's LongNetDecoder or LongNetEncoder; options are those of its configuration, less the side's prefix."""
    _prepare()
    from torchscale.architecture.config import DecoderConfig, EncoderConfig
    from torchscale.model.LongNet import LongNetDecoder, LongNetEncoder

    _use_flash("torchscale", device)
    extra = {k: options.pop(k) for k in ("embed_tokens", "embed_positions") if k in options}
    named = {f"{'decoder' if causal else 'encoder'}_{k}" if k in _SIDED else k: v for k, v in options.items()}
    # Its configuration evaluates strings and takes nothing else.
    named |= {k: str(list(named[k])) for k in ("segment_length", "dilated_ratio")}
    config = (DecoderConfig if causal else EncoderConfig)(flash_attention=True, **named)
    return (LongNetDecoder if causal else LongNetEncoder)(config, **extra).to(device).eval()


def gigapath(device: str = "cpu", **options: Any) -> Any:
    """Prov-GigaPath's LongNetViT with random weights, over torchscale's components."""
    _prepare()
    import numpy
    import torchscale.architecture.config
    import torchscale.model

    import gigapath

    # It evaluates the printed form of a list of numpy integers, which names numpy since version 2.
    torchscale.architecture.config.np = numpy

    # The sizes by name are the one module of its copy of torchscale that the original lacks.
    own = os.path.join(gigapath.__path__[0], "torchscale", "model")
    if own not in torchscale.model.__path__:
        torchscale.model.__path__.append(own)
    from gigapath import slide_encoder

    _use_flash("torchscale", device)
    # As its registered sizes set it.
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    return slide_encoder.LongNetViT(norm_layer=norm, **options).to(device).eval()
