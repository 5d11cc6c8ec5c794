"""Fetching, from servers on the loopback interface: what is fetched, what is refused, and who is never contacted."""

import asyncio
import datetime
import ssl
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from deployments.outgoing.fetch import Fetcher
from deployments.settings.app import FetchArgs
from llava_core.errors import ImageError
from llava_core.types import GenerationRequest, ImagePart, ImageUrl, Message, SamplingParams, TextPart
from llava_core.views import DicomView
from tests.deployments.pictures import plain

PICTURE = plain()


def reply(body: bytes = PICTURE, *headers: str, status: str = "200 OK", media_type: str = "image/png") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-type: {media_type}", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def redirect(target: str, status: str = "302 Found") -> bytes:
    return reply(b"", f"location: {target}", status=status)


@dataclass
class Server:
    """Answers paths with raw bytes; None keeps the connection open. Remembers the requests."""

    port: int
    replies: dict[str, bytes | None]
    asked: list[str] = field(default_factory=list)
    server_names: list[str] = field(default_factory=list)
    num_open: int = 0

    @property
    def paths(self) -> list[str]:
        return [request.split(" ", 2)[1] for request in self.asked]


@asynccontextmanager
async def serving(replies: dict[str, bytes | None], tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    server = Server(0, replies)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.num_open += 1
        request = (await reader.readuntil(b"\r\n\r\n")).decode()
        server.asked.append(request)
        content = replies[request.split(" ", 2)[1]]
        if content is None:
            await reader.read()
        else:
            writer.write(content)
            await writer.drain()
        writer.close()
        server.num_open -= 1

    if tls is not None:
        tls.sni_callback = lambda _socket, name, _context: server.server_names.append(str(name))  # type: ignore[assignment]
    listener = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()


class Names:
    """A name server with a sequence of answers for each name; the last one is repeated."""

    def __init__(self, **answers: Sequence[Sequence[str]]) -> None:
        self._answers = {name: list(each) for name, each in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, _port: int) -> Sequence[str]:
        self.asked.append(host)
        if host not in self._answers:
            raise OSError("no such name")
        answers = self._answers[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]


LOCAL = ("127.0.0.1",)


def _args(server: Server, **fields: Any) -> FetchArgs:
    """Return settings that allow the loopback interface and the server's port."""
    hosts = [f"{name}:{server.port}" for name in ("pictures", "other", "*")]
    return FetchArgs(**{"allowed_hosts": hosts, "allowed_networks": ["127.0.0.0/8"], "allow_http": True, **fields})


async def _refusal(fetching: Awaitable[bytes]) -> ImageError:
    with pytest.raises(ImageError) as caught:
        await fetching
    assert caught.value.param == "p"
    return caught.value


def _run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


def test_fetching_sends_only_the_url_and_four_plain_headers() -> None:
    async def test() -> None:
        async with serving({"/a.png?x=1": reply()}) as server:
            fetcher = Fetcher(_args(server), resolve=Names(pictures=[LOCAL]))
            assert await fetcher.fetch(f"http://pictures:{server.port}/a.png?x=1#f", "p") == PICTURE
            first, *headers = server.asked[0].strip().split("\r\n")
            assert first == "GET /a.png?x=1 HTTP/1.1"
            assert f"host: pictures:{server.port}" in [header.lower() for header in headers]
            names = {header.split(":")[0].lower() for header in headers}
            assert names == {"host", "accept", "accept-encoding", "user-agent"}

    _run(test)


def test_nothing_is_fetched_unless_hosts_are_allowed() -> None:
    async def test() -> None:
        names = Names(pictures=[LOCAL])
        error = await _refusal(Fetcher(FetchArgs(), resolve=names).fetch("https://pictures/", "p"))
        assert (error.code, names.asked) == ("image_url_not_allowed", [])
        assert "data: URL" in error.message

    _run(test)


@pytest.mark.parametrize(
    ("url", "fields"),
    [
        ("http://pictures:{port}/", {"allow_http": False}),
        ("http://elsewhere:{port}/", {"allowed_hosts": ["pictures"]}),
        ("http://pictures:22/", {}),
        ("http://127.0.0.1:{port}/", {}),
        ("http://2130706433:{port}/", {}),
        ("http://0x7f000001:{port}/", {}),
        ("http://017700000001:{port}/", {}),
        ("http://0177.0.0.1:{port}/", {}),
        ("http://127.1:{port}/", {}),
        ("http://[::1]:{port}/", {}),
        ("http://[::ffff:127.0.0.1]:{port}/", {}),
    ],
)
def test_disallowed_hosts_ports_and_schemes_are_not_even_resolved(url: str, fields: dict[str, Any]) -> None:
    async def test() -> None:
        async with serving({"/": reply()}) as server:
            names = Names(pictures=[LOCAL], elsewhere=[LOCAL])
            error = await _refusal(
                Fetcher(_args(server, **fields), resolve=names).fetch(url.format(port=server.port), "p")
            )
            # The parsing library does not even accept some numbers as addresses.
            assert error.code in ("image_url_not_allowed", "invalid_image_url")
            assert (names.asked, server.asked) == ([], [])

    _run(test)


@pytest.mark.parametrize(
    "found",
    [
        ("127.0.0.1",),
        ("10.0.0.1",),
        ("169.254.169.254",),
        ("::1",),
        ("fe80::1%lo",),
        ("::ffff:127.0.0.1",),
        ("64:ff9b::7f00:1",),
        ("fd00:ec2::254",),
        ("224.0.0.1",),
        ("0.0.0.0",),
        ("8.8.8.8", "127.0.0.1"),
        (),
    ],
)
def test_a_name_with_an_internal_address_is_refused_like_an_unknown_name(found: tuple[str, ...]) -> None:
    async def test() -> None:
        async with serving({"/": reply()}) as server:
            fetcher = Fetcher(_args(server, allowed_networks=[]), resolve=Names(pictures=[found]))
            inside = await _refusal(fetcher.fetch(f"http://pictures:{server.port}/", "p"))
            nowhere = await _refusal(fetcher.fetch(f"http://nowhere:{server.port}/", "p"))
            assert inside.code == "image_fetch_failed"
            # Otherwise the messages would reveal which internal names exist.
            assert inside.message == nowhere.message
            assert server.asked == []

    _run(test)


def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    """The name resolves to the server when it is checked, and to another address on every later lookup."""

    async def test() -> None:
        async with serving({"/": reply()}) as server:
            names = Names(pictures=[LOCAL, ("10.0.0.1",)])
            fetcher = Fetcher(_args(server), resolve=names)
            assert await fetcher.fetch(f"http://pictures:{server.port}/", "p") == PICTURE
            assert names.asked == ["pictures"]
            await _refusal(fetcher.fetch(f"http://pictures:{server.port}/", "p"))
            assert len(server.asked) == 1

    _run(test)


def test_the_next_address_is_tried_where_the_first_does_not_listen() -> None:
    async def test() -> None:
        async with serving({"/": reply()}) as server:
            # Nobody listens at the first address; it belongs to the loopback interface just like 127.0.0.1.
            fetcher = Fetcher(_args(server), resolve=Names(pictures=[("127.9.9.9", "127.0.0.1")]))
            assert await fetcher.fetch(f"http://pictures:{server.port}/", "p") == PICTURE

    _run(test)


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("http://other:{port}/end", None),
        ("/end", None),
        ("//other:{port}/end", None),
        ("http://inside:{port}/end", "image_fetch_failed"),
        ("http://127.0.0.1:{port}/end", "image_url_not_allowed"),
        ("http://[::ffff:7f00:1]:{port}/end", "image_url_not_allowed"),
        ("http://2130706433:{port}/end", "image_url_not_allowed"),
        ("http://169.254.169.254/latest/meta-data/", "image_url_not_allowed"),
        ("http://other:1/end", "image_url_not_allowed"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("http://user:password@other:{port}/end", "invalid_image_url"),
        ("gopher://other:{port}/", "invalid_image_url"),
        ("http://other\\@pictures:{port}/end", "invalid_image_url"),
    ],
)
def test_a_redirect_is_checked_like_a_url_from_the_client(target: str, code: str | None) -> None:
    async def test() -> None:
        replies: dict[str, bytes | None] = {"/end": reply()}
        async with serving(replies) as server:
            replies["/"] = redirect(target.format(port=server.port))
            names = Names(pictures=[LOCAL], other=[LOCAL], inside=[("10.0.0.1",)])
            fetching = Fetcher(_args(server), resolve=names).fetch(f"http://pictures:{server.port}/", "p")
            if code is None:
                assert await fetching == PICTURE
            else:
                assert (await _refusal(fetching)).code == code
                assert server.paths == ["/"]

    _run(test)


def test_a_redirect_from_https_to_http_is_refused_where_http_is_not_allowed() -> None:
    async def test() -> None:
        server_tls, client_tls = _tls("pictures")
        async with serving({"/": redirect("http://pictures/")}, server_tls) as server:
            fetcher = Fetcher(_args(server, allow_http=False), resolve=Names(pictures=[LOCAL]), tls=client_tls)
            error = await _refusal(fetcher.fetch(f"https://pictures:{server.port}/", "p"))
            assert error.code == "image_url_not_allowed"

    _run(test)


def test_the_number_of_redirects_is_bounded() -> None:
    async def test() -> None:
        replies: dict[str, bytes | None] = {f"/{i}": redirect(f"/{i + 1}", "307 Temporary Redirect") for i in range(9)}
        async with serving({**replies, "/3": reply()}) as server:
            fetcher = Fetcher(_args(server, max_redirects=3), resolve=Names(pictures=[LOCAL]))
            assert await fetcher.fetch(f"http://pictures:{server.port}/0", "p") == PICTURE
            server.replies["/3"] = redirect("/4")
            error = await _refusal(fetcher.fetch(f"http://pictures:{server.port}/0", "p"))
            assert error.code == "image_fetch_failed"
            assert "3 times" in error.message
            assert "/4" not in server.paths

    _run(test)


def test_a_name_that_turns_internal_before_a_redirect_is_refused() -> None:
    async def test() -> None:
        async with serving({"/": redirect("/end"), "/end": reply()}) as server:
            fetcher = Fetcher(_args(server), resolve=Names(pictures=[LOCAL, ("169.254.169.254",)]))
            assert (await _refusal(fetcher.fetch(f"http://pictures:{server.port}/", "p"))).code == "image_fetch_failed"
            assert server.paths == ["/"]

    _run(test)


ENDLESS = b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ntransfer-encoding: chunked\r\n\r\n" + b"400\r\n%s\r\n" % (
    b"x" * 1024
)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (reply(b"x" * 101), "image_too_large"),
        (b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n\r\n" + b"x" * 101, "image_too_large"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 999999999999\r\n\r\n", "image_too_large"),
        (ENDLESS, "image_too_large"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nshort", "image_fetch_failed"),
        (reply(b"x", "content-encoding: gzip"), "image_fetch_failed"),
        (reply(b"<html>", media_type="text/html"), "image_fetch_failed"),
        (reply(b"{}", media_type="application/json"), "image_fetch_failed"),
        (reply(b"", status="404 Not Found"), "image_fetch_failed"),
        (reply(b"", status="500 Internal Server Error"), "image_fetch_failed"),
        (redirect(""), "invalid_image_url"),
        (b"HTTP/1.1 302 Found\r\ncontent-length: 0\r\n\r\n", "invalid_image_url"),
        (b"SSH-2.0-OpenSSH\r\n", "image_fetch_failed"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 100_000, "image_fetch_failed"),
        (b"", "image_fetch_failed"),
    ],
)
def test_a_reply_is_bounded_and_must_be_a_picture(content: bytes, code: str) -> None:
    async def test() -> None:
        async with serving({"/": content}) as server:
            fetcher = Fetcher(_args(server, max_bytes=100), resolve=Names(pictures=[LOCAL]))
            assert (await _refusal(fetcher.fetch(f"http://pictures:{server.port}/", "p"))).code == code

    _run(test)


def test_a_reply_that_does_not_arrive_in_time_is_abandoned() -> None:
    async def test() -> None:
        async with serving({"/": None, "/half": redirect("/")}) as server:
            fetcher = Fetcher(_args(server, timeout_s=0.2), resolve=Names(pictures=[LOCAL]))
            for path in ("/", "/half"):
                error = await _refusal(fetcher.fetch(f"http://pictures:{server.port}{path}", "p"))
                assert error.code == "image_fetch_timeout"
                assert "0.2 seconds" in error.message

            async def never(_host: str, _port: int) -> Sequence[str]:
                return await asyncio.Event().wait()  # type: ignore[return-value]

            slow = Fetcher(_args(server, timeout_s=0.01), resolve=never)
            assert (await _refusal(slow.fetch(f"http://pictures:{server.port}/", "p"))).code == "image_fetch_timeout"

    _run(test)


def _tls(*names: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return a server's TLS context with a certificate for these names, and a client's that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(each) for each in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(server, pem + _pem(key))
    return server, ssl.create_default_context(cadata=pem.decode())


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    form, plain_text = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, form, plain_text)


def _load(context: ssl.SSLContext, pem: bytes) -> None:
    """Load a certificate, through a file because OpenSSL accepts nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chain.pem"
        path.write_bytes(pem)
        context.load_cert_chain(path)


def test_a_certificate_is_checked_against_the_name_and_not_the_address() -> None:
    async def test() -> None:
        server_tls, client_tls = _tls("pictures")
        async with serving({"/": reply()}, server_tls) as server:
            names = Names(pictures=[LOCAL], other=[LOCAL])
            fetcher = Fetcher(_args(server), resolve=names, tls=client_tls)
            assert await fetcher.fetch(f"https://pictures:{server.port}/", "p") == PICTURE
            assert server.server_names == ["pictures"]
            error = await _refusal(fetcher.fetch(f"https://other:{server.port}/", "p"))
            assert error.code == "image_fetch_failed"
            # The certificate's authority is not trusted by this machine.
            strict = Fetcher(_args(server), resolve=names)
            assert (await _refusal(strict.fetch(f"https://pictures:{server.port}/", "p"))).code == "image_fetch_failed"
            assert len(server.asked) == 1

    _run(test)


def test_proxies_from_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with serving({"/": reply()}) as server, serving({}) as proxy:
            for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
            fetcher = Fetcher(_args(server), resolve=Names(pictures=[LOCAL]))
            assert await fetcher.fetch(f"http://pictures:{server.port}/", "p") == PICTURE
            assert proxy.asked == []

    _run(test)


def test_cookies_of_one_request_are_not_sent_with_another() -> None:
    async def test() -> None:
        async with serving({"/": reply(PICTURE, "set-cookie: who=me; path=/")}) as server:
            fetcher = Fetcher(_args(server), resolve=Names(pictures=[LOCAL]))
            for _ in range(2):
                await fetcher.fetch(f"http://pictures:{server.port}/", "p")
            assert "cookie" not in server.asked[1].lower()

    _run(test)


def _request(*parts: Any) -> GenerationRequest:
    return GenerationRequest("id", (Message("user", parts),), SamplingParams())


def test_urls_are_replaced_by_pictures_and_each_is_fetched_once() -> None:
    async def test() -> None:
        red, blue = plain("red"), plain("blue")
        async with serving({"/red": reply(red), "/blue": reply(blue)}) as server:
            first = ImageUrl(f"http://pictures:{server.port}/red")
            second = ImageUrl(f"http://pictures:{server.port}/blue", low_detail=True)
            fetcher = Fetcher(_args(server), resolve=Names(pictures=[LOCAL]))
            held = ImagePart(b"held")
            fetched = await fetcher.fetch_images(_request(first, TextPart("and"), held, second, first))
            expected = _request(ImagePart(red), TextPart("and"), held, ImagePart(blue, low_detail=True), ImagePart(red))
            assert fetched == expected
            assert sorted(server.paths) == ["/blue", "/red"]

    _run(test)


def test_the_first_failure_is_located_and_cancels_the_others() -> None:
    async def test() -> None:
        async with serving({"/slow": None, "/none": reply(status="404 Not Found")}) as server:
            slow, none = (ImageUrl(f"http://pictures:{server.port}/{name}") for name in ("slow", "none"))
            fetcher = Fetcher(_args(server, timeout_s=100), resolve=Names(pictures=[LOCAL]))
            with pytest.raises(ImageError) as caught:
                await fetcher.fetch_images(_request(TextPart("x"), slow, none))
            assert caught.value.param == "messages[0].content[2].image_url"
            assert "404" in caught.value.message
            while server.num_open:
                await asyncio.sleep(0.001)

    _run(test)


def test_one_dicom_url_in_two_views_becomes_two_pictures() -> None:
    async def test() -> None:
        async with serving({"/x": reply(b"held", media_type="application/dicom")}) as server:
            parts = [ImageUrl(f"http://pictures:{server.port}/x", dicom=view) for view in (None, DicomView(2))]
            fetched = await Fetcher(_args(server), resolve=Names(pictures=[LOCAL])).fetch_images(_request(*parts))
            assert fetched == _request(ImagePart(b"held"), ImagePart(b"held", dicom=DicomView(2)))

    _run(test)
