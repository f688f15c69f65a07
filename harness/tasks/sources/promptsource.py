"""The prompt templates of promptsource (Bach et al., arXiv 2202.01279), the basis of P3.

They are read from the package's source distribution, version 0.2.3 (Apache-2.0), and rendered in
Jinja's sandbox as the package renders them. A template is `prompt ||| answer`. Variables are
truncated to 2,048 characters. A template that does not apply to a row renders to a different number
of parts.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from harness.tasks.files import open_archive
from harness.tasks.spec import one_of
from phatgoose.cache import fetch_distribution

_SHA256 = "f106c889778a0fe5590e7183904bf964e1a01691c8a29451e44f3df5ddef05f5"
_ROOT = "promptsource-0.2.3/promptsource/templates/"
_FILE = "/templates.yaml"
_LONGEST_VARIABLE = 2048
# Replaces the separator in the text of rows.
_PIPES = "\x00pipes\x00"


@dataclass(frozen=True)
class Template:
    """One prompt template for the rows of a data set.

    Attributes:
        name: unique among the templates of a data set.
        jinja: prompt and answer, with `|||` between them.
        answer_choices: the answers to choose from, as Jinja with `|||` between them, if any.
        original: whether it is for the task that the data set was made for.
    """

    name: str
    jinja: str
    answer_choices: str | None
    original: bool

    def choices(self, row: Mapping[str, Any]) -> list[str]:
        """Return the answers to choose from; empty if the template has none."""
        if self.answer_choices is None:
            return []
        rendered = _compiled(self.answer_choices).render(**_protected(row))
        return [_plain(part) for part in rendered.split("|||")]

    def apply(self, row: Mapping[str, Any], number: int) -> "Prompted | None":
        """Render the template for a row; return None if it does not apply.

        Args:
            row: the row of the data set, by column.
            number: the number of the row; seeds the template's random choices.
        """
        cut = f" | string | truncate({_LONGEST_VARIABLE}) }}}}"
        _CHANCE.seed(number)
        try:
            choices = self.choices(row)
            values = {**_protected(row), "answer_choices": choices or None}
            rendered = _compiled(self.jinja.replace("}}", cut)).render(**values)
            parts = [_plain(part) for part in rendered.split("|||")]
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
            return None
        if len(parts) != 2 or not all(parts):
            return None
        return Prompted(parts[0], parts[1], choices)


@dataclass(frozen=True)
class Prompted:
    """A rendered template: the prompt, the correct answer, and the choices if any."""

    prompt: str
    answer: str
    choices: list[str]


@lru_cache
def templates_of(path: str) -> list[Template]:
    """Return all templates of a data set, sorted by name.

    Args:
        path: the data set's folder among the templates, such as `ag_news` or `super_glue/copa`.

    Raises:
        PhatgooseError: there is no such folder (similar names are suggested), or the package cannot
            be downloaded.
    """
    sources = _sources()
    one_of(path, sources, "templates of promptsource")
    found = yaml.load(sources[path], Loader=_Loader)["templates"].values()
    made = [
        Template(
            str(t["name"]),
            str(t["jinja"]),
            t.get("answer_choices"),
            bool((t.get("metadata") or {}).get("original_task")),
        )
        for t in found
    ]
    return sorted(made, key=lambda template: template.name)


@lru_cache(maxsize=1)
def _sources() -> dict[str, bytes]:
    """Return every templates.yaml by data set (5 MB)."""
    archive = fetch_distribution(
        "promptsource==0.2.3",
        "promptsource-0.2.3.tar.gz",
        _SHA256,
        source=True,
        any_python=True,  # only its data is used
    )
    found = {}
    with open_archive(archive) as tar:
        for info in tar:
            file = tar.extractfile(info) if info.name.endswith(_FILE) else None
            if file is not None:
                found[info.name[len(_ROOT) : -len(_FILE)]] = file.read()
    return found


class _Loader(yaml.SafeLoader):
    """A loader that reads the package's two tags as dictionaries and rejects all others."""


def _dictionary(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, _dictionary)


def _most_frequent(items: Sequence[Any]) -> list[Any]:
    counts = Counter(items).most_common()
    return [item for item, count in counts if count == counts[0][1]]


# Source of the templates' random choices.
_CHANCE = random.Random()
# Globals and filters that templates may use.
_ENVIRONMENT = ImmutableSandboxedEnvironment()
_ENVIRONMENT.globals["zip"] = zip
_ENVIRONMENT.filters |= {
    "choice": _CHANCE.choice,
    "random": _CHANCE.choice,
    "most_frequent": _most_frequent,
}


@lru_cache(maxsize=4096)
def _compiled(jinja: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(jinja)


def _protected(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.replace("|||", _PIPES) if isinstance(v, str) else v for k, v in row.items()}


def _plain(part: str) -> str:
    return part.replace(_PIPES, "|||").strip()
