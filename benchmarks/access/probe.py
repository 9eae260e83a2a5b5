"""What answers at some addresses, seen from where this runs. Standard library alone: it is piped into containers.

Enters: argv[1], JSON {"targets": {name: "host:port"}, "calls": ["POST /path", ...]}.
Leaves: JSON {name: {call: [status or error, whether it is the SuperLink's own answer]}}, or {name: error} where
nothing takes a connection.
"""

import json
import socket
import ssl
import sys
from concurrent.futures import ThreadPoolExecutor

tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE


def ask(address: list[str], call: str) -> list:
    head = "HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/protobuf\r\nContent-Length: 0\r\n\r\n"
    got = b""
    try:
        with tls.wrap_socket(socket.create_connection(address, 3)) as link:
            link.sendall(f"{call} {head}".encode())
            while more := link.recv(4096):
                got += more
        return [int(got.split()[1]), b"content-type: application/" in got.lower()]
    except (OSError, IndexError) as error:
        return [type(error).__name__, False]


def look(address: str, calls: list[str]) -> dict | str:
    to = address.rsplit(":", 1)
    try:
        socket.create_connection(to, 3).close()
    except OSError as error:
        return type(error).__name__
    return {call: ask(to, call) for call in calls}


wanted = json.loads(sys.argv[1])
with ThreadPoolExecutor(8) as pool:
    seen = pool.map(lambda address: look(address, wanted["calls"]), wanted["targets"].values())
    print(json.dumps(dict(zip(wanted["targets"], seen, strict=True))))
