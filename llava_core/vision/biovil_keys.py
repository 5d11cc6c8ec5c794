"""BioViL-T's released weight names to ours and back, as a table of prefixes. Plain data and string work, no torch.

Released names are those of `biovil_t_image_model_proj_size_128.pt` (hub: microsoft/BiomedVLP-BioViL-T). Whoever reads a
checkpoint that wraps the tower takes the wrapper's prefix off first.
"""

# (released prefix, ours); the first match wins. None: read by nothing here and dropped on purpose, namely ImageNet's
# classifier and the projection to the space shared with text.
_BIOVIL_T: tuple[tuple[str, str | None], ...] = (
    ("encoder.encoder.fc.weight", None),
    ("encoder.encoder.fc.bias", None),
    ("encoder.encoder.conv1.", "model.trunk.conv1."),
    ("encoder.encoder.bn1.", "model.trunk.bn1."),
    ("encoder.encoder.layer", "model.trunk.layer"),
    ("encoder.backbone_to_vit.", "model.narrow."),
    ("encoder.missing_previous_emb", "model.missing_prior"),
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
    """The name in `BioVilTTower` of a released one; None if it is dropped on purpose.

    Raises KeyError for a name no row covers.
    """
    for released, ours in _BIOVIL_T:
        if ours is None and name == released:
            return None
        if ours is not None and name.startswith(released):
            return ours + name.removeprefix(released)
    raise KeyError(name)


def to_biovil_t(name: str) -> str:
    """The released name of one of the tower's. Raises KeyError for a name that is not the tower's."""
    for released, ours in _BIOVIL_T:
        if ours is not None and name.startswith(ours):
            return released + name.removeprefix(ours)
    raise KeyError(name)
