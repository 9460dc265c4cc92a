"""Training: data, checkpoints, the loop, evaluation by position."""

from longnet.train.trainer import NonFiniteLoss, TrainConfig, TrainSummary, train

__all__ = ["NonFiniteLoss", "TrainConfig", "TrainSummary", "train"]
