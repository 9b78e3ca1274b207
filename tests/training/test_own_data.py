"""Own data: models named by run folders, classes counted, splits of every form, recipes for teachers and students."""

from pathlib import Path

import pytest
import timm
import torch
from colors import CLASSES, UNCOUNTED, color_model, evaluate, picture, preflight, save_model, train, write_folder
from forked import Forked
from timm.models import save_for_hf

from timm_mealv2 import UserError, create_ensemble
from timm_mealv2.cli.hub import main as hub
from timm_mealv2.cli.soft_labels import main as soft_labels
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.models.factory import TeacherSpec
from timm_mealv2.soft_labels.store import SoftLabelStore


@pytest.fixture(scope='module')
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose model knows the colors, and beside it an export made from the folder."""
    root = tmp_path_factory.mktemp('output')
    save_model(root / 'knowing.pth')
    train(root / 'run', '--data-dir', data, '--initial-checkpoint', root / 'knowing.pth')
    hub(['export', str(root / 'run'), '--out', str(root / 'exported')])
    return root / 'run'


def test_a_model_is_named_alike_as_teacher_and_as_initial_weights(data: Path, run: Path, tmp_path: Path) -> None:
    exported, weights = run.parent / 'exported', color_model().state_dict()
    texts = [f'{run}', f'{run}:last', f'{run}/last.pth.tar', f'test_resnet={run}/last.pth.tar', f'local-dir:{exported}']
    texts += [f'{exported}', f'test_resnet={run}/../knowing.pth']
    train(tmp_path / 'run', '--data-dir', data, '--teachers', texts[0], '--initial-checkpoint', texts[1])
    rows = preflight(tmp_path / 'run')
    assert [rows[name]['top1'] for name in ('ensemble', 'student (initial)')] == [100, 100]
    results = evaluate(tmp_path / 'result.json', *texts, '--data-dir', data)
    assert {row['top1'] for row in results.values()} == {100}
    for text in texts:
        initial = TeacherSpec.parse(text).read_checkpoint().state_dict()
        teacher = create_ensemble(text, num_classes=4).teachers[0].state_dict()
        for name, value in weights.items():
            assert torch.equal(value, initial[name]), f'{text}: {name}'
            assert torch.equal(value, teacher[name]), f'{text}: {name}'


def test_images_without_labels_have_the_classes_of_the_initial_weights_or_of_the_store(
    data: Path, run: Path, tmp_path: Path
) -> None:
    options = ('--data-dir', data, '--unlabeled')
    train(tmp_path / 'live', *options, '--initial-checkpoint', run, '--teachers', run, standing=UNCOUNTED)
    record = ['record', '--teachers', str(run), '--data-dir', str(data), '--epochs', '1', '--img-size', '32']
    soft_labels([*record, '--no-aug', '--unlabeled', '--out', str(tmp_path / 'store'), '--workers', '0'])
    train(tmp_path / 'stored', *options, '--soft-labels', tmp_path / 'store', standing=UNCOUNTED)
    for name in ('live', 'stored'):
        assert TrainingCheckpoint.read(tmp_path / name / 'last.pth.tar').class_names == CLASSES


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
    command = 'mealv2-train --recipe finetune --model resnet18.a1_in1k --data-dir'
    with pytest.raises(UserError, match=f'resnet18.a1_in1k has 1000 classes, but 4 are asked for.*{command}'):
        train(tmp_path / 'run', '--data-dir', data, '--teachers', 'resnet18.a1_in1k')


def test_a_backbone_without_a_classifier_gets_one_or_teaches_its_features(data: Path, tmp_path: Path) -> None:
    shape = {'depth': 1, 'embed_dim': 24, 'num_heads': 2}  # of fixed size, as most ViTs
    backbone = timm.create_model('vit_tiny_patch16_224', num_classes=0, **shape)
    save_for_hf(backbone, tmp_path / 'backbone', model_args=shape, safe_serialization=True)
    options = ('--data-dir', data, '--model', 'vit_tiny_patch16_224')
    with pytest.raises(UserError, match='--model-kwargs img_size=32'):
        train(tmp_path / 'too_large', *options)
    words = ('--model-kwargs', 'img_size=224', *(f'{name}={value}' for name, value in shape.items()))
    file = tmp_path / 'backbone' / 'model.safetensors'
    train(tmp_path / 'teacher', *options, *words, '--img-size', 224, '--pretrained-path', file)
    trained = TrainingCheckpoint.read(tmp_path / 'teacher' / 'last.pth.tar').state_dict()
    assert len(trained['head.weight']) == 4
    for name, value in backbone.state_dict().items():
        torch.testing.assert_close(trained[name], value)
    features = ('--kd-distill-type', 'feature', '--teachers', f'local-dir:{tmp_path / "backbone"}')
    (row,) = train(tmp_path / 'student', '--data-dir', data, *features)
    assert float(row['train_kd_loss']) > 0


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


# Classes, splits and tables


def test_classes_are_counted_in_the_data(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(tmp_path / 'knowing.pth')
    options = ('--data-dir', data, '--initial-checkpoint', tmp_path / 'knowing.pth')
    with caplog.at_level('INFO'):
        rows = train(tmp_path / 'run', *options, standing=UNCOUNTED)
    assert float(rows[0]['eval_top1']) == 100
    assert '4 classes, counted in the training split' in caplog.text


def test_test_images_stand_in_for_a_validation_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    write_folder(tmp_path / 'data' / 'train')
    write_folder(tmp_path / 'data' / 'test', 3)
    picture('sun').save(tmp_path / 'data' / 'test' / 'apple' / 'wrong.png')
    save_model(tmp_path / 'knowing.pth')
    options = ('--data-dir', tmp_path / 'data')
    rows = train(tmp_path / 'run', *options, '--initial-checkpoint', tmp_path / 'knowing.pth')
    assert float(rows[0]['eval_top1']) == pytest.approx(100 * 12 / 13)
    assert caplog.text.count('test stands in') == 1
    (row,) = evaluate(tmp_path / 'e.json', f'test_resnet={tmp_path / "knowing.pth"}', *options).values()
    assert (row['samples'], row['top1']) == (13, pytest.approx(100 * 12 / 13))


def table(path: Path, splits: bool) -> Path:
    """A table of colors, one validation image of which has a wrong label, in an order of its own."""
    rows = []
    for split, count in (('train', 4), ('validation', 3)):
        for name in CLASSES:
            write_folder(path.parent / split / name, count, [name])
            rows += [(f'{split}/{name}/{name}/{number:03}.png', name, split) for number in range(count)]
    rows[-1] = (rows[-1][0], 'apple', 'validation')
    lines = [','.join(row if splits else row[:2]) for row in rows[::-1]]
    path.write_text('\n'.join(['path,label,split' if splits else 'path,label', *lines]))
    return path


def test_a_table_of_paths_and_labels_is_trained_evaluated_and_recorded(tmp_path: Path) -> None:
    source = ('--data-dir', table(tmp_path / 'labels.csv', splits=True))
    model = save_model(tmp_path / 'knowing.pth')
    rows = train(tmp_path / 'run', *source, '--initial-checkpoint', tmp_path / 'knowing.pth', standing=UNCOUNTED)
    assert float(rows[0]['train_loss']) < 1e-3
    assert float(rows[0]['eval_top1']) == pytest.approx(100 * 11 / 12)
    (row,) = evaluate(tmp_path / 'e.json', model, *source).values()
    assert (row['samples'], row['top1']) == (12, pytest.approx(100 * 11 / 12))
    words = ['record', *source, '--teachers', model, '--epochs', 1, '--out', tmp_path / 'store', '--workers', 0]
    soft_labels([str(word) for word in (*words, '--img-size', 32, '--no-aug', '--device', 'cpu')])
    stored = ('--soft-labels', tmp_path / 'store', '--initial-checkpoint', tmp_path / 'knowing.pth')
    rows = train(tmp_path / 'student', *source, *stored)
    assert float(rows[0]['train_kl']) == pytest.approx(0, abs=1e-3)


def test_a_share_is_held_out_by_all_programs_alike(tmp_path: Path) -> None:
    source = ('--data-dir', table(tmp_path / 'labels.csv', splits=False))
    model = save_model(tmp_path / 'knowing.pth')
    with pytest.raises(UserError, match=r"no split 'validation' .*--val-share 0.1"):
        train(tmp_path / 'run', *source, '--teachers', model)
    share = (*source, '--val-share', 0.3)  # 2 of 7 images
    for seed in (1, 2):
        train(tmp_path / f'run{seed}', *share, '--teachers', model, '--seed', seed)
        assert preflight(tmp_path / f'run{seed}')['ensemble']['samples'] == 8
    top1 = preflight(tmp_path / 'run1')['ensemble']['top1']
    assert preflight(tmp_path / 'run2')['ensemble']['top1'] == top1
    (row,) = evaluate(tmp_path / 'e.json', model, *share).values()
    assert (row['samples'], row['top1']) == (8, top1)
    (row,) = evaluate(tmp_path / 'e.json', model, *share, '--split', 'train').values()
    assert row['samples'] == 20
    words = ['record', *share, '--teachers', model, '--epochs', 1, '--out', tmp_path / 'store', '--workers', 0]
    soft_labels([str(word) for word in (*words, '--img-size', 32, '--no-aug', '--device', 'cpu')])
    assert SoftLabelStore(tmp_path / 'store').meta.images == 20
    with pytest.raises(UserError, match='--val-share'):
        train(tmp_path / 'run1', *share[:-1], 0.5, '--teachers', model, '--seed', 1, '--resume', 'auto')
