import pytest

from cifarx.options import resolve_on_error
from cifarx_serve.errors import UsageError
from tests.support.command_line import Cli
from tests.support.trained_model import Trained


def test_unreadable_images_raise_by_default() -> None:
    assert resolve_on_error(None, None) == "raise"
    assert resolve_on_error("raise", None) == "raise"
    assert resolve_on_error("skip", None) == "skip"


def test_the_former_name_of_on_error_still_works() -> None:
    assert resolve_on_error(None, "refuse") == "raise"
    assert resolve_on_error(None, "skip") == "skip"


def test_both_names_of_on_error_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--on-error and --broken were both given: --broken is the old name"):
        resolve_on_error("skip", "skip")


@pytest.mark.parametrize("command", ["train", "export", "verify", "bench"])
def test_help_lists_on_error_and_hides_its_former_name(cli: Cli, command: str) -> None:
    helped = cli(command, "--help").out
    assert "--on-error <raise|skip>" in helped
    assert "--broken" not in helped


def test_either_name_skips_unreadable_images(cli: Cli, trained: Trained) -> None:
    """An unknown dataset is the next thing that is wrong, so both options were accepted."""
    for option in ("--on-error", "--broken"):
        result = cli("verify", trained.onnx, "--ckpt", trained.checkpoint, option, "skip", "--data", "nowhere")
        assert result.status == 2
        assert "nowhere" in result.error
    both = cli("verify", trained.onnx, "--ckpt", trained.checkpoint, "--on-error", "skip", "--broken", "skip")
    assert both.status == 2
    assert both.error.startswith("error: --on-error and --broken were both given: ")
