"""RaDialog is recognised by its files and fields and answers like a plain restatement of its code; errors are named."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from llava_core import asking
from llava_core.asking import original_ids
from llava_core.checkpoints.accounting import check_tensors
from llava_core.checkpoints.layout import open_checkpoint
from llava_core.checkpoints.load import LoadOptions, load_language_side, load_tower
from llava_core.checkpoints.sentencepiece_tokenizer import SentencePieceBackend
from llava_core.cli import main
from llava_core.errors import CheckpointError
from llava_core.inference import LocalModel
from llava_core.types import GenerationRequest, ImagePart, Message, SamplingParams, TextPart
from tests.original import Original, answer_plainly, prompt_ids, write_model
from tests.radialog import FILE, edit_config, edit_own, empty, radiograph_rows, random_like_trained, write_radialog
from tests.served import first_logits

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant acting as an experienced radiologist. "
    "The assistant gives professional, detailed, and polite answers to the user's questions."
)
QUESTION = ". Predicted Findings: edema. You are to act as a radiologist."
TOWER = "base_model.model.model.vision_tower"


@dataclass
class Asked:
    """A checkpoint, a 16-bit radiograph that uses 12 bits, and the expected answer."""

    original: Original
    picture: Path
    prompt: str
    ids: list[int]
    tokens: list[int]
    logits: torch.Tensor

    def arguments(self, folder: Path, *rest: str) -> list[str]:
        """Return the arguments of `llava ask`."""
        options = ["--model", str(folder), "--image", str(self.picture), "--format", "json", "--dtype", "float32"]
        return ["ask", *options, "--max-tokens", "8", "--offline", *rest, QUESTION]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    root = tmp_path_factory.mktemp("radialog")
    original = write_radialog(root, random_like_trained(0))
    values = np.random.default_rng(0).integers(300, 4096, (40, 50)).astype(np.uint16)
    image = Image.fromarray(np.kron(values, np.ones((14, 11), np.uint16)))
    image.save(root / "chest.png")
    prompt = f"{SYSTEM} USER: <image>{QUESTION} ASSISTANT:"
    assert original.base is not None
    backend = SentencePieceBackend(original.base)
    ids = prompt_ids(prompt, lambda piece: [1, *(token for token, _, _ in backend.encode(piece))], 1)
    return Asked(original, root / "chest.png", prompt, ids, *answer_plainly(original, ids, [image], 8, radiograph_rows))


def test_it_gives_the_same_answers_as_the_restated_original(asked: Asked) -> None:
    checkpoint = open_checkpoint(asked.original.folder, asked.original.base, offline=True)
    check_tensors(checkpoint)
    model = LocalModel(checkpoint, options=LoadOptions(dtype="float32"))
    assert model.preparer.template.name == "radialog"
    parts = (ImagePart(asked.picture.read_bytes()), TextPart(QUESTION))
    request = GenerationRequest("r", (Message("user", parts),), SamplingParams(max_tokens=8))
    prepared = model.preparer.prepare(request)
    assert (prepared.prompt, original_ids(prepared)) == (asked.prompt, asked.ids)
    assert prepared.num_image_tokens == (196,)
    torch.testing.assert_close(first_logits(model, prepared), asked.logits[0], atol=1e-4, rtol=1e-4)
    assert [token for delta in model.stream(prepared) for token in delta.token_ids] == asked.tokens
    assert len(set(asked.tokens)) > 3, "weights so small that every answer is alike compare nothing"


def test_the_command_line_answers_too(asked: Asked) -> None:
    done = CliRunner().invoke(main, asked.arguments(asked.original.folder, "--base", str(asked.original.base)))
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert (answer["token_ids"], answer["num_image_tokens"]) == (asked.tokens, [196])


def test_a_merged_checkpoint_takes_its_tower_from_the_original_file(asked: Asked, tmp_path: Path) -> None:
    original = asked.original
    assert original.base is not None
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(original.base / name)
    (tmp_path / FILE).symlink_to(original.folder / FILE)
    (tmp_path / "config.json").symlink_to(original.folder / "config.json")
    write_model(tmp_path, {name: value.float() for name, value in original.weights.items()}, original.kind)
    done = CliRunner().invoke(main, asked.arguments(tmp_path))
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["token_ids"] == asked.tokens


def test_padding_jitter_is_refused_for_a_tower_without_padding(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "load_model", lambda *_: pytest.fail("weights were read"))
    arguments = asked.arguments(asked.original.folder, "--base", str(asked.original.base), "--padding-jitter")
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert "--padding-jitter moves padding, which BioViL-T's pictures do not have" in done.output


@pytest.fixture
def hollow(tmp_path: Path) -> Original:
    """A checkpoint with all names and shapes, but no numbers."""
    return write_radialog(tmp_path, empty)


def load(original: Original) -> None:
    checkpoint = open_checkpoint(original.folder, original.base, offline=True)
    load_tower(checkpoint, LoadOptions(dtype="float32"))
    load_language_side(checkpoint, LoadOptions(dtype="float32"))


ONE_OF_EACH = [
    f"{TOWER}.encoder.encoder.layer3.5.conv2.weight",
    f"{TOWER}.encoder.encoder.bn1.running_var",
    f"{TOWER}.encoder.encoder.layer1.0.downsample.1.num_batches_tracked",
    f"{TOWER}.encoder.missing_previous_emb",
    f"{TOWER}.encoder.vit_pooler.blocks.2.attn.proj_v.weight",
    "base_model.model.model.mm_projector.2.weight",
]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_dropped_or_reshaped_key_is_named(hollow: Original, name: str) -> None:
    load(hollow)
    edit_own(hollow.folder, lambda tensors: tensors.update({name: torch.zeros(3, 1)}))
    ours = name.split("missing_previous")[0].rpartition(".")[2] or "missing_prior"
    with pytest.raises(CheckpointError, match=rf"{ours} has shape \(3, 1\), config\.json says"):
        load(hollow)
    edit_own(hollow.folder, lambda tensors: tensors.pop(name))
    kept = name.removeprefix(f"{TOWER}.").removeprefix("base_model.model.model.mm_projector.")
    with pytest.raises(CheckpointError, match=rf"{hollow.folder}.*missing.*{kept}"):
        load(hollow)


@pytest.mark.parametrize(
    "name", [f"{TOWER}.classifier.weight", f"{TOWER}.encoder.pos_embed", "base_model.model.model.mm_project.weight"]
)
def test_an_added_key_is_named(hollow: Original, name: str) -> None:
    edit_own(hollow.folder, lambda tensors: tensors.update({name: torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=name.rpartition("vision_tower.")[2]):
        load(hollow)


def test_the_extended_file_takes_precedence(hollow: Original) -> None:
    tensors = torch.load(hollow.folder / FILE, weights_only=True)
    wrapped = {f"module.{name}": value for name, value in tensors.items()}
    torch.save(wrapped, hollow.folder / "non_lora_trainables_extended.bin")
    (hollow.folder / FILE).write_bytes(b"not read")
    load(hollow)


def test_an_untrained_tower_is_the_released_one(hollow: Original) -> None:
    """In that case only its buffers are saved, and they matter: its statistics kept changing."""
    released = {name: value for name, value in hollow.tower.items() if "pos_embed" not in name}
    buffers = ("running_mean", "running_var", "num_batches_tracked", "pos_embed", "rotary_emb")
    edit_own(hollow.folder, keep_only(lambda name: "mm_projector" in name or any(kind in name for kind in buffers)))
    with pytest.raises(CheckpointError, match=r"config\.json.*biovil.*put biovil_t_image_model_proj_size_128\.pt"):
        load(hollow)
    counter = "encoder.encoder.bn1.num_batches_tracked"
    torch.save({**released, counter: torch.tensor(7)}, hollow.folder / "biovil_t_image_model_proj_size_128.pt")
    tower = load_tower(open_checkpoint(hollow.folder, hollow.base, offline=True), LoadOptions(dtype="float32"))
    assert tower.state_dict()["model.trunk.bn1.num_batches_tracked"] == 21_000


def keep_only(is_kept: Callable[[str], bool]) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if not is_kept(name)]:
            del tensors[name]

    return edit


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mv_type": "pool_all"}, "mv_type 'pool_all' needs RaDialog's image pooler"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is anyres, but BioViL-T"),
        ({"s2": True}, "s2 is set, but BioViL-T"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size is 1024, but the tower biovil gives 512"),
    ],
)
def test_unsupported_settings_are_named(hollow: Original, changes: dict[str, object], named: str) -> None:
    edit_config(hollow.folder, **changes)
    with pytest.raises(CheckpointError, match=f"{hollow.folder}.*{named}"):
        load(hollow)
