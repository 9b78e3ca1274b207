"""The quick start's sample, and its experiment from the images to a student that plain timm loads."""

import contextlib
import gzip
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from timm.data import create_dataset

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / 'examples/fashion_mnist'


def load(name: str) -> ModuleType:
    """Import a script of the example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f'{name}.py')
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def make_sample() -> ModuleType:
    return load('make_sample')


@pytest.fixture(scope='module')
def quickstart() -> ModuleType:
    return load('quickstart')


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>u4').tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A source of 2,100 training and 2,050 test images of noise, 10 and 5 more of each class than the sample takes."""
    folder = tmp_path / 'source'
    folder.mkdir()
    generator = np.random.default_rng(0)
    for prefix, per_class in (('train', 210), ('t10k', 205)):
        labels = generator.permutation(np.repeat(np.arange(10, dtype=np.uint8), per_class))
        images = generator.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
        write_idx(folder / f'{prefix}-labels-idx1-ubyte.gz', labels)
        write_idx(folder / f'{prefix}-images-idx3-ubyte.gz', images)
    return folder


def test_the_shipped_sample_has_200_images_of_each_class_that_timm_reads() -> None:
    splits = {
        split: create_dataset('', root=str(EXAMPLE / 'data'), split=split, input_img_mode='L')
        for split in ('train.tar', 'validation.tar')
    }
    pixels = {}
    for split, data in splits.items():
        assert np.bincount(data.reader.targets).tolist() == [200] * 10
        assert list(data.reader.class_name_to_idx)[:3] == ['0-t-shirt-top', '1-trouser', '2-pullover']
        pixels[split] = {image.tobytes() for image, _ in data}
        assert data[0][0].size == (28, 28)
    assert splits['train.tar'].reader.class_name_to_idx == splits['validation.tar'].reader.class_name_to_idx
    assert not pixels['train.tar'] & pixels['validation.tar']


def test_the_sample_is_the_first_images_without_loss_and_the_same_bytes_again(
    make_sample: ModuleType, source: Path, tmp_path: Path
) -> None:
    for name in ('a', 'b'):
        make_sample.main(['--source', str(source), '--out', str(tmp_path / name)])
    for name in ('train.tar', 'validation.tar'):
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
    images, labels = make_sample.read_split(source, 'train')
    with tarfile.open(tmp_path / 'a/train.tar') as tar:
        members = tar.getmembers()
        assert len(members) == 2000
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, '')}
        for member in members[::97]:
            folder, index = member.name.removesuffix('.png').split('/')
            file = tar.extractfile(member)
            assert file is not None
            assert make_sample.CLASS_NAMES[labels[int(index)]] == folder
            assert (labels[: int(index)] == labels[int(index)]).sum() < 200
            assert np.array_equal(np.asarray(Image.open(file)), images[int(index)])


def test_unlabelled_images_are_none_of_the_sample_and_tell_no_class(
    make_sample: ModuleType, source: Path, tmp_path: Path
) -> None:
    make_sample.main(['--source', str(source), '--out', str(tmp_path / 'sample')])
    make_sample.main(['--source', str(source), '--out', str(tmp_path / 'more'), '--unlabeled', '100'])
    names = []
    for folder in ('sample', 'more'):
        with tarfile.open(tmp_path / folder / 'train.tar') as tar:
            names.append([name.split('/') for name in tar.getnames()])
    assert len(names[1]) == 100
    assert {folder for folder, _ in names[1]} == {'images'}
    assert not {file for _, file in names[0]} & {file for _, file in names[1]}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--source', 'nowhere'], 'dataset-fashion-mnist'),
        (['--unlabeled', '101'], 'expected 1 to 100 images'),
        (['--unlabeled', '0'], 'expected 1 to 100 images'),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    make_sample: ModuleType,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        make_sample.run_cli(make_sample.main, ['--source', str(source), '--out', str(tmp_path / 'out'), *arguments])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert message in error
    assert not (tmp_path / 'out').exists()


def test_gains_over_seeds_are_paired(quickstart: ModuleType) -> None:
    runs = [
        {
            'start': {'top1': 80.0, 'kl': 0.3},
            'control': {'top1': control, 'kl': 0.25},
            'mealv2': {'top1': top1, 'kl': kl},
        }
        for control, top1, kl in ((81.0, 82.0, 0.1), (82.0, 84.0, 0.2), (83.0, 86.0, 0.3))
    ]
    text = quickstart.table_of_seeds([0, 1, 2], runs)
    assert '| mealv2 | 82.00 | 84.00 | 86.00 | 84.00 | 2.00 | 0.200 |' in text
    assert '+1.00, +2.00, +3.00; mean +2.00, standard error 0.58 points.' in text


def test_the_experiment_runs_from_images_to_an_exported_student(
    quickstart: ModuleType,
    small_sample: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run_here(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        """What a process would do that knows nothing of the package, without the seconds until it has loaded torch."""
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            for name in [name for name in sys.modules if name.startswith('timm_mealv2')]:
                patch.delitem(sys.modules, name)
            patch.setattr(sys, 'argv', command[2:])
            exec(command[2], {})
        return subprocess.CompletedProcess(command, 0, printed.getvalue())

    monkeypatch.setattr(quickstart.subprocess, 'run', run_here)
    monkeypatch.setattr(quickstart, 'DATA', small_sample)
    out = tmp_path / 'out'
    (out / 'start').mkdir(parents=True)
    (out / 'start/args.yaml').touch()
    (out / 'start/last.pth.tar').touch()  # of an earlier run, which goes
    quickstart.main(['--smoke', '--out', str(out), '--val-data', str(small_sample / 'validation.tar')])
    printed = capsys.readouterr().out
    results = json.loads((out / 'results.json').read_text())
    assert list(results) == ['teachers', 'ensemble', 'start', 'control', 'logit', 'mealv2']
    assert set(results['teachers']) == {'teacher_a', 'teacher_b'}
    assert min(*results['teachers'].values(), results['ensemble']) > 90
    assert f'| mealv2 | 0.16 M | {results["mealv2"]:.2f} |' in printed
    with Image.open(out / 'curves.png') as image:
        image.verify()
    student = timm.create_model(f'local-dir:{out / "student"}', pretrained=True)
    assert student.pretrained_cfg['label_names'][:2] == ['0-t-shirt-top', '1-trouser']
    assert tuple(student.pretrained_cfg['mean']) == (0.286,)
