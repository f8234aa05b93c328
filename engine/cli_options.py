"""What the commands of the command line share: their parsers, and the settings of training beside their own options."""

import argparse
from collections.abc import Callable, Collection

from engine.cli_help import BELOW


def parser_of(name: str, command: Callable, settings: bool = False, more: str = "") -> argparse.ArgumentParser:
    """
    Args:
        settings: the command also takes those of training, and its --help has them too.
        more: for the end of its --help.
    """
    return argparse.ArgumentParser(
        prog=f"higgs-engine {name}",
        description=command.__doc__,
        epilog="\n".join(filter(None, (f"for example:\n{BELOW[name]}", more))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=not settings,
        allow_abbrev=False,
    )


def with_settings(
    parser: argparse.ArgumentParser, argv: list[str], does_without: Collection[str] = ()
) -> tuple[argparse.Namespace, list[str]]:
    """A command's own options, and the settings that follow.

    Args:
        does_without: settings that training requires and this command does not, to be told by its --help.
    """
    if {"-h", "--help"} & set(argv):
        print(_help(parser, does_without))
        raise SystemExit(0)
    return parser.parse_known_args(argv)


def _help(parser: argparse.ArgumentParser, does_without: Collection[str]) -> str:
    from engine.config import help_text

    parser.usage = parser.format_usage().removeprefix("usage: ").rstrip() + " [--config FILE] [--setting VALUE ...]"
    note = f"This command does without {', '.join(does_without)}, which training requires.\n\n" if does_without else ""
    settings = help_text(parser.prog).partition("\n\n")[2]  # its usage is in ours
    return f"{parser.format_help()}\n{note}{settings}"
