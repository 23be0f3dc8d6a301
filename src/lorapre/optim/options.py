"""Options of a group: which there are, and which of them may change once the group's state is there."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

#: They decide what is kept of a parameter, and in which dtype.
_SHAPING = ("rank", "compress", "view_3d", "second_moment", "second_moment_rank", "normalization", "state_dtype")


def refuse_unknown(
    owner: str, group: Mapping[str, Any], known: Iterable[str], owners_of: Callable[[str], list[str]]
) -> None:
    """Raise ``ValueError`` for a key that is a misspelt option, or one of another optimizer of ours.

    Other keys are whoever's who added them, as in torch's own groups.

    Args:
        owner: the optimizer's name.
        group: a new one.
        known: the options of ``owner``.
        owners_of: names of the optimizers that have an option.
    """
    options = list(known)
    for name in group:
        if name in options or name in ("params", "param_names"):
            continue
        if others := owners_of(name):
            raise ValueError(
                f"{owner} has no option {name!r} (={group[name]!r}); {' and '.join(others)} "
                f"{'has' if len(others) == 1 else 'have'} it. Leave it out of the group."
            )
        if meant := difflib.get_close_matches(name, options, 1, 0.8):
            raise ValueError(
                f"{owner} has no option {name!r} (={group[name]!r}). Did you mean {meant[0]!r}? Rename a key of your "
                "own otherwise: it would look like a misspelt option."
            )


def settings_of(group: Mapping[str, Any], options: Iterable[str]) -> dict[str, Any]:
    """The group's options but for the learning rate, which changes in every step and may be a tensor."""
    return {name: group[name] for name in options if name in group and name != "lr"}  # torch has defaults of its own


def refuse_changes(owner: str, before: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` where an option changed that the group's state was made by.

    Args:
        owner: the optimizer's name.
        before: the options as they were, by `settings_of`.
        group: the group now.
    """
    changed = [name for name in _SHAPING if name in before and group[name] != before[name]]
    if before["regression"] == "newton" and group["regression"] != "newton":
        changed.append("regression")  # its right factors are not orthonormal
    for name in changed:
        raise ValueError(
            f"{owner}: {name} was {before[name]!r} when the group's state was made, and is {group[name]!r} now. It "
            "decides what the state holds and cannot change between steps. Set it back, or build a new optimizer."
        )
