"""Several processes on one store: killed with -9, writing at once, and on a disk that is full.

Each case is a script in a process of its own, which forks: loading torch once serves many kills.
"""

import subprocess
import sys
from pathlib import Path

import pytest

COMMON = """
import os, random, resource, signal, sys, time
from pathlib import Path
import torch
from union_igrot.errors import DataError
from union_igrot.features.store import FeatureStore
from union_igrot.storage.cache import prune
from union_igrot.types import Features

torch.set_num_threads(1)
root = Path(sys.argv[1])

def make(number):
    draw = torch.Generator().manual_seed(number)
    mask = torch.ones(16, 8, dtype=torch.bool)
    return Features(torch.randn(16, 64, generator=draw), torch.randn(16, 8, 64, generator=draw), mask)

def keys(number):
    return [f"{number} {row}" for row in range(16)]

def same(store, number):
    got, made = store.get(keys(number), tokens=True), make(number)
    return torch.equal(got.pooled, made.pooled) and torch.equal(got.tokens, made.tokens)

def fork(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    return child
"""

KILLED = """
from union_igrot.storage.cache import usage
from union_igrot.features.store import map_shard

random.seed(1)
KILLS = 100
acknowledged, pipes = set(), {}

def start(side):
    ours, theirs = os.pipe()

    def work():
        # As an extractor does: what is missing is added, whatever an earlier process left.
        with FeatureStore(root, "f", limit=10**9) as store:
            for number in range(side, 10**6, 2):
                if store.missing(keys(number), tokens=True):
                    store.add(keys(number), make(number))
                os.write(theirs, b"%d\\n" % number)

    child = fork(work)
    os.close(theirs)
    os.set_blocking(ours, False)
    pipes[child] = (side, ours)

def read_pipe(child):
    side, pipe = pipes[child]
    try:
        while written := os.read(pipe, 2**16):
            acknowledged.update(int(line) for line in written.split())
    except BlockingIOError:
        pass

start(0), start(1)
for kill in range(KILLS):
    time.sleep(random.uniform(0.0, 0.05))
    victim = random.choice(list(pipes))
    os.kill(victim, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(victim, 0)[1])
    for child in list(pipes):
        read_pipe(child)  # whole lines: each is one write
    side, pipe = pipes.pop(victim)
    os.close(pipe)
    if kill % 10 == 9:
        assert prune(root, 0) == []  # the other writer has it open
        known = set(acknowledged)
        with FeatureStore(root, "f") as store:
            assert not list(store.folder.glob("*.broken")), "a half-written shard was visible"
            for number in random.sample(sorted(known), min(20, len(known))):
                assert same(store, number), number
            assert not store.missing([key for number in known for key in keys(number)], tokens=True)
    start(side)
for child in list(pipes):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    read_pipe(child)
store = FeatureStore(root, "f")
assert not list(store.folder.glob("*.tmp")) + list(store.folder.glob("*.broken"))
assert all(same(store, number) for number in acknowledged)
held = [bytes(row) for path in store.folder.glob("*.safetensors") for row in map_shard(path)["digests"].numpy()]
assert len(held) == len(set(held)), "something is there twice"
assert len(acknowledged) * 16 <= len(held) <= (len(acknowledged) + KILLS + 2) * 16
assert usage(root)[0].entries == len(held)
print("kills", KILLS, "acknowledged", len(acknowledged), "rows", len(held))
"""

AT_ONCE = """
def work(first):
    store = FeatureStore(root, "f")
    for number in range(first, 60, 3):
        store.add(keys(number), make(number))
        present = [n for n in range(60) if not store.missing(keys(n))]
        assert number in present
        assert all(same(store, n) for n in present[-2:])

watcher = FeatureStore(root, "f")
children = [fork(lambda first=first: work(first)) for first in range(3)]
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
assert all(same(watcher, number) for number in range(60))
assert len(list(watcher.folder.glob("*.safetensors"))) == 60
assert not list(watcher.folder.glob("*.tmp")) + list(watcher.folder.glob("*.broken"))
print("ok")
"""

FULL = """
store = FeatureStore(root, "f")
store.add(keys(0), make(0))
before = sorted(store.folder.iterdir())
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
try:
    store.add(keys(1), make(1))
except DataError as error:
    print(error)
else:
    sys.exit("no error")
assert sorted(store.folder.iterdir()) == before
assert same(store, 0) and store.missing(keys(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.add(keys(1), make(1))
assert same(FeatureStore(root, "f"), 1)
"""


def run(script: str, root: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", COMMON + script, str(root)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing_double_nothing_and_break_nothing(tmp_path):
    words = run(KILLED, tmp_path).split()
    assert int(words[1]) == 100
    assert int(words[3]) > 100


@pytest.mark.slow
def test_three_processes_add_at_once(tmp_path):
    assert run(AT_ONCE, tmp_path) == "ok\n"


@pytest.mark.slow
def test_a_file_that_cannot_grow_is_a_clear_error(tmp_path):
    message = run(FULL, tmp_path)
    assert "no room in" in message
    assert str(tmp_path) in message
    assert "UNION_CACHE" in message
