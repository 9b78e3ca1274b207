"""Tests of timm_mealv2/cli/evaluate.py: the program on real files."""

import csv
import json
import resource
import shutil

import numpy as np
import pytest
import timm
import torch
from images import write_images
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.models import save_for_hf
from torch import nn

from timm_mealv2.cli.evaluate import main
from timm_mealv2.command_line import run_cli
from timm_mealv2.data.dataset import open_dataset
from timm_mealv2.evaluation_page import count_confusions, write_page
from timm_mealv2.predictions import Predictions

CPU = torch.device('cpu')


def run(capsys, *argv):
    main([str(arg) for arg in argv])
    lines = capsys.readouterr().out.splitlines()
    heading, *rows = (line.split() for line in lines)
    return {row[0]: dict(zip(heading[1:], row[1:], strict=True)) for row in rows}


def refused(capsys, *argv):
    """The one line that a program that exits with 2 says."""
    with pytest.raises(SystemExit) as caught:
        run_cli(main, [str(arg) for arg in argv])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def save_model(path, name='test_resnet', num_classes=3, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=num_classes, **kwargs)
    torch.save(model.state_dict(), path)
    return model.eval()


def save_folder(path, seed=0, in_chans=3, **cfg):
    """An exported model of three classes, as the hub functions of timm write it."""
    torch.manual_seed(seed)
    model = timm.create_model('test_efficientnet', num_classes=3, in_chans=in_chans)
    model.pretrained_cfg.update(input_size=(in_chans, 32, 32), num_classes=3, crop_pct=1.0, **cfg)
    save_for_hf(model, path, model_args={'in_chans': in_chans}, safe_serialization=True)
    return model.eval()


def outputs_by_hand(model, folder, mode='RGB'):
    """Logits and labels of all images of a folder."""
    config = resolve_model_data_config(model)
    data = create_dataset('', root=folder, input_img_mode=mode)
    config['input_size'] = (1 if mode == 'L' else 3, *config['input_size'][1:])
    loader = create_loader(data, batch_size=5, num_workers=0, device=CPU, **config)
    with torch.no_grad():
        return tuple(torch.cat(parts) for parts in zip(*((model(x), target) for x, target in loader), strict=True))


def accuracy_by_hand(model, folder, mode='RGB'):
    output, target = outputs_by_hand(model, folder, mode)
    return 100 * (output.argmax(1) == target).double().mean().item()


def test_program_reports_models_of_every_kind_and_their_ensemble(tmp_path, image_folder, capsys):
    bare = save_model(tmp_path / 'bare.pth')
    folder = save_folder(
        tmp_path / 'folder', seed=1, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation='bilinear'
    )
    names = [f'test_resnet={tmp_path}/bare.pth', f'local-dir:{tmp_path}/folder']
    common = ['--data-dir', image_folder, '-j', 0, '-b', 5, '--device', 'cpu']
    table = run(
        capsys,
        *names,
        '--teachers',
        *names,
        '--teacher-weights',
        1,
        3,
        *common,
        '--calibration',
        '--json',
        tmp_path / 'r.json',
    )

    result = json.loads((tmp_path / 'r.json').read_text())
    assert list(result) == list(table) == [*names, 'ensemble']
    for name, model in zip(names, (bare, folder), strict=True):
        assert result[name]['top1'] == pytest.approx(accuracy_by_hand(model, image_folder / 'validation'))
        assert result[name]['top5'] == 100
        assert result[name]['parameters'] == sum(p.numel() for p in model.parameters())
        assert result[name]['data_config'] == json.loads(json.dumps(resolve_model_data_config(model)))
        assert 0 <= result[name]['agreement'] <= 100
        assert result[name]['kl'] > 0
        assert table[name] == {
            'images': '12',
            'top-1': f'{result[name]["top1"]:.2f}',
            'top-5': '100.00',
            'loss': f'{result[name]["loss"]:.4f}',
            'NLL': f'{result[name]["nll"]:.4f}',
            'ECE': f'{result[name]["ece"]:.2f}',
            'agreement': f'{result[name]["agreement"]:.2f}',
            'KL': f'{result[name]["kl"]:.4f}',
        }
    # The ensemble's own pixels are those of its first teacher, whose row has been evaluated in the same pass.
    assert result['ensemble']['data_config'] == result[names[0]]['data_config']
    assert table['ensemble']['KL'] == '-'


def test_each_student_is_measured_at_its_own_size_in_one_call(tmp_path, capsys):
    write_images(tmp_path / 'data', 1, seed=1)
    for folder in sorted((tmp_path / 'data').iterdir())[1:]:  # an image of 380 pixels takes seconds
        shutil.rmtree(folder)
    expected, names = {}, []
    for tagged in ('mealv2_mobilenetv3_small_075.in1k', 'mealv2_resnet50.in1k_380'):
        torch.manual_seed(0)
        model = timm.create_model(tagged, num_classes=3)
        torch.save(model.state_dict(), tmp_path / f'{tagged}.pth')
        names.append(f'{tagged}={tmp_path / tagged}.pth')
        expected[names[-1]] = nn.functional.cross_entropy(*outputs_by_hand(model.eval(), tmp_path / 'data')).item()
    run(capsys, *names, '--data-dir', tmp_path / 'data', '-j', 0, '--json', tmp_path / 'r.json')
    result = json.loads((tmp_path / 'r.json').read_text())
    assert {name: row['loss'] for name, row in result.items()} == pytest.approx(expected, rel=1e-5)
    assert [row['data_config']['input_size'] for row in result.values()] == [[3, 224, 224], [3, 380, 380]]
    for row in result.values():
        assert row['data_config'] | {'interpolation': 'bilinear', 'crop_pct': 0.875} == row['data_config']


def test_a_teacher_with_more_classes_serves_those_of_the_models(tmp_path, image_folder, capsys):
    wide = save_model(tmp_path / 'wide.pth', num_classes=5)
    chosen = [4, 0, 2]
    narrow = timm.create_model('test_resnet', num_classes=3)
    state = {key: value[chosen] if key.startswith('fc.') else value for key, value in wide.state_dict().items()}
    narrow.load_state_dict(state)
    torch.save(narrow.state_dict(), tmp_path / 'narrow.pth')
    (tmp_path / 'classes.txt').write_text('# of the five\n4  # cold\n\n0\n2\n')
    model, teacher = (f'test_resnet={tmp_path}/{name}.pth' for name in ('narrow', 'wide'))
    args = [model, '--data-dir', image_folder, '-j', 0]
    classes = ['--teacher-classes', f'{teacher}={tmp_path}/classes.txt']
    table = run(capsys, *args, '--teachers', teacher, *classes)
    assert (table[model]['agreement'], table[model]['KL']) == ('100.00', '0.0000')
    assert table['ensemble']['top-1'] == table[model]['top-1']

    assert '3 classes, ensemble 5' in refused(capsys, *args, '--teachers', teacher)
    assert 'needs --teachers' in refused(capsys, *args, *classes)
    assert 'is no teacher' in refused(capsys, *args, '--teachers', model, *classes)
    assert 'must be TEACHER=FILE' in refused(capsys, *args, '--teachers', teacher, '--teacher-classes', 'classes.txt')
    (tmp_path / 'classes.txt').write_text('4\nfour\n')
    assert 'a class index a line' in refused(capsys, *args, '--teachers', teacher, *classes)


def test_a_model_agrees_with_the_ensemble_of_itself_whatever_its_normalization(tmp_path, image_folder, capsys):
    save_folder(tmp_path / 'folder', mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    other = f'test_resnet={tmp_path}/other.pth'
    save_model(tmp_path / 'other.pth')
    name = f'local-dir:{tmp_path}/folder'
    table = run(capsys, name, other, '--teachers', name, '--data-dir', image_folder, '-j', 0)
    assert table[name]['agreement'] == '100.00'
    assert table[name]['KL'] == '0.0000'
    assert table[name]['loss'] == table['ensemble']['loss']
    assert table[other]['KL'] > '0.0000'


def test_gray_models_see_gray_pictures(tmp_path, capsys):
    write_images(tmp_path / 'data', 4, seed=1, mode='L')
    model = save_folder(tmp_path / 'folder', in_chans=1, mean=(0.3,), std=(0.2,))
    run(capsys, f'local-dir:{tmp_path}/folder', '--data-dir', tmp_path / 'data', '-j', 0, '--json', tmp_path / 'r.json')
    (result,) = json.loads((tmp_path / 'r.json').read_text()).values()
    assert result['top1'] == pytest.approx(accuracy_by_hand(model, tmp_path / 'data', mode='L'))
    assert result['data_config']['input_size'] == [1, 32, 32]


def test_image_size_and_mixed_precision(tmp_path, image_folder, capsys):
    save_model(tmp_path / 'resnet.pth')
    resnet = f'test_resnet={tmp_path}/resnet.pth'
    common = ['--data-dir', image_folder, '-j', 0, '--img-size', 48, '--json', tmp_path / 'r.json']
    run(capsys, resnet, *common)
    full = json.loads((tmp_path / 'r.json').read_text())[resnet]
    run(capsys, resnet, *common, '--amp', '--amp-dtype', 'bfloat16')
    mixed = json.loads((tmp_path / 'r.json').read_text())[resnet]
    assert mixed['data_config']['input_size'] == [3, 48, 48]
    assert mixed['loss'] != full['loss']
    assert mixed['loss'] == pytest.approx(full['loss'], rel=0.05)


def test_several_sizes_stand_in_one_table(tmp_path, image_folder, capsys):
    save_model(tmp_path / 'resnet.pth')
    resnet = f'test_resnet={tmp_path}/resnet.pth'
    common = ['--data-dir', image_folder, '-j', 0, '--teachers', resnet, '--json', tmp_path / 'r.json']
    alone = run(capsys, resnet, *common, '--img-size', 48)
    table = run(capsys, resnet, *common, '--img-size', 32, 48)
    assert list(table) == [f'{name}@{size}' for name in (resnet, 'ensemble') for size in (32, 48)]
    assert table[f'{resnet}@48'] == alone[resnet] != table[f'{resnet}@32']
    result = json.loads((tmp_path / 'r.json').read_text())
    assert [row['data_config']['input_size'][1] for row in result.values()] == [32, 48, 32, 48]


def test_folders_of_imagenet_v2_are_class_numbers(tmp_path, capsys):
    model = save_model(tmp_path / 'model.pth', num_classes=1000)
    rng = np.random.default_rng(0)
    for folder in ('999', '10', '2', '0'):
        (tmp_path / 'data' / folder).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                tmp_path / 'data' / folder / f'{i}.png'
            )
    with torch.no_grad():  # the model says 10 whatever it sees, then 2, then 999
        for parameter in model.fc.parameters():
            parameter.zero_()
        model.fc.bias[[10, 2, 999]] = torch.tensor([3.0, 2.0, 1.0])
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    args = [f'test_resnet={tmp_path}/model.pth', '--data-dir', tmp_path / 'data', '-j', 0, '--imagenet-v2']
    run(capsys, *args, '--json', tmp_path / 'r.json')
    (result,) = json.loads((tmp_path / 'r.json').read_text()).values()
    logits = np.zeros(1000)
    logits[[10, 2, 999]] = 3, 2, 1
    log_p = logits - np.log(np.exp(logits).sum())
    assert result['top1'] == 25
    assert result['top5'] >= 75
    assert result['loss'] == pytest.approx(-log_p[[999, 10, 2, 0]].mean())
    assert result['samples'] == 12


def test_real_labels_accept_any_of_an_images_labels(tmp_path, capsys):
    model = save_model(tmp_path / 'model.pth', num_classes=10)
    with torch.no_grad():  # the model says 7, then 6, 5, ...
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, -1, -2]))
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    for i in range(4):
        folder = tmp_path / 'data' / ('n1' if i % 2 else 'n0')
        folder.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (32, 32)).save(folder / f'ILSVRC2012_val_{i + 1:08}.JPEG')
    (tmp_path / 'real.json').write_text(json.dumps([[1, 7], [], [3], [9]]))
    args = [f'test_resnet={tmp_path}/model.pth', '--data-dir', tmp_path / 'data', '-j', 0]
    (row,) = run(capsys, *args, '--real-labels', tmp_path / 'real.json').values()
    assert (row['ReaL-1'], row['ReaL-5']) == (f'{100 / 3:.2f}', f'{200 / 3:.2f}')  # the second image counts for nothing
    assert row['images'] == '4'

    (tmp_path / 'real.json').write_text('[[1]]')
    assert 'as many images as labels' in refused(capsys, *args, '--real-labels', tmp_path / 'real.json')
    assert 'there is no such file' in refused(capsys, *args, '--real-labels', tmp_path / 'none.json')


def test_unlabeled_pictures_give_agreement_alone(tmp_path, image_folder, capsys):
    save_model(tmp_path / 'a.pth')
    save_model(tmp_path / 'b.pth', seed=1)
    a, b = f'test_resnet={tmp_path}/a.pth', f'test_resnet={tmp_path}/b.pth'
    table = run(capsys, a, '--teachers', a, b, '--data-dir', image_folder / 'train', '-j', 1, '--unlabeled')
    assert list(table[a]) == ['images', 'agreement', 'KL']
    assert table[a]['images'] == '21'


LENET = """
from torch import nn

class LeNet(nn.Module):
    num_classes = 3

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc = nn.Linear(16 * 53 * 53, 3)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.conv1(x).relu(), 2)
        x = nn.functional.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc(x.view(-1, 16 * 53 * 53))

model = LeNet()

def make():
    return model
"""


def test_the_tutorials_lenet_is_evaluated(tmp_path, image_folder, capsys, monkeypatch):
    (tmp_path / 'lenet_of_tutorial.py').write_text(LENET)
    monkeypatch.syspath_prepend(tmp_path)
    name = 'python:lenet_of_tutorial:make'
    table = run(capsys, name, '--data-dir', image_folder, '-j', 0)
    assert table[name]['images'] == '12'


def test_an_image_that_cannot_be_read_is_left_out_named_and_counted(tmp_path, capsys, caplog):
    write_images(tmp_path / 'data', 3, seed=1)
    model = save_model(tmp_path / 'model.pth')
    whole = tmp_path / 'data' / 'plain' / '001.png'
    whole.unlink()
    expected = accuracy_by_hand(model, tmp_path / 'data')
    whole.write_bytes(b'no image')
    main([str(arg) for arg in (f'test_resnet={tmp_path}/model.pth', '--data-dir', tmp_path / 'data', '-j', 0)])
    *_, row, said = capsys.readouterr().out.splitlines()
    assert row.split()[1:3] == ['8', f'{expected:.2f}']
    assert said == 'Images that cannot be read and are left out: 1'
    assert '001.png' in caplog.text


def test_a_model_that_predicts_nan_has_null_in_the_json(tmp_path, image_folder, capsys):
    model = save_model(tmp_path / 'model.pth')
    nn.init.constant_(model.fc.bias, torch.nan)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    name = f'test_resnet={tmp_path}/model.pth'
    table = run(capsys, name, '--data-dir', image_folder, '-j', 0, '--json', tmp_path / 'r.json')
    assert table[name]['top-1'] == table[name]['loss'] == 'nan'
    result = json.loads((tmp_path / 'r.json').read_text(), parse_constant=pytest.fail)[name]
    assert (result['top1'], result['loss'], result['samples']) == (None, None, 12)


def test_mistakes_are_one_line(tmp_path, image_folder, capsys):
    save_model(tmp_path / 'm.pth')
    save_model(tmp_path / 'two.pth', num_classes=2)
    good, two = f'test_resnet={tmp_path}/m.pth', f'test_resnet={tmp_path}/two.pth'
    data = ['--data-dir', image_folder, '-j', 0]
    assert "'resnet5o' is no timm model" in refused(capsys, 'resnet5o', *data)
    assert 'no such file' in refused(capsys, f'test_resnet={tmp_path}/none.pth', *data)
    assert 'no data set is named' in refused(capsys, good)
    assert 'no data set at' in refused(capsys, good, '--data-dir', tmp_path / 'none')
    assert 'holds no images' in refused(capsys, good, *data, '--imagenet-v2')
    assert 'Cannot locate specified class map' in refused(capsys, good, *data, '--class-map', 'none.txt')
    assert '2 classes' in refused(capsys, two, *data)
    assert '3 classes, ensemble 2' in refused(capsys, good, *data, '--teachers', two)
    assert 'needs --teachers' in refused(capsys, good, *data, '--teacher-weights', 1)
    assert 'a folder that is there' in refused(capsys, good, *data, '--json', tmp_path / 'none' / 'r.json')
    assert 'a folder that is there' in refused(capsys, good, *data, '--predictions', tmp_path)
    assert "no split 'test'" in refused(capsys, good, *data, '--split', 'test')
    assert '--batch-size: must be 1 or more' in refused(capsys, good, *data, '-b', 0)
    assert '--workers: must be 0 or more' in refused(capsys, good, *data, '-j', -1)
    assert '--device' in refused(capsys, good, *data, '--device', 'abc')


@pytest.mark.parametrize('labeled', [True, False])
def test_predictions_are_written_for_each_image_that_can_be_read(tmp_path, spoilt, capsys, labeled):
    model = save_model(tmp_path / 'a.pth')
    save_model(tmp_path / 'b.pth', seed=1)
    folder = spoilt / 'validation'
    broken = sorted(folder.rglob('*.png'))[5]
    expected, targets = outputs_by_hand(model, folder)
    broken.write_bytes(b'no image')
    kept = [index for index in range(12) if index != 5]
    name = f'test_resnet={tmp_path}/a.pth'
    options = ['--data-dir', folder, '-j', 0, '-b', 5, '--device', 'cpu', *([] if labeled else ['--unlabeled'])]
    main(
        [str(arg) for arg in (name, '--teachers', f'test_resnet={tmp_path}/b.pth', *options)]
        + ['--predictions', str(tmp_path / 'p.csv'), '--report', str(tmp_path / 'page')]
    )
    with (tmp_path / 'p.csv').open(newline='') as file:
        rows = [row for row in csv.DictReader(file) if row['model'] == name]
    assert len(rows) == 11
    assert str(broken.relative_to(folder)) not in [row['filename'] for row in rows]
    probabilities, classes = expected[kept].softmax(1).topk(3)
    names = sorted(path.name for path in folder.iterdir())
    for row, target, top, probs in zip(rows, targets[kept].tolist(), classes.tolist(), probabilities, strict=True):
        assert row['target'] == (str(target) if labeled else '')
        assert row['filename'].split('/')[0] == names[target]
        assert [row[f'index_{k}'] for k in range(3)] == [str(index) for index in top]
        known = names if labeled else '012'  # the model has no names, and is taken to be in the folders' order
        assert [row[f'label_{k}'] for k in range(3)] == [known[index] for index in top]
        assert [float(row[f'prob_{k}']) for k in range(3)] == pytest.approx(probs.tolist(), abs=1e-5)
    assert [path.name for path in (tmp_path / 'page').iterdir()] == ['evaluation.html']
    text = (tmp_path / 'page/evaluation.html').read_text()
    assert 'of 11 images' in text
    assert ('src="data:image/png;base64,' in text) == labeled
    assert 'http' not in text


def test_a_page_of_many_classes_takes_no_matrix_of_them_all(tmp_path, image_folder):
    """Confusions among the classes with most errors, from 4 images of 12; of 20,000 classes the matrix is 3.2 GB."""
    data = open_dataset('', str(image_folder), 'validation')
    targets = torch.tensor([19_999, 19_999, 7, 5])
    classes = torch.tensor([[7, 0], [19_999, 0], [7, 0], [19_999, 0]])
    names = list(map(str, range(20_000)))
    predictions = Predictions(names, targets, classes, torch.tensor([[0.9, 0.1]]).expand(4, -1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    metrics = {'model': {'top1': 25.0}}
    write_page(tmp_path / 'e.html', metrics, {'model': predictions}, data, range(4), data.filenames()[:4])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert 'data:image/png' in (tmp_path / 'e.html').read_text()
    confusion = count_confusions(targets, classes[:, 0], torch.tensor([5, 7, 19_999]))
    assert confusion.tolist() == [[0, 0, 1], [0, 1, 0], [0, 1, 1]]


def test_the_results_are_there_when_the_page_fails(tmp_path, image_folder, monkeypatch):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr('timm_mealv2.cli.evaluate.write_page', fail)
    save_model(tmp_path / 'a.pth')
    options = ['--data-dir', image_folder, '-j', 0, '--json', tmp_path / 'r.json', '--report', tmp_path / 'page']
    with pytest.raises(MemoryError):
        main([str(arg) for arg in (f'test_resnet={tmp_path}/a.pth', *options)])
    (row,) = json.loads((tmp_path / 'r.json').read_text()).values()
    assert row['samples'] == 12


def test_file_names_that_are_not_utf_8_are_shown_by_their_numbers(tmp_path, spoilt, capsys):
    for seed, name in enumerate(('a.pth', 'b.pth')):
        save_model(tmp_path / name, seed=seed)
    for number, image in enumerate(sorted((spoilt / 'validation').rglob('*.png'))):
        image.rename(image.with_name(f'\udcff{number}.png'))
    options = ['--data-dir', spoilt, '-j', 0, '--device', 'cpu', '--teachers', f'test_resnet={tmp_path}/b.pth']
    options += ['--predictions', tmp_path / 'p.csv', '--report', tmp_path / 'page']
    main([str(arg) for arg in (f'test_resnet={tmp_path}/a.pth', *options)])
    for file in (tmp_path / 'p.csv', tmp_path / 'page/evaluation.html'):
        assert r'\udcff' in file.read_text()
