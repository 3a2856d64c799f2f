"""Tests, checks and the build, each in one command: `nox -s tests`, `nox -s lint types build`.

All sessions but `lint` share one environment, because torch alone takes gigabytes.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2024.10"
nox.options.sessions = ["tests", "slow", "browser", "lint", "types", "build", "docs"]
nox.options.default_venv_backend = "virtualenv"

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml("pyproject.toml")
SHARED = ROOT / ".nox" / "shared"
# One thread for each of two workers, for two cores.
TESTING = {"OMP_NUM_THREADS": "1"}
SCRIPTS = "Scripts" if sys.platform == "win32" else "bin"


INSTALLED: set[str] = set()
"""Extras of the package, and "", that this run of nox has installed."""


def environment(session: nox.Session, *groups: str, extras: tuple[str, ...] = ()) -> Path:
    """Update the shared environment with the package, extras and groups; return its folder of commands."""
    python = SHARED / SCRIPTS / "python"
    if not python.exists():
        session.run(sys.executable, "-m", "virtualenv", "--quiet", SHARED, external=True)
    needed = nox.project.dependency_groups(PROJECT, *groups)
    wanted = {"", *extras} - INSTALLED
    # pip builds the package anew each time that it is named.
    package = [] if not wanted else ["."] if wanted == {""} else [f".[{','.join(sorted(wanted - {''}))}]"]
    session.run(python, "-m", "pip", "install", "--quiet", *package, *needed, external=True)
    INSTALLED.update(wanted)
    return python.parent


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run the tests; further arguments go to pytest."""
    commands = environment(session, "test", extras=("gallery",))
    chosen = session.posargs or ["--numprocesses=2", "--dist=worksteal"]
    session.run(commands / "python", "-m", "pytest", *chosen, env=TESTING, external=True)


@nox.session(venv_backend="none")
def coverage(session: nox.Session) -> None:
    """Run the tests, the slow ones too, and report uncovered lines; takes about 25 minutes."""
    commands = environment(session, "test", extras=("gallery",))
    chosen = ["-m", "not browser", "--numprocesses=2", "--dist=worksteal", "--cov", "--cov-report=term:skip-covered"]
    chosen += session.posargs
    session.run(commands / "python", "-m", "pytest", *chosen, env=TESTING, external=True)


@nox.session(venv_backend="none")
def slow(session: nox.Session) -> None:
    """Run the tests that are marked slow."""
    commands = environment(session, "test", extras=("gallery",))
    chosen = ["-m", "slow", "--numprocesses=2", "--dist=worksteal", *session.posargs]
    session.run(commands / "python", "-m", "pytest", *chosen, env=TESTING, external=True)


@nox.session(venv_backend="none")
def browser(session: nox.Session) -> None:
    """Test the demo's page in headless Chromium, which is installed on Debian if it is missing."""
    commands = environment(session, "test", "browser", extras=("gallery", "demo"))
    if not any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")):
        if shutil.which("apt-get") is None or os.geteuid() != 0:
            session.error("Chromium is not installed; on Debian: apt-get install chromium")
        session.run("apt-get", "update", external=True, silent=True)
        session.run("apt-get", "install", "--yes", "--no-install-recommends", "chromium", external=True, silent=True)
    chosen = ["-m", "browser", "tests/browser", *session.posargs]
    session.run(commands / "python", "-m", "pytest", *chosen, env=TESTING, external=True)


MILVUS = """
import sys
from milvus import MilvusServer
server = MilvusServer(data_dir=sys.argv[1])
server.start()
print(server.listen_port, flush=True)
sys.stdin.read()
server.stop()
"""


@nox.session(reuse_venv=True)
def milvus(session: nox.Session) -> None:
    """Run the engine tests on a Milvus server, started on a free port and stopped afterwards."""
    session.install("milvus==2.3.5")  # the last release with the server; x86-64 Linux and macOS
    commands = environment(session, "test", extras=("gallery", "milvus"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        started = [Path(session.bin) / "python", "-c", MILVUS, folder]
        with subprocess.Popen(started, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            port = server.stdout.readline().strip()
            if not port:
                session.error(f"the Milvus server did not start; see above and {folder}/logs")
            chosen = session.posargs or ["tests/gallery", "tests/cli/test_far_galleries.py", "-k", "milvus"]
            where = {"UNION_MILVUS": f"milvus://127.0.0.1:{port}", "OMP_NUM_THREADS": "1"}
            try:
                session.run(commands / "python", "-m", "pytest", *chosen, env=where, external=True)
            finally:
                server.stdin.close()  # stops it


BUCKET = """
import sys
import boto3
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(port=0)
server.start()
_, port = server.get_host_and_port()
boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1").create_bucket(Bucket="photos")
print(port, flush=True)
sys.stdin.read()
server.stop()
"""


@nox.session(reuse_venv=True)
def objectstore(session: nox.Session) -> None:
    """Run the engine tests on an S3 server, started on a free port and stopped afterwards."""
    session.install("moto[server,s3]>=5.1")  # supports conditional writes, which Lance's commits need
    commands = environment(session, "test", extras=("gallery",))
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_REGION": "us-east-1"}
    started = [Path(session.bin) / "python", "-c", BUCKET]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(started, env={**os.environ, **keys}, **pipes) as server:
        port = next((line.strip() for line in server.stdout if line.strip().isdecimal()), None)
        if port is None:
            session.error("the object store did not start; try: python -m moto.server")
        chosen = session.posargs or ["tests/gallery/engines", "tests/cli/test_far_galleries.py", "-k", "bucket"]
        where = {"AWS_ENDPOINT": f"http://127.0.0.1:{port}", "AWS_ALLOW_HTTP": "true", "UNION_BUCKET": "s3://photos"}
        try:
            session.run(
                commands / "python",
                "-m",
                "pytest",
                *chosen,
                env={**keys, **where, "OMP_NUM_THREADS": "1"},
                external=True,
            )
        finally:
            server.stdin.close()  # stops it


@nox.session(reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Check format, names, annotations, docstrings and complexity."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Check the types of the package, strictly."""
    commands = environment(session, "types")
    session.run(commands / "python", "-m", "mypy", external=True)


@nox.session(venv_backend="none")
def build(session: nox.Session) -> None:
    """Build the sdist, and the wheel from it; check both; install the wheel in a clean environment and use it."""
    commands = environment(session, "build")
    place = Path(session.create_tmp()).resolve()
    for old in [*place.glob("*.tar.gz"), *place.glob("*.whl")]:
        old.unlink()
    # Without --wheel or --sdist the wheel is built from the sdist.
    session.run(commands / "python", "-m", "build", "--outdir", place, external=True, silent=True)
    (sdist,), (wheel,) = place.glob("*.tar.gz"), place.glob("*.whl")
    check_archives(session, sdist, wheel)

    clean = place / "clean"
    session.run(sys.executable, "-m", "virtualenv", "--quiet", "--clear", clean, external=True)
    own = clean / SCRIPTS
    session.run(own / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel, external=True)
    # Dependencies come from the shared environment.
    (here,), (there,) = clean.glob("**/site-packages"), SHARED.glob("**/site-packages")
    (here / "dependencies.pth").write_text(f"{there}\n")
    installed = here / "union_igrot" / "conf"
    yamls = {path.relative_to(ROOT / "conf"): path.read_bytes() for path in (ROOT / "conf").rglob("*.yaml")}
    if yamls != {path.relative_to(installed): path.read_bytes() for path in installed.rglob("*.yaml")}:
        session.error("the installed configurations are not those of conf/")
    found = session.run(
        own / "python",
        "-c",
        "import union_igrot.cli.config as c; print(c.conf_dir())",
        external=True,
        silent=True,
        env={"PYTHONPATH": ""},
    )
    if not isinstance(found, str) or Path(found.strip()).resolve() != installed.resolve():
        session.error(f"the installed package reads {found}, not {installed}")
    with session.chdir(place):
        session.run(own / "union-train", "--help", external=True)
        session.run(own / "union-eval", "--help", external=True, silent=True)
        session.run(own / "python", "-c", "import union_igrot; union_igrot.load('tiny')", external=True)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Build the documentation into docs/_build; a broken link or a missing page is an error."""
    commands = environment(session, "docs", extras=("gallery", "serve"))
    place = ROOT / "docs"
    chosen = ["--fail-on-warning", "--keep-going", "--quiet", place, place / "_build"]
    session.run(commands / "python", "-m", "sphinx", *chosen, external=True)


def check_archives(session: nox.Session, sdist: Path, wheel: Path) -> None:
    """Check that sdist and wheel contain the package, its weights and its configurations."""
    source = ROOT / "src" / "union_igrot"
    package = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    conf = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "conf").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    missing = {f"union_igrot/{name}" for name in package | conf} - shipped
    missing |= {
        f"union_igrot/{name}" for name in ("py.typed", "weights/tiny/backbone.safetensors", "conf/__init__.py")
    } - shipped
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    missing |= {f"src/union_igrot/{name}" for name in package} - packed
    missing |= ({"pyproject.toml", "README.md", "LICENSE", "noxfile.py", "tests/conftest.py"} | conf) - packed
    if missing:
        session.error(f"missing from the built archives: {', '.join(sorted(missing))}")
    if foreign := {name for name in shipped if not name.startswith(("union_igrot/", "union_igrot-"))}:
        session.error(f"files in the wheel that are not of the package: {', '.join(sorted(foreign))}")
