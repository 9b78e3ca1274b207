"""What one optimizer trains: the student and the discriminator, in one module."""

from collections.abc import Callable

from timm.models import group_parameters
from timm.optim import auto_group_layers
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_mealv2.losses import DiscriminatorLoss, at_least_float32


class MealV2TrainableModule(nn.Module):
    """Student and discriminator in one module, so that one forward pass, DDP, EMA and clipping see both.

    Args:
        student_model: The student, [B, ...] -> logits [B, C].
        discriminator_loss: Holds the discriminator; None trains the student alone.
        student_rows: Turns the student's logits, at least float32, into the discriminator's rows [B, C].
    """

    def __init__(
        self,
        student_model: nn.Module,
        discriminator_loss: DiscriminatorLoss | None = None,
        student_rows: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.student = student_model
        self.discriminator_loss = discriminator_loss
        self.student_rows = student_rows or nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: the student's own choice, and the whole discriminator."""
        student_names: set[str] = getattr(unwrap_model(self.student), 'no_weight_decay', set)()
        discriminator_names = {name for name, _ in self.named_parameters() if name.startswith('discriminator_loss.')}
        return {f'student.{name}' for name in student_names} | discriminator_names

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layer of each parameter for layer decay: the student's layers, the discriminator in the last of them."""
        student = unwrap_model(self.student)
        if hasattr(student, 'group_matcher'):
            layers = group_parameters(student, student.group_matcher(coarse=coarse), reverse=True)
        else:
            layers = auto_group_layers(student)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name.removeprefix('student.'), last)

    def forward(self, input: Tensor, teacher_rows: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return student logits [B, C], the discriminator's loss and its accuracy; None, None without teacher rows.

        Args:
            input: Images [B, ...].
            teacher_rows: The discriminator's teacher rows [B, C], without gradient, on any device.
        """
        output = self.student(input)
        if self.discriminator_loss is None or teacher_rows is None:
            return output, None, None
        teacher_rows = teacher_rows.to(output.device, non_blocking=True)
        return output, *self.discriminator_loss.measure(self.student_rows(at_least_float32(output)), teacher_rows)
