"""The command line, and the only place that prints. The configurations are the options; docstrings are the help."""

from __future__ import annotations

import os
import signal
import sys

import tyro
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

import longnet
from longnet.cli.classify import classify
from longnet.cli.demo import demo
from longnet.cli.explain import explain
from longnet.cli.extract import extract
from longnet.cli.generate import generate
from longnet.cli.machine import bench, doctor
from longnet.cli.plan import plan
from longnet.cli.read import evaluate
from longnet.cli.recipe import expand, registry
from longnet.cli.serve import serve
from longnet.cli.train import prepare, train
from longnet.train import NonFiniteLoss

COMMANDS = {
    "prepare": prepare,
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "classify": classify,
    "extract": extract,
    "serve": serve,
    "explain": explain,
    "plan": plan,
    "doctor": doctor,
    "bench": bench,
    "demo": demo,
}


def main() -> None:
    """Entry point of the command `longnet`. User errors are one line on standard error and exit code 2."""
    disable_progress_bar()  # transformers' own, over milliseconds
    try:
        arguments = expand(sys.argv[1:])
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="longnet", description=longnet.__doc__, args=arguments, registry=registry
        )
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has left, as `head` does. What is still in the buffer must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError, NonFiniteLoss, FloatingPointError, SafetensorError) as error:
        print(f"longnet: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
