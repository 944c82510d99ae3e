"""What goes wrong on the way to a bucket: each fault has its own sentence, its remedy, and its right to another try."""

from __future__ import annotations

import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from obsfs.errors import (
    BusyError,
    ExpiredError,
    ForbiddenError,
    MovedError,
    NotFoundError,
    ObsfsError,
    RefusedError,
    UnavailableError,
    UnsupportedError,
)
from obsfs.settings import Settings
from obsfs.store.address import endpoint_at, nearest_regions, parse_address, region_of
from obsfs.store.s3 import endpoint as endpoints
from obsfs.store.s3.store import S3Store
from tests.conftest import Mounter, Result
from tests.odd import Answer, OddServer, Request, Thing, refusal

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AK")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SK")
    monkeypatch.setenv("AWS_REGION", "us-east-1")


def bucket(endpoint: str, **settings: object) -> S3Store:
    return S3Store(parse_address("obs://models"), Settings.load(endpoint_url=endpoint, retry_timeout=0, **settings))


def told(endpoint: str, call: Callable[[S3Store], object] = S3Store.check, **settings: object) -> ObsfsError:
    with pytest.raises(ObsfsError) as caught:
        call(bucket(endpoint, **settings))
    assert "\n" not in str(caught.value)
    return caught.value


ANSWERS = [
    (403, "InvalidAccessKeyId", ForbiddenError, "does not know this access key"),
    (403, "SignatureDoesNotMatch", ForbiddenError, "secret key is not that"),
    (403, "RequestTimeTooSkewed", ForbiddenError, "clock of this machine"),
    (403, "AccessDenied", ForbiddenError, "do not allow this"),
    (403, "InvalidObjectState", ForbiddenError, "archived.*restore it first"),
    (403, "AllAccessDisabled", ForbiddenError, "owes money"),
    (403, "InArrearOrInsufficientBalance", ForbiddenError, "owes money"),
    (403, "FrozenUserId", ForbiddenError, "owes money"),
    (403, "VirtualHostDomainRequired", ForbiddenError, "--addressing-style virtual"),
    (403, "ExpiredToken", ExpiredError, "get new credentials"),
    (400, "ExpiredToken", ExpiredError, "get new credentials"),
    (404, "NoSuchBucket", NotFoundError, "bucket of"),
    (400, "InvalidRequest", RefusedError, "refused .*400 InvalidRequest"),
    (400, "KMS.DisabledException", ForbiddenError, "encryption key is disabled"),
    (400, "KeyTooLongError", RefusedError, "KeyTooLongError"),
    (409, "InvalidBucketState", RefusedError, "InvalidBucketState"),
    (410, "Gone", RefusedError, "410 Gone"),
    (405, "MethodNotAllowed", UnsupportedError, "does not support"),
    (501, "NotImplemented", UnsupportedError, "does not support"),
    (501, "", UnsupportedError, "does not support"),
    (409, "OperationAborted", BusyError, "OperationAborted"),
    (429, "", BusyError, "429"),
    (503, "SlowDown", BusyError, "503 SlowDown"),
    (500, "InternalError", BusyError, "500 InternalError"),
    (502, "", BusyError, "502"),
    (408, "RequestTimeout", UnavailableError, "RequestTimeout"),
    (400, "RequestTimeout", UnavailableError, "RequestTimeout"),
]


def test_each_answer_has_its_own_sentence_on_every_way() -> None:
    status, code = 0, ""

    def choose(request: Request) -> Answer | None:
        return refusal(status, code) if status and request.method == "GET" else None

    with OddServer({"key": Thing(b"data")}, choose) as server:
        ours = bucket(server.endpoint)
        version = ours.version(ours.head("key"))
        for status, code, kind, words in ANSWERS:
            for call in (ours.check, lambda: ours.get("key"), lambda: ours.read_range(version, 0, 2)):
                with pytest.raises(ObsfsError) as caught:
                    call()
                assert isinstance(caught.value, kind), (status, code, caught.value)
                assert isinstance(caught.value, UnavailableError) == issubclass(kind, UnavailableError)
                assert re.search(words, str(caught.value)), caught.value


@pytest.mark.parametrize("call", [lambda ours: ours.get("key").data, lambda ours: ours.check().objects[0].key])
def test_a_first_answer_that_breaks_off_is_asked_for_again(call: Callable[[S3Store], object]) -> None:
    broken = iter([True, True])

    def choose(request: Request) -> Answer | None:
        cut = Answer(200, b"da", {"Content-Length": "400", "Connection": "close"})
        return cut if next(broken, False) else None

    with OddServer({"key": Thing(b"data")}, choose) as server:
        settings = Settings.load(endpoint_url=server.endpoint, retry_timeout=30)
        assert call(S3Store(parse_address("obs://models"), settings)) in (b"data", "key")


@pytest.mark.parametrize("header", ["x-amz-error-code", "x-obs-error-code"])
def test_the_code_of_a_head_is_in_a_header(header: str) -> None:
    def choose(request: Request) -> Answer | None:
        return Answer(403, headers={header: "InvalidObjectState"}) if request.method == "HEAD" else None

    with OddServer({"key": Thing(b"data")}, choose) as server:
        assert "archived" in str(told(server.endpoint, lambda ours: ours.head("key")))


def test_obs_calls_an_expired_token_an_unknown_key() -> None:
    choose = lambda request: refusal(403, "InvalidAccessKeyId", "The security token is invalid.")  # noqa: E731
    with OddServer({}, choose) as server:
        assert isinstance(told(server.endpoint), ExpiredError)


def test_what_a_server_says_is_cut_and_shows_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    token = "T0ken" * 50
    monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    code = message = ""
    with OddServer({}, lambda request: refusal(400, code, message)) as server:
        ours = bucket(server.endpoint)
        for code, message in (("C\x9b2J" * 9000, "no"), ("Odd", f"the token {token} is \x9b0;x"), ("Odd", "w " * 9999)):  # noqa: B007
            for call in (ours.check, lambda: ours.get("key")):
                with pytest.raises(RefusedError) as caught:
                    call()
                said = str(caught.value)
                assert len(said) < 1000
                assert said.isprintable()
                assert "T0kenT0ken" not in said


def test_a_final_answer_is_not_waited_for(mount: Mounter) -> None:
    codes = {"a": (400, "InvalidArgument"), "b": (403, "InvalidObjectState"), "c": (405, "MethodNotAllowed")}

    def choose(request: Request) -> Answer | None:
        return refusal(*codes[request.key]) if request.method == "GET" and request.key in codes else None

    with OddServer({name: Thing(b"data") for name in codes}, choose) as server:
        path = mount("obs://models", endpoint_url=server.endpoint, retry_timeout=60)
        for name in codes:
            with pytest.raises(OSError):
                (path / name).read_bytes()
            assert len(server.gets(name)) <= 2
    # 60 seconds for each of them else, and this test would run into its own limit.


# redirects


def test_nothing_is_sent_where_a_server_redirects_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "TOKEN")
    status, headers = 0, dict[str, str]()

    def choose(request: Request) -> Answer | None:
        return Answer(status, b"<Error><Code>TemporaryRedirect</Code></Error>", headers)

    with OddServer({"key": Thing(b"stolen")}) as other, OddServer({}, choose) as server:
        ours = bucket(server.endpoint)
        for status in (301, 302, 303, 307, 308):  # noqa: B007
            for place in (f"{other.endpoint}/models/key", "file:///etc/passwd", "http://[", ""):
                headers = {"Location": place, "x-amz-bucket-region": "elsewhere-1"}
                for call in (ours.check, lambda: ours.get("key"), lambda: ours.head("key")):
                    server.asked.clear()
                    # urllib3 cannot read some of them, and says so: final, too.
                    with pytest.raises((MovedError, RefusedError)) as caught:
                        call()
                    assert len(server.asked) == 1
                    assert isinstance(caught.value, RefusedError) or "elsewhere-1" in str(caught.value)
        assert not other.asked


def test_where_a_redirect_may_lead() -> None:
    cn = "https://obs.cn-north-1.myhuaweicloud.com"
    assert endpoint_at(cn, "models", region="", host="models.obs.cn-north-4.myhuaweicloud.com") == (
        "https://obs.cn-north-4.myhuaweicloud.com"
    )
    assert endpoint_at(cn, "models", region="cn-south-1", host="") == "https://obs.cn-south-1.myhuaweicloud.com"
    s3 = "https://s3.us-east-1.amazonaws.com"
    assert endpoint_at(s3, "b", region="eu-west-1", host="") == "https://s3.eu-west-1.amazonaws.com"
    for endpoint, region, host in (
        (cn, "", "obs.cn-north-4.myhuaweicloud.com.evil.example"),
        (cn, "", "evil.example"),
        (cn, "", "other.obs.cn-north-4.myhuaweicloud.com"),
        (cn, "", "obs.cn-north-1.myhuaweicloud.com"),
        (cn, "evil.example/", ""),
        (s3, "", "obs.cn-north-4.myhuaweicloud.com"),
        ("https://minio.example", "eu-west-1", "s3.eu-west-1.amazonaws.com"),
    ):
        assert endpoint_at(endpoint, "models", region=region, host=host) is None


def test_a_bucket_of_another_region_is_followed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As OBS redirects: through a proxy, by which a test sees every host that is asked."""
    here, there = "models.obs.cn-north-1.myhuaweicloud.com", "models.obs.cn-north-4.myhuaweicloud.com"

    def choose(request: Request) -> Answer | None:
        if request.headers["Host"] == here:
            location = {"Location": f"http://{there}/"}
            return Answer(307, b"<Error><Code>TemporaryRedirect</Code></Error>", location)
        return None

    with OddServer({"key": Thing(b"data")}, choose) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.endpoint)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        ours = bucket("http://obs.cn-north-1.myhuaweicloud.com")
        ours.check()
        assert [request.headers["Host"] for request in proxy.asked] == [here, there]
        ours.check()
        assert [request.headers["Host"] for request in proxy.asked[2:]] == [there]


# before a server answers


def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Iterator[object]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    error = told("http://storage.example:9000")
    assert "cannot reach storage.example:9000" in str(error)
    assert "does not resolve" in str(error)
    for region, near in (
        ("cn-noth-4", "cn-north-4"),
        ("cn-suoth-1", "cn-south-1"),
        ("ap-southeast1", "ap-southeast-1"),
    ):
        error = told(f"https://obs.{region}.myhuaweicloud.com")
        assert f"{region} is not a known region" in str(error)
        assert near in str(error)
    assert "known region" not in str(told("https://obs.cn-north-4.myhuaweicloud.com"))


def test_regions_in_host_names() -> None:
    assert region_of("models.obs.cn-north-4.myhuaweicloud.com") == "cn-north-4"
    assert region_of("obs.eu-west-101.myhuaweicloud.eu") == "eu-west-101"
    assert region_of("s3.eu-west-1.amazonaws.com") == "eu-west-1"
    assert region_of("storage.example") == ""
    assert nearest_regions("nowhere") == []


def test_nobody_listens() -> None:
    error = str(told("http://127.0.0.1:1"))
    assert "127.0.0.1:1" in error
    assert "nothing listens" in error


def test_a_server_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        error = str(told(f"http://127.0.0.1:{silent.getsockname()[1]}", request_timeout=0.5))
    assert "sent nothing" in error


def test_a_server_that_hangs_up() -> None:
    def choose(request: Request) -> Answer | None:
        raise ConnectionError

    with OddServer({}, choose) as server:
        assert "closed the connection" in str(told(server.endpoint))


def test_a_certificate_that_nobody_has_signed(certificate: Path) -> None:
    with OddServer({}, certificate=certificate) as server:
        error = str(told(server.endpoint))
        assert "certificate is not trusted" in error
        assert "AWS_CA_BUNDLE" in error
        named = server.endpoint.replace("127.0.0.1", "localhost")
        assert "certificate" in str(told(named))


def test_tls_to_a_plain_port_and_the_reverse(certificate: Path) -> None:
    with OddServer({}) as server:
        error = str(told(server.endpoint.replace("http:", "https:")))
        assert "does not speak TLS" in error
        assert server.endpoint in error
    with OddServer({}, certificate=certificate) as server:
        error = str(told(server.endpoint.replace("https:", "http:")))
        assert "expects TLS" in error
        assert server.endpoint in error


@pytest.mark.parametrize("status", [400, 426])
def test_a_tls_server_that_answers_plain_http_with_a_refusal(status: int, certificate: Path) -> None:
    """As nginx and Go do; no word of S3 in it."""
    choose = lambda request: Answer(status, b"Client sent an HTTP request to an HTTPS server.\n")  # noqa: E731
    with OddServer({}, choose) as server:
        error = told(server.endpoint)
        assert isinstance(error, RefusedError)
        assert str(status) in str(error)


def test_a_proxy_that_is_away_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:hunter2@127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    error = str(told("https://storage.example"))
    assert "proxy 127.0.0.1:1" in error
    assert "hunter2" not in error


@contextmanager
def proxy(status: str) -> Iterator[str]:
    """A proxy that answers everything with a status line; its host and port."""

    class Refuse(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            self.request.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "scheme", "kind", "said"),
    [
        ("407 Proxy Authentication Required", "https", RefusedError, r"\(407\): write user and password"),
        ("407 Proxy Authentication Required", "http", RefusedError, r"\(407\): write user and password"),
        ("403 Forbidden", "https", RefusedError, r"\(403\): ask whoever runs it"),
        ("504 Gateway Timeout", "https", UnavailableError, r"\(504\): ask whoever runs it"),
    ],
)
def test_a_proxy_that_refuses_is_told_apart_from_one_that_is_away(
    monkeypatch: pytest.MonkeyPatch, status: str, scheme: str, kind: type[ObsfsError], said: str
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with proxy(status) as place:
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"http://me:hunter2@{place}")
        error = told(f"{scheme}://storage.example")
    assert type(error) is kind
    assert re.search(said, str(error))
    assert "hunter2" not in str(error)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://{}", "does not speak TLS: write http://{}"),
        ("socks5://{}", "it is no HTTP proxy: write http://HOST:PORT"),
        ("http://proxy.invalid:3128", "the proxy proxy.invalid:3128 .* does not resolve"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_told_as_that(monkeypatch: pytest.MonkeyPatch, url: str, said: str) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with proxy("400 Bad Request") as place:
        monkeypatch.setenv("HTTPS_PROXY", url.format(place))
        assert re.search(said.format(place), str(told("https://storage.example")))


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "ca_bundle"])
@pytest.mark.parametrize(("file", "reason"), [("none", "No such file"), (".", "Is a directory"), ("aws", "holds no c")])
def test_a_file_of_certificates_that_is_none_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, file: str, reason: str
) -> None:
    (tmp_path / "aws").write_text("nothing")
    path = str(tmp_path / file)
    if name.isupper():
        monkeypatch.setenv(name, path)
    else:
        (tmp_path / "aws-config").write_text(f"[default]\nca_bundle = {path}\n")
    place = f"{name}=" if name.isupper() else f"{name} = "
    assert str(told("https://127.0.0.1:1")).startswith(f"{place}{path}: {reason}")
    assert "nothing listens" in str(told("http://127.0.0.1:1"))
    assert "nothing listens" in str(told("https://127.0.0.1:1", insecure_tls=True))


def test_a_certificate_of_another_host_is_told_as_that(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, certificate: Path
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate.parent / "cert.pem"))
    with OddServer({}, certificate=certificate) as server:
        error = str(told(server.endpoint.replace("127.0.0.1", "localhost")))
    assert "certificate is not trusted" in error
    assert "use the name that the certificate is for" in error


@pytest.mark.parametrize("path", ["/models", "/minio/"])
def test_an_endpoint_with_a_path_is_suspected(path: str) -> None:
    with OddServer({}, lambda request: refusal(404, "NoSuchBucket")) as server:
        assert f"leave {path.strip('/')} out of the endpoint URL" in str(told(server.endpoint + path))
        assert "leave" not in str(told(server.endpoint))


def test_a_name_server_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    silence = threading.Event()
    monkeypatch.setattr(endpoints, "_RESOLVE_SECONDS", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host) or silence.wait(20))
    error = str(told("https://storage.example"))
    silence.set()
    assert "cannot reach storage.example for obs://models/: the name server does not answer" in error
    assert asked == ["storage.example"]


# credentials


def test_missing_credentials_are_told_soon(obsfs: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a metadata service that nobody reaches, as on most machines: botocore waited for it again and again."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        # Its queue is full: who comes now waits, as for an address where nobody is.
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{address[1]}")
        began = time.monotonic()
        with pytest.raises(ForbiddenError, match="--no-sign-request") as caught:
            bucket("http://127.0.0.1:1")
        for way in ("AWS_ACCESS_KEY_ID", "HUAWEICLOUD_SDK_AK", "--profile", "instance role"):
            assert way in str(caught.value)
        assert time.monotonic() - began < 30, "not a measurement: only that it ends"
        for one in waiting:
            one.close()


def test_an_instance_role_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    role = (
        b'{"Code": "Success", "AccessKeyId": "ROLE", "SecretAccessKey": "s", "Token": "t", '
        b'"Expiration": "2099-01-01T00:00:00Z", "LastUpdated": "2026-01-01T00:00:00Z"}'
    )
    path = "meta-data/iam/security-credentials/"

    def metadata(request: Request) -> Answer | None:
        if request.method == "PUT":
            return Answer(200, b"token")
        return Answer(200, b"role" if request.key == path else role)

    with OddServer({}, metadata) as service, OddServer({"key": Thing(b"data")}) as server:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", service.endpoint)
        ours = bucket(server.endpoint)
        assert ours.get("key").data == b"data"
        assert "Credential=ROLE/" in server.gets("key")[0].headers["Authorization"]
