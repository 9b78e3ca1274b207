"""`timm_mealv2.distill`: one call that trains what the program trains."""

import logging
import random
import signal
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from quick_training import SMALL, Train, summary, weights
from timm.data import create_dataset

import timm_mealv2
from timm_mealv2.models.checkpoint import TrainingCheckpoint

OPTIONS: dict[str, Any] = {
    'num_classes': 3,
    'img_size': 16,
    'batch_size': 4,
    'workers': 0,
    'warmup_epochs': 0,
    'log_interval': 2,
    'device': 'cpu',
    'color_jitter': 0,
    'smoothing': 0,
    'weight_decay': 0,
    'teacher_optimize': 'off',
}
assert len(OPTIONS) == sum(word.startswith('--') for word in SMALL) - 3  # SMALL's, but for model, epochs and lr


def assert_same(model: torch.nn.Module, folder: Path) -> None:
    """The model has the weights of a run's last checkpoint, to the bit."""
    saved = weights(folder / 'last.pth.tar')
    state = model.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in state.items())


def test_it_trains_the_weights_of_the_program(
    train: Train, teachers: list[str], image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    program = train('program', '--teachers', *teachers, '--val-interval', 2)
    result = timm_mealv2.distill(
        'test_resnet', teachers, image_folder, epochs=2, lr=0.05, val_interval=2, scale=(0.08, 1.0), **OPTIONS
    )
    assert_same(result.model, program)
    assert not result.model.training
    assert result.folder.parent.parent == tmp_path  # a temporary folder
    assert {'last.pth.tar', 'model_best.pth.tar', 'train.log'} < {path.name for path in result.folder.iterdir()}
    assert '2/2 epochs: ' in (result.folder / 'train.log').read_text()
    rows = summary(program)
    assert [entry['train_loss'] for entry in result.history] == [float(row['train_loss']) for row in rows]
    assert [entry['eval_top1'] for entry in result.history] == [None, float(rows[1]['eval_top1'])]


def test_modules_and_data_sets_do_as_names_and_a_folder(
    train: Train, teachers: list[str], image_folder: Path, tmp_path: Path
) -> None:
    student = timm.create_model('test_resnet', num_classes=3, channels=(8, 16, 16, 32))
    torch.save(student.state_dict(), tmp_path / 'start.pth')
    options = ['--teachers', *teachers, '--teacher-weights', 2, 1, '--discriminator-weight', 0]
    options += ['--model-kwargs', 'channels=(8,16,16,32)', '--initial-checkpoint', f'test_resnet={tmp_path}/start.pth']
    program = train('program', *options)
    modules = [timm_mealv2.create_ensemble(text).teachers[0] for text in teachers]
    data = [create_dataset('', root=image_folder, split=split) for split in ('train', 'validation')]
    more = {'teacher_weights': [2, 1], 'discriminator_weight': 0, 'model_kwargs': {'channels': (8, 16, 16, 32)}}
    more |= {'output': tmp_path, 'experiment': 'call'}
    result = timm_mealv2.distill(student, modules, tuple(data), epochs=2, lr=0.05, **OPTIONS, **more)
    assert result.model is student
    assert_same(student, program)
    assert result.folder == tmp_path / 'call'
    rebuilt = TrainingCheckpoint.read(result.folder / 'last.pth.tar').build()
    assert_same(rebuilt, program)
    assert rebuilt.pretrained_cfg['input_size'] == (3, 16, 16)


def test_what_is_global_is_as_it_was(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> list[Any]:
        loggers = [logging.getLogger(name) for name in ('', 'timm.data', 'timm.utils', 'timm_mealv2')]
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        generators = [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]
        return [*[(logger.level, logger.handlers[:]) for logger in loggers], *handlers, *generators]

    monkeypatch.setattr(logging.getLogger(), 'handlers', [])  # as in a new notebook
    torch.manual_seed(7)
    before = state()
    timm_mealv2.distill('test_resnet', None, image_folder, epochs=1, lr=0.05, **OPTIONS)
    assert state() == before


def test_a_keyword_that_is_no_option_is_a_type_error(image_folder: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {'epochs': 1, 'lr': 0.05, 'output': tmp_path / 'out', **OPTIONS}
    for wrong, message in (
        ({'epoch': 1}, "no option 'epoch', the nearest is 'epochs'"),
        ({'model': 'resnet18'}, "unexpected keyword argument 'model'"),
        ({'dry_run': True}, "unexpected keyword argument 'dry_run'"),
    ):
        with pytest.raises(TypeError, match=message):
            timm_mealv2.distill('test_resnet', None, image_folder, **{**arguments, **wrong})
    module = timm.create_model('test_resnet', num_classes=3)
    with pytest.raises(TypeError, match="'drop_path': the student is a module"):
        timm_mealv2.distill(module, None, image_folder, drop_path=0.1, **arguments)
    with pytest.raises(timm_mealv2.UserError, match='lr: must be 0 or more, got -1'):
        timm_mealv2.distill('test_resnet', None, image_folder, **{**arguments, 'lr': -1})
    with pytest.raises(timm_mealv2.UserError, match='Sequential has no num_classes'):
        timm_mealv2.distill(torch.nn.Sequential(), None, image_folder, **arguments)
    assert not (tmp_path / 'out').exists()


def test_a_notebook_shows_the_bar_of_an_epoch(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[str] = []
    stream = type('OutStream', (), {'__module__': 'ipykernel.iostream', 'encoding': 'utf-8'})()
    stream.write, stream.flush, stream.isatty = written.append, lambda: None, lambda: False
    monkeypatch.setattr('sys.stderr', stream)
    monkeypatch.setattr(logging.getLogger(), 'handlers', [])
    timm_mealv2.distill('test_resnet', None, image_folder, epochs=1, lr=0.05, **OPTIONS)
    text = ''.join(written)
    assert 'epoch 1 |' in text
    assert '1/1 epochs: loss ' in text
    assert 'epoch 1 [' not in text  # the lines that say what the bar shows


def test_a_table_of_paths_and_labels_is_data(image_folder: Path, tmp_path: Path) -> None:
    rows = [f'{path},{path.parent.name},{path.parents[1].name}' for path in sorted(image_folder.rglob('*.png'))]
    table = tmp_path / 'labels.csv'
    table.write_text('\n'.join(['path,label,split', *rows]) + '\n')
    options = {name: value for name, value in OPTIONS.items() if name != 'num_classes'}
    result = timm_mealv2.distill('test_resnet', None, table, epochs=1, lr=0.05, output=tmp_path, **options)
    assert result.model.num_classes == 3
    assert result.history[0]['eval_top1'] is not None
