"""Starts a server: one process, or several workers that listen on one socket."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from lion_st.errors import describe_error, shows_traceback
from lion_st.extras import require
from lion_st.serving.settings import ServerSettings

GRACE = 5.0  # seconds beyond the time of a request that a shutdown waits for those under way
WORKER_SILENCE = 120.0  # seconds for which a worker may not answer, as while it loads the model


def serve(settings: ServerSettings, announce: Callable[[str], Any] = print) -> None:
    """Serve until interrupted or terminated; requests under way are answered first.

    Args:
        settings: Model, index, address and limits.
        announce: Called with one line once requests are taken (with several workers, once they are started).

    Raises:
        OSError: If the address cannot be listened on, or there is no such index.
        StorageError: If the index holds vectors of another model, or cannot be opened.
        RuntimeError: If a worker cannot start.
    """
    require("uvicorn")
    from lion_st.indexes import index_folder
    from lion_st.serving.live_index import TextStore

    if settings.index is not None:  # the same commit for all workers
        folder = index_folder(settings.index, settings.index_revision)
        settings = replace(settings, index=str(folder), index_revision=None)
    with _bound_socket(settings.host, settings.port) as listening, TemporaryDirectory(prefix="lion-st-serve-") as made:
        texts = None if settings.corpus is None else Path(made) / "texts"
        if texts is not None:  # once for all workers
            TextStore.of_index(str(settings.corpus), Path(str(settings.index)), texts)
        address = _address(listening)
        if settings.workers == 1:
            _serve_here(settings, texts, listening, address, announce)
        else:
            _serve_from_workers(settings, texts, listening, Path(made), address, announce)


def _serve_here(
    settings: ServerSettings, texts: Path | None, listening: socket.socket, address: str, announce: Callable[[str], Any]
) -> None:
    from uvicorn import Server

    from lion_st.serving.app import create_app
    from lion_st.serving.service import Service, log_to_standard_error

    log_to_standard_error()
    service = Service.open(settings, texts)
    server = Server(_config(create_app(service), settings))
    announce(f"{service.name} ({service.paradigm}) on {address}, process {os.getpid()}.")
    # uvicorn raises the signal that ended it once more, for the handler that was there before.
    is_main = threading.current_thread() is threading.main_thread()
    earlier = signal.signal(signal.SIGTERM, lambda *_: None) if is_main else None
    try:
        server.run([listening])
    except KeyboardInterrupt:
        pass
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, earlier)


def _serve_from_workers(
    settings: ServerSettings,
    texts: Path | None,
    listening: socket.socket,
    made: Path,
    address: str,
    announce: Callable[[str], Any],
) -> None:
    from accelerate.utils import patch_environment
    from uvicorn.config import STARTUP_FAILURE
    from uvicorn.supervisors import Multiprocess

    from lion_st.serving.metrics import SHARED

    counted = made / "metrics"
    counted.mkdir()
    with patch_environment(**{SHARED: counted}):
        config = _config(partial(_worker_app, settings, texts), settings)
        config.workers, config.factory = settings.workers, True
        config.timeout_worker_healthcheck = WORKER_SILENCE
        workers = Multiprocess(config, sockets=[listening])
        announce(f"{settings.model} on {address}, {settings.workers} workers of process {os.getpid()}.")
        workers.run()
    if any(process.exitcode == STARTUP_FAILURE for process in workers.processes):
        raise RuntimeError("A worker could not start; it says above what was wrong.")


def _worker_app(settings: ServerSettings, texts: Path | None) -> Any:
    """The application of one worker, which runs in a process of its own."""
    import torch

    from lion_st.serving.app import create_app
    from lion_st.serving.service import Service, log_to_standard_error

    log_to_standard_error()
    torch.set_num_threads(max(1, torch.get_num_threads() // settings.workers))
    try:
        return create_app(Service.open(settings, texts))
    except Exception as error:
        _end_worker(error)


def _end_worker(error: Exception) -> NoReturn:
    from uvicorn.config import STARTUP_FAILURE

    if shows_traceback():
        import traceback

        traceback.print_exception(error)
    print(f"lion-st serve: {describe_error(error)}", file=sys.stderr, flush=True)
    sys.exit(STARTUP_FAILURE)  # with any other code it would be started again, for ever


def _config(app: Any, settings: ServerSettings) -> Any:
    from uvicorn import Config

    return Config(
        app,
        access_log=False,
        http="h11",  # which ends a request whose header is too long; httptools reads on for ever
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=round(settings.timeout + GRACE),
    )


def _bound_socket(host: str, port: int) -> socket.socket:
    """A socket with an address, to which nobody can connect before the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        if os.name != "nt":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise OSError(f"{host}:{port} cannot be listened on ({error}): give another --host or --port.") from error
    bound.set_inheritable(True)
    return bound


def _address(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
