"""The package's long description: the README, made fit for a package index. All else stands in setup.cfg.

An index shows the README without the repository's files. With REPOSITORY_URL in the environment its links and pictures
become absolute; without it links become plain text and pictures are left out.
"""

import os
import re
from pathlib import Path

from setuptools import setup


def long_description(readme: str, url: str | None) -> str:
    """Return `readme` with each link to a file of the repository made absolute below `url`, or taken out."""
    image, link = r'!\[([^\]]*)\]\((?!https?:)([^)]+)\)', r'(?<!!)\[([^\]]*)\]\((?!https?:)([^)]+)\)'
    readme = re.sub(image, rf'![\1]({url}/raw/main/\2)' if url else '', readme)
    return re.sub(link, rf'[\1]({url}/blob/main/\2)' if url else r'\1', readme)


if __name__ == '__main__':
    url = os.environ.get('REPOSITORY_URL') or None
    setup(
        long_description=long_description((Path(__file__).parent / 'README.md').read_text(), url),
        long_description_content_type='text/markdown',
        project_urls={'Source': url} if url else {},
    )
