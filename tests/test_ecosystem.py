"""What tools and users do to models of torchvision and timm goes on working once they are converted."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from resnext import fuse_, unfuse_, why_not_fused
from resnext.convert import FusedModule

from .block_cases import Results, buffers, forward_and_gradients, relative_errors
from .converted import MODELS, assert_same, images, pair, torchvisions, train_and_infer

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent

every_library = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def blocks(model: nn.Module) -> list[nn.Module]:
    return [stage[0] for stage in (model.layer1, model.layer2, model.layer3, model.layer4)]


# --- copies ---


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
@every_library
def test_copies_are_converted_and_independent(make, copied):
    model, _ = pair(make)
    other = copied(model)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert why_not_fused(other) == {}
    expected = train_and_infer(copy.deepcopy(model), images())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    results = train_and_infer(other, images())
    assert [name for name, value in expected.items() if not torch.equal(results[name], value)] == []


def test_whole_model_loads_in_another_process(tmp_path):
    """Which has imported neither this package nor the model's."""
    model, _ = pair()
    model.eval()
    with torch.no_grad():
        torch.save({"model": model, "images": images(), "logits": model(images())}, tmp_path / "model.pt")
    code = (
        "import sys, torch\nimport tests.conftest\n"
        "assert 'resnext' not in sys.modules\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "from resnext import why_not_fused\nassert why_not_fused(saved['model']) == {}\n"
        "with torch.no_grad():\n    logits = saved['model'](saved['images'])\n"
        "torch.testing.assert_close(logits, saved['logits'])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], cwd=ROOT, check=True, timeout=120)


def test_moving_average():
    """Each with its own conversion: what evaluation keeps of the model is nothing to its average."""
    results = []
    for model in pair():
        average = AveragedModel(model, use_buffers=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(2):
            optimizer.zero_grad()
            model(images() + step).square().sum().backward()
            optimizer.step()
            average.update_parameters(model)
            with torch.no_grad():
                average.eval()(images())
        update_bn([images(), images() + 1], average)
        with torch.no_grad():
            results.append({"average": average.eval()(images()), "model": model.eval()(images())} | buffers(average))
    assert_same(*results)


def test_moving_average_of_timm():
    utils = pytest.importorskip("timm.utils")
    results = []
    for model in pair():
        average = utils.ModelEmaV3(model, decay=0.5)
        model(images())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        average.update(model)
        with torch.no_grad():
            results.append({"average": average(images())} | buffers(average))
    assert_same(*results)


# --- who looks inside ---


def class_activation_map(model: nn.Module, layer: nn.Module) -> Results:
    """As Grad-CAM: the layer's maps weighted by the means of their gradients."""
    seen = {}
    handles = [
        layer.register_forward_hook(lambda _, inputs, output: seen.update(maps=output.detach())),
        layer.register_full_backward_hook(lambda _, inputs, outputs: seen.update(gradient=outputs[0])),
    ]
    logits = model.eval()(images().requires_grad_())
    logits.max(1).values.sum().backward()
    for handle in handles:
        handle.remove()
    weights = seen["gradient"].mean((2, 3), keepdim=True)
    return {**seen, "logits": logits.detach(), "cam": (weights * seen["maps"]).sum(1).relu()}


@pytest.mark.parametrize("layer", ["layer4", "layer4.0", "layer3.0.conv2"])
def test_class_activation_maps(layer):
    model, plain = pair()
    assert_same(*(class_activation_map(each, each.get_submodule(layer)) for each in (model, plain)))
    assert why_not_fused(model) == {}


def test_blocks_with_hooks_stay_fused():
    """On the block or on the stage; only the forward of whoever called them in its plan runs."""
    model, _ = pair()
    model.layer4.register_forward_hook(lambda *_: None)
    model.layer3[0].register_full_backward_hook(lambda *_: None)
    assert why_not_fused(model) == {"": "layer4 has a forward hook"}


def test_feature_extractors():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    getter = pytest.importorskip("torchvision.models._utils").IntermediateLayerGetter
    names = {"layer1": "one", "layer3": "three"}
    results = []
    for model in pair():
        model.eval()
        with torch.no_grad():
            maps = extraction.create_feature_extractor(model, {"layer2.0.conv2": "conv2", **names})(images())
            maps |= {f"getter: {name}": value for name, value in getter(model, names)(images()).items()}
        results.append(maps)
    assert list(results[0]) == ["one", "conv2", "three", "getter: one", "getter: three"]
    assert_same(*results)


def test_a_recorded_model_is_converted_too():
    """What ``torch.fx`` has written, with a forward that calls the layers by their dotted names."""
    _, plain = pair()
    model = torch.fx.symbolic_trace(copy.deepcopy(plain))
    report = fuse_(model)
    assert {each.kind for each in report.fused} == {"block", "convolution"}
    assert why_not_fused(model) == {}
    assert_same(train_and_infer(model, images()), train_and_infer(plain, images()))


def test_feature_maps_of_timm():
    timm = pytest.importorskip("timm")
    model, plain = pair(lambda: timm.create_model("test_resnet", features_only=True, out_indices=(1, 2, 4)))
    fused = {name: module for name, module in model.named_modules() if isinstance(module, FusedModule)}
    assert {"layer1.0", "layer2.0", "layer3.0", "layer4.0"} <= {*fused}
    assert model.feature_info.channels() == plain.feature_info.channels()
    for got, expected in zip(model(images()), plain(images()), strict=True):
        torch.testing.assert_close(got, expected)


def test_intermediate_maps_of_timm():
    model, plain = pair(MODELS["timm"])
    for each in (model, plain):
        each.eval()
    (last, maps), (plain_last, plain_maps) = (each.forward_intermediates(images(), [1, 3]) for each in (model, plain))
    torch.testing.assert_close(maps, plain_maps)
    torch.testing.assert_close(last, plain_last)
    torch.testing.assert_close(model.forward_head(model.forward_features(images())), plain(images()))


# --- who changes it ---


def structured(model: nn.Module) -> None:
    prune.ln_structured(model.layer2[0].conv2, "weight", 0.5, n=2, dim=0)


def everywhere(model: nn.Module) -> None:
    convs = [(module, "weight") for module in model.modules() if isinstance(module, nn.Conv2d)]
    prune.global_unstructured(convs, prune.L1Unstructured, amount=0.3)


@pytest.mark.parametrize("pruned", [structured, everywhere])
def test_pruning(pruned):
    """Masks are applied by hooks, so the pruned convolutions are called; made permanent, they need not be."""
    model, plain = pair()
    for each in (model, plain):
        pruned(each)
    assert "has a forward pre-hook" in why_not_fused(model)["layer2.0"]
    assert_same(train_and_infer(model, images()), train_and_infer(plain, images()))
    for module in [*model.modules(), *plain.modules()]:
        if hasattr(module, "weight_mask"):
            prune.remove(module, "weight")
    assert why_not_fused(model) == {}
    assert_same(train_and_infer(model, images()), train_and_infer(plain, images()))


def frozen(model: nn.Module) -> nn.Module:
    """For fine-tuning of the last stage: what comes before neither learns nor follows the batches."""
    for name in ("conv1", "bn1", "layer1", "layer2", "layer3"):
        model.get_submodule(name).requires_grad_(False).eval()
    return model


@every_library
def test_frozen_stages(make):
    results = []
    for model in pair(make):
        frozen(model.train())
        results.append({**forward_and_gradients(model, images()), **buffers(model)})
        assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"layer4", "fc"}
    assert_same(*results)


def test_frozen_batch_norms_of_timm():
    utils = pytest.importorskip("timm.utils")
    model, plain = pair(MODELS["timm"])
    for each in (model, plain):
        utils.freeze(each, ["bn1", "layer1", "layer2"], include_bn_running_stats=True)
    assert type(model.layer1[0].bn1).__name__ == "FrozenBatchNorm2d"
    assert why_not_fused(model) == {}
    assert_same(train_and_infer(model, images()), train_and_infer(plain, images()))


def of_torch(model: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def of_timm(model: nn.Module) -> nn.Module:
    return pytest.importorskip("timm.layers").convert_sync_batchnorm(model)


@pytest.mark.parametrize("first", [True, False], ids=["then fused", "after fusing"])
@pytest.mark.parametrize("convert", [of_torch, of_timm])
@every_library
def test_synchronised_batch_norms(make, convert, first):
    """In one process, where there is nothing to synchronise; `test_distributed` has two."""
    model, plain = pair(make)
    if first:
        unfuse_(model)
    model = convert(model)
    if first:
        fuse_(model)
    assert not any(type(module) is nn.BatchNorm2d for module in model.modules())
    assert why_not_fused(model) == {}
    assert_same(train_and_infer(model, images()), train_and_infer(plain, images()))


def test_heads_and_stems_are_replaced():
    """For other classes and other images, as every tutorial on fine-tuning does."""
    results = []
    for model in pair():
        torch.manual_seed(1)
        model.fc = nn.Linear(model.fc.in_features, 4).double()
        model.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False).double()
        model.maxpool = nn.Identity()
        results.append(train_and_infer(model, images()[:, :1]))
    assert_same(*results)
    assert results[0]["inference"].shape == (3, 4)


def test_classifier_of_timm_is_replaced():
    results = []
    for model in pair(MODELS["timm"]):
        torch.manual_seed(1)
        model.reset_classifier(4)
        results.append(train_and_infer(model.double(), images()))
    assert_same(*results)


def test_reparametrisation_of_timm():
    """RepVGG's branches become one convolution each, for inference."""
    byobnet = pytest.importorskip("timm.models.byobnet")
    blocks = tuple(byobnet.ByoBlockCfg(type="rep", d=1, c=c, s=2, gs=4) for c in (16, 32))
    config = byobnet.ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=16)
    model, plain = pair(lambda: byobnet.ByobNet(config, num_classes=10))
    model.eval()
    plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images()), plain(images()))
        model = pytest.importorskip("timm.utils").reparameterize_model(model)
        torch.testing.assert_close(model(images()), plain(images()))
        fuse_(model)
        torch.testing.assert_close(model(images()), plain(images()))


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_made_without_memory(assign):
    """On the meta device, as large models are made before their weights are there."""
    _, plain = pair(dtype=torch.float32)
    with torch.device("meta"):
        model = torchvisions()
    fuse_(model)
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(copy.deepcopy(plain.state_dict()), assign=assign)
    assert why_not_fused(model) == {}
    model.double()
    assert_same(train_and_infer(model, images()), train_and_infer(plain.double(), images()))


# --- who calls it in other ways ---


def test_functional_ensemble():
    """Parameters of several models stacked, and one call for all of them."""
    results = []
    for library in range(2):
        torch.manual_seed(0)
        models = [pair()[library].eval() for _ in range(2)]
        parameters, state = torch.func.stack_module_state(models)
        call = torch.func.vmap(functools.partial(torch.func.functional_call, models[0]), in_dims=((0, 0), None))
        with torch.no_grad():
            results.append({"out": call((parameters, state), images())})
    assert_same(*results)


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_checkpointing_around_blocks(reentrant):
    """Backward calls each block again, and running statistics follow twice, as they do without conversion."""
    results = []
    for model in pair():
        x = images().requires_grad_()
        out = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        for block in blocks(model)[:2]:
            out = checkpoint(block, out, use_reentrant=reentrant)
        out = checkpoint_sequential([model.layer3, model.layer4], 2, out, use_reentrant=reentrant)
        out.square().sum().backward()
        results.append({"dx": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}})
        results[-1] |= buffers(model)
    assert_same(*results)
    assert results[0]["layer2.0.bn1.num_batches_tracked"] == 2


def test_checkpointing_of_timm():
    model, plain = pair(MODELS["timm"])
    for each in (model, plain):
        each.set_grad_checkpointing()
    assert set(why_not_fused(model)) <= {""}  # the blocks stay fused
    assert_same(train_and_infer(model, images()), train_and_infer(plain, images()))


def test_autocast_and_gradient_scaling():
    """A step that overflows is skipped; the others follow the plain model as closely as bfloat16 allows."""
    model, plain = pair(dtype=torch.float32)
    exact = copy.deepcopy(plain).double()
    runs = []
    for each in (model, plain, exact):
        dtype = next(each.parameters()).dtype
        optimizer, scaler = torch.optim.SGD(each.parameters(), lr=0.01), torch.amp.GradScaler("cpu", init_scale=2.0**8)
        results = {}
        for step, factor in enumerate((1.0, float("inf"), 1.0)):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
                logits = each(images(dtype) + step)
                loss = F.cross_entropy(logits.float() if dtype == torch.float32 else logits, torch.arange(3)) * factor
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            results[f"logits {step}"] = logits.detach()
        assert scaler.get_scale() == 2.0**7
        runs.append(results | {name: p.detach() for name, p in each.named_parameters()})
    results, expected, exact_results = runs
    allowed = 2 * max(relative_errors(expected, exact_results).values())
    wrong = {name: error for name, error in relative_errors(results, exact_results).items() if not error <= allowed}
    assert not wrong, f"allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_channels_last(dtype):
    """Twice the error of the plain model, and one unit of the last place."""
    model, plain = (each.eval() for each in pair())
    with torch.no_grad():
        exact = plain(images())
        model, plain = (each.to(dtype).to(memory_format=torch.channels_last) for each in (model, plain))
        x = images(dtype).to(memory_format=torch.channels_last)
        errors = [(each(x).double() - exact).abs().max() for each in (model, plain)]
    assert why_not_fused(model, x) == {}
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * exact.abs().max()


def test_threads_share_a_model():
    """The same bits, also while the first calls fold batch norm."""
    model, _ = pair()
    model.eval()
    batches = [images() + index for index in range(8)]

    @torch.inference_mode()
    def call(x: Tensor) -> Tensor:
        return model(x)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(call, batches))
    for x, result in zip(batches, results, strict=True):
        assert torch.equal(result, call(x))


def test_graphed_callables(cuda):
    """Forward and backward as CUDA graphs."""
    model, plain = (each.to(cuda) for each in pair(dtype=torch.float32))
    x = images(torch.float32).to(cuda)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(model), (x,))
    exact = forward_and_gradients(plain.double(), x.double())
    allowed = 2 * max(relative_errors(forward_and_gradients(model, x), exact).values())
    wrong = {
        n: error for n, error in relative_errors(forward_and_gradients(graphed, x), exact).items() if error > allowed
    }
    assert not wrong, f"allowed {allowed:.3g}"


# --- backbones ---


class Output(nn.Module):
    """The map called "out" of a model's several ones."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)["out"]


def test_segmentation():
    """Dilated stages, and a head that reads two of them."""
    models = pytest.importorskip("torchvision.models.segmentation")
    getter = pytest.importorskip("torchvision.models._utils").IntermediateLayerGetter

    def make() -> nn.Module:
        maps = getter(torchvisions(replace_stride_with_dilation=[False, True, True]), {"layer4": "out"})
        return models.FCN(maps, models.fcn.FCNHead(256, 5))

    model, plain = pair(make)
    for each in (model, plain):
        each.classifier[3].p = 0.0
    results = [train_and_infer(Output(each), images()) for each in (model, plain)]
    assert_same(*results)


def test_detection():
    """A pyramid on a backbone whose batch norms are constants."""
    utils = pytest.importorskip("torchvision.models.detection.backbone_utils")
    misc = pytest.importorskip("torchvision.ops.misc")

    def make() -> nn.Module:
        backbone = torchvisions(norm_layer=misc.FrozenBatchNorm2d)
        return utils._resnet_fpn_extractor(backbone, trainable_layers=3)

    model, plain = pair(make)
    results = []
    for each in (model, plain):
        maps = each(images())
        sum(value.square().sum() for value in maps.values()).backward()
        results.append(
            {**{name: value.detach() for name, value in maps.items()}}
            | {f"d {name}": p.grad for name, p in each.named_parameters() if p.grad is not None}
        )
    assert {"0", "3", "pool", "d body.layer4.0.conv1.weight"} <= {*results[0]}
    assert_same(*results)
