"""Runs the server until it is stopped."""

import errno
import socket
from collections.abc import Callable
from typing import Any, Final

import uvicorn

from union_igrot.demo.server import App
from union_igrot.errors import ConfigError

MAX_CONNECTIONS: Final = 200
"""Concurrent connections; further ones are refused with status 503."""


def listen(host: str, port: int) -> socket.socket:
    """Bind and listen on a port.

    Args:
        host: Address to bind; `127.0.0.1` is reachable from this machine only.
        port: The port, or 0 for any free one.

    Raises:
        ConfigError: If it is in use or not permitted.
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
                f"port {port} is in use; use another one, such as port={port + 1}, or port=0 for any free one"
            ) from None
        raise ConfigError(f"cannot bind {host}:{port} ({error.strerror}); use another host or port") from None
    return held


def serve(app: App, held: socket.socket, ready: Callable[[str], Any]) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        app: The application.
        held: The socket from `listen`; closed at the end.
        ready: Called with the URL of the page before the first request.
    """
    host, port = held.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # all interfaces: others use the host name
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
    except KeyboardInterrupt:  # uvicorn has shut down and re-raises the signal
        pass
    finally:
        held.close()
