"""Ensemble distillation of image classifiers (MEAL V2, arXiv 2009.08453) for timm.

Importing the package registers its models with timm: the students `mealv1_*` and `mealv2_*`, and the ensembles
`mealv2_ensemble*`.
"""

from typing import TYPE_CHECKING, Any

from timm_mealv2.errors import UserError
from timm_mealv2.evaluation import evaluate
from timm_mealv2.losses import Discriminator, DiscriminatorLoss
from timm_mealv2.models import mealv2_students, mealv2_teachers  # noqa: F401  (registers the models)
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import create_ensemble
from timm_mealv2.task import MealV2Task
from timm_mealv2.version import __version__

if TYPE_CHECKING:
    from timm_mealv2.training.distill import distill

__all__ = [
    'Discriminator',
    'DiscriminatorLoss',
    'EnsembleTeacher',
    'MealV2Task',
    'UserError',
    '__version__',
    'create_ensemble',
    'distill',
    'evaluate',
]


def __getattr__(name: str) -> Any:
    if name == 'distill':  # loads the training, which those who have a loop of their own do not need
        from timm_mealv2.training.distill import distill

        return distill
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
