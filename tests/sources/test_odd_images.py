"""Images that a folder of real photos has: other endings, 16 bits, transparency, an orientation."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from colors import CLASSES, SIZE, evaluate, gray, picture, preflight, save_model, train
from PIL import Image

from timm_mealv2 import UserError
from timm_mealv2.cli.soft_labels import main as soft_labels

ENDINGS = ('png', 'webp', 'bmp', 'tif', 'tiff', 'gif', 'avif')


def said(capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture) -> str:
    """All that a program has written."""
    return ''.join(capsys.readouterr()) + caplog.text


def two_splits(root: Path) -> Path:
    """Make DIR/train and DIR/validation of the folder `root`, which holds classes."""
    for split in ('train', 'validation'):
        shutil.copytree(root, root.with_name('splits') / split)
    return root.with_name('splits')


def test_images_have_several_endings(knowing: Path, tmp_path: Path) -> None:
    for name in CLASSES:
        (tmp_path / 'images' / name).mkdir(parents=True)
        for number, ending in enumerate(ENDINGS):
            picture(name, number).save(tmp_path / 'images' / name / f'{number}.{ending}')
        (tmp_path / 'images' / name / 'notes.txt').write_text('no image')
    model = f'test_resnet={knowing}'
    count = len(CLASSES) * len(ENDINGS)
    row = evaluate(tmp_path / 'e.json', model, '--data-dir', tmp_path / 'images')[model]
    assert (row['samples'], row['top1']) == (count, 100)
    train(tmp_path / 'run', '--data-dir', two_splits(tmp_path / 'images'), '--teachers', model)
    assert preflight(tmp_path / 'run')['ensemble']['samples'] == count


@pytest.mark.parametrize('channels', [1, 3])
def test_gray_of_16_bits_is_scaled(channels: int, tmp_path: Path) -> None:
    for name in CLASSES:
        (tmp_path / 'images' / name).mkdir(parents=True)
        for number, ending in enumerate(('png', 'tif', 'png')):
            pixels = np.full((SIZE, SIZE), 257 * gray(name) + number, dtype=np.uint16)  # 65535 is 255
            Image.fromarray(pixels).save(tmp_path / 'images' / name / f'{number}.{ending}')
    model = save_model(tmp_path / 'm.pth', channels=channels, gray_pictures=True)
    row = evaluate(tmp_path / 'e.json', model, '--data-dir', tmp_path / 'images')[model]
    assert (row['samples'], row['top1']) == (12, 100)
    options = ('--data-dir', two_splits(tmp_path / 'images'), '--in-chans', channels)
    row = train(tmp_path / 'run', *options, '--initial-checkpoint', tmp_path / 'm.pth')[0]
    assert float(row['train_loss']) < 1
    assert float(row['eval_top1']) == 100


@pytest.fixture
def transparent(tmp_path: Path) -> Path:
    """White pictures, as a viewer shows them, of each color beneath: they are all of the class `apple`."""
    (tmp_path / 'images' / 'apple').mkdir(parents=True)
    for name in CLASSES:
        image = picture(name).convert('RGBA')
        image.putalpha(0)
        image.save(tmp_path / 'images' / 'apple' / f'{name}.png')
    return tmp_path / 'images'


@pytest.fixture
def of_two_classes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Teachers: `white` says 0 for white and 1 for all else, `upright` says 0 where the upper half is the brighter."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / 'judges.py').write_text(
        'import torch\n\n\n'
        'class Judge(torch.nn.Module):\n'
        '    num_classes, in_chans = 2, 3\n\n'
        '    def __init__(self, measure):\n'
        '        super().__init__()\n'
        '        self.measure = measure\n'
        f'        self.pretrained_cfg = dict(input_size=(3, {SIZE}, {SIZE}), mean=(0.5,) * 3, std=(0.5,) * 3)\n\n'
        '    def forward(self, x):\n'
        '        score = self.measure(x)\n'
        '        return 100 * torch.stack([score, -score], dim=1)\n\n\n'
        'def white():\n'
        '    return Judge(lambda x: x.mean(dim=(1, 2, 3)) - 0.9)\n\n\n'
        'def upright():\n'
        f'    return Judge(lambda x: x[:, :, :{SIZE // 2}].mean(dim=(1, 2, 3)) - x.mean(dim=(1, 2, 3)))\n'
    )


def test_transparency(
    transparent: Path,
    of_two_classes: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = 'python:judges:white'
    with caplog.at_level('INFO'):
        plain = evaluate(tmp_path / 'e.json', model, '--data-dir', transparent)[model]
        text = said(capsys, caplog)
    viewed = evaluate(tmp_path / 'e.json', model, '--data-dir', transparent, '--decode', 'view')[model]
    assert (plain['samples'], plain['top1']) == (4, 0)
    assert (viewed['samples'], viewed['top1']) == (4, 100)
    assert len(re.findall(r'\b4 images\b.*transparen.*--decode view', text)) == 1


def photo(path: Path, orientation: int | None) -> None:
    """Write a photo whose upper half is the brighter when it is shown upright, turned as its orientation says."""
    image = Image.new('RGB', (SIZE, SIZE), (40, 40, 40))
    image.paste((220, 220, 220), (0, 0, SIZE, SIZE // 2))
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
        turned = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
        image = image.transpose(turned[orientation])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95, exif=exif)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten photos, 7 of which are turned; all are of the first of two classes."""
    for split in ('train', 'validation'):
        for number, orientation in enumerate([None] * 3 + [3] * 5 + [6, 8]):
            photo(tmp_path / 'photos' / split / 'up' / f'{number}.jpg', orientation)
        photo(tmp_path / 'photos' / split / 'zenith' / '0.png', None)  # the second class has one
    entry = '  - name: {}\n    num_bytes: 0\n    num_examples: 11\n'
    splits = entry.format('train') + entry.format('validation')
    (tmp_path / 'photos' / 'README.md').write_text(f'---\ndataset_info:\n  splits:\n{splits}---\n')
    return tmp_path / 'photos'


def named(source: str, photos: Path, shards: Path) -> list[str]:
    """Return the options that name a source of the photos; shards are written for it."""
    if source == 'wds':
        webdataset = pytest.importorskip('webdataset')
        shards.mkdir()
        files = sorted((photos / 'validation').rglob('*.*g'))
        with webdataset.TarWriter(str(shards / 'validation.tar')) as writer:
            for number, file in enumerate(files):
                label = int(file.parent.name == 'zenith')
                writer.write({'__key__': f'{number:03}', file.suffix[1:]: file.read_bytes(), 'cls': label})
        split = {'name': 'validation', 'filenames': ['validation.tar'], 'shard_lengths': [len(files)]}
        (shards / '_info.json').write_text(json.dumps({'splits': {'validation': {**split, 'num_samples': len(files)}}}))
        return ['--dataset', 'wds/', '--data-dir', str(shards)]
    if source in ('hfds', 'hfids'):
        return ['--dataset', f'{source}/{photos}']
    return [*(['--dataset', 'torch/image_folder'] if source == 'torch' else []), '--data-dir', str(photos)]


TURNED = r'\b7 images\b.*orientation.*--decode view'


@pytest.mark.parametrize('source', ['folder', 'torch', 'hfds', 'hfids', 'wds'])
def test_evaluation_of_turned_photos(
    source: str,
    photos: Path,
    of_two_classes: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = named(source, photos, tmp_path / 'shards')
    model = 'python:judges:upright'
    with caplog.at_level('INFO'):
        plain = evaluate(tmp_path / 'e.json', model, *options)[model]
        text = said(capsys, caplog)
        caplog.clear()
        viewed = evaluate(tmp_path / 'e.json', model, *options, '--decode', 'view')[model]
        quiet = said(capsys, caplog)
    # As they are stored 3 of 11 are right, and those at the sides by chance.
    assert plain['top1'] <= 100 * 5 / 11 + 1e-6
    assert viewed['top1'] == pytest.approx(100 * 10 / 11)
    assert len(re.findall(TURNED, text)) == 1
    assert 'orientation' not in quiet


@pytest.mark.parametrize('source', ['folder', 'hfds'])
def test_training_and_recording_of_turned_photos(
    source: str,
    photos: Path,
    of_two_classes: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    where = [*named(source, photos, tmp_path / 'shards'), '--num-classes', 2]
    with caplog.at_level('INFO'):
        train(tmp_path / 'run', *where, '--teachers', 'python:judges:upright')
    # Once for each split that is read
    assert 1 <= len(re.findall(TURNED, said(capsys, caplog))) <= 2
    train(tmp_path / 'viewed', *where, '--teachers', 'python:judges:upright', '--decode', 'view')
    assert preflight(tmp_path / 'viewed')['ensemble']['top1'] == pytest.approx(100 * 10 / 11)
    caplog.clear()
    recording = ['record', '--teachers', 'python:judges:upright', *where, '--no-aug', '--epochs', 1, '--device', 'cpu']
    recording += ['--img-size', SIZE, '--top-k', 2, '--workers', 0]
    with caplog.at_level('INFO'):
        soft_labels([str(word) for word in (*recording, '--out', tmp_path / 'timm')])
    assert len(re.findall(TURNED, said(capsys, caplog))) == 1
    soft_labels([str(word) for word in (*recording, '--out', tmp_path / 'view', '--decode', 'view')])
    # The setting is the store's: with the other one its pixels would be others.
    with pytest.raises(UserError, match='--decode was view'):
        train(tmp_path / 'stored', *where, '--soft-labels', tmp_path / 'view', '--decode', 'timm')
    # The teacher says 0 of every photo that it sees upright, and so does this student of any.
    student = timm.create_model('test_resnet', num_classes=2)
    torch.nn.init.zeros_(student.fc.weight)
    student.fc.bias.data = torch.tensor([9.0, -9.0])
    torch.save(student.state_dict(), tmp_path / 'start.pth')
    start = ('--initial-checkpoint', tmp_path / 'start.pth', '--discriminator-weight', 0)
    for how, least, most in (('view', 1, 1), ('timm', 4 / 11, 6 / 11)):  # two are turned to the side
        stored = ('--soft-labels', tmp_path / how, '--decode', how)
        row = train(tmp_path / f'on {how}', *where, *stored, *start)[0]
        assert 100 * least - 1e-4 <= float(row['train_teacher_agreement']) <= 100 * most + 1e-4
