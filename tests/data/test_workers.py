"""Worker processes leave signals to the training process, and have a place for their sockets."""

import os
import signal
from typing import Any

import pytest
import torch

from timm_mealv2.data.workers import check_sockets, ignore_signals
from timm_mealv2.errors import UserError


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


def test_a_folder_of_temporary_files_with_a_long_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = '/' + 74 * 'x'
    monkeypatch.setattr('tempfile.tempdir', longest)
    check_sockets(1)
    monkeypatch.setattr('tempfile.tempdir', f'{longest}x')
    check_sockets(0)
    with pytest.raises(UserError, match=r'TMPDIR .*x is too long for the sockets of worker processes'):
        check_sockets(1)
