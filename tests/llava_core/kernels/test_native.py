"""Our own kernels against the definitions in float64, and the fallback where they cannot be compiled."""

import logging
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llava_core.kernels import native
from llava_core.kernels.native import NativeKernels, can_attend, native_kernels

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
# Edge cases of bfloat16: halves between two numbers, the largest numbers, infinities and NaN.
SPECIAL = [0.0, -0.0, 1.00390625, 1.01171875, -88.0, 88.0, 1e-30, 3e38, -3e38, torch.inf, -torch.inf, torch.nan]


def kernels(dtype: torch.dtype) -> NativeKernels:
    found = native_kernels(dtype)
    if found is None:
        pytest.skip("no C compiler")
    return found


def near(output: Tensor, exact: Tensor) -> None:
    tolerance = TOLERANCE[output.dtype]
    torch.testing.assert_close(output.double(), exact, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 700])
def test_a_gate_is_silu_times_the_other_half(rows: int, dtype: torch.dtype) -> None:
    both = (torch.randn(rows, 2 * 172) * 4).to(dtype)
    gate, up = both.double().chunk(2, -1)
    near(kernels(dtype).gate(both), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_is_correct_at_edge_cases(dtype: torch.dtype) -> None:
    gate = torch.tensor(SPECIAL).to(dtype)
    output = kernels(dtype).gate(torch.cat([gate, torch.ones_like(gate)])[None])[0]
    near(output, torch.nn.functional.silu(gate.double()).to(dtype).double())


@given(values=st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_numbers_are_rounded_as_by_torch(values: list[float]) -> None:
    """The sum of a number and 0 is the number, rounded once."""
    hidden = torch.zeros(1, len(values), dtype=torch.bfloat16)
    added = torch.tensor([values]).to(torch.bfloat16)
    kernels(torch.bfloat16).add_norm_(hidden, added, torch.ones(len(values), dtype=torch.bfloat16), 1e-6)
    assert torch.equal(hidden.isnan(), added.isnan())
    assert torch.equal(hidden.nan_to_num(7), added.nan_to_num(7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 900])
def test_heads_are_rotated_in_place_and_the_rest_is_unchanged(rows: int, dtype: torch.dtype) -> None:
    projected = torch.randn(rows, 7, 32).to(dtype)
    angles = torch.rand(1000, 1, 16).double() * 6
    cos = torch.cat([angles.cos(), angles.cos()], -1).to(dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], -1).to(dtype)
    positions = torch.randint(0, 1000, (rows, 2))[:, 1]
    unrotated = projected.double()
    expected = unrotated * cos.double()[positions] + unrotated.roll(16, -1) * sin.double()[positions]
    kernels(dtype).rotate_(projected, 5, cos, sin, positions)
    near(projected[:, :5], expected[:, :5])
    assert torch.equal(projected[:, 5:].double(), unrotated[:, 5:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads_first", [True, False])
def test_states_are_stored_in_their_slots_and_nowhere_else(dtype: torch.dtype, *, heads_first: bool) -> None:
    cache = torch.zeros(2, 50, 16).to(dtype).transpose(0, 1) if heads_first else torch.zeros(50, 2, 16).to(dtype)
    projected = torch.randn(3, 6, 16).to(dtype)
    slots = torch.tensor([49, 0, 17])
    # First as a slice of a projection, then in the layout of transformers' modules.
    for states in (projected[:, 4:], projected[:, 4:].transpose(0, 1).contiguous().transpose(0, 1)):
        cache.zero_()
        kernels(dtype).store(states, cache, slots)
        assert torch.equal(cache[slots], states)
        assert int(cache.count_nonzero()) == states.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "groups"), [(64, 1), (64, 4), (64, 3), (128, 1), (128, 4), (128, 5), (80, 2), (256, 16), (32, 37)]
)
@pytest.mark.parametrize("window", [None, 1, 70])
def test_a_token_sees_its_own_blocks(dim: int, groups: int, window: int | None, dtype: torch.dtype) -> None:
    lengths, heads, size = [1, 16, 17, 250], 2, 16
    order = torch.randperm(sum(-(-length // size) for length in lengths), dtype=torch.int32)
    blocks, table = iter(order.tolist()), torch.zeros(len(lengths), 16, dtype=torch.int32)
    for line, length in zip(table, lengths, strict=True):
        for place in range(-(-length // size)):
            line[place] = next(blocks)
    keys, values = (torch.randn(heads, len(order) * size, dim).to(dtype).transpose(0, 1) for _ in range(2))
    query = torch.randn(len(lengths), heads * groups, dim).to(dtype)
    output = kernels(dtype).attend(query, keys, values, table, torch.tensor(lengths), size, window, 0.2)
    for row, length in enumerate(lengths):
        slots = (table[row].long()[:, None] * size + torch.arange(size)).flatten()[:length][-(window or length) :]
        asked = query[row].double().view(heads, groups, dim)
        weights = (torch.einsum("hgd,khd->hgk", asked, keys[slots].double()) * 0.2).softmax(-1)
        near(output[row], torch.einsum("hgk,khd->hgd", weights, values[slots].double()).flatten(0, 1))


def test_supported_head_sizes() -> None:
    assert [dim for dim in (16, 20, 64, 72, 80, 128, 256, 272) if can_attend(dim)] == [16, 64, 80, 128, 256]


def test_other_dtypes_and_devices_have_no_native_kernels() -> None:
    assert native_kernels(torch.float16) is None
    assert native_kernels(torch.bfloat16, "cuda") is None


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Simulates a process that has not loaded the kernels yet; returns its own cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (native._library, native._kernels):
        cached.cache_clear()
    yield tmp_path / "llava-serve"
    for cached in (native._library, native._kernels):
        cached.cache_clear()


@needs_compiler
def test_kernels_are_compiled_once_for_all_processes(fresh: Path) -> None:
    assert native_kernels(torch.float32) is not None
    made = list(fresh.iterdir())
    assert [path.suffix for path in made] == [".so"]
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    before = made[0].stat().st_mtime_ns
    native._library.cache_clear()
    assert native._library() is not None
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [before]


def test_without_a_compiler_there_are_no_kernels(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.INFO):
        assert native_kernels(torch.float32) is None
    assert "no C compiler" in caplog.text


def test_a_compiler_failure_is_logged_and_leaves_no_files(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho it knows no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert native_kernels(torch.float32) is None
    assert "it knows no such flag" in caplog.text
    assert list(fresh.iterdir()) == []


@needs_compiler
def test_a_folder_writable_by_others_is_not_trusted(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    fresh.mkdir()
    fresh.chmod(0o777)
    assert native_kernels(torch.float32) is None
    assert "can be written to by others" in caplog.text


@needs_compiler
def test_a_user_without_a_home_has_no_kernels(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    assert native_kernels(torch.float32) is None
    assert "generation is slower: Could not determine home directory." in caplog.text


@needs_compiler
def test_processes_that_compile_at_the_same_time_do_not_interfere(fresh: Path) -> None:
    program = "import torch; from llava_core.kernels.native import native_kernels; print(native_kernels(torch.float32))"
    command, environment = [sys.executable, "-c", program], {**os.environ, "XDG_CACHE_HOME": str(fresh.parent)}
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert all("NativeKernels" in process.communicate(timeout=300)[0] for process in started)
    assert len(list(fresh.iterdir())) == 1
