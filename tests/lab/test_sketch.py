"""What a sketch keeps of gradients."""

import torch

from lit_opd.lab.sketch import Sketch


def test_what_is_short_enough_is_not_sketched():
    parameters = [torch.zeros(2, 3), torch.zeros(4)]
    sketch, gradients = Sketch(parameters, 10, 0), [torch.arange(6.0).view(2, 3), torch.arange(4.0)]
    assert (sketch.size, sketch.coordinates) == (10, 10)
    assert sketch(gradients).tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]


def test_a_sketch_keeps_inner_products_up_to_its_noise():
    parameters = [torch.zeros(300), torch.zeros(7, 100)]
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
