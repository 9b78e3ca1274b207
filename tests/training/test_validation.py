"""What is said under the table before the first step."""

import pytest
from quick_training import Train
from torch import nn

from timm_mealv2 import EnsembleTeacher
from timm_mealv2.runs import INITIAL
from timm_mealv2.training.validation import doubts


class Teacher(nn.Module):
    num_classes, in_chans = 10, 3


def said(ensemble: float, initial: float, a: float, b: float, weights: tuple[int, int] = (1, 1)) -> str:
    """The lines for a run with these accuracies, in percent, of a student with trained weights."""
    teachers = EnsembleTeacher([Teacher(), Teacher()], weights, names=['a', 'b'])
    values = {'ensemble': ensemble, 'teacher a': a, 'teacher b': b, INITIAL: initial}
    return ' '.join(doubts({name: {'top1': value} for name, value in values.items()}, teachers, 10, False))


@pytest.mark.parametrize(
    ('accuracies', 'parts'),
    [
        ((89.9, 85.2, 89.2, 89.6), []),
        ((18.9, 12, 30, 15), ['ensemble is near chance: top-1 18.90, where guessing gives 10.00']),
        ((19.1, 12, 30, 15), ['The teacher b is weak']),
        ((89.9, 90.1, 89.2, 89.6), ['not better', 'The teacher a is weak']),
        ((88, 85.2, 85.0, 89.6), ['The teacher a is weak (top-1 85.00, the best one has 89.60)', '0.45 points']),
        ((88, 80, 85.0, 89.6), ['The teacher a is weak']),
        ((88.7, 80, 85.0, 89.6), []),
        ((88, 85.2, 85.0, 89.6, (1, 4)), []),
    ],
)
def test_what_makes_a_gain_doubtful_is_said(accuracies: tuple, parts: list[str]) -> None:
    text = said(*accuracies)
    assert all(part in text for part in parts)
    assert text.count('. ') >= 1 if parts else text == ''


def test_random_weights_are_the_first_line_under_the_table(
    train: Train, teachers: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level('INFO'):
        train('random', '--teachers', *teachers, '--epochs', 1)
    lines = [record.message for record in caplog.records]
    last = max(number for number, line in enumerate(lines) if line.startswith('  student (initial)'))
    assert lines[last + 1].startswith('The student begins with random weights, which cost 7.4 points')
    caplog.clear()
    train('labels', '--epochs', 1)
    assert 'random weights' not in caplog.text
