"""The types of options: numbers in a range, texts that name something."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from timm_mealv2 import option_types
from timm_mealv2.option_types import OneOf, Range


@pytest.mark.parametrize(
    ('convert', 'text', 'problem'),
    [
        (option_types.COUNT, '0', 'must be 1 or more, got 0'),
        (option_types.COUNT, str(2**63), 'is too large a number'),
        (option_types.PIXELS, '65536', 'must be 1 or more and at most 65535'),
        (Range(float, 0, below=1), '1', 'must be 0 or more and below 1, got 1'),
        (Range(float, above=0, high=1), '0', 'must be above 0 and at most 1'),
        (option_types.POSITIVE, 'nan', 'must be a finite number'),
        (option_types.NOT_NEGATIVE, '1e999', 'must be a finite number'),
        (OneOf('', 'a', 'b'), 'c', "must be one of a, b, got 'c'"),
        (option_types.model_text, 'resnet5o', 'the nearest is resnet50'),
        (option_types.model_text, 'resnet50.foo', 'no such tag'),
        (option_types.model_text, 'foo:bar', 'must be a name of timm'),
        (option_types.optimizer_text, 'sdg', 'no such optimizer'),
        (option_types.policy_text, 'random', 'must be such as rand-m9'),
        (option_types.policy_text, 'rand-x9', 'must be such as rand-m9'),
        (option_types.device_text, 'foo', 'must be a device'),
        (option_types.device_text, 'meta', 'computes nothing'),
        (option_types.experiment_text, '.', 'inside --output'),
        (option_types.experiment_text, '../../x', 'inside --output'),
        (option_types.experiment_text, '/tmp/x', 'inside --output'),
        (option_types.experiment_text, 300 * 'x', 'cannot be the name of a folder'),
        (option_types.file_text, '/absent', 'there is no such file'),
    ],
)
def test_what_is_not_possible_is_said(convert: Callable[[str], object], text: str, problem: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as error:
        convert(text)
    assert problem in str(error.value)


def test_what_is_possible_is_converted() -> None:
    assert option_types.COUNT('3') == 3
    assert Range(float, above=0, high=1)('1') == 1.0
    assert OneOf('', 'a')('') == ''
    for text in ('resnet50', 'hf-hub:me/x', 'local-dir:x', 'resnet50.a1_in1k'):
        assert option_types.model_text(text) == text
    for policy in ('rand-m9-mstd0.5', 'augmix-m5-w2', 'v0', '3a'):
        assert option_types.policy_text(policy) == policy
    assert option_types.file_text(str(Path(__file__))) == str(Path(__file__))
    assert option_types.experiment_text('a/b') == 'a/b'
