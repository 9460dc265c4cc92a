"""Start the ranks of a small job as processes that share one import of torch, and collect what they return."""

import json
import multiprocessing
import os
import socket
import time
import traceback
from datetime import timedelta
from pathlib import Path

TIMEOUT = timedelta(seconds=30)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _child(function, rank, environment, folder, args):
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    try:
        answer = {"result": function(*args)}
    except BaseException as error:
        answer = {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(answer))
    os._exit("error" in answer)


def run(function, world, folder, *args, limit=60.0):
    """`function(*args)` on every rank -> per rank {"result"} or {"error", "message", "trace"}; {"killed"} for one that died.

    A rank that still runs after `limit` seconds is killed and reports {"hung"}; "seconds" is when it ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "longnet.train.trainer", "longnet.attention.sequence_parallel"])
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    children = []
    for rank in range(world):
        (folder / f"rank{rank}.json").unlink(missing_ok=True)
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        child = context.Process(target=_child, args=(function, rank, environment, str(folder), args))
        child.start()
        children.append(child)
    started, ended = time.monotonic(), {}
    while len(ended) < world and time.monotonic() - started < limit:
        ended |= {
            i: time.monotonic() - started
            for i, c in enumerate(children)
            if i not in ended and c.exitcode is not None
        }
        time.sleep(0.02)
    answers = []
    for rank, child in enumerate(children):
        file = folder / f"rank{rank}.json"
        if rank not in ended:
            child.kill()
            answer = {"hung": True}
        else:
            answer = json.loads(file.read_text()) if file.exists() else {"killed": child.exitcode}
        child.join()
        answers.append({**answer, "seconds": ended.get(rank, limit), "code": child.exitcode})
    return answers


def results(answers):
    """The results of all ranks, none of which failed."""
    for rank, answer in enumerate(answers):
        assert "result" in answer, f"rank {rank}: {answer.get('trace', answer)}"
    return [answer["result"] for answer in answers]


def join():
    """(rank, ranks) in a gloo job whose new tensors are NaN until they are written."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=TIMEOUT)
    dist.barrier()  # a rank that ended while another still connects would take the store with it
    original = torch.empty

    def empty(*args, **kwargs):
        tensor = original(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    torch.empty = empty
    return dist.get_rank(), dist.get_world_size()


def dealt(function, arguments):
    """[function(*a) for a in arguments] on every rank, each computed by one of them."""
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    parts = [None] * world
    dist.all_gather_object(parts, [function(*a) for a in arguments[rank::world]])
    return [parts[i % world][i // world] for i in range(len(arguments))]


def refusals(*calls):
    """What a rank is told by calls of which each must raise ValueError; all ranks wait for each other after the last."""
    import pytest
    import torch.distributed as dist

    messages = []
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        messages.append(str(error.value))
    dist.barrier()
    return messages
