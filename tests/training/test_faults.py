"""What goes wrong in a run: images, signals, numbers, processes, disks. Each as a user meets it."""

import math
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from forked import Forked
from hub_server import WRITE_TOKEN, HubServer
from huggingface_hub import constants
from quick_training import read_checkpoint
from timm.task import ClassificationTask
from torch import Tensor

from timm_mealv2.command_line import run_cli
from timm_mealv2.errors import TrainingFailedError, UserError
from timm_mealv2.training.loop import LossScaler, Stepper
from timm_mealv2.training.run import main


@pytest.fixture
def data(image_folder: Path, tmp_path: Path) -> Path:
    """A copy of the sample images, to spoil."""
    return Path(shutil.copytree(image_folder, tmp_path / 'data'))


def cut_off(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:200])
    return str(path)


# Signals

SMALL = (
    '--model test_resnet --num-classes 3 --img-size 16 --batch-size 4 --lr 0.05 --epochs 4 --warmup-epochs 0 '
    '--log-interval 1 --device cpu --smoothing 0 --drop 0.2 --reprob 0.5 --mixup 0.3 --model-ema --grad-accum-steps 2'
).split()


def options(data: Path, *more: Any) -> list[Any]:
    return [*SMALL, '--data-dir', data, '--experiment', 'run', *more]


def trained_weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = read_checkpoint(folder / 'last.pth.tar')
    assert checkpoint['progress']['epoch'] == 4
    return {**checkpoint['state_dict'], **{f'ema.{k}': v for k, v in checkpoint['state_dict_ema'].items()}}


@pytest.fixture(scope='module')
def unbroken(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    output = tmp_path_factory.mktemp('unbroken')
    main([*SMALL, '--data-dir', str(image_folder), '--output', str(output), '--experiment', 'run', '--workers', '0'])
    return trained_weights(output / 'run')


@pytest.mark.parametrize(
    ('number', 'workers', 'moment'),
    [
        (signal.SIGINT, 2, 'epoch 2 [3/5]'),
        (signal.SIGTERM, 2, 'epoch 2 [5/5]'),  # during the evaluation, or the first step after it
    ],
)
def test_a_signal_ends_the_run_in_good_order_and_it_continues_bit_for_bit(
    number: signal.Signals,
    workers: int,
    moment: str,
    image_folder: Path,
    tmp_path: Path,
    unbroken: dict[str, Tensor],
    program: Forked,
) -> None:
    job = program.start(tmp_path, *options(image_folder, '--workers', workers))
    job.wait_for(moment)
    os.killpg(job.session, number)  # as Ctrl-C and scancel do it: the workers get it too
    assert job.finish() == 128 + number
    assert 'Traceback' not in job.text
    assert f'Stopped by {number.name} at epoch' in job.text.splitlines()[-1]
    assert list((tmp_path / 'run').glob('recovery-*.pth.tar'))
    program.run(tmp_path, *options(image_folder, '--workers', workers, '--resume', 'auto'))
    for name, value in trained_weights(tmp_path / 'run').items():
        assert torch.equal(value, unbroken[name]), name


def test_before_the_first_step_a_signal_just_ends_the_program(
    image_folder: Path, tmp_path: Path, program: Forked
) -> None:
    slow = ('--workers', 0, '--dry-run', '--batch-size', 16, '--img-size', 512)
    job = program.start(tmp_path, *options(image_folder, *slow))
    job.wait_for('epochs.')
    os.kill(job.pids[0], signal.SIGINT)
    assert job.finish() == 130
    assert 'Traceback' not in job.text
    assert job.text.splitlines()[-1] == 'Stopped by SIGINT.'


def test_a_signal_to_one_process_stops_all_at_the_same_step(
    image_folder: Path, tmp_path: Path, program: Forked
) -> None:
    job = program.start(tmp_path, *options(image_folder, '--workers', 1, '--epochs', 100), processes=2)
    job.wait_for('epoch 2 [1/3]')
    os.kill(job.pids[-1], signal.SIGTERM)
    assert job.finish() == 128 + signal.SIGTERM
    assert job.text.count('Stopped by SIGTERM') == 1, job.text
    assert list((tmp_path / 'run').glob('recovery-*.pth.tar'))
    assert 'Connection closed' not in job.text


def test_torchrun_hands_a_signal_to_all_processes(image_folder: Path, tmp_path: Path, program: Forked) -> None:
    words = options(image_folder, '--workers', 1, '--epochs', 100)
    job = program.start(tmp_path, *words, processes=2, restarts=0)
    job.wait_for('epoch 2 [1/3]')
    os.killpg(job.session, signal.SIGTERM)  # the launcher sends it to the processes a second time
    assert job.finish() != 0
    assert job.text.count('Stopped by SIGTERM') == 1, job.text
    assert list((tmp_path / 'run').glob('recovery-*.pth.tar'))
    assert 'Connection closed' not in job.text


# Numbers


def states(stepper: Stepper) -> list[Tensor]:
    """Every tensor that an update could change."""
    task: Any = stepper.task
    tensors = [*task.trainable_module.state_dict().values(), *task.get_trainable_module(ema=True).state_dict().values()]
    for state in stepper.optimizer.state_dict()['state'].values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize(
    ('opt', 'parts', 'scaled'),
    [('adamw', 1, False), ('adamw', 2, True), ('lamb', 1, False), ('adahessian', 1, False)],
)
def test_an_update_that_is_not_finite_changes_no_weight(value: float, opt: str, parts: int, scaled: bool) -> None:
    model = timm.create_model('test_resnet', num_classes=3)
    task = ClassificationTask(model, verbose=False)
    task.setup_ema(decay=0.5)
    optimizer = timm.optim.create_optimizer_v2(task.trainable_module, opt, lr=0.1)
    stepper = Stepper(task, optimizer, accumulate=parts, scaler=LossScaler(device='cpu') if scaled else None)
    stepper.freeze_bn = True
    stepper.train()
    images, target = torch.rand(4, 3, 16, 16), torch.arange(4) % 3
    for update, spoilt_value in enumerate((0.5, value, 0.5)):
        before = states(stepper)
        for part in range(parts):
            spoilt = images.clone()
            spoilt[0, 0, 0, 0] = spoilt_value if part == 0 else 0.5
            _, norm = stepper.step(spoilt, target, update=update, part=part, parts=parts)
            assert (norm is None) == (part < parts - 1)
        assert math.isfinite(norm) == (update != 1)
        assert all(map(torch.equal, before, states(stepper))) == (update == 1)
        assert stepper.first_nonfinite()[1] == ('the images' if update == 1 else 'the gradient')
    assert all(tensor.isfinite().all() for tensor in states(stepper))


def test_an_overflow_of_the_scaled_gradient_makes_the_scale_smaller() -> None:
    task = ClassificationTask(timm.create_model('test_resnet', num_classes=3), verbose=False)
    scaler = LossScaler(device='cpu')
    scaler.load_state_dict({**scaler.state_dict(), 'scale': 3e38})
    stepper = Stepper(task, torch.optim.SGD(task.trainable_module.parameters(), lr=0.1), scaler=scaler)
    before = [parameter.detach().clone() for parameter in task.trainable_module.parameters()]
    stepper.step(torch.rand(4, 3, 16, 16), torch.arange(4) % 3, update=0, part=0, parts=1)
    assert all(map(torch.equal, before, task.trainable_module.parameters()))
    assert scaler.state_dict()['scale'] == pytest.approx(1.5e38)
    assert stepper.statistics_are_finite()


def run_here(data: Path, output: Path, *options: Any) -> Path:
    main([*SMALL, '--data-dir', str(data), '--output', str(output), '--experiment', 'run', '--workers', '0', *options])
    return output / 'run'


SPOILING = """
import timm_mealv2.training.loop as loop
step = loop.Stepper.step

def spoilt(self, images, target, *, update, **kwargs):
    if update == 3 and rank == 1:
        images = images * float('nan')
    return step(self, images, target, update=update, **kwargs)

loop.Stepper.step = spoilt
"""


def test_images_that_are_not_finite_on_one_process_end_the_run_before_they_reach_a_weight(
    image_folder: Path, tmp_path: Path, program: Forked
) -> None:
    arguments = options(image_folder, '--workers', 0, '--recovery-interval', 1)
    job = program.start(tmp_path, *arguments, processes=2, code=SPOILING)
    assert job.finish() == 1
    checkpoint = f'{tmp_path}/run/recovery-1-2.pth.tar'
    line = 'error: update 3: the gradient norm is nan; not finite first: the images.'
    assert f'{line} The last good checkpoint is {checkpoint}.' in job.text
    contents = read_checkpoint(Path(checkpoint))
    assert contents['progress']['update'] == 3
    tensors = [*contents['state_dict'].values(), *contents['state_dict_ema'].values()]
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_a_loss_that_becomes_infinite_ends_the_program_with_code_1_and_one_line(
    image_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = run_here(image_folder, tmp_path, '--epochs', '1')
    argv = [*SMALL, '--data-dir', str(image_folder), '--output', str(tmp_path), '--experiment', 'run', '--workers', '0']
    argv += ['--resume', 'auto', '--lr', '1e38', '--sched', 'none', '--no-resume-opt']
    with pytest.raises(SystemExit) as caught:
        run_cli(main, argv)
    assert caught.value.code == 1
    error = capfd.readouterr().err
    assert 'Traceback' not in error
    *_, line = error.splitlines()
    assert re.fullmatch(r'error: update \d: the gradient norm is nan; not finite first: the student\. .*', line), line
    assert line.endswith(f'The last good checkpoint is {folder}/last.pth.tar.')
    assert line in (folder / 'train.log').read_text().splitlines()[-1]


def test_the_teacher_whose_output_is_not_finite_is_named(image_folder: Path, tmp_path: Path) -> None:
    teachers = []
    for name in ('test_resnet', 'test_efficientnet'):
        state = timm.create_model(name, num_classes=3).state_dict()
        if name == 'test_efficientnet':
            state['classifier.bias'][1] = float('nan')
        torch.save(state, tmp_path / f'{name}.pth')
        teachers.append(f'{name}={tmp_path / name}.pth')
    text = r'first: teacher test_efficientnet=\S*\. There is no checkpoint before'
    with pytest.raises(TrainingFailedError, match=text):
        run_here(image_folder, tmp_path, '--teachers', *teachers, '--no-preflight')
    assert not list((tmp_path / 'run').glob('*.pth.tar'))


# Bad images and other data, as the program meets them


def test_a_run_with_too_many_bad_images_stops_and_can_go_on(
    data: Path, image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = [cut_off(data / 'train' / name) for name in ('cold/002.png', 'warm/005.png', 'plain/001.png')]
    broken.append(cut_off(data / 'validation' / 'cold' / '003.png'))
    with pytest.raises(UserError, match=r'--max-bad-images allows 2: .* Saved where it was; --resume auto'):
        run_here(data, tmp_path, '--max-bad-images', '2')
    listed = [record.message for record in caplog.records if record.levelname == 'ERROR']
    assert len(listed) == 3
    assert all(any(path in line for path in broken) for line in listed)
    # One that was mended meanwhile does not count any more.
    shutil.copy(image_folder / 'train' / 'cold' / '002.png', broken[0])
    caplog.clear()
    run_here(data, tmp_path, '--max-bad-images', '3', '--resume', 'auto')
    left_out = [record.message for record in caplog.records if record.message.startswith('Left out')]
    assert len(left_out) == 3
    assert all(any(path in line for path in broken[1:]) for line in left_out)


def test_such_a_run_ends_bit_for_bit_as_the_one_that_was_never_stopped(data: Path, tmp_path: Path) -> None:
    for name in ('cold/002.png', 'warm/005.png', 'plain/001.png'):
        cut_off(data / 'train' / name)
    with pytest.raises(UserError, match='--max-bad-images allows 2'):
        run_here(data, tmp_path, '--max-bad-images', '2')
    folder = run_here(data, tmp_path, '--max-bad-images', '4', '--resume', 'auto')
    other = run_here(data, tmp_path / 'other')
    for name, value in trained_weights(other).items():
        assert torch.equal(value, trained_weights(folder)[name]), name


def test_the_processes_count_bad_images_together(data: Path, tmp_path: Path, program: Forked) -> None:
    for path in list((data / 'train').rglob('00[0-3].png')):
        cut_off(path)
    arguments = options(data, '--workers', 1, '--resume', 'auto', '--max-bad-images')
    job = program.start(tmp_path, *arguments, 8, processes=2)
    assert job.finish() == 2
    assert 'images cannot be read, --max-bad-images allows 8' in job.text
    assert 'Saved where it was' in job.text
    program.run(tmp_path, *arguments, 12, processes=2)


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_data_that_cannot_be_trained_on_is_one_line(split: str, data: Path, tmp_path: Path) -> None:
    def refused(match: str, *options: str) -> None:
        with pytest.raises(UserError, match=match) as error:
            run_here(data, tmp_path, *options)
        assert '\n' not in str(error.value)

    refused('no data set at', '--data-dir', str(tmp_path / 'absent'))
    refused('training split has 3 classes, the model 5', '--num-classes', '5')
    refused('one class alone', '--num-classes', '1')
    for name in ('cold', 'plain'):
        shutil.rmtree(data / split / name)
    if split == 'train':  # a validation split may lack classes
        refused('classes')
    for path in (data / split).rglob('*.png'):
        path.unlink()
    refused('holds no images|no images|cannot open')
    shutil.rmtree(data / split)
    refused('no split')
    assert not (tmp_path / 'run').exists()


def test_a_full_disk_leaves_the_former_checkpoint(image_folder: Path, tmp_path: Path, program: Forked) -> None:
    folder = run_here(image_folder, tmp_path, '--epochs', '1')
    former = (folder / 'last.pth.tar').read_bytes()
    limit = len(former) // 2
    limiting = f'import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))'
    arguments = options(image_folder, '--workers', 0, '--resume', 'auto', '--epochs', 2)
    job = program.start(tmp_path, *arguments, code=limiting)
    assert job.finish() == 2
    assert 'Traceback' not in job.text
    last = job.text.splitlines()[-1]
    assert 'cannot write a checkpoint' in last
    assert 'the former one is as it was' in last
    assert (folder / 'last.pth.tar').read_bytes() == former
    assert {path.suffix for path in folder.iterdir()} <= {'.tar', '.csv', '.yaml', '.log', '.json'}
    run_here(image_folder, tmp_path, '--resume', 'auto', '--epochs', '2')


# Processes


FAILING = """
import timm_mealv2.training.loop as loop
from timm_mealv2.errors import UserError
step = loop.Stepper.step

def failing(self, *args, update, **kwargs):
    if update == 2 and rank == 1:
        raise UserError('this process has no more luck')
    return step(self, *args, update=update, **kwargs)

loop.Stepper.step = failing
"""


def test_a_failing_process_ends_the_others_and_its_error_is_shown(
    image_folder: Path, tmp_path: Path, program: Forked
) -> None:
    words = options(image_folder, '--workers', 1)
    job = program.start(tmp_path, *words, processes=2, code=FAILING, restarts=0)
    assert job.finish() != 0
    assert 'UserError: this process has no more luck' in job.text.split('Root Cause')[1]
    assert job.text.count('error: this process has no more luck\n') == 1


# The Hub at the end of a run


def test_the_best_model_is_pushed_at_the_end(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setenv('HF_TOKEN', WRITE_TOKEN)
    with HubServer() as server, caplog.at_level('INFO'):
        monkeypatch.setattr(constants, 'ENDPOINT', server.url)
        run_here(image_folder, tmp_path, '--epochs', '1', '--push-to-hub', 'me/student')
    assert f'Pushed: {server.url}/me/student/commit/' in caplog.text
    assert {'model.safetensors', 'config.json', 'README.md'} <= {p.name for p in (tmp_path / 'run/hub').iterdir()}


def test_a_push_that_fails_does_not_cost_the_training(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'none'))
    monkeypatch.delenv('HF_TOKEN', raising=False)
    folder = run_here(image_folder, tmp_path, '--epochs', '1', '--push-to-hub', 'me/student')
    (line,) = [record.message for record in caplog.records if 'me/student' in record.message]
    assert line.startswith(f'The training is complete ({folder}), but there is no token')
    assert line.endswith(f'mealv2-hub push {folder}/model_best.pth.tar me/student')
    assert (folder / 'model_best.pth.tar').exists()
    with pytest.raises(UserError, match="'student' names no repository: expected USER/NAME"):
        run_here(image_folder, tmp_path, '--push-to-hub', 'student')
