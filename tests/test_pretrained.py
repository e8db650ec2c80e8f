"""Folders that hold a model, ours and timm's, on the disk and on a hub that is not really asked."""

import json
import os
import sys

import pytest
import torch
from torch import nn

import resnext
from resnext import ResNet, create_model, from_pretrained, save_pretrained
from resnext.blocks import Bottleneck
from tests.checkpoint_layouts import randomise

pytest.importorskip("safetensors")

NAME = "resnet18_cifar"


@pytest.fixture(scope="module")
def model() -> ResNet:
    return randomise(create_model(NAME))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    names = [f"class {number}" for number in range(10)]
    return save_pretrained(
        model, tmp_path_factory.mktemp("hub") / "m", class_names=names, mean=(0.5,) * 3, std=(0.2,) * 3
    )


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


def edit(folder, target, **changes):
    """A copy of a folder with another configuration."""
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    os.symlink(folder / "model.safetensors", target / "model.safetensors")
    return target


class TestRoundTrip:
    def test_files(self, folder):
        assert {*os.listdir(folder)} == {"config.json", "model.safetensors"}
        assert json.loads((folder / "config.json").read_text()) == {
            "architecture": NAME,
            "num_classes": 10,
            "model_args": {},
            "pretrained_cfg": {
                "label_names": [f"class {number}" for number in range(10)],
                "mean": [0.5] * 3,
                "std": [0.2] * 3,
            },
            "resnext_version": resnext.__version__,
        }

    def test_same_model(self, model, folder, images):
        loaded = from_pretrained(str(folder))
        assert not loaded.training
        assert type(loaded) is type(model)
        assert torch.equal(loaded(images), model(images))
        assert loaded.config == model.config

    def test_saved_again_it_keeps_what_it_knew(self, folder, tmp_path):
        save_pretrained(from_pretrained(folder), tmp_path, std=(0.3,) * 3)
        before, after = (
            json.loads((each / "config.json").read_text())["pretrained_cfg"] for each in (folder, tmp_path)
        )
        assert after == {**before, "std": [0.3] * 3}

    def test_arguments(self, tmp_path, images):
        arguments = {"stem": "deep", "avg_down": True, "num_classes": 3, "drop_path_rate": 0.1}
        model = randomise(create_model("resnet18", **arguments))
        loaded = from_pretrained(save_pretrained(nn.DataParallel(model), tmp_path))
        assert torch.equal(loaded(images), model(images))
        assert loaded.config == {"architecture": "resnet18", **arguments}

    def test_after_reset_classifier(self, tmp_path):
        model = create_model(NAME)
        model.reset_classifier(7)
        assert from_pretrained(save_pretrained(model, tmp_path)).fc.out_features == 7


class TestOverrides:
    def test_num_classes(self, model, folder):
        with pytest.warns(UserWarning, match="skipped the classifier"):
            loaded = from_pretrained(folder, num_classes=3)
        assert loaded.fc.out_features == loaded.config["num_classes"] == 3
        assert torch.equal(loaded.layer4[1].conv2.weight, model.layer4[1].conv2.weight)
        assert "label_names" not in loaded.pretrained_cfg
        assert loaded.pretrained_cfg["mean"] == [0.5] * 3

    def test_in_chans(self, folder):
        with pytest.warns(UserWarning, match="adapted conv1.weight"):
            assert from_pretrained(folder, in_chans=1)(torch.ones(1, 1, 32, 32)).shape == (1, 10)

    def test_features(self, model, folder, images, tmp_path):
        features = from_pretrained(folder, features_only=True, out_indices=(1, 2))
        expected = model.layer2(model.layer1(torch.relu(model.bn1(model.conv1(images)))))
        torch.testing.assert_close(features(images)[1], expected)
        again = from_pretrained(save_pretrained(features, tmp_path))
        assert torch.equal(again(images)[1], features(images)[1])

    def test_another_network_is_an_error(self, folder, tmp_path):
        with pytest.raises(RuntimeError, match=r"1 of another shape:\n  conv1\.weight"):
            from_pretrained(edit(folder, tmp_path / "m", architecture="resnet18"))


class TestErrors:
    def test_models_that_have_no_name(self, tmp_path):
        for model in (nn.Linear(2, 2), ResNet(Bottleneck, (1, 1, 1, 1))):
            with pytest.raises(TypeError, match=r"expected a model with a config, got a .*; build it by"):
                save_pretrained(model, tmp_path)

    def test_arguments_that_json_cannot_hold(self, tmp_path):
        model = create_model(NAME, norm_layer=nn.InstanceNorm2d)
        with pytest.raises(TypeError, match=r"expected arguments that JSON can hold, got .*norm_layer"):
            save_pretrained(model, tmp_path)
        assert os.listdir(tmp_path) == []

    def test_class_names(self, model, tmp_path):
        with pytest.raises(ValueError, match="expected 10 class_names, got 2"):
            save_pretrained(model, tmp_path, class_names=["cat", "dog"])

    @pytest.mark.parametrize("source", ["none", "./owner/name", "/owner/name", "a/b/c", "owner/"])
    def test_no_such_folder(self, source):
        with pytest.raises(FileNotFoundError, match=f"expected a folder or a name on the .* hub .*got {source}"):
            from_pretrained(source)

    @pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
    def test_missing_files(self, folder, tmp_path, missing):
        os.unlink(edit(folder, tmp_path / "m") / missing)
        with pytest.raises(FileNotFoundError, match=f"got no {missing}"):
            from_pretrained(tmp_path / "m")

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"architecture": "resnet18"}'])
    def test_damaged_configurations(self, folder, tmp_path, text):
        (edit(folder, tmp_path / "m") / "config.json").write_text(text)
        with pytest.raises(ValueError, match="expected a configuration with architecture and num_classes, got"):
            from_pretrained(tmp_path / "m")

    def test_unknown_architecture(self, folder, tmp_path):
        with pytest.raises(ValueError, match="expected the name of a model, got 'resnet18_cifra'"):
            from_pretrained(edit(folder, tmp_path / "m", architecture="resnet18_cifra"))


class TestHub:
    @pytest.fixture
    def asked(self, folder, monkeypatch):
        """What would have been downloaded."""
        hub, asked = pytest.importorskip("huggingface_hub"), []

        def download(repo_id, filename, *, revision=None, cache_dir=None):
            asked.append((repo_id, filename, revision, cache_dir))
            return str(folder / filename)

        monkeypatch.setattr(hub, "hf_hub_download", download)
        return asked

    @pytest.mark.parametrize("name", ["owner/name.v1", "hf-hub:owner/name.v1"])
    def test_names(self, model, asked, images, name):
        loaded = from_pretrained(name, revision="main", cache_dir="cache")
        assert torch.equal(loaded(images), model(images))
        assert asked == [("owner/name.v1", file, "main", "cache") for file in ("config.json", "model.safetensors")]

    def test_folders_are_never_looked_for_there(self, asked, folder, tmp_path, monkeypatch):
        monkeypatch.chdir(folder.parent.parent)
        from_pretrained(f"{folder.parent.name}/{folder.name}")
        for path in ("./owner/name", tmp_path / "name"):
            with pytest.raises(FileNotFoundError):
                from_pretrained(path)
        assert asked == []

    def test_without_huggingface_hub(self, monkeypatch, folder):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        assert from_pretrained(folder)
        with pytest.raises(ImportError, match="pip install huggingface_hub, or give a folder"):
            from_pretrained("owner/name")


class TestTimm:
    def test_folders_of_timm(self, tmp_path, images):
        hub = pytest.importorskip("timm.models._hub")
        theirs = randomise(pytest.importorskip("timm").create_model("resnet18", num_classes=5))
        hub.save_for_hf(theirs, tmp_path, safe_serialization=True)
        loaded = from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(images), theirs(images))
        assert len(loaded.pretrained_cfg["mean"]) == 3

    def test_timm_reads_ours(self, tmp_path, images):
        timm = pytest.importorskip("timm")
        model = randomise(create_model("resnet18", num_classes=5))
        save_pretrained(model, tmp_path, mean=(0.5,) * 3, std=(0.2,) * 3)
        theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        torch.testing.assert_close(theirs(images), model(images))
        assert theirs.pretrained_cfg["mean"] == [0.5] * 3
