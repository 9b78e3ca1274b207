"""Which settings go together, and the line that says so where they do not."""

import pytest

from timm_mealv2.command_line import run_cli
from timm_mealv2.training.settings import parse_args

TWO_TEACHERS = ('--teachers', 'resnet18', 'resnet34')


def assert_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], *texts: str) -> None:
    """`argv` ends with exit code 2 and one line that holds `texts`."""
    with pytest.raises(SystemExit) as exit:
        run_cli(lambda argv: parse_args(argv) and None, argv)
    captured = capsys.readouterr()
    assert exit.value.code == 2
    assert captured.out == ''
    assert captured.err.count('\n') == 1
    assert 'Traceback' not in captured.err
    for text in texts:
        assert text in captured.err


@pytest.mark.parametrize(
    ('argv', 'text'),
    [
        ('--recipe mealv2_resnet50', 'the nearest is mealv2_resnet50_'),
        ('--scale 0.5', 'must be two values'),
        ('--scale 1 0.5', 'the smaller first'),
        ('--ratio 2 1', 'the smaller first'),
        ('--cutmix-minmax 0.5', 'must be two values'),
        ('--input-size 1 32 32 --in-chans 3', 'contradicts --input-size'),
        ('--resume auto', 'needs --experiment'),
        ('--total-batch-size 64 --batch-size 8', 'give one of them'),
        ('--train-img-sizes 32 48', 'refused, teachers, stored labels and samples have one image size'),
        ('--variable-batch-loss-scale linear', 'refused'),
        ('--aug-splits 2', 'refused, every model sees one and the same augmented image'),
        ('--aug-repeats 3', 'refused, an epoch shows each image once'),
        ('--jsd-loss', 'refused'),
        ('--split-bn', 'refused'),
        ('--resplit', 'refused'),
        ('--teachers a --kd-distill-type token', "refused, timm's train.py"),
        ('--kd-token-distill-type hard', "refused, timm's train.py"),
        ('--bce-sum', 'needs --bce-loss'),
        ('--bce-target-thresh 0.1', 'needs --bce-loss'),
        ('--crop-pct 1e-30', '--crop-pct: must be 0.01 to 1'),
        ('--torchscript', 'refused'),
        ('--fuser nvfuser', 'refused'),
        ('--naflex-loader', 'refused'),
        ('--naflex-max-seq-len 100', 'refused'),
        ('--tta 2', 'refused'),
        ('--amp --model-dtype bfloat16', 'give one of them'),
        ('--torchcompile-mode default', 'needs --torchcompile'),
        ('--teachers a --kd-model-name b', 'mean the same'),
        ('--teachers a --kd-temperature 4', 'temperature of MEAL V2 is 1'),
        ('--teachers a --distill-loss-weight 1', '--hard-label-weight'),
        ('--teachers a --unlabeled --hard-label-weight 1', 'cannot go with --unlabeled'),
        ('--teachers a b --kd-distill-type logit', 'takes one teacher'),
        ('--teachers a --kd-distill-type logit --unlabeled', 'is an option of --kd-distill-type mealv2'),
        ('--teachers a --kd-distill-type logit --discriminator-weight 2', 'is an option of'),
        ('--discriminator-weight 1', 'needs --teachers'),
        ('--unlabeled', 'needs --teachers'),
        ('--kd-distill-type feature', 'needs'),
    ],
)
def test_contradictions_and_refusals_name_the_option(capsys: pytest.CaptureFixture[str], argv: str, text: str) -> None:
    assert_one_line(capsys, argv.split(), text)


@pytest.mark.parametrize(
    'argv',
    [
        [*TWO_TEACHERS, '--kd-temperature', '1', '--teacher-img-size', '64', '--teacher-weights', '2', '1'],
        ['--teachers', 'resnet18', '--kd-distill-type', 'logit', '--kd-temperature', '4', '--task-loss-weight', '0'],
        ['--model', 'hf-hub:me/x', '--aa', 'rand-m9-mstd0.5', '--torchcompile', '--lr-noise', '0.4', '0.9'],
    ],
)
def test_what_goes_together_is_accepted(argv: list[str]) -> None:
    assert parse_args(argv)


def test_an_ignored_setting_is_told(caplog: pytest.LogCaptureFixture) -> None:
    parse_args([*TWO_TEACHERS, '--smoothing', '0.2'])
    assert '--smoothing does nothing' in caplog.text
    caplog.clear()
    parse_args([*TWO_TEACHERS, '--smoothing', '0.2', '--hard-label-weight', '1'])
    assert not caplog.text
