"""A proxy in front of a real S3 server that fails a share of the requests, as networks and servers do it.

`python tests/faulty_s3.py http://127.0.0.1:9000 0.1 70` is one to point AWS_ENDPOINT_URL at, whose silences last 70 s;
it ends with its standard input, and prints its counts.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

OUTAGES = ("reset", "503", "hang", "drop", "refused", "certificate")
FAULTS = ("500", "503", "reset", "reset after", "lost answer", "slow", "cut answer", "cut request")
NOT_FORWARDED = ("connection", "expect", "keep-alive", "transfer-encoding")


class FaultyS3(ThreadingHTTPServer):
    """Listens at `url` and hands requests on to `endpoint`, a `share` of which fail.

    500, 503       answered so, not handed on            lost answer    handed on, and answered with 500
    reset          the connection is reset at once       reset after    handed on, then reset
    slow           silence for `slow_s`, then reset      cut answer     half of the body, then reset
    cut request    reset when half of the body is read
    `outage`       while it is one of OUTAGES, it happens to every request:
        reset, 503                                       as above
        hang        no answer until the outage has ended, as by a server that is stopped
        drop        no answer at all, as by a network that loses every packet
        refused     nobody listens
        certificate one that nobody has signed; the proxy must speak TLS, with `certificates` (trusted, untrusted)
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        endpoint: str,
        share: float = 0.0,
        slow_s: float = 0.0,
        seed: int = 0,
        certificates: tuple[ssl.SSLContext, ssl.SSLContext] | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.certificates = certificates
        self.endpoint, self.share, self.slow_s = urlsplit(endpoint), share, slow_s
        self.url = f"{'https' if certificates else 'http'}://127.0.0.1:{self.server_address[1]}"
        self.outage = ""
        self._ended = threading.Event()
        self.armed: list[tuple[Callable[[str], bool], str, float]] = []
        """Outages to come: whether one begins with a request such as "PUT /bucket/key", its kind, its seconds."""
        self.requests: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._rng, self._lock = random.Random(seed), threading.Lock()

    def fault(self, method: str, path: str, body: bool) -> str:
        """Return what happens to a request, and count it."""
        with self._lock:
            self.requests[method] += 1
            due = [] if self.outage else [each for each in self.armed if each[0](f"{method} {unquote(path)}")]
            if due:
                _, kind, seconds = due[0]
                self.armed.remove(due[0])
                self._ended.clear()
                self.outage = kind  # of this request too
                threading.Thread(target=self.fail_for, args=(kind, seconds), daemon=True).start()
            kind = self.outage
            if not kind and self._rng.random() < self.share:
                possible = [each for each in FAULTS if body or each != "cut request"]
                kind = min(possible, key=lambda each: self.faults[each])  # each in its turn
            if kind:
                self.faults[kind] += 1
            return kind

    def fail_at(self, request: int, kind: str, seconds: float) -> None:
        """Begin an outage with this request from now on."""
        first = sum(self.requests.values()) + request
        self.armed.append((lambda _: sum(self.requests.values()) >= first, kind, seconds))

    def fail_on(self, pattern: str, kind: str, seconds: float) -> None:
        """Begin an outage with the first request that matches, such as "PUT .*/COMMIT.json", outside of another one."""
        self.armed.append((lambda request: re.match(pattern, request) is not None, kind, seconds))

    def fail_for(self, kind: str, seconds: float) -> None:
        """Let an outage begin, wait for its end and end it."""
        self.begin(kind)
        time.sleep(seconds)
        self.end()

    def begin(self, kind: str) -> None:
        assert kind in OUTAGES
        self._ended.clear()
        self.outage = kind
        if kind == "refused":
            self.shutdown()
            self.socket.close()

    def end(self) -> None:
        if self.outage == "refused":
            self.socket = socket.create_server(self.server_address[:2])
            threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        self.outage = ""
        self._ended.set()

    def wait_for_the_end(self) -> None:
        self._ended.wait()

    def get_request(self) -> tuple[socket.socket, object]:
        connection, address = super().get_request()
        if self.certificates:
            context = self.certificates[self.outage == "certificate"]
            connection = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def count(self) -> str:
        """For a report."""
        return f"{sum(self.requests.values())} requests {dict(self.requests)}, faults {dict(self.faults)}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that hangs up is no news here

    def __enter__(self) -> FaultyS3:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class FaultyProcess:
    """The same proxy as a process of its own, which an outage stops by SIGSTOP: the system accepts, nobody answers."""

    def __init__(self, endpoint: str, share: float, slow_s: float) -> None:
        command = [sys.executable, __file__, endpoint, str(share), str(slow_s)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.url = self.process.stdout.readline().strip()
        self.faults: Counter[str] = Counter()
        self._count = ""

    def begin(self, kind: str) -> None:
        assert kind == "stopped"
        os.kill(self.process.pid, signal.SIGSTOP)

    def end(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def count(self) -> str:
        """For a report, after the end."""
        return self._count

    def __enter__(self) -> FaultyProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        try:
            self._count, faults = self.process.communicate(timeout=60)[0].splitlines()
            self.faults.update(json.loads(faults))
        finally:
            self.process.kill()
            self.process.wait()


class Handler(BaseHTTPRequestHandler):
    server: FaultyS3
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_expect_100(self) -> bool:
        return True  # the body is asked for when it is known what happens to it

    def _any(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        kind = self.server.fault(self.command, self.path, length > 1)
        if kind in ("reset", "refused", "certificate"):
            return self._reset()
        if kind in ("hang", "drop"):
            self.server.wait_for_the_end()
            if kind == "drop":
                return self._reset()
            kind = ""
        if length and self.headers.get("Expect"):
            self.send_response_only(100)
            self.end_headers()
        if kind == "cut request":
            self.rfile.read(length // 2)
            return self._reset()
        body = self.rfile.read(length)
        if kind == "slow":
            time.sleep(self.server.slow_s)
            return self._reset()
        if kind in ("500", "503"):
            return self._refuse(int(kind))
        answer, data = self._forward(body)
        if kind == "reset after":
            return self._reset()
        if kind == "lost answer":
            return self._refuse(500)
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in (*NOT_FORWARDED, "content-length"):
                self.send_header(name, value)
        # to a HEAD the server tells the length of the body that it does not send
        self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if kind == "cut answer" else data)
        self.wfile.flush()
        if kind == "cut answer":
            self._reset()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any

    def _forward(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        host, port = self.server.endpoint.hostname, self.server.endpoint.port
        assert host
        connection = http.client.HTTPConnection(host, port, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in NOT_FORWARDED}
        connection.request(self.command, self.path, body or None, headers)  # the Host that was signed stays
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer, data

    def _refuse(self, status: int) -> None:
        code = "SlowDown" if status == 503 else "InternalError"
        body = b"" if self.command == "HEAD" else f"<Error><Code>{code}</Code><Message>x</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _reset(self) -> None:
        """End the connection as a crash does: what was on its way is lost."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


if __name__ == "__main__":
    with FaultyS3(sys.argv[1], float(sys.argv[2]), slow_s=float(sys.argv[3])) as proxy:
        print(proxy.url, flush=True)
        sys.stdin.read()
        print(proxy.count())
        print(json.dumps(proxy.faults))
