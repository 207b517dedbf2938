"""A model with modulators attached to it."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from condmod.attaching.bank import AttachedBank
from condmod.attaching.folding import Undo, fold, undo
from condmod.attaching.frames import Held, Opened, Refusal, is_recomputing
from condmod.attaching.planned import Plan
from condmod.attaching.standing import Freeze, Standing
from condmod.errors import ConditionError, FoldError

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
        self._standing = Standing()
        self._folded: Undo | None = None

    def forward(
        self, *args: Any, condition: Any = _UNGIVEN, strength: Any = None, **kwargs: Any
    ) -> Any:
        """The model's output under a condition.

        Args:
            *args: what the model takes.
            condition: what the attachment takes, (B, D) or an aligned or other kind of its
                modulators; with an encoder its raw signals; none where all of them read the
                features alone.
            strength: 0 is the base bit for bit, 1 the full modulation; a number, or a tensor
                without dims, with which a compiled model does not recompile.
            **kwargs: what the model takes.

        Raises:
            ConditionError: no condition while the attachment is on, one although it is set
                already, or one on another device or of another dtype than the modulators.
            ShapeError: the condition has another batch or width than the features.
        """
        if condition is _UNGIVEN and not self._acts_alone():
            if strength is not None and self.plan.needs_condition:
                raise ConditionError("a strength is given beside a condition; say both, or neither")
            return self.base(*args, **kwargs)
        condition = None if condition is _UNGIVEN else condition
        self._standing.forget_reached()
        with self.condition(condition, strength=strength):
            output = self.base(*args, **kwargs)
        self._standing.tell_missed(self.base)
        return output

    def condition(
        self, condition: Any = None, *, strength: Any = None
    ) -> AbstractContextManager[None]:
        """A context in which the model, whoever calls it, is under this condition.

        A backward pass may run in it or after it. Arguments and errors as those of a call.
        """
        self._check_on()
        self._check_free()
        if (condition is None) == self.plan.needs_condition:
            raise ConditionError(
                "the condition is None; give one, or run the model under conditioned.disabled()"
                if condition is None
                else f"the attachment {self.name!r} reads the features alone and takes no "
                "condition; call conditioned(x)"
            )
        self.bank.check_condition(condition)
        self._follow_mode()
        weight = self._strength(strength)
        made = self.bank(condition)
        modulators = self.bank.modulators()
        return Opened(
            tuple(
                (site.slot, Held(modulators[name], made[name], weight))
                for name, site in self._standing.sites.items()
            )
        )

    def disabled(self) -> AbstractContextManager[None]:
        """A context in which this thread runs the model without this attachment."""
        self._check_free()
        return Opened(tuple((site.slot, None) for site in self._standing.sites.values()))

    def enable(self) -> None:
        """Switch the attachment on again, for every thread."""
        if self._folded is not None:
            raise FoldError(f"the attachment {self.name!r} is folded; call unfold() instead")
        for site in self._standing.sites.values():
            site.on = True

    def disable(self) -> None:
        """Switch the attachment off, for every thread: the model runs as if it were not there."""
        for site in self._standing.sites.values():
            site.on = False

    @property
    def is_on(self) -> bool:
        """Whether the attachment acts, and so needs a condition."""
        sites = self._standing.sites.values()
        return bool(sites) and all(site.on for site in sites)

    def _put(self, freeze: Freeze) -> None:
        """Put every site on the model, or none where one cannot be.

        Raises:
            SiteError: a module cannot be conditioned, or a pattern of `freeze` matches nothing.
        """
        self._standing.put(self.base, self.plan, self.name, freeze)
        self.training = self.base.training

    def detach(self) -> nn.Module:
        """Take every site off and give the model back as it was before.

        Its classes, state dict, hooks and outputs are those it had, and with the last attachment
        its `requires_grad`; what training changed in parameters that were not frozen stays so, and
        so do folded weights.
        """
        self._check_free()
        self._standing.lift(self.base)
        self._folded = None
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
        self.bank.check_condition(condition)
        mode = self.bank.training
        try:
            with torch.no_grad():
                made = self.bank.eval()(condition)
                held = {name: (one, made[name]) for name, one in self.bank.modulators().items()}
                sites = {
                    name: (module, self._standing.sites[name])
                    for name, module in self._standing.modules(self.base).items()
                }
                self._folded = fold(self.base, sites, held, strength)
        finally:
            self.bank.train(mode)
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
        self._standing.hold_statistics(self.base)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in {"base", "_modules"} or "base" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base, name)

    def _acts_alone(self) -> bool:
        """Whether a call without a condition is to be modulated: all sites read x alone."""
        if self.plan.needs_condition or not self.is_on:
            return False
        sites = self._standing.sites.values()
        return all(isinstance(site.slot.held, Refusal) for site in sites)

    def _follow_mode(self) -> None:
        """Put the bank in the base's mode, which a loop that holds the base alone has set."""
        if not torch.compiler.is_compiling() and self.bank.training != self.base.training:
            self.bank.train(self.base.training)
            self._standing.hold_statistics(self.base)

    def _check_on(self) -> None:
        if not self._standing.sites:
            raise ConditionError(
                f"the attachment {self.name!r} is detached; attach again, or call the model itself"
            )
        if self._folded is not None:
            raise ConditionError(
                f"the attachment {self.name!r} is folded into the weights; call unfold() first"
            )
        if not self.is_on:
            raise ConditionError(
                f"the attachment {self.name!r} is switched off; call conditioned.enable() first"
            )

    def _check_free(self) -> None:
        for name, site in self._standing.sites.items():
            if not isinstance(site.slot.held, Refusal) and not is_recomputing():
                raise ConditionError(
                    f"the attachment {self.name!r} already has a condition, or is switched off, in "
                    f"this thread (site {name!r}); leave that context first"
                )

    def _strength(self, strength: Any) -> Tensor | None:
        if strength is None:
            return None
        if not isinstance(strength, int | float | Tensor):
            raise ConditionError(
                f"strength is a number or a tensor without dims; got {strength!r:.40}"
            )
        own = next(self.bank.parameters(), torch.empty(0))
        # A product, since as_tensor would have a compiled model recompile for every number.
        weight: Tensor = torch.ones((), device=own.device) * strength
        if weight.ndim:
            raise ConditionError(
                f"strength is a number or a tensor without dims; got {tuple(weight.shape)}"
            )
        return weight
