"""The `depthmup` command: its commands, in the order that `--help` lists them, and how mistakes are said."""

import errno
import sys

import click

from depthmup.data.errors import UserError
from depthmup.data.files import describe_full_disk
from depthmup.launch.commands import images, single, studies, theory, tuning
from depthmup.launch.commands.group import Commands
from depthmup.models.errors import ModelError
from depthmup.train.interrupt import ended_as_by_ctrl_c, prepare_streams

# What keeps a command from a file, beside a full disk: it is another user's, its folder is none or cannot be made, its
# name is too long.
NO_FOLDER = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT}
ITS_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, *NO_FOLDER}

SECTIONS = {
    "A study": [
        studies.new,
        studies.transfer,
        tuning.tune,
        tuning.verify,
        studies.plan,
        studies.launch_command,
        studies.status,
        studies.retry,
        studies.cancel_command,
        studies.report,
        studies.scale_command,
    ],
    "One network": [single.train, single.check, single.export],
    "Images": [images.pack, images.index, images.inspect],
    "Theory": [theory.converge_command, theory.exponents_command, theory.limit],
    "This machine": [single.doctor, single.cluster, single.completion],
}


@click.group(cls=Commands, sections=SECTIONS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="depthmup", message="%(package)s %(version)s")
def cli() -> None:
    """Tune a small network, train a wide and deep one with the same learning rate.

    CONFIG is a YAML file, or a study's folder; KEY=VALUE overrides a key, as in train.samples=1e5 seed=7.
    """


def main() -> None:
    """The `depthmup` command: 0 on success, 2 with one line on a user's mistake, 128 + the signal that ended it."""
    prepare_streams()
    try:
        with ended_as_by_ctrl_c():
            cli()
    except (UserError, ModelError) as error:
        click.echo(f"depthmup: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        words = describe_full_disk(error, "standard output")
        if error.errno in ITS_PLACE:
            words = f"{error.filename}: {error.strerror}: use another file or folder"
        if not words:
            raise
        click.echo(f"depthmup: {words}", err=True)
        sys.exit(2)
