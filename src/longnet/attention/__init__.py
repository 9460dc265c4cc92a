"""Attention as functions on tensors: the public operation, its paths and its oracle."""

from longnet.attention.dilated import AttentionOutput, dilated_attention, explain

__all__ = ["AttentionOutput", "dilated_attention", "explain"]
