"""Claims: one process makes a part, unless it has died."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from timm_mealv2.data.samples import Samples
from timm_mealv2.soft_labels import claims
from timm_mealv2.soft_labels.claims import STALE, PartQueue
from timm_mealv2.soft_labels.meta import StoreMeta


@pytest.fixture
def queue(settings: StoreMeta, train: Dataset, tmp_path: Path) -> PartQueue:
    """An empty store of two epochs: five parts of five images and one of one."""
    meta = settings.extend(2, 10)
    meta.write(tmp_path)
    return PartQueue(tmp_path, meta, Samples(train, settings.augmentation, 42), set())


def parts_of(queue: PartQueue) -> list[str]:
    return list(dict.fromkeys(queue.part_of(batch[0]).file for batch in queue))


def test_a_part_is_claimed_once_and_its_samples_come_image_by_image(queue: PartQueue) -> None:
    batches = iter(queue)
    first = next(batches)
    assert [(key.epoch, key.index) for key in first] == [(epoch, image) for image in range(5) for epoch in range(2)]
    claim = queue.out / 'claim-00000-00000'
    claim.write_text(claim.read_text().replace(str(os.getpid()), str(os.getppid())))
    other = PartQueue(queue.out, queue.meta, queue.samples, set())  # of another process
    assert parts_of(other) == [f'part-00000-{number:05}' for number in range(1, 5)]
    queue.release(queue.part_of(first[0]))
    assert not claim.exists()


def test_a_part_that_another_process_has_just_made_is_left_alone(queue: PartQueue) -> None:
    part = queue.missing()[1]
    batches = iter(queue)
    next(batches)
    (queue.out / part.file).write_bytes(bytes(queue.meta.part_bytes(part)))
    assert len(list(batches)) == 3
    assert not (queue.out / 'claim-00000-00001').exists()


def test_batches_are_as_large_as_the_settings_say(queue: PartQueue, settings: StoreMeta) -> None:
    queue.meta = StoreMeta(**{**vars(settings), 'batch_size': 5, 'blocks': [0, 2]})
    assert [len(batch) for batch in queue][:4] == [4, 4, 2, 4]
    for part in list(queue.claims.values()):
        queue.release(part)
    queue.meta = StoreMeta(**{**vars(settings), 'batch_size': 1, 'blocks': [0, 2]})
    assert {len(batch) for batch in queue} == {1}


def dead_process() -> int:
    process = subprocess.Popen(['true'])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ('host', 'pid', 'age', 'taken'),
    [
        ('here', 'dead', 0, True),
        ('here', 'own', 0, True),
        ('here', 'parent', 0, False),
        ('here', 'parent', STALE + 5, True),
        ('elsewhere', 'dead', 0, False),
        ('elsewhere', 'dead', STALE + 5, True),
    ],
)
def test_the_claim_of_a_dead_process_is_taken_over(
    queue: PartQueue, host: str, pid: str, age: float, taken: bool
) -> None:
    number = {'dead': dead_process, 'own': os.getpid, 'parent': os.getppid}[pid]()
    claim = queue.out / 'claim-00000-00003'
    claim.write_text(json.dumps({'host': socket.gethostname() if host == 'here' else host, 'pid': number, 'time': 0}))
    os.utime(claim, (time.time() - age,) * 2)
    assert ('part-00000-00003' in parts_of(queue)) == taken


def test_a_claim_that_was_not_written_to_its_end_is_taken_over_later(queue: PartQueue) -> None:
    claim = queue.out / 'claim-00000-00000'
    claim.touch()
    assert 'part-00000-00000' not in parts_of(queue)
    os.utime(claim, (time.time() - 60,) * 2)
    assert parts_of(queue) == ['part-00000-00000']


def test_claims_are_renewed(queue: PartQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    next(iter(queue))
    claim = queue.out / 'claim-00000-00000'
    os.utime(claim, (0, 0))
    queue.renew()
    assert claim.stat().st_mtime == 0  # not due yet
    monkeypatch.setattr(claims, 'HEARTBEAT', -1)
    queue.renew()
    assert claim.stat().st_mtime > time.time() - 60
    claim.unlink()  # taken over
    queue.renew()
    assert not claim.exists()
