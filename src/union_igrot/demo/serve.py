"""Runs the page's server until it is stopped.

Knows uvicorn and sockets. Does not know what is served.
"""

import errno
import socket
from collections.abc import Callable
from typing import Any, Final

import uvicorn

from union_igrot.demo.server import App
from union_igrot.errors import ConfigError

MAX_CONNECTIONS: Final = 200
"""Connections at once; further ones are refused with status 503."""


def listen(host: str, port: int) -> socket.socket:
    """Take a port.

    Args:
        host: Address of this machine; `127.0.0.1` is reached from this machine alone.
        port: The port, or 0 for any that is free.

    Raises:
        ConfigError: Where it is in use or may not be taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    held = socket.socket(family)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, port))
        held.listen(128)
    except OSError as error:
        held.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} is in use; give another, such as port={port + 1}, or port=0 for any"
            ) from None
        raise ConfigError(
            f"{host}:{port} cannot be listened on ({error.strerror}); give another host or port"
        ) from None
    return held


def serve(app: App, held: socket.socket, ready: Callable[[str], Any]) -> None:
    """Serve until Ctrl-C or a signal to end.

    Args:
        app: What is served.
        held: The port, from `listen`; closed at the end.
        ready: Told the page's address before the first request.
    """
    host, port = held.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # every address of this machine: its name is what others open
        host = socket.gethostname()
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=5,
        server_header=False,
        proxy_headers=False,
    )
    ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    try:
        uvicorn.Server(config).run(sockets=[held])
    except KeyboardInterrupt:  # uvicorn has closed everything and hands the signal on
        pass
    finally:
        held.close()
