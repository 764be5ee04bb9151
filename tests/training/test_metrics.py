import json

import pytest

from quietstar_jax.config import LoggingConfig
from quietstar_jax.io import write_json
from quietstar_jax.training.metrics import MetricsWriter


def writer(workdir, first_step=0, **changes):
    config = LoggingConfig(progress_bar=False, **changes)
    return MetricsWriter(workdir, config, first_step=first_step, total_steps=5, run_config={})


def test_a_resumed_run_drops_what_it_will_do_again(tmp_path):
    with writer(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.write("train", step, "plain", {"loss": 0.5 * step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # cut off by a kill
    with writer(tmp_path, first_step=2) as metrics:
        metrics.write("train", 3, "plain", {"loss": 9.0})
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == [(1, 0.5), (2, 1.0), (3, 9.0)]


BROKEN = ["", "{", "null", "[1]", '"step"', "7", "{}", '{"step": 2}', '{"kind": "train", "step": "2"}', "NaN", "\udcff",
          "[" * 9999, '{"kind": "train", "step": true, "phase": "a"}',
          '{"kind": 3, "step": 1, "phase": "a"}', "\x00\x00"]  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_a_line_that_holds_no_record_costs_that_line_only(tmp_path, broken):
    with writer(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.write("train", step, "plain", {"loss": 0.5 * step})
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], broken.encode(errors="surrogateescape") + b"\n", *lines[1:]]))
    with writer(tmp_path, first_step=2) as metrics:
        assert metrics.has("train", 1)
        assert metrics.has("train", 2)
    assert path.read_bytes() == b"".join(lines[:2])


def scalars(folder):
    """What TensorBoard shows: the last value of each name and step, without the steps that a resumed run repeats."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:  # of each record the length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            if event.session_log.status == event_pb2.SessionLog.START:
                found = {key: value for key, value in found.items() if key[1] < event.step}
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            data = data[16 + size :]
    return found


def test_tensorboard_gets_the_numbers_of_each_record(tmp_path):
    pytest.importorskip("tensorboardX")
    with writer(tmp_path, tensorboard=True) as metrics:
        for step in (1, 2, 3):
            metrics.write("train", step, "plain", {"loss": 0.5 * step, "count": step, "deciles": [{}]})
    with writer(tmp_path, first_step=1, tensorboard=True) as metrics:
        metrics.write("evaluation", 2, "plain", {"loss": 4.0})
    expected = {("train/loss", 1): 0.5, ("train/count", 1): 1.0, ("evaluation/loss", 2): 4.0}
    assert scalars(tmp_path / "tensorboard") == expected


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
