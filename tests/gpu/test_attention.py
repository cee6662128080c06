"""Flash attention over packed rows on a card: right in bf16, without waiting, the same twice, and what it costs."""

import warnings

import pytest
import torch
import transformers
from references import rollout_from

from lit_opd.models import LanguageModel
from lit_opd.models.flash import attend_flash
from lit_opd.models.flash_proof import BOUND, probe_rows, prove_attention
from lit_opd.models.packed_attention import attend
from lit_opd.models.packing import pack
from lit_opd.types import SamplingLaw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a CUDA device"),
]
CARD = torch.device("cuda")
SHARED = [3] * 20
TREES = {
    "prompts and completions": probe_rows(1000, prompt=128, completion=256, count=4, tokens=6000),
    "one row": probe_rows(1000, prompt=300, completion=700, count=1, tokens=1000),
    "single tokens": [[1], [2], [3]],
    "branches of branches": [[*SHARED, *[4] * 17, 5], [*SHARED, *[4] * 17, 6, 6], [*SHARED, 7], [*SHARED[:7], 8], [9]],
    "filler": [[9] * 70 + [row] * 77 for row in range(7)],
}


def tensors(layout, heads=16, groups=8, size=128):
    generator = torch.Generator(CARD).manual_seed(0)
    shapes = [(len(layout.ids_N), number, size) for number in (heads, groups, groups)]
    made = [torch.randn(shape, generator=generator, device=CARD) for shape in shapes]
    return [x.bfloat16().requires_grad_() for x in made]


def outputs(call, layout, leaves, window=None):
    out = call(*leaves, layout, leaves[0].shape[-1] ** -0.5, window, 0.0)[: layout.count]
    generator = torch.Generator(CARD).manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator, device=CARD).bfloat16().to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize(("heads", "groups", "size"), [(16, 8, 128), (4, 4, 64), (6, 1, 256)])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("tree", TREES)
def test_outputs_and_gradients_are_as_near_to_float64_as_rounding_lets_them(tree, window, heads, groups, size):
    layout, _ = pack(TREES[tree], CARD)
    leaves = tensors(layout, heads, groups, size)
    exact = outputs(attend, layout, [x.detach().double().requires_grad_() for x in leaves], window)
    for found, expected in zip(outputs(attend_flash, layout, leaves, window), exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert found.isfinite().all()
        # A gradient may be zero, as that of the queries is where a token sees itself alone.
        assert (found - expected).norm() < BOUND * expected.norm() + 1e-5 * found.numel() ** 0.5


def test_gradients_are_the_same_twice_under_deterministic_algorithms():
    layout, _ = pack(TREES["prompts and completions"], CARD)
    leaves = tensors(layout)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = outputs(attend_flash, layout, leaves), outputs(attend_flash, layout, leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, second))


def make_policy():
    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes)).to(CARD)
    return LanguageModel(model, None, "student")


def make_rollout():
    prompts = torch.randint(3, 1000, (4, 64), device=CARD).repeat_interleave(4, 0)
    ids = torch.randint(3, 1000, (16, 128), device=CARD)
    whole, real = torch.ones_like(prompts, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool)
    zeros, index = torch.zeros(ids.shape, device=CARD), torch.arange(4, device=CARD).repeat_interleave(4)
    finish = torch.zeros(16, dtype=torch.long, device=CARD)
    return rollout_from(prompts, whole, ids, real, real, zeros, finish, SamplingLaw(), index)


def waits(run):
    """Count how often something waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(w.message) for w in caught if "synchron" in str(w.message)]


def test_a_micro_batch_waits_for_the_device_once_and_a_second_pass_over_it_never():
    policy, rows = make_policy(), probe_rows(1000, prompt=64, completion=128, count=4, tokens=3000)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        verdict = prove_attention(policy, rows, "fast")
        print(verdict)
        policy.hidden(make_rollout())[0].sum().backward()  # kernels are loaded
        rollout = make_rollout()
        assert len(waits(lambda: policy.hidden(rollout)[0].sum().backward())) == 1
        assert waits(lambda: policy.hidden(rollout)[0].sum().backward()) == []


def measured(run):
    """Milliseconds of the fastest of five runs, and the peak of what one allocates in MiB."""
    times = []
    for _ in range(5):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return min(times), (torch.cuda.max_memory_allocated() - before) / 2**20


def test_a_long_row_costs_what_causal_attention_costs():
    layout, _ = pack(probe_rows(1000, prompt=128, completion=16256, count=1, tokens=16384), CARD)
    leaves = tensors(layout)

    def causal(query, key, value, layout, scale, window, dropped):
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        dense = torch.nn.functional.scaled_dot_product_attention
        return dense(query, key, value, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1)

    shape = "1 x 16,384, 16 heads of 128 in 8 groups, forward and backward"
    ways = {"flash over packed rows": attend_flash, "causal SDPA": causal, "masks": attend}
    costs = {name: measured(lambda call=call: outputs(call, layout, leaves)) for name, call in ways.items()}
    for name, (milliseconds, mib) in costs.items():
        print(f"{shape}, {name}: {milliseconds:.1f} ms, {mib:.0f} MiB")
    assert costs["flash over packed rows"] < costs["masks"]
