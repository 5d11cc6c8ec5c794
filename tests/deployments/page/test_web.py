"""Who can reach the page, and that its browser is told to contact no other host."""

import httpx
import pytest

from deployments.page.settings import PageArgs
from deployments.page.web import ExposedPageError, check_reach
from tests.deployments.page.browsing import serving_page


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "page.example.com"])
def test_other_hosts_have_access_only_with_allow_anyone(host: str) -> None:
    with pytest.raises(ExposedPageError, match="--allow-anyone"):
        check_reach(host, PageArgs())
    check_reach(host, PageArgs(allow_anyone=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_this_machine_always_has_access(host: str) -> None:
    check_reach(host, PageArgs())


def test_other_hosts_are_blocked_by_policy_and_only_uploads_are_served() -> None:
    with serving_page("http://127.0.0.1:9") as url:
        response = httpx.get(url)
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert response.headers["referrer-policy"] == "no-referrer"
        assert httpx.get(f"{url}/gradio_api/file=/etc/passwd").status_code == httpx.codes.FORBIDDEN
