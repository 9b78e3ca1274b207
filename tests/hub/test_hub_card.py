"""The model card: every figure in it is the run folder's, for exactly the exported weights."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image

from timm_mealv2 import report
from timm_mealv2.cli.hub import CardOptions, export_model, main
from timm_mealv2.cli.soft_labels import main as soft_labels
from timm_mealv2.errors import UserError
from timm_mealv2.training.run import main as train
from timm_mealv2.training.settings import parse_args

SMALL = (
    '--model test_resnet --num-classes 3 --img-size 16 --batch-size 4 --workers 0 --lr 0.05 --warmup-epochs 0 '
    '--color-jitter 0 --smoothing 0 --weight-decay 0 --no-preflight'
).split()


@pytest.fixture(scope='module')
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('secret') / 'teacher.pth'
    torch.save(timm.create_model('test_efficientnet', num_classes=3).state_dict(), path)
    return f'test_efficientnet={path}'


@pytest.fixture(scope='module')
def train_run(teacher: str, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def run(*options: str) -> Path:
        output = tmp_path_factory.mktemp('runs')
        train([*SMALL, '--data-dir', str(image_folder), '--output', str(output), '--experiment', 'run', *options])
        return output / 'run'

    return run


@pytest.fixture(scope='module')
def run_folder(train_run: Callable[..., Path], teacher: str) -> Path:
    """A distillation with an average, evaluated after its second and third epoch, not after the first."""
    options = '--epochs 3 --val-interval 2 --model-ema --model-ema-decay 0.5 --crop-pct 1.0 --seed 7'.split()
    return train_run(*options, '--teachers', teacher)


@pytest.fixture(autouse=True)
def _one_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture of the curves has one panel, which is drawn in a tenth of the time."""
    monkeypatch.setattr(report, 'PANELS', [panel for panel in report.PANELS if 'lr' in panel.columns])


def row(run_folder: Path, epoch: int) -> dict[str, str]:
    with (run_folder / 'summary.csv').open(newline='') as file:
        return list(csv.DictReader(file))[epoch]


def card_of(checkpoint: Path, out: Path, **kwargs: Any) -> ModelCard:
    return ModelCard.load(export_model(checkpoint, out, **kwargs) / 'README.md')


def accuracies(card: ModelCard) -> dict[str, float]:
    return {result.metric_name: result.metric_value for result in card.data.eval_results or []}


def changed(checkpoint: Path, path: Path, **args: Any) -> Path:
    """Write the checkpoint to `path` as one of a training with other arguments."""
    saved = torch.load(checkpoint, weights_only=False)
    saved['args'] |= args
    torch.save(saved, path)
    return path


def test_the_header_has_the_measured_accuracy_and_what_the_hub_looks_for(run_folder: Path, tmp_path: Path) -> None:
    options = CardOptions(repo_id='me/student', license='mit', dataset_id='me/colors')
    card = card_of(run_folder / 'checkpoint-1.pth.tar', tmp_path / 'out', card=options)
    assert accuracies(card) == {'top-1 accuracy, %': float(row(run_folder, 1)['eval_top1'])}
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_name, result.dataset_split) == (
        'me/colors',
        'me/colors',
        'validation',
    )
    header = card.data.to_dict()
    assert header['license'] == 'mit'
    assert header['datasets'] == ['me/colors']
    assert header['library_name'] == 'timm'
    assert header['pipeline_tag'] == 'image-classification'
    assert header['metrics'] == ['accuracy']
    assert {'image-classification', 'timm', 'knowledge-distillation'} <= set(header['tags'])
    assert header['model-index'][0]['name'] == 'student'
    assert "timm.create_model('hf-hub:me/student', pretrained=True)" in card.text


def test_the_text_tells_how_it_was_made_and_measured(run_folder: Path, tmp_path: Path) -> None:
    card = card_of(run_folder / 'last.pth.tar', tmp_path / 'student')
    assert card.text.startswith('\n# student\n\n')
    expected = row(run_folder, 2)
    assert f'| top-1 accuracy, % | {float(expected["eval_top1"]):.2f} |' in card.text
    assert f'| loss, nats | {float(expected["eval_loss"]):.2f} |' in card.text
    assert 'top-5' not in card.text  # of three classes, always 100
    assert 'the moving average (decay 0.5) after 3 epochs' in card.text
    assert '| `test_efficientnet=teacher.pth` | 1 | not known |' in card.text
    assert 'mealv2-train -c args.yaml' in card.text
    assert '2009.08453' in card.text
    assert '](curves.png)' in card.text
    with Image.open(tmp_path / 'student/curves.png') as picture:
        assert picture.width > 500
    for unknown in ('license', 'datasets', 'base_model'):
        assert unknown not in card.data.to_dict()


@pytest.mark.parametrize(
    ('checkpoint', 'use_ema', 'reason'),
    [
        ('checkpoint-0.pth.tar', True, 'these weights were not evaluated'),
        ('last.pth.tar', False, 'the training evaluated their average'),
    ],
)
def test_weights_that_were_not_measured_have_no_accuracy(
    run_folder: Path, tmp_path: Path, checkpoint: str, use_ema: bool, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    card = card_of(run_folder / checkpoint, tmp_path / 'out', use_ema=use_ema)
    assert not accuracies(card)
    assert '## Accuracy' not in card.text
    assert 'metrics' not in card.data.to_dict()
    assert reason in caplog.text


def test_weights_measured_beside_an_average_that_was_not(train_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = train_run('--epochs', '1', '--model-ema', '--model-ema-force-cpu')
    assert not accuracies(card_of(folder / 'last.pth.tar', tmp_path / 'average'))
    raw = card_of(folder / 'last.pth.tar', tmp_path / 'raw', use_ema=False)
    assert accuracies(raw) == {'top-1 accuracy, %': float(row(folder, 0)['eval_top1'])}
    assert 'with the labels' in raw.text
    assert '## Teachers' not in raw.text
    assert 'knowledge-distillation' not in raw.data.tags


def test_a_summary_of_another_run_is_not_believed(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(run_folder / 'last.pth.tar', tmp_path)
    text = (run_folder / 'summary.csv').read_text()
    other = re.sub(r'\d+\.\d{3,}', '0.12345', text)
    (tmp_path / 'summary.csv').write_text(other.replace(f',{row(run_folder, 2)["eval_top1"]},', ',12.5,'))
    assert not accuracies(card_of(tmp_path / 'last.pth.tar', tmp_path / 'out'))
    assert 'not of its run' in caplog.text


def test_a_checkpoint_alone_has_a_card_without_what_it_does_not_know(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(run_folder / 'last.pth.tar', tmp_path)
    card = card_of(tmp_path / 'last.pth.tar', tmp_path / 'out')
    assert not accuracies(card)
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'model.safetensors', 'config.json', 'README.md'}
    for absent in ('curves.png', 'args.yaml', '## Accuracy'):
        assert absent not in card.text
    assert '## Teachers' in card.text
    assert 'no finished epoch' in caplog.text


def test_the_settings_in_the_card_are_those_of_the_run(run_folder: Path, tmp_path: Path) -> None:
    card = card_of(run_folder / 'last.pth.tar', tmp_path / 'out')
    (settings,) = re.findall(r'```yaml\n(.*?)```', card.text, re.DOTALL)
    assert 'secret' not in card.content
    assert str(tmp_path.parent) not in card.content
    (tmp_path / 'args.yaml').write_text(settings)
    again, first = (vars(parse_args(['-c', str(path)])) for path in (tmp_path / 'args.yaml', run_folder / 'args.yaml'))
    paths = {'config', 'given', 'teachers', 'data_dir', 'output', 'experiment', 'device'}
    assert {key for key in first if again[key] != first[key]} <= paths
    assert first['seed'] == 7


def test_teachers_and_start_come_with_the_licenses_that_timm_knows(run_folder: Path, tmp_path: Path) -> None:
    teachers = [
        'senet154.gluon_in1k',
        'hf-hub:me/x',
        'resnet18=/home/alice/a.pth',
        'local-dir:/home/alice/b',
        'python:m:f',
    ]
    args = {
        'teachers': teachers,
        'teacher_weights': [4, 1, 1, 1, 1],
        'pretrained': True,
        'model': 'test_resnet.r160_in1k',
    }
    path = changed(run_folder / 'last.pth.tar', tmp_path / 'last.pth.tar', **args)
    card = card_of(path, tmp_path / 'out')
    for line in (
        '| [`senet154.gluon_in1k`](https://huggingface.co/timm/senet154.gluon_in1k) | 0.5 | apache-2.0 |',
        '| [`hf-hub:me/x`](https://huggingface.co/me/x) | 0.125 | not known |',
        '| `resnet18=a.pth` | 0.125 | not known |',
        '| `local-dir:b` | 0.125 | not known |',
        '| `python:m:f` | 0.125 | not known |',
        'https://huggingface.co/timm/test_resnet.r160_in1k) (license: apache-2.0)',
    ):
        assert line in card.text
    assert card.data.base_model == 'timm/test_resnet.r160_in1k'
    assert 'alice' not in card.content


def test_the_type_of_the_teachers_is_told(run_folder: Path, tmp_path: Path) -> None:
    path = changed(run_folder / 'last.pth.tar', tmp_path / 'half.pth.tar', amp=True, teacher_dtype='bfloat16')
    assert 'They predicted in bfloat16 mixed precision.' in card_of(path, tmp_path / 'half').text
    assert 'mixed precision' not in card_of(run_folder / 'last.pth.tar', tmp_path / 'exact').text


def test_no_path_of_the_machine_and_no_device_but_the_runs_is_in_the_card(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder, tmp_path / 'run')
    path = tmp_path / 'run/last.pth.tar'
    for dataset, hub_id, name in (
        ('hfds//home/alice/sets/flowers', None, 'flowers'),
        ('hfds/me/flowers', ['me/flowers'], 'me/flowers'),
    ):
        with (tmp_path / 'run/args.yaml').open('a') as file:
            file.write(f'dataset: {dataset}\nteacher_classes: []\n')
        classes = ['local-dir:/home/alice/a=/home/alice/b.txt']
        changed(run_folder / 'last.pth.tar', path, dataset=dataset, teacher_classes=classes)
        card = card_of(path, tmp_path / 'out')
        assert 'alice' not in card.content
        assert card.data.to_dict().get('datasets') == hub_id
        assert f'distilled on {name} from' in card.text
        assert '- local-dir:a=b.txt' in card.text
    assert f'\ndevice: {"cuda" if torch.cuda.is_available() else "cpu"}\n' in card.text


def test_without_labels_it_is_the_agreement_with_the_teachers_and_no_accuracy(
    train_run: Callable[..., Path], teacher: str, image_folder: Path, tmp_path: Path
) -> None:
    folder = train_run('--epochs', '1', '--unlabeled', '--data-dir', str(image_folder / 'train'), '--teachers', teacher)
    card = card_of(folder / 'last.pth.tar', tmp_path / 'out')
    assert f'| same top-1 as the teachers, % | {float(row(folder, 0)["eval_agreement"]):.2f} |' in card.text
    assert 'accuracy, %' not in card.text
    assert 'model-index' not in card.data.to_dict()


def test_stored_labels_tell_their_teachers(run_folder: Path, teacher: str, image_folder: Path, tmp_path: Path) -> None:
    argv = (
        f'record --num-classes 3 --img-size 16 --epochs 1 --top-k 2 --workers 0 --device cpu --data-dir {image_folder}'
    )
    soft_labels([*argv.split(), '--out', str(tmp_path / 'store'), '--teachers', teacher])
    args = {'teachers': [], 'soft_labels': str(tmp_path / 'store')}
    path = changed(run_folder / 'last.pth.tar', tmp_path / 'last.pth.tar', **args)
    card = card_of(path, tmp_path / 'out')
    assert '| `test_efficientnet=teacher.pth` | 1 | not known |' in card.text
    assert 'from the stored predictions of 1 teacher ' in card.text
    shutil.rmtree(tmp_path / 'store')
    card = card_of(path, tmp_path / 'out')
    assert '## Teachers' not in card.text
    assert 'from the stored predictions of teachers ' in card.text


def test_a_template_of_ones_own(run_folder: Path, tmp_path: Path) -> None:
    template = tmp_path / 'card.md'
    template.write_text('---\n{{ card_data }}\n---\n# Ours: {{ name }}\n{{ results[0].value }}\n{{ x | default("-") }}')
    command = ['export', str(run_folder / 'last.pth.tar'), '--out', str(tmp_path / 'out'), '--card', str(template)]
    main([*command, '--license', 'cc-by-4.0'])
    card = ModelCard.load(tmp_path / 'out/README.md')
    assert card.text.split('\n') == ['# Ours: out', row(run_folder, 2)['eval_top1'], '-']
    assert card.data.license == 'cc-by-4.0'
    assert accuracies(card)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('---\n{{ card_data }}\n---\n{{ name', 'no template of a model card'),
        ("---\n{{ card_data }}\n---\n{{ ''.__class__.__mro__[1].__subclasses__() }}", 'unsafe'),
        (None, 'No such file'),
    ],
)
def test_a_template_that_is_none_leaves_no_folder(
    run_folder: Path, tmp_path: Path, text: str | None, message: str
) -> None:
    template = tmp_path / 'card.md'
    if text is not None:
        template.write_text(text)
    shutil.copy(run_folder / 'last.pth.tar', tmp_path)  # without a summary to draw
    with pytest.raises(UserError, match=message):
        export_model(tmp_path / 'last.pth.tar', tmp_path / 'out', card=CardOptions(template=template))
    assert not (tmp_path / 'out').exists()


def test_what_was_measured_before_the_first_step_and_what_the_student_costs(
    run_folder: Path, teacher: str, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run_folder, tmp_path / 'run'))
    rows = {'ensemble': {'samples': 12, 'top1': 75.0}, f'teacher {teacher}': {'samples': 12, 'top1': 66.625}}
    (copy / 'preflight.json').write_text(json.dumps(rows))
    text = card_of(copy / 'last.pth.tar', tmp_path / 'out').text
    assert 'top-1 accuracy on 12 images, % |' in text
    assert '| not known | 66.62 |' in text
    assert ' million parameters and takes ' in text
    assert 'top-1 accuracy on' not in card_of(run_folder / 'last.pth.tar', tmp_path / 'without').text
