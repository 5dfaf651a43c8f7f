"""Commands for tests, run in this process on the CPU."""

import json

from click.testing import CliRunner

import cli

QUESTION = "Mia has 12 apples. She buys 7 more. How many apples does Mia have now?"


def run(command, *arguments, stdin=None):
    where = [] if command in ("info", "bench") else ["--device", "cpu"]
    return CliRunner().invoke(cli.cli, [command, *where, *map(str, arguments)], input=stdin)


def run_json(*arguments, **given):
    return json.loads(run(*arguments, "--json", **given).stdout)


def mistake(*arguments, stdin=None):
    """The one sentence that a mistake gives; nothing was printed for the answer."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert result.stderr.count("Error: ") == 1
    return result.stderr.strip().splitlines()[-1].removeprefix("Error: ")


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def user(content):
    return {"role": "user", "content": content}
