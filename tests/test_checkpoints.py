"""Loading weights: any wrapper, prefix and layout into any model; what differs is listed, and nothing half-loaded."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from resnext import ResNet, ResNet18Fused, load_checkpoint, unfuse_
from resnext.blocks import Bottleneck
from tests import checkpoint_layouts as layouts
from tests.checkpoint_layouts import ARGUMENTS, randomise

tv = pytest.importorskip("torchvision.models")
timm = pytest.importorskip("timm")


def torchvisions() -> nn.Module:
    return randomise(tv.resnet.ResNet(tv.resnet.Bottleneck, **ARGUMENTS))


@functools.cache
def built(**kwargs) -> ResNet:
    return ResNet(Bottleneck, **{**ARGUMENTS, **kwargs})


def ours(**kwargs) -> ResNet:
    return randomise(copy.deepcopy(built(**kwargs)))  # a copy is made in a tenth of the time


def small_images(model: nn.Module) -> nn.Module:
    """Torchvision's, with the stem for small images: 3x3 convolution, no max pool."""
    model.conv1 = layouts.conv(3, 64, 3)
    del model.maxpool
    model.maxpool = lambda x: x
    return randomise(model)


def timms_resnet_d() -> nn.Module:
    return randomise(
        timm.models.resnet.ResNet(
            timm.models.resnet.Bottleneck,
            ARGUMENTS["layers"],
            num_classes=10,
            cardinality=ARGUMENTS["groups"],
            base_width=ARGUMENTS["width_per_group"],
            stem_type="deep",
            stem_width=32,
            avg_down=True,
        )
    )


CIFAR, DEEP = {"stem": "cifar"}, {"stem": "deep", "avg_down": True}
# The layout, the known model that computes the same, and the arguments of ours.
LAYOUTS = {
    "pytorch-cifar": (layouts.PytorchCifar, lambda: small_images(torchvisions()), CIFAR),
    "resnext.pytorch": (layouts.ResNeXtPytorch, lambda: small_images(torchvisions()), CIFAR),
    "pytorch-cifar100": (layouts.PytorchCifar100, lambda: small_images(torchvisions()), CIFAR),
    "sequential-units": (layouts.SequentialUnits, torchvisions, {}),
    "identity-downsample": (layouts.IdentityDownsample, torchvisions, {}),
    "features": (lambda: layouts.Features(torchvisions()), torchvisions, {}),
    "sequential": (lambda: layouts.sequential(torchvisions()), torchvisions, {}),
    "sequential-without-pool": (
        lambda: layouts.sequential(small_images(torchvisions())),
        lambda: small_images(torchvisions()),
        CIFAR,
    ),
    "mmpretrain-resnet-d": (layouts.Mmpretrain, timms_resnet_d, DEEP),
    "torchvision": (torchvisions, torchvisions, {}),
    "timm-resnet-d": (timms_resnet_d, timms_resnet_d, DEEP),
}


@pytest.fixture
def model() -> ResNet:
    return ours()


@pytest.fixture
def state() -> dict:
    """Another model's weights."""
    return ours().state_dict()


def assert_loaded(model: nn.Module, state: dict) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(own[key], value), key


class TestLayouts:
    @pytest.mark.parametrize("name", LAYOUTS)
    def test_loads_into_known_models_and_back(self, name):
        make, known, arguments = LAYOUTS[name]
        theirs, known, x = randomise(make()), known(), torch.randn(1, 3, 16, 16)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = load_checkpoint(known, theirs.state_dict())
            assert len(report.loaded_keys) == len(known.state_dict())
            assert torch.equal(known(x), theirs(x))

            plain = ours(**arguments)
            load_checkpoint(plain, theirs.state_dict())
            assert_loaded(plain, known.state_dict())

            back = randomise(make())
            assert not torch.equal(back(x), theirs(x))
            load_checkpoint(back, plain.state_dict())
            assert torch.equal(back(x), theirs(x))

    def test_says_what_it_translated(self):
        report = load_checkpoint(ours(stem="cifar"), layouts.PytorchCifar().state_dict())
        assert report.notes == [
            "translated names: shortcut instead of downsample",
            "translated names: classifier not named fc",
        ]
        assert str(report).startswith("loaded 122 tensors\ntranslated names: shortcut")

    def test_without_max_pool_also_three_stages(self):
        """The classifier is then the ninth child, where four stages with a pool have theirs as tenth."""
        known = tv.resnet.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1])
        del known.layer4, known.maxpool
        known.fc = nn.Linear(1024, 10)
        theirs = randomise(layouts.sequential(known))
        target = randomise(copy.deepcopy(known))
        load_checkpoint(target, theirs.state_dict())
        assert all(map(torch.equal, target.state_dict().values(), theirs.state_dict().values()))

    @pytest.mark.parametrize("name", ["seresnet18", "regnetx_002", "resnext26ts"])
    def test_models_of_other_families_load_their_own(self, name):
        target, source = (timm.create_model(name, num_classes=3) for _ in range(2))
        load_checkpoint(target, {f"module.{key}": value for key, value in randomise(source).state_dict().items()})
        assert_loaded(target, source.state_dict())


class TestWrappers:
    @pytest.mark.parametrize(
        "wrap",
        [
            pytest.param(lambda state: {"state_dict": state, "epoch": 3}, id="state_dict"),
            pytest.param(
                lambda state: {"model": state, "optimizer": {"state": {}}, "loss": torch.ones(())}, id="model"
            ),
            pytest.param(lambda state: {"net": state, "acc": 95.1}, id="net"),
            pytest.param(lambda state: {"params": state, "epoch": 3}, id="params"),
            pytest.param(lambda state: {"module": state}, id="module"),
            pytest.param(lambda state: {"model": {"state_dict": state}}, id="nested"),
            pytest.param(lambda state: {"state_dict": state, "state_dict_ema": None}, id="no-ema"),
            pytest.param(lambda state: {"model": {"a": torch.ones(1)}, "model_ema": state}, id="ema-first"),
        ],
    )
    def test_entries(self, model, state, wrap):
        load_checkpoint(model, wrap(state))
        assert_loaded(model, state)

    def test_use_ema(self, model, state):
        load_checkpoint(model, {"state_dict": state, "state_dict_ema": ours().state_dict()}, use_ema=False)
        assert_loaded(model, state)

    @pytest.mark.parametrize(
        "rename",
        [
            pytest.param(lambda key: "module." + key, id="data-parallel"),
            pytest.param(lambda key: "_orig_mod." + key, id="compiled"),
            pytest.param(lambda key: "module._orig_mod.module." + key, id="repeated"),
            pytest.param(lambda key: key.replace("layer1.", "layer1._orig_mod."), id="part-compiled"),
            pytest.param(lambda key: key.replace("0.conv1", "0._checkpoint_wrapped_module.conv1"), id="checkpointed"),
            pytest.param(lambda key: "model.backbone." + key, id="model.backbone"),
            pytest.param(lambda key: "net." + key, id="net"),
            pytest.param(lambda key: "my_own_name." + key, id="any-name"),
            pytest.param(lambda key: key if key.startswith("fc") else "backbone." + key, id="backbone-and-head"),
        ],
    )
    def test_prefixes(self, model, state, rename):
        load_checkpoint(model, {rename(key): value for key, value in state.items()})
        assert_loaded(model, state)

    def test_weight_averages(self, model):
        """AveragedModel saves a counter beside the prefixed weights."""
        average = AveragedModel(ours())
        load_checkpoint(model, {"model_ema": average.state_dict()})
        assert_loaded(model, average.module.state_dict())

    @pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: nn.ModuleDict({"backbone": model})])
    def test_wrapped_models(self, model, state, wrap):
        load_checkpoint(wrap(model), state)
        assert_loaded(model, state)

    def test_other_modules_beside_the_model_are_an_error(self, model, state):
        checkpoint = {**{f"encoder_q.{key}": value for key, value in state.items()}, "queue": torch.ones(3)}
        with pytest.raises(RuntimeError, match=r"1 unknown to the model:\n  queue"):
            load_checkpoint(model, checkpoint)
        load_checkpoint(model, checkpoint, strict=False)
        assert_loaded(model, state)


class TestValues:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_dtypes_are_converted(self, model, state, dtype):
        load_checkpoint(model, {key: v.to(dtype) if v.is_floating_point() else v for key, v in state.items()})
        expected = {key: v.to(dtype).float() if v.is_floating_point() else v for key, v in state.items()}
        assert_loaded(model, expected)

    def test_parameters_stay_what_they_are(self, state):
        model = ours().to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_(False)
        before = dict(model.named_parameters())
        load_checkpoint(model, state)
        for name, parameter in model.named_parameters():
            assert parameter is before[name]
            assert (parameter.dtype, parameter.requires_grad) == (torch.bfloat16, False)
        assert model.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)

    def test_old_checkpoints_lack_the_counters(self, model, state):
        report = load_checkpoint(model, {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")})
        assert not report.missing_keys
        assert_loaded(model, state)

    def test_frozen_batch_norms_take_no_counters(self, state):
        frozen = pytest.importorskip("torchvision.ops").FrozenBatchNorm2d
        model = tv.resnet.ResNet(tv.resnet.Bottleneck, **ARGUMENTS, norm_layer=frozen)
        load_checkpoint(model, state)
        assert_loaded(model, {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")})

    @pytest.mark.parametrize("prepare", [lambda model: model, unfuse_], ids=["fused", "unfused"])
    def test_evaluation_uses_the_new_weights(self, prepare):
        """What fused evaluation had folded before is out of date."""
        model, x = prepare(ours()), torch.randn(1, 3, 32, 32)
        other = ours()
        with torch.inference_mode():
            before = model(x)
            load_checkpoint(model, other.state_dict())
            after = model(x)
            torch.testing.assert_close(after, other(x))
        assert not torch.allclose(before, after)


class TestClassifier:
    @pytest.mark.parametrize("rename", [str, lambda key: key.replace("fc.", "linear.")], ids=["fc", "linear"])
    def test_another_number_of_classes_is_skipped_and_said(self, state, rename):
        model = ours(num_classes=3)
        head = copy.deepcopy(model.fc.state_dict())
        with pytest.warns(UserWarning, match="skipped the classifier: it has 3 classes, the checkpoint 10"):
            report = load_checkpoint(model, {rename(key): value for key, value in state.items()})
        assert report.skipped_keys == ["fc.weight", "fc.bias"]
        assert "skipped the classifier" in str(report)
        assert_loaded(model, {**state, "fc.weight": head["weight"], "fc.bias": head["bias"]})

    def test_models_without_one(self, state):
        model = ours(num_classes=0)
        with pytest.warns(UserWarning, match="the model has none"):
            load_checkpoint(model, state)
        assert_loaded(model, {key: value for key, value in state.items() if not key.startswith("fc.")})

    def test_checkpoints_without_one_are_an_error(self, model, state):
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
        with pytest.raises(RuntimeError, match=r"2 missing in the checkpoint:\n  fc.weight, bias"):
            load_checkpoint(model, state)

    def test_other_features_are_an_error(self, model, state):
        state["fc.weight"] = torch.ones(10, 512)
        with pytest.raises(RuntimeError, match=r"fc.weight: \(10, 2048\), in the checkpoint \(10, 512\)"):
            load_checkpoint(model, state)


class TestInputChannels:
    @pytest.mark.parametrize(
        ("channels", "arguments"),
        [
            pytest.param(1, {}, id="grey"),
            pytest.param(2, {}, id="fewer"),
            pytest.param(4, {}, id="one-more"),
            pytest.param(7, {}, id="more-than-twice"),
            pytest.param(4, {"stem": "deep"}, id="deep-stem"),
        ],
    )
    def test_the_stem_is_adapted_as_timm_does(self, channels, arguments):
        state, model = ours(**arguments).state_dict(), ours(in_chans=channels, **arguments)
        with pytest.warns(UserWarning, match=rf"adapted conv1.*\.weight from 3 input channels to {channels}"):
            load_checkpoint(model, state)
        stem = "conv1.0.weight" if arguments else "conv1.weight"
        expected = timm.models.adapt_input_conv(channels, state[stem])
        torch.testing.assert_close(model.state_dict()[stem], expected, rtol=1e-6, atol=1e-7)

    def test_grey_images_give_what_colour_ones_of_three_equal_channels_gave(self, model):
        grey, x = ours(in_chans=1), torch.randn(1, 1, 32, 32)
        with pytest.warns(UserWarning, match="adapted"):
            load_checkpoint(grey, model.state_dict())
        torch.testing.assert_close(grey(x), model(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)

    def test_other_than_three_channels_in_the_checkpoint_are_an_error(self, model):
        with pytest.raises(RuntimeError, match=r"conv1.weight: \(64, 3, 7, 7\), in the checkpoint \(64, 1, 7, 7\)"):
            load_checkpoint(model, ours(in_chans=1).state_dict())


class TestDifferences:
    def damage(self, state: dict) -> dict:
        state = {**state, "extra.weight": torch.ones(1), "conv1.weight": torch.ones(64, 3, 3, 3)}
        del state["layer1.0.bn1.weight"], state["layer1.0.bn1.bias"]
        return state

    def test_all_are_listed_and_nothing_is_loaded(self, model, state):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError) as error:
            load_checkpoint(model, self.damage(state))
        assert str(error.value).splitlines() == [
            "load_checkpoint: expected the weights of this ResNet, got others in the mapping; "
            "build the model that they were made from, or pass strict=False to load what fits",
            "2 missing in the checkpoint:",
            "  layer1.0.bn1.weight, bias",
            "1 unknown to the model:",
            "  extra.weight",
            "1 of another shape:",
            "  conv1.weight: (64, 3, 7, 7), in the checkpoint (64, 3, 3, 3)",
        ]
        assert_loaded(model, before)

    def test_not_strict_loads_the_rest_and_reports(self, model, state):
        before = copy.deepcopy(model.state_dict())
        report = load_checkpoint(model, self.damage(state), strict=False)
        kept = ["conv1.weight", "layer1.0.bn1.weight", "layer1.0.bn1.bias"]
        assert_loaded(model, {**state, **{key: before[key] for key in kept}})
        assert report.missing_keys == kept[1:]
        assert report.unexpected_keys == ["extra.weight"]
        assert list(report.mismatched_keys) == kept[:1]
        assert len(report.loaded_keys) == len(state) - 3

    def test_another_architecture_is_a_short_list(self):
        with pytest.raises(RuntimeError, match="got others") as error:
            load_checkpoint(ResNet18Fused(), tv.resnext50_32x4d().state_dict())
        lines = str(error.value).splitlines()
        assert len(lines) < 40
        assert any(line.startswith("  layer4: ") for line in lines)
        assert any(line.startswith("  ... and ") for line in lines)

    @pytest.mark.parametrize("strict", [True, False])
    def test_nothing_that_fits_is_always_an_error(self, model, strict):
        with pytest.raises(RuntimeError, match="no entry fits"):
            load_checkpoint(model, {"embedding.weight": torch.ones(3)}, strict=strict)

    @pytest.mark.parametrize(
        ("checkpoint", "message"),
        [
            pytest.param({"epoch": 3, "optimizer": None}, "got epoch, optimizer in the mapping", id="no-weights"),
            pytest.param({}, "got nothing in the mapping", id="empty"),
        ],
    )
    def test_mappings_without_weights(self, model, checkpoint, message):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(model, checkpoint)


@pytest.mark.parametrize(
    "entries",
    [
        lambda state: {"state_dict": state, "model_ema": {}},
        lambda state: {"state_dict": state, "ema": {"decay": 0.99, "updates": 5}},
        lambda state: {"epoch": 3, "ema": {"shadow": state, "decay": 0.99}},
    ],
    ids=["empty", "without weights", "weights deeper"],
)
def test_averaged_weights_are_taken_where_there_are_any(entries):
    model = nn.Linear(2, 3)
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    load_checkpoint(model, entries(state))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
