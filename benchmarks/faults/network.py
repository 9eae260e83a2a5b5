"""What a network does to a site: cuts, resets in the middle of a push, slow lines. The site's SuperNode reaches the
hub through a relay.

Enters: cases that turn the relay's knobs. Leaves: what the relay let through. TLS goes through untouched: the relay
sees bytes alone. Packets are lost by a rule of the kernel's firewall for the relay's own port on loopback, which takes
root and iptables; the site's TCP then has to send them again.
"""

from __future__ import annotations

import queue
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from benchmarks.faults.bench import Bench
from benchmarks.faults.case import Case
from benchmarks.faults.hub import Late

ENOUGH = 100_000  # bytes of a push after which it is reset; a site's adapter is several times that
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no seconds: close() sends a reset


class Relay:
    """Carries connections from a port of its own to `target`."""

    def __init__(self) -> None:
        self.target = 0
        self.flow = threading.Event()  # cleared: nothing goes through and nothing is closed, as with a cable pulled
        self.flow.set()
        self.delay, self.rate = 0.0, 0.0  # seconds each way, bits a second (0 is no limit)
        self.reset_after = 0  # bytes towards the hub after which one connection is reset; 0 is never
        self.resets = 0
        self.pushed = self.pulled = 0  # bytes towards the hub and from it
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.links: list[threading.Thread] = []
        self.server = threading.Thread(target=self._serve, daemon=True)
        self.server.start()

    def close(self) -> None:
        """Take no more connections, and wait a little for those that are there to end."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.server.join()
        self.listener.close()
        self.flow.set()
        self.delay = self.rate = 0.0
        for link in self.links:
            link.join(5)

    def _serve(self) -> None:
        while True:
            try:
                site, _ = self.listener.accept()
            except OSError:
                return
            self.links = [link for link in self.links if link.is_alive()]
            self.links.append(threading.Thread(target=self._join, args=(site,), daemon=True))
            self.links[-1].start()

    def _join(self, site: socket.socket) -> None:
        self.flow.wait()
        try:
            hub = socket.create_connection(("127.0.0.1", self.target), 10)
        except OSError:  # the hub is down
            site.close()
            return
        hub.settimeout(None)
        ways = []
        for source, to in ((site, hub), (hub, site)):
            line: queue.Queue[tuple[float, bytes]] = queue.Queue(maxsize=64)
            ways.append(
                threading.Thread(
                    target=self._read, args=(source, line, (site, hub) if source is site else ()), daemon=True
                )
            )
            ways.append(threading.Thread(target=self._write, args=(line, to), daemon=True))
        for way in ways:
            way.start()
        for way in ways:
            way.join()
        site.close()
        hub.close()

    def _read(self, source: socket.socket, line: queue.Queue, both: tuple[socket.socket, ...]) -> None:
        """both: the connection's two ends where it leads towards the hub, so that it may be reset."""
        data, due, seen = b"x", 0.0, 0
        while data:
            try:
                data = source.recv(16384)
            except OSError:
                data = b""
            self.flow.wait()
            seen = seen + len(data) if self.reset_after else 0
            if both:
                self.pushed += len(data)
            else:
                self.pulled += len(data)
            if both and self.reset_after and seen >= self.reset_after:
                self.reset_after, self.resets = 0, self.resets + 1
                for end in both:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    with suppress(OSError):
                        end.shutdown(socket.SHUT_RD)
                    end.close()
            due = max(due, time.monotonic()) + (8 * len(data) / self.rate if self.rate else 0)
            line.put((due + self.delay, data))

    def _write(self, line: queue.Queue, to: socket.socket) -> None:
        while True:
            due, data = line.get()
            time.sleep(max(0.0, due - time.monotonic()))
            self.flow.wait()
            try:
                if not data:
                    return to.shutdown(socket.SHUT_WR)
                to.sendall(data)
            except OSError:
                data = b""
            if not data:
                while line.get()[1]:  # let the reader come to its end
                    pass
                return


@contextmanager
def relayed(home: Path) -> Iterator[Bench]:
    """The deployment with site-3 behind a relay, which is `bench.relay`."""
    relay = Relay()
    bench = Bench(home, hub_for_site_3=f"127.0.0.1:{relay.port}")
    bench.relay, relay.target = relay, bench.port
    try:
        with bench:
            yield bench
    finally:
        relay.close()


def cut(seconds: float) -> Callable[[Bench, str], None]:
    def fault(bench: Bench, run: str) -> None:
        bench.relay.flow.clear()
        try:
            time.sleep(seconds)
        finally:
            bench.relay.flow.set()

    return fault


def reset(bench: Bench, run: str) -> None:
    """The push of the site's adapter, cut off by a reset in its middle."""
    before = bench.relay.resets
    bench.relay.reset_after = ENOUGH
    bench.until(lambda: bench.relay.resets > before, 60, "a push of more than 100 kB")


def slow(bench: Bench, run: str) -> Callable[[], None]:
    """300 ms each way and 1 Mbit/s from now to the run's end."""
    bench.relay.delay, bench.relay.rate = 0.3, 1e6

    def mend() -> None:
        bench.relay.delay = bench.relay.rate = 0.0

    return mend


class Loss:
    """A share of the packets from and to a port of loopback is dropped, while the rules are there."""

    def __init__(self, port: int, share: float) -> None:
        chance = ["-m", "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP"]
        self.port, self.rules = (
            port,
            [["INPUT", "-i", "lo", "-p", "tcp", way, str(port), *chance] for way in ("--dport", "--sport")],
        )

    def begin(self) -> None:
        for rule in self.rules:
            iptables("-I", *rule)

    def end(self) -> int:
        """Take the rules away; how many packets they dropped."""
        counters = iptables("-nvxL", "INPUT").splitlines()
        for rule in self.rules:
            iptables("-D", *rule)
        return sum(int(line.split()[0]) for line in counters if f"pt:{self.port} " in line)


def iptables(*arguments: str) -> str:
    """Errors: OSError with iptables' own words."""
    done = subprocess.run(["iptables", "-w", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip())
    return done.stdout


@cache
def no_loss() -> str:
    """Why no packet can be dropped here; '' where it can."""
    loss = Loss(1, 0.0)  # a port that nobody uses, and no chance
    try:
        loss.begin()
        loss.end()
    except OSError as error:
        return f"iptables cannot drop packets here ({error})"
    return ""


def lossy(share: float, delay: float = 0.0, rate: float = 0.0) -> Callable[[Bench, str], Callable[[], None]]:
    """From now to the run's end. Errors (of what it returns): Late, when not one packet was lost."""

    def fault(bench: Bench, run: str) -> Callable[[], None]:
        loss = Loss(bench.relay.port, share)
        bench.relay.delay, bench.relay.rate = delay, rate
        loss.begin()

        def mend() -> None:
            bench.relay.delay = bench.relay.rate = 0.0
            if not (dropped := loss.end()):
                raise Late("no packet was lost")
            print(f"faults: {dropped} packets were lost", flush=True)

        return mend

    return fault


CASES = [
    Case("network", "5 % of a site's packets lost", lossy(0.05), relayed, needs=no_loss),
    Case(
        "network", "5 % of its packets lost, 300 ms each way, 1 Mbit/s", lossy(0.05, 0.3, 1e6), relayed, needs=no_loss
    ),
    Case("network", "a connection reset in the middle of a push", reset, relayed),
    Case("network", "a site's line slow: 300 ms each way, 1 Mbit/s", slow, relayed),
    Case("network", "a site's network cut for 20 s", cut(20), relayed),
    Case("network", "a site's network cut for 90 s", cut(90), relayed, most=3),
]
