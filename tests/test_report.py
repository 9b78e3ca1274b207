"""The report: what is in a run folder is drawn, and a folder that holds none is refused in one line."""

import argparse
import json
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from timm_mealv2 import report, runs
from timm_mealv2.errors import UserError

HEADER = 'epoch,train_loss,train_kl,train_discriminator_accuracy,eval_loss,eval_top1,eval_top5,lr,images_per_second'


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of four epochs, every second of which was evaluated; epoch 2 is the best."""
    folder = tmp_path / 'first <run>'
    folder.mkdir()
    rows = [
        '0,1.5,0.51,50,,,,0.1,900',
        '1,1.25,0.42,75,1.3,51.5,91,0.1,1000.5',
        '2,1.125,0.33,75,1.2,77.75,92,0.01,1000',
        '3,1.0625,0.24,75,1.1,62.5,93,0.01,1000',
    ]
    (folder / 'summary.csv').write_text('\n'.join([HEADER, *rows]) + '\n')
    (folder / 'args.yaml').write_text(
        'model: resnet10t\nlr: 0.1\nteachers: [<a>, b]\neval_metric: top1\nsched: cosine\n'
    )
    return folder


def page_of(*folders: Path) -> str:
    """The page of these runs, each labeled by its folder's name; the pictures in it are none."""
    read = {folder.name: runs.read_run(folder) for folder in folders}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, 'picture', lambda figure, **_: f'data:{figure.axes[0].get_title()}')
        page = report.write_report(read, folders[0] / 'report.html', {'sched': 'cosine'}).read_text()
    return page.replace('<wbr>', '').replace('&#8203;', '')


def cell(page: str, name: str) -> str:
    """The first cell of a row."""
    (value,) = re.findall(rf'<td>{re.escape(name)}</td><td data-head="[^"]*">([^<]*)</td>', page)
    return str(value)


def test_an_epoch_without_evaluation_has_no_value(run: Path) -> None:
    read = runs.read_run(run)
    assert read.epochs == [0, 1, 2, 3]
    assert read.values('eval_top1') == [(1, 51.5), (2, 77.75), (3, 62.5)]
    assert read.values('lr') == [(0, 0.1), (1, 0.1), (2, 0.01), (3, 0.01)]
    assert read.values('no_such_column') == []
    assert read.settings['teachers'] == ['<a>', 'b']


def test_curves_show_the_columns_that_are_there_in_percent_and_from_the_first_epoch(run: Path, tmp_path: Path) -> None:
    figures = []
    original = report.Figure.savefig

    def remember(figure: report.Figure, *args: object, **kwargs: object) -> None:
        figures.append(figure)
        original(figure, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.Figure, 'savefig', remember)
        out = report.draw_runs({name: runs.read_run(run) for name in ('start', 'control')}, tmp_path / 'curves.png')
    with Image.open(out) as image:
        image.load()
        assert image.width > 1000
    panels = {axes.get_title(): axes for axes in figures[0].axes}
    assert 'Agreement with the teachers' not in panels
    curves = {line.get_label(): line for line in panels['Top-1 accuracy'].get_lines()}
    assert list(curves['start: top-1'].get_xdata()) == [2, 3, 4]
    assert list(curves['control: top-1'].get_ydata()) == [51.5, 77.75, 62.5]
    assert list(panels['Discriminator'].get_lines()[0].get_ydata()) == [50, 75, 75, 75]
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in panels.values())


def test_the_page_has_everything_in_it(run: Path) -> None:
    assert 'href' not in page_of(run)
    (run / 'evaluation.html').touch()
    text = page_of(run)
    assert '<a href="evaluation.html">' in text
    assert '<h1>first &lt;run&gt;</h1>' in text
    assert '<th>best epoch (3)</th><th>last epoch (4)</th>' in text
    top1 = next(line for line in text.splitlines() if '<td>eval_top1</td>' in line)
    assert '>62.50<' in top1
    assert '>77.75<' in top1
    assert cell(text, 'model') == 'resnet10t'
    assert '&lt;a&gt;' in text
    assert 'src="data:Top-1 accuracy"' in text
    assert 'cosine' not in text  # the default
    for external in ('http://', 'https://', '<link', '<script', 'src="/', '@import'):
        assert external not in text


def test_settings_that_differ_between_runs_stand_out(run: Path, tmp_path: Path) -> None:
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'summary.csv').write_text('epoch,train_loss,lr\n0,1.0,0.5\n')
    (other / 'args.yaml').write_text('model: resnet10t\nlr: 0.5\n')
    text = page_of(run, other)
    differing, same = text.split('<h2>Settings that differ</h2>')[1].split('<h2>Curves</h2>')
    assert '<tr><td>lr</td><td data-head="first &lt;run&gt;">0.1</td><td data-head="other">0.5</td></tr>' in differing
    assert '<tr><td>model</td><td data-head="value">resnet10t</td></tr>' in same
    assert 'other, best epoch' not in text  # it was never evaluated


def test_a_run_without_labels_is_drawn_and_its_best_epoch_is_that_of_agreement(tmp_path: Path) -> None:
    (tmp_path / 'summary.csv').write_text(
        'epoch,train_loss,eval_agreement,eval_kl,lr\n0,1,80,0.5,0.1\n1,1,90,0.4,0.1\n2,1,85,0.3,0.1\n'
    )
    (tmp_path / 'args.yaml').write_text('eval_metric: top1\n')
    text = page_of(tmp_path)
    assert 'best epoch (2)' in text
    assert cell(text, 'same top-1 as teachers, %: best epoch') == '90.00 (epoch 2)'
    assert 'src="data:Agreement with the teachers"' in text


def test_an_epoch_of_nan_is_not_the_best(tmp_path: Path) -> None:
    for metric, best in (('top1', 3), ('loss', 2)):
        (tmp_path / 'summary.csv').write_text('epoch,eval_top1,eval_loss\n0,nan,nan\n1,50,1\n2,60,2\n3,nan,nan\n')
        (tmp_path / 'args.yaml').write_text(f'eval_metric: {metric}\n')
        assert f'best epoch ({best})' in page_of(tmp_path)


@pytest.mark.parametrize('content', [None, '', HEADER + '\n'])
def test_what_is_no_run_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / 'summary.csv').write_text(content)
    with pytest.raises(UserError, match=f'{tmp_path} has no finished epoch'):
        runs.read_run(tmp_path)


def test_drawing_leaves_pyplot_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'matplotlib.pyplot', None)  # an import would fail
    assert report.draw_runs({'run': runs.read_run(run)}, run / 'curves.png').is_file()


def test_the_headline_has_the_student_beside_its_teachers_and_its_initial_weights(run: Path, tmp_path: Path) -> None:
    rows = {
        'ensemble': {'top1': 92.5, 'samples': 2000},
        'teacher local-dir:/models/great': {'top1': 91.25, 'samples': 2000},
        'student (initial)': {'top1': 8.5, 'loss': None, 'samples': 2000},
    }
    (run / 'preflight.json').write_text(json.dumps(rows))
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.Figure, 'savefig', lambda figure, *_, **__: figures.append(figure))
        report.draw_runs({'run': runs.read_run(run)}, tmp_path / 'curves.png')
    top1 = next(axes for axes in figures[0].axes if axes.get_title() == 'Top-1 accuracy')
    curve, *lines = top1.get_lines()
    assert list(curve.get_xdata()) == [0, 2, 3, 4]
    assert list(curve.get_ydata()) == [8.5, 51.5, 77.75, 62.5]
    assert [line.get_label() for line in lines] == ['ensemble (92.50)', 'teacher models/great (91.25)']
    text = page_of(run)
    for name, value in (('ensemble', '92.50'), ('teacher models/great', '91.25'), ('student (initial)', '8.50')):
        assert cell(text, f'top-1, %: {name}') == value
    assert cell(text, 'top-1, %: best epoch') == '77.75 (epoch 3)'
    assert cell(text, 'top-1, %: last epoch') == '62.50 (epoch 4)'
    assert cell(text, 'images evaluated on') == '2000'


def test_the_headline_says_how_long_it_took_and_where_the_time_went(tmp_path: Path) -> None:
    rows = ['epoch,train_loss,images_per_second,time_data,time_teachers,time_student,time_update']
    rows += ['0,1.5,100,0.5,2,1,0.5', '1,1.25,50,0.5,2,1,0.5']
    (tmp_path / 'summary.csv').write_text('\n'.join(rows) + '\n')
    settings = argparse.Namespace(model='test_resnet', batch_size=8, world_size=2)
    model = timm.create_model('test_resnet')
    torch.save(
        {'state_dict': model.state_dict(), 'arch': 'test_resnet', 'args': settings, 'batches': 1125},
        tmp_path / 'last.pth.tar',
    )
    text = page_of(tmp_path)
    # 18,000 images an epoch: 180 s and 360 s.
    figures = {'training, without evaluation': '9 minutes', 'GMACs an image': f'{runs.model_cost(model)[1]:.3g}'}
    for name, value in figures.items():
        assert cell(text, name) == value
    assert cell(text, 'time_teachers') == '2'
    assert 'src="data:Time of a batch"' in text


def test_parameters_and_multiplications_are_those_of_the_network() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1, bias=False), torch.nn.Flatten())
    model.pretrained_cfg = {'input_size': (3, 8, 8)}
    assert runs.model_cost(model) == (108, pytest.approx(108 * 64 / 1e9))


def test_teachers_are_told_apart_by_as_much_of_their_paths_as_it_takes() -> None:
    models = ['ensemble', 'teacher local-dir:/x/a/last.pth.tar', 'teacher local-dir:/x/b/last.pth.tar']
    assert list(runs.short_names(models).values()) == ['ensemble', 'teacher a/last.pth.tar', 'teacher b/last.pth.tar']
    models = ['teacher local-dir:/x/a/last.pth.tar', 'teacher local-dir:/y/a/last.pth.tar']
    assert list(runs.short_names(models).values()) == models
