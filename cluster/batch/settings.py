"""Settings of a bulk job: the model, how answers are sampled, and the number and resources of each stage's processes.

Checked before anything starts. Knows neither Ray nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from cluster.batch.errors import JobError
from llava_core.checkpoints.found import FoundCheckpoint
from llava_core.types import SamplingParams
from llava_core.views import DicomView

StageName = Literal["preprocess", "encode", "generate"]
STAGES: tuple[StageName, ...] = get_args(StageName)


@dataclass(frozen=True)
class StageSettings:
    """The processes of one stage: how many, and for each its share of Ray's CPUs and GPUs and its compute threads.
    Threads None: every core for a large network, one for a small one; two pictures at a time for `preprocess`."""

    replicas: int = 1
    num_cpus: float = 0.25
    num_gpus: float = 0.0
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.replicas < 1 or (self.threads is not None and self.threads < 1):
            raise JobError(f"replicas and threads must be at least 1, not {self.replicas} and {self.threads}")
        if not all(0 <= share < math.inf for share in (self.num_cpus, self.num_gpus)):
            raise JobError(
                f"num_cpus and num_gpus must be numbers from 0 on, not {self.num_cpus:g} and {self.num_gpus:g}"
            )
        if self.num_gpus > 1 and not self.num_gpus.is_integer():
            # Ray requires it.
            raise JobError(f"num_gpus must be at most 1 or a whole number, not {self.num_gpus}")


Stages = Mapping[StageName, StageSettings]


def read_stages(given: Iterable[str]) -> Stages:
    """Parse words like `generate.replicas=2`. Raises JobError listing the known stages or settings."""
    stages: dict[StageName, StageSettings] = {name: StageSettings() for name in STAGES}
    for word in given:
        left, _, value = word.partition("=")
        name, _, setting = left.partition(".")
        stage = next((known for known in STAGES if known == name), None)
        if stage is None:
            raise JobError(f"--stage {word}: there is no stage {name!r}; there are {', '.join(STAGES)}")
        stages[stage] = _changed(stages[stage], setting, value, word)
    return stages


def _changed(stage: StageSettings, setting: str, value: str, word: str) -> StageSettings:
    known = [each.name for each in fields(StageSettings)]
    if setting not in known:
        raise JobError(f"--stage {word}: there is no setting {setting!r}; there are {', '.join(known)}")
    try:
        number = float(value) if setting.startswith("num_") else int(value)
    except ValueError:
        raise JobError(f"--stage {word}: {setting} must be a number, such as {setting}=2") from None
    changed: dict[str, Any] = {setting: number}
    return replace(stage, **changed)


@dataclass(frozen=True)
class ModelSettings:
    """The model as every stage opens it."""

    checkpoint: FoundCheckpoint
    template: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["8bit", "4bit"] | None = None


@dataclass(frozen=True)
class JobSettings:
    """All of a job but its input and output. `prompt` is the question for rows without one; `view` is for DICOM."""

    model: ModelSettings
    sampling: SamplingParams = field(default_factory=SamplingParams)
    prompt: str | None = None
    stages: Stages = field(default_factory=lambda: read_stages(()))
    max_running: int = 32
    waits_for_nodes: bool = False
    view: DicomView | None = None
