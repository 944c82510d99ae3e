"""Listings of servers that know only the older way, and of those that would go on for ever."""

from __future__ import annotations

import itertools
import subprocess
import time

import pytest

from obsfs.errors import RefusedError
from obsfs.settings import Settings
from obsfs.store.address import parse_address
from obsfs.store.s3 import listing
from obsfs.store.s3.store import S3Store
from tests.conftest import Mounter, wait_for
from tests.odd import Answer, OddServer, Request, Thing


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AK")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SK")
    monkeypatch.setenv("AWS_REGION", "us-east-1")


def bucket(server: OddServer) -> S3Store:
    return S3Store(parse_address("obs://models"), Settings.load(endpoint_url=server.endpoint, retry_timeout=0))


@pytest.mark.parametrize("page", [2, 3, 1000])
def test_a_server_without_list_type_2(page: int) -> None:
    things = {f"d/{number:02}": Thing(b"x") for number in range(7)}
    things |= {f"d/sub{number}/x": Thing(b"x") for number in range(5)} | {"d/z": Thing(b"z")}
    with OddServer(things, is_v1=True, page=page) as server:
        ours = bucket(server)
        pages = list(ours.list("d/"))
        assert [info.key for one in pages for info in one.objects] == [
            key for key in sorted(things) if "sub" not in key
        ]
        assert [name for one in pages for name in one.prefixes] == [f"d/sub{number}/" for number in range(5)]
        assert [info.key for info in ours.walk("d/")] == sorted(things)


def test_a_mount_of_a_server_without_list_type_2(mount: Mounter) -> None:
    things = {f"d/{number:02}.txt": Thing(b"%d" % number) for number in range(25)}
    with OddServer(things, is_v1=True, page=10) as server:
        path = mount("obs://models", endpoint_url=server.endpoint, retry_timeout=1)
        assert (path / "d" / "17.txt").read_bytes() == b"17"
        assert sorted(entry.name for entry in (path / "d").iterdir()) == [key[2:] for key in things]


def page(names: list[str], token: str) -> Answer:
    body = "".join(f"<Contents><Key>{name}</Key><Size>1</Size></Contents>" for name in names)
    body += f"<NextContinuationToken>{token}</NextContinuationToken>" if token else ""
    return Answer(200, f"<ListBucketResult><IsTruncated>true</IsTruncated>{body}</ListBucketResult>".encode())


@pytest.mark.parametrize("kind", ["same page", "same token", "same names", "empty", "empty, new tokens", "backwards"])
def test_a_listing_that_does_not_advance_ends(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_MAX_EMPTY_PAGES", 5)
    count = itertools.count()

    def choose(request: Request) -> Answer | None:
        number = next(count)
        names = {
            "same page": (["a", "b"], ""),
            "same token": ([f"a{number:05}"], "token"),
            "same names": (["a", "b"], f"token{number}"),
            "empty": ([], ""),
            "empty, new tokens": ([], f"token{number}"),
            "backwards": ([f"a{10000 - number}"], ""),
        }
        return page(*names[kind])

    with OddServer({}, choose) as server:
        with pytest.raises(RefusedError, match="without an end"):
            for _ in bucket(server).list(""):
                pass
        assert len(server.asked) <= 7


def test_a_directory_without_an_end_is_an_error_of_that_directory(mount: Mounter) -> None:
    def choose(request: Request) -> Answer | None:
        return page(["odd/a"], "token") if request.query.get("prefix") == "odd/" else None

    with OddServer({"odd/a": Thing(b"a"), "fine/b": Thing(b"b")}, choose) as server:
        path = mount("obs://models", endpoint_url=server.endpoint, retry_timeout=1)
        with pytest.raises(OSError):
            list((path / "odd").iterdir())
        asked = len(server.asked)
        assert (path / "fine" / "b").read_bytes() == b"b"
        assert len([request for request in server.asked[asked:] if request.query.get("prefix") == "odd/"]) == 0


def test_an_empty_first_page_of_a_longer_listing(mount: Mounter) -> None:
    """S3 sends one here and there; what the others show counts."""

    def choose(request: Request) -> Answer | None:
        is_first = request.query.get("list-type") and "continuation-token" not in request.query
        return page([], "!") if is_first and not request.query.get("prefix") else None

    with OddServer({"a.txt": Thing(b"a")}, choose) as server:
        path = mount("obs://models", endpoint_url=server.endpoint, retry_timeout=1)
        assert [entry.name for entry in path.iterdir()] == ["a.txt"]
        assert (path / "a.txt").read_bytes() == b"a"


def test_pages_are_asked_for_as_long_as_somebody_waits(mount: Mounter) -> None:
    count = itertools.count()

    def choose(request: Request) -> Answer | None:
        number = next(count)
        time.sleep(0.01)
        return page([f"odd/{number:06}"], f"token{number}") if request.query.get("prefix") == "odd/" else None

    with OddServer({"odd/a": Thing(b"a"), "fine/b": Thing(b"b")}, choose) as server:

        def goes_on() -> bool:
            asked = len(server.asked)
            time.sleep(0.3)
            return len(server.asked) > asked + 1

        path = mount("obs://models", endpoint_url=server.endpoint, retry_timeout=1)
        # More than a directory has threads: some wait in its queue.
        waiting = [subprocess.Popen(["ls", path / "odd"], stdout=subprocess.DEVNULL) for _ in range(10)]
        wait_for(lambda: len(server.asked) > 20)
        for process in waiting[:-1]:
            process.kill()
            assert process.wait(5) == -9
        assert goes_on()
        waiting[-1].kill()
        assert waiting[-1].wait(5) == -9
        wait_for(lambda: not goes_on())
        assert (path / "fine" / "b").read_bytes() == b"b"
