"""Teachers in other forms: they predict the same, nothing of theirs changes, and what fails is dropped."""

import copy
import pickle
from typing import Any

import pytest
import torch
from tiny_models import images, same_state, state_of, tiny
from torch import nn

from timm_mealv2.models import tuning
from timm_mealv2.models.ensemble import EnsembleTeacher

# Batch norm apart and with an activation in it, a convolution of timm's own, and none of all this.
TEACHERS = {
    'resnet': {'name': 'resnet10t'},
    'efficientnet': {'name': 'test_efficientnet'},
    'same padding': {'name': 'test_efficientnet', 'pad_type': 'same'},
    'vit': {'name': 'test_vit', 'img_size': 64},
}
FORMS = ('channels_last', 'folded', 'channels_last+folded')


@pytest.fixture
def fastest(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Milliseconds that each form seems to take, by its name; 100 for those that are not there."""
    milliseconds: dict[str, float] = {}
    names = lambda form: tuning.PLAIN if form is None else form.name  # noqa: E731

    def measured(forms: Any, run: Any, device: Any) -> list[list[float]]:
        return [[milliseconds.get(names(form), 100.0)] for form in forms]

    monkeypatch.setattr(tuning, '_milliseconds', measured)
    return milliseconds


@pytest.mark.parametrize('teacher', TEACHERS)
@pytest.mark.parametrize('form', FORMS)
def test_every_form_predicts_the_same_and_leaves_the_teacher_as_it_is(
    teacher: str, form: str, fastest: dict[str, float]
) -> None:
    if teacher == 'vit' and 'folded' in form:
        pytest.skip('has no batch norm')
    fastest[form] = 1.0
    model = tiny(**TEACHERS[teacher])
    before, strides = state_of(model), [p.stride() for p in model.parameters()]
    ensemble = EnsembleTeacher([model])
    expected, state = ensemble.predict(images()), state_of(ensemble)
    (row,) = ensemble.tune(images())
    assert (row.chosen, row.before, row.after) == (form, 100.0, 1.0)
    assert row.difference <= tuning.BOUND
    for one, other in zip(ensemble.predict(images()), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert same_state(state_of(model), before)
    assert [p.stride() for p in model.parameters()] == strides
    assert same_state(state_of(ensemble), state)
    assert not any(module.training for module in ensemble._forms[0].module.modules())


def test_batch_norm_is_gone_from_a_folded_teacher() -> None:
    x = images()
    form = tuning.make_form(tiny(name='test_efficientnet'), 'folded', x, x.shape)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in form.module.modules())


def test_the_teacher_itself_runs_unless_a_form_is_clearly_faster(fastest: dict[str, float]) -> None:
    fastest['folded'] = 98.0
    ensemble = EnsembleTeacher([tiny()])
    assert ensemble.tune(images())[0] == ('resnet10t.c3_in1k', tuning.PLAIN, 100.0, 100.0, 0.0)
    assert not ensemble._forms


def test_a_teacher_that_takes_no_time_to_speak_of_stays_as_it_is(fastest: dict[str, float]) -> None:
    fastest |= {tuning.PLAIN: 19.0, 'folded': 1.0}
    assert EnsembleTeacher([tiny()]).tune(images())[0].chosen == tuning.PLAIN


def test_times_are_measured(caplog: pytest.LogCaptureFixture) -> None:
    ensemble = EnsembleTeacher([tiny(0), tiny(1, 'test_vit', img_size=64)])
    with caplog.at_level('INFO'):
        rows = ensemble.tune(images())
    assert all(row.after > 0 and row.after <= row.before * 1.5 for row in rows)
    assert all(name in caplog.text for name in (*ensemble.names, 'largest difference'))


class Shifted(nn.Module):
    """Looks at the layout of its weights, as no model should: in another one it answers otherwise, or not at all."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.model, self.num_classes, self.fails = tiny(), 10, fails

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = not self.model.layer1[0].conv1.weight.is_contiguous()
        if other and self.fails:
            raise RuntimeError('not in this layout')
        return self.model(x) + other * torch.linspace(0, 1, 10)


@pytest.mark.parametrize('fails', [True, False], ids=['fails', 'differs'])
def test_a_form_that_fails_or_differs_is_dropped(fails: bool, fastest: dict[str, float]) -> None:
    fastest |= {'channels_last': 1.0, 'channels_last+folded': 1.0, 'folded': 5.0}
    ensemble = EnsembleTeacher([Shifted(fails)])
    expected = ensemble.predict(images())[0]
    assert ensemble.tune(images())[0].chosen == 'folded'
    torch.testing.assert_close(ensemble.predict(images())[0], expected, rtol=1e-3, atol=1e-3)


def test_a_convolution_that_runs_twice_keeps_its_batch_norm(fastest: dict[str, float]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_classes = 4
            self.conv, self.norm_a, self.norm_b = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.norm_a(self.conv(x)) - self.norm_b(self.conv(x))).mean(dim=(2, 3))

    with pytest.raises(ValueError, match='no batch norm'):
        tuning.make_form(Twice().eval(), 'folded', images(), images().shape)


def test_what_moves_or_loads_weights_copies_or_exports_takes_the_teachers(fastest: dict[str, float]) -> None:
    fastest['folded'] = 1.0
    ensemble, other = EnsembleTeacher([tiny(0)]), EnsembleTeacher([tiny(1)])
    for change in (
        lambda: ensemble.to(torch.float64).float(),
        lambda: ensemble.load_state_dict(other.state_dict()),
    ):
        ensemble.tune(images())
        change()
        assert not ensemble._forms
    torch.testing.assert_close(ensemble(images()), other(images()))
    ensemble.tune(images())
    for copied in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble)), EnsembleTeacher([ensemble])):
        assert not copied._forms
        torch.testing.assert_close(copied(images()), other(images()))
    torch.export.export(ensemble, (images(),))


def test_forms_are_taken_from_an_earlier_choice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tuning, '_milliseconds', None)  # nothing is measured
    ensemble = EnsembleTeacher([tiny(0), tiny(1), tiny(2)])
    expected = ensemble(images())
    ensemble.run_as(['channels_last+folded', tuning.PLAIN, 'nonsense'], images().shape)
    assert {place: form.name for place, form in ensemble._forms.items()} == {0: 'channels_last+folded'}
    assert 'cannot run as nonsense' in caplog.text
    torch.testing.assert_close(ensemble(images()), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_types_have_a_bound_of_their_own(dtype: torch.dtype, fastest: dict[str, float]) -> None:
    fastest |= {'channels_last': 5.0, 'folded': 1.0}  # folded weights are rounded once more
    row = EnsembleTeacher([tiny()]).to(dtype).tune(images())[0]
    assert row.chosen != tuning.PLAIN
    assert row.difference <= tuning.HALF_BOUNDS[dtype]


@pytest.mark.slow  # compiles
def test_a_compiled_form_is_for_the_shape_that_it_was_compiled_for(fastest: dict[str, float]) -> None:
    fastest |= {'folded': 5.0, 'folded+inductor': 1.0}
    ensemble = EnsembleTeacher([tiny()])
    expected, state = ensemble(images()), torch.get_rng_state()
    row = ensemble.tune(images(), compile=True)[0]
    assert (row.chosen, torch.equal(torch.get_rng_state(), state)) == ('folded+inductor', True)
    torch.testing.assert_close(ensemble(images()), expected, rtol=1e-3, atol=1e-3)
    assert ensemble(images(2)).shape == (2, 10)
    ensemble.run_as(['folded+inductor'], images().shape)
    torch.testing.assert_close(ensemble(images()), expected, rtol=1e-3, atol=1e-3)
