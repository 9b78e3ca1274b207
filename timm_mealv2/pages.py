"""HTML pages from the package's templates; everything filled in is escaped."""

import base64
import io
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

_ENVIRONMENT = Environment(
    loader=PackageLoader('timm_mealv2'),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def breakable(text: object, by: str = '<wbr>') -> Markup:
    """Return a text in which a long name may go over two lines behind its separators, and not within a word."""
    return Markup(by).join(map(escape, re.split(r'(?<=[/_,=:])(?!\s)', str(text))))


_ENVIRONMENT.filters['breakable'] = breakable


def render(template: str, **variables: Any) -> str:
    """Return the page that a file in `timm_mealv2/templates` makes of the variables."""
    return _ENVIRONMENT.get_template(template).render(variables)


def picture(source: Any, format: str = 'png', **options: Any) -> str:
    """Return a figure of matplotlib's, or an image of Pillow's, as the address of an <img>, with the picture in it."""
    buffer = io.BytesIO()
    save = getattr(source, 'savefig', None) or source.save
    save(buffer, format=format, **options)
    return f'data:image/{format};base64,{base64.b64encode(buffer.getvalue()).decode()}'
