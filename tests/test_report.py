"""The report: what is in a run folder is drawn, and a folder that holds none is refused in one line."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from timm_mealv2 import report
from timm_mealv2.errors import UserError

HEADER = 'epoch,train_loss,train_kl,train_discriminator_accuracy,eval_loss,eval_top1,eval_top5,lr,images_per_second'


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of four epochs, every second of which was evaluated; epoch 2 is the best."""
    folder = tmp_path / 'first <run>'
    folder.mkdir()
    rows = [
        '0,1.5,0.51,0.5,,,,0.1,900',
        '1,1.25,0.42,0.75,1.3,51.5,91,0.1,1000.5',
        '2,1.125,0.33,0.75,1.2,77.75,92,0.01,1000',
        '3,1.0625,0.24,0.75,1.1,62.5,93,0.01,1000',
    ]
    (folder / 'summary.csv').write_text('\n'.join([HEADER, *rows]) + '\n')
    (folder / 'args.yaml').write_text('model: resnet10t\nlr: 0.1\nteachers: [<a>, b]\neval_metric: top1\n')
    return folder


def test_an_epoch_without_evaluation_has_no_value(run: Path) -> None:
    read = report.read_run(run)
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
        out = report.draw_runs(
            {'start': run, 'control': run},
            tmp_path / 'curves.png',
            first_epochs={'control': 4},
            top1_lines={'ensemble': 92.5},
        )
    with Image.open(out) as image:
        image.load()
        assert image.width > 1000
    panels = {axes.get_title(): axes for axes in figures[0].axes}
    assert 'Agreement with the teachers' not in panels
    curves = {line.get_label(): line for line in panels['Top-1 accuracy'].get_lines()}
    assert list(curves['start'].get_xdata()) == [2, 3, 4]
    assert list(curves['control'].get_xdata()) == [6, 7, 8]
    assert list(curves['control'].get_ydata()) == [51.5, 77.75, 62.5]
    assert set(curves['ensemble (92.50)'].get_ydata()) == {92.5}
    assert list(panels['Discriminator accuracy'].get_lines()[0].get_ydata()) == [50, 75, 75, 75]
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in panels.values())


def test_the_page_has_everything_in_it(run: Path) -> None:
    page = report.write_report(run)
    assert page == run / 'report.html'
    text = page.read_text()
    assert 'first &lt;run&gt;, last epoch (4)' in text
    assert 'first &lt;run&gt;, best epoch (3)' in text
    top1 = next(line for line in text.splitlines() if '<td>eval_top1</td>' in line)
    assert '>62.5<' in top1
    assert '>77.75<' in top1
    assert '<td>resnet10t</td>' in text
    assert '&lt;a&gt;' in text
    assert 'src="data:image/png;base64,iVBOR' in text
    for external in ('http://', 'https://', '<link', '<script', 'src="/', '@import'):
        assert external not in text


def test_settings_that_differ_between_runs_stand_out(run: Path, tmp_path: Path) -> None:
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'summary.csv').write_text('epoch,train_loss,lr\n0,1.0,0.5\n')
    (other / 'args.yaml').write_text('model: resnet10t\nlr: 0.5\n')
    text = report.write_report({'a': run, 'b': other}, tmp_path / 'both.html').read_text()
    assert '<tr class="differs"><td>lr</td><td>0.1</td><td>0.5</td></tr>' in text
    assert '<tr><td>model</td><td>resnet10t</td><td>resnet10t</td></tr>' in text
    assert 'b, best epoch' not in text  # it was never evaluated


def test_a_run_without_labels_is_drawn_and_its_best_epoch_is_that_of_agreement(tmp_path: Path) -> None:
    (tmp_path / 'summary.csv').write_text(
        'epoch,train_loss,eval_agreement,eval_kl,lr\n0,1,80,0.5,0.1\n1,1,90,0.4,0.1\n2,1,85,0.3,0.1\n'
    )
    (tmp_path / 'args.yaml').write_text('eval_metric: top1\n')
    assert 'best epoch (2)' in report.write_report(tmp_path).read_text()
    report.draw_runs({'run': tmp_path}, tmp_path / 'curves.png', panels=['eval_agreement', 'kl'])


def test_an_epoch_of_nan_is_not_the_best(tmp_path: Path) -> None:
    for metric, best in (('top1', 3), ('loss', 2)):
        (tmp_path / 'summary.csv').write_text('epoch,eval_top1,eval_loss\n0,nan,nan\n1,50,1\n2,60,2\n3,nan,nan\n')
        (tmp_path / 'args.yaml').write_text(f'eval_metric: {metric}\n')
        assert f'best epoch ({best})' in report.write_report(tmp_path).read_text()


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (None, 'no summary.csv'),
        ('', 'no epoch yet'),
        (HEADER + '\n', 'no epoch yet'),
        ('time,loss\n1,2\n', 'expected a column epoch'),
        ('epoch,loss\n0,high\n', 'expected a column epoch and numbers'),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / 'summary.csv').write_text(content)
    with pytest.raises(UserError, match=message):
        report.read_run(tmp_path)


def test_drawing_leaves_pyplot_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'matplotlib.pyplot', None)  # an import would fail
    report.write_report(run)
