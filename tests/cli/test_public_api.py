import subprocess
import sys

import pytest

import cifarx
from tests.support.trained_model import Trained


def test_every_public_name_can_be_imported() -> None:
    for name in cifarx.__all__:
        assert getattr(cifarx, name) is not None
        assert name in dir(cifarx)
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = cifarx.nothing_like_this


def test_the_import_is_lazy() -> None:
    code = "import sys, cifarx; sys.exit(bool({'torch', 'numpy', 'onnxruntime', 'typer'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_load_returns_a_predictor(trained: Trained) -> None:
    import numpy as np

    with cifarx.load(trained.onnx) as predictor:
        prediction = predictor.predict(np.zeros((32, 32, 3), np.uint8), top_k=2)
    assert len(prediction.top) == 2
    assert prediction.score == prediction.top[0].score
