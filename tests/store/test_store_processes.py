"""Several processes on one store: killed with -9, writing at once, and on a disk that is full.

Each case is a script in a process of its own, which forks: loading torch once serves many kills.
"""

import subprocess
import sys
from pathlib import Path

COMMON = """
import os, random, resource, signal, sys, time
from pathlib import Path
import torch
from union_igrot.errors import DataError
from union_igrot.store.features import FeatureStore
from union_igrot.store.space import prune
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
random.seed(0)
start = time.perf_counter()
with FeatureStore(root, "pace") as store:
    store.add(keys(0), make(0))
pace = time.perf_counter() - start  # how long opening and one addition take on this disk
acknowledged, kills, swept, next_number = set(), 0, 0, 0
for trial in range(30):
    ours, theirs = os.pipe()

    def work():
        store, number = FeatureStore(root, "f"), next_number
        while True:
            store.add(keys(number), make(number))
            os.write(theirs, b"%d\\n" % number)
            number += 1

    child = fork(work)
    os.close(theirs)
    pipe = open(ours)
    for _ in range(trial % 3 if trial else 1):
        acknowledged.add(int(pipe.readline()))
    if trial == 0:
        assert [entry.fingerprint for entry in prune(root, 0)] == ["pace"]  # a living process has the other open
    time.sleep(random.uniform(0.0, pace))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status), status
    kills += 1
    with pipe:
        acknowledged |= {int(line) for line in pipe}
    swept += len(list(root.glob("features/f/*.tmp")))
    store = FeatureStore(root, "f")
    assert not list(store.folder.glob("*.tmp")), "leftovers"
    assert not list(store.folder.glob("*.broken")), "a half-written shard was visible"
    for number in acknowledged:
        assert not store.missing(keys(number), tokens=True), number
    present = [n for n in range(max(acknowledged, default=-1) + 2) if not store.missing(keys(n))]
    assert len(present) - len(acknowledged) <= kills  # at most the last of each writer was not yet acknowledged
    assert all(same(store, number) for number in present[-5:])
    next_number = max(present, default=-1) + 1
    store.close()
store = FeatureStore(root, "f")
assert all(same(store, number) for number in acknowledged)
store.close()
assert len(prune(root, 0)) == 1  # the dead hold no lock
print("kills", kills, "acknowledged", len(acknowledged), "swept", swept)
"""

AT_ONCE = """
def work(first):
    store = FeatureStore(root, "f")
    for number in range(first, 60, 3):
        store.add(keys(number), make(number))
        seen = [n for n in range(60) if not store.missing(keys(n))]
        assert number in seen
        assert all(same(store, n) for n in seen[-2:])

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


def test_killed_at_any_moment_nothing_acknowledged_is_lost(tmp_path):
    words = run(KILLED, tmp_path).split()
    assert int(words[1]) >= 30
    assert int(words[3]) >= 20


def test_three_processes_add_at_once(tmp_path):
    assert run(AT_ONCE, tmp_path) == "ok\n"


def test_a_file_that_cannot_grow_is_a_clear_error(tmp_path):
    message = run(FULL, tmp_path)
    assert "no room in" in message
    assert str(tmp_path) in message
    assert "UNION_CACHE" in message
