"""The keys of a file are matched with those of a network, whatever prefixes they have."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve.errors import UsageError
from cifarx_train.checkpoints.external.key_matching import (
    describe_mismatches,
    list_names,
    match_keys,
    wrong_shapes,
)

OWN = ["conv1.weight", "bn1.weight", "bn1.num_batches_tracked", "layer1.0.conv1.weight", "fc.weight", "fc.bias"]
LZH = ["model.0.weight", "model.0.bias", "model.2.weight", "model.8.bias"]


def prefixed(prefix: str, keys: list[str] = OWN) -> list[str]:
    return [prefix + key for key in keys]


@pytest.mark.parametrize(
    "prefix",
    [
        *("", "module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "my_net.", "a.b.c."),
        *("module._orig_mod.", "_orig_mod.module.", "model._orig_mod.", "net.model.module."),
    ],
)
def test_a_prefix_of_all_keys(prefix: str) -> None:
    match = match_keys(OWN, prefixed(prefix))
    assert match.keys == {key: prefix + key for key in OWN}
    assert not (match.missing or match.unexpected or match.left_out or match.alternatives)


@pytest.mark.parametrize("prefix", ["model1.", "module1.", "", "net.model.", "module.model."])
def test_a_network_whose_keys_have_a_prefix_themselves(prefix: str) -> None:
    file = [prefix + key.removeprefix("model.") for key in LZH]
    match = match_keys(LZH, file)
    assert match.keys == dict(zip(LZH, file, strict=True))
    assert not (match.distance or match.left_out)


@pytest.mark.parametrize(
    "file",
    [
        ["_orig_mod.conv1.weight", "_orig_mod.bn1.weight", "layer1.0.conv1.weight", "fc.weight", "fc.bias"],
        ["conv1.weight", "bn1.weight", "layer1._orig_mod.0.conv1.weight", "fc.weight", "fc.bias"],
        ["conv1.weight", "bn1.weight", "layer1.module.0.conv1.weight", "fc.weight", "fc.bias"],
        ["model.conv1.weight", "model.bn1.weight", "model.layer1.0.conv1.weight", "fc.weight", "fc.bias"],
        ["backbone.conv1.weight", "backbone.bn1.weight", "net.layer1.0.conv1.weight", "fc.weight", "fc.bias"],
    ],
)
def test_a_prefix_of_a_part_of_the_keys(file: list[str]) -> None:
    match = match_keys(OWN, file)
    assert sorted(match.keys.values()) == sorted(file)
    assert not (match.distance or match.left_out)


def test_a_counter_may_be_missing() -> None:
    file = [key for key in OWN if "num_batches" not in key]
    match = match_keys(OWN, file)
    assert not match.distance
    assert "bn1.num_batches_tracked" not in match.keys


@pytest.mark.parametrize(
    "extra",
    [
        *("n_averaged", "total_ops", "total_params", "layer1.0.total_ops", "loss.weight", "criterion.weight"),
        *("loss_fn.pos_weight", "ce_loss.weight", "aux1.conv.weight", "AuxLogits.fc.weight", "aux_head.bias"),
        *("train_acc.total", "val_accuracy.tp", "metrics.f1", "bn2.num_batches_tracked"),
    ],
)
def test_what_training_adds_is_left_out(extra: str) -> None:
    match = match_keys(OWN, [*OWN, extra])
    assert match.left_out == [extra]
    assert not match.distance


@pytest.mark.parametrize("extra", ["mean", "loss.weight", "head2.weight", "ema_decay", "projector.0.weight"])
def test_what_is_outside_of_the_network_is_left_out(extra: str) -> None:
    match = match_keys(OWN, [*prefixed("model."), extra])
    assert match.left_out == [extra]
    assert not match.distance


@pytest.mark.parametrize("extra", ["layer1.0.se.fc.weight", "fc2.weight", "conv1.bias", "layer2.0.conv1.weight"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_another_layer_of_the_network_is_not_left_out(extra: str, prefix: str) -> None:
    match = match_keys(OWN, prefixed(prefix, [*OWN, extra]))
    assert match.unexpected == [prefix + extra]
    assert match.distance == 1


# --- several networks in one state dict


def test_averaged_weights_in_the_same_state_dict_are_preferred() -> None:
    file = [*prefixed("model."), *prefixed("ema.module."), "ema.n_averaged", "loss.weight"]
    match = match_keys(OWN, file)
    assert (match.prefix, match.alternatives) == ("ema.", ["model."])  # `module` is dropped
    assert match.keys["fc.bias"] == "ema.module.fc.bias"
    assert match.left_out == ["ema.n_averaged", "loss.weight"]
    assert match_keys(OWN, file, "model").keys["fc.bias"] == "model.fc.bias"


def test_several_networks_are_not_guessed() -> None:
    file = [*prefixed("student."), *prefixed("teacher.")]
    with pytest.raises(UsageError, match=r"x\.pth contains the network several times \(student, teacher\)"):
        match_keys(OWN, file, path="x.pth")
    assert match_keys(OWN, file, "teacher").prefix == "teacher."
    with pytest.raises(UsageError, match=r"several times"):
        match_keys(OWN, file, "other")


def test_a_part_of_another_network_is_no_alternative() -> None:
    match = match_keys(OWN, [*prefixed("net."), "other.fc.weight", "other.fc.bias"])
    assert (match.prefix, match.alternatives, match.left_out) == ("net.", [], ["other.fc.weight", "other.fc.bias"])


# --- messages


def test_mismatches_are_listed_with_how_many_more() -> None:
    own = [f"layer{number}.weight" for number in range(9)]
    match = match_keys([*own, "fc.weight"], ["fc.weight", "x", "y"])
    assert describe_mismatches(match, ["fc.weight has shape [1] instead of [2]"]) == (
        "missing layer0.weight, layer1.weight, layer2.weight, layer3.weight, layer4.weight and 4 more; "
        "unexpected x, y; fc.weight has shape [1] instead of [2]"
    )


def test_five_names_and_how_many_more() -> None:
    assert list_names(list("abc")) == "a, b, c"
    assert list_names(list("abcde")) == "a, b, c, d, e"
    assert list_names(list("abcdefg")) == "a, b, c, d, e and 2 more"


def test_wrong_shapes_name_both() -> None:
    match = match_keys(["fc.weight", "fc.bias"], ["net.fc.weight", "net.fc.bias"])
    own = {"fc.weight": (10, 512), "fc.bias": (10,)}
    file = {"net.fc.weight": (3, 512), "net.fc.bias": (10,)}
    assert wrong_shapes(match, own, file) == ["net.fc.weight has shape [3, 512] instead of [10, 512]"]


SEGMENTS = st.sampled_from(["a", "b", "0", "1", "weight", "bias", "module", "model", "_orig_mod", "ema"])
NAMES = st.lists(st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join), unique=True, max_size=8)


@given(NAMES, NAMES)
def test_every_key_is_accounted_for_once(own: list[str], file: list[str]) -> None:
    try:
        match = match_keys(own, file)
    except UsageError:
        return
    required = [key for key in own if not key.endswith("num_batches_tracked")]
    assert sorted([*match.keys, *match.missing]) == sorted(required)
    accounted = [*match.keys.values(), *match.unexpected, *match.left_out]
    assert len(accounted) == len(set(accounted))
    assert set(accounted) <= set(file)
    if not match.alternatives:
        assert set(accounted) == set(file)
