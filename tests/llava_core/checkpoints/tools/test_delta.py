"""Deltas: equal to a restatement of the original code; applying them restores the model; memory is bounded."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_core.checkpoints.files import find_tensors, read_json
from llava_core.checkpoints.hub import Hub
from llava_core.checkpoints.layout import open_checkpoint
from llava_core.checkpoints.tensors import read_tensors
from llava_core.checkpoints.tools.delta import apply_delta, make_delta
from llava_core.errors import CheckpointError
from tests.original import (
    Kind,
    Original,
    Tensors,
    decoder_weights,
    text_config,
    write_json,
    write_model,
    write_original,
)

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def tensors_of(folder: Path) -> Tensors:
    return read_tensors(find_tensors(folder))


def halve(folder: Path) -> None:
    """Rewrites a folder's only file in float16, as released weights are."""
    file = folder / "model.safetensors"
    save_file({name: value.half() for name, value in tensors_of(folder).items()}, file, metadata={"format": "pt"})


def write_base(root: Path, target: Original, *, rows: int, dtype: torch.dtype = torch.float16) -> Path:
    """Writes a text-only model with weights near the target's decoder, and a buffer that old versions saved."""
    folder = root / "base"
    folder.mkdir()
    other = decoder_weights(torch.Generator().manual_seed(5), rows, kv_heads=4)
    weights = {}
    for name, value in other.items():
        near = target.weights[name][: len(value)]
        weights[name] = (0.1 * value[: len(near)] + near if name not in VOCABULARY else value).to(dtype)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write_json(folder / "config.json", {**text_config(target.kind, rows, 4), "architectures": ["LlamaForCausalLM"]})
    write_model(folder, weights, Kind(num_shards=3))
    return folder


def as_the_original(base: Tensors, own: Tensors, sign: int) -> Tensors:
    """Adds or subtracts key by key in float16, as the original code does; only rows that both models have."""
    result = {name: value.clone().half() for name, value in own.items()}
    for name, value in result.items():
        if name in base and "inv_freq" not in name:
            other = base[name].half()
            rows = min(len(value), len(other))
            value[:rows] += sign * other[:rows]
    return result


@pytest.mark.parametrize("more", [-3, 0, 3], ids=["base has fewer rows", "as many rows", "base has more rows"])
def test_deltas_equal_the_originals_and_restore_the_model(tmp_path: Path, more: int) -> None:
    target = write_original(tmp_path, Kind(tower_inside=True))
    halve(target.folder)
    base = write_base(tmp_path, target, rows=target.num_tokens + more)
    make_delta(str(base), str(target.folder), tmp_path / "delta", max_shard_size=20_000)
    wanted, theirs = tensors_of(target.folder), tensors_of(base)
    delta = tensors_of(tmp_path / "delta")
    expected = as_the_original(theirs, wanted, -1)
    assert set(delta) == set(wanted)
    assert all(torch.equal(delta[name], expected[name]) for name in wanted)
    apply_delta(str(base), str(tmp_path / "delta"), tmp_path / "again")
    again, expected = tensors_of(tmp_path / "again"), as_the_original(theirs, delta, 1)
    assert all(torch.equal(again[name], expected[name]) for name in wanted)
    for name in wanted:
        torch.testing.assert_close(again[name], wanted[name], atol=2e-3, rtol=2e-3)
    untouched = [name for name in wanted if "mm_projector" in name or "vision_tower" in name]
    assert all(torch.equal(delta[name], wanted[name]) for name in untouched)
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (target.folder / "tokenizer.json").read_bytes()
    assert read_json(tmp_path / "again", "config.json") == read_json(target.folder, "config.json")
    open_checkpoint(tmp_path / "again", offline=True)


def test_a_delta_is_not_opened_as_a_model(tmp_path: Path) -> None:
    target = write_original(tmp_path, Kind())
    base = write_base(tmp_path, target, rows=target.num_tokens)
    make_delta(str(base), str(target.folder), tmp_path / "delta")
    with pytest.raises(CheckpointError, match=r"the differences to base, not a model; .*llava delta apply base"):
        open_checkpoint(tmp_path / "delta")
    for models in (str(base), str(tmp_path / "delta")), (str(tmp_path / "delta"), str(target.folder)):
        with pytest.raises(CheckpointError, match="delta is a delta, where a model is wanted"):
            make_delta(*models, tmp_path / "twice")


def test_a_delta_without_its_marker_is_applied_only_by_force(tmp_path: Path) -> None:
    target = write_original(tmp_path, Kind())
    base = write_base(tmp_path, target, rows=target.num_tokens)
    made = tmp_path / "delta"
    make_delta(str(base), str(target.folder), made)
    # Base and delta in the wrong order.
    with pytest.raises(CheckpointError, match="delta is a delta, where a model is wanted"):
        apply_delta(str(made), str(base), tmp_path / "out")
    # A delta as the original code writes it.
    write_json(made / "config.json", read_json(target.folder, "config.json"))
    with pytest.raises(CheckpointError, match=r"delta/config\.json has no delta_base, .*apply it with --force"):
        apply_delta(str(base), str(made), tmp_path / "out")
    apply_delta(str(base), str(made), tmp_path / "out", force=True)
    expected, again = tensors_of(target.folder), tensors_of(tmp_path / "out")
    for name, value in expected.items():
        torch.testing.assert_close(again[name], value, atol=2e-3, rtol=2e-3)


def test_another_base_is_refused_but_not_the_same_in_other_files(tmp_path: Path) -> None:
    target = write_original(tmp_path, Kind())
    halve(target.folder)
    base = write_base(tmp_path, target, rows=target.num_tokens)
    make_delta(str(base), str(target.folder), tmp_path / "delta")
    same = tensors_of(base)
    for file in base.glob("model*"):
        file.unlink()
    write_model(base, {name: value.float() for name, value in same.items()}, Kind(files="bin", num_shards=2))
    apply_delta(str(base), str(tmp_path / "delta"), tmp_path / "applied")
    for file in base.glob("pytorch_model*"):
        file.unlink()
    # The smallest change that training could make.
    changed = "model.layers.1.input_layernorm.weight"
    same[changed][5] *= 1.01
    write_model(base, same, Kind())
    with pytest.raises(CheckpointError, match=r"base is not the base of .*, which was made from base .*--force"):
        apply_delta(str(base), str(tmp_path / "delta"), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    apply_delta(str(base), str(tmp_path / "delta"), tmp_path / "forced", force=True)
    right, forced = tensors_of(tmp_path / "applied"), tensors_of(tmp_path / "forced")
    assert [name for name in right if not torch.equal(right[name], forced[name])] == [changed]
    assert not {"delta_base", "delta_base_sha256"} & set(read_json(tmp_path / "forced", "config.json"))


def test_a_base_is_recorded_by_a_portable_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write_original(tmp_path, Kind())
    base = write_base(tmp_path, target, rows=target.num_tokens)
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("base", "checkpoint/../base/", str(base))):
        make_delta(name, str(target.folder), tmp_path / str(number))
        assert read_json(tmp_path / str(number), "config.json")["delta_base"] == "base"
    snapshots = {"lmsys/some-base": base}
    monkeypatch.setattr(Hub, "find", lambda _, name, role: snapshots.get(name, Path(name)))
    make_delta("lmsys/some-base", str(target.folder), tmp_path / "of-the-hub")
    assert read_json(tmp_path / "of-the-hub", "config.json")["delta_base"] == "lmsys/some-base"


def test_a_base_is_first_rounded_to_the_models_dtype(tmp_path: Path) -> None:
    target = write_original(tmp_path, Kind())
    halve(target.folder)
    base = write_base(tmp_path, target, rows=target.num_tokens, dtype=torch.float32)
    make_delta(str(base), str(target.folder), tmp_path / "delta")
    expected = as_the_original(tensors_of(base), tensors_of(target.folder), -1)
    assert all(torch.equal(value, expected[name]) for name, value in tensors_of(tmp_path / "delta").items())


def test_a_wrong_base_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    target = write_original(tmp_path, Kind())
    base = write_base(tmp_path, target, rows=target.num_tokens)
    tensors = tensors_of(base)
    for file in base.glob("model*"):
        file.unlink()
    write_model(base, {**tensors, "model.norm.weight": torch.ones(3)}, Kind())
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \(3,\), but .* has \(32,\); it is the wrong"):
        make_delta(str(base), str(target.folder), tmp_path / "delta")
    write_model(base, {**tensors, "model.layers.7.mlp.up_proj.weight": torch.ones(3)}, Kind())
    with pytest.raises(CheckpointError, match=r"wrong base for .*does not hold: model\.layers\.7\.mlp"):
        make_delta(str(base), str(target.folder), tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
    (tmp_path / "delta").mkdir()
    write_model(base, tensors, Kind())
    with pytest.raises(CheckpointError, match="delta exists and is not overwritten"):
        make_delta(str(base), str(target.folder), tmp_path / "delta")


NUM_LARGE, LARGE = 24, 1_500_000


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_memory_is_bounded_by_tensor_size_not_model_size(tmp_path: Path, suffix: str) -> None:
    """With 24 shards of 6 MB in each of three models, the process grows by less than half a model."""
    for name in ("base", "target"):
        (tmp_path / name).mkdir()
        names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(NUM_LARGE)]
        tensors = {key: torch.full((LARGE // 100, 100), len(name) / 7) for key in names}
        write_json(tmp_path / name / "config.json", {"mm_vision_tower": "x"})
        write_model(tmp_path / name, tensors, Kind(num_shards=NUM_LARGE, files=suffix))
    # VmHWM belongs to this process alone; getrusage's peak is inherited from the parent process.
    script = (
        "import re, sys, torch\n"
        "from pathlib import Path\n"
        "from llava_core.checkpoints.tools.delta import make_delta\n"
        "torch.ones(10).bfloat16().float()\n"
        "def kib(field):\n"
        "    return int(re.search(rf'{field}:\\s+(\\d+) kB', Path('/proc/self/status').read_text()).group(1))\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"
        "before = kib('VmRSS')\n"
        "make_delta(sys.argv[1], sys.argv[2], Path(sys.argv[3]))\n"
        "print(kib('VmHWM') - before)\n"
    )
    arguments = [str(tmp_path / name) for name in ("base", "target", "delta")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout) * 1024
    # At least one tensor, or nothing was measured.
    assert 4 * LARGE < grown < NUM_LARGE * 4 * LARGE / 2, f"{grown / 2**20:.0f} MiB"
    some = read_tensors({names[3]: find_tensors(tmp_path / "delta")[names[3]]})[names[3]]
    assert torch.allclose(some, torch.tensor(2 / 7))
