"""A server under load: requests/s, latency, errors and memory of lion-st serve beside stock models behind FastAPI.

    python benchmarks/serve.py
    python benchmarks/serve.py --clients 16 --seconds 10
    python benchmarks/serve.py --model runs/quickstart/lion-sp --sides "lion-st serve"

Clients are threads of a process of their own, each of which posts a query of about 9 tokens, waits for its sparse
vector and posts the next. The other side is what one writes in ten lines: a route that FastAPI runs in its threads and
that calls `SparseEncoder.encode_query` for each request. Memory is the server's resident set, after a warm-up of
one client, after a third of the time, and in the end: a server that leaks grows with the requests. The process ends
with an error if a request failed.

Without --model, the model is a small random Llama (hidden 64, 2 layers) with about 150 active terms a text.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from common import RESULTS, in_process, make_models, random_texts, report

SIDES = ("lion-st serve", "SparseEncoder behind FastAPI")
WARM_UP = 200  # requests before memory is read
LONGEST_START = 300  # seconds

PLAIN = """
import sys

import uvicorn
from fastapi import FastAPI
from sentence_transformers import SparseEncoder

model = SparseEncoder(sys.argv[1], device="cpu")
app = FastAPI()


@app.get("/health")
def health():
    return {}


@app.post("/embed_sparse")
def embed_sparse(body: dict):
    row = model.encode_query(body["inputs"]).coalesce()
    pairs = zip(row.indices()[0].tolist(), row.values().tolist())
    return [[{"index": index, "value": value} for index, value in pairs]]


uvicorn.run(app, port=int(sys.argv[2]), log_level="error")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--model", help="checkpoint for SparseEncoder; by default a random one")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--load", nargs=2, metavar=("URL", "PROCESS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        print(json.dumps(load(given.load[0], int(given.load[1]), given.clients, given.seconds, given.vocabulary)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = given.model
        if model is None:
            make_models(Path(folder), "tiny", given.vocabulary, 150)
            model = str(Path(folder) / "stock")
        for side in given.sides:
            rows.append({"side": side, **measure(side, model, given)})
    settings = {name: getattr(given, name) for name in ("clients", "seconds", "vocabulary", "model")}
    report(given.output, "serve", f"{given.clients} clients for {given.seconds:g} s", rows, settings)
    if failed := [row["side"] for row in rows if row["errors"]]:
        raise SystemExit(f"Requests failed: {', '.join(failed)}.")


def measure(side: str, model: str, given: argparse.Namespace) -> dict[str, Any]:
    """Start a side's server, load it from another process, and stop it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", PLAIN, model, str(port)]
    if side == "lion-st serve":
        command = [sys.executable, "-m", "lion_st", "serve", model, "--port", str(port), "--quiet"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, server)
        numbers = [f"--{name}={getattr(given, name)}" for name in ("clients", "seconds", "vocabulary")]
        figures = in_process(__file__, [*numbers, "--load", url, str(server.pid)])
        assert figures is not None, "the clients ran out of memory"
        return figures
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def wait_for(url: str, server: subprocess.Popen) -> None:
    end = time.monotonic() + LONGEST_START
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit(f"The server ended with {server.returncode} before it answered.")
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise SystemExit(f"The server did not answer within {LONGEST_START} s.")


def load(url: str, process: int, clients: int, seconds: float, vocabulary: int) -> dict[str, Any]:
    """Post queries from many clients until the time is over."""
    texts = list(random_texts(1000, vocabulary, median=9))
    with httpx.Client(timeout=120) as client:
        for text in texts[:WARM_UP]:
            client.post(f"{url}/embed_sparse", json={"inputs": text, "prompt_name": "query"})
    before = resident_mib(process)
    latencies: list[float] = []
    errors: list[str] = []
    end = time.monotonic() + seconds

    def ask(number: int) -> None:
        with httpx.Client(timeout=120) as client:
            while time.monotonic() < end:
                body = {"inputs": texts[number % len(texts)], "prompt_name": "query"}
                started = time.perf_counter()
                try:
                    client.post(f"{url}/embed_sparse", json=body).raise_for_status()
                except httpx.HTTPError as error:
                    errors.append(repr(error))
                else:
                    latencies.append(time.perf_counter() - started)
                number += 7

    started = time.monotonic()
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 3)
    early = resident_mib(process)
    for thread in threads:
        thread.join()
    spent = time.monotonic() - started
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000 if latencies else (None, None)
    return {
        "requests": len(latencies),
        "requests/s": len(latencies) / spent,
        "p50 ms": p50,
        "p99 ms": p99,
        "errors": len(errors),
        "first error": errors[0] if errors else "",
        "resident MiB": before,
        "after a third": early,
        "in the end": resident_mib(process),
    }


def resident_mib(process: int) -> float:
    """Memory that a process holds now."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
