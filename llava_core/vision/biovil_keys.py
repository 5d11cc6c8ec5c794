"""BioViL-T's released weight names to ours and back, as a table of prefixes. Plain data and string work, no torch.

Released names are those of `biovil_t_image_model_proj_size_128.pt` (hub: microsoft/BiomedVLP-BioViL-T). For a
checkpoint that wraps the tower, the caller first strips the wrapper's prefix.
"""

from collections.abc import Iterator

# (released prefix, ours); the first match wins. None: not used here and dropped on purpose, namely ImageNet's
# classifier and the projection to the space shared with text.
_BIOVIL_T: tuple[tuple[str, str | None], ...] = (
    ("encoder.encoder.fc.weight", None),
    ("encoder.encoder.fc.bias", None),
    ("encoder.encoder.conv1.", "model.trunk.conv1."),
    ("encoder.encoder.bn1.", "model.trunk.bn1."),
    ("encoder.encoder.layer", "model.trunk.layer"),
    ("encoder.backbone_to_vit.", "model.narrow."),
    ("encoder.missing_previous_emb", "model.missing_prior"),
    # Computed, but present in checkpoints that include all buffers.
    ("encoder.vit_pooler.pos_embed", None),
    ("encoder.vit_pooler.", "model.pooler."),
    ("projector.model.0.weight", None),
    ("projector.model.1.weight", None),
    ("projector.model.1.bias", None),
    ("projector.model.1.running_mean", None),
    ("projector.model.1.running_var", None),
    ("projector.model.1.num_batches_tracked", None),
    ("projector.model.3.weight", None),
    ("projector.model.3.bias", None),
)


def from_biovil_t(name: str) -> str | None:
    """The name in `BioVilTTower` for a released name; None if it is dropped on purpose.

    Raises KeyError for a name that no row covers.
    """
    for released, ours in _BIOVIL_T:
        if ours is None and name == released:
            return None
        if ours is not None and name.startswith(released):
            return ours + name.removeprefix(released)
    raise KeyError(name)


def to_biovil_t(name: str) -> str:
    """The released name for one of the tower's. Raises KeyError for a name that is not the tower's."""
    for released, ours in _BIOVIL_T:
        if ours is not None and name.startswith(ours):
            return released + name.removeprefix(ours)
    raise KeyError(name)


def tensor_names() -> frozenset[str]:
    """Every tensor of the tower in its released size, a ResNet-50 and three blocks, under our names."""
    alone = {"model.narrow.weight", "model.missing_prior", "model.trunk.conv1.weight", "model.pooler.type_embed"}
    return frozenset(alone.union(_norm("model.trunk.bn1"), _trunk_names(), _pooler_names()))


def _trunk_names() -> Iterator[str]:
    for stage, depth in enumerate((3, 4, 6, 3), 1):
        for block in range(depth):
            name = f"model.trunk.layer{stage}.{block}"
            for index in (1, 2, 3):
                yield f"{name}.conv{index}.weight"
                yield from _norm(f"{name}.bn{index}")
        yield f"model.trunk.layer{stage}.0.downsample.0.weight"
        yield from _norm(f"model.trunk.layer{stage}.0.downsample.1")


def _pooler_names() -> Iterator[str]:
    layers = ["norm_post"]
    for block in range(3):
        layers += [f"blocks.{block}.{layer}" for layer in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")]
        yield from (f"model.pooler.blocks.{block}.attn.proj_{kind}.weight" for kind in "qkv")
    yield from (f"model.pooler.{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))


def _norm(name: str) -> Iterator[str]:
    """The tensors of a batch normalisation, including its statistics and batch counter."""
    kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return (f"{name}.{kind}" for kind in kinds)
