"""GPU kernels against the definitions in float64: on a GPU if there is one, otherwise in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from llava_core.kernels.layer_gpu import GpuKernels, QuickGelu, store

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates bfloat16 where a GPU rounds.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
dtypes = pytest.mark.parametrize("dtype", DTYPES)
kernels = GpuKernels()


def random(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*size, device=DEVICE).to(dtype)


def near(output: Tensor, exact: Tensor) -> None:
    tolerance = TOLERANCE[output.dtype]
    torch.testing.assert_close(output.double(), exact, atol=tolerance, rtol=tolerance)


@dtypes
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("size", [96, 4096])
def test_add_norm_keeps_the_sum_and_divides_by_its_root_mean_square(rows: int, size: int, dtype: torch.dtype) -> None:
    hidden, weight = random(rows, size, dtype=dtype), random(size, dtype=dtype)
    for added in (None, random(rows, size, dtype=dtype)):
        summed = hidden.clone() if added is None else hidden + added
        exact = summed.double()
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
        near(kernels.add_norm_(hidden, added, weight, 1e-6), exact)
        assert torch.equal(hidden, summed)


@dtypes
@pytest.mark.parametrize(("rows", "dim", "num_heads"), [(1, 128, 17), (5, 24, 5), (40, 64, 3)])
def test_heads_are_rotated_in_place_and_the_rest_is_unchanged(
    rows: int, dim: int, num_heads: int, dtype: torch.dtype
) -> None:
    projected = random(rows, num_heads + 2, dim, dtype=dtype)
    angles = torch.rand(300, 1, dim // 2, device=DEVICE).double() * 6
    cos = torch.cat([angles.cos(), angles.cos()], -1).to(dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], -1).to(dtype)
    # A column of a larger tensor, as in a sheet of integers.
    positions = torch.randint(0, 300, (rows, 2), device=DEVICE)[:, 1]
    unrotated = projected.double()
    expected = unrotated * cos.double()[positions] + unrotated.roll(dim // 2, -1) * sin.double()[positions]
    kernels.rotate_(projected, num_heads, cos, sin, positions)
    near(projected[:, :num_heads], expected[:, :num_heads])
    assert torch.equal(projected[:, num_heads:].double(), unrotated[:, num_heads:])


@dtypes
@pytest.mark.parametrize(("rows", "size"), [(1, 172), (5, 1024), (3, 1500)])
def test_a_gate_is_silu_times_the_other_half(rows: int, size: int, dtype: torch.dtype) -> None:
    both = random(rows, 2 * size, dtype=dtype) * 4
    gate, up = both.double().chunk(2, -1)
    near(kernels.gate(both), torch.nn.functional.silu(gate) * up)


@dtypes
@pytest.mark.parametrize(("heads", "dim"), [(2, 24), (8, 200)])
def test_states_are_stored_in_their_slots_and_nowhere_else(heads: int, dim: int, dtype: torch.dtype) -> None:
    keys, values = torch.zeros(2, 50, heads, dim, device=DEVICE, dtype=dtype)
    projected = random(3, 3 * heads, dim, dtype=dtype)
    key, value = projected[:, heads : 2 * heads], projected[:, 2 * heads :]
    slots = torch.tensor([49, 0, 17], device=DEVICE)
    # First as a slice of a projection, then in the layout of transformers' modules.
    for states in ((key, value), [part.transpose(0, 1).contiguous().transpose(0, 1) for part in (key, value)]):
        keys.zero_()
        values.zero_()
        store(*states, keys, values, slots)
        assert torch.equal(keys[slots], key)
        assert torch.equal(values[slots], value)
        assert int(keys.count_nonzero() + values.count_nonzero()) == 2 * key.numel()


@dtypes
@pytest.mark.parametrize("size", [(7,), (2, 3, 500)])
def test_quick_gelu_equals_clips_activation(size: tuple[int, ...], dtype: torch.dtype) -> None:
    hidden = random(*size, dtype=dtype) * 3
    exact = hidden.double()
    near(QuickGelu()(hidden), exact * torch.sigmoid(1.702 * exact))
