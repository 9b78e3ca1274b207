"""HTML pages from the package's templates; everything filled in is escaped."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

_ENVIRONMENT = Environment(
    loader=PackageLoader('timm_mealv2'),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **variables: Any) -> str:
    """Return the page that a file in `timm_mealv2/templates` makes of the variables."""
    return _ENVIRONMENT.get_template(template).render(variables)
