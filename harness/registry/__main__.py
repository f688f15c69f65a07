"""The registry's command line: python -m harness.registry list|show|verify|gc|... <registry>.

Each command returns an `Output`: a document for programs (--json) and text for people.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.command_line import Output, count, run_command, table
from harness.registry import Registry
from harness.registry.files import manifest_numbers, object_file
from harness.registry.gc import DAY, collect
from harness.registry.verify import verify
from harness.storage import Folder
from phatgoose.card import dtype_name
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert

_SHORT = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return run_command(_parser(), arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m harness.registry",
        description="Look at a registry of experts, or change it.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, call: Callable[[Any], Output], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.set_defaults(call=call)
        sub.add_argument("registry", help="its folder, or a URI; a run's is <run.dir>/registry")
        sub.add_argument("--json", action="store_true", help="print one JSON document")
        return sub

    command("list", _list, "list the experts of the pool")
    show = command("show", _show, "show an expert's card and tensors")
    show.add_argument("name", help="the expert's name")
    check = command("verify", _verify, "read every file and check that it is intact")
    check.add_argument(
        "--all", action="store_true", help="also read experts of older manifests, and orphans"
    )
    gc = command("gc", _gc, "remove what no manifest and no finished job names")
    gc.add_argument("--dry-run", action="store_true", help="only show what would be removed")
    gc.add_argument(
        "--keep-manifests",
        type=int,
        metavar="N",
        help="also remove all but the newest N manifests, and what only they name",
    )
    gc.add_argument(
        "--older-than",
        type=_seconds,
        default=DAY,
        metavar="AGE",
        help="keep younger files, such as 12h (default: 1d)",
    )
    load = command("import-peft", _import_peft, "add a LoRA adapter that PEFT saved")
    load.add_argument("folder", help="the adapter's folder")
    load.add_argument("--name", help="the expert's name (default: the folder's)")
    load.add_argument(
        "--base",
        help="the adapter's base: a packaged name, a directory or a Hugging Face id; required to "
        "start a registry, and if the base is not found under the name that the adapter gives",
    )
    load.add_argument("--replace", action="store_true", help="take over the name of another expert")
    save = command("export-peft", _export_peft, "write an expert as a LoRA adapter for PEFT")
    save.add_argument("name", help="the expert's name")
    save.add_argument("folder", help="the folder to write; created if missing")
    rename = command("rename", _rename, "give an expert another name")
    rename.add_argument("old", help="its name")
    rename.add_argument("new", help="its new name")
    remove = command("remove", _remove, "remove an expert from the pool; its object stays")
    remove.add_argument("name", help="the expert's name")
    return parser


def _list(args: argparse.Namespace) -> Output:
    registry = Registry.open(args.registry)
    manifest = registry.manifest()
    experts = [_summary(registry, name, content) for name, content in manifest.experts.items()]
    header = ["name", "task", "hash", "rank", "linears", "gates", "size", "job", "base"]
    rows = [_row(expert) for expert in experts]
    total = sum(expert.get("bytes", 0) for expert in experts)
    lines = [
        table(header, rows, right={3, 4, 6}),
        f"{count(len(experts), 'expert')}, {_size(total)}, manifest {manifest.number}, "
        f"base {manifest.base_fingerprint[:_SHORT]}",
        *(f"{expert['name']}: {expert['error']}" for expert in experts if "error" in expert),
    ]
    document = {
        "registry": str(registry.folder),
        "manifest": manifest.number,
        "base_fingerprint": manifest.base_fingerprint,
        "experts": experts,
        "bytes": total,
    }
    return Output(document, "\n".join(lines))


def _summary(registry: Registry, name: str, content_hash: str) -> dict[str, Any]:
    """Return what the list shows about an expert, or its `error` if its object is damaged."""
    try:
        expert = registry.load(content_hash)
    except PhatgooseError as error:
        return {"name": name, "hash": content_hash, "error": str(error)}
    factors = expert.linears.values()
    return {
        "name": name,
        "task": expert.card.task,
        "hash": content_hash,
        "ranks": sorted({linear.lora_A_RD.shape[0] for linear in factors}),
        "linears": len(factors),
        "gates": sum(linear.gate_D is not None for linear in factors),
        "bytes": sum(tensor.nbytes for linear in factors for _, tensor in linear.tensors()),
        "job": expert.card.job,
        "base": expert.card.base,
    }


def _row(expert: dict[str, Any]) -> list[str]:
    name, content = expert["name"], expert["hash"][:_SHORT]
    if "error" in expert:
        return [name, "damaged", content, *[""] * 6]
    ranks, linears, gates = expert["ranks"], expert["linears"], expert["gates"]
    return [
        name,
        expert["task"],
        content,
        str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}",
        str(linears),
        {0: "no", linears: "yes"}.get(gates, "some"),
        _size(expert["bytes"]),
        expert["job"][:_SHORT],
        expert["base"],
    ]


def _show(args: argparse.Namespace) -> Output:
    registry = Registry.open(args.registry)
    content_hash = registry.find(args.name)
    expert = registry.load(content_hash)
    card = asdict(expert.card)
    linears = {
        linear: {
            field: {
                "dtype": dtype_name(tensor.dtype),
                "shape": list(tensor.shape),
                "bytes": tensor.nbytes,
            }
            for field, tensor in factors.tensors()
        }
        for linear, factors in expert.linears.items()
    }
    file = f"{registry.folder}/{object_file(content_hash)}"
    document = {"hash": content_hash, "file": file, "card": card, "linears": linears}
    facts = [*_lines(card), ("hash", content_hash), ("file", file)]
    width = max(len(key) for key, _ in facts)
    text = [f"{key:{width}}  {value}" for key, value in facts]
    return Output(document, "\n".join([*text, "", _tensors(expert)]))


def _lines(card: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the card's fields; those of the recipe and the metrics as `recipe.rank` and so on."""
    for key, value in card.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", json.dumps(part)) for inner, part in value.items())
        else:
            yield key, value


def _tensors(expert: Expert) -> str:
    """Return a line for each kind of tensor, with the number of linears, and a total line."""
    kinds: Counter[tuple[str, str, str]] = Counter()
    size: Counter[tuple[str, str, str]] = Counter()
    for factors in expert.linears.values():
        for field, tensor in factors.tensors():
            kind = (field, dtype_name(tensor.dtype), str(list(tensor.shape)))
            kinds[kind] += 1
            size[kind] += tensor.nbytes
    rows = [[*kind, str(kinds[kind]), _size(size[kind])] for kind in sorted(kinds)]
    listed = table(["tensor", "dtype", "shape", "linears", "size"], rows, right={3, 4})
    return f"{listed}\n{count(len(expert.linears), 'linear')}, {_size(size.total())}"


def _verify(args: argparse.Namespace) -> Output:
    folder = _folder(args.registry)
    check = verify(folder, every_manifest=args.all)
    lines = [
        *check.problems,
        *(f"no manifest or record names {f}: it is harmless, and gc removes it"
          for f in check.orphans if f.startswith("objects/")),
        *(f"the expert of {f} was deleted: it is harmless, and gc removes it"
          for f in check.orphans if not f.startswith("objects/")),
    ]  # fmt: skip
    if check.unnamed:
        jobs = count(len(check.unnamed), "finished job")
        lines.append(f"{jobs} in no manifest yet: the next run that needs them adds them")
    lines.append(
        f"{count(check.objects, 'expert')} read, {count(len(check.problems), 'problem')}, "
        f"{count(len(check.orphans), 'orphan')}"
    )
    document = {"registry": str(folder), **asdict(check)}
    return Output(document, "\n".join(lines), 1 if check.problems else 0)


def _gc(args: argparse.Namespace) -> Output:
    folder = _folder(args.registry)
    removed = collect(
        folder,
        keep_manifests=args.keep_manifests,
        older_than=args.older_than,
        dry_run=args.dry_run,
    )
    total = sum(garbage.bytes for garbage in removed)
    rows = [[garbage.file, _size(garbage.bytes), garbage.why] for garbage in removed]
    done = "to remove" if args.dry_run else "removed"
    lines = [f"{count(len(removed), 'file')} {done}, {_size(total)}"]
    if removed:
        lines.insert(0, table(["file", "size", "why"], rows, right={1}))
    document = {
        "registry": str(folder),
        "dry_run": args.dry_run,
        "removed": [asdict(garbage) for garbage in removed],
        "bytes": total,
    }
    return Output(document, "\n".join(lines))


def _folder(uri: str) -> Folder:
    """Return the folder of a registry, even if its newest manifest is damaged."""
    folder = Folder(uri)
    if not manifest_numbers(folder):
        Registry.open(uri)  # raises the error
    return folder


def _seconds(text: str) -> float:
    """Return `90`, `30m`, `12h` or `1d` in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number and s, m, h or d, such as 1d")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": DAY}[match[2]]


def _import_peft(args: argparse.Namespace) -> Output:
    folder = Folder(args.registry)
    if not args.base and not manifest_numbers(folder):
        raise PhatgooseError(
            f"no registry here: {folder} has no manifests/<n>.json; to start one, give the "
            "adapter's base with --base"
        )
    # Slow to import, and needed by this command only.
    from phatgoose.base import load_base

    # Only the base's shapes are used, so the narrowest weights suffice.
    base = load_base(args.base, dtype="bfloat16") if args.base else None
    expert = Expert.from_peft(args.folder, base=base, name=args.name)
    if manifest_numbers(folder):
        registry = _to_change(args.registry)
    else:
        folder.check_writable()
        registry = Registry(args.registry, expert.card.base_fingerprint)
    content_hash = registry.publish(expert, replace=args.replace)
    name = expert.card.name
    return Output(
        {"name": name, "hash": content_hash, "registry": str(registry.folder)},
        f"imported {name} as {content_hash[:_SHORT]}",
    )


def _export_peft(args: argparse.Namespace) -> Output:
    registry = Registry.open(args.registry)
    content_hash = registry.find(args.name)
    expert = registry.load(content_hash)
    expert.to_peft(args.folder)
    gates = any(factors.gate_D is not None for factors in expert.linears.values())
    left_out = " without its gates, which PEFT cannot store" if gates else ""
    return Output(
        {"name": args.name, "hash": content_hash, "folder": str(Path(args.folder).absolute())},
        f"exported {args.name} to {args.folder}{left_out}",
    )


def _to_change(uri: str) -> Registry:
    """Return the registry, after checking that several processes can write to its folder."""
    registry = Registry.open(uri)
    registry.folder.check_writable()
    return registry


def _rename(args: argparse.Namespace) -> Output:
    content_hash = _to_change(args.registry).rename(args.old, args.new)
    return Output(
        {"old": args.old, "new": args.new, "hash": content_hash},
        f"renamed {args.old} to {args.new}, now {content_hash[:_SHORT]}; a run "
        f"whose pool has {args.old} trains it again",
    )


def _remove(args: argparse.Namespace) -> Output:
    registry = _to_change(args.registry)
    content_hash = registry.find(args.name)  # a missing name is an error here
    registry.remove(args.name)
    return Output(
        {"name": args.name, "hash": content_hash},
        f"removed {args.name} ({content_hash[:_SHORT]}); a run whose pool has it trains it again; "
        "its object stays for older manifests",
    )


def _size(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


if __name__ == "__main__":
    sys.exit(main())
