"""A run's configuration: YAML groups in `conf/`, composed by Hydra, checked before any work."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.summary import DERIVED
from harness.tasks import TaskSpec, task_specs
from phatgoose.errors import PhatgooseError
from phatgoose.profile import ProfileConfig
from phatgoose.recipe import Recipe
from phatgoose.routers import ROUTERS, Router, all_needs, make_router
from phatgoose.routers.single import Single

CONF = Path(__file__).parent / "conf"
GROUPS = ("base", "pool", "suite", "router", "train", "profile", "cluster")
STAGES = ("train", "evaluate", "report")
# The name of the expert that is trained on all the pool's data, and of the router that is only it.
MULTITASK = "multitask"
# Entries of `router` that stand for single experts.
_OF_SINGLES = ("single", *DERIVED)
# The options of entries that are no classes of `ROUTERS`, or are not filled in by the user.
_OPTIONS: dict[str, list[str]] = {
    "single": ["experts"],
    MULTITASK: ["steps"],
    **{router: [] for router in DERIVED},
}
# Keys of a suite that takes the pool's tasks, and what else it may say of them.
_OF_POOL = ("name", "of_pool")
_OF_POOL_TOO = ("limit", "max_new_tokens", "metric", "style")
T = TypeVar("T")


@dataclass
class BaseConfig:
    """Which base; the fields of `phatgoose.load_base`."""

    name: str
    revision: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False


@dataclass
class ClusterConfig:
    """How actors are sized, and the labels of the nodes that they may run on."""

    cpus_per_actor: float = 1
    gpus_per_actor: float | None = None
    max_actors: int | None = None
    lease_seconds: float = 900
    wait_seconds: float = 60
    checkpoint_seconds: float = 60
    train_nodes: dict[str, str] = field(default_factory=dict)
    evaluate_nodes: dict[str, str] = field(default_factory=dict)


@dataclass
class RanksConfig:
    """How many processes train one expert, and on what: no part of what determines the expert.

    Attributes:
        ranks_per_expert: processes that train one expert together.
        zero_stage: what ZeRO partitions among them, from 0, nothing, to 3, the base's weights too.
        gpus_per_expert: for all ranks together; None: one per rank where the cluster has GPUs.
    """

    ranks_per_expert: int = 1
    zero_stage: int = 0
    gpus_per_expert: float | None = None

    def gpus_per_rank(self, cluster: ClusterConfig) -> float | None:
        """How many GPUs each rank takes; None: one where there are any."""
        if self.gpus_per_expert is None:
            return cluster.gpus_per_actor
        return self.gpus_per_expert / self.ranks_per_expert


@dataclass
class OverlapConfig:
    """How much of a suite task may stand in an expert's training data: a share of its documents."""

    limit: float = 0.05


@dataclass
class RunSection:
    """Where the run's files go."""

    dir: str


@dataclass
class RunConfig:
    """A whole run, as `conf/config.yaml` and its groups describe it."""

    base: BaseConfig
    pool: dict[str, Any]
    suites: list[dict[str, Any]]
    router: dict[str, Any]
    train: Recipe
    profile: ProfileConfig
    cluster: ClusterConfig
    run: RunSection
    registry: str
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    chunk_characters: int = 4000
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    ranks: RanksConfig = field(default_factory=RanksConfig)

    def pool_tasks(self) -> list[TaskSpec]:
        """The pool's tasks: one expert each."""
        return task_specs(self.pool)

    def suite_tasks(self, suite: Mapping[str, Any]) -> list[TaskSpec]:
        """A suite's tasks; with `of_pool`, those of the pool, on their own evaluation splits."""
        if not suite.get("of_pool"):
            return task_specs(suite)
        changes = {
            key: value
            for key, value in suite.items()
            if key in _OF_POOL_TOO and (value is not None or key == "limit")
        }
        own = [spec for spec in self.pool_tasks() if spec.has_data]
        if not own:
            raise PhatgooseError(f"suite {suite['name']}: no task of the pool has data")
        return [replace(spec, adapter=None, split="evaluation", **changes) for spec in own]

    def routers(self, experts: Sequence[str]) -> dict[str, Router]:
        """The routers to evaluate, by the name they have in results.

        `oracle` and `best_individual` stand for a single router per expert; their own rows are
        derived from theirs. An entry's `kind` is the router that it is a variant of.
        """
        routers: dict[str, Router] = {}
        for name, entry in self.router.items():
            options = dict(entry or {})
            if name in _OF_SINGLES:
                for expert in options.get("experts") or experts:
                    routers.setdefault(f"single:{expert}", make_router(f"single:{expert}"))
            elif name == MULTITASK:
                routers[name] = Multitask(MULTITASK)
            else:
                routers[name] = make_router(options.pop("kind", name), **options)
        return routers

    @property
    def multitask_recipe(self) -> Recipe | None:
        """How to train the expert of the router `multitask`; None if there is no such router."""
        if MULTITASK not in self.router:
            return None
        steps = (self.router[MULTITASK] or {}).get("steps")
        if steps is None:
            steps = len(self.pool_tasks()) * self.train.lora.steps
        if not isinstance(steps, int):
            raise PhatgooseError(f"router.multitask.steps={steps}: not a whole number")
        return replace(self.train, lora=replace(self.train.lora, steps=steps), gates=None)


@dataclass(frozen=True)
class Multitask(Single):
    """The expert that was trained on all the pool's data together, for every token.

    Not post-hoc: it needs all the data at once. It is no member of the pool.
    """

    side_information: ClassVar[str | None] = "all training data at once (it is not post-hoc)"


def load_config(arguments: Sequence[str]) -> RunConfig:
    """Compose and check the configuration that the command line asks for.

    Args:
        arguments: Hydra overrides, such as `pool=demo` or `train.lora.steps=50`.

    Raises:
        PhatgooseError: a key or a value that does not exist, with the near names.
    """
    configs = [_load(one) for one in _one_suite_each(arguments)]
    config = replace(configs[0], suites=[suite for c in configs for suite in c.suites])
    _check_values(config)
    return config


def _load(arguments: Sequence[str]) -> RunConfig:
    """The configuration of a run with one suite."""
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
    """The command line once per suite of `suite=[bbh,bbl]`, which Hydra takes for one value."""
    for place, argument in enumerate(arguments):
        several = re.fullmatch(r"suite=\[(.*)\]", argument)
        if several:
            names = [name.strip() for name in several[1].split(",")]
            before, after = list(arguments[:place]), list(arguments[place + 1 :])
            return [[*before, f"suite={name}", *after] for name in names]
    return [list(arguments)]


def groups() -> dict[str, list[str]]:
    """The choices of each configuration group."""
    return {group: sorted(f.stem for f in (CONF / group).glob("*.yaml")) for group in GROUPS}


def _take_shorthands(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Write out what Hydra has no form for.

    `router=[single:plural]` becomes `router=[single]`, with the experts apart; `base=/a/folder` and
    `base=owner/model` set `base.name`; `suite=lm_eval:bbh,arc_easy` names tasks of lm-eval.
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
    """Refuse unknown groups, choices and keys with the near names, before Hydra sees them."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise PhatgooseError(f"cannot read the command line: {_first_line(error)}") from error
    choices = groups()
    for override in parsed:
        key, value = override.key_or_group, override.value()
        several = isinstance(value, list) and key in choices and key != "router"
        if override.is_sweep_override() or several:
            raise PhatgooseError(f"{override.input_line}: one run takes one value")
        if key not in choices:
            continue
        for choice in value if isinstance(value, list) else [value]:
            _known(str(choice), choices[key], f"{key}={choice}: no such {key}")
    chosen = [str(override.input_line) for override in parsed if override.key_or_group in choices]
    keys = [*dict.fromkeys([*_keys(chosen), *GROUPS])]
    for override in parsed:
        key = override.key_or_group
        known = [*GROUPS, "registry", "stages", "run", "overlap"] if override.is_add() else keys
        _known(key.split(".")[0] if override.is_add() else key, list(known), f"{key}: no such key")


def _keys(chosen: Sequence[str]) -> list[str]:
    """Every key and group that the configuration has, with these choices of groups."""

    def walk(node: DictConfig, prefix: str) -> list[str]:
        found = []
        for key in node:
            found.append(f"{prefix}{key!s}")
            child = node._get_node(key)
            if isinstance(child, DictConfig):
                found += walk(child, f"{prefix}{key!s}.")
        return found

    return walk(compose("config", overrides=list(chosen)), "")


def _known(name: str, known: Sequence[str], problem: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        there_is = f"did you mean {' or '.join(near)}?" if near else "there is "
        there_is += "" if near else ", ".join(known) or "none"
        raise PhatgooseError(f"{problem}; {there_is}")


def _to_dataclass(composed: DictConfig) -> RunConfig:
    OmegaConf.set_struct(composed, False)
    if not isinstance(composed.chunk_characters, int):
        raise PhatgooseError(f"chunk_characters={composed.chunk_characters}: not a whole number")
    if composed.base.dtype not in ("float32", "bfloat16"):
        raise PhatgooseError(f"base.dtype={composed.base.dtype}: it is float32 or bfloat16")
    composed.train.dtype = composed.base.dtype
    # Both are set under `train`; only the recipe is part of what determines an expert.
    names = [f.name for f in fields(RanksConfig)]
    composed.ranks = {name: composed.train.pop(name) for name in names if name in composed.train}
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
        chunk_characters=composed.chunk_characters,
        overlap=_typed(OverlapConfig, composed, "overlap"),
        ranks=_typed(RanksConfig, composed, "ranks"),
    )


def _typed(kind: type[T], composed: DictConfig, key: str) -> T:
    """One group as its dataclass, with every value of the right type."""
    schema = OmegaConf.structured(kind)
    for node in (schema, *(n for n in map(schema._get_node, schema) if OmegaConf.is_config(n))):
        OmegaConf.set_readonly(node, False)  # frozen dataclasses are read-only
    try:
        value = OmegaConf.to_object(OmegaConf.merge(schema, composed[key]))
    except OmegaConfBaseException as error:
        raise PhatgooseError(f"configuration: {key}: {_first_line(error)}") from error
    assert isinstance(value, kind)
    return value


def _plain(composed: DictConfig, key: str) -> dict[str, Any]:
    """A group whose values are checked by what reads them."""
    container = OmegaConf.to_container(composed[key])
    assert isinstance(container, dict)
    return {str(name): value for name, value in container.items()}


def _router(composed: DictConfig) -> dict[str, Any]:
    """The routers and their options, which must have the types that the routers' classes say."""
    if not composed.get("router"):
        raise PhatgooseError("router=[]: name at least one router")
    for key, options in composed.router.items():
        name = str(key)
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise PhatgooseError(f"router.{name}: a router's name is letters, digits and _")
        options = {} if options is None else options
        if not isinstance(options, (dict, DictConfig)):
            raise PhatgooseError(
                f"router.{name}={options!r}: it takes options, such as router.phatgoose.top_k=3"
            )
        if "kind" in options:
            if name in (*ROUTERS, *_OPTIONS):
                raise PhatgooseError(
                    f"router.{name}.kind: {name} is a router itself: give the variant another name"
                )
            kind = str(options["kind"])
            kinds = [router for router in ROUTERS if router != "single"]
            if kind in _OPTIONS:
                raise PhatgooseError(f"router.{name}.kind={kind}: {kind} has no variants")
            _known(kind, kinds, f"router.{name}.kind={kind}: no such router")
            _options(composed, name, ROUTERS[kind])
        elif name in _OPTIONS:
            for option in map(str, options):
                _known(option, _OPTIONS[name], f"router.{name}.{option}: no such option")
        else:
            names = [*dict.fromkeys([*ROUTERS, *_OPTIONS])]
            _known(name, names, f"router.{name}: no such router (a variant needs a kind)")
            _options(composed, name, ROUTERS[name])
    return _plain(composed, "router")


def _options(composed: DictConfig, name: str, router: type[Router]) -> None:
    """Check one router's options against the fields of its class."""
    options = {key: value for key, value in (composed.router[name] or {}).items() if key != "kind"}
    _typed(router, OmegaConf.create({name: options}), name)


def _check_values(config: RunConfig) -> None:
    for stage in config.stages:
        _known(stage, STAGES, f"stages: no stage {stage!r}")
    for key, folder in (("run.dir", config.run.dir), ("registry", config.registry)):
        if "://" not in folder and not Path(folder).is_absolute():
            raise PhatgooseError(
                f"{key}={folder} is relative: a submitted job runs in a temporary folder, so give "
                "an absolute path or a URI"
            )
    if config.chunk_characters < 1:
        raise PhatgooseError(f"chunk_characters={config.chunk_characters}: it must be positive")
    if config.cluster.max_actors is not None and config.cluster.max_actors < 1:
        raise PhatgooseError(f"cluster.max_actors={config.cluster.max_actors}: it must be positive")
    _check_ranks(config)
    for key, group in (("pool", config.pool), *(("suite", suite) for suite in config.suites)):
        name, tasks = group.get("name"), group.get("tasks", {})
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise PhatgooseError(f"{key}.name={name}: use letters, digits, _, . and -")
        if not isinstance(tasks, dict):
            raise PhatgooseError(f"{key}.tasks={tasks}: name tasks as `name: {{members: [...]}}`")
    for key in ("limit", "split", "max_new_tokens"):
        if key in config.pool:
            raise PhatgooseError(f"pool.{key}: it says how to evaluate, and belongs to a suite")
    names = [suite["name"] for suite in config.suites]
    if len({*names}) < len(names):
        raise PhatgooseError(f"suite=[{', '.join(names)}]: each needs a name of its own")
    for suite in config.suites:
        for key in suite if suite.get("of_pool") else ():
            _known(key, [*_OF_POOL, *_OF_POOL_TOO], f"suite.{key}: no such key of this suite")
    experts = [task.name for task in config.pool_tasks()]
    for task in [task for suite in config.suites for task in config.suite_tasks(suite)]:
        if task.adapter or task.source == "registry":
            raise PhatgooseError(f"suite task {task.name}: an expert stands in a pool, not here")
    if MULTITASK in experts:
        raise PhatgooseError(f"pool.tasks.{MULTITASK}: that name is the multitask expert's")
    _ = config.multitask_recipe  # an error if its steps are no number
    for router in config.routers(experts).values():
        if not isinstance(router, Multitask):
            router.check_experts(experts)
        if "gates" in all_needs(router) and config.train.gates is None:
            raise PhatgooseError(f"router {router.name()} needs gates, and train.gates is null")
    singles = (config.router.get("single") or {}).get("experts", [])
    if not isinstance(singles, list):
        raise PhatgooseError(f"router.single.experts={singles}: give a list, such as [{singles}]")
    for expert in singles:
        _known(expert, experts, f"router single:{expert}: the pool has no such expert")


def _check_ranks(config: RunConfig) -> None:
    ranks, recipe, gpus = config.ranks.ranks_per_expert, config.train, config.ranks.gpus_per_expert
    if ranks < 1:
        raise PhatgooseError(f"train.ranks_per_expert={ranks}: it must be at least 1")
    if config.ranks.zero_stage not in range(4):
        raise PhatgooseError(f"train.zero_stage={config.ranks.zero_stage}: it is 0, 1, 2 or 3")
    if recipe.accumulation % ranks:
        raise PhatgooseError(
            f"train.ranks_per_expert={ranks}: it must divide the {recipe.accumulation} "
            f"micro-batches of a batch (train.batch_size={recipe.batch_size} over "
            f"train.micro_batch_size={recipe.micro_batch_size})"
        )
    if gpus is not None and (gpus < 0 or (ranks > 1 and gpus not in (0, ranks))):
        raise PhatgooseError(
            f"train.gpus_per_expert={gpus:g}: with train.ranks_per_expert={ranks} it is 0 or "
            f"{ranks}; only a single rank may take a fraction"
        )
    if ranks > 1 and gpus is None and config.cluster.gpus_per_actor not in (None, 0, 1):
        raise PhatgooseError(
            f"cluster.gpus_per_actor={config.cluster.gpus_per_actor:g}: each of several ranks "
            f"takes one GPU or none: set train.gpus_per_expert={ranks}"
        )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = getattr(error, "full_key", None)
    where = f"{key}: " if key else ""
    return where + (lines[0] if lines else type(error).__name__)
