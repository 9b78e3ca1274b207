"""Checkpoints: ranked by their metric, and one line where they cannot be written."""

from pathlib import Path

import pytest
import timm
import torch
from timm.task import ClassificationTask

from timm_mealv2.errors import UserError
from timm_mealv2.training.checkpoint_saver import Position, RunSaver, read_checkpoint


def make_saver(folder: Path, decreasing: bool = False, history: int = 2) -> RunSaver:
    task = ClassificationTask(timm.create_model('test_resnet', num_classes=3), verbose=False)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.1)
    args = {'model': 'test_resnet'}
    return RunSaver(folder, task, optimizer, args=args, constant={}, decreasing=decreasing, history=history)


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


def test_no_file_elsewhere_is_removed_that_a_checkpoint_names(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / 'run', tmp_path / 'elsewhere.pth.tar'
    folder.mkdir()
    elsewhere.touch()
    (folder / 'args.yaml').touch()
    saver = make_saver(folder, history=1)
    saver.keep(Position(1), [])
    saver.save_checkpoint(0, 0.5)
    checkpoint = read_checkpoint(folder / 'last.pth.tar')
    names = [str(elsewhere), '../elsewhere.pth.tar', 'args.yaml', 'checkpoint-0.pth.tar']
    checkpoint['saver']['checkpoint_files'] = [[name, 0.1] for name in names]
    torch.save(checkpoint, tmp_path / 'changed')  # not over the file, which is memory-mapped
    (tmp_path / 'changed').rename(folder / 'last.pth.tar')
    saver = make_saver(folder, history=1)
    saver.restore(folder / 'last.pth.tar')
    saver.keep(Position(2), [])
    saver.save_checkpoint(1, 0.6)
    assert elsewhere.exists()
    assert (folder / 'args.yaml').exists()
    assert [path.name for path in folder.glob('checkpoint-*')] == ['checkpoint-1.pth.tar']


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('progress', {'epoch': '1', 'batch': 0, 'update': 0}),
        ('progress', {'epoch': -1, 'batch': 0, 'update': 0}),
        ('progress', [1, 2, 3]),
    ],
)
def test_an_entry_that_no_training_wrote_is_refused(name: str, value: object, tmp_path: Path) -> None:
    torch.save({'state_dict': {'fc.weight': torch.zeros(2)}, name: value}, tmp_path / 'x.pth.tar')
    with pytest.raises(UserError, match=r'x\.pth\.tar is (damaged|no checkpoint)'):
        read_checkpoint(tmp_path / 'x.pth.tar')


def test_what_is_no_training_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({'fc.weight': torch.zeros(2)}, tmp_path / 'bare.pth')
    with pytest.raises(UserError, match='no training checkpoint: it has no state_dict'):
        read_checkpoint(tmp_path / 'bare.pth')
    with pytest.raises(UserError, match='no checkpoint at'):
        read_checkpoint(tmp_path / 'absent.pth')
