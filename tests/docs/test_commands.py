"""The commands and Python blocks of README and docs.

Every command is parsed by its real parser. The Python blocks that need no download run, and so do, marked slow, the
commands of README, in the short form that it shows. Those of docs/own_data.md are in test_own_data_page.py.
"""

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

from timm_mealv2.errors import UserError
from timm_mealv2.training.settings import parse_args

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
OPTIONS = runpy.run_path(str(ROOT / 'docs/options.py'))
PARSERS = OPTIONS['parsers']()


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of the languages; those without one are output."""
    fences = re.findall(r'^```(\w*)\n(.*?)^```', page.read_text(), re.MULTILINE | re.DOTALL)
    return [body for language, body in fences if language in languages]


def commands(block: str) -> Iterator[list[str]]:
    """The words of each command, with variables filled in. Where lines begin with `$`, the others are output."""
    variables: dict[str, str] = {}
    lines = block.replace('\\\n', ' ').splitlines()
    if any(line.startswith('$ ') for line in lines):
        lines = [line.removeprefix('$ ') for line in lines if line.startswith('$ ')]
    for line in lines:
        words = shlex.split(re.sub(r'\$(\w+)', lambda match: variables.get(match[1], match[1]), line), comments=True)
        while words and re.fullmatch(r'\w+=.*', words[0]):
            name, _, variables[name] = words.pop(0).partition('=')
        if words:
            yield words


def program(words: list[str]) -> tuple[str, list[str]] | None:
    """A command of ours, called by its name or under torchrun, or a script of the repository; and its arguments."""
    for number, word in enumerate(words):
        if word == 'train_distill.py':
            return 'mealv2-train', words[number + 1 :]
        if word in PARSERS or (word.startswith(('examples/', 'benchmarks/')) and word.endswith('.py')):
            return word, words[number + 1 :]
    return None


CALLS = [
    pytest.param(*call, id=f'{page.stem}-{Path(call[0]).stem}')
    for page in PAGES
    for block in blocks(page, 'sh', 'bash', 'console')
    for words in commands(block)
    if (call := program(words))
]
PYTHON = [pytest.param(block, id=page.stem) for page in PAGES for block in blocks(page, 'python')]
RUNNABLE = [ROOT / 'README.md', *(ROOT / f'docs/{name}.md' for name in ('python', 'how_it_works', 'evaluation'))]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the examples in it, as a fresh clone has them."""
    (tmp_path / 'examples').symlink_to(ROOT / 'examples')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(command: str, argv: list[str]) -> None:
    """Parse a command's arguments as the command does."""
    if command == 'mealv2-train':
        parse_args(argv)  # reads recipe and configuration file, and checks what does not go together
    elif command in PARSERS:
        PARSERS[command].parse_args(argv)
    else:
        build_parser = runpy.run_path(str(ROOT / command)).get('build_parser')
        if build_parser is not None:
            build_parser().parse_args(argv)


@pytest.mark.parametrize(('command', 'argv'), CALLS)
def test_documented_command_parses(command: str, argv: list[str], clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / Path(command).parent)  # scripts import what lies beside them
    for name in re.findall(r'output/\S+\.(?:pth(?:\.tar)?|safetensors|py)', ' '.join(argv)):  # made before
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).touch()
    try:
        parse(command, argv)
    except UserError as error:
        if 'there is no such folder' not in str(error):  # the store that an earlier command records
            raise
    except SystemExit:
        if '--list-recipes' not in argv:
            raise


@pytest.mark.parametrize('block', PYTHON)
def test_documented_imports_exist(block: str) -> None:
    imports = [node for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), 'docs', 'exec'), {})


@pytest.mark.parametrize('page', RUNNABLE, ids=lambda page: page.stem)
def test_python_block_runs(page: Path, clone: Path, small_sample: Path) -> None:
    (clone / 'examples').unlink()
    copytree(ROOT / 'examples', clone / 'examples', ignore=ignore_patterns('data'))
    (clone / 'examples/fashion_mnist/data').symlink_to(small_sample)  # a tenth of the images
    for block in blocks(page, 'python'):
        exec(compile(block, page.name, 'exec'), {})


@pytest.mark.slow
def test_the_commands_of_the_readme_run_as_written(clone: Path) -> None:
    text = '\n'.join(block for block in blocks(ROOT / 'README.md', 'sh') if 'digits' in block).replace('\\\n', ' ')
    text = re.sub(r'^pip install .*', '', text, flags=re.MULTILINE)
    text = re.sub(r'^mealv2-(train|softlabels record) .*', r'\g<0> --epochs 1', text, flags=re.MULTILINE)
    for command, target in OPTIONS['entry_points']().items():  # as pip makes them
        module, _, function = target.partition(':')
        script = clone / 'bin' / command
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!{sys.executable}\nfrom {module} import {function}\n{function}()\n')
        script.chmod(0o755)
    path = os.pathsep.join([str(clone / 'bin'), str(Path(sys.executable).parent), os.environ['PATH']])
    environment = os.environ | {'PATH': path, 'PYTHONPATH': str(ROOT)}
    subprocess.run(['bash', '-e', '-c', text], env=environment, check=True)
    assert (clone / 'output/digits_student/model.safetensors').is_file()
    assert (clone / 'output/student/report.html').is_file()
