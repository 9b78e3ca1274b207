"""Worker processes of a loader: how they start, and which signals they leave to the training process."""

import os
import signal
import tempfile
import threading
from collections.abc import Callable

from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader

from timm_mealv2.errors import UserError

_LONGEST = 107 - len('/pymp-12345678/listener-12345678')  # bytes of a socket's path, less what Python adds to TMPDIR


def check_sockets(workers: int) -> None:
    """Refuse worker processes that cannot hand over what they have loaded, and would be waited for forever.

    Raises:
        UserError: If the folder of temporary files has too long a name for the sockets in it.
    """
    folder = tempfile.gettempdir()
    if workers and len(os.fsencode(folder)) > _LONGEST:
        raise UserError(
            f'TMPDIR {folder} is too long for the sockets of worker processes: set one of at most {_LONGEST} bytes, '
            'or --workers 0.'
        )


def ignore_signals(worker: int) -> None:
    """Let a worker process leave Ctrl-C and a cluster's SIGTERM, which reach every process, to the training process.

    That one finishes its step first, and ends its workers with a SIGTERM of its own. Only Linux tells the sender of a
    signal without further ado: elsewhere a SIGTERM that is sent to all processes ends the workers.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_leave_when_told, daemon=True).start()


def _leave_when_told() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def keep_signals_from_workers(loader: PrefetchLoader | DataLoader) -> None:
    """Let the workers of a loader of timm's ignore signals, beside what timm does when they start."""
    inner = loader.loader if isinstance(loader, PrefetchLoader) else loader
    check_sockets(inner.num_workers)
    inner.worker_init_fn = _WorkerStart(inner.worker_init_fn)


class _WorkerStart:
    def __init__(self, former: Callable[[int], None] | None) -> None:
        self.former = former

    def __call__(self, worker: int) -> None:
        ignore_signals(worker)
        if self.former is not None:
            self.former(worker)
