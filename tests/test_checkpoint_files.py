"""Checkpoint files: what is read runs no code, what is written is whole."""

import argparse
import io
import os
import pickle
import resource
import signal
import sys

import numpy as np
import pytest
import torch
from torch import nn

from resnext import ResNet, load_checkpoint, read_checkpoint, save_checkpoint
from resnext.blocks import Bottleneck

safetensors = pytest.importorskip("safetensors.torch")

SUFFIXES = [".safetensors", ".pt", ".pth", ".bin", ".tar", ".ckpt"]


@pytest.fixture
def state() -> dict:
    return {"conv.weight": torch.randn(4, 3, 3, 3), "conv.bias": torch.randn(4), "count": torch.tensor(3)}


def assert_same(read: dict, state: dict) -> None:
    assert {*read} == {*state}
    for key, value in state.items():
        assert read[key].dtype == value.dtype
        assert torch.equal(read[key], value), key


class TestRead:
    def test_what_training_scripts_save(self, tmp_path, state):
        checkpoint = {"model": state, "optimizer": {"lr": 0.1}, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
        torch.save(checkpoint, tmp_path / "checkpoint.pth.tar")
        read = read_checkpoint(tmp_path / "checkpoint.pth.tar")
        assert_same(read["model"], state)
        assert (read["epoch"], read["args"].lr) == (3, 0.1)

    def test_the_format_before_torch_1_6(self, tmp_path, state):
        torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        assert_same(read_checkpoint(str(tmp_path / "old.pth")), state)

    @pytest.mark.parametrize(
        ("content", "suffix"),
        [
            pytest.param(b"", ".pth", id="empty"),
            pytest.param(b"", ".safetensors", id="empty-safetensors"),
            pytest.param(b"<html>Not found</html>", ".pth", id="web-page"),
            pytest.param(b"<html>Not found</html>", ".safetensors", id="web-page-safetensors"),
            pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n", ".bin", id="git-lfs"),
        ],
    )
    def test_other_files(self, tmp_path, content, suffix):
        path = tmp_path / f"model{suffix}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"read_checkpoint: expected .*, got {path}.*; get it anew"):
            read_checkpoint(path)

    @pytest.mark.parametrize("save", [torch.save, safetensors.save_file], ids=["torch", "safetensors"])
    def test_truncated_files(self, tmp_path, state, save):
        path = tmp_path / ("model.pth" if save is torch.save else "model.safetensors")
        save(state, path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match=f"got {path}.*; get it anew"):
            read_checkpoint(path)

    @pytest.mark.parametrize("new", [True, False], ids=["zip", "old-format"])
    def test_whole_modules_are_refused(self, tmp_path, new):
        torch.save({"model": nn.Linear(2, 2)}, tmp_path / "m.pth", _use_new_zipfile_serialization=new)
        with pytest.raises(ValueError, match=r"needs torch\.nn\.modules\.linear\.Linear too; if you trust the file"):
            read_checkpoint(tmp_path / "m.pth")

    def test_the_way_out_that_the_error_names_works(self, tmp_path, state):
        torch.save({"model": state, "best": np.float64(0.9)}, tmp_path / "m.pth")
        with pytest.raises(ValueError, match=r"needs numpy\..*multiarray\.scalar.*safe_globals") as error:
            read_checkpoint(tmp_path / "m.pth")
        assert "argparse" not in str(error.value)
        scalar, kind = np.float64(0).__reduce__()[0], type(np.dtype("float64"))
        with torch.serialization.safe_globals([scalar, np.dtype, kind]):
            assert_same(read_checkpoint(tmp_path / "m.pth")["model"], state)

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    def test_no_code_is_run(self, tmp_path):
        marker = tmp_path / "ran"

        class Attack:
            def __reduce__(self):
                return os.mkdir, (str(marker),)

        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            (tmp_path / "evil.pth").write_bytes(pickle.dumps(Attack(), protocol=protocol))
            with pytest.raises(ValueError, match="read_checkpoint: expected"):
                read_checkpoint(tmp_path / "evil.pth")
        assert not marker.exists()

    @pytest.mark.filterwarnings("ignore:.*torch.jit")
    def test_torchscript(self, tmp_path):
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "m.pt")
        with pytest.raises(ValueError, match=r"got the TorchScript program .*torch\.jit\.load\(path\)\.state_dict\(\)"):
            read_checkpoint(tmp_path / "m.pt")

    def test_no_such_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"expected a file, got .*none\.pth; check the path"):
            read_checkpoint(tmp_path / "none.pth")
        with pytest.raises(FileNotFoundError, match=r"use resnext\.from_pretrained for a folder"):
            read_checkpoint(tmp_path)

    def test_without_safetensors(self, tmp_path, state, monkeypatch):
        save_checkpoint(state, tmp_path / "m.safetensors")
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(ImportError, match="pip install safetensors"):
            read_checkpoint(tmp_path / "m.safetensors")
        with pytest.raises(ImportError, match="pip install safetensors"):
            save_checkpoint(state, tmp_path / "m.safetensors")


class TestSave:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_round_trip(self, tmp_path, state, suffix):
        path = tmp_path / f"checkpoint{suffix}"
        assert save_checkpoint(state, path) == path
        assert_same(read_checkpoint(path), state)
        assert os.listdir(tmp_path) == [path.name]

    @pytest.mark.parametrize("suffix", SUFFIXES[:2])
    def test_models(self, tmp_path, suffix):
        """In channels_last, and inside what training wraps around them: plain names, any reader's layout."""
        arguments = {"layers": (1, 1, 1, 1), "num_classes": 3, "groups": 32, "width_per_group": 4}
        model = ResNet(Bottleneck, **arguments).to(memory_format=torch.channels_last)
        path = save_checkpoint(nn.DataParallel(model), tmp_path / f"m{suffix}")
        assert_same(read_checkpoint(path), model.state_dict())
        other = ResNet(Bottleneck, **arguments)
        load_checkpoint(other, path)
        assert_same(other.state_dict(), model.state_dict())

    def test_compiled_models(self, tmp_path):
        wrapper = nn.Module()
        wrapper._orig_mod = nn.Linear(2, 2)  # as torch.compile's wrapper names it
        save_checkpoint(wrapper, tmp_path / "m.pth")
        assert {*read_checkpoint(tmp_path / "m.pth")} == {"weight", "bias"}

    def test_training_state(self, tmp_path):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        checkpoint = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
        save_checkpoint(checkpoint, tmp_path / "last.pth")
        read = read_checkpoint(tmp_path / "last.pth")
        torch.optim.SGD(model.parameters(), lr=1.0).load_state_dict(read["optimizer"])
        buffers = (
            read["optimizer"]["state"][0]["momentum_buffer"],
            optimizer.state_dict()["state"][0]["momentum_buffer"],
        )
        assert torch.equal(*buffers)
        assert read["epoch"] == 3

    def test_tied_and_strided_tensors_in_safetensors(self, tmp_path):
        shared = torch.randn(6)
        state = {"a": shared, "tied": shared, "part": shared[2:4], "strided": torch.randn(3, 4).t(), "row": shared[:1]}
        state["expanded"] = torch.randn(1).expand(3)
        save_checkpoint(state, tmp_path / "m.safetensors")
        assert_same(read_checkpoint(tmp_path / "m.safetensors"), state)
        assert os.path.getsize(tmp_path / "m.safetensors") < 1000

    def test_metadata(self, tmp_path, state):
        path = save_checkpoint(state, tmp_path / "m.safetensors", {"epoch": "3"})
        with safetensors.safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt", "epoch": "3"}
        with pytest.raises(ValueError, match=r"expected no metadata for \.pth"):
            save_checkpoint(state, tmp_path / "m.pth", {"epoch": "3"})

    def test_what_safetensors_cannot_hold(self, tmp_path, state):
        with pytest.raises(TypeError, match=r"expected only tensors for \.safetensors, got int at 'epoch'"):
            save_checkpoint({**state, "epoch": 3}, tmp_path / "m.safetensors")
        assert os.listdir(tmp_path) == []

    def test_unknown_suffix(self, tmp_path, state):
        with pytest.raises(
            ValueError, match=r"expected a path ending in \.safetensors or one of \.pt, .*got .*m\.onnx"
        ):
            save_checkpoint(state, tmp_path / "m.onnx")

    def test_through_symbolic_links(self, tmp_path, state):
        (tmp_path / "disk").mkdir()
        (tmp_path / "last.pth").symlink_to(tmp_path / "disk" / "last.pth")
        save_checkpoint(state, tmp_path / "last.pth")
        assert (tmp_path / "last.pth").is_symlink()
        assert_same(read_checkpoint(tmp_path / "disk" / "last.pth"), state)


class TestFailures:
    @pytest.mark.parametrize("suffix", SUFFIXES[:2])
    def test_a_full_disk_leaves_the_old_file(self, tmp_path, state, suffix):
        path = save_checkpoint(state, tmp_path / f"last{suffix}")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing beyond the limit is then an error
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
            with pytest.raises(OSError, match=f"could not write {path}: .*; check the space|File too large"):
                save_checkpoint({"a": torch.ones(100_000)}, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert_same(read_checkpoint(path), state)
        assert os.listdir(tmp_path) == [path.name]

    @pytest.mark.parametrize("moment", ["write", "replace"])
    def test_an_interrupt_leaves_the_old_file(self, tmp_path, state, monkeypatch, moment):
        path = save_checkpoint(state, tmp_path / "last.pth")

        def interrupt(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(*{"write": (torch, "save"), "replace": (os, "replace")}[moment], interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint({"a": torch.ones(3)}, path)
        assert_same(read_checkpoint(path), state)
        assert os.listdir(tmp_path) == [path.name]

    def test_the_contents_reach_the_disk_before_the_name(self, tmp_path, state, monkeypatch):
        order = []
        for name in ("fsync", "replace"):
            real = getattr(os, name)
            monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (order.append(name), real(*args)))
        save_checkpoint(state, tmp_path / "last.pth")
        assert order == ["fsync", "replace"]

    @pytest.mark.parametrize("suffix", SUFFIXES[:2])
    def test_no_such_folder(self, tmp_path, state, suffix):
        with pytest.raises(FileNotFoundError):
            save_checkpoint(state, tmp_path / "none" / f"m{suffix}")

    def test_what_cannot_be_pickled(self, tmp_path):
        with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
            save_checkpoint({"file": io.StringIO, "lock": lambda: None}, tmp_path / "m.pth")
        assert os.listdir(tmp_path) == []
