"""The list of images that could not be read."""

import logging
from pathlib import Path

import pytest
from images import cut_off

from timm_mealv2.data.bad_images import BadImages
from timm_mealv2.data.dataset import open_dataset
from timm_mealv2.errors import UserError


def test_a_resumed_run_forgets_the_images_that_were_mended(spoilt: Path, caplog: pytest.LogCaptureFixture) -> None:
    still = cut_off(spoilt / 'train' / 'cold' / '002.png')
    saved = {'train #2': f'{still}: cut off', 'train #3': 'cold/003.png: cut off', 'other #9': 'x.png: gone'}
    bad = BadImages(1)
    with caplog.at_level(logging.INFO):
        bad.restore(saved, {'train': open_dataset('', str(spoilt), 'train')})
    assert list(bad.found) == ['train #2', 'other #9']
    assert 'Can be read again: cold/003.png' in caplog.text
    assert bad.news  # for the processes that did not test them
    with pytest.raises(UserError, match='2 images cannot be read, --max-bad-images allows 1'):
        bad.check()


def test_processes_share_what_they_found() -> None:
    processes = BadImages(), BadImages()
    processes[0].report('train', {1: 'a: cut off'})
    processes[1].report('train', {2: 'b: no image'})
    news = [dict(bad.found) for bad in processes]
    for bad in processes:
        assert bad.news
        bad.share(lambda _: news)
        assert not bad.news
        assert bad.found == {'train #1': 'a: cut off', 'train #2': 'b: no image'}
