"""What every worker process of a loader does at its start."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def ignore_signals(worker: int) -> None:
    """Let a worker process leave Ctrl-C and a cluster's SIGTERM, which reach every process, to the main process.

    SIGTERM cannot just be ignored: multiprocessing ends workers with one at exit, and waits for them. Where the sender
    of a signal is not told (macOS), any SIGTERM ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_leave_when_told, daemon=True).start()


def _leave_when_told() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@contextmanager
def starting_workers() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait while worker processes start, until the workers run `ignore_signals`.

    Workers inherit the mask, so that a signal to the process group does not end one that is just starting.
    """
    if not hasattr(signal, 'sigwaitinfo'):
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def seed_of_worker(info: Any) -> int:
    """A `worker_seeding` of timm's loader: the seed that torch has given the worker."""
    ignore_signals(info.id)
    return int(info.seed)
