"""Twenty users of the service at once: lost requests, time per request.

    union-serve index=photos.lance page=false &
    python benchmarks/serve_load.py http://127.0.0.1:7860 --image photo.jpg

Each user asks in turn for a text, an image, an image with a text, the next page of that, and images like the best hit,
without pause; a 503 is tried again after the time that its Retry-After names. $UNION_SERVE_KEY is sent if it is set.
Exits 1 if a request was lost.
"""

import argparse
import asyncio
import base64
import os
import time
from pathlib import Path
from typing import Any

import httpx

TEXTS = ("a red car", "a dog", "two people", "a house at night", "something blue")


async def use(
    number: int, client: httpx.AsyncClient, image: bytes, until: float, seconds: dict[str, list[float]], lost: list[str]
) -> None:
    """Search until the time is over.

    Args:
        number: Number of the user.
        client: The HTTP client.
        image: Content of an image file.
        until: When to stop, as `time.perf_counter`.
        seconds: Time of each request by its kind, to add to.
        lost: Descriptions of failed requests, to add to.
    """
    held = base64.b64encode(image).decode()

    async def ask(kind: str, **body: Any) -> list[str]:
        start = time.perf_counter()
        try:
            response = await client.post("/search", json=body)
            while response.status_code == 503:
                await asyncio.sleep(float(response.headers["Retry-After"]))
                response = await client.post("/search", json=body)
            hits = response.raise_for_status().json()["hits"]
        except (httpx.HTTPError, KeyError, ValueError) as error:
            lost.append(f"user {number}: {kind}: {error!r}")
            return []
        seconds.setdefault(kind, []).append(time.perf_counter() - start)
        if len(hits) != 10:
            lost.append(f"user {number}: {kind}: {len(hits)} hits")
        return [hit["id"] for hit in hits]

    turn = number
    while time.perf_counter() < until:
        text, turn = TEXTS[turn % len(TEXTS)], turn + 1
        best = await ask("text", text=text)
        await ask("image", image=held)
        await ask("image + text", image=held, text=text, thumbnails=True)
        await ask("next page", image=held, text=text, offset=10)
        await ask("liked", liked=best[:1], disliked=best[-1:] if len(best) > 1 else [])


async def load(address: str, users: int, length: float, image: bytes) -> tuple[dict[str, list[float]], list[str]]:
    """Let users search at once; return the time of each request by its kind, and what was lost."""
    seconds: dict[str, list[float]] = {}
    lost: list[str] = []
    key = os.environ.get("UNION_SERVE_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=address, timeout=60, headers=headers) as client:
        until = time.perf_counter() + length
        await asyncio.gather(*(use(number, client, image, until, seconds, lost) for number in range(users)))
    return seconds, lost


def main() -> None:
    """Read the arguments, load the service, print the measurements."""
    parser = argparse.ArgumentParser(description="Twenty users of union-serve at once.")
    parser.add_argument("address", nargs="?", default="http://127.0.0.1:7860")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    try:
        httpx.get(given.address + "/health").raise_for_status()
    except httpx.HTTPError as error:
        parser.exit(2, f"{given.address}: {error}; start union-serve first\n")
    seconds, lost = asyncio.run(load(given.address, given.users, given.seconds, given.image.read_bytes()))
    kinds = {**seconds, "all": [one for some in seconds.values() for one in some]}
    print("| request | number | p50 ms | p95 ms | longest ms |\n| --- | --- | --- | --- | --- |")
    for kind, took in kinds.items():
        p50, p95, most = (1000 * sorted(took)[min(len(took) - 1, int(share * len(took)))] for share in (0.5, 0.95, 1))
        print(f"| {kind} | {len(took):,} | {p50:.0f} | {p95:.0f} | {most:.0f} |")
    rate = len(kinds["all"]) / given.seconds
    print(f"{given.users} users, {given.seconds:g} s: {rate:.1f} requests per second, {len(lost)} lost")
    for line in lost[:10]:
        print(line)
    raise SystemExit(1 if lost else 0)


if __name__ == "__main__":
    main()
