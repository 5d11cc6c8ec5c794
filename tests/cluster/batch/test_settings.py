"""Stages and their settings, parsed from the command line."""

import pytest

from cluster.batch.errors import JobError
from cluster.batch.settings import STAGES, StageSettings, read_stages


def test_options_change_only_the_settings_they_name() -> None:
    stages = read_stages(["generate.replicas=2", "generate.num_gpus=0.5", "encode.threads=3"])
    assert stages == {
        "preprocess": StageSettings(),
        "encode": StageSettings(threads=3),
        "generate": StageSettings(replicas=2, num_gpus=0.5),
    }
    assert tuple(stages) == STAGES


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("decode.replicas=2", "no stage 'decode'; there are preprocess, encode, generate"),
        ("replicas=2", "no stage 'replicas'"),
        ("generate.gpus=2", "no setting 'gpus'; there are replicas, num_cpus, num_gpus, threads"),
        ("generate.replicas=two", "replicas must be a number"),
        ("generate.replicas", "replicas must be a number"),
        ("generate.replicas=0", "at least 1"),
        ("encode.threads=0", "at least 1"),
        ("encode.num_cpus=-1", "numbers from 0 on, not -1 and 0"),
        ("encode.num_cpus=nan", "numbers from 0 on, not nan and 0"),
        ("encode.num_gpus=1.5", "a whole number"),
    ],
)
def test_an_invalid_option_is_refused_listing_the_valid_ones(word: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        read_stages([word])
