"""P3: data sets of the hub rendered with promptsource's templates, as PHATGOOSE's authors use it.

Every pair of a row and a template is an example. Training uses all templates; evaluation uses those
for the data set's original task, pooled (arXiv 2402.05859, appendix B). A template that does not
apply to a row yields no example; the authors train on a placeholder instead.

Evaluation records are multiple choice where the authors' are (`interface: mc`). The correct choice
is the template's answer, otherwise the choice with the longest common prefix. Training only needs
the answer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.tasks.records import Record, Split, check_record, document_id
from harness.tasks.sources import hub
from harness.tasks.sources.hub import HubData
from harness.tasks.sources.jsonl import with_space
from harness.tasks.sources.promptsource import Template, templates_of
from harness.tasks.sources.source import TaskRecords, no_tasks, options_of
from harness.tasks.spec import TaskSpec, one_of
from phatgoose.errors import PhatgooseError

# Seeds of the authors' released code.
_SEED_OF_CAP = 42
_SEED_OF_APP_REVIEWS = 1234
_APP_REVIEWS_EVALUATION = 10_000
_OWN = ("", "app_reviews", "duorc", "trec")


@dataclass(frozen=True)
class Options:
    """Options that select rows and templates. The member is the data set's id.

    Attributes:
        templates: the data set's folder among promptsource's templates.
        config, data_dir, revision: which part of the data set to read, see `hub.HubData`.
        train_split, evaluation_split: names of the data set's splits; empty for none, as for tasks
            that are only evaluated.
        ignore: names of templates to skip.
        evaluation_templates: `original` or `all`.
        interface: `mc`, or `gen` for answers that are generated.
        references: the column with all accepted answers of a row, such as `answers.text`.
        own: the authors' special case for this data set: `app_reviews` (10,000 rows of its only
            split are for evaluation), `duorc` (rows without an answer get a template's text for
            that case), `trec` (a single prompt over all fine labels, named by `choices`).
        choices: the names of the labels, for `trec`.
        max_examples: maximum number of training pairs to keep, drawn as the authors draw them.
    """

    templates: str = ""
    config: str = ""
    data_dir: str = ""
    revision: str = ""
    train_split: str = "train"
    evaluation_split: str = "validation"
    ignore: list[str] | None = None
    evaluation_templates: str = "original"
    interface: str = "mc"
    references: str = ""
    own: str = ""
    choices: list[str] | None = None
    max_examples: int = 500_000


expand = no_tasks


def check(spec: TaskSpec) -> None:
    """Reject unknown options. Names of templates are checked when they are read."""
    options = options_of(Options, spec)
    if len(spec.members) != 1:
        raise PhatgooseError(f"task {spec.name}: members must be one data set of the hub")
    one_of(options.evaluation_templates, ("original", "all"), f"task {spec.name}: templates")
    one_of(options.interface, ("mc", "gen"), f"task {spec.name}: interface")
    one_of(options.own, _OWN, f"task {spec.name}: own")


def identity(spec: TaskSpec) -> Any:
    """Return the revision of the data set or its files. The templates' version is fixed."""
    return hub.identity(_data(spec), spec.folder)


def missing(spec: TaskSpec) -> str | None:
    """Return why the data set is unavailable, or None."""
    return hub.missing(_data(spec), spec.folder)


def read(specs: Sequence[TaskSpec]) -> Iterator[TaskRecords]:
    """Read tasks, row by row."""
    for spec in specs:
        yield TaskRecords(spec, _records(spec), origin=hub.origin(_data(spec), spec.folder))


def _data(spec: TaskSpec) -> HubData:
    options = options_of(Options, spec)
    return HubData(spec.members[0], options.config, options.data_dir, options.revision)


def _records(spec: TaskSpec) -> Iterator[tuple[Split, Record]]:
    options = options_of(Options, spec)
    every = _templates(spec, options)
    original = [t for t in every if t.original or options.evaluation_templates == "all"]
    if options.interface == "mc":
        original = [t for t in original if t.answer_choices is not None]
    if not original:
        raise PhatgooseError(f"task {spec.name}: no template is left for evaluation")
    for split, templates in (("train", every), ("evaluation", original)):
        name = getattr(options, f"{split}_split")
        if not name:
            continue
        rows = hub.rows(_data(spec), name, spec.folder)
        numbers = _numbers(len(rows), split, options)
        for place, template in _pairs(len(numbers), len(templates), split, options):
            number = int(numbers[place])
            row = _row(rows[number], number, every, options)
            record = _record(spec, row, number, templates[template], split, options)
            if record is not None:
                yield split, record  # type: ignore[misc]


def _templates(spec: TaskSpec, options: Options) -> list[Template]:
    if options.own == "trec":
        return [_trec(options.choices or [])]
    every = templates_of(options.templates)
    names = [template.name for template in every]
    for name in options.ignore or ():
        one_of(name, names, f"task {spec.name}: ignore")
    return [template for template in every if template.name not in (options.ignore or ())]


def _trec(choices: Sequence[str]) -> Template:
    """Return the authors' only prompt for TREC."""
    prompt = "Question: {{ text }}\nAnswer choices: {{ answer_choices }}\nAnswer:"
    answer = "{{ answer_choices[fine_label] }}"
    return Template("fine labels", f"{prompt} ||| {answer}", " ||| ".join(choices), True)


def _numbers(count: int, split: str, options: Options) -> Sequence[int] | np.ndarray:
    """Return the numbers of the rows of a split, within the data set's split."""
    if options.own != "app_reviews":
        return range(count)
    order = list(range(count))
    np.random.RandomState(_SEED_OF_APP_REVIEWS).shuffle(order)
    train = order[_APP_REVIEWS_EVALUATION:]
    return train if split == "train" else order[:_APP_REVIEWS_EVALUATION]


def _pairs(rows: int, templates: int, split: str, options: Options) -> Iterator[tuple[int, int]]:
    """Yield row and template indices. Excess training pairs are sampled as the authors do."""
    total = rows * templates
    pairs: Any = range(total)
    if split == "train" and total > options.max_examples:
        generator = np.random.default_rng(_SEED_OF_CAP)
        # Sorted, so that a row is read once for all its templates.
        pairs = np.sort(generator.choice(total, options.max_examples, replace=False))
    for pair in pairs:
        yield int(pair) // templates, int(pair) % templates


def _row(
    row: dict[str, Any], number: int, templates: Sequence[Template], options: Options
) -> dict[str, Any]:
    """Return a row as templates see it."""
    if options.own == "duorc" and row["no_answer"]:
        template = templates[number % len(templates)]
        if template.original:
            said = template.apply({**row, "no_answer": True}, number)
            row = {**row, "answers": [said.answer] if said else []}
    return row


def _record(
    spec: TaskSpec,
    row: Mapping[str, Any],
    number: int,
    template: Template,
    split: str,
    options: Options,
) -> Record | None:
    made = template.apply(row, number)
    if made is None:
        return None
    prompt, target, choices = with_space(made.prompt), made.answer, made.choices
    targets, correct = [target], []
    if split == "train" or options.interface == "gen":
        choices = []
        if split == "evaluation" and options.references:
            targets += [text for text in _references(row, options.references) if text != target]
    else:
        correct = [_closest(target, choices)]
        targets = [choices[correct[0]]]
    # Two rows may have the same prompt; both count.
    document = document_id(spec.name, f"{number}\n{prompt}")
    record = Record(
        spec.name,
        document,
        prompt,
        targets,
        choices,
        correct,
        text="\n".join(_texts(row)),
        cluster=f"{split} row {number}",
    )
    check_record(record, f"data set {_data(spec)}, row {number + 1}, template {template.name}")
    return record


def _closest(target: str, choices: Sequence[str]) -> int:
    """Return the index of the target, else of the choice with the longest common prefix.

    Among equal prefixes the shortest choice wins.
    """
    if target in choices:
        return choices.index(target)
    common = [(_common(target, choice), -len(choice), -i) for i, choice in enumerate(choices)]
    return -max(common)[2]


def _common(a: str, b: str) -> int:
    """Return the length of the common prefix of two texts."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _references(row: Mapping[str, Any], path: str) -> list[str]:
    value: Any = row
    for part in path.split("."):
        value = value[part]
    return [text for text in value if text.strip()]


def _texts(value: Any) -> Iterator[str]:
    """Yield every string in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, Sequence):
        for part in value:
            yield from _texts(part)
