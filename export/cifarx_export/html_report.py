"""Self-contained HTML reports: the Jinja environment and the base template that all report pages share."""

from collections.abc import Callable, Mapping

from cifarx_serve.system.terminal import printable

BASE_PACKAGE = "cifarx_export"
"""The package whose `templates` folder holds `report_base.html`."""


def render_page(package: str, template: str, filters: Mapping[str, Callable[..., str]], **context: object) -> str:
    """Render one page as text.

    The names of files, classes and datasets in a report come from anywhere, so all text is escaped, and characters
    that are not safe to print are replaced.

    Args:
        package: the package whose `templates` folder holds the template, which extends `report_base.html`.
        template: the template's file name.
        filters: filters of the template by name, in addition to Jinja's own.
        context: the variables of the template.
    """
    import jinja2  # part of the `train` extra

    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package), jinja2.PackageLoader(BASE_PACKAGE)]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters.update(filters)
    return environment.get_template(template).render(context)
