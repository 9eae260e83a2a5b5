"""`health.py CHECK...`: exit 0 when every check holds. Verified against /ca.crt where it is TLS.

http://…, https://…   answers 200
tcp://HOST:PORT       takes a connection
heard:FILE            the SuperNode wrote it after an answer from the hub, less than 75 s ago (2½ heartbeats)
"""

import os
import socket
import ssl
import sys
import time
import urllib.parse
import urllib.request

LONGEST = 75


def check(what: str) -> None:
    """Raises OSError, or exits with the reason, when `what` does not hold."""
    url = urllib.parse.urlsplit(what)
    if url.scheme == "heard":
        silent = time.time() - os.stat(url.path).st_mtime
        if silent > LONGEST:
            sys.exit(f"nothing heard from the hub for {silent:.0f} s")
    elif url.scheme == "tcp":
        socket.create_connection((url.hostname, url.port), timeout=5).close()
    else:
        ca = os.environ.get("CA", "/ca.crt")
        tls = ssl.create_default_context(cafile=ca) if url.scheme == "https" else None
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls))
        direct.open(what, timeout=5).close()  # whatever the environment says of proxies: these are neighbours


for argument in sys.argv[1:]:
    check(argument)
