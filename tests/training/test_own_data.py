"""Own data: models named by run folders, classes counted, splits of every form, recipes for teachers and students."""

from pathlib import Path

import pytest
from colors import evaluate, preflight, save_model, train
from forked import Forked

from timm_mealv2 import UserError
from timm_mealv2.cli.hub import main as hub


@pytest.fixture(scope='module')
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose model knows the colors, and beside it an export made from the folder."""
    root = tmp_path_factory.mktemp('output')
    save_model(root / 'knowing.pth')
    train(root / 'run', '--data-dir', data, '--initial-checkpoint', root / 'knowing.pth')
    hub(['export', str(root / 'run'), '--out', str(root / 'exported')])
    return root / 'run'


@pytest.mark.parametrize(
    'text',
    ['{run}', '{run}:last', '{run}/last.pth.tar', 'test_resnet={run}/last.pth.tar', 'local-dir:{exported}']
    + ['{exported}', 'test_resnet={run}/../knowing.pth'],
)
def test_a_model_is_named_alike_as_teacher_and_as_initial_weights(
    text: str, data: Path, run: Path, tmp_path: Path
) -> None:
    text = text.format(run=run, exported=run.parent / 'exported')
    train(tmp_path / 'run', '--data-dir', data, '--teachers', text, '--initial-checkpoint', text)
    rows = preflight(tmp_path / 'run')
    assert [rows[name]['top1'] for name in ('ensemble', 'student (initial)')] == [100, 100]
    (result,) = evaluate(tmp_path / 'result.json', text, '--data-dir', data).values()
    assert result['top1'] == 100


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{run}/absent.pth.tar', 'there is no such file'),
        ('{run}/..', 'is neither an export'),
        ('{run}:absent', 'nor a run folder with absent'),
        ('resnet5o', 'nearest: resnet50'),
    ],
)
def test_initial_weights_that_are_none_are_told_before_anything_is_written(
    text: str, message: str, data: Path, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        train(tmp_path / 'run', '--data-dir', data, '--initial-checkpoint', text.format(run=run))
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'run').exists()


def test_a_teacher_of_another_class_count_is_told_the_command_that_fine_tunes_it(data: Path, tmp_path: Path) -> None:
    command = 'mealv2-train --model resnet18.a1_in1k --pretrained --data-dir'
    with pytest.raises(UserError, match=f'resnet18.a1_in1k has 1000 classes, but 4 are asked for.*{command}'):
        train(tmp_path / 'run', '--data-dir', data, '--teachers', 'resnet18.a1_in1k')


UNUSED = """
import timm, torch
from timm.models import register_model

@register_model
def half_used(**kwargs):
    model = timm.create_model('test_resnet', **kwargs)
    model.unused = torch.nn.Linear(2, 2)
    return model
"""


def test_parameters_without_gradient_train_under_ddp_where_that_is_said(
    data: Path, run: Path, tmp_path: Path, program: Forked
) -> None:
    words = f'--model half_used --teachers {run} --num-classes 4 --img-size 32 --batch-size 2 --workers 0 --epochs 1'
    options = [*words.split(), '--device', 'cpu', '--data-dir', data, '--experiment', 'run']
    program.run(tmp_path, *options, '--find-unused-parameters', processes=2, code=UNUSED)
    assert (tmp_path / 'run' / 'last.pth.tar').is_file()
