"""`health.py CHECK...`: exit 0 when every check holds. Verified against /ca.crt where it is TLS.

http://…, https://…   answers 200
tcp://HOST:PORT       takes a connection
heard:FILE            the SuperNode wrote it after an answer from the hub, less than 75 s ago (2½ heartbeats)

Docker starts it every two seconds while a container comes up, so it imports what its checks need and no more; and it
asks directly, whatever the environment says of proxies: these are neighbours.
"""

import os
import sys
import time

LONGEST = 75


def check(what: str) -> None:
    """Raises OSError, or exits with the reason, when `what` does not hold."""
    scheme, _, rest = what.partition(":")
    if scheme == "heard":
        silent = time.time() - os.stat(rest).st_mtime
        if silent > LONGEST:
            sys.exit(f"nothing heard from the hub for {silent:.0f} s")
        return
    place, _, path = rest.removeprefix("//").partition("/")
    if scheme == "tcp":
        import socket

        host, port = place.rsplit(":", 1)
        socket.create_connection((host, int(port)), timeout=5).close()
    else:
        ask(scheme, place, f"/{path}")


def ask(scheme: str, place: str, path: str) -> None:
    import http.client

    if scheme == "https":
        import ssl

        tls = ssl.create_default_context(cafile=os.environ.get("CA", "/ca.crt"))
        there: http.client.HTTPConnection = http.client.HTTPSConnection(place, timeout=5, context=tls)
    else:
        there = http.client.HTTPConnection(place, timeout=5)
    there.request("GET", path)
    status = there.getresponse().status
    there.close()
    if status != 200:
        sys.exit(f"{place}{path} answers {status}")


for argument in sys.argv[1:]:
    check(argument)
