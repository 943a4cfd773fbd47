"""Configs: load one experiment, apply what the command line overrides, check every block against its callable."""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from speechjax.errors import UserError

log = logging.getLogger("speechjax")


def parse_arg(arg: str, **allowed: Any) -> dict[str, Any]:
    """`size=tiny,smoke` -> {"size": "tiny", "smoke": True}, each of the type of its default in `allowed`.

    A tuple default lists the choices, the first of them the default.
    """
    values = {k: v[0] if isinstance(v, tuple) else v for k, v in allowed.items()}
    for part in filter(None, arg.split(",")):
        key, _, text = part.partition("=")
        if key not in allowed:
            raise UserError(f"config argument {key!r} is unknown; allowed: {', '.join(sorted(allowed))}")
        default = allowed[key]
        if isinstance(default, tuple):
            if text not in default:
                raise UserError(f"config argument {key}={text!r}: choose from {', '.join(default)}")
            values[key] = text
        elif default is False and not text:
            values[key] = True
        else:
            values[key] = _parse(text, default, key, flag="config argument ")
    return values


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Config of `FILE.py[:arg,...]`, or a run's config.json, with `key.sub=value` applied, locked and checked.

    Raises UserError for a missing file, an unknown key (the message lists those allowed) or a value of the wrong
    type.
    """
    config = _of_run(spec) if spec.endswith(".json") else open_module(spec).get_config(spec.partition(":")[2])
    for text in overrides:
        if text.startswith("init_from="):  # first, because it says what the model is
            override(config, text)
    complete_model(config)
    config.lock()
    for text in overrides:
        override(config, text)
    check(config)
    return config


def _of_run(path: str) -> ConfigDict:
    """The config.json of a run, or of a converted model."""
    from speechjax import runs

    if not Path(path).is_file():
        raise UserError(f"no config file {path!r}; those of the project are in configs/")
    try:
        return runs.config_of(json.loads(Path(path).read_text("utf-8")), path)
    except ValueError as error:
        raise UserError(f"{path} is not the config of a run: {error}") from error


def open_module(spec: str) -> Any:
    """The module of `FILE.py[:arg,...]`; UserError where there is none."""
    path = spec.partition(":")[0]
    if not Path(path).is_file():
        raise UserError(f"no config file {path!r}; those of the project are in configs/")
    module_spec = importlib.util.spec_from_file_location("speechjax_config", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def complete_model(config: Any) -> None:
    """A model block with a `preset` has no encoder: it gets that of the run `init_from`, or wav2vec 2.0 of that size.

    So fine-tuning says how to train, and the checkpoint what; new adapters come on top of those it has.  Raises
    UserError where there is no such run.
    """
    from speechjax import presets, runs

    if "preset" not in config.model:
        return
    mine = config.model.to_dict()
    preset = mine.pop("preset")
    if config.init_from:
        checkpoint = runs.find_checkpoint(config.init_from)
        run: Any = runs.read_config(checkpoint.parent.parent)
        there = run.model.to_dict()
    else:
        there = presets.waveform(preset)
    before = there.get("adapters", ())
    adapters = (*before, *(block for block in mine["adapters"] if block not in before))
    config.model = ConfigDict(_filled(mine, there) | dict(adapters=adapters))


def _filled(mine: dict[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        k: _filled(v, theirs[k]) for k, v in mine.items() if isinstance(v, dict) and isinstance(theirs.get(k), dict)
    }
    return {**theirs, **mine, **both}


def override(config: ConfigDict, text: str) -> None:
    """Sets `key.sub=value` of `text`, of the type the value has; UserError for an unknown key or another type."""
    dotted, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--config.{text}: write --config.{dotted}=VALUE")
    node, keys = config, dotted.split(".")
    for depth, key in enumerate(keys):
        if not isinstance(node, ConfigDict) or key not in node:
            where = ".".join(keys[:depth]) or "the config"
            allowed = sorted(node) if isinstance(node, ConfigDict) else []
            raise UserError(f"--config.{dotted}: {where} has no {key!r}; allowed: {', '.join(allowed) or 'nothing'}")
        if depth == len(keys) - 1:
            node[key] = _parse(value, node[key], dotted)
        node = node[key]


def _parse(text: str, current: Any, name: str, flag: str = "--config.") -> Any:
    """`text` as a value of the type of `current`."""
    if isinstance(current, str):
        return text
    if isinstance(current, ConfigDict):
        raise UserError(f"--config.{name} is a block; set one of its keys: {', '.join(sorted(current))}")
    try:
        value = {"true": True, "false": False}.get(text.lower())
        value = ast.literal_eval(text) if value is None else value
    except (ValueError, SyntaxError, TypeError):
        value = text
    if isinstance(current, float) and type(value) is int:
        value = float(value)
    if isinstance(current, tuple) and isinstance(value, list):
        value = tuple(value)
    if type(value) is not type(current):
        wanted, got = type(current).__name__, type(value).__name__
        raise UserError(f"{flag}{name}={text}: expected {wanted} (now {current!r}), got {got}")
    return value


def check_kwargs(what: str, target: Callable, kwargs: Mapping[str, Any], given: Sequence[str] = ()) -> None:
    """Every block is the keyword arguments of one callable: UserError names the wrong or missing ones.

    `given` are the arguments that the program adds itself.
    """
    parameters = {
        n: p
        for n, p in inspect.signature(target).parameters.items()
        if n not in given and n not in ("self", "parent", "name")
    }
    unknown = sorted(set(kwargs) - set(parameters))
    if unknown:
        raise UserError(f"{what} has no {', '.join(map(repr, unknown))}; allowed: {', '.join(sorted(parameters))}")
    missing = sorted(n for n, p in parameters.items() if p.default is p.empty and n not in kwargs)
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}")


def task_class(name: str) -> type:
    """The Flax module class of a task: the file name is the registry."""
    return _registered("tasks", name)


def eval_class(name: str) -> type:
    """The class of an evaluator: the file name is the registry."""
    return _registered("evals", name)


def _registered(room: str, name: str) -> type:
    """The one class of `speechjax/<room>/<name>.py` whose name is the file's, underscores and case aside."""
    folder = Path(__file__).parent / room
    names = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
    if name not in names:
        raise UserError(f"no {room} named {name!r}; there are: {', '.join(names)}")
    module = importlib.import_module(f"speechjax.{room}.{name}")
    for key, value in vars(module).items():
        if key.lower() == name.replace("_", "") and isinstance(value, type):
            return value
    raise UserError(f"speechjax/{room}/{name}.py defines no class of that name")


def check(config: Any) -> None:
    """UserError unless every block fits its callable."""
    from speechjax import optim, schedule, sharding
    from speechjax.data import pipeline

    blocks = {"data", "evals", "init_from", "mesh", "model", "optim", "task", "train"}
    if set(config) != blocks:
        raise UserError(f"a config has the blocks {', '.join(sorted(blocks))}; this one: {', '.join(sorted(config))}")
    named = {"config.task": config.task, "config.model.frontend": config.model.frontend}
    for what, block in (named | {f"config.evals.{k}": block for k, block in config.evals.items()}).items():
        if "name" not in block:
            raise UserError(f"{what} needs name")
    check_kwargs("config.task", task_class(config.task.name), _without_name(config.task), given=("encoder",))
    _check_model(config.model.to_dict())
    added = ("seed", "row_divisor", "frame_len", "segment_align", "workdir")
    check_kwargs("config.data", pipeline.open_data, config.data, given=added)
    check_kwargs("config.optim", optim.make_optimizer, config.optim, given=("steps",))
    check_kwargs("config.mesh", sharding.make_mesh, config.mesh, given=("devices",))
    check_kwargs("config.train", schedule.Schedule, config.train)
    schedule.Schedule(**config.train)
    judge = config.train.best_metric.partition("/")[0]
    if config.evals and judge not in config.evals:
        there = ", ".join(config.evals)
        raise UserError(f"config.train.best_metric={config.train.best_metric!r}: config.evals has {there}")
    for name, block in config.evals.items():
        check_kwargs(f"config.evals.{name}", eval_class(block.name), _without_name(block), given=("job",))


def _check_model(model: Mapping[str, Any]) -> None:
    """UserError unless the model block and the blocks inside fit their callables."""
    from speechjax.models import adapters, encoder, positions, relative, transformer

    check_kwargs("config.model", encoder.SpeechEncoder, model)
    blocks = {
        "frontend": (encoder.FRONTENDS, None, ("dtype",)),
        "positions": (positions.POSITIONS, "conv", ("dtype",)),
        "block": (transformer.BLOCKS, "transformer", transformer.SHARED),
    }
    for key, (registry, default, given) in blocks.items():
        block = model.get(key, {})
        name = block.get("name", default)
        if name not in registry:
            raise UserError(f"config.model.{key}.name={name!r}: there are {', '.join(registry)}")
        check_kwargs(f"config.model.{key}", registry[name], _without_name(block), given=given)
    attention = model.get("attention", {})
    check_kwargs("config.model.attention", relative.AttentionOptions, attention)
    relative.AttentionOptions(**attention)
    adapters.parse(model.get("adapters", ()))


def _without_name(block: Any) -> dict[str, Any]:
    return {k: v for k, v in block.items() if k != "name"}


def make_task(config: Any) -> Any:
    """The task module of a config, its encoder inside."""
    from speechjax.models.encoder import SpeechEncoder

    encoder = SpeechEncoder(**config.model.to_dict())
    return task_class(config.task.name)(encoder=encoder, **_without_name(config.task))


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Plain JSON types; what config.json in a workdir holds."""
    return json.loads(json.dumps(config.to_dict()))


def digest(config: ConfigDict) -> str:
    """Equal for equal configs: hexadecimal SHA-256."""
    return hashlib.sha256(json.dumps(to_json(config), sort_keys=True).encode()).hexdigest()


def claim_workdir(workdir: Path, config: ConfigDict) -> None:
    """Writes config.json, or refuses a workdir whose experiment is another one.

    What may differ from an earlier run: where it runs (mesh, cache), how often it logs, saves and evaluates, how long
    it trains, how much that cannot be read it bears; and the number of classes may be left to the data (0) again.  A
    run that never began binds nobody.
    """
    free = {"train.steps", "train.log_every", "train.checkpoint_every", "train.eval_every", "train.keep",
            "train.device_seconds", "data.cache_dir", "data.max_bad_share"}  # fmt: skip
    file = workdir / "config.json"
    mine = to_json(config)
    if (workdir / "best").exists() and not (workdir / "checkpoints").exists():
        raise UserError(
            f"{workdir} holds weights that no training left there: begin with them by --config.init_from={workdir} and "
            "train in another --workdir"
        )
    if file.exists() and any((workdir / name).exists() for name in ("metrics.jsonl", "checkpoints")):
        try:
            before = json.loads(file.read_text())
        except ValueError:  # not JSON, or not even text
            raise UserError(f"{file} is not valid JSON; repair it or use a new --workdir") from None
        old, new = _flat(before), _flat(mine)
        for k in (k for k, v in new.items() if k.endswith(".classes") and v == 0 and old.get(k)):
            override(config, f"{k}={old[k]}")
        mine = to_json(config)
        new = _flat(mine)
        changed = [
            f"{k}: {old.get(k, 'absent')!r} -> {new.get(k, 'absent')!r}"
            for k in sorted(old.keys() | new.keys())
            if old.get(k) != new.get(k) and k not in free and not k.startswith(("mesh.", "evals."))
        ]
        if changed:
            shown = "; ".join(changed[:6]) + ("; ..." if len(changed) > 6 else "")
            raise UserError(f"{workdir} holds another experiment ({shown}); use a new --workdir")
        for k in sorted(free & new.keys()):
            if old.get(k, new[k]) != new[k]:
                log.info("%s: %r -> %r since the last start", k, old[k], new[k])
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(".tmp")
        scratch.write_text(json.dumps(mine, indent=2) + "\n")
        scratch.replace(file)
    except OSError as error:
        raise UserError(f"cannot write --workdir={workdir}: {error.strerror}") from error


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for key, sub in tree.items() for k, v in _flat(sub, f"{prefix}{key}.").items()}
