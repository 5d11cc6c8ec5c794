"""Addresses: their form, hosts allowed by name, and what counts as the internet."""

import ipaddress
import string

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.outgoing.addresses import HostRule, is_public, may_connect, parse_address
from llava_core.errors import ImageError

# One or two addresses from each of IANA's special-purpose registries, and of each form that embeds IPv4; compiled
# independently of our code and of Python's.
NOT_PUBLIC = """
0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.254 169.254.0.1
169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.192 192.0.2.1 192.88.99.1 192.168.0.1 192.168.255.255
198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 168.63.129.16
:: ::1 ::7f00:1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::ffff:0:8.8.8.8 64:ff9b::a9fe:a9fe 64:ff9b::808:808 64:ff9b:1::1
100::1 2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:2::1 2001:db8::1 2001:10::1 2002:7f00:1:: 2002:808:808::1
3fff::1 4000::1 fc00::1 fd00:ec2::254 fe80::1 fec0::1 ff02::1 ff0e::1
""".split()
PUBLIC = """
1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 93.184.216.34 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0
172.15.255.255 172.32.0.0 192.167.255.255 192.169.0.0 223.255.255.255
2001:4860:4860::8888 2606:4700:4700::1111 2a00:1450:4001:82a::200e
""".split()


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_non_internet_addresses_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    assert not may_connect(address, [])


@pytest.mark.parametrize("address", PUBLIC)
def test_internet_addresses_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_only_the_listed_networks_are_allowed() -> None:
    networks = [ipaddress.ip_network("10.1.0.0/16"), ipaddress.ip_network("fd00:1::/32")]
    assert may_connect("10.1.2.3", networks)
    assert may_connect("fd00:1::5", networks)
    assert may_connect("8.8.8.8", networks)
    for address in ("10.2.0.1", "fd00:2::1", "::ffff:10.1.2.3", "169.254.169.254", "fe80::1%lo"):
        assert not may_connect(address, networks)


@pytest.mark.parametrize(
    ("rule", "allowed", "refused"),
    [
        (
            "images.example.com",
            ["https://images.example.com/a", "https://IMAGES.example.com:443/", "http://images.example.com:80/"],
            [
                "https://example.com/",
                "https://x.images.example.com/",
                "https://images.example.com.evil.org/",
                "https://images.example.com:8443/",
                "https://images.example.com./",
                "http://images.example.com:443/",
                "https://images.example.com:80/",
            ],
        ),
        (
            "*.example.com",
            ["https://a.example.com/", "https://a.b.example.com/"],
            ["https://example.com/", "https://evilexample.com/", "https://a.example.com:8443/"],
        ),
        ("example.com:8443", ["https://example.com:8443/"], ["https://example.com/", "https://example.com:8444/"]),
        (
            "*",
            ["https://anything.org/", "http://localhost/", "https://1.example.com/", "https://0xface.com/"],
            [
                "https://127.0.0.1/",
                "https://8.8.8.8/",
                "https://[::1]/",
                "https://[2606:4700:4700::1111]/",
                "https://2130706433/",
                "https://0x7f000001/",
                "https://0x7f.1/",
                "https://0177.0.0.1/",
                "https://017700000001/",
                "https://127.1/",
                "https://127.0.0.1./",
                "https://a.0x1/",
                "https://anything.org:22/",
                "https://anything.org:6379/",
            ],
        ),
        ("10.1.2.3", ["https://10.1.2.3/"], ["https://10.1.2.4/", "https://167838211/", "https://0xa.1.2.3/"]),
    ],
)
def test_hosts_are_allowed_by_name_and_port(rule: str, allowed: list[str], refused: list[str]) -> None:
    assert [url for url in allowed if not _allows(rule, url)] == []
    assert [url for url in refused if _allows(rule, url)] == []


def _allows(rule: str, address: str) -> bool:
    try:
        return HostRule.parse(rule).allows(parse_address(address, param="p"))
    except ImageError:
        return False


@pytest.mark.parametrize(
    "rule",
    ["", "https://example.com", "example.com/", "a b", "*.", "exa*mple.com", "x:port", "x:0", "x:65536", "[::1]"],
)
def test_an_invalid_host_rule_is_refused(rule: str) -> None:
    with pytest.raises(ValueError, match="is not a host"):
        HostRule.parse(rule)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "https://",
        "https:///path",
        "file:///etc/passwd",
        "ftp://example.com/",
        "gopher://example.com/",
        "//example.com/a.png",
        "example.com/a.png",
        "https://example.com\\@evil.org/",
        "https:\\\\example.com/",
        "https://example.com/a b",
        "https://example.com/\n",
        "https://example.com/\x00",
        "https://exämple.com/",
        "https://example.com/ä.png",
        "https://\u2460\u2461\u2466.0.0.1/",
        "https://example.com:99999/",
        "https://[::1/",
        "https://[fe80::1%25eth0]/",
        "https://user:password@example.com/",
        "https://user@example.com/",
        "https://evil.org%00.example.com/",
        "https://example.com/" + "x" * 4096,
    ],
)
def test_invalid_and_ambiguous_urls_are_refused(address: str) -> None:
    with pytest.raises(ImageError) as caught:
        parse_address(address, param="p")
    assert (caught.value.code, caught.value.param) == ("invalid_image_url", "p")
    assert "password" not in caught.value.message


def test_a_redirect_is_resolved_against_its_base_url() -> None:
    base = httpx.URL("https://example.com/a/b.png?x=1")
    for location, target in [
        ("c.png", "https://example.com/a/c.png"),
        ("/c.png", "https://example.com/c.png"),
        ("//evil.org/c.png", "https://evil.org/c.png"),
        ("http://169.254.169.254/", "http://169.254.169.254/"),
        ("https://example.com/#fragment", "https://example.com/"),
    ]:
        assert str(parse_address(location, param="p", base=base)) == target
    for location in ("", "file:///etc/passwd", "https://a@example.com/", "https://a\\b/"):
        with pytest.raises(ImageError):
            parse_address(location, param="p", base=base)


@given(st.text(alphabet=string.printable + "äⓔ。\u200b", max_size=40))
def test_any_text_parses_as_a_url_or_raises_an_image_error(rest: str) -> None:
    for address in (rest, "https://" + rest, "http://example.com" + rest):
        try:
            url = parse_address(address, param="p")
        except ImageError:
            continue
        assert url.scheme in ("http", "https")
        assert url.host
        assert not url.userinfo
        HostRule.parse("*").allows(url)
