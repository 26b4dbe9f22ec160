"""Which toggles of MSVMamba can act beside the others; nothing here needs torch, so that tables can ask, too."""


def idle_toggles(full_scans: int, share_half: bool = True, recurrence: bool = True) -> frozenset[str]:
    """The toggles that change nothing of a network.

    Args:
        full_scans: routes at full resolution, of four.
        share_half: whether half routes have one weight set.
        recurrence: whether routes are scanned.
    """
    idle = set()
    if full_scans not in (1, 2):  # no two half routes beside full ones: nothing to share, no seam
        idle |= {"share_half", "carry_state"}
    if not share_half:  # separate weight sets never carry a state
        idle.add("carry_state")
    if not recurrence:  # no states
        idle |= {"d_state", "carry_state", "ssm_weight_decay"}
    if full_scans in (0, 4):  # one branch
        idle.add("separate_norms")
    return frozenset(idle)
