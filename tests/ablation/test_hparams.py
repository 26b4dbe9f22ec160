"""What TensorBoard itself reads of the runs of a results folder."""

import pytest
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import backend_context
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data
from tensorboard.util.tensor_util import make_ndarray
from torch.utils.tensorboard import SummaryWriter

from msv.ablation.grid import Cell, Run
from msv.ablation.hparams import write_hparams
from msv.ablation.records import read_record, write_record
from msv.ablation.twins import take_over

RECORD = {
    "grid": "g", "recipe": "digits", "cell": "a", "seed": 0, "config_hash": "0123abcd", "status": "done",
    "toggles": {"full_scans": 1, "se": True, "depths": [1, 2], "downsample": None},
    "metrics": {"test_top1": 0.875, "test_loss": 0.25}, "history": [{"epoch": 0}, {"epoch": 1}],
    "counts": {"params_trained": 1000}, "timing": {"train_seconds": 12.5},
}  # fmt: skip


@pytest.fixture
def read(tmp_path):
    """Reads all runs under a folder as `tensorboard --logdir` does."""

    def events():
        found = plugin_event_multiplexer.EventMultiplexer()
        found.AddRunsFromDirectory(str(tmp_path))
        found.Reload()
        return found

    return events


def settings(events, run):
    content = events.SummaryMetadata(run, SESSION_START_INFO_TAG).plugin_data.content
    return {
        name: getattr(value, value.WhichOneof("kind"))
        for name, value in parse_session_start_info_plugin_data(content).hparams.items()
    }


def test_toggles_and_final_metrics(tmp_path, read):
    folder = tmp_path / "g/digits/a/seed0-0123abcd"
    with SummaryWriter(str(folder)) as writer:
        writer.add_scalar("val_top1", 0.5, 1)
    write_hparams(folder, {**RECORD, "toggles": {"full_scans": 9}})
    write_hparams(folder, RECORD)  # again, in the place of the other
    assert len(list(folder.iterdir())) == 2
    events, run = read(), "g/digits/a/seed0-0123abcd"
    assert settings(events, run) == {
        "grid": "g", "recipe": "digits", "cell": "a", "seed": 0.0,
        "full_scans": 1.0, "se": True, "depths": "1-2", "downsample": "null",
    }  # fmt: skip
    tags = [tag for tag in events.Runs()[run]["tensors"] if not tag.startswith("_hparams_")]
    last = {tag: events.Tensors(run, tag)[-1] for tag in tags}
    assert {tag: (event.step, make_ndarray(event.tensor_proto).item()) for tag, event in last.items()} == {
        "val_top1": (1, 0.5), "final/test_top1": (2, 0.875), "final/test_loss": (2, 0.25),
        "final/params_trained": (2, 1000.0), "final/train_seconds": (2, 12.5),
    }  # fmt: skip


def test_grids_with_other_toggles_stand_in_one_table(tmp_path, read):
    for cell, toggles in {"a": {"full_scans": 1}, "b": {"full_scans": 4}, "c": {"lr": 0.1}}.items():
        write_hparams(tmp_path / f"g/digits/{cell}/seed0-0123abcd", {**RECORD, "cell": cell, "toggles": toggles})
    provider = data_provider.MultiplexerDataProvider(read(), str(tmp_path))
    context = backend_context.Context(TBContext(data_provider=provider))
    request = RequestContext()
    runs = context.hparams_metadata(request, "")
    found = context.experiment_from_metadata(request, "", True, runs, [])
    assert {info.name for info in found.hparam_infos} >= {"full_scans", "lr", "cell"}
    assert {info.name.tag for info in found.metric_infos} >= {"final/test_top1", "final/train_seconds"}


def test_a_run_that_is_taken_over_has_its_own(tmp_path, read):
    twin = tmp_path / "g/digits/a/seed0-0123abcd"
    twin.mkdir(parents=True)
    write_record(twin / "record.json", RECORD)
    write_hparams(twin, RECORD)
    folder = tmp_path / "h/digits/b/seed0-0123abcd"
    folder.parent.mkdir(parents=True)
    take_over(Run("h", "digits", Cell("b", {}, {"lr": 0.5}), 0, {}, "0123abcd", folder), twin)
    assert read_record(folder / "record.json")["trained_as"] == "g/digits/a"
    events = read()
    assert settings(events, "h/digits/b/seed0-0123abcd") | {"seed": 0} == {
        "grid": "h", "recipe": "digits", "cell": "b", "seed": 0, "lr": 0.5,
    }  # fmt: skip
    assert settings(events, "g/digits/a/seed0-0123abcd")["cell"] == "a"
