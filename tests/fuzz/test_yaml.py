"""YAML files: of settings (--config), and args.yaml of a run that is continued or drawn."""

import shutil
from pathlib import Path
from random import Random

from hypothesis import given, note, settings
from hypothesis import strategies as st
from outcomes import is_accepted

from timm_mealv2.training.run import main

# A few hundred bytes that are a billion words once the aliases are followed.
LAUGHS = (
    '['
    + ', '.join(f'&{"abcdefghij"[i]} [{", ".join([f"*{chr(96 + i)}" if i else "ha"] * 9)}]' for i in range(10))
    + ']'
)
ODD = (
    *('!!python/object/apply:os.system [touch x]', '!!python/name:os.system', '!unknown x', '!!binary x', '!!set {a}'),
    *('!!float x', '!!int 0x', '!!timestamp x', '2001-99-99', '2001-01-01', '&a [*a]', '&a {b: *a}', '*a', '*none'),
    *('<<: *a', '{<<: {a: b}}', '? [a]', '{[a]: b}', '{a: b, a: c}', '{x: ' + LAUGHS + '}', LAUGHS, '9' * 5000),
    *('1e999', '-.inf', '.nan', '0:2', '0o7', '1_0', '-0', '~', 'yes', 'off', '[' * 400, '{a: ' * 400, '[[[]]]'),
    *('|', '>-', '"\\0"', '"\\ud800"', "'", '\ufeff', '---', '...', '%YAML 3.0', '@', '`', '\t', '- a', 'ä', ''),
)  # fmt: skip


def changed(random: Random, text: str) -> str:
    """A YAML file with one or two lines that are other, twice there, left out, or elsewhere."""
    lines = text.splitlines()
    for _ in range(random.randint(1, 2)):
        number = random.randrange(len(lines))
        key, _, _ = lines[number].partition(':')
        line = random.choice([f'{key}: {random.choice(ODD)}'] * 6 + [random.choice(ODD), f'  {lines[number]}'])
        note(f'{line[:60]!r} in place of {lines[number]!r}')
        place = slice(number, number + random.randrange(2))  # with the line, or before it
        lines[place] = random.choice([[line], [line], [line], [lines[number]], []])
    return '\n'.join(lines)


@settings(max_examples=24)
@given(st.sampled_from(['config', 'config', 'resume']), st.randoms())
def test_any_yaml_is_taken_or_refused_in_one_line(run_folder: Path, tmp_path: Path, how: str, random: Random) -> None:
    output = tmp_path / 'output'
    shutil.rmtree(output, ignore_errors=True)
    run = Path(shutil.copytree(run_folder, output / 'run'))
    path = run / 'args.yaml'
    path.write_text(changed(random, path.read_text()), encoding='utf-8', errors='surrogatepass')
    new = ['new'] if how == 'config' else ['run', '--resume', 'auto', '--epochs', 2]
    is_accepted(main, ['-c', path, '--output', output, '--experiment', *new])
