from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from nestseg.core.errors import RecipeError
from nestseg.optim.average import WeightAverage
from nestseg.store.files import read_torch_file, write_torch_file

YES, NO = torch.tensor(True), torch.tensor(False)


def _make_model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))


@torch.no_grad()
def _move(model: nn.Module, step: int) -> None:
    """Change every parameter and buffer, as a training step would, to values that depend on the step alone."""
    generator = torch.Generator().manual_seed(step)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.5)
        else:
            tensor += 1


def _bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {
        name: tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
    }


def _averages(average: WeightAverage) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in average.state_dict()["parameters"].items()}


@pytest.mark.parametrize(
    ("decay", "shares"),
    [
        (0.9, ["1/10", "2/11", "3/12", "4/13", "5/14"]),
        (0.25, ["1/10", "2/11", "1/4", "1/4", "1/4"]),
    ],
)
def test_five_updates_are_the_sum_that_is_computed_by_hand(decay: float, shares: list[str]) -> None:
    model = nn.Linear(1, 1, bias=False).double()
    values = [Fraction(number) for number in (3, -1, 4, 1, -5, 9)]
    nn.init.constant_(model.weight, float(values[0]))
    average, expected = WeightAverage(model, decay), values[0]
    for value, share in zip(values[1:], shares, strict=True):
        nn.init.constant_(model.weight, float(value))
        average.update(model)
        expected = Fraction(share) * expected + (1 - Fraction(share)) * value
        (found,) = average.state_dict()["parameters"].values()
        assert found.dtype == torch.float64
        assert found.item() == pytest.approx(float(expected), rel=1e-14)
    assert average.state_dict()["num_updates"] == 5


def test_in_the_long_run_the_share_is_the_decay() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, 0.99)
    average.load_state_dict({**average.state_dict(), "num_updates": 10_000})
    nn.init.ones_(model.weight)
    average.update(model)
    assert average.state_dict()["parameters"]["weight"].item() == pytest.approx(0.01, rel=1e-14)


def test_sixteen_bit_weights_have_an_average_of_thirty_two_bits_and_get_sixteen_back() -> None:
    model = nn.Linear(4, 4).bfloat16()
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, 0.9998)
    average.load_state_dict({**average.state_dict(), "num_updates": 1_000_000})
    nn.init.ones_(model.weight)
    for _ in range(1000):
        average.update(model)
    held = average.state_dict()["parameters"]["weight"]
    assert held.dtype == torch.float32
    torch.testing.assert_close(held, torch.full((4, 4), 1 - 0.9998**1000), rtol=1e-4, atol=0)
    state = average.model_state(model)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert torch.equal(state["weight"], held.bfloat16())


def test_going_on_from_a_saved_state_gives_the_bits_of_going_on(tmp_path) -> None:
    """T1, R10."""
    model = _make_model()
    average = WeightAverage(model, 0.3)
    for step in range(4):
        _move(model, step)
        average.update(model, YES)
    write_torch_file(tmp_path / "state.pt", average.state_dict())
    for step in range(4, 8):
        _move(model, step)
        average.update(model, YES)

    other = _make_model(seed=1)
    resumed = WeightAverage(other, 0.3)
    resumed.load_state_dict(read_torch_file(tmp_path / "state.pt"))
    for step in range(4, 8):
        _move(other, step)
        resumed.update(other, YES)
    assert resumed.state_dict()["num_updates"] == average.state_dict()["num_updates"] == 8
    assert _bits(_averages(resumed)) == _bits(_averages(average))


def test_an_update_that_is_not_accepted_is_as_if_it_had_not_been() -> None:
    """T17, T18: a skipped step."""
    models = [_make_model() for _ in range(2)]
    skipping, plain = (WeightAverage(model, 0.9) for model in models)
    for step in range(3):
        for model, average in zip(models, (skipping, plain), strict=True):
            _move(model, step)
            average.update(model, YES if average is skipping else None)
        before = skipping.state_dict()
        kept = _bits(_averages(skipping))
        _move(models[0], step + 100)
        skipping.update(models[0], NO)
        assert _bits(_averages(skipping)) == kept
        assert skipping.state_dict()["num_updates"] == before["num_updates"] == step + 1
    assert _bits(_averages(skipping)) == _bits(_averages(plain))


def test_an_update_reads_nothing_back_to_the_host() -> None:
    # a tensor of the meta device has no value: reading one is an error
    model = _make_model().to("meta")
    average = WeightAverage(model, 0.9)
    for accept in (None, torch.empty((), dtype=torch.bool, device="meta")):
        average.update(model, accept)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        average.state_dict()


def test_the_model_has_the_average_inside_the_block_and_its_own_bits_after_it() -> None:
    model = _make_model()
    average = WeightAverage(model, 0.5)
    _move(model, 0)
    average.update(model)
    _move(model, 1)
    own, buffers = _bits(model.state_dict()), _bits(dict(model.named_buffers()))
    held, places = _bits(_averages(average)), [parameter.data_ptr() for parameter in model.parameters()]
    with average.applied_to(model):
        assert _bits(dict(model.named_parameters())) == held
        assert _bits(dict(model.named_buffers())) == buffers
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert _bits(model.state_dict()) == own
    assert _bits(_averages(average)) == held
    assert [parameter.data_ptr() for parameter in model.parameters()] == places


def test_the_model_has_its_own_bits_after_an_error_too() -> None:
    model = _make_model()
    average = WeightAverage(model, 0.5)
    _move(model, 0)
    own = _bits(model.state_dict())

    def evaluate() -> None:
        with average.applied_to(model):
            assert _bits(model.state_dict()) != own
            raise KeyError("of the evaluation")

    with pytest.raises(KeyError, match="of the evaluation"):
        evaluate()
    assert _bits(model.state_dict()) == own


def test_training_goes_on_after_the_block_as_if_it_had_not_been() -> None:
    def train(*, evaluate: bool) -> dict[str, bytes]:
        model = _make_model()
        average = WeightAverage(model, 0.5)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        image = torch.rand(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            optimizer.zero_grad()
            model(image).square().mean().backward()
            optimizer.step()
            average.update(model)
            if evaluate:
                with average.applied_to(model), torch.inference_mode():
                    model.eval()(image)
                model.train()
        return _bits(model.state_dict())

    assert train(evaluate=True) == train(evaluate=False)


def test_the_state_for_a_model_file_is_whole_and_has_the_buffers_of_the_model() -> None:
    model = _make_model()
    average = WeightAverage(model, 0.5)
    for step in range(3):
        _move(model, step)
        average.update(model)
    state = average.model_state(model)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert list(state) == list(own)
    for name, tensor in state.items():
        expected = average.state_dict()["parameters"].get(name, own[name])
        assert torch.equal(tensor, expected), name
    assert not torch.equal(state["0.weight"], own["0.weight"])
    _make_model(seed=2).load_state_dict(state)

    kept = _bits(state)
    _move(model, 9)
    average.update(model)
    assert _bits(state) == kept, "what is to be written must not change under the writer"


def test_a_parameter_that_has_two_names_is_averaged_under_both() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    average = WeightAverage(model, 0.5)
    _move(model, 0)
    average.update(model)
    state = average.model_state(model)
    assert torch.equal(state["0.weight"], state["1.weight"])
    assert not torch.equal(state["0.weight"], model[0].weight)


def test_frozen_parameters_stay_as_they_are_to_the_bit() -> None:
    model = _make_model()
    model[0].requires_grad_(False)
    average = WeightAverage(model, 0.9)
    before = _bits(dict(model[0].named_parameters()))
    for _ in range(20):
        average.update(model)
    state = average.model_state(model)
    assert _bits({name.removeprefix("0."): state[name] for name in ("0.weight", "0.bias")}) == before


def test_the_average_of_a_model_with_channels_last_has_the_same_values() -> None:
    models = [_make_model(), _make_model().to(memory_format=torch.channels_last)]
    averages = [WeightAverage(model, 0.9) for model in models]
    for step in range(3):
        for model, average in zip(models, averages, strict=True):
            _move(model, step)
            average.update(model)
    plain, last = (average.model_state(model) for model, average in zip(models, averages, strict=True))
    assert all(torch.equal(plain[name], last[name]) for name in plain)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, 1.5])
def test_a_decay_that_forgets_everything_or_nothing_is_refused(decay: float) -> None:
    with pytest.raises(RecipeError, match=r"E-RECIPE-059 \| ema.decay"):
        WeightAverage(nn.Linear(1, 1), decay)


def test_another_model_is_refused_by_its_names() -> None:
    average = WeightAverage(_make_model(), 0.9)
    for use in (average.update, average.model_state):
        with pytest.raises(ValueError, match=r"another model; it differs in 0\.bias, 0\.weight, 1\.bias"):
            use(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "change",
    [lambda tensors: tensors.pop("2.bias"), lambda tensors: tensors.update({"2.bias": torch.zeros(3)})],
    ids=["missing", "shape"],
)
def test_a_state_of_another_model_is_refused_and_changes_nothing(change) -> None:
    average = WeightAverage(_make_model(), 0.9)
    kept = _bits(_averages(average))
    state = WeightAverage(_make_model(seed=1), 0.9).state_dict()
    change(state["parameters"])
    with pytest.raises(ValueError, match=r"another model; it differs in 2\.bias"):
        average.load_state_dict(state)
    assert _bits(_averages(average)) == kept
