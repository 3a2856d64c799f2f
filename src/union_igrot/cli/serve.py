"""`union-serve`: searches and embeddings of a gallery over HTTP, or for an assistant."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from union_igrot.cli.command import run_command
from union_igrot.errors import ConfigError, require_packages
from union_igrot.storage.files import expand_user

if TYPE_CHECKING:
    from omegaconf import DictConfig

KEY = "UNION_SERVE_KEY"  # the environment variable that holds the API key
_SHORTEST_KEY = 16


def serve_gallery(config: "DictConfig", _: Path) -> None:
    """Serve the gallery as configured, until it is stopped."""
    extra, needed = ("mcp", ("mcp",)) if config.mcp else ("serve", ("starlette", "uvicorn", "pydantic", "jinja2"))
    require_packages("union-serve", extra, *needed)
    from union_igrot.demo.backends import open_gallery

    if config.mcp:
        from union_igrot.service.assistant import make_assistant_server

        make_assistant_server(open_gallery(config.index, config.checkpoint, config.device)).run("stdio")
        return
    from union_igrot.demo.backends import GalleryBackend
    from union_igrot.demo.controller import DemoController
    from union_igrot.demo.server import Routes
    from union_igrot.service import http
    from union_igrot.service.api import KeyGate, ServiceRoutes
    from union_igrot.service.uploads import Limits
    from union_igrot.terminal import print_line

    key = _key(config.key_file)
    if key is None and not http.is_loopback(config.host):
        raise ConfigError(f"host={config.host} is reachable from other machines; set {KEY} or key_file=FILE")
    bound = http.listen(config.host, config.port)  # first, so that a port in use is reported at once
    gallery = open_gallery(config.index, config.checkpoint, config.device)
    queue = http.RequestQueue(config.waiting)
    uploads = http.UploadQueue(Limits(float(config.megabytes), float(config.megapixels)))
    routes = ServiceRoutes(gallery, queue, uploads).routes()
    if config.page:
        routes += Routes(DemoController([GalleryBackend(gallery, Path(gallery.uri).name)]), queue, uploads).routes()
    hosts = http.accepted_hosts(config.host, config.name)
    app = http.make_application(routes, hosts, None if key is None else KeyGate(key))
    http.serve(app, bound, lambda address: print_line(f"serving {address}; Ctrl-C ends", stderr=True))


def _key(file: str | None) -> str | None:
    """Return the API key; it is never on a command line, where others could read it."""
    if file is None and KEY not in os.environ:
        return None
    try:
        key = os.environ[KEY] if file is None else expand_user(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read key_file={file} ({type(error).__name__}); name a file with the API key"
        ) from error
    if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        where = KEY if file is None else f"key_file={file}"
        raise ConfigError(f"{where} holds no usable key (expected at least {_SHORTEST_KEY} ASCII letters or digits)")
    return key


main = partial(run_command, "serve", serve_gallery)
if __name__ == "__main__":
    main()
