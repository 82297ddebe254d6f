"""The ``mixsize`` command."""
from importlib import metadata

from mixsize_timm import cli


def test_a_subcommand_gets_its_arguments(capsys):
    assert cli.main(['train', '--nonsense']) == 2
    assert 'unrecognized arguments: --nonsense' in capsys.readouterr().err


def test_what_there_is_is_said(capsys):
    assert cli.main(['--help']) == 0 and 'train' in capsys.readouterr().out
    assert cli.main([]) == 2 and 'which command? Choose from: train' in capsys.readouterr().err
    assert cli.main(['trian']) == 2 and "no command 'trian'" in capsys.readouterr().err


def test_versions_are_those_that_are_installed(capsys):
    assert cli.main(['--version']) == 0
    out = capsys.readouterr().out
    for package in ('mixsize-timm', 'timm', 'torch', 'accelerate'):
        assert f'{package} {metadata.version(package)}' in out
