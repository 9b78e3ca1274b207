"""The list of images that could not be read."""

import pytest

from timm_mealv2.data.unreadable import BadImages
from timm_mealv2.errors import UserError


def test_processes_share_what_they_found() -> None:
    processes = BadImages(1), BadImages(1)
    processes[0].report('train', {1: 'a: cut off'})
    processes[0].report('train', {1: 'a: cut off'})
    processes[1].report('train', {2: 'b: no image'})
    news = [dict(bad.found) for bad in processes]
    for bad in processes:
        assert bad.news
        bad.check()
        bad.share(lambda _: news)
        assert not bad.news
        assert bad.found == {'train #1': 'a: cut off', 'train #2': 'b: no image'}
        with pytest.raises(UserError, match='2 images cannot be read, --max-bad-images allows 1'):
            bad.check()
