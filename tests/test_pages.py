"""The pages in a browser: at the width of a phone and of a laptop nothing is cut off, and the console stays empty."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from timm_mealv2.data.dataset import open_dataset
from timm_mealv2.evaluation_page import write_page
from timm_mealv2.predictions import Predictions
from timm_mealv2.report import write_report
from timm_mealv2.runs import Run, read_run

WIDTHS = (400, 1280)

# Elements that are wider than their place, and words of up to 20 letters that go over two lines.
SCRIPT = """
window.onload = () => {
  const found = [];
  for (const frame of document.querySelectorAll('iframe')) {
    const page = frame.contentDocument;
    for (const element of page.querySelectorAll('*'))
      if (element.clientWidth && element.scrollWidth > element.clientWidth)
        found.push([frame.width, element.tagName, element.textContent.slice(0, 60)]);
    const texts = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
    for (let text = texts.nextNode(); text; text = texts.nextNode())
      for (const word of text.data.matchAll(/[A-Za-z0-9.]{2,20}/g)) {
        const range = page.createRange();
        range.setStart(text, word.index);
        range.setEnd(text, word.index + word[0].length);
        if (new Set([...range.getClientRects()].map(box => box.top)).size > 1)
          found.push([frame.width, 'broken', word[0]]);
      }
  }
  document.getElementById('found').textContent = JSON.stringify(found);
};
"""


def write_run(folder: Path, model: str) -> Run:
    """A run folder with all that a page shows, a long name of a teacher and a long setting included."""
    folder.mkdir(parents=True)
    columns = 'loss similarity_loss kl discriminator_loss discriminator_accuracy teacher_agreement grad_norm'.split()
    heads = ['epoch', *(f'train_{name}' for name in columns), *'eval_loss eval_top1 eval_top5 lr'.split()]
    heads += ['images_per_second', 'time_data', 'time_teachers', 'time_student', 'time_update']
    rows = [[epoch, 2, 1.5, 1 / (epoch + 1), 0.7, 51.234, 80, 1.5] for epoch in range(12)]
    rows = [[*row, 1.234567, 50 + row[0], 90, 0.123456789, 123.4, 0.01, 0.2, 0.1, 0.03] for row in rows]
    (folder / 'summary.csv').write_text('\n'.join(','.join(map(str, row)) for row in [heads, *rows]))
    teachers = [f'local-dir:/home/somebody/models/of/a/very/deep/folder/{name}' for name in ('first', 'second')]
    settings = {'model': model, 'lr': 0.1, 'teachers': teachers, 'scale': [0.08, 1.0], 'mixup_mode': 'pair'}
    (folder / 'args.yaml').write_text(json.dumps({**settings, 'experiment': folder.name}))
    names = ['ensemble', *(f'teacher {teacher}' for teacher in teachers), 'student (initial)']
    (folder / 'preflight.json').write_text(json.dumps({name: {'top1': 77.123456, 'samples': 2000} for name in names}))
    return read_run(folder)


@pytest.fixture(scope='module')
def pages(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> list[Path]:
    """A page of one run, of three, and of an evaluation."""
    out = tmp_path_factory.mktemp('pages')
    models = ('resnet18', 'mobilenetv3_small_100', 'vit_base_patch16_clip_224')
    runs = {f'a/{model}': write_run(out / 'a' / model, model) for model in models}
    (label, run), *_ = runs.items()
    data = open_dataset('', str(image_folder), 'validation')
    generator = torch.Generator().manual_seed(0)
    classes = ['plain', 'a class with a long name of several words', 'another']
    targets, probabilities = torch.arange(12) % 3, torch.tensor([[0.7, 0.2, 0.1]]).expand(12, 3)
    orders = (torch.rand(12, 3, generator=generator).argsort(1) for _ in range(2))
    shown, ensemble = (Predictions(classes, targets, order, probabilities) for order in orders)
    shown = replace(shown, ensemble=ensemble)
    metrics = dict.fromkeys(('top1', 'top5', 'loss', 'nll', 'ece', 'agreement', 'kl'), 12.345678) | {'samples': 12}
    name = 'local-dir:/home/somebody/models/of/a/very/deep/folder/student'
    results = {name: metrics, 'ensemble': metrics}
    write_page(out / 'evaluation.html', results, {name: shown}, data, range(12), data.filenames())
    return [
        write_report({label: run}, out / 'one.html'),
        write_report(runs, out / 'three.html'),
        out / 'evaluation.html',
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('chromium') is None, reason='needs chromium, a package of Debian')
def test_pages_fit_and_are_silent(pages: list[Path], tmp_path: Path) -> None:
    for page in pages:
        # A frame for each width: a window of the browser has at least 500 pixels.
        source = html.escape(page.read_text())
        frames = ''.join(f'<iframe width="{width}" height="4000" srcdoc="{source}"></iframe>' for width in WIDTHS)
        (tmp_path / page.name).write_text(f'<p id="found"></p>{frames}<script>{SCRIPT}</script>')
        options = ['--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr', '--window-size=1400,4000']
        result = subprocess.run(
            [
                'chromium',
                *options,
                f'--user-data-dir={tmp_path}/profile',
                '--dump-dom',
                f'file://{tmp_path}/{page.name}',
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        (found,) = re.findall(r'<p id="found">(.*?)</p>', result.stdout)
        assert json.loads(html.unescape(found)) == [], page.name
        assert 'CONSOLE' not in result.stderr
