"""A run that is resumed with other settings: it follows them, names them, or refuses."""

import pytest
from quick_training import Train, read_checkpoint, summary

from timm_mealv2.errors import UserError

AUTO = ('--resume', 'auto')


def rates(train: Train, name: str, *options: object) -> list[float]:
    return [float(row['lr']) for row in summary(train(name, *options))]


def test_the_schedule_follows_the_present_settings(train: Train) -> None:
    expected = rates(train, 'whole', '--epochs', 5)
    train('longer', '--epochs', 2)  # ends at a learning rate near 0
    assert rates(train, 'longer', '--epochs', 5, *AUTO)[2:] == pytest.approx(expected[2:])
    halved = rates(train, 'longer', '--epochs', 6, '--lr', 0.025, *AUTO)
    assert halved[5:] == pytest.approx([rate / 2 for rate in rates(train, 'six', '--epochs', 6)[5:]])


def test_so_do_the_optimizers_settings(train: Train) -> None:
    folder = train('decay', '--epochs', 1, '--weight-decay', 0.1)
    train('decay', '--epochs', 2, '--weight-decay', 0.2, *AUTO)
    groups = read_checkpoint(folder / 'last.pth.tar')['optimizer']['param_groups']
    assert max(group['weight_decay'] for group in groups) == 0.2


def test_each_changed_setting_is_named(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    train('run', '--epochs', 1)
    with caplog.at_level('INFO'):
        train('run', '--epochs', 2, '--hflip', 0.2, '--lr', 0.01, *AUTO)
    for text in ('--hflip was 0.5 and is 0.2', '--lr was 0.05 and is 0.01', '--epochs was 1 and is 2'):
        assert text in caplog.text
    assert caplog.text.count('Changed since') == 3


def test_another_seed_teacher_or_data_set_has_to_be_accepted(
    train: Train, teachers: list[str], tmp_path_factory: pytest.TempPathFactory, image_folder: object
) -> None:
    other = tmp_path_factory.mktemp('elsewhere') / 'images'
    other.symlink_to(str(image_folder))
    train('run', '--epochs', 1, '--teachers', *teachers)
    for name, options in {
        'seed': ('--teachers', *teachers, '--seed', 7),
        'teachers': ('--teachers', teachers[0]),
        'data-dir': ('--teachers', *teachers, '--data-dir', other),
    }.items():
        with pytest.raises(UserError, match=f'--{name} was .* --resume-changed continues'):
            train('run', '--epochs', 2, *options, *AUTO)
    rows = summary(train('run', '--epochs', 2, '--teachers', teachers[0], '--seed', 7, *AUTO, '--resume-changed'))
    assert len(rows) == 2


def test_another_optimizer_is_one_clear_line(train: Train) -> None:
    train('run', '--epochs', 1)
    with pytest.raises(UserError, match=r'--opt adamw: .* has the state of sgd; --no-resume-opt begins with a new one'):
        train('run', '--epochs', 2, '--opt', 'adamw', *AUTO)
    train('run', '--epochs', 2, '--opt', 'adamw', '--no-resume-opt', *AUTO)
