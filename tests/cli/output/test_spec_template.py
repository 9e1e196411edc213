import tomllib

from cifarx.output.spec_template import spec_template
from cifarx_serve.spec import InputSpec, ModelSource, ModelSpec

SPEC = ModelSpec(
    model="net",
    class_names=("cat", "dog"),
    input=InputSpec(height=32, width=48),
    assumed=("class_names", "preprocessing"),
)


def test_every_field_is_there() -> None:
    text = spec_template(SPEC, "net.pth")
    fields = ("class_names", "output", "activation", "outputs", "thresholds", "temperature")
    for name in (*fields, *InputSpec.__struct_fields__):
        assert (f"\n{name} = " in text or f"\n# {name} = " in text) == (name != "dtype")


def test_what_nobody_stated_is_marked() -> None:
    marked = {line.partition(" = ")[0] for line in spec_template(SPEC, "net.pth").splitlines() if "ASSUMED" in line}
    assert marked == {"class_names"} | {
        name for name in InputSpec.__struct_fields__ if name not in ("dtype", "resize_to")
    }


def test_the_values_are_those_of_the_spec() -> None:
    document = tomllib.loads(spec_template(SPEC, "net.pth"))
    assert document["class_names"] == ["cat", "dog"]
    assert (document["input"]["height"], document["input"]["width"]) == (32, 48)
    assert "source" not in document
    source = ModelSource(kind="python", name="model.py:Net", output=1)
    chosen = ModelSpec(model="net", class_names=("cat", "dog"), input=SPEC.input, source=source)
    assert tomllib.loads(spec_template(chosen, "net.pth"))["source"] == {"output": 1}


def test_the_names_can_be_any_text() -> None:
    names = ('"quoted"', "back\\slash", "new\nline", "\x00\x1f\x7f", "\N{SNOWMAN}", "\U0001f600")
    spec = ModelSpec(model="net", class_names=names, input=SPEC.input)
    assert tomllib.loads(spec_template(spec, "net.pth"))["class_names"] == list(names)
