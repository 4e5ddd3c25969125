"""Paths through the machine code of a kernel, to count the instructions that a thread executes on the way."""

import heapq
import re
from collections.abc import Mapping


def blocks_of(listing: str) -> tuple[list[list[str]], list[list[int]]]:
    """The basic blocks of a function in a listing of cuobjdump, and the blocks that may follow each of them."""
    code = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;", listing)]
    index = {address: i for i, (address, _) in enumerate(code)}
    following: list[list[int]] = []
    starts = {0}
    for i, (_, text) in enumerate(code):
        jump = re.match(r"(@\S+ )?BRA(\S*) (.*)", text)
        ends = re.match(r"(EXIT|RET)", text)
        following.append([] if ends else [i + 1])
        if jump and (target := re.search(r"0x([0-9a-f]+)", jump[3])):
            falls_through = jump[1] or "DIV" in jump[2] or re.match(r"!?U?P\d", jump[3])
            following[i] = [*([i + 1] if falls_through else []), index[int(target[1], 16)]]
            starts.add(following[i][-1])
        if jump or ends:
            starts.add(i + 1)
    firsts = sorted(i for i in starts if i < len(code))
    numbers = {first: number for number, first in enumerate(firsts)}
    limits = [*firsts[1:], len(code)]
    blocks = [[text for _, text in code[first:end]] for first, end in zip(firsts, limits, strict=True)]
    after = [[numbers[i] for i in following[end - 1] if i in numbers] for end in limits]
    return blocks, after


def shortest(listing: str, start: str, starts: int, need: Mapping[str, int], avoid: str) -> list[str]:
    """The instructions of the shortest path that begins in the first block with `starts` or more instructions like
    `start`, and that has `need[x]` instructions like x or more, for each pattern x. No block with an instruction like
    `avoid` is on it. Without such a path, this is empty."""
    blocks, after = blocks_of(listing)

    def hits(pattern: str, block: list[str]) -> int:
        return sum(bool(re.search(pattern, text)) for text in block)

    goal = tuple(need.values())
    found = [tuple(hits(pattern, block) for pattern in need) for block in blocks]
    avoided = [hits(avoid, block) > 0 for block in blocks]
    first = next((i for i, block in enumerate(blocks) if hits(start, block) >= starts), None)
    if first is None:
        return []
    queue = [(0, first, tuple(0 for _ in goal), (first,))]
    done = set()
    while queue:
        length, block, had, path = heapq.heappop(queue)
        if (block, had) in done:
            continue
        done.add((block, had))
        has = tuple(min(a, b + c) for a, b, c in zip(goal, had, found[block], strict=True))
        if has == goal:
            return [text for i in path for text in blocks[i]]
        for other in after[block]:
            if not avoided[other]:
                heapq.heappush(queue, (length + len(blocks[block]), other, has, (*path, other)))
    return []
