"""Settings: defaults, names, limits, and what is refused."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from deployments.settings.app import AppArgs, AuthArgs, LimitArgs
from deployments.settings.stages import StageArgs
from llava_core.request_limits import RequestLimits


def test_default_limits_are_those_of_the_core() -> None:
    assert LimitArgs().request == RequestLimits()


@pytest.mark.parametrize(
    "args",
    [
        {"modle": "x"},
        {"model": "x"},
        {"models": []},
        {"models": None},
        {"models": {"name": "x"}},
        {"models": [None]},
        {"models": [{"modle": "x"}]},
        {"models": [{"name": ""}]},
        {"models": [{"name": " x"}]},
        {"models": [{"name": "a\nb"}]},
        {"models": [{"generator": None}]},
        {"models": [{"generator": {"threads": 0}}]},
        {"models": [{"preprocessor": {}}]},
        {"engine": {"max_runnning": 3}},
        {"engine": {"max_running": 0}},
        {"generator": {"device": "tpu"}},
        {"generator": {"threads": 0}},
        {"preprocessor": {"min_replicas": 3, "max_replicas": 2}},
        {"preprocessor": {"device": "cpu"}},
        {"preprocessor": {"cache_bytes": -1}},
        {"vision_encoder": {"cache_bytes": -1}},
        {"generator": {"cache_bytes": 1}},
        {"limits": {"max_images": -1}},
        {"auth": {"keys": []}},
        {"fetch": {"allowed_hosts": ["https://example.com/"]}},
        {"fetch": {"allowed_networks": ["10.0.0.1/8"]}},
        {"fetch": {"timeout_s": 0}},
        {"fetch": {"max_redirects": -1}},
        {"cors": {"origin": "*"}},
    ],
)
def test_unknown_and_impossible_settings_are_refused(args: dict) -> None:
    with pytest.raises(ValidationError):
        AppArgs.model_validate(args)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a", "b", "a"), r"2 models are called 'a'; give each entry of models a name of its own"),
        ((None, None), r"2 models are called 'scenes-llava'"),
        (("a/b", "c", "a b"), r"'a/b', 'a b' differ only in what cannot be part of a deployment's name"),
    ],
)
def test_models_with_indistinguishable_names_are_refused(names: tuple[str | None, ...], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AppArgs.model_validate({"models": [{"name": name} for name in names]})


def test_a_mistake_in_shared_settings_is_located_there() -> None:
    with pytest.raises(ValidationError) as caught:
        AppArgs.model_validate({"generator": {"threads": 0}, "models": [{"name": "a"}, {"name": "b"}]})
    assert caught.value.errors()[0]["loc"] == ("generator", "threads")


def test_limits_reach_the_core() -> None:
    limits = LimitArgs(max_images=2, max_image_bytes=10, max_image_pixels=20, max_image_side=30, max_text=40)
    assert limits.request.max_images == 2
    assert limits.request.max_text == 40
    assert limits.request.image == limits.image
    assert (limits.image.max_bytes, limits.image.max_pixels, limits.image.max_side) == (10, 20, 30)


def test_the_committed_configuration_states_the_defaults() -> None:
    config = yaml.safe_load((Path(__file__).parents[3] / "serve_config.yaml").read_text())
    stated = AppArgs.model_validate(config["applications"][0]["args"])
    assert stated == AppArgs()


def test_stages_fit_a_small_machine_twice() -> None:
    args = AppArgs()
    stages: list[StageArgs] = [args.gateway, args.preprocessor, args.vision_encoder, args.generator]
    assert sum(stage.num_cpus for stage in stages) * 2 <= 2


def test_the_engine_refuses_first_and_the_gateway_holds_what_the_stages_accept() -> None:
    args = AppArgs()
    accepted = args.engine.max_running + args.engine.max_waiting
    assert accepted == 288
    stages = (args.preprocessor, args.vision_encoder)
    before = [stage.max_ongoing_requests + stage.max_queued_requests for stage in stages]
    assert before == [260, 272]
    assert accepted + args.vision_encoder.max_ongoing_requests < args.generator.max_ongoing_requests
    assert accepted + sum(before) <= args.gateway.max_ongoing_requests


def test_max_requests_in_flight_defaults_to_the_capacity_of_all_engines() -> None:
    assert AppArgs().max_requests_in_flight == 32 + 256
    small = {"engine": {"max_running": 2, "max_waiting": 3}, "generator": {"max_replicas": 4}}
    assert AppArgs(models=[{"name": "a", **small}, {"name": "b"}]).max_requests_in_flight == 4 * 5 + 288
    assert AppArgs(limits={"max_requests_in_flight": 7}).max_requests_in_flight == 7


def test_the_path_of_the_keys_file_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert AuthArgs(keys_file="keys.json").keys_file == str(tmp_path / "keys.json")
    assert AuthArgs().keys_file is None


def test_nothing_is_open_by_default() -> None:
    args = AppArgs()
    assert (args.auth.allow_anyone, args.cors.origins, args.fetch.allowed_hosts) == (False, (), ())
    assert (args.fetch.allow_http, args.fetch.allowed_networks) == (False, ())


def test_max_bytes_in_flight_must_cover_one_body() -> None:
    with pytest.raises(ValidationError, match="max_bytes_in_flight 5 is below max_body_bytes 6"):
        LimitArgs(max_body_bytes=6, max_bytes_in_flight=5)
