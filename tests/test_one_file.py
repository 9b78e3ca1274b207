"""`examples/mealv2_in_one_file.py` trains the quick start's student to the package's weights, bit for bit."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.training import run

EXAMPLES = Path(__file__).resolve().parent.parent / 'examples'
SCRIPT = EXAMPLES / 'mealv2_in_one_file.py'
DATA = EXAMPLES / 'fashion_mnist/data'

TEACHERS = [f'local-dir:{EXAMPLES}/fashion_mnist/teachers/teacher_{name}' for name in 'ab']
QUICKSTART = '--recipe quickstart --seed 0 --train-split train.tar --val-split validation.tar --channels-last'.split()
QUICKSTART += '--workers 0 --no-preflight'.split()


def train_by_package(data: Path, out: Path, *options: str) -> Path:
    """Train as examples/fashion_mnist/quickstart.py does; return the last checkpoint."""
    run.main([*QUICKSTART, '--data-dir', str(data), '--output', str(out.parent), '--experiment', out.name, *options])
    return out / 'last.pth.tar'


def train_by_script(text: str, start: Path, data: Path, out: Path, epochs: int) -> dict[str, Tensor]:
    """Run the script, or an altered copy of its text; return all that it has trained."""
    script = {'__name__': 'one_file', '__file__': str(SCRIPT)}
    exec(compile(text, SCRIPT, 'exec'), script)
    script['main'](['--start', str(start), '--data-dir', str(data), '--epochs', str(epochs), '--out', str(out)])
    return weights(torch.load(out, weights_only=True))


def weights(saved: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The student's tensors by name, and the discriminator's by number."""
    discriminator = enumerate(saved['discriminator'].values())
    return saved['state_dict'] | {f'discriminator {number}': tensor for number, tensor in discriminator}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in a.items() if not torch.equal(tensor, b[name])]


@pytest.fixture(scope='module')
def start(small_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that a few steps of cross-entropy have trained."""
    folder = tmp_path_factory.mktemp('runs')
    return train_by_package(small_sample, folder / 'start', '--epochs', '2', '--lr', '0.1')


@pytest.fixture(scope='module')
def two_steps(start: Path, small_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the script trains in one epoch of the few images."""
    out = tmp_path_factory.mktemp('script') / 'weights.pth'
    return train_by_script(SCRIPT.read_text(), start, small_sample, out, epochs=1)


def train_student_by_package(start: Path, data: Path, out: Path, epochs: int) -> dict[str, Tensor]:
    options = ['--epochs', str(epochs), '--teachers', *TEACHERS, '--initial-checkpoint', str(start)]
    checkpoint = TrainingCheckpoint.read(train_by_package(data, out, *options))
    return weights({'state_dict': checkpoint.state_dict(), **checkpoint.contents['task_state']})


def test_an_epoch_of_the_quick_start_gives_the_weights_of_the_package(start: Path, tmp_path: Path) -> None:
    package = train_student_by_package(start, DATA, tmp_path / 'package', epochs=1)
    script = train_by_script(SCRIPT.read_text(), start, DATA, tmp_path / 'weights.pth', epochs=1)
    assert script.keys() == package.keys()
    assert differing(script, package) == []
    initial = TrainingCheckpoint.read(start).state_dict()
    assert 'conv1.0.weight' in differing(initial, script)  # it has trained at all


def test_a_second_epoch_gives_the_weights_of_the_package(start: Path, small_sample: Path, tmp_path: Path) -> None:
    package = train_student_by_package(start, small_sample, tmp_path / 'package', epochs=2)
    script = train_by_script(SCRIPT.read_text(), start, small_sample, tmp_path / 'weights.pth', epochs=2)
    assert differing(script, package) == []


@pytest.mark.parametrize(
    'altered',
    [
        'MEAN, STD = 0.286, 0.354',
        'CROP_SCALE = (0.61, 1.0)',
        'FLIP_PROBABILITY = 0.6',
        'BATCH_SIZE = 127',
        'LR = 0.051',
        'WARMUP_EPOCHS = 1',
        'MOMENTUM = 0.91',
        'WEIGHT_DECAY = 1e-5',
        'DISCRIMINATOR_WEIGHT = 1.01',
        'REDUCTION = 3',
        'SEED = 1',
        'AUGMENTATION, INITIALIZATION = 3, 6',
        'AUGMENTATION, INITIALIZATION = 1, 7',
        "TEACHERS = [f'local-dir:{EXAMPLE}/teachers/teacher_{name}' for name in 'a']",
    ],
)
def test_with_one_constant_changed_the_weights_are_others(
    altered: str, two_steps: dict[str, Tensor], start: Path, small_sample: Path, tmp_path: Path
) -> None:
    name = altered.split(' = ')[0]
    text, count = re.subn(rf'^{name} = [^#\n]*', altered, SCRIPT.read_text(), flags=re.MULTILINE)
    assert count == 1
    other = train_by_script(text, start, small_sample, tmp_path / 'weights.pth', epochs=1)
    assert 'fc.weight' in differing(two_steps, other)


def test_the_script_is_one_page_that_knows_nothing_of_the_package() -> None:
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 200
    imported = set(re.findall(r'^(?:import|from) (\w+)', text, re.MULTILINE))
    assert imported == {'argparse', 'collections', 'functools', 'math', 'numpy', 'pathlib', 'random', 'timm', 'torch'}
