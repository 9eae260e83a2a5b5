"""Many large bodies to one address at once, from where this runs. Standard library alone: it is piped into containers.

Enters: argv[1], JSON {"address": "host:port", "path": "/path", "head": hex, "size": n, "count": n}: each body is head
and `size` times "x".
Leaves: JSON, the status of each answer; 0 where there was none.
"""

import json
import socket
import ssl
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

wanted = json.loads(sys.argv[1])
body = bytes.fromhex(wanted["head"]) + b"x" * wanted["size"]
head = (
    f"POST {wanted['path']} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type:"
    f" application/protobuf\r\nContent-Length: {len(body)}\r\n\r\n"
)
tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE


def send(_: int) -> int:
    try:
        with tls.wrap_socket(socket.create_connection(wanted["address"].rsplit(":", 1), 30)) as link:
            link.settimeout(60)
            with suppress(OSError):  # refused half-way: the answer may still be there
                link.sendall(head.encode() + body)
            return int(link.recv(4096).split()[1])
    except (OSError, IndexError, ValueError):
        return 0


with ThreadPoolExecutor(wanted["count"]) as pool:
    print(json.dumps(list(pool.map(send, range(wanted["count"])))))
