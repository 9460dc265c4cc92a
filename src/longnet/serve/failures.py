"""What went wrong with a job, as far as its client may know."""

from __future__ import annotations

import logging

import torch

from longnet.serve.jobs import Failed

log = logging.getLogger("longnet.serve")

DEAD = Failed(503, "engine_dead", "the model has failed; the server is going down")
BROKEN = Failed(500, "numerical_error", "the model gave no finite probabilities for this request")


def judge(error: Exception) -> Failed:
    """What to tell the client of a job. Raises the error where the device can do no more."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("out of memory")
        return Failed(503, "out_of_memory", "not enough memory for this request now")
    if isinstance(error, torch.AcceleratorError):
        raise error
    log.error("a request has failed", exc_info=error)
    return Failed(500, "internal_error", "the model failed on this request")
