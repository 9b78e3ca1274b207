"""The program `mealv2-predict`: the classes of pictures, by their names, from each kind of model."""

import csv
import json
from pathlib import Path

import pytest
import torch
from colors import CLASSES, SIZE, color_model, write_folder

from timm_mealv2.cli.hub import main as hub
from timm_mealv2.cli.predict import main
from timm_mealv2.errors import UserError
from timm_mealv2.models.factory import create_ensemble
from timm_mealv2.models.onnx_model import write_onnx


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint that knows its classes, whose folder is a run's."""
    (tmp_path / 'run').mkdir()
    contents = {
        'state_dict': color_model().state_dict(),
        'args': {'model': 'test_resnet', 'num_classes': 4, 'img_size': SIZE},
        'class_names': list(CLASSES),
    }
    torch.save(contents, tmp_path / 'run' / 'last.pth.tar')
    return tmp_path / 'run' / 'last.pth.tar'


def test_pictures_get_the_names_of_the_models_classes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the folder at hand has other names; a picture that cannot be read stands in its place without any."""
    pictures = write_folder(tmp_path / 'pictures', 1, folders=['1', '2', '3', '4'])
    (pictures / '2' / 'broken.png').write_bytes(b'no picture')
    hub(['export', str(checkpoint), '--out', str(tmp_path / 'export')])
    model = create_ensemble(str(checkpoint)).teachers[0]
    write_onnx(model, tmp_path / 'model.onnx', list(CLASSES))
    for source in (checkpoint.parent, tmp_path / 'export', f'test_resnet={checkpoint}', tmp_path / 'model.onnx'):
        capsys.readouterr()
        options = [
            '--json',
            str(tmp_path / 'p.json'),
            '--csv',
            str(tmp_path / 'p.csv'),
            '--topk',
            '2',
            '--device',
            'cpu',
        ]
        main([str(source), str(pictures), *options])
        entries = json.loads((tmp_path / 'p.json').read_text())
        names = [entry['predictions'][0]['name'] if entry['predictions'] else None for entry in entries]
        assert names == ['apple', 'leaf', None, 'sea', 'sun']
        assert [Path(entry['path']).parent.name for entry in entries] == ['1', '2', '2', '3', '4']
        assert all(entry['predictions'][0]['probability'] > 0.9 for entry in entries if entry['predictions'])
        assert 'broken.png: cannot be read' in capsys.readouterr().out
        with open(tmp_path / 'p.csv', newline='') as file:
            assert [row['label_0'] for row in csv.DictReader(file)] == ['apple', 'leaf', 'sea', 'sun']


def test_a_picture_that_is_not_there_is_named(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r'/absent\.png: there is no such picture'):
        main([str(checkpoint), '/absent.png'])
