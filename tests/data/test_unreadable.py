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


def test_what_is_ignored_of_images_is_told_once_with_that_of_all_processes() -> None:
    processes = BadImages(), BadImages()
    processes[0].ignored['train'] |= {(1, 'orientation'), (2, 'orientation'), (2, 'transparency')}
    processes[1].ignored['train'] |= {(2, 'orientation'), (3, 'orientation')}
    news = [dict(bad.ignored) for bad in processes]
    for bad in processes:
        lines = bad.tell_ignored(lambda _: news)
        assert [line[: line.index('images') + 6] for line in lines] == ['train: 3 images', 'train: 1 images']
        assert bad.tell_ignored() == []
        bad.ignored['validation'].add((1, 'transparency'))
        assert len(bad.tell_ignored()) == 1
