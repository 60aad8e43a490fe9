#!/usr/bin/env python3
"""Sends requests over kept-alive connections, as a racer of ``harness.race``: the same, or one for each CSR or path.

One process serves all connections, without a thread and, but for CSRs, with the standard library only: it shares the
processors with the server it measures, and should leave them to it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import selectors
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

DEVICE = {"name": "bench", "type": "sensor", "location": "hall 1", "firmware": "1.0.0", "metadata": {"line": 4}}
_LENGTH = re.compile(rb"\r\nContent-Length: *([0-9]+)\r\n", re.IGNORECASE)
_READ_SIZE = 1 << 16
_ROOM = bytearray(1 << 20)
_CLOSED = "The server closed a connection."


def main() -> None:
    """Take address, CA file and token from the environment, under the CLI's names; the last two may be missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--requests", type=int, default=sys.maxsize)
    parser.add_argument("--method", default="POST")
    parser.add_argument("--path", default="/register")
    parser.add_argument("--body", type=argparse.FileType(), help="the body; by default a registration")
    parser.add_argument("--csr", metavar="FIELD", help="put a CSR for a new key into each body, in this field")
    parser.add_argument("--csrs", type=int, default=2000, help="CSRs made before the first request; others when needed")
    parser.add_argument("--paths", type=Path, help="ask for each path in this file once, in place of --path")
    parser.add_argument("--save", type=Path, help="write the bodies of the answers to this file, one a line")
    parser.add_argument("--header", action="append", default=[], help="a further header, such as 'If-None-Match: …'")
    parser.add_argument("--status", type=int, default=201, help="what every answer must have")
    parser.add_argument("--discard", action="store_true", help="have the kernel throw bodies away: large ones, no TLS")
    arguments = parser.parse_args()
    url = urlsplit(os.environ["PORTAL_URL"])
    requests = _requests(url, arguments)
    connections = [_connect(url) for _ in range(arguments.connections)]
    print("ready", flush=True)
    sys.stdin.readline()
    used = time.process_time()
    seconds, times, bodies = _race(connections, requests, arguments)
    used = time.process_time() - used
    if arguments.save:
        arguments.save.write_bytes(b"".join(body.strip() + b"\n" for body in bodies))
    print(json.dumps({"seconds": seconds, "times": times, "cpu": used}), flush=True)


def _connect(url: SplitResult) -> socket.socket:
    sock = socket.create_connection((url.hostname or "", url.port or 443), timeout=60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if url.scheme == "http":
        return sock
    context = ssl.create_default_context(cafile=os.environ["PORTAL_CA"])
    return context.wrap_socket(sock, server_hostname=url.hostname)


def _requests(url: SplitResult, arguments: argparse.Namespace) -> Iterator[bytes]:
    """Return requests: always the same one, unless each has a CSR or a path of its own."""
    if arguments.paths:
        paths = arguments.paths.read_text().split()
        arguments.requests = min(arguments.requests, len(paths))
        return iter([_request(url, arguments, path, "") for path in paths])
    body = arguments.body.read() if arguments.body else json.dumps(DEVICE)
    if arguments.method in ("GET", "HEAD"):
        body = ""
    if not arguments.csr:
        return itertools.repeat(_request(url, arguments, arguments.path, body))
    fields = json.loads(body)

    def with_csr() -> bytes:
        return _request(url, arguments, arguments.path, json.dumps({**fields, arguments.csr: _new_csr()}))

    made = [with_csr() for _ in range(min(arguments.csrs, arguments.requests))]
    return itertools.chain(made, iter(with_csr, b""))


def _new_csr() -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def _request(url: SplitResult, arguments: argparse.Namespace, path: str, body: str) -> bytes:
    headers = [f"{arguments.method} {path} HTTP/1.1", f"Host: {url.netloc}", *arguments.header]
    if body:
        headers += ["Content-Type: application/json", f"Content-Length: {len(body.encode())}"]
    if token := os.environ.get("PORTAL_TOKEN"):
        headers.append(f"Authorization: Bearer {token}")
    return ("\r\n".join([*headers, "", ""]) + body).encode()


def _race(
    connections: list[socket.socket], requests: Iterator[bytes], arguments: argparse.Namespace
) -> tuple[float, list[float], list[bytes]]:
    """Keep one request under way on each connection until the time has passed; return seconds, times, saved bodies."""
    times: list[float] = []
    bodies: list[bytes] = []
    selector = selectors.DefaultSelector()
    begun: dict[socket.socket, float] = {}
    started = now = time.perf_counter()
    until, left = started + arguments.seconds, arguments.requests
    for sock in connections[:left]:
        selector.register(sock, selectors.EVENT_READ, sock)
        begun[sock] = now
        sock.sendall(next(requests))
        left -= 1
    while begun:
        for key, _ in selector.select():
            sock = key.data
            body = _read_answer(sock, arguments)
            now = time.perf_counter()
            times.append(round((now - begun.pop(sock)) * 1000, 2))
            if arguments.save:
                bodies.append(body)
            if now < until and left > 0:
                begun[sock] = now
                sock.sendall(next(requests))
                left -= 1
    return now - started, times, bodies


def _read_answer(sock: socket.socket, arguments: argparse.Namespace) -> bytes:
    """Read an answer as a whole; return its body, as far as it was kept."""
    answer = sock.recv(_READ_SIZE)
    while b"\r\n\r\n" not in answer:
        answer += _more(sock)
    head, _, body = answer.partition(b"\r\n\r\n")
    if head.split(b" ", 2)[1] != b"%d" % arguments.status:
        sys.exit(f"The server answered {answer.decode(errors='replace')}")
    length = _LENGTH.search(head + b"\r\n")
    if length is None or arguments.method == "HEAD" or arguments.status == 304:
        return b""
    missing = int(length[1]) - len(body)
    parts = [body]
    while missing > 0:
        if arguments.discard:
            missing -= _thrown_away(sock, missing)
        else:
            parts.append(_more(sock))
            missing -= len(parts[-1])
    return b"".join(parts)


def _thrown_away(sock: socket.socket, most: int) -> int:
    """Take bytes of a body without a copy of them (tcp(7), MSG_TRUNC), which would cost as much as to send them."""
    return sock.recv_into(_ROOM, min(most, len(_ROOM)), socket.MSG_TRUNC) or sys.exit(_CLOSED)


def _more(sock: socket.socket) -> bytes:
    data = sock.recv(_READ_SIZE)
    if not data:
        sys.exit(_CLOSED)
    return data


if __name__ == "__main__":
    main()
