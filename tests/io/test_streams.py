"""Folders of posteriors: damage is found and named, and a full disk is an error and no crash."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_shortrun import Prior, ShortRunGuide
from pyro_shortrun.io import stream_posterior
from pyro_shortrun.io.files import remove_leftovers

OPTIONS = {"num_samples": 4, "num_chains": 2, "num_prior": 0}


def rows(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.fixture
def stream(tmp_path):
    x = torch.arange(6.0)
    guide = ShortRunGuide(rows, num_steps=2, start=Prior()).setup(x[:3])
    return lambda: stream_posterior(guide, x.split(2), tmp_path / "out", **OPTIONS)


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x10
    path.write_bytes(raw)


@pytest.mark.parametrize("place", [0, 1000, -1])
def test_a_part_with_a_wrong_bit_is_found_and_drawn_again_once_it_is_gone(stream, place):
    paths = stream()
    before = [p.read_bytes() for p in paths]
    draws = [az.from_netcdf(p)["posterior"]["z"].values for p in paths]
    flip(paths[1], place)
    with pytest.raises(
        ValueError, match=r"part-00001\.nc is damaged: its checksum .* Delete it, and it is drawn again"
    ):
        stream()
    paths[1].unlink()
    again = stream()
    assert [again[i].read_bytes() for i in (0, 2)] == [before[i] for i in (0, 2)]
    assert all((az.from_netcdf(p)["posterior"]["z"].values == d).all() for p, d in zip(again, draws, strict=True))
    assert stream() == again  # the later of two checksums counts


def test_a_part_without_a_checksum_is_drawn_again(stream):
    """Its process died between the two; the draws are the same."""
    paths = stream()
    sums = paths[0].parent / "stream.sha256"
    draws = az.from_netcdf(paths[2])["posterior"]["z"].values
    sums.write_text("".join(sums.read_text().splitlines(keepends=True)[:2]))
    paths[2].write_bytes(b"half")
    assert (az.from_netcdf(stream()[2])["posterior"]["z"].values == draws).all()


def test_a_folder_of_an_earlier_version_is_taken_as_it_is(stream):
    paths = stream()
    folder = paths[0].parent
    (folder / "stream.sha256").unlink()
    record = json.loads((folder / "stream.json").read_text())
    record.pop("checksum")
    (folder / "stream.json").write_text(json.dumps(record))
    stamps = [p.stat().st_mtime_ns for p in paths]
    assert [p.stat().st_mtime_ns for p in stream()] == stamps


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"seed": 0, "checksum": "0"}'])
def test_a_damaged_index_is_named(stream, content):
    record = stream()[0].parent / "stream.json"
    record.write_text(content)
    with pytest.raises(ValueError, match=r"stream\.json is damaged: delete it"):
        stream()


def test_a_full_disk_is_one_sentence_and_what_was_there_stays(stream, monkeypatch):
    paths = stream()
    paths[1].unlink()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        OSError, match=r"part-00001\.nc could not be written \(.*No space left.*\): make room"
    ) as caught:
        stream()
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in paths[0].parent.glob("*.nc")) == ["part-00000.nc", "part-00002.nc"]
    assert not list(paths[0].parent.glob(".*.part"))
    monkeypatch.undo()
    assert stream() == paths


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs limits of file sizes")
def test_no_crash_of_the_file_library_where_files_may_not_grow(tmp_path):
    """In a process of its own, with a limit for its files: HDF5 would end it."""
    script = """
        import resource, sys
        import pyro, pyro.distributions as dist, torch
        from pyro_shortrun import Prior, ShortRunGuide
        from pyro_shortrun.io import stream_posterior

        def rows(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        guide = ShortRunGuide(rows, num_steps=2, start=Prior()).setup(torch.zeros(3))
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        try:
            stream_posterior(guide, [torch.zeros(3)], sys.argv[1], num_samples=4, num_chains=2, num_prior=0)
        except OSError as reason:
            print("refused:", reason)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "refused:" in done.stdout and "part-00000.nc could not be written" in done.stdout
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["stream.json"]


def test_files_of_others_stay(tmp_path):
    other, ours = tmp_path / ".thesis.zip.part", tmp_path / ".part-00000.nc.gone-1-ab.part"
    for file in (other, ours):
        file.write_text("x")
        os.utime(file, (1, 1))
    remove_leftovers(tmp_path, r"part-\d+\.nc")
    assert other.exists() and not ours.exists()


def test_another_guide_with_the_same_parameters_is_another_job(tmp_path):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    batches = list(torch.randn(4).split(2))
    for steps in (2, 40):
        guide = ShortRunGuide(model, num_steps=steps, start=Prior()).setup(batches[0])
        if steps == 2:
            stream_posterior(guide, batches, tmp_path, num_samples=3, num_chains=1)[1].unlink()
        else:
            with pytest.raises(ValueError, match="num_steps"):
                stream_posterior(guide, batches, tmp_path, num_samples=3, num_chains=1)
