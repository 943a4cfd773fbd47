"""Several heads on one encoder: who speaks, what is said, how, all from the same frames."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import jax

from speechjax.errors import UserError
from speechjax.models.encoder import Encoded
from speechjax.tasks._base import Sums
from speechjax.tasks._head import Head


class Several(Head):
    """Batch of `SpeechEncoder` -> losses and metrics of all `heads`, {name: {"task": T, "weight": w, ...}}.

    A head is the task T with parameters below the head's name, and the fields given with it; what it has of `Head`
    (layers, masks, dropout) is that of this task, and so is the encoder, which runs once a batch.  The losses add up by
    weight.  A loss or metric x of head h is "h/x", a chance level "chance_h/x", an answer "h/x"; a loss and its chance
    level are the head's times its weight.  State and sums of a head lie below its name too.

    Raises UserError for tasks that are no heads, and where a head's fields are not those of its task.
    """

    heads: Mapping[str, Mapping[str, Any]]

    def setup(self):
        self.parts = self._make(parent=self)  # no layer weights of its own

    def _make(self, parent: Any = None) -> dict[str, Any]:
        """{name: head}, in or outside a program."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(Head) if _is_option(field)}
        made = {}
        for name, block in self.heads.items():
            if not name.isidentifier() or name == "encoder" or name.startswith("chance_"):
                raise UserError(f"config.task.heads: {name!r} is no name for a head: use letters, as in who")
            options = dict(block)
            kind = _head_class(name, options.pop("task", ""))
            if "weight" not in options:
                raise UserError(f"config.task.heads.{name} needs weight")
            del options["weight"]
            fields = {f.name: f for f in dataclasses.fields(kind) if _is_option(f) and f.name not in shared}
            wanted = fields.keys()
            needed = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
            if unlike := sorted((needed - options.keys()) | (options.keys() - wanted)):
                has = "needs" if unlike[0] in wanted else "has no"
                raise UserError(
                    f"config.task.heads.{name} {has} {unlike[0]!r}; its fields: {', '.join(sorted(wanted))}"
                )
            made[name] = kind(encoder=self.encoder, name=name, parent=parent, **shared, **options)
        return made

    # ---- what the loop asks outside a program

    @property
    def rngs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(x for head in self._make().values() for x in head.rngs))

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(x for head in self._make().values() for x in head.needs))

    @property
    def aligns(self) -> bool:
        return any(head.aligns for head in self._make().values())

    def sizes(self) -> dict[str, tuple[str, int]]:
        found: dict[str, tuple[str, int]] = {}
        for name, head in self._make().items():
            for key, (field, classes) in head.sizes().items():
                if key not in found or classes < found[key][1]:
                    found[key] = (field.replace("config.task.", f"config.task.heads.{name}."), classes)
        return found

    def start(self, params: Any, extra: Any) -> tuple[Any, Any]:
        """Every head's own."""
        for name, head in self._make().items():
            own, state = head.start({**params[name], "encoder": params["encoder"]}, _below(extra, name))
            params = {**params, "encoder": own["encoder"], name: {k: v for k, v in own.items() if k != "encoder"}}
            extra = _with(extra, name, state)
        return params, extra

    def after_step(self, params: Any, extra: Any, sums: Any, step: jax.Array) -> Any:
        """Every head's own."""
        for name, head in self._make().items():
            own = {**params[name], "encoder": params["encoder"]}
            state = head.after_step(own, _below(extra, name), sums[name] if name in sums else {}, step)
            extra = _with(extra, name, state)
        return extra

    def health(self, metrics: Mapping[str, float], step: int) -> dict[str, str]:
        """Known ways the heads fail, {head/alarm: message}, from one log window's metrics."""
        alarms = {}
        common = {key: value for key, value in metrics.items() if "/" not in key}
        for name, head in self._make().items():
            own = {
                k.replace(f"{name}/", "", 1): v
                for k, v in metrics.items()
                if k.removeprefix("chance_").startswith(f"{name}/")
            }
            for alarm, message in head.health({**common, **own}, step).items():
                alarms[f"{name}/{alarm}"] = f"head {name}: {message}"
        return alarms

    # ---- in a program

    def score(
        self, encoded: Encoded, batch: dict[str, jax.Array], *, step: jax.Array, train: bool
    ) -> tuple[Sums, Sums]:
        losses, metrics = {}, {}
        for name, head in self.parts.items():
            weight = float(self.heads[name]["weight"])
            own_losses, own_metrics = head.score(encoded, batch, step=step, train=train)
            weighed = own_losses.keys() | {f"chance_{loss}" for loss in own_losses}
            for into, pairs in ((losses, own_losses), (metrics, own_metrics)):
                for key, (total, count) in pairs.items():
                    into[_named(name, key)] = (weight * total if key in weighed else total, count)
        return losses, metrics

    def respond(self, encoded: Encoded) -> dict[str, jax.Array]:
        """{"h/x": answer x of head h}."""
        return {f"{name}/{k}": v for name, head in self.parts.items() for k, v in head.respond(encoded).items()}

    def predict(self, batch: dict[str, jax.Array], *, step: jax.Array) -> dict[str, jax.Array]:
        """What a picture shows: that of the first head."""
        return next(iter(self.parts.values())).predict(batch, step=step)


def _is_option(field: Any) -> bool:
    return field.init and field.name not in ("encoder", "parent", "name")


def _head_class(name: str, task: str) -> type:
    """As `speechjax.config.task_class` finds tasks: the file name is the registry."""
    try:
        room = vars(importlib.import_module(f"speechjax.tasks.{task}")) if task.isidentifier() else {}
    except ModuleNotFoundError as error:
        if error.name != f"speechjax.tasks.{task}":
            raise
        room = {}
    for key, value in room.items():
        if key.lower() == task.replace("_", "") and isinstance(value, type) and issubclass(value, Head):
            return value
    raise UserError(f"config.task.heads.{name}.task={task!r} is no task with a head, such as classify, speaker, frames")


def _named(head: str, key: str) -> str:
    chance = "chance_" if key.startswith("chance_") else ""
    return f"{chance}{head}/{key.removeprefix(chance)}"


def _below(extra: Any, name: str) -> Any:
    """The collections of a head."""
    return {collection: tree[name] for collection, tree in extra.items() if name in tree}


def _with(extra: Any, name: str, state: Any) -> Any:
    """`extra` with the collections of a head replaced."""
    return {**extra, **{collection: {**extra[collection], name: own} for collection, own in state.items()}}
