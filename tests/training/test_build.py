"""What only the parts of a run can tell: told before anything is written, and before the data set where possible."""

from collections.abc import Callable
from pathlib import Path

import pytest

from timm_mealv2.cli.parser import run_cli
from timm_mealv2.training.run import main

Train = Callable[..., Path]


@pytest.mark.parametrize(
    ('argv', 'text'),
    [
        ('--gp none', 'cannot create --model test_resnet with --gp none: '),
        ('--model test_vit --img-size 33', '--img-size: test_vit cannot take images of 33 x 33'),
        ('--img-size 16 --train-img-sizes 16 24 --train-batch-sizes 99 99', '--train-img-sizes: '),
        ('--model test_vit --img-size 32 --train-img-sizes 33', '--train-img-sizes: test_vit cannot take images of 33'),
        ('--device xpu', '--device xpu: '),
        ('--device-modules absent_module', '--device-modules absent_module: '),
        ('--model-kwargs absent=1', "unexpected keyword argument 'absent'"),
        ('--opt-kwargs absent=1', "unexpected keyword argument 'absent'"),
        ('--output {file}', '--output and --experiment: '),
        ('--experiment ' + 300 * 'x', 'cannot be the name of a folder'),
    ],
)
def test_what_only_the_parts_of_a_run_can_tell_is_told_before_it_too(
    capfd: pytest.CaptureFixture[str], image_folder: Path, tmp_path: Path, argv: str, text: str
) -> None:
    (tmp_path / 'file').touch()
    base = ['--model', 'test_resnet', '--num-classes', '3', '--workers', '0', '--data-dir', str(image_folder)]
    base += ['--device', 'cpu', '--output', str(tmp_path / 'out'), '--epochs', '1']
    with pytest.raises(SystemExit) as exit:
        run_cli(main, [*base, *argv.format(file=tmp_path / 'file').split()])
    error = capfd.readouterr().err
    assert exit.value.code == 2
    assert 'Traceback' not in error
    assert error.splitlines()[-1].startswith('error: ')
    assert text in error.splitlines()[-1]
    assert not (tmp_path / 'out').exists()
