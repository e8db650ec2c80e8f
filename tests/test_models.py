"""The models beside torchvision's and timm's: same structure, same weights, same results, same behaviour as modules."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

import resnext
from resnext import GroupedConv2d, ResNet
from resnext.blocks import BasicBlock, Bottleneck

tv = pytest.importorskip("torchvision.models")
resnet = tv.resnet

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# The builders that torchvision has too, and the class of what they return.
VARIANTS = {
    "resnet18": "ResNet18Fused",
    "resnet34": "ResNet34Fused",
    "resnet50": "ResNet50Fused",
    "resnet101": "ResNet101Fused",
    "resnet152": "ResNet152Fused",
    "resnext50_32x4d": "ResNeXt50Fused",
    "resnext101_32x8d": "ResNeXt101_32x8dFused",
    "resnext101_64x4d": "ResNeXt101_64x4dFused",
    "wide_resnet50_2": "ResNet50Fused",
    "wide_resnet101_2": "ResNet101Fused",
}


def small_pair(**kwargs) -> tuple[ResNet, resnet.ResNet]:
    """A ResNeXt of four blocks, ours and torchvision's, with the same weights."""
    arguments = {"layers": [1, 1, 1, 1], "num_classes": 10, "groups": 32, "width_per_group": 4, **kwargs}
    ours, plain = ResNet(Bottleneck, **arguments), resnet.ResNet(resnet.Bottleneck, **arguments)
    ours.load_state_dict(plain.state_dict())
    return ours, plain


@pytest.fixture
def small() -> ResNet:
    return small_pair()[0]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 48, 40)


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """Two photographs as torchvision feeds them to ResNeXt-50: (2, 3, 224, 224)."""
    datasets = pytest.importorskip("sklearn.datasets")
    preprocess = tv.ResNeXt50_32X4D_Weights.IMAGENET1K_V1.transforms()
    photos = datasets.load_sample_images().images
    return torch.stack([preprocess(torch.tensor(photo).permute(2, 0, 1)) for photo in photos])


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The logits and every parameter's gradient of a classification loss."""
    logits = model(x)
    F.cross_entropy(logits, torch.arange(len(x))).backward()
    return {"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def in_both_layouts(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [copy.deepcopy(model).to(memory_format=each)(x.to(memory_format=each)) for each in LAYOUTS.values()]


@torch.no_grad()
def assert_same_logits(ours: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """Ours, in either layout, within twice the error of PyTorch's less accurate layout, plus one ulp.

    Through a whole network there is no useful a-priori bound; the error that the same network makes in the same
    precision, only with another order of summation, is the measure. Twice: two errors of one size and any sign.
    """
    exact = copy.deepcopy(plain).double()(x.double())
    results, baseline = in_both_layouts(ours, x), in_both_layouts(plain, x)
    ulp = torch.finfo(baseline[0].dtype).eps * exact.abs().max()
    allowed = 2 * max((logits.double() - exact).abs().max() for logits in baseline) + ulp
    for logits in results:
        assert logits.dtype == baseline[0].dtype
        error = (logits.double() - exact).abs().max()
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


class TestStructure:
    @pytest.mark.parametrize("name", VARIANTS)
    def test_equals_torchvisions(self, name):
        class_name = VARIANTS[name]
        with torch.device("meta"):
            ours, plain = getattr(resnext, name)(), getattr(tv, name)()
        shapes, plain_shapes = ({k: v.shape for k, v in m.state_dict().items()} for m in (ours, plain))
        assert isinstance(ours, getattr(resnext, class_name))
        assert type(ours).__name__ == class_name
        assert list(shapes.items()) == list(plain_shapes.items())
        children = [name for name, _ in plain.named_modules()]
        assert [name for name, _ in ours.named_modules()] == children
        threes = [m for m in ours.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert threes
        assert all(isinstance(m, GroupedConv2d) == (m.groups > 1) for m in threes)

    @pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
    def test_same_seed_same_initial_weights(self, name):
        models = []
        for library in (resnext, tv):
            torch.manual_seed(1)
            models.append(getattr(library, name)(zero_init_residual=True).state_dict())
        assert all(torch.equal(models[0][key], models[1][key]) for key in models[1])

    def test_zero_init_residual_starts_as_identity(self):
        block = ResNet(Bottleneck, [2, 1, 1, 1], zero_init_residual=True).layer1[1].eval()
        x = torch.randn(1, 256, 5, 5).relu()
        assert torch.equal(block(x), x)

    def test_other_norm_layer(self, images):
        ours, plain = small_pair(norm_layer=lambda channels: nn.GroupNorm(8, channels))
        assert not any(isinstance(m, nn.BatchNorm2d) for m in ours.modules())
        assert_same_logits(ours, plain, images)

    def test_replace_stride_with_dilation(self, images):
        ours, plain = small_pair(layers=[1, 1, 2, 2], replace_stride_with_dilation=[False, True, True])
        convs = [[m for m in model.modules() if isinstance(m, nn.Conv2d)] for model in (ours, plain)]
        for a, b in zip(*convs, strict=True):
            assert repr(a) == repr(b)
        ours.eval()
        plain.eval()
        assert_same_logits(ours, plain, images)


class TestBadArguments:
    def test_weights_of_another_kind(self):
        with pytest.raises(TypeError, match=r"expected None, a state_dict .*, got 'IMAGENET1K_V1'; torchvision's"):
            resnext.resnet18(weights="IMAGENET1K_V1")

    def test_weights_of_another_model(self):
        with torch.device("meta"):
            state = tv.resnet34().state_dict()
        with torch.device("meta"), pytest.raises(RuntimeError, match="Unexpected key"):
            resnext.resnet18(weights=state)


class TestWeights:
    @pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
    def test_strict_load_both_ways(self, name):
        ours, plain = getattr(resnext, name)(), getattr(tv, name)()
        ours.load_state_dict(plain.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
        nn.init.uniform_(ours.fc.weight)
        plain.load_state_dict(ours.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))

    def test_timm_strict_load_both_ways(self):
        timm = pytest.importorskip("timm")
        ours, theirs = resnext.resnext50_32x4d(), timm.create_model("resnext50_32x4d", pretrained=False)
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(1, 3, 64, 64)
        ours.eval()
        theirs.eval()
        assert_same_logits(ours, theirs, x)

    def test_weights_argument(self):
        state = tv.resnet18(num_classes=10).state_dict()

        class Entry:
            def get_state_dict(self, progress):
                assert progress is False
                return state

        for model in (
            resnext.resnet18(weights=state, num_classes=10),
            resnext.resnet18(weights=Entry(), progress=False, num_classes=10),
        ):
            assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    def test_save_and_load(self, small):
        file = io.BytesIO()
        torch.save(small.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        other = small_pair()[1]
        other.load_state_dict(loaded)
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), small.parameters(), strict=True))

    def test_half(self):
        ours, plain = small_pair()
        state, plain_state = ours.half().state_dict(), plain.half().state_dict()
        assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in plain_state.items()}
        assert all(torch.equal(value, plain_state[key]) for key, value in state.items())


class TestResults:
    def test_resnext50_on_photos(self, photos):
        """Logits on photographs, both layouts. Random weights; the batch norms have the photographs' own statistics."""
        plain = tv.resnext50_32x4d(norm_layer=lambda channels: nn.BatchNorm2d(channels, momentum=1.0))
        with torch.no_grad():
            plain(photos)
        plain.eval()
        ours = resnext.ResNeXt50Fused().eval()
        ours.load_state_dict(plain.state_dict())
        assert_same_logits(ours, plain, photos)
        assert torch.equal(ours(photos).argmax(1), plain(photos).argmax(1))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
    def test_16_bit(self, dtype, images):
        ours, plain = small_pair()
        ours, plain = ours.to(dtype), plain.to(dtype)
        assert ours(images.to(dtype)).dtype == dtype
        assert_same_logits(ours, plain, images.to(dtype))

    @pytest.mark.parametrize(
        "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
    )
    def test_on_gpu(self, cuda, dtype, images):
        ours, plain = (model.to(cuda, dtype) for model in small_pair())
        assert_same_logits(ours, plain, images.to(cuda, dtype))

    def test_autocast(self, images):
        ours, plain = small_pair()
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(images).dtype == torch.bfloat16
            assert_same_logits(ours, plain, images)  # float64, the measure of both, is exempt from autocast

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_training_gradients(self, layout, images):
        """Logits, every parameter's gradient and the running statistics of one training step.

        ReLU and max pooling make the gradient jump where rounding moves a value across 0 or past its neighbour; smooth
        functions in their place keep the difference at the size of rounding. The relative error of each tensor is
        compared with PyTorch's worst.
        """
        ours, plain = small_pair()
        for model in (ours, plain):
            model.maxpool = nn.AvgPool2d(3, 2, 1)
            for module in [m for m in model.modules() if hasattr(m, "relu")]:
                module.relu = nn.SiLU(inplace=True)
        double = copy.deepcopy(plain).double()
        exact = {**gradients(double, images.double()), **running_statistics(double)}

        def errors(model: nn.Module, layout: torch.memory_format) -> dict[str, float]:
            model = copy.deepcopy(model).to(memory_format=layout)
            result = {**gradients(model, images.to(memory_format=layout)), **running_statistics(model)}
            assert result.keys() == exact.keys()
            return {name: float((result[name].double() - v).norm() / v.norm()) for name, v in exact.items()}

        allowed = 2 * max(max(errors(plain, each).values()) for each in LAYOUTS.values())
        wrong = {name: error for name, error in errors(ours, LAYOUTS[layout]).items() if not error <= allowed}
        assert not wrong, f"allowed {allowed:.3g}"

    def test_basic_block(self, images):
        ours = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
        plain = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
        plain.load_state_dict(ours.state_dict())
        assert_same_logits(ours, plain, images)


class TestAsModule:
    """What users and tools do with a model. The same model computes the same bits, however it is carried or called."""

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
    )
    def test_copies(self, copied, images):
        model = resnext.ResNet18Fused(num_classes=10).eval()
        other = copied(model)
        assert type(other) is type(model)
        assert torch.equal(other(images), model(images))

    def test_moving_average(self, small, images):
        average = AveragedModel(small, use_buffers=True)
        average.update_parameters(small)
        with torch.no_grad():
            before = small.conv1.weight.clone()
            small.conv1.weight.add_(1)
        average.update_parameters(small)
        torch.testing.assert_close(average.module.conv1.weight, before + 0.5)
        small.load_state_dict(average.module.state_dict())
        assert torch.equal(average.eval()(images), small.eval()(images))

    def test_feature_extractor(self, small, images):
        extraction = pytest.importorskip("torchvision.models.feature_extraction")
        small.eval()
        names = ["layer1", "layer2.0.conv2", "layer4"]
        features = extraction.create_feature_extractor(small, names)(images)
        wanted = {}
        modules = {small.get_submodule(name): name for name in names}
        # A hook for all modules: like the traced model, this one then runs all its modules one by one.
        handle = register_module_forward_hook(
            lambda module, _, output: wanted.update({modules[module]: output}) if module in modules else None
        )
        small(images)
        handle.remove()
        assert features.keys() == wanted.keys()
        assert all(torch.equal(features[name], wanted[name]) for name in names)

    def test_forward_hooks_fire_once_and_can_change_outputs(self, images):
        ours, plain = small_pair()
        fired = []
        for name, module in ours.named_modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                module.register_forward_hook(lambda *_, name=name: fired.append(name))
        plain.eval()
        ours.eval()
        unchanged = ours(images)
        assert sorted(fired) == sorted(
            n for n, m in plain.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))
        )
        for model in (ours, plain):
            model.layer2[0].conv2.register_forward_hook(lambda module, args, output: output * 0.5)
        assert_same_logits(ours, plain, images)
        assert not torch.allclose(ours(images), unchanged)

    def test_backward_hooks_and_input_gradient(self, small, images):
        """Class activation maps take a layer's output and its gradient, saliency maps the input's gradient."""
        seen = {}
        small.layer3[0].conv2.register_full_backward_hook(
            lambda _, inputs, outputs: seen.update(dx=inputs[0], dy=outputs[0])
        )
        small.eval()
        images.requires_grad_()
        small(images)[:, 3].sum().backward()
        assert seen["dx"].shape == (2, 512, 6, 5)
        assert seen["dy"].shape == (2, 512, 3, 3)
        assert images.grad.abs().sum() > 0

    def test_sync_batchnorm(self, small, images):
        small.eval()
        keys, logits = list(small.state_dict()), small(images)
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in small.modules())
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(small)
        assert sum(isinstance(m, nn.SyncBatchNorm) for m in converted.modules()) == norms
        assert list(converted.state_dict()) == keys
        assert torch.equal(converted(images), logits)

    def test_compile(self, small, images):
        other = copy.deepcopy(small)
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        expected = gradients(small, images)
        logits = compiled(images)
        F.cross_entropy(logits, torch.arange(len(images))).backward()
        assert torch.equal(logits, expected.pop("logits"))
        assert all(torch.equal(p.grad, expected[name]) for name, p in other.named_parameters())

    def test_export(self, small, images):
        small.eval()
        batch = torch.export.Dim("batch", min=1, max=64)
        more = torch.cat([images, -images, images[:1]])
        with torch.no_grad():
            program = torch.export.export(small, (images,), dynamic_shapes={"x": {0: batch}})
            torch.testing.assert_close(program.module()(more), small(more))
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert sum("conv_affine" in target for target in targets) == 16  # three in each block, and its shortcut

    def test_flop_counter(self, images):
        counts = []
        for model in small_pair():
            with FlopCounterMode(display=False) as counter:
                model(images).sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0

    def test_torchinfo(self):
        torchinfo = pytest.importorskip("torchinfo")
        tables = []
        for model in (resnext.ResNeXt50Fused(), tv.resnext50_32x4d()):
            info = torchinfo.summary(model, (1, 3, 64, 64), verbose=0)
            rows = [
                (
                    layer.class_name.removeprefix("Grouped"),
                    layer.var_name,
                    layer.output_size,
                    layer.num_params,
                    layer.macs,
                )
                for layer in info.summary_list[1:]
            ]
            tables.append((rows, info.total_params, info.total_mult_adds, info.total_output_bytes))
        assert tables[0] == tables[1]
