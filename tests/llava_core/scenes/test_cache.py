"""Training pictures on disk: reproducible, labelled patch by patch, and resumed after an interruption."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llava_core.errors import LlavaError
from llava_core.images.preprocess import PreprocessConfig, preprocess
from llava_core.scenes.cache import (
    LABELS,
    CacheSpec,
    SceneCache,
    open_cache,
    patch_labels,
    render_training_picture,
    training_scene,
)
from llava_core.scenes.draw import character_centres
from llava_core.scenes.vocabulary import COLOURS, DIGITS, LETTERS, PLACES, PRINTED_WORDS, SHAPES, SIZES
from tests.llava_core.scenes.conftest import SPEC

WIDE = CacheSpec(seed=9, num_scenes=60, size=128, patch=16)
COLUMNS = list(LABELS)


def test_tiles_are_the_preprocessed_pictures(scene_cache: SceneCache) -> None:
    assert scene_cache.tiles.shape == (12, 64, 64, 3)
    for index in range(12):
        picture = render_training_picture(scene_cache.scene(index))
        assert (scene_cache.tiles[index] == preprocess(picture, PreprocessConfig(size=64))[0]).all()


def test_a_scene_depends_on_seed_and_index_alone() -> None:
    assert training_scene(SPEC, 5) == training_scene(replace(SPEC, num_scenes=6), 5)
    assert training_scene(SPEC, 5) != training_scene(SPEC, 6)
    assert training_scene(SPEC, 5) != training_scene(replace(SPEC, seed=4), 5)


def test_one_scene_in_twelve_is_large() -> None:
    sides = [max(scene.width, scene.height) for scene in (training_scene(WIDE, index) for index in range(600))]
    assert 0.04 < sum(side > 500 for side in sides) / len(sides) < 0.13
    assert min(sides) >= 64
    assert max(sides) <= 1500


def test_a_cache_may_have_more_text_and_no_random_letters() -> None:
    words = replace(WIDE, with_text=1.0, random_letters=0.0)
    texts = [[training_scene(spec, index).text for index in range(100)] for spec in (WIDE, words)]
    printed = [[text.text for text in column if text is not None] for column in texts]
    assert len(printed[1]) > 1.5 * len(printed[0])
    assert all(text.isdigit() or text in PRINTED_WORDS for text in printed[1])


def test_interrupted_drawing_resumes_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_core.scenes.cache._CHUNK", 4)
    whole = open_cache(tmp_path / "whole", SPEC)
    stopped = open_cache(tmp_path / "stopped", SPEC)
    stopped.tiles[4:] = 0
    stopped.labels[4:] = 0
    drawn = tmp_path / "stopped" / "drawn"
    drawn.write_text("4")
    (tmp_path / "before").hardlink_to(drawn)
    resumed = open_cache(tmp_path / "stopped", SPEC)
    assert (resumed.tiles == whole.tiles).all()
    assert (resumed.labels == whole.labels).all()
    # Replaced, not overwritten in place: an interruption would have left one of the two numbers.
    assert (drawn.read_text(), (tmp_path / "before").read_text()) == ("12", "4")


def test_a_finished_cache_is_not_drawn_again(scene_cache: SceneCache, tmp_path: Path) -> None:
    scene_cache.tiles[0] = 7
    assert (open_cache(tmp_path / "pictures", SPEC).tiles[0] == 7).all()


def test_a_folder_with_another_cache_is_refused(scene_cache: SceneCache, tmp_path: Path) -> None:
    with pytest.raises(LlavaError, match="pictures was made by another recipe"):
        open_cache(tmp_path / "pictures", replace(SPEC, seed=4))
    assert open_cache(tmp_path / "pictures", SPEC).spec == scene_cache.spec


def test_the_patch_under_each_centre_is_labelled_with_the_object() -> None:
    places = [name for row in PLACES for name in row]
    for index in range(WIDE.num_scenes):
        scene = training_scene(WIDE, index)
        grid = patch_labels(scene, WIDE).reshape(8, 8, len(COLUMNS))
        longest = max(scene.width, scene.height)
        for thing in scene.objects:
            column = int((thing.x + (longest - scene.width) // 2) / longest * 8)
            row = int((thing.y + (longest - scene.height) // 2) / longest * 8)
            facts = dict(zip(COLUMNS, grid[row, column].tolist(), strict=True))
            assert facts["centre"] == 1
            assert SHAPES[facts["shape"] - 1] == thing.shape
            assert list(COLOURS)[facts["colour"] - 1] == thing.colour
            assert list(SIZES)[facts["size"] - 1] == thing.size
            assert places[facts["place"] - 1] == thing.place


def test_at_most_one_centre_per_object_and_no_labels_on_empty_patches() -> None:
    for index in range(WIDE.num_scenes):
        scene = training_scene(WIDE, index)
        labels = patch_labels(scene, WIDE)
        assert 0 < labels[:, 0].sum() <= len(scene.objects)
        empty = labels[:, 1] == 0
        assert (labels[empty, :5] == 0).all()
        assert (labels[~empty, 1:5] > 0).all()


def test_character_labels_from_left_to_right_spell_the_text() -> None:
    alphabet = LETTERS + DIGITS
    read = []
    for index in range(WIDE.num_scenes):
        scene = training_scene(WIDE, index)
        slots = patch_labels(scene, WIDE).reshape(8, 8, len(COLUMNS))[..., 5:]
        rows = [row for row in slots if row.any()]
        text = "".join(alphabet[value - 1] for row in rows for value in row.flatten().tolist() if value)
        read.append((text, scene.text.text if scene.text else ""))
    # Two characters in the same half of a patch overwrite one another; this is rare and only happens with small type.
    assert np.mean([got == printed for got, printed in read]) > 0.9
    assert all(set(got) <= set(printed) for got, printed in read)


def test_a_character_is_in_the_slot_of_its_half_of_the_patch() -> None:
    for index in range(WIDE.num_scenes):
        scene = training_scene(WIDE, index)
        if scene.text is None:
            continue
        slots = patch_labels(scene, WIDE).reshape(8, 8, len(COLUMNS))[..., 5:]
        longest = max(scene.width, scene.height)
        for x, y in character_centres(scene.text):
            column = (x + (longest - scene.width) // 2) / longest * 8
            row = int((y + (longest - scene.height) // 2) / longest * 8)
            assert slots[row, int(column), 0 if column % 1 < 0.5 else 1] > 0


def test_labels_are_below_their_number_of_classes() -> None:
    labels = np.concatenate([patch_labels(training_scene(WIDE, index), WIDE) for index in range(40)])
    assert (labels.max(0) < np.array(list(LABELS.values()))).all()
