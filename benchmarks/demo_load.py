"""Twenty users of the demo at once: what is lost, what is mixed up, how long a step takes.

    union-demo &
    python benchmarks/demo_load.py http://127.0.0.1:7860

Each user draws, searches, turns a page, picks an answer, refines and takes a step back, one step after
the other, over HTTP as the page does it. Every sentence names its user, so that a history shows whose
it is. Ends with code 1 where a step was lost or a history was not its user's.
"""

import argparse
import asyncio
import html
import random
import re
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

STAR = [[[500, 200], [690, 780], [200, 420], [800, 420], [310, 780], [500, 200]]]
CHANGES = ("make it red", "make it larger", "put it on sand", "without the circle", "in blue")


@dataclass
class Seen:
    """What the users saw together.

    Attributes:
        seconds: How long each step took.
        lost: Steps without an answer, or answered with a problem.
        mixed: Histories that were not their user's.
    """

    seconds: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)


class User:
    """One user with a session and a list of what was asked.

    Args:
        number: Who it is.
        client: Asks.
        seen: Where to note what happens.
    """

    def __init__(self, number: int, client: httpx.AsyncClient, seen: Seen) -> None:
        self.number, self.client, self.seen = number, client, seen
        self.token, self.said = "new", list[str]()
        self.history = ""

    async def step(self, action: str, **given: object) -> dict[str, Any] | None:
        """Take a step and look whether the history is one's own."""
        start = time.perf_counter()
        try:
            answer = await self.client.post(
                "/act", json={"action": action, "given": given}, headers={"X-Session": self.token}
            )
            shown: dict[str, Any] = answer.raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            self.seen.lost.append(f"user {self.number}: {action}: {error!r}")
            return None
        self.seen.seconds.append(time.perf_counter() - start)
        if "problem" in shown:
            self.seen.lost.append(f"user {self.number}: {action}: {shown['problem']}")
            return None
        self.token = shown["token"]
        if shown["history"] is not None:  # it is sent where it has changed
            self.history = shown["history"]
        told = re.findall("\u201c(.*?)\u201d", html.unescape(self.history))
        if told != self.said[-len(told) :] if told else self.said:
            self.seen.mixed.append(f"user {self.number} said {self.said} and is shown {told}")
        return shown

    async def walk(self, until: float) -> None:
        """Search and refine until the time is over."""
        dice = random.Random(self.number)
        while time.perf_counter() < until:
            strokes = [[[x, min(1000, y + dice.randrange(100))] for x, y in stroke] for stroke in STAR]
            await self._ask(strokes)
            await self.step("page", page=1)
            shown = await self.step("page", page=0)
            for _ in range(2):
                if shown is None:
                    break
                ids = re.findall(r'class="pick".*?"id": "([^"]+)"', html.unescape(shown["results"]))
                await self.step("pick", engine=0, id=dice.choice(ids))
                shown = await self._ask([])
            if len(self.said) > 30:
                self.said.clear()
                await self.step("restart")

    async def _ask(self, strokes: list[list[list[int]]]) -> dict[str, Any] | None:
        text = f"{random.choice(CHANGES)}, says {self.number}"
        self.said.append(text)
        shown = await self.step("search", text=text, strokes=strokes)
        if shown is None:
            self.said.pop()
        return shown


async def load(address: str, users: int, seconds: float) -> Seen:
    """Let users use the demo at once."""
    seen = Seen()
    limits = httpx.Limits(max_connections=users, max_keepalive_connections=users)
    async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:
        until = time.perf_counter() + seconds
        await asyncio.gather(*(User(number, client, seen).walk(until) for number in range(users)))
    return seen


def main() -> None:
    """Read the arguments, load the demo, print what was seen."""
    parser = argparse.ArgumentParser(description="Twenty users of union-demo at once.")
    parser.add_argument("address", nargs="?", default="http://127.0.0.1:7860")
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    seen = asyncio.run(load(given.address, given.users, given.seconds))
    took = sorted(seen.seconds)
    at = {name: took[min(len(took) - 1, int(share * len(took)))] for name, share in (("p50", 0.5), ("p95", 0.95))}
    print(f"{given.users} users, {given.seconds:g} s: {len(took):,} steps, {len(took) / given.seconds:.1f} a second")
    print(f"p50 {at['p50'] * 1000:.0f} ms, p95 {at['p95'] * 1000:.0f} ms, longest {took[-1] * 1000:.0f} ms")
    print(f"{len(seen.lost)} lost, {len(seen.mixed)} histories mixed up")
    for line in [*seen.lost, *seen.mixed][:10]:
        print(line)
    raise SystemExit(1 if seen.lost or seen.mixed else 0)


if __name__ == "__main__":
    main()
