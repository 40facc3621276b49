"""Which sites compiled code may hide: they run in it, and their hooks are not seen to."""

from __future__ import annotations

from torch import _C, nn

from .hooks import HookedSite


def hidden(
    model: nn.Module, hooked_sites: list[HookedSite], idle: list[HookedSite]
) -> list[HookedSite]:
    """Those of the idle sites that may have run unseen in a forward whose own hooks are seen."""
    if is_under_compile():
        return idle
    inside = {
        id(part)
        for module in model.modules()
        if _is_compiled(module, module is model)
        for part in module.modules()
    }
    traced = _traced_inside(hooked_sites)
    return [
        each for each in idle if each.like in traced or inside & {id(each.entry), id(each.exit)}
    ]


def _traced_inside(sites: list[HookedSite]) -> set[str]:
    """Of sites that are alike one is traced, and the others may run the same compiled code."""
    return {each.like for each in sites if each.compiled.inside or each.compiled_begin.inside}


def holds_compiled(model: nn.Module, sites: list[HookedSite]) -> bool:
    """Whether something in an eager forward of the model is compiled, or all of it may be."""
    return (
        is_under_compile()
        or bool(_traced_inside(sites))
        or any(_is_compiled(module, module is model) for module in model.modules())
    )


def is_under_compile() -> bool:
    """Whether torch.compile runs what runs now, but for a break in its graph."""
    return _C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False)


def _is_compiled(module: nn.Module, is_root: bool) -> bool:
    """Its call or its forward; a root whose own hooks are seen was not called as compiled."""
    return (
        (module._compiled_call_impl is not None and not is_root)
        or hasattr(module.forward, "_torchdynamo_orig_callable")
        or "_orig_mod" in module._modules
    )
