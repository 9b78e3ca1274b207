"""Updates of several batches, of which the last is smaller: they are one batch of all images."""

from pathlib import Path

import pytest
import torch
from colors import CLASSES, STANDING, save_model, summary, train, write_folder
from forked import Forked

UPDATE = ('--model', 'test_vit', '--lr', 0.1, '--opt', 'momentum', '--clip-grad', 1e9, '--seed', 3)


def write(root: Path, per_class: tuple[int, ...]) -> Path:
    """Write two splits, with so many images of each class."""
    for split in ('train', 'validation'):
        for name, count in zip(CLASSES, per_class, strict=True):
            write_folder(root / split, count, [name])
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / 'last.pth.tar', weights_only=False)['state_dict']
    return state


def largest_difference(a: Path, b: Path) -> float:
    first, second = weights(a), weights(b)
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize('teachers', [False, True], ids=['labels', 'teachers'])
def test_an_update_of_8_and_8_and_2_images(teachers: bool, tmp_path: Path) -> None:
    data = write(tmp_path / 'data', (9, 4, 4, 1))
    options = ['--data-dir', data, *UPDATE]
    if teachers:
        options += ['--teachers', save_model(tmp_path / 't.pth'), '--discriminator-weight', 1, '--hard-label-weight', 1]
    whole = train(tmp_path / 'whole', *options, '--batch-size', 18)[0]
    parts = train(tmp_path / 'parts', *options, '--batch-size', 8, '--grad-accum-steps', 3)[0]
    assert float(parts['train_loss']) == pytest.approx(float(whole['train_loss']), abs=1e-5)
    assert largest_difference(tmp_path / 'whole', tmp_path / 'parts') < 1e-5


def test_two_processes_with_8_and_8_and_2_images_each(tmp_path: Path, program: Forked) -> None:
    data = write(tmp_path / 'data', (18, 9, 8, 1))
    options = ('--data-dir', data, *UPDATE)
    train(tmp_path / 'whole', *options, '--batch-size', 36)
    parts = ('--batch-size', 8, '--grad-accum-steps', 3, '--experiment', 'parts')
    program.run(tmp_path, *STANDING, *options, *parts, processes=2)
    assert len(summary(tmp_path / 'parts')) == 1
    assert largest_difference(tmp_path / 'whole', tmp_path / 'parts') < 1e-5
