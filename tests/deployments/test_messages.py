"""Messages between stages arrive unchanged."""

import pickle
import time

import numpy as np
import pytest
import torch

from deployments.messages import Elapsed, PackedFeatures, Prepared, pack, unpack, without_tiles
from llava_core.types import ImageFeatures, PreparedImage, PreparedRequest, SamplingParams, Size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packing_and_pickling_preserves_features_bit_for_bit(dtype: torch.dtype) -> None:
    features = ImageFeatures("abc", torch.randn(5, 8).to(dtype))
    packed = pickle.loads(pickle.dumps(pack(features), protocol=5))
    arrived = unpack(packed)
    assert arrived.digest == "abc"
    assert arrived.features.dtype == dtype
    assert torch.equal(arrived.features, features.features)


def test_unpacking_a_read_only_view_copies_it() -> None:
    packed = pack(ImageFeatures("abc", torch.ones(2, 3)))
    data = packed.data.copy()
    data.flags.writeable = False
    features = unpack(PackedFeatures("abc", "float32", data)).features
    features.zero_()
    assert data.any()


def test_packed_data_is_a_read_only_view_of_the_features() -> None:
    features = torch.ones(2, 3)
    data = pack(ImageFeatures("abc", features)).data
    assert data.ctypes.data == features.data_ptr()
    with pytest.raises(ValueError, match="read-only"):
        data[0] = 1


def test_stage_times_add_up() -> None:
    prepared = Elapsed({}, left_at=0.0).finished("preprocess")
    encoded = prepared.arrived().finished("encode")
    generated = encoded.arrived()
    assert set(generated.stage_ms) == {"preprocess", "transfer", "encode"}
    assert generated.stage_ms["preprocess"] > 1e9


def test_a_clock_that_is_ahead_causes_no_negative_times() -> None:
    elapsed = Elapsed({}, left_at=1e12).arrived().finished("encode")
    assert elapsed.stage_ms == {"transfer": 0.0, "encode": pytest.approx(0.0, abs=1e3)}


def test_tiles_are_dropped_once_encoded() -> None:
    image = PreparedImage("abc", Size(4, 4), np.zeros((1, 4, 4, 3), np.uint8))
    request = PreparedRequest("id", (1, 2), (image,), SamplingParams())
    assert without_tiles(request).images == ()
    assert Prepared(request, Elapsed()).request.images == (image,)


def test_the_last_of_several_transfers_is_reported_separately() -> None:
    first = Elapsed({"preprocess": 1.0}, left_at=time.time() - 2.0).arrived()
    second = Elapsed(first.stage_ms, left_at=time.time() - 3.0)
    assert second.arrived().transfer_s(second) == pytest.approx(3.0, abs=0.5)
    assert second.arrived().stage_ms["transfer"] == pytest.approx(5000, abs=500)
