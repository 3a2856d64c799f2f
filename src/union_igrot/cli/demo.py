"""`union-demo`: a web page over a gallery, or over the generated world.

Knows the order of the steps and where the password comes from. Does not know the page.
"""

import getpass
import importlib.util
import ipaddress
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from union_igrot.cli.command import run_command
from union_igrot.cli.config import plain
from union_igrot.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from union_igrot.demo.backends import SearchBackend
    from union_igrot.demo.server import Login
    from union_igrot.demo.synthetic_gallery import SyntheticGallery
    from union_igrot.models.model import IGROTModel

PASSWORD = "UNION_DEMO_PASSWORD"
"""The environment variable that holds the password."""
UNTRAINED = {"image + text": "sum", "image alone": "image"}
"""What a trained model is compared with on the generated world, and the baseline that it is."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run `union-demo`."""
    run_command("demo", demo, argv)


def demo(config: "DictConfig", fresh: Path) -> None:
    """Serve the page as configured, until it is stopped."""
    del fresh
    missing = [name for name in ("starlette", "uvicorn", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'the demo needs {", ".join(missing)}; pip install "union-igrot[demo]"')
    # Heavy parts are imported here: --help and mistakes in the configuration answer at once.
    from union_igrot.demo.controller import DemoController
    from union_igrot.demo.serve import listen, serve
    from union_igrot.demo.server import LOOPBACK, make_app
    from union_igrot.demo.uploads import Limits
    from union_igrot.terminal import print_line

    _check(config)
    login = _login(config.user)
    held = listen(config.host, config.port)  # before the long work: a port in use is told at once
    engines = _world(config) if config.index is None else _galleries(config)
    controller = DemoController(
        engines, page=config.page, limits=Limits(float(config.megabytes), float(config.megapixels))
    )
    # A name that another site points at this machine is no way in; on an open address any name may be this machine's.
    names = [*LOOPBACK, config.host, *([config.name] if config.name else [])] if _own(config.host) else None
    app = make_app(controller, bound=config.waiting, hosts=names and list(dict.fromkeys(names)), login=login)

    def ready(address: str) -> None:
        print_line(f"open {address} in a browser; Ctrl-C ends", stderr=True)

    serve(app, held, ready)


def _check(config: "DictConfig") -> None:
    """Refuse what contradicts itself, or is open to others without a password."""
    if config.index is None and config.second_index is not None:
        raise ConfigError("second_index is compared with index; give index=PATH too")
    if config.index is not None and config.second_index is None and config.second_checkpoint is not None:
        raise ConfigError("an index belongs to one model; index the images with the other one, give second_index=PATH")
    if config.user is not None and (":" in config.user or not config.user.strip()):
        raise ConfigError(f"user={config.user} is not allowed; give a name without a colon")
    if not _own(config.host) and config.user is None:
        raise ConfigError(f"host={config.host} lets in whoever reaches this machine; give user=NAME too, who logs in")


def _own(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _login(user: str | None) -> "Login | None":
    """Give who may log in; the password never stands on a command line, where others could read it."""
    from union_igrot.demo.server import Login

    if user is None:
        return None
    password = os.environ.get(PASSWORD, "")
    if not password and sys.stdin.isatty():
        password = getpass.getpass(f"password for {user}: ")
    if not password:
        raise ConfigError(f"user={user} needs a password; set {PASSWORD}, or start in a terminal and type it")
    return Login(user, password)


def _galleries(config: "DictConfig") -> "list[SearchBackend]":
    from union_igrot.demo.gallery_backend import open_backend

    engines: list[SearchBackend] = [open_backend(config.index, config.checkpoint, config.device)]
    if config.second_index is not None:
        engines.append(open_backend(config.second_index, config.second_checkpoint, config.device))
    return engines


def _world(config: "DictConfig") -> "list[SearchBackend]":
    """Give the generated world under the model, under a second one where wanted, and under its untrained baselines."""
    from union_igrot.demo.backends import heads_name
    from union_igrot.demo.synthetic_gallery import SyntheticGallery
    from union_igrot.gallery.metadata import load_checkpoint
    from union_igrot.models.devices import resolve_device
    from union_igrot.models.model import baseline

    device = resolve_device(config.device)
    world = SyntheticGallery()
    first = load_checkpoint(config.checkpoint or "tiny")[0].to(device)
    models = {f"trained: {heads_name(first)}": first}
    if config.second_checkpoint is not None:
        second = load_checkpoint(config.second_checkpoint)[0].to(device)
        models[f"second: {heads_name(second)}"] = second
    models |= {f"{name}, untrained": baseline(first.backbone, kind) for name, kind in UNTRAINED.items()}
    return [_engine(config, world, name, model) for name, model in models.items()]


def _engine(config: "DictConfig", world: "SyntheticGallery", name: str, model: "IGROTModel") -> "SearchBackend":
    from union_igrot.experiment import open_extractor

    filling = open_extractor(plain(config), model.backbone)
    with filling.store:
        return world.engine(name, model, filling)


if __name__ == "__main__":
    main()
