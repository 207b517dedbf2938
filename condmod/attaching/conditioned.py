"""A model with modulators attached to it, and `attach`, which makes one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from condmod.attaching.bank import AttachedBank
from condmod.attaching.folding import Change, Refused, apply, changes, undo
from condmod.attaching.frames import Held, Opened, Refusal, Slot, is_recomputing
from condmod.attaching.patterns import named_modules, plain_name, reader
from condmod.attaching.planning import Plan, Start, plan
from condmod.attaching.sites import Swapped, restore, sites_of, swap
from condmod.build import SpecLike
from condmod.errors import ConditionError, FoldError, SiteError

Freeze = Literal["base", "none"] | Sequence[str]
_UNGIVEN: Any = object()


class Conditioned(nn.Module):
    """A model (`base`) and the modulators that steer it (`bank`); made by `attach`.

    Call it as the model, with the condition beside: `conditioned(x, condition=c)`. Where another
    loop holds the model, open `with conditioned.condition(c):` around that. What the model has and
    this has not, such as `config` or `generate`, is read through.

    Attributes:
        base: the model itself; its state dict has the keys it always had.
        bank: every modulator, and the encoder if there is one; all that an adapter file holds.
        plan: what stands where.
        name: the attachment's name, unlike those of others on this model.
    """

    base: nn.Module
    bank: AttachedBank

    def __init__(self, base: nn.Module, plan: Plan, name: str) -> None:
        super().__init__()
        self.base = base
        self.plan = plan
        self.name = name
        self.bank = AttachedBank(plan).train(base.training)
        self._sites: dict[str, Swapped] = {}
        self._passages: list[Any] = []
        self._keeps_statistics = False
        self._folded: list[Any] | None = None

    def forward(
        self, *args: Any, condition: Any = _UNGIVEN, strength: Any = None, **kwargs: Any
    ) -> Any:
        """The model's output under a condition.

        Args:
            *args: what the model takes.
            condition: what the attachment takes, (B, D) or an aligned or other kind of its
                modulators; with an encoder its raw signals.
            strength: 0 is the base bit for bit, 1 the full modulation; a number, or a tensor
                without dims, with which a compiled model does not recompile.
            **kwargs: what the model takes.

        Raises:
            ConditionError: no condition while the attachment is on, one although it is set
                already, or one on another device or of another dtype than the modulators.
            ShapeError: the condition has another batch or width than the features.
        """
        if condition is _UNGIVEN:
            return self.base(*args, **kwargs)
        with self.condition(condition, strength=strength):
            return self.base(*args, **kwargs)

    def condition(self, condition: Any, *, strength: Any = None) -> AbstractContextManager[None]:
        """A context in which the model, whoever calls it, is under this condition.

        A backward pass may run in it or after it. Arguments and errors as those of a call.
        """
        self._check_on()
        self._check_free()
        self.bank.check_condition(condition)
        weight = self._strength(strength)
        made = self.bank(condition)
        modulators = self.bank.modulators()
        return Opened(
            tuple(
                (site.slot, Held(modulators[name], made[name], weight))
                for name, site in self._sites.items()
            )
        )

    def disabled(self) -> AbstractContextManager[None]:
        """A context in which this thread runs the model without this attachment."""
        self._check_free()
        return Opened(tuple((site.slot, None) for site in self._sites.values()))

    def enable(self) -> None:
        """Switch the attachment on again, for every thread."""
        if self._folded is not None:
            raise FoldError(f"the attachment {self.name!r} is folded; call unfold() instead")
        for site in self._sites.values():
            site.on = True

    def disable(self) -> None:
        """Switch the attachment off, for every thread: the model runs as if it were not there."""
        for site in self._sites.values():
            site.on = False

    @property
    def is_on(self) -> bool:
        """Whether the attachment acts, and so needs a condition."""
        return all(site.on for site in self._sites.values())

    def put(self, freeze: Freeze) -> None:
        """Put every site on the model, or none where one cannot be, and freeze what is to be.

        Raises:
            SiteError: a module cannot be conditioned.
        """
        frozen = list(_to_freeze(self.base, freeze))
        modules = named_modules(self.base)
        try:
            for planned in self.plan:
                name = planned.site.name
                slot = Slot(name, self.name)
                site = Swapped(slot, planned.placement, planned.argument, planned.item)
                swap(modules[name], site)
                self._sites[name] = site
        except SiteError:
            self.detach()
            raise
        before = self.base.__dict__.setdefault("_condmod_before", {"frozen": {}, "nested": {}})
        parameters = dict(self.base.named_parameters())
        for name in frozen:
            before["frozen"].setdefault(name, parameters[name].requires_grad)
            parameters[name].requires_grad_(False)
        for name, module in {**modules, "": self.base}.items():
            if isinstance(module, nn.TransformerEncoder) and _has_sites(module):
                before["nested"].setdefault(name, module.use_nested_tensor)
                module.use_nested_tensor = False
            if isinstance(module, nn.TransformerEncoderLayer) and _has_sites(module):
                self._passages.append(module.norm1.register_forward_pre_hook(_slow))
        self._keeps_statistics = freeze != "none"
        self.training = self.base.training
        self._hold_statistics()

    def detach(self) -> nn.Module:
        """Take every site off and give the model back as it was before.

        Its classes, state dict, hooks and outputs are those it had, and with the last attachment
        its `requires_grad`; what training changed in parameters that were not frozen stays so, and
        so do folded weights.
        """
        self._check_free()
        modules = named_modules(self.base)
        own = {id(site) for site in self._sites.values()}
        for module in self.base.modules():  # whatever their names are now: peft wraps layers
            for site in sites_of(module):
                if id(site) in own:
                    restore(module, site)
        for passage in self._passages:
            passage.remove()
        self._sites, self._passages = {}, []
        if not _has_sites(self.base) and "_condmod_before" in vars(self.base):
            before = self.base.__dict__.pop("_condmod_before")
            parameters = dict(self.base.named_parameters())
            for name in parameters.keys() & before["frozen"].keys():
                parameters[name].requires_grad_(before["frozen"][name])
            for name, flag in before["nested"].items():
                {**modules, "": self.base}[name].use_nested_tensor = flag
        return self.base

    def fold(self, condition: Any, *, strength: float = 1.0) -> nn.Module:
        """Write a constant condition into the weights beside the sites, all of them or none.

        The model then needs no condition and has no cost of one: it gives what it gave under this
        condition, up to rounding. `unfold` puts the weights back; `detach` leaves them folded.

        Args:
            condition: of one sample, as a call takes it with a batch of 1.
            strength: as in a call.

        Returns:
            The model.

        Raises:
            FoldError: a site cannot be folded exactly; every such site is named with its reason,
                and nothing is changed.
        """
        self._check_on()
        self._check_free()
        mode = self.bank.training
        with torch.no_grad():
            made = self.bank.eval()(condition)
        self.bank.train(mode)
        modules, modulators = named_modules(self.base), self.bank.modulators()
        users = _users(self.base)
        wanted: list[Change] = []
        problems = []
        for name, site in self._sites.items():
            try:
                if any(leaf.shape[0] != 1 for leaf in _leaves(made[name])):
                    raise Refused("the condition has more than one sample")
                if len(sites_of(modules[name])) > 1:
                    raise Refused("another attachment acts there, too")
                found = changes(
                    modules[name], site.placement, modulators[name], made[name], strength
                )
                for change in found:
                    others = users.get(id(getattr(change.module, change.key)), [])
                    if len(others) > 1:
                        raise Refused(f"its {change.key} is shared: {', '.join(others)}")
                wanted += found
            except Refused as reason:
                problems.append(f"{name}: {reason}")
        if problems:
            raise FoldError(f"the condition cannot be folded: {'; '.join(problems)}")
        floating = (p for p in self.base.parameters() if p.is_floating_point())
        self._folded = apply(wanted, next(floating, torch.empty(0)))
        self.disable()
        return self.base

    def unfold(self) -> None:
        """Put back the weights that `fold` changed, bit for bit, and switch the sites on again."""
        if self._folded is None:
            raise FoldError(f"the attachment {self.name!r} is not folded")
        undo(self._folded)
        self._folded = None
        self.enable()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write an adapter: the bank as safetensors, and JSON of its specs, sites and base.

        `condmod.load_pretrained(model, folder)` attaches it again. Warns where parameters of the
        base train, which it does not hold.

        Raises:
            OSError: it cannot be written; an adapter that stood there still does.
        """
        from condmod.attaching.saving import save

        save(self, folder)

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Upload the adapter through `huggingface_hub`, which is to be installed.

        Args:
            repository: as in "name/repository"; made if it is not there.
            **options: `token`, `private`, and what `HfApi.upload_folder` takes, such as
                `commit_message`.

        Returns:
            The address of the commit.
        """
        from condmod.attaching.saving import push

        return push(self, repository, **options)

    def trainable(self) -> str:
        """What trains, as a table: parameters of the bank and of the base, and their part."""
        rows = [("", "trains", "all")]
        for name, module in (("bank", self.bank), ("base", self.base)):
            counts = [(p.numel(), p.requires_grad) for p in module.parameters()]
            trains = sum(count for count, flag in counts if flag)
            rows.append((name, f"{trains:,}", f"{sum(count for count, _ in counts):,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True))
            for row in rows
        )

    def train(self, mode: bool = True) -> Conditioned:
        """As torch's, except that frozen batch norms keep their running statistics."""
        super().train(mode)
        self._hold_statistics()
        return self

    def _hold_statistics(self) -> None:
        """Put frozen batch norms in evaluation; no other module's mode is touched."""
        if not self._keeps_statistics:
            return
        frozen = not any(parameter.requires_grad for parameter in self.base.parameters())
        for module in self.base.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                own = list(module.parameters(recurse=False))
                if frozen or (own and not any(p.requires_grad for p in own)):
                    module.training = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in {"base", "_modules"} or "base" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        own = {id(site) for site in self._sites.values()}
        for module in self.base.modules():  # another attachment's sites cannot be set in a copy
            for site in sites_of(module):
                if id(site) not in own:
                    restore(module, site)

    def _check_on(self) -> None:
        if self._folded is not None:
            raise ConditionError(
                f"the attachment {self.name!r} is folded into the weights; call unfold() first"
            )
        if not self.is_on:
            raise ConditionError(
                f"the attachment {self.name!r} is switched off; call conditioned.enable() first"
            )

    def _check_free(self) -> None:
        for name, site in self._sites.items():
            if not isinstance(site.slot.held, Refusal) and not is_recomputing():
                raise ConditionError(
                    f"the attachment {self.name!r} already has a condition, or is switched off, in "
                    f"this thread (site {name!r}); leave that context first"
                )

    def _strength(self, strength: Any) -> Tensor | None:
        if strength is None:
            return None
        own = next(self.bank.parameters(), torch.empty(0))
        # A product, since as_tensor would have a compiled model recompile for every number.
        weight = torch.ones((), device=own.device) * strength
        if weight.ndim:
            raise ConditionError(
                f"strength is a number or a tensor without dims; got {tuple(weight.shape)}"
            )
        return weight


def attach(
    model: nn.Module,
    patterns: Plan | Mapping[str, Any],
    *,
    condition_dim: int | None = None,
    encoder: SpecLike | None = None,
    example: Any = None,
    start: Start = "base",
    freeze: Freeze = "base",
    name: str = "default",
) -> Conditioned:
    """Attach modulators to a model that stays as it is.

    Args:
        model: any model; it keeps its state dict, and is the result's `base`.
        patterns: a plan of `condmod.plan`, or what that takes.
        condition_dim: as in `plan`.
        encoder: as in `plan`.
        example: as in `plan`; with start="base" the attached model is then compared with the
            model on it.
        start: as in `plan`.
        freeze: "base" lets only the bank train; "none" leaves the model's `requires_grad` alone;
            patterns freeze the modules and parameters that they match.
        name: tells several attachments on one model apart.

    Raises:
        SiteError: as `plan`; also a name that is taken, a model that the plan does not fit. The
            model is then untouched.
        SpecError: as `configure`.
    """
    if isinstance(model, Conditioned):
        raise SiteError(
            "this model is attached to already; attach to its base and under another name: "
            "condmod.attach(conditioned.base, ..., name='second')"
        )
    if not isinstance(patterns, Plan):
        patterns = plan(
            model,
            patterns,
            condition_dim=condition_dim,
            encoder=encoder,
            example=example,
            start=start,
        )
    elif condition_dim is not None or encoder is not None:
        raise SiteError("a plan has its condition_dim and encoder; say them in condmod.plan")
    conditioned = prepare(model, patterns, name)
    if patterns.start == "base" and not any(p.is_meta for p in conditioned.bank.parameters()):
        conditioned.bank.check_start()
    conditioned.put(freeze)
    return conditioned


def prepare(model: nn.Module, plan: Plan, name: str) -> Conditioned:
    """What `attach` returns, before anything is put on the model.

    Raises:
        SiteError: the model lacks a site of the plan, or has an attachment of this name.
    """
    modules = named_modules(model)
    if any(site.slot.attachment == name for m in modules.values() for site in sites_of(m)):
        raise SiteError(
            f"the model has an attachment {name!r}; detach it (conditioned.detach()), or give "
            "this one another name=..."
        )
    missing = [planned.site.name for planned in plan if planned.site.name not in modules]
    if missing:
        raise SiteError(f"the model lacks sites of the plan: {', '.join(missing):.400}")
    conditioned = Conditioned(model, plan, name)
    place = next((parameter.device for parameter in model.parameters()), None)
    conditioned.bank.to(place)
    return conditioned


def _to_freeze(model: nn.Module, freeze: Freeze) -> Iterator[str]:
    """The names of the parameters that do not train.

    Raises:
        SiteError: a pattern that matches neither a module nor a parameter, or no patterns.
    """
    parameters = dict(model.named_parameters())
    if freeze == "none":
        return
    if freeze == "base":
        yield from parameters
        return
    if isinstance(freeze, str):
        raise SiteError(f"freeze is 'base', 'none' or a list of patterns; got {freeze!r}")
    modules = named_modules(model)
    for pattern in freeze:
        reads = reader(pattern)
        above = [name for name, module in modules.items() if reads(name, module)]
        found = [
            name
            for name in parameters
            if any(plain_name(name).startswith(f"{module}.") for module in above)
            or (not pattern.startswith("type:") and reads(plain_name(name), None))
        ]
        if not found:
            raise SiteError(f"the pattern {pattern!r} of freeze matches no module or parameter")
        yield from found


def _users(model: nn.Module) -> dict[int, list[str]]:
    """The dotted names of every parameter of a model, by identity."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    return users


def _leaves(modulation: Any) -> list[Tensor]:
    if isinstance(modulation, Tensor):
        return [modulation]
    return [leaf for part in modulation for leaf in _leaves(part)]


def _has_sites(model: nn.Module) -> bool:
    return any(sites_of(module) for module in model.modules())


def _slow(_module: nn.Module, _args: Any) -> None:
    """A hook that does nothing but keep torch's encoder layers from reading weights alone."""
