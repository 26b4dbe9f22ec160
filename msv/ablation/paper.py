"""The paper's own numbers (arXiv 2405.14174), for columns of their own beside what is measured here.

Params are in millions, FLOPs in 10^9 of the paper's convention at 1x3x224x224, top-1 in percent on ImageNet-1K.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PaperRow:
    """A row of Tables 4 and 5: an ablation, trained for 100 epochs on ImageNet-1K.

    Args:
        name: the row as the paper's table calls it.
        tables: the paper's tables in which the row stands.
        params_m: parameters in millions, as printed.
        gflops: FLOPs in 10^9, as printed.
        top1: top-1 accuracy in percent.
    """

    name: str
    tables: tuple[str, ...]
    params_m: float
    gflops: float
    top1: float


@dataclass(frozen=True)
class ComparisonRow:
    """A row of Table 1: a model trained for 300 epochs on ImageNet-1K.

    Args:
        name: the method.
        params_m: parameters in millions, as printed (rounded to the million).
        gflops: FLOPs in 10^9, as printed.
        top1: top-1 accuracy in percent.
        preset: the preset of this package that is the same network, if there is one.
        note: what a reader of the printed numbers has to know.
    """

    name: str
    params_m: float
    gflops: float
    top1: float
    preset: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Printed:
    """Parameters and FLOPs to the digits that the paper prints.

    Args:
        params_m: parameters in millions, as text.
        gflops: FLOPs in 10^9, as text.
        tables: the tables in which it stands.
        row: what they call the row; nothing where a table has the models as columns.
        note: what a reader of the numbers has to know.
    """

    params_m: str
    gflops: str
    tables: tuple[str, ...]
    row: str = ""
    note: str = ""

    @property
    def source(self) -> str:
        """Where it stands: the tables, and the row as they call it."""
        return ": ".join(filter(None, [", ".join(self.tables), self.row]))

    def params_alike(self, params: int) -> bool:
        """Whether a count of parameters rounds to what is printed."""
        return _rounds_to(params / 1e6, self.params_m)

    def flops_alike(self, flops: int) -> bool:
        """Whether a count of FLOPs, in the paper's convention, rounds to what is printed."""
        return _rounds_to(flops / 1e9, self.gflops)


CONFOUNDED = {
    "ablate_components": "the depths change with the component; `controls_components` has each at equal depth",
    "ablate_scans": "weight sets and parameters change with the split; see `controls_scans`",
}
"""Grids of the paper's rows: what changes in them beside what they ask about."""

TABLE_1: tuple[ComparisonRow, ...] = (
    ComparisonRow("RegNetY-800M", 6, 0.8, 76.3),
    ComparisonRow("RegNetY-1.6G", 11, 1.6, 78.0),
    ComparisonRow("RegNetY-4G", 21, 4.0, 80.0),
    ComparisonRow("DeiT-S", 22, 4.6, 79.8),
    ComparisonRow("DeiT-B", 86, 17.5, 81.8),
    ComparisonRow("Swin-T", 29, 4.5, 81.3),
    ComparisonRow("Swin-S", 50, 8.7, 83.0),
    ComparisonRow("Swin-B", 88, 15.4, 83.5),
    ComparisonRow("ViM-T", 7, 1.5, 76.1),
    ComparisonRow("ViM-S", 26, 5.1, 80.5),
    ComparisonRow(
        "VMamba-T", 22, 5.6, 82.2, "vmamba_tiny", "printed with 22M parameters, which is 22.9M cut short, not rounded"
    ),
    ComparisonRow(
        "VMamba-B",
        44,
        11.2,
        83.5,
        "vmamba_small",
        "the paper prints this row as VMamba-B; its parameters and FLOPs are those of VMamba-S, which is "
        "`vmamba_small` here",
    ),
    ComparisonRow("LocalVMamba-T", 26, 5.7, 82.7),
    ComparisonRow("LocalVMamba-S", 50, 11.4, 83.7),
    ComparisonRow("EffVMamba-T", 6, 0.8, 76.5),
    ComparisonRow("EffVMamba-S", 11, 1.3, 78.7),
    ComparisonRow("EffVMamba-B", 33, 4.0, 81.8),
    ComparisonRow("MSVMamba-N", 7, 0.9, 77.3, preset="msvmamba_nano"),
    ComparisonRow("MSVMamba-M", 12, 1.5, 79.8, preset="msvmamba_micro"),
    ComparisonRow("MSVMamba-T", 33, 4.6, 82.8, preset="msvmamba_tiny"),
)

# Table 6: images per second at batch 128, 224x224, on an RTX 2080 Ti.
TABLE_6: dict[str, float] = {
    "vmamba_tiny": 218.86,
    "msvmamba_nano": 1165.71,
    "msvmamba_micro": 887.14,
    "msvmamba_tiny": 421.80,
}

# Table 7, row by row as printed: layer, output size, Nano, Micro, Tiny.
TABLE_7: tuple[tuple[str, ...], ...] = (
    ("stem", "56×56", *(f"conv 4×4, {dim}, stride 4" for dim in (48, 64, 96))),
    ("stage 1", "28×28", *(f"MS3×1; conv 2×2, {dim}, stride 2" for dim in (96, 128, 192))),
    ("stage 2", "14×14", *(f"MS3×2; conv 2×2, {dim}, stride 2" for dim in (192, 256, 384))),
    ("stage 3", "7×7", *(f"MS3×{n}; conv 2×2, {dim}, stride 2" for n, dim in ((5, 384), (5, 512), (9, 768)))),
    ("stage 4", "7×7", "MS3×2", "MS3×2", "MS3×2"),
    ("head", "1×1", *("average pool, 1000-d fc, softmax",) * 3),
    ("params, M", "", "6.9", "11.9", "33.0"),
    ("GFLOPs", "", "0.9", "1.5", "4.6"),
)
# The place of a preset's column in its rows.
TABLE_7_COLUMNS: dict[str, int] = {"msvmamba_nano": 2, "msvmamba_micro": 3, "msvmamba_tiny": 4}

_DIMS = (48, 96, 192, 384)
# (full_scans, d_state, se, conv_ffn, depths) -> row. The printed tables name the toggles; the depths are those at which
# the printed parameters and FLOPs come out, since the paper matches FLOPs between rows by changing them.
_ABLATIONS: dict[tuple[int, int, bool, bool, tuple[int, ...]], PaperRow] = {
    (4, 8, False, False, (1, 2, 4, 2)): PaperRow("VMamba-Nano", ("Table 4",), 4.4, 0.87, 69.6),
    (1, 8, False, False, (2, 2, 6, 2)): PaperRow("+ MS2D (1/3)", ("Table 4", "Table 5"), 4.8, 0.89, 71.9),
    (1, 8, True, False, (2, 2, 6, 2)): PaperRow("+ SE", ("Table 4",), 5.3, 0.89, 72.4),
    (1, 8, True, True, (1, 2, 4, 2)): PaperRow("+ ConvFFN", ("Table 4",), 6.6, 0.94, 74.4),
    (1, 1, True, True, (1, 2, 5, 2)): PaperRow("+ N=1", ("Table 4",), 6.9, 0.88, 75.1),
    (0, 8, False, False, (2, 2, 6, 2)): PaperRow("0/4", ("Table 5",), 5.1, 0.74, 63.1),
    (2, 8, False, False, (2, 2, 6, 2)): PaperRow("2/2", ("Table 5",), 5.0, 1.00, 72.0),
    (3, 8, False, False, (2, 2, 6, 2)): PaperRow("3/1", ("Table 5",), 5.3, 1.11, 72.5),
    (4, 8, False, False, (2, 2, 6, 2)): PaperRow("4/0", ("Table 5",), 5.1, 1.19, 72.3),
}
PAPER_ROWS: tuple[PaperRow, ...] = tuple(_ABLATIONS.values())

# MSVMamba's own defaults of what tells the rows apart: a record may leave out what it did not set.
_CONFIGURED: dict[str, Any] = {
    "dims": _DIMS,
    "depths": (1, 2, 5, 2),
    "d_state": 1,
    "full_scans": 1,
    "se": True,
    "conv_ffn": True,
}
# Toggles that must stand as published, or the network is another one than the paper's.
_PUBLISHED: dict[str, Any] = {
    "recurrence": True,
    "carry_state": True,
    "share_half": True,
    "separate_norms": False,
    "downsample": "merge",
    "ssm_weight_decay": True,
    "global_pool": "avg",
}
# The paper leaves the ablations' rates of drop unsaid; the others change nothing that is computed, or follow the data.
_IGNORED = frozenset(
    {"in_chans", "num_classes", "drop_path_rate", "drop_rate", "ffn_drop_rate", "grad_checkpointing", "backend"}
)


def paper_row(network: Mapping[str, Any] | None) -> PaperRow | None:
    """The paper's ablation row for a network, None where the paper printed no such row.

    Control rows (equal depth, other toggles) have none: a printed number never stands beside another network.

    Args:
        network: resolved, ``{"class_path": ..., "init_args": {...}}``.
    """
    if not network or not _is_msvmamba(str(network.get("class_path", ""))):
        return None
    arguments = {key: _plain(value) for key, value in (network.get("init_args") or {}).items()}
    configured = {**_CONFIGURED, **{key: arguments[key] for key in _CONFIGURED if key in arguments}}
    rest = {key: value for key, value in arguments.items() if key not in _CONFIGURED and key not in _IGNORED}
    if configured["dims"] != _DIMS or any(key not in _PUBLISHED or _PUBLISHED[key] != rest[key] for key in rest):
        return None
    key = tuple(configured[name] for name in ("full_scans", "d_state", "se", "conv_ffn", "depths"))
    return _ABLATIONS.get(key)


def printed(network: Mapping[str, Any] | None, preset: str | None = None) -> Printed | None:
    """What the paper prints of a network's size, where it gives the most digits; None where it printed nothing.

    Args:
        network: as for `paper_row`.
        preset: name of the preset that the network is, if any, which Tables 7 and 1 know.
    """
    row = paper_row(network)
    if row is not None:
        return Printed(f"{row.params_m:.1f}", f"{row.gflops:.2f}", row.tables, row.name)
    if preset in TABLE_7_COLUMNS:
        figures = {line[0]: line[TABLE_7_COLUMNS[preset]] for line in TABLE_7}
        return Printed(figures["params, M"], figures["GFLOPs"], ("Table 7",))
    for compared in TABLE_1:
        if preset is not None and compared.preset == preset:
            size = f"{compared.params_m:.0f}", f"{compared.gflops:.1f}"
            return Printed(*size, ("Table 1",), compared.name, compared.note)
    return None


def _rounds_to(value: float, text: str) -> bool:
    digits = len(text.partition(".")[2])
    return f"{value:.{digits}f}" == text


def _is_msvmamba(class_path: str) -> bool:
    return class_path.startswith("msv.models.") and class_path.rpartition(".")[2] == "MSVMamba"


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
