"""Whether a site can talk to its hub: name and port, TLS against the join kit's CA, clock, and the site's admitted key.

Enters: HUB ("hub.example.org:8443"), the CA file, the site's private key; HTTPS_PROXY and NO_PROXY, as the SuperNode's
own client takes them. Leaves: what was found, or CheckError CHECK-01 to -07, -09. Nothing here changes anything at the
hub, and a SuperNode that runs with the same key does not notice.
"""

from __future__ import annotations

import email.utils
import os
import socket
import ssl
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import text
from app.errors import BouquetError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

TIMEOUT = 10
BEHIND, AHEAD = 300, 5  # seconds that Flower lets a site's signed time be off (flwr.common.constant.*_TOLERANCE)


class CheckError(BouquetError):
    """This machine is not ready to take part (CHECK-..)."""


def address(hub: str) -> tuple[str, int]:
    """("hub.example.org", 8443). Errors: CHECK-09."""
    try:
        parts = urllib.parse.urlsplit(f"//{hub}")
        if parts.hostname and parts.port and not parts.path:
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise CheckError(
        "CHECK-09",
        found=f"HUB={hub!r}",
        fix="set HUB to the hub's name and port: hub.example.org:8443",
    )


def trust(ca: Path) -> ssl.SSLContext:
    """TLS that trusts the hub's CA and nobody else. Errors: CHECK-09."""
    try:
        return ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise CheckError(
            "CHECK-09",
            found=f"{ca}: {error.strerror or error}",
            fix="put ca.crt of the join kit there",
        ) from None


def certificate(hub: str, ca: Path) -> float:
    """Days until the hub's certificate, or its CA, expires. Errors: CHECK-01 to -04, CHECK-09."""
    shown, _ = _ask(hub, ca)
    ends = [shown["notAfter"], *(own["notAfter"] for own in trust(ca).get_ca_certs())]
    return (min(map(ssl.cert_time_to_seconds, ends)) - time.time()) / 86400


def _ask(hub: str, ca: Path) -> tuple[dict[str, Any], str]:
    """The certificate that the hub shows, and the Date of its answer ('' where it gives none), by the SuperNode's
    client and way.

    Errors: CHECK-01 to -04, CHECK-09.
    """
    import httpx

    host, port = address(hub)
    context, seen = trust(ca), {}

    def look(event: str, info: dict[str, Any]) -> None:
        if event.endswith("start_tls.complete"):  # through a proxy that is TLS itself, the hub's is the later one
            seen["certificate"] = info["return_value"].get_extra_info("ssl_object").getpeercert()

    try:
        with (
            httpx.Client(verify=context, timeout=TIMEOUT) as client,
            client.stream("GET", f"https://{hub}/", extensions={"trace": look}) as answer,
        ):  # whatever it sends, its head is enough
            return seen["certificate"], answer.headers.get("date", "")
    except httpx.HTTPError as error:
        if "certificate" in seen:  # TLS is as it should be; what it says is another check's
            return seen["certificate"], ""
        raise _failed(hub, host, error) from None
    except (ImportError, ValueError, httpx.InvalidURL) as error:  # of a proxy that httpx cannot use
        raise _unreachable(
            f"{_proxy(host)}: {error}", "HTTPS_PROXY takes http://HOST:PORT; where the hub needs no proxy: NO_PROXY"
        ) from None


def _failed(hub: str, host: str, error: Exception) -> CheckError:
    """Why there was no TLS with the hub, by what lies below httpx's error."""
    import httpx

    causes, proxy = list(_causes(error)), _proxy(host)
    through = f" through {proxy}" if proxy else ""
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _untrusted(hub + through, cause)
    if isinstance(error, httpx.ProxyError):
        fix = f"whoever runs the proxy lets it connect to {hub}; where the hub needs none: NO_PROXY={host}"
        return _unreachable(f"{proxy or 'the proxy'} does not connect to {hub}: {text.line(error)}", fix)
    for cause in causes:
        if isinstance(cause, (ssl.SSLError, ConnectionResetError)):
            found = f"{hub} answers{through}, but not with TLS 1.2 or newer ({getattr(cause, 'reason', None) or cause})"
            return _unreachable(found, "is HUB's port the hub's? Does a proxy stand between?")
        if isinstance(cause, socket.gaierror):
            return _unreachable(
                f"no address is known for {proxy or host}", "is HUB's name right? Does this machine's DNS know it?"
            )
        if isinstance(cause, (TimeoutError, httpx.TimeoutException)):
            return _unreachable(
                f"{hub} did not answer{through} within {TIMEOUT} s",
                "does a firewall, here or there, let this port out and in?",
            )
    last = causes[-1]
    fix = "is the proxy up, and HTTPS_PROXY right?" if proxy else "is the hub up, and HUB's port right?"
    return _unreachable(
        f"{hub}{through}: {getattr(last, 'strerror', None) or text.line(last) or type(last).__name__}", fix
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error:
        yield error
        error = error.__cause__ or error.__context__


def _proxy(host: str) -> str:
    """The proxy that stands between, without its password; '' where there is none."""
    named = urllib.request.getproxies()
    if not (proxy := named.get("https") or named.get("all")) or urllib.request.proxy_bypass(host):
        return ""
    return f"the proxy {text.line(proxy.rpartition('@')[2].rpartition('://')[2])}"


def _unreachable(found: str, fix: str) -> CheckError:
    return CheckError("CHECK-01", found=found, fix=fix)


def _untrusted(hub: str, error: ssl.SSLCertVerificationError) -> CheckError:
    """Which of three things is wrong with the certificate, by OpenSSL's number for it."""
    found = f"{hub}: {error.verify_message}"
    if error.verify_code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, _IP_ADDRESS_MISMATCH
        fix = (
            "use the name that the hub's operator gave you; or the operator adds this one to HUB_HOST and runs"
            " scripts/certs renew"
        )
        return CheckError("CHECK-03", found=found, fix=fix)
    if error.verify_code in (9, 10):  # X509_V_ERR_CERT_NOT_YET_VALID, _CERT_HAS_EXPIRED
        fix = "the hub's operator runs scripts/certs renew; but look first at this machine's clock (date -u)"
        return CheckError("CHECK-04", found=found, fix=fix)
    fix = (
        "take ca.crt from the hub's newest join kit; if it is the newest, somebody else answers in the hub's place:"
        " tell its operator"
    )
    return CheckError("CHECK-02", found=found, fix=fix)


def clock(hub: str, ca: Path) -> float:
    """Seconds that this clock is ahead of the hub's (its Date header, whole seconds). Errors: CHECK-01 to -05,
    CHECK-09.
    """
    try:
        start = time.time()
        _, date = _ask(hub, ca)
        end = time.time()
        hub_time = email.utils.parsedate_to_datetime(date).timestamp() + 0.5
    except (TypeError, ValueError) as error:
        raise _unreachable(f"{hub} tells no time ({type(error).__name__})", "is HUB's port the hub's?") from None
    ahead = (start + end) / 2 - hub_time
    if not -BEHIND < ahead < AHEAD:
        raise CheckError(
            "CHECK-05",
            found=(
                f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the hub's; the hub takes {BEHIND} s behind"
                f" to {AHEAD} s ahead"
            ),
            fix="let this machine set its clock: timedatectl set-ntp true",
        )
    return ahead


def admitted(hub: str, ca: Path, key: Path) -> None:
    """Nothing, when the hub knows the key. Errors: CHECK-01, CHECK-05, CHECK-06, CHECK-07.

    The question is an activation with a heartbeat that Flower cannot accept: the hub looks the key up first (2004:
    unknown), then refuses the heartbeat (2003) before it touches anything.
    """
    import httpx
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supercore.error import ApiErrorCode, FlowerError
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    name = text.line(os.environ.get("SITE_NAME") or "NAME")
    private = _private_key(key)
    public = private.public_key()
    trust(ca)
    interceptors = [NodeAuthHttpInterceptor(private, public)]
    question = ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=0.0)
    try:
        with FleetHttpClient.from_server_address(hub, False, ca.read_bytes(), interceptors) as client:
            client.ActivateNode(question)
        raise AssertionError("the hub took a heartbeat of 0 s")
    except httpx.HTTPStatusError as error:
        status, answer = error.response.status_code, FlowerError.from_json(error.response.text)
    except httpx.HTTPError as error:
        raise _unreachable(f"{hub}: {type(error).__name__} {error}", "is the hub up?") from None
    if answer and answer.code == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
        return
    if answer and answer.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        raise CheckError(
            "CHECK-06",
            found=f"{hub} does not know {fingerprint(public)}, or has revoked it",
            fix=(
                f"send {name}.pub to the hub's operator, who runs bouquet hub admit {name} {name}.pub and reads this"
                " fingerprint back to you"
            ),
        )
    if status == 401:
        fix = "is this machine's clock right? Does the key belong to this site?"
        raise CheckError("CHECK-06", found=f"{hub} refuses the signature", fix=fix)
    raise _unreachable(
        f"{hub} answers HTTP {status}", "the SuperLink behind the hub's gateway is not up: tell the hub's operator"
    )


def fingerprint(public_key: ec.EllipticCurvePublicKey) -> str:
    """SHA256:…, as ssh-keygen -lf prints it."""
    import base64
    import hashlib

    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    line = public_key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return "SHA256:" + base64.b64encode(hashlib.sha256(base64.b64decode(line.split()[1])).digest()).decode().rstrip("=")


def _private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The site's key, of the one kind that Flower takes. Errors: CHECK-07."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.supercore.primitives.asymmetric import uses_nist_ec_curve

    try:
        key = load_ssh_private_key(path.read_bytes(), None)
        if isinstance(key, ec.EllipticCurvePrivateKey) and uses_nist_ec_curve(key.public_key()):
            return key
        found = f"{path} is of another kind"
    except OSError as error:
        found = f"{path}: {error.strerror}"
    except Exception as error:  # what a file that is no key makes cryptography raise
        found = f"{path} is no OpenSSH key without a password ({type(error).__name__})"
    raise CheckError(
        "CHECK-07",
        found=found,
        fix="make one here: ./site init (ECDSA, in OpenSSH format); it never leaves this machine",
    )
