"""What a sketch keeps of gradients."""

import pytest
import torch

from lit_opd.measures.sketch import Sketch


def test_what_is_short_enough_is_not_sketched():
    parameters = [torch.zeros(2, 3), torch.zeros(4)]
    sketch, gradients = Sketch(parameters, 10, 0), [torch.arange(6.0).view(2, 3), torch.arange(4.0)]
    assert (sketch.size, sketch.coordinates) == (10, 10)
    assert sketch(gradients).tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]


@pytest.mark.parametrize(
    "parameters",
    [[torch.zeros(300), torch.zeros(7, 100)], [torch.zeros(2, 3)] * 150, [torch.zeros(65), torch.zeros(1)] * 9],
    ids=["a few long", "many short", "about the size"],
)
def test_a_sketch_keeps_inner_products_up_to_its_noise(parameters):
    generator = torch.Generator().manual_seed(1)
    a, b = ([torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters] for _ in range(2))
    exact = sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
    scale = (sum(float(x.square().sum()) for x in a) * sum(float(y.square().sum()) for y in b)) ** 0.5
    found = []
    for seed in range(300):
        sketch = Sketch(parameters, 64, seed)
        assert sketch(a).shape == (64,)
        found.append(float(sketch(a) @ sketch(b)))
    errors = (torch.tensor(found) - exact) / scale
    assert errors.std() < 1.2 * (2 / 64) ** 0.5
    assert abs(errors.mean()) < 4 * errors.std() / 300**0.5
    torch.testing.assert_close(sketch([x + 2 * y for x, y in zip(a, b, strict=True)]), sketch(a) + 2 * sketch(b))


def test_coordinates_are_summed_in_turn_through_all_parameters():
    lengths = (3, 1, 4, 12, 2, 7)
    parameters = [torch.zeros(n) for n in lengths]
    sketch = Sketch(parameters, 5, 3)
    gradients = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in lengths]
    signed = torch.cat([values * signs for values, signs in zip(gradients, sketch._signs, strict=True)])
    wanted = [signed[slot::5].sum().item() for slot in range(5)]
    assert sketch(gradients).tolist() == pytest.approx(wanted, abs=1e-5)
