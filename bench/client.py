#!/usr/bin/env python3
"""Registers devices over one kept-alive HTTPS connection, as a racer of ``harness.race``.

Uses the standard library only and starts no thread: it shares the processors with the server it measures.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import ssl
import sys
import time
from urllib.parse import urlsplit

DEVICE = {"name": "bench", "type": "sensor", "location": "hall 1", "firmware": "1.0.0", "metadata": {"line": 4}}


def main() -> None:
    """Take the portal's address, CA file and token from the environment, under the CLI's names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--requests", type=int, default=sys.maxsize)
    parser.add_argument("--csr", type=argparse.FileType())
    arguments = parser.parse_args()
    body = json.dumps(DEVICE | ({"csr": arguments.csr.read()} if arguments.csr else {})).encode()
    url = urlsplit(os.environ["PORTAL_URL"])
    headers = {"Authorization": f"Bearer {os.environ['PORTAL_TOKEN']}", "Content-Type": "application/json"}
    context = ssl.create_default_context(cafile=os.environ["PORTAL_CA"])
    connection = http.client.HTTPSConnection(url.hostname or "", url.port, context=context, timeout=60)
    connection.connect()
    print("ready", flush=True)
    sys.stdin.readline()

    times: list[float] = []
    used = time.process_time()
    started = now = time.perf_counter()
    until = started + arguments.seconds
    while now < until and len(times) < arguments.requests:
        connection.request("POST", "/register", body, headers)
        response = connection.getresponse()
        answer = response.read()
        if response.status != 201:
            sys.exit(f"The portal answered {response.status}: {answer.decode(errors='replace')}")
        before, now = now, time.perf_counter()
        times.append(round((now - before) * 1000, 2))
    print(json.dumps({"seconds": now - started, "times": times, "cpu": time.process_time() - used}), flush=True)
    connection.close()


if __name__ == "__main__":
    main()
