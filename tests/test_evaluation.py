"""Tests of timm_mealv2/evaluation.py: the metrics against plain NumPy, the program on real files."""

import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import write_images
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.models._hub import save_for_hf
from torch import nn

from timm_mealv2.cli.parser import run_cli
from timm_mealv2.errors import UserError
from timm_mealv2.evaluation import evaluate, main

CPU = torch.device('cpu')


class Lookup(nn.Module):
    """Gives the row of a table that the first pixel of each picture names; the pixel is a whole number."""

    def __init__(self, logits):
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(logits))

    def forward(self, x):
        return self.table[x[:, 0, 0, 0].long()]


def lookup_batches(labels, sizes):
    """Batches of the given sizes; picture i holds the number i."""
    pictures = torch.arange(len(labels), dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2)
    return list(zip(pictures.split(sizes), torch.as_tensor(labels).split(sizes), strict=True))


def softmax(logits):
    logits = np.asarray(logits, dtype=np.float64)
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def expected_calibration_error(p, labels):
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return 100 * error


@pytest.mark.parametrize('classes', [2, 7])
def test_metrics_are_those_of_plain_numpy(classes):
    rng = np.random.default_rng(0)
    logits, reference = (3 * rng.standard_normal((23, classes)).astype(np.float32) for _ in range(2))
    labels = rng.integers(0, classes, 23)
    labels[[0, 9]] = -1

    result = evaluate(
        {'model': Lookup(logits), 'ensemble': Lookup(reference)},
        lookup_batches(labels, [10, 10, 3]),
        device=CPU,
        reference='ensemble',
        calibration=True,
    )

    p, p_reference, known = softmax(logits), softmax(reference), labels >= 0
    rank_of_label = (logits > np.take_along_axis(logits, labels[:, None].clip(0), 1)).sum(axis=1)
    nll = -np.log(np.take_along_axis(p, labels[:, None].clip(0), 1)[known, 0]).mean()
    assert result['model'] == pytest.approx(
        {
            'loss': nll,
            'top1': 100 * (rank_of_label[known] == 0).mean(),
            'top5': 100 * (rank_of_label[known] < 5).mean(),
            'nll': nll,
            'ece': expected_calibration_error(p[known], labels[known]),
            'agreement': 100 * (p.argmax(axis=1) == p_reference.argmax(axis=1)).mean(),
            'kl': (p_reference * np.log(p_reference / p)).sum(axis=1).mean(),
            'samples': 23,
        },
        rel=1e-5,
    )
    assert set(result['ensemble']) == {'loss', 'top1', 'top5', 'nll', 'ece', 'samples'}


def test_without_labels_only_the_comparison_is_returned():
    table = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    result = evaluate(
        {'model': Lookup(table), 'same': Lookup(table + 1)},
        lookup_batches([-1] * 6, [4, 2]),
        device=CPU,
        reference='same',
        calibration=True,
    )
    assert result['same'] == {'samples': 6}
    assert result['model'] == pytest.approx({'agreement': 100, 'kl': 0, 'samples': 6}, abs=1e-6)


def test_a_reference_that_is_sure_gives_a_finite_kl():
    sure = Lookup(torch.tensor([[0.0, -torch.inf, -torch.inf]]))
    model = Lookup(torch.tensor([[0.5, 0.25, 0.25]]).log())
    result = evaluate({'model': model, 'sure': sure}, lookup_batches([0], [1]), device=CPU, reference='sure')
    assert result['model']['kl'] == pytest.approx(np.log(2))


def test_the_criterion_is_the_loss_that_is_reported():
    table = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    batches = lookup_batches([0, 0], [2])
    result = evaluate({'model': Lookup(table)}, batches, device=CPU, criterion=nn.MultiMarginLoss(), calibration=True)
    assert result['model']['loss'] == pytest.approx((0 + 3 / 2) / 2)
    assert result['model']['nll'] == pytest.approx(-np.log(softmax(table.numpy())[:, 0]).mean())


def test_models_are_evaluated_in_eval_mode_and_get_their_own_modes_back():
    model = timm.create_model('test_resnet', num_classes=3, drop_rate=0.5)
    frozen = model.layer1.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    seen = []
    evaluate(
        {'model': model}, [(x, torch.zeros(4).long())], device=CPU, on_output=lambda name, output: seen.append(output)
    )

    assert [module.training for module in model.modules()] == modes
    assert model.training
    assert not frozen.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(seen[0], model.eval()(x).detach())
    model.train()(x).sum().backward()  # nothing in it became an inference tensor


def test_modes_are_restored_after_an_error():
    model = timm.create_model('test_resnet', num_classes=3)
    with pytest.raises(UserError, match='label 3 is beyond the 3 classes of model'):
        evaluate({'model': model}, [(torch.randn(1, 3, 32, 32), torch.tensor([3]))], device=CPU)
    assert model.training


@pytest.mark.parametrize('in_chans', [1, 3])
def test_each_model_gets_pixels_with_its_own_normalisation(in_chans):
    generator = torch.Generator().manual_seed(0)
    half = timm.create_model('test_efficientnet', num_classes=5, in_chans=in_chans)
    half.pretrained_cfg.update(mean=(0.5,) * 3, std=(0.5,) * 3)
    imagenet = timm.create_model('test_resnet', num_classes=5, in_chans=in_chans)
    imagenet.pretrained_cfg.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    pixels = torch.rand(6, in_chans, 32, 32, generator=generator)
    mean, std = (
        (
            torch.tensor(imagenet.pretrained_cfg[key])
            if in_chans == 3
            else torch.tensor(imagenet.pretrained_cfg[key]).mean()
        )
        for key in ('mean', 'std')
    )
    x = (pixels - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)

    seen = {}
    evaluate(
        {'half': half, 'imagenet': imagenet},
        [(x, torch.zeros(6).long())],
        device=CPU,
        data_config=imagenet.pretrained_cfg,
        on_output=seen.__setitem__,
    )

    torch.testing.assert_close(seen['half'], half.eval()((pixels - 0.5) / 0.5).detach())
    assert torch.equal(seen['imagenet'], imagenet.eval()(x).detach())


def test_autocast_and_channels_last_reach_the_models():
    class Probe(nn.Module):
        def forward(self, x):
            assert torch.is_autocast_enabled('cpu')
            assert x.is_contiguous(memory_format=torch.channels_last)
            return x.mean(dim=(2, 3))

    batches = [(torch.rand(2, 3, 4, 4), torch.tensor([0, 1]))]
    evaluate({'probe': Probe()}, batches, device=CPU, channels_last=True, autocast=lambda: torch.autocast('cpu'))


def distributed_evaluation(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    saved = torch.load(folder / 'data.pt', weights_only=True)
    pictures, labels = zip(*lookup_batches(saved['labels'], [1] * len(saved['labels'])), strict=True)
    data = torch.utils.data.TensorDataset(torch.cat(pictures), torch.cat(labels))
    loader = torch.utils.data.DataLoader(data, batch_size=2, sampler=OrderedDistributedSampler(data))
    result = evaluate(
        {'model': Lookup(saved['logits']), 'ensemble': Lookup(saved['reference'])},
        loader,
        device=CPU,
        reference='ensemble',
        calibration=True,
        distributed=True,
    )
    (folder / f'{rank}.json').write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_metrics_of_one_without_the_padding(tmp_path):
    generator = torch.Generator().manual_seed(0)
    logits, reference = (torch.randn(7, 4, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 3, -1, 1, 2])
    torch.save({'logits': logits, 'reference': reference, 'labels': labels}, tmp_path / 'data.pt')
    torch.multiprocessing.spawn(distributed_evaluation, args=(tmp_path,), nprocs=2)

    expected = evaluate(
        {'model': Lookup(logits), 'ensemble': Lookup(reference)},
        lookup_batches(labels, [7]),
        device=CPU,
        reference='ensemble',
        calibration=True,
    )
    for rank in range(2):
        result = json.loads((tmp_path / f'{rank}.json').read_text())
        for name, metrics in expected.items():
            assert result[name] == pytest.approx(metrics, rel=1e-6)


def test_what_cannot_be_evaluated_is_refused():
    three, four = Lookup(torch.zeros(2, 3)), Lookup(torch.zeros(2, 4))
    batches = lookup_batches([0, 1], [2])
    with pytest.raises(UserError, match='must be one of the models'):
        evaluate({'model': three}, batches, device=CPU, reference='ensemble')
    with pytest.raises(UserError, match='three has 3 classes, four 4'):
        evaluate({'three': three, 'four': four}, batches, device=CPU, reference='four')
    with pytest.raises(UserError, match='no image'):
        evaluate({'model': three}, [], device=CPU)


# The program


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
    assert 'given twice' in refused(capsys, *args, '--teachers', teacher, *classes, classes[1])
    assert 'must be TEACHER=FILE' in refused(capsys, *args, '--teachers', teacher, '--teacher-classes', 'classes.txt')
    (tmp_path / 'classes.txt').write_text('4\nfour\n')
    assert "line 2 must be one class index, got 'four'" in refused(capsys, *args, '--teachers', teacher, *classes)
    (tmp_path / 'classes.txt').unlink()
    assert 'cannot read' in refused(capsys, *args, '--teachers', teacher, *classes)


def test_a_model_agrees_with_the_ensemble_of_itself_whatever_its_normalisation(tmp_path, image_folder, capsys):
    save_folder(tmp_path / 'folder', mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    other = f'test_resnet={tmp_path}/other.pth'
    save_model(tmp_path / 'other.pth')
    name = f'local-dir:{tmp_path}/folder'
    table = run(capsys, name, other, '--teachers', name, '--data-dir', image_folder, '-j', 0)
    assert table[name]['agreement'] == '100.00'
    assert table[name]['KL'] == '0.0000'
    assert table[name]['loss'] == table['ensemble']['loss']
    assert table[other]['KL'] > '0.0000'


def test_grey_models_see_grey_pictures(tmp_path, capsys):
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
    (tmp_path / 'real.json').write_text('[[1]')
    assert 'expects a JSON list' in refused(capsys, *args, '--real-labels', tmp_path / 'real.json')


def test_unlabelled_pictures_give_agreement_alone(tmp_path, image_folder, capsys):
    save_model(tmp_path / 'a.pth')
    save_model(tmp_path / 'b.pth', seed=1)
    a, b = f'test_resnet={tmp_path}/a.pth', f'test_resnet={tmp_path}/b.pth'
    table = run(capsys, a, '--teachers', a, b, '--data-dir', image_folder / 'train', '-j', 0, '--unlabeled')
    assert list(table[a]) == ['images', 'agreement', 'KL']
    assert table[a]['images'] == '21'


def test_mistakes_are_one_line(tmp_path, image_folder, capsys):
    save_model(tmp_path / 'm.pth')
    save_model(tmp_path / 'two.pth', num_classes=2)
    good, two = f'test_resnet={tmp_path}/m.pth', f'test_resnet={tmp_path}/two.pth'
    data = ['--data-dir', image_folder, '-j', 0]
    assert "'resnet5o' is no timm model" in refused(capsys, 'resnet5o', *data)
    assert 'no such file' in refused(capsys, f'test_resnet={tmp_path}/none.pth', *data)
    assert 'data is missing' in refused(capsys, good)
    assert 'does not exist' in refused(capsys, good, '--data-dir', tmp_path / 'none')
    assert 'Found 0 images' in refused(capsys, good, *data, '--imagenet-v2')
    assert 'Cannot locate specified class map' in refused(capsys, good, *data, '--class-map', 'none.txt')
    assert '2 classes' in refused(capsys, two, *data)
    assert '3 classes, ensemble 2' in refused(capsys, good, *data, '--teachers', two)
    assert 'needs --teachers' in refused(capsys, good, *data, '--teacher-weights', 1)
    assert 'without --teachers' in refused(capsys, good, *data, '--unlabeled')
    assert 'there is no folder' in refused(capsys, good, *data, '--json', tmp_path / 'none' / 'r.json')
    assert 'is a folder' in refused(capsys, good, *data, '--json', tmp_path)
    assert '--split test: there is no such folder' in refused(capsys, good, *data, '--split', 'test')
    assert '--batch-size must be' in refused(capsys, good, *data, '-b', 0)
    assert '--workers must be 0 or more' in refused(capsys, good, *data, '-j', -1)
    assert '--device abc' in refused(capsys, good, *data, '--device', 'abc')
    assert 'not allowed with' in refused(capsys, good, *data, '--unlabeled', '--imagenet-v2')


def test_it_runs_as_a_module(tmp_path, image_folder):
    save_model(tmp_path / 'm.pth')
    command = [sys.executable, '-m', 'timm_mealv2.evaluation', f'test_resnet={tmp_path}/m.pth']
    result = subprocess.run(
        [*command, '--data-dir', image_folder, '-j', '1'], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, '')
    assert result.stdout.startswith('model')
