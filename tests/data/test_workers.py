"""Worker processes leave signals to the training process, also where a signal does not tell its sender."""

import os
import signal
from typing import Any

import pytest
import torch

from timm_mealv2.data.workers import ignore_signals


def _start(known: bool, found: Any) -> None:
    if not known:  # as on macOS and Windows
        del signal.sigwaitinfo
    ignore_signals(0)
    os.kill(os.getpid(), signal.SIGINT)
    found.put('goes on')
    signal.pause()


@pytest.mark.skipif(not hasattr(signal, 'sigwaitinfo'), reason='needs a system that has what is taken away')
@pytest.mark.parametrize('known', [True, False])
def test_a_worker_ignores_ctrl_c_and_leaves_when_its_parent_says_so(known: bool) -> None:
    context = torch.multiprocessing.get_context('fork')
    found: Any = context.Queue()
    process: Any = context.Process(target=_start, args=(known, found))
    process.start()
    assert found.get(timeout=20) == 'goes on'
    process.terminate()
    process.join(timeout=20)
    assert process.exitcode == (0 if known else -signal.SIGTERM)
