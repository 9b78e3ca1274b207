"""Tests of timm_mealv2/evaluation.py: the metrics against plain NumPy."""

import json

import numpy as np
import pytest
import timm
import torch
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch import nn
from tqdm import tqdm

from timm_mealv2.errors import UserError
from timm_mealv2.evaluation import evaluate, metrics_as_json
from timm_mealv2.models.ensemble import EnsembleTeacher

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


def test_models_are_evaluated_in_eval_mode_and_get_their_own_modes_back():
    model = timm.create_model('test_resnet', num_classes=3, drop_rate=0.5)
    frozen = model.layer1.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    seen = []
    batches = [(x, torch.zeros(4).long())]
    evaluate({'model': model}, batches, device=CPU, on_output=lambda name, *kept: seen.extend(kept))

    assert [module.training for module in model.modules()] == modes
    assert model.training
    assert not frozen.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(seen[0], model.eval()(x).detach())
    assert seen[1].tolist() == [0] * 4
    model.train()(x).sum().backward()  # nothing in it became an inference tensor


def test_modes_are_restored_after_an_error():
    model = timm.create_model('test_resnet', num_classes=3)
    with pytest.raises(UserError, match='label 3 is beyond the 3 classes of model'):
        evaluate({'model': model}, [(torch.randn(1, 3, 32, 32), torch.tensor([3]))], device=CPU)
    assert model.training


@pytest.mark.parametrize('in_chans', [1, 3])
def test_each_model_gets_pixels_with_its_own_normalization(in_chans):
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
        on_output=lambda name, output, target: seen.update({name: output}),
    )

    torch.testing.assert_close(seen['half'], half.eval()((pixels - 0.5) / 0.5).detach())
    assert torch.equal(seen['imagenet'], imagenet.eval()(x).detach())


def test_it_runs_under_the_callers_autocast():
    class Probe(nn.Module):
        def forward(self, x):
            assert torch.is_autocast_enabled('cpu')
            return nn.functional.linear(x.mean(dim=(2, 3)), torch.eye(3))

    with torch.autocast('cpu'):
        result = evaluate({'probe': Probe()}, [(torch.eye(3)[:, :, None, None], torch.arange(3))], calibration=True)
    assert result['probe']['top1'] == 100


@pytest.mark.parametrize('reference_fails', [False, True])
def test_nan_stays_nan_and_is_null_in_json(reference_fails):
    good, broken = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 3)
    broken[2] = torch.nan
    models = {'broken': Lookup(broken), 'good': Lookup(good)}
    reference = 'broken' if reference_fails else 'good'
    result = evaluate(models, lookup_batches([0, 0, 0, 1], [2, 2]), reference=reference, calibration=True)
    labeled = {'loss', 'top1', 'top5', 'nll', 'ece'}
    compared = set(result['good']) ^ set(result['broken'])
    assert compared == {'agreement', 'kl'}
    failed = {(name, key) for name, row in result.items() for key, value in row.items() if np.isnan(value)}
    of_reference = {('good' if reference_fails else 'broken', key) for key in compared}
    assert failed == {('broken', key) for key in labeled} | of_reference
    text = metrics_as_json({**result, 'sure': {'loss': float('inf'), 'samples': 4, 'names': ['a']}})
    rows = json.loads(text, parse_constant=pytest.fail)
    assert (rows['broken']['loss'], rows['sure']['loss'], rows['broken']['samples']) == (None, None, 4)


@pytest.mark.parametrize('weights', [(0.25, 0.75), (0, 1)])
def test_members_are_evaluated_from_the_one_pass_that_makes_the_ensemble(weights):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    runs, teachers = [], []
    for name in ('test_resnet', 'test_vit'):
        teacher = timm.create_model(name, num_classes=5)
        teacher.pretrained_cfg.update(mean=(len(name) / 20,) * 3, std=(0.3,) * 3)
        teacher.register_forward_hook(lambda module, args, output: runs.append(len(output)))
        teachers.append(teacher)
    ensemble = EnsembleTeacher(teachers, weights, names=['a', 'b'])
    student = timm.create_model('test_efficientnet', num_classes=5)
    batches = [(torch.randn(4, 3, 160, 160, generator=generator), torch.tensor([0, 1, 2, -1])) for _ in range(2)]
    models = {'student': student, 'ensemble': ensemble}
    config = {'mean': (0.5,) * 3, 'std': (0.5,) * 3}
    plain = evaluate(models, batches, reference='ensemble', data_config=config)
    runs.clear()
    result = evaluate(models, batches, reference='ensemble', data_config=config, members=True)
    assert runs == [4] * 4  # two teachers, two batches
    assert list(result) == ['student', 'ensemble', 'teacher a', 'teacher b']
    for name in models:
        assert result[name] == pytest.approx(plain[name], rel=1e-5, abs=1e-6)
    alone = {f'teacher {name}': EnsembleTeacher([ensemble.teachers[i]]) for i, name in enumerate(ensemble.names)}
    expected = evaluate({**alone, 'ensemble': ensemble}, batches, reference='ensemble', data_config=config)
    for name in alone:
        assert result[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6)
    assert set(result['ensemble']) == {'loss', 'top1', 'top5', 'samples'}


def test_members_of_one_name_are_numbered():
    teachers = [timm.create_model('test_resnet', num_classes=2) for _ in range(2)]
    ensemble = EnsembleTeacher(teachers, names=['a', 'a'])
    rows = evaluate({'e': ensemble}, [(torch.zeros(1, 3, 32, 32), torch.tensor([0]))], members=True)
    assert list(rows) == ['e', 'teacher a (1)', 'teacher a (2)']


def distributed_evaluation(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    saved = torch.load(folder / 'data.pt', weights_only=True)
    pictures, labels = zip(*lookup_batches(saved['labels'], [1] * len(saved['labels'])), strict=True)
    data = torch.utils.data.TensorDataset(torch.cat(pictures), torch.cat(labels))
    loader = torch.utils.data.DataLoader(data, batch_size=2, sampler=OrderedDistributedSampler(data))
    if rank:  # a bar around the loader hides nothing
        loader = tqdm(loader, disable=True)
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
    torch.multiprocessing.start_processes(distributed_evaluation, args=(tmp_path,), nprocs=2, start_method='fork')

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
    with pytest.raises(UserError, match='three has 3 classes, four 4'):
        evaluate({'three': three, 'four': four}, batches, device=CPU, reference='four')
    with pytest.raises(UserError, match='no image'):
        evaluate({'model': three}, [], device=CPU)
