"""`union-demo`: a web page that searches a gallery, or the generated world."""

import getpass
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from union_igrot.cli.command import run_command
from union_igrot.cli.config import plain
from union_igrot.errors import ConfigError, require_packages

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from union_igrot.demo.backends import GalleryBackend
    from union_igrot.demo.server import Login

PASSWORD = "UNION_DEMO_PASSWORD"  # the environment variable that holds the password
UNTRAINED = {"image + text": "sum", "image alone": "image"}
"""Baselines that a model is compared with on the generated world, name on the page to kind."""


def demo(config: "DictConfig", _: Path) -> None:
    """Serve the page as configured, until it is stopped."""
    require_packages("the demo", "demo", "starlette", "uvicorn", "jinja2")
    from union_igrot.demo.backends import open_backend
    from union_igrot.demo.controller import DemoController
    from union_igrot.demo.server import make_app
    from union_igrot.service.http import accepted_hosts, listen, serve
    from union_igrot.service.uploads import Limits
    from union_igrot.terminal import print_line

    _check(config)
    login = _login(config.user)
    bound = listen(config.host, config.port)  # first, so that a port in use is reported at once
    indexes = ((config.index, config.checkpoint), (config.second_index, config.second_checkpoint))
    backends = [open_backend(uri, name, config.device) for uri, name in indexes if uri] or _synthetic_backends(config)
    app = make_app(
        DemoController(backends, page=config.page),
        bound=config.waiting,
        hosts=accepted_hosts(config.host, config.name),
        login=login,
        limits=Limits(float(config.megabytes), float(config.megapixels)),
    )

    def ready(address: str) -> None:
        print_line(f"open {address} in a browser; Ctrl-C ends", stderr=True)

    serve(app, bound, ready)


def _check(config: "DictConfig") -> None:
    """Refuse contradictory settings, and an address that others reach without a password."""
    from union_igrot.service.http import is_loopback

    if config.index is None and config.second_index is not None:
        raise ConfigError("second_index needs index=PATH, which it is compared with")
    if config.index is not None and config.second_index is None and config.second_checkpoint is not None:
        raise ConfigError("second_checkpoint needs second_index=PATH: an index made with that model")
    if config.user is not None and (":" in config.user or not config.user.strip()):
        raise ConfigError(f"invalid value for user: {config.user} (expected a name without a colon)")
    if not is_loopback(config.host) and config.user is None:
        raise ConfigError(f"host={config.host} is reachable from other machines; set user=NAME to require a login")


def _login(user: str | None) -> "Login | None":
    """Return the credentials; the password is never on a command line, where others could read it."""
    from union_igrot.demo.server import Login

    if user is None:
        return None
    password = os.environ.get(PASSWORD, "")
    if not password and sys.stdin.isatty():
        password = getpass.getpass(f"password for {user}: ")
    if not password:
        raise ConfigError(f"user={user} needs a password; set {PASSWORD}, or start in a terminal and type it")
    return Login(user, password)


def _synthetic_backends(config: "DictConfig") -> "list[GalleryBackend]":
    """Return the generated world with the model, with a second one if there is one, and with untrained baselines."""
    from union_igrot.demo.backends import SyntheticGallery, model_name
    from union_igrot.experiment import open_extractor
    from union_igrot.gallery.metadata import load_checkpoint
    from union_igrot.models.devices import resolve_device
    from union_igrot.models.model import baseline

    device = resolve_device(config.device)
    gallery = SyntheticGallery()
    first = load_checkpoint(config.checkpoint or "tiny")[0].to(device)
    models = {f"trained: {model_name(first)}": first}
    if config.second_checkpoint is not None:
        second = load_checkpoint(config.second_checkpoint)[0].to(device)
        models[f"second: {model_name(second)}"] = second
    models |= {f"{name}, untrained": baseline(first.backbone, kind) for name, kind in UNTRAINED.items()}
    backends: list[GalleryBackend] = []
    for name, model in models.items():
        features = open_extractor(plain(config), model.backbone)
        with features.store:
            backends.append(gallery.backend(name, model, features))
    return backends


main = partial(run_command, "demo", demo)
if __name__ == "__main__":
    main()
