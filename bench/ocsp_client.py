#!/usr/bin/env python3
"""Asks for OCSP answers over one kept-alive connection in plain HTTP, as a racer of ``harness.race``.

A plain socket and no parsing beyond the length: it shares the processors with the server that it measures.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

NONCE_HEADER = bytes.fromhex("2b0601050507300102")
NONCE_BYTES = 32


def main() -> None:
    """Take requests (DER, one a file of the folder) in turn; with ``--nonce`` give each a nonce of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--nonce", action="store_true")
    parser.add_argument("--start", type=int, default=0)
    arguments = parser.parse_args()
    requests = [path.read_bytes() for path in sorted(arguments.folder.iterdir())]
    url = urlsplit(arguments.url)
    connection = socket.create_connection((url.hostname or "", url.port or 80), timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head = f"POST {url.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/ocsp-request\r\nContent-Length: "
    wanted = b"HTTP/1.1 200 OK\r\n"
    print("ready", flush=True)
    sys.stdin.readline()

    times: list[float] = []
    used = time.process_time()
    started = now = time.perf_counter()
    until = started + arguments.seconds
    number = arguments.start
    while now < until:
        der = requests[number % len(requests)]
        number += 1
        if arguments.nonce:
            at = der.rindex(NONCE_HEADER) + len(NONCE_HEADER) + 4  # past the headers of two OCTET STRINGs
            der = der[:at] + os.urandom(NONCE_BYTES) + der[at + NONCE_BYTES :]
        connection.sendall(f"{head}{len(der)}\r\n\r\n".encode() + der)
        answer = _read(connection)
        if not answer.startswith(wanted) or (arguments.nonce and der[at : at + NONCE_BYTES] not in answer):
            sys.exit(f"The portal answered {answer[:200]!r}")
        before, now = now, time.perf_counter()
        times.append(round((now - before) * 1000, 2))
    print(json.dumps({"seconds": now - started, "times": times, "cpu": time.process_time() - used}), flush=True)
    connection.close()


def _read(connection: socket.socket) -> bytes:
    answer = connection.recv(65536)
    while True:
        head, separator, body = answer.partition(b"\r\n\r\n")
        if separator:
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            if len(body) >= length:
                return answer
        more = connection.recv(65536)
        if not more:
            sys.exit("The portal closed the connection.")
        answer += more


if __name__ == "__main__":
    main()
