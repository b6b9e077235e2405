"""Names of parameters: without what engines put into them, and for loading a state_dict in
another order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

Groups = Sequence[dict[str, Any]]

WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What torch.compile, FSDP and activation checkpointing put into the names of parameters."""

DDP = "module."
"""What DistributedDataParallel puts before all of them."""


def plain_names(names: Sequence[str]) -> list[str]:
    """The names of parameters as they are in the model that DDP, FSDP or others have wrapped."""
    plain = [".".join(x for x in name.split(".") if x not in WRAPPERS) for name in names]
    if all(name.startswith(DDP) for name in plain):
        plain = [name.removeprefix(DDP) for name in plain]
    return plain


def by_name(state_dict: dict[str, Any], param_groups: Groups) -> dict[str, Any]:
    """A state_dict whose parameters are in the order that an optimizer has them in.

    It is returned as it is where names cannot tell: when either side has none or has one twice,
    when the numbers of groups differ (which torch refuses), and when torch's FSDP1 or
    torch.distributed.checkpoint have put the parameters in order already.

    Args:
        state_dict: as from an optimizer's `state_dict()`; not changed.
        param_groups: of the optimizer that is to load it. Its groups take the options of the saved
            groups of the same parameters or, if those are not the same, of the ones in their place.

    Raises:
        ValueError: if the names are not the same, saying which are missing or unexpected.
    """
    saved: Groups = state_dict["param_groups"]
    if len(saved) != len(param_groups) or _matched(saved, param_groups):
        return state_dict
    old, new = _names(saved), _names(param_groups)
    if not (old and new):
        return state_dict
    if old == new:
        return state_dict

    keys = itertools.chain.from_iterable(group["params"] for group in saved)
    key_of = dict(zip(itertools.chain.from_iterable(old), keys, strict=True))
    wanted = list(itertools.chain.from_iterable(new))
    missing = [name for name in wanted if name not in key_of]
    unexpected = [name for name in key_of if name not in set(wanted)]
    if missing or unexpected:
        what = (("missing", missing), ("unexpected", unexpected))
        raise ValueError(
            "the state_dict was saved for parameters of other names: "
            + "; ".join(f"{word} {_listed(names)}" for word, names in what if names)
        )
    alike = {frozenset(names): group for names, group in zip(old, saved, strict=True)}
    if all(frozenset(names) in alike for names in new):
        saved = [alike[frozenset(names)] for names in new]
    groups = [
        {**group, "params": [key_of[name] for name in names]}
        for group, names in zip(saved, new, strict=True)
    ]
    return {**state_dict, "param_groups": groups}


def _matched(saved: Groups, param_groups: Groups) -> bool:
    """Whether torch has brought the parameters into order by their names itself; the saved
    "param_names" are still in the old order then."""
    keys = itertools.chain.from_iterable(group["params"] for group in saved)
    params = itertools.chain.from_iterable(group["params"] for group in param_groups)
    return any(isinstance(key, str) for key in keys) or any(
        getattr(param, "_fsdp_flattened", False) for param in params
    )


def _names(groups: Groups) -> list[list[str]]:
    """The names of each group's parameters; none at all if not every one has its own."""
    if any(len(group.get("param_names", ())) != len(group["params"]) for group in groups):
        return []
    raw = [name for group in groups for name in group["param_names"]]
    plain = plain_names(raw)
    names = iter(plain if len(set(plain)) == len(plain) else raw)
    if len(set(raw)) < len(raw):
        return []
    return [list(itertools.islice(names, len(group["params"]))) for group in groups]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
