"""Settings from YAML files and recipes, as the command line would take them."""

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs

import timm_mealv2
from timm_mealv2.command_line import OneLineParser, Option, add_options
from timm_mealv2.errors import UserError
from timm_mealv2.training.settings import (
    list_recipes,
    paper_differences,
    parse_args,
    parse_with_files,
    settings_text,
)

TWO_TEACHERS = ('--teachers', 'resnet18', 'resnet34')


def texts(args: argparse.Namespace) -> list[str]:
    return [str(spec) for spec in args.teachers]


def test_teachers_are_named_in_two_ways() -> None:
    assert texts(parse_args(list(TWO_TEACHERS))) == ['resnet18', 'resnet34']
    assert texts(parse_args(['--kd-model-name', 'resnet18,resnet34'])) == ['resnet18', 'resnet34']
    assert texts(parse_args(['--teachers', 'local-dir:a,b'])) == ['local-dir:a,b']
    assert texts(parse_args([])) == []
    with pytest.raises(UserError, match='mean the same'):
        parse_args([*TWO_TEACHERS, '--kd-model-name', 'resnet18'])


def test_the_data_folder_is_named_in_three_ways(tmp_path: Path) -> None:
    (tmp_path / 'c.yaml').write_text('data: a\n')
    file = ['-c', str(tmp_path / 'c.yaml')]
    for argv, folder in ((['--data-dir', 'b'], 'b'), (['b'], 'b'), (file, 'a'), ([*file, 'b'], 'b')):
        args = parse_args(argv)
        assert args.data_dir == folder
        (tmp_path / 'args.yaml').write_text(settings_text(args))
        assert parse_args(['-c', str(tmp_path / 'args.yaml')]).data_dir == folder


def test_the_settings_of_a_run_of_timm_are_taken(tmp_path: Path) -> None:
    options = json.loads(Path(__file__).with_name('timm_train_options.json').read_text())
    values = {dest: default for _, dest, _, _, default, *_ in options if dest not in ('config', 'data')}
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(values))  # timm writes all of them
    args = parse_args(['-c', str(tmp_path / 'args.yaml'), '--data-dir', 'a', '--lr', '0.5'])
    assert (args.lr, args.epochs, args.kd_distill_type) == (0.5, 300, 'logit')
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(values | {'aug_splits': 3}))
    with pytest.raises(UserError, match='--aug-splits 3: refused'):
        parse_args(['-c', str(tmp_path / 'args.yaml')])


def test_settings_are_written_and_read_back(tmp_path: Path) -> None:
    argv = [*TWO_TEACHERS, '--model-kwargs', 'channels=(8,16)', '--lr', '1e-3', '--total-batch-size', '64', '--amp']
    args = parse_args([*argv, '--mean', '0.5', '--kd-temperature', '1'])
    (tmp_path / 'args.yaml').write_text(settings_text(args))
    again = parse_args(['-c', str(tmp_path / 'args.yaml')])
    assert again.model_kwargs == {'channels': [8, 16]}
    ignored = {'config', 'given', 'model_kwargs'}
    assert {k: v for k, v in vars(again).items() if k not in ignored} == {
        k: v for k, v in vars(args).items() if k not in ignored
    }


def test_the_command_line_wins_over_the_file_and_the_file_over_the_recipe(tmp_path: Path) -> None:
    (tmp_path / 'c.yaml').write_text('lr: 0.02\nepochs: 7\nweight_decay: 1e-4\n')
    args = parse_args(['--recipe', 'quickstart', '-c', str(tmp_path / 'c.yaml'), '--epochs', '3'])
    assert (args.lr, args.epochs, args.weight_decay, args.model) == (0.02, 3, 1e-4, 'resnet10t')
    assert {'lr', 'epochs', 'model'} <= args.given
    for argv in (['--batch-size', '32'], ['-c', str(tmp_path / 'b.yaml')]):
        (tmp_path / 'b.yaml').write_text('batch_size: 32\nkd_model_name: resnet18\n')
        args = parse_args(['--recipe', 'mealv2_resnet50_224', *argv])
        assert (args.batch_size, args.total_batch_size) == (32, None)
    assert texts(args) == ['resnet18']


WRONG = {
    'epoch: 3': "no option 'epoch', the nearest is 'epochs'",
    'lr: fast': "lr: invalid float value: 'fast'",
    'amp: fast': "amp: ignored explicit argument 'fast'",
    'epochs: 1.5': "epochs: invalid int value: '1.5'",
    'epochs: true': "epochs: invalid int value: 'True'",
    'lr: [0.1, 0.2]': 'lr: must be one value, got a list',
    'input_size: [3, 32]': 'input_size: expected 3 arguments',
    'model_kwargs: 3': "model_kwargs: expected KEY=VALUE, got '3'",
    'kd_distill_type: soft': 'kd_distill_type: invalid choice',
    'epochs: 0': 'epochs: must be 1 or more, got 0',
    'lr: .nan': 'lr: must be a finite number, got nan',
    'model: resnet5o': 'the nearest is resnet50',
    '- 1': 'must map option names',
    'a: [': 'cannot read',
    '!!python/object/apply:os.system [ls]': 'cannot read',
}


@pytest.mark.parametrize('content', WRONG)
def test_a_wrong_file_names_file_and_key(tmp_path: Path, content: str) -> None:
    path = tmp_path / 'c.yaml'
    path.write_text(content)
    with pytest.raises(UserError) as error:
        parse_args(['-c', str(path)])
    assert WRONG[content] in str(error.value)
    assert str(path) in str(error.value)


def test_a_file_can_take_back_what_a_recipe_sets(tmp_path: Path) -> None:
    (tmp_path / 'c.yaml').write_text('pretrained: false\nteachers: []\nlr: null\nscale: [0.5, 1]\namp: true\n')
    args = parse_args(['--recipe', 'mealv2_resnet50_224', '-c', str(tmp_path / 'c.yaml')])
    assert (args.pretrained, args.teachers, args.lr, args.scale, args.amp) == (False, [], None, [0.5, 1.0], True)


def test_another_program_takes_what_it_has_of_a_training_recipe() -> None:
    parser = OneLineParser(prog='record')
    rows = [Option(f'--{name}', float, name) for name in ('hflip', 'img-size')]
    add_options(parser, [*rows, Option('--recipe', str, 'recipe'), Option('-c --config', str, 'file')])
    args = parse_with_files(parser, ['--recipe', 'mealv2_resnet50_224'])
    assert (args.hflip, args.img_size) == (0.5, 224)
    assert args.given == {'recipe', 'hflip', 'img_size'}
    assert not hasattr(args, 'epochs')


def test_differences_from_the_paper_are_named() -> None:
    found = paper_differences(parse_args([*TWO_TEACHERS, '--epochs', '180']), 512, 0.02)
    assert found == [
        'opt sgd (paper: momentum)',
        'weight_decay 2e-05 (paper: 0.0)',
        'lr 0.02 (paper: 0.01)',
        'sched cosine (paper: step)',
        'warmup_epochs 5 (paper: 0)',
        'color_jitter 0.4 (paper: 0.0)',
        'train_interpolation random (paper: bilinear)',
    ]


# Recipes


PUBLISHED: dict[str, tuple[str, float | None]] = {
    'mealv2_resnet18_224': ('resnet18.tv_in1k', 73.19),
    'mealv2_resnet50_224': ('resnet50.ram_in1k', 80.67),
    'mealv2_resnet50_224_cutmix': ('resnet50.ram_in1k', 80.98),
    'mealv2_resnet50_380': ('resnet50.ram_in1k', 81.72),
    'mealv2_mobilenetv3_small_075_224': ('tf_mobilenetv3_small_075.in1k', 67.60),
    'mealv2_mobilenetv3_small_100_224': ('tf_mobilenetv3_small_100.in1k', 69.65),
    'mealv2_mobilenetv3_large_100_224': ('tf_mobilenetv3_large_100.in1k', 76.92),
    'mealv2_efficientnet_b0_224': ('tf_efficientnet_b0.aa_in1k', 78.29),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_recipe_is_the_published_training(name: str) -> None:
    args = parse_args(['--recipe', name])
    assert args.model == PUBLISHED[name][0]
    assert args.pretrained
    b4 = ['tf_efficientnet_b4.ns_jft_in1k', 'tf_efficientnet_b4.aa_in1k']
    gluon = ['senet154.gluon_in1k', 'resnet152s.gluon_in1k']
    assert texts(args) == (b4 if name.endswith('380') else gluon)
    assert args.img_size == (380 if name.endswith('380') else 224)
    assert (args.mean, args.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (args.total_batch_size, args.smoothing, args.reprob, args.aa) == (512, 0, 0, None)
    assert args.cutmix == (1.0 if name.endswith('cutmix') else 0.0)
    differences = paper_differences(args, args.total_batch_size, args.lr)
    rest = [text for text in differences if not (name.endswith('cutmix') and text.startswith('cutmix'))]
    assert rest == []


def test_a_recipes_learning_rate_falls_after_epoch_100() -> None:
    args = parse_args(['--recipe', 'mealv2_resnet50_224'])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args))
    rates = []
    for epoch in range(epochs):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]['lr'])
    assert epochs == 180
    assert rates[:101] == [0.01] * 101
    assert all(math.isclose(rate, 0.001) for rate in rates[101:])


def test_recipes_are_listed_with_the_papers_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse_args(['--list-recipes'])
    assert exit.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert set(PUBLISHED) < {line.split()[0] for line in lines}
    assert {line.split()[0] for line in lines[1:]} == set(list_recipes())
    for name, (_, top1) in PUBLISHED.items():
        assert next(line for line in lines if line.startswith(f'{name} ')).split()[-1] == f'{top1:.2f}'


def test_every_header_has_the_command() -> None:
    for name in list_recipes():
        head = (Path(timm_mealv2.__file__).parent / 'recipes' / f'{name}.yaml').read_text().split('recipe:')[0]
        assert f'--recipe {name}' in head or name == 'quickstart'


def test_on_and_off_need_no_quotes_in_a_file(tmp_path: Path) -> None:
    (tmp_path / 'c.yaml').write_text('teacher_optimize: off\n')  # for YAML the two words are true and false
    assert parse_args(['-c', str(tmp_path / 'c.yaml')]).teacher_optimize == 'off'
