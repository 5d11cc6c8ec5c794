"""Settings of one model: its name, where it comes from, and how its own stages differ from those of other models.

Knows names, folders and bounds, but neither Ray nor torch.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, model_validator

from deployments.settings.stages import EngineArgs, GeneratorArgs, Settings, VisionEncoderArgs
from deployments.settings.upstreams import UpstreamArgs
from llava_core.checkpoints.files import DEFAULT_MODEL

DEFAULT_MODEL_NAME = "scenes-llava"
# Deployment names also become names of log files and processes.
_NO_LABEL = re.compile(r"[^A-Za-z0-9._-]+")
_OWN_STAGES = ("engine", "vision_encoder", "generator")
_OF_WEIGHTS = frozenset({"checkpoint", "base", "revisions", "template", *_OWN_STAGES})


class ModelArgs(Settings):
    """`checkpoint` None is the default model; `base` is what an adapter or projector was trained on; `template` None is
    the one that matches the checkpoint's own chat template; `name` None is the folder's name or the hub id.

    `revisions` has the revision of every hub id in use, including those of base and tower; None is the newest revision
    of each at the time the application is built.

    With `upstream` another server answers for the model, which then needs a `name` and has no settings for weights.
    """

    name: str | None = Field(default=None, min_length=1, max_length=128)
    checkpoint: str | None = None
    base: str | None = None
    revisions: dict[str, str] | None = None
    template: str | None = None
    engine: EngineArgs = EngineArgs()
    vision_encoder: VisionEncoderArgs = VisionEncoderArgs()
    generator: GeneratorArgs = GeneratorArgs()
    upstream: UpstreamArgs | None = None

    @property
    def source(self) -> str:
        """The folder, absolute because replicas run in another working directory, or the hub id."""
        return str(DEFAULT_MODEL) if self.checkpoint is None else _located(self.checkpoint)

    @property
    def base_source(self) -> str | None:
        """The folder or hub id of the base."""
        return None if self.base is None else _located(self.base)

    @property
    def served_name(self) -> str:
        """The name that clients put into `model`."""
        if self.name is not None:
            return self.name
        folder = Path(self.source)
        if folder == DEFAULT_MODEL:
            return DEFAULT_MODEL_NAME
        return folder.name if folder.is_dir() else self.source

    @property
    def label(self) -> str:
        """The name, reduced to characters that a deployment's name may have."""
        return _NO_LABEL.sub("-", self.served_name)

    @model_validator(mode="after")
    def _check_upstream(self) -> Self:
        if self.upstream is None:
            return self
        if self.name is None:
            raise ValueError("a model with an upstream needs a name")
        if own := sorted(_OF_WEIGHTS & self.model_fields_set):
            raise ValueError(f"{self.name!r} has an upstream, which excludes {', '.join(own)}; remove one or the other")
        return self

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        name = self.served_name
        if not name.isprintable() or name != name.strip():
            raise ValueError(f"{name!r} begins or ends with a space or cannot be printed; set another name")
        return self


def with_defaults(given: Any) -> Any:
    """An application's settings as given, each model's entry completed with the settings common to all models.

    Values of the wrong type are left as they are, for the validation of the fields to report.
    """
    if not isinstance(given, dict) or not isinstance(models := given.get("models", ({},)), list | tuple):
        return given
    return {**given, "models": [_completed(model, given) for model in models]}


def _completed(model: Any, given: Mapping[str, Any]) -> Any:
    own = _plain(model)
    if not isinstance(own, dict) or own.get("upstream") is not None:
        return own
    stages = {stage: (_plain(given.get(stage, {})), _plain(own.get(stage, {}))) for stage in _OWN_STAGES}
    return own | {
        stage: {**general, **special}
        for stage, (general, special) in stages.items()
        if isinstance(general, dict) and isinstance(special, dict)
    }


def _plain(value: Any) -> Any:
    """Settings built in Python, as if read from a file: only the fields that were set."""
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value


def _located(checkpoint: str) -> str:
    folder = Path(checkpoint).expanduser()
    return str(folder.resolve()) if folder.is_dir() else checkpoint
