import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.config.load import GROUPS, group_choices, load_config
from harness.config.schema import RanksConfig, RunConfig
from harness.run import main
from phatgoose.errors import PhatgooseError
from phatgoose.ops.frozen_linear import library
from phatgoose.routers import ROUTERS, Phatgoose, Single, make_router

RUN = "run.dir=/data/run"


def load(*arguments: str) -> RunConfig:
    return load_config([RUN, *arguments])


def refused(*arguments: str) -> str:
    """Return the one-line error with which a command line is refused."""
    with pytest.raises(PhatgooseError) as caught:
        load(*arguments)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_defaults_and_derived_values_are_correct() -> None:
    config = load()
    assert config.base.name == "smollm2-135m"
    assert config.registry == "/data/run/registry"
    assert config.stages == ["train", "evaluate", "report"]
    assert list(config.router) == [
        "base",
        "phatgoose",
        "merged",
        "random",
        "best_individual",
        "oracle",
    ]
    assert len(config.pool_tasks()) == 8
    assert len(config.suite_tasks(config.suites[0])) == 6
    routers = config.routers(["a", "b"])
    assert list(routers) == ["base", "phatgoose", "merged", "random", "single:a", "single:b"]
    assert routers["phatgoose"] == Phatgoose(top_k=2)


def test_overrides_change_the_configuration() -> None:
    config = load(
        "train.lora.steps=7",
        "train.lora.lr=1e-4",
        "suite.style=paper",
        "registry=s3://bucket/registry",
        "router.phatgoose.top_k=1",
        "cluster.max_actors=1",
        "pool.tasks.plural.members=[operators]",
    )
    assert (config.train.lora.steps, config.train.lora.lr) == (7, 1e-4)
    assert config.train.gates == load().train.gates
    assert all(task.style == "paper" for task in config.suite_tasks(config.suites[0]))
    assert config.registry == "s3://bucket/registry"
    assert config.routers([])["phatgoose"] == Phatgoose(top_k=1)
    assert config.cluster.max_actors == 1
    assert {task.name: task.members for task in config.pool_tasks()}["plural"] == ("operators",)


def test_a_task_may_be_added() -> None:
    config = load("+pool.tasks.own.members=[operators]")
    assert config.pool_tasks()[-1].name == "own"


def test_the_recipe_trains_over_the_dtype_of_the_base() -> None:
    assert load().train.dtype == "float32"
    assert load("base.dtype=bfloat16").train.dtype == "bfloat16"


@pytest.mark.parametrize("name", ["/models/my-llama", "/models/with space", "owner/model-1.5B"])
def test_a_base_may_be_a_folder_or_a_hub_name(name: str) -> None:
    config = load(f"base={name}")
    assert config.base.name == name
    assert config.base.dtype == "float32"


def test_single_experts_are_routers() -> None:
    config = load("router=[single:plural,base,single:qa_wikidata]")
    routers = config.routers([task.name for task in config.pool_tasks()])
    assert routers["single:plural"] == Single("plural")
    assert sorted(routers) == ["base", "single:plural", "single:qa_wikidata"]
    assert list(load("router=single:plural").routers(["x"])) == ["single:plural"]
    assert list(load("router=[single]").routers(["x", "y"])) == ["single:x", "single:y"]


def test_stages_are_chosen() -> None:
    assert load("stages=[report]").stages == ["report"]
    assert load("stages=train").stages == ["train"]
    assert load("stages=[]").stages == []


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("pol=demo", "pol: no such key; did you mean pool"),
        ("pool=dmo", "pool=dmo: no such pool; did you mean demo?"),
        ("base=smolm2-135m", "base=smolm2-135m: no such base; did you mean smollm2-135m"),
        ("router=[phatgose]", "router=phatgose: no such router; did you mean phatgoose"),
        ("router=[base,mergd]", "router=mergd: no such router; did you mean merged or"),
        ("router=[sngle:plural]", "router=sngle:plural: no such router; did you mean single?"),
        ("router=[single:plurl]", "no expert 'plurl': did you mean plural?"),
        ("train.lora.stps=3", "train.lora.stps: no such key; did you mean train.lora.steps"),
        ("trian.lora.steps=3", "trian.lora.steps: no such key; did you mean train.lora.steps"),
        ("+unknown=1", "unknown: no such key; available: base, pool"),
        ("+train.stps=1", "Key 'stps' not in 'Recipe'"),
        ("+cluster.gpu=1", "Key 'gpu' not in 'ClusterConfig'"),
        ("+pool.tasks.plural.membrs=[x]", "there is no 'membrs'; did you mean members or metric?"),
        (
            "+router.phatgose.top_k=1",
            "router.phatgose: no such router (a variant needs `kind`); did you mean phatgoose",
        ),
        ("+router.phatgoose.topk=1", "Key 'topk' not in 'Phatgoose'"),
        ("stages=[trian]", "no stage 'trian'; did you mean train?"),
        ("suite.split=evaluaton", "there is no 'evaluaton'; did you mean evaluation?"),
    ],
)
def test_a_mistyped_name_is_refused_with_the_near_names(argument: str, expected: str) -> None:
    assert expected in refused(argument)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("train.lora.steps=abc", "lora.steps: Value 'abc'"),
        ("train.lora.steps=1.5", "lora.steps: Value '1.5'"),
        ("train.lora=5", "train"),
        ("train.batch_size=9", "does not divide"),
        ("train=demo,paper", "a run takes only one value"),
        ("train.seed=1,2", "a run takes only one value"),
        ("base=[smollm2-135m,flan-t5-small]", "a run takes only one value"),
        ("base.name=null", "name"),
        ("base.dtype=float16", "base.dtype=float16"),
        ("router=[]", "router=[]"),
        ("router.phatgoose.top_k=two", "top_k: Value 'two'"),
        ("router.phatgoose.top_k=null", "top_k"),
        ("router.phatgoose.top_k=0", "top_k is 0"),
        ("router.random.seed=x", "seed: Value 'x'"),
        ("suite.limit=abc", "limit must be a positive number, not 'abc'"),
        ("+pool.limit=3", "pool.limit: this is an evaluation option"),
        ("pool.tasks=null", "pool.tasks=None"),
        ("pool.tasks.plural.members=5", "task plural: members must be a list"),
        ("suite.tasks=null", "suite.tasks=None"),
        ("suite.name=a/b", "suite.name=a/b"),
        ("cluster.max_actors=two", "max_actors: Value 'two'"),
        ("cluster.max_actors=0", "cluster.max_actors=0"),
        ("chunk_tokens=0", "chunk_tokens=0"),
        ("shard_tokens=-1", "shard_tokens=-1"),
        ("overlap.limit=5", "overlap.limit=5.0: not a share"),
        ("overlap.limit=-0.1", "overlap.limit=-0.1: not a share"),
        ("chunk_tokens=many", "chunk_tokens=many"),
        ("shard_tokens=null", "shard_tokens=None"),
        ("run.dir=relative/run", "run.dir=relative/run: the path is relative"),
        ("registry=relative", "registry=relative: the path is relative"),
        ("run.dir=null", "dir"),
        ("run.dir=${nope}", "nope"),
        ("nonsense", "nonsense"),
        ("--cfg", "cannot read the command line"),
    ],
)
def test_an_invalid_value_is_refused(argument: str, expected: str) -> None:
    assert expected in refused(argument)


# Their required options, as their errors state.
NEEDS = {
    "pool=jsonl": "files='/data/*.jsonl'",
    "pool=natural_instructions": "pool.folder=/data/natural-instructions",
    "pool=peft": "adapters=[/data/a,owner/name]",
    "suite=jsonl": "files='/data/*.jsonl'",
    "suite=lm_eval": "suite=lm_eval:bbh",
}


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_of_every_group_composes(group: str) -> None:
    assert group_choices()[group]
    for choice in group_choices()[group]:
        if f"{group}={choice}" in NEEDS:
            assert NEEDS[f"{group}={choice}"] in refused(f"{group}={choice}")
            continue
        config = load(f"{group}={choice}")
        assert config.pool_tasks()
        assert config.suite_tasks(config.suites[0])
        assert config.routers(["a"])


def test_the_paper_recipe_is_the_default_of_the_library() -> None:
    from phatgoose.training.recipe import Recipe

    assert load("train=paper", "base=t5-xl-lm-adapt").train == Recipe()


def test_help_names_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for group, choices in group_choices().items():
        start = next(i for i, line in enumerate(lines) if line.split()[:1] == [group])
        text = " ".join(lines[start : start + 6])
        assert all(choice in text for choice in choices)
    assert max(map(len, lines)) <= 100


def test_an_error_gives_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pol=demo"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: pol: no such key")
    assert output.err.count("\n") == 1


def test_a_mistyped_command_line_ends_within_seconds(tmp_path: Path) -> None:
    started = time.monotonic()
    run_dir = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "harness.run", "pol=demo", f"run.dir={run_dir}"],
        env={**os.environ, "PHATGOOSE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert len(errors) == 1
    assert "did you mean pool" in errors[0]
    assert list(tmp_path.iterdir()) == []
    # Modules that are slow to import are only for runs that have work to do.
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert imported.isdisjoint({"ray", "deepspeed", "lm_eval", "datasets", "transformers"})
    assert time.monotonic() - started < 30


def test_a_variant_is_evaluated_beside_its_original_router() -> None:
    config = load(
        "+router.top1.kind=phatgoose", "+router.top1.top_k=1", "router=[phatgoose,arrow_phatgoose]"
    )
    routers = config.routers([])
    assert routers == {
        "phatgoose": make_router("phatgoose"),
        "arrow_phatgoose": make_router(
            "arrow", top_k=2, temperature=10.0, divide_by_sqrt_d=True, mix="outputs"
        ),
        "top1": make_router("phatgoose", top_k=1),
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["+router.mine.kind=phatgose"], "router.mine.kind=phatgose: no such router; did you mean"),
        (["+router.mine.kind=oracle"], "router.mine.kind=oracle: oracle has no variants"),
        (["router.phatgoose=3"], "router.phatgoose=3: not a mapping"),
        (["+router.mine.kind=multitask"], "multitask has no variants"),
        (["+router.mine.top_k=1"], "router.mine: no such router (a variant needs `kind`)"),
        (["~pool.name"], "pool.name=None"),
        (["~suite.tasks"], "demo: there are no tasks. Name some"),
        (["+router.merged.kind=phatgoose"], "merged is itself a router. Give the variant another"),
        (["+router.oracle.kind=phatgoose"], "oracle is itself a router"),
        (["+router.oracle.expert=plural"], "router.oracle.expert: no such option"),
        (["router=[multitask]", "+router.multitask.stepz=3"], "router.multitask.stepz: no such"),
        (["+suite.adapter=/x"], "experts belong in a pool, not in a suite"),
        (["router=[arrow]", "router.arrow.mix=x"], "router arrow: mix is 'x'"),
        (["router=[arrow]", "router.arrow.top_k=two"], "'two'"),
        (["router=[genknowsub]", "pool.general=nobody"], "no expert 'nobody'"),
        (["router=[genknowsub]", "~pool.general"], "router genknowsub: name the general expert"),
        (["train.gates=null"], "router phatgoose needs gates, and train.gates is null"),
        (["router=[multitask]", "router.multitask.steps=0"], "steps of at least 1"),
        (["router=[multitask]", "router.multitask.steps=many"], "router.multitask.steps"),
        (["router=[multitask]", "+pool.tasks.multitask.members=[plural]"], "multitask"),
    ],
)
def test_invalid_routers_are_refused(arguments: list[str], expected: str) -> None:
    with pytest.raises(PhatgooseError, match=re.escape(expected)):
        load(*arguments)


def test_all_includes_every_router() -> None:
    """Check that each router has a YAML file with the class's defaults, and a line in all.yaml."""
    config = load("router=[all]")
    assert {*config.router, "single", "all"} == set(group_choices()["router"])
    assert set(ROUTERS) - {"single"} <= set(config.router)
    for name, router in config.routers([]).items():
        kind = (config.router[name] or {}).get("kind")
        if kind is None and name not in ("genknowsub", "multitask"):
            assert router == make_router(name), name


def test_the_multitask_expert_trains_as_long_as_all_experts_together() -> None:
    recipe = load("router=[multitask]").multitask_recipe
    assert recipe is not None
    assert (recipe.lora.steps, recipe.gates) == (8 * 24, None)
    recipe = load("router=[multitask]", "router.multitask.steps=5").multitask_recipe
    assert recipe is not None
    assert recipe.lora.steps == 5
    assert load().multitask_recipe is None


def test_a_report_without_a_run_is_refused_and_makes_no_folder(tmp_path: Path) -> None:
    from harness.run import run

    with pytest.raises(PhatgooseError, match="there is no run to report"):
        run(load("stages=[report]", f"run.dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


def test_ranks_are_not_part_of_the_recipe() -> None:
    alone = load_config(["train.batch_size=8", "train.micro_batch_size=2"])
    config = load_config(
        [
            "train.batch_size=8",
            "train.micro_batch_size=2",
            "train.ranks_per_expert=4",
            "train.zero_stage=3",
            "train.gpus_per_expert=4",
        ]
    )
    assert config.train == alone.train
    assert config.ranks == RanksConfig(4, 3, 4)
    assert config.ranks.gpus_per_rank(config.cluster) == 1
    assert alone.ranks == RanksConfig()
    assert alone.ranks.gpus_per_rank(alone.cluster) is None
    half = load_config(["train.gpus_per_expert=0.5"])
    assert half.ranks.gpus_per_rank(half.cluster) == 0.5


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["train.zero_stage=4"], "train.zero_stage=4: it must be 0, 1, 2 or 3"),
        (["train.zero_stage=all"], "train|zero_stage"),
        (["train.ranks_per_expert=0"], "train.ranks_per_expert=0: it must be at least 1"),
        (["train.ranks_per_expert=2"], "must divide the 1 micro-batches of a batch"),
        (
            ["train.ranks_per_expert=2", "train.micro_batch_size=4", "train.gpus_per_expert=1"],
            "train.gpus_per_expert=1: with train.ranks_per_expert=2 it must be 0 or 2",
        ),
        (["train.gpus_per_expert=-1"], "train.gpus_per_expert=-1"),
        (["train.zero_stag=1"], "did you mean train.zero_stage"),
        (["train.retry_lr=1.5"], "train.retry_lr is 1.5"),
        (["train.sort_window=0"], "train.sort_window is 0"),
        (
            ["train.gradient_checkpointing=often"],
            "configuration: train: gradient_checkpointing: Value 'often' is not a valid bool",
        ),
    ],
)
def test_invalid_ranks_are_refused(arguments: list[str], problem: str) -> None:
    with pytest.raises(PhatgooseError, match=problem.replace(".", r"\.")):
        load_config(arguments)


def test_an_unknown_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHATGOOSE_LINEAR", "blas")
    library.cache_clear()
    try:
        assert refused().startswith("PHATGOOSE_LINEAR=blas: ")
    finally:
        library.cache_clear()


@pytest.mark.parametrize("choice", ["demo", "paper"])
def test_presets_keep_random_batches_and_all_activations(choice: str) -> None:
    recipe = load(f"train={choice}").train
    assert recipe.sort_window == 1
    assert not recipe.gradient_checkpointing
    changed = load(f"train={choice}", "train.sort_window=8", "train.gradient_checkpointing=true")
    assert (changed.train.sort_window, changed.train.gradient_checkpointing) == (8, True)
