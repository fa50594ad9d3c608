"""Templates of the pages that commands write, which hold everything in one file."""

from __future__ import annotations

import base64

from jinja2 import Environment, PackageLoader, Template

from cml_dist.telemetry.text import line


def page_template(name: str) -> Template:
    """A template by its file name; it escapes what it is given, with filters ``line`` (one line) and ``base64``."""
    loader = PackageLoader("cml_dist")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"line": line, "base64": lambda data: base64.b64encode(data).decode()}
    return environment.get_template(name)
