"""Checkpoints: ranked by their metric, read by torch and timm as they are; one line where they cannot be written."""

import argparse
from pathlib import Path

import pytest
import timm
import torch
from quick_training import Train, read_checkpoint
from timm.models import resume_checkpoint
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver

from timm_mealv2.errors import UserError
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.training import run_folder
from timm_mealv2.training.run_folder import Position, RunFolder, RunSaver


def make_saver(folder: Path, decreasing: bool = False, history: int = 2) -> RunSaver:
    task = ClassificationTask(timm.create_model('test_resnet', num_classes=3), verbose=False)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.1)
    args = {'model': 'test_resnet'}
    return RunSaver(RunFolder(folder), task, optimizer, args=args, constant={}, decreasing=decreasing, history=history)


@pytest.mark.parametrize('decreasing', [False, True])
def test_a_metric_that_is_nan_ranks_last_and_is_never_the_best(tmp_path: Path, decreasing: bool) -> None:
    saver = make_saver(tmp_path, decreasing)
    for epoch, metric in enumerate((float('nan'), 0.5, float('nan'), 0.6)):
        saver.keep(Position(epoch + 1), [])
        saver.save_checkpoint(epoch, metric)
        if epoch == 0:
            assert not (tmp_path / 'model_best.pth.tar').exists()
    assert saver.best_epoch == (1 if decreasing else 3)
    assert read_checkpoint(tmp_path / 'model_best.pth.tar')['epoch'] == saver.best_epoch
    assert {path.name for path in tmp_path.glob('checkpoint-*')} == {'checkpoint-1.pth.tar', 'checkpoint-3.pth.tar'}


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise RuntimeError('[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0')

    saver = make_saver(tmp_path)
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(UserError, match=r'cannot write a checkpoint to .*: no space is left; the former one is as it'):
        saver.save_checkpoint(0, 0.5)
    assert list(tmp_path.iterdir()) == []


def test_no_file_elsewhere_is_removed_that_a_checkpoint_names(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / 'run', tmp_path / 'elsewhere.pth.tar'
    folder.mkdir()
    elsewhere.touch()
    (folder / 'args.yaml').touch()
    saver = make_saver(folder, history=1)
    saver.keep(Position(1), [])
    saver.save_checkpoint(0, 0.5)
    checkpoint = TrainingCheckpoint.read(folder / 'last.pth.tar')
    names = [str(elsewhere), '../elsewhere.pth.tar', 'args.yaml', 'checkpoint-0.pth.tar']
    checkpoint.contents['saver']['checkpoint_files'] = [[name, 0.1] for name in names]
    saver = make_saver(folder, history=1)
    saver.restore(checkpoint)
    saver.keep(Position(2), [])
    saver.save_checkpoint(1, 0.6)
    assert elsewhere.exists()
    assert (folder / 'args.yaml').exists()
    assert [path.name for path in folder.glob('checkpoint-*')] == ['checkpoint-1.pth.tar']


def test_what_is_no_training_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({'fc.weight': torch.zeros(2)}, tmp_path / 'bare.pth')
    with pytest.raises(UserError, match='no training checkpoint: it has no state_dict'):
        run_folder.read_checkpoint(tmp_path / 'bare.pth')
    with pytest.raises(UserError, match='o such file'):
        run_folder.read_checkpoint(tmp_path / 'absent.pth')


def test_torch_and_timm_read_a_runs_checkpoint_as_it_is(train: Train, teachers: list[str]) -> None:
    path = train('run', '--epochs', 1, '--teachers', *teachers, '--model-kwargs', 'drop_rate=0.1') / 'last.pth.tar'
    contents = torch.load(path, weights_only=True)
    assert type(contents['args']) is dict
    assert contents['args']['teachers'] == teachers
    assert contents['args']['model_kwargs'] == {'drop_rate': 0.1}
    model = timm.create_model('test_resnet', num_classes=3, checkpoint_path=str(path))
    assert torch.equal(model.fc.weight, contents['state_dict']['fc.weight'])
    other = timm.create_model('test_resnet', num_classes=3)
    assert resume_checkpoint(other, str(path), log_info=False) == 1
    assert torch.equal(other.fc.weight, model.fc.weight)


def test_a_checkpoint_of_timms_train_py_teaches_and_is_gone_on_from(
    train: Train, image_folder: Path, tmp_path: Path
) -> None:
    """Its arguments are a Namespace, which torch does not read by itself."""
    task = ClassificationTask(timm.create_model('test_resnet', num_classes=3), verbose=False)
    args = argparse.Namespace(model='test_resnet', num_classes=3, data_dir=str(image_folder), betas=(0.9, 0.95))
    optimizer = timm.optim.create_optimizer_v2(task.trainable_module, 'sgd', lr=0.05)
    saver = CheckpointSaver(task.trainable_module, optimizer, args, task=task, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, 0.5)
    theirs = tmp_path / 'last.pth.tar'
    folder = train('resumed', '--resume', theirs, '--opt', 'sgd', '--epochs', 1, '--lr', 0, '--sched', 'none')
    assert not (folder / 'summary.csv').exists()  # its one epoch is done
    folder = train(
        'resumed',
        '--resume',
        theirs,
        '--opt',
        'sgd',
        '--teachers',
        f'test_resnet={theirs}',
        '--no-resume-opt',
        '--lr',
        0,
        '--sched',
        'none',
    )
    weight = task.trainable_module.fc.weight
    assert torch.equal(read_checkpoint(folder / 'last.pth.tar')['state_dict']['fc.weight'], weight)
    assert [line.split(',')[0] for line in (folder / 'summary.csv').read_text().splitlines()] == ['epoch', '1']
