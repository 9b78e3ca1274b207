"""A teacher with more classes than the student, in a run of the training program."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from timm_mealv2.errors import UserError
from timm_mealv2.training.run import main

SMALL = (
    '--model test_resnet --num-classes 3 --img-size 16 --batch-size 4 --workers 0 --lr 0.05 --epochs 1 '
    '--warmup-epochs 0 --device cpu --color-jitter 0 --smoothing 0'
).split()


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    """A checkpoint of five classes whose answer is fixed: its logits are 0, 1, 2, 3 and 4."""
    model = timm.create_model('test_resnet', num_classes=5)
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.arange(5.0))
    torch.save(model.state_dict(), tmp_path / 'five.pth')
    return f'test_resnet={tmp_path / "five.pth"}'


def run(image_folder: Path, tmp_path: Path, *args: str) -> Path:
    main([*SMALL, '--data-dir', str(image_folder), '--output', str(tmp_path), '--experiment', 'run', *args])
    return tmp_path / 'run'


def test_the_student_learns_the_renormalized_classes(image_folder: Path, tmp_path: Path, teacher: str) -> None:
    (tmp_path / 'classes.txt').write_text('# of the five\n4  # cold\n\n0\n2\n')
    option = ('--teacher-classes', f'{teacher}={tmp_path / "classes.txt"}')
    # The discriminator off, no augmentation and many steps: the student ends at the teacher's one answer.
    more = ('--no-aug', '--discriminator-weight', '0', '--epochs', '25', '--weight-decay', '0', '--sched', 'none')
    folder = run(image_folder, tmp_path, '--teachers', teacher, *option, *more)
    student = timm.create_model('test_resnet', num_classes=3, checkpoint_path=str(folder / 'last.pth.tar')).eval()
    with torch.no_grad():
        answer = student(torch.zeros(1, 3, 16, 16)).softmax(dim=1)[0].numpy()
    expected = np.exp([4.0, 0.0, 2.0])
    np.testing.assert_allclose(answer, expected / expected.sum(), atol=0.1)


@pytest.mark.parametrize(
    ('lines', 'message'),
    [
        ('0\nx\n', "a class index a line: .*'x'"),
        ('0\n1\n5\n', r'3 different classes from 0 to 4, got 3: \[0, 1, 5\]'),
        ('0\n1\n1\n', r'got 3: \[0, 1, 1\]'),
        ('0\n1\n', r'expected 3 .*, got 2: \[0, 1\]'),
        (None, 'must be TEACHER=FILE, .* No such file'),
    ],
)
def test_impossible_files(image_folder: Path, tmp_path: Path, teacher: str, lines: str | None, message: str) -> None:
    if lines is not None:
        (tmp_path / 'classes.txt').write_text(lines)
    option = ('--teacher-classes', f'{teacher}={tmp_path / "classes.txt"}')
    with pytest.raises(UserError, match=message):
        run(image_folder, tmp_path, '--teachers', teacher, *option)
    assert not (tmp_path / 'run').exists()


def test_impossible_options(image_folder: Path, tmp_path: Path, teacher: str) -> None:
    with pytest.raises(UserError, match=r'must be TEACHER=FILE, .* No such file'):
        run(image_folder, tmp_path, '--teachers', teacher, '--teacher-classes', 'other=x')
    with pytest.raises(UserError, match='--teacher-classes a=x: needs --teachers'):
        run(image_folder, tmp_path, '--teacher-classes', 'a=x')
