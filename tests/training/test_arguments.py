"""The command line: timm's options as they are, ours beside them, and mistakes told in one line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs

import timm_mealv2
from timm_mealv2.cli.parser import run_cli
from timm_mealv2.errors import UserError
from timm_mealv2.training.arguments import args_text, build_parser, list_recipes, paper_differences, parse_args
from timm_mealv2.training.run import main

# Facts about huggingface/pytorch-image-models train.py: flags, dest, action, type, default, nargs, choices.
TIMM_OPTIONS: list[list[Any]] = json.loads((Path(__file__).parent / 'timm_train_options.json').read_text())
TWO_TEACHERS = ('--teachers', 'resnet18', 'resnet34')

NUMBERS = [(option, kind, nargs) for (option, *_), _, _, kind, _, nargs, _ in TIMM_OPTIONS if kind in ('int', 'float')]


def test_every_option_of_timm_is_there_with_its_type_and_default() -> None:
    actions = {action.dest: action for action in build_parser()._actions}
    assert len(TIMM_OPTIONS) == 172
    for flags, dest, _, kind, default, nargs, choices in TIMM_OPTIONS:
        action = actions[dest]
        assert list(action.option_strings) == [flag for flag in flags if flag.startswith('-')]
        assert getattr(action.type, '__name__', None) == kind, dest
        assert action.nargs == nargs, dest
        if dest == 'kd_distill_type':
            assert action.default == 'mealv2'
        else:
            assert action.default == default, dest
            assert (list(action.choices) if action.choices else None) == choices, dest


def test_parsers_are_fresh() -> None:
    build_parser().set_defaults(epochs=1)
    assert parse_args([]).epochs == 300
    parse_args(['--model-kwargs', 'a=1'])
    assert parse_args([]).model_kwargs == {}


def test_teachers_are_named_in_two_ways() -> None:
    assert parse_args(list(TWO_TEACHERS)).teachers == ['resnet18', 'resnet34']
    assert parse_args(['--kd-model-name', 'resnet18,resnet34']).teachers == ['resnet18', 'resnet34']
    assert parse_args(['--teachers', 'local-dir:a,b']).teachers == ['local-dir:a,b']
    assert parse_args([]).teachers == []


def test_settings_are_written_and_read_back(tmp_path: Path) -> None:
    argv = [*TWO_TEACHERS, '--model-kwargs', 'channels=(8,16)', '--lr', '1e-3', '--total-batch-size', '64', '--amp']
    args = parse_args([*argv, '--mean', '0.5', '--kd-temperature', '1'])
    (tmp_path / 'args.yaml').write_text(args_text(args))
    again = parse_args(['-c', str(tmp_path / 'args.yaml')])
    assert again.model_kwargs == {'channels': [8, 16]}
    ignored = {'config', 'explicit', 'model_kwargs'}
    assert {k: v for k, v in vars(again).items() if k not in ignored} == {
        k: v for k, v in vars(args).items() if k not in ignored
    }


def test_the_command_line_wins_over_the_file_and_the_file_over_the_recipe(tmp_path: Path) -> None:
    (tmp_path / 'c.yaml').write_text('lr: 0.02\nepochs: 7\nweight_decay: 1e-4\n')
    args = parse_args(['--recipe', 'quickstart', '-c', str(tmp_path / 'c.yaml'), '--epochs', '3'])
    assert (args.lr, args.epochs, args.weight_decay, args.model) == (0.02, 3, 1e-4, 'resnet10t')
    assert {'lr', 'epochs', 'model'} <= args.explicit
    for argv in (['--batch-size', '32'], ['-c', str(tmp_path / 'b.yaml')]):
        (tmp_path / 'b.yaml').write_text('batch_size: 32\nkd_model_name: resnet18\n')
        args = parse_args(['--recipe', 'mealv2_resnet50_224', *argv])
        assert (args.batch_size, args.total_batch_size) == (32, None)
    assert args.teachers == ['resnet18']


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('epoch: 3', "no option 'epoch', the nearest is 'epochs'"),
        ('lr: fast', 'lr must be a number'),
        ('epochs: 1.5', 'epochs must be a whole number'),
        ('epochs: true', 'epochs must be a whole number'),
        ('amp: 1', 'amp must be true or false'),
        ('scale: 0.5', 'scale must be a list'),
        ('lr: [0.1]', 'lr must be one value'),
        ('input_size: [3, 32]', 'input_size must be 3 values'),
        ('model_kwargs: 3', 'model_kwargs must map'),
        ('kd_distill_type: soft', 'kd_distill_type must be one of'),
        ('lr: 1' + 400 * '0', 'lr must be a number'),
        ('epochs: 0', '--epochs 0: must be 1 or more'),
        ('lr: .nan', '--lr nan: must be a finite number'),
        ('epochs: 3\nlr: 0.1\nepochs: 4', "'epochs' is there twice"),
        ('model_kwargs: {a: 1, a: 2}', "'a' is there twice"),
        ('date: 2020-99-99', 'cannot read'),
        ('- 1', 'must map option names'),
        ('a: [', 'cannot read'),
        ('!!python/object/apply:os.system [ls]', 'cannot read'),
    ],
)
def test_a_wrong_file_names_file_and_key(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / 'c.yaml'
    path.write_text(content)
    with pytest.raises(UserError) as error:
        parse_args(['-c', str(path)])
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_file_is_not_blamed_for_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / 'c.yaml'
    path.write_text('lr: 0.1\nepochs: 3\n')
    with pytest.raises(UserError) as error:
        parse_args(['-c', str(path), '--epochs', '0'])
    assert str(path) not in str(error.value)


def assert_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], *texts: str) -> None:
    """`argv` ends with exit code 2 and one line that holds `texts`."""
    with pytest.raises(SystemExit) as exit:
        run_cli(lambda argv: parse_args(argv) and None, argv)
    captured = capsys.readouterr()
    assert exit.value.code == 2
    assert captured.out == ''
    assert captured.err.count('\n') == 1
    assert 'Traceback' not in captured.err
    for text in texts:
        assert text in captured.err


@pytest.mark.parametrize(('option', 'kind', 'nargs'), NUMBERS)
def test_a_number_has_to_be_one(
    capsys: pytest.CaptureFixture[str], option: str, kind: str, nargs: int | str | None
) -> None:
    count = nargs if isinstance(nargs, int) else 1
    assert_one_line(capsys, [option, *['many'] * count], option, f'invalid {kind} value')
    if kind == 'float':
        assert_one_line(capsys, [option, 'nan'], option, 'must be a finite number')


OUT_OF_RANGE = [
    *(
        (option, value)
        for options, value in (
            ('--epochs --batch-size --img-size --num-classes --in-chans --log-interval --val-interval', '0'),
            ('--checkpoint-hist --grad-accum-steps --validation-batch-size --lr-base-size --total-batch-size', '0'),
            ('--train-num-samples --val-num-samples --recount --lr-cycle-limit --train-img-sizes', '0'),
            ('--lr --weight-decay --momentum --warmup-lr --min-lr --mixup --cutmix --color-jitter --opt-eps', '-0.1'),
            ('--lr-noise-pct --lr-noise-std --epoch-repeats --aug-repeats --head-init-scale', '-1'),
            ('--workers --seed --recovery-interval --warmup-epochs --cooldown-epochs --patience-epochs', '-1'),
            ('--start-epoch --mixup-off-epoch --aug-splits --decay-milestones --local_rank --tta', '-1'),
            ('--hflip --vflip --reprob --mixup-prob --mixup-switch-prob --color-jitter-prob --grayscale-prob', '1.1'),
            ('--gaussian-blur-prob --bn-momentum --model-ema-decay --crop-pct --mean --bce-target-thresh', '1.1'),
            ('--smoothing --drop --drop-path --drop-connect --drop-block --opt-betas', '1'),
            ('--clip-grad --layer-decay --lr-base --decay-rate --decay-epochs --std --bn-eps --lr-k-decay', '0'),
        )
        for option in options.split()
    ),
    ('--lr', 'inf'),
]


@pytest.mark.parametrize(('option', 'value'), OUT_OF_RANGE)
def test_a_number_has_to_be_possible(capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    assert_one_line(capsys, [option, value], f'{option} ', 'must be')


@pytest.mark.parametrize(
    ('argv', 'text'),
    [
        ('--amp-dtype int8', 'must be one of float16, bfloat16'),
        ('--model-dtype half', 'must be one of float32'),
        ('--clip-mode sum', 'must be one of norm, value, agc'),
        ('--sched cosinus', 'must be one of cosine'),
        ('--interpolation cubic', 'must be one of nearest'),
        ('--train-interpolation cubic', 'must be one of random'),
        ('--train-crop-mode crop', 'must be one of rrc'),
        ('--remode black', 'must be one of const'),
        ('--mixup-mode one', 'must be one of batch'),
        ('--lr-base-scale log', 'must be one of linear, sqrt'),
        ('--eval-metric top3', 'must be one of top1'),
        ('--dist-bn mean', 'must be one of reduce, broadcast'),
        ('--worker-seeding none', 'must be one of all, part'),
        ('--model resnet5o', 'the nearest is resnet50'),
        ('--opt sdg', 'no such optimizer'),
        ('--aa random', 'must be such as rand-m9'),
        ('--recipe mealv2_resnet50', 'the nearest is mealv2_resnet50_'),
        ('--epoch 3', 'unrecognized arguments: --epoch'),
        ('--scale 0.5', 'must be two values'),
        ('--scale 1 0.5', 'the smaller first'),
        ('--scale 0.5 2', 'must be at most 1'),
        ('--ratio 2 1', 'the smaller first'),
        ('--cutmix-minmax 0.5', 'must be two values'),
        ('--lr-noise 0.1 0.2 0.3', 'one or two values'),
        ('--mean 0.5 0.5', 'one per channel'),
        ('--in-chans 1 --std 0.5 0.5 0.5', 'one per channel'),
        ('--input-size 1 32 32 --in-chans 3', '--input-size says 1'),
        ('--input-size 32 32', 'expected 3 arguments'),
        ('--model-kwargs channels', 'expected KEY=VALUE'),
        ('--opt-kwargs 1=2', 'expected KEY=VALUE'),
        ('--model-kwargs a={[]:1}', 'expected KEY=VALUE'),
        ('--model resnet50.foo', 'no such tag'),
        ('--aa rand-x9', 'must be such as rand-m9'),
        ('--device foo', 'must be a device'),
        ('--opt-betas 0.9', 'must be two values'),
        ('--seed 4294967296', 'must be 0 or more and at most'),
        ('--experiment .', 'inside --output'),
        ('--experiment ../../x', 'inside --output'),
        ('--experiment /tmp/x', 'inside --output'),
        ('--resume auto', 'needs --experiment'),
        ('--total-batch-size 64 --batch-size 8', 'give one of them'),
        ('--train-batch-sizes 4 2', 'needs --train-img-sizes'),
        ('--train-batches-per-epoch 4', 'needs --train-img-sizes'),
        ('--train-img-sizes 32 48 --train-batch-sizes 4', 'must be 2 values'),
        ('--train-img-sizes 32 48 --train-size-probs 0 0', 'must not all be 0'),
        ('--train-img-sizes 32 --train-size-schedule progressive', 'two --train-img-sizes'),
        ('--jsd-loss', 'needs --aug-splits'),
        ('--aug-splits 1', '0, or 2 or more'),
        ('--aug-splits 2 --mixup 0.1', 'cannot go with'),
        ('--aug-splits 2 --jsd-loss --bce-loss', 'cannot go with --bce-loss'),
        ('--split-bn', 'needs --aug-splits'),
        ('--bce-sum', 'needs --bce-loss'),
        ('--torchscript', 'refused'),
        ('--fuser nvfuser', 'refused'),
        ('--naflex-loader', 'refused'),
        ('--naflex-max-seq-len 100', 'refused'),
        ('--tta 2', 'refused'),
        ('--amp --model-dtype bfloat16', 'give one of them'),
        ('--torchcompile-mode default', 'needs --torchcompile'),
        ('--torchcompile fast', '--torchcompile fast: must be one of'),
        ('--torchcompile --torchcompile-mode fast', '--torchcompile-mode fast: must be one of'),
        ('--torchcompile eager --torchcompile-mode lite', 'only the backend inductor has modes'),
        ('--device meta', 'computes nothing'),
        ('--model foo:bar', 'must be a name of timm'),
        ('--initial-checkpoint /absent', '--initial-checkpoint /absent: there is no such file'),
        ('--pretrained-path /absent', '--pretrained-path /absent: there is no such file'),
        ('--in-chans 7', '--in-chans 7: images have 3 channels'),
        ('--input-size 4 32 32', '--input-size 4 32 32: images have 3 channels'),
        ('--teachers a --kd-model-name b', 'mean the same'),
        ('--teachers a b --teacher-weights 1', 'must be 2 values'),
        ('--teachers a b --teacher-weights 0 0', 'must not all be 0'),
        ('--teachers a b --teacher-weights -1 2', 'must be 0 or more'),
        ('--teachers a b --teacher-img-size 32 32 32', 'one value, or 2'),
        ('--teachers a --teacher-dtype int8', 'invalid choice'),
        ('--teachers a --discriminator-weight -1', 'must be 0 or more'),
        ('--teachers a --discriminator-mode gan', 'invalid choice'),
        ('--teachers a --kd-temperature 4', 'temperature of MEAL V2 is 1'),
        ('--teachers a --kd-loss-type kl', 'its own loss'),
        ('--teachers a --task-loss-weight 0', '--hard-label-weight'),
        ('--teachers a --distill-loss-weight 1', 'only target'),
        ('--teachers a --aug-splits 2', 'refused with MEAL V2'),
        ('--teachers a --unlabeled --hard-label-weight 1', 'cannot go with --unlabeled'),
        ('--teachers a b --kd-distill-type logit', 'takes one teacher'),
        ('--teachers a --kd-distill-type logit --unlabeled', 'cannot go with'),
        ('--teachers a --kd-distill-type logit --discriminator-weight 2', 'cannot go with'),
        ('--teachers a --kd-distill-type feature --kd-temperature 2', 'does nothing'),
        ('--discriminator-weight 1', 'needs --teachers'),
        ('--unlabeled', 'needs --teachers'),
        ('--kd-distill-type logit', 'needs'),
    ],
)
def test_contradictions_and_refusals_name_the_option(capsys: pytest.CaptureFixture[str], argv: str, text: str) -> None:
    assert_one_line(capsys, argv.split(), text)


@pytest.mark.parametrize(
    ('argv', 'text'),
    [
        ('--gp none', 'cannot create --model test_resnet with --gp none: '),
        ('--model test_vit --img-size 33', '--img-size: test_vit cannot take images of 33 x 33'),
        ('--img-size 16 --train-img-sizes 16 24 --train-batch-sizes 99 99', '--train-img-sizes: '),
        ('--model test_vit --img-size 32 --train-img-sizes 33', '--train-img-sizes: test_vit cannot take images of 33'),
        ('--device xpu', '--device xpu: '),
        ('--device-modules absent_module', '--device-modules absent_module: '),
        ('--model-kwargs absent=1', "unexpected keyword argument 'absent'"),
        ('--opt-kwargs absent=1', "unexpected keyword argument 'absent'"),
        ('--output {file}', '--output and --experiment: '),
        ('--experiment ' + 300 * 'x', 'cannot be the name of a folder'),
    ],
)
def test_what_only_the_parts_of_a_run_can_tell_is_told_before_it_too(
    capfd: pytest.CaptureFixture[str], image_folder: Path, tmp_path: Path, argv: str, text: str
) -> None:
    (tmp_path / 'file').touch()
    base = ['--model', 'test_resnet', '--num-classes', '3', '--workers', '0', '--data-dir', str(image_folder)]
    base += ['--device', 'cpu', '--output', str(tmp_path / 'out'), '--epochs', '1']
    with pytest.raises(SystemExit) as exit:
        run_cli(main, [*base, *argv.format(file=tmp_path / 'file').split()])
    error = capfd.readouterr().err
    assert exit.value.code == 2
    assert 'Traceback' not in error
    assert error.splitlines()[-1].startswith('error: ')
    assert text in error.splitlines()[-1]
    assert not (tmp_path / 'out').exists()


def test_enough_mistakes_are_tried() -> None:
    assert len(NUMBERS) + len(OUT_OF_RANGE) >= 150


@pytest.mark.parametrize(
    'argv',
    [
        [*TWO_TEACHERS, '--kd-temperature', '1', '--teacher-img-size', '64', '--teacher-weights', '2', '1'],
        ['--aug-splits', '3', '--jsd-loss', '--split-bn', '--aa', 'augmix-m5-w2'],
        ['--train-img-sizes', '32', '48', '--train-batch-sizes', '8', '4', '--train-size-schedule', 'progressive'],
        ['--teachers', 'resnet18', '--kd-distill-type', 'logit', '--kd-temperature', '4', '--task-loss-weight', '0'],
        ['--model', 'hf-hub:me/x', '--aa', 'rand-m9-mstd0.5', '--torchcompile', '--lr-noise', '0.4', '0.9'],
    ],
)
def test_what_goes_together_is_accepted(argv: list[str]) -> None:
    assert parse_args(argv)


def test_an_ignored_setting_is_told(caplog: pytest.LogCaptureFixture) -> None:
    parse_args([*TWO_TEACHERS, '--smoothing', '0.2'])
    assert '--smoothing does nothing' in caplog.text
    caplog.clear()
    parse_args([*TWO_TEACHERS, '--smoothing', '0.2', '--hard-label-weight', '1'])
    assert not caplog.text


def test_differences_from_the_paper_are_named() -> None:
    texts = '; '.join(paper_differences(parse_args(list(TWO_TEACHERS))))
    for name in ('weight decay 2e-05 (paper: 0)', 'colour jitter 0.4', 'interpolation of the crops random', 'schedule'):
        assert name in texts


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
    assert args.teachers == (b4 if name.endswith('380') else gluon)
    assert args.img_size == (380 if name.endswith('380') else 224)
    assert (args.mean, args.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (args.total_batch_size, args.smoothing, args.reprob, args.aa) == (512, 0, 0, None)
    assert args.cutmix == (1.0 if name.endswith('cutmix') else 0.0)
    rest = [text for text in paper_differences(args) if not (name.endswith('cutmix') and text.startswith('mixing'))]
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
