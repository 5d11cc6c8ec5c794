"""Messages of other servers: no address, key or model name in any form gets through, and ordinary words stay."""

import time

import pytest

from deployments.settings.upstreams import UpstreamArgs
from deployments.upstreams.redaction import Redaction

KEY = "sk-of-the-upstream"
URL, MODEL = "http://gpu-1:30000/v1", "Qwen/Qwen2.5-VL-7B-Instruct"


def _shown(text: str, *, url: str = URL, model: str = MODEL, name: str = "big") -> str:
    return Redaction(name, UpstreamArgs(url=url, model=model), KEY)(text)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("boom at http://gpu-1:30000/v1 ...", "boom at an address ..."),
        ("boom at (http://gpu-1:30000/v1/chat/completions).", "boom at (an address)."),
        ("no 'HTTPS://GPU-1/v1?a=b&c', sorry", "no 'an address', sorry"),
        ("see url_grpc://worker-7:50051.", "see url_an address."),
        ("boom at gpu-1:30000", "boom at the server"),
        ("gpu-1:30000/v1: refused", "the server: refused"),
        ("host='gpu-1', port=30000", "host='the server', port=30000"),
        ("on gpu-1.rack-2.internal:30001/v1/models, GPU-1.", "on the server, the server."),
        ("sent to 10.0.0.7:3000 and 10.0.0.8.", "sent to an address and an address."),
    ],
)
def test_an_address_is_not_shown_in_any_form(said: str, shown: str) -> None:
    assert _shown(said) == shown


@pytest.mark.parametrize(
    ("url", "said", "shown"),
    [
        ("http://127.0.0.1:24190/v1", "boom at http://127.0.0.1:24190/v1 ...", "boom at an address ..."),
        ("http://[::1]:24190/v1", "boom at [::1]:24190/v1 or ::1", "boom at the server or the server"),
        ("http://localhost/v1", "no api.localhost:80 but LOCALHOST", "no the server but the server"),
        ("http://bücher.example", "not xn--bcher-kva.example or bücher.example", "not the server or the server"),
    ],
)
def test_hosts_of_every_kind_are_recognised(url: str, said: str, shown: str) -> None:
    assert _shown(said, url=url) == shown


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (f"The model `{MODEL}` does not exist.", "The model `big` does not exist."),
        (f"{MODEL}: too long", "big: too long"),
        (f"no file /models/{MODEL}/config.json.", "no file big."),
        (f"no '{MODEL}/model-00001-of-00002.safetensors'", "no 'big'"),
        (
            "no /root/.cache/hub/models--Qwen--Qwen2.5-VL-7B-Instruct/snapshots/0a1b/config.json here",
            "no big here",
        ),
    ],
)
def test_the_servers_name_of_the_model_is_not_shown_in_any_form(said: str, shown: str) -> None:
    assert _shown(said) == shown


def test_a_model_named_by_its_folder_is_not_shown() -> None:
    assert _shown("no /models/x/config.json in /data/models/x", model="/models/x") == "no big in big"


def test_a_short_name_is_replaced_only_as_a_whole_word() -> None:
    said = "m: some max_tokens of `m`, m-rope, 5.m, ham/mm. /models/m/config.json, m"
    shown = "big: some max_tokens of `big`, m-rope, 5.m, ham/mm. big, big"
    assert _shown(said, model="m") == shown


def test_text_without_secrets_stays_as_it_is() -> None:
    said = "max_tokens 2.5 must be < 8192/2 in messages[0].content[1]; gpu-10 and/or my-gpu-1, version 0.10.2 at 12:30"
    assert _shown(said) == said


def test_the_key_is_not_shown_and_our_name_is_taken_literally() -> None:
    assert _shown(f"key {KEY}, m", model="m", name=r"\g<0>\1") == r"key ***, \g<0>\1"


@pytest.mark.parametrize(
    "piece", ["a", "a.", "a/", "a-", "--", "://", "a://", "gpu-1.", "gpu-1/", "gpu-1/!", "1.", "Qwen/"]
)
def test_the_longest_message_is_read_in_no_time(piece: str) -> None:
    began = time.process_time()
    _shown(piece * (64 * 1024 // len(piece)))
    assert time.process_time() - began < 1
