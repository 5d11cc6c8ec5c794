"""The graph through Serve's local testing mode, and what build_app builds from the settings."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from starlette.testclient import TestClient

from deployments.app import build_app, build_graph
from deployments.graph.handoff import LocalHandoff
from deployments.graph.routing import AffinityRouter
from deployments.preflight import check_checkpoints, share_towers
from deployments.settings.app import AppArgs
from deployments.settings.stages import GatewayArgs, PreprocessorArgs, RequestScaling
from llava_core.checkpoints.found import FoundCheckpoint
from llava_core.errors import CheckpointError
from llava_core.inference import LocalModel
from llava_core.types import GenerationRequest, ImagePart, Message, SamplingParams, TextPart
from tests.deployments.pictures import data_url, encode, plain
from tests.dicom_files import PLANTED, dicom, radiograph
from tests.hub import OLD, fill_cache, hub_of, use_cache


def _ask(client: TestClient, content: object, **options: object) -> dict:
    response = client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}], "max_tokens": 8, **options}
    )
    assert response.status_code == 200, response.text
    return response.json()


def _picture(data: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


@pytest.fixture(scope="module")
def in_process(tiny_checkpoint: Path) -> LocalModel:
    from llava_core.checkpoints.load import LoadOptions

    return LocalModel(tiny_checkpoint, options=LoadOptions(dtype="float32"))


def _expected(model: LocalModel, *parts: TextPart | ImagePart) -> str:
    request = GenerationRequest("expected", (Message("user", parts),), SamplingParams(max_tokens=8))
    return "".join(delta.text for delta in model.stream(request))


def test_the_graph_gives_the_same_answers_as_the_in_process_model(
    local_client: TestClient, in_process: LocalModel
) -> None:
    red, blue = plain("red"), plain("blue", (30, 90))
    answer = _ask(local_client, [_picture(red), _picture(blue), {"type": "text", "text": "What?"}])
    expected = _expected(in_process, ImagePart(red), ImagePart(blue), TextPart("What?"))
    assert answer["choices"][0]["message"]["content"] == expected


def test_a_cached_picture_gets_the_same_answers_as_an_uncached_one(
    local_client: TestClient, tiny_checkpoint: Path
) -> None:
    from llava_core.checkpoints.load import LoadOptions

    model = LocalModel(tiny_checkpoint, options=LoadOptions(dtype="float32"), cache_bytes=0)
    for question in ("What?", "Where?"):
        answer = _ask(local_client, [_picture(plain("green")), {"type": "text", "text": question}])
        expected = _expected(model, ImagePart(plain("green")), TextPart(question))
        assert answer["choices"][0]["message"]["content"] == expected


def test_text_alone_skips_the_encoder(local_client: TestClient, in_process: LocalModel) -> None:
    answer = _ask(local_client, "Hello", timings=True)
    assert answer["choices"][0]["message"]["content"] == _expected(in_process, TextPart("Hello"))
    assert "encode" not in answer["timings"]
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 0


def test_prompts_sent_together_get_the_same_answers_as_alone(local_client: TestClient) -> None:
    def complete(prompt: object, **options: object) -> dict:
        body = {"prompt": prompt, "max_tokens": 6, "n": 2, "seed": 3, "temperature": 1, **options}
        response = local_client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    prompts = ["What is", "Where", "How many shapes"]
    alone = [complete(prompt) for prompt in prompts]
    together = complete(prompts)
    assert [choice["index"] for choice in together["choices"]] == list(range(6))
    texts = [choice["text"] for each in alone for choice in each["choices"]]
    assert [choice["text"] for choice in together["choices"]] == texts
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert together["usage"][count] == sum(each["usage"][count] for each in alone)
    body = {"prompt": prompts, "max_tokens": 6, "n": 2, "seed": 3, "temperature": 1, "stream": True}
    events = local_client.post("/v1/completions", json=body).text.split("\n\n")
    *chunks, done = [event.removeprefix("data: ") for event in events if event]
    assert done == "[DONE]"
    streamed = [""] * 6
    for choice in (choice for chunk in chunks for choice in json.loads(chunk)["choices"]):
        streamed[choice["index"]] += choice["text"]
    assert streamed == texts


def test_a_dicom_file_is_answered_like_its_rendering_and_reports_its_transform(
    local_client: TestClient, in_process: LocalModel
) -> None:
    values = radiograph(60, 50)
    data = dicom(np.stack([values, values[::-1]]), bits=12, photometric="MONOCHROME1")
    grey = np.rint(255 - values[::-1] * (255 / 4095)).astype(np.uint8)
    view = {"frame": 2, "window": [2048, 4096]}
    picture = {"type": "image_url", "image_url": {"url": data_url(data, "application/dicom"), "dicom": view}}
    answer = _ask(local_client, [picture, {"type": "text", "text": "What?"}], image_transforms=True)
    expected = _expected(in_process, ImagePart(encode(Image.fromarray(grey))), TextPart("What?"))
    assert answer["choices"][0]["message"]["content"] == expected
    [transform] = answer["image_transforms"]
    assert (transform["format"], transform["frame"], transform["num_frames"], transform["is_inverted"]) == (
        "DICOM",
        2,
        2,
        True,
    )
    assert transform["window"] == {"centre": 2048.0, "width": 4096.0, "function": "LINEAR", "source": "request"}
    assert PLANTED not in str(answer)


def test_every_stage_reports_its_time(local_client: TestClient) -> None:
    timings = _ask(local_client, [_picture(plain())], timings=True)["timings"]
    assert set(timings) == {"preprocess", "transfer", "encode", "queue", "prefill", "decode", "total"}
    assert sum(value for stage, value in timings.items() if stage != "total") <= timings["total"] * 1.05


def test_the_builder_is_typed_and_refuses_unknown_settings(tiny_checkpoint: Path) -> None:
    built = call_user_app_builder_with_args_if_necessary(build_app, {"models": [{"checkpoint": str(tiny_checkpoint)}]})
    assert built._bound_deployment.name == "Gateway"
    with pytest.raises(ValueError, match="generatr"):
        call_user_app_builder_with_args_if_necessary(build_app, {"generatr": {}})


def test_the_builder_refuses_a_missing_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        build_app(AppArgs(models=[{"checkpoint": "/nowhere/at/all"}]))


def _graph(args: AppArgs) -> Any:
    found = check_checkpoints(args)
    return build_graph(args, found, share_towers(args, found), LocalHandoff())._bound_deployment


def test_replicas_and_resources_come_from_the_settings(tiny_checkpoint: Path) -> None:
    scaling = RequestScaling(target_requests=7, upscale_delay_s=4, look_back_s=20)
    args = AppArgs(
        models=[{"checkpoint": str(tiny_checkpoint)}],
        gateway=GatewayArgs(num_cpus=0.5, min_replicas=3, max_replicas=3),
        preprocessor=PreprocessorArgs(min_replicas=1, max_replicas=4, autoscaling=scaling),
    )
    gateway = _graph(args)
    assert gateway.num_replicas == 3
    assert "label_selector" not in gateway.ray_actor_options
    assert gateway.ray_actor_options["num_cpus"] == 0.5
    preprocessor = gateway.init_args[1]._bound_deployment
    made = preprocessor._deployment_config.autoscaling_config
    assert (made.min_replicas, made.max_replicas, made.initial_replicas) == (1, 4, None)
    assert (made.look_back_period_s, made.metrics_interval_s) == (20, 4)
    assert (made.upscale_delay_s, made.downscale_delay_s, made.downscale_to_zero_delay_s) == (4, 300, 600)
    # Build the policy as the controller does.
    assert made.policy.get_policy().__name__ == "LoadPolicy"
    assert made.policy.policy_kwargs == {"targets": {"requests": 7.0}, "tolerance": 0.1}


@pytest.mark.parametrize(("longest", "gateway_s"), [(900, 900), (60, 180)])
def test_a_stopping_gateway_has_time_for_the_longest_answer(
    tiny_checkpoint: Path, longest: float, gateway_s: float
) -> None:
    models = [{"checkpoint": str(tiny_checkpoint)}]
    gateway = _graph(AppArgs.model_validate({"models": models, "limits": {"max_timeout_seconds": longest}}))
    assert gateway._deployment_config.graceful_shutdown_timeout_s == gateway_s
    # Other replicas take over what these cannot finish.
    preprocessor = gateway.init_args[1]._bound_deployment
    assert preprocessor._deployment_config.graceful_shutdown_timeout_s == 180


def test_a_stage_that_may_scale_to_zero_starts_with_one_replica_by_default(tiny_checkpoint: Path) -> None:
    for initial, begins_with in ((None, 1), (0, None), (2, 2)):
        given = {"min_replicas": 0, "max_replicas": 2, "initial_replicas": initial}
        models = [{"checkpoint": str(tiny_checkpoint)}]
        _, _, _, generators, *_ = _graph(AppArgs.model_validate({"models": models, "generator": given})).init_args
        [generator] = generators.values()
        scaling = generator._bound_deployment._deployment_config.autoscaling_config
        assert (scaling.min_replicas, scaling.initial_replicas) == (0, begins_with)


def test_resources_missing_from_the_cluster_are_logged_and_waited_for(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node = {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0, "accelerator_type:A100": 1.0}, "Labels": {}}
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", lambda: [node])
    # As if Serve had not set up its own logging.
    monkeypatch.setattr("deployments.app.adopt_serve_logging", lambda: None)
    for kind, expected in (("A100", []), ("H100", ["generator: no node has accelerator_type H100; there are A100"])):
        caplog.clear()
        generator = {"num_gpus": 1, "accelerator_type": kind}
        built = build_app(AppArgs(models=[{"checkpoint": str(tiny_checkpoint)}], generator=generator))
        assert built._bound_deployment.name == "Gateway"
        assert [
            record.getMessage().partition(". ")[0] for record in caplog.records if "no node" in record.message
        ] == expected


def test_placement_settings_reach_the_stages_deployment(tiny_checkpoint: Path) -> None:
    placement = {
        "accelerator_type": "H100",
        "label_selector": {"zone": "!a"},
        "resources": {"disk": 2},
        "max_replicas_per_node": 3,
    }
    models = [{"checkpoint": str(tiny_checkpoint), "generator": {"num_gpus": 1, **placement}}]
    _, preprocessor, _, generators, *_ = _graph(AppArgs.model_validate({"models": models})).init_args
    [generator] = [each._bound_deployment for each in generators.values()]
    assert generator.ray_actor_options == {
        "num_cpus": 0.4,
        "num_gpus": 1,
        "accelerator_type": "H100",
        "label_selector": {"zone": "!a"},
        "resources": {"disk": 2},
    }
    assert generator._replica_config.max_replicas_per_node == 3
    assert preprocessor._bound_deployment.ray_actor_options == {"num_cpus": 0.2}


def _names(stages: Any) -> dict[str, str]:
    return {model: stage._bound_deployment.name for model, stage in stages.items()}


def test_models_share_only_an_identical_tower(tiny_checkpoint: Path, checkpoint_copy: Path, other_tower: Path) -> None:
    one, two, three = (
        {"name": name, "checkpoint": str(folder), "generator": {"num_cpus": cpus}}
        for name, folder, cpus in (
            ("one/1", tiny_checkpoint, 1),
            ("two", checkpoint_copy, 2),
            ("three", other_tower, 3),
        )
    )
    _, preprocessor, encoders, generators, *_ = _graph(AppArgs(models=[one, two])).init_args
    assert preprocessor._bound_deployment.name == "Preprocessor"
    assert _names(encoders) == {"one/1": "VisionEncoder", "two": "VisionEncoder"}
    assert encoders["one/1"] is encoders["two"]
    assert _names(generators) == {"one/1": "Generator-one-1", "two": "Generator-two"}
    cpus = [stage._bound_deployment.ray_actor_options["num_cpus"] for stage in generators.values()]
    assert cpus == [1, 2]
    _, _, encoders, generators, *_ = _graph(AppArgs(models=[three, one, two])).init_args
    assert _names(encoders) == {
        "three": "VisionEncoder-three",
        "one/1": "VisionEncoder-one-1",
        "two": "VisionEncoder-one-1",
    }
    # Each encoder has its own weights.
    for name, folder in (("three", other_tower), ("one/1", tiny_checkpoint)):
        assert encoders[name]._bound_deployment.init_args[1].model == str(folder)
    assert generators["two"]._bound_deployment.init_args[1].model == str(checkpoint_copy)
    _, _, encoders, generators, *_ = _graph(AppArgs(models=[one])).init_args
    assert (_names(encoders), _names(generators)) == ({"one/1": "VisionEncoder"}, {"one/1": "Generator"})


def test_stages_use_affinity_routing_and_the_gateway_does_not(tiny_checkpoint: Path) -> None:
    """Calls of the gateway itself carry the client's session id."""
    models = [
        {"name": name, "checkpoint": str(tiny_checkpoint), "engine": {"max_running": running}}
        for name, running in (("a", 1), ("b", 2))
    ]
    gateway = _graph(AppArgs(models=models, engine={"max_waiting": 2}))
    _, preprocessor, encoders, generators, *_ = gateway.init_args
    stages = [preprocessor, *encoders.values(), *generators.values()]
    deployments = [gateway, *(stage._bound_deployment for stage in stages)]
    routers = [each._deployment_config.request_router_config.get_request_router_class() for each in deployments]
    assert AffinityRouter not in routers[:1]
    assert routers[1:] == [AffinityRouter] * 5
    given = [stage._deployment_config.request_router_config.request_router_kwargs for stage in deployments[1:]]
    # An engine's capacity: running and waiting requests.
    assert given == [{}, {}, {}, {"capacity": 3}, {"capacity": 4}]


def test_every_stage_gets_the_checkpoint_found_by_the_builder(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    use_cache(monkeypatch, tmp_path / "cache")
    fill_cache(tmp_path / "cache", "owner/name", {OLD: tiny_checkpoint})
    gateway = build_app(AppArgs(models=[{"checkpoint": "owner/name"}], offline=True))._bound_deployment
    args, preprocessor, encoders, generators, *_ = gateway.init_args
    expected = FoundCheckpoint("owner/name", None, {"owner/name": OLD}, offline=True)
    assert preprocessor._bound_deployment.init_args[1] == {"owner/name": expected}
    for stages in (encoders, generators):
        [(name, stage)] = stages.items()
        assert name == args.models[0].served_name == "owner/name"
        assert stage._bound_deployment.init_args[1] == expected


def test_downloads_by_the_builder_are_logged_through_serves_handlers(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("ray.serve"), "handlers", [handler])
    for name in ("deployments", "llava_core"):
        # Set through monkeypatch, so that they are restored afterwards.
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    monkeypatch.chdir(tmp_path)
    with hub_of({"owner/name": {OLD: tiny_checkpoint}}) as hub:
        use_cache(monkeypatch, tmp_path / "cache", hub.url)
        build_app(AppArgs(models=[{"checkpoint": "owner/name"}]))
    assert [line for line in lines if line.startswith("owner/name, the model: downloading")]


def test_the_worker_table_exists_only_where_workers_may_register(tiny_checkpoint: Path) -> None:
    models = [{"checkpoint": str(tiny_checkpoint)}]
    allowed = {"workers": {"allowed_hosts": ["gpu1:21002"]}}
    for protocol, is_there in (({}, False), (allowed, True), ({**allowed, "enabled": False}, False)):
        *_, table = _graph(AppArgs.model_validate({"models": models, "llava_protocol": protocol})).init_args
        assert (table is not None) == is_there
        if table is not None:
            deployment = table._bound_deployment
            assert (deployment.name, deployment.num_replicas) == ("WorkerTable", 1)
            # It takes no CPU from the stages.
            assert deployment.ray_actor_options["num_cpus"] == 0
