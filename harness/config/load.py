"""Compose a run's configuration from the command line and the YAML groups in `conf/` with Hydra."""

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config.check import check_values
from harness.config.schema import OverlapConfig, RanksConfig, RunConfig, RunSection
from harness.extra_routers import DERIVED, MULTITASK
from harness.scheduling.settings import BaseConfig, ClusterConfig
from phatgoose.errors import PhatgooseError, check_known, reason_of
from phatgoose.profile import ProfileConfig
from phatgoose.routers import ROUTERS, Router
from phatgoose.training.recipe import Recipe

CONF = Path(__file__).parents[1] / "conf"
GROUPS = ("base", "pool", "suite", "router", "train", "profile", "cluster")
# Options of entries that are not in `ROUTERS`, or whose options the user does not set directly.
_OPTIONS: dict[str, list[str]] = {
    "single": ["experts"],
    MULTITASK: ["steps"],
    **{router: [] for router in DERIVED},
}
T = TypeVar("T")


def load_config(arguments: Sequence[str]) -> RunConfig:
    """Compose and check the configuration for a command line.

    Args:
        arguments: Hydra overrides, such as `pool=demo` or `train.lora.steps=50`.

    Raises:
        PhatgooseError: a key or value is unknown or invalid; the message suggests similar names.
    """
    configs = [_load(one) for one in _one_suite_each(arguments)]
    config = replace(configs[0], suites=[suite for c in configs for suite in c.suites])
    check_values(config)
    return config


def _load(arguments: Sequence[str]) -> RunConfig:
    """Compose the configuration of a run with one suite."""
    singles, overrides = _take_shorthands(arguments)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            _check_overrides(overrides)
            composed = compose("config", overrides=overrides)
            OmegaConf.resolve(composed)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            raise PhatgooseError(f"configuration: {_first_line(error)}") from error
    if singles:
        OmegaConf.update(composed, "router.single.experts", singles, force_add=True)
    return _to_dataclass(composed)


def _one_suite_each(arguments: Sequence[str]) -> list[list[str]]:
    """Split `suite=[bbh,bbl]` into one command line per suite; Hydra composes one at a time."""
    for place, argument in enumerate(arguments):
        several = re.fullmatch(r"suite=\[(.*)\]", argument)
        if several:
            names = [name.strip() for name in several[1].split(",")]
            before, after = list(arguments[:place]), list(arguments[place + 1 :])
            return [[*before, f"suite={name}", *after] for name in names]
    return [list(arguments)]


def group_choices() -> dict[str, list[str]]:
    """Return the choices of each configuration group."""
    return {group: sorted(f.stem for f in (CONF / group).glob("*.yaml")) for group in GROUPS}


def _take_shorthands(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Expand the shorthands that Hydra does not support; return single experts and overrides.

    `router=[single:plural]` becomes `router=[single]`, and the experts are returned separately.
    `base=/a/folder` and `base=owner/model` set `base.name`. `suite=lm_eval:bbh,arc_easy` names
    tasks of lm-eval.
    """
    experts, overrides = [], []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key == "router" and "single:" in value:
            names = [name.strip() for name in value.strip("[] ").split(",")]
            experts += [name.partition(":")[2] for name in names if name.startswith("single:")]
            kinds = list(dict.fromkeys(name.partition(":")[0] for name in names))
            value = f"[{','.join(kinds)}]"
        elif key == "base" and "/" in value:
            key = "base.name"
        elif key == "suite" and value.startswith("lm_eval:"):
            tasks = value.removeprefix("lm_eval:")
            title = re.sub(r"\W+", "-", f"lm_eval-{tasks}")[:60]
            overrides += [f"suite.lm_eval=[{tasks}]", f"suite.name={title}"]
            value = "lm_eval"
        overrides.append(f"{key}{equals}{value}")
    return experts, overrides


def _check_overrides(overrides: Sequence[str]) -> None:
    """Reject unknown groups, choices and keys, with similar names, before Hydra sees them."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise PhatgooseError(f"cannot read the command line: {_first_line(error)}") from error
    choices = group_choices()
    for override in parsed:
        key, value = override.key_or_group, override.value()
        several = isinstance(value, list) and key in choices and key != "router"
        if override.is_sweep_override() or several:
            raise PhatgooseError(f"{override.input_line}: a run takes only one value")
        if key not in choices:
            continue
        for choice in value if isinstance(value, list) else [value]:
            check_known(str(choice), choices[key], f"{key}={choice}: no such {key}")
    chosen = [str(override.input_line) for override in parsed if override.key_or_group in choices]
    keys = [*dict.fromkeys([*_keys(chosen), *GROUPS])]
    for override in parsed:
        key = override.key_or_group
        names = [*GROUPS, "registry", "stages", "run", "overlap"] if override.is_add() else keys
        check_known(key.split(".")[0] if override.is_add() else key, names, f"{key}: no such key")


def _keys(chosen: Sequence[str]) -> list[str]:
    """Return all keys and groups of the configuration with these choices of groups."""

    def walk(node: DictConfig, prefix: str) -> list[str]:
        found = []
        for key in node:
            found.append(f"{prefix}{key!s}")
            child = node._get_node(key)
            if isinstance(child, DictConfig):
                found += walk(child, f"{prefix}{key!s}.")
        return found

    return walk(compose("config", overrides=list(chosen)), "")


def _to_dataclass(composed: DictConfig) -> RunConfig:
    OmegaConf.set_struct(composed, False)
    for key in ("chunk_tokens", "shard_tokens"):
        if not isinstance(composed[key], int) and (key, composed[key]) != ("chunk_tokens", None):
            raise PhatgooseError(f"{key}={composed[key]}: not a whole number")
    if composed.base.dtype not in ("float32", "bfloat16"):
        raise PhatgooseError(f"base.dtype={composed.base.dtype}: it must be float32 or bfloat16")
    composed.train.dtype = composed.base.dtype
    # All of these are set under `train`, but only the recipe is part of an expert's identity.
    names = [f.name for f in fields(RanksConfig)]
    composed.ranks = {name: composed.train.pop(name) for name in names if name in composed.train}
    accept_code = composed.train.pop("accept_code", False)
    if not isinstance(accept_code, bool):
        raise PhatgooseError(f"train.accept_code={accept_code}: it must be true or false")
    stages = composed.stages or []
    return RunConfig(
        base=_typed(BaseConfig, composed, "base"),
        pool=_plain(composed, "pool"),
        suites=[_plain(composed, "suite")],
        router=_router(composed),
        train=_typed(Recipe, composed, "train"),
        profile=_typed(ProfileConfig, composed, "profile"),
        cluster=_typed(ClusterConfig, composed, "cluster"),
        run=_typed(RunSection, composed, "run"),
        registry=str(composed.registry),
        stages=[stages] if isinstance(stages, str) else list(stages),
        chunk_tokens=composed.chunk_tokens,
        shard_tokens=composed.shard_tokens,
        accept_code=accept_code,
        overlap=_typed(OverlapConfig, composed, "overlap"),
        ranks=_typed(RanksConfig, composed, "ranks"),
    )


def _typed(kind: type[T], composed: DictConfig, key: str) -> T:
    """Return one group as its dataclass, with every value of the right type."""
    schema = OmegaConf.structured(kind)
    for node in (schema, *(n for n in map(schema._get_node, schema) if OmegaConf.is_config(n))):
        OmegaConf.set_readonly(node, False)  # frozen dataclasses are read-only
    try:
        value = OmegaConf.to_object(OmegaConf.merge(schema, composed[key]))
    except OmegaConfBaseException as error:
        raise PhatgooseError(f"configuration: {key}: {_first_line(error)}") from error
    except PhatgooseError as error:  # the class names its fields `recipe.rank`, users `train.rank`
        named = str(error).replace(f"{kind.__name__.lower()}.", f"{key}.")
        raise PhatgooseError(named) from error
    assert isinstance(value, kind)
    return value


def _plain(composed: DictConfig, key: str) -> dict[str, Any]:
    """Return a group as a dictionary. Its values are checked where they are used."""
    container = OmegaConf.to_container(composed[key])
    assert isinstance(container, dict)
    return {str(name): value for name, value in container.items()}


def _router(composed: DictConfig) -> dict[str, Any]:
    """Return the routers and their options, checked against the types of the routers' classes."""
    if not composed.get("router"):
        raise PhatgooseError("router=[]: no router is given. Name at least one.")
    for key, options in composed.router.items():
        name = str(key)
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise PhatgooseError(f"router.{name}: invalid name. Use letters, digits and _.")
        options = {} if options is None else options
        if not isinstance(options, (dict, DictConfig)):
            raise PhatgooseError(
                f"router.{name}={options!r}: not a mapping. Give options, such as "
                "router.phatgoose.top_k=3."
            )
        if "kind" in options:
            if name in (*ROUTERS, *_OPTIONS):
                raise PhatgooseError(
                    f"router.{name}.kind: {name} is itself a router. Give the variant another name."
                )
            kind = str(options["kind"])
            kinds = [router for router in ROUTERS if router != "single"]
            if kind in _OPTIONS:
                raise PhatgooseError(f"router.{name}.kind={kind}: {kind} has no variants")
            check_known(kind, kinds, f"router.{name}.kind={kind}: no such router")
            _options(composed, name, ROUTERS[kind])
        elif name in _OPTIONS:
            for option in map(str, options):
                check_known(option, _OPTIONS[name], f"router.{name}.{option}: no such option")
        else:
            names = [*dict.fromkeys([*ROUTERS, *_OPTIONS])]
            check_known(name, names, f"router.{name}: no such router (a variant needs `kind`)")
            _options(composed, name, ROUTERS[name])
    return _plain(composed, "router")


def _options(composed: DictConfig, name: str, router: type[Router]) -> None:
    """Check one router's options against the fields of its class."""
    options = {key: value for key, value in (composed.router[name] or {}).items() if key != "kind"}
    _typed(router, OmegaConf.create({name: options}), name)


def _first_line(error: Exception) -> str:
    key = getattr(error, "full_key", None)
    where = f"{key}: " if key else ""
    return where + reason_of(error, first_line=True)
