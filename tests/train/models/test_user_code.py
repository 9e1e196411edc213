import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from cifarx_serve.errors import UsageError
from cifarx_train.models.user_code import (
    is_reference,
    load_user_module,
    load_user_object,
    parse_reference,
    running_user_code,
    source_sha256,
)
from tests.support.user_code import write_networks


def error_of(reference: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_user_object(reference)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "module", "name", "portable"),
    [
        ("model.py:Net", "model.py", "Net", "model.py:Net"),
        ("nets/v1.2/model.py:nets.Small", "nets/v1.2/model.py", "nets.Small", "model.py:nets.Small"),
        ("package.module:make", "package.module", "make", "package.module:make"),
        ("model.py", "model.py", "", "model.py"),
        ("C:\\nets\\model.py:Net", "C:\\nets\\model.py", "Net", None),
    ],
)
def test_a_reference_has_a_module_and_a_name(text: str, module: str, name: str, portable: str | None) -> None:
    reference = parse_reference(text)
    assert (reference.module, reference.name) == (module, name)
    if portable:
        assert reference.portable == portable


def test_names_of_the_registry_are_no_references() -> None:
    assert not is_reference("resnet18")
    assert is_reference("model.py")
    assert is_reference("package.module:Net")


@pytest.mark.parametrize("text", ["model.py:a b", "a-b:Net", ":Net", "package..module:Net", "x.py:a()"])
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="does not name code: write "):
        parse_reference(text)


def test_a_file_can_import_its_neighbors(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "width.py").write_text("WIDTH = 8")
    (folder / "model.py").write_text(
        "from width import WIDTH\ndef make():\n    import late\n    return WIDTH + late.MORE\n"
    )
    (folder / "late.py").write_text("MORE = 1")
    before = list(sys.path)
    make = load_user_object("project/model.py:make")
    with running_user_code(parse_reference("project/model.py:make")):
        assert make() == 9
    assert sys.path == before


def test_a_file_may_change_the_search_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = list(sys.path)
    (tmp_path / "model.py").write_text("import sys\nsys.path.pop(0)\nNet = 3\n")
    assert load_user_object(f"{tmp_path}/model.py:Net") == 3
    assert sys.path == before


def test_a_file_hides_no_module_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("class Net: pass")
    assert load_user_object("json.py:Net").__name__ == "Net"
    import json

    assert json.loads("1") == 1


def test_a_file_is_imported_again_only_after_a_change(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text("class Net: size = 1")
    first = load_user_module("model.py")
    assert load_user_module("model.py:Net") is first
    path.write_text("class Net: size = 2")
    assert load_user_object("model.py:Net").size == 2


def test_a_module_of_the_current_folder_and_an_installed_one(tmp_path: Path) -> None:
    (tmp_path / "own_nets").mkdir()
    (tmp_path / "own_nets" / "__init__.py").touch()
    (tmp_path / "own_nets" / "small.py").write_text("class Net: pass")
    assert load_user_object("own_nets.small:Net").__module__ == "own_nets.small"
    assert load_user_object("torchvision.models:resnet18").__name__ == "resnet18"


def test_an_object_inside_another_one(tmp_path: Path) -> None:
    write_networks(tmp_path)
    assert load_user_object("model.py:Nested.inner").__name__ == "small"


def test_errors_name_what_is_missing(tmp_path: Path) -> None:
    write_networks(tmp_path)
    (tmp_path / "empty.py").touch()
    assert error_of("nothing.py:Net").startswith("cannot read nothing.py (No such file or directory): give the path")
    assert error_of("no_package.nets:Net").startswith("there is no module no_package.nets: check its name")
    assert error_of("torchvision.nothing:Net").startswith("there is no module torchvision.nothing: ")
    assert error_of("model.py:Wid") == (
        "unknown callable of model.py 'Wid': did you mean 'Wide'? choose from Auxiliary, Broken, Dict, Features, "
        "Mnist, Nested, Net, Odd, Pair, Wide, fixed, net, small, text"
    )
    assert error_of("model.py") == (
        "model.py does not say which network to use: add its class or function, such as model.py:Net"
    )
    assert error_of("empty.py:Net") == "empty.py has no callable Net: it defines no class and no function"
    assert error_of("sys:path").startswith("sys is not a module with source code")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import torch\n\nx = 1 / 0\n", "bad.py line 3 raised ZeroDivisionError (division by zero): correct the code"),
        ("import helper_of_bad\n", "helper_of_bad.py line 2 raised NameError (name 'q' is not defined): correct"),
        ("import no_such_package.part\n", "bad.py line 1 imports no_such_package, which is not installed: install it"),
        ("def f(:\n", "bad.py line 1 is not valid Python (invalid syntax): correct the code"),
        ("import sys\nsys.exit(2)\n", 'bad.py line 2 ends the process when it is imported: put what runs'),
        ("from .other import x\n", "bad.py line 1 uses a relative import: give the module as package.module:CALLABLE"),
        ("import torch\ntorch.zeros(2).view(3)\n", "bad.py line 2 raised RuntimeError (shape '[3]' is invalid"),
        ("raise KeyboardInterrupt\n", ""),
    ],
)  # fmt: skip
def test_an_exception_is_one_line_with_the_place(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "bad.py").write_text(code)
    (tmp_path / "helper_of_bad.py").write_text("\nx = q\n")
    if not message:  # Ctrl-C is not an error of the code
        with pytest.raises(KeyboardInterrupt):
            load_user_object("bad.py:Net")
        return
    assert error_of("bad.py:Net").startswith(message)
    assert "bad" not in sys.modules


def test_the_output_of_the_code_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.py").write_text("print('hello')\nclass Net: pass\n")
    load_user_module("model.py")
    assert capsys.readouterr() == ("", "hello\n")


def test_the_hash_of_one_file_is_that_of_its_content(tmp_path: Path) -> None:
    path = write_networks(tmp_path)
    assert source_sha256("model.py:Net") == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_hash_covers_the_modules_that_the_code_can_import_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("import torch, hashed_width\ndef make():\n    from hashed_late import x\n")
    (tmp_path / "hashed_width.py").write_text("WIDTH = 8")
    (tmp_path / "hashed_late.py").write_text("x = 1")
    (tmp_path / "unrelated.py").write_text("x = 1")
    first = source_sha256("model.py")
    (tmp_path / "unrelated.py").write_text("x = 2")
    assert source_sha256("model.py") == first
    (tmp_path / "hashed_late.py").write_text("x = 2")
    assert source_sha256("model.py") != first


@pytest.mark.slow
def test_the_hash_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.py").write_text("import part_of_model")
        (tmp_path / name / "part_of_model.py").write_text("x = 1")
    code = "import sys; from cifarx_train.models.user_code import source_sha256; print(source_sha256(sys.argv[1]))"
    hashes = {
        subprocess.run([sys.executable, "-c", code, f"{name}/model.py"], capture_output=True, check=True).stdout
        for name in ("one", "two")
    }
    assert len(hashes) == 1
