"""Changes to modules of others that can be taken back: what `install()` is made of.

Contract: `put` and `on_undo` only remember; nothing is changed but what `put` is given.
`undo_all` takes back everything, the last change first.
"""

from __future__ import annotations

from typing import Any, Callable

_ABSENT = object()
# Of the process, since the modules that are changed are the process's, too.
_undo: list[Callable[[], None]] = []


def works(module: Any, name: str) -> bool:
    """Whether `module` has `name`: on TensorFlow 2.16 and later some only seem to."""
    try:
        getattr(module, name)
    except (AttributeError, ImportError):
        return False
    return True


def put(owner: Any, name: str, value: Any) -> None:
    """Makes `value` the attribute `name` of a module, or of another object."""
    # Neither a lazy loader's `setattr` nor its `getattr` may run: they load what is gone.
    if _is_lazy(owner):
        put_item(vars(owner), name, value)
        return
    before = getattr(owner, name) if works(owner, name) else _ABSENT
    setattr(owner, name, value)

    def undo():
        if before is _ABSENT:
            delattr(owner, name)
            # TensorFlow's module wrappers keep a second reference.
            vars(owner).pop(name, None)
        else:
            setattr(owner, name, before)

    on_undo(undo)


def put_item(mapping: dict, key: str, value: Any) -> None:
    """Makes `value` the item `key` of `mapping`."""
    before = mapping.get(key, _ABSENT)
    mapping[key] = value

    def undo():
        if before is _ABSENT:
            mapping.pop(key, None)
        else:
            mapping[key] = before

    on_undo(undo)


def on_undo(action: Callable[[], None]) -> None:
    """Has `undo_all` call `action`."""
    _undo.append(action)


def undo_all() -> None:
    """Takes back every change."""
    # Popped before it is called: what fails once is not tried for ever.
    while _undo:
        _undo.pop()()


def _is_lazy(owner):
    return "LazyLoader" in type(owner).__name__
