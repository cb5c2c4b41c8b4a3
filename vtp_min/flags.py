"""The command line of a script with subcommands: its flags and settings stand in two tables.

    FLAGS      rows (commands, flag, kind, default, help). commands is a string like "probe recon";
               kind is a type, bool for a flag without a value, or a list of the allowed values.
    SETTINGS   rows (commands, name, default, help), for values that --set name=value changes
"""
import argparse
import inspect

from .run import parse_settings


def parse_subcommands(argv, description, commands, flags, settings):
    """commands  {name: function}; the docstring of the function is the help of its command

    -> Namespace with .command, its flags and its settings. Exits with a message after a mistake.
    """
    from .extras.flag_ranges import check_numbers
    raw = argparse.RawDescriptionHelpFormatter             # keeps the line breaks of the docstrings
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, function in commands.items():
        lines = [f"  {name:14} {default!s:9} {text}"
                 for name, default, text in rows_of(settings, command)]
        p = subparsers.add_parser(command, description=inspect.getdoc(function),
                                  epilog="\n".join(["settings for --set:", *lines]),
                                  formatter_class=raw)
        for row in rows_of(flags, command):
            add_flag(p, *row)
        p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                       help="change a setting of the table below; repeatable")
    args = parser.parse_args(argv)
    found = {name: default for name, default, _ in rows_of(settings, args.command)}
    try:
        found |= parse_settings(args.set, found)
    except ValueError as problem:
        parser.error(str(problem))
    del args.set                               # each setting stands under its own name
    args = argparse.Namespace(**vars(args) | found)
    try:
        check_numbers(args, found)
    except ValueError as problem:
        raise SystemExit(f"{parser.prog} {args.command}: {problem}") from None
    return args


def rows_of(table, command):
    """-> the rows that belong to the command, without their first column"""
    return [row[1:] for row in table if command in row[0].split()]


def add_flag(parser, flag, kind, default, text):
    if default is not None and kind is not bool:
        text += f" (default {default})"
    if kind is bool:
        parser.add_argument(flag, action="store_true", help=text)
    elif isinstance(kind, list):
        parser.add_argument(flag, choices=kind, default=default, help=text)
    else:
        parser.add_argument(flag, type=kind, default=default, help=text)
