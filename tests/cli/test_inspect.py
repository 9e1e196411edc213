from command_line import Cli
from trained_model import Trained

from cifarx_serve.backends.registry import read_spec


def test_json_is_the_spec(cli: Cli, trained: Trained) -> None:
    for path in (trained.checkpoint, trained.onnx, trained.torchscript):
        spec = cli("inspect", path, "--json").json
        assert spec["model"] == "lzh"
        assert spec["class_names"] == list(read_spec(path).class_names)
        assert spec["training"]["data"]["kind"] == "builtin"
        assert (spec["parity"] is None) == (path == trained.checkpoint)


def test_text_says_what_matters(cli: Cli, trained: Trained) -> None:
    out = cli("inspect", trained.onnx).out
    for words in ("lzh, fp32", "airplane", "(N, 3, 32, 32)", "drawings", "test accuracy", "agreement", "sha256"):
        assert words in out


def test_wrong_files(cli: Cli, tmp_path: object) -> None:
    assert "no such file" in cli("inspect", "absent.onnx").error
    assert cli("inspect", str(tmp_path)).status == 2
