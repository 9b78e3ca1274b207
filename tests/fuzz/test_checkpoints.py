"""Checkpoints from elsewhere, as each program meets them."""

import argparse
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from outcomes import SMALL, altered, damaged, is_accepted

from timm_mealv2.cli import evaluate, hub, report
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.training.checkpoint_saver import read_checkpoint
from timm_mealv2.training.run import main

USES = ('resume', 'auto', 'initial', 'teacher', 'export', 'report')


def use(how: str, path: Path, run_folder: Path, images: Path, teacher: str) -> bool:
    """Give a checkpoint to a program, in a folder of its own; return whether it is accepted."""
    output = path.parent / 'output'
    shutil.rmtree(output, ignore_errors=True)
    run = Path(shutil.copytree(run_folder, output / 'run'))
    training = [*SMALL, '--data-dir', images, '--teachers', teacher, '--output', output, '--experiment']
    if how == 'teacher':
        return is_accepted(
            evaluate.main, [f'test_resnet={path}', '--data-dir', images, '--workers', 0, '--device', 'cpu']
        )
    if how == 'export':
        return is_accepted(hub.main, ['export', path, '--out', output / 'export'])
    if how == 'initial':
        return is_accepted(main, [*training, 'new', '--initial-checkpoint', path])
    if how == 'resume':
        return is_accepted(main, [*training, 'new', '--resume', path, '--epochs', 2])
    shutil.copy(path, run / 'last.pth.tar')
    if how == 'auto':
        return is_accepted(main, [*training, 'run', '--resume', 'auto', '--epochs', 2])
    return is_accepted(report.main, [run])


@settings(max_examples=20)
@given(st.sampled_from(USES), st.randoms())
def test_a_checkpoint_with_any_entries_is_used_or_refused_in_one_line(
    run_folder: Path, few_images: Path, teacher: str, tmp_path: Path, how: str, random: Random
) -> None:
    contents: dict[str, Any] = read_checkpoint(run_folder / 'last.pth.tar')
    contents = altered(random, {**contents, 'args': vars(contents['args'])})
    if isinstance(contents.get('args'), dict) and random.randrange(2):
        contents['args'] = argparse.Namespace(**{str(name): value for name, value in contents['args'].items()})
    path = tmp_path / 'altered.pth.tar'
    torch.save(contents, path)
    use(how, path, run_folder, few_images, teacher)


@settings(max_examples=60)
@given(st.randoms())
def test_a_damaged_checkpoint_is_refused_unless_all_that_it_holds_is_the_same(
    run_folder: Path, tmp_path: Path, random: Random
) -> None:
    whole = run_folder / 'last.pth.tar'
    path = tmp_path / 'damaged.pth.tar'
    path.write_bytes(damaged(random, whole.read_bytes()))
    found: list[TrainingCheckpoint] = []
    if is_accepted(lambda argv: found.append(TrainingCheckpoint.read(path)), []):
        assert_same(found[0].contents, TrainingCheckpoint.read(whole).contents)


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, argparse.Namespace):
        a, b = vars(a), vars(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key, value in a.items():
            assert_same(value, b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b
