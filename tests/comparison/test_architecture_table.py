import csv
import io

import pytest

from msv.ablation.paper import TABLE_7
from msv.comparison.architecture_table import render_csv, render_markdown, table_7


@pytest.fixture(scope="module")
def layers():
    return table_7()


def test_stages_agree_with_the_printed_table(layers):
    printed = {row[0]: row[1:] for row in TABLE_7}
    found = {layer.name: layer for layer in layers}
    for name, (output, *columns) in printed.items():
        assert found[name].output == output
        for model, cell in zip(("msvmamba_nano", "msvmamba_micro", "msvmamba_tiny"), columns, strict=True):
            here = found[name].models[model]
            if name == "stem":
                assert here == f"{cell}; LayerNorm"
            elif name.startswith("stage"):
                assert here == cell.replace("conv 2×2", "patch merging 2×2").replace(", stride 2", "")
            elif name != "head":
                assert f"{float(here):.1f}" == cell


def test_blocks(layers):
    block = next(layer for layer in layers if layer.name == "block").models
    assert block["msvmamba_tiny"] == "MS3: MS2D 1/3, N=1, SE; ConvFFN, expansion 2"
    assert block["vmamba_base"] == "VSS: SS2D, N=16"


def test_pages(layers):
    page = render_markdown(layers)
    assert "*MS3×9; conv 2×2, 768, stride 2*" in page
    assert "MS3×9; patch merging 2×2, 768 " in page
    (line,) = [line for line in csv.DictReader(io.StringIO(render_csv(layers))) if line["layer"] == "stage 3"]
    assert (line["output"], line["vmamba_small"]) == ("7×7", "VSS×27; patch merging 2×2, 768")
    assert line["paper_msvmamba_nano"] == "MS3×5; conv 2×2, 384, stride 2"


def test_a_network_of_timm():
    with pytest.raises(ValueError, match="regnety_008 is no network of this project"):
        table_7(["regnety_008"])
