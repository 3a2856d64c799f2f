"""Twenty users of the demo at once: lost steps, mixed-up histories, time per step.

    union-demo &
    python benchmarks/demo_load.py http://127.0.0.1:7860

Each user draws, searches, turns a page, picks a result, refines and goes back, over HTTP as the page does. Every text
names its user, so that a history shows whose it is. A step that the server refuses because too many wait is tried again
a second later. Exits 1 if a step was lost or a history was another user's.
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
    """Measurements of all users.

    Attributes:
        seconds: Time of each step.
        lost: Steps without a response, or with a problem.
        mixed: Histories that were another user's.
        busy: Responses that asked to try again.
    """

    seconds: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    busy: int = 0


class User:
    """One user with a session and the texts of its searches.

    Args:
        number: Number of the user.
        client: The HTTP client.
        seen: Measurements of all users.
    """

    def __init__(self, number: int, client: httpx.AsyncClient, seen: Seen) -> None:
        self.number, self.client, self.seen = number, client, seen
        self.token, self.texts = "new", list[str]()
        self.history = ""

    async def step(self, action: str, **given: object) -> dict[str, Any] | None:
        """Perform a step and check that the history is this user's."""
        start = time.perf_counter()
        try:
            shown = await self._post(action, given)
            while "is busy" in shown.get("problem", ""):
                self.seen.busy += 1
                await asyncio.sleep(1)
                shown = await self._post(action, given)
        except (httpx.HTTPError, ValueError) as error:
            self.seen.lost.append(f"user {self.number}: {action}: {error!r}")
            return None
        self.seen.seconds.append(time.perf_counter() - start)
        if "problem" in shown:
            self.seen.lost.append(f"user {self.number}: {action}: {shown['problem']}")
            return None
        self.token = shown["token"]
        if shown["history"] is not None:  # sent if it has changed
            self.history = shown["history"]
        found = re.findall("\u201c(.*?)\u201d", html.unescape(self.history))
        if found != self.texts[-len(found) :] if found else self.texts:
            self.seen.mixed.append(f"user {self.number} searched {self.texts} and is shown {found}")
        return shown

    async def _post(self, action: str, given: object) -> dict[str, Any]:
        sent, headers = {"action": action, "given": given}, {"X-Session": self.token}
        shown: dict[str, Any] = (await self.client.post("/act", json=sent, headers=headers)).raise_for_status().json()
        return shown

    async def walk(self, until: float, steps: int) -> None:
        """Search and refine until the time is over, or all users together have made some steps."""
        dice = random.Random(self.number)
        while time.perf_counter() < until and len(self.seen.seconds) < steps:
            strokes = [[[x, min(1000, y + dice.randrange(100))] for x, y in stroke] for stroke in STAR]
            await self._search(strokes)
            await self.step("page", page=1)
            shown = await self.step("page", page=0)
            for _ in range(2):
                if shown is None:
                    break
                ids = re.findall(r'class="pick".*?"id": "([^"]+)"', html.unescape(shown["results"]))
                await self.step("pick", backend=0, id=dice.choice(ids))
                shown = await self._search([])
            if len(self.texts) > 30:
                self.texts.clear()
                await self.step("restart")

    async def _search(self, strokes: list[list[list[int]]]) -> dict[str, Any] | None:
        text = f"{random.choice(CHANGES)}, says {self.number}"
        self.texts.append(text)
        shown = await self.step("search", text=text, strokes=strokes)
        if shown is None:
            self.texts.pop()
        return shown


async def load(address: str, users: int, seconds: float, steps: int) -> Seen:
    """Let users use the demo at once."""
    seen = Seen()
    limits = httpx.Limits(max_connections=users, max_keepalive_connections=users)
    async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:
        until = time.perf_counter() + seconds
        await asyncio.gather(*(User(number, client, seen).walk(until, steps) for number in range(users)))
    return seen


def main() -> None:
    """Read the arguments, load the demo, print the measurements."""
    parser = argparse.ArgumentParser(description="Twenty users of union-demo at once.")
    parser.add_argument("address", nargs="?", default="http://127.0.0.1:7860")
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=10**9, help="steps of all users, after which they stop earlier")
    given = parser.parse_args()
    try:
        httpx.get(given.address).raise_for_status()
    except httpx.HTTPError as error:
        parser.exit(2, f"{given.address}: {error}; start union-demo first\n")
    start = time.perf_counter()
    seen = asyncio.run(load(given.address, given.users, given.seconds, given.steps))
    seconds = time.perf_counter() - start
    took = sorted(seen.seconds)
    at = {name: took[min(len(took) - 1, int(share * len(took)))] for name, share in (("p50", 0.5), ("p95", 0.95))}
    print(f"{given.users} users, {seconds:.0f} s: {len(took):,} steps, {len(took) / seconds:.1f} per second")
    print(f"p50 {at['p50'] * 1000:.0f} ms, p95 {at['p95'] * 1000:.0f} ms, longest {took[-1] * 1000:.0f} ms")
    print(f"{len(seen.lost)} lost, {len(seen.mixed)} histories mixed up, {seen.busy} refused and tried again")
    for line in [*seen.lost, *seen.mixed][:10]:
        print(line)
    raise SystemExit(1 if seen.lost or seen.mixed else 0)


if __name__ == "__main__":
    main()
