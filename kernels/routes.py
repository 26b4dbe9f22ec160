"""The routes on which a map is walked, each one piece of index arithmetic.

A route is a permutation of the map's L = H·W positions (position = h·W + w): the sigma of Eqs. 8-9.
"""

import torch
from torch import Tensor

ROUTES = ("row", "col", "rowR", "colR")
"""Left to right then top to bottom; the transposed map; and the reverses of the two."""


def route_order(route: str, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Returns the map position that each step of a route visits, int64 of shape (H·W,).

    Raises:
        ValueError: the route is not one of `ROUTES`.
    """
    if route not in ROUTES:
        raise ValueError(f"route {route!r} is unknown; expected one of {', '.join(ROUTES)}")
    step = torch.arange(height * width, device=device)
    if route.endswith("R"):
        step = step.flip(0)
    if route.startswith("col"):
        return (step % height) * width + step // height
    return step


def sequences(sets: tuple[int, ...], carry_state: bool) -> list[tuple[int, ...]]:
    """Groups routes into the sequences that one state runs through.

    With `carry_state`, neighbouring routes that share a weight set are one sequence, the state of one being carried
    over the seam into the next (Eq. 9); without it, each route is a sequence of its own.

    Args:
        sets: the weight set of each route.
        carry_state: whether the state crosses the seams.

    Returns:
        The route numbers of each sequence, in order: `sets=(0, 0, 0)` gives `[(0, 1, 2)]` carried, `[(0,), (1,),
        (2,)]` reset.
    """
    found: list[tuple[int, ...]] = []
    for route, weight_set in enumerate(sets):
        if carry_state and found and sets[found[-1][-1]] == weight_set:
            found[-1] = (*found[-1], route)
        else:
            found.append((route,))
    return found
