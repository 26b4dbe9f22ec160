from msv.publishing.index import write_index


def test_index(results):
    text = write_index(results).read_text()
    rows = [[value.strip() for value in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert rows[2] == [
        "[g](measured/quick/g/table.md)", "quick", "digits; 9 train, 5 test images of 1×32×32; 10 classes", "1 of 2",
        "0", "A CPU, 1 thread", "`0123456789ab`",
    ]  # fmt: skip
    assert rows[-1] == ["[scan](benchmarks/scan.csv)", "2", "A CPU", "2.15.0", "abc, def"]
    for phrase in (
        "- torch 2.15.0\n- 5 images\n",
        "```sh\npython cli.py fit --config experiments/g.yaml\n```",
        "no column holds both",
        "No network has been trained on ImageNet here",
    ):
        assert phrase in text
    # A page that was not made is not linked.
    assert "Counted here" not in text
    assert "comparison" not in text


def test_an_empty_folder_has_an_index_too(tmp_path):
    assert "Nothing yet: train a grid" in write_index(tmp_path).read_text()
