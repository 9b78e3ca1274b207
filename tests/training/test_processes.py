"""Several processes: a group that loses one comes back by itself, and two hosts train together."""

import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from forked import Forked
from quick_training import differences
from torch.distributed import TCPStore
from torch.distributed.rendezvous import rendezvous

from timm_mealv2.training.distributed import ATTEMPT

OPTIONS = (
    '--model test_resnet --num-classes 3 --img-size 16 --batch-size 3 --workers 0 --epochs 3 --lr 0.02 --device cpu '
    '--warmup-epochs 0 --log-interval 100 --no-preflight --model-ema --mixup 0.2 --drop 0.1 --recovery-interval 1 '
    '--experiment run --teacher-optimize off'
).split()
# Run by each process before the program: one gets a signal in its 6th step.
STRUCK = """
import os, signal
from timm_mealv2.training import loop

step, count = loop.Stepper.step, 0

def counted(*args, **kwargs):
    global count
    count += 1
    if count == 6 and {}:
        os.kill(os.getpid(), signal.{})
    return step(*args, **kwargs)

loop.Stepper.step = counted
"""


# Run by each process before the program: it moves to a host of its own.
MOVED = """
import ctypes, os

hosts, links = {}, {}
with open(f'/run/netns/{{hosts[rank]}}') as host:
    assert ctypes.CDLL(None).setns(host.fileno(), 0x40000000) == 0  # CLONE_NEWNET
os.environ.update(GLOO_SOCKET_IFNAME=links[rank], MASTER_ADDR='10.77.0.1', MASTER_PORT='29500', LOCAL_RANK='0')
"""


@pytest.fixture(scope='module')
def options(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    torch.manual_seed(0)
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), path)
    return [*OPTIONS, '--data-dir', str(image_folder), '--teachers', f'test_resnet={path}']


@pytest.fixture(scope='module')
def whole(program: Forked, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two processes on one host, of which none dies."""
    output = tmp_path_factory.mktemp('whole')
    program.run(output, *options, processes=2)
    return output / 'run'


def test_a_group_that_loses_a_process_restarts_from_its_newest_checkpoint(
    program: Forked, options: list[str], whole: Path, tmp_path: Path
) -> None:
    once = "os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'"
    code = STRUCK.format(once, 'SIGKILL')
    text = program.run(tmp_path, *options, processes=2, code=code, restarts=1).text
    assert 'The process group was restarted' in text
    assert f'Continuing from {tmp_path / "run" / "recovery-1-"}' in text.replace('.pth.tar', '')
    assert differences(whole, tmp_path / 'run') == []


def test_an_optimizer_that_ddp_cannot_train_with_is_refused(
    program: Forked, options: list[str], tmp_path: Path
) -> None:
    job = program.start(tmp_path, *options, '--opt', 'adahessian', processes=2)
    assert job.finish() == 2
    assert 'error: --opt adahessian takes second derivatives' in job.text
    assert not (tmp_path / 'run').exists()


@pytest.mark.skipif(not hasattr(torch.distributed, 'set_timeout'), reason='torch.distributed.set_timeout is missing')
def test_a_process_that_hangs_ends_the_run_in_time(program: Forked, options: list[str], tmp_path: Path) -> None:
    struck = STRUCK.format('rank == 1', 'SIGSTOP')
    job = program.start(tmp_path, *options, '--process-timeout', 0.1, processes=2, code=struck)  # 6 s
    job.wait_for('timeout', 'imed out')
    os.kill(job.pids[-1], signal.SIGKILL)  # as a launcher does with the one that hangs
    assert job.finish() == 1
    assert (tmp_path / 'run' / 'last.pth.tar').is_file()


def ip(*args: str) -> None:
    subprocess.run(['ip', *args], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two network namespaces that only see each other: 10.77.0.1 and 10.77.0.2."""
    if shutil.which('ip') is None or os.geteuid() != 0:
        pytest.skip('network namespaces need `ip` and root')
    mark = uuid.uuid4().hex[:6]
    names = [f'mv2-{mark}-{i}' for i in range(2)]
    links = [f'mv{mark}{i}' for i in range(2)]
    try:
        try:
            for name in names:
                ip('netns', 'add', name)
            ip('link', 'add', links[0], 'netns', names[0], 'type', 'veth', 'peer', 'name', links[1], 'netns', names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f'no network namespaces here: {error.stderr.decode().strip()}')
        for i, (name, link) in enumerate(zip(names, links, strict=True), 1):
            ip('-n', name, 'address', 'add', f'10.77.0.{i}/24', 'dev', link)
            ip('-n', name, 'link', 'set', link, 'up')
            ip('-n', name, 'link', 'set', 'lo', 'up')
        yield names
    finally:
        for name in names:
            subprocess.run(['ip', 'netns', 'del', name], capture_output=True)


def test_two_hosts_train_as_two_processes_on_one(
    program: Forked, options: list[str], whole: Path, tmp_path: Path, hosts: list[str]
) -> None:
    links = []
    for name in hosts:
        link = subprocess.run(
            ['ip', '-n', name, '-brief', 'link', 'show', 'type', 'veth'], capture_output=True, text=True, check=True
        ).stdout.split('@')[0]
        links.append(link)
    program.run(tmp_path, *options, processes=2, code=MOVED.format(hosts, links))
    assert differences(whole, tmp_path / 'run') == []


def test_a_restarted_group_does_not_read_what_the_former_one_left_in_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    server = TCPStore('localhost', 0, is_master=True, wait_for_workers=False)
    for name, value in {'MASTER_ADDR': 'localhost', 'MASTER_PORT': server.port, 'RANK': 0, 'WORLD_SIZE': 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv('TORCHELASTIC_USE_AGENT_STORE', 'True')
    stores = []
    for attempt in range(2):
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', str(attempt))
        store, rank, world_size = next(rendezvous(f'{ATTEMPT}://'))
        assert (rank, world_size) == (0, 1)
        stores.append(store)
    stores[0].set('address', 'of a process that died')
    assert stores[0].check(['address'])
    assert not stores[1].check(['address'])
