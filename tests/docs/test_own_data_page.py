"""The commands of docs/own_data.md with tiny models; the CLIP teacher of docs/teachers.md with a stand-in for CLIP."""

import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from colors import CLASSES, COLORS, evaluate, picture, preflight, summary, write_folder

from timm_mealv2.cli import evaluate as mealv2_eval
from timm_mealv2.cli import hub, predict, report, soft_labels
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.training import run

PAGE = runpy.run_path(str(Path(__file__).with_name('test_commands.py')))
ROOT: Path = PAGE['ROOT']
PROGRAMS = {
    'mealv2-train': run.main,
    'mealv2-softlabels': soft_labels.main,
    'mealv2-eval': mealv2_eval.main,
    'mealv2-hub': hub.main,
    'mealv2-predict': predict.main,
    'mealv2-report': report.main,
}
TINY = {
    'convnext_tiny.in12k_ft_in1k': 'test_convnext',
    'resnet50.a1_in1k': 'test_resnet',
    'mobilenetv3_large_100.ra_in1k': 'test_efficientnet',
}
SHORT = '--img-size 32 --batch-size 4 --epochs 1 --workers 0 --device cpu'.split()


def test_from_pretrained_models_to_a_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(Path('DATA/train'))
    write_folder(Path('DATA/val'), 2)
    picture('sea').save('picture.jpg')
    for name in TINY.values():
        torch.save(timm.create_model(name).state_dict(), f'{name}.pth')
    words: list[str]
    for block in PAGE['blocks'](ROOT / 'docs/own_data.md', 'sh'):
        for words in PAGE['commands'](block):
            words = [TINY.get(word, word) for word in words]
            if words[0] == 'mealv2-train' or words[1] == 'record':
                words += SHORT
            if words[1] == '--recipe' and words[2] in ('finetune', 'student'):
                words += ['--pretrained-path', f'{words[4]}.pth']  # no test downloads anything
            PROGRAMS[words[0]](words[1:])
    runs = Path('output/train')
    assert [*preflight(runs / 'student')] == [
        'ensemble',
        f'teacher {runs}/teacher_a/model_best.pth.tar',
        f'teacher {runs}/teacher_b/model_best.pth.tar',
        'student (initial)',
    ]
    teacher = TrainingCheckpoint.read(runs / 'teacher_a/model_best.pth.tar')
    assert teacher.contents['state_dict_ema'].keys() == teacher.contents['state_dict'].keys()
    assert len(summary(runs / 'from_labels')) == 1
    student: Any = timm.create_model('local-dir:my_student', pretrained=True)
    assert (student.num_classes, tuple(student.pretrained_cfg['label_names'])) == (4, CLASSES)


def test_a_clip_model_as_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [block for block in PAGE['blocks'](ROOT / 'docs/teachers.md', 'python') if 'open_clip' in block]
    code = code.replace("['cat', 'dog']", str(list(CLASSES)))
    (tmp_path / 'clip_teacher.py').write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))

    class Clip(torch.nn.Module):
        """Embeds images and colors' names as their normalized color."""

        logit_scale = torch.tensor(4.6)

        def encode_image(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=(2, 3))

        def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
            colors = torch.tensor([COLORS[CLASSES[token]] for token in tokens]) / 255
            return (colors - torch.tensor([0.481, 0.458, 0.408])) / torch.tensor([0.269, 0.261, 0.276])

    open_clip: Any = ModuleType('open_clip')
    open_clip.create_model = lambda name, pretrained: Clip()
    open_clip.get_tokenizer = lambda name: (
        lambda texts: torch.tensor(
            [next(index for index, color in enumerate(CLASSES) if color in text) for text in texts]
        )
    )
    monkeypatch.setitem(sys.modules, 'open_clip', open_clip)
    write_folder(tmp_path / 'data')
    (row,) = evaluate(tmp_path / 'e.json', 'python:clip_teacher:clip', '--data-dir', tmp_path / 'data').values()
    assert (row['samples'], row['top1']) == (16, 100)
