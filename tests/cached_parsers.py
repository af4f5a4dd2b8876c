"""Parsers of classes that are built once per session: building them takes more than half of a short run.

The latest versions of jsonargparse do the same.
"""

from typing import Any

from jsonargparse import _typehints


def cache_class_parsers() -> None:
    """Return the same parser from jsonargparse for the same class and options, in all runs of this process."""
    build, parsers = _typehints.ActionTypeHint.get_class_parser, {}

    def cached(val_class: Any, sub_add_kwargs: dict[str, Any] | None = None, skip_args: Any = None) -> Any:
        if isinstance(val_class, str):
            val_class = _typehints.import_object(val_class)
        options = repr(sorted((sub_add_kwargs or {}).items())), repr(skip_args), repr(_typehints.nested_links.get())
        key = (val_class, type(_typehints.parent_parser.get()), *options)
        if key not in parsers:
            parsers[key] = build(val_class, sub_add_kwargs, skip_args)
        return parsers[key]

    _typehints.ActionTypeHint.get_class_parser = staticmethod(cached)
