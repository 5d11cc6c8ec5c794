"""The values the configuration section may have, and that registration is off where strangers could be reached."""

import pytest
from pydantic import ValidationError

from deployments.settings.app import AppArgs
from deployments.settings.llava_protocol import LlavaProtocolArgs


def test_by_default_the_protocol_is_enabled_and_no_worker_may_register() -> None:
    args = AppArgs().llava_protocol
    assert args.enabled
    assert args.workers.allowed_hosts == ()
    assert args.workers.dispatch == "shortest_queue"
    assert args.workers.heart_beat_expiration_s == 30


@pytest.mark.parametrize("address", ["https://llava.example.com", "http://10.0.0.1:8000/vision", "http://[::1]:80/"])
def test_an_address_for_clients_is_a_base_url(address: str) -> None:
    assert LlavaProtocolArgs(address=address).address == address


@pytest.mark.parametrize(
    "args",
    [
        {"address": "llava.example.com"},
        {"address": "http://"},
        {"address": "http://x/?a"},
        {"address": "http://x y"},
        {"enable": True},
        {"workers": {"dispatch": "random"}},
        {"workers": {"heart_beat_expiration_s": 0}},
        {"workers": {"silence_s": 0}},
        {"workers": {"max_workers": 0}},
        {"workers": {"allowed_hosts": ["http://gpu1:21002"]}},
        {"workers": {"allowed_networks": ["10.0.0.1/8"]}},
    ],
)
def test_unknown_and_impossible_settings_are_refused(args: dict) -> None:
    with pytest.raises(ValidationError):
        AppArgs.model_validate({"llava_protocol": args})
