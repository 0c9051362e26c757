"""Bytes that a kernel moves to and from memory, by the last text in which tensors have shapes."""

import math
import re

_ACCESS = re.compile(r"tt\.(load|store)\b.*: (?:tensor<((?:\d+x)*))?!tt\.ptr<[a-z]+(\d+)")
_PRODUCT = re.compile(r"(?:tt\.|ttng\.)(?:dot|warp_group_dot|tc_gen5_mma)\b")


def loops(text: str) -> list[dict[str, int]]:
    """Of each loop that has none within, in order: "load", "store" and "products".

    Bytes of a turn, if no mask keeps any of them, and the number of matrix products. What a
    condition decides counts too.

    Args:
        text: a kernel in Triton's dialect for GPUs, "ttgir".
    """
    found, open_ones = [], []  # of what is open: how deep it lies, and what is counted in it
    depth = 0
    for line in text.splitlines():
        if open_ones:
            own = open_ones[-1][1]
            if access := _ACCESS.search(line):
                kind, sizes, bits = access.groups()
                count = math.prod(map(int, (sizes or "").split("x")[:-1]))
                own[kind] += count * int(bits) // 8
            own["products"] += bool(_PRODUCT.search(line))
        begins = re.search(r"\bscf\.(?:while|for)\b", line)
        if begins:
            open_ones.append((depth, {"load": 0, "store": 0, "products": 0}))
            if len(open_ones) > 1:
                open_ones[-2][1]["inner"] = 1
        depth += line.count("{") - line.count("}")
        if open_ones and not begins and depth <= open_ones[-1][0]:
            _, own = open_ones.pop()
            if not own.pop("inner", 0):
                found.append(own)
    return found
