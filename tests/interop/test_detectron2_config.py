"""What a detectron2 config says, what its defaults are, and which configs are of other networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nightseg.interop.detectron2_config import OURS, Detectron2Config, check_input, config_text, read_config
from nightseg.storage import Location, UserError

ZOO_BASE = """
MODEL:
  META_ARCHITECTURE: "GeneralizedRCNN"
  BACKBONE:
    NAME: "build_resnet_fpn_backbone"
  RESNETS:
    OUT_FEATURES: ["res2", "res3", "res4", "res5"]
  FPN:
    IN_FEATURES: ["res2", "res3", "res4", "res5"]
"""


def write(folder: Path, **changed: Any) -> Location:
    """A config with dotted keys set, double underscores for dots."""
    config = yaml.safe_load(ZOO_BASE)
    for key, value in ({"MODEL__META_ARCHITECTURE": "SemanticSegmentor"} | changed).items():
        place = config
        *path, last = key.split("__")
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return Location.of(folder / "config.yaml")


def test_a_config_of_the_zoo_follows_its_bases_to_detectron2s_defaults(tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    (tmp_path / "Base-RCNN-FPN.yaml").write_text(ZOO_BASE)
    (tmp_path / "coco" / "Base.yaml").write_text(
        '_BASE_: "../Base-RCNN-FPN.yaml"\nMODEL:\n  META_ARCHITECTURE: "PanopticFPN"\n  MASK_ON: True\n'
    )
    (tmp_path / "coco" / "r101.yaml").write_text('_BASE_: "Base.yaml"\nMODEL:\n  RESNETS:\n    DEPTH: 101\n')
    config = read_config(Location.of(tmp_path / "coco" / "r101.yaml"))
    assert config == Detectron2Config("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), True, "frozen", 2, 101)


def test_a_config_says_what_it_says(tmp_path: Path) -> None:
    config = read_config(
        write(
            tmp_path,
            INPUT__FORMAT="RGB",
            MODEL__PIXEL_MEAN=[123.675, 116.28, 103.53],
            MODEL__PIXEL_STD=[58.395, 57.12, 57.375],
            MODEL__RESNETS__STRIDE_IN_1X1=False,
            MODEL__RESNETS__NORM="SyncBN",
            MODEL__BACKBONE__FREEZE_AT=0,
        )
    )
    assert config == OURS._replace(norm="sync", freeze_at=0, depth=50, min_size_test=800)


def test_a_resnet_18_has_no_1x1_convolution_to_stride_in(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, MODEL__RESNETS__DEPTH=18, MODEL__RESNETS__RES2_OUT_CHANNELS=64))
    assert (config.stride_in_1x1, config.depth) == (False, 18)


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
@pytest.mark.parametrize("encoder", ["resnet18", "resnet152"])
def test_what_is_written_reads_back(tmp_path: Path, channels: str, encoder: str) -> None:
    config = Detectron2Config(
        channels, *((OURS.pixel_mean, OURS.pixel_std)), encoder == "resnet152", "batch", 3, int(encoder[6:])
    )
    if channels == "BGR":
        config = config._replace(pixel_mean=OURS.pixel_mean[::-1], pixel_std=(1.0, 1.0, 1.0))
    architecture = {"encoder": encoder, "pyramid_channels": 128, "head_channels": 64}
    (tmp_path / "out.yaml").write_text(config_text(config, architecture, 7))
    assert read_config(Location.of(tmp_path / "out.yaml")) == config._replace(
        num_classes=7, head_channels=64, pyramid_channels=128
    )
    written = yaml.safe_load((tmp_path / "out.yaml").read_text())["MODEL"]
    assert written["SEM_SEG_HEAD"]["NUM_CLASSES"] == 7
    assert written["FPN"]["OUT_CHANNELS"] == 128
    assert written["RESNETS"]["RES2_OUT_CHANNELS"] == (64 if encoder == "resnet18" else 256)


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"MODEL__META_ARCHITECTURE": "GeneralizedRCNN"}, "PanopticFPN and SemanticSegmentor can be"),
        ({"MODEL__BACKBONE__NAME": "build_mnasnet_backbone"}, "MODEL.BACKBONE.NAME is 'build_mnasnet_backbone'"),
        ({"MODEL__RESNETS__NUM_GROUPS": 32}, "MODEL.RESNETS.NUM_GROUPS is 32"),
        ({"MODEL__RESNETS__RES5_DILATION": 2}, "RES5_DILATION is 2"),
        ({"MODEL__RESNETS__DEFORM_ON_PER_STAGE": [False, True, True, True]}, "DEFORM_ON_PER_STAGE"),
        ({"MODEL__RESNETS__NORM": "GN"}, "NORM is 'GN'"),
        ({"MODEL__RESNETS__STRIDE_IN_1X1": "no"}, "STRIDE_IN_1X1 'no'"),
        ({"MODEL__FPN__FUSE_TYPE": "avg"}, "FUSE_TYPE is 'avg'"),
        ({"MODEL__FPN__NORM": "GN"}, "FPN.NORM is 'GN'"),
        ({"MODEL__FPN__IN_FEATURES": ["res3", "res4", "res5"]}, "FPN.IN_FEATURES"),
        ({"MODEL__SEM_SEG_HEAD__NAME": "DeepLabV3PlusHead"}, "SEM_SEG_HEAD.NAME"),
        ({"MODEL__SEM_SEG_HEAD__NORM": ""}, "SEM_SEG_HEAD.NORM"),
        ({"MODEL__SEM_SEG_HEAD__COMMON_STRIDE": 8}, "COMMON_STRIDE is 8"),
        ({"INPUT__FORMAT": "L"}, "INPUT.FORMAT is 'L'"),
        ({"MODEL__PIXEL_MEAN": [127.5, 127.5, 127.5]}, "pads with zeros"),
        ({"INPUT__FORMAT": "RGB"}, "PIXEL_MEAN"),  # whose default is in the order of BGR
        ({"MODEL__PIXEL_MEAN": [0.406, 0.456, 0.485]}, r"of colours in \[0, 1\]"),
        ({"INPUT__MIN_SIZE_TEST": -1}, "MIN_SIZE_TEST -1"),
        ({"INPUT__MIN_SIZE_TEST": [640, 800]}, "MIN_SIZE_TEST"),
        ({"INPUT__MAX_SIZE_TEST": 0}, "MAX_SIZE_TEST 0"),
        ({"INPUT__MAX_SIZE_TEST": None}, "MAX_SIZE_TEST None"),
        ({"INPUT__MIN_SIZE_TSET": 640}, "did you mean 'INPUT.MIN_SIZE_TEST'"),
        ({"MODEL__RESNETS__RES4_DILATION": 2}, "MODEL.RESNETS.RES4_DILATION is no key"),
        ({"MODEL__SEM_SEG_HEAD__PROJECT_CHANNELS": [48]}, "PROJECT_CHANNELS is no key"),
        ({"MODEL__SEM_SEG_HEAD__IGNORE_VALUE": "none"}, "IGNORE_VALUE 'none'"),
        ({"MODEL__PIXEL_MEAN": [1.0, 2.0]}, "three numbers"),
        ({"MODEL__PIXEL_STD": [1.0, 0.0, 1.0]}, "deviations are positive"),
    ],
)
def test_configs_of_other_networks_are_refused_by_the_key(tmp_path: Path, changed: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        read_config(write(tmp_path, **changed))


def test_texts_are_read_as_detectron2_reads_them(tmp_path: Path) -> None:
    config = read_config(
        write(
            tmp_path,
            MODEL__PIXEL_MEAN="(103.53, 116.28, 123.675)",
            MODEL__FPN__IN_FEATURES="('res2', 'res3', 'res4', 'res5')",
            INPUT__MIN_SIZE_TRAIN="(640, 672)",
            INPUT__CROP={"ENABLED": True, "TYPE": "absolute", "SIZE": [512, 1024]},
            INPUT__MIN_SIZE_TEST="512",
            INPUT__MAX_SIZE_TEST=2048,
            MODEL__SEM_SEG_HEAD__IGNORE_VALUE=0,
            MODEL__SEM_SEG_HEAD__LOSS_WEIGHT=0.5,
        )
    )
    assert config.pixel_mean == (103.53, 116.28, 123.675)
    assert config.shortest_edge == [512, 2048]
    assert (config.ignore_value, config.loss_weight) == (0, 0.5)


def test_frames_keep_their_size_where_the_shorter_side_is_0(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, INPUT__MIN_SIZE_TEST=0, INPUT__MAX_SIZE_TEST=0)).shortest_edge is None


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("MODEL: !!python/object/apply:os.system ['true']", "not plain YAML"),
        ("model: {_target_: x}", "LazyConfigs are not read"),
        ("[1]", "a mapping with MODEL"),
        ("MODEL: [", "not plain YAML"),
        ("MODEL: !!bool 7", "not plain YAML"),
        ("_BASE_: config.yaml", "refer to each other"),
        ("_BASE_: https://host/Base.yaml", "only files"),
        ("_BASE_: missing.yaml", "no config file"),
        ("#" * 1_000_001, "1000001 bytes"),
    ],
)
def test_files_that_are_no_configs_are_refused(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=part):
        read_config(Location.of(tmp_path / "config.yaml"))


def test_a_missing_config_says_where_it_usually_lies(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lies beside detectron2's checkpoints"):
        read_config(Location.of(tmp_path / "config.yaml"))


def test_the_means_of_both_orders_are_imagenets() -> None:
    check_input(OURS, "here")
    check_input(OURS._replace(channels="BGR", pixel_mean=OURS.pixel_mean[::-1]), "here")
    with pytest.raises(UserError, match="ImageNet"):
        check_input(OURS._replace(channels="BGR"), "here")
