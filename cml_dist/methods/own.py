"""An inner rule of the user's own: made from ``method.options``."""

from __future__ import annotations

from typing import Any

from cml_dist.config.schema import MethodConfig
from cml_dist.errors import ConfigError
from cml_dist.meta.rule import InnerRule
from cml_dist.user_code import blamed, load, unsealed


def own_class(name: str) -> type[InnerRule]:
    """The class that a name of code means.

    Raises:
        ConfigError: it cannot be imported, or is no subclass of :class:`InnerRule`.
    """
    cls = load(name)
    if not (isinstance(cls, type) and issubclass(cls, InnerRule)):
        raise ConfigError(
            f"method.name {unsealed(name)} is no inner rule", "make it a subclass of cml_dist.meta.rule.InnerRule"
        )
    return cls


def own_rule(method: MethodConfig, **members: Any) -> InnerRule:
    """The rule that ``method.name`` means, with ``method.options`` as further members.

    Raises:
        ConfigError: as :func:`own_class`, or it takes no such options.
    """
    cls = own_class(method.name)
    with blamed(method.name, "cannot be made"):
        return cls(**members, **method.options)
