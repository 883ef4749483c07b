"""How the scripts start: flags in, help and usage at once, then the work.

Contract: nothing in here needs TensorFlow, whose import takes seconds, until the flags are
known to be right. How an error ends the process is in `exit_codes`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
from typing import Any, Callable, Sequence

from absl import app, flags

from bn_tf1 import quiet_start
from bn_tf1.jobs import config
from bn_tf1.jobs.config import Config, ConfigError
from bn_tf1.version import VERSION

_CLOSING_SECS = 5.0

# Limits of `Workers` that are flags: (default, help) by name.
_SECONDS = {
    "join_secs": (60.0, "Seconds to wait for all workers."),
    "silence_secs": (10.0, "Seconds without a word after which a worker is lost."),
    "step_secs": (600.0, "Seconds without progress after which all workers end."),
}
_HELP = ("-h", "-help", "--help", "-?", "--helpfull", "-helpfull", "--helpshort")
_GENERAL = "this program"


def define_options() -> None:
    """Defines a flag for each option of a `Config`."""
    define = {
        bool: flags.DEFINE_boolean,
        float: flags.DEFINE_float,
        int: flags.DEFINE_integer,
        str: flags.DEFINE_string,
    }
    groups = config.groups()
    for field in dataclasses.fields(Config):
        about, place = field.metadata, {"module_name": groups[field.name]}
        text = about["help"]
        if about["choices"]:
            # No DEFINE_enum: what is wrong is said by `Config`, in the words of all others.
            text += f" One of: {', '.join(about['choices'])}."
        if about["words"]:
            parser, written = _NumberOrWord(about["words"]), flags.ArgumentSerializer()
            flags.DEFINE(
                parser, field.name, field.default, text, serializer=written, **place
            )
        else:
            define[about["kind"]](field.name, field.default, text, **place)
    flags.DEFINE_alias("train_dir", "model_dir")


class _NumberOrWord(flags.FloatParser):
    """Takes some words in the place of a number."""

    def __init__(self, words: Sequence[str]):
        super().__init__()
        self.words = words

    def parse(self, argument: Any) -> Any:
        return argument if argument in self.words else super().parse(argument)


def given() -> dict[str, Any]:
    """Value by name of the options of a `Config` that stand on the command line."""
    return {
        field.name: flags.FLAGS[field.name].value
        for field in dataclasses.fields(Config)
        if flags.FLAGS[field.name].present
    }


def define_workers() -> None:
    """Defines the flags of a run on several hosts."""
    group = {"module_name": "several workers"}
    text = "host:port of each worker, the chief's first; else as TF_CONFIG says."
    flags.DEFINE_list("worker_hosts", [], text, **group)
    text = "Which of --worker_hosts this is."
    flags.DEFINE_integer("task_index", 0, text, **group)
    text = "File with what only the workers know, the same for all: without it whoever "
    text += "reaches the chief's port may join."
    flags.DEFINE_string("cluster_secret_file", "", text, **group)
    for name, (default, text) in _SECONDS.items():
        flags.DEFINE_float(name, default, text, **group)


def workers() -> Any:
    """The `Workers` as these flags or TF_CONFIG say; None for one process alone.

    Raises:
        ConfigError: they do not fit.
    """
    from bn_tf1.workers.cluster import Workers

    values = flags.FLAGS
    secret = b""
    if values.cluster_secret_file:
        with open(values.cluster_secret_file, "rb") as file:
            secret = file.read(1 << 16).strip()
    options = {"secret": secret, **{name: values[name].value for name in _SECONDS}}
    try:
        # A flag stands over the environment, which a scheduler may set for all programs.
        if values.worker_hosts:
            found = Workers(values.worker_hosts, values.task_index, **options)
        else:
            found = Workers.from_environment(**options)
    except ValueError as error:
        raise ConfigError(_with_flags(str(error), values.worker_hosts)) from error
    if found is None:
        _check_that_nothing_is_given()
    return None if found is None or found.size == 1 else found


def _check_that_nothing_is_given():
    """Refuses what is about several workers where there is one."""
    for name in ("task_index", "cluster_secret_file", "sync_batch_norm", *_SECONDS):
        if flags.FLAGS[name].present:
            raise ConfigError(
                f"--{name} is {flags.FLAGS[name].value!r}, but does nothing without "
                "several workers: give --worker_hosts or TF_CONFIG, or leave it out"
            )


def _with_flags(message, hosts):
    """A message about the arguments of `Workers` in terms of the flags for them."""
    names = {f"`{name}`": f"--{name}" for name in _SECONDS}
    if hosts:  # else they are of TF_CONFIG
        names.update({"`hosts`": "--worker_hosts", "`index`": "--task_index"})
    for argument, flag in names.items():
        message = message.replace(argument, flag)
    return message


def interpreter() -> list[str]:
    """What starts the Python that runs now, typed here: "python" if that is enough."""
    # What is printed to be typed shall not lead to another Python than this one.
    path = sys.executable
    for name in ("python", "python3"):
        if shutil.which(name) == path:
            return [name]
    relative = os.path.relpath(path)
    return [path if relative.startswith(os.pardir) else relative]


def run(
    prepare: Callable[[], Any],
    work: Callable[[Any], None],
    examples: Sequence[str] = (),
) -> None:
    """Parses the flags, does what the script is for in graph mode, and exits the process.

    The docstring of the module that runs describes the script in the help.

    Args:
        prepare: checks the flags without TensorFlow; raises a `ConfigError` if they are
            wrong.
        work: the script, called with what `prepare` returned.
        examples: command lines for the help, without the script.
    """
    # Before TensorFlow is imported, which takes seconds in which Ctrl-C is a traceback.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    flags.DEFINE_boolean(
        "verbose", False, "Shows TensorFlow's own log, too.", module_name=_GENERAL
    )
    flags.DEFINE_boolean(
        "version", False, "Prints the version and exits.", module_name=_GENERAL
    )
    app.run(
        lambda argv: _run_main(prepare, work),
        flags_parser=lambda argv: _parse_flags(argv, examples),
    )


def _end(number, frame):
    """Ends the process by a signal, as soon as what is open is closed."""
    # Python drops what a handler raises within a destructor, and TensorFlow waits 30 s for
    # a session that does not close behind an exception.
    timer = threading.Timer(_CLOSING_SECS, os._exit, [128 + number])
    timer.daemon = True
    timer.start()
    sys.exit(128 + number)


def _parse_flags(argv: Sequence[str], examples):
    # absl's own help has no groups and no examples, knows TensorFlow's flags, and ends with 1.
    if not set(_HELP).isdisjoint(argv[1:]):
        print(_help(sys.modules["__main__"].__doc__, examples))
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
        fail(_wrong_value(error), 2)
    except flags.UnrecognizedFlagError as error:
        fail(_unknown_flag(error), 2)
    # ValueError: of absl for a value behind --no<flag>.
    except (flags.Error, ValueError) as error:
        fail(str(error), 2)
    if flags.FLAGS.version:
        with quiet_start.importing(verbose=flags.FLAGS.verbose):
            from tensorflow.compat.v1 import version
        print(f"bn_tf1 {VERSION}, TensorFlow {version.VERSION}")
        sys.exit(0)
    if len(rest) > 1:
        fail(_unexpected(argv, rest[1]), 2)
    return rest


def _help(description, examples):
    """The help, at most 80 columns wide: groups of flags, then examples."""
    width = min(80, shutil.get_terminal_size((80, 24)).columns)
    program = f"python {sys.argv[0]}"
    lines = [f"usage: {program} [--flag=value ...]", "", description.strip()]
    for group, members in flags.FLAGS.flags_by_module_dict().items():
        is_foreign = group.startswith(("absl", "tensorflow"))
        members = [] if is_foreign else [*filter(_is_own, members)]
        if members:
            lines += ["", f"{'more' if group == sys.argv[0] else group}:"]
        for flag in members:
            lines += _flag_help(flag, width)
    lines += ["", "examples:"]
    lines += [f"  {program} {example}".rstrip() for example in examples]
    return "\n".join(lines)


def _is_own(flag):
    """Whether a flag has a meaning of its own, which a second name of one has not."""
    return not flag.help.startswith("Alias for --")


def _flag_help(flag, width):
    if flag.boolean:
        name = f"--[no]{flag.name}"
    else:
        name = f"--{flag.name}={str(flag.default_as_str or '').strip(chr(39))}"
    text = re.sub(r"^<[^>]*>: ", "", flag.help)  # of absl: the values of an enum
    values = getattr(flag.parser, "enum_values", None)
    if values:
        text += f" One of: {', '.join(values)}."
    if flag.boolean and flag.default:
        text += " On by default."
    yield f"  {name}"
    yield from textwrap.wrap(
        text, width, initial_indent=" " * 6, subsequent_indent=" " * 6
    )


def _unknown_flag(error):
    if hasattr(Config, error.flagname):  # of train.py, asked of eval.py
        return (
            f"--{error.flagname} is no flag here: it is read from the run's config.json"
        )
    hint = "" if "Did you mean" in str(error) else "; --help lists the flags"
    return f"{error}{hint}"


def _unexpected(argv, argument):
    # absl takes "--augment False" for a flag that is on, and a word that nobody reads.
    before = argv[argv.index(argument) - 1].lstrip("-")
    if before in flags.FLAGS and flags.FLAGS[before].boolean:
        return (
            f"unexpected argument {argument!r} behind --{before}: write "
            f"--{before}={argument}, or --no{before} to turn it off"
        )
    is_folder = os.path.isdir(argument)
    hint = f": did you mean --model_dir={argument}?" if is_folder else ""
    return f"unexpected argument {argument!r}: every option is a --flag{hint}"


# How absl's messages go on behind a value that cannot be parsed, which may itself hold ": ".
_REASONS = r"(?:\('Non-boolean|invalid literal|could not|value should|[-\d.e+]+ is not)"


def _wrong_value(error):
    """The message for a value that absl could not parse: flag, value and range.

    Its own holds whatever the parser raised, for a bool a tuple.
    """
    match = re.match(rf"flag --(\w+)=(.*): {_REASONS}", str(error), re.DOTALL)
    if match is None or match.group(1) not in flags.FLAGS:
        return str(error)
    name, value = match.groups()
    flag = flags.FLAGS[name]
    wanted = {
        "bool": "true or false",
        "int": "an integer",
        "float": "a number",
        "string enum": "one of " + ", ".join(getattr(flag.parser, "enum_values", [])),
    }[flag.flag_type()]
    wanted = " or ".join([wanted, *map(repr, getattr(flag.parser, "words", ()))])
    bound = getattr(flag.parser, "lower_bound", None)
    if bound is not None:
        wanted += f", at least {bound:g}"
    return f"--{name} is {value!r}, but must be {wanted}"


def _run_main(prepare, work):
    try:
        request = prepare()
    except ConfigError as error:
        fail(str(error), 2)
    # Here and not above: it imports TensorFlow, and what is wrong with a flag is said first.
    with quiet_start.importing(verbose=flags.FLAGS.verbose):
        from bn_tf1.jobs.process import exit_codes
    exit_codes.run(lambda: work(request), verbose=flags.FLAGS.verbose)


def fail(message: str, code: int) -> None:
    """Ends the process with `code` and one line on standard error."""
    # One line: a value or a path may hold a line break.
    print("error: " + "\\n".join(message.splitlines()), file=sys.stderr)
    sys.exit(code)
