"""Files of a run that were cut, changed or put there by others: skipped and counted, or one line on how to go on."""

import errno
import json

import numpy as np
import pytest

from omniopd_jax import experience, staleness
from omniopd_jax.errors import UserError
from omniopd_jax.run import cli, identity, logging
from omniopd_jax.run.files import read_json

FOREIGN = [
    b'{"step": 3, "loss": 0.1', b"hello", b"[1, 2]", b"null", b"7", b'"text"', b'{"loss": 1}', b'{"step": "two"}',
    b'{"step": null}', b'{"step": true}', b"\xff\xfe\x00", b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}",
    b'{"step": 1e400}', b"\x00" * 50,
]  # fmt: skip


@pytest.mark.parametrize("line", FOREIGN, ids=range(len(FOREIGN)))
def test_a_line_that_is_no_record_is_left_out_and_counted(line, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": i, "text": "a \u2028 b"}, ensure_ascii=False).encode() for i in range(4)]
    path.write_bytes(b"\n".join([good[0], line, good[1], good[2], good[3]]))
    logging.cut_after(path, 3)
    assert path.read_bytes() == b"".join(g + b"\n" for g in good[:3])
    assert f"{path}: 1 lines" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["audits-x.jsonl", "audits-.jsonl", "audits--1.jsonl", "audits-1-copy.jsonl", "audits-99999999999999999999.jsonl"],
)
def test_a_file_of_a_strange_name_is_left_alone(name, tmp_path):
    (tmp_path / name).write_text("mine\n")
    logging.Writer(tmp_path, start_step=0, tensorboard=False, rank=0).close()
    assert (tmp_path / name).read_text() == "mine\n"


CUT = ["", "{", '{"a": 1', "[" * 100_000, "[1]", "null", "\x00\x00", '{"a": ' + "9" * 5000 + "}"]


@pytest.mark.parametrize("content", CUT, ids=range(len(CUT)))
def test_a_small_file_that_is_cut_off_is_one_line_that_says_how_to_go_on(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    for read in (lambda: read_json(path, "remove it"), lambda: identity.read(path)):
        with pytest.raises(UserError, match="config.json") as e:
            read()
        assert "remove it" in str(e.value) and len(str(e.value)) < 400 and "\n" not in str(e.value)


def test_responses_that_were_cut_off_are_one_line(tmp_path):
    (tmp_path / "ahead").mkdir()
    path = tmp_path / "ahead" / "2.0.npz"
    np.savez(path, N=3)
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"text", whole.replace(b"N.npy", b"M.npy")):
        path.write_bytes(content)
        with pytest.raises(UserError, match="2.0.npz is damaged .*remove it"):
            staleness.Ahead().load(tmp_path, 2, experience.Drawn([], []), None)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_whoever_wraps_it(number):
    disk = OSError(number, "No space left on device", "/runs/x/metrics.jsonl")
    wrapped = RuntimeError("the save failed")
    wrapped.__cause__ = ValueError("array")
    wrapped.__cause__.__cause__ = disk
    for error in (disk, wrapped, RuntimeError("DATA_LOSS: write: No space left on device [os_error='ENOSPC']")):
        line = cli.full_disk(error)
        assert "the disk is full" in line and "start the same command again" in line and "\n" not in line
    assert cli.full_disk(OSError(errno.EIO, "input/output error")) is None
