"""Hosts behind a proxy: a site's preflight goes the way its SuperNode goes, and nobody asks a proxy for this host's
own loopback.

A real proxy on loopback, which knows a name that no DNS does; a real TLS server as the hub.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import copy_project, sh
from test_join import invited, wait_for
from test_preflight import Authority, Hub, refused

from bouquet import ROOT
from bouquet.hub.deployment import Processes, free_port
from bouquet.hub.runs import connect, spared
from bouquet.site import reach

NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
FAR = "hub.invalid"  # reached through the proxy alone


def hang_up(link: socket.socket) -> None:
    """Whoever is at the other end may have done so before."""
    with suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)


class Proxy:
    """CONNECT and nothing else; every name is this host's; it refuses where `status` is not 200."""

    def __init__(self, status: int = 200) -> None:
        self.status, self.asked, self.links, self.workers = status, [], [], []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"

    def serve(self) -> None:
        while True:
            try:
                client = self.listener.accept()[0]
            except OSError:
                return
            self.keep(client, threading.Thread(target=self.answer, args=(client,), daemon=True))

    def keep(self, link: socket.socket, worker: threading.Thread) -> None:
        self.links.append(link)
        self.workers.append(worker)
        worker.start()

    def answer(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head and (part := client.recv(4096)):
            head += part
        target = head.split()[1].decode()
        self.asked.append(target)
        client.sendall(f"HTTP/1.1 {self.status} so\r\n\r\n".encode())
        if self.status != 200:
            return hang_up(client)
        try:
            hub = socket.create_connection(("127.0.0.1", int(target.rpartition(":")[2])))
        except OSError:
            return hang_up(client)
        self.keep(hub, threading.Thread(target=pass_on, args=(client, hub), daemon=True))
        pass_on(hub, client)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for link in self.links:
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        for worker in self.workers:
            worker.join()
        for link in self.links:
            link.close()


def pass_on(source: socket.socket, to: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            to.sendall(data)
        to.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@contextmanager
def running(proxy: Proxy) -> Iterator[Proxy]:
    thread = threading.Thread(target=proxy.serve, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "ours")


@pytest.fixture
def hub(authority: Authority) -> Iterator[str]:
    """The port of a hub whose certificate is for FAR and for localhost."""
    with Hub(authority.server(names=(FAR, "localhost"))) as address:
        yield address.rpartition(":")[2]


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_hub_that_only_a_proxy_reaches_passes_the_preflight(
    authority: Authority, hub: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with running(Proxy()) as proxy:
        monkeypatch.setenv(name, f"http://{proxy.address}")
        assert reach.certificate(f"{FAR}:{hub}", authority.ca) == pytest.approx(90, abs=0.01)
        assert abs(reach.clock(f"{FAR}:{hub}", authority.ca)) < 2
    assert proxy.asked == [f"{FAR}:{hub}"] * 2


def test_the_supernodes_own_client_takes_the_same_way(
    authority: Authority, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supernode.fleet_http_client import FleetHttpClient

    with running(Proxy()) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.address}")
        client = FleetHttpClient.from_server_address(f"{FAR}:{hub}", False, authority.ca.read_bytes(), [])
        with client, pytest.raises(Exception, match="501"):  # this hub knows no POST; it was reached
            client.ActivateNode(ActivateNodeRequest())
    assert set(proxy.asked) == {f"{FAR}:{hub}"}


def test_a_host_that_no_proxy_spares_is_asked_directly(
    authority: Authority, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(Proxy()) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.address}")
        monkeypatch.setenv("NO_PROXY", "example.org,localhost")
        reach.certificate(f"localhost:{hub}", authority.ca)
        assert "no address is known for hub.invalid" not in refused(
            "CHECK-01", reach.certificate, f"{FAR}:1", authority.ca
        )
    assert proxy.asked == [f"{FAR}:1"]


@pytest.mark.parametrize("status", [403, 407, 502])
def test_a_proxy_that_refuses_is_named_without_its_password(
    authority: Authority, hub: str, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    with running(Proxy(status)) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://anna:geheim@{proxy.address}")
        found = refused("CHECK-01", reach.certificate, f"{FAR}:{hub}", authority.ca)
    assert found == f"the proxy {proxy.address} does not connect to {FAR}:{hub}: {status} so"


def test_a_proxy_that_is_down_or_of_a_kind_that_cannot_be_used_is_named(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("HTTPS_PROXY", f"http://anna:geheim@{down}")
    assert (
        refused("CHECK-01", reach.certificate, f"{FAR}:8443", authority.ca)
        == f"{FAR}:8443 through the proxy {down}: Connection refused"
    )
    for strange in ("socks5://127.0.0.1:1", "ftp://127.0.0.1:1"):
        monkeypatch.setenv("HTTPS_PROXY", strange)
        assert "the proxy 127.0.0.1:1" in refused("CHECK-01", reach.certificate, f"{FAR}:8443", authority.ca)


def test_the_wrong_certificate_behind_a_proxy_is_still_the_wrong_one(
    authority: Authority, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(Proxy()) as proxy, Hub(Authority(tmp_path, "theirs").server(names=(FAR,))) as other:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.address}")
        found = refused("CHECK-02", reach.certificate, f"{FAR}:{other.rpartition(':')[2]}", authority.ca)
    assert f"through the proxy {proxy.address}" in found and "issuer" in found


# --- the hub's own host
# ----------------------------------------------------------------------------------------------------

SPARED = "127.0.0.1,localhost,::1"


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"NO_PROXY": "example.org"}, None),
        ({"HTTPS_PROXY": "http://p:1"}, SPARED),
        ({"http_proxy": "http://p:1", "NO_PROXY": "example.org"}, f"example.org,{SPARED}"),
        ({"ALL_PROXY": "http://p:1", "no_proxy": "localhost, a", "NO_PROXY": "b"}, "localhost, a,127.0.0.1,::1"),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "*"}, None),
    ],
)
def test_loopback_is_added_to_what_no_proxy_is_asked_for(env: dict[str, str], expected: str | None) -> None:
    assert spared(env) == ({} if expected is None else {"no_proxy": expected, "NO_PROXY": expected})


def test_the_scripts_and_all_that_they_start_ask_no_proxy_for_this_host(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    shown = sh('. scripts/_lib.sh; bash -c "echo \\$NO_PROXY \\$no_proxy"', ROOT).stdout.split()
    assert shown == [SPARED, SPARED]
    with Hub(authority.server()) as hub:
        for host in (hub, hub.replace("localhost", "127.0.0.1")):
            ask = f"import ssl, urllib.request, httpx\ntls = ssl.create_default_context(cafile={str(authority.ca)!r})\n"
            look = (
                f"assert httpx.get('https://{host}/', verify=tls).status_code == 404\ntry:"
                f" urllib.request.urlopen('https://{host}/', context=tls)\nexcept urllib.error.HTTPError as e:"
                " print(e.code)"
            )
            done = subprocess.run(
                [sys.executable, "-c", f"import bouquet.hub.runs, urllib.error\n{ask}{look}"],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            assert done.stdout == "404\n", done.stderr


# --- a whole site
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_site_whose_way_leads_through_a_proxy_is_checked_and_joins_from_a_hub_whose_host_has_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process has HTTP_PROXY and HTTPS_PROXY; what is on loopback, at the hub and between the site's own
    processes, goes without.
    """
    copy, port = copy_project(tmp_path / "bouquet"), free_port()
    (copy / ".env").write_text(f"HUB_HOST={FAR}\nHUB_PORT={port}\n")
    sh("scripts/certs", copy)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "operator"))
    with running(Proxy()) as proxy:
        for name in ("HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://{proxy.address}")
        for name, value in spared(os.environ).items():
            monkeypatch.setenv(name, value)
        hub = Processes(copy / ".bouquet", copy / "certs", port, {})
        connect(hub.address, copy / "certs/ca.crt")
        try:
            hub.start_hub()
            site = invited(copy, "garden", tmp_path / "far")
            site.init()
            sh(f"scripts/bouquet hub admit garden {site.kit}/garden.pub", copy)
            assert proxy.asked == []
            with (site.kit / ".env").open("a") as settings:
                settings.write(f"HTTP_PROXY=http://{proxy.address}\nHTTPS_PROXY=http://{proxy.address}\n")
            for name in (*NAMES, *map(str.upper, NAMES)):
                monkeypatch.delenv(name, raising=False)
            shown = sh("./site check --fast", site.kit).stdout
            assert re.search(rf"^pass  hub +{FAR}:{port} answers", shown, re.MULTILINE) and re.search(
                r"^pass  key ", shown, re.MULTILINE
            ), shown
            site.start()
            try:
                wait_for(copy, site, "online")
            finally:
                site.stop()
        finally:
            hub.stop()
        assert set(proxy.asked) == {f"{FAR}:{port}"}
