"""`dvpa-train`: making training data ready (the training itself is `dvpa train`).

Bad input ends with exit code 2 and one line on stderr, as with `dvpa`.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dvpa.command_line import BAD_INPUT, INTERRUPTED, Parser, one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit code."""
    try:
        arguments = _parser().parse_args(argv)
        arguments.command(arguments)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("DVPA_DEBUG") == "1":
            raise
        print(f"dvpa-train: error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("dvpa-train: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dvpa-train",
        description="Prepare training data for `dvpa train`.",
        epilog="example: dvpa-train prepare 'corpus/*.jsonl' --tokenizer runs/t --out data/corpus",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    prepare = commands.add_parser(
        "prepare",
        help="tokenise text, JSONL or Parquet into packed, memory-mapped shards",
        description="Tokenise text, JSONL or Parquet files into packed, memory-mapped shards.",
        epilog="example: dvpa-train prepare 'corpus/*.jsonl' --tokenizer runs/t --out data/corpus",
    )
    prepare.set_defaults(command=_prepare)
    prepare.add_argument("files", metavar="FILE", nargs="+", help="a name or a quoted glob")
    prepare.add_argument(
        "--tokenizer", type=Path, required=True, help="a tokenizer or checkpoint folder"
    )
    prepare.add_argument("--out", type=Path, required=True, help="a new folder")
    prepare.add_argument("--field", default="text", help="of JSON objects or columns (text)")
    prepare.add_argument(
        "--documents",
        choices=["file", "paragraph", "line"],
        default="file",
        help="what one document is in a text file (default: file)",
    )
    for name, place in (("bos", "first"), ("eos", "last")):
        prepare.add_argument(
            f"--{name}",
            action=argparse.BooleanOptionalAction,
            help=f"{name} as the {place} token of every document (default: if there is one)",
        )
    prepare.add_argument(
        "--shard-tokens", type=_positive, help="tokens a shard is closed at (default: 2^27)"
    )
    prepare.add_argument(
        "--workers", type=_positive, default=os.cpu_count() or 1, help="tokenizer threads (all)"
    )
    prepare.add_argument(
        "--strict", action="store_true", help="an unusable document is an error, not a count"
    )
    _add_json(prepare)
    verify = commands.add_parser(
        "verify",
        help="compare every shard of a prepared folder with the manifest's hashes",
        description="Compare every shard of a prepared folder with the manifest's hashes.",
        epilog="example: dvpa-train verify data/corpus",
    )
    verify.set_defaults(command=_verify)
    verify.add_argument("folder", metavar="FOLDER", type=Path, help="a prepared folder")
    _add_json(verify)
    return parser


def _prepare(arguments: argparse.Namespace) -> None:
    # Before the first import of the tokenizer's threads, which read it once.
    os.environ["RAYON_NUM_THREADS"] = str(arguments.workers)
    from rich.console import Console

    from dvpa_train.prepare import DEFAULT_SHARD_TOKENS, PrepareOptions, prepare

    options = PrepareOptions(
        field=arguments.field,
        unit=arguments.documents,
        bos=arguments.bos,
        eos=arguments.eos,
        shard_tokens=arguments.shard_tokens or DEFAULT_SHARD_TOKENS,
        strict=arguments.strict,
    )
    manifest = prepare(
        arguments.files,
        arguments.tokenizer,
        arguments.out,
        options,
        workers=arguments.workers,
        console=Console(stderr=True),
    )
    _report(arguments, arguments.out, manifest)


def _verify(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from dvpa_train.prepare import verify

    _report(arguments, arguments.folder, verify(arguments.folder, Console(stderr=True)))


def _report(arguments: argparse.Namespace, folder: Path, manifest: "object") -> None:
    from dvpa_train.prepare import describe
    from dvpa_train.token_shards import Manifest

    assert isinstance(manifest, Manifest)
    if arguments.json == "-":
        print(json.dumps(manifest.to_dict(), indent=2))
        return
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(manifest.to_dict(), indent=2) + "\n")
    print(
        f"{folder}: {manifest.num_tokens:,} tokens of {manifest.num_documents:,} documents in "
        f"{len(manifest.shards)} shards ({manifest.dtype}); {describe(manifest.skipped)}"
    )


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", metavar="FILE", help="write the manifest there ('-': stdout)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return int(text)
